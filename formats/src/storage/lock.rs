//! QEMU's image locks: bytes of the image file under open-file-description locks, so that a running
//! QEMU and this program respect each other.
//!
//! Byte `100 + i` is read-locked by whoever uses permission `i` of the file, byte `200 + i` by whoever
//! does not want others to use it. Only shared locks are taken; a conflict is found by asking whether
//! the opposite byte could be locked exclusively. Own bytes are taken first and the others tested
//! afterwards: of two that open at once both may fail, but never both succeed.

mod holder;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// First byte of those that say "I use this" (QEMU, block/file-posix.c).
const USED_BASE: i64 = 100;
/// First byte of those that say "nobody else may use this" (QEMU, block/file-posix.c).
const UNSHARED_BASE: i64 = 200;

/// Number of QEMU's permission for reading consistent data.
const CONSISTENT_READ: i64 = 0;
/// Number of QEMU's permission for writing.
const WRITE: i64 = 1;
/// Number of QEMU's permission for changing the length.
const RESIZE: i64 = 3;

/// How an image file is locked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Not at all: neither taken nor asked.
    Off,
    /// Reads, and wants nobody to write.
    Reader,
    /// Reads although somebody may write; only a program that wants to be alone is in the way.
    ForceShare,
    /// Writes, and wants nobody else to write.
    Writer,
}

impl LockMode {
    fn used(self) -> &'static [i64] {
        match self {
            LockMode::Off => &[],
            LockMode::Reader | LockMode::ForceShare => &[CONSISTENT_READ],
            LockMode::Writer => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [i64] {
        match self {
            LockMode::Off | LockMode::ForceShare => &[],
            LockMode::Reader | LockMode::Writer => &[WRITE, RESIZE],
        }
    }
}

/// An open file whose locks go with it. By closing it alone they would stay while somebody else has the description: a
/// process that another thread has forked, until it starts its program.
pub(super) struct LockedFile(OwnedFd);

impl LockedFile {
    /// The file, on which [`acquire`] has succeeded.
    pub(super) fn new(file: OwnedFd) -> Self {
        LockedFile(file)
    }
}

impl AsFd for LockedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        release(self.0.as_fd());
    }
}

/// Takes the locks of `mode` on the open file description behind `file`; they go when it is closed, or
/// with [`release`]. Fails with [`ErrorKind::Locked`], naming the holder where one is found. A file
/// system without such locks is served unlocked, and the log says so.
pub(super) fn acquire(file: BorrowedFd<'_>, path: &Path, mode: LockMode) -> Result<()> {
    let result = take_and_test(file, mode);
    match result {
        Ok(None) => Ok(()),
        Ok(Some(permission)) => {
            release(file);
            Err(conflict(file, path, mode, permission))
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::ENOLCK)) => {
            release(file);
            tracing::warn!(path = %path.display(), %error, "the file system has no locks: served unlocked");
            Ok(())
        }
        Err(error) => {
            release(file);
            Err(Error::io("cannot lock the image", error).with_path(path))
        }
    }
}

/// Lets all locks of the description go.
pub(super) fn release(file: BorrowedFd<'_>) {
    // Nothing can be done about a failure, and closing the file unlocks in any case.
    let _ = ofd_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0);
}

/// Takes the bytes of `mode`, then gives the permission over which somebody is in the way.
fn take_and_test(file: BorrowedFd<'_>, mode: LockMode) -> io::Result<Option<i64>> {
    let used = mode.used().iter().map(|permission| (*permission, USED_BASE, UNSHARED_BASE));
    let unshared = mode.unshared().iter().map(|permission| (*permission, UNSHARED_BASE, USED_BASE));
    for (permission, own, _) in used.clone().chain(unshared.clone()) {
        match ofd_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, own + permission, 1) {
            Ok(_) => {}
            // Not QEMU, but somebody who locks the whole file, as cloud-hypervisor does.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(Some(permission));
            }
            Err(error) => return Err(error),
        }
    }
    for (permission, _, opposite) in used.chain(unshared) {
        if ofd_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, opposite + permission, 1)? {
            return Ok(Some(permission));
        }
    }
    Ok(None)
}

/// One lock call on `len` bytes from `start` (0: to the end of all offsets). For `F_OFD_GETLK`, whether
/// somebody is in the way.
fn ofd_lock(
    file: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    start: i64,
    len: i64,
) -> io::Result<bool> {
    // SAFETY: all zeroes is a valid flock; it has only integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = start;
    lock.l_len = len;
    loop {
        // SAFETY: the descriptor is open as long as it is borrowed, and the call reads and writes one
        // flock, which outlives it.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } == 0 {
            return Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn conflict(file: BorrowedFd<'_>, path: &Path, mode: LockMode, permission: i64) -> Error {
    let name = match permission {
        CONSISTENT_READ => "consistent read",
        WRITE => "write",
        _ => "resize",
    };
    let holder = match holder::find(file.as_fd()) {
        Some(holder) => format!("it is held by {holder}"),
        None => "Is another process using the image?".to_owned(),
    };
    let hint = match mode {
        LockMode::Reader => "; --force-share reads it all the same, at the risk of seeing half-done changes",
        LockMode::Off | LockMode::ForceShare | LockMode::Writer => "",
    };
    Error::new(ErrorKind::Locked, format!("Failed to get \"{name}\" lock: {holder}{hint}")).with_path(path)
}
