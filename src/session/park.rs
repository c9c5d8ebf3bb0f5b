//! What a session does between two batches: leave its socket alone for a moment, look at it a little
//! longer, or sleep until something comes.
//!
//! The rules of the first two are in [`linger`](super::linger) and [`poll`](super::poll).

use std::io;
use std::time::{Duration, Instant};

use super::end::End;
use super::engine::{Needs, Session};
use super::linger::REPLY_LEN_MAX;
use crate::transport::unread::has_unread;

impl Session {
    /// How long to leave the socket alone behind the replies that are about to be sent: never where
    /// somebody else could want this thread meanwhile.
    pub(super) fn linger_time(&mut self, now: Instant) -> Duration {
        let sent = std::mem::take(&mut self.unsent);
        let small = self.out.len() <= sent as usize * REPLY_LEN_MAX;
        if self.out.is_empty()
            || !small
            || !self.cell.pending.borrow().is_empty()
            || !self.shard.activity.is_quiet(now)
            || !self.linger.asks()
        {
            return Duration::ZERO;
        }
        // A socket that cannot tell fails when it is used next.
        let unread = has_unread(self.socket.get_ref()).unwrap_or(false);
        self.linger.time_after(unread)
    }

    pub(super) async fn park(&mut self, needs: Needs) -> Result<(), End> {
        if !self.input.is_empty() || self.refused.is_some() {
            return self.park_unfinished(needs).await;
        }
        let batch = std::mem::take(&mut self.batch);
        let begin = self.poller.is_on().then(Instant::now);
        if needs == Needs::Input && self.poll_socket(batch, begin)? {
            return Ok(());
        }
        if self.shard.budget.is_scarce() {
            self.input.forget_payloads();
        }
        self.note_memory();
        loop {
            tokio::select! {
                biased;
                ready = self.socket.readable(), if needs == Needs::Input => {
                    drop(ready.map_err(End::Socket)?);
                    break;
                }
                () = self.cell.wake.notified() => {}
            }
            if self.shard.is_draining() || !self.cell.ready.borrow().is_empty() {
                break;
            }
            // It was the sweep. To go through a turn for it would take a new buffer and ask for the next one.
            self.release_if_idle();
        }
        if let Some(begin) = begin {
            self.poller.note_gap(begin.elapsed());
        }
        Ok(())
    }

    /// Looks at the socket for a little while, if that is likely to pay; returns whether something came.
    fn poll_socket(&mut self, batch: u32, begin: Option<Instant>) -> Result<bool, End> {
        let Some(begin) = begin else { return Ok(false) };
        // Answers of pending requests come by the shard's loop, which stands still meanwhile. A client that
        // had replies to read when it was looked at last will not send sooner because it is watched.
        let alone = self.cell.pending.borrow().is_empty()
            && self.shard.activity.is_quiet(begin)
            && !self.linger.is_on();
        let Some(poll) = self.poller.start(batch, alone) else { return Ok(false) };
        loop {
            match self.input.receive(self.socket.get_ref()) {
                Ok(0) => return Err(End::Eof),
                Ok(_) => {
                    self.poller.note_poll(true);
                    self.poller.note_gap(begin.elapsed());
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(End::Socket(error)),
            }
            if poll.is_over() {
                self.poller.note_poll(false);
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// Parks in the middle of a request: it may not stand still for ever.
    async fn park_unfinished(&mut self, needs: Needs) -> Result<(), End> {
        if needs != Needs::Input {
            // Not the client is waited for.
            self.stall_end = None;
            self.cell.wake.notified().await;
            return Ok(());
        }
        let stall_end = self.stall_end();
        tokio::select! {
            biased;
            ready = self.socket.readable() => drop(ready.map_err(End::Socket)?),
            () = self.cell.wake.notified() => {}
            () = tokio::time::sleep_until(stall_end) => return Err(End::Stalled),
        }
        Ok(())
    }

    /// Until when more of the unfinished request has to come. What wakes the session in between changes nothing.
    pub(super) fn stall_end(&mut self) -> tokio::time::Instant {
        let stall = self.shard.times.stall;
        (*self.stall_end.get_or_insert_with(|| Instant::now() + stall)).into()
    }

    fn release_if_idle(&mut self) {
        if self.cell.idle.get() && self.cell.pending.borrow().is_empty() {
            self.large_writes.rest();
            self.input.release();
            self.out.release();
            self.scratch = Vec::new();
            self.read_plan.release();
            self.write_plan.release();
            self.cell.holds_memory.set(false);
        }
    }

    /// Has the sweep look at this session if there is anything to give back.
    fn note_memory(&self) {
        if self.input.has_memory()
            || self.out.has_memory()
            || self.scratch.capacity() > 0
            || self.read_plan.has_memory()
            || self.write_plan.has_memory()
        {
            self.cell.holds_memory.set(true);
            self.shard.want_sweep();
        }
    }
}
