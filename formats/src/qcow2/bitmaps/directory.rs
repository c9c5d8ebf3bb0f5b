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
const COUNT_MAX: u64 = 65535;
/// Longest directory. Our choice: 65535 bitmaps with names of 30 bytes, where QEMU has 64 MiB, so that a
/// chain of hostile images takes little memory.
const DIRECTORY_LEN_MAX: u64 = 4 << 20;
/// Bytes of an entry before its extra data (specification, "Bitmap directory").
const ENTRY_LEN: usize = 24;
/// Where the flags stand in an entry (specification).
const FLAGS_AT: u64 = 12;
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

/// The directory of an image, and where it is.
#[derive(Clone, Default, Debug)]
pub struct Directory {
    /// Where the data of the header extension that points to it lies.
    pub extension_at: HostOffset,
    /// Where it lies.
    pub at: HostOffset,
    /// Its bytes; 0 if there is none.
    pub len: u64,
    /// The bitmaps.
    pub entries: Vec<Entry>,
}

impl Directory {
    /// The number of each entry, where its flags stand, and what they are.
    pub fn all_flags(&self) -> impl Iterator<Item = (usize, HostOffset, Flags)> {
        let mut next = self.at.0;
        self.entries.iter().enumerate().map(move |(index, entry)| {
            let at = HostOffset(next + FLAGS_AT);
            next += entry.len();
            (index, at, entry.flags)
        })
    }

    /// Whether it can be written. The error says why not.
    pub fn check_size(&self) -> Result<(), String> {
        check_size(self.entries.len() as u64, self.bytes().len() as u64)
    }

    /// The directory as it stands in the file.
    pub fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(Entry::bytes).collect()
    }
}

/// Reads the directory that the header points to. The error says what is wrong with it.
pub fn read(
    storage: &Arc<dyn Storage>,
    geometry: Geometry,
    extension: BitmapsExtension,
) -> Result<Directory, String> {
    let BitmapsExtension { count, directory_len, directory_at, data_at, is_last: _ } = extension;
    check_size(u64::from(count), directory_len)?;
    if !geometry.is_aligned(directory_at) {
        return Err(format!("it cannot lie at {directory_at:#x}"));
    }
    let file_len = storage.len().map_err(|error| format!("the file's length cannot be told: {error}"))?;
    if directory_at.checked_add(directory_len).is_none_or(|end| end > file_len) {
        return Err("the file ends inside of it".to_owned());
    }
    let mut bytes = vec![0; usize::try_from(directory_len).unwrap_or(0)];
    read_exact(storage, HostOffset(directory_at), &mut bytes).map_err(|error| error.to_string())?;
    let entries = parse(&bytes, count)?;
    Ok(Directory {
        extension_at: HostOffset(data_at),
        at: HostOffset(directory_at),
        len: directory_len,
        entries,
    })
}

fn check_size(count: u64, len: u64) -> Result<(), String> {
    if count > COUNT_MAX || len > DIRECTORY_LEN_MAX {
        return Err(format!("{count} bitmaps in a directory of {len} bytes are too many"));
    }
    Ok(())
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
    /// That of a bitmap without extra data.
    pub fn new(name: &[u8], granularity_bits: u8, flags: Flags, table_at: u64, table_entries: u32) -> Self {
        let kind = TYPE_DIRTY_TRACKING;
        Entry {
            table_at,
            table_entries,
            flags,
            kind,
            granularity_bits,
            extra: Box::default(),
            name: name.into(),
        }
    }

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
        if !granularity.contains(&self.granularity_bits) {
            return Err(format!(
                "its granularity of 2^{} bytes is not supported (2^9 to 2^31 are)",
                self.granularity_bits
            ));
        }
        if self.name.is_empty() || self.name.len() > NAME_LEN_MAX {
            return Err(format!("its name has {} bytes (1 to {NAME_LEN_MAX} are possible)", self.name.len()));
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

    /// Whether whoever writes the image records changes in it.
    pub fn records(&self) -> bool {
        self.flags.contains(Flags::AUTO) && !self.flags.contains(Flags::IN_USE)
    }

    /// Whether it may be used: it has no extra data, or may be used without knowing that. Such data is left
    /// as it is (specification).
    pub fn is_known(&self) -> bool {
        self.extra.is_empty() || self.flags.contains(Flags::EXTRA_COMPATIBLE)
    }

    /// Bytes of its table.
    pub fn table_len(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Bytes of the entry in the file, with its padding.
    fn len(&self) -> u64 {
        ((ENTRY_LEN + self.extra.len() + self.name.len()).next_multiple_of(ENTRY_UNIT)) as u64
    }

    /// The entry as it stands in the file, with its padding.
    pub fn bytes(&self) -> Vec<u8> {
        let name_len = u16::try_from(self.name.len()).unwrap_or(u16::MAX);
        let extra_len = u32::try_from(self.extra.len()).unwrap_or(u32::MAX);
        let mut bytes = self.table_at.to_be_bytes().to_vec();
        bytes.extend(self.table_entries.to_be_bytes());
        bytes.extend(self.flags.bits().to_be_bytes());
        bytes.extend([self.kind, self.granularity_bits]);
        bytes.extend(name_len.to_be_bytes());
        bytes.extend(extra_len.to_be_bytes());
        bytes.extend(&*self.extra);
        bytes.extend(&*self.name);
        bytes.resize(bytes.len().next_multiple_of(ENTRY_UNIT), 0);
        bytes
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
