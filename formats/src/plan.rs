//! Where the bytes of a guest range lie, apart from moving them.
//!
//! A driver fills a plan; whoever asked carries it out (the [mover](crate::mover), or a session that
//! submits the pieces) and then lets the plan's pin go. Nothing here does I/O.

use smallvec::SmallVec;

use crate::address::HostOffset;
use crate::sync::Arc;

/// Index into [`BlockDriver::storages`](crate::BlockDriver::storages).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StorageId(pub u16);

/// Where one run of guest bytes lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In a storage, contiguous from `at`.
    Data {
        /// Which storage of the driver.
        storage: StorageId,
        /// Where in it the run begins.
        at: HostOffset,
    },
    /// Nowhere: the run reads as zeroes. `allocated` tells whether room is kept for it, so that a
    /// later write there cannot fail for lack of space.
    Zero {
        /// Whether room is kept.
        allocated: bool,
    },
    /// Not to be had without waiting or computing; see [`SlowReason`] for who can.
    Slow(SlowReason),
}

/// Why a piece could not be planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlowReason {
    /// Metadata is not in memory. Never returned under [`MapMode::Wait`].
    ColdTable,
    /// The bytes are compressed: `read_slow` decompresses them.
    Compressed,
    /// A write that needs room or has to change the mapping first: `write_slow` does it.
    Allocate,
}

/// How far a driver may go to find the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapMode {
    /// Only memory: what is not there becomes [`SlowReason::ColdTable`].
    Try,
    /// Metadata is read from the file where it must be.
    Wait,
    /// As `Wait`, and holes that the file system knows of are told apart from data. Costs system calls;
    /// for block status and for reads that are worth sending sparse.
    Holes,
}

/// One run of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Bytes; never 0.
    pub len: u64,
    /// Where they lie.
    pub place: Place,
    /// How deep in the backing chain: 1 is the image itself, 2 its backing file, 0 nowhere.
    pub depth: u32,
}

/// What a driver does when the last user of a mapping is done with it.
pub trait PinHolder: Send + Sync {
    /// Called once for each pin, from any thread; must not block.
    fn unpin(&self, key: u64);
}

/// Keeps the clusters of a plan from being punched, reused, zero-flagged or copied away under it.
/// Dropping it lets them go.
pub struct Pin {
    holder: Arc<dyn PinHolder>,
    key: u64,
}

impl Pin {
    /// A pin which tells `holder` when it goes.
    pub fn new(holder: Arc<dyn PinHolder>, key: u64) -> Self {
        Pin { holder, key }
    }

    /// What the holder tells its pins apart by.
    pub fn key(&self) -> u64 {
        self.key
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.holder.unpin(self.key);
    }
}

/// The pieces of a range in guest order, covering it without gaps.
#[derive(Default)]
pub struct Pieces {
    runs: SmallVec<[Piece; 4]>,
}

impl Pieces {
    /// Adds a run behind the last one, merged with it where it goes on seamlessly; compressed ones stay
    /// apart. Empty runs vanish.
    pub fn push(&mut self, piece: Piece) {
        if piece.len == 0 {
            return;
        }
        if let Some(last) = self.runs.last_mut()
            && last.depth == piece.depth
            && last.continues_into(&piece.place)
            && let Some(len) = last.len.checked_add(piece.len)
        {
            last.len = len;
            return;
        }
        self.runs.push(piece);
    }

    /// Removes all runs, keeping the room for them.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// Whether the runs were ever more than fit in place, so that their room is memory of its own.
    pub fn has_memory(&self) -> bool {
        self.runs.spilled()
    }

    /// Removes all runs and gives the room for them back.
    pub fn release(&mut self) {
        self.runs = SmallVec::new();
    }

    /// The bytes that the runs cover.
    pub fn covered_len(&self) -> u64 {
        self.runs.iter().map(|piece| piece.len).sum()
    }
}

impl std::ops::Deref for Pieces {
    type Target = [Piece];

    fn deref(&self) -> &[Piece] {
        &self.runs
    }
}

impl Piece {
    fn continues_into(&self, next: &Place) -> bool {
        match (&self.place, next) {
            (Place::Data { storage, at }, Place::Data { storage: next_storage, at: next_at }) => {
                storage == next_storage && at.checked_add(self.len) == Some(*next_at)
            }
            (Place::Zero { allocated }, Place::Zero { allocated: next }) => allocated == next,
            // One for each compressed cluster, so that they can be read on all cores.
            (Place::Slow(SlowReason::Compressed), _) => false,
            (Place::Slow(reason), Place::Slow(next)) => reason == next,
            (Place::Data { .. } | Place::Zero { .. } | Place::Slow(_), _) => false,
        }
    }
}

/// Where the bytes of a read lie. Reusable: `map_read` clears it first.
#[derive(Default)]
pub struct ReadPlan {
    /// The runs, in guest order; after a successful `map_read` they cover the range.
    pub pieces: Pieces,
    /// What keeps them in place until the plan is dropped or reset; a driver whose mappings never
    /// change leaves it empty.
    pub pin: Option<Pin>,
}

impl ReadPlan {
    /// Forgets pieces and pin.
    pub fn reset(&mut self) {
        self.pieces.clear();
        self.pin = None;
    }

    /// Whether it keeps memory for pieces beyond those that have room in place.
    pub fn has_memory(&self) -> bool {
        self.pieces.has_memory()
    }

    /// Forgets pieces and pin, and gives the memory back.
    pub fn release(&mut self) {
        self.pieces.release();
        self.pin = None;
    }
}

/// Where the bytes of a write go. A plan that `prepare_write` filled must be given to `finish_write`,
/// whatever became of the write.
#[derive(Default)]
pub struct WritePlan {
    /// The runs, in guest order: `Data` or `Slow`, never `Zero`.
    pub pieces: Pieces,
    /// What keeps the mapping until `finish_write`.
    pub pin: Option<Pin>,
    /// Whether a durable write of the pieces alone makes the request durable: no metadata that leads
    /// to them is still in memory only.
    pub durable_in_place: bool,
}

impl WritePlan {
    /// Forgets pieces and pin.
    pub fn reset(&mut self) {
        self.pieces.clear();
        self.pin = None;
        self.durable_in_place = false;
    }

    /// Whether it keeps memory for pieces beyond those that have room in place.
    pub fn has_memory(&self) -> bool {
        self.pieces.has_memory()
    }

    /// Gives the memory of a finished plan back.
    pub fn release(&mut self) {
        self.pieces.release();
        self.pin = None;
        self.durable_in_place = false;
    }
}
