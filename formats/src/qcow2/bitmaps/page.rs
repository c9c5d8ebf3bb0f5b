//! Pages of bits, and the runs of equal bits in them.

use std::ops::ControlFlow;

use crate::address::GuestRange;
use crate::driver::{Status, StatusVisitor};
use crate::error::Result;

/// Bytes of a page. Our choice: at the usual 64 KiB of disk for a bit a page stands for 8 GiB.
pub const PAGE_LEN: u64 = 16 << 10;
/// Bits of a page.
pub const PAGE_BITS: u64 = PAGE_LEN * 8;
/// Bits of a word of a page.
const WORD_BITS: u64 = 64;

/// A page of bits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Page {
    /// All clear.
    Zeroes,
    /// All set.
    Ones,
    /// Bit number 0 is the least significant one of the first word.
    Bits(Box<[u64]>),
}

impl Page {
    /// The page in these bytes (specification: the first bit is the least significant one of the first
    /// byte).
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Page::Bits(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let filled = |with| vec![with; usize::try_from(PAGE_LEN).unwrap_or(0)];
        match self {
            Page::Zeroes => filled(0),
            Page::Ones => filled(u8::MAX),
            Page::Bits(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        }
    }

    /// Whether bit number `from` is set, and how many from it on are the same, of those before `end`.
    fn run(&self, from: u64, end: u64) -> (bool, u64) {
        let words = match self {
            Page::Zeroes => return (false, end - from),
            Page::Ones => return (true, end - from),
            Page::Bits(words) => words,
        };
        let word_at = |bit: u64| {
            let index = usize::try_from(bit / WORD_BITS).unwrap_or(usize::MAX);
            words.get(index).copied().unwrap_or(0)
        };
        let set = word_at(from) >> (from % WORD_BITS) & 1 == 1;
        let mut at = from;
        while at < end {
            let word = if set { !word_at(at) } else { word_at(at) };
            let rest = word >> (at % WORD_BITS);
            if rest != 0 {
                return (set, (at + u64::from(rest.trailing_zeros())).min(end) - from);
            }
            at += WORD_BITS - at % WORD_BITS;
        }
        (set, end - from)
    }
}

/// Hands runs to a visitor, neighbours that are equal as one.
pub struct Runs<'a, 'v> {
    visitor: &'a mut (dyn FnMut(u64, Status) -> ControlFlow<()> + 'v),
    pending: Option<(u64, bool)>,
}

impl<'a, 'v> Runs<'a, 'v> {
    /// Nothing was found yet.
    pub fn new(visitor: &'a mut (dyn FnMut(u64, Status) -> ControlFlow<()> + 'v)) -> Self {
        Runs { visitor, pending: None }
    }

    /// Takes the next run.
    pub fn push(&mut self, len: u64, dirty: bool) -> ControlFlow<()> {
        match &mut self.pending {
            Some((pending, same)) if *same == dirty => *pending += len,
            Some(_) | None if len == 0 => {}
            pending => {
                if let Some((len, dirty)) = pending.replace((len, dirty)) {
                    return (self.visitor)(len, Status::Bitmap { dirty });
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Hands over the last run.
    pub fn finish(mut self) {
        if let Some((len, dirty)) = self.pending.take() {
            let _ = (self.visitor)(len, Status::Bitmap { dirty });
        }
    }
}

/// Visits the runs of `range` in a bitmap whose bits stand for `granularity` bytes each.
pub fn visit(
    range: GuestRange,
    granularity: u64,
    mut page_at: impl FnMut(u64) -> Result<Page>,
    visitor: StatusVisitor<'_>,
) -> Result<()> {
    let mut runs = Runs::new(visitor);
    let end_bit = range.end().div_ceil(granularity);
    let mut at = range.offset();
    while at < range.end() {
        let page_number = at / granularity / PAGE_BITS;
        let page = page_at(page_number)?;
        let first = page_number * PAGE_BITS;
        let page_end = end_bit.min(first + PAGE_BITS);
        let mut bit = at / granularity;
        while bit < page_end {
            let (dirty, count) = page.run(bit - first, page_end - first);
            bit += count;
            let run_end = bit.saturating_mul(granularity).min(range.end());
            if runs.push(run_end - at, dirty).is_break() {
                return Ok(());
            }
            at = run_end;
        }
    }
    runs.finish();
    Ok(())
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn visited(range: GuestRange, granularity: u64, pages: &[Page]) -> Vec<(u64, bool)> {
        let mut found = Vec::new();
        let page_at = |page: u64| Ok(pages[page as usize].clone());
        let visited = visit(range, granularity, page_at, &mut |len, status| {
            found.push((len, status == Status::Bitmap { dirty: true }));
            ControlFlow::Continue(())
        });
        assert!(visited.is_ok());
        found
    }

    #[test]
    fn runs_are_what_the_bits_say() {
        let mut words = vec![0u64; usize::try_from(PAGE_LEN / 8).unwrap()];
        words[0] = 1 << 3 | 1 << 63;
        words[1] = 1;
        *words.last_mut().unwrap() = 1 << 63;
        let pages = [Page::Bits(words.into()), Page::Ones, Page::Zeroes];
        let disk = GuestRange::new(0, 512 * PAGE_BITS * 3 - 100).unwrap();
        let all = visited(disk, 512, &pages);
        let bits = |count: u64| 512 * count;
        let expected = [
            (bits(3), false),
            (512, true),
            (bits(59), false),
            (bits(2), true),
            (bits(PAGE_BITS - 66), false),
            (bits(PAGE_BITS + 1), true),
            (bits(PAGE_BITS) - 100, false),
        ];
        assert_eq!(all, expected);
        let inside = GuestRange::new(512 * 3 + 10, 1000).unwrap();
        assert_eq!(visited(inside, 512, &pages), [(502, true), (498, false)]);
        assert_eq!(visited(inside.prefix(0), 512, &pages), []);
    }
}
