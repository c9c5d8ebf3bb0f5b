//! Dirty bitmaps of a disk that gets another size while nobody has it open.
//!
//! Each gets a table of the new length: bits that both disks have stay, new ones are clear, and so is all that is behind
//! the last one. Clusters of bits that stay as they are are not copied. What is new goes to clusters of its own; then the
//! header gets the size and leads to the new directory. As a rule these lie in different sectors of it, so the bit that
//! bitmaps are known to whoever wrote last is off meanwhile: a crash between them costs the bitmaps, and leaves none that
//! lies. Where no table has to change (most of the time a disk grows) there is nothing of that.

use super::super::bitmaps::{Bitmaps, Directory, Stored, StoredBitmap, TABLES_LEN_MAX, Tables};
use super::super::check::ledger::{Ledger, sync, write};
use super::super::header::{Autoclear, Header};
use super::super::types::Geometry;
use super::super::write::AUTOCLEAR_AT;
use super::super::write::bitmaps::{DIRECTORY_OFFSET_AT, check_clusters};
use super::super::write::metadata_map::Kind;
use super::super::write::options::WriteOptions;
use super::SIZE_AT;
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::Arc;

/// The bitmaps of an image whose disk gets another size, where any of their tables has to change.
pub struct Change {
    directory: Directory,
    tables: Vec<NewTable>,
    /// What nothing leads to afterwards.
    old: Vec<(HostOffset, u64)>,
}

/// The table that a bitmap gets.
struct NewTable {
    /// The bitmap's number in the directory.
    entry: usize,
    words: Vec<u64>,
    /// A cluster of bits that is to be written, and its number.
    bits: Option<(usize, Vec<u8>)>,
}

/// Looks at the bitmaps of the image, and says what has to change of them for a disk of `size` bytes. Fails, naming it, if
/// one of them cannot be kept, as who does not know what it says.
pub fn plan(image: &Arc<dyn Storage>, header: &Header, size: u64) -> Result<Option<Change>> {
    let bitmaps = Bitmaps::load(image, header);
    let tables = bitmaps.load_tables(image, header)?;
    let resized = resized_directory(image, header, (&bitmaps, &tables.directory), size)?;
    let max = WriteOptions::default().bitmap_clusters_max;
    if size > header.virtual_size {
        check_clusters(image, header.geometry, (&resized, &tables.stored), max)?;
    }
    let Tables { directory, stored } = tables;
    if !directory.entries.is_empty() && !directory.extension_at.0.is_multiple_of(8) {
        let text = "images with header extensions that are not aligned are not resized yet (qemu-img resize)";
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let (mut tables, mut old) = (Vec::new(), vec![(directory.at, directory.len)]);
    for (number, (entry, stored)) in directory.entries.iter().zip(&stored).enumerate() {
        let table = NewTable::of(image, stored, number, size)?;
        if table.differs(stored) {
            old.push((HostOffset(entry.table_at), entry.table_len()));
            old.extend(table.replaced(stored).map(|at| (at, header.geometry.cluster_len())));
            tables.push(table);
        }
    }
    Ok((!tables.is_empty()).then_some(Change { directory, tables, old }))
}

/// The directory with tables as long as a disk of `size` bytes needs them. Fails, naming it, if one of the bitmaps cannot be
/// that of such a disk, or cannot be kept, as who does not know what it says.
pub fn resized_directory(
    image: &Arc<dyn Storage>,
    header: &Header,
    (bitmaps, directory): (&Bitmaps, &Directory),
    size: u64,
) -> Result<Directory> {
    let (mut resized, mut len) = (directory.clone(), 0);
    for entry in &mut resized.entries {
        bitmaps.check_usable(image, header, entry)?;
        let words = clusters_for(size.div_ceil(entry.granularity()), header.geometry);
        entry.table_entries = u32::try_from(words).unwrap_or(u32::MAX);
        len += entry.table_len();
        let too_long = || (len > TABLES_LEN_MAX).then(|| "all tables together are too long".to_owned());
        if let Some(why) = entry.check(header.geometry).err().or_else(too_long) {
            let name = entry.shown_name();
            let text = format!(
                "the bitmap '{name}' cannot be that of a disk of {size} bytes: {why} (nbd-img bitmap remove)"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    }
    Ok(resized)
}

fn clusters_for(bits: u64, geometry: Geometry) -> u64 {
    bits.div_ceil(8).div_ceil(geometry.cluster_len())
}

impl NewTable {
    /// That of the bitmap for a disk of `size` bytes.
    fn of(image: &Arc<dyn Storage>, stored: &StoredBitmap, entry: usize, size: u64) -> Result<Self> {
        let cluster_len = stored.geometry().cluster_len();
        let bits = size.div_ceil(stored.granularity());
        let clusters = clusters_for(bits, stored.geometry());
        let common = bits.min(stored.bits());
        let whole = index(common / (cluster_len * 8));
        let mut words: Vec<u64> = stored.clusters().take(whole).map(Stored::encode).collect();
        let mut changed = None;
        let rest = common % (cluster_len * 8);
        if let Some(last) = stored.clusters().nth(whole).filter(|_| rest > 0) {
            let is = read_cluster(image, last, cluster_len)?;
            let kept = first_bits(&is, rest);
            if kept == is {
                words.push(last.encode());
            } else {
                words.push(Stored::Zeroes.encode());
                changed = Some((whole, kept)).filter(|(_, kept)| kept.iter().any(|byte| *byte != 0));
            }
        }
        words.resize(index(clusters), Stored::Zeroes.encode());
        Ok(NewTable { entry, words, bits: changed })
    }

    fn differs(&self, stored: &StoredBitmap) -> bool {
        self.bits.is_some() || !stored.clusters().map(Stored::encode).eq(self.words.iter().copied())
    }

    /// The clusters of the old table that this one does not lead to.
    fn replaced(&self, stored: &StoredBitmap) -> impl Iterator<Item = HostOffset> {
        let now = self.words.iter().map(Some).chain(std::iter::repeat(None));
        stored.clusters().zip(now).filter_map(|(old, new)| match old {
            Stored::At(at) if new != Some(&old.encode()) => Some(at),
            Stored::At(_) | Stored::Zeroes | Stored::Ones => None,
        })
    }
}

impl Change {
    /// Writes all that is new, durably, to clusters that are counted; returns where the directory is.
    pub fn write(&self, ledger: &mut Ledger<'_>) -> Result<HostOffset> {
        let mut directory = self.directory.clone();
        for table in &self.tables {
            let mut words = table.words.clone();
            if let Some((number, bits)) = &table.bits {
                let at = ledger.write_row(bits, Kind::BitmapData)?;
                if let Some(word) = words.get_mut(*number) {
                    *word = Stored::At(at).encode();
                }
            }
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            let at = ledger.write_row(&bytes, Kind::BitmapTable)?;
            if let Some(entry) = directory.entries.get_mut(table.entry) {
                entry.table_at = at.0;
                entry.table_entries = u32::try_from(words.len()).unwrap_or(u32::MAX);
            }
        }
        let at = ledger.write_row(&directory.bytes(), Kind::BitmapDirectory)?;
        ledger.write_out()?;
        Ok(at)
    }

    /// Gives the disk `size` bytes, and its bitmaps the directory at `at`, in the header. Whoever changes the file has
    /// seen to features that nobody here knows.
    pub fn switch(&self, image: &Arc<dyn Storage>, header: &Header, size: u64, at: HostOffset) -> Result<()> {
        self.try_switch(image, header, size, at).map_err(|error| {
            let text = "the size was being changed, and the dirty bitmaps may be lost by that: begin with a full backup";
            Error::new(error.kind(), text).with_source(error)
        })
    }

    fn try_switch(&self, image: &Arc<dyn Storage>, header: &Header, size: u64, at: HostOffset) -> Result<()> {
        let known = header.autoclear & (Autoclear::BITMAPS | Autoclear::DATA_FILE_RAW);
        let promise = |bits: Autoclear| {
            write(image, AUTOCLEAR_AT, &bits.bits().to_be_bytes())?;
            sync(image)
        };
        promise(known - Autoclear::BITMAPS)?;
        write(image, SIZE_AT, &size.to_be_bytes())?;
        let directory_at = HostOffset(self.directory.extension_at.0 + DIRECTORY_OFFSET_AT);
        write(image, directory_at, &at.0.to_be_bytes())?;
        sync(image)?;
        promise(known)
    }

    /// Lets go of what nothing leads to any more.
    pub fn free_old(&self, ledger: &mut Ledger<'_>) -> Result<()> {
        self.old.iter().try_for_each(|(at, len)| ledger.leave(*at, *len))?;
        ledger.write_out()?;
        Ok(())
    }
}

/// The bytes of a cluster of bits. What the file does not have reads as zeroes.
pub fn read_cluster(image: &Arc<dyn Storage>, stored: Stored, cluster_len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![if stored == Stored::Ones { u8::MAX } else { 0 }; index(cluster_len)];
    if let Stored::At(at) = stored {
        let read = image.pread(&mut bytes, at);
        read.map_err(|e| storage_error(image, "cannot read the image's dirty bitmaps", at, e))?;
    }
    Ok(bytes)
}

/// The first so many bits, and zeroes behind them.
pub fn first_bits(bytes: &[u8], count: u64) -> Vec<u8> {
    let mut kept = bytes.to_vec();
    let whole = index(count / 8);
    kept.get_mut(index(count.div_ceil(8))..).unwrap_or_default().fill(0);
    if let Some(last) = kept.get_mut(whole).filter(|_| !count.is_multiple_of(8)) {
        *last &= u8::MAX >> (8 - count % 8);
    }
    kept
}

/// A count of words or bytes as one of memory; all are bounded by what a bitmap may have.
fn index(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
