//! Writing an image: allocation, commit, quarantine, zeroes, discard, repair.
//!
//! | module | what is in it |
//! |---|---|
//! | `pins`, `runs` | epochs of plans; sets of clusters |
//! | `refcounts`, `metadata_map`, `allocator` | which clusters are in use, by whom, and handing out others |
//! | `meta` | all that changes, under one lock, and the changes of mappings |
//! | `prepare` | writes that need not wait: plans, claims and their end |
//! | `slow` | writes that must wait: new tables, copy-on-write |
//! | `compress`, `packing` | whole clusters that are written compressed, and where they go |
//! | `subclusters` | the same at the grain of subclusters |
//! | `zero`, `provide` | zeroing and discarding; zeroes with room |
//! | `data_file` | places in an external data file, and giving their room back |
//! | `commit`, `reclaim` | making changes durable in an order that a crash cannot hurt; letting clusters go |
//! | `live_size` | another size for the disk while it is used |
//! | `bitmaps`, `bitmap_bits` | recording changes in dirty bitmaps, and storing these; their bits |
//! | `bitmap_size` | dirty bitmaps of a disk that gets another size while it is used |
//! | `bitmap_change`, `bitmap_header` | adding, removing, ... bitmaps; the header's way to them |
//! | `options` | what is chosen at open |
//! | `begin`, `repair` | what happens to an image that is opened for writing |
//!
//! The invariants, and why they hold, are in the README of this crate.

pub mod allocator;
pub mod begin;
mod bitmap_bits;
pub mod bitmap_change;
mod bitmap_header;
mod bitmap_size;
pub mod bitmaps;
pub mod commit;
mod compress;
pub mod data_file;
pub mod live_size;
pub mod meta;
pub mod metadata_map;
pub mod options;
mod packing;
pub mod pins;
pub mod prepare;
mod provide;
pub mod reclaim;
pub mod refcounts;
mod repair;
mod runs;
pub mod slow;
mod subclusters;
pub mod zero;

use std::ops::{Deref, DerefMut};

use super::compress::Compressing;
use super::driver::Qcow2Driver;
use super::header::{Autoclear, Header, Incompatible};
use super::tables::TableSlice;
use super::types::{DataFile, Geometry};
use crate::address::{GuestRange, HostOffset};
use crate::driver::BlockDriver;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{check_writable, read_exact, storage_error};
use crate::plan::{Pin, PinHolder};
use crate::storage::Durability;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, thread};
use allocator::Need;
use bitmaps::Recorder;
use meta::Meta;
use options::WriteOptions;
use pins::Pins;

/// Where the incompatible features stand in the header (specification).
pub const INCOMPATIBLE_AT: HostOffset = HostOffset(72);
/// Where the autoclear features stand in the header (specification).
pub const AUTOCLEAR_AT: HostOffset = HostOffset(88);
/// Bits of a pin's key that tell its epoch; above them is the number of a planned write.
const KEY_EPOCH_BITS: u32 = 8;
/// Least and most by which the file is made longer at a time; between them it is half of the file.
/// Our choice: rarely enough not to matter, and no more than a sparse tail after a crash.
const GROW_LEN: std::ops::RangeInclusive<u64> = 16 << 20..=256 << 20;

/// What an image that is written has besides one that is read.
pub struct Writer {
    options: WriteOptions,
    /// Whole clusters that are written are compressed.
    compressing: Option<Compressing>,
    geometry: Geometry,
    /// Version 3: the header has feature bits.
    has_features: bool,
    /// So many bytes of memory that changed metadata keeps start a commit.
    held_len_max: u64,
    /// The autoclear bits, and what is left of them with the first change: those whose promise is kept.
    autoclear: (u64, u64),
    /// The header says all that it has to before the first change.
    begun: AtomicBool,
    /// The dirty bitmaps.
    pub(super) bitmaps: Recorder,
    /// A raw data file is shorter than the guest's disk, to be changed before the first change.
    short_data_file: AtomicBool,
    incompatible: u64,
    /// What the metadata was found to contradict itself in at open.
    conflict: Option<String>,
    meta: Mutex<Meta>,
    /// [`MetadataMap::version`](metadata_map::MetadataMap::version), for those without the lock.
    map_version: Arc<AtomicU64>,
    /// Something that somebody may wait for has happened: a claim has ended, a commit is over.
    changed: Condvar,
    pins: Pins,
    /// The last commit that succeeded: `Meta::done_commit` for those without the lock.
    durable: AtomicU64,
    failed: AtomicBool,
    /// Nothing is changed any more. Set with the lock of the metadata held.
    closing: AtomicBool,
    /// One at a time makes the file longer, changes the header, or begins the close.
    file: Mutex<()>,
    /// One at a time changes the size of the disk. Taken before all others.
    resizing: Mutex<()>,
    /// One at a time reads a refcount block. Taken after `file` and before `meta`.
    loading: Mutex<()>,
    /// The file was made longer than it was at open.
    grown: AtomicBool,
}

/// The lock of the metadata. A panic with it held makes the image a failed one.
pub struct MetaGuard<'a> {
    inner: MutexGuard<'a, Meta>,
    failed: &'a AtomicBool,
}

impl Writer {
    /// `repaired`: the header's dirty bit was cleared since the header was read. `tables_len`: what the table cache has
    /// room for.
    fn new(
        header: &Header,
        (options, compressing): (WriteOptions, Option<Compressing>),
        meta: Meta,
        bitmaps: Recorder,
        repaired: bool,
        tables_len: u64,
    ) -> Self {
        let raw = match header.geometry.data_file() {
            DataFile::ExternalRaw => Autoclear::DATA_FILE_RAW,
            DataFile::Internal | DataFile::External => Autoclear::empty(),
        };
        let autoclear = header.autoclear.bits();
        let kept = (header.autoclear & (Autoclear::BITMAPS | raw)).bits();
        let dirty = if repaired { Incompatible::DIRTY } else { Incompatible::empty() };
        Writer {
            options,
            compressing,
            geometry: header.geometry,
            has_features: header.version >= 3,
            held_len_max: tables_len.max(options.dirty_len_max),
            autoclear: (autoclear, kept),
            begun: AtomicBool::new(autoclear == kept && bitmaps.is_idle()),
            bitmaps,
            short_data_file: AtomicBool::new(false),
            incompatible: (header.incompatible - dirty).bits(),
            conflict: meta.allocator.map.conflict().map(str::to_owned),
            map_version: Arc::clone(meta.allocator.map.version()),
            meta: Mutex::new(meta),
            changed: Condvar::new(),
            pins: Pins::new(),
            durable: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            file: Mutex::new(()),
            resizing: Mutex::new(()),
            loading: Mutex::new(()),
            grown: AtomicBool::new(false),
        }
    }

    /// Whether an error has made the image unwritable for good.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// A pin for a plan: take it before looking at mappings.
    pub fn pin(self: &Arc<Self>) -> Pin {
        let key = self.pins.pin();
        Pin::new(Arc::clone(self) as Arc<dyn PinHolder>, key)
    }

    /// Marks a slice if an entry of it points into metadata, as far as that is not known. In a damaged image a
    /// cluster that an entry names may count as free, and be handed out as metadata after the slice was read. A write
    /// that was planned before that is not called back, as with QEMU: nobody else has looked at the cluster's entry.
    pub fn look_at(&self, slice: &TableSlice) {
        if !self.geometry.is_external() && slice.looked_at() != self.map_version.load(Ordering::Acquire) {
            self.look_with_lock(&self.lock(), slice);
        }
    }

    /// The same for who has the lock. Nothing becomes metadata as long as he keeps it.
    fn look_with_lock(&self, meta: &Meta, slice: &TableSlice) {
        let map = &meta.allocator.map;
        let version = map.version().load(Ordering::Acquire);
        if self.geometry.is_external() || slice.looked_at() == version {
            return;
        }
        let into_metadata = |index| {
            let host = self.geometry.host_of(slice.raw(index));
            host.is_some_and(|host| map.kind(self.geometry.host_index(host)).is_some())
        };
        let suspect = (0..slice.len()).step_by(self.geometry.entry_words()).any(into_metadata);
        slice.note_look(version, suspect);
    }

    fn lock(&self) -> MetaGuard<'_> {
        MetaGuard { inner: self.meta.lock(), failed: &self.failed }
    }

    /// Whether mappings may be changed. What it says holds as long as the caller has the lock.
    fn accepts(&self, _meta: &Meta) -> bool {
        !self.is_failed() && !self.closing.load(Ordering::Acquire)
    }

    /// Whether so much is changed that a commit comes before more is. Where the tables of the whole disk have room in their
    /// cache it is the changed bytes that count; where they do not, what is changed takes no more memory than the cache.
    fn is_full(&self, meta: &Meta) -> bool {
        meta.dirty_len() >= self.options.dirty_len_max || meta.held_len() > self.held_len_max
    }

    /// From here on nothing is changed. What the first change does before it is over, and will be undone by the
    /// close, or is not begun any more.
    fn begin_close(&self) {
        let _file = self.file.lock();
        let _meta = self.lock();
        self.closing.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Marks a range that is about to be changed in the enabled dirty bitmaps; to be called before any of it
    /// is. Fails when the image is being closed: these bits might not be stored any more. What is zeroed behind the end that
    /// the guest knows, as the disk is to become longer, is no change of its disk.
    fn record(&self, driver: &Qcow2Driver, range: GuestRange) -> Result<()> {
        let range = range.prefix(driver.size().saturating_sub(range.offset()));
        if self.bitmaps.is_idle() || range.is_empty() {
            return Ok(());
        }
        // What comes too late is not to give the close more to store.
        if self.closing.load(Ordering::SeqCst) {
            return Err(closed());
        }
        self.bitmaps.mark(range);
        // After the bits: see `LiveBitmap::set`.
        if self.closing.load(Ordering::SeqCst) { Err(closed()) } else { Ok(()) }
    }

    /// Waits until something has changed.
    fn wait(&self, meta: &mut MetaGuard<'_>) {
        self.changed.wait(&mut meta.inner);
    }

    /// Whether a change needs nothing to be done first that may wait.
    fn is_ready(&self) -> bool {
        self.is_begun() && !self.bitmaps.is_full()
    }

    /// Whether nothing is left to do before the first change.
    fn is_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
            && self.conflict.is_none()
            && !self.short_data_file.load(Ordering::Acquire)
    }

    /// Gives back what the file was made longer by and not used.
    fn trim_file(&self, driver: &Qcow2Driver) -> Result<()> {
        if !self.grown.load(Ordering::Acquire) {
            return Ok(());
        }
        let _file = self.file.lock();
        let end = self.lock().allocator.used_end();
        let image = driver.image();
        let fail = |e| storage_error(image, "cannot give back the end of the file", end, e);
        if image.len().map_err(fail)? > end.0 {
            image.set_len(end.0).map_err(fail)?;
            image.sync().map_err(fail)?;
        }
        Ok(())
    }

    /// The image is failed from now on: nothing that is in memory only will be written.
    fn fail(&self, why: &str) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            tracing::error!(why, "the qcow2 image cannot be written any more; it is served read-only");
        }
        let _meta = self.lock();
        self.changed.notify_all();
    }
}

impl PinHolder for Writer {
    fn unpin(&self, key: u64) {
        let write = key >> KEY_EPOCH_BITS;
        if write != 0 {
            // Nothing is there when the write was finished, as it must be.
            prepare::abandon(self, write);
        }
        self.pins.unpin(key & ((1 << KEY_EPOCH_BITS) - 1));
    }
}

impl Deref for MetaGuard<'_> {
    type Target = Meta;

    fn deref(&self) -> &Meta {
        &self.inner
    }
}

impl DerefMut for MetaGuard<'_> {
    fn deref_mut(&mut self) -> &mut Meta {
        &mut self.inner
    }
}

impl Drop for MetaGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.failed.store(true, Ordering::Release);
        }
    }
}

/// Fails unless mappings may be changed, as long as the caller has the lock.
fn check_changing(driver: &Qcow2Driver, writer: &Writer, meta: &Meta) -> Result<()> {
    check_writable(driver)?;
    if writer.accepts(meta) { Ok(()) } else { Err(closed()) }
}

/// The error of a change that came too late.
fn closed() -> Error {
    Error::new(ErrorKind::Failed, "the image is being closed, or an earlier failure has made it read-only")
}

/// Sees to what has to be done once before the first change: features that a writer does not know lose
/// their promise, enabled bitmaps are not up to date from now on, and a raw data file is made as long as the
/// disk.
fn begin_changes(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    check_writable(driver)?;
    if let Some(conflict) = &writer.conflict {
        return Err(corrupt(driver, writer, conflict));
    }
    if writer.is_begun() {
        return Ok(());
    }
    let _file = writer.file.lock();
    if writer.is_begun() {
        return Ok(());
    }
    if writer.closing.load(Ordering::SeqCst) {
        return Err(closed());
    }
    if writer.short_data_file.load(Ordering::Acquire) {
        data_file::lengthen(driver, writer)?;
        writer.short_data_file.store(false, Ordering::Release);
    }
    if writer.begun.load(Ordering::Acquire) {
        return Ok(());
    }
    let image = driver.image();
    writer.bitmaps.mark_in_use(driver)?;
    let (autoclear, kept) = writer.autoclear;
    if autoclear != kept {
        let write = image.pwrite(&kept.to_be_bytes(), AUTOCLEAR_AT, Durability::Later);
        write.map_err(|e| storage_error(image, "cannot write the header", AUTOCLEAR_AT, e))?;
    }
    image.sync().map_err(|e| storage_error(image, "cannot make the header durable", AUTOCLEAR_AT, e))?;
    writer.begun.store(true, Ordering::Release);
    Ok(())
}

/// Sees to all that has to be done before a change is recorded, once or now and then; may wait.
fn make_ready(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    begin_changes(driver, writer)?;
    bitmap_bits::relieve(driver, writer);
    Ok(())
}

/// Does what an allocation needs; may wait. After it the allocation is tried again.
fn satisfy(driver: &Qcow2Driver, writer: &Writer, need: Need) -> Result<()> {
    match need {
        Need::Block(block) => load_block(driver, writer, block),
        Need::Room(clusters) => make_room(driver, writer, clusters),
        Need::Cluster(clusters) => find_cluster(driver, writer, clusters),
        Need::NoSpace => Err(no_space(driver)),
        Need::Fault(what) => Err(corrupt(driver, writer, what)),
    }
}

fn load_block(driver: &Qcow2Driver, writer: &Writer, block: refcounts::BlockIndex) -> Result<()> {
    // From the look to the end, so that no block is read before, and put into memory after, somebody else
    // has had it there, changed it and written it.
    let _loading = writer.loading.lock();
    let known = {
        let meta = writer.lock();
        let refcounts = &meta.allocator.refcounts;
        if refcounts.has(block) { Ok(None) } else { refcounts.block_at(block) }
    };
    let at = match known {
        Ok(Some(at)) => at,
        Ok(None) => return Ok(()),
        Err(_) => return Err(corrupt(driver, writer, "an entry of the refcount table is bad")),
    };
    let mut bytes = vec![0; usize::try_from(writer.geometry.cluster_len()).unwrap_or(0)];
    read_exact(driver.image(), at, &mut bytes)?;
    writer.lock().allocator.refcounts.insert(block, bytes);
    Ok(())
}

/// Makes room for `clusters` more at the end: a longer file. Nothing else is any help to who asks for that.
fn make_room(driver: &Qcow2Driver, writer: &Writer, clusters: u64) -> Result<()> {
    if driver.image().facts().grows { grow(driver, writer, clusters) } else { Err(no_space(driver)) }
}

/// Finds a cluster: in a longer file, in what was free at open, or in what a commit lets go.
fn find_cluster(driver: &Qcow2Driver, writer: &Writer, clusters: u64) -> Result<()> {
    let Err(error) = make_room(driver, writer, clusters) else { return Ok(()) };
    if error.kind() != ErrorKind::NoSpace {
        return Err(error);
    }
    if search(driver, writer, usize::MAX)? {
        return Ok(());
    }
    commit::flush_and_reclaim(driver, writer)?;
    if writer.lock().allocator.space.has_any() { Ok(()) } else { Err(error) }
}

/// Makes the file longer, and looks on for clusters that were free at open.
fn grow(driver: &Qcow2Driver, writer: &Writer, clusters: u64) -> Result<()> {
    let _file = writer.file.lock();
    let (fresh, end) = {
        let meta = writer.lock();
        (meta.allocator.space.fresh().0, meta.allocator.space.end().0)
    };
    if fresh + clusters <= end {
        return Ok(());
    }
    let cluster_len = writer.geometry.cluster_len();
    let used = fresh * cluster_len;
    let more = (used / 2).clamp(*GROW_LEN.start(), *GROW_LEN.end()).max(clusters * cluster_len);
    let image = driver.image();
    let fail = |e| storage_error(image, "cannot make the file longer", HostOffset(used), e);
    // Nobody writes behind the old end: what lies there was not handed out. It is not made shorter even
    // if somebody did.
    let len = image.len().map_err(fail)?.max(used + more);
    let end = len.div_ceil(cluster_len);
    image.set_len(end * cluster_len).map_err(fail)?;
    writer.grown.store(true, Ordering::Release);
    driver.note_len(end * cluster_len);
    writer.lock().allocator.space.extend_to(super::types::HostIndex(end));
    search(driver, writer, SEARCH_BLOCKS)?;
    Ok(())
}

/// Refcount blocks that are searched for free clusters whenever the file is made longer. Our choice.
const SEARCH_BLOCKS: usize = 4;

/// Searches up to `blocks` refcount blocks for clusters that were free at open, until some are found.
fn search(driver: &Qcow2Driver, writer: &Writer, blocks: usize) -> Result<bool> {
    let mut left = blocks;
    while left > 0 {
        let searched = {
            let mut meta = writer.lock();
            if meta.allocator.space.has_any() {
                return Ok(true);
            }
            meta.allocator.search()
        };
        match searched {
            Ok(true) => left -= 1,
            Ok(false) => return Ok(false),
            Err(need) => satisfy(driver, writer, need)?,
        }
    }
    Ok(false)
}

/// The image contradicts itself in a way that writing could make worse: it says so in its header, and
/// is failed.
fn corrupt(driver: &Qcow2Driver, writer: &Writer, what: &str) -> Error {
    writer.fail(what);
    let image = driver.image();
    let mut hint = "";
    if writer.has_features {
        let bits = writer.incompatible | Incompatible::CORRUPT.bits();
        let marked =
            image.pwrite(&bits.to_be_bytes(), INCOMPATIBLE_AT, Durability::Later).and_then(|()| image.sync());
        hint = if marked.is_ok() { "; it is marked as corrupt now" } else { "" };
    }
    let text = format!("the image is damaged: {what}; it is not written any more{hint} (qemu-img check -r)");
    Error::new(ErrorKind::Corrupt, text).with_path(&image.facts().path)
}

fn no_space(driver: &Qcow2Driver) -> Error {
    let text = "there is no room for another cluster of the image";
    Error::new(ErrorKind::NoSpace, text).with_path(&driver.image().facts().path)
}
