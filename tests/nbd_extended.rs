//! Extended headers: requests of 32 bytes, lengths of 64 bits, and payloads where the header says so (the protocol's
//! extension, rule by rule).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::block_status::{Builder, Progress};
use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::negotiate::{Agreed, AgreedContext};
use nbd_img::nbd::reply::ReplyForm;
use nbd_img::nbd::request::*;
use nbd_support::wire::command::*;
use nbd_support::wire::command_flag::*;
use nbd_support::{export, extended_request, request};
use proptest::prelude::*;

const TIB: u64 = 1 << 40;
const PAYLOAD: u64 = 32 << 20;

fn contexts() -> Vec<AgreedContext> {
    let context = |id, name: &str| AgreedContext { id, name: name.into() };
    vec![context(1, "base:allocation"), context(7, "qemu:allocation-depth")]
}

fn agreed() -> Agreed {
    let mut info = export("disk", 16 * TIB);
    info.flags = info.wire_flags(ReplyForm::Extended, true);
    Agreed {
        export: "disk".into(),
        info,
        form: ReplyForm::Extended,
        contexts: contexts(),
        block_size_asked: true,
        no_zeroes: true,
    }
}

fn rules() -> SessionRules {
    SessionRules::new(&agreed())
}

fn parsed(bytes: &[u8]) -> Request {
    match parse(bytes, ReplyForm::Extended) {
        Parsed::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

fn verdict(flags: u16, command: u16, offset: u64, len: u64) -> Result<(), Reject> {
    check(&parsed(&extended_request(flags, command, 7, offset, len)), &rules())
}

fn errno(flags: u16, command: u16, offset: u64, len: u64) -> Option<(NbdError, Disposition)> {
    verdict(flags, command, offset, len).err().map(|reject| (reject.errno, reject.payload))
}

#[test]
fn header_is_read_field_by_field() {
    let bytes =
        extended_request(0x13, WRITE_ZEROES, 0x0102_0304_0506_0708, 0x1112_1314, 0x2122_2324_2526_2728);
    assert_eq!((bytes.len(), EXTENDED_REQUEST_HEADER_LEN), (32, 32));
    let request = parsed(&bytes);
    assert_eq!((request.flags.bits(), request.command), (0x13, Command::WriteZeroes));
    assert_eq!((request.cookie, request.offset), (0x0102_0304_0506_0708, 0x1112_1314));
    assert_eq!((request.len, request.payload_len), (0x2122_2324_2526_2728, 0));
}

#[test]
fn cut_headers_wait_and_wrong_magics_do_not() {
    let good = extended_request(0, READ, 1, 0, 512);
    for len in 0..32 {
        assert_eq!(parse(&good[..len], ReplyForm::Extended), Parsed::NeedMore);
    }
    assert_eq!(parse(&request(0, READ, 1, 0, 512), ReplyForm::Extended), Parsed::BadMagic, "compact");
    for form in [ReplyForm::Simple, ReplyForm::Structured] {
        assert_eq!(parse(&good, form), Parsed::BadMagic, "extended without agreement");
    }
}

#[test]
fn lengths_without_payload_have_64_bits() {
    for command in [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        for len in [1 << 32, 5 << 32, 16 * TIB] {
            assert_eq!(verdict(0, command, 0, len), Ok(()), "{command} {len}");
        }
        let beyond = if command == WRITE_ZEROES { NbdError::Enospc } else { NbdError::Einval };
        for (offset, len) in [(1, 16 * TIB), (0, u64::MAX), (u64::MAX, u64::MAX), (16 * TIB, 1)] {
            assert_eq!(errno(0, command, offset, len), Some((beyond, Disposition::Nothing)));
        }
    }
}

#[test]
fn reads_keep_to_the_largest_payload() {
    assert_eq!(verdict(0, READ, 0, PAYLOAD), Ok(()));
    for len in [PAYLOAD + 1, 1 << 32, (1 << 32) + 512, u64::MAX] {
        assert_eq!(errno(0, READ, 0, len), Some((NbdError::Einval, Disposition::Nothing)), "{len}");
    }
}

#[test]
fn writes_have_a_payload_announced_or_not() {
    assert_eq!(verdict(PAYLOAD_LEN, WRITE, 0, 512), Ok(()));
    assert_eq!(verdict(PAYLOAD_LEN | 1, WRITE, 0, PAYLOAD), Ok(()));
    assert_eq!(verdict(PAYLOAD_LEN, WRITE, 0, 0), Ok(()), "of no bytes");
    assert_eq!(parsed(&extended_request(PAYLOAD_LEN, WRITE, 1, 0, 512)).payload_len, 512);
    // QEMU's client does not set the flag, and sends the payload.
    assert_eq!(verdict(0, WRITE, 0, 512), Ok(()));
    assert_eq!(parsed(&extended_request(0, WRITE, 1, 0, 512)).payload_len, 512);
    assert_eq!(errno(0, WRITE, 16 * TIB, 512), Some((NbdError::Enospc, Disposition::Drain { len: 512 })));
    let beyond = errno(PAYLOAD_LEN, WRITE, 16 * TIB, 4096);
    assert_eq!(beyond, Some((NbdError::Enospc, Disposition::Drain { len: 4096 })));
}

#[test]
fn payload_beyond_the_largest_hangs_up() {
    for command in [READ, WRITE, TRIM, FLUSH, BLOCK_STATUS, 99] {
        for len in [PAYLOAD + 1, 1 << 32, u64::MAX] {
            let seen = errno(PAYLOAD_LEN, command, 0, len);
            assert_eq!(seen, Some((NbdError::Einval, Disposition::HangUp)), "{command} {len}");
        }
    }
}

#[test]
fn unwanted_payload_is_read_off() {
    for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 8, 99] {
        let seen = errno(PAYLOAD_LEN, command, 0, 512);
        assert_eq!(seen, Some((NbdError::Einval, Disposition::Drain { len: 512 })), "{command}");
    }
    assert_eq!(verdict(0, DISC, 0, 0), Ok(()));
}

#[test]
fn block_status_payload_has_room_for_each_context_once() {
    for len in [12, 16] {
        assert_eq!(verdict(PAYLOAD_LEN, BLOCK_STATUS, 0, len), Ok(()));
        assert_eq!(verdict(PAYLOAD_LEN | REQ_ONE, BLOCK_STATUS, 0, len), Ok(()));
    }
    for len in [1, 4, 7, 8, 9, 11, 13, 20, 4096] {
        let seen = errno(PAYLOAD_LEN, BLOCK_STATUS, 0, len);
        assert_eq!(seen, Some((NbdError::Einval, Disposition::Drain { len })), "{len}");
    }
    assert_eq!(errno(PAYLOAD_LEN, BLOCK_STATUS, 0, 0), Some((NbdError::Einval, Disposition::Nothing)));
    let rules = SessionRules { flags: rules().flags - TransmissionFlags::BLOCK_STATUS_PAYLOAD, ..rules() };
    let unoffered =
        check(&parsed(&extended_request(PAYLOAD_LEN, BLOCK_STATUS, 7, 0, 12)), &rules).unwrap_err();
    assert_eq!((unoffered.errno, unoffered.payload), (NbdError::Einval, Disposition::Drain { len: 12 }));
}

fn picked(offset: u64, len: u64, ids: &[u32]) -> Result<(u64, Vec<u32>), NbdError> {
    let mut payload = len.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    let request = parsed(&extended_request(PAYLOAD_LEN, BLOCK_STATUS, 7, offset, payload.len() as u64));
    status_payload(&request, &payload, &rules(), &contexts())
        .map(|(request, ids)| (request.len, ids))
        .map_err(|reject| reject.errno)
}

#[test]
fn block_status_payload_picks_contexts() {
    assert_eq!(picked(0, 512, &[1]), Ok((512, vec![1])));
    assert_eq!(picked(0, 16 * TIB, &[7, 1]), Ok((16 * TIB, vec![7, 1])));
    for ids in [&[1, 1][..], &[2], &[0], &[1, 8]] {
        assert_eq!(picked(0, 512, ids), Err(NbdError::Einval), "{ids:?}");
    }
    for (offset, len) in [(0, 0), (1, 16 * TIB), (u64::MAX, 1), (0, u64::MAX)] {
        assert_eq!(picked(offset, len, &[1]), Err(NbdError::Einval), "{offset}+{len}");
    }
    let request = parsed(&extended_request(PAYLOAD_LEN, BLOCK_STATUS, 7, 0, 11));
    for len in [0, 7, 11] {
        assert!(status_payload(&request, &vec![0; len], &rules(), &contexts()).is_err(), "{len}");
    }
}

#[test]
fn extents_have_64_bits() {
    let request = parsed(&extended_request(0, BLOCK_STATUS, 7, 512, 16 * TIB - 512));
    let mut builder = Builder::new(&request, &rules());
    assert_eq!(builder.push(8 * TIB, 3), Progress::More);
    assert_eq!(builder.push(u64::MAX, 0), Progress::Full);
    let extents: Vec<_> = builder.finish().iter().map(|extent| (extent.len, extent.flags)).collect();
    assert_eq!(extents, [(8 * TIB, 3), (8 * TIB - 512, 0)]);
    let one = parsed(&extended_request(REQ_ONE, BLOCK_STATUS, 7, 0, 5 << 32));
    let mut builder = Builder::new(&one, &rules());
    builder.push(u64::MAX, 3);
    assert_eq!(builder.finish()[0].len, 5 << 32);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the header: no panic, what is let through lies in the export, and the stream stays in step.
    #[test]
    fn what_is_let_through_is_in_range(
        flags in prop_oneof![3 => 0_u16..64, 1 => any::<u16>()],
        command in 0_u16..10,
        offset in prop_oneof![0..17 * TIB, any::<u64>()],
        len in prop_oneof![0..20_u64, 0..2 * PAYLOAD, 0..17 * TIB, any::<u64>()],
    ) {
        let request = parsed(&extended_request(flags, command, 1, offset, len));
        match check(&request, &rules()) {
            Ok(()) if matches!(request.command, Command::Flush | Command::Disconnect) => {}
            Ok(()) if request.command == Command::BlockStatus && request.payload_len > 0 => {
                prop_assert!(request.payload_len <= 16);
            }
            Ok(()) => {
                prop_assert!(u128::from(request.offset) + u128::from(request.len) <= u128::from(16 * TIB));
                prop_assert!(request.payload_len <= PAYLOAD);
                let moved = matches!(request.command, Command::Read | Command::Write);
                prop_assert!(!moved || request.len <= PAYLOAD);
                prop_assert_eq!(request.payload_len > 0, request.command == Command::Write && request.len > 0);
            }
            Err(reject) => match reject.payload {
                Disposition::Nothing => prop_assert_eq!(request.payload_len, 0),
                Disposition::Drain { len } => prop_assert_eq!(len, request.payload_len),
                Disposition::HangUp => prop_assert!(request.payload_len > PAYLOAD),
            },
        }
    }
}
