//! [`Pins`]: who may still read or write the clusters that were freed.
//!
//! Time is cut into epochs. A plan counts itself into the current one and out again when it is done. A
//! cluster that was taken out of all mappings in epoch E can be touched only by plans of E and before:
//! when those are gone, nobody knows it any more. Nobody ever waits for a pin. No lock, no memory.

use crate::sync::atomic::{AtomicU64, Ordering};

/// How many epochs can have pins at a time; a newer one begins only when the oldest has none. Our choice.
const SLOTS: usize = 64;

/// A number that grows whenever clusters are to be let go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Epoch(u64);

/// The pins of an image.
pub struct Pins {
    epoch: AtomicU64,
    counts: [AtomicU64; SLOTS],
}

impl Pins {
    /// Nobody has a pin.
    pub fn new() -> Self {
        Pins { epoch: AtomicU64::new(SLOTS as u64), counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// Takes a pin; what it returns belongs to [`unpin`](Self::unpin). Mappings are to be looked at after
    /// it.
    pub fn pin(&self) -> u64 {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            self.count(epoch).fetch_add(1, Ordering::SeqCst);
            // Whoever makes a newer epoch looks at the counts after it: it sees this one.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return epoch % SLOTS as u64;
            }
            self.count(epoch).fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Gives a pin back.
    pub fn unpin(&self, slot: u64) {
        self.count(slot).fetch_sub(1, Ordering::SeqCst);
    }

    /// The current epoch.
    pub fn now(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Begins a new epoch, if its slot is free. Only by one thread at a time.
    pub fn advance(&self) {
        let next = self.epoch.load(Ordering::SeqCst) + 1;
        if self.count(next).load(Ordering::SeqCst) == 0 {
            self.epoch.store(next, Ordering::SeqCst);
        }
    }

    /// The oldest epoch that may have pins; those before it have none and get none.
    pub fn oldest(&self) -> Epoch {
        let now = self.epoch.load(Ordering::SeqCst);
        let oldest = now + 1 - SLOTS as u64;
        Epoch((oldest..now).find(|epoch| self.count(*epoch).load(Ordering::SeqCst) != 0).unwrap_or(now))
    }

    fn count(&self, epoch: u64) -> &AtomicU64 {
        let slot = usize::try_from(epoch % SLOTS as u64).unwrap_or(0);
        // The index is smaller than the array.
        &self.counts[slot]
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_its_pins_are_gone() {
        let pins = Pins::new();
        let freed_in = pins.now();
        let old = pins.pin();
        pins.advance();
        let young = pins.pin();
        assert_eq!(pins.oldest(), freed_in);
        pins.unpin(old);
        assert!(pins.oldest() > freed_in);
        pins.unpin(young);
    }

    #[test]
    fn a_pin_that_stays_stops_the_epochs_but_nobody_waits() {
        let pins = Pins::new();
        let first = pins.now();
        let stuck = pins.pin();
        for _ in 0..1000 {
            pins.advance();
            let pin = pins.pin();
            pins.unpin(pin);
            assert_eq!(pins.oldest(), first);
        }
        pins.unpin(stuck);
        pins.advance();
        assert!(pins.oldest() > first);
    }
}
