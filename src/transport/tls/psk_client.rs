//! A client's side of TLS with a pre-shared key, on a stream that waits: for whoever asks another server something. It is
//! not for sessions, which never wait.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use super::openssl::{Context, Input, Opened, Session, Side};
use super::psk::Keys;

/// Received at a time: the longest record of TLS (RFC 8446, 5.2) and its header.
const RECEIVE_LEN: usize = (16 << 10) + 256 + 5;

/// An encrypted stream over another one.
pub struct PskClient<S> {
    session: Session,
    stream: S,
    /// What is decrypted and not taken yet.
    plain: Vec<u8>,
}

impl<S: Read + Write> PskClient<S> {
    /// Shakes hands on `stream` as `identity`, whose key is in `keys`. A server that has not the same key is an error,
    /// and so is one that shows a certificate instead.
    pub fn connect(stream: S, keys: Keys, identity: &str) -> Result<Self, String> {
        if keys.get(identity).is_none() {
            return Err(format!("there is no key of {identity:?}"));
        }
        let context = Context::new(Side::Client)?;
        let session = Session::new(&context, Arc::new(keys), Some(identity.to_owned()))?;
        let mut client = PskClient { session, stream, plain: Vec::new() };
        let lost = |error: io::Error| error.to_string();
        loop {
            let done = client.session.handshake();
            // Also the alert that says why not.
            client.push_out().map_err(lost)?;
            if done? {
                return Ok(client);
            }
            if client.take_in().map_err(lost)? == 0 {
                return Err("the server closed the connection".to_owned());
            }
        }
    }

    /// Waits for ciphertext; 0 bytes are the end.
    fn take_in(&mut self) -> io::Result<usize> {
        let mut received = vec![0; RECEIVE_LEN];
        let len = self.stream.read(&mut received)?;
        received.truncate(len);
        let input = self.session.input();
        let rest = input.rest().to_vec();
        *input = Input::of([rest, received].concat());
        Ok(len)
    }

    fn push_out(&mut self) -> io::Result<()> {
        let output = std::mem::take(self.session.output());
        self.stream.write_all(&output)?;
        self.stream.flush()
    }
}

impl<S: Read + Write> Read for PskClient<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.plain.is_empty() && !buf.is_empty() {
            self.plain.reserve(RECEIVE_LEN);
            match self.session.open(&mut self.plain).map_err(io::Error::other)? {
                Opened::Bytes(_) => {}
                Opened::End => return Ok(0),
                Opened::Nothing => {
                    self.push_out()?;
                    if self.take_in()? == 0 {
                        return Ok(0);
                    }
                }
            }
        }
        let len = buf.len().min(self.plain.len());
        for (to, from) in buf.iter_mut().zip(self.plain.drain(..len)) {
            *to = from;
        }
        Ok(len)
    }
}

impl<S: Read + Write> Write for PskClient<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.session.seal(buf).map_err(io::Error::other)?;
        self.push_out()?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S> fmt::Debug for PskClient<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PskClient").finish_non_exhaustive()
    }
}
