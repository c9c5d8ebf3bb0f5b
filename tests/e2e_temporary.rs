//! `serve --temporary`: clients write, everybody sees it or each his own, and the image stays byte for byte what it was.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::client::{Client, Wishes};
use support::proc::{descriptor_targets, resident_len};
use support::server::{Export, Serve, Server};
use support::tools::{output, qemu_img, qemu_io, run, tool};
use support::{assert_same, scratch, wait_until};

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A base, an overlay on it, and a raw disk of an odd size.
fn images(dir: &Path) {
    qemu_img(dir, "create -q -f qcow2 base 8M");
    qemu_io(dir, "qcow2", "base", &["write -P 1 0 4M"]);
    qemu_img(dir, "create -q -f qcow2 -b base -F qcow2 -o cluster_size=4k top");
    qemu_io(dir, "qcow2", "top", &["write -P 2 1M 1M"]);
    qemu_img(dir, "snapshot -c then top");
    qemu_io(dir, "qcow2", "top", &["write -P 3 1M 64k"]);
    fs::write(dir.join("raw"), vec![4; 3_000_100]).unwrap();
    fs::create_dir(dir.join("tmp")).unwrap();
}

#[test]
fn writes_are_seen_and_thrown_away() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let tmp = dir.join("tmp");
    for (image, format, first) in [("top", "qcow2", 3), ("base", "qcow2", 1), ("raw", "raw", 4)] {
        let path = dir.join(image);
        let before = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().mtime_nsec());
        for _ in 0..2 {
            let server = Serve::image(&path)
                .format(format)
                .args(&["--temporary", "--temporary-dir", tmp.to_str().unwrap()])
                .start();
            // Nothing of the round before is left.
            let old = format!("read -P {first} 1M 64k");
            qemu_io(
                dir,
                "raw",
                &server.uri(""),
                &[&old, "write -P 9 1M 700k", "write -z 10k 900k", "discard 2M 64k", "flush"],
            );
            let seen = ["read -P 9 1M 700k", "read -P 0 10k 900k"];
            qemu_io(dir, "raw", &server.uri(""), &seen);
            assert!(names(&tmp).is_empty(), "{image}: the temporary file has a name");
            // Others may read it, and nobody may write it.
            run(tool("qemu-img").current_dir(dir).args(["info", image]));
            let writer =
                output(tool("qemu-io").current_dir(dir).args(["-f", format, "-c", "write 0 512", image]));
            assert!(!writer.status.success(), "{image}: QEMU writes it meanwhile");
            server.stop();
        }
        let after = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().mtime_nsec());
        assert!(after == before, "{image} was written");
    }
    assert!(names(&tmp).is_empty());
}

#[test]
fn each_export_has_its_own_and_a_snapshot_can_be_written_on() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let before = fs::read(dir.join("top")).unwrap();
    let file = |what: &str| format!("name={what},file={},temporary", dir.join("top").display());
    let snapshot = format!("{},load-snapshot=then", file("then"));
    let server = Serve::exports(Vec::<Export>::new())
        .args(&["--export", &file("a"), "--export", &file("b"), "--export", &snapshot])
        .start();
    qemu_io(dir, "raw", &server.uri("a"), &["read -P 3 1M 64k", "write -P 5 0 1M"]);
    qemu_io(dir, "raw", &server.uri("b"), &["read -P 1 0 1M", "write -P 6 0 1M"]);
    qemu_io(dir, "raw", &server.uri("then"), &["read -P 2 1M 64k", "read -P 1 0 1M", "write -P 7 0 1M"]);
    qemu_io(dir, "raw", &server.uri("a"), &["read -P 5 0 1M"]);
    qemu_io(dir, "raw", &server.uri("then"), &["read -P 7 0 1M"]);
    server.stop();
    assert!(fs::read(dir.join("top")).unwrap() == before);
}

/// Whatever becomes of it is thrown away: nothing of it is synced.
#[test]
fn nothing_is_made_durable() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let trace = dir.join("trace");
    let server = Serve::image(dir.join("top"))
        .wrapper(&[
            "strace",
            "-D",
            "-f",
            "-e",
            "trace=fsync,fdatasync,sync_file_range",
            "-o",
            trace.to_str().unwrap(),
        ])
        .args(&["--temporary", "--temporary-dir", dir.join("tmp").to_str().unwrap(), "--aio", "threads"])
        .start();
    qemu_io(dir, "raw", &server.uri(""), &["write -P 9 1M 700k", "write -f -P 8 0 4k", "flush"]);
    server.stop();
    // The tracer sees the end a moment after us.
    wait_until("the tracer sees the end", || {
        fs::read_to_string(&trace).unwrap_or_default().contains("+++ exited with 0 +++")
    });
    let trace = fs::read_to_string(trace).unwrap();
    assert!(!trace.contains("sync("), "{trace}");
}

#[test]
fn what_makes_no_sense_is_said() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    for (args, hint) in [
        (&["--temporary", "--read-only"][..], "--read-only"),
        (&["--temporary-dir", "/var/tmp"], "--temporary"),
        (&["--temporary", "--temporary-dir", "/nowhere"], "/nowhere"),
        (&["--temporary=per-client", "--temporary-dir", "/nowhere"], "/nowhere"),
        (&["--temporary=mine"], "per-client"),
    ] {
        let refusal = Serve::image(dir.join("top")).args(args).start_refused();
        assert!(refusal.stderr.contains(hint), "{args:?}: {}", refusal.stderr);
    }
}

/// Descriptors of the server that are files without a name in `folder`.
fn overlays(server: &Server, folder: &Path) -> usize {
    let folder = folder.canonicalize().unwrap();
    let nameless = |target: &String| Path::new(target).starts_with(&folder) && target.ends_with("(deleted)");
    descriptor_targets(server.pid()).iter().filter(|target| nameless(target)).count()
}

/// What becomes of a connection that has ended takes the server a moment.
#[track_caller]
fn wait_for_overlays(server: &Server, folder: &Path, count: usize) {
    wait_until(&format!("{count} overlays"), || overlays(server, folder) == count);
}

#[test]
fn each_client_has_its_own_for_as_long_as_it_is_there() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let tmp = dir.join("tmp");
    for (image, format, first) in [("top", "qcow2", 3), ("raw", "raw", 4)] {
        let path = dir.join(image);
        let before = fs::read(&path).unwrap();
        let mut server = Serve::image(&path)
            .format(format)
            .args(&["--temporary=per-client", "--temporary-dir", tmp.to_str().unwrap()])
            .start();
        assert_eq!(overlays(&server, &tmp), 0);
        let mut clients: Vec<_> =
            (0..8).map(|_| Client::unix(server.socket(), "", Wishes::STRUCTURED)).collect();
        wait_for_overlays(&server, &tmp, clients.len());
        for (client, byte) in clients.iter_mut().zip(10_u8..) {
            assert_same("before", &client.read(1 << 20, 65536), &[first; 65536]);
            client.write((1 << 20) + 700, &[byte; 50_000]);
            client.write(0, &[byte; 512]);
            client.flush();
        }
        for (client, byte) in clients.iter_mut().zip(10_u8..) {
            let mut expected = vec![first; 65536];
            expected[700..50_700].fill(byte);
            assert_same("its own", &client.read(1 << 20, 65536), &expected);
            assert_same("its own", &client.read(0, 512), &[byte; 512]);
        }
        // One hangs up, one says goodbye, and what they had is gone.
        drop(clients.pop());
        clients.pop().unwrap().disconnect();
        wait_for_overlays(&server, &tmp, clients.len());
        let mut late = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        assert_same("who comes later", &late.read(1 << 20, 65536), &[first; 65536]);
        drop((clients, late));
        wait_for_overlays(&server, &tmp, 0);
        server.assert_alive();
        assert!(names(&tmp).is_empty(), "{image}: an overlay has a name");
        server.stop();
        assert!(fs::read(&path).unwrap() == before, "{image} was written");
    }
}

/// Clients with several connections would see several disks; and contexts are those of an overlay for all.
#[test]
fn a_client_is_told_to_have_one_connection() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    qemu_img(dir, "bitmap --add top dirty");
    let told = |sharing: &str| {
        let server = Serve::image(dir.join("top")).args(&[sharing, "--bitmap", "dirty"]).start();
        let info = run(tool("nbdinfo").args(["--json", &server.uri("")]));
        let map = run(tool("nbdinfo").args(["--map=qemu:dirty-bitmap:dirty", &server.uri("")]));
        server.stop();
        let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
        (info["exports"][0].clone(), map)
    };
    let (mut shared, shared_map) = told("--temporary=shared");
    let (mut own, own_map) = told("--temporary=per-client");
    let multi = |export: &mut serde_json::Value| export["can_multi_conn"].take();
    assert_eq!((multi(&mut shared), multi(&mut own)), (true.into(), false.into()));
    for export in [&mut shared, &mut own] {
        export["uri"].take();
    }
    assert_eq!(shared, own);
    assert_eq!(shared_map, own_map);
}

#[test]
fn idle_clients_cost_little() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    qemu_img(dir, "create -q -f qcow2 large 1T");
    let tmp = dir.join("tmp");
    let server = Serve::image(dir.join("large"))
        .args(&["--temporary=per-client", "--temporary-dir", tmp.to_str().unwrap()])
        .start();
    let connect = || Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let first: Vec<_> = (0..20).map(|_| connect()).collect();
    let before = resident_len(server.pid());
    let others: Vec<_> = (0..100).map(|_| connect()).collect();
    wait_for_overlays(&server, &tmp, first.len() + others.len());
    let each = resident_len(server.pid()).saturating_sub(before) / others.len() as u64;
    assert!(each < 160 << 10, "{each} bytes for each idle client of a disk of 1 TiB");
    drop((first, others));
    wait_for_overlays(&server, &tmp, 0);
    server.stop();
}

/// A client that gets no overlay gets no disk, and the others go on.
#[test]
fn who_cannot_have_one_is_not_served() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let tmp = dir.join("tmp");
    let mut server = Serve::image(dir.join("top"))
        .args(&["--temporary=per-client", "--temporary-dir", tmp.to_str().unwrap()])
        .start();
    let mut served = Client::unix(server.socket(), "", Wishes::SIMPLE);
    served.write(0, &[7; 512]);
    fs::remove_dir(&tmp).unwrap();
    let refused = output(tool("nbdinfo").args(["--size", &server.uri("")]));
    assert!(!refused.status.success(), "{refused:?}");
    server.wait_for_log("clients refused");
    fs::create_dir(&tmp).unwrap();
    let mut again = Client::unix(server.socket(), "", Wishes::SIMPLE);
    assert_same("a new one", &again.read(0, 512), &[1; 512]);
    assert_same("the old one", &served.read(0, 512), &[7; 512]);
    drop((served, again));
    server.assert_alive();
    server.stop();
}
