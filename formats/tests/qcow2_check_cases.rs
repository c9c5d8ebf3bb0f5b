//! Damages of the kinds that QEMU's own tests know, each for itself: what a check says of it, whether a repair
//! mends it, and that the guest's data is what it was.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::qcow2::{CheckOptions, CheckReport, Repair, check};
use nbd_img_formats::storage::{MemoryStorage, SparseBytes, Storage};
use nbd_img_formats::sync::Arc;
use support::crash::content_of;
use support::image::{Bytes, Image, OFFSET_MASK};
use support::maker::{self, Maker};
use support::reader::{self, Disk};

/// What becomes of a damaged image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// Sound, and the guest sees what it saw.
    Mended,
    /// Some of it is left, and said.
    Named,
}

/// Where things are in an image of clusters of 512 bytes with a snapshot.
struct Places {
    l1: usize,
    l2: usize,
    /// The entries of the disk's first clusters.
    first: usize,
    second: usize,
    table: usize,
    block: usize,
    snapshots: usize,
    end: usize,
}

fn image() -> (Vec<u8>, Places) {
    let maker = Maker::new("cluster_size=512", 64 << 10);
    maker.io(&["write -q -P 1 0 20k"]);
    maker.snapshot("one").io(&["write -q -P 2 0 2k", "write -q -P 3 40k 3k"]);
    let bytes = maker.bytes();
    let copy = bytes.clone();
    let image = Image::parse(&copy).unwrap();
    let l2 = (copy.be64(image.l1_at) & OFFSET_MASK) as usize;
    let places = Places {
        l1: image.l1_at as usize,
        l2,
        first: l2,
        second: l2 + 8,
        table: image.table_at as usize,
        block: image.refcount_table[0] as usize,
        snapshots: image.snapshots_at as usize,
        end: bytes.len(),
    };
    (bytes, places)
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn checked(bytes: &[u8], repair: Repair) -> (CheckReport, Vec<u8>) {
    let memory: Arc<dyn Storage> = MemoryStorage::copy_of(bytes).unwrap();
    let report = check(&memory, CheckOptions { repair, ..CheckOptions::default() }).unwrap();
    (report, content_of(&SparseBytes::load(&*memory).unwrap()))
}

type Damage = fn(&mut Vec<u8>, &Places);

/// Name, damage, what a repair makes of it, and a word of what is said.
const CASES: &[(&str, Damage, End, &str)] = &[
    ("refcounts all free", |b, p| b[p.block..p.block + 512].fill(0), End::Mended, "counted 0"),
    ("refcounts all too high", |b, p| b[p.block..p.block + 512].fill(7), End::Mended, "leaked"),
    (
        "a refcount too low in a shared cluster",
        |b, p| {
            let shared = (b.to_vec().be64((p.l2 + 80) as u64) & OFFSET_MASK) as usize / 512;
            b[p.block + 2 * shared + 1] = 1;
        },
        End::Mended,
        "used 2 times, but counted 1",
    ),
    ("no refcount block", |b, p| put(b, p.table, 0), End::Mended, "counted 0"),
    (
        "no refcount block, and a free table",
        |b, p| b[p.table..p.table + 512].fill(0),
        End::Mended,
        "counted 0",
    ),
    (
        "a misaligned refcount block",
        |b, p| put(b, p.table, p.block as u64 + 0x100),
        End::Mended,
        "refcount table",
    ),
    ("reserved bits in the refcount table", |b, p| b[p.table + 7] |= 1, End::Mended, "refcount table"),
    ("a refcount block outside of the file", |b, p| put(b, p.table, 1 << 40), End::Mended, "refcount table"),
    ("one refcount block twice", |b, p| put(b, p.table + 8, p.block as u64), End::Mended, "used 2 times"),
    ("a refcount block on the L1 table", |b, p| put(b, p.table, p.l1 as u64), End::Mended, "refcount block"),
    ("a refcount block on an L2 table", |b, p| put(b, p.table, p.l2 as u64), End::Mended, "refcount block"),
    (
        "a refcount block on the refcount table",
        |b, p| put(b, p.table, p.table as u64),
        End::Mended,
        "refcount block",
    ),
    (
        "a second refcount block on the header",
        |b, p| put(b, p.table + 8, 512 * 3),
        End::Mended,
        "refcount block",
    ),
    (
        "data on the refcount table",
        |b, p| put(b, p.first, p.table as u64 | 1 << 63),
        End::Mended,
        "used 2 times",
    ),
    (
        "data on a refcount block",
        |b, p| put(b, p.first, p.block as u64 | 1 << 63),
        End::Mended,
        "used 2 times",
    ),
    (
        "data on the L1 table",
        |b, p| put(b, p.first, p.l1 as u64 | 1 << 63),
        End::Named,
        "L1 table and something else",
    ),
    (
        "data on the snapshot table",
        |b, p| put(b, p.first, p.snapshots as u64 | 1 << 63),
        End::Named,
        "snapshot table",
    ),
    (
        "data on data",
        |b, p| {
            let second = b.to_vec().be64(p.second as u64);
            put(b, p.first, second);
        },
        End::Mended,
        "used 2 times",
    ),
    ("data on an L2 table", |b, p| put(b, p.first, p.l2 as u64 | 1 << 63), End::Mended, "used 2 times"),
    (
        "missing copied flags",
        |b, p| {
            b[p.l1] &= 0x7f;
            b[p.first] &= 0x7f;
        },
        End::Mended,
        "missing",
    ),
    ("a copied flag of a shared cluster", |b, p| b[p.l2 + 80] |= 0x80, End::Mended, "copied flag"),
    (
        "data outside of the file",
        |b, p| put(b, p.first, 1 << 40 | 1 << 63),
        End::Named,
        "outside of the file",
    ),
    ("reserved bits in an L2 entry", |b, p| b[p.first + 7] |= 2, End::Named, "reserved bits"),
    ("reserved bits in an L1 entry", |b, p| b[p.l1 + 7] |= 2, End::Named, "reserved bits"),
    (
        "an L2 table outside of the file",
        |b, p| put(b, p.l1, 1 << 40 | 1 << 63),
        End::Named,
        "outside of the file",
    ),
    ("a misaligned L1 table of a snapshot", |b, p| b[p.snapshots + 6] |= 1, End::Named, "L1 table"),
    ("an endless L1 table of a snapshot", |b, p| b[p.snapshots + 8] = 0x7f, End::Named, "length"),
    ("a file that ends early", |b, p| b.truncate(p.end - 4096), End::Named, "outside of the file"),
];

#[test]
fn each_damage_is_told_and_mended_or_named() {
    let (good, places) = image();
    let below: &[u8] = &[];
    assert_eq!(checked(&good, Repair::Nothing).0.corruptions, 0);
    for (name, damage, end, word) in CASES {
        let mut bytes = good.clone();
        damage(&mut bytes, &places);
        let (report, after) = checked(&bytes, Repair::Nothing);
        let said = |what: &CheckReport| format!("{name}: {what:#?}");
        assert!(after == bytes && report.corruptions + report.leaks > 0, "{}", said(&report));
        assert!(report.messages.iter().any(|text| text.contains(word)), "{}", said(&report));
        let (code, text) = maker::qemu_check(&bytes);
        assert!(code != 0, "{name}: QEMU finds nothing: {text}");
        let (report, after) = checked(&bytes, Repair::All);
        let (code, text) = maker::qemu_check(&after);
        match end {
            End::Mended => {
                assert_eq!((report.corruptions, report.leaks, code), (0, 0, 0), "{}\n{text}", said(&report));
                assert!(report.not_repaired.is_none(), "{}", said(&report));
            }
            End::Named => {
                assert!(report.not_repaired.is_some() && report.corruptions > 0, "{}", said(&report))
            }
        }
        // Once more changes nothing.
        let (again, twice) = checked(&after, Repair::All);
        assert_eq!((again.corruptions, again.leaks), (report.corruptions, report.leaks), "{}", said(&again));
        if *end == End::Mended {
            assert!(twice == after, "{name}: a second repair writes");
        }
        // What lies on metadata reads what that holds now; the reader follows a snapshot wherever it leads.
        if name.starts_with("data on") || name.contains("of a snapshot") {
            continue;
        }
        for disk in [Disk::Active, Disk::Snapshot(0)] {
            let before = reader::read_disk(&bytes, disk, below);
            let now = reader::read_disk(&after, disk, below);
            if let Ok(before) = before {
                assert!(now.unwrap() == before, "{name}: {disk:?} has changed");
            }
        }
    }
}
