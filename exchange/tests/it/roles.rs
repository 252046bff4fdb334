//! The role of a stack over real sockets, and the end of a process.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderMap, HeaderName, HeaderValue},
    routing::get,
};
use serde_json::Value;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};

use crate::{
    disasters::Front,
    servers::{Database, Postgres, Service, client, eventually},
    stores::Stores,
};

/// A live Service: it answers as the stack that the test says.
struct LiveService {
    address: SocketAddr,
    url: String,
    answers_as: Arc<std::sync::Mutex<Option<&'static str>>>,
}

impl LiveService {
    async fn start() -> Self {
        let answers_as = Arc::new(std::sync::Mutex::new(None));
        let stack = Arc::clone(&answers_as);
        let answer = async move || {
            let stack = *stack.lock().unwrap();
            // Without a stack it is something else that answers.
            let headers: HeaderMap = stack
                .map(|stack| {
                    (
                        HeaderName::from_static("x-exchange-stack"),
                        HeaderValue::from_static(stack),
                    )
                })
                .into_iter()
                .collect();
            (headers, "hello")
        };
        let router = Router::new().route("/version", get(answer));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async { axum::serve(listener, router).await });
        Self {
            address,
            url: format!("http://{address}"),
            answers_as,
        }
    }

    fn answer_as(&self, stack: Option<&'static str>) {
        *self.answers_as.lock().unwrap() = stack;
    }
}

async fn has_role(service: &Service, role: &str) {
    eventually(&format!("it is {role}"), || async {
        let stack: Value = service.admin("/stack").await.json().await.unwrap();
        (stack["role"] == role).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_follows_its_live_service() {
    let database = Database::migrated(Postgres::shared()).await;
    let live = LiveService::start().await;
    let flags = ["--live-url", &live.url, "--colour", "green", "--revision", "abc"];
    let service = Service::start("user", &database, &flags).ready().await;
    has_role(&service, "Standby").await;
    // It answers in every role.
    let kept = client();
    let version = || async { kept.get(service.url("/version")).send().await.unwrap() };
    assert_eq!(version().await.status(), 200);

    live.answer_as(Some("green-abc"));
    has_role(&service, "Live").await;
    assert!(!version().await.headers().contains_key("connection"));

    live.answer_as(Some("blue-def"));
    has_role(&service, "Draining").await;
    // A connection learns of the role by itself, a moment before or after it is told.
    eventually("an answer says that its connection ends", || async {
        let answer = version().await;
        (answer.headers().get("connection")? == "close").then_some(())
    })
    .await;
    eventually("it has no connections", || async {
        let stack: Value = service.admin("/stack").await.json().await.unwrap();
        (stack["connections"] == 0).then_some(())
    })
    .await;

    live.answer_as(Some("green-abc"));
    has_role(&service, "Live").await;
    eventually("an answer says nothing of an end", || async {
        (!version().await.headers().contains_key("connection")).then_some(())
    })
    .await;

    // Whoever does not say what stack it is says nothing about the role.
    live.answer_as(None);
    tokio::time::sleep(Duration::from_millis(3500)).await;
    has_role(&service, "Live").await;
    let log = service.logged("-> Draining", 1).await;
    assert_eq!(log.matches("-> Draining").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_stack_cuts_what_is_open_after_its_time() {
    let database = Database::migrated(Postgres::shared()).await;
    let live = LiveService::start().await;
    let flags = [
        "--live-url",
        &live.url,
        "--colour",
        "green",
        "--revision",
        "abc",
        "--drain-timeout",
        "1s",
    ];
    let service = Service::start("user", &database, &flags).ready().await;
    live.answer_as(Some("green-abc"));
    has_role(&service, "Live").await;
    assert_eq!(service.get("/version").await.status(), 200);
    live.answer_as(Some("blue-def"));
    eventually("the kept connection is cut", || async {
        let stack: Value = client()
            .get(service.admin_url("/stack"))
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap();
        (stack["role"] == "Draining" && stack["connections"] == 0).then_some(())
    })
    .await;
}

/// The way back, long after the drain: all that tells it that it is live again comes over new connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_stack_whose_drain_is_over_becomes_live_again() {
    let database = Database::migrated(Postgres::shared()).await;
    let other = LiveService::start().await;
    other.answer_as(Some("blue-def"));
    let front = Front::to(other.address, Duration::from_millis(20)).await;
    let url = front.url();
    let stack = ["--live-url", &url, "--colour", "green", "--revision", "abc"];
    let flags = [&stack[..], &["--drain-timeout", "1s"]].concat();
    let service = Service::start("user", &database, &flags).ready().await;
    front.lead_to(service.public);
    has_role(&service, "Live").await;
    let mut idle = TcpStream::connect(service.public).await.unwrap();
    front.lead_to(other.address);
    has_role(&service, "Draining").await;
    // It is cut when the time is over.
    assert!(!matches!(idle.read(&mut [0]).await, Ok(1..)));

    front.lead_to(service.public);
    has_role(&service, "Live").await;
    let kept = client();
    eventually("an answer says nothing of an end", || async {
        let answer = kept.get(service.url("/version")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        (!answer.headers().contains_key("connection")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminating_process_serves_on_until_its_clients_have_left() {
    let database = Database::migrated(Postgres::shared()).await;
    let mut service = Service::live("user", &database, &[]).ready().await;
    let kept = client();
    assert_eq!(
        kept.get(service.url("/version")).send().await.unwrap().status(),
        200
    );
    service.signal("TERM");
    eventually("it says that it is going", || async {
        (service.admin("/readyz").await.status() == 503).then_some(())
    })
    .await;
    // New clients are served, and the old one as well; both are told.
    for client in [&client(), &kept] {
        let response = client.get(service.url("/version")).send().await.unwrap();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["connection"]),
            (200, &HeaderValue::from_static("close"))
        );
    }
    let status = eventually("it ends", || std::future::ready(service.ended())).await;
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminating_process_ends_at_its_deadline() {
    let database = Database::migrated(Postgres::shared()).await;
    let mut service = Service::live("user", &database, &["--termination-deadline", "1s"])
        .ready()
        .await;
    let kept = client();
    assert_eq!(
        kept.get(service.url("/version")).send().await.unwrap().status(),
        200
    );
    service.signal("TERM");
    let status = eventually("it ends", || std::future::ready(service.ended())).await;
    assert!(status.success());
    service
        .logged("closing what is open at the termination deadline", 1)
        .await;
}

/// An audit may take minutes: nobody waits for it, and it does not go on alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminating_process_takes_its_audit_along() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql(
        "create or replace function audit_ledger_v1(p_lane text)
         returns table (problem text, subject text, expected numeric, actual numeric) language plpgsql security definer
         as 'begin perform pg_sleep(600); end'",
    )
    .execute(&owner)
    .await
    .unwrap();
    let audits = async || -> i64 {
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and state = 'active' and query like '%from audit_ledger_v1%'
               and pid <> pg_backend_pid()",
        )
        .fetch_one(&owner)
        .await
        .unwrap()
    };
    let start = async || {
        let service = Service::live("trade", &database, &[]).ready().await;
        eventually("the ledger is audited", || async {
            (audits().await == 1).then_some(())
        })
        .await;
        service
    };
    let none_is_left = async || {
        eventually("the audit has ended", || async {
            (audits().await == 0).then_some(())
        })
        .await;
    };
    let mut service = start().await;
    service.signal("TERM");
    let status = eventually("it ends", || std::future::ready(service.ended())).await;
    assert!(status.success());
    assert!(!service.log().contains("in time"), "{}", service.log());
    none_is_left().await;
    let service = start().await;
    service.signal("KILL");
    none_is_left().await;
}

/// What only a live stack knows it does not go on telling when another one is.
#[tokio::test(flavor = "multi_thread")]
async fn a_stack_that_is_not_live_any_more_says_nothing_of_what_is() {
    let stores = Stores::start().await;
    let live = LiveService::start().await;
    let flags = ["--live-url", &live.url, "--colour", "green", "--revision", "abc"];
    let trade = Service::start("trade", &stores.database, &flags).ready().await;
    let notification = stores.notification(&flags).ready().await;
    let known = [
        (&trade, "ledger_imbalance"),
        (&notification, "outbox_depth"),
        (&notification, "outbox_age_seconds"),
    ];
    let all_are = async |told: bool| {
        for (service, name) in known {
            eventually(&format!("{name} is told: {told}"), || async {
                let page = service.admin("/metrics").await.text().await.unwrap();
                (page.contains(&format!("\n{name} ")) == told).then_some(())
            })
            .await;
        }
    };
    all_are(false).await;
    live.answer_as(Some("green-abc"));
    all_are(true).await;
    live.answer_as(Some("blue-def"));
    all_are(false).await;
    let page = trade.admin("/metrics").await.text().await.unwrap();
    assert!(page.contains("\nledger_audited_timestamp_seconds "), "{page}");
    live.answer_as(Some("green-abc"));
    all_are(true).await;
}
