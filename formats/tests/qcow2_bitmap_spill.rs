//! Dirty bits that do not stay in memory: how many do, what a failure to store them costs, and that opening reads none.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

use nbd_img_formats::driver::Status;
use nbd_img_formats::qcow2::{BitmapChange, Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::{CallClass, Fault, Faults, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, GuestRange, StatusQuery, Storage};
use qcow2_support::{Folder, qemu};
use qcow2_write_support::{assert_clean, bytes_of, open_with};
use support::checker;
use support::image::Image;
use support::random::Random;
use support::wrapped::{Dawdling, NeverClosed, Wrapped};

const TIB: u64 = 1 << 40;
/// Bytes of the disk for a bit.
const GRANULE: u64 = 64 << 10;
/// What a page of bits takes in memory, with what it is kept by.
const PAGE_HELD_LEN: u64 = 4096 + 64;

/// An image with enabled bitmaps of these names, in which nothing is marked.
fn image(options: &str, size: u64, names: &[&str]) -> Arc<MemoryStorage> {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", options, size);
    for name in names {
        qemu("qemu-img", ["bitmap", "--add", "-g", "64k", path.to_str().unwrap(), name]);
    }
    MemoryStorage::copy_of(&std::fs::read(&path).unwrap()).unwrap()
}

/// Opens it with this budget for bits, to be looked at after the close.
fn open(storage: Arc<dyn Storage>, bitmap_len_max: u64) -> Arc<Qcow2Driver> {
    let options = WriteOptions { bitmap_len_max, ..WriteOptions::default() };
    open_with(Wrapped::new(storage, NeverClosed), None, 1 << 20, options).unwrap()
}

/// Marks granules and nothing else: there is nothing to discard in an empty image.
fn mark(driver: &dyn BlockDriver, granule: u64) {
    let range = GuestRange::new(granule * GRANULE + 512, 512).unwrap();
    driver.discard(range, Durability::Later).unwrap();
}

/// The granules that are told to be dirty.
fn told(driver: &dyn BlockDriver, name: &str) -> BTreeSet<u64> {
    let (mut dirty, mut at) = (BTreeSet::new(), 0);
    let visit = &mut |len: u64, status| {
        if status == (Status::Bitmap { dirty: true }) {
            dirty.extend(at / GRANULE..(at + len).div_ceil(GRANULE));
        }
        at += len;
        ControlFlow::Continue(())
    };
    assert!(driver.offer_bitmap(name).unwrap());
    let all = GuestRange::new(0, driver.size()).unwrap();
    driver.status(StatusQuery::Bitmap(name), all, visit).unwrap();
    assert_eq!(at, driver.size());
    dirty
}

fn assert_same(told: &BTreeSet<u64>, marked: &BTreeSet<u64>, when: &str) {
    let lost: Vec<_> = marked.difference(told).take(3).collect();
    let invented: Vec<_> = told.difference(marked).take(3).collect();
    assert!(lost.is_empty() && invented.is_empty(), "{when}: lost {lost:?}, invented {invented:?}");
}

/// The most that is held at any time while granules all over the disk are marked.
fn mark_all_over(driver: &Qcow2Driver, random: &mut Random, count: u64) -> (BTreeSet<u64>, u64) {
    let (mut marked, mut held) = (BTreeSet::new(), 0);
    for _ in 0..count {
        let granule = random.below(driver.size() / GRANULE);
        mark(driver, granule);
        marked.insert(granule);
        held = held.max(driver.held_bits_len());
    }
    (marked, held)
}

/// 64 TiB at 64 KiB have 128 MiB of bits. Of those a budget is in memory, whatever is written where, and opening the
/// image again reads none of them.
#[test]
fn the_bits_of_64_tib_are_held_within_a_budget() {
    let storage = image("", 64 * TIB, &["on"]);
    let fresh = reads_at_open(&storage);
    let budget = 64 * PAGE_HELD_LEN;
    let driver = open(storage.clone(), budget);
    let mut random = Random::new(Random::seed("scattered marks"));
    let (mut marked, held) = mark_all_over(&driver, &mut random, 6000);
    // A write that comes when it is full stores bits before it marks its own.
    assert!(held > budget / 2 && held <= budget + PAGE_HELD_LEN, "{held} of {budget}");
    for at in [0, 17 * TIB, 64 * TIB - GRANULE] {
        driver.pwrite(at, &[7; 1000], Durability::Later).unwrap();
        marked.insert(at / GRANULE);
    }
    assert_same(&told(&*driver, "on"), &marked, "while it is written");
    driver.close().unwrap();
    assert_eq!(driver.held_bits_len(), 0, "all is stored");
    let report = checker::check_storage(&*(storage.clone() as Arc<dyn Storage>)).unwrap();
    assert!(report.is_clean(), "{report}");

    // The refcounts of more clusters are looked at; bits lie in more than 2000.
    let full = reads_at_open(&storage);
    assert!(full <= fresh + 3, "{full} reads, {fresh} of the empty image");
    let driver = open(storage, budget);
    assert_eq!(driver.held_bits_len(), 0, "nothing is new");
    assert_same(&told(&*driver, "on"), &marked, "after the close");
    // What the file has already is no reason to write it again.
    for granule in &marked {
        mark(&*driver, *granule);
    }
    assert!(driver.held_bits_len() <= budget + PAGE_HELD_LEN);
    assert_same(&told(&*driver, "on"), &marked, "marked again");
    driver.close().unwrap();
}

/// How often opening reads the file.
fn reads_at_open(storage: &Arc<MemoryStorage>) -> u64 {
    let faults = Faults::new();
    drop(open(faults.attach(storage.clone()), 0));
    faults.count(CallClass::Read)
}

/// All of a disk that is discarded takes no words in memory, and no clusters in the file.
#[test]
fn all_of_a_disk_is_marked_without_clusters() {
    let storage = image("", 16 * TIB, &["on"]);
    let len = bytes_of(&*storage).len();
    let driver = open(storage.clone(), 1 << 20);
    let all = GuestRange::new(0, driver.size()).unwrap();
    driver.discard(all, Durability::Later).unwrap();
    assert!(driver.held_bits_len() < 1 << 20, "{} bytes", driver.held_bits_len());
    driver.close().unwrap();
    let parsed = bytes_of(&*storage);
    assert!(parsed.len() < len + (1 << 20), "{} bytes", parsed.len());
    let driver = open(storage, 1 << 20);
    let mut runs = Vec::new();
    let visit = &mut |len, status| {
        runs.push((len, status));
        ControlFlow::Continue(())
    };
    assert!(driver.offer_bitmap("on").unwrap());
    driver.status(StatusQuery::Bitmap("on"), all, visit).unwrap();
    assert_eq!(runs, [(all.len(), Status::Bitmap { dirty: true })]);
    driver.close().unwrap();
}

/// While storing bits fails none is lost and no write fails for it; it is tried again now and then; and when it works
/// again memory goes back to the budget.
#[test]
fn a_spill_that_fails_loses_nothing() {
    for (class, errno) in [
        (CallClass::Write, libc::EIO),
        (CallClass::Write, libc::ENOSPC),
        (CallClass::Read, libc::EIO),
        (CallClass::SetLen, libc::ENOSPC),
    ] {
        let storage = image("", 16 * TIB, &["on", "also"]);
        let budget = 64 * PAGE_HELD_LEN;
        let faults = Faults::new();
        let driver = open(faults.attach(storage.clone()), budget);
        let mut random = Random::new(Random::seed("failing spills"));
        // Some clusters are there before, and the first change is over.
        let (mut marked, _) = mark_all_over(&driver, &mut random, 100);
        faults.arm(Fault { class: Some(class), errno, sticky: true, ..Fault::at(0) });
        let (more, held) = mark_all_over(&driver, &mut random, 1000);
        marked.extend(more);
        let fired = faults.fired();
        faults.disarm();
        // After three in a row it is not tried again until an eighth of the budget more is used.
        assert!((3..2000).contains(&fired), "{class:?}: {fired} calls have failed");
        if class == CallClass::Write {
            assert!(held > 8 * budget, "{class:?}: {held}");
        }
        for name in ["on", "also"] {
            assert_same(&told(&*driver, name), &marked, "after failures");
        }
        marked.extend(mark_all_over(&driver, &mut random, 400).0);
        assert!(
            driver.held_bits_len() <= budget + 2 * PAGE_HELD_LEN,
            "{class:?}: {}",
            driver.held_bits_len()
        );
        for name in ["on", "also"] {
            assert_same(&told(&*driver, name), &marked, "when it works again");
        }
        driver.close().unwrap();
        let report = checker::check_storage(&*(storage.clone() as Arc<dyn Storage>)).unwrap();
        assert!(report.is_clean(), "{class:?}: {report}");
        let driver = open(storage, budget);
        for name in ["on", "also"] {
            assert_same(&told(&*driver, name), &marked, "after the close");
        }
        driver.close().unwrap();
    }
}

/// However many pages one request marks, and however little each of them takes, whoever comes next stores all that is
/// too much.
#[test]
fn many_small_pages_are_stored_by_the_next_change() {
    let storage = image("cluster_size=4k", TIB, &["on", "also"]);
    let driver = open(storage.clone(), 0);
    driver.discard(GuestRange::new(0, TIB).unwrap(), Durability::Later).unwrap();
    // Two bitmaps of 512 clusters, and nothing but what they are kept by.
    assert_eq!(driver.held_bits_len(), 2 * 512 * 64);
    mark(&*driver, 7);
    assert_eq!(driver.held_bits_len(), 0, "and that bit was set already");
    driver.close().unwrap();
}

/// What a close has left when one of its calls failed.
struct Left {
    error: String,
    /// Those of the bitmap: 3 is "in use", 2 is not.
    flags: u32,
    is_clean: bool,
}

/// A close after marks all over, some of them in the file already, whose write number `call` fails; `None`: it has fewer.
/// Everything else is durable before, or a write to the disk is not.
fn close_with_failing_write(call: u64, durable: bool) -> Option<Left> {
    let storage = image("", 16 * TIB, &["on"]);
    let faults = Faults::new();
    let driver = open(faults.attach(storage.clone()), 4 * PAGE_HELD_LEN);
    let (mut marked, _) = mark_all_over(&driver, &mut Random::new(1), 8);
    driver.flush().unwrap();
    if !durable {
        driver.pwrite(TIB, &[7; 1000], Durability::Later).unwrap();
        marked.insert(TIB / GRANULE);
    }
    faults.arm(Fault { class: Some(CallClass::Write), ..Fault::at(call) });
    let closed = driver.close();
    let report = checker::check_storage(&*(storage.clone() as Arc<dyn Storage>)).unwrap();
    assert!(report.is_sound(), "write {call}: {report}");
    let flags = Image::parse(&bytes_of(&*storage)).unwrap().bitmaps[0].flags;
    if flags == 2 {
        assert_same(&told(&*open(storage, 0), "on"), &marked, "stored");
    }
    if faults.fired() == 0 {
        closed.unwrap();
        assert!(flags == 2 && report.is_clean(), "{report}");
        return None;
    }
    let error = closed.expect_err("somebody has to see it").to_string();
    Some(Left { error, flags, is_clean: report.is_clean() })
}

/// A close that cannot store the bits says so, leaves the mark, and gives back what it had taken for them, unless
/// nobody knows whether the header leads there.
#[test]
fn a_close_that_fails_leaves_the_mark_and_no_leaks() {
    let left: Vec<_> = (0..).map_while(|call| close_with_failing_write(call, true)).collect();
    let (in_use, stored): (Vec<_>, Vec<_>) = left.iter().partition(|left| left.flags == 3);
    let Some((switch, before)) = in_use.split_last() else { panic!("no call has failed") };
    // At least the bits of one page, the table, the directory and a refcount block.
    assert!(before.len() >= 4 && in_use.iter().zip(&left).all(|(one, other)| std::ptr::eq(*one, other)));
    for left in before {
        assert!(left.error.contains("all data is there") && left.is_clean, "{}", left.error);
    }
    assert!(switch.error.contains("all data is there"), "{}", switch.error);
    // What the old directory led to is let go after it.
    assert!(!stored.is_empty() && stored.iter().all(|left| !left.error.contains("dirty bitmaps")));
}

/// The same for a close whose last flush fails: what was allocated for bits before is given back, too.
#[test]
fn a_close_whose_flush_fails_leaves_the_mark_and_no_leaks() {
    let left = close_with_failing_write(0, false).unwrap();
    assert!(left.flags == 3 && left.is_clean, "{}: {}", left.flags, left.error);
    assert!(left.error.contains("cannot write the image's metadata"), "{}", left.error);
}

/// Threads that mark all over the disk and ask for what they have marked, while what others marked goes into a slow file.
#[test]
fn threads_find_what_they_have_marked() {
    let size = TIB;
    let storage = image("cluster_size=4k", size, &["on"]);
    let slow = Wrapped::new(storage.clone() as Arc<dyn Storage>, Dawdling(AtomicU64::new(0)));
    let driver = open(slow, 3 * PAGE_HELD_LEN);
    assert!(driver.offer_bitmap("on").unwrap());
    let seed = Random::seed("threads that mark");
    let held = AtomicU64::new(0);
    let marked = std::thread::scope(|scope| {
        let marking = |thread: u64| {
            let (driver, held) = (&driver, &held);
            scope.spawn(move || {
                let mut random = Random::new(seed.wrapping_add(thread));
                let mut marked = BTreeSet::new();
                for _ in 0..400 {
                    // Now near to each other, now anywhere.
                    let near = random.below(size / GRANULE / 64);
                    let granule = random.pick(&[near, near * 64]);
                    mark(&**driver, granule);
                    marked.insert(granule);
                    held.fetch_max(driver.held_bits_len(), Ordering::Relaxed);
                    let any = *marked.range(random.below(granule + 1)..).next().unwrap();
                    assert!(is_dirty(&**driver, any), "{any} was marked");
                }
                marked
            })
        };
        let threads = [0, 1, 2, 3].map(marking);
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<BTreeSet<_>>()
    });
    // One page for each of the threads that were past the look when it was full.
    assert!(held.into_inner() <= 7 * PAGE_HELD_LEN);
    assert_same(&told(&*driver, "on"), &marked, "while it is written");
    driver.close().unwrap();
    assert_same(&told(&*open(storage, 0), "on"), &marked, "after the close");
}

fn is_dirty(driver: &dyn BlockDriver, granule: u64) -> bool {
    let range = GuestRange::new(granule * GRANULE, GRANULE).unwrap();
    let mut dirty = false;
    let visit = &mut |_: u64, status| {
        dirty = status == Status::Bitmap { dirty: true };
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap("on"), range, visit).unwrap();
    dirty
}

/// A merge holds no more than the budget either: it writes as it goes. It leaves what it merges into as it was until it
/// is done, and as it was for good where it fails.
#[test]
fn a_merge_is_stored_as_it_goes() {
    let storage = image("", TIB, &["on", "also"]);
    let mut random = Random::new(Random::seed("merges"));
    let mark_some = |names: [&str; 2], random: &mut Random| {
        let change = |name, change| {
            let driver = open(storage.clone(), 0);
            driver.change_bitmap(name, change).unwrap();
            driver.close().unwrap();
        };
        change(names[0], BitmapChange::Disable);
        let driver = open(storage.clone(), 0);
        let marked = mark_all_over(&driver, random, 3000).0;
        driver.close().unwrap();
        change(names[0], BitmapChange::Enable);
        marked
    };
    let also = mark_some(["on", "also"], &mut random);
    let on = mark_some(["also", "on"], &mut random);
    let merge = |storage: Arc<MemoryStorage>, budget: u64, fault: Option<Fault>| {
        let faults = Faults::new();
        let driver = open(faults.attach(storage), budget);
        let before = faults.count(CallClass::Write);
        faults.arm(fault.unwrap_or_else(|| Fault::at(u64::MAX)));
        let merged = driver.change_bitmap("on", BitmapChange::Merge("also"));
        let writes = faults.count(CallClass::Write) - before;
        faults.disarm();
        driver.close().unwrap();
        merged.map(|()| writes)
    };
    let copy = || MemoryStorage::copy_of(&bytes_of(&*storage)).unwrap();
    // 32 clusters of bits, all of which move, and some metadata; else every page of them, as there are 16 in a cluster.
    let at_once = merge(copy(), 64 << 20, None).unwrap();
    let as_it_goes = merge(copy(), 0, None).unwrap();
    assert!((32..64).contains(&at_once) && as_it_goes > 400, "{at_once} and {as_it_goes} writes");
    for call in [0, 20, as_it_goes / 2, as_it_goes - 2] {
        let fault = Fault { class: Some(CallClass::Write), ..Fault::at(call) };
        merge(storage.clone(), 0, Some(fault)).unwrap_err();
        let report = checker::check_storage(&*(storage.clone() as Arc<dyn Storage>)).unwrap();
        assert!(report.is_clean(), "write {call}: {report}");
        let driver = open(storage.clone(), 0);
        assert_same(&told(&*driver, "on"), &on, "after a failure");
        driver.close().unwrap();
    }
    merge(storage.clone(), 0, None).unwrap();
    let driver = open(storage.clone(), 0);
    assert_same(&told(&*driver, "on"), &(&on | &also), "merged into");
    assert_same(&told(&*driver, "also"), &also, "merged");
    driver.close().unwrap();
    let folder = Folder::new();
    std::fs::write(folder.file("merged.qcow2"), bytes_of(&*storage)).unwrap();
    assert_clean(&folder.file("merged.qcow2"));
}
