//! Taking connections from a listening socket and starting their negotiation.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::rare::Rare;
use super::{Server, negotiate};
use crate::transport::registration::watch_listener;
use crate::transport::{Arrival, Listener};

/// Pauses when descriptors or memory are out: they do not come back at once, and accept would fail
/// again in the same microsecond. Our choice.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_LONGEST: Duration = Duration::from_secs(1);

/// Accepted in a row before others on this thread get their turn. Our choice.
const BURST: u32 = 16;

/// The endless work of accepting on `listener`. Must be called, as the future run, within the control
/// runtime. Dropping the future closes the listener and removes its socket file.
pub fn prepare(listener: Listener, server: Arc<Server>) -> io::Result<impl Future<Output = ()> + Send> {
    let listener = watch_listener(listener)?;
    Ok(async move {
        let mut pause = PAUSE_FIRST;
        let mut burst = 0_u32;
        let failures = Rare::default();
        loop {
            let accepted = async {
                let mut ready = listener.readable().await?;
                // Last, with nothing that waits behind it: other listeners accept, too.
                server.clients.room().await;
                Ok(ready.try_io(|listener| listener.get_ref().accept()))
            };
            let accepted = match accepted.await {
                Ok(Err(_would_wait)) => continue,
                Ok(Ok(accepted)) => accepted,
                Err(error) => Err(error),
            };
            match accepted {
                Ok((stream, peer)) => {
                    pause = PAUSE_FIRST;
                    let tls_first = listener.get_ref().is_tls_first();
                    start(&server, Arrival { stream, peer, tls_first });
                    burst += 1;
                    if burst == BURST {
                        burst = 0;
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) if is_the_clients(&error) => {}
                Err(error) => {
                    if let Some(count) = failures.note(Instant::now()) {
                        tracing::warn!(count, %error, listener = %listener.get_ref(), "cannot accept connections");
                    }
                    server.clients.evict_oldest();
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_LONGEST);
                }
            }
        }
    })
}

/// Starts the negotiation with a client. Must be called within the control runtime, and on its thread.
pub fn start(server: &Arc<Server>, arrival: Arrival) {
    arrival.stream.prepare(server.peer_timeout);
    let handshake = server.clients.begin_handshake();
    let id = handshake.id();
    let negotiation = negotiate::run(Arc::clone(server), arrival, handshake);
    // It cannot have ended before it is registered: it runs on this thread.
    server.clients.register_handshake(id, tokio::spawn(negotiation).abort_handle());
}

/// Errors of a connection that was gone before it was accepted (accept(2) passes pending network errors
/// on) rather than of this machine.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EINTR
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}
