//! qcow2 on a block device of the kernel: a fixed length, stale bytes everywhere, and an end that is ENOSPC.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::Serve;
use support::tools::{output, qemu_img, run, tool};
use support::wire::{command, errno};
use support::{assert_same, scratch};

const DEVICE_LEN: usize = 8 << 20;
/// More than fits on the device.
const DISK_LEN: usize = 12 << 20;
const STALE: u8 = 0xee;
const PIECE_LEN: usize = 24 << 10;

/// A loop device over a file that is full of stale bytes; let go of when it is dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn over(file: &Path) -> Self {
        fs::write(file, vec![STALE; DEVICE_LEN]).unwrap();
        let output = output(tool("losetup").args(["--find", "--show"]).arg(file));
        assert!(output.status.success(), "this test needs root and a kernel with loop devices: {output:?}");
        LoopDevice(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = output(tool("losetup").arg("--detach").arg(&self.0));
    }
}

#[test]
fn a_device_is_filled_to_its_end_and_stays_sound() {
    for (cache, options) in [
        ("writeback", "cluster_size=64k"),
        ("none", "cluster_size=4k,refcount_bits=1"),
        ("writethrough", "cluster_size=512"),
    ] {
        filled_to_its_end(cache, options);
    }
}

fn filled_to_its_end(cache: &str, options: &str) {
    let folder = scratch("device");
    let folder = folder.path();
    let device = LoopDevice::over(&folder.join("backing"));
    let path = device.0.to_str().unwrap();
    qemu_img(folder, &format!("create -q -f qcow2 -o {options} {path} {DISK_LEN}"));
    let mut shadow = vec![0; DISK_LEN];
    let mut rng = Rng::fixed(11);
    let server = Serve::image(&device.0).format("qcow2").args(&["--cache", cache]).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let mut write = |client: &mut Client, at: usize, shadow: &mut Vec<u8>| {
        let data = rng.bytes(PIECE_LEN);
        let reply = client.ask(Request::new(command::WRITE, at as u64, PIECE_LEN), &data);
        if reply.error == 0 {
            shadow[at..at + PIECE_LEN].copy_from_slice(&data);
        }
        reply.error
    };

    // In pieces with gaps between them, where stale bytes would come to light.
    let places: Vec<usize> = (0..DISK_LEN / PIECE_LEN).map(|index| index * PIECE_LEN).collect();
    let mut full = None;
    for at in places.iter().step_by(2).chain(places.iter().skip(1).step_by(2)) {
        match write(&mut client, *at, &mut shadow) {
            0 => {}
            error => {
                assert_eq!(error, errno::ENOSPC, "{cache} {options}");
                full = Some(*at);
                break;
            }
        }
    }
    let full = full.expect("all of it went onto a device that is smaller");
    client.flush();
    // What a failed write covered is old, new or a mixture; the rest is as it was.
    let failed = client.read(full as u64, PIECE_LEN);
    shadow[full..full + PIECE_LEN].copy_from_slice(&failed);
    assert_same("the full disk", &client.read_all(), &shadow);

    // Room again: half of what was written is given up, and what is written then goes there.
    let given_up = DISK_LEN / 2;
    assert_eq!(client.ask(Request::new(command::TRIM, 0, given_up), &[]).error, 0);
    client.flush();
    shadow[..given_up].fill(0);
    assert_same("what was given up", &client.read(0, given_up), &shadow[..given_up]);
    assert_eq!(write(&mut client, full, &mut shadow), 0, "{cache} {options}: there is room again");
    assert_eq!(write(&mut client, PIECE_LEN, &mut shadow), 0, "{cache} {options}: there is room again");
    assert_same("the disk with room", &client.read_all(), &shadow);
    client.flush();
    client.disconnect();
    server.stop();

    run(tool("qemu-img").args(["check", "-q", "-f", "qcow2", path]));
    qemu_img(folder, &format!("convert -f qcow2 -O raw {path} found"));
    assert_same("what QEMU finds", &fs::read(folder.join("found")).unwrap(), &shadow);
}
