//! Accounts, deposits and withdrawals.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    app::App,
    auth::{self, Caller},
    error::{self, ApiError},
    extract::Body,
    idempotency::{self, Answer, Key},
    money::{Amount, OutOfRange},
    outbox::{self, Event, Topic},
    telemetry::TraceContext,
};

use super::{freezes, refused};

/// The longest name of an account, in characters.
const LONGEST_NAME: usize = 64;

/// The longest reference of a transfer, in characters.
const LONGEST_REFERENCE: usize = 128;

/// Whether money may leave an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub(super) enum AccountState {
    /// It may.
    Active,
    /// No new orders and no withdrawals. Orders that are open stay open, and may be filled.
    Frozen,
}

impl AccountState {
    /// What has happened to an account that came to be in this state.
    fn change(self) -> &'static str {
        match self {
            Self::Active => "unfrozen",
            Self::Frozen => "frozen",
        }
    }
}

/// An account as it is stored.
#[derive(sqlx::FromRow)]
struct AccountRow {
    id: Uuid,
    currency: String,
    kind: String,
    name: String,
    state: AccountState,
    balance: Amount,
    hold: Amount,
    created_at: OffsetDateTime,
    /// Since when it is frozen; version 1 does not know.
    #[sqlx(default)]
    frozen_at: Option<OffsetDateTime>,
}

/// An account of the caller.
#[derive(Serialize, ToSchema)]
pub(super) struct Account {
    #[serde(rename = "account_id")]
    id: Uuid,
    currency: String,
    /// `fiat` or `crypto`.
    kind: String,
    name: String,
    state: AccountState,
    /// Since when the account is frozen; absent when it is not.
    #[serde(
        with = "time::serde::rfc3339::option",
        skip_serializing_if = "Option::is_none"
    )]
    frozen_at: Option<OffsetDateTime>,
    /// All of it, including what is on hold.
    balance: Amount,
    /// What open orders have reserved.
    hold: Amount,
    /// Balance less hold.
    available: Amount,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

impl TryFrom<AccountRow> for Account {
    type Error = OutOfRange;

    fn try_from(row: AccountRow) -> Result<Self, OutOfRange> {
        Ok(Self {
            available: row.balance.minus(row.hold)?,
            id: row.id,
            currency: row.currency,
            kind: row.kind,
            name: row.name,
            state: row.state,
            frozen_at: row.frozen_at,
            balance: row.balance,
            hold: row.hold,
            created_at: row.created_at,
        })
    }
}

/// The caller's accounts.
#[derive(Serialize, ToSchema)]
pub(super) struct AccountList {
    accounts: Vec<Account>,
}

/// A new account.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewAccount {
    /// The symbol of a currency.
    #[schema(min_length = 2, max_length = 10, example = "BTC")]
    currency: String,
    /// Unique among the caller's accounts of the currency, 1 to 64 characters.
    #[schema(min_length = 1, max_length = 64, example = "savings")]
    name: String,
}

/// Changes of an account; what is left out stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AccountUpdate {
    account_id: Uuid,
    /// A new name.
    #[schema(min_length = 1, max_length = 64)]
    name: Option<String>,
    /// A new state.
    state: Option<AccountState>,
}

/// Names one account.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AccountChoice {
    account_id: Uuid,
}

/// Money that comes in or goes out.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Movement {
    account_id: Uuid,
    /// Above zero, with no more digits than the currency has.
    #[schema(value_type = String, pattern = r"^\d{1,15}(\.\d{1,9})?$", example = "250.75")]
    amount: Amount,
    /// What the other side calls it, up to 128 characters.
    #[schema(max_length = 128)]
    reference: Option<String>,
}

/// A deposit or a withdrawal that has been posted.
#[derive(Serialize, ToSchema)]
pub(super) struct Transfer {
    #[serde(rename = "transfer_id")]
    id: String,
    account_id: Uuid,
    currency: String,
    amount: Amount,
    /// The account's balance after it.
    balance: Amount,
    /// The account's hold after it.
    hold: Amount,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

#[derive(sqlx::FromRow)]
struct Moved {
    outcome: String,
    transfer_id: Option<i64>,
    currency: Option<String>,
    balance: Option<Amount>,
    hold: Option<Amount>,
    created_at: Option<OffsetDateTime>,
}

/// Accounts of a user, at most: `/account/list` has no pages. Two that are opened at the same moment may both find room.
const MOST_ACCOUNTS: i64 = 100;

/// Opens an account of the caller.
#[utoipa::path(
    post, path = "/account/add", tag = "trade", security(("access_token" = [])), request_body = NewAccount,
    responses((status = 201, body = Account)),
)]
pub(super) async fn add_account(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<NewAccount>,
) -> Result<(StatusCode, Json<Account>), ApiError> {
    check_name(&request.name)?;
    check_currency(&request.currency)?;
    let mut transaction = app.db.begin().await?;
    require_user(&mut transaction, &caller).await?;
    let added: Option<AccountRow> = sqlx::query_as(
        "insert into accounts (id, lane, user_id, currency, name)
         select $1, $2, $3, $4, $5
         where (select count(*) from accounts where user_id = $3 and deleted_at is null and kind = 'user') < $6
         returning id, currency, (select kind from currencies where symbol = currency) as kind, name, state, balance, hold,
                   created_at",
    )
    .bind(Uuid::now_v7())
    .bind(&caller.lane)
    .bind(caller.user_id)
    .bind(&request.currency)
    .bind(&request.name)
    .bind(MOST_ACCOUNTS)
    .fetch_optional(&mut *transaction)
    .await
    .map_err(|error| match error.as_database_error() {
        Some(cause) if cause.is_unique_violation() => refused("account_exists", Some("name")),
        Some(cause) if cause.is_foreign_key_violation() => refused("unknown_currency", Some("currency")),
        _ => ApiError::from(error),
    })?;
    let added = added.ok_or_else(|| refused("account_limit", None))?;
    tell_change(&mut transaction, &caller, &added, "added").await?;
    transaction.commit().await?;
    Ok((
        StatusCode::CREATED,
        Json(added.try_into().map_err(ApiError::internal)?),
    ))
}

/// Changes the name or the state of an account; never its balance.
#[utoipa::path(
    post, path = "/account/update", tag = "trade", security(("access_token" = [])), request_body = AccountUpdate,
    responses((status = 200, body = Account)),
)]
pub(super) async fn update_account(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<AccountUpdate>,
) -> Result<Json<Account>, ApiError> {
    if let Some(name) = &request.name {
        check_name(name)?;
    }
    let mut transaction = app.db.begin().await?;
    let mut change = "updated";
    let updated: Option<AccountRow> = if app.release.has_freezes {
        let renamed = sqlx::query_as(
            "update accounts set name = coalesce($4, name), updated_at = now()
             where id = $1 and user_id = $2 and lane = $3 and deleted_at is null
             returning id, currency, (select kind from currencies where symbol = currency) as kind, name, state, balance,
                       hold, created_at",
        )
        .bind(request.account_id)
        .bind(caller.user_id)
        .bind(&caller.lane)
        .bind(&request.name)
        .fetch_optional(&mut *transaction)
        .await;
        let mut renamed: Option<AccountRow> = renamed.map_err(name_taken)?;
        if let Some(account) = &mut renamed {
            if let Some(state) = request.state {
                if freezes::set(&mut transaction, account.id, &caller.lane, state).await? {
                    change = state.change();
                }
                account.state = state;
            }
            account.frozen_at = freezes::frozen_at(&mut transaction, account.id).await?;
        }
        renamed
    } else {
        sqlx::query_as(
            "update accounts set name = coalesce($4, name), state = coalesce($5, state), updated_at = now()
             where id = $1 and user_id = $2 and lane = $3 and deleted_at is null
             returning id, currency, (select kind from currencies where symbol = currency) as kind, name, state, balance,
                       hold, created_at",
        )
        .bind(request.account_id)
        .bind(caller.user_id)
        .bind(&caller.lane)
        .bind(&request.name)
        .bind(request.state)
        .fetch_optional(&mut *transaction)
        .await
        .map_err(name_taken)?
    };
    let updated = updated.ok_or_else(|| refused("account_not_found", Some("account_id")))?;
    tell_change(&mut transaction, &caller, &updated, change).await?;
    transaction.commit().await?;
    Ok(Json(updated.try_into().map_err(ApiError::internal)?))
}

fn name_taken(error: sqlx::Error) -> ApiError {
    match error.as_database_error() {
        Some(cause) if cause.is_unique_violation() => refused("account_exists", Some("name")),
        _ => error.into(),
    }
}

/// Closes an empty account that no open order names. Its entries stay in the ledger; its name is free again.
#[utoipa::path(
    post, path = "/account/delete", tag = "trade", security(("access_token" = [])), request_body = AccountChoice,
    responses((status = 204)),
)]
pub(super) async fn delete_account(
    State(app): State<App>,
    caller: Caller,
    Body(request): Body<AccountChoice>,
) -> Result<StatusCode, ApiError> {
    let mut transaction = app.db.begin().await?;
    let found: Option<AccountRow> = sqlx::query_as(
        "select accounts.id, currency, currencies.kind, name, state, balance, hold, created_at
         from accounts join currencies on symbol = currency
         where accounts.id = $1 and user_id = $2 and lane = $3 and deleted_at is null for no key update of accounts",
    )
    .bind(request.account_id)
    .bind(caller.user_id)
    .bind(&caller.lane)
    .fetch_optional(&mut *transaction)
    .await?;
    let account = found.ok_or_else(|| refused("account_not_found", Some("account_id")))?;
    if !account.balance.is_zero() || !account.hold.is_zero() {
        return Err(refused("account_not_empty", Some("account_id")));
    }
    // Read after the lock, which whoever places or fills an order takes too.
    let in_use: bool = sqlx::query_scalar(
        "select exists (select from orders
                        where user_id = $1 and status = 'open' and $2 in (base_account_id, quote_account_id))",
    )
    .bind(caller.user_id)
    .bind(account.id)
    .fetch_one(&mut *transaction)
    .await?;
    if in_use {
        return Err(refused("account_in_use", Some("account_id")));
    }
    sqlx::query("update accounts set deleted_at = now(), updated_at = now() where id = $1")
        .bind(account.id)
        .execute(&mut *transaction)
        .await?;
    tell_change(&mut transaction, &caller, &account, "deleted").await?;
    transaction.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The caller's accounts, oldest first.
#[utoipa::path(
    get, path = "/account/list", tag = "trade", security(("access_token" = [])),
    responses((status = 200, body = AccountList)),
)]
pub(super) async fn list_accounts(
    State(app): State<App>,
    caller: Caller,
) -> Result<Json<AccountList>, ApiError> {
    let query = if app.release.has_freezes {
        sqlx::query_as(
            "select accounts.id, currency, currencies.kind, name, state, balance, hold, created_at, frozen_at
             from accounts join currencies on symbol = currency
                  left join freezes on account_id = accounts.id and lifted_at is null
             where user_id = $1 and accounts.lane = $2 and deleted_at is null and accounts.kind = 'user'
             order by created_at, accounts.id",
        )
    } else {
        sqlx::query_as(
            "select accounts.id, currency, currencies.kind, name, state, balance, hold, created_at
             from accounts join currencies on symbol = currency
             where user_id = $1 and lane = $2 and deleted_at is null and accounts.kind = 'user'
             order by created_at, accounts.id",
        )
    };
    let query = query.bind(caller.user_id).bind(&caller.lane);
    let rows: Vec<AccountRow> = query.fetch_all(&app.db).await?;
    let accounts = rows.into_iter().map(Account::try_from).collect::<Result<_, _>>();
    Ok(Json(AccountList {
        accounts: accounts.map_err(ApiError::internal)?,
    }))
}

/// Credits money that has come in. For callers with the scope `treasury`; in a test lane, for whoever holds its secret.
#[utoipa::path(
    post, path = "/account/deposit", tag = "trade", security(("access_token" = [])), request_body = Movement,
    params(
        ("Idempotency-Key" = String, Header, description = "Repeating a request with its key gives its answer again",
         min_length = 1, max_length = 128),
        ("x-exchange-lane-secret" = Option<String>, Header, description = "In a test lane: the secret of its stack"),
    ),
    responses((status = 201, body = Transfer)),
)]
pub(super) async fn deposit(
    State(app): State<App>,
    caller: Caller,
    headers: HeaderMap,
    key: Key,
    Body(request): Body<Movement>,
) -> Result<Answer<Value>, ApiError> {
    if !auth::opens_lane(&app, &headers, &caller.lane) {
        caller.require(auth::TREASURY)?;
    }
    move_external(&app, &caller, &key, "deposit", request).await
}

/// Takes money out of an account of the caller.
#[utoipa::path(
    post, path = "/account/withdraw", tag = "trade", security(("access_token" = [])), request_body = Movement,
    params(("Idempotency-Key" = String, Header, description = "Repeating a request with its key gives its answer again",
            min_length = 1, max_length = 128)),
    responses((status = 201, body = Transfer)),
)]
pub(super) async fn withdraw(
    State(app): State<App>,
    caller: Caller,
    key: Key,
    Body(request): Body<Movement>,
) -> Result<Answer<Value>, ApiError> {
    move_external(&app, &caller, &key, "withdrawal", request).await
}

async fn move_external(
    app: &App,
    caller: &Caller,
    key: &Key,
    kind: &str,
    request: Movement,
) -> Result<Answer<Value>, ApiError> {
    if request.amount.is_zero() {
        return Err(ApiError::invalid_field("amount", "must be above zero"));
    }
    let reference = request.reference.as_deref();
    if reference.is_some_and(|text| text.chars().count() > LONGEST_REFERENCE || text.contains('\0')) {
        return Err(ApiError::invalid_field(
            "reference",
            "at most 128 characters, none of them NUL",
        ));
    }
    let mut transaction = app.db.begin().await?;
    require_user(&mut transaction, caller).await?;
    let claimed = idempotency::claim(
        &mut transaction,
        (caller.user_id, &caller.lane),
        key,
        &(kind, &request),
    )
    .await?;
    if let Some(body) = claimed {
        return Ok(Answer { body, hit: true });
    }
    let moved: Moved = sqlx::query_as(
        "select outcome, transfer_id, currency, balance, hold, created_at
         from move_external_v1($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&caller.lane)
    .bind(kind)
    .bind(request.account_id)
    .bind(caller.user_id)
    .bind(request.amount)
    .bind(reference)
    .bind(TraceContext::current().map(|trace| trace.headers()))
    .fetch_one(&mut *transaction)
    .await?;
    let (Some(transfer_id), Some(currency), Some(balance), Some(hold), Some(created_at)) = (
        moved.transfer_id,
        moved.currency,
        moved.balance,
        moved.hold,
        moved.created_at,
    ) else {
        let field = match moved.outcome.as_str() {
            "account_not_found" | "account_frozen" => "account_id",
            _ => "amount",
        };
        return Err(refused(&moved.outcome, Some(field)));
    };
    let transfer = Transfer {
        id: transfer_id.to_string(),
        account_id: request.account_id,
        currency,
        amount: request.amount,
        balance,
        hold,
        created_at,
    };
    let body = serde_json::to_value(transfer).map_err(ApiError::internal)?;
    idempotency::record(&mut transaction, caller.user_id, key, &body).await?;
    transaction.commit().await?;
    Ok(Answer { body, hit: false })
}

/// A token outlives its user by minutes: whoever is gone opens no account and moves no money. The lock makes a deletion wait,
/// which then finds what has been written.
async fn require_user(connection: &mut PgConnection, caller: &Caller) -> Result<(), ApiError> {
    let known: Option<i32> =
        sqlx::query_scalar("select 1 from users where id = $1 and deleted_at is null for share")
            .bind(caller.user_id)
            .fetch_optional(connection)
            .await?;
    known.ok_or(error::UNAUTHENTICATED)?;
    Ok(())
}

/// Writes the event of a change, in the transaction of the change.
async fn tell_change(
    connection: &mut PgConnection,
    caller: &Caller,
    account: &AccountRow,
    change: &str,
) -> Result<(), sqlx::Error> {
    let payload = json!({
        "user_id": caller.user_id, "account_id": account.id, "change": change, "currency": account.currency,
    });
    let event = Event {
        lane: caller.lane.clone(),
        topic: Topic::AccountChanged,
        key: caller.user_id.to_string(),
        payload,
    };
    outbox::enqueue(connection, &event).await?;
    Ok(())
}

/// Spares the database what cannot be a currency.
fn check_currency(currency: &str) -> Result<(), ApiError> {
    if (2..=10).contains(&currency.len()) && currency.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(refused("unknown_currency", Some("currency")))
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let length = name.chars().count();
    if (1..=LONGEST_NAME).contains(&length) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::invalid_field(
        "name",
        "1 to 64 characters, no control characters",
    ))
}
