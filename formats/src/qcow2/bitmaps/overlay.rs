//! [`Overlay`]: what was marked in a bitmap since the image was opened and its file does not have, or is not
//! known to have.
//!
//! Memory only, and nothing of the file is in it. A page is there from its first new bit until its bits are
//! in the file. How many bytes that takes is counted over all bitmaps of an image.

use std::collections::BTreeMap;

use super::table::Stored;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bits of a word.
const WORD_BITS: u64 = 64;
/// What a page costs besides its words: its place in the tree, and the allocator's share. An estimate.
const ENTRY_LEN: u64 = 64;

/// New bits of a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NewBits {
    /// All of them.
    All,
    /// Those that are set in here.
    Some(Box<[u64]>),
}

/// The new bits of a bitmap, and where clusters of bits are that have moved since the image was opened.
pub struct Overlay {
    page_bits: u64,
    pages: BTreeMap<u64, NewBits>,
    moved: BTreeMap<usize, Stored>,
    held_len: Arc<AtomicU64>,
}

impl NewBits {
    /// Marks them in `bytes`, which are those of the file from the beginning of the page on.
    pub fn add_to(&self, bytes: &mut [u8]) {
        match self {
            NewBits::All => bytes.fill(u8::MAX),
            NewBits::Some(words) => {
                let new = words.iter().flat_map(|word| word.to_le_bytes());
                bytes.iter_mut().zip(new).for_each(|(byte, new)| *byte |= new);
            }
        }
    }

    fn set(&mut self, from: u64, count: u64) {
        let NewBits::Some(words) = self else { return };
        let end = from + count;
        let mut bit = from;
        while bit < end {
            let within = bit % WORD_BITS;
            let here = (end - bit).min(WORD_BITS - within);
            if let Some(word) = words.get_mut(usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX)) {
                *word |= u64::MAX >> (WORD_BITS - here) << within;
            }
            bit += here;
        }
    }

    /// Clears those from bit `count` on, of a page of `page_bits`; `None` if no other is set.
    fn cut(self, count: u64, page_bits: u64) -> Option<NewBits> {
        let mut words = match self {
            NewBits::All => vec![u64::MAX; usize::try_from(page_bits / WORD_BITS).unwrap_or(0)].into(),
            NewBits::Some(words) => words,
        };
        for (number, word) in (0..).zip(words.iter_mut()) {
            let kept = count.saturating_sub(number * WORD_BITS).min(WORD_BITS);
            *word &= if kept == 0 { 0 } else { u64::MAX >> (WORD_BITS - kept) };
        }
        words.iter().any(|word| *word != 0).then_some(NewBits::Some(words))
    }

    /// What is left when the file has `stored` of it; `None` if nothing is.
    fn without(self, stored: &NewBits) -> Option<NewBits> {
        match (self, stored) {
            (_, NewBits::All) => None,
            (NewBits::All, NewBits::Some(_)) => Some(NewBits::All),
            (NewBits::Some(mut words), NewBits::Some(stored)) => {
                words.iter_mut().zip(stored).for_each(|(word, stored)| *word &= !stored);
                words.iter().any(|word| *word != 0).then_some(NewBits::Some(words))
            }
        }
    }

    /// Bytes that they take in memory, with what they are kept by.
    pub fn held_len(&self) -> u64 {
        match self {
            NewBits::All => ENTRY_LEN,
            NewBits::Some(words) => ENTRY_LEN + words.len() as u64 * 8,
        }
    }
}

impl Overlay {
    /// Nothing is new. Pages have `page_bits`, which are whole words; `held_len` counts their bytes.
    pub fn new(page_bits: u64, held_len: Arc<AtomicU64>) -> Self {
        Overlay { page_bits, pages: BTreeMap::new(), moved: BTreeMap::new(), held_len }
    }

    /// Marks `count` bits of a page from bit `from` on.
    pub fn set(&mut self, page: u64, from: u64, count: u64) {
        if count < self.page_bits
            && let Some(bits) = self.pages.get_mut(&page)
        {
            return bits.set(from, count);
        }
        let now = if count < self.page_bits {
            let words = usize::try_from(self.page_bits / WORD_BITS).unwrap_or(0);
            let mut now = NewBits::Some(vec![0; words].into());
            now.set(from, count);
            now
        } else {
            NewBits::All
        };
        let len = now.held_len();
        let before = self.pages.insert(page, now);
        self.recount(before.map_or(0, |before| before.held_len()), len);
    }

    /// The new bits of these pages.
    pub fn pages(&self, pages: std::ops::Range<u64>) -> impl Iterator<Item = (u64, &NewBits)> {
        self.pages.range(pages).map(|(page, bits)| (*page, bits))
    }

    /// The first page with new bits from this one on.
    pub fn next_from(&self, page: u64) -> Option<u64> {
        self.pages.range(page..).next().map(|(page, _)| *page)
    }

    /// The file has these bits of a page.
    pub fn take_away(&mut self, page: u64, stored: &NewBits) {
        let Some(bits) = self.pages.remove(&page) else { return };
        let len_before = bits.held_len();
        let rest = bits.without(stored);
        self.recount(len_before, rest.as_ref().map_or(0, NewBits::held_len));
        if let Some(rest) = rest {
            self.pages.insert(page, rest);
        }
    }

    /// Where a cluster of bits is, if it is not where it was when the image was opened.
    pub fn moved(&self, cluster: usize) -> Option<Stored> {
        self.moved.get(&cluster).copied()
    }

    /// All clusters of bits that have moved, and where they are.
    pub fn all_moved(&self) -> impl Iterator<Item = (usize, Stored)> {
        self.moved.iter().map(|(cluster, stored)| (*cluster, *stored))
    }

    /// A cluster of bits is here from now on.
    pub fn moves(&mut self, cluster: usize, to: Stored) {
        self.moved.insert(cluster, to);
    }

    /// Nothing is new from this bit on, and clusters of bits have not moved from cluster number `clusters` on; returns where
    /// those were that had.
    pub fn cut(&mut self, bits: u64, clusters: usize) -> Vec<Stored> {
        for (_, gone) in self.pages.split_off(&bits.div_ceil(self.page_bits)) {
            self.recount(gone.held_len(), 0);
        }
        let (last, kept) = (bits / self.page_bits, bits % self.page_bits);
        if let Some(page) = self.pages.remove(&last) {
            let len_before = page.held_len();
            let rest = page.cut(kept, self.page_bits);
            self.recount(len_before, rest.as_ref().map_or(0, NewBits::held_len));
            self.pages.extend(rest.map(|rest| (last, rest)));
        }
        self.moved.split_off(&clusters).into_values().collect()
    }

    fn recount(&self, before: u64, now: u64) {
        self.held_len.fetch_add(now, Ordering::SeqCst);
        self.held_len.fetch_sub(before, Ordering::SeqCst);
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.held_len.fetch_sub(self.pages.values().map(NewBits::held_len).sum(), Ordering::SeqCst);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn nothing_new() -> (Overlay, Arc<AtomicU64>) {
        let held = Arc::new(AtomicU64::new(0));
        (Overlay::new(128, Arc::clone(&held)), held)
    }

    fn bits(overlay: &Overlay, page: u64) -> Option<NewBits> {
        overlay.pages(page..page + 1).next().map(|(_, bits)| bits.clone())
    }

    fn some(words: [u64; 2]) -> NewBits {
        NewBits::Some(words.into())
    }

    #[test]
    fn what_comes_while_a_page_is_stored_stays() {
        let (mut overlay, held) = nothing_new();
        overlay.set(7, 3, 1);
        overlay.set(7, 63, 2);
        let stored = bits(&overlay, 7).unwrap();
        assert_eq!(stored, some([1 << 3 | 1 << 63, 1]));
        overlay.set(7, 5, 1);
        overlay.take_away(7, &stored);
        assert_eq!(bits(&overlay, 7), Some(some([1 << 5, 0])));
        overlay.set(7, 0, 128);
        overlay.take_away(7, &some([1 << 5, 0]));
        assert_eq!(bits(&overlay, 7), Some(NewBits::All));
        assert_eq!(held.load(Ordering::SeqCst), ENTRY_LEN);
        overlay.take_away(7, &NewBits::All);
        assert_eq!((bits(&overlay, 7), held.load(Ordering::SeqCst)), (None, 0));
    }

    #[test]
    fn bytes_are_counted_until_they_go() {
        let (mut overlay, held) = nothing_new();
        let (mut other, _) = nothing_new();
        other.held_len = Arc::clone(&held);
        overlay.set(1, 0, 1);
        overlay.set(1, 100, 28);
        overlay.set(2, 0, 128);
        other.set(9, 1, 1);
        assert_eq!(held.load(Ordering::SeqCst), 3 * ENTRY_LEN + 2 * 16);
        assert_eq!((overlay.next_from(2), overlay.next_from(3), other.next_from(10)), (Some(2), None, None));
        drop(overlay);
        assert_eq!(held.load(Ordering::SeqCst), ENTRY_LEN + 16);
    }

    #[test]
    fn what_is_cut_off_is_not_new_any_more() {
        let (mut overlay, held) = nothing_new();
        for page in 0..4 {
            overlay.set(page, 0, 128);
        }
        overlay.set(5, 70, 3);
        overlay.moves(2, Stored::Ones);
        overlay.moves(3, Stored::Zeroes);
        assert_eq!(overlay.cut(128 * 5 + 72, 3), [Stored::Zeroes]);
        assert_eq!((bits(&overlay, 5), overlay.moved(2)), (Some(some([0, 3 << 6])), Some(Stored::Ones)));
        assert_eq!(overlay.cut(128 * 5 + 70, 3), []);
        assert_eq!(bits(&overlay, 5), None);
        overlay.cut(128 * 2 + 65, 1);
        assert_eq!((bits(&overlay, 1), bits(&overlay, 2)), (Some(NewBits::All), Some(some([u64::MAX, 1]))));
        assert_eq!((overlay.next_from(3), held.load(Ordering::SeqCst)), (None, 3 * ENTRY_LEN + 16));
        overlay.cut(128 * 2, 1);
        assert_eq!((overlay.next_from(2), held.load(Ordering::SeqCst)), (None, 2 * ENTRY_LEN));
    }

    #[test]
    fn the_bytes_of_a_short_last_page_get_their_bits() {
        let mut bytes = [1u8, 0, 0];
        some([0x0005_0206, 0]).add_to(&mut bytes);
        assert_eq!(bytes, [7, 2, 5]);
        NewBits::All.add_to(&mut bytes[1..]);
        assert_eq!(bytes, [7, 255, 255]);
    }
}
