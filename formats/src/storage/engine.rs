//! How submitted operations are carried out: on the queue's workers, or at once where nothing waits.
//! The one seam behind which a better engine can go.
//!
//! Every operation is answered exactly once. That hangs on one value, the [`Answer`], which answers
//! when it goes, whichever way that comes about.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::queue::{Completed, Operation, OperationKind, Queue};
use super::{InPlace, IoBuf, Storage};
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

/// Gives each operation to a thread of the queue's workers. One that no thread can be had for is
/// answered with an error: the submitter must not wait, so it cannot be run here.
fn submit_to_workers<S: Storage + 'static>(
    storage: &Arc<S>,
    operations: &mut Vec<Operation>,
    queue: &Arc<Queue>,
) {
    for operation in operations.drain(..) {
        let lane = match operation.kind {
            OperationKind::Read => Lane::Read,
            OperationKind::Write(_) | OperationKind::Sync => Lane::Write,
        };
        let storage = Arc::clone(storage);
        let mut answer = Answer::new(operation, queue);
        // A job that is handed back, or dropped without having been run, answers by being dropped.
        let _ = queue.workers().spawn(lane, Box::new(move || answer.run(&*storage)));
    }
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
struct Answer {
    queue: Arc<Queue>,
    kind: OperationKind,
    at: HostOffset,
    token: u64,
    buf: IoBuf,
    /// What to answer; as long as nothing is here, it was not carried out.
    result: Option<Result<usize>>,
}

impl Answer {
    fn new(operation: Operation, queue: &Arc<Queue>) -> Self {
        let Operation { kind, at, buf, token } = operation;
        Answer { queue: Arc::clone(queue), kind, at, token, buf, result: None }
    }

    fn run<S: Storage>(&mut self, storage: &S) {
        let (what, result) = match self.kind {
            OperationKind::Read => ("cannot read", storage.pread(&mut self.buf, self.at)),
            OperationKind::Write(durability) => {
                let written = storage.pwrite(&self.buf, self.at, durability);
                ("cannot write", written.map(|()| self.buf.len()))
            }
            OperationKind::Sync => ("cannot sync", storage.sync().map(|()| 0)),
        };
        let explain =
            |e: io::Error| Error::io(what, e).with_path(&storage.facts().path).with_offset(self.at.0);
        self.result = Some(result.map_err(explain));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let not_run = || {
            Err(Error::new(ErrorKind::Io, "the operation could not be carried out: no thread, or a panic"))
        };
        let result = self.result.take().unwrap_or_else(not_run);
        self.queue.complete(Completed { token: self.token, buf: std::mem::take(&mut self.buf), result });
    }
}
