//! Descriptors by number: sockets of socket activation, which the starter (systemd, or a tool of libnbd that runs
//! `[ nbd-img serve ... ]`) has opened and passed down as descriptors 3 and up (sd_listen_fds(3)), and those that
//! the command line names.
//!
//! This file takes ownership of descriptors by number, which is the one thing here that the compiler
//! cannot check.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

use super::inherited::InheritedSocket;

/// The name (FileDescriptorName= of systemd.socket(5)) of sockets whose connections begin with TLS. Our choice: NBD's
/// own word for it.
const TLS_FIRST_NAME: &str = "nbds";

/// How many sockets were passed to this process.
pub fn count() -> io::Result<usize> {
    Ok(sd_notify::listen_fds()?.len())
}

/// The sockets that were passed to this process, with their numbers: none if `LISTEN_PID` is absent or another's.
/// Those named `nbds` begin with TLS.
///
/// Call it once, before the process has opened anything of its own: until then nobody else can own
/// those numbers.
pub fn take_sockets() -> io::Result<Vec<(RawFd, InheritedSocket)>> {
    sd_notify::listen_fds_with_names()?
        .map(|(fd, name)| {
            let socket = InheritedSocket::of(claim(fd)?, name == TLS_FIRST_NAME);
            socket.map(|socket| (fd, socket)).map_err(|error| with_fd(fd, &error))
        })
        .collect()
}

/// Takes ownership of the descriptor `fd`, which the starter opened for us, and keeps it from children.
/// Fails if it is not open or is one of the three standard ones.
///
/// As for [`take_sockets`]: before the process has opened anything of its own.
pub fn claim(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {fd} is stdin, stdout or stderr; use 3 or above"),
        ));
    }
    // SAFETY: fcntl takes any number; F_GETFD neither changes the descriptor nor touches memory.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
        return Err(with_fd(fd, &io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open (just asked), was opened by whoever started us and named to us as
    // ours, and this process has not opened anything yet, so nothing else owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
    Ok(owned)
}

fn with_fd(fd: RawFd, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("descriptor {fd}: {error}"))
}
