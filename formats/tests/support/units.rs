//! Content that says who wrote it, and what may be found of it after a crash.
//!
//! The disk is seen as units of 64 bytes. Each holds the number of the operation that wrote it and its
//! own number, over and over, or zeroes. So a unit that was lost, came back, was torn or belongs
//! elsewhere tells on itself. Writes are whole units; a sector, the least that a crash tears, holds eight.

use super::random::Random;

/// Bytes in a unit.
pub const UNIT_LEN: usize = 64;

/// Whose value a unit holds: an operation's, or 0 for zeroes.
pub type Writer = u32;

/// Fills `buf`, which begins at `offset` of the disk, with what `writer` writes there.
pub fn paint(buf: &mut [u8], offset: u64, writer: Writer) {
    assert!(buf.len().is_multiple_of(UNIT_LEN) && offset.is_multiple_of(UNIT_LEN as u64));
    for (index, unit) in buf.chunks_exact_mut(UNIT_LEN).enumerate() {
        let number = (offset / UNIT_LEN as u64) as u32 + index as u32;
        let mut word = [0; 8];
        if writer != 0 {
            word[..4].copy_from_slice(&writer.to_be_bytes());
            word[4..].copy_from_slice(&number.to_be_bytes());
        }
        for part in unit.chunks_exact_mut(8) {
            part.copy_from_slice(&word);
        }
    }
}

/// `len` bytes at `offset` as `writer` writes them.
pub fn painted(offset: u64, len: u64, writer: Writer) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    paint(&mut bytes, offset, writer);
    bytes
}

/// Who wrote the unit with this number; `None` when that is nobody's content, or that of another place.
pub fn writer_of(unit: &[u8], number: usize) -> Option<Writer> {
    let first: [u8; 8] = unit[..8].try_into().unwrap();
    if unit[..UNIT_LEN - 8] != unit[8..] {
        return None;
    }
    let word = u64::from_be_bytes(first);
    match ((word >> 32) as u32, word as u32) {
        (0, 0) => Some(0),
        (0, _) => None,
        (writer, place) => (place as usize == number).then_some(writer),
    }
}

/// An operation that has set units.
#[derive(Clone, Debug)]
struct Change {
    writer: Writer,
    /// Records of the log when it began.
    began: usize,
    /// Records when it returned; `None` while it is under way, or when it failed.
    ended: Option<usize>,
    /// Records when it was said to be durable.
    durable: Option<usize>,
}

/// Which operation has set which unit when, and since when it is durable.
pub struct Journal {
    initial: Vec<Writer>,
    changes: Vec<Change>,
    /// For each unit the changes that set it, oldest first.
    of_unit: Vec<Vec<usize>>,
}

impl Journal {
    /// Nothing has happened to a disk with this content.
    pub fn new(content: &[u8]) -> Self {
        let units = content.chunks_exact(UNIT_LEN).enumerate();
        let initial: Vec<_> = units.map(|(number, unit)| writer_of(unit, number).unwrap()).collect();
        Journal { of_unit: vec![Vec::new(); initial.len()], initial, changes: Vec::new() }
    }

    /// An operation begins that sets the units `from..to`.
    pub fn begin(&mut self, from: usize, to: usize, writer: Writer, now: usize) -> usize {
        self.changes.push(Change { writer, began: now, ended: None, durable: None });
        for unit in &mut self.of_unit[from..to] {
            unit.push(self.changes.len() - 1);
        }
        self.changes.len() - 1
    }

    /// It has returned; `durable` if it was one that is durable then.
    pub fn end(&mut self, change: usize, now: usize, durable: bool) {
        self.changes[change].ended = Some(now);
        self.changes[change].durable = durable.then_some(now);
    }

    /// Takes a change back for one unit: the operation has left it alone.
    pub fn take_back(&mut self, change: usize, unit: usize) {
        self.of_unit[unit].retain(|other| *other != change);
    }

    /// A flush that began at `began` has been answered: all that had returned then is durable.
    pub fn flushed(&mut self, began: usize, now: usize) {
        for change in &mut self.changes {
            if change.durable.is_none() && change.ended.is_some_and(|ended| ended <= began) {
                change.durable = Some(now);
            }
        }
    }

    /// Whose content the unit may have after a crash at `cut`: that of the last change that was durable,
    /// or of any that began later.
    fn allows(&self, unit: usize, cut: usize, found: Writer) -> bool {
        for &index in self.of_unit[unit].iter().rev() {
            let change = &self.changes[index];
            if change.began >= cut {
                continue;
            }
            if change.writer == found {
                return true;
            }
            if change.durable.is_some_and(|durable| durable <= cut) {
                return false;
            }
        }
        self.initial[unit] == found
    }

    /// Compares a disk after a crash at `cut`; says what is wrong with the first bad unit.
    pub fn check(&self, content: &[u8], cut: usize) -> Result<(), String> {
        for (number, unit) in content.chunks_exact(UNIT_LEN).enumerate() {
            let Some(writer) = writer_of(unit, number) else {
                let word = &unit[..8];
                return Err(format!("unit {number} (offset {:#x}) is foreign: {word:x?}", number * UNIT_LEN));
            };
            if !self.allows(number, cut, writer) {
                let history: Vec<_> =
                    self.of_unit[number].iter().map(|index| &self.changes[*index]).collect();
                return Err(format!(
                    "unit {number} (offset {:#x}) is of {writer}; at first of {}, then {history:?}",
                    number * UNIT_LEN,
                    self.initial[number]
                ));
            }
        }
        Ok(())
    }

    /// Some content of the range that `check` accepts.
    pub fn any_allowed(&self, offset: u64, len: u64) -> Vec<u8> {
        self.now()[offset as usize..(offset + len) as usize].to_vec()
    }

    /// What the disk holds now, if every operation so far has done what it was to do.
    pub fn now(&self) -> Vec<u8> {
        let mut content = vec![0; self.initial.len() * UNIT_LEN];
        for (number, unit) in content.chunks_exact_mut(UNIT_LEN).enumerate() {
            let last = self.of_unit[number].last();
            let writer = last.map_or(self.initial[number], |index| self.changes[*index].writer);
            paint(unit, (number * UNIT_LEN) as u64, writer);
        }
        content
    }
}

/// A range of whole units with at most `units_max` of them, within `from..to`.
pub fn random_units(random: &mut Random, from: u64, to: u64, units_max: u64) -> (u64, u64) {
    let unit = UNIT_LEN as u64;
    let at = from + random.below((to - from) / unit) * unit;
    let len = (1 + random.below(units_max)) * unit;
    (at, len.min(to - at))
}
