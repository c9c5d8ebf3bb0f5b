//! What of a file is in the page cache: whether a part is (cachestat(2), Linux 6.5), which is a hint, since
//! it may be gone a moment later; and bringing a part in.

use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::{io, iter};

use rustix::fs::Advice;

use super::TryRead;
use super::calls::try_pread_full;
use crate::address::{HostOffset, HostRange};
use crate::sync::atomic::{AtomicBool, Ordering};

/// Number of the system call, the same on every architecture (asm-generic/unistd.h).
const SYS_CACHESTAT: libc::c_long = 451;

/// What is asked for (linux/mman.h, `struct cachestat_range`).
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// The answer, in pages (linux/mman.h, `struct cachestat`).
#[repr(C)]
#[derive(Default)]
struct Answer {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// A page that is being read counts as cached. Reads from a disk end in pieces of up to some megabytes,
/// in order: one page of each piece of this length is looked at. Our choice.
const LOOK_LEN: u64 = 256 << 10;

/// From this length on a read is looked for before it is tried. Our choice.
const FAR_LEN_MIN: usize = 64 << 10;

/// Most that the kernel is asked for at a time: it silently leaves away what is more than one operation of
/// the device (max_sectors_kb) and its own window (read_ahead_kb, usually 128).
const FETCH_LEN: u64 = 128 << 10;

/// Whether all of the range can be had without waiting. `None`: this kernel cannot tell.
pub(super) fn is_there(file: BorrowedFd<'_>, range: HostRange) -> Option<bool> {
    if range.is_empty() {
        return Some(true);
    }
    if !is_cached(file, range)? {
        return Some(false);
    }
    let ends = (range.at().0..range.end().0).step_by(LOOK_LEN as usize).map(|at| at.saturating_add(LOOK_LEN));
    let lasts = ends.map(|end| end.min(range.end().0) - 1);
    let there = |at| matches!(try_pread_full(file, &mut [0], HostOffset(at)), Ok(TryRead::Done(_)));
    Some(iter::once(range.at().0).chain(lasts).all(there))
}

/// Whether a read is known to wait, and so long that copying a part of it in vain would cost much.
pub(super) fn is_far(file: BorrowedFd<'_>, len: usize, at: HostOffset) -> bool {
    let range = HostRange::new(at, len as u64).filter(|_| len >= FAR_LEN_MIN);
    range.is_some_and(|range| is_there(file, range) == Some(false))
}

/// Has the kernel read the range, without waiting for the bytes.
pub(super) fn fetch(file: BorrowedFd<'_>, range: HostRange) -> io::Result<()> {
    let mut at = range.at().0;
    while let Some(len) = NonZeroU64::new((range.end().0 - at).min(FETCH_LEN)) {
        rustix::fs::fadvise(file, at, Some(len), Advice::WillNeed)?;
        at += len.get();
    }
    Ok(())
}

/// Whether all of the range has pages in the cache. `None`: this kernel cannot tell.
fn is_cached(file: BorrowedFd<'_>, range: HostRange) -> Option<bool> {
    static UNSUPPORTED: AtomicBool = AtomicBool::new(false);
    if UNSUPPORTED.load(Ordering::Relaxed) {
        return None;
    }
    let asked = Range { offset: range.at().0, len: range.len() };
    let mut answer = Answer::default();
    // SAFETY: both structures have the layout that the call documents and live until it returns; it
    // writes only the second.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut answer, 0) };
    if result != 0 {
        let missing = io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
        UNSUPPORTED.store(missing, Ordering::Relaxed);
        return None;
    }
    let page_len = rustix::param::page_size() as u64;
    let first = range.at().0 / page_len;
    let last = (range.end().0 - 1) / page_len;
    Some(answer.cached > last - first)
}
