//! One client's connection: a non-blocking stream socket of either family, plain or under TLS.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::buffer::spare_capacity;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::tls::TlsStream;

/// A connected stream socket, non-blocking, closed on drop.
///
/// It is bound to no event loop: whoever waits for it registers it (`AsFd`, `AsRawFd`) or turns it into
/// a type of its runtime.
#[derive(Debug)]
pub enum Stream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP, with Nagle's algorithm off.
    Tcp(TcpStream),
    /// Encrypted, over one of the others.
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Ends both directions, so that a thread or a peer that waits for the other side wakes up.
    pub fn shutdown(&self) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tls(stream) => stream.socket().shutdown(),
        }
    }

    /// Whether it is a Unix socket: those profit from a larger send buffer.
    pub fn is_unix(&self) -> bool {
        match self {
            Stream::Unix(_) => true,
            Stream::Tcp(_) => false,
            Stream::Tls(stream) => stream.socket().is_unix(),
        }
    }

    /// Its TLS, if it is encrypted. Then nothing may be sent to the socket past it.
    pub fn tls(&self) -> Option<&TlsStream> {
        match self {
            Stream::Unix(_) | Stream::Tcp(_) => None,
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
            Stream::Tls(stream) => stream.socket().as_fd(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
