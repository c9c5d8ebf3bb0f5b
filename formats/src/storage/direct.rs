//! O_DIRECT for callers who know nothing of it: offsets, lengths, memory and the end of the file are
//! aligned here, by way of a bounce buffer where they are not.
//!
//! A change of part of a block reads the block, changes it and writes it back; two of them on one block,
//! or one beside a write of the whole block, would undo each other, so every change holds a range lock.
//! A file whose last block is cut off is made whole for the write and cut off again afterwards.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::calls::{pwrite_all, retry};
use super::range_lock::{Held, Hold, RangeGuard, RangeLocks};
use super::{IoBuf, StorageKind, blkdev};
use crate::address::HostOffset;

/// Most bytes that are bounced at a time. Our choice: bounds the memory of a request.
const BOUNCE_LEN: usize = 1 << 20;

/// What every file system and device accepts; also the alignment of [`IoBuf`].
const BLOCK_LEN_MAX: u64 = 4096;

/// What makes calls on one file fit.
pub(super) struct Direct {
    block_len: u64,
    locks: RangeLocks,
}

/// The descriptors of a file: one to read, and the one that a write goes to.
#[derive(Clone, Copy)]
pub(super) struct Files<'a> {
    pub(super) read: BorrowedFd<'a>,
    pub(super) write: BorrowedFd<'a>,
}

impl Direct {
    /// For a file that was opened with O_DIRECT.
    pub(super) fn new(file: BorrowedFd<'_>, kind: StorageKind) -> Self {
        Direct { block_len: block_len_of(file, kind), locks: RangeLocks::default() }
    }

    /// The unit that needs no read-modify-write.
    pub(super) fn block_len(&self) -> u64 {
        self.block_len
    }

    /// As [`Storage::pread`](super::Storage::pread).
    pub(super) fn pread(&self, file: BorrowedFd<'_>, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        if self.is_aligned(buf, at.0) {
            return self.read_blocks(file, buf, at.0);
        }
        let mut bounce = IoBuf::default();
        let mut done = 0;
        while done < buf.len() {
            let from = end_of(at.0, done)?;
            let (start, inside) = self.block_start(from);
            let wanted = (buf.len() - done).min(BOUNCE_LEN - inside);
            let cover = self.round_up(inside + wanted)?;
            if bounce.len() < cover {
                bounce = IoBuf::zeroed(cover);
            }
            let got = self.read_blocks(file, part_mut(&mut bounce, 0, cover), start)?;
            let got = got.saturating_sub(inside).min(wanted);
            part_mut(buf, done, got).copy_from_slice(part(&bounce, inside, got));
            done += got;
            if got < wanted {
                break;
            }
        }
        Ok(done)
    }

    /// As [`Storage::pwrite`](super::Storage::pwrite).
    pub(super) fn pwrite(&self, files: Files<'_>, buf: &[u8], at: HostOffset) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let end = end_of(at.0, buf.len())?;
        let whole_blocks = at.0.is_multiple_of(self.block_len) && end.is_multiple_of(self.block_len);
        let hold = if whole_blocks { Hold::Shared } else { Hold::Exclusive };
        let _guard = self.lock_change(files.read, at.0, end, hold)?;
        self.write_held(files, buf, at.0)
    }

    /// Holds the blocks of a range for changing them. What reaches behind the end of the file holds all
    /// that is behind as well, because the length changes on the way.
    pub(super) fn lock_change(
        &self,
        file: BorrowedFd<'_>,
        start: u64,
        end: u64,
        hold: Hold,
    ) -> io::Result<RangeGuard<'_>> {
        let (start, _) = self.block_start(start);
        let end = end.checked_next_multiple_of(self.block_len).ok_or(Errno::INVAL)?;
        if end <= file_len(file)? {
            let guard = self.locks.lock(start, end, hold);
            if end <= file_len(file)? {
                return Ok(guard);
            }
        }
        Ok(self.locks.lock(start, u64::MAX, Hold::Exclusive))
    }

    /// Holds the blocks that `buf` is to be written to without waiting for anybody. `None`: somebody has
    /// them, or they are not whole blocks inside of the file in aligned memory. To be
    /// [released](Self::release).
    pub(super) fn try_hold_blocks(
        &self,
        file: BorrowedFd<'_>,
        buf: &[u8],
        at: u64,
    ) -> io::Result<Option<Held>> {
        if buf.is_empty() || !self.is_aligned(buf, at) {
            return Ok(None);
        }
        let end = end_of(at, buf.len())?;
        let Some(held) = self.locks.try_hold(at, end, Hold::Shared) else { return Ok(None) };
        match file_len(file) {
            Ok(len) if end <= len => Ok(Some(held)),
            Ok(_) => {
                self.locks.release(held);
                Ok(None)
            }
            Err(error) => {
                self.locks.release(held);
                Err(error)
            }
        }
    }

    /// Lets go what [`try_hold_blocks`](Self::try_hold_blocks) has held.
    pub(super) fn release(&self, held: Held) {
        self.locks.release(held);
    }

    /// Holds the end of the file, for changing its length.
    pub(super) fn lock_len(&self) -> RangeGuard<'_> {
        self.locks.lock(0, u64::MAX, Hold::Exclusive)
    }

    /// Writes under a lock that the caller holds.
    pub(super) fn write_held(&self, files: Files<'_>, buf: &[u8], at: u64) -> io::Result<()> {
        if self.is_aligned(buf, at) {
            return pwrite_all(files.write, buf, HostOffset(at));
        }
        let len = file_len(files.read)?;
        let end = end_of(at, buf.len())?;
        let written = self.write_bounced(files, buf, at);
        let whole = end.checked_next_multiple_of(self.block_len).ok_or(Errno::INVAL)?;
        if whole > len && whole > end {
            // Failed or not, what was only there to fill the block must not stay.
            let len = if written.is_ok() { len.max(end) } else { len };
            if file_len(files.read)? > len {
                retry(|| rustix::fs::ftruncate(files.write, len))?;
            }
        }
        written
    }

    fn write_bounced(&self, files: Files<'_>, buf: &[u8], at: u64) -> io::Result<()> {
        let mut bounce = IoBuf::default();
        let mut done = 0;
        while done < buf.len() {
            let from = end_of(at, done)?;
            let (start, inside) = self.block_start(from);
            let wanted = (buf.len() - done).min(BOUNCE_LEN - inside);
            let cover = self.round_up(inside + wanted)?;
            if bounce.len() < cover {
                bounce = IoBuf::zeroed(cover);
            }
            let block = usize::try_from(self.block_len).map_err(|_| Errno::INVAL)?;
            let last = cover - block;
            if inside > 0 {
                self.fetch_block(files.read, part_mut(&mut bounce, 0, block), start)?;
            }
            if inside + wanted < cover && !(last == 0 && inside > 0) {
                self.fetch_block(files.read, part_mut(&mut bounce, last, block), end_of(start, last)?)?;
            }
            part_mut(&mut bounce, inside, wanted).copy_from_slice(part(buf, done, wanted));
            pwrite_all(files.write, part(&bounce, 0, cover), HostOffset(start))?;
            done += wanted;
        }
        Ok(())
    }

    /// Reads one block; what is behind the end of the file is zero.
    fn fetch_block(&self, file: BorrowedFd<'_>, block: &mut [u8], at: u64) -> io::Result<()> {
        let got = self.read_blocks(file, block, at)?;
        let len = block.len();
        part_mut(block, got, len - got.min(len)).fill(0);
        Ok(())
    }

    /// Reads into aligned memory from an aligned offset until `buf` is full or the file ends.
    fn read_blocks(&self, file: BorrowedFd<'_>, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let from = end_of(at, done)?;
            let got = retry(|| rustix::io::pread(file, &mut *rest, from))?;
            done += got;
            // Part of a block is had only where the file ends; going on there would not be aligned.
            if got == 0 || !(done as u64).is_multiple_of(self.block_len) {
                break;
            }
        }
        Ok(done)
    }

    /// Whether the bytes can go to or come from the file as they are.
    pub(super) fn is_aligned(&self, buf: &[u8], at: u64) -> bool {
        let fits = |value: u64| value.is_multiple_of(self.block_len);
        fits(at) && fits(buf.len() as u64) && fits(buf.as_ptr().addr() as u64)
    }

    /// The start of the block that `at` lies in, and how far in.
    fn block_start(&self, at: u64) -> (u64, usize) {
        let inside = at % self.block_len;
        // At most `BLOCK_LEN_MAX`.
        (at - inside, usize::try_from(inside).unwrap_or_default())
    }

    fn round_up(&self, len: usize) -> io::Result<usize> {
        let block = usize::try_from(self.block_len).map_err(|_| Errno::INVAL)?;
        Ok(len.checked_next_multiple_of(block).ok_or(Errno::INVAL)?)
    }
}

/// The alignment that the file wants of offsets, lengths and memory.
fn block_len_of(file: BorrowedFd<'_>, kind: StorageKind) -> u64 {
    let known = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let stated = known
        .filter(|statx| statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .map(|statx| u64::from(statx.stx_dio_offset_align.max(statx.stx_dio_mem_align)))
        .filter(|len| len.is_power_of_two() && *len <= BLOCK_LEN_MAX);
    match (stated, kind) {
        (Some(len), _) => len,
        (None, StorageKind::BlockDevice) => blkdev::logical_block_len(file),
        (None, StorageKind::File | StorageKind::Memory) => probed_block_len(file),
    }
}

/// The smallest sector that can be read; an empty file tells nothing.
fn probed_block_len(file: BorrowedFd<'_>) -> u64 {
    if file_len(file).unwrap_or_default() < BLOCK_LEN_MAX {
        return BLOCK_LEN_MAX;
    }
    // At an offset of one sector, so that larger blocks do not fit by chance.
    let mut sector = IoBuf::zeroed(1024);
    let small = retry(|| rustix::io::pread(file, part_mut(&mut sector, 512, 512), 512));
    if small.is_ok() { 512 } else { BLOCK_LEN_MAX }
}

fn file_len(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

fn end_of(at: u64, len: usize) -> io::Result<u64> {
    at.checked_add(len as u64).ok_or_else(|| Errno::INVAL.into())
}

fn part(buf: &[u8], from: usize, len: usize) -> &[u8] {
    buf.get(from..from + len).unwrap_or_default()
}

fn part_mut(buf: &mut [u8], from: usize, len: usize) -> &mut [u8] {
    buf.get_mut(from..from + len).unwrap_or_default()
}
