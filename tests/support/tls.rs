//! Our client under TLS. It trusts the CA of its folder, and shows the certificate of its folder if there is one.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};

use super::client::{Client, PATIENCE, Transport, Wishes, option_bytes, read_greeting, read_option_reply};
use super::wire::{option, option_reply};

pub type TlsStream = StreamOwned<ClientConnection, UnixStream>;

impl Transport for TlsStream {
    fn duplicate(&self) -> io::Result<Box<dyn Transport>> {
        Err(io::Error::other("TLS has one end"))
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.sock.set_read_timeout(patience)?;
        self.sock.set_write_timeout(patience)
    }
}

pub fn config(folder: &Path, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let certs = |name: &str| -> Option<Vec<CertificateDer<'static>>> {
        let certs = CertificateDer::pem_file_iter(folder.join(name)).ok()?;
        Some(certs.map(Result::unwrap).collect())
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certs("ca-cert.pem").unwrap());
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match certs("client-cert.pem") {
        None => builder.with_no_client_auth(),
        Some(certs) => {
            let key = PrivateKeyDer::from_pem_file(folder.join("client-key.pem")).unwrap();
            builder.with_client_auth_cert(certs, key).unwrap()
        }
    })
}

/// Does the handshake on a socket.
pub fn handshake(socket: UnixStream, config: Arc<ClientConfig>) -> io::Result<TlsStream> {
    let connection = ClientConnection::new(config, "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    stream.conn.complete_io(&mut stream.sock)?;
    Ok(stream)
}

/// A connection on which STARTTLS was acknowledged.
pub fn starttls(socket: &Path) -> UnixStream {
    starttls_on(UnixStream::connect(socket).unwrap())
}

/// The same on a connection that nothing was received on yet.
pub fn starttls_on(mut stream: UnixStream) -> UnixStream {
    stream.set_patience(Some(PATIENCE)).unwrap();
    read_greeting(&mut stream);
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream.write_all(&option_bytes(option::STARTTLS, &[])).unwrap();
    assert_eq!(read_option_reply(&mut stream, option::STARTTLS).unwrap().0, option_reply::ACK);
    stream
}

/// A client in transmission under TLS.
pub fn client(
    socket: &Path,
    folder: &Path,
    versions: &[&'static SupportedProtocolVersion],
    wishes: Wishes,
) -> Client {
    let stream = handshake(starttls(socket), config(folder, versions)).unwrap();
    Client::ask_for(Box::new(stream), "", wishes)
}

/// What becomes of a connection whose client shows what is in its folder: the first reply, or the alert.
pub fn try_options(socket: &Path, folder: &Path) -> io::Result<u32> {
    let mut stream = handshake(starttls(socket), config(folder, rustls::ALL_VERSIONS))?;
    stream.write_all(&option_bytes(option::STRUCTURED_REPLY, &[]))?;
    stream.flush()?;
    read_option_reply(&mut stream, option::STRUCTURED_REPLY).map(|(kind, _)| kind)
}

/// Has a program of TLS talk NBD on its standard input and output: the client's flags, then ABORT. Gives what the server
/// said.
pub fn talk(command: &mut Command) -> Vec<u8> {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = piped.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(&[&3_u32.to_be_bytes()[..], &option_bytes(option::ABORT, &[])].concat());
    let _ = stdin.flush();
    let mut out = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    drop(stdin);
    child.wait().unwrap();
    out
}

/// Reads to the end, whatever that is.
pub fn rest(stream: &mut impl Read) -> Vec<u8> {
    let mut rest = Vec::new();
    // A reset or a missing goodbye is an end too.
    let _ = stream.read_to_end(&mut rest);
    rest
}
