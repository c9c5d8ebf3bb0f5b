//! Strangers: port scans, health checks, half-open and hostile connections must neither hurt a good client, nor fill
//! the log, nor leave anything behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use support::client::{
    Client, Wishes, go_data, greet, is_hangup, one_of_each_thread, option_bytes, read_option_reply,
};
use support::proc::{descriptor_numbers, descriptors_but_rings};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::wire::{option, option_reply};
use support::{raise_file_limit, scratch};

const PATIENCE: Duration = Duration::from_secs(30);
const PLAIN: Wishes = Wishes::SIMPLE;
const DISK_LEN: usize = 1 << 20;

/// A server on a Unix socket and on TCP, with what `args` add.
fn start(name: &str, args: &[&str]) -> (tempfile::TempDir, Server, SocketAddr) {
    let folder = scratch(name);
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![5; DISK_LEN]).unwrap();
    let server = Serve::image(&path).format("raw").args(&["--listen", "127.0.0.1:0"]).args(args).start();
    let address = server.tcp_address();
    (folder, server, address)
}

/// Runs `strangers` while a good client connects and reads again and again; wants that no round of it has to wait for the
/// strangers' time to be over (a minute; alone it takes about a millisecond, and tests/bench/crowd.py measures it), and
/// descriptors and log as before.
fn beside_a_good_client(name: &str, strangers: impl FnOnce(&Server, SocketAddr)) {
    let (_folder, mut server, address) = start(name, &["--handshake-timeout", "60"]);
    start_all_shards(&server);
    let before = settled_descriptors(&server, usize::MAX);
    let done = AtomicBool::new(false);
    let (rounds, slowest) = thread::scope(|scope| {
        let good = scope.spawn(|| {
            let (mut rounds, mut slowest) = (0_u32, Duration::ZERO);
            while !done.load(Ordering::Relaxed) || rounds == 0 {
                let begin = Instant::now();
                let mut client = Client::unix(server.socket(), "", PLAIN);
                assert_eq!(client.read(4096, 4096), [5; 4096]);
                client.disconnect();
                (rounds, slowest) = (rounds + 1, slowest.max(begin.elapsed()));
            }
            (rounds, slowest)
        });
        strangers(&server, address);
        done.store(true, Ordering::Relaxed);
        good.join().unwrap()
    });
    assert!(slowest < Duration::from_secs(50), "a good client waited {slowest:?} (of {rounds} rounds)");
    server.assert_alive();
    assert!(settled_descriptors(&server, before) <= before, "descriptors are left open");
    let log = server.stderr();
    let strange =
        log.lines().filter(|line| !line.contains("connection opened") && !line.contains("connection closed"));
    assert!(strange.count() < 20, "the strangers filled the log: {log}");
    server.stop();
}

/// Each of an export's threads has descriptors of its own, and keeps them; there are as many as cores.
fn start_all_shards(server: &Server) {
    one_of_each_thread(server.socket()).into_iter().for_each(Client::disconnect);
}

/// The server's descriptors once there are at most `wanted`, or after a while; twice the same when any number will do.
fn settled_descriptors(server: &Server, wanted: usize) -> usize {
    let begin = Instant::now();
    loop {
        thread::sleep(Duration::from_millis(50));
        let now = descriptors_but_rings(server.pid());
        if (wanted < usize::MAX && now <= wanted) || begin.elapsed() > PATIENCE {
            return now;
        }
        if wanted == usize::MAX && begin.elapsed() > Duration::from_millis(300) {
            return now;
        }
    }
}

/// Another thread for the export has no descriptors to begin with: whoever it was meant for is served by one that is there.
#[test]
fn a_thread_that_cannot_begin_costs_no_connection() {
    let (_folder, server, _) = start("no-descriptors", &[]);
    let mut first = Client::unix(server.socket(), "", PLAIN);
    assert_eq!(first.read(0, 512), [5; 512]);
    // Enough for a connection, and too few for what a thread opens (two of epoll's, and what wakes it).
    let open = descriptor_numbers(server.pid());
    let limit = (0..).filter(|number| !open.contains(number)).nth(3);
    let pid = Pid::from_raw(server.pid().try_into().unwrap());
    prlimit(pid, Resource::Nofile, Rlimit { current: limit, maximum: limit }).unwrap();
    for _ in 0..3 {
        let mut client = Client::unix(server.socket(), "", PLAIN);
        assert_eq!(client.read(4096, 4096), [5; 4096]);
        client.disconnect();
    }
    if thread::available_parallelism().unwrap().get() > 1 {
        server.wait_for_log("a thread of an export ended");
    }
    assert_eq!(first.read(0, 512), [5; 512]);
    first.disconnect();
    server.stop();
}

#[test]
fn a_thousand_connect_and_close() {
    beside_a_good_client("close", |server, address| {
        for i in 0..1000 {
            if i % 2 == 0 {
                drop(UnixStream::connect(server.socket()).unwrap());
            } else {
                drop(TcpStream::connect(address).unwrap());
            }
        }
    });
}

#[test]
fn a_thousand_connect_and_reset() {
    beside_a_good_client("reset", |_, address| {
        for i in 0..1000 {
            let mut stream = TcpStream::connect(address).unwrap();
            if i % 2 == 0 {
                stream.read_exact(&mut [0; 18]).unwrap();
                stream.write_all(&[0, 0, 0, 1]).unwrap();
            }
            // With a linger time of zero the kernel sends RST instead of FIN.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    });
}

#[test]
fn a_thousand_with_garbage() {
    let mut rng = Rng::new("garbage");
    beside_a_good_client("garbage", |server, _| {
        for i in 0..1000 {
            let mut stream = UnixStream::connect(server.socket()).unwrap();
            let garbage = match i % 4 {
                0 => b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
                // The head of a TLS ClientHello.
                1 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(8),
                // A client that means it, up to an option of 4 GiB.
                2 => [&[0, 0, 0, 3], b"IHAVEOPT".as_slice(), &[0, 0, 0, 7], &[0xff; 4]].concat(),
                _ => {
                    let len = rng.below(300);
                    rng.bytes(usize::try_from(len).unwrap())
                }
            };
            // The server may have hung up before all of it is sent.
            let _ = stream.write_all(&garbage);
        }
    });
}

#[test]
fn a_thousand_silent_ones() {
    raise_file_limit();
    beside_a_good_client("silent", |server, address| {
        let by_unix: Vec<_> = (0..500).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
        let by_tcp: Vec<_> = (0..700).map(|_| TcpStream::connect(address).unwrap()).collect();
        drop((by_unix, by_tcp));
    });
}

/// The server may have fewer descriptors than there are strangers: then those that have waited longest make room.
#[test]
fn the_oldest_of_too_many_silent_ones_give_way() {
    raise_file_limit();
    let (_folder, mut server) = with_file_limit("evict", "-n 600");
    let mut silent: Vec<_> = (0..700).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    server.wait_for_log("the oldest is closed");
    let mut client = Client::unix(server.socket(), "", PLAIN);
    assert_eq!(client.read(0, 512), [5; 512]);
    silent[0].set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut greeting = Vec::new();
    silent[0].read_to_end(&mut greeting).unwrap();
    assert_eq!(greeting.len(), 18, "closed after the greeting");
    server.assert_alive();
    server.stop();
}

#[test]
fn who_does_not_negotiate_in_time_is_closed() {
    let (_folder, server, _) = start("timeout", &["--handshake-timeout", "2"]);
    let mut idle = Client::unix(server.socket(), "", PLAIN);
    let begin = Instant::now();
    let mut silent = greet(server.socket());
    let mut slow = greet(server.socket());
    let dripping = thread::spawn(move || {
        // Long enough to go on for half a minute.
        let go = option_bytes(option::GO, &[0; 4096]);
        for byte in [[0, 0, 0, 3].as_slice(), &go].concat().into_iter().take(300) {
            if slow.write_all(&[byte]).is_err() {
                return true;
            }
            thread::sleep(Duration::from_millis(100));
        }
        false
    });
    assert!(dripping.join().unwrap(), "one byte at a time went through");
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    let elapsed = begin.elapsed();
    // The limit is 10 s unless told otherwise.
    assert!(elapsed > Duration::from_millis(1900) && elapsed < Duration::from_secs(9), "{elapsed:?}");
    assert_eq!(idle.read(0, 512), [5; 512], "the limit is for negotiation only");
    server.stop();
}

/// Sends GO and gives the type and data of the first answer.
fn go(stream: &mut (impl Read + Write)) -> (u32, Vec<u8>) {
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
    read_option_reply(stream, option::GO).unwrap()
}

#[test]
fn more_than_max_connections_are_refused_with_a_text() {
    let (_folder, server, _) = start("max", &["--max-connections", "2"]);
    let first = Client::unix(server.socket(), "", PLAIN);
    let mut second = Client::unix(server.socket(), "", PLAIN);
    let begin = Instant::now();
    for _ in 0..100 {
        let (kind, text) = go(&mut greet(server.socket()));
        assert_eq!(kind, option_reply::ERR_POLICY);
        assert!(String::from_utf8(text).unwrap().contains("--max-connections"));
    }
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    server.wait_for_log("clients refused");
    assert_eq!(server.stderr().matches("clients refused").count(), 1, "{}", server.stderr());
    assert_eq!(second.read(0, 512), [5; 512]);

    first.disconnect();
    let begin = Instant::now();
    loop {
        let mut stream = greet(server.socket());
        if go(&mut stream).0 != option_reply::ERR_POLICY {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "a freed slot cannot be had");
    }
    server.stop();
}

/// The limit on open files is set for a shell, which becomes the server.
fn with_file_limit(name: &str, ulimit: &str) -> (tempfile::TempDir, Server) {
    let folder = scratch(name);
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![5; DISK_LEN]).unwrap();
    let script = format!("ulimit {ulimit}; exec \"$@\"");
    let server = Serve::image(&path).format("raw").wrapper(&["sh", "-c", &script, "sh"]).start();
    (folder, server)
}

#[test]
fn the_limit_on_open_files_is_raised_to_the_need() {
    let (_folder, server) = with_file_limit("soft-limit", "-Sn 32");
    let clients: Vec<_> = (0..100).map(|_| Client::unix(server.socket(), "", PLAIN)).collect();
    drop(clients);
    server.stop();
}

#[test]
fn without_descriptors_a_good_client_still_gets_through() {
    let (_folder, mut server) = with_file_limit("hard-limit", "-n 40");
    let silent: Vec<_> = (0..200).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    for _ in 0..3 {
        let mut client = Client::unix(server.socket(), "", PLAIN);
        assert_eq!(client.read(0, 512), [5; 512]);
        client.disconnect();
    }
    server.wait_for_log("ulimit -Hn");
    server.assert_alive();
    drop(silent);
    // So many sessions that descriptors run out: the server must not spin, and serve again when they are gone.
    let sessions: Vec<_> =
        (0..60).map_while(|_| keep_if_served(UnixStream::connect(server.socket()).unwrap())).collect();
    assert!(sessions.len() > 5 && sessions.len() < 40, "{} sessions with 40 descriptors", sessions.len());
    drop(sessions);
    let mut client = Client::unix(server.socket(), "", PLAIN);
    assert_eq!(client.read(0, 512), [5; 512]);
    client.disconnect();
    server.stop();
}

/// Negotiates unless the server does not answer, for which a busy one gets time: only the last client takes all of it.
fn keep_if_served(mut stream: UnixStream) -> Option<UnixStream> {
    stream.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    stream.read_exact(&mut [0; 18]).ok()?;
    (go(&mut stream).0 == option_reply::INFO).then_some(stream)
}

#[test]
fn slots_come_back_however_a_client_goes() {
    let (_folder, server, address) = start("slots", &["--max-connections", "1"]);
    for i in 0..50 {
        let begin = Instant::now();
        let stream = loop {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.read_exact(&mut [0; 18]).unwrap();
            if go(&mut stream).0 == option_reply::INFO {
                break stream;
            }
            // The server learns a moment later that the one before has gone.
            assert!(begin.elapsed() < PATIENCE, "round {i}: the slot is lost");
        };
        assert_eq!(go(&mut greet(server.socket())).0, option_reply::ERR_POLICY, "one slot was had twice");
        if i % 2 == 0 {
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    server.stop();
}

#[test]
fn a_handshake_cut_off_at_any_byte_does_no_harm() {
    let (_folder, mut server, _) = start("cut", &[]);
    let whole = [[0, 0, 0, 3].as_slice(), &option_bytes(option::GO, &go_data(""))].concat();
    for end in 0..whole.len() {
        let mut stream = greet(server.socket());
        stream.write_all(&whole[..end]).unwrap();
    }
    server.assert_alive();
    // And with each byte alone it goes through.
    let mut stream = greet(server.socket());
    for byte in &whole {
        stream.write_all(&[*byte]).unwrap();
    }
    let (kind, _) = read_option_reply(&mut stream, option::GO).unwrap();
    assert_eq!(kind, option_reply::INFO);
    drop(stream);
    let mut unknown = greet(server.socket());
    unknown.write_all(&[0, 0, 0, 3]).unwrap();
    unknown.write_all(&option_bytes(option::GO, &go_data("no such export"))).unwrap();
    assert_eq!(read_option_reply(&mut unknown, option::GO).unwrap().0, option_reply::ERR_UNKNOWN);
    unknown.write_all(&option_bytes(option::ABORT, &[])).unwrap();
    assert_eq!(read_option_reply(&mut unknown, option::ABORT).unwrap().0, option_reply::ACK);
    let error = unknown.read_exact(&mut [0; 1]).unwrap_err();
    assert!(is_hangup(&error), "{error}");
    server.stop();
}
