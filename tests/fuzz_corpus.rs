//! The corpus of the fuzz targets of the protocol (`tests/fuzz`), replayed: seeds, and every input that ever failed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

#[path = "fuzz/src/nbd/mod.rs"]
mod nbd;
mod nbd_support;

use std::path::{Path, PathBuf};

/// Runs every input of a target's corpus; there are at least `least`.
fn replay(target: &str, least: usize, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= least, "{} has {} inputs", folder.display(), files.len());
    for file in files {
        // The test's output is shown when it fails, and then the last line names the input.
        println!("{}", file.display());
        run(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn handshakes() {
    replay("nbd_handshake", 50, nbd::handshake::run);
}

#[test]
fn transmissions() {
    replay("nbd_transmission", 50, nbd::transmission::run);
}

#[test]
fn chosen_options() {
    replay("nbd_options", 50, nbd::structured::options);
}

#[test]
fn chosen_requests() {
    replay("nbd_requests", 50, nbd::structured::requests);
}
