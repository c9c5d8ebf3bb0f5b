//! Counting how often each cluster is referred to, from the tables alone.
//!
//! Each table is read once, however many pointers lead to it, and what small tables can claim is bounded: time
//! follows the length of the tables that are there, memory that of what they name. Nothing is written here.

use std::collections::HashMap;

use super::super::driver::Qcow2Driver;
use super::super::header::{Header, TableLocation};
use super::super::snapshots::Snapshot;
use super::super::types::{Geometry, GuestCluster, HostCluster, HostIndex, L2Entry};
use super::metadata_map::{Kind, MetadataMap};
use super::repair::{beyond_repair, fail, read_words};
use crate::address::HostOffset;
use crate::error::Result;

/// Most entries of all L1 tables together. Our choice: 32,768 snapshots of a terabyte in clusters of 64 KiB.
const L1_ENTRIES_MAX: u64 = 1 << 26;
/// Most bytes of L2 tables. Our choice: those of 64 TiB in clusters of 64 KiB.
const L2_LEN_MAX: u64 = 8 << 30;
/// Clusters in a group of counters. Our choice: little is lost where clusters in use lie far apart.
const GROUP: u64 = 128;
/// Most groups: those of 16 TiB in clusters of 64 KiB, which take a gigabyte. Our choice.
const GROUPS_MAX: usize = 1 << 21;
/// Clusters behind the end of a file that entries may name. After a power cut they do, where the file's length was
/// not yet durable. Our choice: 64 GiB in clusters of 64 KiB.
const BEHIND_END_MAX: u64 = 1 << 20;

/// How often each cluster is referred to.
pub struct Counts {
    geometry: Geometry,
    /// By number, in groups.
    groups: HashMap<u64, Box<[u32]>>,
    /// Behind the last cluster that is.
    end: u64,
    /// Behind the last cluster that may be.
    limit: u64,
}

impl Counts {
    fn new(driver: &Qcow2Driver, geometry: Geometry) -> Result<Self> {
        let image = driver.image();
        let len = image.len().map_err(|e| fail(driver, "cannot tell the file's length", e))?;
        let more = if image.facts().grows { BEHIND_END_MAX } else { 0 };
        let limit = len.div_ceil(geometry.cluster_len()).saturating_add(more);
        Ok(Counts { geometry, groups: HashMap::new(), end: 0, limit })
    }

    /// Counts `times` more references to each cluster of the `len` bytes from `at`.
    pub fn add(&mut self, at: HostOffset, len: u64, times: u64) -> std::result::Result<(), &'static str> {
        let (first, count) = self.geometry.host_span(at, len);
        let end = first.0.saturating_add(count);
        if end > self.limit {
            return Err("an entry leads far behind the end of the file");
        }
        self.end = self.end.max(end);
        let times = u32::try_from(times).map_err(|_| TOO_OFTEN)?;
        for index in first.0..end {
            if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&(index / GROUP)) {
                return Err("what its tables name is spread too far");
            }
            let new = || vec![0; usize::try_from(GROUP).unwrap_or(0)].into_boxed_slice();
            let group = self.groups.entry(index / GROUP).or_insert_with(new);
            if let Some(count) = usize::try_from(index % GROUP).ok().and_then(|at| group.get_mut(at)) {
                *count = count.checked_add(times).ok_or(TOO_OFTEN)?;
            }
        }
        Ok(())
    }

    /// How often the cluster is referred to.
    pub fn get(&self, index: HostIndex) -> u64 {
        let group = self.groups.get(&(index.0 / GROUP));
        let at = usize::try_from(index.0 % GROUP).unwrap_or(usize::MAX);
        group.and_then(|group| group.get(at)).copied().map_or(0, u64::from)
    }

    /// The cluster behind the last one that is referred to.
    pub fn end(&self) -> HostIndex {
        HostIndex(self.end)
    }

    /// All clusters that are referred to, in order.
    pub fn counted(&self) -> impl Iterator<Item = HostIndex> + '_ {
        let mut groups: Vec<u64> = self.groups.keys().copied().collect();
        groups.sort_unstable();
        let all = groups.into_iter().flat_map(|group| group * GROUP..(group + 1) * GROUP).map(HostIndex);
        all.filter(|index| self.get(*index) != 0)
    }

    /// Whether some of `count` clusters may be referred to.
    pub fn may_have(&self, first: HostIndex, count: u64) -> bool {
        let last = first.0.saturating_add(count.saturating_sub(1));
        (first.0 / GROUP..=last / GROUP).any(|group| self.groups.contains_key(&group))
    }
}

const TOO_OFTEN: &str = "a cluster is referred to too often";

/// Counts all but the refcount blocks. Data that lies in metadata is an error: neither could be written.
pub fn count(
    driver: &Qcow2Driver,
    header: &Header,
    snapshots: (&[Snapshot], u64),
    map: &MetadataMap,
) -> Result<Counts> {
    let refuse = |what| beyond_repair(driver, what);
    let mut counts = Counts::new(driver, header.geometry)?;
    counts.add(HostOffset(0), header.geometry.cluster_len(), 1).map_err(refuse)?;
    let refcount_table_len = u64::from(header.refcount_table.entries) * 8;
    counts.add(header.refcount_table.at, refcount_table_len, 1).map_err(refuse)?;
    if header.snapshots.entries > 0 {
        counts.add(header.snapshots.at, snapshots.1, 1).map_err(refuse)?;
    }
    let mut tables = Tables { found: HashMap::new(), l1_entries: 0 };
    tables.find(driver, header.l1, &mut counts)?;
    for snapshot in snapshots.0 {
        tables.find(driver, snapshot.checked_l1(header)?, &mut counts)?;
    }
    let mut sorted: Vec<(HostCluster, u64)> = tables.found.iter().map(|(at, times)| (*at, *times)).collect();
    sorted.sort_unstable();
    for (table, times) in sorted {
        let index = header.geometry.host_index(table.start());
        if map.kind(index).is_some_and(|kind| kind != Kind::L2) {
            return Err(refuse("an L2 table lies in other metadata"));
        }
        counts.add(table.start(), header.geometry.cluster_len(), times).map_err(refuse)?;
        let is_metadata =
            |index| map.kind(index).is_some() || tables.found.contains_key(&header.geometry.host_at(index));
        count_table(driver, table, times, &mut counts, is_metadata)?;
    }
    Ok(counts)
}

/// The L2 tables of an image, and how many L1 entries lead to each.
struct Tables {
    found: HashMap<HostCluster, u64>,
    /// Of all L1 tables until now.
    l1_entries: u64,
}

impl Tables {
    /// Counts an L1 table and finds what it leads to.
    fn find(&mut self, driver: &Qcow2Driver, l1: TableLocation, counts: &mut Counts) -> Result<()> {
        let geometry = counts.geometry;
        self.l1_entries += u64::from(l1.entries);
        if self.l1_entries > L1_ENTRIES_MAX {
            return Err(beyond_repair(driver, "its L1 tables are too long together"));
        }
        let len = u64::from(l1.entries) * 8;
        counts.add(l1.at, len, 1).map_err(|what| beyond_repair(driver, what))?;
        for raw in read_words(driver, l1.at, len)? {
            let decoded = geometry.decode_l1(raw).map_err(|_| beyond_repair(driver, "an L1 entry is bad"))?;
            if let Some(table) = decoded {
                *self.found.entry(table).or_insert(0) += 1;
            }
            if self.found.len() as u64 * geometry.cluster_len() > L2_LEN_MAX {
                return Err(beyond_repair(driver, "its L2 tables are too long together"));
            }
        }
        Ok(())
    }
}

/// Counts what an L2 table leads to, `times` times.
fn count_table(
    driver: &Qcow2Driver,
    table: HostCluster,
    times: u64,
    counts: &mut Counts,
    is_metadata: impl Fn(HostIndex) -> bool,
) -> Result<()> {
    let geometry = counts.geometry;
    for raw in read_words(driver, table.start(), geometry.cluster_len())? {
        // The guest's cluster matters with an external data file only, which is not repaired.
        let entry = geometry.decode_l2(raw, 0, GuestCluster(0));
        let (at, len) = match entry.map_err(|_| beyond_repair(driver, "an L2 entry is bad"))? {
            L2Entry::Unallocated | L2Entry::Zero { host: None } => continue,
            L2Entry::Zero { host: Some(host) } | L2Entry::Data { host, .. } => {
                (host.start(), geometry.cluster_len())
            }
            L2Entry::Compressed(blob) => (blob.at, blob.len_max),
            L2Entry::Split { .. } => return Err(beyond_repair(driver, "it has subclusters")),
        };
        let (first, count) = geometry.host_span(at, len);
        if (first.0..first.0 + count).map(HostIndex).any(&is_metadata) {
            return Err(beyond_repair(driver, "an L2 entry leads into metadata"));
        }
        counts.add(at, len, times).map_err(|what| beyond_repair(driver, what))?;
    }
    Ok(())
}
