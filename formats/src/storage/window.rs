//! [`WindowStorage`]: a part of another storage, for reading: an image that lies inside of another file, such as a tar
//! archive.

use std::io;

use rustix::io::Errno;

use super::{Durability, InPlace, Operation, Provision, Queue, Run, Storage, StorageFacts, TryRead, engine};
use crate::address::{HostOffset, HostRange};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// A part of a storage. Changing it fails as on a file that was opened for reading.
pub struct WindowStorage {
    below: Arc<dyn Storage>,
    facts: StorageFacts,
    offset: u64,
    len: u64,
}

impl WindowStorage {
    /// The part of `below` from `offset` on, `len` bytes or up to the end. Fails if it is not all there.
    pub fn new(below: Arc<dyn Storage>, offset: u64, len: Option<u64>) -> Result<Arc<Self>> {
        let path = below.facts().path.clone();
        let whole =
            below.len().map_err(|error| Error::io("cannot tell its length", error).with_path(&path))?;
        let rest = whole.checked_sub(offset);
        let len = match (rest, len) {
            (Some(rest), None) => rest,
            (Some(rest), Some(len)) if len <= rest => len,
            (None | Some(_), _) => {
                let what =
                    format!("the part of the file that was asked for reaches beyond its {whole} bytes");
                return Err(Error::new(ErrorKind::InvalidInput, what).with_path(&path));
            }
        };
        let facts =
            StorageFacts { writable: false, grows: false, writes: InPlace::Never, ..below.facts().clone() };
        Ok(Arc::new(WindowStorage { below, facts, offset, len }))
    }

    /// Where `at` lies below, and how many of `wanted` bytes there are.
    fn place(&self, at: HostOffset, wanted: usize) -> io::Result<(HostOffset, usize)> {
        let left = self.len.saturating_sub(at.0);
        let there = usize::try_from(left).unwrap_or(usize::MAX).min(wanted);
        let below = at.checked_add(self.offset).ok_or(Errno::INVAL)?;
        Ok((below, there))
    }
}

impl Storage for WindowStorage {
    fn facts(&self) -> &StorageFacts {
        &self.facts
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<usize> {
        let (below, there) = self.place(at, buf.len())?;
        self.below.pread(buf.get_mut(..there).unwrap_or_default(), below)
    }

    fn try_pread(&self, buf: &mut [u8], at: HostOffset) -> io::Result<TryRead> {
        let (below, there) = self.place(at, buf.len())?;
        self.below.try_pread(buf.get_mut(..there).unwrap_or_default(), below)
    }

    fn pwrite(&self, _buf: &[u8], _at: HostOffset, _durability: Durability) -> io::Result<()> {
        Err(Errno::BADF.into())
    }

    fn sync(&self) -> io::Result<()> {
        self.below.sync()
    }

    fn is_failed(&self) -> bool {
        self.below.is_failed()
    }

    fn zero(&self, _range: HostRange, _provision: Provision, _fast: bool) -> io::Result<()> {
        Err(Errno::BADF.into())
    }

    fn discard(&self, _range: HostRange) -> io::Result<()> {
        Err(Errno::BADF.into())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(Errno::BADF.into())
    }

    fn run_at(&self, at: HostOffset) -> io::Result<Run> {
        let left = self.len.checked_sub(at.0).filter(|left| *left > 0).ok_or(Errno::NXIO)?;
        let run = self.below.run_at(at.checked_add(self.offset).ok_or(Errno::INVAL)?)?;
        Ok(Run { len: run.len.min(left), ..run })
    }

    fn prefetch(&self, range: HostRange) -> io::Result<()> {
        let at = range.at().checked_add(self.offset).ok_or(Errno::INVAL)?;
        HostRange::new(at, range.len()).map_or(Ok(()), |range| self.below.prefetch(range))
    }

    fn submit(self: Arc<Self>, operations: &mut Vec<Operation>, queue: &Arc<Queue>) {
        engine::submit(&self, operations, queue);
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    fn whole() -> Arc<dyn Storage> {
        let memory = MemoryStorage::new(100).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        memory.pwrite(&bytes, HostOffset(0), Durability::Later).unwrap();
        memory
    }

    #[test]
    fn only_the_part_is_there() {
        let part = WindowStorage::new(whole(), 10, Some(20)).unwrap();
        assert_eq!(part.len().unwrap(), 20);
        let mut buf = [0; 30];
        assert_eq!(part.pread(&mut buf, HostOffset(0)).unwrap(), 20);
        assert_eq!((buf[0], buf[19], buf[20]), (10, 29, 0));
        assert_eq!(part.pread(&mut buf, HostOffset(15)).unwrap(), 5);
        assert_eq!(part.pread(&mut buf, HostOffset(20)).unwrap(), 0);
        assert_eq!(part.pread(&mut buf, HostOffset(u64::MAX - 20)).unwrap_or(0), 0);
        assert!(part.run_at(HostOffset(0)).unwrap().len <= 20);
        assert!(part.run_at(HostOffset(20)).is_err());
    }

    #[test]
    fn it_is_not_written() {
        let below = whole();
        let part = WindowStorage::new(Arc::clone(&below), 10, None).unwrap();
        assert!(part.pwrite(&[1], HostOffset(0), Durability::Later).is_err());
        assert!(part.set_len(5).is_err() && !part.facts().writable);
        let mut byte = [0];
        below.pread(&mut byte, HostOffset(10)).unwrap();
        assert_eq!(byte, [10]);
    }

    #[test]
    fn a_part_that_is_not_all_there_is_refused() {
        for (offset, len) in [(101, None), (90, Some(11)), (u64::MAX, Some(u64::MAX))] {
            assert!(WindowStorage::new(whole(), offset, len).is_err(), "{offset} {len:?}");
        }
    }
}
