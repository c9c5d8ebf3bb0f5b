//! Changing an image's bitmaps: after a crash at any moment, and after any failing call, the image is sound and has
//! its old bitmaps, or the new ones, or (where the header's way to them lies in two sectors) none; and its data.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use nbd_img_formats::qcow2::{BitmapChange, Qcow2Driver};
use nbd_img_formats::storage::{CallClass, Fate, Fault, Faults, FileId, Log, SparseBytes, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Result};
use support::checker;
use support::crash::content_of;
use support::image::{Bytes, Image};
use support::maker::{self, Maker};
use support::random::Random;
use support::scene::{CLUSTER, Scene};
use support::wrapped::{NeverClosed, Wrapped};

/// States looked at after each cut.
const STATES_PER_CUT: u64 = 12;

/// What a bitmap is, to compare.
type Told = (String, u32, u32, Vec<bool>);

fn told(bytes: &dyn Bytes) -> Vec<Told> {
    let image = Image::parse(bytes).unwrap();
    let told = |bitmap: &support::image::Bitmap| {
        (bitmap.name.clone(), bitmap.flags, bitmap.granularity_bits, image.dirty_granules(bitmap))
    };
    image.bitmaps.iter().map(told).collect()
}

/// An image, and a change.
struct Case {
    name: &'static str,
    scene: Scene,
    bitmap: &'static str,
    change: BitmapChange<'static>,
    /// None may be left of the bitmaps by a crash.
    none_allowed: bool,
}

const ADD: BitmapChange<'static> = BitmapChange::Add { granularity: Some(512), enabled: true };

fn cases() -> Vec<Case> {
    let mixed = || Scene::mixed("bitmaps", "refcount_bits=64", None, true).with_bitmaps();
    let case = |name, scene, bitmap, change| Case { name, scene, bitmap, change, none_allowed: false };
    let mut cases = vec![
        case("the first", Scene::mixed("plain", "refcount_bits=16", None, true), "new", ADD),
        case("another", mixed(), "new", ADD),
        case("on a device", mixed().on_device(), "new", ADD),
        case("remove", mixed(), "on", BitmapChange::Remove),
        case("remove what is in use", mixed(), "stale", BitmapChange::Remove),
        case("clear", mixed(), "on", BitmapChange::Clear),
        case("enable", mixed(), "off", BitmapChange::Enable),
        case("disable", mixed(), "on", BitmapChange::Disable),
        case("merge", mixed(), "on", BitmapChange::Merge("off")),
        case("the last", alone(), "only", BitmapChange::Remove),
        case("in the way of a name", overlay(), "new", ADD),
    ];
    cases.push(Case { none_allowed: true, ..case("in two sectors", in_two_sectors(), "new", ADD) });
    cases
}

/// An image with one bitmap.
fn alone() -> Scene {
    let scene = Scene::mixed("one bitmap", "refcount_bits=16", None, false);
    with_image(scene, |maker| {
        maker::run("qemu-img", &["bitmap", "--add", maker::text(&maker.path()), "only"]);
    })
}

fn overlay() -> Scene {
    Scene::mixed("overlay", "refcount_bits=16", Some(150 * CLUSTER), false)
}

/// With clusters of 4 KiB, and so many bytes of another extension that that of the bitmaps lies in two sectors.
fn in_two_sectors() -> Scene {
    let maker = Maker::new("cluster_size=4k", 1 << 20);
    maker::run("qemu-img", &["bitmap", "--add", "-g", "512", maker::text(&maker.path()), "only"]);
    let mut bytes = maker.bytes();
    let at = bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap();
    let extension = bytes[at..at + 40].to_vec();
    // Its data is to begin 8 bytes before the end of a sector.
    let wanted = (at + 16).next_multiple_of(512) - 16;
    let filler = wanted - at;
    assert!(filler >= 8 && filler.is_multiple_of(8));
    bytes[at..at + 4].copy_from_slice(&0x1122_3344u32.to_be_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&u32::try_from(filler - 8).unwrap().to_be_bytes());
    bytes[at + 8..wanted].fill(0x55);
    bytes[wanted..wanted + 40].copy_from_slice(&extension);
    let mut scene = Scene::empty("two sectors", "refcount_bits=16");
    scene.content = vec![0; 1 << 20];
    scene.image = bytes;
    scene
}

fn with_image(mut scene: Scene, change: impl FnOnce(&Maker)) -> Scene {
    let maker = Maker::of(&scene.image);
    change(&maker);
    scene.image = maker.bytes();
    scene
}

fn apply(driver: &Qcow2Driver, case: &Case) -> Result<()> {
    let changed = driver.change_bitmap(case.bitmap, case.change);
    changed.and(driver.close())
}

/// Fails unless the image is sound, has all its data, and bitmaps as they may be.
fn check(case: &Case, bytes: &dyn Bytes, allowed: &[Vec<Told>]) -> std::result::Result<(), String> {
    let report = checker::check(bytes)?;
    if !report.is_sound() {
        return Err(format!("corrupt:\n{report}"));
    }
    if case.scene.read(bytes)? != case.scene.content {
        return Err("the data has changed".to_owned());
    }
    let now = told(bytes);
    let none = case.none_allowed && now.is_empty();
    if none || allowed.contains(&now) { Ok(()) } else { Err(format!("the bitmaps are {now:?}")) }
}

#[test]
fn a_crash_leaves_the_old_or_the_new() {
    let mut random = Random::new(Random::seed("changing bitmaps"));
    for case in cases() {
        let log = Log::new();
        let recording = log.attach(case.scene.storage(&case.scene.image)).unwrap();
        let driver = case.scene.open(recording).unwrap();
        apply(&driver, &case).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let end = log.replay(FileId(0), log.len());
        let report = checker::check(&end).unwrap();
        assert!(report.is_clean(), "{}: {report}", case.name);
        let (code, said) = maker::qemu_check(&content_of(&end));
        assert_eq!(code, 0, "{}: {said}", case.name);
        let allowed = [told(&case.scene.image), told(&end)];
        assert!(allowed[0] != allowed[1], "{}: nothing has changed", case.name);
        for cut in 0..=log.len() {
            for number in 0..STATES_PER_CUT {
                let bytes = crashed(&log, cut, number, &mut random);
                let seen = check(&case, &bytes, &allowed);
                seen.unwrap_or_else(|what| panic!("{}, cut {cut}: {what}", case.name));
                if number == 0 {
                    let (code, said) = maker::qemu_check(&content_of(&bytes));
                    assert!(code == 0 || code == 3, "{}, cut {cut}: {said}", case.name);
                }
            }
        }
    }
}

fn crashed(log: &Log, cut: usize, number: u64, random: &mut Random) -> SparseBytes {
    log.after_crash(FileId(0), cut, |_, _| match number {
        0 => Fate::Kept,
        1 => Fate::Lost,
        _ => match random.below(4) {
            0 => Fate::Kept,
            1 => Fate::Lost,
            2 => Fate::Prefix(random.below(4)),
            _ => Fate::Scattered(random.next()),
        },
    })
}

#[test]
fn a_failing_call_leaves_the_old_or_the_new() {
    let classes = [CallClass::Write, CallClass::Sync, CallClass::SetLen, CallClass::Zero, CallClass::Read];
    for case in cases() {
        let run = |fault: Option<Fault>| {
            let memory = case.scene.storage(&case.scene.image);
            let faults = Faults::new();
            let driver = case.scene.open(faults.attach(Wrapped::new(memory.clone(), NeverClosed))).unwrap();
            let before = classes.map(|class| faults.count(class));
            if let Some(fault) = fault {
                faults.arm(fault);
            }
            let outcome = apply(&driver, &case);
            let counts = classes.map(|class| faults.count(class));
            let memory: Arc<dyn Storage> = memory;
            let bytes = content_of(&SparseBytes::load(&*memory).unwrap());
            (outcome, bytes, std::array::from_fn::<_, 5, _>(|class| counts[class] - before[class]))
        };
        let (outcome, end, counts) = run(None);
        outcome.unwrap();
        let allowed = [told(&case.scene.image), told(&end)];
        for (class, count) in classes.into_iter().zip(counts) {
            for call in 0..count {
                for (sticky, errno) in [(false, libc::EIO), (true, libc::EIO), (true, libc::ENOSPC)] {
                    let fault = Fault { class: Some(class), sticky, errno, ..Fault::at(call) };
                    let (outcome, bytes, _) = run(Some(fault));
                    let seen = check(&case, &bytes, &allowed);
                    seen.unwrap_or_else(|what| panic!("{}, {fault:?}: {what}", case.name));
                    let done = outcome.is_err() || told(&bytes) == allowed[1];
                    assert!(done, "{}, {fault:?}: it was answered and is not there", case.name);
                }
            }
        }
    }
}
