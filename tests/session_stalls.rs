//! Clients that do not take their replies: left alone as long as nobody needs what they hold.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::time::{Duration, Instant};

use nbd_img::session::Times;
use nbd_img::session::budget::Lease;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::wire::command;

const STALL: Duration = Duration::from_millis(300);

/// A server of whose memory others have `others_len`, and a client that has asked for far more than its socket holds,
/// and does not read. It asks in one go: one that came to it later could find the connection cut off by then.
fn stalled(budget_len: usize, others_len: usize) -> (InProcess, Client, Lease) {
    let times = Times { stall: STALL, ..Times::default() };
    let server = InProcess::serve_with(Disk::new(&vec![5; 8 << 20]), budget_len, times);
    let others = server.budget.try_lease(others_len).unwrap();
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
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
