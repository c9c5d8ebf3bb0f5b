//! A connection under TLS: the same non-blocking byte stream as a plain one, with rustls in between.
//!
//! It is not tokio-rustls's stream: a session waits for readiness by itself and moves between event loops, and what
//! it would buffer is in the session's own buffers anyway. What is decrypted already does not make the socket
//! readable: so a receive is tried before readiness is waited for, and it says `WouldBlock` only when nothing is left
//! over here.

use std::cell::RefCell;
use std::io::{self, BufRead, IoSlice, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::{ServerConfig, ServerConnection};

use super::certificate::CertificateNames;
use super::peer::Identity;
use super::stream::Stream;

/// Ciphertext that is received at a time: what a session's own receive takes when it is busy. Our choice.
const WIRE_LEN: usize = 256 << 10;

/// Plain text that is encrypted at a time, and so the most that waits encrypted for a slow client. Our choice.
const SEAL_LEN: usize = 256 << 10;

thread_local! {
    /// Where ciphertext is received. Connections share it, so that an idle one holds none.
    static WIRE: RefCell<Vec<u8>> = RefCell::new(vec![0; WIRE_LEN]);
}

/// A connection under TLS, or on its way there.
#[derive(Debug)]
pub struct TlsStream {
    socket: Stream,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    connection: ServerConnection,
    /// Ciphertext that was received and not taken in yet.
    waiting: Vec<u8>,
}

impl TlsStream {
    /// The server's side of a handshake that has not begun. `received` are its first bytes, if some have come.
    pub fn new(socket: Stream, config: Arc<ServerConfig>, received: Vec<u8>) -> io::Result<Self> {
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        // Bounded by `SEAL_LEN` instead.
        connection.set_buffer_limit(None);
        Ok(TlsStream { socket, state: Mutex::new(State { connection, waiting: received }) })
    }

    /// The socket below.
    pub fn socket(&self) -> &Stream {
        &self.socket
    }

    /// Whether the handshake is not over.
    pub fn is_handshaking(&self) -> bool {
        self.state.lock().connection.is_handshaking()
    }

    /// Takes in what the client sent of the handshake; `WouldBlock` when it has to send more.
    pub fn advance_handshake(&self) -> io::Result<()> {
        // No room: requests that came along stay with rustls.
        self.state.lock().take_in(&self.socket, &mut Vec::new()).map(drop)
    }

    /// Whom the client proved to be, once the handshake is over: nobody if it was not asked.
    pub fn identity(&self) -> Option<Identity> {
        let state = self.state.lock();
        let own = state.connection.peer_certificates()?.first()?;
        Some(Identity::Certificate(CertificateNames::of_der(own)))
    }

    /// The version, for the log.
    pub fn version(&self) -> Option<&'static str> {
        self.state.lock().connection.protocol_version().and_then(|version| version.as_str())
    }

    /// Appends what was received to the room of `buf`. 0 is the end of the stream, `WouldBlock` means that nothing is
    /// there now.
    pub fn receive(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        let mut state = self.state.lock();
        loop {
            match state.opened(buf)? {
                Opened::Bytes(len) => return Ok(len),
                Opened::End => return Ok(0),
                Opened::Nothing => match state.take_in(&self.socket, buf)? {
                    0 => {}
                    len => return Ok(len),
                },
            }
        }
    }

    /// All that has been received, decrypted: whoever waits for the socket from now on misses nothing.
    pub fn drain(&self) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        let mut all = Vec::new();
        loop {
            // More than all the ciphertext that can be here.
            all.reserve(WIRE_LEN);
            match state.opened(&mut all)? {
                Opened::Bytes(_) => {}
                Opened::Nothing if !state.waiting.is_empty() => {
                    state.take_in(&self.socket, &mut all)?;
                }
                Opened::End | Opened::Nothing => return Ok(all),
            }
        }
    }

    /// Encrypts as much of `bytes` as is taken at a time and sends what the socket takes. `WouldBlock`, and nothing
    /// taken, while what was encrypted before has to wait.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.lock();
        state.push_out(&self.socket)?;
        let taken = bytes.get(..SEAL_LEN).unwrap_or(bytes);
        state.connection.writer().write_all(taken)?;
        match state.push_out(&self.socket) {
            Ok(()) => Ok(taken.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(taken.len()),
            Err(error) => Err(error),
        }
    }

    /// Whether something encrypted waits to be sent.
    pub fn wants_send(&self) -> bool {
        self.state.lock().connection.wants_write()
    }

    /// Sends what is encrypted already.
    pub fn push_out(&self) -> io::Result<()> {
        self.state.lock().push_out(&self.socket)
    }

    /// Tells the client that nothing more comes, if the socket takes it.
    pub fn say_goodbye(&self) {
        let mut state = self.state.lock();
        state.connection.send_close_notify();
        // Whoever does not read it will see the end of the connection.
        let _ = state.push_out(&self.socket);
    }
}

/// What is there of decrypted bytes.
enum Opened {
    Bytes(usize),
    Nothing,
    End,
}

impl State {
    /// Moves decrypted bytes to the room of `buf`, which has some.
    fn opened(&mut self, buf: &mut Vec<u8>) -> io::Result<Opened> {
        let mut moved = 0;
        loop {
            let room = buf.capacity() - buf.len();
            let mut reader = self.connection.reader();
            let end = match reader.fill_buf() {
                Ok([]) => Opened::End,
                Ok(bytes) if room > 0 => {
                    let len = bytes.len().min(room);
                    buf.extend_from_slice(&bytes[..len]);
                    reader.consume(len);
                    moved += len;
                    continue;
                }
                Ok(_) => Opened::Nothing,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Opened::Nothing,
                // Gone without a goodbye: requests have lengths, so a cut stream is seen where it matters.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Opened::End,
                Err(error) => return Err(error),
            };
            return Ok(if moved > 0 { Opened::Bytes(moved) } else { end });
        }
    }

    /// Takes in ciphertext: what waits, else what the socket has. Moves what it decrypts to the room of `buf`, and
    /// tells how much.
    fn take_in(&mut self, socket: &Stream, buf: &mut Vec<u8>) -> io::Result<usize> {
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            return self.decrypt(&waiting, socket, buf);
        }
        WIRE.with_borrow_mut(|wire| {
            let (got, _) = recv(socket.as_fd(), wire.as_mut_slice(), RecvFlags::empty())?;
            if got > 0 {
                return self.decrypt(wire.get(..got).unwrap_or_default(), socket, buf);
            }
            if self.connection.is_handshaking() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Tells rustls of the end.
            self.connection.read_tls(&mut io::empty())
        })
    }

    /// Decrypts records and moves them to `buf`, as long as it has room; keeps the rest.
    fn decrypt(&mut self, mut bytes: &[u8], socket: &Stream, buf: &mut Vec<u8>) -> io::Result<usize> {
        let mut moved = 0;
        while !bytes.is_empty() {
            self.connection.read_tls(&mut bytes)?;
            let state = self.connection.process_new_packets().map_err(|error| {
                // The alert that says why; the client may have gone.
                let _ = self.push_out(socket);
                io::Error::new(io::ErrorKind::InvalidData, error)
            })?;
            let opened = state.plaintext_bytes_to_read();
            if opened > 0 {
                let len = match self.opened(buf)? {
                    Opened::Bytes(len) => len,
                    Opened::Nothing | Opened::End => 0,
                };
                moved += len;
                if len < opened {
                    break;
                }
            }
        }
        self.waiting = bytes.to_vec();
        Ok(moved)
    }

    fn push_out(&mut self, socket: &Stream) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Wire(socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The socket as rustls writes to it.
struct Wire<'a>(&'a Stream);

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes, false)
    }

    fn write_vectored(&mut self, records: &[IoSlice<'_>]) -> io::Result<usize> {
        sendmsg(self.0.as_fd(), records, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
            .map_err(Into::into)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
