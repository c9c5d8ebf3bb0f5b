//! Files of a FUSE file system: their calls may wait for ever, and their pages may fail to come.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{
    FileOptions, FileStorage, InPlace, LockMode, MappedStorage, Storage, TryRead,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Format, HostOffset};

/// A file on FUSE whose reads fail as long as another file exists.
struct FuseFile {
    child: Child,
    folder: tempfile::TempDir,
}

impl FuseFile {
    fn mount() -> FuseFile {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        std::fs::write(&file, b"").unwrap();
        let trigger = format!("error-file={}", folder.path().join("fail").display());
        let child = Command::new("nbdfuse")
            .arg(&file)
            .args(["--command", "nbdkit", "-s", "--exit-with-parent", "--filter=error", "pattern", "4M"])
            .args(["error=EIO", "error-pread-rate=100%", &trigger])
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("nbdfuse: {e}: install nbdfuse, nbdkit and fuse3"));
        let mounted = FuseFile { child, folder };
        let end = Instant::now() + Duration::from_secs(60);
        while std::fs::metadata(&file).unwrap().len() == 0 {
            assert!(Instant::now() < end, "nbdfuse does not mount: it needs /dev/fuse, nbdkit and fuse3");
            std::thread::sleep(Duration::from_millis(20));
        }
        mounted
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn fail(&self, fail: bool) {
        let trigger = self.folder.path().join("fail");
        if fail { std::fs::write(trigger, b"").unwrap() } else { std::fs::remove_file(trigger).unwrap() }
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        let unmount =
            |how: &str| Command::new("fusermount3").arg(how).arg(self.path()).stderr(Stdio::null()).status();
        // Busy for a moment: the child that another test starts has our descriptors until it runs its program.
        let end = Instant::now() + Duration::from_secs(5);
        while !unmount("-u").is_ok_and(|status| status.success()) {
            if Instant::now() > end {
                let _ = unmount("-uz");
                let _ = self.child.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.wait();
    }
}

fn open(path: &Path) -> Arc<FileStorage> {
    FileStorage::open(path, &FileOptions { writable: false, direct: false, lock: LockMode::Off }).unwrap()
}

/// nbdkit's pattern: each 8 bytes hold their own offset, big-endian.
fn pattern(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(|at| (at & !7).to_be_bytes()[(at & 7) as usize]).collect()
}

#[test]
fn nothing_is_done_in_place() {
    let file = FuseFile::mount();
    let storage = open(&file.path());
    assert_eq!((storage.facts().reads, storage.facts().writes), (InPlace::Never, InPlace::Never));
    let mut buf = [0; 100];
    assert_eq!(storage.try_pread(&mut buf, HostOffset(0)).unwrap(), TryRead::WouldWait(0));
    assert_eq!(storage.pread(&mut buf, HostOffset(1000)).unwrap(), 100);
    assert_eq!(buf[..], pattern(1000, 100));
}

#[test]
fn a_page_that_cannot_be_had_fails_its_request() {
    let file = FuseFile::mount();
    let storage = MappedStorage::new(open(&file.path())).unwrap();
    let options = RawOptions { format: Format::MmapRaw, ..RawOptions::default() };
    let disk = RawDriver::open(storage, options).unwrap();
    let mut buf = vec![0; 10_000];
    disk.pread(5, &mut buf).unwrap();
    assert!(buf == pattern(5, 10_000));
    file.fail(true);
    for at in [2 << 20, (3 << 20) - 5000, 4_000_000] {
        let error = disk.pread(at, &mut buf).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
    }
    file.fail(false);
    disk.pread(3 << 20, &mut buf).unwrap();
    assert!(buf == pattern(3 << 20, 10_000));
}
