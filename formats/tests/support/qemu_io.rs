//! A qemu-io that stays, for tests that need it thousands of times: a process for each command is what
//! such tests would spend their time on.
//!
//! It is told one command at a time and answers each with its prompt; more than one at a time would stay
//! in its buffer.

use std::io::{PipeReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::maker::text;

const PROMPT: &[u8] = b"qemu-io> ";

/// A running qemu-io; it ends with this value.
pub struct QemuIo {
    child: Child,
    /// What it says, errors included.
    says: PipeReader,
}

impl QemuIo {
    /// One without an image.
    pub fn start() -> Self {
        let (says, its) = std::io::pipe().unwrap();
        let child = Command::new("qemu-io")
            .args(["-d", "unmap"])
            .stdin(Stdio::piped())
            .stdout(its.try_clone().unwrap())
            .stderr(its)
            .spawn();
        let child = child.unwrap_or_else(|e| {
            panic!("qemu-io cannot be run ({e}); it is in the Debian package qemu-utils")
        });
        let mut qemu = QemuIo { child, says };
        assert_eq!(qemu.answer(), "");
        qemu
    }

    /// Opens an image for writing; `backing` is a raw file that counts instead of what the image names, and so
    /// is `data` for its data file.
    pub fn open_qcow2(&mut self, path: &Path, backing: Option<&Path>, data: Option<&Path>) {
        let file = "driver=qcow2,discard=unmap,file.driver=file,file.filename";
        let mut command = format!("open -o {file}={}", text(path));
        if let Some(backing) = backing {
            command += &format!(
                ",backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
                text(backing)
            );
        }
        if let Some(data) = data {
            command += &format!(",data-file.driver=file,data-file.filename={}", text(data));
        }
        let said = self.command(&command);
        assert_eq!(said, "", "{command}");
    }

    /// Carries one command out; returns what it says.
    pub fn command(&mut self, command: &str) -> String {
        let line = format!("{command}\n");
        self.child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        self.answer()
    }

    /// What the guest reads.
    pub fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let said = self.command(&format!("read -v {at} {len}"));
        let bytes: Vec<u8> = said.lines().filter_map(dumped).flatten().collect();
        assert_eq!(bytes.len(), len, "qemu-io: read {at} {len}: {:.400}", said);
        bytes
    }

    fn answer(&mut self) -> String {
        let (mut said, mut buf) = (Vec::new(), [0; 1 << 16]);
        while !said.ends_with(PROMPT) {
            let len = self.says.read(&mut buf).unwrap();
            assert!(len > 0, "qemu-io has ended: {}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&buf[..len]);
        }
        said.truncate(said.len() - PROMPT.len());
        String::from_utf8_lossy(&said).into_owned()
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes of a line of a dump: `00000010:  5a 5a ... 5a  ZZ...Z`.
fn dumped(line: &str) -> Option<Vec<u8>> {
    let (at, rest) = line.split_once(":  ")?;
    u64::from_str_radix(at, 16).ok()?;
    // At most 16 of them, then two blanks and the same as text.
    let hex = rest.split("  ").next()?;
    hex.split(' ').take(16).map(|byte| u8::from_str_radix(byte, 16).ok()).collect()
}
