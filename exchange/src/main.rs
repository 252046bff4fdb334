//! The `exchange` binary: one subcommand per role.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use exchange::{
    app,
    config::ConfigArgs,
    migrate::{self, MigrateArgs},
    service, telemetry, trade, user,
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
        Command::User(args) => service::serve("user", args.validate()?, user::router, |_, _| async {}).await,
        Command::Trade(args) => service::serve("trade", args.validate()?, trade::router, trade::run).await,
        Command::Migrate(args) => {
            telemetry::init("migrate", app::VERSION, "none".to_owned());
            migrate::run(args).await
        }
    }
}
