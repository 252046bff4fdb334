//! The `exchange` binary: one subcommand per role.

use std::{io::Write, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use exchange::{
    app,
    config::ConfigArgs,
    migrate::{self, MigrateArgs},
    openapi, service, telemetry, trade, user,
};

/// A crypto exchange: user, trade and notification services, and the tools to operate them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve users: registration, log-in, profiles.
    User(Box<ConfigArgs>),
    /// Serve accounts, orders and trades.
    Trade(Box<ConfigArgs>),
    /// Bring the database schema forward.
    Migrate(MigrateArgs),
    /// Print the OpenAPI document of all services.
    Openapi,
}

#[tokio::main]
async fn main() -> ExitCode {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("another TLS provider is installed already");
        return ExitCode::FAILURE;
    }
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::User(args) => service::serve("user", args.validate()?, user::router, user::run).await,
        Command::Trade(args) => service::serve("trade", args.validate()?, trade::router, trade::run).await,
        Command::Migrate(args) => {
            telemetry::init("migrate", app::VERSION, "none".to_owned());
            migrate::run(args).await
        }
        Command::Openapi => {
            let document = openapi::document().to_pretty_json()?;
            writeln!(std::io::stdout(), "{document}").context("failed to write the document")
        }
    }
}
