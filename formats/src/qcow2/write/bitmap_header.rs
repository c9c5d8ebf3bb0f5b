//! The header's way to the directory of bitmaps: pointing it elsewhere, making it, taking it away.
//!
//! Whatever of it a crash loses, the extensions can be parsed and lead to the old directory, to the new
//! one, or to none. What lies in one sector is written at once; where that is not enough, the header's bit
//! that bitmaps are known to whoever wrote last is off meanwhile, which makes what is there none.

use super::super::driver::Qcow2Driver;
use super::super::extensions::{BITMAPS, BITMAPS_LEN, HEAD_LEN};
use super::super::header::{Autoclear, Header};
use super::{AUTOCLEAR_AT, Writer};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Durability;

/// The least that is written at once (every disk interface; our assumption, as for all of the header).
const SECTOR_LEN: u64 = 512;
/// Where the offset of the backing file's name stands in the header (specification).
const BACKING_NAME_AT: HostOffset = HostOffset(8);

/// Where a directory lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its bitmaps, at least one.
    pub count: u32,
    /// Its bytes.
    pub len: u64,
    /// Its first byte.
    pub at: HostOffset,
}

/// The header of an image, on its way to other bitmaps.
pub struct HeaderEdit<'a> {
    driver: &'a Qcow2Driver,
    writer: &'a Writer,
    header: &'a Header,
}

impl<'a> HeaderEdit<'a> {
    /// Nothing is done yet.
    pub fn new(driver: &'a Qcow2Driver, writer: &'a Writer, header: &'a Header) -> Self {
        HeaderEdit { driver, writer, header }
    }

    /// Takes the promise of features that nobody here knows, before the first change.
    pub fn clear_unknown(&self) -> Result<()> {
        let (autoclear, kept) = self.writer.autoclear;
        if autoclear == kept { Ok(()) } else { self.write_durably(AUTOCLEAR_AT, &kept.to_be_bytes()) }
    }

    /// Leads to the directory at `place`, which is durable, or to none.
    pub fn lead_to(&self, place: Option<Place>) -> Result<()> {
        match (place, self.header.extensions.bitmaps) {
            (None, None) => Ok(()),
            (Some(place), None) => self.insert(place),
            (Some(place), Some(found)) => self.replace(place, found.data_at),
            (None, Some(found)) => self.remove(found.data_at, found.is_last),
        }
    }

    fn replace(&self, place: Place, data_at: u64) -> Result<()> {
        let at_once = data_at % SECTOR_LEN + BITMAPS_LEN <= SECTOR_LEN;
        let known = self.header.autoclear.contains(Autoclear::BITMAPS);
        if at_once && known {
            return self.write_durably(HostOffset(data_at), &place.bytes());
        }
        if known {
            self.set_known(false)?;
        }
        self.write_durably(HostOffset(data_at), &place.bytes())?;
        self.set_known(true)
    }

    /// An extension that is the last one becomes the mark of the end. One that others follow stays, as an
    /// image is left by programs that do not know of bitmaps.
    fn remove(&self, data_at: u64, is_last: bool) -> Result<()> {
        if is_last {
            self.write_durably(HostOffset(data_at - HEAD_LEN as u64), &[0; HEAD_LEN])?;
        }
        self.set_known(false)
    }

    /// Puts an extension where the list ends; its head, which makes it one, last.
    fn insert(&self, place: Place) -> Result<()> {
        let end_at = self.header.extensions.end_at.filter(|at| at.is_multiple_of(8));
        let no_room = || {
            let text = "there is no room in the image's header for its first dirty bitmap";
            Error::new(ErrorKind::NoSpace, text).with_path(&self.driver.image().facts().path)
        };
        let end_at = end_at.ok_or_else(no_room)?;
        let head_len = HEAD_LEN as u64;
        // With a mark of the end behind it.
        let behind = end_at + head_len + BITMAPS_LEN + head_len;
        self.make_room(behind).ok_or_else(no_room)??;
        let data = [place.bytes(), vec![0; HEAD_LEN]].concat();
        self.write_durably(HostOffset(end_at + head_len), &data)?;
        self.set_known(true)?;
        let len = u32::try_from(BITMAPS_LEN).unwrap_or(0);
        let head = [BITMAPS.to_be_bytes(), len.to_be_bytes()].concat();
        self.write_durably(HostOffset(end_at), &head)
    }

    /// Moves the backing file's name to the end of the first cluster if it lies before `behind`. `None`: it
    /// has no room there.
    fn make_room(&self, behind: u64) -> Option<Result<()>> {
        let cluster_len = self.header.geometry.cluster_len();
        let name = self.header.backing_name.as_deref().unwrap_or_default();
        let Some(name_at) = self.header.backing_name_at.filter(|at| *at < behind) else {
            let enough = behind <= self.header.backing_name_at.unwrap_or(cluster_len);
            return enough.then_some(Ok(()));
        };
        let len = name.len() as u64;
        let new_at = (cluster_len - len) / 8 * 8;
        (new_at >= behind && new_at >= name_at + len).then(|| {
            self.write_durably(HostOffset(new_at), name)?;
            self.write_durably(BACKING_NAME_AT, &new_at.to_be_bytes())
        })
    }

    /// Says whether bitmaps were known to whoever wrote last. Other bits that nobody here knows go with it.
    fn set_known(&self, known: bool) -> Result<()> {
        let (_, kept) = self.writer.autoclear;
        let bit = Autoclear::BITMAPS.bits();
        let bits = if known { kept | bit } else { kept & !bit };
        self.write_durably(AUTOCLEAR_AT, &bits.to_be_bytes())
    }

    fn write_durably(&self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        let image = self.driver.image();
        let written = image.pwrite(bytes, at, Durability::Later);
        written.map_err(|e| storage_error(image, "cannot write the header", at, e))?;
        image.sync().map_err(|e| {
            self.writer.fail("a sync has failed, so nobody knows what is durable");
            storage_error(image, "cannot make the header durable", at, e)
        })
    }
}

impl Place {
    /// The data of the header extension (specification, "Bitmaps extension").
    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.count.to_be_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(self.len.to_be_bytes());
        bytes.extend(self.at.0.to_be_bytes());
        bytes
    }
}
