//! From arguments to options: everything that needs more than one argument to be checked.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbd_img_formats::Format;
use nbd_img_formats::open::{Backing, OpenOptions};

use super::args::{DiscardArg, ImageArgs, InfoArgs, ListenArgs, ServeArgs};
use super::{export_spec, tls};
use crate::export::{BlockSizes, ExportSpec, Temporary};
use crate::server::access::AccessRules;
use crate::server::{EndTimes, Manners, ServeOptions};
use crate::session::Times;
use crate::transport::unix::FileAccess;
use crate::transport::{Address, Place};

/// Longest string of the protocol in bytes (NBD protocol, "Values").
const PROTOCOL_STRING_MAX_LEN: usize = 4096;

/// Longest name of a dirty bitmap in bytes (QEMU's limit).
const BITMAP_NAME_MAX_LEN: usize = 1023;

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
    let general = std::mem::take(&mut args.access);
    let mut access = AccessRules { general, ..AccessRules::default() };
    let options = ServeOptions {
        addresses: addresses(&args.listen),
        listen_is_given,
        socket_access: socket_access(&args.listen)?,
        control: args.listen.control.clone(),
        oldstyle: args.listen.oldstyle,
        tls: None,
        allow_plaintext: args.listen.allow_plaintext,
        max_connections: args.listen.max_connections,
        handshake_timeout: handshake_timeout(args.listen.handshake_timeout),
        peer_timeout: args.listen.peer_timeout,
        times: Times { poll: args.listen.poll, ..Times::default() },
        exit_last: args.life.exit_last,
        pid_file: args.life.pid_file.clone(),
        ready_fd: args.life.ready_fd,
        end_times: EndTimes { drain: args.life.drain_timeout, flush: args.life.flush_timeout },
        manners: Manners::default(),
        exports: exports(args, &mut access)?,
        access: AccessRules::default(),
    };
    let exports_need_it = options.exports.iter().any(|export| export.tls_required);
    let tls = tls::options(tls_args, exports_need_it)?;
    tls::check_access(&access, tls.as_ref())?;
    let options = ServeOptions { tls, access, ..options };
    check_oldstyle(&options)?;
    Ok(options)
}

/// Zero is no limit, as with the other times of clients.
pub fn handshake_timeout(asked: Duration) -> Duration {
    /// Handshakes still end: after a day. Our choice.
    const NO_LIMIT: Duration = Duration::from_secs(86_400);
    if asked.is_zero() { NO_LIMIT } else { asked }
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
    let unix = args.socket.iter().cloned().map(|path| Place::Unix(path).into());
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

/// Mode and owner of Unix sockets, of which there has to be one.
fn socket_access(args: &ListenArgs) -> Result<FileAccess, String> {
    let flag = match (args.socket_mode, args.socket_owner) {
        (Some(_), _) => "--socket-mode",
        (None, Some(_)) => "--socket-owner",
        (None, None) => return Ok(FileAccess::default()),
    };
    let has_file = |address: &Address| matches!(address.place, Place::Unix(_));
    if !addresses(args).iter().any(has_file) {
        return Err(format!(
            "{flag} is for the files of Unix sockets: add --socket PATH or --listen unix:PATH"
        ));
    }
    Ok(FileAccess { mode: args.socket_mode, owner: args.socket_owner })
}

/// The oldstyle negotiation has neither names nor a way to ask for TLS.
fn check_oldstyle(options: &ServeOptions) -> Result<(), String> {
    if !options.oldstyle {
        return Ok(());
    }
    if options.exports.len() > 1 {
        return Err(format!(
            "--oldstyle has no names by which clients could choose among {} exports: serve one",
            options.exports.len()
        ));
    }
    if options.tls.is_some() {
        return Err("--oldstyle and --tls cannot be used together: clients have no way to ask for TLS; add --tls off, \
                    or leave out --oldstyle"
            .to_owned());
    }
    Ok(())
}

/// The exports: the one IMAGE with its flags, or all `--export`, or both if the IMAGE has no flags.
/// Puts the rules of each into `access`.
fn exports(args: ServeArgs, access: &mut AccessRules) -> Result<Vec<ExportSpec>, String> {
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
        let mut parsed = export_spec::parse(spec)?;
        let own = std::mem::take(&mut parsed.image.access);
        let export = export(parsed.path, parsed.image)?;
        if !own.is_empty() {
            access.own.insert(export.name.clone(), own);
        }
        exports.push(export);
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
        ("--temporary", image.temporary.is_some()),
        ("--temporary-dir", image.temporary_dir.is_some()),
        ("--cache", image.cache.is_some()),
        ("--cluster-cache", image.cluster_cache.is_some()),
        ("--aio", image.aio.is_some()),
        ("--discard", image.discard.is_some()),
        ("--detect-zeroes", image.detect_zeroes.is_some()),
        ("--compress", image.compress.is_some()),
        ("--load-snapshot", image.load_snapshot.is_some()),
        ("--bitmap", !image.bitmap.is_empty()),
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
    check_combination(&image).map_err(about)?;
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
    let cache = image.cache.map(Into::into).unwrap_or_default();
    let format = image.format.map(Format::from);
    let defaults = OpenOptions::default();
    let spec = ExportSpec {
        name,
        description,
        // A snapshot is a state of the past: there is nothing to write to.
        read_only: image.read_only || image.load_snapshot.is_some() && image.temporary.is_none(),
        offset: image.offset.unwrap_or(0),
        size: image.size,
        tls_required: image.tls_required,
        exact_window: false,
        single_client: false,
        hide_depth: false,
        block_sizes: BlockSizes::Best,
        cache,
        aio: image.aio.map(Into::into).unwrap_or_default(),
        bitmaps: bitmaps(image.bitmap).map_err(|text| about(&text))?,
        detect_zeroes: image.detect_zeroes.map(Into::into).unwrap_or_default(),
        temporary: image
            .temporary
            .map(|sharing| Temporary { folder: temporary_dir(image.temporary_dir), sharing: sharing.into() }),
        open: OpenOptions {
            format,
            exact_size: image.exact_size,
            backing: backing(image.backing),
            allow_dirs: image.allow_dir,
            snapshot: image.load_snapshot,
            discard: image.discard.is_none_or(|discard| discard == DiscardArg::Unmap),
            compress: image.compress,
            force_share: image.force_share,
            cluster_cache_len: image.cluster_cache.unwrap_or(defaults.cluster_cache_len),
            ..defaults
        },
        path: path.clone(),
    };
    if format == Some(Format::MmapRaw) && spec.cache.is_direct() {
        return Err(about("mmap-raw reads through the page cache; use --cache writeback or writethrough"));
    }
    Ok(spec)
}

/// Flags of one image that do not go together.
fn check_combination(image: &ImageArgs) -> Result<(), &'static str> {
    if image.temporary.is_some() && image.read_only {
        return Err("--temporary takes writes; without it --read-only refuses them");
    }
    if image.temporary_dir.is_some() && image.temporary.is_none() {
        return Err("--temporary-dir is about --temporary, which is missing");
    }
    if image.force_share && !image.read_only && image.temporary.is_none() {
        return Err("--force-share only reads; add --read-only");
    }
    let kept = !image.read_only && image.load_snapshot.is_none() && image.temporary.is_none();
    if image.compress.is_some() && !kept {
        return Err(
            "--compress is about writes to the image: it goes neither with --read-only and --load-snapshot nor with --temporary",
        );
    }
    Ok(())
}

/// Every bitmap once; its context's name must be a string of the protocol.
fn bitmaps(names: Vec<String>) -> Result<Vec<String>, String> {
    let mut seen = HashSet::new();
    let wrong = |name: &&String| name.is_empty() || name.len() > BITMAP_NAME_MAX_LEN || name.contains('\0');
    match names.iter().find(wrong) {
        Some(name) => Err(format!("--bitmap {name:?} cannot be the name of a bitmap")),
        None => Ok(names.into_iter().filter(|name| seen.insert(name.clone())).collect()),
    }
}

/// As QEMU: what may become as large as a disk does not go where memory may be.
pub(super) fn temporary_dir(arg: Option<PathBuf>) -> PathBuf {
    let from_environment =
        || std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    arg.or_else(from_environment).unwrap_or_else(|| PathBuf::from("/var/tmp"))
}

/// What `--backing` says.
pub fn backing(arg: Option<PathBuf>) -> Backing {
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
    fn no_time_for_a_handshake_is_any_time() {
        let time = |text| options(&["--handshake-timeout", text, "a.img"]).unwrap().handshake_timeout;
        assert!(time("0") >= Duration::from_secs(86_400));
        assert_eq!(time("0.5"), Duration::from_millis(500));
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
            "--cluster-cache",
            "8M",
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
        assert_eq!(export.open.cluster_cache_len, 8 << 20);
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
    fn an_export_keeps_to_its_own_rules() {
        let options = options(&[
            "a.img",
            "--access",
            "read:uid=1",
            "--access",
            "write:cidr=10.0.0.0/8",
            "--export",
            "name=b,file=b.img,access=read:anyone",
            "--export",
            "name=c,file=c.img",
        ])
        .unwrap();
        let rules = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        assert_eq!(options.access.general, rules(&["read:uid=1", "write:cidr=10.0.0.0/8"]));
        assert_eq!(options.access.own.len(), 1);
        assert_eq!(options.access.own["b"], rules(&["read:anyone"]));
    }

    #[test]
    fn a_socket_replaces_the_default_address() {
        let options =
            options(&["a.img", "--socket", "s", "--listen", "unix:s", "--listen", "[::1]:0"]).unwrap();
        let tcp = Place::Tcp { host: "::1".into(), port: 0 };
        assert_eq!(options.addresses, [Place::Unix("s".into()).into(), tcp.into()]);
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
            // What does not go together at all is told first.
            (vec!["a", "-x", &long, "--force-share"], "add --read-only"),
            (vec!["--export", "name=a,file=a,read-only,temporary"], "--temporary takes writes"),
            (vec!["--export", "name=a,file=a,temporary-dir=d"], "--temporary-dir is about"),
            (vec!["a", "-r", "--compress", "zlib"], "--compress is about writes"),
            (vec!["a", "--temporary", "--compress", "zlib"], "--compress is about writes"),
            (vec!["a", "--format", "mmap-raw", "--cache", "none"], "page cache"),
            (vec!["a", "-x", &long], "4096 bytes"),
            (vec!["a", "--access", "read:tls-dns=a"], "no client is asked for a certificate"),
            (vec!["a", "--socket-mode", "600"], "--socket-mode is for"),
            (vec!["a", "--socket-owner", "0", "--listen", "unix:@s"], "--socket-owner is for"),
            (vec!["a", "--export", "name=b,file=b", "--oldstyle"], "--oldstyle has no names"),
            (vec!["a", "--oldstyle", "--tls-dir", "d"], "--oldstyle and --tls cannot"),
            (vec!["a", "--oldstyle", "--tls", "optional", "--tls-dir", "d"], "--oldstyle and --tls cannot"),
        ] {
            let error = options(&line).err().unwrap_or_default();
            assert!(error.contains(hint), "{line:?}: {error}");
        }
    }
}
