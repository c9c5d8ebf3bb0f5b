//! L1 in memory, L2 in slices under a byte budget.
//!
//! A warm lookup takes a shared lock on one set of a few slots and allocates nothing. Loading a slice
//! holds no lock: different slices load in parallel, the same one once. Slices hold the file's words as
//! they are; the way to what they say is [`TableSlice::entry`], which checks.
//!
//! Entries are atomic words. Whoever changes a slice holds it in the cache first, so that there is never
//! more than one of it, and it stays until what was changed is in the file.

use super::flight::Flights;
use super::header::TableLocation;
use super::types::{EntryFault, EntryWords, Geometry, GuestCluster, HostCluster, L2Entry, SliceNumber};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::read_exact;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, OnceLock, RwLock};

/// Slots of a set: a lookup compares this many keys at most. Our choice.
const WAYS: usize = 8;
/// Bytes that an L1 table is read in. Our choice: it is never in memory twice.
const L1_CHUNK_LEN: usize = 64 << 10;

/// Fewest entries that an L1 table is made longer by. Our choice: a page.
const GROW_LEN_MIN: usize = 512;

/// An L1 table in memory.
pub struct L1Table {
    entries: Box<[AtomicU64]>,
    /// What it was made longer by.
    more: OnceLock<Box<L1Table>>,
    geometry: Geometry,
}

/// Which image of a chain a slice belongs to: 0 is the one at the top.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ImageNumber(pub u16);

/// What a slice is found by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SliceKey {
    /// The image.
    pub image: ImageNumber,
    /// The part of its disk.
    pub slice: SliceNumber,
}

/// A part of an L2 table.
pub struct TableSlice {
    words: Box<[AtomicU64]>,
    geometry: Geometry,
    /// Who needs it to stay in memory: it has changes, or will have. Raised only under its set's lock.
    holds: AtomicUsize,
    /// The commit that carries its last change.
    changed_in: AtomicU64,
    /// An entry points into metadata. Nothing is written through it unlooked at.
    suspect: AtomicBool,
    /// Which metadata there was when that was found out, as the map of it counts; 0: nobody has looked yet.
    looked_at: AtomicU64,
}

/// Slices of the L2 tables of a chain of images, of a bounded number.
pub struct TableCache {
    sets: Box<[RwLock<Set>]>,
    ways: usize,
    loading: Flights<SliceKey, Arc<TableSlice>>,
    loads: AtomicUsize,
}

#[derive(Default)]
struct Set {
    slots: Vec<Slot>,
    hand: usize,
}

struct Slot {
    key: SliceKey,
    slice: Arc<TableSlice>,
    used: AtomicBool,
}

impl L1Table {
    /// Reads the table at `location`, as far as a disk of `size` bytes needs it. Entries that a disk of
    /// that size needs and the table does not have are unallocated. A file that ends inside of the table is an error.
    pub fn load(
        storage: &Arc<dyn Storage>,
        location: TableLocation,
        geometry: Geometry,
        size: u64,
    ) -> Result<Self> {
        let needed = geometry.l1_entries_for(size).min(u64::from(location.entries));
        let table_len = needed * 8;
        let file_len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        // Before room is taken for it: a short file cannot claim a large table.
        if location.at.checked_add(table_len).is_none_or(|end| end.0 > file_len) {
            return Err(Error::new(ErrorKind::Corrupt, "the file ends inside of the L1 table")
                .with_path(&storage.facts().path)
                .with_offset(location.at.0));
        }
        let mut entries = Vec::with_capacity(usize::try_from(needed).unwrap_or(0));
        let mut chunk = vec![0u8; L1_CHUNK_LEN];
        let mut done = 0u64;
        while done < table_len {
            let len = L1_CHUNK_LEN.min(usize::try_from(table_len - done).unwrap_or(L1_CHUNK_LEN));
            let part = chunk.get_mut(..len).unwrap_or_default();
            read_exact(storage, HostOffset(location.at.0 + done), part)?;
            // Offset 0 is no table, whatever the flag beside it says (specification).
            let known = |raw| if geometry.decode_l1(raw) == Ok(None) { 0 } else { raw };
            entries.extend(words_of(part).map(|raw| AtomicU64::new(known(raw))));
            done += len as u64;
        }
        Ok(L1Table { entries: entries.into_boxed_slice(), more: OnceLock::new(), geometry })
    }

    /// Makes it at least so long; new entries are unallocated. One thread at a time, while others use it.
    pub fn grow(&self, needed: usize) {
        let Some(missing) = needed.checked_sub(self.entries.len()).filter(|missing| *missing > 0) else {
            return;
        };
        let more = self.more.get_or_init(|| {
            // Twice as many as before it: the way to the last of any number of parts stays short.
            let len = missing.max(2 * self.entries.len()).max(GROW_LEN_MIN);
            let entries = (0..len).map(|_| AtomicU64::new(0)).collect();
            Box::new(L1Table { entries, more: OnceLock::new(), geometry: self.geometry })
        });
        more.grow(missing);
    }

    #[inline]
    fn entry(&self, index: usize) -> Option<&AtomicU64> {
        match self.entries.get(index) {
            None => self.entry_in_more(index),
            there => there,
        }
    }

    #[cold]
    fn entry_in_more(&self, index: usize) -> Option<&AtomicU64> {
        self.more.get()?.entry(index.checked_sub(self.entries.len())?)
    }

    /// Where the L2 table for the guest's byte at `offset` lies; `None` when nothing there is allocated.
    pub fn l2_table(&self, offset: u64) -> std::result::Result<Option<HostCluster>, EntryFault> {
        match self.entry(self.geometry.l1_index(offset)) {
            Some(raw) => self.geometry.decode_l1(raw.load(Ordering::Acquire)),
            None => Ok(None),
        }
    }

    /// Entry number `index` as it is; 0 behind the end.
    pub fn raw(&self, index: usize) -> u64 {
        self.entry(index).map_or(0, |raw| raw.load(Ordering::Acquire))
    }

    /// Changes an entry. Only under the lock of the image's metadata.
    pub fn set(&self, index: usize, raw: u64) {
        if let Some(entry) = self.entry(index) {
            entry.store(raw, Ordering::Release);
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len() + self.more.get().map_or(0, |more| more.len())
    }
}

impl TableSlice {
    /// Reads the slice that begins at `at`. A file that ends inside of it is an error: metadata that is
    /// not there is not zeroes.
    pub fn load(storage: &Arc<dyn Storage>, at: HostOffset, geometry: Geometry) -> Result<Self> {
        let mut bytes = vec![0u8; usize::try_from(geometry.slice_len()).unwrap_or(0)];
        let got = storage
            .pread(&mut bytes, at)
            .map_err(|e| Error::io("cannot read an L2 table", e).with_offset(at.0))?;
        if got < bytes.len() {
            return Err(
                Error::new(ErrorKind::Corrupt, "the file ends inside of an L2 table").with_offset(at.0)
            );
        }
        Ok(TableSlice::of_words(words_of(&bytes), geometry))
    }

    /// A slice in which nothing is allocated.
    pub fn empty(geometry: Geometry) -> Self {
        let words = usize::try_from(geometry.slice_len() / 8).unwrap_or(0);
        TableSlice::of_words(std::iter::repeat_n(0, words), geometry)
    }

    fn of_words(words: impl Iterator<Item = u64>, geometry: Geometry) -> Self {
        TableSlice {
            words: words.map(AtomicU64::new).collect(),
            geometry,
            holds: AtomicUsize::new(0),
            changed_in: AtomicU64::new(0),
            suspect: AtomicBool::new(false),
            looked_at: AtomicU64::new(0),
        }
    }

    /// Says whether an entry points into metadata, of which there is what the map of it had at `version`. Only under
    /// the lock of the image's metadata.
    pub fn note_look(&self, version: u64, suspect: bool) {
        self.suspect.store(suspect, Ordering::Release);
        self.looked_at.store(version, Ordering::Release);
    }

    /// The version of the map of metadata that the entries were held against last.
    pub fn looked_at(&self) -> u64 {
        self.looked_at.load(Ordering::Acquire)
    }

    /// Whether an entry was found then that points into metadata.
    pub fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }

    /// Word number `index` as it is; 0 behind the end.
    pub fn raw(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Changes a word, which commit number `commit` will carry. Only under the lock of the image's
    /// metadata, and while the slice is held.
    pub fn set(&self, index: usize, raw: u64, commit: u64) {
        if let Some(word) = self.words.get(index) {
            self.changed_in.store(commit, Ordering::Release);
            word.store(raw, Ordering::Release);
        }
    }

    /// Says that commit number `commit` will carry the slice. As [`set`](Self::set).
    pub fn touch(&self, commit: u64) {
        self.changed_in.store(commit, Ordering::Release);
    }

    /// Makes it one in which nothing is allocated. As [`set`](Self::set), and while no table has it.
    pub fn clear(&self, commit: u64) {
        self.touch(commit);
        self.words.iter().for_each(|word| word.store(0, Ordering::Release));
    }

    /// The commit that carries the last change.
    pub fn changed_in(&self) -> u64 {
        self.changed_in.load(Ordering::Acquire)
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// The words of the range as they stand in the file.
    pub fn bytes(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        let words = self.words.get(range).unwrap_or_default();
        words.iter().flat_map(|word| word.load(Ordering::Acquire).to_be_bytes()).collect()
    }

    /// Ends one hold.
    pub fn release(&self) {
        self.holds.fetch_sub(1, Ordering::Release);
    }

    /// Index of the first word of the cluster's entry.
    pub fn first_word(&self, cluster: GuestCluster) -> usize {
        self.geometry.index_in_slice(cluster).saturating_mul(self.geometry.entry_words())
    }

    /// The entry of `cluster` as it stands. Both words of an entry are of the same moment, or of a change that
    /// is between them: see [`set_entry`](Self::set_entry).
    pub fn entry_words(&self, cluster: GuestCluster) -> EntryWords {
        let first = self.first_word(cluster);
        if !self.geometry.extended_l2() {
            return EntryWords { raw: self.raw(first), bitmap: 0 };
        }
        loop {
            let (raw, bitmap) = (self.raw(first), self.raw(first + 1));
            if self.raw(first) == raw {
                return EntryWords { raw, bitmap };
            }
        }
    }

    /// The entry of `cluster`, checked.
    pub fn entry(&self, cluster: GuestCluster) -> std::result::Result<L2Entry, EntryFault> {
        let EntryWords { raw, bitmap } = self.entry_words(cluster);
        self.geometry.decode_l2(raw, bitmap, cluster)
    }

    /// Changes the entry of `cluster`, under the conditions of [`set`](Self::set). Who looks in between sees
    /// the old state: a cluster comes before the subclusters in it, and goes after them. Only those of a
    /// compressed one come before it, as they mean nothing there.
    pub fn set_entry(&self, cluster: GuestCluster, entry: EntryWords, commit: u64) {
        let first = self.first_word(cluster);
        if !self.geometry.extended_l2() {
            return self.set(first, entry.raw, commit);
        }
        let cluster_first = entry.raw != 0 && !self.geometry.is_compressed(self.raw(first));
        if cluster_first {
            self.set(first, entry.raw, commit);
        }
        self.set(first + 1, entry.bitmap, commit);
        if !cluster_first {
            self.set(first, entry.raw, commit);
        }
    }
}

impl TableCache {
    /// A cache of at most `budget_len` bytes for slices of up to `slice_len` bytes, but of two slices at least.
    pub fn new(budget_len: u64, slice_len: u64) -> Self {
        let capacity = usize::try_from(budget_len / slice_len.max(1)).unwrap_or(usize::MAX).max(2);
        let ways = capacity.min(WAYS);
        // Sets are made in advance, their slots when they are needed.
        let sets = (capacity / ways).clamp(1, SETS_MAX);
        TableCache {
            sets: (0..sets).map(|_| RwLock::new(Set::default())).collect(),
            ways,
            loading: Flights::new(),
            loads: AtomicUsize::new(0),
        }
    }

    /// The slice, if it is in memory. Takes a shared lock on its set for a moment.
    pub fn get(&self, key: SliceKey) -> Option<Arc<TableSlice>> {
        let set = self.set_of(key)?.read();
        let slot = set.slots.iter().find(|slot| slot.key == key)?;
        // Storing only what is new keeps the line shared between the processors.
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(&slot.slice))
    }

    /// The slice, read by `load` from where `locate` says if it is not in memory. Where the table moves
    /// meanwhile, it is read anew: whoever moves one [puts its slices here](Self::hold_or_insert) first.
    pub fn get_or_load(
        &self,
        key: SliceKey,
        locate: impl Fn() -> Result<HostOffset>,
        load: impl Fn(HostOffset) -> Result<TableSlice>,
    ) -> Result<Arc<TableSlice>> {
        if let Some(slice) = self.get(key) {
            return Ok(slice);
        }
        self.loading.join(key, || {
            loop {
                // It may have come between the look above and here.
                if let Some(slice) = self.get(key) {
                    return Ok(slice);
                }
                self.loads.fetch_add(1, Ordering::Relaxed);
                let at = locate()?;
                let slice = Arc::new(load(at)?);
                let Some(set) = self.set_of(key) else { return Ok(slice) };
                let mut set = set.write();
                // A table that has moved may have been changed, written and dropped from here since.
                if locate()? == at {
                    return Ok(set.insert(key, slice, self.ways));
                }
            }
        })
    }

    /// Keeps the slice in memory until it is [released](TableSlice::release). `false`: it is not what the
    /// cache has under the key any more, and nothing was done.
    pub fn hold(&self, key: SliceKey, slice: &Arc<TableSlice>) -> bool {
        let Some(set) = self.set_of(key) else { return false };
        // Who evicts has this lock for itself, and looks at the holds.
        let set = set.read();
        let there = set.slots.iter().any(|slot| slot.key == key && Arc::ptr_eq(&slot.slice, slice));
        if there {
            slice.holds.fetch_add(1, Ordering::Relaxed);
        }
        there
    }

    /// The slice under the key, or else `slice` put there; held in both cases.
    pub fn hold_or_insert(&self, key: SliceKey, slice: Arc<TableSlice>) -> Arc<TableSlice> {
        let Some(set) = self.set_of(key) else { return slice };
        let mut set = set.write();
        slice.holds.fetch_add(1, Ordering::Relaxed);
        let kept = set.insert(key, Arc::clone(&slice), self.ways);
        if !Arc::ptr_eq(&kept, &slice) {
            kept.holds.fetch_add(1, Ordering::Relaxed);
        }
        kept
    }

    /// How many slices it has at most, but for those that are held.
    pub fn capacity(&self) -> usize {
        self.sets.len() * self.ways
    }

    /// How many slices have been read from files so far.
    pub fn loads(&self) -> usize {
        self.loads.load(Ordering::Relaxed)
    }

    /// Neighbours go to different sets, so that a contiguous part of the disk fills all of them evenly.
    fn set_of(&self, key: SliceKey) -> Option<&RwLock<Set>> {
        let spread = key.slice.0.wrapping_add(u64::from(key.image.0).wrapping_mul(IMAGE_STRIDE));
        self.sets.get(usize::try_from(spread % self.sets.len() as u64).unwrap_or(0))
    }
}

/// Keeps equal slices of different images of a chain in different sets. Our choice: any odd number that
/// is not small.
const IMAGE_STRIDE: u64 = 0x9e37_79b1;
/// Most sets: bounds what an absurd budget costs in advance. Our choice.
const SETS_MAX: usize = 1 << 16;

impl Set {
    /// Puts the slice into a free slot, or into that of the first one that was not used since the hand
    /// came by last and is not held. Where all are held, there are more slots than ways for a time. What
    /// is there under the key already stays; what is there in the end is returned.
    fn insert(&mut self, key: SliceKey, slice: Arc<TableSlice>, ways: usize) -> Arc<TableSlice> {
        if let Some(slot) = self.slots.iter().find(|slot| slot.key == key) {
            return Arc::clone(&slot.slice);
        }
        let slot = Slot { key, slice: Arc::clone(&slice), used: AtomicBool::new(false) };
        while self.slots.len() > ways
            && let Some(surplus) = self.slots.iter().position(Slot::evictable)
        {
            self.slots.swap_remove(surplus);
        }
        if self.slots.len() >= ways
            && let Some(victim) = self.victim().and_then(|victim| self.slots.get_mut(victim))
        {
            *victim = slot;
        } else {
            self.slots.push(slot);
        }
        slice
    }

    fn victim(&mut self) -> Option<usize> {
        // Two rounds are enough: the first one clears every mark.
        for _ in 0..=2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = self.slots.get(self.hand)?;
            if slot.evictable() && !slot.used.swap(false, Ordering::Relaxed) {
                return Some(self.hand);
            }
        }
        None
    }
}

impl Slot {
    fn evictable(&self) -> bool {
        self.slice.holds.load(Ordering::Acquire) == 0
    }
}

fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word))
}

#[cfg(all(test, not(shuttle)))]
#[path = "tables_tests.rs"]
mod tests;

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::super::types::DataFile;
    use super::*;
    use crate::sync::thread;

    /// Two slots, three slices, three threads: whoever asks for a slice gets that one.
    #[test]
    fn a_slice_is_never_another_one() {
        shuttle::check_pct(
            || {
                let cache = Arc::new(TableCache::new(0, 512));
                let geometry = Geometry::new(9, false, 3, DataFile::Internal);
                let ask = |first: u64| {
                    let cache = Arc::clone(&cache);
                    thread::spawn(move || {
                        for number in [first, first + 1, 0] {
                            let word = number % 3;
                            let key = SliceKey { image: ImageNumber(0), slice: SliceNumber(word) };
                            let locate = || Ok(HostOffset(word * 512));
                            let load = |_| Ok(TableSlice::of_words(std::iter::repeat_n(word, 64), geometry));
                            assert_eq!(cache.get_or_load(key, locate, load).unwrap().raw(0), word);
                        }
                    })
                };
                for thread in [ask(0), ask(1), ask(2)] {
                    thread.join().unwrap();
                }
                assert!(cache.sets.iter().map(|set| set.read().slots.len()).sum::<usize>() <= 2);
            },
            2000,
            3,
        );
    }
}
