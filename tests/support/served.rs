//! [`Served`]: a server with a control socket.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::client::{Client, Wishes};
use super::server::{Serve, Server};
use super::tools::{output, run, tool};
use super::wait_until;

/// A server that can be told something.
pub struct Served {
    pub server: Server,
    pub control: PathBuf,
}

impl Served {
    pub fn start(serve: Serve, folder: &Path) -> Served {
        let control = folder.join("control");
        Served { server: serve.args(&["--control", control.to_str().unwrap()]).start(), control }
    }

    pub fn resize(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        output(command.args(["resize", "--control"]).arg(&self.control).args(args))
    }

    /// When the server has seen that others are gone.
    #[track_caller]
    pub fn resized_in_time(&self, args: &[&str]) {
        wait_until("a resize", || self.resize(args).status.success());
    }

    #[track_caller]
    pub fn resized(&self, args: &[&str]) -> String {
        let output = self.resize(args);
        assert!(output.status.success(), "resize {args:?}: {output:?}\n{}", self.server.stderr());
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub fn refused(&self, args: &[&str], hint: &str) {
        let output = self.resize(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "resize {args:?}: {output:?}");
        assert!(said.contains(hint), "resize {args:?}: {said}");
    }

    pub fn connect(&self) -> Client {
        Client::unix(self.server.socket(), "", Wishes::STRUCTURED)
    }

    /// What a client is told that comes now.
    pub fn size(&self) -> u64 {
        let said = run(tool("nbdinfo").args(["--size", &self.server.uri("")]));
        String::from_utf8(said).unwrap().trim().parse().unwrap()
    }
}
