//! Target `qcow2_blob`: any bytes as a compressed cluster.
//!
//! The first two bytes choose compression, cluster length and how many sectors the entry claims; the rest is the
//! blob, at the end of the file. What the driver decompresses has to be what the tests' own reader
//! does. It refuses more, as QEMU does: windows that are too large, and streams that do not end with the cluster and go
//! wrong behind it, if it looks that far; the tests' reader may look farther. No writer makes either; bytes behind a
//! stream that has ended are never looked at.

use flate2::{Decompress, FlushDecompress};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, HostOffset, Storage};

use super::open::{How, open};
use crate::support::reader::{Disk, read_disk};

/// Where the blob begins within its cluster: not at a sector.
const INSIDE: u64 = 200;

/// Reads the cluster that the input is.
pub fn run(input: &[u8]) {
    let [how, sectors, blob @ ..] = input else { return };
    let cluster_bits = if how >> 4 == 15 { 21 } else { [9, 12, 12, 16][usize::from(how >> 1 & 3)] };
    let zstd = how & 1 != 0;
    let storage = image(cluster_bits, zstd, u64::from(*sectors), blob);
    let how = How { backing: &[], data: None, snapshot: None, writable: false, table_cache_len: 0 };
    let driver = open(&storage, &how).unwrap();
    let mut cluster = vec![0x5a; driver.size() as usize];
    let outcome = driver.pread(0, &mut cluster);
    let bytes: &dyn Storage = &*storage;
    let theirs = read_disk(&bytes, Disk::Active, &[]);
    if outcome.is_ok() {
        let theirs =
            theirs.or_else(|why| if zstd { Err(why) } else { Ok(inflated_bytewise(blob, cluster.len())) });
        assert!(theirs.unwrap() == cluster, "the cluster is not what the blob says");
    }
}

/// What a deflate stream says before it goes wrong, `most` bytes of it: the decoder gets the next byte only when it has
/// given all that it could tell.
fn inflated_bytewise(blob: &[u8], most: usize) -> Vec<u8> {
    let mut stream = Decompress::new(false);
    let mut out = Vec::with_capacity(most);
    for byte in blob.chunks(1) {
        if out.len() == most || stream.decompress_vec(byte, &mut out, FlushDecompress::None).is_err() {
            break;
        }
    }
    out.truncate(most);
    out
}

/// An image of one cluster, which is compressed.
fn image(cluster_bits: u32, zstd: bool, sectors: u64, blob: &[u8]) -> Arc<MemoryStorage> {
    let cluster_len = 1u64 << cluster_bits;
    let (l1, l2, data) = (2 * cluster_len, 3 * cluster_len, 4 * cluster_len + INSIDE);
    let most = (1u64 << (cluster_bits - 8)) - 1;
    let entry = 1 << 62 | sectors.min(most) << (62 - (cluster_bits - 8)) | data;
    let storage = MemoryStorage::new(data).unwrap();
    let put = |at: u64, with: &[u8]| storage.pwrite(with, HostOffset(at), Durability::Later).unwrap();
    put(0, &0x5146_49fb_u32.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &cluster_len.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &l1.to_be_bytes());
    put(48, &cluster_len.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(72, &(u64::from(zstd) * 8).to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(104, &[u8::from(zstd)]);
    put(l1, &l2.to_be_bytes());
    put(l2, &entry.to_be_bytes());
    put(data, blob);
    storage
}
