//! Flushes that come together share one, whoever sends them, and each still covers what was answered before it came.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess, SYNC};
use support::wire::{command, errno};

const DISK_LEN: usize = 1 << 20;
const MANY: usize = 20;

fn server() -> (Arc<Disk>, InProcess) {
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 64 << 20);
    (disk, server)
}

fn connect(server: &InProcess) -> Client {
    Client::unix(server.socket(), "", Wishes::STRUCTURED)
}

fn send_flushes(client: &mut Client, count: usize) {
    for _ in 0..count {
        client.send(Request::new(command::FLUSH, 0, 0), &[]).unwrap();
    }
}

/// Waits for so many syncs to have begun.
fn wait_for_syncs(disk: &Disk, count: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while disk.syncs.load(Relaxed) < count {
        assert!(Instant::now() < deadline, "{} syncs", disk.syncs.load(Relaxed));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns when the server has received all that the client sent before: by a write, which it answers meanwhile.
fn is_received(client: &mut Client) {
    assert_eq!(client.ask(Request::new(command::WRITE, 0, 512), &[1; 512]).error, 0);
}

/// One flush is under way and holds still; so many more of the same client wait for the next.
fn hold_one(disk: &Disk, client: &mut Client, more: usize) {
    disk.hold(SYNC);
    send_flushes(client, 1);
    wait_for_syncs(disk, 1);
    send_flushes(client, more);
    is_received(client);
}

#[test]
fn flushes_that_come_while_one_is_under_way_share_the_next() {
    let (disk, server) = server();
    let (mut one, mut other) = (connect(&server), connect(&server));
    hold_one(&disk, &mut one, MANY);
    send_flushes(&mut other, MANY);
    is_received(&mut other);
    assert_eq!(disk.syncs.load(Relaxed), 1, "a second one at the same time");
    disk.let_go(SYNC);
    for _ in 0..=MANY {
        assert_eq!(one.reply().unwrap().error, 0);
    }
    for _ in 0..MANY {
        assert_eq!(other.reply().unwrap().error, 0);
    }
    assert_eq!(disk.syncs.load(Relaxed), 2);
    // And the next one is one again.
    one.flush();
    assert_eq!(disk.syncs.load(Relaxed), 3);
    one.disconnect();
    other.disconnect();
    server.assert_clean();
}

#[test]
fn a_flush_does_not_take_the_answer_of_one_that_began_before_it_came() {
    let (disk, server) = server();
    let mut client = connect(&server);
    hold_one(&disk, &mut client, 0);
    send_flushes(&mut client, 1);
    is_received(&mut client);
    disk.let_go(SYNC);
    assert_eq!(client.reply().unwrap().error, 0);
    assert_eq!(client.reply().unwrap().error, 0);
    assert_eq!(disk.syncs.load(Relaxed), 2, "the write was answered after the first had begun");
    client.disconnect();
    server.assert_clean();
}

/// A flush that is under way and all that wait for the next end with this error when `fail` is set.
fn all_fail(fail: impl Fn(&Disk) -> &AtomicBool, error: u32) {
    let (disk, server) = server();
    let mut client = connect(&server);
    hold_one(&disk, &mut client, MANY);
    fail(&disk).store(true, Relaxed);
    disk.let_go(SYNC);
    for _ in 0..=MANY {
        assert_eq!(client.reply().unwrap().error, error);
    }
    fail(&disk).store(false, Relaxed);
    // Nobody is left over, and the next flush is one.
    client.flush();
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_sync_that_fails_is_told_to_all_who_waited() {
    all_fail(|disk| &disk.sync_fails, errno::ENOSPC);
}

#[test]
fn after_a_panic_nobody_is_left_waiting() {
    all_fail(|disk| &disk.sync_panics, errno::EIO);
}

#[test]
fn who_goes_while_flushes_wait_leaves_nothing_behind() {
    let (disk, server) = server();
    let (mut one, mut other) = (connect(&server), connect(&server));
    hold_one(&disk, &mut one, 0);
    send_flushes(&mut other, MANY);
    is_received(&mut other);
    drop(other);
    send_flushes(&mut one, 1);
    is_received(&mut one);
    disk.let_go(SYNC);
    assert_eq!(one.reply().unwrap().error, 0);
    assert_eq!(one.reply().unwrap().error, 0);
    one.disconnect();
    server.assert_clean();
}
