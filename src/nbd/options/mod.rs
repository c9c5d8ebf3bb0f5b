//! The options of the negotiation, one file each. A new option is one file and one arm in [`answer`].
//!
//! An option gets its data whole, answers through [`Context`], and says with [`Outcome`] how the negotiation goes
//! on. After an error reply it goes on.

mod abort;
mod export_name;
mod extended_headers;
mod info_go;
mod list;
mod meta_context;
mod starttls;
mod structured_reply;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::export_info::{ExportDirectory, ExportInfo, Refusal};
use super::negotiate::{Agreed, CloseReason, State, TlsMode};
use super::text::{protocol_text, quoted};
use super::wire;

/// How the negotiation goes on after an option.
#[derive(Debug)]
pub(super) enum Outcome {
    Continue,
    Transmission(Box<Agreed>),
    Close(CloseReason),
    StartTls,
}

/// Answers one option.
pub(super) fn answer(state: &mut State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    if let Some(outcome) = refuse_all(state, context) {
        return outcome;
    }
    match context.option {
        wire::OPT_EXPORT_NAME => export_name::answer(state, data, context),
        wire::OPT_ABORT => abort::answer(context),
        wire::OPT_LIST => list::answer(state, data, context),
        wire::OPT_STARTTLS => starttls::answer(state, data, context),
        wire::OPT_INFO => info_go::answer_info(state, data, context),
        wire::OPT_GO => info_go::answer_go(state, data, context),
        wire::OPT_STRUCTURED_REPLY => structured_reply::answer(state, data, context),
        wire::OPT_LIST_META_CONTEXT => meta_context::answer_list(state, data, context),
        wire::OPT_SET_META_CONTEXT => meta_context::answer_set(state, data, context),
        wire::OPT_EXTENDED_HEADERS => extended_headers::answer(state, data, context),
        unknown => {
            context.error(wire::REP_ERR_UNSUP, &format!("option {unknown} is not known to this server"))
        }
    }
}

/// What a server that is going down, or that insists on TLS, says to nearly every option.
fn refuse_all(state: &State, context: &mut Context<'_>) -> Option<Outcome> {
    if context.option == wire::OPT_ABORT {
        return None;
    }
    let tls_missing = state.tls == TlsMode::Required && !state.tls_up && context.option != wire::OPT_STARTTLS;
    let (reply_type, text) = if context.exports.draining() {
        (wire::REP_ERR_SHUTDOWN, SHUTDOWN_TEXT)
    } else if tls_missing {
        (wire::REP_ERR_TLS_REQD, "this server wants TLS first")
    } else {
        return None;
    };
    if context.option == wire::OPT_EXPORT_NAME {
        return Some(Outcome::Close(CloseReason::ExportNameRefused(text.to_owned())));
    }
    Some(context.error(reply_type, text))
}

const SHUTDOWN_TEXT: &str = "the server is going down";

/// What an option may look at and write to, beside the state.
pub(super) struct Context<'a> {
    option: u32,
    exports: &'a dyn ExportDirectory,
    out: &'a mut Vec<u8>,
}

impl<'a> Context<'a> {
    pub(super) fn new(option: u32, exports: &'a dyn ExportDirectory, out: &'a mut Vec<u8>) -> Self {
        Self { option, exports, out }
    }

    /// The export of this name, if this connection may have it.
    fn find(&self, state: &State, name: &str) -> Result<ExportInfo, Refusal> {
        let info = self.exports.find(name)?;
        if info.tls_required && !state.tls_up { Err(Refusal::TlsRequired) } else { Ok(info) }
    }

    /// Appends a reply whose data is these parts, one behind the other.
    fn reply(&mut self, reply_type: u32, parts: &[&[u8]]) {
        let data_len: usize = parts.iter().map(|part| part.len()).sum();
        let header = wire::OptionReplyHeader {
            magic: U64::new(wire::OPTION_REPLY_MAGIC),
            option: U32::new(self.option),
            reply_type: U32::new(reply_type),
            // The parts are a few strings of at most 4096 bytes, so this always fits.
            len: U32::new(u32::try_from(data_len).unwrap_or(u32::MAX)),
        };
        self.out.extend_from_slice(header.as_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }

    fn ack(&mut self) -> Outcome {
        self.reply(wire::REP_ACK, &[]);
        Outcome::Continue
    }

    fn error(&mut self, reply_type: u32, text: &str) -> Outcome {
        self.reply(reply_type, &[protocol_text(text).as_bytes()]);
        Outcome::Continue
    }

    fn invalid(&mut self, text: &str) -> Outcome {
        self.error(wire::REP_ERR_INVALID, text)
    }

    fn refused(&mut self, export: &str, refusal: &Refusal) -> Outcome {
        let reply_type = match refusal {
            Refusal::Unknown => wire::REP_ERR_UNKNOWN,
            Refusal::Policy(_) => wire::REP_ERR_POLICY,
            Refusal::Shutdown => wire::REP_ERR_SHUTDOWN,
            Refusal::TlsRequired => wire::REP_ERR_TLS_REQD,
        };
        self.error(reply_type, &refusal_text(export, refusal))
    }
}

/// Why there is no export of this name, for the client or the log.
pub(super) fn refusal_text(export: &str, refusal: &Refusal) -> String {
    match refusal {
        Refusal::Unknown if export.is_empty() => "this server has no default export".to_owned(),
        Refusal::Unknown => format!("this server has no export {}", quoted(export)),
        Refusal::Policy(text) => text.clone(),
        Refusal::Shutdown => SHUTDOWN_TEXT.to_owned(),
        Refusal::TlsRequired => format!("the export {} is only to be had under TLS", quoted(export)),
    }
}

/// Takes fields off an option's data; `None` once it is too short.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// A string with its length in front.
    fn counted(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }
}

/// The protocol's rules for strings.
fn protocol_str(bytes: &[u8]) -> Result<&str, &'static str> {
    if bytes.len() > wire::STRING_MAX_LEN {
        return Err("a string is longer than 4096 bytes");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "a string is not valid UTF-8")?;
    if text.contains('\0') {
        return Err("a string contains NUL");
    }
    Ok(text)
}
