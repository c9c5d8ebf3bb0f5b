//! The refcounts in the file against what was counted, cluster by cluster.

use super::counts::{Counts, Singles, Window};
use super::report::{Fault, Tally};
use super::walk::cluster_name;
use super::{Subject, read_padded};
use crate::address::HostRange;
use crate::error::Result;
use crate::mover::storage_error;
use crate::qcow2::types::HostIndex;
use crate::qcow2::write::refcounts::count_in;

/// Notes of which clusters the refcount is 1.
pub fn mark_singles(subject: &Subject<'_>, singles: &Singles, window: Window, tally: &Tally) {
    each_block(subject, window, tally, |from, to, count| {
        for index in from..to {
            if count(index) == 1 {
                singles.set(HostIndex(index));
            }
        }
    });
}

/// Compares all refcounts of a window with what was counted.
pub fn compare(subject: &Subject<'_>, counts: &Counts, tally: &Tally) {
    let geometry = subject.header.geometry;
    let max = u64::MAX >> (64 - subject.header.refcount_bits);
    let file_clusters = subject.file_clusters();
    each_block(subject, counts.window(), tally, |from, to, count| {
        for index in from..to {
            let used = counts.get(HostIndex(index));
            // Whatever is counted behind the end of the file is not there.
            let stored = if index < file_clusters || used > 0 { count(index) } else { 0 };
            if used == stored {
                if used > 0 {
                    tally.in_use_to((index + 1) * geometry.cluster_len());
                }
                continue;
            }
            tally.in_use_to((index + 1) * geometry.cluster_len());
            let name = || cluster_name(geometry, HostIndex(index));
            if used > max {
                let text = || format!("{} is used {used} times, more often than can be counted", name());
                tally.fault(Fault::TooMany, used - max, text);
            }
            let wanted = used.min(max);
            if stored < wanted {
                let text = || format!("{} is used {used} times, but counted {stored}", name());
                tally.fault(Fault::Low, 1, text);
            } else if stored > wanted {
                let text = || format!("leaked: {} is counted {stored} times, but used {used}", name());
                tally.fault(Fault::Leak, 1, text);
            }
        }
    });
}

/// Gives the room of clusters back that are not used, as far as the file goes; they must not be counted, either.
/// Returns where the last one ends that is used.
pub fn punch_unused(subject: &Subject<'_>, counts: &Counts) -> Result<u64> {
    let geometry = subject.header.geometry;
    let window = counts.window();
    let image = subject.image;
    let (mut end, mut index) = (0, window.first);
    let last = window.end.min(subject.file_clusters());
    while index < last {
        let is_used = |index| counts.get(HostIndex(index)) > 0;
        let run_end = (index..last).find(|next| is_used(*next) != is_used(index)).unwrap_or(last);
        let (at, len) =
            (geometry.host_at(HostIndex(index)).start(), (run_end - index) * geometry.cluster_len());
        if is_used(index) {
            end = at.0 + len;
        } else if let Some(range) = HostRange::new(at, len) {
            image.discard(range).map_err(|e| storage_error(image, "cannot give room back", at, e))?;
        }
        index = run_end;
    }
    Ok(end)
}

/// Calls `visit` with each stretch of a window that one refcount block counts, and with what gives the
/// refcounts in it. Where there is no block, they are 0; where it cannot be read, it is left out.
fn each_block(
    subject: &Subject<'_>,
    window: Window,
    tally: &Tally,
    mut visit: impl FnMut(u64, u64, &dyn Fn(u64) -> u64),
) {
    let entries = subject.block_entries();
    let bits = subject.header.refcount_bits;
    let cluster_len = subject.header.geometry.cluster_len();
    let mut bytes = vec![0; usize::try_from(cluster_len).unwrap_or(0)];
    let mut from = window.first;
    while from < window.end {
        let number = from / entries;
        let to = ((number + 1) * entries).min(window.end);
        match subject.block(number) {
            None => visit(from, to, &|_| 0),
            Some(at) => match read_padded(subject.image, at, &mut bytes) {
                Ok(()) => visit(from, to, &|index| count_in(&bytes, bits, index % entries)),
                Err(error) => {
                    tally.unreadable(at, || format!("the refcount block at {at} cannot be read: {error}"));
                }
            },
        }
        from = to;
    }
}
