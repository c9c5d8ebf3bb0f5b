//! Starts a server for a test, waits until it is ready, and makes sure that it ends.
//!
//! `NBD_IMG_PEER=qemu-nbd cargo test ...` runs the same tests against qemu-nbd (qemu-storage-daemon for several exports)
//! with the equivalent options: that shows what a rig is worth, and where the two servers differ. CI never sets it.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::tools::tool;

/// Long enough for a busy machine; a server that is not ready or gone by then hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// The drain time of servers whose end is not what a test is about, in seconds: a busy disk may flush for longer than
/// the default.
const DRAIN_TIME: &str = "60";
/// Longer than that.
const END_PATIENCE: Duration = Duration::from_secs(90);

/// Whose server a run of the tests drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    NbdImg,
    QemuNbd,
}

impl Peer {
    pub fn of_this_run() -> Self {
        match std::env::var("NBD_IMG_PEER").as_deref() {
            Err(_) | Ok("nbd-img") => Self::NbdImg,
            Ok("qemu-nbd") => Self::QemuNbd,
            Ok(other) => panic!("NBD_IMG_PEER={other}: nbd-img or qemu-nbd"),
        }
    }
}

/// One image to export, in the terms of nbd-img's command line.
#[derive(Clone, Debug)]
pub struct Export {
    pub file: PathBuf,
    pub name: String,
    pub format: Option<String>,
    pub read_only: bool,
}

/// What to serve. `Serve::image(path).format("raw").start()`.
#[derive(Clone, Debug)]
pub struct Serve {
    exports: Vec<Export>,
    args: Vec<String>,
    qemu_args: Vec<String>,
    wrapper: Vec<String>,
    folder: Option<PathBuf>,
    peer: Peer,
    expect_failure: bool,
}

impl Serve {
    pub fn image(file: impl AsRef<Path>) -> Self {
        let export =
            Export { file: file.as_ref().into(), name: String::new(), format: None, read_only: false };
        Self {
            exports: vec![export],
            args: Vec::new(),
            qemu_args: Vec::new(),
            wrapper: Vec::new(),
            folder: None,
            peer: Peer::of_this_run(),
            expect_failure: false,
        }
    }

    /// Several named exports of raw files.
    pub fn exports(exports: Vec<Export>) -> Self {
        Self { exports, ..Self::image("") }
    }

    pub fn format(mut self, format: &str) -> Self {
        self.exports[0].format = Some(format.into());
        self
    }

    pub fn read_only(mut self) -> Self {
        self.exports[0].read_only = true;
        self
    }

    pub fn name(mut self, name: &str) -> Self {
        self.exports[0].name = name.into();
        self
    }

    /// Further arguments of `nbd-img serve`.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.into()));
        self
    }

    /// What stands for them when the peer is qemu-nbd.
    pub fn qemu_args(mut self, args: &[&str]) -> Self {
        self.qemu_args.extend(args.iter().map(|&arg| arg.into()));
        self
    }

    /// Runs the server below another program (strace), which must execute it in its own process.
    pub fn wrapper(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(|&arg| arg.into()).collect();
        self
    }

    /// Starts the server in this folder. (QEMU looks for external data files there, not beside the image.)
    pub fn folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Drives this server whatever the run says: to compare the two.
    pub fn peer(mut self, peer: Peer) -> Self {
        self.peer = peer;
        self
    }

    /// Starts the server and returns when it accepts connections.
    #[track_caller]
    pub fn start(self) -> Server {
        match self.try_start() {
            Ok(server) => server,
            Err(failure) => panic!("the server ended with {}: {}", failure.status, failure.stderr),
        }
    }

    /// Starts the server, which must refuse; gives its status and what it said. Fails when it serves.
    #[track_caller]
    pub fn start_refused(mut self) -> Refusal {
        self.expect_failure = true;
        match self.try_start() {
            Ok(server) => panic!("this was to be refused, but is served at {}", server.uri("")),
            Err(refusal) => {
                assert!(!refusal.status.success(), "a refusal with status 0: {}", refusal.stderr);
                refusal
            }
        }
    }

    fn try_start(self) -> Result<Server, Refusal> {
        let folder = tempfile::Builder::new().prefix("nbd-img-test").tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let mut command = self.command(&socket);
        let mut child = command
            .current_dir(self.folder.as_deref().unwrap_or(Path::new(".")))
            .env_remove("LD_LIBRARY_PATH") // cargo's, of no use to what a user runs
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let stderr = collect(child.stderr.take().unwrap(), self.expect_failure);
        let stdout = collect(child.stdout.take().unwrap(), true);
        let mut server = Server { child, socket, stdout, stderr, peer: self.peer, _folder: folder };
        server.wait_until_ready().map(|()| server)
    }

    fn command(&self, socket: &Path) -> Command {
        let program = match self.peer {
            Peer::NbdImg => self.nbd_img(socket),
            Peer::QemuNbd if self.exports.len() == 1 => self.qemu_nbd(socket),
            Peer::QemuNbd => self.storage_daemon(socket),
        };
        let Some((wrapper, args)) = self.wrapper.split_first() else { return program };
        let mut command = tool(wrapper);
        command.args(args).arg(program.get_program()).args(program.get_args());
        command
    }

    fn nbd_img(&self, socket: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        command.arg("serve").arg("--socket").arg(socket).args(&self.args);
        if !self.args.iter().any(|arg| arg.starts_with("--drain-timeout")) {
            command.args(["--drain-timeout", DRAIN_TIME]);
        }
        if let [export] = self.exports.as_slice() {
            if let Some(format) = &export.format {
                command.args(["--format", format]);
            }
            if export.read_only {
                command.arg("--read-only");
            }
            if !export.name.is_empty() {
                command.args(["--export-name", &export.name]);
            }
            command.arg(&export.file);
            return command;
        }
        for export in &self.exports {
            let mut text = format!("name={},file={}", export.name, export.file.display());
            if let Some(format) = &export.format {
                text += &format!(",format={format}");
            }
            if export.read_only {
                text += ",read-only";
            }
            command.args(["--export", &text]);
        }
        command
    }

    fn qemu_nbd(&self, socket: &Path) -> Command {
        let export = &self.exports[0];
        let mut command = tool("qemu-nbd");
        // Many clients, for ever, and trims that reach the file, as nbd-img does it unless told otherwise.
        command
            .args(["--persistent", "--shared=0", "--discard=unmap", "--socket"])
            .arg(socket)
            .args(&self.qemu_args);
        if let Some(format) = &export.format {
            command.args(["--format", format.strip_prefix("mmap-").unwrap_or(format)]);
        }
        if export.read_only {
            command.arg("--read-only");
        }
        if !export.name.is_empty() {
            command.args(["--export-name", &export.name]);
        }
        command.arg(&export.file);
        command
    }

    fn storage_daemon(&self, socket: &Path) -> Command {
        let mut command = tool("qemu-storage-daemon");
        for (i, export) in self.exports.iter().enumerate() {
            let read_only = if export.read_only { "on" } else { "off" };
            command.arg("--blockdev").arg(format!(
                "driver=raw,node-name=disk{i},read-only={read_only},file.driver=file,file.filename={}",
                export.file.display()
            ));
        }
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        for (i, export) in self.exports.iter().enumerate() {
            let writable = if export.read_only { "off" } else { "on" };
            command.arg("--export").arg(format!(
                "type=nbd,id=export{i},node-name=disk{i},name={},writable={writable}",
                export.name
            ));
        }
        command
    }
}

/// A server that would not start.
#[derive(Debug)]
pub struct Refusal {
    pub status: ExitStatus,
    pub stderr: String,
}

/// A running server. Killed when it is dropped; a test that cares how it ends calls [`Server::stop`].
pub struct Server {
    child: Child,
    socket: PathBuf,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    peer: Peer,
    _folder: tempfile::TempDir,
}

impl Server {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The URI of an export over the Unix socket.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Where the server listens on TCP. It says so a moment after it has told of its Unix socket.
    #[track_caller]
    pub fn tcp_address(&self) -> SocketAddr {
        let uri = || Some(self.stdout().lines().find_map(|line| line.strip_prefix("nbd://"))?.to_owned());
        super::wait_until("a TCP URI", || uri().is_some());
        uri().unwrap().split('/').next().unwrap().parse().unwrap()
    }

    /// What the server wrote to its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.lock().unwrap().clone()
    }

    /// What the server logged so far.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Waits until the log says it: it comes by a pipe, a moment after what it tells of.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        super::wait_until(text, || self.stderr().contains(text));
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Fails when the server is gone.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the server is gone: {status}\n{}", self.stderr());
        }
    }

    /// Ends the server by SIGTERM and wants status 0 and a log without a panic.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait(END_PATIENCE);
        let log = self.stderr();
        assert!(status.success(), "on SIGTERM the server ended with {status}: {log}");
        assert!(!log.contains("panicked"), "a panic in the log: {log}");
        if self.peer == Peer::NbdImg {
            assert!(!self.socket.exists(), "the socket was left behind");
        }
    }

    /// Waits for the end.
    #[track_caller]
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        self.try_wait(patience)
            .unwrap_or_else(|| panic!("the server did not end within {patience:?}: {}", self.stderr()))
    }

    /// Waits for the end, up to `patience`.
    pub fn try_wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            if begin.elapsed() > patience {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// nbd-img says that it is ready by printing the URI; QEMU's programs say nothing, so a client has to try.
    #[track_caller]
    fn wait_until_ready(&mut self) -> Result<(), Refusal> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // The log has been read to its end when its reader has let go of it.
                while Arc::strong_count(&self.stderr) > 1 && begin.elapsed() < PATIENCE {
                    thread::sleep(Duration::from_millis(5));
                }
                return Err(Refusal { status, stderr: self.stderr() });
            }
            let ready = match self.peer {
                Peer::NbdImg => self.stdout().lines().any(|line| line.contains("+unix:")),
                Peer::QemuNbd => UnixStream::connect(&self.socket).is_ok(),
            };
            if ready {
                return Ok(());
            }
            assert!(begin.elapsed() < PATIENCE, "not ready after {PATIENCE:?}: {}", self.stderr());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already: then both fail, and that is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the log of the server:\n{}", self.stderr());
        }
    }
}

/// Reads a pipe to its end in a thread, so that the server never blocks on it.
fn collect(pipe: impl Read + Send + 'static, quiet: bool) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let sink = Arc::clone(&text);
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let line_text = String::from_utf8_lossy(&line);
            if !quiet && line_text.contains("panicked") {
                eprint!("{line_text}");
            }
            sink.lock().unwrap().push_str(&line_text);
            line.clear();
        }
    });
    text
}
