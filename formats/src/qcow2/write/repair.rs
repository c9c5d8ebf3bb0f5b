//! Rebuilding the refcounts of an image that was not closed by whoever put them off (the dirty bit).
//!
//! All tables are walked and counted; nothing is written unless every entry makes sense. Until the dirty
//! bit is cleared, last of all, whoever opens the image next begins anew.

use std::collections::HashMap;

use super::super::driver::Qcow2Driver;
use super::super::header::{Header, Incompatible, TableLocation};
use super::super::snapshots::Snapshot;
use super::super::types::{Geometry, HostIndex, L2Entry};
use super::allocator::{Allocator, Need, Space};
use super::bitmaps::Places;
use super::refcounts::BlockIndex;
use super::{INCOMPATIBLE_AT, begin, commit};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{read_exact, storage_error};
use crate::storage::Durability;

/// Makes refcounts and copied flags right, then clears the dirty bit. Returns where the refcount table is.
pub fn rebuild(
    driver: &Qcow2Driver,
    header: &Header,
    snapshots: (&[Snapshot], u64),
    placed: &Places,
) -> Result<TableLocation> {
    let refcounts = begin::load_table(driver, header, header.refcount_table)?;
    let map = begin::map_metadata(driver, header, &refcounts, snapshots, placed)?;
    if let Some(conflict) = map.conflict() {
        return Err(beyond_repair(driver, conflict));
    }
    let mut counts = count_all(driver, header, snapshots)?;
    placed.iter().for_each(|(at, len, _)| counts.add(*at, *len));
    let geometry = header.geometry;
    let image = driver.image();
    let len = image.len().map_err(|e| fail(driver, "cannot tell the file's length", e))?;
    let grows = image.facts().grows;
    let used = counts.end.max(if grows { len.div_ceil(geometry.cluster_len()) } else { 0 });
    let end = if grows { used } else { (len / geometry.cluster_len()).max(used) };
    let space = Space::new(HostIndex(used), HostIndex(end), false);
    let mut allocator = Allocator::new(geometry, refcounts, map, space);
    load_blocks(driver, &mut allocator, &mut counts)?;
    let changed = apply(driver, &mut allocator, &counts)?;
    let flags = wrong_flags(driver, header, &allocator)?;
    let table = write_out(driver, &mut allocator, flags)?;
    let bits = (header.incompatible - Incompatible::DIRTY).bits();
    write(driver, INCOMPATIBLE_AT, &bits.to_be_bytes())?;
    sync(driver)?;
    tracing::info!(path = ?image.facts().path, changed, "the image was not closed; its refcounts were rebuilt");
    Ok(table)
}

/// How often each cluster is referred to.
struct Counts {
    geometry: Geometry,
    /// By number, in groups, so that memory follows what is in use.
    groups: HashMap<u64, Vec<u64>>,
    /// Behind the last cluster that is.
    end: u64,
}

/// Clusters in a group. Our choice.
const GROUP: u64 = 4096;

impl Counts {
    fn add(&mut self, at: HostOffset, len: u64) {
        let (first, count) = self.geometry.host_span(at, len);
        self.end = self.end.max(first.0 + count);
        for index in first.0..first.0 + count {
            let group = self.groups.entry(index / GROUP).or_insert_with(|| vec![0; GROUP as usize]);
            if let Some(count) = usize::try_from(index % GROUP).ok().and_then(|at| group.get_mut(at)) {
                *count += 1;
            }
        }
    }

    fn get(&self, index: HostIndex) -> u64 {
        let group = self.groups.get(&(index.0 / GROUP));
        let at = usize::try_from(index.0 % GROUP).unwrap_or(usize::MAX);
        group.and_then(|group| group.get(at)).copied().unwrap_or(0)
    }
}

fn count_all(driver: &Qcow2Driver, header: &Header, snapshots: (&[Snapshot], u64)) -> Result<Counts> {
    let geometry = header.geometry;
    let mut counts = Counts { geometry, groups: HashMap::new(), end: 0 };
    counts.add(HostOffset(0), geometry.cluster_len());
    counts.add(header.refcount_table.at, u64::from(header.refcount_table.entries) * 8);
    if header.snapshots.entries > 0 {
        counts.add(header.snapshots.at, snapshots.1);
    }
    count_tables(driver, header.l1, &mut counts)?;
    for snapshot in snapshots.0 {
        count_tables(driver, snapshot.checked_l1(header)?, &mut counts)?;
    }
    Ok(counts)
}

/// An L1 table and all that it leads to.
fn count_tables(driver: &Qcow2Driver, l1: TableLocation, counts: &mut Counts) -> Result<()> {
    let geometry = counts.geometry;
    let bad = |_| beyond_repair(driver, "an L1 or L2 entry is bad");
    counts.add(l1.at, u64::from(l1.entries) * 8);
    for raw in read_words(driver, l1.at, u64::from(l1.entries) * 8)? {
        let Some(table) = geometry.decode_l1(raw).map_err(bad)? else { continue };
        counts.add(table.start(), geometry.cluster_len());
        for (number, raw) in
            read_words(driver, table.start(), geometry.cluster_len())?.into_iter().enumerate()
        {
            let cluster = super::super::types::GuestCluster(number as u64);
            match geometry.decode_l2(raw, 0, cluster).map_err(bad)? {
                L2Entry::Unallocated | L2Entry::Zero { host: None } => {}
                L2Entry::Zero { host: Some(host) } | L2Entry::Data { host, .. } => {
                    counts.add(host.start(), geometry.cluster_len());
                }
                L2Entry::Compressed(blob) => counts.add(blob.at, blob.len_max),
                L2Entry::Split { .. } => return Err(beyond_repair(driver, "it has subclusters")),
            }
        }
    }
    Ok(())
}

/// Brings all refcount blocks into memory, and counts them.
fn load_blocks(driver: &Qcow2Driver, allocator: &mut Allocator, counts: &mut Counts) -> Result<()> {
    let cluster_len = counts.geometry.cluster_len();
    for block in (0..allocator.refcounts.table_len()).map(BlockIndex) {
        let at = allocator.refcounts.block_at(block);
        let Some(at) = at.map_err(|_| beyond_repair(driver, "a refcount table entry is bad"))? else {
            continue;
        };
        let mut bytes = vec![0; usize::try_from(cluster_len).unwrap_or(0)];
        read_exact(driver.image(), at, &mut bytes)?;
        allocator.refcounts.insert(block, bytes);
        counts.add(at, cluster_len);
    }
    // Each kind of metadata has its clusters for itself.
    let metadata = allocator.map.clusters().find(|(index, owned)| *owned && counts.get(*index) != 1);
    match metadata {
        Some((index, _)) => {
            let at = counts.geometry.host_at(index).start();
            Err(beyond_repair(driver, &format!("the metadata at {at} is used for something else, too")))
        }
        None => Ok(()),
    }
}

/// Sets every refcount that is not what was counted; returns how many.
fn apply(driver: &Qcow2Driver, allocator: &mut Allocator, counts: &Counts) -> Result<u64> {
    let mut changed = 0;
    let mut groups: Vec<u64> = counts.groups.keys().copied().collect();
    groups.sort_unstable();
    for index in groups.iter().flat_map(|group| group * GROUP..(group + 1) * GROUP).map(HostIndex) {
        if counts.get(index) != 0 {
            with_room(driver, allocator, |allocator| allocator.describe(index))?;
        }
    }
    let entries = allocator.refcounts.block_entries();
    for block in (0..allocator.refcounts.table_len()).map(BlockIndex) {
        if !allocator.refcounts.has(block) {
            continue;
        }
        let first = block.0 as u64 * entries;
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
                let len = driver.geometry().host_at(end).start().0;
                driver.image().set_len(len).map_err(|e| fail(driver, "cannot make the file longer", e))?;
                allocator.space.extend_to(end);
                driver.note_len(len);
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
    let mut wrong = Vec::new();
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
        let Some(table) = geometry.decode_l1(raw).map_err(bad)? else { continue };
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

fn read_words(driver: &Qcow2Driver, at: HostOffset, len: u64) -> Result<Vec<u64>> {
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

fn fail(driver: &Qcow2Driver, what: &'static str, error: std::io::Error) -> Error {
    storage_error(driver.image(), what, HostOffset(0), error)
}

fn unmet(driver: &Qcow2Driver, need: Need) -> Error {
    match need {
        Need::Room(_) | Need::NoSpace => super::no_space(driver),
        Need::Fault(what) => beyond_repair(driver, what),
        Need::Block(_) => beyond_repair(driver, "a refcount block is missing"),
    }
}

fn beyond_repair(driver: &Qcow2Driver, what: &str) -> Error {
    let text = format!(
        "the image was not closed, and its refcounts cannot be rebuilt: {what}; nothing was changed \
         (qemu-img check -r all, or --read-only)"
    );
    Error::new(ErrorKind::Corrupt, text).with_path(&driver.image().facts().path)
}
