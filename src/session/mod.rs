//! Sessions: what happens on a connection after negotiation.
//!
//! | module | what is in it |
//! |---|---|
//! | [`shards`] | the threads of an export, and how connections get to them |
//! | [`shard`] | one thread: its sessions, and the answers on their way to them |
//! | [`engine`], `park` | one session's life: receive, work, send, park |
//! | `read`, `sendfile`, `write`, `status`, `calls` | how each command is served; `layout` frames reads |
//! | `warm` | the short way of small reads and writes that wait for nobody |
//! | `large_writes` | those that workers carry out while the session receives the next ones |
//! | `ahead` | what a client that reads from front to back will want next |
//! | `uncopied` | whether sending large reads uncopied is the faster way |
//! | `ways` | which of two ways is the faster one, by trying |
//! | `cold` | planning reads, and the tables that this takes |
//! | `decompress` | compressed clusters, on all cores and ahead of the client |
//! | `send` | putting replies into the batch, and sending it |
//! | `refuse` | requests that are refused |
//! | `farewell` | having the last replies reach a client that is hung up on |
//! | `encrypted` | what TLS adds to sending and receiving |
//! | [`pending`] | requests that wait for the disk |
//! | `submit` | handing their operations to storages in batches |
//! | [`buffers`], [`replies`], [`payload`], [`budget`] | their memory |
//! | [`times`] | how long sessions wait for their clients |
//! | [`poll`] | looking at a socket a little longer before sleeping |
//! | `linger` | leaving a socket alone for a moment, so that requests gather |
//! | [`watch`] | when buffered writes are handed off |
//!
//! The protocol's bytes are made and read in [`crate::nbd`]; where an image's bytes lie is the driver's
//! business. Nothing here blocks: what would wait is submitted or given to the export's workers.

mod ahead;
pub mod budget;
pub mod buffers;
mod calls;
mod cold;
mod decompress;
mod encrypted;
pub mod end;
pub mod engine;
mod farewell;
mod large_writes;
mod layout;
mod linger;
mod park;
pub mod payload;
pub mod pending;
pub mod poll;
mod read;
mod refuse;
mod registration;
pub mod replies;
mod send;
mod sendfile;
pub mod shard;
pub mod shards;
mod status;
mod submit;
pub mod times;
mod uncopied;
mod warm;
pub mod watch;
mod ways;
mod write;

pub use budget::{BUDGET_LEN_DEFAULT, Budget};
pub use poll::POLL_TIME_DEFAULT;
pub use shards::{Connection, Shards};
pub use times::Times;
