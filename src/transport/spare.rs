//! Receiving into a part of the memory that a vector has not used yet, which is not zeroed before.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::{RecvFlags, recv};

/// Receives once, appending at most `max` bytes to `buf` and no more than it has room for: 0 is the end of the stream,
/// or says that there is no room.
pub fn receive_at_most(socket: BorrowedFd<'_>, buf: &mut Vec<u8>, max: usize) -> io::Result<usize> {
    let spare = buf.spare_capacity_mut();
    let len = spare.len().min(max);
    let got = recv(socket, &mut spare[..len], RecvFlags::empty())?.0.0.len();
    // SAFETY: `recv` has written the first `got` bytes of the spare room, which begins at the vector's length.
    unsafe { buf.set_len(buf.len() + got) };
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_comes_is_appended_up_to_the_limit_and_the_room() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"0123456789").unwrap();
        let mut buf = Vec::with_capacity(7);
        buf.push(b'x');
        assert_eq!(receive_at_most(here.as_fd(), &mut buf, 4).unwrap(), 4);
        assert_eq!(buf, b"x0123");
        let room = buf.capacity() - buf.len();
        assert_eq!(receive_at_most(here.as_fd(), &mut buf, 100).unwrap(), room.min(6));
        assert_eq!(buf, &b"x0123456789"[..5 + room.min(6)]);
        drop(there);
    }
}
