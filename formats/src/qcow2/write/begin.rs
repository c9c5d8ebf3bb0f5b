//! Opening an image for writing: what is refused, and what has to be known before the first change.
//!
//! Nothing is written here, but by the repair of an image whose refcounts are not to be trusted.

use super::super::driver::Qcow2Driver;
use super::super::header::{Compatible, Header, Incompatible, TableLocation};
use super::super::snapshots::Snapshot;
use super::super::types::{DataFile, HostIndex};
use super::allocator::{Allocator, HOST_END, Space};
use super::bitmaps::{Places, Recorder};
use super::meta::Meta;
use super::metadata_map::{Kind, MetadataMap};
use super::options::WriteOptions;
use super::refcounts::{BlockIndex, Refcounts};
use super::{Writer, bitmaps, compress, repair};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::{read_exact, storage_error};
use crate::sync::atomic::Ordering;

/// Most clusters of L1 tables over all snapshots. Our choice: thousands of snapshots of a disk of terabytes, and
/// a few dozen megabytes of memory for knowing where they lie, however long a small file says that they are.
const INACTIVE_L1_CLUSTERS_MAX: u64 = 1 << 19;

/// Fails if images like this one are not written.
pub fn check(header: &Header, snapshot: Option<&str>, has_backing: bool) -> Result<()> {
    let unsupported = |what: &str| {
        let text = format!("images with {what} are not written yet; use --read-only");
        Err(Error::new(ErrorKind::Unsupported, text))
    };
    if snapshot.is_some() {
        let text = "an internal snapshot is served read-only (--load-snapshot needs --read-only)";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    if header.incompatible.contains(Incompatible::CORRUPT) {
        let text = "the image is marked as corrupt and is not written; repair it (qemu-img check -r all) or \
                    use --read-only";
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    // A word of the header is turned to a new directory at once only if it lies in one sector.
    if header.extensions.bitmaps.is_some_and(|bitmaps| !bitmaps.data_at.is_multiple_of(8)) {
        return unsupported("header extensions that are not aligned");
    }
    if header.geometry.is_external() && header.snapshots.entries > 0 {
        return unsupported("an external data file and internal snapshots");
    }
    // Data lies there at the guest's own offset, which an entry has to name.
    if header.geometry.is_external() && header.virtual_size > HOST_END {
        return unsupported("an external data file and a disk of more than 64 PiB");
    }
    if header.geometry.data_file() == DataFile::ExternalRaw && has_backing {
        return unsupported("a raw external data file and a backing file");
    }
    Ok(())
}

/// Looks at the data file; returns whether a raw one has to become longer before the first change.
fn check_data_file(driver: &Qcow2Driver) -> Result<bool> {
    let storage = driver.data_storage();
    let facts = storage.facts();
    if !facts.writable {
        let what = "the data file was opened read-only";
        return Err(Error::new(ErrorKind::ReadOnly, what).with_path(&facts.path));
    }
    let fail = |e| storage_error(storage, "cannot tell the data file's length", HostOffset(0), e);
    let short = storage.len().map_err(fail)? < driver.disk_end();
    if short && !facts.grows {
        let what = "the device with the data is smaller than the disk; use --read-only";
        return Err(Error::new(ErrorKind::InvalidInput, what).with_path(&facts.path));
    }
    Ok(short && driver.geometry().data_file() == DataFile::ExternalRaw)
}

/// What the image needs to be written.
pub fn begin(
    driver: &Qcow2Driver,
    header: &Header,
    snapshots: (&[Snapshot], u64),
    options: WriteOptions,
) -> Result<Writer> {
    if !driver.image().facts().writable {
        return Err(Error::new(ErrorKind::ReadOnly, "the file was opened read-only"));
    }
    let compressing = options.compress.map(|how| compress::compressing(header, how)).transpose()?;
    let short = header.geometry.is_external() && check_data_file(driver)?;
    let dirty = header.incompatible.contains(Incompatible::DIRTY);
    let mut table = header.refcount_table;
    let tables = bitmaps::load_tables(driver, header, options.bitmap_clusters_max)?;
    let placed = bitmaps::places(&tables, header.geometry);
    if dirty {
        table = repair::rebuild(driver, header, snapshots)?;
    } else if header.compatible.contains(Compatible::LAZY_REFCOUNTS) {
        tracing::debug!("the image asks for lazy refcounts; they are kept up to date all the same");
    }
    let refcounts = load_table(driver, header, table)?;
    let map = map_metadata(driver, header, &refcounts, snapshots, &placed)?;
    let recorder = Recorder::new(tables, options.bitmap_len_max);
    // Nothing is changed in an image that contradicts itself, so nobody will ask where there is room. A small file could
    // name a block of zeroes a million times, each of them to be looked through to its end.
    let counted = map.conflict().map_or_else(|| counted_end(driver, &refcounts), |_| Ok(0))?;
    let space = find_space(driver, counted)?;
    let allocator = Allocator::new(header.geometry, refcounts, map, space);
    let tables_len = (driver.tables().capacity() as u64).saturating_mul(header.geometry.slice_len());
    let meta = Meta::new(allocator);
    let writer = Writer::new(header, (options, compressing), meta, recorder, dirty, tables_len);
    writer.short_data_file.store(short, Ordering::Release);
    Ok(writer)
}

/// The refcount table in memory.
pub fn load_table(driver: &Qcow2Driver, header: &Header, table: TableLocation) -> Result<Refcounts> {
    let mut bytes = vec![0; table.entries as usize * 8];
    read_exact(driver.image(), table.at, &mut bytes)?;
    let entries = bytes.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
    Ok(Refcounts::new(header.geometry, header.refcount_bits, entries, table.at))
}

/// Notes where all metadata lies, but for the L2 tables of snapshots: their refcounts protect them.
pub fn map_metadata(
    driver: &Qcow2Driver,
    header: &Header,
    refcounts: &Refcounts,
    snapshots: (&[Snapshot], u64),
    placed: &Places,
) -> Result<MetadataMap> {
    let cluster_len = header.geometry.cluster_len();
    let mut map = MetadataMap::new(header.geometry);
    map.add(HostOffset(0), cluster_len, Kind::Header);
    map.add(header.l1.at, u64::from(header.l1.entries) * 8, Kind::L1);
    map.add(refcounts.table_at(), refcounts.table_len() as u64 * 8, Kind::RefcountTable);
    for block in 0..refcounts.table_len() {
        // A bad entry is found when it is used.
        if let Ok(Some(at)) = refcounts.block_at(BlockIndex(block)) {
            map.add(at, cluster_len, Kind::RefcountBlock);
        }
    }
    if header.snapshots.entries > 0 {
        map.add(header.snapshots.at, snapshots.1, Kind::SnapshotTable);
    }
    let mut inactive = 0;
    for snapshot in snapshots.0 {
        let l1 = snapshot.checked_l1(header)?;
        let len = u64::from(l1.entries) * 8;
        inactive += len.div_ceil(cluster_len);
        if inactive > INACTIVE_L1_CLUSTERS_MAX {
            let text = "the L1 tables of the image's snapshots are too long together for it to be written";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        map.add(l1.at, len, Kind::InactiveL1);
    }
    for (at, len, kind) in placed {
        map.add(*at, *len, *kind);
    }
    for index in 0..driver.l1().len() {
        let raw = driver.l1().raw(index);
        if let Ok(Some(table)) = header.geometry.decode_l1(raw) {
            map.add_l2(table.start(), header.geometry.is_owned(raw));
        }
    }
    Ok(map)
}

/// Where the part begins that was never used: behind the file's end and the last cluster that is counted, which is the one
/// before number `counted`.
fn find_space(driver: &Qcow2Driver, counted: u64) -> Result<Space> {
    let image = driver.image();
    let cluster_len = driver.geometry().cluster_len();
    let len =
        image.len().map_err(|e| storage_error(image, "cannot tell the file's length", HostOffset(0), e))?;
    // Refcounts of clusters that no entry can name keep nothing from being handed out.
    let counted = counted.min(HOST_END / cluster_len);
    let facts = image.facts();
    if facts.grows {
        let fresh = len.div_ceil(cluster_len).max(counted);
        return Ok(Space::new(HostIndex(fresh), HostIndex(fresh), facts.new_space_is_zero));
    }
    // What is counted behind the end of a device is not there, whatever the refcounts say.
    let end = len / cluster_len;
    Ok(Space::new(HostIndex(counted.min(end)), HostIndex(end), false))
}

/// The number behind the last cluster with a refcount.
fn counted_end(driver: &Qcow2Driver, refcounts: &Refcounts) -> Result<u64> {
    let mut bytes = vec![0; usize::try_from(driver.geometry().cluster_len()).unwrap_or(0)];
    for block in (0..refcounts.table_len()).rev() {
        let at = refcounts.block_at(BlockIndex(block)).map_err(|_| {
            Error::new(ErrorKind::Corrupt, "the image is damaged: an entry of the refcount table is bad")
        })?;
        let Some(at) = at else { continue };
        read_exact(driver.image(), at, &mut bytes)?;
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            // Several refcounts may lie in the last byte, or one in several.
            let per_byte = refcounts.block_entries().div_ceil(bytes.len() as u64);
            let per_entry = (bytes.len() as u64).div_ceil(refcounts.block_entries());
            let behind = (last as u64 / per_entry + 1) * per_byte;
            return Ok(block as u64 * refcounts.block_entries() + behind);
        }
    }
    Ok(0)
}
