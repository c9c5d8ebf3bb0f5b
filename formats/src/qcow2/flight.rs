//! [`Flights`]: whoever needs the same thing at the same time gets it made once.
//!
//! The lock in here is never held while a thing is being made, so different things are made in parallel.
//! Who waits, waits for a call that is running already, never for one that is queued.

use std::collections::HashMap;
use std::hash::Hash;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Condvar, Mutex};

/// The things that are being made now, by key.
pub struct Flights<K, V> {
    under_way: Mutex<HashMap<K, Arc<Flight<V>>>>,
}

struct Flight<V> {
    outcome: Mutex<Option<Result<V>>>,
    landed: Condvar,
}

impl<K: Eq + Hash + Copy, V: Clone> Flights<K, V> {
    /// Nothing is being made.
    pub fn new() -> Self {
        Flights { under_way: Mutex::new(HashMap::new()) }
    }

    /// Whether somebody is making it now.
    pub fn has(&self, key: K) -> bool {
        self.under_way.lock().contains_key(&key)
    }

    /// Runs `make` for `key`, or waits for the call that is doing it and returns what that one returns.
    pub fn join(&self, key: K, make: impl FnOnce() -> Result<V>) -> Result<V> {
        let flight = {
            let mut under_way = self.under_way.lock();
            if let Some(flight) = under_way.get(&key) {
                let flight = Arc::clone(flight);
                drop(under_way);
                return flight.wait();
            }
            let flight = Arc::new(Flight { outcome: Mutex::new(None), landed: Condvar::new() });
            under_way.insert(key, Arc::clone(&flight));
            flight
        };
        let landing = Landing { flights: self, key, flight: &flight };
        let made = make();
        // Before the others have it: whoever finds that what they got is out of date already can have it
        // made anew, instead of getting it again.
        landing.depart();
        flight.land(copy_of(&made));
        drop(landing);
        made
    }
}

impl<V: Clone> Flight<V> {
    fn land(&self, outcome: Result<V>) {
        self.outcome.lock().get_or_insert(outcome);
        self.landed.notify_all();
    }

    fn wait(&self) -> Result<V> {
        let mut outcome = self.outcome.lock();
        loop {
            match &*outcome {
                Some(outcome) => return copy_of(outcome),
                None => self.landed.wait(&mut outcome),
            }
        }
    }
}

/// Ends a flight even if making the thing panics, so that nobody waits for ever.
struct Landing<'a, K: Eq + Hash + Copy, V: Clone> {
    flights: &'a Flights<K, V>,
    key: K,
    flight: &'a Arc<Flight<V>>,
}

impl<K: Eq + Hash + Copy, V: Clone> Landing<'_, K, V> {
    /// Nobody joins this flight any more.
    fn depart(&self) {
        let mut under_way = self.flights.under_way.lock();
        if under_way.get(&self.key).is_some_and(|flight| Arc::ptr_eq(flight, self.flight)) {
            under_way.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash + Copy, V: Clone> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        self.depart();
        self.flight.land(Err(Error::new(ErrorKind::Failed, "the thread that read this for all has failed")));
    }
}

/// Errors are not `Clone`; those who waited get one with the same kind, errno, text and place.
fn copy_of<V: Clone>(outcome: &Result<V>) -> Result<V> {
    match outcome {
        Ok(made) => Ok(made.clone()),
        Err(error) if error.kind() == ErrorKind::Io => {
            let errno = std::io::Error::from_raw_os_error(error.errno());
            Err(Error::io(error.to_string(), errno))
        }
        Err(error) => Err(Error::new(error.kind(), error.to_string())),
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    #[test]
    fn one_makes_it_and_all_get_it() {
        let flights = Arc::new(Flights::<u32, u32>::new());
        let made = Arc::new(AtomicU32::new(0));
        let (started, has_started) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let (f, m) = (Arc::clone(&flights), Arc::clone(&made));
            scope.spawn(move || {
                let got = f.join(7, || {
                    started.send(()).unwrap();
                    may_go.recv().unwrap();
                    Ok(m.fetch_add(1, Ordering::SeqCst) + 42)
                });
                assert_eq!(got.unwrap(), 42);
            });
            has_started.recv().unwrap();
            // Another key is not held up.
            assert_eq!(flights.join(8, || Ok(1)).unwrap(), 1);
            for _ in 0..4 {
                let (f, m) = (Arc::clone(&flights), Arc::clone(&made));
                scope.spawn(move || f.join(7, || Ok(m.fetch_add(1, Ordering::SeqCst) + 42)));
            }
            go.send(()).unwrap();
        });
        assert!(flights.under_way.lock().is_empty());
    }

    #[test]
    fn a_panic_ends_the_flight() {
        let flights = Flights::<u32, u32>::new();
        let run = std::panic::AssertUnwindSafe(|| flights.join(1, || panic!("as the test wants")));
        assert!(std::panic::catch_unwind(run).is_err());
        assert_eq!(flights.join(1, || Ok(5)).unwrap(), 5);
    }
}

#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::sync::atomic::{AtomicU32, Ordering};
    use crate::sync::thread;

    /// Run with `RUSTFLAGS="--cfg shuttle" cargo test -p nbd-img-formats --lib interleavings`.
    #[test]
    fn whoever_joins_gets_what_was_made_or_its_failure() {
        shuttle::check_pct(
            || {
                let flights = Arc::new(Flights::<u32, u32>::new());
                let calls = Arc::new(AtomicU32::new(0));
                let join = |key: u32| {
                    let (flights, calls) = (Arc::clone(&flights), Arc::clone(&calls));
                    thread::spawn(move || {
                        flights.join(key, || match calls.fetch_add(1, Ordering::SeqCst) {
                            0 => Err(Error::new(ErrorKind::Io, "the first call fails")),
                            _ => Ok(key),
                        })
                    })
                };
                let threads = [join(1), join(1), join(2), join(1)];
                let results = threads.map(|thread| thread.join().unwrap());
                let keys = [1, 1, 2, 1];
                assert!(
                    results.iter().zip(keys).all(|(result, key)| result.as_ref().map_or(true, |v| *v == key))
                );
                assert!(results.iter().any(Result::is_err));
                assert!(flights.under_way.lock().is_empty());
            },
            2000,
            3,
        );
    }
}
