//! Changes of an image's dirty bitmaps themselves, while nobody else has the image: adding, removing,
//! clearing, enabling, merging.
//!
//! As at the close of an image that was written: everything new goes to clusters of its own, then the header
//! is led there, then the old clusters are let go.

use std::ops::ControlFlow;

use super::super::bitmaps::{Directory, Entry, Flags, LiveBitmap};
use super::super::driver::Qcow2Driver;
use super::super::header::Header;
use super::bitmap_bits::{self, OldClusters};
use super::bitmap_header::{HeaderEdit, Place};
use super::bitmaps::{self, Storing};
use super::metadata_map::Kind;
use super::options::WriteOptions;
use super::{Writer, commit, corrupt};
use crate::address::GuestRange;
use crate::driver::{BlockDriver, Status, StatusQuery};
use crate::error::{Error, ErrorKind, Result};
use crate::mover::check_writable;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Least and most bytes of the disk that a bit of a new bitmap stands for, if nobody says; between them it
/// is the cluster's length (QEMU's choice).
const GRANULARITY_DEFAULT: std::ops::RangeInclusive<u64> = 4 << 10..=64 << 10;

/// How many times as many clusters as when an image is served its bitmaps may take while some are removed. Our choice:
/// hundreds of megabytes of memory for a moment.
const MENDED_TIMES: u64 = 16;

/// What is to become of a bitmap.
#[derive(Clone, Copy)]
pub enum BitmapChange<'a> {
    /// There is a new one in which nothing is marked.
    Add {
        /// Bytes of the disk for each bit: a power of two from 512 to 2 GiB. Without it: the length of a
        /// cluster, but at least 4 and at most 64 KiB.
        granularity: Option<u64>,
        /// Whether changes of the disk are recorded in it.
        enabled: bool,
    },
    /// It is gone.
    Remove,
    /// Nothing is marked in it.
    Clear,
    /// Changes of the disk are recorded in it from now on.
    Enable,
    /// They are not.
    Disable,
    /// Whatever this bitmap of the same image has marked is marked in it, too.
    Merge(&'a str),
    /// As `Merge`, from a bitmap of another image of the same size.
    MergeFrom(&'a dyn BlockDriver, &'a str),
}

impl BitmapChange<'_> {
    /// Whether the image's bitmaps may take more clusters afterwards.
    fn grows(self) -> bool {
        match self {
            BitmapChange::Remove | BitmapChange::Clear | BitmapChange::Disable => false,
            BitmapChange::Add { .. }
            | BitmapChange::Enable
            | BitmapChange::Merge(_)
            | BitmapChange::MergeFrom(..) => true,
        }
    }

    /// How an image is to be opened for it. One with more bitmaps than may be written is to be had for what mends that.
    pub fn write_options(self) -> WriteOptions {
        let options = WriteOptions::default();
        let times = if self.grows() { 1 } else { MENDED_TIMES };
        WriteOptions { bitmap_clusters_max: options.bitmap_clusters_max * times, ..options }
    }
}

/// See [`Qcow2Driver::change_bitmap`].
pub fn change(
    driver: &Qcow2Driver,
    writer: &Writer,
    header: &Header,
    name: &str,
    change: BitmapChange<'_>,
) -> Result<()> {
    check_writable(driver)?;
    if let Some(conflict) = &writer.conflict {
        return Err(corrupt(driver, writer, conflict));
    }
    let edit = HeaderEdit::new(driver, writer, header);
    edit.clear_unknown()?;
    let mut storing = Storing::new(driver, writer);
    let made = Changing { driver, writer, header, storing: &mut storing }.make(name, change);
    let made = made.and_then(|place| commit::commit(driver, writer).map(|()| place));
    match made {
        Ok(place) => {
            edit.lead_to(place)?;
            storing.let_go_old();
            Ok(())
        }
        Err(error) => {
            storing.give_back();
            Err(error)
        }
    }
}

/// A change under way.
struct Changing<'a, 'b> {
    driver: &'a Qcow2Driver,
    writer: &'a Writer,
    header: &'a Header,
    storing: &'b mut Storing<'a>,
}

impl Changing<'_, '_> {
    /// Writes everything new; returns where the directory is, if there is any bitmap left.
    fn make(&mut self, name: &str, change: BitmapChange<'_>) -> Result<Option<Place>> {
        let mut directory = self.writer.bitmaps.directory().clone();
        let found = directory.entries.iter().position(|entry| *entry.name == *name.as_bytes());
        match (change, found) {
            (BitmapChange::Add { granularity, enabled }, None) => {
                let entry = self.new_entry(name, granularity, enabled)?;
                directory.entries.push(entry);
            }
            (BitmapChange::Add { .. }, Some(_)) => {
                return self.refuse(format!("there is a bitmap '{}' already", name.escape_debug()));
            }
            (_, None) => return self.refuse(format!("there is no bitmap '{}'", name.escape_debug())),
            (BitmapChange::Remove, Some(index)) => {
                self.storing.replace_all_of(index);
                directory.entries.remove(index);
            }
            (change, Some(index)) => self.alter(&mut directory, index, change)?,
        }
        if change.grows() {
            self.check_clusters(&directory, name)?;
        }
        let old = self.writer.bitmaps.directory();
        if old.len > 0 {
            self.storing.replace(old.at, old.len);
        }
        let bytes = directory.bytes();
        let count = u32::try_from(directory.entries.len()).unwrap_or(u32::MAX);
        directory.check_size().or_else(|what| self.refuse(what))?;
        if count == 0 {
            return Ok(None);
        }
        let at = self.storing.write_new(&bytes, Kind::BitmapDirectory)?.start();
        Ok(Some(Place { count, len: bytes.len() as u64, at }))
    }

    /// Fails if the image could not be opened for writing any more once the bitmap of this name is enabled.
    fn check_clusters(&self, directory: &Directory, name: &str) -> Result<()> {
        let mut worst = directory.clone();
        let named = worst.entries.iter_mut().find(|entry| *entry.name == *name.as_bytes());
        if let Some(entry) = named {
            entry.flags.insert(Flags::AUTO);
        }
        let stored = self.writer.bitmaps.all_stored();
        let max = self.writer.options.bitmap_clusters_max;
        bitmaps::check_clusters(self.driver.image(), self.header.geometry, (&worst, stored), max)
    }

    fn new_entry(&mut self, name: &str, granularity: Option<u64>, enabled: bool) -> Result<Entry> {
        let cluster_len = self.header.geometry.cluster_len();
        let usual = cluster_len.clamp(*GRANULARITY_DEFAULT.start(), *GRANULARITY_DEFAULT.end());
        let granularity = granularity.unwrap_or(usual);
        if self.header.version < 3 {
            return self.refuse(
                "images of version 2 have no dirty bitmaps (qemu-img amend -o compat=v3)".to_owned(),
            );
        }
        if !granularity.is_power_of_two() {
            return self.refuse(format!("a granularity of {granularity} bytes is no power of two"));
        }
        let bits = self.header.virtual_size.div_ceil(granularity);
        let table_entries = bits.div_ceil(8).div_ceil(cluster_len);
        let flags = if enabled { Flags::AUTO } else { Flags::empty() };
        let granularity_bits = u8::try_from(granularity.trailing_zeros()).unwrap_or(u8::MAX);
        // Where the table goes is known when it is written; any place that can be one will do until then.
        let table_entries = u32::try_from(table_entries).unwrap_or(u32::MAX);
        let mut entry = Entry::new(name.as_bytes(), granularity_bits, flags, cluster_len, table_entries);
        entry.check(self.header.geometry).or_else(|what| self.refuse(what))?;
        entry.table_at = self.write_empty_table(table_entries)?;
        Ok(entry)
    }

    /// Changes a bitmap that stays.
    fn alter(&mut self, directory: &mut Directory, index: usize, change: BitmapChange<'_>) -> Result<()> {
        let Some(entry) = directory.entries.get_mut(index) else { return Ok(()) };
        self.driver.bitmaps().check_usable(self.driver.image(), self.header, entry)?;
        match change {
            BitmapChange::Enable => entry.flags.insert(Flags::AUTO),
            BitmapChange::Disable => entry.flags.remove(Flags::AUTO),
            BitmapChange::Clear => {
                self.storing.replace_all_of(index);
                entry.table_at = self.write_empty_table(entry.table_entries)?;
            }
            BitmapChange::Merge(source) => {
                let table_at = self.merge(self.driver, source, index)?;
                entry.table_at = table_at.unwrap_or(entry.table_at);
            }
            BitmapChange::MergeFrom(from, source) => {
                let table_at = self.merge(from, source, index)?;
                entry.table_at = table_at.unwrap_or(entry.table_at);
            }
            // Not of one that is there and stays.
            BitmapChange::Add { .. } | BitmapChange::Remove => {}
        }
        Ok(())
    }

    /// Marks what `source` of `from` has marked; returns where the table is, if it is a new one.
    fn merge(&mut self, from: &dyn BlockDriver, source: &str, index: usize) -> Result<Option<u64>> {
        if from.size() != self.driver.size() {
            let (theirs, ours) = (from.size(), self.driver.size());
            return self.refuse(format!("the other image's disk has {theirs} bytes, this one's {ours}"));
        }
        if !from.offer_bitmap(source)? {
            return self.refuse(format!("there is no bitmap '{}' to merge", source.escape_debug()));
        }
        let Some(stored) = self.writer.bitmaps.stored(index) else { return Ok(None) };
        let held_len = Arc::new(AtomicU64::new(0));
        let target = LiveBitmap::new(index, Arc::clone(stored), 1, Arc::clone(&held_len));
        let merged = self.add_marks(from, source, (&target, &held_len));
        let table = merged.and_then(|()| self.storing.write_table_of(&target));
        if table.is_err() {
            bitmap_bits::give_back(self.writer, &target);
        } else {
            self.storing.adopt_bits_of(&target);
        }
        table.map(|table| table.map(|table| table.start().0))
    }

    /// Marks it in `target`, whose new bits are stored whenever the budget for them is used up.
    fn add_marks(
        &self,
        from: &dyn BlockDriver,
        source: &str,
        (target, held_len): (&LiveBitmap, &AtomicU64),
    ) -> Result<()> {
        let Some(all) = GuestRange::new(0, from.size()) else { return Ok(()) };
        let store = || bitmap_bits::store_all(self.driver, self.writer, target, OldClusters::Kept);
        let (mut at, mut stored) = (0, Ok(()));
        from.status(StatusQuery::Bitmap(source), all, &mut |len, status| {
            let range = GuestRange::new(at, len).filter(|range| !range.is_empty());
            if let (Status::Bitmap { dirty: true }, Some(range)) = (status, range) {
                target.set(range);
            }
            at += len;
            if held_len.load(Ordering::SeqCst) > self.writer.options.bitmap_len_max {
                stored = store();
            }
            if stored.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        stored.and_then(|()| store())
    }

    fn write_empty_table(&mut self, entries: u32) -> Result<u64> {
        self.storing.write_table(&vec![0; entries as usize]).map(|table| table.start().0)
    }

    fn refuse<T>(&self, what: String) -> Result<T> {
        Err(Error::new(ErrorKind::InvalidInput, what).with_path(&self.driver.image().facts().path))
    }
}
