//! The raw driver on block devices: loop devices, which need root.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{FileOptions, FileStorage, InPlace, LockMode, Storage, StorageKind};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, Provision, State, ZeroRequest};
use support::model::{self, Model};

const LEN: u64 = 2 << 20;

/// A loop device over a file, until this is dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, flags: &[&str]) -> Loop {
        let output = Command::new("losetup").args(["--find", "--show"]).args(flags).arg(file).output();
        let output = output.expect("losetup is missing: install mount");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "this test needs root and a kernel with loop devices (CAP_SYS_ADMIN, /dev/loop-control): {errors}"
        );
        Loop(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A file system whose files have no holes, nor have the loop devices over them, until this is dropped.
struct Ramfs(tempfile::TempDir);

impl Ramfs {
    fn mount() -> Ramfs {
        let folder = tempfile::tempdir().unwrap();
        let status = Command::new("mount").args(["-t", "ramfs", "none"]).arg(folder.path()).status();
        assert!(status.expect("mount is missing: install mount").success(), "this test needs root");
        Ramfs(folder)
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

fn file(folder: &Path, len: u64, byte: u8) -> PathBuf {
    let path = folder.join("disk");
    std::fs::write(&path, vec![byte; len as usize]).unwrap();
    path
}

fn storage(path: &Path, direct: bool) -> Arc<FileStorage> {
    FileStorage::open(path, &FileOptions { writable: true, direct, lock: LockMode::Writer }).unwrap()
}

fn open(path: &Path, direct: bool) -> Arc<dyn BlockDriver> {
    RawDriver::open(storage(path, direct), RawOptions::default()).unwrap()
}

#[test]
fn devices_of_both_sector_sizes_do_as_the_model() {
    for (flags, direct) in
        [(["-b", "512"], false), (["-b", "512"], true), (["-b", "4096"], false), (["-b", "4096"], true)]
    {
        let folder = tempfile::tempdir().unwrap();
        let device = Loop::over(&file(folder.path(), LEN, 0x77), &flags);
        let mut reopen = |driver: Arc<dyn BlockDriver>| {
            driver.close().unwrap();
            drop(driver);
            open(&device.0, direct)
        };
        let model = Model {
            name: &format!("loop device, {flags:?}, direct {direct}"),
            content: vec![0x77; LEN as usize],
            len_max: 200_000,
            // A loop device punches its file.
            discarded: &[0],
            reopen: Some(&mut reopen),
        };
        let driver = model::run(open(&device.0, direct), model);
        model::run_concurrently(&driver, "loop device", 4, 333);
    }
}

#[test]
fn facts_of_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::over(&file(folder.path(), LEN, 1), &["-b", "4096"]);
    let storage = storage(&device.0, false);
    let facts = storage.facts();
    assert_eq!(facts.kind, StorageKind::BlockDevice);
    assert!(!facts.grows && !facts.new_space_is_zero);
    assert_eq!((facts.reads, facts.writes, facts.block_len), (InPlace::Ask, InPlace::Ask, 1));
    assert_eq!(storage.len().unwrap(), LEN);
    assert!(storage.set_len(LEN + 1).is_err());
    drop(storage);
    let direct = self::storage(&device.0, true);
    assert_eq!((direct.facts().reads, direct.facts().block_len), (InPlace::Never, 4096));
}

#[test]
fn a_read_only_device_is_refused_for_writing() {
    let folder = tempfile::tempdir().unwrap();
    let device = Loop::over(&file(folder.path(), LEN, 1), &["--read-only"]);
    let mut options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    let error = FileStorage::open(&device.0, &options).err().unwrap();
    assert!(matches!(error.kind(), ErrorKind::ReadOnly | ErrorKind::Io), "{error}");
    assert!(error.to_string().contains("--read-only"), "{error}");
    options = FileOptions { writable: false, lock: LockMode::Reader, ..options };
    FileStorage::open(&device.0, &options).unwrap();
}

#[test]
fn a_fast_zero_that_is_refused_leaves_what_was_written_and_not_flushed() {
    let folder = Ramfs::mount();
    let device = Loop::over(&file(folder.0.path(), LEN, 0x11), &[]);
    let driver = open(&device.0, false);
    driver.pwrite(4096, &[0x55; 8192], Durability::Later).unwrap();
    let request = ZeroRequest { provision: Provision::Unmap, fast: true, durability: Durability::Later };
    // With ends inside of pages.
    let error = driver.write_zeroes(GuestRange::new(512, 65536).unwrap(), request).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBeSlow, "{error}");
    let mut got = vec![0; 128 << 10];
    driver.pread(0, &mut got).unwrap();
    let mut expected = vec![0x11; 128 << 10];
    expected[4096..12288].fill(0x55);
    assert!(got == expected);
}

#[test]
fn zeroing_gives_room_back_only_if_it_may() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), LEN, 1);
    let device = Loop::over(&path, &[]);
    let disk = open(&device.0, false);
    let occupied = || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&path).unwrap().blocks() * 512
    };
    let range = GuestRange::new(4096, LEN - 8192).unwrap();
    let mut request =
        ZeroRequest { provision: Provision::Allocate, fast: false, durability: Durability::Fua };
    disk.write_zeroes(range, request).unwrap();
    assert!(occupied() >= LEN);
    request.provision = Provision::Unmap;
    disk.write_zeroes(range, request).unwrap();
    assert!(occupied() < LEN / 2);
    let mut got = vec![1; LEN as usize];
    disk.pread(0, &mut got).unwrap();
    assert!(got[4096..LEN as usize - 4096].iter().all(|byte| *byte == 0));
    assert!(got[..4096].iter().all(|byte| *byte == 1));
}

/// A device whose writes fail later: a loop device over a file that its file system has no room for.
#[test]
fn data_that_cannot_be_written_back_fails_every_sync_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4M", "none"])
        .arg(folder.path())
        .status()
        .expect("mount is missing: install mount");
    assert!(mounted.success(), "this test needs root to mount a small tmpfs");
    let path = folder.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let result = std::panic::catch_unwind(|| {
        let device = Loop::over(&path, &[]);
        // Each open starts anew, as an operator's restart does.
        for _ in 0..2 {
            let disk = open(&device.0, false);
            disk.pwrite(0, &vec![1; 8 << 20], Durability::Later).unwrap();
            let error = disk.flush().unwrap_err();
            assert!([libc::EIO, libc::ENOSPC].contains(&error.errno()), "{error}");
            assert_eq!(disk.state(), State::Failed);
            for _ in 0..3 {
                assert_eq!(disk.flush().unwrap_err().errno(), libc::EIO);
                assert_eq!(disk.pwrite(0, &[1], Durability::Later).unwrap_err().errno(), libc::EIO);
            }
            disk.pread(0, &mut [0; 512]).unwrap();
        }
        // Of many at a time the kernel tells one.
        let disk = open(&device.0, false);
        disk.pwrite(0, &vec![1; 8 << 20], Durability::Later).unwrap();
        let flushed = std::thread::scope(|scope| {
            let flushes = [(); 8].map(|()| scope.spawn(|| disk.flush().is_ok()));
            flushes.map(|flush| flush.join().unwrap())
        });
        assert_eq!(flushed, [false; 8]);
        drop(disk);
        // FUA finds it out by itself.
        let disk = open(&device.0, false);
        let fails = |at: u64| disk.pwrite(at << 20, &vec![2; 1 << 20], Durability::Fua).is_err();
        assert!((8..16).any(fails));
        assert!(disk.flush().is_err());
    });
    let _ = Command::new("umount").arg(folder.path()).status();
    result.unwrap();
}
