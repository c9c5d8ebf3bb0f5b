//! What a check has found: [`CheckReport`] for whoever asked, and [`Tally`], which threads fill together.
//!
//! Only counting and wording; what is right or wrong is decided by `walk` and `compare`.

use std::collections::HashSet;

use serde::Serialize;

use crate::address::HostOffset;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Most texts that are kept. Our choice: what a person reads; the counts are complete all the same.
const MESSAGES_MAX: usize = 1000;

/// What a check has found, in the terms and with the keys of `qemu-img check`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// What could not be looked at, for errors of the file.
    pub check_errors: u64,
    /// What is wrong and can cost data.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used: room is lost, nothing else.
    pub leaks: u64,
    /// Corruptions that were there before a repair and are not any more.
    pub corruptions_fixed: u64,
    /// Leaks that were there before a repair and are not any more.
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those of them that have a cluster in the file.
    pub allocated_clusters: u64,
    /// Those of them that do not lie behind the one before.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Behind the last cluster in use.
    pub image_end_offset: u64,
    /// Whether the image says that it was not closed, so that refcounts may be wrong.
    pub dirty: bool,
    /// Whether the image says that it is corrupt.
    pub corrupt: bool,
    /// What was found, in words; at most a thousand.
    pub messages: Vec<String>,
    /// How many more there would have been.
    pub messages_left_out: u64,
    /// Why a repair has left corruptions as they are, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_repaired: Option<String>,
}

/// Counters that threads add to.
#[derive(Default)]
pub struct Tally {
    errors: AtomicU64,
    /// Corruptions of tables, for which it is not known what is in use.
    bad_entries: AtomicU64,
    /// Refcounts that are too low.
    low: AtomicU64,
    /// Wrong copied flags.
    flags: AtomicU64,
    /// Clusters that are used more often than a refcount can say.
    too_many: AtomicU64,
    /// Parts of the refcount structure that cannot stay.
    structure: AtomicU64,
    /// Metadata on metadata.
    overlaps: AtomicU64,
    leaks: AtomicU64,
    allocated: AtomicU64,
    fragmented: AtomicU64,
    compressed: AtomicU64,
    /// Behind the last cluster that is used or counted.
    end: AtomicU64,
    messages: Mutex<Messages>,
}

#[derive(Default)]
struct Messages {
    texts: Vec<String>,
    left_out: u64,
    /// The first bad entry, for who has to refuse.
    first_bad_entry: Option<String>,
    /// What could not be read.
    unreadable: HashSet<HostOffset>,
}

/// What kind of thing is wrong, by what can be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The file could not be read.
    Unreadable,
    /// An entry of a table makes no sense: what it led to is unknown.
    BadEntry,
    /// A refcount is too low.
    Low,
    /// A copied flag is not what the refcount says.
    Flag,
    /// A cluster is used more often than a refcount can say.
    TooMany,
    /// A refcount block cannot be where it is.
    Structure,
    /// Metadata and something else share a cluster.
    Overlap,
    /// A refcount is too high.
    Leak,
}

impl Tally {
    /// Notes `weight` faults of one kind, with one text.
    pub fn fault(&self, fault: Fault, weight: u64, text: impl FnOnce() -> String) {
        self.counter(fault).fetch_add(weight, Ordering::Relaxed);
        let mut messages = self.messages.lock();
        let first = fault == Fault::BadEntry && messages.first_bad_entry.is_none();
        if messages.texts.len() >= MESSAGES_MAX && !first {
            messages.left_out += 1;
            return;
        }
        let text = text();
        if first {
            messages.first_bad_entry = Some(text.clone());
        }
        messages.texts.push(text);
    }

    /// Notes that what lies at `at` could not be read: once, however often somebody tries.
    pub fn unreadable(&self, at: HostOffset, text: impl FnOnce() -> String) {
        if self.messages.lock().unreadable.insert(at) {
            self.fault(Fault::Unreadable, 1, text);
        }
    }

    /// Counts clusters of the disk that have a place in the file.
    pub fn allocated(&self, clusters: u64, fragmented: u64, compressed: u64) {
        self.allocated.fetch_add(clusters, Ordering::Relaxed);
        self.fragmented.fetch_add(fragmented, Ordering::Relaxed);
        self.compressed.fetch_add(compressed, Ordering::Relaxed);
    }

    /// A cluster that ends at `end` is used or counted.
    pub fn in_use_to(&self, end: u64) {
        self.end.fetch_max(end, Ordering::Relaxed);
    }

    /// Behind the last cluster that is used or counted.
    pub fn in_use_end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    /// How many faults of this kind there are.
    pub fn count(&self, fault: Fault) -> u64 {
        self.counter(fault).load(Ordering::Relaxed)
    }

    /// The first entry that makes no sense.
    pub fn first_bad_entry(&self) -> Option<String> {
        self.messages.lock().first_bad_entry.clone()
    }

    /// All of it as a report.
    pub fn report(&self, total_clusters: u64) -> CheckReport {
        let count = |fault| self.count(fault);
        let corruptions =
            [Fault::BadEntry, Fault::Low, Fault::Flag, Fault::TooMany, Fault::Structure, Fault::Overlap];
        let report = CheckReport {
            check_errors: count(Fault::Unreadable),
            corruptions: corruptions.into_iter().map(count).sum(),
            leaks: count(Fault::Leak),
            total_clusters,
            allocated_clusters: self.allocated.load(Ordering::Relaxed),
            fragmented_clusters: self.fragmented.load(Ordering::Relaxed),
            compressed_clusters: self.compressed.load(Ordering::Relaxed),
            image_end_offset: self.in_use_end(),
            ..CheckReport::default()
        };
        let messages = self.messages.lock();
        let texts = messages.texts.clone();
        CheckReport { messages: texts, messages_left_out: messages.left_out, ..report }
    }

    fn counter(&self, fault: Fault) -> &AtomicU64 {
        match fault {
            Fault::Unreadable => &self.errors,
            Fault::BadEntry => &self.bad_entries,
            Fault::Low => &self.low,
            Fault::Flag => &self.flags,
            Fault::TooMany => &self.too_many,
            Fault::Structure => &self.structure,
            Fault::Overlap => &self.overlaps,
            Fault::Leak => &self.leaks,
        }
    }
}
