//! Decompressors side by side on blobs that QEMU made, without anything of this program: on one core, and on all.
//!
//! `NBD_IMG_BENCH_IMAGE` names a compressed qcow2 image to take the blobs of; else the sample image's base.

use std::hint::black_box;
use std::path::PathBuf;

use divan::Bencher;
use divan::counter::BytesCount;
use flate2::{Decompress, FlushDecompress};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer, ResetDirective};

/// Clusters that one pass takes, from all over the image. Our choice: more than caches of processors hold.
const CLUSTERS: usize = 512;

/// The blobs of an image, each up to the end of its last sector, as an L2 entry gives it.
struct Blobs {
    blobs: Vec<Vec<u8>>,
    cluster_len: usize,
    zstd: bool,
}

impl Blobs {
    fn of_image() -> Blobs {
        let sample = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/base.qcow2");
        let path = std::env::var_os("NBD_IMG_BENCH_IMAGE").map_or_else(sample, PathBuf::from);
        let file = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let word = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
        let half = |at: usize| u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        let cluster_bits = half(20);
        let cluster_len = 1usize << cluster_bits;
        let sectors_at = 62 - (cluster_bits - 8);
        let (l1_len, l1_at) = (half(36) as usize, word(40) as usize);
        let tables = (0..l1_len).map(|index| (word(l1_at + 8 * index) & 0x00ff_ffff_ffff_fe00) as usize);
        let entries = tables
            .filter(|table| *table != 0)
            .flat_map(|table| (0..cluster_len / 8).map(move |index| table + 8 * index))
            .map(word)
            .filter(|entry| entry >> 62 & 1 == 1);
        let blob = |entry: u64| {
            let at = (entry & ((1 << sectors_at) - 1)) as usize;
            let sectors = (entry >> sectors_at & ((1 << (62 - sectors_at)) - 1)) as usize + 1;
            file[at..(at + sectors * 512 - at % 512).min(file.len())].to_vec()
        };
        let all: Vec<u64> = entries.collect();
        assert!(!all.is_empty(), "{} has no compressed clusters", path.display());
        let blobs = all.iter().step_by(all.len().div_ceil(CLUSTERS)).map(|entry| blob(*entry)).collect();
        Blobs { blobs, cluster_len, zstd: half(4) >= 3 && word(72) & 8 != 0 && file[104] == 1 }
    }

    /// All of them once, by decompressors of `new`, one for each thread.
    fn bench<D>(
        bencher: Bencher,
        zstd: bool,
        new: fn() -> D,
        decompress: fn(&mut D, &[u8], &mut [u8]) -> usize,
    ) {
        let blobs = Blobs::of_image();
        if blobs.zstd != zstd {
            return;
        }
        let bytes = blobs.blobs.len() * blobs.cluster_len;
        bencher
            .counter(BytesCount::new(bytes))
            .with_inputs(|| (new(), vec![0; blobs.cluster_len]))
            .bench_refs(|(decompressor, cluster)| {
                for blob in &blobs.blobs {
                    assert_eq!(decompress(decompressor, black_box(blob), cluster), cluster.len());
                }
            });
    }
}

#[divan::bench(threads = [1, 0], sample_count = 20)]
fn libdeflate(bencher: Bencher) {
    Blobs::bench(bencher, false, libdeflater::Decompressor::new, |decompressor, blob, cluster| {
        decompressor.deflate_decompress(blob, cluster).unwrap()
    });
}

#[divan::bench(threads = [1, 0], sample_count = 20)]
fn zlib_rs(bencher: Bencher) {
    Blobs::bench(
        bencher,
        false,
        || Decompress::new(false),
        |stream, blob, cluster| {
            stream.reset(false);
            stream.decompress(blob, cluster, FlushDecompress::Finish).unwrap();
            stream.total_out() as usize
        },
    );
}

#[divan::bench(threads = [1, 0], sample_count = 20)]
fn zstd(bencher: Bencher) {
    Blobs::bench(bencher, true, DCtx::create, |context, blob, cluster| {
        context.reset(ResetDirective::SessionOnly).unwrap();
        let (mut from, cluster_len) = (InBuffer::around(blob), cluster.len());
        let mut to = OutBuffer::around(cluster);
        while to.pos() < cluster_len {
            context.decompress_stream(&mut to, &mut from).unwrap();
        }
        to.pos()
    });
}
