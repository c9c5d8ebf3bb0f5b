//! Dirty bitmaps of an image that is written: enabled ones record what changes, and are stored when the
//! image is closed.
//!
//! Before the first change they are durably marked as in use: whatever happens from there on, an old state
//! of them is not taken for the present one, and their bits in the file belong to whoever writes the image
//! (`bitmap_bits`). At the close, when everything else is durable, new bits are stored; tables that have changed and a
//! directory without the marks go to clusters of their own; sync; then one word of the header
//! is turned to the new directory; sync. Only then the old clusters are let go. A close that does not get
//! there leaves the marks.

use super::super::bitmaps::{self, Directory, Entry, Flags, LiveBitmap, Stored, StoredBitmap, Tables};
use super::super::driver::Qcow2Driver;
use super::super::header::Header;
use super::super::types::{Geometry, HostCluster};
use super::bitmap_bits::{self, OldClusters};
use super::meta::Content;
use super::metadata_map::Kind;
use super::{Writer, commit, satisfy};
use crate::address::{GuestRange, HostOffset};
use crate::driver::StatusVisitor;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{check_writable, storage_error};
use crate::storage::{Durability, Storage};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

/// Where the directory's offset stands in the data of the header extension (specification).
pub const DIRECTORY_OFFSET_AT: u64 = 16;

/// The bitmaps of an image that is written.
pub struct Recorder {
    /// Those that record changes, in the directory's order.
    recording: Vec<LiveBitmap>,
    /// Those that record nothing and are not in use, likewise: they change only with the size of the disk.
    pub(super) others: Vec<LiveBitmap>,
    tables: Tables,
    /// Some may be marked as in use because of us, until all are stored.
    marked: AtomicBool,
    /// So may be those that record nothing, as the disk gets another size.
    all_marked: AtomicBool,
    /// Bytes of new bits in memory.
    held_len: Arc<AtomicU64>,
    /// So many may be before some are stored: the budget, or more after a failure.
    limit: AtomicU64,
    /// One at a time stores bits: held with I/O, taken before all other locks.
    pub(super) storing: Mutex<Cursor>,
    /// The close has failed to store them: what is where is not known any more.
    lost: AtomicBool,
    warned: AtomicBool,
}

/// Where the search for bits to be stored goes on.
#[derive(Default)]
pub struct Cursor {
    bitmap: usize,
    cluster: usize,
}

/// What lies where because of bitmaps: first byte, length, kind.
pub type Places = Vec<(HostOffset, u64, Kind)>;

impl Recorder {
    /// Records in the enabled bitmaps of `tables`. `budget`: bytes of new bits that may stay in memory.
    pub fn new(tables: Tables, budget: u64) -> Self {
        let entries = &tables.directory.entries;
        let held_len = Arc::new(AtomicU64::new(0));
        let count = entries.iter().filter(|entry| entry.records()).count();
        let (mut recording, mut others) = (Vec::new(), Vec::new());
        for (index, (entry, stored)) in entries.iter().zip(&tables.stored).enumerate() {
            let (stored, held_len) = (Arc::clone(stored), Arc::clone(&held_len));
            if entry.records() {
                recording.push(LiveBitmap::new(index, stored, count, held_len));
            } else if !entry.flags.contains(Flags::IN_USE) {
                others.push(LiveBitmap::at_rest(index, stored, held_len));
            }
        }
        Recorder {
            recording,
            others,
            tables,
            marked: AtomicBool::new(false),
            all_marked: AtomicBool::new(false),
            held_len,
            limit: AtomicU64::new(budget),
            storing: Mutex::new(Cursor::default()),
            lost: AtomicBool::new(false),
            warned: AtomicBool::new(false),
        }
    }

    /// Bytes of new bits in memory.
    pub fn held_len(&self) -> u64 {
        self.held_len.load(Ordering::SeqCst)
    }

    /// Whether bits are to be stored before more are marked.
    pub fn is_full(&self) -> bool {
        self.held_len() > self.limit.load(Ordering::SeqCst)
    }

    /// Lets so many bytes be in memory before it is full.
    pub fn limit_to(&self, len: u64) {
        self.limit.store(len, Ordering::SeqCst);
    }

    /// The next cluster with new bits in its turn.
    pub fn next_changed(&self, cursor: &mut Cursor) -> Option<(&LiveBitmap, usize)> {
        // Where it began is looked at again, from its start.
        for _ in 0..=self.recording.len() {
            let bitmap = self.recording.get(cursor.bitmap)?;
            if let Some(cluster) = bitmap.next_changed(cursor.cluster) {
                cursor.cluster = cluster + 1;
                return Some((bitmap, cluster));
            }
            *cursor = Cursor { bitmap: (cursor.bitmap + 1) % self.recording.len(), cluster: 0 };
        }
        None
    }

    /// Says, the first time, that bits could not be stored.
    pub fn warn_once(&self, error: &Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "bits of dirty bitmaps could not be stored yet; they stay in memory");
        }
    }

    /// The bits will not be stored, and nobody may ask for them any more.
    fn lose(&self, writer: &Writer) {
        self.lost.store(true, Ordering::SeqCst);
        self.all().for_each(|bitmap| bitmap_bits::give_back(writer, bitmap));
    }

    /// Whether no bitmap records anything.
    pub fn is_idle(&self) -> bool {
        self.recording.is_empty()
    }

    /// Marks what `range` touches in all enabled bitmaps.
    pub fn mark(&self, range: GuestRange) {
        for bitmap in &self.recording {
            bitmap.set(range);
        }
    }

    /// The bitmaps that are not in use.
    pub fn all(&self) -> impl Iterator<Item = &LiveBitmap> {
        self.recording.iter().chain(&self.others)
    }

    /// The bitmap of this name, if it is one of those.
    fn live(&self, name: &str) -> Option<&LiveBitmap> {
        let named = |bitmap: &&LiveBitmap| {
            let entry = self.tables.directory.entries.get(bitmap.entry);
            entry.is_some_and(|entry| *entry.name == *name.as_bytes())
        };
        self.all().find(named)
    }

    /// The directory as it was when the image was opened.
    pub fn directory(&self) -> &Directory {
        &self.tables.directory
    }

    /// What the file has of all bitmaps, in the directory's order.
    pub fn all_stored(&self) -> &[Arc<StoredBitmap>] {
        &self.tables.stored
    }

    /// What the file has of the bitmap with this number in the directory.
    pub fn stored(&self, index: usize) -> Option<&Arc<StoredBitmap>> {
        self.tables.stored.get(index)
    }

    /// Says in the file that the enabled bitmaps are in use; a sync has to follow. Each flag word lies in
    /// one sector, so it is there or not.
    pub fn mark_in_use(&self, driver: &Qcow2Driver) -> Result<()> {
        if !self.is_idle() {
            self.marked.store(true, Ordering::Release);
        }
        self.write_marks(driver, &self.recording)
    }

    /// Says the same of those that record nothing, before their bits in the file change all the same; a sync has to follow.
    pub fn mark_others_in_use(&self, driver: &Qcow2Driver) -> Result<()> {
        self.all_marked.store(true, Ordering::Release);
        self.marked.store(true, Ordering::Release);
        self.write_marks(driver, &self.others)
    }

    fn write_marks(&self, driver: &Qcow2Driver, chosen: &[LiveBitmap]) -> Result<()> {
        // Both are in the directory's order.
        let mut chosen = chosen.iter().map(|bitmap| bitmap.entry).peekable();
        for (index, at, flags) in self.tables.directory.all_flags() {
            if chosen.next_if_eq(&index).is_some() {
                write(driver, at, &(flags | Flags::IN_USE).bits().to_be_bytes())?;
            }
        }
        Ok(())
    }

    /// Those that the close has to store: they may be marked.
    fn stored_at_close(&self) -> impl Iterator<Item = &LiveBitmap> {
        let all = self.all_marked.load(Ordering::Acquire);
        self.recording.iter().chain(self.others.iter().filter(move |_| all))
    }
}

/// Visits the runs of `range` in the bitmap of this name as it is now, in an image that is written. `false`: there is none
/// that may be used.
pub fn visit(
    driver: &Qcow2Driver,
    writer: Option<&Arc<Writer>>,
    name: &str,
    range: GuestRange,
    visitor: StatusVisitor<'_>,
) -> Result<bool> {
    let Some((writer, live)) = writer.and_then(|writer| Some((writer, writer.bitmaps.live(name)?))) else {
        return Ok(false);
    };
    // Before any look at where bits are.
    let _pin = writer.pin();
    let page_at = |page| {
        let read = live.page(driver.image(), page)?;
        // After the look: what it may have missed was given up before.
        if writer.bitmaps.lost.load(Ordering::SeqCst) { Err(lost()) } else { Ok(read) }
    };
    bitmaps::visit(range, live.granularity(), page_at, visitor)?;
    Ok(true)
}

/// Loads the tables of all bitmaps, in use or not: their clusters are in use in any case. Refuses, by name,
/// what would not be kept as the specification wants it, and bitmaps that could come to take more than `clusters_max`.
pub fn load_tables(driver: &Qcow2Driver, header: &Header, clusters_max: u64) -> Result<Tables> {
    let tables = driver.bitmaps().load_tables(driver.image(), header)?;
    check_clusters(driver.image(), header.geometry, (&tables.directory, &tables.stored), clusters_max)?;
    Ok(tables)
}

/// Fails if these bitmaps could come to take more than `max` clusters. For one that records changes all of its bits
/// count, and not those that it has: an image that is written must not grow into one that is refused the next time.
pub fn check_clusters(
    image: &Arc<dyn Storage>,
    geometry: Geometry,
    (directory, stored): (&Directory, &[Arc<StoredBitmap>]),
    max: u64,
) -> Result<()> {
    let clusters_of = |len: u64| geometry.host_span(HostOffset(0), len).1;
    let bits_of = |index: usize, entry: &Entry| match stored.get(index) {
        Some(stored) if !entry.records() => stored.clusters().filter(Stored::has_place).count() as u64,
        Some(_) | None => u64::from(entry.table_entries),
    };
    let entries = directory.entries.iter().enumerate();
    let clusters: u64 =
        entries.map(|(index, entry)| clusters_of(entry.table_len()) + bits_of(index, entry)).sum();
    if clusters <= max {
        return Ok(());
    }
    let text = format!(
        "the image's dirty bitmaps could come to take {clusters} clusters, and only {max} are kept track of while it \
         is written; remove or disable some (nbd-img bitmap remove, disable), or use --read-only"
    );
    Err(Error::new(ErrorKind::Unsupported, text).with_path(&image.facts().path))
}

/// Where the directory, the tables and the bits lie.
pub fn places(tables: &Tables, geometry: Geometry) -> Places {
    let mut places = Vec::new();
    let Directory { at, len, entries, .. } = &tables.directory;
    if *len > 0 {
        places.push((*at, *len, Kind::BitmapDirectory));
    }
    for (entry, stored) in entries.iter().zip(&tables.stored) {
        places.push((HostOffset(entry.table_at), entry.table_len(), Kind::BitmapTable));
        places.extend(stored.clusters().filter_map(|stored| match stored {
            Stored::At(at) => Some((at, geometry.cluster_len(), Kind::BitmapData)),
            Stored::Zeroes | Stored::Ones => None,
        }));
    }
    places
}

/// Stores the bits of the enabled bitmaps and says that they are up to date. For the end: nothing is recorded
/// any more, and all that was is durable.
pub fn store(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let recorder = &writer.bitmaps;
    // Who gets it after this finds the image closed.
    let _storing = recorder.storing.lock();
    // Two may close it at the same time: the second finds what the first has come to.
    if recorder.lost.load(Ordering::SeqCst) {
        return Err(not_stored(lost()));
    }
    if !recorder.marked.load(Ordering::Acquire) {
        return Ok(());
    }
    check_writable(driver)?;
    let mut storing = Storing::new(driver, writer);
    let stored = storing.prepare(recorder).and_then(|directory_at| {
        // The new clusters are counted, and what was written to them above is durable.
        commit::commit(driver, writer)?;
        Ok(directory_at)
    });
    match stored {
        Ok(directory_at) => {
            // If this fails, nobody knows what the header leads to: nothing is given back, or tried again.
            let switched = storing.switch(directory_at);
            recorder.lost.store(switched.is_err(), Ordering::SeqCst);
            recorder.marked.store(switched.is_err(), Ordering::Release);
            switched.map_err(not_stored)
        }
        Err(error) => {
            recorder.lose(writer);
            storing.give_back();
            Err(not_stored(error))
        }
    }
}

/// Leaves the bits unstored, for a close whose last commit has failed: what was allocated for them is let go. Unless
/// another close has stored them.
pub fn give_up(writer: &Writer) {
    let recorder = &writer.bitmaps;
    // As `store` does.
    let _storing = recorder.storing.lock();
    if recorder.marked.load(Ordering::Acquire) && !recorder.lost.load(Ordering::SeqCst) {
        recorder.lose(writer);
    }
}

/// Clusters that bits, tables and a directory are written to.
pub struct Storing<'a> {
    driver: &'a Qcow2Driver,
    writer: &'a Writer,
    new: Vec<(HostCluster, u64)>,
    old: Vec<(HostOffset, u64)>,
}

impl<'a> Storing<'a> {
    /// Nothing is written yet.
    pub fn new(driver: &'a Qcow2Driver, writer: &'a Writer) -> Self {
        Storing { driver, writer, new: Vec::new(), old: Vec::new() }
    }

    /// What lies here is to be let go.
    pub fn replace(&mut self, at: HostOffset, len: u64) {
        self.old.push((at, len));
    }

    /// The table of the bitmap with this number in the directory is to be let go.
    pub fn replace_table_of(&mut self, index: usize) {
        if let Some(entry) = self.writer.bitmaps.directory().entries.get(index) {
            self.replace(HostOffset(entry.table_at), entry.table_len());
        }
    }

    /// So are its table and all its bits.
    pub fn replace_all_of(&mut self, index: usize) {
        self.replace_table_of(index);
        let Some(stored) = self.writer.bitmaps.stored(index) else { return };
        for stored in stored.clusters() {
            self.replace_cluster(stored);
        }
    }

    fn replace_cluster(&mut self, stored: Stored) {
        match stored {
            Stored::At(at) => self.replace(at, self.writer.geometry.cluster_len()),
            Stored::Zeroes | Stored::Ones => {}
        }
    }

    /// Writes everything new; returns where the directory is.
    fn prepare(&mut self, recorder: &Recorder) -> Result<HostCluster> {
        let mut directory = recorder.directory().clone();
        self.replace(directory.at, directory.len);
        for bitmap in recorder.stored_at_close() {
            let Some(entry) = directory.entries.get_mut(bitmap.entry) else { continue };
            entry.flags.remove(Flags::IN_USE);
            entry.table_entries = u32::try_from(bitmap.stored().clusters_len()).unwrap_or(u32::MAX);
            bitmap_bits::store_all(self.driver, self.writer, bitmap, OldClusters::Overwritten)?;
            if let Some(table) = self.write_table_of(bitmap)? {
                entry.table_at = table.start().0;
            }
        }
        self.write_new(&directory.bytes(), Kind::BitmapDirectory)
    }

    /// Writes the table of a bitmap, if it is another one than the file has; the clusters of bits that it does not lead to
    /// any more are to be let go.
    pub fn write_table_of(&mut self, bitmap: &LiveBitmap) -> Result<Option<HostCluster>> {
        let Some(before) = self.writer.bitmaps.stored(bitmap.entry) else { return Ok(None) };
        let table = bitmap.table();
        if before.clusters().map(Stored::encode).eq(table.iter().copied()) {
            return Ok(None);
        }
        let now = table.iter().map(Some).chain(std::iter::repeat(None));
        for (before, _) in before.clusters().zip(now).filter(|(before, now)| *now != Some(&before.encode())) {
            self.replace_cluster(before);
        }
        self.replace_table_of(bitmap.entry);
        self.write_table(&table).map(Some)
    }

    /// Clusters that bits of a bitmap have moved to are among the new ones.
    pub fn adopt_bits_of(&mut self, bitmap: &LiveBitmap) {
        for (_, _, now) in bitmap.moved() {
            if let Stored::At(at) = now {
                self.new.push((self.writer.geometry.host_at(self.writer.geometry.host_index(at)), 1));
            }
        }
    }

    /// Writes a table.
    pub fn write_table(&mut self, table: &[u64]) -> Result<HostCluster> {
        let bytes: Vec<u8> = table.iter().flat_map(|raw| raw.to_be_bytes()).collect();
        self.write_new(&bytes, Kind::BitmapTable)
    }

    /// Writes `bytes`, and zeroes up to the end of the last cluster, to new clusters in a row.
    pub fn write_new(&mut self, bytes: &[u8], kind: Kind) -> Result<HostCluster> {
        let cluster_len = self.writer.geometry.cluster_len();
        let clusters = (bytes.len() as u64).div_ceil(cluster_len).max(1);
        let host = loop {
            let allocated = self.writer.lock().allocator.allocate_stretch(clusters, kind);
            match allocated {
                Ok(host) => break host,
                Err(need) => satisfy(self.driver, self.writer, need)?,
            }
        };
        self.new.push((host, clusters));
        let mut padded = bytes.to_vec();
        padded.resize(usize::try_from(clusters * cluster_len).unwrap_or(bytes.len()), 0);
        write(self.driver, host.start(), &padded)?;
        Ok(host)
    }

    /// Turns the header to the new directory, and lets go of what the old one led to.
    fn switch(self, directory_at: HostCluster) -> Result<()> {
        let Storing { driver, writer, .. } = self;
        check_writable(driver)?;
        let at = HostOffset(writer.bitmaps.directory().extension_at.0 + DIRECTORY_OFFSET_AT);
        let image = driver.image();
        let sync = || {
            image.sync().map_err(|error| {
                writer.fail("a sync has failed, so nobody knows what is durable");
                storage_error(image, "cannot make the dirty bitmaps durable", at, error)
            })
        };
        // With a data file a commit that finds nothing to do, because another has just done it, syncs only that.
        if writer.geometry.is_external() {
            sync()?;
        }
        write(driver, at, &directory_at.start().0.to_be_bytes())?;
        sync()?;
        self.let_go_old();
        Ok(())
    }

    /// Nothing leads to what was to be let go any more, durably.
    pub fn let_go_old(&self) {
        let mut meta = self.writer.lock();
        for (at, len) in &self.old {
            let (first, count) = self.writer.geometry.host_span(*at, *len);
            meta.free(first, count, Content::Metadata);
        }
    }

    /// Nothing leads to the new clusters.
    pub fn give_back(&self) {
        let mut meta = self.writer.lock();
        for (host, clusters) in &self.new {
            meta.free(self.writer.geometry.host_index(host.start()), *clusters, Content::Metadata);
        }
    }
}

fn write(driver: &Qcow2Driver, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let image = driver.image();
    let written = image.pwrite(bytes, at, Durability::Later);
    written.map_err(|e| storage_error(image, "cannot write the image's dirty bitmaps", at, e))
}

fn lost() -> Error {
    Error::new(ErrorKind::Failed, "the image is being closed, and its dirty bitmaps could not be stored")
}

fn not_stored(error: Error) -> Error {
    let text = "the dirty bitmaps could not be stored, and will not be usable (all data is there)";
    Error::new(error.kind(), text).with_source(error)
}
