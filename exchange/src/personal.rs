//! What a user sees, changes, takes along and deletes: its own data, and nobody else's.

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{AssertSqlSafe, PgConnection};
use time::OffsetDateTime;
use tracing::info;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    app::App,
    error::{self, ApiError, Problem},
    extract::Body,
    session::Session,
};

/// Something of value is left.
pub const ACCOUNTS_NOT_EMPTY: Problem = Problem::new(
    StatusCode::CONFLICT,
    "accounts_not_empty",
    "Accounts with a balance or a hold are left.",
);
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
    obstacle: Option<String>,
}

/// What is stored about users, as the migrations have registered it.
async fn topics(connection: &mut PgConnection) -> Result<Vec<Topic>, sqlx::Error> {
    sqlx::query_as("select topic as name, export, erase, obstacle from user_data order by position, topic")
        .fetch_all(connection)
        .await
}

/// Everything that is stored about the caller, by topic, and nothing about others.
#[utoipa::path(
    get, path = "/user/export", tag = "user", security(("access_token" = [])),
    responses((status = 200, body = Value, description = "An array of objects per topic")),
)]
pub(crate) async fn export(
    State(app): State<App>,
    Session(caller): Session,
) -> Result<Json<Map<String, Value>>, ApiError> {
    let mut transaction = app.db.begin().await?;
    sqlx::query("set transaction isolation level repeatable read read only")
        .execute(&mut *transaction)
        .await?;
    let mut exported = Map::new();
    for topic in topics(&mut transaction).await? {
        // Written by a migration, which is as trusted as this program.
        let rows: Vec<Value> = sqlx::query_scalar(AssertSqlSafe(topic.export))
            .bind(caller.user_id)
            .fetch_all(&mut *transaction)
            .await?;
        exported.insert(topic.name, rows.into());
    }
    Ok(Json(exported))
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
    let mut transaction = app.db.begin().await?;
    // Whoever has traded much has left many rows to go through. Nobody else waits for them.
    sqlx::query("set local statement_timeout = '2min'")
        .execute(&mut *transaction)
        .await?;
    sqlx::query("select from users where id = $1 for update")
        .bind(caller.user_id)
        .execute(&mut *transaction)
        .await?;
    // In the order in which orders and deposits lock them: what comes first is an obstacle, what comes later finds them gone.
    sqlx::query(
        "select from accounts where user_id = $1 and deleted_at is null order by id for no key update",
    )
    .bind(caller.user_id)
    .execute(&mut *transaction)
    .await?;
    let topics = topics(&mut transaction).await?;
    for obstacle in topics.iter().filter_map(|topic| topic.obstacle.as_ref()) {
        let stands: bool = sqlx::query_scalar(AssertSqlSafe(obstacle.clone()))
            .bind(caller.user_id)
            .fetch_one(&mut *transaction)
            .await?;
        if stands {
            return Err(ACCOUNTS_NOT_EMPTY.into());
        }
    }
    for erase in topics.into_iter().filter_map(|topic| topic.erase) {
        sqlx::query(AssertSqlSafe(erase))
            .bind(caller.user_id)
            .execute(&mut *transaction)
            .await?;
    }
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
