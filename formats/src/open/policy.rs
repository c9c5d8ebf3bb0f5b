//! The gate: which files an image may name.
//!
//! An image can come from anywhere, so a name in it is opened only if it is a plain path to a regular
//! file below the folder of the image that the operator named, or below a folder that he allows; and then
//! for reading, but for the data file of an image that is itself opened for writing. Where symbolic links lead is decided by the kernel while it opens (openat2), not by
//! a look beforehand. Nothing outside is ever opened, not even to find out what it is.
//!
//! Where the operator trusts an image as QEMU does ([`Gate::open_to_all`]), a plain path may lead anywhere.

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

/// What a name in an image is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The backing file.
    Backing,
    /// The external data file.
    DataFile,
}

/// Tells files apart whatever their names: device and inode, or the number of a block device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIdentity(u64, u64);

/// A file that an image named and that the policy let through, open.
pub struct Named {
    /// The file.
    pub file: OwnedFd,
    /// Its path; names in it are relative to this one's folder.
    pub path: PathBuf,
    /// Which file it is.
    pub identity: FileIdentity,
}

/// Opens what images name, if it may.
pub struct Gate {
    /// `None` if every folder is allowed.
    roots: Option<Vec<Root>>,
}

/// A folder below which files may lie.
struct Root {
    /// As it was given, made absolute.
    given: PathBuf,
    /// Without symbolic links.
    real: PathBuf,
    folder: OwnedFd,
    /// Whether block devices are allowed below it: only where the operator said so.
    devices: bool,
}

impl FileIdentity {
    /// Which file `file` is.
    pub fn of(file: impl std::os::fd::AsFd) -> Result<Self> {
        let stat = rustix::fs::fstat(file).map_err(|e| Error::io("cannot look at the file", e.into()))?;
        Ok(FileIdentity::from_stat(&stat))
    }

    fn from_stat(stat: &rustix::fs::Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => FileIdentity(u64::MAX, stat.st_rdev),
            FileType::RegularFile
            | FileType::Directory
            | FileType::Symlink
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::Unknown => FileIdentity(stat.st_dev, stat.st_ino),
        }
    }
}

impl Gate {
    /// The gate for the names in `image`, which the operator has named, and in whatever they lead to.
    pub fn new(image: &Path, allow_dirs: &[PathBuf]) -> Result<Self> {
        let mut roots = vec![Root::open(folder_of(image), false)?];
        for folder in allow_dirs {
            let root = Root::open(folder, true).map_err(|e| {
                let what = format!("--allow-dir {} cannot be used", folder.display());
                Error::new(ErrorKind::InvalidInput, what).with_source(e)
            })?;
            roots.push(root);
        }
        Ok(Gate { roots: Some(roots) })
    }

    /// The gate that lets every file and block device through, for images that are trusted.
    pub fn open_to_all() -> Self {
        Gate { roots: None }
    }

    /// Opens the file that `image` calls `name`. Fails with `Denied` if the policy does not allow it.
    pub fn open(&self, image: &Path, name: &[u8], role: Role, writable: bool) -> Result<Named> {
        let Some(roots) = &self.roots else {
            // QEMU writes this prefix before names that would look like a protocol.
            let plain = name.strip_prefix(b"file:").unwrap_or(name);
            return open_anywhere(&Request { image, name: plain, role, writable }, plain.len() == name.len());
        };
        let request = Request { image, name, role, writable };
        request.check_plain()?;
        let path = lexical_path(roots, &request)?;
        let real = std::fs::canonicalize(&path).map_err(|e| request.cannot_open(e))?;
        let root = roots.iter().rev().find(|root| real.starts_with(&root.real));
        let root = root.ok_or_else(|| request.denied("leads out of the folders that are allowed"))?;
        let beneath = real.strip_prefix(&root.real).unwrap_or(&real);
        let (file, identity) = root.open_beneath(beneath, &request)?;
        Ok(Named { file, path, identity })
    }
}

/// The path that the name stands for. Refuses what lies outside by its mere spelling, before anything of it
/// is looked at.
fn lexical_path(roots: &[Root], request: &Request<'_>) -> Result<PathBuf> {
    let name = Path::new(OsStr::from_bytes(request.name));
    let folder = folder_of(request.image);
    let path = if name.is_absolute() {
        name.to_owned()
    } else {
        // Without links in it, `..` means the same to us as to the kernel.
        std::fs::canonicalize(folder).map_err(|e| request.cannot_open(e))?.join(name)
    };
    let plain = without_dots(&path);
    let inside = |root: &Root| plain.starts_with(&root.given) || plain.starts_with(&root.real);
    if roots.iter().any(inside) {
        Ok(path)
    } else {
        Err(request.denied("lies outside of the folders that are allowed"))
    }
}

/// Opens a file of a trusted image where QEMU looks for it.
fn open_anywhere(request: &Request<'_>, may_be_protocol: bool) -> Result<Named> {
    if may_be_protocol {
        request.check_plain()?;
    } else {
        request.check_name()?;
    }
    let name = Path::new(OsStr::from_bytes(request.name));
    let path = match request.role {
        Role::Backing => folder_of(request.image).join(name),
        Role::DataFile => name.to_owned(),
    };
    let access = if request.writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| request.cannot_open(e.into()))?;
    let stat = rustix::fs::fstat(&file).map_err(|e| request.cannot_open(e.into()))?;
    // What is neither a regular file nor a block device is refused by whoever reads it.
    Ok(Named { file, path, identity: FileIdentity::from_stat(&stat) })
}

impl Root {
    fn open(path: &Path, devices: bool) -> Result<Self> {
        let fail = |e: std::io::Error| Error::io("cannot open the folder", e).with_path(path);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let real = std::fs::canonicalize(path).map_err(fail)?;
        Ok(Root {
            given: without_dots(&std::path::absolute(path).map_err(fail)?),
            folder: rustix::fs::openat(CWD, &real, flags, Mode::empty()).map_err(|e| fail(e.into()))?,
            real,
            devices,
        })
    }

    /// Opens `path`, which is below this root and has no symbolic link in it; if either has changed
    /// since, the kernel refuses. Looks at what it is before it opens it: opening a pipe or a tape has
    /// effects of its own.
    fn open_beneath(&self, path: &Path, request: &Request<'_>) -> Result<(OwnedFd, FileIdentity)> {
        let look = self.openat2(path, OFlags::PATH | OFlags::NOFOLLOW, request)?;
        let stat = rustix::fs::fstat(&look).map_err(|e| request.cannot_open(e.into()))?;
        let identity = FileIdentity::from_stat(&stat);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::BlockDevice if self.devices => {}
            FileType::BlockDevice => {
                return Err(request.denied("is a block device outside of any --allow-dir"));
            }
            FileType::Directory
            | FileType::Symlink
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::Unknown => return Err(request.denied("is not a regular file")),
        }
        let access = if request.writable { OFlags::RDWR } else { OFlags::RDONLY };
        let file = self.openat2(path, access | OFlags::NONBLOCK | OFlags::NOCTTY, request)?;
        let opened = rustix::fs::fstat(&file).map_err(|e| request.cannot_open(e.into()))?;
        if FileIdentity::from_stat(&opened) != identity {
            return Err(request.denied("was replaced while it was being opened"));
        }
        Ok((file, identity))
    }

    fn openat2(&self, path: &Path, flags: OFlags, request: &Request<'_>) -> Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.folder, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(
            |errno| match errno {
                Errno::XDEV | Errno::LOOP => request.denied("leads out of the folders that are allowed"),
                Errno::NOSYS => request.denied(
                    "cannot be opened safely: this kernel has no openat2 (Linux 5.6), or a filter forbids it",
                ),
                other => request.cannot_open(other.into()),
            },
        )
    }
}

/// A name in an image, with what an error has to say of it.
struct Request<'a> {
    image: &'a Path,
    name: &'a [u8],
    role: Role,
    writable: bool,
}

impl Request<'_> {
    /// Refuses what is no plain path. As QEMU has it, a colon before the first slash makes a protocol
    /// (`nbd:`, `json:`, `fat:rw:/`), whatever stands before it.
    fn check_plain(&self) -> Result<()> {
        self.check_name()?;
        let before_slash = self.name.split(|byte| *byte == b'/').next().unwrap_or_default();
        if before_slash.contains(&b':') {
            return Err(self.denied("begins with a protocol; only plain paths are followed"));
        }
        Ok(())
    }

    fn check_name(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(self.denied("is empty"));
        }
        if self.name.contains(&0) {
            return Err(self.denied("contains a NUL byte"));
        }
        Ok(())
    }

    fn denied(&self, why: &str) -> Error {
        let remedy = match self.role {
            Role::Backing => "--allow-dir FOLDER allows it, --backing PATH|none replaces it",
            Role::DataFile => "--allow-dir FOLDER allows it",
        };
        Error::new(ErrorKind::Denied, format!("{self} {why}; {remedy}")).with_path(self.image)
    }

    fn cannot_open(&self, error: std::io::Error) -> Error {
        let remedy = match self.role {
            Role::Backing => " (--backing PATH|none replaces it)",
            Role::DataFile if self.writable => " (--read-only only reads it)",
            Role::DataFile => "",
        };
        Error::io(format!("{self} cannot be opened{remedy}"), error).with_path(self.image)
    }
}

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Backing => "backing file",
            Role::DataFile => "external data file",
        };
        write!(f, "its {role} '{}'", String::from_utf8_lossy(self.name).escape_debug())
    }
}

/// The folder that names in `image` are relative to: that of its path as it was given, as with QEMU.
fn folder_of(image: &Path) -> &Path {
    match image.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

/// The absolute path without `.` and `..`, by its spelling alone.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => plain.push(component),
        }
    }
    plain
}
