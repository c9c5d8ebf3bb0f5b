//! A session's two buffers: what has come from the socket, and what goes out with the next send.
//!
//! Both grow while the session is busy, with leases from the budget for all beyond a small start, and
//! are given back when it has been idle. Neither is ever zeroed as a whole: the kernel provides the
//! pages. They parse nothing.

use std::io;
use std::sync::Arc;

use super::budget::{Budget, FLOOR_LEN, Lease};
use super::payload::{Memory, Payload, Spares};
use crate::transport::Stream;

/// First size of the receive buffer: holds some 2,000 read requests or a full 32 KiB write with more
/// behind it. Our choice.
const IN_LEN_START: usize = 64 << 10;

/// Largest receive buffer (the prototype gained nothing beyond it).
const IN_LEN_MAX: usize = 4 << 20;

/// First size of the send buffer. Our choice.
const OUT_LEN_START: usize = 64 << 10;

/// Largest batch that leaves in one send (larger ones gained nothing in the prototype).
pub const OUT_LEN_MAX: usize = 2 << 20;

/// A batch that is to be encrypted takes no more replies once it holds so much: then it, its records and what the
/// socket makes of them are still in a core's own cache when they are wanted again. Our choice: the usual large read,
/// which then goes alone (against batches of 2 MiB it saved 5 to 8 % of the processor's time per byte).
const SEALED_BATCH_LEN: usize = 256 << 10;

/// Most bytes behind a payload that are moved when it is taken: a small part of what moving the payload itself
/// would cost. Our choice.
const MOVED_LEN_MAX: usize = 64 << 10;

/// A payload's header is received with it.
const HEADER_LEN_MAX: usize = 32;

/// Longest payload that can be taken.
pub const PAYLOAD_TAKEN_LEN_MAX: usize = IN_LEN_MAX - HEADER_LEN_MAX;

/// Bytes from the socket that have not been worked on yet.
pub struct InBuf {
    budget: Arc<Budget>,
    bytes: Vec<u8>,
    start: usize,
    lease: Option<Lease>,
    /// So many bytes are to wait here, no more: the request that they are is to be taken out.
    limit: Option<usize>,
    spares: Arc<Spares>,
}

impl InBuf {
    /// A buffer that begins with `leftover`, bytes that were received before.
    pub fn new(budget: Arc<Budget>, leftover: Vec<u8>) -> Self {
        InBuf { budget, bytes: leftover, start: 0, lease: None, limit: None, spares: Arc::default() }
    }

    /// The bytes that wait.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Number of bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the first `len` waiting bytes, or all if there are fewer.
    pub fn consume(&mut self, len: usize) {
        self.limit = None;
        self.start = self.start.saturating_add(len).min(self.bytes.len());
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Whether `len` bytes can wait here at once, growing as far as the budget allows.
    pub fn make_room_for(&mut self, len: usize) -> bool {
        if self.bytes.capacity() - self.start >= len {
            return true;
        }
        self.move_to_front();
        if self.bytes.capacity() < len && len <= IN_LEN_MAX {
            self.grow(len.next_power_of_two().max(IN_LEN_START));
        }
        self.bytes.capacity() >= len
    }

    /// Prepares for [`take_payload`](Self::take_payload) of the request at the head, `len` bytes of which some have not
    /// come yet: until they have, nothing is received behind them, so that it need not be moved then. Returns whether
    /// there is memory for that.
    pub fn prepare_for(&mut self, len: usize) -> bool {
        if self.lease.is_none() || self.bytes.capacity() < len {
            let Some(mut memory) = self.other_memory(len) else { return false };
            memory.bytes.extend_from_slice(self.bytes());
            self.replace(memory);
        } else if self.bytes.capacity() - self.start < len {
            self.move_to_front();
        }
        self.limit = Some(len);
        true
    }

    /// Takes the first `len` waiting bytes out with the memory that they are in, if there is other memory for what
    /// comes next.
    pub fn take_payload(&mut self, len: usize) -> Option<Payload> {
        let behind = self.len().checked_sub(len).filter(|behind| *behind <= MOVED_LEN_MAX)?;
        self.lease.as_ref()?;
        let mut other = self.other_memory(len + HEADER_LEN_MAX)?;
        let (start, end) = (self.start, self.start + len);
        other.bytes.extend_from_slice(self.bytes.get(end..end + behind)?);
        let memory = self.replace(other);
        // What comes next may be another one. More than this behind its header would have to be moved.
        self.limit = Some(MOVED_LEN_MAX);
        Some(Payload::new(memory, start..end, &self.spares))
    }

    /// Payloads that were taken and have not come back.
    pub fn payload_count(&self) -> usize {
        Arc::weak_count(&self.spares)
    }

    /// Receives what the socket holds, once. `Ok(0)` is the end of the stream.
    pub fn receive(&mut self, socket: &Stream) -> io::Result<usize> {
        if let Some(lacking) = self.limit.and_then(|limit| limit.checked_sub(self.len()))
            && lacking > 0
        {
            return socket.receive_at_most(&mut self.bytes, lacking);
        }
        if self.bytes.capacity() - self.bytes.len() < IN_LEN_START / 4 {
            self.move_to_front();
            if self.bytes.capacity() - self.bytes.len() < IN_LEN_START / 4 {
                self.grow((self.bytes.capacity() * 2).clamp(IN_LEN_START, IN_LEN_MAX));
            }
        }
        let room = self.bytes.capacity() - self.bytes.len();
        if room == 0 {
            // A read of no bytes would look like the end of the stream.
            return Err(io::Error::other("the receive buffer is full of an unfinished request"));
        }
        let got = socket.receive(&mut self.bytes)?;
        if got == room && self.bytes.capacity() < IN_LEN_MAX {
            // The socket held more than fits: the session is busy enough for a larger buffer.
            self.grow((self.bytes.capacity() * 4).min(IN_LEN_MAX));
        }
        Ok(got)
    }

    /// From now on everything that has come is received.
    pub fn receive_anything(&mut self) {
        self.limit = None;
    }

    /// Whether there is anything to give back.
    pub fn has_memory(&self) -> bool {
        self.bytes.capacity() > 0
    }

    /// Gives the memory back if nothing waits in it.
    pub fn release(&mut self) {
        if self.is_empty() {
            self.bytes = Vec::new();
            self.start = 0;
            self.lease = None;
            self.limit = None;
            self.forget_payloads();
        }
    }

    /// Gives back the memory that has come back from payloads; returns whether there was any.
    pub fn forget_payloads(&mut self) -> bool {
        self.spares.forget()
    }

    /// Memory for `len` bytes: what has come back, else new if the budget is far from used up.
    fn other_memory(&self, len: usize) -> Option<Memory> {
        let size = len.next_power_of_two();
        if size > IN_LEN_MAX {
            return None;
        }
        let spare = self.spares.take();
        if let Some(spare) = spare
            && spare.bytes.capacity() >= len
        {
            return Some(spare);
        }
        if self.budget.is_scarce() {
            return None;
        }
        let lease = self.budget.try_lease(size)?;
        let mut bytes = Vec::new();
        bytes.reserve_exact(size);
        Some(Memory { bytes, lease })
    }

    /// Goes on with `memory`, whose bytes wait from its beginning; returns what was used so far, if it is leased.
    fn replace(&mut self, memory: Memory) -> Option<Memory> {
        let bytes = std::mem::replace(&mut self.bytes, memory.bytes);
        let lease = self.lease.replace(memory.lease);
        self.start = 0;
        self.limit = None;
        lease.map(|lease| Memory { bytes, lease })
    }

    fn move_to_front(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start.., 0);
            self.bytes.truncate(self.bytes.len() - self.start);
            self.start = 0;
        }
    }

    /// Grows to `len` bytes of room if the budget allows, else to the floor.
    fn grow(&mut self, len: usize) {
        let (len, lease) = sized(&self.budget, len, self.bytes.capacity());
        if len > self.bytes.capacity() {
            self.bytes.reserve_exact(len - self.bytes.len());
            if lease.is_some() {
                self.lease = lease;
            }
        }
    }
}

/// Replies that wait to be sent.
pub struct OutBuf {
    budget: Arc<Budget>,
    memory: Vec<u8>,
    used: usize,
    sent: usize,
    /// A batch that holds so much is full.
    full_len: usize,
    lease: Option<Lease>,
}

impl OutBuf {
    /// An empty buffer without memory, whose bytes are `encrypted` when they are sent.
    pub fn new(budget: Arc<Budget>, encrypted: bool) -> Self {
        let full_len = if encrypted { SEALED_BATCH_LEN } else { OUT_LEN_MAX };
        OutBuf { budget, memory: Vec::new(), used: 0, sent: 0, full_len, lease: None }
    }

    /// Number of bytes that wait to be sent.
    pub fn len(&self) -> usize {
        self.used - self.sent
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `len` more bytes fit into this batch, growing as far as the budget allows.
    pub fn make_room_for(&mut self, len: usize) -> bool {
        let Some(wanted) = self.used.checked_add(len) else { return false };
        if self.used >= self.full_len || wanted > OUT_LEN_MAX {
            return false;
        }
        if wanted <= self.memory.len() {
            return true;
        }
        let (size, lease) =
            sized(&self.budget, wanted.next_power_of_two().max(OUT_LEN_START), self.memory.len());
        if size < wanted {
            return false;
        }
        let mut memory = vec![0; size];
        memory[..self.used].copy_from_slice(&self.memory[..self.used]);
        self.memory = memory;
        if lease.is_some() {
            self.lease = lease;
        }
        true
    }

    /// The room for `len` bytes behind what is used, which [`push`](Self::push) then makes part of the
    /// batch. `None` unless `make_room_for` said that it is there.
    pub fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        let end = self.used.checked_add(len)?;
        self.memory.get_mut(self.used..end)
    }

    /// Adds the first `len` bytes of the room to the batch.
    pub fn push(&mut self, len: usize) {
        self.used = self.used.saturating_add(len).min(self.memory.len());
    }

    /// Adds `bytes`, for which there must be room; returns whether there was.
    pub fn put(&mut self, bytes: &[u8]) -> bool {
        match self.room(bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.push(bytes.len());
                true
            }
            None => false,
        }
    }

    /// The end of the batch, for [`cut_back`](Self::cut_back).
    pub fn mark(&self) -> usize {
        self.used
    }

    /// Takes back all that was pushed since `mark`.
    pub fn cut_back(&mut self, mark: usize) {
        self.used = self.used.min(mark);
    }

    /// Sends as much as the socket takes, once; returns whether all of it is gone. With `more` the
    /// network may wait for what is sent next.
    pub fn send(&mut self, socket: &Stream, more: bool) -> io::Result<bool> {
        if let Some(bytes) = self.memory.get(self.sent..self.used)
            && !bytes.is_empty()
        {
            self.sent += socket.send(bytes, more)?;
        }
        if self.sent < self.used {
            return Ok(false);
        }
        self.sent = 0;
        self.used = 0;
        Ok(true)
    }

    /// Whether there is anything to give back.
    pub fn has_memory(&self) -> bool {
        !self.memory.is_empty()
    }

    /// Gives the memory back if nothing waits in it.
    pub fn release(&mut self) {
        if self.is_empty() {
            self.memory = Vec::new();
            self.lease = None;
        }
    }
}

/// What a buffer may grow to from `now` bytes when it wants `wanted`, and the lease for it: up to the
/// floor none is needed.
fn sized(budget: &Arc<Budget>, wanted: usize, now: usize) -> (usize, Option<Lease>) {
    if wanted <= FLOOR_LEN {
        return (wanted, None);
    }
    match budget.try_lease(wanted) {
        Some(lease) => (wanted, Some(lease)),
        None => (FLOOR_LEN.max(now), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn received_bytes_come_out_in_order_whatever_the_pieces() {
        let (mut here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let there = Stream::Unix(there);
        let mut buf = InBuf::new(Budget::new(64 << 20), b"left".to_vec());
        let mut expected = b"left".to_vec();
        let mut got = Vec::new();
        for round in 0..200usize {
            let piece: Vec<u8> = (0..round * 97 % 5000).map(|i| (i + round) as u8).collect();
            here.write_all(&piece).unwrap();
            expected.extend_from_slice(&piece);
            while buf.receive(&there).is_ok_and(|n| n > 0) {}
            let take = buf.len() / 2;
            got.extend_from_slice(&buf.bytes()[..take]);
            buf.consume(take);
        }
        got.extend_from_slice(buf.bytes());
        assert_eq!(got, expected);
    }

    #[test]
    fn without_budget_buffers_stay_at_their_floor_and_still_work() {
        let mut input = InBuf::new(Budget::new(0), Vec::new());
        assert!(input.make_room_for(FLOOR_LEN));
        assert!(!input.make_room_for(FLOOR_LEN + 1));
        let mut out = OutBuf::new(Budget::new(0), false);
        assert!(out.make_room_for(FLOOR_LEN));
        assert!(!out.make_room_for(FLOOR_LEN + 1));
    }

    #[test]
    fn payloads_are_taken_with_their_memory_and_what_comes_behind_stays() {
        let budget = Budget::new(64 << 20);
        let (mut here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let there = Stream::Unix(there);
        let mut input = InBuf::new(Arc::clone(&budget), b"head".to_vec());
        let len = 300 << 10;
        assert!(input.prepare_for(4 + len));
        let sent: Vec<u8> = (0..3 * len).map(|i| (i % 251) as u8).collect();
        let mut taken = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| here.write_all(&sent).unwrap());
            for _ in 0..3 {
                while input.len() < (if taken.is_empty() { 4 } else { 0 }) + len {
                    let _ = input.receive(&there);
                }
                input.consume(if taken.is_empty() { 4 } else { 0 });
                assert_eq!(input.len(), len, "more than was expected");
                taken.push(input.take_payload(len).unwrap());
                assert!(input.prepare_for(len));
            }
        });
        for (index, payload) in taken.iter().enumerate() {
            assert!(payload.bytes() == &sent[index * len..][..len], "payload {index}");
        }
        assert!(input.is_empty());
        assert_eq!((input.payload_count(), budget.left_len()), (3, (64 << 20) - (4 << 19)));
        drop(taken);
        assert_eq!((input.payload_count(), budget.left_len()), (0, (64 << 20) - (4 << 19)));
        assert!(input.forget_payloads() && !input.forget_payloads());
        assert_eq!(budget.left_len(), (64 << 20) - (1 << 19));
        input.release();
        assert_eq!(budget.left_len(), 64 << 20);
    }

    #[test]
    fn a_payload_is_not_taken_without_memory_for_what_comes_next() {
        let len = 300 << 10;
        let budget = Budget::new(1 << 20);
        let mut input = InBuf::new(Arc::clone(&budget), Vec::new());
        assert!(input.prepare_for(len));
        let (mut here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let there = Stream::Unix(there);
        std::thread::scope(|scope| {
            scope.spawn(|| here.write_all(&vec![7; len]).unwrap());
            while input.len() < len {
                let _ = input.receive(&there);
            }
        });
        let others = budget.try_lease(64 << 10).unwrap();
        assert!(input.take_payload(len).is_none(), "more than half of the budget is leased");
        drop(others);
        assert!(input.bytes() == vec![7; len], "what was not taken is still there");
        assert!(input.take_payload(len).is_some());
    }

    #[test]
    fn out_buffer_sends_exactly_what_was_pushed() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let there = Stream::Unix(there);
        let mut out = OutBuf::new(Budget::new(64 << 20), false);
        assert!(out.make_room_for(10));
        assert!(out.put(b"abc"));
        let mark = out.mark();
        assert!(out.put(b"wrong"));
        out.cut_back(mark);
        out.room(3).unwrap().copy_from_slice(b"def");
        out.push(3);
        assert!(out.send(&there, false).unwrap());
        drop(there);
        let mut got = String::new();
        here.read_to_string(&mut got).unwrap();
        assert_eq!(got, "abcdef");
        out.release();
        assert!(out.is_empty());
    }

    #[test]
    fn an_encrypted_batch_is_short_but_takes_a_long_reply() {
        let mut out = OutBuf::new(Budget::new(64 << 20), true);
        assert!(out.make_room_for(16) && out.put(&[0; 16]));
        assert!(out.make_room_for(1 << 20), "a reply behind the header of a stream");
        out.push(1 << 20);
        assert!(!out.make_room_for(1), "it should be sent first");
        out.cut_back(0);
        assert!(!out.make_room_for(OUT_LEN_MAX + 1));
        assert!(out.make_room_for(OUT_LEN_MAX));
    }

    #[test]
    fn releasing_returns_every_lease() {
        let budget = Budget::new(64 << 20);
        let mut input = InBuf::new(Arc::clone(&budget), Vec::new());
        let mut out = OutBuf::new(Arc::clone(&budget), false);
        assert!(input.make_room_for(3 << 20) && out.make_room_for(1 << 20));
        assert!(budget.left_len() < 64 << 20);
        input.release();
        out.release();
        assert_eq!(budget.left_len(), 64 << 20);
    }
}
