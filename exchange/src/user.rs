//! The user service: registration, sessions and passwords; `personal` has the rest.
//!
//! Nobody learns from it whether an e-mail address is registered: the answers to a registration, and those to a failed
//! log-in, are the same in status, text and time for known and unknown addresses.

use std::time::Duration;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, request::Parts},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use crate::{
    app::App,
    auth::{self, Caller, Jwk},
    error::{self, ApiError, Problem},
    extract::{Body, ClientAddress},
    lane::Lane,
    limit::Limit,
    metrics::RequestLane,
    migrate,
    outbox::{self, Event},
    personal::{self, ACCOUNTS_NOT_EMPTY},
    role::Role,
};

/// Unknown address or wrong password: which of the two is not said.
pub const WRONG_CREDENTIALS: Problem = Problem::new(
    StatusCode::UNAUTHORIZED,
    "wrong_credentials",
    "E-mail address or password are wrong.",
);
/// The refresh token is unknown, used, expired or revoked.
pub const INVALID_REFRESH_TOKEN: Problem = Problem::new(
    StatusCode::UNAUTHORIZED,
    "invalid_refresh_token",
    "The refresh token is not valid any more.",
);
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

/// How often old rows are removed.
const HOUSEKEEPING: Duration = Duration::from_mins(1);

/// The routes of the user service.
pub fn router(app: App) -> OpenApiRouter {
    routes().with_state(app)
}

/// The same before they are bound to an application, for the API's description.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(login))
        .routes(routes!(refresh))
        .routes(routes!(logout))
        .routes(routes!(personal::profile, personal::update_profile))
        .routes(routes!(change_password))
        .routes(routes!(personal::export))
        .routes(routes!(personal::delete_user))
        .routes(routes!(erase_lane))
        .routes(routes!(jwks))
}

/// A caller whose session has not been ended. Other services trust an access token until it expires; this one knows.
pub(crate) struct Session(pub(crate) Caller);

impl FromRequestParts<App> for Session {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let open: bool = sqlx::query_scalar(
            "select exists (select from sessions where id = $1 and user_id = $2 and revoked_at is null and expires_at > now())",
        )
        .bind(caller.session_id)
        .bind(caller.user_id)
        .fetch_one(&app.db)
        .await?;
        if open {
            Ok(Self(caller))
        } else {
            Err(error::UNAUTHENTICATED.into())
        }
    }
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
    if lane.is_live() {
        let limit = Limit::new(
            "register",
            &address.to_string(),
            app.config.login_attempts_per_address,
        );
        limit.count(&app.db).await?;
    }
    let hash = app.passwords.hash(registration.password).await?;
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
struct Credentials {
    email: String,
    #[schema(value_type = String, format = Password)]
    password: SecretString,
}

/// An access token for the requests of the next minutes, and a refresh token for the next pair.
#[derive(Serialize, ToSchema)]
struct Tokens {
    /// The user.
    user_id: Uuid,
    /// To be sent as `Authorization: Bearer …`.
    access_token: String,
    /// `Bearer`
    token_type: &'static str,
    /// Seconds for which the access token is valid.
    expires_in: u64,
    /// Valid once.
    refresh_token: String,
    /// What the user may do beyond what every user may, separated by spaces.
    scope: String,
}

#[derive(sqlx::FromRow)]
struct LoginRow {
    id: Uuid,
    password_hash: Option<String>,
    scopes: Vec<String>,
}

/// Starts a session. Wrong attempts are limited per account and per address.
#[utoipa::path(
    post, path = "/login", tag = "user", request_body = Credentials,
    params(("x-exchange-lane" = Option<String>, Header, description = "The test lane of the user")),
    responses((status = 200, body = Tokens)),
)]
async fn login(
    State(app): State<App>,
    ClientAddress(address): ClientAddress,
    ChosenLane(lane): ChosenLane,
    Body(credentials): Body<Credentials>,
) -> Result<Json<Tokens>, ApiError> {
    let email = normal_email(&credentials.email).ok_or(WRONG_CREDENTIALS)?;
    let by_address = Limit::new(
        "login-from",
        &address.to_string(),
        app.config.login_attempts_per_address,
    );
    let by_account = Limit::new(
        "login-to",
        &format!("{lane}:{email}"),
        app.config.login_attempts_per_account,
    );
    by_address.count(&app.db).await?;
    by_account.count(&app.db).await?;
    let user: Option<LoginRow> =
        sqlx::query_as("select id, password_hash, scopes from users where lane = $1 and email = $2")
            .bind(&lane)
            .bind(&email)
            .fetch_optional(&app.db)
            .await?;
    let hash = user.as_ref().and_then(|user| user.password_hash.clone());
    let correct = app.passwords.verify(credentials.password, hash).await?;
    let user = user.filter(|_| correct).ok_or(WRONG_CREDENTIALS)?;
    by_address.forgive(&app.db).await?;
    by_account.forgive(&app.db).await?;

    let session_id = Uuid::now_v7();
    let mut transaction = app.db.begin().await?;
    sqlx::query("insert into sessions (id, lane, user_id, expires_at) values ($1, $2, $3, $4)")
        .bind(session_id)
        .bind(&lane)
        .bind(user.id)
        .bind(OffsetDateTime::now_utc() + app.config.refresh_token_lifetime)
        .execute(&mut *transaction)
        .await?;
    let refresh_token = new_refresh_token(&mut transaction, &lane, session_id).await?;
    let event = Event {
        lane: lane.clone(),
        topic: outbox::Topic::SignedIn,
        key: user.id.to_string(),
        payload: serde_json::json!({"user_id": user.id}),
    };
    outbox::enqueue(&mut transaction, &event).await?;
    transaction.commit().await?;
    info!(user.id = %user.id, labels.lane = lane.kind(), "a user has logged in");
    tokens(&app, user.id, session_id, lane, &user.scopes, &refresh_token).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Refresh {
    #[schema(value_type = String)]
    refresh_token: SecretString,
}

#[derive(sqlx::FromRow)]
struct RefreshRow {
    session_id: Uuid,
    user_id: Uuid,
    lane: Lane,
    scopes: Vec<String>,
}

/// Exchanges a refresh token for a new pair. A token that comes a second time has been stolen, from one side or the
/// other: its session ends, with all of its tokens.
#[utoipa::path(
    post, path = "/token/refresh", tag = "user", request_body = Refresh,
    responses((status = 200, body = Tokens)),
)]
async fn refresh(State(app): State<App>, Body(body): Body<Refresh>) -> Result<Json<Tokens>, ApiError> {
    let hash = token_hash(body.refresh_token.expose_secret());
    let mut transaction = app.db.begin().await?;
    let used: Option<Uuid> = sqlx::query_scalar(
        "update refresh_tokens set used_at = now() where hash = $1 and used_at is null returning session_id",
    )
    .bind(&hash)
    .fetch_optional(&mut *transaction)
    .await?;
    let Some(session_id) = used else {
        let ended = sqlx::query(
            "update sessions set revoked_at = now()
             where revoked_at is null and id = (select session_id from refresh_tokens where hash = $1)",
        )
        .bind(&hash)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        if ended.rows_affected() > 0 {
            warn!("a refresh token came twice; its session has been ended");
        }
        return Err(INVALID_REFRESH_TOKEN.into());
    };
    let session: Option<RefreshRow> = sqlx::query_as(
        "update sessions set expires_at = $2 from users
         where sessions.id = $1 and sessions.revoked_at is null and sessions.expires_at > now()
             and users.id = sessions.user_id and users.deleted_at is null
         returning sessions.id as session_id, users.id as user_id, users.lane, users.scopes",
    )
    .bind(session_id)
    .bind(OffsetDateTime::now_utc() + app.config.refresh_token_lifetime)
    .fetch_optional(&mut *transaction)
    .await?;
    let session = session.ok_or(INVALID_REFRESH_TOKEN)?;
    let refresh_token = new_refresh_token(&mut transaction, &session.lane, session_id).await?;
    transaction.commit().await?;
    tokens(
        &app,
        session.user_id,
        session.session_id,
        session.lane,
        &session.scopes,
        &refresh_token,
    )
    .await
}

/// Ends the caller's session, with its refresh tokens.
#[utoipa::path(
    post, path = "/logout", tag = "user", security(("access_token" = [])),
    responses((status = 204)),
)]
async fn logout(State(app): State<App>, Session(caller): Session) -> Result<StatusCode, ApiError> {
    sqlx::query("update sessions set revoked_at = now() where id = $1 and revoked_at is null")
        .bind(caller.session_id)
        .execute(&app.db)
        .await?;
    Ok(StatusCode::NO_CONTENT)
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
    Body(change): Body<PasswordChange>,
) -> Result<StatusCode, ApiError> {
    valid_new_password("new_password", &change.new_password)?;
    let limit = Limit::new(
        "password",
        &caller.user_id.to_string(),
        app.config.login_attempts_per_account,
    );
    limit.count(&app.db).await?;
    let hash: Option<String> = sqlx::query_scalar("select password_hash from users where id = $1")
        .bind(caller.user_id)
        .fetch_optional(&app.db)
        .await?
        .flatten();
    if !app
        .passwords
        .verify(change.current_password, hash.clone())
        .await?
    {
        return Err(WRONG_CREDENTIALS.into());
    }
    limit.forgive(&app.db).await?;
    let new_hash = app.passwords.hash(change.new_password).await?;
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
    sqlx::query("select erase_lane_v1($1)")
        .bind(&lane)
        .execute(&app.db)
        .await?;
    Ok(StatusCode::NO_CONTENT)
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
struct ChosenLane(Lane);

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

/// Removes what has expired, and the lanes of stacks that are gone, while this stack is live.
pub async fn run(app: App, shutdown: CancellationToken) {
    while shutdown
        .run_until_cancelled(tokio::time::sleep(HOUSEKEEPING))
        .await
        .is_some()
    {
        if *app.role.borrow() == Role::Live
            && let Err(error) = clean_up(&app.db).await
        {
            warn!(error.message = %error, "housekeeping failed; it is tried again");
        }
    }
}

/// One round of housekeeping; nothing if another process is at it.
pub async fn clean_up(db: &PgPool) -> Result<(), sqlx::Error> {
    let mut transaction = db.begin().await?;
    let first: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtext('housekeeping'))")
        .fetch_one(&mut *transaction)
        .await?;
    if !first {
        return Ok(());
    }
    sqlx::query("delete from rate_limits where window_ends_at < now()")
        .execute(&mut *transaction)
        .await?;
    sqlx::query("delete from sessions where expires_at < now()")
        .execute(&mut *transaction)
        .await?;
    sqlx::query("delete from instances where seen_at < now() - interval '1 day'")
        .execute(&mut *transaction)
        .await?;
    let abandoned: Vec<String> = sqlx::query_scalar(
        "select distinct lane from users where lane <> 'live' and not exists (
             select from instances
             where stack = split_part(substr(lane, 6), '.', 1) and seen_at > now() - make_interval(secs => $1)
         )",
    )
    .bind(migrate::INSTANCE_GONE_AFTER.as_secs_f64())
    .fetch_all(&mut *transaction)
    .await?;
    for lane in abandoned {
        sqlx::query("select erase_lane_v1($1)")
            .bind(&lane)
            .execute(&mut *transaction)
            .await?;
        info!("erased the test lane {lane}, whose stack is gone");
    }
    transaction.commit().await
}

async fn new_refresh_token(
    connection: &mut PgConnection,
    lane: &Lane,
    session_id: Uuid,
) -> Result<SecretString, sqlx::Error> {
    let token = BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
    sqlx::query("insert into refresh_tokens (hash, lane, session_id) values ($1, $2, $3)")
        .bind(token_hash(&token))
        .bind(lane)
        .bind(session_id)
        .execute(connection)
        .await?;
    Ok(SecretString::from(token))
}

fn token_hash(token: &str) -> Vec<u8> {
    Sha256::digest(token).to_vec()
}

async fn tokens(
    app: &App,
    user_id: Uuid,
    session_id: Uuid,
    lane: Lane,
    scopes: &[String],
    refresh_token: &SecretString,
) -> Result<Json<Tokens>, ApiError> {
    let issued = app.keys.issue(user_id, session_id, lane, scopes).await?;
    Ok(Json(Tokens {
        user_id,
        access_token: issued.token.expose_secret().to_owned(),
        token_type: "Bearer",
        expires_in: issued.expires_in.as_secs(),
        refresh_token: refresh_token.expose_secret().to_owned(),
        scope: scopes.join(" "),
    }))
}

/// The address as it is stored and compared, or nothing if it cannot be one.
fn normal_email(email: &str) -> Option<String> {
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
