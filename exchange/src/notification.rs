//! The notification service: turns events into notifications, and lets users read them.
//!
//! Each user's notifications are numbered without regard to lane, service or colour; the number is the cursor of
//! pages and, as `Last-Event-ID`, of the event stream ([`crate::stream`]).

use std::{collections::HashMap, sync::Arc};

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use crate::{
    app::App,
    auth::Caller,
    error::{self, ApiError},
    extract::{Body, Path, Query},
    inbox::{ApplyError, Delivered},
    outbox::Topic,
    stream::{self, Hub},
};

/// The PostgreSQL channel on which the ids of users with new notifications are announced.
pub const CHANNEL: &str = "notifications";
/// The e-mails that a user is sent in an hour, at most: nobody has confirmed that the address is the user's own.
const MAILS_PER_HOUR: i64 = 20;
/// Most notifications in one page.
const MAX_PAGE: i64 = 200;

/// What a user is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, sqlx::FromRow, utoipa::ToSchema)]
pub struct Notification {
    /// Its number among the user's notifications, from 1; the cursor of pages and of the event stream.
    pub id: i64,
    /// `trade`, `deposit`, `withdrawal`, `account`, `sign_in` or `release`; others may be added.
    pub kind: String,
    /// One sentence for people.
    pub title: String,
    /// The facts; which ones depends on the kind.
    #[schema(value_type = Object)]
    pub data: Value,
    /// When it was written.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When the user had read it.
    #[serde(with = "time::serde::rfc3339::option")]
    pub read_at: Option<OffsetDateTime>,
}

/// The columns of a [`Notification`], for `select`.
macro_rules! columns {
    () => {
        "seq as id, kind, title, data, created_at, read_at"
    };
}
pub(crate) use columns;

/// A notification before it has a number.
#[derive(Clone, Debug, PartialEq)]
struct Draft {
    user_id: Uuid,
    kind: &'static str,
    title: String,
    data: Value,
}

#[derive(Deserialize)]
struct TradeExecuted {
    trade_id: String,
    product: String,
    price: String,
    size: String,
    executed_at: String,
    buyer: Party,
    seller: Party,
}

#[derive(Deserialize)]
struct Party {
    user_id: Uuid,
    order_id: Uuid,
    fee: String,
}

#[derive(Deserialize)]
struct TransferPosted {
    transfer_id: String,
    kind: TransferKind,
    user_id: Uuid,
    account_id: Uuid,
    currency: String,
    amount: String,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TransferKind {
    Deposit,
    Withdrawal,
}

#[derive(Deserialize)]
struct AccountChanged {
    user_id: Uuid,
    account_id: Uuid,
    change: String,
    currency: String,
}

#[derive(Deserialize)]
struct SignedIn {
    user_id: Uuid,
}

/// Names of accounts by their ids. They are not in messages: the broker keeps those for a day, also of users who leave.
type Names = HashMap<Uuid, String>;

/// What an event means to whom.
fn drafts(event: &Delivered, names: &Names) -> Result<Vec<Draft>, serde_json::Error> {
    Ok(match event.topic {
        Topic::TradeExecuted => {
            let trade = TradeExecuted::deserialize(&event.payload)?;
            let side = |party: &Party, side: &str, verb: &str| Draft {
                user_id: party.user_id,
                kind: "trade",
                title: format!("{verb} {} {} at {}", trade.size, trade.product, trade.price),
                data: json!({
                    "trade_id": trade.trade_id,
                    "order_id": party.order_id,
                    "product": trade.product,
                    "side": side,
                    "price": trade.price,
                    "size": trade.size,
                    "fee": party.fee,
                    "executed_at": trade.executed_at,
                }),
            };
            vec![
                side(&trade.buyer, "buy", "Bought"),
                side(&trade.seller, "sell", "Sold"),
            ]
        }
        Topic::TransferPosted => {
            let transfer = TransferPosted::deserialize(&event.payload)?;
            let (kind, verb) = match transfer.kind {
                TransferKind::Deposit => ("deposit", "Received"),
                TransferKind::Withdrawal => ("withdrawal", "Withdrew"),
            };
            vec![Draft {
                user_id: transfer.user_id,
                kind,
                title: format!("{verb} {} {}", transfer.amount, transfer.currency),
                data: json!({
                    "transfer_id": transfer.transfer_id,
                    "account_id": transfer.account_id,
                    "currency": transfer.currency,
                    "amount": transfer.amount,
                }),
            }]
        }
        Topic::AccountChanged => {
            let account = AccountChanged::deserialize(&event.payload)?;
            let name = names.get(&account.account_id).map_or("", String::as_str);
            vec![Draft {
                user_id: account.user_id,
                kind: "account",
                title: format!("{} account {name} was {}", account.currency, account.change),
                data: json!({
                    "account_id": account.account_id,
                    "change": account.change,
                    "name": name,
                    "currency": account.currency,
                }),
            }]
        }
        Topic::SignedIn => {
            let SignedIn { user_id } = SignedIn::deserialize(&event.payload)?;
            vec![Draft {
                user_id,
                kind: "sign_in",
                title: "Signed in".to_owned(),
                data: json!({}),
            }]
        }
    })
}

/// The names of the accounts that events are about, as they are now.
async fn names(connection: &mut PgConnection, events: &[&Delivered]) -> Result<Names, ApplyError> {
    let changes = events.iter().filter(|event| event.topic == Topic::AccountChanged);
    let payloads = changes.map(|event| AccountChanged::deserialize(&event.payload));
    let accounts: Vec<Uuid> = payloads
        .map(|account| Ok(account?.account_id))
        .collect::<Result<_, serde_json::Error>>()?;
    if accounts.is_empty() {
        return Ok(Names::new());
    }
    let named = sqlx::query_as("select id, name from accounts where id = any($1)");
    let named: Vec<(Uuid, String)> = named.bind(accounts).fetch_all(connection).await?;
    Ok(named.into_iter().collect())
}

/// Writes notifications.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    /// Whether live users are also told by e-mail.
    pub emails: bool,
}

impl Writer {
    /// Writes the notifications of new events, and wakes the event streams of their users at the commit.
    pub(crate) async fn apply(
        self,
        connection: &mut PgConnection,
        events: &[&Delivered],
    ) -> Result<(), ApplyError> {
        let names = names(connection, events).await?;
        let mut rows = Rows::default();
        for event in events {
            for draft in drafts(event, &names)? {
                rows.users.push(draft.user_id);
                rows.events.push(event.id);
                rows.lanes.push(event.lane.as_str());
                rows.kinds.push(draft.kind);
                rows.titles.push(draft.title);
                rows.data.push(draft.data);
            }
        }
        // Users who are gone are told nothing, and a user who is about to go waits until this has been written and can
        // be erased. Users and counters are locked in the order of the users, so that two workers never wait for each
        // other.
        sqlx::query(
            "with told as (
                 select id from users where id = any($1) and deleted_at is null order by id for key share
             ), input as (
                 select given.*, row_number() over (partition by given.user_id order by given.place) as nth
                 from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::jsonb[])
                      with ordinality as given (user_id, event_id, lane, kind, title, data, place)
                 join told on told.id = given.user_id
             ), counted as (
                 insert into notification_counters as counter (user_id, lane, last_seq, hour_began_at, hour_began_after)
                 select user_id, min(lane), count(*), now(), 0 from input group by user_id order by user_id
                 on conflict (user_id) do update set
                     last_seq = counter.last_seq + excluded.last_seq,
                     hour_began_at = case when counter.hour_began_at > now() - interval '1 hour'
                                          then counter.hour_began_at else now() end,
                     hour_began_after = case when counter.hour_began_at > now() - interval '1 hour'
                                             then counter.hour_began_after else counter.last_seq end
                 returning user_id, last_seq, hour_began_after
             ), written as (
                 insert into notifications (user_id, seq, lane, event_id, kind, title, data)
                 select input.user_id,
                        counted.last_seq + nth - max(nth) over (partition by input.user_id),
                        lane, event_id, kind, title, data
                 from input join counted on counted.user_id = input.user_id
                 returning user_id, seq, lane
             ), mailed as (
                 insert into emails (user_id, seq)
                 select user_id, seq from written join counted using (user_id)
                 where $7 and lane = 'live' and seq <= hour_began_after + $9
             )
             select pg_notify($8, user_id::text) from (select distinct user_id from written) news",
        )
        .bind(rows.users)
        .bind(rows.events)
        .bind(rows.lanes)
        .bind(rows.kinds)
        .bind(rows.titles)
        .bind(rows.data)
        .bind(self.emails)
        .bind(CHANNEL)
        .bind(MAILS_PER_HOUR)
        .execute(connection)
        .await?;
        Ok(())
    }
}

/// Notifications as columns, for one statement.
#[derive(Default)]
struct Rows<'a> {
    users: Vec<Uuid>,
    events: Vec<Uuid>,
    lanes: Vec<&'a str>,
    kinds: Vec<&'static str>,
    titles: Vec<String>,
    data: Vec<Value>,
}

/// The state of the notification routes.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) app: App,
    pub(crate) hub: Arc<Hub>,
}

/// The routes of the notification service.
pub fn router(app: App, hub: Arc<Hub>) -> OpenApiRouter {
    routes()
        .with_state(app.clone())
        .merge(stream::routes().with_state(Shared { app, hub }))
}

/// The routes about stored notifications, before they are bound to an application.
pub(crate) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(mark_read))
        .routes(routes!(mark_all_read))
}

/// Which notifications to list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Only notifications with a smaller number: `next` of the page before.
    before: Option<i64>,
    /// At most so many, 50 unless told, 200 at most.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    /// Only those that have not been read.
    #[serde(default)]
    unread: bool,
}

/// Notifications, newest first.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Page {
    /// Newest first.
    notifications: Vec<Notification>,
    /// `before` of the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<i64>,
}

/// The caller's notifications, newest first. Pages are stable while new notifications arrive.
#[utoipa::path(
    get,
    path = "/notifications",
    tag = "notification",
    security(("access_token" = [])),
    params(ListQuery),
    responses((status = 200, body = Page)),
)]
async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<Json<Page>, ApiError> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(ApiError::from(error::INVALID_PARAMETER)
            .field("limit")
            .detail("from 1 to 200"));
    }
    let mut notifications: Vec<Notification> = sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from notifications
          where user_id = $1 and seq < $2 and (not $3 or read_at is null)
          order by seq desc limit $4"
    ))
    .bind(caller.user_id)
    .bind(query.before.unwrap_or(i64::MAX))
    .bind(query.unread)
    .bind(limit + 1)
    .fetch_all(&app.db)
    .await?;
    let full = i64::try_from(notifications.len()).is_ok_and(|found| found > limit);
    if full {
        notifications.pop();
    }
    let next = notifications.last().filter(|_| full).map(|last| last.id);
    Ok(Json(Page { notifications, next }))
}

/// Marks one notification as read. Doing it again changes nothing.
#[utoipa::path(
    post,
    path = "/notifications/{id}/read",
    tag = "notification",
    security(("access_token" = [])),
    params(("id" = i64, Path, description = "The notification's number")),
    responses((status = 204)),
)]
async fn mark_read(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<i64>,
) -> Result<StatusCode, ApiError> {
    let known = sqlx::query(
        "update notifications set read_at = coalesce(read_at, now()) where user_id = $1 and seq = $2",
    )
    .bind(caller.user_id)
    .bind(id)
    .execute(&app.db)
    .await?;
    if known.rows_affected() == 0 {
        return Err(error::NOT_FOUND.into());
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Up to where everything has been read.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct ReadUpTo {
    /// The number of the newest notification that the user has seen.
    up_to: i64,
}

/// Marks all notifications up to one as read.
#[utoipa::path(
    post,
    path = "/notifications/read",
    tag = "notification",
    security(("access_token" = [])),
    request_body = ReadUpTo,
    responses((status = 204)),
)]
async fn mark_all_read(
    State(app): State<App>,
    caller: Caller,
    Body(ReadUpTo { up_to }): Body<ReadUpTo>,
) -> Result<StatusCode, ApiError> {
    sqlx::query(
        "update notifications set read_at = now() where user_id = $1 and seq <= $2 and read_at is null",
    )
    .bind(caller.user_id)
    .bind(up_to)
    .execute(&app.db)
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lane::Lane, telemetry::TraceContext};

    fn delivered(topic: Topic, payload: Value) -> Delivered {
        Delivered {
            id: Uuid::now_v7(),
            lane: Lane::live(),
            topic,
            payload,
            trace: TraceContext::root(),
        }
    }

    #[test]
    fn a_trade_is_told_to_both_sides_and_shows_neither_the_other() {
        let (buyer, seller) = (Uuid::now_v7(), Uuid::now_v7());
        let (buy_order, sell_order) = (Uuid::now_v7(), Uuid::now_v7());
        let event = delivered(
            Topic::TradeExecuted,
            json!({
                "trade_id": "7", "product": "BTC-USD", "price": "20000", "size": "0.5", "taker_side": "buy",
                "executed_at": "2026-11-23T10:00:00Z",
                "buyer": {"user_id": buyer, "order_id": buy_order, "fee": "20"},
                "seller": {"user_id": seller, "order_id": sell_order, "fee": "10"},
            }),
        );
        let drafts = drafts(&event, &Names::new()).unwrap();
        let told: Vec<_> = drafts
            .iter()
            .map(|draft| (draft.user_id, draft.title.as_str()))
            .collect();
        assert_eq!(
            told,
            [
                (buyer, "Bought 0.5 BTC-USD at 20000"),
                (seller, "Sold 0.5 BTC-USD at 20000")
            ]
        );
        let [to_buyer, to_seller] = [drafts[0].data.to_string(), drafts[1].data.to_string()];
        assert!(to_buyer.contains(&buy_order.to_string()) && to_buyer.contains("\"20\""));
        for secret in [seller.to_string(), sell_order.to_string()] {
            assert!(!to_buyer.contains(&secret));
        }
        assert!(!to_seller.contains(&buyer.to_string()) && !to_seller.contains(&buy_order.to_string()));
    }

    #[test]
    fn a_payload_that_is_not_what_the_topic_promises_is_an_error() {
        for topic in Topic::ALL {
            assert!(
                drafts(&delivered(topic, json!({"user_id": 1})), &Names::new()).is_err(),
                "{topic:?}"
            );
        }
    }
}
