//! What a crash at any moment leaves of a qcow2 image that is being written: never worse than leaks, and
//! everything that a flush or a FUA write has promised.
//!
//! `NBD_IMG_CRASH_STATES` says how many states are looked at, `NBD_IMG_MODEL_SEED` which.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nbd_img_formats::storage::{Change, FileId, Log, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, HostOffset};
use support::crash::{self, Run};
use support::image::{COPIED, Image};
use support::random::Random;
use support::scene::{CLUSTER, Scene};
use support::steps::{self, Action, KINDS, Kind, Step};
use support::units::{Journal, painted};
use support::wrapped::{Hooks, Wrapped};

/// States looked at in each run of a long sequence.
const STATES_PER_LONG_RUN: u64 = 60;

fn states() -> u64 {
    std::env::var("NBD_IMG_CRASH_STATES").map_or(50_000, |text| text.parse().unwrap())
}

fn honest(_file: FileId, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
    storage
}

/// Runs `one` with 0, 1, 2, ... on all processors, until it says that it is enough.
fn in_parallel(one: impl Fn(usize) -> ControlFlow<()> + Sync) {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| while one(next.fetch_add(1, Ordering::Relaxed)).is_continue() {});
        }
    });
}

/// Runs the sequences, each at least once, in scenes and with places that follow from the seed and the
/// number of the run, until so many states have been looked at: `each` of a run, or one for every record
/// of its log.
fn explore_all(name: &str, scenes: &[Scene], sequences: &[Vec<Kind>], states: u64, each: Option<u64>) {
    let seed = Random::seed(name);
    let (seen, runs) = (AtomicU64::new(0), AtomicUsize::new(0));
    in_parallel(|number| {
        if number >= sequences.len() && seen.load(Ordering::Relaxed) >= states {
            return ControlFlow::Break(());
        }
        let mut random = Random::new(seed.wrapping_add(number as u64));
        let kinds = &sequences[number % sequences.len()];
        let scene = scene_for(kinds, scenes, &mut random);
        let steps: Vec<_> = kinds.iter().map(|kind| Step::random(*kind, &mut random)).collect();
        let run = crash::run(scene, steps, &honest);
        let count = each.unwrap_or_else(|| run.cuts());
        run.explore(count, &mut random).unwrap_or_else(|what| panic!("{name}, sequence {number}: {what}"));
        seen.fetch_add(count, Ordering::Relaxed);
        runs.fetch_add(1, Ordering::Relaxed);
        ControlFlow::Continue(())
    });
    eprintln!("{name}: {} states of {} runs", seen.into_inner(), runs.into_inner());
}

/// One of the scenes that have what these kinds of operations are about; any where none has.
fn scene_for<'a>(kinds: &[Kind], scenes: &'a [Scene], random: &mut Random) -> &'a Scene {
    let has = |scene: &&Scene| {
        let compressed = !kinds.contains(&Kind::OverwriteCompressed) || !scene.compressed.is_empty();
        compressed && (!kinds.contains(&Kind::WriteShared) || !scene.snapshots.is_empty())
    };
    let some: Vec<_> = scenes.iter().filter(has).collect();
    let some = if some.is_empty() { scenes.iter().collect() } else { some };
    some[(random.next() % some.len() as u64) as usize]
}

/// Cut after every record.
#[test]
fn short_sequences() {
    explore_all("short sequences", &Scene::all(), &steps::sequences(), states() * 5 / 10, None);
}

/// The same where the data lies in a file of its own.
#[test]
fn short_sequences_with_a_data_file() {
    let scenes = Scene::with_data_file();
    explore_all("short sequences, data file", &scenes, &steps::sequences(), states() * 2 / 10, None);
}

/// The same with subclusters. Their images are larger, so only so many sequences are run as the number of states
/// asks for.
#[test]
fn short_sequences_with_subclusters() {
    let states = states() * 2 / 10;
    let sequences = some_sequences("short sequences, subclusters", states);
    explore_all("short sequences, subclusters", &Scene::with_subclusters(), &sequences, states, None);
}

/// As many short sequences as so many states come of.
fn some_sequences(name: &str, states: u64) -> Vec<Vec<Kind>> {
    let mut random = Random::new(Random::seed(name));
    let all = steps::sequences();
    // A short sequence has some 25 records.
    let count = usize::try_from(states / 25).unwrap().clamp(100, all.len());
    (0..count).map(|_| all[random.below(all.len() as u64) as usize].clone()).collect()
}

/// The same where whole clusters are written compressed.
#[test]
fn short_sequences_compressed() {
    let states = states() * 2 / 10;
    let sequences = some_sequences("short sequences, compressed", states);
    explore_all("short sequences, compressed", &Scene::compressing(), &sequences, states, None);
}

#[test]
fn long_sequences_compressed() {
    explore_long("long sequences, compressed", &Scene::compressing(), states() / 10);
}

#[test]
fn long_sequences_with_subclusters() {
    explore_long("long sequences, subclusters", &Scene::with_subclusters(), states() / 10);
}

#[test]
fn long_sequences() {
    explore_long("long sequences", &Scene::all(), states() * 2 / 10);
}

#[test]
fn long_sequences_with_a_data_file() {
    explore_long("long sequences, data file", &Scene::with_data_file(), states() / 10);
}

fn explore_long(name: &str, scenes: &[Scene], states: u64) {
    let mut random = Random::new(Random::seed("kinds of long sequences"));
    let count = (states / STATES_PER_LONG_RUN).max(20);
    let long = |_| (0..8 + random.below(30)).map(|_| random.pick(&KINDS)).collect();
    let sequences: Vec<Vec<Kind>> = (0..count).map(long).collect();
    explore_all(name, scenes, &sequences, states, Some(STATES_PER_LONG_RUN));
}

/// The refcount table itself gets too small, and moves.
#[test]
fn a_growing_refcount_table() {
    let scenes = [Scene::near_table_growth(), Scene::near_table_growth().on_device()];
    let mut random = Random::new(Random::seed("a growing refcount table"));
    let states = (states() / 50).max(300);
    let mut grown = 0;
    for number in 0..20 {
        let kinds = [Kind::WritePart, Kind::Grow, random.pick(&KINDS), Kind::Grow, random.pick(&KINDS)];
        let steps = kinds.map(|kind| Step::random(kind, &mut random)).to_vec();
        let run = crash::run(&scenes[number % 2], steps, &honest);
        run.explore(states / 20, &mut random).unwrap_or_else(|what| panic!("run {number}: {what}"));
        grown += u64::from(run.image_now(|image| image.table_clusters) > 1);
    }
    assert!(grown >= 10, "the table has grown in {grown} of 20 runs");
}

/// A flush of an image with nothing to write ends up at one sync, and stays there.
#[test]
fn a_clean_flush_is_one_sync() {
    for scene in Scene::all().into_iter().chain(Scene::with_data_file()) {
        let log = Log::new();
        let driver = crash::open_recorded(&scene, &log, &honest);
        // The data's own comes before those of the image, which has nothing to sync when it is clean.
        let [changed, clean] = if scene.data.is_some() { [3, 1] } else { [2, 1] };
        let syncs_of_flush = || {
            let before = log.len();
            driver.flush().unwrap();
            log.records()[before..].iter().filter(|record| record.change == Change::Sync).count()
        };
        driver.pwrite(40 * CLUSTER, &[1; 512], Durability::Later).unwrap();
        let entries_stay = Image::parse(&scene.image).unwrap().has_raw_data_file();
        assert_eq!(
            syncs_of_flush(),
            if entries_stay { clean } else { changed },
            "{}: allocation",
            scene.name
        );
        assert_eq!(syncs_of_flush(), clean, "{}: nothing", scene.name);
        driver.pwrite(40 * CLUSTER + 100, &[2; 100], Durability::Later).unwrap();
        assert_eq!(syncs_of_flush(), clean, "{}: an overwrite in place", scene.name);
        driver.close().unwrap();
    }
}

/// Opening and closing without a write leaves every byte as it was.
#[test]
fn an_image_that_is_not_written_stays_as_it_is() {
    for scene in Scene::all().into_iter().chain(Scene::with_data_file()) {
        let log = Log::new();
        let driver = crash::open_recorded(&scene, &log, &honest);
        steps::read_all(&*driver).unwrap();
        driver.flush().unwrap();
        driver.close().unwrap();
        let changes = log.records().into_iter().filter(|record| record.change != Change::Sync).count();
        assert_eq!(changes, 0, "{}", scene.name);
    }
}

// That the rig finds what it is there to find.

/// Drops some syncs, as the numbers of the calls say.
struct Lying {
    syncs: AtomicU64,
    drops: Drops,
}

/// Whether the sync with this number is dropped.
type Drops = fn(u64) -> bool;

impl Hooks for Lying {
    fn drops_sync(&self) -> bool {
        (self.drops)(self.syncs.fetch_add(1, Ordering::Relaxed))
    }
}

/// One step of an allocating write done by hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hand {
    Data,
    Refcounts,
    Table,
    Entry,
    Sync,
}

/// Writes the first cluster of an empty image by hand, in the given order.
fn by_hand<'a>(scene: &'a Scene, order: &[Hand]) -> Run<'a> {
    let image = Image::parse(&scene.image).unwrap();
    let end = (scene.image.len() as u64).next_multiple_of(CLUSTER);
    let (table, data) = (end, end + CLUSTER);
    let counts = image.refcount_table[0] + end / CLUSTER * 2;
    let log = Log::new();
    let storage = log.attach(scene.storage(&scene.image)).unwrap();
    let mut journal = Journal::new(&scene.content);
    let change = journal.begin(0, CLUSTER as usize / 64, 1, log.len());
    for step in order {
        let mut body = vec![0; CLUSTER as usize];
        body[..8].copy_from_slice(&(data | COPIED).to_be_bytes());
        let (bytes, at) = match step {
            Hand::Data => (painted(0, CLUSTER, 1), data),
            Hand::Refcounts => (vec![0, 1, 0, 1], counts),
            Hand::Table => (body, table),
            Hand::Entry => ((table | COPIED).to_be_bytes().to_vec(), image.l1_at),
            Hand::Sync => {
                storage.sync().unwrap();
                continue;
            }
        };
        storage.pwrite(&bytes, HostOffset(at), Durability::Later).unwrap();
    }
    journal.end(change, log.len(), true);
    // The answer to the flush.
    log.mark("answered");
    Run { scene, steps: Vec::new(), log, journal, count_syncs: true }
}

#[test]
fn the_rig_tells_right_orders_from_wrong_ones() {
    use Hand::{Data, Entry, Refcounts, Sync, Table};
    let scene = Scene::empty("by hand", "refcount_bits=16");
    let verdict = |order: &[Hand]| by_hand(&scene, order).explore(2000, &mut Random::new(1));
    for right in [[Data, Refcounts, Table, Sync, Entry, Sync], [Table, Refcounts, Data, Sync, Entry, Sync]] {
        verdict(&right).unwrap();
    }
    let finds = |order: &[Hand], what: &str| {
        let said = verdict(order).expect_err(what);
        assert!(said.contains(what), "{order:?}: {said}");
    };
    finds(&[Data, Refcounts, Table, Entry, Sync], "corrupt");
    finds(&[Data, Table, Sync, Entry, Refcounts, Sync], "counted 0");
    finds(&[Refcounts, Table, Sync, Entry, Sync, Data], "outside of the file");
    finds(&[Data, Refcounts, Table, Sync, Entry], "unit 0 (offset 0x0) is of 0");
    // What is not written is zeroes in a file, which is an empty table; on a device it is anything.
    let order = [Data, Refcounts, Sync, Table, Entry, Sync];
    verdict(&order).unwrap();
    let device = Scene::empty("by hand on a device", "refcount_bits=16").on_device();
    by_hand(&device, &order).explore(2000, &mut Random::new(1)).unwrap_err();
}

/// The driver over a storage that drops its first, second or every sync is found out: each is needed.
#[test]
fn every_sync_of_a_flush_is_needed() {
    let scenes = Scene::all();
    let lies: [(&str, Drops); 3] =
        [("first", |number| number % 2 == 0), ("second", |number| number % 2 == 1), ("every", |_| true)];
    for (name, drops) in lies {
        let lying = |_file: FileId, inner: Arc<dyn Storage>| -> Arc<dyn Storage> {
            Wrapped::new(inner, Lying { syncs: AtomicU64::new(0), drops })
        };
        let mut found = 0;
        for seed in 0..40 {
            let mut random = Random::new(seed);
            let steps = [Kind::WritePart, Kind::Grow, Kind::WriteShared, Kind::WriteCluster]
                .map(|kind| Step::random(kind, &mut random));
            let flush = Step { action: Action::Flush, at: 0, len: 0, by_plan: false };
            let steps = [&steps[..], &[flush], &steps[..1]].concat();
            let scene = &scenes[(seed as usize) % scenes.len()];
            let run = crash::run_without_sync_counts(scene, steps, &lying);
            found += u64::from(run.explore(200, &mut random).is_err());
        }
        assert!(found >= 30, "the {name} sync was dropped, seen in {found} of 40 runs");
    }
}

/// So is a data file that is not synced, or whose sync comes after the entries that lead to it.
#[test]
fn the_sync_of_a_data_file_is_needed() {
    let scenes = Scene::with_data_file();
    let lying = |file: FileId, inner: Arc<dyn Storage>| -> Arc<dyn Storage> {
        let drops: Drops = if file == crash::DATA { |_| true } else { |_| false };
        Wrapped::new(inner, Lying { syncs: AtomicU64::new(0), drops })
    };
    let mut found = 0;
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let kinds = [Kind::WritePart, Kind::Grow, Kind::ZeroUnmap, Kind::WriteCluster, Kind::NewTable];
        let steps = kinds.map(|kind| Step::random(kind, &mut random));
        let flush = Step { action: Action::Flush, at: 0, len: 0, by_plan: false };
        let steps = [&steps[..], &[flush], &steps[..1]].concat();
        let scene = &scenes[(seed as usize) % scenes.len()];
        let run = crash::run_without_sync_counts(scene, steps, &lying);
        found += u64::from(run.explore(200, &mut random).is_err());
    }
    assert!(found >= 35, "the sync of the data was dropped, seen in {found} of 40 runs");
}
