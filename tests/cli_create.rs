//! `nbd-img create`: images with every option, held against those that `qemu-img create` makes, then written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::scratch;
use support::server::Serve;
use support::tools::{output, qemu_img, qemu_io, run, tool};

fn create(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.current_dir(folder).arg("create").args(args);
    command
}

fn info(folder: &Path, image: &str) -> Value {
    serde_json::from_slice(&qemu_img(folder, &format!("info --output=json {image}"))).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = entries.collect();
    names.sort();
    names
}

/// Options, size, and whether nbd-img writes such images.
const QCOW2: [(&str, &str, bool); 34] = [
    ("", "10M", true),
    ("", "0", true),
    ("", "1000", true),
    ("", "8G", true),
    ("compat=0.10", "100M", true),
    ("compat=0.10,cluster_size=512", "3M", true),
    ("compat=v3", "10M", true),
    ("cluster_size=512", "10M", true),
    ("cluster_size=1k,refcount_bits=1", "10M", true),
    ("cluster_size=4k,refcount_bits=2", "10M", true),
    ("cluster_size=16k,refcount_bits=4", "10M", true),
    ("cluster_size=256k,refcount_bits=8", "10M", true),
    ("cluster_size=2M,refcount_bits=32", "10M", true),
    ("cluster_size=512,refcount_bits=64", "10M", true),
    ("lazy_refcounts=on", "10M", true),
    ("lazy_refcounts=off,compression_type=zlib", "10M", true),
    ("compression_type=zstd", "10M", true),
    ("extended_l2=on", "10M", false),
    ("extended_l2=on,cluster_size=16k", "10M", false),
    ("extended_l2=on,cluster_size=2M,compression_type=zstd,refcount_bits=64,lazy_refcounts=on", "10M", false),
    ("preallocation=off", "10M", true),
    ("preallocation=metadata", "10M", true),
    ("preallocation=metadata,cluster_size=512,refcount_bits=64", "3M", true),
    ("preallocation=metadata,cluster_size=512,refcount_bits=1", "3000K", true),
    ("preallocation=metadata,cluster_size=2M", "100M", true),
    ("preallocation=metadata,extended_l2=on", "10M", false),
    ("preallocation=metadata,compat=0.10", "10M", true),
    ("preallocation=falloc", "10M", true),
    ("preallocation=full,cluster_size=4k", "3M", true),
    ("data_file=NAME.data", "10M", true),
    ("data_file=NAME.data,data_file_raw=on", "10M", true),
    ("data_file=NAME.data,preallocation=metadata", "10M", true),
    ("data_file=NAME.data,preallocation=falloc,data_file_raw=on", "10M", true),
    ("data_file=NAME.data,extended_l2=on,refcount_bits=1", "10M", false),
];

#[test]
fn images_are_what_qemu_makes_of_the_same_options() {
    let folder = scratch("create");
    for (options, size, is_written) in QCOW2 {
        let what = format!("{options} {size}");
        let args = |name: &str| {
            let options = options.replace("NAME", name);
            let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
            args.extend((!options.is_empty()).then(|| ["-o".to_owned(), options]).into_iter().flatten());
            args.extend([name.to_owned(), size.to_owned()]);
            args
        };
        run(create(folder.path(), &["-q"]).args(args("ours")));
        run(tool("qemu-img").current_dir(folder.path()).args(["create", "-q"]).args(args("theirs")));
        same_image(&what, folder.path());
        write_and_check(&what, folder.path(), is_written);
        for name in names(folder.path()) {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
    }
}

/// The same facts, tables without a fault, the same room, the same disk.
fn same_image(what: &str, folder: &Path) {
    let (ours, theirs) = (info(folder, "ours"), info(folder, "theirs"));
    for key in ["virtual-size", "cluster-size", "format", "dirty-flag", "backing-filename"] {
        assert_eq!(ours[key], theirs[key], "{what}: {key}");
    }
    let (ours_data, theirs_data) = (&ours["format-specific"]["data"], &theirs["format-specific"]["data"]);
    let keys = theirs_data.as_object().unwrap().keys().filter(|key| *key != "data-file");
    for key in keys {
        assert_eq!(ours_data[key], theirs_data[key], "{what}: {key}");
    }
    assert_eq!(ours_data.as_object().unwrap().len(), theirs_data.as_object().unwrap().len(), "{what}");
    let checked = output(tool("qemu-img").current_dir(folder).args(["check", "-f", "qcow2", "ours"]));
    assert!(checked.status.success(), "{what}: {checked:?}");
    let compared = output(
        tool("qemu-img")
            .current_dir(folder)
            .args(["compare", "-f", "qcow2", "-F", "qcow2", "ours", "theirs"]),
    );
    assert!(compared.status.success(), "{what}: {compared:?}");
    let room = |name: &str| fs::metadata(folder.join(name)).unwrap().blocks() * 512;
    // Neither takes much more than the other: what is preallocated is there, and what is not is a hole.
    assert!(room("ours").abs_diff(room("theirs")) <= 2 << 20, "{what}: {} {}", room("ours"), room("theirs"));
    let len = |name: &str| fs::metadata(folder.join(name)).map_or(0, |file| file.len());
    assert_eq!(len("ours.data"), len("theirs.data"), "{what}");
}

/// nbd-img writes the image, or refuses to by name, and QEMU does; it stays sound.
fn write_and_check(what: &str, folder: &Path, is_written: bool) {
    let size = info(folder, "ours")["virtual-size"].as_u64().unwrap();
    if size < 4096 {
        return;
    }
    let last = (size - 2000).to_string();
    let commands = [
        "write -P 17 1k 70k".to_owned(),
        format!("write -P 18 {last} 1000"),
        "write -z 4k 64k".to_owned(),
        "read -P 17 1k 3k".to_owned(),
        "read -P 0 4k 64k".to_owned(),
        format!("read -P 18 {last} 1000"),
    ];
    let commands: Vec<_> = commands.iter().map(String::as_str).collect();
    if is_written {
        let server = Serve::image(folder.join("ours")).start();
        qemu_io(folder, "raw", &server.uri(""), &commands);
        server.stop();
    } else {
        qemu_io(folder, "qcow2", "ours", &commands);
    }
    let checked = output(tool("qemu-img").current_dir(folder).args(["check", "-f", "qcow2", "ours"]));
    assert!(checked.status.success(), "{what}, written: {checked:?}");
    let server = Serve::image(folder.join("ours")).read_only().start();
    run(tool("qemu-img").current_dir(folder).args([
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "qcow2",
        &server.uri(""),
        "ours",
    ]));
    server.stop();
}

#[test]
fn overlays_are_of_the_size_and_format_that_was_looked_at() {
    let folder = scratch("create");
    let dir = folder.path();
    qemu_img(dir, "create -q -f qcow2 base.qcow2 7M");
    qemu_io(dir, "qcow2", "base.qcow2", &["write -P 5 1M 1M"]);
    fs::write(dir.join("base.raw"), vec![6; 3_000_001]).unwrap();
    fs::create_dir(dir.join("other")).unwrap();
    for (base, format, extra, size) in [
        ("base.qcow2", "qcow2", &[][..], 7 << 20),
        ("base.raw", "raw", &[], 3_000_320),
        ("base.qcow2", "qcow2", &["-o", "cluster_size=512,compat=0.10"], 7 << 20),
        ("base.qcow2", "qcow2", &["-o", "extended_l2=on,preallocation=metadata"], 7 << 20),
        ("base.raw", "raw", &["-o", "cluster_size=2M,refcount_bits=1,compression_type=zstd"], 3_000_320),
    ] {
        run(create(dir, &["-q", "-f", "qcow2", "-b", base, "-F", format]).args(extra).arg("ours"));
        run(tool("qemu-img")
            .current_dir(dir)
            .args(["create", "-q", "-f", "qcow2", "-b", base, "-F", format])
            .args(extra)
            .arg("theirs"));
        let what = format!("{base} {extra:?}");
        same_image(&what, dir);
        let ours = info(dir, "ours");
        assert_eq!((&ours["virtual-size"], &ours["backing-filename-format"]), (&size.into(), &format.into()));
        write_and_check(&what, dir, !extra.concat().contains("extended_l2"));
        fs::remove_file(dir.join("ours")).unwrap();
        fs::remove_file(dir.join("theirs")).unwrap();
    }
    // A larger one, by the keys of -o, with a comma in the name.
    fs::rename(dir.join("base.raw"), dir.join("a,b.raw")).unwrap();
    run(&mut create(dir, &["-f", "qcow2", "-o", "backing_file=a,,b.raw,backing_fmt=raw", "ours", "20M"]));
    assert_eq!(info(dir, "ours")["full-backing-filename"], "a,b.raw");
    // One that is not there is taken on trust.
    run(&mut create(dir, &["-f", "qcow2", "-u", "-b", "later.raw", "-F", "raw", "trusting", "1M"]));
    assert_eq!(info(dir, "trusting")["backing-filename"], "later.raw");
}

#[test]
fn what_cannot_be_is_refused_by_name_and_leaves_nothing() {
    let folder = scratch("create");
    let dir = folder.path();
    fs::create_dir(dir.join("in")).unwrap();
    fs::write(dir.join("outside.raw"), "outside").unwrap();
    let inside = dir.join("in");
    fs::write(inside.join("base"), vec![1; 4096]).unwrap();
    for (args, hint) in [
        ("-f qcow2 i", "size is missing"),
        ("-f qcow2 -o cluster_size=3k i 1M", "cluster_size"),
        ("-f qcow2 -o cluster_size=4M i 1M", "cluster_size"),
        ("-f qcow2 -o refcount_bits=3 i 1M", "refcount_bits"),
        ("-f qcow2 -o refcount_bits=128 i 1M", "refcount_bits"),
        ("-f qcow2 -o compat=0.10,refcount_bits=1 i 1M", "refcount_bits other than 16 needs compat=1.1"),
        ("-f qcow2 -o compat=0.10,lazy_refcounts=on i 1M", "compat=1.1"),
        ("-f qcow2 -o compat=0.10,data_file=d i 1M", "compat=1.1"),
        ("-f qcow2 -o compat=4 i 1M", "compat"),
        ("-f qcow2 -o extended_l2=on,cluster_size=8k i 1M", "16K"),
        ("-f qcow2 -o cluster_size=512 i 1T", "cluster_size"),
        ("-f qcow2 -o what=ever i 1M", "the keys are"),
        ("-f qcow2 -o cluster_size i 1M", "wants a value"),
        ("-f qcow2 -o cluster_size=4k,cluster_size=4k i 1M", "twice"),
        ("-f qcow2 -o size=1M i 1M", "both"),
        ("-f qcow2 -o data_file_raw=on i 1M", "data_file"),
        ("-f qcow2 -b base i", "-F raw"),
        ("-f qcow2 -F raw i 1M", "-b"),
        ("-f qcow2 -b base -F vmdk i", "vmdk"),
        ("-f qcow2 -b base -F qcow2 i", "qcow2"),
        ("-f qcow2 -b ../outside.raw -F raw i", "--allow-dir"),
        ("-f qcow2 -b missing -F raw i", "missing"),
        ("-f qcow2 -b base -F raw -o preallocation=metadata i", "extended_l2"),
        ("-f qcow2 -b base -F raw -o data_file=d,data_file_raw=on i", "data_file_raw"),
        ("-f qcow2 -o data_file=../d i 1M", "--allow-dir"),
        ("-f qcow2 -o data_file=json:d i 1M", "protocol"),
        ("-f qcow2 -o data_file=base i 1M", "--force"),
        ("-f raw -o cluster_size=4k i 1M", "-f qcow2"),
        ("-f raw -o preallocation=metadata i 1M", "raw image"),
        ("-f raw i", "size is missing"),
        ("-f raw -o preallocation=full i 15E", ""),
        ("-f qcow2 nowhere/i 1M", "nowhere"),
    ] {
        let said = output(create(&inside, &[]).args(args.split(' ')));
        let text = String::from_utf8(said.stderr).unwrap();
        assert!(!said.status.success() && text.contains(hint), "{args}: {text}");
        assert_eq!(names(&inside), ["base"], "{args}: {text}");
        assert_eq!(fs::read(inside.join("base")).unwrap(), vec![1; 4096], "{args}");
    }
    let allowed = run(&mut create(
        &inside,
        &["-f", "qcow2", "-b", "../outside.raw", "-F", "raw", "--allow-dir", "..", "i"],
    ));
    assert!(String::from_utf8(allowed).unwrap().contains("512 bytes"));
}

#[test]
fn a_file_that_is_there_is_replaced_only_when_told_and_unused() {
    let folder = scratch("create");
    let dir = folder.path();
    fs::write(dir.join("i"), "precious").unwrap();
    let said = output(&mut create(dir, &["i", "1M"]));
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("--force"));
    assert_eq!(fs::read(dir.join("i")).unwrap(), b"precious");
    std::os::unix::fs::symlink("i", dir.join("link")).unwrap();
    run(&mut create(dir, &["--force", "-f", "qcow2", "link", "1M"]));
    assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
    assert_eq!(info(dir, "i")["format"], "qcow2");
    let server = Serve::image(dir.join("i")).start();
    let said = output(&mut create(dir, &["--force", "i", "1M"]));
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("lock"), "{said:?}");
    server.stop();
    assert_eq!(info(dir, "i")["format"], "qcow2");
    assert_eq!(names(dir), ["i", "link"]);
    run(&mut create(dir, &["--force", "i", "1000"]));
    assert_eq!(fs::read(dir.join("i")).unwrap(), vec![0; 1024]);
}

#[test]
fn raw_images_have_their_room() {
    let folder = scratch("create");
    let dir = folder.path();
    for (options, blocks) in
        [("preallocation=off", 0), ("preallocation=falloc", 2048), ("preallocation=full,nocow=on", 2048)]
    {
        run(&mut create(dir, &["-o", options, "i", "1M"]));
        let file = fs::metadata(dir.join("i")).unwrap();
        assert_eq!((file.len(), file.blocks()), (1 << 20, blocks), "{options}");
        assert_eq!(file.mode() & 0o133, 0, "{options}");
        fs::remove_file(dir.join("i")).unwrap();
    }
}

/// A kill at any moment leaves the whole image or none.
#[test]
fn a_kill_leaves_no_half_image() {
    let folder = scratch("create");
    let dir = folder.path();
    for number in 0..30 {
        let args = ["-q", "-f", "qcow2", "-o", "preallocation=full,cluster_size=512", "i", "30M"];
        let mut child = create(dir, &args).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(7 * number));
        child.kill().unwrap();
        child.wait().unwrap();
        match names(dir).as_slice() {
            [] => {}
            [name] if name == "i" => {
                qemu_img(dir, "check -q -f qcow2 i");
                fs::remove_file(dir.join("i")).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
}
