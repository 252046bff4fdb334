//! The message queue: NATS JetStream.
//!
//! There is one stream for live traffic, shared by all stacks, and one for the test lanes of each stack. A
//! stack that is not live opens only its own, so it can neither take nor change a real message. PostgreSQL is
//! the record of what has to be delivered ([`crate::outbox`]); the broker's store may be lost at any time.

use std::{path::PathBuf, time::Duration};

use async_nats::{
    Auth, AuthError, Client, ConnectOptions, ServerAddr,
    connection::State,
    jetstream::{
        self, ErrorCode,
        consumer::{AckPolicy, PullConsumer, pull},
        context::{GetStreamErrorKind, PublishAckFuture},
        message::PublishMessage,
        stream::{self, StorageType, Stream},
    },
};
use futures::StreamExt;
use percent_encoding::percent_decode_str;
use secrecy::ExposeSecret;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    app::StackId,
    config::StoreUrl,
    lane::Lane,
    telemetry::{PARENT_HEADER, STATE_HEADER},
};

/// How long a consumer has for a message before the broker gives it to another one.
pub const ACK_WAIT: Duration = Duration::from_secs(5);
/// How long the broker drops a message whose id it has seen. Shorter than the outbox waits before it publishes
/// again, so that a message which the broker has lost is not mistaken for one that it still has.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(20);
/// How long the live stream keeps messages. The outbox publishes again what was not handled by then.
const LIVE_MAX_AGE: Duration = Duration::from_hours(24);
/// The same for test lanes, whose stacks come and go.
const TEST_MAX_AGE: Duration = Duration::from_hours(1);
/// A test consumer that nobody has read from for this long is removed by the broker.
const TEST_INACTIVE: Duration = Duration::from_mins(10);
/// Until a test stream is so old, its stack may not have made its consumers yet.
const TEST_BEGINNING: Duration = Duration::from_secs(15);
/// The header that names an event's lane.
pub const LANE_HEADER: &str = "exchange-lane";
/// The header that names an event's topic.
pub const TOPIC_HEADER: &str = "exchange-topic";
const STREAM_PREFIX: &str = "exchange-";

/// Where the queue is, and how to trust it.
#[derive(Clone, Debug)]
pub struct QueueConfig {
    /// The URL, `nats://user:password@host:port` or `tls://…`, read again at each reconnect so that a changed
    /// password needs no restart.
    pub url: StoreUrl,
    /// PEM certificates to trust beside those of the system.
    pub ca_file: Option<PathBuf>,
}

/// What can go wrong between this process and the broker. All of it is worth another try later.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The file with the URL could not be read.
    #[error("failed to read the queue's URL")]
    Url(#[source] std::io::Error),
    /// The URL, a certificate, or the first connection.
    #[error("failed to connect to the queue: {0}")]
    Connect(String),
    /// An answer of the JetStream API.
    #[error("failed to {action}: {reason}")]
    Api {
        /// What was attempted.
        action: &'static str,
        /// The broker's or the client's words.
        reason: String,
    },
}

impl BusError {
    fn api(action: &'static str) -> impl FnOnce(&dyn std::fmt::Display) -> Self {
        move |reason| Self::Api {
            action,
            reason: reason.to_string(),
        }
    }

    /// A message that the broker has not confirmed.
    pub fn unconfirmed(reason: &dyn std::fmt::Display) -> Self {
        Self::api("have a message confirmed")(reason)
    }
}

/// Which messages a worker is about: those of the live lane, or those of one stack's test lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The live lane.
    Live,
    /// All lanes `test-<colour>-<revision>.<run>` of one stack; holds the part before the dot.
    Test(String),
}

impl Scope {
    /// The test lanes of a stack.
    pub fn of(stack: &StackId) -> Self {
        Self::Test(format!("test-{}-{}", stack.colour, stack.revision))
    }

    /// What the names of all lanes of this scope begin with, and of no lane outside.
    pub fn lane_prefix(&self) -> String {
        match self {
            Self::Live => "live".to_owned(),
            Self::Test(prefix) => format!("{prefix}."),
        }
    }

    /// The name of the stream.
    pub fn stream(&self) -> String {
        match self {
            Self::Live => format!("{STREAM_PREFIX}live"),
            Self::Test(prefix) => format!("{STREAM_PREFIX}{prefix}"),
        }
    }

    /// The subject of a topic in every lane of the scope; `>` is all topics.
    fn subject(&self, topic: &str) -> String {
        match self {
            Self::Live => format!("exchange.live.{topic}"),
            Self::Test(prefix) => format!("exchange.{prefix}.*.{topic}"),
        }
    }

    fn stream_config(&self) -> stream::Config {
        let (storage, max_age) = match self {
            Self::Live => (StorageType::File, LIVE_MAX_AGE),
            Self::Test(_) => (StorageType::Memory, TEST_MAX_AGE),
        };
        stream::Config {
            name: self.stream(),
            subjects: vec![self.subject(">")],
            storage,
            max_age,
            duplicate_window: DUPLICATE_WINDOW,
            ..stream::Config::default()
        }
    }

    fn consumer_config(&self, name: &str, topics: &[&str]) -> pull::Config {
        pull::Config {
            durable_name: Some(name.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            // No limit here: PostgreSQL may be down for longer than any number of tries, and whether a message
            // is at fault only the consumer can tell (see `inbox`).
            max_deliver: -1,
            max_ack_pending: 4096,
            filter_subjects: topics.iter().map(|topic| self.subject(topic)).collect(),
            inactive_threshold: match self {
                Self::Live => Duration::ZERO,
                Self::Test(_) => TEST_INACTIVE,
            },
            ..pull::Config::default()
        }
    }
}

/// An event on its way to the queue: an open row of the outbox.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Outgoing {
    /// The event's id, under which the broker recognises a second copy.
    pub id: Uuid,
    /// Its lane.
    pub lane: Lane,
    /// What it is about. A name, because an older version may relay the events of a newer one.
    pub topic: String,
    /// The facts.
    pub payload: serde_json::Value,
    /// The trace in which it happened, in W3C form.
    pub traceparent: Option<String>,
    /// What belongs to that.
    pub tracestate: Option<String>,
}

/// The subject of one lane's messages on a topic.
fn subject(lane: &Lane, topic: &str) -> String {
    format!("exchange.{lane}.{topic}")
}

/// A connection to the broker, which reconnects by itself for ever.
#[derive(Clone, Debug)]
pub struct Bus {
    client: Client,
    jetstream: jetstream::Context,
}

impl Bus {
    /// Starts to connect. Returns before the broker has answered; [`Bus::reach`] waits for that.
    pub async fn connect(config: &QueueConfig, name: &str) -> Result<Self, BusError> {
        let address = read_url(&config.url)?;
        let url = config.url.clone();
        let mut options = ConnectOptions::with_auth_callback(move |_nonce| {
            let auth = read_url(&url)
                .map(|url| credentials(&url))
                .map_err(AuthError::new);
            async { auth }
        })
        .name(name)
        .retry_on_initial_connect()
        .max_reconnects(None)
        .ping_interval(Duration::from_secs(5))
        .reconnect_delay_callback(|attempt| {
            Duration::from_millis(50 << attempt.min(6)).min(Duration::from_secs(2))
        });
        if let Some(ca_file) = &config.ca_file {
            options = options.add_root_certificates(ca_file.clone());
        }
        if address.scheme() == "tls" {
            options = options.require_tls(true);
        }
        let client = options
            .connect(address)
            .await
            .map_err(|error| BusError::Connect(error.to_string()))?;
        let jetstream = jetstream::context::ContextBuilder::new()
            .timeout(Duration::from_secs(2))
            .ack_timeout(Duration::from_secs(5))
            .build(client.clone());
        Ok(Self { client, jetstream })
    }

    /// Whether the broker can be reached at the moment, as far as the client knows.
    pub fn connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Whether the broker answers, and has what streams need.
    pub async fn reach(&self) -> Result<(), BusError> {
        let account = self.jetstream.query_account().await;
        account
            .map(|_| ())
            .map_err(|error| BusError::api("reach the queue")(&error))
    }

    /// Makes sure that the scope's stream exists and says whether it had to be created, in which case the broker
    /// knows none of the messages that were published before.
    pub async fn ensure_stream(&self, scope: &Scope) -> Result<bool, BusError> {
        if self.find_stream(&scope.stream()).await?.is_some() {
            return Ok(false);
        }
        self.jetstream
            .create_stream(scope.stream_config())
            .await
            .map_err(|error| BusError::api("create the stream")(&error))?;
        Ok(true)
    }

    /// The durable consumer of these topics, created or extended if need be. It is shared by stacks of different
    /// versions, so topics are only ever added to it.
    pub async fn consumer(
        &self,
        scope: &Scope,
        name: &str,
        topics: &[&str],
    ) -> Result<PullConsumer, BusError> {
        let stream = self
            .jetstream
            .get_stream(scope.stream())
            .await
            .map_err(|error| BusError::api("look up the stream")(&error))?;
        let mut wanted = scope.consumer_config(name, topics);
        let consumer: PullConsumer = stream
            .get_or_create_consumer(name, wanted.clone())
            .await
            .map_err(|error| BusError::api("open the consumer")(&error))?;
        let existing = &consumer.cached_info().config;
        let mut subjects = existing.filter_subjects.clone();
        if !existing.filter_subject.is_empty() {
            subjects.push(existing.filter_subject.clone());
        }
        if wanted
            .filter_subjects
            .iter()
            .all(|subject| subjects.contains(subject))
        {
            return Ok(consumer);
        }
        for subject in subjects {
            if !wanted.filter_subjects.contains(&subject) {
                wanted.filter_subjects.push(subject);
            }
        }
        stream
            .create_consumer(wanted)
            .await
            .map_err(|error| BusError::api("extend the consumer")(&error))
    }

    /// Sends an event under its id. It is stored once the returned future has resolved.
    pub async fn publish(&self, event: &Outgoing) -> Result<PublishAckFuture, BusError> {
        let mut message = PublishMessage::build()
            .message_id(event.id.to_string())
            .header(LANE_HEADER, event.lane.as_str())
            .header(TOPIC_HEADER, event.topic.as_str())
            .payload(event.payload.to_string().into());
        let trace = [
            (PARENT_HEADER, &event.traceparent),
            (STATE_HEADER, &event.tracestate),
        ];
        for (name, value) in trace {
            if let Some(value) = value {
                message = message.header(name, value.as_str());
            }
        }
        self.jetstream
            .send_publish(subject(&event.lane, &event.topic), message)
            .await
            .map_err(|error| BusError::api("publish a message")(&error))
    }

    /// The lanes that have messages in the scope's stream.
    pub async fn lanes(&self, scope: &Scope) -> Result<Vec<Lane>, BusError> {
        let Some(stream) = self.find_stream(&scope.stream()).await? else {
            return Ok(Vec::new());
        };
        let mut subjects = stream
            .info_with_subjects(">")
            .await
            .map_err(|error| BusError::api("list the stream's subjects")(&error))?;
        let mut lanes = Vec::new();
        while let Some(subject) = subjects.next().await {
            let (subject, _) =
                subject.map_err(|error| BusError::api("list the stream's subjects")(&error))?;
            let mut tokens = subject.split('.');
            if let (Some(_), Some(stack), Some(run)) = (tokens.next(), tokens.next(), tokens.next())
                && let Ok(lane) = format!("{stack}.{run}").parse()
                && !lanes.contains(&lane)
            {
                lanes.push(lane);
            }
        }
        Ok(lanes)
    }

    /// Removes the messages of one test lane.
    pub async fn erase_lane(&self, scope: &Scope, lane: &Lane) -> Result<(), BusError> {
        if let Some(stream) = self.find_stream(&scope.stream()).await? {
            stream
                .purge()
                .filter(subject(lane, ">"))
                .await
                .map_err(|error| BusError::api("purge a lane")(&error))?;
        }
        Ok(())
    }

    /// Removes the test streams of other stacks that are empty and that nobody has read from for a while. Not those that have
    /// only been made, whose stacks are about to read.
    pub async fn remove_abandoned(&self, own: &Scope) -> Result<(), BusError> {
        if !self.connected() {
            return Ok(());
        }
        let mut streams = self.jetstream.streams();
        while let Some(stream) = streams.next().await {
            let stream = stream.map_err(|error| BusError::api("list the streams")(&error))?;
            let is_test = stream.config.name.starts_with(&format!("{STREAM_PREFIX}test-"));
            let is_idle = stream.state.consumer_count == 0 && stream.state.messages == 0;
            let is_new = OffsetDateTime::now_utc() - stream.created < TEST_BEGINNING;
            if is_test && is_idle && !is_new && stream.config.name != own.stream() {
                self.jetstream
                    .delete_stream(&stream.config.name)
                    .await
                    .map_err(|error| BusError::api("remove a stream")(&error))?;
            }
        }
        Ok(())
    }

    async fn find_stream(&self, name: &str) -> Result<Option<Stream>, BusError> {
        match self.jetstream.get_stream(name).await {
            Ok(stream) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Ok(None)
                }
                _ => Err(BusError::api("look up a stream")(&error)),
            },
        }
    }
}

fn read_url(url: &StoreUrl) -> Result<ServerAddr, BusError> {
    let url = url.read().map_err(BusError::Url)?;
    url.expose_secret()
        .parse()
        .map_err(|error: std::io::Error| BusError::Connect(error.to_string()))
}

fn credentials(url: &ServerAddr) -> Auth {
    // As in every URL, what is not plain text in a password is percent-encoded.
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut auth = Auth::new();
    auth.username = url.username().map(decoded);
    auth.password = url.password().map(decoded);
    auth
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_scope_covers_its_own_lanes_only() {
        let scope = Scope::Test("test-green-abc".into());
        assert_eq!(scope.lane_prefix(), "test-green-abc.");
        assert!(!"test-green-abcd.run".starts_with(&scope.lane_prefix()));
        assert!(!"live".starts_with(&scope.lane_prefix()));
        assert_eq!(
            scope.subject("trade.executed"),
            "exchange.test-green-abc.*.trade.executed"
        );
        assert_eq!(Scope::Live.subject(">"), "exchange.live.>");
        assert_ne!(scope.stream(), Scope::Live.stream());
    }

    #[test]
    fn credentials_are_taken_from_the_url() {
        let auth = credentials(&"nats://alice:s%3Acret@localhost:4222".parse().unwrap());
        assert_eq!(
            (auth.username.as_deref(), auth.password.as_deref()),
            (Some("alice"), Some("s:cret"))
        );
        let auth = credentials(&"nats://localhost:4222".parse().unwrap());
        assert!(auth.username.is_none());
    }
}
