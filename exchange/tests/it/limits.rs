//! How much one client may have, where that is limited. (Log-ins are in `user`.)

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::{
    servers::{Service, eventually},
    stores::Stores,
    streams::{Stream, token},
    user::Exchange,
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
    for answer in answers.into_iter().filter(|answer| answer.status() != 202) {
        assert!(seconds_to_wait(answer).await > 600);
    }
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
