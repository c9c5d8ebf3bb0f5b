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
use super::pending::{Pending, Work};
use crate::nbd::request::Request;

/// The least that one thread is woken for, as long as there is more: a cluster of the usual length, 0.1 ms.
const JOB_LEN_MIN: u64 = 64 << 10;

/// Bytes that a client has under way with which it keeps all cores busy itself. Our choice.
const BUSY_LEN: u64 = 1 << 20;

impl Session {
    /// After a read was planned and noted: decompresses what the client will want next, if it is worth it.
    pub(super) fn decompress_ahead(&mut self) {
        if !has_compressed(&self.read_plan) || self.cell.pending.borrow().asked_len() >= BUSY_LEN {
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
        let driver = Arc::clone(self.cell.export.driver());
        if range.len() > driver.warm_len_max() {
            return false;
        }
        let jobs = jobs(&driver, &self.read_plan, range);
        if jobs.is_empty() {
            return false;
        }
        self.read_plan.reset();
        let outstanding = jobs.len();
        let pending = Pending { request, work: Work::Arrival, outstanding, error: None, len: 0, lease: None };
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
    plan.pieces.iter().any(|piece| piece.place == Place::Slow(SlowReason::Compressed))
}

/// Whether the last compressed piece of a plan for `range` is decompressed, if it has any. Clusters are
/// decompressed from front to back, so the others are most likely there then.
pub(super) fn is_decompressed(driver: &Arc<dyn BlockDriver>, plan: &ReadPlan, range: GuestRange) -> bool {
    let mut end = range.end();
    for piece in plan.pieces.iter().rev() {
        end -= piece.len.min(end);
        if piece.place == Place::Slow(SlowReason::Compressed) {
            return is_there(driver, end);
        }
    }
    true
}

/// Joins compressed pieces that touch up to what is worth a thread, and a buffer of its own.
pub(super) fn join_compressed(plan: &mut ReadPlan) {
    if !has_compressed(plan) {
        return;
    }
    let is_compressed = |piece: &Piece| piece.place == Place::Slow(SlowReason::Compressed);
    let pieces = std::mem::take(&mut plan.pieces);
    let mut open: Option<Piece> = None;
    for piece in pieces.iter() {
        match &mut open {
            Some(last)
                if is_compressed(last) && is_compressed(piece) && last.len + piece.len <= JOB_LEN_MIN =>
            {
                last.len += piece.len;
            }
            Some(_) | None => {
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
    let mut at = range.offset();
    for piece in plan.pieces.iter() {
        let offset = at;
        at += piece.len;
        if piece.place != Place::Slow(SlowReason::Compressed) || is_there(driver, offset) {
            continue;
        }
        if let Some(last) = jobs.last_mut()
            && last.end() == offset
            && last.len() + piece.len <= JOB_LEN_MIN
            && let Some(joined) = GuestRange::new(last.offset(), last.len() + piece.len)
        {
            *last = joined;
        } else {
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

    #[test]
    fn compressed_pieces_are_joined_up_to_a_jobs_length_and_others_stay() {
        let (compressed, zero) = (Place::Slow(SlowReason::Compressed), Place::Zero { allocated: false });
        let mut plan = ReadPlan::default();
        let small = [(4096, compressed); 20];
        for (len, place) in small.into_iter().chain([
            (100, zero),
            (4096, compressed),
            (2 << 20, compressed),
            (512, compressed),
        ]) {
            plan.pieces.push(Piece { len, place, depth: 1 });
        }
        let covered_len = plan.pieces.covered_len();
        join_compressed(&mut plan);
        assert_eq!(plan.pieces.covered_len(), covered_len);
        let got: Vec<_> = plan.pieces.iter().map(|piece| (piece.len, piece.place)).collect();
        let joined = [(16 * 4096, compressed), (4 * 4096, compressed), (100, zero)];
        let apart = [(4096, compressed), (2 << 20, compressed), (512, compressed)];
        assert_eq!(got, [joined, apart].concat());
    }
}
