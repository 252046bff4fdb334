//! Market data: ticks, last prices and candles in a Redis-protocol store, and the routes that read them.
//!
//! Everything in the store follows from the trades in PostgreSQL, and only from them: a message says *where* to
//! look, the numbers come from the table. What is written only ever grows towards the whole (ticks by trade id,
//! candles by their number of trades), so messages may come twice, late, or to two consumers at once, and the
//! store, rebuilt after it was lost, is equal to what it was.

mod store;
mod trades;

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{header, request::Parts},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa_axum::{router::OpenApiRouter, routes};

pub use self::store::{Rebuilt, Store, StoreConfig, StoreError};
use crate::{
    app::App,
    auth::Caller,
    error::{self, ApiError},
    extract::Query,
    lane::Lane,
    trade,
};

/// Ticks kept for each product.
const TICKS: isize = 1_000;
/// Candles in one hash of the store.
const CHUNK: i64 = 1_440;
/// Chunks that are kept after their end: a week of minutes, a year of hours, a generation of days.
const CHUNKS_KEPT: i64 = 7;
/// Most candles in an answer.
const MAX_CANDLES: i64 = 1_000;

/// The trades of one product in one lane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Market {
    lane: Lane,
    product: String,
}

/// The length of a candle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub enum Interval {
    /// A minute.
    #[serde(rename = "1m")]
    Minute,
    /// An hour.
    #[serde(rename = "1h")]
    Hour,
    /// A day, in UTC.
    #[serde(rename = "1d")]
    Day,
}

impl Interval {
    const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    fn name(self) -> &'static str {
        match self {
            Self::Minute => "1m",
            Self::Hour => "1h",
            Self::Day => "1d",
        }
    }

    /// Its length in seconds.
    pub fn seconds(self) -> i64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
        }
    }

    /// The beginning of the candle in which a time lies, both in Unix seconds.
    pub fn start(self, at: i64) -> i64 {
        at - at.rem_euclid(self.seconds())
    }

    /// Until when the chunk is kept in which a candle lies.
    fn expiry(self, start: i64) -> i64 {
        let chunk = CHUNK * self.seconds();
        (start.div_euclid(chunk) + 1 + CHUNKS_KEPT) * chunk
    }

    /// The beginning of the oldest chunk that is still kept.
    fn oldest(self, now: i64) -> i64 {
        let chunk = CHUNK * self.seconds();
        (now.div_euclid(chunk) - CHUNKS_KEPT) * chunk
    }
}

/// One trade, as everybody may see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, sqlx::FromRow, utoipa::ToSchema)]
pub struct Tick {
    /// The trade's number.
    pub id: String,
    /// The price, in the quote currency.
    pub price: String,
    /// The size, in the base currency.
    pub size: String,
    /// Who came second: `buy` or `sell`.
    pub taker_side: String,
    /// When the trade was settled.
    #[serde(with = "time::serde::rfc3339")]
    pub executed_at: OffsetDateTime,
}

/// The trades of a product in an interval of time. Intervals without a trade have none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Candle {
    /// Its beginning, in Unix seconds.
    pub start: i64,
    /// The first price.
    pub open: String,
    /// The highest price.
    pub high: String,
    /// The lowest price.
    pub low: String,
    /// The last price.
    pub close: String,
    /// The sum of the sizes, in the base currency.
    pub volume: String,
    /// The sum of price × size, in the quote currency.
    pub quote_volume: String,
    /// How many trades.
    pub trades: i64,
}

/// The routes of market data. They need no token; with one of a test lane they show that lane.
pub fn router(app: App, store: Arc<Store>) -> OpenApiRouter {
    routes().with_state(Reader { app, store })
}

/// The same before they are bound to an application.
pub(crate) fn routes() -> OpenApiRouter<Reader> {
    OpenApiRouter::new()
        .routes(routes!(ticker))
        .routes(routes!(candles))
        .routes(routes!(trades))
}

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct Reader {
    app: App,
    store: Arc<Store>,
}

/// The lane that a request is about: the caller's, or the live one if nobody says who is calling.
struct Viewer(Lane);

impl FromRequestParts<Reader> for Viewer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, reader: &Reader) -> Result<Self, ApiError> {
        if !parts.headers.contains_key(header::AUTHORIZATION) {
            return Ok(Self(Lane::live()));
        }
        Caller::from_request_parts(parts, &reader.app)
            .await
            .map(|caller| Self(caller.lane))
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Redis(_) | StoreError::Timeout | StoreError::Config(_) | StoreError::Lost => {
                Self::unavailable(error)
            }
            StoreError::Trades(error) => error.into(),
            StoreError::Damaged(_) | StoreError::Overflow => Self::internal(error),
        }
    }
}

fn market(lane: Lane, product: String) -> Result<Market, ApiError> {
    trade::check_product(&product)?;
    Ok(Market { lane, product })
}

impl Reader {
    /// What has been found about a market. Where there is nothing, there must at least be such a product.
    async fn of_product<T>(&self, market: &Market, found: Vec<T>) -> Result<Vec<T>, ApiError> {
        if found.is_empty() {
            trade::require_product(&self.app.db, &market.product).await?;
        }
        Ok(found)
    }
}

/// Which product.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct TickerQuery {
    /// The product's symbol.
    #[param(min_length = 1, max_length = 21)]
    product: String,
}

/// The last trade, and the last 24 hours: the current one, as far as it has come, and the 23 before it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Ticker {
    /// The product's symbol.
    product: String,
    /// The last trade.
    last: Tick,
    /// The last 24 hours; absent without a trade in them.
    #[serde(skip_serializing_if = "Option::is_none")]
    day: Option<Candle>,
}

/// The last price of a product and a summary of its last 24 hours.
#[utoipa::path(
    get,
    path = "/market/ticker",
    tag = "market",
    params(TickerQuery),
    responses((status = 200, body = Ticker)),
)]
async fn ticker(
    State(reader): State<Reader>,
    Viewer(lane): Viewer,
    Query(query): Query<TickerQuery>,
) -> Result<Json<Ticker>, ApiError> {
    let market = market(lane, query.product)?;
    let last = reader.store.read_ticks(&market, 1).await?;
    let last = reader.of_product(&market, last).await?.pop();
    let last =
        last.ok_or_else(|| ApiError::from(error::NOT_FOUND).detail("the product has not been traded"))?;
    let end = Interval::Hour.start(OffsetDateTime::now_utc().unix_timestamp()) + Interval::Hour.seconds();
    let start = end - Interval::Day.seconds();
    let hours = reader
        .store
        .read_candles(&market, Interval::Hour, start, end)
        .await?;
    let day = trades::join(start, &hours)?;
    Ok(Json(Ticker {
        product: market.product,
        last,
        day,
    }))
}

/// Which candles.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct CandlesQuery {
    /// The product's symbol.
    #[param(min_length = 1, max_length = 21)]
    product: String,
    /// The length of the candles.
    #[param(inline)]
    interval: Interval,
    /// Candles that begin at or after this time, in Unix seconds; 100 candles before `to` unless told.
    #[param(minimum = 0)]
    from: Option<i64>,
    /// Candles that begin before this time, in Unix seconds; now unless told. At most 1000 candles after `from`.
    #[param(minimum = 0)]
    to: Option<i64>,
}

/// Candles in the order of time.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Candles {
    /// In the order of time. Intervals without a trade are left out.
    candles: Vec<Candle>,
}

/// The candles of a product. Minutes are kept for a week, hours for a year, days for a generation.
#[utoipa::path(
    get,
    path = "/market/candles",
    tag = "market",
    params(CandlesQuery),
    responses((status = 200, body = Candles)),
)]
async fn candles(
    State(reader): State<Reader>,
    Viewer(lane): Viewer,
    Query(query): Query<CandlesQuery>,
) -> Result<Json<Candles>, ApiError> {
    let market = market(lane, query.product)?;
    let length = query.interval.seconds();
    let to = query
        .to
        .unwrap_or_else(|| OffsetDateTime::now_utc().unix_timestamp() + 1);
    let from = query
        .from
        .unwrap_or_else(|| query.interval.start(to.saturating_sub(100 * length)));
    let span = to
        .checked_sub(from)
        .filter(|span| from >= 0 && (0..=MAX_CANDLES * length).contains(span));
    // Far beyond any trade, and far from overflow.
    if span.is_none() || to > 1 << 40 {
        return Err(ApiError::from(error::INVALID_PARAMETER)
            .field("from")
            .detail("from and to must be 0 to 1000 candles apart"));
    }
    let candles = reader
        .store
        .read_candles(&market, query.interval, from, to)
        .await?;
    let candles = reader.of_product(&market, candles).await?;
    Ok(Json(Candles { candles }))
}

/// Which trades.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct TradesQuery {
    /// The product's symbol.
    #[param(min_length = 1, max_length = 21)]
    product: String,
    /// At most so many, 100 unless told.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<isize>,
}

/// Trades, newest first.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Trades {
    /// Newest first.
    trades: Vec<Tick>,
}

/// The newest trades of a product, of the last 1000.
#[utoipa::path(
    get,
    path = "/market/trades",
    tag = "market",
    params(TradesQuery),
    responses((status = 200, body = Trades)),
)]
async fn trades(
    State(reader): State<Reader>,
    Viewer(lane): Viewer,
    Query(query): Query<TradesQuery>,
) -> Result<Json<Trades>, ApiError> {
    let market = market(lane, query.product)?;
    let limit = query.limit.unwrap_or(100);
    if !(1..=TICKS).contains(&limit) {
        return Err(ApiError::from(error::INVALID_PARAMETER)
            .field("limit")
            .detail("from 1 to 1000"));
    }
    let trades = reader.store.read_ticks(&market, limit).await?;
    let trades = reader.of_product(&market, trades).await?;
    Ok(Json(Trades { trades }))
}
