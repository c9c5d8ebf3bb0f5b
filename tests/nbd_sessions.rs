//! What real clients sent, replayed whole and byte by byte. The recordings and how they were made are in
//! testdata/sessions.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::negotiate::{Agreed, CloseReason, Next, TlsMode};
use nbd_img::nbd::reply::ReplyForm;
use nbd_support::*;

/// The kinds of replies and the end; the same in whatever pieces the recording comes.
fn replay(name: &str) -> (Vec<(u32, u32)>, Next) {
    let path = format!("{}/testdata/sessions/{name}.client", env!("CARGO_MANIFEST_DIR"));
    let recorded = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let exports = Exports::new();
    let whole = run(&exports, &recorded);
    assert!(whole.left.is_empty());
    for piece_len in [1, 2, 3, 7, 16, 17] {
        assert_eq!(run_pieces(TlsMode::Off, &exports, recorded.chunks(piece_len)), whole);
    }
    (kinds(&whole.out), whole.next)
}

fn agreed(next: Next) -> Agreed {
    match next {
        Next::Transmission(agreed) => agreed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nbdinfo_asks_and_goes() {
    let (kinds, next) = replay("nbdinfo");
    let expected = [
        (8, ACK),
        (6, INFO),
        (6, INFO),
        (6, INFO),
        (6, INFO),
        (6, ACK),
        (9, META),
        (9, ACK),
        (7, INFO),
        (7, INFO),
        (7, INFO),
        (7, INFO),
        (7, ACK),
    ];
    assert_eq!(kinds, expected);
    let agreed = agreed(next);
    assert!(
        agreed.form == ReplyForm::Structured
            && agreed.block_size_asked
            && agreed.no_zeroes
            && agreed.contexts.is_empty()
    );
}

#[test]
fn nbdinfo_lists_and_aborts() {
    let (kinds, next) = replay("nbdinfo-list");
    assert_eq!(next, Next::Close { reason: CloseReason::Aborted });
    assert_eq!(kinds.iter().filter(|kind| **kind == (3, SERVER)).count(), 2);
    // One context of "disk" and three of "snap".
    assert_eq!(kinds.iter().filter(|kind| **kind == (9, META)).count(), 4);
    assert_eq!(kinds.last(), Some(&(2, ACK)));
}

#[test]
fn nbdinfo_maps_by_base_allocation() {
    let (kinds, next) = replay("nbdinfo-map");
    assert_eq!(kinds, [(8, ACK), (10, META), (10, ACK), (7, INFO), (7, INFO), (7, ACK)]);
    assert_eq!(agreed(next).contexts[0].name, "base:allocation");
}

/// QEMU asks for extended headers first, and gets them. It was recorded with a server that had none, so that it asks
/// for structured replies too, which then are no longer to be had.
#[test]
fn qemu_gets_extended_headers() {
    let (kinds, next) = replay("qemu-img-info");
    assert_eq!(
        kinds,
        [(11, ACK), (8, EXT_HEADER_REQD), (10, META), (10, ACK), (7, INFO), (7, INFO), (7, ACK)]
    );
    let agreed = agreed(next);
    assert!(agreed.form == ReplyForm::Extended && agreed.block_size_asked);
    assert_eq!(agreed.contexts.len(), 1);
}

#[test]
fn nbdcopy_into_an_export_needs_no_context() {
    let (kinds, next) = replay("nbdcopy-to");
    assert_eq!(kinds, [(8, ACK), (7, INFO), (7, INFO), (7, ACK)]);
    assert!(agreed(next).contexts.is_empty());
}

#[test]
fn client_of_an_unknown_export_is_told_and_leaves() {
    let (kinds, next) = replay("nbdinfo-unknown-export");
    assert_eq!(kinds, [(8, ACK), (6, UNKNOWN), (7, UNKNOWN), (2, ACK)]);
    assert_eq!(next, Next::Close { reason: CloseReason::Aborted });
}
