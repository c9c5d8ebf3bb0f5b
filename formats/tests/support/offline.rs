//! The size of disks that nobody uses, changed in memory.

use nbd_img_formats::qcow2::{ResizeParts, resize};
use nbd_img_formats::storage::{MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, HostOffset, Result};

use super::image::Image;
use super::scene::{Files, Scene};
use super::wrapped::{NeverClosed, Wrapped};

/// Changes the size of the disk in these files, and leaves them open.
pub fn resize_files(
    scene: &Scene,
    image: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    to: u64,
) -> Result<()> {
    let keep = |file: Arc<dyn Storage>| -> Arc<dyn Storage> { Wrapped::new(file, NeverClosed) };
    let (image, data_file) = (keep(image), data_file.map(keep));
    resize(&ResizeParts { image, data_file, backing: scene.backing_driver(), foreign: false }, to)
}

/// What is to be there after a change of the size.
pub fn resized(content: &[u8], to: u64) -> Vec<u8> {
    let mut content = content.to_vec();
    content.truncate(to as usize);
    content.resize(to as usize, 0);
    content
}

/// The files after somebody has opened the image for writing who trusts its refcounts only if they are not marked.
pub fn repaired(scene: &Scene, files: &Files) -> std::result::Result<Files, String> {
    if !Image::parse(&files.image)?.is_dirty() {
        return Ok(files.clone());
    }
    let storages = scene.storages(files);
    let data = storages.data.clone().map(kept);
    let driver = scene.open_files(kept(storages.image.clone()), data).map_err(|e| e.to_string())?;
    driver.close().map_err(|e| e.to_string())?;
    Ok(files_of(&storages.image, storages.data.as_ref()))
}

/// The file, for one who closes it.
pub fn kept<S: Storage + 'static>(file: Arc<S>) -> Arc<dyn Storage> {
    Wrapped::new(file, NeverClosed)
}

/// What the files hold.
pub fn files_of(image: &Arc<MemoryStorage>, data: Option<&Arc<MemoryStorage>>) -> Files {
    let bytes = |storage: &Arc<MemoryStorage>| {
        let mut bytes = vec![0; storage.len().unwrap() as usize];
        storage.pread(&mut bytes, HostOffset(0)).unwrap();
        bytes
    };
    Files { image: bytes(image), data: data.map(bytes) }
}
