//! The command line of all binaries: one subcommand per role.

use std::{io::Write, process::ExitCode, sync::Arc};

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use futures::FutureExt;
use tracing::{dispatcher::has_been_set, error, info};
use utoipa_axum::router::OpenApiRouter;

use crate::{
    app::App,
    config::{ConfigArgs, Peer, RebuildArgs},
    db,
    grant::{self, GrantArgs},
    load::{self, LoadArgs},
    market::{self, Store, StoreConfig},
    messages::{self, Messages},
    migrate::{self, MigrateArgs},
    notification, openapi,
    release::Release,
    service::{self, Reach},
    smoke::{self, SmokeArgs},
    stream::Hub,
    telemetry, trade, user,
};

/// What a binary puts around the public routes of its services, inside of what counts their requests.
pub type Around = fn(App, OpenApiRouter) -> OpenApiRouter;

/// Nothing.
pub const UNCHANGED: Around = |_, routes| routes;

/// A crypto exchange: user, trade and notification services, and the tools to operate them.
#[derive(Parser)]
#[command(name = "exchange")]
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
    /// Give a user a scope, or take it back.
    Grant(GrantArgs),
    /// Print the OpenAPI document of all services.
    Openapi,
}

#[derive(Subcommand)]
enum MarketCommand {
    /// Write the market data again from the trades in PostgreSQL. Services may run meanwhile.
    Rebuild(RebuildArgs),
}

/// Does what the command line says, as a binary of this release.
#[tokio::main]
pub async fn start(release: Release, around: Around) -> ExitCode {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("another TLS provider is installed already");
        return ExitCode::FAILURE;
    }
    let matches = Cli::command().version(release.version).get_matches();
    let command = Cli::from_arg_matches(&matches)
        .unwrap_or_else(|error| error.exit())
        .command;
    match run(command, release, around).await {
        Ok(true) => ExitCode::SUCCESS,
        // It has said what was wrong.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            if has_been_set() {
                error!("{error:#}");
            } else {
                eprintln!("{error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Does what was asked, and says whether all was well.
async fn run(command: Command, release: Release, around: Around) -> anyhow::Result<bool> {
    match command {
        Command::User(args) => {
            let routes = |app: App| around(app.clone(), user::router(app));
            let reach = Box::new(|| async { Ok(()) }.boxed());
            service::serve("user", release, args.validate()?, routes, user::run, reach).await?;
        }
        Command::Trade(args) => {
            let config = args.validate_with(&[Peer::MarketData])?;
            let market = Arc::new(Store::new(StoreConfig::from(&config)?));
            let store = Arc::clone(&market);
            let routes = |app: App| {
                let routes = trade::router(app.clone()).merge(market::router(app.clone(), store));
                around(app, routes)
            };
            let reach: Reach = Box::new(move || {
                let market = Arc::clone(&market);
                async move { Ok(market.reach().await?) }.boxed()
            });
            service::serve("trade", release, config, routes, trade::run, reach).await?;
        }
        Command::Notification(args) => {
            let config = args.validate_with(&[Peer::Queue, Peer::MarketData])?;
            let messages = Messages::from(&config).await?;
            let stores = messages.clone();
            let reach: Reach = Box::new(move || {
                let stores = stores.clone();
                async move { stores.reach().await }.boxed()
            });
            let hub = Hub::new();
            let streams = Arc::clone(&hub);
            service::serve(
                "notification",
                release,
                config,
                |app| around(app.clone(), notification::router(app, streams)),
                |app, shutdown| messages::run(app, messages, hub, shutdown),
                reach,
            )
            .await?;
        }
        Command::Market {
            command: MarketCommand::Rebuild(args),
        } => {
            let (database, market_data) = args.validate()?;
            telemetry::init("market", release.version, "none".to_owned());
            let db = db::pool(&database, 1, "exchange-market-rebuild")?;
            let store = Store::new(market_data);
            let rebuilt = store.rebuild(&db, time::OffsetDateTime::now_utc()).await?;
            let rebuilt = rebuilt.context("another process is rebuilding the market data")?;
            info!(
                labels.ticks = rebuilt.ticks,
                labels.candles = rebuilt.candles,
                "rebuilt the market data"
            );
        }
        Command::Smoke(args) => return smoke::run(*args).await,
        Command::Load(args) => return load::run(*args).await,
        Command::Migrate(args) => {
            telemetry::init("migrate", release.version, "none".to_owned());
            migrate::run(args, release).await?;
        }
        Command::Grant(args) => {
            telemetry::init("grant", release.version, "none".to_owned());
            grant::run(args).await?;
        }
        Command::Openapi => {
            let document = openapi::document(release).to_pretty_json()?;
            writeln!(std::io::stdout(), "{document}").context("failed to write the document")?;
        }
    }
    Ok(true)
}
