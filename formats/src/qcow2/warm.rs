//! What will be read soon: the file's bytes brought into memory, compressed clusters decompressed; and
//! reading what is there already.
//!
//! It follows the layers as [`read_slow`](crate::BlockDriver::read_slow) does. All of it is under the caller's pin.

use super::clusters::BlobPlace;
use super::compressed;
use super::driver::Qcow2Driver;
use super::map::{Layer, LayerRun};
use super::types::Blob;
use crate::address::{GuestRange, HostOffset, HostRange};
use crate::driver::{BlockDriver, Effort};
use crate::error::Result;
use crate::mover::storage_error;
use crate::plan::MapMode;
use crate::storage::Storage;
use crate::sync::Arc;

/// The part of the cluster cache that is decompressed ahead of one reader: what some of them wait for is not
/// pushed out by the others. Our choice.
const WARM_SHARE: u64 = 8;

impl Qcow2Driver {
    /// See [`BlockDriver::warm_len_max`](crate::BlockDriver::warm_len_max).
    pub(super) fn warm_len(&self) -> u64 {
        let len = self.clusters().budget_len() as u64 / WARM_SHARE;
        let own = if len >= self.geometry().cluster_len() { len } else { 0 };
        self.backing().map_or(own, |backing| own.max(backing.warm_len_max()))
    }

    /// See [`BlockDriver::try_read_slow`](crate::BlockDriver::try_read_slow).
    pub(super) fn try_read_layers(&self, range: GuestRange, buf: &mut [u8]) -> Result<bool> {
        let mut rest = buf;
        self.each_run(range, MapMode::Try, |run| {
            let len = usize::try_from(run.len).unwrap_or(usize::MAX).min(rest.len());
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(len);
            rest = behind;
            match run.layer {
                Layer::Compressed(blob) => {
                    let cluster = self.clusters().get(BlobPlace::new(self.number(), blob));
                    cluster
                        .map_or(Ok(false), |cluster| self.copy_out(&cluster, run.offset, part).map(|()| true))
                }
                Layer::Unallocated => match self.backing() {
                    Some(backing) if run.offset + run.len <= backing.size() => {
                        backing.try_read_slow(run.offset, part)
                    }
                    Some(_) | None => Ok(false),
                },
                // Not what a plan called compressed: it was written since.
                Layer::Zero { .. } | Layer::Data(_) | Layer::Cold => Ok(false),
            }
        })
    }

    /// See [`BlockDriver::warm`](crate::BlockDriver::warm).
    pub(super) fn warm_layers(&self, range: GuestRange, effort: Effort) -> Result<bool> {
        let mode = match effort {
            Effort::Compute => MapMode::Try,
            Effort::Wait => MapMode::Wait,
        };
        self.each_run(range, mode, |run| match run.layer {
            Layer::Compressed(blob) => self.warm_cluster(blob, effort),
            Layer::Unallocated => match self.inside_backing(run) {
                Some((backing, range)) => backing.warm(range, effort),
                None => Ok(true),
            },
            Layer::Cold => Ok(false),
            Layer::Zero { .. } | Layer::Data(_) => Ok(true),
        })
    }

    /// See [`BlockDriver::cache`](crate::BlockDriver::cache). Asks for what lies in a place that is known;
    /// reading tables for a hint would take time.
    pub(super) fn prefetch_layers(&self, range: GuestRange) -> Result<()> {
        self.each_run(range, MapMode::Try, |run| {
            match run.layer {
                Layer::Data(at) => prefetch(self.data_storage(), at, run.len)?,
                Layer::Compressed(blob) => prefetch(self.image(), blob.at, blob.len_max)?,
                Layer::Unallocated => {
                    if let Some((backing, range)) = self.inside_backing(run) {
                        backing.cache(range)?;
                    }
                }
                Layer::Zero { .. } | Layer::Cold => {}
            }
            Ok(true)
        })
        .map(|_| ())
    }

    /// The part of a run that the backing file has, if there is any.
    fn inside_backing(&self, run: LayerRun) -> Option<(&Arc<dyn BlockDriver>, GuestRange)> {
        let backing = self.backing()?;
        let inside = backing.size().saturating_sub(run.offset).min(run.len);
        GuestRange::new(run.offset, inside).filter(|range| !range.is_empty()).map(|range| (backing, range))
    }

    fn warm_cluster(&self, blob: Blob, effort: Effort) -> Result<bool> {
        if effort == Effort::Wait {
            return self.decompressed(blob).map(|_| true);
        }
        let place = BlobPlace::new(self.number(), blob);
        // Who makes it may be waiting for the disk.
        if self.clusters().is_under_way(place) {
            return Ok(false);
        }
        let make = |cluster: &mut [u8]| {
            compressed::try_read_cluster(self.image(), blob, self.compression(), cluster)
        };
        let made = self.clusters().try_get_or_make(place, self.geometry().cluster_len(), make)?;
        Ok(made.is_some())
    }
}

fn prefetch(storage: &Arc<dyn Storage>, at: HostOffset, len: u64) -> Result<()> {
    match HostRange::new(at, len) {
        Some(range) => storage.prefetch(range).map_err(|e| storage_error(storage, "cannot prefetch", at, e)),
        None => Ok(()),
    }
}
