//! How much one client may have, where that is limited, and what does not count.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{StreamExt, future::join_all};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres, Service, eventually},
    stores::Stores,
    streams::{Stream, token},
    user::{Exchange, PASSWORD},
    whole::SECRET,
};

/// Fails unless this is the answer to too many requests; says after how many seconds to come back.
async fn seconds_to_wait(response: Response) -> u64 {
    assert_eq!(response.status(), 429);
    let retry_after = response.headers()["retry-after"].to_str().unwrap();
    let seconds = retry_after.parse().unwrap();
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["code"], "too_many_requests");
    seconds
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_are_limited_per_address_and_counted_by_all_replicas() {
    let flags = [
        "--login-attempts-per-address=3",
        "--trusted-proxies=127.0.0.0/8",
        "--lane-secret",
        SECRET,
    ];
    let exchange = Exchange::start(&flags[..2]).await;
    let replica = Service::live("user", &exchange.database, &flags).ready().await;
    let register = |service: &Service, number: usize, address: &str| {
        let password = "correct horse battery";
        let body = json!({"email": format!("user{number}@example.org"), "password": password});
        let request = service.client.post(service.url("/register")).json(&body);
        request.header("x-forwarded-for", address)
    };
    let tries = (0..8).map(|number| {
        let service = if number % 2 == 0 {
            &exchange.service
        } else {
            &replica
        };
        register(service, number, "203.0.113.7").send()
    });
    let answers = futures::future::try_join_all(tries).await.unwrap();
    let accepted = answers.iter().filter(|answer| answer.status() == 202).count();
    assert_eq!(accepted, 3);
    // Those who came while the three were under way are told for how long when they come again.
    for answer in answers.into_iter().filter(|answer| answer.status() != 202) {
        let seconds = seconds_to_wait(answer).await;
        assert!(seconds == 1 || seconds > 600, "{seconds} s");
    }
    let again = register(&replica, 7, "203.0.113.7").send().await.unwrap();
    assert!(seconds_to_wait(again).await > 600);
    let owner = exchange.database.owner().await;
    let registered: i64 = sqlx::query_scalar("select count(*) from users")
        .fetch_one(&owner)
        .await
        .unwrap();
    assert_eq!(registered, 3);
    // Others may, and so may whoever has the secret of the test lanes.
    let other = register(&replica, 8, "203.0.113.8").send().await.unwrap();
    assert_eq!(other.status(), 202);
    for number in 9..13 {
        let tester = register(&replica, number, "203.0.113.7")
            .header("x-exchange-lane", "test-blue-local.limits")
            .header("x-exchange-lane-secret", SECRET);
        assert_eq!(tester.send().await.unwrap().status(), 202);
    }
}

async fn log_in(service: &Service, email: &str, password: &str) -> Response {
    log_in_from(0, service, email, password).await
}

/// From an address with this number, as long as the service trusts its proxies.
async fn log_in_from(number: u8, service: &Service, email: &str, password: &str) -> Response {
    let body = json!({"email": email, "password": password});
    let request = service.client.post(service.url("/login")).json(&body);
    let request = request.header("x-forwarded-for", format!("203.0.113.{number}"));
    request.send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_does_not_shut_the_others_out() {
    let flags = [
        "--login-attempts-per-address=1000000",
        "--logins-per-account=1000000",
        "--trusted-proxies=127.0.0.0/8",
    ];
    let exchange = Exchange::start(&flags).await;
    let service = &exchange.service;
    let mut users = Vec::new();
    for number in 0..12 {
        let email = format!("user{number}@example.org");
        exchange.register(&email).await;
        users.push(email);
    }
    exchange.register("ada@example.org").await;
    // With right passwords, which nothing else limits. It is told to wait, and nobody is that there is no room.
    let turned_away = AtomicUsize::new(0);
    let crowd = futures::stream::iter(users.iter().cycle()).for_each_concurrent(100, |email| {
        let turned_away = &turned_away;
        async move {
            match log_in_from(1, service, email, PASSWORD).await.status().as_u16() {
                429 => turned_away.fetch_add(1, Ordering::Relaxed),
                status => {
                    assert_eq!(status, 200);
                    0
                }
            };
        }
    });
    let others = async {
        eventually("one address has too many", || async {
            (turned_away.load(Ordering::Relaxed) > 20).then_some(())
        })
        .await;
        for _ in 0..5 {
            let answer = log_in_from(2, service, "ada@example.org", PASSWORD).await;
            assert_eq!(answer.status(), 200);
        }
    };
    tokio::select! {
        () = crowd => {}
        () = others => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn log_ins_that_succeed_are_limited_per_account() {
    let exchange = Exchange::start(&["--logins-per-account=3"]).await;
    let service = &exchange.service;
    for email in ["ada@example.org", "bob@example.org"] {
        exchange.register(email).await;
    }
    for _ in 0..3 {
        // Those that fail have a limit of their own.
        let wrong = log_in(service, "ada@example.org", "wrong password").await;
        assert_eq!(wrong.status(), 401);
        let right = log_in(service, "ada@example.org", PASSWORD).await;
        assert_eq!(right.status(), 200);
    }
    let one_more = log_in(service, "ada@example.org", PASSWORD).await;
    assert!(seconds_to_wait(one_more).await > 600);
    let other = log_in(service, "bob@example.org", PASSWORD).await;
    assert_eq!(other.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_ins_to_a_test_lane_are_limited_but_for_the_holder_of_its_secret() {
    let database = Database::migrated(Postgres::shared()).await;
    let flags = ["--login-attempts-per-account=3", "--lane-secret", SECRET];
    let service = Service::live("user", &database, &flags).ready().await;
    let guess = async |secret: &str| {
        let body = json!({"email": "ada@example.org", "password": "wrong password"});
        let request = service.client.post(service.url("/login")).json(&body);
        let request = request.header("x-exchange-lane", "test-blue-local.limits");
        let request = request.header("x-exchange-lane-secret", secret);
        request.send().await.unwrap()
    };
    for _ in 0..6 {
        assert_eq!(guess(SECRET).await.status(), 401);
    }
    let counted: i64 = sqlx::query_scalar("select count(*) from rate_limits")
        .fetch_one(&database.owner().await)
        .await
        .unwrap();
    assert_eq!(counted, 0);
    for _ in 0..3 {
        assert_eq!(guess("another secret").await.status(), 401);
    }
    assert!(seconds_to_wait(guess("another secret").await).await > 600);
    assert_eq!(guess(SECRET).await.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn exports_are_limited_per_user_and_counted_by_all_replicas() {
    let exchange = Exchange::start(&["--exports-per-user=2"]).await;
    let replica = Exchange::over(exchange.database.clone(), &["--exports-per-user=2"]).await;
    let (ada, bob) = (
        exchange.user("ada@example.org").await,
        exchange.user("bob@example.org").await,
    );
    let export =
        async |from: &Exchange, token: &str| from.call(Method::GET, "/user/export", Some(token), None).await;
    for from in [&exchange, &replica] {
        let whole = export(from, &ada.access_token).await;
        assert_eq!(whole.status(), 200);
        whole.bytes().await.unwrap();
    }
    for from in [&exchange, &replica] {
        let third = export(from, &ada.access_token).await;
        assert!(seconds_to_wait(third).await > 600);
    }
    assert_eq!(export(&replica, &bob.access_token).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn right_passwords_at_once_all_get_in_within_seconds() {
    let exchange = Exchange::start(&["--login-attempts-per-account=3"]).await;
    exchange.register("ada@example.org").await;
    let service = &exchange.service;
    let log_ins = (0..20).map(|_| async {
        eventually("the password is taken", || async {
            let answer = log_in(service, "ada@example.org", PASSWORD).await;
            if answer.status() == 200 {
                return Some(());
            }
            assert_eq!(seconds_to_wait(answer).await, 1);
            None
        })
        .await;
    });
    join_all(log_ins).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_passwords_among_right_ones_are_no_more_than_may_fail() {
    let flags = ["--login-attempts-per-account=5"];
    let exchange = Exchange::start(&flags).await;
    let replica = Service::live("user", &exchange.database, &flags).ready().await;
    exchange.register("ada@example.org").await;
    let mut wrong = 0;
    // At last all of the right ones are refused, too.
    for taken in std::iter::repeat_with(|| 24) {
        let log_ins = (0..taken).map(|number| {
            let service = [&exchange.service, &replica][number % 2];
            let password = [PASSWORD, "wrong password"][number / 2 % 2];
            log_in(service, "ada@example.org", password)
        });
        let answers = join_all(log_ins).await;
        let count = |status: u16| answers.iter().filter(|answer| answer.status() == status).count();
        wrong += count(401);
        assert_eq!(count(200) + count(401) + count(429), taken);
        if count(429) == taken {
            break;
        }
    }
    assert_eq!(wrong, 5);
    let right = log_in(&replica, "ada@example.org", PASSWORD).await;
    assert!(seconds_to_wait(right).await > 600);
}

/// Neither because more passwords wait to be checked than the service takes, nor because the client has hung up.
#[tokio::test(flavor = "multi_thread")]
async fn who_gets_no_answer_has_not_failed() {
    let flags = [
        "--login-attempts-per-account=3",
        "--login-attempts-per-address=1000000",
        "--logins-per-account=1000000",
        "--trusted-proxies=127.0.0.0/8",
    ];
    let exchange = Exchange::start(&flags).await;
    let (service, token) = (
        &exchange.service,
        exchange.user("ada@example.org").await.access_token,
    );
    exchange.register("bob@example.org").await;
    let change = async || {
        let body = json!({"current_password": PASSWORD, "new_password": PASSWORD});
        let call = exchange.call(Method::POST, "/password", Some(&token), Some(body));
        call.await
    };

    // A crowd that fills the line, and stays. It takes several addresses.
    let crowd = futures::stream::iter((0..=u8::MAX).cycle()).for_each_concurrent(70, |number| async move {
        let somebody = format!("{}@example.org", Uuid::now_v7());
        log_in_from(number, service, &somebody, PASSWORD).await;
    });
    let turned_away = async {
        for attempt in [true, false] {
            let mut times = 0;
            while times < 6 {
                let answer = if attempt {
                    log_in(service, "ada@example.org", PASSWORD).await
                } else {
                    change().await
                };
                match answer.status().as_u16() {
                    503 => times += 1,
                    429 => assert_eq!(seconds_to_wait(answer).await, 1),
                    status => assert!([200, 204].contains(&status), "{status}"),
                }
            }
        }
    };
    tokio::select! {
        () = crowd => {}
        () = turned_away => {}
    }
    eventually("the line is shorter", || async {
        let answers = [
            log_in(service, "ada@example.org", PASSWORD).await.status(),
            change().await.status(),
        ];
        (answers == [200, 204]).then_some(())
    })
    .await;

    let owner = exchange.database.owner().await;
    let mut locked = owner.begin().await.unwrap();
    sqlx::query("lock table users")
        .execute(&mut *locked)
        .await
        .unwrap();
    let under_way = async |number: i32| {
        eventually(&format!("{number} are under way"), || async {
            let attempts: Option<i32> = sqlx::query_scalar(
                "select attempts from rate_limits where key = sha256('login-to:live:bob@example.org')",
            )
            .fetch_optional(&owner)
            .await
            .unwrap();
            (attempts.unwrap_or_default() == number).then_some(())
        })
        .await;
    };
    for _ in 0..6 {
        tokio::select! {
            answer = log_in(service, "bob@example.org", PASSWORD) => panic!("{answer:?}"),
            () = under_way(1) => {}
        }
        under_way(0).await;
    }
    locked.rollback().await.unwrap();
    let answer = log_in(service, "bob@example.org", PASSWORD).await;
    assert_eq!(answer.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_while_an_attempt_begins_leaves_none() {
    let exchange = Exchange::start(&[]).await;
    exchange.register("bob@example.org").await;
    let (service, owner) = (&exchange.service, exchange.database.owner().await);
    let attempts = async || -> i64 {
        let all = sqlx::query_scalar("select coalesce(sum(attempts), 0) from rate_limits");
        all.fetch_one(&owner).await.unwrap()
    };
    let before = attempts().await;
    let mut locked = owner.begin().await.unwrap();
    sqlx::query("lock table rate_limits in exclusive mode")
        .execute(&mut *locked)
        .await
        .unwrap();
    let beginning = async |number: i64| {
        eventually(&format!("{number} begin"), || async {
            let all = "select count(*) from pg_stat_activity
                 where state = 'active' and query like 'insert into rate_limits%' and datname = current_database()";
            let beginning: i64 = sqlx::query_scalar(all).fetch_one(&owner).await.unwrap();
            (beginning == number).then_some(())
        })
        .await;
    };
    for number in 1..=3 {
        tokio::select! {
            answer = log_in(service, "bob@example.org", PASSWORD) => panic!("{answer:?}"),
            () = beginning(number) => {}
        }
    }
    locked.rollback().await.unwrap();
    beginning(0).await;
    eventually("they are forgotten", || async {
        (attempts().await == before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_the_password_with_a_wrong_one_are_limited_per_user() {
    let exchange = Exchange::start(&["--login-attempts-per-account=3"]).await;
    let (ada, bob) = (
        exchange.user("ada@example.org").await,
        exchange.user("bob@example.org").await,
    );
    let change = async |token: &str, current: &str, new: &str| {
        let body = json!({"current_password": current, "new_password": new});
        let call = exchange.call(Method::POST, "/password", Some(token), Some(body));
        call.await
    };
    // Those that succeed do not count.
    let passwords = [
        "correct horse battery",
        "a second password",
        "a third password",
        "a fourth password",
        "a fifth password",
    ];
    for change_of in passwords.windows(2) {
        let changed = change(&ada.access_token, change_of[0], change_of[1]).await;
        assert_eq!(changed.status(), 204);
    }
    let guesses = (0..8).map(|_| change(&ada.access_token, "wrong password", "whatever it is"));
    let guesses = futures::future::join_all(guesses).await;
    let tried = guesses.iter().filter(|answer| answer.status() == 401).count();
    assert_eq!(tried, 3);
    let right = change(&ada.access_token, "a fifth password", "a sixth password").await;
    assert!(seconds_to_wait(right).await > 600);
    let others = change(&bob.access_token, passwords[0], passwords[1]).await;
    assert_eq!(others.status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_at_most_eight_event_streams_at_a_process() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let [ann, bob] = [token(&stores, ann).await, token(&stores, bob).await];
    let service = stores.notification(&["--role", "live"]).ready().await;
    let ask = || {
        let request = service.client.get(service.url("/notifications/stream"));
        request.bearer_auth(&ann).send()
    };
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(Stream::open(&service, &ann, None).await);
    }
    assert_eq!(seconds_to_wait(ask().await.unwrap()).await, 30);
    let _others = Stream::open(&service, &bob, None).await;
    // One that has been closed makes room for one.
    drop(open.pop());
    let ninth = eventually("there is room again", || async {
        let answer = ask().await.unwrap();
        (answer.status() == 200).then_some(answer)
    })
    .await;
    seconds_to_wait(ask().await.unwrap()).await;
    drop((open, ninth));
}
