//! Jobs that run one after the other on a lane, whoever pushes how many.
//!
//! A thread that has one job of a sequence goes on with the next, so that only the first of many wakes anybody: what a hop
//! to another thread costs is paid once for all that comes while the thread is busy. It never waits for more, and lets
//! others of its lane go first when they wait for a thread.

use std::collections::VecDeque;

use super::{Job, Lane, LaneState, Workers, run};
use crate::sync::{Arc, Mutex};

/// One after the other, in the order in which they were pushed.
pub struct Sequence {
    lane: Arc<LaneState>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Somebody has the turn, and will look for more.
    running: bool,
}

/// Who has it runs the jobs. If it is dropped before, so are they.
struct Turn {
    sequence: Arc<Sequence>,
    over: bool,
}

impl Sequence {
    /// An empty one, whose jobs run on `lane`.
    pub fn new(workers: &Workers, lane: Lane) -> Arc<Self> {
        Arc::new(Sequence { lane: Arc::clone(workers.lane(lane)), state: Mutex::default() })
    }

    /// Runs `job` behind all that were pushed before. As with [`Workers::spawn`], a job that is returned has not been run,
    /// because no thread could be had; it must be run or dropped, and others may depend on it.
    pub fn push(self: &Arc<Self>, job: Job) -> Result<(), Job> {
        {
            let mut state = self.state.lock();
            state.jobs.push_back(job);
            if std::mem::replace(&mut state.running, true) {
                return Ok(());
            }
        }
        Turn { sequence: Arc::clone(self), over: false }.spawn()
    }

    fn next_job(&self) -> Option<Job> {
        let mut state = self.state.lock();
        let job = state.jobs.pop_front();
        state.running = job.is_some();
        job
    }
}

impl Turn {
    fn spawn(self) -> Result<(), Job> {
        let lane = Arc::clone(&self.sequence.lane);
        LaneState::spawn(&lane, Box::new(move || self.run()))
    }

    fn run(mut self) {
        while let Some(job) = self.sequence.next_job() {
            run(job, &self.sequence.lane.name);
            if self.sequence.lane.is_waited_for() {
                if let Err(job) = self.spawn() {
                    job();
                }
                return;
            }
        }
        self.over = true;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.over {
            let stranded = {
                let mut state = self.sequence.state.lock();
                state.running = false;
                std::mem::take(&mut state.jobs)
            };
            // What they do on their drop is nobody's business here.
            drop(stranded);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(20);

    fn push(sequence: &Arc<Sequence>, job: impl FnOnce() + Send + 'static) {
        assert!(sequence.push(Box::new(job)).is_ok());
    }

    #[test]
    fn jobs_run_one_by_one_in_order_and_a_panic_hurts_nobody() {
        let workers = Workers::new("test");
        let sequence = Sequence::new(&workers, Lane::Write);
        let (tx, rx) = mpsc::channel();
        let busy = Arc::new(Mutex::new(()));
        for i in 0..2000 {
            let (tx, busy) = (tx.clone(), Arc::clone(&busy));
            push(&sequence, move || {
                let alone = busy.try_lock();
                assert!(i != 700, "the panic of this test");
                tx.send((i, alone.is_some())).unwrap();
            });
            if i % 97 == 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        drop((tx, workers));
        let seen: Vec<(i32, bool)> = rx.iter().collect();
        assert_eq!(seen, (0..2000).filter(|i| *i != 700).map(|i| (i, true)).collect::<Vec<_>>());
    }

    #[test]
    fn who_waits_for_a_thread_of_the_lane_gets_one_before_a_long_sequence_is_over() {
        let workers = Workers::new("test");
        let endless: Vec<_> = (0..super::super::IO_THREADS_MAX)
            .map(|_| {
                let sequence = Sequence::new(&workers, Lane::Write);
                again(&sequence);
                sequence
            })
            .collect();
        let (tx, rx) = mpsc::channel();
        for i in 0..3 {
            let tx = tx.clone();
            assert!(workers.spawn(Lane::Write, Box::new(move || tx.send(i).unwrap())).is_ok());
        }
        for _ in 0..3 {
            rx.recv_timeout(LONG).expect("the sequences let nobody through");
        }
        drop(endless);
    }

    /// A sequence that is never over, as long as anybody holds it.
    fn again(sequence: &Arc<Sequence>) {
        let weak = Arc::downgrade(sequence);
        push(sequence, move || {
            std::thread::sleep(Duration::from_micros(100));
            // The turn itself holds it, too.
            if let Some(sequence) = weak.upgrade().filter(|sequence| Arc::strong_count(sequence) > 2) {
                again(&sequence);
            }
        });
    }

    #[test]
    fn jobs_of_a_turn_that_is_dropped_are_dropped_and_the_next_push_runs() {
        let workers = Workers::new("test");
        let sequence = Sequence::new(&workers, Lane::Write);
        let (tx, rx) = mpsc::channel::<i32>();
        sequence.state.lock().running = true;
        for i in 0..3 {
            let tx = tx.clone();
            push(&sequence, move || tx.send(i).unwrap());
        }
        drop(Turn { sequence: Arc::clone(&sequence), over: false });
        push(&sequence, move || tx.send(9).unwrap());
        assert_eq!(rx.recv_timeout(LONG), Ok(9));
        assert!(rx.recv_timeout(LONG).is_err(), "the dropped jobs are gone, and what they held");
    }
}

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::sync::{Condvar, thread};

    /// What ran, and who waits for all of it.
    #[derive(Default)]
    struct Ran {
        jobs: Mutex<Vec<u32>>,
        one_more: Condvar,
        alone: Mutex<()>,
    }

    impl Ran {
        fn job(self: &Arc<Self>, number: u32) -> Job {
            let ran = Arc::clone(self);
            Box::new(move || {
                let alone = (number < 100).then(|| ran.alone.try_lock().expect("two of a sequence at once"));
                thread::yield_now();
                drop(alone);
                ran.jobs.lock().push(number);
                ran.one_more.notify_all();
            })
        }

        fn wait_until(&self, is_so: impl Fn(&[u32]) -> bool) -> Vec<u32> {
            let mut jobs = self.jobs.lock();
            while !is_so(&jobs) {
                self.one_more.wait(&mut jobs);
            }
            jobs.clone()
        }
    }

    /// Run with `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --lib interleavings`.
    #[test]
    fn every_job_runs_once_in_order_on_a_lane_that_others_want() {
        let scene = || {
            let lane = Arc::new(LaneState::new("test".into(), 1));
            let sequence = Arc::new(Sequence { lane: Arc::clone(&lane), state: Mutex::default() });
            let ran = Arc::new(Ran::default());
            let pushers = [0, 10].map(|first| {
                let (sequence, ran) = (Arc::clone(&sequence), Arc::clone(&ran));
                thread::spawn(move || {
                    for number in first..first + 3 {
                        assert!(sequence.push(ran.job(number)).is_ok());
                        // One of them pushes whenever a turn may be ending.
                        ran.wait_until(|jobs| first == 0 || jobs.contains(&number));
                    }
                })
            });
            assert!(LaneState::spawn(&lane, ran.job(100)).is_ok());
            for pusher in pushers {
                assert!(pusher.join().is_ok());
            }
            let mut jobs = ran.wait_until(|jobs| jobs.len() == 7);
            for first in [0, 10] {
                let of_one: Vec<u32> = jobs.iter().copied().filter(|job| job / 10 * 10 == first).collect();
                assert_eq!(of_one, [first, first + 1, first + 2]);
            }
            jobs.sort_unstable();
            assert_eq!(jobs, [0, 1, 2, 10, 11, 12, 100]);
            lane.queue.lock().closed = true;
            lane.wake.notify_all();
        };
        shuttle::check_random(scene, 3000);
        shuttle::check_pct(scene, 3000, 3);
    }
}
