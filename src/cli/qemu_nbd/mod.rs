//! The front that takes qemu-nbd's command line: what is started as `qemu-nbd`, or as `nbd-img qemu-nbd ...`.
//!
//! The arguments become the options of the one server; nothing of the server is done here a second time. Errors are
//! told in the words that callers of qemu-nbd look for, under the name that the program was started by.
//!
//! | module | what is in it |
//! |---|---|
//! | `getopt` | options in the way of getopt_long(3) |
//! | `line` | every option by itself |
//! | `values` | numbers, switches, sizes, lists |
//! | `objects` | `--object` |
//! | `tree`, `node` | block nodes: `--image-opts`, `json:` and file names |
//! | `config` | options that need each other, and what they come to |
//! | `background` | `--fork` |
//! | `client`, `list` | a client's negotiation, and `--list` |
//! | `kernel` | `--connect` and `--disconnect` |
//! | `usage` | `--help`, `--version` |

mod background;
mod client;
mod config;
mod getopt;
mod kernel;
mod line;
mod list;
mod node;
mod objects;
mod tree;
mod usage;
mod values;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use nbd_img_formats::ErrorKind;
use rustix::pipe::{PipeFlags, pipe_with};

use self::background::Process;
use self::config::{Activation, Service, Task};
use self::kernel::Device;
use self::line::{Complaint, Parsed};
use super::exit::ExitStatus;
use super::logging;
use crate::server::{self, Inherited};
use crate::transport::{Place, activation};

/// The name that calls the front.
pub const NAME: &str = "qemu-nbd";

/// Whether a program that was started as `argv0` is to behave as qemu-nbd.
pub fn is_called(argv0: &OsStr) -> bool {
    Path::new(argv0).file_name() == Some(OsStr::new(NAME))
}

/// Runs the command line behind the name `argv0`.
pub fn run(argv0: &OsStr, args: &[OsString]) -> ExitStatus {
    let name = Name::of(argv0);
    match try_run(&name, args) {
        Ok(status) => status,
        Err(complaint) => {
            name.complain(&complaint);
            ExitStatus::Failed
        }
    }
}

/// What the program was started as.
#[derive(Clone, Debug)]
struct Name {
    /// With its folder, if one was given.
    given: String,
    /// Without it.
    short: String,
}

impl Name {
    fn of(argv0: &OsStr) -> Name {
        let short = Path::new(argv0).file_name().unwrap_or(argv0);
        Name { given: argv0.to_string_lossy().into_owned(), short: short.to_string_lossy().into_owned() }
    }

    /// Says what is wrong on stderr, under the program's name.
    fn complain(&self, complaint: &Complaint) {
        let mut text = format!("{}: {}\n", self.short, in_the_words_of_c(&complaint.text));
        if complaint.see_help {
            text += &format!("Try `{} --help' for more information.\n", self.given);
        }
        // Nobody is left to be told when stderr is closed.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// The text without the numbers that Rust writes behind the system's own words.
fn in_the_words_of_c(text: &str) -> String {
    let mut words = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once(" (os error ") {
        words += before;
        rest = behind.split_once(')').map_or("", |(_, rest)| rest);
    }
    words + rest
}

fn try_run(name: &Name, args: &[OsString]) -> Result<ExitStatus, Complaint> {
    let line = match line::parse(args)? {
        Parsed::Line(line) => line,
        Parsed::Help => return answer(&usage::help(&name.given)),
        Parsed::Version => return answer(&usage::version()),
        Parsed::Answer(text) => return answer(&text),
    };
    // Not by -v: callers give it, and compare what is printed.
    logging::start(u8::from(line.trace), true);
    let sockets = activation::count().map_err(|error| format!("Failed to use socket activation: {error}"))?;
    match config::task(*line, Activation { sockets })? {
        Task::Serve(service) => serve(name, *service),
        Task::List(listing) => answer(&list::run(&listing)?),
        Task::Disconnect(path) => {
            Device::find(&path, "Cannot open")?.disconnect()?;
            answer(&format!("{} disconnected\n", path.display()))
        }
    }
}

fn answer(text: &str) -> Result<ExitStatus, Complaint> {
    io::stdout().write_all(text.as_bytes()).map_err(|error| format!("cannot write the answer: {error}"))?;
    Ok(ExitStatus::Success)
}

fn serve(name: &Name, mut service: Service) -> Result<ExitStatus, Complaint> {
    // Before anything is opened: descriptors are known by their numbers.
    let mut inherited = Inherited::take(&service.options).map_err(|error| error.to_string())?;
    let device = service.device.take().map(|path| Device::find(&path, "Failed to open")).transpose()?;
    let mut tell = None;
    if service.fork {
        match background::split().map_err(|error| format!("Failed to fork: {error}"))? {
            Process::Child(parent) => tell = Some(parent),
            Process::Parent(None) => return Ok(ExitStatus::Success),
            // The child has said why.
            Process::Parent(Some(_)) => return Ok(ExitStatus::Failed),
        }
    }
    if let Some(label) = &service.selinux_label {
        label_sockets(label)?;
    }
    inherited.ready_fd = match device {
        Some(device) => Some(attach_when_ready(name.clone(), device, &mut service, tell)?),
        None => tell,
    };
    match server::run(service.options, inherited) {
        Ok(outcome) => Ok(outcome.into()),
        Err(error) => Err(Complaint::from(explain(&error, &service.operand))),
    }
}

/// Starts the thread that makes the kernel a client once the server listens; gives the descriptor that has to be
/// told. The parent, if there is one, waits for the device. A device that cannot be had ends the process.
fn attach_when_ready(
    name: Name,
    device: Device,
    service: &mut Service,
    tell: Option<OwnedFd>,
) -> Result<OwnedFd, Complaint> {
    let failed = |error: io::Error| format!("cannot start the device's client: {error}");
    let (ready, listening) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let place = service.options.addresses.first().map(|address| address.place.clone());
    let Some(Place::Unix(socket)) = place else {
        return Err(Complaint::from("a device is served over a Unix socket".to_owned()));
    };
    // Until the device is there, errors have to reach the parent's stderr.
    let background = std::mem::take(&mut service.options.manners.background);
    let attach = move || {
        let attached = kernel::attach(&device, &socket, File::from(ready)).and_then(|attached| {
            if attached {
                server::go_to_background(background)
                    .map_err(|error| format!("cannot go to the background: {error}"))?;
            }
            Ok(attached)
        });
        match attached {
            // The process is about to end, which is what the parent waits for.
            Ok(false) => {}
            Ok(true) => {
                if let Some(tell) = tell {
                    // A parent that is gone need not be told.
                    let _ = File::from(tell).write_all(b"\n");
                }
            }
            Err(text) => {
                name.complain(&Complaint::from(text));
                // Nothing was written to the image; what stays is the socket.
                let _ = fs::remove_file(&socket);
                std::process::exit(ExitStatus::Failed.code().into());
            }
        }
    };
    thread::Builder::new().name("device".to_owned()).spawn(attach).map_err(failed)?;
    Ok(listening)
}

/// Has the sockets that this thread makes from now on get this SELinux context.
fn label_sockets(label: &OsStr) -> Result<(), String> {
    use std::os::unix::ffi::OsStrExt;
    let written = fs::write("/proc/thread-self/attr/sockcreate", label.as_bytes());
    written.map_err(|error| {
        format!("Cannot set SELinux socket create context to {}: {error}", label.to_string_lossy())
    })
}

/// The server's error in the words that callers look for.
fn explain(error: &server::Error, operand: &str) -> String {
    match error {
        server::Error::Image(error) => explain_image(error, operand),
        server::Error::Listen(text) => {
            format!("Failed to bind socket to {}", text.strip_prefix("unix:").unwrap_or(text))
        }
        server::Error::PidFile(path, error) => {
            format!("Could not create '{}': {error}", path.to_string_lossy().escape_debug())
        }
        server::Error::Tls(error) => format!("Unable to access credentials {error}"),
        server::Error::Inherited(_) | server::Error::System(_, _) => error.to_string(),
    }
}

fn explain_image(error: &nbd_img_formats::Error, operand: &str) -> String {
    let text = error.to_string();
    if error.kind() == ErrorKind::Locked {
        // What `serve` calls a flag is an option of the node here.
        let text = text.replace("--force-share", "force-share=on in --image-opts");
        return format!(
            "Failed to blk_new_open '{operand}': {text}\nIs another process using the image [{operand}]?"
        );
    }
    if let Some((_, name)) = text.split_once("there is no dirty bitmap '")
        && let Some((name, _)) = name.split_once("' (--bitmap)")
    {
        return format!("Bitmap '{name}' is not found: {text}");
    }
    if text.contains("--load-snapshot") {
        return format!("Failed to load snapshot: {text}");
    }
    format!("Failed to blk_new_open '{operand}': {text}")
}

#[cfg(test)]
mod callers_tests;
#[cfg(test)]
mod tests;
