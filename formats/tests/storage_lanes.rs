//! Who may wait for whom: a storage's own operations get a thread while drivers' calls wait for them on all of theirs.
//! On the file system of the build, a disk: in memory operations are carried out at once.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod qcow2_support;
mod qcow2_write_support;

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::qcow2::WriteOptions;
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{
    Aio, Completed, Durability, FileOptions, FileStorage, InPlace, IoBuf, LockMode, MemoryStorage, Operation,
    OperationKind, Queue, Storage,
};
use nbd_img_formats::sync::{Arc, Mutex};
use nbd_img_formats::workers::{Lane, Workers};
use nbd_img_formats::{BlockDriver, GuestRange, HostOffset, Place, WritePlan};
use qcow2_support::qemu;
use qcow2_write_support::open_with;

/// More than a lane has threads.
const CALLS: usize = 32;

const PATIENCE: Duration = Duration::from_secs(20);

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path) -> Arc<FileStorage> {
    let storage =
        FileStorage::open(path, &FileOptions { writable: true, direct: false, lock: LockMode::Writer })
            .unwrap();
    assert_ne!(storage.facts().writes, InPlace::Always, "it would be no test");
    storage
}

fn queue(workers: &Arc<Workers>) -> Arc<Queue> {
    Arc::new(Queue::new(Arc::clone(workers), Aio::Threads).unwrap())
}

fn wait_for(queue: &Queue, count: usize) -> Vec<Completed> {
    let end = Instant::now() + PATIENCE;
    let mut got = Vec::new();
    while got.len() < count {
        assert!(Instant::now() < end, "{} of {count} answers", got.len());
        queue.drain(&mut got);
        std::thread::sleep(Duration::from_millis(1));
    }
    got
}

#[test]
fn writes_and_syncs_of_a_storage_wait_for_no_call_of_a_driver() {
    let folder = folder();
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let workers = Arc::new(Workers::new("test"));
    let (end, ended) = mpsc::channel::<()>();
    let ended = Arc::new(Mutex::new(ended));
    for _ in 0..CALLS {
        let ended = Arc::clone(&ended);
        assert!(workers.spawn(Lane::Write, Box::new(move || assert!(ended.lock().recv().is_err()))).is_ok());
    }
    let queue = queue(&workers);
    let operation = |kind, buf| Operation { kind, at: HostOffset(0), buf, token: 0 };
    let mut operations = vec![
        operation(OperationKind::Write(Durability::Later), IoBuf::copy_of(&[7; 4096])),
        operation(OperationKind::Write(Durability::Fua), IoBuf::copy_of(&[7; 4096])),
        operation(OperationKind::Sync, IoBuf::default()),
    ];
    open(&path).submit(&mut operations, &queue);
    for answer in wait_for(&queue, 3) {
        answer.result.unwrap();
    }
    drop(end);
    assert!(std::fs::read(&path).unwrap() == [7; 4096]);
}

#[test]
fn a_planned_write_ends_while_drivers_calls_wait_for_its_cluster_on_all_their_threads() {
    const CLUSTER_LEN: usize = 64 << 10;
    const PART_LEN: usize = 4096;
    let folder = folder();
    let path = folder.path().join("image.qcow2");
    qemu("qemu-img", ["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    let storage: Arc<dyn Storage> = open(&path);
    let below: Arc<dyn BlockDriver> =
        RawDriver::open(MemoryStorage::copy_of(&[0xbb; 1 << 20]).unwrap(), RawOptions::default()).unwrap();
    let driver = open_with(Arc::clone(&storage), Some(below), 1 << 20, WriteOptions::default()).unwrap();
    // Its tables are in memory from then on, as planning wants them.
    driver.pwrite(CLUSTER_LEN as u64, &[1], Durability::Later).unwrap();

    let mut plan = WritePlan::default();
    driver.prepare_write(GuestRange::new(0, CLUSTER_LEN as u64).unwrap(), MapMode::Try, &mut plan).unwrap();
    let [piece] = plan.pieces[..] else { panic!("{} pieces", plan.pieces.len()) };
    let Place::Data { at, .. } = piece.place else { panic!("{:?}", piece.place) };
    let workers = Arc::new(Workers::new("test"));
    let (done, is_done) = mpsc::channel();
    for number in 0..CALLS {
        let (driver, done) = (Arc::clone(&driver), done.clone());
        let part = number % (CLUSTER_LEN / PART_LEN);
        let write = move || {
            let at = (part * PART_LEN) as u64;
            done.send(driver.pwrite(at, &[part as u8; PART_LEN], Durability::Later)).unwrap();
        };
        assert!(workers.spawn(Lane::Write, Box::new(write)).is_ok());
    }
    let queue = queue(&workers);
    let buf = IoBuf::copy_of(&[0xee; CLUSTER_LEN]);
    let kind = OperationKind::Write(Durability::Later);
    storage.submit(&mut vec![Operation { kind, at, buf, token: 0 }], &queue);
    wait_for(&queue, 1).remove(0).result.unwrap();
    assert!(is_done.try_recv().is_err(), "a call has not waited for the cluster: it was no test");
    driver.finish_write(&mut plan, true).unwrap();
    for _ in 0..CALLS {
        is_done.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    let mut got = vec![0; CLUSTER_LEN];
    driver.pread(0, &mut got).unwrap();
    assert!(got.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / PART_LEN));
}
