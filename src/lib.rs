//! nbd-img: a storage-format-aware disk image server.
//!
//! One direction: what the command line asks for is run by the server, which takes connections from the
//! transport, negotiates, and hands them to sessions; sessions speak NBD and move bytes between sockets
//! and images.
//!
//! | module | what is in it |
//! |---|---|
//! | [`cli`] | arguments, checked options, `info`, exit statuses |
//! | [`server`] | accepting, negotiating, limits, signals, the end |
//! | [`transport`] | listening sockets and client connections, addresses, URIs |
//! | [`session`] | connections after negotiation, on the threads of their export |
//! | [`nbd`] | the protocol without sockets: bytes in, steps and bytes out |
//! | [`export`] | one image as clients see it: name, window, permissions |
//!
//! What is inside of an image, and how its file is reached, is the crate `nbd_img_formats`.

pub mod cli;
pub mod export;
pub mod nbd;
pub mod server;
pub mod session;
pub mod transport;
