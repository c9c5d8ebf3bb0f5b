//! mmap-raw when the file changes under the mapping: a request gets EIO, nothing else happens.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode, MappedStorage, Storage, TryRead};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, Format, HostOffset};
use support::random::Random;

const LEN: u64 = 2 << 20;

fn map(path: &Path, writable: bool) -> Arc<MappedStorage> {
    let options = FileOptions { writable, direct: false, lock: LockMode::Off };
    MappedStorage::new(FileStorage::open(path, &options).unwrap()).unwrap()
}

fn open(path: &Path) -> Arc<RawDriver> {
    RawDriver::open(map(path, true), RawOptions { format: Format::MmapRaw, ..RawOptions::default() }).unwrap()
}

/// What the file holds at `at`: never zero.
fn pattern(at: u64) -> u8 {
    (at / 512) as u8 | 1
}

fn fill(file: &File) {
    let bytes: Vec<u8> = (0..LEN).map(pattern).collect();
    file.write_all_at(&bytes, 0).unwrap();
}

#[test]
fn a_shrunk_file_is_an_error_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; 20_000]).unwrap();
    let disk = open(&path);
    File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
    disk.pread(0, &mut [0; 5000]).unwrap();
    for (at, len) in [(4999, 2), (5000, 1), (5000, 3000), (4000, 4192), (8192, 1), (8191, 2), (0, 20_000)] {
        let error = disk.pread(at, &mut vec![0; len]).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{len} bytes from {at}");
    }
    // Zeroes that are there are still zeroes.
    File::options().write(true).open(&path).unwrap().set_len(20_000).unwrap();
    let mut buf = [1; 100];
    disk.pread(5000, &mut buf).unwrap();
    assert_eq!(buf, [0; 100]);
}

#[test]
fn a_grown_file_is_mapped_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, b"").unwrap();
    let storage = map(&path, true);
    assert_eq!(storage.pread(&mut [0; 10], HostOffset(0)).unwrap(), 0);
    storage.pwrite(&[3; 5000], HostOffset(0), Durability::Later).unwrap();
    let mut buf = [0; 6000];
    assert_eq!(storage.pread(&mut buf, HostOffset(0)).unwrap(), 5000);
    assert_eq!(buf[..5000], [3; 5000]);
    assert_eq!(storage.try_pread(&mut buf, HostOffset(4000)).unwrap(), TryRead::Done(1000));
    storage.set_len(100_000).unwrap();
    assert_eq!(storage.pread(&mut buf, HostOffset(5000)).unwrap(), 6000);
    assert_eq!(buf, [0; 6000]);
}

#[test]
fn what_is_not_in_memory_would_wait() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = File::create(&path).unwrap();
    fill(&file);
    file.sync_all().unwrap();
    // Only clean pages can be dropped.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    for writable in [true, false] {
        let storage = map(&path, writable);
        let mut buf = vec![0; LEN as usize];
        let cold = storage.try_pread(&mut buf, HostOffset(100)).unwrap();
        assert!(matches!(cold, TryRead::WouldWait(len) if len < LEN as usize), "{cold:?}");
        assert_eq!(storage.pread(&mut buf[..9000], HostOffset(100)).unwrap(), 9000);
        let warm = storage.try_pread(&mut buf[..9000], HostOffset(100)).unwrap();
        assert_eq!(warm, TryRead::Done(9000));
        assert!(buf[..9000].iter().zip(100..).all(|(byte, at)| *byte == pattern(at)));
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

#[test]
fn truncating_and_growing_under_eight_readers_gives_errors_and_no_death() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = File::create(&path).unwrap();
    fill(&file);
    let disk = open(&path);
    let seed = Random::seed("truncating");
    let (end, errors, reads) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (disk, end, errors, reads) = (&disk, &end, &errors, &reads);
            scope.spawn(move || {
                let mut random = Random::new(seed ^ (thread << 40));
                let mut buf = vec![0; 70_000];
                while !end.load(Ordering::Relaxed) {
                    let at = random.below(LEN);
                    let len = (1 + random.below(70_000)).min(LEN - at) as usize;
                    match disk.pread(at, &mut buf[..len]) {
                        Ok(()) => {
                            // Zero where the file has been made longer and not been filled yet.
                            let right = |(byte, at): (&u8, u64)| *byte == pattern(at) || *byte == 0;
                            assert!(buf[..len].iter().zip(at..).all(right));
                        }
                        Err(error) => {
                            assert_eq!(error.errno(), libc::EIO, "{error}");
                            assert_eq!(error.kind(), ErrorKind::Io);
                            errors.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut random = Random::new(seed);
        let start = Instant::now();
        let raced = || (11..reads.load(Ordering::Relaxed)).contains(&errors.load(Ordering::Relaxed));
        while start.elapsed() < Duration::from_secs(2)
            || !raced() && start.elapsed() < Duration::from_secs(60)
        {
            file.set_len(random.pick(&[0, 1, 2048, 5000, 4096, LEN / 2, LEN / 2 + 77])).unwrap();
            std::thread::yield_now();
            file.set_len(LEN).unwrap();
            fill(&file);
        }
        end.store(true, Ordering::Relaxed);
    });
    let (errors, reads) = (errors.into_inner(), reads.into_inner());
    assert!(errors > 10 && errors < reads, "{errors} of {reads} reads failed: the race was not there");
    let mut buf = vec![0; LEN as usize];
    disk.pread(0, &mut buf).unwrap();
    assert!(buf.iter().zip(0..).all(|(byte, at)| *byte == pattern(at)));
}

/// Set in the process that has to die.
const CHILD: &str = "NBD_IMG_TEST_SIGBUS_CHILD";

#[test]
fn a_sigbus_of_somebody_else_still_ends_the_process() {
    if std::env::var_os(CHILD).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(8192).unwrap();
        let disk = open(&path);
        // SAFETY: it is the point of this test that the mapping loses its file.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        file.set_len(0).unwrap();
        assert_eq!(disk.pread(0, &mut [0; 100]).unwrap_err().errno(), libc::EIO);
        eprintln!("alive");
        std::hint::black_box(map[5000]);
        eprintln!("not reached");
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "a_sigbus_of_somebody_else_still_ends_the_process"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("alive") && !errors.contains("not reached"), "{errors}");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{errors}");
}
