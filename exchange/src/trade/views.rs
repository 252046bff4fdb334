//! What can be looked at: products, the book, and the trades of an account.

use axum::{Json, extract::State};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    app::App,
    auth::Caller,
    error::{ApiError, INVALID_PARAMETER},
    extract::Query,
    money::{Amount, Price, Size},
};

use super::{orders::check_product, refused};

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

/// A page of an account's trades.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct TradesOfAccount {
    /// An account of the caller, of either currency.
    account_id: Uuid,
    /// Where the page begins: the `next_cursor` of the page before it.
    cursor: Option<String>,
    /// Trades on the page; 100 unless given.
    #[param(minimum = 1, maximum = 500)]
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
#[serde(deny_unknown_fields)]
pub(super) struct BookChoice {
    /// The symbol of a product.
    #[param(min_length = 1, max_length = 21)]
    product: String,
    /// Price levels per side; 20 unless given.
    #[param(minimum = 1, maximum = 200)]
    depth: Option<i64>,
}

/// All that rests in the book at one price.
#[derive(Serialize, ToSchema, sqlx::FromRow)]
pub(super) struct Level {
    #[serde(skip)]
    side: String,
    price: Price,
    size: Amount,
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
    let depth = in_range("depth", query.depth.unwrap_or(20), DEEPEST_BOOK)?;
    require_product(&app.db, &query.product).await?;
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

/// Fails with `unknown_product` unless there is one of this symbol.
pub(crate) async fn require_product(db: &PgPool, symbol: &str) -> Result<(), ApiError> {
    check_product(symbol)?;
    let known: Option<(String,)> = sqlx::query_as("select symbol from products where symbol = $1")
        .bind(symbol)
        .fetch_optional(db)
        .await?;
    known
        .map(|_| ())
        .ok_or_else(|| refused("unknown_product", Some("product")))
}

fn in_range(parameter: &str, value: i64, most: i64) -> Result<i64, ApiError> {
    if (1..=most).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::from(INVALID_PARAMETER)
        .field(parameter)
        .detail(format!("1 to {most}")))
}
