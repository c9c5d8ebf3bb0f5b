//! [`Storage`]: the file below a driver. Every byte of an image goes through this trait, so that the
//! real, recording, failing and in-memory storages all see the production path.
//!
//! Nothing above may assume a local file, a descriptor, or that what lies here can be overwritten.

mod blkdev;
mod buffer;
mod cachestat;
mod calls;
mod changes;
mod direct;
mod engine;
pub mod failing;
mod file;
mod flight;
mod known_data;
mod lock;
mod mapped;
mod memory;
mod new_file;
mod place;
pub mod queue;
mod range_lock;
pub mod recording;
mod ring;
mod room;
mod sigbus;
mod sparse;
mod syncs;
mod window;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

pub use buffer::{BufPool, IoBuf};
pub use failing::{CallClass, FailingStorage, Fault, Faults};
pub use file::{FileOptions, FileStorage};
pub use lock::LockMode;
pub use mapped::MappedStorage;
pub use memory::{MemoryOptions, MemoryStorage, POISON};
pub use new_file::NewFile;
pub use queue::{Aio, Completed, Operation, OperationKind, Queue};
pub use recording::{Change, Fate, FileId, Log, Record, RecordingStorage};
pub use sparse::SparseBytes;
pub use window::WindowStorage;

use crate::address::{HostOffset, HostRange};
use crate::sync::Arc;

/// When a change must be durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// With the next flush.
    Later,
    /// Before the call returns (force unit access).
    Fua,
}

impl Durability {
    /// Whether it must be durable before the call returns.
    pub fn is_fua(self) -> bool {
        self == Durability::Fua
    }
}

/// What a zeroing leaves behind. After any of them the range reads as zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Provision {
    /// Room may be given back (NBD's may-unmap).
    Unmap,
    /// Room stays as it is where there is some.
    Keep,
    /// Room is there afterwards: later writes do not fail for lack of space (NBD's NO_HOLE).
    Allocate,
}

/// What kind of thing a storage is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StorageKind {
    /// A regular file.
    File,
    /// A block device: fixed length, stale content.
    BlockDevice,
    /// Memory, for tests.
    Memory,
}

/// How reads are best issued by somebody who must not wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InPlace {
    /// A plain call never waits for a device (memory, tmpfs).
    Always,
    /// The kernel can be asked (RWF_NOWAIT).
    Ask,
    /// It cannot be told in advance: submit.
    Never,
}

/// What is fixed when a storage is opened.
#[derive(Clone, Debug)]
pub struct StorageFacts {
    /// Its name for people: the path of a file.
    pub path: PathBuf,
    /// What it is.
    pub kind: StorageKind,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// Whether writes behind its end make it longer.
    pub grows: bool,
    /// Whether space that it grows by, and space that was punched, reads as zeroes.
    pub new_space_is_zero: bool,
    /// Whether the page cache is bypassed (O_DIRECT). Alignment is solved below this trait all the same.
    pub direct: bool,
    /// Smallest unit that is read and written without read-modify-write, as an alignment too: 1 unless
    /// the page cache is bypassed. A power of two.
    pub block_len: u32,
    /// How to read without waiting.
    pub reads: InPlace,
    /// How to write without waiting. `Ask` means: in place, but watch the clock.
    pub writes: InPlace,
}

/// What became of a read that must not wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TryRead {
    /// All that was asked for, or all up to the end of the storage: this many bytes.
    Done(usize),
    /// This many bytes are in the buffer; for the next one it would have to wait.
    WouldWait(usize),
}

/// A run of a storage that is all data or all hole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Bytes; at least 1.
    pub len: u64,
    /// Whether the run is a hole: it reads as zeroes and occupies nothing.
    pub hole: bool,
}

/// The bytes below a driver. All calls may come from any number of threads at once; calls whose ranges
/// overlap are not ordered among each other.
pub trait Storage: Send + Sync {
    /// What was fixed at open.
    fn facts(&self) -> &StorageFacts;

    /// Its length in bytes, now.
    fn len(&self) -> io::Result<u64>;

    /// Whether it holds no byte.
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }

    /// The bytes that it occupies, as far as that can be told.
    fn allocated_len(&self) -> io::Result<u64> {
        self.len()
    }

    /// Reads into `buf` from `at`. Returns fewer bytes than asked for only where the storage ends.
    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize>;

    /// As `pread`, but gives up rather than wait for a device. The bytes it has read so far are valid.
    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead>;

    /// Writes all of `buf` at `at`. With [`Durability::Fua`] bytes and the file's own metadata for them
    /// are durable on return. On an error any part of the range may have been written.
    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()>;

    /// Makes everything that has returned before this call durable. A failure of buffered storage is
    /// final, and `is_failed` says so: every later sync and change of the storage fails with EIO, and of the
    /// syncs and FUA writes that are under way none succeeds any more. A FUA write that fails for another
    /// reason than a lack of room counts as a failed sync.
    fn sync(&self) -> io::Result<()>;

    /// Whether a sync has failed for good, as [`sync`](Self::sync) says. Only looks at memory.
    fn is_failed(&self) -> bool;

    /// Makes the range read as zeroes. Never makes the storage longer, except that `Allocate` may.
    /// With `fast` it fails with `EOPNOTSUPP`, nothing changed, where it would have to write the zeroes.
    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()>;

    /// Sees to it that later writes to the range, which lies within the storage, do not fail for lack of
    /// room; what it reads as stays. `false`: that cannot be had, and nothing has changed.
    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        let _ = range;
        Ok(false)
    }

    /// Gives the room of the range back where that is possible. What it reads as afterwards is zeroes
    /// if `new_space_is_zero`, else undefined. Not being able to is no error.
    fn discard(&self, range: HostRange) -> io::Result<()>;

    /// Makes the storage this long; new space reads as zeroes if `new_space_is_zero`.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// What lies at `at`, which must be below the length, and how far at least that goes on (at most to
    /// the end). Storages that do not know call everything data.
    fn run_at(&self, at: HostOffset) -> io::Result<Run>;

    /// Asks for the range to be brought into memory; returns at once.
    fn prefetch(&self, range: HostRange) -> io::Result<()>;

    /// Whether [`send`](Self::send) of the range would neither wait nor copy, as far as can be told.
    /// Storages without a descriptor of their own cannot.
    fn can_send(&self, range: HostRange) -> bool {
        let _ = range;
        false
    }

    /// Sends up to `len` bytes from `at` to a connected stream socket, without bringing them here, and
    /// returns how many; 0 is the storage's end. The socket decides whether it waits. The receiver sees
    /// what the storage holds when it *receives*: never send what may be freed or moved before that.
    fn send(&self, socket: BorrowedFd<'_>, at: HostOffset, len: usize) -> io::Result<usize> {
        let _ = (socket, at, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Starts the operations; each is answered exactly once on `queue`, in any order, possibly before
    /// this call returns. The buffers belong to the operations until then. Drains `operations`.
    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>);

    /// Lets its locks go and closes it as far as it can; later calls may fail. Idempotent.
    fn close(&self) -> io::Result<()>;
}
