//! Giving room back, keeping it and zeroing it, with what the file system or device can do, and by
//! writing zeroes where it can do nothing.
//!
//! It remembers what is not supported, so that each refusal costs one system call only once. It never
//! makes a file longer except for [`Provision::Allocate`].

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::calls::retry;
use super::{StorageKind, blkdev};
use crate::address::{HostOffset, HostRange};
use crate::storage::Provision;
use crate::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Most zeroes written by one call. Our choice: large enough for a disk's full speed.
const ZEROES_LEN: usize = 1 << 20;

/// Aligned, so that O_DIRECT can write them as they are.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

const PUNCH: u8 = 1;
const ZERO_RANGE: u8 = 2;
const ALLOCATE: u8 = 4;
const DISCARD: u8 = 8;
const ZERO_OUT: u8 = 16;

/// What is known of a file's abilities.
pub(super) struct Room {
    kind: StorageKind,
    unsupported: AtomicU8,
    /// A hole was punched before.
    punches: AtomicBool,
}

/// How zeroes are written where nothing better is to be had.
pub(super) type Write<'a> = &'a dyn Fn(&[u8], HostOffset) -> io::Result<()>;

/// How written bytes are brought from memory to the device.
pub(super) type Sync<'a> = &'a dyn Fn() -> io::Result<()>;

/// A file, as it is changed here.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) file: BorrowedFd<'a>,
    /// Its length.
    pub(super) len: u64,
    pub(super) write: Write<'a>,
    /// `None` where none are in memory only.
    pub(super) sync: Option<Sync<'a>>,
}

/// What became of a call that may not be supported.
enum Outcome {
    Done,
    Unsupported,
}

impl Room {
    pub(super) fn new(kind: StorageKind) -> Self {
        Room { kind, unsupported: AtomicU8::new(0), punches: AtomicBool::new(false) }
    }

    /// See [`Storage::zero`](super::Storage::zero).
    pub(super) fn zero(
        &self,
        target: Target<'_>,
        range: HostRange,
        provision: Provision,
        fast: bool,
    ) -> io::Result<()> {
        let range = match provision {
            Provision::Allocate if self.kind != StorageKind::BlockDevice => range,
            Provision::Allocate | Provision::Unmap | Provision::Keep => clip(range, target.len),
        };
        if range.is_empty() {
            return Ok(());
        }
        match self.kind {
            StorageKind::BlockDevice => self.zero_device(target, range, provision, fast),
            StorageKind::File | StorageKind::Memory => self.zero_file(target, range, provision, fast),
        }
    }

    /// See [`Storage::reserve`](super::Storage::reserve).
    pub(super) fn reserve(&self, file: BorrowedFd<'_>, range: HostRange) -> io::Result<bool> {
        if range.is_empty() || self.kind == StorageKind::BlockDevice {
            return Ok(range.is_empty());
        }
        let outcome = self.fallocate(ALLOCATE, file, FallocateFlags::KEEP_SIZE, range)?;
        Ok(matches!(outcome, Outcome::Done))
    }

    /// See [`Storage::discard`](super::Storage::discard); `len` is the file's length.
    pub(super) fn discard(&self, file: BorrowedFd<'_>, range: HostRange, len: u64) -> io::Result<()> {
        let range = clip(range, len);
        if self.kind != StorageKind::BlockDevice {
            return match range.is_empty() {
                true => Ok(()),
                false => self.punch(file, range).map(drop),
            };
        }
        match aligned_inside(range, blkdev::logical_block_len(file)) {
            Some(inside) => self.attempt(DISCARD, || blkdev::discard(file, inside)).map(drop),
            None => Ok(()),
        }
    }

    fn zero_file(
        &self,
        target: Target<'_>,
        range: HostRange,
        provision: Provision,
        fast: bool,
    ) -> io::Result<()> {
        if provision == Provision::Unmap
            && let Outcome::Done = self.punch(target.file, range)?
        {
            return Ok(());
        }
        let flags = match provision {
            Provision::Unmap | Provision::Keep => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            Provision::Allocate => FallocateFlags::ZERO_RANGE,
        };
        if let Outcome::Done = self.fallocate(ZERO_RANGE, target.file, flags, range)? {
            return Ok(());
        }
        if let Outcome::Done = self.zero_by_exchange(target.file, range, provision)? {
            return Ok(());
        }
        if fast {
            return Err(Errno::OPNOTSUPP.into());
        }
        write_zeroes(target, range)
    }

    /// Zeroes by giving the room back and taking it again (tmpfs has nothing better). It is taken once
    /// before, so that a lack of room or of the ability shows while nothing has changed.
    fn zero_by_exchange(
        &self,
        file: BorrowedFd<'_>,
        range: HostRange,
        provision: Provision,
    ) -> io::Result<Outcome> {
        let flags = match provision {
            Provision::Unmap | Provision::Keep => FallocateFlags::KEEP_SIZE,
            Provision::Allocate => FallocateFlags::empty(),
        };
        if self.lacks(PUNCH) || self.lacks(ALLOCATE) {
            return Ok(Outcome::Unsupported);
        }
        if let Outcome::Unsupported = self.fallocate(ALLOCATE, file, flags, range)? {
            return Ok(Outcome::Unsupported);
        }
        if let Outcome::Unsupported = self.punch(file, range)? {
            return Ok(Outcome::Unsupported);
        }
        self.fallocate(ALLOCATE, file, flags, range)
    }

    /// Zeroes whole blocks by the device and the edges by writing them.
    fn zero_device(
        &self,
        target: Target<'_>,
        range: HostRange,
        provision: Provision,
        fast: bool,
    ) -> io::Result<()> {
        let device = target.file;
        // Before the kernel finds out that a device cannot punch, it drops what is in memory of the range, unwritten bytes
        // too, and zeroes the parts of pages at its ends. All of it is to be there when this is refused.
        let unsure = provision == Provision::Unmap
            && fast
            && !self.lacks(PUNCH)
            && !self.punches.load(Ordering::Relaxed)
            && target.sync.is_some();
        let mut block_len = blkdev::logical_block_len(device);
        if unsure {
            block_len = block_len.max(rustix::param::page_size() as u64);
        }
        let Some(inside) = aligned_inside(range, block_len) else {
            return write_zeroes(target, range);
        };
        let mut outcome = Outcome::Unsupported;
        if provision == Provision::Unmap {
            if unsure {
                target.sync.map_or(Ok(()), |sync| sync())?;
            }
            // On devices the kernel promises zeroes, and not to write them itself (block/fops.c).
            outcome = self.punch(device, inside)?;
            if let Outcome::Done = outcome {
                self.punches.store(true, Ordering::Relaxed);
            }
        }
        if let Outcome::Unsupported = outcome {
            if fast {
                return Err(Errno::OPNOTSUPP.into());
            }
            if let Outcome::Unsupported = self.attempt(ZERO_OUT, || blkdev::zero(device, inside))? {
                write_zeroes(target, inside)?;
            }
        }
        let behind = inside.end();
        write_zeroes(target, between(range.at(), inside.at()))?;
        write_zeroes(target, between(behind, range.end()))
    }

    fn punch(&self, file: BorrowedFd<'_>, range: HostRange) -> io::Result<Outcome> {
        self.fallocate(PUNCH, file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
    }

    fn fallocate(
        &self,
        ability: u8,
        file: BorrowedFd<'_>,
        flags: FallocateFlags,
        range: HostRange,
    ) -> io::Result<Outcome> {
        self.attempt(ability, || rustix::fs::fallocate(file, flags, range.at().0, range.len()))
    }

    fn lacks(&self, ability: u8) -> bool {
        self.unsupported.load(Ordering::Relaxed) & ability != 0
    }

    fn attempt(&self, ability: u8, call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<Outcome> {
        if self.lacks(ability) {
            return Ok(Outcome::Unsupported);
        }
        match retry(call) {
            Ok(()) => Ok(Outcome::Done),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => {
                self.unsupported.fetch_or(ability, Ordering::Relaxed);
                Ok(Outcome::Unsupported)
            }
            // This range cannot be done this way; another one may.
            Err(Errno::INVAL) => Ok(Outcome::Unsupported),
            Err(error) => Err(error.into()),
        }
    }
}

/// Zeroes the range by writing.
fn write_zeroes(target: Target<'_>, range: HostRange) -> io::Result<()> {
    let mut at = range.at().0;
    while at < range.end().0 {
        let len = usize::try_from(range.end().0 - at).unwrap_or(ZEROES_LEN).min(ZEROES_LEN);
        (target.write)(ZEROES.0.get(..len).unwrap_or_default(), HostOffset(at))?;
        at += len as u64;
    }
    Ok(())
}

/// The part of the range below `len`.
fn clip(range: HostRange, len: u64) -> HostRange {
    between(range.at(), HostOffset(range.end().0.min(len)))
}

/// The whole blocks inside the range, if there are any.
fn aligned_inside(range: HostRange, block_len: u64) -> Option<HostRange> {
    let start = range.at().0.checked_next_multiple_of(block_len)?;
    let end = range.end().0 - range.end().0 % block_len;
    (start < end).then(|| between(HostOffset(start), HostOffset(end)))
}

/// From `start` to `end`; empty if that is not behind it.
fn between(start: HostOffset, end: HostOffset) -> HostRange {
    let empty = HostRange::default();
    HostRange::new(start, end.0.saturating_sub(start.0)).unwrap_or(empty)
}

#[cfg(all(test, not(shuttle)))]
#[allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::fd::AsFd;

    /// Zeroes a file as a device; counts syncs, each of which has this result.
    fn zero(room: &Room, fast: bool, syncs: &Cell<u32>, result: Option<Errno>) -> io::Result<()> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let sync = || {
            syncs.set(syncs.get() + 1);
            result.map_or(Ok(()), |errno| Err(errno.into()))
        };
        let target = Target { file: file.as_fd(), len: 8192, write: &|_, _| Ok(()), sync: Some(&sync) };
        room.zero(target, HostRange::new(HostOffset(0), 8192).unwrap(), Provision::Unmap, fast)
    }

    #[test]
    fn what_may_be_refused_comes_behind_a_sync_until_a_device_has_been_seen_to_do_it() {
        let (room, syncs) = (Room::new(StorageKind::BlockDevice), Cell::new(0));
        assert!(zero(&room, true, &syncs, Some(Errno::IO)).is_err());
        assert_eq!((syncs.get(), room.punches.load(Ordering::Relaxed)), (1, false), "nothing was done");
        zero(&room, true, &syncs, None).unwrap();
        assert_eq!((syncs.get(), room.punches.load(Ordering::Relaxed)), (2, true));
        zero(&room, true, &syncs, None).unwrap();
        assert_eq!(syncs.get(), 2);
    }

    #[test]
    fn what_is_refused_or_written_in_the_end_needs_no_sync() {
        let (room, syncs) = (Room::new(StorageKind::BlockDevice), Cell::new(0));
        room.unsupported.store(PUNCH, Ordering::Relaxed);
        assert_eq!(zero(&room, true, &syncs, None).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        zero(&Room::new(StorageKind::BlockDevice), false, &syncs, None).unwrap();
        assert_eq!(syncs.get(), 0);
    }
}
