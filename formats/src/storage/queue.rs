//! Where submitted operations are answered: one [`Queue`] for each thread that must not wait.
//!
//! A storage that has no better engine gives its operations to the queue's [`Workers`]; the answer goes
//! back by [`Queue::complete`], which makes the queue's descriptor readable. It moves no bytes itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::{Durability, IoBuf};
use crate::address::HostOffset;
use crate::error::Result;
use crate::sync::{Arc, Mutex};
use crate::workers::Workers;

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationKind {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write(Durability),
    /// Make everything durable that has completed before.
    Sync,
}

/// One operation on a storage, with the buffer that it owns until it completes.
pub struct Operation {
    /// What to do.
    pub kind: OperationKind,
    /// Where it begins.
    pub at: HostOffset,
    /// The bytes: all of the buffer is read or written. Empty for `Sync`.
    pub buf: IoBuf,
    /// Given back with the answer; means nothing here.
    pub token: u64,
}

/// The answer to an operation, or to a job that its submitter runs on the workers.
pub struct Completed {
    /// What the submitter gave.
    pub token: u64,
    /// The operation's buffer.
    pub buf: IoBuf,
    /// Bytes moved, fewer than the buffer holds only for a read that met the storage's end.
    pub result: Result<usize>,
}

/// Collects answers for one reader, which waits on the descriptor.
pub struct Queue {
    workers: Arc<Workers>,
    done: Mutex<Vec<Completed>>,
    wake: OwnedFd,
}

impl Queue {
    /// A queue whose operations run on `workers` where nothing better is at hand.
    pub fn new(workers: Arc<Workers>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Queue { workers, done: Mutex::new(Vec::new()), wake })
    }

    /// The threads that may wait.
    pub fn workers(&self) -> &Arc<Workers> {
        &self.workers
    }

    /// Adds an answer and wakes the reader. From any thread; never waits.
    pub fn complete(&self, completed: Completed) {
        let was_empty = {
            let mut done = self.done.lock();
            done.push(completed);
            done.len() == 1
        };
        if was_empty {
            // It can only fail when the counter is full, and then the reader is awake already.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes_for_eventfd());
        }
    }

    /// Moves all answers to the end of `into` and makes the descriptor unreadable until the next one.
    pub fn drain(&self, into: &mut Vec<Completed>) {
        // The counter first: an answer that comes in between finds the list empty or is taken below.
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        into.append(&mut self.done.lock());
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// An eventfd's counter is in the machine's byte order (eventfd(2)); the lint against host order is
/// about file formats.
trait EventfdValue {
    fn to_ne_bytes_for_eventfd(self) -> [u8; 8];
}

impl EventfdValue for u64 {
    #[allow(clippy::host_endian_bytes)]
    fn to_ne_bytes_for_eventfd(self) -> [u8; 8] {
        self.to_ne_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn readable(queue: &Queue) -> bool {
        let mut fds = [PollFd::new(queue, PollFlags::IN)];
        poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn descriptor_is_readable_exactly_while_answers_wait() {
        let queue = Queue::new(Arc::new(Workers::new("test"))).unwrap();
        assert!(!readable(&queue));
        for token in 0..3 {
            queue.complete(Completed { token, buf: IoBuf::default(), result: Ok(0) });
        }
        assert!(readable(&queue));
        let mut got = Vec::new();
        queue.drain(&mut got);
        assert_eq!(got.iter().map(|c| c.token).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(!readable(&queue));
        queue.complete(Completed { token: 9, buf: IoBuf::default(), result: Ok(0) });
        assert!(readable(&queue));
    }
}
