//! The trade service through its API.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use exchange::lane::Lane;
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    database::Wire,
    servers::{Database, Postgres, Service, eventually, waits_for_lock},
    traders::{Issuer, Trader, Wallet, accept, assert_clean, assert_erased, begin_to_erase},
};

/// A running trade service, its treasury, and who issues tokens.
struct Exchange {
    database: Database,
    service: Service,
    issuer: Issuer,
    treasury: Trader,
}

impl Exchange {
    async fn start() -> Self {
        let database = Database::migrated(Postgres::shared()).await;
        let service = Service::live("trade", &database, &[]).ready().await;
        Self::of(database, service).await
    }

    async fn of(database: Database, service: Service) -> Self {
        let issuer = Issuer::new(&database).await;
        let treasury = issuer.caller(&service, &["treasury"]).await;
        Self {
            database,
            service,
            issuer,
            treasury,
        }
    }

    /// Somebody new with accounts of BTC and USD, and so much in them.
    async fn wallet(&self, coins: &str, dollars: &str) -> Wallet {
        let trader = self.issuer.trader(&self.service).await;
        trader.wallet(&self.treasury, coins, dollars).await
    }
}

/// Who hangs up gets no answer, and has placed an order nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_whose_client_has_hung_up_is_counted_and_so_is_its_request() {
    let exchange = Exchange::start().await;
    let (service, owner) = (&exchange.service, exchange.database.owner().await);
    let (seller, buyer) = (
        exchange.wallet("2", "0").await,
        exchange.wallet("0", "1000").await,
    );
    seller.place("sell", "2", "100").await;
    let client = || reqwest::Client::builder().no_proxy();
    let clients = [client(), client().http2_prior_knowledge()];
    for (number, client) in (1..).zip(clients) {
        let mut busy = owner.begin().await.unwrap();
        sqlx::query("select lock_book_v1('live', 'BTC-USD')")
            .execute(&mut *busy)
            .await
            .unwrap();
        let request = client.build().unwrap().post(service.url("/trade/add"));
        let request = request.bearer_auth(buyer.trader.token());
        let placing = tokio::spawn(request.json(&buyer.order("buy", "1", "100")).send());
        eventually("the order waits for its book", || async {
            let waits = waits_for_lock(&owner, "%submit_orders%").await.unwrap();
            waits.then_some(())
        })
        .await;
        placing.abort();
        let counted = async |line: String| {
            eventually(&line, || async {
                let page = service.admin("/metrics").await.text().await.unwrap();
                page.contains(&line).then_some(())
            })
            .await;
        };
        let route = r#"method="POST",route="/trade/add",lane="live",status="499""#;
        counted(format!("http_server_requests_total{{{route}}} {number}\n")).await;
        busy.rollback().await.unwrap();
        counted(format!("orders_total{{outcome=\"accepted\"}} {}\n", number + 1)).await;
        counted(format!("trades_total {number}\n")).await;
    }
    service.logged("POST /trade/add 499", 2).await;
    assert_eq!(buyer.balances().await[0], "2");
}

/// No answer comes, and no end of the connection either.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_falls_silent_does_not_stop_a_book_for_good() {
    let database = Database::migrated(Postgres::shared()).await;
    let wire = Wire::to(&database).await;
    let service = Service::live("trade", &wire.through(&database), &[])
        .ready()
        .await;
    let exchange = Exchange::of(database, service).await;
    let (seller, owner) = (exchange.wallet("2", "0").await, exchange.database.owner().await);
    let mut busy = owner.begin().await.unwrap();
    sqlx::query("select lock_book_v1('live', 'BTC-USD')")
        .execute(&mut *busy)
        .await
        .unwrap();
    let order = seller.order("sell", "1", "100");
    let silence = async {
        eventually("the order waits for its book", || async {
            let waits = waits_for_lock(&owner, "%submit_orders%").await.unwrap();
            waits.then_some(())
        })
        .await;
        wire.falls_silent().await;
        busy.rollback().await.unwrap();
    };
    let placing = timeout(Duration::from_mins(1), seller.trader.post("/trade/add", &order));
    let (answer, ()) = tokio::join!(placing, silence);
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("retry-after"));
    let again = eventually("it is answered", || async {
        let answer = seller.trader.post("/trade/add", &order).await;
        (answer.status() != StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    // Whether or not it was settled then, it is once.
    accept(again, StatusCode::CREATED).await;
    assert_eq!(seller.balances().await[..2], ["2", "1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_meets_another_and_both_are_settled() {
    let exchange = Exchange::start().await;
    let seller = exchange.wallet("2", "1000").await;
    let buyer = exchange.wallet("0", "1000").await;

    let ask = seller.place("sell", "1", "100.05").await;
    assert_eq!(ask["status"], "open");
    assert_eq!(seller.balances().await, ["2", "1", "1000", "0"]);
    let book = buyer.trader.get("/book?product=BTC-USD").await;
    assert_eq!(
        book["asks"],
        json!([{"price": "100.05", "size": "1", "orders": 1}])
    );
    assert_eq!(book["bids"], json!([]));

    let bid = buyer.place("buy", "0.4", "101").await;
    assert_eq!(bid["status"], "filled");
    assert_eq!(bid["filled"], "0.4");
    assert_eq!(bid["trades"].as_array().unwrap().len(), 1);
    assert_eq!(bid["trades"][0]["price"], "100.05");
    // 40.02 of value; the taker pays 0.2 %, the maker 0.1 %.
    assert_eq!(bid["trades"][0]["fee"], "0.08004");
    assert_eq!(buyer.balances().await, ["0.4", "0", "959.89996", "0"]);
    assert_eq!(seller.balances().await, ["1.6", "0.6", "1039.97998", "0"]);

    let sold = seller
        .trader
        .get(&format!("/trade/getTradeByAccount?account_id={}", seller.usd))
        .await;
    assert_eq!(sold["trades"][0]["type"], "sell");
    assert_eq!(sold["trades"][0]["role"], "maker");
    assert_eq!(sold["trades"][0]["fee"], "0.04002");
    assert_eq!(sold["trades"][0]["order_id"], ask["order_id"]);
    assert_eq!(sold["trades"][0]["trade_id"], bid["trades"][0]["trade_id"]);

    let order = json!({"order_id": ask["order_id"]});
    let cancelled = accept(seller.trader.post("/trade/cancel", &order).await, StatusCode::OK).await;
    assert_eq!(
        (&cancelled["filled"], &cancelled["remaining"]),
        (&json!("0.4"), &json!("0.6"))
    );
    assert_eq!(seller.balances().await, ["1.6", "0", "1039.97998", "0"]);
    let again = accept(seller.trader.post("/trade/cancel", &order).await, StatusCode::OK).await;
    assert_eq!(again, cancelled);
    let filled = json!({"order_id": bid["order_id"]});
    let problem = accept(
        buyer.trader.post("/trade/cancel", &filled).await,
        StatusCode::CONFLICT,
    )
    .await;
    assert_eq!(problem["code"], "order_filled");

    let metrics = exchange
        .service
        .client
        .get(exchange.service.admin_url("/metrics"));
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    for line in [
        "trades_total 1",
        "orders_total{outcome=\"accepted\"} 2",
        "order_batch_size_count 2",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }

    let owner = exchange.database.owner().await;
    assert_clean(&owner, "live").await;
    let id = |order: &Value| order["order_id"].as_str().unwrap().to_owned();
    let events: Vec<String> = sqlx::query_scalar(
        "select payload #>> '{seller,order_id}' from outbox
         where topic = 'trade.executed' and payload #>> '{buyer,order_id}' = $1",
    )
    .bind(id(&bid))
    .fetch_all(&owner)
    .await
    .unwrap();
    assert_eq!(events, [id(&ask)]);
}

/// Fees are rounded, and in both roles of an order: what covers it must be enough whatever comes together.
#[tokio::test(flavor = "multi_thread")]
async fn a_purchase_that_is_covered_exactly_trades_and_rests() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    // As narrow as it can be: nothing is saved by what rests.
    sqlx::query("update products set taker_fee_rate = maker_fee_rate where symbol = 'BTC-EUR'")
        .execute(&owner)
        .await
        .unwrap();
    for (currency, price, deposit, left) in [
        ("USD", "0.01", "0.00000021", ["0.0000001", "0.0000001"]),
        ("EUR", "61234.33", "1.22591129", ["0.61295564", "0.61295564"]),
    ] {
        let mut sides = Vec::new();
        for _ in 0..2 {
            let trader = exchange.issuer.trader(&exchange.service).await;
            let (btc, money) = (trader.account("BTC").await, trader.account(currency).await);
            sides.push((trader, btc, money));
        }
        let (seller, buyer) = (&sides[0], &sides[1]);
        exchange.treasury.deposit(&seller.1, "1").await;
        exchange.treasury.deposit(&buyer.2, deposit).await;
        let place = async |(trader, btc, money): &(Trader, String, String), action: &str, size: &str| {
            let order = json!({
                "type": action, "product": format!("BTC-{currency}"), "size": size, "price": price,
                "client_order_id": Uuid::now_v7(), "base_account_id": btc, "quote_account_id": money,
            });
            accept(trader.post("/trade/add", &order).await, StatusCode::CREATED).await
        };
        place(seller, "sell", "0.00001").await;
        let bought = place(buyer, "buy", "0.00002").await;
        assert_eq!(
            (&bought["status"], &bought["filled"]),
            (&json!("open"), &json!("0.00001"))
        );
        let accounts = buyer.0.get("/account/list").await;
        let money = &accounts["accounts"][1];
        assert_eq!([&money["balance"], &money["hold"]], left);
        // And nothing is left on hold when the rest has traded.
        place(seller, "sell", "0.00001").await;
        assert_eq!(buyer.0.get("/account/list").await["accounts"][1]["hold"], "0");
    }
    assert_clean(&owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::too_many_lines, reason = "a table of what is wrong with orders")]
async fn what_is_wrong_with_an_order_is_said_with_its_field() {
    let exchange = Exchange::start().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let wallet = trader.wallet(&exchange.treasury, "1", "100").await;
    let stranger = exchange.wallet("1", "100").await;
    let good = wallet.order("buy", "0.1", "100");
    let with = |field: &str, value: serde_json::Value| {
        let mut order = good.clone();
        order[field] = value;
        order
    };
    let cases = [
        (with("type", json!("hold")), 422, "invalid_field", "type"),
        (
            with("order_type", json!("stop")),
            422,
            "invalid_field",
            "order_type",
        ),
        (
            with("time_in_force", json!("FOK")),
            422,
            "invalid_field",
            "time_in_force",
        ),
        (with("size", json!(0.1)), 422, "invalid_field", "size"),
        (with("size", json!("1e3")), 422, "invalid_field", "size"),
        (with("size", json!("-1")), 422, "invalid_field", "size"),
        (with("size", json!("0")), 422, "invalid_field", "size"),
        (with("price", json!("NaN")), 422, "invalid_field", "price"),
        (with("price", json!(null)), 422, "invalid_field", "price"),
        (with("order_type", json!("market")), 422, "invalid_field", "price"),
        (
            with("client_order_id", json!("with space")),
            422,
            "invalid_field",
            "client_order_id",
        ),
        (
            with("client_order_id", json!(null)),
            422,
            "invalid_field",
            "client_order_id",
        ),
        (
            with("product", json!("BTC-XXX")),
            422,
            "unknown_product",
            "product",
        ),
        (with("product", json!("\u{0}")), 422, "unknown_product", "product"),
        (with("size", json!("0.000001")), 422, "size_too_small", "size"),
        (with("size", json!("0.1000005")), 422, "size_increment", "size"),
        (with("price", json!("100.001")), 422, "price_increment", "price"),
        (
            with("size", json!("999999999999999")),
            422,
            "value_too_large",
            "size",
        ),
        (
            with("base_account_id", json!(stranger.btc)),
            404,
            "account_not_found",
            "base_account_id",
        ),
        (
            with("quote_account_id", json!(stranger.usd)),
            404,
            "account_not_found",
            "quote_account_id",
        ),
        (
            with("quote_account_id", json!(Uuid::nil())),
            404,
            "account_not_found",
            "quote_account_id",
        ),
        (
            with("base_account_id", json!(wallet.usd)),
            422,
            "currency_mismatch",
            "base_account_id",
        ),
        (
            with("quote_account_id", json!(wallet.btc)),
            422,
            "currency_mismatch",
            "quote_account_id",
        ),
        (with("price", json!("1000")), 409, "insufficient_funds", "size"),
        (
            wallet.order("sell", "1.00001", "100"),
            409,
            "insufficient_funds",
            "size",
        ),
    ];
    for (order, status, code, field) in cases {
        let response = wallet.trader.post("/trade/add", &order).await;
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        let problem = accept(response, StatusCode::from_u16(status).unwrap()).await;
        assert_eq!(
            (problem["code"].as_str(), problem["field"].as_str()),
            (Some(code), Some(field)),
            "{order}"
        );
    }

    assert_eq!(wallet.balances().await, ["1", "0", "100", "0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_new_is_traded_from_a_frozen_account_or_in_a_halted_product() {
    let exchange = Exchange::start().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let wallet = trader.wallet(&exchange.treasury, "1", "100").await;
    let order = wallet.order("buy", "0.1", "100");
    let freeze = json!({"account_id": wallet.usd, "state": "frozen"});
    accept(
        wallet.trader.post("/account/update", &freeze).await,
        StatusCode::OK,
    )
    .await;
    let problem = accept(
        wallet.trader.post("/trade/add", &order).await,
        StatusCode::CONFLICT,
    )
    .await;
    assert_eq!(
        (&problem["code"], &problem["field"]),
        (&json!("account_frozen"), &json!("quote_account_id"))
    );
    sqlx::query("update products set status = 'halted' where symbol = 'BTC-USD'")
        .execute(&exchange.database.owner().await)
        .await
        .unwrap();
    let problem = accept(
        wallet.trader.post("/trade/add", &order).await,
        StatusCode::CONFLICT,
    )
    .await;
    assert_eq!(problem["code"], "product_halted");
    assert_eq!(
        wallet.balances().await,
        ["1", "0", "100", "0"],
        "a refused order has moved something"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rests_in_the_book_is_filled_whatever_its_owner_does_with_the_accounts() {
    let exchange = Exchange::start().await;
    let trader = async || exchange.issuer.trader(&exchange.service).await;
    let bidding = trader().await.wallet(&exchange.treasury, "0", "1000").await;
    let asking = trader().await.wallet(&exchange.treasury, "2", "0").await;
    let bid = bidding.place("buy", "1", "100").await;
    assert_eq!(bid["status"], "open");
    assert_eq!(asking.place("sell", "1", "200").await["status"], "open");

    // The account that the order will fill is as empty as one can be, and needed all the same.
    let delete = async |wallet: &Wallet, account: &str| {
        let choice = json!({"account_id": account});
        wallet.trader.post("/account/delete", &choice).await
    };
    for (wallet, account) in [(&bidding, &bidding.btc), (&asking, &asking.usd)] {
        let problem = accept(delete(wallet, account).await, StatusCode::CONFLICT).await;
        assert_eq!(
            (&problem["code"], &problem["field"]),
            (&json!("account_in_use"), &json!("account_id"))
        );
    }
    // A frozen account is one from which nothing new is traded.
    for (wallet, accounts) in [
        (&bidding, [&bidding.btc, &bidding.usd]),
        (&asking, [&asking.btc, &asking.usd]),
    ] {
        for account in accounts {
            let freeze = json!({"account_id": account, "state": "frozen"});
            accept(
                wallet.trader.post("/account/update", &freeze).await,
                StatusCode::OK,
            )
            .await;
        }
    }
    let other = trader().await.wallet(&exchange.treasury, "1", "1000").await;
    assert_eq!(other.place("sell", "0.4", "100").await["status"], "filled");
    assert_eq!(other.place("buy", "1", "200").await["status"], "filled");
    assert_eq!(bidding.balances().await, ["0.4", "0", "959.96", "60.06"]);
    assert_eq!(asking.balances().await, ["1", "0", "199.8", "0"]);

    // When no order names it any more, it can go.
    let leaving = trader().await.wallet(&exchange.treasury, "0", "1000").await;
    let bid = leaving.place("buy", "1", "90").await;
    assert_eq!(
        delete(&leaving, &leaving.btc).await.status(),
        StatusCode::CONFLICT
    );
    let order = json!({"order_id": bid["order_id"]});
    accept(leaving.trader.post("/trade/cancel", &order).await, StatusCode::OK).await;
    assert_eq!(
        delete(&leaving, &leaving.btc).await.status(),
        StatusCode::NO_CONTENT
    );
    assert_clean(&exchange.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_whose_account_is_missing_does_not_hold_up_its_book() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let trader = async || exchange.issuer.trader(&exchange.service).await;
    let mut gone = Vec::new();
    for price in ["103", "102"] {
        let wallet = trader().await.wallet(&exchange.treasury, "0", "1000").await;
        wallet.place("buy", "1", price).await;
        gone.push(wallet);
    }
    let bidding = trader().await.wallet(&exchange.treasury, "0", "1000").await;
    bidding.place("buy", "1", "101").await;

    // The database refuses it, whoever asks, unless its guards are off.
    let tombstone = "update accounts set deleted_at = now() where id = any($1)";
    let accounts: Vec<Uuid> = gone.iter().map(|wallet| wallet.btc.parse().unwrap()).collect();
    let refused = sqlx::query(tombstone).bind(&accounts).execute(&owner).await;
    assert_eq!(
        refused.unwrap_err().as_database_error().unwrap().code().unwrap(),
        "23001"
    );
    let mut unguarded = owner.begin().await.unwrap();
    sqlx::query("set local session_replication_role = replica")
        .execute(&mut *unguarded)
        .await
        .unwrap();
    sqlx::query(tombstone)
        .bind(&accounts)
        .execute(&mut *unguarded)
        .await
        .unwrap();
    unguarded.commit().await.unwrap();
    let found: Vec<(String,)> = sqlx::query_as("select problem from audit_ledger_v1('live')")
        .fetch_all(&owner)
        .await
        .unwrap();
    let missing = ("account of an open order is missing".to_owned(),);
    assert_eq!(found, [missing.clone(), missing]);

    let asking = trader().await.wallet(&exchange.treasury, "1", "0").await;
    let ask = asking.place("sell", "1", "100").await;
    assert_eq!(ask["trades"][0]["price"], "101", "{ask}");
    let left: Vec<(String,)> = sqlx::query_as(
        "select status || ' ' || trim_scale(hold) from orders join accounts on accounts.id = quote_account_id
         where base_account_id = any($1)",
    )
    .bind(&accounts)
    .fetch_all(&owner)
    .await
    .unwrap();
    let cancelled = ("cancelled 0".to_owned(),);
    assert_eq!(left, [cancelled.clone(), cancelled]);
    assert_clean(&owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_forgotten_while_it_is_looked_for_is_as_good_as_new() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let account = trader.account("USD").await;
    let body = json!({"account_id": account, "amount": "1"});
    let deposit = async || {
        exchange
            .treasury
            .post_with_key("/account/deposit", "one", &body)
            .await
    };
    accept(deposit().await, StatusCode::CREATED).await;
    // Between the attempt to insert it, and the look at what is there.
    sqlx::raw_sql(
        "update idempotency_keys set request_hash = 'old';
         create function forget() returns trigger language plpgsql as $$
         begin
             delete from idempotency_keys where request_hash = 'old';
             return null;
         end $$;
         create trigger forget after insert on idempotency_keys for each statement execute function forget()",
    )
    .execute(&owner)
    .await
    .unwrap();
    let again = deposit().await;
    assert!(!again.headers().contains_key("idempotency-hit"));
    accept(again, StatusCode::CREATED).await;
    assert!(deposit().await.headers().contains_key("idempotency-hit"));
    assert_clean(&owner, "live").await;
}

/// As if trades had brought so much into an account: no deposit would.
async fn enrich(owner: &PgPool, account: &str, amount: &str) {
    sqlx::query(
        "with transferred as (
             insert into transfers (id, lane, kind, created_at) values (nextval('transfer_ids'), 'live', 'deposit', now())
             returning id
         ), rich as (
             update accounts set balance = balance + $2::numeric where id = $1 returning currency
         )
         insert into entries (account_id, transfer_id, line, lane, currency, kind, amount)
         select account, transferred.id, line, 'live', currency, 'transfer', change
         from transferred, rich,
              lateral (values ($1, 1, $2::numeric), (exchange_account_v1('live', 'external', currency), 2, -$2::numeric))
                  as entry (account, line, change)",
    )
    .bind(account.parse::<Uuid>().unwrap())
    .bind(amount)
    .execute(owner)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_is_full_does_not_hold_up_its_book() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    // Two orders of somebody who cannot be paid for either, and one of somebody else behind them.
    let full = exchange.wallet("3", "1").await;
    for price in ["100", "101"] {
        full.place("sell", "1", price).await;
    }
    enrich(&owner, &full.usd, "999999999999999950").await;
    let asking = exchange.wallet("1", "0").await;
    asking.place("sell", "1", "102").await;
    let buying = exchange.wallet("0", "1000").await;
    let bid = buying.place("buy", "1", "110").await;
    assert_eq!(bid["status"], "filled", "{bid}");
    assert_eq!(bid["trades"][0]["price"], "102", "{bid}");
    assert_eq!(full.balances().await, ["3", "0", "999999999999999951", "0"]);
    let book = full.trader.get("/book?product=BTC-USD").await;
    assert_eq!((&book["bids"], &book["asks"]), (&json!([]), &json!([])));

    // As taker, it is told so: at once, or when it has got as much as it can.
    for (size, price) in [("0.2", "100"), ("1", "90")] {
        buying.place("buy", size, price).await;
    }
    let ask = full.place("sell", "1", "90").await;
    assert_eq!(
        (&ask["status"], &ask["filled"], &ask["reason"]),
        (&json!("cancelled"), &json!("0.2"), &json!("balance_limit"))
    );
    let ask = full.order("sell", "1", "90");
    let refused = full.trader.post("/trade/add", &ask).await;
    let refused = accept(refused, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(
        (&refused["code"], &refused["field"]),
        (&json!("balance_limit"), &json!("quote_account_id"))
    );
    // The same for what is bought.
    enrich(&owner, &full.btc, "999999999999999996.5").await;
    let bid = full.place("buy", "1", "80").await;
    assert_eq!(bid["status"], "open");
    let selling = exchange.wallet("3", "0").await;
    selling.place("sell", "1", "95").await;
    let bid = full.order("buy", "0.9", "95");
    let refused = full.trader.post("/trade/add", &bid).await;
    let refused = accept(refused, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(
        (&refused["code"], &refused["field"]),
        (&json!("balance_limit"), &json!("base_account_id"))
    );
    let ask = selling.place("sell", "2", "70").await;
    assert_eq!(
        (&ask["status"], &ask["filled"]),
        (&json!("open"), &json!("1")),
        "{ask}"
    );
    assert_eq!(ask["trades"][0]["price"], "90", "{ask}");
    assert_eq!(
        full.balances().await,
        ["999999999999999999.3", "0", "999999999999999970.96", "0"]
    );
    assert_clean(&owner, "live").await;
}

/// What fills it comes with it in one transaction.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_is_full_at_once_does_not_hold_up_its_book() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let full = exchange.wallet("2", "1").await;
    enrich(&owner, &full.usd, "999999999999999850").await;
    let buying = exchange.wallet("0", "1000").await;
    let mut book = owner.begin().await.unwrap();
    sqlx::query("select lock_book_v1('live', 'BTC-USD')")
        .execute(&mut *book)
        .await
        .unwrap();
    // The first waits alone, and the others behind it.
    let orders = [
        buying.order("buy", "1", "1"),
        full.order("sell", "1", "100"),
        full.order("sell", "1", "101"),
        buying.order("buy", "2", "110"),
    ];
    let mut placing = Vec::new();
    for (order, wallet) in orders.into_iter().zip([&buying, &full, &full, &buying]) {
        let trader = wallet.trader.clone();
        placing.push(tokio::spawn(
            async move { trader.post("/trade/add", &order).await },
        ));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    book.rollback().await.unwrap();
    let mut placed = Vec::new();
    for answer in placing {
        placed.push(accept(answer.await.unwrap(), StatusCode::CREATED).await);
    }
    assert_eq!(
        (&placed[3]["status"], &placed[3]["filled"]),
        (&json!("open"), &json!("1")),
        "{placed:?}"
    );
    assert_clean(&owner, "live").await;
}

/// Somebody may keep an account locked for long; the others in the book have better things to do than to wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_account_does_not_hold_up_its_book() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let trader = async || exchange.issuer.trader(&exchange.service).await;
    let stuck = trader().await.wallet(&exchange.treasury, "0", "1000").await;
    let mut others = Vec::new();
    for _ in 0..8 {
        others.push(trader().await.wallet(&exchange.treasury, "0", "1000").await);
    }
    let mut lock = owner.begin().await.unwrap();
    sqlx::query("select from accounts where id = $1 for update")
        .bind(stuck.usd.parse::<Uuid>().unwrap())
        .execute(&mut *lock)
        .await
        .unwrap();
    let begun = Instant::now();
    let order = stuck.order("buy", "1", "100");
    let waiting = {
        let (trader, order) = (stuck.trader.clone(), order.clone());
        tokio::spawn(async move { trader.post("/trade/add", &order).await })
    };
    eventually("it has the book", || async {
        let waits = waits_for_lock(&owner, "%submit_orders%").await.ok()?;
        waits.then_some(())
    })
    .await;
    // One of them comes with another order of the one who is stuck: together they fail, alone each has its own answer.
    let again = stuck.order("buy", "1", "100");
    let orders = others.iter().map(|wallet| wallet.order("buy", "1", "100"));
    let orders: Vec<Value> = orders.collect();
    let placing = others
        .iter()
        .zip(&orders)
        .map(|(wallet, order)| wallet.trader.post("/trade/add", order));
    let (placed, refused) = tokio::join!(
        futures::future::join_all(placing),
        stuck.trader.post("/trade/add", &again)
    );
    for answer in placed {
        assert_eq!(accept(answer, StatusCode::CREATED).await["status"], "open");
    }
    for answer in [waiting.await.unwrap(), refused] {
        assert_eq!(answer.headers()["retry-after"], "1");
        let problem = accept(answer, StatusCode::SERVICE_UNAVAILABLE).await;
        assert_eq!(problem["code"], "unavailable");
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    lock.rollback().await.unwrap();
    accept(stuck.trader.post("/trade/add", &order).await, StatusCode::CREATED).await;
    assert_clean(&owner, "live").await;
}

/// Locks an account until the end of the transaction.
async fn lock_account(owner: &PgPool, account: &str) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut lock = owner.begin().await.unwrap();
    sqlx::query("select from accounts where id = $1 for update")
        .bind(account.parse::<Uuid>().unwrap())
        .execute(&mut *lock)
        .await
        .unwrap();
    lock
}

/// What an order cannot pay for it does not touch: accounts of others are locked for no longer than by those who trade.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_touches_nothing_that_it_cannot_take() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let (near, next, far) = (
        exchange.wallet("1", "0").await,
        exchange.wallet("1", "0").await,
        exchange.wallet("1", "1000").await,
    );
    near.place("sell", "0.01", "100").await;
    next.place("sell", "1", "101").await;
    far.place("sell", "1", "102").await;
    far.place("buy", "1", "90").await;
    let lock = lock_account(&owner, &far.btc).await;
    let lock_too = lock_account(&owner, &far.usd).await;

    let poor = exchange.wallet("0", "0").await;
    let some = exchange.wallet("0", "2").await;
    let market = |wallet: &Wallet, action: &str| {
        let mut order = wallet.order(action, "1000", "1");
        order["order_type"] = json!("market");
        order.as_object_mut().unwrap().remove("price");
        order
    };
    // Nothing to pay with, or accounts that are nobody's, or somebody else's, or of the wrong currency.
    let mut of_nobody = market(&poor, "sell");
    of_nobody["base_account_id"] = json!(Uuid::now_v7());
    let mut of_another = market(&poor, "sell");
    of_another["base_account_id"] = json!(far.btc);
    let mut wrong = market(&poor, "buy");
    wrong["base_account_id"] = json!(poor.usd);
    for (order, status, code) in [
        (market(&poor, "sell"), StatusCode::CONFLICT, "insufficient_funds"),
        (
            poor.order("buy", "3", "200"),
            StatusCode::CONFLICT,
            "insufficient_funds",
        ),
        (of_nobody, StatusCode::NOT_FOUND, "account_not_found"),
        (of_another, StatusCode::NOT_FOUND, "account_not_found"),
        (wrong, StatusCode::UNPROCESSABLE_ENTITY, "currency_mismatch"),
    ] {
        let problem = accept(poor.trader.post("/trade/add", &order).await, status).await;
        assert_eq!(problem["code"], code, "{order}");
    }
    // Little: it buys what it can, and stops at what is next.
    let answer = some.trader.post("/trade/add", &market(&some, "buy")).await;
    let bought = accept(answer, StatusCode::CREATED).await;
    assert_eq!(
        (&bought["filled"], &bought["reason"]),
        (&json!("0.01"), &json!("insufficient_funds"))
    );
    // Nobody gets past an order of one's own.
    let own = exchange.wallet("1", "1000").await;
    own.place("sell", "0.5", "100.5").await;
    let answer = own.trader.post("/trade/add", &market(&own, "buy")).await;
    let stopped = accept(answer, StatusCode::CREATED).await;
    assert_eq!(stopped["reason"], "self_trade");
    lock.rollback().await.unwrap();
    lock_too.rollback().await.unwrap();
    assert_clean(&owner, "live").await;
}

/// Rests so many orders of one user in the book, in one call.
async fn rest_many(owner: &PgPool, wallet: &Wallet, number: i32, price: i32) -> Vec<String> {
    sqlx::query_scalar(
        "select outcome from submit_orders_v1('live', 'BTC-USD',
             array(select gen_random_uuid() from generate_series(1, $1)),
             array_fill((select user_id from accounts where id = $2), array[$1]),
             array(select gen_random_uuid()::text from generate_series(1, $1)), array_fill('sell'::text, array[$1]),
             array_fill($4::numeric, array[$1]), array_fill(0.00001, array[$1]), array_fill('gtc'::text, array[$1]),
             array_fill($2, array[$1]), array_fill($3, array[$1]), array_fill(null::jsonb, array[$1]))",
    )
    .bind(number)
    .bind(wallet.btc.parse::<Uuid>().unwrap())
    .bind(wallet.usd.parse::<Uuid>().unwrap())
    .bind(price)
    .fetch_all(owner)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_at_most_a_hundred_accounts() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let kept = trader.account("BTC").await;
    sqlx::query(
        "insert into accounts (id, lane, user_id, currency, name)
         select uuid_v7(), lane, user_id, currency, 'account ' || n from accounts, generate_series(1, 98) n where id = $1",
    )
    .bind(kept.parse::<Uuid>().unwrap())
    .execute(&owner)
    .await
    .unwrap();
    let last = trader.account("USD").await;
    let one_more = json!({"currency": "BTC", "name": "one more"});
    let refused = trader.post("/account/add", &one_more).await;
    let problem = accept(refused, StatusCode::CONFLICT).await;
    assert_eq!(problem["code"], "account_limit");
    // Others have their own, and one that is gone makes room.
    exchange
        .issuer
        .trader(&exchange.service)
        .await
        .account("BTC")
        .await;
    let gone = trader.post("/account/delete", &json!({"account_id": last})).await;
    assert_eq!(gone.status(), 204);
    assert_eq!(trader.post("/account/add", &one_more).await.status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_so_many_open_orders_in_a_product_and_no_more() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let wallet = exchange.wallet("1", "1000").await;
    // All but one at first, then two of three too many.
    assert_eq!(rest_many(&owner, &wallet, 999, 100).await, ["accepted"; 999]);
    let limit = "open_order_limit";
    assert_eq!(
        rest_many(&owner, &wallet, 3, 100).await,
        ["accepted", limit, limit]
    );
    let order = wallet.order("buy", "0.1", "50");
    let problem = accept(
        wallet.trader.post("/trade/add", &order).await,
        StatusCode::CONFLICT,
    )
    .await;
    assert_eq!(
        (&problem["code"], &problem["field"]),
        (&json!(limit), &json!("product"))
    );
    // What never rests is not counted, nor is another user.
    let mut passing = order.clone();
    passing["time_in_force"] = json!("IOC");
    accept(
        wallet.trader.post("/trade/add", &passing).await,
        StatusCode::CREATED,
    )
    .await;
    let other = exchange.wallet("0", "1000").await;
    other.place("buy", "0.1", "50").await;
    // One that is gone makes room for another.
    let one: Uuid =
        sqlx::query_scalar("select id from orders where status = 'open' and side = 'sell' limit 1")
            .fetch_one(&owner)
            .await
            .unwrap();
    let cancelled = wallet
        .trader
        .post("/trade/cancel", &json!({"order_id": one}))
        .await;
    accept(cancelled, StatusCode::OK).await;
    wallet.place("buy", "0.1", "49").await;
    assert_clean(&owner, "live").await;
}

/// However fine the book is ground, an order ends in time; and those that came with it have their turn.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_meets_so_many_others_and_no_more() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    for price in [100, 101] {
        let seller = exchange.wallet("1", "0").await;
        rest_many(&owner, &seller, 750, price).await;
    }
    // While the book is locked by somebody, one order waits for it, and the others for that one: together.
    let mut lock = owner.begin().await.unwrap();
    sqlx::query("select lock_book_v1('live', 'BTC-USD')")
        .execute(&mut *lock)
        .await
        .unwrap();
    let buyer = exchange.wallet("0", "1000").await;
    let first = buyer.order("buy", "0.00001", "200");
    let first = tokio::spawn({
        let trader = buyer.trader.clone();
        async move { trader.post("/trade/add", &first).await }
    });
    eventually("it waits for the book", || async {
        let waits = waits_for_lock(&owner, "%submit_orders%").await.ok()?;
        waits.then_some(())
    })
    .await;
    let orders: Vec<Value> = (0..4).map(|_| buyer.order("buy", "1", "200")).collect();
    let placing = orders.iter().map(|order| buyer.trader.post("/trade/add", order));
    let answers = tokio::join!(futures::future::join_all(placing), async {
        lock.rollback().await.unwrap();
    });
    accept(first.await.unwrap(), StatusCode::CREATED).await;
    let mut ends = Vec::new();
    for answer in answers.0 {
        let order = accept(answer, StatusCode::CREATED).await;
        let met = order["trades"].as_array().unwrap().len();
        ends.push((met, order["status"].clone(), order["reason"].clone()));
    }
    ends.sort_by_key(|(met, ..)| *met);
    let limited = |met| (met, json!("cancelled"), json!("trade_limit"));
    assert_eq!(
        ends,
        [
            (0, json!("open"), json!(null)),
            (499, json!("open"), json!(null)),
            limited(500),
            limited(500)
        ]
    );
    assert_clean(&owner, "live").await;
}

/// Every figure of a trade is one of the ledger's, not its size alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_audit_finds_a_trade_that_says_other_than_its_entries() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    exchange.wallet("1", "0").await.place("sell", "1", "100").await;
    exchange.wallet("0", "1000").await.place("buy", "1", "100").await;
    assert_clean(&owner, "live").await;
    for (change, found) in [
        ("size = size / 2", &["size", "value"][..]),
        ("price = price / 2", &["value"]),
        ("taker_fee = taker_fee / 2", &["fees", "taker fee"]),
        ("maker_fee = maker_fee / 2", &["fees", "maker fee"]),
    ] {
        let mut forged = owner.begin().await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "alter table trades disable trigger trades_append_only; update trades set {change}"
        )))
        .execute(&mut *forged)
        .await
        .unwrap();
        let legs: Vec<String> = sqlx::query_scalar(
            "select distinct substring(subject from ' (.*)') from audit_ledger_v1('live')
             where problem = 'trade is not its transfer''s entries' order by 1",
        )
        .fetch_all(&mut *forged)
        .await
        .unwrap();
        assert_eq!(legs, found, "{change}");
        forged.rollback().await.unwrap();
    }
}

/// The answer to a deposit names the account, and says what is in it now. Both are somebody else's.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_treasury_takes_along_says_nothing_of_others_accounts() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let wallet = exchange.wallet("0", "987.65").await;
    let part = json!({"account_id": wallet.usd, "amount": "87.65"});
    let withdrawn = wallet
        .trader
        .post_with_key("/account/withdraw", "part", &part)
        .await;
    let withdrawn = accept(withdrawn, StatusCode::CREATED).await;
    // Everything that whoever got this answer takes along.
    let export = async |amount: &str| -> Vec<Value> {
        let user: Uuid =
            sqlx::query_scalar("select user_id from idempotency_keys where answer ->> 'amount' = $1")
                .bind(amount)
                .fetch_one(&owner)
                .await
                .unwrap();
        let topics: Vec<String> = sqlx::query_scalar("select export from user_data")
            .fetch_all(&owner)
            .await
            .unwrap();
        let mut exported = Vec::new();
        for topic in topics {
            let rows = sqlx::query_scalar::<_, Value>(sqlx::AssertSqlSafe(topic)).bind(user);
            exported.extend(rows.fetch_all(&owner).await.unwrap());
        }
        exported
    };
    let of_the_treasury = export("987.65").await;
    let mut answers = of_the_treasury.iter().filter_map(|row| row["answer"].as_object());
    let answer = answers.find(|answer| answer["amount"] == "987.65").unwrap();
    assert!(
        !answer.contains_key("balance") && !answer.contains_key("hold"),
        "{answer:?}"
    );
    let text = Value::from(of_the_treasury).to_string();
    assert!(!text.contains(&wallet.usd), "{text}");
    // The account's owner gets the whole of it.
    let of_the_trader = export("87.65").await;
    let answers = of_the_trader.iter().map(|row| &row["answer"]);
    assert_eq!(
        answers.filter(|answer| !answer.is_null()).collect::<Vec<_>>(),
        [&withdrawn]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_cannot_be_read_is_named() {
    let exchange = Exchange::start().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let account = trader.account("USD").await;
    for (path, field) in [
        (
            format!("/trade/getTradeByAccount?account_id={account}&curser=1"),
            "curser",
        ),
        (
            format!("/trade/getTradeByAccount?account_id={account}&limit=x"),
            "limit",
        ),
        ("/trade/getTradeByAccount?account_id=x".to_owned(), "account_id"),
        ("/book?product=BTC-USD&deep=1".to_owned(), "deep"),
    ] {
        let problem = accept(trader.try_get(&path).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(
            (&problem["code"], &problem["field"]),
            (&json!("invalid_parameter"), &json!(field)),
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_named_frozen_emptied_and_closed() {
    let exchange = Exchange::start().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let stranger = exchange.issuer.trader(&exchange.service).await;
    let account = trader.account("EUR").await;
    let duplicate = trader
        .post("/account/add", &json!({"currency": "EUR", "name": "main"}))
        .await;
    assert_eq!(
        accept(duplicate, StatusCode::CONFLICT).await["code"],
        "account_exists"
    );
    for currency in ["XXX", "eur", "", "\u{0}"] {
        let unknown = trader
            .post("/account/add", &json!({"currency": currency, "name": "main"}))
            .await;
        assert_eq!(
            accept(unknown, StatusCode::UNPROCESSABLE_ENTITY).await["code"],
            "unknown_currency"
        );
    }
    for name in ["", "\u{0}", &"x".repeat(65)] {
        let bad = trader
            .post("/account/add", &json!({"currency": "EUR", "name": name}))
            .await;
        assert_eq!(
            accept(bad, StatusCode::UNPROCESSABLE_ENTITY).await["field"],
            "name"
        );
    }

    let choice = json!({"account_id": account});
    for path in ["/account/update", "/account/delete"] {
        let foreign = stranger.post(path, &choice).await;
        assert_eq!(
            accept(foreign, StatusCode::NOT_FOUND).await["code"],
            "account_not_found"
        );
    }
    let sets_balance = trader
        .post("/account/update", &json!({"account_id": account, "balance": "5"}))
        .await;
    let refused = accept(sets_balance, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(refused["field"], "balance");
    let renamed = json!({"account_id": account, "name": "savings"});
    let renamed = accept(trader.post("/account/update", &renamed).await, StatusCode::OK).await;
    assert_eq!(
        (&renamed["name"], &renamed["kind"]),
        (&json!("savings"), &json!("fiat"))
    );

    exchange.treasury.deposit(&account, "10.5").await;
    let refused = trader.post("/account/delete", &choice).await;
    assert_eq!(
        accept(refused, StatusCode::CONFLICT).await["code"],
        "account_not_empty"
    );
    let withdrawal = |amount: &str| json!({"account_id": account, "amount": amount});
    let withdraw = async |key: &str, amount: &str| {
        trader
            .post_with_key("/account/withdraw", key, &withdrawal(amount))
            .await
    };
    let problem = accept(withdraw("w1", "10.50000001").await, StatusCode::CONFLICT).await;
    assert_eq!(
        (&problem["code"], &problem["field"]),
        (&json!("insufficient_funds"), &json!("amount"))
    );
    let problem = accept(
        withdraw("w1", "0.000000001").await,
        StatusCode::UNPROCESSABLE_ENTITY,
    )
    .await;
    assert_eq!(problem["code"], "amount_increment");
    let problem = accept(withdraw("w1", "0").await, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(problem["field"], "amount");
    let foreign = stranger
        .post_with_key("/account/withdraw", "w1", &withdrawal("1"))
        .await;
    assert_eq!(
        accept(foreign, StatusCode::NOT_FOUND).await["code"],
        "account_not_found"
    );
    // A refused request leaves its key free.
    let done = accept(withdraw("w1", "10.5").await, StatusCode::CREATED).await;
    assert_eq!(done["balance"], "0");
    assert_eq!(
        trader.post("/account/delete", &choice).await.status(),
        StatusCode::NO_CONTENT
    );
    assert_eq!(trader.get("/account/list").await["accounts"], json!([]));
    assert_eq!(
        accept(
            trader.post("/account/delete", &choice).await,
            StatusCode::NOT_FOUND
        )
        .await["code"],
        "account_not_found"
    );
    assert_ne!(trader.account("EUR").await, account, "the name is free again");
    assert_clean(&exchange.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_treasury_or_the_lanes_secret_credits() {
    let database = Database::migrated(Postgres::shared()).await;
    let flags = [
        "--colour",
        "green",
        "--revision",
        "r1",
        "--lane-secret",
        "0123456789abcdef",
    ];
    let service = Service::live("trade", &database, &flags).ready().await;
    let issuer = Issuer::new(&database).await;
    let trader = issuer.trader(&service).await;
    let account = trader.account("USD").await;
    let body = json!({"account_id": account, "amount": "1"});
    let refused = trader.post_with_key("/account/deposit", "d1", &body).await;
    assert_eq!(accept(refused, StatusCode::FORBIDDEN).await["code"], "forbidden");
    let keyless = trader.post("/account/deposit", &body).await;
    assert_eq!(
        accept(keyless, StatusCode::BAD_REQUEST).await["field"],
        "Idempotency-Key"
    );

    let deposit = async |lane: &str, secret: &str| {
        let token = issuer
            .token(Uuid::now_v7(), lane.parse::<Lane>().unwrap(), &[])
            .await;
        let post = |path: &str| service.client.post(service.url(path)).bearer_auth(&token);
        let account = post("/account/add").json(&json!({"currency": "USD", "name": "main"}));
        let account = accept(account.send().await.unwrap(), StatusCode::CREATED).await;
        let deposit = post("/account/deposit")
            .header("idempotency-key", "d1")
            .header("x-exchange-lane-secret", secret)
            .json(&json!({"account_id": account["account_id"], "amount": "1"}));
        deposit.send().await.unwrap().status()
    };
    assert_eq!(
        deposit("test-green-r1.1", "0123456789abcdef").await,
        StatusCode::CREATED
    );
    assert_eq!(
        deposit("test-green-r1.1", "0123456789abcdeX").await,
        StatusCode::FORBIDDEN
    );
    assert_eq!(
        deposit("test-blue-r1.1", "0123456789abcdef").await,
        StatusCode::FORBIDDEN
    );
    assert_eq!(deposit("live", "0123456789abcdef").await, StatusCode::FORBIDDEN);
}

/// No deposit fills an account beyond what a number from outside may be, but trades may.
/// A token is valid for some minutes longer than its user may be there.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_is_gone_moves_money_or_leaves_words_behind() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let wallet = exchange.wallet("0", "100").await;
    let treasurer = Uuid::now_v7();
    let token = exchange
        .issuer
        .token(treasurer, Lane::live(), &["treasury"])
        .await;
    let treasury = Trader::new(&exchange.service, token);
    let body = json!({"account_id": wallet.usd, "amount": "1", "reference": "a word"});
    let deposited = treasury.post_with_key("/account/deposit", "before", &body).await;
    accept(deposited, StatusCode::CREATED).await;
    let left: i64 = sqlx::query_scalar("select count(*) from transfer_references")
        .fetch_one(&owner)
        .await
        .unwrap();
    sqlx::query(
        "update users set email = null, password_hash = null, deleted_at = now()
         where id in ($1, (select user_id from accounts where id::text = $2))",
    )
    .bind(treasurer)
    .bind(&wallet.usd)
    .execute(&owner)
    .await
    .unwrap();
    for (trader, path) in [
        (&treasury, "/account/deposit"),
        (&wallet.trader, "/account/withdraw"),
    ] {
        let refused = trader.post_with_key(path, "after", &body).await;
        let problem = accept(refused, StatusCode::UNAUTHORIZED).await;
        assert_eq!(problem["code"], "unauthenticated", "{path}");
    }
    let written: (i64, i64) = sqlx::query_as(
        "select (select count(*) from transfer_references),
                (select count(*) from idempotency_keys where key = 'after')",
    )
    .fetch_one(&owner)
    .await
    .unwrap();
    assert_eq!(written, (left, 0));
    assert_eq!(wallet.balances().await[2], "101");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balance_beyond_what_may_be_deposited_is_answered_like_any_other() {
    let exchange = Exchange::start().await;
    let seller = exchange.wallet("1", "999999999999999").await;
    let buyer = exchange.wallet("0", "200").await;
    let move_money = async |who: &Trader, path: &str, key: &str, amount: &str| {
        let movement = json!({"account_id": seller.usd, "amount": amount});
        who.post_with_key(path, key, &movement).await
    };
    let deposit = async |amount: &str| move_money(&exchange.treasury, "/account/deposit", "d", amount).await;
    let problem = accept(deposit("1").await, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert_eq!(
        (&problem["code"], &problem["field"]),
        (&json!("balance_limit"), &json!("amount"))
    );
    // Up to the limit it is filled.
    let deposited = accept(deposit("0.99999999").await, StatusCode::CREATED).await;
    assert_eq!(deposited["balance"], "999999999999999.99999999");

    seller.place("sell", "1", "100").await;
    buyer.place("buy", "1", "100").await;
    let withdraw = async || move_money(&seller.trader, "/account/withdraw", "w", "1").await;
    let first = accept(withdraw().await, StatusCode::CREATED).await;
    assert_eq!(first["balance"], "1000000000000098.89999999");
    assert_eq!(seller.balances().await[2], "1000000000000098.89999999");
    let again = withdraw().await;
    assert_eq!(again.headers()["idempotency-hit"], "true");
    assert_eq!(accept(again, StatusCode::CREATED).await, first);
    assert_clean(&exchange.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_gets_its_first_answer() {
    let exchange = Exchange::start().await;
    let maker = exchange.wallet("1", "0").await;
    let taker = exchange.wallet("0", "1000").await;
    maker.place("sell", "0.3", "100").await;
    maker.place("sell", "0.3", "101").await;

    let order = taker.order("buy", "0.7", "102");
    let first = taker.trader.post("/trade/add", &order).await;
    assert!(!first.headers().contains_key("idempotency-hit"));
    let first = accept(first, StatusCode::CREATED).await;
    assert_eq!(
        (&first["status"], &first["remaining"]),
        (&json!("open"), &json!("0.1"))
    );
    // The order has changed since, its first answer has not.
    maker.place("sell", "0.1", "102").await;
    let again = taker.trader.post("/trade/add", &order).await;
    assert_eq!(again.headers()["idempotency-hit"], "true");
    assert_eq!(accept(again, StatusCode::CREATED).await, first);
    for (field, value) in [
        ("size", "0.8"),
        ("price", "103"),
        ("type", "sell"),
        ("product", "BTC-EUR"),
    ] {
        let mut other = order.clone();
        other[field] = json!(value);
        let problem = accept(
            taker.trader.post("/trade/add", &other).await,
            StatusCode::CONFLICT,
        )
        .await;
        assert_eq!(problem["code"], "idempotency_key_reused", "{field}");
    }

    let body = json!({"account_id": taker.usd, "amount": "5"});
    let first = exchange
        .treasury
        .post_with_key("/account/deposit", "d", &body)
        .await;
    let first = accept(first, StatusCode::CREATED).await;
    let again = exchange
        .treasury
        .post_with_key("/account/deposit", "d", &body)
        .await;
    assert_eq!(again.headers()["idempotency-hit"], "true");
    assert_eq!(accept(again, StatusCode::CREATED).await, first);
    let other = json!({"account_id": taker.usd, "amount": "6"});
    let problem = accept(
        exchange
            .treasury
            .post_with_key("/account/deposit", "d", &other)
            .await,
        StatusCode::CONFLICT,
    )
    .await;
    assert_eq!(problem["code"], "idempotency_key_reused");
    assert_clean(&exchange.database.owner().await, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_trades_are_stable_while_trades_come_in() {
    let exchange = Exchange::start().await;
    let maker = exchange.wallet("10", "0").await;
    let taker = exchange.wallet("0", "10000").await;
    maker.place("sell", "5", "100").await;
    let mut made = Vec::new();
    for _ in 0..7 {
        let order = taker.place("buy", "0.01", "100").await;
        made.insert(0, order["trades"][0]["trade_id"].clone());
    }
    let mut seen = Vec::new();
    let mut path = format!("/trade/getTradeByAccount?account_id={}&limit=3", taker.btc);
    loop {
        let page = taker.trader.get(&path).await;
        seen.extend(
            page["trades"]
                .as_array()
                .unwrap()
                .iter()
                .map(|trade| trade["trade_id"].clone()),
        );
        taker.place("buy", "0.01", "100").await;
        let Some(cursor) = page["next_cursor"].as_str() else {
            break;
        };
        path = format!(
            "/trade/getTradeByAccount?account_id={}&limit=3&cursor={cursor}",
            taker.btc
        );
    }
    assert_eq!(seen, made);

    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("cursor=x", "cursor"),
    ] {
        let path = format!("/trade/getTradeByAccount?account_id={}&{query}", taker.btc);
        let problem = accept(taker.trader.try_get(&path).await, StatusCode::BAD_REQUEST).await;
        assert_eq!(problem["field"], field);
    }
    let path = format!("/trade/getTradeByAccount?account_id={}", maker.btc);
    let problem = accept(taker.trader.try_get(&path).await, StatusCode::NOT_FOUND).await;
    assert_eq!(problem["code"], "account_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_append_only_and_the_services_write_it_by_functions_only() {
    let exchange = Exchange::start().await;
    let trader = exchange.issuer.trader(&exchange.service).await;
    let wallet = trader.wallet(&exchange.treasury, "1", "1").await;
    let owner = exchange.database.owner().await;
    let service = sqlx::PgPool::connect(&exchange.database.app_url).await.unwrap();
    let entry = |amounts: &str| {
        format!(
            "with t as (insert into transfers select nextval('transfer_ids'), 'live', 'deposit', now() returning id)
             insert into entries select a.id, currval('transfer_ids'), row_number() over (), 'live', 'USD', 'transfer', amount
             from accounts a, unnest(array[{amounts}]) as amount where a.id = '{}'",
            wallet.usd
        )
    };
    let attempts = [
        "update entries set amount = amount + 1".to_owned(),
        "delete from entries".to_owned(),
        "truncate entries, transfers, trades".to_owned(),
        "update transfers set kind = 'trade'".to_owned(),
        "delete from transfers".to_owned(),
        "update accounts set hold = -1".to_owned(),
        "update accounts set deleted_at = now()".to_owned(),
        "update accounts set balance = -1".to_owned(),
        "select erase_lane_v1('live')".to_owned(),
        entry("1.0"),
        entry("1.0, -2.0"),
    ];
    for sql in attempts {
        for db in [&owner, &service] {
            let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.clone())).execute(db).await;
            assert!(done.is_err(), "not refused: {sql}");
        }
    }
    for sql in [
        "update accounts set balance = balance + 1".to_owned(),
        "insert into transfers values (1, 'live', 'deposit', now())".to_owned(),
        entry("1.0, -1.0"),
        "delete from orders".to_owned(),
        "update products set status = 'halted'".to_owned(),
    ] {
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(&service)
            .await
            .unwrap_err();
        assert_eq!(error.as_database_error().unwrap().code().unwrap(), "42501");
    }
    assert_clean(&owner, "live").await;
    // The audit sees what should be impossible.
    sqlx::query("update accounts set balance = balance + 1 where id = $1")
        .bind(wallet.usd.parse::<Uuid>().unwrap())
        .execute(&owner)
        .await
        .unwrap();
    let found: Vec<(String,)> = sqlx::query_as("select problem from audit_ledger_v1('live')")
        .fetch_all(&owner)
        .await
        .unwrap();
    assert_eq!(found, [("balance is not the sum of the entries".to_owned(),)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_lane_meets_nobody_and_can_be_erased() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let real = exchange.wallet("1", "0").await;
    real.place("sell", "1", "100").await;
    let lane = "test-blue-local.1";
    let token = exchange
        .issuer
        .token(Uuid::now_v7(), lane.parse().unwrap(), &["treasury"])
        .await;
    let tester = Trader::new(&exchange.service, token);
    let tester = tester.wallet(&tester, "0", "1000").await;
    let order = tester.place("buy", "1", "100").await;
    assert_eq!(order["status"], "open", "a synthetic order has met a real one");
    let foreign = json!({"account_id": real.usd, "amount": "1"});
    let foreign = tester
        .trader
        .post_with_key("/account/deposit", "k", &foreign)
        .await;
    assert_eq!(
        accept(foreign, StatusCode::NOT_FOUND).await["code"],
        "account_not_found"
    );
    assert_clean(&owner, lane).await;

    sqlx::query("select erase_lane_v1($1)")
        .bind(lane)
        .execute(&sqlx::PgPool::connect(&exchange.database.app_url).await.unwrap())
        .await
        .unwrap();
    assert_erased(&owner, lane).await;
    assert_eq!(real.balances().await, ["1", "1", "0", "0"]);
    assert_clean(&owner, "live").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_is_erased_with_what_is_being_booked_in_it() {
    let exchange = Exchange::start().await;
    let owner = exchange.database.owner().await;
    let lane = "test-blue-local.booked";
    let token = exchange
        .issuer
        .token(Uuid::now_v7(), lane.parse().unwrap(), &["treasury"])
        .await;
    let tester = Trader::new(&exchange.service, token);
    let account: Uuid = tester.account("USD").await.parse().unwrap();
    let mut booking = owner.begin().await.unwrap();
    let outcome: String =
        sqlx::query_scalar("select outcome from move_external_v1($1, 'deposit', $2, null, 1, 'rent', null)")
            .bind(lane)
            .bind(account)
            .fetch_one(&mut *booking)
            .await
            .unwrap();
    assert_eq!(outcome, "posted");
    let erasing = begin_to_erase(&owner, lane).await;
    booking.commit().await.unwrap();
    erasing.await.unwrap();
    assert_erased(&owner, lane).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_service_audits_the_ledger_and_forgets_old_keys() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    // A balance out of nothing, and keys that nobody will repeat: more than are removed at a time.
    sqlx::raw_sql(
        "insert into accounts (id, lane, user_id, currency, name, balance)
         values (gen_random_uuid(), 'live', gen_random_uuid(), 'USD', 'main', 5);
         insert into idempotency_keys (user_id, key, lane, request_hash, created_at)
         values (gen_random_uuid(), 'new', 'live', '', now() - interval '29 days');
         insert into idempotency_keys (user_id, key, lane, request_hash, created_at)
         select gen_random_uuid(), 'old', 'live', '', now() - interval '31 days' from generate_series(1, 12000);
         create function few() returns trigger language plpgsql as
         'begin if (select count(*) > 5000 from gone) then raise exception ''too many at a time''; end if; return null; end';
         create trigger few after delete on idempotency_keys
             referencing old table as gone for each statement execute function few()",
    )
    .execute(&owner)
    .await
    .unwrap();
    let service = Service::live("trade", &database, &[]).ready().await;
    eventually("the audit has found it", || async {
        let response = service
            .client
            .get(service.admin_url("/metrics"))
            .send()
            .await
            .ok()?;
        response
            .text()
            .await
            .ok()?
            .contains("ledger_imbalance 1")
            .then_some(())
    })
    .await;
    eventually("the old keys are forgotten", || async {
        let keys: Vec<(String,)> =
            sqlx::query_as("select key from idempotency_keys where key in ('old', 'new')")
                .fetch_all(&owner)
                .await
                .ok()?;
        (keys == [("new".to_owned(),)]).then_some(())
    })
    .await;
}

/// Orders are settled together, and what goes wrong with them is found by the trace of each.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_in_a_batch_is_told_in_the_trace_of_each_order() {
    let exchange = Exchange::start().await;
    let wallet = exchange.wallet("0", "1000").await;
    sqlx::raw_sql(
        "create function fail() returns trigger language plpgsql as 'begin raise exception ''as the test wants''; end';
         create trigger fail before insert on orders for each row execute function fail()",
    )
    .execute(&exchange.database.owner().await)
    .await
    .unwrap();
    let traces = [
        "0af7651916cd43dd8448eb211c80319c",
        "1bf7651916cd43dd8448eb211c80319c",
        "2cf7651916cd43dd8448eb211c80319c",
    ];
    let placed = traces.map(|trace| {
        let request = exchange.service.client.post(exchange.service.url("/trade/add"));
        request
            .bearer_auth(wallet.trader.token())
            .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
            .json(&wallet.order("buy", "1", "100"))
            .send()
    });
    for answer in futures::future::try_join_all(placed).await.unwrap() {
        assert_eq!(answer.status(), 500);
    }
    let log = exchange.service.logged("a request failed", traces.len()).await;
    let told = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["message"] == "a request failed");
    let told: BTreeSet<String> = told
        .map(|line| line["trace.id"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(told, BTreeSet::from(traces.map(str::to_owned)), "{log}");
}
