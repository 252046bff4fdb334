//! Placing and cancelling orders.
//!
//! An order needs no idempotency record: it is itself unique per user and `client_order_id`, and what it traded on
//! arrival stands in its row, so that the first answer can be given again.

use axum::{Extension, Json, extract::State, http::HeaderMap};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    app::App,
    auth::Caller,
    error::ApiError,
    extract::Body,
    idempotency::{Answer, Key},
    money::{Amount, Price, Size},
    telemetry::TraceContext,
};

use super::{
    Counters, Side, TimeInForce,
    batch::{Books, Settled, Submission},
    refused,
};

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
    #[schema(min_length = 1, max_length = 21, example = "BTC-USD")]
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
    #[schema(min_length = 1, max_length = 128)]
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
    /// Why it was cancelled: `no_more_matches`, `self_trade`, `insufficient_funds`, `trade_limit` or `balance_limit`.
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

/// Places an order, matches it and settles what it traded.
#[utoipa::path(
    post, path = "/trade/add", tag = "trade", security(("access_token" = [])), request_body = NewOrder,
    params(("Idempotency-Key" = Option<String>, Header, description = "Instead of `client_order_id`",
            min_length = 1, max_length = 128)),
    responses((status = 201, body = Order)),
)]
pub(super) async fn add_order(
    caller: Caller,
    Extension(books): Extension<Books>,
    Extension(counters): Extension<Counters>,
    headers: HeaderMap,
    body: Result<Body<NewOrder>, ApiError>,
) -> Result<Answer<Order>, ApiError> {
    let Body(request) = body.inspect_err(|refusal| counters.refused(refusal))?;
    let understood = client_order_id(request.client_order_id.as_deref(), &headers)
        .and_then(|client_order_id| Ok((client_order_id, check(&request)?)));
    let (client_order_id, time_in_force) = understood.inspect_err(|refusal| counters.refused(refusal))?;
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
        trace: TraceContext::current().unwrap_or_else(TraceContext::root),
    };
    let settled = books
        .submit(caller.lane, request.product.clone(), submission)
        .await?;
    let hit = settled.is_replay();
    let body = answer(request, client_order_id, time_in_force, settled)?;
    Ok(Answer { body, hit })
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

/// The client order id, from the body or the header.
fn client_order_id(given: Option<&str>, headers: &HeaderMap) -> Result<String, ApiError> {
    let given = given
        .map(|key| Key::in_field(key, "client_order_id"))
        .transpose()?;
    let key = match (given, Key::in_header(headers)?) {
        (Some(given), Some(header)) if given != header => {
            return Err(ApiError::invalid_field(
                "client_order_id",
                "differs from the header Idempotency-Key",
            ));
        }
        (Some(key), _) | (None, Some(key)) => key,
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
pub(crate) fn check_product(product: &str) -> Result<(), ApiError> {
    let well_formed = (1..=21).contains(&product.len())
        && product
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'-');
    if well_formed {
        return Ok(());
    }
    Err(refused("unknown_product", Some("product")))
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
