//! The programs of others that the tests run. A missing one fails the test and names its Debian package: a test that is
//! skipped proves nothing.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Program and Debian package.
const PACKAGES: [(&str, &str); 27] = [
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbd-client", "nbd-client"),
    ("fio", "fio"),
    ("sh", "dash"),
    ("ldd", "libc-bin"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
    ("strace", "strace"),
    ("guestfish", "guestfish"),
    ("fusermount3", "fuse3"),
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("openssl", "openssl"),
    ("certtool", "gnutls-bin"),
    ("gnutls-cli", "gnutls-bin"),
    ("psktool", "gnutls-bin"),
    ("setpriv", "util-linux"),
    ("/usr/bin/python3", "python3"),
];

/// A command for `program`, which is one of the list above.
#[track_caller]
pub fn tool(program: &str) -> Command {
    let Some((_, package)) = PACKAGES.iter().find(|(name, _)| *name == program) else {
        panic!("{program} is not in the list of tests/support/tools.rs")
    };
    match find(program) {
        Some(path) => Command::new(path),
        None => panic!("{program} is missing: install the Debian package {package}, or run tests/setup"),
    }
}

/// Debian's own Python with libnbd's module: another Python first in PATH does not have it.
#[track_caller]
pub fn python_nbd(script: &str) -> Command {
    let mut probe = tool("/usr/bin/python3");
    let found = probe.args(["-c", "import nbd"]).output().unwrap().status.success();
    assert!(
        found,
        "Python's module nbd is missing: install the Debian package python3-libnbd, or run tests/setup"
    );
    let mut command = tool("/usr/bin/python3");
    command.args(["-c", script]);
    command
}

/// Runs a command to its end and wants status 0; gives its standard output.
#[track_caller]
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Runs a command to its end, however it ends.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// `qemu-img` in `folder` with arguments split at blanks.
#[track_caller]
pub fn qemu_img(folder: &Path, args: &str) -> Vec<u8> {
    run(tool("qemu-img").current_dir(folder).args(args.split_whitespace()))
}

/// `qemu-io` in `folder` on `image`, one argument for each of its commands.
#[track_caller]
pub fn qemu_io(folder: &Path, format: &str, image: &str, commands: &[&str]) {
    let mut command = tool("qemu-io");
    command.current_dir(folder).args(["-f", format]);
    for text in commands {
        command.args(["-c", text]);
    }
    let out = run(command.arg(image));
    let text = String::from_utf8_lossy(&out);
    assert!(!text.contains("failed"), "qemu-io {commands:?} on {image}: {text}");
}

/// Where a program is.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.starts_with('/') {
        return Path::new(program).exists().then(|| program.into());
    }
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(AsRef::<OsStr>::as_ref(&path)).chain(sbin);
    folders.find_map(|folder| Some(folder.join(program)).filter(|file| file.is_file()))
}
