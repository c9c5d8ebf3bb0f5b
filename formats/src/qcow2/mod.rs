//! qcow2, QEMU's copy-on-write format.
//!
//! | module | what is in it |
//! |---|---|
//! | `types` | offsets, indices and entries as types, checked when decoded |
//! | `subclusters` | the state of parts of a cluster |
//! | `header`, `extensions` | the first cluster, from bytes to values within all limits |
//! | `snapshots` | the table of internal snapshots |
//! | `bitmaps` | persistent dirty bitmaps |
//! | `tables` | L1 in memory, L2 in slices under a budget |
//! | `map` | from a guest range to a plan, through the backing chain |
//! | `read` | the bytes of a run of one layer |
//! | `compressed`, `compress` | from a blob to a cluster, and back |
//! | `clusters` | decompressed clusters under a budget |
//! | `warm` | bringing into memory what will be read |
//! | `flight` | making a thing once for all who need it at the same time |
//! | `write` | everything that changes an image |
//! | `check` | checking and repairing |
//! | `create` | new images |
//! | `resize` | another size for an image that nobody has open |
//! | `parts` | what a driver is made of |
//! | `driver` | [`Qcow2Driver`], which joins them |
//!
//! The specification is `docs/interop/qcow2` of QEMU. Nothing here opens a file: the files that an
//! image names come from [`open`](crate::open), behind its policy.

mod bitmaps;
mod check;
mod clusters;
mod compress;
mod compressed;
mod create;
mod driver;
mod extensions;
mod flight;
mod header;
mod map;
mod parts;
mod read;
mod resize;
mod snapshots;
mod subclusters;
mod tables;
mod types;
mod warm;
mod write;

pub use check::{CheckOptions, CheckReport, Repair, check};
pub use compress::Compress;
pub use create::{BackingName, CreateOptions, DataFileName, Preallocation, create, preallocate};
pub use driver::Qcow2Driver;
pub use extensions::Extensions;
pub use header::{Autoclear, Compatible, Compression, Header, Incompatible, TableLocation};
pub use parts::{Caches, Parts};
pub use resize::{ResizeParts, resize};
pub use tables::ImageNumber;
pub use types::{DataFile, Geometry};
pub use write::bitmap_change::BitmapChange;
pub use write::options::WriteOptions;

/// The four bytes that a qcow2 image begins with, as a number (specification).
pub const MAGIC: u32 = header::MAGIC;
