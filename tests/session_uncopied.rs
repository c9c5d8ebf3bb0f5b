//! Large reads that could leave uncopied go whichever way is the faster one, and are the same both ways.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::{command, command_flag};

const DISK_LEN: usize = 16 << 20;
const LEN: usize = 256 << 10;
const DEPTH: usize = 8;
const BUDGET_LEN: usize = 256 << 20;
/// What makes a way slow: a multiple of what a read takes otherwise.
const SLOW_US: u64 = 600;
/// More than a choice takes to be made, and made again, on a busy machine, whose pauses have trials given up.
const LONG: Duration = Duration::from_secs(120);

/// A client of an export whose content is known.
struct Reader {
    disk: Arc<Disk>,
    content: Vec<u8>,
    server: InProcess,
    client: Client,
    /// Of requests, by turns.
    lens: Vec<usize>,
    flags: u16,
    /// Tests that wait for each other make the pauses in which nothing is found out.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Reader {
    fn new(wishes: Wishes) -> Self {
        Self::of(Rng::fixed(31).bytes(DISK_LEN), wishes, BUDGET_LEN)
    }

    fn of(content: Vec<u8>, wishes: Wishes, budget_len: usize) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = Disk::in_memory(&content);
        let server = InProcess::serve(disk.clone(), budget_len);
        let client = Client::unix(server.socket(), "", wishes);
        Reader { disk, content, server, client, lens: vec![LEN], flags: 0, _alone: alone }
    }

    /// Reads the disk once, several requests at a time. Gives how many bytes left uncopied.
    fn pass(&mut self) -> u64 {
        let before = self.disk.sent_len.load(Relaxed);
        let mut under_way = HashMap::new();
        let (mut next, mut lens) = (0, self.lens.clone().into_iter().cycle());
        loop {
            while under_way.len() < DEPTH && next < DISK_LEN {
                let len = lens.next().unwrap().min(DISK_LEN - next);
                let request = Request::new(command::READ, next as u64, len).flags(self.flags);
                under_way.insert(self.client.send(request, &[]).unwrap(), next..next + len);
                next += len;
            }
            if under_way.is_empty() {
                return self.disk.sent_len.load(Relaxed) - before;
            }
            let reply = self.client.reply().unwrap();
            let range = under_way.remove(&reply.cookie).unwrap();
            assert_eq!(reply.error, 0);
            assert_same("a read", &reply.data, &self.content[range]);
        }
    }

    /// Reads on until a pass leaves as `wanted` says.
    fn reads_until(&mut self, what: &str, wanted: impl Fn(u64) -> bool) {
        let (begin, mut sent) = (Instant::now(), Vec::new());
        while !sent.last().is_some_and(|sent| wanted(*sent)) {
            assert!(begin.elapsed() < LONG, "{what} after {LONG:?}: {sent:?}");
            sent.push(self.pass());
        }
    }

    /// Uncopied, however slow that is.
    fn assert_always_sent(mut self) {
        takes(&self.disk.send_us, SLOW_US);
        for _ in 0..12 {
            assert_eq!(self.pass(), DISK_LEN as u64);
        }
        self.end();
    }

    fn end(self) {
        self.client.disconnect();
        self.server.assert_clean();
    }
}

fn takes(way: &AtomicU64, us: u64) {
    way.store(us, Relaxed);
}

#[test]
fn a_slow_way_is_left_and_taken_again_when_the_other_is_slower() {
    let mut reader = Reader::new(Wishes::STRUCTURED);
    takes(&reader.disk.send_us, SLOW_US);
    assert_eq!(reader.pass(), DISK_LEN as u64, "uncopied is what it begins with");
    reader.reads_until("not copied", |sent| sent == 0);
    takes(&reader.disk.send_us, 0);
    takes(&reader.disk.read_us, SLOW_US * 4);
    reader.reads_until("copied", |sent| sent == DISK_LEN as u64);
    reader.end();
}

#[test]
fn replies_of_every_form_and_length_are_the_same_both_ways() {
    for (wishes, flags) in [(Wishes::SIMPLE, 0), (Wishes::STRUCTURED, command_flag::DF)] {
        let mut reader = Reader::new(wishes);
        reader.flags = flags;
        reader.lens = vec![64 << 10, (1 << 20) + 512, LEN, (2 << 20) - 4096, 100_000];
        takes(&reader.disk.send_us, SLOW_US);
        reader.pass();
        reader.reads_until("not copied", |sent| sent == 0);
        reader.lens.extend([4 << 10, 2 << 20]);
        reader.pass();
        reader.end();
    }
}

#[test]
fn what_does_not_fit_into_a_batch_assert_always_sent() {
    let mut reader = Reader::new(Wishes::STRUCTURED);
    reader.lens = vec![2 << 20];
    reader.assert_always_sent();
}

#[test]
fn holes_between_data_are_the_same_both_ways() {
    const RUN_LEN: usize = 128 << 10;
    let mut content = Rng::fixed(32).bytes(DISK_LEN);
    for hole in content.chunks_mut(RUN_LEN).skip(1).step_by(2) {
        hole.fill(0);
    }
    let mut reader = Reader::of(content, Wishes::STRUCTURED, BUDGET_LEN);
    reader.disk.runs_of.store(RUN_LEN as u64, Relaxed);
    takes(&reader.disk.send_us, SLOW_US);
    reader.lens = vec![2 * LEN];
    assert_eq!(reader.pass(), DISK_LEN as u64 / 2, "uncopied is what it begins with");
    reader.reads_until("not copied", |sent| sent == 0);
    reader.end();
}

#[test]
fn without_memory_nothing_is_copied() {
    let reader = Reader::of(Rng::fixed(33).bytes(DISK_LEN), Wishes::STRUCTURED, 0);
    reader.assert_always_sent();
}

#[test]
fn where_copies_are_slow_few_are_made_and_their_memory_is_given_back() {
    let mut reader = Reader::new(Wishes::STRUCTURED);
    takes(&reader.disk.read_us, SLOW_US * 4);
    let passes = 24;
    let all = DISK_LEN as u64 * passes;
    // The first trial is among them, or a later one if pauses had that given up; windows that are begun anew make it longer.
    let few = (0..12).any(|_| {
        let sent: u64 = (0..passes).map(|_| reader.pass()).sum();
        (all / 4 * 3..all).contains(&sent)
    });
    assert!(few, "none is made, or many");
    reader.reads_until("copied", |sent| sent == DISK_LEN as u64);
    let leased = BUDGET_LEN - reader.server.budget.left_len();
    assert!(leased < 1 << 20, "{leased} bytes are held");
    reader.end();
}
