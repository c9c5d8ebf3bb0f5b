//! Which of two ways to serve a client's large requests is the faster one: on this host, for this client, now.
//!
//! Nothing tells that beforehand, for it depends on what the memory and the threads of a host cost, and on what else its
//! processors have to do. So a session tries: while large requests come one behind the other it now and then serves some
//! megabytes each way and compares the time. It begins with the usual way and goes back to it when in doubt.
//!
//! It only counts and compares times that it is given, and knows nothing of either way.

use std::time::{Duration, Instant};

/// How a session finds out.
pub(super) struct Rule {
    /// What the log says of the other way when it is the better one.
    pub(super) name: &'static str,
    /// The other way costs something else than time: it has to gain one part in so many.
    pub(super) gain: u128,
    /// Bytes before the first trial, so that a session that moves little is left alone.
    pub(super) before_first_len: u64,
    /// Bytes whose time is taken for each way: some milliseconds, and little of what there is between two trials.
    pub(super) window_len: u64,
    /// Bytes that go before, in which what was begun the other way ends.
    pub(super) settle_len: u64,
    /// Pairs of windows, one each way, whose times are added up. Several, for a scheduler adds to one what it does not add to
    /// another.
    pub(super) pairs: u32,
    /// After so many of them it is over if either way is the faster by far.
    pub(super) clear_pairs: u32,
}

/// Moved between two trials at first, and as long as they change anything.
const REST_LEN_MIN: u64 = 1 << 30;

/// Moved between two trials after many that changed nothing: each doubles it.
const REST_LEN_MAX: u64 = 16 << 30;

/// A longer time between two requests is not what serving them takes; a window with it in it is begun anew.
const PAUSE: Duration = Duration::from_millis(20);

/// Windows of a trial that may be begun anew before it is given up. Our choice: after a write that took too long all are
/// handed off for a while, which on a busy machine happens a few times in a trial.
const ANEW_MAX: u32 = 16;

/// The way that a session is on needs no more pairs when it is the faster by one part in so many. Our choice.
const CLEAR_GAIN: u128 = 4;

/// What one session has found out about one pair of ways.
pub(super) struct Ways {
    rule: &'static Rule,
    /// Whether it is taken outside of trials, and in every first window of a pair.
    other: bool,
    /// Bytes to go before the next trial, and how many there will be before the one after it.
    rest_len: u64,
    next_rest_len: u64,
    trial: Option<Trial>,
    last: Option<Instant>,
    has_tried: bool,
}

/// Windows in turns: as it was, the other way, as it was, the other way.
#[derive(Default)]
struct Trial {
    pairs: u32,
    /// Of all pairs, each way.
    usual: Pace,
    other: Pace,
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

impl Ways {
    /// Begins with the usual way.
    pub(super) fn new(rule: &'static Rule) -> Self {
        Ways {
            rule,
            other: false,
            rest_len: rule.before_first_len,
            next_rest_len: REST_LEN_MIN,
            trial: None,
            last: None,
            has_tried: false,
        }
    }

    /// Whether the next request, which moves `len` bytes, is to go the other way, if it `may`. `now` is when it is begun to
    /// be served.
    pub(super) fn takes_other(&mut self, len: u64, may: bool, now: Instant) -> bool {
        let last = self.last.replace(now);
        if !may || last.is_some_and(|last| now.saturating_duration_since(last) > PAUSE) {
            self.disturb();
        }
        if !may {
            return false;
        }
        if self.trial.is_none() {
            self.rest_len = self.rest_len.saturating_sub(len);
            if self.rest_len == 0 {
                self.trial = Some(Trial::default());
            }
        }
        if let Some(trial) = &mut self.trial
            && let Some(pace) = trial.window.note(len, now, self.rule)
        {
            match trial.first.take() {
                None => trial.first = Some(pace),
                Some(first) => self.compare(first, pace),
            }
        }
        self.is_on_other()
    }

    /// Whether the last request that might went the other way, and so will the next one more often than not.
    pub(super) fn is_on_other(&self) -> bool {
        // A comparison that ends a trial leaves none.
        self.other != self.trial.as_ref().is_some_and(|trial| trial.first.is_some())
    }

    /// Something else was done than what goes either way: the window that it was in tells nothing.
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

    /// Whether the other way was tried and is not taken; says so once after each trial.
    pub(super) fn has_left_other(&mut self) -> bool {
        std::mem::take(&mut self.has_tried) && !self.other
    }

    /// A pair of windows is over, the other way's second.
    fn compare(&mut self, first: Pace, second: Pace) {
        let Some(trial) = &mut self.trial else { return };
        let (usual, other) = if self.other { (second, first) } else { (first, second) };
        trial.usual = trial.usual.saturating_add(usual);
        trial.other = trial.other.saturating_add(other);
        trial.pairs += 1;
        let (usual, other) = (trial.usual, trial.other);
        let is_last = trial.pairs >= self.rule.pairs;
        let pays = gains(usual, other, self.rule.gain);
        // Not to spend more on it than has to be.
        let is_clear = trial.pairs >= self.rule.clear_pairs
            && if self.other { gains(usual, other, CLEAR_GAIN) } else { gains(other, usual, CLEAR_GAIN) };
        if pays == self.other && (is_last || is_clear) {
            self.change_nothing();
        } else if is_last {
            tracing::debug!(pays, usual, other, "{} or not (times of the two ways)", self.rule.name);
            self.other = pays;
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
        self.has_tried = true;
    }
}

/// Whether the second gives one part in `gain` more in the same time.
fn gains(first: Pace, second: Pace, gain: u128) -> bool {
    second.saturating_mul(gain + 1) < first.saturating_mul(gain)
}

impl Window {
    /// A request begins. Returns the pace of the window that is over with it, and begins the next.
    fn note(&mut self, len: u64, now: Instant, rule: &Rule) -> Option<Pace> {
        let mut pace = None;
        if self.len >= rule.settle_len + rule.window_len {
            let measured = u128::from(self.len - rule.settle_len);
            pace = self.begin.map(|begin| {
                (now.saturating_duration_since(begin).as_nanos() << 20)
                    .checked_div(measured)
                    .unwrap_or(Pace::MAX)
            });
            *self = Window::default();
        }
        if self.begin.is_none() && self.len >= rule.settle_len {
            // Requests need not be of a length that divides what goes before.
            self.len = rule.settle_len;
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
    const RULE: Rule = Rule {
        name: "the other way is faster",
        gain: 4,
        before_first_len: 64 << 20,
        window_len: 16 << 20,
        settle_len: 8 << 20,
        pairs: 3,
        clear_pairs: 1,
    };
    const TRIAL_LEN: u64 = RULE.settle_len + RULE.window_len;

    /// A client that goes on, on a host where 256 KiB take so long each way.
    struct Client {
        ways: Ways,
        now: Instant,
        lens: Vec<u64>,
    }

    impl Client {
        fn new() -> Self {
            Client { ways: Ways::new(&RULE), now: Instant::now(), lens: vec![LEN] }
        }

        /// Moves `len` bytes; returns how many of them went the other way.
        fn go_on(&mut self, len: u64, usual: Duration, other: Duration) -> u64 {
            let (mut left, mut other_len) = (len, 0);
            for of in self.lens.clone().iter().cycle() {
                let of = left.min(*of);
                let takes = self.ways.takes_other(of, true, self.now);
                assert_eq!(self.ways.is_on_other(), takes);
                let time = if takes { other } else { usual };
                self.now += time.mul_f64(of as f64 / LEN as f64);
                other_len += if takes { of } else { 0 };
                left -= of;
                if left == 0 {
                    break;
                }
            }
            other_len
        }
    }

    const SLOW: Duration = Duration::from_micros(200);
    const QUICK: Duration = Duration::from_micros(100);
    const GIB: u64 = 1 << 30;

    #[test]
    fn where_the_other_way_is_slower_it_is_tried_and_more_rarely_later() {
        let mut client = Client::new();
        assert_eq!(client.go_on(RULE.before_first_len, QUICK, SLOW), 0);
        // The first trial, and those a GiB and two later, of a pair each.
        assert_eq!(client.go_on(4 * GIB, QUICK, SLOW), 3 * TRIAL_LEN);
        assert!(client.ways.has_left_other() && !client.ways.has_left_other());
        let other = client.go_on(64 * GIB, QUICK, SLOW);
        assert!(other > 0 && other <= 6 * TRIAL_LEN, "{other}");
    }

    #[test]
    fn where_it_is_faster_it_is_taken_after_all_pairs() {
        let mut client = Client::new();
        client.go_on(RULE.before_first_len + 6 * TRIAL_LEN, SLOW, QUICK);
        let other = client.go_on(4 * GIB, SLOW, QUICK);
        assert!(other >= 4 * GIB - 3 * TRIAL_LEN, "{other}");
        assert!(!client.ways.has_left_other());
    }

    #[test]
    fn what_is_no_longer_faster_is_given_up() {
        let mut client = Client::new();
        client.go_on(2 * GIB, SLOW, QUICK);
        client.go_on(20 * GIB, QUICK, SLOW);
        assert_eq!(client.go_on(GIB / 4, QUICK, SLOW), 0);
    }

    #[test]
    fn a_small_gain_or_a_single_pair_changes_nothing() {
        let mut client = Client::new();
        assert!(client.go_on(4 * GIB, SLOW, SLOW * 9 / 10) <= GIB / 3);
        let mut client = Client::new();
        client.go_on(RULE.before_first_len, SLOW, SLOW);
        // The other way's first window is a lucky one.
        client.go_on(2 * TRIAL_LEN, SLOW, QUICK);
        assert!(client.go_on(GIB / 2, SLOW, SLOW) <= 2 * TRIAL_LEN);
    }

    #[test]
    fn requests_of_any_lengths_are_compared_by_the_byte() {
        for seed in 1..200 {
            let mut client = Client::new();
            client.lens = (0..97).map(|at| (64 << 10) + (at * seed * 7919 % 1999) * 1024).collect();
            client.go_on(4 * GIB, SLOW, SLOW * 85 / 100);
            assert!(!client.ways.other, "seed {seed}");
        }
    }

    #[test]
    fn windows_with_a_pause_in_them_are_begun_anew_and_trials_with_many_given_up() {
        // No window is ever over, or a first one only: the other way is hardly taken.
        for burst in [TRIAL_LEN - LEN, 2 * TRIAL_LEN - LEN] {
            let mut client = Client::new();
            let mut other = 0;
            for _ in 0..400 {
                other += client.go_on(burst, QUICK, SLOW);
                client.now += PAUSE * 2;
            }
            assert!(other <= 400 * burst / 20, "{other} with bursts of {burst}");
        }
        // What is over stays, so that a client that pauses now and then finds out all the same.
        let mut client = Client::new();
        for _ in 0..100 {
            client.go_on(3 * TRIAL_LEN / 2, SLOW, QUICK);
            client.now += PAUSE * 2;
        }
        assert!(client.ways.other);
    }

    #[test]
    fn what_may_not_go_the_other_way_does_not() {
        let mut client = Client::new();
        client.go_on(2 * GIB, SLOW, QUICK);
        assert!(client.ways.takes_other(LEN, true, client.now));
        assert!(!client.ways.takes_other(LEN, false, client.now));
        assert!(client.ways.takes_other(LEN, true, client.now));
    }
}
