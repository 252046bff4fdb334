//! Access tokens that must not work, and keys that change.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer, SigningKey};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::{
    servers::{Database, Postgres, Service, eventually},
    user::Exchange,
};

fn encode(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

pub(crate) fn decode(part: &str) -> Value {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

pub(crate) fn sign(key: &SigningKey, header: &Value, claims: &Value) -> String {
    let signed = format!("{}.{}", encode(header), encode(claims));
    let signature = key.sign(signed.as_bytes()).to_bytes();
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

async fn status(service: &Service, token: &str) -> u16 {
    let request = service.client.get(service.url("/profile")).bearer_auth(token);
    request.send().await.unwrap().status().as_u16()
}

async fn published(service: &Service) -> Vec<String> {
    let keys: Value = service.get("/.well-known/jwks.json").await.json().await.unwrap();
    keys["keys"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| key["kid"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_token_that_is_right_in_every_part_is_accepted() {
    let exchange = Exchange::start(&[]).await;
    let good = exchange.user("ada@example.org").await.access_token;
    let parts: Vec<&str> = good.split('.').collect();
    let (header, claims) = (decode(parts[0]), decode(parts[1]));
    let owner = exchange.database.owner().await;
    let seed: Vec<u8> = sqlx::query_scalar("select private_key from signing_keys")
        .fetch_one(&owner)
        .await
        .unwrap();
    let key = SigningKey::from_bytes(&seed.try_into().unwrap());
    let service = &exchange.service;
    let with = |value: &Value, field: &str, new: Value| {
        let mut value = value.clone();
        value[field] = new;
        value
    };
    // What is changed below is the only thing that is wrong.
    assert_eq!(status(service, &sign(&key, &header, &claims)).await, 200);

    let now = claims["iat"].as_i64().unwrap();
    let public = key.verifying_key().to_bytes();
    let stranger = SigningKey::from_bytes(&[7; 32]);
    let swapped = format!(
        "{}.{}.{}",
        parts[0],
        encode(&with(&claims, "scope", json!("treasury"))),
        parts[2]
    );
    let signed_as = |algorithm: &str, signature: &dyn Fn(&[u8]) -> Vec<u8>| {
        let header = encode(&with(&header, "alg", json!(algorithm)));
        let signed = format!("{header}.{}", parts[1]);
        let signature = BASE64_URL_SAFE_NO_PAD.encode(signature(signed.as_bytes()));
        format!("{signed}.{signature}")
    };
    let by_the_key = |signed: &[u8]| key.sign(signed).to_bytes().to_vec();
    assert_eq!(status(service, &signed_as("EdDSA", &by_the_key)).await, 200);
    let keyed_by_what_is_public = |signed: &[u8]| {
        let mut hmac = Hmac::<Sha256>::new_from_slice(&public).unwrap();
        hmac.update(signed);
        hmac.finalize().into_bytes().to_vec()
    };
    let bad = [
        (
            "no algorithm and no signature",
            signed_as("none", &|_| Vec::new()),
        ),
        ("no algorithm", signed_as("none", &by_the_key)),
        (
            "HS256 with the public key as its secret",
            signed_as("HS256", &keyed_by_what_is_public),
        ),
        ("HS256 in the header alone", signed_as("HS256", &by_the_key)),
        ("ES256 in the header alone", signed_as("ES256", &by_the_key)),
        (
            "another type",
            sign(&key, &with(&header, "typ", json!("JWT")), &claims),
        ),
        ("another key", sign(&stranger, &header, &claims)),
        (
            "an unknown key id",
            sign(&key, &with(&header, "kid", json!("unknown")), &claims),
        ),
        (
            "expired",
            sign(&key, &header, &with(&claims, "exp", json!(now - 1))),
        ),
        (
            "from the future",
            sign(&key, &header, &with(&claims, "iat", json!(now + 600))),
        ),
        (
            "another issuer",
            sign(&key, &header, &with(&claims, "iss", json!("somebody"))),
        ),
        (
            "another audience",
            sign(&key, &header, &with(&claims, "aud", json!("else"))),
        ),
        (
            "no lane",
            sign(&key, &header, &with(&claims, "lane", json!("everything"))),
        ),
        (
            "another session",
            sign(&key, &header, &with(&claims, "sid", claims["sub"].clone())),
        ),
        ("claims changed after signing", swapped),
        ("a part too many", format!("{good}.x")),
        ("cut off", good[..good.len() - 2].to_owned()),
        ("nothing", String::new()),
        ("noise", "ä.b.c".to_owned()),
    ];
    for (what, token) in bad {
        assert_eq!(status(service, &token).await, 401, "{what} was accepted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_published_before_it_signs_and_until_its_last_token_has_expired() {
    let database = Database::migrated(Postgres::shared()).await;
    let exchange = Exchange::over(database.clone(), &[]).await;
    let owner = database.owner().await;
    let old_token = exchange.user("ada@example.org").await.access_token;
    let kid = |token: &str| {
        decode(token.split('.').next().unwrap())["kid"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let old = kid(&old_token);
    assert_eq!(published(&exchange.service).await, std::slice::from_ref(&old));

    // An hour and a half before its end, the successor is published, and does not sign yet.
    sqlx::query("update signing_keys set signs_until = now() + interval '90 minutes'")
        .execute(&owner)
        .await
        .unwrap();
    let replica = Exchange::over(database.clone(), &[]).await;
    let token = replica.log_in("ada@example.org").await.access_token;
    assert_eq!(kid(&token), old);
    let keys = published(&replica.service).await;
    assert_eq!(keys.len(), 2);

    // After its end the successor signs. The first process has never heard of it, and accepts its tokens.
    sqlx::query("update signing_keys set signs_from = signs_from - interval '90 minutes', signs_until = signs_until - interval '90 minutes'")
        .execute(&owner)
        .await
        .unwrap();
    let replica = Exchange::over(database.clone(), &[]).await;
    let token = replica.log_in("ada@example.org").await.access_token;
    let new = kid(&token);
    assert_ne!(new, old);
    assert_eq!(status(&exchange.service, &token).await, 200);
    assert_eq!(status(&replica.service, &old_token).await, 200);

    // When all of its tokens have expired, it is forgotten.
    sqlx::query("update signing_keys set signs_until = now() - interval '2 hours', expires_at = now() - interval '1 hour' where kid = $1")
        .bind(&old)
        .execute(&owner)
        .await
        .unwrap();
    let replica = Exchange::over(database, &[]).await;
    assert_eq!(published(&replica.service).await, [new]);
    assert_eq!(status(&replica.service, &old_token).await, 401);
}

/// A night without log-ins must not end with a key that signs and that no verifier has heard of.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_key_is_published_in_time_though_nobody_asks_for_one() {
    let exchange = Exchange::start(&[]).await;
    let owner = exchange.database.owner().await;
    exchange.user("ada@example.org").await;
    sqlx::query("update signing_keys set signs_until = now() + interval '90 minutes'")
        .execute(&owner)
        .await
        .unwrap();
    // Housekeeping comes once a minute.
    eventually("the next key is there", || async {
        let next: bool = sqlx::query_scalar(
            "select exists (select from signing_keys where signs_from > now() + interval '1 hour')",
        )
        .fetch_one(&owner)
        .await
        .unwrap();
        next.then_some(())
    })
    .await;
}

/// Whoever deletes one key that has leaked may not know that its successor does not sign yet.
#[tokio::test(flavor = "multi_thread")]
async fn log_ins_go_on_when_only_the_key_that_signs_is_deleted() {
    let database = Database::migrated(Postgres::shared()).await;
    let exchange = Exchange::over(database.clone(), &[]).await;
    let owner = database.owner().await;
    exchange.user("ada@example.org").await;
    sqlx::query("update signing_keys set signs_until = now() + interval '90 minutes'")
        .execute(&owner)
        .await
        .unwrap();
    let replica = Exchange::over(database.clone(), &[]).await;
    replica.log_in("ada@example.org").await;
    assert_eq!(published(&replica.service).await.len(), 2);
    sqlx::query("delete from signing_keys where signs_from < now()")
        .execute(&owner)
        .await
        .unwrap();
    let replica = Exchange::over(database, &[]).await;
    let token = replica.log_in("ada@example.org").await.access_token;
    assert_eq!(status(&replica.service, &token).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_deleted_is_soon_trusted_by_nobody() {
    let exchange = Exchange::start(&["--keys-refresh=1s"]).await;
    let owner = exchange.database.owner().await;
    let token = exchange.user("ada@example.org").await.access_token;
    assert_eq!(status(&exchange.service, &token).await, 200);
    // As if the database were away, for the keys at least: what is known goes on.
    sqlx::query("alter table signing_keys rename to elsewhere")
        .execute(&owner)
        .await
        .unwrap();
    eventually("they could not be read", || async {
        assert_eq!(status(&exchange.service, &token).await, 200);
        let log = exchange.service.log();
        log.contains("the signing keys could not be read again")
            .then_some(())
    })
    .await;
    sqlx::query("alter table elsewhere rename to signing_keys")
        .execute(&owner)
        .await
        .unwrap();
    sqlx::query("delete from signing_keys")
        .execute(&owner)
        .await
        .unwrap();
    eventually("the token is refused", || async {
        (status(&exchange.service, &token).await == 401).then_some(())
    })
    .await;
    // Whoever logs in, or refreshes, gets one of a new key.
    let token = exchange.log_in("ada@example.org").await.access_token;
    assert_eq!(status(&exchange.service, &token).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_that_start_at_once_agree_on_one_key() {
    let database = Database::migrated(Postgres::shared()).await;
    let services = futures::future::join_all((0..4).map(|_| Exchange::over(database.clone(), &[]))).await;
    let keys = futures::future::join_all(services.iter().map(|exchange| published(&exchange.service))).await;
    assert!(
        keys.iter()
            .all(|published| *published == keys[0] && published.len() == 1),
        "{keys:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_expires() {
    let exchange = Exchange::start(&["--access-token-lifetime=15s"]).await;
    let token = exchange.user("ada@example.org").await.access_token;
    assert_eq!(status(&exchange.service, &token).await, 200);
    eventually("it has expired", || async {
        (status(&exchange.service, &token).await == 401).then_some(())
    })
    .await;
}
