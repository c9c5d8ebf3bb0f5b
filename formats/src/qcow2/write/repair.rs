//! Rebuilding the refcounts of an image that was not closed by whoever put them off (the dirty bit).
//!
//! All tables are walked and counted; nothing is written unless every entry makes sense. Until the dirty
//! bit is cleared, last of all, whoever opens the image next begins anew. Whatever an image claims, this
//! ends: what would take more memory than a large image does is refused.

use std::collections::HashSet;

use super::super::driver::Qcow2Driver;
use super::super::header::{Header, Incompatible, TableLocation};
use super::super::snapshots::Snapshot;
use super::super::types::HostIndex;
use super::allocator::{Allocator, Need, Space};
use super::recount::{self, Counts};
use super::refcounts::BlockIndex;
use super::{INCOMPATIBLE_AT, begin, commit};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{read_exact, storage_error};
use crate::storage::Durability;

/// Most bytes of refcount blocks, which all are in memory: those of 32 TiB in clusters of 64 KiB, counted by 16
/// bits. Our choice.
const BLOCKS_LEN_MAX: u64 = 1 << 30;

/// Makes refcounts and copied flags right, then clears the dirty bit. Returns where the refcount table is.
pub fn rebuild(
    driver: &Qcow2Driver,
    header: &Header,
    snapshots: (&[Snapshot], u64),
) -> Result<TableLocation> {
    let refcounts = begin::load_table(driver, header, header.refcount_table)?;
    let map = begin::map_metadata(driver, header, &refcounts, snapshots)?;
    if let Some(conflict) = map.conflict() {
        return Err(beyond_repair(driver, conflict));
    }
    let mut counts = recount::count(driver, header, snapshots, &map)?;
    let space = Space::new(HostIndex(0), HostIndex(0), false);
    let mut allocator = Allocator::new(header.geometry, refcounts, map, space);
    load_blocks(driver, &mut allocator, &mut counts)?;
    allocator.space = find_space(driver, &counts)?;
    let changed = apply(driver, &mut allocator, &counts)?;
    let flags = wrong_flags(driver, header, &allocator)?;
    let table = write_out(driver, &mut allocator, flags)?;
    let bits = (header.incompatible - Incompatible::DIRTY).bits();
    write(driver, INCOMPATIBLE_AT, &bits.to_be_bytes())?;
    sync(driver)?;
    tracing::info!(path = ?driver.image().facts().path, changed, "the image was not closed; its refcounts were rebuilt");
    Ok(table)
}

/// Where clusters for new refcount blocks can be had: behind all that is used. A file is made long enough for
/// what its tables name: those clusters read as zeroes then as before, and a check finds them.
fn find_space(driver: &Qcow2Driver, counts: &Counts) -> Result<Space> {
    let (image, geometry) = (driver.image(), driver.geometry());
    let len = image.len().map_err(|e| fail(driver, "cannot tell the file's length", e))?;
    if !image.facts().grows {
        return Ok(Space::new(
            counts.end(),
            HostIndex(len / geometry.cluster_len()).max(counts.end()),
            false,
        ));
    }
    let used = counts.end().max(HostIndex(len.div_ceil(geometry.cluster_len())));
    lengthen(driver, used)?;
    Ok(Space::new(used, used, false))
}

/// Sees to it that the file reaches to `end`.
fn lengthen(driver: &Qcow2Driver, end: HostIndex) -> Result<()> {
    let image = driver.image();
    let wanted = driver.geometry().host_at(end).start().0;
    let len = image.len().map_err(|e| fail(driver, "cannot tell the file's length", e))?;
    if len < wanted {
        image.set_len(wanted).map_err(|e| fail(driver, "cannot make the file longer", e))?;
        driver.note_len(wanted);
    }
    Ok(())
}

/// Brings all refcount blocks into memory, and counts them.
fn load_blocks(driver: &Qcow2Driver, allocator: &mut Allocator, counts: &mut Counts) -> Result<()> {
    let cluster_len = driver.geometry().cluster_len();
    check_blocks(driver, allocator, counts)?;
    for block in (0..allocator.refcounts.table_len()).map(BlockIndex) {
        let at = allocator.refcounts.block_at(block);
        let Some(at) = at.map_err(|_| beyond_repair(driver, "a refcount table entry is bad"))? else {
            continue;
        };
        let mut bytes = vec![0; usize::try_from(cluster_len).unwrap_or(0)];
        read_exact(driver.image(), at, &mut bytes)?;
        allocator.refcounts.insert(block, bytes);
        counts.add(at, cluster_len, 1).map_err(|what| beyond_repair(driver, what))?;
    }
    // Each kind of metadata has its clusters for itself.
    let metadata = allocator.map.clusters().find(|(index, owned)| *owned && counts.get(*index) != 1);
    match metadata {
        Some((index, _)) => {
            let at = driver.geometry().host_at(index).start();
            Err(beyond_repair(driver, &format!("the metadata at {at} is used for something else, too")))
        }
        None => Ok(()),
    }
}

/// Fails if the blocks that there are and those that will be needed are too many, or cannot say what was counted.
fn check_blocks(driver: &Qcow2Driver, allocator: &Allocator, counts: &Counts) -> Result<()> {
    let most = BLOCKS_LEN_MAX / driver.geometry().cluster_len();
    let is_there = |block: &BlockIndex| !matches!(allocator.refcounts.block_at(*block), Ok(None));
    let mut blocks = (0..allocator.refcounts.table_len()).map(BlockIndex).filter(is_there).count() as u64;
    let mut last = None;
    // They come in order.
    for index in counts.counted() {
        if counts.get(index) > allocator.refcounts.max() {
            return Err(beyond_repair(driver, "a cluster is referred to more often than a refcount can say"));
        }
        let block = allocator.refcounts.block_of(index);
        if last.replace(block) != Some(block) && !is_there(&block) {
            blocks += 1;
        }
        if blocks > most {
            break;
        }
    }
    if blocks > most {
        return Err(beyond_repair(driver, "it has or needs too many refcount blocks"));
    }
    Ok(())
}

/// Sets every refcount that is not what was counted; returns how many.
fn apply(driver: &Qcow2Driver, allocator: &mut Allocator, counts: &Counts) -> Result<u64> {
    let mut changed = 0;
    for index in counts.counted() {
        with_room(driver, allocator, |allocator| allocator.describe(index))?;
    }
    let entries = allocator.refcounts.block_entries();
    for block in (0..allocator.refcounts.table_len()).map(BlockIndex) {
        if !allocator.refcounts.has(block) {
            continue;
        }
        let first = block.0 as u64 * entries;
        if allocator.refcounts.is_zero(block) && !counts.may_have(HostIndex(first), entries) {
            continue;
        }
        for index in (first..first + entries).map(HostIndex) {
            let wanted = counts.get(index);
            // Metadata that was there is counted; what was allocated just now is right already.
            let new = wanted == 0 && allocator.map.kind(index).is_some();
            let is = allocator.refcounts.get(index).map_err(|need| unmet(driver, need))?;
            if !new && is != wanted {
                allocator.refcounts.set(index, wanted).map_err(|need| unmet(driver, need))?;
                changed += 1;
            }
        }
    }
    // A table that was moved away from is referred to by nobody.
    for (first, len) in std::mem::take(&mut allocator.left) {
        for index in (first.0..first.0 + len).map(HostIndex) {
            allocator.refcounts.set(index, 0).map_err(|need| unmet(driver, need))?;
        }
    }
    Ok(changed)
}

/// Does something that may need a longer file.
fn with_room(
    driver: &Qcow2Driver,
    allocator: &mut Allocator,
    mut act: impl FnMut(&mut Allocator) -> std::result::Result<(), Need>,
) -> Result<()> {
    loop {
        match act(allocator) {
            Ok(()) => return Ok(()),
            Err(Need::Room(clusters)) if driver.image().facts().grows => {
                let end = HostIndex(allocator.space.fresh().0 + clusters + 1);
                lengthen(driver, end)?;
                allocator.space.extend_to(end);
            }
            Err(need) => return Err(unmet(driver, need)),
        }
    }
}

/// The entries of the active tables whose copied flag is not what the refcount says: where, and as they
/// should be.
fn wrong_flags(
    driver: &Qcow2Driver,
    header: &Header,
    allocator: &Allocator,
) -> Result<Vec<(HostOffset, u64)>> {
    let geometry = header.geometry;
    let bad = |_| beyond_repair(driver, "an L1 entry is bad");
    let (mut wrong, mut seen) = (Vec::new(), HashSet::new());
    let mut check = |at: HostOffset, raw: u64| {
        let Some(host) = geometry.host_of(raw) else { return Ok(raw) };
        let count = allocator.refcounts.get(geometry.host_index(host)).map_err(|need| unmet(driver, need))?;
        let right = geometry.with_owned(raw, count == 1);
        if right != raw {
            wrong.push((at, right));
        }
        Ok(right)
    };
    let entries = read_words(driver, header.l1.at, u64::from(header.l1.entries) * 8)?;
    for (index, raw) in entries.into_iter().enumerate() {
        let right: u64 = check(HostOffset(header.l1.at.0 + index as u64 * 8), raw)?;
        driver.l1().set(index, right);
        let Some(table) = geometry.decode_l1(raw).map_err(bad)?.filter(|table| seen.insert(*table)) else {
            continue;
        };
        for (index, raw) in read_words(driver, table.start(), geometry.cluster_len())?.into_iter().enumerate()
        {
            check(table.at(index as u64 * 8), raw)?;
        }
    }
    Ok(wrong)
}

fn write_out(
    driver: &Qcow2Driver,
    allocator: &mut Allocator,
    flags: Vec<(HostOffset, u64)>,
) -> Result<TableLocation> {
    for block in allocator.refcounts.freeze_blocks() {
        write(driver, block.at, &block.bytes)?;
    }
    let at = allocator.refcounts.table_at();
    if allocator.moved.is_some() {
        write(driver, at, &allocator.refcounts.table_bytes())?;
    }
    sync(driver)?;
    for (index, raw) in allocator.refcounts.freeze_entries() {
        write(driver, HostOffset(at.0 + index as u64 * 8), &raw.to_be_bytes())?;
    }
    if let Some(moved) = allocator.moved {
        commit::write_table_pointer(driver, at, moved.clusters)?;
    }
    for (at, raw) in flags {
        write(driver, at, &raw.to_be_bytes())?;
    }
    sync(driver)?;
    let entries = u32::try_from(allocator.refcounts.table_len())
        .map_err(|_| beyond_repair(driver, "the refcount table is too large"))?;
    Ok(TableLocation { at, entries })
}

pub fn read_words(driver: &Qcow2Driver, at: HostOffset, len: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    read_exact(driver.image(), at, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

fn write(driver: &Qcow2Driver, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let image = driver.image();
    image
        .pwrite(bytes, at, Durability::Later)
        .map_err(|e| storage_error(image, "cannot write the image's metadata", at, e))
}

fn sync(driver: &Qcow2Driver) -> Result<()> {
    driver.image().sync().map_err(|e| fail(driver, "cannot make the image durable", e))
}

pub fn fail(driver: &Qcow2Driver, what: &'static str, error: std::io::Error) -> Error {
    storage_error(driver.image(), what, HostOffset(0), error)
}

fn unmet(driver: &Qcow2Driver, need: Need) -> Error {
    match need {
        Need::Room(_) | Need::NoSpace => super::no_space(driver),
        Need::Fault(what) => beyond_repair(driver, what),
        Need::Block(_) => beyond_repair(driver, "a refcount block is missing"),
    }
}

pub fn beyond_repair(driver: &Qcow2Driver, what: &str) -> Error {
    let text = format!(
        "the image was not closed, and its refcounts cannot be rebuilt: {what}; nothing was changed \
         (qemu-img check -r all, or --read-only)"
    );
    Error::new(ErrorKind::Corrupt, text).with_path(&driver.image().facts().path)
}
