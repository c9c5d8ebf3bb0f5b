//! READ: from a plan to a reply, in place where nothing waits, else through pending parts.

use std::sync::Arc;

use nbd_img_formats::ReadPlan;
use nbd_img_formats::mover::{short_read, storage_error};
use nbd_img_formats::plan::{Piece, SlowReason};
use nbd_img_formats::storage::{InPlace, Operation, OperationKind, TryRead};
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Error, ErrorKind, GuestRange, Place};
use smallvec::SmallVec;

use super::budget::FLOOR_LEN;
use super::decompress::{is_decompressed, join_compressed};
use super::end::End;
use super::engine::Session;
use super::layout::{Chunk, Framing, Run, Runs, chunks, framed_len, is_crumbs, no_room, put_header, runs_of};
use super::pending::{Arrival, Part, PartBytes, Pending, Work};
use super::replies::{OUT_LEN_MAX, OutBuf};
use super::sendfile::Sending;
use crate::nbd::reply;
use crate::nbd::request::{CommandFlags, Request};

/// Bytes of a streamed read that are fetched and sent at a time: half of a batch.
const STREAM_SLICE_LEN: usize = 1 << 20;

/// What came of an attempt to read in place.
enum Attempt {
    Done,
    WouldWait,
    Failed(Error),
}

impl Session {
    pub(super) async fn start_read(&mut self, request: Request) -> Result<(), End> {
        if request.len == 0 {
            return self.reply_success(&request).await;
        }
        self.read(request, None).await
    }

    /// A read whose tables or bytes should be in memory by now.
    pub(super) async fn read_arrived(&mut self, request: Request, what: Arrival) -> Result<(), End> {
        self.read(request, Some(what)).await
    }

    /// Serves a read, for the first time or again when what it waited for has `arrived`. It waits once for each kind at
    /// most, so that it ends also when what came is gone again.
    async fn read(&mut self, request: Request, arrived: Option<Arrival>) -> Result<(), End> {
        let range = match self.cell.export.range(request.offset, request.len) {
            Ok(range) => range,
            Err(error) => return self.reply_error(&request, &error).await,
        };
        let framing = self.framing(&request);
        if let Err(error) = self.plan_read(range, framing) {
            self.read_plan.reset();
            return self.reply_error(&request, &error).await;
        }
        self.read_planned(request, range, framing, arrived).await
    }

    /// The same from the plan on.
    pub(super) async fn read_planned(
        &mut self,
        request: Request,
        range: GuestRange,
        framing: Framing,
        arrived: Option<Arrival>,
    ) -> Result<(), End> {
        let mut runs = runs_of(&self.read_plan);
        let sending = self.sending(&runs, framing);
        let noted = match arrived {
            None => sending != Sending::Never || range.len() <= OUT_LEN_MAX as u64,
            // Only now does a large one turn out to go as a whole.
            Some(Arrival::Tables) => sending != Sending::Never && range.len() > OUT_LEN_MAX as u64,
            Some(Arrival::Bytes) => false,
        };
        if noted {
            // What is streamed is noted slice by slice.
            self.ahead.note(range);
            self.read_ahead();
            self.decompress_ahead();
        }
        if arrived.is_none() && framing == Framing::Chunks && self.await_tables(request, range) {
            return Ok(());
        }
        let may_wait = arrived != Some(Arrival::Bytes);
        if sending != Sending::Now {
            self.uncopied.disturb();
        } else if self.goes_uncopied(framed_len(&runs, framing)) {
            return self.send_read(request, framing, &runs).await;
        }
        if sending == Sending::Later && may_wait && self.await_bytes(request, range) {
            return Ok(());
        }
        if !self.out.make_room_for(framed_len(&runs, framing)) {
            // As long as the client is waited for, a pin would keep freed clusters from everybody.
            self.read_plan.reset();
            self.send_all().await?;
            if let Err(error) = self.plan_read(range, framing) {
                self.read_plan.reset();
                return self.reply_error(&request, &error).await;
            }
            runs = runs_of(&self.read_plan);
        }
        self.copy_read(request, range, framing, &runs, may_wait, sending == Sending::Now).await
    }

    /// Serves a read of this plan by copying what is in memory, if there is room for it, and by waiting for what is not,
    /// if it `may_wait` for it to come there. What `could_be_sent` is where it cannot be copied.
    async fn copy_read(
        &mut self,
        request: Request,
        range: GuestRange,
        framing: Framing,
        runs: &[Run],
        may_wait: bool,
        could_be_sent: bool,
    ) -> Result<(), End> {
        if !self.out.make_room_for(framed_len(runs, framing)) {
            if could_be_sent && self.sending(runs, framing) == Sending::Now {
                return self.send_read(request, framing, runs).await;
            }
            self.read_plan.reset();
            return self.stream_read(request, range, framing).await;
        }
        let mark = self.out.mark();
        match self.read_in_place(&request, range, request.offset, framing, true, runs) {
            Attempt::Done => {
                self.read_plan.reset();
                Ok(())
            }
            Attempt::WouldWait => {
                self.out.cut_back(mark);
                if could_be_sent && self.sending(runs, framing) == Sending::Now {
                    return self.send_read(request, framing, runs).await;
                }
                self.read_ahead_of_miss();
                if may_wait && self.await_decompressed(request, range) {
                    return Ok(());
                }
                self.submit_read(request, range, framing).await
            }
            Attempt::Failed(error) => {
                self.out.cut_back(mark);
                self.read_plan.reset();
                self.reply_error(&request, &error).await
            }
        }
    }

    pub(super) fn framing(&self, request: &Request) -> Framing {
        match (self.rules.form.is_chunked(), request.flags.contains(CommandFlags::DF)) {
            (false, _) => Framing::Simple,
            (true, true) => Framing::OneChunk,
            (true, false) => Framing::Chunks,
        }
    }

    /// Composes the reply of the plan of `range` in the out buffer, for which there is room, unless it would
    /// wait.
    fn read_in_place(
        &mut self,
        request: &Request,
        range: GuestRange,
        offset: u64,
        framing: Framing,
        last: bool,
        runs: &[Run],
    ) -> Attempt {
        let driver = self.cell.export.driver();
        let plan = &self.read_plan;
        let waits =
            |piece: &Piece| matches!(piece.place, Place::Slow(SlowReason::ColdTable | SlowReason::Allocate));
        if plan.pieces.iter().any(waits) || !is_decompressed(driver, plan, range) {
            return Attempt::WouldWait;
        }
        if self.cell.export.in_place().reads == InPlace::Never
            && plan.pieces.iter().any(|piece| matches!(piece.place, Place::Data { .. }))
        {
            return Attempt::WouldWait;
        }
        let to = self.reply_to(request);
        let header = |chunk: &Chunk, out: &mut OutBuf| put_header(out, to, offset, framing, last, chunk);
        for chunk in chunks(runs, framing) {
            if !header(&chunk, &mut self.out) {
                return Attempt::Failed(no_room());
            }
            if chunk.hole {
                continue;
            }
            let mut at = range.offset() + chunk.at;
            for (index, run) in runs.iter().enumerate().take(chunk.end_run).skip(chunk.first_run) {
                match fill_run(driver, plan, index, at, *run, &mut self.out) {
                    Attempt::Done => at += run.len as u64,
                    ended @ (Attempt::WouldWait | Attempt::Failed(_)) => return ended,
                }
            }
        }
        Attempt::Done
    }

    /// Submits what the plan says; the reply follows when all of it is there.
    pub(super) async fn submit_read(
        &mut self,
        request: Request,
        range: GuestRange,
        framing: Framing,
    ) -> Result<(), End> {
        let len = request.len as usize;
        let admission = match self.try_admit(len) {
            Some(admission) => admission,
            None => {
                // As above: what is waited for may be the client.
                self.read_plan.reset();
                let Some(admission) = self.admit(len).await? else {
                    return self.stream_read(request, range, framing).await;
                };
                if let Err(error) = self.plan_read(range, framing) {
                    self.read_plan.reset();
                    return self.reply_error(&request, &error).await;
                }
                admission
            }
        };
        join_compressed(&mut self.read_plan);
        if is_crumbs(&self.read_plan) {
            self.read_plan.reset();
            let place = Place::Slow(SlowReason::ColdTable);
            self.read_plan.pieces.push(Piece { len: range.len(), place, depth: 0 });
        }
        let mut parts: SmallVec<[Part; 1]> = SmallVec::new();
        for piece in self.read_plan.pieces.iter() {
            let bytes = match piece.place {
                Place::Zero { .. } => PartBytes::Zero,
                Place::Data { .. } | Place::Slow(_) => PartBytes::Awaited,
            };
            parts.push(Part { len: usize::try_from(piece.len).unwrap_or(usize::MAX), bytes });
        }
        let outstanding = parts.iter().filter(|part| matches!(part.bytes, PartBytes::Awaited)).count();
        let pin = self.read_plan.pin.take();
        let work = Work::Read { parts, pin };
        let slot = self.cell.pending.borrow_mut().insert(Pending {
            request,
            work,
            outstanding,
            error: None,
            len,
            lease: admission.0,
        });
        self.submit_parts(slot, range);
        self.read_plan.reset();
        Ok(())
    }

    fn submit_parts(&mut self, slot: usize, range: GuestRange) {
        let driver = self.cell.export.driver();
        let mut at = range.offset();
        for (index, piece) in self.read_plan.pieces.iter().enumerate() {
            let begin = at;
            at += piece.len;
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            match piece.place {
                Place::Zero { .. } => {}
                Place::Data { storage, at } => {
                    let token = self.shard.token(&self.cell, slot, index);
                    let buf = self.shard.pool.take(len);
                    match driver.storages().get(usize::from(storage.0)) {
                        Some(storage) => {
                            let operation = Operation { kind: OperationKind::Read, at, buf, token };
                            self.shard.submit(storage, operation);
                        }
                        None => {
                            self.shard.call(&self.cell.export, Lane::Read, token, buf, move |driver, buf| {
                                driver.pread(begin, buf).map(|()| len)
                            })
                        }
                    }
                }
                Place::Slow(_) => {
                    let token = self.shard.token(&self.cell, slot, index);
                    let buf = self.shard.pool.take(len);
                    self.shard.call(&self.cell.export, Lane::Read, token, buf, move |driver, buf| {
                        driver.pread(begin, buf).map(|()| len)
                    });
                }
            }
        }
    }

    /// The reply of a pending read whose parts are all there.
    pub(super) async fn reply_parts(&mut self, request: &Request, parts: &[Part]) -> Result<(), End> {
        let framing = self.framing(request);
        let to = self.reply_to(request);
        let runs: Runs = parts
            .iter()
            .map(|part| Run { len: part.len, zero: matches!(part.bytes, PartBytes::Zero) })
            .collect();
        for chunk in chunks(&runs, framing) {
            self.put_chunk_header(to, request.offset, framing, true, &chunk).await?;
            if chunk.hole {
                continue;
            }
            for part in &parts[chunk.first_run..chunk.end_run] {
                match &part.bytes {
                    PartBytes::Read(buf) => self.put_all(buf).await?,
                    PartBytes::Zero => self.put_zeroes(part.len).await?,
                    // Never zeroes in the place of data.
                    PartBytes::Awaited => return Err(End::BrokenReply(never_came())),
                }
            }
        }
        Ok(())
    }

    /// A read that does not fit into memory at once: slice by slice, in order, while the connection's
    /// other requests wait.
    async fn stream_read(
        &mut self,
        request: Request,
        range: GuestRange,
        framing: Framing,
    ) -> Result<(), End> {
        // What was answered before must not wait for the disk.
        self.send_all().await?;
        let asked = framing;
        let framing = self.begin_stream(&request, asked).await?;
        let mut rest = range;
        while !rest.is_empty() {
            let (slice, lease) = self.slice_of(rest);
            rest = rest.skip(slice.len());
            let offset = request.offset + (slice.offset() - range.offset());
            let outcome = self.stream_slice(&request, slice, offset, framing, rest.is_empty()).await?;
            drop(lease);
            if let Err(error) = outcome {
                let missing = slice.len() + rest.len();
                return self.fail_stream(&request, asked, missing, offset, error).await;
            }
            self.send_all().await?;
        }
        if asked == Framing::OneChunk { self.reply_success(&request).await } else { Ok(()) }
    }

    /// Sends the one header of a reply that has only one; the slices are bare then.
    async fn begin_stream(&mut self, request: &Request, framing: Framing) -> Result<Framing, End> {
        match framing {
            Framing::Chunks => return Ok(framing),
            Framing::Simple => self.put_all(&reply::simple(None, request.cookie)).await?,
            Framing::OneChunk => {
                let len = u32::try_from(request.len).unwrap_or(u32::MAX);
                let to = self.reply_to(request);
                // An error may have to follow.
                self.put_all(&reply::offset_data(to, request.offset, len, reply::Place::More)).await?;
            }
            Framing::Bare => {}
        }
        Ok(Framing::Bare)
    }

    /// The next slice, as long as the budget allows.
    fn slice_of(&self, rest: GuestRange) -> (GuestRange, Option<super::budget::Lease>) {
        let lease = self.shard.budget.try_lease(STREAM_SLICE_LEN);
        // Half of the floor, so that chunk headers fit beside the data.
        let len = if lease.is_some() { STREAM_SLICE_LEN } else { FLOOR_LEN / 2 };
        (rest.prefix(len as u64), lease)
    }

    /// Puts one slice into the batch. The inner result is the disk's, the outer the connection's.
    async fn stream_slice(
        &mut self,
        request: &Request,
        slice: GuestRange,
        offset: u64,
        framing: Framing,
        last: bool,
    ) -> Result<Result<(), Error>, End> {
        if let Err(error) = self.plan_slice(slice, framing).await {
            self.read_plan.reset();
            return Ok(Err(error));
        }
        self.ahead.note(slice);
        self.decompress_ahead();
        let runs = runs_of(&self.read_plan);
        let needed = framed_len(&runs, framing);
        let mark = self.out.mark();
        if self.out.make_room_for(needed) {
            match self.read_in_place(request, slice, offset, framing, last, &runs) {
                Attempt::Done => {
                    self.read_plan.reset();
                    return Ok(Ok(()));
                }
                Attempt::WouldWait => self.out.cut_back(mark),
                Attempt::Failed(error) => {
                    self.out.cut_back(mark);
                    self.read_plan.reset();
                    return Ok(Err(error));
                }
            }
        }
        self.read_ahead_of_miss();
        self.read_plan.reset();
        let len = usize::try_from(slice.len()).unwrap_or(usize::MAX);
        let at = slice.offset();
        let (buf, result) = self
            .call_and_wait(Lane::Read, self.shard.pool.take(len), move |driver, buf| {
                driver.pread(at, buf).map(|()| buf.len())
            })
            .await;
        if let Err(error) = result {
            return Ok(Err(error));
        }
        let run = [Run { len, zero: false }];
        for chunk in chunks(&run, framing) {
            self.put_chunk_header(self.reply_to(request), offset, framing, last, &chunk).await?;
        }
        self.put_all(&buf).await?;
        Ok(Ok(()))
    }

    /// A streamed read failed with `missing` bytes to go, from `offset` of the export.
    async fn fail_stream(
        &mut self,
        request: &Request,
        asked: Framing,
        missing: u64,
        offset: u64,
        error: Error,
    ) -> Result<(), End> {
        match asked {
            // What has been sent stands, and nothing more is announced.
            Framing::Chunks => self.reply_error(request, &error).await,
            Framing::Simple | Framing::OneChunk | Framing::Bare => {
                let missing = usize::try_from(missing).unwrap_or(usize::MAX);
                self.fail_sent(request, asked, missing, offset, error).await
            }
        }
    }
}

/// A defect of the server: a request was answered before its last part came.
fn never_came() -> Error {
    Error::new(ErrorKind::Io, "a part of the reply never came; this is a defect of the server")
}

/// Reads or zeroes one run, from `offset` of the disk, into the room of the out buffer.
fn fill_run(
    driver: &Arc<dyn BlockDriver>,
    plan: &ReadPlan,
    index: usize,
    offset: u64,
    run: Run,
    out: &mut OutBuf,
) -> Attempt {
    let Some(room) = out.room(run.len) else { return Attempt::Failed(no_room()) };
    match plan.pieces.get(index).map(|piece| piece.place) {
        Some(Place::Data { storage, at }) => {
            let Some(storage) = driver.storages().get(usize::from(storage.0)) else {
                return Attempt::WouldWait;
            };
            match storage.try_pread(room, at) {
                Ok(TryRead::Done(got)) if got == run.len => {}
                Ok(TryRead::Done(got)) => return Attempt::Failed(short_read(storage, at, got)),
                Ok(TryRead::WouldWait(_)) => return Attempt::WouldWait,
                Err(error) => return Attempt::Failed(storage_error(storage, "cannot read", at, error)),
            }
        }
        Some(Place::Zero { .. }) => room.fill(0),
        Some(Place::Slow(SlowReason::Compressed)) => match driver.try_read_slow(offset, room) {
            Ok(true) => {}
            // Errors show again where it is waited for.
            Ok(false) | Err(_) => return Attempt::WouldWait,
        },
        Some(Place::Slow(SlowReason::ColdTable | SlowReason::Allocate)) | None => return Attempt::WouldWait,
    }
    out.push(run.len);
    Attempt::Done
}
