//! TLS with others at the far end: OpenSSL, GnuTLS, libnbd and QEMU.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use support::certificates::{Authority, CLIENT};
use support::server::{Serve, Server};
use support::tls;
use support::tls_rig::Rig;
use support::tools::{run, tool};
use support::{assert_same, wait_until};

fn tcp_port(server: &Server) -> u16 {
    // The listener of TLS from the first byte has no URI, but is in the log.
    let log = server.stderr();
    let at = log.find("nbds:127.0.0.1:").expect(&log) + "nbds:127.0.0.1:".len();
    log[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

#[test]
fn tls_from_the_first_byte_and_openssl() {
    let rig = Rig::new("tls-first");
    let server = rig.serve(&["-v", "--listen", "nbds:127.0.0.1:0"]);
    wait_until("the listener", || server.stderr().contains("nbds:127.0.0.1:"));
    let port = tcp_port(&server);
    let mut plain = TcpStream::connect(("127.0.0.1", port)).unwrap();
    plain.write_all(b"no TLS at all, and long enough to be seen as such").unwrap();
    assert!(!tls::rest(&mut plain).starts_with(b"NBDMAGIC"), "no greeting in plain text");
    let client = rig.path("client");
    let s_client = |version: &str| {
        let mut command = tool("openssl");
        let address = format!("127.0.0.1:{port}");
        command.args(["s_client", "-quiet", "-connect", &address, version, "-cipher", "ALL:@SECLEVEL=0"]);
        command.args(["-verify_return_error", "-verify_hostname", "localhost", "-CAfile"]);
        command.arg(client.join("ca-cert.pem")).arg("-cert").arg(client.join("client-cert.pem"));
        command.arg("-key").arg(client.join("client-key.pem"));
        tls::talk(&mut command)
    };
    for version in ["-tls1_2", "-tls1_3"] {
        let out = s_client(version);
        assert!(out.starts_with(b"NBDMAGICIHAVEOPT"), "{version}: {out:?}");
        assert_eq!(out.len(), 18 + 20, "{version}: the greeting and the answer to ABORT");
    }
    for version in ["-tls1_1", "-tls1"] {
        assert!(s_client(version).is_empty(), "{version} is too old");
    }
    server.stop();
}

#[test]
fn gnutls_from_the_first_byte() {
    let rig = Rig::new("tls-gnutls");
    let server = rig.serve(&["-v", "--listen", "nbds:127.0.0.1:0"]);
    wait_until("the listener", || server.stderr().contains("nbds:127.0.0.1:"));
    let port = tcp_port(&server).to_string();
    let gnutls_cli = |folder: &Path, versions: &str| {
        let mut command = tool("gnutls-cli");
        command.args(["--port", &port, "--verify-hostname", "localhost", "--logfile", "/dev/null"]);
        command.args(["--priority", &format!("NORMAL:-VERS-ALL:{versions}"), "--x509cafile"]);
        command.arg(folder.join("ca-cert.pem")).arg("--x509certfile").arg(folder.join("client-cert.pem"));
        command.arg("--x509keyfile").arg(folder.join("client-key.pem")).arg("127.0.0.1");
        tls::talk(&mut command)
    };
    let client = rig.path("client");
    for versions in ["+VERS-TLS1.2", "+VERS-TLS1.3"] {
        let out = gnutls_cli(&client, versions);
        assert!(out.starts_with(b"NBDMAGICIHAVEOPT"), "{versions}: {out:?}");
        assert_eq!(out.len(), 18 + 20, "{versions}: the greeting and the answer to ABORT");
    }
    assert!(gnutls_cli(&client, "+VERS-TLS1.1").is_empty(), "too old");
    let stranger = rig.client("stranger", &Authority::new("another CA"), CLIENT);
    for versions in ["+VERS-TLS1.2", "+VERS-TLS1.3"] {
        assert!(gnutls_cli(&stranger, versions).is_empty(), "{versions}: a certificate of another CA");
    }
    server.stop();
}

fn tls_uri(server: &Server, certificates: &Path) -> String {
    format!("nbds+unix:///?socket={}&tls-certificates={}", server.socket().display(), certificates.display())
}

fn qemu_img(folder: &Path, certificates: &Path, server: &Server, before: &[&str], after: &[&str]) -> Vec<u8> {
    let (verb, rest) = before.split_first().unwrap();
    run(tool("qemu-img")
        .current_dir(folder)
        .arg(verb)
        .arg("--object")
        .arg(format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", certificates.display()))
        .args(rest)
        .arg("--image-opts")
        .arg(format!(
            "driver=nbd,server.type=unix,server.path={},tls-creds=tls0,tls-hostname=localhost",
            server.socket().display()
        ))
        .args(after))
}

/// With a folder that `nbd-img tls init` made, which serves both sides.
#[test]
fn libnbd_and_qemu_work_with_what_tls_init_makes() {
    let rig = Rig::new("tls-peers");
    let folder = rig.path("made");
    let init = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        command.args(["tls", "init", "--host", "disks.example", "--days", "30"]).arg(&folder);
        command.output().unwrap()
    };
    let made = init();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for (file, mode) in [("ca-key.pem", 0o600), ("server-key.pem", 0o600), ("client-cert.pem", 0o644)] {
        assert_eq!(folder.join(file).metadata().unwrap().permissions().mode() & 0o777, mode, "{file}");
    }
    let before = fs::read(folder.join("server-key.pem")).unwrap();
    assert!(!init().status.success(), "nothing is overwritten");
    assert_eq!(fs::read(folder.join("server-key.pem")).unwrap(), before);

    let server =
        Serve::image(rig.path("disk")).format("raw").args(&["--tls-dir", folder.to_str().unwrap()]).start();
    let uri = tls_uri(&server, &folder);
    let info = run(tool("nbdinfo").args(["--json", &uri]));
    let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
    assert_eq!(info["TLS"], true, "{info}");
    let copy = rig.path("copy");
    run(tool("nbdcopy").arg(&uri).arg(&copy));
    assert_same("by libnbd", &fs::read(&copy).unwrap(), &rig.content);
    let mut other = rig.content.clone();
    other.reverse();
    fs::write(&copy, &other).unwrap();
    run(tool("nbdcopy").arg(&copy).arg(&uri));
    assert_same("to us by libnbd", &fs::read(rig.path("disk")).unwrap(), &other);
    File::create(rig.path("copy2")).unwrap();
    qemu_img(rig.folder.path(), &folder, &server, &["convert", "-O", "raw"], &["copy2"]);
    assert_same("by QEMU", &fs::read(rig.path("copy2")).unwrap(), &other);
    let stranger = rig.client("stranger", &Authority::new("another CA"), CLIENT);
    fs::copy(folder.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    for certificates in [&rig.path("client"), &stranger] {
        let refused = tool("nbdinfo").args(["--size", &tls_uri(&server, certificates)]).output().unwrap();
        assert!(!refused.status.success(), "{}", certificates.display());
    }
    server.stop();
}
