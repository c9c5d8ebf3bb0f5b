//! `nbd-img resize`: another size for a disk that nobody uses.

use std::io::{self, Write};
use std::path::PathBuf;

use nbd_img_formats::Format;
use nbd_img_formats::open::{OpenOptions, Resized, SizeChange, resize};

use super::args::FormatArg;
use super::{Error, options, size};

/// Change the size of a disk that nobody uses
///
/// What a larger disk has more reads as zeroes. Internal snapshots keep their size. A crash in the middle
/// leaves a disk of either size.
#[derive(Debug, clap::Args)]
pub struct ResizeArgs {
    /// The image file
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,

    /// The new size, or by how much it changes (suffixes K M G T; rounded up to 512)
    #[arg(value_name = "SIZE|+SIZE|-SIZE", value_parser = parse_change, allow_hyphen_values = true)]
    pub change: SizeChange,

    /// Make the disk smaller: what lies behind the new end is lost
    #[arg(long)]
    pub shrink: bool,

    /// The image's format; else found by its magic number
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<FormatArg>,

    /// Use this backing file, or none, whatever the image says
    #[arg(long, value_name = "PATH|none")]
    pub backing: Option<PathBuf>,

    /// Also take backing files from below this folder (repeatable) [default: the image's own]
    #[arg(long, value_name = "FOLDER")]
    pub allow_dir: Vec<PathBuf>,

    /// Say nothing when it has worked
    #[arg(short, long)]
    pub quiet: bool,
}

/// Changes the size and says from what to what.
pub fn run(args: ResizeArgs) -> Result<(), Error> {
    let open = OpenOptions {
        format: args.format.map(Format::from),
        backing: options::backing(args.backing),
        allow_dirs: args.allow_dir,
        ..OpenOptions::default()
    };
    let Resized { from, to } = resize(&args.image, args.change, args.shrink, &open).map_err(Error::Image)?;
    if args.quiet {
        return Ok(());
    }
    let path = args.image.to_string_lossy();
    let text = format!("{}: {from} bytes before, {to} now\n", path.escape_debug());
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::Output),
    }
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
