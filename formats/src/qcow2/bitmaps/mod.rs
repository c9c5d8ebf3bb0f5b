//! Persistent dirty bitmaps: which parts of the disk were written since somebody asked.
//!
//! | module | what is in it |
//! |---|---|
//! | `directory` | the list of an image's bitmaps |
//! | `table` | the bits of one in the file |
//! | `page` | pages of bits and their runs |
//!
//! A reader of the disk does not depend on bitmaps: a directory that makes no sense yields an empty list
//! and a warning, and fails whoever asks for a bitmap by name.

mod directory;
mod page;
mod table;

use std::collections::HashMap;
use std::ops::ControlFlow;

use super::header::{Autoclear, Header};
use crate::address::GuestRange;
use crate::driver::{BlockDriver, Status, StatusQuery, StatusVisitor};
use crate::error::{Error, ErrorKind, Result};
use crate::info::BitmapInfo;
use crate::storage::Storage;
use crate::sync::{Arc, Mutex};
use directory::{Entry, Flags};
use page::Runs;
use table::StoredBitmap;

/// The bitmaps of an image.
pub struct Bitmaps {
    entries: Vec<Entry>,
    /// What is wrong with the directory.
    damage: Option<String>,
    /// Those that were asked for.
    offered: Mutex<HashMap<Box<[u8]>, Arc<StoredBitmap>>>,
}

impl Bitmaps {
    /// Reads the directory of the image in `storage`.
    pub fn load(storage: &Arc<dyn Storage>, header: &Header) -> Self {
        let found = match header.extensions.bitmaps {
            // Without the bit somebody has written without knowing of bitmaps: they are stale.
            Some(extension) if header.autoclear.contains(Autoclear::BITMAPS) => {
                directory::read(storage, header.geometry, extension)
            }
            Some(_) | None => Ok(Vec::new()),
        };
        let (entries, damage) = match found {
            Ok(entries) => (entries, None),
            Err(damage) => {
                let path = &storage.facts().path;
                tracing::warn!(?path, damage, "the directory of dirty bitmaps is damaged; none are listed");
                (Vec::new(), Some(damage))
            }
        };
        Bitmaps { entries, damage, offered: Mutex::new(HashMap::new()) }
    }

    /// What people want to know of them.
    pub fn info(&self) -> Vec<BitmapInfo> {
        let info = |entry: &Entry| BitmapInfo {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            granularity: entry.granularity(),
            flags: entry.flag_names(),
        };
        self.entries.iter().map(info).collect()
    }

    /// Makes a bitmap ready for [`visit`](Self::visit). `false`: there is none of that name. Fails if it
    /// does not tell what is dirty.
    pub fn offer(&self, storage: &Arc<dyn Storage>, header: &Header, name: &str) -> Result<bool> {
        if let Some(damage) = &self.damage {
            let text = format!(
                "the image is damaged: its directory of dirty bitmaps makes no sense ({damage}); without \
                 --bitmap it can be served"
            );
            return Err(Error::new(ErrorKind::Corrupt, text).with_path(&storage.facts().path));
        }
        let Some(entry) = self.entries.iter().find(|entry| *entry.name == *name.as_bytes()) else {
            return Ok(false);
        };
        check_usable(storage, header, entry)?;
        let bitmap = StoredBitmap::load(storage, header, entry)?;
        self.offered.lock().insert(entry.name.clone(), Arc::new(bitmap));
        Ok(true)
    }

    /// Visits the runs of `range`. `false`: no bitmap of that name was [offered](Self::offer).
    pub fn visit(
        &self,
        storage: &Arc<dyn Storage>,
        name: &str,
        range: GuestRange,
        visitor: StatusVisitor<'_>,
    ) -> Result<bool> {
        let Some(bitmap) = self.offered.lock().get(name.as_bytes()).cloned() else { return Ok(false) };
        page::visit(range, bitmap.granularity(), |page| bitmap.page(storage, page), visitor)?;
        Ok(true)
    }
}

/// Visits the runs of `range` in a bitmap of the image below. Behind the end of that one nothing is dirty,
/// as with QEMU.
pub fn visit_below(
    backing: Option<&Arc<dyn BlockDriver>>,
    name: &str,
    range: GuestRange,
    visitor: StatusVisitor<'_>,
) -> Result<()> {
    let Some(backing) = backing else {
        let text = format!("no bitmap '{}' was offered", name.escape_debug());
        return Err(Error::new(ErrorKind::InvalidInput, text));
    };
    let mut runs = Runs::new(visitor);
    let there = range.prefix(backing.size().saturating_sub(range.offset()));
    let mut going_on = ControlFlow::Continue(());
    backing.status(StatusQuery::Bitmap(name), there, &mut |len, status| {
        going_on = runs.push(len, status == Status::Bitmap { dirty: true });
        going_on
    })?;
    if going_on.is_continue() && runs.push(range.len() - there.len(), false).is_continue() {
        runs.finish();
    }
    Ok(())
}

/// Fails unless the bitmap tells what is dirty.
fn check_usable(storage: &Arc<dyn Storage>, header: &Header, entry: &Entry) -> Result<()> {
    let path = &storage.facts().path;
    let name = entry.shown_name();
    if let Err(why) = entry.check(header.geometry) {
        let text = format!("the bitmap '{name}' cannot be used: {why}");
        return Err(Error::new(ErrorKind::Unsupported, text).with_path(path));
    }
    if entry.flags.contains(Flags::IN_USE) {
        let text = format!(
            "the bitmap '{name}' does not tell what is dirty: whoever used the image last has not stored it \
             (after a crash), or uses it now; remove it (qemu-img bitmap --remove) and begin with a full backup"
        );
        return Err(Error::new(ErrorKind::Corrupt, text).with_path(path));
    }
    Ok(())
}
