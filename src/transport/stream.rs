//! One client's connection: a non-blocking stream socket of any family, plain or under TLS.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, recv, send, sockopt};
use socket2::{SockAddr, Socket};

use super::spare::receive_at_most;
use super::tcp;
use super::tls::TlsStream;

/// A connected stream socket, non-blocking, closed on drop.
///
/// It is bound to no event loop: whoever waits for it registers it (`AsFd`, `AsRawFd`) or turns it into
/// a type of its runtime.
#[derive(Debug)]
pub enum Stream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
    /// Between a virtual machine and its host.
    Vsock(Socket),
    /// Encrypted, over one of the others.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// A connected socket of whatever family, which is non-blocking, and its peer in words for the log. (A peer that has
    /// gone already can no longer be asked for.)
    pub fn of_socket(socket: Socket, peer: &SockAddr) -> io::Result<(Stream, String)> {
        let family = sockopt::socket_domain(&socket)?;
        if family == AddressFamily::UNIX {
            let peer = describe_unix_peer(socket.as_fd());
            return Ok((Stream::Unix(UnixStream::from(socket)), peer));
        }
        if let Some(address) = peer.as_socket() {
            return Ok((Stream::Tcp(TcpStream::from(socket)), address.to_string()));
        }
        match peer.as_vsock_address() {
            Some((cid, port)) => Ok((Stream::Vsock(socket), format!("vsock {cid}:{port}"))),
            None => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "neither a Unix nor a TCP nor a vsock socket"))
            }
        }
    }

    /// Sets what makes the connection quicker, and what ends it when the peer's machine has gone: when it leaves
    /// things unanswered for `peer_timeout` ([`tcp`]). Sockets within one machine need neither.
    pub fn prepare(&self, peer_timeout: Duration) {
        match self {
            Stream::Unix(_) | Stream::Vsock(_) => {}
            Stream::Tcp(stream) => tcp::prepare(stream, peer_timeout),
            Stream::Tls(stream) => stream.socket().prepare(peer_timeout),
        }
    }

    /// Ends a direction of the socket, or both, so that a thread or a peer that waits for the other side wakes up.
    pub fn shut_down(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.shutdown(how),
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Vsock(stream) => stream.shutdown(how),
            Stream::Tls(stream) => stream.socket().shut_down(how),
        }
    }

    /// Whether the peer is known to have gone altogether, so that it cannot receive either. TCP only learns that from
    /// what it sends.
    pub fn has_hung_up(&self) -> bool {
        let mut look = [PollFd::new(self, PollFlags::empty())];
        // Without events to ask for it tells just these two, and without a time it does not wait.
        let gone = PollFlags::HUP | PollFlags::ERR;
        poll(&mut look, Some(&Timespec::default())).is_ok() && look[0].revents().intersects(gone)
    }

    /// Whether it is a Unix socket: those profit from a larger send buffer.
    pub fn is_unix(&self) -> bool {
        match self {
            Stream::Unix(_) => true,
            Stream::Tcp(_) | Stream::Vsock(_) => false,
            Stream::Tls(stream) => stream.socket().is_unix(),
        }
    }

    /// Its TLS, if it is encrypted. Then nothing may be sent to the socket past it.
    pub fn tls(&self) -> Option<&TlsStream> {
        match self {
            Stream::Unix(_) | Stream::Tcp(_) | Stream::Vsock(_) => None,
            Stream::Tls(stream) => Some(stream),
        }
    }

    /// Receives once, appending to `buf`, which has room: 0 is the end of the stream.
    pub fn receive(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        match self.tls() {
            None => {
                recv(self, spare_capacity(buf), RecvFlags::empty()).map(|(got, _)| got).map_err(Into::into)
            }
            Some(tls) => tls.receive(buf),
        }
    }

    /// Receives once, appending at most `max` bytes to `buf`, which has room for them: 0 is the end of the stream. Under
    /// TLS as much as comes with them.
    pub fn receive_at_most(&self, buf: &mut Vec<u8>, max: usize) -> io::Result<usize> {
        match self.tls() {
            None => receive_at_most(self.as_fd(), buf, max),
            Some(tls) => tls.receive(buf),
        }
    }

    /// Sends as much of `bytes` as is taken, once. With `more` the network may wait for what is sent next.
    pub fn send(&self, bytes: &[u8], more: bool) -> io::Result<usize> {
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        match self.tls() {
            None => send(self, bytes, flags).map_err(Into::into),
            Some(tls) => tls.send(bytes),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Vsock(stream) => stream.as_fd(),
            Stream::Tls(stream) => stream.socket().as_fd(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

fn describe_unix_peer(stream: BorrowedFd<'_>) -> String {
    match sockopt::socket_peercred(stream) {
        Ok(peer) => format!("unix pid {} uid {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
        Err(_) => "unix".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_stops_sending_has_not_hung_up() {
        let (here, there) = UnixStream::pair().unwrap();
        let stream = Stream::Unix(here);
        assert!(!stream.has_hung_up());
        there.shutdown(Shutdown::Write).unwrap();
        assert!(!stream.has_hung_up());
        drop(there);
        assert!(stream.has_hung_up());
    }
}
