//! Compressed clusters: from a blob that may be hostile to exactly one cluster, and a cache of those.
//!
//! Memory and time of a decompression are bounded by the cluster's length, whatever the blob says.

use std::fmt;

use flate2::{Decompress, FlushDecompress};
use lru::LruCache;
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::flight::Flights;
use super::header::Compression;
use super::tables::ImageNumber;
use super::types::{Blob, GuestCluster};
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::{Arc, Mutex};

/// Most bytes of decompressed clusters in memory, over a chain of images. Our choice: small reads that
/// follow each other find their cluster, from several readers at a time, with the largest clusters too.
const CACHE_LEN_MAX: usize = 16 << 20;
/// Largest window of a zstd frame: 8 MiB, which the format's specification (RFC 8878, 3.1.1.1.2) tells
/// every decoder to support. QEMU's frames need 2 MiB.
const ZSTD_WINDOW_BITS_MAX: u32 = 23;

/// Which cluster of which image of a chain, and the blob that it is: it may have another one later.
pub type ClusterKey = (ImageNumber, GuestCluster, Blob);

/// Decompressed clusters of a chain of images.
pub struct ClusterCache {
    kept: Mutex<Kept>,
    under_way: Flights<ClusterKey, Arc<[u8]>>,
}

struct Kept {
    clusters: LruCache<ClusterKey, Arc<[u8]>>,
    len: usize,
}

impl ClusterCache {
    /// An empty cache.
    pub fn new() -> Self {
        let kept = Kept { clusters: LruCache::unbounded(), len: 0 };
        ClusterCache { kept: Mutex::new(kept), under_way: Flights::new() }
    }

    /// The cluster, made by `decompress` unless it is there. Concurrent callers for the same cluster
    /// wait for one decompression; those for different ones do not wait for each other.
    pub fn get_or_make(
        &self,
        key: ClusterKey,
        decompress: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<[u8]>> {
        if let Some(cluster) = self.kept.lock().clusters.get(&key) {
            return Ok(Arc::clone(cluster));
        }
        self.under_way.join(key, || {
            if let Some(cluster) = self.kept.lock().clusters.get(&key) {
                return Ok(Arc::clone(cluster));
            }
            let cluster: Arc<[u8]> = decompress()?.into();
            self.kept.lock().insert(key, Arc::clone(&cluster));
            Ok(cluster)
        })
    }

    /// Forgets the clusters whose blobs begin in this part of the image's file, which nobody reads any more.
    pub fn forget(&self, image: ImageNumber, range: HostRange) {
        let mut kept = self.kept.lock();
        let there = range.at()..HostOffset(range.at().0.saturating_add(range.len()));
        let gone = |(key, _): (&ClusterKey, _)| (key.0 == image && there.contains(&key.2.at)).then_some(*key);
        let gone: Vec<ClusterKey> = kept.clusters.iter().filter_map(gone).collect();
        for key in gone {
            let removed = kept.clusters.pop(&key);
            kept.len -= removed.map_or(0, |cluster| cluster.len());
        }
    }
}

impl Kept {
    fn insert(&mut self, key: ClusterKey, cluster: Arc<[u8]>) {
        self.len += cluster.len();
        if let Some((_, replaced)) = self.clusters.push(key, cluster) {
            self.len -= replaced.len();
        }
        while self.len > CACHE_LEN_MAX {
            let Some((_, evicted)) = self.clusters.pop_lru() else { return };
            self.len -= evicted.len();
        }
    }
}

/// Reads the blob and decompresses it to a cluster of `cluster_len` bytes.
pub fn read_cluster(
    storage: &Arc<dyn Storage>,
    blob: Blob,
    compression: Compression,
    cluster_len: usize,
) -> Result<Vec<u8>> {
    let fail = |error: Error| error.with_path(&storage.facts().path).with_offset(blob.at.0);
    let mut input = vec![0; usize::try_from(blob.len_max).unwrap_or(0)];
    // The last blob of a file usually ends before its last sector does.
    let got = storage
        .pread(&mut input, blob.at)
        .map_err(|e| storage_error(storage, "cannot read a compressed cluster", blob.at, e))?;
    input.truncate(got);
    let mut cluster = vec![0; cluster_len];
    let outcome = match compression {
        Compression::Zlib => inflate(&input, &mut cluster),
        Compression::Zstd => decompress_zstd(&input, &mut cluster),
    };
    match outcome {
        Ok(()) => Ok(cluster),
        Err(BadBlob) => {
            Err(fail(Error::new(ErrorKind::Corrupt, format!("a compressed cluster is no {compression}"))))
        }
    }
}

/// The blob does not decompress to a whole cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct BadBlob;

impl fmt::Display for BadBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the blob does not decompress to a whole cluster")
    }
}

/// A raw deflate stream. What follows behind the cluster's last byte does not matter: the blob's length
/// is known only in sectors.
fn inflate(input: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadBlob> {
    let mut stream = Decompress::new(false);
    stream.decompress(input, cluster, FlushDecompress::Finish).map_err(|_| BadBlob)?;
    if stream.total_out() == cluster.len() as u64 { Ok(()) } else { Err(BadBlob) }
}

/// One or more zstd frames, up to the cluster's last byte.
fn decompress_zstd(input: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadBlob> {
    let mut context = DCtx::try_create().ok_or(BadBlob)?;
    context.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_BITS_MAX)).map_err(|_| BadBlob)?;
    let mut from = InBuffer::around(input);
    let cluster_len = cluster.len();
    let mut to = OutBuffer::around(cluster);
    while to.pos() < cluster_len {
        let before = (from.pos(), to.pos());
        context.decompress_stream(&mut to, &mut from).map_err(|_| BadBlob)?;
        if (from.pos(), to.pos()) == before {
            return Err(BadBlob);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicU32, Ordering};
    use flate2::{Compress, FlushCompress};

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut out = vec![0; data.len() + 1024];
        let mut stream = Compress::new(flate2::Compression::default(), false);
        stream.compress(data, &mut out, FlushCompress::Finish).unwrap();
        out.truncate(usize::try_from(stream.total_out()).unwrap());
        out
    }

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i / 7 % 251).unwrap()).collect()
    }

    #[test]
    fn trailing_garbage_is_allowed_and_a_short_stream_is_not() {
        let data = sample(4096);
        let mut blob = deflated(&data);
        let whole = blob.len();
        blob.extend_from_slice(&[0xa5; 300]);
        let mut cluster = vec![0; 4096];
        inflate(&blob, &mut cluster).unwrap();
        assert_eq!(cluster, data);
        assert_eq!(inflate(&blob[..whole / 2], &mut cluster), Err(BadBlob));
        assert_eq!(inflate(&deflated(&data[..4000]), &mut cluster), Err(BadBlob));
        assert_eq!(inflate(&[], &mut cluster), Err(BadBlob));
    }

    #[test]
    fn a_bomb_yields_a_cluster_and_no_more() {
        let zeroes = vec![0; 64 << 20];
        let mut cluster = vec![1; 65536];
        inflate(&deflated(&zeroes), &mut cluster).unwrap();
        assert!(cluster.iter().all(|byte| *byte == 0));
        let bomb = zstd::bulk::compress(&zeroes, 1).unwrap();
        cluster.fill(1);
        decompress_zstd(&bomb, &mut cluster).unwrap();
        assert!(cluster.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn zstd_frames_may_follow_each_other() {
        let data = sample(8192);
        let mut blob = zstd::bulk::compress(&data[..5000], 3).unwrap();
        blob.extend(zstd::bulk::compress(&data[5000..], 3).unwrap());
        blob.extend_from_slice(b"garbage");
        let mut cluster = vec![0; 8192];
        decompress_zstd(&blob, &mut cluster).unwrap();
        assert_eq!(cluster, data);
        let mut larger = vec![0; 8193];
        assert_eq!(decompress_zstd(&blob, &mut larger), Err(BadBlob));
    }

    #[test]
    fn a_window_of_gigabytes_is_refused() {
        // Magic, a descriptor without single segment, a window descriptor for 2^41 bytes.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0, 0, 0, 0, 0, 0];
        assert_eq!(decompress_zstd(&frame, &mut [0; 512]), Err(BadBlob));
    }

    #[test]
    fn cache_is_bounded_in_bytes() {
        let cache = ClusterCache::new();
        let made = AtomicU32::new(0);
        let get = |number| {
            let make = || {
                made.fetch_add(1, Ordering::Relaxed);
                Ok(vec![7; 2 << 20])
            };
            cache
                .get_or_make(
                    (ImageNumber(0), GuestCluster(number), Blob::holding(HostOffset(number << 21), 512)),
                    make,
                )
                .unwrap();
        };
        (0..20).for_each(get);
        (12..20).for_each(get);
        assert_eq!(made.load(Ordering::Relaxed), 20);
        assert_eq!(cache.kept.lock().len, 16 << 20);
        get(0);
        assert_eq!(made.load(Ordering::Relaxed), 21);
    }
}
