//! Whether buffered writes may be done on a session's own thread.
//!
//! The kernel cannot be asked whether a buffered write would wait (it throttles writers that dirty
//! memory faster than the disk cleans it), so each one is watched: after one that took too long the
//! export hands its writes to the workers for a while, longer after each failed probe.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A write in place that takes longer than this, and than its bytes take to be copied, held its thread's other sessions up
/// (prototype: p99 of an unthrottled small write is below, a throttled one sleeps for some 7 ms).
const SLOW_TIME: Duration = Duration::from_millis(1);

/// The same where the write may have waited for another one of the same file.
const SLOW_TIME_BEHIND_ANOTHER: Duration = Duration::from_millis(4);

/// What copying takes at most on a host of today, new pages of the file included, and the thread losing its processor for a
/// moment: a gigabyte a second. Our choice.
const COPY_TIME_OF_MIB: Duration = Duration::from_millis(1);

/// How long writes are handed off after the first slow one, in milliseconds (prototype).
const WINDOW_MS_MIN: u64 = 100;

/// The longest such time: a probe every 2 s costs nothing that shows (design section 4).
const WINDOW_MS_MAX: u64 = 2000;

/// The watch of one export. Shared by all its shards.
pub struct WriteWatch {
    started: Instant,
    /// Milliseconds after `started` until which writes are handed off.
    until_ms: AtomicU64,
    window_ms: AtomicU64,
}

impl Default for WriteWatch {
    fn default() -> Self {
        WriteWatch { started: Instant::now(), until_ms: AtomicU64::new(0), window_ms: AtomicU64::new(0) }
    }
}

impl WriteWatch {
    /// Whether a write may be done in place now.
    pub fn in_place(&self) -> bool {
        let until = self.until_ms.load(Ordering::Relaxed);
        until == 0 || self.now_ms(Instant::now()) >= until
    }

    /// Does a write of `len` bytes, and takes note of how long it took. Others of the same session may be under way by a
    /// worker, for which it `waits` then. (Of other sessions' nothing is known here.)
    pub fn observe<T>(&self, len: u64, waits: bool, write: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = write();
        let end = Instant::now();
        let took = end.saturating_duration_since(begin);
        if took > slow_time(len, waits) {
            self.note(end, true);
        } else if took <= slow_time(len, false) {
            self.note(end, false);
        }
        result
    }

    /// Takes note of a write that was waited for elsewhere, for far too long.
    pub fn note_slow(&self) {
        self.note(Instant::now(), true);
    }

    fn note(&self, now: Instant, slow: bool) {
        let until = self.until_ms.load(Ordering::Relaxed);
        if until != 0 && self.now_ms(now) < until {
            // It was handed to a worker before the slow one had ended, and tells nothing new.
            return;
        }
        if slow {
            let window = self.window_ms.load(Ordering::Relaxed);
            let window = if window == 0 { WINDOW_MS_MIN } else { (window * 2).min(WINDOW_MS_MAX) };
            self.window_ms.store(window, Ordering::Relaxed);
            self.until_ms.store(self.now_ms(now) + window, Ordering::Relaxed);
        } else if self.window_ms.load(Ordering::Relaxed) != 0 {
            self.window_ms.store(0, Ordering::Relaxed);
            self.until_ms.store(0, Ordering::Relaxed);
        }
    }

    fn now_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a write of `len` bytes may take.
fn slow_time(len: u64, waits: bool) -> Duration {
    let copy_ns = (u128::from(len) * COPY_TIME_OF_MIB.as_nanos()) >> 20;
    let copy = Duration::from_nanos(u64::try_from(copy_ns).unwrap_or(u64::MAX));
    copy.saturating_add(if waits { SLOW_TIME_BEHIND_ANOTHER } else { SLOW_TIME })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_while_probes_fail_and_end_with_a_clean_one() {
        let watch = WriteWatch::default();
        assert!(watch.in_place());
        let mut now = Instant::now();
        for expected in [100, 200, 400, 800, 1600, 2000, 2000] {
            watch.note(now, true);
            // Those that were under way beside it.
            watch.note(now, true);
            watch.note(now, false);
            assert_eq!(watch.window_ms.load(Ordering::Relaxed), expected);
            assert_eq!(watch.until_ms.load(Ordering::Relaxed), watch.now_ms(now) + expected);
            now += Duration::from_millis(expected);
        }
        watch.note(now, false);
        assert!(watch.in_place());
        watch.note_slow();
        assert_eq!(watch.window_ms.load(Ordering::Relaxed), 100);
        assert!(!watch.in_place());
    }
    #[test]
    fn a_write_may_take_what_its_bytes_do() {
        let us = |len, waits| slow_time(len, waits).as_micros();
        assert_eq!((us(4096, false), us(4 << 20, false)), (1003, 5000));
        assert_eq!((us(0, true), us(1 << 20, true)), (4000, 5000));
        let watch = WriteWatch::default();
        watch.observe(4096, false, || std::thread::sleep(Duration::from_millis(2)));
        assert!(!watch.in_place());
    }
}
