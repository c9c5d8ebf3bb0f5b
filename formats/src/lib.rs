//! Disk image formats behind one trait.
//!
//! This crate knows what is inside a disk image (raw, memory-mapped raw, qcow2) and how to reach the
//! bytes of its file. It knows nothing of NBD, sockets or tokio; whoever uses it brings the threads.
//!
//! | module | what is in it |
//! |---|---|
//! | [`driver`] | [`BlockDriver`]: what a guest sees of an image |
//! | [`plan`] | where the bytes of a range lie, apart from moving them |
//! | [`mover`] | the one implementation of pread, pwrite and status, over plans |
//! | [`storage`] | [`Storage`]: the file below a driver, and its implementations |
//! | [`workers`] | the threads that may wait, so that nobody else has to |
//! | [`raw`], [`qcow2`] | the formats |
//! | [`open`] | from a path to a driver: probing, policy, locks |
//! | [`info`] | what is known of an image, for people |
//! | [`error`], [`address`], [`sync`] | what all of them share |

pub mod address;
pub mod driver;
pub mod error;
pub mod info;
pub mod mover;
pub mod open;
pub mod plan;
pub mod qcow2;
pub mod raw;
pub mod storage;
pub mod sync;
pub mod workers;

pub use address::{GuestRange, HostOffset, HostRange};
pub use driver::{BlockDriver, Effort, Facts, Format, State, StatusQuery, ZeroRequest};
pub use error::{Error, ErrorKind, Result};
pub use plan::{Piece, Pin, Place, ReadPlan, SlowReason, WritePlan};
pub use storage::{Durability, Provision, Storage};
