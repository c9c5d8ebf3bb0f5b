//! Large reads that leave by sendfile: from the page cache to the socket without a copy here.
//!
//! Only where nothing that a plan names can be freed before the client has received it
//! ([`Facts::sendable`](nbd_img_formats::Facts)), and only what is in memory, so that nothing waits; what is
//! on its way there is waited for elsewhere.
//! The data's header is out before the data is known to be there; a file that turns out too short ends a
//! simple reply by closing, a structured one by padding and an error chunk.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nbd_img_formats::mover::{short_read, storage_error};
use nbd_img_formats::storage::{InPlace, Operation, OperationKind};
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Error, GuestRange, HostOffset, HostRange, Place, ReadPlan, Storage};
use tokio::io::Interest;

use super::end::End;
use super::engine::Session;
use super::layout::{Framing, Run, chunks};
use super::pending::{Arrival, Work};
use super::replies::OUT_LEN_MAX;
use crate::nbd::errno::NbdError;
use crate::nbd::reply;
use crate::nbd::request::Request;

/// From this length on saving the copy is worth a system call of its own (prototype: measured from
/// 64 KiB up).
const SEND_LEN_MIN: usize = 64 << 10;

/// Whether a reply can leave by sendfile.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    /// At once.
    Now,
    /// As soon as its bytes are in memory.
    Later,
    /// No.
    Never,
}

impl Session {
    /// Whether the plan can be sent: every run has to be either a hole that is told as such or large and
    /// plain.
    pub(super) fn sending(&self, runs: &[Run], framing: Framing) -> Sending {
        let driver = self.cell.export.driver();
        if runs.first().is_none_or(|run| run.len < SEND_LEN_MIN) || !driver.facts().sendable {
            return Sending::Never;
        }
        if self.socket.get_ref().tls().is_some() {
            // What goes out has to be encrypted here.
            return Sending::Never;
        }
        let mut sending = Sending::Now;
        for (piece, run) in self.read_plan.pieces.iter().zip(runs) {
            match piece.place {
                Place::Zero { .. } if run.is_hole(framing) => {}
                Place::Data { storage, at } if run.len >= SEND_LEN_MIN => {
                    let storage = driver.storages().get(usize::from(storage.0));
                    let range = HostRange::new(at, piece.len);
                    if !storage.zip(range).is_some_and(|(storage, range)| storage.can_send(range)) {
                        sending = Sending::Later;
                    }
                }
                Place::Zero { .. } | Place::Data { .. } | Place::Slow(_) => return Sending::Never,
            }
        }
        sending
    }

    /// Whether a read that can be sent at once is, of which this would be the length in a batch. What does not fit in there
    /// would be copied slice by slice, in which it loses more than there is to win; of holes there is nothing to send.
    pub(super) fn goes_uncopied(&mut self, framed_len: usize) -> bool {
        if !(SEND_LEN_MIN..=OUT_LEN_MAX).contains(&framed_len) {
            return true;
        }
        self.uncopied.pays(framed_len as u64, !self.shard.budget.is_scarce(), Instant::now())
    }

    /// Has a read, whose plan can be sent but for its bytes not being in memory, wait until they are. Returns
    /// whether that is worth it: where it would otherwise be copied slice by slice, or where the bytes have
    /// been asked for already.
    pub(super) fn await_bytes(&mut self, request: Request, range: GuestRange) -> bool {
        if self.cell.export.in_place().reads != InPlace::Ask {
            return false;
        }
        self.read_ahead_of_miss();
        let driver = self.cell.export.driver();
        if self.ahead.has_asked_for(range)
            && let Some((storage, at)) = last_byte(driver, &self.read_plan)
        {
            let storage = Arc::clone(storage);
            self.read_plan.reset();
            let token = self.insert_call(request, Work::Arrival(Arrival::Bytes), 0, None);
            let operation = Operation { kind: OperationKind::Read, at, buf: self.shard.pool.take(1), token };
            self.shard.submit(&storage, operation);
            return true;
        }
        if range.len() <= OUT_LEN_MAX as u64 {
            return false;
        }
        self.read_plan.reset();
        let token = self.insert_call(request, Work::Arrival(Arrival::Bytes), 0, None);
        self.shard.call(&self.cell.export, Lane::Read, token, self.shard.pool.take(1), move |driver, buf| {
            driver.cache(range)?;
            driver.pread(range.end().saturating_sub(1), buf).map(|()| buf.len())
        });
        true
    }

    /// Sends the reply of the plan, of which [`sending`](Self::sending) says that it can go now.
    pub(super) async fn send_read(
        &mut self,
        request: Request,
        framing: Framing,
        runs: &[Run],
    ) -> Result<(), End> {
        let plan = std::mem::take(&mut self.read_plan);
        let driver = Arc::clone(self.cell.export.driver());
        for chunk in chunks(runs, framing) {
            // Never the last chunk: an error may have to follow.
            self.put_chunk_header(self.reply_to(&request), request.offset, framing, false, &chunk).await?;
            let pieces = plan.pieces.get(chunk.first_run..chunk.end_run).unwrap_or_default();
            let mut left = chunk.len;
            for (piece, run) in pieces.iter().zip(runs.get(chunk.first_run..).unwrap_or_default()) {
                let Place::Data { storage, at } = piece.place else { continue };
                let Some(storage) = driver.storages().get(usize::from(storage.0)) else { continue };
                self.send_batch(true).await?;
                if self.uncopied.leaves_memory() {
                    self.out.release();
                }
                if let Err((sent, error)) = self.send_run(storage, at, run.len).await? {
                    let missing = left - sent;
                    let at = request.offset + chunk.at + (chunk.len - missing) as u64;
                    return self.fail_sent(&request, framing, missing, at, error).await;
                }
                left -= run.len;
            }
        }
        match framing {
            Framing::Simple | Framing::Bare => Ok(()),
            Framing::Chunks | Framing::OneChunk => self.reply_success(&request).await,
        }
    }

    /// Sends one run. The inner error is the storage's, with the bytes that were sent before it.
    async fn send_run(
        &mut self,
        storage: &Arc<dyn Storage>,
        at: HostOffset,
        len: usize,
    ) -> Result<Result<(), (usize, Error)>, End> {
        let mut sent = 0;
        while sent < len {
            let from = HostOffset(at.0.saturating_add(sent as u64));
            let send = |socket: &crate::transport::Stream| storage.send(socket.as_fd(), from, len - sent);
            match self.socket.try_io(Interest::WRITABLE, send) {
                Ok(0) => return Ok(Err((sent, short_read(storage, at, sent)))),
                Ok(more) => sent += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable().await?,
                Err(error) if is_the_socket(&error) => return Err(End::Socket(error)),
                Err(error) => return Ok(Err((sent, storage_error(storage, "cannot read", from, error)))),
            }
        }
        Ok(Ok(()))
    }

    /// The data of a chunk or simple reply stopped `missing` bytes before its announced end, at `offset`
    /// of the export: fills it up and says where that begins, or closes.
    pub(super) async fn fail_sent(
        &mut self,
        request: &Request,
        framing: Framing,
        missing: usize,
        offset: u64,
        error: Error,
    ) -> Result<(), End> {
        match framing {
            Framing::Simple | Framing::Bare => Err(End::BrokenReply(error)),
            Framing::Chunks | Framing::OneChunk => {
                self.put_zeroes(missing).await?;
                let errno = NbdError::from_os(error.errno(), request.command, request.flags);
                tracing::warn!(export = %self.cell.export.name().escape_debug(), ?request, %error, "request failed");
                let to = self.reply_to(request);
                self.scratch.clear();
                let (text, last) = (error.to_string(), reply::Place::Last);
                reply::push_error_offset(&mut self.scratch, to, errno, &text, offset, last);
                self.put_scratch().await
            }
        }
    }
}

/// Where the plan's last byte of data lies.
fn last_byte<'a>(
    driver: &'a Arc<dyn BlockDriver>,
    plan: &ReadPlan,
) -> Option<(&'a Arc<dyn Storage>, HostOffset)> {
    plan.pieces.iter().rev().find_map(|piece| match piece.place {
        Place::Data { storage, at } => {
            let last = at.checked_add(piece.len.checked_sub(1)?)?;
            driver.storages().get(usize::from(storage.0)).map(|storage| (storage, last))
        }
        Place::Zero { .. } | Place::Slow(_) => None,
    })
}

/// Whether sendfile failed because of the socket rather than the file.
fn is_the_socket(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected
            | io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
    )
}
