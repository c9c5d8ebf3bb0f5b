//! Target `qcow2_write`: a small image, its metadata damaged, and operations on it.
//!
//! Whatever the damage: no panic, no hang, no great allocation, and what is opened read-only stays as it is. An
//! image that is sound in the eyes of the tests' own checker (some damage does not matter) has to do much more:
//! every operation succeeds, the guest reads what it wrote, and after the close the checker finds neither
//! corruption nor leaks, the snapshots as they were, a raw data file as the disk, and bitmaps that tell of all
//! changes. So does an image that was dirty and was repaired.

use std::ops::ControlFlow;

use arbitrary::{Result, Unstructured};
use nbd_img_formats::driver::Status;
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::qcow2::Qcow2Driver;
use nbd_img_formats::storage::{MemoryOptions, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, HostOffset, Provision, ReadPlan, StatusQuery, Storage,
    ZeroRequest,
};

use super::damage::damaged;
use super::judge::{Judged, REFCOUNT_TABLE_CLUSTERS_MAX, look_at};
use super::open::{How, STRAY_DATA_LEN, bytes_of, open};
use super::recorded::Recorded;
use super::small::{Shape, Small, content};
use crate::support::image::Bytes;
use crate::support::session;

/// Most operations of one input.
const OPERATIONS_MAX: usize = 24;
/// The incompatible feature (specification).
const DIRTY: u64 = 1;

/// Decodes the input and does what it says.
pub fn run(input: &[u8]) {
    let _ = decode(&mut Unstructured::new(input));
}

fn decode(u: &mut Unstructured<'_>) -> Result<()> {
    let shape = Shape::arbitrary(u)?;
    let image = shape.image();
    let bytes = damaged(&image, u)?;
    let backing = content(0, 0, shape.backing_len.unwrap_or(3000));
    let data = data_storage(&image);
    match u.int_in_range(0..=7)? {
        0 => read_only(&bytes, data, &backing, u),
        how => {
            let whole = bytes == image.bytes;
            let written = Written::new(bytes, data, backing, how == 1);
            if whole {
                written.assert_strict(&image);
            }
            written.operations(u)
        }
    }
}

/// The data file of an image, or one for an image that was not to have any.
fn data_storage(image: &Small) -> Arc<MemoryStorage> {
    let Some(outside) = image.shape.features.data_file else {
        return MemoryStorage::new(STRAY_DATA_LEN).unwrap();
    };
    let len = if outside.device { image.shape.size() } else { 0 };
    let options = MemoryOptions { len, grows: !outside.device, poisoned: outside.device };
    let storage = MemoryStorage::with(options).unwrap();
    storage.pwrite(&image.data, HostOffset(0), Durability::Later).unwrap();
    storage
}

fn read_only(
    bytes: &Vec<u8>,
    data: Arc<MemoryStorage>,
    backing: &[u8],
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let storage = MemoryStorage::copy_of(bytes).unwrap();
    let snapshot = u.arbitrary::<bool>()?.then_some("snap");
    let how = How { backing, data: Some(&data), snapshot, writable: false, table_cache_len: 0 };
    let Ok(driver) = open(&storage, &how) else { return Ok(()) };
    let judged = look_at(bytes, &data, backing).filter(|judged| judged.report.is_sound());
    let model = match (snapshot, judged) {
        (None, Some(judged)) => Some(judged.content),
        (Some(_), Some(judged)) => judged.snapshots.into_iter().next(),
        (_, None) => None,
    };
    let _ = driver.info();
    while !u.is_empty() {
        let range = range(driver.size(), shape_cluster_len(bytes), u)?;
        read(&driver, range, model.as_deref());
        status(&driver, range, model.as_deref());
        assert!(driver.pwrite(0, &[1], Durability::Later).is_err());
        let _ = driver.flush();
    }
    let _ = driver.close();
    assert!(bytes_of(&storage).is_some_and(|now| now == *bytes), "a read-only image has been changed");
    Ok(())
}

/// An image that is written, and what is known of it.
struct Written {
    storage: Arc<MemoryStorage>,
    /// The data file, where the image has one.
    data: Arc<MemoryStorage>,
    backing: Vec<u8>,
    /// Writes end where the file does.
    device: bool,
    driver: Option<Arc<Qcow2Driver>>,
    /// Of a sound image: what the guest sees.
    model: Option<Vec<u8>>,
    snapshots: Vec<Vec<u8>>,
    bitmaps: Recorded,
    /// A raw data file is the disk.
    raw_is_disk: bool,
    /// Nothing is leaked.
    clean: bool,
    /// Plans of readers that take their time.
    held: Vec<ReadPlan>,
    cluster_len: u64,
    step: u64,
}

impl Written {
    fn new(bytes: Vec<u8>, data: Arc<MemoryStorage>, backing: Vec<u8>, device: bool) -> Self {
        let len = bytes.len() as u64;
        let cluster_len = shape_cluster_len(&bytes);
        let room = if device { len.next_multiple_of(cluster_len) + 12 * cluster_len } else { 0 };
        let options = MemoryOptions { len: room, grows: !device, poisoned: device };
        let storage = MemoryStorage::with(options).unwrap();
        storage.pwrite(&bytes, HostOffset(0), Durability::Later).unwrap();
        let mut written = Written {
            storage,
            data,
            backing,
            device,
            driver: None,
            model: None,
            snapshots: Vec::new(),
            bitmaps: Recorded::default(),
            raw_is_disk: false,
            clean: false,
            held: Vec::new(),
            cluster_len,
            step: 0,
        };
        let judged = written.look_at().filter(|judged| judged.report.is_sound());
        let dirty = bytes.be32(4) == 3 && bytes.be64(72) & DIRTY != 0;
        written.open();
        if written.driver.is_some() {
            written.believe(judged, dirty);
        }
        written
    }

    /// Takes what the checker says of the image for what is to be kept.
    fn believe(&mut self, judged: Option<Judged>, dirty: bool) {
        let judged = match dirty {
            false => judged,
            true => {
                let repaired = self.look_at();
                // By the format two entries may lead to one cluster of data if it is counted twice, and nobody knows
                // whose it was: so it stays, and who writes copies it first. It cannot be judged any further, for when
                // one of them has gone the other lacks its copied flag, which does no harm, but is wrong to any check.
                // Data in an L2 table is counted twice, too: QEMU's check, which the repair follows, sees nothing
                // wrong with it, and nothing is ever written there.
                if let Some(Judged { report, .. }) = &repaired {
                    let sound = report.corruptions.is_empty() && !report.dirty && !report.corrupt;
                    assert!(sound, "a repair has left this behind:\n{report}");
                }
                repaired.filter(|judged| judged.report.is_sound())
            }
        };
        if let (Some(judged), Some(driver)) = (judged, &self.driver) {
            self.clean = judged.report.has_no_leaks();
            self.snapshots = judged.snapshots;
            self.bitmaps = Recorded::new(judged.bitmaps, driver);
            self.raw_is_disk = judged.raw.is_some_and(|raw| raw == judged.content);
            self.model = Some(judged.content);
        }
    }

    /// That an image without damage is taken for what it is, or nothing would be asked of it.
    fn assert_strict(&self, image: &Small) {
        assert!(self.model.is_some(), "{:?} is not judged", image.shape);
        assert_eq!(self.bitmaps.len(), image.bitmaps, "{:?}: bitmaps", image.shape);
        assert_eq!(self.raw_is_disk, image.shape.features.is_raw(), "{:?}: raw data file", image.shape);
    }

    fn look_at(&self) -> Option<Judged> {
        look_at(&bytes_of(&self.storage)?, &self.data, &self.backing)
    }

    fn open(&mut self) {
        let (backing, data) = (&*self.backing, Some(&self.data));
        let how = How { backing, data, snapshot: None, writable: true, table_cache_len: 0 };
        match open(&self.storage, &how) {
            Ok(driver) => self.driver = Some(driver),
            Err(error) => assert!(self.model.is_none(), "a sound image is not opened again: {error}"),
        }
    }

    fn operations(mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut outcome = Ok(());
        for _ in 0..OPERATIONS_MAX {
            let Some(driver) = self.driver.clone() else { return Ok(()) };
            if u.is_empty() || outcome.is_err() {
                break;
            }
            self.step += 1;
            outcome = self.operation(&driver, u);
        }
        self.close();
        Ok(())
    }

    fn operation(&mut self, driver: &Arc<Qcow2Driver>, u: &mut Unstructured<'_>) -> Result<()> {
        let kind = u.int_in_range(0..=15)?;
        let range = range(driver.size(), self.cluster_len, u)?;
        match kind {
            0..=4 => self.write(driver, range, u)?,
            5..=7 => self.zero(driver, range, u)?,
            8 | 9 => self.discard(driver, range),
            10 => read(driver, range, self.model.as_deref()),
            11 => {
                status(driver, range, self.model.as_deref());
                self.bitmaps.check_status(driver);
                let cached = driver.cache(range);
                self.expect(cached);
            }
            12 => {
                let flushed = driver.flush();
                self.expect(flushed);
                if let Some(bytes) = self.model.as_ref().and_then(|_| bytes_of(&self.storage)) {
                    self.bitmaps.check_in_use(&bytes);
                }
            }
            13 if !self.device => self.hold(driver, range),
            13 | 14 => {
                self.held.pop();
            }
            _ => {
                self.close();
                self.open();
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        driver: &Arc<Qcow2Driver>,
        range: GuestRange,
        u: &mut Unstructured<'_>,
    ) -> Result<()> {
        let how: u8 = u.arbitrary()?;
        let bytes = content(100 + self.step, range.offset(), range.len());
        let durability = if how & 7 == 7 { Durability::Fua } else { Durability::Later };
        let outcome = if how & 8 != 0 {
            session::write(&**driver, range.offset(), &bytes, durability)
        } else {
            driver.pwrite(range.offset(), &bytes, durability)
        };
        self.changed(driver, range, outcome, &[&bytes]);
        Ok(())
    }

    fn zero(&mut self, driver: &Arc<Qcow2Driver>, range: GuestRange, u: &mut Unstructured<'_>) -> Result<()> {
        let how: u8 = u.arbitrary()?;
        let provision = match how & 3 {
            0 => Provision::Allocate,
            1 => Provision::Keep,
            _ => Provision::Unmap,
        };
        let all = GuestRange::new(0, driver.size()).filter(|_| how & 0x70 == 0x70);
        let request = ZeroRequest { provision, fast: how & 8 != 0, durability: Durability::Later };
        let range = all.unwrap_or(range);
        let outcome = driver.write_zeroes(range, request);
        if request.fast && outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBeSlow) {
            self.bitmaps.change(range, false);
            read(driver, range, self.model.as_deref());
            return Ok(());
        }
        let zeroes = vec![0; self.model.as_ref().map_or(0, |_| range.len() as usize)];
        self.changed(driver, range, outcome, &[&zeroes]);
        Ok(())
    }

    /// Discarded bytes are old, zero or the backing file's.
    fn discard(&mut self, driver: &Arc<Qcow2Driver>, range: GuestRange) {
        let outcome = driver.discard(range, Durability::Later);
        self.bitmaps.change(range, outcome.is_ok());
        let Some(model) = &self.model else { return };
        let inside = range.offset() as usize..range.end() as usize;
        let old = model[inside.clone()].to_vec();
        let zeroes = vec![0; old.len()];
        let below: Vec<u8> = inside.map(|at| self.backing.get(at).copied().unwrap_or(0)).collect();
        self.expect(outcome);
        self.accept(driver, range, &[&old, &zeroes, &below]);
    }

    /// A change of the range to `new` has ended.
    fn changed(
        &mut self,
        driver: &Arc<Qcow2Driver>,
        range: GuestRange,
        outcome: nbd_img_formats::Result<()>,
        new: &[&[u8]],
    ) {
        let done = outcome.is_ok();
        self.bitmaps.change(range, done);
        self.expect(outcome);
        let Some(model) = &self.model else { return };
        if done {
            self.accept(driver, range, new);
        } else {
            let old = model[range.offset() as usize..range.end() as usize].to_vec();
            self.accept(driver, range, &[&old, new[0]]);
        }
    }

    /// Only a device that is full may refuse anything of a sound image.
    fn expect(&mut self, outcome: nbd_img_formats::Result<()>) {
        let Err(error) = outcome else { return };
        let full = self.device && error.kind() == ErrorKind::NoSpace;
        assert!(full || self.model.is_none(), "a sound image fails: {error:?}");
        self.clean = false;
    }

    /// Every byte of the range has to be what one of `allowed` has there; the model follows.
    fn accept(&mut self, driver: &Arc<Qcow2Driver>, range: GuestRange, allowed: &[&[u8]]) {
        let Some(model) = &mut self.model else { return };
        let mut got = vec![0x5a; range.len() as usize];
        driver.pread(range.offset(), &mut got).unwrap();
        // Hardly ever more than a comparison of all, which is by far the fastest.
        if allowed.iter().all(|bytes| **bytes != *got) {
            for (index, byte) in got.iter().enumerate() {
                let one_of = allowed.iter().any(|bytes| bytes[index] == *byte);
                assert!(one_of, "byte {} is {byte:#x}", range.offset() + index as u64);
            }
        }
        model[range.offset() as usize..range.end() as usize].copy_from_slice(&got);
    }

    /// A reader's plan that is not done with for a while.
    fn hold(&mut self, driver: &Arc<Qcow2Driver>, range: GuestRange) {
        let mut plan = ReadPlan::default();
        let mapped = driver.map_read(range, MapMode::Try, &mut plan);
        self.expect(mapped);
        self.held.push(plan);
    }

    fn close(&mut self) {
        self.held.clear();
        let Some(driver) = self.driver.take() else { return };
        let closed = driver.close();
        drop(driver);
        let success = closed.is_ok();
        self.expect(closed);
        let Some(model) = &self.model else { return };
        // New clusters come behind the last one that is counted. Where damage has counted one far behind the end, the
        // file becomes long and the refcount table with it (up to what the format's readers allow, which then is
        // its end); that is more than can be looked at here.
        let large = bytes_of(&self.storage).is_none_or(|bytes| bytes.be32(56) > REFCOUNT_TABLE_CLUSTERS_MAX);
        if large {
            self.model = None;
            return;
        }
        let judged = self.look_at().expect("a sound image cannot be looked at after its close");
        let report = &judged.report;
        assert!(report.is_sound(), "after the close:\n{report}");
        assert!(!self.clean || report.has_no_leaks(), "after the close:\n{report}");
        assert!(judged.content == *model, "the image holds something else after its close");
        assert!(judged.snapshots == self.snapshots, "a snapshot has changed");
        assert!(!self.raw_is_disk || judged.raw.as_ref() == Some(model), "the raw data file is another disk");
        self.bitmaps.check_closed(judged.bitmaps, success);
    }
}

/// Cluster length as the header has it, for choosing ranges.
fn shape_cluster_len(bytes: &Vec<u8>) -> u64 {
    1 << bytes.be32(20).clamp(9, 14)
}

/// A range within the disk, often at the edges of clusters.
fn range(size: u64, cluster_len: u64, u: &mut Unstructured<'_>) -> Result<GuestRange> {
    let (cluster, inside, len): (u8, u8, u8) = (u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
    let start = match cluster {
        255 => size.saturating_sub(3 * cluster_len),
        number => u64::from(number) % size.div_ceil(cluster_len).max(1) * cluster_len,
    };
    let inside = if inside & 3 == 0 { u64::from(inside >> 2) * cluster_len / 64 } else { 0 };
    let offset = (start + inside).min(size);
    let len = if len & 1 == 0 { u64::from(len / 2) * 5 } else { u64::from(len / 2) % 40 * cluster_len };
    Ok(GuestRange::new(offset, len.min(size - offset)).unwrap())
}

/// In both ways in which readers read.
fn read(driver: &Arc<Qcow2Driver>, range: GuestRange, model: Option<&[u8]>) {
    let mut got = vec![0x5a; range.len() as usize];
    let outcome = driver.pread(range.offset(), &mut got);
    let mut plan = ReadPlan::default();
    if driver.map_read(range, MapMode::Try, &mut plan).is_ok() {
        assert_eq!(plan.pieces.covered_len(), range.len());
    }
    let Some(model) = model else { return };
    outcome.unwrap();
    let expected = &model[range.offset() as usize..range.end() as usize];
    assert!(got == expected, "wrong bytes in the {} from {}", range.len(), range.offset());
    let mut got = vec![0x5a; expected.len()];
    session::read(&**driver, range.offset(), &mut got).unwrap();
    assert!(got == expected, "wrong bytes by a plan in the {} from {}", range.len(), range.offset());
}

/// What is said covers the range, and calls nothing zero that is not.
fn status(driver: &Arc<Qcow2Driver>, range: GuestRange, model: Option<&[u8]>) {
    for query in [StatusQuery::Allocation, StatusQuery::Depth] {
        let mut at = range.offset();
        let outcome = driver.status(query, range, &mut |len, status| {
            assert!(len > 0 && len <= range.end() - at);
            if let (Status::Allocation { hole, zero }, Some(model)) = (status, model) {
                let bytes = &model[at as usize..(at + len) as usize];
                assert!(!zero || *bytes == *vec![0; bytes.len()], "no zeroes from {at}");
                assert!(!hole || zero, "a hole from {at} that is not zero");
            }
            at += len;
            ControlFlow::Continue(())
        });
        assert!(outcome.is_err() || at == range.end());
        assert!(outcome.is_ok() || model.is_none(), "a sound image has no status: {:?}", outcome.err());
    }
}
