//! Large writes of a client that sends several at a time: a worker carries them out, straight from the memory that they
//! were received into, while the session receives the next ones.
//!
//! With it the copy out of the socket and the copy into the page cache go on two processors. What a hop to another thread
//! costs is paid for once as long as the worker has something to do, for the session's writes are a [`Sequence`]: one worker
//! has them all, one after the other (file systems let one write of a file at a time anyway; a hop for each made
//! requests of 64 and 256 KiB slower than none). Whether it pays depends on how many requests a client keeps under way and
//! on what it does with the processors itself, so each session [tries](Ways). Requests that are under way together take
//! effect in any order, as NBD allows.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::InPlace;
use nbd_img_formats::workers::{Lane, Sequence};
use nbd_img_formats::{BlockDriver, Durability, Error, ErrorKind, WritePlan};

use super::buffers::PAYLOAD_TAKEN_LEN_MAX;
use super::end::End;
use super::engine::Session;
use super::pending::Work;
use super::ways::{Rule, Ways};
use super::write::{has_slow, write_pieces};
use crate::export::DetectZeroes;
use crate::nbd::request::{CommandFlags, Request};
use crate::transport::unread::has_unreceived;

/// Smallest payload that is given to a worker: requests of 32 KiB gain up to a fifth, smaller ones cost less than to hand
/// them on.
const GIVEN_LEN_MIN: u64 = 32 << 10;

/// It takes a tenth more of the processors' time, which somebody else may want, so it has to gain a sixth. The windows are
/// short and several, for a worker that has to be waked again and again in one may be at work all the time in the next. Our
/// choice.
const GIVING: Rule = Rule {
    name: "large writes are faster by a worker",
    gain: 6,
    before_first_len: 16 << 20,
    window_len: 6 << 20,
    settle_len: 2 << 20,
    pairs: 4,
    // The first memory that is given away is new, and costs a page fault for every 4 KiB.
    clear_pairs: 2,
};

/// Most writes of a session that wait for its worker or are carried out: with four the worker had to wait for the session.
const GIVEN_MAX: usize = 8;

/// Most bytes of them, if they are more than two and all as long as the last: what is in a core's own cache when it is
/// written costs less.
const GIVEN_LEN_MAX: usize = 2 << 20;

/// Writes for which a client that sent one before the one in front of it was answered is taken to do so again: at the
/// moment when a write is there nothing of the next may be. Our choice.
const TRUST: u32 = 16;

/// How long a session waits for one of these writes before it takes the disk for slow and goes on in the way of slow
/// disks, which holds nobody up (its requests behind this one, even cached reads, wait meanwhile). Our choice: several
/// times what the largest takes where it does not wait.
const WAIT_TIME_MAX: Duration = Duration::from_millis(10);

/// How long a session that has written nothing large still counts among those that do, and until it sleeps for long if it does
/// nothing at all. Our choice: longer than the pauses of clients that go on.
const STREAMING_TIME: Duration = Duration::from_millis(100);

/// Sessions of the process that write large requests.
static STREAMING: AtomicUsize = AtomicUsize::new(0);

/// What a session knows of its large writes.
pub(super) struct LargeWrites {
    giving: Ways,
    writes: Option<Arc<Sequence>>,
    /// So many writes are given to a worker that has nothing to do although nothing may have come behind them.
    trust: u32,
    /// When the last was begun to be served, if there may be memory left of it.
    last: Option<Instant>,
    streaming: Option<Streaming>,
}

/// Counts a session among those that write large requests until it is dropped.
struct Streaming(());

impl LargeWrites {
    pub(super) fn new() -> Self {
        LargeWrites { giving: Ways::new(&GIVING), writes: None, trust: 0, last: None, streaming: None }
    }

    /// Whether the session's large writes go to a worker now, as far as can be told before one is there.
    pub(super) fn are_given(&self) -> bool {
        self.giving.is_on_other() && self.streaming.is_some() && has_room()
    }

    /// Whether the next one does, of `len` bytes, which is about to be served at `now`.
    fn is_given(&mut self, len: u64, now: Instant) -> bool {
        let goes_on = self.last.is_some() && !self.are_over(now);
        self.last = Some(now);
        // One now and then keeps no processor busy.
        if goes_on && self.streaming.is_none() {
            self.streaming = Some(Streaming::begin());
        }
        self.giving.takes_other(len, self.streaming.is_some() && has_room(), now)
    }

    /// Whether a client that has had several requests under way is taken to have so still.
    fn trusts(&mut self) -> bool {
        let trusts = self.trust > 0;
        self.trust = self.trust.saturating_sub(1);
        trusts
    }

    /// The session is none of those that write large requests, for now.
    pub(super) fn rest(&mut self) {
        self.streaming = None;
    }

    /// Whether the last was long ago.
    fn are_over(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) > STREAMING_TIME)
    }
}

impl Streaming {
    fn begin() -> Self {
        STREAMING.fetch_add(1, Ordering::Relaxed);
        Streaming(())
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        STREAMING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether each session that writes large requests has two processors to itself. Otherwise all of them are busy
/// without any worker.
fn has_room() -> bool {
    static STREAMING_MAX: OnceLock<usize> = OnceLock::new();
    let streaming_max = *STREAMING_MAX
        .get_or_init(|| std::thread::available_parallelism().map_or(0, |cores| cores.get() / 2));
    STREAMING.load(Ordering::Relaxed) <= streaming_max
}

impl Session {
    /// Whether the write at the head of the input is one that a worker could carry out.
    pub(super) fn is_for_worker(&self, request: &Request) -> bool {
        let export = &self.cell.export;
        (GIVEN_LEN_MIN..=PAYLOAD_TAKEN_LEN_MAX as u64).contains(&request.len)
            && export.durability(request.flags.contains(CommandFlags::FUA)) == Durability::Later
            && export.detect_zeroes() == DetectZeroes::Off
            // Its bytes are copied when they are decrypted, as they come.
            && self.socket.get_ref().tls().is_none()
            && self.writes_in_place()
    }

    /// Gives the write whose payload is at the head of the input to a worker, if that is of use; returns whether it
    /// did. What it did not is served in the usual way, which tells of errors, too.
    pub(super) async fn give_to_worker(&mut self, request: &Request) -> Result<bool, End> {
        let Some(writes) = self.worker_for(request) else { return Ok(false) };
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        if !self.input.can_take(len) {
            return Ok(false);
        }
        if !self.wait_for_the_worker(len).await? {
            self.shard.watch.note_slow();
            return Ok(false);
        }
        let Some(planned) = self.plan_for_worker(request) else { return Ok(false) };
        let Some(payload) = self.input.take_payload(len, self.rules.form.request_header_len()) else {
            return Ok(false);
        };
        // The memory is leased with the input, so the request holds none of its own.
        let token = self.insert_call(*request, Work::Call, 0, None);
        let watch = match self.cell.export.in_place().writes {
            InPlace::Ask => Some(Arc::clone(&self.shard.watch)),
            InPlace::Always | InPlace::Never => None,
        };
        self.shard.call_in_turn(&writes, token, move || {
            if payload.bytes().len() != len {
                return Err(lost());
            }
            let write = || planned.write(payload.bytes()).map(|()| len);
            match watch {
                // Others of the file's writers may be waited for.
                Some(watch) => watch.observe(len as u64, true, write),
                None => write(),
            }
        });
        Ok(true)
    }

    /// Where the write at the head of the input goes, if it waits for nothing but the storage: who waits for another
    /// request's work, or for a copy, would hold up all behind it.
    fn plan_for_worker(&mut self, request: &Request) -> Option<Planned> {
        let range = self.cell.export.range(request.offset, request.len).ok()?;
        let driver = Arc::clone(self.cell.export.driver());
        driver.prepare_write(range, MapMode::Try, &mut self.write_plan).ok()?;
        let planned = Planned { driver, plan: std::mem::take(&mut self.write_plan), is_finished: false };
        (!has_slow(&planned.plan)).then_some(planned)
    }

    /// Where the write at the head of the input, which is there as a whole, is to be carried out, if not here.
    fn worker_for(&mut self, request: &Request) -> Option<Arc<Sequence>> {
        let is_given = self.large_writes.is_given(request.len, Instant::now());
        let is_idle = self.input.payload_count() == 0;
        if is_idle && self.large_writes.giving.has_left_other() {
            self.input.forget_payloads();
        }
        if !is_idle {
            self.large_writes.trust = TRUST;
        }
        // A client that waits for this reply would wait for a thread, too.
        if !is_given || is_idle && !self.large_writes.trusts() && !self.is_followed(request) {
            return None;
        }
        let workers = self.shard.workers();
        let writes =
            self.large_writes.writes.get_or_insert_with(|| Sequence::new(workers, Lane::StorageWrite));
        Some(Arc::clone(writes))
    }

    /// The write at the head of the input, which a worker could have had, has been served without one; its reply has not been
    /// sent if it was written here.
    pub(super) fn note_written_here(&mut self, request: &Request) {
        if self.large_writes.are_given() && self.is_followed(request) {
            self.large_writes.trust = TRUST;
        }
    }

    /// Whether anything has come behind the write at the head.
    fn is_followed(&self, request: &Request) -> bool {
        self.input.len() as u64 > request.len || has_unreceived(self.socket.get_ref())
    }

    /// Waits until the worker has room for one more write, of `len` bytes. To write here meanwhile would be to wait for it at
    /// the file's lock. Returns whether it was so in time.
    async fn wait_for_the_worker(&mut self, len: usize) -> Result<bool, End> {
        let given_max = (GIVEN_LEN_MAX / len.max(1)).clamp(2, GIVEN_MAX);
        let end = tokio::time::Instant::now() + WAIT_TIME_MAX;
        while self.input.payload_count() >= given_max && !self.cell.pending.borrow().is_empty() {
            self.answer_ready().await?;
            self.send_all().await?;
            if self.input.payload_count() >= given_max
                && tokio::time::timeout_at(end, self.cell.wake.notified()).await.is_err()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// At the beginning of a turn: a session that writes nothing large any more keeps neither memory for it nor others from
    /// having workers.
    pub(super) fn end_large_writes(&mut self, now: Instant) {
        if self.large_writes.are_over(now) && self.input.payload_count() == 0 {
            self.large_writes.rest();
            self.large_writes.last = None;
            self.input.forget_payloads();
        }
    }
}

/// A planned write, which is finished whatever becomes of it.
struct Planned {
    driver: Arc<dyn BlockDriver>,
    plan: WritePlan,
    is_finished: bool,
}

impl Planned {
    fn write(mut self, payload: &[u8]) -> nbd_img_formats::Result<()> {
        let written = write_pieces(&self.driver, &self.plan, payload);
        self.is_finished = true;
        let finished = self.driver.finish_write(&mut self.plan, written.is_ok());
        written.and(finished)
    }
}

impl Drop for Planned {
    fn drop(&mut self) {
        if !self.is_finished {
            // Nothing was written, so the old bytes are what the guest goes on seeing; or somebody panicked.
            let _ = self.driver.finish_write(&mut self.plan, false);
        }
    }
}

/// A defect of the session, which is not to be taken for a write.
fn lost() -> Error {
    Error::new(ErrorKind::Io, "a payload was lost on its way to a worker; this is a defect of the server")
}
