//! A table: command lines as callers write them, and the configuration that each comes to.

use std::fmt::Write as _;

use nbd_img_formats::open::Backing;
use nbd_img_formats::storage::Aio;

use super::config::{Listing, task};
use super::*;
use crate::export::{CacheMode, DetectZeroes, ExportSpec};
use crate::nbd::negotiate::TlsMode;
use crate::server::tls::TlsSource;
use crate::server::{Background, ServeOptions};

/// What a command line comes to, in short: only what differs from an empty command line with one image.
fn effective(line: &[&str]) -> Result<String, String> {
    with_sockets(line, 0)
}

pub fn with_sockets(line: &[&str], sockets: usize) -> Result<String, String> {
    let args: Vec<OsString> = line.iter().map(OsString::from).collect();
    let line = match line::parse(&args).map_err(|complaint| complaint.text)? {
        Parsed::Line(line) => line,
        Parsed::Help => return Ok("help".to_owned()),
        Parsed::Version => return Ok("version".to_owned()),
        Parsed::Answer(text) => return Ok(format!("answer of {} lines", text.lines().count())),
    };
    match task(*line, Activation { sockets }).map_err(|complaint| complaint.text)? {
        Task::Serve(service) => Ok(served(&service)),
        Task::List(listing) => Ok(listed(&listing)),
        Task::Disconnect(device) => Ok(format!("disconnect {}", device.display())),
    }
}

fn served(service: &Service) -> String {
    let mut text = String::new();
    let options = &service.options;
    let [address] = options.addresses.as_slice() else { panic!("one address") };
    if address.to_string() != "tcp:0.0.0.0:10809" {
        let _ = write!(text, "{address} ");
    }
    for (word, is_so) in [
        ("stays", !options.exit_last),
        ("forks", service.fork),
        ("keeps its log", options.manners.background == Background::Yes { keeps_log: true }),
        ("closes its streams", options.manners.background == Background::Yes { keeps_log: false }),
    ] {
        if is_so {
            let _ = write!(text, "{word} ");
        }
    }
    if let Some(device) = &service.device {
        let _ = write!(text, "device={} ", device.display());
    }
    if let Some(label) = &service.selinux_label {
        let _ = write!(text, "label={} ", label.to_string_lossy());
    }
    text += &of_clients(options);
    let [export] = options.exports.as_slice() else { panic!("one export") };
    text += &of_export(export);
    text.trim_end().to_owned()
}

fn of_clients(options: &ServeOptions) -> String {
    let mut text = String::new();
    match options.max_connections {
        1 => {}
        2..64 => _ = write!(text, "clients={} ", options.max_connections),
        _ => text += "clients=many ",
    }
    if options.handshake_timeout.as_secs() != 10 {
        let _ = write!(text, "handshake={}s ", options.handshake_timeout.as_secs());
    }
    if let Some(path) = &options.pid_file {
        let _ = write!(text, "pid-file={} ", path.display());
    }
    if let Some(tls) = &options.tls {
        assert_eq!(tls.mode, TlsMode::Required);
        let _ = match &tls.source {
            TlsSource::Certificates(files) => {
                let peers = if files.client_ca.is_some() { "verified" } else { "any" };
                write!(text, "tls={} peers={peers} ", files.cert.display())
            }
            TlsSource::Psk(path) => write!(text, "keys={} ", path.display()),
        };
    }
    for rule in options.access.iter() {
        let _ = write!(text, "lets-in={:?} ", rule.who);
    }
    text
}

fn of_export(export: &ExportSpec) -> String {
    let mut text = String::new();
    let open = &export.open;
    let format = open.format.map_or("probed".to_owned(), |format| format.to_string());
    let _ = write!(text, "{format}:{} ", export.path.display());
    for (key, value) in [("name", &export.name), ("description", &export.description)] {
        if !value.is_empty() {
            let _ = write!(text, "{key}={value} ");
        }
    }
    for (word, is_so) in [
        ("read-only", export.read_only),
        ("multi-conn", !export.single_client),
        ("depth", !export.hide_depth),
        ("unmap", open.discard),
        ("force-share", open.force_share),
        ("detect", export.detect_zeroes == DetectZeroes::On),
        ("detect-unmap", export.detect_zeroes == DetectZeroes::Unmap),
        ("io_uring", export.aio == Aio::IoUring),
        ("threads", export.aio == Aio::Threads),
        ("temporary", export.temporary.is_some()),
        ("compressed", open.compress.is_some()),
        ("no-backing", open.backing == Backing::None),
    ] {
        if is_so {
            let _ = write!(text, "{word} ");
        }
    }
    if export.cache != CacheMode::Writeback {
        let _ = write!(text, "{:?} ", export.cache);
    }
    if (export.offset, export.size) != (0, None) {
        let _ = write!(text, "offset={} size={:?} ", export.offset, export.size);
    }
    if !export.bitmaps.is_empty() {
        let _ = write!(text, "bitmaps={} ", export.bitmaps.join(","));
    }
    if let Some(part) = &open.part {
        let _ = write!(text, "part={part:?} ");
    }
    if let Some(snapshot) = &open.snapshot {
        let _ = write!(text, "snapshot={snapshot} ");
    }
    if let Backing::Path(path) = &open.backing {
        let _ = write!(text, "backing={} {:?} ", path.display(), open.backing_format);
    }
    text
}

fn listed(listing: &Listing) -> String {
    format!("list {} tls={:?} name={:?}", listing.address, listing.tls, listing.tls_name)
}

#[track_caller]
pub fn check(line: &[&str], want: &str) {
    assert_eq!(effective(line).as_deref(), Ok(want), "{line:?}");
}

#[test]
fn options_for_which_callers_exist() {
    for (line, want) in [
        (vec!["f"], "probed:f"),
        (vec!["-f", "raw", "f"], "raw:f"),
        (vec!["--format=qcow2", "f"], "qcow2:f"),
        (vec!["-t", "f"], "stays probed:f"),
        (vec!["--persistent", "f"], "stays probed:f"),
        (vec!["-e", "4", "f"], "clients=4 probed:f multi-conn"),
        (vec!["--shared=0", "f"], "clients=many probed:f multi-conn"),
        (vec!["-e", "1", "f"], "probed:f"),
        (vec!["-k", "/s", "f"], "unix:/s probed:f"),
        (vec!["--socket", "/s", "f"], "unix:/s probed:f"),
        (vec!["-p", "1", "f"], "tcp:0.0.0.0:1 probed:f"),
        (vec!["-b", "::1", "--port=2", "f"], "tcp:[::1]:2 probed:f"),
        (vec!["-x", "", "f"], "probed:f"),
        (vec!["-x", "/", "-D", "text", "f"], "probed:f name=/ description=text"),
        (vec!["-r", "f"], "probed:f read-only"),
        (vec!["-n", "f"], "probed:f None"),
        (vec!["--cache=writeback", "f"], "probed:f"),
        (vec!["--cache=unsafe", "f"], "probed:f"),
        (vec!["--cache=writethrough", "f"], "probed:f Writethrough"),
        (vec!["--cache=directsync", "f"], "probed:f Directsync"),
        (vec!["--aio=threads", "f"], "probed:f threads"),
        (vec!["--aio=io_uring", "f"], "probed:f io_uring"),
        (vec!["--aio=native", "-n", "f"], "probed:f None"),
        (vec!["--discard=on", "f"], "probed:f unmap"),
        (vec!["--discard=ignore", "f"], "probed:f"),
        (vec!["--discard=unmap", "--detect-zeroes=unmap", "f"], "probed:f unmap detect-unmap"),
        (vec!["--detect-zeroes=on", "f"], "probed:f detect"),
        (vec!["-A", "f"], "probed:f depth"),
        (vec!["-B", "a", "--bitmap=b", "f"], "probed:f bitmaps=a,b"),
        (vec!["--pid-file=p", "f"], "pid-file=p probed:f"),
        (vec!["--fork", "f"], "forks closes its streams probed:f"),
        (vec!["--fork", "-v", "f"], "forks keeps its log probed:f"),
        (vec!["--selinux-label", "a:b", "f"], "label=a:b probed:f"),
        (vec!["-o", "100", "f"], "probed:f offset=100 size=None"),
        (vec!["-l", "snap", "f"], "probed:f read-only snapshot=snap"),
        (vec!["--handshake-limit=0", "f"], "handshake=86400s probed:f"),
        (vec!["--handshake-limit=3", "f"], "handshake=3s probed:f"),
        (
            vec!["-c", "/dev/nbd3", "f"],
            "unix:/var/lock/qemu-nbd-nbd3 forks closes its streams device=/dev/nbd3 probed:f",
        ),
        (vec!["-d", "/dev/nbd3"], "disconnect /dev/nbd3"),
        (
            vec!["-T", "nbd_*", "--object", "throttle-group,id=t", "--object", "iothread,id=i", "f"],
            "probed:f",
        ),
        (vec!["--version"], "version"),
        (vec!["--help"], "help"),
        (vec!["f", "-r", "-t"], "stays probed:f read-only"),
        (vec!["-r", "--", "-x"], "probed:-x read-only"),
    ] {
        check(&line, want);
    }
}

#[test]
fn images_in_options() {
    for (line, want) in [
        (
            vec![r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"f"},"backing":null}"#],
            "qcow2:f no-backing",
        ),
        (vec![r#"json:{"driver":"raw","file":{"driver":"host_device","filename":"/dev/x"}}"#], "raw:/dev/x"),
        (
            vec![
                "-o",
                "512",
                r#"json:{"driver":"raw","offset":1024,"size":2048,"file":{"driver":"file","filename":"f"}}"#,
            ],
            "raw:f offset=1536 size=Some(1536)",
        ),
        (
            vec!["--image-opts", "driver=raw,offset=1M,size=1M,file.driver=file,file.filename=a,,b"],
            "raw:a,b offset=1048576 size=Some(1048576)",
        ),
        (
            vec!["-r", "--image-opts", "driver=qcow2,force-share=on,file.filename=f"],
            "qcow2:f read-only force-share",
        ),
        (
            vec!["--image-opts", "driver=qcow2,file.filename=f,file.cache.direct=on,discard=unmap"],
            "qcow2:f unmap None",
        ),
        (
            vec!["--image-opts", "driver=qcow2,file.filename=f,read-only=on,auto-read-only=on"],
            "qcow2:f read-only",
        ),
        (
            vec!["--image-opts", "driver=qcow2,file.filename=f,backing.driver=raw,backing.file.filename=b"],
            "qcow2:f backing=b Some(Raw)",
        ),
        (vec!["-f", "raw", "file:f"], "raw:f"),
        (
            vec![
                "-r",
                "--image-opts",
                "driver=qcow2,file.driver=raw,file.offset=512,file.size=1K,file.file.filename=f",
            ],
            "qcow2:f read-only part=(512, Some(1024))",
        ),
        (
            vec![
                "-r",
                r#"json:{"file":{"driver":"raw","offset":512,"file":{"driver":"file","filename":"f"}}}"#,
            ],
            "probed:f read-only part=(512, None)",
        ),
    ] {
        check(&line, want);
    }
}

#[test]
fn credentials_and_who_is_let_in() {
    let x509 = ["--object", "tls-creds-x509,id=t,endpoint=server,dir=/tls", "--tls-creds=t"];
    let psk = ["--object", "tls-creds-psk,id=t,endpoint=server,dir=/tls", "--tls-creds=t"];
    let simple = ["--object", "authz-simple,id=a,identity=CN=x,,O=y", "--tls-authz=a"];
    let list = ["--object", "authz-list,id=a,rules.0.match=x,rules.0.policy=allow", "--tls-authz", "a"];
    for (line, want) in [
        (x509.to_vec(), "tls=/tls/server-cert.pem peers=verified probed:f"),
        (psk.to_vec(), "keys=/tls/keys.psk probed:f"),
        (
            [x509, simple].concat(),
            r#"tls=/tls/server-cert.pem peers=verified lets-in=Subject("CN=x,O=y") probed:f"#,
        ),
        ([psk.as_slice(), &list].concat(), r#"keys=/tls/keys.psk lets-in=Psk("x") probed:f"#),
    ] {
        check(&[line.as_slice(), &["f"]].concat(), want);
    }
    let nobody = [x509.as_slice(), &["--tls-authz=b", "f"]].concat();
    assert_eq!(effective(&nobody), Err("--tls-authz: no object with id 'b'".to_owned()));
}

#[test]
fn listing_another_server() {
    let tls = ["--object", "tls-creds-x509,id=t,endpoint=client,dir=/tls", "--tls-creds", "t"];
    check(&["-L", "-k", "/s"], "list unix:/s tls=None name=None");
    check(&["-L"], r#"list tcp:0.0.0.0:10809 tls=None name=Some("0.0.0.0")"#);
    let line = [["-L", "-b", "h", "-p7"].as_slice(), &tls, &["--tls-hostname=n"]].concat();
    check(&line, r#"list tcp:h:7 tls=Some(Certificates("/tls")) name=Some("n")"#);
    let psk = ["--object", "tls-creds-psk,id=t,dir=/tls,username=alice", "--tls-creds", "t"];
    let line = [["-L", "-k", "/s"].as_slice(), &psk].concat();
    check(&line, r#"list unix:/s tls=Some(Psk { file: "/tls/keys.psk", username: "alice" }) name=None"#);
}

#[test]
fn what_does_not_go_together() {
    let client = ["--object", "tls-creds-x509,id=t,endpoint=client,dir=/tls", "--tls-creds=t", "f"];
    for (line, want) in [
        (vec![], "Invalid number of arguments"),
        (vec!["a", "b"], "Invalid number of arguments"),
        (vec!["-L", "f"], "List mode is incompatible with a file name"),
        (vec!["-L", "-x", "n"], "List mode is incompatible with per-device settings"),
        (vec!["-L", "--fork"], "List mode is incompatible with forking"),
        (vec!["--tls-authz=a", "f"], "--tls-authz is not permitted without --tls-creds"),
        (vec!["--tls-hostname=a", "f"], "--tls-hostname is not permitted without --tls-creds"),
        (vec!["--tls-creds=t", "f"], "Failed to get TLS creds: No TLS credentials with id 't'"),
        (client.to_vec(), "Failed to get TLS creds: Expected TLS credentials for a server endpoint"),
        (
            vec!["--object", "secret,id=t,data=x", "--tls-creds=t", "f"],
            "Failed to get TLS creds: Object with id 't' is not TLS credentials",
        ),
        (vec!["-k", "s", "f"], "socket path must be absolute"),
        (vec!["--image-opts", "-f", "raw", "driver=raw"], "--image-opts and -f are mutually exclusive"),
        (vec!["-f", "nope", "f"], "Failed to blk_new_open 'f': Unknown driver 'nope'"),
        (
            vec!["--aio=native", "f"],
            "Failed to blk_new_open 'f': aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        (
            vec!["--image-opts", "driver=raw,read-only=on,file.filename=f"],
            "Failed to blk_new_open 'driver=raw,read-only=on,file.filename=f': Block node is read-only",
        ),
        (
            vec!["--image-opts", "driver=raw,force-share=on,file.filename=f"],
            "Failed to blk_new_open 'driver=raw,force-share=on,file.filename=f': force-share=on can only be used with \
             read-only images",
        ),
    ] {
        assert_eq!(effective(&line), Err(want.to_owned()), "{line:?}");
    }
    let anonymous = ["--object", "tls-creds-anon,id=t,endpoint=server", "--tls-creds=t", "f"];
    assert!(effective(&anonymous).unwrap_err().contains("tls-creds-anon"));
    assert!(effective(&["-p", "99999", "f"]).unwrap_err().contains("99999"));
}

#[test]
fn socket_activation_decides_where_to_listen() {
    for (line, sockets, want) in [
        (vec!["-k", "/s", "f"], 1, "Unix socket can't be set when using socket activation"),
        (vec!["-b", "h", "f"], 1, "The interface can't be set when using socket activation"),
        (vec!["-p", "1", "f"], 1, "TCP port number can't be set when using socket activation"),
        (vec!["-c", "/dev/nbd0", "f"], 1, "NBD device can't be set when using socket activation"),
        (vec!["-L"], 1, "List mode is incompatible with socket activation"),
        (vec!["f"], 2, "qemu-nbd does not support socket activation with LISTEN_FDS > 1"),
    ] {
        assert_eq!(with_sockets(&line, sockets), Err(want.to_owned()), "{line:?}");
    }
}

#[test]
fn what_is_written_compressed() {
    let image = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=f";
    for (line, compressed) in [
        (vec!["--image-opts", image], true),
        (vec!["--image-opts", "driver=qcow2,file.filename=f"], false),
        (vec!["-s", "--image-opts", image], false),
    ] {
        let told = effective(&line).unwrap();
        assert_eq!(told.contains("compressed"), compressed, "{line:?}: {told}");
    }
}

#[test]
fn temporary_overlays_are_for_those_who_write() {
    for (line, temporary) in [(vec!["f"], false), (vec!["-s", "f"], true), (vec!["-s", "-r", "f"], false)] {
        let told = effective(&line).unwrap();
        assert_eq!(told.contains("temporary"), temporary, "{line:?}: {told}");
    }
}

#[test]
fn the_name_of_the_program() {
    for (name, called) in
        [("qemu-nbd", true), ("/usr/bin/qemu-nbd", true), ("nbd-img", false), ("qemu-nbd-10", false)]
    {
        assert_eq!(is_called(OsStr::new(name)), called, "{name}");
    }
}

#[test]
fn errors_of_the_system_in_the_words_of_the_c_library() {
    let text = "a: No such file (os error 2): b (os error 13)";
    assert_eq!(in_the_words_of_c(text), "a: No such file: b");
}
