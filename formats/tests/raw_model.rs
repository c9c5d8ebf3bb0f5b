//! The raw driver against the model, over every storage there is.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::path::Path;

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{
    FileOptions, FileStorage, LockMode, MappedStorage, MemoryOptions, MemoryStorage, POISON, Storage,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Format};
use support::model::{self, Model};

/// Sizes that are and are not multiples of pages and sectors.
const SIZES: [u64; 4] = [1 << 20, (1 << 20) + 512, 300_001, 4095];

#[derive(Clone, Copy)]
enum Way {
    Buffered,
    Direct,
    Mapped,
}

fn open(path: &Path, way: Way, exact_size: bool) -> Arc<dyn BlockDriver> {
    let direct = matches!(way, Way::Direct);
    let file =
        FileStorage::open(path, &FileOptions { writable: true, direct, lock: LockMode::Writer }).unwrap();
    let (storage, format): (Arc<dyn Storage>, _) = match way {
        Way::Buffered | Way::Direct => (file, Format::Raw),
        Way::Mapped => (MappedStorage::new(file).unwrap(), Format::MmapRaw),
    };
    RawDriver::open(storage, RawOptions { exact_size, format, ..RawOptions::default() }).unwrap()
}

fn run_on_file(name: &str, folder: &Path, way: Way) {
    for (exact_size, len) in [(false, 0), (false, 1), (false, 2), (true, 2), (true, 3)] {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let path = folder.path().join("disk");
        let len = SIZES[len];
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        let size = if exact_size { len } else { len.next_multiple_of(512) };
        let mut reopen = |driver: Arc<dyn BlockDriver>| {
            driver.close().unwrap();
            drop(driver);
            open(&path, way, exact_size)
        };
        let model = Model {
            name: &format!("{name}, {len} bytes, exact size {exact_size}"),
            content: vec![0; size as usize],
            len_max: 200_000,
            discarded: &[0],
            reopen: Some(&mut reopen),
        };
        let driver = model::run(open(&path, way, exact_size), model);
        let at_least = if exact_size { size..=size } else { len..=size };
        assert!(at_least.contains(&std::fs::metadata(&path).unwrap().len()));
        model::run_concurrently(&driver, name, 4, 333);
    }
}

#[test]
fn file() {
    run_on_file("file", &std::env::temp_dir(), Way::Buffered);
}

#[test]
fn file_in_memory() {
    run_on_file("file in memory", Path::new("/dev/shm"), Way::Buffered);
}

#[test]
fn direct() {
    run_on_file("direct", &std::env::temp_dir(), Way::Direct);
}

#[test]
fn mapped() {
    run_on_file("mapped", &std::env::temp_dir(), Way::Mapped);
}

#[test]
fn mapped_in_memory() {
    run_on_file("mapped in memory", Path::new("/dev/shm"), Way::Mapped);
}

#[test]
fn memory() {
    for len in SIZES {
        let storage = MemoryStorage::new(len).unwrap();
        let driver = RawDriver::open(storage, RawOptions::default()).unwrap();
        let content = vec![0; len.next_multiple_of(512) as usize];
        let model = Model { name: "memory", content, len_max: 100_000, discarded: &[0], reopen: None };
        model::run(driver, model);
    }
}

#[test]
fn memory_like_a_device() {
    for len in SIZES {
        let options = MemoryOptions { len, grows: false, poisoned: true };
        let driver = RawDriver::open(MemoryStorage::with(options).unwrap(), RawOptions::default()).unwrap();
        let content = vec![POISON; len as usize];
        let model =
            Model { name: "like a device", content, len_max: 100_000, discarded: &[POISON], reopen: None };
        model::run(driver, model);
    }
}

#[test]
fn discards_can_be_ignored() {
    let driver = RawDriver::open(
        MemoryStorage::new(1 << 20).unwrap(),
        RawOptions { discard: false, ..RawOptions::default() },
    );
    let content = vec![0; 1 << 20];
    let model = Model { name: "ignored", content, len_max: 100_000, discarded: &[], reopen: None };
    model::run(driver.unwrap(), model);
}

#[test]
fn read_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let content: Vec<u8> = (0..300_000u32).map(|i| if i / 50_000 % 2 == 0 { 0 } else { i as u8 }).collect();
    std::fs::write(&path, &content).unwrap();
    let options = FileOptions { writable: false, direct: false, lock: LockMode::Reader };
    let driver = RawDriver::open(FileStorage::open(&path, &options).unwrap(), RawOptions::default()).unwrap();
    let padded = [content.as_slice(), &[0; 32]].concat();
    let model = Model { name: "read-only", content: padded, len_max: 100_000, discarded: &[], reopen: None };
    model::run(driver, model);
    assert!(std::fs::read(&path).unwrap() == content);
}
