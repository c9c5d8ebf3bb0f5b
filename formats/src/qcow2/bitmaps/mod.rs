//! Persistent dirty bitmaps: which parts of the disk were written since somebody asked.
//!
//! | module | what is in it |
//! |---|---|
//! | `directory` | the list of an image's bitmaps |
//! | `table` | the bits of one in the file |
//! | `live`, `overlay` | one of an image that is written: the bits that the file does not have yet |
//! | `page` | pages of bits and their runs |
//!
//! A reader of the disk does not depend on bitmaps: a directory that makes no sense yields an empty list
//! and a warning, and fails whoever asks for a bitmap by name.

pub mod directory;
mod live;
mod overlay;
mod page;
pub mod table;

use std::collections::HashMap;
use std::ops::ControlFlow;

use super::header::{Autoclear, Header};
use crate::address::GuestRange;
use crate::driver::{BlockDriver, Status, StatusQuery, StatusVisitor};
use crate::error::{Error, ErrorKind, Result};
use crate::info::BitmapInfo;
use crate::storage::Storage;
use crate::sync::{Arc, Mutex};
pub use directory::{Directory, Entry, Flags};
pub use live::{ClusterBits, LiveBitmap, part_of};
use page::Runs;
pub use page::visit;
pub use table::{Stored, StoredBitmap};

/// Most bytes of tables over all bitmaps of an image that is written. Our choice: all that bitmaps may have that are
/// removed one by one (2^23 clusters of bits), and what a machine can spare for an image.
pub const TABLES_LEN_MAX: u64 = 64 << 20;

/// The directory of an image's bitmaps, and the tables that it leads to, in the same order.
pub struct Tables {
    /// The directory.
    pub directory: Directory,
    /// The tables.
    pub stored: Vec<Arc<StoredBitmap>>,
}

/// The bitmaps of an image.
pub struct Bitmaps {
    directory: Directory,
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
            Some(_) | None => Ok(Directory::default()),
        };
        let (directory, damage) = match found {
            Ok(directory) => (directory, None),
            Err(damage) => {
                let path = &storage.facts().path;
                tracing::warn!(?path, damage, "the directory of dirty bitmaps is damaged; none are listed");
                (Directory::default(), Some(damage))
            }
        };
        Bitmaps { directory, damage, offered: Mutex::new(HashMap::new()) }
    }

    /// What people want to know of them.
    pub fn info(&self) -> Vec<BitmapInfo> {
        let info = |entry: &Entry| BitmapInfo {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            granularity: entry.granularity(),
            flags: entry.flag_names(),
        };
        self.directory.entries.iter().map(info).collect()
    }

    /// Makes a bitmap ready for [`visit`](Self::visit). `false`: there is none of that name. Fails if it
    /// does not tell what is dirty.
    pub fn offer(&self, storage: &Arc<dyn Storage>, header: &Header, name: &str) -> Result<bool> {
        self.check_directory(storage, "without --bitmap it can be served read-only")?;
        let Some(entry) = self.directory.entries.iter().find(|entry| *entry.name == *name.as_bytes()) else {
            return Ok(false);
        };
        self.check_usable(storage, header, entry)?;
        let bitmap = StoredBitmap::load(storage, header, entry)?;
        self.offered.lock().insert(entry.name.clone(), Arc::new(bitmap));
        Ok(true)
    }

    /// Loads all tables, for whoever writes the image. Fails if one of them makes no sense, or could not be
    /// kept as its flags want it.
    pub fn load_tables(&self, storage: &Arc<dyn Storage>, header: &Header) -> Result<Tables> {
        self.check_directory(storage, "use --read-only, or repair it (qemu-img check)")?;
        // Before memory is taken for any: several may lie in the same place of a short file.
        let tables_len: u64 = self.directory.entries.iter().map(Entry::table_len).sum();
        if tables_len > TABLES_LEN_MAX {
            let text = format!(
                "the tables of the image's dirty bitmaps have {tables_len} bytes together, and {TABLES_LEN_MAX} are \
                 the most for it to be written; use --read-only, or remove some (qemu-img bitmap --remove)"
            );
            return Err(Error::new(ErrorKind::Unsupported, text).with_path(&storage.facts().path));
        }
        let load = |entry: &Entry| {
            check_shape(storage, header, entry)?;
            if entry.records() {
                check_known(storage, entry)?;
            }
            StoredBitmap::load(storage, header, entry).map(Arc::new)
        };
        let stored = self.directory.entries.iter().map(load).collect::<Result<_>>()?;
        Ok(Tables { directory: self.directory.clone(), stored })
    }

    /// Fails unless the bitmap tells what is dirty.
    pub fn check_usable(&self, storage: &Arc<dyn Storage>, header: &Header, entry: &Entry) -> Result<()> {
        check_shape(storage, header, entry)?;
        check_known(storage, entry)?;
        if entry.flags.contains(Flags::IN_USE) {
            let path = &storage.facts().path;
            let name = entry.shown_name();
            let text = format!(
                "the bitmap '{name}' does not tell what is dirty: whoever used the image last has not stored it \
                 (after a crash), or uses it now; remove it (nbd-img bitmap remove) and begin with a full backup"
            );
            return Err(Error::new(ErrorKind::Corrupt, text).with_path(path));
        }
        Ok(())
    }

    fn check_directory(&self, storage: &Arc<dyn Storage>, remedy: &str) -> Result<()> {
        let Some(damage) = &self.damage else { return Ok(()) };
        let text = format!(
            "the image is damaged: its directory of dirty bitmaps makes no sense ({damage}); {remedy}"
        );
        Err(Error::new(ErrorKind::Corrupt, text).with_path(&storage.facts().path))
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
        visit(range, bitmap.granularity(), |page| bitmap.page(storage, page), visitor)?;
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

fn check_shape(storage: &Arc<dyn Storage>, header: &Header, entry: &Entry) -> Result<()> {
    entry.check(header.geometry).map_err(|why| unusable(storage, entry, &why))
}

fn check_known(storage: &Arc<dyn Storage>, entry: &Entry) -> Result<()> {
    let why = "it must not be used without knowing its extra data, which nobody here does";
    if entry.is_known() { Ok(()) } else { Err(unusable(storage, entry, why)) }
}

fn unusable(storage: &Arc<dyn Storage>, entry: &Entry, why: &str) -> Error {
    let text = format!("the bitmap '{}' cannot be used: {why}", entry.shown_name());
    Error::new(ErrorKind::Unsupported, text).with_path(&storage.facts().path)
}
