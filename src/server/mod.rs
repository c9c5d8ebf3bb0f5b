//! The server: opens the exports, listens, lets clients negotiate, hands them to the shards, and ends.
//!
//! All of it but the images' own work runs on one thread, the control runtime. It never calls a driver
//! once the server is ready, so no disk can stall accepting, negotiation, timers or signals.
//!
//! | module | what is in it |
//! |---|---|
//! | [`access`] | who may do what |
//! | [`options`] | what the operator wants, and what the starter passed down |
//! | `limits` | open files |
//! | `listen` | from addresses to listening sockets |
//! | `accept` | taking connections |
//! | `negotiate` | one connection until it has an export |
//! | `directory` | the exports as the protocol asks for them |
//! | [`control`] | what the operator tells a server that runs |
//! | `clients` | who is connected, and how many may be |
//! | `ready` | telling the starter that the server listens |
//! | `end` | signals, draining, flushing, closing |
//! | [`tls`] | certificates and keys: read, and read again |
//! | `psk_file` | the keys of `--tls-psk` |
//! | `rare` | log lines that others can cause as often as they like |

mod accept;
pub mod access;
mod clients;
pub mod control;
mod directory;
mod end;
mod limits;
mod listen;
mod negotiate;
pub mod options;
mod psk_file;
mod rare;
mod ready;
pub mod tls;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime;
use tokio::task::JoinSet;

use crate::export::{Export, ExportSpec};
use crate::nbd::negotiate::TlsMode;
use crate::session::{BUDGET_LEN_DEFAULT, Budget, Shards};
use crate::transport::{Arrival, Listener};

use self::clients::Clients;
use self::directory::Exports;
use self::end::Ends;
use self::tls::Tls;

pub use self::end::EndTimes;
pub use self::options::{Background, Inherited, Manners, ServeOptions};
pub use self::ready::go_to_background;

/// How a server ended that had started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// As asked, with every image flushed and closed.
    Clean,
    /// As asked, but an image could not be flushed and closed, or not in time.
    NotFlushed,
    /// At once, because it was asked twice.
    Forced,
}

/// Why a server cannot start.
#[derive(Debug)]
pub enum Error {
    /// An image cannot be opened.
    Image(nbd_img_formats::Error),
    /// An address cannot be listened on; the text says which and why.
    Listen(String),
    /// What the starter passed down cannot be used.
    Inherited(String),
    /// The certificates cannot be used.
    Tls(tls::TlsError),
    /// The pid file cannot be written.
    PidFile(PathBuf, io::Error),
    /// The system refuses what every server needs.
    System(&'static str, io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Image(error) => error.fmt(f),
            Error::Listen(text) | Error::Inherited(text) => f.write_str(text),
            Error::Tls(error) => error.fmt(f),
            Error::PidFile(path, error) => {
                write!(f, "--pid-file {}: {error}", path.to_string_lossy().escape_debug())
            }
            Error::System(what, error) => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// Serves until it is told to end, on the calling thread. Sockets and the pid file are gone when it
/// returns; images that could not be closed in time are left to their threads, and the process should
/// exit.
pub fn run(options: ServeOptions, mut inherited: Inherited) -> Result<Outcome, Error> {
    let tls = options.tls.clone().map(Tls::load).transpose().map_err(Error::Tls)?;
    let own_overlays = options.exports.iter().any(ExportSpec::is_per_client);
    // The socket, and the overlay's file.
    let client_files = if own_overlays { 2 } else { 1 };
    let handshakes_max = limits::raise(options.max_connections, client_files, options.exports.len());
    let exports =
        options.exports.iter().map(Export::open).collect::<Result<Vec<_>, _>>().map_err(Error::Image)?;
    let captive = inherited.is_captive();
    let listeners = listen::all(&options, &mut inherited)?;
    let control_socket = options.control.as_deref().map(control::listen).transpose()?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::System("cannot start the control runtime", error))?;
    let announcement = ready::Announcement {
        uris: ready::uris(
            &listeners,
            &exports,
            tls.as_ref().is_some_and(|tls| tls.mode() == TlsMode::Required),
        ),
        // The starter of a captive server has its own use for stdout, and knows where it listens.
        print: !captive && !options.manners.quiet,
        ready_fd: inherited.ready_fd,
        background: options.manners.background,
        pid_file: options.pid_file.clone(),
        keep_pid_file: options.manners.keep_pid_file,
    };
    let budget = Budget::new(BUDGET_LEN_DEFAULT);
    let served = exports
        .into_iter()
        .map(|export| (Arc::clone(&export), Shards::new(export, Arc::clone(&budget), options.times)));
    let clients = Clients::new(options.max_connections, handshakes_max, options.manners.full_waits);
    let server = Arc::new(Server {
        exports: Exports::new(served.collect(), options.access.clone(), Arc::clone(&clients)),
        clients,
        tls,
        oldstyle: options.oldstyle,
        handshake_timeout: options.handshake_timeout,
        peer_timeout: options.peer_timeout,
        handshake_budget: Budget::new(negotiate::INPUT_BUDGET_LEN),
    });
    let outcome = control.block_on(serve(
        server,
        (listeners, control_socket),
        inherited.arrivals,
        announcement,
        &options,
    ));
    if let Some(relay) = inherited.relay {
        // The last replies are still on their way.
        relay.finish(options.end_times.drain);
    }
    // Not waiting for a thread that looks at the files of TLS: their disk may hang.
    control.shutdown_background();
    outcome
}

/// What the tasks of the control runtime share.
struct Server {
    exports: Exports,
    clients: Arc<Clients>,
    tls: Option<Arc<Tls>>,
    oldstyle: bool,
    handshake_timeout: Duration,
    peer_timeout: Duration,
    handshake_budget: Arc<Budget>,
}

async fn serve(
    server: Arc<Server>,
    (listeners, control_socket): (Vec<Listener>, Option<Listener>),
    arrivals: Vec<Arrival>,
    announcement: ready::Announcement,
    options: &ServeOptions,
) -> Result<Outcome, Error> {
    let system = |error| Error::System("cannot watch for signals", error);
    // Before the starter is told: it may send one at once.
    let mut signals = end::Signals::watch(options.manners.hang_up_ends).map_err(system)?;
    if let Some(tls) = &server.tls {
        signals.reload_on_hang_up(Arc::clone(tls));
        tokio::spawn(Arc::clone(tls).keep_up());
    }
    let ends = match (listeners.is_empty(), options.exit_last) {
        (true, _) => Ends::WithArrivals,
        (false, true) => Ends::AfterLast,
        (false, false) => Ends::OnSignal,
    };
    let mut accepting = JoinSet::new();
    for listener in listeners {
        tracing::info!(%listener, "listening");
        let accept = accept::prepare(listener, Arc::clone(&server))
            .map_err(|error| Error::System("cannot watch a listening socket", error))?;
        accepting.spawn(accept);
    }
    if let Some(socket) = control_socket {
        let answer = control::prepare(socket, Arc::clone(&server))
            .map_err(|error| Error::System("cannot watch the control socket", error))?;
        accepting.spawn(answer);
    }
    let pid_file = announcement.make()?;
    for arrival in arrivals {
        accept::start(&server, arrival);
    }
    let reason = end::wait(&mut signals, &server.clients, ends).await;
    tracing::info!(%reason, connections = server.clients.sessions(), "ending");
    ready::tell_stopping();
    // Closes the listening sockets and removes their files, so that a successor can start.
    accepting.shutdown().await;
    server.exports.drain();
    let outcome = end::drain(server.exports.shards(), options.end_times, reason, &mut signals).await;
    server.clients.end_handshakes();
    drop(pid_file);
    Ok(outcome)
}
