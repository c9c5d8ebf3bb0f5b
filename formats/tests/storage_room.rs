//! Zeroing, allocating and giving back on file systems that can and that cannot.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_img_formats::storage::{FileOptions, FileStorage, InPlace, LockMode, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{HostOffset, HostRange, Provision};

const MIB: u64 = 1 << 20;

/// A file system of a test's own, until this is dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(kind: &str, options: &str) -> Mount {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", kind, "-o", options, "none"]).arg(folder.path());
        assert!(
            mount.status().is_ok_and(|status| status.success()),
            "this test needs mount (Debian package mount) and root, to mount a {kind}"
        );
        Mount(folder)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn file(folder: &Path, len: u64) -> (PathBuf, Arc<FileStorage>) {
    let path = folder.join("disk");
    std::fs::write(&path, vec![0x77; len as usize]).unwrap();
    let storage = open(&path, false);
    storage.sync().unwrap();
    (path, storage)
}

fn open(path: &Path, direct: bool) -> Arc<FileStorage> {
    FileStorage::open(path, &FileOptions { writable: true, direct, lock: LockMode::Off }).unwrap()
}

fn occupied(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn range(at: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(at), len).unwrap()
}

/// The range is zero, and what is around it is as `file` has made it.
fn assert_zero(path: &Path, at: u64, len: u64) {
    let bytes = std::fs::read(path).unwrap();
    let (at, end) = (at as usize, ((at + len) as usize).min(bytes.len()));
    assert!(bytes[at..end].iter().all(|byte| *byte == 0));
    assert!(bytes[..at].iter().chain(&bytes[end..]).all(|byte| *byte == 0x77));
}

fn zero_and_compare(folder: &Path, provision: Provision, fast: bool) -> (u64, u64) {
    let (path, storage) = file(folder, 4 * MIB);
    let before = occupied(&path);
    // Odd edges, and beyond the end.
    storage.zero(range(MIB + 1, 2 * MIB), provision, fast).unwrap();
    storage.sync().unwrap();
    assert_zero(&path, MIB + 1, 2 * MIB);
    (before, occupied(&path))
}

fn able_file_system(folder: &Path) {
    for fast in [false, true] {
        let (before, after) = zero_and_compare(folder, Provision::Unmap, fast);
        assert!(after <= before - 2 * MIB + 8192, "Unmap: {before}, then {after}");
        for provision in [Provision::Keep, Provision::Allocate] {
            let (before, after) = zero_and_compare(folder, provision, fast);
            assert!(after >= before, "{provision:?}: {before}, then {after}");
        }
    }
    let (path, storage) = file(folder, 4 * MIB);
    storage.discard(range(0, 8 * MIB)).unwrap();
    assert_eq!(storage.len().unwrap(), 4 * MIB);
    assert!(occupied(&path) <= 8192);
    storage.zero(range(0, 4 * MIB), Provision::Allocate, true).unwrap();
    assert!(occupied(&path) >= 4 * MIB);
}

fn length_rules(folder: &Path) {
    let (path, storage) = file(folder, MIB);
    for provision in [Provision::Unmap, Provision::Keep] {
        storage.zero(range(MIB - 100, MIB), provision, false).unwrap();
        storage.zero(range(5 * MIB, MIB), provision, false).unwrap();
        assert_eq!(storage.len().unwrap(), MIB, "{provision:?} made the file longer");
    }
    assert_zero(&path, MIB - 100, 100);
    storage.zero(range(MIB - 100, 1100), Provision::Allocate, false).unwrap();
    assert_eq!(storage.len().unwrap(), MIB + 1000);
    assert_zero(&path, MIB - 100, 1100);
}

#[test]
fn temporary_folder() {
    let folder = tempfile::tempdir().unwrap();
    able_file_system(folder.path());
    length_rules(folder.path());
}

#[test]
fn tmpfs() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    able_file_system(folder.path());
    length_rules(folder.path());
    let (_, storage) = file(folder.path(), MIB);
    assert_eq!((storage.facts().reads, storage.facts().writes), (InPlace::Always, InPlace::Always));
}

#[test]
fn a_file_system_without_any_of_it_gets_zeroes_written() {
    let mount = Mount::new("ramfs", "mode=700");
    for provision in [Provision::Unmap, Provision::Keep, Provision::Allocate] {
        zero_and_compare(mount.0.path(), provision, false);
        let (path, storage) = file(mount.0.path(), MIB);
        for _ in 0..2 {
            let refused = storage.zero(range(5, 5000), provision, true).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
            assert_zero(&path, 0, 0);
            storage.discard(range(0, MIB)).unwrap();
            assert_zero(&path, 0, 0);
        }
    }
    length_rules(mount.0.path());
}

#[test]
fn room_that_is_not_there_is_an_error_and_changes_nothing() {
    let mount = Mount::new("tmpfs", "size=4M");
    let (path, storage) = file(mount.0.path(), 2 * MIB);
    storage.set_len(64 * MIB).unwrap();
    let error = storage.zero(range(0, 64 * MIB), Provision::Allocate, false).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes[..2 << 20].iter().all(|byte| *byte == 0x77));
    storage.zero(range(0, MIB), Provision::Allocate, false).unwrap();
}

#[test]
fn runs_are_holes_and_data_and_end_with_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(3 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 65536], MIB).unwrap();
    let storage = open(&path, false);
    let run = |at| storage.run_at(HostOffset(at)).map(|run| (run.len, run.hole));
    assert_eq!(run(0).unwrap(), (MIB, true));
    assert_eq!(run(10).unwrap(), (MIB - 10, true));
    assert_eq!(run(MIB).unwrap(), (65536, false));
    assert_eq!(run(MIB + 65536).unwrap(), (2 * MIB - 65536, true));
    assert_eq!(run(3 * MIB - 1).unwrap(), (1, true));
    for behind in [3 * MIB, 3 * MIB + 1, u64::MAX] {
        assert_eq!(run(behind).unwrap_err().raw_os_error(), Some(libc::ENXIO));
    }
}

#[test]
fn things_that_are_no_images_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfifo is missing: install coreutils");
    for path in [folder.path(), &pipe, Path::new("/dev/zero")] {
        for writable in [false, true] {
            let options = FileOptions { writable, direct: false, lock: LockMode::Off };
            let error = FileStorage::open(path, &options).err().unwrap();
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
        }
    }
    let options = FileOptions { writable: false, direct: false, lock: LockMode::Reader };
    let error = FileStorage::open(&folder.path().join("none"), &options).err().unwrap();
    assert_eq!(error.errno(), libc::ENOENT);
    assert!(error.to_string().contains("none"), "{error}");
}

#[test]
fn o_direct_needs_no_alignment_above() {
    let folder = tempfile::tempdir().unwrap();
    let (path, storage) = file(folder.path(), 10_001);
    drop(storage);
    let storage = open(&path, true);
    assert!(storage.facts().block_len >= 512 && storage.facts().reads == InPlace::Never);
    let mut buf = [0; 20_000];
    assert_eq!(storage.pread(&mut buf, HostOffset(0)).unwrap(), 10_001);
    assert_eq!(storage.pread(&mut buf[1..], HostOffset(9999)).unwrap(), 2);
    assert_eq!(storage.pread(&mut buf, HostOffset(10_001)).unwrap(), 0);
    assert_eq!(storage.pread(&mut buf, HostOffset(99_999)).unwrap(), 0);
    storage.zero(range(9000, 1001), Provision::Keep, false).unwrap();
    assert_zero(&path, 9000, 1001);
    assert_eq!(storage.len().unwrap(), 10_001);
    storage.zero(range(9000, 1010), Provision::Allocate, false).unwrap();
    assert_eq!(storage.len().unwrap(), 10_010);
}
