//! The header of a qcow2 image: from bytes that may be anything to values that can be relied on.
//!
//! [`RawHeader`] is the specification's structure; [`Header`] exists only when every limit holds. The
//! limits are QEMU's where the specification has none, so that whatever QEMU opens opens here. Nothing
//! in here allocates more than the first cluster.

use std::fmt;

use bitflags::bitflags;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extensions::Extensions;
use super::types::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, DataFile, Geometry, SUBCLUSTERS};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::Arc;

/// First four bytes of the file (specification).
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of the header of version 2 (specification).
const V2_LEN: u32 = 72;
/// Smallest header of version 3 (specification).
const V3_LEN_MIN: u32 = 104;
/// Largest L1 table, in bytes (QEMU's limit).
pub const L1_LEN_MAX: u64 = 32 << 20;
/// Largest refcount table, in bytes (QEMU's limit).
pub const REFCOUNT_TABLE_LEN_MAX: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
const SNAPSHOTS_MAX: u32 = 65536;
/// Longest name of a backing file (specification).
const BACKING_NAME_LEN_MAX: u32 = 1023;
/// Smallest subcluster (specification).
const SUBCLUSTER_LEN_MIN: u64 = 512;
/// The refcount of version 2 has 16 bits (specification).
const V2_REFCOUNT_ORDER: u32 = 4;
/// Refcounts have at most 64 bits (specification).
const REFCOUNT_ORDER_MAX: u32 = 6;

bitflags! {
    /// Features without which the image cannot be understood.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1 << 0;
        /// Metadata was found to be damaged.
        const CORRUPT = 1 << 1;
        /// Guest data lies in another file.
        const DATA_FILE = 1 << 2;
        /// Compressed clusters are not zlib.
        const COMPRESSION = 1 << 3;
        /// L2 entries with subclusters.
        const EXTENDED_L2 = 1 << 4;
    }

    /// Features that do not matter to a reader.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Compatible: u64 {
        /// Refcounts may be updated lazily.
        const LAZY_REFCOUNTS = 1 << 0;
        const _ = !0;
    }

    /// Features that a writer who does not know them must clear.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent with the data.
        const BITMAPS = 1 << 0;
        /// The external data file can be read as a raw image.
        const DATA_FILE_RAW = 1 << 1;
        const _ = !0;
    }
}

/// The header as it lies at offset 0, in the specification's order and names. Fields from
/// `incompatible_features` on exist only in version 3, and only as far as `header_length` reaches.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Debug)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}

/// How clusters are compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// Raw deflate streams.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A table in the file: where it begins and how many entries it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableLocation {
    /// First byte; aligned to a cluster.
    pub at: HostOffset,
    /// Entries.
    pub entries: u32,
}

/// A header whose values are within all limits and agree with each other.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// What all addresses depend on.
    pub geometry: Geometry,
    /// The active L1 table; it covers the virtual size.
    pub l1: TableLocation,
    /// The snapshot table.
    pub snapshots: TableLocation,
    /// The refcount table; its entries are whole clusters of them.
    pub refcount_table: TableLocation,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Incompatible features; all of them known.
    pub incompatible: Incompatible,
    /// Compatible features, with those that nobody here knows.
    pub compatible: Compatible,
    /// Autoclear features, with those that nobody here knows.
    pub autoclear: Autoclear,
    /// Name of the backing file, as it stands in the header.
    pub backing_name: Option<Vec<u8>>,
    /// Where it stands; extensions end there.
    pub backing_name_at: Option<u64>,
    /// What the header extensions say.
    pub extensions: Extensions,
}

impl Header {
    /// Names of the feature bits that are set, for people.
    pub fn feature_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut add = |set: bool, name: &str| names.extend(set.then(|| name.to_owned()));
        add(self.incompatible.contains(Incompatible::DIRTY), "dirty");
        add(self.incompatible.contains(Incompatible::CORRUPT), "corrupt");
        add(self.incompatible.contains(Incompatible::DATA_FILE), "external-data-file");
        add(self.incompatible.contains(Incompatible::COMPRESSION), "compression-type");
        add(self.incompatible.contains(Incompatible::EXTENDED_L2), "extended-l2");
        add(self.compatible.contains(Compatible::LAZY_REFCOUNTS), "lazy-refcounts");
        add(self.autoclear.contains(Autoclear::BITMAPS), "bitmaps");
        add(self.autoclear.contains(Autoclear::DATA_FILE_RAW), "data-file-raw");
        names
    }

    /// Reads and checks the header of the image in `storage`. Fails with `InvalidFormat` when it is no
    /// qcow2 image, `Unsupported` when it needs what is not here, `Corrupt` when it contradicts itself.
    pub fn load(storage: &Arc<dyn Storage>) -> Result<Self> {
        load(storage).map_err(|e| e.with_path(&storage.facts().path))
    }
}

fn load(storage: &Arc<dyn Storage>) -> Result<Header> {
    let mut start = [0u8; size_of::<RawHeader>()];
    let got = read_up_to(storage, HostOffset(0), &mut start)?;
    let raw = RawHeader::from_present(&start, got)?;
    let cluster_bits = raw.cluster_bits.get();
    if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
        return Err(unsupported(format!("clusters of 2^{cluster_bits} bytes (2^9 to 2^21 are possible)")));
    }
    let first_cluster = read_first_cluster(storage, 1 << cluster_bits)?;
    let extensions_end = raw.extensions_end()?;
    let extensions = Extensions::parse(&first_cluster, raw.header_length.get(), extensions_end)?;
    raw.check(first_cluster, extensions)
}

/// The first cluster, or as much of it as the file has.
fn read_first_cluster(storage: &Arc<dyn Storage>, cluster_len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; cluster_len];
    let got = read_up_to(storage, HostOffset(0), &mut bytes)?;
    bytes.truncate(got);
    Ok(bytes)
}

fn read_up_to(storage: &Arc<dyn Storage>, at: HostOffset, buf: &mut [u8]) -> Result<usize> {
    storage.pread(buf, at).map_err(|e| storage_error(storage, "cannot read the header", at, e))
}

impl RawHeader {
    /// The header with the fields that it does not have set to what they mean when absent.
    fn from_present(start: &[u8; size_of::<RawHeader>()], got: usize) -> Result<Self> {
        let mut raw = RawHeader::read_from_bytes(start)
            .map_err(|_| Error::new(ErrorKind::InvalidFormat, "the header cannot be read"))?;
        if got < V2_LEN as usize || raw.magic.get() != MAGIC {
            return Err(Error::new(ErrorKind::InvalidFormat, "this is not a qcow2 image"));
        }
        match raw.version.get() {
            2 => {
                raw.incompatible_features = U64::ZERO;
                raw.compatible_features = U64::ZERO;
                raw.autoclear_features = U64::ZERO;
                raw.refcount_order = U32::new(V2_REFCOUNT_ORDER);
                raw.header_length = U32::new(V2_LEN);
                raw.compression_type = 0;
            }
            3 => raw.check_v3_length(got)?,
            version => return Err(unsupported(format!("version {version} of qcow2"))),
        }
        Ok(raw)
    }

    fn check_v3_length(&mut self, got: usize) -> Result<()> {
        let len = self.header_length.get();
        if len < V3_LEN_MIN {
            return Err(corrupt(format!("its header length {len} is smaller than {V3_LEN_MIN}")));
        }
        if got < V3_LEN_MIN as usize {
            return Err(Error::new(ErrorKind::InvalidFormat, "the file ends inside of the qcow2 header"));
        }
        if len <= V3_LEN_MIN {
            self.compression_type = 0;
        }
        Ok(())
    }

    fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits.get().min(CLUSTER_BITS_MAX)
    }

    /// Extensions end where the backing file's name begins, or with the first cluster.
    fn extensions_end(&self) -> Result<u64> {
        let cluster_len = self.cluster_len();
        let header_len = self.header_length.get();
        if u64::from(header_len) > cluster_len {
            return Err(corrupt(format!("its header length {header_len} exceeds the first cluster")));
        }
        match self.backing_file_offset.get() {
            0 => Ok(cluster_len),
            offset if offset <= cluster_len => Ok(offset),
            offset => {
                Err(corrupt(format!("the backing file's name lies at {offset}, behind the first cluster")))
            }
        }
    }

    fn check(&self, first_cluster: Vec<u8>, extensions: Extensions) -> Result<Header> {
        let incompatible = self.known_incompatible(&extensions)?;
        let autoclear = Autoclear::from_bits_retain(self.autoclear_features.get());
        self.check_encryption()?;
        let geometry = self.geometry(incompatible, autoclear)?;
        let refcount_order = self.refcount_order.get();
        if refcount_order > REFCOUNT_ORDER_MAX {
            return Err(unsupported(format!("refcounts of 2^{refcount_order} bits (64 are the most)")));
        }
        Ok(Header {
            version: self.version.get(),
            virtual_size: self.size.get(),
            geometry,
            l1: self.l1(geometry)?,
            snapshots: self.snapshot_table(geometry)?,
            refcount_table: self.refcount_table(geometry)?,
            refcount_bits: 1 << refcount_order,
            compression: self.compression(incompatible)?,
            incompatible,
            compatible: Compatible::from_bits_retain(self.compatible_features.get()),
            autoclear,
            backing_name: self.backing_name(&first_cluster)?,
            backing_name_at: Some(self.backing_file_offset.get()).filter(|at| *at != 0),
            extensions,
        })
    }

    fn known_incompatible(&self, extensions: &Extensions) -> Result<Incompatible> {
        let bits = self.incompatible_features.get();
        let unknown = bits & !Incompatible::all().bits();
        if unknown == 0 {
            return Ok(Incompatible::from_bits_truncate(bits));
        }
        let names: Vec<String> = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| extensions.incompatible_feature_name(bit))
            .collect();
        Err(unsupported(format!("the incompatible features {}", names.join(", "))))
    }

    fn check_encryption(&self) -> Result<()> {
        let method = match self.crypt_method.get() {
            0 => return Ok(()),
            1 => "AES encryption".to_owned(),
            2 => "LUKS encryption".to_owned(),
            other => format!("encryption method {other}"),
        };
        Err(unsupported(method))
    }

    fn geometry(&self, incompatible: Incompatible, autoclear: Autoclear) -> Result<Geometry> {
        let extended_l2 = incompatible.contains(Incompatible::EXTENDED_L2);
        if extended_l2 && self.cluster_len() / u64::from(SUBCLUSTERS) < SUBCLUSTER_LEN_MIN {
            return Err(corrupt(format!(
                "clusters of {} bytes are too small for extended L2 entries",
                self.cluster_len()
            )));
        }
        let data_file = if !incompatible.contains(Incompatible::DATA_FILE) {
            DataFile::Internal
        } else if autoclear.contains(Autoclear::DATA_FILE_RAW) {
            DataFile::ExternalRaw
        } else {
            DataFile::External
        };
        Ok(Geometry::new(self.cluster_bits.get(), extended_l2, self.version.get(), data_file))
    }

    fn refcount_table(&self, geometry: Geometry) -> Result<TableLocation> {
        let clusters = u64::from(self.refcount_table_clusters.get());
        if clusters == 0 {
            return Err(corrupt("it has no refcount table".to_owned()));
        }
        let len = clusters * geometry.cluster_len();
        if len > REFCOUNT_TABLE_LEN_MAX {
            return Err(corrupt(format!(
                "its refcount table of {len} bytes is too large (8 MiB are the most)"
            )));
        }
        let at = HostOffset(self.refcount_table_offset.get());
        check_place("refcount table", at.0, len, geometry)?;
        Ok(TableLocation { at, entries: u32::try_from(len / 8).unwrap_or(0) })
    }

    fn l1(&self, geometry: Geometry) -> Result<TableLocation> {
        let entries = self.l1_size.get();
        let len = u64::from(entries) * 8;
        if len > L1_LEN_MAX {
            return Err(corrupt(format!("its L1 table of {len} bytes is too large (32 MiB are the most)")));
        }
        let needed = geometry.l1_entries_for(self.size.get());
        if u64::from(entries) < needed {
            return Err(corrupt(format!(
                "its L1 table has {entries} entries, too few for {} bytes",
                self.size.get()
            )));
        }
        check_place("L1 table", self.l1_table_offset.get(), len, geometry)?;
        Ok(TableLocation { at: HostOffset(self.l1_table_offset.get()), entries })
    }

    fn snapshot_table(&self, geometry: Geometry) -> Result<TableLocation> {
        let entries = self.nb_snapshots.get();
        if entries > SNAPSHOTS_MAX {
            return Err(corrupt(format!("it claims {entries} snapshots ({SNAPSHOTS_MAX} are the most)")));
        }
        let at = HostOffset(self.snapshots_offset.get());
        if entries > 0 {
            check_place("snapshot table", at.0, 0, geometry)?;
        }
        Ok(TableLocation { at, entries })
    }

    fn compression(&self, incompatible: Incompatible) -> Result<Compression> {
        let flagged = incompatible.contains(Incompatible::COMPRESSION);
        match (self.compression_type, flagged) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (0 | 1, _) => Err(corrupt("its compression type contradicts its feature bits".to_owned())),
            (other, _) => Err(unsupported(format!("compression type {other}"))),
        }
    }

    /// The name must lie in the first cluster, where no guest can write.
    fn backing_name(&self, first_cluster: &[u8]) -> Result<Option<Vec<u8>>> {
        let offset = self.backing_file_offset.get();
        let len = self.backing_file_size.get();
        if offset == 0 || len == 0 {
            return Ok(None);
        }
        let room = self.cluster_len().saturating_sub(offset);
        if len > BACKING_NAME_LEN_MAX || u64::from(len) > room {
            return Err(corrupt(format!("the backing file's name of {len} bytes is too long")));
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let name = first_cluster.get(start..).and_then(|rest| rest.get(..len as usize));
        name.map(|name| Some(name.to_vec()))
            .ok_or_else(|| corrupt("the file ends inside of the backing file's name".to_owned()))
    }
}

/// Checks that a table of `len` bytes can lie at `at`. Offsets are signed in QEMU, so they end at 2^63.
pub fn check_place(what: &str, at: u64, len: u64, geometry: Geometry) -> Result<()> {
    let end = at.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    if end.is_none() || !geometry.is_aligned(at) {
        return Err(corrupt(format!("its {what} cannot lie at {at:#x}")));
    }
    Ok(())
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        })
    }
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the image is damaged: {what}"))
}

fn unsupported(what: String) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the image uses {what}, which is not supported"))
}
