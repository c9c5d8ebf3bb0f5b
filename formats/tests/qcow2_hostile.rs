//! Images that lie: the header cases of QEMU's iotest 080, bad entries, snapshots and bitmaps, chains
//! without end. Each is an error or right data, at once and within bounds on memory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/hostile.rs"]
mod hostile;
mod qcow2_support;

use std::ops::ControlFlow;
use std::path::Path;

use hostile::{allocations, be64, bounded, memory_driver, poke};
use nbd_img_formats::open::{CHAIN_MAX, OpenOptions, open};
use nbd_img_formats::qcow2::Header;
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, ErrorKind, GuestRange, StatusQuery, Storage};
use qcow2_support::{Folder, qemu, qemu_io, try_qemu};

/// One poke of the header: name, offset, bytes, and what the error must say.
type HeaderCase = (&'static str, u64, &'static [u8], &'static str);

const HEADER_CASES: &[HeaderCase] = &[
    ("version 1", 4, &[0, 0, 0, 1], "version 1"),
    ("version 4", 4, &[0, 0, 0, 4], "version 4"),
    ("header length too large", 100, &[0xff, 0xff, 0xff, 0xff], "header length"),
    ("header length too large, signed", 100, &[0x7f, 0xff, 0xff, 0xff], "header length"),
    ("header length 0", 100, &[0, 0, 0, 0], "header length"),
    ("header length 103", 100, &[0, 0, 0, 103], "header length"),
    ("cluster bits 8", 20, &[0, 0, 0, 8], "2^8"),
    ("cluster bits 22", 20, &[0, 0, 0, 22], "2^22"),
    ("cluster bits 63", 20, &[0, 0, 0, 63], "2^63"),
    ("cluster bits all", 20, &[0xff; 4], "clusters"),
    ("unknown extension", 112, &[0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff], "extension"),
    ("refcount table clusters", 56, &[0xff, 0xff, 0xff, 0xff], "refcount table"),
    ("refcount table clusters, just too many", 56, &[0, 2, 0, 1], "refcount table"),
    ("refcount table clusters 0", 56, &[0, 0, 0, 0], "refcount table"),
    ("refcount table misaligned", 48, &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef], "refcount table"),
    ("refcount table far", 48, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "refcount table"),
    ("snapshots", 60, &[0xff, 0xff, 0xff, 0xff], "snapshots"),
    ("snapshots, signed", 60, &[0x7f, 0xff, 0xff, 0xff], "snapshots"),
    (
        "one snapshot misaligned",
        60,
        &[0, 0, 0, 1, 0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef],
        "snapshot",
    ),
    ("one snapshot far", 60, &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "snapshot"),
    ("one snapshot behind the end", 60, &[0, 0, 0, 1, 0, 0, 0, 0x10, 0, 0, 0, 0], "ends inside"),
    ("L1 entries", 36, &[0xff, 0xff, 0xff, 0xff], "L1"),
    ("L1 entries, signed", 36, &[0x7f, 0xff, 0xff, 0xff], "L1"),
    ("L1 entries 0", 36, &[0, 0, 0, 0], "L1"),
    ("L1 far", 40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], "L1"),
    ("L1 misaligned", 40, &[0x12, 0x34, 0x56, 0x78, 0x90, 0xab, 0xcd, 0xef], "L1"),
    ("L1 behind the end", 40, &[0, 0, 0, 0, 0x40, 0, 0, 0], "L1"),
    ("size for more than L1 has", 24, &[0x40, 0, 0, 0, 0, 0, 0, 0], "L1"),
    ("size all", 24, &[0xff; 8], "L1"),
    ("backing name too long", 8, &[0, 0, 0, 0, 0, 0, 4, 0, 0xff, 0xff, 0xff, 0xff], "name"),
    ("backing name of 1024", 8, &[0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 4, 0], "name"),
    ("backing name behind the first cluster", 8, &[0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 9], "first cluster"),
    ("backing name over its end", 8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 9], "name"),
    ("AES", 32, &[0, 0, 0, 1], "AES"),
    ("LUKS", 32, &[0, 0, 0, 2], "LUKS"),
    ("encryption 3", 32, &[0, 0, 0, 3], "encryption method 3"),
    ("refcount order 7", 96, &[0, 0, 0, 7], "refcounts"),
    ("refcount order all", 96, &[0xff; 4], "refcounts"),
    ("unknown incompatible bits", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0x20], "bit 5, bit 63"),
    ("compression without its bit", 104, &[1], "compression"),
    ("compression bit without a type", 79, &[8], "compression"),
    ("compression type 2", 104, &[2], "compression"),
];

/// QEMU takes metadata behind the end of the file for zeroes, where to us it is missing; and it has the
/// old encryption.
const QEMU_OPENS: [&str; 3] = ["one snapshot behind the end", "L1 behind the end", "AES"];

#[test]
fn hostile_headers_are_refused_at_once() {
    let folder = Folder::new();
    let good = std::fs::read(folder.create("good.qcow2", "", 64 << 20)).unwrap();
    assert!(memory_driver(&good, None).is_ok());
    for (name, at, with, says) in HEADER_CASES {
        let mut bytes = good.clone();
        poke(&mut bytes, *at, with);
        let path = folder.file("poked.qcow2");
        std::fs::write(&path, &bytes).unwrap();
        let error = bounded(name, || open(&path, &OpenOptions::default()).err());
        let error = error.unwrap_or_else(|| panic!("{name}: was opened"));
        assert!(error.to_string().contains(says), "{name}: {error}");
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{name}: {error:?}");
        let theirs = try_qemu("qemu-img", ["info", path.to_str().unwrap()]).status.success();
        assert_eq!(theirs, QEMU_OPENS.contains(name), "{name}: QEMU's verdict");
        assert!(std::fs::read(&path).unwrap() == bytes, "{name}: was written to");
    }
}

/// The three placements of the backing file's name in iotest 080.
#[test]
fn a_huge_extension_is_refused_wherever_the_backing_name_lies() {
    let folder = Folder::new();
    let good = std::fs::read(folder.create("good.qcow2", "", 64 << 20)).unwrap();
    for name_at in [0u64, 120, 65535] {
        let mut bytes = good.clone();
        poke(&mut bytes, 8, &name_at.to_be_bytes());
        poke(&mut bytes, 112, &[0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff]);
        let error = bounded("extension", || memory_driver(&bytes, None).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

/// Version 2 has no header length: what stands at a later version's place for it means nothing.
#[test]
fn a_version_2_header_is_not_read_as_version_3() {
    let folder = Folder::new();
    let mut bytes = std::fs::read(folder.create("v2.qcow2", "compat=v2", 64 << 20)).unwrap();
    // An extension of version 2 whose data would be feature bits and a header length of version 3.
    poke(&mut bytes, 72, &[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 32]);
    poke(&mut bytes, 80, &[0xff; 32]);
    poke(&mut bytes, 112, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3, b'r', b'a', b'w', 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let image: Arc<dyn Storage> = MemoryStorage::copy_of(&bytes).unwrap();
    let header = Header::load(&image).unwrap();
    assert_eq!(header.extensions.backing_format.as_deref(), Some("raw"));
    // And the other way round: a version 3 header is not searched before its own length.
    let mut bytes = std::fs::read(folder.create("v3.qcow2", "", 64 << 20)).unwrap();
    poke(&mut bytes, 100, &[0, 0, 1, 0]);
    poke(&mut bytes, 112, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3, b'r', b'a', b'w', 0, 0, 0, 0, 0]);
    poke(&mut bytes, 256, &[0; 64]);
    let image: Arc<dyn Storage> = MemoryStorage::copy_of(&bytes).unwrap();
    assert_eq!(Header::load(&image).unwrap().extensions.backing_format, None);
}

#[test]
fn dirty_and_corrupt_images_are_readable() {
    for (bit, name) in [(1, "dirty"), (2, "corrupt")] {
        let folder = Folder::new();
        let image = folder.create("image.qcow2", "lazy_refcounts=on", 1 << 20);
        qemu_io(&image, &["write -P 3 0 1M".to_owned()]);
        let mut bytes = std::fs::read(&image).unwrap();
        poke(&mut bytes, 79, &[bit]);
        std::fs::write(&image, &bytes).unwrap();
        let driver = qcow2_support::open_read_only(&image).driver;
        assert!(qcow2_support::read_all(&*driver) == vec![3; 1 << 20]);
        let features = driver.info().unwrap().features;
        assert!(features.contains(&name.to_owned()), "{features:?}");
        drop(driver);
        assert!(std::fs::read(&image).unwrap() == bytes);
    }
}

/// The L2 entries of iotest 080, and others: an error for the requests that touch them, no other.
#[test]
fn a_bad_entry_fails_the_requests_that_touch_it() {
    let folder = Folder::new();
    let image = folder.create("image.qcow2", "", 1 << 20);
    qemu_io(&image, &["write -P 3 0 1M".to_owned()]);
    let good = std::fs::read(&image).unwrap();
    let l1 = be64(&good, 40);
    let l2 = be64(&good, usize::try_from(l1).unwrap()) & 0x00ff_ffff_ffff_fe00;
    let bad = [0xbfff_ffff_ffff_0000u64, 0x8000_0000_0005_0200, 0x8000_0000_0005_0002, 0x4000_0000_0000_0000];
    for entry in bad {
        let mut bytes = good.clone();
        poke(&mut bytes, l2 + 3 * 8, &entry.to_be_bytes());
        let driver = memory_driver(&bytes, None).unwrap();
        let mut buf = vec![0; 65536];
        for cluster in 0..16 {
            let outcome = bounded("read", || driver.pread(cluster * 65536, &mut buf));
            assert_eq!(outcome.is_err(), cluster == 3, "{entry:#x} {cluster} {outcome:?}");
        }
        assert_eq!(driver.pread(2 * 65536, &mut vec![0; 3 * 65536]).unwrap_err().errno(), libc::EIO);
    }
    // An offset far behind the end of the file: QEMU reads zeroes there, and so do we.
    let mut bytes = good.clone();
    poke(&mut bytes, l2 + 3 * 8, &0x8000_00ff_ffff_0000u64.to_be_bytes());
    std::fs::write(&image, &bytes).unwrap();
    qcow2_support::assert_as_qemu(&folder, &image, 1);
    // A table there is no table.
    let mut bytes = good;
    poke(&mut bytes, l1, &0x8000_00ff_ffff_0000u64.to_be_bytes());
    let error = memory_driver(&bytes, None).unwrap().pread(0, &mut [0; 512]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Corrupt, libc::EIO), "{error}");
}

#[test]
fn hostile_snapshots() {
    let folder = Folder::new();
    let image = folder.create("image.qcow2", "", 1 << 20);
    qemu_io(&image, &["write -P 3 0 1M".to_owned()]);
    qemu("qemu-img", ["snapshot", "-c", "snap", image.to_str().unwrap()]);
    let good = std::fs::read(&image).unwrap();
    let table = be64(&good, 64);
    assert!(memory_driver(&good, Some("snap")).is_ok());
    // Iotest 080: the snapshot's L1 table misaligned, and too large.
    let pokes: [(u64, &[u8]); 4] = [
        (table, &0x0040_0200u64.to_be_bytes()),
        (table + 8, &0x1000_0000u32.to_be_bytes()),
        (table, &0x7fff_ffff_ffff_0000u64.to_be_bytes()),
        (table + 8, &0u32.to_be_bytes()),
    ];
    for (at, with) in pokes {
        let mut bytes = good.clone();
        poke(&mut bytes, at, with);
        assert!(memory_driver(&bytes, None).is_ok(), "the active state does not depend on it");
        let error = bounded("snapshot", || memory_driver(&bytes, Some("snap")).err()).unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    let mut bytes = good.clone();
    poke(&mut bytes, table + 36, &[0x7f, 0xff, 0xff, 0xff]);
    assert_eq!(memory_driver(&bytes, None).err().unwrap().kind(), ErrorKind::Corrupt);
    // Snapshots with names of 64 KiB: refused when their sum exceeds what QEMU allows.
    let mut bytes = good;
    poke(&mut bytes, 60, &[0, 1, 0, 0]);
    let record = bytes[usize::try_from(table).unwrap()..][..64].to_vec();
    for number in 0..1100 {
        let at = table + number * (40 + 24 + 0xffff + 1);
        poke(&mut bytes, at, &record);
        poke(&mut bytes, at + 12, &[0, 0, 0xff, 0xff]);
    }
    let error = bounded("65536 snapshots", || memory_driver(&bytes, None).err()).unwrap();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("larger"), "{error}");
}

/// An image file with a backing file's name in it, without asking qemu-img whether that is there.
fn write_overlay(path: &Path, template: &[u8], backing: &str) {
    let mut bytes = template.to_vec();
    poke(&mut bytes, 8, &1024u64.to_be_bytes());
    poke(&mut bytes, 16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
    poke(&mut bytes, 1024, backing.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn chains_are_bounded_and_have_no_loops() {
    let folder = Folder::new();
    let template = std::fs::read(folder.create("end.img", "", 1 << 20)).unwrap();
    let refused = |name: &str, says: &str| {
        let outcome = bounded(name, || open(&folder.file(name), &OpenOptions::default()).err());
        let error = outcome.unwrap_or_else(|| panic!("{name} was opened"));
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    write_overlay(&folder.file("self"), &template, "self");
    refused("self", "comes back to");
    write_overlay(&folder.file("a"), &template, "b");
    write_overlay(&folder.file("b"), &template, "./a");
    refused("a", "comes back to");
    std::fs::hard_link(folder.file("a"), folder.file("a2")).unwrap();
    write_overlay(&folder.file("b"), &template, "a2");
    refused("a", "comes back to");
    for depth in 1..=200 {
        let below = if depth == 1 { "end.img".to_owned() } else { (depth - 1).to_string() };
        write_overlay(&folder.file(&depth.to_string()), &template, &below);
    }
    let longest = (CHAIN_MAX - 1).to_string();
    let opened = open(&folder.file(&longest), &OpenOptions::default()).unwrap();
    assert!(qcow2_support::read_all(&*opened.driver) == vec![0; 1 << 20]);
    refused(&CHAIN_MAX.to_string(), "longer than");
    refused("200", "longer than");
}

/// Sparse files that claim the largest L1 table each: refused before room is taken for them.
#[test]
fn l1_tables_of_a_chain_are_bounded_together() {
    let folder = Folder::new();
    let template = std::fs::read(folder.create("template", "cluster_size=512", 512)).unwrap();
    for depth in 0..6u64 {
        let name = depth.to_string();
        let mut bytes = template.clone();
        poke(&mut bytes, 24, &(128u64 << 30).to_be_bytes());
        poke(&mut bytes, 36, &(4u32 << 20).to_be_bytes());
        poke(&mut bytes, 40, &(1u64 << 20).to_be_bytes());
        if depth > 0 {
            poke(&mut bytes, 8, &500u64.to_be_bytes());
            poke(&mut bytes, 16, &[0, 0, 0, 1]);
            poke(&mut bytes, 500, (depth - 1).to_string().as_bytes());
        }
        std::fs::write(folder.file(&name), bytes).unwrap();
        let file = std::fs::File::options().write(true).open(folder.file(&name)).unwrap();
        file.set_len(64 << 20).unwrap();
    }
    let one = open(&folder.file("0"), &OpenOptions::default()).unwrap().driver;
    one.pread((128 << 30) - 512, &mut [1; 512]).unwrap();
    let error = bounded("chain", || open(&folder.file("5"), &OpenOptions::default()).err()).unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("L1 tables"), "{error}");
}

/// The most fragmented disk there is, out of one L2 table: what a status enumeration holds at a time is
/// bounded.
#[test]
fn a_fragmented_disk_is_enumerated_in_bounded_memory() {
    let folder = Folder::new();
    let mut bytes = std::fs::read(folder.create("image", "cluster_size=512", 128 << 20)).unwrap();
    let table = bytes.len().next_multiple_of(512) as u64;
    for entry in 0..64 {
        let word = if entry % 2 == 0 { 1u64 } else { 1 << 63 | 512 };
        poke(&mut bytes, table + entry * 8, &word.to_be_bytes());
    }
    let l1 = be64(&bytes, 40);
    for entry in 0..4096 {
        poke(&mut bytes, l1 + entry * 8, &(1 << 63 | table).to_be_bytes());
    }
    let driver = memory_driver(&bytes, None).unwrap();
    let mut runs = 0;
    let (_, used) = allocations::count(|| {
        let visit = &mut |_, _| {
            runs += 1;
            ControlFlow::Continue(())
        };
        let all = GuestRange::new(0, 128 << 20).unwrap();
        driver.status(StatusQuery::Allocation, all, visit).unwrap();
    });
    assert_eq!(runs, 262_144);
    assert!(used.peak < 64 << 20, "{used:?}");
}

/// Bitmaps are for information: a directory that makes no sense is an empty one.
#[test]
fn bad_bitmaps_do_not_keep_an_image_from_being_read() {
    let folder = Folder::new();
    let image = folder.create("image.qcow2", "", 1 << 20);
    qemu("qemu-img", ["bitmap", "--add", image.to_str().unwrap(), "changes"]);
    let good = std::fs::read(&image).unwrap();
    assert_eq!(memory_driver(&good, None).unwrap().info().unwrap().bitmaps.len(), 1);
    let extension = good.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64;
    let directory = be64(&good, usize::try_from(extension).unwrap() + 24);
    let pokes: [(u64, &[u8]); 7] = [
        (extension + 8, &[0xff; 4]),
        (extension + 8, &[0, 0, 0, 2]),
        (extension + 16, &[0xff; 8]),
        (extension + 24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        (extension + 31, &[1]),
        (directory + 17, &[64]),
        (directory + 20, &[0xff; 4]),
    ];
    for (at, with) in pokes {
        let mut bytes = good.clone();
        poke(&mut bytes, at, with);
        let driver = bounded("bitmaps", || memory_driver(&bytes, None)).unwrap();
        assert!(driver.info().unwrap().bitmaps.is_empty(), "{at}");
        assert!(qcow2_support::read_all(&*driver).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn an_external_data_file_without_a_name_is_refused() {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", "", 1 << 20);
    let mut bytes = std::fs::read(&path).unwrap();
    poke(&mut bytes, 79, &[4]);
    std::fs::write(&path, bytes).unwrap();
    let error = open(&path, &OpenOptions::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("data file"), "{error}");
}
