//! Requests that could not be answered at once: what each of them still waits for.
//!
//! They belong to the session's cell, not to its task: buffers and write plans stay until every
//! operation has completed, whether the client is still there or not.

use std::ops::Range;
use std::sync::Arc;

use nbd_img_formats::storage::{Completed, IoBuf};
use nbd_img_formats::sync::Mutex;
use nbd_img_formats::{BlockDriver, Error, Pin, WritePlan};
use smallvec::SmallVec;

use super::budget::Lease;
use crate::nbd::request::{Command, Request};

/// Most requests of one connection that wait at a time. Our choice: four times QEMU's limit, and what
/// the deepest client in use (nbdcopy, 64 per connection) asks for.
pub const PENDING_MAX: usize = 64;

/// A request under way.
pub struct Pending {
    /// What the client asked.
    pub request: Request,
    /// What it waits for and what there is already.
    pub work: Work,
    /// Answers that have not come yet.
    pub outstanding: usize,
    /// The first thing that went wrong.
    pub error: Option<Error>,
    /// Bytes of buffers it holds.
    pub len: usize,
    /// The budget's share of them; none when it runs on the connection's floor.
    pub lease: Option<Lease>,
}

/// The kinds of work.
pub enum Work {
    /// Reading: the parts cover the request in order.
    Read {
        /// The parts.
        parts: SmallVec<[Part; 1]>,
        /// Keeps the clusters where they are until the bytes are in the buffers.
        pin: Option<Pin>,
    },
    /// Writing planned pieces.
    Write {
        /// Must be finished when the last piece has completed.
        plan: WritePlan,
    },
    /// What a read needs is on its way into memory, from where the read is to be answered. What comes of it
    /// does not matter: it is served anew then.
    Arrival(Arrival),
    /// A call of the driver on a worker, with nothing but a result.
    Call,
    /// A block status query on a worker.
    Status {
        /// One for each context that is asked for.
        answers: Arc<Mutex<Vec<StatusAnswer>>>,
    },
}

/// What a read waits for, to be served anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arrival {
    /// The driver's tables, which tell where the bytes are.
    Tables,
    /// The bytes.
    Bytes,
}

/// What a driver told of one metadata context.
pub struct StatusAnswer {
    /// The context's number in this session.
    pub context: u32,
    /// Consecutive runs from the request's offset: length in bytes, protocol flags.
    pub runs: Vec<(u64, u32)>,
}

/// A run of a read's answer.
pub struct Part {
    /// Bytes.
    pub len: usize,
    /// What they are.
    pub bytes: PartBytes,
}

/// What a part of an answer consists of.
pub enum PartBytes {
    /// Zeroes.
    Zero,
    /// On its way.
    Awaited,
    /// There.
    Read(IoBuf),
}

impl Pending {
    /// Takes in one answer; returns whether it was the last one, which ends the work.
    pub fn complete(&mut self, part: usize, completed: Completed, driver: &Arc<dyn BlockDriver>) -> bool {
        self.outstanding = self.outstanding.saturating_sub(1);
        match completed.result {
            Ok(got) => self.accept(part, completed.buf, got),
            Err(error) => {
                self.error.get_or_insert(error);
            }
        }
        if self.outstanding > 0 {
            return false;
        }
        self.end(driver);
        true
    }

    fn accept(&mut self, part: usize, buf: IoBuf, got: usize) {
        match &mut self.work {
            Work::Read { parts, .. } => {
                if let Some(part) = parts.get_mut(part) {
                    if got == part.len {
                        part.bytes = PartBytes::Read(buf);
                    } else {
                        let text = "the file ends inside of the image's data: it is truncated or has shrunk";
                        self.error.get_or_insert(Error::new(nbd_img_formats::ErrorKind::Io, text));
                    }
                }
            }
            Work::Write { .. } | Work::Arrival(_) | Work::Call | Work::Status { .. } => {}
        }
    }

    fn end(&mut self, driver: &Arc<dyn BlockDriver>) {
        match &mut self.work {
            Work::Read { pin, .. } => *pin = None,
            Work::Write { plan } => {
                if let Err(error) = driver.finish_write(plan, self.error.is_none()) {
                    self.error.get_or_insert(error);
                }
            }
            Work::Arrival(_) | Work::Call | Work::Status { .. } => {}
        }
    }
}

/// The waiting requests of a connection, each in a slot of its own.
#[derive(Default)]
pub struct PendingSlots {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl PendingSlots {
    /// Number of waiting requests.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of buffers that the waiting requests hold.
    pub fn held_len(&self) -> usize {
        self.slots.iter().flatten().map(|pending| pending.len).sum()
    }

    /// Bytes that the waiting reads ask for. Others, as a block status, may be about all of the disk and keep no processor
    /// busy.
    pub fn read_len(&self) -> u64 {
        let reads = self.slots.iter().flatten().filter(|pending| pending.request.command == Command::Read);
        reads.fold(0, |all, pending| all.saturating_add(pending.request.len))
    }

    /// Puts a request into a free slot.
    pub fn insert(&mut self, pending: Pending) -> usize {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(pending);
                slot
            }
            None => {
                self.slots.push(Some(pending));
                self.slots.len() - 1
            }
        }
    }

    /// The request in `slot`.
    pub fn get_mut(&mut self, slot: usize) -> Option<&mut Pending> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Takes the request out of `slot`.
    pub fn remove(&mut self, slot: usize) -> Option<Pending> {
        let pending = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(pending)
    }
}

/// The range of a part in its request.
pub fn part_ranges(parts: &[Part]) -> impl Iterator<Item = (Range<usize>, &Part)> {
    let mut at = 0usize;
    parts.iter().map(move |part| {
        let begin = at;
        at += part.len;
        (begin..at, part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::request::CommandFlags;

    #[test]
    fn only_reads_count_as_read() {
        let mut slots = PendingSlots::default();
        for (command, len) in [
            (Command::Read, 4096),
            (Command::BlockStatus, 1 << 30),
            (Command::Trim, u64::MAX),
            (Command::Read, 512),
        ] {
            let request =
                Request { flags: CommandFlags::empty(), command, cookie: 0, offset: 0, len, payload_len: 0 };
            slots.insert(Pending {
                request,
                work: Work::Call,
                outstanding: 1,
                error: None,
                len: 0,
                lease: None,
            });
        }
        assert_eq!(slots.read_len(), 4096 + 512);
    }
}
