//! Clients that do not take their replies: left alone as long as nobody needs what they hold.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nbd_img::session::Times;
use nbd_img::session::budget::Lease;
use nbd_img_formats::Format;
use nbd_img_formats::open::{OpenOptions, open};
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::tools::qemu_img;
use support::wire::command;

const STALL: Duration = Duration::from_millis(300);

/// A server of whose memory others have `others_len`, and a client that has asked for far more than its socket holds,
/// and does not read. It asks in one go: one that came to it later could find the connection cut off by then.
fn stalled(budget_len: usize, others_len: usize) -> (InProcess, Client, Lease) {
    let times = Times { stall: STALL, ..Times::default() };
    let server = InProcess::serve_with(Disk::new(&vec![5; 8 << 20]), budget_len, times);
    let others = server.budget.try_lease(others_len).unwrap();
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    // The reply that ends its negotiation is sent before a thread is given the session.
    support::wait_until("the session is served", || server.shards.active_count() == 1);
    let request = Request::new(command::READ, 0, 1 << 20);
    let all: Vec<u8> = (0..48).flat_map(|_| request.bytes(client.register(request))).collect();
    client.stream().write_all(&all).unwrap();
    (server, client, others)
}

#[test]
fn a_client_that_stands_still_keeps_its_connection_while_there_is_memory() {
    let (server, mut client, others) = stalled(1 << 30, 0);
    std::thread::sleep(STALL * 5);
    for _ in 0..48 {
        assert_eq!(client.reply().unwrap().data, vec![5; 1 << 20]);
    }
    client.disconnect();
    drop(others);
    server.assert_clean();
}

#[test]
fn a_client_that_stands_still_with_the_memory_of_others_is_cut_off() {
    // From before it asks: this thread may be late to look at what has begun then.
    let begin = Instant::now();
    let (server, client, others) = stalled(64 << 20, 36 << 20);
    while server.shards.active_count() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(20), "the connection is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(begin.elapsed() > STALL / 2, "it was given no time");
    drop((client, others));
    server.assert_clean();
}

#[test]
fn half_a_request_is_not_waited_for_beside_a_busy_neighbour() {
    let times = Times { stall: Duration::from_secs(2), ..Times::default() };
    let server = InProcess::serve_with(Disk::new(&vec![5; 1 << 20]), 64 << 20, times);
    // As many as there may be shards, so that one of them is the other's neighbour.
    let threads = std::thread::available_parallelism().unwrap().get();
    let mut busy: Vec<Client> =
        (0..threads).map(|_| Client::unix(server.socket(), "", Wishes::SIMPLE)).collect();
    let mut halting = Client::unix(server.socket(), "", Wishes::SIMPLE);
    // Its memory is what the server looks for when it wakes those that are idle.
    assert_eq!(halting.read(0, 512 << 10).len(), 512 << 10);
    let write = Request::new(command::WRITE, 0, 4096);
    let cookie = halting.register(write);
    let header = halting.header(write, cookie);
    halting.stream().write_all(&header).unwrap();
    let begin = Instant::now();
    while server.shards.active_count() > threads {
        assert!(begin.elapsed() < Duration::from_secs(30), "half a request keeps its connection");
        for client in &mut busy {
            client.read(0, 512 << 10);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    drop((busy, halting));
    server.assert_clean();
}

/// The clusters that others give up are not to wait for a client that does not take its replies.
#[test]
fn a_client_that_stands_still_keeps_no_clusters_from_others() {
    const LEN: u64 = 32 << 20;
    let folder = support::scratch("stands-still");
    let folder = folder.path();
    std::fs::write(folder.join("source"), support::rng::Rng::fixed(1).bytes(LEN as usize)).unwrap();
    qemu_img(folder, "convert -f raw -O qcow2 source disk");
    let options = OpenOptions { format: Some(Format::Qcow2), writable: true, ..OpenOptions::default() };
    let driver = open(&folder.join("disk"), &options).unwrap().driver;
    let server = InProcess::serve_driver(driver.clone(), 256 << 20, Times::default());
    let mut still = Client::unix(server.socket(), "", Wishes::SIMPLE);
    let read = Request::new(command::READ, 0, 1 << 20);
    let all: Vec<u8> = (0..48).flat_map(|_| read.bytes(still.register(read))).collect();
    still.stream().write_all(&all).unwrap();
    // Until its socket holds all that it can.
    std::thread::sleep(Duration::from_millis(500));
    let room = || std::fs::metadata(folder.join("disk")).unwrap().blocks() * 512;
    let before = room();
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    assert_eq!(client.ask(Request::new(command::TRIM, LEN / 2, (LEN / 2) as usize), &[]).error, 0);
    client.flush();
    support::wait_until("the room of what was trimmed is given back", || room() < before - LEN / 4);
    client.disconnect();
    drop(still);
    server.assert_clean();
    driver.close().unwrap();
}
