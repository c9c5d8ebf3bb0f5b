//! [`Walk`]: every reference to a cluster of an image, counted; every entry on the way judged.
//!
//! The one walk for checking and for repairing. An entry that makes no sense is a fault, and what it
//! names is counted all the same as far as it can be told, so that too much is held in use rather than
//! too little. It never writes, and an unreadable table does not end it.

use std::collections::HashMap;

use super::counts::{Counts, Singles};
use super::report::{Fault, Tally};
use super::{Progress, Subject, bitmaps, read_padded};
use crate::address::HostOffset;
use crate::qcow2::header::TableLocation;
use crate::qcow2::types::{DataFile, EntryFault, Geometry, GuestCluster, HostIndex, L2Entry};
use crate::sync::atomic::{AtomicUsize, Ordering};

/// L2 tables that are gathered before they are looked at: each that several L1 entries name is read once
/// for all of them. Our choice: some 10 MiB, and the tables of 128 TiB with clusters of 64 KiB.
const TABLES_MAX: usize = 1 << 18;
/// Bytes of an L1 table, or another list, that are read at once. Our choice.
const CHUNK_LEN: u64 = 64 << 10;

/// One walk over all tables, for one window of clusters.
pub struct Walk<'a> {
    /// What is walked over.
    pub subject: &'a Subject<'a>,
    /// Where uses are counted.
    pub counts: &'a Counts,
    /// Where faults go.
    pub tally: &'a Tally,
    /// Whether entries are judged and the disk's clusters counted: in one walk of several.
    pub judge: bool,
    /// What copied flags are held against, if they are.
    pub singles: Option<&'a Singles>,
    /// Who is told how far it is.
    pub progress: Progress<'a>,
}

/// How many L1 entries name an L2 table.
#[derive(Clone, Copy, Default)]
struct Shares {
    /// Of the active L1 table.
    active: u64,
    /// Of all of them.
    all: u64,
    /// Which one was the first.
    l1_index: u64,
}

type Tables = HashMap<HostOffset, Shares>;

/// An entry of an L2 table as it lies there.
#[derive(Clone, Copy)]
struct RawEntry {
    table: HostOffset,
    number: usize,
    raw: u64,
    bitmap: u64,
    shares: Shares,
}

impl Walk<'_> {
    /// Counts all references.
    pub fn run(&self) {
        let header = self.subject.header;
        let cluster_len = self.geometry().cluster_len();
        self.refer(HostOffset(0), cluster_len, 1, || "the header".to_owned());
        let mut tables = Tables::new();
        self.l1("the L1 table", header.l1, true, &mut tables);
        let (snapshots, snapshots_len) = self.subject.snapshots;
        if !snapshots.is_empty() && !self.is_internal() {
            self.bad_entry(1, || "there are snapshots, which an external data file does not have".to_owned());
        }
        for (number, snapshot) in snapshots.iter().enumerate() {
            match snapshot.checked_l1(header) {
                Ok(l1) => self.l1(&format!("the L1 table of snapshot {number}"), l1, false, &mut tables),
                Err(error) => self.bad_entry(1, || error.to_string()),
            }
        }
        self.look_at(&mut tables);
        self.refer(header.snapshots.at, snapshots_len, 1, || "the snapshot table".to_owned());
        if self.subject.table_stays {
            let len = u64::from(header.refcount_table.entries) * 8;
            self.refer(header.refcount_table.at, len, 1, || "the refcount table".to_owned());
        }
        bitmaps::walk(self);
        for block in self.subject.blocks() {
            self.counts.add(self.geometry().host_index(block), 1, 1);
        }
    }

    /// Counts `times` references to the clusters of a range that `what` names.
    pub fn refer(&self, at: HostOffset, len: u64, times: u64, what: impl FnOnce() -> String) {
        if len == 0 {
            return;
        }
        // The last cluster of a file may be cut off, but it has to begin in it.
        let end = at.0.saturating_add(len);
        if end.saturating_sub(self.subject.file_len) >= self.geometry().cluster_len() {
            self.bad_entry(times, || format!("{} ({len} bytes at {at}) lies outside of the file", what()));
            return;
        }
        let (first, count) = self.geometry().host_span(at, len);
        self.counts.add(first, count, times);
    }

    /// Notes an entry that makes no sense.
    pub fn bad_entry(&self, times: u64, text: impl FnOnce() -> String) {
        if self.judge {
            self.tally.fault(Fault::BadEntry, times, text);
        }
    }

    /// Calls `visit` with each of the big-endian words from `at`.
    pub fn words(&self, what: &str, at: HostOffset, words: u64, mut visit: impl FnMut(u64, u64)) {
        let mut bytes = vec![0; usize::try_from(CHUNK_LEN.min(words * 8)).unwrap_or(0)];
        let mut number = 0;
        while number < words {
            let len = usize::try_from((words - number) * 8).unwrap_or(usize::MAX).min(bytes.len());
            let part = bytes.get_mut(..len).unwrap_or_default();
            let part_at = HostOffset(at.0 + number * 8);
            // Noted in every walk: it may have been readable in the one before.
            if let Err(error) = read_padded(self.subject.image, part_at, part) {
                return self.tally.unreadable(part_at, || format!("{what} cannot be read: {error}"));
            }
            for word in part.as_chunks().0 {
                visit(number, u64::from_be_bytes(*word));
                number += 1;
            }
        }
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.subject.header.geometry
    }

    fn is_internal(&self) -> bool {
        self.geometry().data_file() == DataFile::Internal
    }

    fn l1(&self, what: &str, l1: TableLocation, active: bool, tables: &mut Tables) {
        self.refer(l1.at, u64::from(l1.entries) * 8, 1, || what.to_owned());
        self.words(what, l1.at, u64::from(l1.entries), |index, raw| {
            let Some(at) = self.l1_entry(what, index, raw) else { return };
            if active {
                self.judge_flag(raw, at, 1, || format!("{what}, entry {index} ({raw:#x})"));
            }
            let shares = tables.entry(at).or_insert(Shares { l1_index: index, ..Shares::default() });
            shares.all += 1;
            shares.active += u64::from(active);
            if tables.len() >= TABLES_MAX {
                self.look_at(tables);
            }
        });
    }

    /// The L2 table that an L1 entry leads to, if any can be followed.
    fn l1_entry(&self, what: &str, index: u64, raw: u64) -> Option<HostOffset> {
        let bad = |why: &str| self.bad_entry(1, || format!("{what}, entry {index} ({raw:#x}): {why}"));
        match self.geometry().decode_l1(raw) {
            Ok(None) if raw == 0 => return None,
            Ok(None) => bad("it names no table and is not 0"),
            Ok(Some(table)) => return Some(table.start()),
            Err(fault) => bad(&fault.to_string()),
        }
        let at = self.geometry().offset_in(raw);
        if at.0 != 0 && self.geometry().is_aligned(at.0) {
            return Some(at);
        }
        if at.0 != 0 {
            self.refer(at, self.geometry().cluster_len(), 1, || format!("{what}, entry {index}"));
        }
        None
    }

    /// Looks at the tables that were gathered, on several threads.
    fn look_at(&self, tables: &mut Tables) {
        let mut tables: Vec<_> = tables.drain().collect();
        // In the order of the file.
        tables.sort_unstable_by_key(|(at, _)| *at);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut bytes = vec![0; usize::try_from(self.geometry().cluster_len()).unwrap_or(0)];
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some((at, shares)) = tables.get(number) else { return };
                self.l2(*at, *shares, &mut bytes);
                self.progress.tell(number + 1, tables.len());
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.subject.threads.min(tables.len()) {
                // Without another thread this one does it all.
                let _ = std::thread::Builder::new().name("check".to_owned()).spawn_scoped(scope, work);
            }
            work();
        });
    }

    fn l2(&self, at: HostOffset, shares: Shares, bytes: &mut [u8]) {
        let geometry = self.geometry();
        let what = || format!("the L2 table at {at}");
        self.refer(at, geometry.cluster_len(), shares.all, what);
        if let Err(error) = read_padded(self.subject.image, at, bytes) {
            return self.tally.unreadable(at, || format!("{} cannot be read: {error}", what()));
        }
        let mut allocated = Allocated::default();
        for (number, entry) in bytes.as_chunks::<8>().0.chunks(geometry.entry_words()).enumerate() {
            let mut words = entry.iter().map(|word| u64::from_be_bytes(*word));
            let (raw, bitmap) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
            if raw != 0 || bitmap != 0 {
                self.l2_entry(RawEntry { table: at, number, raw, bitmap, shares }, &mut allocated);
            }
        }
        if self.judge && shares.active > 0 {
            let Allocated { clusters, fragmented, compressed, .. } = allocated;
            let times = shares.active;
            self.tally.allocated(clusters * times, fragmented * times, compressed * times);
        }
    }

    fn l2_entry(&self, entry: RawEntry, allocated: &mut Allocated) {
        let geometry = self.geometry();
        let per_table = geometry.l2_coverage_len() / geometry.cluster_len();
        let cluster = GuestCluster(entry.shares.l1_index * per_table + entry.number as u64);
        let host = match geometry.decode_l2(entry.raw, entry.bitmap, cluster) {
            Ok(L2Entry::Unallocated | L2Entry::Zero { host: None } | L2Entry::Split { host: None, .. }) => {
                return;
            }
            Ok(L2Entry::Compressed(blob)) => {
                if entry.bitmap != 0 {
                    return self.bad_entry(entry.shares.all, || {
                        format!("{entry}: it is compressed and has subclusters")
                    });
                }
                self.judge_clear(entry);
                self.refer(blob.at, blob.len_max, entry.shares.all, || entry.to_string());
                return allocated.add_compressed();
            }
            Ok(
                L2Entry::Zero { host: Some(host) }
                | L2Entry::Data { host, .. }
                | L2Entry::Split { host: Some(host), .. },
            ) => host.start(),
            Err(fault @ EntryFault::OffsetTooLarge) => {
                self.judge_clear(entry);
                self.bad_entry(entry.shares.all, || format!("{entry}: {fault}"));
                // As QEMU counts it: it is a compressed cluster all the same.
                return allocated.add_compressed();
            }
            Err(fault) => {
                self.bad_entry(entry.shares.all, || format!("{entry}: {fault}"));
                let Some(host) = geometry.host_of(entry.raw) else { return };
                host
            }
        };
        allocated.add(host, geometry.cluster_len());
        if self.is_internal() {
            self.refer(host, geometry.cluster_len(), entry.shares.all, || entry.to_string());
        }
        self.judge_flag(entry.raw, host, entry.shares.active, || entry.to_string());
    }

    /// Holds the copied flag of an entry against the refcount of what it names.
    fn judge_flag(&self, raw: u64, host: HostOffset, times: u64, what: impl FnOnce() -> String) {
        let Some(singles) = self.singles.filter(|_| times > 0) else { return };
        let is_l2 = self.is_internal();
        let single =
            if is_l2 { singles.get(self.geometry().host_index(host)) } else { self.judge.then_some(true) };
        if single.is_some_and(|single| single != self.geometry().is_owned(raw)) {
            let why =
                if self.geometry().is_owned(raw) { "set, but the refcount is not 1" } else { "missing" };
            self.tally.fault(Fault::Flag, times, || format!("{}: its copied flag is {why}", what()));
        }
    }

    /// A compressed cluster never has the copied flag.
    fn judge_clear(&self, entry: RawEntry) {
        if self.judge && self.geometry().is_owned(entry.raw) {
            let text = || format!("{entry}: it is compressed and has the copied flag");
            self.tally.fault(Fault::Flag, entry.shares.all, text);
        }
    }
}

/// The clusters of the disk that an L2 table gives a place in the file.
#[derive(Default)]
struct Allocated {
    clusters: u64,
    fragmented: u64,
    compressed: u64,
    next: Option<u64>,
}

impl Allocated {
    fn add(&mut self, host: HostOffset, len: u64) {
        self.clusters += 1;
        self.fragmented += u64::from(self.next.is_some_and(|next| next != host.0));
        self.next = Some(host.0 + len);
    }

    /// Reading these goes by sectors that are read again for the next one, so each counts as fragmented.
    fn add_compressed(&mut self) {
        self.clusters += 1;
        self.fragmented += 1;
        self.compressed += 1;
    }
}

impl std::fmt::Display for RawEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "entry {} ({:#x}) of the L2 table at {}", self.number, self.raw, self.table)
    }
}

/// The cluster with this number, for people.
pub fn cluster_name(geometry: Geometry, index: HostIndex) -> String {
    format!("the cluster at {}", geometry.host_at(index).start())
}
