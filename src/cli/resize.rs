//! `nbd-img resize`: another size for a disk, by itself or by the server that serves it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nbd_img_formats::Format;
use nbd_img_formats::open::{OpenOptions, Resized, SizeChange, resize};

use super::args::FormatArg;
use super::{Error, control, options, size};
use crate::export;
use crate::server::control::protocol::Request;

/// Change the size of a disk that nobody uses, or of one that is served with --control
///
/// What a larger disk has more reads as zeroes; a raw data file loses what it held there. Internal snapshots keep their
/// size; a data file becomes at least as long as the disk, and is cut where the disk becomes smaller; a device has to be
/// long enough. Dirty bitmaps follow: what is new is clean, and one that is in use has to be removed first. A crash or
/// failure in the middle, and a crash of the server before it has stored them, leaves a disk of either size, and may cost
/// the dirty bitmaps: begin with a full backup then. It may also leave a data file that is too long, which --shrink with
/// the size that the disk has cuts.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    /// The image file; none with --control
    #[arg(value_name = "IMAGE", required_unless_present = "control")]
    pub image: Option<PathBuf>,

    /// The new size, or by how much it changes (suffixes K M G T; rounded up to 512). With --control, none stands for
    /// what the file or device has by now, and -SIZE comes behind a --
    #[arg(value_name = "SIZE|+SIZE|-SIZE", value_parser = parse_change, allow_hyphen_values = true,
          required_unless_present = "control")]
    pub change: Option<SizeChange>,

    /// Let the server do it that has this control socket (nbd-img serve --control PATH)
    ///
    /// Clients that are connected keep the size that they were told, and the disk becomes smaller only when none of
    /// them was told a larger one.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["format", "backing", "allow_dir"])]
    pub control: Option<PathBuf>,

    /// The export that the disk has there [default: the only one]
    #[arg(long, value_name = "NAME", requires = "control")]
    pub export: Option<String>,

    /// Make the disk smaller: what lies behind the new end is lost
    #[arg(long)]
    pub shrink: bool,

    /// The image's format; else found by its magic number
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<FormatArg>,

    /// Use this backing file, or none, whatever the image says
    #[arg(long, value_name = "PATH|none")]
    pub backing: Option<PathBuf>,

    /// Also take backing and data files from below this folder (repeatable) [default: the image's own]
    #[arg(long, value_name = "FOLDER")]
    pub allow_dir: Vec<PathBuf>,

    /// Say nothing when it has worked
    #[arg(short, long)]
    pub quiet: bool,
}

/// Changes the size and says from what to what.
pub fn run(args: ResizeArgs) -> Result<(), Error> {
    let quiet = args.quiet;
    let text = match (&args.control, args.image.clone(), args.change) {
        (Some(socket), only, change) => resize_served(socket, only.as_deref(), change, &args)?,
        (None, Some(image), Some(change)) => resize_alone(&image, change, args)?,
        // clap has asked for both.
        (None, _, _) => return Err(Error::Usage("an image and a size are needed".to_owned())),
    };
    if quiet {
        return Ok(());
    }
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::Output),
    }
}

fn resize_alone(image: &Path, change: SizeChange, args: ResizeArgs) -> Result<String, Error> {
    let open = OpenOptions {
        format: args.format.map(Format::from),
        backing: options::backing(args.backing),
        allow_dirs: args.allow_dir,
        ..OpenOptions::default()
    };
    let Resized { from, to } = resize(image, change, args.shrink, &open).map_err(Error::Image)?;
    Ok(format!("{}: {from} bytes before, {to} now\n", image.to_string_lossy().escape_debug()))
}

/// `only` is the size: what would be the image comes first on the command line.
fn resize_served(
    socket: &Path,
    only: Option<&Path>,
    change: Option<SizeChange>,
    args: &ResizeArgs,
) -> Result<String, Error> {
    let change = match (only, change) {
        (None, None) => None,
        (Some(only), None) => {
            let size = parse_change(&only.to_string_lossy());
            Some(
                size.map_err(|why| {
                    Error::Usage(format!("with --control there is a size and no image: {why}"))
                })?,
            )
        }
        (_, Some(_)) => return Err(Error::Usage("with --control there is a size and no image".to_owned())),
    };
    let request = Request::Resize { export: args.export.clone(), change, shrink: args.shrink };
    let export::Resized { from, to, export } = control::ask(socket, &request)?;
    let seen = if export == to { String::new() } else { format!(", clients see {export} of them") };
    Ok(format!("{from} bytes before, {to} now{seen}\n"))
}

fn parse_change(text: &str) -> Result<SizeChange, String> {
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => size::parse(more).map(SizeChange::More),
        (None, Some(less)) => size::parse(less).map(SizeChange::Less),
        (None, None) => size::parse(text).map(SizeChange::To),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes() {
        assert_eq!(parse_change("10G"), Ok(SizeChange::To(10 << 30)));
        assert_eq!(parse_change("+512"), Ok(SizeChange::More(512)));
        assert_eq!(parse_change("-1.5M"), Ok(SizeChange::Less(3 << 19)));
        for text in ["", "+", "-", "--1", "+-1", "5 G"] {
            assert!(parse_change(text).is_err(), "{text}");
        }
    }
}
