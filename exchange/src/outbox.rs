//! The outbox: what happened is written down in the transaction in which it happened, and told to the queue
//! afterwards.
//!
//! A row goes through three states. *Open*: not yet published. *Published*: the broker has confirmed it. *Done*:
//! every consumer of its topic has its [`crate::inbox`] row, written in the transaction of the consumer's effect.
//! A row that stays published for too long is opened again, so that nothing depends on the broker's store. Every
//! step may be repeated; the inbox makes the effect happen once.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    bus::{Bus, BusError, Outgoing, Scope},
    lane::Lane,
    messages::MessageMetrics,
    telemetry::TraceContext,
};

/// Rows published in one transaction.
const BATCH: i64 = 256;
/// How long the relay rests when there is nothing to publish: the latency that the outbox adds to an event.
const IDLE: Duration = Duration::from_millis(100);
/// How often the relay makes sure that its stream is still there.
const LOOK: Duration = Duration::from_secs(1);
/// How often rows are found done, or published for too long.
const SWEEP: Duration = Duration::from_secs(1);
/// Rows swept, or removed, at a time.
const SWEEP_BATCH: i64 = 5_000;
/// How often old rows are looked for.
const PRUNE: Duration = Duration::from_mins(1);
/// How long it is remembered that an event was handled: longer than the broker keeps any message.
const INBOX_AGE: Duration = Duration::from_hours(7 * 24);
/// How long the relay waits after an error.
const PAUSE: Duration = Duration::from_secs(1);

/// What an event is about. Each topic's payload is described in `docs/messages.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Two orders were matched and settled.
    TradeExecuted,
    /// Money came in or went out.
    TransferPosted,
    /// An account was added, updated or deleted.
    AccountChanged,
    /// Somebody signed in.
    SignedIn,
}

impl Topic {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::TradeExecuted,
        Self::TransferPosted,
        Self::AccountChanged,
        Self::SignedIn,
    ];

    /// The topic as it is stored, and as it ends a subject.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TradeExecuted => "trade.executed",
            Self::TransferPosted => "transfer.posted",
            Self::AccountChanged => "account.changed",
            Self::SignedIn => "user.signed_in",
        }
    }

    /// The topic of this name, if this version knows it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|topic| topic.as_str() == name)
    }

    /// Who has to have handled an event of this topic before it is done.
    pub fn consumers(self) -> &'static [&'static str] {
        match self {
            Self::TradeExecuted => &["notification", "market"],
            Self::TransferPosted | Self::AccountChanged | Self::SignedIn => &["notification"],
        }
    }
}

/// Something that happened, to be told to others.
#[derive(Clone, Debug)]
pub struct Event {
    /// The lane of the user who caused it.
    pub lane: Lane,
    /// What it is about.
    pub topic: Topic,
    /// What it belongs to: a product or a user.
    pub key: String,
    /// The facts.
    pub payload: Value,
}

/// Writes an event down, in the transaction of what it tells, with the trace that it belongs to.
pub async fn enqueue(connection: &mut PgConnection, event: &Event) -> Result<Uuid, sqlx::Error> {
    let id = Uuid::now_v7();
    let headers = TraceContext::current().map_or_else(|| json!({}), |context| context.headers());
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload, headers) values ($1, $2, $3, $4, $5, $6)",
    )
    .bind(id)
    .bind(&event.lane)
    .bind(event.topic.as_str())
    .bind(&event.key)
    .bind(&event.payload)
    .bind(headers)
    .execute(connection)
    .await?;
    Ok(id)
}

/// What can stop a pass of the relay. Every pass may be repeated.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    #[error("{0}")]
    Bus(#[from] BusError),
}

/// Publishes the open rows of a scope until told to stop. Any number of relays may run at once.
pub async fn relay(
    db: &PgPool,
    bus: &Bus,
    scope: &Scope,
    metrics: &MessageMetrics,
    stop: &CancellationToken,
) {
    let mut looked_at: Option<Instant> = None;
    while !stop.is_cancelled() {
        let pass = async {
            if !bus.connected() {
                return Ok(0);
            }
            // The broker may have come back without its store, or somebody may have removed the stream.
            if looked_at.is_none_or(|at| at.elapsed() >= LOOK) {
                if bus.ensure_stream(scope).await? {
                    let reopened = reopen_all(db, scope).await?;
                    info!(
                        labels.stream = scope.stream(),
                        labels.reopened = reopened,
                        "the stream was created"
                    );
                }
                looked_at = Some(Instant::now());
            }
            publish_open(db, bus, scope, metrics).await
        };
        match pass.await {
            Ok(0) => rest(stop, IDLE).await,
            Ok(_) => {}
            Err(error) => {
                warn!(labels.stream = scope.stream(), error.message = %error, "failed to publish from the outbox");
                looked_at = None;
                rest(stop, PAUSE).await;
            }
        }
    }
}

/// Waits for a while, or until told to stop.
pub(crate) async fn rest(stop: &CancellationToken, pause: Duration) {
    // A timeout is the ordinary case.
    let _ = tokio::time::timeout(pause, stop.cancelled()).await;
}

/// Publishes up to one batch of open rows and marks those that the broker has confirmed.
///
/// A crash before the mark is committed leaves them open: they are published again under the same ids.
async fn publish_open(
    db: &PgPool,
    bus: &Bus,
    scope: &Scope,
    metrics: &MessageMetrics,
) -> Result<usize, RelayError> {
    let mut transaction = db.begin().await?;
    let events: Vec<Outgoing> = sqlx::query_as(
        "select id, lane, topic, payload, headers ->> 'traceparent' as traceparent,
                headers ->> 'tracestate' as tracestate
         from outbox
         where published_at is null and done_at is null and starts_with(lane, $1)
         order by id limit $2 for update skip locked",
    )
    .bind(scope.lane_prefix())
    .bind(BATCH)
    .fetch_all(&mut *transaction)
    .await?;
    if events.is_empty() {
        return Ok(0);
    }
    let mut sent = Vec::with_capacity(events.len());
    for event in &events {
        let ack = bus.publish(event).await?;
        sent.push(async move { (event.id, ack.await) });
    }
    let mut confirmed = Vec::with_capacity(sent.len());
    let mut failure = None;
    for (id, ack) in join_all(sent).await {
        match ack {
            Ok(_) => confirmed.push(id),
            Err(error) => failure = Some(error),
        }
    }
    sqlx::query("update outbox set published_at = now() where id = any($1)")
        .bind(&confirmed)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    metrics.published.inc_by(confirmed.len() as u64);
    match failure {
        Some(error) => Err(BusError::unconfirmed(&error).into()),
        None => Ok(events.len()),
    }
}

/// Opens everything that is not done: the broker has forgotten it.
async fn reopen_all(db: &PgPool, scope: &Scope) -> Result<u64, sqlx::Error> {
    sqlx::query(
        "update outbox set published_at = null
         where done_at is null and published_at is not null and starts_with(lane, $1)",
    )
    .bind(scope.lane_prefix())
    .execute(db)
    .await
    .map(|result| result.rows_affected())
}

/// Keeps the books of a scope's outbox until told to stop: marks what is done, opens what got lost, measures
/// what waits, and (for the live scope) removes what is old.
pub async fn sweep(db: &PgPool, scope: &Scope, metrics: &MessageMetrics, stop: &CancellationToken) {
    let mut pruned_at = Instant::now();
    while !stop.is_cancelled() {
        let pass = async {
            while mark_done(db, scope).await? == SWEEP_BATCH.unsigned_abs() {}
            let reopened = reopen_overdue(db, scope).await?;
            if reopened > 0 {
                warn!(
                    labels.stream = scope.stream(),
                    labels.reopened = reopened,
                    "events were not handled in time; publishing them again"
                );
                metrics.reopened.inc_by(reopened);
            }
            measure(db, scope, metrics).await?;
            // What is left of many is removed in the next passes: nothing else should wait for it.
            if *scope == Scope::Live && pruned_at.elapsed() >= PRUNE && !prune(db).await? {
                pruned_at = Instant::now();
            }
            Ok::<(), sqlx::Error>(())
        };
        if let Err(error) = pass.await {
            warn!(labels.stream = scope.stream(), error.message = %error, "failed to sweep the outbox");
        }
        rest(stop, SWEEP).await;
    }
}

/// Marks published rows as done whose topic's consumers all have their inbox row. Whose consumers those of a topic are that this
/// version does not know, a newer one knows.
async fn mark_done(db: &PgPool, scope: &Scope) -> Result<u64, sqlx::Error> {
    let (topics, consumers): (Vec<_>, Vec<_>) = Topic::ALL
        .into_iter()
        .flat_map(|topic| {
            topic
                .consumers()
                .iter()
                .map(move |consumer| (topic.as_str(), *consumer))
        })
        .unzip();
    sqlx::query(
        "with handled as (
             select id from outbox
             where done_at is null and published_at is not null and starts_with(lane, $1) and topic = any($2)
               and not exists (
                   select from unnest($2::text[], $3::text[]) as wanted (topic, consumer)
                   where wanted.topic = outbox.topic
                     and not exists (
                         select from inbox
                         where inbox.consumer = wanted.consumer and inbox.event_id = outbox.id))
             limit $4 for update skip locked)
         update outbox set done_at = now() from handled where outbox.id = handled.id",
    )
    .bind(scope.lane_prefix())
    .bind(topics)
    .bind(consumers)
    .bind(SWEEP_BATCH)
    .execute(db)
    .await
    .map(|result| result.rows_affected())
}

/// Opens rows that were published but not handled within 30 s, then within twice their age: a consumer that is
/// down for an hour must not find each message a hundred times. At the latest after five minutes. Those of topics that only a
/// newer version knows wait for that one.
async fn reopen_overdue(db: &PgPool, scope: &Scope) -> Result<u64, sqlx::Error> {
    sqlx::query(
        "with overdue as (
             select id from outbox
             where done_at is null and starts_with(lane, $1) and topic = any($3)
               and published_at < now() - least(greatest(published_at - created_at, interval '30 seconds'),
                                                interval '5 minutes')
             limit $2 for update skip locked)
         update outbox set published_at = null from overdue where outbox.id = overdue.id",
    )
    .bind(scope.lane_prefix())
    .bind(SWEEP_BATCH)
    .bind(Topic::ALL.map(Topic::as_str))
    .execute(db)
    .await
    .map(|result| result.rows_affected())
}

async fn measure(db: &PgPool, scope: &Scope, metrics: &MessageMetrics) -> Result<(), sqlx::Error> {
    let (depth, age): (i64, f64) = sqlx::query_as(
        "select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float8
         from outbox where done_at is null and starts_with(lane, $1)",
    )
    .bind(scope.lane_prefix())
    .fetch_one(db)
    .await?;
    metrics.observe_outbox(scope, depth, age);
    Ok(())
}

/// Removes a portion of the events that have been done for an hour, and of the inbox rows that nothing can ask for any
/// more; says whether there may be others. Under a lock, so that one process does it at a time.
pub async fn prune(db: &PgPool) -> Result<bool, sqlx::Error> {
    let mut transaction = db.begin().await?;
    let (mine,): (bool,) = sqlx::query_as("select pg_try_advisory_xact_lock(hashtext('outbox.prune'))")
        .fetch_one(&mut *transaction)
        .await?;
    if !mine {
        return Ok(false);
    }
    let events = sqlx::query(
        "delete from outbox where id in (
             select id from outbox where done_at < now() - interval '1 hour' limit $1)",
    )
    .bind(SWEEP_BATCH)
    .execute(&mut *transaction)
    .await?;
    // The time is in the ids of the events.
    let oldest = time::OffsetDateTime::now_utc() - INBOX_AGE;
    let oldest = uuid::Timestamp::from_unix(uuid::NoContext, oldest.unix_timestamp().unsigned_abs(), 0);
    let handled = sqlx::query(
        "delete from inbox where (consumer, event_id) in (
             select consumer, event_id from inbox
             where consumer = any($1) and event_id < $2
               and not exists (select from outbox where outbox.id = inbox.event_id)
             limit $3)",
    )
    .bind(["notification", "market"])
    .bind(Uuid::new_v7(oldest))
    .bind(SWEEP_BATCH)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    let full = |removed: u64| removed == SWEEP_BATCH.unsigned_abs();
    Ok(full(events.rows_affected()) || full(handled.rows_affected()))
}
