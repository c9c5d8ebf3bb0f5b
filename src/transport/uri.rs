//! NBD URIs: what a client is told to connect to (the NBD project's `uri.md`).

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `nbd://HOST:PORT/NAME`, or `nbds://` for a client that has to turn to TLS. An address that stands for
/// all of the machine's is written `localhost`.
pub fn tcp(address: SocketAddr, export: &str, tls: bool) -> String {
    let host = match address {
        address if address.ip().is_unspecified() => "localhost".to_owned(),
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    };
    let scheme = if tls { "nbds" } else { "nbd" };
    format!("{scheme}://{host}:{}/{}", address.port(), encode(export.as_bytes()))
}

/// `nbd+unix:///NAME?socket=PATH`, or `nbds+unix://`; `path` should be absolute, since the client has
/// another current folder.
pub fn unix(path: &Path, export: &str, tls: bool) -> String {
    let scheme = if tls { "nbds" } else { "nbd" };
    format!("{scheme}+unix:///{}?socket={}", encode(export.as_bytes()), encode(path.as_os_str().as_bytes()))
}

/// `nbd+vsock://CID:PORT/NAME`, or `nbds+vsock://`.
pub fn vsock(cid: u32, port: u32, export: &str, tls: bool) -> String {
    let scheme = if tls { "nbds" } else { "nbd" };
    format!("{scheme}+vsock://{cid}:{port}/{}", encode(export.as_bytes()))
}

/// Percent-encodes everything but RFC 3986's unreserved characters and `/`, which both places allow.
fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(char::from(byte));
            }
            other => {
                // Writing into a String cannot fail.
                let _ = write!(text, "%{other:02X}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_uris() {
        for (address, name, want) in [
            ("127.0.0.1:10809", "", "nbd://127.0.0.1:10809/"),
            ("127.0.0.1:1", "disk", "nbd://127.0.0.1:1/disk"),
            ("[::1]:7", "a b?#%", "nbd://[::1]:7/a%20b%3F%23%25"),
            ("0.0.0.0:7", "x/y", "nbd://localhost:7/x/y"),
            ("[::]:7", "\u{e9}", "nbd://localhost:7/%C3%A9"),
        ] {
            assert_eq!(tcp(address.parse().unwrap(), name, false), want);
            let secure = tcp(address.parse().unwrap(), name, true);
            assert_eq!(secure.strip_prefix("nbds"), want.strip_prefix("nbd"));
        }
    }

    #[test]
    fn unix_uris() {
        for (path, name, want) in [
            ("/run/nbd.sock", "", "nbd+unix:///?socket=/run/nbd.sock"),
            ("/tmp/a b&c", "disk", "nbd+unix:///disk?socket=/tmp/a%20b%26c"),
        ] {
            assert_eq!(unix(Path::new(path), name, false), want);
            let secure = unix(Path::new(path), name, true);
            assert_eq!(secure.strip_prefix("nbds"), want.strip_prefix("nbd"));
        }
    }

    #[test]
    fn vsock_uris() {
        assert_eq!(vsock(2, 10809, "", false), "nbd+vsock://2:10809/");
        assert_eq!(vsock(3, 1, "a b", true), "nbds+vsock://3:1/a%20b");
    }
}
