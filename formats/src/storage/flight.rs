//! [`Flight`]: an operation that is under way on a ring, and what the kernel's answers to it mean.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types};

use super::Durability;
use super::engine::{self, Answer};
use super::file::Taken;
use super::queue::{Completed, OperationKind};
use crate::sync::Arc;

/// An operation with all that has to stay as it is until the kernel has answered.
pub(super) struct Flight {
    answer: Answer,
    taken: Taken,
    /// Bytes that earlier answers were about.
    done: usize,
}

/// What follows from an answer of the kernel's.
pub(super) enum Step {
    /// The rest has to be asked for.
    Again,
    /// Nothing more.
    Ended(Outcome),
}

/// How an operation ended on the ring.
pub(super) enum Outcome {
    /// With so many bytes, or a failure.
    Done(io::Result<usize>),
    /// Not at all: a thread that may wait has to do it.
    Elsewhere,
}

impl Flight {
    pub(super) fn new(answer: Answer, taken: Taken) -> Self {
        Flight { answer, taken, done: 0 }
    }

    /// What to ask the kernel for. `None` if there are no words for it.
    pub(super) fn entry(&mut self) -> Option<squeue::Entry> {
        let kind = self.answer.kind;
        let fd = types::Fd(self.taken.fd(kind).as_raw_fd());
        let at = self.answer.at.0.checked_add(self.done as u64)?;
        let rest = self.answer.buf.get_mut(self.done..)?;
        let len = u32::try_from(rest.len()).ok()?;
        Some(match kind {
            OperationKind::Read => opcode::Read::new(fd, rest.as_mut_ptr(), len).offset(at).build(),
            OperationKind::Write(Durability::Later | Durability::Fua) => {
                opcode::Write::new(fd, rest.as_ptr(), len).offset(at).build()
            }
            OperationKind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        })
    }

    /// Takes in the kernel's answer: a count of bytes, or a negative errno.
    pub(super) fn advance(&mut self, result: i32) -> Step {
        let Ok(got) = usize::try_from(result) else {
            return Step::Ended(match result.saturating_neg() {
                // It was interrupted, or the kernel cannot do this without waiting, or not in this way.
                libc::EINTR | libc::EAGAIN | libc::ECANCELED | libc::EOPNOTSUPP | libc::EINVAL => {
                    Outcome::Elsewhere
                }
                errno => Outcome::Done(Err(io::Error::from_raw_os_error(errno))),
            });
        };
        self.done = self.done.saturating_add(got);
        let complete = self.done >= self.answer.buf.len();
        let ended = match self.answer.kind {
            OperationKind::Read => complete || got == 0 || self.taken.is_end(self.done),
            // Does not happen with files; without this it would be an endless loop.
            OperationKind::Write(_) if got == 0 => {
                return Step::Ended(Outcome::Done(Err(io::Error::from_raw_os_error(libc::EIO))));
            }
            OperationKind::Write(_) => complete,
            OperationKind::Sync => true,
        };
        if ended { Step::Ended(Outcome::Done(Ok(self.done))) } else { Step::Again }
    }

    /// The answer to who submitted it.
    pub(super) fn complete(self, result: io::Result<usize>) -> Completed {
        let Flight { answer, taken, .. } = self;
        let result = result.map_err(|error| taken.failure(answer.kind, error));
        let completed = answer.into_completed(&**taken.file(), result);
        drop(taken);
        completed
    }

    /// Has a thread do it, from the start.
    pub(super) fn hand_to_thread(self) {
        let Flight { answer, taken, .. } = self;
        let file = Arc::clone(taken.file());
        // What it holds would be in the thread's way.
        drop(taken);
        engine::hand_to_thread(&file, answer);
    }
}
