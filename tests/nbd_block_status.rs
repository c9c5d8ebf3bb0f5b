//! Extents of BLOCK_STATUS against the protocol's rules and against a map of the export byte by byte; the
//! arithmetic that broke others (S17, CVE-2025-47711; S18, CVE-2025-47712).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::block_status::{Builder, EXTENTS_MAX, Progress};
use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::reply::ReplyForm;
use nbd_img::nbd::request::{Command, CommandFlags, Request, SessionRules};
use proptest::prelude::*;

const HOLE: u32 = 3;
const DATA: u32 = 0;
const TIB: u64 = 1 << 40;

fn rules(size: u64, block_min_len: u32) -> SessionRules {
    SessionRules {
        size,
        flags: TransmissionFlags::empty(),
        form: ReplyForm::Structured,
        contexts: 1,
        block_min_len,
        payload_max_len: 32 << 20,
    }
}

fn request(offset: u64, len: u32, req_one: bool) -> Request {
    let flags = if req_one { CommandFlags::REQ_ONE } else { CommandFlags::empty() };
    Request { flags, command: Command::BlockStatus, cookie: 1, offset, len: len.into(), payload_len: 0 }
}

/// Pushes runs until the builder is full.
fn build(mut builder: Builder, runs: &[(u64, u32)]) -> Vec<(u32, u32)> {
    for (len, flags) in runs {
        if builder.push(*len, *flags) == Progress::Full {
            break;
        }
    }
    builder.finish().iter().map(|extent| (u32::try_from(extent.len).unwrap(), extent.flags)).collect()
}

fn status(size: u64, offset: u64, len: u32, req_one: bool, runs: &[(u64, u32)]) -> Vec<(u32, u32)> {
    build(Builder::new(&request(offset, len, req_one), &rules(size, 1)), runs)
}

#[test]
fn neighbours_of_equal_flags_are_merged() {
    let runs = [(4096, DATA), (4096, DATA), (4096, HOLE), (8192, HOLE), (4096, DATA)];
    assert_eq!(status(24_576, 0, 24_576, false, &runs), [(8192, DATA), (12_288, HOLE), (4096, DATA)]);
}

#[test]
fn last_extent_may_run_past_the_request_but_not_past_the_end() {
    assert_eq!(status(1 << 20, 0, 512, false, &[(1 << 19, HOLE), (1 << 19, DATA)]), [(1 << 19, HOLE)]);
    assert_eq!(status(1 << 20, 0, 512, false, &[(u64::MAX, HOLE)]), [(1 << 20, HOLE)]);
    assert_eq!(status(1000, 0, 1000, false, &[(u64::MAX, HOLE)]), [(1000, HOLE)]);
    assert_eq!(status(1000, 512, 488, false, &[(4096, DATA)]), [(488, DATA)]);
}

#[test]
fn a_full_builder_wants_no_more() {
    let mut builder = Builder::new(&request(0, 4096, false), &rules(1 << 20, 1));
    assert_eq!(builder.push(2048, DATA), Progress::More);
    assert_eq!(builder.position(), 2048);
    assert_eq!(builder.push(2048, HOLE), Progress::Full);
    assert_eq!(builder.push(4096, DATA), Progress::Full);
    assert_eq!(build(builder, &[]), [(2048, DATA), (2048, HOLE)]);
}

#[test]
fn req_one_is_one_extent_within_the_request() {
    assert_eq!(status(TIB, 0, 4096, true, &[(TIB, HOLE)]), [(4096, HOLE)]);
    assert_eq!(status(TIB, 0, 4096, true, &[(512, HOLE), (512, HOLE), (512, DATA)]), [(1024, HOLE)]);
    assert_eq!(status(TIB, 1, 7, true, &[(TIB, DATA)]), [(7, DATA)]);
    assert_eq!(status(TIB, 0, u32::MAX, true, &[(TIB, DATA)]), [(u32::MAX, DATA)]);
}

/// S17: one hole of 8 TiB, and requests as long as they get.
#[test]
fn extents_longer_than_32_bits_are_cut() {
    let size = 8 * TIB;
    for len in [u32::MAX, u32::MAX - 511, u32::MAX - 4095] {
        for offset in [0, 1, 512, 4096, size - u64::from(len)] {
            let one = status(size, offset, len, true, &[(size, HOLE)]);
            assert_eq!(one, [(len, HOLE)]);
            let many = status(size, offset, len, false, &[(size, HOLE)]);
            assert_eq!(many.len(), 1);
            assert!(many[0].0 >= u32::MAX - (128 << 10), "{many:?}");
            assert!(offset + u64::from(many[0].0) <= size);
            let end = offset + u64::from(many[0].0);
            assert!(end.is_multiple_of(65_536) || end == size);
        }
    }
}

#[test]
fn cut_hole_behind_data_still_fits() {
    let runs = [(512, DATA), (8 * TIB, HOLE)];
    let extents = status(8 * TIB, 0, u32::MAX, false, &runs);
    assert_eq!(extents[0], (512, DATA));
    assert_eq!(extents.len(), 2);
    assert!((512 + u64::from(extents[1].0)).is_multiple_of(65_536));
}

/// What was cut off has to be asked for again; the run behind it must not take its place.
#[test]
fn nothing_follows_a_cut_extent() {
    let mut builder = Builder::new(&request(0, u32::MAX, false), &rules(8 * TIB, 1));
    assert_eq!(builder.push(1 << 32, HOLE), Progress::Full);
    assert_eq!(build(builder, &[(4096, DATA)]), [(0xffff_0000, HOLE)]);
}

#[test]
fn unaligned_end_of_a_request_is_told_with_the_runs_up_to_it() {
    let mut builder = Builder::new(&request(0, 1000, false), &rules(1 << 20, 1));
    assert_eq!(builder.push(512, DATA), Progress::More);
    assert_eq!(builder.push(488, HOLE), Progress::Full);
    assert_eq!(build(builder, &[]), [(512, DATA), (488, HOLE)]);
}

/// S18: block sizes and offsets that do not go together.
#[test]
fn unaligned_requests_with_large_blocks_make_progress() {
    for block in [1, 512, 4096, 65_536] {
        for offset in [0, 1, 511, 512, 65_535, 8 * TIB - 1] {
            for len in [1, 511, 512, u32::MAX] {
                for req_one in [false, true] {
                    let len = u32::try_from(u64::from(len).min(8 * TIB - offset)).unwrap();
                    let builder = Builder::new(&request(offset, len, req_one), &rules(8 * TIB, block));
                    let extents = build(builder, &[(8 * TIB, HOLE)]);
                    assert_eq!(extents.len(), 1);
                    assert!(extents[0].0 >= 1);
                    assert!(!req_one || extents[0].0 <= len);
                }
            }
        }
    }
}

#[test]
fn boundaries_inside_a_block_say_only_what_holds_for_all_of_it() {
    let runs = [(700, HOLE), (1300, DATA), (2000, HOLE), (96, 1)];
    // Blocks of 512: the second is half hole, the fourth half hole, the eighth hole and 1.
    let blocks = Builder::new(&request(0, 4096, false), &rules(4096, 512));
    assert_eq!(build(blocks, &runs), [(512, HOLE), (1536, DATA), (1536, HOLE), (512, 1)]);
    assert_eq!(status(4096, 0, 4096, false, &runs), runs.map(|(len, flags)| (len as u32, flags)));
    let builder = Builder::new(&request(0, 4096, false), &rules(4096, 4096));
    assert_eq!(build(builder, &runs), [(4096, DATA)]);
}

#[test]
fn tiny_runs_within_one_block() {
    let runs = [(1, 3), (1, 3), (509, 1), (1, 3), (512, 3)];
    let builder = Builder::new(&request(0, 1024, false), &rules(1024, 512));
    assert_eq!(build(builder, &runs), [(512, 1), (512, 3)]);
}

#[test]
fn empty_runs_are_ignored() {
    assert_eq!(status(1024, 0, 1024, false, &[(0, 1), (512, 3), (0, 0), (512, 3), (0, 0)]), [(1024, 3)]);
    assert_eq!(status(1024, 0, 1024, false, &[]), []);
}

#[test]
fn runs_that_end_early_give_a_short_answer() {
    assert_eq!(status(1 << 20, 0, 4096, false, &[(512, HOLE)]), [(512, HOLE)]);
    let builder = Builder::new(&request(0, 4096, false), &rules(1 << 20, 512));
    assert_eq!(build(builder, &[(512, HOLE), (100, DATA)]), [(512, HOLE)]);
    assert_eq!(status(1 << 20, 0, 4096, false, &[(100, DATA)]), [(100, DATA)]);
}

#[test]
fn number_of_extents_is_bounded() {
    let runs: Vec<_> = (0..10).map(|n| (512, n % 2)).collect();
    let builder = Builder::new(&request(0, 5120, false), &rules(1 << 20, 1)).with_extents_max(3);
    assert_eq!(build(builder, &runs), [(512, 0), (512, 1), (512, 0)]);
    let mut builder = Builder::new(&request(0, u32::MAX, false), &rules(TIB, 1));
    let mut pushed = 0_u32;
    while builder.push(512, pushed % 2) == Progress::More {
        pushed += 1;
    }
    assert_eq!(builder.finish().len(), EXTENTS_MAX);
    let none = Builder::new(&request(0, 512, false), &rules(TIB, 1)).with_extents_max(0);
    assert_eq!(build(none, &[(512, 1)]).len(), 1, "at least one");
}

#[test]
fn ends_of_64_bits_do_not_overflow() {
    let size = u64::MAX;
    for offset in [size - 1, size - 512, size - 70_000] {
        for block in [1, 65_536] {
            for req_one in [false, true] {
                let len = u32::try_from(size - offset).unwrap();
                let builder = Builder::new(&request(offset, len, req_one), &rules(size, block));
                assert_eq!(build(builder, &[(u64::MAX, HOLE)]), [(len, HOLE)]);
                let builder = Builder::new(&request(offset, len, req_one), &rules(size, block));
                assert!(!build(builder, &[(1, DATA), (u64::MAX, HOLE)]).is_empty());
            }
        }
    }
}

#[test]
fn requests_out_of_range_do_not_panic() {
    for (offset, len) in [(1000, 1), (999, 2), (u64::MAX, u32::MAX), (0, 0)] {
        let extents = status(1000, offset, len, false, &[(1, 1), (u64::MAX, 0)]);
        assert!(extents.iter().map(|(len, _)| u64::from(*len)).sum::<u64>() <= 1000);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    /// Any runs, any request: the answer keeps the protocol's rules and never claims what a byte does not have.
    #[test]
    fn answers_keep_the_rules(
        runs in prop::collection::vec((prop_oneof![0_u64..3000, Just(512), Just(4096)], 0_u32..4), 1..40),
        block_shift in prop_oneof![Just(0_u32), 9_u32..13],
        start in any::<prop::sample::Index>(),
        len in 1_u32..30_000,
        req_one in any::<bool>(),
        extents_max in 1_usize..20,
        aligned in any::<bool>(),
    ) {
        let bytes: Vec<u32> =
            runs.iter().flat_map(|(len, flags)| vec![*flags; usize::try_from(*len).unwrap()]).collect();
        prop_assume!(!bytes.is_empty());
        let size = bytes.len();
        let unit = 1_usize << block_shift;
        let mut offset = start.index(size);
        if aligned {
            offset -= offset % unit;
        }
        let len = len.min(u32::try_from(size - offset).unwrap());
        let request = request(offset as u64, len, req_one);
        let end = offset + usize::try_from(len).unwrap();
        let mut builder =
            Builder::new(&request, &rules(size as u64, 1 << block_shift)).with_extents_max(extents_max);
        // The runs again, from the offset on, as a driver would find them.
        let mut position = offset;
        while position < size {
            let run = bytes[position..].iter().take_while(|flags| **flags == bytes[position]).count();
            let progress = builder.push(run as u64, bytes[position]);
            position += run;
            if progress == Progress::Full {
                break;
            }
        }
        let extents: Vec<_> = builder
            .finish()
            .iter()
            .map(|extent| (usize::try_from(extent.len).unwrap(), extent.flags))
            .collect();

        prop_assert!(!extents.is_empty());
        let limit = if req_one { 1 } else { extents_max };
        prop_assert!(extents.len() <= limit);
        let mut at = offset;
        for (index, (len, flags)) in extents.iter().enumerate() {
            prop_assert!(*len > 0);
            let extent_end = at + len;
            prop_assert!(extent_end <= size);
            prop_assert!(index + 1 == extents.len() || extent_end < end, "an extent starts behind the request");
            prop_assert!(!req_one || extent_end <= end);
            prop_assert!(
                extent_end % unit == 0 || extent_end == size || extent_end >= end,
                "extent ends at {} in blocks of {}", extent_end, unit
            );
            let shared = bytes[at..extent_end].iter().fold(u32::MAX, |all, flags| all & flags);
            prop_assert_eq!(flags & !shared, 0, "a flag that a byte does not have");
            at = extent_end;
        }
        for pair in extents.windows(2) {
            prop_assert_ne!(pair[0].1, pair[1].1, "neighbours of equal flags");
        }
        // Short only where a rule made it so.
        prop_assert!(at >= end || extents.len() == limit);
        // Blocks within the request keep all flags that their bytes share.
        let mut at = offset;
        for (len, flags) in &extents {
            for block in (at / unit..(at + len).div_ceil(unit)).map(|block| block * unit) {
                let block_end = (block + unit).min(size);
                let shared = bytes[block.max(offset)..block_end].iter().fold(u32::MAX, |all, flags| all & flags);
                if block_end <= end {
                    prop_assert_eq!(*flags, shared, "block {} lost flags", block);
                }
            }
            at += len;
        }
    }
}
