//! A listening socket of either family, non-blocking.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::net::{AddressFamily, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::stream::Stream;
use super::unix::SocketFile;
use super::uri;

/// Connections that may wait to be accepted. The kernel cuts it to net.core.somaxconn (4096 since
/// Linux 5.4); our choice is as many as may be in negotiation, so that a burst of those fits.
pub const BACKLOG: i32 = 1024;

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket. Its file, if we made it, is removed on drop.
    Unix {
        /// The socket.
        socket: UnixListener,
        /// The file that belongs to it; absent when the starter made it.
        file: Option<SocketFile>,
        /// Its absolute path; absent for a socket without a name in the file system.
        path: Option<PathBuf>,
    },
    /// A TCP port of one address.
    Tcp {
        /// The socket.
        socket: TcpListener,
        /// The address it listens on, with the real port.
        address: SocketAddr,
        /// Whether its connections begin with TLS.
        tls_first: bool,
    },
}

impl Listener {
    /// Listens on `address`; port 0 takes any free one. An IPv6 address serves IPv6 only, so that
    /// `0.0.0.0` and `[::]` can be listened on together.
    pub fn tcp(address: SocketAddr, tls_first: bool) -> io::Result<Listener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Listener::from_tcp(socket.into(), tls_first)
    }

    /// Listens at the path of `file`, which has been bound and listens already.
    pub fn unix(socket: UnixListener, file: SocketFile) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let path = Some(file.absolute_path().to_owned());
        Ok(Listener::Unix { socket, file: Some(file), path })
    }

    /// Takes a listening socket that somebody else made, of whatever family it is.
    pub fn from_inherited(fd: OwnedFd) -> io::Result<Listener> {
        if !sockopt::socket_acceptconn(&fd)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket does not listen"));
        }
        let domain = sockopt::socket_domain(&fd)?;
        if domain == AddressFamily::UNIX {
            let socket = UnixListener::from(fd);
            socket.set_nonblocking(true)?;
            let path = socket.local_addr()?.as_pathname().map(std::path::absolute).transpose()?;
            Ok(Listener::Unix { socket, file: None, path })
        } else if domain == AddressFamily::INET || domain == AddressFamily::INET6 {
            Listener::from_tcp(fd.into(), false)
        } else {
            Err(io::Error::new(io::ErrorKind::Unsupported, "neither a Unix nor a TCP socket"))
        }
    }

    fn from_tcp(socket: TcpListener, tls_first: bool) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        Ok(Listener::Tcp { socket, address, tls_first })
    }

    /// Accepts a connection, or fails with `WouldBlock` when none waits. Gives the stream, ready to be
    /// used, and its peer in words for the log.
    pub fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Listener::Unix { socket, .. } => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                let peer = describe_unix_peer(stream.as_fd());
                Ok((Stream::Unix(stream), peer))
            }
            Listener::Tcp { socket, .. } => {
                let (stream, peer) = socket.accept()?;
                stream.set_nonblocking(true)?;
                prepare_tcp(&stream);
                Ok((Stream::Tcp(stream), peer.to_string()))
            }
        }
    }

    /// The URI of `export` here, for a client that has to turn to TLS or not. Absent for a Unix socket without a
    /// path, and where TLS comes first: URIs know only TLS that is asked for.
    pub fn uri(&self, export: &str, tls: bool) -> Option<String> {
        match self {
            Listener::Unix { path, .. } => path.as_deref().map(|path| uri::unix(path, export, tls)),
            Listener::Tcp { tls_first: true, .. } => None,
            Listener::Tcp { address, tls_first: false, .. } => Some(uri::tcp(*address, export, tls)),
        }
    }

    /// Whether its connections begin with TLS.
    pub fn is_tls_first(&self) -> bool {
        match self {
            Listener::Unix { .. } => false,
            Listener::Tcp { tls_first, .. } => *tls_first,
        }
    }
}

/// Options that make a connection quicker or tidier. A connection without them works too, and one that
/// is gone already fails here first: so nothing is made of an error.
fn prepare_tcp(stream: &std::net::TcpStream) {
    let _ = stream.set_nodelay(true);
    // Else a client whose machine vanished would keep its slot for ever.
    let _ = SockRef::from(stream).set_keepalive(true);
}

fn describe_unix_peer(stream: BorrowedFd<'_>) -> String {
    match sockopt::socket_peercred(stream) {
        Ok(peer) => format!("unix pid {} uid {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
        Err(_) => "unix".to_owned(),
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listener::Unix { path: Some(path), .. } => {
                write!(f, "unix:{}", path.to_string_lossy().escape_debug())
            }
            Listener::Unix { path: None, .. } => f.write_str("an unnamed Unix socket"),
            Listener::Tcp { address, tls_first, .. } => {
                write!(f, "{}:{address}", if *tls_first { "nbds" } else { "tcp" })
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix { socket, .. } => socket.as_fd(),
            Listener::Tcp { socket, .. } => socket.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
