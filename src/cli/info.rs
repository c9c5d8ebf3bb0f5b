//! `nbd-img info`: what an image is, for people or in JSON.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use nbd_img_formats::info::{ImageInfo, SnapshotInfo};
use nbd_img_formats::open::open;

use super::Error;
use super::options::InfoOptions;

/// Opens the image read-only, prints what is known of it and closes it.
pub fn run(options: &InfoOptions) -> Result<(), Error> {
    let driver = open(&options.path, &options.open).map_err(Error::Image)?.driver;
    let info = driver.info().map_err(Error::Image)?;
    driver.close().map_err(Error::Image)?;
    let text = if options.json {
        let mut json = serde_json::to_string_pretty(&info).map_err(|error| Error::Output(error.into()))?;
        json.push('\n');
        json
    } else {
        human(&info).map_err(|error| Error::Output(io::Error::other(error)))?
    };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::Output),
    }
}

fn human(info: &ImageInfo) -> Result<String, fmt::Error> {
    let mut text = String::new();
    describe(&mut text, info)?;
    for (depth, below) in info.chain.iter().enumerate() {
        writeln!(text, "\nbacking {}:", depth + 1)?;
        describe(&mut text, below)?;
    }
    Ok(text)
}

fn describe(text: &mut String, info: &ImageInfo) -> fmt::Result {
    let mut line = |what: &str, value: &dyn fmt::Display| writeln!(text, "{what:<16}{value}");
    line("image", &info.path.to_string_lossy().escape_debug())?;
    line("format", &info.format)?;
    line("virtual size", &Bytes(info.virtual_size))?;
    line("file length", &Bytes(info.file_len))?;
    line("on disk", &Bytes(info.allocated_len))?;
    for (what, value) in [("version", info.version), ("refcount bits", info.refcount_bits)] {
        if let Some(value) = value {
            line(what, &value)?;
        }
    }
    if let Some(cluster_len) = info.cluster_len {
        line("cluster size", &Bytes(cluster_len))?;
    }
    for (what, value) in [
        ("compression", &info.compression),
        ("backing file", &info.backing_name),
        ("backing format", &info.backing_format),
        ("data file", &info.data_file_name),
    ] {
        if let Some(value) = value {
            line(what, &value.escape_debug())?;
        }
    }
    if !info.features.is_empty() {
        line("features", &info.features.join(", "))?;
    }
    describe_snapshots(text, &info.snapshots)?;
    describe_bitmaps(text, info)
}

fn describe_snapshots(text: &mut String, snapshots: &[SnapshotInfo]) -> fmt::Result {
    for snapshot in snapshots {
        write!(
            text,
            "{:<16}{} {} {}, disk of {}",
            "snapshot",
            snapshot.id.escape_debug(),
            snapshot.name.escape_debug(),
            Date(snapshot.date_seconds),
            Bytes(snapshot.virtual_size)
        )?;
        if snapshot.vm_state_len > 0 {
            write!(text, ", machine state of {}", Bytes(snapshot.vm_state_len))?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn describe_bitmaps(text: &mut String, info: &ImageInfo) -> fmt::Result {
    for bitmap in &info.bitmaps {
        write!(text, "{:<16}{} by {}", "bitmap", bitmap.name.escape_debug(), Bytes(bitmap.granularity))?;
        if !bitmap.flags.is_empty() {
            write!(text, " ({})", bitmap.flags.join(", "))?;
        }
        writeln!(text)?;
    }
    Ok(())
}

/// Bytes as people read them, with the exact number where that is another one.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 6] =
            [("EiB", 60), ("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| self.0 >> shift > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        let whole = self.0 >> shift;
        let rest = self.0 - (whole << shift);
        if rest == 0 {
            return write!(f, "{whole} {unit} ({} bytes)", self.0);
        }
        let hundredths = (u128::from(rest) * 100) >> shift;
        write!(f, "{whole}.{hundredths:02} {unit} ({} bytes)", self.0)
    }
}

/// Seconds since 1970 as a date in UTC.
struct Date(u32);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, seconds) = (self.0 / 86_400, self.0 % 86_400);
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// Year, month and day of a count of days since 1970-01-01, by counting in years that begin in March,
/// so that the leap day is the last one.
fn civil(days: u32) -> (u32, u32, u32) {
    const DAYS_FROM_YEAR_0: u32 = 719_468;
    const DAYS_IN_400_YEARS: u32 = 146_097;
    let days = days + DAYS_FROM_YEAR_0;
    let (era, day_of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u32::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes() {
        for (bytes, want) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB (1024 bytes)"),
            (1536, "1.50 KiB (1536 bytes)"),
            (10 << 30, "10 GiB (10737418240 bytes)"),
            (u64::MAX, "15.99 EiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), want);
        }
    }

    #[test]
    fn dates() {
        for (seconds, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (u32::MAX, "2106-02-07 06:28:15 UTC"),
        ] {
            assert_eq!(Date(seconds).to_string(), want);
        }
    }

    #[test]
    fn names_from_the_image_are_escaped() {
        let info = ImageInfo {
            format: "qcow2".into(),
            backing_name: Some("a\u{1b}[2Jb\n".into()),
            snapshots: vec![SnapshotInfo { id: "1".into(), name: "x\ny".into(), ..SnapshotInfo::default() }],
            ..ImageInfo::default()
        };
        let text = human(&info).unwrap();
        assert!(!text.contains('\u{1b}') && text.contains("x\\ny"), "{text}");
    }
}
