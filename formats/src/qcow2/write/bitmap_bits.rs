//! Storing the new bits of dirty bitmaps: when they are too many to stay in memory, and at the close.
//!
//! Nobody else reads the bits of an enabled bitmap out of the file once the image has been changed, until it is closed: the
//! bitmap was durably marked as in use before, and after a crash counts as inconsistent, whatever its clusters
//! hold. So new bits are simply added to them where they lie. Where there is no cluster, or others count on
//! it, too, one is allocated: memory remembers it, and the table that leads to it is written at the close. After a
//! crash nothing leads to it, and it is a leak at worst.
//!
//! One thread at a time stores bits of an image, without the lock of the metadata. Whoever marks bits does not
//! wait for it, and whoever asks for them finds each in memory, in the file, or in both.

use super::super::bitmaps::{ClusterBits, LiveBitmap, Stored, part_of};
use super::super::driver::Qcow2Driver;
use super::super::types::HostCluster;
use super::meta::Content;
use super::metadata_map::Kind;
use super::{Writer, satisfy};
use crate::address::HostOffset;
use crate::error::Result;
use crate::mover::{check_writable, read_exact, storage_error};
use crate::storage::Durability;
use crate::sync::atomic::Ordering;

/// The part of the budget that is made free, so that not every change has to wait. Our choice: 126 pages.
const SPILLED_SHARE: u64 = 16;
/// The part of the budget by which new bits may grow until what has failed is tried again. Our choice.
const RETRY_SHARE: u64 = 8;
/// Clusters that may fail in a row before it is left at that. Our choice: one bad place is no reason.
const FAILURES_MAX: u32 = 3;

/// Stores new bits if there are too many in memory; for who may wait, and before he marks his own. What cannot be
/// stored stays in memory, beyond the budget if it has to: no bit is lost, and no write fails for it, unless the image is
/// found to be damaged.
pub fn relieve(driver: &Qcow2Driver, writer: &Writer) {
    let recorder = &writer.bitmaps;
    if !recorder.is_full() {
        return;
    }
    let mut storing = recorder.storing.lock();
    // What is closed is stored, and nothing is to follow. See `begin_close`, after which the close takes this lock.
    if writer.closing.load(Ordering::SeqCst) || !recorder.is_full() {
        return;
    }
    let budget = writer.options.bitmap_len_max;
    let kept_len = budget - budget / SPILLED_SHARE;
    // As much as is too much now, and no more: who sets bits meanwhile need not wait, and could keep this going.
    let mut left = recorder.held_len().saturating_sub(kept_len);
    let mut failures = 0;
    while left > 0 && failures < FAILURES_MAX && recorder.held_len() > kept_len {
        let Some((bitmap, cluster)) = recorder.next_changed(&mut storing) else { break };
        match store_cluster(driver, writer, bitmap, cluster, OldClusters::Overwritten) {
            Ok(stored_len) => {
                left = left.saturating_sub(stored_len);
                failures = 0;
            }
            Err(error) => {
                failures += 1;
                recorder.warn_once(&error);
            }
        }
    }
    let failed = failures == FAILURES_MAX;
    let retry_at = if failed { recorder.held_len() + budget / RETRY_SHARE } else { 0 };
    recorder.limit_to(retry_at.max(budget));
}

/// What may happen to the clusters of bits that the file's table leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OldClusters {
    /// New bits are added to them: the bitmap is in use.
    Overwritten,
    /// They stay as they are: the table in the file is valid.
    Kept,
}

/// Stores all new bits of a bitmap.
pub fn store_all(driver: &Qcow2Driver, writer: &Writer, bitmap: &LiveBitmap, old: OldClusters) -> Result<()> {
    // What is still marked meanwhile is of writes that fail, or comes here, too.
    while let Some(cluster) = bitmap.next_changed(0) {
        store_cluster(driver, writer, bitmap, cluster, old)?;
    }
    Ok(())
}

/// Lets go of the clusters that nothing in the file leads to. Nobody may ask for the bits any more.
pub fn give_back(writer: &Writer, bitmap: &LiveBitmap) {
    for (_, _, now) in bitmap.moved() {
        free(writer, now);
    }
}

/// Stores the new bits of a cluster; returns how many bytes they took in memory.
fn store_cluster(
    driver: &Qcow2Driver,
    writer: &Writer,
    bitmap: &LiveBitmap,
    cluster: usize,
    old: OldClusters,
) -> Result<u64> {
    check_writable(driver)?;
    let bits = bitmap.cluster_bits(cluster);
    let place = match bits.stored {
        // There are no others.
        Stored::Ones => Stored::Ones,
        Stored::At(at)
            if bits.is_moved || old == OldClusters::Overwritten && is_sole(driver, writer, at)? =>
        {
            add_in_place(driver, bitmap, (cluster, at), &bits)?;
            bits.stored
        }
        Stored::At(_) | Stored::Zeroes => write_elsewhere(driver, writer, bitmap, (cluster, &bits))?,
    };
    bitmap.note_stored(cluster, &bits, place);
    Ok(bits.held_len())
}

/// Whether nothing else counts on the cluster: a snapshot of an image that contradicts itself might. A refcount of 1 is
/// trusted, as it is where data is written in place.
fn is_sole(driver: &Qcow2Driver, writer: &Writer, at: HostOffset) -> Result<bool> {
    loop {
        let count = writer.lock().allocator.refcounts.get(writer.geometry.host_index(at));
        match count {
            Ok(count) => return Ok(count == 1),
            Err(need) => satisfy(driver, writer, need)?,
        }
    }
}

/// Adds the new bits to those in the file, page by page; what has them already is not written.
fn add_in_place(
    driver: &Qcow2Driver,
    bitmap: &LiveBitmap,
    (cluster, at): (usize, HostOffset),
    bits: &ClusterBits,
) -> Result<()> {
    for (offset, new) in &bits.new {
        let len = bitmap.used_len(cluster, *offset, bitmap.page_len());
        let mut before = vec![0; usize::try_from(len).unwrap_or(0)];
        let page_at = HostOffset(at.0 + offset);
        read_exact(driver.image(), page_at, &mut before)?;
        let mut now = before.clone();
        new.add_to(&mut now);
        bitmap.clear_tail(cluster, *offset, &mut now);
        if now != before {
            write(driver, page_at, &now)?;
        }
    }
    Ok(())
}

/// Writes all bits of a cluster to a new one; returns where they are.
fn write_elsewhere(
    driver: &Qcow2Driver,
    writer: &Writer,
    bitmap: &LiveBitmap,
    (cluster, bits): (usize, &ClusterBits),
) -> Result<Stored> {
    let cluster_len = writer.geometry.cluster_len();
    let used = bitmap.used_len(cluster, 0, cluster_len);
    let mut before = vec![0; usize::try_from(used).unwrap_or(0)];
    if let Stored::At(at) = bits.stored {
        read_exact(driver.image(), at, &mut before)?;
    }
    let mut now = before.clone();
    for (offset, new) in &bits.new {
        new.add_to(part_of(&mut now, *offset, bitmap.page_len()));
    }
    bitmap.clear_tail(cluster, 0, &mut now);
    if now == before {
        return Ok(bits.stored);
    }
    if used == cluster_len && now.iter().all(|byte| *byte == u8::MAX) {
        return Ok(Stored::Ones);
    }
    now.resize(usize::try_from(cluster_len).unwrap_or(0), 0);
    write_cluster(driver, writer, &now)
}

/// Writes a cluster of bits to a new place, which nothing leads to yet.
pub fn write_cluster(driver: &Qcow2Driver, writer: &Writer, bits: &[u8]) -> Result<Stored> {
    let at = allocate(driver, writer)?.start();
    match write(driver, at, bits) {
        Ok(()) => Ok(Stored::At(at)),
        Err(error) => {
            free(writer, Stored::At(at));
            Err(error)
        }
    }
}

fn allocate(driver: &Qcow2Driver, writer: &Writer) -> Result<HostCluster> {
    loop {
        let allocated = writer.lock().allocator.allocate_metadata(Kind::BitmapData);
        match allocated {
            Ok(host) => return Ok(host),
            Err(need) => satisfy(driver, writer, need)?,
        }
    }
}

/// Lets go of a place that nothing leads to.
pub fn free(writer: &Writer, stored: Stored) {
    match stored {
        Stored::At(at) => writer.lock().free(writer.geometry.host_index(at), 1, Content::Metadata),
        Stored::Zeroes | Stored::Ones => {}
    }
}

fn write(driver: &Qcow2Driver, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let image = driver.image();
    let written = image.pwrite(bytes, at, Durability::Later);
    written.map_err(|e| storage_error(image, "cannot write the bits of a dirty bitmap", at, e))
}
