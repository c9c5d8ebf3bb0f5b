//! What an image may name: plain files in its folder or in allowed ones, and nothing else is opened.
//!
//! Whether a file was opened is asked of the kernel (inotify), not of the code under test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nbd_img_formats::driver::Format;
use nbd_img_formats::open::{Backing, OpenOptions, open};
use nbd_img_formats::storage::{FileOptions, FileStorage, LockMode};
use nbd_img_formats::{Error, ErrorKind};
use qcow2_support::{Folder, open_read_only, qemu, qemu_io, read_all};
use rustix::fs::inotify;

const MIB: usize = 1 << 20;

/// Tells whether a file has been opened.
struct Watch(OwnedFd);

impl Watch {
    fn on(path: &Path) -> Self {
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        let events = inotify::WatchFlags::OPEN | inotify::WatchFlags::ACCESS | inotify::WatchFlags::MODIFY;
        inotify::add_watch(&fd, path, events).unwrap();
        Watch(fd)
    }

    fn saw_something(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 4096]).is_ok()
    }
}

/// A folder with an image's folder `in` and a file outside of it, `out/secret`.
struct Scene {
    folder: Folder,
    template: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let folder = Folder::new();
        std::fs::create_dir(folder.file("in")).unwrap();
        std::fs::create_dir(folder.file("out")).unwrap();
        std::fs::write(folder.file("out/secret"), vec![0x55; MIB]).unwrap();
        let made = folder.create("template", "", MIB as u64);
        let template = std::fs::read(made).unwrap();
        Scene { folder, template }
    }

    fn secret(&self) -> PathBuf {
        self.folder.file("out/secret")
    }

    /// An image in `in` with this backing file, stated to be raw.
    fn overlay(&self, backing: &[u8]) -> PathBuf {
        let mut bytes = self.template.clone();
        bytes[8..16].copy_from_slice(&4096u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
        bytes[112..4096].fill(0);
        extension(&mut bytes[112..], 0xe279_2aca, b"raw");
        bytes[4096..4096 + backing.len()].copy_from_slice(backing);
        self.write("in/overlay.qcow2", &bytes)
    }

    /// An image in `in` with this external data file.
    fn with_data_file(&self, name: &[u8]) -> PathBuf {
        let mut bytes = self.template.clone();
        bytes[79] |= 4;
        bytes[112..4096].fill(0);
        extension(&mut bytes[112..], 0x4441_5441, name);
        self.write("in/data.qcow2", &bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.folder.file(name), bytes).unwrap();
        self.folder.file(name)
    }
}

fn extension(at: &mut [u8], magic: u32, data: &[u8]) {
    at[..4].copy_from_slice(&magic.to_be_bytes());
    at[4..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    at[8..8 + data.len()].copy_from_slice(data);
}

fn refusal(image: &Path, options: &OpenOptions) -> Error {
    match open(image, options) {
        Ok(_) => panic!("{} was opened", image.display()),
        Err(error) => error,
    }
}

/// Names that are never opened, whatever they point to.
fn evil_names(scene: &Scene) -> Vec<Vec<u8>> {
    let secret = scene.secret().to_str().unwrap().to_owned();
    let mut names: Vec<Vec<u8>> = [
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}"),
        format!("file:{secret}"),
        "file:../out/secret".to_owned(),
        "json:".to_owned(),
        "nbd://localhost:10809/x".to_owned(),
        "nbd:unix:/tmp/socket".to_owned(),
        "nbd+unix:///x?socket=/tmp/socket".to_owned(),
        "fd:3".to_owned(),
        "/dev/fdset/1".to_owned(),
        "/dev/zero".to_owned(),
        "/proc/self/mem".to_owned(),
        "http://localhost/x".to_owned(),
        "ssh://localhost/x".to_owned(),
        "vvfat:/".to_owned(),
        "fat:rw:/".to_owned(),
        format!("host_device:{secret}"),
        format!("blkdebug::{secret}"),
        ":".to_owned(),
        secret.clone(),
        format!("/proc/self/root{secret}"),
        "../out/secret".to_owned(),
        "./../out/secret".to_owned(),
        "sub/../../out/secret".to_owned(),
        "../in/../out/secret".to_owned(),
        "link".to_owned(),
        "linked-folder/secret".to_owned(),
        "link-to-link".to_owned(),
        "absolute-link".to_owned(),
        "..".to_owned(),
        ".".to_owned(),
        "sub".to_owned(),
        "pipe".to_owned(),
        "device".to_owned(),
        "/".to_owned(),
    ]
    .map(String::into_bytes)
    .into();
    names.push(b"../out/secret\0.raw".to_vec());
    names.push([b"../out/secret\0", &[b'x'; 1000][..]].concat());
    names
}

fn furnish(scene: &Scene) {
    let inside = |name: &str| scene.folder.file("in").join(name);
    std::fs::create_dir(inside("sub")).unwrap();
    let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, inside(name)).unwrap();
    link(Path::new("../out/secret"), "link");
    link(Path::new("../out"), "linked-folder");
    link(Path::new("link"), "link-to-link");
    link(&scene.secret(), "absolute-link");
    link(Path::new("/dev/zero"), "device");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, inside("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
}

#[test]
fn nothing_outside_is_opened_whatever_it_is_called() {
    let scene = Scene::new();
    furnish(&scene);
    let watch = Watch::on(&scene.secret());
    let options = OpenOptions::default();
    for name in evil_names(&scene) {
        let shown = String::from_utf8_lossy(&name).escape_debug().to_string();
        for image in [scene.overlay(&name), scene.with_data_file(&name)] {
            let error = refusal(&image, &options);
            assert_eq!(error.kind(), ErrorKind::Denied, "{shown}: {error}");
            let text = error.to_string();
            assert!(text.contains(&shown), "the name: {text}");
            assert!(text.contains(image.file_name().unwrap().to_str().unwrap()), "the image: {text}");
            assert!(text.contains("--allow-dir"), "the remedy: {text}");
        }
        assert!(!watch.saw_something(), "{shown} was opened");
    }
    // The watch does see what is opened.
    std::fs::read(scene.secret()).unwrap();
    assert!(watch.saw_something());
}

/// Set for the half of [`no_system_call_opens_what_is_outside`] that runs under strace.
const TRACED: &str = "NBD_IMG_TEST_TRACED";

/// The same asked of strace, for everything that could be opened or connected to. The test runs itself:
/// the traced half does nothing but open images.
#[test]
fn no_system_call_opens_what_is_outside() {
    if let Some(folder) = std::env::var_os(TRACED) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                assert_eq!(refusal(&path, &OpenOptions::default()).kind(), ErrorKind::Denied);
            }
        }
        return;
    }
    let scene = Scene::new();
    furnish(&scene);
    for (number, name) in evil_names(&scene).into_iter().enumerate() {
        for image in [scene.overlay(&name), scene.with_data_file(&name)] {
            let stem = image.file_stem().unwrap().to_str().unwrap();
            std::fs::rename(&image, image.with_file_name(format!("{stem}-{number}.qcow2"))).unwrap();
        }
    }
    let log = scene.folder.file("strace.log");
    let output = std::process::Command::new("strace")
        .args(["-f", "-y", "-e", "trace=open,openat,openat2,connect", "-o", log.to_str().unwrap()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "no_system_call_opens_what_is_outside"])
        .env(TRACED, scene.folder.file("in"))
        .output()
        .unwrap_or_else(|e| panic!("strace cannot be run ({e}); it is in the Debian package strace"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    check_trace(&std::fs::read_to_string(log).unwrap(), &scene);
}

/// What was opened, O_PATH apart, is an image in `in` or belongs to the system's way of running programs.
fn check_trace(log: &str, scene: &Scene) {
    let images = scene.folder.file("in");
    let mut opened_images = 0;
    for line in log.lines() {
        // With -y the result is the descriptor and what it stands for: `= 3</path>`.
        let Some((call, result)) = line.rsplit_once(" = ") else { continue };
        assert!(!call.contains("connect("), "{line}");
        let opened = result.split_once('<').map(|(_, path)| Path::new(path.trim_end_matches('>')));
        let Some(opened) = opened.filter(|_| !call.contains("O_PATH")) else { continue };
        let system = ["/lib", "/usr/lib", "/etc/ld.so", "/proc/", "/sys/fs/cgroup"];
        let ours = opened.starts_with(&images);
        opened_images += u32::from(ours && opened.extension().is_some_and(|extension| extension == "qcow2"));
        assert!(ours || system.iter().any(|prefix| opened.to_str().unwrap().starts_with(prefix)), "{line}");
        assert!(!opened.ends_with("mem") && !opened.ends_with("pipe"), "{line}");
    }
    assert!(opened_images >= 68, "the trace has only {opened_images} images");
}

#[test]
fn odd_names_inside_are_plain_names() {
    let scene = Scene::new();
    for name in ["new\nline", "sp ace", "sub/./x", "./x:y", "sub/../x", "-"] {
        std::fs::create_dir_all(scene.folder.file("in/sub")).unwrap();
        std::fs::write(scene.folder.file("in").join(name), vec![6; MIB]).unwrap();
        let image = scene.overlay(name.as_bytes());
        assert!(read_all(&*open_read_only(&image).driver) == vec![6; MIB]);
    }
    let error = refusal(&scene.overlay(&[b'x'; 1023]), &OpenOptions::default());
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::ENAMETOOLONG), "{error}");
    let error = refusal(&scene.overlay(b"not-there"), &OpenOptions::default());
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, libc::ENOENT), "{error}");
    assert!(error.to_string().contains("--backing"), "{error}");
}

#[test]
fn allowed_folders_are_followed_and_no_further() {
    let scene = Scene::new();
    furnish(&scene);
    let options = OpenOptions { allow_dirs: vec![scene.folder.file("out")], ..OpenOptions::default() };
    let secret = scene.secret();
    for name in ["../out/secret", "link", "linked-folder/secret", "absolute-link", secret.to_str().unwrap()] {
        let opened =
            open(&scene.overlay(name.as_bytes()), &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read_all(&*opened.driver) == vec![0x55; MIB]);
    }
    for name in ["../template", "device", "/dev/zero", "../out/../template"] {
        let error = refusal(&scene.overlay(name.as_bytes()), &options);
        assert_eq!(error.kind(), ErrorKind::Denied, "{name}: {error}");
    }
    let missing = OpenOptions { allow_dirs: vec![scene.folder.file("nowhere")], ..OpenOptions::default() };
    let error = refusal(&scene.overlay(b"link"), &missing);
    assert!(error.to_string().contains("--allow-dir"), "{error}");
}

/// The folder is the one of the path that was given, as with QEMU, also through links and from within.
#[test]
fn names_are_relative_to_the_image_that_names_them() {
    let scene = Scene::new();
    std::fs::create_dir(scene.folder.file("in/deep")).unwrap();
    std::fs::write(scene.folder.file("in/deep/base"), vec![8; MIB]).unwrap();
    let middle = scene.overlay(b"base");
    std::fs::rename(&middle, scene.folder.file("in/deep/middle")).unwrap();
    let top = scene.folder.file("in/top");
    let args = ["create", "-q", "-f", "qcow2", "-b", "deep/middle", "-F", "qcow2", top.to_str().unwrap()];
    qemu("qemu-img", args);
    assert!(read_all(&*open_read_only(&top).driver) == vec![8; MIB]);
    std::os::unix::fs::symlink(scene.folder.file("in"), scene.folder.file("alias")).unwrap();
    assert!(read_all(&*open_read_only(&scene.folder.file("alias/top")).driver) == vec![8; MIB]);
    // An absolute name that goes through the link, too.
    let base = scene.folder.file("alias/deep/base");
    let image = scene.overlay(base.to_str().unwrap().as_bytes());
    let through = scene.folder.file("alias").join(image.file_name().unwrap());
    assert!(read_all(&*open_read_only(&through).driver) == vec![8; MIB]);
}

#[test]
fn the_operator_overrides_what_the_image_names() {
    let scene = Scene::new();
    let image = scene.overlay(b"json:{}");
    let none = OpenOptions { backing: Backing::None, ..OpenOptions::default() };
    assert!(read_all(&*open(&image, &none).unwrap().driver) == vec![0; MIB]);
    let path = OpenOptions { backing: Backing::Path(scene.secret()), ..OpenOptions::default() };
    let driver = open(&image, &path).unwrap().driver;
    assert!(read_all(&*driver) == vec![0x55; MIB]);
    assert_eq!(driver.info().unwrap().chain[0].path, scene.secret());
    let error = refusal(&scene.secret(), &path);
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

/// CVE-2008-2004 and CVE-2010-2238: what a guest wrote into its raw disk does not make it an image.
#[test]
fn a_backing_file_that_is_stated_to_be_raw_stays_raw() {
    let scene = Scene::new();
    let trap = scene.overlay(b"../out/secret");
    let bytes = std::fs::read(&trap).unwrap();
    scene.write("in/base", &bytes);
    let watch = Watch::on(&scene.secret());
    let driver = open_read_only(&scene.overlay(b"base")).driver;
    assert!(read_all(&*driver)[..bytes.len()] == bytes);
    let stated = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let stated = open(&scene.folder.file("in/base"), &stated).unwrap().driver;
    assert!(read_all(&*stated)[..bytes.len()] == bytes);
    assert!(!watch.saw_something());
}

#[test]
fn files_of_the_chain_are_locked_as_readers() {
    let scene = Scene::new();
    let base = scene.write("in/base", &vec![1; MIB]);
    let image = scene.overlay(b"base");
    let writer = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    let held = FileStorage::open(&base, &writer).unwrap();
    assert_eq!(refusal(&image, &OpenOptions::default()).kind(), ErrorKind::Locked);
    let shared = OpenOptions { force_share: true, ..OpenOptions::default() };
    assert!(open(&image, &shared).is_ok());
    drop(held);
    let opened = open_read_only(&image);
    let another = open_read_only(&image);
    assert_eq!(FileStorage::open(&base, &writer).err().unwrap().kind(), ErrorKind::Locked);
    opened.driver.close().unwrap();
    another.driver.close().unwrap();
    assert!(FileStorage::open(&base, &writer).is_ok());
    assert!(opened.driver.pread(0, &mut [0]).is_err(), "closed");
}

/// A data file is opened for writing together with its image, and under the same rule: nothing outside.
#[test]
fn data_files_outside_are_not_opened_for_writing() {
    let scene = Scene::new();
    furnish(&scene);
    let watch = Watch::on(&scene.secret());
    let writable = OpenOptions { writable: true, format: Some(Format::Qcow2), ..OpenOptions::default() };
    for name in evil_names(&scene) {
        let shown = String::from_utf8_lossy(&name).escape_debug().to_string();
        let error = refusal(&scene.with_data_file(&name), &writable);
        assert_eq!(error.kind(), ErrorKind::Denied, "{shown}: {error}");
        assert!(!watch.saw_something(), "{shown} was opened");
    }
    let secret = std::fs::read(scene.secret()).unwrap();
    let image = scene.with_data_file(b"../out/secret");
    let allowed = OpenOptions { allow_dirs: vec![scene.folder.file("out")], ..writable.clone() };
    let driver = open(&image, &allowed).unwrap().driver;
    driver.pwrite(MIB as u64 / 2, &[9; 100], nbd_img_formats::Durability::Later).unwrap();
    driver.close().unwrap();
    let after = std::fs::read(scene.secret()).unwrap();
    assert!(after[MIB / 2..][..100] == [9; 100] && after[..MIB / 2] == secret[..MIB / 2]);
    // The image itself is no data file of its own.
    let error = refusal(&scene.with_data_file(b"data.qcow2"), &writable);
    assert!(matches!(error.kind(), ErrorKind::Denied | ErrorKind::Locked), "{error}");
}

/// An image that somebody else reads is not opened for writing, and not touched.
#[test]
fn what_is_in_use_is_refused_and_stays_as_it_is() {
    let scene = Scene::new();
    let image = scene.folder.create("image.qcow2", "cluster_size=4k", MIB as u64);
    qemu_io(&image, &["write -P 1 0 64k".to_owned()]);
    let before = (std::fs::read(&image).unwrap(), std::fs::metadata(&image).unwrap().modified().unwrap());
    let reader = FileOptions { writable: false, direct: false, lock: LockMode::Reader };
    let held = FileStorage::open(&image, &reader).unwrap();
    for format in [None, Some(Format::Qcow2)] {
        let error = refusal(&image, &OpenOptions { writable: true, format, ..OpenOptions::default() });
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
        assert!(error.to_string().contains("lock"), "{error}");
    }
    drop(held);
    let after = (std::fs::read(&image).unwrap(), std::fs::metadata(&image).unwrap().modified().unwrap());
    assert!(before == after);
    let driver = open_read_only(&image).driver;
    let refused = driver.pwrite(0, &[1], nbd_img_formats::Durability::Later).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
}
