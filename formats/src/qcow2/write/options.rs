//! [`WriteOptions`]: what whoever opens an image for writing decides.

use super::super::compress::Compress;

/// Most bytes of changed metadata in memory before a commit starts. Our choice: the tables of 8 GiB of new
/// clusters of 64 KiB; writing them takes milliseconds.
const DIRTY_LEN_MAX: u64 = 8 << 20;

/// Most bytes of new bits of dirty bitmaps in memory before some are stored. Our choice: at 64 KiB of disk for a bit
/// that is what one bitmap has for 4 TiB, sixteen times the reach of a table cache of 32 MiB. So whoever
/// writes all over a larger disk waits for tables long before he waits for this, and there is no flag for it.
const BITMAP_LEN_MAX: u64 = 8 << 20;

/// Most clusters that the dirty bitmaps of an image may come to take. Our choice, as for the L1 tables of snapshots: each is
/// metadata that the allocator has to know, a few dozen megabytes of memory in all.
const BITMAP_CLUSTERS_MAX: u64 = 1 << 19;

/// How an image is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteOptions {
    /// Whether a discard gives room back; else it does nothing.
    pub discard: bool,
    /// Whether zeroes are QEMU's, whose callers look at the allocation: marked also in an image that names no backing file,
    /// where that changes nothing that can be read, and without room also where they are to have some. Not in version 2,
    /// which has no marks.
    pub zeroes_as_qemu: bool,
    /// Whether the image was opened over another backing file than the one that it names, or over none. Whoever opens it
    /// next may see that one's bytes where the image has nothing.
    pub foreign_backing: bool,
    /// So many bytes of changed metadata in memory start a commit. So do changed parts of tables and refcount blocks that
    /// take more memory than the table cache has room for, and more than this. What is changed while one is under way
    /// comes on top.
    pub dirty_len_max: u64,
    /// So many bytes of bits that were set in enabled dirty bitmaps, of all of them together, stay in memory; what is
    /// beyond goes to the file. What requests under way set comes on top, and what cannot be stored.
    pub bitmap_len_max: u64,
    /// So many clusters may the image's dirty bitmaps come to take, if every bit of the enabled ones were set; with more
    /// the image is not opened, nor given a bitmap that would lead there.
    pub bitmap_clusters_max: u64,
    /// Whether whole clusters that are written are compressed, and how.
    pub compress: Option<Compress>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        WriteOptions {
            discard: true,
            zeroes_as_qemu: false,
            foreign_backing: false,
            dirty_len_max: DIRTY_LEN_MAX,
            bitmap_len_max: BITMAP_LEN_MAX,
            bitmap_clusters_max: BITMAP_CLUSTERS_MAX,
            compress: None,
        }
    }
}
