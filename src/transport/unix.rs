//! Unix sockets as files: a stale one is replaced, a live one is refused, ours is removed at the end. And those in the
//! abstract namespace, which have no file, and so nothing of all that.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, chmod, chownat, flock, fstat, open};
use socket2::{Domain, SockAddr, Socket, Type};

use super::listener::BACKLOG;
use super::owner::Owner;

/// Longest path that fits into sockaddr_un with its terminating zero (unix(7): 108 bytes).
const PATH_MAX_LEN: usize = 107;

/// How often another starter's lock on the folder is tried, and the pause between two tries. Anybody
/// may lock a shared folder such as /tmp, so this must not wait for long: our choice is half a second.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The file of a Unix socket that this process made. Dropping it removes the file if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// The path, absolute.
    pub fn absolute_path(&self) -> &Path {
        &self.path
    }

    fn of(path: PathBuf) -> io::Result<SocketFile> {
        let metadata = fs::symlink_metadata(&path)?;
        Ok(SocketFile { path, device: metadata.dev(), inode: metadata.ino() })
    }

    /// Gives the file its owner and mode. It is opened first, so that another file that somebody puts in its place
    /// stays as it is.
    fn restrict(&self, access: FileAccess) -> io::Result<()> {
        let FileAccess { mode, owner } = access;
        if mode.is_none() && owner.is_none() {
            return Ok(());
        }
        let file = open(&self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let found = fstat(&file)?;
        if (found.st_dev, found.st_ino) != (self.device, self.inode) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another program has just taken this socket",
            ));
        }
        if let Some(Owner { user, group }) = owner {
            chownat(&file, c"", user, group, AtFlags::EMPTY_PATH)
                .map_err(|error| failed("cannot change its owner (--socket-owner)", error))?;
        }
        if let Some(mode) = mode {
            let place = format!("/proc/self/fd/{}", file.as_raw_fd());
            chmod(place, Mode::from_raw_mode(mode))
                .map_err(|error| failed("cannot change its mode (--socket-mode)", error))?;
        }
        Ok(())
    }
}

fn failed(what: &str, error: rustix::io::Errno) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {}", io::Error::from(error)))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another server may have replaced the file: then it is not ours to remove.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove the socket");
        }
    }
}

/// Who may connect, by the file of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FileAccess {
    /// The file's mode; else what the umask leaves of 0777.
    pub mode: Option<u32>,
    /// Whose it is; else the user's and group's of this process.
    pub owner: Option<Owner>,
}

/// Listens at `path`. A socket file that nobody listens on is replaced; anything else at `path` is an error and stays.
/// Nobody can connect before the file is as `access` wants it.
pub fn listen(path: &Path, access: FileAccess) -> io::Result<(Socket, SocketFile)> {
    check_path(path)?;
    let absolute = std::path::absolute(path)?;
    // Held until we listen: two servers that start together must not both find the other's socket stale.
    let _lock = lock_folder(&absolute);
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let address = SockAddr::unix(path)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path, &address)?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    let file = SocketFile::of(absolute)?;
    file.restrict(access)?;
    socket.listen(BACKLOG)?;
    Ok((socket, file))
}

/// Listens by a name in the abstract namespace, where the name is free again as soon as nobody listens.
pub fn listen_abstract(name: &str) -> io::Result<Socket> {
    let len = name.len();
    if len > PATH_MAX_LEN {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the name of the socket has {len} bytes, and Unix sockets take at most {PATH_MAX_LEN}"),
        ));
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(format!("\0{name}"))?).map_err(|error| {
        let taken = error.kind() == io::ErrorKind::AddrInUse;
        if taken { io::Error::new(error.kind(), "another program listens by this name") } else { error }
    })?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn check_path(path: &Path) -> io::Result<()> {
    let len = path.as_os_str().as_bytes().len();
    if len == 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path of the socket is empty"));
    }
    if len > PATH_MAX_LEN {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the path of the socket has {len} bytes, and Unix sockets take at most {PATH_MAX_LEN}; \
                 use a shorter path, or a relative one"
            ),
        ));
    }
    Ok(())
}

/// Removes the socket file at `path` if nobody listens on it.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    let before = fs::symlink_metadata(path)?;
    if !before.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the path exists and is not a socket, so it was left alone; use another path",
        ));
    }
    let trial = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A server whose backlog is full must not make us wait.
    trial.set_nonblocking(true)?;
    match trial.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
        Ok(()) | Err(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another program listens on this socket; stop it or use another path",
            ));
        }
    }
    let now = fs::symlink_metadata(path)?;
    if (now.dev(), now.ino()) != (before.dev(), before.ino()) {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another program has just taken this socket"));
    }
    tracing::debug!(?path, "replacing a stale socket");
    fs::remove_file(path)
}

/// Locks the folder of `path` against other starters. Best effort: a folder that cannot be opened or
/// that somebody keeps locked only leaves the small window that every other server has.
fn lock_folder(path: &Path) -> Option<OwnedFd> {
    let folder =
        open(path.parent()?, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    for _ in 0..LOCK_TRIES {
        if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Some(folder);
        }
        thread::sleep(LOCK_PAUSE);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn listen(path: &Path) -> io::Result<(Socket, SocketFile)> {
        super::listen(path, FileAccess::default())
    }

    #[test]
    fn a_stale_socket_is_replaced_and_removed_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (socket, file) = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop((socket, file));
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let _live = UnixListener::bind(&path).unwrap();
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("another program listens"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_plain_file_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        fs::write(&path, b"data").unwrap();
        let error = listen(&path).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_socket_that_another_has_taken_over_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_first, file) = listen(&path).unwrap();
        // Keep the first inode in use, so that the second cannot get its number.
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_longest_path_works_and_one_more_byte_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let room = PATH_MAX_LEN - folder.path().as_os_str().len() - 1;
        let longest = folder.path().join("x".repeat(room));
        listen(&longest).unwrap();
        let error = listen(&folder.path().join("x".repeat(room + 1))).unwrap_err().to_string();
        assert!(error.contains("108 bytes") && error.contains("107"), "{error}");
    }

    #[test]
    fn the_file_gets_its_mode_and_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let own = fs::metadata(folder.path()).unwrap();
        // To give it to oneself needs no privilege.
        let owner = format!("{}:{}", own.uid(), own.gid()).parse().ok();
        for mode in [0o600, 0o660, 0o666, 0o777, 0o000] {
            let (_socket, file) = super::listen(&path, FileAccess { mode: Some(mode), owner }).unwrap();
            let found = fs::metadata(&path).unwrap();
            assert_eq!(found.permissions().mode() & 0o7777, mode);
            assert_eq!((found.uid(), found.gid()), (own.uid(), own.gid()));
            drop(file);
        }
    }

    #[test]
    fn another_file_in_its_place_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_socket, file) = listen(&path).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        fs::write(&path, b"").unwrap();
        let before = fs::metadata(&path).unwrap().permissions().mode();
        let error = file.restrict(FileAccess { mode: Some(0o666), owner: None }).unwrap_err();
        assert!(error.to_string().contains("another program"), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode(), before);
    }

    #[test]
    fn an_abstract_name_is_had_once_and_free_again() {
        let name = format!("nbd-img-test-{}", std::process::id());
        let first = listen_abstract(&name).unwrap();
        let error = listen_abstract(&name).unwrap_err().to_string();
        assert!(error.contains("another program listens by this name"), "{error}");
        drop(first);
        drop(listen_abstract(&name).unwrap());
        assert!(listen_abstract(&"x".repeat(107)).is_ok());
        assert!(listen_abstract(&"x".repeat(108)).unwrap_err().to_string().contains("107"));
    }
}
