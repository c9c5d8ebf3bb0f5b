//! One connection from its greeting until a shard has it: the sockets' side of [`crate::nbd::negotiate`].

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::Server;
use super::clients::{Handshake, Permit};
use crate::nbd::negotiate::{Agreed, CloseReason, INPUT_MAX_LEN, Negotiation, NegotiationConfig, Next};
use crate::session::budget::Lease;
use crate::session::{Budget, Connection};
use crate::transport::Stream;
use crate::transport::registration::watch_stream;

/// What a connection may receive at a time without asking for more room: several ordinary options. Our
/// choice.
const INPUT_FLOOR_LEN: usize = 4096;

/// Room for longer options over all connections in negotiation. Our choice: a hundred of the longest.
pub const INPUT_BUDGET_LEN: usize = 16 << 20;

/// Negotiates with `peer` and hands the connection to the export that it chose, or closes it. Logs what
/// came of it. Dropping the future closes the connection.
pub async fn run(server: Arc<Server>, stream: Stream, peer: String, handshake: Handshake) {
    let agreement = match timeout(server.handshake_timeout, negotiate(&server, stream, &peer)).await {
        Ok(Ok(agreement)) => agreement,
        Ok(Err(End::Full)) => return server.clients.note_refused(&peer),
        Ok(Err(end)) => return server.clients.note_no_export(&peer, &end.to_string()),
        Err(_) => return server.clients.note_no_export(&peer, "took longer than --handshake-timeout"),
    };
    drop(handshake);
    let Some(shards) = server.exports.shards_of(&agreement.agreed.info.name) else {
        return tracing::error!(peer, "negotiated for an export that does not exist");
    };
    let connection = Connection {
        stream: agreement.stream,
        agreed: agreement.agreed,
        leftover: agreement.leftover,
        permit: Box::new(agreement.permit),
        peer,
    };
    if let Err(error) = shards.hand_over(connection) {
        tracing::warn!(%error, "a connection is closed: no thread takes it");
    }
}

/// What a successful negotiation leaves.
struct Agreement {
    stream: Stream,
    agreed: Agreed,
    leftover: Vec<u8>,
    permit: Permit,
}

/// Why there is no session.
enum End {
    /// The client hung up, or the socket failed.
    Lost(io::Error),
    /// The protocol ended it.
    Closed(CloseReason),
    /// All slots are taken.
    Full,
    /// Too many long options at a time.
    NoRoom,
    /// STARTTLS was acknowledged, which this server does not offer.
    Tls,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Lost(error) if error.kind() == io::ErrorKind::UnexpectedEof => f.write_str("hung up"),
            End::Lost(error) => error.fmt(f),
            End::Closed(reason) => reason.fmt(f),
            End::Full => f.write_str("all slots are taken"),
            End::NoRoom => f.write_str("too many long options at a time"),
            End::Tls => f.write_str("asked for TLS"),
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::Lost(error)
    }
}

async fn negotiate(server: &Server, stream: Stream, peer: &str) -> Result<Agreement, End> {
    let stream = watch_stream(stream)?;
    let exports = server.exports.seen_by(peer);
    let mut negotiation = Negotiation::new(NegotiationConfig::default());
    let mut output = Vec::new();
    let mut input = Input::new(&server.handshake_budget);
    negotiation.greeting(&mut output);
    loop {
        send(&stream, &mut output).await?;
        let step = negotiation.step(input.bytes(), &exports, &mut output);
        input.consume(step.consumed);
        match step.next {
            Next::NeedMore => {
                send(&stream, &mut output).await?;
                input.receive(&stream).await?;
            }
            Next::Flush => {}
            Next::Transmission(agreed) => {
                // Before the client is told that it has the export.
                let permit = server.clients.admit(peer, &agreed.info.name).ok_or(End::Full)?;
                send(&stream, &mut output).await?;
                return Ok(Agreement {
                    stream: stream.into_inner(),
                    agreed,
                    leftover: input.into_bytes(),
                    permit,
                });
            }
            Next::Close { reason } => {
                send(&stream, &mut output).await?;
                return Err(End::Closed(reason));
            }
            Next::StartTls => return Err(End::Tls),
        }
    }
}

/// Sends all of `output` and empties it.
async fn send(stream: &AsyncFd<Stream>, output: &mut Vec<u8>) -> io::Result<()> {
    let mut rest = output.as_slice();
    while !rest.is_empty() {
        let sent = stream.async_io(Interest::WRITABLE, |mut stream| stream.write(rest)).await?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    output.clear();
    Ok(())
}

/// What was received and not consumed.
struct Input<'a> {
    budget: &'a Arc<Budget>,
    buffer: Vec<u8>,
    len: usize,
    /// For what the buffer holds beyond its floor.
    lease: Option<Lease>,
}

impl<'a> Input<'a> {
    fn new(budget: &'a Arc<Budget>) -> Self {
        Input { budget, buffer: vec![0; INPUT_FLOOR_LEN], len: 0, lease: None }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.len).unwrap_or_default()
    }

    fn consume(&mut self, consumed: usize) {
        let consumed = consumed.min(self.len);
        self.buffer.copy_within(consumed..self.len, 0);
        self.len -= consumed;
    }

    /// Waits for more bytes and appends some; the end of the stream is an error.
    async fn receive(&mut self, stream: &AsyncFd<Stream>) -> Result<(), End> {
        if self.len == self.buffer.len() {
            self.grow()?;
        }
        let room = self.buffer.get_mut(self.len..).unwrap_or_default();
        let received = stream.async_io(Interest::READABLE, |mut stream| stream.read(room)).await?;
        if received == 0 {
            return Err(End::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        self.len += received;
        Ok(())
    }

    /// Goes straight to the most that an option can need: there are few such clients.
    fn grow(&mut self) -> Result<(), End> {
        if self.lease.is_some() {
            return Err(End::NoRoom);
        }
        self.lease = Some(self.budget.try_lease(INPUT_MAX_LEN).ok_or(End::NoRoom)?);
        self.buffer.resize(INPUT_MAX_LEN, 0);
        Ok(())
    }

    fn into_bytes(mut self) -> Vec<u8> {
        self.buffer.truncate(self.len);
        self.buffer.shrink_to_fit();
        self.buffer
    }
}
