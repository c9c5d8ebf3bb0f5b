//! The arguments as they are written. Nothing is checked here that needs more than one of them.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use nbd_img_formats::Format;
use nbd_img_formats::qcow2::Compress;
use nbd_img_formats::storage::Aio;

use super::bitmap::BitmapCommand;
use super::check::CheckArgs;
use super::create::CreateArgs;
use super::resize::ResizeArgs;
use super::tls::{TlsArgs, TlsCommand};
use super::{compress, size, values};
use crate::export::{CacheMode, DetectZeroes, Sharing};
use crate::server::access::Rule;
use crate::transport::Address;
use crate::transport::owner::Owner;

/// Serves disk images (raw, qcow2) over NBD.
#[derive(Debug, Parser)]
#[command(name = "nbd-img", version, help_expected = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Log more; twice for everything. NBD_IMG_LOG sets it by module.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an image, or several, to NBD clients until told to end
    Serve(Box<ServeArgs>),
    /// Show what an image is: format, sizes, features, backing chain, snapshots, bitmaps
    Info(InfoArgs),
    /// Change or list the persistent dirty bitmaps of a qcow2 image that nobody serves or uses
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    /// Look for damage in a qcow2 image, and repair it if told to
    Check(CheckArgs),
    /// Make a new image file
    Create(CreateArgs),
    /// Change the size of a disk that nobody uses
    Resize(ResizeArgs),
    /// Make certificates for TLS
    #[command(subcommand)]
    Tls(TlsCommand),
    /// Take qemu-nbd's command line, as when the program is started by that name
    #[command(name = "qemu-nbd", disable_help_flag = true)]
    QemuNbd {
        /// What qemu-nbd takes; `nbd-img qemu-nbd --help` shows it
        #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// `nbd-img serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// The flags that describe the one IMAGE.
    #[command(flatten)]
    pub image: ImageArgs,

    /// One of several images: name=N,file=PATH and further keys, separated by commas (repeatable)
    ///
    /// The keys are the long names of the flags for one image: read-only, temporary[=SHARING], temporary-dir=P, format=F, description=D,
    /// offset=S, size=S, exact-size, cache=M, cluster-cache=S, aio=M, discard=M, detect-zeroes=M, compress=T, load-snapshot=S, bitmap=N and
    /// allow-dir=P (both several times if need be), backing=P, force-share; tls-required: only to be had and seen
    /// under TLS; and access=RULE (several times if need be): who may use it. A comma inside of a value
    /// is written twice.
    #[arg(long = "export", value_name = "SPEC", help_heading = "Several images")]
    pub exports: Vec<OsString>,

    /// Where to listen.
    #[command(flatten)]
    pub listen: ListenArgs,

    /// Let these clients in, and no others: read:WHO, or write:WHO which includes reading (repeatable)
    ///
    /// Once there is a rule, a client that none fits sees no export. WHO is anyone; uid=N or gid=N of a process at a
    /// Unix socket; cidr=NETWORK of a TCP connection; cid=N of a virtual machine; psk=IDENTITY; or, of the client's
    /// certificate, tls-subject=DN, tls-dns=NAME, tls-ip=ADDRESS, tls-uri=URI or tls-email=ADDRESS. A DN is written as
    /// QEMU's tls-authz and certtool write it: CN=backup,O=Example. An `--export` with rules of its own
    /// (access=RULE) keeps to those alone.
    #[arg(long, value_name = "RULE", help_heading = "Clients")]
    pub access: Vec<Rule>,

    /// Who has to encrypt.
    #[command(flatten)]
    pub tls: TlsArgs,

    /// How to start and end.
    #[command(flatten)]
    pub life: LifeArgs,
}

/// Flags that describe one image and its export.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Image")]
pub struct ImageArgs {
    /// The image's format; else found by its magic number
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<FormatArg>,

    /// Refuse writes, and open all files read-only
    #[arg(short, long)]
    pub read_only: bool,

    /// The name that clients ask for [default: empty]
    #[arg(short = 'x', long, value_name = "NAME")]
    pub export_name: Option<String>,

    /// A text about the export, shown to clients that list it
    #[arg(short = 'D', long, value_name = "TEXT")]
    pub description: Option<String>,

    /// Where in the disk the export begins (suffixes K M G T; rounded down to 512)
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub offset: Option<u64>,

    /// Size of the export [default: up to the end of the disk] (suffixes K M G T; rounded down to 512)
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub size: Option<u64>,

    /// Serve a raw file to the byte instead of rounding its size up to 512
    #[arg(long)]
    pub exact_size: bool,

    /// When writes are durable: with a flush, or each at once; none and directsync bypass the page cache
    /// [default: writeback]
    #[arg(long, value_name = "MODE")]
    pub cache: Option<CacheArg>,

    /// Memory for decompressed clusters of a compressed image, over its backing chain [default: 64M] (suffixes K M G
    /// T); with less than a few clusters small reads are slow
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub cluster_cache: Option<u64>,

    /// Who does what waits for the disk: io_uring where the kernel allows it and else threads (auto), or
    /// just one of them [default: auto]
    #[arg(long, value_name = "ENGINE")]
    pub aio: Option<AioArg>,

    /// What a client's trim does: give the room back, or nothing [default: unmap]
    #[arg(long, value_name = "MODE")]
    pub discard: Option<DiscardArg>,

    /// Whether written zeroes become zeroes without data (on) or holes (unmap) [default: off]
    #[arg(long, value_name = "MODE")]
    pub detect_zeroes: Option<DetectZeroesArg>,

    /// Write whole clusters of a qcow2 image compressed: zlib or zstd, which has to be what the image has, or auto;
    /// zlib:1 to zlib:9 and zstd:1 to zstd:22 choose a level [default: not compressed]
    #[arg(long, value_name = "TYPE[:LEVEL]", value_parser = compress::parse)]
    pub compress: Option<Compress>,

    /// Keep all writes in a temporary file that is thrown away in the end; the image is only read. With per-client
    /// each connection has a file of its own, which is gone when it ends [default with the flag: shared]
    #[arg(long, value_name = "SHARING", conflicts_with = "read_only", require_equals = true, num_args = 0..=1,
          default_missing_value = "shared")]
    pub temporary: Option<TemporaryArg>,

    /// Where the temporary file lies [default: $TMPDIR, or /var/tmp]
    #[arg(long, value_name = "FOLDER", requires = "temporary")]
    pub temporary_dir: Option<PathBuf>,

    /// Serve this internal snapshot, read-only
    #[arg(long, value_name = "NAME|ID")]
    pub load_snapshot: Option<String>,

    /// Tell clients what this dirty bitmap says, as metadata context qemu:dirty-bitmap:NAME (repeatable)
    #[arg(long, value_name = "NAME")]
    pub bitmap: Vec<String>,

    /// Use this backing file, or none, whatever the image says
    #[arg(long, value_name = "PATH|none")]
    pub backing: Option<PathBuf>,

    /// Also take backing and data files from below this folder (repeatable) [default: the image's own]
    #[arg(long, value_name = "FOLDER")]
    pub allow_dir: Vec<PathBuf>,

    /// Read an image that another program writes; what is read may be inconsistent
    #[arg(long)]
    pub force_share: bool,

    /// Rules of this export; a key of `--export`, since `--access` has those of an only image.
    #[arg(skip)]
    pub access: Vec<Rule>,

    /// Only to be had under TLS; a key of `--export`, since `--tls` says it for an only image.
    #[arg(skip)]
    pub tls_required: bool,
}

/// Flags about sockets and clients.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Clients")]
pub struct ListenArgs {
    /// Listen on a Unix socket at this path
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Listen here: HOST:PORT, unix:PATH, unix:@NAME, vsock:PORT, fd:N or stdio (repeatable)
    /// [default: 127.0.0.1:10809]
    ///
    /// HOST:PORT or tcp:HOST:PORT: a host name or an address, IPv6 in brackets; port 0 is any free one.
    /// unix:PATH: a Unix socket; unix:@NAME: one in the abstract namespace, which has no file and no permissions.
    /// vsock:PORT, vsock:CID:PORT: for virtual machines and their host.
    /// fd:N: a socket that the starter has opened as descriptor N; it may listen, or be connected already.
    /// stdio: one client at stdin and stdout, a socket or two pipes, as ssh, inetd and libnbd bring it; without
    /// another place to listen the server ends with it.
    /// In front of each, nbds: stands for TLS from the first byte.
    #[arg(long, value_name = "ADDRESS", verbatim_doc_comment)]
    pub listen: Vec<Address>,

    /// Mode of the files of Unix sockets, in octal [default: 777 without the umask]
    #[arg(long, value_name = "MODE", value_parser = values::mode)]
    pub socket_mode: Option<u32>,

    /// Owner of the files of Unix sockets: USER, USER:GROUP or :GROUP
    #[arg(long, value_name = "OWNER")]
    pub socket_owner: Option<Owner>,

    /// Take commands at a Unix socket at this path, from this user only (nbd-img resize --control PATH)
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Speak the oldstyle negotiation, for clients that know nothing else: one export, without a name, without TLS
    ///
    /// Each client is told the size and gets the export at once, so it counts for --max-connections
    /// from its first moment.
    #[arg(long)]
    pub oldstyle: bool,

    /// Allow listening where other machines can connect, without encryption
    #[arg(long)]
    pub allow_plaintext: bool,

    /// Most clients at a time
    #[arg(long, value_name = "COUNT", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,

    /// Seconds that a client has for choosing an export, TLS included; 0: any time
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::seconds)]
    pub handshake_timeout: Duration,

    /// Seconds that a TCP client may leave replies or the kernel's questions unanswered; 0: as the kernel has it
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = values::seconds)]
    pub peer_timeout: Duration,

    /// Microseconds to wait for the next request without sleeping, where that pays: auto, off, or at
    /// most so many
    #[arg(long, value_name = "auto|off|US", default_value = "auto", value_parser = values::poll)]
    pub poll: Duration,
}

/// Flags about the start and the end of the server.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Start and end")]
pub struct LifeArgs {
    /// End after the last client has gone
    #[arg(long)]
    pub exit_last: bool,

    /// Write the process id to this file once the server listens
    #[arg(long, value_name = "PATH")]
    pub pid_file: Option<PathBuf>,

    /// Write the URIs to this descriptor once the server listens, and close it
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub ready_fd: Option<i32>,

    /// Seconds that requests in flight get to finish when the server is told to end
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = values::seconds)]
    pub drain_timeout: Duration,

    /// Seconds that each image that may be written gets to be flushed and closed then; what is not written by that time is lost, and the
    /// exit status 3. Without it the server waits (a second signal ends it at once)
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds)]
    pub flush_timeout: Option<Duration>,
}

/// `nbd-img info`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,

    /// The image's format; else found by its magic number
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<FormatArg>,

    /// Answer in JSON
    #[arg(long)]
    pub json: bool,

    /// Use this backing file, or none, whatever the image says
    #[arg(long, value_name = "PATH|none")]
    pub backing: Option<PathBuf>,

    /// Also take backing and data files from below this folder (repeatable) [default: the image's own]
    #[arg(long, value_name = "FOLDER")]
    pub allow_dir: Vec<PathBuf>,

    /// Read an image that another program writes; what is shown may be inconsistent
    #[arg(long)]
    pub force_share: bool,
}

/// `--format`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum FormatArg {
    /// The file is the disk
    Raw,
    /// QEMU's copy-on-write format
    Qcow2,
    /// As raw, read through a memory mapping
    MmapRaw,
}

impl From<FormatArg> for Format {
    fn from(arg: FormatArg) -> Format {
        match arg {
            FormatArg::Raw => Format::Raw,
            FormatArg::Qcow2 => Format::Qcow2,
            FormatArg::MmapRaw => Format::MmapRaw,
        }
    }
}

/// `--cache`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum CacheArg {
    /// Durable with a client's flush
    Writeback,
    /// Each write is durable before its reply
    Writethrough,
    /// As writeback, bypassing the page cache
    None,
    /// As writethrough, bypassing the page cache
    Directsync,
}

impl From<CacheArg> for CacheMode {
    fn from(arg: CacheArg) -> CacheMode {
        match arg {
            CacheArg::Writeback => CacheMode::Writeback,
            CacheArg::Writethrough => CacheMode::Writethrough,
            CacheArg::None => CacheMode::None,
            CacheArg::Directsync => CacheMode::Directsync,
        }
    }
}

/// `--aio`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AioArg {
    /// io_uring, or threads where it is forbidden
    Auto,
    /// io_uring, or no start
    #[value(name = "io_uring")]
    IoUring,
    /// Threads
    Threads,
}

impl From<AioArg> for Aio {
    fn from(arg: AioArg) -> Aio {
        match arg {
            AioArg::Auto => Aio::Auto,
            AioArg::IoUring => Aio::IoUring,
            AioArg::Threads => Aio::Threads,
        }
    }
}

/// `--temporary`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum TemporaryArg {
    /// All clients see all writes, until the server ends
    Shared,
    /// Each connection sees its own writes only, and they end with it
    PerClient,
}

impl From<TemporaryArg> for Sharing {
    fn from(arg: TemporaryArg) -> Sharing {
        match arg {
            TemporaryArg::Shared => Sharing::Shared,
            TemporaryArg::PerClient => Sharing::PerClient,
        }
    }
}

/// `--discard`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum DiscardArg {
    /// Give the room back
    Unmap,
    /// Do nothing
    Ignore,
}

/// `--detect-zeroes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum DetectZeroesArg {
    /// Written like any data
    Off,
    /// Zeroes that keep their room
    On,
    /// Holes
    Unmap,
}

impl From<DetectZeroesArg> for DetectZeroes {
    fn from(arg: DetectZeroesArg) -> DetectZeroes {
        match arg {
            DetectZeroesArg::Off => DetectZeroes::Off,
            DetectZeroesArg::On => DetectZeroes::On,
            DetectZeroesArg::Unmap => DetectZeroes::Unmap,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound_and_every_flag_has_help() {
        Args::command().debug_assert();
    }
}
