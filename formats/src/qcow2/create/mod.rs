//! Making a new image: every option of the format.
//!
//! It writes into a storage that holds nothing, the header last, so that nothing is an image before it is
//! whole. Where files are and how they get their names is not its business.

mod header;

use super::header::{Compression, L1_LEN_MAX, REFCOUNT_TABLE_LEN_MAX};
use super::types::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, DataFile, Geometry, HostIndex};
use super::write::allocator::HOST_END;
use super::write::refcounts::{BlockIndex, Refcounts};
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::{Durability, Storage};
use crate::sync::Arc;

/// Clusters of an image are this long unless told (QEMU's default).
const CLUSTER_BITS_DEFAULT: u32 = 16;
/// Clusters with subclusters are at least this long (specification: subclusters of 512 bytes).
const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;
/// Refcounts have so many bits unless told (QEMU's default, and all that version 2 has).
const REFCOUNT_BITS_DEFAULT: u32 = 16;
/// Disks are multiples of this (as with QEMU).
const SECTOR_LEN: u64 = 512;
/// Bytes that are written at once where room is taken by writing. Our choice.
const FILL_LEN: usize = 1 << 20;

/// How much of a new disk is given room at once.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables; the data lies in a hole.
    Metadata,
    /// Everything, by reserving room.
    Falloc,
    /// Everything, by writing zeroes.
    Full,
}

/// What a new image says of its backing file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackingName {
    /// The name, as it will stand in the image.
    pub name: Vec<u8>,
    /// Its format: `raw` or `qcow2`.
    pub format: String,
}

/// What a new image says of its data file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DataFileName {
    /// The name, as it will stand in the image.
    pub name: Vec<u8>,
    /// Whether the data file is a raw image of the disk at any time.
    pub raw: bool,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk; rounded up to 512.
    pub virtual_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_len: u64,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// Whether whoever writes the image may put refcounts off.
    pub lazy_refcounts: bool,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// How clusters are compressed, when any are.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<BackingName>,
    /// The external data file.
    pub data_file: Option<DataFileName>,
    /// What is given room.
    pub preallocation: Preallocation,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            virtual_size: 0,
            version: 3,
            cluster_len: 1 << CLUSTER_BITS_DEFAULT,
            refcount_bits: REFCOUNT_BITS_DEFAULT,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }
}

impl CreateOptions {
    /// Fails with `InvalidInput`, naming the option, unless there can be such an image.
    pub fn check(&self) -> Result<()> {
        self.check_version()?;
        let bits = self.cluster_len.trailing_zeros();
        if !self.cluster_len.is_power_of_two() || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return invalid("cluster_size is a power of two from 512 to 2M");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("refcount_bits is 1, 2, 4, 8, 16, 32 or 64");
        }
        if self.extended_l2 && bits < EXTENDED_CLUSTER_BITS_MIN {
            return invalid("extended_l2=on needs a cluster_size of at least 16K");
        }
        let preallocated = self.preallocation != Preallocation::Off;
        if self.backing.is_some() && preallocated && !self.extended_l2 {
            return invalid(
                "with a backing file, preallocation needs extended_l2=on: it would hide the file",
            );
        }
        if self.backing.is_some() && self.data_file.as_ref().is_some_and(|file| file.raw) {
            return invalid("data_file_raw=on excludes a backing file: the data file has the whole disk");
        }
        let size = self.rounded_size()?;
        let l1_len = self.geometry().l1_entries_for(size).saturating_mul(8);
        if l1_len > L1_LEN_MAX {
            return invalid(
                "the disk is too large for this cluster_size; a larger one helps (2M is the most)",
            );
        }
        if self.data_file.is_some() && size > HOST_END {
            return invalid("with data_file a disk has at most 64 PiB: entries name no more of a file");
        }
        header::encode(self, &self.layout()?).map(drop)
    }

    fn check_version(&self) -> Result<()> {
        let needs_3 = [
            ("refcount_bits other than 16", self.refcount_bits != REFCOUNT_BITS_DEFAULT),
            ("lazy_refcounts", self.lazy_refcounts),
            ("extended_l2", self.extended_l2),
            ("compression_type other than zlib", self.compression != Compression::Zlib),
            ("data_file", self.data_file.is_some()),
        ];
        let needed = needs_3.iter().find(|(_, needed)| *needed);
        match (self.version, needed) {
            (3, _) | (2, None) => Ok(()),
            (2, Some((what, _))) => invalid(&format!("{what} needs compat=1.1 (version 3)")),
            (_, _) => invalid("compat is 0.10 (version 2) or 1.1 (version 3)"),
        }
    }

    /// Size of the disk as it will be.
    pub fn rounded_size(&self) -> Result<u64> {
        let size = self.virtual_size.checked_next_multiple_of(SECTOR_LEN);
        let Some(size) = size.filter(|size| i64::try_from(*size).is_ok()) else {
            return Err(Error::new(ErrorKind::InvalidInput, "a disk has less than 8 EiB"));
        };
        Ok(size)
    }

    fn geometry(&self) -> Geometry {
        let data_file = match &self.data_file {
            None => DataFile::Internal,
            Some(DataFileName { raw: false, .. }) => DataFile::External,
            Some(DataFileName { raw: true, .. }) => DataFile::ExternalRaw,
        };
        Geometry::new(self.cluster_len.trailing_zeros(), self.extended_l2, self.version, data_file)
    }

    /// Whether all tables are made. In a raw data file every cluster has its place: without tables a
    /// reader would not look there.
    fn has_tables(&self) -> bool {
        self.preallocation != Preallocation::Off || self.data_file.as_ref().is_some_and(|file| file.raw)
    }

    fn layout(&self) -> Result<Layout> {
        let geometry = self.geometry();
        let cluster_len = geometry.cluster_len();
        let size = self.rounded_size()?;
        let l1_needed = geometry.l1_entries_for(size);
        let guest_clusters = size.div_ceil(cluster_len);
        let l2_tables = if self.has_tables() { l1_needed } else { 0 };
        let internal = geometry.data_file() == DataFile::Internal;
        let data_clusters = if self.has_tables() && internal { guest_clusters } else { 0 };
        let l1_entries = l1_needed.max(1);
        let others = 1 + (l1_entries * 8).div_ceil(cluster_len) + l2_tables + data_clusters;
        let block_entries = cluster_len * 8 / u64::from(self.refcount_bits);
        let (mut table_clusters, mut blocks) = (1, 1);
        // Both describe themselves, too. Each only grows, and a few rounds settle it.
        loop {
            let wanted_blocks = (others + table_clusters + blocks).div_ceil(block_entries);
            let wanted_table = (wanted_blocks * 8).div_ceil(cluster_len);
            if (wanted_table, wanted_blocks) == (table_clusters, blocks) {
                break;
            }
            (table_clusters, blocks) = (wanted_table.max(table_clusters), wanted_blocks.max(blocks));
        }
        let at = |clusters: u64| geometry.host_at(HostIndex(clusters)).start();
        let l1_index = 1 + table_clusters + blocks;
        let l2_index = l1_index + (l1_entries * 8).div_ceil(cluster_len);
        let clusters = others + table_clusters + blocks;
        let too_large = clusters > HOST_END / cluster_len;
        if too_large || table_clusters * cluster_len > REFCOUNT_TABLE_LEN_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the disk is too large to be preallocated with this cluster_size and refcount_bits",
            ));
        }
        Ok(Layout {
            geometry,
            size,
            table_at: at(1),
            table_clusters,
            blocks_at: at(1 + table_clusters),
            blocks,
            block_entries,
            l1_at: at(l1_index),
            l1_entries,
            l2_at: at(l2_index),
            l2_tables,
            data_at: at(l2_index + l2_tables),
            guest_clusters,
            end: at(clusters),
        })
    }
}

/// Where everything lies: header, refcount table, refcount blocks, L1, L2 tables, data.
struct Layout {
    geometry: Geometry,
    size: u64,
    table_at: HostOffset,
    table_clusters: u64,
    blocks_at: HostOffset,
    blocks: u64,
    block_entries: u64,
    l1_at: HostOffset,
    l1_entries: u64,
    l2_at: HostOffset,
    l2_tables: u64,
    data_at: HostOffset,
    guest_clusters: u64,
    end: HostOffset,
}

/// Makes the image in `image`, and its data in `data_file` where there is one; both hold nothing so far, or
/// are devices. When it returns, all is durable.
pub fn create(
    image: &Arc<dyn Storage>,
    data_file: Option<&Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<()> {
    options.check()?;
    if data_file.is_some() != options.data_file.is_some() {
        return Err(Error::new(ErrorKind::InvalidInput, "a data file is missing or not wanted"));
    }
    let layout = options.layout()?;
    let maker = Maker { image, layout };
    maker.take_length()?;
    let first_cluster = header::encode(options, &maker.layout)?;
    // Whatever a device was before, it is nothing until the end.
    maker.write(HostOffset(0), &vec![0; first_cluster.len()])?;
    if !image.facts().grows {
        sync(image)?;
    }
    maker.refcounts(options.refcount_bits)?;
    maker.tables()?;
    let (place, at) = match data_file {
        None => (image, maker.layout.data_at),
        Some(data_file) => (data_file, HostOffset(0)),
    };
    if let Some(data_file) = data_file {
        set_len(data_file, maker.layout.size)?;
    }
    let data_len = match data_file {
        None => maker.layout.end.0 - maker.layout.data_at.0,
        Some(_) => maker.layout.size,
    };
    preallocate(place, at, data_len, options.preallocation)?;
    if let Some(data_file) = data_file {
        sync(data_file)?;
    }
    sync(image)?;
    maker.write(HostOffset(0), &first_cluster)?;
    sync(image)
}

/// Gives room to a part of a storage that reads as zeroes, as far as it is told to.
pub fn preallocate(
    storage: &Arc<dyn Storage>,
    at: HostOffset,
    len: u64,
    preallocation: Preallocation,
) -> Result<()> {
    let range = HostRange::new(at, len).filter(|range| !range.is_empty());
    let Some(range) = range else { return Ok(()) };
    let fail = |e| storage_error(storage, "cannot reserve room", at, e);
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => match storage.reserve(range).map_err(fail)? {
            true => Ok(()),
            false => {
                let text = "this file system cannot reserve room (preallocation=full writes zeroes)";
                Err(Error::new(ErrorKind::Unsupported, text).with_path(&storage.facts().path))
            }
        },
        Preallocation::Full => {
            let zeroes = vec![0; usize::try_from(len).unwrap_or(FILL_LEN).min(FILL_LEN)];
            let mut done = 0;
            while done < len {
                let part = usize::try_from(len - done).unwrap_or(FILL_LEN).min(zeroes.len());
                let part = zeroes.get(..part).unwrap_or_default();
                storage.pwrite(part, HostOffset(at.0 + done), Durability::Later).map_err(fail)?;
                done += part.len() as u64;
            }
            Ok(())
        }
    }
}

struct Maker<'a> {
    image: &'a Arc<dyn Storage>,
    layout: Layout,
}

impl Maker<'_> {
    /// Sees to it that all clusters are there.
    fn take_length(&self) -> Result<()> {
        let facts = self.image.facts();
        if facts.grows {
            return set_len(self.image, self.layout.end.0);
        }
        let len = self.image.len().map_err(|e| self.fail("cannot tell the length", e))?;
        if len < self.layout.end.0 || self.layout.l2_tables > 0 {
            let text = "the device is too small for the image, or preallocation was asked for, which a device \
                        does not need";
            return Err(Error::new(ErrorKind::InvalidInput, text).with_path(&facts.path));
        }
        Ok(())
    }

    /// Every cluster up to the end is used once.
    fn refcounts(&self, bits: u32) -> Result<()> {
        let layout = &self.layout;
        let entries = layout.table_clusters * layout.geometry.cluster_len() / 8;
        let table = vec![0; usize::try_from(entries).unwrap_or(0)];
        let mut refcounts = Refcounts::new(layout.geometry, bits, table, layout.table_at);
        let end = layout.geometry.host_index(layout.end).0;
        for block in 0..layout.blocks {
            let at = HostOffset(layout.blocks_at.0 + block * layout.geometry.cluster_len());
            refcounts.create(BlockIndex(usize::try_from(block).unwrap_or(usize::MAX)), at);
            let first = block * layout.block_entries;
            for index in first..(first + layout.block_entries).min(end) {
                refcounts.set(HostIndex(index), 1).map_err(|_| {
                    Error::new(ErrorKind::Corrupt, "a cluster of the new image cannot be counted")
                })?;
            }
            let writes = refcounts.freeze_blocks();
            for write in &writes {
                self.write(write.at, &write.bytes)?;
            }
            refcounts.written(&writes);
        }
        self.write(layout.table_at, &refcounts.table_bytes())
    }

    /// The L1 table, and the L2 tables where they are made at once.
    fn tables(&self) -> Result<()> {
        let layout = &self.layout;
        let geometry = layout.geometry;
        let cluster_len = geometry.cluster_len();
        let l2_index = geometry.host_index(layout.l2_at).0;
        let mut l1 = Vec::new();
        for number in 0..layout.l1_entries {
            let there = number < layout.l2_tables;
            let table = geometry.host_at(HostIndex(l2_index + number));
            l1.extend(if there { geometry.encode_owned(table) } else { 0 }.to_be_bytes());
        }
        l1.resize(l1.len().next_multiple_of(usize::try_from(cluster_len).unwrap_or(1)), 0);
        let per_table = geometry.l2_coverage_len() / cluster_len;
        let first_data = match geometry.data_file() {
            DataFile::Internal => geometry.host_index(layout.data_at).0,
            DataFile::External | DataFile::ExternalRaw => 0,
        };
        for number in 0..layout.l2_tables {
            let mut table = Vec::with_capacity(usize::try_from(cluster_len).unwrap_or(0));
            for cluster in number * per_table..(number + 1) * per_table {
                let host = geometry.host_at(HostIndex(first_data + cluster));
                let entry = if cluster < layout.guest_clusters { geometry.encode_owned(host) } else { 0 };
                table.extend(entry.to_be_bytes());
                // Its subclusters are still the backing file's, or zeroes.
                table.resize(table.len() + (geometry.entry_words() - 1) * 8, 0);
            }
            self.write(HostOffset(layout.l2_at.0 + number * cluster_len), &table)?;
        }
        self.write(layout.l1_at, &l1)
    }

    fn write(&self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        let written = self.image.pwrite(bytes, at, Durability::Later);
        written.map_err(|e| self.fail("cannot write the image's metadata", e))
    }

    fn fail(&self, what: &'static str, error: std::io::Error) -> Error {
        storage_error(self.image, what, HostOffset(0), error)
    }
}

fn set_len(storage: &Arc<dyn Storage>, len: u64) -> Result<()> {
    storage
        .set_len(len)
        .map_err(|e| storage_error(storage, "cannot make the file this long", HostOffset(len), e))
}

fn sync(storage: &Arc<dyn Storage>) -> Result<()> {
    storage.sync().map_err(|e| storage_error(storage, "cannot make the image durable", HostOffset(0), e))
}

fn invalid<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidInput, what.to_owned()))
}
