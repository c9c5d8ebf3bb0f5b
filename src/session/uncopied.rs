//! Whether it pays, on this host and for this client, to send large reads uncopied.
//!
//! By sendfile the server spends a third of the processor's time, but the client is the first to touch the bytes. Where that
//! is what takes the time, a server that copies has fetched them into the cache before, and the client takes them over at
//! twice the rate; where it is not, uncopied is the faster by half (both measured, by tests/bench/README.md). Nothing tells
//! a session on which host it is, so it tries: while large reads stream it now and then serves some megabytes each way and
//! compares the time. Uncopied is what it begins with and goes back to when in doubt.
//!
//! It only counts and compares times that it is given; what can be sent uncopied at all is `sendfile`'s to say.

use std::time::{Duration, Instant};

/// Bytes whose time is taken for each way. Our choice: some milliseconds of a fast client, long beside the turns of a
/// scheduler, and little of what there is between two trials.
const WINDOW_LEN: u64 = 16 << 20;

/// Bytes that go before, which push what was sent the other way out of the socket (its buffer holds 4 MiB).
const SETTLE_LEN: u64 = 4 << 20;

/// Read before the first trial, so that a session that reads a file's head or two is left alone.
const BEFORE_FIRST_LEN: u64 = 64 << 20;

/// Read between two trials at first, and as long as they change anything.
const REST_LEN_MIN: u64 = 1 << 30;

/// Read between two trials of which each said the same as the one before. Each costs at most what 20 MiB take.
const REST_LEN_MAX: u64 = 16 << 30;

/// A longer time between two reads says that the client had something else to do, so that its windows compare nothing.
const PAUSE: Duration = Duration::from_millis(20);

/// How many windows, in turns, have to be for the other way before it is taken: pairs of them.
const PAIRS: u32 = 2;

/// What one session has found out.
pub(super) struct Uncopied {
    /// Whether reads are copied outside of trials, and in every first window of a pair.
    copying: bool,
    /// Bytes to go before the next trial, and how many there will be before the one after it.
    rest_len: u64,
    next_rest_len: u64,
    trial: Option<Trial>,
    last: Option<Instant>,
}

/// Windows in turns: as it was, the other way, as it was, the other way.
#[derive(Default)]
struct Trial {
    pairs: u32,
    /// The time of this pair's first window, when it is over.
    first: Option<Duration>,
    window: Window,
}

#[derive(Default)]
struct Window {
    len: u64,
    begin: Option<Instant>,
}

impl Uncopied {
    pub(super) fn new() -> Self {
        Uncopied {
            copying: false,
            rest_len: BEFORE_FIRST_LEN,
            next_rest_len: REST_LEN_MIN,
            trial: None,
            last: None,
        }
    }

    /// Whether the next large read, of `len` bytes, is to be sent uncopied, which it can be. `now` is when it is begun to
    /// be served.
    pub(super) fn pays(&mut self, len: u64, now: Instant) -> bool {
        let paused = self.last.is_some_and(|last| now.saturating_duration_since(last) > PAUSE);
        self.last = Some(now);
        if self.trial.is_none() {
            self.rest_len = self.rest_len.saturating_sub(len);
            if self.rest_len > 0 {
                return !self.copying;
            }
            self.trial = Some(Trial::default());
        }
        let Some(trial) = &mut self.trial else { return !self.copying };
        if paused {
            *trial = Trial::default();
        }
        if let Some(time) = trial.window.note(len, now) {
            match trial.first.take() {
                None => trial.first = Some(time),
                Some(first) => self.compare(first, time),
            }
        }
        // After a comparison that ended it there is none.
        let other = self.trial.as_ref().is_some_and(|trial| trial.first.is_some());
        self.copying == other
    }

    /// A pair of windows is over, the other way's second.
    fn compare(&mut self, first: Duration, second: Duration) {
        let (uncopied, copied) = if self.copying { (second, first) } else { (first, second) };
        // Copying costs the server's processor, which somebody else may want: it has to gain a quarter.
        let copying_pays = copied.saturating_mul(5) < uncopied.saturating_mul(4);
        let Some(trial) = &mut self.trial else { return };
        trial.pairs += 1;
        if copying_pays == self.copying {
            self.rest(self.next_rest_len.saturating_mul(2).min(REST_LEN_MAX));
        } else if trial.pairs == PAIRS {
            self.copying = copying_pays;
            tracing::debug!(
                ?uncopied,
                ?copied,
                len = WINDOW_LEN,
                copying_pays,
                "large reads go the other way"
            );
            self.rest(REST_LEN_MIN);
        }
    }

    fn rest(&mut self, next_len: u64) {
        self.trial = None;
        self.rest_len = self.next_rest_len.min(next_len);
        self.next_rest_len = next_len;
    }
}

impl Window {
    /// A read begins. Returns the time of the window that is over with it, and begins the next.
    fn note(&mut self, len: u64, now: Instant) -> Option<Duration> {
        let mut time = None;
        if self.len >= SETTLE_LEN + WINDOW_LEN {
            time = self.begin.map(|begin| now.saturating_duration_since(begin));
            *self = Window::default();
        }
        if self.begin.is_none() && self.len >= SETTLE_LEN {
            self.begin = Some(now);
        }
        self.len = self.len.saturating_add(len);
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 256 << 10;

    /// A client that reads on, on a host where a read takes so long each way.
    struct Client {
        uncopied: Uncopied,
        now: Instant,
        sent: [u64; 2],
    }

    impl Client {
        fn new() -> Self {
            Client { uncopied: Uncopied::new(), now: Instant::now(), sent: [0; 2] }
        }

        /// Reads `len` bytes; returns how many of them came uncopied.
        fn read(&mut self, len: u64, uncopied: Duration, copied: Duration) -> u64 {
            self.sent = [0; 2];
            for _ in 0..len / LEN {
                let pays = self.uncopied.pays(LEN, self.now);
                self.now += if pays { uncopied } else { copied };
                self.sent[usize::from(pays)] += LEN;
            }
            self.sent[1]
        }
    }

    const SLOW: Duration = Duration::from_micros(200);
    const QUICK: Duration = Duration::from_micros(100);
    const GIB: u64 = 1 << 30;

    #[test]
    fn where_copies_are_slower_few_are_made_and_fewer_later() {
        let mut client = Client::new();
        assert_eq!(client.read(BEFORE_FIRST_LEN, QUICK, SLOW), BEFORE_FIRST_LEN);
        let len = 4 * GIB;
        let copied = len - client.read(len, QUICK, SLOW);
        // The first trial, and those a GiB and two later, of a pair each.
        let trial = SETTLE_LEN + WINDOW_LEN;
        assert_eq!(copied, 3 * trial);
        let len = 64 * GIB;
        let copied = len - client.read(len, QUICK, SLOW);
        assert!(copied > 0 && copied <= 6 * trial, "{copied}");
    }

    #[test]
    fn where_copies_are_faster_they_are_made_after_two_pairs() {
        let mut client = Client::new();
        client.read(BEFORE_FIRST_LEN + 4 * (SETTLE_LEN + WINDOW_LEN), SLOW, QUICK);
        let uncopied = client.read(4 * GIB, SLOW, QUICK);
        assert!(uncopied <= 3 * (SETTLE_LEN + WINDOW_LEN), "{uncopied}");
    }

    #[test]
    fn what_is_no_longer_faster_is_given_up() {
        let mut client = Client::new();
        client.read(2 * GIB, SLOW, QUICK);
        client.read(20 * GIB, QUICK, SLOW);
        assert_eq!(client.read(256 << 20, QUICK, SLOW), 256 << 20);
    }

    #[test]
    fn a_small_gain_or_a_single_pair_changes_nothing() {
        let mut client = Client::new();
        let len = 4 * GIB;
        assert!(client.read(len, SLOW, SLOW * 9 / 10) > len * 9 / 10);
        let mut client = Client::new();
        client.read(BEFORE_FIRST_LEN, SLOW, SLOW);
        // The other way's first window is a lucky one.
        client.read(2 * (SETTLE_LEN + WINDOW_LEN), SLOW, QUICK);
        let len = GIB / 2;
        assert!(client.read(len, SLOW, SLOW) >= len - 2 * (SETTLE_LEN + WINDOW_LEN));
    }

    #[test]
    fn windows_with_a_pause_in_them_do_not_count() {
        let mut client = Client::new();
        for _ in 0..100 {
            // A client that stops before any pair is over.
            client.read(24 << 20, SLOW, QUICK);
            client.now += PAUSE * 2;
        }
        assert!(!client.uncopied.copying);
    }
}
