//! [`Changes`]: how many changes of a file are under way, and whether there may be any more.
//!
//! Nobody waits here: whoever closes is told whether he is alone.

use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The changes of one file.
#[derive(Default)]
pub(super) struct Changes {
    under_way: AtomicUsize,
    closed: AtomicBool,
}

/// A change, until this goes.
pub(super) struct Changing<'a>(&'a Changes);

impl Changes {
    /// Begins a change, unless the file has been closed.
    pub(super) fn begin(&self) -> Option<Changing<'_>> {
        // In one order with `close`: either this sees that it is closed, or that sees this change.
        self.under_way.fetch_add(1, Ordering::SeqCst);
        let changing = Changing(self);
        (!self.closed.load(Ordering::SeqCst)).then_some(changing)
    }

    /// Ends a change that was [kept](Changing::keep).
    pub(super) fn end(&self) {
        self.under_way.fetch_sub(1, Ordering::SeqCst);
    }

    /// From now on none begins. Returns whether none is under way.
    pub(super) fn close(&self) -> bool {
        self.closed.store(true, Ordering::SeqCst);
        self.under_way.load(Ordering::SeqCst) == 0
    }
}

impl Changing<'_> {
    /// Leaves the change under way until [`Changes::end`].
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}
