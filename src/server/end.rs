//! The end: on a signal or after the last client, drained within a time, flushed, closed.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Outcome;
use super::clients::Clients;
use super::rare::Rare;
use super::tls::Tls;
use crate::session::Shards;

/// The part of the drain time that sessions get, in quarters; the rest is for flushing. Our choice: a
/// client that does not read its replies must not cost the others their last flush.
const SESSION_QUARTERS: u32 = 3;

/// The signals that the server listens to.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    hang_ups: Rare,
    hang_up_ends: bool,
    tls: Option<Arc<Tls>>,
}

/// Why the server ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
    /// SIGHUP, where it ends the server.
    HangUp,
    /// `--exit-last`, or nobody else can come.
    LastClient,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Terminate => "SIGTERM",
            Reason::Interrupt => "SIGINT",
            Reason::HangUp => "SIGHUP",
            Reason::LastClient => "the last client has gone",
        })
    }
}

impl Signals {
    /// From now on these signals do not end the process by themselves. `hang_up_ends` is whether SIGHUP asks for
    /// the end too.
    pub fn watch(hang_up_ends: bool) -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            hang_ups: Rare::default(),
            hang_up_ends,
            tls: None,
        })
    }

    /// From now on SIGHUP has these certificates read again.
    pub fn reload_on_hang_up(&mut self, tls: Arc<Tls>) {
        self.tls = Some(tls);
    }

    /// Waits for a signal that asks for the end.
    async fn end(&mut self) -> Reason {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return Reason::Terminate,
                _ = self.interrupt.recv() => return Reason::Interrupt,
                _ = self.hang_up.recv() => {
                    if self.hang_up_ends {
                        return Reason::HangUp;
                    }
                    if let Some(tls) = &self.tls {
                        tls.reload();
                    } else if let Some(count) = self.hang_ups.note(std::time::Instant::now()) {
                        tracing::info!(count, "SIGHUP ignored: there is nothing to reload");
                    }
                }
            }
        }
    }
}

/// With whom the server ends by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ends {
    /// With nobody: it waits for a signal.
    OnSignal,
    /// With the last client that had an export.
    AfterLast,
    /// With those that the starter has brought, since no others can come.
    WithArrivals,
}

/// Waits for a reason to end.
pub async fn wait(signals: &mut Signals, clients: &Clients, ends: Ends) -> Reason {
    let last = async {
        match ends {
            Ends::OnSignal => std::future::pending().await,
            Ends::AfterLast => clients.last_gone().await,
            Ends::WithArrivals => clients.all_gone().await,
        }
    };
    tokio::select! {
        reason = signals.end() => reason,
        () = last => Reason::LastClient,
    }
}

/// Lets all sessions finish what they have received, then flushes and closes the images, all within
/// `drain_timeout`. A second signal ends it at once; when `begun_for` is no signal, the first that comes asks only for
/// what is being done. What is not done then is logged and left behind.
pub async fn drain<'a>(
    shards: impl Iterator<Item = &'a Arc<Shards>>,
    drain_timeout: Duration,
    begun_for: Reason,
    signals: &mut Signals,
) -> Outcome {
    let start = Instant::now();
    let deadline = start + drain_timeout;
    let sessions_deadline = start + drain_timeout * SESSION_QUARTERS / 4;
    let mut ending = JoinSet::new();
    for shards in shards {
        shards.drain();
        ending.spawn(finish(Arc::clone(shards), sessions_deadline, deadline));
    }
    let mut outcome = Outcome::Clean;
    let mut asked = begun_for != Reason::LastClient;
    // Each task keeps its own deadlines; this one is for a task that cannot.
    let overdue = deadline + drain_timeout / 4;
    loop {
        tokio::select! {
            ended = ending.join_next() => match ended {
                None => return outcome,
                Some(Ok(Outcome::Clean)) => {}
                Some(Ok(worse)) => outcome = worse,
                Some(Err(error)) => {
                    tracing::error!(%error, "closing an image went wrong");
                    outcome = Outcome::NotFlushed;
                }
            },
            reason = signals.end() => {
                if asked {
                    tracing::warn!(%reason, "asked again: ending at once, images may not be flushed");
                    return Outcome::Forced;
                }
                asked = true;
                tracing::info!(%reason, "ending already");
            }
            () = sleep_until(overdue) => return Outcome::NotFlushed,
        }
    }
}

/// Ends one export.
async fn finish(shards: Arc<Shards>, sessions_deadline: Instant, deadline: Instant) -> Outcome {
    let export = shards.export();
    let name = export.name().escape_debug().to_string();
    if timeout_at(sessions_deadline, shards.wait_idle()).await.is_err() {
        let connections = shards.active_count();
        tracing::warn!(export = name, connections, "connections did not finish in the drain time");
    }
    let read_only = export.read_only();
    match timeout_at(deadline, shards.close()).await {
        Ok(Ok(())) => Outcome::Clean,
        Ok(Err(error)) => {
            tracing::error!(export = name, %error, "cannot flush and close the image");
            Outcome::NotFlushed
        }
        // Nothing can be lost of it.
        Err(_) if read_only => {
            tracing::warn!(export = name, "the image was not closed in the drain time");
            Outcome::Clean
        }
        Err(_) => {
            tracing::error!(export = name, "the image was not flushed and closed in the drain time");
            Outcome::NotFlushed
        }
    }
}
