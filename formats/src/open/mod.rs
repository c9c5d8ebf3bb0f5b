//! From a path to a driver: the one door through which images are opened.
//!
//! | module | what is in it |
//! |---|---|
//! | `probe` | which format a file has |
//! | `policy` | which files an image may name |
//! | `chain` | the image and what lies below it |
//! | `alone` | an image file by itself |
//! | `create` | new image files |
//! | `resize` | image files of another size |
//! | `temporary` | overlays that are thrown away |

mod alone;
mod chain;
mod create;
mod policy;
mod probe;
mod resize;
mod temporary;

use std::path::{Path, PathBuf};

pub use alone::{Access, open_alone};
pub use chain::{CHAIN_MAX, change_bitmap};
pub use create::{CreateRequest, create};
pub use resize::{Resized, SizeChange, check_shrink, resize};
pub use temporary::{Overlay, temporary};

use crate::driver::{BlockDriver, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{Compress, WriteOptions};
use crate::storage::{FileOptions, FileStorage, LockMode, Storage, WindowStorage};
use crate::sync::Arc;

/// Decompressed clusters in memory unless told otherwise. Our choice: an eighth of it, 8 MiB, is as far ahead
/// of a reader as reading ahead goes on disks, with clusters of 2 MiB too; a guest's boot finds what it read again.
const CLUSTER_CACHE_LEN: u64 = 64 << 20;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format, or `None` to find it by its magic.
    pub format: Option<Format>,
    /// Whether it will be written.
    pub writable: bool,
    /// The part of the file that is the image: offset, and length if it does not go up to the end. Only read.
    pub part: Option<(u64, Option<u64>)>,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Serve a raw file to the byte instead of rounding its size up to 512.
    pub exact_size: bool,
    /// What becomes of the backing file that an image names.
    pub backing: Backing,
    /// Format of the backing file in [`Backing::Path`]; else the one that the image states.
    pub backing_format: Option<Format>,
    /// The external data file, whatever the image says.
    pub data_file: Option<PathBuf>,
    /// Which files an image may name.
    pub names: Names,
    /// Folders, besides the image's own, below which backing and data files may lie.
    pub allow_dirs: Vec<PathBuf>,
    /// Serve this internal snapshot (name or id) instead of the active state; read-only.
    pub snapshot: Option<String>,
    /// Whether a discard gives room back (`unmap`) or does nothing (`ignore`).
    pub discard: bool,
    /// Whether zeroes are written as QEMU does it; see
    /// [`WriteOptions::zeroes_as_qemu`].
    pub zeroes_as_qemu: bool,
    /// Whether whole clusters that are written are compressed, and how: qcow2 only.
    pub compress: Option<Compress>,
    /// Open read-only although somebody writes: what is read may be inconsistent.
    pub force_share: bool,
    /// Most bytes of metadata tables held in memory.
    pub table_cache_len: u64,
    /// Most bytes of decompressed clusters held in memory, over the chain; one is always made.
    pub cluster_cache_len: u64,
    /// Most bytes of bits that were set in enabled dirty bitmaps held in memory, over all of a qcow2 image's; see
    /// [`WriteOptions::bitmap_len_max`].
    pub bitmap_len_max: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            format: None,
            part: None,
            writable: false,
            direct: false,
            exact_size: false,
            backing: Backing::Follow,
            backing_format: None,
            data_file: None,
            names: Names::Confined,
            allow_dirs: Vec::new(),
            snapshot: None,
            discard: true,
            zeroes_as_qemu: false,
            compress: None,
            force_share: false,
            // As QEMU's default for L2 tables: covers 256 GiB at 64 KiB clusters.
            table_cache_len: 32 << 20,
            cluster_cache_len: CLUSTER_CACHE_LEN,
            bitmap_len_max: WriteOptions::default().bitmap_len_max,
        }
    }
}

/// What becomes of the backing file that an image names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Open it, if the policy allows its name.
    Follow,
    /// Treat the image as if it had none.
    None,
    /// Use this file instead, whatever the image says.
    Path(PathBuf),
}

/// Which files an image may name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Names {
    /// Those in its own folder or in [`OpenOptions::allow_dirs`].
    Confined,
    /// Every file and block device, found as QEMU finds it: a relative backing file beside the image, a relative
    /// data file in the current folder. For images whose maker is trusted with everything that this process can
    /// read.
    Trusted,
}

/// An open image.
pub struct Opened {
    /// What serves it.
    pub driver: Arc<dyn BlockDriver>,
    /// Whether the format was found by probing rather than stated.
    pub probed: bool,
}

/// Opens the image at `path`. The file, and every file of its chain, is locked as QEMU locks it; files that the image
/// names are opened only if [`OpenOptions::names`] allows them, and for reading, but for the data file of an image
/// that is itself opened for writing. Where no format is stated, the file is looked at first, read-only.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Opened> {
    let (format, probed) = match options.format {
        Some(format) => (format, false),
        None => (probe::probe(&part_of(look_at(path)?, options)?)?, true),
    };
    let driver = match format {
        Format::Raw | Format::MmapRaw => chain::open_raw(path, options, format, probed)?,
        Format::Qcow2 => chain::open_qcow2(path, options)?,
    };
    Ok(Opened { driver, probed })
}

/// The format of the file.
fn probe_path(path: &Path) -> Result<Format> {
    probe::probe(&look_at(path)?)
}

/// Opens the file without locking it: who may not open it is not to be in anybody's way.
fn look_at(path: &Path) -> Result<Arc<dyn Storage>> {
    let file_options = FileOptions { writable: false, direct: false, lock: LockMode::Off };
    Ok(FileStorage::open(path, &file_options)?)
}

/// What of the file is the image.
fn part_of(file: Arc<dyn Storage>, options: &OpenOptions) -> Result<Arc<dyn Storage>> {
    match options.part {
        None => Ok(file),
        Some(_) if options.writable => {
            let what = "an image inside of another file is not written; use --read-only";
            Err(Error::new(ErrorKind::Unsupported, what).with_path(&file.facts().path))
        }
        Some((offset, len)) => Ok(WindowStorage::new(file, offset, len)?),
    }
}
