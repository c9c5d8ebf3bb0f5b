//! The header of a request: reading it, and whether this session may be asked that.
//!
//! Nothing here touches the disk. What only the disk can tell (no space, not supported) comes later, from
//! [`super::errno`].

use bitflags::bitflags;
use zerocopy::FromBytes;

use super::errno::NbdError;
use super::export_info::TransmissionFlags;
use super::negotiate::Agreed;
use super::wire;

/// Length of a request header.
pub const REQUEST_HEADER_LEN: usize = size_of::<wire::RequestHeader>();

/// Longest payload of a refused WRITE that is read and thrown away to stay in step; a client that announces more
/// is cut off. Our choice: twice the usual payload limit, so that a client that missed the limit by little keeps
/// its connection, and nobody makes us read gigabytes for nothing.
pub const DRAIN_MAX_LEN: u32 = 64 * 1024 * 1024;

bitflags! {
    /// Flags of a request (`NBD_CMD_FLAG_*`). Unknown bits are kept, [`check`] refuses them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Durable before the reply.
        const FUA = 1 << 0;
        /// WRITE_ZEROES: leave the area provisioned.
        const NO_HOLE = 1 << 1;
        /// READ: the content in one chunk.
        const DF = 1 << 2;
        /// BLOCK_STATUS: one extent, not longer than the request.
        const REQ_ONE = 1 << 3;
        /// WRITE_ZEROES: fail rather than be as slow as a write.
        const FAST_ZERO = 1 << 4;
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read data.
    Read,
    /// Write the payload.
    Write,
    /// End the session; no reply.
    Disconnect,
    /// Make completed writes durable.
    Flush,
    /// The content is no longer needed.
    Trim,
    /// Read ahead.
    Cache,
    /// Write zeroes.
    WriteZeroes,
    /// Extents of the agreed contexts.
    BlockStatus,
    /// A command that this server does not know; it has no payload.
    Unknown(u16),
}

/// A request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its flags, unknown ones too.
    pub flags: CommandFlags,
    /// What is asked for.
    pub command: Command,
    /// The client's mark, for the reply.
    pub cookie: u64,
    /// Where, in the export; not checked yet.
    pub offset: u64,
    /// How many bytes; not checked yet.
    pub len: u32,
}

impl Request {
    /// Bytes that follow the header on the wire, whether or not the request is refused.
    pub fn payload_len(&self) -> u32 {
        if self.command == Command::Write { self.len } else { 0 }
    }
}

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Less than [`REQUEST_HEADER_LEN`] bytes, and none of them wrong.
    NeedMore,
    /// A header; it took [`REQUEST_HEADER_LEN`] bytes, its payload follows.
    Request(Request),
    /// Not a request: the stream is out of step and the connection has to end.
    BadMagic,
}

/// Reads the compact request header at the start of `input`.
#[inline]
pub fn parse(input: &[u8]) -> Parsed {
    let Ok((header, _)) = wire::RequestHeader::ref_from_prefix(input) else {
        let magic = wire::REQUEST_MAGIC.to_be_bytes();
        let seen = input.len().min(magic.len());
        return if input[..seen] == magic[..seen] { Parsed::NeedMore } else { Parsed::BadMagic };
    };
    if header.magic.get() != wire::REQUEST_MAGIC {
        return Parsed::BadMagic;
    }
    Parsed::Request(Request {
        flags: CommandFlags::from_bits_retain(header.flags.get()),
        command: Command::from_wire(header.command.get()),
        cookie: header.cookie.get(),
        offset: header.offset.get(),
        len: header.len.get(),
    })
}

impl Command {
    /// The command of this number.
    pub fn from_wire(number: u16) -> Self {
        match number {
            wire::CMD_READ => Self::Read,
            wire::CMD_WRITE => Self::Write,
            wire::CMD_DISC => Self::Disconnect,
            wire::CMD_FLUSH => Self::Flush,
            wire::CMD_TRIM => Self::Trim,
            wire::CMD_CACHE => Self::Cache,
            wire::CMD_WRITE_ZEROES => Self::WriteZeroes,
            wire::CMD_BLOCK_STATUS => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }
}

/// What was agreed for a session, as far as it bounds requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionRules {
    /// Length of the export in bytes.
    pub size: u64,
    /// The flags that the client was told.
    pub flags: TransmissionFlags,
    /// Structured replies were agreed.
    pub structured: bool,
    /// At least one metadata context was agreed for this export.
    pub contexts: bool,
    /// Unit of offsets and lengths, a power of two: 1 unless the client asked for block sizes.
    pub block_min_len: u32,
    /// Longest READ and WRITE.
    pub payload_max_len: u32,
}

impl SessionRules {
    /// The rules that follow from a negotiation. A client that did not ask for block sizes may send requests of
    /// any alignment: the export then has to serve them.
    pub fn new(agreed: &Agreed) -> Self {
        Self {
            size: agreed.info.size,
            flags: agreed.info.flags,
            structured: agreed.structured,
            contexts: !agreed.contexts.is_empty(),
            block_min_len: if agreed.block_size_asked { agreed.info.block_min_len } else { 1 },
            payload_max_len: agreed.info.payload_max_len,
        }
    }
}

/// What has to be done with the bytes behind a refused request, so that the stream stays in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// There are none.
    Nothing,
    /// Read this many and throw them away, then reply.
    Drain {
        /// At most [`DRAIN_MAX_LEN`].
        len: u32,
    },
    /// Too many to read for nothing: end the connection without a reply.
    HangUp,
}

/// Why a request is refused, and how to stay in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// For the reply.
    pub errno: NbdError,
    /// For a structured error reply, and the log.
    pub text: &'static str,
    /// For the bytes behind the header.
    pub payload: Disposition,
}

/// Checks a request against the session. `Ok` means: the command may be served as it stands, its range lies within
/// the export, and its flags mean something here. Zero lengths are in order (nothing is to be done then), except
/// for BLOCK_STATUS. FLUSH carries whatever offset and length the client left there.
#[inline]
pub fn check(request: &Request, rules: &SessionRules) -> Result<(), Reject> {
    match verdict(request, rules) {
        Ok(()) => Ok(()),
        Err((errno, text)) => Err(Reject { errno, text, payload: disposition(request) }),
    }
}

type Verdict = Result<(), (NbdError, &'static str)>;

fn verdict(request: &Request, rules: &SessionRules) -> Verdict {
    if request.command == Command::Disconnect {
        return Ok(());
    }
    check_command(request.command, rules)?;
    check_flags(request, rules)?;
    match request.command {
        Command::Flush => Ok(()),
        Command::Read | Command::Write if request.len > rules.payload_max_len => {
            Err((NbdError::Einval, "the request is longer than the largest payload of this export"))
        }
        Command::BlockStatus if request.len == 0 => {
            Err((NbdError::Einval, "block status of no bytes at all"))
        }
        Command::Read
        | Command::Write
        | Command::Disconnect
        | Command::Trim
        | Command::Cache
        | Command::WriteZeroes
        | Command::BlockStatus
        | Command::Unknown(_) => check_range(request, rules),
    }
}

fn check_command(command: Command, rules: &SessionRules) -> Verdict {
    let read_only = rules.flags.contains(TransmissionFlags::READ_ONLY);
    let offers = |flag| rules.flags.contains(flag);
    match command {
        Command::Write | Command::Trim | Command::WriteZeroes if read_only => {
            Err((NbdError::Eperm, "the export is read-only"))
        }
        Command::Flush if !offers(TransmissionFlags::SEND_FLUSH) => {
            Err((NbdError::Einval, "this export does not offer flush"))
        }
        Command::Trim if !offers(TransmissionFlags::SEND_TRIM) => {
            Err((NbdError::Einval, "this export does not offer trim"))
        }
        Command::WriteZeroes if !offers(TransmissionFlags::SEND_WRITE_ZEROES) => {
            Err((NbdError::Einval, "this export does not offer write-zeroes"))
        }
        Command::BlockStatus if !rules.contexts => {
            Err((NbdError::Einval, "no metadata context was agreed for this export"))
        }
        Command::Unknown(_) => Err((NbdError::Einval, "unknown command")),
        // Clients send CACHE whether or not it was offered; it has no effect that could be missed.
        Command::Read
        | Command::Write
        | Command::Disconnect
        | Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::WriteZeroes
        | Command::BlockStatus => Ok(()),
    }
}

fn check_flags(request: &Request, rules: &SessionRules) -> Verdict {
    let offers = |flag| rules.flags.contains(flag);
    let mut allowed = CommandFlags::empty();
    if offers(TransmissionFlags::SEND_FUA) {
        allowed |= CommandFlags::FUA;
    }
    match request.command {
        Command::Read if rules.structured && offers(TransmissionFlags::SEND_DF) => {
            allowed |= CommandFlags::DF
        }
        Command::WriteZeroes => {
            allowed |= CommandFlags::NO_HOLE;
            if offers(TransmissionFlags::SEND_FAST_ZERO) {
                allowed |= CommandFlags::FAST_ZERO;
            }
        }
        Command::BlockStatus => allowed |= CommandFlags::REQ_ONE,
        Command::Read
        | Command::Write
        | Command::Disconnect
        | Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::Unknown(_) => {}
    }
    if allowed.contains(request.flags) {
        Ok(())
    } else {
        Err((NbdError::Einval, "a flag that is unknown, was not offered, or does not go with this command"))
    }
}

fn check_range(request: &Request, rules: &SessionRules) -> Verdict {
    let len = u64::from(request.len);
    let end = match request.offset.checked_add(len) {
        Some(end) if end <= rules.size => end,
        Some(_) | None => {
            return Err((beyond_end(request.command), "the request runs past the end of the export"));
        }
    };
    let unit = u64::from(rules.block_min_len.max(1));
    let len_fits = len.is_multiple_of(unit) || end == rules.size;
    if request.offset.is_multiple_of(unit) && len_fits {
        Ok(())
    } else {
        Err((NbdError::Einval, "offset or length is not a multiple of the minimum block size"))
    }
}

fn beyond_end(command: Command) -> NbdError {
    match command {
        Command::Write | Command::WriteZeroes => NbdError::Enospc,
        Command::Read
        | Command::Disconnect
        | Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::BlockStatus
        | Command::Unknown(_) => NbdError::Einval,
    }
}

fn disposition(request: &Request) -> Disposition {
    match request.payload_len() {
        0 => Disposition::Nothing,
        len if len <= DRAIN_MAX_LEN => Disposition::Drain { len },
        _ => Disposition::HangUp,
    }
}
