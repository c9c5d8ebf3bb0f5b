//! Single promises of writing qcow2: what costs nothing, what is given back, what a failure leaves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/allocations.rs"]
mod allocations;
mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::time::Duration;

use nbd_img_formats::plan::{MapMode, Place, ReadPlan, WritePlan};
use nbd_img_formats::qcow2::WriteOptions;
use nbd_img_formats::storage::{CallClass, Change, Fault, Faults, Log, MemoryOptions, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, HostOffset, Provision, State, Storage, ZeroRequest,
};
use qcow2_support::{Folder, qemu_io, read_all};
use qcow2_write_support::{assert_clean, assert_image, bytes_of, open_with, open_writable};
use support::wrapped::{NeverClosed, Wrapped};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn request(provision: Provision, fast: bool) -> ZeroRequest {
    ZeroRequest { provision, fast, durability: Durability::Later }
}

fn memory_of(folder: &Folder, options: &str, size: u64) -> Arc<MemoryStorage> {
    let path = folder.create("image.qcow2", options, size);
    MemoryStorage::copy_of(&std::fs::read(path).unwrap()).unwrap()
}

fn open_kept(memory: &Arc<MemoryStorage>) -> Arc<dyn BlockDriver> {
    let storage = Wrapped::new(Arc::clone(memory) as Arc<dyn Storage>, NeverClosed);
    open_with(storage, None, 1 << 20, WriteOptions::default()).unwrap()
}

/// The same with its calls to the file counted.
fn open_counted(memory: &Arc<MemoryStorage>) -> (Arc<Faults>, Arc<dyn BlockDriver>) {
    let faults = Faults::new();
    let storage = faults.attach(Wrapped::new(Arc::clone(memory) as Arc<dyn Storage>, NeverClosed));
    let driver = open_with(storage, None, 1 << 20, WriteOptions::default()).unwrap();
    (faults, driver)
}

fn check(folder: &Folder, memory: &MemoryStorage, disk: &[u8]) {
    let path = folder.file("written.qcow2");
    std::fs::write(&path, bytes_of(memory)).unwrap();
    assert_image(folder, &path, disk);
}

/// 8 TiB of nothing are zeroed without a call to the file.
#[test]
fn zeroing_nothing_costs_nothing() {
    let folder = Folder::new();
    let size = 8 << 40;
    let memory = memory_of(&folder, "cluster_size=64k", size);
    let faults = Faults::new();
    let storage = faults.attach(Arc::clone(&memory) as Arc<dyn Storage>);
    let driver = open_with(storage, None, 1 << 20, WriteOptions::default()).unwrap();
    let all = GuestRange::new(0, size).unwrap();
    let calls = faults.total();
    let start = processor_time();
    for provision in [Provision::Unmap, Provision::Keep] {
        driver.write_zeroes(all, request(provision, true)).unwrap();
    }
    driver.discard(all, Durability::Later).unwrap();
    assert_eq!(faults.total(), calls);
    let took = processor_time() - start;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

/// What this thread has had of a processor: a busy machine adds nothing to it.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
}

/// What a session relies on: whole clusters are zeroed and discarded without a call to the file, and what
/// would take one is left alone.
#[test]
fn zeroes_of_memory_only_cost_no_io() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=64k", 16 * MIB);
    let (faults, driver) = open_counted(&memory);
    driver.pwrite(0, &vec![7; 4 * MIB as usize], Durability::Later).unwrap();
    let mut disk = read_all(&*driver);
    let before = faults.total();
    let range = |at, len| GuestRange::new(at, len).unwrap();
    for (at, provision) in [(0, Provision::Unmap), (MIB, Provision::Keep)] {
        assert!(driver.try_write_zeroes(range(at, MIB), request(provision, true)).unwrap());
        disk[at as usize..][..MIB as usize].fill(0);
    }
    assert!(driver.try_discard(range(2 * MIB, MIB), Durability::Later).unwrap());
    disk[2 * MIB as usize..][..MIB as usize].fill(0);
    let part = range(3 * MIB + 512, MIB / 2);
    assert!(!driver.try_write_zeroes(part, request(Provision::Unmap, false)).unwrap());
    assert!(!driver.try_write_zeroes(range(3 * MIB, MIB), request(Provision::Allocate, false)).unwrap());
    let fua = ZeroRequest { durability: Durability::Fua, ..request(Provision::Unmap, false) };
    assert!(!driver.try_write_zeroes(range(3 * MIB, MIB), fua).unwrap());
    assert_eq!(faults.total(), before);
    assert_eq!(read_all(&*driver), disk);
    driver.close().unwrap();
    check(&folder, &memory, &disk);
}

/// Who waits for a flush does not wait for holes to be punched; those that lie in a row are one, in whatever
/// order they were freed.
#[test]
fn holes_are_punched_after_the_flush_and_in_one_go() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=64k", 16 * MIB);
    let (faults, driver) = open_counted(&memory);
    driver.pwrite(0, &vec![7; 4 * MIB as usize], Durability::Later).unwrap();
    driver.flush().unwrap();
    let before = faults.count(CallClass::Zero);
    for number in 0..64 {
        let at = number * 37 % 64 * 64 * KIB;
        let range = GuestRange::new(at, 64 * KIB).unwrap();
        driver.write_zeroes(range, request(Provision::Unmap, true)).unwrap();
    }
    driver.make_durable().unwrap();
    assert_eq!(faults.count(CallClass::Zero), before);
    assert!(memory.allocated_len().unwrap() > 4 * MIB);
    driver.tidy();
    assert_eq!(faults.count(CallClass::Zero), before + 1);
    assert!(memory.allocated_len().unwrap() < MIB);
    driver.close().unwrap();
    check(&folder, &memory, &vec![0; 16 * MIB as usize]);
}

/// Zeroes with room take a call for a row of clusters, and the room is there.
#[test]
fn room_for_many_clusters_is_one_call() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=64k", 16 * MIB);
    let (faults, driver) = open_counted(&memory);
    driver.pwrite(MIB, &vec![7; MIB as usize], Durability::Later).unwrap();
    let before = faults.count(CallClass::Zero);
    let range = GuestRange::new(0, 8 * MIB).unwrap();
    driver.write_zeroes(range, request(Provision::Allocate, false)).unwrap();
    // Before, in and behind what was there.
    assert!(faults.count(CallClass::Zero) - before <= 3, "{}", faults.count(CallClass::Zero) - before);
    assert!(memory.allocated_len().unwrap() >= 8 * MIB);
    driver.close().unwrap();
    assert!(memory.allocated_len().unwrap() >= 8 * MIB);
    check(&folder, &memory, &vec![0; 16 * MIB as usize]);
}

/// What a session relies on: warm plans of a writable image do no I/O and allocate nothing.
#[test]
fn warm_plans_cost_neither_io_nor_memory() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=64k", 16 * MIB);
    let faults = Faults::new();
    let storage = faults.attach(Arc::clone(&memory) as Arc<dyn Storage>);
    let driver = open_with(storage, None, 1 << 20, WriteOptions::default()).unwrap();
    driver.pwrite(0, &vec![7; MIB as usize], Durability::Later).unwrap();
    let calls = faults.total();
    let range = GuestRange::new(70_000, 4096).unwrap();
    let mut reads = ReadPlan::default();
    let mut writes = WritePlan::default();
    driver.map_read(range, MapMode::Try, &mut reads).unwrap();
    let ((), counted) = allocations::count(|| {
        for _ in 0..100 {
            driver.map_read(range, MapMode::Try, &mut reads).unwrap();
            driver.prepare_write(range, MapMode::Try, &mut writes).unwrap();
            driver.finish_write(&mut writes, true).unwrap();
        }
    });
    assert_eq!((counted.count, faults.total()), (0, calls));
    assert!(matches!(reads.pieces[..], [piece] if matches!(piece.place, Place::Data { .. })));
}

/// The sixteen writes of 4 KiB that fill a cluster: the first one maps it, all go in place.
#[test]
fn small_writes_share_a_new_cluster() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=64k", 16 * MIB);
    let driver = open_kept(&memory);
    // So that the table and room are there.
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    let mut plan = WritePlan::default();
    for part in 16..32 {
        let range = GuestRange::new(part * 4 * KIB, 4 * KIB).unwrap();
        driver.prepare_write(range, MapMode::Try, &mut plan).unwrap();
        let [piece] = plan.pieces[..] else { panic!("{} pieces", plan.pieces.len()) };
        let Place::Data { at, .. } = piece.place else { panic!("{:?}", piece.place) };
        memory.pwrite(&[part as u8; 4096], at, Durability::Later).unwrap();
        driver.finish_write(&mut plan, true).unwrap();
    }
    let disk = read_all(&*driver);
    assert!((16..32).all(|part| disk[part * 4096..][..4096] == [part as u8; 4096]));
    driver.close().unwrap();
    check(&folder, &memory, &disk);
}

/// K7: writing and giving back over and over does not make the file grow, and gives the room back.
#[test]
fn the_file_does_not_grow_by_reuse() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=4k", 16 * MIB);
    let driver = open_kept(&memory);
    let all = GuestRange::new(0, 4 * MIB).unwrap();
    for round in 0..20u8 {
        driver.pwrite(0, &vec![round + 1; 4 * MIB as usize], Durability::Later).unwrap();
        driver.flush().unwrap();
        driver.write_zeroes(all, request(Provision::Unmap, true)).unwrap();
        driver.flush().unwrap();
    }
    driver.close().unwrap();
    let (len, allocated) = (memory.len().unwrap(), memory.allocated_len().unwrap());
    assert!(len < 5 * MIB, "{len}");
    assert!(allocated < MIB, "{allocated}");
    check(&folder, &memory, &vec![0; 16 * MIB as usize]);
}

/// A read plan that is held keeps its bytes, whatever happens to the clusters meanwhile.
#[test]
fn a_pin_keeps_the_bytes() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=4k", 4 * MIB);
    let driver = open_kept(&memory);
    driver.pwrite(0, &[0xaa; 4096], Durability::Fua).unwrap();
    let range = GuestRange::new(0, 4096).unwrap();
    let mut plan = ReadPlan::default();
    driver.map_read(range, MapMode::Try, &mut plan).unwrap();
    let Place::Data { at, .. } = plan.pieces[0].place else { panic!("no data") };
    driver.write_zeroes(range, request(Provision::Unmap, true)).unwrap();
    for cluster in 1..100 {
        driver.flush().unwrap();
        driver.pwrite(cluster * 4096, &[cluster as u8; 4096], Durability::Later).unwrap();
    }
    let mut bytes = [0; 4096];
    memory.pread(&mut bytes, at).unwrap();
    assert_eq!(bytes, [0xaa; 4096]);
    plan.reset();
    driver.flush().unwrap();
    memory.pread(&mut bytes, at).unwrap();
    assert_eq!(bytes, [0; 4096], "it was not given back");
    let disk = read_all(&*driver);
    driver.close().unwrap();
    check(&folder, &memory, &disk);
}

/// Open plans do not keep a close from leaving a clean image.
#[test]
fn a_close_with_open_plans_leaks_nothing() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=4k", 4 * MIB);
    let driver = open_kept(&memory);
    driver.pwrite(0, &[0xaa; 40960], Durability::Fua).unwrap();
    let mut plan = ReadPlan::default();
    driver.map_read(GuestRange::new(0, 4096).unwrap(), MapMode::Try, &mut plan).unwrap();
    driver.discard(GuestRange::new(0, 40960).unwrap(), Durability::Later).unwrap();
    driver.close().unwrap();
    check(&folder, &memory, &vec![0; 4 * MIB as usize]);
    drop(plan);
}

/// A write with claims that is never finished gives its clusters back.
#[test]
fn an_abandoned_write_leaves_no_trace() {
    let folder = Folder::new();
    let base = MemoryStorage::copy_of(&vec![3; MIB as usize]).unwrap();
    let base = nbd_img_formats::raw::RawDriver::open(base, Default::default()).unwrap();
    let memory = memory_of(&folder, "cluster_size=4k", MIB);
    let storage = Wrapped::new(Arc::clone(&memory) as Arc<dyn Storage>, NeverClosed);
    let driver = open_with(storage, Some(base), 1 << 20, WriteOptions::default()).unwrap();
    driver.pwrite(0, &[1; 100], Durability::Later).unwrap();
    let range = GuestRange::new(8192, 8192).unwrap();
    for written in [None, Some(false)] {
        let mut plan = WritePlan::default();
        driver.prepare_write(range, MapMode::Try, &mut plan).unwrap();
        assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
        assert!(!plan.durable_in_place);
        match written {
            Some(written) => driver.finish_write(&mut plan, written).unwrap(),
            None => drop(plan),
        }
        // Nobody has to wait for it.
        driver.write_slow(8192 + 100, &[9; 10]).unwrap();
        driver.write_zeroes(GuestRange::new(0, MIB).unwrap(), request(Provision::Unmap, false)).unwrap();
    }
    driver.close().unwrap();
    let path = folder.file("written.qcow2");
    std::fs::write(&path, bytes_of(&*memory)).unwrap();
    assert_clean(&path);
}

/// FUA is never answered for what a failed commit has left in memory.
#[test]
fn fua_after_a_failed_commit_commits() {
    let folder = Folder::new();
    for call in 0..12 {
        let memory = memory_of(&folder, "cluster_size=512", MIB);
        let log = Log::new();
        let recording = log.attach(Arc::clone(&memory) as Arc<dyn Storage>).unwrap();
        let faults = Faults::new();
        // A cache of two slices, so that what may be evicted is.
        let driver = open_with(faults.attach(recording), None, 0, WriteOptions::default()).unwrap();
        driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
        driver.pwrite(100 * KIB, &[1; 512], Durability::Later).unwrap();
        faults.arm(Fault { class: Some(CallClass::Write), errno: libc::ENOSPC, ..Fault::at(call) });
        let flushed = driver.flush();
        faults.disarm();
        for at in [200, 300, 400, 500] {
            driver.pread(at * KIB, &mut [0; 512]).unwrap();
        }
        driver.pwrite(0, &[2; 512], Durability::Fua).unwrap();
        let synced = log.records().iter().rposition(|record| record.change == Change::Sync).unwrap();
        // A crash now, of which nothing that was not synced comes back.
        let cut = log.len();
        let after = log.after_crash(nbd_img_formats::storage::FileId(0), cut, |_, _| {
            nbd_img_formats::storage::Fate::Lost
        });
        let mut bytes = vec![0; usize::try_from(after.len()).unwrap()];
        after.read(&mut bytes, 0);
        let again = open_writable(&MemoryStorage::copy_of(&bytes).unwrap());
        let mut got = [0; 512];
        again.pread(0, &mut got).unwrap();
        assert_eq!(got, [2; 512], "call {call}, {flushed:?}, last sync {synced} of {cut}");
        assert_eq!(driver.state(), State::Live);
    }
}

/// `fast` succeeds by entries alone, and changes nothing where it cannot.
#[test]
fn fast_zeroing_never_writes_zeroes() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=4k", MIB);
    let driver = open_kept(&memory);
    driver.pwrite(0, &[5; 65536], Durability::Later).unwrap();
    let whole = GuestRange::new(4096, 8192).unwrap();
    driver.write_zeroes(whole, request(Provision::Keep, true)).unwrap();
    driver.write_zeroes(GuestRange::new(5000, 100).unwrap(), request(Provision::Unmap, true)).unwrap();
    let before = read_all(&*driver);
    for (range, provision) in [
        ((100, 10_000), Provision::Unmap),
        ((32768, 4096), Provision::Allocate),
        ((0, 20_000), Provision::Keep),
    ] {
        let range = GuestRange::new(range.0, range.1).unwrap();
        let refused = driver.write_zeroes(range, request(provision, true)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::WouldBeSlow);
    }
    assert!(read_all(&*driver) == before);
    driver.close().unwrap();
    check(&folder, &memory, &before);
}

/// Features that nobody here knows lose their promise before the first change, and only then.
#[test]
fn unknown_autoclear_bits_are_cleared_by_the_first_change() {
    let folder = Folder::new();
    let memory = memory_of(&folder, "cluster_size=4k", MIB);
    memory.pwrite(&(1u64 << 40).to_be_bytes(), HostOffset(88), Durability::Later).unwrap();
    memory.pwrite(&(1u64 << 50 | 1).to_be_bytes(), HostOffset(80), Durability::Later).unwrap();
    let extensions = add_unknown_extension(&memory);
    let before = bytes_of(&*memory);
    let driver = open_kept(&memory);
    driver.flush().unwrap();
    driver.close().unwrap();
    assert!(bytes_of(&*memory) == before);
    let driver = open_kept(&memory);
    driver.pwrite(0, &[1], Durability::Later).unwrap();
    let after = bytes_of(&*memory);
    assert_eq!(after[88..96], [0; 8]);
    assert_eq!(after[..88], before[..88], "all else of the header stays");
    assert_eq!(after[96..extensions], before[96..extensions], "and so do extensions");
    driver.close().unwrap();
    let path = folder.file("again.qcow2");
    std::fs::write(&path, bytes_of(&*memory)).unwrap();
    qemu_io(&path, &["read -P 1 0 1".to_owned()]);
}

/// Adds a header extension of a type that nobody has; gives the end of all extensions.
fn add_unknown_extension(memory: &Arc<MemoryStorage>) -> usize {
    let image = bytes_of(&**memory);
    let word = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let mut at = word(100) as usize;
    while word(at) != 0 {
        at += 8 + (word(at + 4) as usize).next_multiple_of(8);
    }
    let extension =
        [&0x6e62_6421_u32.to_be_bytes()[..], &12_u32.to_be_bytes(), b"of somebody\0\0\0\0\0", &[0; 8]]
            .concat();
    memory.pwrite(&extension, HostOffset(at as u64), Durability::Later).unwrap();
    at + extension.len()
}

/// Refcounts of less than a byte end inside of one; what it counts behind the end of a device is not there.
#[test]
fn nothing_behind_the_end_of_a_device_is_handed_out() {
    let folder = Folder::new();
    for bits in [1, 2, 4, 8] {
        let options = format!("cluster_size=512,refcount_bits={bits}");
        let image = bytes_of(&*memory_of(&folder, &options, 40 * KIB));
        let len = (image.len() as u64).next_multiple_of(512);
        assert_ne!(len / 512 % 8, 0, "the image is to end inside of a byte of refcounts");
        let device = MemoryStorage::with(MemoryOptions { len, grows: false, poisoned: false }).unwrap();
        device.pwrite(&image, HostOffset(0), Durability::Later).unwrap();
        let driver = open_kept(&device);
        let error = driver.pwrite(0, &[7; 512], Durability::Later).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{bits}: {error}");
        driver.flush().unwrap();
        driver.close().unwrap();
        check(&folder, &device, &vec![0; 40 * KIB as usize]);
    }
}

/// One changed entry keeps all of its slice in memory: who changes one in each of many slices, and never flushes, starts
/// commits long before he has changed many bytes.
#[test]
fn a_change_here_and_there_does_not_keep_all_tables_in_memory() {
    const SLICE: u64 = 64 * 512;
    const SLICES: u64 = 600;
    let folder = Folder::new();
    let options = "cluster_size=512,preallocation=metadata,refcount_bits=1";
    let memory = memory_of(&folder, options, SLICES * SLICE);
    let storage = Wrapped::new(Arc::clone(&memory) as Arc<dyn Storage>, NeverClosed);
    // The cache has room for 128 slices, and 600 changed entries are far from 32 KiB.
    let write = WriteOptions { dirty_len_max: 32 * KIB, ..WriteOptions::default() };
    let driver = open_with(storage, None, 64 * KIB, write).unwrap();
    let mut refused = [0; 2];
    for number in 0..SLICES {
        let range = GuestRange::new(number * SLICE, 512).unwrap();
        driver.pread(range.offset(), &mut [0; 512]).unwrap();
        if !driver.try_discard(range, Durability::Later).unwrap() {
            refused[0] += 1;
            driver.discard(range, Durability::Later).unwrap();
        }
    }
    driver.flush().unwrap();
    for number in 0..SLICES {
        let range = GuestRange::new(number * SLICE, 512).unwrap();
        driver.pread(range.offset(), &mut [0; 512]).unwrap();
        let mut plan = WritePlan::default();
        driver.prepare_write(range, MapMode::Try, &mut plan).unwrap();
        if plan.pieces.iter().any(|piece| matches!(piece.place, Place::Slow(_))) {
            refused[1] += 1;
            driver.write_slow(range.offset(), &[1; 512]).unwrap();
        }
        driver.finish_write(&mut plan, true).unwrap();
    }
    assert!(refused.iter().all(|refused| (4..20).contains(refused)), "{refused:?}");
    driver.close().unwrap();
    let path = folder.file("written.qcow2");
    std::fs::write(&path, bytes_of(&*memory)).unwrap();
    assert_clean(&path);
}
