//! A service starts, says what it is, and ends.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    servers::{Database, Port, Postgres, Service, client, eventually, temporary_directory},
    stores::{Nats, Redis},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_service_becomes_ready_and_says_which_stack_it_is() {
    let database = Database::migrated(Postgres::shared()).await;
    let flags = ["--colour", "green", "--revision", "abc123"];
    let mut service = Service::live("user", &database, &flags).ready().await;

    let stack: serde_json::Value = service.admin("/stack").await.json().await.unwrap();
    assert_eq!(stack["colour"], "green");
    assert_eq!(stack["revision"], "abc123");
    assert_eq!(stack["role"], "Live");
    assert!(stack["database"].is_string(), "{stack}");

    let response = service.get("/.well-known/jwks.json").await;
    assert_eq!(response.headers()["x-exchange-stack"], "green-abc123");
    let keys: serde_json::Value = response.json().await.unwrap();
    assert_eq!(keys["keys"][0]["crv"], "Ed25519");

    let metrics = service.admin("/metrics").await.text().await.unwrap();
    let line = r#"http_server_requests_total{method="GET",route="/.well-known/jwks.json",lane="live",status="200"} 1"#;
    assert!(metrics.contains(line), "{metrics}");

    service.signal("TERM");
    // It waits for the clients that it has.
    service.client = client();
    let status = eventually("the service ends", || std::future::ready(service.ended())).await;
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_database_is_an_answer_and_not_an_empty_service() {
    let postgres = Postgres::start(&[]);
    let database = Database::migrated(&postgres).await;
    let service = Service::live("user", &database, &[]).ready().await;
    postgres.server.signal("KILL");
    eventually("the database is missed", || async {
        let response = service.refresh_with_noise().await;
        if response.status() == 401 {
            return None;
        }
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(response.headers()["x-exchange-stack"], "blue-local");
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let problem: serde_json::Value = response.json().await.unwrap();
        assert_eq!(problem["code"], "unavailable");
        Some(())
    })
    .await;
    assert_eq!(service.admin("/readyz").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_store_is_needed_once_and_none_later() {
    let database = Database::migrated(Postgres::shared()).await;
    let (queue_port, market_port) = (Port::free(), Port::free());
    let market_url = format!("redis://:secret@localhost:{market_port}");
    let queue_url = format!("nats://exchange:secret@localhost:{queue_port}");
    let market = ["--market-data-url", &market_url];
    let both = [&market[..], &["--queue-url", &queue_url]].concat();
    let trade = Service::live("trade", &database, &market);
    let notification = Service::live("notification", &database, &both);
    let says = async |service: &Service, what: &str| {
        eventually(&format!("it says {what}"), || async {
            let answer = service.admin("/readyz").await;
            let waits = answer.status() == 503;
            (waits && answer.text().await.unwrap().contains(what)).then_some(())
        })
        .await;
    };
    says(&trade, "the market-data store").await;
    says(&notification, "the market-data store").await;
    let redis = Redis::start_on(market_port, None);
    says(&notification, "the queue").await;
    let trade = trade.ready().await;
    let nats = Nats::start_on(queue_port, None);
    let notification = notification.ready().await;
    drop((redis, nats));
    eventually("the market data is missed", || async {
        (trade.get("/market/ticker?product=BTC-USD").await.status() == 503).then_some(())
    })
    .await;
    for service in [&trade, &notification] {
        assert_eq!(service.admin("/readyz").await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for_forever() {
    let database = Database::migrated(Postgres::shared()).await;
    let service = Service::live("user", &database, &["--request-timeout", "500ms"])
        .ready()
        .await;
    let mut stream = TcpStream::connect(service.public).await.unwrap();
    let request =
        "POST /login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 408") && answer.contains("request_timeout"),
        "{answer}"
    );
    assert!(answer.contains("connection: close\r\n"), "{answer}");
}

#[test]
fn a_wrong_configuration_is_refused_with_every_problem() {
    let output = std::process::Command::new(crate::servers::binary())
        .args(["user", "--colour", "Blue!", "--drain-timeout", "soon"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for problem in ["--database-url", "--colour", "--drain-timeout", "--live-url"] {
        assert!(said.contains(problem), "{problem} is missing in {said}");
    }
}

#[test]
fn stores_that_are_missing_or_cannot_be_reached_by_their_urls_are_all_named_at_once() {
    let directory = temporary_directory("urls");
    let mail = directory.path().join("mail");
    std::fs::write(&mail, "http://user:s3cr3t@mail.example").unwrap();
    let start = |service: &[&str], settings: &[(&str, &str)]| {
        let output = std::process::Command::new(crate::servers::binary())
            .args(service)
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!said.contains("s3cr3t"), "{said}");
        said
    };
    let names = |said: &str| {
        let lines = said.lines().filter_map(|line| line.split(['(', ')']).nth(1));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let unusable = [
        ("EXCHANGE_DATABASE_URL", "postgres://user:s3cr3t@db:port/exchange"),
        ("EXCHANGE_QUEUE_URL", "s3cr3t"),
        ("EXCHANGE_MARKET_DATA_URL", "redis://:s3cr3t@"),
        ("EXCHANGE_MAIL_URL_FILE", mail.to_str().unwrap()),
    ];
    let live = ("EXCHANGE_ROLE", "live");
    let said = start(&["notification"], &[&unusable[..], &[live]].concat());
    assert_eq!(names(&said), unusable.map(|(name, _)| name), "{said}");
    let needed = [
        "EXCHANGE_DATABASE_URL",
        "EXCHANGE_QUEUE_URL",
        "EXCHANGE_MARKET_DATA_URL",
    ];
    let said = start(&["notification"], &[live]);
    assert_eq!(names(&said), needed, "{said}");
    // Whoever serves nobody has no role.
    for (command, settings) in [
        (&["market", "rebuild"][..], &[][..]),
        (&["trade"][..], &[live][..]),
    ] {
        let said = start(command, settings);
        assert_eq!(names(&said), [needed[0], needed[2]], "{said}");
    }
}
