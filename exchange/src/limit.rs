//! Limits of attempts per key and window, in PostgreSQL, so that all replicas and both colours count together.

use std::time::Duration;

use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::error::{ApiError, TOO_MANY_REQUESTS};

const WINDOW: Duration = Duration::from_mins(15);
/// When to come again while it is open whether those under way will count.
const SOON: Duration = Duration::from_secs(1);

/// Something of which there may be only so many attempts in 15 minutes. Only its hashes are stored.
pub struct Limit {
    /// Of those that count and those under way: many at the same time do not get past.
    key: Vec<u8>,
    /// Of those alone that count, which say how long one has to wait.
    counted: Vec<u8>,
    allowed: i32,
}

impl Limit {
    /// `kind` and `whose` together name what is limited.
    pub fn new(kind: &str, whose: &str, allowed: i32) -> Self {
        Self {
            key: Sha256::digest(format!("{kind}:{whose}")).to_vec(),
            counted: Sha256::digest(format!("counted {kind}:{whose}")).to_vec(),
            allowed,
        }
    }

    /// Begins an attempt. In a task of its own: who hangs up meanwhile leaves none behind that nobody ends.
    pub async fn begin(self, db: &PgPool) -> Result<Attempt, ApiError> {
        let beginning = tokio::spawn(self.begin_now(db.clone()));
        beginning.await.map_err(ApiError::internal)?
    }

    async fn begin_now(self, db: PgPool) -> Result<Attempt, ApiError> {
        let window_ends_at = sqlx::query_scalar(
            "insert into rate_limits as known (key, attempts, window_ends_at)
             values ($1, 1, now() + make_interval(secs => $2))
             on conflict (key) do update set
                 attempts = case when known.window_ends_at <= now() then 1 else known.attempts + 1 end,
                 window_ends_at = case when known.window_ends_at <= now() then excluded.window_ends_at
                     else known.window_ends_at end
             where known.window_ends_at <= now() or known.attempts < $3
             returning window_ends_at",
        )
        .bind(&self.key)
        .bind(WINDOW.as_secs_f64())
        .bind(self.allowed)
        .fetch_optional(&db)
        .await?;
        if let Some(window_ends_at) = window_ends_at {
            return Ok(Attempt {
                limit: self,
                window_ends_at,
                db,
                over: false,
            });
        }
        let seconds: Option<f64> = sqlx::query_scalar(
            "select extract(epoch from window_ends_at - now())::float8
             from rate_limits as every join rate_limits as counted using (window_ends_at)
             where every.key = $1 and counted.key = $2 and counted.attempts >= $3",
        )
        .bind(&self.key)
        .bind(&self.counted)
        .bind(self.allowed)
        .fetch_optional(&db)
        .await?;
        let wait = seconds.map_or(SOON, |seconds| Duration::from_secs_f64(seconds.max(1.0).ceil()));
        Err(ApiError::from(TOO_MANY_REQUESTS).retry_after(wait))
    }
}

/// Forgets everything about these limits: attempts that count, and those under way.
pub async fn erase(connection: &mut PgConnection, limits: &[Limit]) -> Result<(), sqlx::Error> {
    let keys: Vec<&[u8]> = limits
        .iter()
        .flat_map(|limit| [limit.key.as_slice(), limit.counted.as_slice()])
        .collect();
    sqlx::query("delete from rate_limits where key = any($1)")
        .bind(keys)
        .execute(connection)
        .await?;
    Ok(())
}

/// An attempt under way. Unless it is said to count it is forgotten when it ends, also if it ends because of a failure of
/// ours, or because the client has hung up.
pub struct Attempt {
    limit: Limit,
    window_ends_at: OffsetDateTime,
    db: PgPool,
    over: bool,
}

impl Attempt {
    /// Ends it as one of those that are limited.
    pub async fn count(mut self) -> Result<(), sqlx::Error> {
        self.over = true;
        sqlx::query(
            "insert into rate_limits as known (key, attempts, window_ends_at) values ($1, 1, $2)
             on conflict (key) do update set
                 attempts = case when known.window_ends_at = excluded.window_ends_at then known.attempts + 1 else 1 end,
                 window_ends_at = excluded.window_ends_at
             where known.window_ends_at <= excluded.window_ends_at",
        )
        .bind(&self.limit.counted)
        .bind(self.window_ends_at)
        .execute(&self.db)
        .await?;
        Ok(())
    }

    /// Ends it as a legitimate one, and waits until it is forgotten.
    pub async fn forgive(mut self) {
        if let Some(forgetting) = self.forget() {
            // It has logged what was in its way.
            let _ = forgetting.await;
        }
    }

    /// In a task of its own: it must happen once, however the request goes on.
    fn forget(&mut self) -> Option<JoinHandle<()>> {
        if std::mem::replace(&mut self.over, true) {
            return None;
        }
        let key = std::mem::take(&mut self.limit.key);
        let (db, window_ends_at) = (self.db.clone(), self.window_ends_at);
        Some(tokio::spawn(async move {
            let forgotten = sqlx::query(
                "update rate_limits set attempts = attempts - 1
                 where key = $1 and window_ends_at = $2 and attempts > 0",
            )
            .bind(key)
            .bind(window_ends_at)
            .execute(&db)
            .await;
            if let Err(error) = forgotten {
                warn!(error.message = %error, "an attempt that should not count does so until its window ends");
            }
        }))
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        drop(self.forget());
    }
}
