//! nbd-img under the name qemu-nbd beside qemu-nbd itself, on the same images: exit statuses, messages, what clients
//! see, files left behind, and the command lines of those who start it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::front::{BOTH, PATIENCE, Program, kill, listed, text};
use support::tools::{output, qemu_img, qemu_io, run, tool};
use support::{assert_same, scratch};

/// A folder with a raw disk and a qcow2 image on it, both with data and holes.
fn images() -> tempfile::TempDir {
    let folder = scratch("front");
    qemu_img(folder.path(), "create -q -f raw disk.raw 1M");
    qemu_io(folder.path(), "raw", "disk.raw", &["write -P 7 64k 64k"]);
    qemu_img(folder.path(), "create -q -f qcow2 -b disk.raw -F raw disk.qcow2 1M");
    qemu_io(folder.path(), "qcow2", "disk.qcow2", &["write -P 9 256k 128k", "write -z 512k 64k"]);
    folder
}

/// Command lines that end with status 1, and what both programs say.
#[test]
fn refusals() {
    let folder = images();
    let long = format!("/{}", "x".repeat(120));
    let socket = folder.path().join("s").display().to_string();
    for (line, needle) in [
        (vec![], "Invalid number of arguments"),
        (vec!["a", "b"], "Invalid number of arguments"),
        (vec!["--nope", "disk.raw"], "unrecognized option '--nope'"),
        (vec!["-q", "disk.raw"], "invalid option -- 'q'"),
        (vec!["-p"], "option requires an argument -- 'p'"),
        (vec!["--port"], "option '--port' requires an argument"),
        (vec!["--fork=1", "disk.raw"], "option '--fork' doesn't allow an argument"),
        (
            vec!["--s", "disk.raw"],
            "option '--s' is ambiguous; possibilities: '--socket' '--snapshot' '--shared' '--selinux-label'",
        ),
        (vec!["--disc=ignore", "disk.raw"], "possibilities: '--disconnect' '--discard'"),
        (vec!["-e", "x", "disk.raw"], "Invalid shared device number 'x'"),
        (vec!["-e", "-1", "disk.raw"], "Invalid shared device number '-1'"),
        (vec!["-o", "1M", "disk.raw"], "Invalid offset '1M'"),
        (vec!["--handshake-limit=-1", "disk.raw"], "Invalid handshake limit '-1'"),
        (vec!["--cache=foo", "disk.raw"], "Invalid cache mode `foo'"),
        (vec!["-n", "--cache=none", "disk.raw"], "-n and --cache can only be specified once"),
        (vec!["--aio=foo", "disk.raw"], "Invalid aio mode 'foo'"),
        (vec!["--aio=native", "-k", &socket, "-f", "raw", "disk.raw"], "requires cache.direct=on"),
        (vec!["--discard=foo", "disk.raw"], "Invalid discard mode `foo'"),
        (
            vec!["--detect-zeroes=foo", "disk.raw"],
            "Failed to parse detect_zeroes mode: invalid parameter value: foo",
        ),
        (
            vec!["--detect-zeroes=unmap", "--discard=unmap", "disk.raw"],
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (vec!["-k", "relative", "disk.raw"], "socket path must be absolute"),
        (vec!["-k", &long, "-f", "raw", "disk.raw"], "qemu-nbd: "),
        (
            vec!["-k", "/nonexistent/sock", "-f", "raw", "disk.raw"],
            "/nonexistent/sock: No such file or directory",
        ),
        (
            vec!["-k", &socket, "-f", "nope", "disk.raw"],
            "Failed to blk_new_open 'disk.raw': Unknown driver 'nope'",
        ),
        (vec!["-k", &socket, "-f", "raw", "nofile"], "No such file or directory"),
        (vec!["-k", &socket, "-f", "qcow2", "disk.raw"], "Failed to blk_new_open 'disk.raw': "),
        (vec!["-k", &socket, "-f", "qcow2", "-l", "nope", "disk.qcow2"], "Failed to load snapshot: "),
        (vec!["-k", &socket, "-f", "qcow2", "-B", "nope", "disk.qcow2"], "Bitmap 'nope' is not found"),
        (
            vec!["-k", &socket, "-f", "raw", "--pid-file=/nonexistent/p", "disk.raw"],
            "Could not create '/nonexistent/p': No such file",
        ),
        (
            vec!["-k", &socket, "nosuch:disk"],
            "Failed to blk_new_open 'nosuch:disk': Unknown protocol 'nosuch'",
        ),
        (vec!["--image-opts", "-f", "raw", "driver=raw"], "--image-opts and -f are mutually exclusive"),
        (vec!["-k", &socket, "--image-opts", "driver=nope"], "Unknown driver 'nope'"),
        (
            vec!["-k", &socket, "--image-opts", "driver=qcow2"],
            "A block device must be specified for \"file\"",
        ),
        (
            vec!["-k", &socket, "--image-opts", "driver=raw,file=x"],
            "Cannot find device='x' nor node-name='x'",
        ),
        (
            vec!["-k", &socket, "--image-opts", "driver=raw,file.filename=disk.raw,foo=bar"],
            "Block format 'raw' does not support the option 'foo'",
        ),
        (
            vec![
                "-k",
                &socket,
                "--image-opts",
                "driver=raw,file.driver=file,file.filename=disk.raw,file.foo=bar",
            ],
            "Block protocol 'file' doesn't support the option 'foo'",
        ),
        (
            vec!["-k", &socket, "--image-opts", "driver=raw,size=1,file.filename=disk.raw"],
            "Specified size is not multiple of 512",
        ),
        (vec!["-k", &socket, "json:{"], "Could not parse the JSON options: JSON parse error"),
        (vec!["-k", &socket, "json:[]"], "Invalid JSON object given"),
        (vec!["--object", "foo,id=x", "disk.raw"], "Parameter 'qom-type' does not accept value 'foo'"),
        (vec!["--object", "tls-creds-x509,id=x", "disk.raw"], "Missing 'dir' property value"),
        (vec!["--object", "authz-simple,id=x", "disk.raw"], "Parameter 'identity' is missing"),
        (vec!["--tls-creds", "t", "disk.raw"], "Failed to get TLS creds: No TLS credentials with id 't'"),
        (
            vec!["--object", "secret,id=t,data=x", "--tls-creds", "t", "disk.raw"],
            "Failed to get TLS creds: Object with id 't' is not TLS credentials",
        ),
        (vec!["--tls-authz", "x", "disk.raw"], "--tls-authz is not permitted without --tls-creds"),
        (vec!["--tls-hostname", "x", "disk.raw"], "--tls-hostname is not permitted without --tls-creds"),
        (vec!["-L", "disk.raw"], "List mode is incompatible with a file name"),
        (vec!["-L", "-f", "raw"], "List mode is incompatible with per-device settings"),
        (vec!["-L", "--fork"], "List mode is incompatible with forking"),
        (vec!["-L", "-k", "/nonexistent"], "Failed to connect to '/nonexistent': No such file or directory"),
        (vec!["-d", "/dev/nbd-none"], "Cannot open /dev/nbd-none: No such file or directory"),
        (
            vec!["-v", "-c", "/dev/nbd-none", "-f", "raw", "disk.raw"],
            "Failed to open /dev/nbd-none: No such file or directory",
        ),
    ] {
        for program in BOTH {
            let (status, stdout, stderr) = program.ends(folder.path(), &line);
            assert_eq!(status, Some(1), "{program:?} {line:?}: {stderr}");
            assert!(
                stderr.contains(needle) && stderr.contains("qemu-nbd: "),
                "{program:?} {line:?}: {stderr}"
            );
            assert_eq!(stdout, "", "{program:?} {line:?}");
            // QEMU leaves its socket behind when the image is at fault.
            let left = fs::remove_file(&socket).is_ok();
            assert!(program == Program::QemuNbd || !left, "{program:?} {line:?} left its socket");
        }
    }
}

#[test]
fn the_answers_that_callers_parse() {
    let folder = images();
    let options = |text: &str| -> Vec<String> {
        let mut found: Vec<_> = text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .filter(|word| word.starts_with("--") && word.len() > 3)
            .map(str::to_owned)
            .collect();
        found.sort();
        found.dedup();
        found
    };
    let mut helps = Vec::new();
    for program in BOTH {
        let (status, version, _) = program.ends(folder.path(), &["--version"]);
        let numbers =
            version.split(' ').nth(1).unwrap().split('.').filter(|n| n.parse::<u32>().is_ok()).count();
        assert_eq!((status, numbers), (Some(0), 3), "{program:?}: {version}");
        assert_eq!(program.ends(folder.path(), &["-V", "x", "y"]).1, version);
        let (status, help, _) = program.ends(folder.path(), &["--help"]);
        assert_eq!(status, Some(0));
        assert!(help.contains("--selinux-label") && help.contains("-B, --bitmap"), "{help}");
        helps.push(options(&help));
    }
    for option in &helps[0] {
        assert!(helps[1].contains(option), "{option} is missing in {:?}", helps[1]);
    }
}

/// A listing without what is meant to differ: QEMU shows a flag that goes with contexts before any was selected.
fn comparable(list: &str) -> String {
    let mut text = String::new();
    for line in list.lines() {
        match line.split_once("flags: 0x") {
            Some((before, flags)) => {
                let (number, names) = flags.split_once(' ').unwrap();
                let number = u16::from_str_radix(number, 16).unwrap() & !0x1000;
                text +=
                    &format!("{before}flags: {number:#x} {}\n", names.replace(" block-status-payload", ""));
            }
            None => text += &format!("{line}\n"),
        }
    }
    text
}

/// The same listing by qemu-nbd's own client and the same map, whatever the options.
#[test]
fn what_clients_see() {
    let folder = images();
    for options in [
        vec![],
        vec!["-r"],
        vec!["-e", "2"],
        vec!["-e", "0", "-r"],
        vec!["-A"],
        vec!["-x", "name", "-D", "some text"],
        vec!["--discard=unmap", "--detect-zeroes=unmap"],
        vec!["-o", "65536"],
        vec!["-o", "512", "-r"],
        vec!["--cache=writethrough", "--aio=threads"],
        vec!["--cache=none"],
        vec!["probed", "-r"],
    ] {
        for (format, file) in [("raw", "disk.raw"), ("qcow2", "disk.qcow2")] {
            let line = match options.as_slice() {
                ["probed", rest @ ..] => [rest, &["-t", file]].concat(),
                stated => [stated, &["-t", "-f", format, file]].concat(),
            };
            let name = if options.contains(&"name") { "name" } else { "" };
            let contexts: &[&str] = if options.contains(&"-A") {
                &["base:allocation", "qemu:allocation-depth"]
            } else {
                &["base:allocation"]
            };
            let seen = BOTH.map(|program| {
                let mut serving = program.serves(folder.path(), &line);
                let list = listed(serving.socket());
                let maps = contexts.iter().map(|context| {
                    let map = format!("--map={context}");
                    text(&run(tool("nbdinfo").args([&map, &serving.uri(name)])))
                });
                let maps: String = maps.collect();
                let bytes = run(tool("nbdcopy").args([&serving.uri(name), "-"]));
                assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?} {line:?}");
                (list, maps, bytes)
            });
            let [real, ours] = seen;
            assert_eq!(comparable(&ours.0), comparable(&real.0), "the list of {line:?}");
            // Under an offset QEMU does not look through to the backing file, and says of its data that they may be
            // anything.
            if format == "raw" || !options.contains(&"-o") {
                assert_eq!(ours.1, real.1, "the map of {line:?}");
            }
            assert_same(&format!("{line:?}"), &ours.2, &real.2);
        }
    }
}

/// The images of one set of block driver options.
#[test]
fn images_in_options() {
    let folder = images();
    for line in [
        vec![
            "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"disk.qcow2\"},\"backing\":null}",
        ],
        vec![
            "json:{\"driver\":\"raw\",\"offset\":65536,\"size\":131072,\"file\":{\"driver\":\"file\",\"filename\":\"disk.raw\"}}",
        ],
        vec![
            "-o",
            "512",
            "json:{\"driver\":\"raw\",\"offset\":65536,\"size\":131072,\"file\":{\"driver\":\"file\",\"filename\":\"disk.raw\"}}",
        ],
        vec![
            "json:{\"driver\":\"raw\",\"offset\":262144,\"file\":{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"disk.qcow2\"}}}",
        ],
        vec!["json:{\"file.filename\":\"disk.qcow2\"}"],
        vec!["-f", "raw", "json:{\"driver\":\"qcow2\",\"file.filename\":\"disk.qcow2\"}"],
        vec!["--image-opts", "driver=qcow2,file.driver=file,file.filename=disk.qcow2,lazy-refcounts=on"],
        vec![
            "--image-opts",
            "driver=qcow2,backing.driver=raw,backing.file.filename=disk.raw,file.filename=disk.qcow2",
        ],
        vec!["--image-opts", "driver=raw,offset=64K,size=64K,file.filename=disk.raw"],
        vec!["--image-opts", "driver=file,filename=disk.qcow2"],
        vec!["-f", "raw", "file:disk.raw"],
        vec!["disk.qcow2"],
    ] {
        let line = [["-t", "-r"].as_slice(), &line].concat();
        let [real, ours] = BOTH.map(|program| {
            let serving = program.serves(folder.path(), &line);
            (listed(serving.socket()), run(tool("nbdcopy").args([&serving.uri(""), "-"])))
        });
        assert_eq!(comparable(&ours.0), comparable(&real.0), "{line:?}");
        assert_same(&format!("{line:?}"), &ours.1, &real.1);
    }
}

/// An image may name what it likes: the starter of qemu-nbd trusts it.
#[test]
fn what_an_image_names_is_followed() {
    let folder = images();
    let elsewhere = scratch("front-elsewhere");
    let overlay =
        format!("create -q -f qcow2 -F qcow2 -b {} over.qcow2", folder.path().join("disk.qcow2").display());
    qemu_img(elsewhere.path(), &overlay);
    qemu_img(elsewhere.path(), "create -q -f qcow2 -F qcow2 -b file:over.qcow2 top.qcow2 1M");
    let [real, ours] = BOTH.map(|program| {
        let serving = program.serves(elsewhere.path(), &["-r", "-f", "qcow2", "top.qcow2"]);
        run(tool("nbdcopy").args([&serving.uri(""), "-"]))
    });
    assert_same("the chain", &ours, &real);
    assert!(real.contains(&9));
}

#[test]
fn without_persistent_it_ends_after_the_last_client() {
    let folder = images();
    for program in BOTH {
        let mut serving = program.serves(folder.path(), &["-f", "raw", "disk.raw"]);
        // Somebody who does not negotiate is no client, and neither is one that only lists.
        drop(UnixStream::connect(serving.socket()).unwrap());
        listed(serving.socket());
        assert!(serving.is_alive(), "{program:?}");
        run(tool("nbdinfo").args(["--size", &serving.uri("")]));
        assert_eq!(serving.wait().code(), Some(0), "{program:?}");
        assert!(!serving.socket().exists(), "{program:?}");
    }
}

#[test]
fn every_signal_that_asks_for_the_end_gets_status_0() {
    let folder = images();
    let pid_file = folder.path().join("pid");
    let pid_argument = format!("--pid-file={}", pid_file.display());
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        for program in BOTH {
            let mut serving = program.serves(folder.path(), &["-t", "-f", "raw", &pid_argument, "disk.raw"]);
            run(tool("nbdinfo").args(["--size", &serving.uri("")]));
            wait_for(&pid_file);
            assert_eq!(serving.end(signal).code(), Some(0), "{program:?} {signal:?}");
            assert!(!serving.socket().exists(), "{program:?} {signal:?}");
            let left = fs::read_to_string(&pid_file).unwrap();
            assert_eq!(left.trim(), serving.pid().to_string(), "{program:?}: the pid file stays");
            fs::remove_file(&pid_file).unwrap();
        }
    }
}

/// With one client at a time, the next waits without a greeting and is served when the first has gone.
#[test]
fn clients_wait_their_turn() {
    let folder = images();
    for program in BOTH {
        let serving = program.serves(folder.path(), &["-t", "-f", "raw", "disk.raw"]);
        let first = greeted(serving.socket());
        let mut second = UnixStream::connect(serving.socket()).unwrap();
        second.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert!(second.read(&mut [0; 18]).is_err(), "{program:?} greets the second");
        drop(first);
        second.set_read_timeout(Some(PATIENCE)).unwrap();
        second.read_exact(&mut [0; 18]).unwrap();
        drop(second);
        // One after the other, with no time in between: nobody is refused.
        for _ in 0..20 {
            run(tool("nbdinfo").args(["--size", &serving.uri("")]));
        }
    }
}

fn greeted(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream
}

#[test]
fn fork_returns_when_it_listens() {
    let folder = images();
    for program in BOTH {
        let socket = folder.path().join("fork.sock").display().to_string();
        let pid_file = folder.path().join("fork.pid").display().to_string();
        let line = ["--fork", "-t", "-f", "raw", "-k", &socket, "--pid-file", &pid_file, "disk.raw"];
        // Reads both pipes to their ends: the server must have let go of them.
        let (status, stdout, stderr) = program.ends(folder.path(), &line);
        assert_eq!((status, stdout.as_str(), stderr.as_str()), (Some(0), "", ""), "{program:?}");
        let pid: u32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
        run(tool("nbdinfo").args(["--size", &format!("nbd+unix:///?socket={socket}")]));
        assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"), "{program:?}");
        kill(pid, Signal::TERM);
        let begin = Instant::now();
        while Path::new(&format!("/proc/{pid}")).exists() && !is_zombie(pid) {
            assert!(begin.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!Path::new(&socket).exists() && Path::new(&pid_file).exists(), "{program:?}");
        let (status, _, stderr) =
            program.ends(folder.path(), &["--fork", "-f", "raw", "-k", &socket, "nofile"]);
        assert_eq!(status, Some(1), "{program:?}");
        assert!(stderr.starts_with("qemu-nbd: Failed to blk_new_open 'nofile': "), "{program:?}: {stderr}");
    }
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

fn wait_for(file: &Path) {
    let begin = Instant::now();
    while fs::read_to_string(file).unwrap_or_default().trim().is_empty() {
        assert!(begin.elapsed() < PATIENCE, "{} does not come", file.display());
        thread::sleep(Duration::from_millis(5));
    }
}

/// libnbd's tools start it inside of their own command line, by socket activation.
#[test]
fn captive_in_tools_of_libnbd() {
    let folder = images();
    for program in BOTH {
        let path = format!("{}:{}", program.folder(folder.path()).display(), std::env::var("PATH").unwrap());
        for (args, want) in [
            (vec!["--size", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "disk.qcow2", "]"], "1048576\n"),
            (vec!["--size", "--", "[", "qemu-nbd", "-f", "raw", "-x", "", "disk.raw", "]"], "1048576\n"),
        ] {
            let found = run(tool("nbdinfo").current_dir(folder.path()).env("PATH", &path).args(&args));
            assert_eq!(text(&found), want, "{program:?} {args:?}");
        }
        let copied = run(tool("nbdcopy")
            .current_dir(folder.path())
            .env("PATH", &path)
            .args(["--", "[", "qemu-nbd", "-r", "-f", "raw", "disk.raw", "]", "-"]));
        assert_same("captive", &copied, &fs::read(folder.path().join("disk.raw")).unwrap());
        let refused = output(
            tool("nbdinfo")
                .current_dir(folder.path())
                .env("PATH", &path)
                .args(["--size", "--", "[", "qemu-nbd", "-k", "/s", "-f", "raw", "disk.raw", "]"]),
        );
        let stderr = text(&refused.stderr);
        assert!(
            stderr.contains("Unix socket can't be set when using socket activation"),
            "{program:?}: {stderr}"
        );
    }
}

/// Our listing of somebody else's server is the model's own.
#[test]
fn listing_other_servers() {
    let folder = images();
    for (server, line) in [
        (Program::QemuNbd, vec!["-t", "-e", "3", "-f", "qcow2", "-A", "-x", "n", "-D", "d", "disk.qcow2"]),
        (Program::NbdImg, vec!["-t", "-r", "-f", "raw", "disk.raw"]),
    ] {
        let serving = server.serves(folder.path(), &line);
        let socket = serving.socket().to_str().unwrap();
        let [real, ours] = BOTH.map(|program| program.ends(folder.path(), &["-L", "-k", socket]));
        assert_eq!(ours, real, "{server:?} {line:?}");
        assert_eq!(ours.0, Some(0));
    }
    let kit = folder.path().join("kit.sock");
    let mut child = tool("nbdkit")
        .args(["-f", "--exit-with-parent", "-U"])
        .arg(&kit)
        .args(["memory", "1M"])
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while UnixStream::connect(&kit).is_err() {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    let [real, ours] =
        BOTH.map(|program| program.ends(folder.path(), &["--list", "--socket", kit.to_str().unwrap()]));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(ours, real);
}
