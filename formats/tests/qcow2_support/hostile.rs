//! Images in memory, poked at, and the bounds that opening and reading them has to keep.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

#[path = "allocations.rs"]
pub mod allocations;

use std::time::{Duration, Instant};

use nbd_img_formats::qcow2::{Caches, DataFile, Header, ImageNumber, Parts, Qcow2Driver};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Result, Storage};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

/// No single allocation for a hostile image is larger: the largest L1 table that is allowed.
const ALLOCATION_MAX: usize = 32 << 20;
/// An error must come within this time of the processor's.
const TIME_MAX: Duration = Duration::from_secs(1);
/// And within this time of the wall's, on a machine that is busy with other tests.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Runs within the bounds on time and memory.
pub fn bounded<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let (start, processor) = (Instant::now(), processor_time());
    let (result, used) = allocations::count(work);
    let took = (processor_time() - processor, start.elapsed());
    assert!(took.0 < TIME_MAX && took.1 < WAIT_MAX, "{what} took {took:?}");
    assert!(used.largest <= ALLOCATION_MAX && used.peak < 128 << 20, "{what} took {used:?}");
    result
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
}

/// Writes `with` at `at`, making the file longer if it must be.
pub fn poke(bytes: &mut Vec<u8>, at: u64, with: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if bytes.len() < at + with.len() {
        bytes.resize(at + with.len(), 0);
    }
    bytes[at..at + with.len()].copy_from_slice(with);
}

/// The big-endian number at `at`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A driver of an image in memory, with whatever it names in memory, too, and the smallest cache.
pub fn memory_driver(bytes: &[u8], snapshot: Option<&str>) -> Result<Arc<Qcow2Driver>> {
    let image: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
    let header = Header::load(&image)?;
    let data_file: Option<Arc<dyn Storage>> = match header.geometry.data_file() {
        DataFile::Internal => None,
        DataFile::External | DataFile::ExternalRaw => Some(MemoryStorage::new(4096).unwrap()),
    };
    let backing: Option<Arc<dyn BlockDriver>> = match header.backing_name {
        None => None,
        Some(_) => Some(RawDriver::open(MemoryStorage::copy_of(&[5; 5000]).unwrap(), RawOptions::default())?),
    };
    let caches = Caches::new(0, 1 << 20, [&header])?;
    let snapshot = snapshot.map(str::to_owned);
    Qcow2Driver::open(Parts {
        image,
        header,
        data_file,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot,
        write: None,
    })
}
