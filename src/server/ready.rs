//! Telling the starter that the server listens: pid file, URIs on stdout, `--ready-fd`, sd_notify(3).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;

use super::{Background, Error};
use crate::export::Export;
use crate::transport::Listener;

/// What is told, and to whom.
pub struct Announcement {
    /// One for each listener and export.
    pub uris: Vec<String>,
    /// Whether the URIs go to stdout.
    pub print: bool,
    /// A descriptor that gets the URIs and is closed.
    pub ready_fd: Option<OwnedFd>,
    /// Where the process id goes.
    pub pid_file: Option<PathBuf>,
    /// Whether the pid file stays at the end.
    pub keep_pid_file: bool,
    /// What becomes of the process before the starter is told.
    pub background: Background,
}

impl Announcement {
    /// Tells everybody. The pid file comes first, since whoever is told may look for it; it is removed
    /// when the result is dropped.
    pub fn make(self) -> Result<Option<PidFile>, Error> {
        let pid_file = self
            .pid_file
            .map(|path| {
                PidFile::write(&path, self.keep_pid_file).map_err(|error| Error::PidFile(path, error))
            })
            .transpose()?;
        let text: String = self.uris.iter().flat_map(|uri| [uri.as_str(), "\n"]).collect();
        if self.print {
            let mut stdout = io::stdout();
            log_failure("stdout", stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()));
        }
        go_to_background(self.background)
            .map_err(|error| Error::System("cannot go to the background", error))?;
        if let Some(fd) = self.ready_fd {
            // Without a URI to tell, the line itself is the message.
            let text = if text.is_empty() { "\n" } else { &text };
            log_failure("--ready-fd", File::from(fd).write_all(text.as_bytes()));
        }
        log_failure("NOTIFY_SOCKET", sd_notify::notify(&[NotifyState::Ready]));
        Ok(pid_file)
    }
}

/// The URIs of all exports at all listeners; `tls_required` is whether none is to be had without. A listener that no URI
/// can tell is told as `--listen` has it.
pub fn uris(listeners: &[Listener], exports: &[Arc<Export>], tls_required: bool) -> Vec<String> {
    let uris = |listener: &Listener| -> Option<Vec<String>> {
        let uri = |export: &Arc<Export>| listener.uri(export.name(), tls_required || export.tls_required());
        exports.iter().map(uri).collect()
    };
    listeners
        .iter()
        .flat_map(|listener| uris(listener).unwrap_or_else(|| vec![listener.to_string()]))
        .collect()
}

/// Tells the service manager that the server is on its way out.
pub fn tell_stopping() {
    log_failure("NOTIFY_SOCKET", sd_notify::notify(&[NotifyState::Stopping]));
}

/// Asks the service manager for so much more time to end in, as counted from now.
pub fn tell_still_stopping(time: Duration) {
    let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
    log_failure("NOTIFY_SOCKET", sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(micros)]));
}

/// Does what `background` asks for: the last step whose errors the starter gets to see.
pub fn go_to_background(background: Background) -> io::Result<()> {
    let Background::Yes { keeps_log } = background else { return Ok(()) };
    std::env::set_current_dir("/")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    if !keeps_log {
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

/// The server serves whether or not its starter listens to it.
fn log_failure(whom: &str, told: io::Result<()>) {
    if let Err(error) = told {
        tracing::warn!(%error, "cannot tell {whom}");
    }
}

/// The pid file. Dropping it removes the file if it still names this process, unless it is to stay.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    stays: bool,
}

impl PidFile {
    /// Puts the process id into `path`, replacing what is there; nobody ever sees a part of it.
    fn write(path: &Path, stays: bool) -> io::Result<PidFile> {
        let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}", process::id()));
        let temporary = path.with_file_name(temporary);
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .and_then(|mut file| writeln!(file, "{}", process::id()))
            .and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            // What is left of a failed write must not stay; the error that counts is the first.
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        Ok(PidFile { path: std::path::absolute(path)?, stays })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let ours = fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == process::id().to_string());
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove the pid file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pid_file_is_written_whole_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        fs::write(&path, "old").unwrap();
        let file = PidFile::write(&path, false).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", process::id()));
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_pid_file_may_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        drop(PidFile::write(&path, true).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", process::id()));
    }

    #[test]
    fn a_pid_file_of_another_process_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let file = PidFile::write(&path, false).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }
}
