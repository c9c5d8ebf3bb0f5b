//! One thread of an export: its sessions, its queue of answers, and the way from one to the other.
//!
//! Everything here runs on the shard's own thread (`Rc`, `RefCell`); the queue is the only door for
//! other threads. No borrow is held across an await.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use nbd_img_formats::storage::{BufPool, Completed, IoBuf, Queue};
use nbd_img_formats::workers::{Job, Lane, Sequence, Workers};
use nbd_img_formats::{BlockDriver, Effort, Error, ErrorKind, GuestRange, Result};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::budget::Budget;
use super::pending::{Pending, PendingSlots};
use super::poll::Activity;
use super::registration::QueueFd;
use super::submit::Held;
use super::times::Times;
use super::watch::WriteWatch;
use crate::export::{Export, Served};

/// How often idle sessions are asked to give their buffers back. Our choice.
const SWEEP_TIME: Duration = Duration::from_millis(500);

/// What the sessions of one thread share.
pub struct Shard {
    /// Whose threads do what waits.
    workers: Arc<Workers>,
    /// The memory of all sessions of the server.
    pub budget: Arc<Budget>,
    /// Where submitted operations are answered.
    pub queue: Arc<Queue>,
    /// Buffers for submitted operations.
    pub pool: Arc<BufPool>,
    /// When writes are handed off; shared by all shards of the export.
    pub watch: Arc<WriteWatch>,
    /// How long its sessions wait for their clients.
    pub times: Times,
    /// Which sessions worked last.
    pub activity: Activity,
    routes: RefCell<Routes>,
    pub(super) held: RefCell<Held>,
    pub(super) held_some: Notify,
    next_session: Cell<u64>,
    cells: RefCell<Vec<Weak<SessionCell>>>,
    draining: Cell<bool>,
    sweep_wanted: Notify,
    sweep_pending: Cell<bool>,
}

/// Where answers go; an index into `all` is the token of one. Each is used once at a time.
#[derive(Default)]
struct Routes {
    all: Vec<Option<Route>>,
    free: Vec<usize>,
}

struct Route {
    cell: Rc<SessionCell>,
    slot: usize,
    part: usize,
}

/// The part of a session that answers find, and that outlives its task.
pub struct SessionCell {
    /// Its number on the shard.
    pub id: u64,
    /// What it serves: the shard's export, or one that only this session has.
    pub export: Arc<Export>,
    /// Wakes the session: something is ready, or it is to drain or to give buffers back.
    pub wake: Notify,
    /// What waits.
    pub pending: RefCell<PendingSlots>,
    /// What has ended and wants its reply.
    pub ready: RefCell<VecDeque<Pending>>,
    /// The session's task has ended: nobody wants replies any more.
    pub gone: Cell<bool>,
    /// Set by the sweep, cleared by the session whenever it works.
    pub idle: Cell<bool>,
    /// The session sleeps on buffers that the sweep should ask for.
    pub holds_memory: Cell<bool>,
    /// Keeps what the client was told of, as long as anything of it is under way. Dropped last.
    _served: Served,
}

impl Shard {
    /// A shard whose operations fall back on the export's workers.
    pub fn new(
        export: &Export,
        budget: Arc<Budget>,
        watch: Arc<WriteWatch>,
        times: Times,
    ) -> io::Result<Rc<Self>> {
        let queue = Arc::new(Queue::new(Arc::clone(export.workers()), export.aio())?);
        Ok(Rc::new(Shard {
            workers: Arc::clone(export.workers()),
            budget,
            queue,
            pool: BufPool::new(),
            watch,
            times,
            activity: Activity::new(),
            next_session: Cell::new(0),
            routes: RefCell::default(),
            held: RefCell::default(),
            held_some: Notify::new(),
            cells: RefCell::default(),
            draining: Cell::new(false),
            sweep_wanted: Notify::new(),
            sweep_pending: Cell::new(false),
        }))
    }

    /// A cell for a new session that serves `export`.
    pub fn add_session(&self, export: Arc<Export>, served: Served) -> Rc<SessionCell> {
        let id = self.next_session.get();
        self.next_session.set(id.wrapping_add(1));
        let cell = Rc::new(SessionCell {
            id,
            export,
            wake: Notify::new(),
            pending: RefCell::default(),
            ready: RefCell::default(),
            gone: Cell::new(false),
            idle: Cell::new(false),
            holds_memory: Cell::new(false),
            _served: served,
        });
        let mut cells = self.cells.borrow_mut();
        cells.retain(|cell| cell.strong_count() > 0);
        cells.push(Rc::downgrade(&cell));
        cell
    }

    /// Whether sessions are to end when they have answered what they received.
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Tells all sessions to end so.
    pub fn drain(&self) {
        self.draining.set(true);
        self.for_each_cell(|cell| cell.wake.notify_one());
    }

    /// A token whose answer goes to part `part` of what waits in `slot` of `cell`.
    pub fn token(&self, cell: &Rc<SessionCell>, slot: usize, part: usize) -> u64 {
        self.routes.borrow_mut().add(Route { cell: Rc::clone(cell), slot, part })
    }

    /// Calls the driver of `export` on a worker; its answer comes to the queue under `token`, whatever happens.
    pub fn call<F>(&self, export: &Export, lane: Lane, token: u64, buf: IoBuf, work: F)
    where
        F: FnOnce(&Arc<dyn BlockDriver>, &mut IoBuf) -> Result<usize> + Send + 'static,
    {
        // A job that cannot be run is dropped, and its answer says so.
        drop(self.workers.spawn(lane, self.job(export, lane, token, buf, work)));
    }

    /// Has `work` done behind what was given to `writes` before, here where there is no worker for it; the answer comes to
    /// the queue under `token`, whatever happens.
    pub fn call_in_turn<F>(&self, writes: &Arc<Sequence>, token: u64, work: F)
    where
        F: FnOnce() -> Result<usize> + Send + 'static,
    {
        let answer = self.answer(token, IoBuf::default());
        let job = Box::new(move || {
            let mut answer = answer;
            answer.result = Some(work());
        });
        if let Err(job) = writes.push(job) {
            job();
        }
    }

    /// The threads that may wait.
    pub fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Flushes `export`; its answer comes to the queue under `token`, whatever happens.
    pub fn flush(&self, export: &Export, token: u64) {
        let answer = self.answer(token, IoBuf::default());
        export.flush(Box::new(move |result| {
            let mut answer = answer;
            answer.result = Some(result.map(|()| 0));
        }));
    }

    fn job<F>(&self, export: &Export, lane: Lane, token: u64, buf: IoBuf, work: F) -> Job
    where
        F: FnOnce(&Arc<dyn BlockDriver>, &mut IoBuf) -> Result<usize> + Send + 'static,
    {
        let answer = self.answer(token, buf);
        let driver = Arc::clone(export.driver());
        Box::new(move || {
            let mut answer = answer;
            if let Some(mut buf) = answer.buf.take() {
                let result = work(&driver, &mut buf);
                answer.buf = Some(buf);
                answer.result = Some(result);
            }
            drop(answer);
            if lane == Lane::Write {
                driver.tidy();
            }
        })
    }

    /// What is answered under `token` as soon as it goes: an error, unless somebody has said what.
    pub(super) fn answer(&self, token: u64, buf: IoBuf) -> Answer {
        Answer { queue: Arc::clone(&self.queue), token, buf: Some(buf), result: None }
    }

    /// Decompresses the clusters of a range of `export` on a thread for the processor's work, or on one that may wait where
    /// the disk has to be waited for. `done` goes afterwards, whatever came of it.
    pub fn warm<T: Send + 'static>(&self, export: &Export, range: GuestRange, done: T) {
        let driver = Arc::clone(export.driver());
        let workers = Arc::clone(&self.workers);
        let job = Box::new(move || {
            if !matches!(driver.warm(range, Effort::Compute), Ok(false)) {
                drop(done);
                return;
            }
            let waiting = Box::new(move || {
                let _ = driver.warm(range, Effort::Wait);
                drop(done);
            });
            drop(workers.spawn(Lane::Read, waiting));
        });
        drop(self.workers.spawn(Lane::Compute, job));
    }

    /// Asks that idle sessions be looked for.
    pub fn want_sweep(&self) {
        if !self.sweep_pending.replace(true) {
            self.sweep_wanted.notify_one();
        }
    }

    /// Brings answers from the queue, which `fd` watches, to their sessions, for ever.
    pub async fn reap(self: Rc<Self>, fd: AsyncFd<QueueFd>) -> io::Result<Infallible> {
        let mut completed = Vec::new();
        loop {
            fd.readable().await?.clear_ready();
            self.queue.drain(&mut completed);
            for answer in completed.drain(..) {
                self.route(answer);
            }
        }
    }

    /// Tells sessions that did nothing for a while to give their buffers back, for ever. Sleeps while
    /// no session has any.
    pub async fn sweep(self: Rc<Self>) {
        loop {
            self.sweep_wanted.notified().await;
            self.for_each_cell(|cell| cell.idle.set(true));
            tokio::time::sleep(SWEEP_TIME).await;
            self.sweep_pending.set(false);
            self.pool.clear();
            let mut busy = false;
            self.for_each_cell(|cell| match (cell.holds_memory.get(), cell.idle.get()) {
                (false, _) => {}
                (true, true) => cell.wake.notify_one(),
                (true, false) => busy = true,
            });
            if busy {
                self.want_sweep();
            }
        }
    }

    fn route(&self, answer: Completed) {
        let Some(route) = self.routes.borrow_mut().take(answer.token) else {
            tracing::error!(
                token = answer.token,
                "an answer without a request; this is a defect of the server"
            );
            return;
        };
        let cell = route.cell;
        let done = {
            let mut pending = cell.pending.borrow_mut();
            let ended = pending
                .get_mut(route.slot)
                .is_some_and(|request| request.complete(route.part, answer, cell.export.driver()));
            if ended { pending.remove(route.slot) } else { None }
        };
        if let Some(done) = done
            && !cell.gone.get()
        {
            cell.ready.borrow_mut().push_back(done);
            cell.wake.notify_one();
        }
    }

    /// Waits for what the kernel has still to answer; to be called before the thread ends.
    pub fn wind_up(&self) {
        self.submit_held();
        let mut completed = Vec::new();
        self.queue.wind_up(&mut completed);
        for answer in completed {
            self.route(answer);
        }
    }

    fn for_each_cell(&self, mut act: impl FnMut(&SessionCell)) {
        for cell in self.cells.borrow().iter().filter_map(Weak::upgrade) {
            act(&cell);
        }
    }
}

impl Routes {
    fn add(&mut self, route: Route) -> u64 {
        let index = self.free.pop().unwrap_or(self.all.len());
        match self.all.get_mut(index) {
            Some(place) => *place = Some(route),
            None => self.all.push(Some(route)),
        }
        index as u64
    }

    fn take(&mut self, token: u64) -> Option<Route> {
        let index = usize::try_from(token).ok()?;
        let route = self.all.get_mut(index)?.take()?;
        self.free.push(index);
        Some(route)
    }
}

/// Answers exactly once, also when the job panics or never runs.
pub(super) struct Answer {
    queue: Arc<Queue>,
    token: u64,
    buf: Option<IoBuf>,
    result: Option<Result<usize>>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        let result = self.result.take().unwrap_or_else(|| {
            Err(Error::new(
                ErrorKind::Io,
                "the request could not be carried out: no thread, or a defect of the server",
            ))
        });
        self.queue.complete(Completed {
            token: self.token,
            buf: self.buf.take().unwrap_or_default(),
            result,
        });
    }
}
