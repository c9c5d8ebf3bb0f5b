//! Descriptors that tokio's event loop watches: a client's socket and a shard's queue.
//!
//! tokio has to be promised that a watched descriptor stays the same; this file makes the promise for
//! the two types that keep it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use nbd_img_formats::storage::Queue;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::transport::Stream;

/// A queue's descriptor, together with the queue that owns it.
pub struct QueueFd(Arc<Queue>);

impl AsRawFd for QueueFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Watches a client's socket. Must be called on a runtime's thread.
pub fn watch_stream(stream: Stream) -> io::Result<AsyncFd<Stream>> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: a `Stream` owns its descriptor, never replaces it, and closes it when it is dropped.
    unsafe { AsyncFd::register_with_interest(stream, interest).map_err(Into::into) }
}

/// Watches for answers on a queue. Must be called on a runtime's thread.
pub fn watch_queue(queue: &Arc<Queue>) -> io::Result<AsyncFd<QueueFd>> {
    // SAFETY: the `Arc` keeps the queue, which owns its descriptor and never replaces it.
    unsafe {
        AsyncFd::register_with_interest(QueueFd(Arc::clone(queue)), Interest::READABLE).map_err(Into::into)
    }
}
