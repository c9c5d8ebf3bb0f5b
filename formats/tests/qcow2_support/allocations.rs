//! An allocator that counts, for tests of bounds on memory.
//!
//! It is the only place with `unsafe` in these tests: an allocator cannot be written without.
#![allow(dead_code)] // Each test program looks at its own part.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting for each thread.
pub struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

/// What a thread allocated.
#[derive(Clone, Copy, Debug)]
pub struct Allocations {
    /// Bytes of the largest allocation.
    pub largest: usize,
    /// Most bytes at a time, beyond those at the start.
    pub peak: isize,
    /// Number of allocations.
    pub count: usize,
}

/// Runs `work` and tells what this thread allocated in it.
pub fn count<T>(work: impl FnOnce() -> T) -> (T, Allocations) {
    LARGEST.set(0);
    COUNT.set(0);
    LIVE.set(0);
    PEAK.set(0);
    let result = work();
    (result, Allocations { largest: LARGEST.get(), peak: PEAK.get(), count: COUNT.get() })
}

fn note(size: usize) {
    LARGEST.set(LARGEST.get().max(size));
    COUNT.set(COUNT.get() + 1);
    LIVE.set(LIVE.get().wrapping_add_unsigned(size));
    PEAK.set(PEAK.get().max(LIVE.get()));
}

// SAFETY: every call is passed on to the system's allocator unchanged; the counters are plain cells of
// the thread that allocate nothing and have no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(new_size);
        LIVE.set(LIVE.get().wrapping_sub_unsigned(layout.size()));
        // SAFETY: the caller keeps the contract of `realloc`, which is the same.
        unsafe { System.realloc(at, layout, new_size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub_unsigned(layout.size()));
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same.
        unsafe { System.dealloc(at, layout) }
    }
}
