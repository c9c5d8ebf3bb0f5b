//! [`RangeLocks`]: who may change which bytes of a file when some changes read before they write.
//!
//! Holders of shared locks put up with each other, holders of exclusive ones with nobody. Only threads
//! that may wait come here. Nobody may take a second lock while holding one.

use crate::sync::{Condvar, Mutex};

/// The locked ranges of one file.
#[derive(Default)]
pub(super) struct RangeLocks {
    held: Mutex<Vec<Held>>,
    gone: Condvar,
}

/// How a range is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hold {
    /// Whole blocks are written: others may do so as well.
    Shared,
    /// Blocks are read, changed and written back.
    Exclusive,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Held {
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
        let mut held = self.held.lock();
        while held.iter().any(|other| other.is_in_the_way_of(&wanted)) {
            self.gone.wait(&mut held);
        }
        held.push(wanted);
        RangeGuard { locks: self, held: wanted }
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
        let mut held = self.locks.held.lock();
        if let Some(index) = held.iter().position(|held| *held == self.held) {
            held.swap_remove(index);
        }
        drop(held);
        self.locks.gone.notify_all();
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Whether the lock can be had at once while the others are held.
    fn can_lock(locks: &RangeLocks, start: u64, end: u64, hold: Hold) -> bool {
        std::thread::scope(|scope| {
            let (tx, rx) = mpsc::channel();
            let others: Vec<Held> = locks.held.lock().clone();
            scope.spawn(move || {
                let guard = locks.lock(start, end, hold);
                tx.send(()).unwrap();
                drop(guard);
            });
            let at_once = rx.recv_timeout(Duration::from_millis(100)).is_ok();
            if !at_once {
                locks.held.lock().clear();
                locks.gone.notify_all();
                rx.recv().unwrap();
                *locks.held.lock() = others;
            }
            at_once
        })
    }

    #[test]
    fn only_exclusive_overlap_waits() {
        let locks = RangeLocks::default();
        let shared = locks.lock(0, 10, Hold::Shared);
        assert!(can_lock(&locks, 5, 15, Hold::Shared));
        assert!(can_lock(&locks, 10, 15, Hold::Exclusive));
        assert!(!can_lock(&locks, 9, 15, Hold::Exclusive));
        drop(shared);
        let exclusive = locks.lock(0, 10, Hold::Exclusive);
        assert!(!can_lock(&locks, 5, 15, Hold::Shared));
        assert!(can_lock(&locks, 10, 15, Hold::Shared));
        drop(exclusive);
        assert!(can_lock(&locks, 0, u64::MAX, Hold::Exclusive));
        assert!(locks.held.lock().is_empty());
    }
}
