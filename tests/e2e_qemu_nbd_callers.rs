//! The exact command lines of those who start qemu-nbd, and what they do next, on both programs: virt-v2v,
//! virtnbdbackup, oVirt imageio, vdsm, the tests of libnbd; encryption and bitmaps as they ask for them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::front::{BOTH, PATIENCE, Program, kill, text};
use support::tools::{output, qemu_img, qemu_io, run, tool};
use support::{assert_same, qcow2, scratch};

const DISK_LEN: u64 = 1 << 20;

/// A folder with a qcow2 image that has a persistent bitmap (`disk.qcow2`) and one without (`plain.qcow2`), which is
/// for those who write.
fn images() -> tempfile::TempDir {
    let folder = scratch("callers");
    qemu_img(folder.path(), "create -q -f qcow2 disk.qcow2 1M");
    qemu_io(folder.path(), "qcow2", "disk.qcow2", &["write -P 5 0 128k"]);
    fs::copy(folder.path().join("disk.qcow2"), folder.path().join("plain.qcow2")).unwrap();
    qemu_img(folder.path(), "bitmap --add disk.qcow2 b");
    qemu_io(folder.path(), "qcow2", "disk.qcow2", &["write -P 9 256k 128k"]);
    folder
}

fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

/// Ends a server that went to the background, by its pid file as its starter does it.
#[track_caller]
fn end_by(pid_file: &str, socket: &str) {
    let pid: u32 = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
    kill(pid, Signal::TERM);
    let begin = Instant::now();
    while Path::new(socket).exists() {
        assert!(begin.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(5));
    }
    fs::remove_file(pid_file).unwrap();
}

/// virtnbdbackup: `-e 2` is one argument, options come after the file name, the exit of `--fork` is waited for, and
/// nbdinfo asks for the bitmap.
#[test]
fn virtnbdbackup() {
    let folder = images();
    let (socket, pid) = (path(&folder, "s"), path(&folder, "p"));
    let uri = format!("nbd+unix:///vda?socket={socket}");
    let mut maps = Vec::new();
    for program in BOTH {
        let pid_file = format!("--pid-file={pid}");
        let start =
            ["-r", "--format=qcow2", "-x", "vda", "disk.qcow2", "-k", &socket, "-t", "-e 2", "--fork"];
        let line = [&start[..], &["--detect-zeroes=on", &pid_file, "--bitmap=b"]].concat();
        assert_eq!(
            program.ends(folder.path(), &line),
            (Some(0), String::new(), String::new()),
            "{program:?}"
        );
        let map =
            |context: &str| text(&run(tool("nbdinfo").args(["--json", &format!("--map={context}"), &uri])));
        maps.push((map("base:allocation"), map("qemu:dirty-bitmap:b")));
        end_by(&pid, &socket);
        // The other form of the line: nothing behind the dashes.
        let line = [&start[..], &[&pid_file, "--"]].concat();
        assert_eq!(program.ends(folder.path(), &line).0, Some(0), "{program:?}");
        end_by(&pid, &socket);
    }
    assert_eq!(maps[1], maps[0]);
    assert!(maps[0].1.contains("262144"), "{}", maps[0].1);
}

/// The restore of virtnbdbackup: one client writes, and the server ends by itself.
#[test]
fn a_restore_ends_with_its_client() {
    for program in BOTH {
        let folder = images();
        let socket = path(&folder, "s");
        qemu_img(folder.path(), "create -q -f qcow2 restored.qcow2 1M");
        let line =
            ["--discard=unmap", "--format=qcow2", "-x", "vda", "restored.qcow2", "-k", &socket, "--fork"];
        assert_eq!(program.ends(folder.path(), &line).0, Some(0), "{program:?}");
        let source = path(&folder, "source.raw");
        qemu_img(folder.path(), "convert -f qcow2 -O raw disk.qcow2 source.raw");
        run(tool("nbdcopy").args([&source, &format!("nbd+unix:///vda?socket={socket}")]));
        let begin = Instant::now();
        while Path::new(&socket).exists() {
            assert!(begin.elapsed() < PATIENCE, "{program:?} does not end");
            thread::sleep(Duration::from_millis(5));
        }
        // The lock goes with the process, a moment after the socket.
        let equal = || {
            let compared = output(tool("qemu-img").current_dir(folder.path()).args([
                "compare",
                "disk.qcow2",
                "restored.qcow2",
            ]));
            compared.status.success()
        };
        while !equal() {
            assert!(begin.elapsed() < PATIENCE, "{program:?}: the disks differ");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// virt-v2v: asks for the version and for `selinux` in the help, waits for the pid file, changes the socket's mode,
/// and ends the server by a signal.
#[test]
fn virt_v2v() {
    let folder = images();
    for program in BOTH {
        assert!(program.ends(folder.path(), &["--help"]).1.contains("selinux"), "{program:?}");
        let pid = path(&folder, "p");
        let line =
            ["-t", "--shared=0", "--discard=unmap", "--pid-file", &pid, "--format", "qcow2", "plain.qcow2"];
        let mut serving = program.serves(folder.path(), &line);
        let begin = Instant::now();
        while fs::read_to_string(&pid).unwrap_or_default().trim() != serving.pid().to_string() {
            assert!(begin.elapsed() < PATIENCE, "{program:?}: no pid file");
            thread::sleep(Duration::from_millis(5));
        }
        let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o700);
        fs::set_permissions(serving.socket(), mode).unwrap();
        let target = path(&folder, "copy.raw");
        run(tool("nbdcopy").args(["--connections=4", &serving.uri(""), &target]));
        assert_eq!(fs::metadata(&target).unwrap().len(), DISK_LEN);
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
    }
}

/// virt-v2v's `-s` for images that have to stay as they are: all clients see what was written until the server ends.
#[test]
fn writes_to_a_temporary_overlay() {
    for program in BOTH {
        let folder = images();
        let before = fs::read(folder.path().join("plain.qcow2")).unwrap();
        let line = ["-t", "--shared=0", "--discard=unmap", "-s", "--format", "qcow2", "plain.qcow2"];
        let mut serving = program.serves(folder.path(), &line);
        let uri = serving.uri("");
        for command in ["write -P 7 64k 1k", "read -P 7 64k 1k", "read -P 5 65k 63k"] {
            run(tool("qemu-io").args(["-f", "raw", "-c", command, &uri]));
        }
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
        assert!(
            fs::read(folder.path().join("plain.qcow2")).unwrap() == before,
            "{program:?}: the image has changed"
        );
    }
}

/// oVirt imageio and vdsm: images in JSON, several clients, depth of the chain.
#[test]
fn ovirt() {
    let folder = images();
    let image =
        r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}, "backing": null}"#;
    let imageio = [
        "--export-name=",
        "--persistent",
        "--shared=8",
        "--cache=none",
        "--aio=native",
        "--discard=unmap",
        "--detect-zeroes=unmap",
        "--bitmap=b",
        "--allocation-depth",
        "--read-only",
        image,
    ];
    let plain = image.replace("disk.qcow2", "plain.qcow2");
    let vdsm = [
        "--persistent",
        "--shared=8",
        "--export-name=",
        "--cache=none",
        "--aio=native",
        "--discard=unmap",
        &plain,
    ];
    let [real, ours] = BOTH.map(|program| {
        let mut serving = program.serves(folder.path(), &imageio);
        let contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"];
        let maps = contexts
            .map(|context| text(&run(tool("nbdinfo").args([&format!("--map={context}"), &serving.uri("")]))));
        let copied = run(tool("nbdcopy").args(["--connections=4", &serving.uri(""), "-"]));
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
        let mut serving = program.serves(folder.path(), &vdsm);
        run(tool("nbdinfo").args(["--can", "multi-conn", &serving.uri("")]));
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
        (maps, copied)
    });
    assert_eq!(ours.0, real.0);
    assert_same("the disk", &ours.1, &real.1);
}

/// An external data file that the command line names.
#[test]
fn a_named_data_file() {
    let folder = images();
    qemu_img(folder.path(), "create -q -f qcow2 -o data_file=data.raw with.qcow2 1M");
    qemu_io(folder.path(), "qcow2", "with.qcow2", &["write -P 3 64k 64k"]);
    fs::rename(folder.path().join("data.raw"), folder.path().join("moved.raw")).unwrap();
    let line = [
        "-t",
        "--image-opts",
        "driver=qcow2,file.driver=file,file.filename=with.qcow2,data-file.driver=file,data-file.filename=moved.raw",
    ];
    let [real, ours] = BOTH.map(|program| {
        let mut serving = program.serves(folder.path(), &line);
        let copied = run(tool("nbdcopy").args([&serving.uri(""), "-"]));
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
        copied
    });
    assert_same("the disk", &ours, &real);
    assert!(real.contains(&3));
}

/// Images inside of an archive, as imageio and virt-v2v read those of an OVA: the format stated, and to be found.
#[test]
fn inside_of_another_file() {
    let folder = images();
    let image = fs::read(folder.path().join("plain.qcow2")).unwrap();
    let mut archive = vec![0xaa_u8; 1536];
    archive.extend_from_slice(&image);
    archive.extend_from_slice(&[0xbb; 1024]);
    fs::write(folder.path().join("ova.tar"), archive).unwrap();
    let part = format!(
        r#"{{"driver":"raw","offset":1536,"size":{},"file":{{"driver":"file","filename":"ova.tar"}}}}"#,
        image.len()
    );
    for image in [format!(r#"json:{{"driver":"qcow2","file":{part}}}"#), format!(r#"json:{{"file":{part}}}"#)]
    {
        let [real, ours] = BOTH.map(|program| {
            let mut serving = program.serves(folder.path(), &["-t", "-r", "--shared=8", &image]);
            let map = text(&run(tool("nbdinfo").args(["--map", &serving.uri("")])));
            let copied = run(tool("nbdcopy").args(["--connections=4", &serving.uri(""), "-"]));
            assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
            (map, copied)
        });
        assert_eq!(ours.0, real.0, "{image}");
        assert_same(&image, &ours.1, &real.1);
        assert!(real.1.contains(&5));
    }
}

/// A folder with certificates for both sides.
fn certificates(folder: &tempfile::TempDir) -> PathBuf {
    let tls = folder.path().join("tls");
    run(Command::new(env!("CARGO_BIN_EXE_nbd-img")).args(["tls", "init"]).arg(&tls));
    tls
}

/// Certificates as virtnbdbackup and libnbd's tests ask for them; both programs list the other's exports.
#[test]
fn certificates_on_both_sides() {
    let folder = images();
    let tls = certificates(&folder);
    let server = format!("tls-creds-x509,id=tls0,endpoint=server,dir={}", tls.display());
    let any = format!("{server},verify-peer=false");
    let client = format!("tls-creds-x509,id=t,endpoint=client,dir={}", tls.display());
    for program in BOTH {
        for object in [&server, &any] {
            let line = ["-t", "--object", object, "--tls-creds", "tls0", "-r", "-f", "qcow2", "disk.qcow2"];
            let mut serving = program.serves(folder.path(), &line);
            let socket = serving.socket().to_str().unwrap();
            let ask =
                ["-L", "-k", socket, "--object", &client, "--tls-creds", "t", "--tls-hostname", "localhost"];
            let [real, ours] = BOTH.map(|asking| asking.ends(folder.path(), &ask));
            assert_eq!(ours, real, "{program:?} {object}");
            assert!(ours.1.starts_with("exports available: 1\n"), "{program:?}: {ours:?}");
            for asking in BOTH {
                let (status, _, stderr) = asking.ends(folder.path(), &["-L", "-k", socket]);
                assert_eq!(status, Some(1), "{asking:?} asks {program:?} without TLS: {stderr}");
            }
            let uri = format!("nbds+unix:///?socket={socket}&tls-certificates={}", tls.display());
            assert_eq!(text(&run(tool("nbdinfo").args(["--size", &uri]))), format!("{DISK_LEN}\n"));
            assert_eq!(serving.end(Signal::TERM).code(), Some(0));
        }
    }
}

/// Only the named client is let in.
#[test]
fn authorization_by_name() {
    let folder = images();
    let tls = certificates(&folder);
    let server = format!("tls-creds-x509,id=tls0,endpoint=server,dir={}", tls.display());
    for (identity, is_let_in) in [("CN=nbd-img client", true), ("CN=somebody else", false)] {
        for program in BOTH {
            let authz = format!("authz-simple,id=a,identity={identity}");
            let line = [
                "-t",
                "--object",
                &server,
                "--object",
                &authz,
                "--tls-creds",
                "tls0",
                "--tls-authz",
                "a",
                "-f",
                "qcow2",
                "plain.qcow2",
            ];
            let serving = program.serves(folder.path(), &line);
            let uri = format!(
                "nbds+unix:///?socket={}&tls-certificates={}",
                serving.socket().display(),
                tls.display()
            );
            let asked = output(tool("nbdinfo").args(["--size", &uri]));
            assert_eq!(asked.status.success(), is_let_in, "{program:?} {identity}: {}", text(&asked.stderr));
        }
    }
}

/// A pre-shared key, as libnbd's tests have it; both programs list the other's exports by it.
#[test]
fn a_pre_shared_key() {
    let folder = images();
    let keys = |name: &str, lines: &str| {
        let file = folder.path().join(name).join("keys.psk");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, lines).unwrap();
        let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
        fs::set_permissions(&file, mode).unwrap();
        file
    };
    let good = keys("keys", "alice:00112233445566778899aabbccddeeff\n");
    keys("wrong", "alice:ff112233445566778899aabbccddeeff\nbob:00112233445566778899aabbccddeeff\n");
    let client = |name: &str, user: &str| {
        format!("tls-creds-psk,id=t,endpoint=client,dir={},username={user}", path(&folder, name))
    };
    let object = format!("tls-creds-psk,id=tls0,endpoint=server,dir={}", path(&folder, "keys"));
    for program in BOTH {
        let line = ["-t", "--object", &object, "--tls-creds", "tls0", "-f", "qcow2", "plain.qcow2"];
        let serving = program.serves(folder.path(), &line);
        let socket = serving.socket().to_str().unwrap();
        let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={}", good.display());
        let size = text(&run(tool("nbdinfo").args(["--size", &uri])));
        assert_eq!(size, format!("{DISK_LEN}\n"), "{program:?}");
        let list = |asking: Program, object: &str| {
            asking.ends(folder.path(), &["-L", "-k", socket, "--object", object, "--tls-creds", "t"])
        };
        let [real, ours] = BOTH.map(|asking| list(asking, &client("keys", "alice")));
        assert_eq!(ours, real, "{program:?}");
        assert!(ours.1.starts_with("exports available: 1\n"), "{program:?}: {ours:?}");
        for (name, user) in [("wrong", "alice"), ("wrong", "bob"), ("keys", "bob")] {
            for asking in BOTH {
                let (status, stdout, stderr) = list(asking, &client(name, user));
                assert_eq!((status, stdout.as_str()), (Some(1), ""), "{asking:?} {name} {user}: {stderr}");
            }
        }
    }
}

/// Who asks with a key takes no certificate for it: anybody could have made one.
#[test]
fn a_certificate_is_no_answer_to_a_key() {
    let folder = images();
    fs::write(folder.path().join("keys.psk"), "alice:00112233445566778899aabbccddeeff\n").unwrap();
    let tls = certificates(&folder);
    let object = format!("tls-creds-x509,id=tls0,endpoint=server,dir={},verify-peer=off", tls.display());
    let asks = format!("tls-creds-psk,id=t,endpoint=client,dir={},username=alice", folder.path().display());
    for program in BOTH {
        let line = ["-t", "--object", &object, "--tls-creds", "tls0", "-f", "qcow2", "plain.qcow2"];
        let serving = program.serves(folder.path(), &line);
        let socket = serving.socket().to_str().unwrap();
        for asking in BOTH {
            let line = ["-L", "-k", socket, "--object", &asks, "--tls-creds", "t"];
            let (status, stdout, stderr) = asking.ends(folder.path(), &line);
            assert_eq!((status, stdout.as_str()), (Some(1), ""), "{asking:?} asks {program:?}: {stderr}");
            assert!(stderr.contains("TLS handshake failed"), "{asking:?} asks {program:?}: {stderr}");
        }
    }
}

/// Starts a server on TCP in the background and gives its port, which was free a moment before: when somebody else has
/// taken it since, another one.
fn forked_at_a_free_port(program: Program, folder: &Path, pid: &str) -> String {
    for _ in 0..10 {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port().to_string();
        drop(free);
        let line = ["-t", "-p", &port, "-e", "3", "--fork", "--pid-file", pid, "-f", "qcow2", "plain.qcow2"];
        let (status, _, stderr) = program.ends(folder, &line);
        if !stderr.contains("Address already in use") {
            assert_eq!(status, Some(0), "{program:?}: {stderr}");
            return port;
        }
    }
    panic!("{program:?} finds no port")
}

/// Everybody's default: TCP at all addresses of the machine. (The port is another, so that tests can run side by side.)
#[test]
fn tcp_at_all_addresses() {
    let folder = images();
    for program in BOTH {
        let pid = path(&folder, "p");
        let port = forked_at_a_free_port(program, folder.path(), &pid);
        // An address of loopback that nobody names in his options.
        run(tool("nbdinfo").args(["--size", &format!("nbd://127.0.0.2:{port}")]));
        // The second one at this port is refused.
        let (status, _, stderr) =
            program.ends(folder.path(), &["-p", &port, "-r", "-f", "qcow2", "plain.qcow2"]);
        assert_eq!(status, Some(1), "{program:?}: {stderr}");
        let pid: u32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        kill(pid, Signal::TERM);
        let begin = Instant::now();
        while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(begin.elapsed() < PATIENCE, "{program:?} does not end");
            thread::sleep(Duration::from_millis(5));
        }
        // The lock goes with the last of its threads.
        qcow2::wait_until_let_go(folder.path(), "plain.qcow2");
    }
}

/// A server that somebody writes through is in the way of a second one, and the text says so.
#[test]
fn an_image_in_use() {
    let folder = images();
    let holding = Program::QemuNbd.serves(folder.path(), &["-t", "-f", "qcow2", "disk.qcow2"]);
    assert!(UnixStream::connect(holding.socket()).is_ok());
    let socket = path(&folder, "second");
    for program in BOTH {
        let (status, _, stderr) = program.ends(folder.path(), &["-k", &socket, "-f", "qcow2", "disk.qcow2"]);
        assert_eq!(status, Some(1), "{program:?}");
        for needle in [
            "Failed to blk_new_open 'disk.qcow2': ",
            "Failed to get ",
            " lock",
            "Is another process using the image",
        ] {
            assert!(stderr.contains(needle), "{program:?}: {stderr}");
        }
    }
}
