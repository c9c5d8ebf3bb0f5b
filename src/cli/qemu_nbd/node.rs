//! Block nodes: from options with dotted keys to the one image that they describe.
//!
//! Options are checked as QEMU checks them: one that a driver does not know is an error, and so is a driver that this
//! program does not have. Nothing is opened here.

use std::path::PathBuf;

use nbd_img_formats::Format;

use super::tree::{self, Flat, Scalar};
use super::values;
use crate::export::DetectZeroes;

/// How a file is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Aio {
    /// `threads`.
    Threads,
    /// `native`: Linux's older interface, which is for O_DIRECT.
    Native,
    /// `io_uring`.
    IoUring,
}

/// A part of a file or of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Window {
    /// Its first byte.
    pub offset: u64,
    /// Its length; up to the end if absent.
    pub size: Option<u64>,
}

/// What stands in place of the backing file that an image names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackingNode {
    /// No backing file.
    None,
    /// This one.
    Image {
        /// The file.
        path: PathBuf,
        /// Its format, if stated.
        format: Option<Format>,
    },
}

/// An image and how to treat it. What is absent was not said.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// Its format; probed if absent.
    pub format: Option<Format>,
    /// Which part of the file is the image.
    pub file_window: Window,
    /// Which part of the disk is shown.
    pub window: Window,
    /// Whether writes are to be compressed.
    pub compress: bool,
    /// The backing file.
    pub backing: Option<BackingNode>,
    /// The external data file.
    pub data_file: Option<PathBuf>,
    /// `read-only`.
    pub read_only: Option<bool>,
    /// `auto-read-only`.
    pub auto_read_only: bool,
    /// `force-share`.
    pub force_share: bool,
    /// `cache.direct`.
    pub direct: Option<bool>,
    /// `discard`: whether it is passed on.
    pub discard: Option<bool>,
    /// `detect-zeroes`.
    pub detect_zeroes: Option<DetectZeroes>,
    /// `aio`.
    pub aio: Option<Aio>,
    /// Most bytes of tables in memory.
    pub table_cache_len: Option<u64>,
}

/// The image that a file name stands for, whose format may be stated beside it.
pub fn from_filename(name: &str, path: PathBuf, format: Option<&str>) -> Result<Image, String> {
    if let Some(json) = name.strip_prefix("json:") {
        let mut flat = tree::from_json(json)?;
        // As with QEMU, `-f` goes before what the file name says of itself.
        if let Some(format) = format {
            flat.insert("driver".to_owned(), Scalar::Text(format.to_owned()));
        }
        return from_options(flat);
    }
    let protocol = name.split('/').next().unwrap_or_default().split_once(':').map(|(protocol, _)| protocol);
    let path = match protocol {
        None => path,
        Some("file" | "host_device") => PathBuf::from(name.split_once(':').map_or("", |(_, rest)| rest)),
        Some(known) if PROTOCOLS.contains(&known) => return Err(not_supported("protocol", known)),
        Some(unknown) => return Err(format!("Unknown protocol '{unknown}'")),
    };
    let format = format.map(format_of).transpose()?.flatten();
    Ok(Image { path, format, ..Image::default() })
}

/// The image that a set of options describes.
pub fn from_options(mut flat: Flat) -> Result<Image, String> {
    let mut image = Image::default();
    Walk::new(&mut image).top(&mut flat)?;
    Ok(image)
}

/// Drivers that QEMU has and this program does not.
const FOREIGN: [&str; 34] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "host_cdrom",
    "https",
    "http",
    "ftp",
    "ftps",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "parallels",
    "preallocate",
    "qcow",
    "qed",
    "quorum",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// Protocols that QEMU has and this program does not.
const PROTOCOLS: [&str; 14] = [
    "nbd", "nbd+tcp", "nbd+unix", "nbds", "http", "https", "ftp", "ftps", "ssh", "iscsi", "rbd", "fat",
    "nfs", "blkdebug",
];

fn not_supported(what: &str, name: &str) -> String {
    format!(
        "the {what} '{name}' is not supported by nbd-img, which serves raw and qcow2 images in files and devices"
    )
}

/// The format of this name; absent for a protocol's driver, whose bytes are the disk.
fn format_of(name: &str) -> Result<Option<Format>, String> {
    match name {
        "raw" | "file" | "host_device" => Ok(Some(Format::Raw)),
        "qcow2" => Ok(Some(Format::Qcow2)),
        known if FOREIGN.contains(&known) => Err(not_supported("driver", known)),
        unknown => Err(format!("Unknown driver '{unknown}'")),
    }
}

/// Walks from the topmost node down to the file.
struct Walk<'a> {
    image: &'a mut Image,
    /// Whether a qcow2 node was passed: what comes below is about its file.
    in_file: bool,
    /// Whether a format is known: a raw node or a file ends the search for one.
    format: Option<Format>,
}

impl<'a> Walk<'a> {
    fn new(image: &'a mut Image) -> Self {
        Walk { image, in_file: false, format: None }
    }

    /// The topmost node, whose format may have to be probed.
    fn top(mut self, flat: &mut Flat) -> Result<(), String> {
        if text(flat, "driver").is_some() {
            self.node(flat)?;
        } else if flat.contains_key("filename") {
            self.file(flat, "file")?;
        } else {
            self.generic(flat, true)?;
            self.child(flat)?;
            finish(flat, "format", "")?;
            // What was walked through was the file: its format is still to be found.
            self.format = None;
        }
        self.image.format = self.format;
        Ok(())
    }

    fn node(&mut self, flat: &mut Flat) -> Result<(), String> {
        match take_text(flat, "driver").as_deref() {
            None if flat.contains_key("filename") => self.file(flat, "file"),
            None => Err("a node in the options has neither a driver nor a filename".to_owned()),
            Some("raw") => self.raw(flat),
            Some("qcow2") => self.qcow2(flat),
            Some("compress") => {
                if self.in_file {
                    return Err("the driver 'compress' belongs above the format".to_owned());
                }
                self.image.compress = true;
                self.generic(flat, true)?;
                self.child(flat)?;
                finish(flat, "format", "compress")
            }
            Some(driver @ ("file" | "host_device")) => self.file(flat, driver),
            Some(other) => Err(format_of(other).err().unwrap_or_default()),
        }
    }

    fn raw(&mut self, flat: &mut Flat) -> Result<(), String> {
        let offset = take_size(flat, "offset")?.unwrap_or(0);
        let size = take_size(flat, "size")?;
        if size.is_some_and(|size| size % 512 != 0) {
            return Err("Specified size is not multiple of 512".to_owned());
        }
        self.generic(flat, !self.in_file)?;
        let window = if self.in_file { &mut self.image.file_window } else { &mut self.image.window };
        *window = within(*window, Window { offset, size })?;
        self.child(flat)?;
        finish(flat, "format", "raw")
    }

    fn qcow2(&mut self, flat: &mut Flat) -> Result<(), String> {
        if self.in_file {
            return Err("a qcow2 image inside of a qcow2 image is not supported".to_owned());
        }
        self.generic(flat, true)?;
        (self.in_file, self.format) = (true, Some(Format::Qcow2));
        for key in IGNORED_OF_QCOW2 {
            take_text(flat, key);
        }
        tree::take_child(flat, "overlap-check");
        let caches = [take_size(flat, "cache-size")?, take_size(flat, "l2-cache-size")?];
        self.image.table_cache_len = caches.into_iter().flatten().max();
        if !tree::take_child(flat, "encrypt").is_empty() {
            return Err("encrypted images (encrypt.*) are not supported".to_owned());
        }
        self.image.backing = backing(flat)?;
        let mut data_file = tree::take_child(flat, "data-file");
        if !data_file.is_empty() {
            self.image.data_file = Some(plain_file(&mut data_file)?.path);
        }
        refuse_node_name(flat, "data-file")?;
        self.child(flat)?;
        finish(flat, "format", "qcow2")
    }

    /// A file or a device, which ends the walk.
    fn file(&mut self, flat: &mut Flat, driver: &str) -> Result<(), String> {
        self.generic(flat, false)?;
        let filename = take_text(flat, "filename").filter(|name| !name.is_empty());
        let filename = filename.ok_or_else(|| format!("The '{driver}' block driver requires a file name"))?;
        if text(flat, "locking").is_some_and(|locking| values::switch(locking) == Some(false)) {
            return Err(
                "locking=off is not supported: images are always locked; force-share=on reads one that is \
                        in use"
                    .to_owned(),
            );
        }
        for key in IGNORED_OF_FILE {
            take_text(flat, key);
        }
        if let Some(aio) = take_text(flat, "aio") {
            let parsed = parse_aio(&aio);
            self.image.aio =
                Some(parsed.ok_or_else(|| format!("Parameter 'aio' does not accept value '{aio}'"))?);
        }
        self.image.path = filename.strip_prefix("file:").unwrap_or(&filename).into();
        self.format.get_or_insert(Format::Raw);
        finish(flat, "protocol", driver)
    }

    /// Goes on with the node below.
    fn child(&mut self, flat: &mut Flat) -> Result<(), String> {
        refuse_node_name(flat, "file")?;
        let mut child = tree::take_child(flat, "file");
        if child.is_empty() {
            return Err("A block device must be specified for \"file\"".to_owned());
        }
        self.node(&mut child)
    }

    /// Options that every node has. `top` is whether the guest's disk is meant rather than a file below a format.
    fn generic(&mut self, flat: &mut Flat, top: bool) -> Result<(), String> {
        take_text(flat, "node-name");
        let image = &mut *self.image;
        let read_only = take_switch(flat, "read-only")?;
        image.read_only =
            if image.read_only == Some(true) { image.read_only } else { read_only.or(image.read_only) };
        image.auto_read_only |= take_switch(flat, "auto-read-only")?.unwrap_or(false);
        image.force_share |= take_switch(flat, "force-share")?.unwrap_or(false);
        if take_switch(flat, "cache.no-flush")? == Some(true) {
            tracing::warn!("cache.no-flush is not used: what a client flushes is made durable");
        }
        if let Some(direct) = take_switch(flat, "cache.direct")? {
            image.direct = Some(direct || image.direct == Some(true));
        }
        if let Some(discard) = take_text(flat, "discard") {
            let passed = parse_discard(&discard)
                .ok_or_else(|| format!("Parameter 'discard' does not accept value '{discard}'"))?;
            // Every node on the way has to pass it on.
            image.discard = Some(passed && image.discard != Some(false));
        }
        if let Some(detect) = take_text(flat, "detect-zeroes") {
            let parsed = parse_detect_zeroes(&detect)
                .ok_or_else(|| format!("Parameter 'detect-zeroes' does not accept value '{detect}'"))?;
            if top {
                image.detect_zeroes = Some(parsed);
            }
        }
        Ok(())
    }
}

/// Options of qcow2 that tune what is not there to be tuned.
const IGNORED_OF_QCOW2: [&str; 9] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];

/// The same of files.
const IGNORED_OF_FILE: [&str; 5] =
    ["locking", "aio-max-batch", "drop-cache", "x-check-cache-dropped", "pr-manager"];

/// The backing file that the options give.
fn backing(flat: &mut Flat) -> Result<Option<BackingNode>, String> {
    let given = match flat.remove("backing") {
        None => None,
        Some(Scalar::Null) => Some(BackingNode::None),
        Some(Scalar::Text(name)) if name.is_empty() => Some(BackingNode::None),
        Some(Scalar::Text(name)) => return Err(tree::no_such_node(&name)),
    };
    let mut child = tree::take_child(flat, "backing");
    if child.is_empty() {
        return Ok(given);
    }
    let image = plain_file(&mut child)?;
    Ok(Some(BackingNode::Image { path: image.path, format: image.format }))
}

/// A node below an image, of which no part may be cut out.
fn plain_file(flat: &mut Flat) -> Result<Image, String> {
    let mut image = Image::default();
    Walk::new(&mut image).top(flat)?;
    let whole = Window::default();
    if image.window != whole || image.file_window != whole || image.compress || image.backing.is_some() {
        return Err(format!(
            "{}: a part of a file, compress, or a chain in the options is not supported below an image",
            image.path.display()
        ));
    }
    Ok(image)
}

/// The part `inner` of the part `outer`: `inner` comes closer to the file.
fn within(outer: Window, inner: Window) -> Result<Window, String> {
    let offset =
        inner.offset.checked_add(outer.offset).ok_or("the offsets of the raw nodes are too large")?;
    let left = match inner.size {
        None => None,
        Some(size) => Some(
            size.checked_sub(outer.offset).ok_or("an offset lies beyond the end of the raw node below")?,
        ),
    };
    let size = match (outer.size, left) {
        (Some(size), Some(left)) if size > left => {
            return Err("a raw node is larger than the raw node below".to_owned());
        }
        (Some(size), _) => Some(size),
        (None, left) => left,
    };
    Ok(Window { offset, size })
}

/// `aio`.
pub fn parse_aio(text: &str) -> Option<Aio> {
    match text {
        "threads" => Some(Aio::Threads),
        "native" => Some(Aio::Native),
        "io_uring" => Some(Aio::IoUring),
        _ => None,
    }
}

/// `discard`: whether it is passed on.
pub fn parse_discard(text: &str) -> Option<bool> {
    match text {
        "ignore" | "off" => Some(false),
        "unmap" | "on" => Some(true),
        _ => None,
    }
}

/// `detect-zeroes`.
pub fn parse_detect_zeroes(text: &str) -> Option<DetectZeroes> {
    match text {
        "off" => Some(DetectZeroes::Off),
        "on" => Some(DetectZeroes::On),
        "unmap" => Some(DetectZeroes::Unmap),
        _ => None,
    }
}

/// Refuses what no driver has asked for.
fn finish(flat: &Flat, kind: &str, driver: &str) -> Result<(), String> {
    match flat.keys().next() {
        None => Ok(()),
        Some(key) if kind == "protocol" => {
            Err(format!("Block protocol '{driver}' doesn't support the option '{key}'"))
        }
        Some(key) => Err(format!("Block format '{driver}' does not support the option '{key}'")),
    }
}

fn refuse_node_name(flat: &Flat, key: &str) -> Result<(), String> {
    match text(flat, key) {
        Some(name) => Err(tree::no_such_node(name)),
        None => Ok(()),
    }
}

fn text<'a>(flat: &'a Flat, key: &str) -> Option<&'a str> {
    match flat.get(key) {
        Some(Scalar::Text(text)) => Some(text),
        Some(Scalar::Null) | None => None,
    }
}

fn take_text(flat: &mut Flat, key: &str) -> Option<String> {
    match flat.remove(key) {
        Some(Scalar::Text(text)) => Some(text),
        Some(Scalar::Null) | None => None,
    }
}

fn take_switch(flat: &mut Flat, key: &str) -> Result<Option<bool>, String> {
    match take_text(flat, key) {
        None => Ok(None),
        Some(text) => match values::switch(&text) {
            Some(on) => Ok(Some(on)),
            None => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
        },
    }
}

fn take_size(flat: &mut Flat, key: &str) -> Result<Option<u64>, String> {
    match take_text(flat, key) {
        None => Ok(None),
        Some(text) => match values::size(&text) {
            Some(size) => Ok(Some(size)),
            None => Err(format!("Parameter '{key}' expects a size")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Image, String> {
        from_options(tree::from_list(text)?)
    }

    fn name(text: &str, format: Option<&str>) -> Result<Image, String> {
        from_filename(text, text.into(), format)
    }

    fn image(path: &str, format: Option<Format>) -> Image {
        Image { path: path.into(), format, ..Image::default() }
    }

    #[test]
    fn file_names() {
        assert_eq!(name("a:b/c", None), Err("Unknown protocol 'a'".to_owned()));
        assert_eq!(name("./a:b", None), Ok(image("./a:b", None)));
        assert_eq!(name("file:a", Some("raw")), Ok(image("a", Some(Format::Raw))));
        assert_eq!(name("x", Some("nope")), Err("Unknown driver 'nope'".to_owned()));
        assert!(name("x", Some("vmdk")).unwrap_err().contains("not supported"));
        assert!(name("https://host/x", None).unwrap_err().contains("'https' is not supported"));
    }

    #[test]
    fn nodes_in_both_notations() {
        let qcow2 = Image { backing: Some(BackingNode::None), ..image("f", Some(Format::Qcow2)) };
        let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"f"},"backing":null}"#;
        assert_eq!(name(json, None), Ok(qcow2));
        let raw = name(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"f"}}"#, Some("raw"));
        assert_eq!(raw, Ok(image("f", Some(Format::Raw))));
        let compressed = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=a,,b";
        let want = Image { compress: true, ..image("a,b", Some(Format::Qcow2)) };
        assert_eq!(list(compressed), Ok(want));
        assert_eq!(list("driver=file,filename=a"), Ok(image("a", Some(Format::Raw))));
        assert_eq!(list("file.filename=a"), Ok(image("a", None)));
        let named = list("driver=qcow2,backing.driver=raw,backing.file.filename=b,file.filename=a").unwrap();
        let raw = BackingNode::Image { path: "b".into(), format: Some(Format::Raw) };
        assert_eq!(named.backing, Some(raw));
    }

    #[test]
    fn windows() {
        let part = list("driver=raw,offset=1M,size=512,file.driver=file,file.filename=a").unwrap();
        assert_eq!(part.window, Window { offset: 1 << 20, size: Some(512) });
        let tar =
            list("driver=qcow2,file.driver=raw,file.offset=1K,file.size=2K,file.file.filename=a").unwrap();
        assert_eq!(tar.file_window, Window { offset: 1024, size: Some(2048) });
        assert_eq!((tar.window, tar.format), (Window::default(), Some(Format::Qcow2)));
        let two = list(
            "driver=raw,offset=512,size=512,file.driver=raw,file.offset=1K,file.size=1K,file.file.filename=a",
        );
        assert_eq!(two.unwrap().window, Window { offset: 1536, size: Some(512) });
        let beyond = list("driver=raw,offset=2K,file.driver=raw,file.size=1K,file.file.filename=a");
        assert!(beyond.unwrap_err().contains("beyond"));
    }

    #[test]
    fn generic_options_of_any_node() {
        let got = list(
            "driver=qcow2,read-only=on,discard=unmap,detect-zeroes=on,node-name=n,cache.no-flush=on,l2-cache-size=1M,\
             lazy-refcounts=on,file.driver=file,file.filename=a,file.cache.direct=on,file.aio=native,\
             file.locking=auto,file.discard=ignore,force-share=on,auto-read-only=on",
        )
        .unwrap();
        let want = Image {
            read_only: Some(true),
            auto_read_only: true,
            force_share: true,
            direct: Some(true),
            discard: Some(false),
            detect_zeroes: Some(DetectZeroes::On),
            aio: Some(Aio::Native),
            table_cache_len: Some(1 << 20),
            ..image("a", Some(Format::Qcow2))
        };
        assert_eq!(got, want);
    }

    #[test]
    fn mistakes() {
        for (text, want) in [
            ("driver=raw,file.filename=a,foo=bar", "Block format 'raw' does not support the option 'foo'"),
            (
                "driver=raw,file.driver=file,file.filename=a,file.foo=b",
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            ("driver=nope", "Unknown driver 'nope'"),
            ("driver=qcow2", "A block device must be specified for \"file\""),
            ("driver=raw,size=1,file.filename=a", "Specified size is not multiple of 512"),
            ("driver=raw,read-only=maybe,file.filename=a", "Parameter 'read-only' expects 'on' or 'off'"),
            ("driver=raw,file=x", "Cannot find device='x' nor node-name='x'"),
            ("driver=qcow2,backing=b,file.filename=a", "Cannot find device='b' nor node-name='b'"),
        ] {
            assert_eq!(list(text), Err(want.to_owned()), "{text}");
        }
        for (text, hint) in [
            ("driver=luks,file.filename=a", "'luks' is not supported"),
            ("driver=nbd,host=h", "'nbd' is not supported"),
            ("driver=file,filename=a,locking=off", "locking=off is not supported"),
            ("driver=qcow2,encrypt.format=luks,file.filename=a", "encrypt"),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
