//! Where submitted operations are answered: one [`Queue`] for each thread that must not wait.
//!
//! A file puts its reads and writes on the queue's io_uring, where there is one; everything else goes to the
//! queue's [`Workers`], whose answers go back by [`Queue::complete`]. Both make the queue's descriptor
//! readable. It moves no bytes itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::flight::{Flight, Outcome};
use super::ring::{self, Ring};
use super::{Durability, IoBuf};
use crate::address::HostOffset;
use crate::error::{Error, Result};
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

/// Who carries operations out that would wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Aio {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring. That it can be had is [checked](Aio::check) beforehand.
    IoUring,
    /// Threads.
    Threads,
}

impl Aio {
    /// Fails if it asks for what the kernel refuses.
    pub fn check(self) -> Result<()> {
        match self {
            Aio::Auto | Aio::Threads => Ok(()),
            Aio::IoUring => ring::check().map_err(|error| {
                Error::io(
                    "io_uring cannot be had, which --aio io_uring asks for (a container's seccomp profile or \
                     kernel.io_uring_disabled may forbid it); --aio auto or threads does without",
                    error,
                )
            }),
        }
    }
}

/// Collects answers for one reader, which waits on the descriptor. Who submits to files from another
/// thread than the reader's has them done by threads.
pub struct Queue {
    workers: Arc<Workers>,
    done: Mutex<Vec<Completed>>,
    wake: OwnedFd,
    ring: Mutex<RingState>,
}

/// A queue's io_uring. It is made by the thread that first has a use for it, and is only that one's.
enum RingState {
    NotYet,
    There(Box<Ring>),
    /// It is not wanted, or could not be had.
    Never,
}

impl Queue {
    /// A queue whose operations run on an io_uring of its own if `aio` allows it, else on `workers`.
    pub fn new(workers: Arc<Workers>, aio: Aio) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ring = Mutex::new(match aio {
            Aio::Auto | Aio::IoUring => RingState::NotYet,
            Aio::Threads => RingState::Never,
        });
        Ok(Queue { workers, done: Mutex::new(Vec::new()), wake, ring })
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
        match &mut *self.ring.lock() {
            RingState::There(ring) if ring.is_mine() => {
                ring.reap(|| self.clear(), |flight, outcome| land(flight, outcome, into));
            }
            RingState::There(_) | RingState::NotYet | RingState::Never => self.clear(),
        }
        into.append(&mut self.done.lock());
    }

    /// Waits for the answers of all operations that the kernel has, and adds them to `into`. From now on
    /// threads do the work. To be called by the reader before it ends: nobody else could take them.
    pub fn wind_up(&self, into: &mut Vec<Completed>) {
        let ring = std::mem::replace(&mut *self.ring.lock(), RingState::Never);
        if let RingState::There(mut ring) = ring {
            ring.wait_for_all(|flight, outcome| land(flight, outcome, into));
        }
    }

    /// Whether an io_uring is in use.
    pub fn has_ring(&self) -> bool {
        matches!(&*self.ring.lock(), RingState::There(ring) if ring.is_usable())
    }

    /// Calls `work` with the ring, if this thread has one or can have it.
    pub(super) fn with_ring<T>(&self, work: impl FnOnce(&mut Ring) -> T) -> Option<T> {
        let mut state = self.ring.lock();
        if matches!(*state, RingState::NotYet) {
            *state = self.make_ring();
        }
        match &mut *state {
            RingState::There(ring) if ring.is_usable() => Some(work(ring)),
            RingState::There(_) | RingState::NotYet | RingState::Never => None,
        }
    }

    fn make_ring(&self) -> RingState {
        match Ring::new(self.wake.as_fd()) {
            Ok(ring) => RingState::There(Box::new(ring)),
            Err(error) => {
                tracing::info!(%error, "io_uring cannot be had: what waits for the disk is done by threads");
                RingState::Never
            }
        }
    }

    /// Makes the descriptor unreadable. Answers that are looked for afterwards cannot be missed.
    fn clear(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }
}

/// Brings an operation that has left the ring to where it goes on.
fn land(flight: Flight, outcome: Outcome, into: &mut Vec<Completed>) {
    match outcome {
        Outcome::Done(result) => into.push(flight.complete(result)),
        Outcome::Elsewhere => flight.hand_to_thread(),
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
        let queue = Queue::new(Arc::new(Workers::new("test")), Aio::Auto).unwrap();
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
