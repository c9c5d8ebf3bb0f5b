//! TLS with certificates, by rustls.

use std::fmt;
use std::io::{self, BufRead, IoSlice, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::{ServerConfig, ServerConnection};

use super::{Engine, WIRE, WIRE_LEN};
use crate::transport::certificate::CertificateNames;
use crate::transport::peer::Identity;
use crate::transport::stream::Stream;

/// The state of one connection.
pub struct Certified {
    connection: ServerConnection,
    /// Ciphertext that was received and not taken in yet.
    waiting: Vec<u8>,
}

impl Certified {
    /// A handshake that has not begun, with its first bytes.
    pub fn new(config: Arc<ServerConfig>, received: Vec<u8>) -> io::Result<Self> {
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        // Bounded by `SEAL_LEN` instead.
        connection.set_buffer_limit(None);
        Ok(Certified { connection, waiting: received })
    }
}

impl Engine for Certified {
    fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    fn advance_handshake(&mut self, socket: &Stream) -> io::Result<()> {
        // No room: requests that came along stay with rustls.
        self.take_in(socket, &mut Vec::new()).map(drop)
    }

    fn identity(&self) -> Option<Identity> {
        let own = self.connection.peer_certificates()?.first()?;
        Some(Identity::Certificate(CertificateNames::of_der(own)))
    }

    fn version(&self) -> Option<&'static str> {
        self.connection.protocol_version().and_then(|version| version.as_str())
    }

    fn receive(&mut self, socket: &Stream, buf: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            match self.opened(buf)? {
                Opened::Bytes(len) => return Ok(len),
                Opened::End => return Ok(0),
                Opened::Nothing => match self.take_in(socket, buf)? {
                    0 => {}
                    len => return Ok(len),
                },
            }
        }
    }

    fn drain(&mut self, socket: &Stream) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            // More than all the ciphertext that can be here.
            all.reserve(WIRE_LEN);
            match self.opened(&mut all)? {
                Opened::Bytes(_) => {}
                Opened::Nothing if !self.waiting.is_empty() => {
                    self.take_in(socket, &mut all)?;
                }
                Opened::End | Opened::Nothing => return Ok(all),
            }
        }
    }

    fn seal(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.connection.writer().write_all(bytes)
    }

    fn seal_goodbye(&mut self) {
        self.connection.send_close_notify();
    }

    fn wants_send(&self) -> bool {
        self.connection.wants_write()
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

/// What is there of decrypted bytes.
enum Opened {
    Bytes(usize),
    Nothing,
    End,
}

impl Certified {
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
            if self.connection.read_tls(&mut bytes)? == 0 {
                // What comes behind the client's goodbye means nothing, and is never taken in.
                bytes = &[];
                break;
            }
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
}

impl fmt::Debug for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certified").finish_non_exhaustive()
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
