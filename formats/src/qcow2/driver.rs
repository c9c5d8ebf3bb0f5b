//! [`Qcow2Driver`]: a qcow2 image as its guest sees it.
//!
//! It joins tables, translation, decompression and, in an image that is written, the [writer](super::write). It opens nothing itself: files come in [`Parts`].

use super::bitmaps::{self, Bitmaps};
use super::clusters::ClusterCache;
use super::header::{Compression, Header};
use super::map;
use super::parts::{self, Caches, Parts};
use super::snapshots::{self, Snapshot};
use super::tables::{ImageNumber, L1Table, TableCache, TableSlice};
use super::types::{DataFile, Geometry, GuestCluster};
use super::write::bitmap_change::{self, BitmapChange};
use super::write::{Writer, begin, bitmaps as recorded, commit, live_size, prepare, reclaim, slow, zero};
use crate::address::{GuestRange, HostOffset};
use crate::driver::{BlockDriver, Effort, Facts, State, StatusQuery, StatusVisitor, ZeroRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::info::ImageInfo;
use crate::mover::{self, check_writable, checked_range, storage_error};
use crate::plan::{MapMode, ReadPlan, StorageId, WritePlan};
use crate::storage::{Durability, Storage};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The storage of the image file.
const IMAGE_STORAGE: StorageId = StorageId(0);
/// The storage of an external data file.
const DATA_FILE_STORAGE: StorageId = StorageId(1);

/// A qcow2 image.
pub struct Qcow2Driver {
    facts: Facts,
    header: Header,
    snapshots: Vec<Snapshot>,
    bitmaps: Bitmaps,
    /// What is served is a state of the past.
    is_snapshot: bool,
    /// What the guest may use.
    size: AtomicU64,
    /// Where the disk ends as far as its mapping goes: `size`, or more while it becomes longer. Changed only under
    /// the lock of the metadata.
    disk_end: AtomicU64,
    l1: L1Table,
    /// Where the L1 table lies in the file, and how many entries it has there. Changed only by who has the right to
    /// commit.
    l1_at: AtomicU64,
    l1_entries: AtomicU64,
    storages: Vec<Arc<dyn Storage>>,
    /// How far the file with the data reached when it was last asked; it can only be longer.
    data_len: AtomicU64,
    backing: Option<Arc<dyn BlockDriver>>,
    /// See [`Self::marks_zeroes`].
    marks_zeroes: bool,
    number: ImageNumber,
    caches: Arc<Caches>,
    /// There exactly if the image is written.
    writer: Option<Arc<Writer>>,
    closed: AtomicBool,
}

impl Qcow2Driver {
    /// A driver of the image in `parts.image`. Reads the L1 table and the lists of snapshots and
    /// bitmaps. Without `parts.write` nothing is ever written; with it nothing is before the first change,
    /// except that refcounts which are marked as out of date are rebuilt.
    pub fn open(parts: Parts) -> Result<Arc<Self>> {
        let path = parts.image.facts().path.clone();
        open_parts(parts).map(Arc::new).map_err(|e| e.with_path(path))
    }

    /// Changes the image's dirty bitmaps, for an image that was opened for writing and that nothing was
    /// written to yet. It is durable on return; the bitmaps that the driver knows stay those from before, so
    /// it has to be closed then. A failure changes nothing, unless it is one of the file's.
    pub fn change_bitmap(&self, name: &str, change: BitmapChange<'_>) -> Result<()> {
        bitmap_change::change(self, self.writer()?, &self.header, name, change)
    }

    /// Bytes of bits that were set in dirty bitmaps and that the image file need not have yet.
    pub fn held_bits_len(&self) -> u64 {
        self.writer.as_ref().map_or(0, |writer| writer.bitmaps.held_len())
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    pub(super) fn l1(&self) -> &L1Table {
        &self.l1
    }

    pub(super) fn tables(&self) -> &TableCache {
        &self.caches.tables
    }

    pub(super) fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    pub(super) fn clusters(&self) -> &ClusterCache {
        &self.caches.clusters
    }

    pub(super) fn compression(&self) -> Compression {
        self.header.compression
    }

    pub(super) fn number(&self) -> ImageNumber {
        self.number
    }

    pub(super) fn image(&self) -> &Arc<dyn Storage> {
        &self.storages[usize::from(IMAGE_STORAGE.0)]
    }

    pub(super) fn data_storage_id(&self) -> StorageId {
        match self.header.geometry.data_file() {
            DataFile::Internal => IMAGE_STORAGE,
            DataFile::External | DataFile::ExternalRaw => DATA_FILE_STORAGE,
        }
    }

    pub(super) fn data_storage(&self) -> &Arc<dyn Storage> {
        &self.storages[usize::from(self.data_storage_id().0)]
    }

    /// How many of the `len` bytes at `at` in the data storage the file has. What it does not have reads
    /// as zeroes. `None` when that takes a look at the file and `mode` does not allow one.
    pub(super) fn data_present(&self, at: HostOffset, len: u64, mode: MapMode) -> Result<Option<u64>> {
        let known = self.data_len.load(Ordering::Relaxed);
        if at.0.checked_add(len).is_some_and(|end| end <= known) {
            return Ok(Some(len));
        }
        if mode == MapMode::Try {
            return Ok(None);
        }
        // It may have grown since, if whoever writes it was not locked out.
        let now = len_of(self.data_storage())?;
        self.data_len.fetch_max(now, Ordering::Relaxed);
        Ok(Some(now.saturating_sub(at.0).min(len)))
    }

    pub(super) fn backing(&self) -> Option<&Arc<dyn BlockDriver>> {
        self.backing.as_ref()
    }

    /// What a storage id of the backing driver is shifted by.
    pub(super) fn backing_storages_from(&self) -> u16 {
        self.data_storage_id().0 + 1
    }

    fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Failed, "the image has been closed"));
        }
        Ok(())
    }

    /// The end of the disk as far as its mapping goes.
    pub(super) fn disk_end(&self) -> u64 {
        self.disk_end.load(Ordering::Acquire)
    }

    /// Says how far the mapping goes from now on. Under the lock of the metadata.
    pub(super) fn set_disk_end(&self, end: u64) {
        self.disk_end.store(end, Ordering::Release);
    }

    /// Says what the guest may use from now on.
    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Where the active L1 table lies.
    pub(super) fn l1_at(&self) -> HostOffset {
        HostOffset(self.l1_at.load(Ordering::Acquire))
    }

    /// How many entries the active L1 table has in the file.
    pub(super) fn l1_entries(&self) -> u64 {
        self.l1_entries.load(Ordering::Acquire)
    }

    /// Says where the active L1 table lies from now on. Only with the right to commit.
    pub(super) fn set_l1_place(&self, at: HostOffset, entries: u64) {
        self.l1_at.store(at.0, Ordering::Release);
        self.l1_entries.store(entries, Ordering::Release);
    }

    /// The header and the snapshots as they were at open.
    pub(super) fn opened_as(&self) -> (&Header, &[Snapshot]) {
        (&self.header, &self.snapshots)
    }

    /// Whether the backing file has any byte of the cluster.
    pub(super) fn backing_reaches(&self, cluster: GuestCluster) -> bool {
        let start = self.header.geometry.start_of(cluster);
        self.backing.as_ref().is_some_and(|backing| backing.size() > start)
    }

    /// Whether zeroes have to be written down also where the image has nothing and nothing shines through: in an image that
    /// names a backing file, for this opening may have left it out, or taken another or a shorter one, and the next one sees
    /// there what the named file has; and where the allocation is to tell them.
    pub(super) fn marks_zeroes(&self) -> bool {
        self.marks_zeroes
    }

    /// Whether a cluster without an entry is zeroes for good, so that zeroing it is done already.
    pub(super) fn is_zero_unallocated(&self, cluster: GuestCluster) -> bool {
        !self.marks_zeroes && !self.backing_reaches(cluster)
    }

    /// The image file has become at least this long.
    pub(super) fn note_len(&self, len: u64) {
        if !self.geometry().is_external() {
            self.data_len.fetch_max(len, Ordering::Relaxed);
        }
    }

    /// Looks at a slice that was read before anybody can change it.
    pub(super) fn checked_slice(&self, slice: TableSlice) -> TableSlice {
        if let Some(writer) = &self.writer {
            writer.look_at(&slice);
        }
        slice
    }

    pub(super) fn writer(&self) -> Result<&Arc<Writer>> {
        check_writable(self)?;
        self.writer.as_ref().ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the image was opened read-only"))
    }

    fn flush_if_fua(&self, durability: Durability) -> Result<()> {
        if durability.is_fua() { self.make_durable() } else { Ok(()) }
    }
}

impl BlockDriver for Qcow2Driver {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn resize(&self, size: u64) -> Result<()> {
        let writer = self.writer()?;
        live_size::change(self, writer, size).map_err(|e| e.with_path(&self.image().facts().path))
    }

    fn state(&self) -> State {
        if self.closed.load(Ordering::Relaxed) {
            return State::Closed;
        }
        match &self.writer {
            Some(writer) if writer.is_failed() || commit::is_sync_failed(self) => State::Failed,
            Some(_) | None => State::Live,
        }
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn info(&self) -> Result<ImageInfo> {
        let header = &self.header;
        let image = self.image();
        let text = |name: &Vec<u8>| String::from_utf8_lossy(name).into_owned();
        Ok(ImageInfo {
            path: image.facts().path.clone(),
            format: self.facts.format.to_string(),
            virtual_size: self.size(),
            file_len: len_of(image)?,
            allocated_len: image
                .allocated_len()
                .map_err(|e| storage_error(image, "cannot tell what the file occupies", HostOffset(0), e))?,
            cluster_len: Some(header.geometry.cluster_len()),
            version: Some(header.version),
            refcount_bits: Some(header.refcount_bits),
            compression: Some(header.compression.to_string()),
            features: header.feature_names(),
            backing_name: header.backing_name.as_ref().map(text),
            backing_format: header.extensions.backing_format.clone(),
            data_file_name: header.extensions.data_file_name.as_ref().map(text),
            chain: parts::infos_below(self.backing.as_ref())?,
            snapshots: self.snapshots.iter().map(|snapshot| snapshot.info(header)).collect(),
            bitmaps: self.bitmaps.info(),
        })
    }

    fn map_read(&self, range: GuestRange, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
        plan.reset();
        self.check_open()?;
        let range = checked_range(self, range.offset(), range.len())?;
        plan.pin = self.writer.as_ref().map(Writer::pin);
        map::map_read(self, range, mode, plan)
    }

    /// Reads layer by layer rather than by the plan: a compressed piece of a plan does not say in which
    /// layer it lies.
    fn read_slow(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_open()?;
        let range = checked_range(self, offset, buf.len() as u64)?;
        let _pin = self.writer.as_ref().map(Writer::pin);
        self.read_layers(range, buf)
    }

    fn prepare_write(&self, range: GuestRange, mode: MapMode, plan: &mut WritePlan) -> Result<()> {
        plan.reset();
        let writer = self.writer()?;
        let range = checked_range(self, range.offset(), range.len())?;
        prepare::prepare(self, writer, range, mode, plan)
    }

    fn finish_write(&self, plan: &mut WritePlan, written: bool) -> Result<()> {
        match &self.writer {
            Some(writer) => prepare::finish(self, writer, plan, written),
            None => check_writable(self),
        }
    }

    fn write_slow(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let writer = self.writer()?;
        checked_range(self, offset, buf.len() as u64)?;
        slow::write(self, writer, offset, buf)
    }

    fn write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<()> {
        let writer = self.writer()?;
        let range = checked_range(self, range.offset(), range.len())?;
        zero::write_zeroes(self, writer, range, request)?;
        self.flush_if_fua(request.durability)
    }

    fn try_write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<bool> {
        let writer = self.writer()?;
        let range = checked_range(self, range.offset(), range.len())?;
        if request.durability.is_fua() {
            Ok(false)
        } else {
            zero::try_write_zeroes(self, writer, range, request)
        }
    }

    fn try_discard(&self, range: GuestRange, durability: Durability) -> Result<bool> {
        let writer = self.writer()?;
        let range = checked_range(self, range.offset(), range.len())?;
        if durability.is_fua() { Ok(false) } else { zero::try_discard(self, writer, range) }
    }

    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        let writer = self.writer()?;
        let range = checked_range(self, range.offset(), range.len())?;
        zero::discard(self, writer, range)?;
        self.flush_if_fua(durability)
    }

    fn flush(&self) -> Result<()> {
        self.check_open()?;
        match &self.writer {
            Some(writer) => commit::flush(self, writer),
            // Nothing can be dirty.
            None => Ok(()),
        }
    }

    fn make_durable(&self) -> Result<()> {
        self.check_open()?;
        self.writer.as_ref().map_or(Ok(()), |writer| commit::commit(self, writer))
    }

    fn tidy(&self) {
        if let Some(writer) = &self.writer {
            reclaim::tidy(self, writer);
        }
    }

    fn offer_bitmap(&self, name: &str) -> Result<bool> {
        self.check_open()?;
        if self.is_snapshot {
            let text =
                "dirty bitmaps tell of the active state, not of a snapshot (--bitmap, --load-snapshot)";
            return Err(Error::new(ErrorKind::InvalidInput, text).with_path(&self.image().facts().path));
        }
        if self.bitmaps.offer(self.image(), &self.header, name)? {
            return Ok(true);
        }
        self.backing.as_ref().map_or(Ok(false), |backing| backing.offer_bitmap(name))
    }

    fn status(&self, query: StatusQuery<'_>, range: GuestRange, visitor: StatusVisitor<'_>) -> Result<()> {
        self.check_open()?;
        match query {
            StatusQuery::Allocation | StatusQuery::Depth => mover::status(self, query, range, visitor),
            StatusQuery::Bitmap(name) => {
                let range = checked_range(self, range.offset(), range.len())?;
                if recorded::visit(self, self.writer.as_ref(), name, range, visitor)?
                    || self.bitmaps.visit(self.image(), name, range, visitor)?
                {
                    return Ok(());
                }
                bitmaps::visit_below(self.backing.as_ref(), name, range, visitor)
            }
        }
    }

    fn try_read_slow(&self, offset: u64, buf: &mut [u8]) -> Result<bool> {
        self.check_open()?;
        let range = checked_range(self, offset, buf.len() as u64)?;
        let _pin = self.writer.as_ref().map(Writer::pin);
        self.try_read_layers(range, buf)
    }

    fn warm_len_max(&self) -> u64 {
        self.warm_len()
    }

    fn warm(&self, range: GuestRange, effort: Effort) -> Result<bool> {
        self.check_open()?;
        let range = checked_range(self, range.offset(), range.len())?;
        let _pin = self.writer.as_ref().map(Writer::pin);
        self.warm_layers(range, effort)
    }

    fn cache(&self, range: GuestRange) -> Result<()> {
        self.check_open()?;
        let range = checked_range(self, range.offset(), range.len())?;
        let _pin = self.writer.as_ref().map(Writer::pin);
        self.prefetch_layers(range)
    }

    fn close(&self) -> Result<()> {
        let settled = match (&self.writer, self.state()) {
            (Some(writer), State::Live) => commit::settle(self, writer),
            (Some(_) | None, State::Live | State::Failed | State::Closed) => Ok(()),
        };
        if self.closed.swap(true, Ordering::AcqRel) {
            return settled;
        }
        let own = self.storages.get(..usize::from(self.backing_storages_from())).unwrap_or_default();
        let close = |storage: &Arc<dyn Storage>| {
            storage.close().map_err(|e| storage_error(storage, "cannot close", HostOffset(0), e))
        };
        let closed = own.iter().map(close).fold(settled, Result::and);
        match &self.backing {
            Some(backing) => closed.and(backing.close()),
            None => closed,
        }
    }
}

fn open_parts(parts: Parts) -> Result<Qcow2Driver> {
    let Parts { image, header, data_file, backing, number, caches, snapshot, write } = parts;
    if write.is_some() {
        begin::check(&header, snapshot.as_deref(), backing.is_some())?;
    }
    let (snapshots, snapshots_len) = snapshots::load(&image, &header)?;
    let (l1_at, virtual_size) = match &snapshot {
        Some(wanted) => {
            let snapshot = snapshots::find(&snapshots, wanted)?;
            (snapshot.checked_l1(&header)?, snapshot.virtual_size(&header))
        }
        None => (header.l1, header.virtual_size),
    };
    let l1 = L1Table::load(&image, l1_at, header.geometry, virtual_size)?;
    let bitmaps = Bitmaps::load(&image, &header);
    let data_len = len_of(data_file.as_ref().unwrap_or(&image))?;
    let storages = parts::flat_storages(image, &header, data_file, backing.as_ref())?;
    let as_qemu = write.is_some_and(|options| options.zeroes_as_qemu) && header.geometry.can_zero();
    let mut driver = Qcow2Driver {
        facts: parts::facts(&header, backing.as_ref(), write),
        snapshots,
        bitmaps,
        is_snapshot: snapshot.is_some(),
        size: AtomicU64::new(virtual_size),
        disk_end: AtomicU64::new(virtual_size),
        l1,
        l1_at: AtomicU64::new(l1_at.at.0),
        l1_entries: AtomicU64::new(u64::from(l1_at.entries)),
        storages,
        data_len: AtomicU64::new(data_len),
        backing,
        marks_zeroes: header.backing_name.is_some() || as_qemu,
        number,
        caches,
        writer: None,
        closed: AtomicBool::new(false),
        header,
    };
    if let Some(options) = write {
        let writer = begin::begin(&driver, &driver.header, (&driver.snapshots, snapshots_len), options)?;
        driver.writer = Some(Arc::new(writer));
    }
    Ok(driver)
}

fn len_of(storage: &Arc<dyn Storage>) -> Result<u64> {
    storage.len().map_err(|e| storage_error(storage, "cannot tell the file's length", HostOffset(0), e))
}
