//! `nbd-img check`: is an image sound, and making it so.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use nbd_img_formats::open::{Access, open_alone};
use nbd_img_formats::qcow2::{self, CheckOptions, CheckReport, Repair};
use nbd_img_formats::{ErrorKind, Format};
use serde::Serialize;

use super::args::FormatArg;
use super::progress::Bar;
use super::{Error, ExitStatus};

/// Look for damage in a qcow2 image, and repair it if told to
///
/// Counts how often each cluster of the file is used and compares that with the image's own counts. Only the
/// image file itself is read. Exit status: 0 sound, 1 could not be checked, 2 corruptions, 3 leaked clusters
/// only, 63 not a format that can be checked. After a repair it is that of the repaired image.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,

    /// The image's format; else found by its magic number
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<FormatArg>,

    /// Repair leaks (clusters that are lost, but do no harm), or all that can be repaired
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<RepairArg>,

    /// Answer in JSON, with the keys of qemu-img check
    #[arg(long)]
    pub json: bool,

    /// Check an image that another program writes; what is found may be a change that is half done
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
}

/// `--repair`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum RepairArg {
    /// Clusters that are counted more often than they are used
    Leaks,
    /// Also counts that are too low, and flags
    All,
}

/// The answer in JSON.
#[derive(Serialize)]
struct Answer<'a> {
    filename: String,
    format: String,
    #[serde(flatten)]
    report: &'a CheckReport,
}

/// Checks the image, prints what was found and returns what that makes of the process.
pub fn run(args: &CheckArgs) -> Result<ExitStatus, Error> {
    let repair = match args.repair {
        None => Repair::Nothing,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let access = match (args.repair, args.force_share) {
        (Some(_), _) => Access::Write,
        (None, true) => Access::ReadShared,
        (None, false) => Access::Read,
    };
    let opened = open_alone(&args.image, args.format.map(Format::from), access);
    let (storage, format) = match opened {
        Ok((storage, Format::Qcow2)) => (storage, Format::Qcow2),
        Ok((_, format @ (Format::Raw | Format::MmapRaw))) => {
            return Ok(not_checked(args, &format.to_string()));
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return Ok(not_checked(args, &error.to_string()));
        }
        Err(error) => return Err(Error::Image(error)),
    };
    let report = {
        let bar = Bar::new("checking", !args.json);
        let tell = |permille| bar.set(permille);
        let options = CheckOptions { repair, progress: Some(&tell), ..CheckOptions::default() };
        qcow2::check(&storage, options).map_err(Error::Image)?
    };
    storage.close().map_err(|error| Error::Image(nbd_img_formats::Error::io("cannot close", error)))?;
    let text = if args.json { json(args, format, &report)? } else { human(&report).unwrap_or_default() };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(status(&report)),
        written => written.map(|()| status(&report)).map_err(Error::Output),
    }
}

fn status(report: &CheckReport) -> ExitStatus {
    match report {
        CheckReport { check_errors: 1.., .. } => ExitStatus::Failed,
        CheckReport { corruptions: 1.., .. } => ExitStatus::Corruptions,
        CheckReport { leaks: 1.., .. } => ExitStatus::Leaks,
        CheckReport { .. } => ExitStatus::Success,
    }
}

fn not_checked(args: &CheckArgs, why: &str) -> ExitStatus {
    let path = args.image.to_string_lossy();
    // Nobody is left to be told when stderr is closed.
    let _ =
        writeln!(io::stderr(), "nbd-img: {}: only qcow2 images can be checked ({why})", path.escape_debug());
    ExitStatus::NotSupported
}

fn json(args: &CheckArgs, format: Format, report: &CheckReport) -> Result<String, Error> {
    let filename = args.image.to_string_lossy().into_owned();
    let answer = Answer { filename, format: format.to_string(), report };
    let mut json = serde_json::to_string_pretty(&answer).map_err(|error| Error::Output(error.into()))?;
    json.push('\n');
    Ok(json)
}

fn human(report: &CheckReport) -> Result<String, fmt::Error> {
    let mut text = String::new();
    for message in &report.messages {
        writeln!(text, "{message}")?;
    }
    if report.messages_left_out > 0 {
        writeln!(text, "... and {} more", report.messages_left_out)?;
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
        writeln!(text, "repaired: {corruptions} corruptions, {leaks} leaked clusters")?;
    }
    if let Some(why) = &report.not_repaired {
        writeln!(text, "not repaired: {why}")?;
    }
    let marks = [("dirty (it was not closed)", report.dirty), ("corrupt", report.corrupt)];
    for (mark, _) in marks.iter().filter(|(_, is_set)| *is_set) {
        writeln!(text, "the image is marked as {mark}; --repair all clears the mark of a sound image")?;
    }
    match (report.check_errors, report.corruptions, report.leaks) {
        (0, 0, 0) => writeln!(text, "the image is sound")?,
        (0, 0, leaks) => {
            writeln!(text, "{leaks} leaked clusters: room is lost, no data (--repair leaks gives it back)")?;
        }
        (errors, corruptions, leaks) => {
            writeln!(
                text,
                "{corruptions} corruptions, {leaks} leaked clusters, {errors} read errors: do not write to this image"
            )?;
        }
    }
    let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let CheckReport { total_clusters, allocated_clusters: allocated, .. } = *report;
    writeln!(
        text,
        "{allocated} of {total_clusters} clusters allocated ({:.2} %), {:.2} % of them fragmented, {:.2} % compressed",
        share(allocated, total_clusters),
        share(report.fragmented_clusters, allocated),
        share(report.compressed_clusters, allocated),
    )?;
    writeln!(text, "the image ends at {}", report.image_end_offset)?;
    Ok(text)
}
