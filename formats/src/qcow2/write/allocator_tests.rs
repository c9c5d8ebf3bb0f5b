//! Tests of [`super`] that need what is private there.

use super::super::super::types::DataFile;
use super::*;
use std::collections::HashSet;

/// An image with a header, a table of one cluster and one block.
fn small(bits: u32, end: u64) -> Allocator {
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let mut refcounts = Refcounts::new(geometry, bits, vec![0; 64], HostOffset(512));
    let mut map = MetadataMap::new(geometry);
    refcounts.create(BlockIndex(0), HostOffset(1024));
    for (at, kind) in [(0, Kind::Header), (512, Kind::RefcountTable), (1024, Kind::RefcountBlock)] {
        map.add(HostOffset(at), 512, kind);
        refcounts.set(HostIndex(at / 512), 1).unwrap();
    }
    Allocator::new(geometry, refcounts, map, Space::new(HostIndex(3), HostIndex(end), true))
}

#[test]
fn blocks_and_tables_grow_and_describe_themselves() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let mut allocator = small(bits, 60_000);
        let mut handed = HashSet::new();
        for _ in 0..40_000 {
            let host = allocator.allocate_zeroed().unwrap().unwrap();
            assert!(handed.insert(host), "handed out twice");
            assert!(allocator.map.kind(HostIndex(host.start().0 / 512)).is_none());
        }
        assert!(bits < 16 || allocator.moved.is_some(), "width {bits}");
        // Whatever lies below has one owner.
        let left: u64 = allocator.left.iter().map(|(_, len)| len).sum();
        let metadata =
            (0..allocator.space.fresh.0).filter(|index| allocator.map.kind(HostIndex(*index)).is_some());
        assert!(left < 200);
        assert!(metadata.count() + handed.len() <= usize::try_from(allocator.space.fresh.0).unwrap());
        for index in 0..allocator.space.fresh.0 {
            let owned = handed.contains(&allocator.geometry.host_at(HostIndex(index)))
                || allocator.map.kind(HostIndex(index)).is_some();
            assert_eq!(allocator.refcounts.get(HostIndex(index)), Ok(u64::from(owned)), "{bits} {index}");
        }
    }
}

#[test]
fn the_end_is_said_and_nothing_has_changed() {
    let mut allocator = small(16, 10);
    for _ in 3..10 {
        allocator.allocate().unwrap();
    }
    assert_eq!(allocator.allocate(), Err(Need::Cluster(1)));
    allocator.space.extend_to(HostIndex(11));
    assert!(allocator.allocate().is_ok());
}

#[test]
fn a_table_of_many_blocks_lies_in_the_room_that_was_asked_for() {
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let refcounts = Refcounts::new(geometry, 64, vec![0; 8000 * 64], HostOffset(512));
    let fresh = HostIndex(8000 * 64 * 64);
    let space = Space::new(fresh, HostIndex(fresh.0 + 1), true);
    let mut allocator = Allocator::new(geometry, refcounts, MetadataMap::new(geometry), space);
    while let Err(need) = allocator.allocate() {
        let Need::Cluster(clusters) = need else { panic!("{need:?}") };
        assert!(allocator.space.fresh <= allocator.space.end, "behind the end");
        allocator.space.extend_to(HostIndex(allocator.space.fresh.0 + clusters));
    }
    assert!(allocator.moved.is_some());
}

#[test]
fn a_search_finds_what_is_free_and_not_what_is_listed() {
    let mut allocator = small(16, 40);
    let handed: Vec<_> = (0..20).map(|_| allocator.allocate().unwrap().host).collect();
    allocator.space.search_end = allocator.space.fresh;
    for (number, host) in handed.iter().enumerate().take(10) {
        let index = HostIndex(host.start().0 / 512);
        allocator.refcounts.set(index, 0).unwrap();
        if number % 3 != 0 {
            allocator.space.give_back(index, 1, number % 3 == 1);
        }
    }
    while allocator.search().unwrap() {}
    let mut again: Vec<_> = (0..10).map(|_| allocator.allocate().unwrap().host).collect();
    again.sort_unstable();
    assert_eq!(again, handed[..10]);
}

#[test]
fn what_a_full_list_left_out_is_found_again() {
    let mut allocator = small(16, 40);
    allocator.space.stale = RunSet::bounded(2);
    allocator.space.zeroed = RunSet::bounded(2);
    let handed: Vec<_> = (0..20).map(|_| allocator.allocate().unwrap().host).collect();
    let freed: Vec<_> = handed.iter().copied().step_by(2).collect();
    for (number, host) in freed.iter().enumerate() {
        let index = HostIndex(host.start().0 / 512);
        allocator.refcounts.set(index, 0).unwrap();
        allocator.space.give_back(index, 1, number % 2 == 0);
    }
    let mut again = Vec::new();
    while again.len() < freed.len() {
        if !allocator.space.has_any() {
            assert!(allocator.search().unwrap(), "{} of {} are found", again.len(), freed.len());
            continue;
        }
        again.push(allocator.allocate().unwrap().host);
    }
    again.sort_unstable();
    assert_eq!(again, freed);
}

#[test]
fn a_list_with_a_cluster_in_use_is_a_fault() {
    let mut allocator = small(16, 10);
    allocator.space.give_back(HostIndex(1), 1, true);
    assert!(matches!(allocator.allocate_zeroed(), Err(Need::Fault(_))));
}

#[test]
fn a_search_through_many_blocks_keeps_few_of_them() {
    const BLOCKS: usize = 8;
    let geometry = Geometry::new(21, false, 3, DataFile::Internal);
    let table = (0..BLOCKS as u64).map(|block| (block + 2) << 21).collect();
    let refcounts = Refcounts::new(geometry, 64, table, HostOffset(1 << 21));
    let end = HostIndex(BLOCKS as u64 * refcounts.block_entries());
    let space = Space::new(end, end, false);
    let mut allocator = Allocator::new(geometry, refcounts, MetadataMap::new(geometry), space);
    let mut most = 0;
    loop {
        match allocator.search() {
            Ok(true) => {}
            Ok(false) => break,
            Err(Need::Block(block)) => allocator.refcounts.insert(block, vec![1; 2 << 20]),
            Err(need) => panic!("{need:?}"),
        }
        most = most.max((0..BLOCKS).filter(|block| allocator.refcounts.has(BlockIndex(*block))).count());
    }
    assert!(!allocator.space.has_any() && (1..=5).contains(&most), "{most} blocks at a time");
}
