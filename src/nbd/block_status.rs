//! Extents of one BLOCK_STATUS chunk, built out of the runs that a driver finds. Pure arithmetic: no I/O.
//!
//! The rules (BLOCK_STATUS in the protocol): neighbours of equal flags are one extent; extents lie back to back
//! from the request's offset; all but the last end within the request; the last may run past it but never past the
//! end of the export, nor past the request when REQ_ONE was asked; an extent is not empty, and fits 32 bits unless
//! extended headers were agreed;
//! extents end at multiples of the minimum block size except at the end of the export. The protocol would have
//! multiples of 512 "where possible"; drivers give them, save for the padding behind a file of an odd size, which
//! readers can then know to be zero to the byte, as with QEMU.

use super::reply::ReplyForm;
use super::request::{CommandFlags, Request, SessionRules};

/// Most extents in one chunk. The protocol's limit is 2^20; our choice is QEMU's, which keeps a chunk at 1 MiB, or
/// 2 MiB with extended headers.
pub const EXTENTS_MAX: usize = 128 * 1024;

/// An extent that has to be cut to fit 32 bits ends at a multiple of this, the largest minimum block size that the
/// protocol permits.
const CUT_UNIT: u64 = 64 * 1024;

/// One extent of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length, never 0.
    pub len: u64,
    /// Flags, by the context.
    pub flags: u32,
}

/// Whether the builder can use more runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Push the next run.
    More,
    /// The answer is complete; what is pushed now is ignored.
    Full,
}

/// Builds the extents of one context. Feed it the runs from the request's offset on, back to back, until it is
/// [`Progress::Full`] or there are no more, then take the extents with [`Builder::finish`].
///
/// Where a run ends inside a block, the block gets the flags that both its runs have: with `base:allocation` a
/// clear bit is always a safe answer. Of a dirty bitmap it gets the flags that one of them has.
#[derive(Clone, Debug)]
pub struct Builder {
    /// Offset of the request, and of the first extent.
    start: u64,
    /// Where the next run starts; `start <= position <= size`.
    position: u64,
    /// End of the request; `start <= end <= size`.
    end: u64,
    size: u64,
    /// Longest extent.
    len_max: u64,
    /// Extents end at multiples of this power of two.
    unit: u64,
    req_one: bool,
    extents_max: usize,
    /// Ends of the extents so far, and their flags.
    extents: Vec<(u64, u32)>,
    /// The flags that hold for all that was pushed of a block which is not complete yet.
    partial: Option<u32>,
    /// How the runs of a block are put together.
    share: fn(u32, u32) -> u32,
    full: bool,
}

impl Builder {
    /// For a request that [`super::request::check`] let through.
    pub fn new(request: &Request, rules: &SessionRules) -> Self {
        let start = request.offset.min(rules.size);
        let end = start.saturating_add(request.len).min(rules.size);
        Self {
            start,
            position: start,
            end,
            size: rules.size,
            len_max: match rules.form {
                ReplyForm::Simple | ReplyForm::Structured => u32::MAX.into(),
                ReplyForm::Extended => u64::MAX,
            },
            unit: u64::from(rules.block_min_len.max(1)).next_power_of_two(),
            req_one: request.flags.contains(CommandFlags::REQ_ONE),
            extents_max: EXTENTS_MAX,
            extents: Vec::new(),
            partial: None,
            share: |one, other| one & other,
            full: start == end,
        }
    }

    /// The same for a dirty bitmap, where a set bit is always a safe answer.
    #[must_use]
    pub fn of_dirty_bitmap(mut self) -> Self {
        self.share = |one, other| one | other;
        self
    }

    /// The same with a smaller limit on the number of extents, at least one.
    #[must_use]
    pub fn with_extents_max(mut self, extents_max: usize) -> Self {
        self.extents_max = extents_max.clamp(1, EXTENTS_MAX);
        self
    }

    /// Where the next run has to start, in the export.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Takes the next run: `len` bytes from [`Builder::position`] on. It may be longer than the request, and is
    /// cut at the end of the export; empty runs are ignored.
    pub fn push(&mut self, len: u64, flags: u32) -> Progress {
        let run_end = self.position.saturating_add(len).min(self.size);
        while self.position < run_end && !self.full {
            let block_end = (self.position | (self.unit - 1)).saturating_add(1).min(self.size);
            if self.partial.is_some() || run_end < block_end {
                self.push_part(run_end.min(block_end), block_end, flags);
            } else {
                let whole_end = if run_end == self.size { run_end } else { run_end & !(self.unit - 1) };
                self.position = whole_end;
                self.append(whole_end, flags);
            }
        }
        if self.full { Progress::Full } else { Progress::More }
    }

    /// The extents: never empty, unless nothing was pushed. They cover less than the request if the runs did.
    pub fn finish(mut self) -> Vec<Extent> {
        if let Some(flags) = self.partial.take()
            && self.extents.is_empty()
        {
            self.append(self.position, flags);
        }
        let starts = std::iter::once(self.start).chain(self.extents.iter().map(|(end, _)| *end));
        starts
            .zip(&self.extents)
            .map(|(start, (end, flags))| Extent { len: end - start, flags: *flags })
            .collect()
    }

    /// Takes a run's share, up to `end`, of a block that it does not fill alone.
    fn push_part(&mut self, end: u64, block_end: u64, flags: u32) {
        let shared = self.partial.take().map_or(flags, |earlier| (self.share)(earlier, flags));
        self.position = end;
        if end == block_end || end >= self.end {
            self.append(end, shared);
        } else {
            self.partial = Some(shared);
        }
    }

    /// Makes the extents reach up to `end`.
    fn append(&mut self, end: u64, flags: u32) {
        let last = self.extents.last().copied();
        let merges = last.is_some_and(|(_, last_flags)| last_flags == flags);
        let extents_max = if self.req_one { 1 } else { self.extents_max };
        if merges {
            self.extents.pop();
        } else if self.extents.len() >= extents_max {
            self.full = true;
            return;
        }
        let start = self.extents.last().map_or(self.start, |(end, _)| *end);
        let wanted = if self.req_one { end.min(self.end) } else { end };
        let longest = start.saturating_add(self.len_max);
        let reached = if wanted > longest { longest & !(CUT_UNIT - 1) } else { wanted };
        self.extents.push((reached, flags));
        self.full = reached < end || reached >= self.end;
    }
}
