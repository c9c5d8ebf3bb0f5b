//! Checking and repairing an image: are all clusters counted as often as they are used?
//!
//! | module | what is in it |
//! |---|---|
//! | `walk`, `bitmaps` | every reference, counted, and every entry judged |
//! | `counts` | the counters, for a window of the file at a time |
//! | `compare` | refcounts against what was counted |
//! | `mend`, `flags` | making refcounts, and then copied flags, right |
//! | `ledger` | refcounts of an image that nobody has open |
//! | `report` | what was found |
//!
//! It works on the image file alone: neither a backing file nor a data file is looked at. An image that is
//! opened for writing after a crash is repaired by the same walk.

mod bitmaps;
mod compare;
mod counts;
mod flags;
pub(super) mod ledger;
mod mend;
mod report;
mod walk;

pub use report::CheckReport;

use super::header::{Header, Incompatible, TableLocation};
use super::snapshots::{self, Snapshot};
use super::types::HostIndex;
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::{Arc, available_parallelism};
use counts::{Counts, Singles, WINDOW_CLUSTERS, Window};
use mend::Mend;
use report::{Fault, Tally};
use walk::Walk;

/// Most clusters of a file that is checked (QEMU's limit).
const CLUSTERS_MAX: u64 = i32::MAX as u64;
/// Most clusters of L1 tables over all snapshots. Our choice, as for writing: what a check of a small file
/// that claims much can take at most.
const INACTIVE_L1_CLUSTERS_MAX: u64 = 1 << 19;
/// Most threads that read tables. Our choice: more do not find a faster disk.
const THREADS_MAX: usize = 8;
/// Bits of a refcount table entry that must be zero (specification).
const TABLE_RESERVED: u64 = 0x1ff;

/// What is to be repaired.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Repair {
    /// Nothing: the file is only read.
    #[default]
    Nothing,
    /// Leaks: refcounts that are too high.
    Leaks,
    /// Whatever can be.
    All,
}

/// How to check.
#[derive(Clone, Copy)]
pub struct CheckOptions<'a> {
    /// What to repair.
    pub repair: Repair,
    /// Is told how far it is, from several threads, as parts of 1000.
    pub progress: Option<&'a (dyn Fn(u32) + Sync)>,
    /// So many clusters are counted at a time, in four bytes each; the tables are walked once for each time.
    pub window_clusters: u64,
}

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        CheckOptions { repair: Repair::Nothing, progress: None, window_clusters: WINDOW_CLUSTERS }
    }
}

/// Checks the image in `image`, and repairs it where it is told to; the storage must be writable then, and
/// nobody else may write. An error: it could not be checked at all, or the repair failed in the middle, which
/// leaves the image no worse than it was.
pub fn check(image: &Arc<dyn Storage>, options: CheckOptions<'_>) -> Result<CheckReport> {
    run(image, options, options.window_clusters.max(1)).map_err(|e| e.with_path(&image.facts().path))
}

/// Makes refcounts and copied flags of an image right that was not closed, and clears its dirty bit last.
/// Nothing is changed where anything else is wrong. Returns where the refcount table is.
pub fn rebuild(
    image: &Arc<dyn Storage>,
    header: &Header,
    snapshots: (&[Snapshot], u64),
) -> Result<TableLocation> {
    let subject = Subject::load(image, header, snapshots)?;
    let survey = survey(&subject, Progress::default(), WINDOW_CLUSTERS);
    if let Some(what) = survey.beyond_refcounts() {
        let text = format!(
            "the image was not closed, and its refcounts cannot be rebuilt: {what}; nothing was changed \
             (nbd-img check --repair all, qemu-img check -r all, or --read-only)"
        );
        return Err(Error::new(ErrorKind::Corrupt, text).with_path(&image.facts().path));
    }
    let changed = survey.tally.count(Fault::Low) + survey.tally.count(Fault::Leak);
    let table = mend::mend(subject, &survey, Mend::all(), WINDOW_CLUSTERS)?;
    ledger::write_features(image, (header.incompatible - Incompatible::DIRTY).bits())?;
    tracing::info!(path = ?image.facts().path, changed, "the image was not closed; its refcounts were rebuilt");
    Ok(table)
}

/// Fails unless nothing is wrong but leaks.
pub(super) fn ensure_sound(subject: &Subject<'_>) -> Result<()> {
    let survey = survey(subject, Progress::default(), WINDOW_CLUSTERS);
    let count = |fault| survey.tally.count(fault);
    let wrong = (count(Fault::Low) + count(Fault::Flag) > 0).then(|| "its refcounts are wrong".to_owned());
    match survey.beyond_refcounts().or(wrong) {
        None => Ok(()),
        Some(what) => {
            let text = format!("the image is damaged: {what} (nbd-img check --repair all)");
            Err(Error::new(ErrorKind::Corrupt, text))
        }
    }
}

/// Behind the last cluster that is used or counted. Fails if that cannot be told.
pub(super) fn used_end(subject: &Subject<'_>) -> Result<u64> {
    let tally = survey(subject, Progress::default(), WINDOW_CLUSTERS).tally;
    if tally.count(Fault::Unreadable) > 0 { Err(unknown_use()) } else { Ok(tally.in_use_end()) }
}

/// Frees what nothing leads to any more, in an image that was sound before: refcounts, room, and the end of the
/// file. Fails, and frees nothing, as long as not everything in it can be read.
pub(super) fn free_unused(
    image: &Arc<dyn Storage>,
    header: &Header,
    snapshots: (&[Snapshot], u64),
) -> Result<()> {
    let subject = Subject::load(image, header, snapshots)?;
    let found = survey(&subject, Progress::default(), WINDOW_CLUSTERS);
    if let Some(what) = found.beyond_refcounts() {
        let text = format!("the image is damaged: {what}; what is not used any more was not freed");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let table = mend::mend(subject, &found, Mend::all(), WINDOW_CLUSTERS)?;
    if header.version >= 3 {
        ledger::write_features(image, header.incompatible.bits())?;
    }
    let header = Header { refcount_table: table, ..header.clone() };
    let subject = Subject::load(image, &header, snapshots)?;
    let mut end = 0;
    for window in subject.windows(WINDOW_CLUSTERS) {
        let counts = subject.count(window, true)?;
        end = end.max(compare::punch_unused(&subject, &counts)?);
    }
    if image.facts().grows && end < subject.file_len {
        let fail = |e| storage_error(image, "cannot give back the end of the file", HostOffset(end), e);
        image.set_len(end).map_err(fail)?;
        ledger::sync(image)?;
    }
    Ok(())
}

fn run(image: &Arc<dyn Storage>, options: CheckOptions<'_>, window_len: u64) -> Result<CheckReport> {
    let header = Header::load(image)?;
    let (snapshots, snapshots_len) = snapshots::load(image, &header)?;
    let subject = Subject::load(image, &header, (&snapshots, snapshots_len))?;
    let progress = Progress::new(options.progress);
    let survey = survey(&subject, progress, window_len);
    let plan = survey.plan(options.repair, &header);
    let not_repaired = survey.not_repaired(options.repair, &header);
    let Some(plan) = plan else {
        return Ok(CheckReport { not_repaired, ..survey.report(&header) });
    };
    if !image.facts().writable {
        return Err(Error::new(ErrorKind::ReadOnly, "the file was opened read-only"));
    }
    mend::mend(subject, &survey, plan, window_len)?;
    let before = survey.report(&header);
    second_look(image, &header, (&snapshots, snapshots_len), progress, window_len).map(|after| CheckReport {
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        not_repaired: not_repaired.filter(|_| after.corruptions > 0),
        ..after
    })
}

/// Looks at a repaired image once more. If it is sound, it says so from now on.
fn second_look(
    image: &Arc<dyn Storage>,
    before: &Header,
    snapshots: (&[Snapshot], u64),
    progress: Progress<'_>,
    window_len: u64,
) -> Result<CheckReport> {
    let header = Header::load(image)?;
    let survey = survey(&Subject::load(image, &header, snapshots)?, progress, window_len);
    let report = survey.report(&header);
    if header.version < 3 {
        return Ok(report);
    }
    let sound = report.corruptions == 0 && report.check_errors == 0;
    let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
    let wanted = if sound { before.incompatible - marks } else { before.incompatible };
    ledger::write_features(image, wanted.bits())?;
    Ok(CheckReport {
        dirty: wanted.contains(Incompatible::DIRTY),
        corrupt: wanted.contains(Incompatible::CORRUPT),
        ..report
    })
}

/// What is checked.
pub(super) struct Subject<'a> {
    image: &'a Arc<dyn Storage>,
    header: &'a Header,
    snapshots: (&'a [Snapshot], u64),
    file_len: u64,
    /// The refcount table, without entries that cannot stay.
    table: Vec<u64>,
    /// Whether the refcount table stays where it is.
    table_stays: bool,
    threads: usize,
}

impl<'a> Subject<'a> {
    pub(super) fn load(
        image: &'a Arc<dyn Storage>,
        header: &'a Header,
        snapshots: (&'a [Snapshot], u64),
    ) -> Result<Self> {
        let fail = |e| storage_error(image, "cannot tell the file's length", HostOffset(0), e);
        let file_len = image.len().map_err(fail)?;
        let cluster_len = header.geometry.cluster_len();
        // Those that cannot be right are not followed.
        let followed = snapshots.0.iter().filter_map(|snapshot| snapshot.checked_l1(header).ok());
        let inactive = followed.map(|l1| (u64::from(l1.entries) * 8).div_ceil(cluster_len));
        if file_len.div_ceil(cluster_len) > CLUSTERS_MAX || inactive.sum::<u64>() > INACTIVE_L1_CLUSTERS_MAX {
            let text = "the file has more clusters, or longer L1 tables of snapshots, than can be checked";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let mut bytes = vec![0; header.refcount_table.entries as usize * 8];
        read_padded(image, header.refcount_table.at, &mut bytes)?;
        let table = bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        let threads = available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        Ok(Subject { image, header, snapshots, file_len, table, table_stays: true, threads })
    }

    /// Clusters of the file, of which the last may be cut off.
    fn file_clusters(&self) -> u64 {
        self.file_len.div_ceil(self.header.geometry.cluster_len())
    }

    /// How often each cluster of a window is used. Fails where that cannot be read although a survey could; and with
    /// `all` also where an entry makes no sense, for who frees what is not used.
    fn count(&self, window: Window, all: bool) -> Result<Counts> {
        let counts = Counts::new(window);
        let (tally, progress) = (Tally::default(), Progress::default());
        Walk { subject: self, counts: &counts, tally: &tally, judge: true, singles: None, progress }.run();
        let unknown = tally.count(Fault::Unreadable) > 0 || all && tally.count(Fault::BadEntry) > 0;
        if unknown { Err(unknown_use()) } else { Ok(counts) }
    }

    /// The windows for all clusters that can be in use: the file's, and one that begins at its end.
    fn windows(&self, len: u64) -> impl Iterator<Item = Window> {
        Window::all(self.file_clusters() + 1, len)
    }

    /// Where refcount block `number` lies, if it is there and can be one.
    fn block(&self, number: u64) -> Option<HostOffset> {
        let raw = *self.table.get(usize::try_from(number).ok()?)?;
        let possible = raw & TABLE_RESERVED == 0 && self.header.geometry.is_aligned(raw);
        (raw != 0 && possible && raw < self.file_len).then_some(HostOffset(raw))
    }

    /// All refcount blocks that can be such.
    fn blocks(&self) -> impl Iterator<Item = HostOffset> {
        (0..self.table.len() as u64).filter_map(|number| self.block(number))
    }

    /// Clusters that a refcount block counts.
    fn block_entries(&self) -> u64 {
        self.header.geometry.cluster_len() * 8 / u64::from(self.header.refcount_bits)
    }
}

/// What was found.
struct Survey {
    tally: Tally,
    /// Entries of the refcount table that cannot stay.
    dropped: Vec<usize>,
    /// Metadata that something else lies on, which counting cannot mend.
    overlap: Option<String>,
    /// The refcount table does not have its clusters for itself.
    table_shared: bool,
}

fn survey(subject: &Subject<'_>, progress: Progress<'_>, window_len: u64) -> Survey {
    let mut survey =
        Survey { tally: Tally::default(), dropped: Vec::new(), overlap: None, table_shared: false };
    survey.judge_blocks(subject);
    let windows = subject.windows(window_len).count();
    for (number, window) in subject.windows(window_len).enumerate() {
        let singles = Singles::new(window);
        compare::mark_singles(subject, &singles, window, &survey.tally);
        let counts = Counts::new(window);
        let progress = progress.part(number, windows);
        let tally = &survey.tally;
        Walk { subject, counts: &counts, tally, judge: number == 0, singles: Some(&singles), progress }.run();
        compare::compare(subject, &counts, tally);
        survey.judge_sharing(subject, &counts);
    }
    survey.dropped.sort_unstable();
    survey.dropped.dedup();
    survey
}

impl Survey {
    /// Finds the entries of the refcount table that cannot name a block.
    fn judge_blocks(&mut self, subject: &Subject<'_>) {
        for (number, raw) in subject.table.iter().enumerate() {
            if *raw != 0 && subject.block(number as u64).is_none() {
                let text =
                    || format!("entry {number} ({raw:#x}) of the refcount table names no refcount block");
                self.tally.fault(Fault::Structure, 1, text);
                self.dropped.push(number);
            }
        }
    }

    /// Finds metadata that does not have its clusters for itself.
    fn judge_sharing(&mut self, subject: &Subject<'_>, counts: &Counts) {
        let header = subject.header;
        let geometry = header.geometry;
        let is_shared = |index| counts.get(index) > 1;
        for number in 0..subject.table.len() {
            let Some(at) = subject.block(number as u64) else { continue };
            let used = counts.get(geometry.host_index(at));
            if used > 1 {
                let text = || format!("the refcount block at {at} is used {used} times");
                self.tally.fault(Fault::Structure, 1, text);
                self.dropped.push(number);
            }
        }
        let shared = |at: HostOffset, len: u64| {
            let (first, clusters) = geometry.host_span(at, len);
            (first.0..first.0 + clusters).map(HostIndex).find(|index| is_shared(*index))
        };
        let words = |table: TableLocation| (table.at, u64::from(table.entries) * 8);
        let (table_at, table_len) = words(header.refcount_table);
        self.table_shared |= shared(table_at, table_len).is_some();
        let (l1_at, l1_len) = words(header.l1);
        let metadata = [
            ("the header", HostOffset(0), geometry.cluster_len()),
            ("the L1 table", l1_at, l1_len),
            ("the snapshot table", header.snapshots.at, subject.snapshots.1),
        ];
        for (what, at, len) in metadata {
            if let Some(index) = if len > 0 { shared(at, len) } else { None } {
                let text =
                    format!("{what} and something else lie in {}", walk::cluster_name(geometry, index));
                self.tally.fault(Fault::Overlap, 1, || text.clone());
                self.overlap.get_or_insert(text);
            }
        }
    }

    /// What is wrong besides refcounts and copied flags, if anything is.
    fn beyond_refcounts(&self) -> Option<String> {
        let count = |fault| self.tally.count(fault);
        let shared = self.table_shared.then_some("the refcount table and something else share a cluster");
        if count(Fault::Unreadable) > 0 {
            return Some("parts of it cannot be read".to_owned());
        }
        let bad = self.tally.first_bad_entry().or_else(|| self.overlap.clone());
        let structure = || (count(Fault::Structure) > 0).then_some("a refcount block cannot be where it is");
        let too_many =
            || (count(Fault::TooMany) > 0).then_some("a cluster is used more often than can be counted");
        bad.or_else(|| structure().or_else(too_many).or(shared).map(str::to_owned))
    }

    /// What a repair is to do; `None`: nothing.
    fn plan(&self, repair: Repair, header: &Header) -> Option<Mend> {
        let count = |fault| self.tally.count(fault);
        let unknown = count(Fault::BadEntry) > 0;
        if count(Fault::Unreadable) > 0 {
            return None;
        }
        let marked = header.incompatible.intersects(Incompatible::DIRTY | Incompatible::CORRUPT);
        let wrong = [Fault::Low, Fault::Flag, Fault::Structure].into_iter().any(|fault| count(fault) > 0);
        match repair {
            Repair::Nothing => None,
            // What is in use can only be told where every entry makes sense.
            Repair::Leaks if unknown || count(Fault::Structure) + count(Fault::Low) > 0 => None,
            Repair::Leaks => (count(Fault::Leak) > 0).then_some(Mend::leaks()),
            Repair::All if unknown => wrong.then_some(Mend::careful()),
            Repair::All => (wrong || marked || count(Fault::Leak) > 0).then_some(Mend::all()),
        }
    }

    /// Why a repair that was asked for does not do all of it.
    fn not_repaired(&self, repair: Repair, header: &Header) -> Option<String> {
        let count = |fault| self.tally.count(fault);
        let bad_entry = self.tally.first_bad_entry();
        match repair {
            Repair::Nothing => None,
            Repair::Leaks | Repair::All if count(Fault::Unreadable) > 0 => {
                Some("parts of the image cannot be read; nothing was changed".to_owned())
            }
            Repair::Leaks if count(Fault::Structure) + count(Fault::Low) > 0 => {
                Some("refcounts are too low, or cannot be read where they are (--repair all)".to_owned())
            }
            Repair::Leaks if bad_entry.is_some() && count(Fault::Leak) > 0 => bad_entry.map(|entry| {
                format!("what an entry that makes no sense leads to may be in use, so no cluster was freed: {entry}")
            }),
            Repair::Leaks => None,
            Repair::All if bad_entry.is_some() => bad_entry.map(|entry| {
                format!(
                    "what an entry that makes no sense led to is not known, so no cluster was freed \
                     (copy what can be read into a new image): {entry}"
                )
            }),
            Repair::All if count(Fault::TooMany) > 0 => Some(format!(
                "a cluster is used more often than refcounts of {} bits can say (copy it into a new image)",
                header.refcount_bits
            )),
            Repair::All => self.overlap.clone().map(|what| {
                format!("{what}; which of them is right cannot be told (copy what can be read into a new image)")
            }),
        }
    }

    fn report(&self, header: &Header) -> CheckReport {
        let clusters = header.virtual_size.div_ceil(header.geometry.cluster_len());
        let report = self.tally.report(clusters);
        CheckReport {
            dirty: header.incompatible.contains(Incompatible::DIRTY),
            corrupt: header.incompatible.contains(Incompatible::CORRUPT),
            ..report
        }
    }
}

/// The error where something that was readable before, or has to be, is not.
fn unknown_use() -> Error {
    let text = "parts of the image's tables cannot be read, so nobody knows which clusters are in use";
    Error::new(ErrorKind::Io, text)
}

/// Who is told how far a check is, and which part of it is under way.
#[derive(Clone, Copy, Default)]
struct Progress<'a> {
    tell: Option<&'a (dyn Fn(u32) + Sync)>,
    part: usize,
    parts: usize,
}

impl<'a> Progress<'a> {
    fn new(tell: Option<&'a (dyn Fn(u32) + Sync)>) -> Self {
        Progress { tell, part: 0, parts: 1 }
    }

    fn part(self, part: usize, parts: usize) -> Self {
        Progress { part, parts, ..self }
    }

    /// `done` of `all` steps of this part are done.
    fn tell(&self, done: usize, all: usize) {
        if let Some(tell) = self.tell {
            let within = 1000 * done.min(all) / all.max(1);
            tell(u32::try_from((self.part * 1000 + within) / self.parts.max(1)).unwrap_or(1000));
        }
    }
}

/// Fills `buf` from `at`; behind the end of the file there are zeroes.
fn read_padded(image: &Arc<dyn Storage>, at: HostOffset, buf: &mut [u8]) -> Result<()> {
    let got = image.pread(buf, at).map_err(|e| storage_error(image, "cannot read", at, e))?;
    buf.get_mut(got..).unwrap_or_default().fill(0);
    Ok(())
}
