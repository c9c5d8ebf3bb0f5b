//! What a driver is made of: files, a header, and what the images of a chain share.

use super::compressed::ClusterCache;
use super::header::{Header, L1_LEN_MAX};
use super::tables::{ImageNumber, TableCache};
use super::write::options::WriteOptions;
use crate::driver::BlockDriver;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sync::Arc;

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
    /// but two parts of tables (of up to 64 KiB each) always have room. Fails with `Unsupported` when the
    /// L1 tables of all of them, which are not cached but held, are too large together.
    pub fn new<'a>(
        table_cache_len: u64,
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
            clusters: ClusterCache::new(),
        }))
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
