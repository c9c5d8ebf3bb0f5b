//! A disk that becomes longer while something is on its way to the last cluster of its old size: what is written behind the
//! old end stays.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nbd_img_formats::qcow2::{Compress, Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, GuestRange, Provision, ZeroRequest};
use support::maker::Maker;
use support::scene;
use support::steps::read_all;
use support::wrapped::{Hooks, Wrapped};

/// Holds the first one who takes room once it is armed, until it is let go.
#[derive(Default)]
struct Gate {
    armed: AtomicBool,
    entered: AtomicBool,
    open: AtomicBool,
}

struct Gated(Arc<Gate>);

impl Hooks for Gated {
    fn takes_room(&self, _at: u64, _len: u64) -> bool {
        if self.0.armed.swap(false, Ordering::SeqCst) {
            self.0.entered.store(true, Ordering::SeqCst);
            wait_for(&self.0.open);
        }
        true
    }
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Zeroes with room, up to the old end, that are on their way to the whole last cluster when the disk grows: what comes
/// to the rest of that cluster is not lost to them.
#[test]
fn zeroes_under_way_for_the_last_cluster_are_waited_for() {
    let maker = Maker::new("cluster_size=64k", 100_000);
    maker.write(65_536, &[5; 1000], false);
    let driver = grow_past(&maker, WriteOptions::default(), |driver, end| {
        let range = GuestRange::new(65_536, end - 65_536).unwrap();
        let provision = Provision::Allocate;
        let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
        driver.write_zeroes(range, request).unwrap();
    });
    let mut found = vec![1; 1000];
    driver.pread(65_536, &mut found).unwrap();
    assert_eq!(found, [0; 1000]);
}

/// The same with the last of several batches that are compressed, which was all of its cluster when the write came.
#[test]
fn a_compressed_write_of_the_last_cluster_leaves_the_rest_alone() {
    let maker = Maker::new("cluster_size=64k", (5 << 20) + 1024);
    let options = WriteOptions { compress: Some(Compress::default()), ..WriteOptions::default() };
    let driver = grow_past(&maker, options, |driver, end| {
        driver.pwrite(0, &vec![7; end as usize], Durability::Later).unwrap();
    });
    assert!(read_all(&*driver).unwrap()[..(5 << 20) + 1024].iter().all(|byte| *byte == 7));
}

/// Lets the disk grow, and somebody write behind its old end, while `change` of what lies before that is held up in its
/// first write to the file. What was written is there afterwards.
fn grow_past(
    maker: &Maker,
    options: WriteOptions,
    change: impl FnOnce(&Qcow2Driver, u64) + Send,
) -> Arc<Qcow2Driver> {
    let gate = Arc::new(Gate::default());
    let storage = MemoryStorage::copy_of(&maker.bytes()).unwrap();
    let storage = Wrapped::new(storage, Gated(Arc::clone(&gate)));
    let driver = scene::open_over(storage, None, Some(options), 1 << 20).unwrap();
    let end = driver.size();
    let written = AtomicBool::new(false);
    gate.armed.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        scope.spawn(|| change(&driver, end));
        wait_for(&gate.entered);
        scope.spawn(|| {
            driver.resize(end + 4096).unwrap();
            driver.pwrite(end, &[8; 4096], Durability::Later).unwrap();
            written.store(true, Ordering::SeqCst);
        });
        // Whoever is waited for holds this up until the gate is open, and the sooner it is opened the later a defect
        // shows.
        for _ in 0..300 {
            if written.load(Ordering::SeqCst) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        gate.open.store(true, Ordering::SeqCst);
    });
    let mut found = vec![1; 4096];
    driver.pread(end, &mut found).unwrap();
    assert!(found == [8; 4096], "what was written behind the old end is lost");
    driver
}
