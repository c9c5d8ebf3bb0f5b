//! A connection under TLS: the same non-blocking byte stream as a plain one, with an engine in between.
//!
//! Two engines do the same: rustls with certificates, OpenSSL with pre-shared keys, which rustls does not have. Neither
//! waits, and neither is bound to an event loop: a session waits for readiness by itself and moves between loops, and
//! what they would buffer is in the session's own buffers anyway. What is decrypted already does not make the socket
//! readable: so a receive is tried before readiness is waited for, and it says `WouldBlock` only when nothing is left
//! over here.
//!
//! | module | what is in it |
//! |---|---|
//! | `certificates` | the engine of rustls |
//! | [`psk`] | that of OpenSSL, and the keys |
//! | [`psk_client`] | a client with a key, which waits |
//! | `openssl` | what of OpenSSL is used, made safe |
//! | `library` | OpenSSL, loaded at run time |

mod certificates;
mod library;
mod openssl;
pub mod psk;
pub mod psk_client;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::ServerConfig;

use self::certificates::Certified;
use self::psk::{Keyed, PskServer};
use super::peer::Identity;
use super::stream::Stream;

/// Ciphertext that is received at a time: what a session's own receive takes when it is busy. Our choice.
const WIRE_LEN: usize = 256 << 10;

/// Plain text that is encrypted and sent at a time, and so the most that waits encrypted for a slow client. Our choice:
/// the usual large read with its header, in 17 records of TLS.
const SEAL_LEN: usize = 17 << 14;

thread_local! {
    /// Where ciphertext is received. Connections share it, so that an idle one holds none.
    static WIRE: RefCell<Vec<u8>> = RefCell::new(vec![0; WIRE_LEN]);
}

/// What a server has for its side of handshakes.
#[derive(Clone, Debug)]
pub enum TlsServer {
    /// Certificates.
    Certificates(Arc<ServerConfig>),
    /// Pre-shared keys.
    Psk(Arc<PskServer>),
}

/// What does the cryptography of one connection. `socket` is always the same. When something the client sent is wrong,
/// the alert that says so is sent before the error comes back.
trait Engine: Send + fmt::Debug {
    /// Whether the handshake is not over.
    fn is_handshaking(&self) -> bool;

    /// Takes in what the client sent of the handshake; `WouldBlock` when it has to send more. Requests that came along
    /// are kept.
    fn advance_handshake(&mut self, socket: &Stream) -> io::Result<()>;

    /// Whom the client proved to be, once the handshake is over.
    fn identity(&self) -> Option<Identity>;

    /// The version of TLS.
    fn version(&self) -> Option<&'static str>;

    /// As [`TlsStream::receive`].
    fn receive(&mut self, socket: &Stream, buf: &mut Vec<u8>) -> io::Result<usize>;

    /// As [`TlsStream::drain`].
    fn drain(&mut self, socket: &Stream) -> io::Result<Vec<u8>>;

    /// Encrypts all of `bytes`, at most [`SEAL_LEN`], to be sent.
    fn seal(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Adds the goodbye to what is to be sent.
    fn seal_goodbye(&mut self);

    /// Whether something encrypted waits to be sent.
    fn wants_send(&self) -> bool;

    /// Sends what is encrypted already, all of it or up to an error.
    fn push_out(&mut self, socket: &Stream) -> io::Result<()>;
}

/// A connection under TLS, or on its way there.
#[derive(Debug)]
pub struct TlsStream {
    socket: Stream,
    engine: Mutex<Box<dyn Engine>>,
}

impl TlsStream {
    /// The server's side of a handshake that has not begun. `received` are its first bytes, if some have come.
    pub fn new(socket: Stream, server: &TlsServer, received: Vec<u8>) -> io::Result<Self> {
        let engine: Box<dyn Engine> = match server {
            TlsServer::Certificates(config) => Box::new(Certified::new(Arc::clone(config), received)?),
            TlsServer::Psk(server) => Box::new(Keyed::new(server, received)?),
        };
        Ok(TlsStream { socket, engine: Mutex::new(engine) })
    }

    /// The socket below.
    pub fn socket(&self) -> &Stream {
        &self.socket
    }

    /// Whether the handshake is not over.
    pub fn is_handshaking(&self) -> bool {
        self.engine.lock().is_handshaking()
    }

    /// Takes in what the client sent of the handshake; `WouldBlock` when it has to send more.
    pub fn advance_handshake(&self) -> io::Result<()> {
        self.engine.lock().advance_handshake(&self.socket)
    }

    /// Whom the client proved to be, once the handshake is over: nobody if it was not asked.
    pub fn identity(&self) -> Option<Identity> {
        self.engine.lock().identity()
    }

    /// The version, for the log.
    pub fn version(&self) -> Option<&'static str> {
        self.engine.lock().version()
    }

    /// Appends what was received to the room of `buf`, which has some. 0 is the end of the stream, `WouldBlock` means
    /// that nothing is there now.
    pub fn receive(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        self.engine.lock().receive(&self.socket, buf)
    }

    /// All that has been received, decrypted: whoever waits for the socket from now on misses nothing.
    pub fn drain(&self) -> io::Result<Vec<u8>> {
        self.engine.lock().drain(&self.socket)
    }

    /// Encrypts as much of `bytes` as is taken at a time and sends what the socket takes. `WouldBlock`, and nothing
    /// taken, while what was encrypted before has to wait.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut engine = self.engine.lock();
        engine.push_out(&self.socket)?;
        let taken = bytes.get(..SEAL_LEN).unwrap_or(bytes);
        engine.seal(taken)?;
        match engine.push_out(&self.socket) {
            Ok(()) => Ok(taken.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(taken.len()),
            Err(error) => Err(error),
        }
    }

    /// Whether something encrypted waits to be sent.
    pub fn wants_send(&self) -> bool {
        self.engine.lock().wants_send()
    }

    /// Sends what is encrypted already.
    pub fn push_out(&self) -> io::Result<()> {
        self.engine.lock().push_out(&self.socket)
    }

    /// Tells the client that nothing more comes, if the socket takes it.
    pub fn say_goodbye(&self) {
        let mut engine = self.engine.lock();
        engine.seal_goodbye();
        // Whoever does not read it will see the end of the connection.
        let _ = engine.push_out(&self.socket);
    }
}
