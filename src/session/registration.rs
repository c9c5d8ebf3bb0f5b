//! A shard's queue under tokio's event loop.
//!
//! tokio has to be promised that a watched descriptor stays the same; this file makes the promise for
//! the queue, which keeps it (the sockets' is made in [`crate::transport`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use nbd_img_formats::storage::Queue;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A queue's descriptor, together with the queue that owns it.
pub struct QueueFd(Arc<Queue>);

impl AsRawFd for QueueFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches for answers on a queue. Must be called on a runtime's thread.
pub fn watch_queue(queue: &Arc<Queue>) -> io::Result<AsyncFd<QueueFd>> {
    // SAFETY: the `Arc` keeps the queue, which owns its descriptor and never replaces it.
    unsafe {
        AsyncFd::register_with_interest(QueueFd(Arc::clone(queue)), Interest::READABLE).map_err(Into::into)
    }
}
