//! What has come from a session's socket. ([`replies`](super::replies) is what goes out.)
//!
//! Both buffers grow while the session is busy, with leases from the budget for all beyond a small start, and
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

/// Most bytes behind a payload that are moved when it is taken: a small part of what moving the payload itself
/// would cost. Our choice.
const MOVED_LEN_MAX: usize = 64 << 10;

/// Memory of more than so many times a payload's length is not given away with it. Our choice: lengths of one client's
/// requests differ by less.
const OVERSIZE: usize = 8;

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
        if self.lease.is_none() || self.bytes.capacity() < len || self.is_oversized_for(len) {
            let Some(mut memory) = self.other_memory(len) else { return false };
            memory.bytes.extend_from_slice(self.bytes());
            self.replace(memory);
        } else if self.bytes.capacity() - self.start < len {
            self.move_to_front();
        }
        self.limit = Some(len);
        true
    }

    /// Whether the first `len` waiting bytes can be taken, as far as the memory that they are in goes.
    pub fn can_take(&self, len: usize) -> bool {
        let fits = self.len().checked_sub(len).is_some_and(|behind| behind <= MOVED_LEN_MAX);
        fits && self.lease.is_some() && !self.is_oversized_for(len)
    }

    /// A few of such payloads would hold far more memory than they have bytes.
    fn is_oversized_for(&self, len: usize) -> bool {
        self.bytes.capacity() / OVERSIZE > len
    }

    /// Takes the first `len` waiting bytes out with the memory that they are in, if there is other memory for what
    /// comes next: that is expected to be as long, behind a header of `header_len`, and no more is received at first.
    pub fn take_payload(&mut self, len: usize, header_len: usize) -> Option<Payload> {
        if !self.can_take(len) {
            return None;
        }
        let behind = self.len() - len;
        let mut other = self.other_memory(len + HEADER_LEN_MAX)?;
        let (start, end) = (self.start, self.start + len);
        other.bytes.extend_from_slice(self.bytes.get(end..end + behind)?);
        let memory = self.replace(other);
        // What comes behind it would have to be moved.
        self.limit = Some(header_len + len);
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
        let spare = self.spares.take(len..=len.saturating_mul(OVERSIZE));
        if spare.is_some() {
            return spare;
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
            // Without one it is within the floor, whatever it had.
            self.lease = lease;
        }
    }
}

/// What a buffer may grow to from `now` bytes when it wants `wanted`, and the lease for it: up to the
/// floor none is needed.
pub(super) fn sized(budget: &Arc<Budget>, wanted: usize, now: usize) -> (usize, Option<Lease>) {
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
    use crate::session::replies::OutBuf;
    use std::io::Write;
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
                taken.push(input.take_payload(len, 0).unwrap());
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
        assert!(input.take_payload(len, 0).is_none(), "more than half of the budget is leased");
        drop(others);
        assert!(input.bytes() == vec![7; len], "what was not taken is still there");
        assert!(input.take_payload(len, 0).is_some());
    }

    /// Receives `bytes` bytes, for which there is room.
    fn fill(input: &mut InBuf, bytes: usize) {
        let (mut here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let there = Stream::Unix(there);
        std::thread::scope(|scope| {
            scope.spawn(|| here.write_all(&vec![5; bytes]).unwrap());
            while input.len() < bytes {
                let _ = input.receive(&there);
            }
        });
    }

    #[test]
    fn a_payload_takes_no_more_memory_with_it_than_is_leased() {
        let budget = Budget::new(64 << 20);
        let mut input = InBuf::new(Arc::clone(&budget), Vec::new());
        assert!(input.prepare_for(32 << 10));
        // A small request in between lets the buffer grow to what needs no lease.
        fill(&mut input, 100);
        input.consume(100);
        assert!(input.make_room_for(FLOOR_LEN));
        fill(&mut input, 32 << 10);
        assert!(input.take_payload(32 << 10, 0).is_none());
        assert_eq!(budget.left_len(), 64 << 20);
    }

    #[test]
    fn a_short_payload_does_not_take_a_large_buffer_with_it() {
        let budget = Budget::new(64 << 20);
        let mut input = InBuf::new(Arc::clone(&budget), Vec::new());
        assert!(input.make_room_for(4 << 20));
        fill(&mut input, 64 << 10);
        assert!(!input.can_take(64 << 10) && input.take_payload(64 << 10, 0).is_none());
        // The next one is received into less.
        input.consume(60 << 10);
        assert!(input.prepare_for(64 << 10));
        assert_eq!((input.len(), budget.left_len()), (4 << 10, (64 << 20) - (64 << 10)));
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
