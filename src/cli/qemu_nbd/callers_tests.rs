//! The exact lines by which programs start qemu-nbd, and what each of them comes to here.

use super::tests::{check, with_sockets};

/// An image as oVirt names it: without what is behind it.
const OVIRT: &str =
    r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/d"}, "backing": null}"#;

#[test]
fn virt_v2v() {
    let line = [
        "-t",
        "--shared=0",
        "--discard=unmap",
        "--pid-file",
        "/p",
        "--socket",
        "/s",
        "--selinux-label",
        "system_u:object_r:svirt_socket_t:s0",
        "--format",
        "qcow2",
        "/d",
    ];
    check(
        &line,
        "unix:/s stays label=system_u:object_r:svirt_socket_t:s0 clients=many pid-file=/p qcow2:/d multi-conn unmap",
    );
}

#[test]
fn virtnbdbackup() {
    let backup = [
        "-r",
        "--format=qcow2",
        "-x",
        "vda",
        "/d",
        "-k",
        "/s",
        "-t",
        "-e 2",
        "--fork",
        "--detect-zeroes=on",
        "--pid-file=/p",
        "--",
    ];
    let remote = [
        "--discard=unmap",
        "--format=raw",
        "-x",
        "vda",
        "/d",
        "-p",
        "10809",
        "-b",
        "10.0.0.1",
        "--fork",
        "--object",
        "tls-creds-x509,id=tls0,endpoint=server,dir=/tls,verify-peer=false",
        "--tls-creds",
        "tls0",
    ];
    check(
        &backup,
        "unix:/s stays forks closes its streams clients=2 pid-file=/p qcow2:/d name=vda read-only multi-conn detect",
    );
    check(
        &remote,
        "tcp:10.0.0.1:10809 forks closes its streams tls=/tls/server-cert.pem peers=any raw:/d name=vda unmap",
    );
}

#[test]
fn ovirt() {
    let imageio = [
        "--export-name=",
        "--persistent",
        "--shared=8",
        "--socket=/s",
        "--read-only",
        "--cache=none",
        "--aio=native",
        "--discard=unmap",
        "--detect-zeroes=unmap",
        "--allocation-depth",
        OVIRT,
    ];
    let vdsm = [
        "--socket",
        "/s",
        "--persistent",
        "--shared=8",
        "--export-name=",
        "--cache=none",
        "--aio=native",
        "--read-only",
        OVIRT,
    ];
    check(
        &imageio,
        "unix:/s stays clients=8 qcow2:/d read-only multi-conn depth unmap detect-unmap no-backing None",
    );
    check(&vdsm, "unix:/s stays clients=8 qcow2:/d read-only multi-conn no-backing None");
}

#[test]
fn scripts() {
    for (line, want) in [
        (
            ["--format", "raw", "-r", "-n", "-c", "/dev/nbd0", "/d"].as_slice(),
            "unix:/var/lock/qemu-nbd-nbd0 forks closes its streams device=/dev/nbd0 raw:/d read-only None",
        ),
        (
            ["-c", "/dev/nbd1", "/d"].as_slice(),
            "unix:/var/lock/qemu-nbd-nbd1 forks closes its streams device=/dev/nbd1 probed:/d",
        ),
        (["--disconnect", "/dev/nbd1"].as_slice(), "disconnect /dev/nbd1"),
        (
            ["-t", "--socket=/s", "--pid-file=/p", "-f", "qcow2", "-A", "/d"].as_slice(),
            "unix:/s stays pid-file=/p qcow2:/d depth",
        ),
        (
            ["-t", "--socket=/s", "--pid-file=/p", "-x", "hello", "-D", "world", "/d"].as_slice(),
            "unix:/s stays pid-file=/p probed:/d name=hello description=world",
        ),
        (
            ["-t", "-p", "10810", "-e", "3", "--fork", "-f", "raw", "/d"].as_slice(),
            "tcp:0.0.0.0:10810 stays forks closes its streams clients=3 raw:/d multi-conn",
        ),
        (
            ["--fork", "--persistent", "--shared=5", "--socket=/s", "--read-only", "--format=qcow2", "/d"]
                .as_slice(),
            "unix:/s stays forks closes its streams clients=5 qcow2:/d read-only multi-conn",
        ),
    ] {
        check(line, want);
    }
    assert_eq!(with_sockets(&["-f", "raw", "-x", "/", "/d"], 1).as_deref(), Ok("raw:/d name=/"));
    assert_eq!(with_sockets(&["-r", "-f", "qcow2", "/d"], 1).as_deref(), Ok("qcow2:/d read-only"));
}
