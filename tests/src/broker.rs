//! What the message broker of an exchange says of itself: who is connected, and who waits for messages.

use anyhow::{Context, Result};
use async_nats::jetstream;
use serde::Deserialize;
use tokio::runtime::Runtime;

use crate::{exchange::NAME, kubectl::Session, tunnel::Tunnel};

/// The stream of the live lane.
const LIVE_STREAM: &str = "exchange-live";
/// Its consumers, each shared by the pods of both colours.
const CONSUMERS: [&str; 2] = ["notification", "market"];

/// A way to the broker, with the credentials that the exchange has.
#[derive(Debug)]
pub struct Broker {
    _tunnel: Tunnel,
    runtime: Runtime,
    client: async_nats::Client,
}

/// A client of the broker.
#[derive(Clone, Debug, Deserialize)]
pub struct Connection {
    /// As it calls itself: `exchange-notification <colour>-<revision>`.
    #[serde(default)]
    pub name: String,
    /// Messages that the broker has sent to it.
    pub out_msgs: u64,
}

#[derive(Deserialize)]
struct Connections {
    data: ConnectionsData,
}

#[derive(Deserialize)]
struct ConnectionsData {
    connections: Vec<Connection>,
}

impl Broker {
    /// Connects.
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
        Ok(Self {
            _tunnel: tunnel,
            runtime,
            client,
        })
    }

    /// Everybody who is connected.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub fn connections(&self) -> Result<Vec<Connection>> {
        let request = self.client.request("$SYS.REQ.ACCOUNT.PING.CONNZ", "".into());
        let answer = self.runtime.block_on(request)?;
        let answer: Connections = serde_json::from_slice(&answer.payload)
            .with_context(|| format!("no list of connections: {:?}", answer.payload))?;
        Ok(answer.data.connections)
    }

    /// Of each consumer of the live lane: how many workers wait for its next message.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub fn waiting(&self) -> Result<Vec<usize>> {
        self.runtime.block_on(async {
            let jetstream = jetstream::new(self.client.clone());
            let stream = jetstream.get_stream(LIVE_STREAM).await?;
            let mut waiting = Vec::new();
            for consumer in CONSUMERS {
                waiting.push(stream.consumer_info(consumer).await?.num_waiting);
            }
            Ok(waiting)
        })
    }
}
