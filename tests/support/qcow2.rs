//! qcow2 images as qemu-img makes and judges them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::tools::{output, qemu_img, run, tool};

/// What `qemu-img check` says of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Clean,
    /// Clusters are counted that nobody points to. They cost room and nothing else.
    Leaks,
}

/// Checks an image that nobody has open. Fails the test when it is damaged.
#[track_caller]
pub fn check(folder: &Path, image: &str) -> Health {
    let output = output(tool("qemu-img").current_dir(folder).args(["check", "-f", "qcow2", image]));
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    // qemu-img's manual: 0 is clean, 2 is corruption, 3 is leaks and nothing worse.
    match output.status.code() {
        Some(0) => Health::Clean,
        Some(3) => Health::Leaks,
        _ => panic!("qemu-img check {image}: {}\n{text}", output.status),
    }
}

/// Waits until an image whose server was killed may be opened: the process is gone when the kernel has not yet ended
/// what it was doing for it, and that keeps the lock.
#[track_caller]
pub fn wait_until_let_go(folder: &Path, image: &str) {
    let begin = Instant::now();
    loop {
        let output = output(tool("qemu-img").current_dir(folder).args(["info", image]));
        let text = String::from_utf8_lossy(&output.stderr);
        if !text.contains("Is another process using the image") {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{image} is still locked: {text}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Checks an image that was closed properly.
#[track_caller]
pub fn check_clean(folder: &Path, image: &str) {
    assert_eq!(check(folder, image), Health::Clean, "{image}");
}

/// What QEMU reads from an image, or with `snapshot` from a snapshot of it.
pub fn content(folder: &Path, image: &str, snapshot: Option<&str>) -> Vec<u8> {
    let choice = snapshot.map_or_else(String::new, |name| format!("-l snapshot.name={name} "));
    let copy = folder.join("content.raw");
    qemu_img(folder, &format!("convert -f qcow2 {choice}-O raw {image} content.raw"));
    let bytes = fs::read(&copy).unwrap();
    fs::remove_file(copy).unwrap();
    bytes
}

/// The dirty bitmaps of an image and their flags, both in the order of their names.
pub fn bitmap_flags(folder: &Path, image: &str) -> Vec<(String, Vec<String>)> {
    let said =
        run(tool("qemu-img").current_dir(folder).args(["info", "-f", "qcow2", "--output=json", image]));
    let info: serde_json::Value = serde_json::from_slice(&said).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    let mut flags: Vec<_> = bitmaps
        .iter()
        .map(|bitmap| {
            let mut flags: Vec<_> = bitmap["flags"].as_array().unwrap().iter().map(text).collect();
            flags.sort();
            (text(&bitmap["name"]), flags)
        })
        .collect();
    flags.sort();
    flags
}

/// Bits 0 (dirty) and 1 (corrupt) of the incompatible features, of a version 3 header.
pub fn is_marked_dirty_or_corrupt(image: &Path) -> bool {
    let mut low = [0];
    File::open(image).unwrap().read_exact_at(&mut low, 79).unwrap();
    low[0] & 3 != 0
}
