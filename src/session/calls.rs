//! The commands without data: flush, trim, write-zeroes, cache and block status. They run on the
//! export's workers, because each of them may wait for the disk.

use std::ops::ControlFlow;
use std::sync::Arc;

use nbd_img_formats::driver::Status;
use nbd_img_formats::storage::IoBuf;
use nbd_img_formats::sync::Mutex;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Error, ErrorKind, GuestRange, Result, StatusQuery, ZeroRequest};
use tokio::sync::oneshot;

use super::budget::{FLOOR_LEN, Lease};
use super::end::End;
use super::engine::Session;
use super::pending::{Pending, Work};
use super::write::Admission;
use crate::export::provision;
use crate::nbd::block_status::{Builder, EXTENTS_MAX, Progress};
use crate::nbd::reply;
use crate::nbd::request::{CommandFlags, Request};

/// The protocol's flags of `base:allocation`.
const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Bytes that a run of a block status takes until it is sent.
const RUN_LEN: usize = size_of::<(u64, u32)>();

impl Session {
    pub(super) fn start_flush(&mut self, request: Request) {
        self.start_call(Lane::Write, request, |driver| driver.make_durable());
    }

    pub(super) async fn start_trim(&mut self, request: Request) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        let durability = self.shard.export.durability(request.flags.contains(CommandFlags::FUA));
        match self.shard.export.driver().try_discard(range, durability) {
            Ok(true) => self.reply_success(&request).await,
            Ok(false) | Err(_) => {
                self.start_call(Lane::Write, request, move |driver| driver.discard(range, durability));
                Ok(())
            }
        }
    }

    pub(super) async fn start_write_zeroes(&mut self, request: Request) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        let zero = ZeroRequest {
            provision: provision(request.flags.contains(CommandFlags::NO_HOLE)),
            fast: request.flags.contains(CommandFlags::FAST_ZERO),
            durability: self.shard.export.durability(request.flags.contains(CommandFlags::FUA)),
        };
        self.zero(request, range, zero).await
    }

    /// Zeroes a range: here and now where that takes memory only. An error shows again where it is waited for.
    pub(super) async fn zero(
        &mut self,
        request: Request,
        range: GuestRange,
        zero: ZeroRequest,
    ) -> std::result::Result<(), End> {
        if let Ok(true) = self.shard.export.driver().try_write_zeroes(range, zero) {
            return self.reply_success(&request).await;
        }
        self.start_call(Lane::Write, request, move |driver| driver.write_zeroes(range, zero));
        Ok(())
    }

    pub(super) async fn start_cache(&mut self, request: Request) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        self.start_call(Lane::Read, request, move |driver| driver.cache(range));
        Ok(())
    }

    pub(super) async fn start_block_status(&mut self, request: Request) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        let mut runs_max = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { EXTENTS_MAX };
        // No run is shorter than a sector, but for the last one.
        runs_max = runs_max.min(request.len as usize / 512 + 1);
        let Admission(lease) = match self.admit(runs_max * RUN_LEN).await? {
            Some(admission) => admission,
            None => {
                // The client asks for the rest again.
                runs_max = FLOOR_LEN / RUN_LEN;
                Admission(None)
            }
        };
        let runs = Arc::new(Mutex::new(Vec::new()));
        let work = Work::Status { runs: Arc::clone(&runs) };
        let token = self.insert_call(request, work, runs_max * RUN_LEN, lease);
        self.shard.call(Lane::Read, token, IoBuf::default(), move |driver, _| {
            let found = allocation_runs(driver, range, runs_max)?;
            *runs.lock() = found;
            Ok(0)
        });
        Ok(())
    }

    /// The chunks of a block status, one for each context.
    pub(super) async fn reply_status(
        &mut self,
        request: &Request,
        runs: &[(u64, u32)],
    ) -> std::result::Result<(), End> {
        self.scratch.clear();
        let count = self.contexts.len();
        for (index, context) in self.contexts.iter().enumerate() {
            let mut builder = Builder::new(request, &self.rules);
            for (len, flags) in runs {
                if builder.push(*len, *flags) == Progress::Full {
                    break;
                }
            }
            let place = if index + 1 == count { reply::Place::Last } else { reply::Place::More };
            reply::push_block_status(&mut self.scratch, request.cookie, context.id, &builder.finish(), place);
        }
        self.put_scratch().await
    }

    /// Calls the driver on a worker; the request is answered when it returns.
    pub(super) fn start_call<F>(&mut self, lane: Lane, request: Request, work: F)
    where
        F: FnOnce(&Arc<dyn BlockDriver>) -> Result<()> + Send + 'static,
    {
        let token = self.insert_call(request, Work::Call, 0, None);
        self.shard.call(lane, token, IoBuf::default(), move |driver, _| work(driver).map(|()| 0));
    }

    /// Calls the driver on a worker and waits for it; for the slices of streamed requests.
    pub(super) async fn call_and_wait<F>(&mut self, lane: Lane, buf: IoBuf, work: F) -> (IoBuf, Result<usize>)
    where
        F: FnOnce(&Arc<dyn BlockDriver>, &mut IoBuf) -> Result<usize> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let driver = Arc::clone(self.shard.export.driver());
        let job = Box::new(move || {
            let mut buf = buf;
            let result = work(&driver, &mut buf);
            // The session may have gone in the meantime.
            let _ = answer.send((buf, result));
            if lane == Lane::Write {
                driver.tidy();
            }
        });
        drop(self.shard.export.workers().spawn(lane, job));
        answered.await.unwrap_or_else(|_| {
            let text = "the request could not be carried out: no thread, or a defect of the server";
            (IoBuf::default(), Err(Error::new(ErrorKind::Io, text)))
        })
    }

    fn insert_call(&mut self, request: Request, work: Work, len: usize, lease: Option<Lease>) -> u64 {
        let pending = Pending { request, work, outstanding: 1, error: None, len, lease };
        let slot = self.cell.pending.borrow_mut().insert(pending);
        self.shard.token(&self.cell, slot, 0)
    }

    async fn range_or_reply(&mut self, request: &Request) -> std::result::Result<Option<GuestRange>, End> {
        match self.shard.export.range(request.offset, u64::from(request.len)) {
            Ok(range) => Ok(Some(range)),
            Err(error) => {
                self.reply_error(request, &error).await?;
                Ok(None)
            }
        }
    }
}

/// Consecutive runs of the range with their protocol flags, at most `runs_max`.
fn allocation_runs(
    driver: &Arc<dyn BlockDriver>,
    range: GuestRange,
    runs_max: usize,
) -> Result<Vec<(u64, u32)>> {
    let mut runs = Vec::new();
    driver.status(StatusQuery::Allocation, range, &mut |len, status| {
        let flags = match status {
            Status::Allocation { hole, zero } => {
                (if hole { STATE_HOLE } else { 0 }) | (if zero { STATE_ZERO } else { 0 })
            }
            Status::Depth(_) | Status::Bitmap { .. } => 0,
        };
        runs.push((len, flags));
        if runs.len() < runs_max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(runs)
}
