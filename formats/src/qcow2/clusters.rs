//! [`ClusterCache`]: decompressed clusters of a chain of images, within a budget of bytes.
//!
//! A cluster is found by the place of its blob, not by the guest's address: whatever becomes of the guest's
//! cluster, bytes of the file that an entry leads to stay as they are. So there is one rule, of two halves:
//! what looks here has read the entry under a pin that it still has, and whoever lets host clusters go calls
//! [`forget`](ClusterCache::forget) when no such pin is left and before anybody can have them again.

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};

use lru::LruCache;

use super::flight::Flights;
use super::tables::ImageNumber;
use super::types::Blob;
use crate::address::{HostOffset, HostRange};
use crate::error::Result;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, Mutex};

/// Where a blob lies: in which image of a chain, and where in its file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlobPlace {
    image: ImageNumber,
    at: HostOffset,
    len_max: u64,
}

impl BlobPlace {
    /// The place of a blob of this image.
    pub fn new(image: ImageNumber, blob: Blob) -> Self {
        BlobPlace { image, at: blob.at, len_max: blob.len_max }
    }

    fn end(self) -> u64 {
        self.at.0.saturating_add(self.len_max)
    }
}

/// A decompressed cluster.
pub type Cluster = Arc<Vec<u8>>;

/// Decompressed clusters of a chain of images.
///
/// What is kept and what is being made take no more than the budget; of a cluster that is pushed out while it
/// is copied, the thread that copies has the last of it. When not even one fits, one is made at a time.
pub struct ClusterCache {
    budget_len: usize,
    state: Mutex<State>,
    /// Room was given back.
    freed: Condvar,
    under_way: Flights<BlobPlace, Option<Cluster>>,
    made: AtomicUsize,
}

struct State {
    clusters: LruCache<BlobPlace, Cluster>,
    /// The keys of `clusters`, in the order of the file.
    places: BTreeSet<BlobPlace>,
    /// The longest blob that was ever kept.
    blob_len_max: u64,
    /// Bytes of what is kept and of what is being made.
    len: usize,
    /// How many are being made.
    making: usize,
}

impl ClusterCache {
    /// An empty cache of at most so many bytes.
    pub fn new(budget_len: u64) -> Self {
        let state = State {
            clusters: LruCache::unbounded(),
            places: BTreeSet::new(),
            blob_len_max: 0,
            len: 0,
            making: 0,
        };
        ClusterCache {
            budget_len: usize::try_from(budget_len).unwrap_or(usize::MAX),
            state: Mutex::new(state),
            freed: Condvar::new(),
            under_way: Flights::new(),
            made: AtomicUsize::new(0),
        }
    }

    /// Most bytes that it takes.
    pub fn budget_len(&self) -> usize {
        self.budget_len
    }

    /// How many clusters have been made so far.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    /// The cluster, if it is there. Waits for nothing.
    pub fn get(&self, place: BlobPlace) -> Option<Cluster> {
        self.state.lock().clusters.get(&place).map(Arc::clone)
    }

    /// Whether somebody is making the cluster now, so that [`get_or_make`](Self::get_or_make) would wait.
    pub fn is_under_way(&self, place: BlobPlace) -> bool {
        self.under_way.has(place)
    }

    /// The cluster of `cluster_len` bytes, filled by `make` unless it is there. What `make` is given holds any
    /// bytes; it must not come back here. Concurrent callers for the same cluster wait for the one that
    /// makes it; those for different ones wait for each other only for room.
    pub fn get_or_make(
        &self,
        place: BlobPlace,
        cluster_len: u64,
        make: impl Fn(&mut [u8]) -> Result<()>,
    ) -> Result<Cluster> {
        loop {
            // One that was waited for may have been broken off.
            let made = self.try_get_or_make(place, cluster_len, |bytes| make(bytes).map(|()| true))?;
            if let Some(cluster) = made {
                return Ok(cluster);
            }
        }
    }

    /// As [`get_or_make`](Self::get_or_make), but `make` may break off with `false`; then there is none.
    pub fn try_get_or_make(
        &self,
        place: BlobPlace,
        cluster_len: u64,
        make: impl FnOnce(&mut [u8]) -> Result<bool>,
    ) -> Result<Option<Cluster>> {
        if let Some(cluster) = self.get(place) {
            return Ok(Some(cluster));
        }
        self.under_way.join(place, || {
            if let Some(cluster) = self.get(place) {
                return Ok(Some(cluster));
            }
            let len_of = |len| usize::try_from(len).unwrap_or(usize::MAX);
            // The blob is in memory, too, until it is decompressed.
            let len = len_of(cluster_len.saturating_add(place.len_max));
            let mut room = self.room(len_of(cluster_len), len);
            let whole = make(&mut room)?;
            self.made.fetch_add(usize::from(whole), Ordering::Relaxed);
            Ok(whole.then(|| room.keep(place)))
        })
    }

    /// Forgets every cluster of the image whose blob has a byte in the range, in whose place others may be
    /// written now.
    pub fn forget(&self, image: ImageNumber, range: HostRange) {
        let mut state = self.state.lock();
        let from = HostOffset(range.at().0.saturating_sub(state.blob_len_max));
        let place = |at| BlobPlace { image, at, len_max: 0 };
        let touched = state.places.range(place(from)..place(range.end()));
        let gone: Vec<BlobPlace> = touched.filter(|place| place.end() > range.at().0).copied().collect();
        for place in gone {
            if let Some(cluster) = state.clusters.pop(&place) {
                state.let_go(place, cluster.len());
            }
        }
        drop(state);
        self.freed.notify_all();
    }

    /// Takes `len` bytes of the budget for making a cluster, at the cost of the clusters that were not used
    /// for longest. Waits for others who are making one when these are not enough.
    fn room(&self, cluster_len: usize, len: usize) -> Room<'_> {
        let mut bytes = Vec::new();
        let mut state = self.state.lock();
        loop {
            // What is larger than the budget comes when nobody else makes one, and not at the cost of what is kept
            // before that.
            let may_come = len <= self.budget_len || state.making == 0;
            while may_come
                && state.len.saturating_add(len) > self.budget_len
                && let Some((place, cluster)) = state.clusters.pop_lru()
            {
                state.let_go(place, cluster.len());
                // Its memory is as good as new one, which the kernel would have to clear.
                if cluster.len() == cluster_len
                    && let Ok(unshared) = Arc::try_unwrap(cluster)
                {
                    bytes = unshared;
                }
            }
            if state.len.saturating_add(len) <= self.budget_len || state.making == 0 {
                break;
            }
            // Not counted while it waits.
            bytes = Vec::new();
            self.freed.wait(&mut state);
        }
        state.len += len;
        state.making += 1;
        drop(state);
        bytes.resize(cluster_len, 0);
        Room { cache: self, bytes, len }
    }
}

impl State {
    fn let_go(&mut self, place: BlobPlace, cluster_len: usize) {
        self.places.remove(&place);
        self.len -= cluster_len;
    }
}

/// A part of the budget, and a cluster to be filled in it.
struct Room<'a> {
    cache: &'a ClusterCache,
    bytes: Vec<u8>,
    len: usize,
}

impl Room<'_> {
    /// Keeps the cluster, unless it is larger than the budget.
    fn keep(mut self, place: BlobPlace) -> Cluster {
        let cluster = Arc::new(std::mem::take(&mut self.bytes));
        let mut state = self.cache.state.lock();
        if cluster.len() <= self.cache.budget_len {
            self.len -= cluster.len();
            state.places.insert(place);
            state.blob_len_max = state.blob_len_max.max(place.len_max);
            if let Some((_, replaced)) = state.clusters.push(place, Arc::clone(&cluster)) {
                state.len -= replaced.len();
            }
        }
        drop(state);
        cluster
    }
}

impl Deref for Room<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Room<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.len -= self.len;
        state.making -= 1;
        drop(state);
        self.cache.freed.notify_all();
    }
}

#[cfg(all(test, not(shuttle)))]
#[path = "clusters_tests.rs"]
mod tests;

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::super::write::pins::Pins;
    use super::*;
    use crate::sync::atomic::AtomicU64;
    use crate::sync::thread;

    /// Two host places that are freed and filled again, and a table that leads to them: entry `place * 256 + content`,
    /// or 0 for nothing.
    struct Image {
        cache: ClusterCache,
        pins: Pins,
        entry: AtomicU64,
        file: [AtomicU64; 2],
    }

    const LEN: u64 = 512;

    impl Image {
        fn place(place: u64) -> BlobPlace {
            BlobPlace::new(ImageNumber(0), Blob { at: HostOffset(place * LEN + 100), len_max: LEN / 2 })
        }

        /// As every reader does: under a pin that was taken before the entry was read.
        fn read(&self) {
            let pin = self.pins.pin();
            let entry = self.entry.load(Ordering::SeqCst);
            if entry != 0 {
                let (place, content) = (entry / 256, entry % 256);
                let make = |cluster: &mut [u8]| {
                    let held = self.file[usize::try_from(place).unwrap()].load(Ordering::SeqCst);
                    cluster.fill(u8::try_from(held).unwrap());
                    Ok(())
                };
                let cluster = self.cache.get_or_make(Self::place(place), 4, make).unwrap();
                assert_eq!(u64::from(cluster[0]), content, "what was served is not what the entry leads to");
            }
            self.pins.unpin(pin);
        }

        /// As `reclaim` does: when no pin is left that may know the place, and before it is written again.
        fn replace(&self, content: u64) {
            let old = self.entry.swap(0, Ordering::SeqCst) / 256;
            let freed_in = self.pins.now();
            while self.pins.oldest() <= freed_in {
                self.pins.advance();
                thread::yield_now();
            }
            self.cache.forget(ImageNumber(0), HostRange::new(HostOffset(old * LEN), LEN).unwrap());
            self.file[usize::try_from(old).unwrap()].store(content, Ordering::SeqCst);
            self.entry.store(old * 256 + content, Ordering::SeqCst);
        }
    }

    /// Run with `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --lib interleavings`.
    #[test]
    fn a_place_that_is_filled_again_is_never_served_as_it_was() {
        for budget_len in [0, LEN, 1 << 20] {
            let scenario = move || {
                let image = Arc::new(Image {
                    cache: ClusterCache::new(budget_len),
                    pins: Pins::new(),
                    entry: AtomicU64::new(256 + 1),
                    file: [AtomicU64::new(0), AtomicU64::new(1)],
                });
                let reader = || {
                    let image = Arc::clone(&image);
                    thread::spawn(move || (0..3).for_each(|_| image.read()))
                };
                let readers = [reader(), reader()];
                (2..4).for_each(|content| image.replace(content));
                for reader in readers {
                    reader.join().unwrap();
                }
                image.read();
            };
            shuttle::check_random(scenario, 3000);
        }
    }
}
