//! One image file by itself, without what lies below it: for checking it and changing its structure.

use std::path::Path;

use super::probe::probe;
use super::probe_path;
use crate::driver::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{FileOptions, FileStorage, LockMode, Storage};
use crate::sync::Arc;

/// How a file is opened by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To be read while nobody writes.
    Read,
    /// To be read although somebody may write.
    ReadShared,
    /// To be changed while nobody else does.
    Write,
}

/// Opens and locks the image file at `path`, and nothing that it names. The format is found by its magic
/// unless it is stated.
pub fn open_alone(path: &Path, format: Option<Format>, access: Access) -> Result<(Arc<dyn Storage>, Format)> {
    let format = match format {
        Some(format) => format,
        None => probe_path(path)?,
    };
    let lock = match access {
        Access::Read => LockMode::Reader,
        Access::ReadShared => LockMode::ForceShare,
        Access::Write => LockMode::Writer,
    };
    let options = FileOptions { writable: access == Access::Write, direct: false, lock };
    let storage: Arc<dyn Storage> = FileStorage::open(path, &options)?;
    // It was probed before it was locked and may be another file by now.
    if format == Format::Qcow2 && probe(&storage)? != Format::Qcow2 {
        return Err(Error::new(ErrorKind::InvalidFormat, "this is not a qcow2 image").with_path(path));
    }
    Ok((storage, format))
}
