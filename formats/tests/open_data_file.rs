//! Which data files are opened for writing, and how they are locked.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::path::{Path, PathBuf};

use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, Format};
use qcow2_support::{Folder, qemu, qemu_io, try_qemu};
use qcow2_write_support::assert_clean;
use support::image::Image;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// An image in a folder, and its data file `data` beside it.
fn create(folder: &Folder, options: &str) -> PathBuf {
    let data = folder.file("data");
    folder.create("image.qcow2", &format!("data_file={}{options}", data.to_str().unwrap()), MIB)
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
    let image = create(&folder, "");
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
    let image = create(&folder, "");
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

#[test]
fn what_contradicts_a_data_file_is_refused_for_writing() {
    let folder = Folder::new();
    let image = create(&folder, ",data_file_raw=on");
    let raw = folder.file("base.raw");
    std::fs::write(&raw, vec![1; MIB as usize]).unwrap();
    let overlay = OpenOptions { backing: nbd_img_formats::open::Backing::Path(raw), ..writable() };
    let error = open(&image, &overlay).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("backing file"), "{error}");
    // An entry that leads elsewhere than where the guest's cluster lies.
    let image = create(&folder, "");
    qemu_io(&image, &["write -P 5 0 128k".to_owned()]);
    let mut bytes = std::fs::read(&image).unwrap();
    let parsed = Image::parse(&bytes).unwrap();
    let table =
        (u64::from_be_bytes(bytes[parsed.l1_at as usize..][..8].try_into().unwrap()) & !(1 << 63)) as usize;
    bytes[table + 8..table + 16].copy_from_slice(&(1u64 << 63 | 0x40000).to_be_bytes());
    std::fs::write(&image, bytes).unwrap();
    let driver = open_file(&image);
    for failed in [
        driver.pwrite(64 * KIB, &[1; 10], Durability::Later),
        driver.pwrite(64 * KIB, &[1; 64 << 10], Durability::Later),
        driver.pread(64 * KIB, &mut [0; 10]),
    ] {
        assert!(failed.unwrap_err().to_string().contains("guest's"));
    }
    assert!(std::fs::read(folder.file("data")).unwrap()[256 << 10..].iter().all(|byte| *byte == 0));
}
