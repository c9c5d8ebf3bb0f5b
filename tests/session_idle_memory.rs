//! What an idle connection keeps in memory: next to nothing, whatever it did before. A file of its own, because it replaces
//! the program's allocator by one that counts.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use nbd_img::session::Times;
use nbd_img_formats::Format;
use nbd_img_formats::open::{OpenOptions, open};
use support::client::{Client, Wishes};
use support::in_process::InProcess;
use support::tools::qemu_img;
use support::{scratch, wait_until};

/// Bytes that are allocated.
static LIVE_LEN: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_LEN.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE_LEN.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

const CLUSTER_LEN: usize = 512;
const LEN: usize = 1 << 20;

/// The plan of a read of 2,048 pieces stayed with its session.
#[test]
fn an_idle_connection_gives_the_plans_of_fragmented_reads_back() {
    let folder = scratch("idle-memory");
    qemu_img(folder.path(), &format!("create -q -f qcow2 -o cluster_size={CLUSTER_LEN} disk {LEN}"));
    let options = OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() };
    let driver = open(&folder.path().join("disk"), &options).unwrap().driver;
    let server = InProcess::serve_driver(driver.clone(), 64 << 20, Times::default());
    let mut first = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    for at in (0..LEN).step_by(2 * CLUSTER_LEN) {
        first.write(at as u64, &[1; CLUSTER_LEN]);
    }
    first.read(0, LEN);
    first.disconnect();
    server.assert_clean();
    let before = LIVE_LEN.load(Ordering::Relaxed);
    let mut clients: Vec<Client> =
        (0..8).map(|_| Client::unix(server.socket(), "", Wishes::STRUCTURED)).collect();
    for client in &mut clients {
        client.read(0, LEN);
    }
    let kept_max = clients.len() * (24 << 10);
    wait_until("the plans are given back", || LIVE_LEN.load(Ordering::Relaxed) < before + kept_max);
    // And they still work.
    for mut client in clients {
        assert_eq!(client.read(0, CLUSTER_LEN), [1; CLUSTER_LEN]);
        client.disconnect();
    }
    server.assert_clean();
    driver.close().unwrap();
}
