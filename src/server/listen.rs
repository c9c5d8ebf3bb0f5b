//! From addresses to listening sockets, under the policy that unencrypted service stays on this machine.

use std::net::SocketAddr;

use super::Error;
use super::options::ServeOptions;
use crate::nbd::negotiate::TlsMode;
use crate::transport::address::{is_local, resolve};
use crate::transport::{Address, Listener, unix};

/// Listens everywhere that was asked for, or takes the sockets that the starter passed.
pub fn all(options: &ServeOptions, inherited: Vec<Listener>) -> Result<Vec<Listener>, Error> {
    if !inherited.is_empty() {
        if options.listen_is_given {
            return Err(Error::Inherited(
                "--socket and --listen cannot be used under socket activation (LISTEN_FDS is set): the starter \
                 has chosen where to listen"
                    .to_owned(),
            ));
        }
        return Ok(inherited);
    }
    let mut listeners = Vec::new();
    for address in &options.addresses {
        match address {
            Address::Unix(path) => {
                let listener = unix::listen(path).and_then(|(socket, file)| Listener::unix(socket, file));
                listeners.push(listener.map_err(|error| Error::Listen(format!("{address}: {error}")))?);
            }
            Address::Tcp { host, port, tls_first } => {
                if *tls_first && options.tls.is_none() {
                    return Err(Error::Listen(format!(
                        "{address}: TLS needs certificates: add --tls-dir FOLDER"
                    )));
                }
                listen_tcp(options, address, host, (*port, *tls_first), &mut listeners)?;
            }
        }
    }
    Ok(listeners)
}

/// Listens on every address that `host` stands for.
fn listen_tcp(
    options: &ServeOptions,
    address: &Address,
    host: &str,
    (port, tls_first): (u16, bool),
    listeners: &mut Vec<Listener>,
) -> Result<(), Error> {
    let fail = |text: String| Error::Listen(format!("{address}: {text}"));
    let resolved = resolve(host, port).map_err(|error| fail(error.to_string()))?;
    let required = options.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Required);
    let encrypted = tls_first || required;
    let mut bound = 0_usize;
    let mut unavailable = None;
    for socket_address in resolved {
        if !encrypted && !options.allow_plaintext && !is_local(socket_address.ip()) {
            return Err(fail(
                "other machines can connect there, and need not encrypt; add --tls-dir FOLDER for TLS, or \
                 --allow-plaintext if that is meant, or listen on 127.0.0.1 or on a Unix socket"
                    .to_owned(),
            ));
        }
        match Listener::tcp(socket_address, tls_first) {
            Ok(listener) => {
                listeners.push(listener);
                bound += 1;
            }
            // `localhost` often has an IPv6 address on machines that have no IPv6.
            Err(error) if is_unavailable(&error) => unavailable = Some(error),
            Err(error) => return Err(fail(explain(&error, socket_address, options))),
        }
    }
    match unavailable {
        Some(error) if bound == 0 => Err(fail(error.to_string())),
        Some(_) | None => Ok(()),
    }
}

fn is_unavailable(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

fn explain(error: &std::io::Error, address: SocketAddr, options: &ServeOptions) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) if options.listen_is_given => {
            format!(
                "another program listens on port {}; choose another port, or 0 for any free one",
                address.port()
            )
        }
        Some(libc::EADDRINUSE) => format!(
            "another program listens on port {}; choose where to listen with --socket PATH or --listen ADDRESS",
            address.port()
        ),
        Some(libc::EACCES) => {
            format!("port {} is reserved; ports from 1024 up are free to use", address.port())
        }
        Some(_) | None => error.to_string(),
    }
}
