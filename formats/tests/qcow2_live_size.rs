//! Another size for a disk while it is used: what it holds then, what a crash at any moment leaves, and writers that go
//! on meanwhile.
//!
//! `NBD_IMG_LIVE_SIZE_RUNS` says how many sequences are run, `NBD_IMG_MODEL_SEED` which.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nbd_img_formats::qcow2::{Compress, Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::{CallClass, Change, Fault, Faults, Log, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, Provision, State, ZeroRequest};
use support::checker;
use support::crash::{self, DATA, IMAGE, Left};
use support::maker::Maker;
use support::offline::{crashed, each_call};
use support::random::Random;
use support::scene::{self, SIZE, Scene};
use support::steps::read_all;
use support::wrapped::{PastTheCache, Wrapped};

/// One state in so many is also given to `qemu-img check`.
const QEMU_ONE_IN: u64 = 60;
/// The sizes that disks get: up to 130 entries of the L1 table, of which 64 fill a cluster.
const SIZE_MAX: u64 = 4 << 20;
const SECTOR: usize = 512;

/// What was done, and between which records of the log.
struct Done {
    what: String,
    log: (usize, usize),
    /// How the disk may look after a crash in there: as it was flushed, and after everything since.
    contents: std::ops::RangeInclusive<usize>,
}

fn scenes() -> Vec<Scene> {
    let all = [Scene::all(), Scene::with_data_file(), Scene::with_subclusters(), Scene::compressing()];
    let all = all.into_iter().flatten().filter(|scene| !scene.name.contains("bitmaps"));
    let larger = |scene: Scene| Scene { data_device_len: scene.data_device_len.map(|_| SIZE_MAX), ..scene };
    // On a device there is room for little more.
    all.filter(|scene| scene.device_len.is_none()).map(larger).collect()
}

fn aligned(random: &mut Random, below: u64) -> u64 {
    random.below(below / 512 + 1) * 512
}

/// Does something to the disk, and says what. (Another size is durable, and nothing else.)
fn act(driver: &Qcow2Driver, number: u64, random: &mut Random) -> (String, Vec<u8>) {
    let mut content = read_all(driver).unwrap();
    let size = driver.size();
    let what = random.below(9);
    if what < 4 {
        // Small steps and large ones, to ends of clusters and into their middle.
        let to = match what {
            0 => aligned(random, SIZE_MAX),
            1 => size.saturating_add(aligned(random, 64 << 10)).min(SIZE_MAX),
            2 => size.saturating_sub(aligned(random, 64 << 10)),
            _ => aligned(random, SIZE_MAX / 16),
        };
        driver.resize(to).unwrap();
        content.resize(to as usize, 0);
        return (format!("resize {size} to {to}"), content);
    }
    let at = aligned(random, size);
    // Often up to the very end.
    let len = if random.below(3) == 0 { size - at } else { aligned(random, (size - at).min(40 << 10)) };
    let range = GuestRange::new(at, len).unwrap();
    let part = &mut content[at as usize..(at + len) as usize];
    let zero = |provision| ZeroRequest { provision, fast: false, durability: Durability::Later };
    let what = match what {
        4 => {
            driver.write_zeroes(range, zero(Provision::Unmap)).unwrap();
            part.fill(0);
            "unmap"
        }
        5 => {
            driver.write_zeroes(range, zero(Provision::Allocate)).unwrap();
            part.fill(0);
            "allocate"
        }
        _ => {
            part.fill(number as u8 | 1);
            driver.pwrite(at, part, Durability::Later).unwrap();
            "write"
        }
    };
    (format!("{what} {at} {len}"), content)
}

/// What was done, and how the disk looked before and after each of it.
struct Run {
    log: Arc<Log>,
    done: Vec<Done>,
    contents: Vec<Vec<u8>>,
}

fn run(scene: &Scene, steps: u64, random: &mut Random) -> Run {
    let log = Log::new();
    let driver = crash::open_recorded(scene, &log, &|_, storage| storage);
    let mut done: Vec<Done> = Vec::new();
    let (mut contents, mut flushed) = (vec![read_all(&*driver).unwrap()], 0);
    for number in 0..steps {
        let from = log.len();
        let (mut what, expected) = act(&driver, number, random);
        let after = read_all(&*driver).unwrap();
        let said = || done.iter().map(|done| format!("{}; ", done.what)).collect::<String>();
        assert!(
            after == expected,
            "{}: {}{what}: {}",
            scene.name,
            said(),
            first_difference(&after, &expected)
        );
        contents.push(after);
        let may_be = flushed..=contents.len() - 1;
        if random.below(2) == 0 {
            driver.flush().unwrap();
            flushed = contents.len() - 1;
            what += ", flushed";
        }
        done.push(Done { what, log: (from, log.len()), contents: may_be });
    }
    let from = log.len();
    driver.close().unwrap();
    contents.extend_from_within(contents.len() - 1..);
    let may_be = flushed..=contents.len() - 1;
    done.push(Done { what: "close".to_owned(), log: (from, log.len()), contents: may_be });
    let left = Left::of(scene, |file| log.replay(file, log.len()));
    let report = checker::check(&left.image).unwrap();
    assert!(report.is_clean(), "{}: after a close:\n{report}", scene.name);
    assert!(left.read(scene, true).unwrap() == *contents.last().unwrap(), "{}: closed", scene.name);
    Run { log, done, contents }
}

fn first_difference(found: &[u8], expected: &[u8]) -> String {
    let at = found.iter().zip(expected).position(|(a, b)| a != b);
    format!("{} bytes instead of {}, different at {at:?}", found.len(), expected.len())
}

/// What is on the disk of a state in the midst of what was done: its size from before or after, each sector as it was
/// flushed or as something since has made it; and what only one of the sizes has, as it was then.
fn check_content(found: &[u8], contents: &[Vec<u8>]) -> Result<(), String> {
    let [.., before, after] = contents else { return Err("nothing was done".to_owned()) };
    if found.len() != before.len() && found.len() != after.len() {
        return Err(format!("the disk has {} bytes", found.len()));
    }
    // Where the size is the one from before, what came after is not there.
    let later = if found.len() == after.len() { 0 } else { 1 };
    for (number, sector) in found.chunks(SECTOR).enumerate() {
        let range = number * SECTOR..number * SECTOR + sector.len();
        // What the disk had there before it was shorter does not come back.
        let mut allowed = contents.iter().rev().skip(later).map_while(|content| content.get(range.clone()));
        if !allowed.any(|content| content == sector) {
            return Err(format!("sector {number} is neither what it was nor what it becomes"));
        }
    }
    Ok(())
}

fn check_state(scene: &Scene, run: &Run, done: &Done, cut: usize, random: &mut Random) -> Result<(), String> {
    // One file may lose all and the other one nothing.
    let left = crashed(scene, &run.log, cut, false, random);
    let report = checker::check(&left.image)?;
    if !report.is_sound() {
        return Err(format!("the image is corrupt:\n{report}"));
    }
    check_content(&left.read(scene, false)?, &run.contents[done.contents.clone()])?;
    if random.below(QEMU_ONE_IN) == 0 {
        let files = left.files();
        let (code, said) = Maker::of_files(&files.image, files.data.as_deref()).check();
        if code != report.exit_code() {
            return Err(format!("qemu-img check exits with {code}: {said}\nours:\n{report}"));
        }
    }
    Ok(())
}

#[test]
fn a_crash_leaves_one_size_or_the_other_and_nothing_worse_than_leaks() {
    let runs = std::env::var("NBD_IMG_LIVE_SIZE_RUNS").map_or(30, |text| text.parse().unwrap());
    let seed = Random::seed("live sizes");
    let scenes = scenes();
    let (mut states, mut resizes) = (0, 0);
    for number in 0..runs {
        let mut random = Random::new(seed.wrapping_add(number));
        let scene = &scenes[number as usize % scenes.len()];
        let run = run(scene, 3 + random.below(8), &mut random);
        for (index, step) in run.done.iter().enumerate() {
            resizes += u64::from(step.what.starts_with("resize"));
            for cut in step.log.0..=step.log.1 {
                check_state(scene, &run, step, cut, &mut random).unwrap_or_else(|what| {
                    let said: Vec<_> = run.done[..=index].iter().map(|done| done.what.as_str()).collect();
                    panic!(
                        "run {number}, scene '{}', {said:?}, cut {cut} of {:?}: {what}",
                        scene.name, step.log
                    )
                });
                states += 1;
            }
        }
    }
    eprintln!("{states} states of {runs} runs with {resizes} resizes");
    assert!(resizes > runs / 2, "the sequences have hardly any resizes");
}

/// Any call of the storage fails, once or for good: the disk has the one size or the other, for its guest and for who
/// opens it next, the guest's data is as it was, and where the image is not failed it goes on.
#[test]
fn a_call_that_fails_leaves_one_size_or_the_other() {
    let (mut failed, mut taken_back) = (0, 0);
    for scene in &scenes() {
        for to in [3 << 20, SIZE + 5 * 512, 40 * 512] {
            failed += each_call(|fault| {
                let (fired, is_taken_back) = fail_at(scene, to, fault);
                taken_back += u64::from(is_taken_back);
                fired
            });
        }
    }
    assert!(failed > 300, "only {failed} calls failed");
    assert!(taken_back > 3, "only {taken_back} data files got their length back");
}

/// Returns whether the call came to be, and whether the data file was cut after it had become longer.
fn fail_at(scene: &Scene, to: u64, fault: Fault) -> (bool, bool) {
    let (log, faults) = (Log::new(), Faults::new());
    let driver = crash::open_recorded(scene, &log, &|_, storage| faults.attach(storage));
    driver.pwrite(512, &[7; 512], Durability::Fua).unwrap();
    let before = read_all(&*driver).unwrap();
    let mut after = before.clone();
    after.resize(to as usize, 0);
    faults.arm(fault);
    let outcome = driver.resize(to);
    let fired = faults.fired() > 0;
    faults.disarm();
    let name = format!("scene '{}', to {to}, {fault:?}, {outcome:?}", scene.name);
    let told = driver.size();
    assert!(told == if outcome.is_ok() { to } else { SIZE }, "{name}: the guest is told {told}");
    assert!(fired || outcome.is_ok(), "{name}: nothing failed");
    let expected = if outcome.is_ok() { &after } else { &before };
    let found = read_all(&*driver).unwrap();
    assert!(found == *expected, "{name}: {}", first_difference(&found, expected));
    let lens = log.records().into_iter().filter(|record| record.file == DATA);
    let lens =
        lens.filter_map(|record| if let Change::SetLen(len) = record.change { Some(len) } else { None });
    let taken_back = lens.collect::<Vec<_>>().windows(2).any(|lens| lens[1] < lens[0]);
    let goes_on = driver.state() == State::Live;
    if goes_on {
        driver.resize(to).unwrap_or_else(|e| panic!("{name}: not the second time: {e}"));
        assert!(read_all(&*driver).unwrap() == after, "{name}: the second time");
    }
    drop(driver);
    // As a crash would find it.
    let left = Left::of(scene, |file| log.replay(file, log.len()));
    if let (Some(data), None, true) = (left.files().data, scene.data_device_len, goes_on) {
        assert_eq!(data.len() as u64, to, "{name}: the data file is not as long as the disk");
    }
    let report = checker::check(&left.image).unwrap();
    assert!(report.is_sound(), "{name}: the image is corrupt:\n{report}");
    let found = left.read(scene, true).unwrap();
    assert!(found == before || found == after, "{name}: {}", first_difference(&found, expected));
    (fired, taken_back)
}

/// Past the page cache a storage does not fail for good when a sync has failed: the image does, whichever of its files it
/// was, and also where the disk has become smaller by then.
#[test]
fn a_sync_that_fails_is_final_past_the_page_cache() {
    let mut failed = [0, 0];
    for scene in &scenes() {
        for to in [3 << 20, 40 * 512] {
            for call in 0.. {
                let (log, faults) = (Log::new(), Faults::new());
                let between = |_, storage| faults.attach(Wrapped::new(storage, PastTheCache)) as Arc<_>;
                let driver = crash::open_recorded(scene, &log, &between);
                driver.pwrite(512, &[7; 512], Durability::Fua).unwrap();
                faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(call) });
                let outcome = driver.resize(to);
                if faults.fired() == 0 {
                    outcome.unwrap();
                    break;
                }
                let name = format!("scene '{}', to {to}, sync {call}, {outcome:?}", scene.name);
                assert_eq!(driver.state(), State::Failed, "{name}");
                assert!(driver.pwrite(0, &[8; 512], Durability::Later).is_err(), "{name}");
                failed[usize::from(scene.data.is_some())] += 1;
            }
        }
    }
    assert!(failed.iter().all(|failed| *failed > 20), "{failed:?} syncs failed");
}

/// A write of the size that fails may be there all the same: as long as the image is written on, the header has the size
/// that the guest was left with, and what it flushes is found again.
#[test]
fn a_size_that_may_be_in_the_header_takes_nothing_away() {
    let (mut gone_on, mut failed) = (0, 0);
    for scene in scenes().iter().step_by(2) {
        for to in [40 * 512, 3 << 20] {
            for fault in
                (0..).flat_map(|call| [false, true].map(|sticky| Fault { sticky, ..Fault::at(call) }))
            {
                let (log, faults) = (Log::new(), Faults::new());
                let driver = crash::open_recorded(scene, &log, &|_, storage| faults.attach(storage));
                let mut content = read_all(&*driver).unwrap();
                driver.pwrite(0, &content[..512], Durability::Fua).unwrap();
                faults.arm(Fault { class: Some(CallClass::Write), written_len: usize::MAX, ..fault });
                let outcome = driver.resize(to);
                let fired = faults.fired() > 0;
                faults.disarm();
                if !fired {
                    break;
                }
                let name = format!("scene '{}', to {to}, {fault:?}, {outcome:?}", scene.name);
                let mut other = content.clone();
                let other_size = if driver.size() == to { SIZE } else { to };
                content.resize(driver.size() as usize, 0);
                other.resize(other_size as usize, 0);
                let is_failed = driver.state() == State::Failed;
                if !is_failed {
                    let end = content.len() - 512;
                    content[end..].fill(9);
                    driver.pwrite(end as u64, &[9; 512], Durability::Fua).unwrap();
                }
                (gone_on, failed) = (gone_on + u64::from(!is_failed), failed + u64::from(is_failed));
                drop(driver);
                let left = Left::of(scene, |file| log.replay(file, log.len()));
                let found = left.read(scene, !is_failed).unwrap();
                // Of an image that is failed nobody was told anything since.
                let same = found == content || is_failed && found == other;
                assert!(same, "{name}: {}", first_difference(&found, &content));
            }
        }
    }
    assert!(gone_on > 50 && failed > 5, "{gone_on} have gone on, {failed} are failed");
}

/// Sectors before each end of the disk that are zeroed as long as it is the end.
const ENDS: usize = 8;

/// Every writer has its own sectors of the first part of the disk, also in its last cluster, while somebody zeroes and
/// discards what reaches to the end, which moves on.
#[test]
fn writers_and_zeroes_at_the_end_go_on_while_the_disk_grows() {
    let compress = Some(Compress::default());
    for (options, compress) in [
        ("cluster_size=4k", None),
        ("cluster_size=16k,extended_l2=on", None),
        ("cluster_size=512,compat=v2", None),
        ("cluster_size=4k", compress),
        ("cluster_size=1k", compress),
        ("cluster_size=4k,data_file_raw=off", None),
        ("cluster_size=4k,data_file_raw=on", None),
        ("cluster_size=16k,extended_l2=on,data_file_raw=off", None),
    ] {
        for round in 0..2 {
            grow_under_writers(options, WriteOptions { compress, ..WriteOptions::default() }, round);
        }
    }
}

fn grow_under_writers(options: &str, write: WriteOptions, round: u64) {
    let make = if options.contains("data_file") { Maker::with_data_file } else { Maker::new };
    let maker = make(options, 1_234_432);
    let log = Log::new();
    let recorded = |bytes: Vec<u8>| log.attach(MemoryStorage::copy_of(&bytes).unwrap()).unwrap();
    let image = recorded(maker.bytes());
    let data = maker.data_bytes().map(|bytes| recorded(bytes) as Arc<_>);
    let driver = scene::open_parts(image, data, None, Some(write), 1 << 20).unwrap();
    let over = AtomicBool::new(false);
    let (written, zeroed) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut last = vec![0_u8; driver.size() as usize];
    let sectors = last.len() / SECTOR - ENDS;
    let mut ends = vec![last.len()];
    thread::scope(|scope| {
        let (driver, over, written, zeroed) = (&driver, &over, &written, &zeroed);
        let writers: Vec<_> = (0..3_usize)
            .map(|writer| scope.spawn(move || write_sectors(driver, writer, sectors, (over, written), round)))
            .collect();
        let zeroes = scope.spawn(move || zero_ends(driver, over, zeroed));
        let mut random = Random::new(Random::seed("growing") + round);
        for step in 1..60_u8 {
            let size = driver.size();
            let more = SECTOR as u64 * (ENDS as u64 + 1 + random.below(40));
            driver.resize(size + more).unwrap();
            assert_eq!(driver.size(), size + more);
            let mut behind = vec![1; more as usize - ENDS * SECTOR];
            driver.pread(size, &mut behind).unwrap();
            assert!(behind.iter().all(|byte| *byte == 0), "{options}: what is new is not zeroes");
            behind.fill(step);
            driver.pwrite(size, &behind, Durability::Later).unwrap();
            last.resize((size + more) as usize, step);
            ends.push(last.len());
            // Nobody grows alone.
            while written.load(Ordering::Relaxed) < 3 * u64::from(step)
                || zeroed.load(Ordering::Relaxed) < u64::from(step)
            {
                thread::yield_now();
            }
        }
        over.store(true, Ordering::Relaxed);
        zeroes.join().unwrap();
        for writer in writers {
            for (sector, byte) in writer.join().unwrap() {
                last[sector * SECTOR..(sector + 1) * SECTOR].fill(byte);
            }
        }
    });
    let mut found = read_all(&*driver).unwrap();
    for end in ends {
        found[end - ENDS * SECTOR..end].fill(0);
        last[end - ENDS * SECTOR..end].fill(0);
    }
    assert!(found == last, "{options}: {}", first_difference(&found, &last));
    driver.close().unwrap();
    let report = checker::check(&log.replay(IMAGE, log.len())).unwrap();
    assert!(report.is_clean(), "{options}:\n{report}");
}

/// Returns what is in each sector in the end.
fn write_sectors(
    driver: &Qcow2Driver,
    writer: usize,
    sectors: usize,
    (over, count): (&AtomicBool, &AtomicU64),
    round: u64,
) -> Vec<(usize, u8)> {
    let mut random = Random::new(Random::seed("writers") + round * 10 + writer as u64);
    let mut written = std::collections::BTreeMap::new();
    while !over.load(Ordering::Relaxed) {
        // The last ones often: they share a cluster with what comes.
        let below = if random.below(2) == 0 { 16 } else { sectors as u64 };
        let sector = sectors - 1 - random.below(below) as usize;
        if sector % 3 == writer {
            let byte = random.below(255) as u8 + 1;
            driver.pwrite((sector * SECTOR) as u64, &[byte; SECTOR], Durability::Later).unwrap();
            written.insert(sector, byte);
            count.fetch_add(1, Ordering::Relaxed);
            if random.below(50) == 0 {
                driver.flush().unwrap();
            }
        }
    }
    written.into_iter().collect()
}

/// Touches nothing but the last sectors before an end that the disk has, or has just had.
fn zero_ends(driver: &Qcow2Driver, over: &AtomicBool, count: &AtomicU64) {
    let mut number = 0_u64;
    while !over.load(Ordering::Relaxed) {
        let len = ENDS * SECTOR;
        let range = GuestRange::new(driver.size() - len as u64, len as u64).unwrap();
        let provision = [Provision::Unmap, Provision::Keep, Provision::Allocate][number as usize % 3];
        let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
        if number.is_multiple_of(4) {
            driver.discard(range, Durability::Later).unwrap();
        } else if !driver.try_write_zeroes(range, request).unwrap() {
            driver.write_zeroes(range, request).unwrap();
        }
        driver.pwrite(range.offset(), &vec![9; len], Durability::Later).unwrap();
        number += 1;
        count.store(number, Ordering::Relaxed);
    }
}

#[test]
fn what_is_not_resized_offline_is_not_resized_live() {
    let refused = |driver: &dyn BlockDriver, size, kind| {
        let before = driver.size();
        let error = driver.resize(size).unwrap_err();
        assert_eq!((error.kind(), driver.size()), (kind, before), "{error}");
    };
    let on_device = |scene: &Scene| scene.data_device_len.is_some();
    for scene in Scene::with_data_file().into_iter().filter(on_device) {
        let storages = scene.storages(&scene.files());
        let data = storages.data.map(|data| data as Arc<_>);
        refused(&*scene.open_files(storages.image, data).unwrap(), 1 << 20, ErrorKind::InvalidInput);
    }
    let scene = Scene::empty("empty", "refcount_bits=16");
    let driver = scene.open(scene.storage(&scene.image)).unwrap();
    refused(&*driver, 1 << 60, ErrorKind::InvalidInput);
    let read_only = scene::open_over(scene.storage(&scene.image), None, None, 1 << 20).unwrap();
    refused(&*read_only, 1 << 20, ErrorKind::ReadOnly);
    driver.close().unwrap();
    refused(&*driver, 1 << 20, ErrorKind::Failed);
}
