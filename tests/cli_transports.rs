//! Every way to reach a server, as its users write it: sockets of all kinds, those that the starter has opened, and
//! stdin and stdout.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Client, Request, Transport, Wishes};
use support::images::{SMALL_DISK_LEN, small_disk};
use support::tools::{output, python_nbd, run, tool};
use support::wire::command;
use support::{assert_same, scratch, tls};

/// Longer than the drain time of these servers.
const PATIENCE: Duration = Duration::from_secs(90);
const PLAIN: Wishes = Wishes::SIMPLE;

/// With a drain time that is long enough for a busy disk.
fn serve(image: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.args(["serve", "--format", "raw", "--drain-timeout", "60"]).arg(image).args(args);
    command
}

/// The same below a shell that moves descriptors first: `moves` are redirections.
fn serve_moved(image: &Path, args: &[&str], moves: &str) -> Command {
    let server = serve(image, args);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$@\" {moves}"), "sh"]);
    command.arg(server.get_program()).args(server.get_args());
    command
}

/// A server, killed on drop.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn stdout_line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "the server did not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The rest of what it logged; after its end.
    fn log(&mut self) -> String {
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[track_caller]
    fn stop(mut self) {
        kill_process(Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap(), Signal::TERM).unwrap();
        assert!(self.wait().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn assert_refused(command: &mut Command, hint: &str) {
    let output = output(command.stdin(Stdio::null()));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains(hint), "{command:?}: {}: {text}", output.status);
}

#[track_caller]
fn reads_all(mut client: Client, content: &[u8]) {
    assert_same("the disk", &client.read_all(), content);
    client.disconnect();
}

#[test]
fn an_abstract_socket_is_reached_by_its_name() {
    let folder = scratch("abstract");
    let (path, content) = small_disk(folder.path());
    let name = format!("nbd-img-{}", std::process::id());
    let address = format!("unix:@{name}");
    let mut server = Running::start(&mut serve(&path, &["-r", "--listen", &address]));
    // No tool has a URI for it, so it is told as it was given.
    assert_eq!(server.stdout_line(), address);
    let connect = || UnixStream::connect_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    reads_all(Client::over(Box::new(connect()), "", PLAIN), &content);
    assert_refused(&mut serve(&path, &["-r", "--listen", &address]), "another program listens by this name");
    server.stop();
}

#[test]
fn a_socket_file_gets_mode_and_owner() {
    let folder = scratch("mode");
    let (path, content) = small_disk(folder.path());
    let socket = folder.path().join("s");
    let socket_text = socket.to_str().unwrap();
    let mut server = Running::start(&mut serve(&path, &["--socket", socket_text, "--socket-mode", "606"]));
    server.stdout_line();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o606);
    reads_all(Client::unix(&socket, "", PLAIN), &content);
    server.stop();

    let args = ["-r", "--socket", socket_text, "--socket-owner", "nobody:nogroup"];
    if rustix::process::geteuid().is_root() {
        let mut server = Running::start(&mut serve(&path, &args));
        server.stdout_line();
        let found = fs::metadata(&socket).unwrap();
        assert!(found.uid() > 1000 && found.gid() > 1000, "{} {}", found.uid(), found.gid());
        server.stop();
    } else {
        assert_refused(&mut serve(&path, &args), "--socket-owner");
        assert!(!socket.exists(), "a socket that could not be given away stays");
    }
    assert_refused(&mut serve(&path, &["--socket", "s", "--socket-owner", "no-such-user"]), "no such user");
    assert_refused(&mut serve(&path, &["--socket", "s", "--socket-mode", "rw"]), "octal");
}

/// Where the kernel has vsock, the server listens, and its URI is the one that clients take; where two ends on one
/// machine can meet (the module vsock_loopback), they do.
#[test]
fn vsock_is_listened_on_or_its_lack_is_told() {
    let folder = scratch("vsock");
    let (path, content) = small_disk(folder.path());
    let mut command = serve(&path, &["-r", "--listen", "vsock:0", "-x", "disk"]);
    if let Err(error) = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None) {
        println!("no vsock here: {error}");
        assert_refused(&mut command, "this kernel has no vsock sockets");
        return;
    }
    assert_refused(
        &mut serve(&path, &["-r", "--listen", "vsock:77777777:0"]),
        "not a context id of this machine",
    );
    let mut server = Running::start(&mut command);
    let uri = server.stdout_line();
    let port = uri.strip_prefix("nbd+vsock://").and_then(|rest| rest.strip_suffix("/disk")).expect(&uri);
    let (_, port) = port.split_once(':').expect(&uri);
    let taken = ["-r", "--listen", &format!("vsock:{port}")];
    assert_refused(&mut serve(&path, &taken), "another program listens on vsock port");
    if Path::new("/sys/module/vsock_loopback").exists() {
        let local = format!("nbd+vsock://1:{port}/disk");
        let copy = folder.path().join("copy.img");
        run(tool("nbdcopy").arg(&local).arg(&copy));
        assert_same(&local, &fs::read(&copy).unwrap(), &content);
    } else {
        println!("no vsock_loopback here: {uri} was listened on and not connected to");
    }
    server.stop();
}

#[test]
fn a_listening_socket_of_the_starter_is_used() {
    let folder = scratch("fd-listening");
    let (path, content) = small_disk(folder.path());
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let own = folder.path().join("own");
    let mut command =
        serve_moved(&path, &["--listen", "fd:5", "--socket", own.to_str().unwrap()], "5<&0 0</dev/null");
    command.stdin(OwnedFd::from(tcp)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = Running(command.spawn().unwrap());
    let mut stdout = BufReader::new(server.0.stdout.take().unwrap()).lines();
    assert_eq!(stdout.next().unwrap().unwrap(), format!("nbd://{address}/"));
    assert!(stdout.next().unwrap().unwrap().starts_with("nbd+unix://"), "beside others");
    reads_all(Client::tcp(TcpStream::connect(address).unwrap(), "", PLAIN), &content);
    reads_all(Client::unix(&own, "", PLAIN), &content);
    server.stop();
}

/// A server for the one client whose socket it inherits as descriptor 5.
fn with_client(image: &Path, args: &[&str], socket: OwnedFd) -> Running {
    let mut command = serve_moved(image, args, "5<&0 0</dev/null");
    command.stdin(socket).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running(command.spawn().unwrap())
}

#[test]
fn a_connected_socket_of_the_starter_is_served_and_then_the_server_ends() {
    let folder = scratch("fd-connected");
    let (path, content) = small_disk(folder.path());
    let (theirs, ours) = UnixStream::pair().unwrap();
    let mut server = with_client(&path, &["--listen", "fd:5"], theirs.into());
    reads_all(Client::over(Box::new(ours), "", PLAIN), &content);
    assert!(server.wait().success(), "{}", server.log());
    // Of TCP, and a client that goes without having chosen an export.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut server = with_client(&path, &["--listen", "fd:5"], listener.accept().unwrap().0.into());
    (&ours).read_exact(&mut [0; 18]).unwrap();
    drop(ours);
    assert!(server.wait().success(), "{}", server.log());
}

#[test]
fn a_connected_socket_beside_a_listening_one_ends_nothing() {
    let folder = scratch("fd-beside");
    let (path, content) = small_disk(folder.path());
    let (theirs, ours) = UnixStream::pair().unwrap();
    let own = folder.path().join("own");
    let args = ["--listen", "fd:5", "--socket", own.to_str().unwrap()];
    let mut server = with_client(&path, &args, theirs.into());
    server.stdout_line();
    reads_all(Client::over(Box::new(ours), "", PLAIN), &content);
    reads_all(Client::unix(&own, "", PLAIN), &content);
    server.stop();
}

#[test]
fn descriptors_that_cannot_be_used_are_told_apart() {
    let folder = scratch("fd-errors");
    let (path, _) = small_disk(folder.path());
    let moved = |args: &[&str], moves: &str| serve_moved(&path, args, moves);
    assert_refused(
        &mut moved(&["--listen", "fd:9"], "9<&-"),
        "--listen fd:9: descriptor 9: Bad file descriptor",
    );
    assert_refused(&mut moved(&["--listen", "fd:9"], "9</dev/null"), "--listen fd:9: it is not a socket");
    let twice = ["--listen", "fd:9", "--ready-fd", "9"];
    let (socket, _other) = UnixStream::pair().unwrap();
    let mut command = moved(&twice, "9<&0");
    let refused = command.stdin(OwnedFd::from(socket)).stderr(Stdio::piped()).output().unwrap();
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains("--ready-fd: descriptor 9 is a socket of"), "{text}");
    assert_refused(&mut moved(&["--listen", "nbds:fd:9"], "9</dev/null"), "not a socket");
    assert_refused(&mut serve(&path, &["--listen", "nbds:unix:s"]), "nbds:unix:s: TLS needs certificates");
    assert_refused(&mut serve(&path, &["--listen", "stdio"]), "neither a socket nor two pipes");
}

/// libnbd starts a server and talks to it by stdin and stdout, which are one socket.
#[test]
fn libnbd_talks_to_a_server_that_it_starts() {
    let folder = scratch("command");
    let (path, content) = small_disk(folder.path());
    let script = "import nbd, sys\n\
        h = nbd.NBD()\n\
        h.connect_command(sys.argv[1:])\n\
        assert h.get_size() == 1 << 20, h.get_size()\n\
        data = bytes(h.pread(1 << 20, 0))\n\
        h.pwrite(b'x' * 512, 1024)\n\
        h.flush()\n\
        h.shutdown()\n\
        sys.stdout.buffer.write(data)\n";
    let server = serve(&path, &["--listen", "stdio"]);
    let mut python = python_nbd(script);
    python.arg(server.get_program()).args(server.get_args());
    let output = output(&mut python);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && log.is_empty(), "noise or worse: {log}");
    assert_same("what libnbd read", &output.stdout, &content);
    assert_eq!(fs::read(&path).unwrap()[1024..1536], [b'x'; 512]);
}

/// A client at the other end of two pipes.
struct Pipes(ChildStdin, ChildStdout);

impl Read for Pipes {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.1.read(buf)
    }
}

impl Write for Pipes {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl Transport for Pipes {
    fn set_patience(&self, _patience: Option<Duration>) -> std::io::Result<()> {
        Ok(())
    }

    fn duplicate(&self) -> std::io::Result<Box<dyn Transport>> {
        Err(std::io::Error::other("pipes have one end each"))
    }
}

/// As over ssh or docker exec.
#[test]
fn two_pipes_are_a_connection() {
    let folder = scratch("pipes");
    let (path, mut content) = small_disk(folder.path());
    let mut command = serve(&path, &["--listen", "stdio"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = Running(command.spawn().unwrap());
    let pipes = Pipes(server.0.stdin.take().unwrap(), server.0.stdout.take().unwrap());
    let mut client = Client::over(Box::new(pipes), "", Wishes::STRUCTURED);
    // More than pipes hold, both ways.
    content[..SMALL_DISK_LEN / 2].fill(7);
    assert_eq!(
        client.ask(Request::new(command::WRITE, 0, SMALL_DISK_LEN / 2), &content[..SMALL_DISK_LEN / 2]).error,
        0
    );
    assert_same("the disk", &client.read_all(), &content);
    client.disconnect();
    assert!(server.wait().success());
    assert_eq!(server.log(), "", "it is quiet");
    assert_same("the file", &fs::read(&path).unwrap(), &content);
}

/// inetd gives the client's socket as stdin, stdout and stderr: nothing but NBD may come out there.
#[test]
fn inetd_gives_one_socket_for_all_three() {
    let folder = scratch("inetd");
    let (path, _) = small_disk(folder.path());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let mut command = serve(&path, &["-vv", "--listen", "stdio"]);
    let copy = || Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
    let mut server = Running(command.stdin(copy()).stdout(copy()).stderr(copy()).spawn().unwrap());
    drop((command, theirs));
    // Client flags, and an ABORT.
    ours.write_all(&[0, 0, 0, 3]).unwrap();
    ours.write_all(b"IHAVEOPT\0\0\0\x02\0\0\0\0").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    ours.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 18 + 20, "more than the greeting and an ACK: {}", String::from_utf8_lossy(&all));
    assert!(server.wait().success());
}

/// inetd's "wait" services get the listening socket as stdin.
#[test]
fn a_listening_socket_may_be_stdin() {
    let folder = scratch("inetd-wait");
    let (path, content) = small_disk(folder.path());
    let listener = UnixListener::bind(folder.path().join("s")).unwrap();
    let mut command = serve(&path, &["--listen", "stdio", "--exit-last"]);
    command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut server = Running(command.spawn().unwrap());
    reads_all(Client::unix(&folder.path().join("s"), "", PLAIN), &content);
    assert!(server.wait().success());
}

/// A CA's folder for the server and one for the client.
fn certificates(folder: &Path) -> (PathBuf, PathBuf) {
    let authority = Authority::new("the CA of the tests");
    let (server, client) = (folder.join("server"), folder.join("client"));
    server_folder(&server, &authority, SERVER);
    client_folder(&client, &authority, CLIENT, &authority.cert);
    (server, client)
}

/// A client that begins with TLS.
fn tls_client(stream: UnixStream, folder: &Path) -> Client {
    let stream = tls::handshake(stream, tls::config(folder, rustls::ALL_VERSIONS)).unwrap();
    Client::over(Box::new(stream), "", PLAIN)
}

#[test]
fn tls_from_the_first_byte_goes_over_every_socket() {
    let folder = scratch("nbds");
    let (path, content) = small_disk(folder.path());
    let (certs, client) = certificates(folder.path());
    let certs = certs.to_str().unwrap();
    let socket = folder.path().join("s");
    let address = format!("nbds:unix:{}", socket.display());
    let mut server = Running::start(&mut serve(&path, &["--tls-dir", certs, "--listen", &address]));
    assert_eq!(server.stdout_line(), address);
    reads_all(tls_client(UnixStream::connect(&socket).unwrap(), &client), &content);
    server.stop();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let args = ["--tls-dir", certs, "--listen", "nbds:fd:5"];
    let mut server = with_client(&path, &args, theirs.into());
    reads_all(tls_client(ours, &client), &content);
    assert!(server.wait().success());
    // And STARTTLS by stdin and stdout.
    let (theirs, ours) = UnixStream::pair().unwrap();
    let mut command = serve(&path, &["--tls-dir", certs, "--listen", "stdio"]);
    let copy = theirs.try_clone().unwrap();
    command.stdin(OwnedFd::from(theirs)).stdout(OwnedFd::from(copy)).stderr(Stdio::piped());
    let mut server = Running(command.spawn().unwrap());
    drop(command);
    let stream = tls::handshake(tls::starttls_on(ours), tls::config(&client, rustls::ALL_VERSIONS)).unwrap();
    reads_all(Client::ask_for(Box::new(stream), "", PLAIN), &content);
    assert!(server.wait().success());
}

/// Three sockets of a service manager, one of which is named for TLS from the first byte.
#[test]
fn activation_takes_several_sockets_and_their_names() {
    let folder = scratch("activation");
    let (path, content) = small_disk(folder.path());
    let (certs, client) = certificates(folder.path());
    let [plain, secure, third] = ["plain", "secure", "third"].map(|name| folder.path().join(name));
    let listen = |path: &Path| OwnedFd::from(UnixListener::bind(path).unwrap());
    let server = serve(&path, &["--tls", "optional", "--tls-dir", certs.to_str().unwrap()]);
    let mut command = Command::new("sh");
    let script = "LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=a:nbds:b; export LISTEN_PID LISTEN_FDS LISTEN_FDNAMES; \
                  exec \"$@\" 3<&0 4<&1 5<&2 0</dev/null 1>/dev/null 2>&6";
    let log = folder.path().join("log");
    command.args(["-c", &format!("exec 6>'{}'; {script}", log.display()), "sh"]);
    command.arg(server.get_program()).args(server.get_args());
    command.stdin(listen(&plain)).stdout(listen(&secure)).stderr(listen(&third));
    let server = Running(command.spawn().unwrap());
    drop(command);
    reads_all(Client::unix(&plain, "", PLAIN), &content);
    reads_all(Client::unix(&third, "", PLAIN), &content);
    reads_all(tls_client(UnixStream::connect(&secure).unwrap(), &client), &content);
    server.stop();
}

/// What real oldstyle clients make of it; libnbd and QEMU are both.
#[test]
fn oldstyle_clients_are_served() {
    let folder = scratch("oldstyle");
    let (path, mut content) = small_disk(folder.path());
    let socket = folder.path().join("s");
    let args = ["--oldstyle", "-x", "a name that nobody asks for", "--socket", socket.to_str().unwrap()];
    let mut server = Running::start(&mut serve(&path, &args));
    server.stdout_line();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let shown = String::from_utf8(run(tool("nbdinfo").arg(&uri))).unwrap();
    assert!(shown.contains("protocol: oldstyle without TLS"), "{shown}");
    let copy = folder.path().join("copy.img");
    run(tool("nbdcopy").arg(&uri).arg(&copy));
    assert_same("nbdcopy", &fs::read(&copy).unwrap(), &content);
    let io = [
        "-c",
        "write -P 9 4096 8192",
        "-c",
        "read -P 9 4096 8192",
        "-c",
        "write -z 65536 4096",
        "-c",
        "flush",
    ];
    let said = String::from_utf8(run(tool("qemu-io").args(["-f", "raw"]).args(io).arg(&uri))).unwrap();
    assert!(!said.contains("failed"), "{said}");
    content[4096..12288].fill(9);
    content[65536..69632].fill(0);
    assert_same("the file", &fs::read(&path).unwrap(), &content);
    server.stop();
}
