//! Making refcounts right, in an order that a crash at any moment does not make worse.
//!
//! The dirty bit is set first, where the format has it, so that whoever opens the image after a crash knows
//! that refcounts may be wrong. Then refcounts and new blocks are written and durable before anything leads
//! to the blocks, and copied flags come last. The bit is cleared by the caller, when all is durable.

use super::counts::{Counts, Window};
use super::ledger::{Ledger, clear_unknown, write_features};
use super::{Subject, Survey, flags};
use crate::error::Result;
use crate::qcow2::header::{Header, Incompatible, TableLocation};
use crate::qcow2::types::HostIndex;
use crate::qcow2::write::allocator::Allocator;
use crate::qcow2::write::refcounts::BlockIndex;
use crate::storage::Storage;
use crate::sync::Arc;

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
    let ledger = Ledger::new(&subject, survey.tally.in_use_end());
    let mut mender = Mender { ledger, what, dropped: Vec::new() };
    if what.raise {
        mender.drop_structure(&mut subject, survey)?;
    }
    for window in subject.windows(window_len).collect::<Vec<_>>() {
        mender.window(&subject, window)?;
    }
    mender.behind(&subject)?;
    mender.ledger.leave_tables(subject.table_stays)?;
    let table = mender.ledger.write_out()?;
    let snapshots = subject.snapshots;
    let header = Header { refcount_table: table, ..header.clone() };
    flags::mend(&Subject::load(image, &header, snapshots)?, what.lower, what.raise, window_len)?;
    Ok(table)
}

/// Says in the header that refcounts may be wrong.
fn begin(image: &Arc<dyn Storage>, header: &Header) -> Result<()> {
    if header.version < 3 {
        return Ok(());
    }
    clear_unknown(image, header)?;
    write_features(image, (header.incompatible | Incompatible::DIRTY).bits())
}

struct Mender<'a> {
    ledger: Ledger<'a>,
    what: Mend,
    /// Blocks whose place was not theirs.
    dropped: Vec<usize>,
}

impl Mender<'_> {
    /// Leaves blocks and a table that cannot stay where they are.
    fn drop_structure(&mut self, subject: &mut Subject<'_>, survey: &Survey) -> Result<()> {
        for number in &survey.dropped {
            self.ledger.allocator.refcounts.forget(BlockIndex(*number));
            if let Some(entry) = subject.table.get_mut(*number) {
                *entry = 0;
            }
        }
        self.dropped.clone_from(&survey.dropped);
        if survey.table_shared {
            subject.table_stays = false;
            self.ledger.with_room(Allocator::relocate_table)?;
        }
        Ok(())
    }

    /// Sets the refcounts of a window.
    fn window(&mut self, subject: &Subject<'_>, window: Window) -> Result<()> {
        let counts = subject.count(window, self.what.lower)?;
        let entries = subject.block_entries();
        let mut from = window.first;
        while from < window.end {
            let to = ((from / entries + 1) * entries).min(window.end);
            self.stretch(from, to, &counts)?;
            self.ledger.relieve()?;
            from = to;
        }
        Ok(())
    }

    /// Frees what is counted behind the end of the file: nothing is there.
    fn behind(&mut self, subject: &Subject<'_>) -> Result<()> {
        let nothing = Counts::new(Window { first: 0, end: 0 });
        let (entries, end) = (subject.block_entries(), subject.file_clusters() + 1);
        for number in end / entries..subject.table.len() as u64 {
            if subject.block(number).is_none() {
                continue;
            }
            // A table may name any number of blocks, and one of holes is free of charge to whoever makes the file.
            if !self.ledger.is_empty(self.ledger.allocator.refcounts.block_of(HostIndex(number * entries)))? {
                self.stretch((number * entries).max(end), (number + 1) * entries, &nothing)?;
            }
            self.ledger.relieve()?;
        }
        Ok(())
    }

    /// Sets the refcounts of clusters that one block counts.
    fn stretch(&mut self, from: u64, to: u64, counts: &Counts) -> Result<()> {
        let block = self.ledger.allocator.refcounts.block_of(HostIndex(from));
        let max = self.ledger.allocator.refcounts.max();
        // Of a block that is made anew nobody knows what it has counted for entries that make no sense.
        let dropped = !self.what.lower && self.dropped.binary_search(&block.0).is_ok();
        let least = u64::from(dropped);
        let first_used = (from..to).find(|index| counts.get(HostIndex(*index)).max(least) > 0);
        match self.ledger.allocator.refcounts.block_at(block).map_err(|need| self.ledger.unmet(need))? {
            Some(_) => {}
            None => match first_used {
                Some(index) => self.ledger.with_room(|allocator| allocator.describe(HostIndex(index)))?,
                None => return Ok(()),
            },
        }
        for index in (from..to).map(HostIndex) {
            if self.ledger.allocator.map.kind(index).is_some() {
                continue;
            }
            let used = counts.get(index).max(least).min(max);
            let what = self.what;
            self.ledger.with_room(|allocator| {
                let is = allocator.refcounts.get(index)?;
                let wrong = is < used && what.raise || is > used && what.lower;
                if wrong { allocator.refcounts.set(index, used) } else { Ok(()) }
            })?;
        }
        Ok(())
    }
}
