//! A throwaway overlay: an image that is only read, and takes writes all the same, into a file without a name.

use std::path::Path;

use crate::driver::BlockDriver;
use crate::error::Result;
use crate::qcow2::{self, Caches, CreateOptions, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use crate::storage::{FileStorage, Storage};
use crate::sync::Arc;

/// Puts an overlay on `below` whose file lies in `folder`, has no name, and is gone with the driver or with the
/// process, however that ends. Nothing of it is ever made durable, and `below` is never written.
pub fn temporary(
    below: Arc<dyn BlockDriver>,
    folder: &Path,
    table_cache_len: u64,
    discard: bool,
) -> Result<Arc<dyn BlockDriver>> {
    let image: Arc<dyn Storage> = FileStorage::throwaway(folder)?;
    let virtual_size = below.size();
    qcow2::create(&image, None, &CreateOptions { virtual_size, ..CreateOptions::default() })?;
    // To the byte, where the disk below is.
    let header = Header { virtual_size, ..Header::load(&image)? };
    let caches = Caches::new(table_cache_len, [&header])?;
    Ok(Qcow2Driver::open(Parts {
        image,
        header,
        data_file: None,
        backing: Some(below),
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: Some(WriteOptions { discard, ..WriteOptions::default() }),
    })?)
}
