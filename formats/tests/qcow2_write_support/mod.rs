//! What the tests of writing qcow2 share: images in memory, and QEMU as the referee.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, HostOffset, Result, Storage};

use crate::qcow2_support::{Folder, qemu, try_qemu};

/// Opens the image in `image` for writing, with a table cache of this many bytes.
pub fn open_with(
    image: Arc<dyn Storage>,
    backing: Option<Arc<dyn BlockDriver>>,
    table_cache_len: u64,
    options: WriteOptions,
) -> Result<Arc<Qcow2Driver>> {
    let header = Header::load(&image)?;
    let caches = Caches::new(table_cache_len, 1 << 20, [&header])?;
    Qcow2Driver::open(Parts {
        image,
        header,
        data_file: None,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: Some(options),
    })
}

/// Opens the image in `image` for writing.
pub fn open_writable(image: &Arc<MemoryStorage>) -> Arc<Qcow2Driver> {
    open_with(Arc::clone(image) as Arc<dyn Storage>, None, 1 << 20, WriteOptions::default()).unwrap()
}

/// All bytes of a storage.
pub fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    let got = storage.pread(&mut bytes, HostOffset(0)).unwrap();
    assert_eq!(got, bytes.len());
    bytes
}

/// Fails unless `qemu-img check` finds neither corruption nor leaks.
pub fn assert_clean(image: &Path) {
    let output = try_qemu("qemu-img", ["check", "-f", "qcow2", image.to_str().unwrap()]);
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let kept = std::env::temp_dir().join("nbd-img-bad.qcow2");
        std::fs::copy(image, &kept).unwrap();
        panic!("qemu-img check ({}): {said}", kept.display());
    }
}

/// Fails unless QEMU finds the image sound and reads `disk` from it.
pub fn assert_image(folder: &Folder, image: &Path, disk: &[u8]) {
    assert_clean(image);
    let raw = folder.file("expected.raw");
    std::fs::write(&raw, disk).unwrap();
    let (raw, image) = (raw.to_str().unwrap(), image.to_str().unwrap());
    qemu("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", raw, image]);
}
