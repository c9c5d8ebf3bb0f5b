//! System calls that move bytes, repeated until all of them are moved.

use std::io::{self, IoSliceMut};
use std::os::fd::BorrowedFd;

use rustix::io::{Errno, ReadWriteFlags};

use super::TryRead;
use crate::address::HostOffset;

/// Calls again as long as a signal came in between.
pub(super) fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Reads until `buf` is full or the file ends.
pub(super) fn pread_full(file: BorrowedFd<'_>, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let from = offset_behind(at, done)?;
        match retry(|| rustix::io::pread(file, &mut *rest, from))? {
            0 => break,
            got => done += got,
        }
    }
    Ok(done)
}

/// As [`pread_full`], but stops where it would have to wait.
pub(super) fn try_pread_full(file: BorrowedFd<'_>, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let from = offset_behind(at, done)?;
        let got =
            retry(|| rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], from, ReadWriteFlags::NOWAIT));
        match got {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Ok(TryRead::WouldWait(done)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(TryRead::Done(done))
}

/// Writes all of `buf`.
pub(super) fn pwrite_all(file: BorrowedFd<'_>, buf: &[u8], at: HostOffset) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
        let from = offset_behind(at, done)?;
        match retry(|| rustix::io::pwrite(file, rest, from))? {
            // Does not happen with files; without this it would be an endless loop.
            0 => return Err(Errno::IO.into()),
            written => done += written,
        }
    }
    Ok(())
}

fn offset_behind(at: HostOffset, done: usize) -> io::Result<u64> {
    at.checked_add(done as u64).map(|at| at.0).ok_or_else(|| Errno::INVAL.into())
}
