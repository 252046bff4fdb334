//! The market-data store and what is written to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use redis::{AsyncCommands, Client, RedisError, Script, TlsCertificates, aio::MultiplexedConnection};
use secrecy::ExposeSecret;
use serde::Deserialize;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{
    CHUNK, CHUNKS_KEPT, Candle, Interval, Market, TICKS, Tick,
    trades::{TradeRow, join, read_chunk, read_minutes},
};
use crate::{
    config::{Config, StoreUrl},
    inbox::{ApplyError, Delivered},
    lane::Lane,
};

/// Longer than a healthy store ever takes.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Candles written in one call.
const WRITE_BATCH: usize = 500;

/// Where the market data is, and how to trust it.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// `redis://` or `rediss://user:password@host:port/db`, read again at each reconnect.
    pub url: StoreUrl,
    /// PEM certificates to trust instead of those of the system.
    pub ca_file: Option<PathBuf>,
}

impl StoreConfig {
    /// The part of a service's configuration that is about market data.
    pub fn from(config: &Config) -> anyhow::Result<Self> {
        config
            .market_data
            .clone()
            .context("--market-data-url or --market-data-url-file is required")
    }
}

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is away, or refused something.
    #[error("the market-data store failed: {0}")]
    Redis(#[from] RedisError),
    /// It did not answer in time.
    #[error("the market-data store did not answer in time")]
    Timeout,
    /// Its URL or certificates could not be read.
    #[error("failed to read how to reach the market-data store: {0}")]
    Config(#[from] std::io::Error),
    /// What is in it was not written by us.
    #[error("the market-data store holds {0:?}, which is no market data")]
    Damaged(String),
    /// It has been emptied, or has come back as another copy, in the middle of a rebuild.
    #[error("the market-data store was lost while it was rebuilt")]
    Lost,
    /// A sum with more digits than fit.
    #[error("a volume has too many digits")]
    Overflow,
    /// The trades could not be read.
    #[error("failed to read the trades: {0}")]
    Trades(#[from] sqlx::Error),
}

impl From<serde_json::Error> for StoreError {
    fn from(error: serde_json::Error) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// A connection to the store, made when it is needed and again after a failure.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    connection: Mutex<Option<MultiplexedConnection>>,
}

impl Market {
    fn ticks_key(&self) -> String {
        format!("exchange:{}:ticks:{}", self.lane, self.product)
    }

    fn candles_key(&self, interval: Interval, start: i64) -> String {
        let chunk = start.div_euclid(CHUNK * interval.seconds());
        format!(
            "exchange:{}:candles:{}:{}:{chunk}",
            self.lane,
            interval.name(),
            self.product
        )
    }
}

/// The key that says that the live lane is complete. It is lost with the rest.
const COMPLETE_KEY: &str = "exchange:live:complete";
/// How often something has been applied to the live lane: PostgreSQL knows of no more, unless some of it is lost.
const APPLIED_KEY: &str = "exchange:live:applied";
/// The token of the rebuild that is under way. If it is lost, so is what has been rebuilt.
const REBUILDING_KEY: &str = "exchange:live:rebuilding";

impl Store {
    /// Does not connect yet.
    pub fn new(config: StoreConfig) -> Self {
        Self {
            config,
            connection: Mutex::new(None),
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, StoreError> {
        let mut slot = self.connection.lock().await;
        if let Some(connection) = &*slot {
            return Ok(connection.clone());
        }
        let url = self.config.url.read()?;
        let client = match &self.config.ca_file {
            None => Client::open(url.expose_secret())?,
            Some(file) => {
                let root_cert = Some(tokio::fs::read(file).await?);
                Client::build_with_tls(
                    url.expose_secret(),
                    TlsCertificates {
                        client_tls: None,
                        root_cert,
                    },
                )?
            }
        };
        let connecting = client.get_multiplexed_async_connection();
        let connection = tokio::time::timeout(TIMEOUT, connecting)
            .await
            .map_err(|_| StoreError::Timeout)??;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    /// Waits for the store's answer. After a failure the next call connects anew, with fresh credentials.
    async fn answer<T>(&self, call: impl Future<Output = Result<T, RedisError>>) -> Result<T, StoreError> {
        let result = match tokio::time::timeout(TIMEOUT, call).await {
            Ok(result) => result.map_err(StoreError::from),
            Err(_) => Err(StoreError::Timeout),
        };
        if result.is_err() {
            self.connection.lock().await.take();
        }
        result
    }

    /// Brings the store up to the trades that these events tell of.
    pub(crate) async fn apply(
        &self,
        connection: &mut PgConnection,
        events: &[&Delivered],
    ) -> Result<(), ApplyError> {
        let ids = events
            .iter()
            .map(|event| trade_id(event))
            .collect::<Result<Vec<i64>, _>>()?;
        let trades: Vec<TradeRow> = sqlx::query_as(
            "select id, lane, product, trim_scale(price)::text as price, trim_scale(size)::text as size,
                    taker_side, executed_at
             from trades where id = any($1)",
        )
        .bind(&ids)
        .fetch_all(&mut *connection)
        .await?;
        let minutes: BTreeSet<(Market, i64)> = trades
            .iter()
            .map(|trade| {
                (
                    trade.market(),
                    Interval::Minute.start(trade.executed_at.unix_timestamp()),
                )
            })
            .collect();
        self.add_ticks(trades).await?;
        let candles = read_minutes(connection, &minutes).await?;
        self.write_candles(Interval::Minute, &candles).await?;
        self.summarize(Interval::Minute, Interval::Hour, &minutes).await?;
        self.summarize(Interval::Hour, Interval::Day, &minutes).await?;
        if events.iter().any(|event| event.lane.is_live()) {
            self.count_applied(connection).await?;
        }
        Ok(())
    }

    /// Counts what has been written, there and here, after it and before the commit. A store that has not counted what has been
    /// committed before is an older copy: it is not complete.
    async fn count_applied(&self, connection: &mut PgConnection) -> Result<(), ApplyError> {
        let applied: i64 =
            sqlx::query_scalar("update market_data set applied = applied + 1 returning applied")
                .fetch_one(connection)
                .await?;
        let script = Script::new(
            r"local known = tonumber(redis.call('GET', KEYS[1]) or -1)
              local applied = tonumber(ARGV[1])
              if known < applied - 1 then
                  redis.call('DEL', KEYS[2])
              end
              if known < applied then
                  redis.call('SET', KEYS[1], ARGV[1])
              end",
        );
        let mut call = script.prepare_invoke();
        call.key(APPLIED_KEY).key(COMPLETE_KEY).arg(applied);
        let mut store = self.connect().await?;
        let () = self.answer(call.invoke_async(&mut store)).await?;
        Ok(())
    }

    async fn add_ticks(&self, trades: Vec<TradeRow>) -> Result<(), StoreError> {
        let mut markets: BTreeMap<Market, Vec<TradeRow>> = BTreeMap::new();
        for trade in trades {
            markets.entry(trade.market()).or_default().push(trade);
        }
        if markets.is_empty() {
            return Ok(());
        }
        let mut pipeline = redis::pipe();
        for (market, trades) in markets {
            let key = market.ticks_key();
            for trade in trades {
                let id = trade.id.to_string();
                let tick = serde_json::to_string(&trade.into_tick())?;
                pipeline.cmd("ZADD").arg(&key).arg(id).arg(tick).ignore();
            }
            pipeline.zremrangebyrank(&key, 0, -(TICKS + 1)).ignore();
        }
        let mut connection = self.connect().await?;
        self.answer(pipeline.query_async(&mut connection)).await
    }

    /// Writes those candles that know of more trades than what is there.
    async fn write_candles(
        &self,
        interval: Interval,
        candles: &[(Market, Candle)],
    ) -> Result<(), StoreError> {
        let script = Script::new(
            r"for i, key in ipairs(KEYS) do
                  local at = (i - 1) * 4
                  local known = redis.call('HGET', key, ARGV[at + 1])
                  if not known or cjson.decode(known).trades < tonumber(ARGV[at + 2]) then
                      redis.call('HSET', key, ARGV[at + 1], ARGV[at + 3])
                      redis.call('EXPIREAT', key, ARGV[at + 4])
                  end
              end",
        );
        for candles in candles.chunks(WRITE_BATCH) {
            let mut call = script.prepare_invoke();
            for (market, candle) in candles {
                call.key(market.candles_key(interval, candle.start))
                    .arg(candle.start)
                    .arg(candle.trades)
                    .arg(serde_json::to_string(candle)?)
                    .arg(interval.expiry(candle.start));
            }
            let mut connection = self.connect().await?;
            let () = self.answer(call.invoke_async(&mut connection)).await?;
        }
        Ok(())
    }

    /// Makes the longer candles, in which these minutes lie, from the shorter ones.
    async fn summarize(
        &self,
        shorter: Interval,
        longer: Interval,
        minutes: &BTreeSet<(Market, i64)>,
    ) -> Result<(), StoreError> {
        let touched: BTreeSet<(&Market, i64)> = minutes
            .iter()
            .map(|(market, minute)| (market, longer.start(*minute)))
            .collect();
        let mut candles = Vec::with_capacity(touched.len());
        for (market, start) in touched {
            let parts = self
                .read_candles(market, shorter, start, start + longer.seconds())
                .await?;
            if let Some(candle) = join(start, &parts)? {
                candles.push((market.clone(), candle));
            }
        }
        self.write_candles(longer, &candles).await
    }

    /// The candles that begin in `from..to`, in the order of time.
    pub(super) async fn read_candles(
        &self,
        market: &Market,
        interval: Interval,
        from: i64,
        to: i64,
    ) -> Result<Vec<Candle>, StoreError> {
        let mut chunks: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        let mut start = interval.start(from + interval.seconds() - 1);
        while start < to {
            chunks
                .entry(market.candles_key(interval, start))
                .or_default()
                .push(start);
            start += interval.seconds();
        }
        let mut connection = self.connect().await?;
        let mut candles: Vec<Candle> = Vec::new();
        for (key, fields) in chunks {
            let texts: Vec<Option<String>> = self.answer(connection.hmget(&key, &fields)).await?;
            for text in texts.into_iter().flatten() {
                candles.push(serde_json::from_str(&text)?);
            }
        }
        candles.sort_by_key(|candle| candle.start);
        Ok(candles)
    }

    /// The newest ticks, newest first.
    pub(super) async fn read_ticks(&self, market: &Market, limit: isize) -> Result<Vec<Tick>, StoreError> {
        let mut connection = self.connect().await?;
        let texts: Vec<String> = self
            .answer(connection.zrevrange(market.ticks_key(), 0, limit - 1))
            .await?;
        texts
            .iter()
            .map(|text| serde_json::from_str(text).map_err(StoreError::from))
            .collect()
    }

    /// Rebuilds the live lane if the store has been lost.
    pub(crate) async fn restore(
        &self,
        db: &PgPool,
        now: OffsetDateTime,
    ) -> Result<Option<Rebuilt>, StoreError> {
        if self.is_complete(db).await? {
            return Ok(None);
        }
        self.rebuild(db, now).await
    }

    /// Makes everything about the live lane what the trades say, and removes the rest. Consumers may be at work meanwhile, and
    /// readers see each candle as it was or as it should be. None if another process is at it.
    pub async fn rebuild(&self, db: &PgPool, now: OffsetDateTime) -> Result<Option<Rebuilt>, StoreError> {
        let mut transaction = db.begin().await?;
        let (alone,): (bool,) =
            sqlx::query_as("select pg_try_advisory_xact_lock(hashtextextended('market rebuild', 0))")
                .fetch_one(&mut *transaction)
                .await?;
        if !alone {
            return Ok(None);
        }
        // Over a generation's trades no query is quick.
        sqlx::query("set local statement_timeout = 0")
            .execute(&mut *transaction)
            .await?;
        let applied = read_applied(&mut *transaction).await?;
        let token = Uuid::now_v7().to_string();
        let mut connection = self.connect().await?;
        let () = self.answer(connection.set(REBUILDING_KEY, &token)).await?;
        let mut rebuilt = Rebuilt { ticks: 0, candles: 0 };
        let mut kept = BTreeSet::from([COMPLETE_KEY, APPLIED_KEY, REBUILDING_KEY].map(str::to_owned));
        let products: Vec<(String,)> = sqlx::query_as("select symbol from products")
            .fetch_all(&mut *transaction)
            .await?;
        for (product,) in products {
            let market = Market {
                lane: Lane::live(),
                product,
            };
            rebuilt.ticks += self.rebuild_ticks(&mut transaction, &market).await?;
            kept.insert(market.ticks_key());
            // Minutes first: whoever makes an hour meanwhile makes it of them.
            for interval in Interval::ALL {
                let chunk = CHUNK * interval.seconds();
                let oldest = interval.oldest(now.unix_timestamp());
                // And the next one, which may have begun.
                for number in 0..=CHUNKS_KEPT + 1 {
                    let start = oldest + number * chunk;
                    rebuilt.candles += self
                        .rebuild_chunk(&mut transaction, &market, interval, start)
                        .await?;
                    kept.insert(market.candles_key(interval, start));
                }
            }
        }
        let mut surplus = self.keys("exchange:live:").await?;
        surplus.retain(|key| !kept.contains(key));
        if !surplus.is_empty() {
            self.remove(&surplus).await?;
        }
        let script = Script::new(
            r"if redis.call('GET', KEYS[1]) ~= ARGV[1] then
                  return 0
              end
              redis.call('DEL', KEYS[1])
              if tonumber(redis.call('GET', KEYS[2]) or -1) < tonumber(ARGV[2]) then
                  redis.call('SET', KEYS[2], ARGV[2])
              end
              redis.call('SET', KEYS[3], '1')
              return 1",
        );
        let mut call = script.prepare_invoke();
        call.key(REBUILDING_KEY).key(APPLIED_KEY).key(COMPLETE_KEY);
        call.arg(&token).arg(applied);
        let mut connection = self.connect().await?;
        let whole: bool = self.answer(call.invoke_async(&mut connection)).await?;
        if whole {
            Ok(Some(rebuilt))
        } else {
            Err(StoreError::Lost)
        }
    }

    /// The newest ticks of a product. What was there before the trades were read and is not among them is wrong, or old.
    async fn rebuild_ticks(
        &self,
        connection: &mut PgConnection,
        market: &Market,
    ) -> Result<usize, StoreError> {
        let key = market.ticks_key();
        let mut store = self.connect().await?;
        let known: Vec<String> = self.answer(store.zrange(&key, 0, -1)).await?;
        let trades: Vec<TradeRow> = sqlx::query_as(
            "select id, lane, product, trim_scale(price)::text as price, trim_scale(size)::text as size,
                    taker_side, executed_at
             from trades where lane = 'live' and product = $1 order by executed_at desc, id desc limit $2",
        )
        .bind(&market.product)
        .bind(i64::try_from(TICKS).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await?;
        let mut ticks = BTreeMap::new();
        for trade in trades {
            let id = trade.id;
            ticks.insert(serde_json::to_string(&trade.into_tick())?, id);
        }
        let mut pipeline = redis::pipe();
        pipeline.atomic();
        for tick in known.iter().filter(|tick| !ticks.contains_key(*tick)) {
            pipeline.zrem(&key, tick).ignore();
        }
        for (tick, id) in &ticks {
            pipeline.zadd(&key, tick, id).ignore();
        }
        pipeline.zremrangebyrank(&key, 0, -(TICKS + 1)).ignore();
        let () = self.answer(pipeline.query_async(&mut store)).await?;
        Ok(ticks.len())
    }

    /// The candles of one key. What has changed since it was looked at is by a consumer, who knows better.
    async fn rebuild_chunk(
        &self,
        connection: &mut PgConnection,
        market: &Market,
        interval: Interval,
        start: i64,
    ) -> Result<usize, StoreError> {
        let script = Script::new(
            r"for at = 2, #ARGV, 3 do
                  local field, known, right = ARGV[at], ARGV[at + 1], ARGV[at + 2]
                  if (redis.call('HGET', KEYS[1], field) or '') == known then
                      if right == '' then
                          redis.call('HDEL', KEYS[1], field)
                      else
                          redis.call('HSET', KEYS[1], field, right)
                      end
                  end
              end
              redis.call('EXPIREAT', KEYS[1], ARGV[1])",
        );
        let key = market.candles_key(interval, start);
        let mut store = self.connect().await?;
        let mut known: BTreeMap<String, String> = self.answer(store.hgetall(&key)).await?;
        let candles = read_chunk(connection, market, interval, start).await?;
        let mut call = script.prepare_invoke();
        call.key(&key).arg(interval.expiry(start));
        for candle in &candles {
            let field = candle.start.to_string();
            let before = known.remove(&field).unwrap_or_default();
            call.arg(field).arg(before).arg(serde_json::to_string(candle)?);
        }
        for (field, surplus) in known {
            call.arg(field).arg(surplus).arg("");
        }
        let () = self.answer(call.invoke_async(&mut store)).await?;
        Ok(candles.len())
    }

    /// Whether the store answers.
    pub async fn reach(&self) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        let _: bool = self.answer(connection.exists(COMPLETE_KEY)).await?;
        Ok(())
    }

    /// Whether the live lane is complete: false after the store has been lost, or has come back as an older copy.
    async fn is_complete(&self, db: &PgPool) -> Result<bool, StoreError> {
        // In this order: the store is ahead, if anything.
        let applied = read_applied(db).await?;
        let mut connection = self.connect().await?;
        let (complete, known): (bool, Option<i64>) = self
            .answer(
                redis::pipe()
                    .exists(COMPLETE_KEY)
                    .get(APPLIED_KEY)
                    .query_async(&mut connection),
            )
            .await?;
        Ok(complete && known.is_some_and(|known| known >= applied))
    }

    /// The lanes with this prefix that have something in the store, and the keys of each.
    pub(crate) async fn test_lanes(&self, prefix: &str) -> Result<BTreeMap<String, Vec<String>>, StoreError> {
        let mut lanes: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for key in self.keys(&format!("exchange:{prefix}")).await? {
            if let Some(lane) = key.split(':').nth(1) {
                lanes.entry(lane.to_owned()).or_default().push(key);
            }
        }
        Ok(lanes)
    }

    /// All keys that begin like this.
    async fn keys(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut connection = self.connect().await?;
        let mut found = Vec::new();
        let mut cursor = 0_u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor)
                .arg("MATCH")
                .arg(format!("{prefix}*"))
                .arg("COUNT")
                .arg(1_000);
            let (next, keys): (u64, Vec<String>) = self.answer(scan.query_async(&mut connection)).await?;
            found.extend(keys);
            cursor = next;
            if cursor == 0 {
                return Ok(found);
            }
        }
    }

    /// Removes keys.
    pub(crate) async fn remove(&self, keys: &[String]) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        self.answer(connection.del(keys)).await
    }
}

/// What a rebuild has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// Ticks.
    pub ticks: usize,
    /// Candles of all intervals.
    pub candles: usize,
}

/// How often something has been applied, as far as it is committed.
async fn read_applied(executor: impl sqlx::PgExecutor<'_>) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("select applied from market_data")
        .fetch_one(executor)
        .await
}

fn trade_id(event: &Delivered) -> Result<i64, serde_json::Error> {
    #[derive(Deserialize)]
    struct Trade {
        trade_id: String,
    }
    let trade = Trade::deserialize(&event.payload)?;
    trade
        .trade_id
        .parse()
        .map_err(|_| serde::de::Error::custom("trade_id is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_candle_never_lies_in_two_chunks_of_the_shorter() {
        let market = Market {
            lane: Lane::live(),
            product: "BTC-USD".into(),
        };
        for (shorter, longer) in [
            (Interval::Minute, Interval::Hour),
            (Interval::Hour, Interval::Day),
        ] {
            for at in (0..1_000).map(|n| 1_790_000_000 + n * 7_919) {
                let start = longer.start(at);
                let end = start + longer.seconds() - shorter.seconds();
                assert_eq!(
                    market.candles_key(shorter, start),
                    market.candles_key(shorter, end)
                );
                assert!(shorter.expiry(start) > at);
            }
        }
    }
}
