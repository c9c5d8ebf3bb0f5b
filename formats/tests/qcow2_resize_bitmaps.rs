//! Dirty bitmaps of a disk that gets another size while nobody uses it: what QEMU makes of them, and after a crash at any
//! moment, or any failing call, none that lies.
#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::storage::{Change, Fault, Log, MemoryStorage, Record, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind};
use support::bitmaps::{SPAN, Told, marked, of_size, told, unused};
use support::checker;
use support::crash::IMAGE;
use support::image::Image;
use support::maker::{self, Maker};
use support::offline::{
    Failing, crashed, each_call, files_of, kept, repaired, resize_failing, resize_files, resized,
};
use support::random::Random;
use support::scene::{CLUSTER, Files, Scene};

/// States looked at after each cut.
const STATES_PER_CUT: u64 = 3;
/// One state in so many is also given to `qemu-img check`, and its disk resized once more.
const MORE_ONE_IN: u64 = 100;
fn scenes() -> Vec<Scene> {
    vec![
        marked("bitmaps", "refcount_bits=64", false),
        marked("bitmaps beside a data file", "refcount_bits=1", true),
        marked("bitmaps beside a raw data file", "data_file_raw=on", true),
        marked("bitmaps on a device", "refcount_bits=16", false).on_device(),
        unused(Scene::mixed("bitmaps and a snapshot", "refcount_bits=64", None, true)),
    ]
}

/// What a disk of a scene becomes: other clusters of bits and the same ones, to the end of a byte of them and not.
fn sizes(scene: &Scene) -> Vec<u64> {
    let size = scene.content.len() as u64;
    let tables = [SPAN - 5 * CLUSTER, SPAN + 300 * CLUSTER, SPAN, 24 * CLUSTER, 2 * SPAN + CLUSTER];
    let within = [size - 2 * CLUSTER, size + 13 * CLUSTER, size - 60 * CLUSTER];
    if size > SPAN { within.into_iter().chain(tables).collect() } else { within.to_vec() }
}

fn load(storage: &Arc<MemoryStorage>) -> Arc<dyn Storage> {
    Arc::clone(storage) as Arc<dyn Storage>
}

/// The disk and its bitmaps.
struct State {
    disk: Vec<u8>,
    bitmaps: Vec<Told>,
    directory: Option<(u64, u64)>,
}

impl State {
    /// Fails unless the image is sound, and its bitmaps have the shape that they must have.
    fn of(scene: &Scene, files: &Files) -> Result<State, String> {
        let files = repaired(scene, files)?;
        let report = checker::check(&files.image)?;
        if !report.is_sound() {
            return Err(format!("corrupt:\n{report}"));
        }
        let disk = scene.read_files(&files.image, files.data.as_ref().unwrap_or(&files.image))?;
        let image = Image::parse(&files.image)?;
        Ok(State { disk, bitmaps: told(&image)?, directory: image.bitmap_directory })
    }

    fn resized(&self, to: u64) -> State {
        State { disk: resized(&self.disk, to), bitmaps: of_size(&self.bitmaps, to), directory: None }
    }

    /// Whether it is one of these, or has lost its bitmaps where that may be.
    fn check(&self, allowed: [&State; 2], none_allowed: bool) -> Result<(), String> {
        let disk = |state: &&State| state.disk == self.disk;
        let Some(same) = allowed.into_iter().find(disk) else {
            return Err(format!("the disk of {} bytes holds something else", self.disk.len()));
        };
        let lost = none_allowed && self.bitmaps.is_empty();
        let kept = same.bitmaps == self.bitmaps;
        if lost || kept { Ok(()) } else { Err("its bitmaps are not those of such a disk".to_owned()) }
    }
}

#[test]
fn a_crash_leaves_bitmaps_of_the_disk_that_is_there_or_none() {
    let mut random = Random::new(Random::seed("sizes of bitmaps"));
    let (mut states, mut lost, mut kept_directory) = (0, 0, 0);
    for scene in &scenes() {
        let mut files = scene.files();
        let mut before = State::of(scene, &files).unwrap();
        for to in sizes(scene) {
            let storages = scene.storages(&files);
            let log = Log::new();
            let image = log.attach(storages.image).unwrap();
            let data = storages.data.map(|data| log.attach(data).unwrap() as Arc<dyn Storage>);
            let said = || format!("{}, {} to {to}", scene.name, before.disk.len());
            resize_files(scene, image, data, to).unwrap_or_else(|e| panic!("{}: {e}", said()));
            files = crashed(scene, &log, log.len(), true, &mut random).files();
            let after = State::of(scene, &files).unwrap_or_else(|what| panic!("{}: {what}", said()));
            after.check([&before.resized(to); 2], false).unwrap_or_else(|what| panic!("{}: {what}", said()));
            let report = checker::check(&files.image).unwrap();
            assert!(report.is_clean(), "{}: {report}", said());
            // Where the directory stays, nothing is ever lost.
            let switched = after.directory != before.directory;
            kept_directory += u64::from(!switched);
            let unknown = if switched { without_bitmaps(&log) } else { 0..0 };
            for cut in 0..=log.len() {
                let none_allowed = unknown.contains(&cut);
                for number in 0..STATES_PER_CUT {
                    let left = crashed(scene, &log, cut, number == 0, &mut random).files();
                    let state = State::of(scene, &left);
                    let seen = state.and_then(|state| {
                        lost += u64::from(state.bitmaps.is_empty());
                        state.check([&before, &after], none_allowed)?;
                        if random.below(MORE_ONE_IN) == 0 {
                            go_on(scene, &left, &state, &mut random)
                        } else {
                            Ok(())
                        }
                    });
                    seen.unwrap_or_else(|what| panic!("{}, cut {cut}: {what}", said()));
                    states += 1;
                }
            }
            before = after;
        }
    }
    eprintln!("{states} states, {lost} without bitmaps, {kept_directory} changes that keep the directory");
    assert!(lost > 0 && kept_directory > 0);
}

/// The cuts after which bitmaps may be unknown: from the write on that says so, to the sync of the one that takes that
/// back.
fn without_bitmaps(log: &Log) -> std::ops::Range<usize> {
    let records = log.records();
    let promise = |record: &Record, known: bool| {
        let Change::Write { at, bytes, .. } = &record.change else { return false };
        let says = bytes.last().is_some_and(|byte| (byte & 1 == 1) == known);
        record.file == IMAGE && at.0 == 88 && says
    };
    let off = records.iter().position(|record| promise(record, false)).unwrap();
    let on = records.iter().rposition(|record| promise(record, true)).unwrap();
    let synced = |record: &Record| record.file == IMAGE && record.change == Change::Sync;
    let sync = on + records[on..].iter().position(synced).unwrap();
    // A cut is before the record of its number.
    off + 1..sync + 1
}

/// QEMU finds nothing wrong, and the disk gets another size and is written.
fn go_on(scene: &Scene, left: &Files, state: &State, random: &mut Random) -> Result<(), String> {
    let (code, said) = Maker::of_files(&left.image, left.data.as_deref()).check();
    let expected = checker::check(&left.image)?.exit_code();
    if code != expected {
        return Err(format!("qemu-img check exits with {code} and not {expected}: {said}"));
    }
    let to = (1 + random.below(2 * SPAN / CLUSTER)) * CLUSTER;
    let storages = scene.storages(left);
    resize_files(scene, load(&storages.image), storages.data.as_ref().map(load), to)
        .map_err(|e| e.to_string())?;
    let now = State::of(scene, &files_of(&storages.image, storages.data.as_ref()))?;
    now.check([&state.resized(to); 2], false).map_err(|what| format!("then to {to}: {what}"))?;
    let data = storages.data.clone().map(kept);
    let driver = scene.open_files(kept(storages.image.clone()), data).map_err(|e| e.to_string())?;
    driver.pwrite(to - CLUSTER, &[9; 512], Durability::Later).map_err(|e| e.to_string())?;
    driver.close().map_err(|e| e.to_string())?;
    let written = State::of(scene, &files_of(&storages.image, storages.data.as_ref()))?;
    for (name, flags, granularity_bits, bits) in &written.bitmaps {
        let granule = ((to - CLUSTER) >> granularity_bits) as usize;
        if *flags == 2 && !bits[granule] {
            return Err(format!("after {to} the bitmap {name} does not tell of a write at the end"));
        }
    }
    Ok(())
}

#[test]
fn a_call_that_fails_leaves_bitmaps_of_the_disk_that_is_there_or_none() {
    let mut failed = 0;
    for scene in &scenes() {
        // Within the same clusters of bits, into fewer and into more.
        let chosen = sizes(scene).into_iter().enumerate().filter(|(number, _)| [1, 3, 7].contains(number));
        for (_, to) in chosen {
            failed += each_call(|fault| fail_at(scene, to, fault));
        }
    }
    assert!(failed > 500, "only {failed} calls failed");
}

/// Returns whether the call came to be.
fn fail_at(scene: &Scene, to: u64, fault: Fault) -> bool {
    let Failing { outcome, fired, files } = resize_failing(scene, to, fault);
    // Only who was told that they may be lost has lost them.
    let told = outcome.as_ref().is_err_and(|error| error.to_string().contains("begin with a full backup"));
    let said = |what: String| format!("{}, to {to}, {fault:?}, {outcome:?}: {what}", scene.name);
    let before = State::of(scene, &scene.files()).unwrap();
    let after = before.resized(to);
    let state = State::of(scene, &files);
    let allowed = if outcome.is_ok() { [&after; 2] } else { [&before, &after] };
    let seen = state.and_then(|state| state.check(allowed, told));
    seen.unwrap_or_else(|what| panic!("{}", said(what)));
    fired
}

/// Also what it says of bits behind a shorter end.
#[test]
fn bitmaps_are_what_qemu_makes_of_them() {
    for scene in scenes().iter().filter(|scene| scene.backing.is_none() && scene.device_len.is_none()) {
        let mut files = scene.files();
        for to in sizes(scene) {
            let maker = Maker::of_files(&files.image, files.data.as_deref());
            let options = match maker.data_bytes() {
                None => format!("driver=qcow2,file.filename={}", maker::text(&maker.path())),
                Some(_) => format!(
                    "driver=qcow2,file.filename={},data-file.driver=file,data-file.filename={}",
                    maker::text(&maker.path()),
                    maker::text(&maker.data_path())
                ),
            };
            maker::run("qemu-img", &["resize", "-q", "--shrink", "--image-opts", &options, &to.to_string()]);
            let theirs = maker.bytes();
            let storages = scene.storages(&files);
            resize_files(scene, load(&storages.image), storages.data.as_ref().map(load), to).unwrap();
            files = files_of(&storages.image, storages.data.as_ref());
            let (ours, theirs) = (Image::parse(&files.image).unwrap(), Image::parse(&theirs).unwrap());
            assert!(told(&ours).unwrap() == told(&theirs).unwrap(), "{}: to {to}", scene.name);
            let (code, said) = Maker::of_files(&files.image, files.data.as_deref()).check();
            assert_eq!(code, 0, "{}: to {to}: {said}", scene.name);
        }
    }
}

/// One that is in use, or that nobody here may touch, keeps the disk as it is; one that others have made stale does not.
#[test]
fn a_bitmap_that_cannot_be_kept_is_named() {
    let refused = |scene: &Scene, to: u64, kind: ErrorKind, hints: &[&str]| {
        let storage = scene.storage(&scene.image);
        let before = files_of(&storage, None).image;
        let error = resize_files(scene, load(&storage), None, to).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == kind && hints.iter().all(|hint| text.contains(hint)), "{text}");
        assert!(files_of(&storage, None).image == before, "{text}: it was written");
    };
    let scene = Scene::mixed("in use", "refcount_bits=64", None, false).with_bitmaps();
    refused(&scene, 1 << 20, ErrorKind::Corrupt, &["'stale'", "nbd-img bitmap remove"]);
    refused(&scene, 512, ErrorKind::Corrupt, &["'stale'", "nbd-img bitmap remove"]);
    let mut scene = marked("bitmaps", "refcount_bits=64", false);
    refused(&scene, 0, ErrorKind::Unsupported, &["'fine'", "nbd-img bitmap remove"]);
    // It could not be opened for writing any more: with one that records all bits count, and a table for 64 GiB has 32768
    // clusters of them.
    for number in 0..16 {
        let maker = Maker::of(&scene.image);
        let name = format!("more{number}");
        maker::run("qemu-img", &["bitmap", "--add", "-g", "512", maker::text(&maker.path()), &name]);
        scene.image = maker.bytes();
    }
    refused(&scene, 64 << 30, ErrorKind::Unsupported, &["could come to take", "nbd-img bitmap remove"]);
    // The bit that they are known to whoever wrote last.
    scene.image[95] &= !1;
    let storage = scene.storage(&scene.image);
    resize_files(&scene, load(&storage), None, 1 << 20).unwrap();
    let image = files_of(&storage, None).image;
    assert_eq!(Image::parse(&image).unwrap().size, 1 << 20);
}
