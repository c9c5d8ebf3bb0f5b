//! Streams and listeners under tokio's event loop.
//!
//! tokio has to be promised that a watched descriptor stays the same for as long as it is watched; this
//! file makes the promise for the two types of this folder, which keep it.

use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::listener::Listener;
use super::stream::Stream;

/// Watches a client's socket. Must be called on a runtime's thread.
pub fn watch_stream(stream: Stream) -> io::Result<AsyncFd<Stream>> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: a `Stream` owns its descriptor, never replaces it, and closes it only when it is dropped.
    unsafe { AsyncFd::register_with_interest(stream, interest).map_err(Into::into) }
}

/// Watches a listening socket. Must be called on a runtime's thread.
pub fn watch_listener(listener: Listener) -> io::Result<AsyncFd<Listener>> {
    // SAFETY: as above, for a `Listener`.
    unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE).map_err(Into::into) }
}
