//! Tests of `LiveBitmap`: bits against a model, and the promise of `set` under shuttle.

use super::super::super::types::DataFile;
use super::*;

fn empty(bits: u64, cluster_bits: u32) -> (LiveBitmap, Arc<AtomicU64>) {
    let geometry = Geometry::new(cluster_bits, false, 3, DataFile::Internal);
    let stored = StoredBitmap::empty(geometry, 9, bits);
    let held_len = Arc::new(AtomicU64::new(0));
    (LiveBitmap::new(0, Arc::new(stored), 1, Arc::clone(&held_len)), held_len)
}

#[cfg(not(shuttle))]
mod model {
    use std::collections::BTreeSet;

    use super::*;

    /// From the last byte of a granule to the first one of another.
    fn range(first: u64, count: u64) -> GuestRange {
        let Some(range) = GuestRange::new(first * 512 + 511, (count - 1) * 512 + 1) else {
            panic!("too far")
        };
        range
    }

    /// All bits of the overlay.
    fn new_bits(bitmap: &LiveBitmap, clusters: usize) -> BTreeSet<u64> {
        let cluster_len = bitmap.geometry().cluster_len();
        let mut set = BTreeSet::new();
        for cluster in 0..clusters {
            let mut bytes = vec![0; cluster_len as usize];
            for (at, bits) in bitmap.cluster_bits(cluster).new {
                bits.add_to(part_of(&mut bytes, at, bitmap.page_len()));
            }
            let used = bitmap.used_len(cluster, 0, cluster_len);
            bytes.truncate(used as usize);
            bitmap.clear_tail(cluster, 0, &mut bytes);
            let bit = |bit: &u64| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
            set.extend((0..used * 8).filter(bit).map(|bit| cluster as u64 * cluster_len * 8 + bit));
        }
        set
    }

    #[test]
    fn bits_that_were_set_are_new_and_no_others() {
        let page = PAGE_LEN_MAX * 8;
        for (bits, cluster_bits) in [(3 * 4096 + 77, 9), (page * 20 - 3, 16), (100, 21)] {
            let (bitmap, _) = empty(bits, cluster_bits);
            let mut expected = BTreeSet::new();
            for (first, count) in [(0, 1), (63, 3), (page - 5, page + 9), (4000, 200), (bits - 1, 1), (31, 2)]
            {
                let count = count.min(bits.saturating_sub(first));
                if count > 0 {
                    bitmap.set(range(first, count));
                    expected.extend(first..first + count);
                }
            }
            let clusters = bits.div_ceil(8 << cluster_bits) as usize;
            assert!(new_bits(&bitmap, clusters) == expected, "{bits} {cluster_bits}");
        }
    }

    /// The look without a lock may say that a bit is recorded only when it is, however groups push each other out.
    #[test]
    fn what_is_known_is_recorded() {
        let bits = GROUP_BITS * KNOWN_WORDS_MAX as u64 * 3;
        let (bitmap, _) = empty(bits, 16);
        let mut set = BTreeSet::new();
        let far = GROUP_BITS * KNOWN_WORDS_MAX as u64;
        for step in 0..4000u64 {
            let bit = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 90 + step % 3 * far;
            assert!(!bitmap.is_known(bit, 1) || set.contains(&bit), "bit {bit}");
            bitmap.set(range(bit, 1));
            set.insert(bit);
            assert!(bitmap.is_known(bit, 1));
        }
        assert!(new_bits(&bitmap, 1 + (bits / (8 << 16)) as usize) == set);
    }

    /// All of a disk at once takes next to nothing, and a bit of it later nothing more.
    #[test]
    fn whole_pages_have_no_words() {
        let pages = 256;
        let (bitmap, held) = empty(pages * PAGE_LEN_MAX * 8, 16);
        bitmap.set(range(0, pages * PAGE_LEN_MAX * 8));
        let all = held.load(Ordering::SeqCst);
        assert!(all > 0 && all < pages * 100, "{all}");
        bitmap.set(range(12345, 3));
        assert_eq!(held.load(Ordering::SeqCst), all);
    }

    /// What is in the file goes from memory, and is not taken for new again.
    #[test]
    fn stored_bits_are_known() {
        let (bitmap, held) = empty(PAGE_LEN_MAX * 8, 16);
        bitmap.set(range(77, 3));
        let bits = bitmap.cluster_bits(0);
        bitmap.set(range(81, 1));
        bitmap.note_stored(0, &bits, Stored::At(crate::HostOffset(1 << 20)));
        assert_eq!(new_bits(&bitmap, 1), BTreeSet::from([81]));
        bitmap.note_stored(0, &bitmap.cluster_bits(0), Stored::At(crate::HostOffset(1 << 20)));
        assert_eq!(held.load(Ordering::SeqCst), 0);
        bitmap.set(range(77, 3));
        assert_eq!((held.load(Ordering::SeqCst), bitmap.next_changed(0)), (0, None));
        bitmap.set(range(70, 3));
        assert_eq!(bitmap.next_changed(0), Some(0));
        assert_eq!(bitmap.moved(), [(0, Stored::Zeroes, Stored::At(crate::HostOffset(1 << 20)))]);
    }
}

#[cfg(shuttle)]
mod interleavings {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use crate::sync::thread;

    /// The bits that are marked in the first page, or were said to be in the file.
    fn first_word(bits: &ClusterBits) -> u8 {
        let mut bytes = [0];
        bits.new.first().inspect(|(_, new)| new.add_to(&mut bytes));
        bytes[0]
    }

    /// Two set the same bit while a close begins: it is stored if either of them has seen no close after it.
    ///
    /// Run with `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --lib interleavings`.
    #[test]
    fn a_bit_that_somebody_relies_on_is_stored() {
        shuttle::check_pct(
            || {
                let bitmap = Arc::new(empty(100, 9).0);
                let closing = Arc::new(AtomicBool::new(false));
                let setters = [0, 1].map(|_| {
                    let (bitmap, closing) = (Arc::clone(&bitmap), Arc::clone(&closing));
                    thread::spawn(move || {
                        bitmap.set(GuestRange::new(0, 512).unwrap());
                        !closing.load(Ordering::SeqCst)
                    })
                });
                closing.store(true, Ordering::SeqCst);
                let stored = first_word(&bitmap.cluster_bits(0)) == 1;
                let relied = setters.map(|setter| setter.join().unwrap());
                assert!(stored || relied == [false, false], "a bit is not stored that was relied on");
            },
            400,
            3,
        );
    }

    /// The same while bits are stored before the close: what of them the file has, and what is new at the close, are
    /// all that somebody relies on.
    #[test]
    fn a_bit_that_is_set_while_others_are_stored_stays() {
        shuttle::check_pct(
            || {
                let bitmap = Arc::new(empty(100, 9).0);
                let closing = Arc::new(AtomicBool::new(false));
                // Bits 0 and 1 by two each, so that one may find the other's.
                let setters = [0, 1, 1].map(|bit| {
                    let (bitmap, closing) = (Arc::clone(&bitmap), Arc::clone(&closing));
                    thread::spawn(move || {
                        bitmap.set(GuestRange::new(bit * 512, 512).unwrap());
                        if closing.load(Ordering::SeqCst) { 0 } else { 1u8 << bit }
                    })
                });
                let mut file = 0;
                for last in [false, false, true] {
                    closing.store(last, Ordering::SeqCst);
                    let bits = bitmap.cluster_bits(0);
                    file |= first_word(&bits);
                    thread::yield_now();
                    bitmap.note_stored(0, &bits, Stored::Zeroes);
                }
                let relied = setters.map(|setter| setter.join().unwrap());
                let lost = relied.into_iter().fold(0, |all, bit| all | bit) & !file;
                assert_eq!(lost, 0, "a bit is not stored that was relied on");
            },
            400,
            3,
        );
    }
}
