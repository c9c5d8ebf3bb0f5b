//! `nbd-img check`: the numbers and exit statuses of `qemu-img check`, for images of every kind, and repairs
//! that QEMU accepts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::images::{self, CASES};
use support::scratch;
use support::server::Serve;
use support::tools::{output, qemu_img, run, tool};

fn check(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.current_dir(folder).arg("check").args(args);
    command
}

/// Exit status and the answer in JSON.
fn json(folder: &Path, args: &[&str]) -> (i32, Value) {
    let output = output(check(folder, args).arg("--json"));
    let answer = serde_json::from_slice(&output.stdout);
    (output.status.code().unwrap(), answer.unwrap_or_else(|e| panic!("{args:?}: {e}: {output:?}")))
}

fn qemu_check(folder: &Path, image: &str) -> (i32, Value) {
    let output =
        output(tool("qemu-img").current_dir(folder).args(["check", "--output=json", "-f", "qcow2", image]));
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// Changes bytes of a file.
fn poke(file: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(file).unwrap().write_all_at(bytes, at).unwrap();
}

fn be64(file: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    fs::File::open(file).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// The keys whose numbers mean the same as QEMU's.
const KEYS: [&str; 8] = [
    "check-errors",
    "corruptions",
    "leaks",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
    "image-end-offset",
];

#[test]
fn images_of_every_kind_are_counted_as_qemu_does() {
    let folder = scratch("check");
    images::make_sources(folder.path());
    for case in CASES.iter().filter(|case| case.format == "qcow2") {
        let folder = images::make(case, folder.path());
        let folder = folder.as_path();
        let (status, ours) = json(folder, &["disk"]);
        let (expected, theirs) = qemu_check(folder, "disk");
        assert_eq!(status, expected, "{}: {ours}\n{theirs}", case.name);
        for key in KEYS {
            let theirs = theirs[key].as_u64().unwrap_or(0);
            assert_eq!(ours[key].as_u64(), Some(theirs), "{}: {key}: {ours}", case.name);
        }
        assert_eq!((&ours["filename"], &ours["format"]), (&"disk".into(), &"qcow2".into()));
    }
}

#[test]
fn statuses_tell_leaks_from_corruptions_and_repairs_help() {
    let folder = scratch("check");
    let image = folder.path().join("i");
    qemu_img(folder.path(), "create -q -f qcow2 i 8M");
    run(tool("qemu-io").current_dir(folder.path()).args(["-f", "qcow2", "-c", "write -q -P 7 0 1M", "i"]));
    assert_eq!(json(folder.path(), &["i"]).0, 0);
    let block = be64(&image, be64(&image, 48));
    let clusters = fs::metadata(&image).unwrap().len() / 65536;
    // One cluster more is counted than there is, and is there.
    OpenOptions::new().write(true).open(&image).unwrap().set_len((clusters + 1) * 65536).unwrap();
    poke(&image, block + 2 * clusters, &[0, 1]);
    let (status, answer) = json(folder.path(), &["i"]);
    assert_eq!((status, &answer["leaks"]), (3, &1.into()));
    // Reading it changes nothing, and the text names the flag that helps.
    let said = output(&mut check(folder.path(), &["i"]));
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(text.contains("--repair leaks") && text.contains("leaked"), "{text}");
    assert_eq!(qemu_check(folder.path(), "i").0, 3);
    let (status, answer) = json(folder.path(), &["i", "--repair", "leaks"]);
    assert_eq!((status, &answer["leaks-fixed"], &answer["leaks"]), (0, &1.into(), &0.into()));
    assert_eq!(qemu_check(folder.path(), "i").0, 0);
    // A cluster in use is counted as free.
    poke(&image, block + 2 * (clusters - 1), &[0, 0]);
    assert_eq!(json(folder.path(), &["i"]).0, 2);
    assert_eq!(json(folder.path(), &["i", "-r", "leaks"]).0, 2);
    let said = output(&mut check(folder.path(), &["-r", "all", "i"]));
    let text = String::from_utf8(said.stdout).unwrap();
    assert_eq!((said.status.code(), text.contains("repaired: 2 corruptions")), (Some(0), true), "{text}");
    assert_eq!(qemu_check(folder.path(), "i").0, 0);
    let read =
        run(tool("qemu-io").current_dir(folder.path()).args(["-f", "qcow2", "-c", "read -P 7 0 1M", "i"]));
    assert!(!String::from_utf8_lossy(&read).contains("failed"));
}

#[test]
fn what_cannot_be_checked_has_a_status_of_its_own() {
    let folder = scratch("check");
    qemu_img(folder.path(), "create -q -f raw r 1M");
    qemu_img(folder.path(), "create -q -f vmdk v 1M");
    qemu_img(folder.path(), "create -q -f qcow2 q 1M");
    let status = |args: &[&str]| {
        let said = output(&mut check(folder.path(), args));
        (said.status.code().unwrap(), String::from_utf8(said.stderr).unwrap())
    };
    assert_eq!(status(&["r"]).0, 63);
    assert_eq!(status(&["v"]).0, 63);
    // 2 would say that the image is damaged.
    for args in
        [&["q", "--what"][..], &[], &["missing"], &["--repair", "most", "q"], &["-r", "all", "-U", "q"]]
    {
        let (code, said) = status(args);
        assert_eq!(code, 1, "{args:?}: {said}");
        assert!(!said.is_empty());
    }
    poke(&folder.path().join("q"), 20, &[0, 0, 0, 99]);
    let (code, said) = status(&["q"]);
    assert_eq!((code, said.contains("nbd-img: q: ")), (1, true), "{said}");
}

#[test]
fn who_writes_the_image_is_respected() {
    let folder = scratch("check");
    qemu_img(folder.path(), "create -q -f qcow2 i 8M");
    let image = folder.path().join("i");
    let server = Serve::image(&image).start();
    for args in [&["i"][..], &["i", "-r", "leaks"]] {
        let said = output(&mut check(folder.path(), args));
        let text = String::from_utf8(said.stderr).unwrap();
        assert_eq!((said.status.code(), text.contains("lock")), (Some(1), true), "{text}");
    }
    assert_eq!(json(folder.path(), &["i", "--force-share"]).0, 0);
    server.stop();
    assert_eq!(json(folder.path(), &["i", "-r", "all"]).0, 0);
}
