//! From a [`Line`] to what is to be done: everything that needs more than one option, in the order in which QEMU finds
//! fault.
//!
//! What is to be served comes out as the server's own options.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbd_img_formats::open::{Backing, Names, OpenOptions};
use nbd_img_formats::qcow2::Compress;
use nbd_img_formats::storage;
use rustix::process::{Resource, getrlimit};

use super::super::options::{self, handshake_timeout};
use super::line::{Complaint, Line};
use super::node::{self, Aio, BackingNode, Image, Window};
use super::objects::{self, Endpoint, Kind, Object};
use super::tree;
use crate::export::{BlockSizes, CacheMode, DetectZeroes, ExportSpec, Sharing, Temporary};
use crate::nbd::negotiate::TlsMode;
use crate::server::access::{AccessRules, Right, Rule, Who};
use crate::server::tls::{TlsFiles, TlsOptions, TlsSource};
use crate::server::{Background, EndTimes, Manners, ServeOptions};
use crate::session::Times;
use crate::transport::address::DEFAULT_PORT;
use crate::transport::unix::FileAccess;
use crate::transport::{Address, Place};

/// Where qemu-nbd listens when nothing is said.
const DEFAULT_BIND: &str = "0.0.0.0";

/// Where the socket of a kernel device is made; the device's name follows.
const DEVICE_SOCKET: &str = "/var/lock/qemu-nbd-";

/// Fewest and most clients that `--shared=0` lets in: as many as half of the open files, within these. Our choice.
const UNLIMITED_MIN: u64 = 64;
const UNLIMITED_MAX: u64 = 4096;

/// The end: requests in flight get what `serve` gives them, the last flush what it takes, as with QEMU.
const END_TIMES: EndTimes = EndTimes { drain: Duration::from_secs(5), flush: None };

/// What a command line asks for.
#[derive(Debug)]
pub enum Task {
    /// Serve an image.
    Serve(Box<Service>),
    /// Show what another server has (`-L`).
    List(Box<Listing>),
    /// Disconnect a kernel device (`-d`).
    Disconnect(PathBuf),
}

/// An image to be served.
#[derive(Debug)]
pub struct Service {
    /// The server's options.
    pub options: ServeOptions,
    /// The image as the command line names it, for errors.
    pub operand: String,
    /// Whether the starter is let go once the server listens.
    pub fork: bool,
    /// The kernel device that becomes its client (`-c`).
    pub device: Option<PathBuf>,
    /// The context that the listening socket gets.
    pub selinux_label: Option<OsString>,
}

/// A server to be asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Listing {
    /// Where it is.
    pub address: Address,
    /// What the client proves itself by, if TLS is to be used.
    pub tls: Option<ClientTls>,
    /// The name that the server's certificate has to have, if one is known.
    pub tls_name: Option<String>,
}

/// A client's side of TLS.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientTls {
    /// Certificates in a folder.
    Certificates(PathBuf),
    /// A pre-shared key.
    Psk {
        /// The file that it is in.
        file: PathBuf,
        /// Whose it is.
        username: String,
    },
}

/// What the starter has passed down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Activation {
    /// Number of sockets.
    pub sockets: usize,
}

/// Checks a command line as a whole.
pub fn task(line: Line, activation: Activation) -> Result<Task, Complaint> {
    check_operands(&line)?;
    check_activation(&line, activation)?;
    let tls = credentials(&line)?;
    if line.list {
        return Ok(Task::List(Box::new(listing(&line, tls)?)));
    }
    let operand = line.operands.first().cloned().unwrap_or_default();
    if line.disconnect {
        return Ok(Task::Disconnect(operand.into()));
    }
    Ok(Task::Serve(Box::new(service(line, &operand, tls, activation)?)))
}

fn check_operands(line: &Line) -> Result<(), Complaint> {
    let fail = |text: &str| Err(Complaint::from(text.to_owned()));
    if !line.list {
        return if line.operands.len() == 1 {
            Ok(())
        } else {
            Err(Complaint { text: "Invalid number of arguments".to_owned(), see_help: true })
        };
    }
    if !line.operands.is_empty() {
        return fail("List mode is incompatible with a file name");
    }
    let of_export = line.export_name.is_some()
        || line.description.is_some()
        || line.offset != 0
        || line.connect.is_some()
        || line.disconnect
        || line.format.is_some()
        || line.load_snapshot.is_some()
        || !line.bitmaps.is_empty()
        || line.allocation_depth
        || line.aio.is_some()
        || line.discard.is_some()
        || line.cache.is_some();
    if of_export {
        return fail("List mode is incompatible with per-device settings");
    }
    if line.fork {
        return fail("List mode is incompatible with forking");
    }
    Ok(())
}

/// Under socket activation the starter has chosen where to listen.
fn check_activation(line: &Line, activation: Activation) -> Result<(), String> {
    if activation.sockets == 0 {
        return Ok(());
    }
    let given = [
        ("NBD device", line.connect.is_some()),
        ("Unix socket", line.socket.is_some()),
        ("The interface", line.bind.is_some()),
        ("TCP port number", line.port.is_some()),
        ("SELinux label", line.selinux_label.is_some()),
    ];
    if let Some((what, _)) = given.iter().find(|(_, given)| *given) {
        return Err(format!("{what} can't be set when using socket activation"));
    }
    if line.list {
        return Err("List mode is incompatible with socket activation".to_owned());
    }
    if activation.sockets > 1 {
        return Err("qemu-nbd does not support socket activation with LISTEN_FDS > 1".to_owned());
    }
    Ok(())
}

/// The object that `--tls-creds` means.
fn credentials(line: &Line) -> Result<Option<Object>, String> {
    let Some(id) = &line.tls_creds else {
        let given = [("--tls-authz", &line.tls_authz), ("--tls-hostname", &line.tls_hostname)];
        return match given.iter().find(|(_, given)| given.is_some()) {
            Some((flag, _)) => Err(format!("{flag} is not permitted without --tls-creds")),
            None => Ok(None),
        };
    };
    if line.connect.is_some() {
        return Err("TLS is not supported with a host device".to_owned());
    }
    if line.tls_authz.is_some() && line.list {
        return Err("TLS authorization is incompatible with export list".to_owned());
    }
    if line.tls_hostname.is_some() && !line.list {
        return Err("TLS hostname is only supported with export list".to_owned());
    }
    let fail = |why: String| Err(format!("Failed to get TLS creds: {why}"));
    let Some(object) = line.objects.iter().find(|object| object.id == *id) else {
        return fail(format!("No TLS credentials with id '{id}'"));
    };
    let wanted = if line.list { Endpoint::Client } else { Endpoint::Server };
    let endpoint = match &object.kind {
        Kind::X509 { endpoint, .. } | Kind::Psk { endpoint, .. } => *endpoint,
        Kind::Anonymous => {
            return fail(format!(
                "'{id}' is of type tls-creds-anon, which proves to nobody who the other side is and is not supported; \
                 use tls-creds-x509"
            ));
        }
        Kind::AuthzSimple { .. }
        | Kind::AuthzList { .. }
        | Kind::AuthzListFile { .. }
        | Kind::Secret
        | Kind::Ignored => return fail(format!("Object with id '{id}' is not TLS credentials")),
    };
    if endpoint != wanted {
        let side = if line.list { "client" } else { "server" };
        return fail(format!("Expected TLS credentials for a {side} endpoint"));
    }
    Ok(Some(object.clone()))
}

fn listing(line: &Line, tls: Option<Object>) -> Result<Listing, String> {
    let address = address(line)?;
    let host = if let Place::Tcp { host, .. } = &address.place { Some(host.clone()) } else { None };
    let tls = match tls.map(|object| object.kind) {
        None => None,
        Some(Kind::X509 { dir, verify_peer: true, .. }) => Some(ClientTls::Certificates(dir)),
        Some(Kind::X509 { .. }) => {
            return Err(
                "--list with verify-peer=off is not supported: anybody could be the server".to_owned()
            );
        }
        Some(Kind::Psk { dir, username, .. }) => {
            Some(ClientTls::Psk { file: dir.join("keys.psk"), username })
        }
        Some(_) => return Err("--list: these credentials are not supported".to_owned()),
    };
    Ok(Listing { address, tls, tls_name: line.tls_hostname.clone().or(host) })
}

fn service(
    line: Line,
    operand: &OsStr,
    tls: Option<Object>,
    activation: Activation,
) -> Result<Service, String> {
    let background = line.fork || (line.connect.is_some() && !line.verbose);
    let addresses = match (&line.connect, &line.socket) {
        (Some(device), None) => vec![Place::Unix(device_socket(device)).into()],
        _ => vec![address(&line)?],
    };
    let handshake_timeout = handshake_timeout(Duration::from_secs(line.handshake_limit.into()));
    let credentials = tls.as_ref().map(|object| &object.kind);
    let options = ServeOptions {
        addresses,
        listen_is_given: activation.sockets == 0,
        access: access(&line, credentials)?,
        socket_access: FileAccess::default(),
        control: None,
        oldstyle: false,
        peer_timeout: Duration::ZERO,
        tls: credentials.map(server_tls).transpose()?,
        // As with qemu-nbd, who names no address is heard everywhere.
        allow_plaintext: true,
        max_connections: clients_max(line.shared),
        handshake_timeout,
        times: Times::default(),
        exit_last: !line.persistent,
        pid_file: line.pid_file.clone(),
        ready_fd: None,
        end_times: END_TIMES,
        manners: Manners {
            quiet: true,
            keep_pid_file: true,
            hang_up_ends: true,
            full_waits: true,
            any_is_both: true,
            background: if background {
                Background::Yes { keeps_log: line.verbose || line.trace }
            } else {
                Background::No
            },
        },
        exports: vec![export(&line, operand)?],
    };
    Ok(Service {
        options,
        operand: operand.to_string_lossy().into_owned(),
        fork: background,
        device: line.connect,
        selinux_label: line.selinux_label,
    })
}

/// Where to listen, or whom to ask.
fn address(line: &Line) -> Result<Address, String> {
    if let Some(path) = &line.socket {
        return if path.is_absolute() {
            Ok(Place::Unix(path.clone()).into())
        } else {
            Err("socket path must be absolute".to_owned())
        };
    }
    let host = line.bind.clone().unwrap_or_else(|| DEFAULT_BIND.to_owned());
    let port = match &line.port {
        None => DEFAULT_PORT,
        Some(text) => {
            port(text).ok_or_else(|| format!("address resolution failed for {host}:{text}: not a port"))?
        }
    };
    Ok(Place::Tcp { host, port }.into())
}

/// A port's number. A blank in front comes from callers that write option and value as one argument.
fn port(text: &str) -> Option<u16> {
    text.trim_start().parse().ok()
}

fn device_socket(device: &Path) -> PathBuf {
    let name = device.file_name().unwrap_or_default();
    let mut path = OsString::from(DEVICE_SOCKET);
    path.push(name);
    path.into()
}

fn clients_max(shared: u32) -> u32 {
    if shared > 0 {
        return shared;
    }
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    u32::try_from((files / 2).clamp(UNLIMITED_MIN, UNLIMITED_MAX)).unwrap_or(u32::MAX)
}

fn server_tls(kind: &Kind) -> Result<TlsOptions, String> {
    // The process may leave its folder, and reads the files again.
    let absolute =
        |path: &Path| std::path::absolute(path).map_err(|error| format!("{}: {error}", path.display()));
    let source = match kind {
        Kind::X509 { dir, verify_peer, .. } => {
            let dir = absolute(dir)?;
            TlsSource::Certificates(TlsFiles {
                cert: dir.join("server-cert.pem"),
                key: dir.join("server-key.pem"),
                client_ca: verify_peer.then(|| dir.join("ca-cert.pem")),
                crl: verify_peer.then(|| dir.join("ca-crl.pem")),
                needs_crl: false,
            })
        }
        Kind::Psk { dir, .. } => TlsSource::Psk(absolute(dir)?.join("keys.psk")),
        Kind::Anonymous
        | Kind::AuthzSimple { .. }
        | Kind::AuthzList { .. }
        | Kind::AuthzListFile { .. }
        | Kind::Secret
        | Kind::Ignored => return Err("--tls-creds: this object has no credentials".to_owned()),
    };
    Ok(TlsOptions { source, mode: TlsMode::Required })
}

/// Whom `--tls-authz` lets in: those whose certificate has the name, or whose key.
fn access(line: &Line, credentials: Option<&Kind>) -> Result<AccessRules, String> {
    let Some(id) = &line.tls_authz else { return Ok(AccessRules::default()) };
    let object = line.objects.iter().find(|object| object.id == *id);
    let object = object.ok_or_else(|| format!("--tls-authz: no object with id '{id}'"))?;
    let names = match &object.kind {
        Kind::AuthzSimple { identity } => vec![identity.clone()],
        Kind::AuthzList { names } => names.clone(),
        Kind::AuthzListFile { filename, is_said } => {
            if !is_said {
                tracing::warn!(path = ?filename, "this file of names is read once; refresh=off says that this is known");
            }
            objects::names_in_file(filename)?
        }
        Kind::X509 { .. } | Kind::Psk { .. } | Kind::Anonymous | Kind::Secret | Kind::Ignored => {
            return Err(format!("--tls-authz: object '{id}' authorizes nobody"));
        }
    };
    let by_key = matches!(credentials, Some(Kind::Psk { .. }));
    let who = |name: String| if by_key { Who::Psk(name) } else { Who::Subject(name) };
    let mut general: Vec<Rule> =
        names.into_iter().map(|name| Rule { right: Right::Write, who: who(name) }).collect();
    if general.is_empty() {
        // No rule at all would let everybody in.
        general.push(Rule { right: Right::Write, who: Who::Subject(String::new()) });
    }
    Ok(AccessRules { general, ..AccessRules::default() })
}

fn export(line: &Line, operand: &OsStr) -> Result<ExportSpec, String> {
    let shown = operand.to_string_lossy();
    let failed = |why: String| format!("Failed to blk_new_open '{shown}': {why}");
    if line.image_opts && line.format.is_some() {
        return Err("--image-opts and -f are mutually exclusive".to_owned());
    }
    let image = if line.image_opts {
        tree::from_list(&shown).and_then(node::from_options)
    } else {
        node::from_filename(&shown, operand.into(), line.format.as_deref())
    }
    .map_err(failed)?;
    let read_only = line.read_only || line.load_snapshot.is_some();
    if image.read_only == Some(true) && !read_only && !image.auto_read_only {
        return Err(failed("Block node is read-only".to_owned()));
    }
    let read_only = read_only || image.read_only == Some(true);
    if image.force_share && !read_only {
        return Err(failed("force-share=on can only be used with read-only images".to_owned()));
    }
    let cache = cache(line, &image);
    let aio = image.aio.or(line.aio);
    if aio == Some(Aio::Native) && !cache.is_direct() {
        return Err(failed(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.".to_owned(),
        ));
    }
    let window = window(line, &image)?;
    Ok(ExportSpec {
        name: line.export_name.clone().unwrap_or_default(),
        description: line.description.clone().unwrap_or_default(),
        path: image.path.clone(),
        read_only,
        tls_required: false,
        offset: window.offset,
        size: window.size,
        exact_window: true,
        single_client: line.shared == 1,
        hide_depth: !line.allocation_depth,
        block_sizes: BlockSizes::Qemu,
        cache,
        bitmaps: line.bitmaps.clone(),
        aio: match aio {
            // Linux's older interface has io_uring in its place.
            None | Some(Aio::Native) => storage::Aio::Auto,
            Some(Aio::IoUring) => storage::Aio::IoUring,
            Some(Aio::Threads) => storage::Aio::Threads,
        },
        detect_zeroes: detect_zeroes(line, &image),
        // Nothing is written to what is read-only, so nothing has to be kept.
        temporary: (line.temporary && !read_only)
            .then(|| Temporary { folder: options::temporary_dir(None), sharing: Sharing::Shared }),
        open: open_options(line, &image),
    })
}

fn open_options(line: &Line, image: &Image) -> OpenOptions {
    let (backing, backing_format) = match &image.backing {
        None => (Backing::Follow, None),
        Some(BackingNode::None) => (Backing::None, None),
        Some(BackingNode::Image { path, format }) => (Backing::Path(path.clone()), *format),
    };
    let defaults = OpenOptions::default();
    OpenOptions {
        format: image.format,
        part: (image.file_window != Window::default())
            .then_some((image.file_window.offset, image.file_window.size)),
        backing,
        backing_format,
        data_file: image.data_file.clone(),
        names: Names::Trusted,
        snapshot: line.load_snapshot.clone(),
        discard: image.discard.or(line.discard).unwrap_or(false),
        zeroes_as_qemu: true,
        // What a temporary overlay takes is never stored.
        compress: (image.compress && !line.temporary).then(Compress::default),
        force_share: image.force_share,
        table_cache_len: image.table_cache_len.unwrap_or(0).max(defaults.table_cache_len),
        ..defaults
    }
}

fn cache(line: &Line, image: &Image) -> CacheMode {
    let mode = line.cache.unwrap_or_default();
    match (mode.is_write_through(), image.direct.unwrap_or(mode.is_direct())) {
        (false, false) => CacheMode::Writeback,
        (false, true) => CacheMode::None,
        (true, false) => CacheMode::Writethrough,
        (true, true) => CacheMode::Directsync,
    }
}

/// A node's own setting goes first; without discards, holes come to zeroes that keep their room.
fn detect_zeroes(line: &Line, image: &Image) -> DetectZeroes {
    image.detect_zeroes.unwrap_or(line.detect_zeroes)
}

/// The part of the disk: what the nodes cut out, and `-o` inside of it.
fn window(line: &Line, image: &Image) -> Result<Window, String> {
    let offset = image.window.offset.checked_add(line.offset);
    let offset = offset.ok_or_else(|| format!("Invalid offset '{}'", line.offset))?;
    let size = match image.window.size {
        None => None,
        Some(size) => Some(size.checked_sub(line.offset).ok_or_else(|| {
            format!("Offset ({}) cannot be greater than size of the containing file ({size})", line.offset)
        })?),
    };
    Ok(Window { offset, size })
}
