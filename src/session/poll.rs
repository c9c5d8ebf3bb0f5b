//! Whether a session looks at its socket a little longer before it sleeps.
//!
//! A client that sends one request at a time answers within some 30 us; waking a sleeping thread costs
//! as much again. Looking on for up to 50 us doubled the rate at depth 1 in the prototype, at no more
//! work per request, but it must not take a processor that somebody else wants. The rules (each of them
//! measured): only after small batches, only while it pays, only on a quiet shard, never on more than
//! half of the processors at once.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a poll lasts at most unless the operator says otherwise (the prototype gained nothing
/// beyond it).
pub const POLL_TIME_DEFAULT: Duration = Duration::from_micros(50);

/// Larger batches come from clients that keep several requests under way: those need no poll.
const BATCH_MAX: u32 = 2;

/// A gap between two requests up to which polling pays although polls have missed.
const GAP_MAX: Duration = Duration::from_micros(60);

/// Polls in a row that may miss.
const MISSES_MAX: u32 = 3;

/// After that, one of so many parks is a probe.
const PROBE_EVERY: u32 = 64;

/// A shard is quiet when no second session was active for this long.
const QUIET_TIME: Duration = Duration::from_millis(1);

/// Threads of the process that poll at this moment.
static POLLING: AtomicUsize = AtomicUsize::new(0);

/// What one session has seen of its client's pace.
pub struct Poller {
    time_max: Duration,
    misses: u32,
    parks: u32,
    gap: Duration,
}

impl Poller {
    /// Polls for at most `time_max` each; zero never polls.
    pub fn new(time_max: Duration) -> Self {
        // The first parks decide: nothing is known against polling yet.
        Poller { time_max, misses: 0, parks: 0, gap: Duration::MAX }
    }

    /// Leave to poll, after a batch of so many requests on a shard that is quiet or not.
    pub fn start(&mut self, batch: u32, quiet: bool) -> Option<Poll> {
        self.parks = self.parks.wrapping_add(1);
        let pays = self.misses < MISSES_MAX || self.gap < GAP_MAX || self.parks.is_multiple_of(PROBE_EVERY);
        if self.time_max.is_zero() || batch > BATCH_MAX || !quiet || !pays {
            return None;
        }
        Poll::start(self.time_max)
    }

    /// Whether it will ever poll.
    pub fn is_on(&self) -> bool {
        !self.time_max.is_zero()
    }

    /// The poll saw the next request, or did not.
    pub fn note_poll(&mut self, hit: bool) {
        self.misses = if hit { 0 } else { self.misses.saturating_add(1) };
    }

    /// The next request came this long after the last one was answered.
    pub fn note_gap(&mut self, gap: Duration) {
        self.gap = gap;
    }
}

/// Leave to poll; counts among the polling threads until it is dropped.
pub struct Poll {
    end: Instant,
}

impl Poll {
    fn start(time: Duration) -> Option<Self> {
        static POLLING_MAX: OnceLock<usize> = OnceLock::new();
        let polling_max = *POLLING_MAX
            .get_or_init(|| std::thread::available_parallelism().map_or(0, |cores| cores.get() / 2));
        let took = POLLING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |polling| {
            (polling < polling_max).then_some(polling + 1)
        });
        took.ok().map(|_| Poll { end: Instant::now() + time })
    }

    /// Whether its time is up.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.end
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        POLLING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// When a shard had more than one active session last.
pub struct Activity {
    last: Cell<Option<(u64, Instant)>>,
    crowded_at: Cell<Option<Instant>>,
}

impl Activity {
    /// Nobody was active yet.
    pub fn new() -> Self {
        Activity { last: Cell::new(None), crowded_at: Cell::new(None) }
    }

    /// The session called `id` works.
    pub fn note(&self, id: u64, now: Instant) {
        if let Some((other, at)) = self.last.get()
            && other != id
        {
            self.crowded_at.set(Some(at));
        }
        self.last.set(Some((id, now)));
    }

    /// Whether only one session worked for a while.
    pub fn is_quiet(&self, now: Instant) -> bool {
        self.crowded_at.get().is_none_or(|at| now.saturating_duration_since(at) > QUIET_TIME)
    }
}

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(1);

    #[test]
    fn misses_stop_it_and_a_probe_or_a_short_gap_brings_it_back() {
        let mut poller = Poller::new(POLL_TIME_DEFAULT);
        poller.note_gap(LONG);
        for _ in 0..MISSES_MAX {
            assert!(poller.start(1, true).is_some());
            poller.note_poll(false);
        }
        let tries = (0..PROBE_EVERY).filter(|_| poller.start(1, true).is_some()).count();
        assert_eq!(tries, 1, "one probe in {PROBE_EVERY} parks");
        poller.note_gap(Duration::from_micros(20));
        assert!(poller.start(1, true).is_some());
        poller.note_gap(LONG);
        poller.note_poll(true);
        assert!(poller.start(1, true).is_some());
    }

    #[test]
    fn large_batches_crowds_and_the_operator_forbid_it() {
        let mut poller = Poller::new(POLL_TIME_DEFAULT);
        assert!(poller.start(BATCH_MAX + 1, true).is_none());
        assert!(poller.start(1, false).is_none());
        assert!(Poller::new(Duration::ZERO).start(1, true).is_none());
    }

    #[test]
    fn a_shard_is_quiet_again_some_time_after_a_second_session_worked() {
        let activity = Activity::new();
        let start = Instant::now();
        activity.note(1, start);
        assert!(activity.is_quiet(start));
        activity.note(2, start + Duration::from_micros(10));
        assert!(!activity.is_quiet(start + Duration::from_micros(20)));
        activity.note(2, start + 3 * QUIET_TIME);
        assert!(activity.is_quiet(start + 3 * QUIET_TIME));
    }
}
