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
    has_outgoing(stream)
}

/// Whether the peer's kernel has not yet acknowledged all that was sent, the end of the stream included; for TCP.
pub fn has_unacknowledged(stream: &Stream) -> io::Result<bool> {
    has_outgoing(stream)
}

fn has_outgoing(stream: &Stream) -> io::Result<bool> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: the stream's descriptor is open; TIOCOUTQ (tty_ioctl(2), the same call as SIOCOUTQ) writes
    // one int through the pointer.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut waiting) };
    if result == 0 { Ok(waiting > 0) } else { Err(io::Error::last_os_error()) }
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
