//! Reading what a run of one layer is: the bytes behind a [`LayerRun`].

use super::clusters::{BlobPlace, Cluster};
use super::compressed;
use super::driver::Qcow2Driver;
use super::map::{self, Layer, LayerRun, LayerRuns};
use super::types::Blob;
use crate::address::{GuestRange, HostOffset};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::read_exact;
use crate::plan::MapMode;

impl Qcow2Driver {
    /// See [`BlockDriver::read_slow`](crate::BlockDriver::read_slow).
    pub(super) fn read_layers(&self, range: GuestRange, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        self.each_run(range, MapMode::Wait, |run| {
            let len = usize::try_from(run.len).unwrap_or(usize::MAX).min(rest.len());
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(len);
            rest = behind;
            self.read_run(run, part).map(|()| true)
        })
        .map(|_| ())
    }

    /// Calls `visit` for the runs of this layer until it says `false`; returns whether it never did.
    pub(super) fn each_run(
        &self,
        mut range: GuestRange,
        mode: MapMode,
        mut visit: impl FnMut(LayerRun) -> Result<bool>,
    ) -> Result<bool> {
        let mut runs = LayerRuns::new();
        while !range.is_empty() {
            let covered = map::slice_runs(self, range, mode, &mut runs)?;
            range = range.skip(covered);
            for run in runs.drain(..) {
                if !visit(run)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    pub(super) fn read_run(&self, run: LayerRun, buf: &mut [u8]) -> Result<()> {
        match run.layer {
            Layer::Unallocated => self.read_backing(run.offset, buf),
            Layer::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Layer::Data(at) => self.read_data(at, buf),
            Layer::Compressed(blob) => self.read_compressed(blob, run.offset, buf),
            Layer::Cold => Err(Error::new(ErrorKind::Io, "an L2 table has vanished from memory")),
        }
    }

    fn read_backing(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Some(backing) = self.backing() else {
            buf.fill(0);
            return Ok(());
        };
        let inside = backing.size().saturating_sub(offset).min(buf.len() as u64);
        let (there, behind) = buf.split_at_mut(usize::try_from(inside).unwrap_or(0));
        behind.fill(0);
        if there.is_empty() { Ok(()) } else { backing.pread(offset, there) }
    }

    fn read_data(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let present = self.data_present(at, buf.len() as u64, MapMode::Wait)?.unwrap_or(0);
        let (there, behind) = buf.split_at_mut(usize::try_from(present).unwrap_or(0));
        behind.fill(0);
        read_exact(self.data_storage(), at, there)
    }

    fn read_compressed(&self, blob: Blob, offset: u64, buf: &mut [u8]) -> Result<()> {
        let cluster = self.decompressed(blob)?;
        self.copy_out(&cluster, offset, buf)
    }

    /// The cluster of a blob whose entry was read under a pin that the caller still has.
    pub(super) fn decompressed(&self, blob: Blob) -> Result<Cluster> {
        let make =
            |cluster: &mut [u8]| compressed::read_cluster(self.image(), blob, self.compression(), cluster);
        self.clusters().get_or_make(BlobPlace::new(self.number(), blob), self.geometry().cluster_len(), make)
    }

    /// The guest's bytes at `offset` out of their cluster.
    pub(super) fn copy_out(&self, cluster: &[u8], offset: u64, buf: &mut [u8]) -> Result<()> {
        let from = usize::try_from(self.geometry().offset_in_cluster(offset)).unwrap_or(usize::MAX);
        let wanted = cluster.get(from..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(wanted.ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "a decompressed cluster is too short").with_offset(offset)
        })?);
        Ok(())
    }
}
