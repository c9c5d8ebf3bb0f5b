//! The NBD protocol without sockets: bytes in, steps and bytes out.
//!
//! Nothing here reads a socket, a clock or a file, and nothing panics, whatever the bytes are. The order in which
//! a connection meets these files:
//!
//! - [`negotiate`]: greeting, client flags and options (one file each in `options/`), until an export is agreed;
//!   `oldstyle`: the negotiation without a say of the client;
//! - [`export_info`]: what the negotiation has to know of the exports;
//! - [`request`]: the header of a request, and whether this session may be asked that;
//! - [`reply`]: headers and chunks of replies; [`block_status`]: extents of a BLOCK_STATUS reply;
//! - [`errno`]: the one table from the operating system's errors to the protocol's;
//! - [`wire`]: magic numbers, codes and layouts, by the names of the protocol.

pub mod block_status;
pub mod errno;
pub mod export_info;
pub mod negotiate;
mod oldstyle;
mod options;
pub mod reply;
pub mod request;
pub mod text;
pub mod wire;
