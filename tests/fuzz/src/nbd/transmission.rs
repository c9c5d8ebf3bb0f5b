//! Target `nbd_transmission`: what a client sends after an export is agreed, cut into pieces anywhere.
//!
//! The first four bytes choose what was agreed, the next three where the input is cut. Each request is judged a
//! second time, by the words of the protocol; refused or not, the stream has to stay in step, and every reply is
//! read by the tests' own reader.

use std::collections::HashMap;

use nbd_img::nbd::block_status::{Builder, Progress};
use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::reply::{self, Place};
use nbd_img::nbd::request::{
    Command, DRAIN_MAX_LEN, Disposition, Parsed, REQUEST_HEADER_LEN, Reject, Request, SessionRules, check,
    parse,
};

use super::handshake::pieces;
use crate::nbd_support::replies::read_stream;

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
    read_stream(&whole.replies, &whole.reads);
    assert_eq!(serve(&rules, &pieces(input, *cuts)), whole);
    if input.len() < 200 {
        assert_eq!(serve(&rules, &input.chunks(1).collect::<Vec<_>>()), whole);
    }
}

fn rules([size, flags_high, flags_low, rest]: [u8; 4]) -> SessionRules {
    let flags = TransmissionFlags::from_bits_truncate(u16::from_be_bytes([flags_high, flags_low]));
    let structured = rest & 1 != 0;
    SessionRules {
        size: SIZES[usize::from(size & 7)],
        flags,
        structured,
        contexts: structured && rest & 2 != 0,
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
            match parse(&held) {
                Parsed::NeedMore => {
                    assert!(held.len() < REQUEST_HEADER_LEN);
                    break;
                }
                Parsed::BadMagic => outcome.end = Some(End::BadMagic),
                Parsed::Request(request) => {
                    let header: Vec<u8> = held.drain(..REQUEST_HEADER_LEN).collect();
                    check_fields(&request, &header);
                    skip = answer(rules, &request, &mut outcome);
                }
            }
        }
    }
    outcome.left = held.len();
    outcome
}

fn check_fields(request: &Request, header: &[u8]) {
    let number =
        |from: usize, to: usize| header[from..to].iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
    assert_eq!(number(0, 4), 0x2560_9513);
    assert_eq!(u64::from(request.flags.bits()), number(4, 6));
    assert_eq!(request.command, Command::from_wire(number(6, 8) as u16));
    assert_eq!((request.cookie, request.offset), (number(8, 16), number(16, 24)));
    assert_eq!(u64::from(request.len), number(24, 28));
}

/// Answers a request; returns how many bytes of payload follow it.
fn answer(rules: &SessionRules, request: &Request, outcome: &mut Outcome) -> usize {
    let refused = refused(rules, request);
    outcome.requests += 1;
    let number = outcome.requests;
    match check(request, rules) {
        Ok(()) => {
            assert_eq!(refused, None, "{request:?} is served under {rules:?}");
            if request.command == Command::Disconnect {
                outcome.end = Some(End::Disconnect);
            } else {
                push_answer(rules, request, outcome);
            }
            request.payload_len() as usize
        }
        Err(Reject { errno, text, payload }) => {
            assert!(refused.is_some(), "{request:?} is refused ({text}) under {rules:?}");
            assert!(refused.is_none_or(|allowed| allowed.contains(&errno)), "{request:?}: {errno:?}");
            reply::push_failure(&mut outcome.replies, rules.structured, number, errno, text);
            match payload {
                Disposition::Nothing => assert_eq!(request.payload_len(), 0),
                Disposition::Drain { len } => {
                    assert!(request.command == Command::Write && len == request.len && len <= DRAIN_MAX_LEN);
                    return len as usize;
                }
                Disposition::HangUp => {
                    assert!(request.len > DRAIN_MAX_LEN);
                    outcome.end = Some(End::HungUp);
                }
            }
            0
        }
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
    let df = if rules.structured && offers(Offer::SEND_DF) { 4 } else { 0 };
    let (known, flags, ranged, changes) = match request.command {
        Command::Disconnect => return None,
        Command::Read => (true, df, true, false),
        Command::Write => (true, 0, true, true),
        Command::Flush => (offers(Offer::SEND_FLUSH), 0, false, false),
        Command::Trim => (offers(Offer::SEND_TRIM), 0, true, true),
        Command::Cache => (true, 0, true, false),
        Command::WriteZeroes => (offers(Offer::SEND_WRITE_ZEROES), 2 | fast, true, true),
        Command::BlockStatus => (rules.contexts && request.len > 0, 8, true, false),
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
        unless(!payload || request.len <= rules.payload_max_len, NbdError::Einval);
    }
    (!errors.is_empty()).then_some(errors)
}

fn push_answer(rules: &SessionRules, request: &Request, outcome: &mut Outcome) {
    let (out, number) = (&mut outcome.replies, outcome.requests);
    match request.command {
        Command::Read if rules.structured && request.len > 0 => {
            reply::push_offset_hole(out, number, request.offset, request.len, Place::Last);
        }
        Command::Read if !rules.structured && request.len < 5000 => {
            reply::push_simple(out, None, number);
            out.resize(out.len() + request.len as usize, 0);
            outcome.reads.insert(number, request.len as usize);
        }
        Command::BlockStatus => push_status(rules, request, out),
        Command::Read
        | Command::Write
        | Command::Disconnect
        | Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::WriteZeroes
        | Command::Unknown(_) => reply::push_success(out, rules.structured, number),
    }
}

/// Extents of runs whose lengths follow from the cookie.
fn push_status(rules: &SessionRules, request: &Request, out: &mut Vec<u8>) {
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
    let end = request.offset + u64::from(request.len);
    for (index, extent) in extents.iter().enumerate() {
        let last = index + 1 == extents.len();
        assert!(extent.len.get() > 0 && at < end, "an extent from {at}, the request ends at {end}");
        at += u64::from(extent.len.get());
        assert!(at <= rules.size && (last || at <= end));
        assert!(last || extents[index + 1].flags != extent.flags || extent.len.get() > u32::MAX - (64 << 10));
    }
    let req_one = request.flags.bits() & 8 != 0;
    assert!(!req_one || (extents.len() == 1 && at <= end));
    reply::push_block_status(out, request.cookie, CONTEXT, &extents, Place::Last);
}
