//! [`FileStorage`]: a regular file or a block device.
//!
//! It turns calls into system calls and knows what each file system and device cannot do. What the
//! bytes mean is not its business, nor who may open which file.

mod taken;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::calls::{pread_full, pwrite_all, retry, try_pread_full};
use super::changes::{Changes, Changing};
use super::direct::{Direct, Files};
use super::known_data::KnownData;
use super::lock::{self, LockMode, LockedFile};
use super::range_lock::Hold;
use super::room::{Room, Target};
use super::syncs::Syncs;
use super::{
    Durability, InPlace, Operation, Provision, Queue, Run, Storage, StorageFacts, StorageKind, TryRead,
    engine,
};
use super::{blkdev, cachestat, new_file, place};
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

pub(super) use taken::Taken;

/// How to open a file.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// For writing too, not just for reading.
    pub writable: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Which of QEMU's locks to take.
    pub lock: LockMode,
}

/// A regular file or a block device.
pub struct FileStorage {
    facts: StorageFacts,
    file: LockedFile,
    /// A second open description with O_DSYNC, for FUA. It is a description of its own because each one
    /// is told of a writeback error once: a failed FUA write must not use up what the next sync of `file`
    /// has to see (see [`syncs`](super::syncs)). `None` when it cannot be had; then a FUA write is a write and a sync.
    durable: Option<OwnedFd>,
    direct: Option<Direct>,
    room: Room,
    known_data: KnownData,
    syncs: Syncs,
    /// Changes under way: the locks must not be let go before they have ended.
    changes: Changes,
    /// Nobody wants it after the process, so that nothing is made durable.
    throwaway: bool,
    /// Whether a ring serves it: it can be asked without waiting, so that no thread of the kernel's waits.
    on_ring: bool,
}

impl FileStorage {
    /// Opens the regular file or block device at `path` and locks it. Fails with [`ErrorKind::Locked`] if somebody
    /// else is in the way, with [`ErrorKind::ReadOnly`] if it is to be written and the file system or device does not
    /// allow that, with [`ErrorKind::InvalidInput`] if it is something else (a folder, a pipe) or has no O_DIRECT.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Arc<FileStorage>> {
        let access = if options.writable { OFlags::RDWR } else { OFlags::RDONLY };
        // Without NONBLOCK, opening a pipe waits for its other end.
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| cannot_open(e, path, options))?;
        FileStorage::from_fd(file, path, options)
    }

    /// As [`open`](Self::open), with a file that has been opened (for writing, if `options` says so)
    /// and looked at already; `path` is its name for people.
    pub fn from_fd(file: OwnedFd, path: &Path, options: &FileOptions) -> Result<Arc<FileStorage>> {
        let fail = |what: &'static str, e: Errno| Error::io(what, e.into()).with_path(path);
        let stat = rustix::fs::fstat(&file).map_err(|e| fail("cannot look at the file", e))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => StorageKind::File,
            FileType::BlockDevice => StorageKind::BlockDevice,
            FileType::Directory => return Err(not_an_image("it is a folder", path)),
            FileType::Symlink
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::Unknown => {
                return Err(not_an_image("it is neither a regular file nor a block device", path));
            }
        };
        if options.writable && kind == StorageKind::BlockDevice && blkdev::is_read_only(file.as_fd())? {
            return Err(Error::new(ErrorKind::ReadOnly, "the device is read-only; --read-only serves it")
                .with_path(path));
        }
        let flags = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
        rustix::fs::fcntl_setfl(&file, flags).map_err(|e| no_direct(e, path))?;
        lock::acquire(file.as_fd(), path, options.lock)?;
        let file = LockedFile::new(file);
        let direct = options.direct.then(|| Direct::new(file.as_fd(), kind));
        let mut facts =
            facts_of(&file, path, kind, options).map_err(|e| fail("cannot look at the file", e))?;
        if let Some(direct) = &direct {
            facts.block_len = u32::try_from(direct.block_len()).unwrap_or(facts.block_len);
        }
        let durable = options.writable.then(|| open_durable(&file, flags)).flatten();
        let on_ring = match &direct {
            None => facts.reads == InPlace::Ask,
            Some(_) => place::ask_to_read_direct(file.as_fd()),
        };
        Ok(Arc::new(FileStorage {
            room: Room::new(kind),
            facts,
            file,
            durable,
            direct,
            known_data: KnownData::default(),
            syncs: Syncs::default(),
            changes: Changes::default(),
            throwaway: false,
            on_ring,
        }))
    }

    /// A new file without a name in `folder`, which is gone with this value. A sync of it succeeds and does nothing.
    pub fn throwaway(folder: &Path) -> Result<Arc<FileStorage>> {
        let options = FileOptions { writable: true, direct: false, lock: LockMode::Off };
        let mut storage = FileStorage::from_fd(new_file::open_nameless(folder)?, folder, &options)?;
        if let Some(storage) = Arc::get_mut(&mut storage) {
            storage.throwaway = true;
            storage.durable = None;
        }
        Ok(storage)
    }

    /// Before a change: keeps the locks until the guard goes. Fails with EIO once a sync has failed, and
    /// with EBADF once the storage has been closed.
    fn begin_change(&self) -> io::Result<Changing<'_>> {
        let changing = self.changes.begin().ok_or(Errno::BADF)?;
        if self.syncs.is_failed() {
            return Err(Errno::IO.into());
        }
        Ok(changing)
    }

    /// Notes a failed sync. Buffered bytes that could not be written back count as clean afterwards, so
    /// that the next sync would succeed although they are lost: the failure has to be for good.
    fn sync_failure(&self, error: io::Error) -> io::Error {
        if !self.facts.direct && self.syncs.fail() {
            tracing::error!(
                path = %self.facts.path.display(), %error,
                "a sync failed: written data may be lost, writes and flushes are refused from now on"
            );
        }
        error
    }

    /// Writes by way of one of the two descriptions.
    fn write_to(&self, file: BorrowedFd<'_>, buf: &[u8], at: HostOffset) -> io::Result<()> {
        match &self.direct {
            None => pwrite_all(file, buf, at),
            Some(direct) => direct.pwrite(self.files(file), buf, at),
        }
    }

    fn files<'a>(&'a self, write: BorrowedFd<'a>) -> Files<'a> {
        Files { read: self.file.as_fd(), write }
    }

    /// Gives a change of room what it needs: the length, how to write, and under O_DIRECT the range.
    fn change_room(
        &self,
        range: HostRange,
        change: impl FnOnce(Target<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let _changing = self.begin_change()?;
        let file = self.file.as_fd();
        let Some(direct) = &self.direct else {
            let write = |bytes: &[u8], at| pwrite_all(file, bytes, at);
            let sync = || self.sync_file();
            return change(Target { file, len: self.len()?, write: &write, sync: Some(&sync) });
        };
        let _guard = direct.lock_change(file, range.at().0, range.end().0, Hold::Exclusive)?;
        let write = |bytes: &[u8], at: HostOffset| direct.write_held(self.files(file), bytes, at.0);
        change(Target { file, len: self.len()?, write: &write, sync: None })
    }

    fn write_durable(&self, durable: &OwnedFd, buf: &[u8], at: HostOffset) -> io::Result<()> {
        let write = || self.write_to(durable.as_fd(), buf, at);
        // Past the page cache each write is told of its own bytes.
        if self.facts.direct {
            return write();
        }
        self.syncs.write(|| write().map_err(|error| self.durable_failure(error)))
    }

    /// The failure of a buffered write that was to be durable: that of a sync, unless nothing was written
    /// for lack of room.
    fn durable_failure(&self, error: io::Error) -> io::Error {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EINVAL) => {
                // It may as well have been told of pages, even another write's, that were lost for it. The
                // other description is told of them too; if it is, that is the failure of a sync.
                let _ = self.sync_file();
                error
            }
            _ => self.sync_failure(error),
        }
    }

    fn sync_file(&self) -> io::Result<()> {
        self.syncs
            .sync(|| retry(|| rustix::fs::fdatasync(&self.file)).map_err(|e| self.sync_failure(e.into())))
    }
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for FileStorage {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        // Works on devices too, where fstat says 0. Nothing here uses the file's position.
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    fn allocated_len(&self) -> io::Result<u64> {
        match self.facts.kind {
            StorageKind::File | StorageKind::Memory => place::allocated_len(self.file.as_fd()),
            StorageKind::BlockDevice => self.len(),
        }
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        match &self.direct {
            None => pread_full(self.file.as_fd(), buf, at),
            Some(direct) => direct.pread(self.file.as_fd(), buf, at),
        }
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        match self.facts.reads {
            InPlace::Always => self.pread(buf, at).map(TryRead::Done),
            InPlace::Ask if cachestat::is_far(self.file.as_fd(), buf.len(), at) => Ok(TryRead::WouldWait(0)),
            InPlace::Ask => try_pread_full(self.file.as_fd(), buf, at),
            InPlace::Never => Ok(TryRead::WouldWait(0)),
        }
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        let changing = self.begin_change()?;
        match (durability, &self.durable) {
            (Durability::Later, _) => self.write_to(self.file.as_fd(), buf, at),
            (Durability::Fua, Some(durable)) => self.write_durable(durable, buf, at),
            (Durability::Fua, None) => {
                self.write_to(self.file.as_fd(), buf, at)?;
                drop(changing);
                self.sync()
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        if !self.facts.writable || self.throwaway {
            return Ok(());
        }
        let _changing = self.begin_change()?;
        self.sync_file()
    }

    fn is_failed(&self) -> bool {
        self.syncs.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        let result = self.change_room(range, |target| self.room.zero(target, range, provision, fast));
        self.known_data.forget(range);
        result
    }

    fn reserve(&self, range: HostRange) -> io::Result<bool> {
        let mut reserved = false;
        let result = self.change_room(range, |target| {
            reserved = self.room.reserve(target.file, range)?;
            Ok(())
        });
        self.known_data.forget(range);
        result.map(|()| reserved)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        let result = self.change_room(range, |target| self.room.discard(target.file, range, target.len));
        self.known_data.forget(range);
        result
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _changing = self.begin_change()?;
        match self.facts.kind {
            StorageKind::File | StorageKind::Memory => {
                let _guard = self.direct.as_ref().map(Direct::lock_len);
                let result = retry(|| rustix::fs::ftruncate(&self.file, len));
                self.known_data.forget(HostRange::new(HostOffset(len), u64::MAX - len).unwrap_or_default());
                Ok(result?)
            }
            StorageKind::BlockDevice if self.len()? == len => Ok(()),
            StorageKind::BlockDevice => Err(Errno::OPNOTSUPP.into()),
        }
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        if let Some(len) = self.known_data.len_at(at) {
            return Ok(Run { len, hole: false });
        }
        let moment = self.known_data.moment();
        let run = place::run_at(self.file.as_fd(), at, self.len()?)?;
        if !run.hole {
            self.known_data.remember(at, run.len, moment);
        }
        Ok(run)
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        if self.facts.direct { Ok(()) } else { cachestat::fetch(self.file.as_fd(), range) }
    }

    fn can_send(&self, range: HostRange) -> bool {
        let cached = match self.facts.reads {
            InPlace::Always => true,
            InPlace::Ask => cachestat::is_there(self.file.as_fd(), range) == Some(true),
            InPlace::Never => false,
        };
        cached && self.facts.kind == StorageKind::File
    }

    fn send(&self, socket: BorrowedFd<'_>, at: HostOffset, len: usize) -> io::Result<usize> {
        let mut from = at.0;
        Ok(retry(|| rustix::fs::sendfile(socket, &self.file, Some(&mut from), len))?)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        if self.on_ring {
            engine::submit_file(&self, operations, queue);
        } else {
            engine::submit(&self, operations, queue);
        }
    }

    fn close(&self) -> io::Result<()> {
        // The descriptor stays until the last user of this storage is gone; what must not happen is
        // that one of them writes without the lock.
        // A change that hangs, of a client that has gone, would land in the hands of whoever locks next.
        if self.changes.close() {
            lock::release(self.file.as_fd());
        } else {
            tracing::warn!(
                path = %self.facts.path.display(),
                "a write is still under way: the image stays locked until it has ended"
            );
        }
        Ok(())
    }
}

fn facts_of(
    file: &LockedFile,
    path: &Path,
    kind: StorageKind,
    options: &FileOptions,
) -> rustix::io::Result<StorageFacts> {
    let magic = rustix::fs::fstatfs(file)?.f_type;
    let (reads, writes) = match (kind, options.direct) {
        (_, true) => (InPlace::Never, InPlace::Never),
        // The file system that the device's name lies in says nothing about the device.
        (StorageKind::BlockDevice, false) => (place::ask_to_read(file.as_fd()), InPlace::Ask),
        (StorageKind::File | StorageKind::Memory, false) => place::of_file_system(file.as_fd(), magic),
    };
    let regular = kind != StorageKind::BlockDevice;
    Ok(StorageFacts {
        path: PathBuf::from(path),
        kind,
        writable: options.writable,
        grows: regular,
        new_space_is_zero: regular,
        direct: options.direct,
        block_len: 1,
        reads,
        writes,
    })
}

/// The file once more, under a description whose writes are durable.
fn open_durable(file: &LockedFile, flags: OFlags) -> Option<OwnedFd> {
    // By its name the file could be another by now.
    let name = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::open(name, OFlags::WRONLY | OFlags::DSYNC | OFlags::CLOEXEC | flags, Mode::empty()).ok()
}

fn cannot_open(errno: Errno, path: &Path, options: &FileOptions) -> Error {
    let what = match errno {
        Errno::ACCESS | Errno::PERM | Errno::ROFS if options.writable => {
            "cannot open the file for writing (--read-only opens it just for reading)"
        }
        Errno::NXIO | Errno::ISDIR => {
            return not_an_image("it is neither a regular file nor a block device", path);
        }
        _ => "cannot open the file",
    };
    Error::io(what, errno.into()).with_path(path)
}

fn no_direct(errno: Errno, path: &Path) -> Error {
    Error::io(
        "the file system does not allow O_DIRECT (--cache writeback or writethrough does without)",
        errno.into(),
    )
    .with_path(path)
}

fn not_an_image(what: &'static str, path: &Path) -> Error {
    Error::new(ErrorKind::InvalidInput, what).with_path(path)
}

#[cfg(all(test, not(shuttle)))]
#[path = "file_tests.rs"]
mod tests;
