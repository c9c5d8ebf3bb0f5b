//! The directory of persistent dirty bitmaps, for information only.
//!
//! A reader of the disk does not depend on bitmaps, so a directory that makes no sense yields an empty
//! list and a warning, never a failed open.

use super::extensions::{be_u32, be_u64};
use super::header::{Autoclear, Header};
use crate::address::HostOffset;
use crate::info::BitmapInfo;
use crate::storage::Storage;
use crate::sync::Arc;

/// Most bitmaps (QEMU's limit).
const COUNT_MAX: u32 = 65535;
/// Largest directory (QEMU's limit: 1 KiB for each bitmap).
const DIRECTORY_LEN_MAX: u64 = 64 << 20;
/// Bytes of an entry before its extra data (specification, "Bitmap directory").
const ENTRY_LEN: usize = 24;
/// Granularities above 2^31 bytes do not exist (QEMU's limit).
const GRANULARITY_BITS_MAX: u8 = 31;

/// Names of the flags, by bit (specification).
const FLAG_NAMES: [&str; 3] = ["in-use", "auto", "extra-data-compatible"];

/// The bitmaps of the image in `storage`.
pub fn list(storage: &Arc<dyn Storage>, header: &Header) -> Vec<BitmapInfo> {
    let Some(extension) = header.extensions.bitmaps else { return Vec::new() };
    // Without the bit somebody has written without knowing of bitmaps: they are stale.
    if !header.autoclear.contains(Autoclear::BITMAPS) {
        return Vec::new();
    }
    let sane = extension.count <= COUNT_MAX
        && extension.directory_len <= DIRECTORY_LEN_MAX
        && header.geometry.is_aligned(extension.directory_at);
    let bitmaps = if sane { read_directory(storage, extension.directory_at, extension.count) } else { None };
    bitmaps.unwrap_or_else(|| {
        tracing::warn!(path = ?storage.facts().path, "the directory of dirty bitmaps is damaged; none are listed");
        Vec::new()
    })
}

fn read_directory(storage: &Arc<dyn Storage>, mut at: u64, count: u32) -> Option<Vec<BitmapInfo>> {
    let mut bitmaps = Vec::new();
    for _ in 0..count {
        let (bitmap, len) = read_entry(storage, at)?;
        bitmaps.push(bitmap);
        at = at.checked_add(len)?;
    }
    Some(bitmaps)
}

fn read_entry(storage: &Arc<dyn Storage>, at: u64) -> Option<(BitmapInfo, u64)> {
    let mut head = [0u8; ENTRY_LEN];
    read_all(storage, at, &mut head)?;
    let flags = be_u32(&head, 12)?;
    let [.., granularity_bits, n0, n1, _, _, _, _] = head;
    if granularity_bits > GRANULARITY_BITS_MAX {
        return None;
    }
    let name_len = u16::from_be_bytes([n0, n1]);
    let extra_len = u64::from(be_u32(&head, 20)?);
    let name_at = at.checked_add(ENTRY_LEN as u64)?.checked_add(extra_len)?;
    let mut name = vec![0; usize::from(name_len)];
    read_all(storage, name_at, &mut name)?;
    let entry_len = (ENTRY_LEN as u64 + extra_len + u64::from(name_len)).next_multiple_of(8);
    // The table itself must have a place, else the entry is no entry.
    be_u64(&head, 0).filter(|table_at| *table_at != 0)?;
    let bitmap = BitmapInfo {
        name: String::from_utf8_lossy(&name).into_owned(),
        granularity: 1 << granularity_bits,
        flags: flag_names(flags),
    };
    Some((bitmap, entry_len))
}

fn flag_names(flags: u32) -> Vec<String> {
    let names = FLAG_NAMES.iter().enumerate();
    names.filter(|(bit, _)| flags >> bit & 1 == 1).map(|(_, name)| (*name).to_owned()).collect()
}

fn read_all(storage: &Arc<dyn Storage>, at: u64, buf: &mut [u8]) -> Option<()> {
    let got = storage.pread(buf, HostOffset(at)).ok()?;
    (got == buf.len()).then_some(())
}
