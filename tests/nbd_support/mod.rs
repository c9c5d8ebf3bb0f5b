//! The client's side for the tests of the protocol engine: builds options and requests, and reads what the server
//! says, with the protocol's numbers written out again so that a wrong constant of the engine cannot hide.

#![allow(dead_code)] // Each test crate uses its own part of this.

pub mod replies;
#[path = "../support/wire.rs"]
pub mod wire;

use nbd_img::nbd::export_info::{ExportDirectory, ExportInfo, ExportSummary, Refusal, TransmissionFlags};
use nbd_img::nbd::negotiate::{Agreed, CloseReason, Negotiation, NegotiationConfig, Next, TlsMode};

pub const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
pub const ACK: u32 = 1;
pub const SERVER: u32 = 2;
pub const INFO: u32 = 3;
pub const META: u32 = 4;
pub const UNSUP: u32 = 0x8000_0001;
pub const POLICY: u32 = 0x8000_0002;
pub const INVALID: u32 = 0x8000_0003;
pub const TLS_REQD: u32 = 0x8000_0005;
pub const UNKNOWN: u32 = 0x8000_0006;
pub const SHUTDOWN: u32 = 0x8000_0007;
pub const EXT_HEADER_REQD: u32 = 0x8000_000a;

/// Fixed newstyle without zeroes: what every client of today sends.
pub const MODERN: u32 = 3;

/// A directory of the tests: "disk" (default), "snap" (read-only), and names that are refused.
pub struct Exports {
    pub exports: Vec<ExportInfo>,
    pub draining: bool,
}

impl Exports {
    pub fn new() -> Self {
        let mut snap = export("snap", 1000);
        snap.flags |= TransmissionFlags::READ_ONLY;
        snap.description = String::new();
        snap.contexts.push("qemu:dirty-bitmap:b0".into());
        snap.contexts.push("qemu:dirty-bitmap:b1".into());
        Self { exports: vec![export("disk", 1 << 30), snap], draining: false }
    }
}

pub fn export(name: &str, size: u64) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: format!("the {name} of the tests"),
        size,
        flags: TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::CAN_MULTI_CONN
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::SEND_FAST_ZERO,
        block_min_len: 1,
        block_preferred_len: 4096,
        payload_max_len: 32 << 20,
        contexts: vec!["base:allocation".into()],
        tls_required: false,
    }
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<ExportSummary> {
        let summary = |e: &ExportInfo| ExportSummary {
            name: e.name.clone(),
            description: e.description.clone(),
            tls_required: e.tls_required,
        };
        self.exports.iter().map(summary).collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, Refusal> {
        match name {
            "forbidden" => Err(Refusal::Policy("not for you".into())),
            "leaving" => Err(Refusal::Shutdown),
            "" => self.exports.first().cloned().ok_or(Refusal::Unknown),
            name => self.exports.iter().find(|e| e.name == name).cloned().ok_or(Refusal::Unknown),
        }
    }

    fn draining(&self) -> bool {
        self.draining
    }
}

/// Client flags, then options.
pub fn client(flags: u32, options: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = flags.to_be_bytes().to_vec();
    bytes.extend(options.concat());
    bytes
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    option_claiming(number, u32::try_from(data.len()).unwrap(), data)
}

/// An option whose header announces another length than it has.
pub fn option_claiming(number: u32, len: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Data of INFO and GO.
pub fn info_data(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend(u16::try_from(requests.len()).unwrap().to_be_bytes());
    data.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name.as_bytes());
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query.as_bytes())));
    data
}

pub fn counted(bytes: &[u8]) -> Vec<u8> {
    let mut data = u32::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
    data.extend(bytes);
    data
}

pub fn go(name: &str) -> Vec<u8> {
    option(7, &info_data(name, &[3]))
}

/// A negotiation that was fed to its end, or to the end of the input.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// All that the server said, greeting included.
    pub out: Vec<u8>,
    /// Bytes of the input that were not consumed.
    pub left: Vec<u8>,
    pub next: Next,
}

/// Feeds `pieces` as they would come from a socket; TLS, when it is agreed, is up at once.
pub fn run_pieces<'a>(tls: TlsMode, exports: &Exports, pieces: impl IntoIterator<Item = &'a [u8]>) -> Run {
    let mut negotiation = Negotiation::new(NegotiationConfig { tls, tls_up: false, oldstyle: false });
    let mut out = Vec::new();
    negotiation.greeting(&mut out);
    let mut held = Vec::new();
    let mut pieces = pieces.into_iter();
    loop {
        let step = negotiation.step(&held, exports, &mut out);
        held.drain(..step.consumed);
        match step.next {
            Next::NeedMore => match pieces.next() {
                Some(piece) => held.extend(piece),
                None => return Run { out, left: held, next: Next::NeedMore },
            },
            Next::Flush => {}
            Next::StartTls => negotiation.tls_established(),
            next @ (Next::Transmission(_) | Next::Close { .. }) => {
                held.extend(pieces.flatten());
                return Run { out, left: held, next };
            }
        }
    }
}

pub fn run(exports: &Exports, input: &[u8]) -> Run {
    run_pieces(TlsMode::Off, exports, [input])
}

pub fn agreed(run: &Run) -> &Agreed {
    match &run.next {
        Next::Transmission(agreed) => agreed,
        other => panic!("no transmission but {other:?}"),
    }
}

pub fn closed(run: &Run) -> &CloseReason {
    match &run.next {
        Next::Close { reason } => reason,
        other => panic!("not closed but {other:?}"),
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// Reads the greeting and all option replies; panics at anything that does not fit, such as a cut reply.
pub fn replies(out: &[u8]) -> Vec<OptionReply> {
    let (replies, rest) = replies_then_rest(out);
    assert!(rest.is_empty(), "{} bytes behind the last option reply", rest.len());
    replies
}

/// The same, up to the first byte that does not start an option reply.
pub fn replies_then_rest(out: &[u8]) -> (Vec<OptionReply>, &[u8]) {
    assert_eq!(&out[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(&out[16..18], [0, 3]);
    let mut rest = &out[18..];
    let mut replies = Vec::new();
    while rest.starts_with(&0x0003_e889_0455_65a9_u64.to_be_bytes()) {
        let len = usize::try_from(be32(&rest[16..])).unwrap();
        let data = rest[20..20 + len].to_vec();
        let reply = OptionReply { option: be32(&rest[8..]), kind: be32(&rest[12..]), data };
        check_reply(&reply);
        replies.push(reply);
        rest = &rest[20 + len..];
    }
    (replies, rest)
}

fn check_reply(reply: &OptionReply) {
    match reply.kind {
        ACK => assert!(reply.data.is_empty()),
        SERVER => {
            let len = usize::try_from(be32(&reply.data)).unwrap();
            check_text(&reply.data[4..4 + len]);
            check_text(&reply.data[4 + len..]);
        }
        INFO => match be16(&reply.data) {
            0 => assert_eq!(reply.data.len(), 12),
            1 | 2 => check_text(&reply.data[2..]),
            3 => assert_eq!(reply.data.len(), 14),
            other => panic!("info {other}"),
        },
        META => check_text(&reply.data[4..]),
        kind => {
            assert!(
                matches!(kind, UNSUP | POLICY | INVALID | TLS_REQD | UNKNOWN | SHUTDOWN | EXT_HEADER_REQD),
                "{kind:#x}"
            );
            check_text(&reply.data);
            assert!(!reply.data.is_empty(), "an error without a text");
        }
    }
}

fn check_text(bytes: &[u8]) {
    assert!(bytes.len() <= 4096);
    assert!(!std::str::from_utf8(bytes).unwrap().contains('\0'));
}

pub fn kinds(out: &[u8]) -> Vec<(u32, u32)> {
    replies(out).iter().map(|reply| (reply.option, reply.kind)).collect()
}

pub fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().unwrap())
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}

/// A compact request header.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = request_start(0x2560_9513, flags, command, cookie, offset);
    bytes.extend(len.to_be_bytes());
    bytes
}

/// An extended request header.
pub fn extended_request(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = request_start(0x21e4_1c71, flags, command, cookie, offset);
    bytes.extend(len.to_be_bytes());
    bytes
}

/// What both headers begin with.
fn request_start(magic: u32, flags: u16, command: u16, cookie: u64, offset: u64) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes
}
