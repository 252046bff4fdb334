//! How many trades a second the trade service settles, against `pgbench` calling the same SQL on the same database.
//!
//! A benchmark, not a test: `cargo test --release -p exchange --test it -- --ignored --nocapture bench::`. Both sides
//! place the same random orders, one per request or transaction, in rounds that take turns, so that what disturbs the
//! machine disturbs both. Prints ratios and writes `target/results/trade.json`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use exchange::lane::Lane;
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use rand::RngExt;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::{net::TcpStream, task::JoinSet};
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres, Service, postgres_binary},
    stores::{Nats, Redis},
    traders::{Issuer, assert_clean},
};

const USERS: u32 = 1000;
const PRODUCTS: u32 = 20;
/// Clients of pgbench; more are slower on two cores.
const PGBENCH_CLIENTS: u32 = 16;
/// Connections of the HTTP clients.
const CONNECTIONS: u32 = 64;
/// Rounds of each side.
const ROUNDS: usize = 3;
/// Length of a round.
const ROUND: Duration = Duration::from_secs(6);

/// The order that both sides place: the side at random, always at one price, so that about every order trades.
const ORDER: &str = r"\set u random(1, 1000)
\set p random(1, :products)
\set s random(0, 1)
\set z random(1, 10)
select outcome, field, order_id, status, reason, taken, created_at, trade_ids, trade_prices, trade_sizes, trade_fees
from submit_orders_v1('live', 'C' || lpad((:p)::int::text, 2, '0') || '-USD', array[gen_random_uuid()],
    array[('00000000-0000-4000-9000-' || lpad(to_hex((:u)::int), 12, '0'))::uuid], array[gen_random_uuid()::text],
    array[case (:s)::int when 0 then 'buy' else 'sell' end], array[100]::numeric[], array[(:z)::int * 0.01], array['gtc'],
    array[('00000000-0000-4000-8' || lpad(to_hex((:p)::int), 3, '0') || '-' || lpad(to_hex((:u)::int), 12, '0'))::uuid],
    array[('00000000-0000-4000-8000-' || lpad(to_hex((:u)::int), 12, '0'))::uuid], array[null]::text[]);
";

/// Users with plenty in an account of each currency.
const DATA: &str = "
insert into currencies select 'C' || lpad(i::text, 2, '0'), 'crypto', 8 from generate_series(1, 20) i;
insert into products (symbol, base, base_scale, quote, quote_scale, size_increment, price_increment, min_size,
                      maker_fee_rate, taker_fee_rate)
select symbol || '-USD', symbol, 8, 'USD', 8, 0.0001, 0.01, 0.0001, 0.001, 0.002
from currencies where symbol ~ '^C[0-9]+$';
insert into accounts (id, lane, user_id, currency, name)
select ('00000000-0000-4000-8' || lpad(to_hex(c), 3, '0') || '-' || lpad(to_hex(u), 12, '0'))::uuid, 'live',
       ('00000000-0000-4000-9000-' || lpad(to_hex(u), 12, '0'))::uuid,
       case c when 0 then 'USD' else 'C' || lpad(c::text, 2, '0') end, 'main'
from generate_series(0, 20) c, generate_series(1, 1000) u;
with numbered as (
    select id, currency, nextval('transfer_ids') as transfer from accounts where kind = 'user'
), transferred as (
    insert into transfers (id, lane, kind, created_at) select transfer, 'live', 'deposit', now() from numbered
)
insert into entries (account_id, transfer_id, line, lane, currency, kind, amount)
select line.account, numbered.transfer, line.no, 'live', numbered.currency, 'transfer', line.amount
from numbered join (select symbol, exchange_account_v1('live', 'external', symbol) as id from currencies) external
              on external.symbol = numbered.currency,
     lateral (values (1, numbered.id, 1e9), (2, external.id, -1e9)) as line (no, account, amount);
update accounts set balance = 1e9 where kind = 'user';
";

struct Bench {
    postgres: Postgres,
    database: Database,
    owner: PgPool,
    service: Service,
    tokens: Arc<Vec<String>>,
    directory: PathBuf,
}

/// What one round gave.
struct Round {
    trades_per_s: f64,
    latencies_us: Vec<u64>,
}

/// What trading is like while everybody logs in.
struct Storm {
    calm_p99_ms: f64,
    stormy_p99_ms: f64,
    log_ins_per_s: f64,
    user_memory_mib: u64,
}

impl Round {
    fn p99_ms(&self) -> f64 {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable();
        let at = sorted.len() * 99 / 100;
        float(sorted.get(at).copied().unwrap_or(0)) / 1000.0
    }
}

impl Bench {
    async fn start() -> Self {
        let postgres = Postgres::start(&[
            "-c",
            "shared_buffers=512MB",
            "-c",
            "max_wal_size=8GB",
            "-c",
            "checkpoint_timeout=30min",
        ]);
        let database = Database::migrated(&postgres).await;
        let owner = database.owner().await;
        sqlx::raw_sql(DATA).execute(&owner).await.unwrap();
        sqlx::raw_sql("vacuum analyze").execute(&owner).await.unwrap();
        let flags = ["--database-connections", "16", "--access-token-lifetime", "2h"];
        let service = Service::live("trade", &database, &flags).ready().await;
        let issuer = Issuer::new(&database).await;
        let mut tokens = Vec::new();
        for user in 1..=USERS {
            let user = Uuid::parse_str(&format!("00000000-0000-4000-9000-{user:012x}")).unwrap();
            tokens.push(issuer.token(user, Lane::live(), &[]).await);
        }
        let directory = crate::servers::temporary_directory("bench");
        std::fs::write(directory.join("order.sql"), ORDER).unwrap();
        Self {
            postgres,
            database,
            owner,
            service,
            tokens: Arc::new(tokens),
            directory,
        }
    }

    async fn trades(&self) -> u64 {
        let (trades,): (i64,) = sqlx::query_as("select count(*) from trades")
            .fetch_one(&self.owner)
            .await
            .unwrap();
        u64::try_from(trades).unwrap()
    }

    /// Empties the queue of events, which nobody relays here, and tidies up what the last round left.
    async fn tidy(&self) {
        sqlx::raw_sql("truncate outbox")
            .execute(&self.owner)
            .await
            .unwrap();
        sqlx::raw_sql("vacuum analyze orders, accounts")
            .execute(&self.owner)
            .await
            .unwrap();
        sqlx::raw_sql("checkpoint").execute(&self.owner).await.unwrap();
    }

    /// pgbench as the services' role, as fast as it can or at a rate.
    async fn pgbench(&self, products: u32, rate: Option<f64>) -> Round {
        self.tidy().await;
        let before = self.trades().await;
        let mut command = Command::new(postgres_binary("pgbench"));
        command
            .current_dir(&self.directory)
            .args([
                "--no-vacuum",
                "--protocol=prepared",
                "--log",
                "--log-prefix=round",
                "--file=order.sql",
            ])
            .args([
                format!("--client={PGBENCH_CLIENTS}"),
                format!("--time={}", ROUND.as_secs()),
            ])
            .arg(format!("--define=products={products}"))
            .args(rate.map(|rate| format!("--rate={rate}")))
            .arg(&self.database.app_url);
        let start = Instant::now();
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        let elapsed = start.elapsed();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut latencies_us = Vec::new();
        for entry in std::fs::read_dir(&self.directory).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("round.") {
                let log = std::fs::read_to_string(entry.path()).unwrap();
                // client, transaction, latency in microseconds (from the intended start when there is a rate), …
                latencies_us.extend(
                    log.lines()
                        .map(|line| line.split(' ').nth(2).unwrap().parse::<u64>().unwrap()),
                );
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        Round {
            trades_per_s: float(self.trades().await - before) / elapsed.as_secs_f64(),
            latencies_us,
        }
    }

    /// Clients of the service on kept-alive connections, as fast as they can or at a rate. Latencies are from the
    /// intended start.
    async fn http(&self, products: u32, rate: Option<f64>) -> Round {
        self.tidy().await;
        let before = self.trades().await;
        let (start, scheduled_us) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (address, tokens, scheduled_us) = (
                self.service.public,
                Arc::clone(&self.tokens),
                Arc::clone(&scheduled_us),
            );
            clients.spawn(async move {
                let stream = TcpStream::connect(address).await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                let mut latencies = Vec::new();
                loop {
                    let intended = match rate {
                        None => start.elapsed(),
                        Some(rate) => {
                            // Exponential gaps, as pgbench makes them.
                            let gap = -(1.0 - rand::random::<f64>()).ln() / rate * 1e6;
                            #[expect(
                                clippy::cast_possible_truncation,
                                clippy::cast_sign_loss,
                                reason = "a short time"
                            )]
                            let gap = gap as u64;
                            Duration::from_micros(scheduled_us.fetch_add(gap, Ordering::Relaxed) + gap)
                        }
                    };
                    if intended > ROUND {
                        return latencies;
                    }
                    tokio::time::sleep_until((start + intended).into()).await;
                    let response = sender.send_request(order(products, &tokens)).await.unwrap();
                    let status = response.status();
                    let body = response.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(status, 201, "{}", String::from_utf8_lossy(&body));
                    latencies.push(micros(start.elapsed().saturating_sub(intended)));
                }
            });
        }
        let latencies_us = clients.join_all().await.into_iter().flatten().collect();
        let elapsed = start.elapsed();
        Round {
            trades_per_s: float(self.trades().await - before) / elapsed.as_secs_f64(),
            latencies_us,
        }
    }

    /// The most that both sides do, in turns: trades per second of HTTP and of pgbench.
    async fn compare(&self, products: u32) -> (f64, f64) {
        let (mut http, mut pgbench) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            pgbench.push(self.pgbench(products, None).await.trades_per_s);
            http.push(self.http(products, None).await.trades_per_s);
        }
        eprintln!("{products} products: HTTP {http:.0?}, pgbench {pgbench:.0?} trades/s");
        (median(http), median(pgbench))
    }

    /// Resident memory of trade and notification service in MiB at a rate, with the queue and the market data that
    /// trades bring along.
    async fn memory_mib(&self, rate: f64) -> (u64, u64) {
        let (nats, redis) = (Nats::start(), Redis::start(None));
        let (queue, market) = (nats.url(), redis.url());
        let flags = ["--queue-url", &queue, "--market-data-url", &market];
        let notification = Service::live("notification", &self.database, &flags)
            .ready()
            .await;
        self.http(PRODUCTS, Some(rate)).await;
        (self.service.memory_mib(), notification.memory_mib())
    }

    /// Trading at a rate while nothing else happens, and while everybody logs in.
    async fn login_storm(&self, rate: f64) -> Storm {
        let flags = [
            "--login-attempts-per-address",
            "100000000",
            "--login-attempts-per-account",
            "100000000",
        ];
        let users = Service::live("user", &self.database, &flags).ready().await;
        let (mut calm, mut stormy, mut log_ins) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            calm.push(self.http(PRODUCTS, Some(rate)).await.p99_ms());
            let over = Arc::new(AtomicBool::new(false));
            let (begun, hashed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
            let mut storm = JoinSet::new();
            for number in 0..32 {
                let (client, url) = (users.client.clone(), users.url("/login"));
                let (over, hashed) = (Arc::clone(&over), Arc::clone(&hashed));
                storm.spawn(async move {
                    let body = json!({"email": format!("user-{number}@example.com"), "password": "not the password"});
                    while !over.load(Ordering::Relaxed) {
                        let status = client.post(&url).json(&body).send().await.unwrap().status();
                        assert_eq!(status, 401);
                        hashed.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            stormy.push(self.http(PRODUCTS, Some(rate)).await.p99_ms());
            over.store(true, Ordering::Relaxed);
            storm.join_all().await;
            log_ins.push(float(hashed.load(Ordering::Relaxed)) / begun.elapsed().as_secs_f64());
        }
        eprintln!("p99 with {log_ins:.0?} log-ins/s: {stormy:.1?} ms, without: {calm:.1?} ms");
        Storm {
            calm_p99_ms: median(calm),
            stormy_p99_ms: median(stormy),
            log_ins_per_s: median(log_ins),
            user_memory_mib: users.memory_mib(),
        }
    }
}

fn order(products: u32, tokens: &[String]) -> Request<Full<Bytes>> {
    let mut random = rand::rng();
    let user = random.random_range(1..=USERS);
    let product = random.random_range(1..=products);
    let action = if random.random() { "buy" } else { "sell" };
    let size = random.random_range(1..=10);
    let body = format!(
        r#"{{"type":"{action}","product":"C{product:02}-USD","size":"0.{size:02}","price":"100","client_order_id":"{id}","base_account_id":"00000000-0000-4000-8{product:03x}-{user:012x}","quote_account_id":"00000000-0000-4000-8000-{user:012x}"}}"#,
        id = Uuid::new_v4(),
    );
    Request::post("/trade/add")
        .header("host", "exchange")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {}", tokens[user as usize - 1]))
        .body(Full::from(body))
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a benchmark of some minutes: make bench"]
async fn trades_per_second() {
    let bench = Bench::start().await;
    // Plans, caches and the shape of the books settle first.
    bench.pgbench(PRODUCTS, None).await;
    bench.http(PRODUCTS, None).await;

    let (uniform, uniform_pgbench) = bench.compare(PRODUCTS).await;
    let (hot, hot_pgbench) = bench.compare(1).await;

    // Orders per second; every order trades about once, so this is half of what the service can do.
    let rate = uniform.min(uniform_pgbench) / 2.0;
    let (mut of_http, mut of_pgbench) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_pgbench.push(bench.pgbench(PRODUCTS, Some(rate)).await.p99_ms());
        of_http.push(bench.http(PRODUCTS, Some(rate)).await.p99_ms());
    }
    eprintln!("p99 at {rate:.0} orders/s: HTTP {of_http:.1?} ms, pgbench {of_pgbench:.1?} ms");
    let (half_load_p99, reference_p99) = (median(of_http), median(of_pgbench));
    let storm = bench.login_storm(rate).await;
    let (trade_memory_mib, notification_memory_mib) = bench.memory_mib(rate).await;
    assert_clean(&bench.owner, "live").await;

    let results = json!({
        "uniform_ratio": ratio(uniform, uniform_pgbench),
        "hot_ratio": ratio(hot, hot_pgbench),
        "p99_ratio_at_half_load": ratio(half_load_p99, reference_p99),
        "login_storm_p99_ratio": ratio(storm.stormy_p99_ms, storm.calm_p99_ms),
        "uniform_trades_per_s": uniform.round(),
        "uniform_pgbench_trades_per_s": uniform_pgbench.round(),
        "hot_trades_per_s": hot.round(),
        "hot_pgbench_trades_per_s": hot_pgbench.round(),
        "half_load_orders_per_s": rate.round(),
        "half_load_p99_ms": ratio(half_load_p99, 1.0),
        "half_load_pgbench_p99_ms": ratio(reference_p99, 1.0),
        "login_storm_p99_ms": ratio(storm.stormy_p99_ms, 1.0),
        "login_storm_calm_p99_ms": ratio(storm.calm_p99_ms, 1.0),
        "login_storm_log_ins_per_s": storm.log_ins_per_s.round(),
        "memory_mib": {
            "user": storm.user_memory_mib,
            "trade": trade_memory_mib,
            "notification": notification_memory_mib,
        },
        "pgbench_clients": PGBENCH_CLIENTS,
        "http_connections": CONNECTIONS,
        "products": PRODUCTS,
        "users": USERS,
        "machine": machine(),
        "commit": text(Command::new("git").args(["describe", "--always", "--dirty"])),
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/results/trade.json");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, serde_json::to_vec_pretty(&results).unwrap()).unwrap();
    eprintln!("{results:#}");
    std::fs::remove_dir_all(&bench.directory).unwrap();
    drop(bench.postgres);
}

fn machine() -> Value {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name\t: "));
    json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().unwrap().get(),
        "postgresql": text(Command::new(postgres_binary("postgres")).arg("--version")),
        "load_average": text(Command::new("cut").args(["-d", " ", "-f", "1-3", "/proc/loadavg"])),
    })
}

fn text(command: &mut Command) -> String {
    String::from_utf8(command.output().unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// To two digits.
fn ratio(one: f64, other: f64) -> f64 {
    (one / other * 100.0).round() / 100.0
}

#[expect(clippy::cast_precision_loss, reason = "counts of some seconds")]
fn float(count: u64) -> f64 {
    count as f64
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
