//! Every lock, atomic and thread of this crate comes from here.
//!
//! In a normal build these are parking_lot's locks and std's atomics; under `--cfg shuttle` they are
//! shuttle's, so that its scheduler owns every interleaving. Nothing else may name `std::sync`'s locks.

pub use std::thread::available_parallelism;

#[cfg(not(shuttle))]
pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
#[cfg(not(shuttle))]
pub use std::sync::{Arc, OnceLock, Weak, atomic};
#[cfg(not(shuttle))]
pub use std::thread;

#[cfg(shuttle)]
pub use checked::{Condvar, Mutex, RwLock};
#[cfg(shuttle)]
pub use shuttle::sync::{Arc, MutexGuard, RwLockReadGuard, RwLockWriteGuard, Weak, atomic};
#[cfg(shuttle)]
pub mod thread {
    //! shuttle's threads, and what std knows of all threads.
    pub use shuttle::thread::*;
    pub use std::thread::{available_parallelism, panicking};

    /// Others get on meanwhile: a schedule may prefer who waits for them like this.
    pub fn sleep(_: std::time::Duration) {
        yield_now();
    }
}
#[cfg(shuttle)]
pub use std::sync::OnceLock;

#[cfg(shuttle)]
mod checked {
    //! shuttle's locks with parking_lot's signatures: a poisoned lock gives its value.

    use std::sync::PoisonError;
    use std::time::Duration;

    /// A mutex that does not poison.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// A mutex around `value`.
        pub fn new(value: T) -> Self {
            Mutex(shuttle::sync::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// The lock, if nobody holds it.
        pub fn try_lock(&self) -> Option<shuttle::sync::MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    /// A reader-writer lock that does not poison.
    #[derive(Debug, Default)]
    pub struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        /// A lock around `value`.
        pub fn new(value: T) -> Self {
            RwLock(shuttle::sync::RwLock::new(value))
        }

        /// Waits until nobody writes.
        pub fn read(&self) -> shuttle::sync::RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }

        /// Waits until nobody reads or writes.
        pub fn write(&self) -> shuttle::sync::RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }

        /// The lock for writing, if nobody holds it.
        pub fn try_write(&self) -> Option<shuttle::sync::RwLockWriteGuard<'_, T>> {
            self.0.try_write().ok()
        }
    }

    /// A condition variable over [`Mutex`].
    #[derive(Debug, Default)]
    pub struct Condvar(shuttle::sync::Condvar);

    /// Whether a wait ended by its time.
    pub struct WaitTimeoutResult(bool);

    impl WaitTimeoutResult {
        /// Whether it did.
        pub fn timed_out(&self) -> bool {
            self.0
        }
    }

    impl Condvar {
        /// A condition variable nobody waits on.
        pub fn new() -> Self {
            Condvar(shuttle::sync::Condvar::new())
        }

        /// Wakes one waiter.
        pub fn notify_one(&self) {
            self.0.notify_one();
        }

        /// Wakes all waiters.
        pub fn notify_all(&self) {
            self.0.notify_all();
        }

        /// Lets the lock go, waits, takes it again.
        pub fn wait<T>(&self, guard: &mut shuttle::sync::MutexGuard<'_, T>) {
            take_guard(guard, |g| self.0.wait(g).unwrap_or_else(PoisonError::into_inner));
        }

        /// As `wait`; shuttle has no time, so it never times out.
        pub fn wait_for<T>(
            &self,
            guard: &mut shuttle::sync::MutexGuard<'_, T>,
            _time: Duration,
        ) -> WaitTimeoutResult {
            self.wait(guard);
            WaitTimeoutResult(false)
        }
    }

    /// Runs a by-value wait on a guard held by reference.
    fn take_guard<'a, T>(
        guard: &mut shuttle::sync::MutexGuard<'a, T>,
        wait: impl FnOnce(shuttle::sync::MutexGuard<'a, T>) -> shuttle::sync::MutexGuard<'a, T>,
    ) {
        // SAFETY: the guard is moved out and a guard of the same mutex is moved back in before anyone
        // can look; shuttle's wait does not unwind between (a failing schedule ends the process's test).
        unsafe {
            let inner = std::ptr::read(guard);
            std::ptr::write(guard, wait(inner));
        }
    }
}
