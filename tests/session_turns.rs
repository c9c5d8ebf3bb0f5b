//! Connections of one shard take turns. A file of its own, because it measures time.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_img_formats::storage::MemoryStorage;
use support::client::{Client, Request, Wishes, go_data, greet, option_bytes, read_option_reply};
use support::in_process::InProcess;
use support::wire::{command, option, option_reply};

/// As many as fit into one receive buffer, with replies so short that the socket takes all of a batch.
const REQUESTS: usize = 149_000;
const LEN: usize = 1;

/// The turns that the neighbour with the fewest had beside a greedy client.
fn fewest_turns() -> u32 {
    let server = InProcess::serve(MemoryStorage::copy_of(&[3; LEN]).unwrap(), 256 << 20);
    let mut greedy = greet(server.socket());
    greedy.write_all(&[0, 0, 0, 3]).unwrap();
    greedy.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
    while read_option_reply(&mut greedy, option::GO).unwrap().0 != option_reply::ACK {}
    // Dealt evenly to as many shards as there are cores: one of these shares that of the greedy one.
    let cores = std::thread::available_parallelism().unwrap().get();
    let neighbours: Vec<Client> =
        (0..cores).map(|_| Client::unix(server.socket(), "", Wishes::SIMPLE)).collect();
    let request = Request::new(command::READ, 0, LEN);
    let all: Vec<u8> = (0..REQUESTS as u64).flat_map(|cookie| request.bytes(cookie)).collect();
    let done = AtomicBool::new(false);
    let fewest = std::thread::scope(|scope| {
        let mut sender = greedy.try_clone().unwrap();
        scope.spawn(move || sender.write_all(&all).unwrap());
        let pinging: Vec<_> = neighbours
            .into_iter()
            .map(|mut client| {
                let done = &done;
                scope.spawn(move || {
                    let mut count = 0;
                    while !done.load(Ordering::Relaxed) {
                        client.read(0, 512);
                        count += 1;
                    }
                    client.disconnect();
                    count
                })
            })
            .collect();
        let mut reply = vec![0; LEN + 16];
        for _ in 0..REQUESTS {
            greedy.read_exact(&mut reply).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        pinging.into_iter().map(|thread| thread.join().unwrap()).min().unwrap()
    });
    drop(greedy);
    server.assert_clean();
    fewest
}

#[test]
fn a_buffer_full_of_requests_does_not_hold_up_a_neighbour() {
    // Without turns they get none until the socket is full: some 20 in all, each time. On a busy machine a neighbour
    // may have few because its own thread does not run, but not again and again.
    let mut tries = Vec::new();
    while tries.len() < 5 && tries.last().is_none_or(|fewest| *fewest < 200) {
        tries.push(fewest_turns());
    }
    assert!(tries.last().is_some_and(|fewest| *fewest >= 200), "the turns of a neighbour: {tries:?}");
}
