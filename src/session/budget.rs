//! The memory that sessions may use for payloads, in bytes over all connections.
//!
//! Nobody waits for it: a session that gets no lease goes on within its floor, one slice at a time, so
//! that memory can never be what two connections deadlock on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory over all connections unless told otherwise. Our choice: 128 connections at their floors and a
/// few busy ones fit into half of a small machine's container limit.
pub const BUDGET_LEN_DEFAULT: usize = 256 << 20;

/// What every connection may use without a lease: one slice of payload in flight. Our choice.
pub const FLOOR_LEN: usize = 256 << 10;

/// Most that one connection may lease: an eighth of the default budget, and room for the largest request.
pub const CONNECTION_LEN_MAX: usize = 64 << 20;

/// The bytes that are left. Shared by all sessions of a server.
pub struct Budget {
    len: usize,
    left: AtomicUsize,
}

impl Budget {
    /// A budget of `len` bytes.
    pub fn new(len: usize) -> Arc<Self> {
        Arc::new(Budget { len, left: AtomicUsize::new(len) })
    }

    /// Takes `len` bytes out until the lease is dropped, or nothing if they are not there.
    pub fn try_lease(self: &Arc<Self>, len: usize) -> Option<Lease> {
        self.left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(len))
            .ok()
            .map(|_| Lease { budget: Arc::clone(self), len })
    }

    /// Whether so much is leased that a client who stands still is in the way of others: more than
    /// half (our choice).
    pub fn is_scarce(&self) -> bool {
        self.left_len() < self.len / 2
    }

    /// Bytes that nobody has leased.
    pub fn left_len(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }
}

/// Some bytes of a budget; dropping it gives them back.
pub struct Lease {
    budget: Arc<Budget>,
    len: usize,
}

impl Lease {
    /// How many.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether its budget [is scarce](Budget::is_scarce).
    pub fn is_scarce(&self) -> bool {
        self.budget.is_scarce()
    }

    /// Whether it is for no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.len, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_come_out_of_the_budget_and_go_back() {
        let budget = Budget::new(100);
        let first = budget.try_lease(60).unwrap();
        assert!(budget.try_lease(41).is_none());
        let second = budget.try_lease(40).unwrap();
        assert_eq!((first.len(), second.len(), budget.left_len()), (60, 40, 0));
        assert!(budget.is_scarce());
        drop(first);
        assert_eq!(budget.left_len(), 60);
        drop(second);
        assert_eq!(budget.left_len(), 100);
        assert!(!budget.is_scarce());
    }
}
