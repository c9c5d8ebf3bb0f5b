//! Large writes of a client that sends one behind the other: a worker carries them out, straight from the memory that
//! they were received into, while the session receives the next one.
//!
//! A thread hop costs more than a small request, and less than the copy of a large one: with it the copy out of the
//! socket and the copy into the page cache go on two processors. The rules (each of them measured): only requests of
//! [`GIVEN_LEN_MIN`] and more, only from a client that does not wait for the reply before it sends the next, and only
//! where processors would idle. Requests that are under way together take effect in any order, as NBD allows.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nbd_img_formats::storage::IoBuf;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, Durability, Error, ErrorKind};

use super::buffers::PAYLOAD_TAKEN_LEN_MAX;
use super::end::End;
use super::engine::Session;
use super::pending::Work;
use crate::export::DetectZeroes;
use crate::nbd::request::{CommandFlags, Request};
use crate::transport::unread::has_unreceived;

/// Smallest payload that is given to a worker: on two processors requests of 1 MiB gain a quarter at a depth of 4 and
/// half at 8, those of 512 KiB nothing at a depth of 4, and those of 256 KiB lose a tenth.
const GIVEN_LEN_MIN: u64 = 1 << 20;

/// Most writes of a session that workers carry out at a time. File systems let one write of a file at a time, so a third
/// would only stand in the way of other sessions' (four brought no more).
const GIVEN_MAX: usize = 2;

/// How long a session waits for one of these writes before it takes the disk for slow and goes on in the way of slow
/// disks, which holds nobody up (its requests behind this one, even cached reads, wait meanwhile). Our choice: several
/// times what the largest takes where it does not wait.
const WAIT_TIME_MAX: Duration = Duration::from_millis(10);

/// Sessions of the process that give large writes to workers.
static STREAMING: AtomicUsize = AtomicUsize::new(0);

/// Counts a session among those that write large requests until it is dropped.
pub struct Streaming(());

impl Streaming {
    fn begin() -> Self {
        STREAMING.fetch_add(1, Ordering::Relaxed);
        Streaming(())
    }

    /// Whether each session that gives writes to workers has two processors to itself; for one that is among them.
    fn has_room(among: bool) -> bool {
        static STREAMING_MAX: OnceLock<usize> = OnceLock::new();
        let streaming_max = *STREAMING_MAX
            .get_or_init(|| std::thread::available_parallelism().map_or(0, |cores| cores.get() / 2));
        STREAMING.load(Ordering::Relaxed) - usize::from(among) < streaming_max
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        STREAMING.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Session {
    /// Whether the write at the head of the input is one to be received for a worker.
    pub(super) fn is_for_worker(&mut self, request: &Request) -> bool {
        let export = &self.cell.export;
        if !(GIVEN_LEN_MIN..=PAYLOAD_TAKEN_LEN_MAX as u64).contains(&request.len)
            || export.durability(request.flags.contains(CommandFlags::FUA)) != Durability::Later
            || export.detect_zeroes() != DetectZeroes::Off
            // Its bytes are copied when they are decrypted, as they come.
            || self.socket.get_ref().tls().is_some()
            || !self.writes_in_place()
        {
            if self.streaming.is_some() && self.input.payload_count() == 0 {
                self.end_streaming();
            }
            return false;
        }
        Streaming::has_room(self.streaming.is_some())
    }

    /// Gives the write whose payload is at the head of the input to a worker, if that is of use; returns whether it
    /// did.
    pub(super) async fn give_to_worker(&mut self, request: &Request) -> Result<bool, End> {
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        let is_followed = self.input.len() > len || has_unreceived(self.socket.get_ref());
        if self.input.payload_count() == 0 && !is_followed {
            return Ok(false);
        }
        self.streaming.get_or_insert_with(Streaming::begin);
        if !self.wait_for_a_worker().await? {
            self.shard.watch.note_slow();
            return Ok(false);
        }
        // An error is told where the request is served in the usual way.
        let Ok(range) = self.cell.export.range(request.offset, request.len) else { return Ok(false) };
        let Some(payload) = self.input.take_payload(len) else { return Ok(false) };
        // The memory is leased with the input, so the request holds none of its own.
        let token = self.insert_call(*request, Work::Call, 0, None);
        let at = range.offset();
        let write = move |driver: &Arc<dyn BlockDriver>, _: &mut IoBuf| {
            if payload.bytes().len() != len {
                return Err(lost());
            }
            driver.pwrite(at, payload.bytes(), Durability::Later).map(|()| len)
        };
        self.shard.call_or_run(&self.cell.export, Lane::Write, token, IoBuf::default(), write);
        Ok(true)
    }

    /// Waits until less than [`GIVEN_MAX`] writes are under way. To write here meanwhile would be to wait for the workers
    /// at the file's lock. Returns whether it was so in time.
    async fn wait_for_a_worker(&mut self) -> Result<bool, End> {
        let end = tokio::time::Instant::now() + WAIT_TIME_MAX;
        while self.input.payload_count() >= GIVEN_MAX && !self.cell.pending.borrow().is_empty() {
            self.answer_ready().await?;
            self.send_all().await?;
            if self.input.payload_count() >= GIVEN_MAX
                && tokio::time::timeout_at(end, self.cell.wake.notified()).await.is_err()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The session writes no large requests for now.
    pub(super) fn end_streaming(&mut self) {
        self.streaming = None;
        self.input.forget_payloads();
    }
}

/// A defect of the session, which is not to be taken for a write.
fn lost() -> Error {
    Error::new(ErrorKind::Io, "a payload was lost on its way to a worker; this is a defect of the server")
}
