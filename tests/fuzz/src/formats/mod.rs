//! The targets of qcow2 images.
//!
//! | module | what is in it |
//! |---|---|
//! | `small` | a small valid image, made in memory |
//! | `damage` | changes of its metadata |
//! | `open` | opening an image in memory, with whatever it names |
//! | `judge`, `recorded` | what the tests' own code finds in an image; what its bitmaps have to tell |
//! | [`written`] | target `qcow2_write`: operations on damaged images |
//! | [`bytes`] | target `qcow2_bytes`: any bytes as an image |
//! | [`blob`] | target `qcow2_blob`: any bytes as a compressed cluster |

pub mod blob;
pub mod bytes;
mod damage;
mod judge;
mod open;
mod recorded;
mod small;
pub mod written;

/// Small images as seeds, by the name of what is special about them.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let plain = small::Shape {
        version: 3,
        cluster_bits: 9,
        refcount_order: 4,
        zstd: false,
        snapshot: false,
        bitmap: false,
        dirty: false,
        backing_len: None,
        extended_l2: false,
        features: Default::default(),
    };
    let shapes = [
        ("seed-plain", plain),
        ("seed-version-2", small::Shape { version: 2, snapshot: true, ..plain }),
        ("seed-zstd-overlay", small::Shape { zstd: true, snapshot: true, backing_len: Some(3000), ..plain }),
        ("seed-dirty", small::Shape { dirty: true, refcount_order: 6, ..plain }),
        ("seed-bitmap", small::Shape { bitmap: true, ..plain }),
        ("seed-one-bit-refcounts", small::Shape { refcount_order: 0, ..plain }),
    ];
    shapes.iter().map(|(name, shape)| (*name, shape.image().bytes.clone())).collect()
}
