//! `--list`: asks another server what it has, and prints it in the form that callers of qemu-nbd know.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::client::{Dialogue, ExportDetails, Next, Purpose};
use super::config::{ClientTls, Listing};
use crate::server::tls::read_keys;
use crate::transport::tls::psk_client::PskClient;
use crate::transport::{Address, Place};

/// Received at a time. Our choice.
const RECEIVE_LEN: usize = 16 * 1024;

/// What bytes go over.
trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// The answer to `--list`.
pub fn run(listing: &Listing) -> Result<String, String> {
    let mut stream = connect(&listing.address)?;
    let mut dialogue = Dialogue::new(Purpose::List, listing.tls.is_some());
    let (mut input, mut output) = (Vec::new(), Vec::new());
    loop {
        let next = dialogue.step(&mut input, &mut output)?;
        let lost = |error: io::Error| format!("the connection failed: {error}");
        let sent = stream.write_all(&output).and_then(|()| stream.flush());
        output.clear();
        match next {
            // Everything is known: a server need not wait for the goodbye.
            Next::Done => return Ok(show(&dialogue.exports, dialogue.extended)),
            Next::StartTls => {
                sent.map_err(lost)?;
                input.clear();
                stream = encrypt(stream, listing)?;
                dialogue.tls_established(&mut output);
            }
            Next::More => {
                sent.map_err(lost)?;
                if exchange(&mut *stream, &mut input).map_err(lost)? == 0 {
                    return Err("Failed to read from the server: it closed the connection".to_owned());
                }
            }
        }
    }
}

fn exchange(stream: &mut dyn Stream, input: &mut Vec<u8>) -> io::Result<usize> {
    let mut received = [0_u8; RECEIVE_LEN];
    let len = stream.read(&mut received)?;
    input.extend_from_slice(received.get(..len).unwrap_or_default());
    Ok(len)
}

fn connect(address: &Address) -> Result<Box<dyn Stream>, String> {
    let failed = |whom: &str, error: io::Error| format!("Failed to connect to '{whom}': {error}");
    match &address.place {
        Place::Unix(path) => {
            let stream = UnixStream::connect(path);
            Ok(Box::new(stream.map_err(|error| failed(&path.to_string_lossy(), error))?))
        }
        Place::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port));
            Ok(Box::new(stream.map_err(|error| failed(&format!("{host}:{port}"), error))?))
        }
        Place::Abstract(_) | Place::Vsock { .. } | Place::Fd(_) | Place::Stdio => {
            Err(format!("{address}: qemu-nbd's options name no such place"))
        }
    }
}

fn encrypt(stream: Box<dyn Stream>, listing: &Listing) -> Result<Box<dyn Stream>, String> {
    let folder = match &listing.tls {
        None => return Err("TLS without credentials".to_owned()),
        Some(ClientTls::Psk { file, username }) => {
            let keys = read_keys(file).map_err(|error| error.to_string())?;
            let client = PskClient::connect(stream, keys, username);
            return Ok(Box::new(client.map_err(|error| format!("TLS handshake failed: {error}"))?));
        }
        Some(ClientTls::Certificates(folder)) => folder,
    };
    let name =
        listing.tls_name.clone().ok_or("No hostname for certificate validation: give --tls-hostname")?;
    let server_name =
        ServerName::try_from(name.clone()).map_err(|error| format!("--tls-hostname {name}: {error}"))?;
    let config = Arc::new(client_config(folder)?);
    let connection = ClientConnection::new(config, server_name).map_err(|error| error.to_string())?;
    let mut stream = StreamOwned::new(connection, stream);
    while stream.conn.is_handshaking() {
        stream
            .conn
            .complete_io(&mut stream.sock)
            .map_err(|error| format!("TLS handshake failed: {error}"))?;
    }
    Ok(Box::new(stream))
}

/// The client's certificates, in the folder layout of QEMU. Its own is not needed by every server.
fn client_config(folder: &Path) -> Result<ClientConfig, String> {
    let about = |path: &Path, error: &dyn std::fmt::Display| {
        format!("Unable to access credentials {}: {error}", path.display())
    };
    let certificates = |path: &Path| {
        CertificateDer::pem_file_iter(path)
            .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
            .map_err(|error| about(path, &error))
    };
    let ca = folder.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for root in certificates(&ca)? {
        roots.add(root).map_err(|error| about(&ca, &error))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let (cert, key) = (folder.join("client-cert.pem"), folder.join("client-key.pem"));
    if !cert.exists() {
        return Ok(builder.with_no_client_auth());
    }
    let private = PrivateKeyDer::from_pem_file(&key).map_err(|error| about(&key, &error))?;
    builder.with_client_auth_cert(certificates(&cert)?, private).map_err(|error| about(&cert, &error))
}

/// Names of the transmission flags from bit 1 up (`NBD_FLAG_*` of the protocol).
const FLAG_NAMES: [&str; 12] = [
    "readonly",
    "flush",
    "fua",
    "rotational",
    "trim",
    "zeroes",
    "df",
    "multi",
    "resize",
    "cache",
    "fast-zero",
    "block-status-payload",
];

fn show(exports: &[ExportDetails], extended: bool) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        show_export(&mut text, export, extended);
    }
    text
}

fn show_export(text: &mut String, export: &ExportDetails, extended: bool) {
    // Writing into a String cannot fail.
    let _ = writeln!(text, " export: '{}'", export.name);
    if !export.description.is_empty() {
        let _ = writeln!(text, "  description: {}", export.description);
    }
    // The first bit is always set once a server has told them.
    if export.flags != 0 {
        let set = |(at, name): (usize, &&'static str)| (export.flags >> (at + 1) & 1 == 1).then_some(*name);
        let names: Vec<_> = FLAG_NAMES.iter().enumerate().filter_map(set).collect();
        let _ = writeln!(text, "  size:  {}", export.size);
        let _ = writeln!(text, "  flags: {:#x} ( {} )", export.flags, names.join(" "));
    }
    if let Some((min, preferred, max)) = export.blocks {
        let _ = writeln!(text, "  min block: {min}\n  opt block: {preferred}\n  max block: {max}");
    }
    let _ = writeln!(text, "  transaction size: {}", if extended { "64-bit" } else { "32-bit" });
    if !export.contexts.is_empty() {
        let _ = writeln!(text, "  available meta contexts: {}", export.contexts.len());
        for context in &export.contexts {
            let _ = writeln!(text, "   {context}");
        }
    }
}
