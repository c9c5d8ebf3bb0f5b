//! Copy-on-write and zeroes at the grain of subclusters, in images with extended L2 entries.
//!
//! Only what a write touches is copied. A subcluster that is data already may be written by others at the same
//! time, in place: it is never written back from a copy.

use super::super::driver::Qcow2Driver;
use super::super::map::{self, Layer};
use super::super::tables::TableSlice;
use super::super::types::{
    ALL_UNITS, EntryWords, Geometry, GuestCluster, HostCluster, L2Entry, SUBCLUSTERS, Subclusters,
};
use super::meta::Meta;
use super::slow::{self, ClaimGuard};
use super::zero::{Goal, Stop};
use crate::address::GuestRange;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// Whether the backing file has any byte of these subclusters.
pub fn backing_has(driver: &Qcow2Driver, cluster: GuestCluster, units: u32) -> bool {
    if units == 0 {
        return false;
    }
    let geometry = driver.geometry();
    let first = geometry.start_of(cluster) + u64::from(units.trailing_zeros()) * geometry.unit_len();
    driver.backing().is_some_and(|backing| backing.size() > first)
}

/// What the guest's byte at `offset` is in a cluster with these subclusters.
pub fn layer(geometry: Geometry, host: Option<HostCluster>, subclusters: Subclusters, offset: u64) -> Layer {
    let within = geometry.offset_in_cluster(offset);
    let index = u32::try_from(within / geometry.unit_len()).unwrap_or(0);
    map::subcluster_layer(subclusters.run_from(index).0, host, within)
}

/// Writes `buf` into the claimed cluster, with the old content of what it does not cover of subclusters that
/// become data by it, and maps it.
pub fn copy(driver: &Qcow2Driver, claim: ClaimGuard, old: L2Entry, offset: u64, buf: &[u8]) -> Result<()> {
    let geometry = driver.geometry();
    let within = geometry.offset_in_cluster(offset);
    let mut work = Work { driver, old, start: offset - within, host: claim.host()? };
    let (moved, units) = claim.units();
    // What is there already, in the host cluster that stays.
    let there = match old {
        L2Entry::Split { subclusters, .. } if !moved => subclusters.allocated(),
        L2Entry::Unallocated
        | L2Entry::Zero { .. }
        | L2Entry::Data { .. }
        | L2Entry::Compressed(_)
        | L2Entry::Split { .. } => 0,
    };
    let touched = geometry.units(within, buf.len() as u64);
    work.write(within, buf, there)?;
    let mut rest = units & !touched & !there;
    while rest != 0 {
        let first = rest.trailing_zeros();
        let count = (rest >> first).trailing_ones();
        work.copy_run(first, count)?;
        rest &= !mask(first, count);
    }
    claim.publish(driver)
}

fn mask(first: u32, count: u32) -> u32 {
    let bits = if count >= SUBCLUSTERS { u32::MAX } else { (1 << count) - 1 };
    bits << first
}

/// A cluster that is being copied.
struct Work<'a> {
    driver: &'a Qcow2Driver,
    old: L2Entry,
    /// Where the cluster begins on the disk.
    start: u64,
    /// Where it goes.
    host: HostCluster,
}

impl Work<'_> {
    /// Writes `buf` and, at both ends, the rest of subclusters that are not `there`.
    fn write(&mut self, within: u64, buf: &[u8], there: u32) -> Result<()> {
        let unit_len = self.driver.geometry().unit_len();
        let end = within + buf.len() as u64;
        let is_there = |byte: u64| there >> (byte / unit_len).min(31) & 1 == 1;
        let from = if is_there(within) { within } else { within - within % unit_len };
        let to = if is_there(end - 1) { end } else { end.next_multiple_of(unit_len) };
        if (from, to) == (within, end) {
            return slow::write_data(self.driver, self.host.at(within), buf);
        }
        let mut bytes = vec![0; usize::try_from(to - from).unwrap_or(0)];
        let head = usize::try_from(within - from).unwrap_or(usize::MAX);
        let too_long = || Error::new(ErrorKind::InvalidInput, "a write reaches out of its cluster");
        let (before, rest) = bytes.split_at_mut_checked(head).ok_or_else(too_long)?;
        let (middle, behind) = rest.split_at_mut_checked(buf.len()).ok_or_else(too_long)?;
        self.read(from, before)?;
        middle.copy_from_slice(buf);
        self.read(end, behind)?;
        self.put(from, &bytes)
    }

    /// Copies subclusters that are data elsewhere.
    fn copy_run(&mut self, first: u32, count: u32) -> Result<()> {
        let unit_len = self.driver.geometry().unit_len();
        let mut bytes = vec![0; usize::try_from(u64::from(count) * unit_len).unwrap_or(0)];
        let from = u64::from(first) * unit_len;
        self.read(from, &mut bytes)?;
        self.put(from, &bytes)
    }

    /// The old content; behind the end of the disk there is nothing to copy.
    fn read(&self, within: u64, buf: &mut [u8]) -> Result<()> {
        let offset = self.start + within;
        let there = self.driver.disk_end().saturating_sub(offset).min(buf.len() as u64);
        let there = usize::try_from(there).unwrap_or(0);
        slow::read_old(self.driver, self.old, offset, buf.get_mut(..there).unwrap_or_default())
    }

    fn put(&self, within: u64, bytes: &[u8]) -> Result<()> {
        let len = slow::part_on_disk(self.driver, self.start + within, bytes.len() as u64);
        let part = bytes.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        slow::write_data(self.driver, self.host.at(within), part)
    }
}

/// The units of a piece of one cluster; one that reaches to the end of the disk has all behind it, too.
pub fn units_of(driver: &Qcow2Driver, piece: GuestRange) -> u32 {
    let geometry = driver.geometry();
    let within = geometry.offset_in_cluster(piece.offset());
    let len = if piece.end() == driver.disk_end() { geometry.cluster_len() - within } else { piece.len() };
    geometry.units(within, len)
}

/// As a change of a cluster's entry, for these units of a cluster with subclusters.
pub fn change_split(
    driver: &Qcow2Driver,
    meta: &mut Meta,
    slice: &Arc<TableSlice>,
    (cluster, entry): (GuestCluster, L2Entry),
    units: u32,
    goal: Goal,
) -> std::result::Result<(), Stop> {
    let L2Entry::Split { host, subclusters } = entry else { return Ok(()) };
    let geometry = driver.geometry();
    let raw = slice.entry_words(cluster).raw;
    let unallocated = units & !subclusters.allocated() & !subclusters.zero();
    // A discard promises nothing: where nothing shines through now, it marks nothing for those who come later.
    let zero_already = match goal {
        Goal::Discard => slow::reads_zero(driver, cluster, entry, units),
        Goal::Unmap | Goal::Keep | Goal::Unallocated | Goal::Drop => {
            slow::is_zero_for_good(driver, cluster, entry, units)
        }
    };
    // The host cluster stays where it is as long as a part of it may be data.
    let in_part = |units| EntryWords { raw, bitmap: subclusters.with_zeroes(units).encode() };
    let kept = slow::kept_cluster(geometry, entry, raw);
    let (changed, stays) = match goal {
        Goal::Unallocated if unallocated == 0 => return Ok(()),
        Goal::Unallocated => (in_part(unallocated), true),
        Goal::Unmap | Goal::Keep | Goal::Discard if units != ALL_UNITS && zero_already => return Ok(()),
        Goal::Unmap | Goal::Keep | Goal::Discard if units != ALL_UNITS => (in_part(units), true),
        Goal::Keep if zero_already => return Ok(()),
        Goal::Keep if kept.is_some() => (geometry.encode_zero(kept), true),
        Goal::Unmap | Goal::Discard if zero_already && host.is_none() => return Ok(()),
        Goal::Unmap | Goal::Discard if driver.is_zero_unallocated(cluster) => (EntryWords::NONE, false),
        Goal::Unmap | Goal::Keep | Goal::Discard => (geometry.encode_zero(None), false),
        // Seen to before.
        Goal::Drop => return Ok(()),
    };
    meta.check_entry(driver, entry).map_err(Stop::Fault)?;
    if !stays {
        meta.free_entry(driver, entry).map_err(Stop::Fault)?;
    }
    meta.set_entry(driver, slice, cluster, changed);
    Ok(())
}
