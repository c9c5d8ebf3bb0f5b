//! [`MemoryStorage`]: bytes in memory, for tests. It is an anonymous file, so that it can be mapped.
//!
//! It can be made to behave like a device with stale content, so that nothing above relies on zeroes
//! that only a file gives.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use super::calls::{pread_full, pwrite_all, retry};
use super::room::{Room, Target};
use super::{Durability, InPlace, Operation, Queue, Run, Storage, StorageFacts, StorageKind, TryRead};
use super::{engine, place};
use crate::address::{HostOffset, HostRange};
use crate::storage::Provision;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

/// What unused space of a poisoned storage reads as.
pub const POISON: u8 = 0xdb;

/// What a memory storage is to be like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryOptions {
    /// Bytes at first.
    pub len: u64,
    /// Whether writes behind the end make it longer; else they fail with ENOSPC.
    pub grows: bool,
    /// Fill space that is new or was given back with [`POISON`] instead of zeroes.
    pub poisoned: bool,
}

/// Bytes in memory.
pub struct MemoryStorage {
    facts: StorageFacts,
    file: OwnedFd,
    room: Room,
    poisoned: bool,
    closed: AtomicBool,
}

impl MemoryStorage {
    /// `len` zero bytes; grows.
    pub fn new(len: u64) -> io::Result<Arc<Self>> {
        MemoryStorage::with(MemoryOptions { len, grows: true, poisoned: false })
    }

    /// A storage with a copy of `bytes`; grows.
    pub fn copy_of(bytes: &[u8]) -> io::Result<Arc<Self>> {
        let storage = MemoryStorage::new(0)?;
        storage.pwrite(bytes, HostOffset(0), Durability::Later)?;
        Ok(storage)
    }

    /// A storage as described.
    pub fn with(options: MemoryOptions) -> io::Result<Arc<Self>> {
        let file = rustix::fs::memfd_create("nbd-img-memory", MemfdFlags::CLOEXEC)?;
        let storage = MemoryStorage {
            facts: StorageFacts {
                path: PathBuf::from("(memory)"),
                kind: StorageKind::Memory,
                writable: true,
                grows: options.grows,
                new_space_is_zero: !options.poisoned,
                direct: false,
                block_len: 1,
                reads: InPlace::Always,
                writes: InPlace::Always,
            },
            file,
            room: Room::new(StorageKind::Memory),
            poisoned: options.poisoned,
            closed: AtomicBool::new(false),
        };
        storage.grow(0, options.len)?;
        Ok(Arc::new(storage))
    }

    fn check_open(&self) -> io::Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(Errno::BADF.into()) } else { Ok(()) }
    }

    fn poison(&self, start: u64, end: u64) -> io::Result<()> {
        const CHUNK_LEN: u64 = 64 << 10;
        let chunk = [POISON; CHUNK_LEN as usize];
        let mut at = start;
        while at < end {
            let len = CHUNK_LEN.min(end - at);
            let bytes = chunk.get(..usize::try_from(len).unwrap_or_default()).unwrap_or_default();
            pwrite_all(self.file.as_fd(), bytes, HostOffset(at))?;
            at += len;
        }
        Ok(())
    }

    fn grow(&self, from: u64, to: u64) -> io::Result<()> {
        retry(|| rustix::fs::ftruncate(&self.file, to))?;
        if self.poisoned { self.poison(from, to) } else { Ok(()) }
    }
}

impl AsFd for MemoryStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for MemoryStorage {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or_default())
    }

    fn allocated_len(&self) -> io::Result<u64> {
        place::allocated_len(self.file.as_fd())
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        self.check_open()?;
        pread_full(self.file.as_fd(), buf, at)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.pread(buf, at).map(TryRead::Done)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, _durability: Durability) -> io::Result<()> {
        self.check_open()?;
        let end = at.checked_add(buf.len() as u64).ok_or(Errno::FBIG)?;
        let len = self.len()?;
        if end.0 > len && !self.facts.grows {
            return Err(Errno::NOSPC.into());
        }
        if at.0 > len {
            self.grow(len, at.0)?;
        }
        pwrite_all(self.file.as_fd(), buf, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.check_open()
    }

    fn is_failed(&self) -> bool {
        false
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        self.check_open()?;
        let len = self.len()?;
        if !self.facts.grows && range.end().0 > len && provision == Provision::Allocate {
            return Err(Errno::NOSPC.into());
        }
        let file = self.file.as_fd();
        let write = |bytes: &[u8], at| pwrite_all(file, bytes, at);
        self.room.zero(Target { file, len, write: &write, sync: None }, range, provision, fast)
    }

    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        self.check_open()?;
        self.room.reserve(self.file.as_fd(), range)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.check_open()?;
        let len = self.len()?;
        if self.poisoned {
            return self.poison(range.at().0, range.end().0.min(len));
        }
        self.room.discard(self.file.as_fd(), range, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_open()?;
        let now = self.len()?;
        if !self.facts.grows && len != now {
            return Err(Errno::OPNOTSUPP.into());
        }
        self.grow(now, len)
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        place::run_at(self.file.as_fd(), at, self.len()?)
    }

    fn prefetch(&self, _range: HostRange) -> io::Result<()> {
        Ok(())
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        engine::submit(&self, operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        self.closed.store(true, Ordering::Release);
        Ok(())
    }
}
