//! Making refcounts right, in an order that a crash at any moment does not make worse.
//!
//! The dirty bit is set first, where the format has it, so that whoever opens the image after a crash knows
//! that refcounts may be wrong. Then refcounts and new blocks are written and durable before anything leads
//! to the blocks, and copied flags come last. The bit is cleared by the caller, when all is durable.

use super::counts::{Counts, Window};
use super::report::Tally;
use super::walk::Walk;
use super::{Progress, Subject, Survey, flags};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::qcow2::header::{Autoclear, Header, Incompatible, TableLocation};
use crate::qcow2::types::HostIndex;
use crate::qcow2::write::allocator::{Allocator, Need, Space};
use crate::qcow2::write::metadata_map::MetadataMap;
use crate::qcow2::write::refcounts::{BlockIndex, Refcounts};
use crate::qcow2::write::{AUTOCLEAR_AT, INCOMPATIBLE_AT, commit};
use crate::storage::{Durability, Storage};
use crate::sync::Arc;

/// Bytes of changed refcounts in memory at which they are written. Our choice.
const DIRTY_LEN_MAX: u64 = 4 << 20;

/// What is made right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mend {
    /// Refcounts that are too high: only where it is known of every cluster whether it is in use.
    lower: bool,
    /// Refcounts that are too low, blocks that cannot stay, and copied flags that must not be set.
    raise: bool,
}

impl Mend {
    /// Everything.
    pub fn all() -> Self {
        Mend { lower: true, raise: true }
    }

    /// Leaks.
    pub fn leaks() -> Self {
        Mend { lower: true, raise: false }
    }

    /// What cannot be wrong although it is not known what is in use.
    pub fn careful() -> Self {
        Mend { lower: false, raise: true }
    }
}

/// Makes refcounts and copied flags right. Returns where the refcount table is afterwards.
pub fn mend(mut subject: Subject<'_>, survey: &Survey, what: Mend, window_len: u64) -> Result<TableLocation> {
    let (image, header) = (subject.image, subject.header);
    begin(image, header)?;
    let refcounts = Refcounts::new(
        header.geometry,
        header.refcount_bits,
        subject.table.clone(),
        header.refcount_table.at,
    );
    let space = space(&subject, survey);
    let mut mender = Mender {
        image,
        allocator: Allocator::new(header.geometry, refcounts, MetadataMap::new(header.geometry), space),
        what,
        dropped: Vec::new(),
    };
    if what.raise {
        mender.drop_structure(&mut subject, survey)?;
    }
    for window in subject.windows(window_len).collect::<Vec<_>>() {
        mender.window(&subject, window)?;
    }
    mender.behind(&subject)?;
    mender.leave_tables(subject.table_stays)?;
    let table = mender.write_out()?;
    let snapshots = subject.snapshots;
    let header = Header { refcount_table: table, ..header.clone() };
    flags::mend(&Subject::load(image, &header, snapshots)?, what.lower, what.raise, window_len)?;
    Ok(table)
}

/// Where new clusters may come from: behind everything that is used, and in a file behind all that is there.
fn space(subject: &Subject<'_>, survey: &Survey) -> Space {
    let cluster_len = subject.header.geometry.cluster_len();
    let used = survey.tally.in_use_end().div_ceil(cluster_len);
    if subject.image.facts().grows {
        let end = HostIndex(subject.file_clusters().max(used));
        return Space::new(end, end, false);
    }
    let end = subject.file_len / cluster_len;
    Space::new(HostIndex(used.min(end)), HostIndex(end), false)
}

/// Sets the incompatible features in the header, durably.
pub fn write_features(image: &Arc<dyn Storage>, bits: u64) -> Result<()> {
    write(image, INCOMPATIBLE_AT, &bits.to_be_bytes())?;
    sync(image)
}

/// Writes metadata.
pub fn write(image: &Arc<dyn Storage>, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let written = image.pwrite(bytes, at, Durability::Later);
    written.map_err(|e| storage_error(image, "cannot write the image's metadata", at, e))
}

/// Makes what was written durable.
pub fn sync(image: &Arc<dyn Storage>) -> Result<()> {
    image.sync().map_err(|e| storage_error(image, "cannot make the image durable", HostOffset(0), e))
}

/// Says in the header that refcounts may be wrong, and takes back the promise of features whose clusters
/// nobody here knows.
fn begin(image: &Arc<dyn Storage>, header: &Header) -> Result<()> {
    if header.version < 3 {
        return Ok(());
    }
    let known = header.autoclear & (Autoclear::BITMAPS | Autoclear::DATA_FILE_RAW);
    if known != header.autoclear {
        write(image, AUTOCLEAR_AT, &known.bits().to_be_bytes())?;
    }
    write_features(image, (header.incompatible | Incompatible::DIRTY).bits())
}

struct Mender<'a> {
    image: &'a Arc<dyn Storage>,
    /// Its map knows of the new clusters only: they are the only ones that are handed out.
    allocator: Allocator,
    what: Mend,
    /// Blocks whose place was not theirs.
    dropped: Vec<usize>,
}

impl Mender<'_> {
    /// Leaves blocks and a table that cannot stay where they are.
    fn drop_structure(&mut self, subject: &mut Subject<'_>, survey: &Survey) -> Result<()> {
        for number in &survey.dropped {
            self.allocator.refcounts.forget(BlockIndex(*number));
            if let Some(entry) = subject.table.get_mut(*number) {
                *entry = 0;
            }
        }
        self.dropped.clone_from(&survey.dropped);
        if survey.table_shared {
            subject.table_stays = false;
            self.with_room(Allocator::relocate_table)?;
        }
        Ok(())
    }

    /// Sets the refcounts of a window.
    fn window(&mut self, subject: &Subject<'_>, window: Window) -> Result<()> {
        let counts = Counts::new(window);
        // Whoever made the survey has heard of all faults.
        let tally = Tally::default();
        let progress = Progress::default();
        Walk { subject, counts: &counts, tally: &tally, judge: false, singles: None, progress }.run();
        let entries = subject.block_entries();
        let mut from = window.first;
        while from < window.end {
            let to = ((from / entries + 1) * entries).min(window.end);
            self.stretch(from, to, &counts)?;
            if self.allocator.refcounts.dirty_len() > DIRTY_LEN_MAX {
                self.write_blocks()?;
            }
            from = to;
        }
        Ok(())
    }

    /// Frees what is counted behind the end of the file: nothing is there.
    fn behind(&mut self, subject: &Subject<'_>) -> Result<()> {
        let nothing = Counts::new(Window { first: 0, end: 0 });
        let (entries, end) = (subject.block_entries(), subject.file_clusters() + 1);
        for number in
            (end / entries..subject.table.len() as u64).filter(|number| subject.block(*number).is_some())
        {
            self.stretch((number * entries).max(end), (number + 1) * entries, &nothing)?;
            if self.allocator.refcounts.dirty_len() > DIRTY_LEN_MAX {
                self.write_blocks()?;
            }
        }
        Ok(())
    }

    /// Sets the refcounts of clusters that one block counts.
    fn stretch(&mut self, from: u64, to: u64, counts: &Counts) -> Result<()> {
        let block = self.allocator.refcounts.block_of(HostIndex(from));
        let max = self.allocator.refcounts.max();
        // Of a block that is made anew nobody knows what it has counted for entries that make no sense.
        let dropped = !self.what.lower && self.dropped.binary_search(&block.0).is_ok();
        let least = u64::from(dropped);
        let first_used = (from..to).find(|index| counts.get(HostIndex(*index)).max(least) > 0);
        match self.allocator.refcounts.block_at(block).map_err(|need| self.unmet(need))? {
            Some(_) => {}
            None => match first_used {
                Some(index) => self.with_room(|allocator| allocator.describe(HostIndex(index)))?,
                None => return Ok(()),
            },
        }
        for index in (from..to).map(HostIndex) {
            if self.allocator.map.kind(index).is_some() {
                continue;
            }
            let used = counts.get(index).max(least).min(max);
            let what = self.what;
            self.with_room(|allocator| {
                let is = allocator.refcounts.get(index)?;
                let wrong = is < used && what.raise || is > used && what.lower;
                if wrong { allocator.refcounts.set(index, used) } else { Ok(()) }
            })?;
        }
        Ok(())
    }

    /// Frees the places of refcount tables that were moved away from.
    fn leave_tables(&mut self, table_was_counted: bool) -> Result<()> {
        let left = std::mem::take(&mut self.allocator.left);
        // The one in the file was counted as in use, unless it was to go from the beginning.
        let counted = left.into_iter().skip(usize::from(!table_was_counted));
        for index in counted.flat_map(|(first, len)| first.0..first.0 + len).map(HostIndex) {
            self.with_room(|allocator| {
                let is = allocator.refcounts.get(index)?;
                allocator.refcounts.set(index, is.saturating_sub(1))
            })?;
        }
        Ok(())
    }

    /// Does something that may need a longer file, or a block in memory.
    fn with_room(
        &mut self,
        mut act: impl FnMut(&mut Allocator) -> std::result::Result<(), Need>,
    ) -> Result<()> {
        loop {
            match act(&mut self.allocator) {
                Ok(()) => return Ok(()),
                Err(Need::Block(block)) => self.load(block)?,
                Err(Need::Room(clusters)) if self.image.facts().grows => self.grow(clusters)?,
                Err(need) => return Err(self.unmet(need)),
            }
        }
    }

    fn load(&mut self, block: BlockIndex) -> Result<()> {
        let at = self.allocator.refcounts.block_at(block).map_err(|need| self.unmet(need))?;
        let Some(at) = at else { return Ok(()) };
        let mut bytes = vec![0; usize::try_from(self.allocator.geometry().cluster_len()).unwrap_or(0)];
        super::read_padded(self.image, at, &mut bytes)?;
        self.allocator.refcounts.insert(block, bytes);
        Ok(())
    }

    fn grow(&mut self, clusters: u64) -> Result<()> {
        let end = HostIndex(self.allocator.space.fresh().0 + clusters + 1);
        let len = self.allocator.geometry().host_at(end).start().0;
        let fail = |e| storage_error(self.image, "cannot make the file longer", HostOffset(len), e);
        if self.image.len().map_err(fail)? < len {
            self.image.set_len(len).map_err(fail)?;
        }
        self.allocator.space.extend_to(end);
        Ok(())
    }

    fn write_blocks(&mut self) -> Result<()> {
        let writes = self.allocator.refcounts.freeze_blocks();
        for block in &writes {
            write(self.image, block.at, &block.bytes)?;
        }
        self.allocator.refcounts.written(&writes);
        Ok(())
    }

    /// Writes all that is not in the file yet: first what is led to, then what leads there.
    fn write_out(&mut self) -> Result<TableLocation> {
        self.write_blocks()?;
        let at = self.allocator.refcounts.table_at();
        if self.allocator.moved.is_some() {
            write(self.image, at, &self.allocator.refcounts.table_bytes())?;
        }
        sync(self.image)?;
        for (index, raw) in self.allocator.refcounts.freeze_entries() {
            write(self.image, HostOffset(at.0 + index as u64 * 8), &raw.to_be_bytes())?;
        }
        if let Some(moved) = self.allocator.moved {
            commit::write_table_pointer(self.image, at, moved.clusters)?;
        }
        sync(self.image)?;
        let entries = u32::try_from(self.allocator.refcounts.table_len())
            .map_err(|_| self.unmet(Need::Fault("the refcount table is too large")))?;
        Ok(TableLocation { at, entries })
    }

    fn unmet(&self, need: Need) -> Error {
        let error = match need {
            Need::Room(_) | Need::NoSpace => {
                Error::new(ErrorKind::NoSpace, "there is no room for the refcount blocks that a repair needs")
            }
            Need::Fault(what) => Error::new(ErrorKind::Corrupt, format!("the repair has failed: {what}")),
            Need::Block(_) => {
                Error::new(ErrorKind::Corrupt, "the repair has failed: a refcount block is missing")
            }
        };
        error.with_path(&self.image.facts().path)
    }
}
