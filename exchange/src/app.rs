//! What the parts of a service share.

use std::{
    fmt,
    ops::Deref,
    sync::{Arc, OnceLock, atomic::AtomicBool},
};

use prometheus_client::metrics::gauge::Gauge;
use sqlx::PgPool;
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    auth::Keys, config::Config, db, lane::Lane, metrics::Metrics, password::Passwords, personal::Exports,
    release::Release, role::Role, server::Counts,
};

/// Everything that handlers and background work need. Clones share it.
#[derive(Clone)]
pub struct App(Arc<Inner>);

/// The parts of an [`App`].
pub struct Inner {
    /// Which service this process is.
    pub service: &'static str,
    /// Of which release.
    pub release: Release,
    /// This process, among all that work on the database.
    pub instance: Uuid,
    /// As started.
    pub config: Config,
    /// The database.
    pub db: PgPool,
    /// The role of this stack, as it changes.
    pub role: watch::Receiver<Role>,
    /// Where modules register and count.
    pub metrics: Metrics,
    /// Which stack this is.
    pub stack: StackId,
    /// The keys of access tokens.
    pub keys: Keys,
    /// Where passwords are hashed.
    pub passwords: Passwords,
    /// Whose turn it is to export.
    pub exports: Exports,
    /// What is open on the public port.
    pub counts: Counts,
    /// Whether live messages are being taken from the queue; the consumer keeps it true to the fact.
    pub consuming: AtomicBool,
    /// Ready, or why not.
    pub readiness: watch::Receiver<Result<(), String>>,
    /// The identity of the database, once it has been reached.
    pub database_identity: OnceLock<Uuid>,
    pub(crate) gauges: Gauges,
}

impl App {
    /// Puts the parts together. Nothing is connected yet.
    pub fn new(
        service: &'static str,
        release: Release,
        config: Config,
        role: watch::Receiver<Role>,
        readiness: watch::Receiver<Result<(), String>>,
    ) -> anyhow::Result<Self> {
        let stack = StackId {
            colour: config.colour.clone(),
            revision: config.revision.clone(),
            version: release.version,
        };
        let name = format!("exchange-{service} {stack}");
        let db = db::pool(&config.database, config.database_connections, &name)?;
        let metrics = Metrics::new();
        let gauges = Gauges::default();
        gauges.register(&metrics);
        Ok(Self(Arc::new(Inner {
            service,
            release,
            instance: Uuid::now_v7(),
            passwords: Passwords::new(config.password_hashers)?,
            keys: Keys::new(db.clone(), &config),
            config,
            db,
            role,
            metrics,
            stack,
            exports: Exports::default(),
            counts: Counts::default(),
            consuming: AtomicBool::new(false),
            readiness,
            database_identity: OnceLock::new(),
            gauges,
        })))
    }
}

impl Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// Which stack a process belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackId {
    /// `blue` or `green`.
    pub colour: String,
    /// The revision.
    pub revision: String,
    /// The version of the build.
    pub version: &'static str,
}

impl StackId {
    /// Whether a test lane is this stack's own. The live lane is nobody's.
    pub fn owns(&self, lane: &Lane) -> bool {
        lane.as_str().starts_with(&format!("test-{self}."))
    }
}

/// `<colour>-<revision>`.
impl fmt::Display for StackId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}-{}", self.colour, self.revision)
    }
}

/// Numbers that are read when somebody asks for them.
#[derive(Default)]
pub(crate) struct Gauges {
    connections: Gauge,
    in_flight: Gauge,
    pool_size: Gauge,
    pool_idle: Gauge,
    live: Gauge,
}

impl Gauges {
    fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            for (name, help, gauge) in [
                (
                    "http_server_connections",
                    "Open connections on the public port",
                    &self.connections,
                ),
                (
                    "http_server_in_flight",
                    "Requests being answered on the public port",
                    &self.in_flight,
                ),
                (
                    "db_pool_connections",
                    "Connections to PostgreSQL",
                    &self.pool_size,
                ),
                (
                    "db_pool_idle",
                    "Connections to PostgreSQL that are idle",
                    &self.pool_idle,
                ),
                ("stack_live", "1 while this stack is live", &self.live),
            ] {
                registry.register(name, help, gauge.clone());
            }
        });
    }

    pub(crate) fn update(&self, app: &App) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.connections.set(number(app.counts.connections()));
        self.in_flight.set(number(app.counts.in_flight()));
        self.pool_size.set(i64::from(app.db.size()));
        self.pool_idle.set(number(app.db.num_idle()));
        self.live.set(i64::from(*app.role.borrow() == Role::Live));
    }
}
