//! The operator's command line.

use std::io::Write as _;

use clap::{Parser, Subcommand};
use exchange_operator::api;

/// Runs a crypto exchange on Kubernetes and releases it without losing a request.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the CustomResourceDefinition as YAML.
    Crd,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Crd => std::io::stdout().write_all(api::crd_yaml()?.as_bytes())?,
    }
    Ok(())
}
