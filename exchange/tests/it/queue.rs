//! Events reach users and the market data once, whatever breaks on the way.

use std::{collections::BTreeMap, time::Duration};

use exchange::market::Interval;
use futures::StreamExt as _;
use redis::AsyncCommands as _;
use rust_decimal::Decimal;
use serde_json::{Value, json};
use time::{OffsetDateTime, Time};
use uuid::Uuid;

use crate::{
    servers::{Service, eventually},
    stores::{Nats, QUIET, Stores},
    traders::{assert_erased, begin_to_erase},
};

/// A stack that has never been live, because its live Service cannot be reached.
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
const LIVE: [&str; 2] = ["--role", "live"];

/// The value of a metric.
pub(crate) async fn metric(service: &Service, name: &str) -> u64 {
    let page = service.admin("/metrics").await.text().await.unwrap();
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")))
        .map(str::to_owned);
    line.unwrap_or_else(|| panic!("no {name} in {page}"))
        .parse()
        .unwrap()
}

/// Waits until so much has been counted: a moment after it has happened.
async fn counted(service: &Service, name: &str, least: u64) {
    eventually(&format!("{name} is {least}"), || async {
        (metric(service, name).await >= least).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trade_is_told_to_both_sides_and_to_the_market() {
    let stores = Stores::start().await;
    let service = stores.notification(&LIVE).ready().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let minute = OffsetDateTime::now_utc().replace_second(0).unwrap();
    for (second, price) in (0..).zip([100, 120, 90]) {
        let at = minute + Duration::from_secs(second);
        stores.trade_at(at, "live", ann, bob, price, "0.5").await;
    }
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    let dump = stores.redis.dump().await.join("\n");
    let candle =
        r#""open":"100","high":"120","low":"90","close":"90","volume":"1.5","quote_volume":"155","trades":3"#;
    for interval in ["1m", "1h", "1d"] {
        let found = dump
            .lines()
            .any(|line| line.contains(&format!("candles:{interval}")) && line.contains(candle));
        assert!(found, "no candle of {interval} in\n{dump}");
    }
    counted(&service, "messages_handled_total", 6).await;
    eventually("nothing waits", || async {
        let page = service.admin("/metrics").await.text().await.unwrap();
        page.contains("\noutbox_depth 0\n").then_some(())
    })
    .await;
    let stack: serde_json::Value = service.admin("/stack").await.json().await.unwrap();
    assert_eq!(stack["consuming"], true, "{stack}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_between_publish_and_mark_loses_and_doubles_nothing() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;

    service.signal("STOP");
    stores.trade("live", ann, bob, 101, "1").await;
    // Rows can be read and locked, but not marked.
    let mut blocker = stores.owner.begin().await.unwrap();
    sqlx::query("lock table outbox in share mode")
        .execute(&mut *blocker)
        .await
        .unwrap();
    service.signal("CONT");
    eventually("the event is published", || async {
        let stream = stores.nats.stream("exchange-live").await?;
        (stream["state"]["messages"].as_u64() == Some(2)).then_some(())
    })
    .await;
    service.signal("KILL");
    blocker.commit().await.unwrap();
    drop(service);
    assert_eq!(
        stores
            .count("select count(*) from outbox where published_at is null")
            .await,
        1
    );

    let successor = stores.notification(&LIVE).ready().await;
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    drop(successor);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_delivered_again_changes_nothing() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    for price in 1..=50 {
        stores.trade("live", ann, bob, price, "0.1").await;
    }
    stores.settled("live").await;
    let before = stores.complete_market_data().await;

    stores.deliver_again().await;
    counted(&service, "messages_duplicates_total", 100).await;
    stores.assert_told_once("live").await;
    assert_eq!(stores.redis.dump().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_brokers_store_may_be_deleted_in_mid_run() {
    let mut stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 1, "0.1").await;
    stores.settled("live").await;
    // All of it is published at once: what has been for half a minute and is not handled is published again for that.
    service.signal("STOP");
    for price in 2..=400 {
        stores.trade("live", ann, bob, price, "0.1").await;
    }
    // No consumer gets past its first batch: the broker has what was published beyond it, and takes it along.
    let mut handling = stores.owner.begin().await.unwrap();
    sqlx::query("lock table inbox in exclusive mode")
        .execute(&mut *handling)
        .await
        .unwrap();
    service.signal("CONT");
    eventually("everything is published", || async {
        let open = stores
            .count("select count(*) from outbox where published_at is null")
            .await;
        (open == 0).then_some(())
    })
    .await;
    let port = stores.nats.port();
    stores.nats.server.signal("KILL");
    stores.nats = Nats::start_on(port, None);
    handling.rollback().await.unwrap();
    for price in 401..=500 {
        stores.trade("live", ann, bob, price, "0.1").await;
    }
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    assert_eq!(metric(&service, "messages_dead_total").await, 0);
    // The loss was noticed, not the time that had passed.
    assert_eq!(metric(&service, "messages_reopened_total").await, 0);
    counted(&service, "messages_published_total", 501).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn market_data_comes_back_equal() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    for price in 1..=50 {
        stores.trade("live", ann, bob, price * 7 % 31 + 1, "0.123").await;
    }
    stores.settled("live").await;
    let before = stores.complete_market_data().await;
    assert!(before.len() > 50 + 3, "{before:?}");

    stores.flush_market_data().await;
    assert_eq!(stores.complete_market_data().await, before);

    drop(service);
    stores.flush_market_data().await;
    stores.rebuild_market_data();
    assert_eq!(stores.redis.dump().await, before);

    // What is wrong in the store is put right, and what is too much is gone.
    let mut store = stores.redis.connect().await;
    let keys: Vec<String> = store.keys("exchange:live:candles:*").await.unwrap();
    for key in keys {
        let candles: BTreeMap<String, String> = store.hgetall(&key).await.unwrap();
        let (start, candle) = candles.first_key_value().unwrap();
        let mut wrong: Value = serde_json::from_str(candle).unwrap();
        wrong["trades"] = json!(1_000_000);
        wrong["high"] = json!("999");
        let () = store.hset(&key, start, wrong.to_string()).await.unwrap();
        let () = store.hset(&key, "60", wrong.to_string()).await.unwrap();
    }
    let ticks: Vec<String> = store.zrange("exchange:live:ticks:BTC-USD", 0, 0).await.unwrap();
    let wrong = ticks[0].replace("buy", "sell");
    for (tick, id) in [(wrong.as_str(), 1_000_000_000_i64), ("nonsense", 0)] {
        let () = store.zadd("exchange:live:ticks:BTC-USD", tick, id).await.unwrap();
    }
    let () = store
        .zadd("exchange:live:ticks:NO-SUCH", "tick", 1)
        .await
        .unwrap();
    assert_ne!(stores.redis.dump().await, before);
    stores.rebuild_market_data();
    assert_eq!(stores.redis.dump().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn market_data_is_rebuilt_by_one_process_at_a_time() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let _service = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;
    let before = stores.complete_market_data().await;
    let mut other = stores.owner.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(hashtextextended('market rebuild', 0))")
        .execute(&mut *other)
        .await
        .unwrap();
    stores.flush_market_data().await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(stores.redis.dump().await, [""; 0]);
    other.rollback().await.unwrap();
    assert_eq!(stores.complete_market_data().await, before);
}

/// A copy of the store from before some trades is as good as none, whatever happens before somebody looks.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_market_data_is_noticed() {
    for trades_meanwhile in [0, 1] {
        let mut stores = Stores::start().await;
        let (ann, bob) = (stores.user("live").await, stores.user("live").await);
        let service = stores.notification(&LIVE).ready().await;
        let trade = async |stores: &Stores, number: u32| {
            for price in 1..=number {
                stores.trade("live", ann, bob, price, "0.5").await;
            }
            stores.settled("live").await;
        };
        trade(&stores, 3).await;
        stores.complete_market_data().await;
        stores.redis.save().await;
        trade(&stores, 4).await;
        // Nobody looks at the store until it is back and the next trade, if any, has been applied.
        let mut other = stores.owner.begin().await.unwrap();
        sqlx::query("select pg_advisory_xact_lock(hashtextextended('market rebuild', 0))")
            .execute(&mut *other)
            .await
            .unwrap();
        stores.redis.kill_and_restart();
        trade(&stores, trades_meanwhile).await;
        let older = stores.redis.dump().await.join("\n");
        assert_eq!(
            older.matches(":ticks:").count(),
            3 + trades_meanwhile as usize,
            "{older}"
        );
        other.rollback().await.unwrap();
        let rebuilt = eventually("all trades are there again", || async {
            let dump = stores.redis.dump().await;
            let ticks = dump.iter().filter(|line| line.contains(":ticks:")).count();
            let over = !dump.iter().any(|line| line == "exchange:live:rebuilding");
            (over && ticks == 7 + trades_meanwhile as usize).then_some(dump)
        })
        .await;
        drop(service);
        stores.flush_market_data().await;
        stores.rebuild_market_data();
        assert_eq!(stores.redis.dump().await, rebuilt);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_emptied_while_it_is_rebuilt_is_not_complete() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;
    let before = stores.complete_market_data().await;
    let mut lock = stores.owner.begin().await.unwrap();
    sqlx::query("lock table trades")
        .execute(&mut *lock)
        .await
        .unwrap();
    stores.flush_market_data().await;
    eventually("the rebuild reads trades", || async {
        let waits = "select count(*) from pg_locks join pg_stat_activity using (pid)
                     where not granted and query like '%from trades%' and datname = current_database()";
        (stores.count(waits).await == 1).then_some(())
    })
    .await;
    stores.flush_market_data().await;
    lock.rollback().await.unwrap();
    service.logged("was lost while it was rebuilt", 1).await;
    assert_eq!(stores.complete_market_data().await, before);
}

/// The candles of trades, given as seconds, price and size in the order in which they happened.
fn candles_of(trades: &[(i64, u32, &str)], interval: Interval) -> Vec<Value> {
    let mut candles: BTreeMap<i64, Vec<(Decimal, Decimal)>> = BTreeMap::new();
    for (at, price, size) in trades {
        let trade = (Decimal::from(*price), size.parse().unwrap());
        candles
            .entry(at - at % interval.seconds())
            .or_default()
            .push(trade);
    }
    let candles = candles.iter().map(|(start, trades)| {
        let text = |number: Decimal| number.normalize().to_string();
        let prices = || trades.iter().map(|(price, _)| *price);
        json!({
            "start": start, "open": text(trades[0].0), "close": text(trades.last().unwrap().0),
            "high": text(prices().max().unwrap()), "low": text(prices().min().unwrap()),
            "volume": text(trades.iter().map(|(_, size)| size).sum()),
            "quote_volume": text(trades.iter().map(|(price, size)| price * size).sum()),
            "trades": trades.len(),
        })
    });
    candles.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_read_the_candles_that_follow_from_the_trades() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let morning = Time::from_hms(10, 0, 0).unwrap();
    let before_yesterday = OffsetDateTime::now_utc() - Duration::from_hours(48);
    let ten = before_yesterday.replace_time(morning).unix_timestamp();
    let day = Interval::Day.seconds();
    let trades = [
        (ten, 100, "0.5"),
        (ten + 59, 120, "1"),
        (ten + 60, 90, "0.25"),
        (ten + 3599, 80, "2"),
        (ten + 3600, 130, "0.001"),
        (ten + day, 70, "3"),
        (ten + day, 75, "0.1"),
    ];
    for (at, price, size) in trades {
        let at = OffsetDateTime::from_unix_timestamp(at).unwrap();
        stores.trade_at(at, "live", ann, bob, price, size).await;
    }
    let notification = stores.notification(&LIVE).ready().await;
    let market = ["--market-data-url", &stores.redis.url()];
    let trade = Service::live("trade", &stores.database, &market).ready().await;
    stores.settled("live").await;
    stores.complete_market_data().await;

    let ask = async |query: &str, token: Option<&str>| {
        let url = trade.url(&format!("/market/candles?product={query}"));
        let mut request = trade.client.get(url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    for (interval, name, from, to) in [
        (Interval::Minute, "1m", ten, ten + 3601),
        // The first moment counts, the last does not.
        (Interval::Minute, "1m", ten, ten + 60),
        (Interval::Minute, "1m", ten + 1, ten + 3600),
        (Interval::Hour, "1h", ten, ten + day + 1),
        (Interval::Hour, "1h", ten + 3600, ten + day),
        (Interval::Day, "1d", ten - day, ten + 3 * day),
    ] {
        let query = format!("BTC-USD&interval={name}&from={from}&to={to}");
        let mut expected = candles_of(&trades, interval);
        expected.retain(|candle| (from..to).contains(&candle["start"].as_i64().unwrap()));
        assert!(!expected.is_empty());
        assert_eq!(
            ask(&query, None).await,
            (200, json!({"candles": expected})),
            "{query}"
        );
    }
    let all = json!({"candles": candles_of(&trades, Interval::Hour)});
    assert_eq!(ask("BTC-USD&interval=1h", None).await, (200, all));

    let nothing = (200, json!({"candles": []}));
    assert_eq!(ask("ETH-USD&interval=1h", None).await, nothing);
    let tester = stores.user("test-blue-abc.run").await;
    let token = stores.token(tester, "test-blue-abc.run").await;
    assert_eq!(ask("BTC-USD&interval=1h", Some(&token)).await, nothing);
    for wrong in [
        "interval=2h".to_owned(),
        "from=1".to_owned(),
        format!("interval=1m&from={ten}&to={}", ten + 60 * 1001),
        format!("interval=1m&from={ten}&to={}", ten - 1),
    ] {
        let (status, problem) = ask(&format!("BTC-USD&{wrong}"), None).await;
        let refused = (400, &json!("invalid_parameter"));
        assert_eq!((status, &problem["code"]), refused, "{wrong}");
    }
    for unknown in ["XYZ-USD", "not a product"] {
        let (status, problem) = ask(&format!("{unknown}&interval=1h"), None).await;
        let refused = (422, &json!("unknown_product"), &json!("product"));
        assert_eq!(
            (status, &problem["code"], &problem["field"]),
            refused,
            "{unknown}"
        );
    }
    drop(notification);
}

/// Listens to what the broker is asked from now on: it tells nobody any more that a request finds no answer.
async fn listen(stores: &Stores) -> (async_nats::Client, async_nats::Subscriber) {
    let client = stores.nats.jetstream().await.client();
    let asked = client.subscribe("$JS.API.>").await.unwrap();
    // The broker knows of the subscription.
    client.flush().await.unwrap();
    (client, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_disappears_between_two_requests_is_made_anew() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;
    let _listening = listen(&stores).await;

    service.signal("STOP");
    eventually("nobody waits for a message", || async {
        let stream = stores.nats.stream("exchange-live").await?;
        let waiting = |consumer: &Value| consumer["num_waiting"].as_u64().unwrap_or(0);
        let all: u64 = stream["consumer_detail"].as_array()?.iter().map(waiting).sum();
        (all == 0).then_some(())
    })
    .await;
    stores.deliver_again().await;
    service.signal("CONT");
    stores.trade("live", ann, bob, 101, "1").await;
    stores.settled("live").await;
    stores.assert_told_once("live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_stream_without_a_reader_is_left_alone_at_first() {
    const FOREIGN: &str = "exchange-test-blue-abc";
    let stores = Stores::start().await;
    let jetstream = stores.nats.jetstream().await;
    let (_client, mut asked) = listen(&stores).await;
    let service = stores.notification(&LIVE).ready().await;
    let made = jetstream.create_stream(async_nats::jetstream::stream::Config {
        name: FOREIGN.to_owned(),
        subjects: vec!["exchange.test-blue-abc.>".to_owned()],
        ..Default::default()
    });
    made.await.unwrap();
    // It is looked at, and looked at again, which it would not have been with nothing left to do.
    for _ in 0..3 {
        while asked.next().await.unwrap().subject.as_str() != "$JS.API.STREAM.LIST" {}
    }
    assert!(stores.nats.stream(FOREIGN).await.is_some());
    eventually("it is removed", || async {
        stores.nats.stream(FOREIGN).await.is_none().then_some(())
    })
    .await;
    drop(service);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_stack_consumes_its_own_test_lanes_only() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    // A live stack has left a live stream, with a consumer and a message that nobody has read.
    let live = stores.notification(&LIVE).ready().await;
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;
    drop(live);
    let jetstream = stores.nats.jetstream().await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("exchange-lane", "live");
    jetstream
        .publish_with_headers("exchange.live.trade.executed", headers, "{}".into())
        .await
        .unwrap()
        .await
        .unwrap();
    // The broker has acknowledged the message before it has told its consumers of it.
    let before = eventually("the message waits, and nobody for it", || async {
        let stream = stores.nats.stream("exchange-live").await?;
        let waits = |consumer: &serde_json::Value| {
            consumer["num_pending"] == 1 && consumer["num_waiting"].as_u64().unwrap_or(0) == 0
        };
        let consumers = stream["consumer_detail"].as_array()?;
        (!consumers.is_empty() && consumers.iter().all(waits)).then_some(stream)
    })
    .await;

    stores.trade("live", ann, bob, 101, "1").await;
    let mine = "test-green-abc.run";
    let (cat, dan) = (stores.user(mine).await, stores.user(mine).await);
    stores.trade(mine, cat, dan, 102, "1").await;
    let foreign = "test-blue-abc.run";
    let (eve, fay) = (stores.user(foreign).await, stores.user(foreign).await);
    stores.trade(foreign, eve, fay, 103, "1").await;

    let standby = stores.notification(&STANDBY).ready().await;
    stores.settled(mine).await;
    stores.assert_told_once(mine).await;
    tokio::time::sleep(QUIET).await;

    let after = stores.nats.stream("exchange-live").await.unwrap();
    assert_eq!(after["state"], before["state"]);
    let [after, before] = [&after, &before].map(|stream| stream["consumer_detail"].as_array().unwrap());
    assert_eq!(after.len(), before.len(), "{after:?}");
    for (after, before) in after.iter().zip(before) {
        assert_eq!(after["delivered"], before["delivered"]);
        assert_eq!(after["num_pending"], before["num_pending"]);
        assert_eq!(after["num_waiting"].as_u64().unwrap_or(0), 0, "{after}");
    }
    assert!(stores.nats.stream("exchange-test-blue-abc").await.is_none());
    let untouched =
        "select count(*) from outbox where published_at is null and lane in ('live', 'test-blue-abc.run')";
    assert_eq!(stores.count(untouched).await, 2);
    assert_eq!(stores.count("select count(*) from releases").await, 0);
    let stack: serde_json::Value = standby.admin("/stack").await.json().await.unwrap();
    assert_eq!(
        (&stack["role"], &stack["consuming"]),
        (&"Standby".into(), &false.into())
    );

    // An erased lane leaves nothing behind.
    sqlx::query("delete from trades where lane = $1")
        .bind(mine)
        .execute(&stores.owner)
        .await
        .unwrap();
    sqlx::query("delete from outbox where lane = $1")
        .bind(mine)
        .execute(&stores.owner)
        .await
        .unwrap();
    sqlx::query("select erase_lane_v1($1)")
        .bind(mine)
        .execute(&stores.owner)
        .await
        .unwrap();
    eventually("the lane is gone from the other stores", || async {
        let stream = stores.nats.stream("exchange-test-green-abc").await?;
        let kept = stores.redis.dump().await.iter().any(|line| line.contains(mine));
        (stream["state"]["messages"] == 0 && !kept).then_some(())
    })
    .await;
    assert_eq!(
        stores
            .count("select count(*) from notifications where lane like 'test-green%'")
            .await,
        0
    );
}

/// What a consumer is about to write when a lane is erased: what its users are told, and what is put aside.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_is_erased_with_what_is_being_written_in_it() {
    let stores = Stores::start().await;
    let owner = &stores.owner;
    sqlx::raw_sql(
        "create function hold_up() returns trigger language plpgsql as
         'begin perform pg_advisory_xact_lock(4711); return null; end';
         create trigger hold_up after insert on notifications for each row execute function hold_up();
         create trigger hold_up after insert on dead_letters for each row execute function hold_up()",
    )
    .execute(owner)
    .await
    .unwrap();
    let _service = stores.notification(&STANDBY).ready().await;
    for (lane, topic, payload) in [
        ("test-green-abc.told", "user.signed_in", None),
        (
            "test-green-abc.aside",
            "transfer.posted",
            Some(json!({"kind": "gift"})),
        ),
    ] {
        let user = stores.user(lane).await;
        let mut holding = owner.begin().await.unwrap();
        sqlx::query("select pg_advisory_xact_lock(4711)")
            .execute(&mut *holding)
            .await
            .unwrap();
        sqlx::query("insert into outbox (id, lane, topic, key, payload) values (uuid_v7(), $1, $2, '', $3)")
            .bind(lane)
            .bind(topic)
            .bind(payload.unwrap_or_else(|| json!({"user_id": user})))
            .execute(owner)
            .await
            .unwrap();
        let writing: String = eventually("it has been written, and is not committed", || async {
            let waits = "select backend_xid::text from pg_stat_activity
                         where wait_event = 'advisory' and datname = current_database()";
            sqlx::query_scalar(waits).fetch_optional(owner).await.unwrap()
        })
        .await;
        let erasing = begin_to_erase(owner, lane).await;
        holding.rollback().await.unwrap();
        erasing.await.unwrap();
        eventually("what was being written is committed", || async {
            let open =
                sqlx::query("select from pg_stat_activity where backend_xid::text = $1").bind(&writing);
            let open = open.fetch_optional(owner).await.unwrap();
            open.is_none().then_some(())
        })
        .await;
        assert_erased(owner, lane).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_handled_is_put_aside_and_holds_up_nobody() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload, headers)
         values (gen_random_uuid(), 'live', 'transfer.posted', 'x', '{\"kind\": \"gift\"}',
                 '{\"traceparent\": \"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"}')",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    for price in 1..=10 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    assert_eq!(
        stores
            .count("select count(*) from dead_letters where consumer = 'notification'")
            .await,
        1
    );
    counted(&service, "messages_dead_total", 1).await;
    let line = service.logged_entry("was put aside").await;
    assert_eq!(line["trace.id"], "0af7651916cd43dd8448eb211c80319c", "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_has_to_wait_is_found_by_its_trace() {
    let stores = Stores::start().await;
    let service = stores.notification(&LIVE).ready().await;
    stores.settled("live").await;
    sqlx::raw_sql(
        "create function fail() returns trigger language plpgsql as 'begin raise exception ''as the test wants''; end';
         create trigger fail before insert on inbox for each row execute function fail();
         insert into outbox (id, lane, topic, key, payload, headers)
         values (gen_random_uuid(), 'live', 'account.changed', 'x',
                 jsonb_build_object('user_id', gen_random_uuid(), 'account_id', gen_random_uuid(), 'change', 'added',
                                    'currency', 'USD'),
                 '{\"traceparent\": \"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"}')",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    let line = service.logged_entry("failed to handle messages").await;
    assert_eq!(line["trace.id"], "0af7651916cd43dd8448eb211c80319c", "{line}");
    sqlx::raw_sql("drop trigger fail on inbox")
        .execute(&stores.owner)
        .await
        .unwrap();
    stores.settled("live").await;
}

/// Of a topic that only a newer version knows: that one will handle it.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_newer_version_has_written_waits_for_a_newer_version() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload) values (gen_random_uuid(), 'live', 'trade.corrected', 'x', '{}')",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    eventually("it is published", || async {
        let published =
            "select count(*) from outbox where topic = 'trade.corrected' and published_at is not null";
        (stores.count(published).await == 1).then_some(())
    })
    .await;
    // What comes after it is done, in a sweep that has seen both.
    for price in 1..=3 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    eventually("the trades are done", || async {
        let done = "select count(*) from outbox where topic = 'trade.executed' and done_at is not null";
        (stores.count(done).await == 3).then_some(())
    })
    .await;
    let open = "select count(*) from outbox where topic = 'trade.corrected' and done_at is null";
    assert_eq!(stores.count(open).await, 1);

    // A consumer that both versions share has the newer one's topics, too.
    let jetstream = stores.nats.jetstream().await;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Msg-Id", Uuid::now_v7().to_string());
    headers.insert("exchange-lane", "live");
    headers.insert("exchange-topic", "trade.corrected");
    let sent = jetstream.publish_with_headers("exchange.live.trade.executed", headers, "{}".into());
    sent.await.unwrap().await.unwrap();
    stores.trade("live", ann, bob, 4, "1").await;
    eventually("what comes after it is done", || async {
        let done = "select count(*) from outbox where topic = 'trade.executed' and done_at is not null";
        (stores.count(done).await == 4).then_some(())
    })
    .await;
    let consumer: async_nats::jetstream::consumer::PullConsumer = jetstream
        .get_consumer_from_stream("notification", "exchange-live")
        .await
        .unwrap();
    // It does not wait there, in the way of others: its row does, for a version that knows it.
    eventually("nothing is pending", || async {
        let pending = consumer.clone().info().await.ok()?.num_ack_pending;
        (pending == 0).then_some(())
    })
    .await;
    assert_eq!(metric(&service, "messages_dead_total").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_may_be_away_for_a_while() {
    let postgres = crate::servers::Postgres::start(&[]);
    let mut stores = Stores::start().await;
    stores.database = crate::servers::Database::migrated(&postgres).await;
    stores.owner = sqlx::PgPool::connect(&stores.database.owner_url).await.unwrap();
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let service = stores.notification(&LIVE).ready().await;
    for price in 1..=50 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    postgres.server.signal("STOP");
    tokio::time::sleep(Duration::from_secs(12)).await;
    postgres.server.signal("CONT");
    for price in 1..=50 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    assert_eq!(metric(&service, "messages_dead_total").await, 0);
}
