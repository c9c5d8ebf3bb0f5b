//! Flushes of one image: one at a time, and all that are asked for meanwhile share the next one.
//!
//! A guest whose programs sync at the same time sends many flushes together, over one connection or several. One that
//! begins after all of them have come does for all, where each by itself would take a thread that waits for the others'.

use std::sync::Arc;

use nbd_img_formats::sync::Mutex;
use nbd_img_formats::workers::{Lane, Workers};
use nbd_img_formats::{BlockDriver, Error, Result};

/// Who is told what came of a flush, on any thread. Where it could not be carried out at all it is dropped instead.
pub type FlushAnswer = Box<dyn FnOnce(Result<()>) + Send>;

/// The flushes of an image.
#[derive(Default)]
pub struct Flushes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: bool,
    /// For the flush after the one that is running.
    waiting: Vec<FlushAnswer>,
}

impl Flushes {
    /// Makes all writes durable that have been answered by now, and then answers.
    pub fn start(
        self: &Arc<Self>,
        driver: &Arc<dyn BlockDriver>,
        workers: &Arc<Workers>,
        answer: FlushAnswer,
    ) {
        {
            let mut state = self.state.lock();
            state.waiting.push(answer);
            if std::mem::replace(&mut state.running, true) {
                return;
            }
        }
        let turn = Turn(Some(Arc::clone(self)));
        let (driver, its_workers) = (Arc::clone(driver), Arc::clone(workers));
        // A job that cannot be run is dropped, and its turn with it.
        drop(workers.spawn(Lane::Write, Box::new(move || turn.run(&driver, &its_workers))));
    }

    /// Does the next flush; returns whether another one is wanted by then.
    fn do_next(&self, driver: &Arc<dyn BlockDriver>) -> bool {
        let mut answers = std::mem::take(&mut self.state.lock().waiting);
        let result = driver.make_durable();
        let last = answers.pop();
        for answer in answers {
            answer(result.as_ref().copied().map_err(Error::again));
        }
        if let Some(last) = last {
            last(result);
        }
        let mut state = self.state.lock();
        state.running = !state.waiting.is_empty();
        state.running
    }
}

/// The right to flush. If it goes unused, or in the midst of a panic, nobody is left waiting for it.
struct Turn(Option<Arc<Flushes>>);

impl Turn {
    fn run(mut self, driver: &Arc<dyn BlockDriver>, workers: &Arc<Workers>) {
        // On this thread as long as more are wanted, which then need not queue behind later writes.
        while self.0.as_ref().is_some_and(|flushes| flushes.do_next(driver)) {
            let driver = Arc::clone(driver);
            drop(workers.spawn(Lane::Write, Box::new(move || driver.tidy())));
        }
        self.0 = None;
        driver.tidy();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(flushes) = self.0.take() {
            let mut state = flushes.state.lock();
            state.running = false;
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            drop(waiting);
        }
    }
}
