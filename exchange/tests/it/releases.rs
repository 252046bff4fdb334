//! Version 2 beside version 1 and after it, and the releases with faults.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use exchange::{lane::Lane, migrate::read_state, release};
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    servers::{
        Database, FAULTY, LEFT_BY, Postgres, SERVICES, Service, V1, V2, client, eventually,
        temporary_directory,
    },
    stores::Stores,
    traders::{Issuer, Trader, accept, assert_clean},
    user,
    whole::{Stack, text},
};

const BLUE: [&str; 6] = ["--colour", "blue", "--revision", "one", "--role", "live"];
const GREEN: [&str; 6] = ["--colour", "green", "--revision", "two", "--role", "live"];

/// Tests of the API, which must hold for every version on every schema that it may meet.
const API_TESTS: [&str; 4] = ["api::", "trade::", "user::", "streams::"];

/// Runs the API tests once more, in a process of its own, with these services on the schema and the rows that that version has
/// left, and with its messages still to be published.
async fn run_api_tests(services: &'static str, left_by: &'static str) {
    let tests = std::env::current_exe().unwrap();
    let run = tokio::task::spawn_blocking(move || {
        Command::new(tests)
            .args(API_TESTS)
            .args(["--test-threads", "2"])
            .env(SERVICES, services)
            .env(LEFT_BY, left_by)
            .output()
            .unwrap()
    });
    let output = run.await.unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("test trade::") && !said.contains(" 0 passed"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_passes_its_api_tests_on_what_version_2_has_left() {
    run_api_tests(V1, V2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_2_passes_the_api_tests_of_version_1() {
    run_api_tests(V2, V2).await;
}

/// Has users do a bit of everything with the services of a version, and nobody there who would publish what comes of it.
pub(crate) async fn trade_under(binary: &str, database: &Database) {
    let start = |service| Service::start_by(&mut Command::new(binary), service, database, &GREEN).ready();
    let users = user::Exchange {
        database: database.clone(),
        service: start("user").await,
    };
    let trade = start("trade").await;
    let treasury = Issuer::new(database).await.caller(&trade, &["treasury"]).await;
    let trader = async |email| Trader::new(&trade, users.user(email).await.access_token);
    let buyer = trader("earlier-buyer@example.org").await;
    let buyer = buyer.wallet(&treasury, "0", "1000").await;
    let seller = trader("earlier-seller@example.org").await;
    let seller = seller.wallet(&treasury, "5", "0").await;
    seller.place("sell", "2", "100").await;
    assert_eq!(buyer.place("buy", "2", "100").await["status"], "filled");
    // It rests where no test looks for an empty book.
    let mut resting = buyer.order("buy", "1", "20");
    resting["product"] = json!("SOL-USD");
    resting["base_account_id"] = json!(buyer.trader.account("SOL").await);
    let resting = accept(
        buyer.trader.post("/trade/add", &resting).await,
        StatusCode::CREATED,
    )
    .await;
    assert_eq!(resting["status"], "open");
    set_state(&seller.trader, &seller.usd, "frozen").await;
    let waiting = count(&database.owner().await, "select count(*) from outbox").await;
    assert!(waiting >= 10, "{waiting} messages wait to be published");
}

/// Accounts as version 1 has left them, one in two of them frozen; the users do not matter.
async fn accounts_of_version_1(owner: &PgPool, number: i32) {
    sqlx::query(
        "insert into accounts (id, lane, user_id, currency, name, state, updated_at)
         select gen_random_uuid(), 'live', gen_random_uuid(), 'USD', 'old', (array['active', 'frozen'])[1 + n % 2],
                now() - n * interval '1 second'
         from generate_series(1, $1) as n",
    )
    .bind(number)
    .execute(owner)
    .await
    .unwrap();
}

/// Accounts whose state is not what their freezes say.
async fn contradictions(owner: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select count(*) from accounts left join freezes on account_id = accounts.id and lifted_at is null
         where (state = 'frozen') <> (account_id is not null)",
    )
    .fetch_one(owner)
    .await
    .unwrap()
}

async fn count(owner: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(owner).await.unwrap()
}

/// Sets an account's state, and returns the account.
async fn set_state(trader: &Trader, account: &str, state: &str) -> Value {
    let change = json!({"account_id": account, "state": state});
    accept(trader.post("/account/update", &change).await, StatusCode::OK).await
}

/// The only account of a trader.
async fn only_account(trader: &Trader) -> Value {
    trader.get("/account/list").await["accounts"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_version_migrates_to_its_own_level() {
    let database = Postgres::shared().database().await;
    let level = async || read_state(&database.owner().await).await.unwrap().expanded;
    for (binary, release) in [(V1, release::V1), (V2, release::V2)] {
        assert!(database.migrate_by(binary, "expand", &[]).0);
        assert_eq!(level().await, release.level);
        let version = Command::new(binary).arg("--version").output().unwrap();
        assert_eq!(text(&version).trim(), format!("exchange {}", release.version));
    }
    // Coming later, version 1 has nothing to do, and nothing against that.
    let (succeeded, output) = database.migrate_by(V1, "expand", &[]);
    assert!(succeeded && !output.contains("batch"), "{output}");
    assert_eq!(level().await, release::V2.level);
}

/// What version 1 says when version 2 has contracted the schema.
const TOO_OLD: &str = "the schema is contracted for 20 and later, this build is 10";

/// The whole life of a release: expand under load, both at work, back to the old, forward again, contract.
#[tokio::test(flavor = "multi_thread")]
async fn version_2_comes_under_load_beside_version_1_and_replaces_it() {
    let stores = Stores::beside(Database::migrated_by(V1, Postgres::shared()).await).await;
    accounts_of_version_1(&stores.owner, 4000).await;
    let one = Stack::start_by(&mut Command::new(V1), &stores, &BLUE).await;

    let directory = temporary_directory("expand");
    let json = directory.path().join("load.json");
    let lane = ["--lane", "test-blue-one.load", "--json", json.to_str().unwrap()];
    let ledger = ["--database-url", &stores.database.owner_url];
    let amount = ["--rate", "60", "--duration", "8s", "--connections", "3"];
    let users = ["--traders", "4", "--idle-connections", "0", "--slow-percent", "1"];
    let flags = [&lane[..], &ledger, &amount, &users].concat();
    let expanding = async {
        eventually("orders come in", || async {
            (count(&stores.owner, "select count(*) from orders").await > 50).then_some(())
        })
        .await;
        let database = stores.database.clone();
        let expand = tokio::task::spawn_blocking(move || database.migrate_by(V2, "expand", &[]));
        expand.await.unwrap()
    };
    let (loaded, (expanded, said)) = tokio::join!(one.run("load", &flags), expanding);
    assert!(expanded && said.contains("expand 0020 (freezes)"), "{said}");
    assert!(loaded.status.success(), "{}", text(&loaded));
    let result: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(result["summary"]["failed"], 0, "{result:#}");
    let backfilled =
        "select count(*) from freezes f join accounts a on a.id = account_id and frozen_at = a.updated_at";
    assert_eq!(count(&stores.owner, backfilled).await, 2000);
    assert_eq!(contradictions(&stores.owner).await, 0);

    // Side by side: each understands what the other does.
    let two = Stack::start_by(&mut Command::new(V2), &stores, &GREEN).await;
    let issuer = Issuer::new(&stores.database).await;
    let token = issuer.token(Uuid::now_v7(), Lane::live(), &[]).await;
    let old = Trader::new(&one.trade, token.clone());
    let new = Trader::new(&two.trade, token.clone());
    let account = old.account("USD").await;
    assert_eq!(
        set_state(&old, &account, "frozen").await["frozen_at"],
        Value::Null
    );
    let since = only_account(&new).await["frozen_at"].clone();
    assert!(since.is_string(), "{since}");
    // To freeze it again does not make it frozen later.
    assert_eq!(set_state(&new, &account, "frozen").await["frozen_at"], since);
    assert_eq!(set_state(&new, &account, "active").await["state"], "active");
    assert_eq!(only_account(&old).await["state"], "active");
    assert!(set_state(&new, &account, "frozen").await["frozen_at"].is_string());
    assert_eq!(only_account(&old).await["state"], "frozen");
    set_state(&old, &account, "active").await;
    assert_eq!(only_account(&new).await["frozen_at"], Value::Null);
    assert_eq!(contradictions(&stores.owner).await, 0);

    // While version 1 runs there is no contract; and back to it is a start like any other.
    let (contracted, said) = stores.database.migrate_by(V2, "contract", &["--deadline=1s"]);
    assert!(!contracted && said.contains("trade of blue-one"), "{said}");
    drop((one, two));
    let again = Service::start_by(&mut Command::new(V1), "trade", &stores.database, &BLUE)
        .ready()
        .await;
    set_state(&Trader::new(&again, token.clone()), &account, "frozen").await;

    // A killed process leaves no farewell, and counts as running until it has been silent for long enough.
    let forget = "update instances set seen_at = now() - interval '1 hour'";
    drop(again);
    sqlx::query(forget).execute(&stores.owner).await.unwrap();
    let leftover = Service::start_by(&mut Command::new(V1), "trade", &stores.database, &BLUE)
        .ready()
        .await;
    leftover.signal("STOP");
    sqlx::query(forget).execute(&stores.owner).await.unwrap();
    let (contracted, said) = stores.database.migrate_by(V2, "contract", &["--deadline=1m"]);
    assert!(contracted, "{said}");
    leftover.signal("CONT");
    let newcomer = Service::start_by(&mut Command::new(V1), "trade", &stores.database, &BLUE);
    for left_behind in [&leftover, &newcomer] {
        eventually("version 1 knows that it is too old", || async {
            let answer = left_behind.admin("/readyz").await;
            let refused = answer.status() == 503;
            let said = answer.text().await.unwrap();
            (refused && said == TOO_OLD).then_some(())
        })
        .await;
    }
    // Its expand says so before any of its pods is started.
    let (expanded, said) = stores.database.migrate("expand", &[]);
    assert!(!expanded && said.contains(TOO_OLD), "{said}");
    // It had better be: what it would write is refused.
    let change = json!({"account_id": account, "state": "active"});
    let refused = Trader::new(&leftover, token.clone())
        .post("/account/update", &change)
        .await;
    assert_eq!(refused.status(), 500);
    let two = Service::start_by(&mut Command::new(V2), "trade", &stores.database, &GREEN)
        .ready()
        .await;
    let new = Trader::new(&two, token);
    assert!(only_account(&new).await["frozen_at"].is_string());
    assert_eq!(set_state(&new, &account, "active").await["state"], "active");
    assert!(set_state(&new, &account, "frozen").await["frozen_at"].is_string());
    assert_eq!(contradictions(&stores.owner).await, 0);
    assert_clean(&stores.owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_backfill_goes_on_and_misses_nobody_who_thaws_or_freezes_meanwhile() {
    let database = Database::migrated_by(V1, Postgres::shared()).await;
    let owner = database.owner().await;
    accounts_of_version_1(&owner, 40_000).await;
    // However late it is killed: it does not get past an account in the middle.
    let mut busy = owner.begin().await.unwrap();
    sqlx::query(
        "select from accounts where id = (select id from accounts where state = 'frozen' order by id offset 10000 limit 1)
         for update",
    )
    .execute(&mut *busy)
    .await
    .unwrap();
    let mut migration = Command::new(V2)
        .args([
            "migrate",
            "--phase",
            "expand",
            "--database-url",
            &database.owner_url,
        ])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let freezes = || count(&owner, "select count(*) from freezes");
    eventually("the backfill is under way", || async {
        let begun = count(&owner, "select count(*) from pg_class where relname = 'freezes'").await == 1;
        (begun && freezes().await >= 1000).then_some(())
    })
    .await;
    migration.kill().unwrap();
    migration.wait().unwrap();
    busy.rollback().await.unwrap();
    assert!(freezes().await < 20_000, "it was over before it was killed");
    assert_eq!(read_state(&owner).await.unwrap().expanded, release::V1.level);
    // Version 2 does not start on half of it.
    let early = Service::start_by(&mut Command::new(V2), "trade", &database, &GREEN);
    assert_eq!(early.admin("/readyz").await.status(), 503);

    // Version 1 thaws accounts of both halves, and freezes others.
    sqlx::query("update accounts set state = case state when 'frozen' then 'active' else 'frozen' end where ctid < '(100,0)'")
        .execute(&owner)
        .await
        .unwrap();
    let (succeeded, said) = database.migrate_by(V2, "expand", &[]);
    assert!(succeeded && !said.contains("batch 1 of"), "{said}");
    assert_eq!(contradictions(&owner).await, 0);
    assert_eq!(read_state(&owner).await.unwrap().expanded, release::V2.level);
    early.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_reads_the_rows_and_the_backlog_that_version_2_has_written() {
    let stores = Stores::beside(Database::migrated_by(V2, Postgres::shared()).await).await;
    let two = Stack::start_by(&mut Command::new(V2), &stores, &GREEN).await;
    // What is published cannot be consumed.
    let mut blocker = stores.owner.begin().await.unwrap();
    sqlx::query("lock table inbox in share mode")
        .execute(&mut *blocker)
        .await
        .unwrap();
    let issuer = Issuer::new(&stores.database).await;
    let treasury = issuer.caller(&two.trade, &["treasury"]).await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let [buyer, seller] = [
        issuer.token(ann, Lane::live(), &[]).await,
        issuer.token(bob, Lane::live(), &[]).await,
    ];
    let wallet = Trader::new(&two.trade, buyer.clone())
        .wallet(&treasury, "0", "1000")
        .await;
    let other = Trader::new(&two.trade, seller.clone())
        .wallet(&treasury, "5", "0")
        .await;
    other.place("sell", "2", "100").await;
    wallet.place("buy", "1", "100").await;
    set_state(&other.trader, &other.usd, "frozen").await;
    let written = count(&stores.owner, "select count(*) from outbox").await;
    eventually("all of it is in the queue", || async {
        let stream = stores.nats.stream("exchange-live").await?;
        (stream["state"]["messages"].as_i64() == Some(written)).then_some(())
    })
    .await;
    two.notification.signal("KILL");
    blocker.rollback().await.unwrap();
    drop(two);

    let one = Stack::start_by(&mut Command::new(V1), &stores, &BLUE).await;
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    assert_eq!(count(&stores.owner, "select count(*) from dead_letters").await, 0);
    let told = one
        .notification
        .client
        .get(one.notification.url("/notifications"))
        .bearer_auth(&seller);
    let told: Value = told.send().await.unwrap().json().await.unwrap();
    assert!(
        told["notifications"]
            .as_array()
            .unwrap()
            .iter()
            .any(|notification| notification["title"] == "USD account main was frozen"),
        "{told}"
    );
    // The order that rests is met, and the account is as frozen as it was.
    let wallet = crate::traders::Wallet {
        trader: Trader::new(&one.trade, buyer),
        ..wallet
    };
    assert_eq!(wallet.place("buy", "1", "100").await["status"], "filled");
    let refused = Trader::new(&one.trade, seller)
        .post("/trade/add", &other.order("sell", "1", "100"))
        .await;
    assert_eq!(
        accept(refused, StatusCode::CONFLICT).await["code"],
        "account_frozen"
    );
    assert_clean(&stores.owner, "live").await;
}

fn faulty(fault: &str) -> Command {
    let mut command = Command::new(FAULTY);
    command.env("EXCHANGE_FAULT", fault);
    command
}

const SMOKE: [&str; 4] = ["--colour", "green", "--revision", "two"];

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_fails_its_smoke_test() {
    let stores = Stores::beside(Database::migrated_by(V2, Postgres::shared()).await).await;
    let stack = Stack::start_by(&mut faulty("fails-smoke"), &stores, &GREEN).await;
    let stack_says: Value = stack.trade.admin("/stack").await.json().await.unwrap();
    assert_eq!(stack_says["version"], "2.0.1-fails-smoke");
    let output = stack.run("smoke", &SMOKE).await;
    assert!(
        !output.status.success() && text(&output).contains("got 500"),
        "{}",
        text(&output)
    );
    assert!(text(&output).contains("place an order"), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_passes_its_smoke_test_and_fails_real_users() {
    let stores = Stores::beside(Database::migrated_by(V2, Postgres::shared()).await).await;
    let stack = Stack::start_by(&mut faulty("fails-verification"), &stores, &GREEN).await;
    let output = stack.run("smoke", &SMOKE).await;
    assert!(output.status.success(), "{}", text(&output));
    let issuer = Issuer::new(&stores.database).await;
    let trader = issuer.trader(&stack.trade).await;
    let mut failed = 0;
    for _ in 0..100 {
        failed += usize::from(trader.try_get("/account/list").await.status() == 500);
    }
    assert_eq!(failed, 10);
    let page = stack.trade.admin("/metrics").await.text().await.unwrap();
    assert!(
        page.contains(
            r#"http_server_requests_total{method="GET",route="/account/list",lane="live",status="500"} 10"#
        ),
        "{page}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_is_slow_for_some_real_users() {
    let database = Database::migrated_by(V2, Postgres::shared()).await;
    let service = Service::start_by(&mut faulty("slows-down"), "trade", &database, &GREEN)
        .ready()
        .await;
    let trader = Issuer::new(&database).await.trader(&service).await;
    let mut took = Vec::new();
    for _ in 0..10 {
        let start = Instant::now();
        assert_eq!(trader.try_get("/account/list").await.status(), 200);
        took.push(start.elapsed());
    }
    // One in ten, and not the others: of those a busy machine may have held up some.
    let slow = Duration::from_secs(2);
    assert!(
        took[9] >= slow && took[..9].iter().any(|took| *took < slow),
        "{took:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_crashes_and_one_that_never_gets_ready() {
    let database = Database::migrated_by(V2, Postgres::shared()).await;
    let mut crashing = Service::start_by(&mut faulty("crashes"), "user", &database, &GREEN)
        .ready()
        .await;
    crashing.client = client();
    let ended = eventually("it crashes", || std::future::ready(crashing.ended())).await;
    assert_eq!(ended.code(), Some(70));

    let waiting = Service::start_by(&mut faulty("never-ready"), "user", &database, &GREEN);
    eventually("it says what it misses", || async {
        let answer = waiting.admin("/readyz").await;
        let refused = answer.status() == 503;
        let said = answer.text().await.unwrap();
        (refused && said == "the schema is expanded to 20, this build needs 9999").then_some(())
    })
    .await;
}

#[test]
fn no_release_has_the_faults() {
    let mentions = |binary: &str| {
        let code = std::fs::read(binary).unwrap();
        code.windows(14).any(|window| window == b"EXCHANGE_FAULT")
    };
    assert!(mentions(FAULTY));
    assert!(!mentions(V1) && !mentions(V2));
    let unknown = Command::new(FAULTY).arg("--version").output().unwrap();
    assert!(!unknown.status.success() && text(&unknown).contains("is not a fault"));
}
