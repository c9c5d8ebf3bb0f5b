//! Images that were not closed, or are damaged, opened for writing: repaired first, or refused, and what
//! contradicts itself is never written into.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::storage::{FileId, Log, MemoryOptions, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, HostOffset, State};
use support::checker;
use support::crash::content_of;
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker;
use support::random::Random;
use support::scene::{CLUSTER, Scene};
use support::steps::read_all;
use support::units::painted;
use support::wrapped::{NeverClosed, Wrapped};

/// Incompatible feature bits, the low byte of them, of a version 3 image.
const INCOMPATIBLE_AT: usize = 79;

fn version_3() -> Vec<Scene> {
    Scene::all().into_iter().filter(|scene| scene.image[7] == 3).collect()
}

/// The image after a crash of a program that uses the dirty bit: refcounts of any value.
fn spoil(scene: &Scene, random: &mut Random) -> Vec<u8> {
    let mut bytes = scene.image.clone();
    bytes[INCOMPATIBLE_AT] |= 1;
    let image = Image::parse(&scene.image).unwrap();
    let end = scene.image.len();
    for block in image.refcount_table.iter().filter(|block| **block != 0) {
        for _ in 0..20 {
            let at = *block as usize + random.below(CLUSTER) as usize;
            if at < end {
                bytes[at] = random.pick(&[0, 0, 1, 2, 0xff]);
            }
        }
    }
    bytes
}

#[test]
fn a_dirty_image_is_repaired_first() {
    let mut random = Random::new(Random::seed("dirty images"));
    for scene in version_3() {
        for round in 0..20 {
            let spoilt = spoil(&scene, &mut random);
            let log = Log::new();
            let memory = scene.storage(&spoilt);
            let storage = Wrapped::new(log.attach(memory.clone()).unwrap(), NeverClosed);
            let driver = scene.open(storage).unwrap_or_else(|e| panic!("{}: {e}", scene.name));
            let opened = log.len();
            let memory: Arc<dyn Storage> = memory;
            let report = checker::check_storage(&*memory).unwrap();
            assert!(report.is_clean(), "{}, round {round}: after the open\n{report}", scene.name);
            driver.pwrite(40 * CLUSTER, &painted(40 * CLUSTER, CLUSTER, 1), Durability::Later).unwrap();
            driver.close().unwrap();
            let report = checker::check_storage(&*memory).unwrap();
            assert!(report.is_clean(), "{}, round {round}: after the close\n{report}", scene.name);
            let mut content = scene.content.clone();
            let at = 40 * CLUSTER as usize;
            content[at..at + CLUSTER as usize].copy_from_slice(&painted(at as u64, CLUSTER, 1));
            assert!(scene.read(&&*memory).unwrap() == content, "{}", scene.name);
            crash_in_repair(&scene, &log, opened, &mut random);
        }
    }
}

/// As long as the repair is not durable, the bit says that one is needed.
fn crash_in_repair(scene: &Scene, log: &Log, opened: usize, random: &mut Random) {
    for _ in 0..20 {
        let cut = random.below(opened as u64 + 1) as usize;
        let bytes = log.after_crash(FileId(0), cut, |_, _| match random.below(3) {
            0 => nbd_img_formats::storage::Fate::Kept,
            1 => nbd_img_formats::storage::Fate::Lost,
            _ => nbd_img_formats::storage::Fate::Scattered(random.next()),
        });
        let report = checker::check(&bytes).unwrap();
        assert!(report.dirty || report.is_sound(), "{}, cut {cut}:\n{report}", scene.name);
        let memory = scene.storage(&content_of(&bytes));
        let driver = scene.open(Wrapped::new(memory.clone(), NeverClosed)).unwrap();
        driver.close().unwrap();
        let memory: Arc<dyn Storage> = memory;
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_sound(), "{}, cut {cut}: repaired again\n{report}", scene.name);
        assert!(scene.read(&&*memory).unwrap() == scene.content, "{}", scene.name);
    }
}

/// On a device the end of what is used is known from the tables only: a refcount block that is made in a
/// gap below an old one is counted all the same.
#[test]
fn blocks_that_the_repair_makes_are_counted() {
    let made =
        maker::Maker::new("cluster_size=512,refcount_bits=64,preallocation=metadata", 60 << 10).bytes();
    let image = Image::parse(&made).unwrap();
    let (table_at, first) = (image.table_at as usize, image.refcount_table[0] as usize);
    let end = made.len().next_multiple_of(CLUSTER as usize);
    let mut bytes = made.clone();
    bytes.resize(end + 20 * CLUSTER as usize, 0);
    // The first block lies behind a gap at the end, the second one is lost.
    let moved = end + CLUSTER as usize;
    bytes.copy_within(first..first + CLUSTER as usize, moved);
    bytes[table_at..table_at + 8].copy_from_slice(&(moved as u64).to_be_bytes());
    bytes[table_at + 8..table_at + 16].fill(0);
    bytes[INCOMPATIBLE_AT] |= 1;
    let options = MemoryOptions { len: bytes.len() as u64, grows: false, poisoned: false };
    let device = MemoryStorage::with(options).unwrap();
    device.pwrite(&bytes, HostOffset(0), Durability::Later).unwrap();
    let storage: Arc<dyn Storage> = Wrapped::new(device.clone(), NeverClosed);
    let driver = support::scene::open_over(storage, None, Some(Default::default()), 0).unwrap();
    driver.close().unwrap();
    let device: Arc<dyn Storage> = device;
    let report = checker::check_storage(&*device).unwrap();
    assert!(report.is_clean(), "{report}");
}

/// No refcount makes it right that data lies in a table, or where there is no file: the repair leaves such an image as
/// it is.
#[test]
fn data_in_metadata_or_nowhere_is_beyond_repair() {
    for scene in version_3().into_iter().filter(|scene| scene.content[..64] != [0; 64]) {
        let image = Image::parse(&scene.image).unwrap();
        // In an L2 table, a snapshot's L1 table or what belongs to a bitmap it is counted, as QEMU does, and never
        // written.
        let counted = [
            "a data entry names an L2 table",
            "a data entry names a snapshot's L1 table",
            "a data entry names the directory of bitmaps",
            "a data entry names a bitmap's table",
            "a data entry names a bitmap",
        ];
        let mut damages = damages(&image, &scene.image);
        damages.retain(|(what, _)| !counted.contains(what));
        let end = (scene.image.len() as u64).next_multiple_of(CLUSTER) + 2 * CLUSTER;
        damages.push(("a data entry leads behind the end", pointing(&image, &scene.image, end)));
        for (what, mut bytes) in damages {
            if what.ends_with("the end") && scene.device_len.is_some() {
                continue;
            }
            bytes[INCOMPATIBLE_AT] |= 1;
            let memory = scene.storage(&bytes);
            let Err(error) = scene.open(Wrapped::new(memory.clone(), NeverClosed)) else {
                panic!("{}: {what}: repaired", scene.name)
            };
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{}: {what}: {error}", scene.name);
            let memory: Arc<dyn Storage> = memory;
            let after = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
            assert!(after[..bytes.len()] == bytes, "{}: {what}: it was changed", scene.name);
        }
    }
}

/// The image with the entry of the disk's cluster 2 naming the host cluster at `host` as its own.
fn pointing(image: &Image<'_>, bytes: &[u8], host: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let entry = (bytes.be64(image.l1_at) & OFFSET_MASK) as usize + 16;
    bytes[entry..entry + 8].copy_from_slice(&(host | 1 << 63).to_be_bytes());
    bytes
}

/// A copied flag beside offset 0 in the L1 table says nothing: there is no table, and a write makes one.
#[test]
fn a_flag_without_an_offset_is_no_table() {
    for scene in Scene::all() {
        let mut bytes = scene.image.clone();
        let l1 = Image::parse(&scene.image).unwrap().l1_at as usize;
        assert_eq!(scene.image.be64(l1 as u64 + 16), 0, "{}", scene.name);
        bytes[l1 + 16] = 0x80;
        let memory = scene.storage(&bytes);
        let driver = scene.open(Wrapped::new(memory.clone(), NeverClosed)).unwrap();
        let at = 140 * CLUSTER;
        let request = nbd_img_formats::ZeroRequest {
            provision: nbd_img_formats::Provision::Allocate,
            fast: false,
            durability: Durability::Later,
        };
        driver.write_zeroes(nbd_img_formats::GuestRange::new(at - 640, 320).unwrap(), request).unwrap();
        driver.pwrite(at, &painted(at, CLUSTER, 1), Durability::Later).unwrap();
        driver.close().unwrap();
        let memory: Arc<dyn Storage> = memory;
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_clean(), "{}:\n{report}", scene.name);
        let disk = scene.read(&&*memory).unwrap();
        assert!(disk[at as usize..][..CLUSTER as usize] == painted(at, CLUSTER, 1), "{}", scene.name);
    }
}

/// What an entry of the table is made to name, for which the image must not be written.
fn damages(image: &Image<'_>, bytes: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let owned = bytes.to_vec();
    let l2 = owned.be64(image.l1_at) & OFFSET_MASK;
    let pointing = |host| pointing(image, bytes, host);
    let mut damages = vec![
        ("a data entry names the L1 table", pointing(image.l1_at)),
        ("a data entry names the refcount table", pointing(image.table_at)),
        ("a data entry names a refcount block", pointing(image.refcount_table[0])),
        ("a data entry names an L2 table", pointing(l2)),
    ];
    if let Some(snapshot) = image.snapshots.first() {
        damages.push(("a data entry names a snapshot's L1 table", pointing(snapshot.l1_at)));
        damages.push(("a data entry names the snapshot table", pointing(image.snapshots_at)));
    }
    if let Some((directory, _)) = image.bitmap_directory {
        let bitmap = &image.bitmaps[0];
        damages.push(("a data entry names the directory of bitmaps", pointing(directory)));
        damages.push(("a data entry names a bitmap's table", pointing(bitmap.table_at)));
        damages.push(("a data entry names a bitmap", pointing(owned.be64(bitmap.table_at) & OFFSET_MASK)));
    }
    damages
}

/// Where no bits stay in memory they were recorded before the damage was found: in the clusters of enabled bitmaps, and in
/// free ones.
fn allow_recorded_bits(image: &Image<'_>, bytes: &Vec<u8>, expected: &mut [u8], after: &[u8]) {
    let free = (0..image.file_clusters())
        .filter(|cluster| image.refcount(*cluster) == 0)
        .map(|cluster| cluster * CLUSTER);
    let enabled = image.bitmaps.iter().filter(|bitmap| bitmap.flags == 2);
    let tables =
        enabled.flat_map(|bitmap| (0..bitmap.table_entries).map(|entry| bitmap.table_at + 8 * entry));
    let recorded = tables.map(|at| bytes.be64(at) & OFFSET_MASK).filter(|host| *host != 0);
    for host in free.chain(recorded) {
        let range = host as usize..(host + CLUSTER) as usize;
        if let (Some(to), Some(from)) = (expected.get_mut(range.clone()), after.get(range)) {
            to.copy_from_slice(from);
        }
    }
}

#[test]
fn metadata_is_never_overwritten_by_data() {
    for scene in version_3().into_iter().filter(|scene| scene.content[..64] != [0; 64]) {
        let image = Image::parse(&scene.image).unwrap();
        for (what, bytes) in damages(&image, &scene.image) {
            let name = format!("{}: {what}", scene.name);
            let memory = scene.storage(&bytes);
            let storage: Arc<dyn Storage> = Wrapped::new(memory.clone(), NeverClosed);
            let Ok(driver) = scene.open(Arc::clone(&storage)) else { continue };
            let error = driver.pwrite(2 * CLUSTER, &[0x5a; 512], Durability::Later).expect_err(&name);
            assert_eq!(error.errno(), libc::EIO, "{name}: {error}");
            assert_eq!(driver.state(), State::Failed, "{name}");
            let _ = driver.close();
            let memory: Arc<dyn Storage> = memory;
            let after = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
            let mut expected = bytes.clone();
            expected[INCOMPATIBLE_AT] |= 2;
            // Before it was found out, the enabled bitmap was marked.
            for bitmap in image.bitmaps.iter().filter(|bitmap| bitmap.flags == 2) {
                expected[bitmap.entry_at as usize + 15] |= 1;
            }
            if scene.bitmap_len_max == 0 {
                allow_recorded_bits(&image, &bytes, &mut expected, &after);
            }
            assert!(after[..expected.len()] == expected, "{name}: more than the corrupt bit was written");
            // Refused from now on, and readable.
            let error =
                scene.open(Arc::clone(&storage)).err().unwrap_or_else(|| panic!("{name}: opened again"));
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
            assert!(error.to_string().contains("qemu-img check"), "{name}: {error}");
            let reader = support::scene::open_over(storage, scene.backing_driver(), None, 0).unwrap();
            reader.pread(5 * CLUSTER, &mut [0; 512]).unwrap();
        }
    }
}

/// A free cluster is taken only if its refcount is 0 and nobody uses it: refcounts that are too low lead to
/// an error, never to another's cluster being overwritten.
#[test]
fn refcounts_that_are_too_low_do_not_lose_data() {
    for scene in version_3().into_iter().filter(|scene| scene.content[..64] != [0; 64]) {
        let mut bytes = scene.image.clone();
        let image = Image::parse(&scene.image).unwrap();
        for block in image.refcount_table.iter().filter(|block| **block != 0) {
            // All of them are free, it says.
            bytes[*block as usize..*block as usize + CLUSTER as usize].fill(0);
        }
        let memory = scene.storage(&bytes);
        let Ok(driver) = scene.open(Wrapped::new(memory.clone(), NeverClosed)) else { continue };
        for cluster in [40, 41, 130, 131, 132, 70] {
            // It may succeed: behind the end of the file all is free indeed.
            let at = cluster * CLUSTER;
            let _ = driver.pwrite(at, &painted(at, CLUSTER, 3), Durability::Later);
        }
        let _ = driver.flush();
        let _ = driver.close();
        let memory: Arc<dyn Storage> = memory;
        let bytes = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
        // The tables that were there lead where they led.
        let now = Image::parse(&bytes).unwrap_or_else(|e| panic!("{}: {e}", scene.name));
        assert_eq!((now.l1_at, now.table_at), (image.l1_at, image.table_at), "{}", scene.name);
        let content = support::reader::read_disk(
            &bytes,
            support::reader::Disk::Active,
            scene.backing.as_deref().unwrap_or_default(),
        );
        let content = content.unwrap_or_else(|e| panic!("{}: {e}", scene.name));
        let kept = content[..16 * CLUSTER as usize] == scene.content[..16 * CLUSTER as usize];
        // Without space that is known to be free, nothing tells a free cluster from one in use.
        assert!(kept || scene.device_len.is_some(), "{}", scene.name);
    }
}

#[test]
fn what_cannot_be_written_is_refused_untouched() {
    let refused = |bytes: &[u8], kind: ErrorKind| {
        let memory: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
        let error =
            support::scene::open_over(Arc::clone(&memory), None, Some(Default::default()), 0).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
        let after = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
        assert!(after == bytes, "it was touched");
        let reader = support::scene::open_over(memory, None, None, 0).unwrap();
        read_all(&*reader).unwrap();
    };
    let mut corrupt = maker::Maker::new("cluster_size=64k", 1 << 20).bytes();
    corrupt[INCOMPATIBLE_AT] |= 2;
    refused(&corrupt, ErrorKind::Corrupt);
}
