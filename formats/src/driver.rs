//! [`BlockDriver`]: what a guest sees of a disk image, whatever its format.
//!
//! Calls are blocking, take `&self` and may come from any number of threads. Buffers belong to the
//! caller. Sessions that must not block use the plans (`map_read`, `prepare_write` with
//! [`MapMode::Try`]) and give only what is slow to a thread that may wait.

use std::fmt;
use std::ops::ControlFlow;

use crate::address::GuestRange;
use crate::error::{Error, ErrorKind, Result};
use crate::info::ImageInfo;
use crate::mover;
use crate::plan::{MapMode, ReadPlan, WritePlan};
use crate::storage::{Durability, Provision, Storage};
use crate::sync::Arc;

/// The formats that can be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// The file is the disk, read through a memory mapping.
    MmapRaw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::MmapRaw => "mmap-raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// What is fixed when an image is opened.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The format it is served as.
    pub format: Format,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// Smallest unit that can be read and written without read-modify-write; a power of two, at least 1.
    pub block_min_len: u32,
    /// Unit that is served best; a power of two, at least `max(block_min_len, 512)`.
    pub block_preferred_len: u32,
    /// Whether a fast write-zeroes can succeed at all.
    pub fast_zero: bool,
    /// Whether bytes may be sent to a client by reference, to be read when it receives them: nothing
    /// that a plan names is ever freed or moved. True for raw disks, where later bytes of the same place
    /// are what a concurrent read may see, and for whatever is not written.
    pub sendable: bool,
    /// Whether it is worth asking [`MapMode::Holes`] for large reads (holes are not in the mapping itself).
    pub holes_in_storage: bool,
}

/// What an image can still do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// All of it.
    Live,
    /// Reading only: an error left its metadata or its file in doubt. Writes and flushes get EIO.
    Failed,
    /// Nothing.
    Closed,
}

/// How to zero a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZeroRequest {
    /// What happens to the room.
    pub provision: Provision,
    /// Fail at once with [`WouldBeSlow`](crate::ErrorKind::WouldBeSlow), nothing changed, when it would
    /// take as long as writing the zeroes.
    pub fast: bool,
    /// Whether it is durable when the call returns.
    pub durability: Durability,
}

/// What [`BlockDriver::warm`] may cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// The processor's time.
    Compute,
    /// Waiting for the disk, too.
    Wait,
}

/// What [`BlockDriver::status`] is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatusQuery<'a> {
    /// Which runs are holes, which read as zeroes.
    Allocation,
    /// How deep in the backing chain each run lies.
    Depth,
    /// Which runs the named dirty bitmap has set; it was [offered](BlockDriver::offer_bitmap) before.
    Bitmap(&'a str),
}

/// One answer of [`BlockDriver::status`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// To [`StatusQuery::Allocation`].
    Allocation {
        /// No room is kept for the run.
        hole: bool,
        /// The run reads as zeroes.
        zero: bool,
    },
    /// To [`StatusQuery::Depth`]: 0 nowhere, 1 in the image itself, 2 in its backing file, ...
    Depth(u32),
    /// To [`StatusQuery::Bitmap`].
    Bitmap {
        /// Whether the run is marked.
        dirty: bool,
    },
}

/// Takes one run of equal status, in guest order without gaps; may stop the enumeration.
pub type StatusVisitor<'a> = &'a mut dyn FnMut(u64, Status) -> ControlFlow<()>;

/// A disk image as its guest sees it.
///
/// Every range must lie within [`size`](Self::size), else the call fails with
/// [`OutOfBounds`](crate::ErrorKind::OutOfBounds) and does nothing. Empty ranges succeed.
/// Mutating calls on an image that was not opened for writing fail with
/// [`ReadOnly`](crate::ErrorKind::ReadOnly) and do nothing.
pub trait BlockDriver: Send + Sync {
    /// What was fixed at open.
    fn facts(&self) -> &Facts;

    /// The guest's size in bytes, now.
    fn size(&self) -> u64;

    /// What the image can still do, now.
    fn state(&self) -> State;

    /// The storages that [`StorageId`](crate::plan::StorageId) counts: the same ones in the same order
    /// as long as the driver lives.
    fn storages(&self) -> &[Arc<dyn Storage>];

    /// What is known of the image, for people.
    fn info(&self) -> Result<ImageInfo>;

    /// Fills `plan` with where the bytes of `range` lie. The pin in the plan holds them there until the
    /// plan is reset or dropped. With [`MapMode::Try`] it does no I/O and waits for nobody.
    fn map_read(&self, range: GuestRange, mode: MapMode, plan: &mut ReadPlan) -> Result<()>;

    /// Reads `buf.len()` bytes from `offset` where a plan said `Slow`. Waits and computes as needed.
    fn read_slow(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// As [`read_slow`](Self::read_slow), for what is in memory already: it waits for nobody, does no I/O and
    /// computes nothing. `false`: not all of it is, and `buf` holds anything.
    fn try_read_slow(&self, _offset: u64, _buf: &mut [u8]) -> Result<bool> {
        Ok(false)
    }

    /// Makes what a plan calls [`Compressed`](crate::plan::SlowReason::Compressed) in the range ready for
    /// [`try_read_slow`](Self::try_read_slow), which may find it gone again soon. `false`: it broke off
    /// because that takes waiting, and `effort` does not allow it.
    fn warm(&self, _range: GuestRange, _effort: Effort) -> Result<bool> {
        Ok(true)
    }

    /// Most bytes that are worth being [warmed](Self::warm) for one reader at a time; 0: none are.
    fn warm_len_max(&self) -> u64 {
        0
    }

    /// Fills `plan` with where the bytes of a write to `range` go. On success the caller writes the
    /// `Data` pieces and must call [`finish_write`](Self::finish_write) afterwards; on failure there is
    /// nothing to finish. `Slow` pieces are given to [`write_slow`](Self::write_slow) by the caller.
    /// [`MapMode::Holes`] means the same as `Wait`.
    fn prepare_write(&self, range: GuestRange, mode: MapMode, plan: &mut WritePlan) -> Result<()>;

    /// Ends a write that `prepare_write` began, and resets `plan`. `written` tells whether every `Data`
    /// piece reached its storage; if not, the guest sees the range's old bytes, new bytes or a mixture.
    fn finish_write(&self, plan: &mut WritePlan, written: bool) -> Result<()>;

    /// Writes `buf` at `offset` where a plan said `Slow`. Waits as needed.
    fn write_slow(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<()>;

    /// Says that the guest does not need the contents of the range any more. What it reads as
    /// afterwards is undefined but never another's data; parts that cannot be given back are left alone.
    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()>;

    /// As [`write_zeroes`](Self::write_zeroes), but waits for nobody and does no I/O. `false`: it takes more
    /// than that, and `write_zeroes` is to be called; parts of the range may read as zeroes already.
    fn try_write_zeroes(&self, _range: GuestRange, _request: ZeroRequest) -> Result<bool> {
        Ok(false)
    }

    /// As [`discard`](Self::discard), in the way of [`try_write_zeroes`](Self::try_write_zeroes).
    fn try_discard(&self, _range: GuestRange, _durability: Durability) -> Result<bool> {
        Ok(false)
    }

    /// Makes every write, zeroing and discard that has returned before this call durable, with all
    /// metadata that leads to it. Then gives back the room that nothing uses any more.
    fn flush(&self) -> Result<()>;

    /// As [`flush`](Self::flush), but leaves giving room back to [`tidy`](Self::tidy), so that whoever waits
    /// for the flush can be told before.
    fn make_durable(&self) -> Result<()> {
        self.flush()
    }

    /// Does what may be done after a request was answered. Cheap when there is nothing.
    fn tidy(&self) {}

    /// Makes sure that [`StatusQuery::Bitmap`] of this name will be answered, by this image or the first one
    /// below that has such a bitmap. `false`: none has. Fails if what it has does not tell what is dirty.
    fn offer_bitmap(&self, name: &str) -> Result<bool> {
        let _ = name;
        Ok(false)
    }

    /// The size that the disk would have if it were opened now: another than [`size`](Self::size) where others have
    /// changed how long its file or device is.
    fn stored_size(&self) -> Result<u64> {
        Ok(self.size())
    }

    /// Gives the disk another size while it is used: what it is longer by reads as zeroes, what it is shorter by is
    /// lost. When it returns, that is durable, and `size` tells it; a failure leaves the old size, or a crash either of
    /// them, and where nobody can know which one is in the file, the image is failed (a raw file without the page cache has
    /// the new size when only its sync has failed). Requests may go on meanwhile, but
    /// none may reach behind the new end of a disk that becomes shorter. One call at a time. To be given
    /// [`stored_size`](Self::stored_size) makes it follow its file or device; the size that it has, give back what an
    /// earlier call left behind the end.
    fn resize(&self, size: u64) -> Result<()> {
        let _ = size;
        Err(Error::new(ErrorKind::Unsupported, "disks of this kind keep their size while they are served"))
    }

    /// Asks for the range to be brought into memory. A hint: it returns before that has happened.
    fn cache(&self, range: GuestRange) -> Result<()>;

    /// Flushes and lets the image go; afterwards every call but `state` and `facts` fails. Idempotent.
    /// It lets go of a [`Failed`](State::Failed) image too, and says so by an error.
    fn close(&self) -> Result<()>;

    /// Fills `buf` from `offset`.
    fn pread(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        mover::read(self, offset, buf)
    }

    /// Writes `buf` at `offset`; with [`Durability::Fua`] it is durable when the call returns.
    fn pwrite(&self, offset: u64, buf: &[u8], durability: Durability) -> Result<()> {
        mover::write(self, offset, buf, durability)
    }

    /// Tells `visitor` the status of consecutive runs that cover `range`, until it breaks off.
    fn status(&self, query: StatusQuery<'_>, range: GuestRange, visitor: StatusVisitor<'_>) -> Result<()> {
        mover::status(self, query, range, visitor)
    }
}
