//! [`SparseBytes`]: the content of a file as a value, cheap to copy and to change, for replaying logs.

use std::collections::BTreeMap;
use std::io;

use super::{Durability, Storage};
use crate::address::HostOffset;
use crate::sync::Arc;

/// Bytes in a block. Our choice.
const BLOCK_LEN: usize = 4096;

type Block = [u8; BLOCK_LEN];

/// A file's content: a length, and the blocks that are not zero. Copies share their blocks.
#[derive(Clone, Default)]
pub struct SparseBytes {
    len: u64,
    blocks: BTreeMap<u64, Arc<Block>>,
}

impl SparseBytes {
    /// All that `storage` holds now.
    pub fn load(storage: &dyn Storage) -> io::Result<Self> {
        let mut bytes = SparseBytes { len: storage.len()?, ..SparseBytes::default() };
        let mut at = 0;
        while at < bytes.len {
            let run = storage.run_at(HostOffset(at))?;
            // Up to the end of the run's last block; what is behind it there is no hole's concern.
            let end = at.saturating_add(run.len.max(1)).min(bytes.len);
            while !run.hole && at < end {
                let mut block = [0; BLOCK_LEN];
                let inside = offset_in_block(at);
                let wanted = usize::try_from(end - at).unwrap_or(BLOCK_LEN).min(BLOCK_LEN - inside);
                let part = block.get_mut(..wanted).unwrap_or_default();
                let got = storage.pread(part, HostOffset(at))?;
                bytes.put(at, part.get(..got).unwrap_or_default());
                at += wanted as u64;
            }
            at = end;
        }
        Ok(bytes)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes from `at` into `buf`; what is behind the end reads as zeroes.
    pub fn read(&self, buf: &mut [u8], at: u64) {
        let mut done = 0;
        while done < buf.len() {
            let from = at.saturating_add(done as u64);
            let inside = offset_in_block(from);
            let len = (buf.len() - done).min(BLOCK_LEN - inside);
            let Some(part) = buf.get_mut(done..done + len) else { return };
            match self.blocks.get(&block_of(from)).and_then(|block| block.get(inside..inside + len)) {
                Some(bytes) => part.copy_from_slice(bytes),
                None => part.fill(0),
            }
            done += len;
        }
    }

    /// Puts `bytes` at `at`, making the content longer where they reach behind its end.
    pub fn write(&mut self, bytes: &[u8], at: u64) {
        self.len = self.len.max(at.saturating_add(bytes.len() as u64));
        self.put(at, bytes);
    }

    /// Fills the range with `byte`, as far as it is within the content.
    pub fn fill(&mut self, at: u64, len: u64, byte: u8) {
        let end = at.saturating_add(len).min(self.len);
        let mut from = at;
        while from < end {
            let inside = offset_in_block(from);
            let part = usize::try_from(end - from).unwrap_or(BLOCK_LEN).min(BLOCK_LEN - inside);
            if byte == 0 && part == BLOCK_LEN {
                self.blocks.remove(&block_of(from));
            } else {
                self.put(from, [byte; BLOCK_LEN].get(..part).unwrap_or_default());
            }
            from += part as u64;
        }
    }

    /// Cuts the content off at `len`, or makes it longer by zeroes.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let now = self.len;
            self.fill(len, now - len, 0);
        }
        self.len = len;
    }

    /// Makes `storage` hold the same.
    pub fn store(&self, storage: &dyn Storage) -> io::Result<()> {
        storage.set_len(0)?;
        for (index, block) in &self.blocks {
            let at = index * BLOCK_LEN as u64;
            let len = usize::try_from(self.len.saturating_sub(at)).unwrap_or(BLOCK_LEN).min(BLOCK_LEN);
            storage.pwrite(block.get(..len).unwrap_or_default(), HostOffset(at), Durability::Later)?;
        }
        storage.set_len(self.len)
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let mut from = at;
        let mut rest = bytes;
        while !rest.is_empty() {
            let inside = offset_in_block(from);
            let (part, behind) = rest.split_at(rest.len().min(BLOCK_LEN - inside));
            let block = self.blocks.entry(block_of(from)).or_insert_with(|| Arc::new([0; BLOCK_LEN]));
            if let Some(target) = Arc::make_mut(block).get_mut(inside..inside + part.len()) {
                target.copy_from_slice(part);
            }
            from = from.saturating_add(part.len() as u64);
            rest = behind;
        }
    }
}

impl PartialEq for SparseBytes {
    /// Whether both read the same: a block of zeroes equals one that is not there.
    fn eq(&self, other: &Self) -> bool {
        let zero = Arc::new([0; BLOCK_LEN]);
        self.len == other.len
            && self.blocks.keys().chain(other.blocks.keys()).all(|index| {
                let of = |bytes: &Self| Arc::clone(bytes.blocks.get(index).unwrap_or(&zero));
                let (ours, theirs) = (of(self), of(other));
                Arc::ptr_eq(&ours, &theirs) || ours == theirs
            })
    }
}

fn block_of(at: u64) -> u64 {
    at / BLOCK_LEN as u64
}

fn offset_in_block(at: u64) -> usize {
    usize::try_from(at % BLOCK_LEN as u64).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn it_does_what_a_file_does() {
        let file = MemoryStorage::new(10_000).unwrap();
        let mut bytes = SparseBytes::load(&*file).unwrap();
        let steps: [(u64, usize, u8); 5] =
            [(100, 5000, 1), (4096, 4096, 2), (20_000, 1, 3), (8000, 9000, 4), (30_000, 77, 5)];
        for (at, len, byte) in steps {
            file.pwrite(&vec![byte; len], HostOffset(at), Durability::Later).unwrap();
            bytes.write(&vec![byte; len], at);
            assert!(SparseBytes::load(&*file).unwrap() == bytes);
        }
        for len in [9000, 50_000, 1, 0, 5000] {
            file.set_len(len).unwrap();
            bytes.set_len(len);
            assert!(SparseBytes::load(&*file).unwrap() == bytes, "{len}");
        }
        bytes.write(&[6; 9], 4990);
        assert!(SparseBytes::load(&*file).unwrap() != bytes);
        bytes.store(&*file).unwrap();
        assert!(SparseBytes::load(&*file).unwrap() == bytes);
        let mut buf = [1; 20];
        bytes.read(&mut buf, 4985);
        assert_eq!(buf, [0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 6, 6, 6, 0, 0, 0, 0, 0, 0]);
    }
}
