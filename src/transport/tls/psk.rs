//! TLS with pre-shared keys, by OpenSSL: who has the key of an identity is that identity. TLS 1.2 and 1.3, always with
//! ephemeral keys beside it.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::net::{RecvFlags, recv};

use super::openssl::{Context, Input, Opened, Session, Side};
use super::{Engine, WIRE, WIRE_LEN};
use crate::transport::peer::Identity;
use crate::transport::stream::Stream;

/// Longest key (PSK_MAX_PSK_LEN of OpenSSL 3, and what psktool makes at most).
pub const KEY_MAX_LEN: usize = 512;

/// Longest identity in bytes (PSK_MAX_IDENTITY_LEN of OpenSSL 3.0).
pub const IDENTITY_MAX_LEN: usize = 256;

thread_local! {
    /// Where ciphertext waits to be sent; connections share it as they do `WIRE`.
    static SEALED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Keys by identity. Not shown in logs.
#[derive(Default, PartialEq, Eq)]
pub struct Keys(HashMap<String, Vec<u8>>);

impl Keys {
    /// No keys.
    pub fn new() -> Keys {
        Keys::default()
    }

    /// Adds one; false if the identity has one already, which stays.
    pub fn add(&mut self, identity: String, key: Vec<u8>) -> bool {
        match self.0.entry(identity) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(key);
                true
            }
        }
    }

    /// The key of an identity.
    pub fn get(&self, identity: &str) -> Option<&[u8]> {
        self.0.get(identity).map(Vec::as_slice)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("count", &self.count()).finish()
    }
}

/// A server's keys, and OpenSSL ready to use them.
pub struct PskServer {
    context: Context,
    keys: Arc<Keys>,
}

impl PskServer {
    /// The text says what is missing on this machine.
    pub fn new(keys: Keys) -> Result<PskServer, String> {
        Ok(PskServer { context: Context::new(Side::Server)?, keys: Arc::new(keys) })
    }
}

impl fmt::Debug for PskServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PskServer").field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// The state of one connection.
pub struct Keyed {
    session: Session,
    /// Bytes of the output that are sent.
    sent: usize,
}

impl Keyed {
    /// A handshake that has not begun, with its first bytes.
    pub fn new(server: &PskServer, received: Vec<u8>) -> io::Result<Self> {
        let mut session =
            Session::new(&server.context, Arc::clone(&server.keys), None).map_err(io::Error::other)?;
        *session.input() = Input::of(received);
        Ok(Keyed { session, sent: 0 })
    }

    /// Receives once and has OpenSSL `work` on it; 0 bytes are the end. What it leaves is kept.
    fn take_in<T>(
        &mut self,
        socket: &Stream,
        work: impl FnOnce(&mut Session) -> Result<T, String>,
    ) -> io::Result<Option<T>> {
        WIRE.with_borrow_mut(|wire| {
            let (got, _) = recv(socket.as_fd(), wire.as_mut_slice(), RecvFlags::empty())?;
            if got == 0 {
                return Ok(None);
            }
            // OpenSSL works on the shared buffer itself; it has taken all that was in the session's own.
            let input = self.session.input();
            *input = Input { bytes: std::mem::take(wire), end: got, taken: 0 };
            let result = work(&mut self.session);
            let input = self.session.input();
            let rest = input.rest().to_vec();
            *wire = std::mem::replace(input, Input::of(rest)).bytes;
            result.map(Some).map_err(|why| self.fail(socket, why))
        })
    }

    /// The alert that says why goes out; the client may have gone.
    fn fail(&mut self, socket: &Stream, why: String) -> io::Error {
        let _ = self.push_out(socket);
        io::Error::new(io::ErrorKind::InvalidData, why)
    }

    fn open(&mut self, socket: &Stream, buf: &mut Vec<u8>) -> io::Result<Opened> {
        self.session.open(buf).map_err(|why| self.fail(socket, why))
    }
}

impl Engine for Keyed {
    fn is_handshaking(&self) -> bool {
        !self.session.is_ready()
    }

    fn advance_handshake(&mut self, socket: &Stream) -> io::Result<()> {
        if !self.session.input().rest().is_empty() {
            return self.session.handshake().map(drop).map_err(|why| self.fail(socket, why));
        }
        match self.take_in(socket, Session::handshake)? {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn identity(&self) -> Option<Identity> {
        self.session.identity().map(|identity| Identity::Psk(identity.to_owned()))
    }

    fn version(&self) -> Option<&'static str> {
        self.session.version()
    }

    fn receive(&mut self, socket: &Stream, buf: &mut Vec<u8>) -> io::Result<usize> {
        let mut opened = self.open(socket, buf)?;
        loop {
            match opened {
                Opened::Bytes(len) => return Ok(len),
                Opened::End => return Ok(0),
                Opened::Nothing => match self.take_in(socket, |session| session.open(buf))? {
                    Some(next) => opened = next,
                    // Gone without a goodbye: requests have lengths, so a cut stream is seen where it matters.
                    None => return Ok(0),
                },
            }
        }
    }

    fn drain(&mut self, socket: &Stream) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            // More than all the ciphertext that can be here.
            all.reserve(WIRE_LEN);
            match self.open(socket, &mut all)? {
                Opened::Bytes(_) => {}
                Opened::End | Opened::Nothing => return Ok(all),
            }
        }
    }

    fn seal(&mut self, bytes: &[u8]) -> io::Result<()> {
        let output = self.session.output();
        if output.capacity() == 0 {
            *output = SEALED.take();
        }
        self.session.seal(bytes).map_err(io::Error::other)
    }

    fn seal_goodbye(&mut self) {
        self.session.seal_goodbye();
    }

    fn wants_send(&self) -> bool {
        self.session.has_output()
    }

    fn push_out(&mut self, socket: &Stream) -> io::Result<()> {
        let output = self.session.output();
        while let Some(rest) = output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match socket.send(rest, false) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        output.clear();
        // Of two buffers the larger one stays.
        let shared = SEALED.take();
        let own = std::mem::take(output);
        SEALED.set(if own.capacity() > shared.capacity() { own } else { shared });
        Ok(())
    }
}

impl fmt::Debug for Keyed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyed").finish_non_exhaustive()
    }
}
