//! `--access` on a running server: who sees what, who may write, by what a client is known, and that an export which a
//! client may not see cannot be told from one that does not exist.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, SanType};
use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Client, Request, Wishes, go_data, greet, option_bytes, read_option_reply};
use support::server::{Serve, Server};
use support::tls;
use support::tools::{run, tool};
use support::wire::{command, errno, option, option_reply, transmission};

const DISK_LEN: usize = 1 << 20;

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(test: &str) -> Self {
        let folder = support::scratch(test);
        for disk in ["a", "b"] {
            fs::write(folder.path().join(disk), vec![disk.as_bytes()[0]; DISK_LEN]).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Exports `a` and `b` with these rules, and arguments for all.
    fn serve(&self, a: &[&str], b: &[&str], args: &[&str]) -> Server {
        let export = |name: &str, rules: &[&str]| {
            let mut spec = format!("name={name},file={},format=raw", self.path(name).display());
            for rule in rules {
                spec += &format!(",access={}", rule.replace(',', ",,"));
            }
            spec
        };
        let (a, b) = (export("a", a), export("b", b));
        let all = [&["--export", &a, "--export", &b][..], args].concat();
        Serve::exports(Vec::new()).args(&all).start()
    }
}

fn say_hello(stream: &mut impl Write) {
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
}

/// The names in LIST.
fn list(stream: &mut (impl Read + Write)) -> Vec<String> {
    stream.write_all(&option_bytes(option::LIST, &[])).unwrap();
    stream.flush().unwrap();
    let mut names = Vec::new();
    loop {
        let (kind, data) = read_option_reply(stream, option::LIST).unwrap();
        if kind == option_reply::ACK {
            return names;
        }
        assert_eq!(kind, option_reply::SERVER);
        let len = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
        names.push(String::from_utf8(data[4..4 + len].to_vec()).unwrap());
    }
}

/// What INFO says: the flags, or the error.
fn flags(stream: &mut (impl Read + Write), name: &str) -> Result<u16, u32> {
    stream.write_all(&option_bytes(option::INFO, &go_data(name))).unwrap();
    stream.flush().unwrap();
    let mut found = Err(0);
    loop {
        let (kind, data) = read_option_reply(stream, option::INFO).unwrap();
        match kind {
            option_reply::ACK => return found,
            option_reply::INFO if data[..2] == [0, 0] => {
                found = Ok(u16::from_be_bytes(data[10..12].try_into().unwrap()));
            }
            option_reply::INFO => {}
            error => return Err(error),
        }
    }
}

/// What one may do: nothing, read, or write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum May {
    Nothing,
    Read,
    Write,
}

fn may(stream: &mut (impl Read + Write), name: &str) -> May {
    match flags(stream, name) {
        Err(option_reply::ERR_UNKNOWN) => May::Nothing,
        Err(error) => panic!("{name}: {error:#x}"),
        Ok(flags) if flags & transmission::READ_ONLY != 0 => May::Read,
        Ok(_) => May::Write,
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[test]
fn users_of_a_unix_socket_are_known_by_the_kernel() {
    let rig = Rig::new("access-uid");
    let (uid, gid) = (own_uid(), rustix::process::getegid().as_raw());
    for (rules, want) in [
        (vec![format!("write:uid={uid}")], May::Write),
        (vec![format!("read:uid={uid}")], May::Read),
        (vec![format!("read:gid={gid}")], May::Read),
        (vec![format!("write:uid={}", uid + 1), format!("write:gid={}", gid + 1)], May::Nothing),
        (vec!["read:anyone".to_owned(), format!("write:uid={}", uid + 1)], May::Read),
        (vec!["write:cidr=0.0.0.0/0".to_owned(), "write:cidr=::/0".to_owned()], May::Nothing),
    ] {
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        let server = rig.serve(&rules, &[], &[]);
        let mut stream = greet(server.socket());
        say_hello(&mut stream);
        assert_eq!(may(&mut stream, "a"), want, "{rules:?}");
        assert_eq!(may(&mut stream, "b"), May::Write, "without rules");
        let seen = if want == May::Nothing { vec!["b"] } else { vec!["a", "b"] };
        assert_eq!(list(&mut stream), seen, "{rules:?}");
        server.stop();
    }
}

/// Another user by the tools of others. Only root can become one.
#[test]
fn another_user_lists_and_gets_what_is_his() {
    if own_uid() != 0 {
        eprintln!("not root: the users are only those of the test above");
        return;
    }
    let rig = Rig::new("access-user");
    // The socket has to be reachable for others, which the folder of the build need not be.
    let folder = tempfile::Builder::new().prefix("nbd-img-access").tempdir_in("/tmp").unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = folder.path().join("s");
    let listen = format!("unix:{}", socket.display());
    let server = rig.serve(&["write:uid=0", "read:gid=54321"], &["write:uid=12345"], &["--listen", &listen]);
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let nbdinfo = |ids: Option<(u32, u32)>, args: &[&str], export: &str| {
        let mut command = match ids {
            None => tool("nbdinfo"),
            Some((uid, gid)) => {
                let mut command = tool("setpriv");
                command.args([&format!("--reuid={uid}"), &format!("--regid={gid}"), "--clear-groups"]);
                command.arg(tool("nbdinfo").get_program());
                command
            }
        };
        command.args(args).arg(format!("nbd+unix:///{export}?socket={}", socket.display()));
        command
    };
    for (ids, a, b) in [
        (None, Some(false), None),
        (Some((12345, 999)), None, Some(false)),
        (Some((12345, 54321)), Some(true), Some(false)),
        (Some((777, 54321)), Some(true), None),
        (Some((777, 777)), None, None),
    ] {
        for (export, want) in [("a", a), ("b", b)] {
            let out = nbdinfo(ids, &["--json"], export).output().unwrap();
            assert_eq!(out.status.success(), want.is_some(), "{ids:?} {export}");
            if let Some(read_only) = want {
                let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
                assert_eq!(info["exports"][0]["is_read_only"], read_only, "{ids:?} {export}");
            }
        }
        let names = run(&mut nbdinfo(ids, &["--list", "--json"], ""));
        let listed: serde_json::Value = serde_json::from_slice(&names).unwrap();
        let names: Vec<_> = listed["exports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["export-name"].as_str().unwrap())
            .collect();
        let want: Vec<_> =
            [("a", a), ("b", b)].iter().filter(|(_, seen)| seen.is_some()).map(|(name, _)| *name).collect();
        assert_eq!(names, want, "{ids:?}");
    }
    server.stop();
}

fn from_address(source: Ipv4Addr, port: u16) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).unwrap();
    socket.into()
}

#[test]
fn networks_are_told_apart() {
    let rig = Rig::new("access-cidr");
    let rules = ["write:cidr=127.0.1.0/24", "read:cidr=127.0.0.0/16"];
    let server = rig.serve(&rules, &["read:uid=0"], &["--listen", "127.0.0.1:0"]);
    let port = server.tcp_address().port();
    for (source, want) in
        [([127, 0, 1, 9], May::Write), ([127, 0, 2, 9], May::Read), ([127, 1, 0, 9], May::Nothing)]
    {
        let mut stream = from_address(source.into(), port);
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        say_hello(&mut stream);
        assert_eq!(may(&mut stream, "a"), want, "{source:?}");
        let seen: &[&str] = if want == May::Nothing { &[] } else { &["a"] };
        assert_eq!(list(&mut stream), seen, "{source:?}");
    }
    server.stop();
}

/// All that is answered to questions for an export of this name, with the name taken out.
fn answers(server: &Server, name: &str) -> Vec<u8> {
    let counted = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let contexts = [counted(name), 1_u32.to_be_bytes().to_vec(), counted("base:allocation")].concat();
    let all_info = [counted(name), 4_u16.to_be_bytes().to_vec(), vec![0, 0, 0, 1, 0, 2, 0, 3]].concat();
    let mut stream = greet(server.socket());
    say_hello(&mut stream);
    for (option, data) in [
        (option::LIST, &[][..]),
        (option::INFO, &all_info),
        (option::GO, &all_info),
        (option::LIST_META_CONTEXT, &contexts),
        (option::SET_META_CONTEXT, &contexts),
        (option::STRUCTURED_REPLY, &[]),
        (option::SET_META_CONTEXT, &contexts),
        (option::INFO, &go_data(name)),
        (option::EXPORT_NAME, name.as_bytes()),
    ] {
        stream.write_all(&option_bytes(option, data)).unwrap();
    }
    let out = tls::rest(&mut stream);
    let text = String::from_utf8_lossy(&out);
    assert_eq!(text.matches(&format!("no export \"{name}\"")).count(), 5, "{name}: {text}");
    let name = name.as_bytes();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < out.len() {
        let is_name = out[at..].starts_with(name);
        kept.push(if is_name { b'@' } else { out[at] });
        at += if is_name { name.len() } else { 1 };
    }
    kept
}

#[test]
fn what_one_may_not_see_is_like_what_is_not_there() {
    let rig = Rig::new("access-hidden");
    // As long as each other, so that lengths do not tell either.
    let hidden = |extra: &str| {
        let spec = format!("name=hidden,file={},format=raw{extra}", rig.path("a").display());
        let seen = format!("name=seen,file={},format=raw", rig.path("b").display());
        Serve::exports(Vec::new()).args(&["--export", &spec, "--export", &seen, "-v"]).start()
    };
    let server = hidden(",access=write:uid=4294967294");
    assert_eq!(answers(&server, "hidden"), answers(&server, "absent"));
    // The only one that is seen is the default, as it would be if it were alone.
    let mut stream = greet(server.socket());
    say_hello(&mut stream);
    assert_eq!(may(&mut stream, ""), May::Write);
    server.wait_for_log("no --access rule lets them see count=1 peer=unix pid");
    server.wait_for_log("export=hidden");
    server.stop();

    // The only export, asked for as the default.
    let alone = |args: &[&str]| Serve::image(rig.path("a")).format("raw").args(args).start();
    let server = alone(&["--access", "read:uid=4294967294"]);
    let mut stream = greet(server.socket());
    say_hello(&mut stream);
    assert_eq!(may(&mut stream, ""), May::Nothing);
    assert_eq!(list(&mut stream), [""; 0]);
    server.stop();
}

#[test]
fn readers_cannot_write() {
    let rig = Rig::new("access-read");
    let server = rig.serve(&["read:anyone"], &[], &[]);
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut reader = Client::unix(server.socket(), "a", wishes);
        let unwanted =
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO;
        assert_eq!(reader.flags & unwanted, 0);
        assert_ne!(reader.flags & transmission::READ_ONLY, 0);
        for (command, payload) in
            [(command::WRITE, &[7; 512][..]), (command::TRIM, &[]), (command::WRITE_ZEROES, &[])]
        {
            reader.send(Request::new(command, 0, 512), payload).unwrap();
            assert_eq!(reader.reply().unwrap().error, errno::EPERM, "command {command}");
        }
        assert_eq!(reader.read(0, 512), [b'a'; 512]);
        reader.flush();
        reader.disconnect();
        let mut writer = Client::unix(server.socket(), "b", wishes);
        writer.write(0, &[7; 512]);
        writer.disconnect();
    }
    let uri = format!("nbd+unix:///a?socket={}", server.socket().display());
    let write = tool("qemu-io").args(["-f", "raw", "-c", "write 0 512", &uri]).output().unwrap();
    assert!(!write.status.success(), "QEMU was let write");
    server.stop();
    assert_eq!(fs::read(rig.path("a")).unwrap(), [b'a'; DISK_LEN]);
    assert_eq!(fs::read(rig.path("b")).unwrap()[..512], [7; 512]);
}

/// An oldstyle client has no say, but an identity all the same.
#[test]
fn oldstyle_clients_get_what_is_theirs() {
    let rig = Rig::new("access-oldstyle");
    let uid = own_uid();
    for (rule, want) in [
        (format!("write:uid={uid}"), Some(false)),
        (format!("read:uid={uid}"), Some(true)),
        (format!("write:uid={}", uid + 1), None),
    ] {
        let args = ["--oldstyle", "--access", &rule];
        let server = Serve::image(rig.path("a")).format("raw").args(&args).start();
        let uri = format!("nbd+unix:///?socket={}", server.socket().display());
        let is = tool("nbdinfo").args(["--is", "read-only", &uri]).output().unwrap();
        let status = match want {
            Some(true) => 0,
            Some(false) => 2,
            None => 1,
        };
        assert_eq!(is.status.code(), Some(status), "{rule}: {}", String::from_utf8_lossy(&is.stderr));
        server.stop();
    }
}

/// A certificate's subject: country, organisation, name.
fn subject(params: &mut CertificateParams, names: &[(DnType, &str)]) {
    params.distinguished_name = DistinguishedName::new();
    for (kind, text) in names {
        let value = if *kind == DnType::CountryName {
            DnValue::PrintableString((*text).try_into().unwrap())
        } else {
            DnValue::Utf8String((*text).to_owned())
        };
        params.distinguished_name.push(kind.clone(), value);
    }
}

/// A client's folder whose certificate is changed like this.
fn certified(folder: &Path, authority: &Authority, change: impl FnOnce(&mut CertificateParams)) {
    client_folder(folder, authority, CLIENT, &authority.cert);
    let (cert, key) = authority.issue_with(CLIENT, change);
    fs::write(folder.join("client-cert.pem"), cert).unwrap();
    fs::write(folder.join("client-key.pem"), key).unwrap();
}

/// As certtool prints the subject.
fn by_certtool(folder: &Path) -> String {
    let out = run(tool("certtool").arg("-i").arg("--infile").arg(folder.join("client-cert.pem")));
    let out = String::from_utf8(out).unwrap();
    out.lines().find_map(|line| line.trim().strip_prefix("Subject: ")).unwrap().to_owned()
}

#[test]
fn certificates_say_who_it_is() {
    let rig = Rig::new("access-tls");
    let authority = Authority::new("the CA of the tests");
    server_folder(&rig.path("server"), &authority, SERVER);
    let clients = ["writer", "reader", "other"].map(|name| rig.path(name));
    let name = |name| {
        [(DnType::CountryName, "GB"), (DnType::OrganizationName, "Example, Inc."), (DnType::CommonName, name)]
    };
    certified(&clients[0], &authority, |params| subject(params, &name("+backup <\"1\">; \\")));
    certified(&clients[1], &authority, |params| {
        subject(params, &name("reader"));
        params.subject_alt_names = vec![SanType::URI("spiffe://example/reader".try_into().unwrap())];
    });
    certified(&clients[2], &authority, |params| subject(params, &name("backup")));
    let printed = by_certtool(&clients[0]);
    assert_eq!(printed, "CN=\\+backup \\<\\\"1\\\"\\>\\; \\\\,O=Example\\, Inc.,C=GB");
    let tls_dir = rig.path("server");
    let args = ["--tls-dir", tls_dir.to_str().unwrap(), "--tls", "optional", "-v"];
    let rules = [&format!("write:tls-subject={printed}"), "read:tls-uri=spiffe://example/reader"];
    let server = rig.serve(&rules, &["read:anyone"], &args);

    for (folder, a) in clients.iter().zip([May::Write, May::Read, May::Nothing]) {
        let mut stream = greet(server.socket());
        say_hello(&mut stream);
        assert_eq!(may(&mut stream, "a"), May::Nothing, "before TLS it is nobody");
        assert_eq!(list(&mut stream), ["b"]);
        stream.write_all(&option_bytes(option::STARTTLS, &[])).unwrap();
        assert_eq!(read_option_reply(&mut stream, option::STARTTLS).unwrap().0, option_reply::ACK);
        let mut stream = tls::handshake(stream, tls::config(folder, rustls::ALL_VERSIONS)).unwrap();
        assert_eq!(may(&mut stream, "a"), a, "{}", folder.display());
        assert_eq!(may(&mut stream, "b"), May::Read);
        let seen: &[&str] = if a == May::Nothing { &["b"] } else { &["a", "b"] };
        assert_eq!(list(&mut stream), seen);
        let uri = |export: &str| {
            let (socket, folder) = (server.socket().display(), folder.display());
            format!("nbds+unix:///{export}?socket={socket}&tls-certificates={folder}")
        };
        let listed = run(tool("nbdinfo").args(["--list", "--json", &uri("")]));
        let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
        assert_eq!(listed["exports"].as_array().unwrap().len(), seen.len());
        let read_only = tool("nbdinfo").args(["--is", "read-only", &uri("a")]).output().unwrap();
        let want = match a {
            May::Nothing => Some(1),
            May::Read => Some(0),
            May::Write => Some(2),
        };
        assert_eq!(read_only.status.code(), want, "{}", String::from_utf8_lossy(&read_only.stderr));
    }
    // In the certificate's order, as QEMU would log it.
    server.wait_for_log("tls-subject=C=GB,O=Example\\, Inc.,CN=\\+backup \\<\\\"1\\\"\\>\\; \\\\");
    server.wait_for_log("tls-subject=C=GB,O=Example\\, Inc.,CN=backup");
    server.stop();
}

#[test]
fn rules_that_nobody_can_meet_are_refused() {
    let rig = Rig::new("access-wrong");
    let authority = Authority::new("the CA of the tests");
    server_folder(&rig.path("server"), &authority, SERVER);
    let tls_dir = rig.path("server");
    let unasked = ["--tls-dir", tls_dir.to_str().unwrap(), "--tls-verify-peer", "off"];
    for (args, why) in [
        (&["--access", "read:tls-subject=CN=a"][..], "add --tls-dir FOLDER or --tls-ca FILE"),
        (&[&unasked[..], &["--access", "read:tls-dns=a"]].concat(), "add --tls-dir FOLDER or --tls-ca FILE"),
        (&["--access", "uid=1"], "begins with read: or write:"),
    ] {
        let refusal = Serve::image(rig.path("a")).format("raw").args(args).start_refused();
        assert!(refusal.stderr.contains(why), "{args:?}: {}", refusal.stderr);
    }
    let mut help = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    let help = String::from_utf8(run(help.args(["serve", "--help"]))).unwrap();
    assert!(help.contains("--access <RULE>") && help.contains("tls-subject=DN"));
}
