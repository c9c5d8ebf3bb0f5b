//! The external data file of a disk whose size changes: how long it is, and what it holds behind the disk's end.
//!
//! Only its bytes and its length. What the image says of them is changed after this where the disk becomes longer, and
//! before it where the disk becomes shorter.

use super::super::types::DataFile;
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::{Provision, Storage};
use crate::sync::Arc;

/// Fails, changing nothing, if the data file cannot hold a disk of `size` bytes.
pub fn check_room(data: &Arc<dyn Storage>, size: u64) -> Result<()> {
    let facts = data.facts();
    if !facts.writable {
        let what = "the data file was opened read-only";
        return Err(Error::new(ErrorKind::ReadOnly, what).with_path(&facts.path));
    }
    let len = length(data)?;
    if !facts.grows && len < size {
        let what = format!("the device with the data has {len} bytes, and the disk would have {size}");
        return Err(Error::new(ErrorKind::InvalidInput, what).with_path(&facts.path));
    }
    Ok(())
}

/// Makes the data file ready for a disk that had `from` bytes and is to have `to`: at least as long, as QEMU leaves it,
/// and a raw one has zeroes where the disk becomes longer, whatever was there. Bytes behind `to` stay. A [`sync`] has to
/// follow.
pub fn lengthen(data: &Arc<dyn Storage>, kind: DataFile, from: u64, to: u64) -> Result<()> {
    let facts = data.facts();
    let len = length(data)?;
    if len < to && facts.grows {
        let fail =
            |e| storage_error(data, "cannot make the data file as long as the disk", HostOffset(to), e);
        data.set_len(to).map_err(fail)?;
    }
    if kind == DataFile::ExternalRaw {
        let end = if facts.new_space_is_zero { len.min(to) } else { to };
        let stale = HostRange::new(HostOffset(from), end.saturating_sub(from));
        if let Some(stale) = stale.filter(|range| !range.is_empty()) {
            let fail = |e| storage_error(data, "cannot zero what lies behind the disk's end", stale.at(), e);
            data.zero(stale, Provision::Unmap, false).map_err(fail)?;
        }
    }
    Ok(())
}

/// Takes from the data file what it has behind `size`, where no disk has anything; a [`sync`] has to follow. A device
/// keeps it: who makes the disk longer again zeroes it.
pub fn cut(data: &Arc<dyn Storage>, size: u64) -> Result<()> {
    if !data.facts().grows || length(data)? <= size {
        return Ok(());
    }
    let fail = |e| storage_error(data, "cannot cut off the end of the data file", HostOffset(size), e);
    data.set_len(size).map_err(fail)
}

/// Makes the data file's length and content durable. Whoever uses it goes on from a failure with nothing: past the page
/// cache the storage does not see to that.
pub fn sync(data: &Arc<dyn Storage>) -> Result<()> {
    data.sync().map_err(|e| storage_error(data, "cannot make the data file durable", HostOffset(0), e))
}

/// After a change that failed before the image knew of it, the data file was to get its old length back. Where that
/// cannot be, it stays too long, which harms nobody.
pub fn note_taken_back(taken_back: Result<()>) {
    if let Err(error) = taken_back {
        tracing::warn!(%error, "a data file stays longer than its disk (resize --shrink to the disk's size cuts it)");
    }
}

/// How many bytes the data file or device has.
pub fn length(data: &Arc<dyn Storage>) -> Result<u64> {
    data.len().map_err(|e| storage_error(data, "cannot tell the data file's length", HostOffset(0), e))
}
