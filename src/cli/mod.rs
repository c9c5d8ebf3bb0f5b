//! The command line: what the operator wrote becomes checked options, and the options are run.
//!
//! `args` is what clap parses, `options` what the rest of the program gets; nobody else sees clap. Errors are
//! printed in one place, here, and end the process with one of [`ExitStatus`].

mod args;
mod bitmap;
mod check;
mod compress;
mod control;
mod create;
mod exit;
mod export_spec;
mod info;
mod logging;
mod options;
mod progress;
mod qemu_nbd;
mod resize;
mod size;
mod tls;
mod tls_init;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};

use clap::Parser;

use crate::server;

pub use exit::ExitStatus;

/// Runs the command that the process's arguments name.
///
/// To be called first thing in `main`: it takes over descriptors that the starter passed by number.
pub fn run() -> ExitStatus {
    let arguments: Vec<_> = std::env::args_os().collect();
    match arguments.as_slice() {
        [name, rest @ ..] if qemu_nbd::is_called(name) => return qemu_nbd::run(name, rest),
        [_, command, rest @ ..] if command == qemu_nbd::NAME => return qemu_nbd::run(command, rest),
        [..] => {}
    }
    let args = match args::Args::try_parse_from(&arguments) {
        Ok(args) => args,
        Err(error) => return refuse_usage(&error, arguments.get(1..).unwrap_or_default()),
    };
    match run_command(args) {
        Ok(status) => status,
        Err(error) => {
            // Nobody is left to be told when stderr is closed.
            let _ = writeln!(io::stderr(), "nbd-img: {error}");
            error.status()
        }
    }
}

fn run_command(args: args::Args) -> Result<ExitStatus, Error> {
    let verbose = args.verbose;
    match args.command {
        args::Command::Serve(serve) => {
            let options = options::serve(*serve).map_err(Error::Usage)?;
            let inherited = server::Inherited::take(&options).map_err(Error::Server)?;
            logging::start(verbose, inherited.is_captive());
            Ok(server::run(options, inherited).map_err(Error::Server)?.into())
        }
        args::Command::Info(info) => {
            logging::start(verbose, true);
            info::run(&options::info(info).map_err(Error::Usage)?)?;
            Ok(ExitStatus::Success)
        }
        args::Command::Bitmap(command) => {
            logging::start(verbose, true);
            bitmap::run(command)?;
            Ok(ExitStatus::Success)
        }
        args::Command::QemuNbd { args } => Ok(qemu_nbd::run(qemu_nbd::NAME.as_ref(), &args)),
        args::Command::Check(check) => {
            logging::start(verbose, true);
            check::run(&check)
        }
        args::Command::Create(create) => {
            logging::start(verbose, true);
            create::run(create)?;
            Ok(ExitStatus::Success)
        }
        args::Command::Resize(resize) => {
            logging::start(verbose, true);
            resize::run(resize)?;
            Ok(ExitStatus::Success)
        }
        args::Command::Tls(tls::TlsCommand::Init(init)) => {
            tls_init::run(&init).map_err(Error::Certificates)?;
            Ok(ExitStatus::Success)
        }
    }
}

/// clap's own errors, which are also how it gives out `--help` and `--version`.
fn refuse_usage(error: &clap::Error, args: &[OsString]) -> ExitStatus {
    // As above: a closed stdout or stderr leaves nobody to tell.
    let _ = error.print();
    let command = args.iter().find(|arg| !arg.as_encoded_bytes().starts_with(b"-"));
    match error.use_stderr() {
        false => ExitStatus::Success,
        // To whoever reads the status of a check, 2 says that the image is damaged.
        true if command.is_some_and(|command| command == "check") => ExitStatus::Failed,
        true => ExitStatus::Usage,
    }
}

/// What ends a command.
#[derive(Debug)]
enum Error {
    /// The arguments contradict each other or make no sense.
    Usage(String),
    /// The image cannot be opened or read.
    Image(nbd_img_formats::Error),
    /// The server cannot start or go on.
    Server(server::Error),
    /// A server does not do what it was told; the text says why.
    Control(String),
    /// The certificates cannot be made; the text says why.
    Certificates(String),
    /// The answer cannot be written.
    Output(io::Error),
}

impl Error {
    fn status(&self) -> ExitStatus {
        match self {
            Error::Usage(_) => ExitStatus::Usage,
            Error::Image(_)
            | Error::Server(_)
            | Error::Control(_)
            | Error::Certificates(_)
            | Error::Output(_) => ExitStatus::Failed,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(text) | Error::Control(text) | Error::Certificates(text) => f.write_str(text),
            Error::Image(error) => error.fmt(f),
            Error::Server(error) => error.fmt(f),
            Error::Output(error) => write!(f, "cannot write the answer: {error}"),
        }
    }
}
