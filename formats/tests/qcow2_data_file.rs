//! Images with an external data file, written: QEMU's cases for it (its test 244) as our own, and single
//! promises.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::path::{Path, PathBuf};

use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::plan::{MapMode, Place, ReadPlan, WritePlan};
use nbd_img_formats::storage::{CallClass, Change, Fault, Faults, FileId, Log, MemoryOptions, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, Format, GuestRange, HostOffset, Provision, State, Storage,
    ZeroRequest,
};
use qcow2_support::{Folder, qemu_io, read_all, status_runs};
use qcow2_write_support::{assert_image, bytes_of};
use support::image::Image;
use support::scene::open_parts;
use support::wrapped::{NeverClosed, Wrapped};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const IMAGE: FileId = FileId(0);
const DATA: FileId = FileId(1);

/// An image in a folder, and its data file `data` beside it.
fn create(folder: &Folder, options: &str, size: u64) -> PathBuf {
    let data = folder.file("data");
    folder.create("image.qcow2", &format!("data_file={}{options}", data.to_str().unwrap()), size)
}

fn writable() -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() }
}

fn open_file(image: &Path) -> Arc<dyn BlockDriver> {
    open(image, &writable()).unwrap_or_else(|e| panic!("{e}")).driver
}

fn range(at: u64, len: u64) -> GuestRange {
    GuestRange::new(at, len).unwrap()
}

fn zeroes(provision: Provision) -> ZeroRequest {
    ZeroRequest { provision, fast: false, durability: Durability::Later }
}

/// Both files in memory, and what is done to them.
struct Recorded {
    image: Arc<MemoryStorage>,
    data: Arc<MemoryStorage>,
    log: Arc<Log>,
    driver: Arc<dyn BlockDriver>,
}

impl Recorded {
    fn new(folder: &Folder, options: &str, size: u64) -> Recorded {
        let image = MemoryStorage::copy_of(&std::fs::read(create(folder, options, size)).unwrap()).unwrap();
        let data = std::fs::read(folder.file("data")).unwrap();
        assert!(data.iter().all(|byte| *byte == 0));
        // All of it a hole, as in the file.
        Recorded::over(image, MemoryStorage::new(data.len() as u64).unwrap())
    }

    fn over(image: Arc<MemoryStorage>, data: Arc<MemoryStorage>) -> Recorded {
        let log = Log::new();
        let kept = |memory: &Arc<MemoryStorage>| {
            log.attach(Wrapped::new(Arc::clone(memory) as Arc<dyn Storage>, NeverClosed)).unwrap()
        };
        let (recorded_image, recorded_data) = (kept(&image), kept(&data));
        let driver =
            open_parts(recorded_image, Some(recorded_data), None, Some(Default::default()), 1 << 20).unwrap();
        Recorded { image, data, log, driver }
    }

    /// The numbers of the records of a file that `is` says yes to.
    fn records(&self, file: FileId, is: impl Fn(&Change) -> bool) -> Vec<usize> {
        let records = self.log.records().into_iter().enumerate();
        records
            .filter(|(_, record)| record.file == file && is(&record.change))
            .map(|(number, _)| number)
            .collect()
    }

    fn punches(&self) -> Vec<usize> {
        self.records(DATA, |change| matches!(change, Change::Zero { .. } | Change::Discard { .. }))
    }

    fn close(self) -> Files {
        self.driver.close().unwrap();
        let (image, data) = (bytes_of(&*self.image), bytes_of(&*self.data));
        Files { image, data }
    }
}

struct Files {
    image: Vec<u8>,
    data: Vec<u8>,
}

impl Files {
    /// QEMU finds nothing wrong, and reads `disk`.
    fn check(&self, folder: &Folder, disk: &[u8]) {
        std::fs::write(folder.file("data"), &self.data).unwrap();
        std::fs::write(folder.file("image.qcow2"), &self.image).unwrap();
        assert_image(folder, &folder.file("image.qcow2"), disk);
    }
}

/// What is written, discarded and zeroed in QEMU's test 244, by QEMU and by the driver.
fn layout_by_qemu(image: &Path) {
    let commands = ["write -P 0x11 1M 4M", "discard 2M 2M", "write -z 3M 3M"].map(str::to_owned);
    qemu_io(image, &commands);
}

fn layout(driver: &dyn BlockDriver) {
    driver.pwrite(MIB, &vec![0x11; 4 * MIB as usize], Durability::Later).unwrap();
    driver.discard(range(2 * MIB, 2 * MIB), Durability::Later).unwrap();
    driver.write_zeroes(range(3 * MIB, 3 * MIB), zeroes(Provision::Keep)).unwrap();
}

fn expected_layout(size: u64) -> Vec<u8> {
    let mut disk = vec![0; size as usize];
    disk[MIB as usize..2 * MIB as usize].fill(0x11);
    disk
}

#[test]
fn the_layout_of_244() {
    for options in ["", ",data_file_raw=on"] {
        let (ours, theirs) = (Folder::new(), Folder::new());
        let image = create(&ours, options, 64 * MIB);
        let image_len = std::fs::metadata(&image).unwrap().len();
        let driver = open_file(&image);
        layout(&*driver);
        let zero_runs = |driver: &dyn BlockDriver| {
            let mut runs: Vec<(u64, bool)> = Vec::new();
            for (len, _, zero) in status_runs(driver) {
                match runs.last_mut() {
                    Some((last, same)) if *same == zero => *last += len,
                    _ => runs.push((len, zero)),
                }
            }
            runs
        };
        // QEMU has written the first block of the file, so what is before this may be data.
        assert!(zero_runs(&*driver).ends_with(&[(MIB, false), (62 * MIB, true)]), "{options}");
        driver.close().unwrap();
        let disk = expected_layout(64 * MIB);
        assert_image(&ours, &image, &disk);
        let their_image = create(&theirs, options, 64 * MIB);
        layout_by_qemu(&their_image);
        assert_image(&theirs, &their_image, &disk);
        // The data is in the data file, at the guest's offsets, and not in the image.
        let data = std::fs::read(ours.file("data")).unwrap();
        assert!(data[MIB as usize..2 * MIB as usize] == disk[MIB as usize..2 * MIB as usize]);
        assert!(std::fs::metadata(&image).unwrap().len() <= image_len + 4 * 64 * KIB, "data in the image");
        if !options.is_empty() {
            assert!(data == disk, "who reads the raw file alone sees something else");
        }
    }
}

/// Offset 0 of a data file is a place like any other; QEMU and the driver see the same there.
#[test]
fn the_first_cluster() {
    for options in ["", ",data_file_raw=on"] {
        let folder = Folder::new();
        let image = create(&folder, options, 64 * MIB);
        let driver = open_file(&image);
        driver.pwrite(0, &vec![0x11; MIB as usize], Durability::Later).unwrap();
        assert_eq!(status_runs(&*driver)[0], (MIB, false, false));
        driver.pwrite(100, &[0x22; 200], Durability::Fua).unwrap();
        for provision in [Provision::Keep, Provision::Unmap, Provision::Allocate] {
            driver.write_zeroes(range(0, 64 * KIB), zeroes(provision)).unwrap();
            driver.flush().unwrap();
            driver.pwrite(1000, &[0x33; 200], Durability::Later).unwrap();
        }
        driver.close().unwrap();
        let mut disk = vec![0; 64 * MIB as usize];
        disk[..MIB as usize].fill(0x11);
        disk[..64 * KIB as usize].fill(0);
        disk[1000..1200].fill(0x33);
        assert_image(&folder, &image, &disk);
    }
}

#[test]
fn a_flush_syncs_the_data_file_before_the_entries() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, "", MIB);
    recorded.driver.pwrite(0, &[7; 100], Durability::Later).unwrap();
    recorded.driver.flush().unwrap();
    let is_sync = |change: &Change| *change == Change::Sync;
    let data_syncs = recorded.records(DATA, is_sync);
    let image_syncs = recorded.records(IMAGE, is_sync);
    assert_eq!((data_syncs.len(), image_syncs.len()), (1, 2));
    let entries = recorded.records(IMAGE, |change| matches!(change, Change::Write { .. }));
    assert!(entries.iter().all(|write| data_syncs[0] < *write), "an entry goes before its data");
    recorded.driver.close().unwrap();
}

/// A failed sync of either file is final, for both.
#[test]
fn a_failed_sync_of_either_file_is_final() {
    let folder = Folder::new();
    let image = std::fs::read(create(&folder, "", MIB)).unwrap();
    for fails in [IMAGE, DATA] {
        let faults = Faults::new();
        let memory = |bytes: &[u8]| MemoryStorage::copy_of(bytes).unwrap() as Arc<dyn Storage>;
        let failing = |file, storage: Arc<dyn Storage>| -> Arc<dyn Storage> {
            if file == fails { faults.attach(storage) } else { storage }
        };
        let data = failing(DATA, memory(&vec![0; MIB as usize]));
        let driver =
            open_parts(failing(IMAGE, memory(&image)), Some(data), None, Some(Default::default()), 0)
                .unwrap();
        driver.pwrite(0, &[7; 100], Durability::Later).unwrap();
        faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(0) });
        assert!(driver.flush().is_err());
        faults.disarm();
        assert_eq!(driver.state(), State::Failed);
        assert_eq!(driver.flush().unwrap_err().errno(), libc::EIO);
        assert_eq!(driver.pwrite(0, &[7; 100], Durability::Later).unwrap_err().errno(), libc::EIO);
    }
}

/// The room of a cluster goes when the loss of its entry is durable, and not before.
#[test]
fn punched_when_the_loss_is_durable() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, "", 16 * MIB);
    let driver = &recorded.driver;
    driver.pwrite(0, &vec![7; 8 * MIB as usize], Durability::Fua).unwrap();
    let before = recorded.data.allocated_len().unwrap();
    driver.discard(range(0, 4 * MIB), Durability::Later).unwrap();
    driver.write_zeroes(range(4 * MIB, 2 * MIB), zeroes(Provision::Unmap)).unwrap();
    assert!(recorded.punches().is_empty());
    driver.make_durable().unwrap();
    assert!(recorded.punches().is_empty());
    driver.tidy();
    let punches = recorded.punches();
    assert_eq!(punches.len(), 1, "neighbours go together");
    let last_sync = recorded.records(IMAGE, |change| *change == Change::Sync).pop().unwrap();
    assert!(last_sync < punches[0]);
    assert!(recorded.data.allocated_len().unwrap() <= before - 6 * MIB);
    let disk = read_all(&**driver);
    recorded.close().check(&folder, &disk);
}

/// What was discarded and written again before the discard was durable is not punched any more.
#[test]
fn what_is_written_again_is_not_punched() {
    let folder = Folder::new();
    for flushed_between in [false, true] {
        let recorded = Recorded::new(&folder, "", MIB);
        let driver = &recorded.driver;
        let mut disk = vec![0; MIB as usize];
        driver.pwrite(0, &[7; 256 << 10], Durability::Fua).unwrap();
        disk[..256 << 10].fill(7);
        for round in 0..3u8 {
            driver.discard(range(0, 192 * KIB), Durability::Later).unwrap();
            disk[..192 << 10].fill(0);
            if flushed_between {
                driver.make_durable().unwrap();
            }
            driver.pwrite(64 * KIB + 5000, &[8 + round; 100], Durability::Later).unwrap();
            disk[(64 << 10) + 5000..][..100].fill(8 + round);
            assert!(read_all(&**driver) == disk, "round {round}");
        }
        driver.flush().unwrap();
        driver.tidy();
        assert!(read_all(&**driver) == disk);
        driver.pwrite(64 * KIB, &[9; 10], Durability::Later).unwrap();
        disk[64 << 10..][..10].fill(9);
        assert!(read_all(&**driver) == disk);
        recorded.close().check(&folder, &disk);
    }
}

/// A plan that is held keeps the bytes of its clusters from being punched.
#[test]
fn a_pin_keeps_the_bytes() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, "", MIB);
    let driver = &recorded.driver;
    driver.pwrite(0, &[7; 64 << 10], Durability::Fua).unwrap();
    let mut plan = ReadPlan::default();
    driver.map_read(range(0, 64 * KIB), MapMode::Try, &mut plan).unwrap();
    assert!(matches!(plan.pieces[0].place, Place::Data { at: HostOffset(0), .. }));
    driver.write_zeroes(range(0, 64 * KIB), zeroes(Provision::Unmap)).unwrap();
    driver.flush().unwrap();
    assert!(recorded.punches().is_empty());
    plan.reset();
    driver.flush().unwrap();
    assert_eq!(recorded.punches().len(), 1);
    recorded.close().check(&folder, &vec![0; MIB as usize]);
}

/// Old content of a data file is never seen, wherever no entry leads to it.
#[test]
fn old_content_does_not_show() {
    let folder = Folder::new();
    let image = std::fs::read(create(&folder, ",cluster_size=4k", MIB)).unwrap();
    for device in [false, true] {
        let options = MemoryOptions { len: MIB, grows: !device, poisoned: device };
        let data = MemoryStorage::with(options).unwrap();
        data.pwrite(&vec![0xee; MIB as usize], HostOffset(0), Durability::Later).unwrap();
        // A hole between, which the first write there finds.
        data.zero(
            nbd_img_formats::HostRange::new(HostOffset(512 * KIB), 64 * KIB).unwrap(),
            Provision::Unmap,
            false,
        )
        .unwrap();
        let recorded = Recorded::over(MemoryStorage::copy_of(&image).unwrap(), data);
        let mut disk = vec![0; MIB as usize];
        for at in (0..MIB).step_by(7 * 1024 + 512) {
            recorded.driver.pwrite(at, &[7; 300], Durability::Later).unwrap();
            disk[at as usize..][..300].fill(7);
        }
        assert!(read_all(&*recorded.driver) == disk);
        recorded.driver.write_zeroes(range(0, 300 * KIB), zeroes(Provision::Unmap)).unwrap();
        recorded.driver.write_zeroes(range(300 * KIB + 17, 100 * KIB), zeroes(Provision::Allocate)).unwrap();
        disk[..300 << 10].fill(0);
        disk[(300 << 10) + 17..][..100 << 10].fill(0);
        recorded.driver.pwrite(4096 + 5, &[9; 5], Durability::Later).unwrap();
        disk[4096 + 5..][..5].fill(9);
        assert!(read_all(&*recorded.driver) == disk);
        recorded.close().check(&folder, &disk);
    }
}

/// In a hole of the data file the first write waits, and tells of the rest of the hole.
#[test]
fn writes_into_a_hole_do_not_wait() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, "", 64 * MIB);
    let driver = &recorded.driver;
    let slow = |at: u64| {
        let mut plan = WritePlan::default();
        driver.prepare_write(range(at, 512), MapMode::Try, &mut plan).unwrap();
        let slow = matches!(plan.pieces[0].place, Place::Slow(_));
        driver.finish_write(&mut plan, true).unwrap();
        slow
    };
    assert!(slow(5 * MIB), "there is no table yet");
    driver.pwrite(5 * MIB, &[1; 512], Durability::Later).unwrap();
    for cluster in 1..600 {
        assert!(!slow(5 * MIB + cluster * 64 * KIB), "cluster {cluster}");
    }
    // What was punched is known, too.
    driver.pwrite(6 * MIB, &[1; 512], Durability::Fua).unwrap();
    driver.discard(range(6 * MIB, 64 * KIB), Durability::Later).unwrap();
    driver.flush().unwrap();
    assert!(!slow(6 * MIB + 4096));
    let mut disk = vec![0; 64 * MIB as usize];
    disk[5 * MIB as usize..][..512].fill(1);
    assert!(read_all(&**driver) == disk);
    recorded.close().check(&folder, &disk);
}

/// A raw data file shows the guest's view at any time, and entries that lead to it stay.
#[test]
fn a_raw_data_file_is_the_disk() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, ",data_file_raw=on", MIB);
    let driver = &recorded.driver;
    let same = |what: &str| assert!(bytes_of(&*recorded.data) == read_all(&**driver), "{what}");
    driver.pwrite(0, &vec![7; MIB as usize], Durability::Later).unwrap();
    same("written");
    for (number, provision) in
        [Provision::Unmap, Provision::Keep, Provision::Allocate].into_iter().enumerate()
    {
        driver.write_zeroes(range(number as u64 * 200_000, 150_000), zeroes(provision)).unwrap();
        same("zeroed");
    }
    driver.discard(range(700_000, 200_000), Durability::Later).unwrap();
    same("discarded");
    let fast = ZeroRequest { fast: true, ..zeroes(Provision::Unmap) };
    driver.write_zeroes(range(10, 100_000), fast).unwrap();
    same("zeroed fast");
    driver.flush().unwrap();
    assert!(recorded.records(IMAGE, |change| *change != Change::Sync).is_empty(), "the image was written");
    let disk = read_all(&**driver);
    recorded.close().check(&folder, &disk);
}

/// A raw data file that is shorter than the disk becomes as long before the first change, and only then.
#[test]
fn a_short_raw_data_file_becomes_as_long_as_the_disk() {
    let folder = Folder::new();
    let image = create(&folder, ",data_file_raw=on", MIB);
    std::fs::write(folder.file("data"), [5; 1000]).unwrap();
    let driver = open_file(&image);
    let mut disk = vec![0; MIB as usize];
    disk[..1000].fill(5);
    assert!(read_all(&*driver) == disk);
    driver.flush().unwrap();
    driver.close().unwrap();
    assert_eq!(std::fs::metadata(folder.file("data")).unwrap().len(), 1000);
    let driver = open_file(&image);
    driver.pwrite(2000, &[6; 10], Durability::Later).unwrap();
    disk[2000..2010].fill(6);
    driver.close().unwrap();
    assert!(std::fs::read(folder.file("data")).unwrap() == disk);
    assert_image(&folder, &image, &disk);
}

/// The promise that a raw data file can be read alone is kept, so its bit stays; bits that nobody knows go.
#[test]
fn the_bit_of_a_raw_data_file_stays() {
    let folder = Folder::new();
    let recorded = Recorded::new(&folder, ",data_file_raw=on", MIB);
    recorded.image.pwrite(&(1u64 << 40 | 2).to_be_bytes(), HostOffset(88), Durability::Later).unwrap();
    let recorded = Recorded::over(recorded.image, recorded.data);
    recorded.driver.pwrite(0, &[1; 10], Durability::Later).unwrap();
    let files = recorded.close();
    assert_eq!(files.image[88..96], 2u64.to_be_bytes());
    let mut disk = vec![0; MIB as usize];
    disk[..10].fill(1);
    files.check(&folder, &disk);
}

/// A device with room for the disk and no byte more is enough.
#[test]
fn a_device_as_long_as_the_disk() {
    let folder = Folder::new();
    let size = MIB + 3 * 512;
    let image = std::fs::read(create(&folder, "", size)).unwrap();
    let device = |len| MemoryStorage::with(MemoryOptions { len, grows: false, poisoned: true }).unwrap();
    let recorded = Recorded::over(MemoryStorage::copy_of(&image).unwrap(), device(size));
    let driver = &recorded.driver;
    driver.pwrite(size - 600, &[7; 600], Durability::Later).unwrap();
    driver.write_zeroes(range(size - 100, 100), zeroes(Provision::Allocate)).unwrap();
    driver.write_zeroes(range(MIB - 64 * KIB, size - MIB + 64 * KIB), zeroes(Provision::Allocate)).unwrap();
    driver.pwrite(size - 512, &[8; 512], Durability::Later).unwrap();
    let mut disk = vec![0; size as usize];
    disk[size as usize - 512..].fill(8);
    assert!(read_all(&**driver) == disk);
    recorded.close().check(&folder, &disk);
    let image = MemoryStorage::copy_of(&image).unwrap();
    let short = open_parts(image, Some(device(size - 512)), None, Some(Default::default()), 0);
    assert_eq!(short.err().unwrap().kind(), ErrorKind::InvalidInput);
}

/// `NO_HOLE`: there is room in the data file afterwards.
#[test]
fn zeroes_with_room_have_it_in_the_data_file() {
    let folder = Folder::new();
    for options in ["", ",data_file_raw=on"] {
        let recorded = Recorded::new(&folder, options, 4 * MIB);
        recorded.driver.write_zeroes(range(MIB, 2 * MIB), zeroes(Provision::Allocate)).unwrap();
        assert!(recorded.data.allocated_len().unwrap() >= 2 * MIB);
        assert!(read_all(&*recorded.driver) == vec![0; 4 * MIB as usize]);
        recorded.close().check(&folder, &vec![0; 4 * MIB as usize]);
    }
}

/// Refcounts that were put off are rebuilt; the clusters of a data file are not counted.
#[test]
fn a_dirty_image_is_repaired() {
    let folder = Folder::new();
    let image = create(&folder, ",lazy_refcounts=on", MIB);
    qemu_io(&image, &["write -P 5 100k 300k".to_owned()]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[79] |= 1;
    let parsed = Image::parse(&bytes).unwrap();
    let block = parsed.refcount_table[0] as usize;
    bytes[block + 6..block + 20].fill(0);
    std::fs::write(&image, bytes).unwrap();
    let driver = open_file(&image);
    driver.pwrite(0, &[6; 100], Durability::Later).unwrap();
    driver.close().unwrap();
    let mut disk = vec![0; MIB as usize];
    disk[100 << 10..400 << 10].fill(5);
    disk[..100].fill(6);
    assert_image(&folder, &image, &disk);
}
