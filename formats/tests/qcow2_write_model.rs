//! Random operations on writable qcow2 images against a vector of bytes, with QEMU as the referee of what
//! is in the file afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::path::{Path, PathBuf};

use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Format};
use qcow2_support::{Folder, mixed_content, qemu, qemu_bytes, read_all};
use qcow2_write_support::{assert_clean, assert_image};
use support::model::{Model, run, run_concurrently};

const MIB: u64 = 1 << 20;

struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// Length of the backing file, if there is one.
    backing: Option<u64>,
    /// There is compressed content in it.
    compressed: bool,
    snapshots: usize,
    table_cache_len: u64,
    discard: bool,
}

impl Case {
    fn new(name: &'static str, options: &'static str, size: u64) -> Self {
        Case {
            name,
            options,
            size,
            backing: None,
            compressed: false,
            snapshots: 0,
            table_cache_len: 1 << 20,
            discard: true,
        }
    }

    /// What the options call `DATA` is a file in the folder.
    fn make(&self, folder: &Folder) -> PathBuf {
        let path = folder.file("image.qcow2");
        let name = path.to_str().unwrap();
        let options = &*self.options.replace("DATA", folder.file("data").to_str().unwrap());
        if self.compressed {
            let raw = folder.file("content.raw");
            mixed_content(&raw, self.size, 5);
            let raw = raw.to_str().unwrap();
            qemu("qemu-img", ["convert", "-c", "-O", "qcow2", "-o", options, "-f", "raw", raw, name]);
        } else if let Some(len) = self.backing {
            let base = folder.file("base.raw");
            mixed_content(&base, len, 9);
            let size = self.size.to_string();
            let base = base.to_str().unwrap();
            let arguments =
                ["create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", name, &size];
            qemu("qemu-img", arguments);
        } else {
            folder.create("image.qcow2", options, self.size);
        }
        for snapshot in 0..self.snapshots {
            let write = format!("write -P {} {} 9000", snapshot + 1, snapshot as u64 * 20_000);
            qemu("qemu-io", ["-f", "qcow2", "-c", &write, name]);
            qemu("qemu-img", ["snapshot", "-c", &format!("s{snapshot}"), name]);
        }
        path
    }

    fn open(&self, path: &Path) -> Arc<dyn BlockDriver> {
        let options = OpenOptions {
            format: Some(Format::Qcow2),
            writable: true,
            table_cache_len: self.table_cache_len,
            discard: self.discard,
            ..OpenOptions::default()
        };
        open(path, &options).unwrap_or_else(|e| panic!("{}: {e}", self.name)).driver
    }

    fn saved(&self, folder: &Folder, path: &Path) -> Vec<Vec<u8>> {
        let bytes = |i| qemu_bytes(folder, path, &["-l", &format!("snapshot.name=s{i}")]);
        (0..self.snapshots).map(bytes).collect()
    }

    fn run(self) {
        let folder = Folder::new();
        let path = self.make(&folder);
        let disk = qemu_bytes(&folder, &path, &[]);
        let saved = self.saved(&folder, &path);
        let mut reopen = |driver: Arc<dyn BlockDriver>| {
            driver.close().unwrap();
            assert_clean(&path);
            self.open(&path)
        };
        // What is discarded may come back as zeroes only: never another's data, nor the backing file's.
        let model = Model {
            name: self.name,
            content: disk,
            len_max: (self.size / 4).min(300_000),
            discarded: &[0],
            reopen: Some(&mut reopen),
        };
        let driver = run(self.open(&path), model);
        let content = read_all(&*driver);
        driver.close().unwrap();
        assert_image(&folder, &path, &content);
        self.assert_raw_data_file(&folder, &content);
        assert!(self.saved(&folder, &path) == saved, "{}: a snapshot has changed", self.name);
    }

    /// Who reads a raw data file alone sees the same. (QEMU makes it as long as whole clusters are.)
    fn assert_raw_data_file(&self, folder: &Folder, content: &[u8]) {
        if self.options.contains("data_file_raw=on") {
            let data = std::fs::read(folder.file("data")).unwrap();
            let (disk, behind) = data.split_at(content.len());
            assert!(disk == content && behind.iter().all(|byte| *byte == 0), "{}: the data file", self.name);
        }
    }

    fn run_concurrently(self) {
        let folder = Folder::new();
        let path = self.make(&folder);
        let saved = self.saved(&folder, &path);
        let driver = self.open(&path);
        run_concurrently(&driver, self.name, 8, 777);
        let content = read_all(&*driver);
        driver.close().unwrap();
        assert_image(&folder, &path, &content);
        self.assert_raw_data_file(&folder, &content);
        assert!(self.saved(&folder, &path) == saved, "{}: a snapshot has changed", self.name);
    }
}

#[test]
fn cluster_lengths() {
    Case::new("512", "cluster_size=512", MIB).run();
    Case::new("4k", "cluster_size=4k", 4 * MIB).run();
    Case::new("64k", "cluster_size=64k", 8 * MIB + 5 * 512).run();
    Case::new("2M", "cluster_size=2M", 16 * MIB).run();
}

#[test]
fn version_2() {
    Case::new("v2 1k", "compat=v2,cluster_size=1k", 2 * MIB).run();
    Case { backing: Some(MIB), ..Case::new("v2 backing", "compat=v2,cluster_size=4k", 2 * MIB) }.run();
}

#[test]
fn refcount_widths() {
    for (name, options) in [
        ("width 1", "cluster_size=512,refcount_bits=1"),
        ("width 2", "cluster_size=512,refcount_bits=2"),
        ("width 4", "cluster_size=1k,refcount_bits=4"),
        ("width 8", "cluster_size=512,refcount_bits=8"),
        ("width 32", "cluster_size=512,refcount_bits=32"),
        ("width 64", "cluster_size=512,refcount_bits=64"),
    ] {
        Case::new(name, options, 3 * MIB).run();
    }
}

#[test]
fn backing_files() {
    for (name, len) in [("as long", MIB), ("shorter", MIB / 2 + 700), ("longer", 2 * MIB)] {
        Case { backing: Some(len), ..Case::new(name, "cluster_size=4k", MIB) }.run();
    }
    Case { backing: Some(4 * MIB), ..Case::new("64k over backing", "cluster_size=64k", 4 * MIB + 512) }.run();
}

#[test]
fn compressed_content() {
    Case { compressed: true, ..Case::new("zlib", "cluster_size=4k", MIB) }.run();
    Case { compressed: true, ..Case::new("zstd", "cluster_size=64k,compression_type=zstd", 2 * MIB) }.run();
}

#[test]
fn snapshots_stay_as_they_are() {
    Case { snapshots: 3, ..Case::new("snapshots 1k", "cluster_size=1k", MIB) }.run();
    Case { snapshots: 2, ..Case::new("snapshots 64k", "cluster_size=64k", 4 * MIB) }.run();
    Case { snapshots: 2, compressed: true, ..Case::new("compressed", "cluster_size=4k", MIB) }.run();
}

#[test]
fn data_files() {
    for (name, options) in [
        ("data file 512", "cluster_size=512,data_file=DATA"),
        ("data file 4k", "cluster_size=4k,data_file=DATA"),
        ("data file 64k", "cluster_size=64k,data_file=DATA,preallocation=metadata"),
        ("raw data file 512", "cluster_size=512,data_file=DATA,data_file_raw=on"),
        ("raw data file 64k", "cluster_size=64k,data_file=DATA,data_file_raw=on,lazy_refcounts=on"),
    ] {
        Case::new(name, options, MIB + 5 * 512).run();
    }
    let options = "cluster_size=4k,data_file=DATA";
    for (name, len) in [("data file, as long", MIB), ("data file, shorter", MIB / 2 + 700)] {
        Case { backing: Some(len), ..Case::new(name, options, MIB) }.run();
    }
    Case { discard: false, ..Case::new("data file, no discard", options, MIB) }.run();
    Case { table_cache_len: 0, ..Case::new("data file, tiny cache", "cluster_size=512,data_file=DATA", MIB) }
        .run();
}

#[test]
fn subclusters() {
    for (name, options, size) in [
        ("subclusters of 512", "cluster_size=16k,extended_l2=on", MIB + 3 * 512),
        ("subclusters of 2k", "cluster_size=64k,extended_l2=on", 2 * MIB),
        ("subclusters of 64k", "cluster_size=2M,extended_l2=on,refcount_bits=64", 8 * MIB),
        ("subclusters, preallocated", "cluster_size=16k,extended_l2=on,preallocation=metadata", MIB),
        ("subclusters, data file", "cluster_size=16k,extended_l2=on,data_file=DATA", MIB),
        ("subclusters, raw", "cluster_size=16k,extended_l2=on,data_file=DATA,data_file_raw=on", MIB),
    ] {
        Case::new(name, options, size).run();
    }
    let options = "cluster_size=16k,extended_l2=on";
    let case = |name, options| Case::new(name, options, MIB);
    for (name, len) in [("subclusters, as long", MIB), ("subclusters, shorter", MIB / 2 + 700)] {
        Case { backing: Some(len), ..case(name, options) }.run();
    }
    Case {
        backing: Some(MIB),
        ..case("subclusters, data overlay", "cluster_size=16k,extended_l2=on,data_file=DATA")
    }
    .run();
    Case { snapshots: 3, ..case("subclusters, snapshots", options) }.run();
    Case { snapshots: 2, compressed: true, ..case("subclusters, compressed", options) }.run();
    let zstd = "cluster_size=64k,extended_l2=on,compression_type=zstd";
    Case { compressed: true, ..case("subclusters, zstd", zstd) }.run();
    Case { discard: false, table_cache_len: 0, ..case("subclusters, odd", options) }.run();
}

#[test]
fn odds() {
    Case { discard: false, ..Case::new("no discard", "cluster_size=4k", MIB) }.run();
    Case { table_cache_len: 0, ..Case::new("tiny cache", "cluster_size=512", MIB) }.run();
    Case::new("lazy", "cluster_size=4k,lazy_refcounts=on", MIB).run();
    Case::new("preallocated", "cluster_size=4k,preallocation=metadata", MIB).run();
    Case::new("falloc", "cluster_size=4k,preallocation=falloc", MIB + 300).run();
}

/// K1 and K2 of the reliability reference: many threads, tables that do not fit, an overlay.
#[test]
fn eight_threads() {
    Case { table_cache_len: 0, ..Case::new("threads 512", "cluster_size=512", MIB) }.run_concurrently();
    let tiny = Case { table_cache_len: 0, ..Case::new("threads overlay", "cluster_size=4k", 2 * MIB) };
    Case { backing: Some(2 * MIB), ..tiny }.run_concurrently();
    Case { snapshots: 2, ..Case::new("threads snapshots", "cluster_size=1k", MIB) }.run_concurrently();
    Case { compressed: true, ..Case::new("threads compressed", "cluster_size=64k", 4 * MIB) }
        .run_concurrently();
    let split = |name| Case { table_cache_len: 0, ..Case::new(name, "cluster_size=16k,extended_l2=on", MIB) };
    split("threads subclusters").run_concurrently();
    Case { backing: Some(MIB), ..split("threads subclusters overlay") }.run_concurrently();
    Case { snapshots: 2, ..split("threads subclusters snapshots") }.run_concurrently();
    let outside = |name, options| Case { table_cache_len: 0, ..Case::new(name, options, MIB) };
    outside("threads data file", "cluster_size=4k,data_file=DATA").run_concurrently();
    outside("threads raw data file", "cluster_size=512,data_file=DATA,data_file_raw=on").run_concurrently();
    Case { backing: Some(MIB), ..outside("threads data overlay", "cluster_size=512,data_file=DATA") }
        .run_concurrently();
}
