//! The user service: registration, passwords and test lanes; `session` and `personal` have the rest.
//!
//! The answers to a registration, and those to a failed log-in, are the same in status, text and time for known and unknown
//! e-mail addresses. Whoever takes a free one learns that it was: nobody confirms that it is theirs.

use std::{collections::HashSet, time::Duration};

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, request::Parts},
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool, Postgres, Transaction, postgres::PgQueryResult};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use crate::{
    app::App,
    auth::{self, Jwk},
    config::Config,
    error::{self, ApiError, Problem},
    extract::{Body, ClientAddress},
    lane::Lane,
    limit::Limit,
    metrics::RequestLane,
    migrate,
    personal::{self, ACCOUNTS_NOT_EMPTY},
    role::Role,
    session::{self, INVALID_REFRESH_TOKEN, Session, WRONG_CREDENTIALS},
};

/// The lane is not one of this stack, or the secret is wrong.
pub const LANE_REFUSED: Problem = Problem::new(
    StatusCode::FORBIDDEN,
    "lane_refused",
    "This lane is not open to the caller.",
);

/// The failures that only this service has.
pub const PROBLEMS: &[Problem] = &[
    WRONG_CREDENTIALS,
    INVALID_REFRESH_TOKEN,
    ACCOUNTS_NOT_EMPTY,
    LANE_REFUSED,
];

/// How often keys and old rows are looked after; longer than a process that can reach the database takes to announce itself.
const HOUSEKEEPING: Duration = Duration::from_mins(1);

/// How long a test lane stays after the last token of its users: whoever tests something may look at what has come of it.
const LANE_UNUSED: Duration = Duration::from_hours(1);

/// Rows of a kind removed at a time.
const PORTION: i64 = 5_000;

/// The routes of the user service.
pub fn router(app: App) -> OpenApiRouter {
    routes().with_state(app)
}

/// The same before they are bound to an application, for the API's description.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(session::login))
        .routes(routes!(session::refresh))
        .routes(routes!(session::logout))
        .routes(routes!(personal::profile, personal::update_profile))
        .routes(routes!(change_password))
        .routes(routes!(personal::export))
        .routes(routes!(personal::delete_user))
        .routes(routes!(erase_lane))
        .routes(routes!(jwks))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Registration {
    /// An e-mail address of at most 254 characters; case does not matter.
    #[schema(example = "ada@example.org")]
    email: String,
    /// 12 to 256 characters.
    #[schema(value_type = String, format = Password)]
    password: SecretString,
    /// At most 100 characters.
    #[serde(default)]
    display_name: Option<String>,
    /// A language tag, for messages to the user; `en` if not given.
    #[serde(default)]
    locale: Option<String>,
}

/// Says no more than that the request was well-formed.
#[derive(Serialize, ToSchema)]
struct Accepted {
    /// `accepted`
    status: &'static str,
}

/// Registers a user, who can then log in. The answer is the same when the address is registered already: then nothing
/// changes.
///
/// With `x-exchange-lane` and `x-exchange-lane-secret` the user is registered in a test lane of this stack.
#[utoipa::path(
    post, path = "/register", tag = "user", request_body = Registration,
    params(
        ("x-exchange-lane" = Option<String>, Header, description = "The test lane to register in"),
        ("x-exchange-lane-secret" = Option<String>, Header, description = "The secret of the stack's test lanes"),
    ),
    responses((status = 202, body = Accepted)),
)]
async fn register(
    State(app): State<App>,
    ClientAddress(address): ClientAddress,
    lane: ChosenLane,
    headers: HeaderMap,
    Body(registration): Body<Registration>,
) -> Result<(StatusCode, Json<Accepted>), ApiError> {
    let ChosenLane(lane) = lane;
    if !lane.is_live() && !auth::opens_lane(&app, &headers, &lane) {
        return Err(LANE_REFUSED.into());
    }
    let email = valid_email(&registration.email)?;
    valid_new_password("password", &registration.password)?;
    let display_name = registration
        .display_name
        .as_deref()
        .map(personal::valid_display_name)
        .transpose()?;
    let locale = registration
        .locale
        .as_deref()
        .map_or(Ok("en"), personal::valid_locale)?;
    let attempt = if lane.is_live() {
        let limit = Limit::new(
            "register",
            &address.to_string(),
            app.config.login_attempts_per_address,
        );
        Some(limit.begin(&app.db).await?)
    } else {
        None
    };
    let hash = app.passwords.hash(address, registration.password).await?;
    if let Some(attempt) = attempt {
        attempt.count().await?;
    }
    let user_id = Uuid::now_v7();
    // A known address is written as it is: a transaction that writes nothing commits without waiting for the disk, and
    // would be told from one that writes by its time.
    sqlx::query(
        "insert into users (id, lane, email, password_hash, display_name, locale)
         values ($1, $2, $3, $4, nullif($5, ''), $6)
         on conflict on constraint users_email_unique do update set email = excluded.email",
    )
    .bind(user_id)
    .bind(&lane)
    .bind(email)
    .bind(hash)
    .bind(display_name)
    .bind(locale)
    .execute(&app.db)
    .await?;
    Ok((StatusCode::ACCEPTED, Json(Accepted { status: "accepted" })))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PasswordChange {
    #[schema(value_type = String, format = Password)]
    current_password: SecretString,
    /// 12 to 256 characters.
    #[schema(value_type = String, format = Password)]
    new_password: SecretString,
}

/// Changes the password, and ends all other sessions of the user.
#[utoipa::path(
    post, path = "/password", tag = "user", security(("access_token" = [])), request_body = PasswordChange,
    responses((status = 204)),
)]
async fn change_password(
    State(app): State<App>,
    Session(caller): Session,
    ClientAddress(address): ClientAddress,
    Body(change): Body<PasswordChange>,
) -> Result<StatusCode, ApiError> {
    valid_new_password("new_password", &change.new_password)?;
    let attempt = password_changes(&app.config, caller.user_id)
        .begin(&app.db)
        .await?;
    let hash: Option<String> = sqlx::query_scalar("select password_hash from users where id = $1")
        .bind(caller.user_id)
        .fetch_optional(&app.db)
        .await?
        .flatten();
    if !app
        .passwords
        .verify(address, change.current_password, hash.clone())
        .await?
    {
        attempt.count().await?;
        return Err(WRONG_CREDENTIALS.into());
    }
    attempt.forgive().await;
    let new_hash = app.passwords.hash(address, change.new_password).await?;
    let mut transaction = app.db.begin().await?;
    // Of two changes at the same time one has verified a password that is not the current one any more.
    let changed = sqlx::query(
        "update users set password_hash = $3, updated_at = now() where id = $1 and password_hash = $2",
    )
    .bind(caller.user_id)
    .bind(hash)
    .bind(new_hash)
    .execute(&mut *transaction)
    .await?;
    if changed.rows_affected() == 0 {
        return Err(WRONG_CREDENTIALS.into());
    }
    sqlx::query(
        "update sessions set revoked_at = now() where user_id = $1 and id <> $2 and revoked_at is null",
    )
    .bind(caller.user_id)
    .bind(caller.session_id)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    info!(user.id = %caller.user_id, "a user has changed the password");
    Ok(StatusCode::NO_CONTENT)
}

/// Changes of a user's password that may fail.
pub(crate) fn password_changes(config: &Config, user_id: Uuid) -> Limit {
    Limit::new(
        "password",
        &user_id.to_string(),
        config.login_attempts_per_account,
    )
}

/// Erases a test lane of this stack, with everything in it.
#[utoipa::path(
    delete, path = "/lane", tag = "user",
    params(
        ("x-exchange-lane" = String, Header, description = "The test lane"),
        ("x-exchange-lane-secret" = String, Header, description = "The secret of the stack's test lanes"),
    ),
    responses((status = 204)),
)]
async fn erase_lane(
    State(app): State<App>,
    ChosenLane(lane): ChosenLane,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    if !auth::opens_lane(&app, &headers, &lane) {
        return Err(LANE_REFUSED.into());
    }
    let mut transaction = app.db.begin().await?;
    erase(&mut transaction, lane.as_str()).await?;
    transaction.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Erases a lane in a transaction of its own, which may take longer than others: a load test leaves many rows.
async fn erase(transaction: &mut PgConnection, lane: &str) -> Result<(), sqlx::Error> {
    sqlx::query("set local statement_timeout = '2min'")
        .execute(&mut *transaction)
        .await?;
    sqlx::query("select erase_lane_v1($1)")
        .bind(lane)
        .execute(transaction)
        .await?;
    Ok(())
}

/// The keys that verify access tokens.
#[derive(Serialize, ToSchema)]
struct JwkSet {
    keys: Vec<Jwk>,
}

/// The public keys that verify access tokens: all that are unexpired, also the one that will sign next.
#[utoipa::path(get, path = "/.well-known/jwks.json", tag = "user", responses((status = 200, body = JwkSet)))]
async fn jwks(State(app): State<App>) -> Result<Json<JwkSet>, ApiError> {
    Ok(Json(JwkSet {
        keys: app.keys.published().await?,
    }))
}

/// The lane that a request without a token names by its header; the live one if it names none.
pub(crate) struct ChosenLane(pub(crate) Lane);

impl FromRequestParts<App> for ChosenLane {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        let lane = match parts.headers.get(auth::LANE_HEADER) {
            None => Lane::live(),
            Some(value) => {
                let lane = value.to_str().ok().and_then(|text| text.parse().ok());
                lane.ok_or_else(|| ApiError::from(error::INVALID_PARAMETER).field(auth::LANE_HEADER))?
            }
        };
        if let Some(known) = parts.extensions.get::<RequestLane>() {
            known.set(&lane);
        }
        Ok(Self(lane))
    }
}

/// While this stack is live: makes the next signing key in time, and removes what has expired and the test lanes that nobody
/// uses any more.
pub async fn run(app: App, shutdown: CancellationToken) {
    let mut housekeeping = Housekeeping::default();
    while shutdown
        .run_until_cancelled(tokio::time::sleep(HOUSEKEEPING))
        .await
        .is_some()
    {
        if *app.role.borrow() != Role::Live {
            continue;
        }
        if let Err(error) = app.keys.ensure_keys().await {
            warn!(error.message = %error, "the signing keys could not be looked after; it is tried again");
        }
        let token_lifetime = app.config.access_token_lifetime;
        if let Err(error) = housekeeping.clean_up(&app.db, token_lifetime).await {
            warn!(error.message = %error, "housekeeping failed; it is tried again");
        }
    }
}

/// What one round of housekeeping must know of the one before.
#[derive(Debug, Default)]
pub struct Housekeeping {
    /// Test lanes that nobody seemed to use.
    suspects: HashSet<String>,
}

impl Housekeeping {
    /// One round of housekeeping; nothing if another process is at it.
    ///
    /// A test lane is erased when its stack is gone, or when for an hour nobody has had a token of it: whoever opened it has been
    /// killed before the end. That must be so in two rounds in a row: after a time without a database those who are alive look
    /// gone, until they have had the time to announce themselves.
    pub async fn clean_up(&mut self, db: &PgPool, token_lifetime: Duration) -> Result<(), sqlx::Error> {
        let suspects = std::mem::take(&mut self.suspects);
        while let Some(mut transaction) = alone(db).await? {
            let all = remove_expired(&mut transaction).await?;
            transaction.commit().await?;
            if all {
                break;
            }
        }
        let Some(mut transaction) = alone(db).await? else {
            return Ok(());
        };
        let abandoned: Vec<String> = sqlx::query_scalar(
            "select lane from (select distinct lane from users where lane <> 'live') as lanes
             where not exists (
                 select from instances
                 where stack = split_part(substr(lane, 6), '.', 1) and seen_at > now() - make_interval(secs => $1)
             ) or not exists (
                 select from users left join sessions on sessions.user_id = users.id
                     left join refresh_tokens on refresh_tokens.session_id = sessions.id
                 where users.lane = lanes.lane and now() - make_interval(secs => $2)
                     < greatest(users.created_at, sessions.created_at, refresh_tokens.created_at)
             )",
        )
        .bind(migrate::INSTANCE_GONE_AFTER.as_secs_f64())
        .bind((LANE_UNUSED + token_lifetime).as_secs_f64())
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.suspects = abandoned.into_iter().collect();
        for lane in self.suspects.intersection(&suspects) {
            let Some(mut transaction) = alone(db).await? else {
                return Ok(());
            };
            // One that cannot be erased keeps none of the others.
            if let Err(error) = erase(&mut transaction, lane).await {
                warn!(error.message = %error, "the test lane {lane} could not be erased");
                transaction.rollback().await?;
                continue;
            }
            transaction.commit().await?;
            info!("erased the test lane {lane}, which nobody uses any more");
        }
        Ok(())
    }
}

/// A transaction of housekeeping; none if another process is at it.
async fn alone(db: &PgPool) -> Result<Option<Transaction<'static, Postgres>>, sqlx::Error> {
    let mut transaction = db.begin().await?;
    let alone: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtext('housekeeping'))")
        .fetch_one(&mut *transaction)
        .await?;
    Ok(alone.then_some(transaction))
}

/// Removes a portion of what has expired, which is done in time; says whether that was all.
async fn remove_expired(transaction: &mut PgConnection) -> Result<bool, sqlx::Error> {
    // Those of a user who is being deleted go with the user.
    let limits = sqlx::query(
        "delete from rate_limits where key in (
             select key from rate_limits where window_ends_at < now() limit $1 for update skip locked)",
    )
    .bind(PORTION)
    .execute(&mut *transaction)
    .await?;
    // A session has one for each few minutes of its life: too many to go with it. Whoever has locked the session is at its
    // tokens, or will be.
    let tokens = sqlx::query(
        "delete from refresh_tokens where hash in (
             select hash from refresh_tokens join sessions on sessions.id = session_id
             where expires_at < now() limit $1 for update of sessions skip locked)",
    )
    .bind(PORTION)
    .execute(&mut *transaction)
    .await?;
    let sessions = sqlx::query(
        "delete from sessions where id in (
             select id from sessions where expires_at < now()
                 and not exists (select from refresh_tokens where session_id = sessions.id)
             limit $1 for update skip locked)",
    )
    .bind(PORTION)
    .execute(&mut *transaction)
    .await?;
    sqlx::query("delete from instances where seen_at < now() - interval '1 day'")
        .execute(transaction)
        .await?;
    let all = |removed: PgQueryResult| removed.rows_affected() < PORTION.unsigned_abs();
    Ok(all(limits) && all(tokens) && all(sessions))
}

/// The address as it is stored and compared, or nothing if it cannot be one.
pub(crate) fn normal_email(email: &str) -> Option<String> {
    let (local, domain) = email.rsplit_once('@')?;
    let allowed = |character: char| !character.is_whitespace() && !character.is_control() && character != '@';
    let valid = email.len() <= 254
        && !local.is_empty()
        && !domain.is_empty()
        && local.chars().all(allowed)
        && domain
            .chars()
            .all(|character| character.is_alphanumeric() || matches!(character, '-' | '.'));
    valid.then(|| email.to_lowercase())
}

fn valid_email(email: &str) -> Result<String, ApiError> {
    normal_email(email).ok_or_else(|| ApiError::invalid_field("email", "this is not an e-mail address"))
}

fn valid_new_password(field: &str, password: &SecretString) -> Result<(), ApiError> {
    match password.expose_secret().chars().count() {
        12..=256 => Ok(()),
        _ => Err(ApiError::invalid_field(field, "use 12 to 256 characters")),
    }
}
