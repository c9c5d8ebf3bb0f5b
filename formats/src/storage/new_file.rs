//! [`NewFile`]: a file that gets its name when it is whole.
//!
//! It has no name while it is written, or a temporary one where the file system does not know such files;
//! whatever goes wrong before the end leaves nothing behind, and whoever looks sees no half of it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, IFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{FileOptions, FileStorage, LockMode, Storage};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// How a new file may be used, less the process's umask (as with QEMU).
const MODE: u32 = 0o644;
/// Temporary names that are tried. Our choice.
const ATTEMPTS_MAX: u32 = 100;

/// A file that is being made.
pub struct NewFile {
    path: PathBuf,
    folder: OwnedFd,
    name: OsString,
    /// The name that it has so far, if it has one.
    temporary: Option<OsString>,
    /// The file that it replaces, locked.
    replaced: Option<Arc<FileStorage>>,
    /// It is the device itself.
    in_place: bool,
    storage: Arc<FileStorage>,
}

impl NewFile {
    /// Begins a file that will be at `path`. Where there is something, `replace` says that it may go: a
    /// regular file that nobody uses is replaced in the end, a block device written at once.
    pub fn create(path: &Path, replace: bool) -> Result<Self> {
        let fail = |what: &'static str, e: io::Error| Error::io(what, e).with_path(path);
        let there = std::fs::symlink_metadata(path).is_ok();
        if there && !replace {
            return Err(Error::new(ErrorKind::InvalidInput, "the file exists already (--force replaces it)")
                .with_path(path));
        }
        // What a link leads to is replaced, not the link.
        let target = if there {
            std::fs::canonicalize(path).map_err(|e| fail("cannot look at the file", e))?
        } else {
            path.to_owned()
        };
        let folder_path = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let no_name = || Error::new(ErrorKind::InvalidInput, "this is no name for a file").with_path(path);
        let name = target.file_name().ok_or_else(no_name)?.to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(folder_path, flags, Mode::empty())
            .map_err(|e| fail("cannot open the folder", e.into()))?;
        let replaced = if there { Some(lock_old(&target)?) } else { None };
        let device = replaced.as_ref().is_some_and(|old| !old.facts().grows);
        if device {
            drop(replaced);
            let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
            let storage = FileStorage::open(&target, &options)?;
            return Ok(NewFile {
                path: target,
                folder,
                name,
                temporary: None,
                replaced: None,
                in_place: true,
                storage,
            });
        }
        let (file, temporary) =
            open_new(&folder, &name).map_err(|e| fail("cannot make the file", e.into()))?;
        let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
        let storage = FileStorage::from_fd(file, path, &options);
        let remove = |error| {
            if let Some(temporary) = &temporary {
                let _ = rustix::fs::unlinkat(&folder, temporary, AtFlags::empty());
            }
            error
        };
        let storage = storage.map_err(remove)?;
        Ok(NewFile { path: target, folder, name, temporary, replaced, in_place: false, storage })
    }

    /// What is in it.
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage) as Arc<dyn Storage>
    }

    /// Asks the file system not to copy on write, which only some do, and only for a file that is empty.
    /// Whether it will.
    pub fn set_nocow(&self) -> bool {
        let flags = rustix::fs::ioctl_getflags(&*self.storage);
        flags.is_ok_and(|flags| rustix::fs::ioctl_setflags(&*self.storage, flags | IFlags::NOCOW).is_ok())
    }

    /// Gives the file its name, durably; what it holds must be durable already. Fails without a change if
    /// somebody has made a file of that name meanwhile that must not be replaced.
    pub fn finish(mut self) -> Result<()> {
        self.place()
            .map_err(|e| match e {
                Errno::EXIST => {
                    Error::new(ErrorKind::InvalidInput, "the file exists already (--force replaces it)")
                }
                error => Error::io("cannot give the file its name", error.into()),
            })
            .map_err(|e| e.with_path(&self.path))?;
        let closed = self.storage.close();
        closed.map_err(|e| Error::io("cannot close the file", e).with_path(&self.path))
    }

    fn place(&mut self) -> std::result::Result<(), Errno> {
        if self.in_place {
            return Ok(());
        }
        match (self.temporary.clone(), self.replaced.is_some()) {
            (None, false) => self.link(&self.name)?,
            (None, true) => {
                let temporary = self.link_temporary()?;
                self.temporary = Some(temporary.clone());
                rustix::fs::renameat(&self.folder, &temporary, &self.folder, &self.name)?;
            }
            (Some(temporary), true) => {
                rustix::fs::renameat(&self.folder, &temporary, &self.folder, &self.name)?;
            }
            (Some(temporary), false) => self.rename_beside(&temporary)?,
        }
        self.temporary = None;
        rustix::fs::fsync(&self.folder)
    }

    fn link(&self, name: &OsStr) -> std::result::Result<(), Errno> {
        let own = format!("/proc/self/fd/{}", self.storage.as_fd().as_raw_fd());
        rustix::fs::linkat(CWD, own, &self.folder, name, AtFlags::SYMLINK_FOLLOW)
    }

    fn link_temporary(&self) -> std::result::Result<OsString, Errno> {
        let mut attempt = 0;
        loop {
            let temporary = temporary_name(&self.name, attempt);
            match self.link(&temporary) {
                Ok(()) => return Ok(temporary),
                Err(Errno::EXIST) if attempt < ATTEMPTS_MAX => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn rename_beside(&self, temporary: &OsStr) -> std::result::Result<(), Errno> {
        let (folder, name) = (&self.folder, &self.name);
        match rustix::fs::renameat_with(folder, temporary, folder, name, RenameFlags::NOREPLACE) {
            // Not every file system can: a link is as good.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(folder, temporary, folder, name, AtFlags::empty())?;
                rustix::fs::unlinkat(folder, temporary, AtFlags::empty())
            }
            renamed => renamed,
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // It may be left if even that fails; its name says whose it was.
            let _ = rustix::fs::unlinkat(&self.folder, temporary, AtFlags::empty());
        }
    }
}

/// A file without a name in `folder`: it is gone with the last who has it open.
pub(super) fn open_nameless(folder: &Path) -> Result<OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let opened = match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        // The kernel or the file system does not know such files: the name goes at once.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => open_and_unlink(folder),
        opened => opened,
    };
    opened.map_err(|e| Error::io("cannot make a temporary file in this folder", e.into()).with_path(folder))
}

fn open_and_unlink(folder: &Path) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty())?;
    for attempt in 0..ATTEMPTS_MAX {
        let name = temporary_name(OsStr::new("overlay"), attempt);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        match rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => {}
            Ok(file) => return rustix::fs::unlinkat(&folder, &name, AtFlags::empty()).map(|()| file),
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST)
}

/// Locks the file that is to be replaced, so that nobody who uses it is surprised.
fn lock_old(path: &Path) -> Result<Arc<FileStorage>> {
    FileStorage::open(path, &FileOptions { writable: false, direct: false, lock: LockMode::Writer })
}

/// A new file, and the name that it has for the time being.
fn open_new(folder: &OwnedFd, name: &OsStr) -> std::result::Result<(OwnedFd, Option<OsString>), Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(MODE);
    match rustix::fs::openat(folder, ".", flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok((file, None)),
        // The kernel or the file system does not know such files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error),
    }
    let mut attempt = 0;
    loop {
        let temporary = temporary_name(name, attempt);
        match rustix::fs::openat(folder, &temporary, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Ok(file) => return Ok((file, Some(temporary))),
            Err(Errno::EXIST) if attempt < ATTEMPTS_MAX => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

fn temporary_name(name: &OsStr, attempt: u32) -> OsString {
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".nbd-img-{}-{attempt}", std::process::id()));
    temporary
}
