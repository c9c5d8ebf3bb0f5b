//! Whether a part of a file is in the page cache (cachestat(2), Linux 6.5): a hint, it may be gone a
//! moment later.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::address::HostRange;
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

/// Whether all of the range is in memory. A kernel that cannot tell says no.
pub(super) fn is_cached(file: BorrowedFd<'_>, range: HostRange) -> bool {
    static UNSUPPORTED: AtomicBool = AtomicBool::new(false);
    if range.is_empty() || UNSUPPORTED.load(Ordering::Relaxed) {
        return false;
    }
    let asked = Range { offset: range.at().0, len: range.len() };
    let mut answer = Answer::default();
    // SAFETY: both structures have the layout that the call documents and live until it returns; it
    // writes only the second.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut answer, 0) };
    if result != 0 {
        let missing = std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
        UNSUPPORTED.store(missing, Ordering::Relaxed);
        return false;
    }
    let page_len = rustix::param::page_size() as u64;
    let first = range.at().0 / page_len;
    let last = (range.end().0 - 1) / page_len;
    answer.cached > last - first
}
