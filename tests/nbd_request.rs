//! Requests by the tables of the protocol: header, commands, flags and the errors that a server owes (the rows of
//! "what servers get wrong" that need no disk).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::errno::NbdError;
use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::negotiate::{Agreed, AgreedContext};
use nbd_img::nbd::reply::ReplyForm;
use nbd_img::nbd::request::{
    Command, CommandFlags, DRAIN_MAX_LEN, Disposition, Parsed, REQUEST_HEADER_LEN, Request, SessionRules,
    check, parse,
};
use nbd_support::wire::command::*;
use nbd_support::wire::command_flag::*;
use nbd_support::{export, request};
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;
const PAYLOAD: u32 = 32 << 20;
const DRAIN_MAX: u32 = DRAIN_MAX_LEN as u32;

fn agreed(form: ReplyForm) -> Agreed {
    let chunked = form.is_chunked();
    let mut info = export("disk", SIZE);
    info.flags = info.wire_flags(form, chunked);
    let contexts =
        if chunked { vec![AgreedContext { id: 1, name: "base:allocation".into() }] } else { vec![] };
    Agreed { export: "disk".into(), info, form, contexts, block_size_asked: true, no_zeroes: true }
}

fn rules() -> SessionRules {
    SessionRules::new(&agreed(ReplyForm::Structured))
}

fn read_only() -> SessionRules {
    let mut agreed = agreed(ReplyForm::Structured);
    agreed.info.flags |= TransmissionFlags::READ_ONLY;
    agreed.info.flags = agreed.info.wire_flags(ReplyForm::Structured, true);
    SessionRules::new(&agreed)
}

fn parsed(bytes: &[u8]) -> Request {
    match parse(bytes, ReplyForm::Structured) {
        Parsed::Request(request) => request,
        other => panic!("{other:?}"),
    }
}

fn verdict(rules: &SessionRules, flags: u16, command: u16, offset: u64, len: u32) -> Result<(), NbdError> {
    check(&parsed(&request(flags, command, 7, offset, len)), rules).map_err(|reject| {
        assert!(!reject.text.is_empty());
        reject.errno
    })
}

#[test]
fn header_is_read_field_by_field() {
    let bytes = request(0x8013, 6, 0x0102_0304_0506_0708, 0x1112_1314_1516_1718, 0x2122_2324);
    assert_eq!((bytes.len(), REQUEST_HEADER_LEN), (28, 28));
    let request = parsed(&bytes);
    assert_eq!(request.flags.bits(), 0x8013, "unknown flags are kept");
    assert_eq!(request.command, Command::WriteZeroes);
    assert_eq!(request.cookie, 0x0102_0304_0506_0708);
    assert_eq!(request.offset, 0x1112_1314_1516_1718);
    assert_eq!((request.len, request.payload_len), (0x2122_2324, 0));
}

#[test]
fn commands_have_their_numbers() {
    let known = [
        Command::Read,
        Command::Write,
        Command::Disconnect,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ];
    for number in 0..=u16::MAX {
        let expected = known.get(usize::from(number)).copied().unwrap_or(Command::Unknown(number));
        assert_eq!(parsed(&request(0, number, 0, 0, 0)).command, expected);
    }
}

#[test]
fn only_writes_have_a_payload() {
    for command in [READ, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8, 99] {
        assert_eq!(parsed(&request(0, command, 0, 0, 4096)).payload_len, 0);
    }
    assert_eq!(parsed(&request(0, WRITE, 0, 0, 4096)).payload_len, 4096);
}

#[test]
fn cut_headers_wait_and_wrong_magics_do_not() {
    let good = request(0, READ, 1, 0, 512);
    for len in 0..28 {
        assert_eq!(parse(&good[..len], ReplyForm::Structured), Parsed::NeedMore);
    }
    for byte in 0..4 {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        for len in 0..=28 {
            let expected = if len > byte { Parsed::BadMagic } else { Parsed::NeedMore };
            assert_eq!(parse(&bad[..len], ReplyForm::Structured), expected);
        }
    }
    for magic in [0x1256_0953_u32, 0x9674_4668, 0x2560_9514, 0x21e4_1c71, 0x6744_6698] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        assert_eq!(parse(&bytes, ReplyForm::Structured), Parsed::BadMagic, "{magic:#x}");
    }
}

#[test]
fn pipelined_requests_are_read_one_behind_the_other() {
    let bytes = [request(0, READ, 1, 0, 512), request(0, FLUSH, 2, 0, 0)].concat();
    assert_eq!(parsed(&bytes).cookie, 1);
    assert_eq!(parsed(&bytes[REQUEST_HEADER_LEN..]).cookie, 2);
}

#[test]
fn ranges_within_the_export_are_served() {
    for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        for (offset, len) in [(0, 1), (0, 512), (SIZE - 1, 1), (SIZE - 512, 512), (1, 65_537), (0, PAYLOAD)] {
            assert_eq!(verdict(&rules(), 0, command, offset, len), Ok(()), "{command} {offset}+{len}");
        }
    }
}

#[test]
fn ranges_beyond_the_end_have_the_error_of_their_command() {
    let table = [
        (READ, NbdError::Einval),
        (WRITE, NbdError::Enospc),
        (TRIM, NbdError::Einval),
        (CACHE, NbdError::Einval),
        (WRITE_ZEROES, NbdError::Enospc),
        (BLOCK_STATUS, NbdError::Einval),
    ];
    let beyond = [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE - 512, 513),
        (SIZE + 512, 512),
        (u64::MAX, 1),
        (u64::MAX - 511, 512),
    ];
    for (command, errno) in table {
        for (offset, len) in beyond {
            assert_eq!(verdict(&rules(), 0, command, offset, len), Err(errno), "{command} {offset}+{len}");
        }
    }
    for (command, errno) in
        [(TRIM, NbdError::Einval), (WRITE_ZEROES, NbdError::Enospc), (BLOCK_STATUS, NbdError::Einval)]
    {
        assert_eq!(verdict(&rules(), 0, command, u64::MAX, u32::MAX), Err(errno));
    }
}

#[test]
fn zero_lengths_are_in_order_but_for_block_status() {
    for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES] {
        assert_eq!(verdict(&rules(), 0, command, 0, 0), Ok(()));
        assert_eq!(verdict(&rules(), 0, command, SIZE, 0), Ok(()));
        assert!(verdict(&rules(), 0, command, SIZE + 1, 0).is_err());
    }
    assert_eq!(verdict(&rules(), 0, BLOCK_STATUS, 0, 0), Err(NbdError::Einval));
}

#[test]
fn empty_export_only_serves_nothing() {
    let rules = SessionRules { size: 0, ..rules() };
    assert_eq!(verdict(&rules, 0, READ, 0, 0), Ok(()));
    assert_eq!(verdict(&rules, 0, READ, 0, 1), Err(NbdError::Einval));
    assert_eq!(verdict(&rules, 0, WRITE, 0, 1), Err(NbdError::Enospc));
}

#[test]
fn largest_export_does_not_overflow() {
    let rules = SessionRules { size: u64::MAX, ..rules() };
    assert_eq!(verdict(&rules, 0, READ, u64::MAX - 512, 512), Ok(()));
    assert_eq!(verdict(&rules, 0, READ, u64::MAX - 511, 512), Err(NbdError::Einval));
    assert_eq!(verdict(&rules, 0, WRITE_ZEROES, u64::MAX - 1, u32::MAX), Err(NbdError::Enospc));
}

#[test]
fn writes_to_a_read_only_export_are_not_permitted() {
    for command in [WRITE, TRIM, WRITE_ZEROES] {
        for (flags, offset, len) in [(0, 0, 512), (FUA, 0, 512), (0, SIZE, 512), (0, 0, 0)] {
            assert_eq!(verdict(&read_only(), flags, command, offset, len), Err(NbdError::Eperm));
        }
    }
    assert_eq!(verdict(&read_only(), NO_HOLE | FAST_ZERO, WRITE_ZEROES, 0, 512), Err(NbdError::Eperm));
    for command in [READ, FLUSH, CACHE, BLOCK_STATUS] {
        assert_eq!(verdict(&read_only(), FUA, command, 0, 512), Ok(()));
    }
}

#[test]
fn flags_are_taken_where_they_belong() {
    let allowed = |command| match command {
        READ => FUA | DF,
        WRITE | FLUSH | TRIM | CACHE => FUA,
        WRITE_ZEROES => FUA | NO_HOLE | FAST_ZERO,
        BLOCK_STATUS => FUA | REQ_ONE,
        other => panic!("{other}"),
    };
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        for flags in 0..=u16::MAX {
            let expected = if flags & !allowed(command) == 0 { Ok(()) } else { Err(NbdError::Einval) };
            assert_eq!(verdict(&rules(), flags, command, 0, 512), expected, "{command} with {flags:#x}");
        }
    }
    assert_eq!(verdict(&rules(), PAYLOAD_LEN, WRITE, 0, 512), Err(NbdError::Einval));
}

#[test]
fn flags_that_were_not_offered_are_invalid() {
    let without = |flag| SessionRules { flags: rules().flags - flag, ..rules() };
    for command in [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        let rules = without(TransmissionFlags::SEND_FUA);
        assert_eq!(verdict(&rules, FUA, command, 0, 512), Err(NbdError::Einval));
    }
    let rules = without(TransmissionFlags::SEND_FAST_ZERO);
    assert_eq!(verdict(&rules, FAST_ZERO, WRITE_ZEROES, 0, 512), Err(NbdError::Einval));
    assert_eq!(verdict(&rules, NO_HOLE, WRITE_ZEROES, 0, 512), Ok(()));
    let simple = SessionRules::new(&agreed(ReplyForm::Simple));
    assert_eq!(verdict(&simple, DF, READ, 0, 512), Err(NbdError::Einval));
    assert_eq!(verdict(&simple, 0, READ, 0, 512), Ok(()));
    let offering_df = SessionRules::new(&agreed(ReplyForm::Structured));
    let careless = SessionRules { form: ReplyForm::Simple, ..offering_df };
    assert_eq!(
        verdict(&careless, DF, READ, 0, 512),
        Err(NbdError::Einval),
        "DF says nothing of simple replies"
    );
}

#[test]
fn commands_that_were_not_offered_are_invalid_but_for_cache() {
    let without = |flag| SessionRules { flags: rules().flags - flag, ..rules() };
    assert_eq!(verdict(&without(TransmissionFlags::SEND_TRIM), 0, TRIM, 0, 512), Err(NbdError::Einval));
    assert_eq!(verdict(&without(TransmissionFlags::SEND_FLUSH), 0, FLUSH, 0, 0), Err(NbdError::Einval));
    assert_eq!(
        verdict(&without(TransmissionFlags::SEND_WRITE_ZEROES), 0, WRITE_ZEROES, 0, 512),
        Err(NbdError::Einval)
    );
    assert_eq!(verdict(&without(TransmissionFlags::SEND_CACHE), 0, CACHE, 0, 512), Ok(()));
}

#[test]
fn block_status_needs_a_context() {
    let rules = SessionRules { contexts: 0, ..rules() };
    assert_eq!(verdict(&rules, 0, BLOCK_STATUS, 0, 512), Err(NbdError::Einval));
}

#[test]
fn unknown_commands_are_invalid_and_have_no_payload() {
    for command in [8, 9, 99, u16::MAX] {
        let reject = check(&parsed(&request(0, command, 0, 0, 4096)), &rules()).unwrap_err();
        assert_eq!((reject.errno, reject.payload), (NbdError::Einval, Disposition::Nothing));
    }
}

#[test]
fn disconnect_is_never_refused() {
    for flags in [0, FUA, u16::MAX] {
        assert_eq!(verdict(&read_only(), flags, DISC, u64::MAX, u32::MAX), Ok(()));
    }
}

#[test]
fn flush_ignores_offset_and_length() {
    for (offset, len) in [(0, 0), (SIZE, 512), (u64::MAX, u32::MAX), (1, 1)] {
        assert_eq!(verdict(&rules(), 0, FLUSH, offset, len), Ok(()));
    }
}

/// S1, CVE-2005-3534 and its return: lengths around the largest payload.
#[test]
fn payloads_beyond_the_largest_are_invalid() {
    let rules = SessionRules { size: 1 << 40, ..rules() };
    for command in [READ, WRITE] {
        for len in [PAYLOAD - 1, PAYLOAD] {
            assert_eq!(verdict(&rules, 0, command, 0, len), Ok(()));
        }
        for len in [PAYLOAD + 1, PAYLOAD + 512, 33 << 20, 1 << 31, u32::MAX] {
            assert_eq!(verdict(&rules, 0, command, 0, len), Err(NbdError::Einval), "{command} {len}");
        }
    }
    for command in [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        assert_eq!(verdict(&rules, 0, command, 0, u32::MAX), Ok(()), "no payload, no limit");
    }
}

#[test]
fn payload_of_a_refused_write_is_drained_or_ends_the_connection() {
    let disposition = |rules: &SessionRules, flags, offset, len| {
        check(&parsed(&request(flags, WRITE, 0, offset, len)), rules).unwrap_err().payload
    };
    assert_eq!(disposition(&read_only(), 0, 0, 512), Disposition::Drain { len: 512 });
    assert_eq!(disposition(&read_only(), 0, 0, 0), Disposition::Nothing);
    assert_eq!(disposition(&rules(), 0, SIZE, 4096), Disposition::Drain { len: 4096 });
    assert_eq!(disposition(&rules(), NO_HOLE, 0, 4096), Disposition::Drain { len: 4096 });
    assert_eq!(disposition(&rules(), 0, 0, PAYLOAD + 1), Disposition::Drain { len: u64::from(PAYLOAD) + 1 });
    assert_eq!(disposition(&rules(), 0, 0, DRAIN_MAX), Disposition::Drain { len: DRAIN_MAX_LEN });
    assert_eq!(disposition(&rules(), 0, 0, DRAIN_MAX + 1), Disposition::HangUp);
    assert_eq!(disposition(&read_only(), 0, 0, u32::MAX), Disposition::HangUp);
    let read = check(&parsed(&request(0, READ, 0, 0, u32::MAX)), &rules()).unwrap_err();
    assert_eq!(read.payload, Disposition::Nothing);
}

#[test]
fn alignment_is_checked_for_clients_that_asked_for_it() {
    let mut agreed = agreed(ReplyForm::Structured);
    agreed.info.block_min_len = 4096;
    agreed.info.size = 3 * 4096 + 1000;
    let strict = SessionRules::new(&agreed);
    for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
        assert_eq!(verdict(&strict, 0, command, 4096, 8192), Ok(()));
        for (offset, len) in [(1, 4096), (512, 512), (0, 512), (0, 4095), (4096, 4097)] {
            assert_eq!(verdict(&strict, 0, command, offset, len), Err(NbdError::Einval));
        }
        assert_eq!(verdict(&strict, 0, command, 3 * 4096, 1000), Ok(()), "the tail can be reached");
        assert_eq!(verdict(&strict, 0, command, 3 * 4096 + 500, 500), Err(NbdError::Einval));
    }
    assert_eq!(verdict(&strict, 0, WRITE, 3 * 4096, 4096), Err(NbdError::Enospc));
    agreed.block_size_asked = false;
    assert_eq!(verdict(&SessionRules::new(&agreed), 0, WRITE, 1, 1), Ok(()));
}

#[test]
fn errors_of_the_system_leave_by_the_table() {
    let none = CommandFlags::empty();
    let all = [
        Command::Read,
        Command::Write,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ];
    let table = [
        (libc::EPERM, 1),
        (libc::EROFS, 1),
        (libc::EACCES, 1),
        (libc::EIO, 5),
        (libc::ENXIO, 5),
        (libc::ENODEV, 5),
        (libc::ETIMEDOUT, 5),
        (libc::ESTALE, 5),
        (libc::EUCLEAN, 5),
        (libc::ENOMEM, 12),
        (libc::EINVAL, 22),
        (libc::ENOSPC, 28),
        (libc::EDQUOT, 28),
        (libc::EFBIG, 28),
        (libc::ESHUTDOWN, 108),
        (libc::EOVERFLOW, 22),
        (libc::EOPNOTSUPP, 22),
        (libc::ENOSYS, 22),
        (0, 22),
        (-1, 22),
        (i32::MAX, 22),
    ];
    for command in all {
        for (os_errno, wire) in table {
            assert_eq!(NbdError::from_os(os_errno, command, none).wire(), wire, "{os_errno} on {command:?}");
        }
    }
}

#[test]
fn overflow_and_not_supported_only_leave_where_they_may() {
    for command in [Command::Read, Command::Write, Command::WriteZeroes, Command::BlockStatus, Command::Trim]
    {
        for bits in 0..32 {
            let flags = CommandFlags::from_bits_retain(bits);
            let overflow = NbdError::from_os(libc::EOVERFLOW, command, flags).wire();
            let df_read = command == Command::Read && bits & DF != 0;
            assert_eq!(overflow, if df_read { 75 } else { 22 });
            let fast = command == Command::WriteZeroes && bits & FAST_ZERO != 0;
            for os_errno in [libc::ENOTSUP, libc::EOPNOTSUPP] {
                assert_eq!(NbdError::from_os(os_errno, command, flags).wire(), if fast { 95 } else { 22 });
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the header: no panic, and what is let through lies in the export and is known.
    #[test]
    fn what_is_let_through_is_in_range(
        bytes in prop::array::uniform32(any::<u8>()),
        small in any::<bool>(),
        size in prop_oneof![0..1_u64 << 41, any::<u64>()],
        block_shift in 0_u32..17,
    ) {
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        if small {
            bytes[4..7].fill(0);
            bytes[7] &= 7;
            bytes[16..20].fill(0);
        }
        let request = parsed(&bytes);
        let rules = SessionRules { size, block_min_len: 1 << block_shift, ..rules() };
        match check(&request, &rules) {
            Ok(()) if matches!(request.command, Command::Flush | Command::Disconnect) => {}
            Ok(()) => {
                prop_assert!(!matches!(request.command, Command::Unknown(_)));
                let end = u128::from(request.offset) + u128::from(request.len);
                prop_assert!(end <= u128::from(size));
                prop_assert!(request.payload_len <= u64::from(PAYLOAD));
                prop_assert_eq!(request.offset % (1 << block_shift), 0);
            }
            Err(reject) => match reject.payload {
                Disposition::Nothing => prop_assert_eq!(request.payload_len, 0),
                Disposition::Drain { len } => {
                    prop_assert_eq!(len, request.payload_len);
                    prop_assert!(len <= DRAIN_MAX_LEN);
                }
                Disposition::HangUp => prop_assert!(request.payload_len > DRAIN_MAX_LEN),
            },
        }
    }
}
