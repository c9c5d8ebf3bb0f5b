//! The raw driver over real files: sizes, tails, growth, zeroing, holes, closing.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use nbd_img_formats::driver::Status;
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, Provision, State, StatusQuery, ZeroRequest,
};

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

#[test]
fn info_tells_what_the_file_occupies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::File::create(&path).unwrap().set_len(1_000_001).unwrap();
    let disk = open(&path);
    let info = disk.info().unwrap();
    assert_eq!((info.path, info.format.as_str()), (path, "raw"));
    assert_eq!((info.virtual_size, info.file_len, info.allocated_len), (1_000_448, 1_000_001, 0));
    disk.pwrite(0, &[1; 65536], Durability::Fua).unwrap();
    assert_eq!(disk.info().unwrap().allocated_len, 65536);
}

#[test]
fn holes_of_the_file_are_holes_of_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::File::create(&path).unwrap().set_len((1 << 20) + 100).unwrap();
    let disk = open(&path);
    disk.pwrite(65536, &[1; 65536], Durability::Later).unwrap();
    let runs = || {
        let mut runs = Vec::new();
        let all = range(0, disk.size());
        disk.status(StatusQuery::Allocation, all, &mut |len, status| {
            runs.push((len, status));
            ControlFlow::Continue(())
        })
        .unwrap();
        runs
    };
    let hole = Status::Allocation { hole: true, zero: true };
    let data = Status::Allocation { hole: false, zero: false };
    let rest = (1 << 20) + 512 - 131_072;
    assert_eq!(runs(), [(65536, hole), (65536, data), (rest, hole)]);
    disk.discard(range(65536, 65536), Durability::Later).unwrap();
    assert_eq!(runs(), [((1 << 20) + 512, hole)]);
    let mut first = Vec::new();
    disk.pwrite(0, &[1; 4096], Durability::Later).unwrap();
    disk.status(StatusQuery::Allocation, range(0, 1 << 20), &mut |len, status| {
        first.push((len, status));
        ControlFlow::Break(())
    })
    .unwrap();
    assert_eq!(first, [(4096, data)]);
    // What was data is a hole when the file was shorter in between.
    disk.pwrite(0, &[1; 256 << 10], Durability::Later).unwrap();
    // The second time the file need not be asked any more.
    assert_eq!([runs()[0], runs()[0]], [(256 << 10, data); 2]);
    disk.resize(65536).unwrap();
    disk.resize(1 << 20).unwrap();
    assert_eq!(runs(), [(65536, data), ((1 << 20) - 65536, hole)]);
    disk.status(StatusQuery::Depth, range(0, 4096), &mut |_, status| {
        assert_eq!(status, Status::Depth(1));
        ControlFlow::Continue(())
    })
    .unwrap();
}

#[test]
fn the_size_changes_while_the_disk_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 1000]).unwrap();
    let disk = open(&path);
    let len = || fs::metadata(&path).unwrap().len();
    disk.resize(4096).unwrap();
    assert_eq!((disk.size(), len()), (4096, 4096));
    let mut buf = [1; 4096];
    disk.pread(0, &mut buf).unwrap();
    assert_eq!((&buf[..1000], &buf[1000..]), ([7; 1000].as_slice(), [0; 3096].as_slice()));
    disk.pwrite(4095, &[9], Durability::Later).unwrap();
    disk.resize(512).unwrap();
    assert_eq!((disk.size(), len()), (512, 512));
    assert_eq!(disk.pread(512, &mut buf[..1]).unwrap_err().kind(), ErrorKind::OutOfBounds);
    assert_eq!(disk.pwrite(512, &[1], Durability::Later).unwrap_err().kind(), ErrorKind::OutOfBounds);
    disk.resize(4096).unwrap();
    disk.pread(512, &mut buf[..3584]).unwrap();
    assert_eq!(buf[..3584], [0; 3584]);
    disk.close().unwrap();
    assert_eq!(disk.resize(8192).unwrap_err().kind(), ErrorKind::Failed);
}

#[test]
fn a_file_that_others_change_is_followed_and_not_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![7; 1024]).unwrap();
    let disk = open(&path);
    fs::write(&path, vec![8; 5000]).unwrap();
    assert_eq!((disk.size(), disk.stored_size().unwrap()), (1024, 5120));
    // Somebody has put something there: it is neither zeroed nor lost.
    for size in [512, 4096, 8192] {
        let error = disk.resize(size).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    disk.resize(5120).unwrap();
    let mut buf = [1; 5120];
    disk.pread(0, &mut buf).unwrap();
    assert_eq!((&buf[..5000], &buf[5000..]), ([8; 5000].as_slice(), [0; 120].as_slice()));
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(512).unwrap();
    // What was cut off does not become zeroes by a size between.
    assert_eq!(disk.resize(1024).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!((disk.size(), fs::metadata(&path).unwrap().len()), (5120, 512));
    disk.resize(disk.stored_size().unwrap()).unwrap();
    assert_eq!(disk.size(), 512);
    disk.pread(0, &mut buf[..512]).unwrap();
}
