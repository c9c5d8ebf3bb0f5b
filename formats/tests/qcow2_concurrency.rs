//! Many threads at a time on one qcow2 image.
//!
//! Threads own stripes that interleave inside of the same clusters; content says who wrote it, so that
//! readers, too, see when they are given a cluster that was reused under them. Given-back space of the
//! storage is poisoned.
//!
//! Under `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --test qcow2_concurrency` the scenarios
//! of `qcow2_support/shuttle_*.rs` run instead, under every interleaving that shuttle chooses:
//! `NBD_IMG_SCHEDULES` says how many of each.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_memory.rs"]
mod shuttle_memory;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_scenarios.rs"]
mod shuttle_scenarios;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_recorded.rs"]
mod shuttle_recorded;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_durability.rs"]
mod shuttle_durability;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_bitmaps.rs"]
mod shuttle_bitmaps;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_bitmap_sizes.rs"]
mod shuttle_bitmap_sizes;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_subclusters.rs"]
mod shuttle_subclusters;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_data_file.rs"]
mod shuttle_data_file;

#[cfg(shuttle)]
#[path = "qcow2_support/shuttle_compressed.rs"]
mod shuttle_compressed;

#[cfg(not(shuttle))]
mod threads {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use nbd_img_formats::qcow2::{Compress, WriteOptions};
    use nbd_img_formats::raw::{RawDriver, RawOptions};
    use nbd_img_formats::storage::{MemoryOptions, MemoryStorage, Storage};
    use nbd_img_formats::sync::Arc;
    use nbd_img_formats::{BlockDriver, Durability, GuestRange, HostOffset, Provision, ZeroRequest};

    use crate::support::maker::{self, Maker};
    use crate::support::random::Random;
    use crate::support::reader::{self, Disk};
    use crate::support::units::{UNIT_LEN, Writer, painted, writer_of};
    use crate::support::wrapped::{Dawdling, Wrapped};
    use crate::support::{checker, scene, session, steps};

    /// Who wrote the backing file.
    const BACKING: Writer = 0xf000_0002;

    fn operations() -> u64 {
        std::env::var("NBD_IMG_THREAD_OPS").map_or(60_000, |text| text.parse().unwrap())
    }

    /// An image that many threads write.
    struct Arena {
        name: &'static str,
        options: &'static str,
        cluster: u64,
        stripe: u64,
        threads: u64,
        overlay: bool,
        grows: bool,
        /// So many bytes of changed metadata start a commit.
        dirty_len_max: u64,
        /// Whole clusters are written compressed.
        compress: bool,
    }

    /// Operations of a thread in a round.
    const ROUND_OPERATIONS: u64 = 100;

    const ARENAS: [Arena; 8] = [
        Arena {
            name: "eight stripes in a cluster",
            options: "cluster_size=4k",
            cluster: 4096,
            stripe: 512,
            threads: 8,
            overlay: true,
            grows: true,
            dirty_len_max: 8 << 20,
            compress: false,
        },
        Arena {
            name: "clusters of one's own, and those shared at their ends",
            options: "cluster_size=512,refcount_bits=64",
            cluster: 512,
            stripe: 512 * 5 + 64,
            threads: 16,
            overlay: true,
            grows: true,
            dirty_len_max: 2048,
            compress: false,
        },
        Arena {
            name: "a device of fixed length",
            options: "cluster_size=512,refcount_bits=1",
            cluster: 512,
            stripe: 512 * 3,
            threads: 8,
            overlay: false,
            grows: false,
            dirty_len_max: 1,
            compress: false,
        },
        Arena {
            name: "version 2",
            options: "cluster_size=1k,compat=v2",
            cluster: 1024,
            stripe: 1024 * 2 + 512,
            threads: 8,
            overlay: true,
            grows: true,
            dirty_len_max: 4096,
            compress: false,
        },
        Arena {
            name: "subclusters",
            options: "cluster_size=16k,extended_l2=on",
            cluster: 16384,
            stripe: 512 * 3 + 64,
            threads: 8,
            overlay: true,
            grows: true,
            dirty_len_max: 4096,
            compress: false,
        },
        Arena {
            name: "large clusters",
            options: "cluster_size=64k",
            cluster: 65536,
            stripe: 512,
            threads: 16,
            overlay: true,
            grows: true,
            dirty_len_max: 8 << 20,
            compress: false,
        },
        Arena {
            name: "compressed clusters that share those of the file",
            options: "cluster_size=4k",
            cluster: 4096,
            stripe: 4096 * 3,
            threads: 8,
            overlay: true,
            grows: true,
            dirty_len_max: 4096,
            compress: true,
        },
        Arena {
            name: "compressed clusters on a device",
            options: "cluster_size=1k,refcount_bits=4,compression_type=zstd",
            cluster: 1024,
            stripe: 1024 * 2 + 512,
            threads: 8,
            overlay: false,
            grows: false,
            dirty_len_max: 8 << 20,
            compress: true,
        },
    ];

    impl Arena {
        fn size(&self) -> u64 {
            (self.stripe * self.threads).max(self.cluster) * 12
        }

        fn image(&self) -> Vec<u8> {
            let maker = Maker::new(self.options, self.size());
            // Some clusters that are shared with a snapshot, where the refcounts can count it.
            if !self.options.contains("refcount_bits=1") {
                let len = self.size() / 4 / 64 * 64;
                maker.write(0, &painted(0, len, BACKING), false).snapshot("snap");
            }
            maker.bytes()
        }

        fn backing(&self) -> Vec<u8> {
            // Shorter than the disk.
            let len = if self.overlay { self.size() * 2 / 3 / 512 * 512 } else { 0 };
            painted(0, len, BACKING)
        }

        fn open(&self, storage: &Arc<dyn Storage>, backing: &[u8]) -> Arc<dyn BlockDriver> {
            let below: Option<Arc<dyn BlockDriver>> = if backing.is_empty() {
                None
            } else {
                let storage = MemoryStorage::copy_of(backing).unwrap();
                Some(RawDriver::open(storage, RawOptions::default()).unwrap())
            };
            let compress = self.compress.then(Compress::default);
            let write =
                WriteOptions { dirty_len_max: self.dirty_len_max, compress, ..WriteOptions::default() };
            scene::open_over(Arc::clone(storage), below, Some(write), 0).unwrap()
        }

        fn owner(&self, unit: usize) -> u64 {
            (unit * UNIT_LEN) as u64 / self.stripe % self.threads
        }
    }

    /// From the beginning again and again: most of what can go wrong does so in new clusters.
    fn run(arena: &Arena) {
        let seed = Random::seed(arena.name);
        let (image, backing) = (arena.image(), arena.backing());
        let rounds = (operations() / ARENAS.len() as u64 / arena.threads / ROUND_OPERATIONS).max(1);
        for round in 0..rounds {
            run_round(arena, &image, &backing, seed.wrapping_add(round), round == 0);
        }
    }

    fn run_round(arena: &Arena, image: &[u8], backing: &[u8], seed: u64, with_qemu: bool) {
        let len = if arena.grows { 0 } else { image.len() as u64 + 3 * arena.size() };
        let options = MemoryOptions { len: len.next_multiple_of(512), grows: arena.grows, poisoned: true };
        let memory = MemoryStorage::with(options).unwrap();
        memory.pwrite(image, HostOffset(0), Durability::Later).unwrap();
        let storage: Arc<dyn Storage> = Wrapped::new(memory, Dawdling(AtomicU64::new(seed % 7)));
        let first = reader::read_disk(&image.to_vec(), Disk::Active, backing).unwrap();
        let driver = arena.open(&storage, backing);
        assert!(steps::read_all(&*driver).unwrap() == first);
        let done = AtomicBool::new(false);
        let content = std::thread::scope(|scope| {
            let driver = &driver;
            let (first, done) = (&first, &done);
            scope.spawn(move || watch(arena, &**driver, done, seed));
            let workers: Vec<_> = (0..arena.threads)
                .map(|thread| scope.spawn(move || work(arena, &**driver, thread, first.clone(), seed)))
                .collect();
            let parts: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
            done.store(true, Ordering::Relaxed);
            let mut content = vec![0; arena.size() as usize];
            for (thread, part) in parts.into_iter().enumerate() {
                let part = part.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                for unit in (0..content.len() / UNIT_LEN).filter(|unit| arena.owner(*unit) == thread as u64) {
                    let range = unit * UNIT_LEN..(unit + 1) * UNIT_LEN;
                    content[range.clone()].copy_from_slice(&part[range]);
                }
            }
            content
        });
        assert!(steps::read_all(&*driver).unwrap() == content, "{}", arena.name);
        driver.close().unwrap();
        let report = checker::check_storage(&*storage).unwrap();
        assert!(report.is_clean(), "{}:\n{report}", arena.name);
        assert!(reader::read_disk(&&*storage, Disk::Active, backing).unwrap() == content, "{}", arena.name);
        if !with_qemu {
            return;
        }
        let bytes = nbd_img_formats::storage::SparseBytes::load(&*storage).unwrap();
        let (code, said) = maker::qemu_check(&crate::support::crash::content_of(&bytes));
        assert_eq!(code, 0, "{}: {said}", arena.name);
    }

    /// Reads everywhere, and never sees what the owner of a stripe did not write, or what belongs elsewhere.
    fn watch(arena: &Arena, driver: &dyn BlockDriver, done: &AtomicBool, seed: u64) {
        let mut random = Random::new(seed ^ 0x5a5a);
        let units = arena.size() / UNIT_LEN as u64;
        while !done.load(Ordering::Relaxed) {
            let at = random.below(units) * UNIT_LEN as u64;
            let len = ((1 + random.below(arena.cluster * 2 / 64)) * UNIT_LEN as u64).min(arena.size() - at);
            let mut buf = vec![0; len as usize];
            if random.below(2) == 0 {
                session::read(driver, at, &mut buf).unwrap();
            } else {
                driver.pread(at, &mut buf).unwrap();
            }
            for (index, unit) in buf.chunks_exact(UNIT_LEN).enumerate() {
                let number = at as usize / UNIT_LEN + index;
                // A unit may be caught half written: then nothing is said of it.
                if unit[..UNIT_LEN - 8] != unit[8..] {
                    assert!(
                        !unit.contains(&nbd_img_formats::storage::POISON),
                        "{}: unit {number}",
                        arena.name
                    );
                    continue;
                }
                let Some(writer) = writer_of(unit, number) else {
                    panic!("{}: unit {number} is foreign: {unit:x?}", arena.name)
                };
                let own =
                    writer == 0 || writer == BACKING || u64::from(writer >> 16) == arena.owner(number) + 1;
                assert!(own, "{}: unit {number} is of {writer:#x}", arena.name);
            }
        }
    }

    /// One thread's operations on its own stripes; returns what it knows the disk to hold.
    fn work(arena: &Arena, driver: &dyn BlockDriver, thread: u64, first: Vec<u8>, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed ^ (thread << 32));
        let mut content = first;
        // All go the same way, so that they meet.
        let mut way = Random::new(seed);
        for number in 0..ROUND_OPERATIONS {
            let stripe = way.below(arena.size() / arena.stripe / arena.threads) * arena.threads + thread;
            let start = stripe * arena.stripe;
            let (at, len) = crate::support::units::random_units(
                &mut random,
                start,
                start + arena.stripe,
                arena.stripe / UNIT_LEN as u64,
            );
            let own = &mut content[at as usize..(at + len) as usize];
            let writer = ((thread + 1) << 16) as Writer + (number % 0xffff) as Writer;
            step(driver, at, own, writer, &mut random);
        }
        content
    }

    fn step(driver: &dyn BlockDriver, at: u64, own: &mut [u8], writer: Writer, random: &mut Random) {
        let range = GuestRange::new(at, own.len() as u64).unwrap();
        let durability = if random.below(60) == 0 { Durability::Fua } else { Durability::Later };
        match random.below(20) {
            0..=9 => {
                let bytes = painted(at, range.len(), writer);
                if random.below(2) == 0 {
                    session::write(driver, at, &bytes, durability).unwrap();
                } else {
                    driver.pwrite(at, &bytes, durability).unwrap();
                }
                own.copy_from_slice(&bytes);
            }
            10..=12 => {
                let provision = random.pick(&[Provision::Unmap, Provision::Keep, Provision::Allocate]);
                let request = ZeroRequest { provision, fast: false, durability };
                if random.below(2) == 0 {
                    session::zero(driver, range, request).unwrap();
                } else {
                    driver.write_zeroes(range, request).unwrap();
                }
                own.fill(0);
            }
            13 => {
                if random.below(2) == 0 {
                    session::discard(driver, range, durability).unwrap();
                } else {
                    driver.discard(range, durability).unwrap();
                }
                let mut got = vec![0; own.len()];
                driver.pread(at, &mut got).unwrap();
                for (index, (unit, old)) in got.chunks(UNIT_LEN).zip(own.chunks_mut(UNIT_LEN)).enumerate() {
                    let zero = unit.iter().all(|byte| *byte == 0);
                    assert!(zero || unit == old, "discarded unit {index} from {at}: {unit:x?}");
                    old.copy_from_slice(unit);
                }
            }
            14 if random.below(2) == 0 => driver.flush().unwrap(),
            14 => {
                driver.make_durable().unwrap();
                driver.tidy();
            }
            _ => {
                let mut got = vec![0; own.len()];
                if random.below(2) == 0 {
                    session::read(driver, at, &mut got).unwrap();
                } else {
                    driver.pread(at, &mut got).unwrap();
                }
                if let Some(bad) = got.iter().zip(&*own).position(|(got, own)| got != own) {
                    let unit = bad / UNIT_LEN * UNIT_LEN;
                    let (got, own) = (&got[unit..unit + 8], &own[unit..unit + 8]);
                    panic!("byte {} is of {got:x?} instead of {own:x?}", at + bad as u64);
                }
            }
        }
    }

    #[test]
    fn stripes_inside_of_clusters() {
        for arena in &ARENAS {
            run(arena);
        }
    }
}
