//! The trade service: accounts, the ledger, orders and trades. The only writer of money.
//!
//! Money moves in the database, in functions that both colours share (see `migrations/expand/0004_settlement.sql`).
//! This module checks requests, hands them over and says what came out.

mod batch;
pub mod book;
mod freezes;
mod ledger;
mod orders;
mod views;

pub(crate) use orders::check_product;
pub(crate) use views::require_product;

use std::time::Instant;

use axum::Extension;
use http::StatusCode;
use prometheus_client::metrics::{
    counter::Counter,
    family::Family,
    histogram::{Histogram, exponential_buckets},
};
use serde::{Deserialize, Serialize};
use sqlx::Connection;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    app::App,
    error::{ApiError, Problem},
    idempotency::{self, KEY_REUSED},
    metrics::Known,
    role,
};

use batch::{Books, Settled};

/// Whether an order buys or sells the base currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Buys the base currency.
    Buy,
    /// Sells the base currency.
    Sell,
}

impl Side {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Buy => "buy",
            Self::Sell => "sell",
        }
    }
}

/// What becomes of what is not matched at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum TimeInForce {
    /// It stays in the book until it is cancelled.
    Gtc,
    /// It is cancelled.
    Ioc,
}

impl TimeInForce {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gtc => "gtc",
            Self::Ioc => "ioc",
        }
    }
}

const fn unprocessable(code: &'static str, title: &'static str) -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, code, title)
}

const fn conflict(code: &'static str, title: &'static str) -> Problem {
    Problem::new(StatusCode::CONFLICT, code, title)
}

/// What the trade service refuses, beside what every service does. The database functions use the same codes.
pub const PROBLEMS: &[Problem] = &[
    unprocessable("unknown_currency", "There is no such currency."),
    unprocessable("unknown_product", "There is no such product."),
    unprocessable("size_too_small", "The size is below the product's minimum."),
    unprocessable(
        "size_increment",
        "The size is not a multiple of the product's increment.",
    ),
    unprocessable(
        "price_increment",
        "The price is not a multiple of the product's increment.",
    ),
    unprocessable("value_too_large", "The order is worth more than an order may be."),
    unprocessable("currency_mismatch", "The account is in another currency."),
    unprocessable(
        "amount_increment",
        "The amount has more digits than the currency.",
    ),
    unprocessable(
        "balance_limit",
        "The account would hold more than an account may.",
    ),
    conflict("product_halted", "The product is not being traded."),
    conflict("account_frozen", "The account is frozen."),
    conflict("account_exists", "There is an account of this currency and name."),
    conflict("account_limit", "There are as many accounts as a user may have."),
    conflict("account_not_empty", "The account has a balance or a hold."),
    conflict("account_in_use", "An open order names the account."),
    conflict(
        "open_order_limit",
        "There are as many open orders in the product as a user may have.",
    ),
    conflict("insufficient_funds", "The account has not enough available."),
    conflict("order_filled", "The order has been filled."),
    Problem::new(
        StatusCode::NOT_FOUND,
        "account_not_found",
        "There is no such account.",
    ),
    Problem::new(
        StatusCode::NOT_FOUND,
        "order_not_found",
        "There is no such order.",
    ),
    KEY_REUSED,
];

/// The problem that a database function names, with the field at fault.
fn refused(code: &str, field: Option<&str>) -> ApiError {
    let Some(problem) = PROBLEMS.iter().find(|problem| problem.code == code) else {
        return ApiError::internal(format!("the database refuses for an unknown reason: {code}"));
    };
    let refusal = ApiError::from(*problem);
    match field {
        Some(field) => refusal.field(field),
        None => refusal,
    }
}

/// What the service counts.
#[derive(Clone)]
struct Counters {
    orders: Family<[(&'static str, &'static str); 1], Counter>,
    trades: Counter,
    batch_sizes: Histogram,
}

impl Counters {
    fn new(app: &App) -> Self {
        let counters = Self {
            orders: Family::default(),
            trades: Counter::default(),
            batch_sizes: Histogram::new(exponential_buckets(1.0, 2.0, 7)),
        };
        app.metrics.register(|registry| {
            registry.register(
                "orders",
                "Orders by outcome: accepted, replayed, or the code of the refusal",
                counters.orders.clone(),
            );
            registry.register(
                "trades",
                "Trades settled by this process",
                counters.trades.clone(),
            );
            registry.register(
                "order_batch_size",
                "Orders per settlement transaction",
                counters.batch_sizes.clone(),
            );
        });
        counters
    }

    /// Counts an order that was taken, now or when it came first.
    fn settled(&self, order: &Settled) {
        let outcome = if order.is_replay() {
            "replayed"
        } else {
            let trades = order.trade_ids.as_ref().map_or(0, Vec::len);
            self.trades.inc_by(u64::try_from(trades).unwrap_or(u64::MAX));
            "accepted"
        };
        self.orders.get_or_create(&[("outcome", outcome)]).inc();
    }

    /// Counts an order that was not.
    fn refused(&self, refusal: &ApiError) {
        let outcome = refusal.problem.code;
        self.orders.get_or_create(&[("outcome", outcome)]).inc();
    }
}

/// The routes of the trade service.
pub fn router(app: App) -> OpenApiRouter {
    let counters = Counters::new(&app);
    let books = Books::new(app.db.clone(), counters.clone());
    routes()
        .layer(Extension(books))
        .layer(Extension(counters))
        .with_state(app)
}

/// The same before they are bound to an application, for the API's description.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(ledger::add_account))
        .routes(routes!(ledger::update_account))
        .routes(routes!(ledger::delete_account))
        .routes(routes!(ledger::list_accounts))
        .routes(routes!(ledger::deposit))
        .routes(routes!(ledger::withdraw))
        .routes(routes!(views::list_products))
        .routes(routes!(orders::add_order))
        .routes(routes!(orders::cancel_order))
        .routes(routes!(views::trades_of_account))
        .routes(routes!(views::read_book))
}

/// What an audit has found, and when. Not there before the first; what it has found, not once the stack is not live.
#[derive(Default)]
struct Audited {
    imbalance: Known<i64>,
    at: Known<i64>,
    took: Known<f64>,
}

impl Audited {
    fn register(app: &App) -> Self {
        let audited = Self::default();
        app.metrics.register(|registry| {
            registry.register(
                "ledger_imbalance",
                "Things that the last audit of the live ledger found wrong",
                audited.imbalance.clone(),
            );
            registry.register(
                "ledger_audited_timestamp_seconds",
                "When this process last audited the live ledger, in Unix seconds",
                audited.at.clone(),
            );
            registry.register(
                "ledger_audit_duration_seconds",
                "How long that took",
                audited.took.clone(),
            );
        });
        audited
    }
}

/// While this stack is live: audits the ledger of the live lane and forgets idempotency keys after their time.
pub async fn run(app: App, shutdown: CancellationToken) {
    let audited = Audited::register(&app);
    let mut role = app.role.clone();
    while role::until_live(&mut role, &shutdown).await {
        tokio::select! {
            () = role::until_not_live(&mut role, &shutdown) => {}
            () = keep_the_books(&app, &audited) => {}
        }
        // From now on it is another stack's to say.
        audited.imbalance.forget();
    }
}

async fn keep_the_books(app: &App, audited: &Audited) {
    let mut pace = tokio::time::interval(app.config.audit_interval);
    loop {
        pace.tick().await;
        let (began, at) = (Instant::now(), OffsetDateTime::now_utc());
        match audit(app).await {
            Ok(Some(found)) => {
                for problem in &found {
                    error!(
                        labels.problem = problem.0,
                        labels.subject = problem.1,
                        "the ledger is wrong"
                    );
                }
                audited
                    .imbalance
                    .set(i64::try_from(found.len()).unwrap_or(i64::MAX));
                audited.at.set(at.unix_timestamp());
                audited.took.set(began.elapsed().as_secs_f64());
            }
            Ok(None) => {}
            Err(failure) => warn!(error.message = %failure, "the ledger could not be audited"),
        }
        if let Err(failure) = idempotency::forget_old(&app.db).await {
            warn!(error.message = %failure, "old idempotency keys could not be forgotten");
        }
    }
}

/// What is wrong, as problem and subject; none if another process is auditing.
async fn audit(app: &App) -> Result<Option<Vec<(String, String)>>, sqlx::Error> {
    let mut connection = app.db.acquire().await?;
    // Nothing else ends an audit that nobody waits for any more, whether the process was told to stop or killed: without this
    // its connection would first be waited for, and PostgreSQL would go on by itself.
    connection.close_on_drop();
    let mut transaction = connection.begin().await?;
    // One snapshot: the sums of a ledger that is being written must be of one moment.
    sqlx::raw_sql(
        "set transaction isolation level repeatable read, read only;
         set local statement_timeout = 0;
         set local client_connection_check_interval = '1s'",
    )
    .execute(&mut *transaction)
    .await?;
    let (alone,): (bool,) =
        sqlx::query_as("select pg_try_advisory_xact_lock(hashtextextended('ledger audit', 0))")
            .fetch_one(&mut *transaction)
            .await?;
    if !alone {
        return Ok(None);
    }
    let found = sqlx::query_as("select problem, subject from audit_ledger_v1('live')")
        .fetch_all(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(Some(found))
}
