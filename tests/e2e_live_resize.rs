//! `nbd-img resize --control`: another size for a disk that is served, while clients use it; and the socket that it goes
//! over.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use support::client::Request;
use support::served::Served;
use support::server::{Export, Serve};
use support::tools::{output, qemu_img, qemu_io, run, tool};
use support::wire::command;
use support::wire::errno::{EINVAL, ENOSPC};
use support::{assert_same, qcow2, scratch};

const MIB: u64 = 1 << 20;

fn size_of(folder: &Path, image: &str) -> u64 {
    let info = qemu_img(folder, &format!("info --output=json {image}"));
    serde_json::from_slice::<serde_json::Value>(&info).unwrap()["virtual-size"].as_u64().unwrap()
}

/// What is served, and how it is made; all have 10 MiB.
const KINDS: [(&str, &str); 9] = [
    ("qcow2", "-o cluster_size=64k"),
    // Its L1 table moves with every step.
    ("qcow2", "-o cluster_size=512"),
    ("qcow2", "-o cluster_size=16k,extended_l2=on"),
    ("qcow2", "-o compat=0.10,cluster_size=4k"),
    // What lies below is longer, and must not come to light.
    ("qcow2", "-b long.raw -F raw -o cluster_size=4k"),
    ("qcow2", "-b long.raw -F raw -o compat=0.10"),
    ("qcow2", "-o data_file=data,cluster_size=4k"),
    ("qcow2", "-o data_file=data,data_file_raw=on"),
    ("raw", ""),
];

fn make(dir: &Path, format: &str, options: &str) {
    fs::write(dir.join("long.raw"), vec![0xbb; 40 << 20]).unwrap();
    qemu_img(dir, &format!("create -q -f {format} {options} disk 10M"));
    qemu_io(dir, format, "disk", &["write -P 1 0 1M", "write -P 2 9M 1M"]);
}

/// The size is durable when the command says so; what is written on stays right, and what is new reads as zeroes.
#[test]
fn a_disk_grows_under_a_writer_and_a_kill() {
    for (format, options) in KINDS {
        let folder = scratch("live-resize");
        let dir = folder.path();
        make(dir, format, options);
        let mut served = Served::start(Serve::image(dir.join("disk")).format(format), dir);
        let mut old = served.connect();
        let (over, mut writer) = (AtomicBool::new(false), served.connect());
        let rounds = thread::scope(|scope| {
            let over = &over;
            let writing = scope.spawn(move || {
                let mut round = 0_u64;
                while round == 0 || !over.load(Ordering::Relaxed) {
                    round += 1;
                    // New clusters all over the old part, and its very end.
                    writer.write(MIB + (round * 7919 % 1000) * 8000, &round.to_le_bytes());
                    writer.write(10 * MIB - 8, &round.to_le_bytes());
                }
                writer.flush();
                round
            });
            for mib in [11, 12, 20, 33] {
                let said = served.resized(&[&format!("{mib}M")]);
                assert!(said.ends_with(&format!("bytes before, {} now\n", mib * MIB)), "{said}");
                assert_eq!(served.size(), mib * MIB, "{options}");
            }
            over.store(true, Ordering::Relaxed);
            writing.join().unwrap()
        });
        assert!(rounds > 0);
        // Who was told the old size keeps it.
        let beyond = old.ask(Request::new(command::READ, 10 * MIB, 512), &[]);
        assert_eq!(beyond.error, EINVAL, "{options}");
        let mut new = served.connect();
        assert_eq!((old.size, new.size), (10 * MIB, 33 * MIB));
        assert_same("the end", &new.read(10 * MIB - 8, 8), &rounds.to_le_bytes());
        assert!(new.read(10 * MIB, 23 << 20).iter().all(|byte| *byte == 0), "{options}: not zeroes");
        new.write(32 * MIB, &[7; 65536]);
        new.flush();
        assert_same("by the old one", &old.read(9 * MIB, 4096), &new.read(9 * MIB, 4096));
        served.resized(&["+1536"]);
        served.server.signal(Signal::KILL);
        served.server.wait(Duration::from_secs(30));
        qcow2::wait_until_let_go(dir, "disk");
        assert_eq!(size_of(dir, "disk"), 33 * MIB + 1536, "{options}");
        if format == "qcow2" {
            qcow2::check(dir, "disk");
        }
        qemu_io(
            dir,
            format,
            "disk",
            &["read -P 7 32M 64k", "read -P 0 10M 22M", "read -P 1 0 1M", "read -P 0 33M 1536"],
        );
    }
}

/// The same disk as after an offline resize by QEMU, and an image without leaks.
#[test]
fn a_closed_image_is_what_qemu_makes_of_it() {
    for (format, options) in KINDS {
        let folder = scratch("live-resize");
        let dir = folder.path();
        make(dir, format, options);
        // A data file is beside the image.
        let other = scratch("live-resize");
        let theirs = other.path();
        make(theirs, format, options);
        let served = Served::start(Serve::image(dir.join("disk")).format(format), dir);
        for change in ["20M", "9730K", "30M", "5M"] {
            let before = size_of(theirs, "disk");
            served.resized(&["--shrink", change]);
            let args = ["resize", "-q", "--shrink", "-f", format, "disk", change];
            let resized = output(tool("qemu-img").current_dir(theirs).args(args));
            if !resized.status.success() {
                // QEMU does not make such a disk larger.
                assert!(options.contains("compat=0.10") && options.contains("-b "), "{resized:?}");
                run(Command::new(env!("CARGO_BIN_EXE_nbd-img")).current_dir(theirs).args(args));
            }
            let after = size_of(theirs, "disk");
            if after > before {
                // QEMU shows again what it has cut off within a cluster; ours is zeroes.
                qemu_io(theirs, format, "disk", &[&format!("write -z {before} {}", after - before)]);
            }
            let copy = dir.join("copy");
            run(tool("nbdcopy").arg(served.server.uri("")).arg(&copy));
            // QEMU's growing lets what lies below come to light in some versions; ours never does.
            if !options.contains("-b ") {
                qemu_img(theirs, &format!("compare -f raw -F {format} {} disk", copy.to_str().unwrap()));
            }
            fs::remove_file(copy).unwrap();
        }
        served.resized(&["12M"]);
        served.server.stop();
        let data = fs::metadata(dir.join("data"));
        assert!(data.map_or(!options.contains("data"), |data| data.len() == 12 * MIB), "{options}");
        assert!(!served.control.exists(), "the control socket was left behind");
        if format == "qcow2" {
            qcow2::check_clean(dir, "disk");
        }
        qemu_io(dir, format, "disk", &["read -P 0 5M 7M", "read -P 1 0 1M"]);
        assert_eq!(size_of(dir, "disk"), 12 * MIB);
        qemu_img(dir, &format!("resize -q --shrink -f {format} disk 5M"));
        // QEMU looks for the data file in the current folder.
        let copy = dir.join("copy");
        qemu_img(theirs, &format!("convert -f {format} -O raw disk {}", copy.to_str().unwrap()));
        qemu_img(dir, &format!("compare -f {format} -F raw disk copy"));
    }
}

#[test]
fn a_disk_becomes_smaller_when_nobody_was_told_more() {
    for (format, options) in [("qcow2", "-o cluster_size=512"), ("raw", "")] {
        let folder = scratch("live-resize");
        let dir = folder.path();
        make(dir, format, options);
        let served = Served::start(Serve::image(dir.join("disk")).format(format), dir);
        served.refused(&["5M"], "--shrink");
        let mut large = served.connect();
        served.refused(&["--shrink", "5M"], "1 connections were told a larger size");
        assert_eq!(served.size(), 10 * MIB);
        large.write(10 * MIB - 512, &[9; 512]);
        large.disconnect();
        // The server sees the end of the connection a moment later.
        served.resized_in_time(&["--shrink", "--", "-5M"]);
        let mut small = served.connect();
        assert_eq!(small.size, 5 * MIB);
        for (command, error) in [(command::READ, EINVAL), (command::WRITE, ENOSPC), (command::TRIM, EINVAL)] {
            let payload = if command == command::WRITE { vec![1; 512] } else { Vec::new() };
            let reply = small.ask(Request::new(command, 5 * MIB, 512), &payload);
            assert_eq!(reply.error, error, "command {command}");
        }
        // A smaller one does not stand in the way of a larger.
        served.resized(&["10M"]);
        let mut again = served.connect();
        assert!(again.read(5 * MIB, 5 << 20).iter().all(|byte| *byte == 0), "{options}: old content is back");
        drop((small, again));
        served.server.stop();
    }
}

/// Others make a raw file longer or shorter: clients who come see it when the server has been told.
#[test]
fn a_file_that_others_change_is_followed_when_told() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "raw", "");
    for read_only in [false, true] {
        let serve = Serve::image(dir.join("disk")).format("raw");
        let served = Served::start(if read_only { serve.read_only() } else { serve }, dir);
        let file = OpenOptions::new().write(true).open(dir.join("disk")).unwrap();
        file.set_len(20 * MIB + 100).unwrap();
        assert_eq!(served.size(), 10 * MIB);
        if !read_only {
            served.refused(&["30M"], "leave SIZE out");
        }
        served.resized(&[]);
        assert_eq!(served.size(), 20 * MIB + 512);
        let mut client = served.connect();
        assert!(client.read(20 * MIB, 512).iter().all(|byte| *byte == 0));
        file.set_len(10 * MIB).unwrap();
        served.refused(&[], "--shrink");
        served.refused(&["--shrink"], "connections were told");
        // It still has the size that it was told, and the file has not.
        let gone = client.ask(Request::new(command::READ, 15 * MIB, 512), &[]);
        assert_ne!(gone.error, 0);
        client.disconnect();
        served.resized_in_time(&["--shrink"]);
        assert_eq!(served.size(), 10 * MIB);
        served.server.stop();
    }
}

#[test]
fn a_window_is_what_it_is_at_a_start() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "qcow2", "");
    let served = Served::start(Serve::image(dir.join("disk")).args(&["--offset", "1M"]), dir);
    let said = served.resized(&["12M"]);
    assert!(said.contains(&format!("clients see {}", 11 * MIB)), "{said}");
    assert_eq!(served.size(), 11 * MIB);
    served.refused(&["--shrink", "512K"], "--offset");
    served.server.stop();
    let served = Served::start(Serve::image(dir.join("disk")).args(&["--size", "6M"]), dir);
    served.resized(&["--shrink", "8M"]);
    assert_eq!(served.size(), 6 * MIB);
    // What clients see does not change, so those who are there may stay.
    let client = served.connect();
    served.resized(&["--shrink", "7M"]);
    served.refused(&["--shrink", "5M"], "--size");
    drop(client);
    served.server.stop();
    assert_eq!(size_of(dir, "disk"), 7 * MIB);
    qcow2::check_clean(dir, "disk");
}

#[test]
fn what_cannot_be_resized_says_why() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "qcow2", "");
    qemu_img(dir, "create -q -f qcow2 marked 10M");
    qemu_img(dir, "bitmap --add marked dirty");
    // Whoever is killed leaves it in use.
    let mut killed = Serve::image(dir.join("marked")).start();
    qemu_io(dir, "raw", &killed.uri(""), &["write -P 1 0 512"]);
    killed.signal(Signal::KILL);
    killed.wait(Duration::from_secs(30));
    qcow2::wait_until_let_go(dir, "marked");
    fs::write(dir.join("raw"), vec![1; 1 << 20]).unwrap();
    for (image, args, hint) in [
        ("disk", &["--read-only"][..], "read-only"),
        ("disk", &["--temporary=per-client"], "per-client"),
        ("marked", &[], "the bitmap 'dirty' does not tell what is dirty"),
        ("raw", &["--format", "mmap-raw"], "serve it as raw"),
    ] {
        let served = Served::start(Serve::image(dir.join(image)).args(args), dir);
        served.refused(&["20M"], hint);
        served.server.stop();
    }
    let served = Served::start(Serve::image(dir.join("disk")).args(&["--export-name", "a"]), dir);
    served.refused(&["--export", "b", "20M"], "no export of the name 'b'");
    served.refused(&["8000000T"], "too large for clusters");
    served.resized(&["--export", "a", "+0"]);
    served.server.stop();
    let two = ["disk", "raw"].map(|name| Export {
        file: dir.join(name),
        name: name.into(),
        format: None,
        read_only: false,
    });
    let served = Served::start(Serve::exports(two.to_vec()), dir);
    served.refused(&["20M"], "--export NAME");
    served.resized(&["--export", "disk", "20M"]);
    served.server.stop();
    for args in [&["--control", "c", "disk", "20M"][..], &["--export", "a", "disk", "20M"], &["disk"], &[]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        let refused = output(command.current_dir(dir).arg("resize").args(args));
        assert_eq!(refused.status.code(), Some(2), "{args:?}: {refused:?}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    let nobody = output(command.current_dir(dir).args(["resize", "--control", "nowhere", "20M"]));
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no server is there"), "{nobody:?}");
}

/// An overlay that is thrown away grows for all its clients; the image does not.
#[test]
fn an_overlay_for_all_grows_and_the_image_does_not() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "qcow2", "");
    let before = fs::read(dir.join("disk")).unwrap();
    let served = Served::start(Serve::image(dir.join("disk")).args(&["--temporary"]), dir);
    served.resized(&["20M"]);
    qemu_io(
        dir,
        "raw",
        &served.server.uri(""),
        &["read -P 2 9M 1M", "read -P 0 10M 10M", "write -P 3 15M 1M"],
    );
    served.server.stop();
    assert!(fs::read(dir.join("disk")).unwrap() == before);
}

fn ask(stream: &mut UnixStream, line: &[u8]) -> String {
    stream.write_all(line).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

#[test]
fn the_control_socket_is_the_users_own_and_cleaned_up() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "raw", "");
    let control = dir.join("control");
    // Nobody listens on it any more.
    drop(UnixListener::bind(&control).unwrap());
    let served = Served::start(Serve::image(dir.join("disk")).format("raw"), dir);
    let metadata = fs::metadata(&control).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let taken = Serve::image(dir.join("long.raw"))
        .format("raw")
        .args(&["--control", control.to_str().unwrap()])
        .start_refused();
    assert!(taken.stderr.contains("another program listens on this socket"), "{}", taken.stderr);
    served.server.stop();
    assert!(!control.exists());
    fs::write(&control, "not a socket").unwrap();
    let other =
        Serve::image(dir.join("disk")).args(&["--control", control.to_str().unwrap()]).start_refused();
    assert!(other.stderr.contains("not a socket"), "{}", other.stderr);
    assert_eq!(fs::read(&control).unwrap(), b"not a socket");
}

/// Whatever is sent there ends at most its own connection; whoever says nothing holds up nobody.
#[test]
fn bad_lines_and_slow_clients_are_on_their_own() {
    let folder = scratch("live-resize");
    let dir = folder.path();
    make(dir, "raw", "");
    let mut served = Served::start(Serve::image(dir.join("disk")).format("raw"), dir);
    let connect = || {
        let stream = UnixStream::connect(&served.control).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    let mut stream = connect();
    for line in
        ["\n", "hello\n", "{}\n", "{\"version\":9}\n", "{\"version\":1,\"command\":\"stop\"}\n", "\u{0}\n"]
    {
        let answer = ask(&mut stream, line.as_bytes());
        assert!(answer.starts_with("{\"version\":1,\"error\":\""), "{line:?}: {answer}");
    }
    let good = b"{\"version\":1,\"command\":\"resize\",\"size\":{\"to\":10485760}}\n";
    let answer = ask(&mut stream, good);
    assert_eq!(
        answer,
        "{\"version\":1,\"resized\":{\"from\":10485760,\"to\":10485760,\"export\":10485760}}\n"
    );
    // Two lines at once, and one in pieces.
    let pair = [good.as_slice(), good].concat();
    stream.write_all(&pair).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert!(
        lines.next().unwrap().unwrap().contains("resized")
            && lines.next().unwrap().unwrap().contains("resized")
    );
    stream.write_all(&good[..20]).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(ask(&mut stream, &good[20..]).contains("resized"));
    // Too long: an answer, and the end.
    let mut endless = connect();
    let _ = endless.write_all(&vec![b'x'; 100_000]); // The server need not take all of it.
    let mut rest = String::new();
    let end =
        endless.read_to_string(&mut rest).map_or_else(|error| error.kind(), |_| ErrorKind::ConnectionReset);
    assert!(end == ErrorKind::ConnectionReset && rest.contains("longer than 32768 bytes"), "{end}: {rest}");
    drop((stream, lines));
    // Silent ones: others are served as long as there is room, and told when there is none.
    let silent: Vec<_> = (0..15).map(|_| connect()).collect();
    assert!(ask(&mut connect(), good).contains("resized"));
    let more: Vec<_> = (0..10).map(|_| connect()).collect();
    let mut told = String::new();
    BufReader::new(connect()).read_line(&mut told).unwrap();
    assert!(told.contains("try later"), "{told}");
    assert_eq!(served.connect().read(0, 512), [1; 512]);
    drop((silent, more));
    served.resized_in_time(&["10M"]);
    served.server.assert_alive();
    served.server.stop();
}
