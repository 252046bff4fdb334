//! The background work of the notification service: relay, consumers, event streams, e-mail, release notices.
//!
//! A stack works on its own test lanes in every role, and on the live lane only while it is live.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context;
use prometheus_client::metrics::counter::Counter;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    app::App,
    bus::{Bus, QueueConfig, Scope},
    config::Config,
    inbox::{Consumer, Worker},
    lane::Lane,
    mail::{self, MailConfig},
    market::{Store, StoreConfig},
    metrics::{Known, Metrics},
    notice,
    notification::Writer,
    outbox,
    role::{self, Role},
    stream::Hub,
};

/// How often lost market data and erased lanes are looked for.
const TIDY: Duration = Duration::from_secs(2);

/// What is counted about messages. Clones share the numbers.
#[derive(Clone, Debug, Default)]
pub struct MessageMetrics {
    /// Events that the broker has confirmed.
    pub published: Counter,
    /// Events that were published but not handled in time.
    pub reopened: Counter,
    /// Events whose effect was made.
    pub handled: Counter,
    /// Events that came again after their effect was made.
    pub duplicates: Counter,
    /// Messages that were put aside or dropped.
    pub dead: Counter,
    /// E-mails that the mail server has taken.
    pub emails_sent: Counter,
    /// E-mails that could not be sent.
    pub emails_given_up: Counter,
    /// Live events that are not done, as long as this stack is live and counts them.
    outbox_depth: Known<i64>,
    /// The age of the oldest of them, in seconds.
    outbox_age: Known<f64>,
}

impl MessageMetrics {
    /// Metrics that are shown by this process.
    pub fn registered(metrics: &Metrics) -> Self {
        let all = Self::default();
        metrics.register(|registry| {
            for (name, help, counter) in [
                (
                    "messages_published",
                    "Events that the broker has confirmed",
                    &all.published,
                ),
                (
                    "messages_reopened",
                    "Events published again because nobody handled them in time",
                    &all.reopened,
                ),
                ("messages_handled", "Events whose effect was made", &all.handled),
                (
                    "messages_duplicates",
                    "Events that came again after their effect",
                    &all.duplicates,
                ),
                (
                    "messages_dead",
                    "Messages that could not be handled and were put aside",
                    &all.dead,
                ),
                (
                    "emails_sent",
                    "E-mails that the mail server has taken",
                    &all.emails_sent,
                ),
                (
                    "emails_given_up",
                    "E-mails that could not be sent",
                    &all.emails_given_up,
                ),
            ] {
                registry.register(name, help, counter.clone());
            }
            registry.register(
                "outbox_depth",
                "Live events that are not done",
                all.outbox_depth.clone(),
            );
            let age = "The age of the oldest live event that is not done";
            registry.register("outbox_age_seconds", age, all.outbox_age.clone());
        });
        all
    }

    /// Records what waits in the outbox. Of test lanes only the traces in the other numbers are of interest.
    pub(crate) fn observe_outbox(&self, scope: &Scope, depth: i64, age: f64) {
        if *scope == Scope::Live {
            self.outbox_depth.set(depth);
            self.outbox_age.set(age);
        }
    }

    /// From now on it is another stack's to say what waits.
    fn forget_outbox(&self) {
        self.outbox_depth.forget();
        self.outbox_age.forget();
    }
}

/// What the background work needs beside the [`App`]. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Messages {
    bus: Bus,
    store: Arc<Store>,
    mail: Option<MailConfig>,
    notice_delay: Duration,
}

impl Messages {
    /// The part of a service's configuration that is about messages. Starts to connect to the queue.
    pub async fn from(config: &Config) -> anyhow::Result<Self> {
        let url = config
            .queue
            .clone()
            .context("--queue-url or --queue-url-file is required")?;
        let queue = QueueConfig {
            url,
            ca_file: config.queue_ca_file.clone(),
        };
        let name = format!("exchange-notification {}-{}", config.colour, config.revision);
        Ok(Self {
            store: Arc::new(Store::new(StoreConfig::from(config)?)),
            bus: Bus::connect(&queue, &name).await?,
            mail: config.mail.clone(),
            notice_delay: config.notice_delay,
        })
    }

    /// Whether the queue and the market-data store answer.
    pub async fn reach(&self) -> anyhow::Result<()> {
        self.store.reach().await?;
        self.bus.reach().await?;
        Ok(())
    }
}

/// All of it, until told to stop.
pub async fn run(app: App, messages: Messages, hub: Arc<Hub>, shutdown: CancellationToken) {
    let metrics = MessageMetrics::registered(&app.metrics);
    let workers = Workers {
        app,
        messages,
        metrics,
    };
    let own = Scope::of(&workers.app.stack);
    tokio::join!(
        hub.run(&workers.app.db, &shutdown),
        workers.work(&own, &shutdown),
        workers.tidy(&shutdown),
        workers.while_live(&shutdown),
    );
}

struct Workers {
    app: App,
    messages: Messages,
    metrics: MessageMetrics,
}

impl Workers {
    /// Relays and consumes the messages of a scope.
    async fn work(&self, scope: &Scope, stop: &CancellationToken) {
        let worker = |consumer| Worker {
            db: self.app.db.clone(),
            bus: self.messages.bus.clone(),
            metrics: self.metrics.clone(),
            consumer,
        };
        let notification = worker(Consumer::Notification(Writer {
            emails: self.messages.mail.is_some(),
        }));
        let market = worker(Consumer::Market(Arc::clone(&self.messages.store)));
        tokio::join!(
            outbox::relay(&self.app.db, &self.messages.bus, scope, &self.metrics, stop),
            outbox::sweep(&self.app.db, scope, &self.metrics, stop),
            notification.run(scope, stop),
            market.run(scope, stop),
        );
    }

    /// The live lane and everything that happens by itself, whenever this stack is live.
    async fn while_live(&self, shutdown: &CancellationToken) {
        let mut role = self.app.role.clone();
        while role::until_live(&mut role, shutdown).await {
            let stop = shutdown.child_token();
            self.app.consuming.store(true, Ordering::Relaxed);
            info!("consuming live messages");
            let until_not_live = async {
                role::until_not_live(&mut role, &stop).await;
                stop.cancel();
            };
            let mail = async {
                if let Some(mail) = &self.messages.mail {
                    mail::run(&self.app.db, mail, &self.metrics, &stop).await;
                }
            };
            tokio::join!(
                until_not_live,
                self.work(&Scope::Live, &stop),
                notice::run(&self.app.db, &self.app.stack, self.messages.notice_delay, &stop),
                self.restore(&stop),
                mail,
            );
            self.metrics.forget_outbox();
            self.app.consuming.store(false, Ordering::Relaxed);
            info!("no longer consuming live messages");
        }
    }

    /// Rebuilds the live market data when the store has been lost.
    async fn restore(&self, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            let now = time::OffsetDateTime::now_utc();
            let restored = stop.run_until_cancelled(self.messages.store.restore(&self.app.db, now));
            match restored.await {
                // Told to stop; nothing is missing; or another process is at it.
                None | Some(Ok(None)) => {}
                Some(Ok(Some(rebuilt))) => info!(
                    labels.ticks = rebuilt.ticks,
                    labels.candles = rebuilt.candles,
                    "rebuilt the market data"
                ),
                Some(Err(error)) => warn!(error.message = %error, "failed to restore the market data"),
            }
            outbox::rest(stop, TIDY).await;
        }
    }

    /// Removes what erased test lanes have left outside PostgreSQL: this stack's, and when live everybody's, since
    /// some stacks no longer exist.
    async fn tidy(&self, stop: &CancellationToken) {
        let own = Scope::of(&self.app.stack);
        while !stop.is_cancelled() {
            let live = *self.app.role.borrow() == Role::Live;
            let prefix = if live {
                "test-".to_owned()
            } else {
                own.lane_prefix()
            };
            if let Err(error) = self.forget_erased(&own, &prefix).await {
                warn!(error.message = %error, "failed to remove what erased lanes have left");
            }
            if live && let Err(error) = self.messages.bus.remove_abandoned(&own).await {
                warn!(error.message = %error, "failed to remove the streams of stacks that no longer exist");
            }
            outbox::rest(stop, TIDY).await;
        }
    }

    async fn forget_erased(&self, own: &Scope, prefix: &str) -> anyhow::Result<()> {
        let stored = self.messages.store.test_lanes(prefix).await?;
        let streamed = if self.messages.bus.connected() {
            self.messages.bus.lanes(own).await?
        } else {
            Vec::new()
        };
        let names: Vec<&str> = stored
            .keys()
            .map(String::as_str)
            .chain(streamed.iter().map(Lane::as_str))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        // A lane exists as long as its users do.
        let erased: Vec<(Lane,)> = sqlx::query_as(
            "select distinct lane from unnest($1::text[]) as known (lane)
             where not exists (select from users where users.lane = known.lane)",
        )
        .bind(names)
        .fetch_all(&self.app.db)
        .await?;
        for (lane,) in erased {
            if let Some(keys) = stored.get(lane.as_str()) {
                self.messages.store.remove(keys).await?;
            }
            if streamed.contains(&lane) {
                self.messages.bus.erase_lane(own, &lane).await?;
            }
        }
        Ok(())
    }
}
