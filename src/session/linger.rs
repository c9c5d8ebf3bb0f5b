//! How long a session that has just sent replies leaves its socket alone.
//!
//! A client that keeps many requests under way works through the replies it has got and asks anew after
//! each. A session that looks at its socket all the time meets those requests one by one: a receive, a
//! send and a wake of the client for each (at depth 16 and 64 a batch held 1.1 requests). As long as the
//! client has replies left to read it misses nothing, so the session sleeps for some microseconds and then
//! finds several requests. What it never does is to let the client wait: it goes by whether everything
//! that was sent before has been read, which a client that waits has done.

use std::time::Duration;

/// The first sleep. Our choice: with what the kernel adds, a few requests of a fast client.
const FIRST: Duration = Duration::from_micros(2);

/// Added while the client still has something to read after a sleep.
const STEP: Duration = Duration::from_nanos(500);

/// The longest sleep. Measured: with half as much and half of the first a client is no faster and the server spends more of a
/// processor; with twice as much the client waits (a tenth slower at depth 16).
const LONGEST: Duration = Duration::from_micros(10);

/// Batches of which none is looked at after a client had nothing left to read: to ask costs a system
/// call, and a client of depth 1 always gives the same answer.
const REST: u32 = 8;

/// Replies longer than this on average are not worth it: copying them is what takes the time.
pub(super) const REPLY_LEN_MAX: usize = 16 << 10;

/// What one session has seen of how its client keeps up.
#[derive(Default)]
pub(super) struct Linger {
    time: Duration,
    rest: u32,
}

impl Linger {
    /// Whether it wants to know, before this batch, if the client has read all of those before.
    pub(super) fn asks(&mut self) -> bool {
        let asks = self.rest == 0;
        self.rest = self.rest.saturating_sub(1);
        asks
    }

    /// Whether the client has had more to read than it could when it was looked at last.
    pub(super) fn is_on(&self) -> bool {
        !self.time.is_zero()
    }

    /// How long to sleep behind this batch, when replies of earlier ones were still unread before it or
    /// not. Zero is not at all.
    pub(super) fn time_after(&mut self, unread: bool) -> Duration {
        if unread {
            self.time = (self.time + STEP).clamp(FIRST, LONGEST);
            return self.time;
        }
        // The client waits for this batch: the last sleep was too long.
        self.time /= 2;
        if self.time < FIRST {
            self.time = Duration::ZERO;
            self.rest = REST;
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it asked, and how long it sleeps behind the batch.
    fn batch(linger: &mut Linger, unread: bool) -> Option<Duration> {
        linger.asks().then(|| linger.time_after(unread))
    }

    #[test]
    fn sleeps_grow_while_the_client_is_behind_and_halve_when_it_waits() {
        let mut linger = Linger::default();
        let times: Vec<u128> = (0..40).map(|_| batch(&mut linger, true).unwrap().as_nanos()).collect();
        assert_eq!(times[..3], [2000, 2500, 3000]);
        assert_eq!(times[39], LONGEST.as_nanos());
        assert_eq!(batch(&mut linger, false), Some(Duration::ZERO));
        assert_eq!(batch(&mut linger, true), Some(LONGEST / 2 + STEP));
    }

    #[test]
    fn a_client_that_waits_for_each_reply_is_hardly_asked_and_never_waits() {
        let mut linger = Linger::default();
        let asked: Vec<Duration> = (0..90).filter_map(|_| batch(&mut linger, false)).collect();
        assert_eq!(asked, [Duration::ZERO; 10]);
    }
}
