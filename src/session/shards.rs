//! The threads of one export, and how connections get to them.
//!
//! A shard is one thread with a current-thread runtime. A connection goes to the one with the fewest sessions;
//! shards start when all of them have some, up to the number of cores. A stalled export stalls nobody but itself.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nbd_img_formats::open::SizeChange;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use super::budget::Budget;
use super::engine::Session;
use super::registration::watch_queue;
use super::shard::Shard;
use super::times::Times;
use super::watch::WriteWatch;
use crate::export::{Export, Resized, Served};
use crate::nbd::negotiate::Agreed;
use crate::transport::Stream;

/// How exactly a session's short sleeps end, in nanoseconds. Our choice: half of the shortest.
const TIMER_SLACK_NS: u64 = 1000;

/// A negotiated connection on its way to the shard that will serve it.
pub struct Connection {
    /// The socket, non-blocking.
    pub stream: Stream,
    /// What it is served: the export of the shards, or one of its own on the same image.
    pub export: Arc<Export>,
    /// Its claim on that.
    pub served: Served,
    /// What was negotiated.
    pub agreed: Agreed,
    /// Bytes that came behind the negotiation's last option.
    pub leftover: Vec<u8>,
    /// Who it is, for the log.
    pub peer: String,
    /// Dropped when the session has ended: frees its slot.
    pub permit: Box<dyn Send>,
}

/// The threads that serve one export. May be used from any thread.
pub struct Shards {
    export: Arc<Export>,
    budget: Arc<Budget>,
    watch: Arc<WriteWatch>,
    times: Times,
    threads: Mutex<Threads>,
    threads_max: usize,
    /// Number of sessions that have not ended.
    active: Arc<watch::Sender<usize>>,
}

#[derive(Default)]
struct Threads {
    all: Vec<ShardThread>,
    draining: bool,
}

struct ShardThread {
    sender: mpsc::UnboundedSender<Message>,
    /// Number of its sessions that have not ended.
    sessions: Arc<AtomicUsize>,
}

enum Message {
    Serve(Box<Connection>, Active),
    Drain,
}

impl ShardThread {
    fn sessions(&self) -> usize {
        // It only says where the next one goes: nothing else is read by it.
        self.sessions.load(Ordering::Relaxed)
    }
}

impl Threads {
    fn drop_ended(&mut self) {
        self.all.retain(|thread| !thread.sender.is_closed());
    }
}

/// Counts a session for as long as it lives: of the export, and of its thread.
struct Active {
    all: Arc<watch::Sender<usize>>,
    of_thread: Arc<AtomicUsize>,
}

impl Active {
    fn new(all: &Arc<watch::Sender<usize>>, of_thread: &Arc<AtomicUsize>) -> Self {
        all.send_modify(|count| *count += 1);
        of_thread.fetch_add(1, Ordering::Relaxed);
        Active { all: Arc::clone(all), of_thread: Arc::clone(of_thread) }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.of_thread.fetch_sub(1, Ordering::Relaxed);
        self.all.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Shards {
    /// No threads yet; sessions take their memory from `budget`, and wait for their
    /// clients as `times` says.
    pub fn new(export: Arc<Export>, budget: Arc<Budget>, times: Times) -> Arc<Self> {
        Arc::new(Shards {
            export,
            budget,
            watch: Arc::default(),
            times,
            threads: Mutex::default(),
            threads_max: thread::available_parallelism().map_or(1, usize::from),
            active: Arc::new(watch::Sender::new(0)),
        })
    }

    /// What is served.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Number of sessions that have not ended.
    pub fn active_count(&self) -> usize {
        *self.active.borrow()
    }

    /// What another connection is to be served; see [`Export::for_client`]. What waits for the disk is done by a worker.
    pub async fn export_for_client(&self) -> Result<Arc<Export>> {
        if !self.export.is_per_client() {
            return Ok(Arc::clone(&self.export));
        }
        let export = Arc::clone(&self.export);
        self.on_worker(move || export.for_client()).await
    }

    /// Changes the disk's size; see [`Export::resize`]. What waits for the disk is done by a worker.
    pub async fn resize(&self, change: Option<SizeChange>, shrink: bool) -> Result<Resized> {
        let export = Arc::clone(&self.export);
        self.on_worker(move || export.resize(change, shrink)).await
    }

    /// Runs `work` where it may wait, and returns what came of it. If the caller gives up waiting, it runs to its end.
    async fn on_worker<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let job = Box::new(move || {
            // Nobody waits any more if this fails.
            let _ = answer.send(work());
        });
        match self.export.workers().spawn(Lane::Write, job) {
            Ok(()) => {}
            Err(job) => job(),
        }
        answered.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "the work on the image did not end")))
    }

    /// Gives a connection to a shard. Fails, and closes the connection, when no thread can be had or the
    /// export is draining.
    pub fn hand_over(self: &Arc<Self>, connection: Connection) -> io::Result<()> {
        let mut threads = self.threads.lock();
        threads.drop_ended();
        let all_have_some = threads.all.iter().all(|thread| thread.sessions() > 0);
        if all_have_some && threads.all.len() < self.threads_max && !threads.draining {
            match self.start_thread(threads.all.len()) {
                Ok(thread) => threads.all.push(thread),
                Err(error) if threads.all.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "no further thread for the export; its connections share those it has");
                }
            }
        }
        self.give(&mut threads, Box::new(connection))
    }

    /// Gives it to the thread with the fewest sessions. Fails when there is none, and when the export is draining.
    fn give(&self, threads: &mut Threads, mut connection: Box<Connection>) -> io::Result<()> {
        if threads.draining {
            return Err(io::Error::other("the export is shutting down"));
        }
        while let Some(thread) = threads.all.iter().min_by_key(|thread| thread.sessions()) {
            let active = Active::new(&self.active, &thread.sessions);
            let Err(unsent) = thread.sender.send(Message::Serve(connection, active)) else { return Ok(()) };
            let Message::Serve(back, _) = unsent.0 else { break };
            connection = back;
            threads.drop_ended();
        }
        Err(io::Error::other("the export's threads have ended"))
    }

    /// From now on no connection is taken; sessions answer what they have received, then end.
    pub fn drain(&self) {
        let mut threads = self.threads.lock();
        threads.draining = true;
        for thread in &threads.all {
            // A thread that has ended has no sessions.
            let _ = thread.sender.send(Message::Drain);
        }
    }

    /// Returns when no session is left.
    pub async fn wait_idle(&self) {
        let mut active = self.active.subscribe();
        // The sender lives as long as `self`: this cannot fail.
        let _ = active.wait_for(|count| *count == 0).await;
    }

    /// Flushes and closes the image on a worker, and returns what came of it. If the caller gives up
    /// waiting, the worker goes on.
    pub async fn close(&self) -> Result<()> {
        let driver = Arc::clone(self.export.driver());
        self.on_worker(move || driver.close()).await
    }

    fn start_thread(self: &Arc<Self>, index: usize) -> io::Result<ShardThread> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (export, budget, watch) =
            (Arc::clone(&self.export), Arc::clone(&self.budget), Arc::clone(&self.watch));
        let (times, shards) = (self.times, Arc::downgrade(self));
        let name = format!("s{index}-{}", export.name()).chars().take(15).filter(|c| *c != '\0').collect();
        thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = run_shard(|| Shard::new(&export, budget, watch, times), &mut receiver) {
                tracing::error!(%error, "a thread of an export ended; its sessions with it");
                if let Some(shards) = shards.upgrade() {
                    shards.hand_on(receiver);
                }
            }
        })?;
        Ok(ShardThread { sender, sessions: Arc::default() })
    }

    /// What a thread was given that ended before it began to serve it, as one does that cannot get its descriptors: others
    /// get it. No thread is started for that, which would end in the same way.
    fn hand_on(&self, mut receiver: mpsc::UnboundedReceiver<Message>) {
        receiver.close();
        while let Ok(message) = receiver.try_recv() {
            let Message::Serve(connection, _active) = message else { continue };
            let mut threads = self.threads.lock();
            threads.drop_ended();
            if let Err(error) = self.give(&mut threads, connection) {
                tracing::warn!(%error, "a connection is closed: no thread takes it");
            }
        }
    }
}

fn run_shard(
    make: impl FnOnce() -> io::Result<std::rc::Rc<Shard>>,
    receiver: &mut mpsc::UnboundedReceiver<Message>,
) -> io::Result<()> {
    // Else the kernel adds 50 us to a sleep (prctl(2), PR_SET_TIMERSLACK). A failure only costs speed.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(TIMER_SLACK_NS));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let shard = make()?;
        let answers = watch_queue(&shard.queue)?;
        let mut reaper = tokio::task::spawn_local(std::rc::Rc::clone(&shard).reap(answers));
        let sweeper = tokio::task::spawn_local(std::rc::Rc::clone(&shard).sweep());
        let submitter = tokio::task::spawn_local(std::rc::Rc::clone(&shard).submit_leftovers());
        loop {
            let message = tokio::select! {
                message = receiver.recv() => message,
                // Without it no answer would ever come: better to hang up than to let the clients wait.
                ended = &mut reaper => return Err(ended.map_or_else(io::Error::other, |ended| match ended {
                    Ok(never) => match never {},
                    Err(error) => error,
                })),
            };
            match message {
                Some(Message::Serve(connection, active)) => {
                    let shard = std::rc::Rc::clone(&shard);
                    tokio::task::spawn_local(async move {
                        Session::serve(shard, *connection).await;
                        drop(active);
                    });
                }
                Some(Message::Drain) => shard.drain(),
                None => break,
            }
        }
        submitter.abort();
        sweeper.abort();
        reaper.abort();
        shard.wind_up();
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::ExportSpec;
    use crate::nbd::reply::ReplyForm;
    use nbd_img_formats::raw::{RawDriver, RawOptions};
    use nbd_img_formats::storage::MemoryStorage;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn shards() -> Arc<Shards> {
        let driver = RawDriver::open(MemoryStorage::new(4096).unwrap(), RawOptions::default()).unwrap();
        let export = Export::of_driver(&ExportSpec::default(), driver).unwrap();
        // Without polls: those of a process are counted, and other tests count on theirs.
        let times = Times { poll: std::time::Duration::ZERO, ..Times::default() };
        Shards::new(export, Budget::new(1 << 20), times)
    }

    fn connection(shards: &Shards) -> (Connection, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let agreed = Agreed {
            export: String::new(),
            info: shards.export().info(),
            form: ReplyForm::Simple,
            contexts: Vec::new(),
            block_size_asked: false,
            no_zeroes: true,
        };
        let stream = Stream::Unix(there);
        let permit = Box::new(());
        let export = Arc::clone(shards.export());
        let (served, peer) = (export.serve(4096).unwrap(), "test".to_owned());
        (Connection { stream, export, served, agreed, leftover: Vec::new(), peer, permit }, here)
    }

    #[test]
    fn a_thread_that_has_ended_is_replaced() {
        let shards = shards();
        let ended = ShardThread { sender: mpsc::unbounded_channel().0, sessions: Arc::default() };
        shards.threads.lock().all.push(ended);
        for _ in 0..8 {
            let (connection, mut client) = connection(&shards);
            shards.hand_over(connection).unwrap();
            // A read of the first byte.
            let mut request = [0; 28];
            request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            request[27] = 1;
            io::Write::write_all(&mut client, &request).unwrap();
            client.read_exact(&mut [0; 17]).unwrap();
        }
    }

    #[test]
    fn a_connection_goes_where_the_fewest_are() {
        let shards = Arc::new(Shards { threads_max: 3, ..Arc::into_inner(shards()).unwrap() });
        let sessions = || -> Vec<_> { shards.threads.lock().all.iter().map(ShardThread::sessions).collect() };
        let serve = || {
            let (connection, client) = connection(&shards);
            shards.hand_over(connection).unwrap();
            client
        };
        let settled = |want: &[usize]| {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while sessions() != want {
                assert!(std::time::Instant::now() < deadline, "{:?} instead of {want:?}", sessions());
                thread::yield_now();
            }
        };
        // One after the other has no need of a second thread.
        for _ in 0..3 {
            drop(serve());
            settled(&[0]);
        }
        let (first, _second) = (serve(), serve());
        assert_eq!(sessions(), [1, 1]);
        drop(first);
        settled(&[0, 1]);
        let _others = [serve(), serve(), serve()];
        assert_eq!(sessions(), [2, 1, 1]);
        let _next = serve();
        assert_eq!(sessions(), [2, 2, 1]);
    }
}
