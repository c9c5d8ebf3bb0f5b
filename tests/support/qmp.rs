//! A qemu-storage-daemon that a test drives over QMP (one JSON object a line on a Unix socket).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::tools::tool;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running qemu-storage-daemon; killed when it is dropped.
pub struct StorageDaemon {
    child: Child,
    commands: UnixStream,
    answers: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl StorageDaemon {
    /// Starts it in `folder` with `args` and a monitor.
    pub fn start(folder: &Path, args: &[String]) -> Self {
        let socket = folder.join("qmp.sock");
        let child = tool("qemu-storage-daemon")
            .current_dir(folder)
            .args(args)
            .arg("--chardev")
            .arg(format!("socket,id=qmp,server=on,wait=off,path={}", socket.display()))
            .args(["--monitor", "chardev=qmp"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let commands = connect(&socket);
        commands.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(commands.try_clone().unwrap());
        let mut daemon = Self { child, commands, answers, events: Vec::new() };
        assert!(daemon.line().get("QMP").is_some());
        daemon.execute("qmp_capabilities", &json!({}));
        daemon
    }

    /// Runs a command and gives what it returns; a failure fails the test.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.commands.write_all(text.as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_some() {
                self.events.push(line);
                continue;
            }
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
        assert!(len > 0, "qemu-storage-daemon is gone");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(socket: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(e) => assert!(begin.elapsed() < PATIENCE, "{}: {e}", socket.display()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}
