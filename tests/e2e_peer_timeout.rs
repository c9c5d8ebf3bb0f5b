//! TCP clients whose machines have gone: they are asked whether they are there, and given up.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use support::client::{Client, Request, Wishes};
use support::scratch;
use support::server::{Serve, Server};
use support::wire::command;

const PATIENCE: Duration = Duration::from_secs(30);
const DISK_LEN: usize = 1 << 20;

/// A server on TCP too, and a client that is connected there.
fn start(test: &str, args: &[&str]) -> (tempfile::TempDir, Server, TcpStream) {
    let folder = scratch(test);
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![3; DISK_LEN]).unwrap();
    let server = Serve::image(&disk).format("raw").args(&["--listen", "127.0.0.1:0"]).args(args).start();
    let stream = TcpStream::connect(server.tcp_address()).unwrap();
    (folder, server, stream)
}

/// A connection's timers as the kernel shows them: the keep-alive runs, and asks within half the time.
#[test]
fn a_silent_client_is_asked_whether_it_is_there() {
    let (_folder, server, stream) = start("keepalive", &["--peer-timeout", "40"]);
    let (local, remote) = (stream.peer_addr().unwrap().port(), stream.local_addr().unwrap().port());
    let mut client = Client::tcp(stream, "", Wishes::SIMPLE);
    client.read(0, 512);
    let begin = Instant::now();
    // The acknowledgements of what was sent may still be under way.
    let ticks = loop {
        match timer(local, remote) {
            Some((2, ticks)) => break ticks,
            other => assert!(begin.elapsed() < PATIENCE, "no keep-alive: {other:?}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    assert!(ticks <= 20 * 100, "the first question is {ticks} ticks away, not at most 20 s");
    client.disconnect();
    server.stop();
}

/// Kind and rest of the timer of one connection in /proc/net/tcp (proc(5)); 2 is keep-alive, a tick is 10 ms. Who
/// reads while other connections come and go may miss it.
fn timer(local: u16, remote: u16) -> Option<(u32, u64)> {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let port = |address: &str| u16::from_str_radix(address.split_once(':').unwrap().1, 16).unwrap();
    let row = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = row.into_iter().find(|row| port(row[1]) == local && port(row[2]) == remote)?;
    let (kind, ticks) = row[5].split_once(':').unwrap();
    Some((kind.parse().unwrap(), u64::from_str_radix(ticks, 16).unwrap()))
}

/// A client that takes no replies, and so stands for one whose machine has gone, is given up after --peer-timeout.
#[test]
fn a_client_that_takes_nothing_is_given_up() {
    let (_folder, mut server, stream) = start("peer-timeout", &["--peer-timeout", "2", "--exit-last"]);
    let mut client = Client::tcp(stream, "", Wishes::SIMPLE);
    client.stream().set_patience(Some(Duration::from_millis(200))).unwrap();
    // More than both kernels hold: until nothing is taken any more.
    let request = Request::new(command::READ, 0, DISK_LEN);
    assert!((0..1000).take_while(|_| client.send(request, &[]).is_ok()).count() >= 1);
    assert!(server.wait(PATIENCE).success(), "it ends with its last client");
    let begin = Instant::now();
    // Its log is read in another thread.
    while !(server.stderr().contains("connection lost") && server.stderr().contains("timed out")) {
        assert!(begin.elapsed() < PATIENCE, "{}", server.stderr());
        thread::sleep(Duration::from_millis(5));
    }
}
