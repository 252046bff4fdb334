//! Trades as they become market data: read from the database, and summed up.

use std::collections::BTreeSet;

use rust_decimal::Decimal;
use sqlx::PgConnection;
use time::OffsetDateTime;

use super::{CHUNK, Candle, Interval, Market, Tick, store::StoreError};
use crate::lane::Lane;

/// The sum of candles in the order of time, as one that begins at `start`.
pub(super) fn join(start: i64, candles: &[Candle]) -> Result<Option<Candle>, StoreError> {
    let (Some(first), Some(last)) = (candles.first(), candles.last()) else {
        return Ok(None);
    };
    let mut joined = Candle {
        start,
        close: last.close.clone(),
        trades: 0,
        ..first.clone()
    };
    let (mut high, mut low) = (decimal(&first.high)?, decimal(&first.low)?);
    let (mut volume, mut quote_volume) = (Decimal::ZERO, Decimal::ZERO);
    for candle in candles {
        high = high.max(decimal(&candle.high)?);
        low = low.min(decimal(&candle.low)?);
        volume = volume
            .checked_add(decimal(&candle.volume)?)
            .ok_or(StoreError::Overflow)?;
        quote_volume = quote_volume
            .checked_add(decimal(&candle.quote_volume)?)
            .ok_or(StoreError::Overflow)?;
        joined.trades += candle.trades;
    }
    joined.high = high.normalize().to_string();
    joined.low = low.normalize().to_string();
    joined.volume = volume.normalize().to_string();
    joined.quote_volume = quote_volume.normalize().to_string();
    Ok(Some(joined))
}

fn decimal(text: &str) -> Result<Decimal, StoreError> {
    Decimal::from_str_exact(text).map_err(|_| StoreError::Damaged(text.to_owned()))
}

/// A trade as the database has it.
#[derive(sqlx::FromRow)]
pub(super) struct TradeRow {
    pub(super) id: i64,
    lane: Lane,
    product: String,
    price: String,
    size: String,
    taker_side: String,
    pub(super) executed_at: OffsetDateTime,
}

impl TradeRow {
    pub(super) fn market(&self) -> Market {
        Market {
            lane: self.lane.clone(),
            product: self.product.clone(),
        }
    }

    pub(super) fn into_tick(self) -> Tick {
        Tick {
            id: self.id.to_string(),
            price: self.price,
            size: self.size,
            taker_side: self.taker_side,
            executed_at: self.executed_at,
        }
    }
}

/// A candle as the database sums it up.
#[derive(sqlx::FromRow)]
pub(super) struct CandleRow {
    lane: Lane,
    product: String,
    start: i64,
    open: String,
    high: String,
    low: String,
    close: String,
    volume: String,
    quote_volume: String,
    trades: i64,
}

impl CandleRow {
    pub(super) fn split(self) -> (Market, Candle) {
        let Self {
            lane,
            product,
            start,
            open,
            high,
            low,
            close,
            volume,
            quote_volume,
            trades,
        } = self;
        (
            Market { lane, product },
            Candle {
                start,
                open,
                high,
                low,
                close,
                volume,
                quote_volume,
                trades,
            },
        )
    }
}

/// The candles of these minutes.
pub(super) async fn read_minutes(
    connection: &mut PgConnection,
    minutes: &BTreeSet<(Market, i64)>,
) -> Result<Vec<(Market, Candle)>, sqlx::Error> {
    let lanes: Vec<&str> = minutes.iter().map(|(market, _)| market.lane.as_str()).collect();
    let products: Vec<&str> = minutes
        .iter()
        .map(|(market, _)| market.product.as_str())
        .collect();
    let starts: Vec<i64> = minutes.iter().map(|(_, start)| *start).collect();
    let rows: Vec<CandleRow> = sqlx::query_as(
        "select touched.lane, touched.product, start, trim_scale(first.price)::text as open,
                trim_scale(high)::text as high, trim_scale(low)::text as low,
                trim_scale(last.price)::text as close, trim_scale(volume)::text as volume,
                trim_scale(quote_volume)::text as quote_volume, trades
         from unnest($1::text[], $2::text[], $3::bigint[]) as touched (lane, product, start)
         cross join lateral (
             select min(id) as first_id, max(id) as last_id, max(price) as high, min(price) as low,
                    sum(size) as volume, sum(price * size) as quote_volume, count(*) as trades
             from trades
             where trades.lane = touched.lane and trades.product = touched.product
               and executed_at >= to_timestamp(start) and executed_at < to_timestamp(start + 60)) summed
         join trades as first on first.id = first_id
         join trades as last on last.id = last_id",
    )
    .bind(lanes)
    .bind(products)
    .bind(starts)
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(CandleRow::split).collect())
}

/// The candles of one key of the store, which begins at `start`.
pub(super) async fn read_chunk(
    connection: &mut PgConnection,
    market: &Market,
    interval: Interval,
    start: i64,
) -> Result<Vec<Candle>, sqlx::Error> {
    let rows: Vec<CandleRow> = sqlx::query_as(
        "select first.lane, first.product, start, trim_scale(first.price)::text as open,
                trim_scale(high)::text as high, trim_scale(low)::text as low,
                trim_scale(last.price)::text as close, trim_scale(volume)::text as volume,
                trim_scale(quote_volume)::text as quote_volume, trades
         from (select (floor(extract(epoch from executed_at) / $3) * $3)::bigint as start,
                      min(id) as first_id, max(id) as last_id, max(price) as high, min(price) as low,
                      sum(size) as volume, sum(price * size) as quote_volume, count(*) as trades
               from trades
               where lane = $1 and product = $2 and executed_at >= to_timestamp($4) and executed_at < to_timestamp($5)
               group by 1) summed
         join trades as first on first.id = first_id
         join trades as last on last.id = last_id",
    )
    .bind(&market.lane)
    .bind(&market.product)
    .bind(interval.seconds())
    .bind(start)
    .bind(start + CHUNK * interval.seconds())
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(|row| row.split().1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candle(
        start: i64,
        open: &str,
        high: &str,
        low: &str,
        close: &str,
        volume: &str,
        trades: i64,
    ) -> Candle {
        let [open, high, low, close, volume] = [open, high, low, close, volume].map(str::to_owned);
        Candle {
            start,
            open,
            high,
            low,
            close,
            quote_volume: volume.clone(),
            volume,
            trades,
        }
    }

    #[test]
    fn an_hour_is_the_sum_of_its_minutes() {
        let minutes = [
            candle(60, "100", "110", "9", "105", "0.1", 3),
            candle(120, "105", "105.5", "104", "104.5", "0.20000001", 2),
        ];
        let hour = join(0, &minutes).unwrap().unwrap();
        assert_eq!(hour, candle(0, "100", "110", "9", "104.5", "0.30000001", 5));
        assert_eq!(join(0, &[]).unwrap(), None);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_rounded_sum() {
        let huge = "79228162514264337593543950335";
        let candles = [
            candle(0, "1", "1", "1", "1", huge, 1),
            candle(60, "1", "1", "1", "1", "1", 1),
        ];
        assert!(matches!(join(0, &candles), Err(StoreError::Overflow)));
        assert!(decimal("0.00000000000000000000000000001").is_err());
    }
}
