//! A server's end: on signals, after the last client, with requests in flight, with clients and disks that do not play
//! along.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_recv_buffer_size;
use rustix::process::Signal;
use support::client::{Client, Request, Wishes, greet, is_hangup};
use support::images::{SMALL_DISK_LEN, small_disk};
use support::server::{Serve, Server};
use support::tools::{run, tool};
use support::wire::command;
use support::{scratch, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);
/// No end takes longer for which nobody is waited for, not even on a busy machine: a client that is waited for has a
/// drain time of 24 s or more.
const END_MAX: Duration = Duration::from_secs(20);
const PLAIN: Wishes = Wishes::SIMPLE;

#[test]
fn sighup_is_ignored_and_a_second_sigterm_ends_it_at_once() {
    let folder = scratch("signals");
    let (path, _) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--drain-timeout", "60"]).start();
    let _stuck = client_that_does_not_read(server.socket());
    server.signal(Signal::HUP);
    Client::unix(server.socket(), "", PLAIN).disconnect();
    server.signal(Signal::TERM);
    wait_until("the socket goes while the server drains", || !server.socket().exists());
    thread::sleep(Duration::from_millis(300));
    server.assert_alive();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(4));
}

#[test]
fn a_storm_of_signals_disturbs_nobody() {
    let folder = scratch("storm");
    let (path, content) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--drain-timeout", "60"]).start();
    let mut client = Client::unix(server.socket(), "", PLAIN);
    for _ in 0..100 {
        for _ in 0..100 {
            server.signal(Signal::HUP);
            server.signal(Signal::CHILD);
        }
        assert_eq!(client.read(512, 512), content[512..1024]);
    }
    client.disconnect();
    server.wait_for_log("SIGHUP ignored");
    assert!(server.stderr().lines().count() < 10, "the signals filled the log: {}", server.stderr());
    let begin = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(begin.elapsed() < END_MAX, "{:?}", begin.elapsed());
}

#[test]
fn a_client_that_does_not_read_cannot_hold_up_the_end() {
    let folder = scratch("drain");
    let (path, _) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--drain-timeout", "24"]).start();
    let _stuck = client_that_does_not_read(server.socket());
    let mut writer = Client::unix(server.socket(), "", PLAIN);
    writer.write(512, &[7; 512]);
    let begin = Instant::now();
    server.signal(Signal::TERM);
    // The time is the client's; the last flush has its own.
    assert_eq!(server.wait(Duration::from_secs(60)).code(), Some(0), "{}", server.stderr());
    assert!(begin.elapsed() < Duration::from_secs(50), "{:?}", begin.elapsed());
    assert_eq!(fs::read(&path).unwrap()[512..1024], [7; 512]);
}

/// Who starts a server for one client may ask it to end just when it does so by itself.
#[test]
fn a_signal_after_the_last_client_does_not_hurry_the_flush() {
    let folder = scratch("end-asked");
    let (path, _) = small_disk(folder.path());
    let mut server = with_bad_syncs(&path, "delay_enter=15s", &["--exit-last", "--drain-timeout", "60"]);
    let mut client = Client::unix(server.socket(), "", PLAIN);
    client.write(0, &[1; 512]);
    client.disconnect();
    server.wait_for_log("the last client has gone");
    server.signal(Signal::TERM);
    server.wait_for_log("ending already");
    assert_eq!(server.wait(Duration::from_secs(60)).code(), Some(0), "{}", server.stderr());
}

/// Runs the server under strace, which makes its syncs go wrong in the way that `how` says; the server keeps its own
/// process id.
fn with_bad_syncs(image: &Path, how: &str, args: &[&str]) -> Server {
    let inject = format!("inject=fdatasync,fsync:{how}");
    let wrapper =
        ["strace", "-D", "-f", "-q", "-o", "/dev/null", "-e", "trace=fdatasync,fsync", "-e", &inject];
    Serve::image(image).format("raw").wrapper(&wrapper).args(args).start()
}

#[test]
fn a_last_flush_that_fails_is_told_by_the_status() {
    let folder = scratch("flush-fails");
    let (path, _) = small_disk(folder.path());
    let mut server = with_bad_syncs(&path, "error=EIO", &["--drain-timeout", "30"]);
    Client::unix(server.socket(), "", PLAIN).write(0, &[1; 512]);
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(3));
    server.wait_for_log("cannot flush and close the image");
    assert!(!server.socket().exists());
}

#[test]
fn a_slow_last_flush_is_waited_for() {
    let folder = scratch("flush-slow");
    let (path, _) = small_disk(folder.path());
    let mut server = with_bad_syncs(&path, "delay_enter=12s", &["--drain-timeout", "1"]);
    Client::unix(server.socket(), "", PLAIN).write(0, &[1; 512]);
    let begin = Instant::now();
    server.signal(Signal::TERM);
    server.wait_for_log("is still being flushed");
    assert_eq!(server.wait(Duration::from_secs(60)).code(), Some(0), "{}", server.stderr());
    assert!(begin.elapsed() > Duration::from_secs(10), "the flush was not waited for");
}

#[test]
fn a_last_flush_that_hangs_is_left_behind_after_its_time() {
    let folder = scratch("flush-hangs");
    let (path, _) = small_disk(folder.path());
    let mut server = with_bad_syncs(&path, "delay_enter=15s", &["--flush-timeout", "1"]);
    Client::unix(server.socket(), "", PLAIN).write(0, &[1; 512]);
    let begin = Instant::now();
    server.signal(Signal::TERM);
    server.wait_for_log("was not flushed and closed within --flush-timeout");
    // The kernel keeps a zombie until strace lets go of the thread that hangs, so the end is looked at, not waited for.
    let stat = format!("/proc/{}/stat", server.pid());
    while !fs::read_to_string(&stat).unwrap().contains(") Z ") {
        assert!(begin.elapsed() < Duration::from_secs(12), "the server does not end");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.wait(PATIENCE).code(), Some(3));
}

/// Asks for far more than any socket holds and reads none of it.
fn client_that_does_not_read(socket: &Path) -> Client {
    let mut client = Client::unix(socket, "", PLAIN);
    for _ in 0..64 {
        client.send(Request::new(command::READ, 0, SMALL_DISK_LEN), &[]).unwrap();
    }
    thread::sleep(Duration::from_millis(200));
    client
}

#[test]
fn idle_clients_do_not_delay_the_end() {
    let folder = scratch("idle");
    let (path, _) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--drain-timeout", "30"]).start();
    let mut idle: Vec<_> = (0..20).map(|_| Client::unix(server.socket(), "", PLAIN)).collect();
    idle.iter_mut().for_each(|client| assert_eq!(client.read(0, 512).len(), 512));
    let begin = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(begin.elapsed() < END_MAX, "{:?}", begin.elapsed());
    assert!(is_hangup(&idle[0].reply().unwrap_err()));
}

#[test]
fn what_was_answered_before_the_end_is_in_the_file() {
    const WRITE_LEN: usize = 16 << 10;
    let folder = scratch("in-flight");
    let (path, content) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").start();
    let mut client = Client::unix(server.socket(), "", PLAIN);
    let send = |i: usize| {
        let request = Request::new(command::WRITE, (i * WRITE_LEN) as u64, WRITE_LEN);
        client.send(request, &[0xa5; WRITE_LEN]).unwrap()
    };
    let cookies: Vec<u64> = (0..SMALL_DISK_LEN / WRITE_LEN).map(send).collect();
    let first = client.reply().unwrap();
    server.signal(Signal::TERM);
    let mut answered = vec![first];
    let end = loop {
        match client.reply() {
            Ok(reply) => answered.push(reply),
            Err(error) => break error,
        }
    };
    assert!(is_hangup(&end), "{end}");
    assert_eq!(server.wait(PATIENCE).code(), Some(0), "{}", server.stderr());
    let found = fs::read(&path).unwrap();
    assert!(answered.iter().all(|reply| reply.error == 0), "{answered:?}");
    for (i, cookie) in cookies.into_iter().enumerate() {
        let part = i * WRITE_LEN..(i + 1) * WRITE_LEN;
        let written = found[part.clone()] == [0xa5; WRITE_LEN];
        assert!(written || found[part.clone()] == content[part], "half of write {i}");
        assert!(
            written || answered.iter().all(|reply| reply.cookie != cookie),
            "write {i} was answered and is lost"
        );
    }
}

#[test]
fn connections_that_have_not_negotiated_do_not_delay_the_end() {
    let folder = scratch("half-open");
    let (path, _) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--drain-timeout", "30"]).start();
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    let begin = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(begin.elapsed() < END_MAX, "{:?}", begin.elapsed());
    drop(silent);
}

#[test]
fn exit_last_ends_after_the_last_real_client() {
    let folder = scratch("exit-last");
    let (path, _) = small_disk(folder.path());
    let mut server = Serve::image(&path).format("raw").args(&["--exit-last"]).start();
    drop(UnixStream::connect(server.socket()).unwrap());
    drop(greet(server.socket()));
    run(tool("nbdinfo").arg("--list").arg(server.uri("")));
    thread::sleep(Duration::from_millis(100));
    // nbdinfo --list asks for each export, which makes it a client of none.
    server.assert_alive();
    let first = Client::unix(server.socket(), "", PLAIN);
    let second = Client::unix(server.socket(), "", PLAIN);
    first.disconnect();
    thread::sleep(Duration::from_millis(100));
    server.assert_alive();
    second.disconnect();
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(!server.socket().exists());
}

/// A client that keeps sending has bytes in the server's socket when that is closed, which must not cost it the replies
/// that are on their way.
#[test]
fn replies_reach_a_tcp_client_that_sends_on_to_the_end() {
    const COUNT: usize = 100;
    let folder = scratch("end-tcp");
    let (path, _) = small_disk(folder.path());
    let args = ["--drain-timeout", "60", "--listen", "127.0.0.1:0"];
    let mut server = Serve::image(&path).format("raw").args(&args).start();
    let stream = TcpStream::connect(server.tcp_address()).unwrap();
    // A window that does not even hold one of the replies.
    set_socket_recv_buffer_size(&stream, 256 << 10).unwrap();
    let mut client = Client::tcp(stream.try_clone().unwrap(), "", PLAIN);
    let read = Request::new(command::READ, 0, SMALL_DISK_LEN);
    let cookies: Vec<u64> = (0..COUNT).map(|_| client.register(read)).collect();
    let all: Vec<u8> = cookies.iter().flat_map(|cookie| read.bytes(*cookie)).collect();
    client.stream().write_all(&all).unwrap();
    let small = Request::new(command::READ, 0, 512);
    let later: Vec<_> = (0..60_000).map(|_| small.bytes(client.register(small))).collect();
    let mut answered = 0;
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let (ended, stream) = (&ended, &stream);
        scope.spawn(move || {
            for request in later {
                if ended.load(Ordering::Relaxed) || (&*stream).write_all(&request).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        server.signal(Signal::TERM);
        while let Ok(reply) = client.reply() {
            if cookies.contains(&reply.cookie) {
                assert_eq!(reply.error, 0);
                answered += 1;
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(answered, COUNT, "replies were lost");
    assert_eq!(server.wait(PATIENCE).code(), Some(0), "{}", server.stderr());
}
