//! The raw driver: the file is the disk, byte for byte.
//!
//! It adds three things to its storage: a size rounded up to sectors, the refusal to turn a disk whose
//! format was only guessed into an image of another format, and an end once a sync has failed.

mod guard;

use std::path::Path;

use crate::address::{GuestRange, HostOffset, HostRange};
use crate::driver::{BlockDriver, Facts, Format, State, ZeroRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::info::ImageInfo;
use crate::mover::{check_writable, checked_range, storage_error};
use crate::plan::{MapMode, Piece, Place, ReadPlan, SlowReason, StorageId, WritePlan};
use crate::storage::Provision;
use crate::storage::{Durability, Storage, StorageKind};
use crate::sync::Arc;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guard::MagicGuard;
pub use guard::MagicTest;

/// What sizes are rounded up to: NBD clients and guests count in sectors, and QEMU does the same.
const SECTOR_LEN: u64 = 512;

/// The unit that is served best: a page of the page cache. Our choice.
const BLOCK_PREFERRED_LEN: u32 = 4096;

/// How to serve a raw disk.
#[derive(Clone, Copy, Debug)]
pub struct RawOptions {
    /// Serve the file to the byte instead of rounding its size up to 512.
    pub exact_size: bool,
    /// Whether a discard gives room back; else it does nothing.
    pub discard: bool,
    /// What to call it: [`Format::Raw`], or [`Format::MmapRaw`] when the storage is mapped.
    pub format: Format,
    /// When the format was found by probing: tells the format that a disk's first bytes belong to.
    /// What would make it answer is refused with [`ErrorKind::Denied`].
    pub refuse_magic: Option<MagicTest>,
}

impl Default for RawOptions {
    fn default() -> Self {
        RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None }
    }
}

/// A disk that lies in its storage as it is.
pub struct RawDriver {
    facts: Facts,
    storages: [Arc<dyn Storage>; 1],
    exact_size: bool,
    size: AtomicU64,
    /// Where the storage ends. What the disk has behind it reads as zeroes. Never beyond `size`, and changed only
    /// under `growing`, as that is.
    data_end: AtomicU64,
    growing: Mutex<()>,
    guard: Option<MagicGuard>,
    discard: bool,
    closed: AtomicBool,
}

impl RawDriver {
    /// A driver of the disk in `storage`, writable if that is.
    pub fn open(storage: Arc<dyn Storage>, options: RawOptions) -> Result<Arc<RawDriver>> {
        let len = storage
            .len()
            .map_err(|e| storage_error(&storage, "cannot find out the size", HostOffset(0), e))?;
        let facts = storage.facts();
        let size = size_of_len(len, options.exact_size || !facts.grows)?;
        Ok(Arc::new(RawDriver {
            facts: Facts {
                format: options.format,
                writable: facts.writable,
                block_min_len: facts.block_len,
                block_preferred_len: BLOCK_PREFERRED_LEN.max(facts.block_len),
                fast_zero: facts.writable,
                sendable: true,
                holes_in_storage: facts.kind != StorageKind::BlockDevice,
            },
            exact_size: options.exact_size,
            size: AtomicU64::new(size),
            data_end: AtomicU64::new(len),
            growing: Mutex::new(()),
            guard: options.refuse_magic.filter(|_| facts.writable).map(MagicGuard::new),
            discard: options.discard,
            closed: AtomicBool::new(false),
            storages: [storage],
        }))
    }

    fn storage(&self) -> &Arc<dyn Storage> {
        &self.storages[0]
    }

    fn data_end(&self) -> u64 {
        self.data_end.load(Ordering::Acquire)
    }

    fn check_open(&self) -> Result<()> {
        match self.state() {
            State::Live | State::Failed => Ok(()),
            State::Closed => Err(Error::new(ErrorKind::Failed, "the image has been closed")),
        }
    }

    /// Makes the storage as long as the disk. It must not have become shorter meanwhile: making it
    /// longer again would turn lost data into zeroes.
    fn extend(&self) -> Result<()> {
        let _growing = self.growing.lock();
        let size = self.size();
        if self.data_end() >= size {
            return Ok(());
        }
        self.lengthen(size)?;
        self.data_end.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes the storage at least this long, with zeroes. With `growing` held.
    fn lengthen(&self, size: u64) -> Result<()> {
        let len = self.checked_len(self.data_end())?;
        if len >= size {
            return Ok(());
        }
        let storage = self.storage();
        let fail = |e| storage_error(storage, "cannot make the file longer", HostOffset(len), e);
        storage.set_len(size).map_err(fail)?;
        if !storage.facts().new_space_is_zero {
            let new = HostRange::new(HostOffset(len), size - len).unwrap_or_default();
            storage.zero(new, Provision::Keep, false).map_err(fail)?;
        }
        Ok(())
    }

    /// The disk's size is that of its file or device, which others have changed.
    fn follow(&self, len: u64, size: u64) {
        // What lies behind the end of the disk is never looked for: that end comes first when it becomes nearer.
        if size < self.size() {
            self.size.store(size, Ordering::Release);
        }
        self.data_end.store(len.min(size), Ordering::Release);
        self.size.store(size, Ordering::Release);
    }

    /// Changes the length of the file. With `growing` held.
    fn change_len(&self, size: u64) -> Result<()> {
        let storage = self.storage();
        let old_size = self.size();
        if size >= old_size {
            let len = self.checked_len(self.data_end())?;
            self.lengthen(size).and_then(|()| self.sync_len()).inspect_err(|_| self.take_back(len, size))?;
            self.data_end.store(size, Ordering::Release);
            self.size.store(size, Ordering::Release);
            return Ok(());
        }
        let old_end = self.data_end();
        // Nor would this make up for what was lost: see `extend`.
        self.checked_len(size.min(old_end))?;
        self.size.store(size, Ordering::Release);
        self.data_end.store(size.min(old_end), Ordering::Release);
        let fail = |e| storage_error(storage, "cannot make the file shorter", HostOffset(size), e);
        if let Err(error) = storage.set_len(size).map_err(fail) {
            self.data_end.store(old_end, Ordering::Release);
            self.size.store(old_size, Ordering::Release);
            return Err(error);
        }
        self.data_end.store(size, Ordering::Release);
        self.sync_len()
    }

    /// After a growth that failed: the file is not longer than `len` any more, for its length is the size of the disk to
    /// whoever opens it next. What others have made of it stays.
    fn take_back(&self, len: u64, size: u64) {
        let storage = self.storage();
        let result = match storage.len() {
            Ok(now) if now == size && now > len => storage.set_len(len),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            let path = storage.facts().path.display().to_string();
            tracing::warn!(path, %error, "the file stays longer than the disk, by what could not be made durable");
        }
    }

    fn sync_len(&self) -> Result<()> {
        let storage = self.storage();
        let fail = |e| storage_error(storage, "cannot make the new length durable", HostOffset(0), e);
        storage.sync().map_err(fail)
    }

    /// The storage's length, which must be at least `needed`.
    fn checked_len(&self, needed: u64) -> Result<u64> {
        let storage = self.storage();
        let len = storage
            .len()
            .map_err(|e| storage_error(storage, "cannot find out the size", HostOffset(0), e))?;
        if len >= needed {
            return Ok(len);
        }
        Err(Error::new(ErrorKind::Io, "the file has shrunk while it was served")
            .with_path(&storage.facts().path)
            .with_offset(len))
    }

    /// The part of the range that the storage has, in its own addresses.
    fn stored_part(&self, range: GuestRange) -> HostRange {
        let stored = range.prefix(self.data_end().saturating_sub(range.offset()));
        HostRange::new(HostOffset(stored.offset()), stored.len()).unwrap_or_default()
    }

    fn map_stored(&self, stored: HostRange, plan: &mut ReadPlan) {
        let mut at = stored.at();
        while at < stored.end() {
            let rest = stored.end().0 - at.0;
            // A storage that cannot tell, or that has just become shorter, has data: never wrong.
            let (len, hole) = match self.storage().run_at(at) {
                Ok(run) if run.len > 0 => (run.len.min(rest), run.hole),
                Ok(_) | Err(_) => (rest, false),
            };
            let place = if hole { Place::Zero { allocated: false } } else { data_at(at) };
            plan.pieces.push(Piece { len, place, depth: 1 });
            at = HostOffset(at.0 + len);
        }
    }

    fn zero_stored(&self, stored: HostRange, request: ZeroRequest) -> Result<()> {
        if stored.is_empty() {
            return Ok(());
        }
        self.checked_len(stored.end().0)?;
        let storage = self.storage();
        storage.zero(stored, request.provision, request.fast).map_err(|e| {
            if request.fast && e.raw_os_error() == Some(libc::EOPNOTSUPP) {
                let what = "the file system or device cannot zero the range without writing it";
                return Error::new(ErrorKind::WouldBeSlow, what).with_path(&storage.facts().path);
            }
            storage_error(storage, "cannot zero", stored.at(), e)
        })
    }

    fn flush_if_fua(&self, durability: Durability) -> Result<()> {
        if durability.is_fua() { self.flush() } else { Ok(()) }
    }
}

impl BlockDriver for RawDriver {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn stored_size(&self) -> Result<u64> {
        self.check_open()?;
        size_of_len(self.checked_len(0)?, self.exact_size || !self.storage().facts().grows)
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_open()?;
        if self.facts.format == Format::MmapRaw && size != self.size() {
            let what = "a mapped disk (mmap-raw) keeps its size while it is served; serve it as raw";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let grows = self.storage().facts().grows;
        let _growing = self.growing.lock();
        let len = self.checked_len(0)?;
        if self.storage().is_failed() {
            // Its length may be one that could not be made durable.
            check_writable(self)?;
        }
        if size == size_of_len(len, self.exact_size || !grows)? && size != self.size() {
            self.follow(len, size);
            return Ok(());
        }
        check_writable(self)?;
        if size == self.size() {
            return Ok(());
        }
        if !grows {
            let text = format!(
                "a block device has the size that it has, {len} bytes now; leave SIZE out to serve that"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if len > self.size() {
            let text = format!(
                "the file has {len} bytes by now, more than the disk of {}; leave SIZE out to serve that",
                self.size()
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        self.change_len(size)
    }

    fn state(&self) -> State {
        if self.closed.load(Ordering::Acquire) {
            State::Closed
        } else if self.storage().is_failed() {
            State::Failed
        } else {
            State::Live
        }
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn info(&self) -> Result<ImageInfo> {
        let storage = self.storage();
        let fail = |e| storage_error(storage, "cannot find out the size", HostOffset(0), e);
        Ok(ImageInfo {
            path: Path::new(&storage.facts().path).to_owned(),
            format: self.facts.format.to_string(),
            virtual_size: self.size(),
            file_len: storage.len().map_err(fail)?,
            allocated_len: storage.allocated_len().map_err(fail)?,
            ..ImageInfo::default()
        })
    }

    fn map_read(&self, range: GuestRange, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
        plan.reset();
        self.check_open()?;
        let range = checked_range(self, range.offset(), range.len())?;
        let stored = self.stored_part(range);
        match mode {
            MapMode::Holes if self.facts.holes_in_storage => self.map_stored(stored, plan),
            MapMode::Holes | MapMode::Try | MapMode::Wait => {
                plan.pieces.push(Piece { len: stored.len(), place: data_at(stored.at()), depth: 1 });
            }
        }
        let tail = range.len() - stored.len();
        plan.pieces.push(Piece { len: tail, place: Place::Zero { allocated: false }, depth: 1 });
        Ok(())
    }

    fn read_slow(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.pread(offset, buf)
    }

    fn prepare_write(&self, range: GuestRange, _mode: MapMode, plan: &mut WritePlan) -> Result<()> {
        plan.reset();
        check_writable(self)?;
        let range = checked_range(self, range.offset(), range.len())?;
        // All of it: a refused write should not have been half done.
        let watched = self.guard.as_ref().is_some_and(|guard| guard.watches(range.offset()));
        let place = if watched || range.end() > self.data_end() {
            Place::Slow(SlowReason::Allocate)
        } else {
            data_at(HostOffset(range.offset()))
        };
        plan.pieces.push(Piece { len: range.len(), place, depth: 1 });
        plan.durable_in_place = true;
        Ok(())
    }

    fn finish_write(&self, plan: &mut WritePlan, _written: bool) -> Result<()> {
        plan.reset();
        Ok(())
    }

    fn write_slow(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_writable(self)?;
        let range = checked_range(self, offset, buf.len() as u64)?;
        let storage = self.storage();
        let write = || {
            if range.end() > self.data_end() {
                self.extend()?;
            }
            storage
                .pwrite(buf, HostOffset(offset), Durability::Later)
                .map_err(|e| storage_error(storage, "cannot write", HostOffset(offset), e))
        };
        match &self.guard {
            Some(guard) if guard.watches(offset) => guard.check_write(storage, range, Some(buf), write),
            Some(_) | None => write(),
        }
    }

    fn write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<()> {
        check_writable(self)?;
        let range = checked_range(self, range.offset(), range.len())?;
        let zero = || {
            // Behind the storage's end there are zeroes already, but no room.
            if request.provision == Provision::Allocate && range.end() > self.data_end() {
                self.extend()?;
            }
            self.zero_stored(self.stored_part(range), request)
        };
        match &self.guard {
            Some(guard) if guard.watches(range.offset()) => {
                guard.check_write(self.storage(), range, None, zero)?;
            }
            Some(_) | None => zero()?,
        }
        self.flush_if_fua(request.durability)
    }

    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        check_writable(self)?;
        let range = checked_range(self, range.offset(), range.len())?;
        // The watched bytes are left alone: what they would become is not known beforehand.
        let watched = self.guard.as_ref().map_or(0, |guard| guard.watched_len(range.offset()));
        let stored = self.stored_part(range.skip(watched));
        if self.discard && !stored.is_empty() {
            let storage = self.storage();
            storage.discard(stored).map_err(|e| storage_error(storage, "cannot discard", stored.at(), e))?;
        }
        self.flush_if_fua(durability)
    }

    fn flush(&self) -> Result<()> {
        self.check_open()?;
        if !self.facts.writable {
            return Ok(());
        }
        check_writable(self)?;
        let storage = self.storage();
        let fail = |e| storage_error(storage, "cannot make the data durable", HostOffset(0), e);
        storage.sync().map_err(fail)
    }

    fn cache(&self, range: GuestRange) -> Result<()> {
        self.check_open()?;
        let stored = self.stored_part(checked_range(self, range.offset(), range.len())?);
        let storage = self.storage();
        storage.prefetch(stored).map_err(|e| storage_error(storage, "cannot prefetch", stored.at(), e))
    }

    fn close(&self) -> Result<()> {
        let flushed = match self.state() {
            State::Closed => return Ok(()),
            State::Live => self.flush(),
            State::Failed => Err(Error::new(
                ErrorKind::Failed,
                "closed after a failed sync: what was written before it may be lost",
            )
            .with_path(&self.storage().facts().path)),
        };
        if self.closed.swap(true, Ordering::AcqRel) {
            return flushed;
        }
        let storage = self.storage();
        let closed = storage.close().map_err(|e| storage_error(storage, "cannot close", HostOffset(0), e));
        flushed.and(closed)
    }
}

/// The size of a disk in a storage of this length.
fn size_of_len(len: u64, exact: bool) -> Result<u64> {
    // What cannot grow cannot take a write behind its end, so it is never rounded.
    if exact {
        return Ok(len);
    }
    len.checked_next_multiple_of(SECTOR_LEN)
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "the file is too long"))
}

/// A raw disk's bytes lie where the guest thinks.
fn data_at(at: HostOffset) -> Place {
    Place::Data { storage: StorageId(0), at }
}
