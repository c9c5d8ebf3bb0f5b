//! Another size for a disk that nobody uses: what it holds then, and what a crash at any moment and any failing call
//! leave.
#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nbd_img_formats::storage::{Fault, Log, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind};
use support::checker;
use support::image::Image;
use support::maker::Maker;
use support::offline::{
    Failing, crashed, each_call, files_of, kept, repaired, resize_failing, resize_files, resized,
};
use support::random::Random;
use support::scene::{CLUSTER, Files, SIZE, Scene, open_parts};
use support::steps::read_all;

/// States looked at after each cut.
const STATES_PER_CUT: u64 = 4;
/// One state in so many is resized once more.
const MORE_ONE_IN: u64 = 20;
/// One in so many is resized to the size that it has.
const FINISH_ONE_IN: u64 = 8;
/// One in so many is also given to `qemu-img check`.
const QEMU_ONE_IN: u64 = 150;
/// A disk whose L1 table has more entries than that of a scene.
const LARGE: u64 = 600 << 10;

/// What a disk becomes, one size after the other: into a longer L1 table, back into a cluster, and on from there.
const SIZES: [&[u64]; 3] = [
    &[LARGE, 40 * CLUSTER, 70 * CLUSTER],
    &[SIZE + 5 * CLUSTER, 3 * CLUSTER, LARGE, SIZE],
    &[SIZE - 7 * CLUSTER, SIZE - 2 * CLUSTER, 0, SIZE],
];

fn scenes() -> Vec<Scene> {
    let mixed = [
        Scene::mixed("overlay", "refcount_bits=16", Some(150 * CLUSTER), true),
        Scene::mixed("version 2 overlay", "compat=v2", Some(SIZE), true),
        Scene::extended("subclusters of an overlay", "refcount_bits=16", Some(150 * CLUSTER), true),
    ];
    let with_subclusters = Scene::with_subclusters().into_iter().filter(|scene| scene.data.is_some());
    let raw_subclusters = Scene::external(
        "subclusters in a raw data file",
        "cluster_size=16k,extended_l2=on,data_file_raw=on",
        None,
    );
    let files = Scene::with_data_file().into_iter().chain(with_subclusters).chain([raw_subclusters]);
    let stale: Vec<_> = files.flat_map(|scene| [with_longer_data(&scene), scene]).collect();
    mixed.into_iter().chain(stale).collect()
}

/// The same image with bytes behind the disk's end in its data file, or on the device.
fn with_longer_data(scene: &Scene) -> Scene {
    let mut data = scene.data.clone().unwrap();
    data.resize(SIZE as usize, 0);
    data.resize(LARGE as usize - 1000, 0xdd);
    let data_device_len = scene.data_device_len.map(|_| LARGE + 4096);
    Scene { data: Some(data), data_device_len, ..copy(scene) }
}

fn copy(scene: &Scene) -> Scene {
    Scene {
        image: scene.image.clone(),
        data: scene.data.clone(),
        backing: scene.backing.clone(),
        content: scene.content.clone(),
        snapshots: scene.snapshots.clone(),
        compressed: scene.compressed.clone(),
        ..*scene
    }
}

/// Fails unless the files have a sound image, the disk is one of these, and a raw data file is the same.
fn check_files(scene: &Scene, files: &Files, disks: &[&[u8]]) -> Result<Vec<u8>, String> {
    let files = &repaired(scene, files)?;
    let report = checker::check(&files.image)?;
    if !report.is_sound() {
        return Err(format!("corrupt:\n{report}"));
    }
    let data = files.data.as_ref().unwrap_or(&files.image);
    let content = scene.read_files(&files.image, data)?;
    if !disks.contains(&&*content) {
        return Err(format!("the disk of {} bytes holds something else", content.len()));
    }
    if Image::parse(&files.image)?.has_raw_data_file() && data.get(..content.len()) != Some(&content) {
        return Err("the raw data file has another content than the disk".to_owned());
    }
    Ok(content)
}

/// Whatever became of another size, to shrink to the one that is there leaves no more than the disk.
fn finish(scene: &Scene, left: &Files, content: &[u8]) -> Result<(), String> {
    let storages = scene.storages(left);
    let data = storages.data.clone().map(|data| data as Arc<dyn Storage>);
    let size = content.len() as u64;
    resize_files(scene, storages.image.clone(), data, size).map_err(|e| format!("finished: {e}"))?;
    let files = files_of(&storages.image, storages.data.as_ref());
    check_files(scene, &files, &[content]).map_err(|what| format!("finished: {what}"))?;
    let report = checker::check(&files.image)?;
    let too_long = |data: &Vec<u8>| data.len() as u64 > size && scene.data_device_len.is_none();
    match files.data.as_ref().is_some_and(too_long) || !report.is_clean() {
        true => Err(format!("finished: the data file is too long, or something leaks: {report}")),
        false => Ok(()),
    }
}

/// How long the data file of a disk of `to` bytes is: longer only where it was so before the disk grew.
fn check_length(scene: &Scene, files: &Files, from: (u64, u64), to: u64) {
    let (Some(data), None) = (&files.data, scene.data_device_len) else { return };
    let (size, len) = from;
    let expected = if to > size { len.max(to) } else { to.min(len) };
    assert_eq!(data.len() as u64, expected, "{}: {size} to {to}", scene.name);
}

#[test]
fn a_crash_leaves_one_size_or_the_other() {
    let mut random = Random::new(Random::seed("offline sizes"));
    let (mut states, mut resizes) = (0, 0);
    for (number, scene) in scenes().iter().enumerate() {
        {
            let sizes = SIZES[number % SIZES.len()];
            let mut files = scene.files();
            let mut before = scene.content.clone();
            for to in sizes {
                if scene.data_device_len.is_some_and(|len| len < *to) {
                    refused(scene, &files, *to);
                    continue;
                }
                let storages = scene.storages(&files);
                let log = Log::new();
                let image = log.attach(storages.image).unwrap();
                let data = storages.data.map(|data| log.attach(data).unwrap() as Arc<dyn Storage>);
                let said = || format!("{}: {} to {to} of {sizes:?}", scene.name, before.len());
                resize_files(scene, image, data, *to).unwrap_or_else(|e| panic!("{}: {e}", said()));
                let after = resized(&before, *to);
                let old_data_len = files.data.as_ref().map_or(0, |data| data.len() as u64);
                for cut in 0..=log.len() {
                    for number in 0..STATES_PER_CUT {
                        let left = crashed(scene, &log, cut, number == 0, &mut random).files();
                        let looked = look_at(scene, &left, [&before, &after], &mut random);
                        looked.unwrap_or_else(|what| panic!("{}, cut {cut}: {what}", said()));
                        states += 1;
                    }
                }
                files = crashed(scene, &log, log.len(), true, &mut random).files();
                check_files(scene, &files, &[&after]).unwrap_or_else(|what| panic!("{}: {what}", said()));
                check_length(scene, &files, (before.len() as u64, old_data_len), *to);
                let report = checker::check(&files.image).unwrap();
                assert!(report.is_clean(), "{}: {report}", said());
                before = after;
                resizes += 1;
            }
        }
    }
    eprintln!("{states} states of {resizes} resizes");
}

fn look_at(scene: &Scene, left: &Files, disks: [&[u8]; 2], random: &mut Random) -> Result<(), String> {
    let content = check_files(scene, left, &disks)?;
    if random.below(QEMU_ONE_IN) == 0 {
        let (code, said) = Maker::of_files(&left.image, left.data.as_deref()).check();
        let expected = checker::check(&left.image)?.exit_code();
        if code != expected {
            return Err(format!("qemu-img check exits with {code} and not {expected}: {said}"));
        }
    }
    if random.below(FINISH_ONE_IN) == 0 {
        finish(scene, left, &content)?;
    }
    if random.below(MORE_ONE_IN) > 0 {
        return Ok(());
    }
    let most = scene.data_device_len.unwrap_or(LARGE);
    let to = random.below(most / CLUSTER + 1) * CLUSTER;
    let storages = scene.storages(left);
    let data = storages.data.clone().map(|data| data as Arc<dyn Storage>);
    resize_files(scene, storages.image.clone(), data, to).map_err(|e| format!("then to {to}: {e}"))?;
    check_files(scene, &files_of(&storages.image, storages.data.as_ref()), &[&resized(&content, to)])
        .map(drop)
        .map_err(|what| format!("then to {to}: {what}"))
}

/// A device is not made longer, and nothing is changed.
fn refused(scene: &Scene, files: &Files, to: u64) {
    let storages = scene.storages(files);
    let before = files_of(&storages.image, storages.data.as_ref());
    let data = storages.data.clone().map(|data| data as Arc<dyn Storage>);
    let error = resize_files(scene, storages.image.clone(), data, to).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    let after = files_of(&storages.image, storages.data.as_ref());
    assert!((before.image, before.data) == (after.image, after.data), "{}: changed", scene.name);
}

/// Any call of either file fails, once or for good.
#[test]
fn a_call_that_fails_leaves_one_size_or_the_other() {
    let mut failed = 0;
    for scene in &scenes() {
        for to in [LARGE, SIZE + 5 * CLUSTER, 40 * CLUSTER, 3 * CLUSTER] {
            if scene.data_device_len.is_some_and(|len| len < to) {
                continue;
            }
            failed += each_call(|fault| fail_at(scene, to, fault));
        }
    }
    assert!(failed > 1000, "only {failed} calls failed");
}

/// Returns whether the call came to be.
fn fail_at(scene: &Scene, to: u64, fault: Fault) -> bool {
    let Failing { outcome, fired, files } = resize_failing(scene, to, fault);
    let said = || format!("{}, to {to}, {fault:?}, {outcome:?}", scene.name);
    let after = resized(&scene.content, to);
    let allowed: &[&[u8]] = if outcome.is_ok() { &[&after] } else { &[&scene.content, &after] };
    let finished = check_files(scene, &files, allowed).and_then(|content| finish(scene, &files, &content));
    finished.unwrap_or_else(|what| panic!("{}: {what}", said()));
    fired
}

/// What a disk was cut off never comes back, however it is cut and however it grows.
#[test]
fn what_was_cut_off_does_not_come_back() {
    let mut random = Random::new(Random::seed("cut off"));
    for scene in &scenes() {
        let most = scene.data_device_len.unwrap_or(LARGE);
        let storages = scene.storages(&scene.files());
        let data = || storages.data.clone().map(|data| data as Arc<dyn Storage>);
        let mut content = scene.content.clone();
        for number in 1..12_u8 {
            let to = random.below(most / CLUSTER + 1) * CLUSTER;
            resize_files(scene, storages.image.clone(), data(), to).unwrap();
            content = resized(&content, to);
            let data = storages.data.clone().map(kept);
            let driver = scene.open_files(kept(storages.image.clone()), data).unwrap();
            assert!(read_all(&*driver).unwrap() == content, "{}: number {number}, {to}", scene.name);
            let at = random.below(to / CLUSTER + 1) * CLUSTER;
            let part = &mut content[at as usize..];
            part.fill(number);
            driver.pwrite(at, part, Durability::Later).unwrap();
            driver.close().unwrap();
            let files = files_of(&storages.image, storages.data.as_ref());
            check_files(scene, &files, &[&content]).unwrap_or_else(|what| panic!("{}: {what}", scene.name));
        }
    }
}

/// While it is served, too: a data file is cut and made longer under those who write to the part that stays.
#[test]
fn a_data_file_is_cut_and_grows_under_writers() {
    const STAYS: u64 = 40 * CLUSTER;
    for options in ["data_file_raw=off", "data_file_raw=on", "extended_l2=on,cluster_size=16k"] {
        let maker = Maker::with_data_file(&format!("cluster_size=4k,{options}"), LARGE);
        maker.write(0, &vec![5; LARGE as usize], false);
        let storages = [maker.bytes(), maker.data_bytes().unwrap()];
        let [image, data] = storages.map(|bytes| MemoryStorage::copy_of(&bytes).unwrap());
        let driver = open_parts(
            kept(image.clone()),
            Some(kept(data.clone())),
            None,
            Some(Default::default()),
            1 << 20,
        )
        .unwrap();
        let over = AtomicBool::new(false);
        let mut expected = vec![5; STAYS as usize];
        thread::scope(|scope| {
            let writers = [0, 1].map(|writer| {
                let (driver, over) = (&driver, &over);
                scope.spawn(move || {
                    let mut random = Random::new(Random::seed("writers of a data file") + writer);
                    let mut written = vec![0; STAYS as usize];
                    while !over.load(Ordering::Relaxed) {
                        let at = (random.below(STAYS / CLUSTER / 2) * 2 + writer) * CLUSTER;
                        let byte = 1 + random.below(255) as u8;
                        written[at as usize..][..512].fill(byte);
                        driver.pwrite(at, &[byte; 512], Durability::Later).unwrap();
                    }
                    written
                })
            });
            let mut random = Random::new(Random::seed("cuts of a data file"));
            for _ in 0..60 {
                let to = STAYS + random.below((LARGE - STAYS) / CLUSTER) * CLUSTER;
                let before = driver.size();
                driver.resize(to).unwrap();
                if to > before {
                    let mut new = vec![1; (to - before) as usize];
                    driver.pread(before, &mut new).unwrap();
                    assert!(new.iter().all(|byte| *byte == 0), "{options}: what was cut off is back");
                    driver.pwrite(before, &vec![6; new.len()], Durability::Later).unwrap();
                }
                driver.flush().unwrap();
            }
            over.store(true, Ordering::Relaxed);
            for written in writers.map(|writer| writer.join().unwrap()) {
                expected
                    .iter_mut()
                    .zip(written)
                    .filter(|(_, new)| *new != 0)
                    .for_each(|(old, new)| *old = new);
            }
        });
        driver.resize(STAYS).unwrap();
        assert!(read_all(&*driver).unwrap() == expected, "{options}: something was lost");
        driver.close().unwrap();
        let files = files_of(&image, Some(&data));
        let bytes = files.data.unwrap();
        assert_eq!(bytes.len() as u64, STAYS, "{options}");
        assert!(!options.ends_with("raw=on") || bytes == expected, "{options}: the raw file is not the disk");
        assert!(checker::check(&files.image).unwrap().is_clean(), "{options}");
    }
}

/// A device without room for a longer L1 table: the error is about that, and the image is as it was.
#[test]
fn a_full_device_is_said_to_be_full() {
    let mut scene = Scene::mixed("device", "refcount_bits=64", None, true);
    scene.device_len = Some((scene.image.len() as u64).next_multiple_of(CLUSTER));
    let storage = scene.storage(&scene.image);
    let error = resize_files(&scene, storage.clone(), None, LARGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    let text = error.to_string();
    assert!(text.contains("no room for more of the image's metadata") && !text.contains("repair"), "{text}");
    check_files(&scene, &files_of(&storage, None), &[&scene.content]).unwrap();
}
