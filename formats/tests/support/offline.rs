//! The size of disks, changed in memory, with a crash or a failing call in the middle.

use nbd_img_formats::qcow2::{ResizeParts, resize};
use nbd_img_formats::storage::{Fate, Fault, Faults, Log, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, HostOffset, Result};

use super::crash::Left;
use super::image::Image;
use super::random::Random;
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

/// What has become of a change of the size one of whose calls failed.
pub struct Failing {
    pub outcome: Result<()>,
    /// Whether the call came to be.
    pub fired: bool,
    pub files: Files,
}

/// Changes the size of the scene's disk with this fault in either file.
pub fn resize_failing(scene: &Scene, to: u64, fault: Fault) -> Failing {
    let storages = scene.storages(&scene.files());
    let faults = Faults::new();
    let attach = |storage: Arc<MemoryStorage>| -> Arc<dyn Storage> { faults.attach(kept(storage)) };
    let (image, data) = (attach(storages.image.clone()), storages.data.clone().map(attach));
    faults.arm(fault);
    let outcome = resize_files(scene, image, data, to);
    let fired = faults.fired() > 0;
    assert!(fired || outcome.is_ok(), "{}, to {to}, {fault:?}, {outcome:?}: nothing failed", scene.name);
    Failing { outcome, fired, files: files_of(&storages.image, storages.data.as_ref()) }
}

/// Lets every call fail in its turn, once and for good, and once for want of room, as long as `fails` says that it
/// came to be; returns how many did.
pub fn each_call(mut fails: impl FnMut(Fault) -> bool) -> u64 {
    let mut failed = 0;
    for (sticky, errno) in [(false, libc::EIO), (true, libc::EIO), (false, libc::ENOSPC)] {
        failed += (0..).take_while(|call| fails(Fault { sticky, errno, ..Fault::at(*call) })).count() as u64;
    }
    failed
}

/// What a crash leaves of the files; `all`: everything that was done before it. Else of one of them all may be there,
/// and of the other nothing.
pub fn crashed(scene: &Scene, log: &Log, cut: usize, all: bool, random: &mut Random) -> Left {
    Left::of(scene, |file| {
        let style = if all { 0 } else { random.below(4) };
        log.after_crash(file, cut, |_, _| match (style, random.below(4)) {
            (0, _) | (3, 0) => Fate::Kept,
            (1, _) | (3, 1) => Fate::Lost,
            (_, 2) => Fate::Prefix(random.below(64)),
            (_, _) => Fate::Scattered(random.next()),
        })
    })
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
