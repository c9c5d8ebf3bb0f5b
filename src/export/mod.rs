//! An export: one image as NBD clients see it, with a name, a device offset, a size and permissions.
//!
//! It translates a client's offsets into the image's and decides what a write's durability is. It knows
//! the protocol's facts about an export but no sockets, and moves no bytes itself.

mod flushes;
mod size;
mod spec;

use nbd_img_formats::open::{Overlay, open, temporary};
use nbd_img_formats::storage::{Aio, InPlace, Storage};
use nbd_img_formats::workers::Workers;
use nbd_img_formats::{
    BlockDriver, Durability, Error, ErrorKind, Facts, Format, GuestRange, Provision, Result,
};
use std::sync::Arc;

pub use flushes::FlushAnswer;
pub use size::{Resized, Served};
pub use spec::{BlockSizes, CacheMode, DetectZeroes, ExportSpec, Sharing, Temporary};

use crate::nbd::export_info::{ExportInfo, TransmissionFlags};
use crate::nbd::wire;

use flushes::Flushes;
use size::LiveSize;

/// Unit to which a stated offset or size is rounded down, and in which sizes are best given to clients:
/// the sector of every disk interface (our choice, as QEMU's).
pub const SECTOR_LEN: u64 = 512;

/// Most payload of one request: what every client may rely on without asking (protocol, section
/// "Block size constraints").
pub const PAYLOAD_LEN_MAX: u32 = 32 << 20;

/// Most bytes of tables in memory, and of changed ones, for an overlay that a client has for itself. Our choice:
/// covers 32 GiB at 64 KiB clusters, and a hundred clients that write all over the disk take half a gigabyte.
const CLIENT_TABLE_CACHE_LEN_MAX: u64 = 4 << 20;
const CLIENT_DIRTY_LEN_MAX: u64 = 1 << 20;

/// Most bitmaps that an error names. Our choice: a line that can be read.
const NAMED_MAX: usize = 16;

/// One image, ready to be served. Shared by all connections.
pub struct Export {
    name: String,
    description: String,
    driver: Arc<dyn BlockDriver>,
    workers: Arc<Workers>,
    flushes: Arc<Flushes>,
    offset: u64,
    size: LiveSize,
    read_only: bool,
    tls_required: bool,
    single_client: bool,
    hide_depth: bool,
    write_through: bool,
    bitmaps: Vec<String>,
    detect_zeroes: DetectZeroes,
    aio: Aio,
    in_place: InPlaceFacts,
    /// Smallest and best unit of requests, as clients are told.
    block_lens: (u32, u32),
    /// What the operator asked for.
    spec: Box<ExportSpec>,
    /// Each client gets an overlay of its own; the image itself is never written.
    per_client: bool,
    /// It is on such an overlay.
    is_own: bool,
}

/// What may be done on a session's own thread, over all storages of the image.
#[derive(Clone, Copy, Debug)]
pub struct InPlaceFacts {
    /// Reads of storages.
    pub reads: InPlace,
    /// Writes of storages.
    pub writes: InPlace,
}

impl Export {
    /// Opens the image that `spec` names and checks that offset and size lie within it.
    pub fn open(spec: &ExportSpec) -> Result<Arc<Export>> {
        spec.aio.check().map_err(|error| error.with_path(&spec.path))?;
        let opened = open(&spec.path, &spec.open_options())?;
        if opened.probed && spec.open_options().writable {
            tracing::warn!(
                path = %spec.path.display(),
                format = %opened.driver.facts().format,
                "the format was found by probing; state it with --format to be safe"
            );
        }
        warn_of_rounding(spec);
        if spec.is_per_client() {
            Self::template(spec, opened.driver, opened.probed)
        } else {
            Self::shared(spec, overlay(spec, opened.driver)?, opened.probed)
        }
    }

    /// An export of an image that is open already, whose format was stated.
    pub fn of_driver(spec: &ExportSpec, driver: Arc<dyn BlockDriver>) -> Result<Arc<Export>> {
        Self::shared(spec, driver, false)
    }

    fn shared(spec: &ExportSpec, driver: Arc<dyn BlockDriver>, probed: bool) -> Result<Arc<Export>> {
        Ok(Arc::new(Self::build(spec, driver, Arc::new(Workers::new(&spec.name)), probed)?))
    }

    /// An export that is nothing but what the ones for its clients are made of.
    fn template(spec: &ExportSpec, base: Arc<dyn BlockDriver>, probed: bool) -> Result<Arc<Export>> {
        let workers = Arc::new(Workers::new(&spec.name));
        // Now, rather than with the first client, shows whether one can be made.
        let sample = Self::build(spec, overlay(spec, Arc::clone(&base))?, Arc::clone(&workers), probed)?;
        Ok(Arc::new(Export { driver: base, per_client: true, ..sample }))
    }

    /// What another client is to be served: this export, or one that nobody else has, on an overlay that is gone
    /// with the last reference. Waits for the disk then.
    pub fn for_client(self: &Arc<Self>) -> Result<Arc<Export>> {
        if !self.per_client {
            return Ok(Arc::clone(self));
        }
        let driver = overlay(&self.spec, Arc::clone(&self.driver))?;
        let export = Self::build(&self.spec, driver, Arc::clone(&self.workers), false)?;
        Ok(Arc::new(Export { is_own: true, block_lens: self.block_lens, ..export }))
    }

    /// Whether each client is served an export that nobody else has.
    pub fn is_per_client(&self) -> bool {
        self.per_client
    }

    fn build(
        spec: &ExportSpec,
        driver: Arc<dyn BlockDriver>,
        workers: Arc<Workers>,
        probed: bool,
    ) -> Result<Export> {
        let (offset, size) = window(spec, driver.size())?;
        for name in &spec.bitmaps {
            offer_bitmap(&driver, name).map_err(|error| error.with_path(&spec.path))?;
        }
        Ok(Export {
            name: spec.name.clone(),
            description: spec.description.clone(),
            workers,
            flushes: Arc::default(),
            offset,
            size: LiveSize::new(size),
            read_only: spec.read_only,
            tls_required: spec.tls_required,
            single_client: spec.single_client,
            hide_depth: spec.hide_depth,
            write_through: spec.cache.is_write_through(),
            bitmaps: spec.bitmaps.clone(),
            detect_zeroes: spec.detect_zeroes,
            aio: spec.aio,
            in_place: in_place_facts(driver.storages()),
            block_lens: block_lens(spec.block_sizes, driver.facts(), probed),
            spec: Box::new(spec.clone()),
            per_client: false,
            is_own: false,
            driver,
        })
    }

    /// The name that clients ask for; may be empty.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Free text for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The image.
    pub fn driver(&self) -> &Arc<dyn BlockDriver> {
        &self.driver
    }

    /// The threads that may wait for this image.
    pub fn workers(&self) -> &Arc<Workers> {
        &self.workers
    }

    /// Makes all writes durable that have been answered by now, and then says so.
    pub fn flush(&self, answer: FlushAnswer) {
        self.flushes.start(&self.driver, &self.workers, answer);
    }

    /// Bytes that clients see who come now.
    pub fn size(&self) -> u64 {
        self.size.now()
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether whatever clients do is forgotten at the end.
    pub fn leaves_the_image_as_it_is(&self) -> bool {
        self.read_only || self.spec.temporary.is_some()
    }

    /// Whether it is only to be had, and seen, under TLS.
    pub fn tls_required(&self) -> bool {
        self.tls_required
    }

    /// How writes look for zeroes.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.detect_zeroes
    }

    /// Who carries out what would wait.
    pub fn aio(&self) -> Aio {
        self.aio
    }

    /// What may be done without handing it to a thread that may wait.
    pub fn in_place(&self) -> InPlaceFacts {
        self.in_place
    }

    /// The image's range for a client's range that was checked against the size that it was told.
    pub fn range(&self, offset: u64, len: u64) -> Result<GuestRange> {
        let outside = || {
            Error::new(ErrorKind::OutOfBounds, "the request reaches beyond the export").with_offset(offset)
        };
        let range = GuestRange::new(offset, len).ok_or_else(outside)?;
        if range.end() > self.size() {
            return Err(outside());
        }
        GuestRange::new(self.offset + offset, len).ok_or_else(outside)
    }

    /// When a change must be durable that a client asked for with (`fua`) or without FUA.
    pub fn durability(&self, fua: bool) -> Durability {
        if fua || self.write_through { Durability::Fua } else { Durability::Later }
    }

    /// Names of the metadata contexts that clients may select.
    fn contexts(&self) -> Vec<String> {
        let depth = (!self.hide_depth).then_some(wire::ALLOCATION_DEPTH);
        let fixed = [Some(wire::BASE_ALLOCATION), depth].into_iter().flatten().map(str::to_owned);
        let bitmaps = self.bitmaps.iter().map(|name| format!("{}{name}", wire::DIRTY_BITMAP_PREFIX));
        fixed.chain(bitmaps).collect()
    }

    /// What the protocol tells clients. Cheap, and touches no file.
    pub fn info(&self) -> ExportInfo {
        let (block_min_len, block_preferred_len) = self.block_lens;
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_DF
            | TransmissionFlags::SEND_CACHE;
        // Connections that see different disks are what the flag rules out.
        flags.set(TransmissionFlags::CAN_MULTI_CONN, !self.single_client && !self.is_per_client());
        if self.read_only {
            flags |= TransmissionFlags::READ_ONLY;
        } else {
            flags |= TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO;
        }
        ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: self.size(),
            flags,
            block_min_len,
            block_preferred_len,
            payload_max_len: PAYLOAD_LEN_MAX,
            contexts: self.contexts(),
            tls_required: self.tls_required,
        }
    }
}

/// Smallest and best unit of requests, as clients are told. QEMU's are 4096 and, but for a raw disk that it had to
/// probe and whose first sector it guards, 1.
fn block_lens(sizes: BlockSizes, facts: &Facts, probed: bool) -> (u32, u32) {
    match sizes {
        BlockSizes::Best => (facts.block_min_len, facts.block_preferred_len),
        BlockSizes::Qemu if probed && facts.format == Format::Raw => (512, 4096),
        BlockSizes::Qemu => (1, 4096),
    }
}

/// A throwaway overlay on `below`, as `spec` wants it; `below` itself if it wants none.
fn overlay(spec: &ExportSpec, below: Arc<dyn BlockDriver>) -> Result<Arc<dyn BlockDriver>> {
    let Some(Temporary { folder, sharing }) = &spec.temporary else { return Ok(below) };
    let shared = Overlay {
        table_cache_len: spec.open.table_cache_len,
        discard: spec.open.discard,
        ..Overlay::default()
    };
    let overlay = match sharing {
        Sharing::Shared => shared,
        Sharing::PerClient => Overlay {
            table_cache_len: shared.table_cache_len.min(CLIENT_TABLE_CACHE_LEN_MAX),
            dirty_len_max: shared.dirty_len_max.min(CLIENT_DIRTY_LEN_MAX),
            ..shared
        },
    };
    temporary(below, folder, overlay)
}

/// Makes the bitmap ready, or says which ones there are.
fn offer_bitmap(driver: &Arc<dyn BlockDriver>, name: &str) -> Result<()> {
    if driver.offer_bitmap(name)? {
        return Ok(());
    }
    let info = driver.info()?;
    let layers = std::iter::once(&info).chain(&info.chain);
    let names = layers.flat_map(|layer| &layer.bitmaps).map(|bitmap| &bitmap.name);
    let names: Vec<String> = names.take(NAMED_MAX).map(|name| format!("'{}'", name.escape_debug())).collect();
    let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let text = format!("there is no dirty bitmap '{}' (--bitmap); there are: {there}", name.escape_debug());
    Err(Error::new(ErrorKind::InvalidInput, text))
}

/// How the room of a zeroed range is treated: a client that allows holes gets them.
pub fn provision(no_hole: bool) -> Provision {
    if no_hole { Provision::Allocate } else { Provision::Unmap }
}

/// An offset or a size that was stated, as it is served.
fn rounded(spec: &ExportSpec, stated: u64) -> u64 {
    if spec.exact_window { stated } else { stated - stated % SECTOR_LEN }
}

fn warn_of_rounding(spec: &ExportSpec) {
    for (what, stated) in [("offset", spec.offset), ("size", spec.size.unwrap_or(0))] {
        let rounded = rounded(spec, stated);
        if rounded != stated {
            tracing::warn!(export = %spec.name.escape_debug(), stated, rounded, "--{what} is rounded down to whole sectors");
        }
    }
}

/// Offset and size of the export within an image of `disk` bytes (design: rounded down to a sector
/// where they were stated, and it says so; never cut off silently).
fn window(spec: &ExportSpec, disk: u64) -> Result<(u64, u64)> {
    let round = |stated| rounded(spec, stated);
    let fail = |text: String| Err(Error::new(ErrorKind::InvalidInput, text).with_path(&spec.path));
    let offset = round(spec.offset);
    let Some(rest) = disk.checked_sub(offset) else {
        return fail(format!("--offset {offset} lies beyond the end of the disk of {disk} bytes"));
    };
    match spec.size.map(round) {
        None => Ok((offset, rest)),
        Some(size) if size <= rest => Ok((offset, size)),
        Some(size) => fail(format!(
            "--size {size} from --offset {offset} reaches beyond the end of the disk of {disk} bytes"
        )),
    }
}

/// The most careful of the storages decides.
fn in_place_facts(storages: &[Arc<dyn Storage>]) -> InPlaceFacts {
    fn worse(a: InPlace, b: InPlace) -> InPlace {
        match (a, b) {
            (InPlace::Never, _) | (_, InPlace::Never) => InPlace::Never,
            (InPlace::Ask, _) | (_, InPlace::Ask) => InPlace::Ask,
            (InPlace::Always, InPlace::Always) => InPlace::Always,
        }
    }
    storages.iter().fold(InPlaceFacts { reads: InPlace::Always, writes: InPlace::Always }, |all, storage| {
        let facts = storage.facts();
        InPlaceFacts {
            reads: worse(all.reads, facts.reads),
            writes: if facts.writable { worse(all.writes, facts.writes) } else { all.writes },
        }
    })
}
