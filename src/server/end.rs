//! The end: on a signal or after the last client, drained within a time, flushed, closed.
//!
//! Clients get a limited time to take their replies. The last flush gets what it takes unless the operator says
//! otherwise: a disk may have gigabytes to write before the tables that lead to them.

use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nbd_img_formats::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::Outcome;
use super::clients::Clients;
use super::rare::Rare;
use super::ready;
use super::tls::Tls;
use crate::session::Shards;

/// How often who waits for a last flush hears of it. Our choice.
const FLUSH_WORD_TIME: Duration = Duration::from_secs(5);

/// How long an image may take to be closed of which nothing can be lost. Our choice.
const UNCHANGED_CLOSE_TIME: Duration = Duration::from_millis(500);

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

/// How long an end may take.
#[derive(Clone, Copy, Debug)]
pub struct EndTimes {
    /// For sessions to finish what they have received.
    pub drain: Duration,
    /// For each image to be flushed and closed then; without, as long as it takes.
    pub flush: Option<Duration>,
}

/// Lets all sessions finish what they have received, then flushes and closes the images, within `times`. A second
/// signal ends it at once; when `begun_for` is no signal, the first that comes asks only for what is being done. What
/// is not done then is logged and left behind.
pub async fn drain<'a>(
    shards: impl Iterator<Item = &'a Arc<Shards>>,
    times: EndTimes,
    begun_for: Reason,
    signals: &mut Signals,
) -> Outcome {
    ready::tell_still_stopping(times.drain + FLUSH_WORD_TIME * 3);
    let sessions_deadline = Instant::now() + times.drain;
    let mut ending = JoinSet::new();
    for shards in shards {
        shards.drain();
        ending.spawn(finish(Arc::clone(shards), sessions_deadline, times.flush));
    }
    let mut outcome = Outcome::Clean;
    let mut asked = begun_for != Reason::LastClient;
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
        }
    }
}

/// Ends one export.
async fn finish(shards: Arc<Shards>, sessions_deadline: Instant, flush_timeout: Option<Duration>) -> Outcome {
    let export = shards.export();
    let name = export.name().escape_debug().to_string();
    if timeout_at(sessions_deadline, shards.wait_idle()).await.is_err() {
        let connections = shards.active_count();
        tracing::warn!(export = name, connections, "connections did not finish in the drain time");
    }
    let unchanged = export.leaves_the_image_as_it_is();
    let limit = if unchanged { Some(UNCHANGED_CLOSE_TIME) } else { flush_timeout };
    let closing = close(&shards, &name);
    let closed = match limit {
        Some(limit) => timeout(limit, closing).await.ok(),
        None => Some(closing.await),
    };
    match closed {
        Some(Ok(())) => Outcome::Clean,
        Some(Err(error)) => {
            tracing::error!(export = name, %error, "cannot flush and close the image");
            Outcome::NotFlushed
        }
        None if unchanged => {
            tracing::warn!(
                export = name,
                "the disk is slow: the image, of which nothing can be lost, is left open"
            );
            Outcome::Clean
        }
        None => {
            tracing::error!(export = name, "the image was not flushed and closed within --flush-timeout");
            Outcome::NotFlushed
        }
    }
}

/// Flushes and closes an image, and says every now and then that it is being waited for.
async fn close(shards: &Shards, name: &str) -> Result<(), Error> {
    ready::tell_still_stopping(FLUSH_WORD_TIME * 3);
    let begin = Instant::now();
    let mut closing = pin!(shards.close());
    let mut word = begin + FLUSH_WORD_TIME;
    loop {
        tokio::select! {
            closed = &mut closing => return closed,
            () = sleep_until(word) => {}
        }
        ready::tell_still_stopping(FLUSH_WORD_TIME * 3);
        tracing::warn!(
            export = name,
            seconds = begin.elapsed().as_secs(),
            "the image is still being flushed; a second signal ends it at once, with what that loses"
        );
        word += FLUSH_WORD_TIME;
    }
}
