//! [`Refcounts`]: the refcount table and the blocks of it that are in memory.
//!
//! Memory only: whoever misses a block is told which one and brings it. A block is written whole or in
//! part by a commit; until then it stays in memory.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use super::super::types::{Geometry, HostIndex};
use super::allocator::Need;
use crate::address::HostOffset;

/// Most bytes of clean blocks that stay in memory: they describe 256 GiB at the usual 64 KiB clusters of
/// 16 bits. Our choice.
const CLEAN_LEN_MAX: u64 = 8 << 20;
/// Bits of a refcount table entry that must be zero (specification).
const TABLE_RESERVED: u64 = 0x1ff;

/// Number of a refcount block: its index in the refcount table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockIndex(pub usize);

/// The refcounts of an image.
pub struct Refcounts {
    geometry: Geometry,
    bits: u32,
    table: Vec<u64>,
    table_at: HostOffset,
    blocks: HashMap<BlockIndex, Block>,
    dirty_blocks: BTreeSet<BlockIndex>,
    dirty_entries: BTreeSet<usize>,
    /// Not dropped from memory even if clean.
    kept: Option<BlockIndex>,
}

struct Block {
    bytes: Box<[u8]>,
    /// Bytes that the file does not have yet; empty when clean.
    dirty: Range<usize>,
    /// A commit is writing it.
    held: bool,
}

/// Changed bytes of a block, as a commit writes them.
pub struct BlockWrite {
    /// Which block.
    pub index: BlockIndex,
    /// Where the bytes go.
    pub at: HostOffset,
    /// First byte in the block.
    pub from: usize,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Refcounts {
    /// The refcounts of `bits` bits with this table.
    pub fn new(geometry: Geometry, bits: u32, table: Vec<u64>, table_at: HostOffset) -> Self {
        Refcounts {
            geometry,
            bits,
            table,
            table_at,
            blocks: HashMap::new(),
            dirty_blocks: BTreeSet::new(),
            dirty_entries: BTreeSet::new(),
            kept: None,
        }
    }

    /// The largest refcount.
    pub fn max(&self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    /// Clusters that one block describes.
    pub fn block_entries(&self) -> u64 {
        self.geometry.cluster_len() * 8 / u64::from(self.bits)
    }

    /// The block that describes the cluster.
    pub fn block_of(&self, index: HostIndex) -> BlockIndex {
        BlockIndex(usize::try_from(index.0 / self.block_entries()).unwrap_or(usize::MAX))
    }

    /// Entries of the table.
    pub fn table_len(&self) -> usize {
        self.table.len()
    }

    /// Where the table lies.
    pub fn table_at(&self) -> HostOffset {
        self.table_at
    }

    /// Where the block lies; `None` if there is none: all its refcounts are 0. The second error is for an
    /// entry that cannot be one.
    pub fn block_at(&self, block: BlockIndex) -> Result<Option<HostOffset>, Need> {
        match self.table.get(block.0) {
            None | Some(0) => Ok(None),
            Some(raw) if raw & TABLE_RESERVED == 0 && self.geometry.is_aligned(*raw) => {
                Ok(Some(HostOffset(*raw)))
            }
            Some(_) => Err(Need::Fault("an entry of the refcount table is bad")),
        }
    }

    /// Whether the block is in memory.
    pub fn has(&self, block: BlockIndex) -> bool {
        self.blocks.contains_key(&block)
    }

    /// Puts a block into memory that was read from the file, unless it is there.
    pub fn insert(&mut self, block: BlockIndex, bytes: Vec<u8>) {
        let made = || Block { bytes: bytes.into_boxed_slice(), dirty: 0..0, held: false };
        self.blocks.entry(block).or_insert_with(made);
    }

    /// A new block of zeroes at `at`.
    pub fn create(&mut self, block: BlockIndex, at: HostOffset) {
        let len = usize::try_from(self.geometry.cluster_len()).unwrap_or(0);
        let bytes = vec![0; len].into_boxed_slice();
        self.blocks.insert(block, Block { bytes, dirty: 0..len, held: false });
        self.dirty_blocks.insert(block);
        if let Some(entry) = self.table.get_mut(block.0) {
            *entry = at.0;
            self.dirty_entries.insert(block.0);
        }
    }

    /// Takes the block out of the table, and its refcounts with it.
    pub fn forget(&mut self, block: BlockIndex) {
        self.blocks.remove(&block);
        self.dirty_blocks.remove(&block);
        if let Some(entry) = self.table.get_mut(block.0) {
            *entry = 0;
            self.dirty_entries.insert(block.0);
        }
    }

    /// Moves the table to `at`, with room for `entries`.
    pub fn move_table(&mut self, at: HostOffset, entries: usize) {
        self.table.resize(entries, 0);
        self.table_at = at;
    }

    /// Makes the table longer in memory; [`move_table`](Self::move_table) follows.
    pub fn lengthen_table(&mut self, entries: usize) {
        self.table.resize(entries.max(self.table.len()), 0);
    }

    /// The refcount of the cluster.
    pub fn get(&self, index: HostIndex) -> Result<u64, Need> {
        let number = self.block_of(index);
        if self.block_at(number)?.is_none() {
            return Ok(0);
        }
        let block = self.blocks.get(&number).ok_or(Need::Block(number))?;
        Ok(count_in(&block.bytes, self.bits, index.0 % self.block_entries()))
    }

    /// Whether the block counts nothing at all.
    pub fn is_empty(&self, block: BlockIndex) -> Result<bool, Need> {
        if self.block_at(block)?.is_none() {
            return Ok(true);
        }
        let block = self.blocks.get(&block).ok_or(Need::Block(block))?;
        // No cluster is shorter than such a piece, nor anything but a multiple of it.
        Ok(block.bytes.as_chunks::<64>().0.iter().all(|piece| *piece == [0; 64]))
    }

    /// Sets the refcount of a cluster whose block is in memory.
    pub fn set(&mut self, index: HostIndex, value: u64) -> Result<(), Need> {
        if value > self.max() {
            return Err(Need::Fault("a refcount is too large"));
        }
        let number = self.block_of(index);
        let at = index.0 % self.block_entries();
        let bits = u64::from(self.bits);
        let block = self.blocks.get_mut(&number).ok_or(Need::Block(number))?;
        let from = usize::try_from(at * bits / 8).unwrap_or(usize::MAX);
        let width = usize::try_from(bits.div_ceil(8)).unwrap_or(1);
        let field = block.bytes.get_mut(from..from + width).ok_or(Need::Block(number))?;
        if let ([byte], true) = (&mut *field, bits < 8) {
            // Narrow refcounts fill a byte from its least significant bit (specification).
            let shift = (at * bits) % 8;
            let mask = u8::MAX >> (8 - bits) << shift;
            *byte = *byte & !mask | (u8::try_from(value).unwrap_or(0) << shift);
        } else {
            let be = value.to_be_bytes();
            field.copy_from_slice(be.get(8 - width..).unwrap_or_default());
        }
        block.dirty = match block.dirty.is_empty() {
            true => from..from + width,
            false => block.dirty.start.min(from)..block.dirty.end.max(from + width),
        };
        self.dirty_blocks.insert(number);
        Ok(())
    }

    /// Bytes of refcounts and table entries that the file does not have yet.
    pub fn dirty_len(&self) -> u64 {
        let blocks = self.dirty_blocks.iter().filter_map(|block| self.blocks.get(block));
        let blocks: usize = blocks.map(|block| block.dirty.len()).sum();
        (blocks + self.dirty_entries.len() * 8) as u64
    }

    /// Bytes of memory that blocks take which the file does not have all of.
    pub fn held_len(&self) -> u64 {
        self.dirty_blocks.len() as u64 * self.geometry.cluster_len()
    }

    /// Whether the file lacks nothing.
    pub fn is_clean(&self) -> bool {
        self.dirty_blocks.is_empty() && self.dirty_entries.is_empty()
    }

    /// Takes what is dirty; it counts as clean from here, but stays in memory until
    /// [`written`](Self::written).
    pub fn freeze_blocks(&mut self) -> Vec<BlockWrite> {
        let mut writes = Vec::new();
        for index in std::mem::take(&mut self.dirty_blocks) {
            let Ok(Some(start)) = self.block_at(index) else { continue };
            let Some(block) = self.blocks.get_mut(&index) else { continue };
            let range = std::mem::take(&mut block.dirty);
            block.held = true;
            let bytes = block.bytes.get(range.clone()).unwrap_or_default().to_vec();
            let at = HostOffset(start.0 + range.start as u64);
            writes.push(BlockWrite { index, at, from: range.start, bytes });
        }
        writes
    }

    /// Takes the changed entries of the table, with their values.
    pub fn freeze_entries(&mut self) -> Vec<(usize, u64)> {
        let changed = std::mem::take(&mut self.dirty_entries);
        changed.into_iter().filter_map(|i| self.table.get(i).map(|raw| (i, *raw))).collect()
    }

    /// The whole table as it stands in the file.
    pub fn table_bytes(&self) -> Vec<u8> {
        self.table.iter().flat_map(|raw| raw.to_be_bytes()).collect()
    }

    /// A commit has written these blocks.
    pub fn written(&mut self, writes: &[BlockWrite]) {
        for write in writes {
            if let Some(block) = self.blocks.get_mut(&write.index) {
                block.held = false;
            }
        }
        self.evict();
    }

    /// A commit has not written these: they are dirty again.
    pub fn unwritten(&mut self, writes: &[BlockWrite], entries: &[(usize, u64)]) {
        for write in writes {
            let Some(block) = self.blocks.get_mut(&write.index) else { continue };
            let end = write.from + write.bytes.len();
            block.held = false;
            block.dirty = match block.dirty.is_empty() {
                true => write.from..end,
                false => block.dirty.start.min(write.from)..block.dirty.end.max(end),
            };
            self.dirty_blocks.insert(write.index);
        }
        self.dirty_entries.extend(entries.iter().map(|(index, _)| *index));
    }

    /// Keeps the block in memory until another one is kept: for who will change it soon and cannot fail then.
    pub fn keep(&mut self, block: BlockIndex) {
        self.kept = Some(block);
    }

    /// Lets clean blocks go where there are many. For who reads one after the other, each time before the next.
    pub fn evict(&mut self) {
        let max = usize::try_from(CLEAN_LEN_MAX / self.geometry.cluster_len()).unwrap_or(0).max(4);
        if self.blocks.len() > max {
            let kept = self.kept;
            self.blocks.retain(|index, block| block.held || !block.dirty.is_empty() || kept == Some(*index));
        }
    }
}

/// Refcount number `at` of a block with refcounts of `bits` bits.
pub fn count_in(block: &[u8], bits: u32, at: u64) -> u64 {
    let bits = u64::from(bits);
    let from = usize::try_from(at * bits / 8).unwrap_or(usize::MAX);
    let width = usize::try_from(bits.div_ceil(8)).unwrap_or(1);
    let field = block.get(from..).and_then(|rest| rest.get(..width)).unwrap_or_default();
    let value = field.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    if bits < 8 { value >> ((at * bits) % 8) & (u64::MAX >> (64 - bits)) } else { value }
}

#[cfg(test)]
mod tests {
    use super::super::super::types::DataFile;
    use super::*;

    #[test]
    fn all_widths_hold_what_was_put_in() {
        for order in 0..=6 {
            let geometry = Geometry::new(9, false, 3, DataFile::Internal);
            let mut refcounts = Refcounts::new(geometry, 1 << order, vec![0; 64], HostOffset(512));
            refcounts.create(BlockIndex(0), HostOffset(1024));
            let entries = refcounts.block_entries();
            let value = |index: u64| (index * 7 + 1) & refcounts_max(order);
            for index in 0..entries {
                refcounts.set(HostIndex(index), value(index)).unwrap();
            }
            for index in 0..entries {
                assert_eq!(refcounts.get(HostIndex(index)), Ok(value(index)), "width 2^{order}");
            }
            assert_eq!(refcounts.get(HostIndex(entries)), Ok(0));
        }
    }

    #[test]
    fn a_block_that_is_kept_stays_in_memory() {
        let geometry = Geometry::new(21, false, 3, DataFile::Internal);
        let mut refcounts = Refcounts::new(geometry, 16, vec![0; 64], HostOffset(1 << 21));
        for block in 0..8 {
            refcounts.create(BlockIndex(block), HostOffset((block as u64 + 2) << 21));
        }
        refcounts.keep(BlockIndex(3));
        let writes = refcounts.freeze_blocks();
        refcounts.written(&writes);
        let there: Vec<_> = (0..8).filter(|block| refcounts.has(BlockIndex(*block))).collect();
        assert_eq!(there, [3]);
    }

    fn refcounts_max(order: u32) -> u64 {
        u64::MAX >> (64 - (1 << order))
    }
}
