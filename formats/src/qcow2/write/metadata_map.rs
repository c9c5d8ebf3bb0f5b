//! [`MetadataMap`]: which host clusters hold metadata, and of which kind.
//!
//! Consulted for every cluster that is handed out and every entry that is loaded, so that no data is
//! ever written over metadata, nor one kind over another. Entries of the map outlive a table until its
//! cluster's refcount is 0: too much caution costs nothing.

use std::collections::HashMap;
use std::fmt;

use super::super::types::{Geometry, HostIndex};
use crate::address::HostOffset;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// What a cluster of metadata holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The header, its extensions and the backing file's name.
    Header,
    /// The active L1 table.
    L1,
    /// An active L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of a snapshot.
    InactiveL1,
    /// The directory of dirty bitmaps.
    BitmapDirectory,
    /// The table of a dirty bitmap.
    BitmapTable,
    /// Bits of a dirty bitmap.
    BitmapData,
}

/// Bits of the sieve in front of the map: 8 KiB. Our choice: an image of 1 TiB with clusters of 64 KiB has some 2,500
/// clusters of metadata, so one in 25 questions about data still goes to the map.
const SIEVE_BITS: u64 = 1 << 16;

/// The metadata of an image.
pub struct MetadataMap {
    geometry: Geometry,
    kinds: HashMap<HostIndex, Kind>,
    /// One bit for all clusters whose number is the same modulo [`SIEVE_BITS`]: 0 says that none of them is in the
    /// map. Every entry of an L2 table that is loaded is asked for, and nearly all lead to data: hashing them all
    /// was what a load took its time for.
    sieve: Box<[u64]>,
    /// How often something was added. See [`version`](Self::version).
    version: Arc<AtomicU64>,
    conflict: Option<String>,
}

impl MetadataMap {
    /// An empty map.
    pub fn new(geometry: Geometry) -> Self {
        let sieve = vec![0; (SIEVE_BITS / u64::from(u64::BITS)) as usize].into_boxed_slice();
        let version = Arc::new(AtomicU64::new(0));
        MetadataMap { geometry, kinds: HashMap::new(), sieve, version, conflict: None }
    }

    /// Adds what lies in the `len` bytes from `at`. Two kinds in one cluster are a
    /// [conflict](Self::conflict).
    pub fn add(&mut self, at: HostOffset, len: u64, kind: Kind) {
        self.version.fetch_add(1, Ordering::Release);
        let (first, count) = self.geometry.host_span(at, len);
        for index in first.0..first.0 + count {
            let (word, bit) = sieve_place(HostIndex(index));
            if let Some(word) = self.sieve.get_mut(word) {
                *word |= bit;
            }
            let before = self.kinds.insert(HostIndex(index), kind);
            if let Some(before) = before.filter(|before| *before != kind || !kind.may_repeat()) {
                let at = self.geometry.host_at(HostIndex(index)).start();
                self.conflict.get_or_insert_with(|| format!("{before} and {kind} share the cluster at {at}"));
            }
        }
    }

    /// Adds an active L2 table. One that its pointer calls its only one must not have another.
    pub fn add_l2(&mut self, at: HostOffset, owned: bool) {
        if owned && self.kind(self.geometry.host_index(at)) == Some(Kind::L2) {
            self.conflict.get_or_insert_with(|| format!("two L1 entries share the L2 table at {at}"));
        }
        self.add(at, self.geometry.cluster_len(), Kind::L2);
    }

    /// What grows with everything that is added, for who has not got the lock: an entry that led past all metadata
    /// may lead into some since.
    pub fn version(&self) -> &Arc<AtomicU64> {
        &self.version
    }

    /// What the first two kinds that share a cluster are.
    pub fn conflict(&self) -> Option<&str> {
        self.conflict.as_deref()
    }

    /// What the cluster holds, if it is metadata.
    pub fn kind(&self, index: HostIndex) -> Option<Kind> {
        let (word, bit) = sieve_place(index);
        if self.sieve.get(word).is_some_and(|word| word & bit == 0) {
            return None;
        }
        self.kinds.get(&index).copied()
    }

    /// Forgets a cluster whose refcount has become 0. Its bit of the sieve stays, for others may have set it, too.
    pub fn remove(&mut self, index: HostIndex) {
        self.kinds.remove(&index);
    }
}

/// The word of the sieve and the bit in it that stand for a cluster.
fn sieve_place(index: HostIndex) -> (usize, u64) {
    let place = index.0 % SIEVE_BITS;
    ((place / u64::from(u64::BITS)) as usize, 1 << (place % u64::from(u64::BITS)))
}

impl Kind {
    /// Whether several pointers to one cluster are no contradiction: a table that is referred to twice is
    /// copied before it is changed.
    fn may_repeat(self) -> bool {
        matches!(self, Kind::L2 | Kind::InactiveL1)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Header => "the header",
            Kind::L1 => "the L1 table",
            Kind::L2 => "an L2 table",
            Kind::RefcountTable => "the refcount table",
            Kind::RefcountBlock => "a refcount block",
            Kind::SnapshotTable => "the snapshot table",
            Kind::InactiveL1 => "a snapshot's L1 table",
            Kind::BitmapDirectory => "the directory of dirty bitmaps",
            Kind::BitmapTable => "a dirty bitmap's table",
            Kind::BitmapData => "a dirty bitmap",
        })
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::qcow2::types::DataFile;

    #[test]
    fn clusters_that_share_a_bit_of_the_sieve_are_told_apart() {
        let geometry = Geometry::new(9, false, 3, DataFile::Internal);
        let mut map = MetadataMap::new(geometry);
        let at = |index: u64| geometry.host_at(HostIndex(index)).start();
        map.add(at(7), 2 * 512, Kind::L1);
        map.add(at(7 + 2 * SIEVE_BITS), 512, Kind::L2);
        for index in [6, 9, 7 + SIEVE_BITS, 8 + SIEVE_BITS, 7 + 3 * SIEVE_BITS, u64::MAX] {
            assert_eq!(map.kind(HostIndex(index)), None, "{index}");
        }
        assert_eq!(map.kind(HostIndex(8)), Some(Kind::L1));
        map.remove(HostIndex(7));
        assert_eq!(map.kind(HostIndex(7)), None);
        assert_eq!(map.kind(HostIndex(7 + 2 * SIEVE_BITS)), Some(Kind::L2));
    }
}
