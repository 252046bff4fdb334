//! The `exchange` binary of version 2.

use std::process::ExitCode;

use exchange::{cli, release};

fn main() -> ExitCode {
    cli::start(release::V2, cli::UNCHANGED)
}
