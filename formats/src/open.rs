//! From a path to a driver: the options of an open, and what is known of an image.
//!
//! Probing, the policy for names inside of images and the locks live in its submodules.

use std::path::PathBuf;

use serde::Serialize;

use crate::driver::{BlockDriver, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format, or `None` to find it by its magic.
    pub format: Option<Format>,
    /// Whether it will be written.
    pub writable: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Serve a raw file to the byte instead of rounding its size up to 512.
    pub exact_size: bool,
    /// What becomes of the backing file that an image names.
    pub backing: Backing,
    /// Folders, besides the image's own, below which backing and data files may lie.
    pub allow_dirs: Vec<PathBuf>,
    /// Serve this internal snapshot (name or id) instead of the active state; read-only.
    pub snapshot: Option<String>,
    /// Whether a discard gives room back (`unmap`) or does nothing (`ignore`).
    pub discard: bool,
    /// Open read-only although somebody writes: what is read may be inconsistent.
    pub force_share: bool,
    /// Most bytes of metadata tables held in memory.
    pub table_cache_len: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            format: None,
            writable: false,
            direct: false,
            exact_size: false,
            backing: Backing::Follow,
            allow_dirs: Vec::new(),
            snapshot: None,
            discard: true,
            force_share: false,
            // As QEMU's default for L2 tables: covers 256 GiB at 64 KiB clusters.
            table_cache_len: 32 << 20,
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

/// An open image.
pub struct Opened {
    /// What serves it.
    pub driver: Arc<dyn BlockDriver>,
    /// Whether the format was found by probing rather than stated.
    pub probed: bool,
}

/// Opens the image at `path`.
pub fn open(_path: &std::path::Path, _options: &OpenOptions) -> Result<Opened> {
    Err(Error::new(ErrorKind::Unsupported, "no driver yet"))
}

/// What is known of an image, for people and for `nbd-img info --json`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageInfo {
    /// The image's file.
    pub path: PathBuf,
    /// `raw`, `mmap-raw` or `qcow2`.
    pub format: String,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Length of the file in bytes.
    pub file_len: u64,
    /// What the file occupies, in bytes.
    pub allocated_len: u64,
    /// Bytes in a cluster; absent for raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_len: Option<u64>,
    /// Version of the format; absent for raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Bits in a refcount; absent for raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refcount_bits: Option<u32>,
    /// `zlib` or `zstd`; absent for raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// Names of the feature bits that are set: `dirty`, `corrupt`, `external-data-file`, ...
    pub features: Vec<String>,
    /// The name that the image gives its backing file, as it stands there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_name: Option<String>,
    /// The format that the image states for its backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// The name that the image gives its external data file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_name: Option<String>,
    /// The images below this one that were opened, nearest first.
    pub chain: Vec<ImageInfo>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Persistent dirty bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
}

/// An internal snapshot.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SnapshotInfo {
    /// Its id, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of the guest's disk at that time, in bytes.
    pub virtual_size: u64,
    /// Bytes of saved machine state.
    pub vm_state_len: u64,
    /// Seconds since 1970 when it was taken.
    pub date_seconds: u32,
}

/// A persistent dirty bitmap.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// `in-use`, `auto`, ...
    pub flags: Vec<String>,
}
