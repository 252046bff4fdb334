//! `exchange migrate`: brings the schema forward, in two ledgers.
//!
//! *Expand* only adds what older versions do not notice, and runs while they serve. *Contract* takes away what only
//! older versions need, and runs when none is left. See `migrations/README.md` for how a file is written.

mod batch;
mod progress;

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection,
    migrate::{Migration, Migrator},
    postgres::PgConnectOptions,
};
use tokio::time::Instant;
use tracing::info;
use uuid::Uuid;

use self::{
    batch::{Batch, Mode, split},
    progress::Progress,
};
use crate::{app::App, config::StoreUrl, db, release::Release};

static EXPAND: Migrator = sqlx::migrate!("./migrations/expand");
static CONTRACT: Migrator = sqlx::migrate!("./migrations/contract");

/// Only one migration at a time; the number means nothing.
const LOCK: i64 = 0x6578_6368_616e_6765;

/// How long a statement may wait for a lock, and with it everything that queues behind it.
const LOCK_TIMEOUT: &str = "250ms";

/// How often every process announces itself.
pub(crate) const ANNOUNCE_EVERY: Duration = Duration::from_secs(10);

/// An instance that has not been seen for so long is gone, if there was a database in which it could be seen.
pub const INSTANCE_GONE_AFTER: Duration = Duration::from_secs(45);

/// The flags of `exchange migrate`.
#[derive(Clone, Debug, clap::Args)]
pub struct MigrateArgs {
    /// What to run.
    #[arg(long, env = "EXCHANGE_PHASE")]
    phase: Phase,
    /// PostgreSQL, as the owner of the schema.
    #[arg(long, env = "EXCHANGE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// A file with that URL.
    #[arg(long, env = "EXCHANGE_DATABASE_URL_FILE", conflicts_with = "database_url")]
    database_url_file: Option<std::path::PathBuf>,
    /// How long to wait for locks, other migrations and old instances before giving up.
    #[arg(long, env = "EXCHANGE_MIGRATE_DEADLINE", default_value = "5m")]
    deadline: jiff::SignedDuration,
    /// Refuse unless the database has this identity, which `/stack` of a live service shows.
    #[arg(long, env = "EXCHANGE_EXPECT_DATABASE")]
    expect_database: Option<Uuid>,
    /// Refuse unless the server has room for two stacks of so many connections.
    #[arg(long, env = "EXCHANGE_CONNECTIONS_PER_STACK")]
    connections_per_stack: Option<i64>,
}

/// The two kinds of migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// Adds; older versions go on working.
    Expand,
    /// Removes what only older versions used.
    Contract,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Expand => "expand",
            Self::Contract => "contract",
        }
    }

    /// The files of a release: those up to its level, in the order of their numbers.
    fn migrations(self, release: Release) -> &'static [Migration] {
        let all: &'static [Migration] = match self {
            Self::Expand => &EXPAND.migrations,
            Self::Contract => &CONTRACT.migrations,
        };
        let newer = all.partition_point(|migration| migration.version <= release.level);
        all.split_at(newer).0
    }
}

/// What a database says about its schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct SchemaState {
    /// Made at the first expand, never changed.
    pub identity: Uuid,
    /// The highest expand applied.
    pub expanded: i64,
    /// The lowest level of a build that can work with the schema; only a contract raises it.
    pub oldest_reader: i64,
}

impl SchemaState {
    /// Whether a build of this level can work, or a sentence that says why not.
    pub fn supports(&self, level: i64) -> Result<(), String> {
        if self.expanded < level {
            return Err(format!(
                "the schema is expanded to {}, this build needs {level}",
                self.expanded
            ));
        }
        self.bears(level)
    }

    /// Whether what a build of this level reads has not been taken away, or a sentence that says so.
    fn bears(&self, level: i64) -> Result<(), String> {
        if self.oldest_reader > level {
            return Err(format!(
                "the schema is contracted for {} and later, this build is {level}",
                self.oldest_reader
            ));
        }
        Ok(())
    }
}

/// Reads what the database says about its schema.
pub async fn read_state(executor: impl sqlx::PgExecutor<'_>) -> Result<SchemaState, sqlx::Error> {
    sqlx::query_as("select identity, expanded, oldest_reader from schema_state")
        .fetch_one(executor)
        .await
}

/// Says that this process works with the schema, which a contract must not break under it.
pub async fn announce(app: &App) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into instances (id, service, stack, level) values ($1, $2, $3, $4)
         on conflict (id) do update set seen_at = now()",
    )
    .bind(app.instance)
    .bind(app.service)
    .bind(app.stack.to_string())
    .bind(app.release.level)
    .execute(&app.db)
    .await?;
    Ok(())
}

/// Takes that back, at the end.
pub async fn depart(app: &App) -> Result<(), sqlx::Error> {
    sqlx::query("delete from instances where id = $1")
        .bind(app.instance)
        .execute(&app.db)
        .await?;
    Ok(())
}

/// Runs what is outstanding of one phase. Can be killed at any moment and run again.
pub async fn run(args: MigrateArgs, release: Release) -> anyhow::Result<()> {
    let url = match (args.database_url, args.database_url_file) {
        (Some(url), _) => StoreUrl::Given(SecretString::from(url)),
        (None, Some(path)) => StoreUrl::File(path),
        (None, None) => bail!("--database-url or --database-url-file is required"),
    };
    let deadline =
        Instant::now() + Duration::try_from(args.deadline).context("--deadline must be positive")?;
    let options: PgConnectOptions = url
        .read()
        .context("failed to read the database URL")?
        .expose_secret()
        .parse()
        .context("--database-url")?;
    let options = options.application_name("exchange-migrate").options([
        ("lock_timeout", LOCK_TIMEOUT),
        // A killed migration must not go on holding the lock.
        ("client_connection_check_interval", "1s"),
    ]);
    let mut connection = connect(&options, deadline).await?;
    lock(&mut connection, deadline).await?;
    prepare(&mut connection).await?;
    let state = read_state(&mut connection).await?;
    info!(
        labels.phase = args.phase.as_str(),
        "database {}: expanded to {}, oldest reader {}", state.identity, state.expanded, state.oldest_reader,
    );
    if let Some(expected) = args.expect_database {
        ensure!(
            state.identity == expected,
            "this is database {}, not {expected}",
            state.identity
        );
    }
    if args.phase == Phase::Expand {
        // Its services would say the same, but only after all of them have been started in vain.
        state.bears(release.level).map_err(anyhow::Error::msg)?;
    }
    if let Some(connections) = args.connections_per_stack {
        check_connection_budget(&mut connection, connections).await?;
    }
    bring_forward(
        &mut connection,
        args.phase,
        args.phase.migrations(release),
        deadline,
    )
    .await?;
    let state = read_state(&mut connection).await?;
    info!(
        "done: expanded to {}, oldest reader {}",
        state.expanded, state.oldest_reader
    );
    connection.close().await?;
    Ok(())
}

/// Runs what is outstanding of the given files, which are in the order of their numbers.
pub async fn bring_forward(
    connection: &mut PgConnection,
    phase: Phase,
    files: &[Migration],
    deadline: Instant,
) -> anyhow::Result<()> {
    verify_applied(connection, phase, files).await?;
    for migration in files {
        if phase == Phase::Contract {
            let expanded = read_state(&mut *connection).await?.expanded;
            let number = migration.version;
            ensure!(
                expanded >= number,
                "contract {number} needs expand {number}, the schema is expanded to {expanded}"
            );
        }
        apply(connection, phase, migration, deadline).await?;
    }
    Ok(())
}

async fn connect(options: &PgConnectOptions, deadline: Instant) -> anyhow::Result<PgConnection> {
    loop {
        match options.connect().await {
            Ok(connection) => return Ok(connection),
            Err(error) if db::is_unavailable(&error) && Instant::now() < deadline => {
                info!("waiting for the database: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error).context("failed to connect to the database"),
        }
    }
}

/// A blocking lock would queue, out of sight, behind a migration that is stuck.
async fn lock(connection: &mut PgConnection, deadline: Instant) -> anyhow::Result<()> {
    loop {
        let locked: bool = sqlx::query_scalar("select pg_try_advisory_lock($1)")
            .bind(LOCK)
            .fetch_one(&mut *connection)
            .await?;
        if locked {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "another migration is running");
        info!("waiting: another migration is running");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What must be there before the first migration: the ledgers, the state, and the role that services are members of.
async fn prepare(connection: &mut PgConnection) -> anyhow::Result<()> {
    sqlx::raw_sql(include_str!("../migrations/prepare.sql"))
        .execute(&mut *connection)
        .await
        .context("failed to prepare the migration ledgers")?;
    sqlx::query("insert into schema_state (identity, expanded, oldest_reader) values ($1, 0, 0) on conflict do nothing")
        .bind(Uuid::now_v7())
        .execute(connection)
        .await?;
    Ok(())
}

async fn check_connection_budget(connection: &mut PgConnection, per_stack: i64) -> anyhow::Result<()> {
    let available: i64 = sqlx::query_scalar(
        "select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint",
    )
    .fetch_one(connection)
    .await?;
    ensure!(
        per_stack * 2 <= available,
        "two stacks need {} connections, the server has {available}: lower --database-connections or raise max_connections",
        per_stack * 2,
    );
    Ok(())
}

/// An applied file is never edited. What a newer build has applied is none of our business.
async fn verify_applied(
    connection: &mut PgConnection,
    phase: Phase,
    files: &[Migration],
) -> anyhow::Result<()> {
    let applied: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("select number, checksum from migrations where phase = $1")
            .bind(phase.as_str())
            .fetch_all(connection)
            .await?;
    for (number, checksum) in applied {
        let ours = files.iter().find(|migration| migration.version == number);
        ensure!(
            ours.is_none_or(|migration| *migration.checksum == *checksum),
            "{} {number} has been edited after it was applied",
            phase.as_str(),
        );
    }
    Ok(())
}

async fn apply(
    connection: &mut PgConnection,
    phase: Phase,
    migration: &Migration,
    deadline: Instant,
) -> anyhow::Result<()> {
    let name = format!(
        "{} {:04} ({})",
        phase.as_str(),
        migration.version,
        migration.description
    );
    let batches = split(migration.sql.as_str());
    let total = i32::try_from(batches.len())?;
    let done: Option<i32> =
        sqlx::query_scalar("select batches_done from migrations where phase = $1 and number = $2")
            .bind(phase.as_str())
            .bind(migration.version)
            .fetch_optional(&mut *connection)
            .await?;
    if done == Some(total) {
        return Ok(());
    }
    if phase == Phase::Contract {
        no_older_readers(connection, migration.version, deadline).await?;
    }
    for (number, batch) in (1..).zip(&batches).skip(usize::try_from(done.unwrap_or(0))?) {
        let start = Instant::now();
        let mut progress = Progress::begin(format!("{name}: batch {number} of {total}"), start);
        let last = number == total;
        while let Err(error) =
            run_batch(connection, phase, migration, batch, number, last, &mut progress).await
        {
            if !db::is_retryable(&error) || Instant::now() >= deadline {
                return Err(error).context(progress.batch);
            }
            info!(
                "{} waits for a lock after {}: {error}",
                progress.batch,
                progress.so_far()
            );
            tokio::time::sleep(Duration::from_millis(rand::random_range(100..500))).await;
        }
        info!(
            "{} done, {} rows in {} ms",
            progress.batch,
            progress.rows,
            start.elapsed().as_millis()
        );
    }
    Ok(())
}

/// Waits until no instance is seen that the contract would break.
///
/// After a time without a database an instance that is alive looks gone until it announces itself again. So one that has
/// not signed off is gone only when it stays silent while we look on, for longer than it may be silent.
async fn no_older_readers(
    connection: &mut PgConnection,
    number: i64,
    deadline: Instant,
) -> anyhow::Result<()> {
    let looking_since = Instant::now();
    loop {
        let sure = looking_since.elapsed() >= ANNOUNCE_EVERY * 2;
        let older: Vec<String> = sqlx::query_scalar(
            "select service || ' of ' || stack from instances
             where level < $1 and (seen_at > now() - make_interval(secs => $2) or not $3) order by 1",
        )
        .bind(number)
        .bind(INSTANCE_GONE_AFTER.as_secs_f64())
        .bind(sure)
        .fetch_all(&mut *connection)
        .await?;
        if older.is_empty() {
            return Ok(());
        }
        let older = older.join(", ");
        ensure!(
            Instant::now() < deadline,
            "contract {number} would break instances that still run, or have not signed off: {older}"
        );
        info!("contract {number} waits for older instances to end: {older}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Runs one batch and records it, in one transaction where the batch allows it. What has been done when it fails stands in the
/// progress.
async fn run_batch(
    connection: &mut PgConnection,
    phase: Phase,
    migration: &Migration,
    batch: &Batch<'_>,
    number: i32,
    last: bool,
    progress: &mut Progress,
) -> Result<(), sqlx::Error> {
    let sql = || sqlx::raw_sql(AssertSqlSafe(batch.sql.to_owned()));
    match batch.mode {
        Mode::Transaction => {}
        Mode::OutsideTransaction => {
            drop_invalid_indexes(connection).await?;
            progress.rows = sql().execute(&mut *connection).await?.rows_affected();
        }
        Mode::Repeat { whole } => {
            if let Some(whole) = whole.filter(|_| progress.whole.is_none()) {
                let count = sqlx::query_scalar(AssertSqlSafe(whole.to_owned()));
                progress.whole = Some(count.fetch_one(&mut *connection).await?);
            }
            loop {
                let some = sql().execute(&mut *connection).await?.rows_affected();
                if some == 0 {
                    break;
                }
                if let Some(told) = progress.add(some, Instant::now()) {
                    info!("{told}");
                }
            }
        }
    }
    let mut transaction = connection.begin().await?;
    if batch.mode == Mode::Transaction {
        progress.rows = sql().execute(&mut *transaction).await?.rows_affected();
    }
    sqlx::query(
        "insert into migrations (phase, number, name, checksum, batches_done) values ($1, $2, $3, $4, $5)
         on conflict (phase, number) do update set batches_done = excluded.batches_done, changed_at = now()",
    )
    .bind(phase.as_str())
    .bind(migration.version)
    .bind(migration.description.as_ref())
    .bind(migration.checksum.as_ref())
    .bind(number)
    .execute(&mut *transaction)
    .await?;
    if last {
        let raise = match phase {
            Phase::Expand => sqlx::query("update schema_state set expanded = greatest(expanded, $1)"),
            Phase::Contract => {
                sqlx::query("update schema_state set oldest_reader = greatest(oldest_reader, $1)")
            }
        };
        raise.bind(migration.version).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}

/// What a `create index concurrently` leaves behind when it is interrupted, and what `if not exists` takes for an index.
async fn drop_invalid_indexes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let names: Vec<String> = sqlx::query_scalar(
        "select format('%I.%I', nspname, relname) from pg_index
         join pg_class on pg_class.oid = indexrelid join pg_namespace on pg_namespace.oid = relnamespace
         where not indisvalid and nspname = 'public'",
    )
    .fetch_all(&mut *connection)
    .await?;
    for name in names {
        info!("dropping the index {name}, which was not completed");
        sqlx::raw_sql(AssertSqlSafe(format!("drop index concurrently if exists {name}")))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::release;

    #[test]
    fn a_release_brings_the_schema_to_its_level_and_every_file_is_of_one() {
        let numbers = |phase: Phase, release| {
            let files = phase.migrations(release).iter();
            files.map(|file| file.version).collect::<Vec<_>>()
        };
        for release in [release::V1, release::V2] {
            assert_eq!(numbers(Phase::Expand, release).last(), Some(&release.level));
            let contracts = numbers(Phase::Contract, release);
            assert!(
                contracts
                    .iter()
                    .all(|number| numbers(Phase::Expand, release).contains(number))
            );
        }
        assert_eq!(numbers(Phase::Expand, release::V2).len(), EXPAND.migrations.len());
        assert_eq!(numbers(Phase::Contract, release::V1), [0; 0]);
        assert_eq!(numbers(Phase::Contract, release::V2), [release::V2.level]);
    }

    #[test]
    fn a_build_works_between_the_oldest_reader_and_the_expanded_level() {
        let state = SchemaState {
            identity: Uuid::nil(),
            expanded: 7,
            oldest_reader: 5,
        };
        assert!(state.supports(4).unwrap_err().contains("contracted"));
        assert!(state.supports(5).is_ok() && state.supports(7).is_ok());
        assert!(state.supports(8).unwrap_err().contains("needs 8"));
    }
}
