//! Replies as a client sees them: an independent reader of the stream, which knows the protocol's rules on lengths
//! and order, reads what the encoders wrote.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use std::collections::HashMap;

use nbd_img::nbd::block_status::{EXTENTS_MAX, Extent};
use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::reply::*;
use nbd_support::replies::{Item, read_extended_stream, read_stream};
use proptest::prelude::*;

fn only_item(bytes: &[u8]) -> Item {
    let mut items = read_stream(bytes, &HashMap::new());
    assert_eq!(items.len(), 1);
    items.remove(0)
}

fn extents(pairs: &[(u64, u64)]) -> Vec<Extent> {
    pairs.iter().map(|(len, flags)| Extent { len: *len, flags: u32::try_from(*flags).unwrap() }).collect()
}

/// To a request at offset 0x55.
fn to(form: ReplyForm, cookie: u64) -> ReplyTo {
    ReplyTo { form, cookie, offset: 0x55 }
}

fn chunked(cookie: u64) -> ReplyTo {
    to(ReplyForm::Structured, cookie)
}

#[test]
fn lengths_are_the_protocols() {
    assert_eq!(simple(None, 1).len(), 16);
    for (form, data_len, hole_len) in [(ReplyForm::Structured, 28, 32), (ReplyForm::Extended, 40, 44)] {
        assert_eq!(offset_data(to(form, 1), 0, 1, Place::Last).len(), data_len);
        assert_eq!(offset_hole(to(form, 1), 0, 1, Place::Last).len(), hole_len);
    }
    assert_eq!(HEAD_LEN_MAX, 44);
    assert_eq!(ReplyForm::Simple.request_header_len(), 28);
    assert_eq!(ReplyForm::Structured.request_header_len(), 28);
    assert_eq!(ReplyForm::Extended.request_header_len(), 32);
}

#[test]
fn simple_header_bytes() {
    assert_eq!(
        *simple(Some(NbdError::Enospc), 0x0102_0304_0506_0708),
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(*simple(None, 1), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn chunk_header_bytes() {
    let mut out = Vec::new();
    out.extend_from_slice(&success(chunked(0x0102_0304_0506_0708)));
    assert_eq!(out, [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
    out.clear();
    out.extend_from_slice(&success(to(ReplyForm::Extended, 0x0102_0304_0506_0708)));
    let header = [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let offset_and_len = [0, 0, 0, 0, 0, 0, 0, 0x55, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(out, [header, offset_and_len].concat());
}

#[test]
fn header_is_patched_in_front_of_data() {
    let mut out = vec![0; 28];
    out.extend([0xab; 512]);
    out[..28].copy_from_slice(&offset_data(chunked(7), 1 << 40, 512, Place::Last));
    let expected = Item::Data { cookie: 7, offset: 1 << 40, data: vec![0xab; 512], done: true };
    assert_eq!(only_item(&out), expected);
}

#[test]
fn success_and_failure_come_in_the_agreed_form() {
    for (form, expected) in [
        (ReplyForm::Structured, [Item::None { cookie: 3 }, error_item(4, 22, "no")]),
        (
            ReplyForm::Simple,
            [
                Item::Simple { cookie: 3, error: 0, data: vec![] },
                Item::Simple { cookie: 4, error: 22, data: vec![] },
            ],
        ),
    ] {
        let mut out = Vec::new();
        out.extend_from_slice(&success(to(form, 3)));
        push_failure(&mut out, to(form, 4), NbdError::Einval, "no");
        assert_eq!(read_stream(&out, &HashMap::new()), expected);
    }
}

fn error_item(cookie: u64, error: u32, text: &str) -> Item {
    Item::Error { cookie, error, text: text.into(), offset: None, done: true }
}

#[test]
fn error_texts_are_bounded() {
    let fit = "x".repeat(4096);
    let texts = [
        ("", ""),
        (fit.as_str(), fit.as_str()),
        (&"x".repeat(70_000), &fit),
        // A character of four bytes that straddles the limit goes whole.
        (&format!("xyz{}", "\u{1f600}".repeat(2000)), &format!("xyz{}", "\u{1f600}".repeat(1023))),
        ("cut\0here", "cut"),
    ];
    for (text, expected) in texts {
        let mut out = Vec::new();
        push_error(&mut out, chunked(9), NbdError::Eio, text, Place::Last);
        assert_eq!(only_item(&out), error_item(9, 5, expected));
        out.clear();
        push_error_offset(&mut out, chunked(9), NbdError::Eio, text, u64::MAX, Place::More);
        let Item::Error { text, offset, done, .. } = only_item(&out) else { panic!() };
        assert_eq!((text.as_str(), offset, done), (expected, Some(u64::MAX), false));
    }
}

#[test]
fn every_error_has_its_wire_value() {
    use NbdError::*;
    let table = [
        (Eperm, 1),
        (Eio, 5),
        (Enomem, 12),
        (Einval, 22),
        (Enospc, 28),
        (Eoverflow, 75),
        (Enotsup, 95),
        (Eshutdown, 108),
    ];
    for (error, value) in table {
        let mut out = Vec::new();
        push_failure(&mut out, to(ReplyForm::Simple, 1), error, "text");
        assert_eq!(only_item(&out), Item::Simple { cookie: 1, error: value, data: vec![] });
    }
}

#[test]
fn sparse_read_with_a_late_error_is_in_step() {
    let mut out = Vec::new();
    out.extend_from_slice(&offset_data(chunked(1), 0, 3, Place::More));
    out.extend(*b"abc");
    out.extend_from_slice(&offset_hole(chunked(1), 3, u32::MAX, Place::More));
    push_error_offset(&mut out, chunked(1), NbdError::Eio, "bad sector", 3, Place::Last);
    out.extend_from_slice(&simple(None, 2));
    let items = read_stream(&out, &HashMap::new());
    assert_eq!(items.len(), 4);
    assert_eq!(items[1], Item::Hole { cookie: 1, offset: 3, len: u32::MAX, done: false });
    assert_eq!(items[3], Item::Simple { cookie: 2, error: 0, data: vec![] });
}

#[test]
fn block_status_chunk_holds_no_more_than_its_limit() {
    let mut out = Vec::new();
    push_block_status(&mut out, chunked(1), 5, &extents(&[(512, 3), (1024, 0)]), Place::More);
    let expected = Item::Status { cookie: 1, context: 5, extents: vec![(512, 3), (1024, 0)], done: false };
    assert_eq!(only_item(&out), expected);
    out.clear();
    push_block_status(&mut out, chunked(1), 5, &extents(&vec![(512, 1); EXTENTS_MAX + 1]), Place::Last);
    let Item::Status { extents, .. } = only_item(&out) else { panic!() };
    assert_eq!(extents.len(), EXTENTS_MAX);
}

#[test]
fn data_length_beyond_what_fits_does_not_panic() {
    let header = offset_data(chunked(1), u64::MAX, u32::MAX, Place::More);
    assert_eq!(header[16..20], [0xff; 4]);
}

fn item() -> impl Strategy<Value = Item> {
    let cookie = any::<u64>;
    let data = || prop::collection::vec(any::<u8>(), 1..64);
    let text = || "\\PC{0,40}";
    prop_oneof![
        (cookie(), prop::sample::select(&[0_u32, 1, 5, 12, 22, 28, 75, 95, 108][..]))
            .prop_map(|(cookie, error)| Item::Simple { cookie, error, data: vec![] }),
        (cookie(), data()).prop_map(|(cookie, data)| Item::Simple { cookie, error: 0, data }),
        cookie().prop_map(|cookie| Item::None { cookie }),
        (cookie(), any::<u64>(), data(), any::<bool>()).prop_map(|(cookie, offset, data, done)| Item::Data {
            cookie,
            offset,
            data,
            done
        }),
        (cookie(), any::<u64>(), 1..=u32::MAX, any::<bool>())
            .prop_map(|(cookie, offset, len, done)| Item::Hole { cookie, offset, len, done }),
        (
            cookie(),
            any::<u32>(),
            prop::collection::vec((1..1_u64 << 32, 0..1_u64 << 32), 1..20),
            any::<bool>()
        )
            .prop_map(|(cookie, context, extents, done)| Item::Status {
                cookie,
                context,
                extents,
                done
            }),
        (cookie(), text(), any::<Option<u64>>(), any::<bool>())
            .prop_map(|(cookie, text, offset, done)| Item::Error { cookie, error: 5, text, offset, done }),
    ]
}

fn encode(out: &mut Vec<u8>, form: ReplyForm, item: &Item) {
    let to = |cookie: &u64| to(form, *cookie);
    let place = |done: &bool| if *done { Place::Last } else { Place::More };
    match item {
        Item::Simple { cookie, error, data } => {
            out.extend_from_slice(&simple(error_named(*error), *cookie));
            out.extend(data);
        }
        Item::None { cookie } => out.extend_from_slice(&success(to(cookie))),
        Item::Data { cookie, offset, data, done } => {
            let len = u32::try_from(data.len()).unwrap();
            out.extend_from_slice(&offset_data(to(cookie), *offset, len, place(done)));
            out.extend(data);
        }
        Item::Hole { cookie, offset, len, done } => {
            out.extend_from_slice(&offset_hole(to(cookie), *offset, *len, place(done)));
        }
        Item::Status { cookie, context, extents: pairs, done } => {
            push_block_status(out, to(cookie), *context, &extents(pairs), place(done));
        }
        Item::Error { cookie, text, offset: Some(offset), done, .. } => {
            push_error_offset(out, to(cookie), NbdError::Eio, text, *offset, place(done));
        }
        Item::Error { cookie, text, offset: None, done, .. } => {
            push_error(out, to(cookie), NbdError::Eio, text, place(done));
        }
    }
}

fn error_named(value: u32) -> Option<NbdError> {
    use NbdError::*;
    [Eperm, Eio, Enomem, Einval, Enospc, Eoverflow, Enotsup, Eshutdown]
        .into_iter()
        .find(|e| e.wire() == value)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Replies of all kinds, one behind the other, are read back as they were meant.
    #[test]
    fn streams_are_read_back(items in prop::collection::vec(item(), 0..20)) {
        let mut out = Vec::new();
        let mut reads = HashMap::new();
        for item in &items {
            encode(&mut out, ReplyForm::Structured, item);
            if let Item::Simple { cookie, data, .. } = item {
                reads.insert(*cookie, data.len());
            }
        }
        prop_assert_eq!(read_stream(&out, &reads), items);
    }

    /// The same with extended headers, where there are no simple replies.
    #[test]
    fn extended_streams_are_read_back(items in prop::collection::vec(item(), 0..20)) {
        let items: Vec<_> =
            items.into_iter().filter(|item| !matches!(item, Item::Simple { .. })).map(|item| (0x55, item)).collect();
        let mut out = Vec::new();
        for (_, item) in &items {
            encode(&mut out, ReplyForm::Extended, item);
        }
        prop_assert_eq!(read_extended_stream(&out), items);
    }
}
