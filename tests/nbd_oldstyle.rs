//! The oldstyle negotiation: what the server says is a table of its own, and all that the client says are requests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::negotiate::{CloseReason, Negotiation, NegotiationConfig, Next, TlsMode};
use nbd_img::nbd::reply::ReplyForm;
use nbd_support::*;

/// What is said before anything is received, and what comes of it when `pieces` are.
fn oldstyle<'a>(exports: &Exports, pieces: impl IntoIterator<Item = &'a [u8]>) -> Run {
    let mut negotiation =
        Negotiation::new(NegotiationConfig { tls: TlsMode::Off, tls_up: false, oldstyle: true });
    let mut out = Vec::new();
    negotiation.greeting(&mut out);
    let mut pieces = pieces.into_iter();
    let mut left = pieces.next().unwrap_or_default().to_vec();
    let step = negotiation.step(&left, exports, &mut out);
    assert_eq!(step.consumed, 0, "all that an oldstyle client sends are requests");
    left.extend(pieces.flatten());
    Run { out, left, next: step.next }
}

/// NBDMAGIC, cliserv_magic, size, flags, zeroes: the whole of the phase.
#[test]
fn greeting_by_the_table() {
    let all = TransmissionFlags::all();
    for (size, flags, on_the_wire) in [
        (0, TransmissionFlags::empty(), 0x0001),
        (1 << 30, TransmissionFlags::SEND_FLUSH, 0x0005),
        (1000, TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH, 0x0007),
        // No structured replies: so no DF, and nothing that only extended headers have.
        (u64::MAX / 2, all - TransmissionFlags::READ_ONLY, 0x0d7d),
        // What a read-only export cannot do is not offered.
        (512, all, 0x051f),
    ] {
        let mut exports = Exports::new();
        exports.exports[0].size = size;
        exports.exports[0].flags = flags;
        let run = oldstyle(&exports, []);
        let mut expected = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53".to_vec();
        expected.extend(size.to_be_bytes());
        expected.extend([0, 0]);
        expected.extend((on_the_wire as u16).to_be_bytes());
        expected.resize(8 + 8 + 8 + 4 + 124, 0);
        assert_eq!(run.out, expected, "{size} {flags:?}");
        let agreed = agreed(&run);
        assert_eq!((agreed.info.size, agreed.info.flags.bits()), (size, on_the_wire as u16));
        assert_eq!(agreed.form, ReplyForm::Simple);
        assert!(agreed.contexts.is_empty() && !agreed.block_size_asked && !agreed.no_zeroes);
        assert_eq!((agreed.export.as_str(), agreed.info.name.as_str()), ("", "disk"));
    }
}

#[test]
fn every_split_of_what_the_client_sends_is_left_for_the_session() {
    let exports = Exports::new();
    let input = [request(0, 0, 1, 0, 512), request(0, 2, 2, 0, 0)].concat();
    let whole = oldstyle(&exports, [input.as_slice()]);
    assert_eq!(whole.left, input);
    for at in 0..=input.len() {
        let (head, tail) = input.split_at(at);
        assert_eq!(oldstyle(&exports, [head, tail]), whole, "split at {at}");
    }
    assert_eq!(oldstyle(&exports, input.chunks(1)), whole);
    // A newstyle client's first bytes are no requests either, which the session will find.
    let modern = client(MODERN, &[go("disk")]);
    assert_eq!(oldstyle(&exports, [modern.as_slice()]).left, modern);
}

#[test]
fn who_cannot_have_the_export_is_told_nothing() {
    let closed_without_a_word = |exports: &Exports| {
        let run = oldstyle(exports, [go("disk").as_slice()]);
        assert!(run.out.is_empty());
        let reason = closed(&run).clone();
        assert!(matches!(reason, CloseReason::OldstyleRefused(_)), "{reason}");
    };
    closed_without_a_word(&Exports { exports: vec![], draining: false });
    closed_without_a_word(&Exports { draining: true, ..Exports::new() });
    let mut secret = Exports::new();
    secret.exports[0].tls_required = true;
    closed_without_a_word(&secret);
}

#[test]
fn it_is_over_after_its_only_step() {
    let exports = Exports::new();
    let mut negotiation =
        Negotiation::new(NegotiationConfig { tls: TlsMode::Off, tls_up: false, oldstyle: true });
    let mut out = Vec::new();
    assert!(matches!(negotiation.step(&[], &exports, &mut out).next, Next::Transmission(_)));
    let len = out.len();
    let next = negotiation.step(&go("disk"), &exports, &mut out).next;
    assert_eq!(next, Next::Close { reason: CloseReason::AlreadyOver });
    assert_eq!(out.len(), len);
}
