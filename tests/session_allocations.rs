//! The warm path allocates nothing: reads and writes that are served in place, in a session whose buffers have their
//! size. A file of its own, because it replaces the program's allocator by one that counts.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nbd_img::session::Times;
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::{BlockDriver, Format};
use support::client::{Request, go_data, greet, option_bytes, read_option_reply};
use support::in_process::InProcess;
use support::tools::qemu_img;
use support::wire::{command, option, option_reply};

const DISK_LEN: usize = 1 << 20;
const LEN: usize = 4096;
const DEPTH: usize = 16;
const ROUNDS: usize = 500;
/// More than a busy machine disturbs.
const LONG: Duration = Duration::from_secs(30);

/// Allocations of all threads but those that are part of the test.
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_CLIENT: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    if !IS_CLIENT.try_with(Cell::get).unwrap_or(true) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_len: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, new_len) }
    }
}

/// What a batch of `DEPTH` requests looks like on the wire.
fn batch(command: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..DEPTH {
        let request = Request::new(command, (index * 5 * LEN % DISK_LEN) as u64, LEN);
        bytes.extend(request.bytes(index as u64));
        if command == command::WRITE {
            bytes.extend([index as u8; LEN]);
        }
    }
    bytes
}

/// Allocations of the server during `ROUNDS` batches.
fn allocations(client: &mut UnixStream, command: u16, reply_len: usize) -> usize {
    let requests = batch(command);
    let mut replies = vec![0; reply_len * DEPTH];
    let before = COUNT.load(Ordering::Relaxed);
    for _ in 0..ROUNDS {
        client.write_all(&requests).unwrap();
        client.read_exact(&mut replies).unwrap();
    }
    COUNT.load(Ordering::Relaxed) - before
}

/// A raw disk in memory, and an allocated qcow2 image in the page cache.
fn drivers(folder: &Path) -> Vec<Arc<dyn BlockDriver>> {
    let raw = RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None };
    qemu_img(folder, &format!("create -f qcow2 -o preallocation=full image {DISK_LEN}"));
    let options = OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() };
    let memory = MemoryStorage::copy_of(&vec![3; DISK_LEN]).unwrap();
    vec![RawDriver::open(memory, raw).unwrap(), open(&folder.join("image"), &options).unwrap().driver]
}

fn connect(server: &InProcess, structured: bool) -> UnixStream {
    let mut client = greet(server.socket());
    client.write_all(&[0, 0, 0, 3]).unwrap();
    if structured {
        client.write_all(&option_bytes(option::STRUCTURED_REPLY, &[])).unwrap();
        assert_eq!(read_option_reply(&mut client, option::STRUCTURED_REPLY).unwrap().0, option_reply::ACK);
    }
    client.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
    while read_option_reply(&mut client, option::GO).unwrap().0 != option_reply::ACK {}
    client
}

#[test]
fn requests_that_are_served_in_place_allocate_nothing() {
    IS_CLIENT.set(true);
    let folder = tempfile::tempdir().unwrap();
    for driver in drivers(folder.path()) {
        let format = driver.facts().format;
        let server = InProcess::serve_driver(driver, 256 << 20, Times::default());
        // A chunk of data begins with its offset.
        for (structured, header_len, offset_len) in [(false, 16, 0), (true, 20, 8)] {
            let mut client = connect(&server, structured);
            let read_len = header_len + offset_len + LEN;
            for (name, command, reply_len) in
                [("read", command::READ, read_len), ("write", command::WRITE, header_len)]
            {
                let what =
                    format!("{} requests to {name}, {format}, structured: {structured}", ROUNDS * DEPTH);
                // A thread that loses its processor in a write takes the disk for slow, and hands its writes to workers
                // for a while, which takes memory.
                let begin = Instant::now();
                let mut counts = Vec::new();
                // Buffers that were idle for half a second are given back and taken anew: a test that stood still
                // may see that once or twice, but never once for each batch.
                while counts.last().is_none_or(|count| *count >= ROUNDS / 10) {
                    assert!(begin.elapsed() < LONG, "{counts:?} allocations for {what}, again and again");
                    counts.push(allocations(&mut client, command, reply_len));
                }
            }
        }
        server.assert_clean();
    }
    assert!(COUNT.load(Ordering::Relaxed) > 0, "the server's allocations are not counted");
}
