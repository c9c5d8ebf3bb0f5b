//! Zeroing and discarding: whole clusters by their entries, the parts at the ends by writing zeroes.
//!
//! A cluster that somebody has claimed is waited for: what he copies was read before.

use super::super::driver::Qcow2Driver;
use super::super::map;
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{ALL_UNITS, DataFile, EntryWords, GuestCluster, HostCluster, L2Entry};
use super::meta::Meta;
use super::slow::{self, whole_clusters, whole_units};
use super::subclusters::{change_split, units_of};
use super::{Writer, check_changing, commit, corrupt, make_ready, provide};
use crate::address::{GuestRange, HostOffset, HostRange};
use crate::driver::ZeroRequest;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::plan::MapMode;
use crate::storage::{Durability, Provision};
use crate::sync::Arc;

/// Bytes of zeroes that are written at a time. Our choice.
const CHUNK_LEN: usize = 64 << 10;

/// Most entries of tables that a session's thread looks at for one request: some 100 us. Our choice.
const TRY_ENTRIES_MAX: u64 = 1024;

/// What becomes of whole clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Goal {
    /// They read as zeroes and have no room.
    Unmap,
    /// They read as zeroes; room stays.
    Keep,
    /// Those that are not allocated read as zeroes; the others stay as they are.
    Unallocated,
    /// They may read as zeroes; where that takes writing they stay as they are.
    Discard,
    /// They have neither room nor entries: nobody will read them, for the disk ends before them.
    Drop,
}

/// See [`BlockDriver::write_zeroes`](crate::BlockDriver::write_zeroes).
pub fn write_zeroes(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    range: GuestRange,
    request: ZeroRequest,
) -> Result<()> {
    make_ready(driver, writer)?;
    let request = ZeroRequest { provision: provision_of(driver, writer, request), ..request };
    if zeroes_data_file(driver) && request.provision != Provision::Allocate {
        writer.record(driver, range)?;
        return zero_data_file(driver, range, request);
    }
    let whole = match request.provision {
        Provision::Unmap | Provision::Keep => whole_units(driver, range),
        Provision::Allocate => whole_clusters(driver, range),
    };
    if request.fast && !is_fast(driver, range, whole, request.provision)? {
        let what = "zeroing this range takes writing zeroes";
        return Err(Error::new(ErrorKind::WouldBeSlow, what).with_path(&driver.image().facts().path));
    }
    writer.record(driver, range)?;
    let (head, tail) = ends(range, whole);
    for part in [head, tail] {
        zero_part(driver, writer, part, request.provision)?;
    }
    match request.provision {
        Provision::Unmap => change_clusters(driver, writer, whole, Goal::Unmap),
        Provision::Keep => change_clusters(driver, writer, whole, Goal::Keep),
        Provision::Allocate => provide::provide(driver, writer, whole, provide::Places::Made),
    }
}

/// See [`BlockDriver::try_write_zeroes`](crate::BlockDriver::try_write_zeroes).
pub fn try_write_zeroes(
    driver: &Qcow2Driver,
    writer: &Writer,
    range: GuestRange,
    request: ZeroRequest,
) -> Result<bool> {
    let goal = match provision_of(driver, writer, request) {
        Provision::Unmap => Goal::Unmap,
        Provision::Keep => Goal::Keep,
        Provision::Allocate => return Ok(false),
    };
    // Version 2 has no zeroes but those of a disk that has nothing there: a matter for who may write some.
    let whole = whole_units(driver, range);
    if zeroes_data_file(driver) || !driver.geometry().can_zero() || whole.len() != range.len() {
        return Ok(false);
    }
    if !writer.is_ready() {
        return Ok(false);
    }
    writer.record(driver, range)?;
    try_change_clusters(driver, writer, whole, goal)
}

/// See [`BlockDriver::try_discard`](crate::BlockDriver::try_discard).
pub fn try_discard(driver: &Qcow2Driver, writer: &Writer, range: GuestRange) -> Result<bool> {
    if !writer.options.discard {
        return Ok(true);
    }
    if zeroes_data_file(driver) || !writer.is_ready() {
        return Ok(false);
    }
    writer.record(driver, range)?;
    try_change_clusters(driver, writer, whole_clusters(driver, range), Goal::Discard)
}

/// See [`BlockDriver::discard`](crate::BlockDriver::discard).
pub fn discard(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange) -> Result<()> {
    if !writer.options.discard {
        return Ok(());
    }
    make_ready(driver, writer)?;
    // As QEMU does: also what is too short to be given back.
    writer.record(driver, range)?;
    if zeroes_data_file(driver) {
        return discard_data_file(driver, whole_clusters(driver, range));
    }
    change_clusters(driver, writer, whole_clusters(driver, range), Goal::Discard)
}

/// What is done about room: QEMU keeps what there is, and gives none.
fn provision_of(driver: &Qcow2Driver, writer: &Writer, request: ZeroRequest) -> Provision {
    let as_qemu = writer.options.zeroes_as_qemu && driver.geometry().can_zero();
    if as_qemu && request.provision == Provision::Allocate { Provision::Keep } else { request.provision }
}

/// Unmaps whole clusters behind the end of the disk.
pub fn drop_clusters(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange) -> Result<()> {
    change_clusters(driver, writer, range, Goal::Drop)
}

/// Whether zeroes have to be in the data file, too: whoever reads a raw one without the image has to see
/// what the guest sees. Then its entries stay as they are, and there is nothing that a crash could part.
fn zeroes_data_file(driver: &Qcow2Driver) -> bool {
    driver.geometry().data_file() == DataFile::ExternalRaw
}

fn zero_data_file(driver: &Qcow2Driver, range: GuestRange, request: ZeroRequest) -> Result<()> {
    let storage = driver.data_storage();
    let at = HostOffset(range.offset());
    let host = HostRange::new(at, range.len()).unwrap_or_default();
    storage.zero(host, request.provision, request.fast).map_err(|e| {
        if request.fast && e.raw_os_error() == Some(libc::EOPNOTSUPP) {
            let what = "the data file cannot be zeroed there without writing zeroes";
            return Error::new(ErrorKind::WouldBeSlow, what).with_path(&storage.facts().path);
        }
        storage_error(storage, "cannot zero", at, e)
    })
}

/// Zeroes, where the data file takes them without being written: a discard may leave old content on a device.
fn discard_data_file(driver: &Qcow2Driver, range: GuestRange) -> Result<()> {
    let request = ZeroRequest { provision: Provision::Unmap, fast: true, durability: Durability::Later };
    match zero_data_file(driver, range, request) {
        Err(error) if error.kind() == ErrorKind::WouldBeSlow => Ok(()),
        outcome => outcome,
    }
}

/// What of the range lies before and behind its whole clusters.
fn ends(range: GuestRange, whole: GuestRange) -> (GuestRange, GuestRange) {
    if whole.is_empty() {
        return (range, range.prefix(0));
    }
    (range.prefix(whole.offset() - range.offset()), range.skip(whole.end() - range.offset()))
}

fn is_fast(driver: &Qcow2Driver, range: GuestRange, whole: GuestRange, provision: Provision) -> Result<bool> {
    let (head, tail) = ends(range, whole);
    let by_entries = match provision {
        Provision::Allocate => false,
        // Version 2 has no zeroes but those of a disk that has nothing there.
        Provision::Unmap => {
            driver.geometry().can_zero() || driver.backing().is_none() && !driver.marks_zeroes()
        }
        Provision::Keep => driver.geometry().can_zero(),
    };
    if !whole.is_empty() && !by_entries {
        return Ok(false);
    }
    for part in [head, tail] {
        for piece in by_unit(driver, part) {
            if provision == Provision::Allocate || !is_zero_for_good(driver, piece)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The range in parts that lie in one cluster each.
pub fn by_cluster(driver: &Qcow2Driver, range: GuestRange) -> impl Iterator<Item = GuestRange> {
    in_pieces(range, driver.geometry().cluster_len())
}

/// The range in parts that lie in one unit of a cluster each.
fn by_unit(driver: &Qcow2Driver, range: GuestRange) -> impl Iterator<Item = GuestRange> {
    in_pieces(range, driver.geometry().unit_len())
}

fn in_pieces(range: GuestRange, len: u64) -> impl Iterator<Item = GuestRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let piece = rest.prefix(map::up_to_boundary(rest.offset(), len));
        rest = rest.skip(piece.len());
        (!piece.is_empty()).then_some(piece)
    })
}

/// Whether a part of one cluster reads as zeroes by its entry, to whoever opens the image.
fn is_zero_for_good(driver: &Qcow2Driver, part: GuestRange) -> Result<bool> {
    let geometry = driver.geometry();
    let cluster = geometry.cluster_of(part.offset());
    let offset = part.offset();
    let table = driver.l1().l2_table(offset).map_err(|fault| map::bad_entry(driver, "L1", offset, fault))?;
    if table.is_none() {
        return Ok(driver.is_zero_unallocated(cluster));
    }
    let Some(slice) = map::slice_at(driver, offset, MapMode::Wait)? else { return Ok(false) };
    let entry = slice.entry(cluster).map_err(|fault| map::bad_entry(driver, "L2", offset, fault))?;
    let units = geometry.units(geometry.offset_in_cluster(offset), part.len());
    Ok(slow::is_zero_for_good(driver, cluster, entry, units))
}

fn zero_part(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    range: GuestRange,
    provision: Provision,
) -> Result<()> {
    for part in by_unit(driver, range) {
        let geometry = driver.geometry();
        if provision != Provision::Allocate {
            if is_zero_for_good(driver, part)? {
                continue;
            }
            if geometry.can_zero() && map::below_is_zero_around(driver, part)? {
                let start = part.offset() - part.offset() % geometry.unit_len();
                let unit = GuestRange::new(start, geometry.unit_len()).unwrap_or(part);
                change_clusters(driver, writer, unit, Goal::Unallocated)?;
            }
        }
        // What was done just now, or by others meanwhile, shows here.
        if provision == Provision::Allocate || !is_zero_for_good(driver, part)? {
            write_zero_bytes(driver, writer, part)?;
        }
    }
    Ok(())
}

/// Writes zeroes, which takes room where there is none.
pub fn write_zero_bytes(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange) -> Result<()> {
    let zeroes = [0; CHUNK_LEN];
    let mut rest = range;
    while !rest.is_empty() {
        let part = rest.prefix(CHUNK_LEN as u64);
        let len = usize::try_from(part.len()).unwrap_or(CHUNK_LEN);
        slow::write(driver, writer, part.offset(), zeroes.get(..len).unwrap_or_default())?;
        rest = rest.skip(part.len());
    }
    Ok(())
}

fn change_clusters(driver: &Qcow2Driver, writer: &Arc<Writer>, range: GuestRange, goal: Goal) -> Result<()> {
    let geometry = driver.geometry();
    let mut rest = range;
    while !rest.is_empty() {
        let offset = rest.offset();
        let table = driver.l1().l2_table(offset);
        let table = table.map_err(|fault| map::bad_entry(driver, "L1", offset, fault))?;
        if table.is_none()
            && (is_done_without_entry(driver, geometry.cluster_of(offset), goal)
                || !geometry.can_zero() && goal == Goal::Discard)
        {
            // Nothing is there, and nothing shines through.
            rest = rest.skip(map::up_to_boundary(offset, geometry.l2_coverage_len()));
            continue;
        }
        commit::relieve(driver, writer)?;
        let part = rest.prefix(map::up_to_boundary(offset, geometry.slice_coverage_len()));
        let done = change_slice(driver, writer, part, goal)?;
        rest = rest.skip(done);
    }
    Ok(())
}

/// As [`change_clusters`], as far as memory goes. Returns whether all was done.
fn try_change_clusters(driver: &Qcow2Driver, writer: &Writer, range: GuestRange, goal: Goal) -> Result<bool> {
    let geometry = driver.geometry();
    let mut rest = range;
    let mut cost = 0;
    while !rest.is_empty() {
        let offset = rest.offset();
        let table = driver.l1().l2_table(offset);
        let table = table.map_err(|fault| map::bad_entry(driver, "L1", offset, fault))?;
        if table.is_none() && is_done_without_entry(driver, geometry.cluster_of(offset), goal) {
            rest = rest.skip(map::up_to_boundary(offset, geometry.l2_coverage_len()));
            cost += 1;
        } else {
            let part = rest.prefix(map::up_to_boundary(offset, geometry.slice_coverage_len()));
            rest = rest.skip(part.len());
            cost += part.len().div_ceil(geometry.cluster_len());
            if cost > TRY_ENTRIES_MAX || !try_change_slice(driver, writer, part, goal)? {
                return Ok(false);
            }
        }
        if cost > TRY_ENTRIES_MAX {
            return Ok(false);
        }
    }
    Ok(true)
}

fn try_change_slice(driver: &Qcow2Driver, writer: &Writer, part: GuestRange, goal: Goal) -> Result<bool> {
    let geometry = driver.geometry();
    let Some(slice) = map::slice_at(driver, part.offset(), MapMode::Try)? else { return Ok(false) };
    let key = SliceKey { image: driver.number(), slice: geometry.slice_of(part.offset()) };
    let mut meta = writer.lock();
    let owned = geometry.is_owned(driver.l1().raw(geometry.l1_index(part.offset())));
    let room = !writer.is_full(&meta);
    if !owned || !room || check_changing(driver, writer, &meta).is_err() || !driver.tables().hold(key, &slice)
    {
        return Ok(false);
    }
    let (_, stopped) = change_entries(driver, &mut meta, &slice, part, goal);
    slice.release();
    Ok(stopped.is_ok())
}

/// Changes the entries of a part of one slice; returns how many bytes of it are done.
fn change_slice(driver: &Qcow2Driver, writer: &Arc<Writer>, part: GuestRange, goal: Goal) -> Result<u64> {
    let geometry = driver.geometry();
    slow::own_table(driver, writer, part.offset())?;
    let Some(slice) = map::slice_at(driver, part.offset(), MapMode::Wait)? else { return Ok(0) };
    let key = SliceKey { image: driver.number(), slice: geometry.slice_of(part.offset()) };
    let mut meta = writer.lock();
    check_changing(driver, writer, &meta)?;
    if !geometry.is_owned(driver.l1().raw(geometry.l1_index(part.offset())))
        || !driver.tables().hold(key, &slice)
    {
        return Ok(0);
    }
    let (done, stopped) = change_entries(driver, &mut meta, &slice, part, goal);
    slice.release();
    match stopped {
        Ok(()) => Ok(done),
        Err(Stop::Claimed) => {
            if done == 0 {
                writer.wait(&mut meta);
            }
            Ok(done)
        }
        Err(Stop::Fault(what)) => {
            drop(meta);
            Err(corrupt(driver, writer, what))
        }
        Err(Stop::WriteZeroes) => {
            drop(meta);
            let rest = part.skip(done);
            let piece = rest.prefix(map::up_to_boundary(rest.offset(), geometry.cluster_len()));
            write_zero_bytes(driver, writer, piece)?;
            Ok(done + piece.len())
        }
    }
}

/// Changes entries of a held slice one after the other; returns how many bytes are done, and why no more.
fn change_entries(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &Arc<TableSlice>,
    part: GuestRange,
    goal: Goal,
) -> (u64, std::result::Result<(), Stop>) {
    let mut done = 0;
    for piece in by_cluster(driver, part) {
        let cluster = driver.geometry().cluster_of(piece.offset());
        if meta.claims.contains(&cluster) {
            return (done, Err(Stop::Claimed));
        }
        if let Err(stop) = change_entry(driver, meta, slice, piece, goal) {
            return (done, Err(stop));
        }
        done += piece.len();
    }
    (done, Ok(()))
}

/// Why the entries of a slice were not all changed.
pub enum Stop {
    /// Somebody has claimed the next one.
    Claimed,
    /// The next one takes writing zeroes.
    WriteZeroes,
    /// The next one makes no sense.
    Fault(&'static str),
}

fn change_entry(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &Arc<TableSlice>,
    piece: GuestRange,
    goal: Goal,
) -> std::result::Result<(), Stop> {
    let geometry = driver.geometry();
    let cluster = geometry.cluster_of(piece.offset());
    let entry = slice.entry(cluster).map_err(|_| Stop::Fault("an L2 entry is bad"))?;
    let owned = geometry.is_sole(slice.entry_words(cluster).raw);
    match goal {
        Goal::Drop => return drop_entry(driver, meta, slice, (cluster, entry)),
        Goal::Discard if !slow::is_whole(driver, piece, geometry.unit_len()) => return Ok(()),
        Goal::Unmap | Goal::Keep if !slow::is_whole(driver, piece, geometry.unit_len()) => {
            return Err(Stop::WriteZeroes);
        }
        Goal::Unmap | Goal::Keep | Goal::Unallocated | Goal::Discard => {}
    }
    if geometry.extended_l2() {
        match (entry, units_of(driver, piece)) {
            (L2Entry::Split { .. }, units) => {
                return change_split(driver, meta, slice, (cluster, entry), units, goal);
            }
            (_, ALL_UNITS) => {}
            // A compressed cluster has no subclusters.
            (_, _) if goal == Goal::Unallocated => return Ok(()),
            (_, _) => return Err(Stop::WriteZeroes),
        }
    }
    let kept: Option<HostCluster> = match entry {
        L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed(_) if goal == Goal::Unallocated => {
            return Ok(());
        }
        L2Entry::Zero { host: None } => return Ok(()),
        L2Entry::Unallocated if is_done_without_entry(driver, cluster, goal) => return Ok(()),
        L2Entry::Zero { host: Some(_) } if goal == Goal::Keep => return Ok(()),
        L2Entry::Data { host, .. } if goal == Goal::Keep && owned => Some(host),
        L2Entry::Unallocated
        | L2Entry::Zero { .. }
        | L2Entry::Data { .. }
        | L2Entry::Compressed(_)
        | L2Entry::Split { .. } => None,
    };
    let changed = match (kept, geometry.can_zero()) {
        (None, _) if driver.is_zero_unallocated(cluster) => EntryWords::NONE,
        (kept, true) => geometry.encode_zero(kept),
        (_, false) if goal == Goal::Discard => return Ok(()),
        (_, false) => return Err(Stop::WriteZeroes),
    };
    meta.check_entry(driver, entry).map_err(Stop::Fault)?;
    if kept.is_none() {
        meta.free_entry(driver, entry).map_err(Stop::Fault)?;
    }
    meta.set_entry(driver, slice, cluster, changed);
    Ok(())
}

/// Whether a cluster that has no entry is as it should be. A discard promises nothing: where nothing shines through now,
/// it marks nothing for those who come later.
fn is_done_without_entry(driver: &Qcow2Driver, cluster: GuestCluster, goal: Goal) -> bool {
    match goal {
        Goal::Discard => !driver.backing_reaches(cluster),
        Goal::Unmap | Goal::Keep | Goal::Unallocated => driver.is_zero_unallocated(cluster),
        Goal::Drop => true,
    }
}

fn drop_entry(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &Arc<TableSlice>,
    (cluster, entry): (GuestCluster, L2Entry),
) -> std::result::Result<(), Stop> {
    if slice.entry_words(cluster) != EntryWords::NONE {
        meta.free_entry(driver, entry).map_err(Stop::Fault)?;
        meta.set_entry(driver, slice, cluster, EntryWords::NONE);
    }
    Ok(())
}
