//! Images with extended L2 entries, written: QEMU's cases for them (its test 271) as our own, and single
//! promises.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::ops::RangeInclusive;

use nbd_img_formats::plan::{MapMode, Place, WritePlan};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{Change, Log, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, Provision, Storage, ZeroRequest};
use qcow2_support::{Folder, qemu, qemu_io, read_all, status_runs};
use qcow2_write_support::{assert_image, bytes_of, open_with};
use support::image::{Image, OFFSET_MASK};
use support::wrapped::{NeverClosed, Wrapped};

const KIB: u64 = 1 << 10;
/// Clusters of 64 KiB, so subclusters of 2 KiB.
const CLUSTER: u64 = 64 * KIB;

/// An image in memory over a backing file of 0xff, or over nothing, and what its disk has to hold.
struct Bench {
    folder: Folder,
    memory: Arc<MemoryStorage>,
    driver: Arc<dyn BlockDriver>,
    log: Arc<Log>,
    disk: Vec<u8>,
    backing: bool,
    pattern: u8,
}

impl Bench {
    fn new(size: u64, backing: bool) -> Bench {
        let folder = Folder::new();
        let image = folder.file("image.qcow2");
        let size_text = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", "extended_l2=on"];
        let base = folder.file("base.raw");
        std::fs::write(&base, vec![0xff; size as usize]).unwrap();
        if backing {
            args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
        }
        args.extend([image.to_str().unwrap(), &size_text]);
        qemu("qemu-img", args);
        let disk = vec![if backing { 0xff } else { 0 }; size as usize];
        Bench::over(folder, disk, backing)
    }

    /// Over the image in the folder.
    fn over(folder: Folder, disk: Vec<u8>, backing: bool) -> Bench {
        let memory = MemoryStorage::copy_of(&std::fs::read(folder.file("image.qcow2")).unwrap()).unwrap();
        let log = Log::new();
        let kept = Wrapped::new(Arc::clone(&memory) as Arc<dyn Storage>, NeverClosed);
        let below = backing.then(|| -> Arc<dyn BlockDriver> {
            let base = MemoryStorage::copy_of(&std::fs::read(folder.file("base.raw")).unwrap()).unwrap();
            RawDriver::open(base, RawOptions::default()).unwrap()
        });
        let driver = open_with(log.attach(kept).unwrap(), below, 1 << 20, Default::default()).unwrap();
        Bench { folder, memory, driver, log, disk, backing, pattern: 0 }
    }

    fn range(&mut self, at: u64, len: u64) -> (GuestRange, &mut [u8]) {
        (GuestRange::new(at, len).unwrap(), &mut self.disk[at as usize..(at + len) as usize])
    }

    fn write(&mut self, at: u64, len: u64) {
        self.pattern += 1;
        let bytes = vec![self.pattern; len as usize];
        self.range(at, len).1.copy_from_slice(&bytes);
        self.driver.pwrite(at, &bytes, Durability::Later).unwrap();
        self.check();
    }

    fn zero(&mut self, at: u64, len: u64, provision: Provision) {
        let (range, bytes) = self.range(at, len);
        bytes.fill(0);
        let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
        self.driver.write_zeroes(range, request).unwrap();
        self.check();
    }

    /// Whole clusters read as zeroes afterwards, and all else stays.
    fn discard(&mut self, at: u64, len: u64) {
        let (start, end) = (at.next_multiple_of(CLUSTER), (at + len) / CLUSTER * CLUSTER);
        self.range(start, end.saturating_sub(start)).1.fill(0);
        self.driver.discard(GuestRange::new(at, len).unwrap(), Durability::Later).unwrap();
        self.check();
    }

    fn check(&self) {
        assert!(read_all(&*self.driver) == self.disk, "another content");
        let mut at = 0;
        for (len, _, zero) in status_runs(&*self.driver) {
            let bytes = &self.disk[at as usize..(at + len) as usize];
            assert!(!zero || bytes.iter().all(|byte| *byte == 0), "called zero from {at}");
            at += len;
        }
    }

    /// The subclusters of a cluster that are data, and those that are zeroes, as the file has them.
    fn bitmaps(&self, cluster: u64) -> (u32, u32) {
        self.driver.flush().unwrap();
        let bytes = bytes_of(&*self.memory);
        let image = Image::parse(&bytes).unwrap();
        let table = u64::from_be_bytes(bytes[image.l1_at as usize..][..8].try_into().unwrap()) & OFFSET_MASK;
        let bitmap = if table == 0 { 0 } else { image.l2_bitmaps(table)[cluster as usize] };
        (bitmap as u32, (bitmap >> 32) as u32)
    }

    /// `zero` counts where a backing file would show else; without one, nothing is as good.
    fn expect(&self, cluster: u64, data: &[RangeInclusive<u32>], zero: &[RangeInclusive<u32>]) {
        let mask = |ranges: &[RangeInclusive<u32>]| {
            ranges.iter().cloned().flatten().fold(0u32, |mask, index| mask | 1 << index)
        };
        let (is_data, is_zero) = self.bitmaps(cluster);
        assert_eq!(is_data, mask(data), "data of cluster {cluster}: {is_data:032b}");
        assert!(!self.backing || is_zero == mask(zero), "zeroes of cluster {cluster}: {is_zero:032b}");
        assert_eq!(is_data & is_zero, 0);
    }

    /// QEMU finds nothing wrong, and reads the same.
    fn close(self) {
        self.driver.close().unwrap();
        let image = self.folder.file("image.qcow2");
        std::fs::write(&image, bytes_of(&*self.memory)).unwrap();
        assert_image(&self.folder, &image, &self.disk);
    }
}

const ALL: RangeInclusive<u32> = 0..=31;

#[test]
fn writes_allocate_what_they_touch() {
    for backing in [true, false] {
        let mut bench = Bench::new(1 << 20, backing);
        // At the beginning, in the middle and at the end of a subcluster; all of one, of three, parts of three.
        for (at, len, data) in [
            (0, KIB, 0..=0),
            (3 * KIB, 512, 0..=1),
            (5 * KIB, KIB, 0..=2),
            (6 * KIB, 2 * KIB, 0..=3),
            (8 * KIB, 6 * KIB, 0..=6),
            (15 * KIB, 4 * KIB, 0..=9),
        ] {
            bench.write(at, len);
            bench.expect(0, &[data], &[]);
        }
        bench.write(32 * KIB, KIB);
        bench.expect(0, &[0..=9, 16..=16], &[]);
        bench.write(63 * KIB, 4 * KIB);
        bench.expect(0, &[0..=9, 16..=16, 31..=31], &[]);
        bench.expect(1, &[0..=1], &[]);
        bench.zero(2 * KIB, 2 * KIB, Provision::Keep);
        bench.expect(0, &[0..=0, 2..=9, 16..=16, 31..=31], &[1..=1]);
        bench.zero(0, CLUSTER, Provision::Keep);
        bench.expect(0, &[], &[ALL]);
        bench.write(0, CLUSTER);
        bench.expect(0, &[ALL], &[]);
        // Half a cluster does not give it back.
        bench.zero(0, CLUSTER / 2, Provision::Unmap);
        bench.expect(0, &[16..=31], &[0..=15]);
        bench.zero(0, CLUSTER, Provision::Unmap);
        bench.expect(0, &[], &[ALL]);
        bench.write(3 * KIB, 512);
        bench.expect(0, &[1..=1], &[0..=0, 2..=31]);
        bench.write(0, CLUSTER);
        bench.discard(10 * KIB, CLUSTER);
        bench.expect(0, &[ALL], &[]);
        bench.discard(0, CLUSTER);
        bench.expect(0, &[], &[ALL]);
        bench.zero(0, CLUSTER, Provision::Allocate);
        bench.expect(0, &[ALL], &[]);
        bench.close();
    }
}

#[test]
fn a_write_over_several_clusters() {
    let mut bench = Bench::new(1 << 20, false);
    bench.write(24 * KIB, 40 * KIB);
    bench.expect(0, &[12..=31], &[]);
    bench.write(CLUSTER + 26 * KIB, 2 * KIB);
    bench.expect(1, &[13..=13], &[]);
    bench.write(2 * CLUSTER + 28 * KIB, 2 * KIB);
    bench.zero(2 * CLUSTER + 28 * KIB, 2 * KIB, Provision::Keep);
    bench.expect(2, &[], &[14..=14]);
    bench.write(3 * CLUSTER, 34 * KIB);
    bench.expect(3, &[0..=16], &[]);
    bench.write(24 * KIB, 192 * KIB);
    bench.expect(0, &[12..=31], &[]);
    bench.expect(1, &[ALL], &[]);
    bench.expect(2, &[ALL], &[]);
    bench.expect(3, &[0..=16], &[]);
    bench.close();
}

/// The size is no multiple of a cluster nor of a subcluster.
#[test]
fn zeroes() {
    for (backing, provision) in [
        (true, Provision::Keep),
        (true, Provision::Unmap),
        (false, Provision::Keep),
        (false, Provision::Unmap),
    ] {
        let mut bench = Bench::new(2083 * KIB, backing);
        // Where a backing file shows at the ends, they are copied; else zeroes are as good.
        let ends = |index: u32| if backing { vec![index..=index] } else { Vec::new() };
        bench.zero(0, 3 * CLUSTER, provision);
        (0..3).for_each(|cluster| bench.expect(cluster, &[], &[ALL]));
        bench.zero(3 * CLUSTER + 32 * KIB, 2 * CLUSTER, provision);
        bench.expect(3, &[], &[16..=31]);
        bench.expect(4, &[], &[ALL]);
        bench.expect(5, &[], &[0..=15]);
        bench.zero(6 * CLUSTER + 31 * KIB, 2 * CLUSTER, provision);
        bench.expect(6, &ends(15), &[16..=31]);
        bench.expect(7, &[], &[ALL]);
        bench.expect(8, &ends(15), &[0..=14]);
        bench.write(9 * CLUSTER, 9 * CLUSTER);
        bench.zero(9 * CLUSTER, 3 * CLUSTER, provision);
        (9..12).for_each(|cluster| bench.expect(cluster, &[], &[ALL]));
        bench.zero(12 * CLUSTER + 32 * KIB, 2 * CLUSTER, provision);
        bench.expect(12, &[0..=15], &[16..=31]);
        bench.expect(13, &[], &[ALL]);
        bench.expect(14, &[16..=31], &[0..=15]);
        bench.zero(15 * CLUSTER + 31 * KIB, 2 * CLUSTER, provision);
        bench.expect(15, &[0..=15], &[16..=31]);
        bench.expect(16, &[], &[ALL]);
        bench.expect(17, &[15..=31], &[0..=14]);
        bench.zero(30 * CLUSTER + 31 * KIB, 8 * KIB, provision);
        bench.expect(30, &[ends(15), ends(19)].concat(), &[16..=18]);
        bench.zero(32 * CLUSTER, 35 * KIB, provision);
        let (data, zero) = bench.bitmaps(32);
        assert!(data == 0 && (!backing || zero & 0x3_ffff == 0x3_ffff), "{data:x} {zero:x}");
        bench.write(2083 * KIB - 700, 700);
        bench.expect(32, &[17..=17], &[0..=16, 18..=31]);
        bench.close();
    }
}

/// A compressed cluster has no subclusters: a part of it becomes one that has all of them.
#[test]
fn compressed_clusters() {
    for backing in [true, false] {
        let bench = Bench::new(1 << 20, backing);
        let (folder, mut disk) = (bench.folder, bench.disk);
        qemu_io(&folder.file("image.qcow2"), &["write -c -P 7 0 64k".to_owned()]);
        for (cluster, command) in
            [(1, "write -c -P 8 64k 64k"), (2, "write -c -P 8 128k 64k"), (3, "write -c -P 8 192k 64k")]
        {
            qemu_io(&folder.file("image.qcow2"), &[command.to_owned()]);
            disk[cluster << 16..(cluster + 1) << 16].fill(8);
        }
        disk[..CLUSTER as usize].fill(7);
        let mut bench = Bench::over(folder, disk, backing);
        bench.expect(0, &[], &[]);
        bench.write(3 * KIB, 512);
        bench.expect(0, &[ALL], &[]);
        bench.zero(CLUSTER + 32 * KIB, CLUSTER + 32 * KIB, Provision::Unmap);
        bench.expect(1, &[ALL], &[]);
        bench.expect(2, &[], &[ALL]);
        bench.write(3 * CLUSTER, CLUSTER);
        bench.expect(3, &[ALL], &[]);
        bench.close();
    }
}

/// Of a cluster that a snapshot shares, what is data goes along, and nothing else.
#[test]
fn shared_clusters() {
    for backing in [true, false] {
        let bench = Bench::new(1 << 20, backing);
        let (folder, mut disk) = (bench.folder, bench.disk);
        let image = folder.file("image.qcow2");
        let commands = ["write -P 7 8k 4k", "write -P 7 40k 2k", "write -z 20k 4k", "write -P 7 64k 64k"];
        qemu_io(&image, &commands.map(str::to_owned));
        qemu("qemu-img", ["snapshot", "-c", "first", image.to_str().unwrap()]);
        disk[8 << 10..12 << 10].fill(7);
        disk[40 << 10..42 << 10].fill(7);
        disk[20 << 10..24 << 10].fill(0);
        disk[64 << 10..128 << 10].fill(7);
        let mut bench = Bench::over(folder, disk, backing);
        bench.expect(0, &[4..=5, 20..=20], &[10..=11]);
        bench.write(50 * KIB + 100, 300);
        bench.expect(0, &[4..=5, 20..=20, 25..=25], &[10..=11]);
        // Zeroes in a shared cluster need no other one.
        bench.zero(CLUSTER, 4 * KIB, Provision::Unmap);
        bench.expect(1, &[2..=31], &[0..=1]);
        bench.write(CLUSTER + 100, 300);
        bench.expect(1, &[0..=0, 2..=31], &[1..=1]);
        bench.close();
    }
}

/// Both halves of an entry go to the file in one piece of one sector.
#[test]
fn entries_are_written_whole() {
    let mut bench = Bench::new(1 << 20, true);
    for cluster in 0..10 {
        bench.write(cluster * CLUSTER + 3 * KIB, 512);
        bench.driver.flush().unwrap();
        bench.zero(cluster * CLUSTER + 10 * KIB, 9 * KIB, Provision::Unmap);
        bench.driver.flush().unwrap();
    }
    let bytes = bytes_of(&*bench.memory);
    let image = Image::parse(&bytes).unwrap();
    let table = u64::from_be_bytes(bytes[image.l1_at as usize..][..8].try_into().unwrap()) & OFFSET_MASK;
    let mut seen = 0;
    for record in bench.log.records() {
        let Change::Write { at, bytes, .. } = record.change else { continue };
        if (table..table + CLUSTER).contains(&at.0) {
            assert!(at.0.is_multiple_of(16) && bytes.len().is_multiple_of(16), "{at}: {} bytes", bytes.len());
            seen += 1;
        }
    }
    assert!(seen >= 19, "{seen} writes of entries");
    bench.close();
}

/// What is data already is overwritten in place, by a plan that waits for nothing and is durable by itself; so
/// is a new part of a cluster that is there, where it is whole subclusters.
#[test]
fn in_place_by_subclusters() {
    let mut bench = Bench::new(1 << 20, true);
    bench.write(4 * KIB, 8 * KIB);
    bench.driver.flush().unwrap();
    let plan_of = |at: u64, len: u64| {
        let mut plan = WritePlan::default();
        bench.driver.prepare_write(GuestRange::new(at, len).unwrap(), MapMode::Try, &mut plan).unwrap();
        let data = plan.pieces.iter().all(|piece| matches!(piece.place, Place::Data { .. }));
        let durable = plan.durable_in_place;
        bench.driver.finish_write(&mut plan, false).unwrap();
        (data, durable)
    };
    assert_eq!(plan_of(5 * KIB, 3000), (true, true));
    assert_eq!(plan_of(12 * KIB, 4 * KIB), (true, false), "new subclusters");
    assert_eq!(plan_of(11 * KIB, 2 * KIB), (false, false), "the backing file shows in the second one");
    bench.check();
    let fast = ZeroRequest { provision: Provision::Unmap, fast: true, durability: Durability::Later };
    let aligned = GuestRange::new(4 * KIB, 2 * KIB).unwrap();
    assert!(bench.driver.try_write_zeroes(aligned, ZeroRequest { fast: false, ..fast }).unwrap());
    bench.disk[4 << 10..6 << 10].fill(0);
    bench.driver.write_zeroes(GuestRange::new(8 * KIB, 2 * KIB).unwrap(), fast).unwrap();
    bench.disk[8 << 10..10 << 10].fill(0);
    let slow = bench.driver.write_zeroes(GuestRange::new(11 * KIB, 512).unwrap(), fast).unwrap_err();
    assert_eq!(slow.kind(), ErrorKind::WouldBeSlow);
    bench.check();
    bench.close();
}

/// Refcounts that were put off are rebuilt, with subclusters as without.
#[test]
fn a_dirty_image_is_repaired() {
    let folder = Folder::new();
    let image = folder.create("image.qcow2", "extended_l2=on,lazy_refcounts=on", 1 << 20);
    qemu_io(&image, &["write -P 5 100k 300k".to_owned()]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[79] |= 1;
    let block = Image::parse(&bytes).unwrap().refcount_table[0] as usize;
    bytes[block + 10..block + 40].fill(0);
    std::fs::write(&image, bytes).unwrap();
    let mut disk = vec![0; 1 << 20];
    disk[100 << 10..400 << 10].fill(5);
    let mut bench = Bench::over(folder, disk, false);
    bench.write(700, 512);
    bench.close();
}
