//! [`MappedStorage`]: a file that is read through a memory mapping.
//!
//! Writes go to the file by system calls, so that a full disk is an errno and not a signal; on Linux
//! mapping and file show the same page cache. The mapping is only ever read by the guarded copy, never
//! as a slice: the file behind it may change or vanish at any time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use super::sigbus;
use super::{Durability, FileStorage, InPlace, Operation, Queue, Run, Storage, StorageFacts, TryRead, place};
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Provision;
use crate::sync::{Arc, RwLock};

/// Bytes whose presence in memory is asked for at a time: bounds the answer, a byte per page, to the
/// stack. Our choice.
const RESIDENCE_LEN: usize = 1 << 20;
/// The smallest page of any architecture: the answer never needs more bytes than this gives.
const PAGE_LEN_MIN: usize = 4096;

/// A file read through a mapping. See [`MappedStorage::new`].
pub struct MappedStorage {
    file: Arc<FileStorage>,
    facts: StorageFacts,
    /// Replaced by a longer one when the file has grown; readers take their own reference out and copy
    /// without the lock.
    map: RwLock<Arc<Mapping>>,
    /// Whether the kernel tells us the truth about which pages are in memory.
    residence_known: bool,
    page_len: usize,
}

/// Part of the address space, from the start of the file. Empty files have none.
struct Mapping(Option<memmap2::Mmap>);

impl MappedStorage {
    /// Maps `file`, which must not bypass the page cache. Installs a handler for SIGBUS that takes care
    /// of faults in this mapping only.
    pub fn new(file: Arc<FileStorage>) -> Result<Arc<Self>> {
        if file.facts().direct {
            let what = "mmap-raw is read through the page cache, which --cache none and directsync bypass";
            return Err(Error::new(ErrorKind::InvalidInput, what).with_path(&file.facts().path));
        }
        let fail = |e| Error::io("cannot map the file", e).with_path(&file.facts().path);
        sigbus::install().map_err(fail)?;
        let map = file.len().and_then(|len| Mapping::new(file.as_fd(), len)).map_err(fail)?;
        let residence_known = file.facts().writable || place::can_ask_residence(file.as_fd());
        let mut facts = file.facts().clone();
        if facts.reads == InPlace::Never && residence_known {
            facts.reads = InPlace::Ask;
        }
        Ok(Arc::new(MappedStorage {
            facts,
            map: RwLock::new(Arc::new(map)),
            residence_known,
            page_len: rustix::param::page_size().max(PAGE_LEN_MIN),
            file,
        }))
    }

    /// A mapping that reaches up to `end`, or up to the end of the file.
    fn mapping_up_to(&self, end: u64) -> io::Result<Arc<Mapping>> {
        let map = Arc::clone(&self.map.read());
        if map.len() as u64 >= end {
            return Ok(map);
        }
        let mut current = self.map.write();
        let len = self.file.len()?;
        if len > current.len() as u64 {
            *current = Arc::new(Mapping::new(self.file.as_fd(), len)?);
        }
        Ok(Arc::clone(&current))
    }

    /// Copies from the mapping, up to its end, and finds out what became of what is missing.
    fn copy(&self, map: &Mapping, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let copied = map.copy(buf, at);
        let wanted = map.available(at).min(buf.len());
        // A file that has become shorter has zeroes up to the end of its last page, without a fault.
        // So they end in a zero, and only then must the length be asked for.
        if copied == wanted && buf.get(..copied).and_then(|bytes| bytes.last()) != Some(&0) {
            return Ok(copied);
        }
        let there = usize::try_from(self.file.len()?.saturating_sub(at)).unwrap_or(usize::MAX);
        if there <= copied {
            return Ok(there);
        }
        // There is more to the file, yet it could not be had: the disk below it failed.
        if copied == wanted { Ok(copied) } else { Err(Errno::IO.into()) }
    }

    /// As [`copy`](Self::copy), in steps that are looked at first.
    fn try_copy(&self, map: &Mapping, buf: &mut [u8], at: u64) -> io::Result<TryRead> {
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.get_mut(done..).unwrap_or_default();
            let from = at.saturating_add(done as u64);
            let wanted = rest.len().min(RESIDENCE_LEN).min(map.available(from));
            let resident = map.resident_len(from, wanted, self.page_len)?;
            let got = self.copy(map, rest.get_mut(..resident).unwrap_or_default(), from)?;
            done += got;
            if got < resident || wanted == 0 {
                return Ok(TryRead::Done(done));
            }
            if resident < wanted {
                return Ok(TryRead::WouldWait(done));
            }
        }
        Ok(TryRead::Done(done))
    }
}

impl Mapping {
    fn new(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| Errno::FBIG)?;
        if len == 0 {
            return Ok(Mapping(None));
        }
        use std::os::fd::AsRawFd;
        // SAFETY: the mapping is never seen as a slice: only its address is used, by a copy that stands
        // changes of the file and its end.
        unsafe { memmap2::MmapOptions::new().len(len).map(file.as_raw_fd()) }.map(|map| Mapping(Some(map)))
    }

    fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |map| map.len())
    }

    /// The mapped bytes from `at` on.
    fn available(&self, at: u64) -> usize {
        usize::try_from(at).map_or(0, |at| self.len().saturating_sub(at))
    }

    /// Copies as much of `buf` as is mapped from `at` on and can be had; tells how much.
    fn copy(&self, buf: &mut [u8], at: u64) -> usize {
        let len = self.available(at).min(buf.len());
        let (Some(map), Ok(at)) = (&self.0, usize::try_from(at)) else { return 0 };
        if len == 0 {
            return 0;
        }
        // SAFETY: `at + len` lies within the mapping, which lives as long as `self`, and within `buf`;
        // whoever made a mapping has installed the handler.
        len - unsafe { sigbus::guarded_copy(buf.as_mut_ptr(), map.as_ptr().add(at), len) }
    }

    /// How many of `len` mapped bytes from `at` on are in memory before the first that is not. At most
    /// [`RESIDENCE_LEN`] bytes can be asked for.
    fn resident_len(&self, at: u64, len: usize, page_len: usize) -> io::Result<usize> {
        let (Some(map), Ok(at)) = (&self.0, usize::try_from(at)) else { return Ok(0) };
        if len == 0 {
            return Ok(0);
        }
        let into_page = at % page_len;
        let mut pages = [0u8; RESIDENCE_LEN / PAGE_LEN_MIN + 1];
        let count = (into_page + len).div_ceil(page_len).min(pages.len());
        // SAFETY: the address is that of a mapped page, as many pages are asked for as are mapped, and
        // `pages` has a byte for each. Nothing is read but the kernel's own tables.
        let result = unsafe {
            let page = map.as_ptr().add(at - into_page).cast_mut().cast();
            libc::mincore(page, into_page + len, pages.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let present = pages.iter().take(count).take_while(|page| **page & 1 == 1).count();
        Ok((present * page_len).saturating_sub(into_page).min(len))
    }
}

impl AsFd for MappedStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for MappedStorage {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn allocated_len(&self) -> io::Result<u64> {
        self.file.allocated_len()
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        let end = at.checked_add(buf.len() as u64).ok_or(Errno::INVAL)?;
        let map = self.mapping_up_to(end.0)?;
        self.copy(&map, buf, at.0)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        if self.facts.reads == InPlace::Always {
            return self.pread(buf, at).map(TryRead::Done);
        }
        if !self.residence_known {
            return self.file.try_pread(buf, at);
        }
        let end = at.checked_add(buf.len() as u64).ok_or(Errno::INVAL)?;
        let map = self.mapping_up_to(end.0)?;
        self.try_copy(&map, buf, at.0)
    }

    fn pwrite(&self, buf: &[u8], at: HostOffset, durability: Durability) -> io::Result<()> {
        self.file.pwrite(buf, at, durability)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn is_failed(&self) -> bool {
        self.file.is_failed()
    }

    fn zero(&self, range: HostRange, provision: Provision, fast: bool) -> io::Result<()> {
        self.file.zero(range, provision, fast)
    }

    fn discard(&self, range: HostRange) -> io::Result<()> {
        self.file.discard(range)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        self.file.run_at(at)
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        self.file.prefetch(range)
    }

    fn can_send(&self, range: HostRange) -> bool {
        self.file.can_send(range)
    }

    fn send(&self, socket: BorrowedFd<'_>, at: HostOffset, len: usize) -> io::Result<usize> {
        self.file.send(socket, at, len)
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        // What is not in memory comes there by way of the file, without a thread that waits for a page.
        Arc::clone(&self.file).submit(operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}
