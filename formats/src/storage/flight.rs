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
            // It is for threads: `take_off` gives none.
            OperationKind::Sync => return None,
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

#[cfg(all(test, not(shuttle)))]
#[allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.
mod tests {
    use super::*;
    use crate::address::HostOffset;
    use crate::storage::queue::{Aio, Operation, Queue};
    use crate::storage::{FileOptions, FileStorage, IoBuf, LockMode, Storage};
    use crate::workers::Workers;

    const LEN: usize = 8192;

    struct Rig {
        file: Arc<FileStorage>,
        queue: Arc<Queue>,
        _folder: tempfile::TempDir,
    }

    fn rig(direct: bool) -> Rig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![1; 4 * LEN]).unwrap();
        let options = FileOptions { writable: true, direct, lock: LockMode::Writer };
        let queue = Arc::new(Queue::new(Arc::new(Workers::new("test")), Aio::Threads).unwrap());
        Rig { file: FileStorage::open(&path, &options).unwrap(), queue, _folder: folder }
    }

    impl Rig {
        fn flight(&self, kind: OperationKind, len: usize) -> Flight {
            let operation = Operation { kind, at: HostOffset(0), buf: IoBuf::zeroed(len), token: 7 };
            let answer = Answer::new(operation, &self.queue);
            let taken = self.file.take_off(kind, &answer.buf, answer.at).unwrap().unwrap();
            Flight::new(answer, taken)
        }
    }

    fn done(step: Step) -> io::Result<usize> {
        match step {
            Step::Ended(Outcome::Done(result)) => result,
            Step::Ended(Outcome::Elsewhere) => panic!("it should be done"),
            Step::Again => panic!("it should have ended"),
        }
    }

    #[test]
    fn short_reads_go_on_until_the_end() {
        let rig = rig(false);
        let mut flight = rig.flight(OperationKind::Read, LEN);
        assert!(matches!(flight.advance(100), Step::Again));
        assert!(flight.entry().is_some());
        assert_eq!(done(flight.advance(i32::try_from(LEN).unwrap() - 100)).unwrap(), LEN);
        let mut flight = rig.flight(OperationKind::Read, LEN);
        assert!(matches!(flight.advance(100), Step::Again));
        assert_eq!(done(flight.advance(0)).unwrap(), 100);
        let completed = flight.complete(Ok(100));
        assert_eq!((completed.token, completed.buf.len(), completed.result.unwrap()), (7, LEN, 100));
    }

    #[test]
    fn what_the_kernel_puts_off_is_done_by_threads() {
        let rig = rig(false);
        for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED, libc::EOPNOTSUPP, libc::EINVAL] {
            let mut flight = rig.flight(OperationKind::Read, LEN);
            assert!(matches!(flight.advance(-errno), Step::Ended(Outcome::Elsewhere)), "{errno}");
            flight.hand_to_thread();
            let mut got = Vec::new();
            while got.is_empty() {
                rig.queue.drain(&mut got);
                std::thread::yield_now();
            }
            let completed = got.remove(0);
            assert_eq!(completed.result.unwrap(), LEN);
            assert!(completed.buf.iter().all(|byte| *byte == 1));
        }
        let mut flight = rig.flight(OperationKind::Read, LEN);
        assert_eq!(done(flight.advance(-libc::EIO)).unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn an_operation_under_way_keeps_the_lock_beyond_the_close() {
        let rig = rig(true);
        let mut flight = rig.flight(OperationKind::Write(Durability::Later), LEN);
        rig.file.close().unwrap();
        let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
        assert!(FileStorage::open(&rig.file.facts().path, &options).is_err());
        assert_eq!(done(flight.advance(i32::try_from(LEN).unwrap())).unwrap(), LEN);
        drop(flight);
        let mut got = Vec::new();
        rig.queue.drain(&mut got);
        assert_eq!(got.len(), 1, "answered although nobody said how it ended");
        assert!(got[0].result.is_err());
    }
}
