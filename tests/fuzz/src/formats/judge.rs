//! What the tests' own code finds in the files of an image, and whether it is right.

use nbd_img_formats::storage::MemoryStorage;

use super::open::bytes_of;
use super::recorded::Bitmap;
use crate::support::checker::{self, Report};
use crate::support::image::{Bytes, COPIED, Image};
use crate::support::reader::{Disk, read_disk, read_files};

/// Longest refcount table of an image that is looked at.
pub const REFCOUNT_TABLE_CLUSTERS_MAX: u32 = 8;
/// Granularities that there can be (QEMU's limits).
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;

/// What an image holds.
pub struct Judged {
    pub content: Vec<u8>,
    pub snapshots: Vec<Vec<u8>>,
    pub report: Report,
    pub bitmaps: Vec<Bitmap>,
    /// What whoever reads a raw data file alone sees.
    pub raw: Option<Vec<u8>>,
}

/// What the tests' own code finds in an image, if it can be opened. Images that are too large to look at are not
/// judged, nor those that nobody may write.
pub fn look_at(bytes: &Vec<u8>, data: &MemoryStorage, backing: &[u8]) -> Option<Judged> {
    let small = bytes.be32(20) <= 16 && bytes.be32(36) <= 256 && bytes.be32(60) <= 8;
    let small = small && bytes.be32(56) <= REFCOUNT_TABLE_CLUSTERS_MAX;
    if !small || bytes.be64(24) > 1 << 20 {
        return None;
    }
    let bytes = &without_flags_of_nothing(bytes)?;
    let image = Image::parse(bytes).ok()?;
    let has_backing = bytes.be64(8) != 0 && bytes.be32(16) != 0;
    let backing = if has_backing { backing } else { &[] };
    let large = |entries: u64| entries > 256;
    if image.snapshots.iter().any(|snapshot| large(snapshot.l1_entries) || snapshot.size > 1 << 20)
        || image
            .bitmaps
            .iter()
            .any(|bitmap| large(bitmap.table_entries) || !GRANULARITY_BITS.contains(&bitmap.granularity_bits))
    {
        return None;
    }
    let contradicts = !image.snapshots.is_empty() || image.has_raw_data_file() && has_backing;
    if image.has_data_file() && contradicts {
        return None;
    }
    let report = checker::check(bytes).ok()?;
    let (content, raw) = match image.has_data_file() {
        false => (read_disk(bytes, Disk::Active, backing).ok()?, None),
        true => {
            let data = bytes_of(data)?;
            let content = read_files(bytes, &data, Disk::Active, backing).ok()?;
            let mut raw = vec![0; content.len()];
            data.fill(&mut raw, 0);
            (content, image.has_raw_data_file().then_some(raw))
        }
    };
    let snapshots = 0..image.snapshots.len();
    let snapshots: Result<_, _> =
        snapshots.map(|number| read_disk(bytes, Disk::Snapshot(number), backing)).collect();
    let bitmaps = image.bitmaps.iter().map(|bitmap| Bitmap::of(&image, bitmap)).collect();
    Some(Judged { content, snapshots: snapshots.ok()?, report, bitmaps, raw })
}

/// The image without L1 entries of a copied flag and nothing else. Offset 0 is no table by the format, and neither to
/// the driver nor to QEMU's; QEMU's check, which the tests' own follows, takes them for a table at 0.
fn without_flags_of_nothing(bytes: &Vec<u8>) -> Option<Vec<u8>> {
    let image = Image::parse(bytes).ok()?;
    let mut changed = bytes.clone();
    let snapshots = image.snapshots.iter().map(|snapshot| (snapshot.l1_at, snapshot.l1_entries.min(256)));
    for (at, entries) in snapshots.chain([(image.l1_at, image.l1_entries)]) {
        for (index, entry) in bytes.table(at, entries).into_iter().enumerate() {
            let at = usize::try_from(at).ok()?.saturating_add(index * 8);
            if entry == COPIED
                && let Some(word) = changed.get_mut(at..at.saturating_add(8))
            {
                word.fill(0);
            }
        }
    }
    Some(changed)
}
