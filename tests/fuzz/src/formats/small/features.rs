//! What images have besides the first version 3: a data file, extended L2 entries, bitmaps of all sorts.

use arbitrary::{Result, Unstructured};

use super::{Builder, content};
use crate::support::image::{COPIED, OFFSET_MASK};

/// Which features, beyond those of the shape itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Features {
    pub data_file: Option<Outside>,
    /// Which of the [`sets`](Features::bitmaps) of bitmaps.
    pub bitmaps: u8,
}

/// An external data file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Outside {
    /// It is to be read as the disk by whoever has no image.
    pub raw: bool,
    /// It lies on a device as long as the disk, which is full of old content.
    pub device: bool,
    /// The file ends with the last data that an entry leads to.
    pub short: bool,
}

/// A bitmap, and the one entry of its table.
pub(super) struct Bitmap {
    name: &'static [u8],
    granularity_bits: u8,
    flags: u8,
    bits: Bits,
}

enum Bits {
    Zeroes,
    Ones,
    /// A cluster that begins with these.
    Stored(&'static [u8]),
}

const IN_USE: u8 = 1;
const AUTO: u8 = 2;

const fn bitmap(name: &'static [u8], granularity_bits: u8, flags: u8, bits: Bits) -> Bitmap {
    Bitmap { name, granularity_bits, flags, bits }
}

/// The one of images without other features.
const ALONE: [Bitmap; 1] = [bitmap(b"b", 16, AUTO, Bits::Stored(&[]))];
const ENABLED: [Bitmap; 1] = [bitmap(b"on", 9, AUTO, Bits::Stored(&[1, 0x80]))];
const SOME: [Bitmap; 2] =
    [bitmap(b"off", 10, 0, Bits::Stored(&[0x18])), bitmap(b"new", 12, AUTO, Bits::Zeroes)];
const ALL_SORTS: [Bitmap; 4] = [
    bitmap(b"on", 9, AUTO, Bits::Zeroes),
    bitmap(b"stale", 9, AUTO | IN_USE, Bits::Stored(&[7])),
    bitmap(b"full", 13, AUTO, Bits::Ones),
    bitmap(b"off", 16, 0, Bits::Ones),
];

impl Features {
    /// Those that a byte of the input asks for, and whether L2 entries are to be extended.
    pub fn arbitrary(u: &mut Unstructured<'_>) -> Result<(Features, bool)> {
        let bits: u8 = u.arbitrary()?;
        let device = bits & 0x20 != 0;
        let outside = Outside { raw: bits & 2 != 0, device, short: !device && bits & 0x40 != 0 };
        let features = Features { data_file: (bits & 1 != 0).then_some(outside), bitmaps: bits >> 3 & 3 };
        Ok((features, bits & 4 != 0))
    }

    /// Whether the data file is to be read as a raw disk.
    pub fn is_raw(&self) -> bool {
        self.data_file.is_some_and(|outside| outside.raw)
    }

    /// The state of the subclusters of each cluster of data: some are there, some read as zeroes, some are the backing
    /// file's. In a raw data file all are there, as the whole cluster has content.
    pub(super) fn subclusters(&self) -> u64 {
        if self.is_raw() { 0x0000_0000_ffff_ffff } else { 0x00ff_0000_ff00_ffff }
    }

    pub(super) fn bitmaps(&self) -> &'static [Bitmap] {
        match self.bitmaps {
            0 => &ALONE,
            1 => &ENABLED,
            2 => &SOME,
            _ => &ALL_SORTS,
        }
    }
}

impl Builder {
    /// The bitmaps; returns the data of the header extension that leads to them.
    pub(super) fn bitmaps(&mut self) -> Vec<u8> {
        let bitmaps = self.shape.features.bitmaps();
        let mut directory = Vec::new();
        let mut places = Vec::new();
        for bitmap in bitmaps {
            let raw = match bitmap.bits {
                Bits::Zeroes => 0,
                Bits::Ones => 1,
                Bits::Stored(bytes) => {
                    let bits = self.add(self.shape.cluster_len());
                    self.put(bits, bytes);
                    places.push((bits, 8));
                    bits
                }
            };
            let table = self.add_place(8);
            self.put(table, &raw.to_be_bytes());
            places.push((table, 8));
            directory.extend(table.to_be_bytes());
            directory.extend(1u32.to_be_bytes());
            directory.extend(u32::from(bitmap.flags).to_be_bytes());
            directory.extend([1, bitmap.granularity_bits, 0, bitmap.name.len() as u8]);
            directory.extend(0u32.to_be_bytes());
            directory.extend(bitmap.name);
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        let at = self.add_place(directory.len() as u64);
        self.put(at, &directory);
        places.push((at, directory.len() as u64));
        for (at, len) in places {
            self.count(at, len);
        }
        let mut data = [(bitmaps.len() as u32).to_be_bytes(), [0; 4]].concat();
        data.extend((directory.len() as u64).to_be_bytes());
        data.extend(at.to_be_bytes());
        data
    }

    /// A cluster of the guest with these bytes, in the image or beside it; returns an entry that leads to it.
    pub(super) fn data_cluster(&mut self, cluster: u64, bytes: &[u8]) -> u64 {
        let entry = self.place_of(cluster);
        match self.shape.features.data_file {
            None => self.put(entry, bytes),
            Some(_) => self.put_outside(entry & OFFSET_MASK, bytes),
        }
        entry
    }

    /// An entry that leads to room for a cluster of the guest. In a data file the copied flag tells the place of
    /// the first one from none.
    pub(super) fn place_of(&mut self, cluster: u64) -> u64 {
        let cluster_len = self.shape.cluster_len();
        match self.shape.features.data_file {
            None => self.add(cluster_len),
            Some(_) => (cluster * cluster_len) | COPIED,
        }
    }

    fn put_outside(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        let end = (at + bytes.len()).min(self.shape.size() as usize);
        self.data.resize(self.data.len().max(end), 0);
        self.data[at..end].copy_from_slice(&bytes[..end - at]);
    }

    /// What a data file has where no entry leads: old content, unless it is to be read as the disk.
    pub(super) fn finish_data_file(&mut self) {
        let Some(outside) = self.shape.features.data_file.filter(|outside| !outside.short) else { return };
        let (from, size) = (self.data.len(), self.shape.size() as usize);
        self.data.resize(size, 0);
        if !outside.raw {
            let old = content(9, from as u64, (size - from) as u64);
            self.data[from..].copy_from_slice(&old);
        }
    }
}
