//! The `exchange` binary of version 1.

use std::process::ExitCode;

use exchange::{cli, release};

fn main() -> ExitCode {
    cli::start(release::V1, cli::UNCHANGED)
}
