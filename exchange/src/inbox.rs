//! Consumers: take messages from the queue, and make the effect of each happen once.
//!
//! The inbox row of an event is inserted in the transaction of its effect; a second delivery finds the row and
//! does nothing. Messages are acknowledged after the commit, and delivered again when that did not happen.

use std::{collections::HashSet, sync::Arc, time::Duration};

use async_nats::{
    HeaderValue,
    header::NATS_MESSAGE_ID,
    jetstream::{self, AckKind, consumer::PullConsumer},
};
use futures::{FutureExt, StreamExt};
use sqlx::{PgConnection, PgPool};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info_span, warn};
use uuid::Uuid;

use crate::{
    bus::{Bus, BusError, LANE_HEADER, Scope, TOPIC_HEADER},
    lane::Lane,
    market,
    messages::MessageMetrics,
    notification,
    outbox::{Topic, rest},
    telemetry::{PARENT_HEADER, STATE_HEADER, TraceContext},
};

/// Messages handled in one transaction.
const BATCH: usize = 256;
/// How long one request for messages stays open at the broker.
const PULL: Duration = Duration::from_secs(2);
/// Deliveries after which a message that cannot be handled is put aside.
const MAX_DELIVERIES: i64 = 5;
/// How long a message waits that could not be handled.
const RETRY: Duration = Duration::from_secs(1);
/// The consumers, which share messages but not their progress.
#[derive(Clone, Debug)]
pub enum Consumer {
    /// Tells users what happened.
    Notification(notification::Writer),
    /// Keeps the market data.
    Market(Arc<market::Store>),
}

impl Consumer {
    /// The durable name, at the broker and in the inbox.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Notification(_) => "notification",
            Self::Market(_) => "market",
        }
    }

    fn topics(&self) -> Vec<&'static str> {
        let mine = |topic: &Topic| topic.consumers().contains(&self.name());
        Topic::ALL.into_iter().filter(mine).map(Topic::as_str).collect()
    }

    async fn apply(&self, connection: &mut PgConnection, events: &[&Delivered]) -> Result<(), ApplyError> {
        match self {
            Self::Notification(writer) => writer.apply(connection, events).await,
            Self::Market(store) => store.apply(connection, events).await,
        }
    }
}

/// An event as it came from the queue.
#[derive(Debug)]
pub struct Delivered {
    /// The id that it was given when it was written down.
    pub id: Uuid,
    /// Its lane.
    pub lane: Lane,
    /// What it is about.
    pub topic: Topic,
    /// The facts.
    pub payload: serde_json::Value,
    /// The trace in which it happened, continued.
    pub trace: TraceContext,
}

/// Why an event had no effect.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The payload is not what its topic promises.
    #[error("the payload is invalid: {0}")]
    Payload(#[from] serde_json::Error),
    /// The database refused it or is away.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    /// The market-data store is away.
    #[error("{0}")]
    Market(#[from] market::StoreError),
}

impl ApplyError {
    /// Whether the message itself is at fault, rather than a store that will be back.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Payload(_) => true,
            // Class 22 is invalid data, class 23 a violated constraint.
            Self::Database(sqlx::Error::Database(error)) => error
                .code()
                .is_some_and(|code| code.starts_with("22") || code.starts_with("23")),
            Self::Database(_) | Self::Market(_) => false,
        }
    }
}

/// What a worker needs to consume.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Where inbox and effects are written.
    pub db: PgPool,
    /// Where messages come from.
    pub bus: Bus,
    /// What is counted.
    pub metrics: MessageMetrics,
    /// What is done with the messages.
    pub consumer: Consumer,
}

impl Worker {
    /// Consumes the messages of a scope until told to stop, and finishes the ones in hand.
    pub async fn run(&self, scope: &Scope, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            if !self.bus.connected() {
                rest(stop, RETRY).await;
                continue;
            }
            if let Err(error) = self.consume(scope, stop).await {
                warn!(labels.consumer = self.consumer.name(), labels.stream = scope.stream(), error.message = %error, "failed to consume");
                rest(stop, RETRY).await;
            }
        }
    }

    async fn consume(&self, scope: &Scope, stop: &CancellationToken) -> Result<(), BusError> {
        let consumer = self
            .bus
            .consumer(scope, self.consumer.name(), &self.consumer.topics())
            .await?;
        while !stop.is_cancelled() && self.pull(&consumer, stop).await? {}
        Ok(())
    }

    /// Handles what one request to the broker brings. False if that was nothing, and the consumer should be looked up: it may have
    /// been removed, and of that a broker tells only those who ask at that moment. Who asks later is told since NATS 2.11 that
    /// nobody answers, unless somebody listens to what is asked.
    async fn pull(&self, consumer: &PullConsumer, stop: &CancellationToken) -> Result<bool, BusError> {
        let mut pulled = consumer
            .batch()
            .max_messages(BATCH)
            .expires(PULL)
            .messages()
            .await
            .map_err(|error| BusError::Api {
                action: "pull messages",
                reason: error.to_string(),
            })?;
        let mut brought = false;
        loop {
            let first = tokio::select! {
                () = stop.cancelled() => return Ok(true),
                first = pulled.next() => first,
            };
            let Some(first) = first else {
                return Ok(brought);
            };
            brought = true;
            let first = first.map_err(|error| BusError::Api {
                action: "pull messages",
                reason: error.to_string(),
            })?;
            let mut messages = vec![first];
            // Whatever else has arrived shares the transaction.
            while let Some(Some(Ok(message))) = pulled.next().now_or_never() {
                messages.push(message);
            }
            self.handle(messages).await;
        }
    }

    async fn handle(&self, messages: Vec<jetstream::Message>) {
        let mut readable = Vec::with_capacity(messages.len());
        for message in messages {
            match read(&message) {
                Ok(event) => readable.push((event, message)),
                // Its row in the outbox stays open: a version that knows the topic publishes it again.
                Err(Unread::UnknownTopic) => {
                    acknowledge(&message, AckKind::Ack).await;
                }
                // Not from an outbox, so nobody waits for its effect.
                Err(Unread::Malformed(reason)) => {
                    let dropped = async {
                        error!(labels.consumer = self.consumer.name(), labels.subject = %message.subject, error.message = reason, "dropped a message");
                        acknowledge(&message, AckKind::Term).await;
                    };
                    trace(&message).scope(dropped).await;
                    self.metrics.dead.inc();
                }
            }
        }
        // In the order of their ids, so that two workers with the same messages do not wait for each other.
        readable.sort_by_key(|(event, _)| event.id);
        let events: Vec<&Delivered> = readable.iter().map(|(event, _)| event).collect();
        let Some(first) = events.first() else { return };
        // What happens to all of them is told once, in the trace of the first.
        let kind = match first.trace.clone().scope(self.apply(&events)).await {
            Ok(()) => AckKind::Ack,
            Err(error) if error.is_permanent() => {
                // One message spoils the batch: find it.
                for (event, message) in &readable {
                    self.handle_alone(event, message).await;
                }
                return;
            }
            Err(error) => {
                first.trace.within(|| {
                    warn!(
                        labels.consumer = self.consumer.name(),
                        labels.messages = events.len(),
                        event.id = %first.id,
                        error.message = %error,
                        "failed to handle messages; trying again"
                    );
                });
                AckKind::Nak(Some(RETRY))
            }
        };
        for (event, message) in &readable {
            event.trace.clone().scope(acknowledge(message, kind)).await;
        }
    }

    async fn handle_alone(&self, event: &Delivered, message: &jetstream::Message) {
        let span = info_span!("message", event.id = %event.id, labels.topic = event.topic.as_str());
        let handled = async {
            let kind = match self.apply(&[event]).await {
                Ok(()) => AckKind::Ack,
                Err(error) if error.is_permanent() && deliveries(message) >= MAX_DELIVERIES => {
                    match self.put_aside(event, &error.to_string()).await {
                        Ok(()) => AckKind::Term,
                        Err(_) => AckKind::Nak(Some(RETRY)),
                    }
                }
                Err(error) => {
                    warn!(error.message = %error, "failed to handle a message; trying again");
                    AckKind::Nak(Some(RETRY))
                }
            };
            acknowledge(message, kind).await;
        };
        event.trace.clone().scope(handled.instrument(span)).await;
    }

    /// Makes the effect of those events that have had none.
    async fn apply(&self, events: &[&Delivered]) -> Result<(), ApplyError> {
        let mut transaction = self.db.begin().await?;
        let mut new = self.enter(&mut transaction, events).await?;
        // An event may have come twice at once.
        let fresh: Vec<&Delivered> = events
            .iter()
            .copied()
            .filter(|event| new.remove(&event.id))
            .collect();
        self.metrics
            .duplicates
            .inc_by((events.len() - fresh.len()) as u64);
        if !fresh.is_empty() {
            self.consumer.apply(&mut transaction, &fresh).await?;
        }
        transaction.commit().await?;
        self.metrics.handled.inc_by(fresh.len() as u64);
        Ok(())
    }

    /// Enters events in the inbox, and says which of them had not been there: those are this transaction's to handle.
    ///
    /// A test lane exists as long as its users do: of one that has been erased nothing may begin anew, and the erasure of another
    /// waits for this transaction, and then finds what it has written. It locks the users in the order of their ids, so the first
    /// of them is enough.
    async fn enter(
        &self,
        transaction: &mut PgConnection,
        events: &[&Delivered],
    ) -> Result<HashSet<Uuid>, sqlx::Error> {
        let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
        let lanes: Vec<&str> = events.iter().map(|event| event.lane.as_str()).collect();
        let new: Vec<Uuid> = sqlx::query_scalar(
            "with kept as (
                 select lane from (select distinct lane from unnest($3::text[]) as given (lane) where lane <> 'live') as test,
                      lateral (select from users where users.lane = test.lane order by id limit 1 for key share) as first
             )
             insert into inbox (consumer, event_id, lane)
             select $1, given.id, given.lane from unnest($2::uuid[], $3::text[]) as given (id, lane)
             where given.lane = 'live' or given.lane in (select lane from kept)
             on conflict do nothing returning event_id",
        )
        .bind(self.consumer.name())
        .bind(&ids)
        .bind(&lanes)
        .fetch_all(transaction)
        .await?;
        Ok(new.into_iter().collect())
    }

    /// Keeps a message that cannot be handled for a person to look at, and counts it as handled. What is about a user who is
    /// gone is not kept; one who is about to go waits until this has been written and can be erased.
    async fn put_aside(&self, event: &Delivered, reason: &str) -> Result<(), sqlx::Error> {
        let user = event.payload.get("user_id").and_then(serde_json::Value::as_str);
        let user = user.and_then(|user| user.parse::<Uuid>().ok());
        let mut transaction = self.db.begin().await?;
        if self.enter(&mut transaction, &[event]).await?.is_empty() {
            // Handled in the meantime, or erased with its lane.
            return Ok(());
        }
        sqlx::query(
            "with concerned as (
                 select from users where id = $7 and deleted_at is null for key share
             )
             insert into dead_letters (consumer, event_id, lane, topic, payload, reason)
             select $1, $2, $3, $4, $5, $6 where $7 is null or exists (select from concerned)
             on conflict do nothing",
        )
        .bind(self.consumer.name())
        .bind(event.id)
        .bind(&event.lane)
        .bind(event.topic.as_str())
        .bind(&event.payload)
        .bind(reason)
        .bind(user)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        error!(
            error.message = reason,
            "a message could not be handled and was put aside"
        );
        self.metrics.dead.inc();
        Ok(())
    }
}

/// Why there is no event in a message.
enum Unread {
    /// There is, and a newer version has written it.
    UnknownTopic,
    /// There is none.
    Malformed(&'static str),
}

/// The event in a message.
fn read(message: &jetstream::Message) -> Result<Delivered, Unread> {
    use Unread::{Malformed, UnknownTopic};
    let headers = message.headers.as_ref().ok_or(Malformed("no headers"))?;
    let header = |name: &str| headers.get(name).map(HeaderValue::as_str);
    Ok(Delivered {
        id: headers
            .get(NATS_MESSAGE_ID)
            .and_then(|id| id.as_str().parse().ok())
            .ok_or(Malformed("no event id"))?,
        lane: header(LANE_HEADER)
            .and_then(|lane| lane.parse().ok())
            .ok_or(Malformed("no lane"))?,
        topic: Topic::parse(header(TOPIC_HEADER).ok_or(Malformed("no topic"))?).ok_or(UnknownTopic)?,
        payload: serde_json::from_slice(&message.payload)
            .map_err(|_| Malformed("the payload is not JSON"))?,
        trace: trace(message),
    })
}

/// The trace in which a message was sent, continued.
fn trace(message: &jetstream::Message) -> TraceContext {
    let headers = message.headers.as_ref();
    let header = |name| {
        headers
            .and_then(|headers| headers.get(name))
            .map(HeaderValue::as_str)
    };
    TraceContext::following(header(PARENT_HEADER), header(STATE_HEADER))
}

fn deliveries(message: &jetstream::Message) -> i64 {
    message.info().map_or(0, |info| info.delivered)
}

/// A lost acknowledgement only means that the message comes again.
async fn acknowledge(message: &jetstream::Message, kind: AckKind) {
    if let Err(error) = message.ack_with(kind).await {
        warn!(error.message = %error, "failed to acknowledge a message");
    }
}
