//! Access tokens: signed by the user service, verified by every service without asking it.
//!
//! A token is a JWS (`EdDSA`, `typ: at+jwt`). The keys are in PostgreSQL, shared by all versions and colours. A key is
//! published before it signs, signs for a while, and stays published until its last token has expired.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use subtle::ConstantTimeEq;
use time::OffsetDateTime;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tracing::warn;
use uuid::Uuid;

use crate::{
    app::App,
    config::Config,
    error::{self, ApiError},
    lane::Lane,
    metrics::RequestLane,
};

/// The scope of those who credit deposits: the bank's or the chain's side.
pub const TREASURY: &str = "treasury";

/// The header that opens a test lane at registration, and names it.
pub const LANE_HEADER: &str = "x-exchange-lane";

/// The header with the secret of the stack whose test lane it is.
pub const LANE_SECRET_HEADER: &str = "x-exchange-lane-secret";

/// The audience of access tokens.
const AUDIENCE: &str = "exchange";

/// How long a key is published before it signs: for verifiers elsewhere, which ask for the published keys now and then. Ours
/// read them all again when their copy is old, and at once for a key id that is not in it.
const PUBLISHED_BEFORE: time::Duration = time::Duration::hours(1);

/// How long a key signs.
const SIGNS_FOR: time::Duration = time::Duration::days(1);

/// How far clocks may differ.
const LEEWAY: i64 = 5;

/// An unknown key id reads the keys again, but not more often than this: who comes sooner waits.
const REFETCH_AFTER: Duration = Duration::from_secs(1);

/// How long is waited for the keys when the copy is old. The copy goes on being trusted while the database is away: then
/// nobody can do much with a token, and those who can should not be refused.
const READ_IN: Duration = Duration::from_secs(1);

/// When it is tried again.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Who makes a request, from a verified access token.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The user.
    pub user_id: Uuid,
    /// The lane in which the user was registered.
    pub lane: Lane,
    /// What the user may do beyond what every user may.
    pub scopes: Vec<String>,
    /// The session that the token came from.
    pub session_id: Uuid,
    /// When the token is over.
    pub expires_at: OffsetDateTime,
}

impl Caller {
    /// Fails with `forbidden` unless the caller has the scope.
    pub fn require(&self, scope: &str) -> Result<(), ApiError> {
        if self.scopes.iter().any(|held| held == scope) {
            return Ok(());
        }
        Err(ApiError::from(error::FORBIDDEN).detail(format!("the scope {scope} is needed")))
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let header = parts
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let token = header
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .ok_or(error::UNAUTHENTICATED)?;
        let caller = app.keys.verify(token).await?;
        if let Some(lane) = parts.extensions.get::<RequestLane>() {
            lane.set(&caller.lane);
        }
        Ok(caller)
    }
}

/// Whether a request holds the secret of this stack's test lanes, and the lane is one of them.
pub fn opens_lane(app: &App, headers: &HeaderMap, lane: &Lane) -> bool {
    let Some(secret) = &app.config.lane_secret else {
        return false;
    };
    let sent = headers
        .get(LANE_SECRET_HEADER)
        .map(http::HeaderValue::as_bytes)
        .unwrap_or_default();
    app.stack.owns(lane) && bool::from(sent.ct_eq(secret.expose_secret().as_bytes()))
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: Uuid,
    iat: i64,
    exp: i64,
    jti: Uuid,
    sid: Uuid,
    lane: Lane,
    scope: String,
}

/// The signing keys, as read from PostgreSQL.
pub struct Keys {
    db: PgPool,
    issuer: String,
    lifetime: Duration,
    known: RwLock<Arc<Vec<Key>>>,
    /// When the last read of the keys began.
    read_at: Mutex<Option<Instant>>,
    /// When they could last not be read, though the copy was old.
    failed_at: Mutex<Option<Instant>>,
    /// How old a copy may be.
    trusted_for: Duration,
    /// Held by whoever reads them for an unknown key id.
    reading: Mutex<()>,
}

#[derive(sqlx::FromRow)]
struct KeyRow {
    kid: String,
    private_key: Vec<u8>,
    signs_from: OffsetDateTime,
    signs_until: OffsetDateTime,
    expires_at: OffsetDateTime,
}

#[derive(Clone)]
struct Key {
    kid: String,
    signing: SigningKey,
    signs_from: OffsetDateTime,
    signs_until: OffsetDateTime,
    expires_at: OffsetDateTime,
}

/// A public key as RFC 8037 writes it.
#[derive(Serialize, utoipa::ToSchema)]
pub struct Jwk {
    kty: &'static str,
    crv: &'static str,
    alg: &'static str,
    r#use: &'static str,
    /// The key id.
    kid: String,
    /// The public key, base64url.
    x: String,
}

/// A token that has just been issued.
pub struct Issued {
    /// The token.
    pub token: SecretString,
    /// For how long it is valid.
    pub expires_in: Duration,
}

impl Keys {
    /// No keys yet; they are read when they are needed.
    pub fn new(db: PgPool, config: &Config) -> Self {
        Self {
            db,
            issuer: config.issuer.clone(),
            lifetime: config.access_token_lifetime,
            known: RwLock::default(),
            read_at: Mutex::new(None),
            failed_at: Mutex::new(None),
            trusted_for: config.keys_refresh,
            reading: Mutex::new(()),
        }
    }

    /// Checks a token and says whose it is. An unknown key id reads the keys once more, and so does an old copy of them: one
    /// that somebody has deleted has leaked.
    pub async fn verify(&self, token: &str) -> Result<Caller, ApiError> {
        let mut parts = token.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(error::UNAUTHENTICATED.into());
        };
        let signed = token.get(..header.len() + 1 + claims.len()).unwrap_or_default();
        let header: Header = decode_json(header)?;
        if header.alg != "EdDSA" || header.typ != "at+jwt" {
            return Err(error::UNAUTHENTICATED.into());
        }
        let signature = BASE64_URL_SAFE_NO_PAD
            .decode(signature)
            .map_err(|_| error::UNAUTHENTICATED)?;
        let signature = Signature::from_slice(&signature).map_err(|_| error::UNAUTHENTICATED)?;
        let now = OffsetDateTime::now_utc();
        self.refresh().await;
        let key = self.verifying_key(&header.kid, now).await?;
        key.verify_strict(signed.as_bytes(), &signature)
            .map_err(|_| error::UNAUTHENTICATED)?;
        let claims: Claims = decode_json(claims)?;
        let now = now.unix_timestamp();
        if claims.iss != self.issuer
            || claims.aud != AUDIENCE
            || claims.exp <= now
            || claims.iat > now + LEEWAY
        {
            return Err(error::UNAUTHENTICATED.into());
        }
        let expires_at =
            OffsetDateTime::from_unix_timestamp(claims.exp).map_err(|_| error::UNAUTHENTICATED)?;
        Ok(Caller {
            user_id: claims.sub,
            lane: claims.lane,
            scopes: claims.scope.split_whitespace().map(str::to_owned).collect(),
            session_id: claims.sid,
            expires_at,
        })
    }

    /// Makes sure that there is a key to sign with, so that a token can be issued without the database.
    pub async fn prepare(&self) -> Result<(), ApiError> {
        self.signing_key(OffsetDateTime::now_utc()).await.map(|_| ())
    }

    /// Issues a token. Makes the first key, and further ones in time.
    pub async fn issue(
        &self,
        user_id: Uuid,
        session_id: Uuid,
        lane: Lane,
        scopes: &[String],
    ) -> Result<Issued, ApiError> {
        let now = OffsetDateTime::now_utc();
        let key = self.signing_key(now).await?;
        let header = Header {
            alg: "EdDSA".to_owned(),
            typ: "at+jwt".to_owned(),
            kid: key.kid,
        };
        let issued = now.unix_timestamp();
        let claims = Claims {
            iss: self.issuer.clone(),
            aud: AUDIENCE.to_owned(),
            sub: user_id,
            iat: issued,
            exp: issued.saturating_add_unsigned(self.lifetime.as_secs()),
            jti: Uuid::now_v7(),
            sid: session_id,
            lane,
            scope: scopes.join(" "),
        };
        let signed = format!("{}.{}", encode_json(&header)?, encode_json(&claims)?);
        let signature = BASE64_URL_SAFE_NO_PAD.encode(key.signing.sign(signed.as_bytes()).to_bytes());
        Ok(Issued {
            token: SecretString::from(format!("{signed}.{signature}")),
            expires_in: self.lifetime,
        })
    }

    /// All unexpired public keys, also those that do not sign yet.
    pub async fn published(&self) -> Result<Vec<Jwk>, ApiError> {
        let read_at = *self.read_at.lock().await;
        if read_at.is_none_or(|at| at.elapsed() > self.trusted_for) {
            self.ensure_keys().await?;
        }
        let now = OffsetDateTime::now_utc();
        let keys = self.known();
        Ok(keys
            .iter()
            .filter(|key| key.expires_at > now)
            .map(|key| Jwk {
                kty: "OKP",
                crv: "Ed25519",
                alg: "EdDSA",
                r#use: "sig",
                kid: key.kid.clone(),
                x: BASE64_URL_SAFE_NO_PAD.encode(key.signing.verifying_key().as_bytes()),
            })
            .collect())
    }

    fn known(&self) -> Arc<Vec<Key>> {
        Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner))
    }

    async fn verifying_key(&self, kid: &str, now: OffsetDateTime) -> Result<VerifyingKey, ApiError> {
        let find = |keys: &[Key]| {
            keys.iter()
                .find(|key| key.kid == kid && key.expires_at > now)
                .map(|key| key.signing.verifying_key())
        };
        if let Some(key) = find(&self.known()) {
            return Ok(key);
        }
        self.read_again().await?;
        find(&self.known()).ok_or_else(|| error::UNAUTHENTICATED.into())
    }

    async fn signing_key(&self, now: OffsetDateTime) -> Result<Key, ApiError> {
        let find = |keys: &[Key], now: OffsetDateTime| {
            let signing = keys
                .iter()
                .filter(|key| key.signs_from <= now && now < key.signs_until);
            signing.max_by_key(|key| key.signs_from).cloned()
        };
        // The successor must be known to all before the current key ends.
        let succeeded = |keys: &[Key]| {
            keys.iter()
                .any(|key| key.signs_until > now + PUBLISHED_BEFORE * 2)
        };
        self.refresh().await;
        let known = self.known();
        if let Some(key) = find(&known, now)
            && succeeded(&known)
        {
            return Ok(key);
        }
        self.ensure_keys().await?;
        // The first key signs from the moment at which it was made: just now.
        find(&self.known(), OffsetDateTime::now_utc()).ok_or_else(|| ApiError::internal("no key signs"))
    }

    /// Reads the keys if the copy is old.
    async fn refresh(&self) {
        if !self.is_old().await {
            return;
        }
        // Whoever reads them does it for all; until then the copy is good.
        let Ok(_reading) = self.reading.try_lock() else {
            return;
        };
        let began = Instant::now();
        let rows = timeout(READ_IN, read_keys(&self.db)).await;
        let read = match rows {
            Ok(Ok(rows)) => self.store(rows, began).await.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(late) => Err(late.to_string()),
        };
        if let Err(error) = read {
            warn!(error.message = error, "the signing keys could not be read again");
            *self.failed_at.lock().await = Some(Instant::now());
        }
    }

    /// Whether there is a copy that should be read again.
    async fn is_old(&self) -> bool {
        let since = |at: Option<Instant>, time| at.is_some_and(|at: Instant| at.elapsed() > time);
        if !since(*self.read_at.lock().await, self.trusted_for) {
            return false;
        }
        let failed_at = *self.failed_at.lock().await;
        failed_at.is_none() || since(failed_at, READ_AGAIN_AFTER)
    }

    /// Reads the keys, unless a read has begun since the caller asked: a key that signed before that is in it.
    async fn read_again(&self) -> Result<(), ApiError> {
        let asked = Instant::now();
        let _reading = self.reading.lock().await;
        let read_at = *self.read_at.lock().await;
        if read_at.is_some_and(|at| at > asked) {
            return Ok(());
        }
        // Nor does anybody try in vain after somebody who has: that takes as long as one waits for a connection.
        if self.failed_at.lock().await.is_some_and(|at| at > asked) {
            return Err(ApiError::unavailable("the signing keys could not be read"));
        }
        if let Some(at) = read_at {
            tokio::time::sleep_until(at + REFETCH_AFTER).await;
        }
        let began = Instant::now();
        let rows = read_keys(&self.db).await;
        if rows.is_err() {
            *self.failed_at.lock().await = Some(Instant::now());
        }
        self.store(rows?, began).await
    }

    /// Keeps what a read that began then has found.
    async fn store(&self, rows: Vec<KeyRow>, began: Instant) -> Result<(), ApiError> {
        let keys = rows
            .into_iter()
            .map(Key::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        *self.read_at.lock().await = Some(began);
        Ok(())
    }

    /// Makes the key that is missing: the first one, which signs at once, or the successor of the last. Called now and then it
    /// publishes each an hour before it signs, whether or not anybody asks for a token.
    ///
    /// # Errors
    /// `unavailable` while the database is.
    pub async fn ensure_keys(&self) -> Result<(), ApiError> {
        let mut transaction = self.db.begin().await?;
        let began = Instant::now();
        sqlx::query("select pg_advisory_xact_lock(hashtext('signing_keys'))")
            .execute(&mut *transaction)
            .await?;
        let mut rows = read_keys(&mut *transaction).await?;
        let now = OffsetDateTime::now_utc();
        let last = rows
            .iter()
            .map(|row| row.signs_until)
            .max()
            .filter(|until| *until > now)
            // One that signs later is of no use if somebody has deleted the one before.
            .filter(|_| {
                rows.iter()
                    .any(|row| row.signs_from <= now && now < row.signs_until)
            });
        if last.is_none_or(|until| until <= now + PUBLISHED_BEFORE * 2) {
            // Not later than now by any other clock.
            let signs_from = last.unwrap_or(now - time::Duration::seconds(LEEWAY));
            let signs_until = signs_from + SIGNS_FOR;
            let row = KeyRow {
                kid: Uuid::now_v7().simple().to_string(),
                private_key: rand::random::<[u8; 32]>().to_vec(),
                signs_from,
                signs_until,
                expires_at: signs_until + self.lifetime + time::Duration::seconds(LEEWAY),
            };
            sqlx::query(
                "insert into signing_keys (kid, private_key, signs_from, signs_until, expires_at)
                 values ($1, $2, $3, $4, $5)",
            )
            .bind(&row.kid)
            .bind(&row.private_key)
            .bind(row.signs_from)
            .bind(row.signs_until)
            .bind(row.expires_at)
            .execute(&mut *transaction)
            .await?;
            sqlx::query("delete from signing_keys where expires_at < now()")
                .execute(&mut *transaction)
                .await?;
            rows.push(row);
        }
        transaction.commit().await?;
        self.store(rows, began).await
    }
}

impl TryFrom<KeyRow> for Key {
    type Error = ApiError;

    fn try_from(row: KeyRow) -> Result<Self, ApiError> {
        let seed = <[u8; 32]>::try_from(row.private_key)
            .map_err(|_| ApiError::internal("a signing key is damaged"))?;
        let KeyRow {
            kid,
            signs_from,
            signs_until,
            expires_at,
            ..
        } = row;
        Ok(Self {
            kid,
            signing: SigningKey::from_bytes(&seed),
            signs_from,
            signs_until,
            expires_at,
        })
    }
}

async fn read_keys(executor: impl sqlx::PgExecutor<'_>) -> Result<Vec<KeyRow>, sqlx::Error> {
    sqlx::query_as(
        "select kid, private_key, signs_from, signs_until, expires_at from signing_keys where expires_at > now()",
    )
    .fetch_all(executor)
    .await
}

fn encode_json(value: &impl Serialize) -> Result<String, ApiError> {
    serde_json::to_vec(value)
        .map(|json| BASE64_URL_SAFE_NO_PAD.encode(json))
        .map_err(ApiError::internal)
}

fn decode_json<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, ApiError> {
    let json = BASE64_URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| error::UNAUTHENTICATED)?;
    serde_json::from_slice(&json).map_err(|_| error::UNAUTHENTICATED.into())
}
