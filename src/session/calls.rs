//! The commands without data: flush, trim, write-zeroes and cache. They run on the export's workers,
//! because each of them may wait for the disk.

use std::sync::Arc;

use nbd_img_formats::storage::IoBuf;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Error, ErrorKind, GuestRange, Result, ZeroRequest};
use tokio::sync::oneshot;

use super::budget::Lease;
use super::end::End;
use super::engine::Session;
use super::pending::{Pending, Work};
use crate::export::provision;
use crate::nbd::request::{CommandFlags, Request};

impl Session {
    pub(super) fn start_flush(&mut self, request: Request) {
        let token = self.insert_call(request, Work::Call, 0, None);
        self.shard.flush(&self.cell.export, token);
    }

    pub(super) async fn start_trim(&mut self, request: Request) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        let durability = self.cell.export.durability(request.flags.contains(CommandFlags::FUA));
        match self.cell.export.driver().try_discard(range, durability) {
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
            durability: self.cell.export.durability(request.flags.contains(CommandFlags::FUA)),
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
        if let Ok(true) = self.cell.export.driver().try_write_zeroes(range, zero) {
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

    /// Calls the driver on a worker; the request is answered when it returns.
    pub(super) fn start_call<F>(&mut self, lane: Lane, request: Request, work: F)
    where
        F: FnOnce(&Arc<dyn BlockDriver>) -> Result<()> + Send + 'static,
    {
        let token = self.insert_call(request, Work::Call, 0, None);
        self.shard.call(&self.cell.export, lane, token, IoBuf::default(), move |driver, _| {
            work(driver).map(|()| 0)
        });
    }

    /// Calls the driver on a worker and waits for it; for the slices of streamed requests.
    pub(super) async fn call_and_wait<F>(&mut self, lane: Lane, buf: IoBuf, work: F) -> (IoBuf, Result<usize>)
    where
        F: FnOnce(&Arc<dyn BlockDriver>, &mut IoBuf) -> Result<usize> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let driver = Arc::clone(self.cell.export.driver());
        let job = Box::new(move || {
            let mut buf = buf;
            let result = work(&driver, &mut buf);
            // The session may have gone in the meantime.
            let _ = answer.send((buf, result));
            if lane == Lane::Write {
                driver.tidy();
            }
        });
        drop(self.cell.export.workers().spawn(lane, job));
        answered.await.unwrap_or_else(|_| {
            let text = "the request could not be carried out: no thread, or a defect of the server";
            (IoBuf::default(), Err(Error::new(ErrorKind::Io, text)))
        })
    }

    pub(super) fn insert_call(
        &mut self,
        request: Request,
        work: Work,
        len: usize,
        lease: Option<Lease>,
    ) -> u64 {
        let pending = Pending { request, work, outstanding: 1, error: None, len, lease };
        let slot = self.cell.pending.borrow_mut().insert(pending);
        self.shard.token(&self.cell, slot, 0)
    }

    pub(super) async fn range_or_reply(
        &mut self,
        request: &Request,
    ) -> std::result::Result<Option<GuestRange>, End> {
        match self.cell.export.range(request.offset, request.len) {
            Ok(range) => Ok(Some(range)),
            Err(error) => {
                self.reply_error(request, &error).await?;
                Ok(None)
            }
        }
    }

    /// Waits for the end of at least one pending request and answers it.
    pub(super) async fn wait_for_answer(&mut self) -> std::result::Result<(), End> {
        while self.cell.ready.borrow().is_empty() {
            self.send_all().await?;
            self.cell.wake.notified().await;
        }
        self.answer_ready().await
    }
}
