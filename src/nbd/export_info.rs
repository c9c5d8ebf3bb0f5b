//! What the protocol engine has to know of an export. The server's table of exports implements
//! [`ExportDirectory`]; nothing here knows where the bytes are.

use bitflags::bitflags;

use super::reply::ReplyForm;
use super::wire;

bitflags! {
    /// Transmission flags of an export (`NBD_FLAG_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set on the wire.
        const HAS_FLAGS = 1 << 0;
        /// Writes fail.
        const READ_ONLY = 1 << 1;
        /// FLUSH is served.
        const SEND_FLUSH = 1 << 2;
        /// FUA is honoured, on each command.
        const SEND_FUA = 1 << 3;
        /// A hint that seeks cost.
        const ROTATIONAL = 1 << 4;
        /// TRIM is served.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES is served, with NO_HOLE.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// DF is honoured; only shown with structured replies.
        const SEND_DF = 1 << 7;
        /// FLUSH and FUA of one connection cover the completed writes of all.
        const CAN_MULTI_CONN = 1 << 8;
        /// CACHE does something.
        const SEND_CACHE = 1 << 10;
        /// FAST_ZERO is honoured; only shown with WRITE_ZEROES.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS may have a payload that picks contexts; only shown with extended headers and contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

/// Facts of one export, as they are at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name: at most [`wire::STRING_MAX_LEN`] bytes, without NUL.
    pub name: String,
    /// Text for people, or empty.
    pub description: String,
    /// Length of the export in bytes.
    pub size: u64,
    /// What the export can do. SEND_DF means "if replies come in chunks"; HAS_FLAGS need not be set.
    pub flags: TransmissionFlags,
    /// Smallest unit of requests: a power of two from 1 to 65,536.
    pub block_min_len: u32,
    /// Best unit of requests: a power of two, at least 512 and at least `block_min_len`.
    pub block_preferred_len: u32,
    /// Longest READ and WRITE, at least `block_preferred_len`; [`wire::DEFAULT_PAYLOAD_MAX_LEN`] is what clients expect.
    pub payload_max_len: u32,
    /// Names of the metadata contexts that the export can tell, e.g. [`wire::BASE_ALLOCATION`]; no name twice.
    pub contexts: Vec<String>,
    /// Only to be had, and seen, under TLS.
    pub tls_required: bool,
}

impl ExportInfo {
    /// The flags as this client gets to see them: the same for INFO, GO and EXPORT_NAME. `contexts` is whether it
    /// has selected any for this export.
    pub fn wire_flags(&self, form: ReplyForm, contexts: bool) -> TransmissionFlags {
        let mut flags = self.flags | TransmissionFlags::HAS_FLAGS;
        if !form.is_chunked() {
            flags.remove(TransmissionFlags::SEND_DF);
        }
        flags.set(TransmissionFlags::BLOCK_STATUS_PAYLOAD, form == ReplyForm::Extended && contexts);
        if flags.contains(TransmissionFlags::READ_ONLY) {
            flags.remove(TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_WRITE_ZEROES);
        }
        if !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            flags.remove(TransmissionFlags::SEND_FAST_ZERO);
        }
        flags
    }
}

/// One line of LIST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSummary {
    /// Canonical name.
    pub name: String,
    /// Text for people, or empty.
    pub description: String,
    /// Only to be seen under TLS.
    pub tls_required: bool,
}

/// Why a client does not get an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is none of that name.
    Unknown,
    /// It may not be used by this client; the text goes to the client.
    Policy(String),
    /// The server, or this export, is going down.
    Shutdown,
    /// It is only to be had under TLS.
    TlsRequired,
}

/// The server's exports, seen from one connection. Called from within [`super::negotiate::Negotiation::step`], so
/// it must answer at once: no disk, no wait.
pub trait ExportDirectory {
    /// The exports that this client may see, in the order to list them. A name that breaks the limits of
    /// [`ExportInfo::name`] is left out of the list.
    fn list(&self) -> Vec<ExportSummary>;

    /// The export of this name; the empty name means the default export.
    fn find(&self, name: &str) -> Result<ExportInfo, Refusal>;

    /// True while the server drains: each option but ABORT is then answered with ERR_SHUTDOWN.
    fn draining(&self) -> bool {
        false
    }
}

/// True for a string that the protocol lets us send as a name.
pub(crate) fn is_protocol_string(text: &str) -> bool {
    text.len() <= wire::STRING_MAX_LEN && !text.contains('\0')
}
