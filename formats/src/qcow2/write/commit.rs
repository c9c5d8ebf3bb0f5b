//! The commit: making all changes durable, in an order in which a crash at any moment leaves nothing
//! worse than clusters that nobody refers to.
//!
//! One thread commits at a time. It freezes copies of what is changed, and then:
//!
//! - the data of an external data file. Sync.
//! - *A*: refcounts (which have only grown, but for clusters whose last pointer is durably gone), new
//!   refcount blocks, the bodies of new L2 tables. Sync: now every cluster that *B* will point to is
//!   counted, and has its content.
//! - *A2*, only where there are new refcount blocks: the refcount table's entries, or the header's pointer
//!   to a grown one. Sync.
//! - *B*: the changed entries of live L2 tables and of the L1 table. Sync. Now the old pointers are gone,
//!   and the clusters that they led to may go, too.
//!
//! An error of a write leaves everything to the next commit. An error of a sync is final.

use std::collections::HashMap;

use super::super::driver::Qcow2Driver;
use super::super::types::SliceNumber;
use super::allocator::MovedTable;
use super::meta::{Content, DirtySlice, Extent, Freed};
use super::pins::Epoch;
use super::refcounts::BlockWrite;
use super::{Writer, bitmaps, check_changing, reclaim};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{check_writable, storage_error};
use crate::storage::{Durability, Storage};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Where the refcount table's offset and clusters stand in the header (specification).
const TABLE_POINTER_AT: HostOffset = HostOffset(48);

/// Makes everything that was changed before this call durable, and lets go what may go.
pub fn flush(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    commit(driver, writer)?;
    reclaim::reclaim(driver, writer, reclaim::When::Unpinned);
    Ok(())
}

/// Makes everything that was changed before this call durable. The clusters that were freed by it stay in
/// quarantine until somebody [reclaims](reclaim::reclaim) them.
pub fn commit(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let mut meta = writer.lock();
    let wanted = meta.next_commit;
    loop {
        if meta.done_commit >= wanted {
            return Ok(());
        }
        check_writable(driver)?;
        if !meta.committing {
            break;
        }
        writer.wait(&mut meta);
    }
    meta.committing = true;
    drop(meta);
    Committing { writer }.run(driver)
}

/// Waits for the right to commit, for who changes where commits write to: nobody else commits while it is held.
pub fn take_right<'a>(driver: &Qcow2Driver, writer: &'a Writer) -> Result<Committing<'a>> {
    let mut meta = writer.lock();
    loop {
        check_changing(driver, writer, &meta)?;
        if !meta.committing {
            break;
        }
        writer.wait(&mut meta);
    }
    meta.committing = true;
    drop(meta);
    Ok(Committing { writer })
}

/// Whether a sync of the image file or of its data file has failed for good.
pub fn is_sync_failed(driver: &Qcow2Driver) -> bool {
    driver.image().is_failed() || driver.data_storage().is_failed()
}

/// Commits if too much is changed.
pub fn relieve(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let full = writer.is_full(&writer.lock());
    if full { flush(driver, writer) } else { Ok(()) }
}

/// Commits, and returns when the clusters that were let go by it can be had.
pub fn flush_and_reclaim(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    commit(driver, writer)?;
    reclaim::reclaim_all(driver, writer, reclaim::When::Unpinned);
    Ok(())
}

/// Commits until nothing is left to do, stores the dirty bitmaps, and gives back what the file was made longer by and not used.
/// For the end: no plan is made any more, and what old ones still read is not reused.
pub fn settle(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    writer.begin_close();
    // Who is changing the disk's size comes to an end: the size and the bitmaps are those of one disk then.
    if writer.resizing.try_lock().is_none() {
        // That may take longer than whoever closes has got. What is wrong shows below.
        let _ = flush_and_reclaim(driver, writer);
        drop(writer.resizing.lock());
    }
    // What fails here leaves the bitmaps marked as in use; the rest is done all the same.
    let stored = match flush_and_reclaim(driver, writer) {
        Ok(()) => bitmaps::store(driver, writer),
        Err(error) if writer.is_failed() => return Err(error),
        Err(error) => {
            bitmaps::give_up(writer);
            Err(error)
        }
    };
    stored.and(conclude_all(driver, writer))
}

/// Commits until nothing is left to do, and gives back what the file was made longer by and not used.
fn conclude_all(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    // A commit lets clusters go, which changes refcounts for the next one.
    for _ in 0..SETTLE_ROUNDS {
        if writer.lock().is_settled() {
            break;
        }
        reclaim::reclaim_all(driver, writer, reclaim::When::Now);
        flush_and_reclaim(driver, writer)?;
    }
    writer.trim_file(driver)
}

/// Rounds after which nothing but errors can keep clusters from being let go: the commit that frees them,
/// the one that counts them, and one to spare.
const SETTLE_ROUNDS: usize = 3;

/// The right to commit; goes when dropped.
pub struct Committing<'a> {
    writer: &'a Writer,
}

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        if crate::sync::thread::panicking() {
            self.writer.failed.store(true, Ordering::Release);
        }
        let mut meta = self.writer.lock();
        meta.committing = false;
        self.writer.changed.notify_all();
    }
}

impl Committing<'_> {
    fn run(&self, driver: &Qcow2Driver) -> Result<()> {
        let writer = self.writer;
        let mut frozen = freeze(driver, writer);
        let outcome = write_all(driver, &mut frozen);
        if outcome.is_err() && (frozen.sync_failed || is_sync_failed(driver)) {
            writer.fail("a sync has failed, so nobody knows what is durable");
            return outcome;
        }
        if let Err(error) = outcome {
            put_back(writer, frozen);
            return Err(error);
        }
        conclude(writer, frozen);
        Ok(())
    }
}

/// What a commit writes.
struct Frozen {
    number: u64,
    epoch: Epoch,
    blocks: Vec<BlockWrite>,
    slices: HashMap<SliceNumber, DirtySlice>,
    bodies: Vec<(HostOffset, Vec<u8>)>,
    words: Vec<(HostOffset, Vec<u8>)>,
    l1: Vec<(usize, u64)>,
    entries: Vec<(usize, u64)>,
    table_at: HostOffset,
    moved: Option<(MovedTable, Vec<u8>)>,
    freed: Vec<Freed>,
    left: Vec<(super::super::types::HostIndex, u64)>,
    /// *A* is durable.
    a_durable: bool,
    sync_failed: bool,
}

fn freeze(driver: &Qcow2Driver, writer: &Writer) -> Frozen {
    let geometry = driver.geometry();
    let mut meta = writer.lock();
    let number = meta.next_commit;
    meta.next_commit += 1;
    let slices = meta.take_dirty();
    let (mut bodies, mut words) = (Vec::new(), Vec::new());
    for (number, dirty) in &slices {
        let offset = number.0.saturating_mul(geometry.slice_coverage_len());
        // A changed slice has a table: it was checked when it was changed.
        let Ok(Some(table)) = driver.l1().l2_table(offset) else { continue };
        let at = table.at(geometry.slice_offset_in_table(*number));
        match &dirty.extent {
            Extent::Body => bodies.push((at, dirty.slice.bytes(0..dirty.slice.len()))),
            Extent::Words(range) => {
                let at = HostOffset(at.0 + range.start as u64 * 8);
                words.push((at, dirty.slice.bytes(range.clone())));
            }
        }
    }
    bodies.sort_unstable_by_key(|(at, _)| *at);
    words.sort_unstable_by_key(|(at, _)| *at);
    let l1 = std::mem::take(&mut meta.dirty_l1).into_iter().map(|i| (i, driver.l1().raw(i))).collect();
    let allocator = &mut meta.allocator;
    let moved = allocator.moved.map(|moved| {
        let bytes = if moved.durable { Vec::new() } else { allocator.refcounts.table_bytes() };
        (moved, bytes)
    });
    let blocks = allocator.refcounts.freeze_blocks();
    let entries = allocator.refcounts.freeze_entries();
    let table_at = allocator.refcounts.table_at();
    let left = std::mem::take(&mut allocator.left);
    let freed = std::mem::take(&mut meta.freed);
    Frozen {
        number,
        epoch: writer.pins.now(),
        blocks,
        slices,
        bodies,
        words,
        l1,
        entries,
        table_at,
        moved,
        freed,
        left,
        a_durable: false,
        sync_failed: false,
    }
}

impl Frozen {
    /// Whether nothing goes into the image file.
    fn is_empty(&self) -> bool {
        self.blocks.is_empty()
            && self.slices.is_empty()
            && self.l1.is_empty()
            && self.entries.is_empty()
            && self.moved.is_none()
    }
}

fn write_all(driver: &Qcow2Driver, frozen: &mut Frozen) -> Result<()> {
    if driver.geometry().is_external() {
        // Before anything that leads to it can be durable.
        sync(driver.data_storage(), frozen)?;
        if frozen.is_empty() {
            return Ok(());
        }
    }
    let blocks = frozen.blocks.iter().map(|write| (write.at, &write.bytes));
    let bodies = frozen.bodies.iter().map(|(at, bytes)| (*at, bytes));
    for (at, bytes) in blocks.chain(bodies) {
        write(driver.image(), at, bytes)?;
    }
    if let Some((MovedTable { durable: false, .. }, table)) = &frozen.moved {
        write(driver.image(), frozen.table_at, table)?;
    }
    sync(driver.image(), frozen)?;
    frozen.a_durable = true;
    // Whoever found the image damaged meanwhile has said that nothing is written any more.
    check_writable(driver)?;
    if write_table_changes(driver, frozen)? {
        sync(driver.image(), frozen)?;
    }
    if frozen.words.is_empty() && frozen.l1.is_empty() {
        return Ok(());
    }
    check_writable(driver)?;
    for (at, bytes) in &frozen.words {
        write(driver.image(), *at, bytes)?;
    }
    for (index, raw) in &frozen.l1 {
        write(driver.image(), HostOffset(driver.l1_at().0 + *index as u64 * 8), &raw.to_be_bytes())?;
    }
    sync(driver.image(), frozen)
}

/// *A2*. Returns whether there was anything to write.
fn write_table_changes(driver: &Qcow2Driver, frozen: &Frozen) -> Result<bool> {
    // What a body in *A* has need not be written again.
    if !matches!(frozen.moved, Some((MovedTable { durable: false, .. }, _))) {
        for (index, raw) in &frozen.entries {
            write(driver.image(), HostOffset(frozen.table_at.0 + *index as u64 * 8), &raw.to_be_bytes())?;
        }
    }
    let Some((moved, _)) = &frozen.moved else { return Ok(!frozen.entries.is_empty()) };
    write_table_pointer(driver.image(), frozen.table_at, moved.clusters)?;
    Ok(true)
}

/// Points the header to the refcount table at `at`.
pub fn write_table_pointer(image: &Arc<dyn Storage>, at: HostOffset, clusters: u64) -> Result<()> {
    let clusters = u32::try_from(clusters)
        .map_err(|_| Error::new(ErrorKind::NoSpace, "the refcount table is too large"))?;
    let mut pointer = at.0.to_be_bytes().to_vec();
    pointer.extend(clusters.to_be_bytes());
    write(image, TABLE_POINTER_AT, &pointer)
}

fn write(image: &Arc<dyn Storage>, at: HostOffset, bytes: &[u8]) -> Result<()> {
    image
        .pwrite(bytes, at, Durability::Later)
        .map_err(|e| storage_error(image, "cannot write the image's metadata", at, e))
}

fn sync(storage: &Arc<dyn Storage>, frozen: &mut Frozen) -> Result<()> {
    storage.sync().map_err(|e| {
        frozen.sync_failed = true;
        storage_error(storage, "cannot make the image durable", HostOffset(0), e)
    })
}

/// Leaves what a failed commit was to write to the next one.
fn put_back(writer: &Writer, frozen: Frozen) {
    let mut meta = writer.lock();
    meta.allocator.refcounts.unwritten(&frozen.blocks, &frozen.entries);
    for (number, mut taken) in frozen.slices {
        if frozen.a_durable && taken.extent == Extent::Body {
            // Its table may have a pointer in the file now: it is a live one. It stays dirty, so that
            // nobody takes what it maps for durable.
            taken.extent = Extent::Words(0..taken.slice.len());
        }
        meta.put_back(number, taken);
    }
    meta.dirty_l1.extend(frozen.l1.iter().map(|(index, _)| *index));
    let still_there = meta.allocator.refcounts.table_at() == frozen.table_at;
    if let (Some((written, _)), Some(moved)) = (&frozen.moved, &mut meta.allocator.moved)
        && frozen.a_durable
        && written.clusters == moved.clusters
        && still_there
    {
        moved.durable = true;
    }
    meta.allocator.left.extend(frozen.left);
    meta.freed.extend(frozen.freed);
}

fn conclude(writer: &Writer, mut frozen: Frozen) {
    let mut freed = std::mem::take(&mut frozen.freed);
    let left = frozen.left.iter();
    freed.extend(left.map(|(first, len)| Freed { first: *first, len: *len, content: Content::Metadata }));
    reclaim::join_runs(&mut freed);
    let mut meta = writer.lock();
    meta.allocator.refcounts.written(&frozen.blocks);
    for dirty in frozen.slices.values() {
        dirty.slice.release();
    }
    if frozen.moved.is_some() && meta.allocator.refcounts.table_at() == frozen.table_at {
        meta.allocator.moved = None;
    }
    if !freed.is_empty() {
        meta.quarantine.push_back((frozen.epoch, freed));
    }
    meta.done_commit = frozen.number;
    writer.durable.store(frozen.number, Ordering::Release);
    writer.pins.advance();
    writer.changed.notify_all();
}
