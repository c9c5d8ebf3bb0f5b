//! The raw driver when calls below it fail, one after the other, and what stays afterwards.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{CallClass, Fault, Faults, FileOptions, FileStorage, LockMode, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, Provision, Result, State, ZeroRequest,
};

const SIZE: usize = 64 << 10;
const FILE_LEN: usize = SIZE - 100;

/// A step of a script: what it does, and what the disk is to be like if it succeeds.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64, Durability),
    Zero(u64, u64, Provision, Durability),
    Discard(u64, u64),
    Flush,
    Read(u64, u64),
}

const SCRIPTS: [&[Step]; 3] = [
    &[
        Step::Write(0, 5000, Durability::Later),
        Step::Flush,
        Step::Zero(100, 9000, Provision::Unmap, Durability::Later),
        Step::Read(0, 20_000),
        Step::Write(4096, 4096, Durability::Fua),
        Step::Discard(8192, 8192),
        Step::Flush,
    ],
    &[
        Step::Read(0, SIZE as u64),
        Step::Write(SIZE as u64 - 300, 300, Durability::Later),
        Step::Write(SIZE as u64 - 50, 50, Durability::Fua),
        Step::Read(SIZE as u64 - 512, 512),
        Step::Flush,
    ],
    &[
        Step::Zero(0, SIZE as u64, Provision::Allocate, Durability::Fua),
        Step::Write(1000, 1, Durability::Later),
        Step::Discard(0, SIZE as u64),
        Step::Zero(0, 512, Provision::Keep, Durability::Later),
        Step::Flush,
        Step::Write(5, 9, Durability::Later),
    ],
];

fn first_content() -> Vec<u8> {
    let mut content = vec![0; SIZE];
    content[..FILE_LEN].fill(0x11);
    content
}

fn open(faults: &Arc<Faults>) -> Arc<RawDriver> {
    let memory = MemoryStorage::copy_of(&first_content()[..FILE_LEN]).unwrap();
    RawDriver::open(faults.attach(memory), RawOptions::default()).unwrap()
}

fn range(offset: u64, len: u64) -> GuestRange {
    GuestRange::new(offset, len).unwrap()
}

fn run(disk: &RawDriver, step: Step, byte: u8) -> Result<()> {
    match step {
        Step::Write(at, len, durability) => disk.pwrite(at, &vec![byte; len as usize], durability),
        Step::Zero(at, len, provision, durability) => {
            disk.write_zeroes(range(at, len), ZeroRequest { provision, fast: false, durability })
        }
        Step::Discard(at, len) => disk.discard(range(at, len), Durability::Later),
        Step::Flush => disk.flush(),
        Step::Read(at, len) => disk.pread(at, &mut vec![0; len as usize]),
    }
}

/// The range that a step changes, and what it puts there.
fn effect(step: Step, byte: u8) -> Option<(std::ops::Range<usize>, u8)> {
    match step {
        Step::Write(at, len, _) => Some((at as usize..(at + len) as usize, byte)),
        Step::Zero(at, len, ..) | Step::Discard(at, len) => Some((at as usize..(at + len) as usize, 0)),
        Step::Flush | Step::Read(..) => None,
    }
}

/// Runs a script in which one call fails. Returns whether it came to that.
fn run_with_fault(script: &[Step], fault: Fault) -> bool {
    let faults = Faults::new();
    let disk = open(&faults);
    faults.arm(fault);
    let mut content: Vec<Vec<u8>> = first_content().into_iter().map(|byte| vec![byte]).collect();
    let mut failed = false;
    let mut sync_failed = false;
    for (number, step) in script.iter().enumerate() {
        let byte = 0x20 + number as u8;
        let fired = faults.fired();
        let syncs = faults.count(CallClass::Sync);
        let result = run(&disk, *step, byte);
        let hit = faults.fired() > fired;
        let mutates = effect(*step, byte).is_some() || matches!(step, Step::Flush);
        match &result {
            Ok(()) => assert!(!(sync_failed && mutates), "{step:?} succeeded after a failed sync"),
            Err(error) => {
                assert!(hit || sync_failed, "{step:?} failed without a cause: {error}");
                assert!(error.errno() == fault.errno || sync_failed, "{error}");
            }
        }
        failed |= result.is_err();
        sync_failed |= hit && faults.count(CallClass::Sync) > syncs && result.is_err();
        sync_failed |= disk.state() == State::Failed;
        if let Some((range, new)) = effect(*step, byte) {
            for possible in &mut content[range] {
                // A step that failed may have been done, not been done, or been done in part.
                if result.is_ok() && !matches!(step, Step::Discard(..)) {
                    possible.clear();
                }
                possible.push(new);
            }
        }
    }
    faults.disarm();
    let mut got = vec![0; SIZE];
    disk.pread(0, &mut got).unwrap();
    let disk_was_live = disk.state() == State::Live;
    let wrong = got.iter().zip(&content).position(|(byte, possible)| !possible.contains(byte));
    assert_eq!(wrong, None, "{fault:?}: a byte is what nobody wrote");
    // Whoever closes it must not think that all is well.
    assert_eq!(disk.close().is_ok(), disk_was_live, "{fault:?}");
    assert_eq!(disk.state(), State::Closed);
    disk.close().unwrap();
    failed || faults.fired() > 0
}

#[test]
fn every_call_of_every_script_may_fail() {
    let mut runs = 0;
    for script in SCRIPTS {
        for errno in [libc::EIO, libc::ENOSPC] {
            for sticky in [false, true] {
                let mut call = 0;
                while run_with_fault(script, Fault { errno, sticky, written_len: 77, ..Fault::at(call) }) {
                    call += 1;
                    runs += 1;
                }
                assert!(
                    call >= script.len() as u64,
                    "only {call} calls: the script does not reach the storage"
                );
            }
        }
    }
    assert!(runs > 80, "{runs}");
}

#[test]
fn a_failed_sync_is_final_and_reading_goes_on() {
    let faults = Faults::new();
    let disk = open(&faults);
    disk.pwrite(0, &[9; 10], Durability::Later).unwrap();
    faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
    assert_eq!(disk.flush().unwrap_err().errno(), libc::EIO);
    faults.disarm();
    assert_eq!(disk.state(), State::Failed);
    let syncs = faults.count(CallClass::Sync);
    for _ in 0..2 {
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Failed);
        assert_eq!(disk.flush().unwrap_err().errno(), libc::EIO);
        assert_eq!(disk.pwrite(0, &[1], Durability::Later).unwrap_err().errno(), libc::EIO);
        assert_eq!(disk.discard(range(0, 512), Durability::Later).unwrap_err().errno(), libc::EIO);
    }
    assert_eq!(faults.count(CallClass::Sync), syncs, "a sync that failed is not tried again");
    let mut buf = [0; 10];
    disk.pread(0, &mut buf).unwrap();
    assert_eq!(buf, [9; 10]);
}

/// A disk in the file "disk" of a new folder.
fn open_file(faults: &Arc<Faults>, len: usize, direct: bool) -> (tempfile::TempDir, Arc<RawDriver>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![1; len]).unwrap();
    let options = FileOptions { writable: true, direct, lock: LockMode::Writer };
    let storage = faults.attach(FileStorage::open(&path, &options).unwrap());
    (folder, RawDriver::open(storage, RawOptions::default()).unwrap())
}

#[test]
fn without_a_page_cache_the_next_sync_counts() {
    let faults = Faults::new();
    let (_folder, disk) = open_file(&faults, SIZE, true);
    faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
    assert_eq!(disk.flush().unwrap_err().errno(), libc::EIO);
    assert_eq!(disk.state(), State::Live);
    disk.pwrite(0, &[1], Durability::Fua).unwrap();
    disk.flush().unwrap();
}

#[test]
fn a_longer_file_that_is_not_durable_gets_its_length_back() {
    let faults = Faults::new();
    let (folder, disk) = open_file(&faults, FILE_LEN, true);
    let path = folder.path().join("disk");
    let len = || std::fs::metadata(&path).unwrap().len();
    let size = disk.size();
    faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
    let error = disk.resize(2 * SIZE as u64).unwrap_err();
    assert_eq!((error.errno(), disk.state()), (libc::EIO, State::Live), "{error}");
    assert_eq!((disk.size(), len()), (size, FILE_LEN as u64));
    // Nobody takes it for one that others have made longer.
    disk.resize(2 * SIZE as u64).unwrap();
    assert_eq!((disk.size(), len()), (2 * SIZE as u64, 2 * SIZE as u64));
}

#[test]
fn the_length_of_a_failed_file_is_not_followed() {
    let faults = Faults::new();
    let (folder, disk) = open_file(&faults, FILE_LEN, false);
    let path = folder.path().join("disk");
    let size = disk.size();
    faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
    disk.resize(2 * SIZE as u64).unwrap_err();
    assert_eq!((disk.size(), disk.state()), (size, State::Failed));
    // The file may have that length by now, but nobody has made it durable.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(2 * SIZE as u64).unwrap();
    let error = disk.resize(2 * SIZE as u64).unwrap_err();
    assert_eq!((error.kind(), disk.size()), (ErrorKind::Failed, size), "{error}");
}

#[test]
fn a_full_disk_fails_the_request_and_not_the_image() {
    let faults = Faults::new();
    let disk = open(&faults);
    faults.arm(Fault { errno: libc::ENOSPC, class: Some(CallClass::Write), ..Fault::at(0) });
    let error = disk.pwrite(0, &[9; 10], Durability::Fua).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, libc::ENOSPC));
    assert_eq!(disk.state(), State::Live);
    disk.pwrite(0, &[9; 10], Durability::Fua).unwrap();
    disk.flush().unwrap();
}
