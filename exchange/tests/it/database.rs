//! The database as services meet it: encrypted, with changing credentials, and sometimes not at all.

use std::{
    mem,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use exchange::outbox;

use base64::{Engine, prelude::BASE64_STANDARD};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::servers::{Database, Postgres, Service, eventually, temporary_directory};

/// Writes a file into the server's data directory, as its own.
async fn install(owner: &PgPool, name: &str, content: &str) {
    let content = BASE64_STANDARD.encode(content);
    let sql = format!(
        "copy (select '{content}') to program 'base64 -d >{name}.new && chmod 600 {name}.new && mv {name}.new {name}'"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(owner).await.unwrap();
}

/// 401 with a database, 503 without.
async fn status(service: &Service) -> u16 {
    service.refresh_with_noise().await.status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_and_a_new_password_is_picked_up() {
    let postgres = Postgres::start(&[]);
    let database = Database::migrated(&postgres).await;
    let owner = database.owner().await;
    let server = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let stranger = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    install(&owner, "server.crt", &server.cert.pem()).await;
    install(&owner, "server.key", &server.signing_key.serialize_pem()).await;
    let rules =
        "host all postgres 127.0.0.1/32 trust\nhostssl all exchange_service 127.0.0.1/32 scram-sha-256\n";
    install(&owner, "pg_hba.conf", rules).await;
    sqlx::raw_sql("alter system set ssl = on")
        .execute(&owner)
        .await
        .unwrap();
    let set_password =
        "set password_encryption = 'scram-sha-256'; alter role exchange_service password 'first-secret'";
    sqlx::raw_sql(set_password).execute(&owner).await.unwrap();
    sqlx::raw_sql("select pg_reload_conf()")
        .execute(&owner)
        .await
        .unwrap();

    let directory = temporary_directory("tls");
    let (trusted, untrusted) = (
        directory.path().join("trusted.pem"),
        directory.path().join("untrusted.pem"),
    );
    std::fs::write(&trusted, server.cert.pem()).unwrap();
    std::fs::write(&untrusted, stranger.cert.pem()).unwrap();
    let url = |password: &str, tls: &str| {
        let user = format!("exchange_service:{password}@");
        format!("{}?{tls}", database.app_url.replace("exchange_service@", &user))
    };
    let verified = |ca: &Path| format!("sslmode=verify-full&sslrootcert={}", ca.display());
    let start = |file: &str, url: String| {
        let file = directory.path().join(file);
        std::fs::write(&file, url).unwrap();
        Service::live(
            "user",
            &database,
            &["--database-url-file", file.to_str().unwrap()],
        )
    };

    let untrusting = start("untrusting", url("first-secret", &verified(&untrusted)));
    let plain = start("plain", url("first-secret", "sslmode=disable"));
    let service = start("url", url("first-secret", &verified(&trusted)))
        .ready()
        .await;
    assert_eq!(status(&service).await, 401);
    for refused in [&untrusting, &plain] {
        eventually("it has tried the database", || async {
            let response = refused.admin("/readyz").await;
            assert_eq!(response.status(), 503);
            let reason = response.text().await.unwrap();
            reason.contains("cannot be used").then_some(())
        })
        .await;
    }
    let plain: i64 = sqlx::query_scalar(
        "select count(*) from pg_stat_ssl join pg_stat_activity using (pid) where usename = 'exchange_service' and not ssl",
    )
    .fetch_one(&owner)
    .await
    .unwrap();
    assert_eq!(plain, 0);

    // A new password, and every connection made with the old one is gone.
    let rotate =
        "set password_encryption = 'scram-sha-256'; alter role exchange_service password 'second-secret';
        select pg_terminate_backend(pid) from pg_stat_activity where usename = 'exchange_service'";
    sqlx::raw_sql(rotate).execute(&owner).await.unwrap();
    eventually("the old password is refused", || async {
        (status(&service).await == 503).then_some(())
    })
    .await;
    std::fs::write(
        directory.path().join("url"),
        url("second-secret", &verified(&trusted)),
    )
    .unwrap();
    eventually("the new password is used", || async {
        (status(&service).await == 401).then_some(())
    })
    .await;
    for log in [service.log(), untrusting.log()] {
        assert!(!log.contains("secret"), "{log}");
    }
}

/// Stands between a service and its database, and can be cut, or fall silent.
pub(crate) struct Wire {
    port: u16,
    connected: watch::Sender<bool>,
    /// When it changes nothing comes through any more, for ever, on the connections that were made since it was put there: each
    /// listens to it as long as anything comes through.
    silent: Arc<Mutex<watch::Sender<()>>>,
}

impl Wire {
    pub(crate) async fn to(database: &Database) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url: reqwest::Url = database.app_url.parse().unwrap();
        let target = ("127.0.0.1", url.port().unwrap());
        let (connected, state) = watch::channel(true);
        let silent = Arc::new(Mutex::new(watch::Sender::new(())));
        let speaks = Arc::clone(&silent);
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let (mut state, mut speech) = (state.clone(), speaks.lock().unwrap().subscribe());
                tokio::spawn(async move {
                    let pipe = async {
                        let mut server = TcpStream::connect(target).await?;
                        copy_bidirectional(&mut client, &mut server).await
                    };
                    let silent = tokio::select! {
                        _ = pipe => false,
                        _ = state.wait_for(|connected| !connected) => false,
                        _ = speech.changed() => true,
                    };
                    drop(speech);
                    if silent {
                        // With the client's connection open.
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Self {
            port,
            connected,
            silent,
        }
    }

    /// As if the database's host had gone without a word, and another had its address. Afterwards nothing comes through.
    pub(crate) async fn falls_silent(&self) {
        let silent = mem::replace(&mut *self.silent.lock().unwrap(), watch::Sender::new(()));
        silent.send_replace(());
        silent.closed().await;
    }

    /// The same database, through this wire.
    pub(crate) fn through(&self, database: &Database) -> Database {
        let mut url: reqwest::Url = database.app_url.parse().unwrap();
        url.set_port(Some(self.port)).unwrap();
        Database {
            app_url: url.into(),
            ..database.clone()
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_twenty_seconds_without_a_database_everything_is_as_before() {
    let database = Database::migrated(Postgres::shared()).await;
    let wire = Wire::to(&database).await;
    let service = Service::live("user", &wire.through(&database), &[]).ready().await;
    assert_eq!(status(&service).await, 401);
    wire.connected.send_replace(false);
    let outage = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut refused = 0;
    while tokio::time::Instant::now() < outage || refused < 5 {
        let response = service.refresh_with_noise().await;
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key("retry-after"));
        refused += 1;
        assert_eq!(service.admin("/readyz").await.status(), 200);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    wire.connected.send_replace(true);
    let back = tokio::time::Instant::now();
    eventually("it works again", || async {
        (status(&service).await == 401).then_some(())
    })
    .await;
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    for _ in 0..20 {
        assert_eq!(status(&service).await, 401);
    }
}

/// How long a database may be busy without a request failing.
const BUSY: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_a_connection_while_the_database_is_busy() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    let service = Service::live("user", &database, &["--database-connections", "1"])
        .ready()
        .await;
    let mut tokens = owner.begin().await.unwrap();
    sqlx::query("lock table refresh_tokens in access exclusive mode")
        .execute(&mut *tokens)
        .await
        .unwrap();
    let busy = async {
        eventually("one has the connection", || async {
            let waiting = sqlx::query_scalar(
                "select count(*) from pg_locks where relation = 'refresh_tokens'::regclass and not granted",
            );
            let waiting: i64 = waiting.fetch_one(&owner).await.unwrap();
            (waiting == 1).then_some(())
        })
        .await;
        tokio::time::sleep(BUSY).await;
        tokens.rollback().await.unwrap();
    };
    let statuses = async { tokio::join!(status(&service), status(&service), status(&service)) };
    let (statuses, ()) = tokio::join!(statuses, busy);
    assert_eq!(statuses, (401, 401, 401));
}

#[tokio::test(flavor = "multi_thread")]
async fn old_events_are_removed_in_portions() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql(
        "insert into outbox (id, lane, topic, key, payload, published_at, done_at)
         select gen_random_uuid(), 'live', 'user.signed_in', '', '{}', now(), now() - interval '2 hours'
         from generate_series(1, 12000);
         insert into outbox (id, lane, topic, key, payload, published_at, done_at)
         values ('01890000-0000-7000-8000-000000000000', 'live', 'user.signed_in', '', '{}', now(), now());
         insert into inbox (consumer, event_id, lane)
         select 'notification', overlay(gen_random_uuid()::text placing '01890000-0000-7' from 1)::uuid, 'live'
         from generate_series(1, 12000)
         union all select 'market', '01890000-0000-7000-8000-000000000000', 'live'
         union all select 'notification', uuid_v7(), 'live'",
    )
    .execute(&owner)
    .await
    .unwrap();
    let left = || {
        sqlx::query_as::<_, (i64, i64)>("select (select count(*) from outbox), (select count(*) from inbox)")
    };
    let mut before = left().fetch_one(&owner).await.unwrap();
    let service = PgPool::connect(&database.app_url).await.unwrap();
    while outbox::prune(&service).await.unwrap() {
        let after = left().fetch_one(&owner).await.unwrap();
        assert!(
            before.0 - after.0 <= 5000 && before.1 - after.1 <= 5000,
            "{before:?}, {after:?}"
        );
        before = after;
    }
    // One was done just now, one belongs to it, and one is young.
    assert_eq!(left().fetch_one(&owner).await.unwrap(), (1, 2));
}
