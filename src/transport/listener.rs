//! A listening socket of any family, non-blocking.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::net::{AddressFamily, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::stream::Stream;
use super::unix::{self, SocketFile};
use super::{uri, vsock};

/// Connections that may wait to be accepted. The kernel cuts it to net.core.somaxconn (4096 since
/// Linux 5.4); our choice is more than a burst of clients has.
pub const BACKLOG: i32 = 1024;

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    place: Bound,
    tls_first: bool,
    /// The file of a Unix socket, if we made it; removed on drop.
    _file: Option<SocketFile>,
}

/// Where it listens.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Bound {
    /// The absolute path of a Unix socket.
    Path(PathBuf),
    /// The name of a Unix socket without a file.
    Abstract(Vec<u8>),
    /// A Unix socket that nobody can ask for.
    Unnamed,
    /// With the real port.
    Tcp(SocketAddr),
    /// The context id by which clients reach it, and the real port.
    Vsock { cid: u32, port: u32 },
}

impl Listener {
    /// Listens on `address`; port 0 takes any free one. An IPv6 address serves IPv6 only, so that
    /// `0.0.0.0` and `[::]` can be listened on together, unless `any_is_both`: then `[::]` stands for all of either.
    pub fn tcp(address: SocketAddr, any_is_both: bool) -> io::Result<Listener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(!(any_is_both && address.ip().is_unspecified()))?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Listener::of(socket, None)
    }

    /// Listens at the path of `file`, which has been bound and listens already.
    pub fn unix(socket: Socket, file: SocketFile) -> io::Result<Listener> {
        Listener::of(socket, Some(file))
    }

    /// Listens on a Unix socket of this name in the abstract namespace.
    pub fn unix_abstract(name: &str) -> io::Result<Listener> {
        Listener::of(unix::listen_abstract(name)?, None)
    }

    /// Listens on a port for virtual machines and their host, by one context id of this machine or by all of
    /// them; port 0 takes any free one.
    pub fn vsock(cid: Option<u32>, port: u32) -> io::Result<Listener> {
        Listener::of(vsock::listen(cid, port)?, None)
    }

    /// Takes a stream socket that listens already, of whatever family it is.
    pub fn of_listening(fd: OwnedFd) -> io::Result<Listener> {
        Listener::of(fd.into(), None)
    }

    fn of(socket: Socket, file: Option<SocketFile>) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        let place = Bound::of(&socket, file.as_ref())?;
        Ok(Listener { socket, place, tls_first: false, _file: file })
    }

    /// The same, whose connections begin with TLS if `tls_first`.
    pub fn with_tls_first(self, tls_first: bool) -> Listener {
        Listener { tls_first, ..self }
    }

    /// Accepts a connection, or fails with `WouldBlock` when none waits. Gives the stream and its peer in words
    /// for the log.
    pub fn accept(&self) -> io::Result<(Stream, String)> {
        let (socket, peer) = self.socket.accept4(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)?;
        Stream::of_socket(socket, &peer)
    }

    /// The URI of `export` here, for a client that has to turn to TLS or not. Absent where none is defined: for a Unix
    /// socket without a path, and where TLS comes first, since URIs know only TLS that is asked for.
    pub fn uri(&self, export: &str, tls: bool) -> Option<String> {
        match &self.place {
            _ if self.tls_first => None,
            Bound::Path(path) => Some(uri::unix(path, export, tls)),
            Bound::Abstract(_) | Bound::Unnamed => None,
            Bound::Tcp(address) => Some(uri::tcp(*address, export, tls)),
            Bound::Vsock { cid, port } => Some(uri::vsock(*cid, *port, export, tls)),
        }
    }

    /// Whether its connections begin with TLS.
    pub fn is_tls_first(&self) -> bool {
        self.tls_first
    }
}

impl Bound {
    fn of(socket: &Socket, file: Option<&SocketFile>) -> io::Result<Bound> {
        let address = socket.local_addr()?;
        let family = sockopt::socket_domain(socket)?;
        if family == AddressFamily::UNIX {
            return Ok(match file {
                Some(file) => Bound::Path(file.absolute_path().to_owned()),
                None => Bound::of_unix(&address)?,
            });
        }
        if let Some(address) = address.as_socket() {
            return Ok(Bound::Tcp(address));
        }
        match address.as_vsock_address() {
            Some((cid, port)) => Ok(Bound::Vsock { cid: vsock::cid_for_clients(cid), port }),
            None => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "neither a Unix nor a TCP nor a vsock socket"))
            }
        }
    }

    fn of_unix(address: &SockAddr) -> io::Result<Bound> {
        Ok(match (address.as_pathname(), address.as_abstract_namespace()) {
            (Some(path), _) => Bound::Path(std::path::absolute(path)?),
            (None, Some(name)) => Bound::Abstract(name.to_owned()),
            (None, None) => Bound::Unnamed,
        })
    }
}

/// As `--listen` has it, where it has a form.
impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls_first { "nbds:" } else { "" };
        match &self.place {
            Bound::Path(path) => write!(f, "{scheme}unix:{}", path.to_string_lossy().escape_debug()),
            Bound::Abstract(name) => {
                write!(f, "{scheme}unix:@{}", String::from_utf8_lossy(name).escape_debug())
            }
            Bound::Unnamed => write!(f, "{scheme}an unnamed Unix socket"),
            Bound::Tcp(address) => write!(f, "{}{address}", if self.tls_first { scheme } else { "tcp:" }),
            Bound::Vsock { cid, port } => write!(f, "{scheme}vsock:{cid}:{port}"),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};

    #[test]
    fn all_of_ipv6_is_all_of_ipv4_only_where_it_is_asked_for() {
        for both in [true, false] {
            let listener = Listener::tcp((Ipv6Addr::UNSPECIFIED, 0).into(), both).unwrap();
            let Bound::Tcp(address) = listener.place else { panic!("{listener}") };
            assert!(TcpStream::connect((Ipv6Addr::LOCALHOST, address.port())).is_ok());
            assert_eq!(TcpStream::connect((Ipv4Addr::LOCALHOST, address.port())).is_ok(), both);
        }
    }
}
