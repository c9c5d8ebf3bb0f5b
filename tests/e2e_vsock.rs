//! vsock between a server and libnbd's tools, in a small virtual machine of libguestfs' making: the kernels of build
//! machines and containers rarely have both ends, but Debian's has the module vsock_loopback. It takes some 20 s.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use support::tools::{find, run, tool};

/// In the order of their dependencies.
const MODULES: [&str; 3] = ["vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"];

const DISK_LEN: u64 = 256 << 20;

/// What runs in the machine, with the programs' own folder as its root. The server's first line is its URI.
const SCRIPT: &str = r#"
export PATH=/bin:/usr/bin LD_LIBRARY_PATH=/lib64
serve() {
    : >/tmp/uri
    nbd-img serve -r --format raw /content -x disk --listen "$@" >/tmp/uri 2>/tmp/log &
    server=$!
}
# An emulated machine on a busy one takes its time, and the test's own limit is not here.
answered() { while [ ! -s /tmp/uri ] && kill -0 $server; do sleep 0.2; done; }
serve vsock:0
answered
uri=$(cat /tmp/uri)
echo "uri $uri"
port=${uri##*:}
port=${port%/disk}
nbdcopy "nbd+vsock://1:$port/disk" /tmp/copy && cmp /tmp/copy /content && echo "same"
nbdcopy "$uri" /tmp/copy && cmp /tmp/copy /content && echo "same by its own URI"
nbd-img serve -r --format raw /content --listen vsock:$port 2>&1
kill $server
wait $server
echo "status $?"
cat /tmp/log
serve vsock:1:4096
answered
cat /tmp/uri /tmp/log
nbdinfo --size nbd+vsock://1:4096/disk
kill $server
serve vsock:1:4097 --access read:cid=1
answered
nbdinfo --size nbd+vsock://1:4097/disk && echo "cid 1 is let in"
kill $server
serve vsock:1:4098 --access read:cid=3
answered
grep 4098 /tmp/uri && { nbdinfo --size nbd+vsock://1:4098/disk || echo "cid 1 is not cid 3"; }
nbdinfo --list nbd+vsock://1:4098 >/tmp/list && { grep export= /tmp/list || echo "and sees nothing"; }
kill $server
"#;

/// `programs` with their libraries, modules and shell, as a folder that can be a root.
fn fill(root: &Path, programs: &[PathBuf]) {
    for folder in ["bin", "dev", "proc", "tmp", "modules"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for program in programs {
        let copy = root.join("bin").join(program.file_name().unwrap());
        fs::copy(program, copy).unwrap();
        let listed = String::from_utf8(run(tool("ldd").arg(program))).unwrap();
        for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            let copy = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(library, copy).unwrap();
        }
    }
    // Which of the kernels will run is for supermin to say.
    for kernel in fs::read_dir("/lib/modules").unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(files) = fs::read_dir(kernel.join("kernel/net/vmw_vsock")) else { continue };
        let copies = root.join("modules").join(kernel.file_name().unwrap());
        fs::create_dir_all(&copies).unwrap();
        for file in files.map(|entry| entry.unwrap().path()) {
            // They may be compressed; the suffix does not matter to insmod, which looks inside.
            let name = file.file_name().unwrap().to_str().unwrap().split_once('.').unwrap().0.to_owned();
            fs::copy(&file, copies.join(name)).unwrap();
        }
    }
    fs::write(root.join("script"), SCRIPT).unwrap();
    let content: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 512 + i) as u8).collect();
    fs::write(root.join("content"), content).unwrap();
}

#[test]
fn libnbd_reads_over_vsock() {
    let folder = support::scratch("vsock");
    let (root, disk) = (folder.path().join("root"), folder.path().join("disk.img"));
    let mut programs = vec![PathBuf::from(env!("CARGO_BIN_EXE_nbd-img"))];
    programs.extend(
        ["sh", "nbdcopy", "nbdinfo", "cmp", "cat", "grep", "sleep"].map(|name| find(name).expect(name)),
    );
    fill(&root, &programs);
    File::create_new(&disk).unwrap().set_len(DISK_LEN).unwrap();
    run(tool("mke2fs").args(["-q", "-t", "ext2", "-d"]).arg(&root).arg(&disk));
    let insmod = MODULES.map(|module| format!("insmod /sysroot/modules/$(uname -r)/{module}; ")).concat();
    let command = format!(
        "{insmod} mount --bind /proc /sysroot/proc; mount --bind /dev /sysroot/dev; chroot /sysroot sh /script 2>&1"
    );
    let out = run(tool("guestfish")
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .args(["--format=raw", "-a"])
        .arg(&disk)
        .args(["-m", "/dev/sda", "debug", "sh", &command]));
    let text = String::from_utf8(out).unwrap();
    let said = |line: &str| assert!(text.lines().any(|said| said == line), "{line:?} is missing: {text}");
    assert!(text.contains("uri nbd+vsock://1:"), "{text}");
    said("same");
    said("same by its own URI");
    assert!(text.contains("another program listens on vsock port"), "{text}");
    assert!(text.contains("peer=vsock 1:"), "the log names the client: {text}");
    said("status 0");
    said("nbd+vsock://1:4096/disk");
    said("1048576");
    said("cid 1 is let in");
    said("cid 1 is not cid 3");
    said("and sees nothing");
}
