//! Making copied flags right: set exactly where the refcount is 1.

use std::collections::HashSet;

use super::counts::Singles;
use super::report::{Fault, Tally};
use super::{Subject, compare, ledger, read_padded, unknown_use};
use crate::address::HostOffset;
use crate::error::Result;
use crate::qcow2::types::{DataFile, Geometry};

/// Entries of an L1 table that are read at once. Our choice.
const CHUNK_ENTRIES: u64 = 8192;
/// Most tables that are remembered as done. Our choice; one that is forgotten is looked at again.
const DONE_MAX: usize = 1 << 18;

/// Sets flags that are missing, and clears those that must not be set, as told; then all is durable.
pub fn mend(subject: &Subject<'_>, set: bool, clear: bool, window_len: u64) -> Result<()> {
    for window in subject.windows(window_len) {
        let singles = Singles::new(window);
        let tally = Tally::default();
        compare::mark_singles(subject, &singles, window, &tally);
        if tally.count(Fault::Unreadable) > 0 {
            return Err(unknown_use());
        }
        Flags { subject, singles, set, clear }.tables()?;
    }
    ledger::sync(subject.image)
}

struct Flags<'a> {
    subject: &'a Subject<'a>,
    singles: Singles,
    set: bool,
    clear: bool,
}

impl Flags<'_> {
    /// The active L1 table and what it leads to.
    fn tables(&self) -> Result<()> {
        let l1 = self.subject.header.l1;
        let mut done = HashSet::new();
        let mut bytes = vec![0; usize::try_from(self.geometry().cluster_len()).unwrap_or(0)];
        let mut from = 0;
        while from < u64::from(l1.entries) {
            let entries = CHUNK_ENTRIES.min(u64::from(l1.entries) - from);
            let mut chunk = vec![0; usize::try_from(entries * 8).unwrap_or(0)];
            self.table(HostOffset(l1.at.0 + from * 8), &mut chunk, 1, |raw| self.l1_entry(raw))?;
            for raw in chunk.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)) {
                let at = self.geometry().offset_in(raw);
                if at.0 == 0 || !self.geometry().is_aligned(at.0) || !done.insert(at) {
                    continue;
                }
                self.table(at, &mut bytes, self.geometry().entry_words(), |raw| self.l2_entry(raw))?;
                if done.len() >= DONE_MAX {
                    done.clear();
                }
            }
            from += entries;
        }
        Ok(())
    }

    /// Reads a table into `bytes` and writes back what has to change.
    fn table(
        &self,
        at: HostOffset,
        bytes: &mut [u8],
        entry_words: usize,
        right: impl Fn(u64) -> u64,
    ) -> Result<()> {
        read_padded(self.subject.image, at, bytes)?;
        let mut changed: Option<(usize, usize)> = None;
        for (number, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate().step_by(entry_words) {
            let raw = u64::from_be_bytes(*word);
            if right(raw) != raw {
                *word = right(raw).to_be_bytes();
                changed = Some((changed.map_or(number, |(first, _)| first), number + 1));
            }
        }
        let Some((first, end)) = changed else { return Ok(()) };
        let part = bytes.get(first * 8..end * 8).unwrap_or_default();
        ledger::write(self.subject.image, HostOffset(at.0 + first as u64 * 8), part)
    }

    fn l1_entry(&self, raw: u64) -> u64 {
        let at = self.geometry().offset_in(raw);
        if at.0 == 0 { raw } else { self.decided(raw, self.singles.get(self.geometry().host_index(at))) }
    }

    fn l2_entry(&self, raw: u64) -> u64 {
        let Some(host) = self.geometry().host_of(raw) else {
            // Either nothing, which a flag in a data file's entry is not, or compressed.
            let compressed = self.geometry().is_compressed(raw);
            return if compressed && self.clear { self.geometry().with_owned(raw, false) } else { raw };
        };
        let single = match self.geometry().data_file() {
            DataFile::Internal => self.singles.get(self.geometry().host_index(host)),
            // Nobody counts the clusters of a data file.
            DataFile::External | DataFile::ExternalRaw => Some(true),
        };
        self.decided(raw, single)
    }

    fn decided(&self, raw: u64, single: Option<bool>) -> u64 {
        match single {
            Some(true) if self.set => self.geometry().with_owned(raw, true),
            Some(false) if self.clear => self.geometry().with_owned(raw, false),
            Some(_) | None => raw,
        }
    }

    fn geometry(&self) -> Geometry {
        self.subject.header.geometry
    }
}
