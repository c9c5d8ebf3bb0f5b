//! Threads that may wait, so that a session's thread need not.
//!
//! Each image has its own set, in lanes: a throttled write never holds up a read, nor a slow disk the
//! decompression. Threads start when a job finds none idle, and end when idle for a while.
//!
//! A job may wait for one of another lane that has not been given a thread yet only in this direction: those
//! of [`Lane::Write`] for those of [`Lane::StorageWrite`]. A planned write holds its part of the mapping until
//! its bytes are in the storage, and drivers' calls wait for that part without a limit, on all their threads if
//! it comes to that. Operations of a storage wait for the disk only, and so for nobody else's thread. A read that
//! is planned holds nothing that anybody waits for, so reads of storages share a lane with the drivers' calls.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::sync::{Arc, Condvar, Mutex, available_parallelism, thread};

mod sequence;

pub use sequence::Sequence;

/// Most threads of each lane that waits for the disk: what a disk of today needs to be busy
/// (16 gave the best cold reads in the prototype). Our choice.
const IO_THREADS_MAX: usize = 16;

/// How long an idle thread stays. Our choice: long enough for a bursty guest, short enough that an idle
/// server has only the threads it needs.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// What a job mostly waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// The disk, reading.
    Read,
    /// The disk, and what other requests hold: a driver's calls that write, sync or zero.
    Write,
    /// The disk and nothing else: a storage's own writes and syncs.
    StorageWrite,
    /// The processor.
    Compute,
}

/// A piece of work.
pub type Job = Box<dyn FnOnce() + Send>;

/// The threads of one image.
pub struct Workers {
    lanes: [Arc<LaneState>; 4],
}

struct LaneState {
    name: String,
    threads_max: usize,
    queue: Mutex<LaneQueue>,
    wake: Condvar,
}

#[derive(Default)]
struct LaneQueue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Workers {
    /// Workers without threads yet; `name` is what their threads will be called.
    pub fn new(name: &str) -> Self {
        let cores = available_parallelism().map_or(1, usize::from);
        Workers {
            lanes: [("r", IO_THREADS_MAX), ("w", IO_THREADS_MAX), ("W", IO_THREADS_MAX), ("c", cores)]
                .map(|(lane, threads_max)| Arc::new(LaneState::new(format!("{lane}-{name}"), threads_max))),
        }
    }

    /// Runs `job` on a thread of `lane`, as soon as one is free. When no thread can be had at all it
    /// returns a job that has not been run (not always the same one, if others come at the same time);
    /// it must be run or dropped. A job that is dropped instead of being run has to answer on its drop.
    pub fn spawn(&self, lane: Lane, job: Job) -> Result<(), Job> {
        LaneState::spawn(self.lane(lane), job)
    }

    fn lane(&self, lane: Lane) -> &Arc<LaneState> {
        match lane {
            Lane::Read => &self.lanes[0],
            Lane::Write => &self.lanes[1],
            Lane::StorageWrite => &self.lanes[2],
            Lane::Compute => &self.lanes[3],
        }
    }
}

impl Drop for Workers {
    /// Jobs that were accepted still run; the threads end when there are no more.
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.queue.lock().closed = true;
            lane.wake.notify_all();
        }
    }
}

impl LaneState {
    fn new(name: String, threads_max: usize) -> Self {
        LaneState { name, threads_max, queue: Mutex::new(LaneQueue::default()), wake: Condvar::new() }
    }

    fn spawn(self: &Arc<Self>, job: Job) -> Result<(), Job> {
        let mut queue = self.queue.lock();
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.threads >= self.threads_max {
            drop(queue);
            self.wake.notify_one();
            return Ok(());
        }
        queue.threads += 1;
        drop(queue);
        let state = Arc::clone(self);
        // 15 bytes is all that the kernel shows of a thread's name.
        let name = self.name.chars().take(15).collect();
        if thread::Builder::new().name(name).spawn(move || state.work()).is_ok() {
            return Ok(());
        }
        let mut queue = self.queue.lock();
        queue.threads -= 1;
        if queue.threads > 0 {
            return Ok(());
        }
        // Nobody is there to run it; with the lock let go in between it may have been run already. Jobs
        // that counted on this thread would wait for ever.
        let mut stranded = std::mem::take(&mut queue.jobs);
        drop(queue);
        stranded.pop_back().map_or(Ok(()), Err)
    }

    fn work(&self) {
        while let Some(job) = self.next_job() {
            run(job, &self.name);
        }
    }

    /// Whether jobs wait for a thread, and none can be had for them.
    fn is_waited_for(&self) -> bool {
        let queue = self.queue.lock();
        queue.threads >= self.threads_max && queue.jobs.len() > queue.idle
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                queue.threads -= 1;
                return None;
            }
            queue.idle += 1;
            let waited = self.wake.wait_for(&mut queue, IDLE_TIME);
            queue.idle -= 1;
            if waited.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return None;
            }
        }
    }
}

/// A job answers its submitter itself, on unwinding too; the thread goes on.
fn run(job: Job, lane: &str) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!(lane, "a job panicked; its request is answered with an error");
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn many_jobs_run_once_each_and_a_panic_hurts_nobody() {
        let workers = Workers::new("test");
        let (tx, rx) = mpsc::channel();
        for i in 0..1000 {
            let tx = tx.clone();
            let job: Job = Box::new(move || {
                assert!(i != 500, "the panic of this test");
                tx.send(i).unwrap();
            });
            assert!(workers.spawn(Lane::Read, job).is_ok());
        }
        drop((tx, workers));
        let mut seen: Vec<i32> = rx.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..1000).filter(|i| *i != 500).collect::<Vec<_>>());
    }

    #[test]
    fn a_blocked_lane_does_not_hold_up_another() {
        let workers = Workers::new("test");
        let (block, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        for _ in 0..IO_THREADS_MAX * 2 {
            let blocked = Arc::clone(&blocked);
            let job: Job = Box::new(move || assert!(blocked.lock().recv().is_err()));
            assert!(workers.spawn(Lane::Write, job).is_ok());
        }
        let (tx, rx) = mpsc::channel();
        assert!(workers.spawn(Lane::Read, Box::new(move || tx.send(()).unwrap())).is_ok());
        rx.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(block);
    }
}
