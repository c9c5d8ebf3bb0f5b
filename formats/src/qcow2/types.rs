//! The numbers of a qcow2 image as types, and the arithmetic between them.
//!
//! Offsets of the guest, of the file and indices into tables cannot be mixed up here. Decoding an entry
//! checks it; there is no way to the fields of an unchecked one. Nothing here does I/O.

use std::fmt;

pub use super::subclusters::{ALL_UNITS, EntryWords, SUBCLUSTERS, Subcluster, Subclusters};
use crate::address::HostOffset;

/// Smallest cluster: 512 bytes (specification, `cluster_bits`).
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster: 2 MiB (QEMU's limit; the specification leaves it open).
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Most bytes of an L2 table that are read and cached as one. Our choice, as QEMU's: a random read of an
/// image with large clusters does not cost a table of 2 MiB.
const SLICE_LEN_MAX: u64 = 64 << 10;

/// Bits 9 to 55: the offset in L1 entries and in standard L2 descriptors (specification).
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be zero (specification: 0 to 8 and 56 to 62).
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be zero (specification: 1 to 8 and 56 to 61).
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// "Reads as zeroes" in a standard L2 entry (specification; version 3, not with extended entries).
const L2_ZERO: u64 = 1;
/// "Compressed" in an L2 entry.
const L2_COMPRESSED: u64 = 1 << 62;
/// "Referenced exactly once" in an L2 entry.
const L2_COPIED: u64 = 1 << 63;
/// Host offsets are smaller than this (specification: 56 bits of offset in every entry).
const HOST_END: u64 = 1 << 56;
/// Unit in which compressed blobs are measured (specification).
const BLOB_SECTOR_LEN: u64 = 512;

/// Number of a cluster on the guest's disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestCluster(pub u64);

/// Offset of a cluster in the image file or the data file: a multiple of the cluster length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostCluster(u64);

/// Number of a cluster in the image file, counted from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostIndex(pub u64);

/// Number of an L2 slice, counted over the guest's disk: the slice that holds the entry of a cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SliceNumber(pub u64);

/// Where the data clusters of an image lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataFile {
    /// In the image file itself.
    Internal,
    /// In an external file, where the L2 tables say.
    External,
    /// In an external file, each at the offset that the guest sees it at.
    ExternalRaw,
}

/// The constants that every address calculation of an image depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
    zero_flag: bool,
    data_file: DataFile,
}

/// Why a table entry cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryFault {
    /// Bits that the specification reserves are set.
    ReservedBits,
    /// It points into the middle of a cluster.
    Misaligned,
    /// The zero flag, in an image of version 2.
    ZeroFlagInVersion2,
    /// A compressed cluster in an image with an external data file.
    CompressedWithDataFile,
    /// The offset in an external data file is not the guest's.
    NotTheGuestOffset,
    /// The offset is not below 2^56.
    OffsetTooLarge,
    /// A subcluster that is allocated and zero at once, or allocated where there is no cluster.
    BadSubclusters,
}

/// Where a compressed cluster's bytes lie in the image file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Blob {
    /// First byte; not aligned to anything.
    pub at: HostOffset,
    /// Upper limit of its length: the blob ends somewhere in its last sector.
    pub len_max: u64,
}

/// A checked L2 entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Entry {
    /// Neither data nor zeroes: the backing file has it.
    Unallocated,
    /// Reads as zeroes; `host` is the cluster that is kept for it.
    Zero {
        /// The cluster kept for later writes, if there is one.
        host: Option<HostCluster>,
    },
    /// Data.
    Data {
        /// Where.
        host: HostCluster,
        /// Whether nobody else refers to it, so that it may be overwritten in place.
        copied: bool,
    },
    /// Compressed data.
    Compressed(Blob),
    /// Of an image with extended L2 entries, unless compressed.
    Split {
        /// The cluster that holds the allocated subclusters.
        host: Option<HostCluster>,
        /// Which ones are what.
        subclusters: Subclusters,
    },
}

impl Geometry {
    /// The geometry of an image; `cluster_bits` must be in the permitted range, and at least 14 with
    /// extended L2 entries.
    pub fn new(cluster_bits: u32, extended_l2: bool, version: u32, data_file: DataFile) -> Self {
        let zero_flag = version >= 3 && !extended_l2;
        Geometry { cluster_bits, extended_l2, zero_flag, data_file }
    }

    /// Bytes in a cluster.
    pub fn cluster_len(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries carry the state of subclusters.
    pub fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Where data clusters lie.
    pub fn data_file(self) -> DataFile {
        self.data_file
    }

    /// Whether data clusters lie in a file of their own: each at the guest's offset, and not counted.
    pub fn is_external(self) -> bool {
        self.data_file != DataFile::Internal
    }

    /// Bytes in a subcluster of an image with extended L2 entries.
    pub fn subcluster_len(self) -> u64 {
        self.cluster_len() / u64::from(SUBCLUSTERS)
    }

    /// Bytes in an L2 entry.
    fn entry_len_bits(self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// Bytes of a cluster that have a state of their own: a subcluster, or all of it.
    pub fn unit_len(self) -> u64 {
        if self.extended_l2 { self.subcluster_len() } else { self.cluster_len() }
    }

    /// The units that `len` bytes from `within` a cluster on touch, which do not reach out of it.
    pub fn units(self, within: u64, len: u64) -> u32 {
        if !self.extended_l2 || len == 0 {
            return ALL_UNITS;
        }
        let first = within / self.unit_len();
        let last = (within + len - 1) / self.unit_len();
        let count = (last + 1 - first).min(u64::from(SUBCLUSTERS));
        u32::try_from(((1u64 << count) - 1) << first & u64::from(ALL_UNITS)).unwrap_or(ALL_UNITS)
    }

    /// Words of 64 bits in an L2 entry.
    pub fn entry_words(self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Bytes in an L2 slice: what is read and cached as one.
    pub fn slice_len(self) -> u64 {
        self.cluster_len().min(SLICE_LEN_MAX)
    }

    fn slice_entries(self) -> u64 {
        self.slice_len() >> self.entry_len_bits()
    }

    /// Guest bytes that one L1 entry stands for.
    pub fn l2_coverage_len(self) -> u64 {
        self.cluster_len() << (self.cluster_bits - self.entry_len_bits())
    }

    /// Guest bytes that one L2 slice stands for.
    pub fn slice_coverage_len(self) -> u64 {
        self.cluster_len() * self.slice_entries()
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage_len())
    }

    /// The cluster that holds the guest's byte at `offset`.
    pub fn cluster_of(self, offset: u64) -> GuestCluster {
        GuestCluster(offset >> self.cluster_bits)
    }

    /// How far into its cluster the guest's byte at `offset` lies.
    pub fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_len() - 1)
    }

    /// The guest offset of the cluster's first byte.
    pub fn start_of(self, cluster: GuestCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// Index into the L1 table for the guest's byte at `offset`.
    pub fn l1_index(self, offset: u64) -> usize {
        usize::try_from(offset / self.l2_coverage_len()).unwrap_or(usize::MAX)
    }

    /// The L2 slice for the guest's byte at `offset`.
    pub fn slice_of(self, offset: u64) -> SliceNumber {
        SliceNumber(offset / self.slice_coverage_len())
    }

    /// How far into its L2 table the slice begins, in bytes.
    pub fn slice_offset_in_table(self, slice: SliceNumber) -> u64 {
        let slices = self.cluster_len() / self.slice_len();
        (slice.0 % slices) * self.slice_len()
    }

    /// Index of the cluster's entry in its slice.
    pub fn index_in_slice(self, cluster: GuestCluster) -> usize {
        usize::try_from(cluster.0 % self.slice_entries()).unwrap_or(usize::MAX)
    }

    /// Whether `offset` is a multiple of the cluster length.
    pub fn is_aligned(self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    /// Whether an entry can say that what it stands for reads as zeroes: not in version 2.
    pub fn can_zero(self) -> bool {
        self.zero_flag || self.extended_l2
    }

    /// The offset of the host cluster with this number.
    pub fn host_at(self, index: HostIndex) -> HostCluster {
        // Numbers come from offsets below 2^56.
        HostCluster(index.0 << self.cluster_bits)
    }

    /// The number of the host cluster that holds the byte at `at`.
    pub fn host_index(self, at: HostOffset) -> HostIndex {
        HostIndex(at.0 >> self.cluster_bits)
    }

    /// The host clusters that hold the `len` bytes from `at`, as first and count.
    pub fn host_span(self, at: HostOffset, len: u64) -> (HostIndex, u64) {
        let first = self.host_index(at);
        let end = at.0.saturating_add(len).div_ceil(self.cluster_len());
        (first, end.saturating_sub(first.0))
    }

    /// The L1 or L2 entry for a cluster that nothing else refers to.
    pub fn encode_owned(self, host: HostCluster) -> u64 {
        host.0 | L2_COPIED
    }

    /// The L2 entry for zeroes, with the cluster that is kept for them. Only where entries
    /// [can](Self::can_zero).
    pub fn encode_zero(self, host: Option<HostCluster>) -> EntryWords {
        let raw = host.map_or(0, |host| self.encode_owned(host));
        match self.extended_l2 {
            true => EntryWords { raw, bitmap: Subclusters::ZEROES.encode() },
            false => EntryWords { raw: raw | L2_ZERO, bitmap: 0 },
        }
    }

    /// The L2 entry for a blob; `None` where an entry cannot name its place. The copied flag is never set
    /// (specification, "Compressed Clusters Descriptor").
    pub fn encode_blob(self, blob: Blob) -> Option<EntryWords> {
        let (at, offset_bits) = (blob.at.0, self.blob_offset_bits());
        let end = at.checked_add(blob.len_max).filter(|end| *end > at)?;
        let more_sectors = (end - 1) / BLOB_SECTOR_LEN - at / BLOB_SECTOR_LEN;
        let fits = at < HOST_END.min(1 << offset_bits) && more_sectors >> (62 - offset_bits) == 0;
        fits.then_some(EntryWords { raw: L2_COMPRESSED | more_sectors << offset_bits | at, bitmap: 0 })
    }

    /// Bits of a compressed cluster's descriptor that are its offset; the others up to bit 61 count sectors.
    fn blob_offset_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The L2 entry for data in `host`, which nothing else refers to: of these units, and of those that
    /// `old` has there. The others are what they were.
    pub fn encode_mapped(self, old: L2Entry, host: HostCluster, units: u32) -> EntryWords {
        let raw = self.encode_owned(host);
        if !self.extended_l2 {
            return EntryWords { raw, bitmap: 0 };
        }
        let kept = match old {
            L2Entry::Split { host: old_host, subclusters } if old_host == Some(host) => subclusters,
            L2Entry::Split { subclusters, .. } => subclusters.without_data(),
            L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Data { .. } | L2Entry::Compressed(_) => {
                Subclusters::NONE
            }
        };
        EntryWords { raw, bitmap: kept.with_data(units).encode() }
    }

    /// The cluster of the L2 entry of `cluster` in which these units may be overwritten in place: plain data
    /// that nothing else refers to.
    pub fn overwritable(self, entry: EntryWords, cluster: GuestCluster, units: u32) -> Option<HostCluster> {
        let EntryWords { raw, bitmap } = entry;
        if raw & (L2_RESERVED | L2_ZERO | L2_COMPRESSED) != 0 || !self.is_sole(raw) {
            return None;
        }
        if self.extended_l2 {
            let subclusters = Subclusters::decode(bitmap, true).ok()?;
            if subclusters.allocated() & units != units {
                return None;
            }
        }
        let host = self.data_cluster(raw).ok().flatten()?;
        (!self.is_external() || host == self.place_of(cluster)).then_some(host)
    }

    /// Where a cluster of the guest lies in an external data file (specification, incompatible bit 2).
    pub fn place_of(self, cluster: GuestCluster) -> HostCluster {
        HostCluster(self.start_of(cluster))
    }

    /// The entry with the copied flag set or not.
    pub fn with_owned(self, raw: u64, owned: bool) -> u64 {
        if owned { raw | L2_COPIED } else { raw & !L2_COPIED }
    }

    /// Where the host cluster of a standard L2 entry that is not compressed lies.
    pub fn host_of(self, raw: u64) -> Option<HostOffset> {
        let offset = raw & OFFSET_MASK;
        (raw & L2_COMPRESSED == 0 && offset != 0).then_some(HostOffset(offset))
    }

    /// The host offset that an entry of any table names, whether it makes sense or not.
    pub fn offset_in(self, raw: u64) -> HostOffset {
        HostOffset(raw & OFFSET_MASK)
    }

    /// Whether an L2 entry is that of a compressed cluster.
    pub fn is_compressed(self, raw: u64) -> bool {
        raw & L2_COMPRESSED != 0
    }

    /// Whether an L1 or L2 entry says that nothing else refers to its cluster.
    pub fn is_owned(self, raw: u64) -> bool {
        raw & L2_COPIED != 0
    }

    /// Whether nothing but this L2 entry refers to its cluster: in an external data file nothing can.
    pub fn is_sole(self, raw: u64) -> bool {
        self.is_external() || self.is_owned(raw)
    }

    /// Where the L2 table of an L1 entry lies, `None` if there is none.
    pub fn decode_l1(self, raw: u64) -> Result<Option<HostCluster>, EntryFault> {
        if raw & L1_RESERVED != 0 {
            return Err(EntryFault::ReservedBits);
        }
        self.host_cluster(raw)
    }

    /// Checks and decodes the L2 entry of `cluster`; `bitmap` is its second word, 0 when it has none.
    pub fn decode_l2(self, raw: u64, bitmap: u64, cluster: GuestCluster) -> Result<L2Entry, EntryFault> {
        if raw & L2_COMPRESSED != 0 {
            return self.decode_compressed(raw);
        }
        let reserved = if self.extended_l2 { L2_RESERVED | L2_ZERO } else { L2_RESERVED };
        if raw & reserved != 0 {
            return Err(EntryFault::ReservedBits);
        }
        let host = self.data_cluster(raw)?;
        if self.is_external() && host.is_some_and(|host| host != self.place_of(cluster)) {
            return Err(EntryFault::NotTheGuestOffset);
        }
        if self.extended_l2 {
            let subclusters = Subclusters::decode(bitmap, host.is_some())?;
            return Ok(L2Entry::Split { host, subclusters });
        }
        if raw & L2_ZERO != 0 {
            return if self.zero_flag {
                Ok(L2Entry::Zero { host })
            } else {
                Err(EntryFault::ZeroFlagInVersion2)
            };
        }
        Ok(match host {
            Some(host) => L2Entry::Data { host, copied: raw & L2_COPIED != 0 },
            None => L2Entry::Unallocated,
        })
    }

    /// In an external data file offset 0 is a cluster like any other; the copied flag, which is always
    /// set there, tells it from "none" (specification, "External data file").
    fn data_cluster(self, raw: u64) -> Result<Option<HostCluster>, EntryFault> {
        if self.is_external() && raw & OFFSET_MASK == 0 && raw & L2_COPIED != 0 {
            return Ok(Some(HostCluster(0)));
        }
        self.host_cluster(raw)
    }

    fn host_cluster(self, raw: u64) -> Result<Option<HostCluster>, EntryFault> {
        match raw & OFFSET_MASK {
            0 => Ok(None),
            offset if self.is_aligned(offset) => Ok(Some(HostCluster(offset))),
            _ => Err(EntryFault::Misaligned),
        }
    }

    fn decode_compressed(self, raw: u64) -> Result<L2Entry, EntryFault> {
        if self.is_external() {
            return Err(EntryFault::CompressedWithDataFile);
        }
        let offset_bits = self.blob_offset_bits();
        let descriptor = raw & !(L2_COPIED | L2_COMPRESSED);
        let at = descriptor & ((1 << offset_bits) - 1);
        if at >= HOST_END {
            return Err(EntryFault::OffsetTooLarge);
        }
        let more_sectors = descriptor >> offset_bits;
        let len_max = (more_sectors + 1) * BLOB_SECTOR_LEN - at % BLOB_SECTOR_LEN;
        Ok(L2Entry::Compressed(Blob { at: HostOffset(at), len_max }))
    }
}

impl Blob {
    /// The blob of `len` bytes at `at`, up to the end of its last sector.
    pub fn holding(at: HostOffset, len: u64) -> Self {
        Blob { at, len_max: (at.0 + len).next_multiple_of(BLOB_SECTOR_LEN) - at.0 }
    }
}

impl HostCluster {
    /// Offset of its first byte.
    pub fn start(self) -> HostOffset {
        HostOffset(self.0)
    }

    /// The offset of its byte number `offset`.
    pub fn at(self, offset: u64) -> HostOffset {
        // Clusters lie below 2^56 and `offset` is smaller than a cluster or a table.
        HostOffset(self.0 + offset)
    }
}

impl fmt::Display for EntryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EntryFault::ReservedBits => "reserved bits are set",
            EntryFault::Misaligned => "its offset is not aligned to a cluster",
            EntryFault::ZeroFlagInVersion2 => "it has the zero flag, which version 2 does not have",
            EntryFault::CompressedWithDataFile => "it is compressed although there is an external data file",
            EntryFault::NotTheGuestOffset => "its offset in the external data file is not the guest's",
            EntryFault::OffsetTooLarge => "its offset is too large",
            EntryFault::BadSubclusters => "its subclusters contradict each other",
        })
    }
}

#[cfg(test)]
#[path = "types_tests.rs"]
mod tests;
