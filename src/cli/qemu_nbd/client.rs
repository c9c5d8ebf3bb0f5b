//! The client's side of a negotiation, without sockets: bytes in, bytes out. It asks a server for all that it says of
//! its exports, or for one export to be handed to the kernel.

use std::collections::VecDeque;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::nbd::wire;

/// Longest option reply that is believed. Our choice: far above the longest string of the protocol.
const REPLY_LEN_MAX: usize = 64 * 1024;

/// Most exports and contexts that are remembered. Our choice: as many as a server may list at all here.
const LIST_MAX: usize = 65_536;

/// What a server says of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportDetails {
    /// Its name.
    pub name: String,
    /// Text for people, or empty.
    pub description: String,
    /// Its size in bytes.
    pub size: u64,
    /// The transmission flags.
    pub flags: u16,
    /// Smallest, best and largest unit of requests, if the server says.
    pub blocks: Option<(u32, u32, u32)>,
    /// Metadata contexts.
    pub contexts: Vec<String>,
}

/// What the client is after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Everything about every export; the negotiation is then ended.
    List,
    /// The default export, for transmission with simple replies.
    Go,
}

/// What has to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send what is in the output, then receive.
    More,
    /// Send what is in the output, then turn to TLS and call [`Dialogue::tls_established`].
    StartTls,
    /// Send what is in the output; there is nothing more to receive.
    Done,
}

/// How far it has come: what the server is to answer next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    StartTls,
    Tls,
    Extended,
    Structured,
    List,
    Info,
    Contexts,
    Go,
    Done,
}

/// One negotiation.
#[derive(Debug)]
pub struct Dialogue {
    purpose: Purpose,
    tls: bool,
    state: State,
    /// Whether headers are extended, and whether replies come in chunks.
    pub extended: bool,
    chunked: bool,
    waiting: VecDeque<ExportDetails>,
    /// The exports that are complete.
    pub exports: Vec<ExportDetails>,
}

impl Dialogue {
    /// A client that has received nothing yet; `tls` is whether it insists on TLS.
    pub fn new(purpose: Purpose, tls: bool) -> Self {
        Dialogue {
            purpose,
            tls,
            state: State::Greeting,
            extended: false,
            chunked: false,
            waiting: VecDeque::new(),
            exports: Vec::new(),
        }
    }

    /// Takes what was received; consumes as much of it as is complete and appends what is to be sent.
    pub fn step(&mut self, input: &mut Vec<u8>, output: &mut Vec<u8>) -> Result<Next, String> {
        loop {
            match self.state {
                State::Done => return Ok(Next::Done),
                State::Tls => return Ok(Next::StartTls),
                State::Greeting => {
                    let Ok((greeting, _)) = wire::Greeting::read_from_prefix(input) else {
                        return Ok(Next::More);
                    };
                    input.drain(..size_of::<wire::Greeting>());
                    self.greeted(greeting, output)?;
                }
                State::StartTls
                | State::Extended
                | State::Structured
                | State::List
                | State::Info
                | State::Contexts
                | State::Go => {
                    let Some((header, data)) = take_reply(input)? else { return Ok(Next::More) };
                    self.replied(header.reply_type.get(), &data, output)?;
                }
            }
        }
    }

    /// Goes on under TLS.
    pub fn tls_established(&mut self, output: &mut Vec<u8>) {
        self.begin(output);
    }

    fn greeted(&mut self, greeting: wire::Greeting, output: &mut Vec<u8>) -> Result<(), String> {
        if greeting.init_passwd.get() != wire::NBDMAGIC {
            return Err("the server does not speak NBD".to_owned());
        }
        let flags = greeting.flags.get();
        if greeting.magic.get() != wire::IHAVEOPT || flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err("the server speaks an older NBD, which has no list".to_owned());
        }
        let no_zeroes = if flags & wire::FLAG_NO_ZEROES == 0 { 0 } else { wire::FLAG_C_NO_ZEROES };
        output.extend_from_slice(U32::new(wire::FLAG_C_FIXED_NEWSTYLE | no_zeroes).as_bytes());
        if self.tls {
            self.ask(State::StartTls, wire::OPT_STARTTLS, &[], output);
        } else {
            self.begin(output);
        }
        Ok(())
    }

    fn begin(&mut self, output: &mut Vec<u8>) {
        match self.purpose {
            Purpose::List => self.ask(State::Extended, wire::OPT_EXTENDED_HEADERS, &[], output),
            Purpose::Go => {
                self.waiting.push_back(ExportDetails::default());
                self.ask(State::Go, wire::OPT_GO, &info_request(""), output);
            }
        }
    }

    fn ask(&mut self, state: State, option: u32, data: &[u8], output: &mut Vec<u8>) {
        self.state = state;
        let len = U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX));
        let header = wire::OptionHeader { magic: U64::new(wire::IHAVEOPT), option: U32::new(option), len };
        output.extend_from_slice(header.as_bytes());
        output.extend_from_slice(data);
    }

    /// One reply to the option of this state.
    fn replied(&mut self, reply: u32, data: &[u8], output: &mut Vec<u8>) -> Result<(), String> {
        if reply & wire::REP_FLAG_ERROR != 0 {
            return self.refused(reply, data, output);
        }
        match (self.state, reply) {
            (State::StartTls, wire::REP_ACK) => self.state = State::Tls,
            (State::Extended | State::Structured, wire::REP_ACK) => {
                self.extended = self.state == State::Extended;
                self.chunked = true;
                self.ask(State::List, wire::OPT_LIST, &[], output);
            }
            (State::List, wire::REP_SERVER) => self.waiting.push_back(listed(data, self.waiting.len())?),
            (State::List, wire::REP_ACK) => self.next_export(output),
            (State::Info | State::Go, wire::REP_INFO) => {
                let current = self.waiting.front_mut().ok_or("an answer to nothing")?;
                learn(current, data)?;
            }
            (State::Go, wire::REP_ACK) => {
                self.exports.extend(self.waiting.pop_front());
                self.state = State::Done;
            }
            (State::Info, wire::REP_ACK) => self.ask_contexts(output),
            (State::Contexts, wire::REP_META_CONTEXT) => {
                let current = self.waiting.front_mut().ok_or("an answer to nothing")?;
                let name = data.get(4..).ok_or("a metadata context without a name")?;
                if current.contexts.len() < LIST_MAX {
                    current.contexts.push(text(name));
                }
            }
            (State::Contexts, wire::REP_ACK) => self.export_done(output),
            (_, other) => return Err(format!("the server sent a reply of type {other} out of place")),
        }
        Ok(())
    }

    /// What a server does not know is left out; anything else is the end.
    fn refused(&mut self, reply: u32, data: &[u8], output: &mut Vec<u8>) -> Result<(), String> {
        match (self.state, reply) {
            (_, wire::REP_ERR_TLS_REQD) => {
                return Err("Server requires TLS: give --tls-creds".to_owned());
            }
            (State::Extended, _) => self.ask(State::Structured, wire::OPT_STRUCTURED_REPLY, &[], output),
            (State::Structured, _) => self.ask(State::List, wire::OPT_LIST, &[], output),
            (State::Info, wire::REP_ERR_UNSUP) | (State::Contexts, _) => self.export_done(output),
            _ => {
                let name = error_name(reply);
                let said = if data.is_empty() { String::new() } else { format!(": {}", text(data)) };
                return Err(format!("the server refuses: {name}{said}"));
            }
        }
        Ok(())
    }

    /// Asks about the first export that is not complete.
    fn next_export(&mut self, output: &mut Vec<u8>) {
        match self.waiting.front().map(|export| export.name.clone()) {
            Some(name) => self.ask(State::Info, wire::OPT_INFO, &info_request(&name), output),
            None => self.ask(State::Done, wire::OPT_ABORT, &[], output),
        }
    }

    fn ask_contexts(&mut self, output: &mut Vec<u8>) {
        match self.waiting.front().filter(|_| self.chunked) {
            Some(export) => {
                let mut data = name_field(&export.name);
                // No queries: all contexts are meant.
                data.extend_from_slice(U32::new(0).as_bytes());
                self.ask(State::Contexts, wire::OPT_LIST_META_CONTEXT, &data, output);
            }
            None => self.export_done(output),
        }
    }

    fn export_done(&mut self, output: &mut Vec<u8>) {
        self.exports.extend(self.waiting.pop_front());
        self.next_export(output);
    }
}

/// Takes one whole option reply off `input`.
fn take_reply(input: &mut Vec<u8>) -> Result<Option<(wire::OptionReplyHeader, Vec<u8>)>, String> {
    let Ok((header, rest)) = wire::OptionReplyHeader::read_from_prefix(input) else { return Ok(None) };
    if header.magic.get() != wire::OPTION_REPLY_MAGIC {
        return Err("the server does not keep to the protocol: a reply without its magic".to_owned());
    }
    let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
    if len > REPLY_LEN_MAX {
        return Err(format!("the server sent a reply of {len} bytes"));
    }
    let Some(data) = rest.get(..len).map(<[u8]>::to_vec) else { return Ok(None) };
    input.drain(..size_of::<wire::OptionReplyHeader>() + len);
    Ok(Some((header, data)))
}

fn name_field(name: &str) -> Vec<u8> {
    let mut data = U32::new(u32::try_from(name.len()).unwrap_or(u32::MAX)).as_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data
}

/// The data of INFO and GO: a name and what is asked.
fn info_request(name: &str) -> Vec<u8> {
    let wanted = [wire::INFO_NAME, wire::INFO_DESCRIPTION, wire::INFO_BLOCK_SIZE];
    let mut data = name_field(name);
    data.extend_from_slice(U16::new(3).as_bytes());
    for info in wanted {
        data.extend_from_slice(U16::new(info).as_bytes());
    }
    data
}

/// One export of a list.
fn listed(data: &[u8], known: usize) -> Result<ExportDetails, String> {
    let broken = "the server lists an export without a name";
    let (len, rest) = U32::read_from_prefix(data).map_err(|_| broken)?;
    let len = usize::try_from(len.get()).unwrap_or(usize::MAX);
    let name = rest.get(..len).ok_or(broken)?;
    if known >= LIST_MAX {
        return Err(format!("the server lists more than {LIST_MAX} exports"));
    }
    let description = rest.get(len..).unwrap_or_default();
    Ok(ExportDetails { name: text(name), description: text(description), ..ExportDetails::default() })
}

/// One piece of information.
fn learn(export: &mut ExportDetails, data: &[u8]) -> Result<(), String> {
    let broken = |_| "the server sent information that is too short".to_owned();
    let (kind, rest) = U16::read_from_prefix(data).map_err(|error| broken(error.to_string()))?;
    match kind.get() {
        wire::INFO_EXPORT => {
            let (size, rest) = U64::read_from_prefix(rest).map_err(|error| broken(error.to_string()))?;
            let (flags, _) = U16::read_from_prefix(rest).map_err(|error| broken(error.to_string()))?;
            (export.size, export.flags) = (size.get(), flags.get());
        }
        wire::INFO_DESCRIPTION => export.description = text(rest),
        wire::INFO_BLOCK_SIZE => {
            let (sizes, _) = <[U32; 3]>::read_from_prefix(rest).map_err(|error| broken(error.to_string()))?;
            let [min, preferred, max] = sizes.map(U32::get);
            export.blocks = Some((min, preferred, max));
        }
        // A server may tell more than it was asked.
        _ => {}
    }
    Ok(())
}

fn error_name(reply: u32) -> String {
    match reply {
        wire::REP_ERR_UNSUP => "not supported".to_owned(),
        wire::REP_ERR_POLICY => "not allowed".to_owned(),
        wire::REP_ERR_INVALID => "invalid".to_owned(),
        wire::REP_ERR_PLATFORM => "not supported on its platform".to_owned(),
        wire::REP_ERR_UNKNOWN => "no such export".to_owned(),
        wire::REP_ERR_SHUTDOWN => "it is going down".to_owned(),
        wire::REP_ERR_TOO_BIG => "too much was asked".to_owned(),
        other => format!("error {}", other & !wire::REP_FLAG_ERROR),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
