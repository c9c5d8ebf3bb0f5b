//! Two or three threads on a tiny image, under the interleavings that shuttle chooses.

use std::io::Write;
// Not shuttle's: it counts over all schedules.
use std::sync::atomic::{AtomicUsize, Ordering};

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{CallClass, Fault, Faults, Storage};
use nbd_img_formats::sync::{Arc, thread};
use nbd_img_formats::{
    BlockDriver, Durability, GuestRange, Place, Provision, ReadPlan, State, WritePlan, ZeroRequest,
};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};

use crate::shuttle_memory::{FileBytes, Original, SceneFile};
use crate::support::checker;
use crate::support::scene::{self, CLUSTER, Scene};
use crate::support::units::painted;

pub const LATER: Durability = Durability::Later;

fn schedules() -> usize {
    std::env::var("NBD_IMG_SCHEDULES").map_or(300, |text| text.parse().unwrap())
}

/// A scene's image in a storage whose free space is poisoned.
pub struct Stage {
    pub scene: Arc<Scene>,
    pub storage: Arc<SceneFile>,
    /// The data file, if the scene has one; what is free of it reads as zeroes.
    pub data: Option<Arc<SceneFile>>,
    pub faults: Arc<Faults>,
    pub driver: Arc<dyn BlockDriver>,
}

impl Stage {
    fn new(scene: &Arc<Scene>) -> Stage {
        Stage::over(scene, |storage| storage)
    }

    /// One whose driver has what `wrap` makes of the storages: that of the image first.
    pub fn over(scene: &Arc<Scene>, wrap: impl Fn(Arc<dyn Storage>) -> Arc<dyn Storage>) -> Stage {
        let storage = SceneFile::poisoned(Original::image(scene));
        let data = Original::data(scene).map(SceneFile::zeroed);
        let below = Original::backing(scene).map(|backing| -> Arc<dyn BlockDriver> {
            RawDriver::open(SceneFile::zeroed(backing), RawOptions::default()).unwrap()
        });
        let faults = Faults::new();
        let image = faults.attach(wrap(storage.clone()));
        let outside = data.clone().map(|data| -> Arc<dyn Storage> { faults.attach(wrap(data)) });
        let driver = scene::open_parts(image, outside, below, Some(scene.write_options()), 0).unwrap();
        Stage { scene: Arc::clone(scene), storage, data, faults, driver }
    }

    pub fn spawn(&self, body: impl FnOnce(&dyn BlockDriver) + Send + 'static) -> thread::JoinHandle<()> {
        let driver = Arc::clone(&self.driver);
        thread::spawn(move || body(&*driver))
    }

    /// The image is closed and clean, and holds `content` at `at`.
    pub fn finish(self, at: u64, content: &[u8]) {
        let mut got = vec![0; content.len()];
        self.driver.pread(at, &mut got).unwrap();
        assert!(got == content, "the driver reads something else at {at}");
        self.driver.close().unwrap();
        let disk = self.closed();
        assert!(disk[at as usize..at as usize + content.len()] == *content, "the file holds something else");
    }

    /// What the disk of the image, which is closed and clean, holds.
    pub fn closed(&self) -> Vec<u8> {
        let file = file_of(&self.storage);
        let report = checker::check(&file).unwrap();
        assert!(report.is_clean(), "{report}");
        let Some(data) = &self.data else { return self.scene.read(&file).unwrap() };
        let data = file_of(data);
        let disk = self.scene.read_files(&file, &data).unwrap();
        if let Some(raw) = self.scene.read_raw(&file, &data).unwrap() {
            assert!(raw == disk, "the raw data file holds something else");
        }
        disk
    }
}

/// All of a file.
pub fn file_of(file: &SceneFile) -> FileBytes {
    file.bytes()
}

pub fn overlay() -> Arc<Scene> {
    Arc::new(Scene::mixed("overlay", "refcount_bits=16", Some(150 * CLUSTER), true))
}

pub fn plain() -> Arc<Scene> {
    Arc::new(Scene::mixed("plain", "refcount_bits=64", None, true))
}

/// The scenario as often as there are schedules: half of them at random, half by priorities.
fn explore(scene: Arc<Scene>, scenario: fn(Stage)) {
    explore_on(scene, Stage::new, scenario);
}

/// The same on what is made of the scene.
pub fn explore_on<S: 'static>(scene: Arc<Scene>, make: fn(&Arc<Scene>) -> S, scenario: fn(S)) {
    let name = scene.name;
    let again = Arc::clone(&scene);
    let half = schedules().div_ceil(2);
    let began = cpu_time();
    let run = Arc::new(AtomicUsize::new(0));
    let (random, priorities) = (run.clone(), run.clone());
    Runner::new(RandomScheduler::new(half), config()).run(move || {
        scenario(make(&scene));
        random.fetch_add(1, Ordering::Relaxed);
    });
    Runner::new(PctScheduler::new(3, half), config()).run(move || {
        scenario(make(&again));
        priorities.fetch_add(1, Ordering::Relaxed);
    });
    tell(name, run.load(Ordering::Relaxed), cpu_time() - began);
}

/// Says how many schedules a scene has been through: past the capture of the test's output, as a campaign that
/// has passed is told from one that has done nothing by that.
fn tell(scene: &str, schedules: usize, seconds: f64) {
    if std::env::var_os("NBD_IMG_SCHEDULES").is_some() {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or_default();
        let line = format!("{test}: {scene}: {schedules} schedules, {seconds:.1} s of a processor\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
}

/// Seconds of a processor that this thread has had; shuttle runs all threads of a scene in it.
fn cpu_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

pub fn config() -> Config {
    let mut config = Config::new();
    // Tests keep whole clusters on their stacks, and builds for tests do not optimise them away.
    config.stack_size = 1 << 20;
    config
}

pub fn join<const N: usize>(threads: [thread::JoinHandle<()>; N]) {
    for thread in threads {
        thread.join().unwrap();
    }
}

pub fn write(driver: &dyn BlockDriver, at: u64, len: u64, writer: u32) {
    driver.pwrite(at, &painted(at, len, writer), LATER).unwrap();
}

/// Parts of one cluster, which each allocating write has to keep for the other.
#[test]
fn allocate_against_allocate_in_one_cluster() {
    for scene in [overlay(), plain()] {
        explore(scene, |stage| {
            let at = 40 * CLUSTER;
            let threads = [0, 1, 2]
                .map(|part| stage.spawn(move |driver| write(driver, at + part * 128, 128, part as u32 + 1)));
            join(threads);
            let parts = [0, 1, 2].map(|part| painted(at + part * 128, 128, part as u32 + 1));
            stage.finish(at, &parts.concat());
        });
    }
}

/// The same with whole clusters planned by a session on one side.
#[test]
fn a_planned_cluster_against_a_part_of_it() {
    explore(overlay(), |stage| {
        let at = 41 * CLUSTER;
        let whole = stage.spawn(move |driver| {
            crate::support::session::write(driver, at, &painted(at, CLUSTER, 1), LATER).unwrap();
        });
        let part = stage.spawn(move |driver| write(driver, at + 64, 64, 2));
        let flush = stage.spawn(|driver| driver.flush().unwrap());
        join([whole, part, flush]);
        let mut got = vec![0; CLUSTER as usize];
        stage.driver.pread(at, &mut got).unwrap();
        let (mut one, two) = (painted(at, CLUSTER, 1), painted(at + 64, 64, 2));
        let first = got == one;
        one[64..128].copy_from_slice(&two);
        assert!(first || got == one, "neither order");
        stage.finish(at, &got);
    });
}

/// A read holds its plan while the cluster is zeroed, discarded, freed by a commit and reused.
#[test]
fn a_mapped_read_against_zero_and_reuse() {
    explore(plain(), |stage| {
        let at = 2 * CLUSTER;
        let old = stage.scene.content[at as usize..(at + CLUSTER) as usize].to_vec();
        let reader = stage.spawn(move |driver| {
            let mut plan = ReadPlan::default();
            driver.map_read(GuestRange::new(at, CLUSTER).unwrap(), MapMode::Wait, &mut plan).unwrap();
            thread::yield_now();
            let mut got = vec![0; CLUSTER as usize];
            match plan.pieces[0].place {
                Place::Data { storage, at } => {
                    driver.storages()[usize::from(storage.0)].pread(&mut got, at).unwrap();
                }
                Place::Zero { .. } => {}
                Place::Slow(_) => driver.read_slow(at, &mut got).unwrap(),
            }
            assert!(got == old || got.iter().all(|byte| *byte == 0), "a reused cluster was read");
        });
        let changer = stage.spawn(move |driver| {
            let range = GuestRange::new(at, CLUSTER).unwrap();
            let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
            driver.write_zeroes(range, request).unwrap();
            driver.flush().unwrap();
            driver.flush().unwrap();
            write(driver, 130 * CLUSTER, 6 * CLUSTER, 7);
        });
        join([reader, changer]);
        stage.finish(130 * CLUSTER, &painted(130 * CLUSTER, 6 * CLUSTER, 7));
    });
}

/// Freed clusters are let go after the flush was answered, while others commit and take clusters.
#[test]
fn a_late_reclaim_against_commit_and_reuse() {
    explore(plain(), |stage| {
        let at = 2 * CLUSTER;
        let freer = stage.spawn(move |driver| {
            for cluster in [2, 4] {
                let range = GuestRange::new(cluster * CLUSTER, CLUSTER).unwrap();
                let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
                crate::support::session::zero(driver, range, request).unwrap();
                driver.make_durable().unwrap();
                driver.tidy();
            }
        });
        let others = [(40, 3), (130, 6)].map(|(cluster, count)| {
            stage.spawn(move |driver| {
                for number in 0..count {
                    write(driver, (cluster + number) * CLUSTER, CLUSTER, 7);
                    driver.make_durable().unwrap();
                    driver.tidy();
                }
            })
        });
        freer.join().unwrap();
        join(others);
        let mut got = vec![1; CLUSTER as usize];
        stage.driver.pread(at, &mut got).unwrap();
        assert!(got.iter().all(|byte| *byte == 0), "a zeroed cluster reads as something else");
        stage.finish(130 * CLUSTER, &painted(130 * CLUSTER, 6 * CLUSTER, 7));
    });
}

/// A close against clusters that are being let go: all are counted, and nothing comes after it.
#[test]
fn close_against_a_late_reclaim() {
    explore(plain(), |stage| {
        let cleaner = stage.spawn(move |driver| {
            let range = GuestRange::new(2 * CLUSTER, 2 * CLUSTER).unwrap();
            let _ = driver.discard(range, LATER).and_then(|()| driver.make_durable());
            driver.tidy();
        });
        let closer = stage.spawn(|driver| driver.close().unwrap());
        join([cleaner, closer]);
        let report = checker::check(&file_of(&stage.storage)).unwrap();
        assert!(report.is_clean(), "{report}");
    });
}

/// A write holds its plan while the cluster is discarded and reused: it must not land in another's.
#[test]
fn a_mapped_write_against_discard_and_reuse() {
    explore(plain(), |stage| {
        let at = 3 * CLUSTER;
        let writer = stage.spawn(move |driver| {
            let mut plan = WritePlan::default();
            driver.prepare_write(GuestRange::new(at, CLUSTER).unwrap(), MapMode::Wait, &mut plan).unwrap();
            thread::yield_now();
            let bytes = painted(at, CLUSTER, 5);
            match plan.pieces[0].place {
                Place::Data { storage, at } => {
                    driver.storages()[usize::from(storage.0)].pwrite(&bytes, at, LATER).unwrap();
                    driver.finish_write(&mut plan, true).unwrap();
                }
                Place::Slow(_) => {
                    driver.finish_write(&mut plan, true).unwrap();
                    driver.write_slow(at, &bytes).unwrap();
                }
                Place::Zero { .. } => panic!("a write plan has no zeroes"),
            }
        });
        let changer = stage.spawn(move |driver| {
            driver.discard(GuestRange::new(at, CLUSTER).unwrap(), LATER).unwrap();
            driver.flush().unwrap();
            driver.flush().unwrap();
            write(driver, 130 * CLUSTER, 6 * CLUSTER, 7);
        });
        join([writer, changer]);
        stage.finish(130 * CLUSTER, &painted(130 * CLUSTER, 6 * CLUSTER, 7));
    });
}

/// What was written before a flush began is in the file after it, however many flushes there are.
#[test]
fn commit_against_write_and_commit() {
    explore(overlay(), |stage| {
        let threads = [0u64, 1, 2].map(|number| {
            let storage = Arc::clone(&stage.storage);
            let scene = Arc::clone(&stage.scene);
            stage.spawn(move |driver| {
                let at = (32 + number * 50) * CLUSTER + 64;
                write(driver, at, 128, number as u32 + 1);
                driver.flush().unwrap();
                let disk = scene.read(&file_of(&storage)).unwrap();
                assert!(disk[at as usize..at as usize + 128] == painted(at, 128, number as u32 + 1));
            })
        });
        join(threads);
        let at = 82 * CLUSTER + 64;
        stage.finish(at, &painted(at, 128, 2));
    });
}

/// Three tables and a cache of two slices: each step throws out what another one needs.
#[test]
fn eviction_against_change() {
    explore(plain(), |stage| {
        let threads = [40u64, 90, 140].map(|cluster| {
            stage.spawn(move |driver| {
                write(driver, cluster * CLUSTER, CLUSTER, cluster as u32);
                let mut got = vec![0; CLUSTER as usize];
                for other in [40u64, 90, 140] {
                    driver.pread(other * CLUSTER, &mut got).unwrap();
                }
                driver.pread(cluster * CLUSTER, &mut got).unwrap();
                assert!(got == painted(cluster * CLUSTER, CLUSTER, cluster as u32));
            })
        });
        join(threads);
        stage.finish(140 * CLUSTER, &painted(140 * CLUSTER, CLUSTER, 140));
    });
}

/// A close against writes: each write is in the file or has failed.
#[test]
fn close_against_write() {
    explore(overlay(), |stage| {
        let at = 42 * CLUSTER;
        let driver = Arc::clone(&stage.driver);
        let writer = thread::spawn(move || driver.pwrite(at, &painted(at, 192, 9), LATER).is_ok());
        let closer = stage.spawn(|driver| driver.close().unwrap());
        let written = writer.join().unwrap();
        closer.join().unwrap();
        assert_eq!(stage.driver.state(), State::Closed);
        let report = checker::check(&file_of(&stage.storage)).unwrap();
        assert!(report.is_sound(), "{report}");
        let disk = stage.scene.read(&file_of(&stage.storage)).unwrap();
        let got = &disk[at as usize..at as usize + 192];
        let there = got == painted(at, 192, 9);
        let old = got == &stage.scene.content[at as usize..at as usize + 192];
        assert!(there || (old && !written), "written: {written}, there: {there}");
    });
}

/// A sync fails under two writers: nobody is told that all is well afterwards, and the file is sound.
#[test]
fn failure_against_write() {
    explore(overlay(), |stage| {
        let first = stage.faults.count(CallClass::Sync);
        stage.faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(1) });
        let threads = [0u64, 1].map(|number| {
            stage.spawn(move |driver| {
                let at = (33 + number * 100) * CLUSTER;
                let written = driver.pwrite(at, &painted(at, 100 * 64, number as u32 + 1), LATER);
                let flushed = driver.flush();
                if driver.state() == State::Failed {
                    assert!(driver.flush().is_err() && driver.pwrite(at, &[1; 64], LATER).is_err());
                }
                drop((written, flushed));
            })
        });
        join(threads);
        assert!(stage.faults.count(CallClass::Sync) > first);
        assert_eq!(stage.driver.state(), State::Failed);
        assert!(stage.driver.flush().is_err());
        let mut cluster = vec![0; CLUSTER as usize];
        stage.driver.pread(20 * CLUSTER, &mut cluster).unwrap_or_else(|e| panic!("a committed cluster: {e}"));
        let _ = stage.driver.close();
        let report = checker::check(&file_of(&stage.storage)).unwrap();
        assert!(report.is_sound(), "{report}");
    });
}

/// Blobs that share a host cluster are replaced, the cluster freed and reused under a read of one of them.
#[test]
fn a_read_of_a_blob_against_copy_on_write_and_reuse() {
    explore(plain(), |stage| {
        let (at, len) = (16 * CLUSTER, 8 * CLUSTER);
        let read = 20 * CLUSTER;
        let old = stage.scene.content[read as usize..(read + CLUSTER) as usize].to_vec();
        let reader = stage.spawn(move |driver| {
            let mut got = vec![0; CLUSTER as usize];
            crate::support::session::read(driver, read, &mut got).unwrap();
            assert!(got == old || got == painted(read, CLUSTER, 3), "a reused cluster was read");
        });
        let writer = stage.spawn(move |driver| {
            write(driver, at, len, 3);
            driver.flush().unwrap();
            driver.flush().unwrap();
            write(driver, 130 * CLUSTER, 6 * CLUSTER, 7);
        });
        join([reader, writer]);
        stage.finish(at, &painted(at, len, 3));
    });
}

/// Two parts of a cluster that a snapshot shares are written, a third is zeroed: one copy is made, all three
/// are in it, and the snapshot is as it was.
#[test]
fn copy_on_write_against_copy_on_write() {
    explore(overlay(), |stage| {
        let at = 66 * CLUSTER;
        let mut expected = stage.scene.content[at as usize..(at + CLUSTER) as usize].to_vec();
        expected[..128].copy_from_slice(&painted(at, 128, 1));
        expected[128..256].copy_from_slice(&painted(at + 128, 128, 2));
        expected[256..320].fill(0);
        let first = stage.spawn(move |driver| write(driver, at, 128, 1));
        let second = stage.spawn(move |driver| {
            let bytes = painted(at + 128, 128, 2);
            crate::support::session::write(driver, at + 128, &bytes, LATER).unwrap();
        });
        let zero = stage.spawn(move |driver| {
            let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
            driver.write_zeroes(GuestRange::new(at + 256, 64).unwrap(), request).unwrap();
            driver.flush().unwrap();
        });
        join([first, second, zero]);
        stage.finish(at, &expected);
    });
}

/// A cluster is copied for a part of it while all of it is zeroed: one comes after the other.
#[test]
fn copy_on_write_against_zero() {
    explore(overlay(), |stage| {
        // Of the backing file, of the image under a snapshot, of a blob.
        for at in [40 * CLUSTER, 67 * CLUSTER, 18 * CLUSTER] {
            let part = stage.spawn(move |driver| write(driver, at + 64, 64, 4));
            let zero = stage.spawn(move |driver| {
                let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
                driver.write_zeroes(GuestRange::new(at, CLUSTER).unwrap(), request).unwrap();
                driver.flush().unwrap();
            });
            join([part, zero]);
            let mut got = vec![0; CLUSTER as usize];
            stage.driver.pread(at, &mut got).unwrap();
            let mut expected = vec![0; CLUSTER as usize];
            if got[64] != 0 || got[67] != 0 {
                expected[64..128].copy_from_slice(&painted(at + 64, 64, 4));
            }
            assert!(got == expected, "neither order");
        }
        let untouched = stage.scene.content[..CLUSTER as usize].to_vec();
        stage.finish(0, &untouched);
    });
}

/// Two allocate while there is no room for one write: whoever was told so may try again, nothing is lost.
#[test]
fn no_room_against_allocate() {
    explore(overlay(), |stage| {
        let full = Fault { class: Some(CallClass::Write), errno: libc::ENOSPC, ..Fault::at(2) };
        stage.faults.arm(full);
        let at = [33u64, 140].map(|cluster| cluster * CLUSTER + 64);
        let threads = at.map(|at| {
            stage.spawn(move |driver| {
                let wrote = driver.pwrite(at, &painted(at, 256, 5), LATER);
                let flushed = driver.flush();
                for error in [wrote, flushed].into_iter().filter_map(Result::err) {
                    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
                }
            })
        });
        join(threads);
        stage.faults.disarm();
        assert_eq!(stage.driver.state(), State::Live);
        for at in at {
            write(&*stage.driver, at, 256, 6);
        }
        stage.finish(at[0], &painted(at[0], 256, 6));
    });
}
