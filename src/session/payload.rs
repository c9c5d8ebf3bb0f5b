//! Payloads that are taken out of a receive buffer with the memory that they came in, and the way of that memory back.

use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Weak};

use nbd_img_formats::sync::Mutex;

use super::budget::Lease;

/// A request's payload in the memory that it was received into, of which the buffer hears again when this is dropped,
/// on whatever thread.
pub struct Payload {
    memory: Option<Memory>,
    range: Range<usize>,
    home: Weak<Spares>,
}

/// Memory for a receive buffer, and its share of the budget.
pub struct Memory {
    /// What is in use of it.
    pub bytes: Vec<u8>,
    /// The share.
    pub lease: Lease,
}

/// Memory that has come back from payloads. New memory would cost a page fault for every 4 KiB.
#[derive(Default)]
pub struct Spares(Mutex<Vec<Memory>>);

impl Spares {
    /// One of them with such a size, the one that came back last. If there is none, one of the others is given back, so
    /// that they never are more than were wanted at a time.
    pub fn take(&self, sizes: RangeInclusive<usize>) -> Option<Memory> {
        let mut spares = self.0.lock();
        match spares.iter().rposition(|memory| sizes.contains(&memory.bytes.capacity())) {
            Some(index) => Some(spares.remove(index)),
            None => {
                spares.pop();
                None
            }
        }
    }

    /// Gives all of them back; returns whether there were any.
    pub fn forget(&self) -> bool {
        let spares = std::mem::take(&mut *self.0.lock());
        !spares.is_empty()
    }
}

impl Payload {
    /// The payload at `range` of `memory`, which goes to `home` afterwards as long as that is there.
    pub fn new(memory: Option<Memory>, range: Range<usize>, home: &Arc<Spares>) -> Self {
        Payload { memory, range, home: Arc::downgrade(home) }
    }

    /// The payload's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.memory.as_ref().and_then(|memory| memory.bytes.get(self.range.clone())).unwrap_or_default()
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade()
            && let Some(mut memory) = self.memory.take()
            && !memory.lease.is_scarce()
        {
            memory.bytes.clear();
            home.0.lock().push(memory);
        }
    }
}
