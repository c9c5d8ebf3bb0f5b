//! A thousand connections that stand still somewhere in TLS keep no good client out, cost little memory, and are closed
//! in time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use support::assert_same;
use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Wishes, greet};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{run, tool};
use support::{proc, tls};

const COUNT: usize = 900; // with a good client less than what may be in negotiation, and open at both ends

/// More descriptors than most shells give.
fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit { current: maximum.map_or(Some(8192), |max| Some(max.min(8192))), maximum },
    )
    .unwrap();
}

/// Silent, behind STARTTLS, in the middle of the ClientHello, or behind it.
fn stuck(server: &Server, kind: usize, hello: &[u8]) -> UnixStream {
    if kind == 0 {
        return greet(server.socket());
    }
    let mut stream = tls::starttls(server.socket());
    let sent = [0, hello.len() / 2, hello.len()][kind - 1];
    stream.write_all(&hello[..sent]).unwrap();
    stream
}

#[test]
fn a_crowd_stuck_in_tls_keeps_nobody_out() {
    raise_limit();
    let folder = support::scratch("tls-crowd");
    let authority = Authority::new("the CA of the tests");
    let (certs, client) = (folder.path().join("server"), folder.path().join("client"));
    server_folder(&certs, &authority, SERVER);
    client_folder(&client, &authority, CLIENT, &authority.cert);
    let disk = folder.path().join("disk");
    let content = Rng::fixed(3).bytes(1 << 20);
    fs::write(&disk, &content).unwrap();
    let args = ["--tls-dir", certs.to_str().unwrap(), "--handshake-timeout", "12"];
    let mut server = Serve::image(&disk).format("raw").args(&args).start();
    let good = |server: &Server| {
        let begin = Instant::now();
        let mut good = tls::client(server.socket(), &client, rustls::ALL_VERSIONS, Wishes::STRUCTURED);
        assert_same("the disk", &good.read(4096, 65_536), &content[4096..4096 + 65_536]);
        good.disconnect();
        begin.elapsed()
    };
    crowd(&mut server, 4, &hello(&client), good);
    server.stop();
}

/// The same with OpenSSL on the server's side. (A whole ClientHello without a key would end the handshake.)
#[test]
fn a_crowd_stuck_in_tls_with_keys_keeps_nobody_out() {
    raise_limit();
    let folder = support::scratch("psk-crowd");
    let authority = Authority::new("the CA of the tests");
    let client = folder.path().join("client");
    client_folder(&client, &authority, CLIENT, &authority.cert);
    let (disk, keys) = (folder.path().join("disk"), folder.path().join("keys"));
    fs::write(&disk, vec![1; 1 << 20]).unwrap();
    fs::write(&keys, "alice:e151eaf1cd90a45fb0bc0ec5ee57e441\n").unwrap();
    let args = ["--tls-psk", keys.to_str().unwrap(), "--handshake-timeout", "12"];
    let mut server = Serve::image(&disk).format("raw").args(&args).start();
    let good = |server: &Server| {
        let begin = Instant::now();
        let (socket, keys) = (server.socket().display(), keys.display());
        let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={keys}");
        run(tool("nbdinfo").args(["--size", &uri]));
        begin.elapsed()
    };
    crowd(&mut server, 3, &hello(&client), good);
    server.stop();
}

/// The first bytes of a client.
fn hello(client: &Path) -> Vec<u8> {
    let config = tls::config(client, rustls::ALL_VERSIONS);
    let mut hello = Vec::new();
    rustls::ClientConnection::new(config, "localhost".try_into().unwrap())
        .unwrap()
        .write_tls(&mut hello)
        .unwrap();
    hello
}

/// Fills the server with connections that are stuck in so many kinds of ways, and tries a good one among them.
fn crowd(server: &mut Server, kinds: usize, hello: &[u8], good: impl Fn(&Server) -> Duration) {
    for _ in 0..8 {
        good(server);
    }
    let before = proc::resident_len(server.pid());
    let crowd: Vec<_> = (0..COUNT).map(|index| stuck(server, index % kinds, hello)).collect();
    // A second is what a shared machine gets; alone it is some milliseconds.
    let slowest = (0..20).map(|_| good(server)).max().unwrap();
    assert!(slowest < Duration::from_secs(1), "a good client waited {slowest:?}");
    let grown = proc::resident_len(server.pid()).saturating_sub(before) as usize;
    println!("{COUNT} stuck in TLS: {} bytes each, a good client took at most {slowest:?}", grown / COUNT);
    assert!(grown / COUNT < 64 << 10, "{} bytes for each", grown / COUNT);
    server.assert_alive();
    let begin = Instant::now();
    for mut stream in crowd {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        tls::rest(&mut stream);
    }
    assert!(begin.elapsed() < Duration::from_secs(50), "they are closed in time");
    good(server);
}
