//! The header of a request: reading it, and whether this session may be asked that.
//!
//! Nothing here touches the disk. What only the disk can tell (no space, not supported) comes later, from
//! [`super::errno`].

use bitflags::bitflags;
use zerocopy::FromBytes;

use super::errno::NbdError;
use super::export_info::TransmissionFlags;
use super::negotiate::{Agreed, AgreedContext};
use super::reply::ReplyForm;
use super::wire;

/// Length of a compact request header.
pub const REQUEST_HEADER_LEN: usize = size_of::<wire::RequestHeader>();
/// Length of an extended request header.
pub const EXTENDED_REQUEST_HEADER_LEN: usize = size_of::<wire::ExtendedRequestHeader>();

/// Longest payload of a refused WRITE that is read and thrown away to stay in step; a client that announces more
/// is cut off. Our choice: twice the usual payload limit, so that a client that missed the limit by little keeps
/// its connection, and nobody makes us read gigabytes for nothing.
pub const DRAIN_MAX_LEN: u64 = 64 * 1024 * 1024;

/// What stands before the context ids in the payload of a BLOCK_STATUS: the length that is asked for.
const STATUS_PAYLOAD_FIXED_LEN: usize = size_of::<u64>();

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
        /// The header's length is that of a payload; only with extended headers.
        const PAYLOAD_LEN = 1 << 5;
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
    /// How many bytes; not checked yet. For a BLOCK_STATUS with a payload it is in there, see
    /// [`status_payload`].
    pub len: u64,
    /// Bytes that follow the header on the wire, whether or not the request is refused.
    pub payload_len: u64,
}

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Less than a header, and no byte of it wrong.
    NeedMore,
    /// A header; it took as many bytes as [`ReplyForm::request_header_len`] says, its payload follows.
    Request(Request),
    /// Not a request: the stream is out of step and the connection has to end.
    BadMagic,
}

/// Reads the request header at the start of `input`: extended if that was agreed, else compact.
#[inline]
pub fn parse(input: &[u8], form: ReplyForm) -> Parsed {
    if form == ReplyForm::Extended {
        return parse_extended(input);
    }
    let Ok((header, _)) = wire::RequestHeader::ref_from_prefix(input) else {
        return cut_header(input, wire::REQUEST_MAGIC);
    };
    if header.magic.get() != wire::REQUEST_MAGIC {
        return Parsed::BadMagic;
    }
    let command = Command::from_wire(header.command.get());
    let len = u64::from(header.len.get());
    Parsed::Request(Request {
        flags: CommandFlags::from_bits_retain(header.flags.get()),
        command,
        cookie: header.cookie.get(),
        offset: header.offset.get(),
        len,
        payload_len: if command == Command::Write { len } else { 0 },
    })
}

fn parse_extended(input: &[u8]) -> Parsed {
    let Ok((header, _)) = wire::ExtendedRequestHeader::ref_from_prefix(input) else {
        return cut_header(input, wire::EXTENDED_REQUEST_MAGIC);
    };
    if header.magic.get() != wire::EXTENDED_REQUEST_MAGIC {
        return Parsed::BadMagic;
    }
    let flags = CommandFlags::from_bits_retain(header.flags.get());
    let command = Command::from_wire(header.command.get());
    let len = header.len.get();
    // A write should say that it has a payload, but QEMU's client (10.0) does not, and sends it all the same.
    let has_payload = command == Command::Write || flags.contains(CommandFlags::PAYLOAD_LEN);
    Parsed::Request(Request {
        flags,
        command,
        cookie: header.cookie.get(),
        offset: header.offset.get(),
        len,
        payload_len: if has_payload { len } else { 0 },
    })
}

/// Less than a header: the magic number shows early whether the stream is in step.
fn cut_header(input: &[u8], magic: u32) -> Parsed {
    let magic = magic.to_be_bytes();
    let seen = input.len().min(magic.len());
    if input[..seen] == magic[..seen] { Parsed::NeedMore } else { Parsed::BadMagic }
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
    /// How replies are framed, and with that requests.
    pub form: ReplyForm,
    /// Number of metadata contexts that were agreed for this export.
    pub contexts: usize,
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
            form: agreed.form,
            contexts: agreed.contexts.len(),
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
        len: u64,
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
        Err((errno, text)) => Err(Reject { errno, text, payload: disposition(request, rules) }),
    }
}

/// A BLOCK_STATUS with its payload: what is asked for, and by which of the agreed contexts, `ids` as the client
/// got them from the negotiation. [`check`] let the header through; the payload is whole.
pub fn status_payload(
    request: &Request,
    payload: &[u8],
    rules: &SessionRules,
    agreed: &[AgreedContext],
) -> Result<(Request, Vec<u32>), Reject> {
    let reject = |(errno, text)| Reject { errno, text, payload: Disposition::Nothing };
    let invalid = |text| reject((NbdError::Einval, text));
    let Some((len, ids)) = payload.split_first_chunk::<STATUS_PAYLOAD_FIXED_LEN>() else {
        return Err(invalid(STATUS_PAYLOAD_TEXT));
    };
    let request = Request { len: u64::from_be_bytes(*len), payload_len: 0, ..*request };
    let (ids, []) = ids.as_chunks() else {
        return Err(invalid(STATUS_PAYLOAD_TEXT));
    };
    let mut wanted = Vec::with_capacity(ids.len().min(agreed.len()));
    for id in ids.iter().map(|id| u32::from_be_bytes(*id)) {
        if wanted.contains(&id) || !agreed.iter().any(|context| context.id == id) {
            return Err(invalid("the payload names a metadata context twice, or one that was not agreed"));
        }
        wanted.push(id);
    }
    if request.len == 0 {
        return Err(invalid(NO_LENGTH_TEXT));
    }
    check_range(&request, rules).map_err(reject)?;
    Ok((request, wanted))
}

const STATUS_PAYLOAD_TEXT: &str =
    "the payload of a block status is a length and the ids of agreed metadata contexts, each once";
const NO_LENGTH_TEXT: &str = "block status of no bytes at all";

type Verdict = Result<(), (NbdError, &'static str)>;

fn verdict(request: &Request, rules: &SessionRules) -> Verdict {
    if request.command == Command::Disconnect {
        return Ok(());
    }
    check_command(request.command, rules)?;
    check_flags(request, rules)?;
    match request.command {
        Command::Flush => Ok(()),
        Command::Read | Command::Write if request.len > u64::from(rules.payload_max_len) => {
            Err((NbdError::Einval, "the request is longer than the largest payload of this export"))
        }
        Command::BlockStatus if request.flags.contains(CommandFlags::PAYLOAD_LEN) => {
            check_status_payload(request, rules)
        }
        Command::BlockStatus if request.len == 0 => Err((NbdError::Einval, NO_LENGTH_TEXT)),
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

/// Each agreed context at most once: a payload that is longer than that is wrong whatever it says.
fn check_status_payload(request: &Request, rules: &SessionRules) -> Verdict {
    let ids_len = request.payload_len.checked_sub(STATUS_PAYLOAD_FIXED_LEN as u64);
    let ids_len_max = (rules.contexts * size_of::<u32>()) as u64;
    match ids_len {
        Some(len) if len > 0 && len <= ids_len_max && len.is_multiple_of(4) => Ok(()),
        Some(_) | None => Err((NbdError::Einval, STATUS_PAYLOAD_TEXT)),
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
        Command::BlockStatus if rules.contexts == 0 => {
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
        Command::Read if rules.form.is_chunked() && offers(TransmissionFlags::SEND_DF) => {
            allowed |= CommandFlags::DF
        }
        Command::Write if rules.form == ReplyForm::Extended => allowed |= CommandFlags::PAYLOAD_LEN,
        Command::WriteZeroes => {
            allowed |= CommandFlags::NO_HOLE;
            if offers(TransmissionFlags::SEND_FAST_ZERO) {
                allowed |= CommandFlags::FAST_ZERO;
            }
        }
        Command::BlockStatus => {
            allowed |= CommandFlags::REQ_ONE;
            if offers(TransmissionFlags::BLOCK_STATUS_PAYLOAD) {
                allowed |= CommandFlags::PAYLOAD_LEN;
            }
        }
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
    let end = match request.offset.checked_add(request.len) {
        Some(end) if end <= rules.size => end,
        Some(_) | None => {
            return Err((
                NbdError::out_of_bounds(request.command),
                "the request runs past the end of the export",
            ));
        }
    };
    let unit = u64::from(rules.block_min_len.max(1));
    let len_fits = request.len.is_multiple_of(unit) || end == rules.size;
    if request.offset.is_multiple_of(unit) && len_fits {
        Ok(())
    } else {
        Err((NbdError::Einval, "offset or length is not a multiple of the minimum block size"))
    }
}

fn disposition(request: &Request, rules: &SessionRules) -> Disposition {
    let extended = rules.form == ReplyForm::Extended;
    // The protocol has a server hang up on a longer payload where the header says that it is one.
    let drain_max_len = if extended { u64::from(rules.payload_max_len) } else { DRAIN_MAX_LEN };
    match request.payload_len {
        0 => Disposition::Nothing,
        len if len <= drain_max_len => Disposition::Drain { len },
        _ => Disposition::HangUp,
    }
}
