//! `testbed-agent`: what end-to-end tests run inside a cluster. Not part of the product.

mod gate;

use std::{
    collections::BTreeMap,
    io::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use axum::{Router, routing::get};
use clap::{Parser, Subcommand, ValueEnum};
use http_body_util::{BodyExt, Empty};
use hyper::{
    Request,
    body::Bytes,
    client::conn::http1::{SendRequest, handshake},
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

/// A request that takes longer has failed.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Answer every `GET /` with an identity.
    Serve {
        /// The identity.
        #[arg(long, env = "AGENT_ID")]
        id: String,
        #[arg(long, default_value_t = 8080)]
        port: u16,
    },
    /// Print the answer to one `GET`. Tries for 30 seconds: a new Service takes a moment to work.
    Get {
        /// `host:port`.
        address: String,
    },
    /// Send requests at a fixed rate over kept-alive connections, count what comes back, print it as JSON. Starts to
    /// count after a first answer, of which it prints a line.
    Load {
        /// `host:port`.
        address: String,
        /// Requests a second, all connections together.
        #[arg(long, default_value_t = 500)]
        rate: u32,
        #[arg(long, default_value_t = 20)]
        seconds: u64,
        #[arg(long, default_value_t = 20)]
        connections: u32,
        /// Requests after which a connection is replaced by a new one; 0 keeps each for ever.
        #[arg(long, default_value_t = 50)]
        requests_per_connection: u32,
    },
    /// Serve the admission webhook that sees the operator's writes, and holds one.
    Gate,
    /// Publish a message to a stream, or read it back.
    Jetstream {
        action: JetstreamAction,
        #[arg(long, env = "NATS_URL")]
        url: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum JetstreamAction {
    Publish,
    Read,
}

/// What came back.
#[derive(Default)]
struct Tally {
    answered: u64,
    /// By error.
    failed: BTreeMap<String, u64>,
    /// Answers by identity.
    by_identity: BTreeMap<String, u64>,
    last_identity: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Cli::parse().action {
        Action::Serve { id, port } => {
            let router = Router::new().route("/", get(async move || id.clone()));
            let listener = tokio::net::TcpListener::bind(("0.0.0.0", port)).await?;
            axum::serve(listener, router).await.context("cannot serve")
        }
        Action::Get { address } => print(&first_answer(&address).await?),
        Action::Load {
            address,
            rate,
            seconds,
            connections,
            requests_per_connection,
        } => {
            print(&format!("first answer: {}", first_answer(&address).await?))?;
            let tally = Arc::new(Mutex::new(Tally::default()));
            let pause = Duration::from_secs(1) * connections / rate;
            let end = Instant::now() + Duration::from_secs(seconds);
            let mut tasks = JoinSet::new();
            for number in 0..connections {
                let (address, tally) = (address.clone(), Arc::clone(&tally));
                tasks.spawn(async move {
                    tokio::time::sleep(pause * number / connections).await; // spread over the interval
                    send(&address, pause, end, requests_per_connection, &tally).await;
                });
            }
            tasks.join_all().await;
            let tally = tally
                .lock()
                .map_err(|_| anyhow!("a connection's task has panicked"))?;
            let report = json!({
                "answered": tally.answered, "failed": tally.failed.values().sum::<u64>(), "errors": tally.failed,
                "by_identity": tally.by_identity, "last_identity": tally.last_identity,
            });
            print(&report.to_string())
        }
        Action::Gate => gate::serve().await,
        Action::Jetstream { action, url } => print(&jetstream(action, &url).await?),
    }
}

fn print(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot print")
}

/// The word that is published must come back over the end of the broker's process.
async fn jetstream(action: JetstreamAction, url: &str) -> Result<String> {
    let server: async_nats::ServerAddr = url.parse()?;
    // The client ignores a user in the URL.
    let user = server.username().unwrap_or_default().to_owned();
    let password = server.password().unwrap_or_default().to_owned();
    let options = async_nats::ConnectOptions::with_user_and_password(user, password);
    let context =
        async_nats::jetstream::new(options.connect(server).await.context("cannot connect to NATS")?);
    let config = async_nats::jetstream::stream::Config {
        name: "survivors".into(),
        subjects: vec!["survivors.>".into()],
        ..Default::default()
    };
    let stream = context.get_or_create_stream(config).await?;
    match action {
        JetstreamAction::Publish => {
            context
                .publish("survivors.word", "still here".into())
                .await?
                .await
                .context("not acknowledged")?;
            Ok("published".into())
        }
        JetstreamAction::Read => {
            let message = stream.get_last_raw_message_by_subject("survivors.word").await?;
            Ok(String::from_utf8_lossy(&message.payload).into_owned())
        }
    }
}

/// Tries until there is an answer, for at most 30 seconds.
async fn first_answer(address: &str) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let attempt = async { request(&mut connect(address).await?, address).await };
        match timeout(REQUEST_LIMIT, attempt)
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer in time")))
        {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// One connection's requests. Nothing is retried: an error counts, and the next request gets a new connection.
async fn send(address: &str, pause: Duration, end: Instant, per_connection: u32, tally: &Mutex<Tally>) {
    let mut clock = interval(pause);
    clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut connection = None;
    let mut carried = 0_u32;
    while Instant::now() < end {
        clock.tick().await;
        if per_connection > 0 && carried == per_connection {
            connection = None;
            carried = 0;
        }
        let outcome = timeout(REQUEST_LIMIT, async {
            let mut open = match connection.take() {
                Some(open) => open,
                None => connect(address).await?,
            };
            let answer = request(&mut open, address).await?;
            anyhow::Ok((open, answer))
        })
        .await;
        let Ok(mut tally) = tally.lock() else { return };
        match outcome {
            Ok(Ok((open, identity))) => {
                connection = Some(open);
                carried += 1;
                tally.answered += 1;
                *tally.by_identity.entry(identity.clone()).or_default() += 1;
                tally.last_identity = identity;
            }
            Ok(Err(error)) => *tally.failed.entry(format!("{error:#}")).or_default() += 1,
            Err(_) => *tally.failed.entry("no answer in time".into()).or_default() += 1,
        }
    }
}

async fn connect(address: &str) -> Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn request(connection: &mut SendRequest<Empty<Bytes>>, host: &str) -> Result<String> {
    connection.ready().await.context("the connection was closed")?;
    let request = Request::get("/")
        .header(hyper::header::HOST, host)
        .body(Empty::new())?;
    let answer = connection
        .send_request(request)
        .await
        .context("the request failed")?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("status {status}");
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}
