//! Zeroes with room: clusters in the file for a range, so that later writes there need no more; and the places of a raw
//! data file, which are there already.
//!
//! Many clusters at a time: claimed under one lock, given room and zeroed in as few calls as the places
//! that they lie in allow, and mapped under one lock again. Who is in here waits for nobody while he has
//! claims.

use super::super::driver::Qcow2Driver;
use super::super::map;
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{ALL_UNITS, GuestCluster, HostCluster, HostIndex};
use super::allocator::Need;
use super::meta::{Claim, INTO_METADATA, Meta};
use super::zero::by_cluster;
use super::{Writer, closed, commit, corrupt, prepare, satisfy, slow, zero};
use crate::address::{GuestRange, HostOffset, HostRange};
use crate::error::Result;
use crate::mover::storage_error;
use crate::plan::MapMode;
use crate::storage::Provision;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Most clusters that are claimed at a time. Our choice: 64 MiB of the usual size, and others who want one of
/// them do not wait for long.
const BATCH_CLUSTERS_MAX: u64 = 1024;

/// What is done about the places of clusters before they are mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Places {
    /// They get room, and zeroes in it.
    Made,
    /// They read as zeroes already, and have what room they have.
    Found,
}

/// Gives every cluster of the range a host cluster that reads as zeroes.
pub fn provide(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange, places: Places) -> Result<()> {
    let geometry = driver.geometry();
    let mut rest = range;
    while !rest.is_empty() {
        commit::relieve(driver, writer)?;
        let part = rest.prefix(map::up_to_boundary(rest.offset(), geometry.slice_coverage_len()));
        let part = part.prefix(BATCH_CLUSTERS_MAX * geometry.cluster_len());
        slow::own_table(driver, writer, part.offset())?;
        let Some(slice) = map::slice_at(driver, part.offset(), MapMode::Wait)? else { continue };
        rest = rest.skip(provide_part(driver, writer, &slice, part, places)?);
    }
    Ok(())
}

/// As [`provide`], in one slice; returns how many bytes are done.
fn provide_part(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    slice: &Arc<TableSlice>,
    part: GuestRange,
    places: Places,
) -> Result<u64> {
    let pin = writer.pin();
    let mut batch = Batch { writer, claims: Vec::new(), runs: Vec::new(), len: 0 };
    match gather(driver, writer, slice, part, &mut batch)? {
        Gathered::Batch => {}
        Gathered::Need(need) => {
            drop(pin);
            satisfy(driver, writer, need)?;
            return Ok(0);
        }
        Gathered::NotWhole => {
            drop(pin);
            let first = part.prefix(map::up_to_boundary(part.offset(), driver.geometry().cluster_len()));
            zero::write_zero_bytes(driver, writer, first)?;
            return Ok(first.len());
        }
    }
    match places {
        Places::Made => batch.runs.iter().try_for_each(|run| run.make_room(driver))?,
        Places::Found => {}
    }
    let done = batch.len;
    batch.publish(driver)?;
    Ok(done)
}

/// What came of gathering.
enum Gathered {
    /// What is in the batch, perhaps nothing.
    Batch,
    /// This comes before anything can be had.
    Need(Need),
    /// The first piece has to be written.
    NotWhole,
}

/// Fills the batch with what can be had now. The caller has a pin since before: whoever moves the end of the disk
/// waits for those who have seen the old one.
fn gather(
    driver: &Qcow2Driver,
    writer: &Writer,
    slice: &Arc<TableSlice>,
    part: GuestRange,
    batch: &mut Batch<'_>,
) -> Result<Gathered> {
    let geometry = driver.geometry();
    let key = SliceKey { image: driver.number(), slice: geometry.slice_of(part.offset()) };
    let mut meta = slow::lock_unclaimed(driver, writer, geometry.cluster_of(part.offset()))?;
    let owned = geometry.is_owned(driver.l1().raw(geometry.l1_index(part.offset())));
    if !owned || !driver.tables().hold(key, slice) {
        return Ok(Gathered::Batch);
    }
    let version = meta.allocator.map.version().load(Ordering::Acquire);
    let mut stopped = None;
    for piece in by_cluster(driver, part) {
        let cluster = geometry.cluster_of(piece.offset());
        if meta.claims.contains(&cluster) {
            break;
        }
        stopped = match slow::is_whole(driver, piece, geometry.cluster_len()) {
            true => take(driver, &mut meta, slice, key, cluster, batch).err(),
            false => Some(Stop::NotWhole),
        };
        if stopped.is_some() {
            break;
        }
        batch.len += piece.len();
    }
    slice.release();
    if meta.allocator.map.version().load(Ordering::Acquire) != version && batch.hits_metadata(driver, &meta) {
        stopped = Some(Stop::Fault(INTO_METADATA));
    }
    match stopped {
        Some(Stop::Fault(what)) => {
            drop(meta);
            Err(corrupt(driver, writer, what))
        }
        // What there is comes first.
        Some(Stop::Need(need)) if batch.len == 0 => Ok(Gathered::Need(need)),
        Some(Stop::NotWhole) if batch.len == 0 => Ok(Gathered::NotWhole),
        Some(Stop::Need(_) | Stop::NotWhole) | None => Ok(Gathered::Batch),
    }
}

/// Why a batch ends.
enum Stop {
    /// The next cluster takes this.
    Need(Need),
    /// The next entry makes no sense.
    Fault(&'static str),
    /// The next piece is a part of a cluster that was the last one.
    NotWhole,
}

/// Adds one cluster, which nobody has a claim on, to the batch.
fn take(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &Arc<TableSlice>,
    key: SliceKey,
    cluster: GuestCluster,
    batch: &mut Batch<'_>,
) -> std::result::Result<(), Stop> {
    let geometry = driver.geometry();
    let words = slice.entry_words(cluster);
    let entry = slice.entry(cluster).map_err(|_| Stop::Fault("an L2 entry is bad"))?;
    meta.check_entry(driver, entry).map_err(Stop::Fault)?;
    if let Some(host) = geometry.overwritable(words, cluster, ALL_UNITS) {
        batch.add_run(driver, host, false);
        return Ok(());
    }
    let kept = slow::kept_cluster(geometry, entry, words.raw);
    let (host, zeroed) = match kept {
        Some(host) => (host, false),
        None => {
            let handed = meta.allocate(geometry, cluster).map_err(Stop::Need)?;
            // What a data file has behind its end is zeroes, too, but cannot be reserved there.
            (handed.host, handed.zeroed && !geometry.is_external())
        }
    };
    // Held by the caller, so it is in the cache: this cannot fail.
    driver.tables().hold(key, slice);
    meta.claims.insert(cluster);
    let (slice, allocated, units) = (Arc::clone(slice), kept.is_none(), ALL_UNITS);
    batch.claims.push(Claim { cluster, slice, host, allocated, zeroed, units });
    batch.add_run(driver, host, zeroed);
    Ok(())
}

/// Clusters in a row in the file.
struct Run {
    at: HostOffset,
    len: u64,
    /// They read as zeroes already.
    zeroed: bool,
}

impl Run {
    fn make_room(&self, driver: &Qcow2Driver) -> Result<()> {
        let storage = driver.data_storage();
        // In a data file both offsets are the same.
        let len = slow::part_on_disk(driver, self.at.0, self.len);
        let range = HostRange::new(self.at, len).unwrap_or_default();
        let fail = |e| storage_error(storage, "cannot make room for zeroes", self.at, e);
        if self.zeroed && storage.reserve(range).map_err(fail)? {
            return Ok(());
        }
        storage.zero(range, Provision::Allocate, false).map_err(fail)
    }
}

/// Clusters that are given room together. What is not published is given back.
struct Batch<'a> {
    writer: &'a Writer,
    claims: Vec<Claim>,
    runs: Vec<Run>,
    /// Bytes of the guest's disk.
    len: u64,
}

impl Batch<'_> {
    fn add_run(&mut self, driver: &Qcow2Driver, host: HostCluster, zeroed: bool) {
        let cluster_len = driver.geometry().cluster_len();
        match self.runs.last_mut() {
            Some(run) if run.zeroed == zeroed && run.at.0 + run.len == host.start().0 => {
                run.len += cluster_len
            }
            Some(_) | None => self.runs.push(Run { at: host.start(), len: cluster_len, zeroed }),
        }
    }

    /// Whether metadata has come to lie where an entry led that was looked at before.
    fn hits_metadata(&self, driver: &Qcow2Driver, meta: &Meta) -> bool {
        let geometry = driver.geometry();
        let kept = self.runs.iter().filter(|_| !geometry.is_external());
        kept.flat_map(|run| {
            let (first, count) = geometry.host_span(run.at, run.len);
            (first.0..first.0 + count).map(HostIndex)
        })
        .any(|index| meta.allocator.map.kind(index).is_some())
    }

    fn publish(mut self, driver: &Qcow2Driver) -> Result<()> {
        let claims = std::mem::take(&mut self.claims);
        if prepare::end_claims(driver, self.writer, claims, true) { Ok(()) } else { Err(closed()) }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if !self.claims.is_empty() {
            prepare::drop_claims(self.writer, std::mem::take(&mut self.claims));
        }
    }
}
