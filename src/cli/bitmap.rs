//! `nbd-img bitmap`: the persistent dirty bitmaps of a qcow2 image, while nobody serves or uses it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use nbd_img_formats::info::BitmapInfo;
use nbd_img_formats::open::{Backing, OpenOptions, change_bitmap, open};
use nbd_img_formats::qcow2::BitmapChange;
use nbd_img_formats::{BlockDriver, Format};
use std::sync::Arc;

use super::args::FormatArg;
use super::{Error, size};

/// What to do with bitmaps. Each change is there as a whole or not at all, also after a crash.
#[derive(Debug, Subcommand)]
pub enum BitmapCommand {
    /// Add a bitmap in which nothing is marked
    Add(AddArgs),
    /// Remove a bitmap, also one that was left in use
    Remove(BitmapArgs),
    /// Mark nothing in a bitmap any more
    Clear(BitmapArgs),
    /// Have a bitmap record what is written from now on
    Enable(BitmapArgs),
    /// Leave a bitmap as it is from now on
    Disable(BitmapArgs),
    /// Mark in a bitmap what others have marked
    Merge(MergeArgs),
    /// List the bitmaps with their granularities and flags
    List(ListArgs),
}

/// Which bitmap.
#[derive(Debug, Args)]
pub struct BitmapArgs {
    /// The image: a qcow2 file or a block device with one
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// The bitmap
    #[arg(value_name = "NAME")]
    name: String,
}

/// `nbd-img bitmap add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// Which one.
    #[command(flatten)]
    bitmap: BitmapArgs,

    /// Bytes of the disk for each bit, a power of two from 512 to 2G (suffixes K M G)
    /// [default: a cluster, but at least 4K and at most 64K]
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    granularity: Option<u64>,

    /// Do not record what is written yet
    #[arg(long)]
    disabled: bool,
}

/// `nbd-img bitmap merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Which one.
    #[command(flatten)]
    bitmap: BitmapArgs,

    /// The bitmaps whose marks it gets
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<String>,

    /// The image with the sources [default: IMAGE]
    #[arg(short = 'b', long, value_name = "IMAGE")]
    source_file: Option<PathBuf>,

    /// Its format; else found by its magic number
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "source_file")]
    source_format: Option<FormatArg>,
}

/// `nbd-img bitmap list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The image: a qcow2 file or a block device with one
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// Answer in JSON
    #[arg(long)]
    json: bool,

    /// List what an image has that another program writes; it may be out of date
    #[arg(long)]
    force_share: bool,
}

/// Does what the command says.
pub fn run(command: BitmapCommand) -> Result<(), Error> {
    let (bitmap, change) = match command {
        BitmapCommand::List(list) => return print(&list),
        BitmapCommand::Merge(merge) => return run_merge(&merge),
        BitmapCommand::Add(AddArgs { bitmap, granularity, disabled }) => {
            (bitmap, BitmapChange::Add { granularity, enabled: !disabled })
        }
        BitmapCommand::Remove(bitmap) => (bitmap, BitmapChange::Remove),
        BitmapCommand::Clear(bitmap) => (bitmap, BitmapChange::Clear),
        BitmapCommand::Enable(bitmap) => (bitmap, BitmapChange::Enable),
        BitmapCommand::Disable(bitmap) => (bitmap, BitmapChange::Disable),
    };
    change_bitmap(&bitmap.image, &bitmap.name, change).map_err(Error::Image)
}

fn run_merge(merge: &MergeArgs) -> Result<(), Error> {
    let BitmapArgs { image, name } = &merge.bitmap;
    let format = merge.source_format.map(Format::from);
    let from = merge.source_file.as_deref().map(|file| open_image(file, format, false)).transpose()?;
    for source in &merge.sources {
        let change = match &from {
            Some(from) => BitmapChange::MergeFrom(&**from, source),
            None => BitmapChange::Merge(source),
        };
        change_bitmap(image, name, change).map_err(Error::Image)?;
    }
    Ok(())
}

/// The image without what is below it: bitmaps need none of that.
fn open_image(
    image: &Path,
    format: Option<Format>,
    force_share: bool,
) -> Result<Arc<dyn BlockDriver>, Error> {
    let options = OpenOptions { format, backing: Backing::None, force_share, ..OpenOptions::default() };
    open(image, &options).map(|opened| opened.driver).map_err(Error::Image)
}

fn print(list: &ListArgs) -> Result<(), Error> {
    let driver = open_image(&list.image, None, list.force_share)?;
    let bitmaps = driver.info().map_err(Error::Image)?.bitmaps;
    driver.close().map_err(Error::Image)?;
    let text = if list.json {
        serde_json::to_string_pretty(&bitmaps).map_err(|error| Error::Output(error.into()))? + "\n"
    } else {
        human(&bitmaps)
    };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::Output),
    }
}

/// One line for each: granularity, flags, name.
fn human(bitmaps: &[BitmapInfo]) -> String {
    let mut text = String::new();
    for bitmap in bitmaps {
        let flags = if bitmap.flags.is_empty() { "-".to_owned() } else { bitmap.flags.join(",") };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{:>10}  {flags:<12}  {}", bitmap.granularity, bitmap.name.escape_debug());
    }
    text
}
