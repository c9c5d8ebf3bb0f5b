//! [`Log`] and [`RecordingStorage`]: what an image did to its files, and what a crash at any moment may
//! have left of it.
//!
//! One log serves all files of an image, so that the order between them is kept. A record is made when
//! its change begins. What counts as durable is only what the rules of [`Storage`] promise: a change is
//! durable once a sync that began after it had ended has succeeded, or when it was itself a FUA write.
//! Every other change may be there, be missing or be there in part, in any combination. For changes to
//! different bytes that is all that reordering can do; of two unsynced changes to the same bytes the
//! later one goes over the earlier one, unless it is lost.

use std::io;

use super::sparse::SparseBytes;
use super::{Durability, Operation, POISON, Queue, Run, Storage, StorageFacts, TryRead, engine};
use crate::address::{HostOffset, HostRange};
use crate::storage::Provision;
use crate::sync::{Arc, Mutex};

/// The unit that reaches a disk whole or not at all: the smallest sector of disks in use.
const SECTOR_LEN: u64 = 512;

/// Which file of a log, counted from 0 in the order in which they were attached.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(pub usize);

/// What was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Where.
        at: HostOffset,
        /// What.
        bytes: Arc<[u8]>,
        /// Whether the write itself was to be durable.
        durability: Durability,
    },
    /// A range was made to read as zeroes.
    Zero {
        /// Which range.
        range: HostRange,
        /// Whether the file may have become longer by it.
        grows: bool,
    },
    /// A range was given back; it reads as `byte` afterwards.
    Discard {
        /// Which range.
        range: HostRange,
        /// Zero, or poison where nothing is promised.
        byte: u8,
    },
    /// The file was cut off or made longer.
    SetLen(u64),
    /// Everything of the file that had ended before was made durable.
    Sync,
    /// Said by a test: something happened above.
    Mark(String),
}

/// One entry of a log.
#[derive(Clone, Debug)]
pub struct Record {
    /// The file it is about; marks carry the first one.
    pub file: FileId,
    /// What was done.
    pub change: Change,
    /// How many records the log had when it ended. `None`: it is under way, or it failed and nobody
    /// knows how far it came.
    pub ended: Option<usize>,
    /// When it was done, in an order of all changes, beside how many records the log had then. Of changes of one place at
    /// the same time the last one done holds, whichever began first.
    done: Option<(usize, u64)>,
}

/// What became of an unsynced change in a crash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// All of it is there.
    Kept,
    /// Nothing of it is.
    Lost,
    /// Its first sectors are there, this many. Changes of the length are not torn: lost.
    Prefix(u64),
    /// Each sector is there or not, chosen by the seed. Changes of the length are not torn: kept.
    Scattered(u64),
}

/// What the files of an image went through. Records count from 0; a cut `c` is the moment at which
/// the records below `c` had begun and no other.
#[derive(Default)]
pub struct Log {
    state: Mutex<LogState>,
    /// How many changes have been done; held while one is.
    doing: Mutex<u64>,
}

#[derive(Default)]
struct LogState {
    files: Vec<SparseBytes>,
    records: Vec<Record>,
    /// The last one that was done.
    last_done: usize,
    /// Whether any was done after one that had begun later.
    mixed: bool,
}

impl Log {
    /// A log without files.
    pub fn new() -> Arc<Log> {
        Arc::new(Log::default())
    }

    /// `inner`, whose changes are written down from now on. What it holds now counts as durable.
    pub fn attach(self: &Arc<Self>, inner: Arc<dyn Storage>) -> io::Result<Arc<RecordingStorage>> {
        let content = SparseBytes::load(&*inner)?;
        let mut state = self.state.lock();
        let file = FileId(state.files.len());
        state.files.push(content);
        Ok(Arc::new(RecordingStorage { inner, file, log: Arc::clone(self) }))
    }

    /// Notes that something happened above: a flush was answered, a step of a test began.
    pub fn mark(&self, text: impl Into<String>) {
        let mut state = self.state.lock();
        let ended = Some(state.records.len() + 1);
        state.records.push(Record { file: FileId(0), change: Change::Mark(text.into()), ended, done: None });
    }

    /// How many records there are: the last cut.
    pub fn len(&self) -> usize {
        self.state.lock().records.len()
    }

    /// Whether nothing has happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy of all records.
    pub fn records(&self) -> Vec<Record> {
        self.state.lock().records.clone()
    }

    /// The file at `cut`, with every change that had begun.
    pub fn replay(&self, file: FileId, cut: usize) -> SparseBytes {
        self.after_crash(file, cut, |_, _| Fate::Kept)
    }

    /// The changes to all files that a crash at `cut` may have lost: their numbers, in order.
    pub fn unsynced(&self, cut: usize) -> Vec<usize> {
        let state = self.state.lock();
        let covered = state.synced_up_to(cut);
        let records = state.records.iter().enumerate().take(cut);
        records.filter(|(_, record)| record.may_be_lost(cut, &covered)).map(|(index, _)| index).collect()
    }

    /// The file after a crash at `cut`. `fate` is asked for every unsynced change of this file.
    pub fn after_crash(
        &self,
        file: FileId,
        cut: usize,
        mut fate: impl FnMut(usize, &Record) -> Fate,
    ) -> SparseBytes {
        let state = self.state.lock();
        let covered = state.synced_up_to(cut);
        let mut content = state.files.get(file.0).cloned().unwrap_or_default();
        let change = |(index, record): (usize, &Record)| {
            let lost = record.may_be_lost(cut, &covered);
            apply(&mut content, &record.change, if lost { fate(index, record) } else { Fate::Kept });
        };
        let of_file = state.records.iter().enumerate().take(cut).filter(|(_, record)| record.file == file);
        if state.mixed {
            let mut in_order: Vec<_> = of_file.collect();
            in_order.sort_by_key(|(_, record)| {
                record.done.filter(|(at, _)| *at <= cut).unwrap_or((usize::MAX, 0))
            });
            in_order.into_iter().for_each(change);
        } else {
            of_file.for_each(change);
        }
        content
    }

    fn begin(&self, file: FileId, change: Change) -> usize {
        let mut state = self.state.lock();
        state.records.push(Record { file, change, ended: None, done: None });
        state.records.len() - 1
    }

    /// Does a change, one at a time, so that their order is known.
    fn change<T>(&self, index: usize, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let mut doing = self.doing.lock();
        let result = call();
        *doing += 1;
        let mut state = self.state.lock();
        state.mixed |= index < state.last_done;
        state.last_done = index;
        let done = Some((state.records.len(), *doing));
        if let Some(record) = state.records.get_mut(index) {
            record.done = done;
        }
        result
    }

    fn end<T>(&self, index: usize, result: io::Result<T>) -> io::Result<T> {
        let mut state = self.state.lock();
        let now = state.records.len();
        let Some(record) = state.records.get_mut(index) else { return result };
        match &result {
            Ok(_) => record.ended = Some(now),
            // The one error that promises that nothing has changed: a zeroing that would not be fast.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                record.change = Change::Mark("refused: not supported".to_owned());
            }
            Err(_) => {}
        }
        result
    }
}

impl LogState {
    /// For each file, the number of the last sync that had succeeded at `cut`: it covers what had ended
    /// when it began.
    fn synced_up_to(&self, cut: usize) -> Vec<usize> {
        let mut covered = vec![0; self.files.len()];
        for (number, record) in self.records.iter().enumerate().take(cut) {
            if record.change == Change::Sync
                && record.ended.is_some_and(|ended| ended <= cut)
                && let Some(covered) = covered.get_mut(record.file.0)
            {
                *covered = number;
            }
        }
        covered
    }
}

impl Record {
    /// Whether a crash at `cut` may undo it, `covered` being the last good sync of its file.
    fn may_be_lost(&self, cut: usize, covered: &[usize]) -> bool {
        let Some(ended) = self.ended.filter(|ended| *ended <= cut) else {
            return !matches!(self.change, Change::Sync | Change::Mark(_));
        };
        match self.change {
            Change::Sync | Change::Mark(_) => false,
            Change::Write { durability: Durability::Fua, .. } => false,
            Change::Write { durability: Durability::Later, .. }
            | Change::Zero { .. }
            | Change::Discard { .. }
            | Change::SetLen(_) => covered.get(self.file.0).is_none_or(|covered| *covered < ended),
        }
    }
}

/// Does a change, or what its fate left of it.
fn apply(content: &mut SparseBytes, change: &Change, fate: Fate) {
    match change {
        Change::Write { at, bytes, durability: _ } => {
            for (from, len) in surviving(at.0, bytes.len() as u64, fate) {
                let (Ok(start), Ok(len)) = (usize::try_from(from - at.0), usize::try_from(len)) else {
                    continue;
                };
                content.write(bytes.get(start..start + len).unwrap_or_default(), from);
            }
        }
        Change::Zero { range, grows } => {
            for (from, len) in surviving(range.at().0, range.len(), fate) {
                if *grows && content.len() < from + len {
                    content.set_len(from + len);
                }
                content.fill(from, len, 0);
            }
        }
        Change::Discard { range, byte } => {
            for (from, len) in surviving(range.at().0, range.len(), fate) {
                content.fill(from, len, *byte);
            }
        }
        Change::SetLen(len) => match fate {
            Fate::Kept | Fate::Scattered(_) => content.set_len(*len),
            Fate::Lost | Fate::Prefix(_) => {}
        },
        Change::Sync | Change::Mark(_) => {}
    }
}

/// The parts of a range that its fate left.
fn surviving(at: u64, len: u64, fate: Fate) -> Vec<(u64, u64)> {
    let end = at.saturating_add(len);
    let first = at / SECTOR_LEN;
    let sectors = end.div_ceil(SECTOR_LEN).saturating_sub(first);
    let part = |sector: u64| {
        let start = at.max(sector * SECTOR_LEN);
        (start, end.min((sector + 1) * SECTOR_LEN) - start)
    };
    match fate {
        Fate::Kept => vec![(at, len)],
        Fate::Lost => Vec::new(),
        Fate::Prefix(count) => (first..first + count.min(sectors)).map(part).collect(),
        Fate::Scattered(seed) => {
            (first..first + sectors).filter(|sector| scatter(seed ^ sector) & 1 == 1).map(part).collect()
        }
    }
}

/// A well mixed number (SplitMix64's finalizer).
fn scatter(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A storage whose changes go into a [`Log`]. It behaves as the one inside.
pub struct RecordingStorage {
    inner: Arc<dyn Storage>,
    file: FileId,
    log: Arc<Log>,
}

impl RecordingStorage {
    /// Which file of the log it is.
    pub fn file(&self) -> FileId {
        self.file
    }

    fn record<T>(&self, change: Change, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let index = self.log.begin(self.file, change);
        self.log.end(index, self.log.change(index, call))
    }
}

impl Storage for RecordingStorage {
    fn facts(&self) -> &StorageFacts {
        self.inner.facts()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.inner.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        self.inner.pread(buf, at)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.inner.try_pread(buf, at)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        self.record(Change::Write { at, bytes: buf.into(), durability }, || {
            self.inner.pwrite(buf, at, durability)
        })
    }

    fn sync(&self) -> io::Result<()> {
        let index = self.log.begin(self.file, Change::Sync);
        self.log.end(index, self.inner.sync())
    }

    fn is_failed(&self) -> bool {
        self.inner.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        let grows = provision == Provision::Allocate && self.facts().grows;
        self.record(Change::Zero { range, grows }, || self.inner.zero(range, provision, fast))
    }

    /// Not recorded: it changes no byte and no length.
    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        self.inner.reserve(range)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        let byte = if self.facts().new_space_is_zero { 0 } else { POISON };
        self.record(Change::Discard { range, byte }, || self.inner.discard(range))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Change::SetLen(len), || self.inner.set_len(len))
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        self.inner.run_at(at)
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        self.inner.prefetch(range)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        // Not to the one inside: the end of each operation has to be seen here.
        engine::submit(&self, operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn of_two_at_the_same_time_the_last_one_done_holds() {
        let log = Log::new();
        let file = log.attach(MemoryStorage::new(1024).unwrap()).unwrap();
        let write = |byte| Change::Write {
            at: HostOffset(0),
            bytes: [byte; 512].as_slice().into(),
            durability: Durability::Later,
        };
        let first = log.begin(file.file(), write(1));
        let second = log.begin(file.file(), write(2));
        for (index, byte) in [(second, 2), (first, 1)] {
            let call = || file.inner.pwrite(&[byte; 512], HostOffset(0), Durability::Later);
            log.end(index, log.change(index, call)).unwrap();
        }
        file.sync().unwrap();
        let held = |content: &SparseBytes| {
            let mut byte = [0];
            content.read(&mut byte, 0);
            byte[0]
        };
        let now = SparseBytes::load(&*file.inner).unwrap();
        assert_eq!((held(&now), held(&log.replay(file.file(), log.len()))), (1, 1));
        assert_eq!(held(&log.after_crash(file.file(), log.len(), |_, _| Fate::Lost)), 1);
    }
}
