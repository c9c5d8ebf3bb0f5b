//! One connection from its greeting until a shard has it: the sockets' side of [`crate::nbd::negotiate`].

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::Server;
use super::clients::{Handshake, Permit};
use crate::export::{Export, Served};
use crate::nbd::negotiate::{
    Agreed, CloseReason, INPUT_MAX_LEN, Negotiation, NegotiationConfig, Next, TlsMode,
};
use crate::session::budget::Lease;
use crate::session::{Budget, Connection, Shards};
use crate::transport::registration::watch_stream;
use crate::transport::tls::TlsStream;
use crate::transport::{Arrival, Peer, Stream};

/// What a connection may receive at a time without asking for more room: several ordinary options. Our
/// choice.
const INPUT_FLOOR_LEN: usize = 4096;

/// Room for longer options over all connections in negotiation. Our choice: a hundred of the longest.
pub const INPUT_BUDGET_LEN: usize = 16 << 20;

/// Negotiates with `peer` and hands the connection to the export that it chose, or closes it. Logs what
/// came of it. Dropping the future closes the connection.
pub async fn run(server: Arc<Server>, arrival: Arrival, handshake: Handshake) {
    let Arrival { stream, peer, tls_first } = arrival;
    let mut peer = Peer::of(&stream, peer);
    let negotiated =
        timeout(server.handshake_timeout, negotiate(&server, stream, &mut peer, tls_first)).await;
    let peer = peer.to_string();
    let agreement = match negotiated {
        Ok(Ok(agreement)) => agreement,
        Ok(Err(End::Full)) => return server.clients.note_refused(&peer),
        Ok(Err(End::NotServed(error))) => return server.clients.note_not_served(&peer, &error),
        Ok(Err(end)) => return server.clients.note_no_export(&peer, &end.to_string()),
        Err(_) => return server.clients.note_no_export(&peer, "took longer than --handshake-timeout"),
    };
    drop(handshake);
    let shards = agreement.shards;
    let connection = Connection {
        stream: agreement.stream,
        export: agreement.export,
        served: agreement.served,
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
    shards: Arc<Shards>,
    export: Arc<Export>,
    served: Served,
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
    /// The image has nothing for another client.
    NotServed(nbd_img_formats::Error),
    /// Too many long options at a time.
    NoRoom,
    /// The TLS handshake failed.
    Tls(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Lost(error) if error.kind() == io::ErrorKind::UnexpectedEof => f.write_str("hung up"),
            End::Lost(error) => error.fmt(f),
            End::Closed(reason) => reason.fmt(f),
            End::Full => f.write_str("all slots are taken"),
            End::NotServed(error) => error.fmt(f),
            End::NoRoom => f.write_str("too many long options at a time"),
            End::Tls(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("hung up in the TLS handshake")
            }
            End::Tls(error) => write!(f, "the TLS handshake failed: {error}"),
        }
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::Lost(error)
    }
}

async fn negotiate(
    server: &Server,
    stream: Stream,
    peer: &mut Peer,
    tls_first: bool,
) -> Result<Agreement, End> {
    let mut stream = watch_stream(stream)?;
    let mode = server.tls.as_ref().map_or(TlsMode::Off, |tls| tls.mode());
    if tls_first {
        stream = turn_to_tls(server, stream, Vec::new(), peer).await?;
    }
    let mut exports = server.exports.seen_by(peer);
    let mut negotiation =
        Negotiation::new(NegotiationConfig { tls: mode, tls_up: tls_first, oldstyle: server.oldstyle });
    let mut output = Vec::new();
    let mut input = Input::new(&server.handshake_budget);
    negotiation.greeting(&mut output);
    loop {
        // A client that never has to be waited for must not keep all others from their turn, nor its own time from ending.
        tokio::task::coop::consume_budget().await;
        send(&stream, &mut output).await?;
        let step = negotiation.step(input.bytes(), &exports, &mut output);
        input.consume(step.consumed);
        if step.consumed > INPUT_FLOOR_LEN {
            // One that long takes as long as a hundred others.
            tokio::task::yield_now().await;
        }
        match step.next {
            Next::NeedMore => {
                send(&stream, &mut output).await?;
                input.receive(&stream).await?;
            }
            Next::Flush => {}
            Next::Transmission(agreed) => {
                // Before the client is told that it has the export.
                let permit = server.clients.admit(&peer.to_string(), &agreed.info.name).ok_or(End::Full)?;
                let (shards, export, served) = serve(server, &agreed).await.map_err(End::NotServed)?;
                send(&stream, &mut output).await?;
                let stream = stream.into_inner();
                let mut leftover = input.into_bytes();
                if let Some(tls) = stream.tls() {
                    // The next event loop can only see what is still in the socket.
                    leftover.extend(tls.drain()?);
                }
                return Ok(Agreement { stream, shards, export, served, agreed, leftover, permit });
            }
            Next::Close { reason } => {
                send(&stream, &mut output).await?;
                if let Some(tls) = stream.get_ref().tls() {
                    tls.say_goodbye();
                }
                return Err(End::Closed(reason));
            }
            Next::StartTls => {
                send(&stream, &mut output).await?;
                // Plain text behind STARTTLS is the handshake's, which will not take it for one.
                let received =
                    std::mem::replace(&mut input, Input::new(&server.handshake_budget)).into_bytes();
                stream = turn_to_tls(server, stream, received, peer).await?;
                // Who it is may have changed, and with it what it may see.
                exports = server.exports.seen_by(peer);
                negotiation.tls_established();
            }
        }
    }
}

/// Who serves what was agreed on, and what of it this client gets.
async fn serve(
    server: &Server,
    agreed: &Agreed,
) -> Result<(Arc<Shards>, Arc<Export>, Served), nbd_img_formats::Error> {
    let fail = |what| nbd_img_formats::Error::new(nbd_img_formats::ErrorKind::InvalidInput, what);
    let shards = server.exports.shards_of(&agreed.info.name).ok_or_else(|| {
        fail("an export was negotiated that does not exist; this is a defect of the server")
    })?;
    let export = shards.export_for_client().await?;
    // Before the client is told that it may use all of it.
    let served = export.serve(agreed.info.size);
    let served = served.ok_or_else(|| fail("the disk has become smaller while the client negotiated"))?;
    Ok((Arc::clone(shards), export, served))
}

/// Does the server's side of the TLS handshake, of which `received` are the first bytes.
async fn turn_to_tls(
    server: &Server,
    stream: AsyncFd<Stream>,
    received: Vec<u8>,
    peer: &mut Peer,
) -> Result<AsyncFd<Stream>, End> {
    let config =
        server.tls.as_ref().ok_or_else(|| End::Tls(io::Error::other("TLS is not configured")))?.server();
    let tls = TlsStream::new(stream.into_inner(), &config, received).map_err(End::Tls)?;
    let stream = watch_stream(Stream::Tls(Box::new(tls)))?;
    loop {
        let tls = stream.get_ref().tls().ok_or(End::Tls(io::ErrorKind::NotConnected.into()))?;
        if tls.wants_send() {
            stream.async_io(Interest::WRITABLE, |_| tls.push_out()).await.map_err(End::Tls)?;
        }
        if !tls.is_handshaking() {
            break;
        }
        // What came with STARTTLS is there before the socket has anything.
        match tls.advance_handshake() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.async_io(Interest::READABLE, |_| tls.advance_handshake()).await.map_err(End::Tls)?;
            }
            advanced => advanced.map_err(End::Tls)?,
        }
    }
    let tls = stream.get_ref().tls();
    peer.identify(tls.and_then(TlsStream::identity));
    tracing::debug!(%peer, version = tls.and_then(TlsStream::version), "TLS is up");
    Ok(stream)
}

/// Sends all of `output` and empties it.
async fn send(stream: &AsyncFd<Stream>, output: &mut Vec<u8>) -> io::Result<()> {
    let mut rest = output.as_slice();
    while !rest.is_empty() {
        // There is room as a rule, and a socket that was registered just now has to be waited for to say so.
        let sent = match stream.get_ref().send(rest, false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.async_io(Interest::WRITABLE, |stream| stream.send(rest, false)).await?
            }
            sent => sent?,
        };
        rest = rest.get(sent..).unwrap_or_default();
    }
    output.clear();
    if let Some(tls) = stream.get_ref().tls() {
        while tls.wants_send() {
            stream.async_io(Interest::WRITABLE, |_| tls.push_out()).await?;
        }
    }
    Ok(())
}

/// What was received and not consumed.
struct Input<'a> {
    budget: &'a Arc<Budget>,
    bytes: Vec<u8>,
    /// For what the buffer holds beyond its floor.
    lease: Option<Lease>,
}

impl<'a> Input<'a> {
    fn new(budget: &'a Arc<Budget>) -> Self {
        Input { budget, bytes: Vec::with_capacity(INPUT_FLOOR_LEN), lease: None }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn consume(&mut self, consumed: usize) {
        self.bytes.drain(..consumed.min(self.bytes.len()));
    }

    /// Waits for more bytes and appends some; the end of the stream is an error.
    async fn receive(&mut self, stream: &AsyncFd<Stream>) -> Result<(), End> {
        if self.bytes.len() == self.bytes.capacity() {
            self.grow()?;
        }
        let bytes = &mut self.bytes;
        // What TLS has decrypted already does not make the socket readable.
        let received = match stream.get_ref().receive(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.async_io(Interest::READABLE, |stream| stream.receive(bytes)).await?
            }
            received => received?,
        };
        if received == 0 {
            return Err(End::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    /// Goes straight to the most that an option can need: there are few such clients.
    fn grow(&mut self) -> Result<(), End> {
        if self.lease.is_some() {
            return Err(End::NoRoom);
        }
        self.lease = Some(self.budget.try_lease(INPUT_MAX_LEN).ok_or(End::NoRoom)?);
        self.bytes.reserve_exact(INPUT_MAX_LEN - self.bytes.len());
        Ok(())
    }

    fn into_bytes(mut self) -> Vec<u8> {
        self.bytes.shrink_to_fit();
        self.bytes
    }
}
