//! Small reads and writes, most of which are served on the short way and the others on the long one: nothing tells them
//! apart but the time.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbd_img::export::ExportSpec;
use nbd_img::session::Times;
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::{Format, Storage};
use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::{command, command_flag};

const DISK_LEN: usize = 4 << 20;
/// Where the export begins in the disk.
const OFFSET: usize = 3 * 4096 + 512;
/// From here on the disk fails; a client has half of it.
const GOOD_LEN: usize = DISK_LEN / 2;
/// What is under way together does not overlap.
const SLOT_LEN: usize = 32 << 10;
/// As many requests as are more than fits into a batch without memory.
const DEPTH: usize = 64;
const ROUNDS: usize = 30;
/// Around the longest that goes the short way, and shorter ones.
const LENGTHS: [usize; 9] = [1, 511, 512, 4096, 4097, 16383, 16384, 16385, 20000];
const EIO: u32 = 5;
/// Longer than writes are handed on after a slow one, or after two.
const PAST_WATCH: Duration = Duration::from_millis(250);

/// A request under way, and what it reads.
struct Asked {
    data: Option<Vec<u8>>,
    fails: bool,
}

/// A client, and what the disk is to hold.
struct Scene<'a> {
    client: Client,
    has_chunks: bool,
    shadow: Vec<u8>,
    rng: &'a mut Rng,
}

impl Scene<'_> {
    /// Adds a request for anything in one slot of the disk to what is to be sent.
    fn ask(&mut self, slot: usize, all: &mut Vec<u8>) -> (u64, Asked) {
        let (rng, shadow) = (&mut *self.rng, &mut self.shadow);
        let len = LENGTHS[rng.below(LENGTHS.len() as u64) as usize];
        let at = (slot * SLOT_LEN + rng.below((SLOT_LEN - len) as u64) as usize).min(shadow.len() - len);
        let fails = OFFSET + at + len > GOOD_LEN;
        let (reads, has_flag) = (rng.one_in(2), rng.one_in(4));
        let (command, flag) = match reads {
            true => (command::READ, if self.has_chunks { command_flag::DF } else { 0 }),
            false => (command::WRITE, command_flag::FUA),
        };
        let request = Request::new(command, at as u64, len).flags(if has_flag { flag } else { 0 });
        let cookie = self.client.register(request);
        all.extend(self.client.header(request, cookie));
        if reads {
            return (cookie, Asked { data: (!fails).then(|| shadow[at..at + len].to_vec()), fails });
        }
        let data = rng.bytes(len);
        all.extend(&data);
        if !fails {
            shadow[at..at + len].copy_from_slice(&data);
        }
        (cookie, Asked { data: None, fails })
    }
}

fn serve(disk: Arc<Disk>, budget_len: usize) -> InProcess {
    let options = RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None };
    let spec = ExportSpec { offset: OFFSET as u64, ..ExportSpec::default() };
    InProcess::serve_as(&spec, RawDriver::open(disk, options).unwrap(), budget_len, Times::default())
}

fn requests_of_any_kind_are_answered_rightly(
    disk: &Arc<Disk>,
    budget_len: usize,
    wishes: Wishes,
    rng: &mut Rng,
) {
    let server = serve(Arc::clone(disk), budget_len);
    let client = Client::unix(server.socket(), "", wishes);
    assert_eq!(client.size, (DISK_LEN - OFFSET) as u64);
    let has_chunks = wishes.structured || wishes.extended;
    let mut scene = Scene { client, has_chunks, shadow: disk.bytes().split_off(OFFSET), rng };
    disk.fails_from.store(GOOD_LEN as u64, Ordering::Relaxed);
    let before = disk.read_in_place_len.load(Ordering::Relaxed);
    for _ in 0..ROUNDS {
        let (mut asked, mut all) = (HashMap::new(), Vec::new());
        let first = scene.rng.below((DISK_LEN / SLOT_LEN - DEPTH) as u64) as usize;
        for slot in first..first + DEPTH {
            let (cookie, what) = scene.ask(slot, &mut all);
            asked.insert(cookie, what);
        }
        // The server is to see all kinds of cuts.
        let (begin, end) = all.split_at(scene.rng.below(all.len() as u64) as usize);
        scene.client.stream().write_all(begin).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        scene.client.stream().write_all(end).unwrap();
        while scene.client.in_flight() > 0 {
            let reply = scene.client.reply().unwrap();
            let Asked { data, fails } = asked.remove(&reply.cookie).unwrap();
            assert_eq!(reply.error, if fails { EIO } else { 0 }, "{}", reply.text);
            if let Some(data) = data {
                assert_same("a read", &reply.data, &data);
            }
        }
    }
    disk.fails_from.store(u64::MAX, Ordering::Relaxed);
    let in_place_len = disk.read_in_place_len.load(Ordering::Relaxed);
    assert_eq!(in_place_len > before, disk.reads_in_place(), "{in_place_len} bytes were read in place");
    assert_same("the disk", &scene.client.read_all(), &scene.shadow);
    scene.client.disconnect();
    server.assert_clean();
}

#[test]
fn small_requests_are_answered_rightly_whether_they_wait_or_not() {
    let mut rng = Rng::new("session-small");
    let content = rng.bytes(DISK_LEN);
    let disks = [Disk::asked(&content, true), Disk::asked(&content, false), Disk::watched_to_write(&content)];
    for disk in disks {
        for (budget_len, wishes) in [
            (64 << 20, Wishes::SIMPLE),
            (64 << 20, Wishes::STRUCTURED),
            (64 << 20, Wishes::EXTENDED),
            (0, Wishes::SIMPLE),
        ] {
            requests_of_any_kind_are_answered_rightly(&disk, budget_len, wishes, &mut rng);
        }
    }
}

#[test]
fn what_a_file_has_lost_is_an_error_and_never_bytes_of_another_reply() {
    let disk = Disk::asked(&vec![7; DISK_LEN], true);
    let server = serve(Arc::clone(&disk), 64 << 20);
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
        disk.set_len(DISK_LEN as u64).unwrap();
        let mut client = Client::unix(server.socket(), "", wishes);
        let end = client.size;
        client.read(end - 8192, 8192);
        disk.set_len(DISK_LEN as u64 - 4096).unwrap();
        for len in [4097, 8192, 512] {
            let reply = client.ask(Request::new(command::READ, end - len as u64, len), &[]);
            assert_eq!(reply.error, EIO, "{len} bytes");
        }
        assert_eq!(client.read(0, 4096), [7; 4096]);
        client.disconnect();
    }
    server.assert_clean();
}

/// The session's other requests are not to wait for a disk that makes writers wait.
#[test]
fn writes_are_handed_on_for_a_while_after_a_slow_one() {
    let disk = Disk::asked(&vec![7; DISK_LEN], true);
    let server = serve(Arc::clone(&disk), 64 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    let submitted = || disk.submitted.load(Ordering::Relaxed);
    let mut write = |us| {
        disk.write_here_us.store(us, Ordering::Relaxed);
        client.write(8192, &[1; 4096]);
        submitted()
    };
    // A thread that loses its processor may come too late for what is to be seen, and take a write for slow itself.
    let in_place = (0..20).any(|_| {
        std::thread::sleep(PAST_WATCH);
        let before = submitted();
        write(0) == before && write(0) == before
    });
    assert!(in_place, "quick writes are handed on");
    let handed_on = (0..20).any(|_| {
        std::thread::sleep(PAST_WATCH);
        let before = write(3000);
        write(0) > before
    });
    assert!(handed_on, "none is after a slow one");
    client.disconnect();
    server.assert_clean();
}

#[test]
fn what_comes_next_of_small_reads_in_order_is_asked_for_once_they_wait() {
    for (in_place, asks) in [(true, false), (false, true)] {
        let disk = Disk::asked(&vec![7; DISK_LEN], in_place);
        let server = serve(Arc::clone(&disk), 64 << 20);
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        // More than makes it a stream.
        for at in (0..1 << 20).step_by(4096) {
            client.read(at, 4096);
        }
        client.disconnect();
        server.assert_clean();
        if asks {
            support::wait_until("what comes next is asked for", || !disk.asked.lock().unwrap().is_empty());
        } else {
            assert_eq!(disk.asked.lock().unwrap().len(), 0);
        }
    }
}
