//! Planning reads, and the tables that this takes: those that are not in memory are read before the reply is composed, where
//! it is the better for it. It tells which bytes are zeroes then, or is sent from the file.
//!
//! A worker reads them for a part of the disk at a time, and each part that has to wait is a job of its own: a large read of
//! small clusters, whose tables lie all about, neither keeps a worker to itself nor makes a large plan.

use std::sync::Arc;

use nbd_img_formats::plan::{MapMode, SlowReason};
use nbd_img_formats::storage::{InPlace, IoBuf};
use nbd_img_formats::workers::{Lane, Workers};
use nbd_img_formats::{BlockDriver, Error, GuestRange, Place, ReadPlan};
use tokio::sync::oneshot;

use super::engine::Session;
use super::layout::Framing;
use super::pending::{Arrival, Work};
use crate::nbd::request::Request;

/// Bytes of the disk whose tables are read at a time. Our choice: 2,048 clusters of the smallest kind, 1 MiB, as much as is
/// streamed at a time.
const STEP_LEN: u64 = 1 << 20;

/// From this length on a read of raw is worth asking the file system for holes (issue: 64 KiB).
const SPARSE_LEN_MIN: u64 = 64 << 10;

impl Session {
    /// Plans a range; holes are asked for where that costs no waiting and the reply can show them.
    pub(super) fn plan_read(&mut self, range: GuestRange, framing: Framing) -> Result<(), Error> {
        let export = &self.cell.export;
        let driver = export.driver();
        driver.map_read(range, MapMode::Try, &mut self.read_plan)?;
        let sparse = framing == Framing::Chunks
            && range.len() >= SPARSE_LEN_MIN
            && driver.facts().holes_in_storage
            && export.in_place().reads != InPlace::Never;
        // Who asks for holes waits for tables.
        if sparse && !is_cold(&self.read_plan) {
            driver.map_read(range, MapMode::Holes, &mut self.read_plan)?;
        }
        Ok(())
    }

    /// Plans a part of a read that is streamed, waiting for its tables where the reply can tell holes: those that have not
    /// stayed since the read waited for them.
    pub(super) async fn plan_slice(&mut self, slice: GuestRange, framing: Framing) -> Result<(), Error> {
        self.plan_read(slice, framing)?;
        if framing != Framing::Chunks || !is_cold(&self.read_plan) {
            return Ok(());
        }
        self.read_plan.reset();
        let (done, read) = oneshot::channel::<()>();
        self.read_tables(slice, done);
        // It says nothing, and only goes.
        let _ = read.await;
        self.plan_read(slice, framing)
    }

    /// Has a read wait whose tables are not in memory; others go on meanwhile. Returns whether it waits.
    pub(super) fn await_tables(&mut self, request: Request, range: GuestRange) -> bool {
        if !is_cold(&self.read_plan) {
            return false;
        }
        self.read_plan.reset();
        let token = self.insert_call(request, Work::Arrival(Arrival::Tables), 0, None);
        let answer = self.shard.answer(token, IoBuf::default());
        self.read_tables(range, answer);
        true
    }

    /// Has workers read the tables of a range. `done` goes afterwards, whatever came of it.
    fn read_tables<T: Send + 'static>(&self, range: GuestRange, done: T) {
        let export = &self.cell.export;
        read_tables(export.workers(), Arc::clone(export.driver()), range, done);
    }
}

/// Whether the plan has pieces whose tables are not in memory.
pub(super) fn is_cold(plan: &ReadPlan) -> bool {
    plan.pieces.iter().any(|piece| piece.place == Place::Slow(SlowReason::ColdTable))
}

fn read_tables<T: Send + 'static>(
    workers: &Arc<Workers>,
    driver: Arc<dyn BlockDriver>,
    range: GuestRange,
    done: T,
) {
    let next = Arc::clone(workers);
    let job = Box::new(move || {
        let mut plan = ReadPlan::default();
        let mut rest = range;
        let mut mode = MapMode::Wait;
        while !rest.is_empty() {
            let step = rest.prefix(STEP_LEN);
            // What is wrong shows when it is read.
            if driver.map_read(step, mode, &mut plan).is_err() {
                return;
            }
            if mode == MapMode::Try && is_cold(&plan) {
                // Behind what others want of the workers.
                plan.reset();
                return read_tables(&next, driver, rest, done);
            }
            rest = rest.skip(step.len());
            mode = MapMode::Try;
        }
        drop(done);
    });
    // A job that cannot be run is dropped, and `done` with it.
    drop(workers.spawn(Lane::Read, job));
}
