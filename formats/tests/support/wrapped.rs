//! A storage around another one, with a say in what gets through.

use std::io;

use nbd_img_formats::storage::{Operation, Queue, Run, Storage, StorageFacts, TryRead};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::sync::atomic::{AtomicU64, Ordering};
use nbd_img_formats::{Durability, HostOffset, HostRange, Provision};

/// What gets through. By default all of it.
pub trait Hooks: Send + Sync + 'static {
    /// Whether this sync is answered without being done; FUA writes are plain ones then.
    fn drops_sync(&self) -> bool {
        false
    }

    /// Whether the file may be as long as this.
    fn allows_len(&self, _len: u64) -> bool {
        true
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

/// A file system with room for a file of this length: ENOSPC behind it.
pub struct Limited(pub AtomicU64);

impl Hooks for Limited {
    fn allows_len(&self, len: u64) -> bool {
        len <= self.0.load(Ordering::Relaxed)
    }

    fn closes(&self) -> bool {
        false
    }
}

/// The storage.
pub struct Wrapped<H> {
    inner: Arc<dyn Storage>,
    pub hooks: H,
}

impl<H: Hooks> Wrapped<H> {
    /// `inner` as far as `hooks` lets it.
    pub fn new(inner: Arc<dyn Storage>, hooks: H) -> Arc<Self> {
        Arc::new(Wrapped { inner, hooks })
    }

    fn check_len(&self, len: u64) -> io::Result<()> {
        if self.hooks.allows_len(len) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
    }
}

impl<H: Hooks> Storage for Wrapped<H> {
    fn facts(&self) -> &StorageFacts {
        self.inner.facts()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.inner.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        self.inner.pread(buf, at)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        self.inner.try_pread(buf, at)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        self.check_len(at.0 + buf.len() as u64)?;
        if durability.is_fua() {
            self.inner.pwrite(buf, at, Durability::Later)?;
            return self.sync();
        }
        self.inner.pwrite(buf, at, durability)
    }

    fn sync(&self) -> io::Result<()> {
        if self.hooks.drops_sync() { Ok(()) } else { self.inner.sync() }
    }

    fn is_failed(&self) -> bool {
        self.inner.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        if provision == Provision::Allocate {
            self.check_len(range.end().0)?;
        }
        self.inner.zero(range, provision, fast)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.inner.discard(range)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_len(len)?;
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
