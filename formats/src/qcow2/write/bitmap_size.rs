//! Dirty bitmaps of a disk that gets another size while it is used.
//!
//! In the file they are in use from before the size changes until the close, all of them: those that record nothing, too,
//! for their tables are those of another disk then. So a crash leaves them inconsistent, and none that tells less than was
//! written. In memory they become those of the new disk when the size has become durable, in one moment; the close stores
//! tables of that length.
//!
//! Bits behind the end, which a disk that becomes longer again is not to have, may be in the last cluster of them that
//! stays: they are there when the disk becomes smaller, and whoever made the image may have left some. Without them it goes
//! to a place of its own, before the size changes, and counts from then on. Meanwhile nobody stores bits.

use super::super::bitmaps::{LiveBitmap, Stored};
use super::super::driver::Qcow2Driver;
use super::super::header::Header;
use super::super::resize::bitmaps::{first_bits, read_cluster, resized_directory};
use super::bitmap_bits::{free, write_cluster};
use super::bitmaps::{Cursor, check_clusters};
use super::{Writer, closed};
use crate::address::HostOffset;
use crate::error::Result;
use crate::mover::storage_error;
use crate::sync::MutexGuard;
use crate::sync::atomic::Ordering;

/// Fails, naming it, if one of the bitmaps cannot be that of a disk of `to` bytes, or all of them could come to take too much
/// of the image.
pub fn check(driver: &Qcow2Driver, writer: &Writer, header: &Header, (from, to): (u64, u64)) -> Result<()> {
    if from == to {
        return Ok(());
    }
    let (image, recorder) = (driver.image(), &writer.bitmaps);
    let resized = resized_directory(image, header, (driver.bitmaps(), recorder.directory()), to)?;
    if to < from {
        return Ok(());
    }
    let max = writer.options.bitmap_clusters_max;
    check_clusters(image, header.geometry, (&resized, recorder.all_stored()), max)
}

/// Says in the file, durably, that the bitmaps that record nothing are in use, as the others are by now.
pub fn mark(driver: &Qcow2Driver, writer: &Writer) -> Result<()> {
    if writer.bitmaps.others.is_empty() {
        return Ok(());
    }
    let _file = writer.file.lock();
    if writer.closing.load(Ordering::SeqCst) {
        return Err(closed());
    }
    writer.bitmaps.mark_others_in_use(driver)?;
    let image = driver.image();
    image.sync().map_err(|e| {
        writer.fail("a sync has failed, so nobody knows what is durable");
        storage_error(image, "cannot make the marks of dirty bitmaps durable", HostOffset(0), e)
    })
}

/// What the bitmaps of a disk of another size need. As long as it is there nobody stores bits.
pub struct Prepared<'a> {
    writer: &'a Writer,
    size: u64,
    /// The last cluster of bits that stays, and where it is without what it had behind its last bit.
    trimmed: Vec<(&'a LiveBitmap, usize, Stored)>,
    _storing: MutexGuard<'a, Cursor>,
}

/// Writes what has to be there before the disk has `size` bytes. Nothing counts of it yet.
pub fn prepare<'a>(driver: &Qcow2Driver, writer: &'a Writer, size: u64) -> Result<Prepared<'a>> {
    let _storing = writer.bitmaps.storing.lock();
    let mut prepared = Prepared { writer, size, trimmed: Vec::new(), _storing };
    for bitmap in writer.bitmaps.all() {
        match trim(driver, writer, bitmap, size) {
            Ok(trimmed) => {
                prepared.trimmed.extend(trimmed.map(|(cluster, place)| (bitmap, cluster, place)));
            }
            Err(error) => {
                prepared.give_back();
                return Err(error);
            }
        }
    }
    Ok(prepared)
}

/// Writes the last cluster of bits that both disks have without what it has behind the last of them, if it has anything
/// there; returns its number and place.
fn trim(
    driver: &Qcow2Driver,
    writer: &Writer,
    bitmap: &LiveBitmap,
    size: u64,
) -> Result<Option<(usize, Stored)>> {
    let cluster_len = writer.geometry.cluster_len();
    let common = size.div_ceil(bitmap.granularity()).min(bitmap.stored().bits());
    let (cluster, rest) = (common / (cluster_len * 8), common % (cluster_len * 8));
    let cluster = usize::try_from(cluster).unwrap_or(usize::MAX);
    let place = bitmap.place_of(cluster);
    if rest == 0 || place == Stored::Zeroes {
        return Ok(None);
    }
    let is = read_cluster(driver.image(), place, cluster_len)?;
    let kept = first_bits(&is, rest);
    if kept == is {
        return Ok(None);
    }
    let place = match kept.iter().any(|byte| *byte != 0) {
        true => write_cluster(driver, writer, &kept)?,
        false => Stored::Zeroes,
    };
    Ok(Some((cluster, place)))
}

impl Prepared<'_> {
    /// The disk has the new size, durably, and the bitmaps are those of such a disk from here on.
    pub fn apply(self) {
        let mut trimmed = self.trimmed.iter().peekable();
        for bitmap in self.writer.bitmaps.all() {
            let own = trimmed.next_if(|(own, ..)| std::ptr::eq(*own, bitmap));
            let bits = self.size.div_ceil(bitmap.granularity());
            for place in bitmap.resize(bits, own.map(|(_, cluster, place)| (*cluster, *place))) {
                free(self.writer, place);
            }
        }
    }

    /// The disk keeps its size.
    pub fn give_back(self) {
        for (_, _, place) in &self.trimmed {
            free(self.writer, *place);
        }
    }
}
