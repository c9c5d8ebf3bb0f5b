//! Writes that must wait: for a table, for room, for somebody else's claim, for old content to copy.
//!
//! One cluster at a time. Who is in here holds at most one claim while it does I/O, and waits for others
//! only without one.

use super::super::driver::Qcow2Driver;
use super::super::map::{self, Layer, LayerRun};
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{ALL_UNITS, Geometry, GuestCluster, HostCluster, L2Entry, SliceNumber};
use super::allocator::Need;
use super::meta::{Claim, Content, Extent};
use super::metadata_map::Kind;
use super::{MetaGuard, Writer, check_changing, closed, commit, compress, corrupt, data_file};
use super::{make_ready, prepare, satisfy, subclusters};
use crate::address::{GuestRange, HostOffset};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::plan::MapMode;
use crate::storage::Durability;
use crate::sync::Arc;

/// See [`BlockDriver::write_slow`](crate::BlockDriver::write_slow).
pub fn write(driver: &Qcow2Driver, writer: &Arc<Writer>, offset: u64, buf: &[u8]) -> Result<()> {
    make_ready(driver, writer)?;
    let range = mapped_range(driver, offset, buf.len() as u64)?;
    writer.record(driver, range)?;
    match &writer.compressing {
        Some(compressing) => compress::write(driver, writer, compressing, range, buf),
        None => write_clusters(driver, writer, offset, buf),
    }
}

/// Writes `buf` as it is, cluster by cluster. Whoever calls it has seen to what comes before a change.
pub fn write_clusters(driver: &Qcow2Driver, writer: &Arc<Writer>, offset: u64, buf: &[u8]) -> Result<()> {
    let geometry = driver.geometry();
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        commit::relieve(driver, writer)?;
        let room = geometry.cluster_len() - geometry.offset_in_cluster(at);
        let len = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
        let (part, behind) = rest.split_at(len);
        write_in_cluster(driver, writer, at, part)?;
        at += len as u64;
        rest = behind;
    }
    Ok(())
}

/// The range, which the mapping must reach; the guest need not.
fn mapped_range(driver: &Qcow2Driver, offset: u64, len: u64) -> Result<GuestRange> {
    let range = GuestRange::new(offset, len).filter(|range| range.end() <= driver.disk_end());
    range.ok_or_else(|| {
        let what = format!("{len} bytes reach beyond the disk of {} bytes", driver.disk_end());
        Error::new(ErrorKind::OutOfBounds, what).with_offset(offset)
    })
}

/// What is to be done for a cluster.
enum Step {
    /// Write into it.
    InPlace(HostCluster),
    /// Make it a cluster of its own; the old entry says what it holds now.
    Copy(ClaimGuard, L2Entry),
    /// See to this, then look again.
    Need(Need),
    /// Look again.
    Again,
}

fn write_in_cluster(driver: &Qcow2Driver, writer: &Arc<Writer>, offset: u64, buf: &[u8]) -> Result<()> {
    let geometry = driver.geometry();
    loop {
        own_table(driver, writer, offset)?;
        let Some(slice) = map::slice_at(driver, offset, MapMode::Wait)? else { continue };
        // Let go before anything is waited for: room may have to come from what it keeps.
        let pin = writer.pin();
        let units = geometry.units(geometry.offset_in_cluster(offset), buf.len() as u64);
        match step(driver, writer, &slice, geometry.cluster_of(offset), units)? {
            Step::InPlace(host) => {
                return write_data(driver, host.at(geometry.offset_in_cluster(offset)), buf);
            }
            Step::Copy(claim, old) if geometry.extended_l2() => {
                return subclusters::copy(driver, claim, old, offset, buf);
            }
            Step::Copy(claim, old) => return copy(driver, claim, old, offset, buf),
            Step::Need(need) => {
                drop(pin);
                satisfy(driver, writer, need)?;
            }
            Step::Again => {}
        }
    }
}

fn step(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    slice: &Arc<TableSlice>,
    cluster: GuestCluster,
    units: u32,
) -> Result<Step> {
    let geometry = driver.geometry();
    let start = geometry.start_of(cluster);
    let key = SliceKey { image: driver.number(), slice: geometry.slice_of(start) };
    let mut meta = lock_unclaimed(driver, writer, cluster)?;
    if !geometry.is_owned(driver.l1().raw(geometry.l1_index(start))) || !driver.tables().hold(key, slice) {
        return Ok(Step::Again);
    }
    let held = Held(Some(Arc::clone(slice)));
    let words = slice.entry_words(cluster);
    let entry = slice.entry(cluster).map_err(|fault| map::bad_entry(driver, "L2", start, fault))?;
    if let Err(what) = meta.check_entry(driver, entry) {
        drop(meta);
        return Err(corrupt(driver, writer, what));
    }
    if let Some(host) = geometry.overwritable(words, cluster, units) {
        return Ok(Step::InPlace(host));
    }
    if reads_zero_without_cluster(driver, cluster, entry, units) {
        match meta.allocate_zeroed(geometry, cluster) {
            Ok(Some(host)) => {
                meta.set_entry(driver, slice, cluster, geometry.encode_mapped(entry, host, units));
                return Ok(Step::InPlace(host));
            }
            Ok(None) => {}
            Err(need @ (Need::Block(_) | Need::Fault(_))) => return Ok(Step::Need(need)),
            // Perhaps there is one with old content.
            Err(Need::Room(_) | Need::Cluster(_) | Need::NoSpace) => {}
        }
    }
    let kept = kept_cluster(geometry, entry, words.raw);
    let (host, allocated, zeroed, units) = match kept {
        Some(host) => (host, false, false, units),
        None => match meta.allocate(geometry, cluster) {
            Ok(handed) => (handed.host, true, handed.zeroed, units | units_to_move(geometry, entry)),
            Err(need) => return Ok(Step::Need(need)),
        },
    };
    meta.claims.insert(cluster);
    held.keep();
    let claim = Claim { cluster, slice: Arc::clone(slice), host, allocated, zeroed, units };
    Ok(Step::Copy(ClaimGuard { writer: Arc::clone(writer), claim: Some(claim) }, entry))
}

/// The lock of the metadata, once nobody has a claim on the cluster, and while mappings may be changed.
pub fn lock_unclaimed<'a>(
    driver: &Qcow2Driver,
    writer: &'a Writer,
    cluster: GuestCluster,
) -> Result<MetaGuard<'a>> {
    let mut meta = writer.lock();
    while meta.claims.contains(&cluster) {
        check_changing(driver, writer, &meta)?;
        writer.wait(&mut meta);
    }
    check_changing(driver, writer, &meta)?;
    Ok(meta)
}

/// The host cluster that an entry keeps, and that what is not data yet may be written to: nothing else refers
/// to it.
pub fn kept_cluster(geometry: Geometry, entry: L2Entry, raw: u64) -> Option<HostCluster> {
    match entry {
        L2Entry::Zero { host } | L2Entry::Split { host, .. } => host.filter(|_| geometry.is_sole(raw)),
        L2Entry::Unallocated | L2Entry::Data { .. } | L2Entry::Compressed(_) => None,
    }
}

/// The units that have to be in the next host cluster, too. Where there are no subclusters all of it is
/// copied anyway, and this says nothing.
pub fn units_to_move(geometry: Geometry, entry: L2Entry) -> u32 {
    match entry {
        L2Entry::Split { subclusters, .. } => subclusters.allocated(),
        L2Entry::Compressed(_) if geometry.extended_l2() => ALL_UNITS,
        L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed(_) => 0,
    }
}

/// Whether these units of the cluster read as zeroes by its entry.
pub fn reads_zero(driver: &Qcow2Driver, cluster: GuestCluster, entry: L2Entry, units: u32) -> bool {
    match entry {
        L2Entry::Unallocated => !driver.backing_reaches(cluster),
        L2Entry::Zero { .. } => true,
        L2Entry::Data { .. } | L2Entry::Compressed(_) => false,
        L2Entry::Split { subclusters, .. } => {
            let open = units & !subclusters.zero();
            subclusters.allocated() & units == 0 && !subclusters::backing_has(driver, cluster, open)
        }
    }
}

/// Whether these units of the cluster read as zeroes to whoever opens the image, so that there is nothing to be done
/// where zeroes are wanted. See [`Qcow2Driver::marks_zeroes`].
pub fn is_zero_for_good(driver: &Qcow2Driver, cluster: GuestCluster, entry: L2Entry, units: u32) -> bool {
    let left_to_backing = match entry {
        L2Entry::Unallocated => units,
        L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed(_) => 0,
        L2Entry::Split { subclusters, .. } => units & !subclusters.allocated() & !subclusters.zero(),
    };
    let unmarked = driver.marks_zeroes() && left_to_backing != 0;
    !unmarked && reads_zero(driver, cluster, entry, units)
}

/// Whether these units of the cluster read as zeroes and it has no host cluster.
pub fn reads_zero_without_cluster(
    driver: &Qcow2Driver,
    cluster: GuestCluster,
    entry: L2Entry,
    units: u32,
) -> bool {
    let empty = match entry {
        L2Entry::Zero { host } | L2Entry::Split { host, .. } => host.is_none(),
        L2Entry::Unallocated | L2Entry::Data { .. } | L2Entry::Compressed(_) => true,
    };
    empty && reads_zero(driver, cluster, entry, units)
}

/// Writes the claimed cluster, what `buf` does not cover with its old content, and maps it.
fn copy(driver: &Qcow2Driver, claim: ClaimGuard, old: L2Entry, offset: u64, buf: &[u8]) -> Result<()> {
    let geometry = driver.geometry();
    let within = geometry.offset_in_cluster(offset);
    let start = offset - within;
    let host = claim.host()?;
    if buf.len() as u64 == geometry.cluster_len() {
        write_data(driver, host.start(), buf)?;
        return claim.publish(driver);
    }
    let perhaps = claim.is_zeroed() || geometry.is_external();
    if perhaps && rest_is_zero(driver, old, offset, buf.len() as u64)? && claim.finds_zeroes(driver)? {
        write_data(driver, host.at(within), buf)?;
        return claim.publish(driver);
    }
    let mut bytes = vec![0; usize::try_from(geometry.cluster_len()).unwrap_or(0)];
    let from = usize::try_from(within).unwrap_or(usize::MAX);
    let too_long = || Error::new(ErrorKind::InvalidInput, "a write reaches out of its cluster");
    let (head, rest) = bytes.split_at_mut_checked(from).ok_or_else(too_long)?;
    let (middle, tail) = rest.split_at_mut_checked(buf.len()).ok_or_else(too_long)?;
    read_old(driver, old, start, head)?;
    middle.copy_from_slice(buf);
    let tail_at = offset + buf.len() as u64;
    // Behind the end of the disk there is nothing to copy.
    let there = driver.disk_end().saturating_sub(tail_at).min(tail.len() as u64);
    let there = usize::try_from(there).unwrap_or(0);
    read_old(driver, old, tail_at, tail.get_mut(..there).unwrap_or_default())?;
    let end = part_on_disk(driver, start, geometry.cluster_len());
    write_data(driver, host.start(), bytes.get(..usize::try_from(end).unwrap_or(0)).unwrap_or_default())?;
    claim.publish(driver)
}

/// How many of the `len` bytes of clusters from the guest's `start` on have a place in the file: a data file
/// ends with the disk, which may end inside of its last cluster.
pub fn part_on_disk(driver: &Qcow2Driver, start: u64, len: u64) -> u64 {
    if driver.geometry().is_external() { len.min(driver.disk_end().saturating_sub(start)) } else { len }
}

/// Whether the cluster reads as zeroes where a write of `len` bytes at `offset` does not reach.
fn rest_is_zero(driver: &Qcow2Driver, old: L2Entry, offset: u64, len: u64) -> Result<bool> {
    match old {
        L2Entry::Zero { .. } => Ok(true),
        L2Entry::Unallocated => {
            let part = GuestRange::new(offset, len);
            part.map_or(Ok(false), |part| map::below_is_zero_around(driver, part))
        }
        L2Entry::Data { .. } | L2Entry::Compressed(_) | L2Entry::Split { .. } => Ok(false),
    }
}

/// The old content of a part of one cluster, which is of one kind.
pub fn read_old(driver: &Qcow2Driver, old: L2Entry, offset: u64, buf: &mut [u8]) -> Result<()> {
    if buf.is_empty() {
        return Ok(());
    }
    let geometry = driver.geometry();
    let layer = match old {
        L2Entry::Unallocated => Layer::Unallocated,
        L2Entry::Zero { host } => Layer::Zero { allocated: host.is_some() },
        L2Entry::Data { host, .. } => Layer::Data(host.at(geometry.offset_in_cluster(offset))),
        L2Entry::Compressed(blob) => Layer::Compressed(blob),
        L2Entry::Split { host, subclusters } => subclusters::layer(geometry, host, subclusters, offset),
    };
    driver.read_run(LayerRun { offset, len: buf.len() as u64, layer }, buf)
}

pub fn write_data(driver: &Qcow2Driver, at: HostOffset, buf: &[u8]) -> Result<()> {
    let storage = driver.data_storage();
    storage.pwrite(buf, at, Durability::Later).map_err(|e| storage_error(storage, "cannot write", at, e))
}

/// Sees to it that the L2 table for the guest's byte at `offset` exists and nobody else refers to it.
pub fn own_table(driver: &Qcow2Driver, writer: &Writer, offset: u64) -> Result<()> {
    let geometry = driver.geometry();
    let index = geometry.l1_index(offset);
    loop {
        let raw = driver.l1().raw(index);
        let old = geometry.decode_l1(raw).map_err(|fault| map::bad_entry(driver, "L1", offset, fault))?;
        if old.is_some() && geometry.is_owned(raw) {
            return Ok(());
        }
        let slices = slices_of_table(driver, old, offset)?;
        let mut meta = writer.lock();
        if driver.l1().raw(index) != raw {
            continue;
        }
        check_changing(driver, writer, &meta)?;
        let host = match meta.allocator.allocate_metadata(Kind::L2) {
            Ok(host) => host,
            Err(need) => {
                drop(meta);
                satisfy(driver, writer, need)?;
                continue;
            }
        };
        let commit = meta.next_commit;
        for (number, slice) in slices {
            let key = SliceKey { image: driver.number(), slice: number };
            // Nobody can have changed it: the table was not there or was not ours until now.
            let slice = driver.tables().hold_or_insert(key, slice);
            match old {
                Some(_) => slice.touch(commit),
                // There may be one of a table that is gone, which nobody looks at any more.
                None => slice.clear(commit),
            }
            meta.mark(number, &slice, Extent::Body);
        }
        if let Some(old) = old {
            meta.free(geometry.host_index(old.start()), 1, Content::Metadata);
        }
        meta.set_l1(driver, index, geometry.encode_owned(host));
        return Ok(());
    }
}

/// All slices of the table that covers `offset`: as they are, or empty where there is no table.
fn slices_of_table(
    driver: &Qcow2Driver,
    old: Option<HostCluster>,
    offset: u64,
) -> Result<Vec<(SliceNumber, Arc<TableSlice>)>> {
    let geometry = driver.geometry();
    let coverage = geometry.slice_coverage_len();
    let start = offset - offset % geometry.l2_coverage_len();
    let count = geometry.l2_coverage_len() / coverage;
    let slice = |number: u64| {
        let at = start + number * coverage;
        let slice = match old {
            None => Arc::new(TableSlice::empty(geometry)),
            Some(_) => map::slice_at(driver, at, MapMode::Wait)?
                .ok_or_else(|| Error::new(ErrorKind::Io, "an L2 table has vanished from memory"))?,
        };
        Ok((geometry.slice_of(at), slice))
    };
    (0..count).map(slice).collect()
}

/// The range of whole clusters in `range`, the last one of the disk counted as whole.
pub fn whole_clusters(driver: &Qcow2Driver, range: GuestRange) -> GuestRange {
    whole(driver, range, driver.geometry().cluster_len())
}

/// The same with the units of clusters that have a state of their own.
pub fn whole_units(driver: &Qcow2Driver, range: GuestRange) -> GuestRange {
    whole(driver, range, driver.geometry().unit_len())
}

fn whole(driver: &Qcow2Driver, range: GuestRange, len: u64) -> GuestRange {
    let start = range.offset().next_multiple_of(len);
    let end = match range.end() == driver.disk_end() {
        true => range.end(),
        false => range.end() - range.end() % len,
    };
    GuestRange::new(start, end.saturating_sub(start)).unwrap_or(range.prefix(0))
}

/// Whether a piece of one cluster is made of whole parts of `len` bytes. A last one that counted as whole when its
/// request came does not any more once the disk has become longer. Under the lock of the metadata.
pub fn is_whole(driver: &Qcow2Driver, piece: GuestRange, len: u64) -> bool {
    piece.end().is_multiple_of(len) || piece.end() == driver.disk_end()
}

/// A hold on a slice, which ends unless it is kept.
struct Held(Option<Arc<TableSlice>>);

impl Held {
    /// Leaves the hold to whoever has the slice now.
    fn keep(mut self) -> Option<Arc<TableSlice>> {
        self.0.take()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(slice) = &self.0 {
            slice.release();
        }
    }
}

/// A claim that is given back unless it is published.
pub struct ClaimGuard {
    writer: Arc<Writer>,
    claim: Option<Claim>,
}

impl ClaimGuard {
    /// Where the data goes.
    pub fn host(&self) -> Result<HostCluster> {
        let claim = self.claim.as_ref();
        claim.map(|claim| claim.host).ok_or_else(|| Error::new(ErrorKind::Failed, "a claim has ended"))
    }

    /// Whether it is known to read as zeroes there.
    fn is_zeroed(&self) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.zeroed)
    }

    /// Whether it reads as zeroes there, which a data file may have to be asked for.
    fn finds_zeroes(&self, driver: &Qcow2Driver) -> Result<bool> {
        match &self.claim {
            Some(claim) if !claim.zeroed && driver.geometry().is_external() => {
                data_file::is_hole(driver, &self.writer, &claim.slice, claim.cluster)
            }
            Some(_) | None => Ok(self.is_zeroed()),
        }
    }

    /// Whether the host cluster was allocated for it, and which units it is to have.
    pub fn units(&self) -> (bool, u32) {
        self.claim.as_ref().map_or((false, 0), |claim| (claim.allocated, claim.units))
    }

    /// Maps the cluster.
    pub fn publish(mut self, driver: &Qcow2Driver) -> Result<()> {
        let Some(claim) = self.claim.take() else { return Err(closed()) };
        if prepare::end_claims(driver, &self.writer, vec![claim], true) { Ok(()) } else { Err(closed()) }
    }
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            prepare::drop_claims(&self.writer, vec![claim]);
        }
    }
}
