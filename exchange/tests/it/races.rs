//! Many at once on the same money, and a database that dies under them: no deadlock, no 500, and books that are right.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres, Service, eventually},
    traders::{Issuer, Trader, accept, assert_clean},
    user::Exchange,
};

/// How long the long races run.
const FOR: Duration = Duration::from_secs(4);

struct Arena {
    database: Database,
    /// Two, as while colours change: nothing may rest on there being one process.
    services: [Service; 2],
    issuer: Issuer,
    treasury: Trader,
}

impl Arena {
    async fn on(postgres: &Postgres) -> Self {
        let database = Database::migrated(postgres).await;
        let services = [
            Service::live("trade", &database, &["--colour", "blue"])
                .ready()
                .await,
            Service::live("trade", &database, &["--colour", "green"])
                .ready()
                .await,
        ];
        let issuer = Issuer::new(&database).await;
        let treasury = issuer.caller(&services[0], &["treasury"]).await;
        Self {
            database,
            services,
            issuer,
            treasury,
        }
    }

    /// One user, as client of either service.
    async fn trader(&self) -> [Trader; 2] {
        let token = self
            .issuer
            .token(Uuid::now_v7(), exchange::lane::Lane::live(), &[])
            .await;
        [0, 1].map(|at| Trader::new(&self.services[at], token.clone()))
    }

    async fn deadlocks(&self) -> i64 {
        let (deadlocks,): (i64,) =
            sqlx::query_as("select deadlocks from pg_stat_database where datname = current_database()")
                .fetch_one(&self.database.owner().await)
                .await
                .unwrap();
        deadlocks
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_tasks_on_the_same_accounts() {
    let arena = Arena::on(Postgres::shared()).await;
    let mut wallets = Vec::new();
    for _ in 0..2 {
        let [one, other] = arena.trader().await;
        let mut wallet = one.wallet(&arena.treasury, "50", "5000").await;
        let first = wallet.clone();
        wallet.trader = other;
        wallets.push([first, wallet]);
    }
    let wallets = Arc::new(wallets);
    let begun = Instant::now();
    let accepted = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for number in 0..50_usize {
        let (wallets, treasury, accepted) = (
            Arc::clone(&wallets),
            arena.treasury.clone(),
            Arc::clone(&accepted),
        );
        tasks.spawn(async move {
            let mut statuses = BTreeMap::<u16, u32>::new();
            let mut round = number;
            // On a busy machine until enough has happened.
            while begun.elapsed() < FOR
                || (accepted.load(Ordering::Relaxed) < 250 && begun.elapsed() < FOR * 20)
            {
                round += 1;
                let wallet = &wallets[round % 2][number / 2 % 2];
                let key = Uuid::now_v7().to_string();
                let response = match round % 7 {
                    0 => {
                        let body = json!({"account_id": wallet.usd, "amount": "0.01"});
                        treasury.post_with_key("/account/deposit", &key, &body).await
                    }
                    1 => {
                        let body = json!({"account_id": wallet.btc, "amount": "0.001"});
                        wallet
                            .trader
                            .post_with_key("/account/withdraw", &key, &body)
                            .await
                    }
                    side => {
                        let price = format!("{}.{:02}", 99 + round % 3, round % 50);
                        let side = if (side + number).is_multiple_of(2) {
                            "buy"
                        } else {
                            "sell"
                        };
                        let order = wallet.order(side, &format!("0.{:02}", 1 + round % 40), &price);
                        let response = wallet.trader.post("/trade/add", &order).await;
                        if response.status() == 201 && round.is_multiple_of(3) {
                            let order: Value = response.json().await.unwrap();
                            let order = json!({"order_id": order["order_id"]});
                            wallet.trader.post("/trade/cancel", &order).await
                        } else {
                            response
                        }
                    }
                };
                if response.status() == 201 {
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
                *statuses.entry(response.status().as_u16()).or_default() += 1;
            }
            statuses
        });
    }
    let mut statuses = BTreeMap::<u16, u32>::new();
    while let Some(counted) = tasks.join_next().await {
        for (status, count) in counted.unwrap() {
            *statuses.entry(status).or_default() += count;
        }
    }
    assert!(
        statuses.keys().all(|status| [200, 201, 409].contains(status)),
        "{statuses:?}"
    );
    assert!(accepted.load(Ordering::Relaxed) >= 250, "{statuses:?}");
    assert_eq!(arena.deadlocks().await, 0);
    let owner = arena.database.owner().await;
    let (trades,): (i64,) = sqlx::query_as("select count(*) from trades")
        .fetch_one(&owner)
        .await
        .unwrap();
    assert!(trades > 20, "hardly anything was traded: {statuses:?}");
    assert_clean(&owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_from_twenty_clients_has_one_effect() {
    let arena = Arena::on(Postgres::shared()).await;
    let [one, other] = arena.trader().await;
    let wallet = one.wallet(&arena.treasury, "10", "10000").await;
    for round in 0..5 {
        let order = wallet.order("sell", "0.1", "500");
        let mut elsewhere = order.clone();
        elsewhere["product"] = json!("BTC-EUR");
        let deposit = json!({"account_id": wallet.usd, "amount": "1"});
        let mut tasks = JoinSet::new();
        for number in 0..20 {
            let trader = if number % 2 == 0 { &one } else { &other };
            let (trader, treasury, order, deposit) = (
                trader.clone(),
                arena.treasury.clone(),
                order.clone(),
                deposit.clone(),
            );
            tasks.spawn(async move {
                let placed = trader.post("/trade/add", &order).await;
                let placed = (
                    placed.headers().contains_key("idempotency-hit"),
                    accept(placed, StatusCode::CREATED).await,
                );
                let key = format!("round-{round}");
                let credited = treasury.post_with_key("/account/deposit", &key, &deposit).await;
                let credited = (
                    credited.headers().contains_key("idempotency-hit"),
                    accept(credited, StatusCode::CREATED).await,
                );
                [placed, credited]
            });
        }
        let answers: Vec<_> = tasks.join_all().await;
        for kind in 0..2 {
            let fresh = answers.iter().filter(|answer| !answer[kind].0).count();
            assert_eq!(fresh, 1, "{answers:?}");
            assert!(
                answers.iter().all(|answer| answer[kind].1 == answers[0][kind].1),
                "{answers:?}"
            );
        }
        // The same key in two books at once: one gets it, the other is told so.
        let fresh = json!(Uuid::now_v7());
        let orders = [&order, &elsewhere].map(|order| {
            let mut order = order.clone();
            order["client_order_id"] = fresh.clone();
            order["quote_account_id"] = json!(wallet.usd);
            order
        });
        let answers = tokio::join!(
            one.post("/trade/add", &orders[0]),
            other.post("/trade/add", &orders[1])
        );
        for status in [answers.0.status().as_u16(), answers.1.status().as_u16()] {
            assert!([201, 409, 422].contains(&status), "{status}");
        }
    }
    let owner = arena.database.owner().await;
    assert_eq!(wallet.balances().await[2], "10005");
    assert_clean(&owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_and_a_fill_do_not_both_win() {
    let arena = Arena::on(Postgres::shared()).await;
    let [seller, cancelling] = arena.trader().await;
    let seller = seller.wallet(&arena.treasury, "100", "0").await;
    let buyer = arena.trader().await[1]
        .wallet(&arena.treasury, "0", "100000")
        .await;
    let (mut filled, mut cancelled) = (0, 0);
    for _ in 0..40 {
        let ask = seller.place("sell", "1", "100").await;
        let choice = json!({"order_id": ask["order_id"]});
        let bid = {
            let mut bid = buyer.order("buy", "1", "100");
            bid["time_in_force"] = json!("IOC");
            bid
        };
        let (cancel, fill) = tokio::join!(
            cancelling.post("/trade/cancel", &choice),
            buyer.trader.post("/trade/add", &bid)
        );
        let fill = accept(fill, StatusCode::CREATED).await;
        if cancel.status() == 200 {
            assert_eq!(fill["status"], "cancelled", "{fill}");
            cancelled += 1;
        } else {
            assert_eq!(accept(cancel, StatusCode::CONFLICT).await["code"], "order_filled");
            assert_eq!(fill["status"], "filled", "{fill}");
            filled += 1;
        }
    }
    assert_eq!(buyer.balances().await[0], filled.to_string());
    assert_eq!(
        seller.balances().await[..2],
        [(100 - filled).to_string(), "0".to_owned()]
    );
    assert!(filled + cancelled == 40);
    assert_clean(&arena.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_account_has_no_money() {
    let arena = Arena::on(Postgres::shared()).await;
    let [one, other] = arena.trader().await;
    for round in 0..40 {
        let response = one
            .post(
                "/account/add",
                &json!({"currency": "USD", "name": format!("{round}")}),
            )
            .await;
        let account = accept(response, StatusCode::CREATED).await["account_id"].clone();
        let key = Uuid::now_v7().to_string();
        let deposit = json!({"account_id": account, "amount": "1"});
        let choice = json!({"account_id": account});
        let (deposited, deleted) = tokio::join!(
            arena.treasury.post_with_key("/account/deposit", &key, &deposit),
            other.post("/account/delete", &choice)
        );
        match (deposited.status().as_u16(), deleted.status().as_u16()) {
            (201, 409) | (404, 204) => {}
            both => panic!("{both:?}"),
        }
    }
    assert_clean(&arena.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_account_is_named_by_no_open_order() {
    let arena = Arena::on(Postgres::shared()).await;
    let [one, other] = arena.trader().await;
    let mut bidding = one.wallet(&arena.treasury, "0", "10000").await;
    let [seller, _] = arena.trader().await;
    let seller = seller.wallet(&arena.treasury, "100", "0").await;
    let (mut rested, mut deleted) = (0, 0);
    for round in 0..40 {
        // Against resting, and then against the fill of what rests.
        let bid = bidding.order("buy", "0.1", "100");
        let choice = json!({"account_id": bidding.btc});
        let (placed, gone) = tokio::join!(
            one.post("/trade/add", &bid),
            other.post("/account/delete", &choice)
        );
        match (placed.status().as_u16(), gone.status().as_u16()) {
            (201, 409) => {
                assert_eq!(accept(gone, StatusCode::CONFLICT).await["code"], "account_in_use");
                rested += 1;
                let ask = seller.order("sell", "0.1", "100");
                let (filled, gone) = tokio::join!(
                    seller.trader.post("/trade/add", &ask),
                    other.post("/account/delete", &choice)
                );
                assert_eq!(accept(filled, StatusCode::CREATED).await["status"], "filled");
                assert_eq!(gone.status(), StatusCode::CONFLICT);
                let withdrawal = json!({"account_id": bidding.btc, "amount": "0.1"});
                let withdrawn = one
                    .post_with_key("/account/withdraw", &format!("{round}"), &withdrawal)
                    .await;
                accept(withdrawn, StatusCode::CREATED).await;
            }
            (404, 204) => {
                deleted += 1;
                bidding.btc = one.account("BTC").await;
            }
            both => panic!("{both:?}"),
        }
    }
    assert_eq!(rested + deleted, 40);
    assert_eq!(arena.deadlocks().await, 0);
    assert_clean(&arena.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_deleted_leaves_no_money_behind() {
    let arena = Arena::on(Postgres::shared()).await;
    let users = Exchange::over(arena.database.clone(), &[]).await;
    let owner = arena.database.owner().await;
    let (mut left, mut stayed) = (0, 0);
    for round in 0..24 {
        let user = users.user(&format!("user{round}@example.org")).await;
        let trader = Trader::new(&arena.services[round % 2], user.access_token.clone());
        let wallet = trader.wallet(&arena.treasury, "0", "0").await;
        let id: Uuid = user.user_id.parse().unwrap();
        // What goes in portions, before the user does.
        sqlx::query(
            "with told as (
                 insert into notifications (user_id, seq, lane, kind, title, data) values ($1, 1000, 'live', 'x', 'x', '{}')
             )
             insert into orders (id, lane, user_id, client_order_id, product, side, price, size, time_in_force,
                 base_account_id, quote_account_id, maker_fee_rate, taken, taken_trades, remaining, status, rank,
                 created_at, closed_at)
             values (gen_random_uuid(), 'live', $1, 'named', 'BTC-USD', 'buy', 1, 1, 'gtc', $2::uuid, $3::uuid, 0, 0, '{}',
                 1, 'cancelled', -1, now(), now())",
        )
        .bind(id)
        .bind(&wallet.btc)
        .bind(&wallet.usd)
        .execute(&owner)
        .await
        .unwrap();
        let kept = async || -> (i64, i64) {
            sqlx::query_as(
                "select (select count(*) from notifications where user_id = $1 and seq = 1000),
                        (select count(*) from orders where user_id = $1 and client_order_id = 'named')",
            )
            .bind(id)
            .fetch_one(&owner)
            .await
            .unwrap()
        };
        let deposit = json!({"account_id": wallet.usd, "amount": "1"});
        let key = Uuid::now_v7().to_string();
        let (deposited, gone) = tokio::join!(
            arena.treasury.post_with_key("/account/deposit", &key, &deposit),
            users.call(Method::DELETE, "/user", Some(&user.access_token), None)
        );
        match (deposited.status().as_u16(), gone.status().as_u16()) {
            (404, 204) => {
                left += 1;
                assert_eq!(kept().await, (0, 0));
            }
            (201, 409) => {
                stayed += 1;
                // A deletion that is refused has done nothing.
                assert_eq!(kept().await, (1, 1));
                assert_eq!(
                    accept(gone, StatusCode::CONFLICT).await["code"],
                    "accounts_not_empty"
                );
                // Against an order that takes the last of the money, and its withdrawal.
                let withdrawal = json!({"account_id": wallet.usd, "amount": "1"});
                let order = wallet.order("buy", "0.001", "100");
                let (withdrawn, placed, gone) = tokio::join!(
                    trader.post_with_key("/account/withdraw", "all", &withdrawal),
                    trader.post("/trade/add", &order),
                    users.call(Method::DELETE, "/user", Some(&user.access_token), None)
                );
                let statuses = [&withdrawn, &placed, &gone].map(|answer| answer.status().as_u16());
                assert!(
                    [[201, 409, 204], [201, 404, 204], [201, 409, 409], [409, 201, 409]].contains(&statuses),
                    "{statuses:?}"
                );
                let expected = if statuses[2] == 204 { (0, 0) } else { (1, 1) };
                assert_eq!(kept().await, expected);
            }
            both => panic!("{both:?}"),
        }
    }
    assert_eq!(left + stayed, 24);
    assert_eq!(arena.deadlocks().await, 0);
    assert_clean(&owner, "live").await;
}

/// Both lock the session and its tokens. The row is kept from them until both wait, so that they meet each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_deleted_while_a_token_is_refreshed() {
    let arena = Arena::on(Postgres::shared()).await;
    let users = Exchange::over(arena.database.clone(), &[]).await;
    let owner = arena.database.owner().await;
    let waiting = async |count: i64| {
        eventually("they wait for the session", || async {
            let waiting: i64 = sqlx::query_scalar(
                "select count(distinct pid) from pg_locks join pg_stat_activity using (pid)
                 where not granted and datname = current_database()",
            )
            .fetch_one(&owner)
            .await
            .unwrap();
            (waiting == count).then_some(())
        })
        .await;
    };
    for deletion_first in [true, false] {
        let user = users.user("ann@example.org").await;
        let mut session = owner.begin().await.unwrap();
        sqlx::query("select from sessions where user_id = $1 for update")
            .bind(user.user_id.parse::<Uuid>().unwrap())
            .execute(&mut *session)
            .await
            .unwrap();
        let deletion = async |others| {
            waiting(others).await;
            users
                .call(Method::DELETE, "/user", Some(&user.access_token), None)
                .await
        };
        let refresh = async |others| {
            waiting(others).await;
            let body = json!({"refresh_token": user.refresh_token});
            users.call(Method::POST, "/token/refresh", None, Some(body)).await
        };
        let release = async {
            waiting(2).await;
            session.rollback().await.unwrap();
        };
        let order = i64::from(deletion_first);
        let (gone, refreshed, ()) = tokio::join!(deletion(1 - order), refresh(order), release);
        assert_eq!(gone.status(), StatusCode::NO_CONTENT);
        let expected = if deletion_first { 401 } else { 200 };
        assert_eq!(
            refreshed.status(),
            expected,
            "{}",
            refreshed.text().await.unwrap()
        );
    }
    let (tokens,): (i64,) = sqlx::query_as("select count(*) from refresh_tokens")
        .fetch_one(&owner)
        .await
        .unwrap();
    assert_eq!(tokens, 0);
    assert_eq!(arena.deadlocks().await, 0);
}

/// PostgreSQL is killed while orders are being committed, and started again on the same files.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_database_loses_no_acknowledged_trade_and_doubles_none() {
    let mut postgres = Postgres::start(&["-c", "wal_writer_delay=10ms"]);
    let arena = Arena::on(&postgres).await;
    let mut wallets = Vec::new();
    for _ in 0..8 {
        let [one, _] = arena.trader().await;
        wallets.push(one.wallet(&arena.treasury, "1000", "1000000").await);
    }
    let owner = arena.database.owner().await;
    for _ in 0..2 {
        let [answered, unanswered] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let over = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for number in 0..16_usize {
            let wallet = wallets[number % 8].clone();
            let [answered, unanswered] = [&answered, &unanswered].map(Arc::clone);
            let over = Arc::clone(&over);
            tasks.spawn(async move {
                let mut sent = Vec::new();
                let side = if number.is_multiple_of(2) { "buy" } else { "sell" };
                while !over.load(Ordering::Relaxed) {
                    let order = wallet.order(side, "0.01", "100");
                    let response = wallet.trader.post("/trade/add", &order).await;
                    let answer = match response.status().as_u16() {
                        201 => Some(response.json::<Value>().await.unwrap()),
                        503 => {
                            assert!(response.headers().contains_key("retry-after"));
                            None
                        }
                        status => panic!("{status}: {}", response.text().await.unwrap()),
                    };
                    let count = if answer.is_some() { &answered } else { &unanswered };
                    count.fetch_add(1, Ordering::Relaxed);
                    sent.push((wallet.clone(), order, answer));
                }
                sent
            });
        }
        eventually("orders are being answered", || async {
            (answered.load(Ordering::Relaxed) > 20).then_some(())
        })
        .await;
        postgres.server.kill_and_restart();
        eventually("somebody has got no answer", || async {
            (unanswered.load(Ordering::Relaxed) > 0).then_some(())
        })
        .await;
        let before = answered.load(Ordering::Relaxed);
        eventually("orders are being answered again", || async {
            (answered.load(Ordering::Relaxed) > before + 20).then_some(())
        })
        .await;
        over.store(true, Ordering::Relaxed);
        let sent: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();

        // Each order, answered or not, is settled by sending it again, and a known answer is given again.
        for (wallet, order, answer) in sent {
            let again = eventually("the database is back", || async {
                let response = wallet.trader.post("/trade/add", &order).await;
                (response.status() != 503).then_some(response)
            })
            .await;
            let hit = again.headers().contains_key("idempotency-hit");
            let again = accept(again, StatusCode::CREATED).await;
            if let Some(answer) = answer {
                assert!(hit, "an acknowledged order was lost");
                assert_eq!(again, answer);
            }
        }
        assert_clean(&owner, "live").await;
    }
}
