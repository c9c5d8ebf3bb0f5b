//! Putting replies into the batch, and sending it.

use std::io;

use nbd_img_formats::{Error, ErrorKind};
use tokio::io::Interest;

use super::end::End;
use super::engine::Session;
use super::layout::{CHUNK_HEADER_LEN_MAX, Chunk, Framing, no_room, put_header};
use crate::nbd::errno::NbdError;
use crate::nbd::reply::{self, ReplyTo};
use crate::nbd::request::Request;

impl Session {
    /// Success without data.
    pub(super) async fn reply_success(&mut self, request: &Request) -> Result<(), End> {
        let head = reply::success(self.reply_to(request));
        self.put_all(&head).await
    }

    /// A failure that the driver met.
    pub(super) async fn reply_error(&mut self, request: &Request, error: &Error) -> Result<(), End> {
        // The disk has become smaller than the client was told.
        let errno = if error.kind() == ErrorKind::OutOfBounds {
            NbdError::out_of_bounds(request.command)
        } else {
            NbdError::from_os(error.errno(), request.command, request.flags)
        };
        if errno == NbdError::Eio {
            tracing::warn!(export = %self.cell.export.name().escape_debug(), ?request, %error, "request failed");
        } else {
            tracing::debug!(?request, %error, "request failed");
        }
        self.reply_failure(request, errno, &error.to_string()).await
    }

    pub(super) fn reply_to(&self, request: &Request) -> ReplyTo {
        ReplyTo::new(self.rules.form, request)
    }

    pub(super) async fn reply_failure(
        &mut self,
        request: &Request,
        errno: NbdError,
        text: &str,
    ) -> Result<(), End> {
        let to = self.reply_to(request);
        self.scratch.clear();
        reply::push_failure(&mut self.scratch, to, errno, text);
        self.put_scratch().await
    }

    /// Adds what is in `scratch` to the batch.
    pub(super) async fn put_scratch(&mut self) -> Result<(), End> {
        let scratch = std::mem::take(&mut self.scratch);
        let result = self.put_all(&scratch).await;
        self.scratch = scratch;
        result
    }

    /// Adds `bytes` to the batch, sending on the way if they do not fit.
    pub(super) async fn put_all(&mut self, bytes: &[u8]) -> Result<(), End> {
        if self.out.make_room_for(bytes.len()) && self.out.put(bytes) {
            return Ok(());
        }
        for piece in bytes.chunks(super::budget::FLOOR_LEN) {
            if !self.out.make_room_for(piece.len()) {
                self.send_all().await?;
            }
            if !self.out.make_room_for(piece.len()) || !self.out.put(piece) {
                return Err(End::Socket(io::Error::from(io::ErrorKind::OutOfMemory)));
            }
        }
        Ok(())
    }

    /// Puts what stands before a chunk into the batch, sending on the way if it does not fit.
    pub(super) async fn put_chunk_header(
        &mut self,
        to: ReplyTo,
        offset: u64,
        framing: Framing,
        last: bool,
        chunk: &Chunk,
    ) -> Result<(), End> {
        if !self.out.make_room_for(CHUNK_HEADER_LEN_MAX) {
            self.send_all().await?;
            self.out.make_room_for(CHUNK_HEADER_LEN_MAX);
        }
        if put_header(&mut self.out, to, offset, framing, last, chunk) {
            Ok(())
        } else {
            Err(End::BrokenReply(no_room()))
        }
    }

    pub(super) async fn put_zeroes(&mut self, mut len: usize) -> Result<(), End> {
        const ZEROES: [u8; 4096] = [0; 4096];
        while len > 0 {
            let piece = len.min(ZEROES.len());
            self.put_all(&ZEROES[..piece]).await?;
            len -= piece;
        }
        Ok(())
    }

    /// Sends the batch.
    pub(super) async fn send_all(&mut self) -> Result<(), End> {
        self.send_batch(false).await
    }

    /// Sends the batch; with `more` something else is sent right behind it.
    pub(super) async fn send_batch(&mut self, more: bool) -> Result<(), End> {
        while !self.out.is_empty() {
            let out = &mut self.out;
            let sent = if std::mem::replace(&mut self.has_sent, true) {
                self.socket.try_io(Interest::WRITABLE, |socket| out.send(socket, more))
            } else {
                // The event loop has yet to be told that a new socket has room.
                out.send(self.socket.get_ref(), more)
            };
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(End::Socket(error)),
            }
        }
        self.send_encrypted().await
    }

    /// Waits until the socket takes more. A client may stand still for as long as it likes (a stopped
    /// guest does), unless it does so with memory that others need.
    pub(super) async fn wait_writable(&mut self) -> Result<(), End> {
        // Who stands still with replies may as well do so in the middle of a request.
        self.stall_end = None;
        loop {
            match tokio::time::timeout(self.shard.times.stall, self.socket.writable()).await {
                Ok(ready) => return ready.map(drop).map_err(End::Socket),
                Err(_) if self.shard.budget.is_scarce() => return Err(End::Stalled),
                Err(_) => self.large_writes.rest(),
            }
        }
    }
}
