//! Target `nbd_transmission`: what a client sends after an export is agreed, cut into pieces anywhere.
//!
//! The first four bytes choose what was agreed, the next three where the input is cut. Each request is judged a
//! second time, by the words of the protocol; refused or not, the stream has to stay in step, and every reply is
//! read by the tests' own reader.

use std::collections::HashMap;

use nbd_img::nbd::block_status::{Builder, Progress};
use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::negotiate::AgreedContext;
use nbd_img::nbd::reply::{self, Place, ReplyForm, ReplyTo};
use nbd_img::nbd::request::{
    Command, CommandFlags, DRAIN_MAX_LEN, Disposition, Parsed, Reject, Request, SessionRules, check, parse,
    status_payload,
};

use super::handshake::pieces;
use crate::nbd_support::replies::{read_extended_stream, read_stream};

/// Sizes of the export.
const SIZES: [u64; 8] = [0, 1, 511, 1 << 20, (1 << 32) + 5, 8 << 40, i64::MAX as u64, u64::MAX];
/// The context's number.
const CONTEXT: u32 = 1;

/// What became of a stream of requests.
#[derive(PartialEq, Eq, Debug, Default)]
struct Outcome {
    replies: Vec<u8>,
    /// Requests so far. Replies carry this number instead of the cookie, which clients may use twice.
    requests: u64,
    /// Lengths of the simple READ replies by that number.
    reads: HashMap<u64, usize>,
    end: Option<End>,
    /// Bytes that were neither a request nor its payload.
    left: usize,
}

#[derive(PartialEq, Eq, Debug)]
enum End {
    Disconnect,
    HungUp,
    BadMagic,
}

/// Serves the input, all at once and piece by piece.
pub fn run(input: &[u8]) {
    let Some((how, rest)) = input.split_first_chunk::<4>() else { return };
    let Some((cuts, input)) = rest.split_first_chunk::<3>() else { return };
    let rules = rules(*how);
    let whole = serve(&rules, &[input]);
    match rules.form {
        ReplyForm::Simple | ReplyForm::Structured => drop(read_stream(&whole.replies, &whole.reads)),
        ReplyForm::Extended => drop(read_extended_stream(&whole.replies)),
    }
    assert_eq!(serve(&rules, &pieces(input, *cuts)), whole);
    if input.len() < 200 {
        assert_eq!(serve(&rules, &input.chunks(1).collect::<Vec<_>>()), whole);
    }
}

/// What was agreed, by four bytes.
pub(super) fn rules([size, flags_high, flags_low, rest]: [u8; 4]) -> SessionRules {
    let flags = TransmissionFlags::from_bits_truncate(u16::from_be_bytes([flags_high, flags_low]));
    let form = match (rest & 1 != 0, rest & 0x20 != 0) {
        (false, _) => ReplyForm::Simple,
        (true, false) => ReplyForm::Structured,
        (true, true) => ReplyForm::Extended,
    };
    SessionRules {
        size: SIZES[usize::from(size & 7)],
        flags,
        form,
        contexts: usize::from(form.is_chunked() && rest & 2 != 0),
        block_min_len: [1, 1, 512, 65536][usize::from(rest >> 2 & 3)],
        payload_max_len: if rest & 0x10 == 0 { 32 << 20 } else { 1000 },
    }
}

/// A session without a disk: what it reads is zeroes.
fn serve(rules: &SessionRules, pieces: &[&[u8]]) -> Outcome {
    let mut outcome = Outcome::default();
    let mut held = Vec::new();
    let mut skip = 0;
    for piece in pieces {
        held.extend_from_slice(piece);
        loop {
            let skipped = held.len().min(skip);
            held.drain(..skipped);
            skip -= skipped;
            if skip > 0 || outcome.end.is_some() {
                break;
            }
            let header_len = rules.form.request_header_len();
            match parse(&held, rules.form) {
                Parsed::NeedMore => {
                    assert!(held.len() < header_len);
                    break;
                }
                Parsed::BadMagic => outcome.end = Some(End::BadMagic),
                Parsed::Request(request) => {
                    // Only this payload decides on the answer; it is short once the header was let through.
                    let asks_by_payload =
                        request.command == Command::BlockStatus && check(&request, rules).is_ok();
                    let wanted = if asks_by_payload { request.payload_len as usize } else { 0 };
                    if held.len() < header_len + wanted {
                        break;
                    }
                    let header: Vec<u8> = held.drain(..header_len).collect();
                    check_fields(&request, &header, rules.form);
                    let payload: Vec<u8> = held.get(..wanted).unwrap_or_default().to_vec();
                    skip = answer(rules, &request, &payload, &mut outcome);
                }
            }
        }
    }
    outcome.left = held.len();
    outcome
}

fn check_fields(request: &Request, header: &[u8], form: ReplyForm) {
    let number =
        |from: usize, to: usize| header[from..to].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let (magic, end) = if form == ReplyForm::Extended { (0x21e4_1c71, 32) } else { (0x2560_9513, 28) };
    assert_eq!(number(0, 4), magic);
    assert_eq!(u64::from(request.flags.bits()), number(4, 6));
    assert_eq!(request.command, Command::from_wire(number(6, 8) as u16));
    assert_eq!((request.cookie, request.offset), (number(8, 16), number(16, 24)));
    assert_eq!(request.len, number(24, end));
    let carries = request.command == Command::Write
        || form == ReplyForm::Extended && request.flags.contains(CommandFlags::PAYLOAD_LEN);
    assert_eq!(request.payload_len, if carries { request.len } else { 0 });
}

/// Answers a request; returns how many bytes of payload follow it.
fn answer(rules: &SessionRules, request: &Request, payload: &[u8], outcome: &mut Outcome) -> usize {
    let refused = refused(rules, request);
    outcome.requests += 1;
    let to = ReplyTo { cookie: outcome.requests, ..ReplyTo::new(rules.form, request) };
    match check(request, rules) {
        Ok(()) => {
            assert_eq!(refused, None, "{request:?} is served under {rules:?}");
            if request.command == Command::Disconnect {
                outcome.end = Some(End::Disconnect);
            } else {
                push_answer(rules, request, payload, to, outcome);
            }
            request.payload_len as usize
        }
        Err(Reject { errno, text, payload }) => {
            assert!(refused.is_some(), "{request:?} is refused ({text}) under {rules:?}");
            assert!(refused.is_none_or(|allowed| allowed.contains(&errno)), "{request:?}: {errno:?}");
            reply::push_failure(&mut outcome.replies, to, errno, text);
            match payload {
                Disposition::Nothing => assert_eq!(request.payload_len, 0),
                Disposition::Drain { len } => {
                    assert!(len == request.payload_len && len <= drain_max(rules));
                    return len as usize;
                }
                Disposition::HangUp => {
                    assert!(request.payload_len > drain_max(rules));
                    outcome.end = Some(End::HungUp);
                }
            }
            0
        }
    }
}

/// Longer payloads are not read off: where the header says that they are payloads, by the protocol.
fn drain_max(rules: &SessionRules) -> u64 {
    match rules.form {
        ReplyForm::Simple | ReplyForm::Structured => DRAIN_MAX_LEN,
        ReplyForm::Extended => rules.payload_max_len.into(),
    }
}

/// The errors that the protocol has for this request; `None` when it is to be served.
fn refused(rules: &SessionRules, request: &Request) -> Option<Vec<NbdError>> {
    use TransmissionFlags as Offer;
    let offers = |flag| rules.flags.contains(flag);
    let read_only = offers(Offer::READ_ONLY);
    let mut errors = Vec::new();
    let mut unless = |good: bool, error| {
        if !good {
            errors.push(error);
        }
    };
    let fua = if offers(Offer::SEND_FUA) { 1u16 } else { 0 };
    let fast = if offers(Offer::SEND_FAST_ZERO) { 16 } else { 0 };
    let extended = rules.form == ReplyForm::Extended;
    let df = if rules.form.is_chunked() && offers(Offer::SEND_DF) { 4 } else { 0 };
    let (known, flags, ranged, changes) = match request.command {
        Command::Disconnect => return None,
        Command::Read => (true, df, true, false),
        Command::Write => (true, if extended { 32 } else { 0 }, true, true),
        Command::Flush => (offers(Offer::SEND_FLUSH), 0, false, false),
        Command::Trim => (offers(Offer::SEND_TRIM), 0, true, true),
        Command::Cache => (true, 0, true, false),
        Command::WriteZeroes => (offers(Offer::SEND_WRITE_ZEROES), 2 | fast, true, true),
        Command::BlockStatus if request.flags.contains(CommandFlags::PAYLOAD_LEN) => {
            // A length and the number of a context; the range is in there.
            let known = extended && offers(Offer::BLOCK_STATUS_PAYLOAD) && rules.contexts == 1;
            (known && request.len == 12, 8 | 32, false, false)
        }
        Command::BlockStatus => (rules.contexts > 0 && request.len > 0, 8, true, false),
        Command::Unknown(_) => (false, 0, true, false),
    };
    unless(!(changes && read_only), NbdError::Eperm);
    unless(known, NbdError::Einval);
    unless(request.flags.bits() & !(flags | fua) == 0, NbdError::Einval);
    if ranged {
        let end = u128::from(request.offset) + u128::from(request.len);
        let grows = matches!(request.command, Command::Write | Command::WriteZeroes);
        let beyond = if grows { NbdError::Enospc } else { NbdError::Einval };
        unless(end <= u128::from(rules.size), beyond);
        let unit = u128::from(rules.block_min_len);
        let aligned =
            u128::from(request.offset) % unit == 0 && (end % unit == 0 || end == u128::from(rules.size));
        unless(aligned, NbdError::Einval);
        let payload = matches!(request.command, Command::Read | Command::Write);
        unless(!payload || request.len <= rules.payload_max_len.into(), NbdError::Einval);
    }
    (!errors.is_empty()).then_some(errors)
}

fn push_answer(rules: &SessionRules, request: &Request, payload: &[u8], to: ReplyTo, outcome: &mut Outcome) {
    let out = &mut outcome.replies;
    match request.command {
        Command::Read if rules.form.is_chunked() && request.len > 0 => {
            out.extend_from_slice(&reply::offset_hole(to, request.offset, request.len as u32, Place::Last));
        }
        Command::Read if !rules.form.is_chunked() && request.len < 5000 => {
            out.extend_from_slice(&reply::simple(None, to.cookie));
            out.resize(out.len() + request.len as usize, 0);
            outcome.reads.insert(to.cookie, request.len as usize);
        }
        Command::BlockStatus if request.payload_len > 0 => {
            let agreed = [AgreedContext { id: CONTEXT, name: "base:allocation".to_owned() }];
            match status_payload(request, payload, rules, &agreed) {
                Ok((asked, ids)) => {
                    assert_eq!(ids, [CONTEXT]);
                    assert!(asked.len > 0 && asked.offset + asked.len <= rules.size);
                    push_status(rules, &asked, to, out);
                }
                Err(reject) => {
                    assert_eq!((reject.errno, reject.payload), (NbdError::Einval, Disposition::Nothing));
                    reply::push_failure(out, to, reject.errno, reject.text);
                }
            }
        }
        Command::BlockStatus => push_status(rules, request, to, out),
        Command::Read
        | Command::Write
        | Command::Disconnect
        | Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::WriteZeroes
        | Command::Unknown(_) => out.extend_from_slice(&reply::success(to)),
    }
}

/// Extents of runs whose lengths follow from the cookie.
fn push_status(rules: &SessionRules, request: &Request, to: ReplyTo, out: &mut Vec<u8>) {
    let mut builder = Builder::new(request, rules).with_extents_max(1 + (request.cookie & 15) as usize);
    let mut number = request.cookie | 1;
    for run in 0.. {
        number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(request.cookie);
        let len = (number >> (number & 63)).max(1);
        if builder.position() >= rules.size || run > 100 || builder.push(len, run & 3) == Progress::Full {
            break;
        }
    }
    let extents = builder.finish();
    assert!(!extents.is_empty());
    let mut at = request.offset;
    let end = request.offset + request.len;
    let len_max = if rules.form == ReplyForm::Extended { u64::MAX } else { u32::MAX.into() };
    for (index, extent) in extents.iter().enumerate() {
        let last = index + 1 == extents.len();
        assert!(
            extent.len > 0 && extent.len <= len_max && at < end,
            "an extent from {at}, the request ends at {end}"
        );
        at += extent.len;
        assert!(at <= rules.size && (last || at <= end));
        assert!(last || extents[index + 1].flags != extent.flags || extent.len > len_max - (64 << 10));
    }
    let req_one = request.flags.bits() & 8 != 0;
    assert!(!req_one || (extents.len() == 1 && at <= end));
    reply::push_block_status(out, to, CONTEXT, &extents, Place::Last);
}
