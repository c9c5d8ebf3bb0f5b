//! Dirty bitmaps of a disk that gets another size while it is used: they tell what a model tells, of the disk as it is; and
//! after a crash at any moment, or any failing call, they are in use or tell exactly that.
//!
//! `NBD_IMG_LIVE_SIZE_RUNS` says how many sequences are run, `NBD_IMG_MODEL_SEED` which.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::ops::ControlFlow;

use nbd_img_formats::driver::Status;
use nbd_img_formats::qcow2::Qcow2Driver;
use nbd_img_formats::storage::{Fault, Faults, Log};
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, Provision, State, StatusQuery, ZeroRequest,
};
use support::bitmaps::{SPAN, Told, bits_of, marked, of_size, told, unused};
use support::checker;
use support::crash::{self, Left};
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::offline::{crashed, each_call};
use support::random::Random;
use support::scene::{CLUSTER, Scene};

/// One state in so many is also given to `qemu-img check`.
const QEMU_ONE_IN: u64 = 100;
const SIZE_MAX: u64 = 2 * SPAN + 40 * CLUSTER;
/// Flags of a bitmap: somebody has it, and changes are recorded in it.
const IN_USE: u32 = 1;
const AUTO: u32 = 2;

/// The first size that a disk gets, so that its bitmaps are put in order, and the rest as it comes.
const FIRST: u64 = SPAN + 100 * CLUSTER;

fn scenes() -> Vec<Scene> {
    let spilled = |scene: Scene| Scene { bitmap_len_max: 0, ..scene };
    vec![
        marked("bitmaps", "refcount_bits=64", false),
        spilled(marked("bitmaps that spill", "refcount_bits=16", false)),
        spilled(marked("bitmaps beside a data file", "refcount_bits=1", true)),
        marked("bitmaps beside a raw data file", "data_file_raw=on", true),
        with_bits_behind_the_end(marked("bits behind the end", "refcount_bits=16", false)),
        spilled(with_ones_at_the_end(marked("ones behind the end", "refcount_bits=16", false))),
        unused(Scene::mixed("bitmaps and a snapshot", "refcount_bits=64", None, true)),
    ]
}

/// Where the last entry of the table of `fine` is, and what it says.
fn last_entry(image: &[u8]) -> (usize, u64) {
    let bytes = image.to_vec();
    let parsed = Image::parse(&bytes).unwrap();
    let fine = parsed.bitmaps.iter().find(|bitmap| bitmap.name == "fine").unwrap();
    let at = fine.table_at + (fine.table_entries - 1) * 8;
    (at as usize, bytes.be64(at))
}

/// As some may have left them: the specification wants zeroes there, and nobody looks at them.
fn with_bits_behind_the_end(mut scene: Scene) -> Scene {
    let (_, entry) = last_entry(&scene.image);
    let at = (entry & OFFSET_MASK) as usize;
    assert!(at > 0);
    scene.image[at + 100..at + 512].fill(0xff);
    scene
}

/// A last cluster that is not full of bits, and all ones without having a place.
fn with_ones_at_the_end(mut scene: Scene) -> Scene {
    let maker = Maker::of(&scene.image);
    let (at, _) = last_entry(&scene.image);
    scene.image[at..at + 8].copy_from_slice(&1u64.to_be_bytes());
    // The cluster of bits is nobody's now.
    let report = checker::check(&scene.image).unwrap();
    assert!(report.is_sound() && !report.is_clean(), "{report}");
    drop(maker);
    let maker = Maker::of(&scene.image);
    maker::run("qemu-img", &["check", "-q", "-r", "leaks", maker::text(&maker.path())]);
    scene.image = maker.bytes();
    scene
}

fn initial(scene: &Scene) -> Vec<Told> {
    bits_of(&Image::parse(&scene.image).unwrap())
}

/// What the driver says of a bitmap: all of its bits.
fn status(driver: &Qcow2Driver, told: &Told) -> Vec<bool> {
    let (name, _, granularity_bits, _) = told;
    assert!(driver.offer_bitmap(name).unwrap());
    let (mut bits, mut at) = (vec![false; driver.size().div_ceil(1 << granularity_bits) as usize], 0);
    let all = GuestRange::new(0, driver.size()).unwrap();
    let visit = &mut |len: u64, status| {
        if status == (Status::Bitmap { dirty: true }) {
            let from = (at >> granularity_bits) as usize;
            bits[from..(at + len).div_ceil(1 << granularity_bits) as usize].fill(true);
        }
        at += len;
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap(name), all, visit).unwrap();
    assert_eq!(at, driver.size());
    bits
}

fn assert_told(driver: &Qcow2Driver, model: &[Told], when: &str) {
    for told in model {
        let found = status(driver, told);
        let at = found.iter().zip(&told.3).position(|(a, b)| a != b);
        assert!(found == told.3, "{when}: bitmap {}, {} bits, differs at {at:?}", told.0, found.len());
    }
}

fn mark(model: &mut [Told], at: u64, len: u64) {
    for (_, flags, granularity_bits, bits) in model {
        if *flags == AUTO && len > 0 {
            bits[(at >> *granularity_bits) as usize..=((at + len - 1) >> *granularity_bits) as usize]
                .fill(true);
        }
    }
}

fn aligned(random: &mut Random, below: u64) -> u64 {
    random.below(below / 512 + 1) * 512
}

/// Does something to the disk, and says what.
fn act(driver: &Qcow2Driver, number: u64, model: &mut Vec<Told>, random: &mut Random) -> String {
    let size = driver.size();
    let what = if number == 0 { 0 } else { random.below(9) };
    if what < 5 {
        let to = match what {
            _ if number == 0 => FIRST,
            0 => aligned(random, SIZE_MAX),
            1 => size.saturating_add(aligned(random, 64 << 10)),
            2 => size.saturating_sub(aligned(random, 64 << 10)),
            3 => SPAN,
            _ => SPAN + aligned(random, 64 << 10),
        };
        let to = to.clamp(512, SIZE_MAX);
        driver.resize(to).unwrap();
        *model = of_size(model, to);
        return format!("resize {size} to {to}");
    }
    let at = aligned(random, size - 512);
    // Often up to the very end.
    let len = if random.below(3) == 0 { size - at } else { 512 + aligned(random, 40 << 10) };
    let len = len.min(size - at).min(200 << 10);
    let range = GuestRange::new(at, len).unwrap();
    mark(model, at, len);
    let what = match what {
        5 => {
            let request =
                ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
            driver.write_zeroes(range, request).unwrap();
            "zero"
        }
        6 => {
            driver.discard(range, Durability::Later).unwrap();
            "discard"
        }
        _ => {
            driver.pwrite(at, &vec![number as u8 | 1; len as usize], Durability::Later).unwrap();
            "write"
        }
    };
    if random.below(2) == 0 {
        driver.flush().unwrap();
    }
    format!("{what} {at} {len}")
}

/// Whatever is not in use tells what it told at first, or at the end, of a disk of that size.
fn check_bitmaps(image: &Image<'_>, allowed: &[&[Told]]) -> Result<bool, String> {
    let now = bits_of(image);
    let usable: Vec<_> = now.iter().filter(|(_, flags, ..)| flags & IN_USE == 0).collect();
    for found in &usable {
        let same = |model: &&[Told]| model.contains(found);
        if !allowed.iter().any(same) {
            return Err(format!("the bitmap {} is usable, and tells something else", found.0));
        }
        let bits = image.size.div_ceil(1 << found.2);
        let bitmap = image.bitmaps.iter().find(|bitmap| bitmap.name == found.0).unwrap();
        if bitmap.table_entries != bits.div_ceil(8).div_ceil(image.cluster_len()) {
            return Err(format!("the bitmap {} has a table of another disk", found.0));
        }
    }
    let named = |told: &[Told]| told.iter().map(|told| told.0.clone()).collect::<Vec<_>>();
    if named(&now) != named(allowed[0]) {
        return Err(format!("the bitmaps are {:?}", named(&now)));
    }
    Ok(usable.len() == now.len())
}

fn check_state(
    scene: &Scene,
    (log, cut): (&Log, usize),
    allowed: &[&[Told]],
    random: &mut Random,
) -> Result<bool, String> {
    let left = crashed(scene, log, cut, false, random);
    let report = checker::check(&left.image)?;
    if !report.is_sound() {
        return Err(format!("the image is corrupt:\n{report}"));
    }
    let usable = check_bitmaps(&Image::parse(&left.image)?, allowed)?;
    if random.below(QEMU_ONE_IN) == 0 {
        let files = left.files();
        let (code, said) = Maker::of_files(&files.image, files.data.as_deref()).check();
        if code != report.exit_code() {
            return Err(format!("qemu-img check exits with {code}: {said}\nours:\n{report}"));
        }
    }
    Ok(usable)
}

#[test]
fn a_crash_leaves_bitmaps_that_are_in_use_or_right() {
    let runs = std::env::var("NBD_IMG_LIVE_SIZE_RUNS").map_or(14, |text| text.parse().unwrap());
    let seed = Random::seed("live sizes of bitmaps");
    let scenes = scenes();
    let (mut states, mut usable) = (0_u64, 0_u64);
    for number in 0..runs {
        let mut random = Random::new(seed.wrapping_add(number));
        let scene = &scenes[number as usize % scenes.len()];
        let log = Log::new();
        let driver = crash::open_recorded(scene, &log, &|_, storage| storage);
        let first = initial(scene);
        let mut model = first.clone();
        let mut done = Vec::new();
        for step in 0..3 + random.below(8) {
            done.push(act(&driver, step, &mut model, &mut random));
            assert_told(&driver, &model, &format!("run {number}, scene '{}', {done:?}", scene.name));
        }
        driver.close().unwrap();
        let said = |what: String| format!("run {number}, scene '{}', {done:?}: {what}", scene.name);
        let left = Left::of(scene, |file| log.replay(file, log.len()));
        let report = checker::check(&left.image).unwrap();
        assert!(report.is_clean(), "{}", said(format!("{report}")));
        let last = told(&Image::parse(&left.image).unwrap()).unwrap_or_else(|what| panic!("{}", said(what)));
        assert!(last == model, "{}", said("the closed image tells something else".to_owned()));
        for cut in 0..=log.len() {
            let seen = check_state(scene, (&log, cut), &[&first, &model], &mut random);
            usable += u64::from(seen.unwrap_or_else(|what| panic!("cut {cut}: {}", said(what))));
            states += 1;
        }
    }
    eprintln!("{states} states of {runs} runs, {usable} with bitmaps that may be used");
    assert!(usable > runs && usable < states / 2);
}

/// What was marked behind an end is clean when the disk is there again, and is marked again by who writes there.
#[test]
fn what_was_cut_off_is_marked_again() {
    for scene in &scenes() {
        let log = Log::new();
        let driver = crash::open_recorded(scene, &log, &|_, storage| storage);
        let mut model = initial(scene);
        let size = driver.size();
        for less in [1, 7, 33, 70] {
            for round in 0..2 {
                for sector in [1, 2, 6, 7, 8, 30, 33, 34, 60] {
                    let at = size - sector * 512;
                    driver.pwrite(at, &[7; 512], Durability::Later).unwrap();
                    mark(&mut model, at, 512);
                }
                assert_told(&driver, &model, &format!("{}, {less}, round {round}", scene.name));
                for to in [size - less * 512, size] {
                    driver.resize(to).unwrap();
                    model = of_size(&model, to);
                    assert_told(&driver, &model, &format!("{}, {less}, to {to}", scene.name));
                }
            }
        }
        driver.close().unwrap();
        let left = Left::of(scene, |file| log.replay(file, log.len()));
        assert!(told(&Image::parse(&left.image).unwrap()).unwrap() == model, "{}: closed", scene.name);
    }
}

/// Zeroing what would come to light behind the old end, in a cluster and a granule that it is in the middle of, is no
/// change of what the guest has.
#[test]
fn a_disk_that_only_grows_is_not_dirty() {
    let maker = Maker::new("cluster_size=64k", 300 * 512);
    maker.write(0, &[5; 300 * 512], false);
    maker::run("qemu-img", &["bitmap", "--add", "-g", "64k", maker::text(&maker.path()), "coarse"]);
    let image = maker.bytes();
    let scene = Scene { image, ..Scene::empty("clean", "refcount_bits=16") };
    let log = Log::new();
    let driver = crash::open_recorded(&scene, &log, &|_, storage| storage);
    let mut model = initial(&scene);
    for to in [301 * 512, 1 << 20, 555 * 512, 2 << 20] {
        driver.resize(to).unwrap();
        model = of_size(&model, to);
        assert_told(&driver, &model, &format!("to {to}"));
    }
    driver.close().unwrap();
    let now = told(&Image::parse(&log.replay(crash::IMAGE, log.len())).unwrap()).unwrap();
    assert!(now == model && !now[0].3.contains(&true));
}

/// Any call of the storage fails, once or for good: the bitmaps tell of the disk as it is, and the close stores them.
#[test]
fn a_call_that_fails_leaves_bitmaps_that_are_in_use_or_right() {
    let (mut failed, mut stored) = (0, 0);
    for scene in &scenes() {
        let size = scene.content.len() as u64;
        for to in [size + 13 * CLUSTER, 2 * SPAN + CLUSTER, size - 37 * CLUSTER] {
            failed += each_call(|fault| {
                let (fired, is_stored) = fail_at(scene, to, fault);
                stored += u64::from(fired && is_stored);
                fired
            });
        }
    }
    eprintln!("{failed} calls failed, {stored} bitmaps were stored all the same");
    assert!(failed > 300 && stored > failed / 2);
}

/// Returns whether the call came to be, and whether the bitmaps may be used after the close.
fn fail_at(scene: &Scene, to: u64, fault: Fault) -> (bool, bool) {
    let (log, faults) = (Log::new(), Faults::new());
    let driver = crash::open_recorded(scene, &log, &|_, storage| faults.attach(storage));
    let first = initial(scene);
    let mut model = first.clone();
    let write = |driver: &Qcow2Driver, model: &mut [Told], at: u64| {
        driver.pwrite(at, &[7; 512], Durability::Later).map(|()| mark(model, at, 512))
    };
    let size = driver.size();
    write(&driver, &mut model, size - 512).unwrap();
    write(&driver, &mut model, size.min(to) - 512).unwrap();
    driver.flush().unwrap();
    faults.arm(fault);
    let outcome = driver.resize(to);
    let fired = faults.fired() > 0;
    faults.disarm();
    let name = format!("scene '{}', to {to}, {fault:?}, {outcome:?}", scene.name);
    assert!(fired || outcome.is_ok(), "{name}: nothing failed");
    let told = driver.size();
    assert!(told == if outcome.is_ok() { to } else { size }, "{name}: the guest is told {told}");
    model = of_size(&model, told);
    assert_told(&driver, &model, &name);
    let goes_on = driver.state() == State::Live;
    if goes_on {
        write(&driver, &mut model, told - 512).unwrap();
        driver.close().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    drop(driver);
    let left = Left::of(scene, |file| log.replay(file, log.len()));
    let report = checker::check(&left.image).unwrap();
    assert!(report.is_sound() && (!goes_on || report.is_clean()), "{name}: {report}");
    let image = Image::parse(&left.image).unwrap();
    let stored = check_bitmaps(&image, &[&model]).unwrap_or_else(|what| panic!("{name}: {what}"));
    assert!(stored == goes_on, "{name}: stored: {stored}");
    assert!(!goes_on || image.size == told, "{name}: the image has {} bytes", image.size);
    (fired, stored)
}

/// As offline: one that is in use, or cannot be that of such a disk, is named, and nothing is written.
#[test]
fn a_bitmap_that_cannot_be_kept_is_named() {
    let refused = |scene: &Scene, to: u64, kind: ErrorKind, hint: &str| {
        let log = Log::new();
        let driver = crash::open_recorded(scene, &log, &|_, storage| storage);
        let before = driver.size();
        let error = driver.resize(to).unwrap_err();
        let text = error.to_string();
        assert!(
            error.kind() == kind && text.contains(hint) && text.contains("nbd-img bitmap remove"),
            "{text}"
        );
        assert_eq!((driver.size(), log.len()), (before, 0), "{text}: it was written");
        driver.resize(before).unwrap();
    };
    let scene = Scene::mixed("in use", "refcount_bits=64", None, false).with_bitmaps();
    refused(&scene, 1 << 20, ErrorKind::Corrupt, "'stale'");
    refused(&scene, 512, ErrorKind::Corrupt, "'stale'");
    let mut scene = marked("bitmaps", "refcount_bits=64", false);
    refused(&scene, 0, ErrorKind::Unsupported, "'fine'");
    for number in 0..16 {
        let maker = Maker::of(&scene.image);
        let name = format!("more{number}");
        maker::run("qemu-img", &["bitmap", "--add", "-g", "512", maker::text(&maker.path()), &name]);
        scene.image = maker.bytes();
    }
    refused(&scene, 64 << 30, ErrorKind::Unsupported, "could come to take");
}
