//! What several test programs share.

#![allow(dead_code)] // Each test program uses its own part of it.

pub mod bitmaps;
pub mod checker;
pub mod crash;
pub mod gallery;
pub mod image;
pub mod maker;
pub mod model;
pub mod offline;
pub mod qemu_io;
pub mod random;
pub mod reader;
pub mod scene;
pub mod session;
pub mod steps;
pub mod units;
pub mod warned;
pub mod wrapped;
