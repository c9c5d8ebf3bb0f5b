//! WRITE: out of the receive buffer in place where that does not wait, else from a copy that belongs to
//! the operation; payloads larger than the buffer are streamed through it. (Some have a worker instead, see
//! [`large_writes`](super::large_writes).)

use std::sync::Arc;

use nbd_img_formats::mover::storage_error;
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::{InPlace, IoBuf, Operation, OperationKind};
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Durability, Error, GuestRange, Place, Provision, WritePlan, ZeroRequest};

use super::budget::{CONNECTION_LEN_MAX, FLOOR_LEN, Lease};
use super::end::End;
use super::engine::Session;
use super::pending::{Pending, Work};
use crate::export::DetectZeroes;
use crate::nbd::request::{CommandFlags, Request};

/// Leave to hold buffers for a request: with a lease, or on the connection's floor.
pub(super) struct Admission(pub(super) Option<Lease>);

impl Session {
    /// Starts the write at the head of the input; returns whether enough of its payload was there.
    pub(super) async fn start_write(&mut self, request: Request) -> Result<bool, End> {
        let header_len = self.rules.form.request_header_len();
        let len = request.len as usize;
        let total = header_len + len;
        let for_worker = self.is_for_worker(&request);
        if self.input.len() < total {
            if for_worker && self.large_writes.are_given() && self.input.prepare_for(total) {
                return Ok(false);
            }
            if self.input.make_room_for(total) {
                return Ok(false);
            }
            self.input.consume(header_len);
            self.stream_write(request).await?;
            return Ok(true);
        }
        self.input.consume(header_len);
        if for_worker && self.give_to_worker(&request).await? {
            return Ok(true);
        }
        self.write_payload(request).await?;
        if for_worker {
            self.note_written_here(&request);
        }
        self.input.consume(len);
        Ok(true)
    }

    /// Serves a write whose payload is at the head of the input.
    async fn write_payload(&mut self, request: Request) -> Result<(), End> {
        let len = request.len as usize;
        let export = Arc::clone(&self.cell.export);
        let durability = export.durability(request.flags.contains(CommandFlags::FUA));
        let range = match export.range(request.offset, request.len) {
            Ok(range) => range,
            Err(error) => return self.reply_error(&request, &error).await,
        };
        if let Some(provision) = self.zeroes_to_store(len) {
            let zero = ZeroRequest { provision, fast: false, durability };
            return self.zero(request, range, zero).await;
        }
        if durability == Durability::Later && self.writes_in_place() {
            match self.write_in_place(range, 0) {
                Some(Ok(())) => return self.reply_success(&request).await,
                Some(Err(error)) => return self.reply_error(&request, &error).await,
                None => {}
            }
        }
        self.hand_write_on(request, range, durability).await
    }

    /// Has a write whose payload is at the head of the input carried out by the storage, or a worker.
    pub(super) async fn hand_write_on(
        &mut self,
        request: Request,
        range: GuestRange,
        durability: Durability,
    ) -> Result<(), End> {
        let len = request.len as usize;
        match self.admit(len).await? {
            Some(admission) => {
                let buf = self.shard.pool.copy_of(self.payload(len));
                self.submit_write(request, range, buf, durability, admission);
                Ok(())
            }
            None => self.write_sliced(request, range, durability).await,
        }
    }

    /// The first `len` bytes of the input.
    fn payload(&self, len: usize) -> &[u8] {
        self.input.bytes().get(..len).unwrap_or_default()
    }

    /// If zeroes are looked for and the payload has nothing else: how they are to be stored.
    fn zeroes_to_store(&self, len: usize) -> Option<Provision> {
        let provision = match self.cell.export.detect_zeroes() {
            DetectZeroes::Off => return None,
            DetectZeroes::On => Provision::Keep,
            DetectZeroes::Unmap => Provision::Unmap,
        };
        (len > 0 && is_zero(self.payload(len))).then_some(provision)
    }

    pub(super) fn writes_in_place(&self) -> bool {
        match self.cell.export.in_place().writes {
            InPlace::Always => true,
            InPlace::Ask => self.shard.watch.in_place(),
            InPlace::Never => false,
        }
    }

    /// Writes the payload that lies `at` in the input here and now. `None`: it would wait, nothing was done.
    pub(super) fn write_in_place(&mut self, range: GuestRange, at: usize) -> Option<Result<(), Error>> {
        let driver = self.cell.export.driver();
        if let Err(error) = driver.prepare_write(range, MapMode::Try, &mut self.write_plan) {
            return Some(Err(error));
        }
        if has_slow(&self.write_plan) {
            // Nothing was written, so the old bytes are what the guest goes on seeing.
            return driver.finish_write(&mut self.write_plan, false).err().map(Err);
        }
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        let payload = self.input.bytes().get(at..at + len).unwrap_or_default();
        let plan = &self.write_plan;
        let written = match self.cell.export.in_place().writes {
            InPlace::Ask => {
                // It may wait for the file's lock behind a worker's write of this session.
                let waits = self.input.payload_count() > 0;
                self.shard.watch.observe(range.len(), waits, || write_pieces(driver, plan, payload))
            }
            InPlace::Always | InPlace::Never => write_pieces(driver, plan, payload),
        };
        let finished = driver.finish_write(&mut self.write_plan, written.is_ok());
        Some(written.and(finished))
    }

    /// Gives a write to the storage, or to a worker when its place is not plain.
    fn submit_write(
        &mut self,
        request: Request,
        range: GuestRange,
        buf: IoBuf,
        durability: Durability,
        admission: Admission,
    ) {
        let driver = Arc::clone(self.cell.export.driver());
        let len = buf.len();
        if driver.prepare_write(range, MapMode::Try, &mut self.write_plan).is_ok() {
            let durable = !durability.is_fua() || self.write_plan.durable_in_place;
            if durable
                && let [piece] = self.write_plan.pieces[..]
                && let Place::Data { storage, at } = piece.place
                && let Some(storage) = driver.storages().get(usize::from(storage.0))
            {
                let plan = std::mem::take(&mut self.write_plan);
                let slot = self.insert(request, Work::Write { plan }, len, admission.0);
                let token = self.shard.token(&self.cell, slot, 0);
                let operation = Operation { kind: OperationKind::Write(durability), at, buf, token };
                self.shard.submit(storage, operation);
                return;
            }
            // The worker below plans the write anew; an error of this end shows there again.
            let _ = driver.finish_write(&mut self.write_plan, false);
        }
        let slot = self.insert(request, Work::Call, len, admission.0);
        let token = self.shard.token(&self.cell, slot, 0);
        let at = range.offset();
        self.shard.call(&self.cell.export, Lane::Write, token, buf, move |driver, buf| {
            driver.pwrite(at, buf, durability).map(|()| buf.len())
        });
    }

    fn insert(&self, request: Request, work: Work, len: usize, lease: Option<Lease>) -> usize {
        let pending = Pending { request, work, outstanding: 1, error: None, len, lease };
        self.cell.pending.borrow_mut().insert(pending)
    }

    /// Leave to hold `len` bytes: at once, or when enough pending requests have ended. `None`: not even
    /// then; the caller works within the floor, slice by slice.
    pub(super) async fn admit(&mut self, len: usize) -> Result<Option<Admission>, End> {
        loop {
            if let Some(admission) = self.try_admit(len) {
                return Ok(Some(admission));
            }
            if self.cell.pending.borrow().held_len() == 0 {
                return Ok(None);
            }
            self.wait_for_answer().await?;
        }
    }

    /// The same, if it can be had without waiting.
    pub(super) fn try_admit(&mut self, len: usize) -> Option<Admission> {
        let held = self.cell.pending.borrow().held_len();
        if held.saturating_add(len) <= FLOOR_LEN {
            return Some(Admission(None));
        }
        if held.saturating_add(len) > CONNECTION_LEN_MAX {
            return None;
        }
        let lease = self.shard.budget.try_lease(len).or_else(|| {
            let given_back = self.input.forget_payloads();
            if given_back { self.shard.budget.try_lease(len) } else { None }
        });
        lease.map(|lease| Admission(Some(lease)))
    }

    /// Writes a payload that is in the input, within the floor.
    async fn write_sliced(
        &mut self,
        request: Request,
        range: GuestRange,
        durability: Durability,
    ) -> Result<(), End> {
        // What was answered before must not wait for the disk.
        self.send_all().await?;
        let len = request.len as usize;
        let mut result = Ok(());
        let mut done = 0;
        while done < len && result.is_ok() {
            let rest = range.skip(done as u64);
            let slice = self.whole_blocks(rest, (len - done).min(FLOOR_LEN));
            let buf = self.shard.pool.copy_of(self.input.bytes().get(done..done + slice).unwrap_or_default());
            result = self.write_slice(rest, buf).await;
            done += slice;
        }
        self.finish_slices(request, result, durability).await
    }

    /// Writes a payload that is larger than the input can become: as it arrives.
    async fn stream_write(&mut self, request: Request) -> Result<(), End> {
        // What was answered before must not wait for the disk.
        self.send_all().await?;
        let export = Arc::clone(&self.cell.export);
        let durability = export.durability(request.flags.contains(CommandFlags::FUA));
        let mut left = request.len as usize;
        let mut rest = export.range(request.offset, request.len);
        let mut result = Ok(());
        while left > 0 {
            let wanted = left.min(FLOOR_LEN / 2);
            while self.input.len() < wanted {
                self.input.make_room_for(wanted);
                self.receive_more().await?;
            }
            let received = left.min(self.input.len()).min(FLOOR_LEN);
            let slice = rest.as_ref().map_or(received, |rest| self.whole_blocks(*rest, received));
            left -= slice;
            match &mut rest {
                // After the first failure the rest is only read off.
                Ok(range) if result.is_ok() => {
                    let part = range.prefix(slice as u64);
                    *range = range.skip(slice as u64);
                    result = self.write_head(part).await;
                }
                Ok(_) | Err(_) => {}
            }
            self.input.consume(slice);
        }
        let result = rest.map(drop).and(result);
        self.finish_slices(request, result, durability).await
    }

    /// How many of the `received` bytes of what is left of a request to write now: up to the end of a block that the
    /// image stores best as a whole, if one ends in them.
    fn whole_blocks(&self, rest: GuestRange, received: usize) -> usize {
        let block_len = u64::from(self.cell.export.driver().facts().block_preferred_len);
        let part = rest.prefix(received as u64);
        let beyond = usize::try_from(part.end() % block_len).unwrap_or(0);
        if part.len() < rest.len() && beyond < received { received - beyond } else { received }
    }

    /// Writes the head of the input to `range`.
    async fn write_head(&mut self, range: GuestRange) -> Result<(), Error> {
        if self.writes_in_place()
            && let Some(result) = self.write_in_place(range, 0)
        {
            return result;
        }
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        let buf = self.shard.pool.copy_of(self.payload(len));
        self.write_slice(range, buf).await
    }

    async fn write_slice(&mut self, range: GuestRange, buf: IoBuf) -> Result<(), Error> {
        let at = range.offset();
        let write = move |driver: &Arc<dyn BlockDriver>, buf: &mut IoBuf| {
            driver.pwrite(at, buf, Durability::Later).map(|()| buf.len())
        };
        self.call_and_wait(Lane::Write, buf, write).await.1.map(drop)
    }

    async fn finish_slices(
        &mut self,
        request: Request,
        result: Result<(), Error>,
        durability: Durability,
    ) -> Result<(), End> {
        match result {
            Err(error) => self.reply_error(&request, &error).await,
            Ok(()) if durability.is_fua() => {
                self.start_flush(request);
                Ok(())
            }
            Ok(()) => self.reply_success(&request).await,
        }
    }
}

/// Whether anything of it waits for more than its storages.
pub(super) fn has_slow(plan: &WritePlan) -> bool {
    plan.pieces.iter().any(|piece| !matches!(piece.place, Place::Data { .. }))
}

/// Writes the pieces of a plan without slow ones.
pub(super) fn write_pieces(
    driver: &Arc<dyn BlockDriver>,
    plan: &WritePlan,
    payload: &[u8],
) -> Result<(), Error> {
    let mut rest = payload;
    for piece in plan.pieces.iter() {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
        let (part, behind) = rest.split_at(len);
        rest = behind;
        if let Place::Data { storage, at } = piece.place
            && let Some(storage) = driver.storages().get(usize::from(storage.0))
        {
            storage
                .pwrite(part, at, Durability::Later)
                .map_err(|error| storage_error(storage, "cannot write", at, error))?;
        }
    }
    Ok(())
}

/// Whether all bytes are zero. Sixteen at a time, which the compiler turns into vector code.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_le_bytes(*chunk) == 0) && rest.iter().all(|byte| *byte == 0)
}
