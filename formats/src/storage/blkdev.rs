//! The ioctls of block devices (linux/fs.h). Ranges must be aligned to the logical block.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::address::HostRange;
use crate::error::{Error, Result};

/// `_IO(0x12, 94)`: whether the device is read-only.
const BLKROGET: libc::Ioctl = 0x125e;
/// `_IO(0x12, 119)`: forget a range.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)`: zero a range, by writing if the device cannot.
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// Whether the device refuses writes.
pub(super) fn is_read_only(device: BorrowedFd<'_>) -> Result<bool> {
    let mut value: libc::c_int = 0;
    // SAFETY: the descriptor is open while borrowed; BLKROGET writes one int through the pointer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &mut value) };
    if result == 0 {
        return Ok(value != 0);
    }
    Err(Error::io("cannot ask the device whether it is read-only", io::Error::last_os_error()))
}

/// Bytes in a logical block: nothing smaller can be zeroed or discarded.
pub(super) fn logical_block_len(device: BorrowedFd<'_>) -> u64 {
    rustix::fs::ioctl_blksszget(device).map_or(4096, u64::from)
}

/// Forgets what is in the range.
pub(super) fn discard(device: BorrowedFd<'_>, range: HostRange) -> rustix::io::Result<()> {
    range_ioctl(device, BLKDISCARD, range)
}

/// Makes the range zero.
pub(super) fn zero(device: BorrowedFd<'_>, range: HostRange) -> rustix::io::Result<()> {
    range_ioctl(device, BLKZEROOUT, range)
}

fn range_ioctl(device: BorrowedFd<'_>, request: libc::Ioctl, range: HostRange) -> rustix::io::Result<()> {
    let argument: [u64; 2] = [range.at().0, range.len()];
    loop {
        // SAFETY: the descriptor is open while borrowed; both requests read two u64 through the pointer.
        if unsafe { libc::ioctl(device.as_raw_fd(), request, argument.as_ptr()) } == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&io::Error::last_os_error()) {
            Some(Errno::INTR) => {}
            errno => return Err(errno.unwrap_or(Errno::IO)),
        }
    }
}
