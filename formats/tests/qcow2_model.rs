//! The qcow2 driver against a vector of bytes, written and read in every way, over every kind of image:
//! cluster lengths, refcount widths, versions, backing chains, compression, snapshots.
//!
//! Every thousand operations the image is closed, checked (no corruption, no leak, snapshots as they
//! were), and opened again. `NBD_IMG_QCOW2_OPS` says how many operations there are in all,
//! `NBD_IMG_MODEL_SEED` which.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use nbd_img_formats::BlockDriver;
use nbd_img_formats::qcow2::{Compress, WriteOptions};
use nbd_img_formats::storage::{MemoryOptions, MemoryStorage, SparseBytes, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{Durability, HostOffset};
use support::image::Image;
use support::maker::{self, Maker};
use support::model::{self, Model};
use support::random::Random;
use support::reader::{self, Disk};
use support::wrapped::{NeverClosed, Wrapped};
use support::{checker, scene};

fn operations() -> u64 {
    std::env::var("NBD_IMG_QCOW2_OPS").map_or(1_000_000, |text| text.parse().unwrap())
}

/// A kind of image.
struct Case {
    options: &'static str,
    cluster: u64,
    /// How many images lie below.
    backing: u32,
    compressed: bool,
    /// Whole clusters are written compressed.
    compress: bool,
    snapshot: bool,
    /// On a device of fixed length with stale content.
    device: bool,
    /// How many of all operations it gets, in relation to the others.
    share: u64,
}

impl Case {
    const fn new(options: &'static str, cluster: u64, share: u64) -> Case {
        let (backing, compressed, compress, snapshot, device) = (0, false, false, false, false);
        Case { options, cluster, backing, compressed, compress, snapshot, device, share }
    }

    const fn compress(options: &'static str, cluster: u64, share: u64) -> Case {
        Case { compress: true, ..Case::new(options, cluster, share) }
    }
}

const CASES: [Case; 41] = [
    Case::new("refcount_bits=1", 512, 60),
    Case { snapshot: true, ..Case::new("refcount_bits=2", 512, 40) },
    Case { snapshot: true, compressed: true, ..Case::new("refcount_bits=4", 512, 50) },
    Case { backing: 1, ..Case::new("refcount_bits=8", 512, 60) },
    Case { snapshot: true, compressed: true, backing: 2, ..Case::new("refcount_bits=16", 512, 70) },
    Case { backing: 3, ..Case::new("refcount_bits=32", 512, 40) },
    Case { snapshot: true, compressed: true, ..Case::new("refcount_bits=64", 512, 70) },
    Case { compressed: true, ..Case::new("compat=v2", 512, 60) },
    Case { snapshot: true, backing: 1, ..Case::new("compat=v2", 512, 60) },
    Case { device: true, snapshot: true, ..Case::new("refcount_bits=64", 512, 60) },
    Case { device: true, backing: 1, ..Case::new("refcount_bits=16", 512, 50) },
    Case { device: true, ..Case::new("compat=v2", 4096, 40) },
    Case { compressed: true, snapshot: true, ..Case::new("compression_type=zstd", 4096, 60) },
    Case { backing: 2, compressed: true, ..Case::new("lazy_refcounts=on", 4096, 60) },
    Case { backing: 3, snapshot: true, ..Case::new("refcount_bits=64", 4096, 50) },
    Case { backing: 1, compressed: true, ..Case::new("compat=v2", 4096, 40) },
    Case { ..Case::new("preallocation=metadata", 4096, 30) },
    Case { backing: 1, ..Case::new("refcount_bits=16", 65536, 40) },
    Case { snapshot: true, compressed: true, ..Case::new("refcount_bits=16", 65536, 30) },
    Case { backing: 2, ..Case::new("refcount_bits=1", 65536, 18) },
    Case::new("refcount_bits=16", 2 << 20, 8),
    Case { backing: 1, snapshot: true, ..Case::new("refcount_bits=64", 2 << 20, 4) },
    Case { snapshot: true, ..Case::compress("refcount_bits=64", 512, 60) },
    Case { backing: 2, compressed: true, ..Case::compress("refcount_bits=2", 512, 60) },
    Case { device: true, ..Case::compress("refcount_bits=16", 1024, 60) },
    Case { snapshot: true, backing: 1, ..Case::compress("compression_type=zstd", 4096, 60) },
    Case { compressed: true, ..Case::compress("refcount_bits=4", 4096, 60) },
    Case { backing: 1, ..Case::compress("compat=v2", 4096, 40) },
    Case { backing: 1, ..Case::compress("extended_l2=on", 16384, 40) },
    Case { snapshot: true, ..Case::compress("extended_l2=on,compression_type=zstd", 65536, 10) },
    Case { backing: 1, ..Case::compress("refcount_bits=16", 65536, 10) },
    Case::compress("compression_type=zstd", 2 << 20, 2),
    // The other cluster lengths.
    Case { backing: 1, snapshot: true, compressed: true, ..Case::new("refcount_bits=16", 1024, 20) },
    Case { backing: 2, ..Case::new("refcount_bits=4", 2048, 20) },
    Case { backing: 3, snapshot: true, ..Case::new("refcount_bits=8", 8192, 15) },
    Case { snapshot: true, compressed: true, ..Case::new("refcount_bits=32", 16384, 12) },
    Case { backing: 1, ..Case::new("compat=v2", 32768, 10) },
    Case { snapshot: true, ..Case::new("refcount_bits=2", 128 << 10, 6) },
    Case { backing: 1, compressed: true, ..Case::new("refcount_bits=16", 256 << 10, 4) },
    Case { device: true, ..Case::new("refcount_bits=16", 512 << 10, 4) },
    Case { backing: 1, snapshot: true, ..Case::new("refcount_bits=16", 1 << 20, 4) },
];

/// A case as files: made once, then in memory.
struct Setting {
    image: Vec<u8>,
    /// From the top down.
    backing: Vec<Vec<u8>>,
    content: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    device_len: Option<u64>,
    compress: Option<Compress>,
}

impl Setting {
    fn make(case: &Case, random: &mut Random) -> Setting {
        let size = match case.cluster {
            0..=1024 => 160 << 10,
            1025..=8192 => 500 << 10,
            8193..=65536 => 1 << 20,
            _ => 7 << 20,
        } + 512;
        let (mut chain, mut below): (Vec<Maker>, Vec<u8>) = (Vec::new(), Vec::new());
        let mut backing = Vec::new();
        for level in (0..=case.backing).rev() {
            let top = level == 0;
            // The lower ones are shorter, or longer.
            let size = if top { size } else { (size * (1 + random.below(3)) / 2).next_multiple_of(512) };
            let mut options = format!("cluster_size={}", if top { case.cluster } else { 4096 });
            if top {
                options += &format!(",{}", case.options);
            }
            if let Some(maker) = chain.last() {
                options += &format!(",backing_fmt=qcow2,backing_file={}", maker::text(&maker.path()));
            }
            let maker = Maker::new(&options, size);
            let cluster = if top { case.cluster } else { 4096 };
            fill(&maker, size, cluster, case.compressed || !top, case.snapshot && top, random);
            let image = maker.bytes();
            below = reader::read_disk(&image, Disk::Active, &below).unwrap();
            if !top {
                backing.insert(0, image);
            }
            chain.push(maker);
        }
        let image = chain.last().unwrap().bytes();
        let device_len = case.device.then(|| (image.len() as u64 + 2 * size).next_multiple_of(512));
        let (snapshots, compress) = (Vec::new(), case.compress.then(Compress::default));
        let mut setting = Setting { image, backing, content: below, snapshots, device_len, compress };
        setting.snapshots = setting.read_snapshots(&setting.image);
        setting
    }

    fn backing_content(&self) -> Vec<u8> {
        let from_bottom = self.backing.iter().rev();
        from_bottom.fold(Vec::new(), |below, image| reader::read_disk(image, Disk::Active, &below).unwrap())
    }

    fn read_snapshots(&self, image: &dyn support::image::Bytes) -> Vec<Vec<u8>> {
        let below = self.backing_content();
        let count = Image::parse(image).unwrap().snapshots.len();
        (0..count).map(|number| reader::read_disk(image, Disk::Snapshot(number), &below).unwrap()).collect()
    }

    fn storage(&self) -> Arc<dyn Storage> {
        let storage = match self.device_len {
            None => MemoryStorage::new(0).unwrap(),
            Some(len) => MemoryStorage::with(MemoryOptions { len, grows: false, poisoned: true }).unwrap(),
        };
        storage.pwrite(&self.image, HostOffset(0), Durability::Later).unwrap();
        Wrapped::new(storage, NeverClosed)
    }

    fn open(&self, storage: &Arc<dyn Storage>, random: &mut Random) -> Arc<dyn BlockDriver> {
        let mut below: Option<Arc<dyn BlockDriver>> = None;
        for image in self.backing.iter().rev() {
            let storage = MemoryStorage::copy_of(image).unwrap();
            below = Some(scene::open_over(storage, below, None, 0).unwrap());
        }
        // Now and then so little that commits come by themselves.
        let dirty_len_max = random.pick(&[8 << 20, 4096, 1]);
        let write = WriteOptions { dirty_len_max, compress: self.compress, ..WriteOptions::default() };
        scene::open_over(Arc::clone(storage), below, Some(write), random.pick(&[0, 0, 1 << 20])).unwrap()
    }

    /// After a close: nothing wrong, nothing lost, the snapshots as they were.
    fn check(&self, storage: &dyn Storage, name: &str, with_qemu: bool) {
        let report = checker::check_storage(storage).unwrap();
        assert!(report.is_clean(), "{name}: after a close\n{report}");
        assert!(self.read_snapshots(&storage) == self.snapshots, "{name}: a snapshot has changed");
        if with_qemu {
            let bytes = support::crash::content_of(&SparseBytes::load(storage).unwrap());
            let (code, said) = maker::qemu_check(&bytes);
            assert_eq!(code, 0, "{name}: {said}");
        }
    }
}

/// Fills an image with some of everything.
fn fill(maker: &Maker, size: u64, cluster: u64, compressed: bool, snapshot: bool, random: &mut Random) {
    let clusters = size / cluster;
    let some = |random: &mut Random| {
        let at = random.below(clusters);
        (at * cluster, cluster * (1 + random.below(6)).min(clusters - at))
    };
    // First the compressed ones: QEMU compresses only where nothing is yet.
    let mut blobs = BTreeMap::new();
    while compressed && blobs.len() < 8 {
        let mut bytes = vec![blobs.len() as u8 + 1; cluster as usize];
        let half = cluster as usize / 2;
        bytes[..half].copy_from_slice(&random.bytes(half as u64));
        blobs.insert(random.below(clusters) * cluster, bytes);
    }
    if compressed {
        maker.compress(&blobs.into_iter().collect::<Vec<_>>());
    }
    for round in 0..8 {
        let (at, len) = some(random);
        maker.write(at, &random.bytes(len), false);
        if round == 5 {
            let (at, len) = some(random);
            maker.io(&[format!("discard -q {at} {len}")]);
        }
        if snapshot && round % 4 == 3 {
            maker.snapshot(&format!("snapshot-{round}"));
        }
    }
}

fn run(case: &Case, seed: u64, operations: u64) {
    let mut random = Random::new(seed);
    let setting = Setting::make(case, &mut random);
    let storage = setting.storage();
    let name = format!(
        "cluster {}, {}, backing {}, compressed {}, compress {}, snapshot {}, device {}",
        case.cluster, case.options, case.backing, case.compressed, case.compress, case.snapshot, case.device
    );
    let driver = setting.open(&storage, &mut random);
    let content = support::steps::read_all(&*driver).unwrap();
    assert!(content == setting.content, "{name}: the first read is wrong");
    let mut rounds = 0;
    let mut reopen = |driver: Arc<dyn BlockDriver>| {
        driver.close().unwrap();
        drop(driver);
        rounds += 1;
        setting.check(&*storage, &name, rounds % 20 == 0);
        setting.open(&storage, &mut random)
    };
    let len_max = (case.cluster * 5 / 2).clamp(3000, 200_000);
    let model = Model { name: &name, content, len_max, discarded: &[0], reopen: Some(&mut reopen) };
    let driver = model::run_operations(driver, model, operations);
    let content = support::steps::read_all(&*driver).unwrap();
    driver.close().unwrap();
    drop(driver);
    setting.check(&*storage, &name, true);
    let read = reader::read_disk(&&*storage, Disk::Active, &setting.backing_content()).unwrap();
    assert!(read == content, "{name}: the file holds something else");
}

#[test]
fn the_matrix() {
    let seed = Random::seed("qcow2 model");
    let started = std::time::Instant::now();
    let next = AtomicUsize::new(0);
    let total: u64 = CASES.iter().map(|case| case.share).sum();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = CASES.get(number) else { break };
                    run(case, seed.wrapping_add(number as u64), operations() * case.share / total);
                }
            });
        }
    });
    eprintln!("{} operations in {:?}", operations(), started.elapsed());
}
