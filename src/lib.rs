//! nbd-img: a storage-format-aware disk image server.

pub mod nbd;
