//! QEMU's image locks: every pair of openers ends as it does between two QEMUs, whichever of the two
//! is this crate and whichever came first.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use nbd_img_formats::ErrorKind;
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode, Storage};
use nbd_img_formats::sync::Arc;

/// Our mode, and the flags with which qemu-io opens an image in the same way.
const MODES: [(LockMode, &[&str]); 3] =
    [(LockMode::Writer, &[]), (LockMode::Reader, &["-r"]), (LockMode::ForceShare, &["-r", "-U"])];

fn tool(name: &str) -> Command {
    let found = Command::new(name).arg("--version").stdout(Stdio::null()).status();
    assert!(found.is_ok_and(|status| status.success()), "{name} is missing: install qemu-utils");
    Command::new(name)
}

fn image(folder: &Path, format: &str) -> std::path::PathBuf {
    let path = folder.join(format!("disk.{format}"));
    let made = tool("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg("1M").status();
    assert!(made.unwrap().success());
    path
}

fn open(path: &Path, lock: LockMode) -> nbd_img_formats::Result<Arc<FileStorage>> {
    FileStorage::open(path, &FileOptions { writable: lock == LockMode::Writer, direct: false, lock })
}

/// A qemu-io that has the image open until this is dropped.
struct QemuIo {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl QemuIo {
    fn hold(path: &Path, format: &str, flags: &[&str]) -> QemuIo {
        let mut child = tool("qemu-io")
            .args(["-f", format])
            .args(flags)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // It answers only when it has opened the image.
        writeln!(stdin, "length").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains('1'), "qemu-io could not open the image");
        QemuIo { child, stdin: Some(stdin) }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// Whether qemu-io can open the image now. Anything but a lock that is in the way fails the test.
fn qemu_can_open(path: &Path, format: &str, flags: &[&str]) -> bool {
    let output =
        tool("qemu-io").args(["-f", format]).args(flags).args(["-c", "length"]).arg(path).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || errors.contains("lock"), "{errors}");
    output.status.success()
}

fn we_can_open(path: &Path, lock: LockMode) -> bool {
    match open(path, lock) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
            false
        }
    }
}

#[test]
fn every_pair_ends_as_between_two_qemus() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "qcow2");
    let mut refused = 0;
    for (held, held_flags) in MODES {
        for (wanted, wanted_flags) in MODES {
            let holder = QemuIo::hold(&path, "qcow2", held_flags);
            let expected = qemu_can_open(&path, "qcow2", wanted_flags);
            assert_eq!(we_can_open(&path, wanted), expected, "QEMU {held:?}, then we {wanted:?}");
            drop(holder);
            let holder = open(&path, held).unwrap();
            let got = qemu_can_open(&path, "qcow2", wanted_flags);
            assert_eq!(got, expected, "we {held:?}, then QEMU {wanted:?}");
            assert_eq!(we_can_open(&path, wanted), expected, "we {held:?}, then we {wanted:?}");
            holder.close().unwrap();
            assert!(we_can_open(&path, LockMode::Writer), "closing must let the locks go");
            refused += u32::from(!expected);
        }
    }
    // Writer against writer and reader, both ways: else nothing has been tested.
    assert_eq!(refused, 3);
}

#[test]
fn raw_images_are_locked_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "raw");
    let holder = open(&path, LockMode::Writer).unwrap();
    assert!(!qemu_can_open(&path, "raw", &[]));
    let mut dd = tool("qemu-img");
    let copied = dd.args(["resize", "-q", "-f", "raw"]).arg(&path).arg("2M").output().unwrap();
    assert!(!copied.status.success(), "a resize under a writer must be refused");
    drop(holder);
    let _holder = QemuIo::hold(&path, "raw", &[]);
    assert!(!we_can_open(&path, LockMode::Writer));
    assert!(!we_can_open(&path, LockMode::Reader));
    assert!(we_can_open(&path, LockMode::ForceShare));
}

#[test]
fn locks_are_of_the_file_whatever_its_name_and_go_with_the_last_user() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "raw");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let holder = open(&path, LockMode::Writer).unwrap();
    assert!(!we_can_open(&link, LockMode::Reader));
    drop(holder);
    assert!(we_can_open(&link, LockMode::Writer));
}

/// What a refusal says. Who looks for the holder gives up after a moment, so on a busy machine not each names it.
fn refusal(path: &Path, lock: LockMode, holder: &str) -> String {
    for _ in 0..30 {
        let text = open(path, lock).err().unwrap().to_string();
        if text.contains(holder) {
            return text;
        }
    }
    open(path, lock).err().unwrap().to_string()
}

#[test]
fn a_refusal_names_the_holder_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "qcow2");
    let holder = QemuIo::hold(&path, "qcow2", &[]);
    let pid = holder.child.id().to_string();
    let text = refusal(&path, LockMode::Reader, &pid);
    for expected in ["lock", "--force-share", "qemu-io", &pid, "disk.qcow2"] {
        assert!(text.contains(expected), "{expected} is not in: {text}");
    }
    let text = open(&path, LockMode::Writer).err().unwrap().to_string();
    assert!(text.contains("Failed to get \"write\" lock") && !text.contains("--force-share"), "{text}");
}

#[test]
fn a_lock_of_the_whole_file_is_in_the_way_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "raw");
    let other = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    rustix::fs::fcntl_lock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    // A plain record lock goes when its process closes any descriptor of the file: only one try.
    let error = open(&path, LockMode::Reader).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
}

/// A process that another thread has forked has the descriptor, too, until it starts its program.
#[test]
fn locks_go_with_the_storage_whoever_else_has_the_description() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), "raw");
    let storage = open(&path, LockMode::Writer).unwrap();
    let own =
        rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).unwrap();
    let is_image =
        |number: &String| std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok_and(|to| to == path);
    let numbers =
        std::fs::read_dir("/proc/self/fd").unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let numbers: Vec<_> = numbers.filter(is_image).map(|number| number.parse().unwrap()).collect();
    assert!(!numbers.is_empty());
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let others: Vec<_> =
        numbers.into_iter().map(|n| rustix::process::pidfd_getfd(&own, n, flags).unwrap()).collect();
    assert_eq!(open(&path, LockMode::Writer).err().map(|e| e.kind()), Some(ErrorKind::Locked));
    drop(storage);
    open(&path, LockMode::Writer).unwrap();
    drop(others);
}
