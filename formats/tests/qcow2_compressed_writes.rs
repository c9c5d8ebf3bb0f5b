//! Single promises of writing compressed clusters: what is compressed, where it lies, what is given back, what is refused.
//! The models, crashes and faults of the other tests have images among theirs that are written so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;
mod qcow2_write_support;
mod support;

use std::ops::Range;

use nbd_img_formats::qcow2::{Compress, Compression, WriteOptions};
use nbd_img_formats::storage::{Change, Log, MemoryStorage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, GuestRange, HostOffset, Result, Storage};
use qcow2_support::{Folder, qemu_io, read_all};
use qcow2_write_support::{assert_image, bytes_of, open_with};
use support::image::{Entry, Image};
use support::random::Random;
use support::wrapped::{NeverClosed, Wrapped};

const CLUSTER: u64 = 4096;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const LATER: Durability = Durability::Later;

fn image_of(folder: &Folder, options: &str, size: u64) -> Arc<MemoryStorage> {
    let path = folder.create("image.qcow2", options, size);
    MemoryStorage::copy_of(&std::fs::read(path).unwrap()).unwrap()
}

fn open(storage: Arc<dyn Storage>, compress: Compress) -> Result<Arc<dyn BlockDriver>> {
    let options = WriteOptions { compress: Some(compress), ..WriteOptions::default() };
    open_with(Wrapped::new(storage, NeverClosed), None, 1 << 20, options).map(|driver| driver as _)
}

fn opened(memory: &Arc<MemoryStorage>) -> Arc<dyn BlockDriver> {
    open(Arc::clone(memory) as Arc<dyn Storage>, Compress::default()).unwrap()
}

fn check(folder: &Folder, memory: &MemoryStorage, disk: &[u8]) {
    let path = folder.file("written.qcow2");
    std::fs::write(&path, bytes_of(memory)).unwrap();
    assert_image(folder, &path, disk);
}

/// What shrinks to a third or so.
fn text(random: &mut Random, len: u64) -> Vec<u8> {
    random.bytes(len).into_iter().map(|byte| b'a' + byte % 7).collect()
}

/// What does not shrink.
fn noise(random: &mut Random, len: u64) -> Vec<u8> {
    (0..len).map(|_| random.next() as u8).collect()
}

/// The L2 entries of a disk of one table, in its order.
fn entries(memory: &MemoryStorage) -> Vec<Entry> {
    let bytes = bytes_of(memory);
    let image = Image::parse(&bytes).unwrap();
    let table =
        u64::from_be_bytes(bytes[image.l1_at as usize..][..8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    image.l2_table(table).into_iter().map(|entry| image.decode(entry)).collect()
}

fn blobs(memory: &MemoryStorage) -> Vec<(usize, Range<u64>)> {
    let of = |(number, entry): (usize, Entry)| match entry {
        Entry::Compressed { host, len } => Some((number, host..host + len)),
        Entry::Unallocated | Entry::Zero { .. } | Entry::Data { .. } => None,
    };
    entries(memory).into_iter().enumerate().filter_map(of).collect()
}

/// Whole clusters are compressed, also the last one of a disk that ends inside of it; parts and what does not shrink
/// are data, and QEMU reads all of it.
#[test]
fn whole_clusters_are_compressed_and_nothing_else() {
    let folder = Folder::new();
    let mut random = Random::new(1);
    for options in ["cluster_size=4k", "cluster_size=4k,compression_type=zstd", "cluster_size=4k,compat=v2"] {
        let size = 100 * CLUSTER + 1024;
        let memory = image_of(&folder, options, size);
        let driver = opened(&memory);
        let mut disk = vec![0; size as usize];
        let mut write = |at: u64, bytes: Vec<u8>| {
            driver.pwrite(at, &bytes, LATER).unwrap();
            disk[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        };
        write(1000, text(&mut random, 10 * CLUSTER));
        write(90 * CLUSTER + 1, text(&mut random, size - 90 * CLUSTER - 1));
        let mut mixed = text(&mut random, 3 * CLUSTER);
        mixed[CLUSTER as usize..2 * CLUSTER as usize].copy_from_slice(&noise(&mut random, CLUSTER));
        write(40 * CLUSTER, mixed);
        driver.close().unwrap();
        let compressed: Vec<_> = blobs(&memory).into_iter().map(|(number, _)| number).collect();
        let expected = (1..10).chain([40, 42]).chain(91..=100).collect::<Vec<_>>();
        assert_eq!(compressed, expected, "{options}");
        for part in [0, 10, 41, 90] {
            assert!(matches!(entries(&memory)[part], Entry::Data { .. }), "{options}: {part}");
        }
        check(&folder, &memory, &disk);
    }
}

/// A part of a compressed cluster makes it an ordinary one, a whole write compresses it again.
#[test]
fn parts_of_compressed_clusters_make_them_data() {
    let folder = Folder::new();
    let mut random = Random::new(2);
    let memory = image_of(&folder, "cluster_size=4k", MIB);
    let driver = opened(&memory);
    let mut disk = text(&mut random, MIB);
    driver.pwrite(0, &disk, LATER).unwrap();
    driver.pwrite(8 * CLUSTER + 10, &[7; 100], LATER).unwrap();
    disk[8 * CLUSTER as usize + 10..][..100].fill(7);
    driver.flush().unwrap();
    assert!(matches!(entries(&memory)[8], Entry::Data { .. }));
    driver.pwrite(8 * CLUSTER, &disk[8 * CLUSTER as usize..9 * CLUSTER as usize], LATER).unwrap();
    driver.discard(GuestRange::new(9 * CLUSTER, CLUSTER).unwrap(), LATER).unwrap();
    disk[9 * CLUSTER as usize..10 * CLUSTER as usize].fill(0);
    driver.close().unwrap();
    assert!(matches!(entries(&memory)[8], Entry::Compressed { .. }));
    check(&folder, &memory, &disk);
}

/// A disk that is written over and over takes the room of two of them, and what is read is what was written last.
#[test]
fn rewritten_blobs_give_their_room_back() {
    let folder = Folder::new();
    let mut random = Random::new(3);
    let memory = image_of(&folder, "cluster_size=4k", MIB);
    let driver = opened(&memory);
    let mut disk = vec![0; MIB as usize];
    let mut once = 0;
    for round in 0..30 {
        for at in (0..MIB).step_by(4 * CLUSTER as usize) {
            let bytes = text(&mut random, 4 * CLUSTER);
            driver.pwrite(at, &bytes, LATER).unwrap();
            disk[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        driver.flush().unwrap();
        assert!(read_all(&*driver) == disk, "round {round}");
        if round == 0 {
            once = blobs(&memory).iter().map(|(_, blob)| blob.end).max().unwrap();
        }
    }
    driver.close().unwrap();
    let len = bytes_of(&*memory).len() as u64;
    assert!(once < MIB * 2 / 3 && len < 3 * once, "{len} bytes, {once} after the first round");
    check(&folder, &memory, &disk);
}

/// A cluster of the file whose blobs have all gone is not packed into any more.
#[test]
fn a_cluster_that_is_let_go_gets_no_more_blobs() {
    let folder = Folder::new();
    let mut random = Random::new(7);
    let memory = image_of(&folder, "cluster_size=4k", MIB);
    let driver = opened(&memory);
    let mut disk = vec![0; MIB as usize];
    for number in 0..8 {
        let (at, before) = (number * CLUSTER, number.saturating_sub(1) * CLUSTER);
        let bytes = text(&mut random, CLUSTER);
        driver.pwrite(at, &bytes, LATER).unwrap();
        driver.discard(GuestRange::new(before, at - before).unwrap(), LATER).unwrap();
        driver.flush().unwrap();
        disk.fill(0);
        disk[at as usize..(at + CLUSTER) as usize].copy_from_slice(&bytes);
        driver.discard(GuestRange::new(at, CLUSTER).unwrap(), LATER).unwrap();
        driver.flush().unwrap();
        driver.flush().unwrap();
        driver.pwrite(at, &bytes, LATER).unwrap();
    }
    assert!(read_all(&*driver) == disk);
    driver.close().unwrap();
    check(&folder, &memory, &disk);
}

/// Blobs of one write lie behind each other; no sector that a write has reached is written by another one, as long as
/// something in it is in use.
#[test]
fn what_was_flushed_is_not_written_again() {
    let folder = Folder::new();
    let mut random = Random::new(4);
    let memory = image_of(&folder, "cluster_size=64k", 16 * MIB);
    let log = Log::new();
    let driver =
        open(log.attach(Arc::clone(&memory) as Arc<dyn Storage>).unwrap(), Compress::default()).unwrap();
    let mut written: Vec<Range<u64>> = Vec::new();
    let cluster = 64 * KIB;
    for number in 0..60 {
        let began = log.len();
        let count = 1 + number % 4;
        driver.pwrite(number * 4 * cluster, &text(&mut random, count * cluster), LATER).unwrap();
        let data: Vec<_> = log.records()[began..]
            .iter()
            .filter_map(|record| match &record.change {
                Change::Write { at, bytes, .. } => Some(at.0..at.0 + bytes.len() as u64),
                Change::Zero { .. }
                | Change::Discard { .. }
                | Change::SetLen(_)
                | Change::Sync
                | Change::Mark(_) => None,
            })
            .collect();
        let len: u64 = data.iter().map(|range| range.end - range.start).sum();
        assert!(data.len() <= 2 && len < count * cluster / 2, "write {number}: {data:?}");
        for range in data {
            assert!(range.start % 512 == 0 && range.end % 512 == 0, "{range:?}");
            let meets = |other: &&Range<u64>| range.start < other.end && other.start < range.end;
            assert_eq!(written.iter().find(meets), None, "write {number} at {range:?}");
            written.push(range);
        }
        driver.flush().unwrap();
    }
    driver.close().unwrap();
    let places = blobs(&memory);
    assert_eq!(places.len(), 150);
    // Four of a write, byte by byte: each ends in the sector that the next one begins in.
    for pair in places.windows(2).filter(|pair| pair[1].0 == pair[0].0 + 1) {
        let [(_, before), (_, next)] = pair else { panic!("two") };
        let touch = before.end >= next.start && before.end - next.start < 512;
        let new_cluster = next.start % cluster == 0;
        assert!(touch || new_cluster, "{before:x?} {next:x?}");
    }
}

/// The image's own type decides what can be asked for, and an error says what it has.
#[test]
fn what_cannot_be_compressed_is_refused() {
    let folder = Folder::new();
    let zlib = Compress { compression: Some(Compression::Zlib), level: None };
    let zstd = Compress { compression: Some(Compression::Zstd), level: Some(7) };
    for (options, compress, hint) in [
        ("cluster_size=4k", zstd, Some("are zlib")),
        ("cluster_size=4k,compression_type=zstd", zlib, Some("--compress zstd")),
        ("cluster_size=4k,compression_type=zstd", zstd, None),
        ("compat=v2", zlib, None),
        ("refcount_bits=1", zlib, Some("refcounts of one bit")),
    ] {
        let memory = image_of(&folder, options, MIB);
        let before = bytes_of(&*memory);
        let outcome = open(Arc::clone(&memory) as Arc<dyn Storage>, compress);
        match (outcome, hint) {
            (Ok(driver), None) => driver.close().unwrap(),
            (Err(error), Some(hint)) => {
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
                assert!(error.to_string().contains(hint), "{options}: {error}");
            }
            (outcome, _) => panic!("{options}: {:?}", outcome.err()),
        }
        assert!(bytes_of(&*memory) == before);
    }
    let data = folder.file("data.raw");
    let path = folder.create("external.qcow2", &format!("data_file={}", data.display()), MIB);
    let options = nbd_img_formats::open::OpenOptions {
        writable: true,
        compress: Some(Compress::default()),
        ..Default::default()
    };
    let error = nbd_img_formats::open::open(&path, &options).err().unwrap();
    assert!(error.to_string().contains("external data file"), "{error}");
    let error = nbd_img_formats::open::open(&data, &options).err().unwrap();
    assert!(error.to_string().contains("raw disk"), "{error}");
}

/// A request larger than what is compressed together, over the border of an L2 table, on several threads.
#[test]
fn a_large_write_is_one_write() {
    let folder = Folder::new();
    let mut random = Random::new(5);
    let size = 12 * MIB;
    // Five clusters of metadata come on top.
    for (options, len_max) in [
        ("cluster_size=4k", size / 2),
        ("cluster_size=64k,extended_l2=on", size / 2),
        ("cluster_size=2M,compression_type=zstd", size / 2 + 10 * MIB),
    ] {
        let memory = image_of(&folder, options, size);
        let driver = opened(&memory);
        let disk = text(&mut random, size);
        driver.pwrite(0, &disk, Durability::Fua).unwrap();
        assert!(read_all(&*driver) == disk);
        driver.close().unwrap();
        check(&folder, &memory, &disk);
        let len = bytes_of(&*memory).len() as u64;
        assert!(len <= len_max, "{options}: {len} bytes");
    }
}

/// What QEMU goes on with, and what it has compressed itself.
#[test]
fn qemu_goes_on_with_it() {
    let folder = Folder::new();
    let mut random = Random::new(6);
    let memory = image_of(&folder, "cluster_size=4k", MIB);
    let path = folder.file("image.qcow2");
    qemu_io(&path, &["write -c -P 65 0 64k".to_owned()]);
    memory.pwrite(&std::fs::read(&path).unwrap(), HostOffset(0), LATER).unwrap();
    let driver = opened(&memory);
    let mut disk = vec![65; 64 * KIB as usize];
    disk.resize(MIB as usize, 0);
    let bytes = text(&mut random, 10 * CLUSTER);
    driver.pwrite(10 * CLUSTER, &bytes, LATER).unwrap();
    disk[10 * CLUSTER as usize..20 * CLUSTER as usize].copy_from_slice(&bytes);
    driver.close().unwrap();
    std::fs::write(&path, bytes_of(&*memory)).unwrap();
    qemu_io(&path, &["write -c -P 66 200k 64k".to_owned(), "write -P 67 50000 1000".to_owned()]);
    disk[200 * KIB as usize..264 * KIB as usize].fill(66);
    disk[50_000..51_000].fill(67);
    assert_image(&folder, &path, &disk);
}
