//! The table cache under pressure, what a session relies on (plans without I/O, without allocation), and
//! failing storage.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/allocations.rs"]
mod allocations;
mod qcow2_support;

use std::path::Path;
use std::time::Duration;

use nbd_img_formats::plan::{MapMode, Place, ReadPlan, SlowReason};
use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver};
use nbd_img_formats::storage::{CallClass, FailingStorage, Fault, Faults, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, GuestRange, Result, Storage};
use qcow2_support::{Folder, Random, mixed_content, qemu, read_all};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const MIB: u64 = 1 << 20;

/// An image of a disk with mixed content; returns the disk's bytes, too.
fn sample(folder: &Folder, size: u64, options: &str, compress: bool) -> (Vec<u8>, Vec<u8>) {
    let (raw, image) = (folder.file("sample.raw"), folder.file("sample.qcow2"));
    mixed_content(&raw, size, 77);
    let compress = if compress { "-c" } else { "-q" };
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    qemu("qemu-img", ["convert", compress, "-f", "raw", "-O", "qcow2", "-o", options, from, to]);
    (std::fs::read(image).unwrap(), std::fs::read(raw).unwrap())
}

struct Opened {
    driver: Arc<Qcow2Driver>,
    caches: Arc<Caches>,
    faults: Arc<Faults>,
}

fn open_in_memory(bytes: &[u8], table_cache_len: u64) -> Opened {
    let faults = Faults::new();
    let image: Arc<dyn Storage> = faults.attach(MemoryStorage::copy_of(bytes).unwrap());
    let (driver, caches) = open_on(image, table_cache_len).unwrap();
    Opened { driver, caches, faults }
}

fn open_on(image: Arc<dyn Storage>, table_cache_len: u64) -> Result<(Arc<Qcow2Driver>, Arc<Caches>)> {
    let header = Header::load(&image)?;
    let caches = Caches::new(table_cache_len, 1 << 20, [&header])?;
    let parts = Parts {
        image,
        header,
        data_file: None,
        backing: None,
        number: ImageNumber(0),
        caches: Arc::clone(&caches),
        snapshot: None,
        write: None,
    };
    Ok((Qcow2Driver::open(parts)?, caches))
}

/// K2 of the reliability reference, the reading half: a cache that is far too small, used from all sides.
#[test]
fn two_slices_and_eight_threads_give_right_data() {
    for (options, compress) in
        [("cluster_size=512", false), ("cluster_size=1k", true), ("cluster_size=1k,compat=v2", false)]
    {
        let folder = Folder::new();
        let (image, disk) = sample(&folder, 3 * MIB, options, compress);
        let opened = open_in_memory(&image, 0);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (driver, disk) = (&opened.driver, &disk);
                scope.spawn(move || read_at_random(&**driver, disk, thread));
            }
        });
        assert!(opened.caches.table_loads() > 2, "{options}: the cache was not under pressure");
    }
}

fn read_at_random(driver: &dyn BlockDriver, disk: &[u8], seed: u64) {
    let mut random = Random::new(seed + 1);
    let mut buf = vec![0; 100_000];
    for _ in 0..400 {
        let at = usize::try_from(random.below(disk.len() as u64)).unwrap();
        let len = usize::try_from(random.below(100_000)).unwrap().min(disk.len() - at);
        driver.pread(at as u64, &mut buf[..len]).unwrap();
        assert!(buf[..len] == disk[at..at + len], "{len} bytes at {at}");
    }
}

/// Every table is read once as long as the budget holds them all, however many ask for it at a time.
#[test]
fn tables_are_loaded_once() {
    let folder = Folder::new();
    let (image, disk) = sample(&folder, 2 * MIB, "cluster_size=512", false);
    let opened = open_in_memory(&image, 32 << 20);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(read_all(&*opened.driver) == disk));
        }
    });
    let loads = opened.caches.table_loads();
    // A table covers 32 KiB; those of which all is zero do not exist.
    assert!((50..=2048 / 32).contains(&loads), "{loads}");
    assert!(read_all(&*opened.driver) == disk);
    assert_eq!(opened.caches.table_loads(), loads);
}

/// What a session relies on: `Try` does no I/O, and a warm plan costs no allocation.
#[test]
fn a_warm_plan_costs_neither_io_nor_memory() {
    let folder = Folder::new();
    let (image, _) = sample(&folder, 4 * MIB, "cluster_size=64k,preallocation=metadata", false);
    let opened = open_in_memory(&image, 1 << 20);
    let driver = &*opened.driver;
    let range = GuestRange::new(70_000, 4096).unwrap();
    let mut plan = ReadPlan::default();
    let calls = opened.faults.total();
    driver.map_read(range, MapMode::Try, &mut plan).unwrap();
    assert_eq!(plan.pieces[0].place, Place::Slow(SlowReason::ColdTable));
    assert_eq!(plan.pieces.covered_len(), 4096);
    assert_eq!(opened.faults.total(), calls);
    driver.map_read(range, MapMode::Wait, &mut plan).unwrap();
    assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
    let calls = opened.faults.total();
    let (outcome, used) =
        allocations::count(|| (0..1000).try_for_each(|_| driver.map_read(range, MapMode::Try, &mut plan)));
    outcome.unwrap();
    assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
    assert_eq!((used.count, opened.faults.total() - calls), (0, 0));
    // Contiguous clusters are one piece.
    driver.map_read(GuestRange::new(0, 4 * MIB).unwrap(), MapMode::Wait, &mut plan).unwrap();
    assert_eq!((plan.pieces.len(), plan.pieces.covered_len()), (1, 4 * MIB));
}

/// Call k fails, for every k: an error, then right data again, and nothing wrong in between.
#[test]
fn failing_reads_are_errors_and_leave_no_trace() {
    let folder = Folder::new();
    for (options, compress) in [("cluster_size=4k", true), ("cluster_size=64k", false)] {
        let (image, disk) = sample(&folder, MIB, options, compress);
        let script = |opened: &Opened| -> Result<Vec<u8>> {
            let mut bytes = vec![0; disk.len()];
            for (number, part) in bytes.chunks_mut(50_000).enumerate() {
                opened.driver.pread(number as u64 * 50_000, part)?;
            }
            Ok(bytes)
        };
        let whole = open_in_memory(&image, 0);
        let before = whole.faults.count(CallClass::Read);
        assert!(script(&whole).unwrap() == disk);
        let reads = whole.faults.count(CallClass::Read) - before;
        assert!(reads > 20, "{reads}");
        for call in 0..reads {
            let opened = open_in_memory(&image, 0);
            opened.faults.arm(Fault { class: Some(CallClass::Read), ..Fault::at(call) });
            let error = script(&opened).err().unwrap_or_else(|| panic!("read {call} failed unseen"));
            assert_eq!(error.errno(), libc::EIO, "{error}");
            assert!(script(&opened).unwrap() == disk);
        }
    }
}

/// The same for the calls of an open.
#[test]
fn failing_calls_of_an_open_are_errors() {
    let folder = Folder::new();
    let (image, disk) = sample(&folder, MIB, "cluster_size=64k", false);
    let path = folder.file("sample.qcow2");
    qemu("qemu-img", ["snapshot", "-c", "snap", path.to_str().unwrap()]);
    let image = std::fs::read(&path).unwrap_or(image);
    let attach = |faults: &Arc<Faults>| -> Arc<FailingStorage> {
        faults.attach(MemoryStorage::copy_of(&image).unwrap())
    };
    let faults = Faults::new();
    open_on(attach(&faults), 0).unwrap();
    let calls = faults.total();
    assert!(calls > 4, "{calls}");
    for call in 0..calls {
        let faults = Faults::new();
        let storage = attach(&faults);
        faults.arm(Fault::at(call));
        assert!(open_on(Arc::clone(&storage) as Arc<dyn Storage>, 0).is_err(), "call {call} failed unseen");
        let (driver, _) = open_on(storage, 0).unwrap();
        assert!(read_all(&*driver) == disk);
    }
}

/// Blobs that are noise, and streams that go on for ever: an error, or a cluster, and no more time than
/// good ones take.
#[test]
fn hostile_blobs_are_bounded() {
    for compression in ["zlib", "zstd"] {
        let folder = Folder::new();
        let options = format!("cluster_size=64k,compression_type={compression}");
        let (image, disk) = sample(&folder, MIB, &options, true);
        let start = processor_time();
        assert!(read_all(&*open_in_memory(&image, 0).driver) == disk);
        let good = (processor_time() - start).max(Duration::from_millis(20));
        let mut random = Random::new(5);
        // Behind the metadata that qemu-img writes first there are blobs, up to the end.
        let blobs = blobs_from(&image)..image.len();
        for round in 0..60 {
            let mut bytes = image.clone();
            for _ in 0..1 + random.below(200) {
                let at = blobs.start + usize::try_from(random.below(blobs.len() as u64)).unwrap();
                bytes[at] = random.byte();
            }
            // What shares a core with us can make us slower, but hardly each time.
            let mut tries = Vec::new();
            while tries.len() < 3 && tries.last().is_none_or(|took| *took >= good * 4) {
                let (took, used) = time_to_read(&bytes);
                tries.push(took);
                assert!(used.largest <= 1 << 20, "round {round}: {used:?}");
            }
            assert!(tries.iter().any(|took| *took < good * 4), "round {round}: {tries:?} against {good:?}");
        }
    }
}

/// What reading 16 clusters of an image takes, whatever comes of it: processor time and memory.
fn time_to_read(image: &[u8]) -> (Duration, allocations::Allocations) {
    let opened = open_in_memory(image, 0);
    let start = processor_time();
    let mut cluster = vec![0; 65536];
    let (_, used) = allocations::count(|| {
        for number in 0..16 {
            let _ = opened.driver.pread(number * 65536, &mut cluster);
        }
    });
    (processor_time() - start, used)
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
}

/// The offset of the first compressed cluster: behind every table that the header leads to.
fn blobs_from(image: &[u8]) -> usize {
    let be64 = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = usize::try_from(be64(40)).unwrap();
    let l2 = usize::try_from(be64(l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    l2 + 65536
}

/// Image files that end inside of the last cluster, as other programs make them.
#[test]
fn a_file_that_grows_under_force_share_is_seen_growing() {
    let folder = Folder::new();
    let (image, disk) = sample(&folder, MIB, "cluster_size=64k", false);
    let cut = image.len() - 200_000;
    let storage = MemoryStorage::copy_of(&image[..cut]).unwrap();
    let (driver, _) = open_on(Arc::clone(&storage) as Arc<dyn Storage>, 0).unwrap();
    let short = read_all(&*driver);
    assert!(short != disk);
    let differs = short.iter().zip(&disk).position(|(a, b)| a != b).unwrap();
    assert!(short[differs..].iter().zip(&disk[differs..]).all(|(a, b)| a == b || *a == 0));
    let at = nbd_img_formats::HostOffset(cut as u64);
    storage.pwrite(&image[cut..], at, nbd_img_formats::Durability::Later).unwrap();
    assert!(read_all(&*driver) == disk);
}

#[test]
fn info_tells_what_there_is() {
    let folder = Folder::new();
    let base = folder.create("base.qcow2", "cluster_size=4k,compat=v2", MIB);
    let options =
        format!("backing_file={},backing_fmt=qcow2,extended_l2=on,compression_type=zstd", base.display());
    let image = folder.create("image.qcow2", &options, 2 * MIB);
    let path = image.to_str().unwrap();
    qemu("qemu-img", ["bitmap", "--add", "-g", "64k", path, "changes"]);
    qemu("qemu-img", ["bitmap", "--add", "--disable", path, "off"]);
    qemu("qemu-img", ["snapshot", "-c", "snap", path]);
    let info = qcow2_support::open_read_only(&image).driver.info().unwrap();
    let said: serde_json::Value = serde_json::from_str(&serde_json::to_string(&info).unwrap()).unwrap();
    assert_eq!(said["format"], "qcow2");
    assert_eq!(said["virtual_size"], 2 * MIB);
    assert_eq!(said["cluster_len"], 65536);
    assert_eq!(said["compression"], "zstd");
    assert_eq!(said["features"], serde_json::json!(["compression-type", "extended-l2", "bitmaps"]));
    assert_eq!(said["backing_name"], base.to_str().unwrap());
    assert_eq!(said["chain"][0]["version"], 2);
    assert_eq!(said["chain"][0]["path"], base.to_str().unwrap());
    assert_eq!(said["snapshots"][0]["name"], "snap");
    let bitmaps = &said["bitmaps"];
    assert_eq!((&bitmaps[0]["name"], &bitmaps[0]["granularity"]), (&"changes".into(), &65536.into()));
    assert_eq!(bitmaps[0]["flags"], serde_json::json!(["auto"]));
    assert_eq!(bitmaps[1]["flags"], serde_json::json!([]));
    assert!(Path::new(info.path.as_path()).ends_with("image.qcow2"));
}
