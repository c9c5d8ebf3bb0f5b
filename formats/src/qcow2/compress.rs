//! From clusters to blobs: what [`compressed`](super::compressed) reads again.
//!
//! Memory only. Blobs are what every reader of the format can decompress: deflate streams keep to the
//! window of 4 KiB that QEMU gives its decompressor, zstd frames to their cluster.

use flate2::{Compress as Deflate, FlushCompress, Status};
use zstd::bulk::Compressor as Zstd;

use super::header::Compression;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, available_parallelism};

/// log2 of the window of a deflate stream (QEMU decompresses with `inflateInit2(-12)`).
const ZLIB_WINDOW_BITS: u8 = 12;
/// Levels when none is chosen: those that zlib and zstd take for themselves, as QEMU does.
const ZLIB_LEVEL_DEFAULT: u8 = 6;
const ZSTD_LEVEL_DEFAULT: u8 = 3;
/// A blob that is used is shorter than its cluster by this part of it. Our choice: each read of it costs a
/// decompression, which a few saved bytes are not worth.
const SAVED_PART: usize = 32;
/// A further thread is used for every so many bytes. Our choice: starting one takes some 50 us, compressing
/// this a millisecond.
const THREAD_SHARE_LEN: usize = 64 << 10;

/// How whole clusters are to be compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Compress {
    /// By which method; `None` is the image's. An image of the other one is not opened for writing.
    pub compression: Option<Compression>,
    /// How hard: 1 to 9 for zlib, 1 to 22 for zstd. Others count as the nearest one; `None` is 6 and 3.
    pub level: Option<u8>,
}

/// Compresses clusters, on as many threads as there are processors.
pub struct Compressing {
    compression: Compression,
    level: u8,
    cluster_len: usize,
    /// Threads that are compressing now.
    busy: AtomicUsize,
    processors: usize,
}

impl Compressing {
    /// For clusters of `cluster_len` bytes. A level that the method does not have is the nearest one.
    pub fn new(compression: Compression, level: Option<u8>, cluster_len: usize) -> Self {
        let level = match compression {
            Compression::Zlib => level.unwrap_or(ZLIB_LEVEL_DEFAULT).clamp(1, 9),
            Compression::Zstd => level.unwrap_or(ZSTD_LEVEL_DEFAULT).clamp(1, 22),
        };
        let processors = available_parallelism().map_or(1, usize::from);
        Compressing { compression, level, cluster_len, busy: AtomicUsize::new(0), processors }
    }

    /// A blob for each cluster in `bytes`, of which there are whole ones; `None` for those that are not worth it.
    /// The caller's thread works on it, and others as far as there are idle processors.
    pub fn blobs(&self, bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let clusters: Vec<&[u8]> = bytes.chunks_exact(self.cluster_len).collect();
        let blobs = Mutex::new(vec![None; clusters.len()]);
        let next = AtomicUsize::new(0);
        let work = || {
            let mut compressor = Compressor::new(self.compression, self.level);
            let mut room = vec![0; self.cluster_len - self.cluster_len / SAVED_PART];
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(cluster) = clusters.get(number) else { return };
                let len = compressor.compress(cluster, &mut room);
                if len.is_none() {
                    // zlib-rs 0.6.8 resets a stream that has not ended without its place in a buffer, whose end it
                    // runs into when that has come often enough.
                    compressor = Compressor::new(self.compression, self.level);
                }
                let blob = len.and_then(|len| room.get(..len)).map(<[u8]>::to_vec);
                if let Some(slot) = blobs.lock().get_mut(number) {
                    *slot = blob;
                }
            }
        };
        let threads = Threads::take(self, clusters.len().min(bytes.len() / THREAD_SHARE_LEN));
        match threads.count {
            0 | 1 => work(),
            count => std::thread::scope(|scope| {
                for _ in 1..count {
                    // Without another thread this one does it all.
                    let _ = std::thread::Builder::new().name("compress".to_owned()).spawn_scoped(scope, work);
                }
                work();
            }),
        }
        drop(threads);
        std::mem::take(&mut *blobs.lock())
    }
}

/// Threads that count as busy.
struct Threads<'a> {
    of: &'a Compressing,
    count: usize,
}

impl<'a> Threads<'a> {
    /// The caller's own thread and as many as there are idle processors, but no more than `most`.
    fn take(of: &'a Compressing, most: usize) -> Self {
        let mut count = 1;
        let busy = of.busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |busy| {
            count = of.processors.saturating_sub(busy).clamp(1, most.max(1));
            Some(busy + count)
        });
        Threads { of, count: busy.map_or(0, |_| count) }
    }
}

impl Drop for Threads<'_> {
    fn drop(&mut self) {
        self.of.busy.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// What one thread compresses with.
enum Compressor {
    Zlib(Deflate),
    Zstd(Zstd<'static>),
    /// There was no memory for one: nothing is compressed.
    None,
}

impl Compressor {
    fn new(compression: Compression, level: u8) -> Self {
        match compression {
            Compression::Zlib => {
                let level = flate2::Compression::new(u32::from(level));
                Compressor::Zlib(Deflate::new_with_window_bits(level, false, ZLIB_WINDOW_BITS))
            }
            Compression::Zstd => Zstd::new(i32::from(level)).map_or(Compressor::None, Compressor::Zstd),
        }
    }

    /// Compresses the cluster into `blob`; returns the length, or `None` where there is not enough room.
    fn compress(&mut self, cluster: &[u8], blob: &mut [u8]) -> Option<usize> {
        match self {
            Compressor::Zlib(stream) => {
                stream.reset();
                let done = stream.compress(cluster, blob, FlushCompress::Finish);
                let whole = done.is_ok_and(|status| status == Status::StreamEnd);
                whole.then(|| usize::try_from(stream.total_out()).ok()).flatten()
            }
            Compressor::Zstd(context) => context.compress_to_buffer(cluster, blob).ok(),
            Compressor::None => None,
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use flate2::{Decompress, FlushDecompress};

    const LEN: usize = 64 << 10;

    /// Text whose words come back after distances of up to 40 KiB, then what does not shrink.
    fn clusters(count: usize) -> Vec<u8> {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let mut bytes: Vec<u8> = Vec::with_capacity(count * LEN);
        while bytes.len() < count * LEN {
            let back = usize::try_from(random() % 40_000).unwrap_or(0);
            match bytes.len().checked_sub(back + 40).filter(|_| random() % 8 != 0) {
                Some(from) => bytes.extend_from_within(from..from + 40),
                None => bytes.extend_from_slice(&random().to_le_bytes()),
            }
        }
        bytes.truncate((count - 1) * LEN);
        bytes.extend((0..LEN).map(|_| u8::try_from(random() & 0xff).unwrap_or(0)));
        bytes
    }

    #[test]
    fn deflate_streams_keep_to_the_window_that_qemu_has() {
        let bytes = clusters(5);
        for level in 1..=9 {
            let blobs = Compressing::new(Compression::Zlib, Some(level), LEN).blobs(&bytes);
            assert_eq!(blobs.iter().filter(|blob| blob.is_none()).count(), 1, "random bytes shrink");
            for (cluster, blob) in bytes.chunks(LEN).zip(&blobs) {
                let Some(blob) = blob else { continue };
                let mut got = vec![0; LEN];
                let mut stream = Decompress::new_with_window_bits(false, ZLIB_WINDOW_BITS);
                // In small steps, so that no more than the window is there to copy from.
                while stream.total_out() < LEN as u64 {
                    let (from, to) = (stream.total_in() as usize, stream.total_out() as usize);
                    let end = (to + 500).min(LEN);
                    let step = stream.decompress(&blob[from..], &mut got[to..end], FlushDecompress::None);
                    step.unwrap_or_else(|e| panic!("level {level}: {e}"));
                    assert!(stream.total_out() as usize > to, "level {level}: the stream ends early");
                }
                assert!(got == cluster, "level {level}");
            }
        }
    }

    #[test]
    fn what_does_not_shrink_leaves_nothing_behind() {
        let mut bytes = Vec::new();
        for _ in 0..10 {
            bytes.extend_from_slice(&clusters(2));
            bytes.extend_from_within(bytes.len() - LEN..);
        }
        for compression in [Compression::Zlib, Compression::Zstd] {
            let mut compressing = Compressing::new(compression, None, LEN);
            compressing.processors = 1;
            for (number, blob) in compressing.blobs(&bytes).iter().enumerate() {
                assert_eq!(blob.is_some(), number % 3 == 0, "{number}");
                let (Some(blob), Compression::Zlib) = (blob, compression) else { continue };
                let mut got = vec![0; LEN];
                Decompress::new(false).decompress(blob, &mut got, FlushDecompress::Finish).unwrap();
                assert!(got == bytes[number * LEN..(number + 1) * LEN], "{number}");
            }
        }
    }

    #[test]
    fn zstd_frames_are_whole() {
        let bytes = clusters(4);
        for level in [1, 3, 22, 200] {
            let blobs = Compressing::new(Compression::Zstd, Some(level), LEN).blobs(&bytes);
            for (cluster, blob) in bytes.chunks(LEN).zip(&blobs).take(3) {
                assert!(zstd::bulk::decompress(blob.as_ref().unwrap(), LEN).unwrap() == cluster);
            }
            assert!(blobs[3].is_none());
        }
    }

    #[test]
    fn threads_are_taken_while_processors_are_idle() {
        let mut compressing = Compressing::new(Compression::Zlib, None, LEN);
        compressing.processors = 4;
        let first = Threads::take(&compressing, 3);
        assert_eq!(first.count, 3);
        let second = Threads::take(&compressing, 8);
        let third = Threads::take(&compressing, 8);
        assert_eq!((second.count, third.count), (1, 1));
        drop((first, second, third));
        assert_eq!(Threads::take(&compressing, 0).count, 1);
        assert_eq!(compressing.busy.load(Ordering::Relaxed), 0);
    }
}
