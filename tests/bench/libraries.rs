//! Requests of 4 KiB at random to an allocated qcow2 image in the page cache: the driver beside the libraries imago and
//! qcow2-rs, each by its own blocking calls. They are not what is served with (they lose data where this driver does not);
//! their rows say what that costs.

use std::path::PathBuf;
use std::pin::pin;
use std::process::Command;
use std::task::{Context, Poll, Waker};

use divan::Bencher;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::plan::{MapMode, Place, ReadPlan};
use nbd_img_formats::storage::TryRead;
use nbd_img_formats::{BlockDriver, Durability, Format, GuestRange};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_alloc_dev_sync;

use super::{BLOCK_LEN, Places};

const SIZE: u64 = 256 << 20;

struct Image {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", "preallocation=full"]).arg(&path);
        let status = create.arg(SIZE.to_string()).status();
        assert!(status.expect("qemu-img is in the Debian package qemu-utils").success());
        // Whoever comes first must not be the one who reads it from the disk.
        std::fs::read(&path).unwrap();
        Image { path, _folder: folder }
    }

    fn by_driver(&self) -> std::sync::Arc<dyn BlockDriver> {
        let options = OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() };
        open(&self.path, &options).unwrap().driver
    }

    fn by_imago(&self) -> FormatAccess<File> {
        let image = Qcow2::<File>::builder_path(&self.path).write(true);
        FormatAccess::new(image.open(PermissiveImplicitOpenGate::default()).unwrap())
    }

    fn by_qcow2_rs(&self) -> Qcow2Dev<Qcow2IoSync> {
        let params = Qcow2DevParams::new(9, None, None, false, false);
        let io = Qcow2IoSync::new(&self.path, false, false);
        let device = qcow2_alloc_dev_sync(&self.path, io, &params).unwrap().0;
        at_once(device.qcow2_prep_io()).unwrap();
        device
    }
}

/// The result of a future over a file that is read at once: it has nothing to wait for.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => panic!("it waits"),
    }
}

/// Does `request` at one place after the other.
fn at_random(bencher: Bencher, mut request: impl FnMut(u64, &mut [u8])) {
    let mut places = Places::new(SIZE, BLOCK_LEN);
    let mut block = vec![1; usize::try_from(BLOCK_LEN).unwrap()];
    bencher.bench_local(|| request(places.next(BLOCK_LEN).offset(), &mut block));
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn read_nbd_img(bencher: Bencher) {
    let driver = Image::new().by_driver();
    at_random(bencher, |at, block| driver.pread(at, block).unwrap());
}

/// As sessions do: a plan, and the bytes where it says.
#[divan::bench(sample_count = 50, sample_size = 2000)]
fn read_nbd_img_by_plan(bencher: Bencher) {
    let driver = Image::new().by_driver();
    let mut plan = ReadPlan::default();
    driver.map_read(GuestRange::new(0, SIZE).unwrap(), MapMode::Wait, &mut plan).unwrap();
    at_random(bencher, |at, block| {
        driver.map_read(GuestRange::new(at, BLOCK_LEN).unwrap(), MapMode::Try, &mut plan).unwrap();
        let Place::Data { storage, at } = plan.pieces[0].place else { panic!("not allocated") };
        let read = driver.storages()[usize::from(storage.0)].try_pread(block, at).unwrap();
        assert!(matches!(read, TryRead::Done(4096)));
    });
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn read_imago(bencher: Bencher) {
    let access = Image::new().by_imago();
    at_random(bencher, |at, block| access.read(block, at).unwrap());
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn read_qcow2_rs(bencher: Bencher) {
    let device = Image::new().by_qcow2_rs();
    at_random(bencher, |at, block| assert_eq!(at_once(device.read_at(block, at)).unwrap(), block.len()));
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn overwrite_nbd_img(bencher: Bencher) {
    let driver = Image::new().by_driver();
    at_random(bencher, |at, block| driver.pwrite(at, block, Durability::Later).unwrap());
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn overwrite_imago(bencher: Bencher) {
    let access = Image::new().by_imago();
    at_random(bencher, |at, block| access.write(&*block, at).unwrap());
}

#[divan::bench(sample_count = 50, sample_size = 2000)]
fn overwrite_qcow2_rs(bencher: Bencher) {
    let device = Image::new().by_qcow2_rs();
    at_random(bencher, |at, block| at_once(device.write_at(block, at)).unwrap());
}
