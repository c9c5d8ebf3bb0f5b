//! Images with bytes changed at random, and images cut off: no panic, no great allocation, and never
//! wrong data.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/hostile.rs"]
mod hostile;
mod qcow2_support;

use std::ops::ControlFlow;
use std::path::Path;

use hostile::{be64, bounded, memory_driver, poke};
use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, GuestRange, Result, StatusQuery, Storage};
use qcow2_support::{Folder, Random, mixed_content, qemu, qemu_io, try_qemu};

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

/// Mutations at random of metadata; the number of a round is its seed, and is printed when one fails.
/// `NBD_IMG_MUTATIONS` is the number of rounds.
#[test]
fn mutated_images_never_panic_nor_take_much() {
    let folder = Folder::new();
    let seeds = seeds(&folder);
    let places: Vec<_> = seeds.iter().map(|seed| metadata_offsets(seed)).collect();
    let values: [u64; 8] =
        [0, 1, 0x7fff_ffff, 0xffff_ffff, 0x8000_0000_0000_0000, u64::MAX, 0x4000_0000_0000_0200, 512];
    let mut opened = 0;
    let rounds = std::env::var("NBD_IMG_MUTATIONS").map_or(4000, |text| text.parse().unwrap());
    for round in 0..rounds {
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
    assert!((rounds / 4..rounds).contains(&opened), "the mutations should open as often as not: {opened}");
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
    let caches = Caches::new(1 << 20, 1 << 20, [&header])?;
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
