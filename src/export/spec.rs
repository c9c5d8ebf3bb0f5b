//! What an operator says about an export, checked but not opened.

use std::path::PathBuf;

use nbd_img_formats::open::OpenOptions;
use nbd_img_formats::storage::Aio;

/// When written data becomes durable, and whether the page cache is used (QEMU's names).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CacheMode {
    /// With FLUSH and FUA.
    #[default]
    Writeback,
    /// Before each reply.
    Writethrough,
    /// As `Writeback`, past the page cache (O_DIRECT).
    None,
    /// As `Writethrough`, past the page cache.
    Directsync,
}

impl CacheMode {
    /// Whether every write is durable before its reply.
    pub fn is_write_through(self) -> bool {
        match self {
            CacheMode::Writethrough | CacheMode::Directsync => true,
            CacheMode::Writeback | CacheMode::None => false,
        }
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(self) -> bool {
        match self {
            CacheMode::None | CacheMode::Directsync => true,
            CacheMode::Writeback | CacheMode::Writethrough => false,
        }
    }
}

/// Whether written zeroes are stored as such.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// They are written like any data.
    #[default]
    Off,
    /// They become zeroes that keep their room.
    On,
    /// They become holes.
    Unmap,
}

/// Which block sizes clients are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BlockSizes {
    /// Those that the image is served best in.
    #[default]
    Best,
    /// Those that qemu-nbd tells, which its callers know by heart. What is served does not depend on them.
    Qemu,
}

/// Writes that are thrown away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Temporary {
    /// Where they are kept.
    pub folder: PathBuf,
    /// Whose they are.
    pub sharing: Sharing,
}

/// Who sees writes that are thrown away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// All clients, until the server ends.
    Shared,
    /// The connection that made them, until it ends.
    PerClient,
}

/// One export as the operator asked for it.
#[derive(Clone, Debug, Default)]
pub struct ExportSpec {
    /// The name that clients ask for.
    pub name: String,
    /// Free text for people.
    pub description: String,
    /// The image.
    pub path: PathBuf,
    /// Refuse writes, down to how the files are opened.
    pub read_only: bool,
    /// Only to be had, and seen, under TLS.
    pub tls_required: bool,
    /// Where in the disk the export begins, in bytes.
    pub offset: u64,
    /// Its size in bytes; `None` is up to the end of the disk.
    pub size: Option<u64>,
    /// Take offset and size to the byte instead of rounding them down.
    pub exact_window: bool,
    /// Have only one client at a time, which is told not to open more connections.
    pub single_client: bool,
    /// Do not offer the metadata context that tells depths in the backing chain.
    pub hide_depth: bool,
    /// Which block sizes clients are told.
    pub block_sizes: BlockSizes,
    /// Caching and durability.
    pub cache: CacheMode,
    /// Who carries out what would wait.
    pub aio: Aio,
    /// Dirty bitmaps that clients may ask for.
    pub bitmaps: Vec<String>,
    /// Whether written zeroes are looked for.
    pub detect_zeroes: DetectZeroes,
    /// Writes go to a throwaway overlay, and the image is only read.
    pub temporary: Option<Temporary>,
    /// How the image is opened; `writable` and `direct` are set from the fields above.
    pub open: OpenOptions,
}

impl ExportSpec {
    /// Whether each client gets an overlay of its own.
    pub fn is_per_client(&self) -> bool {
        self.temporary.as_ref().is_some_and(|temporary| temporary.sharing == Sharing::PerClient)
    }

    /// The options of the open, with this export's permissions and cache mode.
    pub fn open_options(&self) -> OpenOptions {
        let writable = !self.read_only && self.temporary.is_none();
        OpenOptions { writable, direct: self.cache.is_direct(), ..self.open.clone() }
    }
}
