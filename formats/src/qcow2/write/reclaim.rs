//! Letting clusters go, after the commit that made the loss of their last pointers durable.
//!
//! A cluster is punched before its refcount becomes 0, so nobody can have it again before that is over.
//! One thread at a time does it, while others commit: what it takes from the quarantine needs no commit
//! any more, and the refcounts that it changes are for the next one.

use super::super::driver::Qcow2Driver;
use super::super::types::HostIndex;
use super::meta::{Content, Freed};
use super::pins::Epoch;
use super::{MetaGuard, Writer, corrupt, data_file, satisfy};
use crate::address::HostRange;
use crate::error::Result;
use crate::storage::Provision;
use crate::sync::atomic::Ordering;

/// Whether to mind the pins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// Only what no plan can use any more.
    Unpinned,
    /// All, at the end: counted only, neither punched nor handed out again.
    Now,
}

/// Lets go what may go, unless somebody else is doing that: he sees to what has come since, too. What
/// fails stays, for the next time; after a crash it would be leaked.
pub fn reclaim(driver: &Qcow2Driver, writer: &Writer, when: When) {
    let meta = writer.lock();
    if !meta.reclaiming && !meta.quarantine.is_empty() {
        run(driver, writer, when, meta);
    }
}

/// As [`reclaim`], and when it returns nobody else is at it either.
pub fn reclaim_all(driver: &Qcow2Driver, writer: &Writer, when: When) {
    let mut meta = writer.lock();
    while meta.reclaiming {
        writer.wait(&mut meta);
    }
    run(driver, writer, when, meta);
}

/// Lets go what commits have left in quarantine; for whoever has answered a flush and has time. Not once
/// the image is being closed: the close does it.
pub fn tidy(driver: &Qcow2Driver, writer: &Writer) {
    let meta = writer.lock();
    if writer.accepts(&meta) && !meta.reclaiming && !meta.quarantine.is_empty() {
        run(driver, writer, When::Unpinned, meta);
    }
}

/// Sorts runs, and makes one of those that touch. A cluster that lost two pointers stays in two of them.
pub fn join_runs(freed: &mut Vec<Freed>) {
    freed.sort_unstable_by_key(|run| run.first);
    freed.dedup_by(|next, run| {
        let joins = run.content == next.content && run.first.0 + run.len == next.first.0;
        if joins {
            run.len += next.len;
        }
        joins
    });
}

/// The right to let clusters go; one thread has it at a time.
struct Reclaiming<'a> {
    writer: &'a Writer,
    /// It was given back already.
    ended: bool,
}

impl Drop for Reclaiming<'_> {
    fn drop(&mut self) {
        if crate::sync::thread::panicking() {
            self.writer.failed.store(true, Ordering::Release);
        }
        if !self.ended {
            self.writer.lock().reclaiming = false;
            self.writer.changed.notify_all();
        }
    }
}

impl Reclaiming<'_> {
    /// The next that may go. Who is told that there is nothing has lost the right in the same moment:
    /// nothing can come that nobody sees to.
    fn next(&mut self, when: When) -> Option<(Epoch, Vec<Freed>)> {
        let mut meta = self.writer.lock();
        let oldest = self.writer.pins.oldest();
        let may_go = meta.quarantine.front().is_some_and(|(epoch, _)| when == When::Now || *epoch < oldest);
        if may_go && !self.writer.is_failed() {
            return meta.quarantine.pop_front();
        }
        meta.reclaiming = false;
        self.ended = true;
        self.writer.changed.notify_all();
        None
    }
}

fn run(driver: &Qcow2Driver, writer: &Writer, when: When, mut meta: MetaGuard<'_>) {
    meta.reclaiming = true;
    drop(meta);
    let mut right = Reclaiming { writer, ended: false };
    while let Some((epoch, mut freed)) = right.next(when) {
        freed.reverse();
        while let Some(run) = freed.pop() {
            let (chunk, rest) = split_by_block(writer, run);
            if let Err(error) = let_go(driver, writer, chunk, when) {
                tracing::warn!(%error, "clusters that are not used any more could not be freed yet");
                if !writer.is_failed() {
                    freed.push(run);
                    freed.reverse();
                    writer.lock().quarantine.push_front((epoch, freed));
                }
                return;
            }
            freed.extend(rest);
        }
    }
}

/// The part of a run that its first refcount block describes, and the rest.
fn split_by_block(writer: &Writer, run: Freed) -> (Freed, Option<Freed>) {
    if run.content == Content::DataFile {
        return data_file::split(run);
    }
    let entries = writer.lock().allocator.refcounts.block_entries();
    let len = (entries - run.first.0 % entries).min(run.len);
    let rest = Freed { first: HostIndex(run.first.0 + len), len: run.len - len, ..run };
    (Freed { len, ..run }, (rest.len > 0).then_some(rest))
}

/// Takes one off the refcount of every cluster of the run. All of it happens or nothing.
fn let_go(driver: &Qcow2Driver, writer: &Writer, run: Freed, when: When) -> Result<()> {
    if run.content == Content::DataFile {
        data_file::let_go(driver, writer, run, when);
        return Ok(());
    }
    let last = loop {
        let counted = count_down(writer, run);
        match counted {
            Ok(last) => break last,
            Err(need) => satisfy(driver, writer, need)?,
        }
    };
    for (first, len) in last {
        forget_content(driver, writer, first, len);
        let zeroed = when == When::Unpinned && punch(driver, writer, first, len);
        let mut meta = writer.lock();
        let allocator = &mut meta.allocator;
        for index in first.0..first.0 + len {
            if allocator.refcounts.set(HostIndex(index), 0).is_err() {
                drop(meta);
                return Err(corrupt(driver, writer, "a refcount block has vanished from memory"));
            }
            allocator.map.remove(HostIndex(index));
        }
        if when == When::Unpinned {
            allocator.space.give_back(first, len, zeroed);
        }
    }
    Ok(())
}

/// What is in memory of the content of these clusters goes. No plan knows what was here, so nobody can put it into the
/// cache any more; and nobody has the clusters again before their refcounts are 0. The one place where bytes of the
/// file change their meaning.
fn forget_content(driver: &Qcow2Driver, writer: &Writer, first: HostIndex, len: u64) {
    if let Some(range) = span(writer, first, len) {
        driver.clusters().forget(driver.number(), range);
    }
}

/// Counts down what others still refer to; returns the runs of clusters that nobody else does.
fn count_down(
    writer: &Writer,
    run: Freed,
) -> std::result::Result<Vec<(HostIndex, u64)>, super::allocator::Need> {
    use super::allocator::Need;
    let mut meta = writer.lock();
    let allocator = &mut meta.allocator;
    let clusters = || (run.first.0..run.first.0 + run.len).map(HostIndex);
    for index in clusters() {
        if allocator.refcounts.get(index)? == 0 {
            return Err(Need::Fault("a cluster in use has refcount 0"));
        }
        if run.content == Content::Data && allocator.map.kind(index).is_some() {
            return Err(Need::Fault("an L2 entry pointed into metadata"));
        }
    }
    // A commit that ends meanwhile drops clean blocks.
    allocator.refcounts.keep(allocator.refcounts.block_of(run.first));
    let mut last: Vec<(HostIndex, u64)> = Vec::new();
    for index in clusters() {
        let count = allocator.refcounts.get(index)?;
        if count > 1 {
            allocator.refcounts.set(index, count - 1)?;
            continue;
        }
        allocator.packing.leave(index);
        match last.last_mut() {
            Some((first, len)) if first.0 + *len == index.0 => *len += 1,
            Some(_) | None => last.push((index, 1)),
        }
    }
    Ok(last)
}

fn span(writer: &Writer, first: HostIndex, len: u64) -> Option<HostRange> {
    let geometry = writer.geometry;
    HostRange::new(geometry.host_at(first).start(), len * geometry.cluster_len())
}

/// Gives the room back to the file system; returns whether the clusters read as zeroes now.
fn punch(driver: &Qcow2Driver, writer: &Writer, first: HostIndex, len: u64) -> bool {
    if !writer.options.discard {
        return false;
    }
    let image = driver.image();
    let Some(range) = span(writer, first, len) else { return false };
    let punched = match image.facts().new_space_is_zero {
        true => image.zero(range, Provision::Unmap, true).map(|()| true),
        false => image.discard(range).map(|()| false),
    };
    punched.unwrap_or_else(|error| {
        tracing::debug!(%error, "free clusters could not be given back to the file system");
        false
    })
}
