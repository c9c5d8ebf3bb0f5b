//! What single steps of a request's way cost, without sockets and disks: `cargo bench --bench micro`.
//!
//! Through public interfaces only, as sessions use them. Read against an earlier run on the same machine; whether a
//! change pays is decided by `tests/bench/run`.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)] // A bench that cannot run fails loudly.

mod decompress;
mod libraries;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use nbd_img_formats::open::{OpenOptions, change_bitmap, open};
use nbd_img_formats::plan::{MapMode, Place, ReadPlan, WritePlan};
use nbd_img_formats::qcow2::BitmapChange;
use nbd_img_formats::{BlockDriver, Durability, Format, GuestRange};

const CLUSTER_LEN: u64 = 64 << 10;
const BLOCK_LEN: u64 = 4 << 10;

fn main() {
    divan::main();
}

/// An image in a folder that goes away with it.
struct Image {
    driver: Arc<dyn BlockDriver>,
    _folder: tempfile::TempDir,
}

impl Image {
    /// `options` as for `qemu-img create -o`.
    fn create(format: Format, size: u64, options: &str, open_options: OpenOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("image");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", &format.to_string()]);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        let status = command.arg(&path).arg(size.to_string()).status();
        assert!(status.expect("qemu-img is in the Debian package qemu-utils").success());
        Image { driver: Self::open(&path, format, open_options), _folder: folder }
    }

    fn open(path: &Path, format: Format, open_options: OpenOptions) -> Arc<dyn BlockDriver> {
        open(path, &OpenOptions { format: Some(format), ..open_options }).unwrap().driver
    }

    /// The same image, opened anew with an enabled dirty bitmap.
    fn with_bitmap(self) -> Self {
        self.driver.close().unwrap();
        let path = self._folder.path().join("image");
        let add = BitmapChange::Add { granularity: None, enabled: true };
        change_bitmap(&path, "bitmap", add).unwrap();
        let options = OpenOptions { writable: true, ..OpenOptions::default() };
        Image { driver: Self::open(&path, Format::Qcow2, options), _folder: self._folder }
    }

    /// A qcow2 image of which every cluster is allocated, opened for writing, tables of `warm_len` bytes in memory.
    fn allocated(size: u64, table_cache_len: u64, warm_len: u64) -> Self {
        let options = OpenOptions { writable: true, table_cache_len, ..OpenOptions::default() };
        let image = Self::create(Format::Qcow2, size, "preallocation=metadata", options);
        let mut plan = ReadPlan::default();
        image.driver.map_read(GuestRange::new(0, warm_len).unwrap(), MapMode::Wait, &mut plan).unwrap();
        image
    }
}

/// Places in `0..len`, aligned to `unit`, the same in every run.
struct Places {
    state: u64,
    units: u64,
    unit: u64,
}

impl Places {
    fn new(len: u64, unit: u64) -> Self {
        Places { state: 0x9e37_79b9_7f4a_7c15, units: len / unit, unit }
    }

    fn next(&mut self, len: u64) -> GuestRange {
        // xorshift64
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        GuestRange::new(self.state % self.units * self.unit, len).unwrap()
    }
}

mod request {
    use super::*;
    use nbd_img::nbd::export_info::TransmissionFlags;
    use nbd_img::nbd::reply::ReplyForm;
    use nbd_img::nbd::request::{Parsed, REQUEST_HEADER_LEN, SessionRules, check, parse};

    const BATCH: usize = 16;

    fn rules() -> SessionRules {
        SessionRules {
            size: 1 << 30,
            flags: TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA,
            form: ReplyForm::Structured,
            contexts: 0,
            block_min_len: 1,
            payload_max_len: 32 << 20,
        }
    }

    fn batch() -> Vec<u8> {
        let mut bytes = Vec::new();
        for cookie in 0..BATCH as u64 {
            bytes.extend(0x2560_9513_u32.to_be_bytes()); // NBD_REQUEST_MAGIC
            bytes.extend([0, 0, 0, 0]); // no flags, NBD_CMD_READ
            bytes.extend(cookie.to_be_bytes());
            bytes.extend((cookie * 12_288).to_be_bytes());
            bytes.extend(4096_u32.to_be_bytes());
        }
        bytes
    }

    /// A batch of headers: read, and checked against the session.
    #[divan::bench]
    fn parse_and_check_16(bencher: Bencher) {
        let (bytes, rules) = (batch(), rules());
        bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
            for header in black_box(&bytes).chunks_exact(REQUEST_HEADER_LEN) {
                let Parsed::Request(request) = parse(header, rules.form) else { unreachable!() };
                assert!(check(black_box(&request), &rules).is_ok());
            }
        });
    }
}

mod reply {
    use super::*;
    use nbd_img::nbd::reply::{self, Head, Place, ReplyForm, ReplyTo};

    const FORMS: [ReplyForm; 3] = [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended];

    /// The header in front of a read's data.
    #[divan::bench]
    fn simple() -> Head {
        reply::simple(None, black_box(7))
    }

    #[divan::bench(args = [ReplyForm::Structured, ReplyForm::Extended])]
    fn offset_data(form: ReplyForm) -> Head {
        let to = ReplyTo { form, cookie: black_box(7), offset: 4096 };
        reply::offset_data(to, black_box(4096), black_box(4096), Place::Last)
    }

    /// Answers to a batch of 16 writes, appended to a buffer that has room.
    #[divan::bench(args = FORMS)]
    fn success_16(bencher: Bencher, form: ReplyForm) {
        let mut out = Vec::with_capacity(1024);
        bencher.counter(ItemsCount::new(16_usize)).bench_local(|| {
            out.clear();
            for cookie in 0..16 {
                out.extend_from_slice(&reply::success(ReplyTo { form: black_box(form), cookie, offset: 0 }));
            }
            black_box(out.len())
        });
    }
}

mod plan {
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn read(bencher: Bencher, image: &Image, len: u64) {
        let (mut places, mut plan) = (Places::new(SIZE - len, BLOCK_LEN), ReadPlan::default());
        bencher.bench_local(|| {
            image.driver.map_read(places.next(len), MapMode::Try, &mut plan).unwrap();
            assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
        });
    }

    #[divan::bench(args = [4 << 10, 256 << 10])]
    fn read_raw(bencher: Bencher, len: u64) {
        read(bencher, &Image::create(Format::Raw, SIZE, "", OpenOptions::default()), len);
    }

    /// Where one cluster after the other lies: allocated, tables in memory.
    #[divan::bench(args = [4 << 10, 256 << 10])]
    fn read_qcow2_warm(bencher: Bencher, len: u64) {
        read(bencher, &Image::allocated(SIZE, 32 << 20, SIZE), len);
    }

    /// A write in place, begun and finished.
    #[divan::bench(args = [4 << 10, 256 << 10])]
    fn write_qcow2_warm(bencher: Bencher, len: u64) {
        write(bencher, &Image::allocated(SIZE, 32 << 20, SIZE), len);
    }

    /// The same, recorded in a dirty bitmap.
    #[divan::bench(args = [4 << 10, 256 << 10])]
    fn write_qcow2_recorded(bencher: Bencher, len: u64) {
        let image = Image::allocated(SIZE, 32 << 20, SIZE).with_bitmap();
        // The first change marks the bitmap; the tables come into memory.
        image.driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
        let all = GuestRange::new(0, SIZE).unwrap();
        image.driver.map_read(all, MapMode::Wait, &mut ReadPlan::default()).unwrap();
        write(bencher, &image, len);
    }

    fn write(bencher: Bencher, image: &Image, len: u64) {
        let (mut places, mut plan) = (Places::new(SIZE - len, BLOCK_LEN), WritePlan::default());
        bencher.bench_local(|| {
            image.driver.prepare_write(places.next(len), MapMode::Try, &mut plan).unwrap();
            assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
            image.driver.finish_write(&mut plan, true).unwrap();
        });
    }
}

mod tables {
    use super::*;

    const SIZE: u64 = 64 << 30;

    fn lookups(bencher: Bencher, image: &Image, span: u64, mode: MapMode) {
        let (mut places, mut plan) = (Places::new(span, CLUSTER_LEN), ReadPlan::default());
        bencher.bench_local(|| {
            image.driver.map_read(places.next(BLOCK_LEN), mode, &mut plan).unwrap();
            assert!(matches!(plan.pieces[0].place, Place::Data { .. }));
        });
    }

    /// Slices in memory: all lookups in one table of 512 MiB, or spread over 8 MiB of tables.
    #[divan::bench(args = [512 << 20, SIZE])]
    fn cached(bencher: Bencher, span: u64) {
        lookups(bencher, &Image::allocated(SIZE, 32 << 20, SIZE), span, MapMode::Try);
    }

    /// A cache of two slices: nearly every lookup reads a slice (from the page cache), checks it and evicts another.
    #[divan::bench]
    fn missed(bencher: Bencher) {
        lookups(bencher, &Image::allocated(SIZE, 0, BLOCK_LEN), SIZE, MapMode::Wait);
    }
}

mod allocator {
    use super::*;

    /// Clusters that are given out one after the other: a plan for the first write to each. Tables and commits that
    /// become due on the way are in it; data is not written.
    #[divan::bench(sample_count = 50, sample_size = 1000)]
    fn next_cluster(bencher: Bencher) {
        let options = OpenOptions { writable: true, ..OpenOptions::default() };
        let image = Image::create(Format::Qcow2, 256 << 30, "", options);
        let (mut at, mut plan) = (0, WritePlan::default());
        let block = vec![1; usize::try_from(BLOCK_LEN).unwrap()];
        bencher.bench_local(|| {
            let range = GuestRange::new(at, BLOCK_LEN).unwrap();
            image.driver.prepare_write(range, MapMode::Try, &mut plan).unwrap();
            let slow = matches!(plan.pieces[0].place, Place::Slow(_));
            image.driver.finish_write(&mut plan, true).unwrap();
            if slow {
                image.driver.write_slow(at, &block).unwrap();
            }
            at += CLUSTER_LEN;
        });
    }
}
