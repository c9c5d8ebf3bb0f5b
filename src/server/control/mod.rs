//! The control socket: where the operator's other commands speak to a server that runs.
//!
//! It belongs to whoever runs the server (mode 0600), listens on the control runtime, and leaves what waits for a disk
//! to the export's workers. Nobody there holds up clients, nor others at the same socket: there are bounds for how
//! many may be connected, how long a line is, and how long it takes.

pub mod protocol;

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::protocol::{LINE_LEN_MAX, Request, answer_line};
use super::{Error, Server};
use crate::export::Resized;
use crate::transport::registration::{watch_listener, watch_stream};
use crate::transport::unix::{self, FileAccess};
use crate::transport::{Listener, Stream};

/// Who may connect: the user that runs the server.
const ACCESS: FileAccess = FileAccess { mode: Some(0o600), owner: None };
/// Most connections at a time. Our choice: far more than an operator has.
const CONNECTIONS_MAX: usize = 16;
/// How long a line may take to arrive, an answer to be taken, and a connection to say nothing. Our choice.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause when no connection can be accepted. Our choice.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens at `path`, which is treated as that of a `--socket`.
pub fn listen(path: &Path) -> Result<Listener, Error> {
    let listener = unix::listen(path, ACCESS).and_then(|(socket, file)| Listener::unix(socket, file));
    listener.map_err(|error| {
        Error::Listen(format!("--control {}: {error}", path.to_string_lossy().escape_debug()))
    })
}

/// The endless work of answering. Must be called, as the future run, within the control runtime. Dropping the future
/// closes the socket with all connections, and removes its file; what has begun on an image goes on.
pub(super) fn prepare(
    listener: Listener,
    server: Arc<Server>,
) -> io::Result<impl Future<Output = ()> + Send> {
    let listener = watch_listener(listener)?;
    Ok(async move {
        let mut connections = JoinSet::new();
        loop {
            let accepted = listener.async_io(Interest::READABLE, Listener::accept).await;
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((stream, peer)) => {
                    let full = connections.len() >= CONNECTIONS_MAX;
                    connections.spawn(converse(Arc::clone(&server), stream, peer, full));
                    if full {
                        // It is told so, and gone within the time of one answer.
                        connections.join_next().await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections at the control socket");
                    sleep(PAUSE).await;
                }
            }
        }
    })
}

/// Answers one connection until it ends.
async fn converse(server: Arc<Server>, stream: Stream, peer: String, full: bool) {
    let talk = async {
        let stream = watch_stream(stream)?;
        if full {
            let text = format!("{CONNECTIONS_MAX} connections are at the control socket already; try later");
            return answer(&stream, &Err(text)).await;
        }
        let mut received = Vec::new();
        loop {
            let line = match timeout(PATIENCE, next_line(&stream, &mut received)).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => {
                    let text = format!("the line is longer than {LINE_LEN_MAX} bytes");
                    return answer(&stream, &Err(text)).await;
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            };
            let outcome = match Request::parse(&line) {
                Ok(request) => obey(&server, request).await,
                Err(text) => Err(text),
            };
            answer(&stream, &outcome).await?;
        }
    };
    if let Err(error) = talk.await {
        let ended: io::Error = error;
        tracing::debug!(%peer, error = %ended, "a connection at the control socket ended");
    }
}

async fn obey(server: &Server, request: Request) -> Result<Resized, String> {
    let Request::Resize { export, change, shrink } = request;
    let shards = server.exports.only_or_named(export.as_deref())?;
    shards.resize(change, shrink).await.map_err(|error| error.to_string())
}

/// The next line without its end, `None` if it is too long. `received` holds what came behind the last one.
async fn next_line(stream: &AsyncFd<Stream>, received: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut looked_at = 0;
    loop {
        let rest = received.get(looked_at..).unwrap_or_default();
        if let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            let behind = received.split_off(looked_at + at + 1);
            let mut line = std::mem::replace(received, behind);
            line.pop();
            return Ok((line.len() <= LINE_LEN_MAX).then_some(line));
        }
        looked_at = received.len();
        if looked_at > LINE_LEN_MAX {
            return Ok(None);
        }
        received.reserve(1024);
        if stream.async_io(Interest::READABLE, |stream| stream.receive(received)).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn answer(stream: &AsyncFd<Stream>, outcome: &Result<Resized, String>) -> io::Result<()> {
    let line = answer_line(outcome);
    let sending = async {
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            let sent = stream.async_io(Interest::WRITABLE, |stream| stream.send(rest, false)).await?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(())
    };
    timeout(PATIENCE, sending).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
