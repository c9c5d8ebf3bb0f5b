//! [`Taken`]: what an operation needs of a file while it is under way without a thread, and which
//! operations can be.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::FileStorage;
use crate::address::HostOffset;
use crate::storage::range_lock::Held;
use crate::storage::{Durability, OperationKind};
use crate::sync::Arc;

/// Longest read of the page cache that goes by a ring. Sequential 256 KiB reads of a cold file gave 0.67 x
/// what an export on threads alone gave (3 rounds, one virtual disk). Why was not profiled, and handing the
/// long ones to threads has won back a part at most: to be measured again.
const RING_READ_LEN_MAX: usize = 128 << 10;

impl FileStorage {
    /// Begins an operation that is carried out without this thread. `None`: only a thread that may wait
    /// can do it. Fails as the call would.
    pub(in crate::storage) fn take_off(
        self: &Arc<Self>,
        kind: OperationKind,
        buf: &[u8],
        at: HostOffset,
    ) -> io::Result<Option<Taken>> {
        let mut taken = Taken { file: Arc::clone(self), changes: false, held: None };
        match (kind, &self.direct) {
            (OperationKind::Read, None) => Ok((buf.len() <= RING_READ_LEN_MAX).then_some(taken)),
            (OperationKind::Read, Some(direct)) => Ok(direct.is_aligned(buf, at.0).then_some(taken)),
            // The page cache takes them one after the other, on one thread of the kernel's.
            (OperationKind::Write(_), None) => Ok(None),
            (OperationKind::Write(Durability::Fua), Some(_)) if self.durable.is_none() => Ok(None),
            (OperationKind::Write(_), Some(direct)) => {
                self.begin_change()?.keep();
                taken.changes = true;
                taken.held = direct.try_hold_blocks(self.file.as_fd(), buf, at.0)?;
                Ok(taken.held.is_some().then_some(taken))
            }
            // Before it may succeed it has to wait for others, and the kernel has a thread wait for each, too.
            (OperationKind::Sync, _) => Ok(None),
        }
    }
}

/// What an operation needs of a file while it is under way without a thread: the open file itself, and
/// for a change its range. Goes when the operation has ended.
pub(in crate::storage) struct Taken {
    file: Arc<FileStorage>,
    changes: bool,
    held: Option<Held>,
}

impl Taken {
    /// The file.
    pub(in crate::storage) fn file(&self) -> &Arc<FileStorage> {
        &self.file
    }

    /// The description that an operation of this kind goes to.
    pub(in crate::storage) fn fd(&self, kind: OperationKind) -> BorrowedFd<'_> {
        match (kind, &self.file.durable) {
            (OperationKind::Write(Durability::Fua), Some(durable)) => durable.as_fd(),
            (OperationKind::Read | OperationKind::Write(_) | OperationKind::Sync, _) => {
                self.file.file.as_fd()
            }
        }
    }

    /// Whether a read that has got so many bytes, fewer than it asked for, is at the end of the file.
    pub(in crate::storage) fn is_end(&self, got: usize) -> bool {
        // Part of a block is had only there; going on would not be aligned.
        self.file.direct.as_ref().is_some_and(|direct| !(got as u64).is_multiple_of(direct.block_len()))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let (Some(direct), Some(held)) = (&self.file.direct, self.held.take()) {
            direct.release(held);
        }
        if self.changes {
            self.file.changes.end();
        }
    }
}
