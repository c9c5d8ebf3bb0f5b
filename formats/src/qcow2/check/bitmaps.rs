//! The clusters of persistent bitmaps: the directory, the tables, and what the tables name.
//!
//! Only where they lie; what the bits say does not matter here.

use super::walk::Walk;
use crate::address::HostOffset;
use crate::qcow2::bitmaps::directory;
use crate::qcow2::bitmaps::table::RESERVED;
use crate::qcow2::header::Autoclear;

/// Most bytes of tables over all bitmaps. Our choice: a thousand bitmaps at 64 KiB of a disk of 64 TiB, with
/// clusters of 64 KiB, need a tenth.
const TABLES_LEN_MAX: u64 = 1 << 30;

/// Counts the clusters of all bitmaps that are valid; those that somebody has written past belong to nobody.
pub fn walk(walk: &Walk<'_>) {
    let header = walk.subject.header;
    let Some(extension) = header.extensions.bitmaps else { return };
    if extension.count == 0 || !header.autoclear.contains(Autoclear::BITMAPS) {
        return;
    }
    let at = HostOffset(extension.directory_at);
    walk.refer(at, extension.directory_len, 1, || "the directory of bitmaps".to_owned());
    let entries = match directory::read(walk.subject.image, header.geometry, extension) {
        Ok(directory) => directory.entries,
        Err(why) => return walk.bad_entry(1, || format!("the directory of bitmaps makes no sense: {why}")),
    };
    let mut budget = TABLES_LEN_MAX;
    for entry in entries {
        table(walk, &entry, &mut budget);
    }
}

fn table(walk: &Walk<'_>, entry: &directory::Entry, budget: &mut u64) {
    let what = format!("the table of bitmap '{}'", entry.shown_name());
    let (at, entries) = (HostOffset(entry.table_at), u64::from(entry.table_entries));
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
        if raw & RESERVED != 0 || !geometry.is_aligned(host.0) {
            walk.bad_entry(1, || format!("{}: it makes no sense", named()));
        } else if host.0 != 0 {
            walk.refer(host, geometry.cluster_len(), 1, named);
        }
    });
}
