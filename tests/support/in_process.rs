//! A server inside the test's own process: shards over any storage, without the program around them. For what cannot
//! be brought about from outside: storages that wait or fail when they are told to, and a budget that can be looked at.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nbd_img::export::{Export, ExportSpec};
use nbd_img::nbd::export_info::{ExportDirectory, ExportInfo, ExportSummary, Refusal};
use nbd_img::nbd::negotiate::{Agreed, Negotiation, NegotiationConfig, Next};
use nbd_img::session::{Budget, Connection, Shards, Times};
use nbd_img::transport::Stream;
use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{
    Completed, InPlace, MemoryStorage, Operation, OperationKind, Queue, Run, StorageFacts, TryRead,
};
use nbd_img_formats::workers::{Job, Lane};
use nbd_img_formats::{BlockDriver, Durability, Error, Format, HostOffset, HostRange, Provision, Storage};

const PAGE_LEN: usize = 4096;

/// What a test holds so that syncs wait.
pub const SYNC: u64 = u64::MAX - 1;

/// Memory that behaves like a disk: nothing is there at once, and it fails where it is told to.
pub struct Disk {
    inner: Arc<MemoryStorage>,
    facts: StorageFacts,
    /// Reads that reach beyond this offset fail with EIO; those in place do if `writes_wait`.
    pub fails_from: AtomicU64,
    /// How long a read of the byte at `slow_at` takes, in milliseconds.
    pub first_read_ms: AtomicU64,
    /// Offset 0 unless a test says otherwise.
    pub slow_at: AtomicU64,
    /// For each 4 KiB whether it is in memory: brought there by reading and by asking for it. Without, everything
    /// that can be sent is.
    there: Option<Mutex<Vec<bool>>>,
    /// What was asked for ahead, in the order of asking: begin and end.
    pub asked: Mutex<Vec<(u64, u64)>>,
    /// Bytes that left by `send`.
    pub sent_len: AtomicU64,
    /// Whether it can send to sockets by itself, as a file in memory can; then `fails_from` is where it ends.
    pub sends: bool,
    /// How long each `send` takes, and each read in place where those can be, in microseconds.
    pub send_us: AtomicU64,
    pub read_us: AtomicU64,
    reads_in_place: bool,
    /// Bytes that were read so.
    pub read_in_place_len: AtomicU64,
    /// How many syncs have begun, and how they end: some fail with ENOSPC.
    pub syncs: AtomicU64,
    pub sync_fails: AtomicBool,
    pub sync_panics: AtomicBool,
    /// Operations are answered before `submit` returns, so that those of a batch are answered together.
    pub answers_at_once: AtomicBool,
    /// Operations that were submitted.
    pub submitted: AtomicU64,
    /// If not 0: data and holes, as far as it says, take turns of this many bytes.
    pub runs_of: AtomicU64,
    /// Writes wait and fail as reads do.
    writes_wait: bool,
    /// How long writes take that are not submitted, on workers' threads and on others, in microseconds; and how many bytes
    /// workers wrote so.
    pub write_given_us: AtomicU64,
    pub write_here_us: AtomicU64,
    pub given_len: AtomicU64,
    /// Reads of these bytes, and writes if `writes_wait`, wait until they are let go.
    held: Mutex<Held>,
    let_go: Condvar,
}

#[derive(Default)]
struct Held {
    at: Vec<u64>,
    /// Reads that wait.
    waiting: usize,
}

impl Disk {
    pub fn new(content: &[u8]) -> Arc<Self> {
        Arc::new(Self::waiting(content))
    }

    pub fn sending(content: &[u8]) -> Arc<Self> {
        Arc::new(Disk { sends: true, ..Self::waiting(content) })
    }

    /// A file that is in memory: it can be sent, and read in place.
    pub fn in_memory(content: &[u8]) -> Arc<Self> {
        let mut disk = Disk { sends: true, reads_in_place: true, ..Self::waiting(content) };
        disk.facts.reads = InPlace::Ask;
        Arc::new(disk)
    }

    /// Memory that is written as fast as memory, but for writes that are held, and fails where it is told to.
    pub fn quick_to_write(content: &[u8]) -> Arc<Self> {
        let mut disk = Self::waiting(content);
        disk.facts.writes = InPlace::Always;
        disk.writes_wait = true;
        Arc::new(disk)
    }

    /// The same as a disk is written whose writes have to be watched.
    pub fn watched_to_write(content: &[u8]) -> Arc<Self> {
        let mut disk = Arc::into_inner(Self::quick_to_write(content)).unwrap();
        disk.facts.writes = InPlace::Ask;
        Arc::new(disk)
    }

    /// The same, of which nothing is in memory for reads, or everything.
    pub fn asked(content: &[u8], reads_in_place: bool) -> Arc<Self> {
        let mut disk = Arc::into_inner(Self::watched_to_write(content)).unwrap();
        disk.facts.reads = InPlace::Ask;
        disk.reads_in_place = reads_in_place;
        Arc::new(disk)
    }

    fn waiting(content: &[u8]) -> Self {
        let inner = MemoryStorage::copy_of(content).unwrap();
        let facts = StorageFacts { reads: InPlace::Never, writes: InPlace::Never, ..inner.facts().clone() };
        Disk {
            inner,
            facts,
            fails_from: AtomicU64::new(u64::MAX),
            first_read_ms: AtomicU64::new(0),
            slow_at: AtomicU64::new(0),
            there: None,
            asked: Mutex::default(),
            sent_len: AtomicU64::new(0),
            sends: false,
            send_us: AtomicU64::new(0),
            read_us: AtomicU64::new(0),
            reads_in_place: false,
            read_in_place_len: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            sync_fails: AtomicBool::new(false),
            sync_panics: AtomicBool::new(false),
            answers_at_once: AtomicBool::new(false),
            submitted: AtomicU64::new(0),
            runs_of: AtomicU64::new(0),
            writes_wait: false,
            write_given_us: AtomicU64::new(0),
            write_here_us: AtomicU64::new(0),
            given_len: AtomicU64::new(0),
            held: Mutex::default(),
            let_go: Condvar::new(),
        }
    }

    fn write(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        let end = at.0 + buf.len() as u64;
        if self.writes_wait {
            self.wait_for(at.0, end);
            if end > self.fails_from.load(Ordering::Relaxed) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
        }
        self.inner.pwrite(buf, at, durability)
    }

    /// All of its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.inner.len().unwrap() as usize];
        assert_eq!(self.inner.pread(&mut bytes, HostOffset(0)).unwrap(), bytes.len());
        bytes
    }

    /// Whether reads in place find anything.
    pub fn reads_in_place(&self) -> bool {
        self.reads_in_place
    }

    /// From now on reads of the byte at `at` wait until it is let go.
    pub fn hold(&self, at: u64) {
        self.held.lock().unwrap().at.push(at);
    }

    pub fn let_go(&self, at: u64) {
        self.held.lock().unwrap().at.retain(|held| *held != at);
        self.let_go.notify_all();
    }

    /// How many reads wait for what is held.
    pub fn held_up(&self) -> usize {
        self.held.lock().unwrap().waiting
    }

    fn wait_for(&self, begin: u64, end: u64) {
        let mut held = self.held.lock().unwrap();
        held.waiting += 1;
        held =
            self.let_go.wait_while(held, |held| held.at.iter().any(|at| (begin..end).contains(at))).unwrap();
        held.waiting -= 1;
    }

    /// A file that can be sent once it is in memory, where nothing of it is at first.
    pub fn arriving(content: &[u8]) -> Arc<Self> {
        let mut disk = Disk { sends: true, ..Self::waiting(content) };
        disk.facts.reads = InPlace::Ask;
        disk.there = Some(Mutex::new(vec![false; content.len().div_ceil(PAGE_LEN)]));
        Arc::new(disk)
    }

    /// The range has been read, as far as that succeeds.
    fn arrive(&self, begin: u64, end: u64) {
        let Some(there) = &self.there else { return };
        let good = end.min(self.fails_from.load(Ordering::Relaxed));
        for page in begin / PAGE_LEN as u64..good.div_ceil(PAGE_LEN as u64) {
            there.lock().unwrap()[page as usize] = true;
        }
    }

    /// The same, which can be asked for what is in memory, and for holes: nothing is in memory.
    pub fn cold(content: &[u8]) -> Arc<Self> {
        let mut disk = Arc::into_inner(Self::new(content)).unwrap();
        disk.facts.reads = InPlace::Ask;
        Arc::new(disk)
    }
}

impl Storage for Disk {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.inner.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        let end = at.0 + buf.len() as u64;
        self.wait_for(at.0, end);
        if (at.0..end).contains(&self.slow_at.load(Ordering::Relaxed)) {
            std::thread::sleep(Duration::from_millis(self.first_read_ms.load(Ordering::Relaxed)));
        }
        if end > self.fails_from.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.arrive(at.0, end);
        self.inner.pread(buf, at)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        if !self.reads_in_place {
            return Ok(TryRead::WouldWait(0));
        }
        std::thread::sleep(Duration::from_micros(self.read_us.load(Ordering::Relaxed)));
        if self.writes_wait && at.0 + buf.len() as u64 > self.fails_from.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.read_in_place_len.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.inner.try_pread(buf, at)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        let is_given = std::thread::current().name().is_some_and(|name| name.starts_with("W-"));
        let us = if is_given { &self.write_given_us } else { &self.write_here_us };
        std::thread::sleep(Duration::from_micros(us.load(Ordering::Relaxed)));
        if is_given {
            self.given_len.fetch_add(buf.len() as u64, Ordering::Relaxed);
        }
        self.write(buf, at, durability)
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.wait_for(SYNC, SYNC + 1);
        assert!(!self.sync_panics.load(Ordering::Relaxed), "the panic of this test");
        if self.sync_fails.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.inner.sync()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        self.inner.zero(range, provision, fast)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.inner.discard(range)
    }

    fn is_failed(&self) -> bool {
        self.inner.is_failed()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        match self.runs_of.load(Ordering::Relaxed) {
            0 => self.inner.run_at(at),
            len => Ok(Run { len: len - at.0 % len, hole: at.0 / len % 2 == 1 }),
        }
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        self.asked.lock().unwrap().push((range.at().0, range.end().0));
        self.arrive(range.at().0, range.end().0);
        self.inner.prefetch(range)
    }

    fn can_send(&self, range: HostRange) -> bool {
        let pages = range.at().0 as usize / PAGE_LEN..(range.end().0 as usize).div_ceil(PAGE_LEN);
        self.sends
            && self.there.as_ref().is_none_or(|there| there.lock().unwrap()[pages].iter().all(|there| *there))
    }

    fn send(&self, socket: BorrowedFd<'_>, at: HostOffset, len: usize) -> io::Result<usize> {
        std::thread::sleep(Duration::from_micros(self.send_us.load(Ordering::Relaxed)));
        // Odd pieces, as a socket may take them.
        let left = self.fails_from.load(Ordering::Relaxed).saturating_sub(at.0);
        let mut piece = vec![0; len.min(100_003).min(usize::try_from(left).unwrap_or(usize::MAX))];
        let got = self.inner.pread(&mut piece, at)?;
        let sent = rustix::net::send(socket, &piece[..got], rustix::net::SendFlags::NOSIGNAL)?;
        self.sent_len.fetch_add(sent as u64, Ordering::Relaxed);
        Ok(sent)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        self.submitted.fetch_add(operations.len() as u64, Ordering::Relaxed);
        for operation in operations.drain(..) {
            let (disk, queue) = (Arc::clone(&self), Arc::clone(queue));
            let workers = Arc::clone(queue.workers());
            let lane = if operation.kind == OperationKind::Read { Lane::Read } else { Lane::StorageWrite };
            let job: Job = Box::new(move || {
                let Operation { kind, at, mut buf, token } = operation;
                let result = match kind {
                    OperationKind::Read => disk.pread(&mut buf, at),
                    OperationKind::Write(durability) => disk.write(&buf, at, durability).map(|()| buf.len()),
                    OperationKind::Sync => disk.sync().map(|()| 0),
                };
                let result = result.map_err(|e| Error::io("the test's disk", e));
                queue.complete(Completed { token, buf, result });
            });
            if self.answers_at_once.load(Ordering::Relaxed) {
                job();
            } else {
                assert!(workers.spawn(lane, job).is_ok());
            }
        }
    }

    fn close(&self) -> io::Result<()> {
        // The test may look at what was left.
        Ok(())
    }
}

/// The qcow2 image in `storage`, which names no other file.
pub fn open_qcow2(storage: Arc<dyn Storage>, writable: bool) -> Arc<dyn BlockDriver> {
    let header = Header::load(&storage).unwrap();
    let caches = Caches::new(1 << 20, 1 << 20, [&header]).unwrap();
    Qcow2Driver::open(Parts {
        image: storage,
        header,
        data_file: None,
        backing: None,
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: writable.then(WriteOptions::default),
    })
    .unwrap()
}

/// Every connection to `socket` is served from one export.
pub struct InProcess {
    pub shards: Arc<Shards>,
    pub budget: Arc<Budget>,
    pub budget_len: usize,
    pub socket: PathBuf,
    _folder: tempfile::TempDir,
}

struct One(Arc<Export>);

impl ExportDirectory for One {
    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }

    fn find(&self, _name: &str) -> Result<ExportInfo, Refusal> {
        Ok(self.0.info())
    }
}

impl InProcess {
    pub fn serve(storage: Arc<dyn Storage>, budget_len: usize) -> Self {
        Self::serve_with(storage, budget_len, Times::default())
    }

    pub fn serve_with(storage: Arc<dyn Storage>, budget_len: usize, times: Times) -> Self {
        let options =
            RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None };
        Self::serve_driver(RawDriver::open(storage, options).unwrap(), budget_len, times)
    }

    pub fn serve_driver(driver: Arc<dyn BlockDriver>, budget_len: usize, times: Times) -> Self {
        Self::serve_as(&ExportSpec::default(), driver, budget_len, times)
    }

    pub fn serve_as(
        spec: &ExportSpec,
        driver: Arc<dyn BlockDriver>,
        budget_len: usize,
        times: Times,
    ) -> Self {
        let export = Export::of_driver(spec, driver).unwrap();
        let budget = Budget::new(budget_len);
        let shards = Shards::new(Arc::clone(&export), Arc::clone(&budget), times);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let dealer = Arc::downgrade(&shards);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some((agreed, leftover)) = negotiate(&mut stream, &One(Arc::clone(&export))) else {
                    continue;
                };
                stream.set_nonblocking(true).unwrap();
                let Some(shards) = dealer.upgrade() else { return };
                let stream = Stream::Unix(stream);
                let export = Arc::clone(shards.export());
                let served = export.serve(agreed.info.size).unwrap();
                let peer = "test".to_owned();
                let connection =
                    Connection { stream, export, served, agreed, leftover, peer, permit: Box::new(()) };
                // A draining server closes it.
                let _ = shards.hand_over(connection);
            }
        });
        InProcess { shards, budget, budget_len, socket, _folder: folder }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until no session is left and all memory has come back.
    pub fn assert_clean(&self) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while self.shards.active_count() > 0 || self.budget.left_len() != self.budget_len {
            assert!(
                std::time::Instant::now() < deadline,
                "{} sessions and {} leased bytes are left over",
                self.shards.active_count(),
                self.budget_len - self.budget.left_len()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn negotiate(stream: &mut (impl Read + Write), exports: &One) -> Option<(Agreed, Vec<u8>)> {
    let mut negotiation = Negotiation::new(NegotiationConfig::default());
    let (mut input, mut out) = (Vec::new(), Vec::new());
    negotiation.greeting(&mut out);
    loop {
        let step = negotiation.step(&input, exports, &mut out);
        input.drain(..step.consumed);
        stream.write_all(&out).ok()?;
        out.clear();
        match step.next {
            Next::Transmission(agreed) => return Some((agreed, input)),
            Next::NeedMore => {
                let mut more = [0; 4096];
                match stream.read(&mut more).ok()? {
                    0 => return None,
                    got => input.extend_from_slice(&more[..got]),
                }
            }
            Next::Flush => {}
            Next::Close { .. } | Next::StartTls => return None,
        }
    }
}
