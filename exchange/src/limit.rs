//! Limits of attempts per key and window, in PostgreSQL, so that all replicas and both colours count together.

use std::time::Duration;

use sha2::{Digest, Sha256};
use sqlx::PgPool;

use crate::error::{ApiError, TOO_MANY_REQUESTS};

const WINDOW: Duration = Duration::from_mins(15);

/// Something of which there may be only so many attempts in 15 minutes. Only its hash is stored.
pub struct Limit {
    key: Vec<u8>,
    allowed: i32,
}

impl Limit {
    /// `kind` and `whose` together name what is limited.
    pub fn new(kind: &str, whose: &str, allowed: i32) -> Self {
        Self {
            key: Sha256::digest(format!("{kind}:{whose}")).to_vec(),
            allowed,
        }
    }

    /// Counts an attempt. Counting comes before the attempt: many at the same time do not get past.
    pub async fn count(&self, db: &PgPool) -> Result<(), ApiError> {
        let (attempts, seconds): (i32, f64) = sqlx::query_as(
            "insert into rate_limits as known (key, attempts, window_ends_at)
             values ($1, 1, now() + make_interval(secs => $2))
             on conflict (key) do update set
                 attempts = case when known.window_ends_at <= now() then 1 else known.attempts + 1 end,
                 window_ends_at = case when known.window_ends_at <= now() then excluded.window_ends_at
                     else known.window_ends_at end
             returning attempts, extract(epoch from window_ends_at - now())::float8",
        )
        .bind(&self.key)
        .bind(WINDOW.as_secs_f64())
        .fetch_one(db)
        .await?;
        if attempts <= self.allowed {
            return Ok(());
        }
        Err(ApiError::from(TOO_MANY_REQUESTS).retry_after(Duration::from_secs_f64(seconds.max(1.0).ceil())))
    }

    /// Forgets one attempt, which turned out to be a legitimate one.
    pub async fn forgive(&self, db: &PgPool) -> Result<(), ApiError> {
        sqlx::query("update rate_limits set attempts = attempts - 1 where key = $1 and attempts > 0")
            .bind(&self.key)
            .execute(db)
            .await?;
        Ok(())
    }
}
