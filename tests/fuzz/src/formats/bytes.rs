//! Target `qcow2_bytes`: any bytes, opened as an image.
//!
//! It is read and, when it can be opened for that, written in a few fixed places. Nothing is known of what it
//! holds, so all that counts is that nothing panics, hangs or takes much memory, and that reading changes nothing.

use std::ops::ControlFlow;

use nbd_img_formats::qcow2::Qcow2Driver;
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, GuestRange, Provision, StatusQuery, ZeroRequest};

use super::open::{How, bytes_of, open};

/// Content of the backing file.
const BACKING: [u8; 5000] = [5; 5000];
/// Bytes of each read.
const READ_LEN: u64 = 64 << 10;

/// Opens the input, read-only and for writing.
pub fn run(input: &[u8]) {
    read_only(input);
    let storage = MemoryStorage::copy_of(input).unwrap();
    for _ in 0..2 {
        let Ok(driver) = open(&storage, &how(None, true)) else { return };
        write(&driver);
        let _ = driver.close();
    }
}

fn how(snapshot: Option<&str>, writable: bool) -> How<'_> {
    How { backing: &BACKING, data: None, snapshot, writable, table_cache_len: 0 }
}

fn read_only(input: &[u8]) {
    let storage = MemoryStorage::copy_of(input).unwrap();
    let mut snapshots = Vec::new();
    if let Ok(driver) = open(&storage, &how(None, false)) {
        read(&driver);
        snapshots = driver.info().unwrap().snapshots;
    }
    for snapshot in snapshots.iter().take(2) {
        if let Ok(driver) = open(&storage, &how(Some(&snapshot.name), false)) {
            read(&driver);
        }
    }
    assert!(bytes_of(&storage).is_some_and(|now| now == input), "a read-only image has been changed");
}

/// Places where a request may begin.
fn places(size: u64) -> [u64; 4] {
    [0, size / 3, size.saturating_sub(READ_LEN), size.saturating_sub(100)]
}

/// Most dirty bitmaps of an image that are asked for.
const BITMAPS_MAX: usize = 4;

fn read(driver: &Arc<Qcow2Driver>) {
    let size = driver.size();
    let listed = driver.info().unwrap().bitmaps.into_iter().map(|bitmap| bitmap.name).take(BITMAPS_MAX);
    let offered: Vec<String> = listed.filter(|name| matches!(driver.offer_bitmap(name), Ok(true))).collect();
    let mut buf = vec![0; READ_LEN as usize];
    for at in places(size) {
        let len = (size - at).min(READ_LEN);
        let _ = driver.pread(at, &mut buf[..len as usize]);
        let range = GuestRange::new(at, (size - at).min(1 << 20)).unwrap();
        let bitmaps = offered.iter().map(|name| StatusQuery::Bitmap(name));
        for query in [StatusQuery::Allocation, StatusQuery::Depth].into_iter().chain(bitmaps) {
            let mut covered = 0;
            let outcome = driver.status(query, range, &mut |len, _| {
                covered += len;
                ControlFlow::Continue(())
            });
            assert!(outcome.is_err() || covered == range.len());
        }
    }
}

fn write(driver: &Arc<Qcow2Driver>) {
    let size = driver.size();
    for (number, at) in places(size).into_iter().enumerate() {
        let range = GuestRange::new(at, (size - at).min(1700)).unwrap();
        let bytes = vec![7; range.len() as usize];
        let durability = if number == 2 { Durability::Fua } else { Durability::Later };
        if driver.pwrite(at, &bytes, durability).is_ok() {
            let mut got = vec![0; bytes.len()];
            let _ = driver.pread(at, &mut got);
        }
        let _ = driver.discard(GuestRange::new(at, range.len() / 2).unwrap(), Durability::Later);
        for provision in [Provision::Unmap, Provision::Allocate] {
            let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
            let _ = driver.write_zeroes(range, request);
        }
    }
    let _ = driver.flush();
    read(driver);
}
