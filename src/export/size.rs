//! The size of an export, which may change while it is served: who was told which one, and how it changes.
//!
//! NBD has no message for a new size. A connection keeps the one that it was told, so what it may use must stay there
//! as long as it does, and as long as requests of it are on their way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nbd_img_formats::open::{SizeChange, check_shrink};
use nbd_img_formats::sync::Mutex;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{Error, ErrorKind, Result};

use super::{Export, window};

/// The size of an export.
pub(super) struct LiveSize {
    /// Read with every request. Changed only with `told` locked.
    now: AtomicU64,
    /// How many connections were told each size.
    told: Mutex<BTreeMap<u64, usize>>,
    /// One at a time changes the disk.
    changing: Mutex<()>,
}

impl LiveSize {
    pub(super) fn new(size: u64) -> Self {
        LiveSize { now: AtomicU64::new(size), told: Mutex::default(), changing: Mutex::default() }
    }

    pub(super) fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn set(&self, size: u64) {
        let _told = self.told.lock();
        self.now.store(size, Ordering::Relaxed);
    }

    /// A connection that was told `size` has ended.
    fn forget(&self, size: u64) {
        let mut told = self.told.lock();
        if let Some(count) = told.get_mut(&size) {
            *count -= 1;
            if *count == 0 {
                told.remove(&size);
            }
        }
    }

    /// From here on nobody is told more than `size`. Fails, changing nothing, if somebody was.
    fn lower(&self, size: u64) -> Result<()> {
        let told = self.told.lock();
        let connections: usize = told.range(size.saturating_add(1)..).map(|(_, count)| count).sum();
        if connections > 0 {
            let text = format!(
                "{connections} connections were told a larger size and may use all of it; the disk can become \
                 smaller when they are gone"
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        self.now.store(size, Ordering::Relaxed);
        Ok(())
    }
}

/// A connection's claim on an export: as long as this lives, the bytes that the client was told of stay there. To be
/// dropped after everything else of the connection; where the export is the connection's own, that ends it.
pub struct Served {
    /// Gone only while it is dropped.
    export: Option<Arc<Export>>,
    size: u64,
}

impl Drop for Served {
    fn drop(&mut self) {
        let Some(export) = self.export.take() else { return };
        export.size.forget(self.size);
        if export.is_own {
            let workers = Arc::clone(export.workers());
            // Closing a large file that has no name takes the file system its time.
            drop(workers.spawn(Lane::Write, Box::new(move || drop(export))));
        }
    }
}

/// What became of a served disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    /// Bytes that the disk had.
    pub from: u64,
    /// Bytes that it has.
    pub to: u64,
    /// Bytes that clients see of it who come now.
    pub export: u64,
}

impl Export {
    /// Notes that a client is told that the export has `size` bytes. `None`: it has become smaller since that was
    /// looked up.
    pub fn serve(self: &Arc<Self>, size: u64) -> Option<Served> {
        let mut told = self.size.told.lock();
        if size > self.size.now() {
            return None;
        }
        *told.entry(size).or_default() += 1;
        Some(Served { export: Some(Arc::clone(self)), size })
    }

    /// Gives the disk another size, or without `change` the one that its file or device has by now; smaller only if
    /// `shrink` allows it and no connection was told a larger one. Waits for the disk; when it returns, the size is
    /// durable, and clients who come see it.
    pub fn resize(&self, change: Option<SizeChange>, shrink: bool) -> Result<Resized> {
        self.resize_disk(change, shrink).map_err(|error| error.with_path(&self.spec.path))
    }

    fn resize_disk(&self, change: Option<SizeChange>, shrink: bool) -> Result<Resized> {
        if self.per_client {
            let text =
                "each client has a disk of its own (--temporary=per-client), and none of them is resized";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if self.read_only && change.is_some() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the export is read-only, so its disk keeps its size",
            ));
        }
        // Nobody waits here: the threads are also those of writes and flushes.
        let Some(_changing) = self.size.changing.try_lock() else {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the disk's size is being changed already; try later",
            ));
        };
        let from = self.driver.size();
        let to = match change {
            Some(change) => change.target(from, shrink)?,
            None => {
                let to = self.driver.stored_size()?;
                check_shrink(from, to, shrink)?;
                to
            }
        };
        let old_size = self.size();
        let (_, size) = window(&self.spec, to)?;
        if size < old_size {
            self.size.lower(size)?;
        }
        // Whoever allows that the end is lost lets an earlier change be finished that could not give its room back.
        let changes = to != from || shrink && change.is_some();
        let resized = if changes { self.driver.resize(to) } else { Ok(()) };
        if let Err(error) = resized {
            // Of a raw file that lost its end and could not be synced, it is no longer the old one.
            self.size.set(window(&self.spec, self.driver.size()).map_or(size, |(_, size)| size));
            return Err(error);
        }
        self.size.set(size);
        tracing::info!(export = %self.name.escape_debug(), from, to, size, "the disk has another size");
        Ok(Resized { from, to, export: size })
    }
}
