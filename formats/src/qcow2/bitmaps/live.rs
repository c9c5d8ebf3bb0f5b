//! [`LiveBitmap`]: the bits of an enabled bitmap in memory, in which changes of the disk are recorded.
//!
//! All of them stay in memory until they are stored, in pages that are made when their first bit is set;
//! how many bytes that can be at most is limited when an image is opened. Recording takes no lock.

use super::super::types::Geometry;
use super::page::{PAGE_BITS, PAGE_LEN, Page};
use super::table::StoredBitmap;
use crate::address::GuestRange;
use crate::error::Result;
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, OnceLock};

/// Bits of a word.
const WORD_BITS: u64 = 64;

/// An enabled bitmap.
pub struct LiveBitmap {
    /// The index of its entry in the directory.
    pub entry: usize,
    geometry: Geometry,
    granularity_bits: u8,
    bits: u64,
    pages: Box<[LivePage]>,
}

/// A page of it. What is in the file of it holds until `changed`.
struct LivePage {
    /// All bits are set, and there are no words.
    ones: bool,
    words: OnceLock<Box<[AtomicU64]>>,
    changed: AtomicBool,
}

/// The bits of one cluster as they are to be stored.
#[derive(PartialEq, Eq, Debug)]
pub enum ClusterBits {
    /// None is set.
    Zeroes,
    /// All are set, and the disk has all of them.
    Ones,
    /// A cluster's bytes.
    Bytes(Vec<u8>),
}

impl LiveBitmap {
    /// The bitmap with entry number `entry`, with the bits that it has in the file.
    pub fn load(storage: &Arc<dyn Storage>, entry: usize, stored: &StoredBitmap) -> Result<Self> {
        let pages = (0..stored.bits().div_ceil(PAGE_BITS))
            .map(|page| Ok(LivePage::of(stored.page(storage, page)?)))
            .collect::<Result<_>>()?;
        Ok(LiveBitmap {
            entry,
            geometry: stored.geometry(),
            granularity_bits: stored.granularity_bits(),
            bits: stored.bits(),
            pages,
        })
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Marks what `range`, which is not empty, touches. What is marked already costs a look.
    ///
    /// All accesses are in one order for all threads: whoever has seen a bit set, by himself or by another,
    /// and then sees that the image is not being closed, can be sure that the bit will be stored.
    pub fn set(&self, range: GuestRange) {
        let first = range.offset() >> self.granularity_bits;
        let last = (range.end() - 1) >> self.granularity_bits;
        let mut bit = first;
        while bit <= last {
            let in_page = bit % PAGE_BITS;
            let count = (last - bit + 1).min(PAGE_BITS - in_page);
            let page = usize::try_from(bit / PAGE_BITS).unwrap_or(usize::MAX);
            if let Some(page) = self.pages.get(page) {
                page.set(in_page, count);
            }
            bit += count;
        }
    }

    /// Page number `page` as it is now.
    pub fn page(&self, page: u64) -> Page {
        let page = usize::try_from(page).unwrap_or(usize::MAX);
        self.pages.get(page).map_or(Page::Zeroes, LivePage::now)
    }

    /// Whether bits of cluster number `cluster` differ from those in the file.
    pub fn is_changed(&self, cluster: usize) -> bool {
        let cluster_len = self.geometry.cluster_len();
        let start = cluster as u64 * cluster_len;
        let (first, last) = (start / PAGE_LEN, (start + cluster_len - 1) / PAGE_LEN);
        let pages =
            usize::try_from(first).unwrap_or(usize::MAX)..=usize::try_from(last).unwrap_or(usize::MAX);
        pages
            .into_iter()
            .map_while(|page| self.pages.get(page))
            .any(|page| page.changed.load(Ordering::SeqCst))
    }

    /// The bits of cluster number `cluster`.
    pub fn cluster_bits(&self, cluster: usize) -> ClusterBits {
        let cluster_len = self.geometry.cluster_len();
        let start = cluster as u64 * cluster_len;
        let mut bytes = vec![0; usize::try_from(cluster_len).unwrap_or(0)];
        let data_end = self.bits.div_ceil(8).min(start + cluster_len);
        let mut at = start;
        while at < data_end {
            let within = at % PAGE_LEN;
            let len = (PAGE_LEN - within).min(data_end - at);
            let to = usize::try_from(at - start).unwrap_or(usize::MAX);
            let part = bytes.get_mut(to..to.saturating_add(usize::try_from(len).unwrap_or(0)));
            self.page(at / PAGE_LEN).copy_to(within, part.unwrap_or_default());
            at += len;
        }
        let whole = (start + cluster_len) * 8 <= self.bits;
        // What is behind the end of the disk must be zeroes (specification), also where all ones were read.
        if !self.bits.is_multiple_of(8)
            && data_end == self.bits.div_ceil(8)
            && let Some(last) =
                usize::try_from(data_end - start).ok().and_then(|len| bytes.get_mut(..len)?.last_mut())
        {
            *last &= u8::MAX >> (8 - self.bits % 8);
        }
        if bytes.iter().all(|byte| *byte == 0) {
            ClusterBits::Zeroes
        } else if whole && bytes.iter().all(|byte| *byte == u8::MAX) {
            ClusterBits::Ones
        } else {
            ClusterBits::Bytes(bytes)
        }
    }
}

impl LivePage {
    fn of(page: Page) -> Self {
        let words = OnceLock::new();
        let ones = page == Page::Ones;
        if let Page::Bits(bits) = page {
            words.get_or_init(|| bits.into_iter().map(AtomicU64::new).collect());
        }
        LivePage { ones, words, changed: AtomicBool::new(false) }
    }

    fn set(&self, from: u64, count: u64) {
        if self.ones {
            return;
        }
        let empty = || (0..PAGE_BITS / WORD_BITS).map(|_| AtomicU64::new(0)).collect();
        let words = self.words.get_or_init(empty);
        let end = from + count;
        let mut bit = from;
        while bit < end {
            let within = bit % WORD_BITS;
            let here = (end - bit).min(WORD_BITS - within);
            let mask = u64::MAX >> (WORD_BITS - here) << within;
            let index = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
            if let Some(word) = words.get(index)
                && word.load(Ordering::SeqCst) & mask != mask
            {
                // Before the bit: whoever finds it set relies on this, too.
                self.changed.store(true, Ordering::SeqCst);
                word.fetch_or(mask, Ordering::SeqCst);
            }
            bit += here;
        }
    }

    fn now(&self) -> Page {
        match self.words.get() {
            Some(words) => Page::Bits(words.iter().map(|word| word.load(Ordering::SeqCst)).collect()),
            None if self.ones => Page::Ones,
            None => Page::Zeroes,
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::super::super::types::DataFile;
    use super::*;

    fn empty(bits: u64, cluster_bits: u32) -> LiveBitmap {
        let geometry = Geometry::new(cluster_bits, false, 3, DataFile::Internal);
        LiveBitmap {
            entry: 0,
            geometry,
            granularity_bits: 9,
            bits,
            pages: (0..bits.div_ceil(PAGE_BITS)).map(|_| LivePage::of(Page::Zeroes)).collect(),
        }
    }

    /// From the last byte of a granule to the first one of another.
    fn range(first: u64, count: u64) -> GuestRange {
        let Some(range) = GuestRange::new(first * 512 + 511, (count - 1) * 512 + 1) else {
            panic!("too far")
        };
        range
    }

    #[test]
    fn bits_that_were_set_are_stored_and_no_others() {
        for (bits, cluster_bits) in [(PAGE_BITS * 3 + 77, 9), (PAGE_BITS * 9 - 3, 16), (100, 21)] {
            let bitmap = empty(bits, cluster_bits);
            let runs = [(0, 1), (63, 3), (PAGE_BITS - 5, PAGE_BITS + 9), (bits - 1, 1)];
            let mut expected = vec![false; usize::try_from(bits).unwrap()];
            for (first, count) in runs {
                let count = count.min(bits.saturating_sub(first));
                if count > 0 {
                    bitmap.set(range(first, count));
                    let first = usize::try_from(first).unwrap();
                    expected[first..first + usize::try_from(count).unwrap()].fill(true);
                }
            }
            let cluster_len = 1usize << cluster_bits;
            for (cluster, part) in expected.chunks(cluster_len * 8).enumerate() {
                let mut bytes = vec![0u8; cluster_len];
                for (bit, _) in part.iter().enumerate().filter(|(_, set)| **set) {
                    bytes[bit / 8] |= 1 << (bit % 8);
                }
                let expected = match part {
                    _ if bytes.iter().all(|byte| *byte == 0) => ClusterBits::Zeroes,
                    _ if part.len() == cluster_len * 8 && part.iter().all(|set| *set) => ClusterBits::Ones,
                    _ => ClusterBits::Bytes(bytes),
                };
                assert!(expected == ClusterBits::Zeroes || bitmap.is_changed(cluster));
                assert_eq!(bitmap.cluster_bits(cluster), expected, "{bits} {cluster_bits} {cluster}");
            }
        }
    }

    #[test]
    fn marking_again_changes_nothing() {
        let bitmap = empty(PAGE_BITS, 16);
        bitmap.pages[0].words.get_or_init(|| (0..PAGE_BITS / 64).map(|_| AtomicU64::new(u64::MAX)).collect());
        bitmap.set(range(0, PAGE_BITS));
        assert!(!bitmap.is_changed(0));
        assert_eq!(bitmap.cluster_bits(0), ClusterBits::Bytes([vec![255; 16384], vec![0; 49152]].concat()));
    }
}

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::super::super::types::DataFile;
    use super::*;
    use crate::sync::thread;

    /// Two set the same bit while a close begins: it is stored if either of them has seen no close after it.
    ///
    /// Run with `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --lib interleavings`.
    #[test]
    fn a_bit_that_somebody_relies_on_is_stored() {
        shuttle::check_pct(
            || {
                let bitmap = Arc::new(LiveBitmap {
                    entry: 0,
                    geometry: Geometry::new(9, false, 3, DataFile::Internal),
                    granularity_bits: 9,
                    bits: 100,
                    pages: Box::new([LivePage::of(Page::Zeroes)]),
                });
                let closing = Arc::new(AtomicBool::new(false));
                let setters = [0, 1].map(|_| {
                    let (bitmap, closing) = (Arc::clone(&bitmap), Arc::clone(&closing));
                    thread::spawn(move || {
                        bitmap.set(GuestRange::new(0, 512).unwrap());
                        !closing.load(Ordering::SeqCst)
                    })
                });
                closing.store(true, Ordering::SeqCst);
                let stored = bitmap.is_changed(0);
                let relied = setters.map(|setter| setter.join().unwrap());
                assert!(stored || relied == [false, false], "a bit is not stored that was relied on");
            },
            400,
            3,
        );
    }
}
