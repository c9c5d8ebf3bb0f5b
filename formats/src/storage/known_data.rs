//! A memory of where the file last said that it has data, so that sparse reads need not ask again.
//!
//! On tmpfs one SEEK_HOLE walks all pages up to the next hole: 5 ms for a gigabyte without any. To call
//! a hole data is always right, only less useful; so the memory may be stale, and a torn update of its
//! two words does no harm.

use crate::address::{HostOffset, HostRange};
use crate::sync::atomic::{AtomicU64, Ordering};

/// One run of data, or none.
#[derive(Default)]
pub struct KnownData {
    begin: AtomicU64,
    end: AtomicU64,
}

impl KnownData {
    /// How many bytes of data begin at `at`, as far as is known.
    pub fn len_at(&self, at: HostOffset) -> Option<u64> {
        let (begin, end) = (self.begin.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        (begin <= at.0 && at.0 < end).then(|| end - at.0)
    }

    /// Data begins at `at` and goes on for `len` bytes.
    pub fn remember(&self, at: HostOffset, len: u64) {
        self.begin.store(at.0, Ordering::Relaxed);
        self.end.store(at.0.saturating_add(len), Ordering::Relaxed);
    }

    /// The range may have become a hole.
    pub fn forget(&self, range: HostRange) {
        let (begin, end) = (self.begin.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        if range.at().0 < end && begin < range.end().0 {
            self.end.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn data_is_known_until_a_part_of_it_may_be_a_hole() {
        let known = KnownData::default();
        assert_eq!(known.len_at(HostOffset(0)), None);
        known.remember(HostOffset(100), 50);
        assert_eq!(known.len_at(HostOffset(99)), None);
        assert_eq!(known.len_at(HostOffset(100)), Some(50));
        assert_eq!(known.len_at(HostOffset(149)), Some(1));
        assert_eq!(known.len_at(HostOffset(150)), None);
        known.forget(HostRange::new(HostOffset(0), 100).unwrap());
        known.forget(HostRange::new(HostOffset(150), 100).unwrap());
        assert_eq!(known.len_at(HostOffset(120)), Some(30));
        known.forget(HostRange::new(HostOffset(149), 1).unwrap());
        assert_eq!(known.len_at(HostOffset(120)), None);
    }
}
