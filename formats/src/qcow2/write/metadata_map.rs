//! [`MetadataMap`]: which host clusters hold metadata, and of which kind.
//!
//! Consulted for every cluster that is handed out and every entry that is loaded, so that no data is
//! ever written over metadata, nor one kind over another. Entries of the map outlive a table until its
//! cluster's refcount is 0: too much caution costs nothing.

use std::collections::HashMap;
use std::fmt;

use super::super::types::{Geometry, HostIndex};
use crate::address::HostOffset;

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

/// The metadata of an image.
pub struct MetadataMap {
    geometry: Geometry,
    kinds: HashMap<HostIndex, Kind>,
    conflict: Option<String>,
}

impl MetadataMap {
    /// An empty map.
    pub fn new(geometry: Geometry) -> Self {
        MetadataMap { geometry, kinds: HashMap::new(), conflict: None }
    }

    /// Adds what lies in the `len` bytes from `at`. Two kinds in one cluster are a
    /// [conflict](Self::conflict).
    pub fn add(&mut self, at: HostOffset, len: u64, kind: Kind) {
        let (first, count) = self.geometry.host_span(at, len);
        for index in first.0..first.0 + count {
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

    /// What the first two kinds that share a cluster are.
    pub fn conflict(&self) -> Option<&str> {
        self.conflict.as_deref()
    }

    /// What the cluster holds, if it is metadata.
    pub fn kind(&self, index: HostIndex) -> Option<Kind> {
        self.kinds.get(&index).copied()
    }

    /// All clusters of metadata, and whether a cluster of that kind has one pointer only.
    pub fn clusters(&self) -> impl Iterator<Item = (HostIndex, bool)> {
        self.kinds.iter().map(|(index, kind)| (*index, !kind.may_repeat()))
    }

    /// Forgets a cluster whose refcount has become 0.
    pub fn remove(&mut self, index: HostIndex) {
        self.kinds.remove(&index);
    }
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
