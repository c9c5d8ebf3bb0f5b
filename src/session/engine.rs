//! One session: receive what the socket holds, work on every whole request in it, send the replies of
//! the batch together, park.
//!
//! A request is served right here unless it would have to wait; then it becomes pending, and the session
//! goes on with the next. Only sending, receiving and the streaming of very large requests are awaited.

use std::io;
use std::rc::Rc;
use std::time::Instant;

use nbd_img_formats::{ReadPlan, WritePlan};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::ahead::Ahead;
use super::buffers::InBuf;
use super::end::End;
use super::large_writes::LargeWrites;
use super::linger::Linger;
use super::pending::{Arrival, PENDING_MAX, Pending, Work};
use super::poll::Poller;
use super::refuse::{Refused, shutdown};
use super::replies::OutBuf;
use super::shard::{SessionCell, Shard};
use super::shards::Connection;
use super::uncopied::Uncopied;
use super::warm::Warm;
use crate::export::PAYLOAD_LEN_MAX;
use crate::nbd::negotiate::AgreedContext;
use crate::nbd::request::{Command, Parsed, Request, SessionRules, check, parse};
use crate::transport::Stream;
use crate::transport::registration::watch_stream;

/// Receives in a row before the shard's other sessions get their turn. Our choice: a few batches, so
/// that a busy connection costs the others little and itself next to nothing.
const QUANTUM: u32 = 8;

/// Bytes that a session may move within a batch before the shard's other sessions get their turn: below
/// a millisecond of copying. Our choice.
const TURN_LEN: u64 = 4 << 20;

/// What a request counts beside its bytes: one takes as long as so many are copied.
const REQUEST_COST: u64 = 8 << 10;

/// Send buffer of a Unix socket: a whole batch goes without waiting (prototype).
const UNIX_SEND_BUFFER_LEN: usize = 4 << 20;

/// What a session has to have before it can go on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// More bytes from the client.
    Input,
    /// The end of a pending request.
    Answer,
}

/// The state of one connection's session.
pub struct Session {
    pub(super) shard: Rc<Shard>,
    pub(super) cell: Rc<SessionCell>,
    pub(super) socket: AsyncFd<Stream>,
    pub(super) rules: SessionRules,
    pub(super) contexts: Vec<AgreedContext>,
    pub(super) input: InBuf,
    pub(super) out: OutBuf,
    pub(super) scratch: Vec<u8>,
    pub(super) read_plan: ReadPlan,
    pub(super) write_plan: WritePlan,
    pub(super) poller: Poller,
    pub(super) linger: Linger,
    pub(super) ahead: Ahead,
    pub(super) uncopied: Uncopied,
    pub(super) large_writes: LargeWrites,
    /// Reads whose bytes have come into memory.
    arrived: Vec<(Request, Arrival)>,
    /// Requests since the last park.
    pub(super) batch: u32,
    /// Requests since the last time the session sent.
    pub(super) unsent: u32,
    /// Bytes and requests worked on since others had their turn.
    worked_len: u64,
    pub(super) refused: Option<Refused>,
    /// Until when more of an unfinished request has to come, as long as that is waited for.
    pub(super) stall_end: Option<Instant>,
    ending: Option<End>,
    pub(super) has_sent: bool,
    /// The server drains, and what was in the socket has been received.
    last_call: bool,
}

impl Session {
    /// Serves the connection until it ends.
    pub async fn serve(shard: Rc<Shard>, connection: Connection) {
        let Connection { stream, export, served, agreed, leftover, peer, permit } = connection;
        if stream.is_unix() {
            // A smaller buffer only costs speed.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&stream, UNIX_SEND_BUFFER_LEN);
        }
        let encrypted = stream.tls().is_some();
        let socket = match watch_stream(stream) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%peer, %error, "a connection could not be served");
                return;
            }
        };
        let cell = shard.add_session(export, served);
        let mut session = Session {
            input: InBuf::new(std::sync::Arc::clone(&shard.budget), leftover),
            out: OutBuf::new(std::sync::Arc::clone(&shard.budget), encrypted),
            rules: SessionRules::new(&agreed),
            contexts: agreed.contexts,
            scratch: Vec::new(),
            read_plan: ReadPlan::default(),
            write_plan: WritePlan::default(),
            poller: Poller::new(shard.times.poll),
            linger: Linger::default(),
            ahead: Ahead::default(),
            uncopied: Uncopied::new(),
            large_writes: LargeWrites::new(),
            arrived: Vec::new(),
            batch: 0,
            unsent: 0,
            worked_len: 0,
            refused: None,
            stall_end: None,
            ending: None,
            has_sent: false,
            last_call: false,
            shard,
            cell,
            socket,
        };
        let end = session.run().await;
        session.cell.gone.set(true);
        session.cell.ready.borrow_mut().clear();
        if let Some(tls) = session.socket.get_ref().tls() {
            tls.say_goodbye();
        }
        if end.is_the_servers() {
            session.see_replies_off().await;
        }
        end.log(session.cell.export.name(), &peer);
        drop(session);
        drop(permit);
    }

    async fn run(&mut self) -> End {
        let mut quantum = QUANTUM;
        loop {
            let went = match self.turn().await {
                Ok(Some(needs)) => self.park(needs).await,
                Ok(None) => Ok(()),
                Err(end) => Err(end),
            };
            match went {
                Ok(()) => {}
                Err(End::Eof) => {
                    // A client that has gone altogether is told nothing, and that it has gone is why.
                    let _ = self.answer_the_rest().await;
                    return End::Eof;
                }
                Err(end) => return end,
            }
            quantum -= 1;
            if quantum == 0 {
                quantum = QUANTUM;
                tokio::task::yield_now().await;
            }
        }
    }

    /// One round: answers, requests, sending, receiving. Returns what to wait for if nothing came.
    async fn turn(&mut self) -> Result<Option<Needs>, End> {
        self.cell.idle.set(false);
        let now = Instant::now();
        self.shard.activity.note(self.cell.id, now);
        self.end_large_writes(now);
        self.answer_ready().await?;
        let needs = match self.work().await {
            Ok(needs) => needs,
            Err(end) => {
                // What was answered before the end still reaches the client if it can.
                self.send_all().await?;
                return Err(end);
            }
        };
        // The disk begins before the client is woken.
        self.shard.submit_held();
        let linger = self.linger_time(now);
        self.send_all().await?;
        if self.has_answers() {
            return Ok(None);
        }
        if !linger.is_zero() {
            std::thread::sleep(linger);
        }
        if self.shard.is_draining() && self.ending.is_none() && needs == Needs::Input {
            // What the socket holds was sent before the client could know; one more buffer of it.
            self.input.receive_anything();
            if !std::mem::replace(&mut self.last_call, true) && self.receive()? > 0 {
                return Ok(None);
            }
            self.ending = Some(End::Drained);
        }
        if self.ending.is_some() {
            if self.cell.pending.borrow().is_empty() {
                return Err(self.ending.take().unwrap_or(End::Drained));
            }
            if needs == Needs::Answer {
                return Ok(Some(needs));
            }
        }
        if needs == Needs::Input && self.receive()? > 0 {
            return Ok(None);
        }
        Ok(Some(needs))
    }

    /// Works on the requests that are wholly there.
    async fn work(&mut self) -> Result<Needs, End> {
        loop {
            // While a request waits for room in the budget, what earlier ones waited for arrives.
            if !self.arrived.is_empty() {
                self.answer_arrived().await?;
            }
            if self.refused.is_some() && !self.read_off_refused().await? {
                return Ok(Needs::Input);
            }
            if self.ending.as_ref().is_some_and(|end| !end.answers_requests()) {
                return Ok(Needs::Answer);
            }
            if self.cell.pending.borrow().len() >= PENDING_MAX {
                return Ok(Needs::Answer);
            }
            let request = match parse(self.input.bytes(), self.rules.form) {
                Parsed::NeedMore => return Ok(Needs::Input),
                Parsed::BadMagic => return Err(End::BadMagic),
                Parsed::Request(request) => request,
            };
            if request.command == Command::Disconnect && self.ending.is_some() {
                self.ending = Some(End::Disconnect);
                return Ok(Needs::Answer);
            }
            let verdict =
                if self.ending.is_some() { Err(shutdown(&request)) } else { check(&request, &self.rules) };
            match verdict {
                Err(reject) => self.refuse(request, reject)?,
                Ok(()) => {
                    self.batch = self.batch.saturating_add(1);
                    self.unsent = self.unsent.saturating_add(1);
                    match self.serve_warm(&request) {
                        Warm::Served => {}
                        Warm::Other => {
                            if !self.start(request).await? {
                                return Ok(Needs::Input);
                            }
                        }
                        Warm::Begun(rest) => self.serve_rest(request, rest).await?,
                    }
                }
            }
            if self.ends_turn(request.len) {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Counts a request of `len` bytes; whether the shard's other sessions are to have their turn now. One buffer holds
    /// 150,000 requests.
    fn ends_turn(&mut self, len: u64) -> bool {
        let cost = len.min(u64::from(PAYLOAD_LEN_MAX)) + REQUEST_COST;
        self.worked_len += cost;
        let has = self.worked_len >= TURN_LEN;
        if has {
            self.worked_len = 0;
        }
        has
    }

    /// Starts a request that was found in order; returns whether it could (one may need its payload).
    async fn start(&mut self, request: Request) -> Result<bool, End> {
        if request.command == Command::Write {
            return self.start_write(request).await;
        }
        if request.command == Command::BlockStatus && request.payload_len > 0 {
            return self.start_picked_status(request).await;
        }
        self.input.consume(self.rules.form.request_header_len());
        match request.command {
            Command::Read => self.start_read(request).await?,
            Command::Disconnect => self.ending = Some(End::Disconnect),
            Command::Flush => self.start_flush(request),
            Command::Trim => self.start_trim(request).await?,
            Command::Cache => self.start_cache(request).await?,
            Command::WriteZeroes => self.start_write_zeroes(request).await?,
            Command::BlockStatus => self.start_block_status(request, None).await?,
            // `check` has refused unknown commands and `start_write` has the writes.
            Command::Unknown(_) | Command::Write => {}
        }
        Ok(true)
    }

    /// Writes the replies of all requests that have ended.
    pub(super) async fn answer_ready(&mut self) -> Result<(), End> {
        loop {
            let Some(done) = self.cell.ready.borrow_mut().pop_front() else { return Ok(()) };
            let Pending { request, work, error, lease, .. } = done;
            match (error, work) {
                (_, Work::Arrival(what)) => self.arrived.push((request, what)),
                (Some(error), _) => self.reply_error(&request, &error).await?,
                (None, Work::Read { parts, .. }) => self.reply_parts(&request, &parts).await?,
                (None, Work::Status { answers }) => {
                    let answers = std::mem::take(&mut *answers.lock());
                    self.reply_status(&request, answers).await?;
                }
                (None, Work::Write { .. } | Work::Call) => self.reply_success(&request).await?,
            }
            drop(lease);
        }
    }

    /// Serves the reads for which something has arrived anew, which may have them wait once more.
    async fn answer_arrived(&mut self) -> Result<(), End> {
        for (request, what) in std::mem::take(&mut self.arrived) {
            self.read_arrived(request, what).await?;
            if self.ends_turn(request.len) {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Answers what is still worked on, for a client that only sends no more.
    async fn answer_the_rest(&mut self) -> Result<(), End> {
        loop {
            self.answer_ready().await?;
            self.answer_arrived().await?;
            self.shard.submit_held();
            self.send_all().await?;
            if self.socket.get_ref().has_hung_up() {
                return Ok(());
            }
            if self.has_answers() {
                // It may have come while another read waited for memory.
                tokio::task::yield_now().await;
                continue;
            }
            if self.cell.pending.borrow().is_empty() {
                return Ok(());
            }
            self.cell.wake.notified().await;
        }
    }

    /// Whether something has ended, or arrived, that the client has no reply for.
    fn has_answers(&self) -> bool {
        !self.cell.ready.borrow().is_empty() || !self.arrived.is_empty()
    }

    /// Receives once; 0 means that nothing is there now.
    pub(super) fn receive(&mut self) -> Result<usize, End> {
        let got = self.try_receive()?;
        if got > 0 {
            self.stall_end = None;
        }
        Ok(got)
    }

    fn try_receive(&mut self) -> Result<usize, End> {
        if let Some(received) = self.receive_decrypted() {
            return received;
        }
        loop {
            let input = &mut self.input;
            match self.socket.try_io(Interest::READABLE, |socket| input.receive(socket)) {
                Ok(0) => return Err(End::Eof),
                Ok(got) => return Ok(got),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(End::Socket(error)),
            }
        }
    }

    /// Receives at least one byte, waiting for it; for requests that are streamed. Others are answered
    /// meanwhile.
    pub(super) async fn receive_more(&mut self) -> Result<(), End> {
        while self.receive()? == 0 {
            self.answer_ready().await?;
            self.answer_arrived().await?;
            self.send_all().await?;
            if self.has_answers() {
                continue;
            }
            let stall_end = self.stall_end();
            tokio::select! {
                biased;
                ready = self.socket.readable() => drop(ready.map_err(End::Socket)?),
                () = self.cell.wake.notified() => {}
                () = tokio::time::sleep_until(stall_end) => return Err(End::Stalled),
            }
        }
        Ok(())
    }
}
