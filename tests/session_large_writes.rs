//! Large writes one behind the other, which workers carry out while the session receives the next one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::command;

const MIB: usize = 1 << 20;
const DISK_LEN: usize = 48 * MIB;
const EIO: u32 = 5;

/// Workers are for as many sessions as half of the processors, counted over the process.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    assert!(std::thread::available_parallelism().unwrap().get() > 1, "these tests need two processors");
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The first `count` MiB of `data` as so many writes, from offset 0 on: their cookies, and the bytes to send.
fn writes(client: &mut Client, data: &[u8], count: usize) -> (Vec<u64>, Vec<u8>) {
    let mut all = Vec::new();
    let cookies = (0..count)
        .map(|index| {
            let request = Request::new(command::WRITE, (index * MIB) as u64, MIB);
            let cookie = client.register(request);
            all.extend(client.header(request, cookie));
            all.extend(&data[index * MIB..][..MIB]);
            cookie
        })
        .collect();
    (cookies, all)
}

/// A client, and the socket that it uses.
fn connect(server: &InProcess) -> (UnixStream, Client) {
    let socket = UnixStream::connect(server.socket()).unwrap();
    let client = Client::over(Box::new(socket.try_clone().unwrap()), "", Wishes::SIMPLE);
    (socket, client)
}

/// Sends `all` on a thread of its own, for the server may not take all of it yet, and has replies missed after 2 s.
fn send_apart(socket: &UnixStream, all: Vec<u8>) -> JoinHandle<()> {
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut socket = socket.try_clone().unwrap();
    std::thread::spawn(move || socket.write_all(&all).unwrap())
}

/// Whether all others of six writes are answered while the one at index `held` is held.
fn others_are_answered(server: &InProcess, disk: &Disk, data: &[u8], held: usize) -> bool {
    let (socket, mut client) = connect(server);
    let at = (held * MIB) as u64;
    disk.hold(at);
    let (cookies, all) = writes(&mut client, data, 6);
    let sender = send_apart(&socket, all);
    let mut answered = Vec::new();
    while answered.len() < 5
        && let Ok(reply) = client.reply()
    {
        answered.push(reply.cookie);
    }
    let others = answered.len();
    disk.let_go(at);
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    while answered.len() < 6 {
        answered.push(client.reply().unwrap().cookie);
    }
    sender.join().unwrap();
    assert!(others < 5 || answered[5] == cookies[held], "it was answered before it was carried out");
    assert_same("the disk", &client.read(0, 6 * MIB), data);
    client.disconnect();
    others == 5
}

#[test]
fn the_next_writes_are_received_and_answered_while_one_is_carried_out() {
    let _alone = alone();
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    // A write whose successor has not come at all is carried out by the session itself; when that is so is for the
    // scheduler to say.
    let mut rng = Rng::fixed(3);
    let seen = (0..10).any(|chance| others_are_answered(&server, &disk, &rng.bytes(6 * MIB), chance % 4));
    assert!(seen, "a write that waits holds up those behind it");
    server.assert_clean();
}

/// Whether a read is answered although all writes in front of it are held.
fn a_read_passes_held_writes(server: &InProcess, disk: &Disk, data: &[u8]) -> bool {
    let (socket, mut client) = connect(server);
    (0..4).for_each(|index| disk.hold(index * MIB as u64));
    let (_, mut all) = writes(&mut client, data, 4);
    let request = Request::new(command::READ, 8 * MIB as u64, 4096);
    let read = client.register(request);
    all.extend(client.header(request, read));
    let sender = send_apart(&socket, all);
    let first = client.reply();
    (0..4).for_each(|index| disk.let_go(index * MIB as u64));
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let passed = first.is_ok_and(|reply| reply.cookie == read);
    while client.in_flight() > 0 {
        client.reply().unwrap();
    }
    sender.join().unwrap();
    assert_same("the disk", &client.read(0, 4 * MIB), data);
    client.disconnect();
    passed
}

#[test]
fn reads_pass_writes_that_a_slow_disk_holds_up() {
    let _alone = alone();
    let disk = Disk::watched_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let mut rng = Rng::fixed(6);
    let passed = (0..10).any(|_| a_read_passes_held_writes(&server, &disk, &rng.bytes(4 * MIB)));
    assert!(passed, "a slow disk holds up what does not need it");
    server.assert_clean();
}

#[test]
fn streams_of_mixed_requests_are_right_with_and_without_memory() {
    let _alone = alone();
    for (seed, budget_len) in [(1, 0), (2, 3 * MIB), (3, 256 * MIB), (4, 256 * MIB)] {
        let mut rng = Rng::fixed(seed);
        let mut shadow = rng.bytes(DISK_LEN);
        let server = InProcess::serve(Disk::quick_to_write(&shadow), budget_len);
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        for _ in 0..4 {
            // What is under way together does not overlap.
            let mut at = 0;
            while at < DISK_LEN {
                let len = match rng.below(6) {
                    0 => 512 + rng.below(100_000) as usize,
                    1 => MIB - 1 + rng.below(2) as usize,
                    2 => 4 * MIB - 28 + rng.below(3) as usize,
                    3 => MIB + rng.below(3 * MIB as u64) as usize,
                    _ => MIB,
                }
                .min(DISK_LEN - at);
                if rng.below(8) > 0 {
                    let data = rng.bytes(len);
                    client.send(Request::new(command::WRITE, at as u64, len), &data).unwrap();
                    shadow[at..at + len].copy_from_slice(&data);
                }
                at += len;
            }
            while client.in_flight() > 0 {
                let reply = client.reply().unwrap();
                assert_eq!(reply.error, 0, "{}", reply.text);
            }
            assert_same("the disk", &client.read_all(), &shadow);
        }
        client.disconnect();
        server.assert_clean();
    }
}

#[test]
fn a_write_that_fails_on_a_worker_fails_alone() {
    let _alone = alone();
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    disk.fails_from.store(8 * MIB as u64, Ordering::Relaxed);
    let data = Rng::fixed(4).bytes(12 * MIB);
    let (cookies, all) = writes(&mut client, &data, 12);
    client.stream().write_all(&all).unwrap();
    for _ in 0..12 {
        let reply = client.reply().unwrap();
        let index = cookies.iter().position(|cookie| *cookie == reply.cookie).unwrap();
        assert_eq!(reply.error, if index < 8 { 0 } else { EIO }, "write {index}: {}", reply.text);
    }
    disk.fails_from.store(u64::MAX, Ordering::Relaxed);
    let mut expected = data;
    expected[8 * MIB..].fill(0);
    assert_same("the disk", &client.read(0, 12 * MIB), &expected);
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_client_that_goes_leaves_its_writes_and_no_memory_behind() {
    let _alone = alone();
    for half in [true, false] {
        let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
        let server = InProcess::serve(disk.clone(), 256 * MIB);
        let (socket, mut client) = connect(&server);
        let data = Rng::fixed(5).bytes(3 * MIB);
        disk.hold(2 * MIB as u64);
        let (cookies, all) = writes(&mut client, &data, 3);
        // The session may carry out the last one itself.
        client.stream().write_all(&all).unwrap();
        wait_until("no write is held", || disk.held_up() == 1);
        if half {
            socket.shutdown(Shutdown::Write).unwrap();
            disk.let_go(2 * MIB as u64);
            let mut answered: Vec<u64> = (0..3).map(|_| client.reply().unwrap().cookie).collect();
            answered.sort_unstable();
            let mut asked = cookies;
            asked.sort_unstable();
            assert_eq!(answered, asked);
            drop((client, socket));
        } else {
            drop((client, socket));
            disk.let_go(2 * MIB as u64);
        }
        server.assert_clean();
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        assert_same("the disk", &client.read(0, 3 * MIB), &data);
        client.disconnect();
        server.assert_clean();
    }
}
