//! What waits in a socket, on either side.

use std::io;
use std::os::fd::AsRawFd;

use super::stream::Stream;

/// Whether the client has not yet read all that was sent. TCP cannot tell (what its peer's kernel has
/// acknowledged need not have been read), so there the answer is always no.
pub fn has_unread(stream: &Stream) -> io::Result<bool> {
    if !stream.is_unix() {
        return Ok(false);
    }
    outgoing_len(stream).map(|len| len > 0)
}

/// What was sent, the end of the stream included, and has not been read by the client, or for TCP not been acknowledged
/// by its kernel.
pub fn outgoing_len(stream: &Stream) -> io::Result<u64> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: the stream's descriptor is open; TIOCOUTQ (tty_ioctl(2), the same call as SIOCOUTQ) writes
    // one int through the pointer.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
    if result == 0 { Ok(u64::try_from(waiting).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// Whether anything has come that was not received. Where the socket cannot tell (vsock before Linux 6.17) the answer
/// is no.
pub fn has_unreceived(stream: &Stream) -> bool {
    rustix::io::ioctl_fionread(stream).is_ok_and(|len| len > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_the_other_side_has_not_read_is_unread() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let stream = Stream::Unix(here);
        assert!(!has_unread(&stream).unwrap() && !has_unreceived(&stream));
        there.write_all(&[2]).unwrap();
        assert!(has_unreceived(&stream));
        assert_eq!(stream.send(&[1; 100], false).unwrap(), 100);
        assert!(has_unread(&stream).unwrap());
        there.read_exact(&mut [0; 60]).unwrap();
        assert!(has_unread(&stream).unwrap());
        there.read_exact(&mut [0; 40]).unwrap();
        assert!(!has_unread(&stream).unwrap());
    }
}
