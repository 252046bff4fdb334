//! `exchange load`: clients that keep connections alive, send some requests slowly and let some connections idle, at
//! a fixed rate that no slowness of the server changes; and the audit of what they have seen.

mod audit;
mod link;
mod record;
mod streams;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock, atomic::Ordering},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, interval, sleep, sleep_until},
};
use uuid::Uuid;

use self::{
    audit::{Acknowledged, Audit, Evidence, TraderEvidence, judge},
    link::{Answered, Body, Events, Link, Protocol, body},
    record::{LOG_IN, Record, Summary, summarize},
    streams::{Opening, Received, Streams},
};
use crate::{
    db,
    lane::Lane,
    trader::{BASE, CallError, Client, Endpoints, LaneKey, QUOTE, Trader, field, list},
};

/// Requests that share one HTTP/2 connection.
const STREAMS: usize = 4;
/// Failed requests that the table shows one by one.
const FAILED_SHOWN: usize = 10;
/// How long a request takes that is sent slowly.
const SLOW: Duration = Duration::from_secs(2);
/// How often traders log in again: well within the life of a token.
const RELOGIN: Duration = Duration::from_mins(2);
/// How long the fate of orders, and notifications, may take to be known afterwards.
const PATIENCE: Duration = Duration::from_mins(1);
/// How soon it is asked for again.
const RETRY: Duration = Duration::from_millis(500);

/// The flags of `exchange load`.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadArgs {
    #[command(flatten)]
    endpoints: Endpoints,
    /// Requests per second.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// For how long, like `1m30s`.
    #[arg(long, default_value = "30s")]
    duration: jiff::SignedDuration,
    /// Connections to each service, of each protocol.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    connections: u16,
    /// Of these, connections that idle for 2 to 8 seconds after each request.
    #[arg(long, default_value_t = 4)]
    idle_connections: u16,
    /// Orders of which the body is sent over two seconds, of 100.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=100))]
    slow_percent: u8,
    /// Traders that read their notifications as an event stream all the while.
    #[arg(long, default_value_t = 2)]
    streams: u16,
    /// Synthetic users. In the live lane a user service takes so many registrations of one address in 15 minutes
    /// (`--login-attempts-per-address`, 100 unless set); for more of them the run waits before it begins.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=1_000))]
    traders: u16,
    /// The test lane to be in; the live lane unless given.
    #[arg(long, requires = "lane_secret")]
    lane: Option<Lane>,
    /// The secret that opens it.
    #[arg(long, env = "EXCHANGE_LANE_SECRET", hide_env_values = true)]
    lane_secret: Option<SecretString>,
    /// In the live lane: the user with the scope `treasury` who credits the deposits.
    #[arg(long, required_unless_present = "lane", requires = "treasury_password_file")]
    treasury_email: Option<String>,
    /// A file with that user's password.
    #[arg(long)]
    treasury_password_file: Option<PathBuf>,
    /// The database, to have the ledger audit itself afterwards: sums and balances of everybody. Required unless
    /// `--no-ledger` is given.
    #[arg(long, env = "EXCHANGE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<SecretString>,
    /// Do without the ledger's own audit, and so without knowing whether each currency sums to zero.
    #[arg(long)]
    no_ledger: bool,
    /// Tell each second how far it is, as a line of JSON on standard error.
    #[arg(long)]
    progress: bool,
    /// Where to write the result as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where to write every request as a line of JSON.
    #[arg(long)]
    records: Option<PathBuf>,
}

/// What one request is about.
#[derive(Clone, Debug)]
enum Operation {
    Order { trader: usize, order: Value },
    Accounts { trader: usize },
    Notifications { trader: usize },
    Keys,
}

impl Operation {
    fn name(&self) -> &'static str {
        match self {
            Self::Order { .. } => "order",
            Self::Accounts { .. } => "accounts",
            Self::Notifications { .. } => "notifications",
            Self::Keys => "keys",
        }
    }

    /// Which of the services answers it: user, trade, notification.
    fn service(&self) -> usize {
        match self {
            Self::Keys => 0,
            Self::Order { .. } | Self::Accounts { .. } => 1,
            Self::Notifications { .. } => 2,
        }
    }
}

struct Job {
    intended: Duration,
    operation: Operation,
    slow: bool,
}

/// When a request is meant to be sent: at a fixed rate, whatever happens.
fn intended(number: u64, rate: u32) -> Duration {
    Duration::from_nanos(
        u64::try_from(u128::from(number) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX),
    )
}

/// The request of a number: mostly orders that match each other, and of each twenty a few that read.
fn operation(number: u64, run: &str, traders: &[Trader]) -> Operation {
    let count = u64::try_from(traders.len()).unwrap_or(1).max(1);
    let trader = usize::try_from(number % count).unwrap_or_default();
    match number % 20 {
        5 | 11 => Operation::Accounts { trader },
        13 => Operation::Notifications { trader },
        19 => Operation::Keys,
        _ => {
            // In each round every trader takes the other side than in the round before.
            let buys = (number / count + number % count).is_multiple_of(2);
            let (side, price) = if buys { ("buy", "20010") } else { ("sell", "19990") };
            let id = format!("load-{run}-{number}");
            let order = traders
                .get(trader)
                .map(|trader| Client::order(trader, side, price, "0.0001", &id));
            Operation::Order {
                trader,
                order: order.unwrap_or_default(),
            }
        }
    }
}

/// What all workers share.
struct Run {
    start: Instant,
    authorities: [String; 3],
    tokens: RwLock<Vec<String>>,
    records: Mutex<Vec<Record>>,
    /// For each trader, what answers have acknowledged.
    acknowledged: Mutex<Vec<Acknowledged>>,
    /// Orders without a good answer.
    unknown: Mutex<Vec<(usize, Value)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    fn token(&self, trader: usize) -> String {
        let tokens = self.tokens.read().unwrap_or_else(PoisonError::into_inner);
        tokens.get(trader).cloned().unwrap_or_default()
    }

    fn request(&self, job: &Job) -> Result<Request<Body>, http::Error> {
        let authority = self
            .authorities
            .get(job.operation.service())
            .cloned()
            .unwrap_or_default();
        let (method, path, trader, content) = match &job.operation {
            Operation::Order { trader, order } => {
                (Method::POST, "/trade/add", Some(*trader), order.to_string())
            }
            Operation::Accounts { trader } => (Method::GET, "/account/list", Some(*trader), String::new()),
            Operation::Notifications { trader } => (
                Method::GET,
                "/notifications?limit=10",
                Some(*trader),
                String::new(),
            ),
            Operation::Keys => (Method::GET, "/.well-known/jwks.json", None, String::new()),
        };
        let uri = Uri::builder()
            .scheme("http")
            .authority(authority.as_str())
            .path_and_query(path)
            .build()?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::HOST, authority);
        if let Some(trader) = trader {
            let token = self.token(trader);
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if !content.is_empty() {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::CONTENT_LENGTH, content.len());
        }
        request.body(body(Bytes::from(content), job.slow.then_some(SLOW)))
    }

    /// Sends one request, over a connection that idles after it or does not, and keeps everything that can be known of it.
    async fn carry_out(&self, link: &Link, job: Job, idles: bool) {
        let request = || self.request(&job).map_err(|error| error.to_string());
        let result = link.send(&request).await;
        let template = Record {
            intended: job.intended,
            latency: self.start.elapsed().saturating_sub(job.intended),
            operation: job.operation.name(),
            protocol: link.protocol.name(),
            slow: job.slow,
            idles,
            status: None,
            error: None,
            stack: None,
        };
        locked(&self.records).push(link::record(template, &result));
        if let Operation::Order { trader, order } = job.operation {
            match result {
                Ok(Answered {
                    status: 201, body, ..
                }) => match serde_json::from_slice(&body) {
                    Ok(answer) => self.acknowledge(trader, &answer),
                    Err(_) => locked(&self.unknown).push((trader, order)),
                },
                _ => locked(&self.unknown).push((trader, order)),
            }
        }
    }

    fn acknowledge(&self, trader: usize, answer: &Value) {
        let fills = list(answer, "trades").iter();
        let ids = fills.filter_map(|fill| field(fill, "trade_id").ok());
        if let Some(acknowledged) = locked(&self.acknowledged).get_mut(trader) {
            acknowledged.orders.extend(field(answer, "order_id"));
            acknowledged.trades.extend(ids);
        }
    }
}

/// The result of a run.
#[derive(Serialize)]
struct Outcome {
    /// When the first request was meant to be sent, in milliseconds since 1970: all other times count from there.
    started_unix_ms: i128,
    rate: u32,
    /// For how long requests were meant to be sent, also if that was cut short.
    duration_s: f64,
    summary: Summary,
    connects: u64,
    closed_without_notice: u64,
    never_sent: u64,
    /// The event streams, in the order of their ends.
    streams: Vec<Opening>,
    /// Those of them that broke, or could not be opened.
    streams_cut_off: usize,
    /// Orders without a good answer, whose fate was asked for afterwards.
    unknown_orders: usize,
    audit: Audit,
    ok: bool,
}

/// Runs the load test, prints and writes what came out, and says whether everything was right.
pub async fn run(args: LoadArgs) -> anyhow::Result<bool> {
    let lane = match (&args.lane, &args.lane_secret) {
        (Some(lane), Some(secret)) => Some(LaneKey {
            lane: lane.clone(),
            secret: secret.clone(),
        }),
        _ => None,
    };
    anyhow::ensure!(
        args.database_url.is_some() || args.no_ledger,
        "--database-url (EXCHANGE_DATABASE_URL) is required for the ledger's own audit; with --no-ledger there is none"
    );
    let client = Client::new(args.endpoints.clone(), lane, None)?;
    let traders = prepare(&client, &args)
        .await
        .context("failed to prepare the traders")?;
    let tokens: Vec<String> = traders.iter().map(|trader| trader.token.clone()).collect();
    let Endpoints {
        user_url,
        trade_url,
        notification_url,
    } = &args.endpoints;
    let started = time::OffsetDateTime::now_utc();
    let run = Arc::new(Run {
        start: Instant::now(),
        authorities: [
            authority(user_url)?,
            authority(trade_url)?,
            authority(notification_url)?,
        ],
        tokens: RwLock::new(tokens),
        records: Mutex::default(),
        acknowledged: Mutex::new(vec![Acknowledged::default(); traders.len()]),
        unknown: Mutex::default(),
    });
    let events = Arc::new(Events::default());
    let streams = Streams::of(traders.len().min(args.streams.into()));
    let followers: JoinSet<()> = (0..traders.len().min(args.streams.into()))
        .map(|trader| Arc::clone(&streams).follow(trader, notification_url.clone(), Arc::clone(&run)))
        .collect();
    let duration_s = offer(&args, &client, &traders, &run, &events)
        .await?
        .as_secs_f64();

    let unknown = std::mem::take(&mut *locked(&run.unknown));
    let unknown_orders = unknown.len();
    let mut evidence = Evidence::default();
    if let Err(error) = gather(&args, &client, traders, &run, unknown, &streams, &mut evidence).await {
        evidence.incomplete = Some(format!("{error:#}"));
    }
    streams.stop();
    followers.join_all().await;
    let openings = streams.openings();
    let streams_cut_off = openings.iter().filter(|it| it.failure.is_some()).count();
    let audit = judge(&evidence);
    let records = std::mem::take(&mut *locked(&run.records));
    let summary = summarize(&records);
    let closed_without_notice = events.closed_without_notice.load(Ordering::Relaxed);
    let outcome = Outcome {
        started_unix_ms: started.unix_timestamp_nanos() / 1_000_000,
        rate: args.rate,
        duration_s,
        ok: summary.failed == 0
            && closed_without_notice == 0
            && streams_cut_off == 0
            && audit.findings.is_empty(),
        summary,
        connects: events.connects.load(Ordering::Relaxed),
        closed_without_notice,
        never_sent: events.never_sent.load(Ordering::Relaxed),
        streams: openings,
        streams_cut_off,
        unknown_orders,
        audit,
    };
    print(&table(&outcome));
    if let Some(file) = &args.json {
        tokio::fs::write(file, serde_json::to_vec_pretty(&outcome)?).await?;
    }
    if let Some(file) = &args.records {
        let lines: Result<Vec<String>, _> = records.iter().map(serde_json::to_string).collect();
        tokio::fs::write(file, lines?.join("\n")).await?;
    }
    Ok(outcome.ok)
}

fn authority(url: &str) -> anyhow::Result<String> {
    let uri: Uri = url.parse().with_context(|| format!("{url} is not a URL"))?;
    let authority = uri.authority().with_context(|| format!("{url} has no host"))?;
    Ok(match authority.port() {
        Some(_) => authority.to_string(),
        None => format!("{authority}:80"),
    })
}

/// Registers the traders and gives them something to trade with.
async fn prepare(client: &Client, args: &LoadArgs) -> anyhow::Result<Vec<Trader>> {
    let mut treasury = match (&args.treasury_email, &args.treasury_password_file) {
        (Some(email), Some(file)) => {
            let password = tokio::fs::read_to_string(file).await?;
            let mut treasury = Trader::known(email.clone(), SecretString::from(password.trim_end()));
            client.log_in(&mut treasury).await?;
            Some(treasury)
        }
        _ => None,
    };
    // All of them first: they may have to wait for longer than a token is valid.
    let mut traders = Vec::new();
    for number in 0..args.traders {
        traders.push(register(client, number, args.traders).await?);
    }
    if let Some(treasury) = &mut treasury {
        client.log_in(treasury).await?;
    }
    for trader in &mut traders {
        client.log_in(trader).await?;
        for (currency, amount) in [(BASE, "1000"), (QUOTE, "10000000")] {
            client.open_account(trader, currency).await?;
            let account = trader.account(currency).context("no account")?;
            let token = treasury
                .as_ref()
                .map_or(&trader.token, |treasury| &treasury.token);
            client.deposit(token, account, amount).await?;
        }
    }
    Ok(traders)
}

/// Registers a trader as soon as the user service takes one more from this address.
#[expect(clippy::print_stderr, reason = "whoever waits should know for what")]
async fn register(client: &Client, number: u16, all: u16) -> Result<Trader, CallError> {
    loop {
        match client.register(&format!("load-{number}")).await {
            Err(CallError::Status {
                status: StatusCode::TOO_MANY_REQUESTS,
                retry_after: Some(wait),
                ..
            }) => {
                let seconds = wait.as_secs();
                eprintln!(
                    "{number} of {all} traders are registered; the user service takes more in {seconds} s"
                );
                sleep(wait).await;
            }
            result => return result,
        }
    }
}

/// Offers the load: a queue for each service, filled at the fixed rate, emptied by the connections. Returns for how long.
async fn offer(
    args: &LoadArgs,
    client: &Client,
    traders: &[Trader],
    run: &Arc<Run>,
    events: &Arc<Events>,
) -> anyhow::Result<Duration> {
    let mut workers = JoinSet::new();
    let mut queues = Vec::new();
    for authority in &run.authorities {
        let (queue, jobs) = mpsc::unbounded_channel();
        let jobs = Arc::new(tokio::sync::Mutex::new(jobs));
        for (protocol, streams) in [(Protocol::Http1, 1), (Protocol::Http2, STREAMS)] {
            for connection in 0..args.connections {
                let link = Arc::new(Link::new(authority.clone(), protocol, Arc::clone(events)));
                let idles = connection < args.idle_connections.min(args.connections - 1);
                for _ in 0..if idles { 1 } else { streams } {
                    workers.spawn(work(Arc::clone(run), Arc::clone(&link), Arc::clone(&jobs), idles));
                }
            }
        }
        queues.push(queue);
    }
    let relogin = tokio::spawn(keep_logged_in(client.clone(), traders.to_vec(), Arc::clone(run)));
    let progress = args
        .progress
        .then(|| tokio::spawn(tell(Arc::clone(run), Arc::clone(events))));
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let duration = Duration::try_from(args.duration).context("the duration is negative")?;
    let name = Uuid::now_v7().simple().to_string();
    for number in 0.. {
        let intended = intended(number, args.rate);
        if intended >= duration {
            break;
        }
        // Who has seen enough still gets the audit.
        tokio::select! {
            () = sleep_until(run.start + intended) => {}
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
        let operation = operation(number, &name, traders);
        let slow =
            matches!(operation, Operation::Order { .. }) && number % 100 < u64::from(args.slow_percent);
        if let Some(queue) = queues.get(operation.service()) {
            queue
                .send(Job {
                    intended,
                    operation,
                    slow,
                })
                .context("all workers are gone")?;
        }
    }
    let offered = run.start.elapsed();
    drop(queues);
    while let Some(ended) = workers.join_next().await {
        ended.context("a worker failed")?;
    }
    relogin.abort();
    if let Some(progress) = progress {
        progress.abort();
    }
    Ok(offered)
}

/// How far a run is, each second.
#[derive(Default, Serialize)]
struct Progress {
    elapsed_s: u64,
    requests: usize,
    failed: usize,
    closed_without_notice: u64,
    /// Answers of the last second, by stack.
    answers: BTreeMap<String, usize>,
}

#[expect(clippy::print_stderr, reason = "progress is for whoever watches")]
async fn tell(run: Arc<Run>, events: Arc<Events>) {
    let mut progress = Progress::default();
    let mut seconds = interval(Duration::from_secs(1));
    loop {
        seconds.tick().await;
        progress.add(locked(&run.records).get(progress.requests..).unwrap_or_default());
        progress.elapsed_s = run.start.elapsed().as_secs();
        progress.closed_without_notice = events.closed_without_notice.load(Ordering::Relaxed);
        if let Ok(line) = serde_json::to_string(&progress) {
            eprintln!("{line}");
        }
    }
}

impl Progress {
    fn add(&mut self, news: &[Record]) {
        self.requests += news.len();
        self.failed += news.iter().filter(|record| record.failure().is_some()).count();
        self.answers.clear();
        for stack in news.iter().filter_map(|record| record.stack.as_ref()) {
            *self.answers.entry(stack.clone()).or_default() += 1;
        }
    }
}

type Jobs = Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Job>>>;

/// Carries out whatever is next, one request after the other.
async fn work(run: Arc<Run>, link: Arc<Link>, jobs: Jobs, idles: bool) {
    loop {
        let job = jobs.lock().await.recv().await;
        let Some(job) = job else {
            return link.end().await;
        };
        run.carry_out(&link, job, idles).await;
        if idles {
            sleep(Duration::from_millis(rand::random_range(2_000..8_000))).await;
        }
    }
}

/// Logs all traders in again and again, as the lives of their tokens demand; a log-in that fails is a failure.
async fn keep_logged_in(client: Client, mut traders: Vec<Trader>, run: Arc<Run>) {
    loop {
        sleep(RELOGIN).await;
        log_in_all(&client, &mut traders, &run).await;
    }
}

async fn log_in_all(client: &Client, traders: &mut [Trader], run: &Run) {
    for (number, trader) in traders.iter_mut().enumerate() {
        let intended = run.start.elapsed();
        let (status, stack, error) = match client.log_in(trader).await {
            Ok(stack) => (Some(200), stack, None),
            Err(CallError::Status {
                status,
                stack,
                retry_after,
                ..
            }) => {
                let fault = link::fault(status, retry_after.is_some());
                (Some(status.as_u16()), stack, fault.map(str::to_owned))
            }
            Err(error) => (None, None, Some(link::failure(&error))),
        };
        locked(&run.records).push(Record {
            intended,
            latency: run.start.elapsed().saturating_sub(intended),
            operation: LOG_IN,
            protocol: "http/1.1",
            slow: false,
            idles: false,
            status,
            error,
            stack,
        });
        if let Some(token) = run
            .tokens
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(number)
        {
            token.clone_from(&trader.token);
        }
    }
}

/// Asks for everything that the audit is about. What it knows when something cannot be known is in the evidence, too.
async fn gather(
    args: &LoadArgs,
    client: &Client,
    mut traders: Vec<Trader>,
    run: &Run,
    unknown: Vec<(usize, Value)>,
    streams: &Streams,
    evidence: &mut Evidence,
) -> anyhow::Result<()> {
    for trader in &mut traders {
        patiently(async || client.log_in(trader).await).await?;
    }
    for (number, order) in unknown {
        let Some(trader) = traders.get(number) else {
            continue;
        };
        // The same order again: its first answer if it was placed, a new one if it was not.
        match patiently(async || client.send_order(trader, order.clone()).await).await {
            Ok(answer) => run.acknowledge(number, &answer.body),
            Err(error) => {
                let id = field(&order, "client_order_id").unwrap_or_default();
                evidence.unresolved.push(format!("{id}: {error}"));
            }
        }
    }
    let acknowledged = locked(&run.acknowledged).clone();
    for (number, (trader, acknowledged)) in traders.iter().zip(acknowledged).enumerate() {
        let account = trader.account(BASE).context("no account")?;
        let listed = patiently(async || client.trades(trader, account).await).await?;
        let mut notified = patiently(async || client.notified_trades(trader).await).await?;
        let deadline = Instant::now() + PATIENCE;
        while notified.len() < listed.len() && Instant::now() < deadline {
            sleep(RETRY).await;
            notified = patiently(async || client.notified_trades(trader).await).await?;
        }
        let streamed_trades =
            |received: &Vec<Received>| received.iter().filter(|it| it.trade.is_some()).count();
        let mut streamed = streams.received(number);
        while streamed
            .as_ref()
            .is_some_and(|it| streamed_trades(it) < listed.len())
            && Instant::now() < deadline
        {
            sleep(Duration::from_millis(100)).await;
            streamed = streams.received(number);
        }
        let zero = rust_decimal::Decimal::ZERO;
        let impossible_balances = patiently(async || client.accounts(trader).await)
            .await?
            .into_iter()
            .filter(|account| account.hold < zero || account.balance < account.hold)
            .map(|account| account.currency)
            .collect();
        evidence.traders.push(TraderEvidence {
            acknowledged,
            listed,
            notified,
            streamed,
            impossible_balances,
        });
    }
    if let Some(url) = args.database_url.as_ref().filter(|_| !args.no_ledger) {
        let lane = args.lane.clone().unwrap_or_else(Lane::live);
        let orders = evidence.traders.iter().flat_map(|it| &it.acknowledged.orders);
        let orders: Vec<&str> = orders.map(String::as_str).collect();
        let audited = audit_ledger(url, &lane, &orders).await;
        evidence.ledger = Some(audited.context("the ledger's own audit failed")?);
    }
    Ok(())
}

/// What the ledger's own audit finds, and what clients cannot see: orders that were acknowledged and are gone, users who were
/// told of a release twice, and events that have not come to all who consume them. Waits for those that are under way.
async fn audit_ledger(url: &SecretString, lane: &Lane, orders: &[&str]) -> Result<Vec<String>, sqlx::Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let in_time = Instant::now() < deadline;
        let audited = async {
            let db = sqlx::PgPool::connect(url.expose_secret()).await?;
            let under_way: i64 =
                sqlx::query_scalar("select count(*) from outbox where lane = $1 and done_at is null")
                    .bind(lane)
                    .fetch_one(&db)
                    .await?;
            if under_way > 0 && in_time {
                return Ok(None);
            }
            let problems = sqlx::query_scalar(
                "select problem || ': ' || subject from audit_ledger_v1($1)
                 union all
                 select 'order was acknowledged and is gone: ' || known.id from unnest($2::text[]) as known (id)
                 where not exists (select from orders where orders.id = known.id::uuid)
                 union all
                 select 'user was told of a release more than once: ' || user_id from notifications
                 where lane = $1 and kind = 'release' group by user_id, data ->> 'revision' having count(*) > 1",
            );
            let mut problems: Vec<String> = problems.bind(lane).bind(orders).fetch_all(&db).await?;
            if under_way > 0 {
                let problem = format!("{under_way} events have not come to all who consume them");
                problems.push(problem);
            }
            Ok(Some(problems))
        };
        match audited.await {
            Ok(Some(problems)) => return Ok(problems),
            Err(error) if !(db::is_unavailable(&error) && in_time) => return Err(error),
            _ => sleep(RETRY).await,
        }
    }
}

/// Tries again while there is no answer, or one that asks to try again.
async fn patiently<T>(mut attempt: impl AsyncFnMut() -> Result<T, CallError>) -> Result<T, CallError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Err(
                CallError::Transport { .. }
                | CallError::Status {
                    status: StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS,
                    ..
                },
            ) if Instant::now() < deadline => sleep(RETRY).await,
            result => return result,
        }
    }
}

fn table(outcome: &Outcome) -> String {
    let Outcome { summary, audit, .. } = outcome;
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{} requests at {}/s for {:.1} s: {} failed; {} connections, {} closed without notice, {} requests never sent",
        summary.requests,
        outcome.rate,
        outcome.duration_s,
        summary.failed,
        outcome.connects,
        outcome.closed_without_notice,
        outcome.never_sent,
    );
    for (failure, count) in &summary.failures {
        let _ = writeln!(text, "  {count:>8}  {failure}");
    }
    for failed in summary.failed_requests.iter().take(FAILED_SHOWN) {
        let _ = writeln!(
            text,
            "            {} over {}, meant for {} ms, over at {} ms: {}",
            failed.operation, failed.protocol, failed.intended_ms, failed.ended_ms, failed.failure,
        );
    }
    let _ = writeln!(
        text,
        "{} event streams with {} notifications, {} cut off",
        outcome.streams.len(),
        outcome
            .streams
            .iter()
            .map(|stream| stream.notifications)
            .sum::<usize>(),
        outcome.streams_cut_off,
    );
    let broken = outcome
        .streams
        .iter()
        .filter_map(|it| Some((it, it.failure.as_ref()?)));
    for (stream, failure) in broken.take(FAILED_SHOWN) {
        let _ = writeln!(
            text,
            "            of trader {} at {:?}, asked for at {} ms, over at {} ms: {failure}",
            stream.trader, stream.stack, stream.from_ms, stream.to_ms,
        );
    }
    let _ = writeln!(
        text,
        "\n{:<16}{:>9}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "latency, ms", "answers", "p50", "p90", "p99", "p99.9", "max"
    );
    for (group, latency) in &summary.latency {
        let record::Latency {
            count,
            p50,
            p90,
            p99,
            p999,
            max,
        } = latency;
        let _ = writeln!(
            text,
            "{group:<16}{count:>9}{p50:>10.1}{p90:>10.1}{p99:>10.1}{p999:>10.1}{max:>10.1}"
        );
    }
    let _ = writeln!(
        text,
        "\n{:<24}{:>9}{:>12}{:>12}",
        "stack", "answers", "from, ms", "to, ms"
    );
    for (stack, presence) in &summary.stacks {
        let _ = writeln!(
            text,
            "{stack:<24}{:>9}{:>12}{:>12}",
            presence.answers, presence.first_ms, presence.last_ms
        );
    }
    let ledger = if audit.ledger_checked {
        "ledger audited"
    } else {
        "ledger not audited"
    };
    let _ = writeln!(
        text,
        "\naudit: {} trades, {} acknowledged, {} unknown orders asked for again, {ledger}, {} findings",
        audit.trades,
        audit.acknowledged,
        outcome.unknown_orders,
        audit.findings.len(),
    );
    for finding in &audit.findings {
        let _ = writeln!(text, "  {finding}");
    }
    let _ = writeln!(text, "{}", if outcome.ok { "OK" } else { "FAILED" });
    text
}

#[expect(clippy::print_stdout, reason = "the result is what the command is for")]
fn print(text: &str) {
    print!("{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_neither_drifts_nor_waits() {
        assert_eq!(intended(0, 300), Duration::ZERO);
        assert_eq!(intended(1, 300), Duration::from_nanos(3_333_333));
        assert_eq!(intended(300 * 3_600, 300), Duration::from_hours(1));
    }

    #[test]
    fn traders_change_sides_and_orders_have_names_of_their_own() {
        let traders = vec![Trader::known(String::new(), SecretString::from("")); 3];
        let mut names = std::collections::BTreeSet::new();
        let mut sides = std::collections::BTreeMap::new();
        for number in 0..600 {
            if let Operation::Order { trader, order } = operation(number, "run", &traders) {
                assert!(names.insert(order["client_order_id"].to_string()));
                *sides.entry((trader, order["type"].to_string())).or_insert(0) += 1;
            }
        }
        assert_eq!(sides.len(), 6, "{sides:?}");
        assert!(
            sides.values().all(|count| (60..=100).contains(count)),
            "{sides:?}"
        );
    }

    /// Of one trader, who has no token yet.
    fn idle_run() -> Run {
        Run {
            start: Instant::now(),
            authorities: <[String; 3]>::default(),
            tokens: RwLock::new(vec![String::new()]),
            records: Mutex::default(),
            acknowledged: Mutex::default(),
            unknown: Mutex::default(),
        }
    }

    #[tokio::test]
    async fn log_ins_are_answers_of_a_stack_too() {
        let login = async || {
            let headers = [(crate::role::STACK_HEADER, "green-abc")];
            (headers, axum::Json(serde_json::json!({"access_token": "new"})))
        };
        let busy = async || {
            let headers = [(crate::role::STACK_HEADER, "blue-def")];
            (StatusCode::SERVICE_UNAVAILABLE, headers, "{}")
        };
        let busy_for_a_while = async || {
            let headers = [(crate::role::STACK_HEADER, "blue-def"), ("retry-after", "2")];
            (StatusCode::SERVICE_UNAVAILABLE, headers, "{}")
        };
        let unannounced = "status 503 without Retry-After";
        for (answer, status, stack, token, failure) in [
            (axum::routing::post(login), 200, "green-abc", "new", None),
            (axum::routing::post(busy), 503, "blue-def", "", Some(unannounced)),
            (
                axum::routing::post(busy_for_a_while),
                503,
                "blue-def",
                "",
                Some("status 503"),
            ),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let router = axum::Router::new().route("/login", answer);
            tokio::spawn(async { axum::serve(listener, router).await });
            let endpoints = Endpoints {
                user_url: url.clone(),
                trade_url: url.clone(),
                notification_url: url,
            };
            let run = idle_run();
            let _ = rustls::crypto::ring::default_provider().install_default();
            let client = Client::new(endpoints, None, None).unwrap();
            let mut traders = [Trader::known(String::new(), SecretString::from(""))];
            log_in_all(&client, &mut traders, &run).await;
            let records = locked(&run.records).clone();
            assert_eq!(records[0].status, Some(status));
            assert_eq!(records[0].stack.as_deref(), Some(stack));
            assert_eq!(records[0].failure().as_deref(), failure);
            assert_eq!(run.token(0), token);
        }
    }

    #[tokio::test]
    async fn of_streams_that_break_is_told_why() {
        let answers = Arc::new(Mutex::new(vec![
            (StatusCode::SERVICE_UNAVAILABLE, ""),
            (StatusCode::OK, "retry: 1\n\nid: 7\nda"),
        ]));
        let next = async move || {
            let last = locked(&answers).pop();
            last.map_or((StatusCode::GONE, ""), |answer| answer)
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = axum::Router::new().route("/notifications/stream", axum::routing::get(next));
        tokio::spawn(async { axum::serve(listener, router).await });
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (streams, run) = (Streams::of(1), Arc::new(idle_run()));
        let follower = tokio::spawn(Arc::clone(&streams).follow(0, url, run));
        while streams.openings().len() < 3 {
            tokio::task::yield_now().await;
        }
        streams.stop();
        follower.await.unwrap();
        let failures: Vec<_> = streams
            .openings()
            .into_iter()
            .take(3)
            .map(|it| it.failure)
            .collect();
        let told = ["ended within an event", "status 503", "status 410"].map(|it| Some(it.to_owned()));
        assert_eq!(failures, told);
    }

    #[tokio::test]
    async fn what_cannot_be_answered_right_now_is_asked_for_again() {
        let answer = CallError::answered;
        let busy = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
        let mut answers = vec![Ok(7), Err(answer(busy[0])), Err(answer(busy[1]))];
        assert_eq!(patiently(async || answers.pop().unwrap()).await.unwrap(), 7);
        let mut answers = vec![Ok(7), Err(answer(StatusCode::FORBIDDEN))];
        assert!(patiently(async || answers.pop().unwrap()).await.is_err());
    }

    #[test]
    fn a_port_is_80_unless_given() {
        assert_eq!(authority("http://trade").unwrap(), "trade:80");
        assert_eq!(authority("http://127.0.0.1:8080/").unwrap(), "127.0.0.1:8080");
        assert!(authority("trade").is_err() || authority("/").is_err());
    }
}
