//! Large writes one behind the other, which a worker carries out while the session receives the next ones, where that is the
//! faster way.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::io::Write;
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbd_img::session::Times;
use nbd_img_formats::Storage;
use support::client::{Client, Request, Wishes};
use support::in_process::{Disk, InProcess, open_qcow2};
use support::rng::Rng;
use support::tools::qemu_img;
use support::wire::command;
use support::{assert_same, qcow2};

const MIB: usize = 1 << 20;
const DISK_LEN: usize = 48 * MIB;
const EIO: u32 = 5;
/// What a write takes where it is to be the slower way.
const SLOW_US: u64 = 3000;
/// The same where two milliseconds would have the disk taken for one that makes writers wait.
const WATCHED_SLOW_US: u64 = 1000;
/// Longer than the first such time.
const WATCH_TIME: Duration = Duration::from_millis(150);
/// What is written once to see which way writes go, behind what the tests write.
const PASS_LEN: usize = 16 * MIB;
const PASS_AT: usize = 16 * MIB;
/// No trial has so much of a pass go one way.
const MOST_LEN: u64 = 14 << 20;
/// More than anything here takes.
const LONG: Duration = Duration::from_secs(120);
/// A reply that has not come by then is held up.
const MISSED_TIME: Duration = Duration::from_secs(2);
const DEPTH: usize = 8;

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
            add(client, &mut all, request, &data[index * MIB..][..MIB])
        })
        .collect();
    (cookies, all)
}

/// Puts a request behind what is to be sent; returns its cookie.
fn add(client: &mut Client, all: &mut Vec<u8>, request: Request, data: &[u8]) -> u64 {
    let cookie = client.register(request);
    all.extend(client.header(request, cookie));
    all.extend(data);
    cookie
}

/// A client, and the socket that it uses.
fn connect(server: &InProcess) -> (UnixStream, Client) {
    connect_as(server, Wishes::SIMPLE)
}

fn connect_as(server: &InProcess, wishes: Wishes) -> (UnixStream, Client) {
    let socket = UnixStream::connect(server.socket()).unwrap();
    let client = Client::over(Box::new(socket.try_clone().unwrap()), "", wishes);
    (socket, client)
}

/// Writes zeroes once over a part of the disk, several requests of `len` at a time; returns how many bytes a worker wrote.
fn pass(client: &mut Client, disk: &Disk, len: usize) -> u64 {
    let before = disk.given_len.load(Ordering::Relaxed);
    let data = vec![0; len];
    for at in (PASS_AT..PASS_AT + PASS_LEN).step_by(len) {
        while client.in_flight() >= DEPTH {
            assert_eq!(client.reply().unwrap().error, 0);
        }
        client.send(Request::new(command::WRITE, at as u64, len), &data).unwrap();
    }
    while client.in_flight() > 0 {
        assert_eq!(client.reply().unwrap().error, 0);
    }
    disk.given_len.load(Ordering::Relaxed) - before
}

/// Writes on until passes go as `wanted`.
fn passes_until(what: &str, client: &mut Client, disk: &Disk, len: usize, wanted: impl Fn(u64) -> bool) {
    let (begin, mut given) = (Instant::now(), Vec::new());
    // A single one may be the pause of a trial.
    while !matches!(given[..], [.., last, other] if wanted(last) && wanted(other)) {
        assert!(begin.elapsed() < LONG, "{what}, bytes by workers: {given:?}");
        given.push(pass(client, disk, len));
    }
}

/// Has the session find out that a worker is the faster one, which it is only as long as that takes.
fn bring_worker_in(client: &mut Client, disk: &Disk) {
    bring_worker_in_by(client, disk, SLOW_US);
}

fn bring_worker_in_by(client: &mut Client, disk: &Disk, slow_us: u64) {
    disk.write_here_us.store(slow_us, Ordering::Relaxed);
    passes_until("no worker", client, disk, MIB, |given| given >= MOST_LEN);
    disk.write_here_us.store(0, Ordering::Relaxed);
}

/// Sends `all` on a thread of its own, for the server may not take all of it yet. A worker is of use where writes come one
/// behind the other, so what is to be sent is made up before.
fn send_apart(socket: &UnixStream, all: Vec<u8>) -> JoinHandle<()> {
    let mut socket = socket.try_clone().unwrap();
    std::thread::spawn(move || socket.write_all(&all).unwrap())
}

/// Whether all but one of the others are answered, of six writes of which the one at index `held` is held.
fn others_are_answered(
    socket: &UnixStream,
    client: &mut Client,
    disk: &Disk,
    data: &[u8],
    held: usize,
) -> bool {
    let at = (held * MIB) as u64;
    disk.hold(at);
    let (cookies, all) = writes(client, data, 6);
    socket.set_read_timeout(Some(MISSED_TIME)).unwrap();
    let sender = send_apart(socket, all);
    let mut answered = Vec::new();
    // The worker's next one waits with it. What comes behind that is not given to it when it takes so long.
    while answered.len() < 4
        && let Ok(reply) = client.reply()
    {
        answered.push(reply.cookie);
    }
    let (others, is_held) = (answered.len(), !answered.contains(&cookies[held]));
    disk.let_go(at);
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    while answered.len() < 6 {
        answered.push(client.reply().unwrap().cookie);
    }
    sender.join().unwrap();
    assert!(is_held, "it was answered before it was carried out");
    assert_same("the disk", &client.read(0, 6 * MIB), data);
    others == 4
}

#[test]
fn the_next_writes_are_received_and_answered_while_one_is_carried_out() {
    let _alone = alone();
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let (socket, mut client) = connect(&server);
    bring_worker_in(&mut client, &disk);
    // A write whose successor has not come at all is carried out by the session itself; when that is so is for the
    // scheduler to say.
    let mut rng = Rng::fixed(3);
    let seen = (0..10)
        .any(|chance| others_are_answered(&socket, &mut client, &disk, &rng.bytes(6 * MIB), chance % 4));
    assert!(seen, "a write that waits holds up those behind it");
    client.disconnect();
    server.assert_clean();
}

/// Whether a read is answered although all writes in front of it are held.
fn a_read_passes_held_writes(socket: &UnixStream, client: &mut Client, disk: &Disk, data: &[u8]) -> bool {
    (0..4).for_each(|index| disk.hold(index * MIB as u64));
    let (_, mut all) = writes(client, data, 4);
    let request = Request::new(command::READ, 8 * MIB as u64, 4096);
    let read = client.register(request);
    all.extend(client.header(request, read));
    socket.set_read_timeout(Some(MISSED_TIME)).unwrap();
    let sender = send_apart(socket, all);
    let first = client.reply();
    (0..4).for_each(|index| disk.let_go(index * MIB as u64));
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let passed = first.is_ok_and(|reply| reply.cookie == read);
    while client.in_flight() > 0 {
        client.reply().unwrap();
    }
    sender.join().unwrap();
    assert_same("the disk", &client.read(0, 4 * MIB), data);
    passed
}

#[test]
fn reads_pass_writes_that_a_slow_disk_holds_up() {
    let _alone = alone();
    let disk = Disk::watched_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let (socket, mut client) = connect(&server);
    bring_worker_in_by(&mut client, &disk, WATCHED_SLOW_US);
    let mut rng = Rng::fixed(6);
    let passed = (0..10).any(|_| {
        // Whatever was slow before is forgotten, so that a worker has the first of them.
        std::thread::sleep(WATCH_TIME);
        pass(&mut client, &disk, 64 << 10);
        let before = disk.given_len.load(Ordering::Relaxed);
        let passed = a_read_passes_held_writes(&socket, &mut client, &disk, &rng.bytes(4 * MIB));
        passed && disk.given_len.load(Ordering::Relaxed) > before
    });
    assert!(passed, "a slow disk holds up what does not need it");
    client.disconnect();
    server.assert_clean();
}

#[test]
fn streams_of_mixed_requests_are_right_with_and_without_memory() {
    let _alone = alone();
    for (seed, budget_len) in [(1, 0), (2, 3 * MIB), (3, 256 * MIB), (4, 256 * MIB)] {
        let mut rng = Rng::fixed(seed);
        let mut shadow = rng.bytes(DISK_LEN);
        let disk = Disk::quick_to_write(&shadow);
        let server = InProcess::serve(disk.clone(), budget_len);
        let (socket, mut client) = connect_as(&server, Wishes::STRUCTURED);
        let has_memory = budget_len == 256 * MIB;
        if has_memory {
            bring_worker_in(&mut client, &disk);
            shadow[PASS_AT..][..PASS_LEN].fill(0);
        }
        let before = disk.given_len.load(Ordering::Relaxed);
        for _ in 0..4 {
            // What is under way together does not overlap.
            let (mut at, mut all) = (0, Vec::new());
            while at < DISK_LEN {
                let len = match rng.below(9) {
                    0 => 512 + rng.below(100_000) as usize,
                    1 => (32 << 10) - 1 + rng.below(2) as usize,
                    2 => 64 << 10,
                    3 => 1 + rng.below(400_000) as usize,
                    4 => MIB - 1 + rng.below(2) as usize,
                    5 => 4 * MIB - 28 + rng.below(3) as usize,
                    6 => MIB + rng.below(3 * MIB as u64) as usize,
                    _ => MIB,
                }
                .min(DISK_LEN - at);
                if rng.below(8) > 0 {
                    let data = rng.bytes(len);
                    add(&mut client, &mut all, Request::new(command::WRITE, at as u64, len), &data);
                    shadow[at..at + len].copy_from_slice(&data);
                }
                at += len;
            }
            let sender = send_apart(&socket, all);
            while client.in_flight() > 0 {
                let reply = client.reply().unwrap();
                assert_eq!(reply.error, 0, "{}", reply.text);
            }
            sender.join().unwrap();
            assert_same("the disk", &client.read_all(), &shadow);
        }
        client.disconnect();
        server.assert_clean();
        let given = disk.given_len.load(Ordering::Relaxed) - before;
        assert!(!has_memory || given > DISK_LEN as u64 / 4, "{given} bytes by workers");
    }
}

#[test]
fn a_worker_that_is_the_slower_way_is_left_and_its_memory_given_back() {
    let _alone = alone();
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let (_socket, mut client) = connect(&server);
    bring_worker_in(&mut client, &disk);
    disk.write_given_us.store(SLOW_US, Ordering::Relaxed);
    passes_until("still a worker, or its memory", &mut client, &disk, MIB, |given| {
        given == 0 && 256 * MIB - server.budget.left_len() <= 4 * MIB
    });
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_write_that_fails_on_a_worker_fails_alone() {
    let _alone = alone();
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    bring_worker_in(&mut client, &disk);
    disk.fails_from.store(8 * MIB as u64, Ordering::Relaxed);
    let data = Rng::fixed(4).bytes(12 * MIB);
    let (cookies, all) = writes(&mut client, &data, 12);
    let before = disk.given_len.load(Ordering::Relaxed);
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
    assert!(disk.given_len.load(Ordering::Relaxed) > before, "no worker had any");
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
        bring_worker_in(&mut client, &disk);
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

#[test]
fn nobody_has_a_worker_where_more_sessions_write_large_requests_than_have_two_processors() {
    let _alone = alone();
    let others = std::thread::available_parallelism().unwrap().get() / 2;
    let disk = Disk::quick_to_write(&vec![0; DISK_LEN]);
    let server = InProcess::serve(disk.clone(), 256 * MIB);
    let mut clients: Vec<Client> = (0..others).map(|_| connect(&server).1).collect();
    let (_socket, mut client) = connect(&server);
    bring_worker_in(&mut client, &disk);
    let data = vec![0; 64 << 10];
    // On a busy machine the others may come to rest meanwhile.
    let none_given = (0..20).any(|_| {
        for client in &mut clients {
            for _ in 0..2 {
                client.send(Request::new(command::WRITE, 0, data.len()), &data).unwrap();
                assert_eq!(client.reply().unwrap().error, 0);
            }
        }
        pass(&mut client, &disk, 64 << 10) == 0
    });
    assert!(none_given, "a worker beside others");
    // They count no more when they rest.
    passes_until("no worker again", &mut client, &disk, 64 << 10, |given| {
        std::thread::sleep(Duration::from_millis(50));
        given >= MOST_LEN
    });
    for client in clients.into_iter().chain([client]) {
        client.disconnect();
    }
    server.assert_clean();
}

/// An image whose clusters a snapshot has, too, so that the first write to each waits and those behind it need not.
#[test]
fn streams_into_a_qcow2_image_with_a_snapshot_are_right_and_survive_failures() {
    let _alone = alone();
    let folder = support::scratch("large-writes-qcow2");
    let folder = folder.path();
    let mut rng = Rng::new("large-writes-qcow2");
    let original = rng.bytes(DISK_LEN);
    std::fs::write(folder.join("raw"), &original).unwrap();
    qemu_img(folder, "convert -f raw -O qcow2 raw made");
    qemu_img(folder, "snapshot -c before made");
    let disk = Disk::quick_to_write(&std::fs::read(folder.join("made")).unwrap());
    let driver = open_qcow2(disk.clone(), true);
    let server = InProcess::serve_driver(Arc::clone(&driver), 256 * MIB, Times::default());
    let (socket, mut client) = connect_as(&server, Wishes::STRUCTURED);
    bring_worker_in(&mut client, &disk);
    let mut shadow = original.clone();
    shadow[PASS_AT..][..PASS_LEN].fill(0);
    let before = disk.given_len.load(Ordering::Relaxed);
    for round in 0..6 {
        // What is appended fails.
        let fails = round % 3 == 1;
        let end = if fails { disk.len().unwrap() } else { u64::MAX };
        disk.fails_from.store(end, Ordering::Relaxed);
        let (mut sent, all) = stream_over_disk(&mut client, &mut rng, &mut shadow);
        let sender = send_apart(&socket, all);
        let mut failed = Vec::new();
        while client.in_flight() > 0 {
            let reply = client.reply().unwrap();
            let range = sent.remove(&reply.cookie).unwrap();
            assert!(reply.error == 0 || fails && reply.error == EIO, "{}", reply.text);
            failed.extend((reply.error != 0).then_some(range));
        }
        sender.join().unwrap();
        disk.fails_from.store(u64::MAX, Ordering::Relaxed);
        for range in failed {
            let data = shadow[range.clone()].to_vec();
            client.send(Request::new(command::WRITE, range.start as u64, data.len()), &data).unwrap();
            assert_eq!(client.reply().unwrap().error, 0);
        }
        assert_same("the disk", &client.read_all(), &shadow);
    }
    let given = disk.given_len.load(Ordering::Relaxed) - before;
    assert!(given > DISK_LEN as u64 / 2, "{given} bytes by workers");
    client.disconnect();
    server.assert_clean();
    driver.close().unwrap();
    std::fs::write(folder.join("made"), disk.bytes()).unwrap();
    qcow2::check_clean(folder, "made");
    assert_same("as QEMU reads it", &qcow2::content(folder, "made", None), &shadow);
    assert_same("the snapshot", &qcow2::content(folder, "made", Some("before")), &original);
}

/// Requests that change all of the disk from front to back: writes, some zeroes and discards. Gives their ranges by cookie,
/// and the bytes to send.
fn stream_over_disk(
    client: &mut Client,
    rng: &mut Rng,
    shadow: &mut [u8],
) -> (HashMap<u64, Range<usize>>, Vec<u8>) {
    let (mut sent, mut all) = (HashMap::new(), Vec::new());
    let mut at = 0;
    while at < DISK_LEN {
        let len = [64 << 10, 64 << 10, 100_352, 256 << 10, MIB][rng.below(5) as usize].min(DISK_LEN - at);
        let zero = match rng.below(12) {
            0 => Some(command::WRITE_ZEROES),
            1 => Some(command::TRIM),
            _ => None,
        };
        // What a discard leaves is zeroes for whole clusters only.
        let whole = at.is_multiple_of(64 << 10) && len.is_multiple_of(64 << 10);
        let (command, data) = match zero.filter(|_| whole) {
            Some(command) => (command, Vec::new()),
            None => (command::WRITE, rng.bytes(len)),
        };
        if data.is_empty() {
            shadow[at..at + len].fill(0)
        } else {
            shadow[at..at + len].copy_from_slice(&data)
        }
        sent.insert(add(client, &mut all, Request::new(command, at as u64, len), &data), at..at + len);
        at += len;
    }
    (sent, all)
}
