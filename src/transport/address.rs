//! Addresses to listen on, as the command line writes them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

/// NBD's port, assigned by IANA.
pub const DEFAULT_PORT: u16 = 10809;

/// One address to listen on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP port of a host name or an IP address; port 0 takes any free one.
    Tcp {
        /// A name or a literal address, without brackets.
        host: String,
        /// The port, or 0.
        port: u16,
        /// Whether connections begin with TLS instead of turning to it.
        tls_first: bool,
    },
}

impl Address {
    /// Where the server listens when nothing is said: the default port on loopback.
    pub fn default_tcp() -> Address {
        Address::Tcp { host: "127.0.0.1".to_owned(), port: DEFAULT_PORT, tls_first: false }
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
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.to_string_lossy().escape_debug()),
            Address::Tcp { host, port, tls_first } => {
                let scheme = if *tls_first { "nbds" } else { "tcp" };
                if host.contains(':') {
                    write!(f, "{scheme}:[{host}]:{port}")
                } else {
                    write!(f, "{scheme}:{}:{port}", host.escape_debug())
                }
            }
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
        if let Some(path) = text.strip_prefix("unix:") {
            return parse_unix(path);
        }
        if let Some(address) = text.strip_prefix("nbds:") {
            return parse_tcp(address, true);
        }
        parse_tcp(text.strip_prefix("tcp:").unwrap_or(text), false)
    }
}

fn parse_unix(path: &str) -> Result<Address, ParseAddressError> {
    if path.is_empty() {
        return Err(ParseAddressError("unix: wants a path after it, as in unix:/run/nbd.sock".to_owned()));
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

fn parse_tcp(text: &str, tls_first: bool) -> Result<Address, ParseAddressError> {
    let (host, port) = split_port(text)?;
    if host.is_empty() {
        return Err(ParseAddressError(format!(
            "the host is missing: write 127.0.0.1:{port}, or 0.0.0.0:{port} for every IPv4 address"
        )));
    }
    let port = port.parse::<u16>().map_err(|_| {
        ParseAddressError(format!("{port:?} is not a port (0 to 65535; 0 takes any free one)"))
    })?;
    Ok(Address::Tcp { host: host.to_owned(), port, tls_first })
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
            "neither HOST:PORT nor unix:PATH; a port is needed, as in 127.0.0.1:{DEFAULT_PORT}, \
             and a path is written unix:PATH"
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

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port, tls_first: false }
    }

    #[test]
    fn every_form_is_understood() {
        for (text, want) in [
            ("127.0.0.1:10809", tcp("127.0.0.1", 10809)),
            ("tcp:127.0.0.1:0", tcp("127.0.0.1", 0)),
            ("tcp:localhost:1", tcp("localhost", 1)),
            ("[::1]:10809", tcp("::1", 10809)),
            ("tcp:[::]:65535", tcp("::", 65535)),
            ("unix:/run/nbd.sock", Address::Unix("/run/nbd.sock".into())),
            ("unix:with:colon", Address::Unix("with:colon".into())),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), want, "{text}");
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
