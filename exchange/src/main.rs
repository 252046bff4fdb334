//! The `exchange` binary: one subcommand per role.

use std::{io::Write, process::ExitCode, sync::Arc};

use anyhow::Context;
use clap::{Parser, Subcommand};
use exchange::{
    app::{self, App},
    config::ConfigArgs,
    db,
    load::{self, LoadArgs},
    market::{self, Store, StoreConfig},
    messages::{self, MessagesConfig},
    migrate::{self, MigrateArgs},
    notification, openapi, service,
    smoke::{self, SmokeArgs},
    stream::Hub,
    telemetry, trade, user,
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
    /// Serve accounts, orders, trades and market data.
    Trade(Box<ConfigArgs>),
    /// Tell users what happens, and keep the market data.
    Notification(Box<ConfigArgs>),
    /// Look after the market data.
    Market {
        #[command(subcommand)]
        command: MarketCommand,
    },
    /// Try the whole way from registration to a settled trade, in a test lane.
    Smoke(Box<SmokeArgs>),
    /// Offer load at a fixed rate, and audit what came of it.
    Load(Box<LoadArgs>),
    /// Bring the database schema forward.
    Migrate(MigrateArgs),
    /// Print the OpenAPI document of all services.
    Openapi,
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
        Ok(true) => ExitCode::SUCCESS,
        // It has said what was wrong.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked, and says whether all was well.
async fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::User(args) => service::serve("user", args.validate()?, user::router, user::run).await?,
        Command::Trade(args) => {
            let config = args.validate()?;
            let market = config
                .market_data
                .is_some()
                .then(|| StoreConfig::from(&config))
                .transpose()?;
            let routes = |app: App| match market {
                Some(store) => {
                    trade::router(app.clone()).merge(market::router(app, Arc::new(Store::new(store))))
                }
                None => trade::router(app),
            };
            service::serve("trade", config, routes, trade::run).await?;
        }
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
            .await?;
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
        }
        Command::Smoke(args) => return smoke::run(*args).await,
        Command::Load(args) => return load::run(*args).await,
        Command::Migrate(args) => {
            telemetry::init("migrate", app::VERSION, "none".to_owned());
            migrate::run(args).await?;
        }
        Command::Openapi => {
            let document = openapi::document().to_pretty_json()?;
            writeln!(std::io::stdout(), "{document}").context("failed to write the document")?;
        }
    }
    Ok(true)
}
