//! The tests' own checker says of an image what `qemu-img check` says: of good ones, and of ones in which
//! bytes of the metadata were changed at random.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use support::checker;
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::random::Random;
use support::reader::{self, Disk};

/// Changed images of each kind.
const POKES: u64 = 60;

fn images() -> Vec<(&'static str, Maker)> {
    let mut images = Vec::new();
    let mut add = |options: &'static str, cluster: u64, snapshot: bool, compressed: bool| {
        let maker = Maker::new(options, cluster * 300 + 512);
        maker.io(&[
            format!("write -q -P 1 0 {}", cluster * 70),
            format!("write -q -P 2 {} {}", cluster * 90, cluster * 3),
            format!("discard -q {} {}", cluster * 10, cluster),
        ]);
        if compressed {
            maker.io(&[format!("write -q -c -P 9 {} {cluster}", cluster * 100)]);
            maker.io(&[format!("write -q -c -P 8 {} {cluster}", cluster * 101)]);
        }
        if snapshot {
            maker.snapshot("one");
            maker.io(&[format!("write -q -P 3 {} {}", cluster * 5, cluster * 2)]);
            maker.snapshot("two").io(&["write -q -P 4 0 512"]);
        }
        if !options.contains("compat=v2") {
            maker.io(&[format!("write -q -z {} {}", cluster * 20, cluster * 3)]);
            maker.io(&[format!("write -q -z -u {} {}", cluster * 30, cluster * 2)]);
        }
        images.push((options, maker));
    };
    add("cluster_size=512", 512, true, true);
    add("cluster_size=512,refcount_bits=64", 512, true, true);
    add("cluster_size=1k,refcount_bits=1", 1024, false, false);
    add("cluster_size=512,refcount_bits=2", 512, true, false);
    add("cluster_size=4k,refcount_bits=4,compression_type=zstd", 4096, true, true);
    add("cluster_size=512,refcount_bits=8,compat=v3,lazy_refcounts=on", 512, true, true);
    add("cluster_size=4k,refcount_bits=32", 4096, false, true);
    add("cluster_size=512,compat=v2", 512, true, true);
    add("cluster_size=64k", 65536, true, true);
    add("cluster_size=2M", 2 << 20, false, false);
    add("cluster_size=16k,extended_l2=on", 16384, true, true);
    images
}

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

/// Changes one or two bytes of the metadata.
fn poke(bytes: &mut [u8], random: &mut Random) -> String {
    let owned = bytes.to_vec();
    let image = Image::parse(&owned).unwrap();
    let l1 = owned.table(image.l1_at, image.l1_entries);
    let l2s: Vec<_> = l1.iter().map(|entry| entry & OFFSET_MASK).filter(|at| *at != 0).collect();
    let blocks: Vec<_> = image.refcount_table.iter().copied().filter(|at| *at != 0).collect();
    let mut said = String::new();
    for _ in 0..1 + random.below(2) {
        let cluster = image.cluster_len();
        // Where something is written, rather than in the empty parts.
        let at = match random.below(9) {
            0 => image.l1_at + random.below(image.l1_entries * 8),
            1..=3 => random.pick(&l2s) + random.below(cluster),
            4 => random.pick(&l2s) + random.below(64 * 8),
            5 | 6 => random.pick(&blocks) + random.below(cluster),
            7 => random.pick(&blocks) + random.below(16),
            _ => image.table_at + random.below(blocks.len() as u64 * 8),
        };
        let old = bytes[at as usize];
        let new = match random.below(4) {
            0 => 0,
            1 => old.wrapping_add(1),
            2 => old ^ (1 << random.below(8)),
            _ => old ^ 0x80,
        };
        bytes[at as usize] = new;
        said += &format!("{at:#x}: {old:#x} -> {new:#x}; ");
    }
    said
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
    assert!(report.corruptions.is_empty() && report.shared.len() == 1, "{report}");
}
