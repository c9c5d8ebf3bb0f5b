//! [`StoredBitmap`]: the bits of a bitmap as they lie in the file, found through its table.
//!
//! The table is in memory, the bits are read when they are asked for. Nothing in here writes.

use std::ops::Range;

use super::super::header::{Header, check_place};
use super::super::types::Geometry;
use super::directory::{Entry, Flags};
use super::page::{PAGE_LEN, Page};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{read_exact, storage_error};
use crate::storage::Storage;
use crate::sync::Arc;

/// The host offset in an entry of a bitmap's table (specification: bits 9 to 55).
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits that must be zero (specification: 1 to 8 and 56 to 63).
pub const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Without an offset: all bits are ones (specification).
const ALL_ONES: u64 = 1;

/// Where one cluster of bits is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stored {
    /// Nowhere: all zeroes.
    Zeroes,
    /// Nowhere: all ones.
    Ones,
    /// In the file.
    At(HostOffset),
}

impl Stored {
    fn decode(raw: u64) -> Self {
        match (raw & OFFSET_MASK, raw & ALL_ONES) {
            (0, 0) => Stored::Zeroes,
            (0, _) => Stored::Ones,
            (at, _) => Stored::At(HostOffset(at)),
        }
    }

    /// Whether it takes a cluster of the file.
    pub fn has_place(&self) -> bool {
        matches!(self, Stored::At(_))
    }

    /// The entry of a table that says this.
    pub fn encode(self) -> u64 {
        match self {
            Stored::Zeroes => 0,
            Stored::Ones => ALL_ONES,
            Stored::At(at) => at.0,
        }
    }
}

/// A bitmap in the file.
pub struct StoredBitmap {
    geometry: Geometry,
    granularity_bits: u8,
    /// Bits that stand for a part of the disk.
    bits: u64,
    table: Box<[u64]>,
}

impl StoredBitmap {
    /// Loads the table of a bitmap that was [checked](Entry::check), and checks it: unless the bitmap is in
    /// use it has the entries that a disk of this size needs, each is possible, lies within the file and not on other bits, the
    /// table itself, or what the header points to.
    pub fn load(storage: &Arc<dyn Storage>, header: &Header, entry: &Entry) -> Result<Self> {
        let geometry = header.geometry;
        let corrupt = |what: String| Err(damaged(storage, entry, what));
        let bits = header.virtual_size.div_ceil(entry.granularity());
        let needed = bits.div_ceil(8).div_ceil(geometry.cluster_len());
        if needed != u64::from(entry.table_entries) && !entry.flags.contains(Flags::IN_USE) {
            return corrupt(format!("its table has {} entries, not {needed}", entry.table_entries));
        }
        let len = entry.table_len();
        if check_place("table", entry.table_at, len, geometry).is_err() {
            return corrupt(format!("its table cannot lie at {:#x}", entry.table_at));
        }
        let file_len = file_len(storage)?;
        if entry.table_at + len > file_len {
            return corrupt("the file ends inside of its table".to_owned());
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        read_exact(storage, HostOffset(entry.table_at), &mut bytes)?;
        let table = bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        let bitmap = StoredBitmap { geometry, granularity_bits: entry.granularity_bits, bits, table };
        match bitmap.fault(header, entry, file_len) {
            Some(what) => corrupt(what),
            None => Ok(bitmap),
        }
    }

    /// One without any bit in the file.
    #[cfg(test)]
    pub fn empty(geometry: Geometry, granularity_bits: u8, bits: u64) -> Self {
        let entries = usize::try_from(bits.div_ceil(8).div_ceil(geometry.cluster_len())).unwrap_or(0);
        StoredBitmap { geometry, granularity_bits, bits, table: vec![0; entries].into() }
    }

    /// What is wrong with the table, if anything is.
    fn fault(&self, header: &Header, entry: &Entry, file_len: u64) -> Option<String> {
        let cluster_len = self.geometry.cluster_len();
        let data_len = self.bits.div_ceil(8);
        let mut places = Vec::new();
        for (index, raw) in (0..).zip(self.table.iter()) {
            let at = raw & OFFSET_MASK;
            let misplaced = !self.geometry.is_aligned(at) || at != 0 && raw & ALL_ONES != 0;
            if raw & RESERVED != 0 || misplaced {
                return Some(format!("entry {index} of its table is bad"));
            }
            let used = data_len.saturating_sub(index * cluster_len).min(cluster_len);
            if at != 0 && at + used > file_len {
                return Some("the file ends inside of its bits".to_owned());
            }
            places.extend((at != 0).then_some((at, cluster_len)));
        }
        let words = |entries: u32| u64::from(entries) * 8;
        places.push((0, cluster_len));
        places.push((entry.table_at, entry.table_len()));
        places.push((header.l1.at.0, words(header.l1.entries)));
        places.push((header.refcount_table.at.0, words(header.refcount_table.entries)));
        places.extend(header.extensions.bitmaps.map(|found| (found.directory_at, found.directory_len)));
        places.retain(|(_, len)| *len > 0);
        places.sort_unstable();
        let overlap = places.windows(2).find(|pair| match pair {
            [(at, len), (next, _)] => at.saturating_add(*len) > *next,
            _ => false,
        });
        overlap.map(|_| "its table or its bits lie on other metadata".to_owned())
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// The same as a power of two.
    pub fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }

    /// How many bits stand for a part of the disk.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// What addresses depend on.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The clusters of bits, in order.
    pub fn clusters(&self) -> impl Iterator<Item = Stored> {
        self.table.iter().map(|raw| Stored::decode(*raw))
    }

    /// Where cluster number `cluster` of bits is.
    pub fn place_of(&self, cluster: usize) -> Stored {
        self.table.get(cluster).map_or(Stored::Zeroes, |raw| Stored::decode(*raw))
    }

    /// How many clusters of bits there are.
    pub fn clusters_len(&self) -> usize {
        self.table.len()
    }

    /// The same of a disk with so many bits, where what is new is clear. What a last cluster that stays has behind its last
    /// bit is not looked at.
    pub fn resized(&self, bits: u64) -> Self {
        let clusters = |bits: u64| {
            let clusters = bits.div_ceil(8).div_ceil(self.geometry.cluster_len());
            usize::try_from(clusters).unwrap_or(usize::MAX)
        };
        let mut table = self.table.to_vec();
        table.truncate(clusters(bits));
        table.resize(clusters(bits), Stored::Zeroes.encode());
        StoredBitmap { bits, table: table.into(), ..*self }
    }

    /// The bytes of bits that page number `page` has; none behind the end.
    pub fn bytes_of_page(&self, page: u64) -> Range<u64> {
        let start = page * PAGE_LEN;
        start..(start + PAGE_LEN).min(self.bits.div_ceil(8)).max(start)
    }

    /// The clusters that these bytes of bits lie in.
    pub fn clusters_of(&self, bytes: &Range<u64>) -> Range<usize> {
        let cluster_len = self.geometry.cluster_len();
        let first = usize::try_from(bytes.start / cluster_len).unwrap_or(usize::MAX);
        first..usize::try_from(bytes.end.div_ceil(cluster_len)).unwrap_or(0).max(first)
    }

    /// Page number `page` of the bits.
    pub fn page(&self, storage: &Arc<dyn Storage>, page: u64) -> Result<Page> {
        let clusters = self.clusters_of(&self.bytes_of_page(page));
        let places: Vec<_> = clusters.map(|cluster| self.place_of(cluster)).collect();
        self.page_in(storage, page, &places)
    }

    /// The same, if the clusters that it lies in are at `places`.
    pub fn page_in(&self, storage: &Arc<dyn Storage>, page: u64, places: &[Stored]) -> Result<Page> {
        if places.iter().all(|stored| *stored == Stored::Zeroes) {
            return Ok(Page::Zeroes);
        }
        if places.iter().all(|stored| *stored == Stored::Ones) {
            return Ok(Page::Ones);
        }
        let cluster_len = self.geometry.cluster_len();
        let Range { start, end } = self.bytes_of_page(page);
        let mut bytes = vec![0; usize::try_from(PAGE_LEN).unwrap_or(0)];
        let mut at = start;
        for stored in places {
            let within = at % cluster_len;
            let len = (cluster_len - within).min(end - at);
            let from = usize::try_from(at - start).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(len).unwrap_or(0));
            let part = bytes.get_mut(from..to).unwrap_or_default();
            match stored {
                Stored::Zeroes => {}
                Stored::Ones => part.fill(0xff),
                Stored::At(host) => read_exact(storage, HostOffset(host.0 + within), part)?,
            }
            at += len;
        }
        Ok(Page::of_bytes(&bytes))
    }
}

/// The error for a bitmap that contradicts itself.
pub fn damaged(storage: &Arc<dyn Storage>, entry: &Entry, what: String) -> Error {
    let name = entry.shown_name();
    let text = format!("the bitmap '{name}' is damaged: {what}");
    Error::new(ErrorKind::Corrupt, text).with_path(&storage.facts().path)
}

fn file_len(storage: &Arc<dyn Storage>) -> Result<u64> {
    storage.len().map_err(|e| storage_error(storage, "cannot tell the file's length", HostOffset(0), e))
}
