//! Release notices: every user is told once when a new revision has gone live.
//!
//! A stack announces itself when it has been live without a break for longer than a release is verified; one that
//! is rolled back before that is never announced. Users are told in portions, each in a transaction that also
//! says how far the announcement has come.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{app::StackId, notification::CHANNEL, outbox::rest};

/// Users told in one transaction.
const PORTION: i64 = 500;
/// How often it is looked for what another pod of the stack has begun and left.
const IDLE: Duration = Duration::from_secs(5);

/// Announces this stack once `delay` has passed, and finishes what other pods of it have left, until told to stop. To be run
/// only while the stack is live. The announcement of another stack is not finished: that one is live no longer.
pub async fn run(db: &PgPool, stack: &StackId, delay: Duration, stop: &CancellationToken) {
    rest(stop, delay).await;
    let mut recorded = false;
    while !stop.is_cancelled() {
        let pass = async {
            if !recorded {
                record(db, stack).await?;
                recorded = true;
            }
            announce_portion(db, &stack.revision).await
        };
        match pass.await {
            Ok(true) => {}
            Ok(false) => rest(stop, IDLE).await,
            Err(error) => {
                warn!(error.message = %error, "failed to announce a release");
                rest(stop, IDLE).await;
            }
        }
    }
}

async fn record(db: &PgPool, stack: &StackId) -> Result<(), sqlx::Error> {
    let new = sqlx::query("insert into releases (revision, version) values ($1, $2) on conflict do nothing")
        .bind(&stack.revision)
        .bind(stack.version)
        .execute(db)
        .await?;
    if new.rows_affected() > 0 {
        info!("announcing {} ({}) to all users", stack.version, stack.revision);
    }
    Ok(())
}

/// Tells the next users of the announcement of a revision. False: nothing is left to do for this process.
async fn announce_portion(db: &PgPool, revision: &str) -> Result<bool, sqlx::Error> {
    let mut transaction = db.begin().await?;
    let release: Option<(String, Uuid)> = sqlx::query_as(
        "select version, coalesce(announced_to, '00000000-0000-0000-0000-000000000000')
         from releases where revision = $1 and announced_at is null for update skip locked",
    )
    .bind(revision)
    .fetch_optional(&mut *transaction)
    .await?;
    let Some((version, announced_to)) = release else {
        return Ok(false);
    };
    // Locked against a deletion, which then waits for what is written here and erases it.
    let users: Vec<(Uuid,)> = sqlx::query_as(
        "select id from users
         where lane = 'live' and deleted_at is null and id > $1
           and created_at <= (select live_at from releases where revision = $2)
         order by id limit $3 for key share",
    )
    .bind(announced_to)
    .bind(revision)
    .bind(PORTION)
    .fetch_all(&mut *transaction)
    .await?;
    let users: Vec<Uuid> = users.into_iter().map(|(id,)| id).collect();
    let Some(last) = users.last() else {
        sqlx::query("update releases set announced_at = now() where revision = $1")
            .bind(revision)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        return Ok(true);
    };
    sqlx::query(
        "with counted as (
             insert into notification_counters as counter (user_id, lane, last_seq)
             select id, 'live', 1 from unnest($1::uuid[]) as told (id) order by id
             on conflict (user_id) do update set last_seq = counter.last_seq + 1
             returning user_id, last_seq
         ), written as (
             insert into notifications (user_id, seq, lane, kind, title, data)
             select user_id, last_seq, 'live', 'release', $2, $3 from counted
             returning user_id
         )
         select pg_notify($4, user_id::text) from written",
    )
    .bind(&users)
    .bind(format!("Version {version} is live"))
    .bind(json!({"version": version, "revision": revision}))
    .bind(CHANNEL)
    .execute(&mut *transaction)
    .await?;
    sqlx::query("update releases set announced_to = $2 where revision = $1")
        .bind(revision)
        .bind(last)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(true)
}
