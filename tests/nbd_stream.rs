//! A whole connection without a socket: negotiation, then requests good and bad, through the smallest session that
//! keeps to what [`check`] says. Every request but DISC is answered once, by its cookie, with the error that it
//! deserves, and the stream is in step to the end (S7).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use std::collections::{HashMap, HashSet};

use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::negotiate::{Agreed, Next};
use nbd_img::nbd::reply::{self, Place};
use nbd_img::nbd::request::{Command, Disposition, Parsed, REQUEST_HEADER_LEN, SessionRules, check, parse};
use nbd_img::nbd::wire::StatusExtent;
use nbd_support::replies::{Item, read_stream};
use nbd_support::{Exports, MODERN, client, go, meta_data, option, request, run};
use proptest::prelude::*;

fn negotiate(structured: bool) -> Agreed {
    let mut options = vec![go("disk")];
    if structured {
        options.insert(0, option(8, b""));
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
        let request = match parse(input) {
            Parsed::Request(request) => request,
            Parsed::NeedMore => return (out, false),
            Parsed::BadMagic => panic!("out of step"),
        };
        input = &input[REQUEST_HEADER_LEN..];
        let payload_len = match check(&request, &rules) {
            Ok(()) => request.payload_len(),
            Err(reject) => {
                reply::push_failure(&mut out, agreed.structured, request.cookie, reject.errno, reject.text);
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
            Command::Read if agreed.structured && request.len > 0 => {
                reply::push_offset_hole(&mut out, request.cookie, request.offset, request.len, Place::Last);
            }
            Command::Read if !agreed.structured => {
                reply::push_simple(&mut out, None, request.cookie);
                out.resize(out.len() + usize::try_from(request.len).unwrap(), 0);
            }
            Command::BlockStatus => {
                let extent = StatusExtent { len: request.len.into(), flags: 3.into() };
                let id = agreed.contexts[0].id;
                reply::push_block_status(&mut out, request.cookie, id, &[extent], Place::Last);
            }
            _ => reply::push_success(&mut out, agreed.structured, request.cookie),
        }
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
    for structured in [false, true] {
        let agreed = negotiate(structured);
        for (flags, command, offset, len, errno) in bad {
            let mut input = request(flags, command, 1, offset, len);
            if command == 1 {
                // A payload that looks like requests must not be read as requests.
                let decoy = request(0, 2, 666, 0, 0);
                input.extend(decoy.iter().cycle().take(usize::try_from(len).unwrap()));
            }
            input.extend(request(0, 0, 2, 0, 512));
            input.extend(request(0, 2, 3, 0, 0));
            let (out, goodbye) = serve(&agreed, &input);
            assert!(goodbye);
            let items = read_stream(&out, &HashMap::from([(2, 512)]));
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
        structured in any::<bool>(),
    ) {
        let agreed = negotiate(structured);
        let mut input = Vec::new();
        let mut reads = HashMap::new();
        for (cookie, (flags, command, offset, len)) in (0..).zip(&requests) {
            // The tests' clients only say goodbye at the end.
            let command = if *command == 2 { 3 } else { *command };
            input.extend(request(*flags, command, cookie, *offset, *len));
            if command == 1 {
                input.extend(vec![0x25; usize::try_from(*len).unwrap()]);
            }
            if command == 0 && !structured {
                reads.insert(cookie, usize::try_from(*len).unwrap());
            }
        }
        input.extend(request(0, 2, u64::MAX, 0, 0));
        let (out, goodbye) = serve(&agreed, &input);
        prop_assert!(goodbye);
        let items = read_stream(&out, &reads);
        let cookies: HashSet<_> = items.iter().map(|item| cookie_and_error(item).0).collect();
        prop_assert_eq!((items.len(), cookies.len()), (requests.len(), requests.len()));
    }
}
