//! Whether buffered writes may be done on a session's own thread.
//!
//! The kernel cannot be asked whether a buffered write would wait (it throttles writers that dirty
//! memory faster than the disk cleans it), so each one is watched: after one that took too long the
//! export hands its writes to the workers for a while, longer after each failed probe.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A write in place that takes longer than this held its thread's other sessions up (prototype: p99 of
/// an unthrottled write is below, a throttled one sleeps for some 7 ms).
const SLOW_TIME: Duration = Duration::from_millis(1);

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

    /// Does a write in place, and takes note of how long it took.
    pub fn observe<T>(&self, write: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = write();
        let end = Instant::now();
        self.note(end, end.saturating_duration_since(begin));
        result
    }

    /// Takes note of a write that was waited for elsewhere, for far too long.
    pub fn note_slow(&self) {
        self.note(Instant::now(), Duration::MAX);
    }

    fn note(&self, now: Instant, took: Duration) {
        if took > SLOW_TIME {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_while_probes_fail_and_end_with_a_clean_one() {
        let watch = WriteWatch::default();
        assert!(watch.in_place());
        let mut now = Instant::now();
        for expected in [100, 200, 400, 800, 1600, 2000, 2000] {
            watch.note(now, Duration::from_millis(2));
            assert_eq!(watch.window_ms.load(Ordering::Relaxed), expected);
            assert_eq!(watch.until_ms.load(Ordering::Relaxed), watch.now_ms(now) + expected);
            now += Duration::from_millis(expected);
        }
        watch.note(now, Duration::from_micros(5));
        assert!(watch.in_place());
        watch.note_slow();
        assert_eq!(watch.window_ms.load(Ordering::Relaxed), 100);
        assert!(!watch.in_place());
    }
}
