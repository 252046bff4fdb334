//! Whole stacks under load while parts of them die or are replaced: afterwards the audit finds nothing.

use std::{
    ffi::OsStr,
    net::SocketAddr,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use crate::{
    queue::metric,
    servers::{Database, Postgres, Service, V1, eventually, temporary_directory},
    stores::{Nats, Stores},
    traders::accept,
    whole::{SECRET, Stack, assert_discreet, text},
};

/// What a Service of Kubernetes does: new connections go to whatever it points at now, open ones stay where they are.
pub(crate) struct Front {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
}

impl Front {
    async fn of(service: &Service) -> Self {
        Self::to(service.public, Duration::ZERO).await
    }

    /// The same from far away: what clients send comes so long after their connections.
    pub(crate) async fn to(target: SocketAddr, latency: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(target));
        let current = Arc::clone(&target);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let target = *current.lock().unwrap();
                tokio::spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(target).await {
                        tokio::time::sleep(latency).await;
                        // Whichever side ends, both do.
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        Self { address, target }
    }

    fn point_at(&self, service: &Service) {
        self.lead_to(service.public);
    }

    pub(crate) fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = target;
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// The live Services of user, trade and notification.
struct Fronts([Front; 3]);

impl Fronts {
    async fn of(stack: &Stack) -> Self {
        Self([
            Front::of(&stack.user).await,
            Front::of(&stack.trade).await,
            Front::of(&stack.notification).await,
        ])
    }

    fn point_at(&self, stack: &Stack) {
        for (front, service) in self.0.iter().zip(stack.services()) {
            front.point_at(service);
        }
    }

    /// Runs `exchange load`, and returns what it wrote and what it said.
    async fn load(&self, flags: &[impl AsRef<OsStr>]) -> (Value, String) {
        let directory = temporary_directory("load");
        let json = directory.path().join("load.json");
        let [user, trade, notification] = self.0.each_ref().map(Front::url);
        let mut load = Command::new(V1);
        load.args(["load", "--user-url", &user, "--trade-url", &trade])
            .args(["--notification-url", &notification, "--json"])
            .arg(&json)
            .args(flags)
            .env("EXCHANGE_LANE_SECRET", SECRET);
        let output = tokio::task::spawn_blocking(move || load.output().unwrap())
            .await
            .unwrap();
        let written = std::fs::read(&json).unwrap_or_else(|_| panic!("{}", text(&output)));
        (serde_json::from_slice(&written).unwrap(), text(&output))
    }
}

const GREEN: [&str; 6] = ["--colour", "green", "--revision", "abc", "--role", "live"];

/// Waits until the load is well under way.
async fn orders(stores: &Stores, more_than: i64) {
    eventually("orders come in", || async {
        (stores.count("select count(*) from orders").await > more_than).then_some(())
    })
    .await;
}

/// Flags of a load in the live lane that knows the ledger: who credits its deposits, and the database; and the directory of
/// a file that they name.
pub(crate) async fn treasury(stores: &Stores, users: &Service) -> (Vec<String>, TempDir) {
    let treasurer = json!({"email": "bank@example.org", "password": "correct horse battery"});
    // A client of its own, which goes: a stack that drains would wait for the end of its idle connection.
    let registration = crate::servers::client().post(users.url("/register"));
    let registered = registration.json(&treasurer).send().await.unwrap();
    accept(registered, StatusCode::ACCEPTED).await;
    let mut grant = Command::new(V1);
    grant
        .args(["grant", "treasury", "--email", "Bank@example.org"])
        .args(["--database-url", &stores.database.owner_url]);
    let granted = grant.output().unwrap();
    assert!(granted.status.success(), "{}", text(&granted));
    let directory = temporary_directory("treasury");
    let password = directory.path().join("password");
    std::fs::write(&password, "correct horse battery").unwrap();
    let flags = [
        "--treasury-email",
        "bank@example.org",
        "--treasury-password-file",
        password.to_str().unwrap(),
        "--database-url",
        &stores.database.owner_url,
    ];
    (flags.map(str::to_owned).to_vec(), directory)
}

/// A live stack that has its own stores and takes a short load in the live lane, in which messages and market data are
/// those of real users.
struct Live {
    stores: Stores,
    stack: Stack,
    fronts: Fronts,
    flags: Vec<String>,
    _treasury: TempDir,
}

impl Live {
    async fn start() -> Self {
        let stores = Stores::start().await;
        let stack = Stack::start(&stores, &GREEN).await;
        let fronts = Fronts::of(&stack).await;
        let (mut flags, treasury) = treasury(&stores, &stack.user).await;
        let load = [
            "--rate",
            "60",
            "--duration",
            "8s",
            "--connections",
            "4",
            "--traders",
            "4",
            "--idle-connections",
            "0",
        ];
        flags.extend(load.map(str::to_owned));
        Self {
            stores,
            stack,
            fronts,
            flags,
            _treasury: treasury,
        }
    }
}

fn assert_audited(result: &Value) {
    assert_eq!(result["audit"]["findings"], json!([]), "{result:#}");
    assert_eq!(result["audit"]["ledger_checked"], true, "{result:#}");
    assert!(result["audit"]["trades"].as_u64().unwrap() > 100, "{result:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_service_is_killed_in_mid_load_and_the_audit_is_clean() {
    let stores = Stores::start().await;
    let mut stack = Stack::start(&stores, &GREEN).await;
    let fronts = Fronts::of(&stack).await;
    let flags = [
        "--lane",
        "test-green-abc.load",
        "--rate",
        "60",
        "--duration",
        "14s",
        "--connections",
        "4",
        "--traders",
        "4",
        "--idle-connections",
        "0",
        "--database-url",
        &stores.database.owner_url,
    ];
    let killing = async {
        // Trade last: until it has been replaced no orders come in, and a slow machine would wait for more of them in vain.
        for (number, killed) in (1..).zip([0, 2, 1]) {
            orders(&stores, 150 * number).await;
            stack.services()[killed].signal("KILL");
            // Only what has been killed is replaced.
            let mut next = Stack::start(&stores, &GREEN).await;
            let (old, new) = (stack.services_mut(), next.services_mut());
            for (at, (old, new)) in old.into_iter().zip(new).enumerate() {
                if at == killed {
                    std::mem::swap(old, new);
                }
            }
            fronts.point_at(&stack);
        }
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), killing);
    assert_audited(&result);
    // What was lost was lost with its connection; nobody was told that something had failed.
    let statuses = result["summary"]["statuses"].as_object().unwrap();
    assert!(
        statuses.keys().all(|status| !status.starts_with('5')),
        "{result:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_away_for_twenty_seconds_in_mid_load_and_the_audit_is_clean() {
    let mut postgres = Postgres::start(&[]);
    let stores = Stores::beside(Database::migrated(&postgres).await).await;
    let stack = Stack::start(&stores, &GREEN).await;
    let fronts = Fronts::of(&stack).await;
    let flags = [
        "--lane",
        "test-green-abc.load",
        "--rate",
        "30",
        "--duration",
        "30s",
        "--connections",
        "4",
        "--traders",
        "4",
        "--idle-connections",
        "0",
        "--database-url",
        &stores.database.owner_url,
    ];
    let outage = async {
        orders(&stores, 100).await;
        postgres.server.kill();
        tokio::time::sleep(Duration::from_secs(10)).await;
        let refused = stack.user.refresh_with_noise().await;
        assert_eq!(refused.headers()["retry-after"], "1");
        assert_eq!(
            accept(refused, StatusCode::SERVICE_UNAVAILABLE).await["code"],
            "unavailable"
        );
        for service in stack.services() {
            assert_eq!(service.admin("/readyz").await.status(), 200);
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        postgres.server.start_again();
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), outage);
    assert_audited(&result);
    // Every request was answered.
    let failures = result["summary"]["failures"].as_object().unwrap();
    assert_eq!(failures.keys().collect::<Vec<_>>(), ["status 503"], "{result:#}");
    // Failures have more to say than success, and must not say more than they may.
    assert_discreet(&stack.services());
}

/// What stops whoever marks events as published, in the transaction that does it.
const HOLD_THE_MARK: &str = "
    create function hold_the_mark() returns trigger language plpgsql as $$
    begin
        if new.published_at is not null then
            perform pg_advisory_xact_lock_shared(7);
        end if;
        return new;
    end $$;
    create trigger hold_the_mark before update of published_at on outbox
        for each row execute function hold_the_mark()";

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_is_killed_between_publish_and_mark_in_mid_load_and_the_audit_is_clean() {
    let Live {
        stores,
        mut stack,
        fronts,
        flags,
        _treasury,
    } = Live::start().await;
    let killing = async {
        orders(&stores, 100).await;
        let mut holder = stores.owner.acquire().await.unwrap();
        sqlx::query("select pg_advisory_lock(7)")
            .execute(&mut *holder)
            .await
            .unwrap();
        sqlx::raw_sql(HOLD_THE_MARK).execute(&stores.owner).await.unwrap();
        let held = eventually("the relay is about to mark", || async {
            let waiting: Option<(i32,)> = sqlx::query_as(
                "select pid from pg_locks join pg_database on oid = database
                 where datname = current_database() and locktype = 'advisory' and classid = 0 and objid = 7 and not granted",
            )
            .fetch_optional(&stores.owner)
            .await
            .unwrap();
            waiting
        })
        .await;
        stack.notification.signal("KILL");
        // Its connection would go on without it.
        sqlx::query("select pg_terminate_backend($1)")
            .bind(held.0)
            .execute(&stores.owner)
            .await
            .unwrap();
        let stream = stores.nats.stream("exchange-live").await.unwrap();
        let published = stream["state"]["messages"].as_i64().unwrap();
        let marked = stores
            .count("select count(*) from outbox where published_at is not null")
            .await;
        assert!(published > marked, "{published} published, {marked} marked");
        sqlx::raw_sql("drop function hold_the_mark() cascade")
            .execute(&stores.owner)
            .await
            .unwrap();
        drop(holder.detach());
        let flags = [&["--lane-secret", SECRET], &GREEN[..]].concat();
        stack.notification = stores.notification(&flags).ready().await;
        fronts.point_at(&stack);
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), killing);
    assert_audited(&result);
    stores.settled("live").await;
    stores.assert_told_once("live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_brokers_store_is_deleted_in_mid_load_and_the_audit_is_clean() {
    let Live {
        mut stores,
        stack,
        fronts,
        flags,
        _treasury,
    } = Live::start().await;
    let deletion = async {
        orders(&stores, 100).await;
        let port = stores.nats.port();
        stores.nats.server.signal("KILL");
        stores.nats = Nats::start_on(port, None);
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), deletion);
    assert_audited(&result);
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    let made = eventually("the stream was created again", || async {
        let log = stack.notification.log();
        let made = log
            .lines()
            .filter(|line| line.contains("the stream was created") && line.contains(r#""exchange-live""#));
        let made = made.count();
        (made >= 2).then_some(made)
    })
    .await;
    assert_eq!(made, 2, "{}", stack.notification.log());
    assert_eq!(metric(&stack.notification, "messages_dead_total").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_delivered_again_in_mid_load_and_the_audit_is_clean() {
    let Live {
        stores,
        stack,
        fronts,
        flags,
        _treasury,
    } = Live::start().await;
    let redelivery = async {
        orders(&stores, 200).await;
        let handled = eventually("messages are handled", || async {
            let handled = stores.count("select count(*) from inbox").await;
            (handled > 50).then_some(handled)
        })
        .await;
        stores.deliver_again().await;
        eventually("all messages have come again", || async {
            let again = metric(&stack.notification, "messages_duplicates_total").await;
            (again >= handled.unsigned_abs()).then_some(())
        })
        .await;
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), redelivery);
    assert_audited(&result);
    stores.settled("live").await;
    stores.assert_told_once("live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_market_data_are_flushed_in_mid_load_and_the_audit_is_clean() {
    let Live {
        stores,
        stack,
        fronts,
        flags,
        _treasury,
    } = Live::start().await;
    let flush = async {
        orders(&stores, 100).await;
        stores.complete_market_data().await;
        stores.flush_market_data().await;
    };
    let ((result, _), ()) = tokio::join!(fronts.load(&flags), flush);
    assert_audited(&result);
    stores.settled("live").await;
    let kept = stores.complete_market_data().await;
    let trades = stores.count("select count(*) from trades").await;
    let ticks = kept.iter().filter(|line| line.contains(":ticks:")).count();
    assert_eq!(i64::try_from(ticks).unwrap(), trades.min(1000));
    // They are those that follow from the trades, and nothing else.
    drop(stack);
    stores.flush_market_data().await;
    stores.rebuild_market_data();
    assert_eq!(stores.redis.dump().await, kept);
}

async fn has_role(stack: &Stack, role: &str) {
    for service in stack.services() {
        eventually(&format!("it is {role}"), || async {
            let stack: Value = service.admin("/stack").await.json().await.unwrap();
            (stack["role"] == role).then_some(())
        })
        .await;
    }
}

/// Live users trade while the live Services move from one stack to another, and the old one drains and ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_stack_is_replaced_under_load_and_nobody_notices() {
    let stores = Stores::start().await;
    let nowhere = [
        "--role",
        "follow",
        "--live-url",
        "http://127.0.0.1:1",
        "--colour",
        "blue",
        "--revision",
        "one",
    ];
    // Somebody to ask before there are fronts; then the stack follows them.
    let first = Stack::start(&stores, &nowhere).await;
    let fronts = Fronts::of(&first).await;
    let follow = |colour: &'static str, revision: &'static str| {
        let (stores, fronts) = (&stores, &fronts);
        async move {
            let flags = ["--colour", colour, "--revision", revision, "--role", "follow"];
            Stack::start_following(stores, &flags, fronts.0.each_ref().map(Front::url)).await
        }
    };
    let blue = follow("blue", "one").await;
    fronts.point_at(&blue);
    drop(first);
    has_role(&blue, "Live").await;
    let mut green = follow("green", "two").await;
    has_role(&green, "Standby").await;

    let (mut flags, _treasury) = treasury(&stores, &blue.user).await;
    flags.extend(
        [
            "--rate",
            "50",
            "--duration",
            "20s",
            "--connections",
            "4",
            "--traders",
            "4",
            "--idle-connections",
            "2",
            "--slow-percent",
            "3",
        ]
        .map(str::to_owned),
    );
    let replacing = async {
        orders(&stores, 200).await;
        fronts.point_at(&green);
        has_role(&blue, "Draining").await;
        has_role(&green, "Live").await;
        for service in blue.services() {
            eventually("nobody is left", || async {
                let stack: Value = service.admin("/stack").await.json().await.unwrap();
                (stack["connections"] == 0 && stack["inFlight"] == 0 && stack["consuming"] == false)
                    .then_some(())
            })
            .await;
            service.signal("TERM");
        }
        let mut blue = blue;
        for service in blue.services_mut() {
            let ended = eventually("it ends", || std::future::ready(service.ended())).await;
            assert!(ended.success());
        }
    };
    let ((result, said), ()) = tokio::join!(fronts.load(&flags), replacing);
    assert_audited(&result);
    assert_eq!(result["summary"]["failed"], 0, "{said}");
    assert_eq!(result["closed_without_notice"], 0, "{said}");
    for stack in ["blue-one", "green-two"] {
        let answers = &result["summary"]["stacks"][stack]["answers"];
        assert!(answers.as_u64().unwrap() > 100, "{result:#}");
    }
    assert_discreet(&green.services());
    assert!(
        green
            .services_mut()
            .iter_mut()
            .all(|service| service.ended().is_none())
    );
}
