//! Images that lie, opened for writing: what is claimed of clusters that a small file does not have costs neither
//! time nor memory, and no number out of a table is too large to be counted with.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "qcow2_support/hostile.rs"]
mod hostile;
mod support;

use hostile::bounded;
use nbd_img_formats::qcow2::{CheckOptions, Repair, WriteOptions, check};
use nbd_img_formats::storage::{MemoryStorage, Provision};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, HostOffset, State, Storage, ZeroRequest,
};
use support::image::{Bytes, COPIED, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::scene::open_over;
use support::wrapped::{NeverClosed, Wrapped};

/// A storage with an image of version 3 that has one L1 entry, with these bytes of the header and the file set.
fn image(
    cluster_bits: u32,
    refcount_order: u32,
    table_clusters: u32,
    pokes: &[(u64, &[u8])],
) -> Arc<MemoryStorage> {
    let cluster_len = 1u64 << cluster_bits;
    let l1 = (1 + u64::from(table_clusters)) * cluster_len;
    let storage = MemoryStorage::new(l1 + cluster_len).unwrap();
    let put = |at: u64, with: &[u8]| storage.pwrite(with, HostOffset(at), Durability::Later).unwrap();
    put(0, &0x5146_49fb_u32.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &cluster_len.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &l1.to_be_bytes());
    put(48, &cluster_len.to_be_bytes());
    put(56, &table_clusters.to_be_bytes());
    put(96, &refcount_order.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    for (at, with) in pokes {
        put(*at, with);
    }
    storage
}

/// Refcounts of one bit in clusters of 2 MiB count clusters up to 2^65, where offsets end at 2^56: what was behind
/// the last cluster in use must not wrap around to the start of the file.
#[test]
fn refcounts_of_clusters_that_cannot_be_are_of_no_use() {
    let cluster = 2u64 << 20;
    let last = (1 << 20) - 1;
    for index in [last, last / 2, 1 << 12, 1 << 11] {
        let pokes: [(u64, &[u8]); 2] =
            [(cluster + 8 * index, &(6 * cluster).to_be_bytes()), (7 * cluster - 1, &[0xff])];
        let storage = image(21, 0, 4, &pokes);
        bounded("write", || {
            let driver = open_over(storage, None, Some(WriteOptions::default()), 0).unwrap();
            if let Err(error) = driver.pwrite(0, &[1; 512], Durability::Later) {
                assert_ne!(error.kind(), ErrorKind::Corrupt, "{error}");
            }
            let _ = driver.close();
        });
    }
}

/// Says that the refcounts are to be rebuilt.
const DIRTY: (u64, &[u8]) = (79, &[1]);

/// What the repair of an image says that it cannot rebuild.
fn refused(storage: Arc<MemoryStorage>) -> String {
    let opened = bounded("repair", || open_over(storage, None, Some(WriteOptions::default()), 0));
    let error = opened.err().unwrap();
    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error}");
    error.to_string()
}

/// The longest refcount table, all of which names one block of zeroes: that is known to be wrong before a million of them are
/// looked through for the last cluster in use. The first change says so.
#[test]
fn a_block_that_is_named_often_is_not_looked_through_as_often() {
    let cluster = 2u64 << 20;
    let table: Vec<u8> = (0..1 << 20).flat_map(|_| (6 * cluster).to_be_bytes()).collect();
    let storage = image(21, 4, 4, &[(cluster, &table), (7 * cluster - 1, &[0])]);
    let write = Some(WriteOptions::default());
    let driver = bounded("open", || open_over(storage, None, write, 0)).unwrap();
    driver.pread(0, &mut [0; 512]).unwrap();
    let error = bounded("write", || driver.pwrite(0, &[1; 512], Durability::Later)).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("a refcount block"), "{error}");
    assert_eq!(driver.state(), State::Failed);
    let _ = driver.close();
}

/// A refcount table full of blocks for what is far behind the end of the file, which count nothing, in a file of holes: a
/// repair looks at one after the other, and keeps none of them.
#[test]
fn blocks_that_count_nothing_are_not_gathered_by_a_repair() {
    let cluster = 2u64 << 20;
    let blocks = 80u64;
    let table: Vec<u8> = (0..blocks).flat_map(|number| ((3 + number) * cluster).to_be_bytes()).collect();
    let storage = image(21, 4, 1, &[(cluster, &table), ((3 + blocks) * cluster - 1, &[0])]);
    let storage: Arc<dyn Storage> = Wrapped::new(storage, NeverClosed);
    let options = CheckOptions { repair: Repair::All, ..CheckOptions::default() };
    let report = bounded("repair", || check(&storage, options)).unwrap();
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 3 + blocks), "{report:?}");
}

/// A million entries of the L1 table lead to one L2 table: it is read once, and counted a million times.
#[test]
fn a_table_that_is_led_to_often_is_walked_once() {
    let cluster = 64u64 << 10;
    let (l1, entries) = (2 * cluster, 1u64 << 20);
    let l2 = l1 + entries * 8;
    let l1_table: Vec<u8> = (0..entries).flat_map(|_| l2.to_be_bytes()).collect();
    let l2_table = (l2 + cluster).to_be_bytes();
    let size = (entries as u32).to_be_bytes();
    let pokes: [(u64, &[u8]); 5] =
        [DIRTY, (36, &size), (l1, &l1_table), (l2, &l2_table), (l2 + 2 * cluster - 1, &[0])];
    let text = refused(image(16, 4, 1, &pokes));
    assert!(text.contains("more often than can be counted"), "{text}");
    let storage = image(16, 6, 1, &pokes);
    let storage = Wrapped::new(storage, NeverClosed);
    let driver = bounded("repair", || open_over(storage.clone(), None, Some(WriteOptions::default()), 0));
    let driver = driver.unwrap();
    driver.pwrite(0, &[1; 512], Durability::Later).unwrap();
    driver.close().unwrap();
    let bytes: &dyn Storage = &*storage;
    let image = Image::parse(&bytes).unwrap();
    assert_eq!(image.refcount(l2 / cluster), entries - 1, "one of them has its own table now");
    assert_eq!(image.refcount(l2 / cluster + 1), entries - 1, "and its own data");
}

/// Entries that are spread over petabytes cost neither counters nor refcount blocks for what is between them: behind the
/// end of the file they make no sense, and a file that reaches there is longer than any that is rebuilt.
#[test]
fn what_tables_name_far_away_is_not_counted_at_any_price() {
    let cluster = 2u64 << 20;
    let (l1, l2) = (2 * cluster, 3 * cluster);
    let l1_table = (l2 | COPIED).to_be_bytes();
    let l2_table: Vec<u8> = (1..70_000u64).flat_map(|number| (number << 36).to_be_bytes()).collect();
    let mut pokes = vec![DIRTY, (l1, &l1_table[..]), (l2, &l2_table), (l2 + cluster - 1, &[0])];
    let text = refused(image(21, 6, 1, &pokes));
    assert!(text.contains("outside of the file"), "{text}");
    pokes.push((70_000 << 36, &[0]));
    refused(image(21, 6, 1, &pokes));
}

/// Two thousand snapshots that claim the longest L1 tables, each elsewhere, in an image of 200 KiB.
#[test]
fn the_tables_of_all_snapshots_are_bounded_together() {
    let at = 4096u64;
    let mut table = Vec::new();
    for number in 0..2000u64 {
        table.extend((1 << 40 | number << 25).to_be_bytes());
        table.extend((4u32 << 20).to_be_bytes());
        table.extend([0; 24]);
        table.extend(16u32.to_be_bytes());
        table.extend([0; 8]);
        table.extend(512u64.to_be_bytes());
    }
    let snapshots = [2000u32.to_be_bytes().to_vec(), at.to_be_bytes().to_vec()].concat();
    let storage = image(9, 4, 1, &[(60, &snapshots), (at, &table)]);
    let error = bounded("open", || open_over(storage, None, Some(WriteOptions::default()), 0).err()).unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("snapshots"), "{error}");
}

/// A cluster of the guest's data that the refcounts do not know of is handed out as a table after the entry that names
/// it was looked at: what is written to the guest's cluster then must not get there. No table is written over.
#[test]
fn data_does_not_get_into_a_table_that_came_to_lie_there() {
    const CLUSTER: u64 = 512;
    let maker = Maker::new("cluster_size=512,refcount_bits=16", 192 * CLUSTER);
    maker.io(&["write -q -P 7 0 8k"]);
    let good = maker.bytes();
    let parsed = Image::parse(&good).unwrap();
    let entry = ((good.be64(parsed.l1_at) & OFFSET_MASK) + 2 * 8) as usize;
    let host = good.be64(entry as u64) & OFFSET_MASK;
    let end = (good.len() as u64).next_multiple_of(CLUSTER);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let count = (parsed.refcount_table[0] + host / CLUSTER * 2) as usize;
    let twice = (host | COPIED).to_be_bytes();
    let damages = [
        ("it is counted as free", host, with(count, &[0, 0])),
        ("it lies behind the end", end, with(entry, &(end | COPIED).to_be_bytes())),
        ("another entry that names it is discarded", host, with(entry + 8, &twice)),
    ];
    for (what, host, bytes) in damages {
        for by_write in [false, true] {
            let storage = MemoryStorage::copy_of(&bytes).unwrap();
            let storage = Wrapped::new(storage, NeverClosed);
            let driver = open_over(storage.clone(), None, Some(WriteOptions::default()), 1 << 20).unwrap();
            // The slice with the entry is in memory from here on.
            driver.pread(2 * CLUSTER, &mut [0; CLUSTER as usize]).unwrap();
            if by_write {
                driver.pwrite(2 * CLUSTER, &[8; CLUSTER as usize], Durability::Later).unwrap();
            }
            if what.ends_with("discarded") {
                let other = GuestRange::new(3 * CLUSTER, CLUSTER).unwrap();
                driver.discard(other, Durability::Later).unwrap();
                driver.flush().unwrap();
            }
            driver.pwrite(130 * CLUSTER, &[9; CLUSTER as usize], Durability::Later).unwrap();
            driver.flush().unwrap();
            let file: &dyn Storage = &*storage;
            let now = Image::parse(&file).unwrap();
            assert_eq!(file.be64(now.l1_at + 16) & OFFSET_MASK, host, "{what}: no table came to lie there");
            let before = file.table(host, CLUSTER / 8);
            let written = driver.pwrite(2 * CLUSTER, &[0x5a; CLUSTER as usize], Durability::Later);
            assert_eq!(file.table(host, CLUSTER / 8), before, "{what}: the table was written over");
            assert_eq!(written.err().map(|e| e.kind()), Some(ErrorKind::Corrupt), "{what}");
            assert_eq!(driver.state(), State::Failed, "{what}");
            let mut read = [0; CLUSTER as usize];
            driver.pread(130 * CLUSTER, &mut read).unwrap();
            assert_eq!(read, [9; CLUSTER as usize], "{what}");
            assert!(Image::parse(&file).unwrap().is_corrupt(), "{what}: it does not say so");
            let _ = driver.close();
        }
    }
}

/// The same within one request: what one of its clusters takes, a refcount block, comes to lie where the entry of another
/// one leads, be it looked at after that or, where places are only collected at first, before.
#[test]
fn a_request_does_not_get_into_the_metadata_that_it_makes() {
    const CLUSTER: u64 = 512;
    const COUNTS_OF_A_BLOCK: u64 = CLUSTER / 8;
    let mut met = [0; 2];
    for filled in 1..COUNTS_OF_A_BLOCK - 4 {
        let maker = Maker::new("cluster_size=512,refcount_bits=64", 64 * CLUSTER);
        maker.io(&[&format!("write -q -P 7 0 {}", filled * CLUSTER)]);
        let good = maker.bytes();
        let parsed = Image::parse(&good).unwrap();
        let table = good.be64(parsed.l1_at) & OFFSET_MASK;
        // Behind the end of the file, where a block may come to lie.
        let end = (good.len() as u64).next_multiple_of(CLUSTER);
        for (way, host) in
            [(0, end + CLUSTER), (0, end + 2 * CLUSTER), (1, end + CLUSTER), (1, end + 2 * CLUSTER)]
        {
            let led = if way == 0 { 63 } else { 61 };
            let mut bytes = good.clone();
            let entry = (table + led * 8) as usize;
            bytes[entry..entry + 8].copy_from_slice(&(host | COPIED).to_be_bytes());
            let storage = Wrapped::new(MemoryStorage::copy_of(&bytes).unwrap(), NeverClosed);
            let driver = open_over(storage.clone(), None, Some(WriteOptions::default()), 1 << 20).unwrap();
            // With the table in memory, and room in the file, the request has to wait for nothing.
            driver.pwrite(60 * CLUSTER, &[6; CLUSTER as usize], Durability::Later).unwrap();
            let written = match way {
                0 => driver.pwrite(61 * CLUSTER, &[0x5a; 3 * CLUSTER as usize], Durability::Later),
                _ => {
                    let (provision, durability) = (Provision::Allocate, Durability::Later);
                    let request = ZeroRequest { provision, fast: false, durability };
                    driver.write_zeroes(GuestRange::new(61 * CLUSTER, 3 * CLUSTER).unwrap(), request)
                }
            };
            let flushed = driver.flush();
            let file: &dyn Storage = &*storage;
            let now = Image::parse(&file).unwrap();
            if written.is_ok() && flushed.is_ok() {
                // One may have come there when the request was through with the place.
                let is_block = now.refcount_table.iter().any(|block| block & OFFSET_MASK == host);
                let count = file.be64(host + host / CLUSTER % COUNTS_OF_A_BLOCK * 8);
                assert!(!is_block || count == 1, "way {way}, {filled}: data is in a refcount block");
            } else {
                let kind = written.and(flushed).err().map(|error| error.kind());
                assert_eq!(kind, Some(ErrorKind::Corrupt), "way {way}, {filled}");
                assert!(now.is_corrupt(), "way {way}, {filled}: it does not say so");
                met[way] += 1;
            }
            let _ = driver.close();
        }
    }
    assert!(met.iter().all(|met| *met > 0), "no block came to lie there: {met:?}");
}

/// The tables of all bitmaps may be said to lie in the same place of a short file: what they take together is counted before
/// any of them is in memory.
#[test]
fn tables_of_bitmaps_are_counted_before_they_are_loaded() {
    let maker = Maker::new("cluster_size=512", 1 << 20);
    for number in 0..9 {
        let name = format!("bitmap{number}");
        maker::run("qemu-img", &["bitmap", "--add", maker::text(&maker.path()), &name]);
    }
    let mut bytes = maker.bytes();
    let entries: Vec<_> = Image::parse(&bytes).unwrap().bitmaps.iter().map(|b| b.entry_at as usize).collect();
    let table_at = (bytes.len() as u64).next_multiple_of(512);
    for at in entries {
        bytes[at..at + 8].copy_from_slice(&table_at.to_be_bytes());
        // 8 MiB each, of bitmaps that are in use, so that nobody says how many entries they need.
        bytes[at + 8..at + 12].copy_from_slice(&(1u32 << 20).to_be_bytes());
        bytes[at + 12..at + 16].copy_from_slice(&3u32.to_be_bytes());
    }
    let storage = MemoryStorage::copy_of(&bytes).unwrap();
    storage.set_len(table_at + (8 << 20)).unwrap();
    bounded("open", || {
        let refused = open_over(storage.clone(), None, Some(WriteOptions::default()), 0).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(
            refused.to_string().contains("tables of the image's dirty bitmaps have 75497472 bytes"),
            "{refused}"
        );
    });
}
