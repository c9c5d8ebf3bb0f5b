//! Whether it pays, on this host and for this client, to send large reads uncopied.
//!
//! By sendfile the server spends a third of the processor's time, but the client is the first to touch the bytes. Where that
//! is what takes the time, a server that copies has fetched them into the cache before, and the client takes them over at
//! twice the rate; where it is not, uncopied is the faster by half (both measured, see tests/bench/README.md). Nothing tells
//! a session on which host it is, so it tries: while large reads stream it now and then serves some megabytes each way and
//! compares the time. Uncopied is what it begins with and goes back to when in doubt.
//!
//! It only counts and compares times that it is given; what can be sent uncopied at all is `sendfile`'s to say.

use std::time::{Duration, Instant};

/// Bytes whose time is taken for each way. Our choice: some milliseconds of a fast client, and little of what there is
/// between two trials. What a scheduler adds to one window and not to the other is why two pairs have to agree.
const WINDOW_LEN: u64 = 16 << 20;

/// Bytes that go before, which push what was sent the other way out of the socket (the kernel doubles the 4 MiB that a Unix
/// socket is given).
const SETTLE_LEN: u64 = 8 << 20;

/// Read before the first trial, so that a session that reads a file's head or two is left alone.
const BEFORE_FIRST_LEN: u64 = 64 << 20;

/// Read between two trials at first, and as long as they change anything.
const REST_LEN_MIN: u64 = 1 << 30;

/// Read between two trials after many that changed nothing: each doubles it.
const REST_LEN_MAX: u64 = 16 << 30;

/// A longer time between two reads is not what serving them takes; a window with it in it is begun anew.
const PAUSE: Duration = Duration::from_millis(20);

/// Windows of a trial that may be begun anew before it is given up.
const ANEW_MAX: u32 = 4;

/// Pairs of windows, one each way, that have to be for the other way before it is taken.
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
    /// A trial has been made that let the buffer of replies grow, which is of no use any more.
    leaves_memory: bool,
}

/// Windows in turns: as it was, the other way, as it was, the other way.
#[derive(Default)]
struct Trial {
    pairs: u32,
    /// What this pair's first window found, when it is over.
    first: Option<Pace>,
    window: Window,
    anew: u32,
}

#[derive(Default)]
struct Window {
    len: u64,
    begin: Option<Instant>,
}

/// Nanoseconds for 1 MiB.
type Pace = u128;

impl Uncopied {
    pub(super) fn new() -> Self {
        Uncopied {
            copying: false,
            rest_len: BEFORE_FIRST_LEN,
            next_rest_len: REST_LEN_MIN,
            trial: None,
            last: None,
            leaves_memory: false,
        }
    }

    /// Whether the next read, with `len` bytes of data, is to be sent uncopied, which it can be. It is if it may not be
    /// copied. `now` is when it is begun to be served.
    pub(super) fn pays(&mut self, len: u64, may_copy: bool, now: Instant) -> bool {
        let last = self.last.replace(now);
        if !may_copy || last.is_some_and(|last| now.saturating_duration_since(last) > PAUSE) {
            self.disturb();
        }
        if !may_copy {
            return true;
        }
        if self.trial.is_none() {
            self.rest_len = self.rest_len.saturating_sub(len);
            if self.rest_len > 0 {
                return !self.copying;
            }
            self.trial = Some(Trial::default());
        }
        let Some(trial) = &mut self.trial else { return !self.copying };
        if let Some(pace) = trial.window.note(len, now) {
            match trial.first.take() {
                None => trial.first = Some(pace),
                Some(first) => self.compare(first, pace),
            }
        }
        // After a comparison that ended it there is none.
        let other = self.trial.as_ref().is_some_and(|trial| trial.first.is_some());
        self.copying == other
    }

    /// Something else than a read that could be sent was done: the window that it was in tells nothing.
    pub(super) fn disturb(&mut self) {
        let Some(trial) = &mut self.trial else { return };
        if trial.window.len > 0 {
            trial.window = Window::default();
            trial.anew += 1;
            if trial.anew > ANEW_MAX {
                self.change_nothing();
            }
        }
    }

    /// Whether memory is left from copying that is not done any more; says so once.
    pub(super) fn leaves_memory(&mut self) -> bool {
        std::mem::take(&mut self.leaves_memory)
    }

    /// A pair of windows is over, the other way's second.
    fn compare(&mut self, first: Pace, second: Pace) {
        let (uncopied, copied) = if self.copying { (second, first) } else { (first, second) };
        // Copying costs the server's processor, which somebody else may want: it has to gain a quarter.
        let copying_pays = copied.saturating_mul(5) < uncopied.saturating_mul(4);
        let Some(trial) = &mut self.trial else { return };
        trial.pairs += 1;
        if copying_pays == self.copying {
            self.change_nothing();
        } else if trial.pairs == PAIRS {
            tracing::debug!(
                copying_pays,
                uncopied,
                copied,
                "large reads go the other way (times are ns/MiB)"
            );
            self.copying = copying_pays;
            self.end_trial(REST_LEN_MIN);
            self.next_rest_len = REST_LEN_MIN;
        }
    }

    fn change_nothing(&mut self) {
        self.end_trial(self.next_rest_len);
        self.next_rest_len = (self.next_rest_len * 2).min(REST_LEN_MAX);
    }

    fn end_trial(&mut self, rest_len: u64) {
        self.trial = None;
        self.rest_len = rest_len;
        self.leaves_memory = !self.copying;
    }
}

impl Window {
    /// A read begins. Returns the pace of the window that is over with it, and begins the next.
    fn note(&mut self, len: u64, now: Instant) -> Option<Pace> {
        let mut pace = None;
        if self.len >= SETTLE_LEN + WINDOW_LEN {
            let measured = u128::from(self.len - SETTLE_LEN);
            pace = self.begin.map(|begin| {
                (now.saturating_duration_since(begin).as_nanos() << 20)
                    .checked_div(measured)
                    .unwrap_or(Pace::MAX)
            });
            *self = Window::default();
        }
        if self.begin.is_none() && self.len >= SETTLE_LEN {
            // Reads need not be of a length that divides what goes before.
            self.len = SETTLE_LEN;
            self.begin = Some(now);
        }
        self.len = self.len.saturating_add(len);
        pace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 256 << 10;
    const TRIAL_LEN: u64 = SETTLE_LEN + WINDOW_LEN;

    /// A client that reads on, on a host where 256 KiB take so long each way.
    struct Client {
        uncopied: Uncopied,
        now: Instant,
        lens: Vec<u64>,
    }

    impl Client {
        fn new() -> Self {
            Client { uncopied: Uncopied::new(), now: Instant::now(), lens: vec![LEN] }
        }

        /// Reads `len` bytes; returns how many of them were copied.
        fn read(&mut self, len: u64, uncopied: Duration, copied: Duration) -> u64 {
            let (mut left, mut copied_len) = (len, 0);
            for of in self.lens.clone().iter().cycle() {
                let of = left.min(*of);
                let pays = self.uncopied.pays(of, true, self.now);
                let time = if pays { uncopied } else { copied };
                self.now += time.mul_f64(of as f64 / LEN as f64);
                copied_len += if pays { 0 } else { of };
                left -= of;
                if left == 0 {
                    break;
                }
            }
            copied_len
        }
    }

    const SLOW: Duration = Duration::from_micros(200);
    const QUICK: Duration = Duration::from_micros(100);
    const GIB: u64 = 1 << 30;

    #[test]
    fn where_copies_are_slower_few_are_made_and_fewer_later() {
        let mut client = Client::new();
        assert_eq!(client.read(BEFORE_FIRST_LEN, QUICK, SLOW), 0);
        // The first trial, and those a GiB and two later, of a pair each.
        assert_eq!(client.read(4 * GIB, QUICK, SLOW), 3 * TRIAL_LEN);
        assert!(client.uncopied.leaves_memory() && !client.uncopied.leaves_memory());
        let copied = client.read(64 * GIB, QUICK, SLOW);
        assert!(copied > 0 && copied <= 6 * TRIAL_LEN, "{copied}");
    }

    #[test]
    fn where_copies_are_faster_they_are_made_after_two_pairs() {
        let mut client = Client::new();
        client.read(BEFORE_FIRST_LEN + 4 * TRIAL_LEN, SLOW, QUICK);
        let copied = client.read(4 * GIB, SLOW, QUICK);
        assert!(copied >= 4 * GIB - 3 * TRIAL_LEN, "{copied}");
        assert!(!client.uncopied.leaves_memory());
    }

    #[test]
    fn what_is_no_longer_faster_is_given_up() {
        let mut client = Client::new();
        client.read(2 * GIB, SLOW, QUICK);
        client.read(20 * GIB, QUICK, SLOW);
        assert_eq!(client.read(GIB / 4, QUICK, SLOW), 0);
    }

    #[test]
    fn a_small_gain_or_a_single_pair_changes_nothing() {
        let mut client = Client::new();
        assert!(client.read(4 * GIB, SLOW, SLOW * 9 / 10) <= GIB / 10);
        let mut client = Client::new();
        client.read(BEFORE_FIRST_LEN, SLOW, SLOW);
        // The other way's first window is a lucky one.
        client.read(2 * TRIAL_LEN, SLOW, QUICK);
        assert!(client.read(GIB / 2, SLOW, SLOW) <= 2 * TRIAL_LEN);
    }

    #[test]
    fn reads_of_any_lengths_are_compared_by_the_byte() {
        for seed in 1..200 {
            let mut client = Client::new();
            client.lens = (0..97).map(|at| (64 << 10) + (at * seed * 7919 % 1999) * 1024).collect();
            client.read(4 * GIB, SLOW, SLOW * 85 / 100);
            assert!(!client.uncopied.copying, "seed {seed}");
        }
    }

    #[test]
    fn windows_with_a_pause_in_them_are_begun_anew_and_trials_with_many_given_up() {
        // No window is ever over, or a first one only: the other way is hardly taken.
        for burst in [TRIAL_LEN - LEN, 2 * TRIAL_LEN - LEN] {
            let mut client = Client::new();
            let mut copied = 0;
            for _ in 0..400 {
                copied += client.read(burst, QUICK, SLOW);
                client.now += PAUSE * 2;
            }
            assert!(copied <= 400 * burst / 20, "{copied} with bursts of {burst}");
        }
        // What is over stays, so that a client that pauses now and then finds out all the same.
        let mut client = Client::new();
        for _ in 0..100 {
            client.read(3 * TRIAL_LEN / 2, SLOW, QUICK);
            client.now += PAUSE * 2;
        }
        assert!(client.uncopied.copying);
    }

    #[test]
    fn what_may_not_be_copied_is_not() {
        let mut client = Client::new();
        client.read(2 * GIB, SLOW, QUICK);
        assert!(!client.uncopied.pays(LEN, true, client.now));
        assert!(client.uncopied.pays(LEN, false, client.now));
        assert!(!client.uncopied.pays(LEN, true, client.now));
    }
}
