//! What a driver is made of: files, a header, and what the images of a chain share.

use super::clusters::ClusterCache;
use super::header::{Header, L1_LEN_MAX};
use super::tables::{ImageNumber, TableCache};
use super::write::options::WriteOptions;
use crate::driver::{BlockDriver, Facts, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::info::ImageInfo;
use crate::storage::Storage;
use crate::sync::Arc;

/// Least and most that is announced as the preferred unit. Our choice: less than a page is never
/// better; more than 64 KiB would make clients read much more than they want.
const BLOCK_PREFERRED_LEN: std::ops::RangeInclusive<u64> = 4096..=65536;
/// Most bytes of L1 tables, over a chain of images: four of the largest ones that QEMU opens. Our
/// choice: a hostile chain of small sparse files cannot take more.
const CHAIN_L1_LEN_MAX: u64 = 4 * L1_LEN_MAX;

/// What the images of a chain share, so that budgets hold for all of them together.
pub struct Caches {
    pub(super) tables: TableCache,
    pub(super) clusters: ClusterCache,
}

impl Caches {
    /// Empty caches for the images with these headers. L2 tables take at most `table_cache_len` bytes,
    /// but two parts of tables (of up to 64 KiB each) always have room; decompressed clusters at most
    /// `cluster_cache_len` bytes, but one is always made. Fails with `Unsupported` when the
    /// L1 tables of all of them, which are not cached but held, are too large together.
    pub fn new<'a>(
        table_cache_len: u64,
        cluster_cache_len: u64,
        images: impl IntoIterator<Item = &'a Header, IntoIter: Clone>,
    ) -> Result<Arc<Self>> {
        let images = images.into_iter();
        // Where cluster lengths differ, the smaller parts are counted as large ones: within the budget.
        let slice_len = images.clone().map(|header| header.geometry.slice_len()).max().unwrap_or(1);
        let l1_len: u64 = images.map(|header| 8 * header.geometry.l1_entries_for(header.virtual_size)).sum();
        if l1_len > CHAIN_L1_LEN_MAX {
            let what =
                format!("the L1 tables of the chain need {l1_len} bytes ({CHAIN_L1_LEN_MAX} are the most)");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(Arc::new(Caches {
            tables: TableCache::new(table_cache_len, slice_len),
            clusters: ClusterCache::new(cluster_cache_len),
        }))
    }

    /// How many clusters have been decompressed so far.
    pub fn decompressions(&self) -> usize {
        self.clusters.made()
    }

    /// How many parts of L2 tables have been read from files so far.
    pub fn table_loads(&self) -> usize {
        self.tables.loads()
    }
}

/// What a driver is made of.
pub struct Parts {
    /// The image file.
    pub image: Arc<dyn Storage>,
    /// Its header.
    pub header: Header,
    /// The external data file; there exactly if the header wants one.
    pub data_file: Option<Arc<dyn Storage>>,
    /// What lies below, if anything does.
    pub backing: Option<Arc<dyn BlockDriver>>,
    /// The place in the chain, 0 at the top; no two images that share `caches` have the same.
    pub number: ImageNumber,
    /// Shared by the images of a chain.
    pub caches: Arc<Caches>,
    /// Serve this internal snapshot (id or name) instead of the active state.
    pub snapshot: Option<String>,
    /// How to write; `None` opens read-only, and then nothing is ever written.
    pub write: Option<WriteOptions>,
}

/// What is fixed of a driver of such an image.
pub(super) fn facts(
    header: &Header,
    backing: Option<&Arc<dyn BlockDriver>>,
    write: Option<WriteOptions>,
) -> Facts {
    let compressing = write.is_some_and(|write| write.compress.is_some());
    // Less than a cluster is not compressed.
    let most = if compressing { u64::MAX } else { *BLOCK_PREFERRED_LEN.end() };
    let preferred = header.geometry.cluster_len().clamp(*BLOCK_PREFERRED_LEN.start(), most);
    Facts {
        format: Format::Qcow2,
        writable: write.is_some(),
        block_min_len: 1,
        // A request of a cluster touches one entry, and decompresses nothing twice.
        block_preferred_len: u32::try_from(preferred).unwrap_or(4096),
        // Version 2 has no zero flag, so a backing file would shine through.
        fast_zero: write.is_some()
            && (header.geometry.can_zero() || backing.is_none() && header.backing_name.is_none()),
        // A cluster of an image that is written can be freed while a client still has it in its socket.
        sendable: write.is_none(),
        holes_in_storage: backing.is_some_and(|backing| backing.facts().holes_in_storage),
    }
}

/// The image file, its data file, and behind them those of the backing driver.
pub(super) fn flat_storages(
    image: Arc<dyn Storage>,
    header: &Header,
    data_file: Option<Arc<dyn Storage>>,
    backing: Option<&Arc<dyn BlockDriver>>,
) -> Result<Vec<Arc<dyn Storage>>> {
    if data_file.is_some() != header.geometry.is_external() {
        return Err(Error::new(ErrorKind::InvalidInput, "an external data file is missing or not wanted"));
    }
    let mut storages = vec![image];
    storages.extend(data_file);
    storages.extend(backing.into_iter().flat_map(|backing| backing.storages().iter().cloned()));
    if storages.len() > usize::from(u16::MAX) {
        return Err(Error::new(ErrorKind::Unsupported, "the chain has too many files"));
    }
    Ok(storages)
}

/// What is told of the images below, the next one first.
pub(super) fn infos_below(backing: Option<&Arc<dyn BlockDriver>>) -> Result<Vec<ImageInfo>> {
    let Some(backing) = backing else { return Ok(Vec::new()) };
    let mut next = backing.info()?;
    let rest = std::mem::take(&mut next.chain);
    Ok([vec![next], rest].concat())
}
