//! The log: one line per event, on stderr.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The environment variable that filters the log, in tracing's syntax (`debug`, `nbd_img::server=trace`).
const FILTER_VARIABLE: &str = "NBD_IMG_LOG";

/// Starts the log. `verbose` counts the `-v` on the command line; a `quiet` program, one that lives
/// inside of another's command, says only what is wrong unless asked for more.
pub fn start(verbose: u8, quiet: bool) {
    let level = match (verbose, quiet) {
        (0, true) => LevelFilter::WARN,
        (0, false) => LevelFilter::INFO,
        (1, _) => LevelFilter::DEBUG,
        (_, _) => LevelFilter::TRACE,
    };
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .with_env_var(FILTER_VARIABLE)
        .from_env_lossy();
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .try_init();
    if let Err(error) = started {
        // Only possible when this is called twice in one process: the first log goes on.
        tracing::debug!(%error, "the log had been started already");
    }
}
