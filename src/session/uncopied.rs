//! Whether it pays, on this host and for this client, to send large reads uncopied.
//!
//! By sendfile the server spends a third of the processor's time, but the client is the first to touch the bytes. Where that
//! is what takes the time, a server that copies has fetched them into the cache before, and the client takes them over at
//! twice the rate; where it is not, uncopied is the faster by half (both measured, see tests/bench/README.md). Uncopied is
//! what a session begins with.
//!
//! What can be sent uncopied at all is `sendfile`'s to say.

use std::time::Instant;

use super::ways::{Rule, Ways};

/// Copying costs the server's processor, which somebody else may want, so it has to gain a quarter; and what a Unix socket holds
/// (the kernel doubles the 4 MiB that it is given) has to go before a window tells anything. Our choice.
const COPYING: Rule = Rule {
    name: "large reads are faster when they are copied",
    gain: 4,
    before_first_len: 64 << 20,
    window_len: 16 << 20,
    settle_len: 8 << 20,
    pairs: 3,
    clear_pairs: 1,
};

/// What one session has found out.
pub(super) struct Uncopied {
    copying: Ways,
}

impl Uncopied {
    pub(super) fn new() -> Self {
        Uncopied { copying: Ways::new(&COPYING) }
    }

    /// Whether the next read, with `len` bytes of data, is to be sent uncopied, which it can be. It is if it may not be
    /// copied. `now` is when it is begun to be served.
    pub(super) fn pays(&mut self, len: u64, may_copy: bool, now: Instant) -> bool {
        !self.copying.takes_other(len, may_copy, now)
    }

    /// Something else than a read that could be sent was done.
    pub(super) fn disturb(&mut self) {
        self.copying.disturb();
    }

    /// Whether memory is left from copying that is not done any more; says so once.
    pub(super) fn leaves_memory(&mut self) -> bool {
        self.copying.has_left_other()
    }
}
