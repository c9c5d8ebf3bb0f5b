//! `nbd-img info`: the same facts as QEMU's, for people and in JSON.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::tools::{output, qemu_img, run};
use support::{scratch, testdata};

fn info(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.current_dir(folder).arg("info").args(args);
    command
}

fn json(folder: &Path, image: &str) -> Value {
    serde_json::from_slice(&run(&mut info(folder, &["--json", image]))).unwrap()
}

#[test]
fn json_says_what_qemu_says() {
    let folder = scratch("info");
    for (name, create) in [
        ("plain", "create -q -f qcow2 NAME 10M"),
        ("small", "create -q -f qcow2 -o cluster_size=512,refcount_bits=1 NAME 3M"),
        ("old", "create -q -f qcow2 -o compat=0.10 NAME 1G"),
        ("zstd", "create -q -f qcow2 -o compression_type=zstd,cluster_size=2M NAME 5000K"),
        ("extended", "create -q -f qcow2 -o extended_l2=on NAME 64M"),
        ("lazy", "create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64 NAME 64M"),
        ("raw", "create -q -f raw NAME 1000K"),
    ] {
        qemu_img(folder.path(), &create.replace("NAME", name));
        let ours = json(folder.path(), name);
        let theirs: Value =
            serde_json::from_slice(&qemu_img(folder.path(), &format!("info --output=json {name}"))).unwrap();
        assert_eq!(ours["format"], theirs["format"], "{name}");
        assert_eq!(ours["virtual_size"], theirs["virtual-size"], "{name}");
        assert_eq!(ours["allocated_len"], theirs["actual-size"], "{name}");
        if name == "raw" {
            assert!(ours.get("cluster_len").is_none());
            continue;
        }
        let specific = &theirs["format-specific"]["data"];
        assert_eq!(ours["cluster_len"], theirs["cluster-size"], "{name}");
        assert_eq!(ours["refcount_bits"], specific["refcount-bits"], "{name}");
        assert_eq!(ours["compression"], specific["compression-type"], "{name}");
        assert_eq!(ours["version"], if specific["compat"] == "0.10" { 2 } else { 3 }, "{name}");
    }
}

#[test]
fn snapshots_bitmaps_and_chain_are_listed() {
    let folder = scratch("info");
    qemu_img(folder.path(), "create -q -f qcow2 base 8M");
    qemu_img(folder.path(), "create -q -f qcow2 -b base -F qcow2 top 16M");
    qemu_img(folder.path(), "snapshot -c first top");
    qemu_img(folder.path(), "bitmap --add -g 128K top marks");
    let top = json(folder.path(), "top");
    assert_eq!(top["backing_name"], "base");
    assert_eq!(top["chain"][0]["virtual_size"], 8 << 20);
    assert_eq!((&top["snapshots"][0]["name"], &top["snapshots"][0]["id"]), (&"first".into(), &"1".into()));
    assert_eq!(
        (&top["bitmaps"][0]["name"], &top["bitmaps"][0]["granularity"]),
        (&"marks".into(), &(128 << 10).into())
    );

    let text = String::from_utf8(run(&mut info(folder.path(), &["top"]))).unwrap();
    for line in
        ["format          qcow2", "virtual size    16 MiB (16777216 bytes)", "backing 1:", "first", "marks"]
    {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
    let alone: Value =
        serde_json::from_slice(&run(&mut info(folder.path(), &["--json", "--backing", "none", "top"])))
            .unwrap();
    assert_eq!(alone["chain"].as_array().unwrap().len(), 0);
}

#[test]
fn a_backing_file_elsewhere_needs_allow_dir() {
    let (folder, elsewhere) = (scratch("info"), scratch("elsewhere"));
    qemu_img(elsewhere.path(), "create -q -f qcow2 base 8M");
    let base = elsewhere.path().join("base");
    let base = base.to_str().unwrap();
    qemu_img(folder.path(), &format!("create -q -f qcow2 -b {base} -F qcow2 top"));
    let refused = output(&mut info(folder.path(), &["top"]));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text.contains("--allow-dir") && text.contains(base), "{text}");
    run(&mut info(folder.path(), &["--allow-dir", elsewhere.path().to_str().unwrap(), "top"]));
    run(&mut info(
        folder.path(),
        &["--backing", base, "--allow-dir", elsewhere.path().to_str().unwrap(), "top"],
    ));
}

#[test]
fn the_sample_is_described() {
    let sample = testdata("sample.qcow2");
    let text = run(&mut info(Path::new("."), &[sample.to_str().unwrap()]));
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("backing file    base.qcow2") && text.contains("cluster size    4 KiB"), "{text}");
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let folder = scratch("info");
    fs::write(folder.path().join("disk"), [0; 512]).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = info(folder.path(), &["--format", "raw", "disk"]);
    let out = output(command.stdout(writer).stderr(Stdio::piped()));
    assert_eq!((out.status.code(), out.stderr.as_slice()), (Some(0), b"".as_slice()));
}
