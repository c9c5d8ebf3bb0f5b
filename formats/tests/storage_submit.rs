//! Submitted operations: each is answered exactly once, with its own buffer, whatever happens.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nbd_img_formats::HostOffset;
use nbd_img_formats::storage::failing::FailingStorage;
use nbd_img_formats::storage::{
    Aio, CallClass, Completed, Durability, Fault, Faults, FileOptions, FileStorage, IoBuf, LockMode,
    MappedStorage, MemoryStorage, Operation, OperationKind, Queue, Storage,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::workers::Workers;

const BLOCK_LEN: usize = 5000;

fn queue() -> Arc<Queue> {
    Arc::new(Queue::new(Arc::new(Workers::new("test")), Aio::Auto).unwrap())
}

fn wait_for(queue: &Queue, count: usize) -> Vec<Completed> {
    let end = Instant::now() + Duration::from_secs(30);
    let mut got = Vec::new();
    while got.len() < count {
        assert!(Instant::now() < end, "{} of {count} answers", got.len());
        let mut fds = [rustix::event::PollFd::new(queue, rustix::event::PollFlags::IN)];
        let time = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&time)).unwrap();
        queue.drain(&mut got);
    }
    got
}

fn operation(kind: OperationKind, block: usize, buf: IoBuf) -> Operation {
    Operation { kind, at: HostOffset((block * BLOCK_LEN) as u64), buf, token: block as u64 }
}

/// Writes 200 blocks, syncs, reads them back; all by `submit`.
fn round_trip(storage: &Arc<dyn Storage>) {
    let queue = queue();
    let block = |block: usize| vec![block as u8 ^ 0x55; BLOCK_LEN];
    let durability =
        |block: usize| if block.is_multiple_of(50) { Durability::Fua } else { Durability::Later };
    let mut operations: Vec<Operation> = (0..200)
        .map(|i| operation(OperationKind::Write(durability(i)), i, IoBuf::copy_of(&block(i))))
        .collect();
    Arc::clone(storage).submit(&mut operations, &queue);
    assert!(operations.is_empty());
    for answer in wait_for(&queue, 200) {
        assert_eq!(answer.result.unwrap(), BLOCK_LEN);
        assert!(answer.buf[..] == block(answer.token as usize), "the buffer comes back");
    }
    let mut sync = vec![operation(OperationKind::Sync, 0, IoBuf::default())];
    Arc::clone(storage).submit(&mut sync, &queue);
    wait_for(&queue, 1).remove(0).result.unwrap();
    let mut reads = (0..201).map(|i| operation(OperationKind::Read, i, IoBuf::zeroed(BLOCK_LEN))).collect();
    Arc::clone(storage).submit(&mut reads, &queue);
    let answers: BTreeMap<u64, Completed> =
        wait_for(&queue, 201).into_iter().map(|answer| (answer.token, answer)).collect();
    assert_eq!(answers.len(), 201, "each exactly once");
    for (token, answer) in answers {
        let expected = if token == 200 { 0 } else { BLOCK_LEN };
        assert_eq!(answer.result.unwrap(), expected);
        assert!(expected == 0 || answer.buf[..] == block(token as usize));
    }
}

#[test]
fn every_storage_answers_each_operation_once() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, direct| {
        let path = folder.path().join(name);
        std::fs::write(&path, b"").unwrap();
        FileStorage::open(&path, &FileOptions { writable: true, direct, lock: LockMode::Writer }).unwrap()
    };
    let storages: [Arc<dyn Storage>; 4] = [
        MemoryStorage::new(0).unwrap(),
        open("buffered", false),
        open("direct", true),
        MappedStorage::new(open("mapped", false)).unwrap(),
    ];
    for storage in storages {
        round_trip(&storage);
    }
}

#[test]
fn a_failed_operation_is_answered_with_its_errno() {
    let faults = Faults::new();
    let storage: Arc<FailingStorage> = faults.attach(MemoryStorage::new(1 << 20).unwrap());
    faults.arm(Fault { class: Some(CallClass::Read), errno: libc::ENXIO, ..Fault::at(1) });
    let queue = queue();
    let mut reads = (0..3).map(|i| operation(OperationKind::Read, i, IoBuf::zeroed(512))).collect();
    storage.submit(&mut reads, &queue);
    let failed: Vec<i32> =
        wait_for(&queue, 3).into_iter().filter_map(|a| a.result.err().map(|e| e.errno())).collect();
    assert_eq!(failed, [libc::ENXIO]);
}

#[test]
fn a_panic_is_an_error_of_its_operation_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![1; 100 * BLOCK_LEN]).unwrap();
    let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    let file: Arc<dyn Storage> = FileStorage::open(&path, &options).unwrap();
    let memory: Arc<dyn Storage> = MemoryStorage::new((100 * BLOCK_LEN) as u64).unwrap();
    for inner in [file, memory] {
        let faults = Faults::new();
        let storage = faults.attach(inner);
        faults.arm(Fault { panics: true, ..Fault::at(30) });
        let queue = queue();
        let mut reads = (0..100).map(|i| operation(OperationKind::Read, i, IoBuf::zeroed(512))).collect();
        storage.submit(&mut reads, &queue);
        let answers = wait_for(&queue, 100);
        let failed: Vec<&Completed> = answers.iter().filter(|answer| answer.result.is_err()).collect();
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].buf.len(), 512, "the buffer comes back all the same");
    }
}
