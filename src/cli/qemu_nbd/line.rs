//! The options of qemu-nbd and what each of them is by itself: from arguments to a [`Line`], or to the first error
//! that QEMU would find too.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::getopt::{self, OptionSpec, Takes};
use super::node::{self, Aio};
use super::objects::{self, Object};
use super::values;
use crate::export::{CacheMode, DetectZeroes};

/// A command line, every option looked at by itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// `-b`.
    pub bind: Option<String>,
    /// `-p`.
    pub port: Option<String>,
    /// `-k`.
    pub socket: Option<PathBuf>,
    /// `-o`.
    pub offset: u64,
    /// `-r`.
    pub read_only: bool,
    /// `-s`.
    pub temporary: bool,
    /// `-l`: an internal snapshot's name or id.
    pub load_snapshot: Option<String>,
    /// `-n` and `--cache`.
    pub cache: Option<CacheMode>,
    /// `--aio`.
    pub aio: Option<Aio>,
    /// `--discard`: whether it is passed on.
    pub discard: Option<bool>,
    /// `--detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `-c`.
    pub connect: Option<PathBuf>,
    /// `-d`.
    pub disconnect: bool,
    /// `-L`.
    pub list: bool,
    /// `-e`; 0 is as many as there are.
    pub shared: u32,
    /// `-f`.
    pub format: Option<String>,
    /// `-t`.
    pub persistent: bool,
    /// `-v`.
    pub verbose: bool,
    /// Whether there was a `-T`.
    pub trace: bool,
    /// `--object`.
    pub objects: Vec<Object>,
    /// `-x`.
    pub export_name: Option<String>,
    /// `-D`.
    pub description: Option<String>,
    /// `--tls-creds`.
    pub tls_creds: Option<String>,
    /// `--tls-authz`.
    pub tls_authz: Option<String>,
    /// `--tls-hostname`.
    pub tls_hostname: Option<String>,
    /// `--fork`.
    pub fork: bool,
    /// `--pid-file`.
    pub pid_file: Option<PathBuf>,
    /// `--selinux-label`.
    pub selinux_label: Option<OsString>,
    /// `-A`.
    pub allocation_depth: bool,
    /// `-B`.
    pub bitmaps: Vec<String>,
    /// `--image-opts`.
    pub image_opts: bool,
    /// `--handshake-limit` in seconds; 0 is none.
    pub handshake_limit: u32,
    /// What is no option.
    pub operands: Vec<OsString>,
}

/// What a command line comes to by itself.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// To be done.
    Line(Box<Line>),
    /// `--help`.
    Help,
    /// `--version`.
    Version,
    /// A list that was asked for in place of a value.
    Answer(String),
}

/// The options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Id {
    /// `-h`.
    Help,
    /// `-V`.
    Version,
    /// `-b`.
    Bind,
    /// `-p`.
    Port,
    /// `-k`.
    Socket,
    /// `-o`.
    Offset,
    /// `-r`.
    ReadOnly,
    /// `-s`.
    Snapshot,
    /// `-l`.
    LoadSnapshot,
    /// `-n`.
    NoCache,
    /// `--cache`.
    Cache,
    /// `--aio`.
    Aio,
    /// `--discard`.
    Discard,
    /// `--detect-zeroes`.
    DetectZeroes,
    /// `-c`.
    Connect,
    /// `-d`.
    Disconnect,
    /// `-L`.
    List,
    /// `-e`.
    Shared,
    /// `-f`.
    Format,
    /// `-t`.
    Persistent,
    /// `-v`.
    Verbose,
    /// `--object`.
    Object,
    /// `-x`.
    ExportName,
    /// `-D`.
    Description,
    /// `--tls-creds`.
    TlsCreds,
    /// `--tls-authz`.
    TlsAuthz,
    /// `--tls-hostname`.
    TlsHostname,
    /// `-T`.
    Trace,
    /// `--fork`.
    Fork,
    /// `--pid-file`.
    PidFile,
    /// `--selinux-label`.
    SelinuxLabel,
    /// `-A`.
    AllocationDepth,
    /// `-B`.
    Bitmap,
    /// `--image-opts`.
    ImageOpts,
    /// `--handshake-limit`.
    HandshakeLimit,
}

/// Every option with its letter, if it has one, and its name.
pub const OPTIONS: [OptionSpec<Id>; 35] = {
    use Takes::{Nothing, Value};
    const fn both(id: Id, short: u8, long: &'static str, takes: Takes) -> OptionSpec<Id> {
        OptionSpec { id, short: Some(short), long, takes }
    }
    const fn long(id: Id, long: &'static str, takes: Takes) -> OptionSpec<Id> {
        OptionSpec { id, short: None, long, takes }
    }
    [
        both(Id::Help, b'h', "help", Nothing),
        both(Id::Version, b'V', "version", Nothing),
        both(Id::Bind, b'b', "bind", Value),
        both(Id::Port, b'p', "port", Value),
        both(Id::Socket, b'k', "socket", Value),
        both(Id::Offset, b'o', "offset", Value),
        both(Id::ReadOnly, b'r', "read-only", Nothing),
        both(Id::AllocationDepth, b'A', "allocation-depth", Nothing),
        both(Id::Bitmap, b'B', "bitmap", Value),
        both(Id::Connect, b'c', "connect", Value),
        both(Id::Disconnect, b'd', "disconnect", Nothing),
        both(Id::List, b'L', "list", Nothing),
        both(Id::Snapshot, b's', "snapshot", Nothing),
        both(Id::LoadSnapshot, b'l', "load-snapshot", Value),
        both(Id::NoCache, b'n', "nocache", Nothing),
        long(Id::Cache, "cache", Value),
        long(Id::Aio, "aio", Value),
        long(Id::Discard, "discard", Value),
        long(Id::DetectZeroes, "detect-zeroes", Value),
        both(Id::Shared, b'e', "shared", Value),
        both(Id::Format, b'f', "format", Value),
        both(Id::Persistent, b't', "persistent", Nothing),
        both(Id::Verbose, b'v', "verbose", Nothing),
        long(Id::Object, "object", Value),
        both(Id::ExportName, b'x', "export-name", Value),
        both(Id::Description, b'D', "description", Value),
        long(Id::TlsCreds, "tls-creds", Value),
        long(Id::TlsHostname, "tls-hostname", Value),
        long(Id::TlsAuthz, "tls-authz", Value),
        long(Id::ImageOpts, "image-opts", Nothing),
        both(Id::Trace, b'T', "trace", Value),
        long(Id::Fork, "fork", Nothing),
        long(Id::PidFile, "pid-file", Value),
        long(Id::SelinuxLabel, "selinux-label", Value),
        long(Id::HandshakeLimit, "handshake-limit", Value),
    ]
};

/// Longest string of the protocol in bytes (NBD protocol, "Values").
const STRING_MAX_LEN: usize = 4096;

/// Seconds that a client has for its handshake when nothing is said (qemu-nbd's default).
const HANDSHAKE_LIMIT: u32 = 10;

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Complaint {
    /// In words that callers may know.
    pub text: String,
    /// Whether `--help` would have helped.
    pub see_help: bool,
}

impl From<String> for Complaint {
    fn from(text: String) -> Complaint {
        Complaint { text, see_help: false }
    }
}

/// Parses the arguments behind the program's name.
pub fn parse(args: &[OsString]) -> Result<Parsed, Complaint> {
    // POSIX has options end at the first operand; QEMU inherits that from the C library.
    let permute = std::env::var_os("POSIXLY_CORRECT").is_none();
    let (options, broken, operands) = match getopt::parse(&OPTIONS, args, permute) {
        Ok(parts) => (parts.options, None, parts.operands),
        Err(broken) => (broken.before, Some(broken.text), Vec::new()),
    };
    let mut line = Line { operands, ..Line::default() };
    for (id, value) in options {
        if let Some(parsed) = line.take(id, &value)? {
            return Ok(parsed);
        }
    }
    match broken {
        Some(text) => Err(Complaint { text, see_help: true }),
        None => Ok(Parsed::Line(Box::new(line))),
    }
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bind: None,
            port: None,
            socket: None,
            offset: 0,
            read_only: false,
            temporary: false,
            load_snapshot: None,
            cache: None,
            aio: None,
            discard: None,
            detect_zeroes: DetectZeroes::Off,
            connect: None,
            disconnect: false,
            list: false,
            shared: 1,
            format: None,
            persistent: false,
            verbose: false,
            trace: false,
            objects: Vec::new(),
            export_name: None,
            description: None,
            tls_creds: None,
            tls_authz: None,
            tls_hostname: None,
            fork: false,
            pid_file: None,
            selinux_label: None,
            allocation_depth: false,
            bitmaps: Vec::new(),
            image_opts: false,
            handshake_limit: HANDSHAKE_LIMIT,
            operands: Vec::new(),
        }
    }
}

impl Line {
    /// Takes one option; gives what ends the parsing, if it does.
    fn take(&mut self, id: Id, value: &OsStr) -> Result<Option<Parsed>, String> {
        match id {
            Id::Help => return Ok(Some(Parsed::Help)),
            Id::Version => return Ok(Some(Parsed::Version)),
            Id::Bind => self.bind = Some(utf8(value)?),
            Id::Port => self.port = Some(utf8(value)?),
            Id::Socket => self.socket = Some(value.into()),
            Id::Offset => self.offset = number(value, "offset")?,
            Id::ReadOnly => self.read_only = true,
            Id::Snapshot => self.temporary = true,
            Id::LoadSnapshot => self.load_snapshot = Some(snapshot(&utf8(value)?)?),
            Id::NoCache => self.set_cache("none")?,
            Id::Cache => self.set_cache(&utf8(value)?)?,
            Id::Aio => self.set_aio(&utf8(value)?)?,
            Id::Discard => self.set_discard(&utf8(value)?)?,
            Id::DetectZeroes => self.set_detect_zeroes(&utf8(value)?)?,
            Id::Connect => self.connect = Some(value.into()),
            Id::Disconnect => self.disconnect = true,
            Id::List => self.list = true,
            Id::Shared => self.shared = number(value, "shared device number")?,
            Id::Format => self.format = Some(utf8(value)?),
            Id::Persistent => self.persistent = true,
            Id::Verbose => self.verbose = true,
            Id::Object => return self.add_object(&utf8(value)?),
            Id::ExportName => self.export_name = Some(protocol_text(value, "name")?),
            Id::Description => self.description = Some(protocol_text(value, "description")?),
            Id::TlsCreds => self.tls_creds = Some(utf8(value)?),
            Id::TlsAuthz => self.tls_authz = Some(utf8(value)?),
            Id::TlsHostname => self.tls_hostname = Some(utf8(value)?),
            // There is nothing here that QEMU's patterns could name: all of the log, or nothing.
            Id::Trace if value == "help" => return Ok(Some(Parsed::Answer(String::new()))),
            Id::Trace => self.trace = true,
            Id::Fork => self.fork = true,
            Id::PidFile => self.pid_file = Some(value.into()),
            Id::SelinuxLabel => self.selinux_label = Some(value.into()),
            Id::AllocationDepth => self.allocation_depth = true,
            Id::Bitmap => self.bitmaps.push(utf8(value)?),
            Id::ImageOpts => self.image_opts = true,
            Id::HandshakeLimit => self.handshake_limit = number(value, "handshake limit")?,
        }
        Ok(None)
    }

    fn set_cache(&mut self, mode: &str) -> Result<(), String> {
        if self.cache.is_some() {
            return Err("-n and --cache can only be specified once".to_owned());
        }
        self.cache = Some(match mode {
            "none" | "off" => CacheMode::None,
            "directsync" => CacheMode::Directsync,
            "writeback" => CacheMode::Writeback,
            "writethrough" => CacheMode::Writethrough,
            // What a client flushes is made durable all the same: nobody can tell but by the time it takes.
            "unsafe" => CacheMode::Writeback,
            _ => return Err(format!("Invalid cache mode `{mode}'")),
        });
        Ok(())
    }

    fn set_aio(&mut self, mode: &str) -> Result<(), String> {
        if self.aio.is_some() {
            return Err("--aio can only be specified once".to_owned());
        }
        self.aio = Some(node::parse_aio(mode).ok_or_else(|| format!("Invalid aio mode '{mode}'"))?);
        Ok(())
    }

    fn set_discard(&mut self, mode: &str) -> Result<(), String> {
        if self.discard.is_some() {
            return Err("--discard can only be specified once".to_owned());
        }
        self.discard =
            Some(node::parse_discard(mode).ok_or_else(|| format!("Invalid discard mode `{mode}'"))?);
        Ok(())
    }

    /// As with QEMU, what allows `unmap` has to come before it.
    fn set_detect_zeroes(&mut self, mode: &str) -> Result<(), String> {
        self.detect_zeroes = node::parse_detect_zeroes(mode)
            .ok_or_else(|| format!("Failed to parse detect_zeroes mode: invalid parameter value: {mode}"))?;
        if self.detect_zeroes == DetectZeroes::Unmap && self.discard != Some(true) {
            return Err(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                    .to_owned(),
            );
        }
        Ok(())
    }

    fn add_object(&mut self, text: &str) -> Result<Option<Parsed>, String> {
        if text == "help" {
            return Ok(Some(Parsed::Answer(objects::help())));
        }
        let object = objects::parse(text)?;
        if self.objects.iter().any(|other| other.id == object.id) {
            return Err(format!(
                "attempt to add duplicate property '{}' to object (type 'container')",
                object.id
            ));
        }
        self.objects.push(object);
        Ok(None)
    }
}

fn utf8(value: &OsStr) -> Result<String, String> {
    value
        .to_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("{} is not UTF-8", value.to_string_lossy().escape_debug()))
}

fn number<T: TryFrom<i128> + Bounded>(value: &OsStr, what: &str) -> Result<T, String> {
    let text = utf8(value)?;
    let number = values::integer(&text).filter(|number| *number <= T::LARGEST);
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| format!("Invalid {what} '{text}'"))
}

/// The largest value that QEMU takes into the type of an option.
trait Bounded {
    const LARGEST: i128;
}

impl Bounded for u64 {
    const LARGEST: i128 = u64::MAX as i128;
}

/// A C int that must not be negative.
impl Bounded for u32 {
    const LARGEST: i128 = i32::MAX as i128;
}

/// `NAME`, `ID`, or `snapshot.id=ID,snapshot.name=NAME`.
fn snapshot(text: &str) -> Result<String, String> {
    if !text.starts_with("snapshot.") {
        return Ok(text.to_owned());
    }
    let (mut id, mut name) = (None, None);
    for (key, value) in values::key_values(text, None) {
        match key.as_str() {
            "snapshot.id" => id = Some(value),
            "snapshot.name" => name = Some(value),
            _ => return Err(format!("Invalid parameter '{key}': failed in parsing snapshot param `{text}'")),
        }
    }
    match (id, name) {
        (Some(_), Some(_)) => {
            Err("-l with both snapshot.id and snapshot.name is not supported; one is enough".to_owned())
        }
        (Some(only), None) | (None, Some(only)) => Ok(only),
        (None, None) => Err(format!("Failed in parsing snapshot param `{text}'")),
    }
}

fn protocol_text(value: &OsStr, what: &str) -> Result<String, String> {
    let text = utf8(value)?;
    if text.len() > STRING_MAX_LEN {
        return Err(format!("export {what} '{text}' too long"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
