//! From arguments to options: everything that needs more than one argument to be checked.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use nbd_img_formats::Format;
use nbd_img_formats::open::{Backing, OpenOptions};

use super::args::{DiscardArg, ImageArgs, InfoArgs, ListenArgs, ServeArgs};
use super::{export_spec, tls};
use crate::export::ExportSpec;
use crate::server::{Manners, ServeOptions};
use crate::session::Times;
use crate::transport::Address;

/// Longest string of the protocol in bytes (NBD protocol, "Values").
const PROTOCOL_STRING_MAX_LEN: usize = 4096;

/// What `nbd-img info` is asked.
pub struct InfoOptions {
    /// The image.
    pub path: PathBuf,
    /// Whether to answer in JSON.
    pub json: bool,
    /// How to open it.
    pub open: OpenOptions,
}

/// Checks the arguments of `nbd-img serve`.
pub fn serve(mut args: ServeArgs) -> Result<ServeOptions, String> {
    let listen_is_given = args.listen.socket.is_some() || !args.listen.listen.is_empty();
    let tls_args = std::mem::take(&mut args.tls);
    let options = ServeOptions {
        addresses: addresses(&args.listen),
        listen_is_given,
        tls: None,
        allow_plaintext: args.listen.allow_plaintext,
        max_connections: args.listen.max_connections,
        handshake_timeout: args.listen.handshake_timeout,
        times: Times { poll: args.listen.poll, ..Times::default() },
        exit_last: args.life.exit_last,
        pid_file: args.life.pid_file.clone(),
        ready_fd: args.life.ready_fd,
        drain_timeout: args.life.drain_timeout,
        manners: Manners::default(),
        exports: exports(args)?,
    };
    let exports_need_it = options.exports.iter().any(|export| export.tls_required);
    Ok(ServeOptions { tls: tls::options(tls_args, exports_need_it)?, ..options })
}

/// Checks the arguments of `nbd-img info`.
pub fn info(args: InfoArgs) -> Result<InfoOptions, String> {
    let open = OpenOptions {
        format: args.format.map(Format::from),
        backing: backing(args.backing),
        allow_dirs: args.allow_dir,
        force_share: args.force_share,
        ..OpenOptions::default()
    };
    Ok(InfoOptions { path: args.image, json: args.json, open })
}

/// Where to listen when the starter has passed no sockets.
fn addresses(args: &ListenArgs) -> Vec<Address> {
    let unix = args.socket.iter().cloned().map(Address::Unix);
    let mut all: Vec<Address> = Vec::new();
    for address in unix.chain(args.listen.iter().cloned()) {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    if all.is_empty() {
        all.push(Address::default_tcp());
    }
    all
}

/// The exports: the one IMAGE with its flags, or all `--export`, or both if the IMAGE has no flags.
fn exports(args: ServeArgs) -> Result<Vec<ExportSpec>, String> {
    let mut exports = Vec::new();
    match (args.images.as_slice(), args.exports.is_empty()) {
        ([], true) => {
            return Err("no image: write nbd-img serve IMAGE, or --export name=N,file=PATH".to_owned());
        }
        ([], false) => refuse_flags(&args.image)?,
        ([image], true) => exports.push(export(image.clone(), args.image)?),
        ([image], false) => {
            refuse_flags(&args.image)?;
            exports.push(export(image.clone(), ImageArgs::default())?);
        }
        ([first, second, ..], _) => {
            return Err(format!(
                "several images ({}, {}): give each its own --export name=N,file=PATH",
                shown(first),
                shown(second)
            ));
        }
    }
    for spec in &args.exports {
        let parsed = export_spec::parse(spec)?;
        exports.push(export(parsed.path, parsed.image)?);
    }
    let mut names = HashSet::new();
    match exports.iter().find(|export| !names.insert(export.name.as_str())) {
        Some(twice) => Err(format!("two exports have the name {:?}; give each its own", twice.name)),
        None => Ok(exports),
    }
}

/// With `--export`, a flag for one image would leave open which image it means.
fn refuse_flags(image: &ImageArgs) -> Result<(), String> {
    let given = [
        ("--format", image.format.is_some()),
        ("--read-only", image.read_only),
        ("--export-name", image.export_name.is_some()),
        ("--description", image.description.is_some()),
        ("--offset", image.offset.is_some()),
        ("--size", image.size.is_some()),
        ("--exact-size", image.exact_size),
        ("--cache", image.cache.is_some()),
        ("--aio", image.aio.is_some()),
        ("--discard", image.discard.is_some()),
        ("--detect-zeroes", image.detect_zeroes.is_some()),
        ("--load-snapshot", image.load_snapshot.is_some()),
        ("--backing", image.backing.is_some()),
        ("--allow-dir", !image.allow_dir.is_empty()),
        ("--force-share", image.force_share),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((flag, _)) => Err(format!(
            "{flag} is for one image; with --export write it inside, as in \
             --export name=N,file=PATH,{}",
            if *flag == "--export-name" { "..." } else { flag.trim_start_matches("--") }
        )),
    }
}

fn export(path: PathBuf, image: ImageArgs) -> Result<ExportSpec, String> {
    let about = |text: &str| format!("{}: {text}", shown(&path));
    let name = image.export_name.unwrap_or_default();
    let description = image.description.unwrap_or_default();
    for (what, text) in [("export name", &name), ("description", &description)] {
        if text.len() > PROTOCOL_STRING_MAX_LEN {
            return Err(about(&format!(
                "the {what} is longer than the {PROTOCOL_STRING_MAX_LEN} bytes that NBD allows"
            )));
        }
        if text.contains('\0') {
            return Err(about(&format!("the {what} contains a zero byte")));
        }
    }
    if image.force_share && !image.read_only {
        return Err(about("--force-share only reads; add --read-only"));
    }
    let cache = image.cache.map(Into::into).unwrap_or_default();
    let format = image.format.map(Format::from);
    let spec = ExportSpec {
        name,
        description,
        // A snapshot is a state of the past: there is nothing to write to.
        read_only: image.read_only || image.load_snapshot.is_some(),
        offset: image.offset.unwrap_or(0),
        size: image.size,
        tls_required: image.tls_required,
        exact_window: false,
        single_client: false,
        hide_depth: false,
        cache,
        aio: image.aio.map(Into::into).unwrap_or_default(),
        detect_zeroes: image.detect_zeroes.map(Into::into).unwrap_or_default(),
        open: OpenOptions {
            format,
            exact_size: image.exact_size,
            backing: backing(image.backing),
            allow_dirs: image.allow_dir,
            snapshot: image.load_snapshot,
            discard: image.discard.is_none_or(|discard| discard == DiscardArg::Unmap),
            force_share: image.force_share,
            ..OpenOptions::default()
        },
        path: path.clone(),
    };
    if format == Some(Format::MmapRaw) && spec.cache.is_direct() {
        return Err(about("mmap-raw reads through the page cache; use --cache writeback or writethrough"));
    }
    Ok(spec)
}

fn backing(arg: Option<PathBuf>) -> Backing {
    match arg {
        None => Backing::Follow,
        Some(path) if path.as_os_str() == "none" => Backing::None,
        Some(path) => Backing::Path(path),
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Args, Command};
    use crate::export::CacheMode;
    use clap::Parser;

    fn options(line: &[&str]) -> Result<ServeOptions, String> {
        let args = Args::try_parse_from([&["nbd-img", "serve"], line].concat()).unwrap();
        let Command::Serve(args) = args.command else { panic!("not serve") };
        serve(*args)
    }

    #[test]
    fn one_image_with_its_flags() {
        let options = options(&[
            "-r",
            "-x",
            "disk",
            "-D",
            "about",
            "--offset",
            "1M",
            "--size",
            "2M",
            "--cache",
            "none",
            "--format",
            "raw",
            "--backing",
            "none",
            "a.img",
        ])
        .unwrap();
        let [export] = options.exports.as_slice() else { panic!("one export") };
        assert_eq!((export.name.as_str(), export.description.as_str()), ("disk", "about"));
        assert_eq!((export.offset, export.size), (1 << 20, Some(2 << 20)));
        assert_eq!(export.cache, CacheMode::None);
        assert_eq!(export.open.backing, Backing::None);
        assert!(export.read_only && export.open.discard);
        assert_eq!(options.addresses, [Address::default_tcp()]);
        assert!(!options.listen_is_given);
    }

    #[test]
    fn several_images() {
        let options = options(&["a.img", "--export", "name=b,file=b.img,read-only,discard=ignore"]).unwrap();
        let names: Vec<_> =
            options.exports.iter().map(|export| (export.name.as_str(), export.read_only)).collect();
        assert_eq!(names, [("", false), ("b", true)]);
        assert!(!options.exports[1].open.discard);
    }

    #[test]
    fn a_socket_replaces_the_default_address() {
        let options =
            options(&["a.img", "--socket", "s", "--listen", "unix:s", "--listen", "[::1]:0"]).unwrap();
        let tcp = Address::Tcp { host: "::1".into(), port: 0, tls_first: false };
        assert_eq!(options.addresses, [Address::Unix("s".into()), tcp]);
    }

    #[test]
    fn a_snapshot_is_read_only() {
        assert!(options(&["a.img", "--load-snapshot", "s"]).unwrap().exports[0].read_only);
    }

    #[test]
    fn contradictions_are_explained() {
        let long = "x".repeat(4097);
        for (line, hint) in [
            (vec![], "no image"),
            (vec!["a", "b"], "give each its own --export"),
            (vec!["-r", "--export", "name=a,file=a"], "--read-only is for one image"),
            (vec!["-x", "n", "a", "--export", "name=a,file=a"], "--export-name is for one image"),
            (vec!["--size", "1M", "--export", "name=a,file=a"], "name=N,file=PATH,size"),
            (vec!["a", "--export", "name=,file=b"], "two exports have the name \"\""),
            (vec!["a", "--force-share"], "add --read-only"),
            (vec!["a", "--format", "mmap-raw", "--cache", "none"], "page cache"),
            (vec!["a", "-x", &long], "4096 bytes"),
        ] {
            let error = options(&line).err().unwrap_or_default();
            assert!(error.contains(hint), "{line:?}: {error}");
        }
    }
}
