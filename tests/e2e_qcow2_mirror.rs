//! A storage migration into an empty qcow2 export, and what comes after: the image goes over to QEMU, which gets it when
//! nbd-img has let go of it and not before.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::path::Path;

use serde_json::json;
use support::client::{Client, Wishes};
use support::qmp::{Monitor, machine};
use support::rng::Rng;
use support::server::Serve;
use support::tools::{output, qemu_img, qemu_io, tool};
use support::{assert_same, migration, qcow2};

/// The image as the disk of a virtual machine.
const DISK: [&str; 4] = [
    "-blockdev",
    "driver=qcow2,node-name=disk,file.driver=file,file.filename=target",
    "-device",
    "virtio-blk-pci,drive=disk,id=vda",
];

#[test]
fn mirror_in_the_background() {
    mirror("mirror-qcow2-background", "background", "");
}

#[test]
fn mirror_blocking_writes() {
    mirror("mirror-qcow2-write-blocking", "write-blocking", "-o cluster_size=4k");
}

fn mirror(test: &str, copy_mode: &str, options: &str) {
    let folder = support::scratch(test);
    let folder = folder.path();
    qemu_img(folder, &format!("create -f qcow2 {options} target {}", migration::DISK_LEN));
    let server = Serve::image(folder.join("target")).format("qcow2").start();
    let shadow = migration::mirror(folder, &server, Rng::new(test), copy_mode);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export after the move", &client.read_all(), &shadow);
    client.disconnect();
    assert_locked(folder);
    server.stop();
    // At once: whoever ends nbd-img and sees it end may go on without waiting.
    hand_over_to_a_machine(folder);
    qcow2::check_clean(folder, "target");
    let mut expected = shadow;
    expected[1 << 20..(1 << 20) + 65_536].fill(0x5a);
    assert_same("as QEMU reads it", &qcow2::content(folder, "target", None), &expected);
}

/// While nbd-img has the image, nobody else gets it for writing, nor for reading what is not consistent.
fn assert_locked(folder: &Path) {
    let mut attempts = [tool("qemu-io"), tool("qemu-img"), machine(&DISK)];
    attempts[0].args(["-f", "qcow2", "-c", "write 0 512", "target"]);
    attempts[1].args(["check", "-f", "qcow2", "target"]);
    for attempt in &mut attempts {
        let output = output(attempt.current_dir(folder));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("lock"), "{attempt:?}: {}\n{text}", output.status);
    }
}

fn hand_over_to_a_machine(folder: &Path) {
    let mut machine = Monitor::stopped_machine(folder, &DISK);
    // Its results go to the program's standard output; what it wrote is seen in the image.
    for command in ["write -P 0x5a 1M 64k", "flush"] {
        let line = format!("qemu-io -d vda/virtio-backend \"{command}\"");
        let said = machine.execute("human-monitor-command", &json!({ "command-line": line }));
        assert_eq!(said, "", "{command}");
    }
    // And now it is the machine that keeps others out.
    let refusal = Serve::image(folder.join("target")).format("qcow2").start_refused();
    assert!(refusal.stderr.contains("lock"), "{}", refusal.stderr);
    machine.quit();
}

/// The same with a backing file and an image that is handed back and forth: what one wrote the other reads.
#[test]
fn an_image_goes_back_and_forth() {
    let folder = support::scratch("back-and-forth");
    let folder = folder.path();
    qemu_img(folder, "create -f qcow2 base 16M");
    qemu_io(folder, "qcow2", "base", &["write -P 0x11 0 16M"]);
    qemu_img(folder, "create -f qcow2 -b base -F qcow2 -o cluster_size=8k disk");
    let mut expected = vec![0x11; 16 << 20];
    let mut rng = Rng::new("back-and-forth");
    for turn in 0..6_u8 {
        let at = usize::try_from(rng.below(15 << 20)).unwrap();
        let len = usize::try_from(rng.in_range(1..1 << 20)).unwrap();
        expected[at..at + len].fill(0x20 + turn);
        if turn % 2 == 0 {
            let server = Serve::image(folder.join("disk")).format("qcow2").start();
            let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
            client.write(at as u64, &expected[at..at + len]);
            assert_same("the export", &client.read_all(), &expected);
            client.disconnect();
            server.stop();
        } else {
            qemu_io(folder, "qcow2", "disk", &[&format!("write -P {} {at} {len}", 0x20 + turn)]);
        }
        qcow2::check_clean(folder, "disk");
    }
    assert_same("at the end", &qcow2::content(folder, "disk", None), &expected);
}
