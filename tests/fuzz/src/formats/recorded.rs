//! What dirty bitmaps have to tell of the changes that were made.

use std::ops::ControlFlow;

use nbd_img_formats::driver::Status;
use nbd_img_formats::qcow2::Qcow2Driver;
use nbd_img_formats::{BlockDriver, GuestRange, StatusQuery};

use crate::support::image::{self, Image};

const IN_USE: u32 = 1;
const ENABLED: u32 = 2;
/// Says of extra data, of which there is none here, that it need not be known.
const EXTRA_COMPATIBLE: u32 = 4;

/// A bitmap as it stands in the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bitmap {
    name: String,
    flags: u32,
    granularity_bits: u32,
    bits: Vec<bool>,
}

/// The bitmaps of an image that is written, and what was changed since it was opened.
#[derive(Default)]
pub struct Recorded {
    bitmaps: Vec<Bitmap>,
    /// With whether it was certainly done.
    changes: Vec<(GuestRange, bool)>,
}

impl Bitmap {
    /// What `image` has of it.
    pub fn of(image: &Image<'_>, bitmap: &image::Bitmap) -> Self {
        Bitmap {
            name: bitmap.name.clone(),
            flags: bitmap.flags,
            granularity_bits: bitmap.granularity_bits,
            bits: image.dirty_granules(bitmap),
        }
    }

    fn records(&self) -> bool {
        self.flags & !EXTRA_COMPATIBLE == ENABLED
    }

    /// Its bits with all that was changed, or with what was certainly changed.
    fn with(&self, changes: &[(GuestRange, bool)], only_certain: bool) -> Vec<bool> {
        let mut bits = self.bits.clone();
        if self.records() {
            let changes = changes.iter().filter(|(_, certain)| *certain || !only_certain);
            for (range, _) in changes {
                let granule = |at: u64| (at >> self.granularity_bits) as usize;
                bits[granule(range.offset())..=granule(range.end() - 1)].fill(true);
            }
        }
        bits
    }

    /// Whether these bits are possible after the changes.
    fn allows(&self, bits: &[bool], changes: &[(GuestRange, bool)]) -> bool {
        let (least, most) = (self.with(changes, true), self.with(changes, false));
        bits.len() == most.len()
            && bits
                .iter()
                .zip(least.iter().zip(&most))
                .all(|(bit, (least, most))| least <= bit && bit <= most)
    }
}

impl Recorded {
    /// An image with these was opened. The driver has to know the same ones, or none.
    pub fn new(bitmaps: Vec<Bitmap>, driver: &Qcow2Driver) -> Self {
        let known: Vec<_> = driver.info().unwrap().bitmaps.into_iter().map(|bitmap| bitmap.name).collect();
        let same = known.len() == bitmaps.len() && bitmaps.iter().all(|bitmap| known.contains(&bitmap.name));
        Recorded { bitmaps: if same { bitmaps } else { Vec::new() }, changes: Vec::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.bitmaps.len()
    }

    /// A change of the range was made, or tried.
    pub fn change(&mut self, range: GuestRange, certain: bool) {
        if !range.is_empty() {
            self.changes.push((range, certain));
        }
    }

    /// What the driver tells of them.
    pub fn check_status(&self, driver: &Qcow2Driver) {
        // A name that is no text cannot be asked for.
        let is_text = |bitmap: &&Bitmap| !bitmap.name.contains(char::REPLACEMENT_CHARACTER);
        for bitmap in self.bitmaps.iter().filter(is_text).filter(|bitmap| bitmap.flags & IN_USE == 0) {
            assert!(driver.offer_bitmap(&bitmap.name).unwrap(), "{} is not offered", bitmap.name);
            let mut bits = Vec::new();
            let range = GuestRange::new(0, driver.size()).unwrap();
            let visit = &mut |len: u64, status| {
                let dirty = status == Status::Bitmap { dirty: true };
                bits.resize(bits.len() + len.div_ceil(1 << bitmap.granularity_bits) as usize, dirty);
                ControlFlow::Continue(())
            };
            driver.status(StatusQuery::Bitmap(&bitmap.name), range, visit).unwrap();
            assert!(bitmap.allows(&bits, &self.changes), "the status of {}", bitmap.name);
        }
    }

    /// Once something has changed, the file says that those that record are in use, until they are stored.
    pub fn check_in_use(&self, bytes: &Vec<u8>) {
        if !self.changes.iter().any(|(_, certain)| *certain) || self.bitmaps.is_empty() {
            return;
        }
        let image = Image::parse(bytes).unwrap();
        for (before, now) in self.bitmaps.iter().zip(&image.bitmaps) {
            let expected = if before.records() { before.flags | IN_USE } else { before.flags };
            assert_eq!((&before.name, expected), (&now.name, now.flags), "flags while it is written");
        }
    }

    /// The image was closed, with success or not, and has these: the next ones to compare with.
    pub fn check_closed(&mut self, now: Vec<Bitmap>, success: bool) {
        if self.bitmaps.is_empty() {
            return;
        }
        assert_eq!(now.len(), self.bitmaps.len(), "bitmaps after the close");
        for (before, now) in self.bitmaps.iter().zip(&now) {
            if !success && before.records() && now.flags == before.flags | IN_USE {
                continue;
            }
            let same = (&before.name, before.flags, before.granularity_bits);
            assert_eq!(same, (&now.name, now.flags, now.granularity_bits), "a bitmap after the close");
            assert!(before.allows(&now.bits, &self.changes), "bits of {} after the close", before.name);
        }
        self.bitmaps = now;
        self.changes.clear();
    }
}
