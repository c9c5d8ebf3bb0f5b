//! The format of a file is found by its magic; formats that cannot be served are refused by name.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;

use std::path::Path;

use nbd_img_formats::driver::Format;
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::{Durability, ErrorKind};
use qcow2_support::{Folder, open_read_only, qemu, read_all};

fn assert_refused(path: &Path, name: &str) {
    for writable in [false, true] {
        let options = OpenOptions { writable, ..OpenOptions::default() };
        let error = open(path, &options).err().unwrap_or_else(|| panic!("{name} was opened"));
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let text = error.to_string();
        assert!(text.contains(name) && text.contains("--format raw"), "{text}");
    }
    let stated = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let opened = open(path, &stated).unwrap();
    assert!(!opened.probed);
    let bytes = std::fs::read(path).unwrap();
    assert!(read_all(&*opened.driver)[..bytes.len()] == bytes);
}

#[test]
fn images_of_other_programs_are_refused_by_name() {
    let folder = Folder::new();
    let kinds: [(&str, &str, &str); 9] = [
        ("vmdk", "", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vpc", "", "VHD"),
        ("vpc", "subformat=fixed", "VHD"),
        ("vhdx", "", "VHDX"),
        ("vdi", "", "VDI"),
        ("qed", "", "QED"),
        ("qcow", "", "qcow (version 1)"),
        ("parallels", "", "Parallels"),
    ];
    for (number, (format, options, name)) in kinds.into_iter().enumerate() {
        let path = folder.file(&format!("{number}.{format}"));
        let mut args = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path.to_str().unwrap(), "1M"]);
        qemu("qemu-img", args);
        assert_refused(&path, name);
    }
    let luks = folder.file("luks");
    let args = ["create", "-q", "--object", "secret,id=s,data=x", "-f", "luks"];
    let args = [&args[..], &["-o", "key-secret=s,iter-time=10", luks.to_str().unwrap(), "1M"]].concat();
    qemu("qemu-img", args);
    assert_refused(&luks, "LUKS");
}

#[test]
fn whatever_has_no_magic_is_raw() {
    let folder = Folder::new();
    let contents: [&[u8]; 7] =
        [b"", b"QFI", b"QFI\xfa\0\0\0\x03", b"\0QFI\xfb\0\0\0\x03", b"conecti", &[0; 511], &[0xff; 5000]];
    for content in contents {
        let path = folder.file("disk");
        std::fs::write(&path, content).unwrap();
        let opened = open_read_only(&path);
        assert!(opened.probed);
        assert_eq!(opened.driver.facts().format, Format::Raw);
        assert!(read_all(&*opened.driver)[..content.len()] == *content);
    }
}

#[test]
fn qcow2_is_found_and_a_stated_format_wins() {
    let folder = Folder::new();
    for version in ["compat=v2", "compat=v3"] {
        let path = folder.create("image", version, 1 << 20);
        let opened = open_read_only(&path);
        assert_eq!((opened.driver.facts().format, opened.probed), (Format::Qcow2, true));
        let stated = OpenOptions { format: Some(Format::MmapRaw), ..OpenOptions::default() };
        let opened = open(&path, &stated).unwrap();
        assert_eq!((opened.driver.facts().format, opened.probed), (Format::MmapRaw, false));
        assert_eq!(read_all(&*opened.driver)[..4], *b"QFI\xfb");
    }
    let raw = folder.file("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    let stated = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    assert_eq!(open(&raw, &stated).err().unwrap().kind(), ErrorKind::InvalidFormat);
    let snapshot = OpenOptions { snapshot: Some("x".to_owned()), ..OpenOptions::default() };
    assert_eq!(open(&raw, &snapshot).err().unwrap().kind(), ErrorKind::InvalidInput);
    let error = open(&folder.file("nowhere"), &OpenOptions::default()).err().unwrap();
    assert_eq!(error.errno(), libc::ENOENT);
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert!(open(folder.path(), &OpenOptions::default()).is_err());
}

/// A disk whose format was guessed must not be turned into an image of another format by its guest.
#[test]
fn a_probed_raw_disk_does_not_take_a_magic() {
    let folder = Folder::new();
    let path = folder.file("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let magics: [&[u8]; 4] = [b"QFI\xfb\0\0\0\x03", b"KDMV", b"vhdxfile", b"conectix"];
    for magic in magics {
        let probed = OpenOptions { writable: true, ..OpenOptions::default() };
        let driver = open(&path, &probed).unwrap().driver;
        let error = driver.pwrite(0, magic, Durability::Later).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        assert!(read_all(&*driver) == [0; 4096]);
        driver.pwrite(512, magic, Durability::Later).unwrap();
        driver.pwrite(512, &[0; 16], Durability::Later).unwrap();
        driver.close().unwrap();
        let stated = OpenOptions { format: Some(Format::Raw), ..probed };
        let driver = open(&path, &stated).unwrap().driver;
        driver.pwrite(0, magic, Durability::Later).unwrap();
        driver.pwrite(0, &[0; 16], Durability::Later).unwrap();
        driver.close().unwrap();
    }
}
