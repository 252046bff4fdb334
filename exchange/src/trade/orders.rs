//! Products, orders, trades and the book.
//!
//! An order needs no idempotency record: it is itself unique per user and `client_order_id`, and what it traded on
//! arrival stands in its row, so that the first answer can be given again.

use axum::{Extension, Json, extract::State, http::HeaderMap};
use http::HeaderValue;
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    app::App,
    auth::Caller,
    error::{ApiError, INVALID_PARAMETER},
    extract::{Body, Query},
    idempotency::{Answer, KEY_HEADER, KEY_REUSED, Key},
    money::{Amount, Price, Size},
    telemetry::TraceContext,
};

use super::{
    Counters, Side, TimeInForce,
    batch::{Books, Settled, Submission},
    refused,
};

/// The most trades on a page.
const LARGEST_PAGE: i64 = 500;

/// The most price levels of a side of the book.
const DEEPEST_BOOK: i64 = 200;

/// What can be traded, and how.
#[derive(Serialize, ToSchema, sqlx::FromRow)]
pub(super) struct Product {
    /// `<base>-<quote>`.
    #[serde(rename = "product")]
    symbol: String,
    /// The currency that is bought and sold.
    base: String,
    /// The currency that it is paid in.
    quote: String,
    /// Sizes are multiples of this.
    size_increment: Size,
    /// Prices are multiples of this.
    price_increment: Price,
    /// The smallest size.
    min_size: Size,
    /// The part of a trade's value that the resting order pays.
    #[schema(value_type = String)]
    maker_fee_rate: Decimal,
    /// The part of a trade's value that the arriving order pays.
    #[schema(value_type = String)]
    taker_fee_rate: Decimal,
    /// `trading` or `halted`.
    status: String,
}

/// All products.
#[derive(Serialize, ToSchema)]
pub(super) struct ProductList {
    products: Vec<Product>,
}

/// How the price of an order is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum OrderType {
    /// At `price` or better.
    #[default]
    Limit,
    /// At what the book offers.
    Market,
}

/// A new order.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewOrder {
    /// `buy` or `sell` the base currency.
    r#type: Side,
    /// The symbol of a product.
    #[schema(example = "BTC-USD")]
    product: String,
    /// `limit` unless given.
    #[serde(default)]
    order_type: OrderType,
    /// How much of the base currency.
    size: Size,
    /// For limit orders only.
    price: Option<Price>,
    /// `GTC` for limit orders unless given; market orders are always `IOC`.
    time_in_force: Option<TimeInForce>,
    /// The caller's own name for it, unique among the caller's orders: 1 to 128 visible ASCII characters. May be given
    /// by the header `Idempotency-Key` instead.
    client_order_id: Option<String>,
    /// The caller's account of the base currency.
    base_account_id: Uuid,
    /// The caller's account of the quote currency.
    quote_account_id: Uuid,
}

/// One trade of an order when it arrived.
#[derive(Debug, Serialize, ToSchema)]
struct Fill {
    trade_id: String,
    price: Price,
    size: Size,
    /// What this order paid, in the quote currency.
    fee: Amount,
}

/// What became of an order when it arrived.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Order {
    #[serde(rename = "order_id")]
    id: Uuid,
    client_order_id: String,
    product: String,
    r#type: Side,
    #[serde(rename = "order_type")]
    kind: OrderType,
    #[serde(skip_serializing_if = "Option::is_none")]
    price: Option<Price>,
    size: Size,
    time_in_force: TimeInForce,
    /// `filled`, `open` (the rest is in the book) or `cancelled` (the rest is not).
    status: String,
    /// Why it was cancelled: `no_more_matches`, `self_trade` or `insufficient_funds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    filled: Amount,
    remaining: Amount,
    trades: Vec<Fill>,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

/// Names one order.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OrderChoice {
    order_id: Uuid,
}

/// An order that is not in the book any more.
#[derive(Serialize, ToSchema)]
pub(super) struct CancelledOrder {
    order_id: Uuid,
    product: String,
    r#type: String,
    size: Amount,
    /// What was traded of it.
    filled: Amount,
    /// What never was.
    remaining: Amount,
    /// `cancelled`.
    status: String,
    #[serde(with = "time::serde::rfc3339")]
    cancelled_at: OffsetDateTime,
}

#[derive(sqlx::FromRow)]
struct CancelRow {
    outcome: String,
    product: Option<String>,
    side: Option<String>,
    size: Option<Amount>,
    remaining: Option<Amount>,
    closed_at: Option<OffsetDateTime>,
}

/// A page of an account's trades.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TradesOfAccount {
    /// An account of the caller, of either currency.
    account_id: Uuid,
    /// Where the page begins: the `next_cursor` of the page before it.
    cursor: Option<String>,
    /// Trades on the page, 1 to 500; 100 unless given.
    limit: Option<i64>,
}

/// A trade as one of its two sides sees it.
#[derive(Serialize, ToSchema, sqlx::FromRow)]
pub(super) struct Trade {
    #[serde(rename = "trade_id")]
    id: String,
    order_id: Uuid,
    product: String,
    /// What the account's owner did: `buy` or `sell`.
    r#type: String,
    /// `maker` if the owner's order was in the book before, else `taker`.
    role: String,
    price: Price,
    size: Size,
    /// What the owner paid, in the quote currency.
    fee: Amount,
    #[serde(with = "time::serde::rfc3339")]
    executed_at: OffsetDateTime,
}

/// Trades, newest first.
#[derive(Serialize, ToSchema)]
pub(super) struct TradePage {
    trades: Vec<Trade>,
    /// The `cursor` of the next page, with older trades; none on the last.
    next_cursor: Option<String>,
}

/// Which book, and how much of it.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct BookChoice {
    /// The symbol of a product.
    product: String,
    /// Price levels per side, 1 to 200; 20 unless given.
    depth: Option<i64>,
}

/// All that rests in the book at one price.
#[derive(Serialize, ToSchema, sqlx::FromRow)]
pub(super) struct Level {
    #[serde(skip)]
    side: String,
    price: Price,
    size: Size,
    orders: i64,
}

/// An order book, the best prices first.
#[derive(Serialize, ToSchema)]
pub(super) struct BookView {
    product: String,
    /// Who buys.
    bids: Vec<Level>,
    /// Who sells.
    asks: Vec<Level>,
}

/// All products, by symbol.
#[utoipa::path(
    get, path = "/products", tag = "trade",
    responses((status = 200, body = ProductList)),
)]
pub(super) async fn list_products(State(app): State<App>) -> Result<Json<ProductList>, ApiError> {
    let products = sqlx::query_as(
        "select symbol, base, quote, size_increment, price_increment, min_size, trim_scale(maker_fee_rate) as maker_fee_rate,
                trim_scale(taker_fee_rate) as taker_fee_rate, status
         from products order by symbol",
    )
    .fetch_all(&app.db)
    .await?;
    Ok(Json(ProductList { products }))
}

/// Places an order, matches it and settles what it traded.
#[utoipa::path(
    post, path = "/trade/add", tag = "trade", security(("access_token" = [])), request_body = NewOrder,
    params(("Idempotency-Key" = Option<String>, Header, description = "Instead of `client_order_id`")),
    responses((status = 201, body = Order)),
)]
pub(super) async fn add_order(
    caller: Caller,
    Extension(books): Extension<Books>,
    Extension(counters): Extension<Counters>,
    headers: HeaderMap,
    Body(request): Body<NewOrder>,
) -> Result<Answer<Order>, ApiError> {
    let client_order_id = client_order_id(request.client_order_id.as_deref(), &headers)?;
    let time_in_force = check(&request)?;
    let submission = Submission {
        id: Uuid::now_v7(),
        user_id: caller.user_id,
        client_order_id: client_order_id.clone(),
        side: request.r#type,
        price: request.price,
        size: request.size,
        time_in_force,
        base_account_id: request.base_account_id,
        quote_account_id: request.quote_account_id,
        trace: TraceContext::current().map(|trace| trace.to_string()),
    };
    let settled = books
        .submit(caller.lane, request.product.clone(), submission)
        .await?;
    counters
        .orders
        .get_or_create(&[("outcome", settled.outcome.clone())])
        .inc();
    let hit = match settled.outcome.as_str() {
        "accepted" => false,
        "replayed" => true,
        "client_order_id_reused" => return Err(ApiError::from(KEY_REUSED).field("client_order_id")),
        code => return Err(refused(code, settled.field.as_deref())),
    };
    let order = answer(request, client_order_id, time_in_force, settled)?;
    if !hit {
        counters
            .trades
            .inc_by(u64::try_from(order.trades.len()).unwrap_or(u64::MAX));
    }
    Ok(Answer { body: order, hit })
}

/// Takes the rest of an order out of the book. May be repeated.
#[utoipa::path(
    post, path = "/trade/cancel", tag = "trade", security(("access_token" = [])), request_body = OrderChoice,
    responses((status = 200, body = CancelledOrder)),
)]
pub(super) async fn cancel_order(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<OrderChoice>,
) -> Result<Json<CancelledOrder>, ApiError> {
    let row: CancelRow = sqlx::query_as(
        "select outcome, product, side, size, remaining, closed_at from cancel_order_v1($1, $2, $3)",
    )
    .bind(&caller.lane)
    .bind(caller.user_id)
    .bind(request.order_id)
    .fetch_one(&app.db)
    .await?;
    let (Some(product), Some(r#type), Some(size), Some(remaining), Some(cancelled_at), "cancelled") = (
        row.product,
        row.side,
        row.size,
        row.remaining,
        row.closed_at,
        row.outcome.as_str(),
    ) else {
        return Err(refused(&row.outcome, Some("order_id")));
    };
    Ok(Json(CancelledOrder {
        order_id: request.order_id,
        product,
        r#type,
        size,
        filled: size.minus(remaining).map_err(ApiError::internal)?,
        remaining,
        status: row.outcome,
        cancelled_at,
    }))
}

/// The trades of an account, newest first.
#[utoipa::path(
    get, path = "/trade/getTradeByAccount", tag = "trade", security(("access_token" = [])), params(TradesOfAccount),
    responses((status = 200, body = TradePage)),
)]
pub(super) async fn trades_of_account(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<TradesOfAccount>,
) -> Result<Json<TradePage>, ApiError> {
    let limit = in_range("limit", query.limit.unwrap_or(100), LARGEST_PAGE)?;
    let before = match query.cursor.as_deref().map(str::parse::<i64>) {
        None => i64::MAX,
        Some(Ok(id)) => id,
        Some(Err(_)) => {
            return Err(ApiError::from(INVALID_PARAMETER)
                .field("cursor")
                .detail("use the next_cursor of a page"));
        }
    };
    let owned: Option<(Uuid,)> = sqlx::query_as(
        "select id from accounts where id = $1 and user_id = $2 and lane = $3 and deleted_at is null",
    )
    .bind(query.account_id)
    .bind(caller.user_id)
    .bind(&caller.lane)
    .fetch_optional(&app.db)
    .await?;
    owned.ok_or_else(|| refused("account_not_found", Some("account_id")))?;
    // One line per trade and account: the others are fees.
    let mut trades: Vec<Trade> = sqlx::query_as(
        "select t.id::text as id, product, price, size, executed_at,
                case when taken then taker_side when taker_side = 'buy' then 'sell' else 'buy' end as type,
                case when taken then 'taker' else 'maker' end as role,
                case when taken then taker_fee else maker_fee end as fee,
                case when taken then taker_order_id else maker_order_id end as order_id
         from entries e join trades t on t.id = e.transfer_id, lateral (select taker_user_id = $2 as taken) as role
         where e.account_id = $1 and e.line <= 4 and e.transfer_id < $3
         order by e.transfer_id desc limit $4",
    )
    .bind(query.account_id)
    .bind(caller.user_id)
    .bind(before)
    .bind(limit + 1)
    .fetch_all(&app.db)
    .await?;
    let page = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = trades.len() > page;
    trades.truncate(page);
    let next_cursor = trades.last().filter(|_| more).map(|last| last.id.clone());
    Ok(Json(TradePage { trades, next_cursor }))
}

/// The order book of a product, in the caller's lane.
#[utoipa::path(
    get, path = "/book", tag = "trade", security(("access_token" = [])), params(BookChoice),
    responses((status = 200, body = BookView)),
)]
pub(super) async fn read_book(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<BookChoice>,
) -> Result<Json<BookView>, ApiError> {
    check_product(&query.product)?;
    let depth = in_range("depth", query.depth.unwrap_or(20), DEEPEST_BOOK)?;
    let known: Option<(String,)> = sqlx::query_as("select symbol from products where symbol = $1")
        .bind(&query.product)
        .fetch_optional(&app.db)
        .await?;
    known.ok_or_else(|| refused("unknown_product", Some("product")))?;
    let levels: Vec<Level> = sqlx::query_as(
        "select side, price, size, orders
         from (values ('buy'), ('sell')) as sides (side),
              lateral (select price, sum(remaining) as size, count(*) as orders from orders
                       where lane = $1 and product = $2 and orders.side = sides.side and status = 'open'
                       group by rank, price order by rank limit $3) as levels",
    )
    .bind(&caller.lane)
    .bind(&query.product)
    .bind(depth)
    .fetch_all(&app.db)
    .await?;
    let (bids, asks) = levels.into_iter().partition(|level| level.side == "buy");
    Ok(Json(BookView {
        product: query.product,
        bids,
        asks,
    }))
}

/// The client order id, from the body or the header.
fn client_order_id(given: Option<&str>, headers: &HeaderMap) -> Result<String, ApiError> {
    let header = headers.get(KEY_HEADER).map(HeaderValue::to_str).transpose();
    let header = header.map_err(|_| ApiError::from(INVALID_PARAMETER).field("Idempotency-Key"))?;
    let key = match (given, header) {
        (Some(given), Some(header)) if given != header => {
            return Err(ApiError::invalid_field(
                "client_order_id",
                "differs from the header Idempotency-Key",
            ));
        }
        (Some(key), _) => Key::new(key.to_owned(), "client_order_id")?,
        (None, Some(key)) => Key::new(key.to_owned(), "Idempotency-Key")?,
        (None, None) => {
            return Err(ApiError::invalid_field(
                "client_order_id",
                "is needed, so that the order can be sent again safely",
            ));
        }
    };
    Ok(key.as_str().to_owned())
}

/// Checks what can be checked without the database, and completes the time in force.
fn check(request: &NewOrder) -> Result<TimeInForce, ApiError> {
    check_product(&request.product)?;
    match (request.order_type, request.price, request.time_in_force) {
        (OrderType::Limit, None, _) => Err(ApiError::invalid_field("price", "a limit order needs one")),
        (OrderType::Market, Some(_), _) => Err(ApiError::invalid_field("price", "a market order has none")),
        (OrderType::Market, None, Some(TimeInForce::Gtc)) => Err(ApiError::invalid_field(
            "time_in_force",
            "a market order cannot rest in the book",
        )),
        (OrderType::Market, None, _) => Ok(TimeInForce::Ioc),
        (OrderType::Limit, Some(_), time_in_force) => Ok(time_in_force.unwrap_or(TimeInForce::Gtc)),
    }
}

/// Spares the database what cannot be a product.
fn check_product(product: &str) -> Result<(), ApiError> {
    let well_formed = (1..=21).contains(&product.len())
        && product
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'-');
    if well_formed {
        return Ok(());
    }
    Err(refused("unknown_product", Some("product")))
}

fn in_range(parameter: &str, value: i64, most: i64) -> Result<i64, ApiError> {
    if (1..=most).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::from(INVALID_PARAMETER)
        .field(parameter)
        .detail(format!("1 to {most}")))
}

fn answer(
    request: NewOrder,
    client_order_id: String,
    time_in_force: TimeInForce,
    settled: Settled,
) -> Result<Order, ApiError> {
    let (Some(status), Some(filled)) = (settled.status, settled.taken) else {
        return Err(ApiError::internal("an accepted order has no status"));
    };
    let ids = settled.trade_ids.into_iter().flatten();
    let prices = settled.trade_prices.into_iter().flatten();
    let sizes = settled.trade_sizes.into_iter().flatten();
    let fees = settled.trade_fees.into_iter().flatten();
    let trades = ids.zip(prices).zip(sizes.zip(fees));
    Ok(Order {
        id: settled.order_id,
        client_order_id,
        product: request.product,
        r#type: request.r#type,
        kind: request.order_type,
        price: request.price,
        size: request.size,
        time_in_force,
        status,
        reason: settled.reason,
        filled,
        remaining: Amount::from(request.size)
            .minus(filled)
            .map_err(ApiError::internal)?,
        trades: trades
            .map(|((id, price), (size, fee))| Fill {
                trade_id: id.to_string(),
                price,
                size,
                fee,
            })
            .collect(),
        created_at: settled.created_at,
    })
}
