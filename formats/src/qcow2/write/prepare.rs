//! Writes that need not wait: planning them, and their end.
//!
//! A cluster of plain data that is ours is overwritten in place. Where the disk reads as zeroes and a
//! cluster that reads as zeroes is at hand, it is mapped at once and then overwritten in place: whatever
//! of the write is lost, the old content is what is there. A whole new cluster elsewhere is claimed,
//! written, and mapped when the write has ended. All else is `Slow`, and so is a whole cluster that is to be
//! compressed.
//!
//! A plan is slow as a whole or not at all, and a slow one has neither claims nor a pin: whoever carries it
//! out may have to wait for claims or clusters of others, who would wait for these.

use super::super::driver::Qcow2Driver;
use super::super::map;
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{GuestCluster, HostCluster, L2Entry};
use super::meta::{Claim, Meta};
use super::slow::{self, reads_zero_without_cluster};
use super::{MetaGuard, Writer, closed, compress, make_ready};
use crate::address::GuestRange;
use crate::error::Result;
use crate::plan::{MapMode, Piece, Place, SlowReason, WritePlan};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// See [`BlockDriver::prepare_write`](crate::BlockDriver::prepare_write).
pub fn prepare(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    range: GuestRange,
    mode: MapMode,
    plan: &mut WritePlan,
) -> Result<()> {
    if !writer.is_ready() {
        if mode == MapMode::Try {
            push_slow(plan, range, SlowReason::Allocate);
            return Ok(());
        }
        make_ready(driver, writer)?;
    }
    if compress::takes(driver, writer, range) {
        push_slow(plan, range, SlowReason::Allocate);
        return Ok(());
    }
    writer.record(driver, range)?;
    // Before any look at a mapping.
    let slot = SlotGuard { writer, slot: writer.pins.pin() };
    let mut pass = Pass { driver, writer, mode, claims: Vec::new(), slow: None, settled: true };
    pass.run(range, plan)?;
    if let Some(reason) = pass.slow {
        plan.pieces.clear();
        push_slow(plan, range, reason);
        return Ok(());
    }
    plan.durable_in_place = pass.settled && pass.claims.is_empty();
    let write = if pass.claims.is_empty() { 0 } else { note_write(writer, std::mem::take(&mut pass.claims)) };
    plan.pin = Some(slot.into_pin(write));
    Ok(())
}

/// See [`BlockDriver::finish_write`](crate::BlockDriver::finish_write).
pub fn finish(driver: &Qcow2Driver, writer: &Writer, plan: &mut WritePlan, written: bool) -> Result<()> {
    let write = plan.pin.as_ref().map_or(0, |pin| pin.key() >> super::KEY_EPOCH_BITS);
    let mut mapped = written;
    if write != 0 {
        let claims = writer.lock().writes.remove(&write).unwrap_or_default();
        mapped = end_claims(driver, writer, claims, written);
    }
    plan.reset();
    if mapped == written { Ok(()) } else { Err(closed()) }
}

/// Ends a planned write that nobody finished: its clusters go back.
pub fn abandon(writer: &Writer, write: u64) {
    let mut meta = writer.lock();
    let Some(claims) = meta.writes.remove(&write) else { return };
    drop(meta);
    drop_claims(writer, claims);
}

/// Ends claims without mapping anything: their clusters go back.
pub fn drop_claims(writer: &Writer, claims: Vec<Claim>) {
    let mut meta = writer.lock();
    for claim in claims {
        drop_claim(writer, &mut meta, &claim);
    }
    writer.changed.notify_all();
}

/// Maps what was claimed if it was `written` and the image still takes changes; else gives it back.
/// Returns whether it was mapped.
pub fn end_claims(driver: &Qcow2Driver, writer: &Writer, claims: Vec<Claim>, written: bool) -> bool {
    let mut meta = writer.lock();
    let mapped = written && writer.accepts(&meta);
    let mut fault = None;
    for claim in claims {
        if mapped {
            fault = publish(driver, &mut meta, &claim).err().or(fault);
            claim.slice.release();
            meta.claims.remove(&claim.cluster);
        } else {
            drop_claim(writer, &mut meta, &claim);
        }
    }
    writer.changed.notify_all();
    drop(meta);
    if let Some(fault) = fault {
        writer.fail(fault);
        return false;
    }
    mapped
}

fn drop_claim(writer: &Writer, meta: &mut Meta, claim: &Claim) {
    if claim.allocated {
        meta.give_back(writer.geometry, claim.host);
    }
    claim.slice.release();
    meta.claims.remove(&claim.cluster);
}

/// Points the cluster's entry to its new host cluster.
fn publish(driver: &Qcow2Driver, meta: &mut Meta, claim: &Claim) -> std::result::Result<(), &'static str> {
    let geometry = driver.geometry();
    let old = claim.slice.entry(claim.cluster).map_err(|_| "an L2 entry went bad in memory")?;
    if claim.allocated {
        meta.free_entry(driver, old)?;
    }
    let entry = geometry.encode_mapped(old, claim.host, claim.units);
    meta.set_entry(driver, &claim.slice, claim.cluster, entry);
    Ok(())
}

fn note_write(writer: &Writer, claims: Vec<Claim>) -> u64 {
    let mut meta = writer.lock();
    let write = meta.next_write;
    meta.next_write += 1;
    meta.writes.insert(write, claims);
    write
}

/// Gives the pin back unless it went into a plan.
struct SlotGuard<'a> {
    writer: &'a Arc<Writer>,
    slot: u64,
}

impl SlotGuard<'_> {
    fn into_pin(self, write: u64) -> crate::plan::Pin {
        let holder = Arc::clone(self.writer) as Arc<dyn crate::plan::PinHolder>;
        let key = self.slot | write << super::KEY_EPOCH_BITS;
        std::mem::forget(self);
        crate::plan::Pin::new(holder, key)
    }
}

impl Drop for SlotGuard<'_> {
    fn drop(&mut self) {
        self.writer.pins.unpin(self.slot);
    }
}

/// One go through the range.
struct Pass<'a> {
    driver: &'a Qcow2Driver,
    writer: &'a Writer,
    mode: MapMode,
    claims: Vec<Claim>,
    /// Why the plan is slow, if it is.
    slow: Option<SlowReason>,
    /// No metadata that leads to the pieces is in memory only.
    settled: bool,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.claims.is_empty() {
            end_claims(self.driver, self.writer, std::mem::take(&mut self.claims), false);
        }
    }
}

impl Pass<'_> {
    fn run(&mut self, range: GuestRange, plan: &mut WritePlan) -> Result<()> {
        let geometry = self.driver.geometry();
        let mut rest = range;
        while !rest.is_empty() && self.slow.is_none() {
            let coverage = geometry.slice_coverage_len();
            let part = rest.prefix(map::up_to_boundary(rest.offset(), coverage));
            rest = rest.skip(part.len());
            let table = self.driver.l1().raw(geometry.l1_index(part.offset()));
            if !geometry.is_owned(table) {
                self.slow = Some(SlowReason::Allocate);
                break;
            }
            match map::slice_at(self.driver, part.offset(), self.mode)? {
                Some(slice) => self.plan_slice(part, &slice, plan),
                None => self.slow = Some(SlowReason::ColdTable),
            }
        }
        Ok(())
    }

    fn plan_slice(&mut self, part: GuestRange, slice: &Arc<TableSlice>, plan: &mut WritePlan) {
        let geometry = self.driver.geometry();
        let durable = self.writer.durable.load(Ordering::Acquire);
        self.writer.look_at(slice);
        // Taken when it is needed first, and then kept for the rest of the part.
        let mut changing: Option<Changing<'_>> = None;
        let mut rest = part;
        while !rest.is_empty() {
            let within = geometry.offset_in_cluster(rest.offset());
            let piece = rest.prefix(geometry.cluster_len() - within);
            rest = rest.skip(piece.len());
            let cluster = geometry.cluster_of(piece.offset());
            let units = geometry.units(within, piece.len());
            let entry = slice.entry_words(cluster);
            let mut host = geometry.overwritable(entry, cluster, units).filter(|_| !slice.is_suspect());
            if host.is_some() {
                self.settled &= slice.changed_in() <= durable;
            } else {
                let changing =
                    changing.get_or_insert_with(|| Changing::begin(self.driver, self.writer, slice, part));
                self.settled = false;
                let unit_len = geometry.unit_len();
                let whole = within.is_multiple_of(unit_len) && piece.len().is_multiple_of(unit_len);
                host = changing.place(self, cluster, units, whole);
                // What was allocated may have brought metadata to where a later entry leads.
                self.writer.look_with_lock(&changing.meta, slice);
                changing.possible &= !slice.is_suspect();
            }
            let Some(host) = host else {
                self.slow = Some(SlowReason::Allocate);
                return;
            };
            let place = Place::Data { storage: self.driver.data_storage_id(), at: host.at(within) };
            plan.pieces.push(Piece { len: piece.len(), place, depth: 1 });
        }
    }
}

fn push_slow(plan: &mut WritePlan, part: GuestRange, reason: SlowReason) {
    plan.pieces.push(Piece { len: part.len(), place: Place::Slow(reason), depth: 1 });
}

/// Changes to one slice, with the lock of the metadata and a hold on the slice.
struct Changing<'a> {
    driver: &'a Qcow2Driver,
    meta: MetaGuard<'a>,
    slice: &'a Arc<TableSlice>,
    key: SliceKey,
    /// Whether the slice may be changed here and now.
    possible: bool,
    held: bool,
}

impl<'a> Changing<'a> {
    fn begin(
        driver: &'a Qcow2Driver,
        writer: &'a Writer,
        slice: &'a Arc<TableSlice>,
        part: GuestRange,
    ) -> Self {
        let geometry = driver.geometry();
        let meta = writer.lock();
        writer.look_with_lock(&meta, slice);
        let key = SliceKey { image: driver.number(), slice: geometry.slice_of(part.offset()) };
        let held = driver.tables().hold(key, slice);
        let owned = geometry.is_owned(driver.l1().raw(geometry.l1_index(part.offset())));
        let room = !writer.is_full(&meta);
        let possible = held && owned && room && !slice.is_suspect() && writer.accepts(&meta);
        Changing { driver, meta, slice, key, possible, held }
    }

    /// A host cluster that a write to these units of `cluster` may go to now; `None`: it takes more than
    /// memory. `whole`: all of each unit is written.
    fn place(
        &mut self,
        pass: &mut Pass<'_>,
        cluster: GuestCluster,
        units: u32,
        whole: bool,
    ) -> Option<HostCluster> {
        if !self.possible || self.meta.claims.contains(&cluster) {
            return None;
        }
        let geometry = self.driver.geometry();
        let words = self.slice.entry_words(cluster);
        if let Some(host) = geometry.overwritable(words, cluster, units) {
            return Some(host);
        }
        let entry = self.slice.entry(cluster).ok()?;
        if reads_zero_without_cluster(self.driver, cluster, entry, units)
            && let Some(host) = self.meta.allocate_zeroed(geometry, cluster).ok()?
        {
            let mapped = geometry.encode_mapped(entry, host, units);
            self.meta.set_entry(self.driver, self.slice, cluster, mapped);
            return Some(host);
        }
        if whole { self.claim(pass, cluster, entry, words.raw, units) } else { None }
    }

    fn claim(
        &mut self,
        pass: &mut Pass<'_>,
        cluster: GuestCluster,
        entry: L2Entry,
        raw: u64,
        units: u32,
    ) -> Option<HostCluster> {
        let geometry = self.driver.geometry();
        self.meta.check_entry(self.driver, entry).ok()?;
        let kept = slow::kept_cluster(geometry, entry, raw);
        // What is elsewhere and is not overwritten has to be copied first.
        if kept.is_none() && slow::units_to_move(geometry, entry) & !units != 0 {
            return None;
        }
        let (host, allocated, zeroed) = match kept {
            Some(host) => (host, false, false),
            None => {
                let handed = self.meta.allocate(geometry, cluster).ok()?;
                (handed.host, true, handed.zeroed)
            }
        };
        if !self.driver.tables().hold(self.key, self.slice) {
            return None;
        }
        self.meta.claims.insert(cluster);
        pass.claims.push(Claim { cluster, slice: Arc::clone(self.slice), host, allocated, zeroed, units });
        Some(host)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if self.held {
            self.slice.release();
        }
    }
}
