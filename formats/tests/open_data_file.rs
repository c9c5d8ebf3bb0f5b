//! Which data files are opened for writing, and how they are locked.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;

use std::path::{Path, PathBuf};

use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, Format};
use qcow2_support::{Folder, qemu, try_qemu};
use qcow2_write_support::assert_clean;

const MIB: u64 = 1 << 20;

/// An image in a folder, and its data file `data` beside it.
fn create(folder: &Folder) -> PathBuf {
    let data = folder.file("data");
    folder.create("image.qcow2", &format!("data_file={}", data.to_str().unwrap()), MIB)
}

fn writable() -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() }
}

fn open_file(image: &Path) -> Arc<dyn BlockDriver> {
    open(image, &writable()).unwrap_or_else(|e| panic!("{e}")).driver
}

/// The data file is locked as the image is.
#[test]
fn the_data_file_is_locked_as_a_writer() {
    let folder = Folder::new();
    let image = create(&folder);
    let data = folder.file("data");
    let reader = FileOptions { writable: false, direct: false, lock: LockMode::Reader };
    let writer = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    let held = FileStorage::open(&data, &reader).unwrap();
    let error = open(&image, &writable()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    assert!(error.to_string().contains("data"), "{error}");
    assert!(open(&image, &OpenOptions::default()).is_ok());
    drop(held);
    let driver = open_file(&image);
    for options in [&reader, &writer] {
        assert_eq!(FileStorage::open(&data, options).err().unwrap().kind(), ErrorKind::Locked);
    }
    let refused = try_qemu("qemu-io", ["-f", "raw", "-c", "write 0 512", data.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("lock"), "{said}");
    driver.close().unwrap();
    assert!(FileStorage::open(&data, &writer).is_ok());
    // QEMU's own lock on it keeps the driver out.
    qemu("qemu-io", ["-f", "raw", "-c", "write -P 3 0 512", data.to_str().unwrap()]);
}

/// Read-only, neither file is opened for writing; read-write, only the image's own data file is.
#[test]
fn only_the_data_file_of_the_image_itself_is_opened_for_writing() {
    let folder = Folder::new();
    let image = create(&folder);
    let opened = open(&image, &OpenOptions::default()).unwrap().driver;
    assert!(opened.storages().iter().all(|storage| !storage.facts().writable));
    opened.close().unwrap();
    let top = folder.file("top.qcow2");
    qemu(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", "-b", image.to_str().unwrap(), "-F", "qcow2", top.to_str().unwrap()],
    );
    let driver = open_file(&top);
    let writable: Vec<bool> = driver.storages().iter().map(|storage| storage.facts().writable).collect();
    assert_eq!(writable, [true, false, false]);
    driver.pwrite(100, &[4; 100], Durability::Later).unwrap();
    driver.close().unwrap();
    assert_clean(&top);
    assert!(std::fs::read(folder.file("data")).unwrap().iter().all(|byte| *byte == 0));
}
