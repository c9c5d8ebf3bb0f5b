//! The program `nbd-img`: everything is in the library.

use nbd_img::cli::{self, ExitStatus};

fn main() -> ExitStatus {
    cli::run()
}
