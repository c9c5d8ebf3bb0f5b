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
use support::tools::{run, tool};
use support::wire::option;
use support::{assert_same, proc, tls};

/// Of each kind.
const COUNT: usize = 1000;
/// Long enough for a busy machine to bring them all.
const HANDSHAKE_SECONDS: u64 = 20;

/// A CA's client, and a disk.
struct Scene {
    client: PathBuf,
    disk: PathBuf,
    content: Vec<u8>,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new(test: &str) -> (Self, Authority) {
        support::raise_file_limit();
        let folder = support::scratch(test);
        let authority = Authority::new("the CA of the tests");
        let client = folder.path().join("client");
        client_folder(&client, &authority, CLIENT, &authority.cert);
        let disk = folder.path().join("disk");
        let content = Rng::fixed(3).bytes(1 << 20);
        fs::write(&disk, &content).unwrap();
        (Scene { client, disk, content, folder }, authority)
    }

    /// Serves it under TLS for whoever wants it.
    fn serve(&self, args: &[&str]) -> Server {
        let timeout = HANDSHAKE_SECONDS.to_string();
        let common = ["--tls", "optional", "--handshake-timeout", &timeout];
        Serve::image(&self.disk).format("raw").args(&common).args(args).start()
    }

    fn reads(&self, mut client: Client) {
        assert_same("the disk", &client.read(4096, 65_536), &self.content[4096..4096 + 65_536]);
        client.disconnect();
    }
}

#[test]
fn a_crowd_that_comes_to_nothing_keeps_nobody_out() {
    let (scene, authority) = Scene::new("tls-crowd");
    let certs = scene.folder.path().join("server");
    server_folder(&certs, &authority, SERVER);
    let mut server = scene.serve(&["--tls-dir", certs.to_str().unwrap()]);
    let good = |server: &Server| {
        scene.reads(tls::client(server.socket(), &scene.client, rustls::ALL_VERSIONS, Wishes::STRUCTURED));
        scene.reads(Client::unix(server.socket(), "", Wishes::SIMPLE));
    };
    crowd(&mut server, 3, &client_hello(&scene.client), good);
    server.stop();
}

/// The same with OpenSSL on the server's side. (A whole ClientHello without a key would end the handshake.)
#[test]
fn with_keys_it_keeps_nobody_out_either() {
    let (scene, _) = Scene::new("psk-crowd");
    let keys = scene.folder.path().join("keys");
    fs::write(&keys, "alice:e151eaf1cd90a45fb0bc0ec5ee57e441\n").unwrap();
    let mut server = scene.serve(&["--tls-psk", keys.to_str().unwrap()]);
    let good = |server: &Server| {
        let (socket, keys) = (server.socket().display(), keys.display());
        let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={keys}");
        run(tool("nbdinfo").args(["--size", &uri]));
        scene.reads(Client::unix(server.socket(), "", Wishes::SIMPLE));
    };
    crowd(&mut server, 2, &client_hello(&scene.client), good);
    server.stop();
}

fn client_hello(folder: &Path) -> Vec<u8> {
    let config = tls::config(folder, rustls::ALL_VERSIONS);
    let mut hello = Vec::new();
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

/// Fills the server with connections, those in TLS stuck in so many kinds of ways, and tries good clients among them.
fn crowd(server: &mut Server, kinds: usize, hello: &[u8], good: impl Fn(&Server)) {
    for _ in 0..8 {
        good(server);
    }
    let before = proc::resident_len(server.pid());
    let begin = Instant::now();
    let silent: Vec<_> = (0..COUNT).map(|_| greet(server.socket())).collect();
    let slow: Vec<_> = (0..COUNT).map(|_| greet(server.socket())).collect();
    let in_tls: Vec<_> = (0..COUNT).map(|index| stuck(server, index % kinds, hello)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| drip(&slow, &over));
        (0..20).for_each(|_| good(server));
        let each = proc::resident_len(server.pid()).saturating_sub(before) as usize / (3 * COUNT);
        println!("all there and 20 good clients served in {:?}; {each} bytes each", begin.elapsed());
        assert!(each < 64 << 10, "{each} bytes for each");
        let evicted = server.stderr().contains("the oldest is closed");
        assert!(!evicted, "ulimit -Hn is too low for this test");
        silent.iter().chain(&in_tls).chain(&slow).for_each(assert_closed);
        over.store(true, Ordering::Relaxed);
    });
    server.assert_alive();
    good(server);
}
