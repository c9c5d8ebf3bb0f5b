//! The external data file of an image that is written: what is known of its clusters, and giving their room
//! back.
//!
//! A cluster of the guest has one place there, its own, so nothing is handed out or counted. What has to be
//! known is whether a place that no entry leads to reads as zeroes: then a write to a part of it need not
//! fill the rest. And a place that lost its entry is punched later, when the loss is durable and no plan can
//! know it; if it has an entry again by then, it is left alone.

use std::collections::HashMap;

use super::super::driver::Qcow2Driver;
use super::super::tables::TableSlice;
use super::super::types::{ALL_UNITS, DataFile, Geometry, GuestCluster, HostIndex};
use super::allocator::Handed;
use super::meta::{Freed, Meta};
use super::provide;
use super::reclaim::When;
use super::runs::RunSet;
use super::slow::reads_zero_without_cluster;
use super::{Writer, begin_changes};
use crate::address::{GuestRange, HostOffset, HostRange};
use crate::error::Result;
use crate::mover::storage_error;
use crate::storage::Provision;
use crate::sync::Arc;

/// Most clusters that are punched, or found to be zero, at a time. Our choice: 64 MiB of the usual size; who
/// wants one of them does not wait for long, and a session's thread never for the lock.
const BATCH_CLUSTERS_MAX: u64 = 1024;

/// What is known of the places that no entry leads to. Clusters are numbered as the guest's are.
#[derive(Default)]
pub struct Places {
    /// They read as zeroes, and no plan can write there.
    zeroed: RunSet,
    /// Their loss is noted, to be punched when it is durable.
    lost: RunSet,
    /// Losses that were noted and do not count any more, as the place got an entry again, or another loss.
    void: HashMap<HostIndex, u32>,
    /// Grows whenever a place may have been left with old content and nothing noted of it.
    stale: u64,
}

impl Places {
    /// The place gets an entry, and is taken out of all sets. Returns whether it reads as zeroes.
    pub fn take(&mut self, geometry: Geometry, cluster: GuestCluster) -> Handed {
        let index = HostIndex(cluster.0);
        if self.lost.remove(index) {
            *self.void.entry(index).or_default() += 1;
        }
        let zeroed = self.zeroed.remove(index);
        Handed { host: geometry.place_of(cluster), zeroed }
    }

    /// Whether the place is known to read as zeroes.
    pub fn is_zeroed(&self, cluster: GuestCluster) -> bool {
        self.zeroed.contains(HostIndex(cluster.0))
    }

    /// The place lost its entry. `false`: there is no room to note that; its room is not given back.
    #[must_use]
    pub fn lose(&mut self, index: HostIndex) -> bool {
        let noted = self.lost.insert(index, 1);
        self.stale += u64::from(!noted);
        noted
    }

    /// A noted loss has become durable, and no plan knows the place any more. Returns whether it may be
    /// punched now.
    fn settle(&mut self, index: HostIndex) -> bool {
        let Some(void) = self.void.get_mut(&index) else { return self.lost.remove(index) };
        *void -= 1;
        if *void == 0 {
            self.void.remove(&index);
        }
        false
    }

    /// What became of places that were to be punched.
    fn punched(&mut self, first: HostIndex, len: u64, zeroed: bool) {
        if !(zeroed && self.zeroed.insert(first, len)) {
            self.stale += 1;
        }
    }

    /// Whether nothing is known of the place.
    fn is_unknown(&self, index: HostIndex) -> bool {
        !self.lost.contains(index) && !self.zeroed.contains(index) && !self.void.contains_key(&index)
    }
}

/// Whether the place of the cluster, which the caller has claimed, is a hole of the data file. Others in
/// the same hole, and in the same slice, are noted to read as zeroes, too.
pub fn is_hole(
    driver: &Qcow2Driver,
    writer: &Writer,
    slice: &TableSlice,
    cluster: GuestCluster,
) -> Result<bool> {
    let geometry = driver.geometry();
    let storage = driver.data_storage();
    let stale = writer.lock().places.stale;
    let at = geometry.place_of(cluster).start();
    let len = storage.len().map_err(|e| storage_error(storage, "cannot tell the file's length", at, e))?;
    // What a device holds behind its end nobody knows, and new space need not be zero.
    if !storage.facts().new_space_is_zero {
        return Ok(false);
    }
    let hole_end = match len > at.0 {
        false => u64::MAX,
        // Not being able to tell is no error.
        true => match storage.run_at(at) {
            Ok(run) if run.hole && at.0.saturating_add(run.len) >= len => u64::MAX,
            Ok(run) if run.hole => at.0.saturating_add(run.len),
            Ok(_) | Err(_) => return Ok(false),
        },
    };
    let end = GuestCluster(hole_end / geometry.cluster_len());
    if end <= cluster {
        return Ok(false);
    }
    let mut meta = writer.lock();
    // Else something that was written after the look may be left there.
    if meta.places.stale == stale {
        note_zeroes(driver, &mut meta, slice, cluster, end);
    }
    Ok(true)
}

/// Notes that the places behind `cluster` read as zeroes, as far as no entry of the slice leads to them.
fn note_zeroes(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &TableSlice,
    cluster: GuestCluster,
    end: GuestCluster,
) {
    let geometry = driver.geometry();
    let number = geometry.slice_of(geometry.start_of(cluster));
    for next in
        (cluster.0 + 1..end.0).take(usize::try_from(BATCH_CLUSTERS_MAX).unwrap_or(0)).map(GuestCluster)
    {
        let start = geometry.start_of(next);
        if geometry.slice_of(start) != number || start >= driver.disk_end() {
            return;
        }
        let empty =
            slice.entry(next).is_ok_and(|entry| reads_zero_without_cluster(driver, next, entry, ALL_UNITS));
        let index = HostIndex(next.0);
        if empty
            && !meta.claims.contains(&next)
            && meta.places.is_unknown(index)
            && !meta.places.zeroed.insert(index, 1)
        {
            return;
        }
    }
}

/// Gives the room of places back whose loss is durable and which no plan can know.
pub fn let_go(driver: &Qcow2Driver, writer: &Writer, run: Freed, when: When) {
    for (first, len) in claim_lost(writer, run) {
        let zeroed = when == When::Unpinned && punch(driver, writer, first, len);
        let mut meta = writer.lock();
        meta.places.punched(first, len, zeroed);
        for index in first.0..first.0 + len {
            meta.claims.remove(&GuestCluster(index));
        }
        writer.changed.notify_all();
    }
}

/// The part of a run that is punched at a time, and the rest.
pub fn split(run: Freed) -> (Freed, Option<Freed>) {
    let len = run.len.min(BATCH_CLUSTERS_MAX);
    let rest = Freed { first: HostIndex(run.first.0 + len), len: run.len - len, ..run };
    (Freed { len, ..run }, (rest.len > 0).then_some(rest))
}

/// Claims what of the run has not got an entry again, so that nobody maps it while it is punched.
fn claim_lost(writer: &Writer, run: Freed) -> Vec<(HostIndex, u64)> {
    let mut meta = writer.lock();
    let mut runs: Vec<(HostIndex, u64)> = Vec::new();
    for index in (run.first.0..run.first.0 + run.len).map(HostIndex) {
        if !meta.places.settle(index) {
            continue;
        }
        meta.claims.insert(GuestCluster(index.0));
        match runs.last_mut() {
            Some((first, len)) if first.0 + *len == index.0 => *len += 1,
            Some(_) | None => runs.push((index, 1)),
        }
    }
    runs
}

/// Returns whether the places read as zeroes now.
fn punch(driver: &Qcow2Driver, writer: &Writer, first: HostIndex, len: u64) -> bool {
    let geometry = driver.geometry();
    // What a raw data file has there must be zeroes, as the guest sees them.
    let wanted = writer.options.discard || geometry.data_file() == DataFile::ExternalRaw;
    let range = HostRange::new(geometry.host_at(first).start(), len * geometry.cluster_len());
    let Some(range) = range.filter(|_| wanted) else { return false };
    match driver.data_storage().zero(range, Provision::Unmap, true) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%error, "the room of a data file could not be given back");
            false
        }
    }
}

/// Gives every cluster of the range its entry where the data file is a raw one, as new images have it: without one a
/// reader would not look there. The range begins with a cluster, and reads as zeroes in the file.
pub fn map_places(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange) -> Result<()> {
    if driver.geometry().data_file() != DataFile::ExternalRaw || range.is_empty() {
        return Ok(());
    }
    begin_changes(driver, writer)?;
    provide::provide(driver, writer, range, provide::Places::Found)
}

/// Makes a raw data file as long as the guest's disk: it is to be read as that.
pub fn lengthen(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    let storage = driver.data_storage();
    let fail = |e| storage_error(storage, "cannot make the data file as long as the disk", HostOffset(0), e);
    if storage.len().map_err(fail)? < driver.disk_end() {
        storage.set_len(driver.disk_end()).map_err(fail)?;
        // The next one who looks finds it long enough, and would not sync it.
        storage
            .sync()
            .inspect_err(|_| writer.fail("a sync has failed, so nobody knows what is durable"))
            .map_err(fail)?;
    }
    Ok(())
}
