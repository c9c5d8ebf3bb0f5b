//! Three thousand connections at once that come to nothing (silent, a byte a second, stuck somewhere in TLS) keep no good
//! client out, cost little memory, and are closed in time. How long a good client takes meanwhile is a matter of the
//! machine: tests/bench/crowd.py measures it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Client, Wishes, greet, option_bytes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::wire::option;
use support::{assert_same, proc, tls};

/// Of each kind.
const COUNT: usize = 1000;
/// Long enough for a busy machine to bring them all.
const HANDSHAKE_SECONDS: u64 = 20;

struct Scene {
    server: Server,
    client_folder: PathBuf,
    content: Vec<u8>,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = support::scratch("tls-crowd");
        let authority = Authority::new("the CA of the tests");
        let (certs, client_folder_path) = (folder.path().join("server"), folder.path().join("client"));
        server_folder(&certs, &authority, SERVER);
        client_folder(&client_folder_path, &authority, CLIENT, &authority.cert);
        let disk = folder.path().join("disk");
        let content = Rng::fixed(3).bytes(1 << 20);
        fs::write(&disk, &content).unwrap();
        let timeout = HANDSHAKE_SECONDS.to_string();
        let (certs, timeout) = (certs.to_str().unwrap(), timeout.as_str());
        let args = ["--tls", "optional", "--tls-dir", certs, "--handshake-timeout", timeout];
        let server = Serve::image(&disk).format("raw").args(&args).start();
        Scene { server, client_folder: client_folder_path, content, _folder: folder }
    }

    /// Good clients, in plain text and under TLS.
    fn good(&self) -> Duration {
        let begin = Instant::now();
        let socket = self.server.socket();
        let secured = tls::client(socket, &self.client_folder, rustls::ALL_VERSIONS, Wishes::STRUCTURED);
        for mut client in [Client::unix(socket, "", Wishes::SIMPLE), secured] {
            assert_same("the disk", &client.read(4096, 65_536), &self.content[4096..4096 + 65_536]);
            client.disconnect();
        }
        begin.elapsed()
    }
}

fn client_hello(folder: &Path) -> Vec<u8> {
    let mut hello = Vec::new();
    let config = tls::config(folder, rustls::ALL_VERSIONS);
    rustls::ClientConnection::new(config, "localhost".try_into().unwrap())
        .unwrap()
        .write_tls(&mut hello)
        .unwrap();
    hello
}

/// Behind STARTTLS, in the middle of the ClientHello, or behind it.
fn stuck(server: &Server, kind: usize, hello: &[u8]) -> UnixStream {
    let mut stream = tls::starttls(server.socket());
    let sent = [0, hello.len() / 2, hello.len()][kind];
    stream.write_all(&hello[..sent]).unwrap();
    stream
}

/// A negotiation that would take an hour, one byte a second to each of them, until it is `over`.
fn drip(streams: &[UnixStream], over: &AtomicBool) {
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(option::LIST, &[]).repeat(200));
    for byte in bytes {
        for mut stream in streams {
            // It may have been closed.
            let _ = stream.write(&[byte]);
        }
        for _ in 0..20 {
            if over.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Reads up to the end, which has to come.
fn assert_closed(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(Duration::from_secs(3 * HANDSHAKE_SECONDS))).unwrap();
    loop {
        match stream.read(&mut [0; 4096]) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("it was not closed: {error}"),
        }
    }
}

#[test]
fn a_crowd_that_comes_to_nothing_keeps_nobody_out() {
    support::raise_file_limit();
    let mut scene = Scene::new();
    for _ in 0..8 {
        scene.good();
    }
    let before = proc::resident_len(scene.server.pid());
    let hello = client_hello(&scene.client_folder);
    let begin = Instant::now();
    let silent: Vec<_> = (0..COUNT).map(|_| greet(scene.server.socket())).collect();
    let slow: Vec<_> = (0..COUNT).map(|_| greet(scene.server.socket())).collect();
    let in_tls: Vec<_> = (0..COUNT).map(|index| stuck(&scene.server, index % 3, &hello)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| drip(&slow, &over));
        let slowest = (0..20).map(|_| scene.good()).max().unwrap();
        let each = proc::resident_len(scene.server.pid()).saturating_sub(before) as usize / (3 * COUNT);
        println!(
            "there after {:?}; {each} bytes each, two good clients took at most {slowest:?}",
            begin.elapsed()
        );
        assert!(each < 64 << 10, "{each} bytes for each");
        assert!(
            !scene.server.stderr().contains("the oldest is closed"),
            "ulimit -Hn is too low for this test"
        );
        silent.iter().chain(&in_tls).chain(&slow).for_each(assert_closed);
        over.store(true, Ordering::Relaxed);
    });
    scene.server.assert_alive();
    scene.good();
    scene.server.stop();
}
