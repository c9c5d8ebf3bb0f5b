//! Another size for the disk of an image that is used meanwhile.
//!
//! The order is that of the offline change (`qcow2::resize`), and so is what a crash leaves: a disk of either size,
//! and leaks at worst. Growing: a longer L1 table, which is whole and counted before the header leads to it, and a
//! longer data file; then the mapping reaches farther than the guest may go, so that what would come to light can be
//! zeroed; when that is durable the header gets the size, and when that is, the guest. Shrinking: the size first, in the
//! header and then in memory; then nothing behind it is mapped any more, and a data file is cut off, if need be by the next
//! change to the same size. Dirty bitmaps (`bitmap_size`) become those of the new disk between the header and the guest.

use super::super::driver::Qcow2Driver;
use super::super::resize::{L1_POINTER_AT, SIZE_AT, data_file, refuse, refuse_growth};
use super::super::types::{DataFile, HostCluster};
use super::bitmap_size::Prepared;
use super::data_file as places;
use super::meta::Content;
use super::metadata_map::Kind;
use super::{Writer, begin_changes, bitmap_size, check_changing, commit, satisfy, zero};
use crate::address::{GuestRange, HostOffset};
use crate::driver::{BlockDriver, ZeroRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{check_writable, read_exact, storage_error};
use crate::storage::{Durability, Provision, Storage};
use crate::sync::{Arc, thread};
use std::time::Duration;

/// How often requests are looked for that have seen the old end of the disk, and how many times. Our choice: they
/// end when the disk has answered them, and one that takes longer than ten seconds is ill.
const PLANS_PAUSE: Duration = Duration::from_millis(5);
const PLANS_TRIES: u32 = 2000;

/// What is said of an image that is failed.
const SYNC_FAILED: &str = "a sync has failed, so nobody knows what is durable";

/// See [`BlockDriver::resize`].
pub fn change(driver: &Qcow2Driver, writer: &Arc<Writer>, size: u64) -> Result<()> {
    let _resizing = writer.resizing.lock();
    let old_size = driver.size();
    if size == old_size && !driver.geometry().is_external() {
        return Ok(());
    }
    let (header, snapshots) = driver.opened_as();
    refuse(header, snapshots, size)?;
    bitmap_size::check(driver, writer, header, (old_size, size))?;
    if size > old_size {
        let foreign = writer.options.foreign_backing || driver.backing().is_none();
        refuse_growth(header, foreign)?;
    }
    if driver.geometry().is_external() {
        data_file::check_room(driver.data_storage(), size)?;
    }
    begin_changes(driver, writer)?;
    // A close waits for who has come this far.
    check_changing(driver, writer, &writer.lock())?;
    if size > old_size {
        grow(driver, writer, size)
    } else if size < old_size {
        shrink(driver, writer, old_size, size)
    } else {
        // Whoever made the disk smaller may have left the data file as it was.
        drop_behind(driver, writer, size, size)
    }
}

fn grow(driver: &Qcow2Driver, writer: &Arc<Writer>, size: u64) -> Result<()> {
    let old_size = driver.size();
    grow_l1(driver, writer, size)?;
    let data = driver.geometry().is_external().then(|| driver.data_storage());
    let old_len = data.map(data_file::length).transpose()?;
    let lengthen = |data| {
        data_file::lengthen(data, driver.geometry().data_file(), old_size, size)?;
        sync_data(writer, data)
    };
    // Nobody writes behind the old end of the disk before that moves.
    let prepared = data.map_or(Ok(()), lengthen).and_then(|()| {
        move_disk_end(driver, writer, size);
        wait_for_plans(driver, writer)?;
        zero_behind(driver, writer, old_size, size)?;
        bitmap_size::prepare(driver, writer, size)
    });
    // Once the size is on its way nobody knows which one the header has, and the data file has to do for either.
    let old_len = old_len.filter(|_| prepared.is_err());
    let grown = prepared.and_then(|bitmaps| change_size(driver, writer, (old_size, size), bitmaps));
    if grown.is_err() {
        // What is mapped behind it by now is found again by the next who makes the disk longer.
        move_disk_end(driver, writer, old_size);
        if let (Some(data), Some(old_len)) = (data, old_len) {
            take_back(driver, writer, data, old_len.max(old_size));
        }
        return grown;
    }
    driver.set_size(size);
    Ok(())
}

/// Cuts off what the data file was made longer by, once nobody counts on it any more; else it stays.
fn take_back(driver: &Qcow2Driver, writer: &Writer, data: &Arc<dyn Storage>, len: u64) {
    let free = check_writable(driver).and_then(|()| wait_for_plans(driver, writer));
    data_file::note_taken_back(free.and_then(|()| cut_data(writer, data, len)));
}

/// Takes from the data file what it has behind `size`, durably.
fn cut_data(writer: &Writer, data: &Arc<dyn Storage>, size: u64) -> Result<()> {
    data_file::cut(data, size)?;
    sync_data(writer, data)
}

/// A sync that fails is final, as in a commit.
fn sync_data(writer: &Writer, data: &Arc<dyn Storage>) -> Result<()> {
    data_file::sync(data).inspect_err(|_| writer.fail(SYNC_FAILED))
}

/// From here on the last cluster of the disk is another one. Who decided before that his piece of the old one was
/// all of it finds out under this lock.
fn move_disk_end(driver: &Qcow2Driver, writer: &Writer, end: u64) {
    let _meta = writer.lock();
    driver.set_disk_end(end);
}

/// Returns when nobody has a plan any more that was made before the call.
fn wait_for_plans(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let seen = {
        let _meta = writer.lock();
        let seen = writer.pins.now();
        writer.pins.advance();
        seen
    };
    for _ in 0..PLANS_TRIES {
        if writer.pins.oldest() > seen {
            return Ok(());
        }
        check_writable(driver)?;
        thread::sleep(PLANS_PAUSE);
        let meta = writer.lock();
        check_changing(driver, writer, &meta)?;
        if writer.pins.now() == seen {
            writer.pins.advance();
        }
    }
    let text =
        "requests on their way to the disk do not come to an end, so the disk keeps its size; try again";
    Err(Error::new(ErrorKind::Io, text))
}

/// Zeroes the rest of the last cluster and what the backing file has; behind that, what has no entry is zeroes.
fn zero_behind(driver: &Qcow2Driver, writer: &Arc<Writer>, from: u64, to: u64) -> Result<()> {
    let cluster_len = driver.geometry().cluster_len();
    let below = driver.backing().map_or(0, |backing| backing.size());
    let bare = from.max(below).checked_next_multiple_of(cluster_len).map_or(to, |bare| bare.min(to));
    if let Some(covered) = GuestRange::new(from, bare - from) {
        let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
        zero::write_zeroes(driver, writer, covered, request)?;
    }
    let end = to.checked_next_multiple_of(cluster_len).unwrap_or(to);
    let new = GuestRange::new(bare, end.saturating_sub(bare)).filter(|_| bare < to);
    match (driver.geometry().data_file(), new) {
        (_, None) => {}
        (DataFile::ExternalRaw, Some(new)) => places::map_places(driver, writer, new.prefix(to - bare))?,
        (DataFile::Internal | DataFile::External, Some(new)) => zero::drop_clusters(driver, writer, new)?,
    }
    commit::commit(driver, writer)
}

/// Makes the L1 table long enough, in the file and in memory.
fn grow_l1(driver: &Qcow2Driver, writer: &Writer, size: u64) -> Result<()> {
    let needed = driver.geometry().l1_entries_for(size);
    let known = index(driver.geometry().l1_entries_for(driver.size()));
    // What was unmapped by others who changed the size is in the file, too.
    commit::commit(driver, writer)?;
    if needed > driver.l1_entries() {
        relocate_l1(driver, writer, needed, known)?;
    } else {
        check_unknown(driver, &read_table(driver)?, known)?;
    }
    driver.l1().grow(index(needed));
    Ok(())
}

/// Puts a longer table in a place of its own and points the header there.
fn relocate_l1(driver: &Qcow2Driver, writer: &Writer, needed: u64, known: usize) -> Result<()> {
    let geometry = driver.geometry();
    let clusters = (needed * 8).div_ceil(geometry.cluster_len());
    let new = allocate(driver, writer, clusters)?;
    let (old_at, old_len) = (driver.l1_at(), driver.l1_entries() * 8);
    let moved = move_l1(driver, writer, new, needed, known);
    let (first, count) = match &moved {
        Ok(()) => geometry.host_span(old_at, old_len),
        // Where it failed for good, nothing is freed any more.
        Err(_) => (geometry.host_index(new.start()), clusters),
    };
    writer.lock().free(first, count, Content::Metadata);
    moved
}

fn allocate(driver: &Qcow2Driver, writer: &Writer, clusters: u64) -> Result<HostCluster> {
    loop {
        let mut meta = writer.lock();
        check_changing(driver, writer, &meta)?;
        let allocated = match clusters {
            // Wherever one is free: at the end of a device there may be none.
            1 => meta.allocator.allocate_metadata(Kind::L1),
            _ => meta.allocator.allocate_row(clusters, Kind::L1),
        };
        drop(meta);
        match allocated {
            Ok(host) => return Ok(host),
            Err(need) => satisfy(driver, writer, need)?,
        }
    }
}

/// If it fails with the header in doubt, the image is failed.
fn move_l1(driver: &Qcow2Driver, writer: &Writer, new: HostCluster, needed: u64, known: usize) -> Result<()> {
    let geometry = driver.geometry();
    // That its clusters are in use is durable before anything leads there.
    commit::commit(driver, writer)?;
    // Nobody writes to the table while it moves; what is changed meanwhile goes to the new one.
    let _right = commit::take_right(driver, writer)?;
    let mut table = read_table(driver)?;
    check_unknown(driver, &table, known)?;
    let len = (needed * 8).next_multiple_of(geometry.cluster_len());
    table.resize(usize::try_from(len).unwrap_or(0), 0);
    write(driver, new.start(), &table)?;
    sync(driver, writer)?;
    check_writable(driver)?;
    let entries = u32::try_from(needed).unwrap_or(u32::MAX);
    let pointer = [&entries.to_be_bytes()[..], &new.start().0.to_be_bytes()].concat();
    {
        let _file = writer.file.lock();
        let pointed = write(driver, L1_POINTER_AT, &pointer).and_then(|()| sync(driver, writer));
        if pointed.is_err() {
            // Whoever opens the image next may find either table: none of them may be changed any more.
            writer.fail("nobody knows which L1 table the header leads to");
            return pointed;
        }
    }
    driver.set_l1_place(new.start(), needed);
    Ok(())
}

/// The L1 table as it is in the file.
fn read_table(driver: &Qcow2Driver) -> Result<Vec<u8>> {
    let mut table = vec![0; index(driver.l1_entries() * 8)];
    read_exact(driver.image(), driver.l1_at(), &mut table)?;
    Ok(table)
}

/// Fails if the table has entries that nobody needed so far and that are not known: whoever made the disk smaller
/// has left them, and nothing in memory counts with what they lead to.
fn check_unknown(driver: &Qcow2Driver, table: &[u8], known: usize) -> Result<()> {
    let (entries, _) = table.as_chunks::<8>();
    let unknown = |(at, entry): (usize, &[u8; 8])| u64::from_be_bytes(*entry) != driver.l1().raw(at);
    if entries.iter().enumerate().skip(known).any(unknown) {
        let text =
            "the L1 table has entries behind the end of the disk; resize the image while nobody serves it";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(())
}

fn shrink(driver: &Qcow2Driver, writer: &Arc<Writer>, old_size: u64, size: u64) -> Result<()> {
    let bitmaps = bitmap_size::prepare(driver, writer, size)?;
    change_size(driver, writer, (old_size, size), bitmaps)?;
    move_disk_end(driver, writer, size);
    driver.set_size(size);
    if let Err(error) = drop_behind(driver, writer, old_size, size) {
        // Whoever makes the disk longer again zeroes it first.
        tracing::warn!(%error, "the disk is smaller, but the room behind its end could not be given back (resize --shrink to the same size tries again)");
    }
    Ok(())
}

fn drop_behind(driver: &Qcow2Driver, writer: &Arc<Writer>, old_size: u64, size: u64) -> Result<()> {
    let geometry = driver.geometry();
    let cluster_len = geometry.cluster_len();
    let tables = (geometry.l1_entries_for(size), geometry.l1_entries_for(old_size));
    let from = size.next_multiple_of(cluster_len);
    let to = match tables.0 < tables.1 {
        // A table that goes is emptied to its end: whoever made the disk smaller before may have left entries behind its
        // end, and nobody would find their clusters any more.
        true => tables.1.saturating_mul(geometry.l2_coverage_len()),
        false => old_size.checked_next_multiple_of(cluster_len).unwrap_or(old_size),
    };
    if let Some(behind) = GuestRange::new(from, to.saturating_sub(from)) {
        zero::drop_clusters(driver, writer, behind)?;
    }
    for index in index(tables.0)..index(tables.1) {
        let mut meta = writer.lock();
        check_changing(driver, writer, &meta)?;
        let raw = driver.l1().raw(index);
        // It has become the image's own when its entries went, so nobody else needs it.
        if let Ok(Some(table)) = geometry.decode_l1(raw)
            && geometry.is_owned(raw)
        {
            meta.set_l1(driver, index, 0);
            meta.free(geometry.host_index(table.start()), 1, Content::Metadata);
        }
    }
    commit::flush(driver, writer)?;
    if driver.geometry().is_external() {
        // Who decided before that all of the last cluster has a place may still be writing there.
        wait_for_plans(driver, writer)?;
        cut_data(writer, driver.data_storage(), size)?;
    }
    Ok(())
}

/// Makes the new size durable. One that has failed may be in the header all the same: it has the old one again then,
/// durably, or nothing is written any more. Else whoever opens the image next could find a shorter disk, and what was
/// answered for since would be gone with its end. With the size the dirty bitmaps become those of such a disk.
fn change_size(
    driver: &Qcow2Driver,
    writer: &Writer,
    (from, to): (u64, u64),
    bitmaps: Prepared<'_>,
) -> Result<()> {
    if let Err(error) = check_writable(driver).and_then(|()| bitmap_size::mark(driver, writer)) {
        bitmaps.give_back();
        return Err(error);
    }
    let changed = write_size(driver, writer, to);
    match changed {
        Ok(()) => bitmaps.apply(),
        Err(_) => bitmaps.give_back(),
    }
    if changed.is_err()
        && check_writable(driver).is_ok()
        && let Err(error) = write_size(driver, writer, from)
    {
        tracing::error!(%error, "the old size could not be written back");
        writer.fail("nobody knows which size the header has");
    }
    changed
}

/// Makes the size durable that the next one to open the image finds.
fn write_size(driver: &Qcow2Driver, writer: &Writer, size: u64) -> Result<()> {
    check_writable(driver)?;
    let _file = writer.file.lock();
    write(driver, SIZE_AT, &size.to_be_bytes())?;
    sync(driver, writer)
}

fn write(driver: &Qcow2Driver, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let image = driver.image();
    let written = image.pwrite(bytes, at, Durability::Later);
    written.map_err(|e| storage_error(image, "cannot write the image's metadata", at, e))
}

/// A sync that fails is final, as in a commit.
fn sync(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let image = driver.image();
    image.sync().map_err(|e| {
        writer.fail(SYNC_FAILED);
        storage_error(image, "cannot make the image durable", HostOffset(0), e)
    })
}

/// A count of table entries, or of their bytes, as one of memory; both are bounded by what an image may have.
fn index(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
