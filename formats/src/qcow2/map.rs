//! Translation: from a guest range to runs of this image, and on through its backing chain to a plan.
//!
//! One slice of an L2 table at a time is turned into runs; equal neighbours become one run before the
//! backing file is asked, so a layer is entered once for each run and never for each cluster.

use smallvec::SmallVec;

use super::driver::Qcow2Driver;
use super::tables::{SliceKey, TableSlice};
use super::types::{Blob, DataFile, EntryFault, HostCluster, L2Entry, Subcluster};
use crate::address::{GuestRange, HostOffset};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{MapMode, Piece, Place, ReadPlan, SlowReason, StorageId};
use crate::sync::Arc;

/// What a run of this image is, its backing file apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layer {
    /// The backing file has it.
    Unallocated,
    /// Zeroes.
    Zero {
        /// Whether a cluster is kept for it.
        allocated: bool,
    },
    /// In the data storage of this image.
    Data(HostOffset),
    /// Compressed, one cluster.
    Compressed(Blob),
    /// Its table is not in memory.
    Cold,
}

/// A run of this image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerRun {
    /// Where it begins on the guest's disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub layer: Layer,
}

/// Runs in guest order. Four are in place, as in a plan.
pub type LayerRuns = SmallVec<[LayerRun; 4]>;

/// Adds the pieces of the range to `plan`, which is empty but for its pin.
pub fn map_read(driver: &Qcow2Driver, range: GuestRange, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
    let mut runs = LayerRuns::new();
    let mut rest = range;
    while !rest.is_empty() {
        let covered = slice_runs(driver, rest, mode, &mut runs)?;
        rest = rest.skip(covered);
        // The last run may go on in the next slice.
        let complete = if rest.is_empty() { runs.len() } else { runs.len().saturating_sub(1) };
        for run in runs.drain(..complete) {
            push_run(driver, run, mode, plan)?;
        }
    }
    Ok(())
}

/// Adds the runs of `range` to `runs`, as far as one L2 slice or one absent L2 table covers it, and
/// returns how many bytes that are.
pub fn slice_runs(
    driver: &Qcow2Driver,
    range: GuestRange,
    mode: MapMode,
    runs: &mut LayerRuns,
) -> Result<u64> {
    let geometry = driver.geometry();
    let offset = range.offset();
    let fail = |fault| bad_entry(driver, "L1", offset, fault);
    if driver.l1().l2_table(offset).map_err(fail)?.is_none() {
        let part = range.prefix(up_to_boundary(offset, geometry.l2_coverage_len()));
        push_layer(runs, part, Layer::Unallocated);
        return Ok(part.len());
    }
    let part = range.prefix(up_to_boundary(offset, geometry.slice_coverage_len()));
    match slice_at(driver, offset, mode)? {
        None => push_layer(runs, part, Layer::Cold),
        Some(slice) => entries_to_runs(driver, &slice, part, runs)?,
    }
    Ok(part.len())
}

/// The slice for the guest's byte at `offset`, whose L2 table exists; `None` if it is not in memory and
/// must not be read.
pub fn slice_at(driver: &Qcow2Driver, offset: u64, mode: MapMode) -> Result<Option<Arc<TableSlice>>> {
    let geometry = driver.geometry();
    let slice = geometry.slice_of(offset);
    let key = SliceKey { image: driver.number(), slice };
    match mode {
        MapMode::Try => Ok(driver.tables().get(key)),
        MapMode::Wait | MapMode::Holes => {
            let load = |at| load_slice(driver, at);
            driver.tables().get_or_load(key, || locate_slice(driver, offset), load).map(Some)
        }
    }
}

/// Where the slice for the guest's byte at `offset` lies as things are now.
fn locate_slice(driver: &Qcow2Driver, offset: u64) -> Result<HostOffset> {
    let geometry = driver.geometry();
    let fail = |fault| bad_entry(driver, "L1", offset, fault);
    let table = driver.l1().l2_table(offset).map_err(fail)?;
    let table = table.ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, "an L2 table has vanished").with_path(&driver.image().facts().path)
    })?;
    Ok(table.at(geometry.slice_offset_in_table(geometry.slice_of(offset))))
}

fn load_slice(driver: &Qcow2Driver, at: HostOffset) -> Result<TableSlice> {
    let slice = TableSlice::load(driver.image(), at, driver.geometry())
        .map_err(|e| e.with_path(&driver.image().facts().path))?;
    Ok(driver.checked_slice(slice))
}

fn entries_to_runs(
    driver: &Qcow2Driver,
    slice: &TableSlice,
    part: GuestRange,
    runs: &mut LayerRuns,
) -> Result<()> {
    let geometry = driver.geometry();
    let mut rest = part;
    while !rest.is_empty() {
        let cluster = geometry.cluster_of(rest.offset());
        let within = geometry.offset_in_cluster(rest.offset());
        let run = rest.prefix(geometry.cluster_len() - within);
        let entry = slice.entry(cluster).map_err(|fault| bad_entry(driver, "L2", rest.offset(), fault))?;
        match entry {
            L2Entry::Unallocated => push_layer(runs, run, Layer::Unallocated),
            L2Entry::Zero { host } => push_layer(runs, run, Layer::Zero { allocated: host.is_some() }),
            L2Entry::Data { host, copied: _ } => push_layer(runs, run, Layer::Data(host.at(within))),
            L2Entry::Compressed(blob) => push_layer(runs, run, Layer::Compressed(blob)),
            L2Entry::Split { host, subclusters } => {
                let mut split = run;
                while !split.is_empty() {
                    let within = geometry.offset_in_cluster(split.offset());
                    let index = u32::try_from(within / geometry.subcluster_len()).unwrap_or(0);
                    let (kind, count) = subclusters.run_from(index);
                    let end = u64::from(index + count) * geometry.subcluster_len();
                    let same = split.prefix(end - within);
                    push_layer(runs, same, subcluster_layer(kind, host, within));
                    split = split.skip(same.len());
                }
            }
        }
        rest = rest.skip(run.len());
    }
    Ok(())
}

/// What a byte `within` a cluster is whose subcluster is of this kind.
pub fn subcluster_layer(kind: Subcluster, host: Option<HostCluster>, within: u64) -> Layer {
    match (kind, host) {
        (Subcluster::Data, Some(host)) => Layer::Data(host.at(within)),
        // An entry with allocated subclusters and no cluster was refused when it was decoded.
        (Subcluster::Unallocated | Subcluster::Data, _) => Layer::Unallocated,
        (Subcluster::Zero, host) => Layer::Zero { allocated: host.is_some() },
    }
}

/// Adds a run, merged with the last one where it goes on seamlessly.
fn push_layer(runs: &mut LayerRuns, range: GuestRange, layer: Layer) {
    if let Some(last) = runs.last_mut() {
        let seamless = match (last.layer, layer) {
            (Layer::Data(at), Layer::Data(next)) => at.checked_add(last.len) == Some(next),
            (Layer::Zero { allocated }, Layer::Zero { allocated: next }) => allocated == next,
            (Layer::Unallocated, Layer::Unallocated) | (Layer::Cold, Layer::Cold) => true,
            // Blobs stay apart: each is decompressed for itself.
            (
                Layer::Unallocated
                | Layer::Zero { .. }
                | Layer::Data(_)
                | Layer::Compressed(..)
                | Layer::Cold,
                _,
            ) => false,
        };
        if seamless {
            last.len += range.len();
            return;
        }
    }
    runs.push(LayerRun { offset: range.offset(), len: range.len(), layer });
}

fn push_run(driver: &Qcow2Driver, run: LayerRun, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
    let own = |place| Piece { len: run.len, place, depth: 1 };
    match run.layer {
        Layer::Unallocated => return push_backing(driver, run, mode, plan),
        Layer::Zero { allocated } => plan.pieces.push(own(Place::Zero { allocated })),
        Layer::Data(at) => return push_data(driver, at, run.len, mode, plan),
        Layer::Compressed(..) => plan.pieces.push(own(Place::Slow(SlowReason::Compressed))),
        Layer::Cold => plan.pieces.push(own(Place::Slow(SlowReason::ColdTable))),
    }
    Ok(())
}

/// A run that this image does not have: what the backing file has there, zeroes behind its end.
fn push_backing(driver: &Qcow2Driver, run: LayerRun, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
    let Some(backing) = driver.backing() else {
        plan.pieces.push(Piece { len: run.len, place: Place::Zero { allocated: false }, depth: 0 });
        return Ok(());
    };
    let inside = backing.size().saturating_sub(run.offset).min(run.len);
    if let Some(range) = GuestRange::new(run.offset, inside)
        && !range.is_empty()
    {
        let mut below = ReadPlan::default();
        backing.map_read(range, mode, &mut below)?;
        for piece in below.pieces.iter() {
            plan.pieces.push(lifted(driver, piece)?);
        }
    }
    // As QEMU has it, these zeroes are the short backing file's own.
    plan.pieces.push(Piece { len: run.len - inside, place: Place::Zero { allocated: false }, depth: 2 });
    Ok(())
}

/// A piece of the backing file's plan as one of ours.
fn lifted(driver: &Qcow2Driver, piece: &Piece) -> Result<Piece> {
    let place = match piece.place {
        Place::Data { storage, at } => {
            let storage = storage.0.checked_add(driver.backing_storages_from()).map(StorageId);
            let storage =
                storage.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the chain has too many files"))?;
            Place::Data { storage, at }
        }
        Place::Zero { .. } | Place::Slow(_) => piece.place,
    };
    let depth = if piece.depth == 0 { 0 } else { piece.depth + 1 };
    Ok(Piece { len: piece.len, place, depth })
}

/// A run of data, as far as the file reaches. QEMU reads zeroes where the file ends before the cluster
/// does, and files made by others rely on it; so do we, after asking for the length as it is now.
fn push_data(
    driver: &Qcow2Driver,
    at: HostOffset,
    len: u64,
    mode: MapMode,
    plan: &mut ReadPlan,
) -> Result<()> {
    let own = |len, place| Piece { len, place, depth: 1 };
    let Some(inside) = driver.data_present(at, len, mode)? else {
        plan.pieces.push(own(len, Place::Slow(SlowReason::ColdTable)));
        return Ok(());
    };
    if mode == MapMode::Holes {
        push_holes(driver, at, inside, plan);
    } else {
        plan.pieces.push(own(inside, Place::Data { storage: driver.data_storage_id(), at }));
    }
    plan.pieces.push(own(len - inside, Place::Zero { allocated: true }));
    Ok(())
}

/// A run of data with the holes of the file told apart: a preallocated cluster that was never written
/// reads as zeroes and keeps its place. Not being able to tell is no error.
fn push_holes(driver: &Qcow2Driver, mut at: HostOffset, mut len: u64, plan: &mut ReadPlan) {
    while len > 0 {
        let run = driver.data_storage().run_at(at);
        let (run_len, hole) = run.map_or((len, false), |run| (run.len.clamp(1, len), run.hole));
        let place = if hole {
            Place::Zero { allocated: true }
        } else {
            Place::Data { storage: driver.data_storage_id(), at }
        };
        plan.pieces.push(Piece { len: run_len, place, depth: 1 });
        len -= run_len;
        at = HostOffset(at.0.saturating_add(run_len));
    }
}

/// Whether the backing file reads as zeroes in the unit of `part`, `part` itself apart. What is below
/// never changes.
pub fn below_is_zero_around(driver: &Qcow2Driver, part: GuestRange) -> Result<bool> {
    let Some(backing) = driver.backing() else { return Ok(true) };
    let unit_len = driver.geometry().unit_len();
    let start = part.offset() - part.offset() % unit_len;
    let end = start + unit_len;
    let mut plan = ReadPlan::default();
    for (from, to) in [(start, part.offset()), (part.end(), end)] {
        let len = to.min(backing.size()).saturating_sub(from);
        let Some(range) = GuestRange::new(from, len).filter(|range| !range.is_empty()) else { continue };
        backing.map_read(range, MapMode::Holes, &mut plan)?;
        if plan.pieces.iter().any(|piece| !matches!(piece.place, Place::Zero { .. })) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bytes from `offset` to the next multiple of `unit`.
pub fn up_to_boundary(offset: u64, unit: u64) -> u64 {
    unit - offset % unit
}

pub fn bad_entry(driver: &Qcow2Driver, table: &str, offset: u64, fault: EntryFault) -> Error {
    let file = match driver.geometry().data_file() {
        DataFile::Internal => "",
        DataFile::External | DataFile::ExternalRaw => " (of an image with an external data file)",
    };
    Error::new(
        ErrorKind::Corrupt,
        format!("the image is damaged: the {table} entry for guest offset {offset:#x}{file} is bad: {fault}"),
    )
    .with_path(&driver.image().facts().path)
}
