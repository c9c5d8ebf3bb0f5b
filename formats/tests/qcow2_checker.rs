//! The tests' own checker says of an image what `qemu-img check` says: of good ones, and of ones in which
//! bytes of the metadata were changed at random.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use support::checker;
use support::gallery::{images, poke};
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::random::Random;
use support::reader::{self, Disk};

/// Changed images of each kind.
const POKES: u64 = 60;

#[test]
fn good_images_are_good() {
    for (options, maker) in images() {
        let bytes = maker.bytes();
        let report = checker::check(&bytes).unwrap();
        assert!(report.is_clean(), "{options}:\n{report}");
        let (code, said) = maker.check();
        assert_eq!(code, 0, "{options}: {said}");
    }
    let maker = Maker::new("cluster_size=64k", 1 << 20);
    let path = maker.path();
    maker.io(&["write -q 0 300k"]);
    maker::run("qemu-img", &["bitmap", "--add", "-g", "64k", maker::text(&path), "b"]);
    maker.io(&["write -q 512k 300k"]);
    let report = checker::check(&maker.bytes()).unwrap();
    assert!(report.is_clean(), "{report}");
}

#[test]
fn changed_images_are_judged_as_qemu_does() {
    let mut random = Random::new(Random::seed("changed images"));
    let mut codes = [0; 4];
    for (options, maker) in images() {
        if options.contains("extended_l2") {
            // Subclusters are not judged; images with them are not written.
            continue;
        }
        let good = maker.bytes();
        // Changing 50 MiB again and again shows nothing that 50 KiB do not show.
        let pokes = if good.len() > 1 << 22 { 5 } else { POKES };
        for _ in 0..pokes {
            let mut bytes = good.clone();
            let said = poke(&mut bytes, &mut random);
            let (code, qemu) = maker::qemu_check(&bytes);
            let ours = checker::check(&bytes);
            if code == 1 {
                // QEMU could not open it, or gave up.
                codes[1] += 1;
                continue;
            }
            let report = ours.unwrap_or_else(|e| panic!("{options}, {said}: {e}, but QEMU: {qemu}"));
            assert_eq!(report.exit_code(), code, "{options}, {said}:\n{report}\nQEMU: {qemu}");
            codes[code as usize] += 1;
        }
    }
    eprintln!("QEMU's verdicts: {codes:?}");
    assert!(codes[2] > 100 && codes[3] > 20, "{codes:?}");
}

/// The independent reader reads what QEMU reads, snapshots included.
#[test]
fn disks_are_read_as_qemu_does() {
    for (options, maker) in images() {
        if options.contains("extended_l2") {
            // It does not know subclusters; images with them are not written.
            continue;
        }
        let bytes = maker.bytes();
        let raw = maker.file("raw");
        let (from, to) = (maker.path(), raw.clone());
        let (from, to) = (maker::text(&from), maker::text(&to));
        maker::run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
        assert!(
            reader::read_disk(&bytes, Disk::Active, &[]).unwrap() == std::fs::read(&raw).unwrap(),
            "{options}"
        );
        let snapshots = Image::parse(&bytes).unwrap().snapshots.len();
        for number in 0..snapshots {
            let name = format!("snapshot.name={}", ["one", "two"][number]);
            maker::run("qemu-img", &["convert", "-f", "qcow2", "-l", &name, "-O", "raw", from, to]);
            let content = reader::read_disk(&bytes, Disk::Snapshot(number), &[]).unwrap();
            assert!(content == std::fs::read(&raw).unwrap(), "{options} {name}");
        }
    }
}

/// What QEMU does not look for: the same cluster for two things, with the refcount of two.
#[test]
fn a_cluster_used_twice_is_seen() {
    let maker = Maker::new("cluster_size=512,refcount_bits=64", 64 << 10);
    maker.io(&["write -q 0 8k"]);
    let mut bytes = maker.bytes();
    let image_bytes = bytes.clone();
    let image = Image::parse(&image_bytes).unwrap();
    let l2 = image_bytes.be64(image.l1_at) & OFFSET_MASK;
    let first = image_bytes.be64(l2) & OFFSET_MASK;
    let second = image_bytes.be64(l2 + 8) & OFFSET_MASK;
    // Both entries name the first cluster; its refcount is made 2, that of the second 0.
    bytes[l2 as usize..l2 as usize + 16]
        .copy_from_slice(&[first.to_be_bytes(), first.to_be_bytes()].concat());
    let block = image.refcount_table[0];
    for (cluster, count) in [(first / 512, 2u64), (second / 512, 0)] {
        let at = (block + cluster * 8) as usize;
        bytes[at..at + 8].copy_from_slice(&count.to_be_bytes());
    }
    assert_eq!(maker::qemu_check(&bytes).0, 0);
    let report = checker::check(&bytes).unwrap();
    assert!(report.corruptions.is_empty() && report.overlaps.len() == 1, "{report}");
}
