//! Compressed clusters: decompressed on all cores, ahead of a client that reads from front to back, and answered
//! in place from the driver's cache.
//!
//! A read that does not find its clusters there waits until they are, and is then served anew, as one whose bytes
//! have arrived. Nothing is decompressed on a session's thread.

use std::sync::Arc;

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::IoBuf;
use nbd_img_formats::{BlockDriver, GuestRange, Piece, Place, ReadPlan, SlowReason};
use smallvec::SmallVec;

use super::engine::Session;
use super::pending::{Arrival, Pending, Work};
use crate::nbd::request::Request;

/// Shorter clusters are decompressed together up to this length of them, so that a thread is woken for something: a
/// cluster of the usual length, 0.1 ms.
const JOB_LEN: u64 = 64 << 10;

/// Parts of the cache that one client's reads may be waiting for, each as long as one may be: half of all. What is more is
/// decompressed as it is read, rather than into a cache that has lost it when it is wanted. Our choice.
const WAITING_MAX: u64 = 4;

/// Bytes that a client has under way with which it keeps all cores busy itself. Our choice.
const BUSY_LEN: u64 = 1 << 20;

impl Session {
    /// After a read was planned and noted: decompresses what the client will want next, if it is worth it.
    pub(super) fn decompress_ahead(&mut self) {
        if !has_compressed(&self.read_plan) || self.cell.pending.borrow().read_len() >= BUSY_LEN {
            return;
        }
        let driver = Arc::clone(self.cell.export.driver());
        let Some(range) = self.ahead.wanted_decompressed(driver.size(), driver.warm_len_max()) else {
            return;
        };
        let mut plan = ReadPlan::default();
        // What is wrong shows when it is read.
        if driver.map_read(range, MapMode::Try, &mut plan).is_ok() {
            for job in jobs(&driver, &plan, range) {
                let asking = self.ahead.decompressing(job.len());
                self.shard.warm(&self.cell.export, job, asking);
            }
        }
    }

    /// Has a read wait whose plan has compressed pieces that are not decompressed. Returns whether that is worth
    /// it.
    pub(super) fn await_decompressed(&mut self, request: Request, range: GuestRange) -> bool {
        if !has_compressed(&self.read_plan) {
            return false;
        }
        let driver = Arc::clone(self.cell.export.driver());
        let waiting_len = self.cell.pending.borrow().read_len().saturating_add(range.len());
        let warm_len = driver.warm_len_max();
        if range.len() > warm_len || waiting_len > warm_len.saturating_mul(WAITING_MAX) {
            return false;
        }
        let jobs = jobs(&driver, &self.read_plan, range);
        if jobs.is_empty() {
            return false;
        }
        self.read_plan.reset();
        let outstanding = jobs.len();
        let pending = Pending {
            request,
            work: Work::Arrival(Arrival::Bytes),
            outstanding,
            error: None,
            len: 0,
            lease: None,
        };
        let slot = self.cell.pending.borrow_mut().insert(pending);
        for job in jobs {
            let answer = self.shard.answer(self.shard.token(&self.cell, slot, 0), IoBuf::default());
            self.shard.warm(&self.cell.export, job, answer);
        }
        true
    }
}

/// Whether the plan has compressed pieces.
fn has_compressed(plan: &ReadPlan) -> bool {
    plan.pieces.iter().any(is_compressed)
}

/// Whether the last compressed piece of a plan for `range` is decompressed, if it has any. Clusters are
/// decompressed from front to back, so the others are most likely there then.
pub(super) fn is_decompressed(driver: &Arc<dyn BlockDriver>, plan: &ReadPlan, range: GuestRange) -> bool {
    let mut end = range.end();
    for piece in plan.pieces.iter().rev() {
        end -= piece.len.min(end);
        if is_compressed(piece) {
            return is_there(driver, end);
        }
    }
    true
}

/// How many of a plan's compressed pieces, each of a cluster, are for one thread. All of a cluster is decompressed of
/// which a piece has some, so the longest one stands for all.
fn clusters_per_job(plan: &ReadPlan) -> u64 {
    let longest = plan.pieces.iter().filter(|piece| is_compressed(piece)).map(|piece| piece.len).max();
    (JOB_LEN / longest.unwrap_or(JOB_LEN).max(1)).max(1)
}

fn is_compressed(piece: &Piece) -> bool {
    piece.place == Place::Slow(SlowReason::Compressed)
}

/// Joins compressed pieces that touch up to what is worth a thread, and a buffer of its own.
pub(super) fn join_compressed(plan: &mut ReadPlan) {
    // Ordinary reads pay for no more than this.
    if !has_compressed(plan) {
        return;
    }
    let clusters_max = clusters_per_job(plan);
    let pieces = std::mem::take(&mut plan.pieces);
    let mut open: Option<Piece> = None;
    let mut clusters = 0;
    for piece in pieces.iter() {
        match &mut open {
            Some(last) if is_compressed(last) && is_compressed(piece) && clusters < clusters_max => {
                last.len += piece.len;
                clusters += 1;
            }
            Some(_) | None => {
                clusters = 1;
                if let Some(last) = open.replace(*piece) {
                    plan.pieces.push(last);
                }
            }
        }
    }
    if let Some(last) = open {
        plan.pieces.push(last);
    }
}

/// The compressed pieces of a plan for `range` that are not decompressed yet, those that touch together up to
/// what is worth a thread.
fn jobs(driver: &Arc<dyn BlockDriver>, plan: &ReadPlan, range: GuestRange) -> SmallVec<[GuestRange; 4]> {
    let mut jobs: SmallVec<[GuestRange; 4]> = SmallVec::new();
    let (clusters_max, mut clusters) = (clusters_per_job(plan), 0);
    let mut at = range.offset();
    for piece in plan.pieces.iter() {
        let offset = at;
        at += piece.len;
        if !is_compressed(piece) || is_there(driver, offset) {
            continue;
        }
        if let Some(last) = jobs.last_mut()
            && last.end() == offset
            && clusters < clusters_max
            && let Some(joined) = GuestRange::new(last.offset(), last.len() + piece.len)
        {
            *last = joined;
            clusters += 1;
        } else {
            clusters = 1;
            jobs.extend(GuestRange::new(offset, piece.len));
        }
    }
    jobs
}

fn is_there(driver: &Arc<dyn BlockDriver>, offset: u64) -> bool {
    driver.try_read_slow(offset, &mut [0]).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPRESSED: Place = Place::Slow(SlowReason::Compressed);
    const ZERO: Place = Place::Zero { allocated: false };

    fn joined(pieces: &[(u64, Place)]) -> Vec<(u64, Place)> {
        let mut plan = ReadPlan::default();
        for (len, place) in pieces {
            plan.pieces.push(Piece { len: *len, place: *place, depth: 1 });
        }
        let covered_len = plan.pieces.covered_len();
        join_compressed(&mut plan);
        assert_eq!(plan.pieces.covered_len(), covered_len);
        plan.pieces.iter().map(|piece| (piece.len, piece.place)).collect()
    }

    #[test]
    fn small_clusters_are_joined_up_to_a_jobs_length_and_others_stay() {
        let small = [(512, COMPRESSED)].into_iter().chain([(4096, COMPRESSED); 20]).chain([(100, ZERO)]);
        let pieces: Vec<_> = small.chain([(4096, COMPRESSED); 2]).collect();
        let want =
            [(512 + 15 * 4096, COMPRESSED), (5 * 4096, COMPRESSED), (100, ZERO), (2 * 4096, COMPRESSED)];
        assert_eq!(joined(&pieces), want);
    }

    #[test]
    fn parts_of_large_clusters_are_for_a_thread_each() {
        let pieces = [(4096, COMPRESSED), (60 << 10, COMPRESSED), (512, COMPRESSED), (100, ZERO)];
        assert_eq!(joined(&pieces), pieces);
        let pieces = [(4096, COMPRESSED), (2 << 20, COMPRESSED), (512, COMPRESSED)];
        assert_eq!(joined(&pieces), pieces);
    }
}
