//! What is known of an image, for people and for `nbd-img info --json`. Only the shape of it: drivers
//! fill it in.

use std::path::PathBuf;

use serde::Serialize;

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
