//! Whole clusters that are written compressed.
//!
//! What a write covers of whole clusters is compressed first, on several threads, with nothing held. Then places
//! for the blobs are claimed under one lock, the blobs written, and the entries set under the lock again, as
//! with any cluster that goes elsewhere: what was there before is freed, and stays until nobody reads it. A
//! cluster that does not shrink, and parts of clusters, are written as without compression.
//!
//! The blobs of one run lie byte by byte behind each other; the next run begins at a sector of its own, and at a
//! block of its own where the file is written past the page cache. So nothing that was flushed is ever written
//! again, whatever a disk does to the sector that it is writing as the power goes, and no two writes meet in one.

use super::super::compress::{Compress, Compressing};
use super::super::driver::Qcow2Driver;
use super::super::header::Header;
use super::super::map;
use super::super::tables::{SliceKey, TableSlice};
use super::super::types::{Blob, GuestCluster, L2Entry};
use super::allocator::Need;
use super::meta::Meta;
use super::{Writer, closed, commit, corrupt, satisfy, slow};
use crate::address::{GuestRange, HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::MapMode;
use crate::sync::Arc;

/// Most bytes of clusters that are compressed together. Our choice: enough for every processor, and little memory.
const BATCH_LEN_MAX: u64 = 4 << 20;
/// What a disk writes or does not write as a whole. As in the commit: both words of an entry are in one.
const SECTOR_LEN: u64 = 512;

/// What compresses clusters of an image with this header. Fails where there can be no compressed clusters, or only
/// other ones.
pub fn compressing(header: &Header, compress: Compress) -> Result<Compressing> {
    let (has, cluster_len) = (header.compression, header.geometry.cluster_len());
    let refuse = |text: String| Err(Error::new(ErrorKind::InvalidInput, text));
    if let Some(wanted) = compress.compression.filter(|wanted| *wanted != has) {
        return refuse(format!(
            "the image's compressed clusters are {has} (its compression_type), so --compress {wanted} cannot be \
             done: use --compress {has}, or make an image with compression_type={wanted}"
        ));
    }
    if header.geometry.is_external() {
        return refuse(
            "an external data file holds no compressed clusters: --compress cannot be used".to_owned(),
        );
    }
    if header.refcount_bits == 1 {
        let text = "refcounts of one bit let no compressed clusters share room: --compress cannot be used";
        return refuse(text.to_owned());
    }
    let cluster_len = usize::try_from(cluster_len).unwrap_or(usize::MAX);
    Ok(Compressing::new(has, compress.level, cluster_len))
}

/// Whether a write of the range has whole clusters to compress.
pub fn takes(driver: &Qcow2Driver, writer: &Writer, range: GuestRange) -> bool {
    writer.compressing.is_some() && !slow::whole_clusters(driver, range).is_empty()
}

/// Writes `buf` to `range`, as long as it is.
pub fn write(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    compressing: &Compressing,
    range: GuestRange,
    buf: &[u8],
) -> Result<()> {
    let offset = range.offset();
    let mut rest = slow::whole_clusters(driver, range);
    let part = |range: GuestRange| part_of(buf, offset, range);
    let head = range.prefix(rest.offset().saturating_sub(offset));
    slow::write_clusters(driver, writer, head.offset(), part(head))?;
    let tail = range.skip(rest.end().saturating_sub(offset));
    while !rest.is_empty() {
        let coverage = driver.geometry().slice_coverage_len();
        let batch = rest.prefix(BATCH_LEN_MAX.max(driver.geometry().cluster_len()));
        let batch = batch.prefix(map::up_to_boundary(batch.offset(), coverage));
        write_batch(driver, writer, compressing, batch.offset(), part(batch))?;
        rest = rest.skip(batch.len());
    }
    slow::write_clusters(driver, writer, tail.offset(), part(tail))
}

/// The bytes of `range` in `buf`, which begins at `offset`.
fn part_of(buf: &[u8], offset: u64, range: GuestRange) -> &[u8] {
    let index = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
    buf.get(index(range.offset())..index(range.end())).unwrap_or_default()
}

/// Writes whole clusters of one slice. The last one of the disk may be shorter, and is filled up with zeroes.
fn write_batch(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    compressing: &Compressing,
    offset: u64,
    buf: &[u8],
) -> Result<()> {
    let cluster_len = usize::try_from(driver.geometry().cluster_len()).unwrap_or(usize::MAX);
    let blobs = match buf.len() % cluster_len {
        0 => compressing.blobs(buf),
        _ => {
            let mut filled = buf.to_vec();
            filled.resize(buf.len().next_multiple_of(cluster_len), 0);
            compressing.blobs(&filled)
        }
    };
    let clusters: Vec<&[u8]> = buf.chunks(cluster_len).collect();
    let end = offset + buf.len() as u64;
    let mut number = 0;
    while let Some(cluster) = clusters.get(number) {
        let at = offset + (number * cluster_len) as u64;
        let shrunk: Vec<&[u8]> = blobs.iter().skip(number).map_while(Option::as_deref).collect();
        let stored = store(driver, writer, at, end, &shrunk)?;
        if stored == 0 {
            slow::write_clusters(driver, writer, at, cluster)?;
        }
        number += stored.max(1);
    }
    Ok(())
}

/// Stores blobs of the clusters from `offset` on, whose bytes end at `end`, and returns how many of them. 0: none can
/// be, and the first cluster is to be written otherwise.
fn store(
    driver: &Qcow2Driver,
    writer: &Arc<Writer>,
    offset: u64,
    end: u64,
    blobs: &[&[u8]],
) -> Result<usize> {
    if blobs.is_empty() {
        return Ok(0);
    }
    loop {
        commit::relieve(driver, writer)?;
        slow::own_table(driver, writer, offset)?;
        let Some(slice) = map::slice_at(driver, offset, MapMode::Wait)? else { continue };
        let mut run = Run { driver, writer, slice, held: false, blobs: Vec::new(), stretches: Vec::new() };
        match run.gather(offset, end, blobs)? {
            Some(Stop::Otherwise) => return Ok(0),
            // Entries that are not compressed can name more of a file.
            Some(Stop::Need(Need::NoSpace)) => return Ok(0),
            Some(Stop::Need(need)) => {
                drop(run);
                satisfy(driver, writer, need)?;
            }
            Some(Stop::Fault(what)) => {
                drop(run);
                return Err(corrupt(driver, writer, what));
            }
            // Somebody has changed the table meanwhile.
            None if run.blobs.is_empty() => {}
            None => {
                run.write()?;
                return run.publish();
            }
        }
    }
}

/// Why a run ends.
enum Stop {
    /// The next blob takes this.
    Need(Need),
    /// The next entry makes no sense.
    Fault(&'static str),
    /// The next one is not written as a whole: the disk has become longer since it was, with the last part of it.
    Otherwise,
}

/// Clusters that are claimed, and blobs with places for them. What is not published is given back.
struct Run<'a> {
    driver: &'a Qcow2Driver,
    writer: &'a Writer,
    slice: Arc<TableSlice>,
    /// The slice is held.
    held: bool,
    blobs: Vec<(GuestCluster, Blob)>,
    /// Bytes that lie behind each other in the file.
    stretches: Vec<(HostOffset, Vec<u8>)>,
}

impl Run<'_> {
    /// Claims what can be had now. What keeps it from having anything, or makes no sense: see the result.
    fn gather(&mut self, offset: u64, end: u64, blobs: &[&[u8]]) -> Result<Option<Stop>> {
        let (driver, writer, geometry) = (self.driver, self.writer, self.driver.geometry());
        let first = geometry.cluster_of(offset);
        let key = SliceKey { image: driver.number(), slice: geometry.slice_of(offset) };
        let mut meta = slow::lock_unclaimed(driver, writer, first)?;
        let owned = geometry.is_owned(driver.l1().raw(geometry.l1_index(offset)));
        if !owned || !driver.tables().hold(key, &self.slice) {
            return Ok(None);
        }
        self.held = true;
        let mut stopped = None;
        for (cluster, blob) in (first.0..).map(GuestCluster).zip(blobs) {
            if meta.claims.contains(&cluster) {
                break;
            }
            let start = cluster.0 * geometry.cluster_len();
            let piece = GuestRange::new(start, geometry.cluster_len().min(end.saturating_sub(start)));
            stopped = match piece.filter(|piece| slow::is_whole(driver, *piece, geometry.cluster_len())) {
                Some(_) => self.claim(&mut meta, cluster, blob).err(),
                None => Some(Stop::Otherwise),
            };
            if stopped.is_some() {
                break;
            }
        }
        meta.allocator.align_packing(self.unit());
        // What there is comes first.
        Ok(stopped.filter(|stop| self.blobs.is_empty() || matches!(stop, Stop::Fault(_))))
    }

    /// A place for the blob of one cluster, which nobody has a claim on.
    fn claim(
        &mut self,
        meta: &mut Meta,
        cluster: GuestCluster,
        bytes: &[u8],
    ) -> std::result::Result<(), Stop> {
        let entry = self.slice.entry(cluster).map_err(|_| Stop::Fault("an L2 entry is bad"))?;
        meta.check_entry(self.driver, entry).map_err(Stop::Fault)?;
        let at = meta.allocator.pack(bytes.len() as u64).map_err(Stop::Need)?;
        let blob = Blob::holding(at, bytes.len() as u64);
        if self.driver.geometry().encode_blob(blob).is_none() {
            meta.free_entry(self.driver, L2Entry::Compressed(blob)).map_err(Stop::Fault)?;
            return Err(Stop::Need(Need::NoSpace));
        }
        meta.claims.insert(cluster);
        self.blobs.push((cluster, blob));
        match self.stretches.last_mut() {
            Some((start, stretch)) if start.0 + stretch.len() as u64 == at.0 => {
                stretch.extend_from_slice(bytes);
            }
            Some(_) | None => self.stretches.push((at, bytes.to_vec())),
        }
        Ok(())
    }

    /// What is written of the file, it is written whole.
    fn unit(&self) -> u64 {
        let block_len = u64::from(self.driver.image().facts().block_len);
        SECTOR_LEN.max(block_len).min(self.driver.geometry().cluster_len())
    }

    fn write(&mut self) -> Result<()> {
        let unit = usize::try_from(self.unit()).unwrap_or(1);
        for (at, stretch) in &mut self.stretches {
            // The rest of the last unit is nobody else's.
            stretch.resize(stretch.len().next_multiple_of(unit), 0);
            slow::write_data(self.driver, *at, stretch)?;
        }
        Ok(())
    }

    /// Where the refcounts of the file are wrong, room that counted as free may have held blobs that somebody has read:
    /// they are not found in the place of these.
    fn forget_content(&self) {
        for (at, stretch) in &self.stretches {
            if let Some(range) = HostRange::new(*at, stretch.len() as u64) {
                self.driver.clusters().forget(self.driver.number(), range);
            }
        }
    }

    /// Maps the clusters; returns how many.
    fn publish(mut self) -> Result<usize> {
        self.forget_content();
        let mut meta = self.writer.lock();
        if !self.writer.accepts(&meta) {
            drop(meta);
            return Err(closed());
        }
        let blobs = std::mem::take(&mut self.blobs);
        let mut fault = None;
        for (cluster, blob) in &blobs {
            fault = self.map(&mut meta, *cluster, *blob).err().or(fault);
            meta.claims.remove(cluster);
        }
        self.writer.changed.notify_all();
        drop(meta);
        match fault {
            None => Ok(blobs.len()),
            Some(fault) => {
                self.writer.fail(fault);
                Err(closed())
            }
        }
    }

    fn map(
        &self,
        meta: &mut Meta,
        cluster: GuestCluster,
        blob: Blob,
    ) -> std::result::Result<(), &'static str> {
        let entry =
            self.driver.geometry().encode_blob(blob).ok_or("a blob lies where no entry can name it")?;
        let old = self.slice.entry(cluster).map_err(|_| "an L2 entry went bad in memory")?;
        meta.free_entry(self.driver, old)?;
        meta.set_entry(self.driver, &self.slice, cluster, entry);
        Ok(())
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if !self.blobs.is_empty() {
            let mut meta = self.writer.lock();
            for (cluster, blob) in &self.blobs {
                meta.claims.remove(cluster);
                // It was handed out as data, so it is no metadata.
                let _ = meta.free_entry(self.driver, L2Entry::Compressed(*blob));
            }
            self.writer.changed.notify_all();
        }
        if self.held {
            self.slice.release();
        }
    }
}
