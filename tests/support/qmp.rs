//! QEMU's programs that a test drives over QMP (one JSON object a line on a Unix socket).

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::tools::tool;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running program of QEMU's; killed when it is dropped.
pub struct Monitor {
    child: Child,
    commands: UnixStream,
    answers: BufReader<UnixStream>,
    events: Vec<Value>,
    commands_sent: u64,
}

impl Monitor {
    /// A qemu-storage-daemon in `folder`.
    pub fn storage_daemon(folder: &Path, args: &[&str]) -> Self {
        let mut command = tool("qemu-storage-daemon");
        command.args(args).args(["--chardev", "socket,id=qmp,path=qmp.sock", "--monitor", "chardev=qmp"]);
        Self::start(folder, &mut command)
    }

    /// A virtual machine in `folder` that is stopped before its first instruction, without any device but those of
    /// `args`.
    pub fn stopped_machine(folder: &Path, args: &[&str]) -> Self {
        Self::start(folder, machine(args).args(["-qmp", "unix:qmp.sock"]))
    }

    /// The program connects to the test, never the other way round: QEMU sets its monitor up in one thread while
    /// another one may accept already, and who comes in between is greeted twice, or not heard at all.
    fn start(folder: &Path, command: &mut Command) -> Self {
        let socket = folder.join("qmp.sock");
        let _ = fs::remove_file(&socket); // of an earlier one
        let listener = UnixListener::bind(&socket).unwrap();
        let mut child =
            command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let commands = accept(&listener, &mut child);
        commands.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(commands.try_clone().unwrap());
        let mut monitor = Self { child, commands, answers, events: Vec::new(), commands_sent: 0 };
        assert!(monitor.line().get("QMP").is_some());
        monitor.execute("qmp_capabilities", &json!({}));
        monitor
    }

    /// Has it end in its own way, with status 0.
    #[track_caller]
    pub fn quit(mut self) {
        self.execute("quit", &json!({}));
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Runs a command and gives what it returns; a failure fails the test.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        self.commands_sent += 1;
        let id = self.commands_sent;
        let text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        self.commands.write_all(text.as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_some() {
                self.events.push(line);
                continue;
            }
            assert_eq!(line["id"], id, "{command}: {line}");
            assert!(line.get("error").is_none(), "{command} {arguments}: {line}");
            return line["return"].clone();
        }
    }

    /// Waits for an event and gives its data.
    #[track_caller]
    pub fn wait_for(&mut self, event: &str) -> Value {
        let begin = Instant::now();
        loop {
            if let Some(at) = self.events.iter().position(|line| line["event"] == event) {
                return self.events.remove(at)["data"].clone();
            }
            assert!(begin.elapsed() < PATIENCE, "no {event}, but {:?}", self.events);
            let line = self.line();
            self.events.push(line);
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let len =
            self.answers.read_line(&mut line).unwrap_or_else(|e| panic!("{e}; events {:?}", self.events));
        assert!(len > 0, "the program is gone");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `qemu-system-x86_64` that runs nothing.
pub fn machine(args: &[&str]) -> Command {
    let mut command = tool("qemu-system-x86_64");
    command
        .args(["-S", "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-m", "32"])
        .args(args);
    command
}

fn accept(listener: &UnixListener, child: &mut Child) -> UnixStream {
    let begin = Instant::now();
    listener.set_nonblocking(true).unwrap();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                return stream;
            }
            Err(e) => {
                assert!(e.kind() == ErrorKind::WouldBlock && begin.elapsed() < PATIENCE, "no monitor: {e}");
            }
        }
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the program ended with {status}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
