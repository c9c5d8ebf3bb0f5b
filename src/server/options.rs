//! What the operator wants of the server, and what its starter passed down.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use super::Error;
use super::access::AccessRules;
use super::end::EndTimes;
use super::tls::TlsOptions;
use crate::export::ExportSpec;
use crate::session::Times;
use crate::transport::stdio::{self, Relay};
use crate::transport::unix::FileAccess;
use crate::transport::{Address, Arrival, InheritedSocket, Listener, Place, activation};

/// A checked command line.
#[derive(Debug)]
pub struct ServeOptions {
    /// What is served; never empty, no name twice.
    pub exports: Vec<ExportSpec>,
    /// Who may do what with it.
    pub access: AccessRules,
    /// Where to listen; never empty. Not used when the starter passed sockets.
    pub addresses: Vec<Address>,
    /// Whether the operator asked for `addresses` rather than leaving them to the default.
    pub listen_is_given: bool,
    /// Mode and owner of Unix sockets' files.
    pub socket_access: FileAccess,
    /// Where other commands speak to the server.
    pub control: Option<PathBuf>,
    /// Whether clients are told the only export at once, instead of negotiating.
    pub oldstyle: bool,
    /// TLS, if it is configured.
    pub tls: Option<TlsOptions>,
    /// Whether other machines may connect although nothing is encrypted.
    pub allow_plaintext: bool,
    /// Most clients that have an export at a time.
    pub max_connections: u32,
    /// Time that a client has for choosing one.
    pub handshake_timeout: Duration,
    /// Time that a TCP client's machine may leave things unanswered; zero leaves it to the kernel.
    pub peer_timeout: Duration,
    /// How long sessions wait for their clients.
    pub times: Times,
    /// End after the last client has gone.
    pub exit_last: bool,
    /// Where the process id goes.
    pub pid_file: Option<PathBuf>,
    /// The descriptor that is told when the server listens.
    pub ready_fd: Option<RawFd>,
    /// Time that requests in flight and the last flush get at the end.
    pub end_times: EndTimes,
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
    /// All addresses of IPv6 (`::`) are those of IPv4, too.
    pub any_is_both: bool,
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

/// What the starter passed down: sockets of socket activation, and those that `--listen` names.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Listening sockets.
    pub listeners: Vec<Listener>,
    /// Clients that are connected already.
    pub arrivals: Vec<Arrival>,
    /// The descriptor of `--ready-fd`.
    pub ready_fd: Option<OwnedFd>,
    /// What carries replies to a client behind a pipe.
    pub relay: Option<Relay>,
    /// There are sockets of socket activation.
    activated: bool,
    stdio: bool,
}

impl Inherited {
    /// Takes what there is. To be called once, before the process opens anything: see
    /// [`activation::claim`].
    pub fn take(options: &ServeOptions) -> Result<Inherited, Error> {
        let mut inherited = Inherited::default();
        let mut taken = Vec::new();
        let activated = activation::take_sockets()
            .map_err(|error| Error::Inherited(format!("socket activation (LISTEN_FDS): {error}")))?;
        inherited.activated = !activated.is_empty();
        for (fd, socket) in activated {
            taken.push(fd);
            inherited.add(socket);
        }
        if inherited.activated && options.listen_is_given {
            return Err(Error::Inherited(
                "--socket and --listen cannot be used under socket activation (LISTEN_FDS is set): the starter \
                 has chosen where to listen"
                    .to_owned(),
            ));
        }
        for address in &options.addresses {
            inherited.take_address(address, &mut taken)?;
        }
        if let Some(fd) = options.ready_fd {
            inherited.ready_fd = Some(claim(fd, "--ready-fd", &mut taken)?);
        }
        Ok(inherited)
    }

    fn take_address(&mut self, address: &Address, taken: &mut Vec<RawFd>) -> Result<(), Error> {
        let what = format!("--listen {address}");
        let fail = |error| Error::Inherited(format!("{what}: {error}"));
        match &address.place {
            Place::Fd(fd) => {
                let fd = claim(*fd, &what, taken)?;
                self.add(InheritedSocket::of(fd, address.tls_first).map_err(fail)?);
            }
            Place::Stdio if self.stdio => return Err(fail(std::io::Error::other("it is there only once"))),
            Place::Stdio => {
                let client = stdio::take(address.tls_first).map_err(fail)?;
                self.stdio = true;
                self.relay = client.relay;
                self.add(client.socket);
            }
            Place::Unix(_) | Place::Abstract(_) | Place::Tcp { .. } | Place::Vsock { .. } => {}
        }
        Ok(())
    }

    fn add(&mut self, socket: InheritedSocket) {
        match socket {
            InheritedSocket::Listening(listener) => self.listeners.push(listener),
            InheritedSocket::Connected(arrival) => self.arrivals.push(arrival),
        }
    }

    /// Whether the starter has chosen where to listen.
    pub fn is_activated(&self) -> bool {
        self.activated
    }

    /// Whether the process lives inside of another command, such as libnbd's `[ nbd-img serve ... ]`:
    /// started with sockets, but by no service manager.
    pub fn is_captive(&self) -> bool {
        (self.activated || self.stdio) && !is_service()
    }
}

/// Whether a service manager has started this process (systemd.exec(5)). Its variables go on to whatever a service
/// starts in turn; only SYSTEMD_EXEC_PID, from systemd 248 on, tells whom it means.
fn is_service() -> bool {
    match std::env::var_os("SYSTEMD_EXEC_PID") {
        Some(pid) => pid == std::process::id().to_string().as_str(),
        None => std::env::var_os("INVOCATION_ID").is_some(),
    }
}

/// Takes a descriptor that nobody has `taken` yet.
fn claim(fd: RawFd, what: &str, taken: &mut Vec<RawFd>) -> Result<OwnedFd, Error> {
    if taken.contains(&fd) {
        return Err(Error::Inherited(format!(
            "{what}: descriptor {fd} is a socket of LISTEN_FDS or of --listen already; use another one"
        )));
    }
    taken.push(fd);
    activation::claim(fd).map_err(|error| Error::Inherited(format!("{what}: {error}")))
}
