//! Sessions: log-in, refresh and log-out. A session has one refresh token that is valid, and access tokens that other
//! services trust until they expire.

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, request::Parts},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use futures::future::join_all;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tracing::{info, warn};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{
    app::App,
    auth::{self, Caller},
    config::Config,
    error::{self, ApiError, Problem},
    extract::{Body, ClientAddress},
    lane::Lane,
    limit::{Attempt, Limit},
    outbox::{self, Event},
    user::{ChosenLane, normal_email},
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
/// A caller whose session has not been ended. Other services trust an access token until it expires; this one knows.
pub(crate) struct Session(pub(crate) Caller);

impl FromRequestParts<App> for Session {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, app).await?;
        if is_open(&app.db, &caller).await? {
            Ok(Self(caller))
        } else {
            Err(error::UNAUTHENTICATED.into())
        }
    }
}

/// Whether the session that a token came from has not been ended.
pub(crate) async fn is_open(db: &PgPool, caller: &Caller) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from sessions where id = $1 and user_id = $2 and revoked_at is null and expires_at > now())",
    )
    .bind(caller.session_id)
    .bind(caller.user_id)
    .fetch_one(db)
    .await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Credentials {
    email: String,
    #[schema(value_type = String, format = Password)]
    password: SecretString,
}

/// An access token for the requests of the next minutes, and a refresh token for the next pair.
#[derive(Serialize, ToSchema)]
pub(crate) struct Tokens {
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

/// Starts a session. Wrong attempts are limited per account and per address, right ones per account.
///
/// Whoever sends `x-exchange-lane-secret` with the log-in to a test lane is not limited.
#[utoipa::path(
    post, path = "/login", tag = "user", request_body = Credentials,
    params(
        ("x-exchange-lane" = Option<String>, Header, description = "The test lane of the user"),
        ("x-exchange-lane-secret" = Option<String>, Header, description = "The secret of the stack's test lanes: with it there is no limit"),
    ),
    responses((status = 200, body = Tokens)),
)]
pub(crate) async fn login(
    State(app): State<App>,
    ClientAddress(address): ClientAddress,
    ChosenLane(lane): ChosenLane,
    headers: HeaderMap,
    Body(credentials): Body<Credentials>,
) -> Result<Json<Tokens>, ApiError> {
    let email = normal_email(&credentials.email).ok_or(WRONG_CREDENTIALS)?;
    // Whoever has the secret of the test lane need not guess, and leaves nothing behind.
    let (mut attempts, mut success) = (Vec::new(), None);
    if !auth::opens_lane(&app, &headers, &lane) {
        let by_address = Limit::new(
            "login-from",
            &address.to_string(),
            app.config.login_attempts_per_address,
        );
        attempts.push(by_address.begin(&app.db).await?);
        attempts.push(failed_log_ins(&app.config, &lane, &email).begin(&app.db).await?);
        success = Some(log_ins(&app.config, &lane, &email).begin(&app.db).await?);
    }
    let user: Option<LoginRow> =
        sqlx::query_as("select id, password_hash, scopes from users where lane = $1 and email = $2")
            .bind(&lane)
            .bind(&email)
            .fetch_optional(&app.db)
            .await?;
    let hash = user.as_ref().and_then(|user| user.password_hash.clone());
    let correct = app
        .passwords
        .verify(address, credentials.password, hash.clone())
        .await?;
    let Some(user) = user.filter(|_| correct) else {
        for attempt in attempts {
            attempt.count().await?;
        }
        // Before the answer: who comes at once with the right one finds its place free.
        if let Some(success) = success {
            success.forgive().await;
        }
        return Err(WRONG_CREDENTIALS.into());
    };
    // All at once: without the database each takes as long as one waits for a connection.
    let forgiven = join_all(attempts.into_iter().map(Attempt::forgive));
    let counted = async {
        match success {
            Some(success) => success.count().await,
            None => Ok(()),
        }
    };
    tokio::join!(forgiven, counted).1?;

    let session_id = Uuid::now_v7();
    let mut transaction = app.db.begin().await?;
    // Hashing takes its time: the password may have been changed, or the user deleted, in the meantime. The lock makes
    // whoever is about to do so wait, and then find this session.
    let started = sqlx::query(
        "insert into sessions (id, lane, user_id, expires_at)
         select $1, lane, id, $4 from users where id = $2 and password_hash = $3 and deleted_at is null for share",
    )
    .bind(session_id)
    .bind(user.id)
    .bind(hash)
    .bind(OffsetDateTime::now_utc() + app.config.refresh_token_lifetime)
    .execute(&mut *transaction)
    .await?;
    if started.rows_affected() == 0 {
        return Err(WRONG_CREDENTIALS.into());
    }
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

/// Log-ins of an account that may fail. That of an address that is not registered is limited alike.
pub(crate) fn failed_log_ins(config: &Config, lane: &Lane, email: &str) -> Limit {
    Limit::new(
        "login-to",
        &format!("{lane}:{email}"),
        config.login_attempts_per_account,
    )
}

/// Log-ins of an account that may succeed: each leaves a session, a notification and perhaps an e-mail.
pub(crate) fn log_ins(config: &Config, lane: &Lane, email: &str) -> Limit {
    Limit::new(
        "logged-in-to",
        &format!("{lane}:{email}"),
        config.logins_per_account,
    )
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Refresh {
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
pub(crate) async fn refresh(
    State(app): State<App>,
    Body(body): Body<Refresh>,
) -> Result<Json<Tokens>, ApiError> {
    let hash = token_hash(body.refresh_token.expose_secret());
    // The token is used up by the commit: whatever may fail is done before.
    app.keys.prepare().await?;
    let mut transaction = app.db.begin().await?;
    // The session before its tokens, as whoever ends it does.
    let session: Option<RefreshRow> = sqlx::query_as(
        "select sessions.id as session_id, users.id as user_id, users.lane, users.scopes
         from refresh_tokens join sessions on sessions.id = session_id join users on users.id = user_id
         where hash = $1 and revoked_at is null and expires_at > now() and deleted_at is null
         for update of sessions",
    )
    .bind(&hash)
    .fetch_optional(&mut *transaction)
    .await?;
    let session = session.ok_or(INVALID_REFRESH_TOKEN)?;
    let used = sqlx::query("update refresh_tokens set used_at = now() where hash = $1 and used_at is null")
        .bind(&hash)
        .execute(&mut *transaction)
        .await?;
    if used.rows_affected() == 0 {
        sqlx::query("update sessions set revoked_at = now() where id = $1")
            .bind(session.session_id)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        warn!("a refresh token came twice; its session has been ended");
        return Err(INVALID_REFRESH_TOKEN.into());
    }
    sqlx::query("update sessions set expires_at = $2 where id = $1")
        .bind(session.session_id)
        .bind(OffsetDateTime::now_utc() + app.config.refresh_token_lifetime)
        .execute(&mut *transaction)
        .await?;
    let refresh_token = new_refresh_token(&mut transaction, &session.lane, session.session_id).await?;
    let tokens = tokens(
        &app,
        session.user_id,
        session.session_id,
        session.lane,
        &session.scopes,
        &refresh_token,
    )
    .await?;
    transaction.commit().await?;
    Ok(tokens)
}

/// Ends the caller's session, with its refresh tokens.
#[utoipa::path(
    post, path = "/logout", tag = "user", security(("access_token" = [])),
    responses((status = 204)),
)]
pub(crate) async fn logout(State(app): State<App>, Session(caller): Session) -> Result<StatusCode, ApiError> {
    sqlx::query("update sessions set revoked_at = now() where id = $1 and revoked_at is null")
        .bind(caller.session_id)
        .execute(&app.db)
        .await?;
    Ok(StatusCode::NO_CONTENT)
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
