//! A disk whose format was only guessed does not become an image of another format.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, HostOffset, Provision, ZeroRequest};

const QCOW: &[u8] = b"QFI\xfb";
/// QED's magic ends in a zero.
const QED: &[u8] = b"QED\0";

fn magic(head: &[u8]) -> Option<&'static str> {
    let vdi = head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]);
    match () {
        () if head.starts_with(QCOW) => Some("qcow2"),
        () if head.starts_with(QED) => Some("QED"),
        () if vdi => Some("VDI"),
        () => None,
    }
}

fn open(refuse: bool) -> (Arc<MemoryStorage>, Arc<RawDriver>) {
    let storage = MemoryStorage::copy_of(&[1; 10_000]).unwrap();
    let options = RawOptions { refuse_magic: refuse.then_some(magic as _), ..RawOptions::default() };
    let disk = RawDriver::open(Arc::clone(&storage) as _, options).unwrap();
    (storage, disk)
}

fn content(storage: &MemoryStorage) -> Vec<u8> {
    let mut buf = vec![0; 10_000];
    storage.pread(&mut buf, HostOffset(0)).unwrap();
    buf
}

fn zero(disk: &RawDriver, at: u64, len: u64) -> nbd_img_formats::Result<()> {
    let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
    disk.write_zeroes(GuestRange::new(at, len).unwrap(), request)
}

#[test]
fn a_magic_is_refused_in_one_write_and_in_pieces() {
    let (storage, disk) = open(true);
    let before = content(&storage);
    let error = disk.pwrite(0, &[QCOW, &[0; 4000]].concat(), Durability::Later).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("--format raw") && error.to_string().contains("qcow2"), "{error}");
    assert!(content(&storage) == before, "a refused write does nothing");
    for at in [1, 2, 3] {
        disk.pwrite(at, &QCOW[at as usize..][..1], Durability::Later).unwrap();
    }
    let error = disk.pwrite(0, &QCOW[..1], Durability::Fua).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    disk.pwrite(0, b"X", Durability::Later).unwrap();
    disk.pwrite(4, &[7; 5000], Durability::Later).unwrap();
    disk.pwrite(5000, QCOW, Durability::Later).unwrap();
    assert_eq!(content(&storage)[..5], [b'X', QCOW[1], QCOW[2], QCOW[3], 7]);
}

#[test]
fn a_magic_further_in_is_refused_too() {
    let (_, disk) = open(true);
    disk.pwrite(0x41, &[0x10, 0xda, 0xbe], Durability::Later).unwrap();
    assert_eq!(disk.pwrite(0x40, &[0x7f], Durability::Later).unwrap_err().kind(), ErrorKind::Denied);
}

#[test]
fn zeroes_and_discards_do_not_complete_a_magic() {
    let (storage, disk) = open(true);
    disk.pwrite(0, b"QED1", Durability::Later).unwrap();
    assert_eq!(zero(&disk, 3, 1).unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(zero(&disk, 3, 9000).unwrap_err().kind(), ErrorKind::Denied);
    disk.discard(GuestRange::new(3, 9000).unwrap(), Durability::Later).unwrap();
    assert_eq!(content(&storage)[..5], *b"QED1\x01");
    zero(&disk, 0, 9000).unwrap();
    assert!(content(&storage)[..9000].iter().all(|byte| *byte == 0));
}

#[test]
fn concurrent_pieces_do_not_get_past() {
    for _ in 0..200 {
        let (storage, disk) = open(true);
        std::thread::scope(|scope| {
            for (at, byte) in QCOW.iter().enumerate() {
                let disk = &disk;
                scope.spawn(move || disk.pwrite(at as u64, &[*byte], Durability::Later).is_ok());
            }
        });
        assert!(magic(&content(&storage)).is_none());
    }
}

#[test]
fn a_stated_format_is_not_watched() {
    let (storage, disk) = open(false);
    disk.pwrite(0, QCOW, Durability::Later).unwrap();
    assert!(content(&storage).starts_with(QCOW));
}
