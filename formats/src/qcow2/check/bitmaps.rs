//! The clusters of persistent bitmaps: the directory, the tables, and what the tables name.
//!
//! Only where they lie; what the bits say does not matter here.

use super::read_padded;
use super::walk::Walk;
use crate::address::HostOffset;
use crate::qcow2::extensions::{BitmapsExtension, be_u32, be_u64};
use crate::qcow2::header::Autoclear;

/// Most bitmaps (QEMU's limit).
const COUNT_MAX: u32 = 65535;
/// Largest directory (QEMU's limit: 1 KiB for each bitmap).
const DIRECTORY_LEN_MAX: u64 = 64 << 20;
/// Most bytes of tables over all bitmaps. Our choice: a thousand bitmaps at 64 KiB of a disk of 64 TiB, with
/// clusters of 64 KiB, need a tenth.
const TABLES_LEN_MAX: u64 = 1 << 30;
/// Bytes of an entry before its extra data (specification, "Bitmap directory").
const ENTRY_LEN: usize = 24;
/// Bits of a table's entry that must be zero (specification: 1 to 8 and 56 to 63).
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// Counts the clusters of all bitmaps that are valid; those that somebody has written past belong to nobody.
pub fn walk(walk: &Walk<'_>) {
    let header = walk.subject.header;
    let Some(extension) = header.extensions.bitmaps else { return };
    if extension.count == 0 || !header.autoclear.contains(Autoclear::BITMAPS) {
        return;
    }
    let at = HostOffset(extension.directory_at);
    let aligned = walk.geometry().is_aligned(at.0);
    if extension.count > COUNT_MAX || extension.directory_len > DIRECTORY_LEN_MAX || !aligned {
        return walk.bad_entry(1, || "the directory of bitmaps cannot be one".to_owned());
    }
    walk.refer(at, extension.directory_len, 1, || "the directory of bitmaps".to_owned());
    let mut budget = TABLES_LEN_MAX;
    if directory(walk, extension, &mut budget).is_none() {
        walk.bad_entry(1, || "the directory of bitmaps is damaged".to_owned());
    }
}

fn directory(walk: &Walk<'_>, extension: BitmapsExtension, budget: &mut u64) -> Option<()> {
    let mut at = extension.directory_at;
    let end = at.checked_add(extension.directory_len)?;
    for number in 0..extension.count {
        let mut head = [0u8; ENTRY_LEN];
        if at.checked_add(ENTRY_LEN as u64)? > end {
            return None;
        }
        if let Err(error) = read_padded(walk.subject.image, HostOffset(at), &mut head) {
            walk.unreadable(|| format!("the directory of bitmaps cannot be read: {error}"));
            return Some(());
        }
        let [.., n0, n1, _, _, _, _] = head;
        let tail = u64::from(u16::from_be_bytes([n0, n1])) + u64::from(be_u32(&head, 20)?);
        table(walk, number, HostOffset(be_u64(&head, 0)?), u64::from(be_u32(&head, 8)?), budget);
        at += (ENTRY_LEN as u64 + tail).next_multiple_of(8);
    }
    Some(())
}

fn table(walk: &Walk<'_>, number: u32, at: HostOffset, entries: u64, budget: &mut u64) {
    let what = format!("the table of bitmap {number}");
    let geometry = walk.geometry();
    let inside = at.0.checked_add(entries * 8).is_some_and(|end| end <= walk.subject.file_len);
    if at.0 == 0 || !geometry.is_aligned(at.0) || !inside || entries * 8 > *budget {
        return walk.bad_entry(1, || format!("{what} ({entries} entries at {at}) cannot be one"));
    }
    *budget -= entries * 8;
    walk.refer(at, entries * 8, 1, || what.clone());
    walk.words(&what, at, entries, |index, raw| {
        let named = || format!("{what}, entry {index} ({raw:#x})");
        let host = geometry.offset_in(raw);
        if raw & TABLE_RESERVED != 0 || !geometry.is_aligned(host.0) {
            walk.bad_entry(1, || format!("{}: it makes no sense", named()));
        } else if host.0 != 0 {
            walk.refer(host, geometry.cluster_len(), 1, named);
        }
    });
}
