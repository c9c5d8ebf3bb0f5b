//! `nbd-img create`: a new image file.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nbd_img_formats::Format;
use nbd_img_formats::open::{CreateRequest, create};
use nbd_img_formats::qcow2::{BackingName, Compression, CreateOptions, DataFileName, Preallocation};

use super::Error;
use super::args::FormatArg;
use super::export_spec::split_fields;
use super::size;

/// The keys of `-o`, for error texts.
const KEYS: &str = "size, compat, cluster_size, refcount_bits, lazy_refcounts, extended_l2, compression_type, \
                    backing_file, backing_fmt, data_file, data_file_raw, preallocation, nocow";

/// Make a new image file
///
/// The file appears when it is whole and durable, or not at all.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// The file to make
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Size of the disk (suffixes K M G T; rounded up to 512) [default: that of the backing file]
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub size: Option<u64>,

    /// The format to make
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: FormatArg,

    /// What the image is to be: KEY=VALUE, separated by commas (repeatable)
    ///
    /// The keys are those of qemu-img: compat=0.10|1.1 (or version=2|3), cluster_size=S, refcount_bits=N,
    /// lazy_refcounts=on|off, extended_l2=on|off, compression_type=zlib|zstd, backing_file=P,
    /// backing_fmt=raw|qcow2, data_file=P, data_file_raw=on|off, preallocation=off|metadata|falloc|full,
    /// nocow=on|off, size=S. A comma inside of a value is written twice.
    #[arg(short, long = "option", value_name = "KEY=VALUE,...")]
    pub options: Vec<OsString>,

    /// The image is an overlay of this file
    #[arg(short, long, value_name = "PATH")]
    pub backing: Option<PathBuf>,

    /// The backing file's format
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,

    /// Do not look at the backing file, which need not be there; SIZE is needed then
    #[arg(short = 'u', long)]
    pub trust_backing: bool,

    /// Also take backing and data files from below this folder (repeatable) [default: the image's own]
    #[arg(long, value_name = "FOLDER")]
    pub allow_dir: Vec<PathBuf>,

    /// Replace a file that is there, unless it is in use, or write to a block device
    #[arg(long)]
    pub force: bool,

    /// Say nothing when it has worked
    #[arg(short, long)]
    pub quiet: bool,
}

/// Makes the file and says what it is.
pub fn run(args: CreateArgs) -> Result<(), Error> {
    let quiet = args.quiet;
    let request = request(args).map_err(Error::Usage)?;
    let size = create(&request).map_err(Error::Image)?;
    if quiet {
        return Ok(());
    }
    let path = request.path.to_string_lossy();
    let text = format!("{}: {} image of {size} bytes\n", path.escape_debug(), request.format);
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::Output),
    }
}

/// What `-o` says, before it is looked at together.
#[derive(Default)]
struct Keys {
    options: CreateOptions,
    size: Option<u64>,
    backing: Option<Vec<u8>>,
    backing_format: Option<String>,
    data_file: Option<Vec<u8>>,
    data_file_raw: bool,
    nocow: bool,
}

fn request(args: CreateArgs) -> Result<CreateRequest, String> {
    let format = Format::from(args.format);
    let mut keys = Keys::default();
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for text in &args.options {
        let wrong = |why: String| format!("-o {}: {why}", text.to_string_lossy().escape_debug());
        for field in split_fields(text.as_bytes()) {
            let at = field.iter().position(|byte| *byte == b'=');
            let at =
                at.ok_or_else(|| wrong(format!("{} wants a value; the keys are {KEYS}", lossy(&field))))?;
            let (key, value) = (&field[..at], &field[at + 1..]);
            if seen.iter().any(|other| other == key) {
                return Err(wrong(format!("{} is given twice", lossy(key))));
            }
            if format != Format::Qcow2 && !matches!(key, b"size" | b"preallocation" | b"nocow") {
                return Err(wrong(format!("{} is for qcow2 images (-f qcow2)", lossy(key))));
            }
            seen.push(key.to_vec());
            keys.set(key, value).map_err(wrong)?;
        }
    }
    keys.request(args, format)
}

impl Keys {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let options = &mut self.options;
        match key {
            b"size" => self.size = Some(size::parse(&text(key, value)?)?),
            b"compat" | b"version" => options.version = version(value)?,
            b"cluster_size" => options.cluster_len = size::parse(&text(key, value)?)?,
            b"refcount_bits" => {
                options.refcount_bits =
                    text(key, value)?.parse().map_err(|_| format!("{} wants a number", lossy(key)))?;
            }
            b"lazy_refcounts" => options.lazy_refcounts = switch(key, value)?,
            b"extended_l2" => options.extended_l2 = switch(key, value)?,
            b"compression_type" => {
                options.compression = match value {
                    b"zlib" => Compression::Zlib,
                    b"zstd" => Compression::Zstd,
                    _ => return Err("compression_type is zlib or zstd".to_owned()),
                }
            }
            b"backing_file" => self.backing = Some(value.to_vec()),
            b"backing_fmt" => self.backing_format = Some(text(key, value)?),
            b"data_file" => self.data_file = Some(value.to_vec()),
            b"data_file_raw" => self.data_file_raw = switch(key, value)?,
            b"preallocation" => {
                options.preallocation = match value {
                    b"off" => Preallocation::Off,
                    b"metadata" => Preallocation::Metadata,
                    b"falloc" => Preallocation::Falloc,
                    b"full" => Preallocation::Full,
                    _ => return Err("preallocation is off, metadata, falloc or full".to_owned()),
                }
            }
            b"nocow" => self.nocow = switch(key, value)?,
            unknown => return Err(format!("{} is not a key; the keys are {KEYS}", lossy(unknown))),
        }
        Ok(())
    }

    /// All of it together.
    fn request(self, args: CreateArgs, format: Format) -> Result<CreateRequest, String> {
        let backing = one(
            self.backing,
            args.backing.map(|path| path.into_os_string().into_vec()),
            "backing_file",
            "-b",
        )?;
        let backing_format = one(self.backing_format, args.backing_format, "backing_fmt", "-F")?;
        let size = one(self.size, args.size, "size", "SIZE")?;
        let backing = match (backing, backing_format) {
            (None, None) => None,
            (Some(name), Some(format)) => Some(BackingName { name, format }),
            (Some(_), None) => {
                return Err(
                    "the backing file's format is missing (-F raw or -F qcow2): a guest could make a raw \
                            disk look like another format"
                        .to_owned(),
                );
            }
            (None, Some(_)) => return Err("-F is about a backing file, which is missing (-b)".to_owned()),
        };
        let data_file = self.data_file.map(|name| DataFileName { name, raw: self.data_file_raw });
        if self.data_file_raw && data_file.is_none() {
            return Err("data_file_raw=on is about a data file, which is missing (data_file=P)".to_owned());
        }
        Ok(CreateRequest {
            path: args.file,
            format,
            size,
            options: CreateOptions { backing, data_file, ..self.options },
            trust_backing: args.trust_backing,
            nocow: self.nocow,
            replace: args.force,
            allow_dirs: args.allow_dir,
        })
    }
}

/// What was said in one of two ways.
fn one<T>(key: Option<T>, flag: Option<T>, key_name: &str, flag_name: &str) -> Result<Option<T>, String> {
    match (key, flag) {
        (Some(_), Some(_)) => Err(format!("both {key_name}= and {flag_name} are given")),
        (key, flag) => Ok(key.or(flag)),
    }
}

fn version(value: &[u8]) -> Result<u32, String> {
    match value {
        b"0.10" | b"v2" | b"2" => Ok(2),
        b"1.1" | b"v3" | b"3" => Ok(3),
        _ => Err("compat is 0.10 (version 2) or 1.1 (version 3)".to_owned()),
    }
}

fn switch(key: &[u8], value: &[u8]) -> Result<bool, String> {
    match value {
        b"on" => Ok(true),
        b"off" => Ok(false),
        _ => Err(format!("{} is on or off", lossy(key))),
    }
}

fn text(key: &[u8], value: &[u8]) -> Result<String, String> {
    let text = OsStr::from_bytes(value).to_str();
    text.map(str::to_owned).ok_or_else(|| format!("the value of {} is not UTF-8", lossy(key)))
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}
