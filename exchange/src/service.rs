//! How a service runs, from start to end.

use std::time::Duration;

use anyhow::Context;
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::HeaderValue,
    middleware,
};
use futures::future::BoxFuture;
use serde::Serialize;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    admin,
    app::App,
    config::{Config, RoleSource},
    db,
    error::{self, ApiError},
    metrics, migrate,
    release::Release,
    role::{self, Role},
    server::{self, Closing, Counts},
    telemetry,
};

/// A service has no open connection for so long before it exits: by then every proxy knows that it is going.
const QUIET: Duration = Duration::from_secs(1);

/// How long background work may take to end.
const BACKGROUND_END: Duration = Duration::from_secs(10);

/// How long the last words to the database may take, and the end of the connections to it.
const DATABASE_END: Duration = Duration::from_secs(5);

/// How often the schema is looked at, and this process announced.
const CHECK_EVERY: Duration = migrate::ANNOUNCE_EVERY;

/// The same while it is not as this process needs it.
const RETRY_EVERY: Duration = Duration::from_millis(500);

/// How long a look may take: longer than PostgreSQL lets it.
const LOOK: Duration = Duration::from_secs(20);

/// Whether the stores beside the database can be reached; the message says which cannot.
pub type Reach = Box<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

/// Runs a service until SIGTERM or SIGINT, and then until its clients are gone or the termination deadline.
///
/// `routes` builds its public routes; `background` is its work beside them, which ends when its token is cancelled.
/// `reach` tries the stores beside the database, without which a process does not start to be ready.
pub async fn serve<B: Future<Output = ()> + Send + 'static>(
    service: &'static str,
    release: Release,
    config: Config,
    routes: impl FnOnce(App) -> OpenApiRouter,
    background: impl FnOnce(App, CancellationToken) -> B,
    reach: Reach,
) -> anyhow::Result<()> {
    let version = release.version;
    let (role_sender, role) = watch::channel(match config.role {
        RoleSource::AlwaysLive => Role::Live,
        RoleSource::Ask(_) => Role::Standby,
    });
    let (readiness_sender, readiness) =
        watch::channel(Err("the database has not been reached yet".to_owned()));
    let app = App::new(service, release, config, role, readiness)?;
    telemetry::init(service, version, app.stack.to_string());

    let public = TcpListener::bind(app.config.public_address)
        .await
        .context("failed to bind the public address")?;
    let admin = TcpListener::bind(app.config.admin_address)
        .await
        .context("failed to bind the admin address")?;
    info!(
        server.address = %public.local_addr()?,
        labels.admin_address = %admin.local_addr()?,
        labels.database_schema = release.level,
        "exchange {service} {version} of {stack} listens", stack = app.stack,
    );

    let terminating = CancellationToken::new();
    let over = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(db::follow_credentials(
        app.db.clone(),
        app.config.database.clone(),
        over.clone(),
    ));
    tasks.spawn(watch_stores(
        app.clone(),
        reach,
        readiness_sender,
        terminating.clone(),
        over.clone(),
    ));
    if let RoleSource::Ask(url) = &app.config.role {
        tasks.spawn(role::follow(
            url.clone(),
            app.stack.to_string(),
            role_sender,
            terminating.clone(),
        ));
    }
    tasks.spawn(serve_admin(admin, app.clone(), over.clone()));
    let background = tokio::spawn(background(app.clone(), terminating.clone()));

    let (closing_sender, closing) = watch::channel(Closing::No);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server::serve(
        public,
        public_router(&app, routes(app.clone())),
        HeaderValue::try_from(app.stack.to_string())?,
        server::Options {
            max_connection_age: app.config.max_connection_age,
            request_timeout: app.config.request_timeout,
            max_body_size: app.config.max_body_size,
        },
        app.counts.clone(),
        closing,
        stop.clone(),
    ));

    until_signal(&app, &closing_sender).await?;
    info!("terminating: clients are asked to leave");
    let patience = app.config.termination_deadline;
    closing_sender.send_replace(Closing::within(patience));
    terminating.cancel();
    if tokio::time::timeout(patience, until_quiet(&app.counts))
        .await
        .is_err()
    {
        warn!(
            labels.connections = app.counts.connections(),
            "closing what is open at the termination deadline"
        );
    }
    stop.cancel();
    serving.await?;
    if tokio::time::timeout(BACKGROUND_END, background).await.is_err() {
        warn!("background work did not end in time");
    }
    over.cancel();
    let parted = async {
        tasks.join_all().await;
        app.db.close().await;
    };
    if tokio::time::timeout(DATABASE_END, parted).await.is_err() {
        warn!("the connections to the database did not end in time");
    }
    info!("terminated");
    Ok(())
}

async fn serve_admin(listener: TcpListener, app: App, over: CancellationToken) {
    let served = axum::serve(listener, admin::router(app)).with_graceful_shutdown(over.cancelled_owned());
    if let Err(error) = served.await {
        warn!(error.message = %error, "the admin port failed");
    }
}

/// Keeps `closing` true to the role until the process is told to end.
async fn until_signal(app: &App, closing: &watch::Sender<Closing>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut role = app.role.clone();
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            Ok(()) = role.changed() => {
                closing.send_replace(match *role.borrow_and_update() {
                    Role::Draining => Closing::within(app.config.drain_timeout),
                    Role::Live | Role::Standby => Closing::No,
                });
            }
        }
    }
}

async fn until_quiet(counts: &Counts) {
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < QUIET {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if counts.connections() > 0 {
            quiet_since = Instant::now();
        }
    }
}

/// Checks that every store has been reached once, and that this build can work with the database's schema: the latter
/// every now and then, because a contract may leave this build behind. A store that is lost later changes nothing.
async fn watch_stores(
    app: App,
    reach: Reach,
    readiness: watch::Sender<Result<(), String>>,
    terminating: CancellationToken,
    over: CancellationToken,
) {
    let set = |verdict: Result<(), String>| {
        if let Err(reason) = &verdict
            && *readiness.borrow() != verdict
        {
            warn!("not ready: {reason}");
        }
        readiness.send_modify(|known| *known = verdict);
    };
    let check = async {
        let mut reached = false;
        loop {
            let seen = async {
                let state = migrate::read_state(&app.db).await?;
                app.database_identity.get_or_init(|| state.identity);
                let verdict = state.supports(app.release.level);
                if verdict.is_ok() {
                    migrate::announce(&app).await?;
                }
                Ok::<_, sqlx::Error>(verdict)
            };
            // A database host that has gone without a word never answers.
            let seen = tokio::time::timeout(LOOK, seen);
            let seen = async { seen.await.map_err(|late| sqlx::Error::Io(late.into()))? };
            let others = async {
                if reached {
                    return Ok(());
                }
                reach().await.map_err(|error| format!("{error:#}"))
            };
            match seen.await {
                Ok(Ok(())) => {
                    let verdict = others.await;
                    reached = verdict.is_ok();
                    set(verdict);
                }
                Ok(verdict) => set(verdict),
                Err(error) if readiness.borrow().is_err() => {
                    set(Err(format!("the database cannot be used: {error}")));
                }
                Err(_) => {}
            }
            let pause = if readiness.borrow().is_ok() {
                CHECK_EVERY
            } else {
                RETRY_EVERY
            };
            tokio::time::sleep(pause).await;
        }
    };
    terminating.run_until_cancelled(check).await;
    set(Err("terminating".to_owned()));
    // It works with the schema until the last request has been answered.
    let announce = async {
        loop {
            tokio::time::sleep(CHECK_EVERY).await;
            if let Err(error) = migrate::announce(&app).await {
                warn!(error.message = %error, "failed to announce this process");
            }
        }
    };
    over.run_until_cancelled(announce).await;
    if let Err(error) = migrate::depart(&app).await {
        warn!(error.message = %error, "failed to sign off; this process counts as running for a while");
    }
}

fn public_router(app: &App, own: OpenApiRouter) -> Router {
    let (documented, _) = own.merge(routes().with_state(app.clone())).split_for_parts();
    documented
        .fallback(|| async { ApiError::from(error::NOT_FOUND) })
        .method_not_allowed_fallback(|| async { ApiError::from(error::METHOD_NOT_ALLOWED) })
        .layer(DefaultBodyLimit::max(app.config.max_body_size))
        .layer(middleware::from_fn_with_state(app.clone(), metrics::observe))
}

/// The routes of every service.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(version))
}

/// Who answers.
#[derive(Serialize, ToSchema)]
struct Version {
    /// Colour and revision of the stack, as in `x-exchange-stack`.
    stack: String,
    /// The version of its software.
    version: &'static str,
}

/// Who answers here: for the role, and for people.
#[utoipa::path(get, path = "/version", tag = "every service", responses((status = 200, body = Version)))]
async fn version(State(app): State<App>) -> Json<Version> {
    Json(Version {
        stack: app.stack.to_string(),
        version: app.stack.version,
    })
}
