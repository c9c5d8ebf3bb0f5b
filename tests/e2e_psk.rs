//! TLS with pre-shared keys on a running server, with clients of GnuTLS (libnbd, QEMU, gnutls-cli) and of OpenSSL: both
//! versions, wrong identities and keys, keys that change, who a key lets do what, and connections that end anywhere.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use support::assert_same;
use support::client::{go_data, greet, option_bytes, read_option_reply};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tls;
use support::tools::{output, python_nbd, run, tool};
use support::wire::{option, option_reply};

const DISK_LEN: usize = 16 << 20;

struct Rig {
    folder: tempfile::TempDir,
    content: Vec<u8>,
}

impl Rig {
    /// A disk, and keys of alice and bob.
    fn new(test: &str) -> Self {
        let folder = support::scratch(test);
        let content = Rng::fixed(41).bytes(DISK_LEN);
        fs::write(folder.path().join("disk"), &content).unwrap();
        // Without 1.3, for those who cannot be told by themselves.
        fs::write(folder.path().join("tls12"), "[overrides]\ndisabled-version = tls1.3\n").unwrap();
        let rig = Self { folder, content };
        for user in ["alice", "bob"] {
            rig.make_key("keys.psk", user);
        }
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn make_key(&self, file: &str, user: &str) {
        run(tool("psktool").args(["-u", user, "-p"]).arg(self.path(file)));
    }

    /// The key of a user in hexadecimal digits.
    fn key(&self, user: &str) -> String {
        let keys = fs::read_to_string(self.path("keys.psk")).unwrap();
        keys.lines().find_map(|line| line.strip_prefix(&format!("{user}:"))).unwrap().to_owned()
    }

    fn serve(&self, args: &[&str]) -> Server {
        let keys = self.path("keys.psk");
        let all = [&["--tls-psk", keys.to_str().unwrap(), "-v"], args].concat();
        Serve::image(self.path("disk")).format("raw").args(&all).start()
    }

    /// A program that uses GnuTLS, limited to one version.
    fn with_version(&self, program: &str, version: &str) -> Command {
        let mut command = tool(program);
        if version == "1.2" {
            command.env("GNUTLS_SYSTEM_PRIORITY_FILE", self.path("tls12"));
        }
        command
    }
}

fn uri(server: &Server, user: &str, keys: &Path) -> String {
    format!("nbds+unix://{user}@/?socket={}&tls-psk-file={}", server.socket().display(), keys.display())
}

#[test]
fn libnbd_reads_and_writes_under_both_versions() {
    let rig = Rig::new("psk-libnbd");
    let server = rig.serve(&[]);
    let uri = uri(&server, "alice", &rig.path("keys.psk"));
    let mut content = rig.content.clone();
    for version in ["1.2", "1.3"] {
        let info = run(rig.with_version("nbdinfo", version).args(["--json", &uri]));
        let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
        assert_eq!(info["TLS"], true, "{info}");
        server.wait_for_log(&format!("psk=alice version=\"TLSv{version}\""));
        let copy = rig.path("copy");
        run(rig.with_version("nbdcopy", version).arg(&uri).arg(&copy));
        assert_same("from us", &fs::read(&copy).unwrap(), &content);
        content.reverse();
        fs::write(&copy, &content).unwrap();
        run(rig.with_version("nbdcopy", version).arg(&copy).arg(&uri));
        assert_same("to us", &fs::read(rig.path("disk")).unwrap(), &content);
    }
    assert!(server.stderr().contains("connection opened peer=unix pid"));
    server.stop();
}

/// Many requests of all sizes in flight, whose replies are more than what any buffer on the way holds.
#[test]
fn many_requests_in_flight() {
    const SCRIPT: &str = r#"
import nbd, random, sys
uri, path = sys.argv[1:]
shadow = bytearray(open(path, "rb").read())
for structured in (True, False):
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_request_structured_replies(structured)
    h.connect_uri(uri)
    assert h.get_tls_negotiated()
    r = random.Random(7)
    for turn in range(6):
        reads = []
        for i in range(24):
            n = r.randrange(1, 1 << r.randrange(1, 23)); at = r.randrange(len(shadow) - n)
            buf = nbd.Buffer(n); reads.append((at, n, buf, h.aio_pread(buf, at)))
        while h.aio_in_flight(): h.poll(-1)
        for at, n, buf, cookie in reads:
            assert h.aio_command_completed(cookie)
            assert buf.to_bytearray() == shadow[at:at + n], (at, n)
        writes = []
        for i in range(24):
            # Each in a part of its own: what overlaps has no order.
            n = r.randrange(1, 600000); at = i * 655360
            data = bytes(r.getrandbits(8) for _ in range(64)) * (n // 64 + 1)
            shadow[at:at + n] = data[:n]
            writes.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[:n])), at))
        while h.aio_in_flight(): h.poll(-1)
        for cookie in writes: assert h.aio_command_completed(cookie)
    h.flush()
    assert bytes(h.pread(16 << 20, 0)) == bytes(shadow)
    h.shutdown()
open(path + ".expected", "wb").write(shadow)
"#;
    let rig = Rig::new("psk-many");
    let server = rig.serve(&[]);
    let uri = uri(&server, "bob", &rig.path("keys.psk"));
    run(python_nbd(SCRIPT).arg(&uri).arg(rig.path("disk")));
    let expected = fs::read(rig.path("disk.expected")).unwrap();
    assert_same("the disk", &fs::read(rig.path("disk")).unwrap(), &expected);
    server.stop();
}

#[test]
fn qemu_reads() {
    let rig = Rig::new("psk-qemu");
    let server = rig.serve(&[]);
    let convert = |user: &str| {
        output(tool("qemu-img").current_dir(rig.folder.path()).args([
            "convert",
            "-O",
            "raw",
            "--object",
            &format!(
                "tls-creds-psk,id=tls0,endpoint=client,dir={},username={user}",
                rig.folder.path().display()
            ),
            "--image-opts",
            &format!("driver=nbd,server.type=unix,server.path={},tls-creds=tls0", server.socket().display()),
            "copy",
        ]))
    };
    let done = convert("alice");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_same("by QEMU", &fs::read(rig.path("copy")).unwrap(), &rig.content);
    server.stop();
}

/// The port of TLS from the first byte.
fn tls_port(server: &Server) -> u16 {
    server.wait_for_log("listener=nbds:127.0.0.1:");
    let log = server.stderr();
    let at = log.find("nbds:127.0.0.1:").unwrap() + "nbds:127.0.0.1:".len();
    log[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn openssl(port: u16, version: &str, identity: &str, key: &str) -> Command {
    let mut command = tool("openssl");
    command.args(["s_client", "-quiet", "-connect", &format!("127.0.0.1:{port}"), version]);
    command.args(["-psk_identity", identity, "-psk", key, "-cipher", "ALL:@SECLEVEL=0"]);
    command
}

fn gnutls(port: u16, priority: &str, identity: &str, key: &str) -> Command {
    let mut command = tool("gnutls-cli");
    command.args([
        "--pskusername",
        identity,
        "--pskkey",
        key,
        "--priority",
        priority,
        "--no-ca-verification",
    ]);
    command.args(["--logfile", "/dev/null", "-p", &port.to_string(), "127.0.0.1"]);
    command
}

fn contains(out: &[u8], bytes: &[u8]) -> bool {
    out.windows(bytes.len()).any(|window| window == bytes)
}

#[test]
fn openssl_and_gnutls_from_the_first_byte() {
    let rig = Rig::new("psk-first");
    // psktool writes this one behind a #, in hexadecimal digits.
    rig.make_key("keys.psk", "with: colon");
    let server = rig.serve(&["--listen", "nbds:127.0.0.1:0"]);
    let port = tls_port(&server);
    let key = rig.key("alice");
    let answer = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option::ABORT.to_be_bytes()].concat();
    for version in ["-tls1_2", "-tls1_3"] {
        let out = tls::talk(&mut openssl(port, version, "alice", &key));
        assert!(out.starts_with(b"NBDMAGICIHAVEOPT") && contains(&out, &answer), "{version}: {out:?}");
    }
    let keys = fs::read_to_string(rig.path("keys.psk")).unwrap();
    let colon = keys.lines().find_map(|line| line.strip_prefix("#776974683a20636f6c6f6e:")).unwrap();
    assert!(tls::talk(&mut openssl(port, "-tls1_3", "with: colon", colon)).starts_with(b"NBDMAGICIHAVEOPT"));
    server.wait_for_log("psk=with: colon");
    let priorities = [
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3:-KX-ALL:+ECDHE-PSK:+DHE-PSK", true),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+ECDHE-PSK", true),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+DHE-PSK", true),
        // Nothing ephemeral, and too old.
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-KX-ALL:+PSK", false),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.1:-KX-ALL:+DHE-PSK", false),
    ];
    let count = |what: &str| server.stderr().matches(what).count();
    for (priority, welcome) in priorities {
        let what = if welcome { "TLS is up" } else { "the TLS handshake failed" };
        let before = count(what);
        // What it says is not asked for: gnutls-cli 3.7 crashes when it describes such a connection of TLS 1.2.
        tls::talk(&mut gnutls(port, priority, "alice", &key));
        let begin = Instant::now();
        while count(what) == before {
            assert!(begin.elapsed() < Duration::from_secs(30), "{priority}: {}", server.stderr());
            sleep(Duration::from_millis(20));
        }
    }
    for version in ["-tls1_1", "-tls1"] {
        assert!(tls::talk(&mut openssl(port, version, "alice", &key)).is_empty(), "{version} is too old");
    }
    let mut plain = TcpStream::connect(("127.0.0.1", port)).unwrap();
    plain.write_all(b"no TLS at all, and long enough to be seen as such").unwrap();
    assert!(!tls::rest(&mut plain).starts_with(b"NBDMAGIC"), "no greeting in plain text");
    server.stop();
}

#[test]
fn wrong_identities_and_keys_are_refused_and_logged() {
    let rig = Rig::new("psk-wrong");
    let server = rig.serve(&["--listen", "nbds:127.0.0.1:0"]);
    let port = tls_port(&server);
    let key = rig.key("alice");
    let other = rig.key("bob");
    for version in ["-tls1_2", "-tls1_3"] {
        for (identity, key) in [("mallory", &key), ("alice", &other), ("ALICE", &key), ("", &key)] {
            assert!(
                tls::talk(&mut openssl(port, version, identity, key)).is_empty(),
                "{version} {identity:?}"
            );
        }
        server.wait_for_log("\\\"mallory\\\" is no identity of --tls-psk");
        server.wait_for_log("has the client the key of \\\"alice\\\"?");
    }
    // Nothing of a client's gets into the log as it is.
    tls::talk(&mut openssl(port, "-tls1_3", "a\nb\x1b[31m", &key));
    server.wait_for_log("a\\\\nb\\\\u{1b}[31m");
    // A client that has no key, but certificates in mind.
    let out = output(tool("nbdinfo").arg(format!("nbds+unix:///?socket={}", server.socket().display())));
    assert!(!out.status.success());
    // One that does without TLS.
    let mut stream = greet(server.socket());
    stream.write_all(&[&3_u32.to_be_bytes()[..], &option_bytes(option::GO, &go_data(""))].concat()).unwrap();
    assert_eq!(read_option_reply(&mut stream, option::GO).unwrap().0, option_reply::ERR_TLS_REQD);
    let log = server.stderr();
    assert!(!log.contains(&key) && !log.contains(&other), "a key in the log");
    server.stop();
}

#[test]
fn keys_are_taken_anew() {
    let rig = Rig::new("psk-reload");
    let server = rig.serve(&[]);
    let keys = rig.path("keys.psk");
    let info = |user: &str, keys: &Path| -> Output {
        output(tool("nbdinfo").args(["--size", &uri(&server, user, keys)]))
    };
    let is_in = |user: &str, keys: &Path| info(user, keys).status.success();
    let wait = |what: &str, is_so: &dyn Fn() -> bool| {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(30), "{what}: not in time\n{}", server.stderr());
            sleep(Duration::from_millis(100));
        }
    };
    assert!(is_in("alice", &keys) && is_in("bob", &keys));
    let before = rig.path("before.psk");
    fs::copy(&keys, &before).unwrap();
    // When the file changes: carol comes, bob goes.
    let alice = format!("alice:{}\n", rig.key("alice"));
    fs::write(&keys, &alice).unwrap();
    rig.make_key("keys.psk", "carol");
    wait("carol", &|| is_in("carol", &keys));
    assert!(is_in("alice", &before) && !is_in("bob", &before));
    // What cannot be used changes nothing.
    fs::write(&keys, "alice:nonsense\n").unwrap();
    server.wait_for_log("stay in force");
    server.wait_for_log("keys.psk: line 1");
    assert!(is_in("alice", &before));
    // On SIGHUP.
    fs::copy(&before, &keys).unwrap();
    server.signal(rustix::process::Signal::HUP);
    wait("bob", &|| is_in("bob", &before));
    server.stop();
}

#[test]
fn a_key_says_who_may_do_what() {
    let rig = Rig::new("psk-access");
    rig.make_key("keys.psk", "Zo\u{eb}, too");
    let rules = ["--access", "write:psk=alice", "--access", "read:psk=Zo\u{eb}, too"];
    let server = rig.serve(&rules);
    let keys = rig.path("keys.psk");
    // 0 is yes, 2 is no, 1 is an error.
    for (user, status) in [("alice", 2), ("bob", 1), ("Zo%C3%AB,%20too", 0)] {
        let is = output(tool("nbdinfo").args(["--is", "read-only", &uri(&server, user, &keys)]));
        assert_eq!(is.status.code(), Some(status), "{user}: {}", String::from_utf8_lossy(&is.stderr));
    }
    let listed = run(tool("nbdinfo").args(["--list", "--json", &uri(&server, "bob", &keys)]));
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed["exports"], serde_json::json!([]));
    server.wait_for_log("psk=Zo\u{eb}, too export=");
    server.stop();
}

#[test]
fn what_cannot_work_is_refused_at_the_start() {
    let rig = Rig::new("psk-start");
    let keys = rig.path("keys.psk");
    let keys = keys.to_str().unwrap();
    fs::write(rig.path("nonsense"), "alice\n").unwrap();
    let nonsense = rig.path("nonsense");
    for (args, why) in [
        (&["--tls-psk", keys, "--tls-dir", "x"][..], "cannot be used with"),
        (&["--tls-psk", keys, "--tls-cert", "x", "--tls-key", "y"], "cannot be used with"),
        (&["--tls-psk", "nowhere"], "nowhere: cannot be read: No such file"),
        (&["--tls-psk", nonsense.to_str().unwrap()], "nonsense: line 1: is not IDENTITY:HEXKEY"),
        (&["--tls-psk", keys, "--access", "read:tls-dns=a"], "add --tls-dir FOLDER"),
        (&["--access", "read:psk=alice"], "add --tls-psk FILE"),
    ] {
        let refusal = Serve::image(rig.path("disk")).format("raw").args(args).start_refused();
        assert!(refusal.stderr.contains(why), "{args:?}: {}", refusal.stderr);
    }
}

/// OpenSSL is loaded only for this flag, and whoever lacks it is told what to install.
#[test]
fn without_openssl_only_keys_are_missing() {
    let rig = Rig::new("psk-library");
    // Found first, and of no use.
    fs::write(
        rig.path("libssl.so.3"),
        "not a library, but long enough to be looked at by whoever loads libraries",
    )
    .unwrap();
    let serve = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        command.env("LD_LIBRARY_PATH", rig.folder.path()).args(["serve", "--format", "raw", "--exit-last"]);
        command.arg(rig.path("disk")).arg("--socket").arg(rig.path("s")).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let keys = rig.path("keys.psk");
    let refused = serve(&["--tls-psk", keys.to_str().unwrap()]).wait_with_output().unwrap();
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && why.contains("install libssl.so.3"), "{why}");
    let mut plain = serve(&[]);
    plain.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
    run(tool("nbdinfo").args(["--size", &format!("nbd+unix:///?socket={}", rig.path("s").display())]));
    assert!(plain.wait().unwrap().success());
}

/// CVE-2021-3716: a man in the middle puts options behind the client's STARTTLS.
#[test]
fn plain_text_behind_starttls_ends_the_connection() {
    let rig = Rig::new("psk-inject");
    let mut server = rig.serve(&["--tls", "optional"]);
    let injected =
        [option_bytes(option::STRUCTURED_REPLY, &[]), option_bytes(option::GO, &go_data(""))].concat();
    for pause in [0, 100] {
        let mut stream = greet(server.socket());
        let begin = [&3_u32.to_be_bytes()[..], &option_bytes(option::STARTTLS, &[])].concat();
        if pause == 0 {
            stream.write_all(&[begin, injected.clone()].concat()).unwrap();
        } else {
            stream.write_all(&begin).unwrap();
            sleep(Duration::from_millis(pause));
            stream.write_all(&injected).unwrap();
        }
        assert_eq!(read_option_reply(&mut stream, option::STARTTLS).unwrap().0, option_reply::ACK);
        let rest = tls::rest(&mut stream);
        // At most an alert, which is a record of type 21.
        assert!(rest.is_empty() || rest[0] == 21, "{rest:?}");
    }
    server.assert_alive();
    server.stop();
}

/// Passes one connection's first `limit` bytes from the client on, then cuts it.
fn cut_after(listener: &TcpListener, port: u16, limit: u64) {
    let (client, _) = listener.accept().unwrap();
    let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut back_from, mut back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let back = thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
    let _ = std::io::copy(&mut (&client).take(limit), &mut (&server));
    let _ = server.shutdown(std::net::Shutdown::Both);
    let _ = client.shutdown(std::net::Shutdown::Both);
    let _ = back.join().unwrap();
}

/// In the handshake and behind it, at any byte; also bytes that are no TLS, or damaged on the way.
#[test]
fn a_connection_may_end_anywhere() {
    let rig = Rig::new("psk-ends");
    let mut server = rig.serve(&["--listen", "nbds:127.0.0.1:0"]);
    let port = tls_port(&server);
    let key = rig.key("alice");
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy_port = proxy.local_addr().unwrap().port();
    for cut in (1..700).step_by(41) {
        for version in ["-tls1_2", "-tls1_3"] {
            let mut command = openssl(proxy_port, version, "alice", &key);
            let talking = thread::spawn(move || tls::talk(&mut command));
            cut_after(&proxy, port, cut);
            talking.join().unwrap();
        }
    }
    let mut rng = Rng::new("psk-ends");
    for _ in 0..200 {
        let mut stream = tls::starttls(server.socket());
        let len = rng.below(300) as usize;
        let mut bytes = rng.bytes(len);
        // Half of them begin as a record of the handshake does.
        if rng.below(2) == 0 {
            bytes.splice(0..0, [0x16, 3, 1, 0, u8::try_from(len.min(255)).unwrap(), 1]);
        }
        let _ = stream.write_all(&bytes);
    }
    server.assert_alive();
    let good = run(tool("nbdinfo").args(["--size", &uri(&server, "alice", &rig.path("keys.psk"))]));
    assert_eq!(String::from_utf8(good).unwrap().trim(), DISK_LEN.to_string());
    server.stop();
}
