//! What passes at the message broker of an exchange: who asks for messages of the live lane, and how many are delivered.

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use async_nats::{Client, jetstream};
use futures::StreamExt;
use serde::Deserialize;
use serde_json::json;
use tokio::runtime::Runtime;

use crate::{exchange::NAME, kubectl::Session, tunnel::Tunnel};

/// The stream of the live lane.
const LIVE_STREAM: &str = "exchange-live";
/// Its consumers, each shared by the pods of both colours.
const CONSUMERS: [&str; 2] = ["notification", "market"];
/// Who was gone when the broker was asked about him.
const GONE: &str = "gone";

/// How often somebody has asked for messages, by the name under which he is connected: `exchange-notification
/// <colour>-<revision>`.
pub type Asked = BTreeMap<String, usize>;

/// A way to the broker, with the credentials that the exchange has.
///
/// From its opening on, it hears every request for messages of the live lane: consumers pull, each request is a message of
/// its own, and nothing is delivered but as its answer. So whoever has never asked has never got one. What the broker counts
/// per connection would not do: a candidate rightly gets messages of its own test lane over the same connection.
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
        );
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

    /// Who has asked for messages of the live lane since this was called last.
    pub fn asked(&self) -> Asked {
        mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
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

/// Notes from now on who asks for messages of the live lane.
async fn listen(client: Client, asked: Arc<Mutex<Asked>>) -> Result<()> {
    let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{LIVE_STREAM}.*");
    let mut requests = client.subscribe(subject).await?;
    // The broker knows of the subscription before it is asked for anything else.
    client.flush().await?;
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let inbox = request.reply.unwrap_or_else(|| "none".into());
            let (client, asked) = (client.clone(), Arc::clone(&asked));
            tokio::spawn(async move {
                let name = whose(&client, &inbox).await.unwrap_or_else(|_| GONE.to_owned());
                let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
                *asked.entry(name).or_default() += 1;
            });
        }
    });
    Ok(())
}

/// The name of the connection that waits for messages at an inbox: each request has one of its own.
async fn whose(client: &Client, inbox: &str) -> Result<String> {
    let filter = json!({"filter_subject": inbox}).to_string();
    let answer = client
        .request("$SYS.REQ.ACCOUNT.PING.CONNZ", filter.into())
        .await?;
    let answer: Connections = serde_json::from_slice(&answer.payload)
        .with_context(|| format!("no list of connections: {:?}", answer.payload))?;
    let connection = answer.data.connections.into_iter().next();
    Ok(connection.context("nobody waits there")?.name)
}
