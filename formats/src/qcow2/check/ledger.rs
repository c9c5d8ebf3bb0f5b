//! [`Ledger`]: the refcounts of an image that nobody has open, and how changes of them reach the file.
//!
//! Only counting and handing out clusters behind the end of everything; what is right is known by who uses it.

use super::{Subject, read_padded};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::qcow2::header::{Autoclear, Header, TableLocation};
use crate::qcow2::types::HostIndex;
use crate::qcow2::write::allocator::{Allocator, Need, Space};
use crate::qcow2::write::metadata_map::{Kind, MetadataMap};
use crate::qcow2::write::refcounts::{BlockIndex, Refcounts};
use crate::qcow2::write::{AUTOCLEAR_AT, INCOMPATIBLE_AT, commit};
use crate::storage::{Durability, Storage};
use crate::sync::Arc;

/// Bytes of blocks with changed refcounts in memory at which these are written. Our choice.
const CHANGED_LEN_MAX: u64 = 4 << 20;

/// Refcounts that are being changed.
pub struct Ledger<'a> {
    image: &'a Arc<dyn Storage>,
    /// Its map knows of the clusters only that it has handed out itself.
    pub allocator: Allocator,
}

impl<'a> Ledger<'a> {
    /// The refcounts of an image of which no cluster from `used_end` on is used or counted.
    pub fn new(subject: &Subject<'a>, used_end: u64) -> Self {
        let header = subject.header;
        let table = subject.table.clone();
        let refcounts =
            Refcounts::new(header.geometry, header.refcount_bits, table, header.refcount_table.at);
        let map = MetadataMap::new(header.geometry);
        let allocator = Allocator::new(header.geometry, refcounts, map, space(subject, used_end));
        Ledger { image: subject.image, allocator }
    }

    /// Frees the places of refcount tables that were moved away from.
    pub fn leave_tables(&mut self, table_was_counted: bool) -> Result<()> {
        let left = std::mem::take(&mut self.allocator.left);
        // The one in the file was counted as in use, unless it was to go from the beginning.
        let counted = left.into_iter().skip(usize::from(!table_was_counted));
        for index in counted.flat_map(|(first, len)| first.0..first.0 + len).map(HostIndex) {
            self.with_room(|allocator| {
                let is = allocator.refcounts.get(index)?;
                allocator.refcounts.set(index, is.saturating_sub(1))
            })?;
        }
        Ok(())
    }

    /// Does something that may need a longer file, or a block in memory.
    pub fn with_room(
        &mut self,
        mut act: impl FnMut(&mut Allocator) -> std::result::Result<(), Need>,
    ) -> Result<()> {
        loop {
            match act(&mut self.allocator) {
                Ok(()) => return Ok(()),
                Err(Need::Block(block)) => self.load(block)?,
                Err(Need::Room(clusters) | Need::Cluster(clusters)) if self.image.facts().grows => {
                    self.grow(clusters)?
                }
                Err(need) => return Err(self.unmet(need)),
            }
        }
    }

    /// Writes `bytes`, and zeroes up to the end of the last cluster, to new clusters in a row. They are counted in the
    /// file once all is [written out](Self::write_out).
    pub fn write_row(&mut self, bytes: &[u8], kind: Kind) -> Result<HostOffset> {
        let cluster_len = self.allocator.geometry().cluster_len();
        let clusters = (bytes.len() as u64).div_ceil(cluster_len).max(1);
        let mut place = HostOffset(0);
        self.with_room(|allocator| {
            place = allocator.allocate_row(clusters, kind)?.start();
            Ok(())
        })?;
        let mut padded = bytes.to_vec();
        padded.resize(usize::try_from(clusters * cluster_len).unwrap_or(bytes.len()), 0);
        write(self.image, place, &padded)?;
        Ok(place)
    }

    /// What lies here has lost a pointer: its clusters are used once less.
    pub fn leave(&mut self, at: HostOffset, len: u64) -> Result<()> {
        let (first, count) = self.allocator.geometry().host_span(at, len);
        for index in (first.0..first.0 + count).map(HostIndex) {
            self.with_room(|allocator| {
                let is = allocator.refcounts.get(index)?;
                allocator.refcounts.set(index, is.saturating_sub(1))
            })?;
        }
        Ok(())
    }

    fn load(&mut self, block: BlockIndex) -> Result<()> {
        let at = self.allocator.refcounts.block_at(block).map_err(|need| self.unmet(need))?;
        let Some(at) = at else { return Ok(()) };
        let mut bytes = vec![0; usize::try_from(self.allocator.geometry().cluster_len()).unwrap_or(0)];
        read_padded(self.image, at, &mut bytes)?;
        self.allocator.refcounts.insert(block, bytes);
        Ok(())
    }

    fn grow(&mut self, clusters: u64) -> Result<()> {
        let end = HostIndex(self.allocator.space.fresh().0 + clusters + 1);
        let len = self.allocator.geometry().host_at(end).start().0;
        let fail = |e| storage_error(self.image, "cannot make the file longer", HostOffset(len), e);
        if self.image.len().map_err(fail)? < len {
            self.image.set_len(len).map_err(fail)?;
        }
        self.allocator.space.extend_to(end);
        Ok(())
    }

    /// Writes refcounts if many blocks have changed ones, and lets blocks go that have none if there are many. For who goes
    /// through all blocks, between one and the next.
    pub fn relieve(&mut self) -> Result<()> {
        if self.allocator.refcounts.held_len() > CHANGED_LEN_MAX {
            return self.write_blocks();
        }
        self.allocator.refcounts.evict();
        Ok(())
    }

    /// Whether refcount block `number` counts nothing.
    pub fn is_empty(&mut self, number: BlockIndex) -> Result<bool> {
        let mut is_empty = false;
        self.with_room(|allocator| {
            is_empty = allocator.refcounts.is_empty(number)?;
            Ok(())
        })?;
        Ok(is_empty)
    }

    fn write_blocks(&mut self) -> Result<()> {
        let writes = self.allocator.refcounts.freeze_blocks();
        for block in &writes {
            write(self.image, block.at, &block.bytes)?;
        }
        self.allocator.refcounts.written(&writes);
        Ok(())
    }

    /// Writes all that is not in the file yet: first what is led to, then what leads there.
    pub fn write_out(&mut self) -> Result<TableLocation> {
        self.write_blocks()?;
        let at = self.allocator.refcounts.table_at();
        if self.allocator.moved.is_some() {
            write(self.image, at, &self.allocator.refcounts.table_bytes())?;
        }
        sync(self.image)?;
        for (index, raw) in self.allocator.refcounts.freeze_entries() {
            write(self.image, HostOffset(at.0 + index as u64 * 8), &raw.to_be_bytes())?;
        }
        if let Some(moved) = self.allocator.moved {
            commit::write_table_pointer(self.image, at, moved.clusters)?;
            self.allocator.moved = None;
        }
        sync(self.image)?;
        let entries = u32::try_from(self.allocator.refcounts.table_len())
            .map_err(|_| self.unmet(Need::Fault("the refcount table is too large")))?;
        Ok(TableLocation { at, entries })
    }

    /// The error for what cannot be had.
    pub fn unmet(&self, need: Need) -> Error {
        let error = match need {
            Need::Room(_) | Need::Cluster(_) | Need::NoSpace => {
                Error::new(ErrorKind::NoSpace, "there is no room for more of the image's metadata")
            }
            Need::Fault(what) => {
                Error::new(ErrorKind::Corrupt, format!("refcounts cannot be changed: {what}"))
            }
            Need::Block(_) => {
                Error::new(ErrorKind::Corrupt, "refcounts cannot be changed: a refcount block is missing")
            }
        };
        error.with_path(&self.image.facts().path)
    }
}

/// Where new clusters may come from: behind everything that is used, and in a file behind all that is there.
fn space(subject: &Subject<'_>, used_end: u64) -> Space {
    let cluster_len = subject.header.geometry.cluster_len();
    let used = used_end.div_ceil(cluster_len);
    if subject.image.facts().grows {
        let end = HostIndex(subject.file_clusters().max(used));
        return Space::new(end, end, false);
    }
    let end = subject.file_len / cluster_len;
    Space::new(HostIndex(used.min(end)), HostIndex(end), false)
}

/// Sets the incompatible features in the header, durably.
pub fn write_features(image: &Arc<dyn Storage>, bits: u64) -> Result<()> {
    write(image, INCOMPATIBLE_AT, &bits.to_be_bytes())?;
    sync(image)
}

/// Writes metadata.
pub fn write(image: &Arc<dyn Storage>, at: HostOffset, bytes: &[u8]) -> Result<()> {
    let written = image.pwrite(bytes, at, Durability::Later);
    written.map_err(|e| storage_error(image, "cannot write the image's metadata", at, e))
}

/// Makes what was written durable.
pub fn sync(image: &Arc<dyn Storage>) -> Result<()> {
    image.sync().map_err(|e| storage_error(image, "cannot make the image durable", HostOffset(0), e))
}

/// Takes back the promise of features that a writer has to know and that nobody here does.
pub fn clear_unknown(image: &Arc<dyn Storage>, header: &Header) -> Result<()> {
    let known = header.autoclear & (Autoclear::BITMAPS | Autoclear::DATA_FILE_RAW);
    if header.version < 3 || known == header.autoclear {
        return Ok(());
    }
    write(image, AUTOCLEAR_AT, &known.bits().to_be_bytes())?;
    sync(image)
}
