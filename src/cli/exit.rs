//! The exit statuses, all of them.

use std::process::{ExitCode, Termination};

use crate::server::Outcome;

/// What the process tells its starter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitStatus {
    /// All done: for `serve`, asked to end and every image flushed and closed.
    Success,
    /// Could not start, or could not do what was asked.
    Failed,
    /// The command line makes no sense (clap's number for it too).
    Usage,
    /// `serve` ended, but an image could not be flushed and closed in time or at all: what clients
    /// wrote and did not flush may be lost.
    NotFlushed,
    /// `check` has found corruptions (the number that qemu-img gives, as for the next two).
    Corruptions,
    /// `check` has found leaks and nothing worse.
    Leaks,
    /// `check` does not know this format.
    NotSupported,
    /// `serve` was told a second time to end and did so at once; images may not be flushed.
    Forced,
}

impl ExitStatus {
    /// The number that wait(2) gives.
    pub fn code(self) -> u8 {
        match self {
            ExitStatus::Success => 0,
            ExitStatus::Failed => 1,
            ExitStatus::Usage => 2,
            ExitStatus::NotFlushed => 3,
            ExitStatus::Forced => 4,
            ExitStatus::Corruptions => 2,
            ExitStatus::Leaks => 3,
            ExitStatus::NotSupported => 63,
        }
    }
}

impl From<Outcome> for ExitStatus {
    fn from(outcome: Outcome) -> ExitStatus {
        match outcome {
            Outcome::Clean => ExitStatus::Success,
            Outcome::NotFlushed => ExitStatus::NotFlushed,
            Outcome::Forced => ExitStatus::Forced,
        }
    }
}

impl Termination for ExitStatus {
    fn report(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}
