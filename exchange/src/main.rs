//! The `exchange` binary: one subcommand per role.

use std::{process::ExitCode, sync::Arc};

use clap::{Parser, Subcommand};
use exchange::{
    app,
    config::ConfigArgs,
    db,
    market::{Store, StoreConfig},
    messages::{self, MessagesConfig},
    migrate::{self, MigrateArgs},
    notification, service,
    stream::Hub,
    telemetry, user,
};
use tracing::info;

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
    /// Tell users what happens, and keep the market data.
    Notification(Box<ConfigArgs>),
    /// Look after the market data.
    Market {
        #[command(subcommand)]
        command: MarketCommand,
    },
    /// Bring the database schema forward.
    Migrate(MigrateArgs),
}

#[derive(Subcommand)]
enum MarketCommand {
    /// Write the market data again from the trades in PostgreSQL. Services may run meanwhile.
    Rebuild(Box<ConfigArgs>),
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
        Command::Notification(args) => {
            let config = args.validate()?;
            let messages = MessagesConfig::from(&config)?;
            let hub = Hub::new();
            let streams = Arc::clone(&hub);
            service::serve(
                "notification",
                config,
                |app| notification::router(app, streams),
                |app, shutdown| messages::run(app, messages, hub, shutdown),
            )
            .await
        }
        Command::Market {
            command: MarketCommand::Rebuild(args),
        } => {
            let config = args.validate()?;
            telemetry::init("market", app::VERSION, "none".to_owned());
            let db = db::pool(&config, "exchange-market-rebuild")?;
            let store = Store::new(StoreConfig::from(&config)?);
            let rebuilt = store.rebuild(&db, time::OffsetDateTime::now_utc()).await?;
            info!(rebuilt.ticks, rebuilt.candles, "rebuilt the market data");
            Ok(())
        }
        Command::Migrate(args) => {
            telemetry::init("migrate", app::VERSION, "none".to_owned());
            migrate::run(args).await
        }
    }
}
