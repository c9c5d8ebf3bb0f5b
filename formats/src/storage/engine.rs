//! How submitted operations are carried out: on the queue's ring, on its workers, or at once where nothing
//! waits.
//!
//! Every operation is answered exactly once. That hangs on one value, the [`Answer`], which answers
//! when it goes, whichever way that comes about.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::flight::Flight;
use super::queue::{Completed, Operation, OperationKind, Queue};
use super::{FileStorage, InPlace, IoBuf, Storage};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use crate::workers::Lane;

/// Carries the operations out: here where nothing ever waits, else on the queue's workers.
pub(super) fn submit<S: Storage + 'static>(
    storage: &Arc<S>,
    operations: &mut Vec<Operation>,
    queue: &Arc<Queue>,
) {
    let facts = storage.facts();
    if facts.reads == InPlace::Always && facts.writes == InPlace::Always {
        submit_inline(storage, operations, queue);
    } else {
        submit_to_workers(storage, operations, queue);
    }
}

/// Carries the operations out on the queue's ring if it has one, else as [`submit`] does.
pub(super) fn submit_file(file: &Arc<FileStorage>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
    let on_ring = queue.with_ring(|ring| {
        for operation in operations.drain(..) {
            let mut answer = Answer::new(operation, queue);
            match file.take_off(answer.kind, &answer.buf, answer.at) {
                Err(error) => answer.result = Some(Err(answer.explain(&**file, error))),
                Ok(None) => hand_to_thread(file, answer),
                Ok(Some(taken)) => {
                    if let Err(flight) = ring.push(Flight::new(answer, taken)) {
                        flight.hand_to_thread();
                    }
                }
            }
        }
        ring.enter(Flight::hand_to_thread);
    });
    if on_ring.is_none() {
        submit(file, operations, queue);
    }
}

/// Gives each operation to a thread of the queue's workers.
fn submit_to_workers<S: Storage + 'static>(
    storage: &Arc<S>,
    operations: &mut Vec<Operation>,
    queue: &Arc<Queue>,
) {
    for operation in operations.drain(..) {
        hand_to_thread(storage, Answer::new(operation, queue));
    }
}

/// Gives an operation to a thread of its queue's workers. One that no thread can be had for is
/// answered with an error: the submitter must not wait, so it cannot be run here.
pub(super) fn hand_to_thread<S: Storage + 'static>(storage: &Arc<S>, mut answer: Answer) {
    let lane = match answer.kind {
        OperationKind::Read => Lane::Read,
        OperationKind::Write(_) | OperationKind::Sync => Lane::StorageWrite,
    };
    let storage = Arc::clone(storage);
    let Some(queue) = answer.queue.clone() else { return };
    // A job that is handed back, or dropped without having been run, answers by being dropped.
    let _ = queue.workers().spawn(lane, Box::new(move || answer.run(&*storage)));
}

/// Carries the operations out here; for storages that never wait.
fn submit_inline<S: Storage>(storage: &Arc<S>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
    for operation in operations.drain(..) {
        let mut answer = Answer::new(operation, queue);
        // As on a worker: a panic is an error of this operation, and the others go on.
        if catch_unwind(AssertUnwindSafe(|| answer.run(&**storage))).is_err() {
            tracing::error!(path = %storage.facts().path.display(), "a storage panicked");
        }
    }
}

/// An operation that has to be answered.
pub(super) struct Answer {
    /// Where to; nobody once it has been answered.
    queue: Option<Arc<Queue>>,
    pub(super) kind: OperationKind,
    pub(super) at: HostOffset,
    token: u64,
    pub(super) buf: IoBuf,
    /// What to answer; as long as nothing is here, it was not carried out.
    result: Option<Result<usize>>,
}

impl Answer {
    pub(super) fn new(operation: Operation, queue: &Arc<Queue>) -> Self {
        let Operation { kind, at, buf, token } = operation;
        Answer { queue: Some(Arc::clone(queue)), kind, at, token, buf, result: None }
    }

    fn run<S: Storage>(&mut self, storage: &S) {
        let result = match self.kind {
            OperationKind::Read => storage.pread(&mut self.buf, self.at),
            OperationKind::Write(durability) => {
                storage.pwrite(&self.buf, self.at, durability).map(|()| self.buf.len())
            }
            OperationKind::Sync => storage.sync().map(|()| 0),
        };
        self.result = Some(result.map_err(|error| self.explain(storage, error)));
    }

    fn explain<S: Storage>(&self, storage: &S, error: io::Error) -> Error {
        let what = match self.kind {
            OperationKind::Read => "cannot read",
            OperationKind::Write(_) => "cannot write",
            OperationKind::Sync => "cannot sync",
        };
        Error::io(what, error).with_path(&storage.facts().path).with_offset(self.at.0)
    }

    /// The answer itself, for who brings it to the reader of the queue.
    pub(super) fn into_completed<S: Storage>(mut self, storage: &S, result: io::Result<usize>) -> Completed {
        self.queue = None;
        let result = result.map_err(|error| self.explain(storage, error));
        Completed { token: self.token, buf: std::mem::take(&mut self.buf), result }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let Some(queue) = self.queue.take() else { return };
        let not_run = || {
            Err(Error::new(ErrorKind::Io, "the operation could not be carried out: no thread, or a panic"))
        };
        let result = self.result.take().unwrap_or_else(not_run);
        queue.complete(Completed { token: self.token, buf: std::mem::take(&mut self.buf), result });
    }
}
