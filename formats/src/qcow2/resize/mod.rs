//! Another size for the disk of an image that nobody has open.
//!
//! Growing makes the L1 table and an external data file longer first, then zeroes what would come to light behind the
//! old end, and changes the size last. Shrinking changes the size first, then drops the entries behind it, frees what
//! nothing leads to any more, and cuts off the data file last. A crash in between leaves an image of either size, and
//! leaks at worst, or a data file that is longer than the disk. Shrinking to the size that the disk has finishes that.

pub(super) mod bitmaps;
pub(super) mod data_file;

use super::check::ledger::{Ledger, clear_unknown, sync, write};
use super::check::{self, Subject};
use super::driver::Qcow2Driver;
use super::header::{Header, Incompatible, L1_LEN_MAX, TableLocation};
use super::parts::{Caches, Parts};
use super::snapshots::{self, Snapshot};
use super::tables::ImageNumber;
use super::types::DataFile;
use super::write::allocator::HOST_END;
use super::write::commit;
use super::write::data_file as places;
use super::write::metadata_map::Kind;
use super::write::options::WriteOptions;
use crate::address::{GuestRange, HostOffset};
use crate::driver::{BlockDriver, Status, StatusQuery, ZeroRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::read_exact;
use crate::storage::{Durability, Provision, Storage};
use crate::sync::Arc;

/// Where the size stands in the header (specification).
pub(super) const SIZE_AT: HostOffset = HostOffset(24);
/// Where the number of L1 entries and the place of the table stand in the header (specification).
pub(super) const L1_POINTER_AT: HostOffset = HostOffset(36);
/// Most bytes of entries that are cleared with one write. Our choice.
const CLEAR_LEN: u64 = 1 << 20;
/// Bytes of the table cache while zeroes are written. Our choice.
const TABLE_CACHE_LEN: u64 = 4 << 20;

/// The files of an image whose disk gets another size.
pub struct ResizeParts {
    /// The image file: writable, and nobody else's.
    pub image: Arc<dyn Storage>,
    /// The external data file, likewise; there exactly if the image has one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// What lies below, if anything does.
    pub backing: Option<Arc<dyn BlockDriver>>,
    /// That is not what the image names.
    pub foreign: bool,
}

/// Gives the disk of an image another size, a multiple of 512, and closes its files. When it returns, all is durable.
/// An error leaves either size, and may cost dirty bitmaps, which it says then. With the size that the disk has it gives
/// back what lies behind the end, as whoever made the disk smaller may have been interrupted.
pub fn resize(parts: &ResizeParts, size: u64) -> Result<()> {
    change(parts, size).map_err(|e| e.with_path(&parts.image.facts().path))
}

fn change(parts: &ResizeParts, size: u64) -> Result<()> {
    let image = &parts.image;
    let header = Header::load(image)?;
    let (snapshots, snapshots_len) = snapshots::load(image, &header)?;
    if parts.data_file.is_some() != header.geometry.is_external() {
        return Err(Error::new(ErrorKind::InvalidInput, "an external data file is missing or not wanted"));
    }
    let resizer = Resizer { parts, image, snapshots: (&snapshots, snapshots_len), size };
    refuse(&header, &snapshots, size)?;
    bitmaps::plan(image, &header, size)?;
    if let Some(data) = &parts.data_file {
        data_file::check_room(data, size)?;
        if header.geometry.data_file() == DataFile::ExternalRaw && parts.backing.is_some() {
            let text = "an image with a raw external data file cannot have a backing file (--backing none)";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    }
    if size > header.virtual_size {
        refuse_growth(&header, parts.foreign)?;
    }
    let header = match header.incompatible.contains(Incompatible::DIRTY) {
        true => {
            check::rebuild(image, &header, resizer.snapshots)?;
            Header::load(image)?
        }
        false => header,
    };
    clear_unknown(image, &header)?;
    let bitmaps = bitmaps::plan(image, &header, size)?;
    if size > header.virtual_size {
        resizer.grow(&header, bitmaps.as_ref())?;
    } else {
        resizer.shrink(&header, bitmaps.as_ref())?;
    }
    let close = |file: &Arc<dyn Storage>| file.close().map_err(|e| Error::io("cannot close the image", e));
    parts.data_file.iter().chain([image]).try_for_each(close)
}

/// Fails if the disks of images like this one do not get this size.
pub(super) fn refuse(header: &Header, snapshots: &[Snapshot], size: u64) -> Result<()> {
    if header.incompatible.contains(Incompatible::CORRUPT) {
        let text = "the image is marked as corrupt; repair it first (nbd-img check --repair all)";
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    if header.geometry.is_external() && !snapshots.is_empty() {
        let text = "an image with an external data file cannot have snapshots, and this one does";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    if header.geometry.data_file() == DataFile::ExternalRaw && header.backing_name.is_some() {
        let text =
            "an image with a raw external data file cannot have a backing file, and this one names one";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    if snapshots.iter().any(|snapshot| !snapshot.has_disk_size()) {
        let text = "a snapshot does not say which size its disk has, so the image's must not change";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let l1_len = header.geometry.l1_entries_for(size).saturating_mul(8);
    if l1_len > L1_LEN_MAX || i64::try_from(size).is_err() {
        let cluster_len = header.geometry.cluster_len();
        let text = format!("a disk of {size} bytes is too large for clusters of {cluster_len} bytes");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    if header.geometry.is_external() && size > HOST_END {
        let text = format!("a disk of {size} bytes is too large for an external data file");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(())
}

/// Fails if a longer disk would have bytes one day that it does not have now: its new part has no entries, and `foreign`
/// says that what lies below is not what the image names.
pub(super) fn refuse_growth(header: &Header, foreign: bool) -> Result<()> {
    if !foreign || header.backing_name.is_none() {
        return Ok(());
    }
    let text = "the image names a backing file, which may have bytes where the disk becomes longer: open it with that \
                one (without --backing) to make it longer";
    Err(Error::new(ErrorKind::InvalidInput, text))
}

/// Takes from the data file what it has behind `size`, durably.
fn cut(data: &Arc<dyn Storage>, size: u64) -> Result<()> {
    data_file::cut(data, size)?;
    data_file::sync(data)
}

struct Resizer<'a> {
    parts: &'a ResizeParts,
    image: &'a Arc<dyn Storage>,
    snapshots: (&'a [Snapshot], u64),
    size: u64,
}

impl Resizer<'_> {
    fn grow(&self, header: &Header, bitmaps: Option<&bitmaps::Change>) -> Result<()> {
        let old_size = header.virtual_size;
        if header.extensions.bitmaps.is_some() {
            // Nobody looks at where they lie when something is zeroed.
            check::ensure_sound(&Subject::load(self.image, header, self.snapshots)?)?;
        }
        let header = Header { virtual_size: self.size, ..self.grow_l1(header)? };
        self.prepare_data(&header, old_size)?;
        let Some(bitmaps) = bitmaps else { return self.write_size() };
        // With all that was done to refcounts.
        let header = Header::load(self.image)?;
        let mut ledger = self.ledger(&header)?;
        let directory_at = bitmaps.write(&mut ledger)?;
        bitmaps.switch(self.image, &header, self.size, directory_at)?;
        ledger.leave_tables(true)?;
        bitmaps.free_old(&mut ledger)
    }

    /// Makes the data file long enough, and zeroes of what lies behind the old end. If that fails, the file, of which
    /// the image does not know yet, gets the length back that it had.
    fn prepare_data(&self, header: &Header, old_size: u64) -> Result<()> {
        let Some(data) = &self.parts.data_file else { return self.zero_behind(header, old_size) };
        let old_len = data_file::length(data)?;
        data_file::lengthen(data, header.geometry.data_file(), old_size, self.size)
            .and_then(|()| data_file::sync(data))
            .and_then(|()| self.zero_behind(header, old_size))
            .inspect_err(|_| data_file::note_taken_back(cut(data, old_len.max(old_size))))
    }

    /// Puts a longer L1 table behind everything else, if the new size needs one.
    fn grow_l1(&self, header: &Header) -> Result<Header> {
        let entries = header.geometry.l1_entries_for(self.size);
        if entries <= u64::from(header.l1.entries) {
            return Ok(header.clone());
        }
        let mut ledger = self.ledger(header)?;
        let mut table = vec![0; usize::try_from(entries * 8).unwrap_or(0)];
        let old_len = u64::from(header.l1.entries) * 8;
        let old = table.get_mut(..usize::try_from(old_len).unwrap_or(0)).unwrap_or_default();
        read_exact(self.image, header.l1.at, old)?;
        let at = ledger.write_row(&table, Kind::L1)?;
        // The table and that it is in use are durable before anything leads there.
        ledger.write_out()?;
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        let pointer = [&entries.to_be_bytes()[..], &at.0.to_be_bytes()].concat();
        write(self.image, L1_POINTER_AT, &pointer)?;
        sync(self.image)?;
        ledger.leave(header.l1.at, old_len)?;
        ledger.leave_tables(true)?;
        let refcount_table = ledger.write_out()?;
        Ok(Header { l1: TableLocation { at, entries }, refcount_table, ..header.clone() })
    }

    /// The refcounts of the image as they are in the file.
    fn ledger<'b>(&'b self, header: &'b Header) -> Result<Ledger<'b>> {
        let subject = Subject::load(self.image, header, self.snapshots)?;
        let used_end = if self.image.facts().grows { 0 } else { check::used_end(&subject)? };
        Ok(Ledger::new(&subject, used_end))
    }

    /// Zeroes what lies behind the old end and does not read as zeroes: the rest of its cluster, what the
    /// backing file has there, and what was left by who made the disk smaller. A raw data file, which is zeroes
    /// there by now, gets its entries.
    fn zero_behind(&self, header: &Header, old_size: u64) -> Result<()> {
        let reader = self.driver(header, None)?;
        let mut runs = Vec::new();
        let behind = GuestRange::new(old_size, self.size - old_size);
        let Some(behind) = behind.filter(|range| !range.is_empty()) else { return Ok(()) };
        let mut at = old_size;
        reader.status(StatusQuery::Allocation, behind, &mut |len, status| {
            if !matches!(status, Status::Allocation { zero: true, .. }) {
                runs.extend(GuestRange::new(at, len));
            }
            at += len;
            std::ops::ControlFlow::Continue(())
        })?;
        drop(reader);
        let places = match header.geometry.data_file() {
            DataFile::ExternalRaw => self.clusters_behind(header, old_size),
            DataFile::Internal | DataFile::External => None,
        };
        if runs.is_empty() && places.is_none() {
            return Ok(());
        }
        let driver = self.driver(header, Some(WriteOptions::default()))?;
        let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
        for run in runs {
            driver.write_zeroes(run, request)?;
        }
        if let Some(places) = places {
            places::map_places(&driver, driver.writer()?, places)?;
        }
        // It has made the file longer ahead of use, and takes that back.
        commit::settle(&driver, driver.writer()?)
    }

    /// The clusters that a longer disk has more, if any.
    fn clusters_behind(&self, header: &Header, old_size: u64) -> Option<GuestRange> {
        let from = old_size.checked_next_multiple_of(header.geometry.cluster_len())?;
        GuestRange::new(from, self.size.checked_sub(from)?).filter(|range| !range.is_empty())
    }

    /// A driver of the image with a header that the file does not have yet.
    fn driver(&self, header: &Header, write: Option<WriteOptions>) -> Result<Arc<Qcow2Driver>> {
        let mut header = header.clone();
        // What it does lies behind the end of the disk that they are of.
        header.extensions.bitmaps = None;
        Qcow2Driver::open(Parts {
            image: Arc::clone(self.image),
            caches: Caches::new(TABLE_CACHE_LEN, 0, [&header])?,
            header,
            data_file: self.parts.data_file.clone(),
            backing: self.parts.backing.clone(),
            number: ImageNumber(0),
            snapshot: None,
            write,
        })
    }

    fn shrink(&self, header: &Header, bitmaps: Option<&bitmaps::Change>) -> Result<()> {
        check::ensure_sound(&Subject::load(self.image, header, self.snapshots)?)?;
        match bitmaps {
            Some(bitmaps) => {
                let directory_at = bitmaps.write(&mut self.ledger(header)?)?;
                bitmaps.switch(self.image, header, self.size, directory_at)?;
            }
            None => self.write_size()?,
        }
        // With all that was done to refcounts.
        let header = Header::load(self.image)?;
        self.drop_entries(&header)?;
        check::free_unused(self.image, &header, self.snapshots)?;
        self.parts.data_file.as_ref().map_or(Ok(()), |data| cut(data, self.size))
    }

    /// Clears the L1 entries behind the new end, and those of the L2 table that it lies in. A table that a
    /// snapshot has, too, stays as it is.
    fn drop_entries(&self, header: &Header) -> Result<()> {
        let geometry = header.geometry;
        let needed = geometry.l1_entries_for(self.size);
        let l1_end = header.l1.at.0 + u64::from(header.l1.entries) * 8;
        self.clear(header.l1.at.0 + needed * 8, l1_end)?;
        let first_cluster = self.size.div_ceil(geometry.cluster_len());
        let per_table = geometry.l2_coverage_len() / geometry.cluster_len();
        let number = first_cluster % per_table;
        if let Some(last) = needed.checked_sub(1).filter(|_| number != 0) {
            let mut entry = [0; 8];
            read_exact(self.image, HostOffset(header.l1.at.0 + last * 8), &mut entry)?;
            let raw = u64::from_be_bytes(entry);
            let table = geometry.decode_l1(raw).ok().flatten().filter(|_| geometry.is_owned(raw));
            if let Some(table) = table {
                let start = table.start().0;
                let from = start + number * geometry.entry_words() as u64 * 8;
                self.clear(from, start + geometry.cluster_len())?;
            }
        }
        sync(self.image)
    }

    fn clear(&self, mut from: u64, to: u64) -> Result<()> {
        let zeroes = vec![0; usize::try_from(to.saturating_sub(from).min(CLEAR_LEN)).unwrap_or(0)];
        while from < to {
            let len = usize::try_from(to - from).unwrap_or(usize::MAX).min(zeroes.len());
            let part = zeroes.get(..len).unwrap_or_default();
            write(self.image, HostOffset(from), part)?;
            from += part.len() as u64;
        }
        Ok(())
    }

    fn write_size(&self) -> Result<()> {
        write(self.image, SIZE_AT, &self.size.to_be_bytes())?;
        sync(self.image)
    }
}
