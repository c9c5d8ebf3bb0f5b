//! Images that lie: the header cases of QEMU's iotest 080, chains without end, truncated files, bytes
//! changed at random. Each is an error or right data, at once and within bounds on memory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/allocations.rs"]
mod allocations;
mod qcow2_support;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use nbd_img_formats::open::{CHAIN_MAX, OpenOptions, open};
use nbd_img_formats::qcow2::{Caches, DataFile, Header, ImageNumber, Parts, Qcow2Driver};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, ErrorKind, GuestRange, Result, StatusQuery, Storage};
use qcow2_support::{Folder, Random, mixed_content, qemu, qemu_io, try_qemu};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

/// No single allocation for a hostile image is larger: the largest L1 table that is allowed.
const ALLOCATION_MAX: usize = 32 << 20;
/// An error must come within this time.
const TIME_MAX: Duration = Duration::from_secs(1);

/// Runs within the bounds on time and memory.
fn bounded<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let (result, used) = allocations::count(work);
    let took = start.elapsed();
    assert!(took < TIME_MAX, "{what} took {took:?}");
    assert!(used.largest <= ALLOCATION_MAX && used.peak < 128 << 20, "{what} took {used:?}");
    result
}

fn poke(bytes: &mut Vec<u8>, at: u64, with: &[u8]) {
    let at = usize::try_from(at).unwrap();
    if bytes.len() < at + with.len() {
        bytes.resize(at + with.len(), 0);
    }
    bytes[at..at + with.len()].copy_from_slice(with);
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn memory_driver(bytes: &[u8], snapshot: Option<&str>) -> Result<Arc<Qcow2Driver>> {
    let image: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
    let header = Header::load(&image)?;
    let data_file: Option<Arc<dyn Storage>> = match header.geometry.data_file() {
        DataFile::Internal => None,
        DataFile::External | DataFile::ExternalRaw => Some(MemoryStorage::new(4096).unwrap()),
    };
    let backing: Option<Arc<dyn BlockDriver>> = match header.backing_name {
        None => None,
        Some(_) => Some(RawDriver::open(MemoryStorage::copy_of(&[5; 5000]).unwrap(), RawOptions::default())?),
    };
    let caches = Caches::new(0, [header.geometry]);
    let snapshot = snapshot.map(str::to_owned);
    Qcow2Driver::open(Parts {
        image,
        header,
        data_file,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot,
        write: None,
    })
}

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

/// Reads as much as a client could ask for, and everything about it.
fn exercise(driver: &dyn BlockDriver, random: &mut Random) {
    let size = driver.size();
    let mut buf = vec![0; 1 << 20];
    for at in [0, size / 2, size.saturating_sub(1 << 20), random.below(size)] {
        let len = usize::try_from((size - at).min(1 + random.below(1 << 20))).unwrap();
        let _ = driver.pread(at, &mut buf[..len]);
    }
    if let Some(range) = GuestRange::new(0, size.min(64 << 20)) {
        let mut covered = 0;
        let visit = &mut |len, _| {
            covered += len;
            ControlFlow::Continue(())
        };
        if driver.status(StatusQuery::Allocation, range, visit).is_ok() {
            assert_eq!(covered, range.len());
        }
    }
    let _ = driver.info();
}

/// Small images with everything that a parser meets.
fn seeds(folder: &Folder) -> Vec<Vec<u8>> {
    let options = [
        "cluster_size=512",
        "cluster_size=512,compat=v2",
        "cluster_size=4k,compression_type=zstd",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,refcount_bits=1",
    ];
    options.iter().enumerate().map(|(number, options)| seed_image(folder, number as u64, options)).collect()
}

fn seed_image(folder: &Folder, number: u64, options: &str) -> Vec<u8> {
    let source = folder.file("source.raw");
    mixed_content(&source, 200 << 10, number);
    let image = folder.file("seed.qcow2");
    let path = image.to_str().unwrap();
    let compress = if options.contains("bits=1") { "-q" } else { "-c" };
    let args =
        ["convert", compress, "-f", "raw", "-O", "qcow2", "-o", options, source.to_str().unwrap(), path];
    qemu("qemu-img", args);
    if !options.contains("bits=1") {
        qemu("qemu-img", ["snapshot", "-c", "snap", path]);
    }
    if !options.contains("v2") {
        qemu("qemu-img", ["bitmap", "--add", path, "dirty"]);
        qemu_io(&image, &["write -z 20k 9k".to_owned()]);
    }
    qemu_io(&image, &["write -P 7 60k 5k".to_owned(), "discard 120k 20k".to_owned()]);
    if !options.contains("bits=1") {
        qemu("qemu-img", ["rebase", "-u", "-F", "raw", "-b", "base.raw", path]);
    }
    std::fs::read(&image).unwrap()
}

/// Where the metadata of an image lies: the first cluster, the tables that the header points to, and
/// what those point to.
fn metadata_offsets(bytes: &[u8]) -> Vec<u64> {
    let cluster = 1u64 << bytes[23];
    let mut starts = vec![0, be64(bytes, 40), be64(bytes, 48), be64(bytes, 64)];
    for table in [be64(bytes, 40), be64(bytes, 48)] {
        for entry in 0..8 {
            let at = usize::try_from(table + entry * 8).unwrap();
            if at + 8 <= bytes.len() {
                starts.push(be64(bytes, at) & 0x00ff_ffff_ffff_fe00);
            }
        }
    }
    let len = bytes.len() as u64;
    let part = cluster.min(2048);
    starts
        .iter()
        .filter(|start| **start < len)
        .flat_map(|start| (*start..len.min(start + part)).step_by(4))
        .collect()
}

/// Mutations at random of metadata, with seeds that are printed when one fails.
#[test]
fn mutated_images_never_panic_nor_take_much() {
    let folder = Folder::new();
    let seeds = seeds(&folder);
    let places: Vec<_> = seeds.iter().map(|seed| metadata_offsets(seed)).collect();
    let values: [u64; 8] =
        [0, 1, 0x7fff_ffff, 0xffff_ffff, 0x8000_0000_0000_0000, u64::MAX, 0x4000_0000_0000_0200, 512];
    let mut opened = 0;
    for round in 0..4000u64 {
        let mut random = Random::new(round + 1);
        let which = usize::try_from(round).unwrap() % seeds.len();
        let mut bytes = seeds[which].clone();
        for _ in 0..1 + random.below(4) {
            // Half of the hits are in the header.
            let places = &places[which];
            let among = if random.below(2) == 0 { 60 } else { places.len() as u64 };
            let at = places[usize::try_from(random.below(among)).unwrap()];
            let value = values[usize::try_from(random.below(8)).unwrap()] ^ random.below(3);
            match random.below(4) {
                0 => poke(&mut bytes, at, &value.to_be_bytes()),
                1 => poke(&mut bytes, at, &value.to_be_bytes()[4..]),
                2 => poke(&mut bytes, at + random.below(4), &[random.byte()]),
                _ => {
                    let old = bytes.get(usize::try_from(at).unwrap()).copied().unwrap_or(0);
                    poke(&mut bytes, at, &[old ^ 1 << random.below(8)]);
                }
            }
        }
        if random.below(8) == 0 {
            bytes.truncate(usize::try_from(random.below(bytes.len() as u64)).unwrap());
        }
        let snapshot = (random.below(4) == 0).then_some("snap");
        bounded(&format!("round {round}"), || {
            if let Ok(driver) = memory_driver(&bytes, snapshot) {
                opened += 1;
                exercise(&*driver, &mut random);
            }
        });
    }
    assert!((1000..4000).contains(&opened), "the mutations should open as often as not: {opened}");
}

/// Cut at every 512 bytes. What QEMU reads with success is what we read, or we fail where it takes
/// metadata that is not there for zeroes or goes on with half a compressed cluster.
#[test]
fn truncated_images_give_right_data_or_errors() {
    let folder = Folder::new();
    let base = folder.file("base.raw");
    std::fs::write(&base, vec![9; 300 << 10]).unwrap();
    for (number, options) in ["cluster_size=512", "cluster_size=4k"].into_iter().enumerate() {
        let whole = seed_image(&folder, number as u64, options);
        let expected = {
            let driver = memory_driver_on(&whole, &base).unwrap();
            qcow2_support::read_all(&*driver)
        };
        let path = folder.file("cut.qcow2");
        for (step, len) in (0..whole.len()).step_by(512).enumerate() {
            let driver = bounded("open", || memory_driver_on(&whole[..len], &base));
            let Ok(driver) = driver else { continue };
            check_sectors(&*driver, &expected);
            if step % 16 == 0 {
                std::fs::write(&path, &whole[..len]).unwrap();
                compare_with_qemu_io(&*driver, &path);
            }
        }
    }
}

fn memory_driver_on(bytes: &[u8], base: &Path) -> Result<Arc<Qcow2Driver>> {
    let image: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
    let header = Header::load(&image)?;
    let base = MemoryStorage::copy_of(&std::fs::read(base).unwrap()).unwrap();
    let backing: Option<Arc<dyn BlockDriver>> = Some(RawDriver::open(base, RawOptions::default())?);
    let caches = Caches::new(1 << 20, [header.geometry]);
    let parts = Parts {
        image,
        header,
        data_file: None,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: None,
    };
    Qcow2Driver::open(parts)
}

/// Every sector is an error, or what it was, or zeroes where its data has been cut off.
fn check_sectors(driver: &dyn BlockDriver, expected: &[u8]) {
    let mut sector = [0; 512];
    for (number, good) in expected.chunks(512).enumerate() {
        if driver.pread(number as u64 * 512, &mut sector).is_ok() {
            let cut = sector.iter().zip(good).rposition(|(got, good)| got != good);
            assert!(cut.is_none_or(|_| sector == [0; 512]), "sector {number} is neither right nor zero");
        }
    }
}

fn compare_with_qemu_io(driver: &dyn BlockDriver, path: &Path) {
    let raw = path.with_extension("raw");
    let args = ["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()];
    if !try_qemu("qemu-img", args).status.success() {
        return;
    }
    let theirs = std::fs::read(&raw).unwrap();
    let mut sector = [0; 512];
    for (number, theirs) in theirs.chunks(512).enumerate() {
        if driver.pread(number as u64 * 512, &mut sector).is_ok() {
            assert_eq!(sector[..], *theirs, "{}: sector {number}", path.display());
        }
    }
}
