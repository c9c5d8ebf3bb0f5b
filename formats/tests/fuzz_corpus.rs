//! The corpus of the fuzz targets of images (`tests/fuzz`), replayed: seeds, and every input that ever failed.
//!
//! Each input has to keep to the bounds on time and memory that hostile images have.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../tests/fuzz/src/formats/mod.rs"]
mod formats;
#[path = "qcow2_support/hostile.rs"]
mod hostile;
mod support;

use std::path::{Path, PathBuf};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target)
}

/// Runs every input of a target's corpus; there are at least `least`.
fn replay(target: &str, least: usize, run: fn(&[u8])) {
    let folder = corpus(target);
    let files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= least, "{} has {} inputs", folder.display(), files.len());
    for file in files {
        let input = std::fs::read(&file).unwrap();
        // The test's output is shown when it fails, and then the last line names the input.
        println!("{}", file.display());
        hostile::bounded(target, || run(&input));
    }
}

#[test]
fn damaged_images_that_are_written() {
    replay("qcow2_write", 100, formats::written::run);
}

#[test]
fn any_bytes_as_an_image() {
    for (name, seed) in formats::seeds() {
        assert!(
            std::fs::read(corpus("qcow2_bytes").join(name)).unwrap() == seed,
            "{name} is made anew by `seeds`"
        );
    }
    replay("qcow2_bytes", 6, formats::bytes::run);
}

#[test]
fn any_bytes_as_a_compressed_cluster() {
    replay("qcow2_blob", 20, formats::blob::run);
}

/// Without damage the small image is what the target takes it for in every shape, so that the target is strict
/// with it: all of these succeed, and the tests' checker finds the image clean.
#[test]
fn small_images_are_sound() {
    for bits in 0..128 {
        for (clusters, refcounts) in
            [0, 11, 13, 15].iter().flat_map(|clusters| (0..7).map(move |r| (clusters, r)))
        {
            write_undamaged(&[bits, clusters | refcounts << 4]);
        }
    }
}

/// The same with data files, extended L2 entries and bitmaps.
#[test]
fn small_images_with_more_features_are_sound() {
    for features in 0..128 {
        for (refcounts, bits) in [(0, 0), (4, 0x04), (6, 0x42), (4, 0x10), (4, 0x64)] {
            write_undamaged(&[bits, 8 | refcounts << 4, features]);
        }
    }
}

/// Does a few things with the image that is asked for.
fn write_undamaged(shape: &[u8]) {
    let operations: [&[u8]; 7] = [
        // Written by a plan, zeroed, written over the end of a table, flushed, discarded, opened again, read.
        &[0, 5, 0, 3, 8],
        &[6, 9, 0, 5, 2],
        &[0, 62, 8, 13, 0],
        &[12, 0, 0, 0],
        &[8, 2, 0, 9],
        &[15, 0, 0, 0],
        &[10, 0, 0, 255],
    ];
    let undamaged_and_writable = [0, 7];
    formats::written::run(&[shape, &undamaged_and_writable, &operations.concat()].concat());
}
