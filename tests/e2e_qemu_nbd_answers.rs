//! What the callers of qemu-nbd look at in its answers, on both programs: how reads tell holes, what the allocation says
//! of zeroes, what a layer of a disk is when it was restored by itself, what is printed while it serves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use support::front::{BOTH, Program, text};
use support::scratch;
use support::tools::{output, python_nbd, qemu_img, qemu_io, run, tool};

/// Prints the chunks of a read of all of the disk.
const CHUNKS: &str = "
import sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
def chunk(buf, offset, kind, error):
    print(offset, len(buf), kind == nbd.READ_HOLE)
h.pread_structured(h.get_size(), 0, chunk)
";

fn serves_and(program: Program, folder: &Path, line: &[&str], look: impl Fn(&str) -> String) -> String {
    let mut serving = program.serves(folder, line);
    let seen = look(&serving.uri(""));
    assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
    seen
}

/// In the first read of a disk no table of it is in memory, nor of what lies below; in the last it is longer than what leaves
/// at once.
#[test]
fn holes_are_told_when_nothing_is_in_memory_yet() {
    for len in [192 << 10, 24 << 20] {
        let folder = scratch("answers-cold");
        qemu_img(folder.path(), &format!("create -q -f qcow2 base.qcow2 {len}"));
        qemu_io(folder.path(), "qcow2", "base.qcow2", &["write -P 1 0 64k"]);
        qemu_img(folder.path(), "create -q -f qcow2 -F qcow2 -b base.qcow2 disk.qcow2");
        qemu_io(folder.path(), "qcow2", "disk.qcow2", &["write -P 2 128k 4k"]);
        let [real, ours] = BOTH.map(|program| {
            serves_and(program, folder.path(), &["-r", "-f", "qcow2", "disk.qcow2"], |uri| {
                text(&run(python_nbd(&format!("import nbd\n{CHUNKS}")).arg(uri)))
            })
        });
        let holes = |chunks: &str| -> Vec<(u64, u64)> {
            let hole = |line: &str| {
                let [offset, len, "True"] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
                Some((offset.parse().unwrap(), len.parse().unwrap()))
            };
            chunks.lines().filter_map(hole).collect()
        };
        assert_eq!(holes(&ours), holes(&real), "{len}");
        assert!(!holes(&ours).is_empty(), "{ours}");
    }
}

/// libnbd's tests read an image of the smallest clusters, one of which is a hole.
#[test]
fn a_hole_of_512_bytes() {
    let folder = scratch("answers-hole");
    qemu_img(folder.path(), "create -q -f qcow2 -o cluster_size=512 disk.qcow2 3k");
    qemu_io(folder.path(), "qcow2", "disk.qcow2", &["write -P 1 0 3k", "write -zu 2k 512"]);
    let [real, ours] = BOTH.map(|program| {
        serves_and(program, folder.path(), &["-f", "qcow2", "disk.qcow2"], |uri| {
            let script = format!("import nbd\n{CHUNKS}");
            text(&run(python_nbd(&script).arg(uri)))
        })
    });
    assert_eq!(ours, real);
    assert_eq!(ours, "0 2048 False\n2048 512 True\n2560 512 False\n");
}

/// oVirt imageio tells zeroes that were written from what was never written by the allocation depth.
#[test]
fn zeroes_show_in_the_allocation_depth() {
    let ways = [
        (&["--discard=unmap"][..], "write -zu 64k 128k"),
        (&["--discard=unmap", "--detect-zeroes=unmap"], "write -P 0 64k 128k"),
        (&["--detect-zeroes=on"], "write -P 0 64k 128k"),
        (&["--discard=unmap"], "write -z 64k 128k"),
    ];
    for options in ["cluster_size=64k", "extended_l2=on", "cluster_size=4k"] {
        for (args, command) in ways {
            let [real, ours] = BOTH.map(|program| {
                let folder = scratch("answers-depth");
                qemu_img(folder.path(), &format!("create -q -f qcow2 -o {options} disk.qcow2 1M"));
                let line = [args, &["-t", "-A", "-f", "qcow2", "disk.qcow2"]].concat();
                serves_and(program, folder.path(), &line, |uri| {
                    run(tool("qemu-io").args(["-f", "raw", "-c", command, uri]));
                    text(&run(tool("nbdinfo").args(["--map=qemu:allocation-depth", uri])))
                })
            });
            assert_eq!(ours, real, "{options} {args:?} {command}");
            assert!(ours.lines().any(|line| line.ends_with("local")), "{ours}");
        }
    }
}

/// oVirt imageio and vdsm write the layers of a disk one by one, each with `"backing": null`. What is zeroes in one of
/// them has to hide what the layer below has. (In images of version 2 QEMU loses it.)
#[test]
fn a_layer_that_is_restored_by_itself() {
    let image =
        r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}, "backing": null}"#;
    for options in ["cluster_size=64k", "extended_l2=on", "compat=0.10"] {
        for program in BOTH {
            if program == Program::QemuNbd && options == "compat=0.10" {
                continue;
            }
            let folder = scratch("answers-layer");
            fs::write(folder.path().join("base.raw"), vec![7; 1 << 20]).unwrap();
            qemu_img(folder.path(), &format!("create -q -f qcow2 -o {options} -b base.raw -F raw top.qcow2"));
            let line =
                ["-t", "--shared=8", "--cache=none", "--discard=unmap", "--detect-zeroes=unmap", image];
            serves_and(program, folder.path(), &line, |uri| {
                for command in [
                    "write -zu 64k 64k",
                    "write -P 0 128k 64k",
                    "write -zu 200k 5k",
                    "write -P 5 256k 64k",
                    "write -zu 256k 64k",
                ] {
                    run(tool("qemu-io").args(["-f", "raw", "-c", command, uri]));
                }
                String::new()
            });
            let checks = ["read -P 7 0 64k", "read -P 0 64k 128k", "read -P 0 200k 5k", "read -P 0 256k 64k"];
            for check in checks.iter().chain(&["read -P 7 512k 512k"]) {
                let args = ["-f", "qcow2", "-c", check, "top.qcow2"];
                let read = output(tool("qemu-io").current_dir(folder.path()).args(args));
                assert!(read.status.success(), "{program:?} {options}: {}", text(&read.stdout));
            }
            qemu_img(folder.path(), "check -q -f qcow2 top.qcow2");
        }
    }
}

/// QEMU's own tests give `-v` and compare what is printed; the log is for those who ask by `-T`.
#[test]
fn nothing_is_printed_while_it_serves() {
    let folder = scratch("answers-quiet");
    qemu_img(folder.path(), "create -q -f raw disk.raw 1M");
    for program in BOTH {
        let mut serving = program.serves(folder.path(), &["-v", "-t", "-f", "raw", "disk.raw"]);
        run(tool("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &serving.uri("")]));
        assert_eq!(serving.end(Signal::TERM).code(), Some(0), "{program:?}");
        assert_eq!(serving.stderr(), "", "{program:?}");
    }
    let line = ["-T", "nbd_*", "-t", "-f", "raw", "disk.raw"];
    let mut serving = Program::NbdImg.serves(folder.path(), &line);
    run(tool("nbdinfo").args(["--size", &serving.uri("")]));
    assert_eq!(serving.end(Signal::TERM).code(), Some(0));
    assert!(serving.stderr().contains("connection opened"), "{}", serving.stderr());
}
