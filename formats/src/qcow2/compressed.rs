//! Compressed clusters: from a blob that may be hostile to exactly one cluster.
//!
//! Memory and time of a decompression are bounded by the cluster's length, whatever the blob says.

use std::cell::Cell;
use std::fmt;

use flate2::{Decompress, FlushDecompress};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::header::Compression;
use super::types::Blob;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::{Storage, TryRead};
use crate::sync::Arc;

/// Largest window of a zstd frame: 8 MiB, which the format's specification (RFC 8878, 3.1.1.1.2) tells
/// every decoder to support. QEMU's frames need 2 MiB.
const ZSTD_WINDOW_BITS_MAX: u32 = 23;
/// The longest blob whose buffer a thread keeps for the next one. Our choice: covers clusters of 256 KiB.
const BLOB_KEPT_LEN_MAX: usize = 512 << 10;

thread_local! {
    /// Taken while it is in use, so that whoever runs on this thread meanwhile makes one of his own.
    static TOOLS: Cell<Option<Box<Tools>>> = const { Cell::new(None) };
}

/// What a thread keeps from one decompression to the next.
#[derive(Default)]
struct Tools {
    blob: Vec<u8>,
    deflate: Option<libdeflater::Decompressor>,
    zstd: Option<DCtx<'static>>,
}

/// Reads the blob and decompresses it to all of `cluster`.
pub fn read_cluster(
    storage: &Arc<dyn Storage>,
    blob: Blob,
    compression: Compression,
    cluster: &mut [u8],
) -> Result<()> {
    with_tools(|tools| {
        let len = tools.room_for(blob);
        // The last blob of a file usually ends before its last sector does.
        let got = storage
            .pread(tools.blob.get_mut(..len).unwrap_or_default(), blob.at)
            .map_err(|e| storage_error(storage, "cannot read a compressed cluster", blob.at, e))?;
        tools.decompress(got, compression, cluster).map_err(|bad| bad.at(storage, blob, compression))
    })
}

/// As [`read_cluster`], if that takes no waiting for the storage. `false`: it would; `cluster` is as it was.
pub fn try_read_cluster(
    storage: &Arc<dyn Storage>,
    blob: Blob,
    compression: Compression,
    cluster: &mut [u8],
) -> Result<bool> {
    with_tools(|tools| {
        let len = tools.room_for(blob);
        let tried = storage
            .try_pread(tools.blob.get_mut(..len).unwrap_or_default(), blob.at)
            .map_err(|e| storage_error(storage, "cannot read a compressed cluster", blob.at, e))?;
        let TryRead::Done(got) = tried else { return Ok(false) };
        tools.decompress(got, compression, cluster).map_err(|bad| bad.at(storage, blob, compression))?;
        Ok(true)
    })
}

fn with_tools<T>(work: impl FnOnce(&mut Tools) -> T) -> T {
    let mut tools = TOOLS.take().unwrap_or_default();
    let outcome = work(&mut tools);
    if tools.blob.len() > BLOB_KEPT_LEN_MAX {
        tools.blob = Vec::new();
    }
    TOOLS.set(Some(tools));
    outcome
}

impl Tools {
    fn room_for(&mut self, blob: Blob) -> usize {
        let len = usize::try_from(blob.len_max).unwrap_or(0);
        if self.blob.len() < len {
            self.blob.resize(len, 0);
        }
        len
    }

    /// Decompresses the first `len` bytes of the blob's buffer.
    fn decompress(
        &mut self,
        len: usize,
        compression: Compression,
        cluster: &mut [u8],
    ) -> std::result::Result<(), BadBlob> {
        let input = self.blob.get(..len).unwrap_or_default();
        match compression {
            Compression::Zlib => {
                inflate(self.deflate.get_or_insert_with(libdeflater::Decompressor::new), input, cluster)
            }
            Compression::Zstd => decompress_zstd(zstd_context(&mut self.zstd)?, input, cluster),
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

impl BadBlob {
    fn at(self, storage: &Arc<dyn Storage>, blob: Blob, compression: Compression) -> Error {
        Error::new(ErrorKind::Corrupt, format!("a compressed cluster is no {compression}"))
            .with_path(&storage.facts().path)
            .with_offset(blob.at.0)
    }
}

/// A raw deflate stream. What follows behind the cluster's last byte does not matter: the blob's length
/// is known only in sectors.
///
/// libdeflate took 0.64 of the time of zlib-rs (`cargo bench --bench micro`), but takes whole streams only.
/// What it does not take is for zlib-rs to judge: a stream may go on, or break, behind the cluster.
fn inflate(
    fast: &mut libdeflater::Decompressor,
    input: &[u8],
    cluster: &mut [u8],
) -> std::result::Result<(), BadBlob> {
    match fast.deflate_decompress(input, cluster) {
        Ok(len) if len == cluster.len() => Ok(()),
        Ok(_) => Err(BadBlob),
        Err(_) => inflate_prefix(input, cluster),
    }
}

/// The first bytes of a raw deflate stream, whatever comes behind them.
fn inflate_prefix(input: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadBlob> {
    let mut stream = Decompress::new(false);
    stream.decompress(input, cluster, FlushDecompress::Finish).map_err(|_| BadBlob)?;
    if stream.total_out() == cluster.len() as u64 { Ok(()) } else { Err(BadBlob) }
}

/// The thread's context, as good as new.
fn zstd_context<'a>(
    kept: &'a mut Option<DCtx<'static>>,
) -> std::result::Result<&'a mut DCtx<'static>, BadBlob> {
    let context = match kept.take() {
        Some(mut context) => {
            context.reset(ResetDirective::SessionOnly).map_err(|_| BadBlob)?;
            context
        }
        None => {
            let mut context = DCtx::try_create().ok_or(BadBlob)?;
            context.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_BITS_MAX)).map_err(|_| BadBlob)?;
            context
        }
    };
    Ok(kept.insert(context))
}

/// One or more zstd frames, up to the cluster's last byte.
fn decompress_zstd(
    context: &mut DCtx<'_>,
    input: &[u8],
    cluster: &mut [u8],
) -> std::result::Result<(), BadBlob> {
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
    use flate2::{Compress, FlushCompress};

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut out = vec![0; data.len() + 1024];
        let mut stream = Compress::new(flate2::Compression::default(), false);
        stream.compress(data, &mut out, FlushCompress::Finish).unwrap();
        out.truncate(usize::try_from(stream.total_out()).unwrap());
        out
    }

    fn inflate(input: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadBlob> {
        let outcome = super::inflate(&mut libdeflater::Decompressor::new(), input, cluster);
        let kept = cluster.to_vec();
        assert_eq!(inflate_prefix(input, cluster), outcome, "the two decompressors differ");
        assert!(outcome.is_err() || kept == cluster, "the two decompressors differ");
        outcome
    }

    fn decompress_zstd(input: &[u8], cluster: &mut [u8]) -> std::result::Result<(), BadBlob> {
        // A context that has broken off before is as good as a new one.
        let mut kept = None;
        for _ in 0..2 {
            let _ = super::decompress_zstd(zstd_context(&mut kept)?, &[0x28, 0xb5, 0x2f], &mut [0; 512]);
        }
        super::decompress_zstd(zstd_context(&mut kept)?, input, cluster)
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
}
