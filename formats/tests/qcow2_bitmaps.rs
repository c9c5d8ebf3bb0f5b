//! Dirty bitmaps as they lie in the file: what the tables say is what is told, and tables that lie are refused by
//! name, at once and within bounds on memory, while the disk itself is read all the same.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/hostile.rs"]
mod hostile;
mod qcow2_support;

use std::ops::ControlFlow;

use hostile::{be64, bounded, memory_driver, poke};
use nbd_img_formats::driver::Status;
use nbd_img_formats::{BlockDriver, GuestRange, Result, StatusQuery};
use qcow2_support::{Folder, qemu, qemu_io};

/// A disk whose bits at 512 bytes each take four clusters of 512 bytes, the last one in part.
const SIZE: u64 = (3 * 4096 + 1000) * 512;

/// An image with a bitmap `dirty` that has bits in three of its four clusters.
fn image() -> Vec<u8> {
    let folder = Folder::new();
    let path = folder.create("image.qcow2", "cluster_size=512", SIZE);
    qemu("qemu-img", ["bitmap", "--add", "-g", "512", path.to_str().unwrap(), "dirty"]);
    let commands = ["write 0 512", "write 2560k 512", "write 6M 512"].map(str::to_owned);
    qemu_io(&path, &commands);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Where its directory begins.
fn directory_of(bytes: &[u8]) -> u64 {
    let extension = bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap();
    be64(bytes, extension + 24)
}

fn runs(driver: &dyn BlockDriver, name: &str) -> Vec<(u64, bool)> {
    let mut runs = Vec::new();
    let range = GuestRange::new(0, driver.size()).unwrap();
    let visit = &mut |len, status| {
        let Status::Bitmap { dirty } = status else { panic!("{status:?}") };
        runs.push((len, dirty));
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap(name), range, visit).unwrap();
    runs
}

fn offered(bytes: &[u8], name: &str) -> Result<bool> {
    let driver = memory_driver(bytes, None)?;
    let offered = driver.offer_bitmap(name);
    assert_eq!(qcow2_support::read_all(&*driver).len() as u64, SIZE);
    offered
}

#[test]
fn tables_say_where_the_bits_are() {
    let mut bytes = image();
    let at = |sectors: u64| sectors * 512;
    let driver = memory_driver(&bytes, None).unwrap();
    assert!(driver.offer_bitmap("dirty").unwrap());
    let expected = [
        (512, true),
        (at(5119), false),
        (512, true),
        (at(12288 - 5121), false),
        (512, true),
        (at(999), false),
    ];
    assert_eq!(runs(&*driver, "dirty"), expected);
    // Whole clusters of ones and of zeroes need no place; what is behind the end of the disk does not count.
    let table = be64(&bytes, usize::try_from(directory_of(&bytes)).unwrap());
    poke(&mut bytes, table, &[[0; 7].as_slice(), &[1], &[0; 8]].concat());
    poke(&mut bytes, table + 24, &[0, 0, 0, 0, 0, 0, 0, 1]);
    let driver = memory_driver(&bytes, None).unwrap();
    assert!(driver.offer_bitmap("dirty").unwrap());
    assert_eq!(runs(&*driver, "dirty"), [(at(4096), true), (at(8192), false), (at(1000), true)]);
    let nobody = driver.status(StatusQuery::Bitmap("x"), GuestRange::new(0, 512).unwrap(), &mut |_, _| {
        ControlFlow::Continue(())
    });
    assert!(nobody.is_err() && !driver.offer_bitmap("x").unwrap());
}

#[test]
fn tables_that_lie_are_refused() {
    let good = image();
    let directory = directory_of(&good);
    let table = be64(&good, usize::try_from(directory).unwrap());
    let first = be64(&good, usize::try_from(table).unwrap());
    let l1 = be64(&good, 40);
    let be = |value: u64| value.to_be_bytes().to_vec();
    let cases: Vec<(&str, u64, Vec<u8>, &str)> = vec![
        ("reserved bits, low", table, be(first | 2), "entry 0"),
        ("reserved bits, high", table, be(first | 1 << 56), "entry 0"),
        ("a place and all ones", table + 24, be(first | 1), "entry 3"),
        ("behind the end", table, be(1 << 40), "ends inside of its bits"),
        ("the same place twice", table + 8, be(first), "other metadata"),
        ("the L1 table", table + 8, be(l1), "other metadata"),
        ("the table itself", table + 8, be(table), "other metadata"),
        ("the directory", table + 8, be(directory), "other metadata"),
        ("a misplaced table", directory, be(table + 8), "cannot lie"),
        ("a table in the header", directory, be(0), "cannot lie"),
        ("a table behind the end", directory, be(1 << 40), "ends inside of its table"),
        ("a table behind everything", directory, be(!0 << 9), "cannot lie"),
        ("a table on the refcount table", directory, be(be64(&good, 48)), "its table"),
        ("too few entries", directory + 8, vec![0, 0, 0, 3], "3 entries, not 4"),
        ("too many entries", directory + 8, vec![0, 0, 0, 5], "5 entries, not 4"),
        ("no entries", directory + 8, vec![0; 4], "bytes of bits"),
        ("all entries", directory + 8, vec![0xff; 4], "bytes of bits"),
        ("in use", directory + 15, vec![3], "full backup"),
        ("an unknown flag", directory + 15, vec![8], "flags 0x8"),
        ("an unknown type", directory + 16, vec![2], "type 2"),
        ("too fine", directory + 17, vec![8], "granularity"),
        ("too coarse", directory + 17, vec![32], "granularity"),
        ("impossible", directory + 17, vec![64], "makes no sense"),
        ("no name", directory + 18, vec![0; 2], "makes no sense"),
        ("a long name", directory + 18, vec![0xff; 2], "makes no sense"),
        ("extra data behind the end", directory + 20, vec![0xff; 4], "makes no sense"),
    ];
    for (what, at, with, said) in cases {
        let mut bytes = good.clone();
        poke(&mut bytes, at, &with);
        let error = bounded(what, || offered(&bytes, "dirty")).err().unwrap_or_else(|| panic!("{what}"));
        assert!(error.to_string().contains(said), "{what}: {error}");
    }
}

/// Extra data that nobody here knows forbids the use of the bitmap, unless its flag allows it.
#[test]
fn extra_data_is_minded() {
    let mut bytes = image();
    let directory = directory_of(&bytes);
    let extension = bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64;
    // Eight bytes of extra data before the name.
    poke(&mut bytes, extension + 16, &40u64.to_be_bytes());
    poke(&mut bytes, directory + 20, &[0, 0, 0, 8]);
    poke(&mut bytes, directory + 24, b"whoknowsdirty\0\0\0");
    let error = offered(&bytes, "dirty").err().unwrap();
    assert!(error.to_string().contains("extra data"), "{error}");
    poke(&mut bytes, directory + 15, &[6]);
    assert!(offered(&bytes, "dirty").unwrap());
    // Without its bit in the header nobody knows what was written since.
    poke(&mut bytes, 95, &[0]);
    assert!(!offered(&bytes, "dirty").unwrap());
}
