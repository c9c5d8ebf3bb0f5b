//! [`Ring`]: an io_uring of one thread, and the operations that are on it.
//!
//! It hands entries to the kernel and takes its answers; what an answer means is the business of the
//! [`Flight`]. An operation's buffer and file stay in their slot until the kernel has answered, so that
//! nothing the kernel may still write to or read from is ever let go.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, squeue};

use super::flight::{Flight, Outcome, Step};
use crate::sync::thread::{self, ThreadId};

/// Most operations on a ring at a time, and entries of its submission queue: four connections at the
/// depth that a connection may have. What comes beyond goes to threads. Our choice.
const FLIGHTS_MAX: u32 = 256;

/// IORING_ENTER_GETEVENTS (linux/io_uring.h): do what is left to do for the ring, and wait for as many
/// answers as the call says.
const ENTER_GET_EVENTS: u32 = 1;

/// See the module's description.
pub(super) struct Ring {
    uring: IoUring,
    owner: ThreadId,
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Slots of entries that the kernel has not taken yet, in the order of its queue.
    waiting: VecDeque<usize>,
    /// The kernel has refused to take entries: it gets no more, and only answers.
    refused: bool,
}

impl Ring {
    /// A ring of this thread, which is the only one that may use it. Answers make `wake` readable.
    pub(super) fn new(wake: BorrowedFd<'_>) -> io::Result<Ring> {
        let uring = build()?;
        uring.submitter().register_eventfd(wake.as_raw_fd())?;
        Ok(Ring {
            uring,
            owner: thread::current().id(),
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            refused: false,
        })
    }

    /// Whether operations can be put on it by this thread.
    pub(super) fn is_usable(&self) -> bool {
        !self.refused && self.is_mine()
    }

    /// Whether this is the thread that made it. The kernel refuses every other.
    pub(super) fn is_mine(&self) -> bool {
        thread::current().id() == self.owner
    }

    /// Number of operations that have not been answered.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Puts an operation on the ring, to be handed over by [`enter`](Self::enter). Gives it back when
    /// there is no room.
    pub(super) fn push(&mut self, mut flight: Flight) -> Result<(), Box<Flight>> {
        let slot = match self.free.last() {
            Some(slot) => *slot,
            None if self.slots.len() < FLIGHTS_MAX as usize => self.slots.len(),
            None => return Err(Box::new(flight)),
        };
        let Some(entry) = flight.entry() else { return Err(Box::new(flight)) };
        // SAFETY: the memory and the descriptor that the entry names belong to the flight, which stays in
        // its slot, and whose buffer nobody touches, until the kernel has answered or has been seen not to
        // have taken the entry; a ring that goes with answers outstanding leaks its slots.
        if unsafe { self.uring.submission().push(&entry.user_data(slot as u64)) }.is_err() {
            return Err(Box::new(flight));
        }
        if self.free.pop().is_some() {
            if let Some(place) = self.slots.get_mut(slot) {
                *place = Some(flight);
            }
        } else {
            self.slots.push(Some(flight));
        }
        self.waiting.push_back(slot);
        Ok(())
    }

    /// Hands all entries to the kernel. Those that it does not take are given to `refused`: from then on
    /// the ring takes no more.
    pub(super) fn enter(&mut self, mut refused: impl FnMut(Flight)) {
        while !self.waiting.is_empty() && !self.refused {
            let count = u32::try_from(self.waiting.len()).unwrap_or(FLIGHTS_MAX);
            match self.call(count, 0, 0) {
                Ok(0) => self.refuse(&io::Error::from(io::ErrorKind::WriteZero)),
                Ok(taken) => drop(self.waiting.drain(..taken.min(self.waiting.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.refuse(&error),
            }
        }
        if self.refused {
            // Their entries stay in the queue, but the kernel is never again told to take any.
            for slot in std::mem::take(&mut self.waiting) {
                if let Some(flight) = self.take(slot) {
                    refused(flight);
                }
            }
        }
    }

    fn refuse(&mut self, error: &io::Error) {
        tracing::warn!(%error, "io_uring takes no more operations: threads do the work from now on");
        self.refused = true;
    }

    /// Takes the answers that are there, and gives each operation that has ended to `ended`; those that
    /// go on are handed over again. `clear` makes the descriptor of [`new`](Self::new) unreadable.
    pub(super) fn reap(&mut self, clear: impl FnOnce(), mut ended: impl FnMut(Flight, Outcome)) {
        // The kernel keeps answers back until they are called for, and tells by the descriptor that it has
        // some. Calling for them makes it readable once more, so it is cleared behind that. What has come
        // just before the clearing would not be told again: it is called for a second time. Never in a
        // loop: the flag may be left set with nothing behind it.
        self.call_for_answers();
        clear();
        self.call_for_answers();
        self.take_answers(&mut ended);
    }

    fn call_for_answers(&mut self) {
        while self.uring.submission().taskrun()
            && let Err(error) = self.call(0, 0, ENTER_GET_EVENTS)
        {
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::error!(%error, "io_uring does not answer");
                return;
            }
        }
    }

    /// Waits until every operation has ended.
    pub(super) fn wait_for_all(&mut self, mut ended: impl FnMut(Flight, Outcome)) {
        self.enter(|flight| ended(flight, Outcome::Elsewhere));
        while self.len() > 0 {
            match self.call(0, 1, ENTER_GET_EVENTS) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, count = self.len(), "answers of io_uring never came");
                    return;
                }
            }
            self.take_answers(&mut ended);
        }
    }

    fn take_answers(&mut self, ended: &mut impl FnMut(Flight, Outcome)) {
        loop {
            let answer = self.uring.completion().next();
            let Some(answer) = answer else { break };
            let slot = usize::try_from(answer.user_data()).unwrap_or(usize::MAX);
            let Some(mut flight) = self.take(slot) else { continue };
            match flight.advance(answer.result()) {
                Step::Ended(outcome) => ended(flight, outcome),
                Step::Again if self.refused => ended(flight, Outcome::Elsewhere),
                Step::Again => {
                    if let Err(flight) = self.push(flight) {
                        ended(*flight, Outcome::Elsewhere);
                    }
                }
            }
        }
        self.enter(|flight| ended(flight, Outcome::Elsewhere));
    }

    fn take(&mut self, slot: usize) -> Option<Flight> {
        let flight = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }

    fn call(&self, submit: u32, wait_for: u32, flags: u32) -> io::Result<usize> {
        // SAFETY: without an argument the call reads and writes nothing but the ring, and what its
        // entries name, for which `push` answers.
        unsafe { self.uring.submitter().enter::<libc::sigset_t>(submit, wait_for, flags, None) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.len() > 0 {
            // The kernel may still use their memory.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// An io_uring as the kernel has it: answers held back until they are called for (Linux 6.1), or at least
/// no interruption for them (5.19), or as it always was.
fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::<squeue::Entry>::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    match builder.build(FLIGHTS_MAX) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        result => return result,
    }
    let mut builder = IoUring::<squeue::Entry>::builder();
    builder.setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(FLIGHTS_MAX) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(FLIGHTS_MAX),
        result => result,
    }
}

/// Whether this process may have an io_uring.
pub(super) fn check() -> io::Result<()> {
    build().map(drop)
}
