//! Who is at the other end of a connection, as far as somebody other than the client vouches for it: the kernel for the
//! origin, TLS for the identity.
//!
//! What it may do is decided elsewhere.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsFd;

use rustix::net::{AddressFamily, sockopt};
use socket2::SockRef;

use super::certificate::CertificateNames;

/// Characters of an identity that a log line shows. Our choice: every sensible one, for it is copied into rules from
/// there.
const SHOWN_CHARS: usize = 512;

/// One connection's other end. Displayed, it is fit for a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    words: String,
    origin: Origin,
    identity: Option<Identity>,
}

/// Where a connection comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A process of this machine, by a Unix socket: whose it was when it connected (SO_PEERCRED, unix(7)).
    Unix {
        /// Effective user id.
        uid: u32,
        /// Effective group id.
        gid: u32,
    },
    /// TCP from this address; that of IPv4 in IPv6 is IPv4's.
    Ip(IpAddr),
    /// A virtual machine, or its host, by its context id.
    Vsock {
        /// The context id.
        cid: u32,
    },
    /// The kernel does not tell.
    Unknown,
}

/// Whom TLS proved the client to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Identity {
    /// It has the key of a certificate that was verified.
    Certificate(CertificateNames),
    /// It has the pre-shared key of this identity.
    Psk(String),
}

impl Peer {
    /// The other end of a connected socket; `words` say for the log where it is.
    pub fn of(socket: impl AsFd, words: String) -> Peer {
        Peer { words, origin: Origin::of(socket), identity: None }
    }

    /// Where it connects from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Who it is, once TLS is up and the client had to prove it.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// From now on it is known to be this one.
    pub fn identify(&mut self, identity: Option<Identity>) {
        self.identity = identity;
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)?;
        match &self.identity {
            None => Ok(()),
            Some(identity) => write!(f, " {identity}"),
        }
    }
}

impl Origin {
    fn of(socket: impl AsFd) -> Origin {
        let Ok(family) = sockopt::socket_domain(&socket) else { return Origin::Unknown };
        if family == AddressFamily::UNIX {
            return sockopt::socket_peercred(&socket).map_or(Origin::Unknown, |peer| Origin::Unix {
                uid: peer.uid.as_raw(),
                gid: peer.gid.as_raw(),
            });
        }
        let Ok(address) = SockRef::from(&socket).peer_addr() else { return Origin::Unknown };
        if let Some(address) = address.as_socket() {
            return Origin::Ip(address.ip().to_canonical());
        }
        address.as_vsock_address().map_or(Origin::Unknown, |(cid, _)| Origin::Vsock { cid })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::Certificate(names) => match names.subject() {
                Some(subject) => write!(f, "tls-subject={}", shown(&subject.to_string())),
                None => f.write_str("with a certificate that has no subject"),
            },
            Identity::Psk(identity) => write!(f, "psk={}", shown(identity)),
        }
    }
}

/// Without anything that could end a log line or colour a terminal, and of bounded length. Backslashes and quotes stay:
/// rules are written with them.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == SHOWN_CHARS {
            shown.push_str("...");
            break;
        }
        match character {
            '\\' | '"' | '\'' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_kernel_tells_the_origin() {
        let (here, _there) = UnixStream::pair().unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        assert_eq!(Peer::of(&here, String::new()).origin(), Origin::Unix { uid, gid });
        for host in ["127.0.0.1", "::1"] {
            // A machine without IPv6 has nothing to test there.
            let Ok(listener) = TcpListener::bind((host, 0)) else { continue };
            let _there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (here, _) = listener.accept().unwrap();
            assert_eq!(Peer::of(&here, String::new()).origin(), Origin::Ip(host.parse().unwrap()));
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Peer::of(&file, String::new()).origin(), Origin::Unknown);
    }

    #[test]
    fn an_identity_cannot_write_log_lines() {
        let (here, _there) = UnixStream::pair().unwrap();
        let mut peer = Peer::of(&here, "unix".to_owned());
        assert_eq!(peer.to_string(), "unix");
        peer.identify(Some(Identity::Psk("a\n\x1b[31m\u{202e}\\,\"é".to_owned())));
        assert_eq!(peer.to_string(), "unix psk=a\\n\\u{1b}[31m\\u{202e}\\,\"é");
        peer.identify(Some(Identity::Psk("x".repeat(5000))));
        assert_eq!(peer.to_string().len(), "unix psk=".len() + SHOWN_CHARS + "...".len());
    }
}
