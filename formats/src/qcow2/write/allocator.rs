//! Handing out host clusters: which one, and that nobody has it.
//!
//! Memory only. What takes I/O first (a refcount block that is not in memory, a longer file) is said by
//! [`Need`], and whoever may wait sees to it and comes again; nothing has changed then. Every cluster
//! that leaves here had refcount 0, lay in no metadata, and has refcount 1 now.

use super::super::header::REFCOUNT_TABLE_LEN_MAX;
use super::super::types::{Geometry, HostCluster, HostIndex};
use super::metadata_map::{Kind, MetadataMap};
use super::packing::Packing;
use super::refcounts::{BlockIndex, Refcounts};
use super::runs::RunSet;
use crate::address::HostOffset;

/// First host offset that entries cannot name (specification: 56 bits).
pub const HOST_END: u64 = 1 << 56;

/// What has to be done before a cluster can be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// This refcount block must be read.
    Block(BlockIndex),
    /// There must be room for this many more clusters at the end. Clusters that are free elsewhere do not help.
    Room(u64),
    /// Any cluster: one on the lists of free ones, or room for this many more at the end.
    Cluster(u64),
    /// Nothing helps: the format has no more room.
    NoSpace,
    /// The image contradicts itself.
    Fault(&'static str),
}

/// A cluster that was handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handed {
    /// Where it is.
    pub host: HostCluster,
    /// Whether it reads as zeroes.
    pub zeroed: bool,
}

/// The clusters that can be handed out.
pub struct Space {
    /// Free, and punched since they were last used.
    zeroed: RunSet,
    /// Free, with any content.
    stale: RunSet,
    /// From here on nothing was ever used.
    fresh: HostIndex,
    /// The storage reaches to here.
    end: HostIndex,
    /// Whether what was never used reads as zeroes.
    fresh_is_zero: bool,
    /// Where the search for clusters that were free at open goes on.
    search: HostIndex,
    /// Where it ends.
    search_end: HostIndex,
}

/// Refcounts, metadata and free clusters: what an allocation needs.
pub struct Allocator {
    geometry: Geometry,
    /// The refcounts.
    pub refcounts: Refcounts,
    /// Where metadata lies.
    pub map: MetadataMap,
    /// The free clusters.
    pub space: Space,
    /// Where blobs of compressed clusters go.
    pub packing: Packing,
    /// The refcount table has moved; the header does not say so yet.
    pub moved: Option<MovedTable>,
    /// Clusters of refcount tables that were moved away from, to be freed with the next commit.
    pub left: Vec<(HostIndex, u64)>,
}

/// A refcount table in a new place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MovedTable {
    /// Its clusters.
    pub clusters: u64,
    /// A durable copy of it is there already; the header may point to it.
    pub durable: bool,
}

impl Space {
    /// Room in a storage that reaches to `end`, of which nothing from `fresh` on was ever used.
    pub fn new(fresh: HostIndex, end: HostIndex, fresh_is_zero: bool) -> Self {
        Space {
            zeroed: RunSet::default(),
            stale: RunSet::default(),
            fresh,
            end,
            fresh_is_zero,
            search: HostIndex(0),
            search_end: fresh,
        }
    }

    /// The first cluster that was never used.
    pub fn fresh(&self) -> HostIndex {
        self.fresh
    }

    /// The first cluster that the storage does not have.
    pub fn end(&self) -> HostIndex {
        self.end
    }

    /// Whether clusters are free below what was never used.
    pub fn has_any(&self) -> bool {
        self.zeroed.first().is_some() || self.stale.first().is_some()
    }

    /// The storage has become longer.
    pub fn extend_to(&mut self, end: HostIndex) {
        self.end = self.end.max(end);
    }

    /// Clusters have become free.
    pub fn give_back(&mut self, first: HostIndex, len: u64, zeroed: bool) {
        let set = if zeroed { &mut self.zeroed } else { &mut self.stale };
        if !set.insert(first, len) {
            // Found again by a search, as those that were free at open.
            self.search = self.search.min(first);
            self.search_end = self.fresh;
        }
    }
}

impl Allocator {
    /// An allocator over these.
    pub fn new(geometry: Geometry, refcounts: Refcounts, map: MetadataMap, space: Space) -> Self {
        let packing = Packing::default();
        Allocator { geometry, refcounts, map, space, packing, moved: None, left: Vec::new() }
    }

    /// What all addresses depend on.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// `len` clusters in a row behind everything that is used, for metadata of this kind.
    pub fn allocate_row(&mut self, len: u64, kind: Kind) -> Result<HostCluster, Need> {
        loop {
            let start = self.free_stretch(len)?;
            let blocks =
                self.refcounts.block_of(start).0..=self.refcounts.block_of(HostIndex(start.0 + len)).0;
            let missing =
                |block: &usize| self.refcounts.block_at(BlockIndex(*block)).is_ok_and(|at| at.is_none());
            if let Some(block) = blocks.clone().find(missing) {
                let first = block as u64 * self.refcounts.block_entries();
                // It lies where the row would have begun.
                self.describe(HostIndex(first.max(start.0)))?;
                continue;
            }
            for index in start.0..start.0 + len {
                self.refcounts.set(HostIndex(index), 1)?;
            }
            self.space.fresh = HostIndex(start.0 + len);
            let host = self.geometry.host_at(start);
            self.map.add(host.start(), len * self.geometry.cluster_len(), kind);
            return Ok(host);
        }
    }

    /// Moves the refcount table away from where it is.
    pub fn relocate_table(&mut self) -> Result<(), Need> {
        self.grow_table(BlockIndex(0))
    }

    /// A cluster that reads as zeroes, if one is at hand.
    pub fn allocate_zeroed(&mut self) -> Result<Option<HostCluster>, Need> {
        if let Some(index) = self.space.zeroed.first() {
            self.claim(index)?;
            self.space.zeroed.pop();
            return Ok(Some(self.geometry.host_at(index)));
        }
        if !self.space.fresh_is_zero {
            return Ok(None);
        }
        self.allocate_fresh().map(Some)
    }

    /// Any cluster: one with stale content before one that reads as zeroes, both before a longer file.
    pub fn allocate(&mut self) -> Result<Handed, Need> {
        for zeroed in [false, true] {
            let set = if zeroed { &self.space.zeroed } else { &self.space.stale };
            let Some(index) = set.first() else { continue };
            self.claim(index)?;
            if zeroed {
                self.space.zeroed.pop()
            } else {
                self.space.stale.pop()
            };
            return Ok(Handed { host: self.geometry.host_at(index), zeroed });
        }
        let zeroed = self.space.fresh_is_zero;
        match self.allocate_fresh() {
            // The lists are empty, and come before a longer file: either will do.
            Err(Need::Room(clusters)) => Err(Need::Cluster(clusters)),
            fresh => fresh.map(|host| Handed { host, zeroed }),
        }
    }

    /// As [`allocate`](Self::allocate), for metadata of this kind.
    pub fn allocate_metadata(&mut self, kind: Kind) -> Result<HostCluster, Need> {
        let host = self.allocate()?.host;
        self.map.add(host.start(), self.geometry.cluster_len(), kind);
        Ok(host)
    }

    /// As [`allocate_metadata`](Self::allocate_metadata), so many clusters in a row.
    pub fn allocate_stretch(&mut self, clusters: u64, kind: Kind) -> Result<HostCluster, Need> {
        if clusters == 1 {
            return self.allocate_metadata(kind);
        }
        let entries = self.refcounts.block_entries();
        // With the blocks that describe them, and those that describe these, too.
        let room = clusters + clusters / (entries - 1) + 4;
        let (start, last) = loop {
            let start = self.free_stretch(room)?;
            let last = self.refcounts.block_of(HostIndex(start.0 + room));
            if last.0 < self.refcounts.table_len() {
                break (start, last);
            }
            self.grow_table(last)?;
        };
        let next = self.create_blocks(start, last)?;
        for index in next.0..next.0 + clusters {
            self.refcounts.set(HostIndex(index), 1)?;
        }
        self.space.fresh = HostIndex(next.0 + clusters);
        let host = self.geometry.host_at(next);
        self.map.add(host.start(), clusters * self.geometry.cluster_len(), kind);
        Ok(host)
    }

    /// Sees to it that the refcount of the cluster can be set: that a block describes it.
    pub fn describe(&mut self, index: HostIndex) -> Result<(), Need> {
        let block = self.refcounts.block_of(index);
        loop {
            if block.0 >= self.refcounts.table_len() {
                self.grow_table(block)?;
            }
            if self.refcounts.block_at(block)?.is_some() {
                return Ok(());
            }
            let host = self.allocate_fresh()?;
            if self.refcounts.block_at(block)?.is_none() {
                self.refcounts.create(block, host.start());
                self.map.add(host.start(), self.geometry.cluster_len(), Kind::RefcountBlock);
            } else {
                // The block was made on the way to this cluster, which nobody needs then.
                let index = self.geometry.host_index(host.start());
                self.refcounts.set(index, 0)?;
                self.space.give_back(index, 1, false);
            }
        }
    }

    /// Looks for clusters that were free at open, one block's worth. `false`: all of them are found.
    pub fn search(&mut self) -> Result<bool, Need> {
        let space = &self.space;
        if space.search >= space.search_end {
            return Ok(false);
        }
        let from = space.search;
        let entries = self.refcounts.block_entries();
        let to = HostIndex(((from.0 / entries + 1) * entries).min(space.search_end.0));
        let block = self.refcounts.block_of(from);
        let described = self.refcounts.block_at(block)?.is_some();
        if described && !self.refcounts.has(block) {
            // Those before it were looked through.
            self.refcounts.evict();
            return Err(Need::Block(block));
        }
        // What no block describes is left alone: it would need a block first.
        for index in if described { from.0..to.0 } else { 0..0 } {
            let index = HostIndex(index);
            let listed = self.space.zeroed.contains(index) || self.space.stale.contains(index);
            if !listed && !self.is_used(index)? && !self.space.stale.insert(index, 1) {
                self.space.search = index;
                return Ok(true);
            }
        }
        self.space.search = to;
        Ok(true)
    }

    /// Takes a cluster off a list: it must be as free as the list says.
    fn claim(&mut self, index: HostIndex) -> Result<(), Need> {
        if self.refcounts.get(index)? != 0 || self.map.kind(index).is_some() {
            return Err(Need::Fault("a free cluster is in use"));
        }
        self.refcounts.set(index, 1)
    }

    fn allocate_fresh(&mut self) -> Result<HostCluster, Need> {
        loop {
            let index = self.space.fresh;
            if self.geometry.host_at(index).start().0 >= HOST_END {
                return Err(Need::NoSpace);
            }
            if index >= self.space.end {
                return Err(Need::Room(1));
            }
            if self.is_used(index)? {
                self.space.fresh = HostIndex(index.0 + 1);
                continue;
            }
            let block = self.refcounts.block_of(index);
            if block.0 >= self.refcounts.table_len() {
                self.grow_table(block)?;
            } else if self.refcounts.block_at(block)?.is_none() {
                // The new block lies in the first cluster that it describes.
                self.create_block(block, index)?;
                self.space.fresh = HostIndex(index.0 + 1);
            } else {
                self.refcounts.set(index, 1)?;
                self.space.fresh = HostIndex(index.0 + 1);
                return Ok(self.geometry.host_at(index));
            }
        }
    }

    fn is_used(&self, index: HostIndex) -> Result<bool, Need> {
        Ok(self.refcounts.get(index)? != 0 || self.map.kind(index).is_some())
    }

    fn create_block(&mut self, block: BlockIndex, index: HostIndex) -> Result<(), Need> {
        let at = self.geometry.host_at(index).start();
        self.refcounts.create(block, at);
        self.map.add(at, self.geometry.cluster_len(), Kind::RefcountBlock);
        self.refcounts.set(index, 1)
    }

    /// Makes the blocks that are missing up to `last`, in the free stretch at `start`; returns what is behind
    /// them.
    fn create_blocks(&mut self, start: HostIndex, last: BlockIndex) -> Result<HostIndex, Need> {
        let mut next = start;
        for block in self.refcounts.block_of(start).0..=last.0 {
            if self.refcounts.block_at(BlockIndex(block))?.is_none() {
                self.create_block(BlockIndex(block), next)?;
                next = HostIndex(next.0 + 1);
            }
        }
        Ok(next)
    }

    /// Puts a longer refcount table, and the blocks that describe it, at the end of what is used.
    fn grow_table(&mut self, wanted: BlockIndex) -> Result<(), Need> {
        let cluster_len = self.geometry.cluster_len();
        let entries = self.refcounts.block_entries();
        let old_at = self.refcounts.table_at();
        let (old, old_clusters) = self.geometry.host_span(old_at, self.refcounts.table_len() as u64 * 8);
        // The table describes itself and the blocks that it needs for that, with a half to spare.
        let mut clusters = (old_clusters * 3 / 2).max(old_clusters + 1);
        let (start, room) = loop {
            if clusters * cluster_len > REFCOUNT_TABLE_LEN_MAX {
                return Err(Need::NoSpace);
            }
            // The blocks describe themselves, too, and the first and the last of them more than this.
            let room = clusters + clusters / (entries - 1) + 4;
            let start = self.free_stretch(room)?;
            let last = self.refcounts.block_of(HostIndex(start.0 + room)).max(wanted);
            if clusters * (cluster_len / 8) > last.0 as u64 {
                break (start, room);
            }
            clusters = (last.0 as u64 + 1).div_ceil(cluster_len / 8);
        };
        self.refcounts.lengthen_table(usize::try_from(clusters * (cluster_len / 8)).unwrap_or(0));
        let last = self.refcounts.block_of(HostIndex(start.0 + room));
        let next = self.create_blocks(start, last)?;
        for index in next.0..next.0 + clusters {
            self.refcounts.set(HostIndex(index), 1)?;
        }
        let at = self.geometry.host_at(next).start();
        self.map.add(at, clusters * cluster_len, Kind::RefcountTable);
        self.refcounts.move_table(at, self.refcounts.table_len());
        self.space.fresh = HostIndex(next.0 + clusters);
        self.left.push((old, old_clusters));
        self.moved = Some(MovedTable { clusters, durable: false });
        Ok(())
    }

    /// `len` free clusters in a row at the end of what is used, all blocks that describe them in memory.
    fn free_stretch(&mut self, len: u64) -> Result<HostIndex, Need> {
        let mut start = self.space.fresh;
        let mut index = start;
        // One more: the block of the cluster behind is wanted in memory, too.
        while index.0 <= start.0 + len {
            if self.is_used(index)? {
                start = HostIndex(index.0 + 1);
            }
            index = HostIndex(index.0 + 1);
        }
        if start.0 + len > self.space.end.0 {
            return Err(Need::Room(start.0 + len - self.space.fresh.0));
        }
        self.space.fresh = start;
        Ok(start)
    }

    /// Where the cluster behind the last one ever used begins.
    pub fn used_end(&self) -> HostOffset {
        self.geometry.host_at(self.space.fresh).start()
    }
}

#[cfg(test)]
#[path = "allocator_tests.rs"]
mod tests;
