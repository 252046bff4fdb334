//! Freezes of accounts as periods of their own, from version 2 on.
//!
//! The database derives `accounts.state` from them, which settlement reads. While version 1 may still run, it derives
//! them from the state as well (see `migrations/expand/0020_freezes.sql`).

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::lane::Lane;

use super::ledger::AccountState;

/// Begins or ends the freeze of an account, whose row the caller has locked. Says whether that changed anything.
pub(super) async fn set(
    connection: &mut PgConnection,
    account: Uuid,
    lane: &Lane,
    state: AccountState,
) -> Result<bool, sqlx::Error> {
    let changed = match state {
        AccountState::Frozen => {
            sqlx::query(
                "insert into freezes (account_id, lane) values ($1, $2)
                 on conflict (account_id) where lifted_at is null do nothing",
            )
            .bind(account)
            .bind(lane)
            .execute(connection)
            .await?
        }
        AccountState::Active => {
            sqlx::query(
                "update freezes set lifted_at = greatest(clock_timestamp(), frozen_at)
                 where account_id = $1 and lifted_at is null",
            )
            .bind(account)
            .execute(connection)
            .await?
        }
    };
    Ok(changed.rows_affected() > 0)
}

/// Since when an account is frozen, if it is.
pub(super) async fn frozen_at(
    connection: &mut PgConnection,
    account: Uuid,
) -> Result<Option<OffsetDateTime>, sqlx::Error> {
    sqlx::query_scalar("select frozen_at from freezes where account_id = $1 and lifted_at is null")
        .bind(account)
        .fetch_optional(connection)
        .await
}
