//! The snapshot table: a list of records of any length, read in pieces of bounded size.
//!
//! It finds and checks snapshots; what they hold is reached through their L1 tables like the active state.

use super::extensions::{be_u32, be_u64};
use super::header::{Header, L1_LEN_MAX, TableLocation, check_place};
use crate::address::HostOffset;
use crate::error::{Error, ErrorKind, Result};
use crate::info::SnapshotInfo;
use crate::mover::storage_error;
use crate::storage::Storage;
use crate::sync::Arc;

/// Bytes of a record before its extra data (specification, "Snapshots").
const RECORD_LEN: usize = 40;
/// Largest extra data (QEMU's limit).
const EXTRA_LEN_MAX: usize = 1024;
/// Largest snapshot table (QEMU's limit).
const TABLE_LEN_MAX: u64 = 64 << 20;
/// Most snapshots that an error names. Our choice: a line that can be read.
const NAMED_MAX: usize = 16;

/// An internal snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Unique in the image.
    id: Box<[u8]>,
    /// For people; need not be unique.
    name: Box<[u8]>,
    /// Its L1 table; unchecked until [`checked_l1`](Self::checked_l1).
    l1: TableLocation,
    /// Size of the guest's disk then, if it was recorded.
    disk_size: Option<u64>,
    vm_state_len: u64,
    date_seconds: u32,
}

impl Snapshot {
    /// Size of the guest's disk that the snapshot holds.
    pub fn virtual_size(&self, header: &Header) -> u64 {
        self.disk_size.unwrap_or(header.virtual_size)
    }

    /// Bytes that its L1 table claims to have.
    pub fn l1_len(&self) -> u64 {
        u64::from(self.l1.entries) * 8
    }

    /// The L1 table, after checking that it can be one and covers a disk size that the snapshot states.
    pub fn checked_l1(&self, header: &Header) -> Result<TableLocation> {
        let len = self.l1_len();
        let needed = self.disk_size.map_or(0, |size| header.geometry.l1_entries_for(size));
        if len > L1_LEN_MAX || u64::from(self.l1.entries) < needed {
            return Err(corrupt(format!(
                "the L1 table of snapshot '{}' has an impossible length of {len} bytes",
                text(&self.name).escape_debug()
            )));
        }
        check_place("snapshot's L1 table", self.l1.at.0, len, header.geometry)?;
        Ok(self.l1)
    }

    /// What people want to know of it.
    pub fn info(&self, header: &Header) -> SnapshotInfo {
        SnapshotInfo {
            id: text(&self.id),
            name: text(&self.name),
            virtual_size: self.virtual_size(header),
            vm_state_len: self.vm_state_len,
            date_seconds: self.date_seconds,
        }
    }
}

/// Reads the snapshot table of the image in `storage`; returns the length of the table, too.
pub fn load(storage: &Arc<dyn Storage>, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut at = header.snapshots.at;
    let mut snapshots = Vec::new();
    let mut table_len = 0u64;
    for _ in 0..header.snapshots.entries {
        let (snapshot, record_len) =
            read_record(storage, at).map_err(|e| e.with_path(&storage.facts().path).with_offset(at.0))?;
        snapshots.push(snapshot);
        table_len += record_len;
        at = at.checked_add(record_len).ok_or_else(|| corrupt("the snapshot table has no end".to_owned()))?;
        if table_len > TABLE_LEN_MAX {
            return Err(corrupt(format!("the snapshot table is larger than {TABLE_LEN_MAX} bytes")));
        }
    }
    Ok((snapshots, table_len))
}

/// The snapshot that `wanted` names: by its id first, then by its name, as QEMU does.
pub fn find<'a>(snapshots: &'a [Snapshot], wanted: &str) -> Result<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| *snapshot.id == *wanted.as_bytes());
    let by_name = || snapshots.iter().find(|snapshot| *snapshot.name == *wanted.as_bytes());
    by_id.or_else(by_name).ok_or_else(|| {
        let named =
            |s: &Snapshot| format!("{} '{}'", text(&s.id).escape_debug(), text(&s.name).escape_debug());
        let names: Vec<String> = snapshots.iter().take(NAMED_MAX).map(named).collect();
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Error::new(
            ErrorKind::InvalidInput,
            format!("there is no snapshot '{}' (--load-snapshot); there are: {there}", wanted.escape_debug()),
        )
    })
}

fn read_record(storage: &Arc<dyn Storage>, at: HostOffset) -> Result<(Snapshot, u64)> {
    let mut head = [0u8; RECORD_LEN];
    read_table(storage, at, &mut head)?;
    let record = Record::parse(&head).ok_or_else(|| corrupt("a snapshot record is too short".to_owned()))?;
    if record.extra_len > EXTRA_LEN_MAX {
        return Err(corrupt(format!("a snapshot has {} bytes of extra data", record.extra_len)));
    }
    let mut tail = vec![0u8; record.extra_len + record.id_len + record.name_len];
    let tail_at =
        at.checked_add(RECORD_LEN as u64).ok_or_else(|| corrupt("a snapshot lies too far".to_owned()))?;
    read_table(storage, tail_at, &mut tail)?;
    let (extra, strings) = tail.split_at(record.extra_len);
    let (id, name) = strings.split_at(record.id_len);
    let snapshot = Snapshot {
        id: id.into(),
        name: name.into(),
        l1: record.l1,
        // Version 3 demands both, but QEMU opens images without them.
        disk_size: be_u64(extra, 8),
        vm_state_len: be_u64(extra, 0).unwrap_or(u64::from(record.vm_state_len)),
        date_seconds: record.date_seconds,
    };
    Ok((snapshot, (RECORD_LEN + tail.len()).next_multiple_of(8) as u64))
}

fn read_table(storage: &Arc<dyn Storage>, at: HostOffset, buf: &mut [u8]) -> Result<()> {
    let fail = |e| storage_error(storage, "cannot read the snapshot table", at, e);
    if storage.pread(buf, at).map_err(fail)? < buf.len() {
        return Err(corrupt("the file ends inside of the snapshot table".to_owned()));
    }
    Ok(())
}

/// The fields of a record that have a fixed place.
struct Record {
    l1: TableLocation,
    id_len: usize,
    name_len: usize,
    date_seconds: u32,
    vm_state_len: u32,
    extra_len: usize,
}

impl Record {
    fn parse(head: &[u8; RECORD_LEN]) -> Option<Self> {
        Some(Record {
            l1: TableLocation { at: HostOffset(be_u64(head, 0)?), entries: be_u32(head, 8)? },
            id_len: usize::from(u16::from_be_bytes(*head.get(12..)?.first_chunk()?)),
            name_len: usize::from(u16::from_be_bytes(*head.get(14..)?.first_chunk()?)),
            date_seconds: be_u32(head, 16)?,
            vm_state_len: be_u32(head, 32)?,
            extra_len: usize::try_from(be_u32(head, 36)?).ok()?,
        })
    }
}

/// For people; what is not UTF-8 is replaced.
fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}
