//! Compressed images made by QEMU, read in every way through a cache that is smaller than they are; and the cache itself:
//! what is decompressed how often, and that nothing is served once its place in the file was given away.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod support;

use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::{MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, Effort, GuestRange, HostOffset};
use qcow2_support::{Folder, assert_same, mixed_content, qemu, qemu_io};
use support::image::{Entry, Image};
use support::model::{Model, run_operations};
use support::random::Random;
use support::session;

const LATER: Durability = Durability::Later;

/// An image that `qemu-img convert -c` made, and what its disk holds.
struct Compressed {
    file: Vec<u8>,
    content: Vec<u8>,
}

impl Compressed {
    fn new(options: &str, cluster_len: u64, len: u64) -> Compressed {
        let folder = Folder::new();
        let (raw, image) = (folder.file("raw"), folder.file("image.qcow2"));
        mixed_content(&raw, len, cluster_len);
        let options = format!("{options},cluster_size={cluster_len}");
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu("qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, from, to]);
        let content = std::fs::read(&raw).unwrap();
        Compressed { file: std::fs::read(&image).unwrap(), content }
    }

    fn storage(&self) -> Arc<dyn Storage> {
        storage_of(&self.file)
    }
}

fn storage_of(file: &[u8]) -> Arc<dyn Storage> {
    let storage = MemoryStorage::new(0).unwrap();
    storage.pwrite(file, HostOffset(0), LATER).unwrap();
    storage
}

fn caches(image: &Arc<dyn Storage>, cluster_cache_len: u64) -> Arc<Caches> {
    Caches::new(1 << 20, cluster_cache_len, [&Header::load(image).unwrap()]).unwrap()
}

fn open(image: Arc<dyn Storage>, caches: Arc<Caches>, write: bool) -> Arc<dyn BlockDriver> {
    let header = Header::load(&image).unwrap();
    let (number, write) = (ImageNumber(0), write.then(WriteOptions::default));
    let parts =
        Parts { image, header, data_file: None, backing: None, number, caches, snapshot: None, write };
    Qcow2Driver::open(parts).unwrap()
}

/// Reads at random, as sessions do, from four threads.
fn read_from_threads(name: &str, driver: &dyn BlockDriver, content: &[u8], reads: u64) {
    let seed = Random::seed(name);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut random = Random::new(seed ^ (thread << 56));
                let size = content.len() as u64;
                for _ in 0..reads {
                    let offset = random.below(size);
                    let len = 1 + random.below((size - offset).min(300_000));
                    let mut got = vec![0xee; len as usize];
                    session::read(driver, offset, &mut got).unwrap();
                    assert_same(&got, &content[offset as usize..][..len as usize], offset);
                }
            });
        }
    });
}

#[test]
fn every_cluster_length_and_compression_through_a_small_cache() {
    for compression in ["compression_type=zlib", "compression_type=zstd"] {
        for (cluster_len, len) in
            [(4 << 10, 2 << 20), (64 << 10, 6 << 20), (512 << 10, 8 << 20), (2 << 20, 16 << 20)]
        {
            let image = Compressed::new(compression, cluster_len, len);
            // A quarter of the disk; less than one cluster, with its blob; nothing.
            for cache_len in [len / 4, cluster_len, 0] {
                let name = format!("{compression}, clusters of {cluster_len}, a cache of {cache_len}");
                let storage = image.storage();
                let caches = caches(&storage, cache_len);
                let driver = open(storage, caches, false);
                read_from_threads(&name, &*driver, &image.content, 20);
                let model = Model {
                    name: &name,
                    content: image.content.clone(),
                    len_max: 300_000,
                    discarded: &[],
                    reopen: None,
                };
                run_operations(driver, model, 60).close().unwrap();
            }
        }
    }
}

/// The same under writes, which free and take the host clusters of blobs.
#[test]
fn a_compressed_image_is_written_while_it_is_read() {
    for compression in ["compression_type=zlib", "compression_type=zstd"] {
        let image = Compressed::new(compression, 4 << 10, 1 << 20);
        let storage = image.storage();
        let caches = caches(&storage, 256 << 10);
        let driver = open(Arc::clone(&storage), caches, true);
        let (half, mut model) = (image.content.len() / 2, image.content.clone());
        std::thread::scope(|scope| {
            // Nobody writes the upper half.
            let reader = scope.spawn(|| {
                let mut random = Random::new(7);
                for _ in 0..400 {
                    let offset = half + random.below(half as u64 - 5000) as usize;
                    let mut got = vec![0; 5000];
                    session::read(&*driver, offset as u64, &mut got).unwrap();
                    assert_same(&got, &image.content[offset..][..5000], offset as u64);
                }
            });
            let mut random = Random::new(Random::seed(compression));
            for _ in 0..400 {
                let offset = random.below(half as u64 - 9000) as usize;
                let bytes = random.bytes(1 + random.clone().below(9000));
                driver.pwrite(offset as u64, &bytes, LATER).unwrap();
                model[offset..][..bytes.len()].copy_from_slice(&bytes);
                if random.below(10) == 0 {
                    driver.flush().unwrap();
                }
                let at = random.below(half as u64 - 9000) as usize;
                let mut got = vec![0; 9000];
                session::read(&*driver, at as u64, &mut got).unwrap();
                assert_same(&got, &model[at..][..9000], at as u64);
            }
            reader.join().unwrap();
        });
        let mut got = vec![0; model.len()];
        driver.pread(0, &mut got).unwrap();
        assert_same(&got, &model, 0);
        driver.close().unwrap();
    }
}

/// Every cluster once for small reads in order, once for many readers at a time, and not at all when it is there.
#[test]
fn nothing_is_decompressed_twice_that_fits() {
    let image = Compressed::new("compression_type=zlib", 64 << 10, 4 << 20);
    let storage = image.storage();
    let caches = caches(&storage, 8 << 20);
    let driver = open(storage, Arc::clone(&caches), false);
    let parsed = Image::parse(&image.file).unwrap();
    // One table has all of so small a disk.
    let table = parsed.bytes.be64(parsed.l1_at) & !(1 << 63);
    let compressed = |entry: &u64| matches!(parsed.decode(*entry), Entry::Compressed { .. });
    let blobs = parsed.l2_table(table).iter().filter(|entry| compressed(entry)).count();
    let range = GuestRange::new(0, driver.size()).unwrap();
    let mut block = vec![0; 4096];
    assert!(
        !driver.try_read_slow(0, &mut block).unwrap() && caches.decompressions() == 0,
        "trying decompresses"
    );
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut got = vec![0; 4096];
                for at in (0..image.content.len()).step_by(4096) {
                    driver.pread(at as u64, &mut got).unwrap();
                    assert_same(&got, &image.content[at..][..4096], at as u64);
                }
            });
        }
    });
    let made = caches.decompressions();
    assert!(blobs > 8 && made == blobs, "{made} decompressions of {blobs} clusters");
    assert!(driver.warm(range, Effort::Compute).unwrap());
    assert!(driver.warm(range, Effort::Wait).unwrap());
    assert_eq!(caches.decompressions(), made);
}

/// Two images that differ only in what their blobs hold, which lie at the same places, through one cache: what the one
/// has put there is the other's, and gone as soon as the one has freed it.
#[test]
fn a_blob_whose_place_was_given_away_is_not_served() {
    const FILLED_LEN: usize = 1 << 20;
    let filled = |byte: u8| {
        let folder = Folder::new();
        let (raw, image) = (folder.file("raw"), folder.file("image.qcow2"));
        let content = [vec![byte; FILLED_LEN], vec![0; 7 * FILLED_LEN]].concat();
        std::fs::write(&raw, content).unwrap();
        let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
        qemu("qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", from, to]);
        // Tables for all of the disk.
        qemu_io(&image, &["write -P 9 2M 4k", "write -P 9 4M 4k", "write -P 9 6M 4k"].map(str::to_owned));
        std::fs::read(&image).unwrap()
    };
    let (one, two) = (storage_of(&filled(1)), storage_of(&filled(2)));
    // Two parts of tables, of 2 MiB of the disk each: read from the end on, it has each image's own ones again.
    let caches = Caches::new(0, 8 << 20, [&Header::load(&one).unwrap()]).unwrap();
    let read = |image: &Arc<dyn Storage>| {
        let driver = open(Arc::clone(image), Arc::clone(&caches), false);
        let mut got = vec![0; FILLED_LEN];
        for number in (0..8).rev() {
            driver.pread(number * FILLED_LEN as u64, &mut got).unwrap();
        }
        got
    };
    assert_same(&read(&one), &[1; FILLED_LEN], 0);
    assert_same(&read(&two), &[1; FILLED_LEN], 0);
    let driver = open(Arc::clone(&one), Arc::clone(&caches), true);
    driver.pwrite(0, &[3; FILLED_LEN], LATER).unwrap();
    driver.flush().unwrap();
    assert_same(&read(&one), &[3; FILLED_LEN], 0);
    driver.close().unwrap();
    assert_same(&read(&two), &[2; FILLED_LEN], 0);
}
