//! [`Syncs`]: the syncs and the FUA writes of one file, and when one of them may say that bytes are durable.
//!
//! Linux tells each open description once that written bytes were lost: of two syncs at the same time the
//! first is told, and the second succeeds although what it was to make durable is gone. So success means here
//! that nothing has [failed](Syncs::fail) by then, and that nobody can be about to say that it has:
//!
//! - Syncs of a description run one at a time, so that whoever was told has said so before the next one
//!   begins. Who comes while one runs waits for the next, as that one may have begun too early for his bytes;
//!   all who wait share it.
//! - FUA writes have another description, and run beside each other. One that has succeeded waits until all
//!   have ended that were under way when it returned: only they can have been told in its place. Those that
//!   begin later find nothing of its bytes.
//!
//! Who waits here waits for others that run already, never for one that has still to be given a thread.

use std::io;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex};

/// The syncs and FUA writes of one file.
#[derive(Default)]
pub(super) struct Syncs {
    failed: AtomicBool,
    runs: Mutex<Runs>,
    run_ended: Condvar,
    writes: Mutex<Writes>,
    write_ended: Condvar,
}

/// The syncs of the file itself, counted from 1. One is under way if not as many have ended as have begun.
#[derive(Default)]
struct Runs {
    begun: u64,
    ended: u64,
    /// The last one that failed, and how.
    failure: Option<(u64, i32)>,
    waiting: usize,
}

/// The FUA writes, counted from 0.
#[derive(Default)]
struct Writes {
    begun: u64,
    under_way: Vec<u64>,
}

/// A sync that is under way until this goes.
struct Running<'a> {
    syncs: &'a Syncs,
    number: u64,
    errno: Option<i32>,
}

/// A FUA write that is under way until this goes.
struct Writing<'a> {
    syncs: &'a Syncs,
    number: u64,
}

impl Syncs {
    /// From now on none succeeds. To be called before the sync or the write ends that was told of the loss.
    /// Returns whether it is the first time.
    pub(super) fn fail(&self) -> bool {
        !self.failed.swap(true, Ordering::AcqRel)
    }

    /// Whether one has failed for good.
    pub(super) fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Syncs by `run`, or by that of somebody else that begins after this call.
    pub(super) fn sync(&self, run: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if let Some(mut running) = self.begin_run()? {
            let result = run();
            running.errno = result.as_ref().err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
            drop(running);
            result?;
        }
        self.check()
    }

    /// Calls `write`, a FUA write.
    pub(super) fn write(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let writing = self.begin_write();
        let result = write();
        drop(writing);
        result?;
        self.wait_for_writes();
        self.check()
    }

    fn check(&self) -> io::Result<()> {
        if self.is_failed() { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    /// Waits for its turn. `None`: somebody else's run has succeeded meanwhile that began after this call.
    fn begin_run(&self) -> io::Result<Option<Running<'_>>> {
        let mut runs = self.runs.lock();
        let wanted = runs.begun + 1;
        while runs.begun != runs.ended {
            runs.waiting += 1;
            self.run_ended.wait(&mut runs);
            runs.waiting -= 1;
            if runs.ended >= wanted {
                return match runs.failure {
                    Some((number, errno)) if number >= wanted => Err(io::Error::from_raw_os_error(errno)),
                    Some(_) | None => Ok(None),
                };
            }
        }
        runs.begun = wanted;
        // What unwinds has made nothing durable.
        Ok(Some(Running { syncs: self, number: wanted, errno: Some(libc::EIO) }))
    }

    fn begin_write(&self) -> Writing<'_> {
        let mut writes = self.writes.lock();
        let number = writes.begun;
        writes.begun += 1;
        writes.under_way.push(number);
        Writing { syncs: self, number }
    }

    /// Waits until all FUA writes have ended that have begun by now.
    fn wait_for_writes(&self) {
        let mut writes = self.writes.lock();
        let end = writes.begun;
        while writes.under_way.iter().any(|number| *number < end) {
            self.write_ended.wait(&mut writes);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut runs = self.syncs.runs.lock();
        runs.ended = self.number;
        if let Some(errno) = self.errno {
            runs.failure = Some((self.number, errno));
        }
        let somebody_waits = runs.waiting > 0;
        drop(runs);
        if somebody_waits {
            self.syncs.run_ended.notify_all();
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.syncs.writes.lock().under_way.retain(|number| *number != self.number);
        self.syncs.write_ended.notify_all();
    }
}

#[cfg(test)]
#[path = "syncs_tests.rs"]
mod tests;
