//! Event streams, pages and release notices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use reqwest::Method;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    servers::{Service, eventually},
    stores::Stores,
    user::{Exchange, PASSWORD},
};

/// A client of an event stream, with what it has read and not yet looked at.
pub(crate) struct Stream {
    response: reqwest::Response,
    buffer: String,
}

/// Asks for a stream.
async fn ask(service: &Service, token: &str, last: Option<i64>) -> reqwest::Response {
    let mut request = service
        .client
        .get(service.url("/notifications/stream"))
        .bearer_auth(token);
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    request.send().await.unwrap()
}

/// A token whose session is open.
pub(crate) async fn token(stores: &Stores, user: Uuid) -> String {
    let token = stores.token(user, "live").await;
    let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap());
    let claims: Value = serde_json::from_slice(&claims.unwrap()).unwrap();
    sqlx::query("insert into sessions (id, lane, user_id, expires_at) values ($1, 'live', $2, now() + interval '1 hour')")
        .bind(claims["sid"].as_str().unwrap().parse::<Uuid>().unwrap())
        .bind(user)
        .execute(&stores.owner)
        .await
        .unwrap();
    token
}

impl Stream {
    pub(crate) async fn open(service: &Service, token: &str, last: Option<i64>) -> Self {
        let response = ask(service, token, last).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            response,
            buffer: String::new(),
        }
    }

    /// The next event, comments and hints included; none when the stream has ended.
    async fn event(&mut self) -> Option<String> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.buffer = rest;
                return Some(event);
            }
            let chunk = tokio::time::timeout(Duration::from_secs(30), self.response.chunk());
            let Some(chunk) = chunk.await.expect("the stream is silent").unwrap() else {
                assert_eq!(self.buffer, "", "the stream ended within an event");
                return None;
            };
            self.buffer.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Reads to the end, which must be said: the last event tells when to come back. It comes before a heartbeat, at which the
    /// stream would notice by itself that it has to end.
    async fn end(&mut self) {
        let mut last = String::new();
        while let Some(event) = self.event().await {
            assert_ne!(event.trim(), ":", "a heartbeat has come before the end");
            last = event;
        }
        assert!(last.contains("retry: 1000"), "{last}");
    }

    /// The next notification.
    pub(crate) async fn notification(&mut self) -> Value {
        loop {
            let event = self.event().await.expect("the stream has ended");
            if let Some(data) = event.lines().find_map(|line| line.strip_prefix("data: ")) {
                let notification: Value = serde_json::from_str(data).unwrap();
                assert!(event.contains(&format!("id: {}", notification["id"])), "{event}");
                assert!(event.contains("event: notification"), "{event}");
                return notification;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_shows_what_any_stack_writes_and_goes_on_at_another() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let token = token(&stores, ann).await;
    // Blue is live and consumes; the client is connected to green.
    let blue = stores.notification(&["--role", "live"]).ready().await;
    let standby = [
        "--colour",
        "green",
        "--role",
        "follow",
        "--live-url",
        "http://127.0.0.1:1",
    ];
    let green = stores.notification(&standby).ready().await;

    let mut stream = Stream::open(&green, &token, None).await;
    assert!(stream.event().await.unwrap().contains("retry: 1000"));
    for price in 1..=3 {
        stores.trade("live", ann, bob, price, "1").await;
        let notification = stream.notification().await;
        assert_eq!(notification["id"], price);
        assert_eq!(notification["data"]["price"], price.to_string());
    }
    // What happens while nobody listens is not lost.
    drop(stream);
    for price in 4..=150 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    let mut stream = Stream::open(&blue, &token, Some(3)).await;
    for expected in 4..=150 {
        assert_eq!(stream.notification().await["id"], expected);
    }
    // Nobody sees what is told to others.
    let stranger = stores.user("live").await;
    let page: Value = blue
        .client
        .get(blue.url("/notifications"))
        .bearer_auth(stores.token(stranger, "live").await)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(page["notifications"], serde_json::json!([]));
}

/// A stand-in for the live Service: says whatever stack is live.
async fn live_service(own: Arc<AtomicBool>, stack: &'static str) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = move || {
        let stack = if own.load(Ordering::Relaxed) {
            stack
        } else {
            "blue-next"
        };
        std::future::ready([("x-exchange-stack", stack)])
    };
    tokio::spawn(async move {
        axum::serve(listener, axum::Router::new().fallback(answer))
            .await
            .unwrap();
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_ends_streams_at_an_event_and_stops_consuming() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let live = Arc::new(AtomicBool::new(true));
    let url = live_service(Arc::clone(&live), "green-abc").await;
    let flags = [
        "--colour",
        "green",
        "--revision",
        "abc",
        "--role",
        "follow",
        "--live-url",
        &url,
    ];
    let service = stores.notification(&flags).ready().await;
    let mut stream = Stream::open(&service, &token(&stores, ann).await, None).await;
    stream.event().await.unwrap();
    stores.trade("live", ann, bob, 1, "1").await;
    assert_eq!(stream.notification().await["id"], 1);
    stores.settled("live").await;

    // A database that does not answer keeps nobody.
    let mut silent = stores.owner.begin().await.unwrap();
    sqlx::query("lock table sessions in access exclusive mode")
        .execute(&mut *silent)
        .await
        .unwrap();
    live.store(false, Ordering::Relaxed);
    eventually("the stack drains", || async {
        let stack: Value = service.admin("/stack").await.json().await.unwrap();
        (stack["role"] == "Draining").then_some(())
    })
    .await;
    let draining = Instant::now();
    stream.end().await;
    // Five seconds are what may be, and what one waits for a lock.
    assert!(
        draining.elapsed() < Duration::from_secs(3),
        "{:?}",
        draining.elapsed()
    );
    silent.rollback().await.unwrap();

    eventually("it consumes nothing", || async {
        let stack: Value = service.admin("/stack").await.json().await.unwrap();
        (stack["consuming"] == false).then_some(())
    })
    .await;
    stores.trade("live", ann, bob, 2, "1").await;
    tokio::time::sleep(crate::stores::QUIET).await;
    assert_eq!(
        stores
            .count("select count(*) from outbox where published_at is null")
            .await,
        1
    );

    // It can become live again.
    live.store(true, Ordering::Relaxed);
    stores.settled("live").await;
    stores.assert_told_once("live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_token_and_goes_on_with_the_next() {
    let stores = Stores::start().await;
    let users = Exchange::over(stores.database.clone(), &["--access-token-lifetime=12s"]).await;
    let service = stores.notification(&["--role", "live"]).ready().await;
    let ann = users.user("ann@example.org").await;
    let mut stream = Stream::open(&service, &ann.access_token, Some(0)).await;
    assert_eq!(stream.notification().await["kind"], "sign_in");
    stream.end().await;
    assert_eq!(ask(&service, &ann.access_token, Some(1)).await.status(), 401);

    let body = serde_json::json!({"refresh_token": ann.refresh_token});
    let next = users.call(Method::POST, "/token/refresh", None, Some(body)).await;
    let next: Value = next.json().await.unwrap();
    let id: Uuid = ann.user_id.parse().unwrap();
    stores.trade("live", id, stores.user("live").await, 7, "1").await;
    let mut stream = Stream::open(&service, next["access_token"].as_str().unwrap(), Some(1)).await;
    let notification = stream.notification().await;
    assert_eq!(
        (&notification["id"], &notification["kind"]),
        (&2.into(), &"trade".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_becomes_no_older_than_a_connection() {
    let stores = Stores::start().await;
    let service = stores.notification(&["--role", "live", "--max-connection-age", "2s"]);
    let service = service.ready().await;
    let ann = stores.user("live").await;
    let token = token(&stores, ann).await;
    let opened = Instant::now();
    Stream::open(&service, &token, None).await.end().await;
    assert!(
        opened.elapsed() >= Duration::from_secs(2),
        "{:?}",
        opened.elapsed()
    );
    Stream::open(&service, &token, None).await.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_session() {
    let stores = Stores::start().await;
    let users = Exchange::over(stores.database.clone(), &[]).await;
    let service = stores.notification(&["--role", "live"]).ready().await;
    let here = users.user("ann@example.org").await;
    let mut there = users.log_in("ann@example.org").await;
    stores.settled("live").await;
    let mut kept = Stream::open(&service, &here.access_token, None).await;
    kept.event().await.unwrap();
    let change = serde_json::json!({
        "current_password": PASSWORD, "new_password": "another password",
    });
    let back = serde_json::json!({
        "current_password": "another password", "new_password": PASSWORD,
    });
    // Ended by its owner, by the owner from elsewhere, and by the use of a token that was stolen.
    for round in 0..4 {
        let mut stream = Stream::open(&service, &there.access_token, None).await;
        stream.event().await.unwrap();
        let refresh = || Some(serde_json::json!({"refresh_token": there.refresh_token}));
        let (path, token, body) = match round {
            0 => ("/logout", Some(&there.access_token), None),
            1 => ("/password", Some(&here.access_token), Some(change.clone())),
            2 => ("/password", Some(&here.access_token), Some(back.clone())),
            _ => ("/token/refresh", None, refresh()),
        };
        let token = token.map(String::as_str);
        let done = users.call(Method::POST, path, token, body).await;
        assert!(done.status().is_success(), "{path}: {}", done.status());
        if round == 3 {
            let again = users.call(Method::POST, path, token, refresh()).await;
            assert_eq!(again.status(), 401);
        }
        stream.end().await;
        assert_eq!(ask(&service, &there.access_token, None).await.status(), 401);
        let password = if round == 1 { "another password" } else { PASSWORD };
        let body = serde_json::json!({"email": "ann@example.org", "password": password});
        let login = users.call(Method::POST, "/login", None, Some(body)).await;
        there = login.json().await.unwrap();
        assert_eq!(kept.notification().await["kind"], "sign_in");
    }
    let gone = users
        .call(Method::DELETE, "/user", Some(&here.access_token), None)
        .await;
    assert_eq!(gone.status(), 204);
    kept.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_stable_and_reading_is_remembered() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let token = token(&stores, ann).await;
    let service = stores.notification(&["--role", "live"]).ready().await;
    for price in 1..=5 {
        stores.trade("live", ann, bob, price, "1").await;
    }
    stores.settled("live").await;
    let get = async |path: &str| -> (u16, Value) {
        let response = service
            .client
            .get(service.url(path))
            .bearer_auth(&token)
            .send()
            .await
            .unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    };
    let ids = |page: &Value| -> Vec<i64> {
        page["notifications"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["id"].as_i64().unwrap())
            .collect()
    };
    let (_, first) = get("/notifications?limit=2").await;
    assert_eq!((ids(&first), &first["next"]), (vec![5, 4], &4.into()));
    stores.trade("live", ann, bob, 6, "1").await;
    stores.settled("live").await;
    let (_, second) = get("/notifications?limit=2&before=4").await;
    assert_eq!((ids(&second), &second["next"]), (vec![3, 2], &2.into()));
    let (_, third) = get("/notifications?limit=2&before=2").await;
    assert_eq!((ids(&third), third.get("next")), (vec![1], None));

    let post = async |path: &str, token: &str, body: &'static str| -> u16 {
        let request = service.client.post(service.url(path)).bearer_auth(token);
        let request = request.header("content-type", "application/json").body(body);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(post("/notifications/2/read", &token, "").await, 204);
    assert_eq!(post("/notifications/2/read", &token, "").await, 204);
    assert_eq!(ids(&get("/notifications?unread=true").await.1), [6, 5, 4, 3, 1]);
    assert_eq!(post("/notifications/read", &token, r#"{"up_to": 4}"#).await, 204);
    assert_eq!(ids(&get("/notifications?unread=true").await.1), [6, 5]);
    assert_eq!(post("/notifications/99/read", &token, "").await, 404);
    // Somebody else's notification is not there at all.
    let stranger = stores.token(stores.user("live").await, "live").await;
    assert_eq!(post("/notifications/2/read", &stranger, "").await, 404);

    for bad in ["?limit=0", "?limit=201", "?limit=x", "?before=x", "?other=1"] {
        let (status, problem) = get(&format!("/notifications{bad}")).await;
        assert_eq!(
            (status, &problem["code"]),
            (400, &"invalid_parameter".into()),
            "{bad}"
        );
    }
    let anonymous = service
        .client
        .get(service.url("/notifications/stream"))
        .send()
        .await
        .unwrap();
    assert_eq!(anonymous.status(), 401);
    let request = service
        .client
        .get(service.url("/notifications/stream"))
        .bearer_auth(&token);
    assert_eq!(
        request
            .header("last-event-id", "x")
            .send()
            .await
            .unwrap()
            .status(),
        400
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_revision_is_announced_once_to_every_live_user() {
    let stores = Stores::start().await;
    stores.user("test-blue-abc.run").await;
    // More than are told at a time.
    sqlx::query(
        "insert into users (id, lane, email, password_hash)
         select uuid_v7(), 'live', n || '@example.org', 'none' from generate_series(1, 600) n",
    )
    .execute(&stores.owner)
    .await
    .unwrap();
    let users = stores
        .count("select count(*) from users where lane = 'live'")
        .await;
    // In one statement: between two, a release could come in.
    let announced = || async {
        let sql = "select case when bool_and(announced_at is not null) then count(*) else 0 end from releases where revision <> 'left'";
        let all = stores.count(sql).await;
        (all > 0).then_some(all)
    };
    let flags = ["--role", "live", "--notice-delay", "1s", "--revision", "abc"];
    let (one, two) = (
        stores.notification(&flags).ready().await,
        stores.notification(&flags).ready().await,
    );
    assert_eq!(eventually("the release is announced", announced).await, 1);
    drop((one, two));
    // Another stack has begun to announce itself, and lost the traffic to this one.
    sqlx::query("insert into releases (revision, version) values ('left', '9.9.9')")
        .execute(&stores.owner)
        .await
        .unwrap();
    let again = stores.notification(&flags).ready().await;
    tokio::time::sleep(crate::stores::QUIET).await;
    assert_eq!(
        stores
            .count("select count(*) from notifications where kind = 'release'")
            .await,
        users
    );
    assert_eq!(
        stores
            .count(
                "select count(distinct user_id) from notifications where kind = 'release' and lane = 'live'"
            )
            .await,
        users
    );
    drop(again);
    let flags = ["--role", "live", "--notice-delay", "1s", "--revision", "def"];
    let _next = stores.notification(&flags).ready().await;
    eventually("the next release is announced", || async {
        (announced().await == Some(2)).then_some(())
    })
    .await;
    assert_eq!(
        stores
            .count("select count(*) from notifications where kind = 'release'")
            .await,
        2 * users
    );
}
