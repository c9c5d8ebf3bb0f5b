//! Offsets and ranges with types, so that a guest's address is never used as a file's.
//!
//! Only plain arithmetic lives here; what an address means is the business of a driver.

use std::fmt;

/// A byte range of the guest's disk. `offset + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestRange {
    offset: u64,
    len: u64,
}

/// A byte offset in a [`Storage`](crate::Storage): the address space of a file or device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct HostOffset(pub u64);

/// A byte range of a [`Storage`](crate::Storage). `at + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HostRange {
    at: HostOffset,
    len: u64,
}

impl GuestRange {
    /// The range of `len` bytes from `offset`, or `None` if its end does not fit into 64 bits.
    pub fn new(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len).map(|_| GuestRange { offset, len })
    }

    /// First byte of the range.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether the range holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The offset just behind the range.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }

    /// The first `len` bytes of the range, or all of it when it is shorter.
    pub fn prefix(self, len: u64) -> Self {
        GuestRange { offset: self.offset, len: self.len.min(len) }
    }

    /// What is left of the range behind its first `len` bytes; empty when it is shorter.
    pub fn skip(self, len: u64) -> Self {
        let len = len.min(self.len);
        GuestRange { offset: self.offset + len, len: self.len - len }
    }
}

impl HostOffset {
    /// The offset `len` bytes further, or `None` if it does not fit into 64 bits.
    pub fn checked_add(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(HostOffset)
    }
}

impl HostRange {
    /// The range of `len` bytes from `at`, or `None` if its end does not fit into 64 bits.
    pub fn new(at: HostOffset, len: u64) -> Option<Self> {
        at.0.checked_add(len).map(|_| HostRange { at, len })
    }

    /// First byte of the range.
    pub fn at(self) -> HostOffset {
        self.at
    }

    /// Number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether the range holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The offset just behind the range.
    pub fn end(self) -> HostOffset {
        HostOffset(self.at.0 + self.len)
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {}", self.len, self.offset)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at host offset {}", self.len, self.at)
    }
}
