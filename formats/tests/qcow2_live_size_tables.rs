//! Another size for a disk while it is used, and what becomes of its tables: the L1 table moves also where the only room
//! is what was given back, and what is behind the end of the disk does not come back with a new L2 table.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nbd_img_formats::qcow2::{ResizeParts, resize};
use nbd_img_formats::storage::{MemoryOptions, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, GuestRange, HostOffset};
use support::checker;
use support::maker::Maker;
use support::scene::{self, CLUSTER};
use support::steps::read_all;
use support::wrapped::{NeverClosed, Wrapped};

/// What one entry of the L1 table stands for.
const TABLE: u64 = 64 * CLUSTER;
/// Longer than any of this takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device with these bytes and no room behind them.
fn full_device(bytes: &[u8]) -> Arc<MemoryStorage> {
    let len = (bytes.len() as u64).next_multiple_of(CLUSTER);
    let device = MemoryStorage::with(MemoryOptions { len, grows: false, poisoned: true }).unwrap();
    device.pwrite(bytes, HostOffset(0), Durability::Later).unwrap();
    device
}

#[test]
fn the_l1_table_moves_into_a_cluster_that_was_given_back() {
    let maker = Maker::new("cluster_size=512", 2 * TABLE);
    let device = full_device(&maker.write(0, &[1; 16 * CLUSTER as usize], false).bytes());
    let image: Arc<dyn Storage> = Wrapped::new(device.clone(), NeverClosed);
    let driver = scene::open_parts(image, None, None, Some(Default::default()), 1 << 20).unwrap();
    let full = (16..64).find_map(|cluster| {
        driver.pwrite(cluster * CLUSTER, &[2; CLUSTER as usize], Durability::Later).err()
    });
    assert_eq!(full.unwrap().errno(), libc::ENOSPC);
    let mut content = read_all(&*driver).unwrap();
    // One for the table, and nothing behind the end for whoever looks only there.
    driver.discard(GuestRange::new(3 * CLUSTER, CLUSTER).unwrap(), Durability::Later).unwrap();
    content[3 * CLUSTER as usize..4 * CLUSTER as usize].fill(0);
    driver.flush().unwrap();
    let (answer, answered) = mpsc::channel();
    let growing = driver.clone();
    // Not a scoped thread: who never comes back is not waited for.
    thread::spawn(move || answer.send(growing.resize(5 * TABLE)));
    answered.recv_timeout(PATIENCE).unwrap().unwrap();
    content.resize(5 * TABLE as usize, 0);
    assert!(read_all(&*driver).unwrap() == content);
    // Where the table was is free now.
    driver.pwrite(3 * CLUSTER, &[3; CLUSTER as usize], Durability::Fua).unwrap();
    driver.close().unwrap();
    let report = checker::check_storage(&*device).unwrap();
    assert!(report.is_clean(), "{report}");
}

/// The table that a snapshot shares keeps what is behind the end of a disk that nobody used as it became smaller. A copy of
/// it that goes when the disk becomes smaller still takes that along.
#[test]
fn a_new_l2_table_has_nothing_of_one_that_is_gone() {
    let maker = Maker::new("cluster_size=512", 3 * TABLE);
    let bytes = maker.write(2 * TABLE, &[1; TABLE as usize], false).snapshot("first").bytes();
    let memory = MemoryStorage::copy_of(&bytes).unwrap();
    let image = || -> Arc<dyn Storage> { Wrapped::new(memory.clone(), NeverClosed) };
    let half = TABLE / 2;
    let parts = ResizeParts { image: image(), data_file: None, backing: None, foreign: false };
    resize(&parts, 5 * half).unwrap();
    let driver = scene::open_parts(image(), None, None, Some(Default::default()), 1 << 20).unwrap();
    driver.resize(3 * half).unwrap();
    driver.resize(6 * half).unwrap();
    let mut content = vec![0; 6 * half as usize];
    assert!(read_all(&*driver).unwrap() == content);
    let at = 2 * TABLE + 6 * CLUSTER;
    content[at as usize..(at + CLUSTER) as usize].fill(2);
    driver.pwrite(at, &[2; CLUSTER as usize], Durability::Later).unwrap();
    let found = read_all(&*driver).unwrap();
    assert_eq!(found.iter().zip(&content).position(|(a, b)| a != b), None);
    driver.close().unwrap();
    let report = checker::check_storage(&*memory).unwrap();
    assert!(report.is_clean(), "{report}");
}
