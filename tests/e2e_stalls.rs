//! One disk that stalls, one client that vanishes: neither may be felt by anyone else, nor leave anything behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::client::{Client, Request, Wishes, is_hangup, one_of_each_thread};
use support::fuse::SlowFile;
use support::rng::Rng;
use support::server::{Export, Serve, Server};
use support::wire::command;
use support::{assert_same, proc, wait_until};

const READ_DELAY: Duration = Duration::from_secs(2);
const SLOW_LEN: u64 = 1 << 30;

/// Taken by each test for its whole time: what one of them loads the machine with is not what another one measures.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the slow clients to end when it goes, also when a check has failed: a scope waits for its threads, and
/// threads that nobody stops would make a hang of a failure.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Slow exports `slow0` and `slow1` of the same file, and a quick one.
fn exports(slow: &SlowFile, quick: &std::path::Path) -> Vec<Export> {
    let export = |name: &str, file: &std::path::Path| Export {
        file: file.into(),
        name: name.into(),
        format: Some("raw".into()),
        read_only: true,
    };
    vec![export("slow0", &slow.path()), export("slow1", &slow.path()), export("quick", quick)]
}

#[test]
fn a_stalled_disk_delays_nobody_else() {
    let _alone = alone();
    let folder = support::scratch("stall");
    let quick = folder.path().join("quick");
    let content = Rng::fixed(3).bytes(16 << 20);
    fs::write(&quick, &content).unwrap();
    // A machine that is busy with something else may be late with the end; one that waits for the disk always is.
    let mut ends = Vec::new();
    while ends.len() < 3 && ends.last().is_none_or(|elapsed| *elapsed > Duration::from_secs(2)) {
        let slow = SlowFile::mount(SLOW_LEN, READ_DELAY);
        let server = Serve::exports(exports(&slow, &quick)).args(&["--drain-timeout", "1"]).start();
        ends.push(end_of_a_stalled_server(server, &content));
    }
    if support::is_nbd_img() {
        let last = ends.last().unwrap();
        assert!(*last <= Duration::from_secs(2), "it has 1.5 s, and it took {ends:?} to end");
    }
}

/// Serves clients of a stalled disk and one of a quick disk; how long the server takes to end then.
fn end_of_a_stalled_server(mut server: Server, content: &[u8]) -> Duration {
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let elapsed = thread::scope(|scope| {
        let stop_slow_clients = StopOnDrop(&stop);
        for i in 0..4 {
            let (server, stop, answered) = (&server, &stop, &answered);
            scope.spawn(move || stalled_client(server, &format!("slow{}", i % 2), i, stop, answered));
        }
        thread::sleep(Duration::from_millis(500)); // the reads are under way now
        quick_reads_are_quick(&server, content);
        // The kernel has only some requests under way with FUSE's daemon, so the first answer may take several delays.
        let begin = Instant::now();
        while answered.load(Ordering::Relaxed) == 0 {
            assert!(begin.elapsed() < READ_DELAY * 15, "no slow read was answered: it was no test");
            thread::sleep(Duration::from_millis(10));
        }
        drop(stop_slow_clients);
        let begin = Instant::now();
        server.signal(Signal::TERM);
        // Until the process has ended as far as it can by itself: a zombie. Not until wait() returns: a read that FUSE's
        // own daemon has taken up cannot be interrupted, and the kernel keeps its thread until the answer comes.
        while fs::read_to_string(format!("/proc/{}/stat", server.pid()))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            assert!(begin.elapsed() < Duration::from_secs(20), "SIGTERM did not end the server");
            thread::sleep(Duration::from_millis(2));
        }
        begin.elapsed()
    });
    let status = server.wait(READ_DELAY * 10);
    if support::is_nbd_img() {
        assert!(status.success(), "{status}");
    }
    eprintln!("ended {elapsed:?} after SIGTERM with {status}");
    elapsed
}

/// Keeps 8 reads in flight, far apart, until the server hangs up.
fn stalled_client(server: &Server, export: &str, seed: u64, stop: &AtomicBool, answered: &AtomicUsize) {
    let mut client = Client::unix(server.socket(), export, Wishes::SIMPLE);
    let mut rng = Rng::fixed(seed);
    let mut submit = |client: &mut Client| {
        let offset = rng.below(SLOW_LEN >> 12) << 12;
        client.send(Request::new(command::READ, offset, 4096), &[]).map(drop)
    };
    for _ in 0..8 {
        submit(&mut client).unwrap();
    }
    loop {
        match client.reply() {
            Ok(reply) => {
                assert!(reply.error == 0 || stop.load(Ordering::Relaxed), "{reply:?}");
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) if is_hangup(&e) && stop.load(Ordering::Relaxed) => return,
            Err(e) => panic!("{export}: {e}"),
        }
        if !stop.load(Ordering::Relaxed) {
            submit(&mut client).unwrap();
        } else if client.in_flight() == 0 {
            return;
        }
    }
}

/// 4 KiB reads at depth 1 over more than two of the slow reads' times, old and new connections. A machine that is busy
/// with something else gets two more chances, and is not taken for a disk that holds others up, which costs them whole
/// delays.
fn quick_reads_are_quick(server: &Server, content: &[u8]) {
    for chance in 1..=3 {
        let (connected, p99) = quick_reads(server, content);
        if p99 < READ_DELAY / 4 && connected < READ_DELAY / 4 {
            return;
        }
        assert!(
            chance < 3,
            "p99 {p99:?} of quick reads, a new connection took {connected:?}, in each of 3 attempts"
        );
    }
}

/// The time to connect, and the 99th percentile of the reads' times.
fn quick_reads(server: &Server, content: &[u8]) -> (Duration, Duration) {
    let begin = Instant::now();
    let mut client = Client::unix(server.socket(), "quick", Wishes::STRUCTURED);
    let connected = begin.elapsed();
    let mut rng = Rng::fixed(9);
    let mut times = Vec::new();
    while begin.elapsed() < READ_DELAY * 5 / 2 || times.len() < 1000 {
        let at = usize::try_from(rng.below((content.len() >> 12) as u64)).unwrap() << 12;
        let asked = Instant::now();
        let data = client.read(at as u64, 4096);
        times.push(asked.elapsed());
        assert_same("a quick read", &data, &content[at..at + 4096]);
        if times.len() % 64 == 0 {
            thread::sleep(Duration::from_millis(1)); // so that the path through a parked session is measured, too
        }
    }
    client.disconnect();
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    eprintln!(
        "{} quick reads: median {:?}, p99 {p99:?}, max {:?}",
        times.len(),
        times[times.len() / 2],
        times.last().unwrap()
    );
    (connected, p99)
}

#[test]
fn what_is_in_flight_is_finished_on_sigterm() {
    let _alone = alone();
    let folder = support::scratch("drain");
    let quick = folder.path().join("quick");
    fs::write(&quick, vec![1; 4096]).unwrap();
    let slow = SlowFile::mount(SLOW_LEN, READ_DELAY);
    let mut server = Serve::exports(exports(&slow, &quick)).args(&["--drain-timeout", "20"]).start();
    let mut client = Client::unix(server.socket(), "slow0", Wishes::STRUCTURED);
    let idle = Client::unix(server.socket(), "quick", Wishes::STRUCTURED);
    let offsets: Vec<u64> = (1..=4).map(|i| i * (100 << 20)).collect();
    for &offset in &offsets {
        client.send(Request::new(command::READ, offset, 4096), &[]).unwrap();
    }
    thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    server.signal(Signal::TERM);
    let mut found = Vec::new();
    while client.in_flight() > 0 {
        let reply = client.reply().unwrap_or_else(|e| panic!("an answer was lost on SIGTERM: {e}"));
        assert_eq!(reply.error, 0, "{reply:?}");
        found.push(u64::from_be_bytes(reply.data[..8].try_into().unwrap()));
    }
    found.sort_unstable();
    assert_eq!(found, offsets);
    // An idle client that is waited for would take three quarters of the drain time. The kernel may wait for what it
    // reads ahead of the slow file, which is in nobody's hands.
    let status = server.wait(Duration::from_secs(14));
    assert!(status.success(), "{status}");
    assert!(begin.elapsed() < Duration::from_secs(14), "an idle client held up the end");
    drop(idle);
}

/// Half of the disk is written to by clients that vanish; the other half must stay as it is.
const RESET_DISK_LEN: usize = 16 << 20;

#[test]
fn vanishing_clients_leave_nothing_behind() {
    let socket = |server: &Server| server.socket().to_owned();
    resets("resets-unix", &[], |server, rng| {
        let mut client = Client::unix(&socket(server), "", Wishes::STRUCTURED);
        vanish_in_mid_request(&mut client, rng);
    });
}

#[test]
fn resetting_tcp_clients_leave_nothing_behind() {
    if !support::is_nbd_img() {
        eprintln!("qemu-nbd does not listen on a Unix socket and TCP at once");
        return;
    }
    resets("resets-tcp", &["--listen", "127.0.0.1:0"], |server, rng| {
        let stream = TcpStream::connect(server.tcp_address()).unwrap();
        // Closing sends RST and throws away what is queued.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        vanish_in_mid_request(&mut Client::tcp(stream, "", Wishes::SIMPLE), rng);
    });
}

/// `--cache none`, so that every read and write is submitted, and is under way when its client vanishes.
fn resets(test: &str, args: &[&str], reset: impl Fn(&Server, &mut Rng) + Sync) {
    const WORKERS: usize = 4;
    let _alone = alone();
    let rounds = support::count("NBD_IMG_RESETS", 2000);
    let folder = support::scratch(test);
    let disk = folder.path().join("disk");
    let mut rng = Rng::new(test);
    let content = rng.bytes(RESET_DISK_LEN);
    fs::write(&disk, &content).unwrap();
    let mut server = Serve::image(&disk)
        .format("raw")
        .args(&["--cache", "none", "--max-connections", "128"])
        .args(args)
        .qemu_args(&["--cache=none", "--aio=io_uring", "--shared=128"])
        .start();
    let mut round = |rounds: usize| {
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                let (mut rng, server, reset) = (rng.fork(), &server, &reset);
                scope.spawn(move || {
                    for _ in 0..rounds / WORKERS {
                        // Sessions that it has not ended yet keep their slots.
                        wait_until("the server keeps up", || sockets(server) < 96);
                        reset(server, &mut rng);
                    }
                });
            }
        });
    };
    one_of_each_thread(server.socket()).into_iter().for_each(Client::disconnect);
    round(rounds.min(400)); // whatever is made once and kept
    let before = settled(&server, usize::MAX);
    round(rounds);
    server.assert_alive();
    let after = settled(&server, before.0);
    eprintln!("{test}: (descriptors, resident, threads) {before:?}, after {rounds} resets {after:?}");
    assert!(after.0 <= before.0, "descriptors: {before:?} before, {after:?} after");
    assert!(after.1 <= before.1 + (24 << 20), "resident memory: {before:?} before, {after:?} after");
    // Pools and io_uring's own workers come and go with the load; one thread a reset would be a leak.
    assert!(after.2 <= before.2 + 64, "threads: {before:?} before, {after:?} after");
    // Every slot is free again. (There are more than a server on a busy machine can be behind with.)
    let clients: Vec<_> = (0..126).map(|_| Client::unix(server.socket(), "", Wishes::STRUCTURED)).collect();
    for mut client in clients {
        let half = RESET_DISK_LEN / 2;
        assert_same(
            "the untouched half",
            &client.read(half as u64, 1 << 20),
            &content[half..half + (1 << 20)],
        );
        client.disconnect();
    }
    server.stop();
    assert_same(
        "the untouched half",
        &fs::read(&disk).unwrap()[RESET_DISK_LEN / 2..],
        &content[RESET_DISK_LEN / 2..],
    );
}

fn sockets(server: &Server) -> usize {
    let targets = proc::descriptor_targets(server.pid());
    targets.iter().filter(|target| target.starts_with("socket:")).count()
}

/// Descriptors, resident bytes and threads once the descriptors are down to `limit`, or have not changed for a second.
fn settled(server: &Server, limit: usize) -> (usize, u64, u64) {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let descriptors = proc::descriptors(server.pid());
        if descriptors != last {
            (last, since) = (descriptors, Instant::now());
        }
        let patience = Duration::from_secs(if descriptors <= limit { 1 } else { 10 });
        if since.elapsed() > patience {
            return (descriptors, proc::resident_len(server.pid()), proc::threads(server.pid()));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends some requests and a part of one more, and is gone without reading an answer.
fn vanish_in_mid_request(client: &mut Client, rng: &mut Rng) {
    let half = (RESET_DISK_LEN / 2) as u64;
    let mut bytes = Vec::new();
    for _ in 0..rng.in_range(1..16) {
        let len = usize::try_from(rng.in_range(1..64) * 512).unwrap();
        let offset = rng.below((half - (64 << 10)) / 512) * 512;
        let write = rng.one_in(3);
        let request = Request::new(if write { command::WRITE } else { command::READ }, offset, len);
        bytes.extend(request.bytes(client.register(request)));
        if write {
            bytes.extend(rng.bytes(len));
        }
    }
    let cut = usize::try_from(rng.below(bytes.len().min(4096) as u64)).unwrap();
    bytes.truncate(bytes.len() - cut);
    // The server may have closed already; that is its right.
    let _ = client.stream().write_all(&bytes);
    if rng.one_in(3) {
        // A part of the first reply, if there is one.
        client.stream().set_patience(Some(Duration::from_millis(20))).unwrap();
        let _ = client.stream().read(&mut [0; 100]);
    }
}
