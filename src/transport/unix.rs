//! Unix sockets as files: a stale one is replaced, a live one is refused, ours is removed at the end.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use socket2::{Domain, SockAddr, Socket, Type};

use super::listener::BACKLOG;

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

/// Listens at `path`, with the permissions that the umask leaves. A socket file that nobody listens on
/// is replaced; anything else at `path` is an error and stays.
pub fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
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
    socket.listen(BACKLOG)?;
    Ok((socket.into(), file))
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
fn lock_folder(path: &Path) -> Option<rustix::fd::OwnedFd> {
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
    use std::os::unix::net::UnixStream;

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
}
