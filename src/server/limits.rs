//! Open files: the limit is raised to what the connections and images can need.

use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most connections in negotiation. Our choice: they cost a descriptor and some KiB each, tens of KiB in the midst of TLS,
/// and thousands of strangers that come at once must not push out a good client that takes milliseconds.
const HANDSHAKES_MAX: usize = 4096;

/// Fewest, when descriptors are scarce.
const HANDSHAKES_MIN: usize = 16;

/// Descriptors of one export: a chain of images and data files (64) and, per shard, a ring, an epoll and
/// wake-ups. Rounded up.
const FILES_PER_EXPORT: u64 = 64;
const FILES_PER_SHARD: u64 = 8;

/// Everything else: stdio, listeners, the control runtime, a spare. Rounded up.
const FILES_OF_PROCESS: u64 = 64;

/// Raises the limit on open files as far as the server may need it, and tells how many connections may
/// be in negotiation. `client_files` is how many a client with an export has at most. It only warns when the hard limit is too low: most servers never need it.
///
/// SIGPIPE needs nothing: Rust's runtime ignores it before `main`.
pub fn raise(max_connections: u32, client_files: u32, exports: usize) -> usize {
    let shards = u64::try_from(thread::available_parallelism().map_or(1, usize::from)).unwrap_or(1);
    let exports = u64::try_from(exports).unwrap_or(u64::MAX);
    let images = exports.saturating_mul(FILES_PER_EXPORT + shards.saturating_mul(FILES_PER_SHARD));
    let clients = u64::from(max_connections).saturating_mul(u64::from(client_files));
    let fixed = images.saturating_add(FILES_OF_PROCESS).saturating_add(clients);
    let limit = raise_to(fixed.saturating_add(HANDSHAKES_MAX as u64));
    let left = limit.saturating_sub(fixed);
    if left < HANDSHAKES_MIN as u64 {
        tracing::warn!(
            limit,
            "--max-connections {max_connections} may need {fixed} open files, more than the hard limit \
             (ulimit -Hn) allows; lower it or raise the limit"
        );
    }
    usize::try_from(left).unwrap_or(usize::MAX).clamp(HANDSHAKES_MIN, HANDSHAKES_MAX)
}

/// Raises the soft limit to `wanted` or as near as the hard limit allows; gives the limit that holds.
fn raise_to(wanted: u64) -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // `None` is no limit.
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let target = wanted.min(hard);
    if soft >= target {
        return soft;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: Some(target), maximum: limit.maximum }) {
        Ok(()) => target,
        Err(error) => {
            tracing::warn!(%error, soft, target, "cannot raise the limit on open files");
            soft
        }
    }
}
