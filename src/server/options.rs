//! What the operator wants of the server, and what its starter passed down.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use super::Error;
use super::tls::TlsOptions;
use crate::export::ExportSpec;
use crate::session::Times;
use crate::transport::{Address, Listener, activation};

/// A checked command line.
#[derive(Debug)]
pub struct ServeOptions {
    /// What is served; never empty, no name twice.
    pub exports: Vec<ExportSpec>,
    /// Where to listen; never empty. Not used when the starter passed sockets.
    pub addresses: Vec<Address>,
    /// Whether the operator asked for `addresses` rather than leaving them to the default.
    pub listen_is_given: bool,
    /// TLS, if it is configured.
    pub tls: Option<TlsOptions>,
    /// Whether other machines may connect although nothing is encrypted.
    pub allow_plaintext: bool,
    /// Most clients that have an export at a time.
    pub max_connections: u32,
    /// Time that a client has for choosing one.
    pub handshake_timeout: Duration,
    /// How long sessions wait for their clients.
    pub times: Times,
    /// End after the last client has gone.
    pub exit_last: bool,
    /// Where the process id goes.
    pub pid_file: Option<PathBuf>,
    /// The descriptor that is told when the server listens.
    pub ready_fd: Option<RawFd>,
    /// Time that requests in flight and the last flush get.
    pub drain_timeout: Duration,
    /// How it behaves towards its starter and its clients.
    pub manners: Manners,
}

/// Where the qemu-nbd front behaves as its model does. The default is nbd-img's own way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Manners {
    /// Print no URIs.
    pub quiet: bool,
    /// Leave the pid file behind.
    pub keep_pid_file: bool,
    /// SIGHUP ends the server; without, it has certificates read again.
    pub hang_up_ends: bool,
    /// While there are as many connections as there may be clients, the next ones wait to be accepted; without,
    /// they are told.
    pub full_waits: bool,
    /// What becomes of the process once it listens.
    pub background: Background,
}

/// What becomes of a process once its server listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Background {
    /// It stays as it is.
    #[default]
    No,
    /// It leaves its folder, and its standard streams are closed, but for stderr if it `keeps_log`.
    Yes {
        /// Whether stderr stays open.
        keeps_log: bool,
    },
}

/// What the starter passed down by number.
#[derive(Debug)]
pub struct Inherited {
    /// Listening sockets; empty unless started by socket activation.
    pub listeners: Vec<Listener>,
    /// The descriptor of `--ready-fd`.
    pub ready_fd: Option<OwnedFd>,
}

impl Inherited {
    /// Takes what there is. To be called once, before the process opens anything: see
    /// [`activation::claim`].
    pub fn take(ready_fd: Option<RawFd>) -> Result<Inherited, Error> {
        let listeners = activation::take_listeners()
            .map_err(|error| Error::Inherited(format!("socket activation (LISTEN_FDS): {error}")))?;
        if let Some(fd) = ready_fd
            && listeners.iter().any(|listener| listener.as_raw_fd() == fd)
        {
            return Err(Error::Inherited(format!(
                "--ready-fd {fd} is a socket of LISTEN_FDS; use another descriptor"
            )));
        }
        let ready_fd = ready_fd
            .map(activation::claim)
            .transpose()
            .map_err(|error| Error::Inherited(format!("--ready-fd: {error}")))?;
        Ok(Inherited { listeners, ready_fd })
    }

    /// Whether the process lives inside of another command, such as libnbd's `[ nbd-img serve ... ]`:
    /// started with sockets, but by no service manager (which sets INVOCATION_ID, systemd.exec(5)).
    pub fn is_captive(&self) -> bool {
        !self.listeners.is_empty() && std::env::var_os("INVOCATION_ID").is_none()
    }
}
