//! A request that moves value carries a key; sent again, it gets the first answer and has no second effect.
//!
//! The key is recorded in the transaction of the effect. A request that was refused leaves no record: nothing has
//! happened, and it may be sent again with the same key. (Orders need no record, see `trade::orders`.)

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::{
    error::{ApiError, INVALID_PARAMETER, Problem},
    lane::Lane,
};

/// The request header with the key, 1 to 128 visible ASCII characters.
pub const KEY_HEADER: &str = "idempotency-key";

/// The response header that marks an answer as given before.
pub const HIT_HEADER: HeaderName = HeaderName::from_static("idempotency-hit");

/// Most keys forgotten at a time.
const PORTION: i64 = 5_000;

/// The key has been used for something else.
pub const KEY_REUSED: Problem = Problem::new(
    StatusCode::CONFLICT,
    "idempotency_key_reused",
    "The key has been used for a different request.",
);

/// The key of a request, from its `Idempotency-Key` header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Checks a key of the body; `field` is named if it is not one.
    pub fn in_field(key: &str, field: &str) -> Result<Self, ApiError> {
        Self::new(key).map_err(|why| ApiError::invalid_field(field, why))
    }

    /// Checks the header, which may not be there.
    pub fn in_header(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let key = headers
            .get(KEY_HEADER)
            .map(|key| Self::new(key.to_str().unwrap_or_default()));
        key.transpose().map_err(at_header)
    }

    fn new(key: &str) -> Result<Self, &'static str> {
        if (1..=128).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Ok(Self(key.to_owned()));
        }
        Err("1 to 128 visible ASCII characters are needed")
    }

    /// The key as it was sent.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<S: Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Self::in_header(&parts.headers)?
            .ok_or_else(|| at_header("the header is needed, so that the request can be repeated safely"))
    }
}

fn at_header(why: &str) -> ApiError {
    ApiError::from(INVALID_PARAMETER)
        .field("Idempotency-Key")
        .detail(why)
}

/// An answer, and whether it had been given before.
#[derive(Debug)]
pub struct Answer<T> {
    /// The body.
    pub body: T,
    /// Given before.
    pub hit: bool,
}

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let mut response = (StatusCode::CREATED, axum::Json(self.body)).into_response();
        if self.hit {
            response
                .headers_mut()
                .insert(HIT_HEADER, HeaderValue::from_static("true"));
        }
        response
    }
}

/// Claims the key for this transaction, or finds the answer that was given before, as it was given: it is not read as what
/// requests may contain.
///
/// Of requests with the same key at the same time, one claims it and the others wait here for its end.
///
/// # Errors
/// `idempotency_key_reused` if the key was used for a request that differs; those of the database.
pub async fn claim(
    connection: &mut PgConnection,
    (user, lane): (Uuid, &Lane),
    key: &Key,
    request: &impl Serialize,
) -> Result<Option<Value>, ApiError> {
    let hash = Sha256::digest(serde_json::to_vec(request).map_err(ApiError::internal)?);
    loop {
        let claimed = sqlx::query(
            "insert into idempotency_keys (user_id, key, lane, request_hash) values ($1, $2, $3, $4)
             on conflict (user_id, key) do nothing",
        )
        .bind(user)
        .bind(key.as_str())
        .bind(lane)
        .bind(hash.as_slice())
        .execute(&mut *connection)
        .await?
        .rows_affected();
        if claimed == 1 {
            return Ok(None);
        }
        let known: Option<(Vec<u8>, Option<Value>)> = sqlx::query_as(
            "select request_hash, answer from idempotency_keys where user_id = $1 and key = $2",
        )
        .bind(user)
        .bind(key.as_str())
        .fetch_optional(&mut *connection)
        .await?;
        match known {
            Some((known, Some(answer))) if known == hash.as_slice() => return Ok(Some(answer)),
            Some(_) => return Err(ApiError::from(KEY_REUSED).field("Idempotency-Key")),
            // It has been forgotten between the two.
            None => {}
        }
    }
}

/// Records the answer of the transaction that has claimed the key.
pub async fn record(
    connection: &mut PgConnection,
    user: Uuid,
    key: &Key,
    answer: &Value,
) -> Result<(), ApiError> {
    sqlx::query("update idempotency_keys set answer = $3 where user_id = $1 and key = $2")
        .bind(user)
        .bind(key.as_str())
        .bind(answer)
        .execute(connection)
        .await?;
    Ok(())
}

/// Forgets keys that are older than any client may still repeat a request, in portions that are done in time.
pub async fn forget_old(db: &PgPool) -> Result<(), sqlx::Error> {
    loop {
        let forgotten = sqlx::query(
            "delete from idempotency_keys where (user_id, key) in (
                 select user_id, key from idempotency_keys where created_at < now() - interval '30 days' limit $1)",
        )
        .bind(PORTION)
        .execute(db)
        .await?;
        if forgotten.rows_affected() < PORTION.unsigned_abs() {
            return Ok(());
        }
    }
}
