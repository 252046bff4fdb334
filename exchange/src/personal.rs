//! What a user sees, changes, takes along and deletes: its own data, and nobody else's.

use std::{
    collections::HashSet,
    fmt::Display,
    mem,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    body::Body as ResponseBody,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Transaction};
use time::OffsetDateTime;
use tokio::{
    sync::{
        OwnedSemaphorePermit, Semaphore,
        mpsc::{self, error::SendTimeoutError},
    },
    time::timeout,
};
use tracing::{info, warn};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    app::App,
    config::Config,
    error::{self, ApiError, Problem},
    extract::Body,
    limit::{self, Limit},
    session::{self, Session},
    user,
};

/// Something of value is left.
pub const ACCOUNTS_NOT_EMPTY: Problem = Problem::new(
    StatusCode::CONFLICT,
    "accounts_not_empty",
    "Accounts with a balance or a hold are left.",
);

/// Rows of an export that are in memory at a time.
const EXPORTED_AT_ONCE: u32 = 500;
/// How many are under way at a time: each keeps a connection to the database, and what has been deleted since it began.
const EXPORTS: usize = 2;
/// How long an export may take, also for whoever reads it slowly.
const LONGEST_EXPORT: Duration = Duration::from_mins(5);
/// When to come again while another export is under way.
const AWAIT_TURN: Duration = Duration::from_secs(5);

/// The exports that are under way in this process: a few at a time, and one of each user. Clones share them.
#[derive(Clone)]
pub struct Exports {
    turns: Arc<Semaphore>,
    users: Arc<Mutex<HashSet<Uuid>>>,
}

impl Default for Exports {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(EXPORTS)),
            users: Arc::default(),
        }
    }
}

/// An export that is under way.
struct Turn {
    user_id: Uuid,
    exports: Exports,
    _permit: OwnedSemaphorePermit,
}

impl Exports {
    fn begin(&self, user_id: Uuid) -> Result<Turn, ApiError> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.contains(&user_id) {
            return Err(ApiError::from(error::TOO_MANY_REQUESTS)
                .detail("your data are being exported")
                .retry_after(AWAIT_TURN));
        }
        let Ok(permit) = Arc::clone(&self.turns).try_acquire_owned() else {
            // No failure of this version, which a release would be judged by: somebody may ask for exports all day.
            return Err(ApiError::from(error::TOO_MANY_REQUESTS)
                .detail("others' data are being exported")
                .retry_after(AWAIT_TURN));
        };
        users.insert(user_id);
        Ok(Turn {
            user_id,
            exports: self.clone(),
            _permit: permit,
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut users = self.exports.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.remove(&self.user_id);
    }
}

/// Why an export was broken off.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    #[error("its reader has not taken the next part for too long")]
    Unread,
}

/// What a user sees and may change about itself.
#[derive(Serialize, ToSchema, sqlx::FromRow)]
pub(crate) struct Profile {
    id: Uuid,
    email: String,
    display_name: Option<String>,
    locale: String,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
}

/// The caller's profile.
#[utoipa::path(
    get, path = "/profile", tag = "user", security(("access_token" = [])),
    responses((status = 200, body = Profile)),
)]
pub(crate) async fn profile(
    State(app): State<App>,
    Session(caller): Session,
) -> Result<Json<Profile>, ApiError> {
    let profile = sqlx::query_as(
        "select id, email, display_name, locale, created_at from users where id = $1 and deleted_at is null",
    )
    .bind(caller.user_id)
    .fetch_optional(&app.db)
    .await?;
    profile.map(Json).ok_or_else(|| error::UNAUTHENTICATED.into())
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProfileUpdate {
    /// At most 100 characters; empty removes it.
    #[serde(default)]
    display_name: Option<String>,
    /// A language tag.
    #[serde(default)]
    locale: Option<String>,
}

/// Changes what is given, leaves the rest.
#[utoipa::path(
    patch, path = "/profile", tag = "user", security(("access_token" = [])), request_body = ProfileUpdate,
    responses((status = 200, body = Profile)),
)]
pub(crate) async fn update_profile(
    State(app): State<App>,
    Session(caller): Session,
    Body(update): Body<ProfileUpdate>,
) -> Result<Json<Profile>, ApiError> {
    let display_name = update
        .display_name
        .as_deref()
        .map(valid_display_name)
        .transpose()?;
    let locale = update.locale.as_deref().map(valid_locale).transpose()?;
    let profile = sqlx::query_as(
        "update users set display_name = nullif(coalesce($2, display_name), ''), locale = coalesce($3, locale),
             updated_at = now()
         where id = $1 and deleted_at is null
         returning id, email, display_name, locale, created_at",
    )
    .bind(caller.user_id)
    .bind(display_name)
    .bind(locale)
    .fetch_optional(&app.db)
    .await?;
    profile.map(Json).ok_or_else(|| error::UNAUTHENTICATED.into())
}

#[derive(sqlx::FromRow)]
struct Topic {
    name: String,
    export: String,
    erase: Option<String>,
    portion: Option<String>,
    obstacle: Option<String>,
}

/// What is stored about users, as the migrations have registered it.
async fn topics(connection: &mut PgConnection) -> Result<Vec<Topic>, sqlx::Error> {
    sqlx::query_as(
        "select topic as name, export, erase, portion, obstacle from user_data order by position, topic",
    )
    .fetch_all(connection)
    .await
}

/// Fails while something of value is left.
async fn refuse_obstacles(
    connection: &mut PgConnection,
    topics: &[Topic],
    user_id: Uuid,
) -> Result<(), ApiError> {
    for obstacle in topics.iter().filter_map(|topic| topic.obstacle.as_ref()) {
        let stands: bool = sqlx::query_scalar(AssertSqlSafe(obstacle.clone()))
            .bind(user_id)
            .fetch_one(&mut *connection)
            .await?;
        if stands {
            return Err(ACCOUNTS_NOT_EMPTY.into());
        }
    }
    Ok(())
}

/// Everything that is stored about the caller, by topic, and nothing about others. An answer that ends early is broken off,
/// not completed.
#[utoipa::path(
    get, path = "/user/export", tag = "user", security(("access_token" = [])),
    responses((status = 200, body = Value, description = "An array of objects per topic")),
)]
pub(crate) async fn export(State(app): State<App>, Session(caller): Session) -> Result<Response, ApiError> {
    let attempt = exports(&app.config, caller.user_id).begin(&app.db).await?;
    let turn = app.exports.begin(caller.user_id)?;
    let mut transaction = app.db.begin().await?;
    // One moment for all of it. Whoever has traded much has left many rows, and may read them slowly.
    sqlx::raw_sql(
        "set transaction isolation level repeatable read read only;
         set local statement_timeout = '2min';
         set local idle_in_transaction_session_timeout = '5min';
         set local cursor_tuple_fraction = 1",
    )
    .execute(&mut *transaction)
    .await?;
    let topics = topics(&mut transaction).await?;
    attempt.count().await?;
    let (pages, received) = mpsc::channel(1);
    let user_id = caller.user_id;
    let patience = app.config.export_patience;
    // Not by whoever reads: a client that stops to read keeps the database and the turn for no longer than is waited for it.
    tokio::spawn(async move {
        let written = timeout(LONGEST_EXPORT, write(turn, transaction, topics, pages, patience)).await;
        let failure = match &written {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error as &dyn Display,
            Err(too_late) => too_late,
        };
        warn!(user.id = %user_id, error.message = %failure, "an export was broken off");
    });
    let content_type = [(header::CONTENT_TYPE, "application/json")];
    Ok((content_type, ResponseBody::from_stream(read(received))).into_response())
}

/// Exports of a user. Each may hold a turn, and others up, as long as an export may take.
fn exports(config: &Config, user_id: Uuid) -> Limit {
    Limit::new("export", &user_id.to_string(), config.exports_per_user)
}

/// A part of an export.
enum Page {
    More(String),
    Last(String),
}

/// Writes an export until it is complete, or nobody reads it any more.
async fn write(
    turn: Turn,
    mut transaction: Transaction<'static, Postgres>,
    topics: Vec<Topic>,
    pages: mpsc::Sender<Page>,
    patience: Duration,
) -> Result<(), ExportError> {
    let mut page = String::from("{");
    for (number, topic) in topics.into_iter().enumerate() {
        if number > 0 {
            page.push(',');
        }
        page.push_str(&Value::from(topic.name).to_string());
        page.push_str(":[");
        // Written by a migration, which is as trusted as this program.
        let declare = format!(
            "declare rows no scroll cursor for select content::text from ({}) as topic (content)",
            topic.export
        );
        sqlx::query(AssertSqlSafe(declare))
            .bind(turn.user_id)
            .execute(&mut *transaction)
            .await?;
        let mut separator = "";
        loop {
            let rows: Vec<String> =
                sqlx::query_scalar(AssertSqlSafe(format!("fetch {EXPORTED_AT_ONCE} from rows")))
                    .fetch_all(&mut *transaction)
                    .await?;
            if rows.is_empty() {
                break;
            }
            for row in rows {
                page.push_str(separator);
                page.push_str(&row);
                separator = ",\n";
            }
            let part = Page::More(mem::take(&mut page));
            match pages.send_timeout(part, patience).await {
                Ok(()) => {}
                Err(SendTimeoutError::Timeout(_)) => return Err(ExportError::Unread),
                Err(SendTimeoutError::Closed(_)) => return Ok(()),
            }
        }
        sqlx::query("close rows").execute(&mut *transaction).await?;
        page.push(']');
    }
    page.push('}');
    // What comes last waits without the database, and without the turn: whoever has read it may come again at once.
    transaction.rollback().await?;
    drop(turn);
    match pages.send_timeout(Page::Last(page), patience).await {
        Err(SendTimeoutError::Timeout(_)) => Err(ExportError::Unread),
        // A reader who has gone misses nothing.
        Ok(()) | Err(SendTimeoutError::Closed(_)) => Ok(()),
    }
}

/// The pages as a body, which fails unless the last one comes.
fn read(pages: mpsc::Receiver<Page>) -> impl Stream<Item = Result<String, BrokenOff>> {
    stream::try_unfold(Some(pages), |pages| async {
        let Some(mut pages) = pages else { return Ok(None) };
        match pages.recv().await {
            Some(Page::More(page)) => Ok(Some((page, Some(pages)))),
            Some(Page::Last(page)) => Ok(Some((page, None))),
            None => Err(BrokenOff),
        }
    })
}

/// An export ends before its end.
#[derive(Debug, thiserror::Error)]
#[error("the export was broken off")]
struct BrokenOff;

/// A user whom nothing of value keeps, locked together with its accounts.
struct Unobstructed {
    email: Option<String>,
    topics: Vec<Topic>,
}

/// Locks a user, and its accounts in the order in which orders and deposits lock them: what comes first is an obstacle, what
/// comes later finds them gone.
async fn unobstructed(connection: &mut PgConnection, user_id: Uuid) -> Result<Unobstructed, ApiError> {
    let email: Option<String> = sqlx::query_scalar("select email from users where id = $1 for update")
        .bind(user_id)
        .fetch_optional(&mut *connection)
        .await?
        .flatten();
    sqlx::query(
        "select from accounts where user_id = $1 and deleted_at is null order by id for no key update",
    )
    .bind(user_id)
    .execute(&mut *connection)
    .await?;
    let topics = topics(connection).await?;
    refuse_obstacles(connection, &topics, user_id).await?;
    Ok(Unobstructed { email, topics })
}

/// Removes what identifies a user from a topic, if anything does.
async fn erase(connection: &mut PgConnection, topic: &Topic, user_id: Uuid) -> Result<(), sqlx::Error> {
    if let Some(erase) = &topic.erase {
        sqlx::query(AssertSqlSafe(erase.clone()))
            .bind(user_id)
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// Deletes the caller: personal data goes, the ledger's sums stay. Refused while anything of value is left.
#[utoipa::path(
    delete, path = "/user", tag = "user", security(("access_token" = [])),
    responses((status = 204)),
)]
pub(crate) async fn delete_user(
    State(app): State<App>,
    Session(caller): Session,
) -> Result<StatusCode, ApiError> {
    // First what could still get something of value: a deletion that is refused must not have done anything.
    let mut closing = app.db.begin().await?;
    let registered = unobstructed(&mut closing, caller.user_id).await?.topics;
    for topic in &registered {
        if topic.obstacle.is_some() {
            erase(&mut closing, topic, caller.user_id).await?;
        }
    }
    closing.commit().await?;
    // Whoever has traded much has left many rows. They go in portions, while nobody waits for anything that is locked; if that
    // is broken off, the next attempt goes on from there.
    for portion in registered.into_iter().filter_map(|topic| topic.portion) {
        let mut erased = 1;
        while erased > 0 {
            let portion = sqlx::query(AssertSqlSafe(portion.clone())).bind(caller.user_id);
            erased = portion.execute(&app.db).await?.rows_affected();
        }
    }
    let mut transaction = app.db.begin().await?;
    sqlx::query("set local statement_timeout = '2min'")
        .execute(&mut *transaction)
        .await?;
    let Unobstructed { email, topics } = unobstructed(&mut transaction, caller.user_id).await?;
    for topic in &topics {
        erase(&mut transaction, topic, caller.user_id).await?;
    }
    // Last, because log-ins wait for it. Those of addresses stay: who came from there is not in them.
    let mut limits = vec![
        user::password_changes(&app.config, caller.user_id),
        exports(&app.config, caller.user_id),
    ];
    if let Some(email) = email {
        limits.push(session::failed_log_ins(&app.config, &caller.lane, &email));
        limits.push(session::log_ins(&app.config, &caller.lane, &email));
    }
    limit::erase(&mut transaction, &limits).await?;
    transaction.commit().await?;
    info!(user.id = %caller.user_id, "a user has been deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// The name, if it can be one; it may be empty.
pub(crate) fn valid_display_name(name: &str) -> Result<&str, ApiError> {
    if name.chars().count() <= 100 && !name.chars().any(char::is_control) {
        return Ok(name);
    }
    Err(ApiError::invalid_field(
        "display_name",
        "use at most 100 characters, and no control characters",
    ))
}

/// The language tag, if it is one.
pub(crate) fn valid_locale(locale: &str) -> Result<&str, ApiError> {
    let parts_are_valid = locale
        .split('-')
        .all(|part| (1..=8).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    if locale.len() <= 35 && parts_are_valid {
        return Ok(locale);
    }
    Err(ApiError::invalid_field(
        "locale",
        "use a language tag such as en or pt-BR",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_must_wait_for_an_export_is_told_when_and_no_release_is_blamed() {
        let exports = Exports::default();
        let begin = || exports.begin(Uuid::now_v7());
        let under_way: Vec<Turn> = (0..EXPORTS).map(|_| begin().unwrap()).collect();
        let refused = begin().map(drop).unwrap_err();
        assert_eq!(refused.problem, error::TOO_MANY_REQUESTS);
        assert_eq!(refused.retry_after, Some(AWAIT_TURN));
        drop(under_way);
        begin().map(drop).unwrap();
    }
}
