//! Reading ahead of a client that reads a disk from front to back and does not find it in memory.
//!
//! The kernel reads ahead of single callers, in windows whose bytes all come late; with a window of ours,
//! asked for in many pieces, the disk always has some of them to do. Only places are reckoned with here:
//! bytes are never read, and what was asked for may as well not come. Nothing is asked for as long as
//! reads find their bytes in memory, so a warm disk costs nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nbd_img_formats::GuestRange;
use nbd_img_formats::storage::InPlace;
use nbd_img_formats::workers::Lane;

use super::engine::Session;

/// How far ahead of the client. 4, 8, 16 and 32 MiB did not differ (one virtual disk): twice the least. What
/// was asked for so came at 1.1 GB/s there; a thread that reads ahead through a description of its own got 2.
const WINDOW_LEN: u64 = 8 << 20;

/// How far ahead compressed clusters are decompressed: the time of a large read on a few cores. Our choice, so that
/// what other clients wait for comes soon, too.
const DECOMPRESSED_LEN: u64 = 4 << 20;

/// Least that is decompressed at a time, up to the disk's end. Our choice.
const DECOMPRESSED_STEP_LEN: u64 = 256 << 10;

/// What is decompressed ends at a multiple of this: a cluster is not for two threads. The longest usual cluster.
const DECOMPRESSED_UNIT_LEN: u64 = 64 << 10;

/// Least that is asked for at a time, up to the disk's end: a thread is woken for it.
const STEP_LEN: u64 = 1 << 20;

/// Bytes in sequence that make it a stream: two of the usual large reads. Our choice.
const STREAM_LEN_MIN: u64 = 512 << 10;

/// How far out of sequence a read may be: clients that keep many reads under way send them in any order.
/// Our choice: nbdcopy's and qemu-img's eight of 256 KiB.
const SLACK_LEN: u64 = 2 << 20;

/// How far a stream goes on being read ahead of after a read that had to wait: one that runs into the rest
/// of a file that is in memory soon stops asking. Our choice.
const TRUST_LEN: u64 = 64 << 20;

/// What one session has seen of its client's way over the disk, in the image's offsets.
#[derive(Default)]
pub(super) struct Ahead {
    /// The furthest end of the reads in sequence.
    next: u64,
    /// Their bytes.
    stream_len: u64,
    /// Where to stop unless another read has to wait.
    until: u64,
    /// How far has been asked for.
    asked: u64,
    /// A thread is still asking: the disk cannot keep up, or stands still.
    asking: Arc<AtomicBool>,
    /// How far has been decompressed, or is about to be.
    decompressed: u64,
    /// Bytes that are about to be.
    decompressing: Arc<AtomicU64>,
}

impl Ahead {
    /// The client reads `range`.
    pub(super) fn note(&mut self, range: GuestRange) {
        if range.offset().abs_diff(self.next) <= SLACK_LEN {
            self.stream_len = self.stream_len.saturating_add(range.len());
            self.next = self.next.max(range.end());
        } else {
            self.stream_len = range.len();
            self.next = range.end();
            self.until = 0;
            self.asked = 0;
            self.decompressed = 0;
        }
    }

    /// What to decompress now, on a disk of this size and with room for `room_len` bytes.
    pub(super) fn wanted_decompressed(&mut self, size: u64, room_len: u64) -> Option<GuestRange> {
        let window_len = DECOMPRESSED_LEN.min(room_len);
        if self.stream_len < STREAM_LEN_MIN || self.decompressing.load(Ordering::Acquire) >= window_len {
            return None;
        }
        let begin = self.decompressed.max(self.next);
        let mut end = self.next.saturating_add(window_len).min(size);
        if end < size {
            end -= end % DECOMPRESSED_UNIT_LEN;
        }
        let step_len = DECOMPRESSED_STEP_LEN.min(window_len / 2).max(1);
        let len = end.checked_sub(begin).filter(|len| *len >= step_len || (*len > 0 && end == size))?;
        self.decompressed = end;
        GuestRange::new(begin, len)
    }

    /// Until what this returns goes, so many bytes more are being decompressed.
    pub(super) fn decompressing(&self, len: u64) -> Decompressing {
        self.decompressing.fetch_add(len, Ordering::AcqRel);
        Decompressing { bytes: Arc::clone(&self.decompressing), len }
    }

    /// Whether the range lies in what has been asked for of the stream.
    pub(super) fn has_asked_for(&self, range: GuestRange) -> bool {
        range.end() <= self.asked && range.offset().abs_diff(self.next) <= WINDOW_LEN
    }

    /// The read that was noted last is not in memory.
    fn note_miss(&mut self) {
        self.until = self.next.saturating_add(TRUST_LEN);
    }

    /// What to ask for now, on a disk of this size.
    fn wanted(&mut self, size: u64) -> Option<GuestRange> {
        if self.next >= self.until || self.stream_len < STREAM_LEN_MIN || self.asking.load(Ordering::Acquire)
        {
            return None;
        }
        let begin = self.asked.max(self.next);
        let end = self.next.saturating_add(WINDOW_LEN).min(size);
        let len = end.checked_sub(begin).filter(|len| *len >= STEP_LEN || (*len > 0 && end == size))?;
        self.asked = end;
        GuestRange::new(begin, len)
    }
}

impl Session {
    /// After a read was noted: asks for what the client will want next, if it is worth it.
    pub(super) fn read_ahead(&mut self) {
        let driver = self.cell.export.driver();
        let Some(range) = self.ahead.wanted(driver.size()) else { return };
        let asking = Asking::begin(&self.ahead.asking);
        let driver = Arc::clone(driver);
        let job = Box::new(move || {
            // What is wrong shows when it is read.
            let _ = driver.cache(range);
            drop(asking);
        });
        drop(self.cell.export.workers().spawn(Lane::Read, job));
    }

    /// As [`read_ahead`](Self::read_ahead), when the read has to wait for its bytes to come into the page
    /// cache.
    pub(super) fn read_ahead_of_miss(&mut self) {
        if self.cell.export.in_place().reads == InPlace::Ask {
            self.ahead.note_miss();
            self.read_ahead();
        }
    }
}

/// A part of what is being decompressed ahead of a client.
pub(super) struct Decompressing {
    bytes: Arc<AtomicU64>,
    len: u64,
}

impl Drop for Decompressing {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.len, Ordering::AcqRel);
    }
}

/// Until it goes, nothing more is asked for.
struct Asking(Arc<AtomicBool>);

impl Asking {
    fn begin(asking: &Arc<AtomicBool>) -> Self {
        asking.store(true, Ordering::Release);
        Asking(Arc::clone(asking))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 256 << 10;
    const SIZE: u64 = 1 << 30;

    fn read(ahead: &mut Ahead, offset: u64, missed: bool) -> Option<(u64, u64)> {
        ahead.note(GuestRange::new(offset, LEN).unwrap());
        if missed {
            ahead.note_miss();
        }
        ahead.wanted(SIZE).map(|range| (range.offset(), range.end()))
    }

    #[test]
    fn a_cold_stream_is_asked_for_once_each_up_to_the_end_of_the_disk() {
        let mut ahead = Ahead::default();
        let begin = SIZE - (32 << 20);
        assert_eq!(read(&mut ahead, begin, true), None, "one read is no stream");
        let mut asked = begin + 2 * LEN;
        for index in 1..128 {
            let end = begin + (index + 1) * LEN;
            if let Some((from, to)) = read(&mut ahead, begin + index * LEN, true) {
                assert_eq!(from, asked, "a gap, or twice");
                assert!(to > end && to <= end + WINDOW_LEN);
                asked = to;
            }
            assert!(asked >= SIZE.min(end + WINDOW_LEN - STEP_LEN), "too late");
        }
        assert_eq!(asked, SIZE);
    }

    #[test]
    fn reads_in_any_order_within_the_slack_are_a_stream_and_jumps_end_it() {
        let mut ahead = Ahead::default();
        for index in [1, 0, 3, 2] {
            read(&mut ahead, index * LEN, true);
        }
        assert_eq!(ahead.asked, 2 * LEN + WINDOW_LEN);
        assert_eq!(read(&mut ahead, 500 << 20, true), None);
        assert_eq!(read(&mut ahead, 100 << 20, true), None);
        assert_eq!(
            read(&mut ahead, (100 << 20) + LEN, true).map(|(from, _)| from),
            Some((100 << 20) + 2 * LEN)
        );
    }

    #[test]
    fn what_is_in_memory_is_not_asked_for_but_for_a_while_behind_a_miss() {
        let mut ahead = Ahead::default();
        let count = |ahead: &mut Ahead, missed_at| {
            (0..4096).filter(|index| read(ahead, index * LEN, Some(*index) == missed_at).is_some()).count()
                as u64
        };
        assert_eq!(count(&mut ahead, None), 0);
        let asked = count(&mut ahead, Some(1));
        assert!(asked > 0 && asked <= TRUST_LEN / STEP_LEN + 1, "{asked} times");
    }

    #[test]
    fn a_stream_is_decompressed_once_each_within_its_room_and_as_far_as_threads_keep_up() {
        let mut ahead = Ahead::default();
        let mut wanted = |index: u64, room_len| {
            ahead.note(GuestRange::new(index * LEN, LEN).unwrap());
            let range = ahead.wanted_decompressed(SIZE, room_len)?;
            Some((range.offset(), range.end(), ahead.decompressing(range.len())))
        };
        assert!(wanted(0, 1 << 30).is_none(), "one read is no stream");
        assert!(wanted(1, 0).is_none(), "there is no room");
        let (from, end, busy) = wanted(2, 1 << 30).unwrap();
        assert_eq!((from, end), (3 * LEN, 3 * LEN + DECOMPRESSED_LEN));
        assert!(wanted(3, 1 << 30).is_none(), "threads are busy");
        drop(busy);
        let (from, to, busy) = wanted(4, 1 << 30).unwrap();
        assert_eq!((from, to), (end, 5 * LEN + DECOMPRESSED_LEN));
        drop(busy);
        for index in 5..20 {
            assert!(wanted(index, 0).is_none(), "there is no room");
        }
        let (from, to, _) = wanted(20, 1 << 20).unwrap();
        assert_eq!((from, to), (21 * LEN, 21 * LEN + (1 << 20)), "behind what was decompressed before");
        assert!(wanted(2000, 1 << 20).is_none(), "a jump is no stream");
    }

    #[test]
    fn nothing_more_is_asked_for_while_a_thread_still_asks() {
        let mut ahead = Ahead::default();
        let asking = Asking::begin(&ahead.asking);
        assert_eq!(read(&mut ahead, 0, true), None);
        assert_eq!(read(&mut ahead, LEN, true), None);
        drop(asking);
        assert!(read(&mut ahead, 2 * LEN, true).is_some());
    }
}
