//! A whole connection without a socket: negotiation, then requests good and bad, through the smallest session that
//! keeps to what [`check`] says. Every request but DISC is answered once, by its cookie, with the error that it
//! deserves, and the stream is in step to the end (S7).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use std::collections::{HashMap, HashSet};

use nbd_img::nbd::block_status::Extent;
use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::negotiate::{Agreed, Next};
use nbd_img::nbd::reply::{self, Place, ReplyForm, ReplyTo};
use nbd_img::nbd::request::{Command, Disposition, Parsed, SessionRules, check, parse};
use nbd_support::replies::{Item, read_extended_stream, read_stream};
use nbd_support::{Exports, MODERN, client, extended_request, go, meta_data, option, request, run};
use proptest::prelude::*;

fn negotiate(form: ReplyForm) -> Agreed {
    let mut options = vec![go("disk")];
    if form != ReplyForm::Simple {
        options.insert(0, option(if form == ReplyForm::Structured { 8 } else { 11 }, b""));
        options.insert(1, option(10, &meta_data("disk", &["base:allocation"])));
    }
    match run(&Exports::new(), &client(MODERN, &options)).next {
        Next::Transmission(agreed) => agreed,
        other => panic!("{other:?}"),
    }
}

/// Serves an export that reads as zeroes. Gives the replies, and true if the client said goodbye.
fn serve(agreed: &Agreed, mut input: &[u8]) -> (Vec<u8>, bool) {
    let rules = SessionRules::new(agreed);
    let mut out = Vec::new();
    loop {
        let request = match parse(input, agreed.form) {
            Parsed::Request(request) => request,
            Parsed::NeedMore => return (out, false),
            Parsed::BadMagic => panic!("out of step"),
        };
        input = &input[agreed.form.request_header_len()..];
        let to = ReplyTo::new(agreed.form, &request);
        let payload_len = match check(&request, &rules) {
            Ok(()) => request.payload_len,
            Err(reject) => {
                reply::push_failure(&mut out, to, reject.errno, reject.text);
                match reject.payload {
                    Disposition::Nothing => 0,
                    Disposition::Drain { len } => len,
                    Disposition::HangUp => return (out, false),
                }
            }
        };
        input = &input[usize::try_from(payload_len).unwrap()..];
        if check(&request, &rules).is_err() {
            continue;
        }
        match request.command {
            Command::Disconnect => return (out, true),
            Command::Read if agreed.form.is_chunked() && request.len > 0 => {
                let len = u32::try_from(request.len).unwrap();
                out.extend_from_slice(&reply::offset_hole(to, request.offset, len, Place::Last));
            }
            Command::Read if !agreed.form.is_chunked() => {
                out.extend_from_slice(&reply::simple(None, request.cookie));
                out.resize(out.len() + usize::try_from(request.len).unwrap(), 0);
            }
            Command::BlockStatus => {
                let extent = Extent { len: request.len, flags: 3 };
                let id = agreed.contexts[0].id;
                reply::push_block_status(&mut out, to, id, &[extent], Place::Last);
            }
            _ => out.extend_from_slice(&reply::success(to)),
        }
    }
}

const FORMS: [ReplyForm; 3] = [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended];

fn message(form: ReplyForm, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    match form {
        ReplyForm::Extended => extended_request(flags, command, cookie, offset, len.into()),
        ReplyForm::Simple | ReplyForm::Structured => request(flags, command, cookie, offset, len),
    }
}

fn read(form: ReplyForm, out: &[u8], reads: &HashMap<u64, usize>) -> Vec<Item> {
    match form {
        ReplyForm::Extended => read_extended_stream(out).into_iter().map(|(_, item)| item).collect(),
        ReplyForm::Simple | ReplyForm::Structured => read_stream(out, reads),
    }
}

fn cookie_and_error(item: &Item) -> (u64, u32) {
    match item {
        Item::Simple { cookie, error, .. } => (*cookie, *error),
        Item::Error { cookie, error, done: true, .. } => (*cookie, *error),
        Item::None { cookie }
        | Item::Data { cookie, done: true, .. }
        | Item::Hole { cookie, done: true, .. }
        | Item::Status { cookie, done: true, .. } => (*cookie, 0),
        other => panic!("a reply of more than one chunk: {other:?}"),
    }
}

/// Each bad request of the tables, with a good READ behind it.
#[test]
fn stream_is_in_step_after_each_refusal() {
    let size = 1_u64 << 30;
    // Flags, command, offset, length, error.
    let bad = [
        (0, 99, 0, 512, NbdError::Einval),
        (0x80, 0, 0, 512, NbdError::Einval),
        (2, 0, 0, 512, NbdError::Einval),
        (0, 0, size, 512, NbdError::Einval),
        (0, 0, 0, 33 << 20, NbdError::Einval),
        (0, 1, size - 1, 512, NbdError::Enospc),
        (0, 1, u64::MAX, 512, NbdError::Enospc),
        (0x20, 1, 0, 512, NbdError::Einval),
        (0, 1, 0, (32 << 20) + 512, NbdError::Einval),
        (0, 4, size, 512, NbdError::Einval),
        (0, 5, size, 512, NbdError::Einval),
        (0, 6, size, 512, NbdError::Enospc),
        (4, 6, 0, 512, NbdError::Einval),
        (0, 7, size, 512, NbdError::Einval),
        (0, 7, 0, 0, NbdError::Einval),
    ];
    for form in FORMS {
        let agreed = negotiate(form);
        for (flags, command, offset, len, errno) in bad {
            // With extended headers a payload has to be announced, so the flag is right there.
            let flags = if form == ReplyForm::Extended && command == 1 { flags ^ 0x20 } else { flags };
            let header =
                |flags, command, cookie, offset, len| message(form, flags, command, cookie, offset, len);
            let mut input = header(flags, command, 1, offset, len);
            if flags & 0x20 == 0 && form == ReplyForm::Extended && command == 1 {
                continue;
            }
            if len > 32 << 20 && form == ReplyForm::Extended && command == 1 {
                continue;
            }
            if command == 1 {
                // A payload that looks like requests must not be read as requests.
                let decoy = header(0, 2, 666, 0, 0);
                input.extend(decoy.iter().cycle().take(usize::try_from(len).unwrap()));
            }
            input.extend(header(0, 0, 2, 0, 512));
            input.extend(header(0, 2, 3, 0, 0));
            let (out, goodbye) = serve(&agreed, &input);
            assert!(goodbye);
            let items = read(form, &out, &HashMap::from([(2, 512)]));
            let seen: Vec<_> = items.iter().map(cookie_and_error).collect();
            assert_eq!(seen, [(1, errno.wire()), (2, 0)], "command {command} with {flags:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_answered_once(
        requests in prop::collection::vec(
            (
                prop_oneof![4 => Just(0_u16), 1 => 0_u16..64],
                0_u16..9,
                prop_oneof![0..1_u64 << 30, (1_u64 << 30) - 4096..1 << 30, any::<u64>()],
                0_u32..5000,
            ),
            0..30,
        ),
        form in prop::sample::select(&FORMS[..]),
    ) {
        let agreed = negotiate(form);
        let mut input = Vec::new();
        let mut reads = HashMap::new();
        for (cookie, (flags, command, offset, len)) in (0..).zip(&requests) {
            // The tests' clients only say goodbye at the end.
            let command = if *command == 2 { 3 } else { *command };
            let mut flags = *flags;
            if form == ReplyForm::Extended {
                // Payloads are as the command has them; others have tests of their own.
                flags = if command == 1 { flags | 0x20 } else { flags & !0x20 };
            }
            input.extend(message(form, flags, command, cookie, *offset, *len));
            if command == 1 {
                input.extend(vec![0x25; usize::try_from(*len).unwrap()]);
            }
            if command == 0 && form == ReplyForm::Simple {
                reads.insert(cookie, usize::try_from(*len).unwrap());
            }
        }
        input.extend(message(form, 0, 2, u64::MAX, 0, 0));
        let (out, goodbye) = serve(&agreed, &input);
        prop_assert!(goodbye);
        let items = read(form, &out, &reads);
        let cookies: HashSet<_> = items.iter().map(|item| cookie_and_error(item).0).collect();
        prop_assert_eq!((items.len(), cookies.len()), (requests.len(), requests.len()));
    }
}
