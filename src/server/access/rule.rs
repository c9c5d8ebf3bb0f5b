//! One rule: `write:tls-subject=CN=backup,O=Example`.

use std::net::IpAddr;
use std::str::FromStr;

use super::network::Network;
use crate::transport::Peer;
use crate::transport::certificate::CertificateNames;
use crate::transport::peer::{Identity, Origin};

/// What one may do. The later one includes the earlier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Right {
    /// See the export, and read.
    Read,
    /// Write too, where the export is not read-only.
    Write,
}

/// Grants a right to some clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The right.
    pub right: Right,
    /// Who gets it.
    pub who: Who,
}

/// A set of clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Who {
    /// All of them.
    Anyone,
    /// By the subject of their certificate, as [`crate::transport::distinguished_name`] prints it.
    Subject(String),
    /// By a DNS name in their certificate, whatever its case.
    Dns(String),
    /// By an address in their certificate.
    Ip(IpAddr),
    /// By a URI in their certificate.
    Uri(String),
    /// By a mail address in their certificate.
    Email(String),
    /// By the identity of their pre-shared key.
    Psk(String),
    /// By their user, at a Unix socket.
    Uid(u32),
    /// By their group, at a Unix socket.
    Gid(u32),
    /// By their virtual machine.
    Cid(u32),
    /// By the address from which their TCP connection comes.
    Network(Network),
}

impl Who {
    /// Whether `peer` belongs to it.
    pub fn is(&self, peer: &Peer) -> bool {
        match self {
            Who::Anyone => true,
            Who::Subject(text) => {
                names(peer).and_then(CertificateNames::subject).is_some_and(|subject| subject.is(text))
            }
            Who::Dns(name) => {
                names(peer).is_some_and(|names| names.dns.iter().any(|dns| dns.eq_ignore_ascii_case(name)))
            }
            Who::Ip(address) => names(peer).is_some_and(|names| names.ip.contains(address)),
            Who::Uri(uri) => names(peer).is_some_and(|names| names.uri.contains(uri)),
            Who::Email(email) => names(peer).is_some_and(|names| names.email.contains(email)),
            Who::Psk(wanted) => match peer.identity() {
                Some(Identity::Psk(identity)) => identity == wanted,
                Some(Identity::Certificate(_)) | None => false,
            },
            Who::Uid(wanted) => matches!(peer.origin(), Origin::Unix { uid, .. } if uid == *wanted),
            Who::Gid(wanted) => matches!(peer.origin(), Origin::Unix { gid, .. } if gid == *wanted),
            Who::Cid(wanted) => matches!(peer.origin(), Origin::Vsock { cid } if cid == *wanted),
            Who::Network(network) => {
                matches!(peer.origin(), Origin::Ip(address) if network.contains(address))
            }
        }
    }

    /// Whether it asks for a certificate.
    pub fn needs_certificate(&self) -> bool {
        match self {
            Who::Subject(_) | Who::Dns(_) | Who::Ip(_) | Who::Uri(_) | Who::Email(_) => true,
            Who::Anyone | Who::Psk(_) | Who::Uid(_) | Who::Gid(_) | Who::Cid(_) | Who::Network(_) => false,
        }
    }

    /// Whether it asks for a pre-shared key.
    pub fn needs_psk(&self) -> bool {
        matches!(self, Who::Psk(_))
    }
}

fn names(peer: &Peer) -> Option<&CertificateNames> {
    match peer.identity() {
        Some(Identity::Certificate(names)) => Some(names),
        Some(Identity::Psk(_)) | None => None,
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let (right, who) = match text.split_once(':') {
            Some(("read", who)) => (Right::Read, who),
            Some(("write", who)) => (Right::Write, who),
            Some(_) | None => {
                return Err(
                    "a rule begins with read: or write:, as in read:uid=1000 or write:cidr=10.0.0.0/8"
                        .to_owned(),
                );
            }
        };
        Ok(Rule { right, who: who.parse()? })
    }
}

/// The forms, for error texts.
const FORMS: &str = "anyone, tls-subject=DN, tls-dns=NAME, tls-ip=ADDRESS, tls-uri=URI, tls-email=ADDRESS, \
                     psk=IDENTITY, uid=N, gid=N, cid=N, cidr=NETWORK";

impl FromStr for Who {
    type Err = String;

    fn from_str(text: &str) -> Result<Who, String> {
        if text == "anyone" {
            return Ok(Who::Anyone);
        }
        let unknown = || format!("{text:?} is nobody; write one of {FORMS}");
        let (key, value) = text.split_once('=').ok_or_else(unknown)?;
        if value.is_empty() {
            return Err(format!("{key}= wants a value"));
        }
        let owned = value.to_owned();
        match key {
            "tls-subject" => Ok(Who::Subject(owned)),
            "tls-dns" => Ok(Who::Dns(owned)),
            "tls-uri" => Ok(Who::Uri(owned)),
            "tls-email" => Ok(Who::Email(owned)),
            "psk" => Ok(Who::Psk(owned)),
            "uid" => number(key, value).map(Who::Uid),
            "gid" => number(key, value).map(Who::Gid),
            "cid" => number(key, value).map(Who::Cid),
            "cidr" => value.parse().map(Who::Network),
            "tls-ip" => {
                let address = value.parse::<IpAddr>().map_err(|_| format!("{value:?} is no IP address"))?;
                Ok(Who::Ip(address.to_canonical()))
            }
            _ => Err(unknown()),
        }
    }
}

fn number(key: &str, value: &str) -> Result<u32, String> {
    // Digits only: a sign would be taken too.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = value.parse().ok().filter(|_| digits);
    parsed.ok_or_else(|| format!("{key}={value} is no number of 32 bits; names are not looked up"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    fn certified() -> Peer {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, "backup");
        params.subject_alt_names = vec![
            SanType::DnsName("Host.example".try_into().unwrap()),
            SanType::IpAddress("10.0.0.9".parse().unwrap()),
            SanType::URI("spiffe://example/backup".try_into().unwrap()),
            SanType::Rfc822Name("a@example.org".try_into().unwrap()),
        ];
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let mut peer = local();
        peer.identify(Some(Identity::Certificate(CertificateNames::of_der(der.der()))));
        peer
    }

    fn local() -> Peer {
        let (here, _there) = UnixStream::pair().unwrap();
        Peer::of(&here, String::new())
    }

    fn keyed() -> Peer {
        let mut peer = local();
        peer.identify(Some(Identity::Psk("alice".to_owned())));
        peer
    }

    fn remote() -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Peer::of(listener.accept().unwrap().0, String::new())
    }

    #[test]
    fn each_kind_of_client_is_known_by_what_it_has() {
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        // Rule; certified, keyed, remote.
        for (who, want) in [
            ("anyone", [true, true, true]),
            ("tls-subject=O=Example,CN=backup", [true, false, false]),
            ("tls-subject=CN=backup,O=Example", [true, false, false]),
            ("tls-subject=CN=backup", [false; 3]),
            ("tls-subject=backup", [false; 3]),
            ("tls-dns=host.EXAMPLE", [true, false, false]),
            ("tls-dns=example", [false; 3]),
            ("tls-dns=10.0.0.9", [false; 3]),
            ("tls-ip=10.0.0.9", [true, false, false]),
            ("tls-ip=127.0.0.1", [false; 3]),
            ("tls-uri=spiffe://example/backup", [true, false, false]),
            ("tls-uri=spiffe://example/Backup", [false; 3]),
            ("tls-email=a@example.org", [true, false, false]),
            ("tls-email=a", [false; 3]),
            ("psk=alice", [false, true, false]),
            ("psk=Alice", [false; 3]),
            (&format!("uid={uid}"), [true, true, false]),
            (&format!("uid={}", uid + 1), [false; 3]),
            (&format!("gid={gid}"), [true, true, false]),
            (&format!("gid={}", gid + 1), [false; 3]),
            ("cid=0", [false; 3]),
            ("cidr=127.0.0.0/8", [false, false, true]),
            ("cidr=10.0.0.0/8", [false; 3]),
            ("cidr=::/0", [false; 3]),
        ] {
            let parsed: Who = who.parse().unwrap();
            assert_eq!([certified(), keyed(), remote()].map(|peer| parsed.is(&peer)), want, "{who}");
        }
    }

    #[test]
    fn rights_are_written_in_front() {
        for (text, right) in [("read:anyone", Right::Read), ("write:uid=7", Right::Write)] {
            assert_eq!(text.parse::<Rule>().unwrap().right, right);
        }
        assert!(Right::Read < Right::Write);
    }

    #[test]
    fn mistakes_are_explained() {
        for (text, hint) in [
            ("", "begins with read: or write:"),
            ("uid=1000", "begins with read: or write:"),
            ("exec:uid=1000", "begins with read: or write:"),
            ("read:", "is nobody; write one of anyone"),
            ("read:root", "is nobody"),
            ("read:user=root", "is nobody"),
            ("read:uid=", "wants a value"),
            ("read:uid=root", "names are not looked up"),
            ("read:uid=-1", "no number"),
            ("read:uid=+1", "no number"),
            ("read:gid=4294967296", "no number"),
            ("read:cidr=10.0.0.1/8", "10.0.0.0/8"),
            ("read:tls-ip=host", "no IP address"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
