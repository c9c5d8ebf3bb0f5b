//! [`RangeLocks`]: who may change which bytes of a file when some changes read before they write.
//!
//! Holders of shared locks put up with each other, holders of exclusive ones with nobody. Nobody may wait
//! for a second lock while holding one; who must not wait at all tries.

use crate::sync::{Condvar, Mutex};

/// The locked ranges of one file.
#[derive(Default)]
pub(super) struct RangeLocks {
    state: Mutex<State>,
    gone: Condvar,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    /// Who waits, in the order in which they came. Nobody overtakes somebody in whose way he would be.
    waiting: Vec<(u64, Held)>,
    next_waiting: u64,
}

/// How a range is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hold {
    /// Whole blocks are written: others may do so as well.
    Shared,
    /// Blocks are read, changed and written back.
    Exclusive,
}

/// A range that is held until it is [released](RangeLocks::release).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    start: u64,
    end: u64,
    hold: Hold,
}

/// A range that is held until this goes.
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    held: Held,
}

impl RangeLocks {
    /// Waits until the bytes from `start` to `end` can be held like that.
    pub(super) fn lock(&self, start: u64, end: u64, hold: Hold) -> RangeGuard<'_> {
        let wanted = Held { start, end, hold };
        let mut state = self.state.lock();
        let turn = state.next_waiting;
        if !state.is_free(&wanted, turn) {
            state.next_waiting += 1;
            state.waiting.push((turn, wanted));
            while !state.is_free(&wanted, turn) {
                self.gone.wait(&mut state);
            }
            state.waiting.retain(|(other, _)| *other != turn);
        }
        state.held.push(wanted);
        RangeGuard { locks: self, held: wanted }
    }

    /// Holds the bytes from `start` to `end` if that can be done at once.
    pub(super) fn try_hold(&self, start: u64, end: u64, hold: Hold) -> Option<Held> {
        let wanted = Held { start, end, hold };
        let mut state = self.state.lock();
        if !state.is_free(&wanted, u64::MAX) {
            return None;
        }
        state.held.push(wanted);
        Some(wanted)
    }

    /// Lets a range go.
    pub(super) fn release(&self, range: Held) {
        let mut state = self.state.lock();
        if let Some(index) = state.held.iter().position(|held| *held == range) {
            state.held.swap_remove(index);
        }
        let somebody_waits = !state.waiting.is_empty();
        drop(state);
        if somebody_waits {
            self.gone.notify_all();
        }
    }
}

impl State {
    /// Whether nobody is in the way who holds, or waits since before `turn`.
    fn is_free(&self, wanted: &Held, turn: u64) -> bool {
        let before = self.waiting.iter().filter(|(other, _)| *other < turn).map(|(_, held)| held);
        !self.held.iter().chain(before).any(|other| other.is_in_the_way_of(wanted))
    }
}

impl Held {
    fn is_in_the_way_of(&self, other: &Held) -> bool {
        self.start < other.end
            && other.start < self.end
            && (self.hold == Hold::Exclusive || other.hold == Hold::Exclusive)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.locks.release(self.held);
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn can_hold(locks: &RangeLocks, start: u64, end: u64, hold: Hold) -> bool {
        locks.try_hold(start, end, hold).map(|held| locks.release(held)).is_some()
    }

    #[test]
    fn only_exclusive_overlap_waits() {
        let locks = RangeLocks::default();
        let shared = locks.lock(0, 10, Hold::Shared);
        assert!(can_hold(&locks, 5, 15, Hold::Shared));
        assert!(can_hold(&locks, 10, 15, Hold::Exclusive));
        assert!(!can_hold(&locks, 9, 15, Hold::Exclusive));
        drop(shared);
        let exclusive = locks.lock(0, 10, Hold::Exclusive);
        assert!(!can_hold(&locks, 5, 15, Hold::Shared));
        assert!(can_hold(&locks, 10, 15, Hold::Shared));
        drop(exclusive);
        assert!(can_hold(&locks, 0, u64::MAX, Hold::Exclusive));
        assert!(locks.state.lock().held.is_empty());
    }

    #[test]
    fn who_waits_is_not_overtaken() {
        let locks = RangeLocks::default();
        let first = locks.lock(0, 10, Hold::Shared);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(locks.lock(0, u64::MAX, Hold::Exclusive)));
            let begin = Instant::now();
            while locks.state.lock().waiting.is_empty() {
                assert!(begin.elapsed() < Duration::from_secs(30));
                std::thread::yield_now();
            }
            assert!(!can_hold(&locks, 5, 15, Hold::Shared), "a newcomer waits behind");
            let second = scope.spawn(|| drop(locks.lock(5, 15, Hold::Shared)));
            drop(first);
            waiting.join().unwrap();
            second.join().unwrap();
        });
        assert!(locks.state.lock().held.is_empty() && locks.state.lock().waiting.is_empty());
    }
}
