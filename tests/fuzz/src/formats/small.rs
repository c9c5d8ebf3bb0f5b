//! A small valid qcow2 image, made in memory without any tool: each kind of metadata that the format has, in
//! as few clusters as possible.
//!
//! It is written from the specification and shares no code with the driver.

mod features;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::rc::Rc;

use arbitrary::{Result, Unstructured};

use crate::support::image::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use features::Features;

/// Most images that are kept for the next time the same shape is asked for: about as many as there are.
const KEPT_MAX: usize = 1024;
/// Guest clusters with data in the first table, and behind them those that are compressed, zero, and zero
/// with a cluster kept.
const DATA: u64 = 4;
const BLOBS: u64 = 4;
const ZEROES: u64 = 2;
/// Guest clusters with data in the second table.
const SHARED: u64 = 3;
/// Where the fields of version 3 and the extensions begin (specification).
const V2_LEN: usize = 72;
const V3_LEN: usize = 112;
/// The room of a header extension that nobody knows.
const UNKNOWN_EXTENSION: u32 = 0x1234_5678;

/// Which image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub zstd: bool,
    pub snapshot: bool,
    pub bitmap: bool,
    pub dirty: bool,
    pub backing_len: Option<u64>,
    pub extended_l2: bool,
    pub features: Features,
}

/// What a range of the file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub at: usize,
    pub len: usize,
}

/// An image.
#[derive(Debug)]
pub struct Small {
    pub shape: Shape,
    pub bytes: Vec<u8>,
    /// What its data file holds, if it has one.
    pub data: Vec<u8>,
    /// How many bitmaps it has.
    pub bitmaps: usize,
    /// Where its metadata and its blobs lie.
    pub places: Vec<Place>,
}

impl Shape {
    /// The shape that the input asks for, made one that can be.
    pub fn arbitrary(u: &mut Unstructured<'_>) -> Result<Shape> {
        let bits: u8 = u.arbitrary()?;
        let kind: u8 = u.arbitrary()?;
        // Of these the next byte says more.
        let (features, split) =
            if matches!(kind & 0xf, 8 | 9) { Features::arbitrary(u)? } else { Default::default() };
        let version = if bits & 1 != 0 && features == Features::default() { 2 } else { 3 };
        let extended_l2 = version == 3 && (split || kind & 0xf == 15);
        let cluster_bits = match kind & 0xf {
            _ if extended_l2 => 14,
            13 | 14 => 12,
            11 | 12 => 10,
            _ => 9,
        };
        let refcount_order = if version == 2 { 4 } else { u32::from(kind >> 4) % 7 };
        let backing_len = match bits >> 5 & 3 {
            2 => Some(20 << cluster_bits),
            3 => Some((150 << cluster_bits).min(150 << 10)),
            _ => None,
        };
        Ok(Shape {
            version,
            cluster_bits,
            refcount_order,
            zstd: version == 3 && bits & 2 != 0,
            // Neither goes with a data file, nor a backing file with a raw one.
            snapshot: bits & 4 != 0 && refcount_order > 0 && features.data_file.is_none(),
            bitmap: version == 3 && (bits & 0x18 == 0x18 || features.bitmaps > 0),
            dirty: version == 3 && bits & 0x18 == 0x10,
            backing_len: backing_len.filter(|_| !features.is_raw()),
            extended_l2,
            features,
        })
    }

    /// Bytes in a cluster.
    pub fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the guest's disk: a part of a third table, but for clusters of which one table maps much.
    pub fn size(&self) -> u64 {
        let span = self.l2_entries() * self.cluster_len();
        (2 * span + 10 * self.cluster_len()).min(128 << 10).max(20 * self.cluster_len()) - 100
    }

    fn l2_entries(&self) -> u64 {
        self.cluster_len() / if self.extended_l2 { 16 } else { 8 }
    }

    /// The image; the same one as the last time if it is still there.
    pub fn image(&self) -> Rc<Small> {
        thread_local! {
            static KEPT: RefCell<HashMap<Shape, Rc<Small>>> = RefCell::new(HashMap::new());
        }
        KEPT.with_borrow_mut(|kept| {
            if kept.len() >= KEPT_MAX {
                kept.clear();
            }
            Rc::clone(kept.entry(*self).or_insert_with(|| Rc::new(Builder::new(*self).build())))
        })
    }
}

/// What the guest finds at `at` of the data and the blobs, and in the backing file (`tag` 0).
pub fn content(tag: u64, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    let mut done = 0;
    while done < bytes.len() {
        let place = at + done as u64;
        let end = (done + 32 - (place % 32) as usize).min(bytes.len());
        bytes[done..end].fill((1 + (place / 32 + tag * 77) % 251) as u8);
        done = end;
    }
    bytes
}

/// An image while it is made. Clusters are handed out one after the other.
struct Builder {
    shape: Shape,
    bytes: Vec<u8>,
    data: Vec<u8>,
    places: Vec<Place>,
    refcounts: Vec<u64>,
    /// Raw L2 entries of the tables of the active disk.
    tables: Vec<Vec<u64>>,
}

impl Builder {
    fn new(shape: Shape) -> Self {
        let tables = shape.size().div_ceil(shape.l2_entries() * shape.cluster_len());
        let mut builder = Builder {
            shape,
            bytes: Vec::new(),
            data: Vec::new(),
            places: Vec::new(),
            refcounts: Vec::new(),
            tables: Vec::new(),
        };
        builder.tables.resize(usize::try_from(tables).unwrap(), vec![0; shape.l2_entries() as usize]);
        builder
    }

    fn build(mut self) -> Small {
        let header = self.add(self.shape.cluster_len());
        let refcount_table = self.add(self.shape.cluster_len());
        self.count(refcount_table, self.shape.cluster_len());
        self.clusters();
        self.finish_data_file();
        let l1 = self.l1();
        let snapshots = if self.shape.snapshot { self.snapshot(l1) } else { 0 };
        let bitmaps = if self.shape.bitmap { self.bitmaps() } else { Vec::new() };
        self.count(header, self.shape.cluster_len());
        self.count_disk(l1);
        self.own(l1);
        self.refcount_blocks(refcount_table);
        self.header(l1, refcount_table, snapshots, &bitmaps);
        let count = if self.shape.bitmap { self.shape.features.bitmaps().len() } else { 0 };
        Small { shape: self.shape, bytes: self.bytes, data: self.data, bitmaps: count, places: self.places }
    }

    /// Takes clusters for `len` bytes at the end of the file.
    fn add(&mut self, len: u64) -> u64 {
        let at = self.bytes.len() as u64;
        let clusters = len.div_ceil(self.shape.cluster_len());
        self.bytes.resize(usize::try_from(at + clusters * self.shape.cluster_len()).unwrap(), 0);
        at
    }

    /// The same for something that damage is done to.
    fn add_place(&mut self, len: u64) -> u64 {
        let at = self.add(len);
        self.places.push(Place { at: at as usize, len: len as usize });
        at
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..at as usize + 8].try_into().unwrap())
    }

    /// One more reference to each of these clusters.
    fn count(&mut self, at: u64, len: u64) {
        let cluster_len = self.shape.cluster_len();
        self.refcounts.resize(self.bytes.len().div_ceil(cluster_len as usize), 0);
        for cluster in at / cluster_len..(at + len).div_ceil(cluster_len) {
            self.refcounts[cluster as usize] += 1;
        }
    }

    /// Whether several may refer to one cluster, once more for the snapshot.
    fn may_share(&self) -> bool {
        self.shape.refcount_order >= 2
    }

    fn clusters(&mut self) {
        let cluster_len = self.shape.cluster_len();
        for cluster in 0..DATA {
            let bytes = content(1, cluster * cluster_len, cluster_len);
            self.tables[0][cluster as usize] = self.data_cluster(cluster, &bytes);
        }
        let mut room = 0..0;
        let blobs = if self.shape.features.data_file.is_some() { 0 } else { BLOBS };
        for cluster in DATA..DATA + blobs {
            let blob = self.compress(&content(2, cluster * cluster_len, cluster_len));
            if room.end - room.start < blob.len() as u64 || !self.may_share() {
                let at = self.add_place(cluster_len);
                room = at..at + cluster_len;
            }
            self.put(room.start, &blob);
            self.tables[0][cluster as usize] = self.blob_entry(room.start, blob.len() as u64);
            room.start += blob.len() as u64;
        }
        if self.shape.version == 3 && !self.shape.extended_l2 {
            for cluster in DATA + BLOBS..DATA + BLOBS + 2 * ZEROES {
                let kept = cluster >= DATA + BLOBS + ZEROES;
                let host = if kept { self.place_of(cluster) } else { 0 };
                self.tables[0][cluster as usize] = host | ZERO;
            }
        }
        let tables = self.tables.len();
        let second = if tables > 1 { 0 } else { (DATA + BLOBS + 2 * ZEROES) as usize };
        let first = if tables > 1 { self.shape.l2_entries() } else { second as u64 };
        for cluster in 0..SHARED {
            let bytes = content(3, cluster * cluster_len, cluster_len);
            let entry = self.data_cluster(first + cluster, &bytes);
            self.tables[usize::from(tables > 1)][second + cluster as usize] = entry;
        }
    }

    fn compress(&self, content: &[u8]) -> Vec<u8> {
        if self.shape.zstd {
            return zstd::bulk::compress(content, 3).unwrap();
        }
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn blob_entry(&self, at: u64, len: u64) -> u64 {
        let sectors = (at + len - 1) / 512 - at / 512;
        COMPRESSED | sectors << (62 - (self.shape.cluster_bits - 8)) | at
    }

    /// Writes the L2 tables and an L1 table that leads to them; returns where that is.
    fn l1(&mut self) -> u64 {
        let mut entries = Vec::new();
        for table in std::mem::take(&mut self.tables) {
            if table.iter().all(|entry| *entry == 0) {
                entries.push(0);
                continue;
            }
            let at = self.add_place(self.shape.cluster_len());
            let step = if self.shape.extended_l2 { 16 } else { 8 };
            for (index, entry) in table.iter().enumerate() {
                self.put(at + index as u64 * step, &entry.to_be_bytes());
                if self.shape.extended_l2 && *entry != 0 && *entry & COMPRESSED == 0 {
                    self.put(at + index as u64 * step + 8, &self.shape.features.subclusters().to_be_bytes());
                }
            }
            entries.push(at);
        }
        let l1 = self.add_place(entries.len() as u64 * 8);
        for (index, entry) in entries.iter().enumerate() {
            self.put(l1 + index as u64 * 8, &entry.to_be_bytes());
        }
        l1
    }

    fn l1_entries(&self) -> u64 {
        self.shape.size().div_ceil(self.shape.l2_entries() * self.shape.cluster_len())
    }

    /// A snapshot of the whole disk; returns where the snapshot table is.
    fn snapshot(&mut self, active: u64) -> u64 {
        let entries = self.l1_entries();
        let l1 = self.add_place(entries * 8);
        // Only with counters that can hold it does the snapshot have the first table, too.
        for index in u64::from(!self.may_share() && entries > 1)..entries {
            let entry = self.word(active + index * 8);
            self.put(l1 + index * 8, &entry.to_be_bytes());
        }
        if !self.may_share() && entries == 1 {
            self.put(l1, &[0; 8]);
        }
        let mut record = l1.to_be_bytes().to_vec();
        record.extend((entries as u32).to_be_bytes());
        record.extend([0, 1, 0, 4]);
        record.extend([0; 20]);
        record.extend(16u32.to_be_bytes());
        record.extend([0; 8]);
        record.extend(self.shape.size().to_be_bytes());
        record.extend(b"1snap");
        let at = self.add_place(record.len().next_multiple_of(8) as u64);
        self.put(at, &record);
        self.count(at, record.len() as u64);
        self.count_disk(l1);
        at
    }

    /// Counts an L1 table and all that it leads to.
    fn count_disk(&mut self, l1: u64) {
        self.count(l1, self.l1_entries() * 8);
        for index in 0..self.l1_entries() {
            let table = self.word(l1 + index * 8) & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            self.count(table, self.shape.cluster_len());
            let step = if self.shape.extended_l2 { 16 } else { 8 };
            for entry in 0..self.shape.l2_entries() {
                let entry = self.word(table + entry * step);
                if entry & COMPRESSED != 0 {
                    let x = 62 - (self.shape.cluster_bits - 8);
                    let (at, sectors) = (entry & ((1 << x) - 1), (entry & (COMPRESSED - 1)) >> x);
                    self.count(at, (sectors + 1) * 512 - at % 512);
                } else if entry & OFFSET_MASK != 0 && self.shape.features.data_file.is_none() {
                    self.count(entry & OFFSET_MASK, self.shape.cluster_len());
                }
            }
        }
    }

    /// Sets the copied flags of the active disk.
    fn own(&mut self, l1: u64) {
        for index in 0..self.l1_entries() {
            let table = self.word(l1 + index * 8) & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            self.own_entry(l1 + index * 8);
            if self.shape.features.data_file.is_some() {
                continue;
            }
            let step = if self.shape.extended_l2 { 16 } else { 8 };
            for entry in 0..self.shape.l2_entries() {
                self.own_entry(table + entry * step);
            }
        }
    }

    fn own_entry(&mut self, at: u64) {
        let entry = self.word(at);
        let host = entry & OFFSET_MASK;
        if entry & COMPRESSED == 0
            && host != 0
            && self.refcounts[(host / self.shape.cluster_len()) as usize] == 1
        {
            self.put(at, &(entry | COPIED).to_be_bytes());
        }
    }

    fn refcount_blocks(&mut self, table: u64) {
        let cluster_len = self.shape.cluster_len();
        let bits = 1u64 << self.shape.refcount_order;
        let per_block = cluster_len * 8 / bits;
        let used = self.bytes.len() as u64 / cluster_len;
        let blocks = (1..).find(|blocks| blocks * per_block >= used + blocks).unwrap();
        let at = self.add_place(blocks * cluster_len);
        self.count(at, blocks * cluster_len);
        for block in 0..blocks {
            self.put(table + block * 8, &(at + block * cluster_len).to_be_bytes());
        }
        self.places.push(Place { at: table as usize, len: blocks as usize * 8 + 16 });
        for (cluster, count) in self.refcounts.clone().into_iter().enumerate() {
            assert!(bits == 64 || count < 1 << bits, "{count} references to cluster {cluster}");
            let bit = cluster as u64 * bits;
            if bits < 8 {
                self.bytes[(at + bit / 8) as usize] |= (count << (bit % 8)) as u8;
            } else {
                let bytes = count.to_be_bytes();
                self.put(at + bit / 8, &bytes[8 - bits as usize / 8..]);
            }
        }
    }

    fn header(&mut self, l1: u64, refcount_table: u64, snapshots: u64, bitmaps: &[u8]) {
        let shape = self.shape;
        let outside = shape.features.data_file.is_some();
        let mut extensions = Vec::new();
        if shape.bitmap {
            push_extension(&mut extensions, 0x2385_2875, bitmaps);
        }
        if outside {
            push_extension(&mut extensions, 0x4441_5441, b"data");
        }
        if shape.backing_len.is_some() {
            push_extension(&mut extensions, 0xe279_2aca, b"raw");
        }
        push_extension(&mut extensions, UNKNOWN_EXTENSION, b"kept as it is");
        extensions.extend([0; 8]);
        let header_len = if shape.version == 2 { V2_LEN } else { V3_LEN };
        let name_at = header_len + extensions.len();
        let name: &[u8] = if shape.backing_len.is_some() { b"base" } else { b"" };
        let mut header = 0x5146_49fb_u32.to_be_bytes().to_vec();
        header.extend(shape.version.to_be_bytes());
        header.extend((if name.is_empty() { 0 } else { name_at as u64 }).to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.extend(shape.cluster_bits.to_be_bytes());
        header.extend(shape.size().to_be_bytes());
        header.extend(0u32.to_be_bytes());
        header.extend((self.l1_entries() as u32).to_be_bytes());
        header.extend(l1.to_be_bytes());
        header.extend(refcount_table.to_be_bytes());
        header.extend(1u32.to_be_bytes());
        header.extend(u32::from(snapshots != 0).to_be_bytes());
        header.extend(snapshots.to_be_bytes());
        if shape.version == 3 {
            let bits = [(shape.dirty, 1), (outside, 4), (shape.zstd, 8), (shape.extended_l2, 16u64)];
            header.extend(bits.iter().map(|(set, bit)| u64::from(*set) * bit).sum::<u64>().to_be_bytes());
            header.extend(u64::from(shape.dirty).to_be_bytes());
            let autoclear = u64::from(shape.bitmap) | u64::from(shape.features.is_raw()) << 1;
            header.extend(autoclear.to_be_bytes());
            header.extend(shape.refcount_order.to_be_bytes());
            header.extend((V3_LEN as u32).to_be_bytes());
            header.extend([u8::from(shape.zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        header.extend(extensions);
        header.extend(name);
        // Twice, so that the header is damaged as often as the tables are.
        let place = Place { at: 0, len: header.len() };
        self.places.extend([place, place]);
        self.put(0, &header);
    }
}

fn push_extension(bytes: &mut Vec<u8>, magic: u32, data: &[u8]) {
    bytes.extend(magic.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}
