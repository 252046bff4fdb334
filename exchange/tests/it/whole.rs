//! All services together: the smoke test and the load test, as their users run them.

use std::process::{Command, Output, Stdio};

use exchange::lane::Lane;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    disasters::treasury,
    servers::{Service, eventually, temporary_directory},
    stores::Stores,
    traders::{Issuer, Trader, Wallet},
};

pub(crate) const SECRET: &str = "a secret of this stack";

/// The three services of one stack.
pub(crate) struct Stack {
    pub(crate) user: Service,
    pub(crate) trade: Service,
    pub(crate) notification: Service,
}

impl Stack {
    pub(crate) async fn start(stores: &Stores, flags: &[&str]) -> Self {
        Self::start_by(&mut Command::new(crate::servers::binary()), stores, flags).await
    }

    /// A stack of another version.
    pub(crate) async fn start_by(binary: &mut Command, stores: &Stores, flags: &[&str]) -> Self {
        let market = stores.redis.url();
        let flags = [&["--lane-secret", SECRET], flags].concat();
        let with_market = [&["--market-data-url", &market], flags.as_slice()].concat();
        let start =
            |service, flags: &[&str]| Service::start_by(&mut like(binary), service, &stores.database, flags);
        let (user, trade) = (start("user", &flags), start("trade", &with_market));
        let notification = stores.notification_by(&mut like(binary), &flags);
        Self {
            user: user.ready().await,
            trade: trade.ready().await,
            notification: notification.ready().await,
        }
    }

    /// A stack whose services ask these live Services, of user, trade and notification, for their role.
    pub(crate) async fn start_following(stores: &Stores, flags: &[&str], live: [String; 3]) -> Self {
        let market = stores.redis.url();
        let [user, trade, notification] = live
            .each_ref()
            .map(|live| [flags, &["--live-url", live]].concat());
        let trade = [&trade[..], &["--market-data-url", &market]].concat();
        let user = Service::start("user", &stores.database, &user);
        let trade = Service::start("trade", &stores.database, &trade);
        let notification = stores.notification(&notification);
        Self {
            user: user.ready().await,
            trade: trade.ready().await,
            notification: notification.ready().await,
        }
    }

    pub(crate) fn services(&self) -> [&Service; 3] {
        [&self.user, &self.trade, &self.notification]
    }

    pub(crate) fn services_mut(&mut self) -> [&mut Service; 3] {
        [&mut self.user, &mut self.trade, &mut self.notification]
    }

    /// The binary with the addresses of this stack.
    fn command(&self, command: &str, flags: &[&str]) -> Command {
        let mut process = Command::new(crate::servers::binary());
        process
            .args([command, "--user-url", &self.user.url("")])
            .args(["--trade-url", &self.trade.url("")])
            .args(["--notification-url", &self.notification.url("")])
            .args(flags)
            .env("EXCHANGE_LANE_SECRET", SECRET);
        process
    }

    /// Runs it.
    pub(crate) async fn run(&self, command: &str, flags: &[&str]) -> Output {
        let mut process = self.command(command, flags);
        tokio::task::spawn_blocking(move || process.output().unwrap())
            .await
            .unwrap()
    }
}

/// Fails if there is something in the logs that may not be there: secrets, tokens, addresses, passwords.
pub(crate) fn assert_discreet(services: &[&Service]) {
    for service in services {
        let log = service.log();
        assert!(log.lines().count() > 3, "{log}");
        for line in log.lines() {
            let entry: Value = serde_json::from_str(line).unwrap();
            let words = entry
                .as_object()
                .unwrap()
                .values()
                .filter_map(Value::as_str)
                .flat_map(|text| {
                    text.split(|character: char| !character.is_alphanumeric() && !"-_@.".contains(character))
                });
            for word in words {
                // Tokens, and the passwords of synthetic users, are longer than everything that has a name.
                let suspicious = word.contains('@')
                    || word.starts_with("eyJ")
                    || (word.len() >= 43 && !word.contains('.'))
                    || ["secret", "horse", "Bearer"].contains(&word);
                assert!(!suspicious, "{word} is in the log: {line}");
            }
            assert!(!line.contains(SECRET), "{line}");
        }
    }
}

/// Another command with the same program and environment.
fn like(command: &Command) -> Command {
    let mut other = Command::new(command.get_program());
    other.envs(
        command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    other
}

pub(crate) fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

const STANDBY: [&str; 8] = [
    "--colour",
    "green",
    "--revision",
    "abc",
    "--role",
    "follow",
    "--live-url",
    "http://127.0.0.1:1",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_smoke_test_passes_against_a_standby_stack_and_leaves_nothing_behind() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &STANDBY).await;
    let directory = temporary_directory("junit");
    let junit = directory.path().join("report.xml");
    let flags = [
        "--colour",
        "green",
        "--revision",
        "abc",
        "--junit",
        junit.to_str().unwrap(),
    ];
    let output = stack.run("smoke", &flags).await;
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output),
        stack.trade.log()
    );
    let report = std::fs::read_to_string(&junit).unwrap();
    assert!(
        report.contains("failures=\"0\"") && report.contains("both are notified"),
        "{report}"
    );

    let tables: Vec<(String,)> = sqlx::query_as(
        "select table_name::text from information_schema.columns
         where table_schema = 'public' and column_name = 'lane' and table_name <> 'schema_state'",
    )
    .fetch_all(&stores.owner)
    .await
    .unwrap();
    assert!(tables.len() > 8, "{tables:?}");
    assert_eq!(
        stores.count("select count(*) from inbox").await,
        0,
        "events of the lane are remembered"
    );
    assert_eq!(
        stores.count("select count(*) from rate_limits").await,
        0,
        "what the test has done counts against its address"
    );
    for (table,) in tables {
        let sql = sqlx::AssertSqlSafe(format!("select count(*) from {table} where lane like 'test-%'"));
        let (rows,): (i64,) = sqlx::query_as(sql).fetch_one(&stores.owner).await.unwrap();
        assert_eq!(rows, 0, "in {table}");
    }
    eventually("the other stores have forgotten the lane", || async {
        let stream = stores.nats.stream("exchange-test-green-abc").await?;
        let kept = stores
            .redis
            .dump()
            .await
            .iter()
            .any(|line| line.contains("test-green"));
        (stream["state"]["messages"] == 0 && !kept).then_some(())
    })
    .await;

    // Another stack answers than the one that should be tested.
    let output = stack
        .run("smoke", &["--colour", "green", "--revision", "def"])
        .await;
    assert!(!output.status.success());
    assert!(
        text(&output).contains("expected an answer of stack green-def"),
        "{}",
        text(&output)
    );
    // A part that does not work fails it: here nobody tells the users.
    stack.notification.signal("STOP");
    let output = stack
        .run("smoke", &["--colour", "green", "--revision", "abc"])
        .await;
    stack.notification.signal("CONT");
    assert!(!output.status.success(), "{}", text(&output));
    assert_discreet(&stack.services());
}

const IN_TEST_LANES: &str = "select count(*) from users where lane like 'test-%'";

#[tokio::test(flavor = "multi_thread")]
async fn a_smoke_test_goes_on_until_its_lane_is_erased() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &STANDBY).await;
    // As while the database changes its host. A sequence does not go back with its transaction.
    sqlx::raw_sql(
        "create sequence attempts;
         create function not_now() returns trigger language plpgsql as $$
         begin
             if nextval('attempts') <= 2 then raise exception 'not now' using errcode = 'cannot_connect_now'; end if;
             return null;
         end $$;
         create trigger not_now before delete on users for each statement execute function not_now()",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    let output = stack.run("smoke", &STANDBY[..4]).await;
    let report = text(&output);
    assert!(output.status.success(), "{report}");
    assert_eq!(
        report.matches("the lane is not erased yet").count(),
        1,
        "{report}"
    );
    assert_eq!(
        stores.count("select last_value from attempts").await,
        3,
        "{report}"
    );
    assert_eq!(stores.count(IN_TEST_LANES).await, 0, "{report}");
}

/// The node is drained, or the Job's time is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_smoke_test_that_is_told_to_end_has_failed_and_erases_its_lane() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &STANDBY).await;
    // Nobody is told anything, and the test waits for it.
    sqlx::raw_sql(
        "create function mute() returns trigger language plpgsql as 'begin return null; end';
         create trigger mute before insert on notifications for each row execute function mute()",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    let mut smoke = stack.command("smoke", &STANDBY[..4]);
    let smoke = smoke
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("it has traded", || async {
        let traded = stores
            .count("select count(*) from trades where lane like 'test-%'")
            .await
            > 0;
        traded.then_some(())
    })
    .await;
    let told = Command::new("kill")
        .args(["-TERM", &smoke.id().to_string()])
        .status();
    assert!(told.unwrap().success());
    let output = tokio::task::spawn_blocking(move || smoke.wait_with_output().unwrap())
        .await
        .unwrap();
    let report = text(&output);
    // Not by the signal, which would have no code.
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert!(
        report.contains("a signal came before") && !report.contains("both are notified"),
        "{report}"
    );
    assert_eq!(stores.count(IN_TEST_LANES).await, 0, "{report}");
}

/// The value of a metric; 0 if it has not been counted yet.
async fn metric(service: &Service, name: &str) -> f64 {
    let page = service.admin("/metrics").await.text().await.unwrap();
    let family = name.split('{').next().unwrap();
    assert!(page.contains(family), "no {family} in {page}");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "a story")]
async fn what_happens_is_counted_and_belongs_to_its_trace() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &["--role", "live"]).await;
    let issuer = Issuer::new(&stores.database).await;
    let treasury = issuer.caller(&stack.trade, &["treasury"]).await;
    let ann = issuer
        .trader(&stack.trade)
        .await
        .wallet(&treasury, "10", "10000")
        .await;
    let bob = issuer
        .trader(&stack.trade)
        .await
        .wallet(&treasury, "10", "10000")
        .await;
    ann.place("sell", "1", "100").await;

    let trace = "0af7651916cd43dd8448eb211c80319c";
    // Every way into the outbox.
    let requests = [
        ("/trade/add", bob.order("buy", "1", "100"), "trade.executed"),
        (
            "/account/withdraw",
            json!({"account_id": bob.usd, "amount": "1"}),
            "transfer.posted",
        ),
        (
            "/account/add",
            json!({"currency": "USD", "name": "more"}),
            "account.changed",
        ),
    ];
    for (path, body, _) in &requests {
        let request = stack
            .trade
            .client
            .post(stack.trade.url(path))
            .bearer_auth(bob.trader.token())
            .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
            .header("tracestate", format!("vendor={path}"));
        let request = if *path == "/account/withdraw" {
            request.header("idempotency-key", "traced")
        } else {
            request
        };
        assert_eq!(request.json(body).send().await.unwrap().status(), 201, "{path}");
    }
    let refused = bob
        .trader
        .post("/trade/add", &bob.order("buy", "1", "999999"))
        .await;
    assert_eq!(refused.status(), 409);
    // What is refused before the database is asked is refused as well; and what is no order.
    let mut invalid = bob.order("buy", "1", "100");
    invalid["order_type"] = json!("market");
    assert_eq!(bob.trader.post("/trade/add", &invalid).await.status(), 422);
    invalid["order_type"] = json!("stop");
    assert_eq!(bob.trader.post("/trade/add", &invalid).await.status(), 422);
    let unknown = json!({"order_id": Uuid::now_v7()});
    assert_eq!(bob.trader.post("/trade/cancel", &unknown).await.status(), 404);
    let much = json!({"account_id": bob.usd, "amount": "1000000"});
    let withdrawn = bob.trader.post_with_key("/account/withdraw", "much", &much).await;
    assert_eq!(withdrawn.status(), 409);
    stores.settled("live").await;

    let stream = stores
        .nats
        .jetstream()
        .await
        .get_stream("exchange-live")
        .await
        .unwrap();
    for (path, _, topic) in &requests {
        let subject = format!("exchange.live.{topic}");
        let message = stream.get_last_raw_message_by_subject(&subject).await.unwrap();
        let header = |name: &str| message.headers.get(name).unwrap().as_str().to_owned();
        let parent = header("traceparent");
        assert!(parent.starts_with(&format!("00-{trace}-")), "{parent}");
        assert!(
            !parent.contains("b7ad6b7169203331"),
            "the span is the sender's: {parent}"
        );
        assert_eq!(header("tracestate"), format!("vendor={path}"));
    }

    let route = r#"method="POST",route="/trade/add",lane="live""#;
    let problems = |route: &str, code: &str| {
        format!(r#"http_server_problems_total{{method="POST",route="{route}",lane="live",code="{code}"}}"#)
    };
    for (name, least) in [
        (
            format!(r#"http_server_requests_total{{{route},status="201"}}"#),
            2.0,
        ),
        (
            format!(r#"http_server_requests_total{{{route},status="409"}}"#),
            1.0,
        ),
        (
            format!("http_server_request_duration_seconds_count{{{route}}}"),
            2.0,
        ),
        (r#"orders_total{outcome="accepted"}"#.to_owned(), 2.0),
        (r#"orders_total{outcome="insufficient_funds"}"#.to_owned(), 1.0),
        (r#"orders_total{outcome="invalid_field"}"#.to_owned(), 2.0),
        (problems("/trade/add", "insufficient_funds"), 1.0),
        (problems("/trade/cancel", "order_not_found"), 1.0),
        (problems("/account/withdraw", "insufficient_funds"), 1.0),
        ("trades_total".to_owned(), 1.0),
        ("order_batch_size_count".to_owned(), 3.0),
        ("db_pool_connections".to_owned(), 1.0),
        ("stack_live".to_owned(), 1.0),
    ] {
        let value = metric(&stack.trade, &name).await;
        assert!(value >= least, "{name} is {value}");
    }
    eventually("the ledger has been audited", || async {
        let page = stack.trade.admin("/metrics").await.text().await.unwrap();
        page.contains("\nledger_audited_timestamp_seconds ").then_some(())
    })
    .await;
    assert!(metric(&stack.trade, "ledger_audited_timestamp_seconds").await > 1.7e9);
    assert!(metric(&stack.trade, "ledger_imbalance").await < 1.0);
    metric(&stack.trade, "db_pool_idle").await;
    let notification = &stack.notification;
    // A moment after it has happened.
    for (name, least) in [("messages_published_total", 1.0), ("messages_handled_total", 2.0)] {
        eventually(&format!("{name} is {least}"), || async {
            (metric(notification, name).await >= least).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_and_what_comes_again_is_counted() {
    let stores = Stores::start().await;
    let notification = &stores.notification(&["--role", "live"]).ready().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    eventually("it has been measured for the first time", || async {
        let page = notification.admin("/metrics").await.text().await.unwrap();
        page.contains("\noutbox_age_seconds ").then_some(())
    })
    .await;
    let waiting = async |so: fn(depth: f64, age: f64) -> bool| {
        eventually("the outbox has been measured", || async {
            let depth = metric(notification, "outbox_depth").await;
            let age = metric(notification, "outbox_age_seconds").await;
            so(depth, age).then_some(())
        })
        .await;
    };
    waiting(|depth, age| depth < 1.0 && age <= 0.0).await;
    // What is published cannot be consumed, so it waits, and is counted when it comes again.
    let mut blocker = stores.owner.begin().await.unwrap();
    sqlx::query("lock table inbox in share mode")
        .execute(&mut *blocker)
        .await
        .unwrap();
    stores.trade("live", ann, bob, 50, "1").await;
    waiting(|depth, age| depth >= 1.0 && age >= 1.0).await;
    blocker.rollback().await.unwrap();
    stores.settled("live").await;
    waiting(|depth, age| depth < 1.0 && age <= 0.0).await;
    let duplicates = metric(notification, "messages_duplicates_total").await;
    let jetstream = stores.nats.jetstream().await;
    jetstream
        .delete_consumer_from_stream("market", "exchange-live")
        .await
        .unwrap();
    eventually("what comes again is counted", || async {
        (metric(notification, "messages_duplicates_total").await > duplicates).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_test_finds_nothing_wrong_and_something_when_there_is() {
    let stores = Stores::start().await;
    let flags = ["--colour", "green", "--revision", "abc", "--role", "live"];
    let stack = Stack::start(&stores, &flags).await;
    let directory = temporary_directory("load");
    let json = directory.path().join("load.json");
    let flags = [
        "--lane",
        "test-green-abc.load",
        "--rate",
        "60",
        "--duration",
        "10s",
        "--connections",
        "4",
        "--idle-connections",
        "1",
        "--slow-percent",
        "2",
        "--traders",
        "4",
        "--database-url",
        &stores.database.owner_url,
        "--json",
        json.to_str().unwrap(),
    ];
    let output = stack.run("load", &flags).await;
    assert!(output.status.success(), "{}", text(&output));
    let result: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(result["summary"]["requests"], 600, "{result:#}");
    assert_eq!(result["summary"]["failed"], 0, "{result:#}");
    assert_eq!(result["audit"]["ledger_checked"], true);
    assert!(result["audit"]["trades"].as_u64().unwrap() > 100, "{result:#}");
    assert_eq!(
        result["summary"]["stacks"]["green-abc"]["answers"], 600,
        "{result:#}"
    );
    for protocol in ["http/1.1", "http/2"] {
        assert!(
            result["summary"]["latency"][protocol]["count"].as_u64().unwrap() > 50,
            "{result:#}"
        );
    }

    // A service that stops for two seconds cannot hide it from requests that were meant to be sent meanwhile.
    let flags = [
        "--lane",
        "test-green-abc.load2",
        "--rate",
        "60",
        "--duration",
        "6s",
        "--connections",
        "2",
        "--idle-connections",
        "0",
        "--traders",
        "2",
        "--no-ledger",
        "--json",
        json.to_str().unwrap(),
    ];
    let running = stack.run("load", &flags);
    let stopping = async {
        eventually("orders come in", || async {
            (stores
                .count("select count(*) from orders where lane = 'test-green-abc.load2'")
                .await
                > 50)
                .then_some(())
        })
        .await;
        stack.trade.signal("STOP");
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        stack.trade.signal("CONT");
    };
    let (output, ()) = tokio::join!(running, stopping);
    assert!(output.status.success(), "{}", text(&output));
    let result: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(result["audit"]["ledger_checked"], false);
    assert!(
        result["summary"]["latency"]["order"]["p90"].as_f64().unwrap() > 500.0,
        "{result:#}"
    );
    assert_discreet(&stack.services());
}

/// What an order that is executed twice would leave behind: a trade of its trader that no answer tells of. That others trade
/// with the load's traders is no such thing.
#[tokio::test(flavor = "multi_thread")]
async fn the_load_test_finds_a_trade_that_nobody_was_told_of() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &["--role", "live"]).await;
    let issuer = Issuer::new(&stores.database).await;
    let bank = issuer.caller(&stack.trade, &["treasury"]).await;
    let stranger = async || {
        let stranger = issuer.trader(&stack.trade).await;
        stranger.wallet(&bank, "10", "1000000").await
    };
    let (seller, buyer) = (stranger().await, stranger().await);
    let (mut flags, _treasury) = treasury(&stores, &stack.user).await;
    flags.extend(["--rate", "30", "--duration", "8s", "--traders", "2"].map(str::to_owned));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let meanwhile = async {
        let (user, base, quote): (Uuid, Uuid, Uuid) = eventually("orders come in", || async {
            sqlx::query_as("select user_id, base_account_id, quote_account_id from orders limit 1")
                .fetch_optional(&stores.owner)
                .await
                .unwrap()
        })
        .await;
        seller.place("sell", "0.001", "19000").await;
        // Better than all that the load bids: its orders come to this one, and so does the one that it does not know of.
        let bid = buyer.place("buy", "1", "30000").await;
        assert_eq!(bid["status"], "open", "{bid}");
        let token = issuer.token(user, Lane::live(), &[]).await;
        let twin = Wallet {
            trader: Trader::new(&stack.trade, token),
            btc: base.to_string(),
            usd: quote.to_string(),
        };
        twin.place("sell", "0.0001", "30000").await
    };
    let (output, executed) = tokio::join!(stack.run("load", &flags), meanwhile);
    let said = text(&output);
    assert!(
        !output.status.success() && said.contains(", 1 findings"),
        "{said}"
    );
    let (trade, order) = (&executed["trades"][0]["trade_id"], &executed["order_id"]);
    let (trade, order) = (trade.as_str().unwrap(), order.as_str().unwrap());
    let findings: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("never acknowledged"))
        .collect();
    assert_eq!(findings.len(), 1, "{said}");
    assert!(
        findings[0].contains(trade) && findings[0].contains(order),
        "{said}"
    );
}

/// As a database would leave it that has forgotten what it had acknowledged, and a service that tells everybody twice.
#[tokio::test(flavor = "multi_thread")]
async fn the_load_test_finds_what_only_the_database_knows() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &["--role", "live"]).await;
    let (mut flags, _treasury) = treasury(&stores, &stack.user).await;
    flags.extend(["--rate", "30", "--duration", "6s", "--traders", "2"].map(str::to_owned));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let meanwhile = async {
        let mut owner = stores.owner.acquire().await.unwrap();
        let (order, user): (Uuid, Uuid) = eventually("an order is filled", || async {
            sqlx::query_as("select id, user_id from orders where status = 'filled' limit 1")
                .fetch_optional(&stores.owner)
                .await
                .unwrap()
        })
        .await;
        for damage in [
            "set session_replication_role = replica".to_owned(),
            format!("delete from orders where id = '{order}'"),
            format!(
                "insert into notifications (user_id, seq, lane, kind, title, data)
                 select '{user}', -n, 'live', 'release', 'twice', '{{\"revision\": \"abc\"}}'
                 from generate_series(1, 2) as n"
            ),
            "reset session_replication_role".to_owned(),
        ] {
            sqlx::query(sqlx::AssertSqlSafe(damage))
                .execute(&mut *owner)
                .await
                .unwrap();
        }
        (order, user)
    };
    let (output, (order, user)) = tokio::join!(stack.run("load", &flags), meanwhile);
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    for finding in [
        format!("order was acknowledged and is gone: {order}"),
        format!("user was told of a release more than once: {user}"),
    ] {
        assert!(said.contains(&finding), "{finding}: {said}");
    }
}

/// An audit that cannot be made takes nothing along of what the load has seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_test_tells_what_it_knows_and_does_not_call_it_ok() {
    let stores = Stores::start().await;
    let flags = ["--colour", "green", "--revision", "abc", "--role", "live"];
    let stack = Stack::start(&stores, &flags).await;
    let directory = temporary_directory("load");
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (json, records) = (file("load.json"), file("load.jsonl"));
    let lane = ["--lane", "test-green-abc.load"];
    let amount = ["--rate", "40", "--duration", "1s", "--traders", "2"];
    let refused = stack.run("load", &[&lane[..], &amount].concat()).await;
    assert!(!refused.status.success());
    let said = text(&refused);
    assert!(
        said.contains("--database-url") && said.contains("--no-ledger"),
        "{said}"
    );

    // Nobody there knows of notifications.
    let user = stack.user.url("");
    let mut load = Command::new(crate::servers::binary());
    load.args(["load", "--user-url", &user, "--trade-url", &stack.trade.url("")])
        .args(["--notification-url", &user, "--streams", "0"])
        .args(["--database-url", &stores.database.owner_url])
        .args(["--json", &json, "--records", &records])
        .args(lane)
        .args(amount)
        .env("EXCHANGE_LANE_SECRET", SECRET);
    let output = tokio::task::spawn_blocking(move || load.output().unwrap())
        .await
        .unwrap();
    let said = text(&output);
    assert!(!output.status.success() && said.contains("FAILED"), "{said}");
    let result: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let finding = result["audit"]["findings"][0].as_str().unwrap();
    assert!(
        finding.starts_with("the audit could not be completed: ") && finding.contains("404"),
        "{finding}"
    );
    assert!(said.contains(finding), "{said}");
    assert_eq!(result["ok"], false);
    assert_eq!(result["summary"]["requests"], 40, "{result:#}");
    assert_eq!(std::fs::read_to_string(&records).unwrap().lines().count(), 40);
}

/// Who has registered as many as may be waits until more may be.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_test_waits_for_its_registrations() {
    let stores = Stores::start().await;
    let stack = Stack::start(&stores, &["--role", "live", "--login-attempts-per-address", "3"]).await;
    let (mut flags, _treasury) = treasury(&stores, &stack.user).await;
    flags.extend(["--rate", "20", "--duration", "1s", "--traders", "3"].map(str::to_owned));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    // As many have registered as may, almost fifteen minutes ago.
    let registered = sqlx::query(
        "update rate_limits set attempts = 3, window_ends_at = now() + interval '30 seconds'
         where key in (sha256('register:127.0.0.1'), sha256('counted register:127.0.0.1'))",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    assert_eq!(registered.rows_affected(), 2);
    let output = stack.run("load", &flags).await;
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("0 of 3 traders are registered; the user service takes more in"),
        "{said}"
    );
}
