//! TLS on a running server: who is let in and who is not, what survives STARTTLS (nothing), and certificates that change.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustls::version::{TLS12, TLS13};
use support::certificates::{Authority, CLIENT, SERVER, Says, Usage, client_folder, server_folder};
use support::client::{Client, Request, Wishes, go_data, greet, option_bytes, read_option_reply};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tls;
use support::tls_rig::{DISK_LEN, Rig};
use support::wire::{command, option, option_reply};
use support::{assert_same, wait_until};

#[test]
fn reads_and_writes_under_both_versions() {
    let rig = Rig::new("tls-versions");
    let server = rig.serve(&[]);
    let mut shadow = rig.content.clone();
    let mut rng = Rng::new("tls-versions");
    for version in [&TLS12, &TLS13] {
        for wishes in [Wishes::SIMPLE, Wishes::ALLOCATION, Wishes::EXTENDED] {
            let mut client = tls::client(server.socket(), &rig.path("client"), &[version], wishes);
            assert_same("the disk", &client.read_all(), &shadow);
            for _ in 0..20 {
                let len = usize::try_from(rng.in_range(1..5000) * 512).unwrap();
                let at = usize::try_from(rng.below((DISK_LEN - len) as u64 / 512)).unwrap() * 512;
                let data = rng.bytes(len);
                client.write(at as u64, &data);
                shadow[at..at + len].copy_from_slice(&data);
                assert_same("what was written", &client.read(at as u64, len), &data);
            }
            // Many requests at once, whose replies are more than any buffer on the way holds.
            for at in 0..12 {
                client.send(Request::new(command::READ, at << 20, 4 << 20), &[]).unwrap();
            }
            while client.in_flight() > 0 {
                assert_eq!(client.reply().unwrap().error, 0);
            }
            assert_same("the disk", &client.read_all(), &shadow);
            client.flush();
            client.disconnect();
        }
    }
    server.stop();
    assert_same("the file", &fs::read(rig.path("disk")).unwrap(), &shadow);
}

#[test]
fn only_clients_with_a_good_certificate_are_let_in() {
    let rig = Rig::new("tls-clients");
    let stranger = Authority::new("another CA");
    let revoked = Says { serial: 77, ..CLIENT };
    fs::write(rig.path("server/ca-crl.pem"), rig.authority.revoke(&[77], 30)).unwrap();
    let server = rig.serve(&[]);
    let good = rig.path("client");
    assert_eq!(tls::try_options(server.socket(), &good).unwrap(), option_reply::ACK);
    let nobody = rig.path("nobody");
    fs::create_dir(&nobody).unwrap();
    fs::write(nobody.join("ca-cert.pem"), &rig.authority.cert).unwrap();
    let bad = [
        ("of another CA", rig.client("stranger", &stranger, CLIENT), "UnknownIssuer"),
        ("expired", rig.client("expired", &rig.authority, Says { ends_in_days: -1, ..CLIENT }), "expired"),
        ("revoked", rig.client("revoked", &rig.authority, revoked), "Revoked"),
        (
            "a server's",
            rig.client("usage", &rig.authority, Says { usage: Usage::Server, ..CLIENT }),
            "extended key usage",
        ),
        ("none", nobody, "no certificates"),
    ];
    for (what, folder, _) in &bad {
        let error = tls::try_options(server.socket(), folder).unwrap_err();
        assert!(!error.to_string().is_empty(), "{what}");
    }
    assert_eq!(tls::try_options(server.socket(), &good).unwrap(), option_reply::ACK);
    server.stop();
    let mut server = rig.serve(&["-v"]);
    for (what, folder, why) in &bad {
        tls::try_options(server.socket(), folder).unwrap_err();
        let begin = Instant::now();
        while !server.stderr().contains(why) {
            assert!(begin.elapsed() < Duration::from_secs(30), "{what}: {why} is not in {}", server.stderr());
            sleep(Duration::from_millis(20));
        }
    }
    server.assert_alive();
    server.stop();
}

#[test]
fn a_server_without_client_ca_asks_for_no_certificate() {
    let rig = Rig::new("tls-any");
    fs::remove_file(rig.path("client/client-cert.pem")).unwrap();
    let (cert, key) = (rig.path("server/server-cert.pem"), rig.path("server/server-key.pem"));
    let pair = ["--tls-cert", cert.to_str().unwrap(), "--tls-key", key.to_str().unwrap()];
    let alone = Serve::image(rig.path("disk")).format("raw").args(&pair).start();
    assert_eq!(tls::try_options(alone.socket(), &rig.path("client")).unwrap(), option_reply::ACK);
    alone.stop();
    let unasked = rig.serve(&["--tls-verify-peer", "off"]);
    assert_eq!(tls::try_options(unasked.socket(), &rig.path("client")).unwrap(), option_reply::ACK);
    unasked.stop();
}

/// What the last option was answered with.
fn ask(stream: &mut (impl Read + Write), option: u32, data: &[u8]) -> u32 {
    stream.write_all(&option_bytes(option, data)).unwrap();
    stream.flush().unwrap();
    loop {
        let (kind, _) = read_option_reply(stream, option).unwrap();
        if !matches!(kind, option_reply::SERVER | option_reply::INFO | option_reply::META_CONTEXT) {
            return kind;
        }
    }
}

#[test]
fn required_optional_and_per_export() {
    let rig = Rig::new("tls-modes");
    let plain = |server: &Server| {
        let mut stream = greet(server.socket());
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        stream
    };
    let server = rig.serve(&[]);
    let mut stream = plain(&server);
    for option in [option::LIST, option::GO, option::STRUCTURED_REPLY, 99] {
        assert_eq!(ask(&mut stream, option, &go_data("")), option_reply::ERR_TLS_REQD);
    }
    assert_eq!(ask(&mut stream, option::ABORT, &[]), option_reply::ACK);
    assert!(server.stdout().contains("nbds+unix://"), "{}", server.stdout());
    server.stop();

    let server = rig.serve(&["--tls", "optional"]);
    Client::unix(server.socket(), "", Wishes::STRUCTURED).disconnect();
    tls::client(server.socket(), &rig.path("client"), rustls::ALL_VERSIONS, Wishes::STRUCTURED).disconnect();
    assert!(server.stdout().contains("nbd+unix://"), "{}", server.stdout());
    server.stop();

    fs::write(rig.path("other"), &rig.content[..4096]).unwrap();
    let secret = format!("name=secret,file={},format=raw,tls-required", rig.path("other").display());
    let args = ["--tls", "optional", "--export", &secret, "--tls-dir"];
    let folder = rig.path("server");
    let mut open = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    let socket = rig.path("s");
    open.args(["serve", "--socket", socket.to_str().unwrap()]).args(args).arg(&folder);
    open.arg("--export").arg(format!("name=open,file={},format=raw", rig.path("disk").display()));
    let mut open = open.stdout(Stdio::piped()).spawn().unwrap();
    open.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
    let mut stream = greet(&socket);
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    assert_eq!(ask(&mut stream, option::INFO, &go_data("secret")), option_reply::ERR_TLS_REQD);
    assert_eq!(ask(&mut stream, option::INFO, &go_data("open")), option_reply::ACK);
    stream.write_all(&option_bytes(option::LIST, &[])).unwrap();
    let listed = read_option_reply(&mut stream, option::LIST).unwrap();
    assert_eq!((listed.0, &listed.1[4..]), (option_reply::SERVER, &b"open"[..]));
    assert_eq!(read_option_reply(&mut stream, option::LIST).unwrap().0, option_reply::ACK);
    let config = tls::config(&rig.path("client"), rustls::ALL_VERSIONS);
    let mut stream = tls::handshake(tls::starttls(&socket), config).unwrap();
    assert_eq!(ask(&mut stream, option::GO, &go_data("secret")), option_reply::ACK);
    open.kill().unwrap();
    open.wait().unwrap();
}

/// CVE-2021-3716: a man in the middle puts options behind the client's STARTTLS.
#[test]
fn plain_text_behind_starttls_ends_the_connection() {
    let rig = Rig::new("tls-inject");
    let mut server = rig.serve(&["--tls", "optional"]);
    let injected =
        [option_bytes(option::STRUCTURED_REPLY, &[]), option_bytes(option::GO, &go_data(""))].concat();
    for pieces in [1, 2] {
        let mut stream = greet(server.socket());
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        let starttls = option_bytes(option::STARTTLS, &[]);
        if pieces == 1 {
            stream.write_all(&[starttls, injected.clone()].concat()).unwrap();
        } else {
            stream.write_all(&starttls).unwrap();
            sleep(Duration::from_millis(100));
            stream.write_all(&injected).unwrap();
        }
        assert_eq!(read_option_reply(&mut stream, option::STARTTLS).unwrap().0, option_reply::ACK);
        let rest = tls::rest(&mut stream);
        // At most an alert, which is a record of type 21.
        assert!(rest.is_empty() || rest[0] == 21, "{rest:?}");
        assert!(!rest.windows(8).any(|bytes| bytes == 0x0003_e889_0455_65a9_u64.to_be_bytes()));
    }
    server.assert_alive();
    // What was agreed before is forgotten.
    let mut stream = greet(server.socket());
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    assert_eq!(ask(&mut stream, option::STRUCTURED_REPLY, &[]), option_reply::ACK);
    assert_eq!(ask(&mut stream, option::STARTTLS, &[]), option_reply::ACK);
    let config = tls::config(&rig.path("client"), rustls::ALL_VERSIONS);
    let mut stream = tls::handshake(stream, config).unwrap();
    assert_eq!(ask(&mut stream, option::STRUCTURED_REPLY, &[]), option_reply::ACK, "not agreed already");
    assert_eq!(ask(&mut stream, option::STARTTLS, &[]), option_reply::ERR_INVALID, "TLS is up");
    server.stop();
}

/// The handshake and the first requests in one piece, cut anywhere, and torn down anywhere.
#[test]
fn a_tls_connection_may_end_anywhere() {
    let rig = Rig::new("tls-ends");
    let mut server = rig.serve(&[]);
    for cut in (0..600).step_by(7) {
        let mut stream = tls::starttls(server.socket());
        let config = tls::config(&rig.path("client"), rustls::ALL_VERSIONS);
        let mut hello = Vec::new();
        let mut connection = rustls::ClientConnection::new(config, "localhost".try_into().unwrap()).unwrap();
        connection.write_tls(&mut hello).unwrap();
        let _ = stream.write_all(&hello[..cut.min(hello.len())]);
    }
    for round in 0..20 {
        let mut client = tls::client(server.socket(), &rig.path("client"), &[&TLS13], Wishes::SIMPLE);
        for at in 0..round % 5 {
            client.send(Request::new(command::READ, at << 20, 1 << 20), &[]).unwrap();
        }
        client.stream().write_all(&[0x17, 3, 3][..(round as usize) % 4]).unwrap();
    }
    server.assert_alive();
    tls::client(server.socket(), &rig.path("client"), rustls::ALL_VERSIONS, Wishes::STRUCTURED).disconnect();
    server.stop();
}

/// A client that shakes hands and asks in one breath: its requests come with the last record of the handshake.
#[test]
fn requests_behind_the_handshake_are_answered() {
    let rig = Rig::new("tls-breath");
    let server = rig.serve(&[]);
    for _ in 0..20 {
        let config = tls::config(&rig.path("client"), &[&TLS13]);
        let mut stream = tls::handshake(tls::starttls(server.socket()), config).unwrap();
        let read = Request::new(command::READ, 4096, 4096).bytes(5);
        let all = [option_bytes(option::GO, &go_data("")), read, Request::new(command::DISC, 0, 0).bytes(6)];
        stream.write_all(&all.concat()).unwrap();
        stream.flush().unwrap();
        while read_option_reply(&mut stream, option::GO).unwrap().0 != option_reply::ACK {}
        let mut rest = Vec::new();
        // With a goodbye of TLS, else this is an error.
        stream.read_to_end(&mut rest).unwrap();
        assert_same("the read", &rest[16..], &rig.content[4096..8192]);
    }
    server.stop();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let rig = Rig::new("tls-files");
    let other = Authority::new("another CA");
    let expired = rig.authority.issue(Says { ends_in_days: -3, ..SERVER });
    let foreign_key = other.issue(SERVER).1;
    let cases: [(&str, &str, Option<&str>, &str); 7] = [
        ("no certificate", "server-cert.pem", None, "No such file"),
        ("no key", "server-key.pem", None, "No such file"),
        ("no CA", "ca-cert.pem", None, "No such file"),
        ("nonsense", "server-cert.pem", Some("nonsense"), "no certificate"),
        ("expired", "server-cert.pem", Some(&expired.0), "ended on"),
        ("another's key", "server-key.pem", Some(&foreign_key), "cannot be used with"),
        ("an empty list", "ca-crl.pem", Some(""), "revocation list"),
    ];
    for (what, file, content, why) in cases {
        let folder = rig.path(&format!("bad {what}"));
        server_folder(&folder, &rig.authority, SERVER);
        match content {
            Some(content) => fs::write(folder.join(file), content).unwrap(),
            None => fs::remove_file(folder.join(file)).unwrap(),
        }
        let refusal = Serve::image(rig.path("disk"))
            .format("raw")
            .args(&["--tls-dir", folder.to_str().unwrap()])
            .start_refused();
        assert!(refusal.stderr.contains(file) && refusal.stderr.contains(why), "{what}: {}", refusal.stderr);
    }
    let file = |name: &str| rig.path("server").join(name).to_str().unwrap().to_owned();
    let [cert, key, ca, list] = ["server-cert.pem", "server-key.pem", "ca-cert.pem", "ca-crl.pem"].map(file);
    let with_list = ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca, "--tls-crl", &list];
    for (args, why) in [
        (&["--tls", "required"][..], "--tls-dir"),
        (&["--listen", "nbds:127.0.0.1:0"], "--tls-dir"),
        (&["--tls-cert", "x"], "--tls-key"),
        // Whoever names a list means it: one that is mistyped must not let in whom it revokes.
        (&with_list, "ca-crl.pem: cannot be read"),
    ] {
        let refusal = Serve::image(rig.path("disk")).format("raw").args(args).start_refused();
        assert!(refusal.stderr.contains(why), "{args:?}: {}", refusal.stderr);
    }
}

#[test]
fn certificates_are_taken_anew() {
    let rig = Rig::new("tls-reload");
    let server = rig.serve(&[]);
    let good = rig.path("client");
    let mut early = tls::client(server.socket(), &good, rustls::ALL_VERSIONS, Wishes::STRUCTURED);
    // When a file changes: the client is revoked.
    fs::write(rig.path("server/ca-crl.pem"), rig.authority.revoke(&[CLIENT.serial], 30)).unwrap();
    wait_until("the revocation", || tls::try_options(server.socket(), &good).is_err());
    assert_same("who was in stays in", &early.read(0, 4096), &rig.content[..4096]);
    // What cannot be used changes nothing.
    fs::write(rig.path("server/server-key.pem"), "nonsense").unwrap();
    wait_until("the complaint", || server.stderr().contains("stay in force"));
    server.wait_for_log("server-key.pem");
    let other = rig.client("other", &rig.authority, Says { serial: 99, ..CLIENT });
    assert_eq!(tls::try_options(server.socket(), &other).unwrap(), option_reply::ACK);
    // On SIGHUP: another CA altogether.
    let next = Authority::new("the next CA");
    fs::remove_file(rig.path("server/ca-crl.pem")).unwrap();
    server_folder(&rig.path("server"), &next, SERVER);
    let next_client = rig.path("next");
    client_folder(&next_client, &next, CLIENT, &next.cert);
    server.signal(rustix::process::Signal::HUP);
    wait_until("the next CA", || tls::try_options(server.socket(), &next_client).is_ok());
    assert!(tls::try_options(server.socket(), &other).is_err());
    assert_same("who was in stays in", &early.read(4096, 4096), &rig.content[4096..8192]);
    early.disconnect();
    server.stop();
}

#[test]
fn a_revocation_list_that_is_out_of_date_lets_nobody_in() {
    let rig = Rig::new("tls-old-list");
    fs::write(rig.path("server/ca-crl.pem"), rig.authority.revoke(&[], -1)).unwrap();
    let server = rig.serve(&[]);
    tls::try_options(server.socket(), &rig.path("client")).unwrap_err();
    server.stop();
}

/// What a client sends behind its goodbye is for nobody; a record layer that takes in no more must not be asked for ever.
#[test]
fn bytes_behind_a_goodbye_disturb_nobody() {
    let rig = Rig::new("tls-goodbye");
    let mut server = rig.serve(&[]);
    for version in [&TLS12, &TLS13] {
        for in_transmission in [false, true] {
            let config = tls::config(&rig.path("client"), &[version]);
            let mut stream = tls::handshake(tls::starttls(server.socket()), config).unwrap();
            if in_transmission {
                stream.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
                stream.flush().unwrap();
                while read_option_reply(&mut stream, option::GO).unwrap().0 != option_reply::ACK {}
            }
            stream.conn.send_close_notify();
            let mut burst = Vec::new();
            while stream.conn.wants_write() {
                stream.conn.write_tls(&mut burst).unwrap();
            }
            burst.extend([0x17; 100_000]);
            // In one piece, as far as the socket takes it.
            stream.sock.write_all(&burst).unwrap();
            let mut client =
                tls::client(server.socket(), &rig.path("client"), &[version], Wishes::STRUCTURED);
            assert_same("the disk", &client.read(0, 4096), &rig.content[..4096]);
            client.disconnect();
            let _ = tls::rest(&mut stream.sock);
        }
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.wait(Duration::from_secs(30)).code(), Some(0), "{}", server.stderr());
}
