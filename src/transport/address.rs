//! Addresses to listen on, as the command line writes them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

/// NBD's port, assigned by IANA.
pub const DEFAULT_PORT: u16 = 10809;

/// One address to listen on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// Where.
    pub place: Place,
    /// Whether connections begin with TLS instead of turning to it.
    pub tls_first: bool,
}

/// Where clients come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A Unix socket of this name in the abstract namespace, which has no file.
    Abstract(String),
    /// A TCP port of a host name or an IP address; port 0 takes any free one.
    Tcp {
        /// A name or a literal address, without brackets.
        host: String,
        /// The port, or 0.
        port: u16,
    },
    /// A port for virtual machines and their host; port 0 takes any free one.
    Vsock {
        /// One of this machine's context ids, or all of them.
        cid: Option<u32>,
        /// The port, or 0.
        port: u32,
    },
    /// A socket that the starter has opened, listening or connected.
    Fd(RawFd),
    /// One client at stdin and stdout.
    Stdio,
}

impl Address {
    /// Where the server listens when nothing is said: the default port on loopback.
    pub fn default_tcp() -> Address {
        Place::Tcp { host: "127.0.0.1".to_owned(), port: DEFAULT_PORT }.into()
    }
}

impl From<Place> for Address {
    fn from(place: Place) -> Address {
        Address { place, tls_first: false }
    }
}

/// The IP addresses of `host`, without repetitions. May ask a name server, and wait for it.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for address in (host, port).to_socket_addrs()? {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(found)
}

/// Whether only this machine can reach `address`.
pub fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.place, self.tls_first) {
            (Place::Tcp { .. }, false) => f.write_str("tcp:")?,
            (_, true) => f.write_str("nbds:")?,
            (_, false) => {}
        }
        match &self.place {
            Place::Unix(path) => write!(f, "unix:{}", path.to_string_lossy().escape_debug()),
            Place::Abstract(name) => write!(f, "unix:@{}", name.escape_debug()),
            Place::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Place::Tcp { host, port } => write!(f, "{}:{port}", host.escape_debug()),
            Place::Vsock { cid: Some(cid), port } => write!(f, "vsock:{cid}:{port}"),
            Place::Vsock { cid: None, port } => write!(f, "vsock:{port}"),
            Place::Fd(fd) => write!(f, "fd:{fd}"),
            Place::Stdio => f.write_str("stdio"),
        }
    }
}

/// Why a text is not an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseAddressError(String);

impl fmt::Display for ParseAddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseAddressError {}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Address, ParseAddressError> {
        let (place, tls_first) = match text.strip_prefix("nbds:") {
            Some(place) => (place, true),
            None => (text, false),
        };
        Ok(Address { place: parse_place(place)?, tls_first })
    }
}

fn parse_place(text: &str) -> Result<Place, ParseAddressError> {
    if text == "stdio" {
        Ok(Place::Stdio)
    } else if let Some(path) = text.strip_prefix("unix:") {
        parse_unix(path)
    } else if let Some(address) = text.strip_prefix("vsock:") {
        parse_vsock(address)
    } else if let Some(fd) = text.strip_prefix("fd:") {
        parse_fd(fd)
    } else {
        parse_tcp(text.strip_prefix("tcp:").unwrap_or(text))
    }
}

fn parse_unix(path: &str) -> Result<Place, ParseAddressError> {
    match path.strip_prefix('@') {
        Some("") => Err(ParseAddressError("unix:@ wants a name after it, as in unix:@nbd".to_owned())),
        Some(name) => Ok(Place::Abstract(name.to_owned())),
        None if path.is_empty() => {
            Err(ParseAddressError("unix: wants a path after it, as in unix:/run/nbd.sock".to_owned()))
        }
        None => Ok(Place::Unix(PathBuf::from(path))),
    }
}

fn parse_vsock(text: &str) -> Result<Place, ParseAddressError> {
    let number = |text: &str, what: &str| {
        text.parse::<u32>().map_err(|_| {
            ParseAddressError(format!(
                "{text:?} is not a {what}: write vsock:PORT, or vsock:CID:PORT for one of this machine's CIDs"
            ))
        })
    };
    let (cid, port) = match text.split_once(':') {
        Some((cid, port)) => (Some(number(cid, "CID")?), port),
        None => (None, text),
    };
    Ok(Place::Vsock { cid, port: number(port, "port")? })
}

fn parse_fd(text: &str) -> Result<Place, ParseAddressError> {
    match text.parse::<RawFd>() {
        Ok(fd) if fd > 2 => Ok(Place::Fd(fd)),
        Ok(0..=2) => Err(ParseAddressError(format!(
            "descriptor {text} is stdin, stdout or stderr: use 3 or above, or write stdio"
        ))),
        Ok(_) | Err(_) => {
            Err(ParseAddressError(format!("{text:?} is not the number of a descriptor, as in fd:3")))
        }
    }
}

fn parse_tcp(text: &str) -> Result<Place, ParseAddressError> {
    let (host, port) = split_port(text)?;
    if host.is_empty() {
        return Err(ParseAddressError(format!(
            "the host is missing: write 127.0.0.1:{port}, or 0.0.0.0:{port} for every IPv4 address"
        )));
    }
    let port = port.parse::<u16>().map_err(|_| {
        ParseAddressError(format!("{port:?} is not a port (0 to 65535; 0 takes any free one)"))
    })?;
    Ok(Place::Tcp { host: host.to_owned(), port })
}

/// Splits `[v6]:port` or `host:port`.
fn split_port(text: &str) -> Result<(&str, &str), ParseAddressError> {
    if let Some(rest) = text.strip_prefix('[') {
        return rest.split_once("]:").ok_or_else(|| {
            ParseAddressError(format!(
                "an IPv6 address is written [ADDRESS]:PORT, as in [::1]:{DEFAULT_PORT}"
            ))
        });
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(|| {
        ParseAddressError(format!(
            "neither HOST:PORT nor unix:PATH, vsock:PORT, fd:N or stdio; a port is needed, as in \
             127.0.0.1:{DEFAULT_PORT}, and a path is written unix:PATH"
        ))
    })?;
    if host.contains(':') {
        return Err(ParseAddressError(format!(
            "an IPv6 address goes in brackets, as in [::1]:{DEFAULT_PORT}"
        )));
    }
    Ok((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Place {
        Place::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn every_form_is_understood() {
        for (text, want) in [
            ("127.0.0.1:10809", tcp("127.0.0.1", 10809)),
            ("tcp:127.0.0.1:0", tcp("127.0.0.1", 0)),
            ("tcp:localhost:1", tcp("localhost", 1)),
            ("[::1]:10809", tcp("::1", 10809)),
            ("tcp:[::]:65535", tcp("::", 65535)),
            ("tcp:vsock:1", tcp("vsock", 1)),
            ("unix:/run/nbd.sock", Place::Unix("/run/nbd.sock".into())),
            ("unix:with:colon", Place::Unix("with:colon".into())),
            ("unix:./@path", Place::Unix("./@path".into())),
            ("unix:@nbd", Place::Abstract("nbd".to_owned())),
            ("vsock:10809", Place::Vsock { cid: None, port: 10809 }),
            ("vsock:3:0", Place::Vsock { cid: Some(3), port: 0 }),
            ("fd:3", Place::Fd(3)),
            ("stdio", Place::Stdio),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), want.clone().into(), "{text}");
            let secure = format!("nbds:{text}").parse::<Address>().unwrap();
            assert_eq!(secure, Address { place: want, tls_first: true }, "{text}");
        }
    }

    #[test]
    fn display_can_be_parsed_again() {
        for text in [
            "tcp:127.0.0.1:10809",
            "tcp:[::1]:0",
            "nbds:localhost:10809",
            "nbds:[::1]:1",
            "unix:/run/nbd.sock",
            "unix:@nbd",
            "nbds:unix:nbd.sock",
            "vsock:1",
            "nbds:vsock:3:1",
            "fd:9",
            "stdio",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (text, hint) in [
            ("", "port is needed"),
            ("localhost", "port is needed"),
            ("/run/nbd.sock", "unix:PATH"),
            ("unix:", "path"),
            ("unix:@", "name"),
            ("vsock:", "not a port"),
            ("vsock:-1", "not a port"),
            ("vsock:4294967296", "not a port"),
            ("vsock:host:1", "not a CID"),
            ("fd:", "not the number"),
            ("fd:-3", "not the number"),
            ("fd:1", "write stdio"),
            ("stdin", "stdio"),
            (":10809", "host is missing"),
            ("host:", "not a port"),
            ("host:65536", "not a port"),
            ("host:-1", "not a port"),
            ("::1:10809", "brackets"),
            ("[::1]", "[ADDRESS]:PORT"),
            ("[::1", "[ADDRESS]:PORT"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn loopback_is_told_from_the_rest() {
        for (text, local) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("192.168.0.1", false),
            ("::ffff:10.0.0.1", false),
        ] {
            assert_eq!(is_local(text.parse().unwrap()), local, "{text}");
        }
    }
}
