//! What a file system says of itself: whether calls on its files wait, and where its holes are.
//!
//! Only questions are asked here; nothing is changed.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::SeekFrom;
use rustix::io::{Errno, ReadWriteFlags};

use super::calls::retry;
use super::{InPlace, IoBuf, Run};
use crate::address::HostOffset;

/// File systems that keep everything in memory (linux/magic.h): tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Local file systems whose buffered writes end in the page cache (linux/magic.h and the file systems'
/// own headers): ext2/3/4, XFS, Btrfs, F2FS, bcachefs, ZFS, JFS, NILFS, NTFS3, exFAT, FAT, HFS+.
/// A network or FUSE file system may ask a server first, and one that is not known may do anything.
const LOCAL: [u64; 12] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0xf2f5_2010,
    0xca45_1a4e,
    0x2fc1_2fc1,
    0x3153_464a,
    0x3434,
    0x7366_746e,
    0x2011_bab0,
    0x4d44,
    0x482b,
];

/// FUSE (linux/magic.h). Every call may wait for a process that can do anything, so it is not even asked.
const FUSE: u64 = 0x6573_5546;

/// How files of the file system with this magic number are best read and written without waiting.
pub(super) fn of_file_system(file: BorrowedFd<'_>, magic: impl TryInto<u64>) -> (InPlace, InPlace) {
    let magic = magic.try_into().unwrap_or_default();
    if IN_MEMORY.contains(&magic) {
        return (InPlace::Always, InPlace::Always);
    }
    if magic == FUSE {
        return (InPlace::Never, InPlace::Never);
    }
    let writes = if LOCAL.contains(&magic) { InPlace::Ask } else { InPlace::Never };
    (ask_to_read(file), writes)
}

/// Whether the kernel can be asked to read only what is in memory.
pub(super) fn ask_to_read(file: BorrowedFd<'_>) -> InPlace {
    let mut byte = [0];
    let read =
        retry(|| rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT));
    match read {
        Ok(_) | Err(Errno::AGAIN) => InPlace::Ask,
        Err(_) => InPlace::Never,
    }
}

/// As [`ask_to_read`], for a file that was opened with O_DIRECT: whether its reads and writes can be
/// begun without waiting for their end.
pub(super) fn ask_to_read_direct(file: BorrowedFd<'_>) -> bool {
    // What fits every alignment; a file that is too short for it reads less.
    let mut block = IoBuf::zeroed(4096);
    let read =
        retry(|| rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut block)], 0, ReadWriteFlags::NOWAIT));
    matches!(read, Ok(_) | Err(Errno::AGAIN))
}

/// Whether mincore(2) tells us which pages of the file are in memory. To those who could not write the
/// file it says that all of them are (mm/mincore.c).
pub(super) fn can_ask_residence(file: BorrowedFd<'_>) -> bool {
    let owned = rustix::fs::fstat(file).is_ok_and(|stat| stat.st_uid == rustix::process::geteuid().as_raw());
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    owned || rustix::fs::access(name, rustix::fs::Access::WRITE_OK).is_ok()
}

/// The bytes that a file occupies.
pub(super) fn allocated_len(file: BorrowedFd<'_>) -> io::Result<u64> {
    // st_blocks counts 512 bytes whatever the block size (stat(2)).
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or_default().saturating_mul(512))
}

/// The run at `at` of a file of `len` bytes. `ENXIO` if `at` is not below the length.
///
/// The file may change between two questions; what does not fit together is called data, which is
/// never wrong.
pub(super) fn run_at(file: BorrowedFd<'_>, at: HostOffset, len: u64) -> io::Result<Run> {
    let rest = match len.checked_sub(at.0) {
        None | Some(0) => return Err(Errno::NXIO.into()),
        Some(rest) => rest,
    };
    let data = match rustix::fs::seek(file, SeekFrom::Data(at.0)) {
        Ok(data) => data,
        // No data behind `at` at all.
        Err(Errno::NXIO) => return Ok(Run { len: rest, hole: true }),
        Err(_) => return Ok(Run { len: rest, hole: false }),
    };
    if let Some(hole) = data.checked_sub(at.0).filter(|len| *len > 0) {
        return Ok(Run { len: hole.min(rest), hole: true });
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(at.0)).ok();
    let data = end.and_then(|end| end.checked_sub(at.0)).filter(|len| *len > 0);
    Ok(Run { len: data.unwrap_or(rest).min(rest), hole: false })
}
