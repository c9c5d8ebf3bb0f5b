//! The directory of an image's bitmaps: records of any length, one for each bitmap.
//!
//! What is found here has the shape of a directory and no more; whether a bitmap can be used is asked of
//! each [`Entry`] apart.

use bitflags::bitflags;

use super::super::extensions::{BitmapsExtension, be_u32, be_u64};
use super::super::types::Geometry;
use crate::address::HostOffset;
use crate::mover::read_exact;
use crate::storage::Storage;
use crate::sync::Arc;

/// Most bitmaps (QEMU's limit).
const COUNT_MAX: u32 = 65535;
/// Longest directory. Our choice: 65535 bitmaps with names of 30 bytes, where QEMU has 64 MiB, so that a
/// chain of hostile images takes little memory.
const DIRECTORY_LEN_MAX: u64 = 4 << 20;
/// Bytes of an entry before its extra data (specification, "Bitmap directory").
const ENTRY_LEN: usize = 24;
/// Entries begin at multiples of this (specification).
const ENTRY_UNIT: usize = 8;
/// Longest name (QEMU's limit).
pub const NAME_LEN_MAX: usize = 1023;
/// Smallest granularity (QEMU's limit).
pub const GRANULARITY_BITS_MIN: u8 = 9;
/// Largest granularity (QEMU's limit).
pub const GRANULARITY_BITS_MAX: u8 = 31;
/// Larger ones do not exist (specification).
const GRANULARITY_BITS_END: u8 = 63;
/// Most bytes of bits of one bitmap, in whole clusters (QEMU's limit).
pub const DATA_LEN_MAX: u64 = 512 << 20;
/// The type of a dirty tracking bitmap (specification); there is no other.
const TYPE_DIRTY_TRACKING: u8 = 1;

bitflags! {
    /// Flags of a bitmap, with those that nobody here knows.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Flags: u32 {
        /// Its bits are not up to date: whoever changed the disk has not stored them.
        const IN_USE = 1 << 0;
        /// Changes of the disk are to be recorded in it.
        const AUTO = 1 << 1;
        /// It may be used without knowing its extra data.
        const EXTRA_COMPATIBLE = 1 << 2;
        const _ = !0;
    }
}

/// Names of the flags, for people.
const FLAG_NAMES: [(Flags, &str); 3] =
    [(Flags::IN_USE, "in-use"), (Flags::AUTO, "auto"), (Flags::EXTRA_COMPATIBLE, "extra-data-compatible")];

/// What the directory says of a bitmap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Where its table lies.
    pub table_at: u64,
    /// Entries of the table.
    pub table_entries: u32,
    /// Flags.
    pub flags: Flags,
    /// What sort of bitmap it is.
    kind: u8,
    /// One bit stands for two to the power of this bytes of the disk.
    pub granularity_bits: u8,
    /// Data that nobody here knows.
    extra: Box<[u8]>,
    /// Unique in the image.
    pub name: Box<[u8]>,
}

/// Reads the directory that the header points to. The error says what is wrong with it.
pub fn read(
    storage: &Arc<dyn Storage>,
    geometry: Geometry,
    extension: BitmapsExtension,
) -> Result<Vec<Entry>, String> {
    let BitmapsExtension { count, directory_len, directory_at } = extension;
    if count > COUNT_MAX || directory_len > DIRECTORY_LEN_MAX {
        return Err(format!("{count} bitmaps in a directory of {directory_len} bytes are too many"));
    }
    if !geometry.is_aligned(directory_at) {
        return Err(format!("it cannot lie at {directory_at:#x}"));
    }
    let file_len = storage.len().map_err(|error| format!("the file's length cannot be told: {error}"))?;
    if directory_at.checked_add(directory_len).is_none_or(|end| end > file_len) {
        return Err("the file ends inside of it".to_owned());
    }
    let mut bytes = vec![0; usize::try_from(directory_len).unwrap_or(0)];
    read_exact(storage, HostOffset(directory_at), &mut bytes).map_err(|error| error.to_string())?;
    parse(&bytes, count)
}

/// The entries in the bytes of a directory, which they fill.
fn parse(bytes: &[u8], count: u32) -> Result<Vec<Entry>, String> {
    let mut entries = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut rest = bytes;
    for number in 0..count {
        let split = Entry::split(rest);
        let (entry, behind) = split.ok_or_else(|| format!("entry {number} does not fit into it"))?;
        rest = behind;
        if !names.insert(entry.name.clone()) {
            return Err(format!("two bitmaps have the name '{}'", entry.shown_name()));
        }
        entries.push(entry);
    }
    if rest.is_empty() { Ok(entries) } else { Err("it is longer than its entries".to_owned()) }
}

impl Entry {
    fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let head: &[u8; ENTRY_LEN] = bytes.first_chunk()?;
        let [.., kind, granularity_bits, n0, n1, _, _, _, _] = *head;
        if granularity_bits > GRANULARITY_BITS_END {
            return None;
        }
        let name_len = usize::from(u16::from_be_bytes([n0, n1]));
        let extra_len = usize::try_from(be_u32(head, 20)?).ok()?;
        let name_at = ENTRY_LEN.checked_add(extra_len)?;
        let end = name_at.checked_add(name_len)?;
        let entry = Entry {
            table_at: be_u64(head, 0)?,
            table_entries: be_u32(head, 8)?,
            flags: Flags::from_bits_retain(be_u32(head, 12)?),
            kind,
            granularity_bits,
            extra: bytes.get(ENTRY_LEN..name_at)?.into(),
            name: bytes.get(name_at..end).filter(|name| !name.is_empty())?.into(),
        };
        Some((entry, bytes.get(end.checked_next_multiple_of(ENTRY_UNIT)?..)?))
    }

    /// Whether a bitmap like this one can be, and is one that is known here. The error says why not.
    pub fn check(&self, geometry: Geometry) -> Result<(), String> {
        let unknown = self.flags.bits() >> FLAG_NAMES.len();
        let granularity = GRANULARITY_BITS_MIN..=GRANULARITY_BITS_MAX;
        if self.kind != TYPE_DIRTY_TRACKING {
            return Err(format!("its type {} is not known", self.kind));
        }
        if unknown != 0 {
            return Err(format!("its flags {:#x} are not known", self.flags.bits()));
        }
        if !self.extra.is_empty() && !self.flags.contains(Flags::EXTRA_COMPATIBLE) {
            return Err(
                "it must not be used without knowing its extra data, which nobody here does".to_owned()
            );
        }
        if !granularity.contains(&self.granularity_bits) {
            return Err(format!(
                "its granularity of 2^{} bytes is not supported (2^9 to 2^31 are)",
                self.granularity_bits
            ));
        }
        if self.name.len() > NAME_LEN_MAX {
            return Err(format!("its name has {} bytes ({NAME_LEN_MAX} are the most)", self.name.len()));
        }
        let data_len = u64::from(self.table_entries) * geometry.cluster_len();
        if self.table_entries == 0 || data_len > DATA_LEN_MAX {
            return Err(format!("it cannot have {data_len} bytes of bits"));
        }
        if self.table_at == 0 || !geometry.is_aligned(self.table_at) {
            return Err(format!("its table cannot lie at {:#x}", self.table_at));
        }
        Ok(())
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Names of its flags, for people.
    pub fn flag_names(&self) -> Vec<String> {
        let set = FLAG_NAMES.iter().filter(|(flag, _)| self.flags.contains(*flag));
        set.map(|(_, name)| (*name).to_owned()).collect()
    }

    /// Its name, for people; what is not UTF-8 is replaced.
    pub fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).escape_debug().to_string()
    }
}
