//! What the tests of the qcow2 driver share: QEMU's tools as makers of images and as referees.
//!
//! A missing tool fails the test and names the Debian package.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nbd_img_formats::open::{OpenOptions, Opened, open};
use nbd_img_formats::{BlockDriver, GuestRange, StatusQuery};

/// Runs one of QEMU's tools; fails unless it succeeds.
pub fn qemu<I: AsRef<std::ffi::OsStr>>(tool: &str, args: impl IntoIterator<Item = I>) -> Output {
    let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let output = try_qemu(tool, &args);
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs one of QEMU's tools.
pub fn try_qemu<I: AsRef<std::ffi::OsStr>>(tool: &str, args: impl IntoIterator<Item = I>) -> Output {
    let output = Command::new(tool).args(args).output();
    output.unwrap_or_else(|e| panic!("{tool} cannot be run ({e}); it is in the Debian package qemu-utils"))
}

/// Runs commands of qemu-io on an image.
pub fn qemu_io(image: &Path, commands: &[String]) {
    if commands.is_empty() {
        return;
    }
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
    for command in commands {
        args.extend(["-c".to_owned(), command.clone()]);
    }
    args.push(image.to_str().unwrap().to_owned());
    // QEMU does not compress into a cluster that has data already; then that command does nothing.
    let compressed = commands.iter().any(|command| command.starts_with("write -c"));
    let output = try_qemu("qemu-io", &args);
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(compressed || (output.status.success() && !said.contains("failed")), "{commands:?}: {said}");
}

/// A folder that goes away with the test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `qemu-img create` of a qcow2 image; `options` as for `-o`.
    pub fn create(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.file(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        let size = size.to_string();
        args.extend([path.to_str().unwrap(), &size]);
        qemu("qemu-img", args);
        path
    }
}

/// Random numbers that are the same in every run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { (self.next() >> 11) % end }
    }

    pub fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }
}

/// Opens read-only.
pub fn open_read_only(path: &Path) -> Opened {
    open(path, &OpenOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// All bytes of the disk, by one pread.
pub fn read_all(driver: &dyn BlockDriver) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(driver.size()).unwrap()];
    driver.pread(0, &mut bytes).unwrap_or_else(|e| panic!("{e}"));
    bytes
}

/// What qemu-img makes of the disk; `more` stands before the file name.
pub fn qemu_bytes(folder: &Folder, image: &Path, more: &[&str]) -> Vec<u8> {
    let raw = folder.file("referee.raw");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(more);
    args.extend([image.to_str().unwrap(), raw.to_str().unwrap()]);
    qemu("qemu-img", args);
    std::fs::read(&raw).unwrap()
}

/// Fails unless reading gives `expected`: as a whole, in pieces at random, and from several threads.
pub fn assert_reads(driver: &dyn BlockDriver, expected: &[u8], seed: u64) {
    assert_eq!(driver.size(), expected.len() as u64);
    assert_same(&read_all(driver), expected, 0);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            scope.spawn(move || {
                let mut random = Random::new(seed * 31 + thread);
                let size = expected.len() as u64;
                for _ in 0..200 {
                    let offset = random.below(size);
                    let len = 1 + random.below((size - offset).min(200_000));
                    let (from, to) =
                        (usize::try_from(offset).unwrap(), usize::try_from(offset + len).unwrap());
                    let mut got = vec![0xee; to - from];
                    driver.pread(offset, &mut got).unwrap_or_else(|e| panic!("{e}"));
                    assert_same(&got, &expected[from..to], offset);
                }
            });
        }
    });
}

pub fn assert_same(got: &[u8], expected: &[u8], offset: u64) {
    if got != expected {
        let at = got.iter().zip(expected).position(|(a, b)| a != b);
        panic!("bytes differ, first at {offset} + {at:?}");
    }
}

/// What the driver calls zero and what it calls a hole: for each byte run `(len, hole, zero)`.
pub fn status_runs(driver: &dyn BlockDriver) -> Vec<(u64, bool, bool)> {
    let mut runs = Vec::new();
    let range = GuestRange::new(0, driver.size()).unwrap();
    let visit = &mut |len, status| {
        let nbd_img_formats::driver::Status::Allocation { hole, zero } = status else { panic!("{status:?}") };
        runs.push((len, hole, zero));
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Allocation, range, visit).unwrap_or_else(|e| panic!("{e}"));
    runs
}

/// How deep in the chain each byte lies.
fn depths(driver: &dyn BlockDriver) -> Vec<u32> {
    let mut depths = Vec::new();
    let range = GuestRange::new(0, driver.size()).unwrap();
    let visit = &mut |len, status| {
        let nbd_img_formats::driver::Status::Depth(depth) = status else { panic!("{status:?}") };
        depths.extend(std::iter::repeat_n(depth, usize::try_from(len).unwrap()));
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Depth, range, visit).unwrap_or_else(|e| panic!("{e}"));
    depths
}

/// Fails if the driver calls something zero that is not, or not what QEMU calls zero.
pub fn assert_status(driver: &dyn BlockDriver, image: &Path, expected: &[u8]) {
    let mut ours = vec![false; expected.len()];
    let mut at = 0;
    for (len, _hole, zero) in status_runs(driver) {
        let end = at + usize::try_from(len).unwrap();
        ours[at..end].fill(zero);
        if zero {
            let lie = expected[at..end].iter().position(|byte| *byte != 0);
            assert_eq!(lie, None, "{}: called zero from {at} to {end}", image.display());
        }
        at = end;
    }
    assert_eq!(at, expected.len());
    let depths = depths(driver);
    let map = qemu("qemu-img", ["map", "--output=json", "-f", "qcow2", image.to_str().unwrap()]);
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    for extent in map.as_array().unwrap() {
        if extent["zero"].as_bool().unwrap() {
            let from = usize::try_from(extent["start"].as_u64().unwrap()).unwrap();
            let to = from + usize::try_from(extent["length"].as_u64().unwrap()).unwrap();
            let missed = ours[from..to].iter().position(|zero| !zero);
            assert_eq!(missed, None, "{}: QEMU says zero from {from} to {to}", image.display());
        }
        if extent["data"].as_bool().unwrap() {
            let from = usize::try_from(extent["start"].as_u64().unwrap()).unwrap();
            // QEMU counts from 0 here.
            let depth = u32::try_from(extent["depth"].as_u64().unwrap()).unwrap() + 1;
            assert_eq!(depths[from], depth, "{}: the depth at {from}", image.display());
        }
    }
}

/// Fails unless the image reads and reports as it does with QEMU.
pub fn assert_as_qemu(folder: &Folder, image: &Path, seed: u64) {
    let expected = qemu_bytes(folder, image, &[]);
    let opened = open_read_only(image);
    assert!(opened.probed);
    assert_reads(&*opened.driver, &expected, seed);
    assert_status(&*opened.driver, image, &expected);
}

/// A file of `len` bytes: text, noise, zeroes and patterns in turn.
pub fn mixed_content(path: &Path, len: u64, seed: u64) {
    let mut random = Random::new(seed);
    let mut bytes = Vec::new();
    let len = usize::try_from(len).unwrap();
    while bytes.len() < len {
        let part = 512 * usize::try_from(1 + random.below(100)).unwrap();
        match random.below(4) {
            0 => bytes.extend(std::iter::repeat_n(0, part)),
            1 => bytes.extend((0..part).map(|_| random.byte())),
            2 => bytes.extend(b"the quick brown fox jumps over the lazy dog; ".iter().cycle().take(part)),
            _ => bytes.extend((0..part).map(|i| u8::try_from(i / 64 % 256).unwrap())),
        }
    }
    bytes.truncate(len);
    std::fs::write(path, bytes).unwrap();
}
