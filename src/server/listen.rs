//! From addresses to listening sockets, under the policy that unencrypted service stays on this machine: which goes for
//! its virtual machines (vsock) too, since no network is between them.

use std::fmt::Display;
use std::net::SocketAddr;

use super::Error;
use super::options::{Inherited, ServeOptions};
use crate::nbd::negotiate::TlsMode;
use crate::transport::address::{is_local, resolve};
use crate::transport::{Address, Arrival, Listener, Place, unix};

/// Listens everywhere that was asked for, beside the listening sockets that the starter passed.
pub fn all(options: &ServeOptions, inherited: &mut Inherited) -> Result<Vec<Listener>, Error> {
    let mut listeners = std::mem::take(&mut inherited.listeners);
    refuse_tls_without_certificates(options, &listeners, &inherited.arrivals)?;
    if inherited.is_activated() {
        return Ok(listeners);
    }
    for address in &options.addresses {
        let fail = |error: std::io::Error| Error::Listen(format!("{address}: {error}"));
        let listener = match &address.place {
            Place::Unix(path) => unix::listen(path, options.socket_access)
                .and_then(|(socket, file)| Listener::unix(socket, file))
                .map_err(fail)?,
            Place::Abstract(name) => Listener::unix_abstract(name).map_err(fail)?,
            Place::Vsock { cid, port } => Listener::vsock(*cid, *port).map_err(fail)?,
            Place::Tcp { host, port } => {
                listen_tcp(options, address, host, *port, &mut listeners)?;
                continue;
            }
            // The starter has passed them.
            Place::Fd(_) | Place::Stdio => continue,
        };
        listeners.push(listener.with_tls_first(address.tls_first));
    }
    Ok(listeners)
}

fn refuse_tls_without_certificates(
    options: &ServeOptions,
    listeners: &[Listener],
    arrivals: &[Arrival],
) -> Result<(), Error> {
    if options.tls.is_some() {
        return Ok(());
    }
    let fail = |what: &dyn Display| {
        Err(Error::Listen(format!(
            "{what}: TLS needs certificates or keys: add --tls-dir FOLDER or --tls-psk FILE"
        )))
    };
    if let Some(address) = options.addresses.iter().find(|address| address.tls_first) {
        return fail(address);
    }
    if let Some(listener) = listeners.iter().find(|listener| listener.is_tls_first()) {
        return fail(listener);
    }
    match arrivals.iter().find(|arrival| arrival.tls_first) {
        Some(arrival) => fail(&arrival.peer),
        None => Ok(()),
    }
}

/// Listens on every address that `host` stands for.
fn listen_tcp(
    options: &ServeOptions,
    address: &Address,
    host: &str,
    port: u16,
    listeners: &mut Vec<Listener>,
) -> Result<(), Error> {
    let fail = |text: String| Error::Listen(format!("{address}: {text}"));
    let resolved = resolve(host, port).map_err(|error| fail(error.to_string()))?;
    let required = options.tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Required);
    let encrypted = address.tls_first || required;
    let mut bound = 0_usize;
    let mut unavailable = None;
    for socket_address in resolved {
        if !encrypted && !options.allow_plaintext && !is_local(socket_address.ip()) {
            return Err(fail(
                "other machines can connect there, and need not encrypt; add --tls-dir FOLDER or --tls-psk FILE for TLS, or \
                 --allow-plaintext if that is meant, or listen on 127.0.0.1 or on a Unix socket"
                    .to_owned(),
            ));
        }
        match Listener::tcp(socket_address, options.manners.any_is_both) {
            Ok(listener) => {
                listeners.push(listener.with_tls_first(address.tls_first));
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
