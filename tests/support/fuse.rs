//! A file whose reads take their time: nbdfuse mounts an nbdkit server that sleeps before each read.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::tools::{output, tool};

/// A mounted file of `len` bytes; unmounted when it is dropped.
pub struct SlowFile {
    child: Child,
    folder: tempfile::TempDir,
}

impl SlowFile {
    /// Its content is nbdkit's pattern: each 8 bytes hold their own offset, big-endian.
    pub fn mount(len: u64, read_delay: Duration) -> Self {
        assert!(
            Path::new("/dev/fuse").exists(),
            "/dev/fuse is missing: load the module fuse; in a container pass --device /dev/fuse --cap-add SYS_ADMIN"
        );
        let _ = (tool("nbdkit"), tool("fusermount3")); // both run below nbdfuse
        let folder = tempfile::Builder::new().prefix("nbd-img-fuse").tempdir().unwrap();
        let child = tool("nbdfuse")
            .arg(folder.path().join("disk"))
            .args(["[", "nbdkit", "--exit-with-parent", "--filter=delay", "pattern"])
            .args([format!("size={len}"), format!("rdelay={}ms", read_delay.as_millis()), "]".into()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut slow = Self { child, folder };
        let begin = Instant::now();
        while !slow.path().exists() {
            assert!(slow.child.try_wait().unwrap().is_none(), "nbdfuse ended: is mounting allowed here?");
            assert!(begin.elapsed() < Duration::from_secs(20), "nbdfuse does not mount");
            thread::sleep(Duration::from_millis(10));
        }
        slow
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        // Lazily, because reads may be under way still; then nobody can reach it and nbdfuse may go.
        let unmount = output(tool("fusermount3").args(["-u", "-z"]).arg(self.folder.path()));
        if !unmount.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&unmount.stderr));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
