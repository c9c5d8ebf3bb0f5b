//! A server's start as its starter sees it: where it listens, when it says that it is ready and to whom, and what it
//! leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::client::{Client, Wishes, go_data, greet, option_bytes, read_option_reply};
use support::images::{SMALL_DISK_LEN, small_disk};
use support::server::Serve;
use support::tools::{output, run, tool};
use support::wire::{option, option_reply};
use support::{assert_same, scratch};

/// Longer than the drain time of these servers.
const PATIENCE: Duration = Duration::from_secs(90);
const PLAIN: Wishes = Wishes::SIMPLE;

/// A server with its own pipes, killed on drop.
struct Running(Child);

impl Running {
    /// Starts it; `command` has the program and its arguments.
    fn start(command: &mut Command) -> Self {
        Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn stdout_line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap(), signal).unwrap();
    }

    #[track_caller]
    fn wait(&mut self, patience: Duration) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < patience, "the server did not end within {patience:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The rest of what it logged; after its end.
    fn log(&mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// With a drain time that is long enough for a busy disk.
fn serve(image: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.args(["serve", "--format", "raw", "--drain-timeout", "60"]).arg(image);
    command
}

#[test]
fn one_uri_for_each_listener_and_all_of_them_serve() {
    let folder = scratch("listeners");
    let (path, content) = small_disk(folder.path());
    let odd = folder.path().join("a b&c.sock");
    let mut command = serve(&path);
    command.arg("--socket").arg(&odd).args(["--listen", "tcp:127.0.0.1:0", "--listen", "[::1]:0"]);
    let mut server = Running::start(command.args(["-x", "disk one?", "-D", "about it"]));
    let mut stdout = BufReader::new(server.0.stdout.take().unwrap());
    for start in ["nbd+unix:///disk%20one%3F?socket=/", "nbd://127.0.0.1:", "nbd://[::1]:"] {
        let mut uri = String::new();
        stdout.read_line(&mut uri).unwrap();
        assert!(uri.starts_with(start), "{uri}");
        let copy = folder.path().join("copy.img");
        run(tool("nbdcopy").arg(uri.trim()).arg(&copy));
        assert_same(&uri, &fs::read(&copy).unwrap(), &content);
        let shown = String::from_utf8(run(tool("nbdinfo").arg("--list").arg(uri.trim()))).unwrap();
        assert!(shown.contains("disk one?") && shown.contains("about it"), "{shown}");
    }
    // The only export is also the default one.
    Client::unix(&odd, "", PLAIN).disconnect();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(!odd.exists());
}

#[test]
fn ready_means_that_everything_is_there() {
    let folder = scratch("ready");
    let (path, _) = small_disk(folder.path());
    let (fifo, pid_file, socket) =
        (folder.path().join("fifo"), folder.path().join("pid"), folder.path().join("s"));
    run(Command::new("mkfifo").arg(&fifo));
    let notify = folder.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();

    let server = serve(&path);
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 7>\"$FIFO\"", "sh"]).arg(server.get_program()).args(server.get_args());
    command.args(["--ready-fd", "7", "--pid-file"]).arg(&pid_file).arg("--socket").arg(&socket);
    let mut server = Running::start(command.env("FIFO", &fifo).env("NOTIFY_SOCKET", &notify));

    // Returns only when the server has closed its end.
    let told = fs::read_to_string(&fifo).unwrap();
    assert_eq!(told, format!("nbd+unix:///?socket={}\n", socket.display()));
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), format!("{}\n", server.0.id()));
    Client::unix(&socket, "", PLAIN).disconnect();
    let mut message = [0; 64];
    let len = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"READY=1\n");
    assert_eq!(server.stdout_line(), told);

    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    let len = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"STOPPING=1\n");
    assert!(!pid_file.exists() && !socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_refused() {
    let folder = scratch("stale");
    let (path, _) = small_disk(folder.path());
    let socket = folder.path().join("s");
    let mut first = Running::start(serve(&path).arg("--read-only").arg("--socket").arg(&socket));
    first.stdout_line();
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    assert!(socket.exists(), "a killed server leaves its socket");

    let mut second = Running::start(serve(&path).arg("--read-only").arg("--socket").arg(&socket));
    second.stdout_line();
    Client::unix(&socket, "", PLAIN).disconnect();

    let third = output(serve(&path).arg("--read-only").arg("--socket").arg(&socket));
    assert_eq!(third.status.code(), Some(1));
    assert!(String::from_utf8(third.stderr).unwrap().contains("another program listens on this socket"));
    Client::unix(&socket, "", PLAIN).disconnect();

    second.signal(Signal::INT);
    assert_eq!(second.wait(PATIENCE).code(), Some(0));
    assert!(!socket.exists());
}

/// Starts the server as systemd would, with `sockets` as descriptors 3 and 4. The shell moves them there, since a
/// `Command` only passes the standard three.
fn activated(image: &Path, first: OwnedFd, second: OwnedFd, args: &[&str]) -> Child {
    let script =
        "LISTEN_PID=$$ LISTEN_FDS=2; export LISTEN_PID LISTEN_FDS; exec \"$@\" 3<&0 4<&1 0</dev/null 1>&2";
    let server = serve(image);
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(server.get_program()).args(server.get_args()).args(args);
    command.stdin(first).stdout(second).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn sockets_of_a_service_manager_are_used() {
    let folder = scratch("activation");
    let (path, content) = small_disk(folder.path());
    let socket = folder.path().join("s");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap();
    let unix = UnixListener::bind(&socket).unwrap();
    let mut server = Running(activated(&path, tcp.into(), unix.into(), &["--read-only"]));

    // The sockets listen already: whoever connects now waits for the server.
    let mut by_unix = Client::unix(&socket, "", PLAIN);
    let mut by_tcp = Client::tcp(TcpStream::connect(port).unwrap(), "", PLAIN);
    assert_same("over Unix", &by_unix.read_all(), &content);
    assert_same("over TCP", &by_tcp.read_all(), &content);

    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(socket.exists(), "the manager's socket is not ours to remove");
}

#[test]
fn under_activation_there_is_nowhere_else_to_listen() {
    let folder = scratch("activation");
    let (path, _) = small_disk(folder.path());
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(folder.path().join("s")).unwrap();
    let mut server = Running(activated(&path, tcp.into(), unix.into(), &["--socket", "other"]));
    assert_eq!(server.wait(PATIENCE).code(), Some(1));
    assert!(server.log().contains("--socket and --listen cannot be used under socket activation"));
}

/// `program BEFORE... -- [ nbd-img serve -r IMAGE ] AFTER...`
fn captive(program: &str, before: &[&str], image: &Path, after: &[&str]) -> Command {
    let mut command = tool(program);
    let server = serve(image);
    command.args(before).args(["--", "["]).arg(server.get_program()).args(server.get_args());
    command.args(["--read-only", "]"]).args(after);
    command
}

#[test]
fn libnbds_tools_run_it_captive_and_nothing_of_it_is_left() {
    let folder = scratch("captive");
    let (path, content) = small_disk(folder.path());
    let shown = output(&mut captive("nbdinfo", &["--size"], &path, &[]));
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    assert_eq!(String::from_utf8(shown.stdout).unwrap().trim(), SMALL_DISK_LEN.to_string());
    assert!(shown.stderr.is_empty(), "noise: {}", String::from_utf8_lossy(&shown.stderr));
    // A service's variables go on to all that it starts.
    let mut of_a_service = captive("nbdinfo", &["--size"], &path, &[]);
    of_a_service.envs([("INVOCATION_ID", "0123456789abcdef"), ("SYSTEMD_EXEC_PID", "1")]);
    assert_eq!(String::from_utf8(run(&mut of_a_service)).unwrap().trim(), SMALL_DISK_LEN.to_string());
    assert_same("nbdcopy to stdout", &run(&mut captive("nbdcopy", &[], &path, &["-"])), &content);
    // The whole path is ours alone.
    let marker = path.to_str().unwrap();
    let begin = Instant::now();
    while processes_with(marker) > 0 {
        assert!(begin.elapsed() < PATIENCE, "a captive server outlives its client");
        thread::sleep(Duration::from_millis(10));
    }
}

fn processes_with(marker: &str) -> usize {
    let of = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    entries.map(of).filter(|line| String::from_utf8_lossy(line).contains(marker)).count()
}

#[test]
fn several_exports_are_told_apart() {
    let folder = scratch("exports");
    let (path, content) = small_disk(folder.path());
    let second = folder.path().join("second, with comma.img");
    fs::write(&second, vec![9; 4096]).unwrap();
    let socket = folder.path().join("s");
    let escaped = second.to_str().unwrap().replace(',', ",,");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.arg("serve").arg("--socket").arg(&socket);
    command.args(["--export", &format!("name=one,file={},format=raw,offset=1K,size=2K", path.display())]);
    command
        .args(["--export", &format!("name=two,file={escaped},format=raw,read-only,description=the second")]);
    let mut server = Running::start(&mut command);
    server.stdout_line();
    assert_same("one", &Client::unix(&socket, "one", PLAIN).read_all(), &content[1024..3072]);
    assert_same("two", &Client::unix(&socket, "two", PLAIN).read_all(), &[9; 4096]);
    let mut unnamed = greet(&socket);
    unnamed.write_all(&[0, 0, 0, 3]).unwrap();
    unnamed.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
    let (answer, _) = read_option_reply(&mut unnamed, option::GO).unwrap();
    assert_eq!(answer, option_reply::ERR_UNKNOWN, "no export of several is the default one");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let shown = String::from_utf8(run(tool("nbdinfo").args(["--list", &uri]))).unwrap();
    assert!(shown.contains("\"one\"") && shown.contains("the second"), "{shown}");
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
}

#[test]
fn rounding_down_is_said() {
    let folder = scratch("rounding");
    let (path, _) = small_disk(folder.path());
    let server = Serve::image(&path).format("raw").args(&["--offset", "1000", "--size", "2000"]).start();
    assert_eq!(Client::unix(server.socket(), "", PLAIN).read_all().len(), 1536);
    server.wait_for_log("stated=1000 rounded=512");
    server.wait_for_log("stated=2000 rounded=1536");
    server.stop();
}

#[test]
fn a_starter_that_closes_stdout_loses_only_the_line() {
    let folder = scratch("stdout");
    let (path, _) = small_disk(folder.path());
    let socket = folder.path().join("s");
    let mut command = serve(&path);
    command.arg("--socket").arg(&socket).stdin(Stdio::null()).stderr(Stdio::piped());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdout(writer);
    let mut server = Running(command.spawn().unwrap());
    let begin = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    Client::unix(&socket, "", PLAIN).disconnect();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
    assert!(server.log().contains("cannot tell stdout"));
}
