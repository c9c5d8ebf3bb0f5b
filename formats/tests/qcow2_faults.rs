//! What becomes of a qcow2 image when any call to its file fails: an error for whoever asked, at most
//! leaks in the file, and everything goes on when the fault has gone, unless it was a sync that failed.
//!
//! `NBD_IMG_FAULT_SEQUENCES` says under how many of the short sequences every call fails (there are 1884),
//! `NBD_IMG_MODEL_SEED` with which the first of them comes.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod qcow2_fault_support;
mod support;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nbd_img_formats::storage::{CallClass, Fault, Faults, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, GuestRange, State};
use qcow2_fault_support::{CLASSES, Trial, ways};
use support::checker;
use support::random::Random;
use support::scene::{CLUSTER, SIZE, Scene};
use support::steps::{self, KINDS, Kind, Step};
use support::units::{Journal, Writer, painted};
use support::wrapped::{Limited, NeverClosed, Wrapped};

/// The scripts: some of all sequences of up to three operations; each kind alone, twice with a flush
/// between; some longer ones.
fn scripts(seed: u64) -> Vec<Vec<Kind>> {
    let count = std::env::var("NBD_IMG_FAULT_SEQUENCES").map_or(40, |text| text.parse().unwrap());
    let sequences = steps::sequences();
    // Neighbours are alike, so they are taken with strides; this one has no divisor in common with 1884.
    let chosen = (0..count).map(|number| (seed.wrapping_add(number).wrapping_mul(1009)) as usize);
    let mut scripts: Vec<_> = chosen.map(|index| sequences[index % sequences.len()].clone()).collect();
    for script in &mut scripts {
        script.push(Kind::Flush);
    }
    for kind in KINDS {
        scripts.push(vec![kind, Kind::Flush, kind, Kind::FuaWrite]);
    }
    scripts.push(vec![Kind::Grow, Kind::Grow, Kind::Discard, Kind::Flush, Kind::Grow]);
    scripts.push(vec![Kind::WriteShared, Kind::Discard, Kind::Flush, Kind::OverwriteCompressed, Kind::Grow]);
    scripts.push(vec![Kind::ZeroUnmap, Kind::WriteCluster, Kind::Flush, Kind::Flush, Kind::WritePart]);
    scripts
}

#[test]
fn every_call_may_fail() {
    let seed = Random::seed("every call may fail");
    fail_every_call(seed, &Scene::all(), &scripts(seed));
}

/// The same where the data lies in a file of its own, whose calls count, too.
#[test]
fn every_call_may_fail_with_a_data_file() {
    let seed = Random::seed("every call may fail, data file");
    fail_every_call(seed, &Scene::with_data_file(), &scripts(seed));
}

/// The same with subclusters.
#[test]
fn every_call_may_fail_with_subclusters() {
    let seed = Random::seed("every call may fail, subclusters");
    fail_every_call(seed, &Scene::with_subclusters(), &scripts(seed));
}

/// The same where whole clusters are written compressed.
#[test]
fn every_call_may_fail_compressed() {
    let seed = Random::seed("every call may fail, compressed");
    fail_every_call(seed, &Scene::compressing(), &scripts(seed));
}

fn fail_every_call(seed: u64, scenes: &[Scene], scripts: &[Vec<Kind>]) {
    let (next, trials) = (AtomicUsize::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(kinds) = scripts.get(number) else { break };
                    let mut random = Random::new(seed.wrapping_add(number as u64));
                    let scene = &scenes[(random.next() % scenes.len() as u64) as usize];
                    let steps: Vec<_> = kinds.iter().map(|kind| Step::random(*kind, &mut random)).collect();
                    let counts = Trial::new(scene, &steps, None).run();
                    for (class, count) in CLASSES.iter().zip(counts) {
                        for fault in (0..count).flat_map(|call| ways(*class, call)) {
                            Trial::new(scene, &steps, Some(fault)).run();
                            trials.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let trials = trials.into_inner();
    eprintln!("{trials} trials");
    assert!(trials > 1000, "{trials} calls have failed: the scripts do not reach the file");
}

/// A close that fails somewhere leaves a sound image with all that was flushed, whose bitmaps tell of all of it or
/// say that they do not.
#[test]
fn every_call_of_a_close_may_fail() {
    let mut random = Random::new(Random::seed("every call of a close may fail"));
    let mut stored = 0;
    let others = [Scene::with_subclusters(), Scene::compressing()].into_iter().flatten();
    for scene in Scene::all().into_iter().chain(others.filter(|scene| scene.data.is_none())) {
        let steps = [Kind::WritePart, Kind::Grow, Kind::ZeroUnmap, Kind::WriteShared, Kind::Discard]
            .map(|kind| Step::random(kind, &mut random));
        let close = |fault: Option<Fault>| {
            let (memory, faults) = (scene.storage(&scene.image), Faults::new());
            let storage = faults.attach(Wrapped::new(memory.clone(), NeverClosed));
            let driver = scene.open(storage).unwrap();
            for (number, step) in steps.iter().enumerate() {
                step.carry_out(&*driver, number as Writer + 1).unwrap();
            }
            driver.flush().unwrap();
            let content = steps::read_all(&*driver).unwrap();
            let before = CLASSES.map(|class| faults.count(class));
            if let Some(fault) = fault {
                faults.arm(fault);
            }
            let closed = driver.close();
            let counts = CLASSES.map(|class| faults.count(class));
            let name = format!("scene '{}', {steps:#?}\n{fault:?}, closed {closed:?}", scene.name);
            let report = checker::check_storage(&*memory).unwrap();
            assert!(report.is_sound(), "{name}\n{report}");
            let memory: &dyn Storage = &*memory;
            assert!(scene.read(&memory).unwrap() == content, "{name}");
            scene.check_bitmaps(&memory, &content).unwrap_or_else(|what| panic!("{name}: {what}"));
            std::array::from_fn::<_, { CLASSES.len() }, _>(|class| counts[class] - before[class])
        };
        let counts = close(None);
        for (class, count) in CLASSES.iter().zip(counts) {
            for fault in (0..count).flat_map(|call| ways(*class, call)) {
                close(Some(fault));
            }
        }
        stored += counts.iter().sum::<u64>();
    }
    assert!(stored > 50, "{stored} calls");
}

/// As `every_call_may_fail`, while the refcount table grows. Each write and sync fails once; there are many calls, so only some
/// fail in all ways.
#[test]
fn calls_of_a_growing_refcount_table_may_fail() {
    let scene = Scene::near_table_growth();
    let mut random = Random::new(Random::seed("a growing refcount table"));
    let steps = [Kind::WritePart, Kind::Grow, Kind::Flush, Kind::Grow, Kind::FuaWrite]
        .map(|kind| Step::random(kind, &mut random));
    let counts = Trial::new(&scene, &steps, None).run();
    for (class, count) in CLASSES.iter().zip(counts) {
        let faults: Vec<_> = (0..count).flat_map(|call| ways(*class, call)).collect();
        for _ in 0..faults.len().min(30) {
            Trial::new(&scene, &steps, Some(random.pick(&faults))).run();
        }
        if matches!(class, CallClass::Write | CallClass::Sync) {
            for call in 0..count {
                Trial::new(&scene, &steps, Some(Fault { class: Some(*class), ..Fault::at(call) })).run();
            }
        }
    }
}

/// A file system that is full at any moment: the request fails with ENOSPC, nothing is lost, and when
/// there is room again writing goes on.
#[test]
fn a_full_file_system_is_survived() {
    let grows = |scene: &Scene| scene.device_len.is_none() && scene.data_device_len.is_none();
    let scenes = [Scene::all(), Scene::with_data_file(), Scene::with_subclusters(), Scene::compressing()];
    for scene in scenes.into_iter().flatten().filter(grows) {
        let mut outcomes = [0; 2];
        let step = if scene.table_span() > SIZE && !scene.compress { 3 } else { 1 };
        for more in (0..150).step_by(step) {
            let refused = survive(&scene, more * CLUSTER, more);
            outcomes[usize::from(refused)] += 1;
        }
        assert!(outcomes[0] > 0 && outcomes[1] > 10, "{}: {outcomes:?}", scene.name);
    }
}

/// Whether there was too little room.
fn survive(scene: &Scene, more: u64, seed: u64) -> bool {
    let memory = scene.storages(&scene.files());
    let storage = Wrapped::new(memory.image.clone(), Limited::new(scene.image.len() as u64, more));
    // Half of it is full.
    let data_storage = memory.data.clone().map(|data| Wrapped::new(data, Limited::new(SIZE / 2, more)));
    let data = data_storage.clone().map(|data| data as Arc<dyn Storage>);
    let driver = scene.open_files(storage.clone(), data).unwrap();
    let mut random = Random::new(seed);
    let mut journal = Journal::new(&scene.content);
    let mut refused = false;
    let name = format!("scene '{}', room for {more} more bytes", scene.name);
    for number in 0..12 {
        let kinds = [Kind::WritePart, Kind::WriteCluster, Kind::WriteShared, Kind::Grow, Kind::Flush];
        let step = Step::random(random.pick(&kinds), &mut random);
        let change = journal.begin(step.units().start, step.units().end, number + 1, 1);
        match step.carry_out(&*driver, number + 1) {
            Ok(()) => journal.end(change, 2, true),
            Err(error) => {
                // A flush may need room for tables that were only in memory.
                assert_eq!(error.errno(), libc::ENOSPC, "{name}: {step:?}: {error}");
                refused = true;
            }
        }
        assert_eq!(driver.state(), State::Live, "{name}: {step:?}");
    }
    let content = steps::read_all(&*driver).unwrap();
    journal.check(&content, usize::MAX).unwrap_or_else(|what| panic!("{name}: {what}"));
    storage.hooks.make_room();
    if let Some(data) = &data_storage {
        data.hooks.make_room();
    }
    driver.pwrite(0, &painted(0, SIZE, 100), Durability::Later).unwrap_or_else(|e| panic!("{name}: {e}"));
    driver.close().unwrap_or_else(|e| panic!("{name}: {e}"));
    let image: &dyn Storage = &*memory.image;
    let data: &dyn Storage = memory.data.as_deref().map_or(image, |data| data);
    let report = checker::check_storage(image).unwrap();
    assert!(report.is_clean(), "{name}: {report}");
    assert!(scene.read_files(&image, &data).unwrap() == painted(0, SIZE, 100), "{name}");
    refused
}

/// A device has an end: what does not fit is refused, and what is given back can be used again.
#[test]
fn the_end_of_a_device_is_survived() {
    let mut scene = Scene::mixed("full device", "refcount_bits=16", None, true).on_device();
    let image_len = scene.image.len() as u64;
    let mut outcomes = [0; 2];
    for more in (0..200).step_by(3) {
        scene.device_len = Some((image_len + more * CLUSTER).next_multiple_of(CLUSTER));
        let name = format!("{more} clusters");
        let memory = scene.storage(&scene.image);
        let driver = scene.open(Wrapped::new(memory.clone(), NeverClosed)).unwrap();
        let mut journal = Journal::new(&scene.content);
        let mut full = false;
        for (number, cluster) in (0..192).rev().enumerate() {
            let (at, writer) = (cluster * CLUSTER, number as Writer + 1);
            let units = (at / 64) as usize..(at / 64 + 8) as usize;
            let change = journal.begin(units.start, units.end, writer, 1);
            match driver.pwrite(at, &painted(at, CLUSTER, writer), Durability::Later) {
                Ok(()) => journal.end(change, 2, true),
                Err(error) => {
                    assert_eq!(error.errno(), libc::ENOSPC, "{name}: {error}");
                    units.for_each(|unit| journal.take_back(change, unit));
                    full = true;
                }
            }
            assert_eq!(driver.state(), State::Live, "{name}");
        }
        outcomes[usize::from(full)] += 1;
        let content = steps::read_all(&*driver).unwrap();
        assert!(content == journal.now(), "{name}");
        if full {
            // Giving something back makes room, for which whoever needs it commits by himself.
            driver.discard(GuestRange::new(0, 16 * CLUSTER).unwrap(), Durability::Later).unwrap();
            if more % 2 == 0 {
                driver.flush().unwrap();
            }
            let at = 66 * CLUSTER;
            driver.pwrite(at, &painted(at, CLUSTER, 999), Durability::Later).unwrap();
        }
        driver.close().unwrap();
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_clean(), "{name}: {report}");
    }
    assert!(outcomes[0] > 0 && outcomes[1] > 0, "{outcomes:?}");
}
