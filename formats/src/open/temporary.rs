//! A throwaway overlay: an image that is only read, and takes writes all the same, into a file without a name.

use std::path::Path;

use super::OpenOptions;
use crate::driver::BlockDriver;
use crate::error::Result;
use crate::qcow2::{self, Caches, CreateOptions, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use crate::storage::{FileStorage, Storage};
use crate::sync::Arc;

/// How an overlay is kept.
#[derive(Clone, Copy, Debug)]
pub struct Overlay {
    /// Most bytes of metadata tables held in memory.
    pub table_cache_len: u64,
    /// So many bytes of changed metadata are written out.
    pub dirty_len_max: u64,
    /// Whether a discard gives room back; else it does nothing.
    pub discard: bool,
}

impl Default for Overlay {
    fn default() -> Self {
        let WriteOptions { discard, dirty_len_max, .. } = WriteOptions::default();
        Overlay { table_cache_len: OpenOptions::default().table_cache_len, dirty_len_max, discard }
    }
}

/// Puts an overlay on `below` whose file lies in `folder`, has no name, and is gone with the driver or with the
/// process, however that ends. Nothing of it is ever made durable, and `below` is never written. Several may lie on
/// the same `below`; then none of them is to be closed, which would close that, too.
pub fn temporary(
    below: Arc<dyn BlockDriver>,
    folder: &Path,
    overlay: Overlay,
) -> Result<Arc<dyn BlockDriver>> {
    let image: Arc<dyn Storage> = FileStorage::throwaway(folder)?;
    let virtual_size = below.size();
    qcow2::create(&image, None, &CreateOptions { virtual_size, ..CreateOptions::default() })?;
    // To the byte, where the disk below is.
    let header = Header { virtual_size, ..Header::load(&image)? };
    let caches = Caches::new(overlay.table_cache_len, 0, [&header])?;
    Ok(Qcow2Driver::open(Parts {
        image,
        header,
        data_file: None,
        backing: Some(below),
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: Some(WriteOptions {
            discard: overlay.discard,
            dirty_len_max: overlay.dirty_len_max,
            ..WriteOptions::default()
        }),
    })?)
}
