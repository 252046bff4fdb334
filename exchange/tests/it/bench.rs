//! How many trades a second the trade service settles, against `pgbench` calling the same SQL on the same database.
//!
//! A benchmark, not a test: `make bench`. Both sides place the same random orders, one per request or transaction, in
//! rounds that take turns, so that what disturbs the machine disturbs both. Prints ratios beside their floors and aims,
//! writes `target/results/trade.json`, and fails below a floor.

use std::{
    cmp::Ordering::{Equal, Greater},
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    path::Path,
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
use tempfile::TempDir;
use tokio::{net::TcpStream, sync::Barrier, task::JoinSet};
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres, Service, postgres_binary, temporary_directory},
    stores::{Nats, Redis},
    traders::{Issuer, assert_clean},
};

const USERS: u32 = 1000;
const CROWD: u32 = 32;
const PRODUCTS: u32 = 20;
/// Clients of pgbench; more are slower on two cores.
const PGBENCH_CLIENTS: u32 = 16;
/// Connections of the HTTP clients.
const CONNECTIONS: u32 = 64;
/// The part of its most that pgbench follows without a queue that grows.
const FOLLOWED: f64 = 0.9;
/// Rounds of each side.
const ROUNDS: usize = 3;
/// Length of a round.
const ROUND: Duration = Duration::from_secs(6);
/// Clients that send the same order under the same key at the same time.
const TWINS: usize = 20;

/// What a ratio should be.
struct Goal {
    name: &'static str,
    /// Below this the run fails.
    floor: Option<f64>,
    aim: f64,
    more_is_better: bool,
}

const GOALS: [Goal; 4] = [
    Goal {
        name: "uniform_ratio",
        floor: Some(0.5),
        aim: 0.8,
        more_is_better: true,
    },
    Goal {
        name: "hot_ratio",
        floor: Some(0.8),
        aim: 2.0,
        more_is_better: true,
    },
    Goal {
        name: "p99_ratio_at_half_load",
        floor: None,
        aim: 2.5,
        more_is_better: false,
    },
    Goal {
        name: "login_storm_p99_ratio",
        floor: None,
        aim: 2.0,
        more_is_better: false,
    },
];

/// The ratios beside what they should be; and those below their floors, which fail the run.
fn judge(results: &Value) -> (String, Vec<String>) {
    let mut table = format!("{:<24}{:>8}{:>8}{:>8}\n", "", "result", "floor", "aim");
    let mut failures = Vec::new();
    for goal in &GOALS {
        let result = results[goal.name].as_f64().unwrap_or(f64::NAN);
        let floor = goal
            .floor
            .map_or_else(|| "-".to_owned(), |floor| floor.to_string());
        let sign = if goal.more_is_better { "≥" } else { "≤" };
        let reached = if goal.more_is_better {
            result >= goal.aim
        } else {
            result <= goal.aim
        };
        // Also what is not a number.
        let below = goal
            .floor
            .filter(|floor| !matches!(result.partial_cmp(floor), Some(Equal | Greater)));
        let verdict = match (below, reached) {
            (Some(_), _) => "BELOW THE FLOOR",
            (None, true) => "as aimed at",
            (None, false) => "short of the aim",
        };
        writeln!(
            table,
            "{:<24}{result:>8.2}{floor:>8}{:>8}  {verdict}",
            goal.name,
            format!("{sign} {}", goal.aim),
        )
        .unwrap();
        failures.extend(below.map(|floor| format!("{} is {result}, its floor is {floor}", goal.name)));
    }
    (table, failures)
}

#[test]
fn a_run_below_a_floor_fails_and_one_short_of_an_aim_does_not() {
    let mut results = json!({
        "uniform_ratio": 0.5, "hot_ratio": 0.8, "p99_ratio_at_half_load": 9.0, "login_storm_p99_ratio": 1.5,
    });
    let (table, failures) = judge(&results);
    assert_eq!(failures, Vec::<String>::new());
    let verdicts: Vec<&str> = table
        .lines()
        .skip(1)
        .map(|line| line.rsplit("  ").next().unwrap())
        .collect();
    let short = "short of the aim";
    assert_eq!(verdicts, [short, short, short, "as aimed at"], "{table}");

    results["uniform_ratio"] = json!(0.49);
    results["hot_ratio"] = json!(null);
    let (table, failures) = judge(&results);
    assert_eq!(
        failures,
        [
            "uniform_ratio is 0.49, its floor is 0.5",
            "hot_ratio is NaN, its floor is 0.8"
        ]
    );
    assert_eq!(table.matches("BELOW THE FLOOR").count(), 2, "{table}");
}

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
    array[('00000000-0000-4000-8000-' || lpad(to_hex((:u)::int), 12, '0'))::uuid], array[null]::jsonb[]);
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
    directory: TempDir,
}

/// What one round gave.
struct Round {
    trades_per_s: f64,
    latencies_us: Vec<u64>,
    cost: Cost,
}

/// What trades have cost: what has been used of the processors, and how many transactions there were.
#[derive(Clone, Copy)]
struct Cost {
    postgresql_us_per_trade: f64,
    service_us_per_trade: f64,
    /// Of the service; nothing without it.
    orders_per_batch: f64,
}

impl Cost {
    fn json(self) -> Value {
        json!({
            "postgresql_cpu_us_per_trade": self.postgresql_us_per_trade.round(),
            "service_cpu_us_per_trade": self.service_us_per_trade.round(),
            "orders_per_batch": ratio(self.orders_per_batch, 1.0),
        })
    }
}

/// What has been counted so far.
struct Counted {
    at: Instant,
    trades: u64,
    postgresql: Duration,
    service: Duration,
    orders: f64,
    batches: f64,
}

/// What both sides have done in turns: trades per second in the middle of the rounds, and the cost of one of them.
struct Compared {
    http: f64,
    pgbench: f64,
    http_cost: Cost,
    pgbench_cost: Cost,
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
    async fn start(settings: &[&str]) -> Self {
        let common = [
            "-c",
            "shared_buffers=512MB",
            "-c",
            "max_wal_size=8GB",
            "-c",
            "checkpoint_timeout=30min",
        ];
        let postgres = Postgres::start(&[&common[..], settings].concat());
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
        let directory = temporary_directory("bench");
        std::fs::write(directory.path().join("order.sql"), ORDER).unwrap();
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

    async fn counted(&self) -> Counted {
        let page = self.service.admin("/metrics").await.text().await.unwrap();
        let metric = |name: &str| {
            let mut lines = page.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            value.trim().parse().unwrap()
        };
        Counted {
            trades: self.trades().await,
            orders: metric("order_batch_size_sum"),
            batches: metric("order_batch_size_count"),
            postgresql: self.postgres.server.cpu(),
            service: self.service.cpu(),
            at: Instant::now(),
        }
    }

    /// What a round gave that has just ended.
    async fn round_since(&self, before: &Counted, latencies_us: Vec<u64>) -> Round {
        let elapsed = before.at.elapsed();
        let (service, postgresql) = (self.service.cpu(), self.postgres.server.cpu());
        let after = self.counted().await;
        let trades = float(after.trades - before.trades);
        let per_trade = |used: Duration| used.as_secs_f64() * 1e6 / trades;
        Round {
            trades_per_s: trades / elapsed.as_secs_f64(),
            latencies_us,
            cost: Cost {
                postgresql_us_per_trade: per_trade(postgresql.saturating_sub(before.postgresql)),
                service_us_per_trade: per_trade(service.saturating_sub(before.service)),
                orders_per_batch: (after.orders - before.orders) / (after.batches - before.batches).max(1.0),
            },
        }
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
        let before = self.counted().await;
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
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        let mut round = self.round_since(&before, Vec::new()).await;
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        for entry in std::fs::read_dir(&self.directory).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("round.") {
                let log = std::fs::read_to_string(entry.path()).unwrap();
                // client, transaction, latency in microseconds (from the intended start when there is a rate), …
                round.latencies_us.extend(
                    log.lines()
                        .map(|line| line.split(' ').nth(2).unwrap().parse::<u64>().unwrap()),
                );
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        round
    }

    /// Clients of the service on kept-alive connections, as fast as they can or at a rate. Latencies are from the
    /// intended start.
    async fn http(&self, products: u32, rate: Option<f64>) -> Round {
        self.tidy().await;
        let before = self.counted().await;
        let (start, scheduled_us) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (address, tokens, scheduled_us) = (
                self.service.public,
                Arc::clone(&self.tokens),
                Arc::clone(&scheduled_us),
            );
            clients.spawn(async move {
                let mut sender = connect(address).await;
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
        self.round_since(&before, latencies_us).await
    }

    /// The most that both sides do, in turns.
    async fn compare(&self, products: u32) -> Compared {
        let (mut http, mut pgbench) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            pgbench.push(self.pgbench(products, None).await);
            http.push(self.http(products, None).await);
        }
        let rates = |rounds: &[Round]| rounds.iter().map(|round| round.trades_per_s).collect::<Vec<_>>();
        let (http_rates, pgbench_rates) = (rates(&http), rates(&pgbench));
        eprintln!("{products} products: HTTP {http_rates:.0?}, pgbench {pgbench_rates:.0?} trades/s");
        Compared {
            http: median(http_rates),
            pgbench: median(pgbench_rates),
            http_cost: cost(&http),
            pgbench_cost: cost(&pgbench),
        }
    }

    /// One hot product, while clients beside send the same order under the same key all at once, again and again.
    async fn with_twins(&self) -> Round {
        let together = Arc::new(Barrier::new(TWINS));
        let first = Uuid::new_v4().as_u128();
        let mut twins = JoinSet::new();
        for _ in 0..TWINS {
            let (address, token) = (self.service.public, self.tokens[0].clone());
            let together = Arc::clone(&together);
            twins.spawn(async move {
                let mut sender = connect(address).await;
                for number in 0.. {
                    together.wait().await;
                    let order = order_of(
                        1,
                        1,
                        "buy",
                        1,
                        Uuid::from_u128(first.wrapping_add(number)),
                        &token,
                    );
                    let response = sender.send_request(order).await.unwrap();
                    assert_eq!(response.status(), 201);
                    response.into_body().collect().await.unwrap();
                }
            });
        }
        let round = self.http(1, None).await;
        assert!(twins.try_join_next().is_none(), "a twin has ended");
        twins.shutdown().await;
        round
    }

    /// What the service's connections are doing while it is not over: of all looks at a connection at work, the share of
    /// each thing that it waited for.
    async fn watch(&self, over: &AtomicBool) -> Value {
        let mut seen: BTreeMap<String, u64> = BTreeMap::new();
        while !over.load(Ordering::Relaxed) {
            let now: Vec<(String,)> = sqlx::query_as(
                "select coalesce(wait_event_type || ' ' || wait_event, 'running') from pg_stat_activity
                 where application_name like 'exchange-trade%' and state = 'active'",
            )
            .fetch_all(&self.owner)
            .await
            .unwrap();
            for (doing,) in now {
                *seen.entry(doing).or_default() += 1;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let all = float(seen.values().sum());
        let shares = seen
            .into_iter()
            .map(|(doing, times)| (doing, ratio(float(times), all).into()));
        Value::Object(shares.collect())
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
            "--logins-per-account",
            "100000000",
            "--trusted-proxies",
            "127.0.0.0/8",
        ];
        let users = Service::live("user", &self.database, &flags).ready().await;
        // Each with an address of its own.
        let post = |number: u32, path: &str| {
            let body =
                json!({"email": format!("user-{number}@example.com"), "password": "correct horse battery"});
            let request = users.client.post(users.url(path)).json(&body);
            request.header("x-forwarded-for", format!("203.0.113.{number}"))
        };
        for number in 0..CROWD {
            assert_eq!(post(number, "/register").send().await.unwrap().status(), 202);
        }
        let (mut calm, mut stormy, mut log_ins) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            calm.push(self.http(PRODUCTS, Some(rate)).await.p99_ms());
            let over = Arc::new(AtomicBool::new(false));
            let (begun, hashed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
            let mut storm = JoinSet::new();
            for number in 0..CROWD {
                let log_in = post(number, "/login");
                let (over, hashed) = (Arc::clone(&over), Arc::clone(&hashed));
                storm.spawn(async move {
                    while !over.load(Ordering::Relaxed) {
                        let answer = log_in.try_clone().unwrap().send().await.unwrap();
                        assert_eq!(answer.status(), 200);
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

async fn connect(address: SocketAddr) -> http1::SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// An order at random.
fn order(products: u32, tokens: &[String]) -> Request<Full<Bytes>> {
    let mut random = rand::rng();
    let user = random.random_range(1..=USERS);
    let product = random.random_range(1..=products);
    let action = if random.random() { "buy" } else { "sell" };
    let size = random.random_range(1..=10);
    order_of(
        user,
        product,
        action,
        size,
        Uuid::new_v4(),
        &tokens[user as usize - 1],
    )
}

fn order_of(user: u32, product: u32, action: &str, size: u32, id: Uuid, token: &str) -> Request<Full<Bytes>> {
    let body = format!(
        r#"{{"type":"{action}","product":"C{product:02}-USD","size":"0.{size:02}","price":"100","client_order_id":"{id}","base_account_id":"00000000-0000-4000-8{product:03x}-{user:012x}","quote_account_id":"00000000-0000-4000-8000-{user:012x}"}}"#,
    );
    Request::post("/trade/add")
        .header("host", "exchange")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {token}"))
        .body(Full::from(body))
        .unwrap()
}

/// Half of the most that the service does, in orders per second (every order trades about once), and whose most that is
/// half of. At a rate that `pgbench` does not follow, its latency would be the length of the round: then it is half of the
/// most that `pgbench` does.
fn half_load(most: &Compared) -> (f64, &'static str) {
    if most.http / 2.0 < most.pgbench * FOLLOWED {
        (most.http / 2.0, "the service's maximum")
    } else {
        (
            most.pgbench / 2.0,
            "pgbench's maximum, since it cannot follow half of the service's",
        )
    }
}

#[test]
fn half_load_is_the_services_as_long_as_pgbench_can_follow() {
    let cost = Cost {
        postgresql_us_per_trade: 0.0,
        service_us_per_trade: 0.0,
        orders_per_batch: 0.0,
    };
    for (http, pgbench, rate, whose) in [
        (1000, 700, 500.0, "the service's"),
        (700, 1000, 350.0, "the service's"),
        (2000, 700, 350.0, "pgbench's"),
    ] {
        let (half, half_of) = half_load(&Compared {
            http: f64::from(http),
            pgbench: f64::from(pgbench),
            http_cost: cost,
            pgbench_cost: cost,
        });
        assert!(half.total_cmp(&rate).is_eq(), "{half} of {http} and {pgbench}");
        assert!(half_of.starts_with(whose), "{half_of}");
    }
}

/// The cost of a trade in the middle of the rounds.
fn cost(rounds: &[Round]) -> Cost {
    let of = |value: fn(&Cost) -> f64| median(rounds.iter().map(|round| value(&round.cost)).collect());
    Cost {
        postgresql_us_per_trade: of(|cost| cost.postgresql_us_per_trade),
        service_us_per_trade: of(|cost| cost.service_us_per_trade),
        orders_per_batch: of(|cost| cost.orders_per_batch),
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a benchmark of some minutes: make bench"]
async fn trades_per_second() {
    // By the end somebody may have committed something else.
    let commit = text(Command::new("git").args(["describe", "--always", "--dirty"]));
    let bench = Bench::start(&[]).await;
    // Plans, caches and the shape of the books settle first.
    bench.pgbench(PRODUCTS, None).await;
    bench.http(PRODUCTS, None).await;

    let uniform = bench.compare(PRODUCTS).await;
    let hot = bench.compare(1).await;
    let mut with_twins = Vec::new();
    for _ in 0..ROUNDS {
        with_twins.push(bench.with_twins().await);
    }
    let twins_cost = cost(&with_twins);
    let with_twins = median(with_twins.iter().map(|round| round.trades_per_s).collect());

    let (rate, half_of) = half_load(&uniform);
    let (mut of_http, mut of_pgbench) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_pgbench.push(bench.pgbench(PRODUCTS, Some(rate)).await.p99_ms());
        of_http.push(bench.http(PRODUCTS, Some(rate)).await.p99_ms());
    }
    eprintln!(
        "p99 at {rate:.0} orders/s, half of {half_of}: HTTP {of_http:.1?} ms, pgbench {of_pgbench:.1?} ms"
    );
    let (half_load_p99, reference_p99) = (median(of_http), median(of_pgbench));
    let storm = bench.login_storm(rate).await;
    let (trade_memory_mib, notification_memory_mib) = bench.memory_mib(rate).await;
    assert_clean(&bench.owner, "live").await;
    drop(bench);
    let profile = profile().await;

    let results = json!({
        "uniform_ratio": ratio(uniform.http, uniform.pgbench),
        "hot_ratio": ratio(hot.http, hot.pgbench),
        "p99_ratio_at_half_load": ratio(half_load_p99, reference_p99),
        "login_storm_p99_ratio": ratio(storm.stormy_p99_ms, storm.calm_p99_ms),
        "uniform_trades_per_s": uniform.http.round(),
        "uniform_pgbench_trades_per_s": uniform.pgbench.round(),
        "hot_trades_per_s": hot.http.round(),
        "hot_pgbench_trades_per_s": hot.pgbench.round(),
        "hot_trades_per_s_beside_a_repeated_key": with_twins.round(),
        "cost": {
            "uniform": uniform.http_cost.json(),
            "uniform_pgbench": uniform.pgbench_cost.json(),
            "hot": hot.http_cost.json(),
            "hot_pgbench": hot.pgbench_cost.json(),
            "hot_beside_a_repeated_key": twins_cost.json(),
        },
        "profile": profile,
        "half_load_orders_per_s": rate.round(),
        "half_load_is_half_of": half_of,
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
        "commit": commit,
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/results/trade.json");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, serde_json::to_vec_pretty(&results).unwrap()).unwrap();
    let (table, failures) = judge(&results);
    eprintln!("{results:#}\n\n{table}\nHalf load is half of {half_of}.");
    assert!(failures.is_empty(), "{}", failures.join("; "));
}

/// Where the time goes with uniform orders: statements by their time, nested ones within it, and what connections wait
/// for. In a run of its own, because watching takes time.
async fn profile() -> Value {
    let settings = [
        "-c",
        "shared_preload_libraries=pg_stat_statements",
        "-c",
        "pg_stat_statements.track=all",
    ];
    let bench = Bench::start(&settings).await;
    sqlx::raw_sql("create extension pg_stat_statements")
        .execute(&bench.owner)
        .await
        .unwrap();
    bench.http(PRODUCTS, None).await;
    bench.tidy().await;
    sqlx::raw_sql("select pg_stat_statements_reset()")
        .execute(&bench.owner)
        .await
        .unwrap();
    let before = bench.trades().await;
    let over = AtomicBool::new(false);
    let round = async {
        bench.http(PRODUCTS, None).await;
        over.store(true, Ordering::Relaxed);
    };
    let (waits, ()) = tokio::join!(bench.watch(&over), round);
    let trades = float(bench.trades().await - before);
    let statements: Vec<(f64, i64, bool, String)> = sqlx::query_as(
        r"select total_exec_time, calls, toplevel, left(regexp_replace(query, '\s+', ' ', 'g'), 80)
          from pg_stat_statements join pg_database on pg_database.oid = dbid and datname = current_database()
          where query !~* 'vacuum|checkpoint|truncate|pg_stat_|count\(\*\) from trades'
          order by total_exec_time desc limit 14",
    )
    .fetch_all(&bench.owner)
    .await
    .unwrap();
    let statements = statements.into_iter().map(|(ms, calls, top_level, statement)| {
        json!({
            "us_per_trade": (ms * 1000.0 / trades).round(),
            "calls_per_trade": ratio(float(calls.unsigned_abs()), trades),
            "nested": !top_level,
            "statement": statement,
        })
    });
    json!({"statements": statements.collect::<Vec<_>>(), "waits": waits})
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
