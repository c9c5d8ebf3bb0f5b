//! The raw driver over real files: sizes, tails, growth, zeroing, holes, closing.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::fs;
use std::path::Path;

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, Provision, State, ZeroRequest};

fn open_with(path: &Path, options: RawOptions) -> Arc<RawDriver> {
    let file = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    RawDriver::open(FileStorage::open(path, &file).unwrap(), options).unwrap()
}

fn open(path: &Path) -> Arc<RawDriver> {
    open_with(path, RawOptions::default())
}

fn range(offset: u64, len: u64) -> GuestRange {
    GuestRange::new(offset, len).unwrap()
}

#[test]
fn odd_size_is_rounded_up_and_a_write_to_the_tail_extends_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 1000]).unwrap();
    let disk = open(&path);
    assert_eq!(disk.size(), 1024);
    let mut buf = [1; 1024];
    disk.pread(0, &mut buf).unwrap();
    assert_eq!(buf[..1000], [7; 1000]);
    assert_eq!(buf[1000..], [0; 24]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000, "reading changes nothing");
    disk.pwrite(1010, &[9; 4], Durability::Fua).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1024);
    disk.pread(990, &mut buf[..34]).unwrap();
    assert_eq!(buf[..34], [[7; 10].as_slice(), &[0; 10], &[9; 4], &[0; 10]].concat());
}

#[test]
fn exact_size_is_served_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 1000]).unwrap();
    let disk = open_with(&path, RawOptions { exact_size: true, ..RawOptions::default() });
    assert_eq!(disk.size(), 1000);
    disk.pwrite(999, &[1], Durability::Later).unwrap();
    let refused = disk.pwrite(999, &[1, 2], Durability::Later).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfBounds);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
}

#[test]
fn a_file_that_shrank_is_an_error_and_never_zeroes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 10000]).unwrap();
    let disk = open(&path);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    assert_eq!(disk.pread(4000, &mut [0; 2000]).unwrap_err().errno(), libc::EIO);
    let zero = ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
    assert_eq!(disk.write_zeroes(range(4000, 2000), zero).unwrap_err().errno(), libc::EIO);
    assert_eq!(disk.pwrite(10200, &[1], Durability::Later).unwrap_err().errno(), libc::EIO);
    assert_eq!(fs::metadata(&path).unwrap().len(), 5000, "lost data must not come back as zeroes");
}

#[test]
fn closing_refuses_everything_after_and_lets_the_lock_go() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 4096]).unwrap();
    let disk = open(&path);
    let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    assert_eq!(FileStorage::open(&path, &options).err().unwrap().kind(), ErrorKind::Locked);
    disk.close().unwrap();
    disk.close().unwrap();
    assert_eq!(disk.state(), State::Closed);
    assert!(disk.pread(0, &mut [0; 1]).is_err());
    assert!(disk.pwrite(0, &[0; 1], Durability::Later).is_err());
    assert!(disk.flush().is_err());
    FileStorage::open(&path, &options).unwrap();
}
