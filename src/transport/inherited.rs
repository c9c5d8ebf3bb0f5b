//! Sockets that the starter has opened: listening ones, and connections that wait to be served.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{SocketType, sockopt};
use socket2::Socket;

use super::listener::Listener;
use super::stream::Stream;

/// What an inherited descriptor turned out to be.
#[derive(Debug)]
pub enum InheritedSocket {
    /// Clients can connect to it.
    Listening(Listener),
    /// A client has.
    Connected(Arrival),
}

/// A client's connection that nobody had to accept.
#[derive(Debug)]
pub struct Arrival {
    /// The connection.
    pub stream: Stream,
    /// Who it is, for the log.
    pub peer: String,
    /// Whether it begins with TLS.
    pub tls_first: bool,
}

impl InheritedSocket {
    /// Finds out what `fd` is. Its connections, or itself, begin with TLS if `tls_first`.
    pub fn of(fd: OwnedFd, tls_first: bool) -> io::Result<InheritedSocket> {
        let is = |error: rustix::io::Errno| {
            if error == rustix::io::Errno::NOTSOCK {
                return io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket");
            }
            error.into()
        };
        if sockopt::socket_type(&fd).map_err(is)? != SocketType::STREAM {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it is not a stream socket"));
        }
        if sockopt::socket_acceptconn(&fd)? {
            return Ok(InheritedSocket::Listening(Listener::of_listening(fd)?.with_tls_first(tls_first)));
        }
        let socket = Socket::from(fd);
        let peer = socket.peer_addr().map_err(|error| {
            if error.kind() == io::ErrorKind::NotConnected {
                return io::Error::new(error.kind(), "the socket neither listens nor is it connected");
            }
            error
        })?;
        socket.set_nonblocking(true)?;
        let (stream, peer) = Stream::of_socket(socket, &peer)?;
        Ok(InheritedSocket::Connected(Arrival { stream, peer, tls_first }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixListener, UnixStream};

    fn found(fd: impl Into<OwnedFd>) -> String {
        match InheritedSocket::of(fd.into(), false) {
            Ok(InheritedSocket::Listening(listener)) => format!("listening: {listener}"),
            Ok(InheritedSocket::Connected(arrival)) => format!("connected: {}", arrival.peer),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn a_socket_tells_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(found(UnixListener::bind(&path).unwrap()), format!("listening: unix:{}", path.display()));
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        assert_eq!(found(client), format!("connected: {address}"));
        assert_eq!(found(tcp), format!("listening: tcp:{address}"));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(found(one).starts_with("connected: unix pid"));
        assert_eq!(found(UdpSocket::bind("127.0.0.1:0").unwrap()), "error: it is not a stream socket");
        assert_eq!(found(File::open("/dev/null").unwrap()), "error: it is not a socket");
        let fresh = Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        assert!(found(fresh).contains("neither listens nor"));
    }

    #[test]
    fn a_client_that_has_gone_is_still_a_connection() {
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        assert!(found(one).starts_with("connected"));
    }
}
