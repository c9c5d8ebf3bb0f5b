//! Dirty bitmaps of images that are written: a model of dirty granules beside the model of the disk, kept over many
//! openings by us and by QEMU in turn, and the promises about when a bitmap may be relied on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use nbd_img_formats::driver::{Status, StatusVisitor};
use nbd_img_formats::info::ImageInfo;
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::plan::{MapMode, ReadPlan, WritePlan};
use nbd_img_formats::qcow2::{Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::{CallClass, Change, Fault, Faults, Log, MemoryStorage};
use nbd_img_formats::sync::{Arc, Mutex};
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, Facts, Format, GuestRange, HostOffset, Result, State, StatusQuery,
    Storage, ZeroRequest,
};
use qcow2_support::{Folder, qemu, qemu_bytes, qemu_io};
use qcow2_write_support::{assert_clean, bytes_of, open_with};
use support::image::Image;
use support::model::{Model, run_operations};
use support::random::Random;
use support::wrapped::{NeverClosed, Wrapped};

const MIB: u64 = 1 << 20;
/// What the model of dirty granules is kept in: the smallest granularity.
const UNIT: u64 = 512;

/// A driver, and what was asked of it to change, in units.
struct Watched {
    inner: Arc<dyn BlockDriver>,
    dirty: Arc<Mutex<Vec<bool>>>,
    discards: bool,
}

impl Watched {
    fn note(&self, range: GuestRange, outcome: Result<()>) -> Result<()> {
        if outcome.is_ok() && !range.is_empty() {
            let (first, last) = (range.offset() / UNIT, (range.end() - 1) / UNIT);
            self.dirty.lock()[first as usize..=last as usize].fill(true);
        }
        outcome
    }
}

impl BlockDriver for Watched {
    fn facts(&self) -> &Facts {
        self.inner.facts()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn state(&self) -> State {
        self.inner.state()
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        self.inner.storages()
    }

    fn info(&self) -> Result<ImageInfo> {
        self.inner.info()
    }

    fn map_read(&self, range: GuestRange, mode: MapMode, plan: &mut ReadPlan) -> Result<()> {
        self.inner.map_read(range, mode, plan)
    }

    fn read_slow(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_slow(offset, buf)
    }

    fn prepare_write(&self, range: GuestRange, mode: MapMode, plan: &mut WritePlan) -> Result<()> {
        self.note(range, self.inner.prepare_write(range, mode, plan))
    }

    fn finish_write(&self, plan: &mut WritePlan, written: bool) -> Result<()> {
        self.inner.finish_write(plan, written)
    }

    fn write_slow(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_slow(offset, buf)
    }

    fn write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<()> {
        self.note(range, self.inner.write_zeroes(range, request))
    }

    fn try_write_zeroes(&self, range: GuestRange, request: ZeroRequest) -> Result<bool> {
        self.inner
            .try_write_zeroes(range, request)
            .and_then(|done| if done { self.note(range, Ok(())).map(|()| true) } else { Ok(false) })
    }

    fn discard(&self, range: GuestRange, durability: Durability) -> Result<()> {
        let outcome = self.inner.discard(range, durability);
        if self.discards { self.note(range, outcome) } else { outcome }
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn offer_bitmap(&self, name: &str) -> Result<bool> {
        self.inner.offer_bitmap(name)
    }

    fn status(&self, query: StatusQuery<'_>, range: GuestRange, visitor: StatusVisitor<'_>) -> Result<()> {
        self.inner.status(query, range, visitor)
    }

    fn cache(&self, range: GuestRange) -> Result<()> {
        self.inner.cache(range)
    }

    fn close(&self) -> Result<()> {
        self.inner.close()
    }
}

/// An image with enabled bitmaps `on-G` for each granularity, and a disabled one.
struct Rig {
    name: &'static str,
    path: PathBuf,
    folder: Folder,
    granularities: &'static [u64],
    discard: bool,
    bitmap_len_max: u64,
}

impl Rig {
    fn new(name: &'static str, options: &str, size: u64, granularities: &'static [u64]) -> Self {
        let folder = Folder::new();
        let options = options.replace("FOLDER", folder.path().to_str().unwrap());
        let path = folder.create("image.qcow2", &options, size);
        let image = path.to_str().unwrap();
        qemu("qemu-img", ["bitmap", "--add", "-g", "512", image, "off"]);
        qemu_io(&path, &["write 512 1024".to_owned()]);
        qemu("qemu-img", ["bitmap", "--disable", image, "off"]);
        for granularity in granularities {
            let name = format!("on-{granularity}");
            qemu("qemu-img", ["bitmap", "--add", "-g", &granularity.to_string(), image, &name]);
        }
        let OpenOptions { discard, bitmap_len_max, .. } = OpenOptions::default();
        Rig { name, path, folder, granularities, discard, bitmap_len_max }
    }

    fn open(&self, dirty: &Arc<Mutex<Vec<bool>>>) -> Arc<dyn BlockDriver> {
        let options = OpenOptions {
            format: Some(Format::Qcow2),
            writable: true,
            discard: self.discard,
            bitmap_len_max: self.bitmap_len_max,
            table_cache_len: 1 << 20,
            ..OpenOptions::default()
        };
        let inner = open(&self.path, &options).unwrap_or_else(|e| panic!("{}: {e}", self.name)).driver;
        for granularity in self.granularities {
            assert!(inner.offer_bitmap(&format!("on-{granularity}")).unwrap());
        }
        assert!(inner.offer_bitmap("off").unwrap());
        Arc::new(Watched { inner, dirty: Arc::clone(dirty), discards: self.discard })
    }

    /// A status tells what the model says, while the image is being written.
    fn check_live(&self, driver: &dyn BlockDriver, dirty: &[bool]) {
        for granularity in self.granularities {
            let name = format!("on-{granularity}");
            assert_eq!(told(driver, &name), coarse(dirty, *granularity), "{}: {name}", self.name);
        }
        let off = told(driver, "off");
        assert_eq!(off.iter().filter(|set| **set).count(), 2, "{}", self.name);
    }

    /// So does the file, to a reader of its own.
    fn check_file(&self, dirty: &[bool]) {
        assert_clean(&self.path);
        let bytes = std::fs::read(&self.path).unwrap();
        let image = Image::parse(&bytes).unwrap();
        assert_eq!(image.bitmaps.len(), self.granularities.len() + 1);
        for bitmap in &image.bitmaps {
            let bits = image.dirty_granules(bitmap);
            if bitmap.name == "off" {
                assert_eq!((bitmap.flags, bits.iter().filter(|set| **set).count()), (0, 2), "{}", self.name);
                continue;
            }
            assert_eq!(bitmap.flags, 2, "{}: {}", self.name, bitmap.name);
            let expected = coarse(dirty, 1 << bitmap.granularity_bits);
            assert!(bits == expected, "{}: {}", self.name, bitmap.name);
        }
    }

    /// QEMU writes here and there.
    fn qemu_writes(&self, dirty: &mut [bool], content: &mut [u8], random: &mut Random) {
        let units = dirty.len() as u64;
        let mut commands = Vec::new();
        for _ in 0..3 {
            let (at, len) = (random.below(units), 1 + random.below(20));
            let len = len.min(units - at);
            commands.push(format!("write -P 77 {} {}", at * UNIT, len * UNIT));
            dirty[at as usize..(at + len) as usize].fill(true);
            content[(at * UNIT) as usize..((at + len) * UNIT) as usize].fill(77);
        }
        qemu_io(&self.path, &commands);
    }

    fn run(self) {
        let mut random = Random::new(Random::seed(self.name));
        let mut content = qemu_bytes(&self.folder, &self.path, &[]);
        let units = (content.len() as u64).div_ceil(UNIT);
        let dirty = Arc::new(Mutex::new(vec![false; units as usize]));
        for round in 0..6 {
            let driver = self.open(&dirty);
            let model = Model {
                name: self.name,
                content: content.clone(),
                len_max: (content.len() as u64 / 8).min(100_000),
                discarded: &[0],
                reopen: None,
            };
            let driver = run_operations(driver, model, if round == 3 { 0 } else { 60 });
            self.check_live(&*driver, &dirty.lock());
            content = qcow2_support::read_all(&*driver);
            driver.close().unwrap();
            self.check_file(&dirty.lock());
            if (content.len() as u64).is_multiple_of(UNIT) {
                self.qemu_writes(&mut dirty.lock(), &mut content, &mut random);
                self.check_file(&dirty.lock());
            }
        }
    }
}

/// The model in granules.
fn coarse(dirty: &[bool], granularity: u64) -> Vec<bool> {
    dirty.chunks((granularity / UNIT) as usize).map(|units| units.contains(&true)).collect()
}

/// What the driver tells of the bitmap, one value for each granule.
fn told(driver: &dyn BlockDriver, name: &str) -> Vec<bool> {
    let info = driver.info().unwrap();
    let granularity = info.bitmaps.iter().find(|bitmap| bitmap.name == name).unwrap().granularity;
    let mut bits = Vec::new();
    let range = GuestRange::new(0, driver.size()).unwrap();
    let visit = &mut |len: u64, status| {
        let dirty = status == Status::Bitmap { dirty: true };
        bits.extend(std::iter::repeat_n(dirty, len.div_ceil(granularity) as usize));
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap(name), range, visit).unwrap();
    bits
}

#[test]
fn small_clusters_and_tables_of_many() {
    Rig::new("small clusters", "cluster_size=512", 4 * MIB, &[512, 4096]).run();
}

#[test]
fn usual_clusters() {
    Rig::new("usual clusters", "", 16 * MIB, &[512, 65536, MIB]).run();
}

#[test]
fn large_clusters_and_an_odd_end() {
    Rig::new("large clusters", "cluster_size=2M,refcount_bits=1", 5 * MIB + 512, &[512, 2 * MIB]).run();
}

/// The bitmaps lie in the image, whatever lies in the data file.
#[test]
fn external_data_files() {
    Rig::new("data file", "data_file=FOLDER/data", 4 * MIB, &[512, 65536]).run();
    let options = "cluster_size=4k,data_file=FOLDER/data,data_file_raw=on";
    Rig::new("raw data file", options, 4 * MIB, &[512, 65536]).run();
}

/// Bits that go into the file before the next write, or now and then, into all sorts of clusters.
#[test]
fn spilled_bits() {
    let small = "cluster_size=512";
    for (name, options, size, granularities, bitmap_len_max) in [
        ("spilled at once", small, 8 * MIB, &[512, 4096][..], 0),
        ("spilled", small, 8 * MIB, &[512, 4096], 1000),
        ("spilled, usual clusters", "", 24 * MIB, &[512, 65536], 0),
        ("spilled, large clusters", "cluster_size=2M,refcount_bits=1", 5 * MIB + 512, &[512, 2 * MIB], 0),
        ("spilled, data file", "cluster_size=4k,data_file=FOLDER/data", 4 * MIB, &[512, 65536], 0),
    ] {
        Rig { bitmap_len_max, ..Rig::new(name, options, size, granularities) }.run();
    }
}

#[test]
fn discards_that_are_ignored_are_not_recorded() {
    let rig = Rig::new("ignored discards", "cluster_size=4k", 2 * MIB, &[512]);
    Rig { discard: false, ..rig }.run();
}

/// An image in memory with an enabled bitmap.
fn image_in_memory(options: &str) -> Arc<MemoryStorage> {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", options, MIB);
    qemu("qemu-img", ["bitmap", "--add", "-g", "64k", path.to_str().unwrap(), "on"]);
    MemoryStorage::copy_of(&std::fs::read(&path).unwrap()).unwrap()
}

/// Opens it for writing, to be looked at after the close.
fn open_writable(storage: &Arc<MemoryStorage>) -> Result<Arc<Qcow2Driver>> {
    open_with(Wrapped::new(storage.clone(), NeverClosed), None, 0, WriteOptions::default())
}

/// Where the bitmaps' header extension begins.
fn extension_of(bytes: &[u8]) -> usize {
    bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap()
}

fn flags_in(bytes: &[u8]) -> u32 {
    Image::parse(&bytes.to_vec()).unwrap().bitmaps[0].flags
}

/// Before anything of the guest is written the mark is durable, at once with a sync; and opening alone marks nothing.
#[test]
fn the_mark_is_durable_before_the_first_change() {
    let log = Log::new();
    let recording = log.attach(image_in_memory("")).unwrap();
    let driver = open_with(recording, None, 0, WriteOptions::default()).unwrap();
    let mut buf = [0; 512];
    driver.pread(0, &mut buf).unwrap();
    driver.flush().unwrap();
    let before = log.records().iter().filter(|record| record.change != Change::Sync).count();
    assert_eq!(before, 0, "nothing is written by reading and flushing");
    let opened = log.len();
    driver.pwrite(4096, &[1; 512], Durability::Later).unwrap();
    let records = log.records();
    assert!(matches!(&records[opened].change, Change::Write { bytes, .. } if **bytes == [0, 0, 0, 3]));
    assert_eq!(records[opened + 1].change, Change::Sync);
    // A second write marks nothing again.
    let marked = log.len();
    driver.pwrite(4096, &[2; 512], Durability::Later).unwrap();
    let writes = log.records().split_off(marked);
    assert!(writes.iter().all(|record| record.change != Change::Sync));
    driver.close().unwrap();
}

/// Whoever does not get to the close leaves the bitmap in use, and whoever comes next leaves it alone.
#[test]
fn without_a_close_the_bitmap_is_not_to_be_relied_on() {
    let storage = image_in_memory("");
    let driver = open_writable(&storage).unwrap();
    driver.pwrite(0, &[1; 512], Durability::Fua).unwrap();
    let killed = MemoryStorage::copy_of(&bytes_of(&*storage)).unwrap();
    assert_eq!(flags_in(&bytes_of(&*killed)), 3);
    let driver = open_writable(&killed).unwrap();
    let error = driver.offer_bitmap("on").err().unwrap();
    assert!(error.to_string().contains("full backup"), "{error}");
    driver.pwrite(128 << 10, &[1; 512], Durability::Later).unwrap();
    driver.close().unwrap();
    assert_eq!(flags_in(&bytes_of(&*killed)), 3);
}

/// What a closing image does not take any more is not written either: it could not be stored.
#[test]
fn a_closed_image_takes_no_writes() {
    let storage = image_in_memory("");
    let driver = open_writable(&storage).unwrap();
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    driver.close().unwrap();
    assert!(driver.pwrite(0, &[2; 512], Durability::Later).is_err());
    assert_eq!(flags_in(&bytes_of(&*storage)), 2);
}

/// A bitmap that QEMU calls inconsistent because of us can be removed by it, and leaves nothing behind.
#[test]
fn qemu_removes_what_a_crash_has_left() {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", "", MIB);
    let name = path.to_str().unwrap();
    qemu("qemu-img", ["bitmap", "--add", name, "on"]);
    let storage = MemoryStorage::copy_of(&std::fs::read(&path).unwrap()).unwrap();
    let driver = open_writable(&storage).unwrap();
    driver.pwrite(0, &[1; 512], Durability::Fua).unwrap();
    std::fs::write(&path, bytes_of(&*storage)).unwrap();
    let said = info_of(&path);
    assert_eq!(said["flags"], serde_json::json!(["in-use", "auto"]));
    qemu("qemu-img", ["bitmap", "--remove", name, "on"]);
    assert_clean(&path);
}

fn info_of(path: &Path) -> serde_json::Value {
    let info = qemu("qemu-img", ["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    info["format-specific"]["data"]["bitmaps"][0].clone()
}

/// Bitmaps that a program without knowledge of them has left behind: they are none, and stay none.
#[test]
fn without_its_bit_in_the_header_no_bitmap_is_kept() {
    let storage = image_in_memory("");
    storage.pwrite(&[0; 8], HostOffset(88), Durability::Later).unwrap();
    let before = bytes_of(&*storage);
    let driver = open_writable(&storage).unwrap();
    assert!(!driver.offer_bitmap("on").unwrap());
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    driver.close().unwrap();
    let after = bytes_of(&*storage);
    assert_eq!(after[88..96], [0; 8]);
    // What they occupy is not handed out: their counts stay.
    let parsed = Image::parse(&after).unwrap();
    let directory = u64::from_be_bytes(before[extension_of(&before) + 24..][..8].try_into().unwrap());
    assert_eq!(parsed.refcount(directory >> parsed.cluster_bits), 1);
}

/// Other autoclear bits lose their promise with the first change, that of the bitmaps stays.
#[test]
fn unknown_autoclear_bits_are_cleared_beside_bitmaps() {
    let storage = image_in_memory("");
    storage.pwrite(&[0x80, 0, 0, 0, 0, 0, 0, 1], HostOffset(88), Durability::Later).unwrap();
    let driver = open_writable(&storage).unwrap();
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    assert_eq!(bytes_of(&*storage)[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
    driver.close().unwrap();
    assert_eq!(bytes_of(&*storage)[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
}

/// What could not be kept as it wants to be keeps the image from being written, by name, and nothing is touched.
#[test]
fn bitmaps_that_cannot_be_kept_are_refused() {
    let good = bytes_of(&*image_in_memory(""));
    let extension = extension_of(&good);
    let directory = u64::from_be_bytes(good[extension + 24..extension + 32].try_into().unwrap()) as usize;
    let cases: [(&str, usize, &[u8], ErrorKind); 6] = [
        ("an unknown flag", directory + 15, &[2 | 8], ErrorKind::Unsupported),
        ("an unknown type", directory + 16, &[2], ErrorKind::Unsupported),
        ("a table in the header", directory, &[0; 8], ErrorKind::Unsupported),
        ("a table behind the end", directory, &[0, 1, 0, 0, 0, 0, 0, 0], ErrorKind::Corrupt),
        ("too long a table", directory + 11, &[2], ErrorKind::Corrupt),
        ("no directory", extension + 8, &[0, 0, 0, 2], ErrorKind::Corrupt),
    ];
    for (what, at, with, kind) in cases {
        let mut bytes = good.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        let storage = MemoryStorage::copy_of(&bytes).unwrap();
        let error = open_writable(&storage).err();
        let error = error.unwrap_or_else(|| panic!("{what} is taken"));
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert_eq!(bytes_of(&*storage), bytes, "{what}");
    }
}

/// Nothing is stored, and no mark cleared, once the image has failed.
#[test]
fn a_failed_image_leaves_its_marks() {
    let inner = image_in_memory("");
    let faults = Faults::new();
    let failing = faults.attach(Wrapped::new(inner.clone(), NeverClosed));
    let driver = open_with(failing, None, 0, WriteOptions::default()).unwrap();
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
    assert!(driver.flush().is_err());
    assert_eq!((faults.fired(), driver.state()), (1, State::Failed));
    let _ = driver.close();
    assert_eq!(flags_in(&bytes_of(&*inner)), 3);
}
