//! qemu-nbd and nbd-img under its name, side by side: started with the same arguments, looked at from outside.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::tools::{run, tool};

/// Long enough for a busy machine; what has not happened by then will not happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Who answers to the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    QemuNbd,
    NbdImg,
}

/// Both of them, the model first.
pub const BOTH: [Program; 2] = [Program::QemuNbd, Program::NbdImg];

impl Program {
    /// It, under the name `qemu-nbd`.
    pub fn command(self) -> Command {
        let mut command = match self {
            Program::QemuNbd => tool("qemu-nbd"),
            Program::NbdImg => Command::new(env!("CARGO_BIN_EXE_nbd-img")),
        };
        command.arg0("qemu-nbd").env_remove("LD_LIBRARY_PATH").stdin(Stdio::null());
        command
    }

    /// A folder for PATH in which it has the name.
    pub fn folder(self, folder: &Path) -> PathBuf {
        let bin = folder.join(format!("bin-{self:?}"));
        std::fs::create_dir(&bin).unwrap();
        std::os::unix::fs::symlink(self.command().get_program(), bin.join("qemu-nbd")).unwrap();
        bin
    }

    /// Runs it to its end in `folder`; gives its status and what it wrote.
    #[track_caller]
    pub fn ends(self, folder: &Path, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = self.command();
        command.current_dir(folder).args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begin.elapsed() > PATIENCE {
                child.kill().unwrap();
                panic!("{self:?} {args:?} does not end");
            }
            thread::sleep(Duration::from_millis(2));
        }
        let out = child.wait_with_output().unwrap();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    }

    /// Starts a server in `folder` at a socket there, and returns when somebody listens.
    #[track_caller]
    pub fn serves(self, folder: &Path, args: &[&str]) -> Serving {
        let socket = folder.join(format!("{self:?}.sock"));
        let mut command = self.command();
        command.current_dir(folder).arg("--socket").arg(&socket).args(args);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut serving = Serving { child, socket };
        let begin = Instant::now();
        while UnixStream::connect(&serving.socket).is_err() {
            if let Some(status) = serving.child.try_wait().unwrap() {
                panic!("{self:?} {args:?} ended with {status}: {}", serving.stderr());
            }
            assert!(begin.elapsed() < PATIENCE, "{self:?} {args:?} does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        serving
    }
}

/// A server; killed when it is dropped.
pub struct Serving {
    child: Child,
    socket: PathBuf,
}

impl Serving {
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it by a signal.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(self.pid(), signal);
        self.wait()
    }

    /// What it wrote to stderr; to be called when it has ended.
    pub fn stderr(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Some(pipe) = self.child.stderr.as_mut() {
            std::io::Read::read_to_end(pipe, &mut bytes).unwrap();
        }
        text(&bytes)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended already, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of which only the number is known.
pub fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// What the real qemu-nbd lists of a server.
#[track_caller]
pub fn listed(socket: &Path) -> String {
    text(&run(tool("qemu-nbd").args(["--list", "--socket"]).arg(socket)))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
