//! A storage around another one, with a say in what gets through.

use std::collections::BTreeSet;
use std::io;

use nbd_img_formats::storage::{Operation, Queue, Run, Storage, StorageFacts, TryRead};
use nbd_img_formats::sync::atomic::{AtomicU64, Ordering};
use nbd_img_formats::sync::{Arc, Mutex};
use nbd_img_formats::{Durability, HostOffset, HostRange, Provision};

/// What gets through. By default all of it.
pub trait Hooks: Send + Sync + 'static {
    /// Whether this sync is answered without being done; FUA writes are plain ones then.
    fn drops_sync(&self) -> bool {
        false
    }

    /// Whether what lies there can be read.
    fn reads(&self, _at: u64, _len: u64) -> bool {
        true
    }

    /// Whether there is room for the range.
    fn takes_room(&self, _at: u64, _len: u64) -> bool {
        true
    }

    /// The room of the range has been given back.
    fn gives_room(&self, _at: u64, _len: u64) {}

    /// Called in the middle of what takes time on a real device.
    fn pauses(&self) {}

    /// Whether the storage is said to be past the page cache.
    fn is_direct(&self) -> bool {
        false
    }

    /// Whether a close gets through.
    fn closes(&self) -> bool {
        true
    }
}

/// For an image that is opened again in the same storage.
pub struct NeverClosed;

impl Hooks for NeverClosed {
    fn closes(&self) -> bool {
        false
    }
}

/// Past the page cache, as far as anybody can tell.
pub struct PastTheCache;

impl Hooks for PastTheCache {
    fn is_direct(&self) -> bool {
        true
    }
}

/// A device that now and then is slow, so that others get in between.
pub struct Dawdling(pub AtomicU64);

impl Hooks for Dawdling {
    fn pauses(&self) {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        let sleep = |micros| std::thread::sleep(std::time::Duration::from_micros(micros));
        match (number % 61, number % 7) {
            // Long enough for a whole commit of somebody else.
            (0, _) => sleep(2000),
            (_, 0) => sleep(50),
            (_, 1 | 2) => std::thread::yield_now(),
            _ => {}
        }
    }

    fn closes(&self) -> bool {
        false
    }
}

/// A file system with room for so many bytes in the file, counted where something was written: holes take
/// none, and making the file longer takes none, but the first write into a hole does.
pub struct Limited {
    room: AtomicU64,
    written: Mutex<BTreeSet<u64>>,
}

/// Bytes that a file system gives or takes at a time.
const BLOCK_LEN: u64 = 512;

impl Limited {
    /// A file of `len` bytes without holes, and room for `more`.
    pub fn new(len: u64, more: u64) -> Self {
        let blocks = len.div_ceil(BLOCK_LEN);
        Limited {
            room: AtomicU64::new(blocks * BLOCK_LEN + more),
            written: Mutex::new((0..blocks).collect()),
        }
    }

    /// There is room again.
    pub fn make_room(&self) {
        self.room.store(u64::MAX, Ordering::Relaxed);
    }
}

impl Hooks for Limited {
    fn takes_room(&self, at: u64, len: u64) -> bool {
        let mut written = self.written.lock();
        for block in at / BLOCK_LEN..(at + len).div_ceil(BLOCK_LEN) {
            let full = (written.len() as u64 + 1) * BLOCK_LEN > self.room.load(Ordering::Relaxed);
            if full && !written.contains(&block) {
                return false;
            }
            written.insert(block);
        }
        true
    }

    fn gives_room(&self, at: u64, len: u64) {
        let mut written = self.written.lock();
        for block in at.div_ceil(BLOCK_LEN)..(at + len) / BLOCK_LEN {
            written.remove(&block);
        }
    }

    fn closes(&self) -> bool {
        false
    }
}

/// The storage.
pub struct Wrapped<H> {
    inner: Arc<dyn Storage>,
    facts: StorageFacts,
    pub hooks: H,
}

impl<H: Hooks> Wrapped<H> {
    /// `inner` as far as `hooks` lets it.
    pub fn new(inner: Arc<dyn Storage>, hooks: H) -> Arc<Self> {
        let facts = inner.facts().clone();
        let facts = StorageFacts { direct: facts.direct || hooks.is_direct(), ..facts };
        Arc::new(Wrapped { inner, facts, hooks })
    }

    fn check_room(&self, at: u64, len: u64) -> io::Result<()> {
        if self.hooks.takes_room(at, len) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
    }
}

impl<H: Hooks> Storage for Wrapped<H> {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.inner.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        self.hooks.pauses();
        if !self.hooks.reads(at.0, buf.len() as u64) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let got = self.inner.pread(buf, at);
        self.hooks.pauses();
        got
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.hooks.pauses();
        self.inner.try_pread(buf, at)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        self.check_room(at.0, buf.len() as u64)?;
        self.hooks.pauses();
        if durability.is_fua() {
            self.inner.pwrite(buf, at, Durability::Later)?;
            return self.sync();
        }
        self.inner.pwrite(buf, at, durability)
    }

    fn sync(&self) -> io::Result<()> {
        self.hooks.pauses();
        if self.hooks.drops_sync() { Ok(()) } else { self.inner.sync() }
    }

    fn is_failed(&self) -> bool {
        self.inner.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        if provision == Provision::Unmap {
            self.hooks.gives_room(range.at().0, range.len());
        } else {
            self.check_room(range.at().0, range.len())?;
        }
        self.inner.zero(range, provision, fast)
    }

    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        self.inner.reserve(range)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.hooks.gives_room(range.at().0, range.len());
        self.inner.discard(range)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        self.inner.run_at(at)
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        self.inner.prefetch(range)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        Arc::clone(&self.inner).submit(operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        if self.hooks.closes() { self.inner.close() } else { Ok(()) }
    }
}
