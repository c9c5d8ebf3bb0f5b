//! Large reads that could leave uncopied go whichever way is the faster one, and are the same both ways.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::command;

const DISK_LEN: usize = 16 << 20;
const LEN: usize = 256 << 10;
const DEPTH: usize = 8;
/// What makes a way slow: a multiple of what a read takes otherwise.
const SLOW_US: u64 = 600;
/// Some 2 GiB: what is found out is found out before the first of them.
const PASSES: usize = 128;

/// A client of an export whose content is known.
struct Reader {
    disk: Arc<Disk>,
    content: Vec<u8>,
    server: InProcess,
    client: Client,
}

impl Reader {
    fn new(wishes: Wishes) -> Self {
        let content = Rng::fixed(31).bytes(DISK_LEN);
        let disk = Disk::in_memory(&content);
        let server = InProcess::serve(disk.clone(), 256 << 20);
        let client = Client::unix(server.socket(), "", wishes);
        Reader { disk, content, server, client }
    }

    /// Reads the disk once, several requests at a time. Gives how many bytes left uncopied.
    fn pass(&mut self) -> u64 {
        let before = self.disk.sent_len.load(Relaxed);
        let mut offsets = (0..DISK_LEN).step_by(LEN);
        let mut under_way = std::collections::HashMap::new();
        loop {
            for offset in offsets.by_ref().take(DEPTH - under_way.len()) {
                let request = Request::new(command::READ, offset as u64, LEN);
                under_way.insert(self.client.send(request, &[]).unwrap(), offset);
            }
            if under_way.is_empty() {
                return self.disk.sent_len.load(Relaxed) - before;
            }
            let reply = self.client.reply().unwrap();
            let offset = under_way.remove(&reply.cookie).unwrap();
            assert_eq!(reply.error, 0);
            assert_same("a read", &reply.data, &self.content[offset..][..LEN]);
        }
    }

    /// Reads on until a pass leaves as `wanted` says.
    fn reads_until(&mut self, what: &str, wanted: impl Fn(u64) -> bool) {
        let sent: Vec<u64> =
            (0..PASSES).map_while(|_| Some(self.pass()).filter(|sent| !wanted(*sent))).collect();
        assert!(sent.len() < PASSES, "{what} after {PASSES} passes: {sent:?}");
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
fn simple_replies_do_the_same() {
    let mut reader = Reader::new(Wishes::SIMPLE);
    takes(&reader.disk.send_us, SLOW_US);
    reader.reads_until("not copied", |sent| sent == 0);
    reader.end();
}

#[test]
fn where_copies_are_slow_few_are_made() {
    let mut reader = Reader::new(Wishes::STRUCTURED);
    takes(&reader.disk.read_us, SLOW_US * 4);
    let passes = 24;
    let sent: u64 = (0..passes).map(|_| reader.pass()).sum();
    let all = DISK_LEN as u64 * passes;
    // The first trial is among them.
    assert!((all / 10 * 9..all).contains(&sent), "{sent} of {all}");
    reader.end();
}
