//! qcow2 images against the bytes that qemu-img finds in them, by random operations in both ways in which
//! the program reads: by calls, and by plans carried out by hand.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod support;

use std::path::Path;

use nbd_img_formats::open::{OpenOptions, open};
use qcow2_support::{Folder, mixed_content, qemu, qemu_bytes, qemu_io};
use support::model::{Model, run};

const LEN: u64 = 3 << 20;

/// A chain of three images, the lowest compressed, the top with zeroes and data.
fn chain(folder: &Folder, low: &str, top: &str) -> std::path::PathBuf {
    let (raw, base, image) = (folder.file("raw"), folder.file("base.qcow2"), folder.file("top.qcow2"));
    mixed_content(&raw, LEN - 1024, 3);
    let (from, to) = (raw.to_str().unwrap(), base.to_str().unwrap());
    qemu("qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", low, from, to]);
    let options = format!("{top},backing_file=base.qcow2,backing_fmt=qcow2");
    folder.create("top.qcow2", &options, LEN);
    let writes = ["write -P 1 10k 100k", "write -z 300k 70k", "write -P 2 1M 64k", "discard 1M 20k"];
    qemu_io(&image, &writes.map(str::to_owned));
    image
}

fn check(name: &str, folder: &Folder, image: &Path, options: &OpenOptions) {
    let content = qemu_bytes(folder, image, &[]);
    let driver = open(image, options).unwrap().driver;
    let model = Model { name, content, len_max: 300_000, discarded: &[], reopen: None };
    run(driver, model).close().unwrap();
}

#[test]
fn small_clusters_and_a_tiny_cache() {
    let folder = Folder::new();
    let image = chain(&folder, "cluster_size=512", "cluster_size=1k");
    let options = OpenOptions { table_cache_len: 0, ..OpenOptions::default() };
    check("small clusters", &folder, &image, &options);
}

#[test]
fn extended_l2_over_zstd() {
    let folder = Folder::new();
    let image = chain(&folder, "compression_type=zstd", "extended_l2=on");
    check("extended L2", &folder, &image, &OpenOptions::default());
}

#[test]
fn an_external_data_file() {
    let folder = Folder::new();
    let data = folder.file("data.bin");
    let image = chain(&folder, "cluster_size=4k", &format!("data_file={}", data.display()));
    check("external data file", &folder, &image, &OpenOptions::default());
}

/// Blobs and tables lie where they lie; O_DIRECT's alignment is solved below.
#[test]
fn without_the_page_cache() {
    let folder = Folder::new();
    let image = chain(&folder, "cluster_size=4k", "cluster_size=512");
    let options = OpenOptions { direct: true, ..OpenOptions::default() };
    check("direct", &folder, &image, &options);
}
