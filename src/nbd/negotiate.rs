//! The negotiation: greeting, client flags and options, until an export is agreed or the connection has to end.
//!
//! This file keeps the state and cuts the input into options; what each option means is in `options/`. It
//! holds no bytes of the client between calls: what was not consumed stays with the caller, also what a client
//! sent behind GO.

use std::fmt;

use zerocopy::byteorder::big_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::export_info::{ExportDirectory, ExportInfo};
use super::oldstyle;
use super::options::{self, Context, Outcome};
use super::reply::ReplyForm;
use super::wire;

/// Longest data of an option. Our choice: nothing legal needs more (names end at 4096 bytes).
pub const OPTION_MAX_LEN: usize = 64 * 1024;
/// Longest data of INFO and GO, whose list of up to 65,535 information requests may take 131,070 bytes beside the
/// name.
pub const INFO_OPTION_MAX_LEN: usize = 160 * 1024;
/// A receive buffer of this length can always hold what [`Negotiation::step`] has to see in one piece.
pub const INPUT_MAX_LEN: usize = size_of::<wire::OptionHeader>() + INFO_OPTION_MAX_LEN;
/// Options per connection. Our choice: a client that asks two things about each of some ten thousand exports gets
/// its answers; one that never comes to a decision is cut off.
pub const OPTIONS_MAX: u32 = 65_536;
/// Output of one call after which [`Next::Flush`] is asked for, so that a few short options cannot make a long
/// list of exports pile up in memory many times over. Our choice.
const OUTPUT_PAUSE_LEN: usize = 64 * 1024;

/// Whether this listener speaks TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// TLS is not configured.
    #[default]
    Off,
    /// The client may turn to TLS.
    Optional,
    /// Nothing is said before TLS but STARTTLS and ABORT.
    Required,
}

/// How a connection is to be negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NegotiationConfig {
    /// Fixed for the connection.
    pub tls: TlsMode,
    /// The connection began with TLS.
    pub tls_up: bool,
    /// The client is told the default export instead of being asked what it wants.
    pub oldstyle: bool,
}

/// A metadata context that the client selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgreedContext {
    /// Its number in BLOCK_STATUS chunks; unique within the session, never 0.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// What client and server agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The name as the client gave it, possibly empty, for the log; the canonical name is `info.name`.
    pub export: String,
    /// The export as the client was told; `flags` are those that went over the wire.
    pub info: ExportInfo,
    /// How requests and replies are framed.
    pub form: ReplyForm,
    /// Selected for this export; empty unless replies come in chunks.
    pub contexts: Vec<AgreedContext>,
    /// The client asked for block sizes, so it promised to keep to them.
    pub block_size_asked: bool,
    /// The client did without the zeroes behind EXPORT_NAME.
    pub no_zeroes: bool,
}

/// Why a connection ends during negotiation; for the log, its `Display` is escaped and bounded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent ABORT.
    Aborted,
    /// The client set handshake flags that do not exist.
    UnknownClientFlags(u32),
    /// An option did not start with the magic number.
    BadOptionMagic(u64),
    /// An option's data is longer than this server reads.
    OptionTooLong {
        /// `OPT_*`.
        option: u32,
        /// As announced.
        len: u32,
    },
    /// More than [`OPTIONS_MAX`] options.
    TooManyOptions,
    /// A client without fixed newstyle sent an option other than EXPORT_NAME.
    NotFixedNewstyle {
        /// `OPT_*`.
        option: u32,
    },
    /// EXPORT_NAME failed, and has no other way to say so. The text is fit for a log: names in it are escaped and
    /// cut.
    ExportNameRefused(String),
    /// There is no export for an oldstyle client, which could not be told why. The text is fit for a log.
    OldstyleRefused(String),
    /// [`Negotiation::step`] was called after its end.
    AlreadyOver,
}

/// What has to come after a call of [`Negotiation::step`]. What it appended to `out` is to be sent first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Receive more, behind what was not consumed.
    NeedMore,
    /// Send `out`, then call again with what was not consumed.
    Flush,
    /// Agreed: what was not consumed are requests.
    Transmission(Agreed),
    /// Send `out`, then close.
    Close {
        /// For the log.
        reason: CloseReason,
    },
    /// Send `out`, then do the TLS handshake and call [`Negotiation::tls_established`]. What was not consumed
    /// belongs to the handshake and must never be read as options.
    StartTls,
}

/// What a call of [`Negotiation::step`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Bytes of the input that are done with.
    pub consumed: usize,
    /// What comes now.
    pub next: Next,
}

/// One connection's negotiation.
#[derive(Debug)]
pub struct Negotiation {
    phase: Phase,
    options_seen: u32,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Oldstyle,
    ClientFlags,
    Options,
    Over,
}

/// What the options of a connection change.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tls: TlsMode,
    pub(super) tls_up: bool,
    pub(super) fixed_newstyle: bool,
    pub(super) no_zeroes: bool,
    pub(super) form: ReplyForm,
    pub(super) selection: Option<Selection>,
}

/// The outcome of the last SET_META_CONTEXT.
#[derive(Debug)]
pub(super) struct Selection {
    /// Canonical name.
    pub(super) export: String,
    pub(super) contexts: Vec<AgreedContext>,
}

impl Negotiation {
    /// A connection of which nothing was received yet.
    pub fn new(config: NegotiationConfig) -> Self {
        let state = State {
            tls: config.tls,
            tls_up: config.tls_up,
            fixed_newstyle: false,
            no_zeroes: false,
            form: ReplyForm::Simple,
            selection: None,
        };
        let phase = if config.oldstyle { Phase::Oldstyle } else { Phase::ClientFlags };
        Self { phase, options_seen: 0, state }
    }

    /// Appends the greeting, which goes out before anything is received. (The oldstyle one has to know of the export,
    /// and comes from the first [`step`](Self::step).)
    pub fn greeting(&mut self, out: &mut Vec<u8>) {
        if self.phase == Phase::Oldstyle {
            return;
        }
        let greeting = wire::Greeting {
            init_passwd: U64::new(wire::NBDMAGIC),
            magic: U64::new(wire::IHAVEOPT),
            flags: U16::new(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES),
        };
        out.extend_from_slice(greeting.as_bytes());
    }

    /// Takes what the client sent, in pieces of any length, and appends the answers to `out`. Handles as many
    /// options as `input` holds. `input` starts with what the last call did not consume.
    pub fn step(&mut self, input: &[u8], exports: &dyn ExportDirectory, out: &mut Vec<u8>) -> Step {
        let out_before = out.len();
        let mut consumed = 0;
        loop {
            let rest = input.get(consumed..).unwrap_or_default();
            let (used, outcome) = match self.phase {
                Phase::Oldstyle => (0, Some(oldstyle::begin(&self.state, exports, out))),
                Phase::ClientFlags => self.client_flags(rest),
                Phase::Options => self.option(rest, exports, out),
                Phase::Over => (0, Some(Outcome::Close(CloseReason::AlreadyOver))),
            };
            consumed += used;
            let next = match outcome {
                None => Next::NeedMore,
                Some(Outcome::Continue) if out.len().saturating_sub(out_before) < OUTPUT_PAUSE_LEN => {
                    continue;
                }
                Some(Outcome::Continue) => Next::Flush,
                Some(Outcome::Transmission(agreed)) => self.over(Next::Transmission(*agreed)),
                Some(Outcome::Close(reason)) => self.over(Next::Close { reason }),
                Some(Outcome::StartTls) => self.over(Next::StartTls),
            };
            return Step { consumed, next };
        }
    }

    /// TLS is up, after [`Next::StartTls`]: the negotiation goes on with options, and everything that was agreed
    /// in plain text is forgotten.
    pub fn tls_established(&mut self) {
        self.phase = Phase::Options;
        self.state.tls_up = true;
        self.state.form = ReplyForm::Simple;
        self.state.selection = None;
    }

    fn over(&mut self, next: Next) -> Next {
        self.phase = Phase::Over;
        next
    }

    /// Bytes used and the outcome; no outcome while bytes are missing.
    fn client_flags(&mut self, input: &[u8]) -> (usize, Option<Outcome>) {
        let Some((flags, _)) = input.split_first_chunk() else {
            return (0, None);
        };
        let flags = u32::from_be_bytes(*flags);
        let outcome = if flags & !(wire::FLAG_C_FIXED_NEWSTYLE | wire::FLAG_C_NO_ZEROES) == 0 {
            Outcome::Continue
        } else {
            Outcome::Close(CloseReason::UnknownClientFlags(flags))
        };
        self.state.fixed_newstyle = flags & wire::FLAG_C_FIXED_NEWSTYLE != 0;
        self.state.no_zeroes = flags & wire::FLAG_C_NO_ZEROES != 0;
        self.phase = Phase::Options;
        (size_of_val(&flags), Some(outcome))
    }

    fn option(
        &mut self,
        input: &[u8],
        exports: &dyn ExportDirectory,
        out: &mut Vec<u8>,
    ) -> (usize, Option<Outcome>) {
        let Ok((header, behind)) = wire::OptionHeader::ref_from_prefix(input) else {
            return (0, None);
        };
        let header_len = size_of::<wire::OptionHeader>();
        if let Err(reason) = self.admit(header) {
            return (header_len, Some(Outcome::Close(reason)));
        }
        let data = usize::try_from(header.len.get()).ok().and_then(|len| behind.get(..len));
        let Some(data) = data else {
            return (0, None);
        };
        self.options_seen += 1;
        let mut context = Context::new(header.option.get(), exports, out);
        (header_len + data.len(), Some(options::answer(&mut self.state, data, &mut context)))
    }

    /// Ends the connection for what a header alone can show, before any of its data is waited for.
    fn admit(&self, header: &wire::OptionHeader) -> Result<(), CloseReason> {
        if header.magic.get() != wire::IHAVEOPT {
            return Err(CloseReason::BadOptionMagic(header.magic.get()));
        }
        let (option, len) = (header.option.get(), header.len.get());
        if !self.state.fixed_newstyle && option != wire::OPT_EXPORT_NAME {
            return Err(CloseReason::NotFixedNewstyle { option });
        }
        let max_len = match option {
            wire::OPT_INFO | wire::OPT_GO => INFO_OPTION_MAX_LEN,
            _ => OPTION_MAX_LEN,
        };
        if usize::try_from(len).map_or(true, |len| len > max_len) {
            return Err(CloseReason::OptionTooLong { option, len });
        }
        if self.options_seen >= OPTIONS_MAX {
            return Err(CloseReason::TooManyOptions);
        }
        Ok(())
    }
}

impl State {
    /// The selection, if it was made for this export.
    fn contexts_for(&self, export: &str) -> Vec<AgreedContext> {
        match &self.selection {
            Some(selection) if selection.export == export => selection.contexts.clone(),
            Some(_) | None => Vec::new(),
        }
    }

    /// What is agreed if the client takes this export now; the flags become those that it is told.
    pub(super) fn agree(&self, export: &str, mut info: ExportInfo, block_size_asked: bool) -> Box<Agreed> {
        let contexts = self.contexts_for(&info.name);
        info.flags = info.wire_flags(self.form, !contexts.is_empty());
        Box::new(Agreed {
            export: export.to_owned(),
            info,
            form: self.form,
            contexts,
            block_size_asked,
            no_zeroes: self.no_zeroes,
        })
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aborted => f.write_str("the client aborted the negotiation"),
            Self::UnknownClientFlags(flags) => write!(f, "unknown client flags {flags:#x}"),
            Self::BadOptionMagic(magic) => write!(f, "an option starts with {magic:#x}: not an NBD client"),
            Self::OptionTooLong { option, len } => {
                write!(f, "option {option} announces {len} bytes of data, more than this server reads")
            }
            Self::TooManyOptions => write!(f, "more than {OPTIONS_MAX} options"),
            Self::NotFixedNewstyle { option } => {
                write!(f, "option {option} from a client that does not speak fixed newstyle")
            }
            Self::ExportNameRefused(why) => write!(f, "EXPORT_NAME refused: {why}"),
            Self::OldstyleRefused(why) => write!(f, "nothing for an oldstyle client: {why}"),
            Self::AlreadyOver => f.write_str("the negotiation was over already"),
        }
    }
}
