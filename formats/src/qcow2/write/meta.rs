//! [`Meta`]: all of an image's state that changes, under one lock, and the changes themselves.
//!
//! Memory only: nobody does I/O with the lock held. A change of a mapping is done in here and nowhere
//! else: it holds the slice, sets the word, notes it for the next commit and hands the clusters that lost
//! a pointer to the commit, which lets them go when the loss is durable.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Range;

use super::super::driver::Qcow2Driver;
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{
    Blob, EntryWords, Geometry, GuestCluster, HostCluster, HostIndex, L2Entry, SliceNumber,
};
use super::allocator::{Allocator, Handed, Need};
use super::data_file::Places;
use super::pins::Epoch;
use crate::sync::Arc;

/// Why nothing is written through an entry.
pub const INTO_METADATA: &str = "an L2 entry points into metadata";

/// The state of a writable image.
pub struct Meta {
    /// Refcounts, metadata and free clusters.
    pub allocator: Allocator,
    /// What is known of the places in an external data file.
    pub places: Places,
    /// Guest clusters whose mapping somebody is about to change: nobody else may.
    pub claims: HashSet<GuestCluster>,
    /// Writes that were planned with claims, until they are finished.
    pub writes: HashMap<u64, Vec<Claim>>,
    /// Names the next one of them; never 0.
    pub next_write: u64,
    /// Changed slices, each held once for being here.
    pub dirty: HashMap<SliceNumber, DirtySlice>,
    /// Changed entries of the L1 table.
    pub dirty_l1: BTreeSet<usize>,
    /// Clusters that lost a pointer since the last freeze, one entry for each pointer.
    pub freed: Vec<Freed>,
    /// Clusters whose last loss is durable, but which a plan may still use.
    pub quarantine: VecDeque<(Epoch, Vec<Freed>)>,
    /// The commit that will carry what is changed now.
    pub next_commit: u64,
    /// The last commit that succeeded.
    pub done_commit: u64,
    /// Somebody is committing.
    pub committing: bool,
    /// Somebody is letting clusters of the quarantine go.
    pub reclaiming: bool,
    /// Bytes of words in `dirty`.
    dirty_words_len: u64,
}

/// A guest cluster that a planned write will map.
#[derive(Clone)]
pub struct Claim {
    /// Which.
    pub cluster: GuestCluster,
    /// The slice with its entry, held.
    pub slice: Arc<TableSlice>,
    /// Where the data goes.
    pub host: HostCluster,
    /// Whether the host cluster was allocated for this.
    pub allocated: bool,
    /// Whether it reads as zeroes.
    pub zeroed: bool,
    /// Which units of the cluster are data when it is mapped, besides those that are in the same host cluster.
    pub units: u32,
}

/// A slice with changes that the file does not have.
pub struct DirtySlice {
    /// The slice.
    pub slice: Arc<TableSlice>,
    /// What of it.
    pub extent: Extent,
}

/// What of a slice is changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Extent {
    /// All of it, in a table that nothing in the file points to yet.
    Body,
    /// Words of a live table.
    Words(Range<usize>),
}

/// Clusters that lost a pointer each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Freed {
    /// The first one.
    pub first: HostIndex,
    /// How many.
    pub len: u64,
    /// What they held.
    pub content: Content,
}

/// What clusters hold, or have held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Data of the guest, in the image file.
    Data,
    /// Metadata.
    Metadata,
    /// Data of the guest, in an external data file; the clusters are numbered as the guest's.
    DataFile,
}

impl Meta {
    /// The state of an image of which nothing is changed.
    pub fn new(allocator: Allocator) -> Self {
        Meta {
            allocator,
            places: Places::default(),
            claims: HashSet::new(),
            writes: HashMap::new(),
            next_write: 1,
            dirty: HashMap::new(),
            dirty_l1: BTreeSet::new(),
            freed: Vec::new(),
            quarantine: VecDeque::new(),
            next_commit: 1,
            done_commit: 0,
            committing: false,
            reclaiming: false,
            dirty_words_len: 0,
        }
    }

    /// Bytes of changed metadata.
    pub fn dirty_len(&self) -> u64 {
        self.dirty_words_len + self.dirty_l1.len() as u64 * 8 + self.allocator.refcounts.dirty_len()
    }

    /// Bytes of memory that changed metadata keeps: a slice or a block stays as a whole for a single word.
    pub fn held_len(&self) -> u64 {
        let geometry = self.allocator.geometry();
        self.dirty.len() as u64 * geometry.slice_len() + self.allocator.refcounts.held_len()
    }

    /// Whether the file has everything.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
            && self.dirty_l1.is_empty()
            && self.allocator.refcounts.is_clean()
            && self.allocator.moved.is_none()
    }

    /// Whether there is anything that a commit would take further, pins apart.
    pub fn is_settled(&self) -> bool {
        self.is_clean()
            && self.freed.is_empty()
            && self.allocator.left.is_empty()
            && self.quarantine.is_empty()
            && !self.reclaiming
    }

    /// Sets the entry of `cluster` in a slice that is held in the cache. The clusters of the old entry
    /// must be [freed](Self::free_entry) by the caller where they are not used on.
    pub fn set_entry(
        &mut self,
        driver: &Qcow2Driver,
        slice: &Arc<TableSlice>,
        cluster: GuestCluster,
        entry: EntryWords,
    ) {
        let geometry = driver.geometry();
        let number = geometry.slice_of(geometry.start_of(cluster));
        slice.set_entry(cluster, entry, self.next_commit);
        // Both words of an entry go to the file together: they are in one sector.
        let first = slice.first_word(cluster);
        let end = first + geometry.entry_words();
        let key = SliceKey { image: driver.number(), slice: number };
        match self.dirty.get_mut(&number) {
            Some(dirty) => {
                if let Extent::Words(words) = &mut dirty.extent {
                    let before = words.len();
                    *words = words.start.min(first)..words.end.max(end);
                    self.dirty_words_len += (words.len() - before) as u64 * 8;
                }
            }
            None => {
                // Held by the caller, so it is in the cache: this cannot fail.
                driver.tables().hold(key, slice);
                self.mark(number, slice, Extent::Words(first..end));
            }
        }
    }

    /// Notes a changed slice, which is held once for it. What was to be written of one of a table that is gone is not
    /// any more.
    pub fn mark(&mut self, number: SliceNumber, slice: &Arc<TableSlice>, extent: Extent) {
        self.dirty_words_len += words_len(&extent, slice);
        let before = self.dirty.insert(number, DirtySlice { slice: Arc::clone(slice), extent });
        if let Some(before) = before {
            self.dirty_words_len -= words_len(&before.extent, &before.slice);
            before.slice.release();
        }
    }

    /// Takes the changed slices for a commit.
    pub fn take_dirty(&mut self) -> HashMap<SliceNumber, DirtySlice> {
        self.dirty_words_len = 0;
        std::mem::take(&mut self.dirty)
    }

    /// Puts a slice back that a commit has not written; it is still held for that.
    pub fn put_back(&mut self, number: SliceNumber, taken: DirtySlice) {
        let Some(now) = self.dirty.remove(&number) else {
            self.mark(number, &taken.slice, taken.extent);
            return;
        };
        self.dirty_words_len -= words_len(&now.extent, &now.slice);
        let extent = match (taken.extent, now.extent) {
            (Extent::Words(a), Extent::Words(b)) => Extent::Words(a.start.min(b.start)..a.end.max(b.end)),
            (Extent::Body, _) | (_, Extent::Body) => Extent::Body,
        };
        // It was held for both.
        taken.slice.release();
        self.mark(number, &now.slice, extent);
    }

    /// Sets an entry of the L1 table.
    pub fn set_l1(&mut self, driver: &Qcow2Driver, index: usize, raw: u64) {
        driver.l1().set(index, raw);
        self.dirty_l1.insert(index);
    }

    /// A host cluster for a cluster of the guest that has none, if one that reads as zeroes is at hand.
    pub fn allocate_zeroed(
        &mut self,
        geometry: Geometry,
        cluster: GuestCluster,
    ) -> Result<Option<HostCluster>, Need> {
        if !geometry.is_external() {
            return self.allocator.allocate_zeroed();
        }
        let zeroed = self.places.is_zeroed(cluster);
        Ok(zeroed.then(|| self.places.take(geometry, cluster).host))
    }

    /// Any host cluster for a cluster of the guest that has none.
    pub fn allocate(&mut self, geometry: Geometry, cluster: GuestCluster) -> Result<Handed, Need> {
        if geometry.is_external() {
            Ok(self.places.take(geometry, cluster))
        } else {
            self.allocator.allocate()
        }
    }

    /// A data cluster that was allocated, and has not got an entry, goes back.
    pub fn give_back(&mut self, geometry: Geometry, host: HostCluster) {
        self.free_data(geometry, geometry.host_index(host.start()), 1);
    }

    /// The clusters of an entry that is gone have lost a pointer. Fails, changing nothing, if one of them
    /// is metadata.
    pub fn free_entry(&mut self, driver: &Qcow2Driver, entry: L2Entry) -> Result<(), &'static str> {
        let (first, len) = self.check_entry(driver, entry)?;
        self.free_data(driver.geometry(), first, len);
        Ok(())
    }

    fn free_data(&mut self, geometry: Geometry, first: HostIndex, len: u64) {
        if !geometry.is_external() {
            return self.free(first, len, Content::Data);
        }
        for index in (first.0..first.0 + len).map(HostIndex) {
            if self.places.lose(index) {
                self.free(index, 1, Content::DataFile);
            }
        }
    }

    /// The host clusters of an entry, as first and count. Fails if one of them is metadata.
    pub fn check_entry(
        &self,
        driver: &Qcow2Driver,
        entry: L2Entry,
    ) -> Result<(HostIndex, u64), &'static str> {
        let geometry = driver.geometry();
        let (at, len) = match entry {
            L2Entry::Unallocated | L2Entry::Zero { host: None } | L2Entry::Split { host: None, .. } => {
                return Ok((HostIndex(0), 0));
            }
            L2Entry::Zero { host: Some(host) }
            | L2Entry::Data { host, .. }
            | L2Entry::Split { host: Some(host), .. } => (host.start(), geometry.cluster_len()),
            L2Entry::Compressed(Blob { at, len_max }) => (at, len_max),
        };
        let (first, len) = geometry.host_span(at, len);
        if geometry.is_external() {
            return Ok((first, len));
        }
        let metadata = |index| self.allocator.map.kind(HostIndex(index)).is_some();
        if (first.0..first.0 + len).any(metadata) {
            return Err(INTO_METADATA);
        }
        Ok((first, len))
    }

    /// These clusters have lost a pointer each.
    pub fn free(&mut self, first: HostIndex, len: u64, content: Content) {
        if len == 0 {
            return;
        }
        if let Some(last) = self.freed.last_mut()
            && last.content == content
            && last.first.0 + last.len == first.0
        {
            last.len += len;
            return;
        }
        self.freed.push(Freed { first, len, content });
    }
}

fn words_len(extent: &Extent, slice: &TableSlice) -> u64 {
    match extent {
        Extent::Body => slice.len() as u64 * 8,
        Extent::Words(words) => words.len() as u64 * 8,
    }
}
