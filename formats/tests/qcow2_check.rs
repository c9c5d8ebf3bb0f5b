//! Checking and repairing: what is said of an image is what `qemu-img check` and the tests' own checker say
//! of it, repaired images are sound for both, and what the guest sees has not changed.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::Result;
use nbd_img_formats::qcow2::{CheckOptions, CheckReport, Repair, check};
use nbd_img_formats::storage::{CallClass, Fate, Fault, Faults, FileId, Log, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use support::checker;
use support::crash::content_of;
use support::gallery::{images, poke};
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::random::Random;
use support::reader::{self, Disk};
use support::wrapped::{Hooks, Wrapped};

/// Changed images of each kind.
const POKES: u64 = 30;

fn check_bytes(bytes: &[u8], repair: Repair) -> (Result<CheckReport>, Vec<u8>) {
    let memory: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
    let report = check(&memory, CheckOptions { repair, ..CheckOptions::default() });
    let after = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
    (report, after)
}

fn exit_code(report: &CheckReport) -> i32 {
    match (report.check_errors, report.corruptions, report.leaks) {
        (1.., _, _) => 1,
        (0, 1.., _) => 2,
        (0, 0, 1..) => 3,
        (0, 0, 0) => 0,
    }
}

/// What `qemu-img check --output=json` says, by key.
fn qemu(bytes: &[u8]) -> serde_json::Value {
    let image = Maker::of(bytes);
    let output = std::process::Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json", maker::text(&image.path())])
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn same_numbers(what: &str, report: &CheckReport, qemu: &serde_json::Value) {
    let ours = serde_json::to_value(report).unwrap();
    for key in [
        "check-errors",
        "corruptions",
        "leaks",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
        "image-end-offset",
    ] {
        // QEMU leaves out what is 0.
        let theirs = qemu.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
        assert_eq!(ours[key].as_u64(), Some(theirs), "{what}: {key}\n{qemu}\n{:#?}", report.messages);
    }
}

fn with_bitmaps() -> Maker {
    let maker = Maker::new("cluster_size=4k", 64 << 20);
    let path = maker.path();
    maker.io(&["write -q 0 300k"]);
    maker::run("qemu-img", &["bitmap", "--add", "-g", "512", maker::text(&path), "a"]);
    maker::run("qemu-img", &["bitmap", "--add", "-g", "64k", maker::text(&path), "b"]);
    maker.io(&["write -q 512k 300k", "write -q 63M 300k"]);
    maker
}

#[test]
fn good_images_are_clean_and_counted_as_qemu_does() {
    let mut all = images();
    all.push(("bitmaps", with_bitmaps()));
    for (options, maker) in all {
        let bytes = maker.bytes();
        let (report, after) = check_bytes(&bytes, Repair::All);
        let report = report.unwrap();
        same_numbers(options, &report, &qemu(&bytes));
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}: {:#?}", report.messages);
        assert!(after == bytes, "{options}: a repair of a sound image writes nothing");
        // The same in many small windows.
        let memory: Arc<dyn Storage> = MemoryStorage::copy_of(&bytes).unwrap();
        let clusters = bytes.len() as u64 / report.total_clusters.max(1);
        let window_clusters = (clusters / 7).clamp(3, 1000);
        let small = check(&memory, CheckOptions { window_clusters, ..CheckOptions::default() }).unwrap();
        same_numbers(options, &small, &qemu(&bytes));
    }
}

#[test]
fn changed_images_are_judged_as_qemu_does_and_repaired() {
    let mut random = Random::new(Random::seed("checked images"));
    let mut codes = [0; 4];
    let mut repaired = 0;
    for (options, maker) in images() {
        let good = maker.bytes();
        let pokes = if good.len() > 1 << 22 { 5 } else { POKES };
        for _ in 0..pokes {
            let mut bytes = good.clone();
            let said = format!("{options}, {}", poke(&mut bytes, &mut random));
            let (code, text) = maker::qemu_check(&bytes);
            let (report, after) = check_bytes(&bytes, Repair::Nothing);
            assert!(after == bytes, "{said}: a check writes");
            if code == 1 {
                // QEMU could not open it, or gave up. Neither do we call it sound.
                assert!(report.is_err() || exit_code(&report.unwrap()) != 0, "{said}: {text}");
                codes[1] += 1;
                continue;
            }
            let report = report.unwrap_or_else(|e| panic!("{said}: {e}, but QEMU: {text}"));
            let context = || format!("{said}:\n{:#?}\nQEMU: {text}", report.messages);
            if !is_stricter(options, &report) {
                assert_eq!(exit_code(&report), code, "{}", context());
                // It does not judge subclusters.
                let ours = checker::check(&bytes).unwrap();
                if !options.contains("extended_l2") {
                    assert_eq!(exit_code(&report), ours.exit_code(), "{}\n{ours}", context());
                }
            }
            if is_comparable(options, &report) {
                same_numbers(&said, &report, &qemu(&bytes));
            }
            codes[code as usize] += 1;
            repaired += repair_all(&context(), &bytes, &report);
        }
    }
    eprintln!("verdicts: {codes:?}, repaired {repaired}");
    assert!(codes[2] > 50 && codes[3] > 8 && repaired > 50, "{codes:?} {repaired}");
}

/// With short clusters an entry has bits for offsets that no file has.
#[test]
fn a_compressed_cluster_too_far_away_is_counted() {
    let maker = Maker::new("cluster_size=512", 1 << 20);
    maker.io(&["write -q -c 0 512", "write -q 512 512"]);
    let good = maker.bytes();
    let image = Image::parse(&good).unwrap();
    let entry = (good.be64(image.l1_at) & OFFSET_MASK) as usize;
    // Offsets from 2^56 on, without and with the copied flag.
    for bits in [0x01, 0x81] {
        let mut bytes = good.clone();
        bytes[entry] |= bits;
        let (report, _) = check_bytes(&bytes, Repair::Nothing);
        let report = report.unwrap();
        assert_eq!(report.compressed_clusters, 1, "{:#?}", report.messages);
        same_numbers("a far compressed cluster", &report, &qemu(&bytes));
    }
}

/// Whether something is said of an image that the specification forbids and QEMU takes.
fn is_stricter(options: &str, report: &CheckReport) -> bool {
    let says = |what: &str| report.messages.iter().any(|text| text.contains(what));
    says("version 2") || options.contains("extended_l2") && says("reserved bits")
}

/// Whether QEMU counts the same: of tables that it cannot follow it reads what is not one, or gives up. Its counters go
/// no further than a refcount does, so with one bit it does not see that a refcount block's cluster is used by something
/// else, too: it names the cluster that is used too often, and we the block besides, which a repair moves.
fn is_comparable(options: &str, report: &CheckReport) -> bool {
    let says = |what: &str| report.messages.iter().any(|text| text.contains(what));
    if options.split(',').any(|option| option == "refcount_bits=1") && says("the refcount block at") {
        return false;
    }
    let others =
        ["L1 table, entry", "refcount table", "lies outside", "version 2", "reserved bits", "something else"];
    !others.into_iter().any(says)
}

/// Repairs; 1 if that has made it sound.
fn repair_all(what: &str, bytes: &[u8], before: &CheckReport) -> u32 {
    let (report, after) = check_bytes(bytes, Repair::All);
    let report = report.unwrap_or_else(|e| panic!("{what}: {e}"));
    let (code, text) = maker::qemu_check(&after);
    same_content(what, bytes, &after);
    if report.corruptions > 0 {
        // What is left is named, and nothing has got worse.
        assert!(report.not_repaired.is_some(), "{what}\nafter: {:#?}", report.messages);
        assert!(report.corruptions <= before.corruptions, "{what}\nafter: {:#?}", report.messages);
        return 0;
    }
    assert_eq!((report.leaks, report.dirty, report.corrupt), (0, false, false), "{what}");
    assert_eq!(report.corruptions_fixed, before.corruptions, "{what}");
    assert_eq!(code, 0, "{what}\nafter: {text}");
    1
}

/// A repair changes nothing of what the guest sees, now or in a snapshot, unless its data lay in metadata.
fn same_content(what: &str, before: &[u8], after: &[u8]) {
    let (before, after) = (before.to_vec(), after.to_vec());
    if what.contains("extended_l2") || checker::check(&before).is_ok_and(|report| !report.overlaps.is_empty())
    {
        return;
    }
    let snapshots = Image::parse(&before).unwrap().snapshots.len();
    for disk in (0..snapshots).map(Disk::Snapshot).chain([Disk::Active]) {
        if let Ok(content) = reader::read_disk(&before, disk, &[]) {
            assert!(reader::read_disk(&after, disk, &[]).unwrap() == content, "{what}: {disk:?} has changed");
        }
    }
}

/// Images whose refcounts and flags are wrong in all ways, and leaks.
fn spoilt(random: &mut Random) -> Vec<(&'static str, Vec<u8>)> {
    let mut spoilt = Vec::new();
    for (options, maker) in images() {
        let mut bytes = maker.bytes();
        if bytes.len() > 1 << 22 {
            continue;
        }
        let copy = bytes.clone();
        let image = Image::parse(&copy).unwrap();
        let blocks: Vec<_> = image.refcount_table.iter().copied().filter(|at| *at != 0).collect();
        for _ in 0..10 {
            let at = random.pick(&blocks) + random.below(image.cluster_len());
            bytes[at as usize] = random.pick(&[0, 1, 1, 2, 0xff]);
        }
        match random.below(3) {
            // A block is lost, or lies on the L1 table.
            0 => bytes[image.table_at as usize..image.table_at as usize + 8].fill(0),
            1 => bytes[image.table_at as usize..image.table_at as usize + 8]
                .copy_from_slice(&image.l1_at.to_be_bytes()),
            _ => {}
        }
        spoilt.push((options, bytes));
    }
    spoilt
}

#[test]
fn a_crash_in_a_repair_does_no_harm() {
    let mut random = Random::new(Random::seed("crashes in repairs"));
    for (options, bytes) in (0..3).flat_map(|_| spoilt(&mut random)).collect::<Vec<_>>() {
        for repair in [Repair::Leaks, Repair::All] {
            let what = format!("{options}, {repair:?}");
            let (before, _) = check_bytes(&bytes, Repair::Nothing);
            let before = before.unwrap();
            let log = Log::new();
            let storage: Arc<dyn Storage> = log.attach(MemoryStorage::copy_of(&bytes).unwrap()).unwrap();
            let report = check(&storage, CheckOptions { repair, ..CheckOptions::default() }).unwrap();
            if repair == Repair::All {
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {:#?}", report.messages);
            }
            for _ in 0..15 {
                let cut = random.below(log.len() as u64 + 1) as usize;
                let crashed = log.after_crash(FileId(0), cut, |_, _| match random.below(3) {
                    0 => Fate::Kept,
                    1 => Fate::Lost,
                    _ => Fate::Scattered(random.next()),
                });
                let crashed = content_of(&crashed);
                let what = format!("{what}, cut {cut} of {}", log.len());
                same_content(&what, &bytes, &crashed);
                let (now, _) = check_bytes(&crashed, Repair::Nothing);
                let now = now.unwrap();
                // Either it says that it needs a repair, or it is no worse than it was.
                let dirty = now.dirty || what.contains("compat=v2");
                assert!(dirty || now.corruptions <= before.corruptions, "{what}: {:#?}", now.messages);
                repair_all(&what, &crashed, &now);
            }
        }
    }
}

/// What could be read when the image was looked at, and cannot be when it is repaired, is in use all the same.
#[test]
fn a_read_that_fails_in_a_repair_frees_nothing_that_is_in_use() {
    let mut random = Random::new(Random::seed("reads in repairs"));
    let mut failed = 0;
    for (options, bytes) in spoilt(&mut random) {
        let (before, _) = check_bytes(&bytes, Repair::Nothing);
        let before = before.unwrap();
        for repair in [Repair::Leaks, Repair::All] {
            for call in 0.. {
                let memory = MemoryStorage::copy_of(&bytes).unwrap();
                let faults = Faults::new();
                let storage: Arc<dyn Storage> = faults.attach(memory.clone());
                faults.arm(Fault { class: Some(CallClass::Read), ..Fault::at(call) });
                let outcome = check(&storage, CheckOptions { repair, ..CheckOptions::default() });
                if faults.fired() == 0 {
                    break;
                }
                failed += 1;
                let after = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
                let now = check_bytes(&after, Repair::Nothing).0.unwrap();
                let what = format!("{options}, {repair:?}, read {call}: {outcome:?}");
                assert!(now.corruptions <= before.corruptions, "{what}: {:#?}", now.messages);
                same_content(&what, &bytes, &after);
            }
        }
    }
    assert!(failed > 300, "only {failed} reads failed");
}

/// A file with one place that cannot be read.
struct BadPlace(u64);

impl Hooks for BadPlace {
    fn reads(&self, at: u64, len: u64) -> bool {
        !(at..at + len).contains(&self.0)
    }
}

/// A file that is looked at in many windows has its tables read as often.
#[test]
fn a_table_that_cannot_be_read_is_one_error() {
    let maker = Maker::new("cluster_size=512", 1 << 20);
    maker.io(&["write -q 0 80k"]);
    let bytes = maker.bytes();
    let image = Image::parse(&bytes).unwrap();
    let l2 = bytes.be64(image.l1_at) & OFFSET_MASK;
    for place in [l2, image.refcount_table[0], image.l1_at] {
        for window_clusters in [3, 100, 1 << 20] {
            let memory: Arc<dyn Storage> = MemoryStorage::copy_of(&bytes).unwrap();
            let storage: Arc<dyn Storage> = Wrapped::new(memory, BadPlace(place));
            let report =
                check(&storage, CheckOptions { window_clusters, ..CheckOptions::default() }).unwrap();
            let texts: Vec<_> =
                report.messages.iter().filter(|text| text.contains("cannot be read")).collect();
            assert_eq!(
                (report.check_errors, texts.len()),
                (1, 1),
                "{place:#x}, {window_clusters}: {texts:#?}"
            );
        }
    }
}

#[test]
fn leaks_are_repaired_alone_only_where_it_is_known_what_is_in_use() {
    let maker = Maker::new("cluster_size=512", 1 << 20);
    maker.io(&["write -q 0 8k"]);
    let good = maker.bytes();
    let image = Image::parse(&good).unwrap();
    let block = image.refcount_table[0] as usize;
    let last = good.len() / 512 - 1;
    // The last cluster is counted five times, and one behind it is used by nobody.
    let mut leaky = good.clone();
    leaky.resize(good.len() + 512, 0);
    leaky[block + 2 * last + 1] = 5;
    leaky[block + 2 * last + 3] = 1;
    let (report, after) = check_bytes(&leaky, Repair::Leaks);
    let report = report.unwrap();
    // The copied flag of the one that is in use was right for a refcount of 1, so that it was wrong before.
    assert_eq!((report.leaks, report.leaks_fixed, report.corruptions), (0, 2, 0), "{:#?}", report.messages);
    assert_eq!(maker::qemu_check(&after).0, 0);
    // An entry that makes no sense may have led to either.
    let mut unknown = leaky.clone();
    let l2 = (good.be64(image.l1_at) & OFFSET_MASK) as usize;
    unknown[l2 + 7] |= 2;
    for repair in [Repair::Leaks, Repair::All] {
        let (report, after) = check_bytes(&unknown, repair);
        let report = report.unwrap();
        assert!(report.not_repaired.unwrap().contains("no cluster was freed"));
        assert_eq!((report.leaks, report.leaks_fixed), (2, 0), "{repair:?}");
        if repair == Repair::Leaks {
            assert!(after == unknown, "{repair:?}: it was written");
        }
    }
    // And refcounts that are too low are raised first.
    let mut low = leaky.clone();
    low[block + 2 * (last - 1) + 1] = 0;
    let (report, after) = check_bytes(&low, Repair::Leaks);
    assert!(report.unwrap().not_repaired.unwrap().contains("--repair all"));
    assert!(after == low);
    assert_eq!(check_bytes(&low, Repair::All).0.unwrap().leaks_fixed, 2);
}

#[test]
fn what_an_image_says_of_itself_is_cleared_by_a_repair_only() {
    let mut bytes = Maker::new("cluster_size=4k", 1 << 20).bytes();
    // Dirty and corrupt.
    bytes[79] |= 3;
    let (report, after) = check_bytes(&bytes, Repair::Leaks);
    let report = report.unwrap();
    assert!(report.dirty && report.corrupt && after == bytes);
    let (report, after) = check_bytes(&bytes, Repair::All);
    let report = report.unwrap();
    assert!(!report.dirty && !report.corrupt && after[79] & 3 == 0);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 0));
}

/// A file of a few kilobytes that claims much takes no time and no memory.
#[test]
fn what_is_claimed_and_not_there_is_not_followed() {
    let maker = Maker::new("cluster_size=512,refcount_bits=1", 1 << 30);
    let mut bytes = maker.bytes();
    let image_bytes = bytes.clone();
    let image = Image::parse(&image_bytes).unwrap();
    // All entries of the L1 table name the same table, whose entries all name the same cluster.
    let table = (bytes.len() as u64).next_multiple_of(512);
    bytes.resize(table as usize + 512, 0);
    for entry in 0..image.l1_entries {
        let at = (image.l1_at + entry * 8) as usize;
        bytes[at..at + 8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
    }
    for entry in 0..64 {
        let at = (table + entry * 8) as usize;
        bytes[at..at + 8].copy_from_slice(&(image.table_at | 1 << 63).to_be_bytes());
    }
    let (report, _) = check_bytes(&bytes, Repair::Nothing);
    let report = report.unwrap();
    assert_eq!(report.allocated_clusters, image.l1_entries * 64);
    assert!(report.corruptions > image.l1_entries * 64, "{}", report.corruptions);
    assert!(report.messages.len() <= 1000);
    let (report, _) = check_bytes(&bytes, Repair::All);
    assert!(report.unwrap().not_repaired.is_some());
}
