//! Rebuilding the refcounts of an image that was not closed by whoever put them off (the dirty bit), when
//! it is opened for writing.
//!
//! It is the repair of [`check`](super::super::check); only what the open image has in memory is brought up
//! to date here.

use super::super::check;
use super::super::driver::Qcow2Driver;
use super::super::header::{Header, TableLocation};
use super::super::snapshots::Snapshot;
use crate::address::HostOffset;
use crate::error::Result;
use crate::mover::{read_exact, storage_error};

/// Makes refcounts and copied flags right, then clears the dirty bit. Returns where the refcount table is.
pub fn rebuild(
    driver: &Qcow2Driver,
    header: &Header,
    snapshots: (&[Snapshot], u64),
) -> Result<TableLocation> {
    let image = driver.image();
    let table = check::rebuild(image, header, snapshots)?;
    let len =
        image.len().map_err(|e| storage_error(image, "cannot tell the file's length", HostOffset(0), e))?;
    driver.note_len(len);
    let mut bytes = vec![0; driver.l1().len() * 8];
    read_exact(image, header.l1.at, &mut bytes)?;
    for (index, word) in bytes.as_chunks().0.iter().enumerate() {
        driver.l1().set(index, u64::from_be_bytes(*word));
    }
    Ok(table)
}
