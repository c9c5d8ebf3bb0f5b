//! How long sessions wait for their clients.

use std::time::Duration;

use super::poll::POLL_TIME_DEFAULT;

/// The times of a server's sessions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Times {
    /// How long a session may look at its socket before it parks, where that pays; zero is not at all.
    pub poll: Duration,
    /// How long a half-received request may stand still before its connection is closed, and how long
    /// replies may when memory is scarce.
    pub stall: Duration,
}

impl Default for Times {
    fn default() -> Self {
        // A minute (our choice): longer than any retransmission that still succeeds in practice.
        Times { poll: POLL_TIME_DEFAULT, stall: Duration::from_secs(60) }
    }
}
