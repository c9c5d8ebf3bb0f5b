//! Which files the server opens, as strace sees it: the image, what the policy allows it to name, and nothing else. An
//! image is whatever its guest, or whoever sent it, wrote into it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Refusal, Serve};
use support::tools::{qemu_img, tool};
use support::wire::command;

/// Below these lie files of the system that a program may open: libraries, time zones, what the kernel says of processes.
const SYSTEM: [&str; 7] =
    ["/lib", "/usr/lib", "/usr/share/zoneinfo", "/etc/ld.so.", "/etc/localtime", "/proc", "/sys"];
const DEVICES: [&str; 3] = ["/dev/null", "/dev/random", "/dev/urandom"];

#[test]
fn a_header_that_the_guest_wrote_stays_data() {
    let folder = support::scratch("guest-header");
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    qemu_img(folder.path(), "create -q -f qcow2 -u -b /etc/shadow -F raw evil 1M");
    let header = &fs::read(folder.path().join("evil")).unwrap()[..64 << 10];

    let server = Serve::image(&disk).format("raw").start();
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    client.write(0, header);
    client.flush();
    client.disconnect();
    server.stop();

    for format in ["raw", "mmap-raw"] {
        let trace = Trace::new(folder.path(), format);
        let server = trace.serve(Serve::image(&disk).format(format));
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        assert_eq!(client.size, 1 << 20, "{format}");
        assert_same("what the guest wrote", &client.read(0, header.len()), header);
        client.disconnect();
        server.stop();
        trace.assert_opened(&[&disk], &[&disk]);
    }
    // Without a stated format it is a qcow2 image now, whose backing file lies outside: refused, and left alone.
    let trace = Trace::new(folder.path(), "probed");
    let refusal = trace.refused(Serve::image(&disk).read_only());
    assert!(refusal.stderr.contains("/etc/shadow"), "{}", refusal.stderr);
    trace.assert_opened(&[&disk], &[&disk]);
}

#[test]
fn a_guest_cannot_turn_a_probed_raw_image_into_another_format() {
    let folder = support::scratch("probed-raw");
    let disk = folder.path().join("disk");
    let content = vec![7; 1 << 20];
    fs::write(&disk, &content).unwrap();
    let server = Serve::image(&disk).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    for magic in
        [&b"QFI\xfb"[..], b"KDMV", b"conectix", b"vhdxfile", b"LUKS\xba\xbe", b"QED\0", b"WithoutFreeSpace"]
    {
        let mut block = vec![0; 512];
        block[..magic.len()].copy_from_slice(magic);
        let reply = client.ask(Request::new(command::WRITE, 0, block.len()), &block);
        assert_ne!(reply.error, 0, "a write of {:?} at 0 was let through", String::from_utf8_lossy(magic));
        // Nor in two halves.
        let first = client.ask(Request::new(command::WRITE, 0, 2), &magic[..2]);
        let second = client.ask(Request::new(command::WRITE, 2, magic.len() - 2), &magic[2..]);
        assert!(first.error != 0 || second.error != 0, "in two halves: {:?}", String::from_utf8_lossy(magic));
        client.write(0, &[7; 512]);
    }
    assert_same("the image", &client.read_all(), &content);
    client.disconnect();
    server.stop();
}

#[test]
fn backing_files_outside_the_policy_are_not_opened() {
    let folder = support::scratch("backing");
    let own = folder.path().join("images");
    fs::create_dir(&own).unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, vec![0x5e; 1 << 20]).unwrap();
    symlink(&secret, own.join("link")).unwrap();
    symlink(folder.path(), own.join("out")).unwrap();
    let absolute = secret.display().to_string();
    let names = [
        "/etc/shadow",
        "../secret",
        "../images/../secret",
        "link",
        "out/secret",
        "/dev/fd/0",
        "/proc/self/environ",
        "/dev/zero",
        &absolute,
        &format!("file:{absolute}"),
        &format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{absolute}\"}}}}"),
        "nbd:unix:/run/none.sock",
        "nbd://127.0.0.1:1/",
        "http://127.0.0.1:1/disk",
        "fat:/etc",
        "vvfat:rw:/etc",
        "host_device:/dev/vda",
        "blkdebug::/etc/shadow",
        "./disk", // itself
    ];
    for (i, name) in names.into_iter().enumerate() {
        let disk = own.join("disk");
        let mut create = tool("qemu-img");
        create
            .current_dir(&own)
            .args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", name, "disk", "1M"]);
        support::tools::run(&mut create);
        let trace = Trace::new(folder.path(), &format!("backing{i}"));
        let refusal = trace.refused(Serve::image(&disk).read_only());
        assert!(refusal.stderr.lines().count() <= 6, "{name}: {}", refusal.stderr);
        let shown = name.split('"').next().unwrap(); // a text may escape what follows
        assert!(refusal.stderr.contains(shown), "the refusal of {name} does not name it: {}", refusal.stderr);
        let helps = refusal.stderr.contains("--allow-dir") || refusal.stderr.contains("--backing");
        assert!(helps, "the refusal of {name} names no flag that helps: {}", refusal.stderr);
        trace.assert_opened(&[&disk], &[]);
    }
}

#[test]
fn allowed_folders_are_allowed() {
    let folder = support::scratch("allowed");
    let (own, shared) = (folder.path().join("images"), folder.path().join("shared"));
    fs::create_dir(&own).unwrap();
    fs::create_dir(&shared).unwrap();
    let base = shared.join("base");
    let content = Rng::fixed(2).bytes(1 << 20);
    fs::write(&base, &content).unwrap();
    qemu_img(&own, &format!("create -q -f qcow2 -b {} -F raw disk", base.display()));
    let trace = Trace::new(folder.path(), "allowed");
    let allow = ["--allow-dir", shared.to_str().unwrap()];
    let server = trace.serve(Serve::image(own.join("disk")).read_only().args(&allow));
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the overlay", &client.read_all(), &content);
    client.disconnect();
    server.stop();
    trace.assert_opened(&[&own.join("disk"), &base], &[&own.join("disk"), &base]);
}

#[test]
fn data_files_outside_the_policy_are_not_opened() {
    let folder = support::scratch("data-file");
    let own = folder.path().join("images");
    fs::create_dir(&own).unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, vec![0x5e; 1 << 20]).unwrap();
    let absolute = secret.display().to_string();
    let names = [
        absolute.clone(),
        "../secret".into(),
        "/etc/shadow".into(),
        format!("file:{absolute}"),
        format!("json:{{\"driver\":\"file\",\"filename\":\"{absolute}\"}}"),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{absolute}\"}}}}"),
        "nbd://127.0.0.1:1/".into(),
    ];
    for (i, name) in names.iter().enumerate() {
        let disk = own.join("disk");
        // QEMU itself would open (and create) what is named, so it is told a harmless name of the same length.
        let harmless = "x".repeat(name.len());
        qemu_img(&own, &format!("create -q -f qcow2 -o data_file={harmless} disk 1M"));
        replace(&disk, harmless.as_bytes(), name.as_bytes());
        let trace = Trace::new(folder.path(), &format!("data{i}"));
        let refusal = trace.refused(Serve::image(&disk).read_only());
        assert!(!refusal.stderr.contains("panicked"), "{name}: {}", refusal.stderr);
        trace.assert_opened(&[&disk], &[]);
    }
}

/// Overwrites the one place where `old` stands in the first 64 KiB of a file.
fn replace(path: &Path, old: &[u8], new: &[u8]) {
    assert_eq!(old.len(), new.len());
    let content = fs::read(path).unwrap();
    let places: Vec<usize> = content[..64 << 10]
        .windows(old.len())
        .enumerate()
        .filter(|(_, w)| *w == old)
        .map(|(at, _)| at)
        .collect();
    assert_eq!(places.len(), 1, "{places:?}");
    fs::File::options().write(true).open(path).unwrap().write_all_at(new, places[0] as u64).unwrap();
}

/// A server below strace, and what it opened.
struct Trace {
    file: PathBuf,
}

impl Trace {
    fn new(folder: &Path, name: &str) -> Self {
        Self { file: folder.join(format!("{name}.strace")) }
    }

    /// -D keeps the server our child, so that signals and its status go the usual way; -y resolves descriptors.
    fn wrap(&self, serve: Serve) -> Serve {
        let file = self.file.to_str().unwrap();
        let calls = "trace=open,openat,openat2,creat,connect";
        serve.wrapper(&["strace", "-D", "-f", "-q", "-y", "-s", "4096", "-e", calls, "-o", file, "--"])
    }

    #[track_caller]
    fn serve(&self, serve: Serve) -> support::server::Server {
        self.wrap(serve).start()
    }

    #[track_caller]
    fn refused(&self, serve: Serve) -> Refusal {
        self.wrap(serve).start_refused()
    }

    /// Every file that was opened, or tried, is one of `allowed` or of the system; each of `needed` was opened.
    #[track_caller]
    fn assert_opened(&self, allowed: &[&Path], needed: &[&Path]) {
        let text = self.complete();
        let mut opened = Vec::new();
        for line in text.lines() {
            assert!(!line.contains(" connect("), "a connection: {line}");
            let Some(call) = Call::parse(line) else { continue };
            let file = call.result.as_ref().unwrap_or(&call.asked).clone();
            let good = call.is_folder
                || allowed.contains(&file.as_path())
                || (is_system(&file) && is_system(&call.asked));
            assert!(good, "opened outside the policy: {line}");
            opened.push(file);
        }
        assert!(!opened.is_empty(), "strace saw nothing: {text}");
        for file in needed {
            assert!(opened.iter().any(|other| other == file), "{} was not opened: {text}", file.display());
        }
    }

    /// The trace once strace has written all of it.
    fn complete(&self) -> String {
        let begin = Instant::now();
        loop {
            let text = String::from_utf8_lossy(&fs::read(&self.file).unwrap_or_default()).into_owned();
            if text.lines().last().is_some_and(|line| line.contains("+++ exited")) {
                return text;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "strace does not end: {text}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// One line such as `12 openat(AT_FDCWD</w>, "name", O_RDONLY|O_CLOEXEC) = 3</w/name>`.
#[derive(Debug)]
struct Call {
    asked: PathBuf,
    result: Option<PathBuf>,
    is_folder: bool,
}

impl Call {
    fn parse(line: &str) -> Option<Self> {
        let (head, rest) = line.split_once('"')?;
        if !head.contains("open") && !head.contains("creat") {
            return None;
        }
        let (name, rest) = closing_quote(rest);
        let base = head
            .split_once('<')
            .map_or("/", |(_, rest)| rest.rsplit_once('>').map_or(rest, |(path, _)| path));
        let asked = normal(&Path::new(base).join(name.replace("\\\"", "\"")));
        let result = rest.rsplit_once(" = ").and_then(|(_, result)| {
            let (_, path) = result.split_once('<')?;
            Some(PathBuf::from(path.trim_end().trim_end_matches('>')))
        });
        Some(Self { asked, result, is_folder: rest.contains("O_DIRECTORY") })
    }
}

fn is_system(file: &Path) -> bool {
    let text = file.to_string_lossy();
    let secret = text.starts_with("/proc") && (text.ends_with("/environ") || text.contains("/fd/"));
    DEVICES.contains(&text.as_ref()) || (SYSTEM.iter().any(|prefix| text.starts_with(prefix)) && !secret)
}

/// Splits at the quote that no backslash escapes.
fn closing_quote(text: &str) -> (&str, &str) {
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (&text[..i], &text[i + 1..]),
            _ => escaped = false,
        }
    }
    (text, "")
}

/// Without `.` and `..`, by the names alone.
fn normal(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(result.pop()),
            Component::CurDir => {}
            Component::Normal(_) | Component::RootDir | Component::Prefix(_) => result.push(part),
        }
    }
    result
}

#[test]
fn the_rig_reads_strace() {
    let call = Call::parse(r#"7 openat(AT_FDCWD</w>, "../a", O_RDONLY|O_CLOEXEC) = 3</a>"#).unwrap();
    assert_eq!((call.asked.as_path(), call.result.as_deref()), (Path::new("/a"), Some(Path::new("/a"))));
    let call = Call::parse(r#"7 openat2(4</w/x>, "b\"c", {flags=O_RDONLY}, 24) = -1 EXDEV (..)"#).unwrap();
    assert_eq!((call.asked.as_path(), call.result), (Path::new("/w/x/b\"c"), None));
    assert!(Call::parse("7 +++ exited with 0 +++").is_none());
}
