//! The PostgreSQL pool: credentials that may change, time limits, and which failures pass.

use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::{
    Connection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::StoreUrl;

/// How long a connection may idle in the pool before it is tried before use. Trying each time would cost a round
/// trip per request.
const TRUSTED_IDLE: Duration = Duration::from_secs(5);

/// How long a connection may take to show that it is alive: from a database host that has gone without a word nothing comes.
const TRIED_IN: Duration = Duration::from_secs(2);

/// How long a request waits for a connection. On a machine that has too much to do it is answered a moment later, and would
/// otherwise have to come again. Less than clients wait for an answer, such as those of the smoke test ([`crate::trader`]): they
/// are told that the database is away.
const CONNECTION_IN: Duration = Duration::from_secs(8);

/// How often the file with the URL is looked at: less than a request waits for a connection.
const CREDENTIALS_POLL: Duration = Duration::from_secs(1);

/// A pool that connects when it is used: a service starts, and says that it is not ready, without its database.
pub fn pool(database: &StoreUrl, connections: u32, application_name: &str) -> anyhow::Result<PgPool> {
    let options = connect_options(database, application_name)?;
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(CONNECTION_IN)
        .idle_timeout(Duration::from_mins(5))
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move {
                if meta.idle_for < TRUSTED_IDLE {
                    return Ok(true);
                }
                Ok(matches!(timeout(TRIED_IN, connection.ping()).await, Ok(Ok(()))))
            })
        })
        .connect_lazy_with(options);
    Ok(pool)
}

/// Reads the store's URL as it is now, and adds the limits under which services work.
fn connect_options(store: &StoreUrl, application_name: &str) -> anyhow::Result<PgConnectOptions> {
    let url = store.read()?;
    // The parser's error does not repeat the URL, which holds a password.
    let options: PgConnectOptions = url.expose_secret().parse()?;
    Ok(options.application_name(application_name).options([
        ("statement_timeout", "10s"),
        ("lock_timeout", "5s"),
        ("idle_in_transaction_session_timeout", "15s"),
    ]))
}

/// Keeps the pool's credentials equal to the file's, until cancelled. Open connections stay; new ones use the new.
pub async fn follow_credentials(pool: PgPool, store: StoreUrl, shutdown: CancellationToken) {
    let StoreUrl::File(_) = &store else { return };
    let name = pool
        .connect_options()
        .get_application_name()
        .unwrap_or_default()
        .to_owned();
    let mut current = None;
    while shutdown
        .run_until_cancelled(tokio::time::sleep(CREDENTIALS_POLL))
        .await
        .is_some()
    {
        let url = match store.read() {
            Ok(url) => url.expose_secret().to_owned(),
            Err(error) => {
                warn!(error.message = %error, "failed to read the database URL's file; keeping the last one");
                continue;
            }
        };
        if current.as_ref() == Some(&url) {
            continue;
        }
        match connect_options(&store, &name) {
            Ok(options) => {
                pool.set_connect_options(options);
                if current.replace(url).is_some() {
                    info!("the database URL has changed; new connections use it");
                }
            }
            Err(error) => {
                warn!(error.message = %error, "the new database URL is not usable; keeping the last one");
            }
        }
    }
}

/// Whether the database could not be reached or is not able to work: nothing has been committed unless the
/// connection broke during the commit itself.
pub fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            // Connection, resources, operator intervention (except a cancelled query), wrong password, read-only.
            (code.starts_with("08")
                || code.starts_with("53")
                || code.starts_with("57")
                || code.starts_with("28"))
                && code != "57014"
                || code == "25006"
        }),
        _ => false,
    }
}

/// Whether a lock was waited for in vain.
pub fn is_lock_timeout(error: &sqlx::Error) -> bool {
    let error = error.as_database_error();
    error.is_some_and(|error| error.code().is_some_and(|code| code == "55P03"))
}

/// Whether the transaction was undone for a reason that passes: a conflict, a deadlock, a lock or time limit.
pub fn is_retryable(error: &sqlx::Error) -> bool {
    let code = error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| matches!(code.as_ref(), "40001" | "40P01" | "55P03" | "57014"))
}
