//! Reading a cold disk from front to back: it is asked for ahead of the client, once, and what arrives is sent from the
//! file; whatever does not arrive is read as it always was.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use support::assert_same;
use support::client::{Client, Request, Wishes, is_hangup};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::command;

const DISK_LEN: usize = 48 << 20;
const LEN: usize = 256 << 10;
const DEPTH: usize = 8;

fn content() -> Vec<u8> {
    Rng::fixed(21).bytes(DISK_LEN)
}

/// Reads at these offsets, several at a time, and gives each reply to `check`.
fn read_all(
    client: &mut Client,
    offsets: impl IntoIterator<Item = usize>,
    mut check: impl FnMut(usize, u32, &[u8]),
) {
    let mut under_way = HashMap::new();
    let mut offsets = offsets.into_iter().fuse();
    loop {
        for offset in offsets.by_ref().take(DEPTH - under_way.len()) {
            under_way
                .insert(client.send(Request::new(command::READ, offset as u64, LEN), &[]).unwrap(), offset);
        }
        if under_way.is_empty() {
            return;
        }
        let reply = client.reply().unwrap();
        check(under_way.remove(&reply.cookie).unwrap(), reply.error, &reply.data);
    }
}

/// Reads a cold disk twice. Gives how many bytes were asked for and how many were sent in the first pass, and what was
/// asked for in the second one.
fn read_twice(content: &[u8], wishes: Wishes) -> (u64, u64, Vec<(u64, u64)>) {
    let disk = Disk::arriving(content);
    let server = InProcess::serve(disk.clone(), 256 << 20);
    let mut client = Client::unix(server.socket(), "", wishes);
    let mut pass = || {
        read_all(&mut client, (0..DISK_LEN).step_by(LEN), |offset, error, data| {
            assert_eq!(error, 0);
            assert_same("a read", data, &content[offset..][..LEN]);
        });
    };
    pass();
    let asked = std::mem::take(&mut *disk.asked.lock().unwrap());
    assert!(asked.windows(2).all(|pair| pair[0].1 <= pair[1].0), "twice: {asked:?}");
    let asked_len = asked.iter().map(|(begin, end)| end - begin).sum();
    let sent_len = disk.sent_len.load(Relaxed);
    pass();
    let again = std::mem::take(&mut *disk.asked.lock().unwrap());
    client.disconnect();
    server.assert_clean();
    (asked_len, sent_len, again)
}

#[test]
fn a_cold_stream_is_asked_for_once_and_sent_from_the_file() {
    const HALF: u64 = DISK_LEN as u64 / 2;
    let content = content();
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
        // All but the reads that were there before their bytes were asked for is sent, and when all is in memory
        // nothing is asked for any more. Who asks has a thread of its own, which may be late on a busy machine; but
        // not each time.
        let is_right = |(asked_len, sent_len, again): &(u64, u64, Vec<_>)| {
            *asked_len > HALF && *sent_len > HALF && again.is_empty()
        };
        let mut tries = Vec::new();
        while tries.len() < 5 && !tries.last().is_some_and(is_right) {
            tries.push(read_twice(&content, wishes));
        }
        assert!(tries.last().is_some_and(is_right), "asked for, sent, asked for again: {tries:?}");
    }
}

#[test]
fn reads_here_and_there_ask_for_nothing() {
    let content = content();
    let disk = Disk::arriving(&content);
    let server = InProcess::serve(disk.clone(), 256 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    // Far from each other, and never forward for long.
    let offsets = (0..12).map(|index| index * 7 % 12 * (4 << 20));
    read_all(&mut client, offsets, |offset, error, data| {
        assert_eq!(error, 0);
        assert_same("a read", data, &content[offset..][..LEN]);
    });
    assert_eq!(*disk.asked.lock().unwrap(), []);
    client.disconnect();
    server.assert_clean();
}

#[test]
fn what_fails_on_its_way_into_memory_is_an_error_of_its_read_alone() {
    let content = content();
    let bad = DISK_LEN / 2;
    let disk = Disk::arriving(&content);
    disk.fails_from.store(bad as u64, Relaxed);
    let server = InProcess::serve(disk, 256 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    read_all(&mut client, (0..DISK_LEN).step_by(LEN), |offset, error, data| {
        if offset < bad {
            assert_eq!(error, 0);
            assert_same("a read", data, &content[offset..][..LEN]);
        } else {
            assert_eq!(error, libc::EIO as u32);
        }
    });
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_large_cold_read_is_overtaken_and_answered_before_a_disconnect() {
    const LARGE_LEN: usize = 8 << 20;
    let content = content();
    let disk = Disk::arriving(&content);
    disk.hold(LARGE_LEN as u64 - 1);
    let server = InProcess::serve(disk.clone(), 256 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let large = client.send(Request::new(command::READ, 0, LARGE_LEN), &[]).unwrap();
    let small = client.send(Request::new(command::READ, 40 << 20, 4096), &[]).unwrap();
    let reply = client.reply().unwrap_or_else(|e| panic!("the large read holds up another: {e}"));
    assert_eq!(reply.cookie, small, "an answer before there was one");
    assert_same("the small read", &reply.data, &content[40 << 20..][..4096]);
    client.stream().write_all(&Request::new(command::DISC, 0, 0).bytes(0)).unwrap();
    // So that the server has seen it before it has the answer.
    std::thread::sleep(Duration::from_millis(100));
    disk.let_go(LARGE_LEN as u64 - 1);
    let reply = client.reply().unwrap();
    assert_eq!((reply.cookie, reply.error), (large, 0));
    assert_same("the large read", &reply.data, &content[..LARGE_LEN]);
    assert!(is_hangup(&client.reply().unwrap_err()));
    server.assert_clean();
}
