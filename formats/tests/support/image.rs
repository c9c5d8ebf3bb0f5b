//! A qcow2 image taken apart for the tests: header, tables, entries, refcounts.
//!
//! It is written from the specification (docs/interop/qcow2 of QEMU) alone and shares no code with the
//! driver, so that a misreading there is not repeated here. It never writes.

use nbd_img_formats::storage::SparseBytes;
use nbd_img_formats::{HostOffset, Storage};

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// The host offset in an L1 entry, a standard L2 entry and a bitmap table's entry.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// "The refcount is exactly one", in L1 and L2 entries.
pub const COPIED: u64 = 1 << 63;
/// An L2 entry that tells of a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// An L2 entry that reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits of an L1 entry that have to be 0.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that have to be 0.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that have to be 0.
pub const TABLE_RESERVED: u64 = 0x1ff;

/// The content of a file.
pub trait Bytes {
    /// Length in bytes.
    fn length(&self) -> u64;

    /// Fills `buf` from `at`; behind the end there are zeroes.
    fn fill(&self, buf: &mut [u8], at: u64);

    /// A big-endian number of 64 bits.
    fn be64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes, at);
        u64::from_be_bytes(bytes)
    }

    /// A big-endian number of 32 bits.
    fn be32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.fill(&mut bytes, at);
        u32::from_be_bytes(bytes)
    }

    /// A big-endian number of 16 bits.
    fn be16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.fill(&mut bytes, at);
        u16::from_be_bytes(bytes)
    }

    /// Big-endian numbers of 64 bits, one after the other.
    fn table(&self, at: u64, entries: u64) -> Vec<u64> {
        self.fields(at, entries, 0, 8)
    }

    /// Of `count` records of `step` bytes each the number that begins at `inside`.
    fn fields(&self, at: u64, count: u64, inside: usize, step: usize) -> Vec<u64> {
        let mut bytes = vec![0; count as usize * step];
        self.fill(&mut bytes, at);
        let field = |record: &[u8]| u64::from_be_bytes(record[inside..inside + 8].try_into().unwrap());
        bytes.chunks_exact(step).map(field).collect()
    }
}

impl Bytes for SparseBytes {
    fn length(&self) -> u64 {
        self.len()
    }

    fn fill(&self, buf: &mut [u8], at: u64) {
        self.read(buf, at);
    }
}

impl Bytes for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn fill(&self, buf: &mut [u8], at: u64) {
        let from = usize::try_from(at).map_or(self.len(), |at| at.min(self.len()));
        let there = buf.len().min(self.len() - from);
        buf[..there].copy_from_slice(&self[from..from + there]);
        buf[there..].fill(0);
    }
}

impl Bytes for &dyn Storage {
    fn length(&self) -> u64 {
        self.len().unwrap()
    }

    fn fill(&self, buf: &mut [u8], at: u64) {
        let got = self.pread(buf, HostOffset(at)).unwrap();
        buf[got..].fill(0);
    }
}

/// An internal snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Where its L1 table is.
    pub l1_at: u64,
    /// How many entries that has.
    pub l1_entries: u64,
    /// The size of the disk then.
    pub size: u64,
}

/// A dirty bitmap.
#[derive(Clone, Debug)]
pub struct Bitmap {
    /// Where its entry in the directory is.
    pub entry_at: u64,
    /// Its name.
    pub name: String,
    /// Its flags: bit 0 is "in use", bit 1 "auto".
    pub flags: u32,
    /// One bit stands for two to the power of this bytes.
    pub granularity_bits: u32,
    /// Where its table is.
    pub table_at: u64,
    /// How many entries that has.
    pub table_entries: u64,
}

/// What a standard or compressed L2 entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Nothing: the backing file decides.
    Unallocated,
    /// Zeroes, perhaps with a cluster kept.
    Zero { host: Option<u64> },
    /// A cluster.
    Data { host: u64 },
    /// `len` bytes from `host`, which end in a deflate or zstd stream.
    Compressed { host: u64, len: u64 },
}

/// A parsed image.
pub struct Image<'a> {
    pub bytes: &'a dyn Bytes,
    pub version: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_at: u64,
    pub l1_entries: u64,
    pub table_at: u64,
    pub table_clusters: u64,
    pub refcount_bits: u64,
    pub incompatible: u64,
    pub zstd: bool,
    pub snapshots: Vec<Snapshot>,
    pub snapshots_at: u64,
    pub snapshots_len: u64,
    /// Where the directory of the bitmaps is, and its length.
    pub bitmap_directory: Option<(u64, u64)>,
    pub bitmaps: Vec<Bitmap>,
    /// The refcount table.
    pub refcount_table: Vec<u64>,
}

impl<'a> Image<'a> {
    /// Reads the header and what it leads to; an error where no program could open the image.
    pub fn parse(bytes: &'a dyn Bytes) -> Result<Self, String> {
        let version = bytes.be32(4);
        if bytes.be32(0) != 0x5146_49fb || !(2..=3).contains(&version) {
            return Err("no qcow2 image".to_owned());
        }
        let v3 = version == 3;
        let cluster_bits = bytes.be32(20);
        let order = if v3 { bytes.be32(96) } else { 4 };
        let incompatible = if v3 { bytes.be64(72) } else { 0 };
        if !(9..=21).contains(&cluster_bits) || order > 6 || incompatible & !INCOMPATIBLE_KNOWN != 0 {
            return Err(format!("clusters 2^{cluster_bits}, refcounts 2^{order}, bits {incompatible:#x}"));
        }
        let mut image = Image {
            bytes,
            version,
            cluster_bits,
            size: bytes.be64(24),
            l1_entries: u64::from(bytes.be32(36)),
            l1_at: bytes.be64(40),
            table_at: bytes.be64(48),
            table_clusters: u64::from(bytes.be32(56)),
            refcount_bits: 1 << order,
            incompatible,
            zstd: v3 && bytes.be32(100) > 104 && incompatible & 8 != 0,
            snapshots: Vec::new(),
            snapshots_at: bytes.be64(64),
            snapshots_len: 0,
            bitmap_directory: None,
            bitmaps: Vec::new(),
            refcount_table: Vec::new(),
        };
        image.check_places()?;
        image.refcount_table = bytes.table(image.table_at, image.table_clusters * image.cluster_len() / 8);
        image.load_snapshots(u64::from(bytes.be32(60)))?;
        if v3 && bytes.be64(88) & 1 != 0 {
            image.load_bitmaps()?;
        }
        Ok(image)
    }

    /// Bytes in a cluster.
    pub fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_len() / self.l2_entry_len()
    }

    /// Whether the image has been marked by its writer as not properly closed.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the image has been marked as corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// Whether the data is elsewhere.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether the data file is to be read as a raw disk, too.
    pub fn has_raw_data_file(&self) -> bool {
        self.has_data_file() && self.bytes.be64(88) & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// How many clusters the file has, a last part of one counted.
    pub fn file_clusters(&self) -> u64 {
        self.bytes.length().div_ceil(self.cluster_len())
    }

    /// The raw entries of an L2 table (of extended ones, the first half).
    pub fn l2_table(&self, at: u64) -> Vec<u64> {
        self.bytes.fields(at, self.l2_entries(), 0, self.l2_entry_len() as usize)
    }

    /// Whether entries have the state of subclusters.
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// The second halves of extended L2 entries.
    pub fn l2_bitmaps(&self, at: u64) -> Vec<u64> {
        self.bytes.fields(at, self.cluster_len() / 16, 8, 16)
    }

    /// What a raw L2 entry says. Reserved bits are ignored.
    pub fn decode(&self, entry: u64) -> Entry {
        let host = entry & OFFSET_MASK;
        if entry & COMPRESSED != 0 {
            // x bits of offset, then the number of further sectors (specification, compressed clusters).
            let x = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << x) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> x;
            return Entry::Compressed { host, len: (sectors + 1) * 512 - host % 512 };
        }
        if entry & ZERO != 0 && self.l2_entry_len() == 8 {
            return Entry::Zero { host: (host != 0).then_some(host) };
        }
        // In a data file 0 is a place like any other, which the copied flag tells from none.
        let nowhere = host == 0 && !(self.has_data_file() && entry & COPIED != 0);
        if nowhere { Entry::Unallocated } else { Entry::Data { host } }
    }

    /// All refcounts of the block with this number, as the file has them; none where there is no block.
    pub fn refcounts_of_block(&self, number: usize) -> Vec<u64> {
        let block = self.refcount_table.get(number).map_or(0, |entry| entry & !TABLE_RESERVED);
        if block == 0 {
            return Vec::new();
        }
        let mut bytes = vec![0; self.cluster_len() as usize];
        self.bytes.fill(&mut bytes, block);
        let bits = self.refcount_bits as usize;
        match bits {
            // Within a byte the first one has the lowest bits.
            1..8 => {
                let values = |byte: &u8| {
                    let byte = u64::from(*byte);
                    (0..8 / bits).map(move |index| byte >> (index * bits) & ((1 << bits) - 1))
                };
                bytes.iter().flat_map(values).collect()
            }
            _ => {
                let value = |field: &[u8]| field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
                bytes.chunks_exact(bits / 8).map(value).collect()
            }
        }
    }

    /// The refcount of a cluster as the file has it.
    pub fn refcount(&self, cluster: u64) -> u64 {
        let per_block = self.cluster_len() * 8 / self.refcount_bits;
        let Some(entry) = self.refcount_table.get((cluster / per_block) as usize) else { return 0 };
        let block = entry & !TABLE_RESERVED;
        if block == 0 {
            return 0;
        }
        let bit = cluster % per_block * self.refcount_bits;
        let mut buf = [0; 8];
        let len = (self.refcount_bits as usize / 8).max(1);
        self.bytes.fill(&mut buf[8 - len..], block.saturating_add(bit / 8));
        let value = u64::from_be_bytes(buf);
        match self.refcount_bits {
            // Within a byte the first one has the lowest bits.
            bits @ 1..8 => value >> (bit % 8) & ((1 << bits) - 1),
            _ => value,
        }
    }

    /// The granules that a bitmap has set, of those that the disk has.
    pub fn dirty_granules(&self, bitmap: &Bitmap) -> Vec<bool> {
        let granules = self.size.div_ceil(1 << bitmap.granularity_bits) as usize;
        let mut bits = Vec::new();
        for entry in self.bytes.table(bitmap.table_at, bitmap.table_entries) {
            let len = (granules - bits.len()).div_ceil(8).min(self.cluster_len() as usize);
            let mut bytes = vec![if entry & 1 == 1 { 0xff } else { 0 }; len];
            if entry & OFFSET_MASK != 0 {
                self.bytes.fill(&mut bytes, entry & OFFSET_MASK);
            }
            bits.extend(bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1)));
            bits.truncate(granules);
        }
        bits
    }

    fn l2_entry_len(&self) -> u64 {
        if self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 { 16 } else { 8 }
    }

    fn check_places(&self) -> Result<(), String> {
        let cluster = self.cluster_len();
        let misplaced = [self.l1_at, self.table_at, self.snapshots_at].iter().any(|at| at % cluster != 0);
        let covered = self.l1_entries.saturating_mul(self.l2_entries() * cluster);
        if misplaced || self.table_clusters == 0 || covered < self.size {
            return Err("a table is not where it can be, or too short".to_owned());
        }
        // QEMU's limits on both tables.
        if self.table_clusters * cluster > 8 << 20 || self.l1_entries * 8 > 32 << 20 {
            return Err("a table is too long".to_owned());
        }
        Ok(())
    }

    fn load_snapshots(&mut self, count: u64) -> Result<(), String> {
        let mut at = self.snapshots_at;
        for _ in 0..count {
            if at >= self.bytes.length() {
                return Err("the snapshot table is cut off".to_owned());
            }
            let extra_len = u64::from(self.bytes.be32(at + 36));
            let (id_len, name_len) = (self.bytes.be16(at + 12), self.bytes.be16(at + 14));
            let mut name = vec![0; usize::from(name_len)];
            self.bytes.fill(&mut name, at + 40 + extra_len + u64::from(id_len));
            self.snapshots.push(Snapshot {
                name: String::from_utf8_lossy(&name).into_owned(),
                l1_at: self.bytes.be64(at),
                l1_entries: u64::from(self.bytes.be32(at + 8)),
                size: if extra_len >= 16 { self.bytes.be64(at + 48) } else { self.size },
            });
            at += (40 + extra_len + u64::from(id_len) + u64::from(name_len)).next_multiple_of(8);
        }
        self.snapshots_len = at - self.snapshots_at;
        Ok(())
    }

    fn load_bitmaps(&mut self) -> Result<(), String> {
        let mut at = u64::from(self.bytes.be32(100));
        // Extensions end where the backing file's name begins (specification), be it before they do.
        let name_at = self.bytes.be64(8);
        let end = if name_at == 0 { self.cluster_len() } else { name_at.min(self.cluster_len()) };
        while at < end {
            let (kind, len) = (self.bytes.be32(at), u64::from(self.bytes.be32(at + 4)));
            if kind == 0 {
                break;
            }
            if kind == EXTENSION_BITMAPS {
                let count = self.bytes.be32(at + 8);
                let directory = (self.bytes.be64(at + 24), self.bytes.be64(at + 16));
                self.bitmap_directory = Some(directory);
                return self.load_bitmap_directory(directory.0, count);
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    fn load_bitmap_directory(&mut self, mut at: u64, count: u32) -> Result<(), String> {
        for _ in 0..count {
            if at >= self.bytes.length() {
                return Err("the bitmap directory is cut off".to_owned());
            }
            let (name_len, extra_len) = (self.bytes.be16(at + 18), self.bytes.be32(at + 20));
            let mut name = vec![0; usize::from(name_len)];
            self.bytes.fill(&mut name, at + 24 + u64::from(extra_len));
            self.bitmaps.push(Bitmap {
                entry_at: at,
                name: String::from_utf8_lossy(&name).into_owned(),
                flags: self.bytes.be32(at + 12),
                granularity_bits: self.bytes.be32(at + 16) >> 16 & 0xff,
                table_at: self.bytes.be64(at),
                table_entries: u64::from(self.bytes.be32(at + 8)),
            });
            at += (24 + u64::from(name_len) + u64::from(extra_len)).next_multiple_of(8);
        }
        Ok(())
    }
}
