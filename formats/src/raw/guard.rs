//! Keeps a disk whose format was guessed from becoming an image of another format: a guest that can
//! write a qcow2 header into its raw disk would choose what the next open reads (CVE-2008-2004).
//!
//! It looks at what the first bytes would be after a change, so several small writes do not get past it.

use std::fmt;

use crate::address::{GuestRange, HostOffset};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::{Arc, Mutex};

/// Names the format whose magic a disk's first bytes have.
pub type MagicTest = fn(&[u8]) -> Option<&'static str>;

/// Bytes that are looked at: two sectors hold the magic of every format that has one at its start.
const WATCHED_LEN: usize = 1024;

/// Watches the first bytes of a disk.
pub(super) struct MagicGuard {
    test: MagicTest,
    /// Held from the test to the end of the change that it allowed.
    changing: Mutex<()>,
}

impl fmt::Debug for MagicGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MagicGuard").finish_non_exhaustive()
    }
}

impl MagicGuard {
    pub(super) fn new(test: MagicTest) -> Self {
        MagicGuard { test, changing: Mutex::new(()) }
    }

    /// Whether a change that begins at `offset` concerns the guard.
    pub(super) fn watches(&self, offset: u64) -> bool {
        self.watched_len(offset) > 0
    }

    /// The watched bytes from `offset` on.
    pub(super) fn watched_len(&self, offset: u64) -> u64 {
        (WATCHED_LEN as u64).saturating_sub(offset)
    }

    /// Runs `change`, which puts `bytes` (`None`: zeroes) into the range, unless the disk would begin
    /// with a magic afterwards.
    pub(super) fn check_write(
        &self,
        storage: &Arc<dyn Storage>,
        range: GuestRange,
        bytes: Option<&[u8]>,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _changing = self.changing.lock();
        let mut head = [0; WATCHED_LEN];
        storage
            .pread(&mut head, HostOffset(0))
            .map_err(|e| storage_error(storage, "cannot read", HostOffset(0), e))?;
        let start = usize::try_from(range.offset()).unwrap_or(WATCHED_LEN).min(WATCHED_LEN);
        let end = usize::try_from(range.end()).unwrap_or(WATCHED_LEN).min(WATCHED_LEN);
        let target = head.get_mut(start..end).unwrap_or_default();
        match bytes.map(|bytes| bytes.get(..target.len()).unwrap_or_default()) {
            Some(bytes) if bytes.len() == target.len() => target.copy_from_slice(bytes),
            Some(_) => return Err(Error::new(ErrorKind::InvalidInput, "fewer bytes than the range has")),
            None => target.fill(0),
        }
        match (self.test)(&head) {
            None => change(),
            Some(format) => Err(Error::new(
                ErrorKind::Denied,
                format!(
                    "this write would make the disk look like a {format} image, and its format was only \
                     guessed to be raw; serve it with --format raw to allow that"
                ),
            )
            .with_path(&storage.facts().path)
            .with_offset(range.offset())),
        }
    }
}
