//! [`LiveBitmap`]: a bitmap of an image that is written. In one that is enabled changes of the disk are recorded; another
//! one changes only with the size of the disk.
//!
//! Its bits are those of the file and those of an [`Overlay`] over it, whose pages go into the file when they
//! are too many, and at the end. Nothing in here writes: who stores bits takes a look at the new ones of a cluster,
//! writes them, and then says that the file has them; whatever is marked meanwhile stays new.

use super::super::types::Geometry;
use super::overlay::{NewBits, Overlay};
use super::page::Page;
use super::table::{Stored, StoredBitmap};
use crate::address::GuestRange;
use crate::error::Result;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

/// Most bytes of a page of new bits; where clusters are shorter it is one of them, so that no page lies in two.
/// Our choice: what a device writes at once. At the usual 64 KiB of disk for a bit a page stands for 2 GiB.
const PAGE_LEN_MAX: u64 = 4 << 10;
/// Most words of what is known to be recorded, over all bitmaps of an image: 1 MiB. Our choice: at 64 KiB of disk
/// for a bit they cover 256 GiB at a time, as the table cache does.
const KNOWN_WORDS_MAX: usize = 1 << 17;
/// Bits that such a word has; above them is the number of the group of bits, counted from 1.
const GROUP_BITS: u64 = 32;

/// A bitmap of an image that is written.
pub struct LiveBitmap {
    /// The index of its entry in the directory.
    pub entry: usize,
    geometry: Geometry,
    granularity_bits: u8,
    page_bits: u64,
    /// Bits that are known to be recorded, each group in the one word that its number leads to. What is recorded
    /// stays so, in memory or in the file, so what a word says never becomes wrong.
    known: Box<[AtomicU64]>,
    /// Held for work in memory only.
    state: Mutex<State>,
}

/// The bits of a bitmap.
struct State {
    /// What the file had when the image was opened, of the disk's size as it is now.
    stored: Arc<StoredBitmap>,
    overlay: Overlay,
}

impl State {
    fn place_of(&self, cluster: usize) -> Stored {
        self.overlay.moved(cluster).unwrap_or_else(|| self.stored.place_of(cluster))
    }
}

/// What is to become of a cluster of bits.
pub struct ClusterBits {
    /// Where the others of its bits are.
    pub stored: Stored,
    /// Whether that is a place that nothing in the file leads to.
    pub is_moved: bool,
    /// The new ones, by the offset in the cluster of the first byte of their page.
    pub new: Vec<(u64, NewBits)>,
}

impl ClusterBits {
    /// Bytes that the new ones take in memory.
    pub fn held_len(&self) -> u64 {
        self.new.iter().map(|(_, bits)| bits.held_len()).sum()
    }
}

impl LiveBitmap {
    /// The bitmap with entry number `entry`, one of `count` that are recorded. Reads nothing. The bytes of new bits
    /// that are in memory are counted in `held_len`.
    pub fn new(entry: usize, stored: Arc<StoredBitmap>, count: usize, held_len: Arc<AtomicU64>) -> Self {
        let page_bits = stored.geometry().cluster_len().min(PAGE_LEN_MAX) * 8;
        let groups = usize::try_from(stored.bits().div_ceil(GROUP_BITS)).unwrap_or(usize::MAX);
        let share = (KNOWN_WORDS_MAX / count.next_power_of_two()).max(1);
        let words = groups.clamp(1, share).next_power_of_two();
        let known = (0..words).map(|_| AtomicU64::new(0)).collect();
        LiveBitmap {
            entry,
            geometry: stored.geometry(),
            granularity_bits: stored.granularity_bits(),
            page_bits,
            known,
            state: Mutex::new(State { stored, overlay: Overlay::new(page_bits, held_len) }),
        }
    }

    /// The bitmap with entry number `entry`, in which nothing is recorded.
    pub fn at_rest(entry: usize, stored: Arc<StoredBitmap>, held_len: Arc<AtomicU64>) -> Self {
        Self::new(entry, stored, KNOWN_WORDS_MAX, held_len)
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// What the file had of it at open, as far as the disk has it now.
    pub fn stored(&self) -> Arc<StoredBitmap> {
        Arc::clone(&self.state.lock().stored)
    }

    /// Where cluster number `cluster` of bits is.
    pub fn place_of(&self, cluster: usize) -> Stored {
        self.state.lock().place_of(cluster)
    }

    /// From now on it is that of a disk with so many bits. Those that both disks have stay, new ones are clear; `trimmed`
    /// is the last cluster that stays, and where it is without what it had behind its last bit, if it had anything. Nobody
    /// stores bits meanwhile, nor marks any that one of the disks does not have. Returns the places that were the writer's
    /// own, and lead nowhere now.
    pub fn resize(&self, bits: u64, trimmed: Option<(usize, Stored)>) -> Vec<Stored> {
        let mut state = self.state.lock();
        let common = bits.min(state.stored.bits());
        let clusters = common.div_ceil(self.geometry.cluster_len() * 8);
        let mut left = state.overlay.cut(common, usize::try_from(clusters).unwrap_or(usize::MAX));
        if let Some((cluster, place)) = trimmed {
            left.extend(state.overlay.moved(cluster));
            state.overlay.moves(cluster, place);
        }
        // First without what is cut, so that it does not come back.
        let stored = state.stored.resized(common).resized(bits);
        state.stored = Arc::new(stored);
        for word in &self.known {
            let before = word.load(Ordering::SeqCst);
            let Some(group) = (before >> GROUP_BITS).checked_sub(1) else { continue };
            let kept = common.saturating_sub(group * GROUP_BITS).min(GROUP_BITS);
            let mask = (1 << kept) - 1;
            // With the lock that they are set under.
            word.store(
                if kept == 0 { 0 } else { before & (u64::MAX << GROUP_BITS | mask) },
                Ordering::SeqCst,
            );
        }
        left
    }

    /// Marks what `range`, which is not empty, touches. What is known to be marked costs a look, and no lock; the
    /// lock that it takes otherwise is held for memory work only.
    ///
    /// All accesses are in one order for all threads: whoever has seen a bit set, by himself or by another,
    /// and then sees that the image is not being closed, can be sure that the bit will be stored.
    pub fn set(&self, range: GuestRange) {
        let first = range.offset() >> self.granularity_bits;
        let last = (range.end() - 1) >> self.granularity_bits;
        let mut bit = first;
        while bit <= last {
            let count = (last - bit + 1).min(self.page_bits - bit % self.page_bits);
            if count == self.page_bits || !self.is_known(bit, count) {
                self.record(bit, count);
            }
            bit += count;
        }
    }

    /// Page number `page`, as pages of the file are numbered, as it is now. Whoever calls this has a pin, taken before:
    /// it is read from where it was, and not from what came there since.
    pub fn page(&self, storage: &Arc<dyn Storage>, page: u64) -> Result<Page> {
        // All of one moment. A bit that goes into the file from here on is in `new`; one that went there before is
        // found where `places` say.
        let (stored, places, new) = {
            let state = self.state.lock();
            let bytes = state.stored.bytes_of_page(page);
            let clusters = state.stored.clusters_of(&bytes);
            let places: Vec<_> = clusters.map(|cluster| state.place_of(cluster)).collect();
            let page_len = self.page_bits / 8;
            let pages = bytes.start / page_len..bytes.end.div_ceil(page_len);
            let new = state.overlay.pages(pages);
            let new = new.map(|(page, bits)| (page * page_len - bytes.start, bits.clone()));
            (Arc::clone(&state.stored), places, new.collect::<Vec<_>>())
        };
        let page = stored.page_in(storage, page, &places)?;
        if new.is_empty() {
            return Ok(page);
        }
        let mut all = page.to_bytes();
        for (at, bits) in new {
            bits.add_to(part_of(&mut all, at, self.page_bits / 8));
        }
        Ok(Page::of_bytes(&all))
    }

    /// The first cluster with new bits from this one on.
    pub fn next_changed(&self, cluster: usize) -> Option<usize> {
        let next = self.state.lock().overlay.next_from(cluster as u64 * self.pages_of_cluster());
        next.and_then(|page| usize::try_from(page / self.pages_of_cluster()).ok())
    }

    /// The bits of cluster number `cluster`.
    pub fn cluster_bits(&self, cluster: usize) -> ClusterBits {
        let state = self.state.lock();
        let first = cluster as u64 * self.pages_of_cluster();
        let new = state.overlay.pages(first..first + self.pages_of_cluster());
        ClusterBits {
            stored: state.place_of(cluster),
            is_moved: state.overlay.moved(cluster).is_some(),
            new: new.map(|(page, bits)| ((page - first) * self.page_bits / 8, bits.clone())).collect(),
        }
    }

    /// From now on the new ones of these bits are in the file, and all bits of the cluster are at `place`.
    pub fn note_stored(&self, cluster: usize, bits: &ClusterBits, place: Stored) {
        let overlay = &mut self.state.lock().overlay;
        if place != bits.stored {
            overlay.moves(cluster, place);
        }
        let first = cluster as u64 * self.pages_of_cluster();
        for (at, stored) in &bits.new {
            overlay.take_away(first + at * 8 / self.page_bits, stored);
        }
    }

    /// All clusters of bits that have moved since the image was opened, with where they were and where they are.
    pub fn moved(&self) -> Vec<(usize, Stored, Stored)> {
        let state = self.state.lock();
        let moved = state.overlay.all_moved();
        moved.map(|(cluster, now)| (cluster, state.stored.place_of(cluster), now)).collect()
    }

    /// The table as it is now.
    pub fn table(&self) -> Vec<u64> {
        let state = self.state.lock();
        (0..state.stored.clusters_len()).map(|cluster| state.place_of(cluster).encode()).collect()
    }

    /// Bytes of a page of new bits.
    pub fn page_len(&self) -> u64 {
        self.page_bits / 8
    }

    /// The bytes of a cluster from `at` on that hold bits, of `len`.
    pub fn used_len(&self, cluster: usize, at: u64, len: u64) -> u64 {
        let start = (cluster as u64).saturating_mul(self.geometry().cluster_len()).saturating_add(at);
        self.stored().bits().div_ceil(8).saturating_sub(start).min(len)
    }

    /// Clears what is behind the end of the disk, as the specification wants it, in bytes of a cluster from `at` on.
    pub fn clear_tail(&self, cluster: usize, at: u64, bytes: &mut [u8]) {
        let start = (cluster as u64).saturating_mul(self.geometry().cluster_len()).saturating_add(at);
        let bits = self.stored().bits();
        let (whole, rest) = (bits / 8, bits % 8);
        if let Some(last) = whole.checked_sub(start).and_then(|last| usize::try_from(last).ok())
            && let Some(byte) = bytes.get_mut(last)
        {
            *byte &= (1 << rest) - 1;
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn pages_of_cluster(&self) -> u64 {
        self.geometry().cluster_len() * 8 / self.page_bits
    }

    fn is_known(&self, bit: u64, count: u64) -> bool {
        groups(bit, count).all(|(group, mask)| {
            let known = self.known_word(group).map_or(0, |word| word.load(Ordering::SeqCst));
            known >> GROUP_BITS == group + 1 && known & mask == mask
        })
    }

    fn known_word(&self, group: u64) -> Option<&AtomicU64> {
        self.known.get(usize::try_from(group).unwrap_or(0) & (self.known.len() - 1))
    }

    /// Marks bits of one page.
    fn record(&self, bit: u64, count: u64) {
        let page = bit / self.page_bits;
        let cluster = usize::try_from(page / self.pages_of_cluster()).unwrap_or(usize::MAX);
        let mut state = self.state.lock();
        if state.place_of(cluster) != Stored::Ones {
            state.overlay.set(page, bit % self.page_bits, count);
        }
        // A page that is marked as a whole would push out all else.
        for (group, mask) in groups(bit, if count == self.page_bits { 0 } else { count }) {
            let Some(word) = self.known_word(group) else { continue };
            let before = word.load(Ordering::SeqCst);
            let same = if before >> GROUP_BITS == group + 1 { before } else { (group + 1) << GROUP_BITS };
            // After the bits, and with the lock that they are changed under.
            word.store(same | mask, Ordering::SeqCst);
        }
    }
}

/// The groups that `count` bits from `bit` on lie in, and which of their bits these are.
fn groups(bit: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = bit + count;
    (bit / GROUP_BITS..end.div_ceil(GROUP_BITS)).filter(move |_| count > 0).map(move |group| {
        let first = bit.max(group * GROUP_BITS) % GROUP_BITS;
        let here = (end - group * GROUP_BITS).min(GROUP_BITS) - first;
        (group, (u64::MAX >> (64 - here)) << first)
    })
}

/// At most `len` of the bytes from `at` on.
pub fn part_of(bytes: &mut [u8], at: u64, len: u64) -> &mut [u8] {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..)).unwrap_or_default();
    let len = rest.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    rest.get_mut(..len).unwrap_or_default()
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
