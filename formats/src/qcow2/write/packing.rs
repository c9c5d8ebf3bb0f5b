//! [`Packing`]: where the next blob of a compressed cluster goes.
//!
//! Memory only, as all of the allocator. Blobs lie behind each other in data clusters, whose refcount is the
//! number of blobs in them; a blob may reach into the next cluster if that one follows in the file. Only room
//! that no blob has had since the cluster was handed out is used: who still reads a blob that is gone finds it
//! there until the cluster is free.

use super::super::types::HostIndex;
use super::allocator::{Allocator, Need};
use crate::address::HostOffset;

/// A cluster with room for blobs behind those that it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Open {
    index: HostIndex,
    /// Where the next one goes, inside of the cluster.
    at: u64,
}

/// The cluster that blobs are packed into, if there is one with room.
#[derive(Default, Debug)]
pub struct Packing(Option<Open>);

impl Packing {
    /// The cluster is about to be free: no blob goes into it any more.
    pub fn leave(&mut self, index: HostIndex) {
        self.0 = self.0.filter(|open| open.index != index);
    }
}

impl Allocator {
    /// Room for a blob of `len` bytes, which is less than a cluster and not 0. All clusters that it lies in are
    /// counted for it.
    pub fn pack(&mut self, len: u64) -> Result<HostOffset, Need> {
        if let Some(Open { index, at }) = self.packing.0 {
            let count = self.refcounts.get(index)?;
            if count == 0 {
                return Err(Need::Fault("a cluster with compressed data is counted as free"));
            }
            let end = self.geometry().host_at(HostIndex(index.0 + 1)).start().0;
            if count < self.refcounts.max() && at + len <= end {
                self.refcounts.set(index, count + 1)?;
                self.set_open(index, at + len);
                return Ok(HostOffset(at));
            }
            let next = self.next_cluster()?;
            let goes_on = count < self.refcounts.max() && next.0 == index.0 + 1;
            let at = if goes_on { at } else { self.geometry().host_at(next).start().0 };
            if goes_on {
                // The block is in memory: the count was read just now.
                self.refcounts.set(index, count + 1)?;
            }
            self.set_open(next, at + len);
            return Ok(HostOffset(at));
        }
        let index = self.next_cluster()?;
        let at = self.geometry().host_at(index).start();
        self.set_open(index, at.0 + len);
        Ok(at)
    }

    /// The next blob begins at a multiple of `unit`, a power of two up to a cluster.
    pub fn align_packing(&mut self, unit: u64) {
        if let Some(Open { index, at }) = self.packing.0 {
            self.set_open(index, at.next_multiple_of(unit));
        }
    }

    fn next_cluster(&mut self) -> Result<HostIndex, Need> {
        let host = self.allocate()?.host;
        Ok(self.geometry().host_index(host.start()))
    }

    fn set_open(&mut self, index: HostIndex, at: u64) {
        let end = self.geometry().host_at(HostIndex(index.0 + 1)).start().0;
        self.packing = Packing((at < end).then_some(Open { index, at }));
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::types::{DataFile, Geometry};
    use super::super::allocator::Space;
    use super::super::metadata_map::MetadataMap;
    use super::super::refcounts::{BlockIndex, Refcounts};
    use super::*;

    const CLUSTER: u64 = 1024;

    fn allocator(bits: u32) -> Allocator {
        let geometry = Geometry::new(10, false, 3, DataFile::Internal);
        let mut refcounts = Refcounts::new(geometry, bits, vec![0; 64], HostOffset(CLUSTER));
        refcounts.create(BlockIndex(0), HostOffset(2 * CLUSTER));
        (0..3).for_each(|index| refcounts.set(HostIndex(index), 1).unwrap());
        let space = Space::new(HostIndex(3), HostIndex(40), true);
        Allocator::new(geometry, refcounts, MetadataMap::new(geometry), space)
    }

    fn counts(allocator: &Allocator) -> Vec<u64> {
        (3..8).map(|index| allocator.refcounts.get(HostIndex(index)).unwrap()).collect()
    }

    #[test]
    fn blobs_lie_behind_each_other_and_are_counted_where_they_lie() {
        let mut allocator = allocator(16);
        let at = [400, 600, 500, 548, 1].map(|len| allocator.pack(len).unwrap().0);
        // The third one reaches into the next cluster, the fourth fills that one to its end.
        assert_eq!(at, [3072, 3472, 4072, 4572, 5120]);
        assert_eq!(counts(&allocator), [3, 2, 1, 0, 0]);
    }

    #[test]
    fn a_blob_reaches_only_into_the_cluster_that_follows() {
        let mut allocator = allocator(16);
        assert_eq!(allocator.pack(1000), Ok(HostOffset(3 * CLUSTER)));
        allocator.allocate().unwrap();
        assert_eq!(allocator.pack(100), Ok(HostOffset(5 * CLUSTER)));
        assert_eq!(allocator.pack(1000), Ok(HostOffset(5 * CLUSTER + 100)));
        assert_eq!(counts(&allocator), [1, 1, 2, 1, 0]);
    }

    #[test]
    fn what_another_write_packs_begins_at_its_unit() {
        let mut allocator = allocator(16);
        allocator.pack(100).unwrap();
        allocator.align_packing(512);
        assert_eq!(allocator.pack(100), Ok(HostOffset(3 * CLUSTER + 512)));
        allocator.align_packing(512);
        assert_eq!(allocator.pack(100), Ok(HostOffset(4 * CLUSTER)));
        assert_eq!(counts(&allocator), [2, 1, 0, 0, 0]);
    }

    #[test]
    fn a_full_count_ends_a_cluster() {
        let mut allocator = allocator(2);
        let at: Vec<_> = (0..4).map(|_| allocator.pack(10).unwrap().0).collect();
        assert_eq!(at, [3072, 3082, 3092, 4096]);
        assert_eq!(counts(&allocator), [3, 1, 0, 0, 0]);
    }

    #[test]
    fn a_cluster_that_is_left_gets_no_more() {
        let mut allocator = allocator(16);
        allocator.pack(10).unwrap();
        allocator.packing.leave(HostIndex(4));
        assert_eq!(allocator.pack(10), Ok(HostOffset(3 * CLUSTER + 10)));
        allocator.packing.leave(HostIndex(3));
        assert_eq!(allocator.pack(10), Ok(HostOffset(4 * CLUSTER)));
    }

    #[test]
    fn without_room_nothing_has_changed() {
        let mut allocator = allocator(16);
        for _ in 3..40 {
            allocator.pack(1000).unwrap();
            allocator.align_packing(CLUSTER);
        }
        assert_eq!(allocator.pack(10), Err(Need::Cluster(1)));
        allocator.space.extend_to(HostIndex(41));
        assert_eq!(allocator.pack(1000), Ok(HostOffset(40 * CLUSTER)));
        assert_eq!(allocator.pack(100), Err(Need::Cluster(1)));
        assert_eq!(allocator.refcounts.get(HostIndex(40)), Ok(1));
        assert_eq!(allocator.pack(20), Ok(HostOffset(40 * CLUSTER + 1000)));
    }
}
