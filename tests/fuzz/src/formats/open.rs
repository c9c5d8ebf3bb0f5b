//! Opening an image that lies in memory, with whatever it names in memory, too.

use nbd_img_formats::qcow2::{Caches, DataFile, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, HostOffset, Result, Storage};

use crate::support::wrapped::{NeverClosed, Wrapped};

/// Longest file that is looked at as a whole. A damaged image may make it sparse and very long.
const LOOKED_AT_LEN_MAX: u64 = 8 << 20;

/// Bytes of a data file that nobody has asked for.
pub const STRAY_DATA_LEN: u64 = 4096;

/// How to open it.
pub struct How<'a> {
    /// Content of the backing file, if the image names one.
    pub backing: &'a [u8],
    /// The data file, if the image wants one; else it gets one of zeroes.
    pub data: Option<&'a Arc<MemoryStorage>>,
    /// Serve this snapshot.
    pub snapshot: Option<&'a str>,
    /// For writing.
    pub writable: bool,
    /// Room for tables; two slices always have some.
    pub table_cache_len: u64,
}

/// Opens the image in `image`. The storage outlives a close of the driver.
pub fn open(image: &Arc<MemoryStorage>, how: &How<'_>) -> Result<Arc<Qcow2Driver>> {
    let image: Arc<dyn Storage> = Wrapped::new(Arc::<MemoryStorage>::clone(image), NeverClosed);
    let header = Header::load(&image)?;
    let data_file: Option<Arc<dyn Storage>> = match header.geometry.data_file() {
        DataFile::Internal => None,
        DataFile::External | DataFile::ExternalRaw => {
            let data = how.data.map(Arc::clone);
            let data = data.unwrap_or_else(|| MemoryStorage::new(STRAY_DATA_LEN).unwrap());
            Some(Wrapped::new(data, NeverClosed))
        }
    };
    let backing: Option<Arc<dyn BlockDriver>> = match header.backing_name {
        None => None,
        Some(_) => {
            let storage = MemoryStorage::copy_of(how.backing).unwrap();
            Some(RawDriver::open(storage, RawOptions::default())?)
        }
    };
    let caches = Caches::new(how.table_cache_len, 1 << 20, [&header])?;
    Qcow2Driver::open(Parts {
        image,
        header,
        data_file,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot: how.snapshot.map(str::to_owned),
        write: how.writable.then(WriteOptions::default),
    })
}

/// All bytes of a storage, unless there are too many.
pub fn bytes_of(storage: &MemoryStorage) -> Option<Vec<u8>> {
    let len = storage.len().unwrap();
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| len <= LOOKED_AT_LEN_MAX)?];
    let got = storage.pread(&mut bytes, HostOffset(0)).unwrap();
    assert_eq!(got, bytes.len());
    Some(bytes)
}
