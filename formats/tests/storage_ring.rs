//! Operations on a ring: all kinds, more than it holds, short ones, failed ones, and what becomes of them when their
//! reader goes. On the file system of the build, a disk: in memory nothing would ever be on a ring.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nbd_img_formats::storage::{
    Aio, BufPool, Completed, Durability, FileOptions, FileStorage, IoBuf, LockMode, MappedStorage, Operation,
    OperationKind, Queue, Storage,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::workers::Workers;
use nbd_img_formats::{ErrorKind, HostOffset};
use support::random::Random;

const BLOCK_LEN: usize = 4096;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn queue(aio: Aio) -> Arc<Queue> {
    Arc::new(Queue::new(Arc::new(Workers::new("test")), aio).unwrap())
}

fn open(path: &Path, writable: bool, direct: bool) -> Arc<FileStorage> {
    FileStorage::open(path, &FileOptions { writable, direct, lock: LockMode::Writer }).unwrap()
}

/// The content of a block in its n-th edition.
fn block(number: u64, edition: u64) -> Vec<u8> {
    Random::new((number << 8) | edition).bytes(BLOCK_LEN as u64)
}

/// A file of so many blocks in their first edition, opened for writing.
fn disk(path: &Path, blocks: u64, direct: bool) -> Arc<FileStorage> {
    let content: Vec<u8> = (0..blocks).flat_map(|number| block(number, 0)).collect();
    std::fs::write(path, content).unwrap();
    open(path, true, direct)
}

fn operation(kind: OperationKind, number: u64, buf: IoBuf) -> Operation {
    Operation { kind, at: HostOffset(number * BLOCK_LEN as u64), buf, token: number }
}

fn read(number: u64) -> Operation {
    operation(OperationKind::Read, number, IoBuf::zeroed(BLOCK_LEN))
}

fn write(number: u64, edition: u64, durability: Durability) -> Operation {
    operation(OperationKind::Write(durability), number, IoBuf::copy_of(&block(number, edition)))
}

fn submit(storage: &Arc<FileStorage>, queue: &Arc<Queue>, operations: impl IntoIterator<Item = Operation>) {
    let mut operations: Vec<Operation> = operations.into_iter().collect();
    Arc::clone(storage).submit(&mut operations, queue);
    assert!(operations.is_empty());
}

fn is_readable(queue: &Queue, patience: i64) -> bool {
    let mut fds = [rustix::event::PollFd::new(queue, rustix::event::PollFlags::IN)];
    let time = rustix::time::Timespec { tv_sec: patience, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&time)).unwrap() == 1
}

/// Waits on the descriptor for so many answers, and for no more.
fn answers(queue: &Queue, count: usize) -> BTreeMap<u64, Completed> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut got = Vec::new();
    while got.len() < count {
        assert!(Instant::now() < end, "{} of {count} answers", got.len());
        if is_readable(queue, 1) {
            queue.drain(&mut got);
        }
    }
    // What wakes this up for the last answers may come a moment after them, but not again and again.
    queue.drain(&mut got);
    while is_readable(queue, 0) {
        assert!(Instant::now() < end, "readable without an answer");
        queue.drain(&mut got);
    }
    assert_eq!(got.len(), count, "more answers than operations");
    let by_token: BTreeMap<u64, Completed> = got.into_iter().map(|answer| (answer.token, answer)).collect();
    assert_eq!(by_token.len(), count, "each exactly once");
    by_token
}

fn assert_ring(queue: &Queue) {
    assert!(queue.has_ring(), "io_uring cannot be had here, or not for this file system: nothing was tested");
}

#[test]
fn every_kind_of_operation_without_a_page_cache() {
    let folder = folder();
    let storage = disk(&folder.path().join("disk"), 200, true);
    let queue = queue(Aio::IoUring);
    let durability = |n: u64| if n.is_multiple_of(3) { Durability::Fua } else { Durability::Later };
    submit(&storage, &queue, (0..200).map(|n| write(n, 1, durability(n))));
    for (number, answer) in answers(&queue, 200) {
        assert_eq!(answer.result.unwrap(), BLOCK_LEN);
        assert!(answer.buf[..] == block(number, 1)[..], "the buffer comes back");
    }
    submit(&storage, &queue, [operation(OperationKind::Sync, 0, IoBuf::default())]);
    assert_eq!(answers(&queue, 1).remove(&0).unwrap().result.unwrap(), 0);
    submit(&storage, &queue, (0..200).map(read));
    for (number, answer) in answers(&queue, 200) {
        assert_eq!(answer.result.unwrap(), BLOCK_LEN);
        assert!(answer.buf[..] == block(number, 1)[..]);
    }
    assert_ring(&queue);
}

#[test]
fn more_operations_than_a_ring_holds() {
    let folder = folder();
    let storage = disk(&folder.path().join("disk"), 3000, true);
    let queue = queue(Aio::Auto);
    let pool = BufPool::new();
    for round in 1..4 {
        let operations = (0..3000).map(|n| match n % 2 {
            0 => write(n, round, Durability::Later),
            _ => operation(OperationKind::Read, n, pool.take(BLOCK_LEN)),
        });
        submit(&storage, &queue, operations);
        for (number, answer) in answers(&queue, 3000) {
            assert_eq!(answer.result.unwrap(), BLOCK_LEN);
            let edition = if number % 2 == 0 { round } else { 0 };
            assert!(answer.buf[..] == block(number, edition)[..]);
        }
    }
    assert_ring(&queue);
}

#[test]
fn reads_end_where_the_file_ends() {
    let folder = folder();
    let path = folder.path().join("disk");
    for direct in [false, true] {
        let content = Random::new(1).bytes(10 * BLOCK_LEN as u64 + 700);
        std::fs::write(&path, &content).unwrap();
        let storage = open(&path, false, direct);
        forget_pages(&path);
        let queue = queue(Aio::IoUring);
        let long =
            |number, blocks: usize| operation(OperationKind::Read, number, IoBuf::zeroed(blocks * BLOCK_LEN));
        submit(
            &storage,
            &queue,
            [long(0, 32), long(9, 1), long(10, 1), long(10, 4), long(11, 1), long(50, 2)].map(
                |mut operation| {
                    operation.token = (operation.at.0 << 8) | (operation.buf.len() / BLOCK_LEN) as u64;
                    operation
                },
            ),
        );
        for (token, answer) in answers(&queue, 6) {
            let at = (token >> 8) as usize;
            let expected = content.get(at..).unwrap_or_default();
            let expected = &expected[..expected.len().min(answer.buf.len())];
            assert_eq!(answer.result.unwrap(), expected.len(), "from {at}, direct: {direct}");
            assert!(&answer.buf[..expected.len()] == expected);
        }
        assert_ring(&queue);
    }
}

/// Drops the file from the page cache.
fn forget_pages(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn what_is_not_in_memory_is_read_from_the_disk() {
    let folder = folder();
    let path = folder.path().join("disk");
    let file = disk(&path, 500, false);
    let mapped: Arc<dyn Storage> = MappedStorage::new(Arc::clone(&file)).unwrap();
    for storage in [file as Arc<dyn Storage>, mapped] {
        forget_pages(&path);
        let queue = queue(Aio::Auto);
        let mut reads: Vec<Operation> = (0..500).map(read).collect();
        Arc::clone(&storage).submit(&mut reads, &queue);
        for (number, answer) in answers(&queue, 500) {
            assert_eq!(answer.result.unwrap(), BLOCK_LEN);
            assert!(answer.buf[..] == block(number, 0)[..]);
        }
        assert_ring(&queue);
    }
}

#[test]
fn what_fits_no_block_and_what_does_get_along() {
    // Threads change parts of blocks that the ring writes as a whole: neither may undo the other.
    const BLOCKS: u64 = 16;
    let folder = folder();
    let path = folder.path().join("disk");
    let storage = disk(&path, BLOCKS, true);
    let queue = queue(Aio::IoUring);
    let mut shadow: Vec<u8> = (0..BLOCKS).flat_map(|n| block(n, 0)).collect();
    let mut random = Random::new(5);
    for _ in 0..60 {
        // Each of a round has bytes of its own, but blocks are shared by those that are not whole.
        let mut operations = Vec::new();
        for number in 0..BLOCKS {
            let at = number as usize * BLOCK_LEN;
            let pieces: &[(usize, usize)] =
                if random.below(2) == 0 { &[(0, BLOCK_LEN)] } else { &[(0, 512), (512, 100), (612, 3484)] };
            for (from, len) in pieces {
                let bytes = random.bytes(*len as u64);
                shadow[at + from..][..*len].copy_from_slice(&bytes);
                operations.push(Operation {
                    kind: OperationKind::Write(Durability::Later),
                    at: HostOffset((at + from) as u64),
                    buf: IoBuf::copy_of(&bytes),
                    token: (at + from) as u64,
                });
            }
        }
        let count = operations.len();
        submit(&storage, &queue, operations);
        for answer in answers(&queue, count).into_values() {
            answer.result.unwrap();
        }
    }
    assert!(std::fs::read(&path).unwrap() == shadow);
    assert_ring(&queue);
}

#[test]
fn writes_behind_the_end_make_the_file_longer() {
    let folder = folder();
    let path = folder.path().join("disk");
    let storage = disk(&path, 4, true);
    let queue = queue(Aio::IoUring);
    submit(&storage, &queue, (0..64).map(|n| write(n, 1, Durability::Later)));
    for answer in answers(&queue, 64).into_values() {
        answer.result.unwrap();
    }
    let expected: Vec<u8> = (0..64).flat_map(|n| block(n, 1)).collect();
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_ring(&queue);
}

#[test]
fn failures_keep_their_errno_and_their_buffer() {
    let folder = folder();
    let path = folder.path().join("disk");
    drop(disk(&path, 8, true));
    let storage = open(&path, false, true);
    let queue = queue(Aio::IoUring);
    submit(&storage, &queue, [read(0), write(1, 1, Durability::Later), write(2, 1, Durability::Fua)]);
    let mut got = answers(&queue, 3);
    assert!(got.remove(&0).unwrap().result.is_ok());
    for (number, answer) in got {
        let error = answer.result.unwrap_err();
        assert_eq!(error.errno(), libc::EBADF, "{error}");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(answer.buf[..] == block(number, 1)[..]);
    }
    assert_ring(&queue);

    // After the close nothing is changed.
    drop(storage);
    let storage = open(&path, true, true);
    storage.close().unwrap();
    submit(
        &storage,
        &queue,
        [write(3, 1, Durability::Later), operation(OperationKind::Sync, 4, IoBuf::default())],
    );
    for answer in answers(&queue, 2).into_values() {
        assert_eq!(answer.result.unwrap_err().errno(), libc::EBADF);
    }
    let expected: Vec<u8> = (0..8).flat_map(|n| block(n, 0)).collect();
    assert!(std::fs::read(&path).unwrap() == expected);
}

#[test]
fn a_reader_that_winds_up_gets_every_answer() {
    let folder = folder();
    let path = folder.path().join("disk");
    let storage = disk(&path, 200, true);
    let queue = queue(Aio::IoUring);
    submit(&storage, &queue, (0..200).map(|n| write(n, 1, Durability::Later)));
    assert_ring(&queue);
    let mut got = Vec::new();
    queue.wind_up(&mut got);
    assert!(got.iter().all(|answer| answer.result.is_ok()));
    let by_threads = 200 - got.len();
    let by_threads = answers(&queue, by_threads);
    assert!(got.iter().all(|answer| !by_threads.contains_key(&answer.token)));
    let expected: Vec<u8> = (0..200).flat_map(|n| block(n, 1)).collect();
    assert!(std::fs::read(&path).unwrap() == expected);
    // From now on threads do it.
    assert!(!queue.has_ring());
    submit(&storage, &queue, (0..200).map(read));
    assert_eq!(answers(&queue, 200).len(), 200);
    // Nothing holds the file back: the next one can lock it, as soon as the threads that have answered let it go.
    drop((storage, queue, got));
    let options = FileOptions { writable: true, direct: true, lock: LockMode::Writer };
    let begin = Instant::now();
    while let Err(error) = FileStorage::open(&path, &options) {
        assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_reader_that_goes_without_a_word_leaves_memory_and_locks_to_the_kernel() {
    let folder = folder();
    let path = folder.path().join("disk");
    let storage = disk(&path, 200, true);
    let inner = Arc::clone(&storage);
    std::thread::spawn(move || {
        let queue = queue(Aio::IoUring);
        submit(&inner, &queue, (0..200).map(|n| write(n, 1, Durability::Later)));
        assert_ring(&queue);
    })
    .join()
    .unwrap();
    // Whatever the kernel does with them now, it does with memory that nobody else has: reading the file goes on, and
    // the image stays locked, because nobody can tell whether a write is still under way.
    storage.close().unwrap();
    drop(storage);
    let options = FileOptions { writable: true, direct: true, lock: LockMode::Writer };
    assert_eq!(FileStorage::open(&path, &options).map(drop).unwrap_err().kind(), ErrorKind::Locked);
    let file = File::open(&path).unwrap();
    for number in 0..200 {
        let mut bytes = vec![0; BLOCK_LEN];
        file.read_exact_at(&mut bytes, number * BLOCK_LEN as u64).unwrap();
        assert!(bytes == block(number, 0) || bytes == block(number, 1), "block {number}");
    }
}

#[test]
fn who_submits_from_elsewhere_is_served_by_threads() {
    let folder = folder();
    let storage = disk(&folder.path().join("disk"), 100, true);
    let queue = queue(Aio::IoUring);
    submit(&storage, &queue, (0..50).map(read));
    let (other_storage, other_queue) = (Arc::clone(&storage), Arc::clone(&queue));
    std::thread::spawn(move || submit(&other_storage, &other_queue, (50..100).map(read))).join().unwrap();
    for (number, answer) in answers(&queue, 100) {
        answer.result.unwrap();
        assert!(answer.buf[..] == block(number, 0)[..]);
    }
    assert_ring(&queue);
}

#[test]
fn threads_do_the_same_when_they_are_asked_for() {
    let folder = folder();
    let storage = disk(&folder.path().join("disk"), 100, true);
    let queue = queue(Aio::Threads);
    submit(&storage, &queue, (0..100).map(read));
    for (number, answer) in answers(&queue, 100) {
        answer.result.unwrap();
        assert!(answer.buf[..] == block(number, 0)[..]);
    }
    assert!(!queue.has_ring());
    assert!(queue.as_fd().try_clone_to_owned().is_ok());
}
