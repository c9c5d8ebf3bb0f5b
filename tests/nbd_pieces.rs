//! A handshake that arrives in pieces, or is cut off, means what it means whole.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::negotiate::{Next, TlsMode};
use nbd_support::*;

/// A negotiation that meets every option, good and bad.
fn long_session() -> Vec<u8> {
    let mut input = client(
        MODERN,
        &[
            option(3, b""),
            option(3, b"bad"),
            option(11, b""),
            option(8, b"bad"),
            option(8, b""),
            option(5, b""),
            option(77, b"unknown"),
            option(9, &meta_data("snap", &["qemu:"])),
            option(10, &meta_data("disk", &["base:allocation", "base:allocation"])),
            option(6, &info_data("nothing", &[1, 2, 3])),
            option(6, &info_data("", &[1, 2, 3, 99])),
            option(7, b"\0\0"),
            option(7, &info_data("disk", &[3])),
        ],
    );
    input.extend(request(0, 2, 0, 0, 0));
    input
}

/// S23: what arrives in pieces means the same.
#[test]
fn every_split_into_two_pieces_gives_the_same() {
    let exports = Exports::new();
    for input in [long_session(), client(0, &[option(1, b"disk")]), client(MODERN, &[option(2, b"x")])] {
        let whole = run(&exports, &input);
        for at in 0..=input.len() {
            let (head, tail) = input.split_at(at);
            assert_eq!(run_pieces(TlsMode::Off, &exports, [head, tail]), whole, "split at {at}");
        }
    }
}

#[test]
fn byte_by_byte_gives_the_same() {
    let exports = Exports::new();
    let input = long_session();
    assert_eq!(run_pieces(TlsMode::Off, &exports, input.chunks(1)), run(&exports, &input));
}

/// S4: a client that goes away anywhere leaves a negotiation that waits, and whole replies.
#[test]
fn every_cut_handshake_waits_with_whole_replies() {
    let exports = Exports::new();
    let input = long_session();
    let end = input.len() - 28;
    for at in 0..end {
        let run = run(&exports, &input[..at]);
        assert_eq!(run.next, Next::NeedMore, "cut at {at}");
        replies(&run.out);
    }
}
