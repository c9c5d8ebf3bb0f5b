//! Images that are written while the backing file which they name is left out, or is another one: what was zeroed then
//! is zeroes to whoever opens them with it, as when the layers of a disk are restored one by one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;

use std::path::PathBuf;

use nbd_img_formats::open::{Backing, OpenOptions, SizeChange, open, resize};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, Provision, ZeroRequest};
use qcow2_support::{Folder, qemu, qemu_bytes};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const DISK_LEN: u64 = 4 * MIB;

/// What the base is full of, and what is written over it.
const BELOW: u8 = 7;
const WRITTEN: u8 = 5;

/// One overlay of a full base, beside a base of the same size that has nothing and one that is short.
struct Rig {
    folder: Folder,
    image: PathBuf,
}

impl Rig {
    fn new(options: &str) -> Self {
        let folder = Folder::new();
        std::fs::write(folder.file("base.raw"), vec![BELOW; DISK_LEN as usize]).unwrap();
        std::fs::write(folder.file("empty.raw"), vec![0; DISK_LEN as usize]).unwrap();
        std::fs::write(folder.file("short.raw"), vec![BELOW; 4096]).unwrap();
        let image = folder.file("top.qcow2");
        let base = folder.file("base.raw");
        let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-o", options, "-b"];
        qemu("qemu-img", args.into_iter().chain([base.to_str().unwrap(), image.to_str().unwrap()]));
        Self { folder, image }
    }

    fn open(&self, backing: Backing, zeroes_as_qemu: bool) -> Arc<dyn BlockDriver> {
        let options = OpenOptions { writable: true, backing, zeroes_as_qemu, ..OpenOptions::default() };
        open(&self.image, &options).unwrap().driver
    }

    /// Shortens it, or makes it longer with zeroes where the base has something.
    fn resize_with_qemu(&self, to: u64) {
        qemu("qemu-img", ["resize", "-q", "--shrink", self.image.to_str().unwrap(), &to.to_string()]);
    }

    /// The disk as QEMU reads it over the base that the image names.
    fn read(&self) -> Vec<u8> {
        qemu("qemu-img", ["check", "-q", self.image.to_str().unwrap()]);
        qemu_bytes(&self.folder, &self.image, &[])
    }
}

fn range(offset: u64, len: u64) -> GuestRange {
    GuestRange::new(offset, len).unwrap()
}

fn zeroes(provision: Provision, fast: bool) -> ZeroRequest {
    ZeroRequest { provision, fast, durability: Durability::Later }
}

#[track_caller]
fn assert_all(what: &str, disk: &[u8], (offset, len): (u64, u64), byte: u8) {
    let part = &disk[offset as usize..(offset + len) as usize];
    let at = part.iter().position(|is| *is != byte);
    assert_eq!(at, None, "{what}: {:#x}", offset + at.unwrap_or(0) as u64);
}

#[test]
fn zeroes_stay_when_the_backing_file_is_back() {
    let options = ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "compat=0.10"];
    for options in options {
        for provision in [Provision::Unmap, Provision::Keep] {
            let rig = Rig::new(options);
            let (empty, short) = (rig.folder.file("empty.raw"), rig.folder.file("short.raw"));
            for backing in [Backing::None, Backing::Path(empty), Backing::Path(short)] {
                let what = format!("{options} {provision:?} {backing:?}");
                // Each in a part of its own: whole clusters, parts of some, and what was written before.
                let (whole, parts, data) = ((MIB, 256 * KIB), (2 * MIB + 700, 100_000), (3 * MIB, 3000));
                let driver = rig.open(backing, false);
                driver.pwrite(data.0, &[WRITTEN; 128 << 10], Durability::Later).unwrap();
                for (offset, len) in [whole, parts, data, (3 * MIB + 64 * KIB, 64 * KIB)] {
                    // As a session does it: what costs nothing first.
                    if !driver.try_write_zeroes(range(offset, len), zeroes(provision, false)).unwrap() {
                        driver.write_zeroes(range(offset, len), zeroes(provision, false)).unwrap();
                    }
                }
                driver.close().unwrap();
                let disk = rig.read();
                assert_all(&what, &disk, (0, MIB), BELOW);
                assert_all(&what, &disk, whole, 0);
                assert_all(&what, &disk, parts, 0);
                assert_all(&what, &disk, data, 0);
                assert_all(&what, &disk, (3 * MIB + 3000, 64 * KIB - 3000), WRITTEN);
                assert_all(&what, &disk, (3 * MIB + 64 * KIB, 64 * KIB), 0);
            }
        }
    }
}

/// A discard promises nothing, but what was there before the image does not come back by it.
#[test]
fn a_discard_does_not_bring_the_base_back() {
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let rig = Rig::new(options);
        let driver = rig.open(Backing::None, false);
        driver.pwrite(0, &[WRITTEN; 128 << 10], Durability::Later).unwrap();
        driver.discard(range(0, 128 * KIB), Durability::Later).unwrap();
        driver.close().unwrap();
        assert_all(options, &rig.read(), (0, 128 * KIB), 0);
    }
}

/// Version 2 has no zeroes but those of a disk that nobody ever has anything below of.
#[test]
fn version_2_says_that_it_has_to_write() {
    let rig = Rig::new("compat=0.10");
    let driver = rig.open(Backing::None, false);
    assert!(!driver.facts().fast_zero);
    let refused = driver.write_zeroes(range(0, 64 * KIB), zeroes(Provision::Unmap, true)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WouldBeSlow);
}

/// A longer disk has no entries in its new part: what the base has there would come to light when it is back.
#[test]
fn it_does_not_become_longer_over_what_is_not_there() {
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on"] {
        let rig = Rig::new(options);
        rig.resize_with_qemu(MIB);
        let longer = 2 * MIB;
        for backing in [Backing::None, Backing::Path(rig.folder.file("empty.raw"))] {
            // A feature that nobody here knows, whose bit the first change clears.
            let mut bytes = std::fs::read(&rig.image).unwrap();
            bytes[88] |= 0x40;
            std::fs::write(&rig.image, &bytes).unwrap();
            let driver = rig.open(backing.clone(), false);
            let refused = driver.resize(longer).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
            assert!(std::fs::read(&rig.image).unwrap() == bytes, "it was changed");
            assert!(refused.to_string().contains("without --backing"), "{refused}");
            assert_eq!(driver.size(), MIB);
            driver.resize(MIB / 2).unwrap();
            assert_eq!(driver.resize(MIB).unwrap_err().kind(), ErrorKind::InvalidInput);
            driver.close().unwrap();
            rig.resize_with_qemu(MIB);
            let offline = OpenOptions { backing, ..OpenOptions::default() };
            let refused = resize(&rig.image, SizeChange::To(longer), false, &offline).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        }
        let driver = rig.open(Backing::Follow, false);
        driver.resize(longer).unwrap();
        driver.close().unwrap();
        let disk = rig.read();
        assert_eq!(disk.len() as u64, longer);
        assert_all(options, &disk, (0, MIB / 2), BELOW);
        assert_all(options, &disk, (MIB / 2, longer - MIB / 2), 0);
    }
    // Where the image names nothing there is nothing to come back.
    let folder = Folder::new();
    let image = folder.create("alone.qcow2", "", MIB);
    let wanted = OpenOptions { writable: true, backing: Backing::None, ..OpenOptions::default() };
    let driver = open(&image, &wanted).unwrap().driver;
    driver.resize(2 * MIB).unwrap();
    driver.close().unwrap();
}

/// On demand, zeroes are told by the allocation also in an image that names no backing file, and take no room, whatever
/// was asked for; version 2 cannot.
#[test]
fn zeroes_as_qemu_has_them() {
    for (options, marked, zeroes_as_qemu) in
        [("", true, true), ("", false, false), ("extended_l2=on", true, true), ("compat=0.10", false, true)]
    {
        let folder = Folder::new();
        let image = folder.create("image.qcow2", options, DISK_LEN);
        let wanted = OpenOptions { writable: true, zeroes_as_qemu, ..OpenOptions::default() };
        let driver = open(&image, &wanted).unwrap().driver;
        driver.write_zeroes(range(0, 64 * KIB), zeroes(Provision::Unmap, true)).unwrap();
        if marked {
            driver.write_zeroes(range(64 * KIB, 64 * KIB), zeroes(Provision::Allocate, true)).unwrap();
        }
        // This asks for nothing that could be told.
        driver.discard(range(MIB, MIB), Durability::Later).unwrap();
        driver.close().unwrap();
        qemu("qemu-img", ["check", "-q", image.to_str().unwrap()]);
        let map = qemu("qemu-img", ["map", "--output=json", image.to_str().unwrap()]).stdout;
        let map = String::from_utf8(map).unwrap();
        let first = map.lines().next().unwrap();
        assert_eq!(map.lines().count(), 1 + usize::from(marked), "{options} {zeroes_as_qemu}: {map}");
        let told = first.contains("\"length\": 131072,")
            && first.contains("\"present\": true, \"zero\": true, \"data\": false")
            && !first.contains("offset");
        assert_eq!(told, marked, "{options} {zeroes_as_qemu}: {first}");
    }
}
