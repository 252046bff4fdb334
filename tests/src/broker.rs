//! What passes at the message broker of an exchange: who asks for what of the live lane, and how many messages are delivered.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use async_nats::{Client, jetstream};
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{exchange::NAME, kubectl::Session, tunnel::Tunnel};

/// The stream of the live lane.
const LIVE_STREAM: &str = "exchange-live";
/// Its consumers, each shared by the pods of both colours.
const CONSUMERS: [&str; 2] = ["notification", "market"];
/// Who was gone when the broker was asked about him.
const GONE: &str = "gone";
/// Name of our own connection.
const OURS: &str = "tests";
/// What requests to JetStream begin with: `$JS.API.CONSUMER.MSG.NEXT.<stream>.<consumer>`.
const API: &str = "$JS.API.";

/// What somebody has asked of the live stream, such as `CONSUMER.MSG.NEXT`, by the name under which he is connected:
/// `exchange-notification <colour>-<revision>`.
pub type Asked = BTreeMap<String, BTreeSet<String>>;

/// A way to the broker, with the credentials that the exchange has.
///
/// From its opening on, it hears every request to JetStream that names the live stream: consumers pull, each request for
/// messages is a message of its own, and nothing is delivered but as its answer, unless somebody listens to a subject (see
/// [`Broker::heard_by`]). So whoever has never asked has never got one. What the broker counts per connection would not do: a
/// candidate rightly gets messages of its own test lane over the same connection.
#[derive(Debug)]
pub struct Broker {
    _tunnel: Tunnel,
    runtime: Runtime,
    client: Client,
    asked: Arc<Mutex<Asked>>,
}

#[derive(Deserialize)]
struct Connections {
    data: ConnectionsData,
}

#[derive(Deserialize)]
struct ConnectionsData {
    #[serde(default)]
    connections: Vec<Connection>,
}

#[derive(Deserialize)]
struct Connection {
    #[serde(default)]
    name: String,
    /// The subjects that it listens to, if they were asked for.
    #[serde(default)]
    subscriptions_list: Vec<String>,
}

impl Broker {
    /// Connects, and begins to listen.
    ///
    /// # Errors
    /// If the broker cannot be reached.
    pub fn of(session: &Session, namespace: &str) -> Result<Self> {
        let tunnel = Tunnel::open(session, namespace, &format!("service/{NAME}-nats"), 4222)?;
        let path = "{.data.password}";
        let password = session.get(namespace, &format!("secret/{NAME}-queue"), path)?;
        let password = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, password)?;
        let runtime = Runtime::new()?;
        let options = async_nats::ConnectOptions::with_user_and_password(
            "exchange".to_owned(),
            String::from_utf8(password)?,
        )
        .name(OURS);
        let client = runtime.block_on(options.connect(format!("127.0.0.1:{}", tunnel.port)))?;
        let asked = Arc::new(Mutex::new(Asked::new()));
        runtime.block_on(listen(client.clone(), Arc::clone(&asked)))?;
        Ok(Self {
            _tunnel: tunnel,
            runtime,
            client,
            asked,
        })
    }

    /// Who has asked for something of the live stream since this was called last.
    pub fn asked(&self) -> Asked {
        mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The names of the live stream's consumers, sorted.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub fn consumers(&self) -> Result<Vec<String>> {
        self.runtime.block_on(async {
            let jetstream = jetstream::new(self.client.clone());
            let stream = jetstream.get_stream(LIVE_STREAM).await?;
            let mut names: Vec<String> = stream.consumer_names().try_collect().await?;
            names.sort();
            Ok(names)
        })
    }

    /// All subjects that a stack's connections listen to.
    ///
    /// # Errors
    /// If the broker does not answer, or the stack has no connection.
    pub fn heard_by(&self, revision: &str) -> Result<Vec<String>> {
        let all = json!({"subscriptions": true});
        let all = self.runtime.block_on(connections(&self.client, &all))?;
        let mut own = all
            .into_iter()
            .filter(|it| it.name.ends_with(revision))
            .peekable();
        own.peek()
            .with_context(|| format!("{revision} is not connected to the broker"))?;
        Ok(own.flat_map(|it| it.subscriptions_list).collect())
    }

    /// How many messages of the live lane have ever been delivered, all consumers together.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub fn delivered(&self) -> Result<u64> {
        self.runtime.block_on(async {
            let jetstream = jetstream::new(self.client.clone());
            let stream = jetstream.get_stream(LIVE_STREAM).await?;
            let mut delivered = 0;
            for consumer in CONSUMERS {
                delivered += stream.consumer_info(consumer).await?.delivered.consumer_sequence;
            }
            Ok(delivered)
        })
    }
}

/// Notes from now on who asks for what of the live stream. Not what we ask.
async fn listen(client: Client, asked: Arc<Mutex<Asked>>) -> Result<()> {
    let mut requests = client.subscribe(format!("{API}>")).await?;
    // The broker knows of the subscription before it is asked for anything else.
    client.flush().await?;
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(what) = asked_of_live(&request.subject) else {
                continue;
            };
            let inbox = request.reply.unwrap_or_else(|| "none".into());
            let (client, asked) = (client.clone(), Arc::clone(&asked));
            tokio::spawn(async move {
                let name = whose(&client, &inbox).await.unwrap_or_else(|_| GONE.to_owned());
                if name != OURS {
                    let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                    asked.entry(name).or_default().insert(what);
                }
            });
        }
    });
    Ok(())
}

/// What a request asks of the live stream, if it is about that: what its subject has before the stream.
fn asked_of_live(subject: &str) -> Option<String> {
    let words: Vec<&str> = subject.strip_prefix(API)?.split('.').collect();
    let stream = words.iter().position(|word| *word == LIVE_STREAM)?;
    Some(words.get(..stream)?.join("."))
}

/// The name of the connection that waits for an answer at an inbox: each connection has inboxes of its own.
async fn whose(client: &Client, inbox: &str) -> Result<String> {
    let waiting = connections(client, &json!({"filter_subject": inbox})).await?;
    Ok(waiting.into_iter().next().context("nobody waits there")?.name)
}

/// The connections to the broker, as it is asked for them.
async fn connections(client: &Client, which: &Value) -> Result<Vec<Connection>> {
    let which = which.to_string();
    let answer = client
        .request("$SYS.REQ.ACCOUNT.PING.CONNZ", which.into())
        .await?;
    let answer: Connections = serde_json::from_slice(&answer.payload)
        .with_context(|| format!("no list of connections: {:?}", answer.payload))?;
    Ok(answer.data.connections)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_about_the_stream_that_it_names() {
        for (subject, what) in [
            (
                "$JS.API.CONSUMER.MSG.NEXT.exchange-live.market",
                Some("CONSUMER.MSG.NEXT"),
            ),
            (
                "$JS.API.CONSUMER.CREATE.exchange-live.mine.exchange.live.>",
                Some("CONSUMER.CREATE"),
            ),
            ("$JS.API.STREAM.INFO.exchange-live", Some("STREAM.INFO")),
            ("$JS.API.STREAM.INFO.exchange-test-green-abc", None),
            ("$JS.API.INFO", None),
            ("exchange.live.trade.executed", None),
        ] {
            assert_eq!(asked_of_live(subject).as_deref(), what, "{subject}");
        }
    }
}
