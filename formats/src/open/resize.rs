//! Another size for an image file that nobody has open.

use std::path::Path;

use super::{Access, Backing, OpenOptions, chain, open_alone, probe_path};
use crate::address::HostOffset;
use crate::driver::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::qcow2::{self, Header, ResizeParts};

/// Disks are multiples of this (as with QEMU).
const SECTOR_LEN: u64 = 512;

/// Which size a disk is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeChange {
    /// This one.
    To(u64),
    /// So many bytes more.
    More(u64),
    /// So many bytes less.
    Less(u64),
}

impl SizeChange {
    /// What a disk of `from` bytes becomes, rounded up to 512. Fails with `InvalidInput` if there is no such size,
    /// and unless `shrink` allows one that is smaller.
    pub fn target(self, from: u64, shrink: bool) -> Result<u64> {
        let wanted = match self {
            SizeChange::To(size) => Some(size),
            SizeChange::More(more) => from.checked_add(more),
            SizeChange::Less(less) => from.checked_sub(less),
        };
        let wanted = wanted.and_then(|size| size.checked_next_multiple_of(SECTOR_LEN));
        let Some(to) = wanted.filter(|size| i64::try_from(*size).is_ok()) else {
            let text = format!("a disk of {from} bytes cannot be changed by that much");
            return Err(Error::new(ErrorKind::InvalidInput, text));
        };
        check_shrink(from, to, shrink)?;
        Ok(to)
    }
}

/// What became of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    /// Bytes that it had.
    pub from: u64,
    /// Bytes that it has.
    pub to: u64,
}

/// Changes the size of the disk in the image at `path`; what is asked for is rounded up to 512. It is made
/// smaller only if `shrink` says that the end of the disk may be lost; with it, the size that the disk has finishes a
/// change that was interrupted. When it returns, all is durable. `options` tells about the format and the files below.
pub fn resize(path: &Path, change: SizeChange, shrink: bool, options: &OpenOptions) -> Result<Resized> {
    let format = match options.format {
        Some(format) => format,
        None => probe_path(path)?,
    };
    let resized = match format {
        Format::Raw | Format::MmapRaw => resize_raw(path, change, shrink),
        Format::Qcow2 => resize_qcow2(path, change, shrink, options),
    };
    resized.map_err(|e| e.with_path(path))
}

fn resize_raw(path: &Path, change: SizeChange, shrink: bool) -> Result<Resized> {
    let (storage, _) = open_alone(path, Some(Format::Raw), Access::Write)?;
    let fail = |what, e| storage_error(&storage, what, HostOffset(0), e);
    let from = storage.len().map_err(|e| fail("cannot tell the file's length", e))?;
    let to = change.target(from, shrink)?;
    if !storage.facts().grows {
        let text = "this is a block device, whose size is not that of a file";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    if to != from {
        storage.set_len(to).map_err(|e| fail("cannot change the file's length", e))?;
        storage.sync().map_err(|e| fail("cannot make the new length durable", e))?;
    }
    storage.close().map_err(|e| fail("cannot close the file", e))?;
    Ok(Resized { from, to })
}

fn resize_qcow2(path: &Path, change: SizeChange, shrink: bool, options: &OpenOptions) -> Result<Resized> {
    let chain::Top { image, data_file, below } = chain::open_top(path, options)?;
    let from = Header::load(&image)?.virtual_size;
    let to = change.target(from, shrink)?;
    if to == from && !shrink {
        // A data file that is longer keeps what it has behind the disk.
        return Ok(Resized { from, to });
    }
    let foreign = options.backing != Backing::Follow;
    qcow2::resize(&ResizeParts { image, data_file, backing: below, foreign }, to)?;
    Ok(Resized { from, to })
}

/// Fails with `InvalidInput` if a disk of `from` bytes would lose something by having `to`, and `shrink` does not allow
/// it.
pub fn check_shrink(from: u64, to: u64, shrink: bool) -> Result<()> {
    if to < from && !shrink {
        let text = format!(
            "the disk of {from} bytes would become smaller and lose what lies behind {to}; --shrink allows it \
             (make file systems and partitions smaller first)"
        );
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(())
}
