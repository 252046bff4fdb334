//! The user service, as its clients see it.

use std::time::Instant;

use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use sqlx::Transaction;
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres, Service, eventually, waits_for_lock},
    stores::Stores,
    traders::{Issuer, Trader, Wallet, accept, assert_clean},
};

/// Of all users here.
pub(crate) const PASSWORD: &str = "correct horse battery";
const LANE_SECRET: &str = "0123456789abcdef0123";

/// A user service and its database.
pub(crate) struct Exchange {
    /// The database.
    pub(crate) database: Database,
    /// The service.
    pub(crate) service: Service,
}

impl Exchange {
    /// A service with a database of its own.
    pub(crate) async fn start(flags: &[&str]) -> Self {
        Self::over(Database::migrated(Postgres::shared()).await, flags).await
    }

    /// A further service on the same database.
    pub(crate) async fn over(database: Database, flags: &[&str]) -> Self {
        let flags = [&["--lane-secret", LANE_SECRET], flags].concat();
        let service = Service::live("user", &database, &flags).ready().await;
        Self { database, service }
    }

    /// Makes any request.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<Value>,
    ) -> Response {
        let mut request = self.service.client.request(method, self.service.url(path));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        request.send().await.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> Response {
        self.call(Method::POST, path, None, Some(body)).await
    }

    /// Registers a user in the live lane.
    pub(crate) async fn register(&self, email: &str) {
        let response = self
            .post("/register", json!({"email": email, "password": PASSWORD}))
            .await;
        assert_eq!(response.status(), 202);
    }

    /// Logs a user in.
    pub(crate) async fn log_in(&self, email: &str) -> Tokens {
        let response = self
            .post("/login", json!({"email": email, "password": PASSWORD}))
            .await;
        Tokens::from(response).await
    }

    /// Registers a user and logs it in.
    pub(crate) async fn user(&self, email: &str) -> Tokens {
        self.register(email).await;
        self.log_in(email).await
    }
}

/// What a log-in gives.
#[derive(serde::Deserialize)]
pub(crate) struct Tokens {
    /// Who it is.
    pub(crate) user_id: String,
    /// For requests.
    pub(crate) access_token: String,
    /// For the next ones.
    pub(crate) refresh_token: String,
}

impl Tokens {
    async fn from(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        response.json().await.unwrap()
    }
}

async fn problem(response: Response, status: u16, code: &str) {
    let answered = response.status();
    assert!(response.headers().contains_key("x-exchange-stack"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        (answered.as_u16(), body["code"].as_str()),
        (status, Some(code)),
        "{body}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_registers_logs_in_and_manages_the_profile() {
    let exchange = Exchange::start(&[]).await;
    let tokens = exchange.user("Ada@Example.org").await;
    let token = Some(tokens.access_token.as_str());

    let profile: Value = exchange
        .call(Method::GET, "/profile", token, None)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(profile["email"], "ada@example.org");
    assert_eq!(profile["display_name"], Value::Null);
    let update = json!({"display_name": "Ada", "locale": "en-GB"});
    let profile: Value = exchange
        .call(Method::PATCH, "/profile", token, Some(update))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&profile["display_name"], &profile["locale"]),
        (&json!("Ada"), &json!("en-GB"))
    );
    let profile: Value = exchange
        .call(
            Method::PATCH,
            "/profile",
            token,
            Some(json!({"display_name": ""})),
        )
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&profile["display_name"], &profile["locale"]),
        (&Value::Null, &json!("en-GB"))
    );

    assert_eq!(
        exchange.call(Method::POST, "/logout", token, None).await.status(),
        204
    );
    problem(
        exchange.call(Method::GET, "/profile", token, None).await,
        401,
        "unauthenticated",
    )
    .await;
    let body = json!({"refresh_token": tokens.refresh_token});
    problem(
        exchange.post("/token/refresh", body).await,
        401,
        "invalid_refresh_token",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_learns_whether_an_address_is_registered() {
    // Of its own, for its transactions are counted.
    let postgres = Postgres::start(&["-c", "fsync=off", "-c", "autovacuum=off"]);
    let database = Database::migrated(&postgres).await;
    let owner = database.owner().await;
    let flags = [
        "--login-attempts-per-account=1000",
        "--login-attempts-per-address=1000",
    ];
    let exchange = Exchange::over(database, &flags).await;
    exchange.user("known@example.org").await;

    let mut answers = Vec::new();
    for email in ["known@example.org", "new@example.org"] {
        let response = exchange
            .post(
                "/register",
                json!({"email": email, "password": "something else 1"}),
            )
            .await;
        answers.push((response.status(), response.text().await.unwrap()));
    }
    assert_eq!(answers[0], answers[1]);
    // And it has changed nothing.
    exchange.log_in("known@example.org").await;

    let mut answers = Vec::new();
    for email in ["known@example.org", "unknown@example.org"] {
        let response = exchange
            .post("/login", json!({"email": email, "password": "wrong password"}))
            .await;
        answers.push((response.status(), response.text().await.unwrap()));
    }
    assert_eq!(answers[0], answers[1]);

    // A transaction that writes gets a number, and waits for the disk at its commit; one that only reads does neither.
    let written = async || -> i64 {
        sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text::int8")
            .fetch_one(&owner)
            .await
            .unwrap()
    };
    // By time: the medians are as close to each other as those of the same address would be. The disk, for which this server does
    // not wait, is asked as often. Most rounds are undisturbed by what the service writes about itself every few seconds.
    for path in ["/login", "/register"] {
        let mut times = [Vec::new(), Vec::new()];
        let mut writes = [i64::MAX; 2];
        for round in 0..60 {
            // Registering makes an address known, so each time another one is new.
            let unknown = format!("unknown{}{round}@example.org", path.len());
            let email = ["known@example.org", &unknown][round % 2];
            let body = json!({"email": email, "password": "wrong password"});
            let before = written().await;
            let start = Instant::now();
            exchange.post(path, body).await;
            times[round % 2].push(start.elapsed());
            writes[round % 2] = writes[round % 2].min(written().await - before);
        }
        assert!(
            writes[0] == writes[1] && writes[0] > 0,
            "{path}: transactions that write for a known and an unknown address: {writes:?}"
        );
        let [known, unknown] = times.map(|mut times| {
            times.sort();
            times[times.len() / 2].as_secs_f64()
        });
        assert!(
            (0.6..1.67).contains(&(known / unknown)),
            "{path}: known {known} s, unknown {unknown} s"
        );
        assert!(known > 0.005, "{path}: {known} s is no password hash");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_limited_per_account_and_counted_by_all_replicas() {
    let exchange = Exchange::start(&["--login-attempts-per-account=5"]).await;
    exchange.user("ada@example.org").await;
    exchange.register("bob@example.org").await;
    let flags = ["--login-attempts-per-account=5"];
    let replica = Service::live("user", &exchange.database, &flags).ready().await;
    let guess = json!({"email": "ada@example.org", "password": "wrong password"});
    // Twenty at once: no more than five reach the password.
    let guesses = (0..20).map(|number| {
        let service = if number % 2 == 0 {
            &exchange.service
        } else {
            &replica
        };
        service.client.post(service.url("/login")).json(&guess).send()
    });
    let answers = futures::future::try_join_all(guesses).await.unwrap();
    let tried = answers
        .iter()
        .filter(|answer| answer.status() == StatusCode::UNAUTHORIZED)
        .count();
    let refused = answers
        .iter()
        .filter(|answer| answer.status() == StatusCode::TOO_MANY_REQUESTS)
        .count();
    assert_eq!((tried, refused), (5, 15));
    let right = exchange
        .post(
            "/login",
            json!({"email": "ada@example.org", "password": PASSWORD}),
        )
        .await;
    assert!(
        right.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 600
    );
    problem(right, 429, "too_many_requests").await;
    // Unknown accounts are limited in the same way, others not at all.
    let unknown = json!({"email": "nobody@example.org", "password": PASSWORD});
    for _ in 0..5 {
        problem(
            exchange.post("/login", unknown.clone()).await,
            401,
            "wrong_credentials",
        )
        .await;
    }
    problem(exchange.post("/login", unknown).await, 429, "too_many_requests").await;
    exchange.log_in("bob@example.org").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_limited_per_address_behind_trusted_proxies_only() {
    let flags = [
        "--login-attempts-per-address=3",
        "--trusted-proxies=127.0.0.0/8,10.0.0.0/8",
    ];
    let exchange = Exchange::start(&flags).await;
    let guess = |number: usize, forwarded: &'static str| {
        let body = json!({"email": format!("user{number}@example.org"), "password": "wrong password"});
        let request = exchange
            .service
            .client
            .post(exchange.service.url("/login"))
            .json(&body);
        async move {
            request
                .header("x-forwarded-for", forwarded)
                .send()
                .await
                .unwrap()
                .status()
        }
    };
    for number in 0..3 {
        assert_eq!(guess(number, "203.0.113.7, 10.1.1.1").await, 401);
    }
    assert_eq!(guess(3, "203.0.113.7").await, 429);
    // What stands before the last untrusted address is the client's own invention.
    assert_eq!(guess(4, "198.51.100.1, 203.0.113.7").await, 429);
    assert_eq!(guess(5, "198.51.100.2, x, 203.0.113.7").await, 429);
    assert_eq!(guess(6, "198.51.100.3,, 203.0.113.7, 10.1.1.1").await, 429);
    assert_eq!(guess(7, "203.0.113.8").await, 401);
    // A proxy that passes garbage on answers for it.
    for number in 8..11 {
        assert_eq!(guess(number, "198.51.100.4, x").await, 401);
    }
    assert_eq!(guess(11, "198.51.100.5, x").await, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_works_once_and_its_reuse_ends_the_session() {
    let exchange = Exchange::start(&[]).await;
    let first = exchange.user("ada@example.org").await;
    let other = exchange.log_in("ada@example.org").await;
    let second = Tokens::from(
        exchange
            .post("/token/refresh", json!({"refresh_token": first.refresh_token}))
            .await,
    )
    .await;
    assert_ne!(first.refresh_token, second.refresh_token);
    assert_eq!(first.user_id, second.user_id);
    let reused = exchange
        .post("/token/refresh", json!({"refresh_token": first.refresh_token}))
        .await;
    problem(reused, 401, "invalid_refresh_token").await;
    let successor = exchange
        .post("/token/refresh", json!({"refresh_token": second.refresh_token}))
        .await;
    problem(successor, 401, "invalid_refresh_token").await;
    // Another session of the user is none of its business.
    Tokens::from(
        exchange
            .post("/token/refresh", json!({"refresh_token": other.refresh_token}))
            .await,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_could_not_be_answered_may_be_sent_again() {
    let exchange = Exchange::start(&[]).await;
    let tokens = exchange.user("ada@example.org").await;
    // It has no keys yet, and cannot read them.
    let newcomer = Exchange::over(exchange.database.clone(), &[]).await;
    let owner = exchange.database.owner().await;
    let mut keys = owner.begin().await.unwrap();
    sqlx::query("lock table signing_keys in access exclusive mode")
        .execute(&mut *keys)
        .await
        .unwrap();
    let refresh = json!({"refresh_token": tokens.refresh_token});
    let failed = newcomer.post("/token/refresh", refresh.clone()).await;
    assert!(failed.headers().contains_key("retry-after"));
    problem(failed, 503, "unavailable").await;
    keys.rollback().await.unwrap();
    let again = Tokens::from(newcomer.post("/token/refresh", refresh).await).await;
    let profile = newcomer.call(Method::GET, "/profile", Some(&again.access_token), None);
    assert_eq!(profile.await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_refreshes_at_once_one_wins() {
    let exchange = Exchange::start(&[]).await;
    let tokens = exchange.user("ada@example.org").await;
    let body = json!({"refresh_token": tokens.refresh_token});
    let attempts = (0..20).map(|_| exchange.post("/token/refresh", body.clone()));
    let answers = futures::future::join_all(attempts).await;
    let won = answers.iter().filter(|answer| answer.status() == 200).count();
    let lost = answers.iter().filter(|answer| answer.status() == 401).count();
    assert_eq!((won, lost), (1, 19));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_password_ends_the_other_sessions() {
    let exchange = Exchange::start(&[]).await;
    let here = exchange.user("ada@example.org").await;
    let there = exchange.log_in("ada@example.org").await;
    let token = Some(here.access_token.as_str());
    let change = |current: &str| json!({"current_password": current, "new_password": "a better password"});
    let wrong = exchange
        .call(Method::POST, "/password", token, Some(change("wrong password")))
        .await;
    problem(wrong, 401, "wrong_credentials").await;
    let right = exchange
        .call(Method::POST, "/password", token, Some(change(PASSWORD)))
        .await;
    assert_eq!(right.status(), 204);
    problem(
        exchange
            .post("/token/refresh", json!({"refresh_token": there.refresh_token}))
            .await,
        401,
        "invalid_refresh_token",
    )
    .await;
    assert_eq!(
        exchange.call(Method::GET, "/profile", token, None).await.status(),
        200
    );
    let old = exchange
        .post(
            "/login",
            json!({"email": "ada@example.org", "password": PASSWORD}),
        )
        .await;
    problem(old, 401, "wrong_credentials").await;
    let new = exchange
        .post(
            "/login",
            json!({"email": "ada@example.org", "password": "a better password"}),
        )
        .await;
    assert_eq!(new.status(), 200);
}

/// Hashing takes its time, and in that time the password may be changed, or the user be deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_that_was_under_way_does_not_outlive_its_password() {
    let exchange = Exchange::start(&[]).await;
    let owner = exchange.database.owner().await;
    let exchange = &exchange;
    let sessions = async || -> i64 {
        sqlx::query_scalar("select count(*) from sessions")
            .fetch_one(&owner)
            .await
            .unwrap()
    };
    let before = sessions().await;
    for (email, change) in [
        ("ada@example.org", "update users set password_hash = 'another'"),
        (
            "bob@example.org",
            "update users set email = null, password_hash = null, deleted_at = now()",
        ),
    ] {
        exchange.register(email).await;
        let mut changing = owner.begin().await.unwrap();
        sqlx::query("lock table sessions in share mode")
            .execute(&mut *changing)
            .await
            .unwrap();
        let body = json!({"email": email, "password": PASSWORD});
        let changed = async {
            eventually("the password has been found right", || async {
                let waits = waits_for_lock(&owner, "insert into sessions%").await.unwrap();
                waits.then_some(())
            })
            .await;
            let change = format!("{change} where email = '{email}'");
            sqlx::raw_sql(sqlx::AssertSqlSafe(change))
                .execute(&mut *changing)
                .await
                .unwrap();
            changing.commit().await.unwrap();
        };
        let (answer, ()) = tokio::join!(exchange.post("/login", body), changed);
        problem(answer, 401, "wrong_credentials").await;
    }
    assert_eq!(sessions().await, before);
}

/// All services, and a user who has put a word that nobody else uses wherever there is room for words.
struct Farewell {
    stores: Stores,
    users: Exchange,
    trade: Service,
    _notification: Service,
    treasury: Trader,
    ada: Tokens,
    wallet: Wallet,
}

const WORD: &str = "zebra";

/// What the user and another have done with each other.
struct Traded {
    bob: Tokens,
    resting: Value,
    arriving: Value,
    theirs: Value,
}

impl Farewell {
    async fn prepare() -> Self {
        let stores = Stores::start().await;
        let users = Exchange::over(stores.database.clone(), &[]).await;
        let trade = Service::live("trade", &stores.database, &[]).ready().await;
        let notification = stores.notification(&["--role", "live"]).ready().await;
        let treasury = Issuer::new(&stores.database)
            .await
            .caller(&trade, &["treasury"])
            .await;
        let ada = users.user("zebra@example.org").await;
        let words = json!({"display_name": "zebra profile"});
        let profile = users
            .call(Method::PATCH, "/profile", Some(&ada.access_token), Some(words))
            .await;
        assert_eq!(profile.status(), 200);
        let trader = Trader::new(&trade, ada.access_token.clone());
        let mut accounts = Vec::new();
        for currency in ["BTC", "USD"] {
            let account = json!({"currency": currency, "name": format!("zebra {currency}")});
            let added = accept(trader.post("/account/add", &account).await, StatusCode::CREATED).await;
            accounts.push(added["account_id"].as_str().unwrap().to_owned());
        }
        let [btc, usd] = accounts.try_into().unwrap();
        let wallet = Wallet { trader, btc, usd };
        let deposit = json!({"account_id": wallet.usd, "amount": "1000", "reference": "zebra deposit"});
        let deposited = treasury.post_with_key("/account/deposit", "one", &deposit).await;
        accept(deposited, StatusCode::CREATED).await;
        Self {
            stores,
            users,
            trade,
            _notification: notification,
            treasury,
            ada,
            wallet,
        }
    }

    /// Has the user trade with another in both roles, and something be put aside.
    async fn trade(&self) -> Traded {
        let bob = self.users.user("bob@example.org").await;
        let other = Trader::new(&self.trade, bob.access_token.clone());
        let other = other.wallet(&self.treasury, "2", "1000").await;
        let named = |side: &str, price: &str, name: &str| {
            let mut order = self.wallet.order(side, "1", price);
            order["client_order_id"] = json!(name);
            order
        };
        let place = async |order: &Value| {
            accept(
                self.wallet.trader.post("/trade/add", order).await,
                StatusCode::CREATED,
            )
            .await
        };
        let resting = place(&named("buy", "100", "zebra-maker")).await;
        let theirs = other.place("sell", "1", "100").await;
        other.place("sell", "1", "110").await;
        let arriving = place(&named("buy", "110", "zebra-taker")).await;
        assert_eq!(arriving["status"], "filled");
        // A name that is another order's id.
        let mut twin = named("buy", "1", "zebra-twin");
        twin["client_order_id"] = resting["order_id"].clone();
        let order = json!({"order_id": place(&twin).await["order_id"]});
        accept(
            self.wallet.trader.post("/trade/cancel", &order).await,
            StatusCode::OK,
        )
        .await;
        // What could not be handled is kept, too.
        sqlx::query(
            "insert into dead_letters (consumer, event_id, lane, topic, payload, reason)
             select 'notification', gen_random_uuid(), 'live', 'account.changed',
                    jsonb_build_object('user_id', id, 'name', 'zebra letter'), 'for a test'
             from users where email = 'zebra@example.org'",
        )
        .execute(&self.stores.owner)
        .await
        .unwrap();
        self.stores.settled("live").await;
        Traded {
            bob,
            resting,
            arriving,
            theirs,
        }
    }

    async fn export(&self, token: &str) -> (Value, String) {
        let exported = self
            .users
            .call(Method::GET, "/user/export", Some(token), None)
            .await;
        assert_eq!(exported.status(), 200);
        let text = exported.text().await.unwrap();
        (serde_json::from_str(&text).unwrap(), text)
    }

    async fn delete(&self) -> Response {
        let token = Some(self.ada.access_token.as_str());
        self.users.call(Method::DELETE, "/user", token, None).await
    }

    /// The user, who has taken everything out.
    async fn empty(&self) -> Uuid {
        let all = json!({"account_id": self.wallet.usd, "amount": "1000"});
        let withdrawn = self.wallet.trader.post_with_key("/account/withdraw", "all", &all);
        accept(withdrawn.await, StatusCode::CREATED).await;
        self.stores.settled("live").await;
        self.ada.user_id.parse().unwrap()
    }

    /// A transaction that has locked all rows of a user in a table, where it is this column.
    async fn lock(&self, table: &str, column: &str, user: Uuid) -> Transaction<'static, sqlx::Postgres> {
        let mut locking = self.stores.owner.begin().await.unwrap();
        let rows = format!("select from {table} where {column} = $1 for update");
        let locked = sqlx::query(sqlx::AssertSqlSafe(rows)).bind(user);
        assert!(locked.execute(&mut *locking).await.unwrap().rows_affected() > 0);
        locking
    }

    /// Erases the user in a transaction that is still open.
    async fn begin_to_delete(&self) -> (Uuid, Transaction<'static, sqlx::Postgres>) {
        let owner = &self.stores.owner;
        // As the deletion does it.
        let id = self.empty().await;
        let mut deleting = self.lock("users", "id", id).await;
        let erase: Vec<String> = sqlx::query_scalar(
            "select erase from user_data where erase is not null order by position, topic",
        )
        .fetch_all(owner)
        .await
        .unwrap();
        for sql in erase {
            sqlx::query(sqlx::AssertSqlSafe(sql))
                .bind(id)
                .execute(&mut *deleting)
                .await
                .unwrap();
        }
        (id, deleting)
    }

    /// Waits until what the message `late` writes to this table waits for the deletion, or is over.
    async fn meets_the_deletion(&self, table: &str) {
        eventually("it is being written, or has been", || async {
            let owner = &self.stores.owner;
            let waits = waits_for_lock(owner, &format!("%insert into {table}%"))
                .await
                .unwrap();
            let is_over: bool = sqlx::query_scalar(
                "select exists (select from inbox join outbox on id = event_id where key = 'late')",
            )
            .fetch_one(owner)
            .await
            .unwrap();
            (waits || is_over).then_some(())
        })
        .await;
    }

    /// Everything of the ledger that has to stay as it is.
    async fn ledger(&self) -> Vec<String> {
        sqlx::query_scalar(
            "select 'entry ' || entries::text from entries
             union all select 'trade ' || trades::text from trades
             union all select 'transfer ' || transfers::text from transfers
             union all select id || ' ' || balance || ' ' || hold from accounts order by 1",
        )
        .fetch_all(&self.stores.owner)
        .await
        .unwrap()
    }

    /// The tables in which the word stands somewhere.
    async fn tables_with_the_word(&self) -> Vec<String> {
        let owner = &self.stores.owner;
        let tables: Vec<String> = sqlx::query_scalar(
            "select table_name::text from information_schema.tables
             where table_schema = 'public' and table_type = 'BASE TABLE' order by 1",
        )
        .fetch_all(owner)
        .await
        .unwrap();
        let mut found = Vec::new();
        for table in tables {
            let sql = format!("select exists (select from {table} as line where line::text like '%{WORD}%')");
            let stands: bool = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .fetch_one(owner)
                .await
                .unwrap();
            if stands {
                found.push(table);
            }
        }
        found
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_can_take_the_data_along() {
    let farewell = Farewell::prepare().await;
    let deeds = farewell.trade().await;
    let (export, text) = farewell.export(&farewell.ada.access_token).await;
    assert_eq!(export["profile"][0]["email"], "zebra@example.org");
    assert_eq!(export["sessions"].as_array().unwrap().len(), 1);
    let trades = export["trades"].as_array().unwrap();
    let facts = |trade: &Value| ["role", "type", "fee"].map(|fact| trade[fact].as_str().unwrap().to_owned());
    assert_eq!(trades.len(), 2, "{text}");
    assert_eq!(facts(&trades[0]), ["maker", "buy", "0.1"]);
    assert_eq!(facts(&trades[1]), ["taker", "buy", "0.22"]);
    assert_eq!(
        [&trades[0]["order_id"], &trades[1]["order_id"]],
        [&deeds.resting["order_id"], &deeds.arriving["order_id"]]
    );
    for topic in [
        "accounts",
        "orders",
        "entries",
        "notifications",
        "events",
        "dead letters",
    ] {
        assert!(
            export[topic].as_array().is_some_and(|rows| !rows.is_empty()),
            "{topic}: {text}"
        );
    }
    for word in [
        "zebra BTC",
        "zebra deposit",
        "zebra-maker",
        "zebra profile",
        "zebra letter",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    for foreign in [
        "bob@example.org",
        "argon2",
        &deeds.bob.user_id,
        &text_of(&deeds.theirs["order_id"]),
    ] {
        assert!(!text.contains(foreign), "{foreign} is in {text}");
    }
}

/// What somebody has sent for tracing may say anything. Both sides of a trade, and whoever deposits and whose account it is, have
/// an event in common, and one request.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_for_tracing_is_exported_to_whoever_has_sent_it() {
    let farewell = Farewell::prepare().await;
    let bob = farewell.users.user("bob@example.org").await;
    let theirs = Trader::new(&farewell.trade, bob.access_token.clone());
    let theirs = theirs.wallet(&farewell.treasury, "2", "1000").await;
    let ours = &farewell.wallet;
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let send = async |trader: &Trader, state: &str, path: &str, body: Value| {
        let key = body["client_order_id"].as_str();
        let key = key.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned);
        let request = farewell.trade.client.post(farewell.trade.url(path));
        let request = request
            .bearer_auth(trader.token())
            .header("idempotency-key", key)
            .header("traceparent", parent)
            .header("tracestate", state);
        let answer = request.json(&body).send().await.unwrap();
        accept(answer, StatusCode::CREATED).await
    };
    let take = async |wallet: &Wallet, state: &str, side: &str, size: &str, price: &str| {
        let order = wallet.order(side, size, price);
        let taken = send(&wallet.trader, state, "/trade/add", order).await;
        assert_eq!(taken["status"], "filled", "{taken}");
    };
    theirs.place("sell", "1", "100").await;
    take(ours, "ada=buys", "buy", "1", "100").await;
    ours.place("sell", "0.5", "100").await;
    take(&theirs, "bob=buys", "buy", "0.5", "100").await;
    theirs.place("buy", "0.5", "90").await;
    take(ours, "ada=sells", "sell", "0.5", "90").await;
    ours.place("buy", "0.5", "90").await;
    take(&theirs, "bob=sells", "sell", "0.5", "90").await;
    let account = json!({"currency": "USD", "name": "second"});
    send(&ours.trader, "ada=adds", "/account/add", account).await;
    let dollar = json!({"account_id": ours.usd, "amount": "1"});
    send(&ours.trader, "ada=withdraws", "/account/withdraw", dollar.clone()).await;
    send(&farewell.treasury, "bank=deposits", "/account/deposit", dollar).await;

    for (token, expected) in [
        (
            &farewell.ada.access_token,
            &["ada=adds", "ada=buys", "ada=sells", "ada=withdraws"][..],
        ),
        (&bob.access_token, &["bob=buys", "bob=sells"][..]),
    ] {
        let (export, text) = farewell.export(token).await;
        let events = ["events", "trade events"]
            .into_iter()
            .flat_map(|topic| export[topic].as_array().unwrap());
        let mut states: Vec<&str> = events
            .filter_map(|event| event["headers"]["tracestate"].as_str())
            .collect();
        states.sort_unstable();
        assert_eq!(states, expected);
        assert_eq!(text.matches("tracestate").count(), expected.len(), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_export_is_read_in_small_parts_and_never_looks_complete_when_it_is_not() {
    const MANY: usize = 150_000;
    let exchange = Exchange::start(&["--export-patience=15s"]).await;
    let ada = exchange.user("ada@example.org").await;
    let bob = exchange.user("bob@example.org").await;
    let owner = exchange.database.owner().await;
    sqlx::query(
        "insert into notifications (user_id, seq, lane, kind, title, data)
         select $1, seq, 'live', 'account', repeat('x', 150), jsonb_build_object('name', repeat('y', 100))
         from generate_series(1, $2) as seq",
    )
    .bind(ada.user_id.parse::<Uuid>().unwrap())
    .bind(i32::try_from(MANY).unwrap())
    .execute(&owner)
    .await
    .unwrap();
    let export = || exchange.call(Method::GET, "/user/export", Some(&ada.access_token), None);
    let before = exchange.service.most_memory_mib();

    // One at a time of each user, and a few at a time: whoever must wait knows for how long.
    let slow = export().await;
    assert_eq!(slow.status(), 200);
    let refused = export().await;
    assert_eq!(refused.headers()["retry-after"], "5");
    problem(refused, 429, "too_many_requests").await;
    let of_bob = exchange.call(Method::GET, "/user/export", Some(&bob.access_token), None);
    assert_eq!(of_bob.await.bytes().await.unwrap()[0], b'{');
    // Somebody who does not read is not waited for: connection, snapshot and turn are free again.
    let under_way = || async {
        let under_way: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and state <> 'idle' and query like 'fetch%'",
        )
        .fetch_one(&owner)
        .await
        .unwrap();
        under_way
    };
    eventually("it waits for its reader", || async {
        (under_way().await == 1).then_some(())
    })
    .await;
    eventually("it is broken off", || async {
        (under_way().await == 0).then_some(())
    })
    .await;
    slow.bytes().await.unwrap_err();

    let (length, rows) = {
        let whole = export().await.bytes().await.unwrap();
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        let rows = whole["notifications"].as_array().unwrap();
        assert_eq!(rows[MANY - 1]["id"], MANY);
        (whole.to_string().len(), rows.len())
    };
    assert_eq!(rows, MANY);
    let grown = exchange.service.most_memory_mib() - before;
    assert!(
        grown < 32 && length > 48 << 20,
        "{length} bytes took {grown} MiB more"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_can_leave_and_nothing_that_identifies_stays() {
    let farewell = Farewell::prepare().await;
    let bob = farewell.trade().await.bob;
    let (stores, users, wallet) = (&farewell.stores, &farewell.users, &farewell.wallet);
    let owner = &stores.owner;
    // There is something left.
    problem(farewell.delete().await, 409, "accounts_not_empty").await;
    let balances = wallet.balances().await;
    for (account, amount) in [(&wallet.btc, &balances[0]), (&wallet.usd, &balances[2])] {
        let all = json!({"account_id": account, "amount": amount, "reference": "zebra withdrawal"});
        let key = format!("zebra-{amount}");
        let withdrawn = wallet.trader.post_with_key("/account/withdraw", &key, &all).await;
        accept(withdrawn, StatusCode::CREATED).await;
    }
    stores.settled("live").await;
    let with_words = farewell.tables_with_the_word().await;
    assert_eq!(
        with_words,
        [
            "accounts",
            "dead_letters",
            "idempotency_keys",
            "notifications",
            "orders",
            "transfer_references",
            "users"
        ]
    );
    let ledger = farewell.ledger().await;
    assert_eq!(farewell.delete().await.status(), 204);
    assert_eq!(farewell.tables_with_the_word().await, [""; 0]);
    assert_eq!(farewell.ledger().await, ledger);
    assert_clean(owner, "live").await;

    // What is told about the user afterwards reaches nobody.
    let id = farewell.ada.user_id.clone();
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload)
         values (uuid_v7(), 'live', 'user.signed_in', $1, jsonb_build_object('user_id', $1))",
    )
    .bind(&id)
    .execute(owner)
    .await
    .unwrap();
    stores.settled("live").await;
    let told: Vec<(bool, i64)> = sqlx::query_as(
        "select user_id::text = $1, count(*) from notifications where user_id::text in ($1, $2) group by 1",
    )
    .bind(&id)
    .bind(&bob.user_id)
    .fetch_all(owner)
    .await
    .unwrap();
    assert!(told.len() == 1 && !told[0].0 && told[0].1 >= 4, "{told:?}");

    let token = Some(farewell.ada.access_token.as_str());
    problem(
        users.call(Method::GET, "/profile", token, None).await,
        401,
        "unauthenticated",
    )
    .await;
    let login = users
        .post(
            "/login",
            json!({"email": "zebra@example.org", "password": PASSWORD}),
        )
        .await;
    problem(login, 401, "wrong_credentials").await;
    let left: Vec<(Option<String>, Option<String>, Option<String>)> =
        sqlx::query_as("select email, display_name, password_hash from users where deleted_at is not null")
            .fetch_all(owner)
            .await
            .unwrap();
    assert_eq!(left, [(None, None, None)]);
    // Other services take the token until it expires, but nothing new begins with it.
    let account = json!({"currency": "USD", "name": "main"});
    problem(
        wallet.trader.post("/account/add", &account).await,
        401,
        "unauthenticated",
    )
    .await;
    // Bob has everything that was his, and the address is free again.
    let (export, _) = farewell.export(&bob.access_token).await;
    assert_eq!(export["trades"].as_array().unwrap().len(), 2);
    users.user("zebra@example.org").await;
}

/// What counts against a user goes as well. What counts against an address is nobody's in particular, and stays its quarter of
/// an hour.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_leaves_is_not_counted_any_more() {
    let exchange = Exchange::start(&[]).await;
    let ada = exchange.user("Ada@example.org").await;
    let token = Some(ada.access_token.as_str());
    let guess = json!({"email": "ada@example.org", "password": "wrong password"});
    problem(exchange.post("/login", guess).await, 401, "wrong_credentials").await;
    let change = json!({"current_password": "wrong password", "new_password": PASSWORD});
    let refused = exchange
        .call(Method::POST, "/password", token, Some(change))
        .await;
    problem(refused, 401, "wrong_credentials").await;
    let exported = exchange.call(Method::GET, "/user/export", token, None).await;
    assert_eq!(exported.status(), 200);
    let owner = exchange.database.owner().await;
    let by_address = ["register:127.0.0.1", "login-from:127.0.0.1"].map(str::to_owned);
    let mail = "live:ada@example.org";
    let by_user = [
        format!("login-to:{mail}"),
        format!("logged-in-to:{mail}"),
        format!("password:{}", ada.user_id),
        format!("export:{}", ada.user_id),
    ];
    let rows_of = async |limits: &[String]| -> i64 {
        sqlx::query_scalar(
            "select count(*) from rate_limits where key in (
                 select sha256(convert_to(prefix || name, 'UTF8'))
                 from unnest($1::text[]) as name, unnest(array['', 'counted ']) as prefix)",
        )
        .bind(limits)
        .fetch_one(&owner)
        .await
        .unwrap()
    };
    let counted = async || (rows_of(&by_address).await, rows_of(&by_user).await);
    // Two of each: those that count, and those together with those under way.
    assert_eq!(counted().await, (4, 8));
    assert_eq!(
        exchange.call(Method::DELETE, "/user", token, None).await.status(),
        204
    );
    assert_eq!(counted().await, (4, 0));
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_much_of_is_erased_in_portions_before_the_user_is() {
    let farewell = Farewell::prepare().await;
    let owner = &farewell.stores.owner;
    let id = farewell.empty().await;
    let in_the_way = farewell.lock("sessions", "user_id", id).await;
    sqlx::query(
        "insert into orders (id, lane, user_id, client_order_id, product, side, price, size, time_in_force,
             base_account_id, quote_account_id, maker_fee_rate, taken, taken_trades, remaining, status, rank, created_at,
             closed_at)
         select gen_random_uuid(), 'live', $1, 'zebra ' || n, 'BTC-USD', 'buy', 1, 1, 'gtc', $2::uuid, $3::uuid, 0, 0, '{}',
             1, 'cancelled', -1, now(), now()
         from generate_series(1, 12000) n",
    )
    .bind(id)
    .bind(&farewell.wallet.btc)
    .bind(&farewell.wallet.usd)
    .execute(owner)
    .await
    .unwrap();
    // The deletion itself cannot be done yet, and its client does not wait.
    let erased = eventually("the orders' names are gone", || async {
        let named: i64 = sqlx::query_scalar(
            "select count(*) from orders where user_id = $1 and client_order_id like 'zebra%'",
        )
        .bind(id)
        .fetch_one(owner)
        .await
        .unwrap();
        (named == 0).then_some(())
    });
    tokio::select! {
        answer = farewell.delete() => panic!("answered with {}", answer.status()),
        () = erased => {}
    }
    in_the_way.rollback().await.unwrap();
    let gone = "select deleted_at is not null from users where id = $1";
    let gone: bool = sqlx::query_scalar(gone).bind(id).fetch_one(owner).await.unwrap();
    assert!(!gone);
    // What has been written in portions is not written again while everything is locked.
    let written = async || -> String {
        let rows = "select md5(string_agg(id::text || xmin, ',' order by id)) from orders where user_id = $1";
        sqlx::query_scalar(rows).bind(id).fetch_one(owner).await.unwrap()
    };
    let before = written().await;
    assert_eq!(farewell.delete().await.status(), 204);
    assert_eq!(written().await, before);
}

/// Money that comes when much is gone already would have to keep the user, without what is gone.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_comes_to_a_user_whose_deletion_has_begun() {
    let farewell = Farewell::prepare().await;
    let owner = &farewell.stores.owner;
    let id = farewell.empty().await;
    let in_the_way = farewell.lock("notifications", "user_id", id).await;
    let late = async {
        eventually("a portion waits", || async {
            let waits = waits_for_lock(owner, "%notifications%").await.unwrap();
            waits.then_some(())
        })
        .await;
        let deposit = json!({"account_id": farewell.wallet.usd, "amount": "1"});
        let deposited = farewell
            .treasury
            .post_with_key("/account/deposit", "late", &deposit);
        accept(deposited.await, StatusCode::NOT_FOUND).await;
        in_the_way.rollback().await.unwrap();
    };
    let (gone, ()) = tokio::join!(farewell.delete(), late);
    assert_eq!(gone.status(), 204);
}

/// A notification that is being written when its user is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_to_a_user_who_is_being_deleted() {
    let farewell = Farewell::prepare().await;
    let owner = &farewell.stores.owner;
    let (id, deleting) = farewell.begin_to_delete().await;
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload)
         values (uuid_v7(), 'live', 'user.signed_in', 'late', jsonb_build_object('user_id', $1))",
    )
    .bind(id)
    .execute(owner)
    .await
    .unwrap();
    farewell.meets_the_deletion("notification_counters").await;
    deleting.commit().await.unwrap();
    farewell.stores.settled("live").await;
    let told: i64 = sqlx::query_scalar("select count(*) from notifications where user_id = $1")
        .bind(id)
        .fetch_one(owner)
        .await
        .unwrap();
    assert_eq!(told, 0);
}

/// A message that nobody can handle, put aside when its user is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_put_aside_about_a_user_who_is_being_deleted() {
    let farewell = Farewell::prepare().await;
    let owner = &farewell.stores.owner;
    let (id, deleting) = farewell.begin_to_delete().await;
    sqlx::query(
        "insert into outbox (id, lane, topic, key, payload)
         values (uuid_v7(), 'live', 'transfer.posted', 'late', jsonb_build_object('user_id', $1, 'kind', 'zebra gift'))",
    )
    .bind(id)
    .execute(owner)
    .await
    .unwrap();
    farewell.meets_the_deletion("dead_letters").await;
    deleting.commit().await.unwrap();
    farewell.stores.settled("live").await;
    // The event itself is not the user's by its key, and gone within the hour.
    assert_eq!(farewell.tables_with_the_word().await, ["outbox"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_holder_of_the_secret_opens_a_test_lane_and_erases_it() {
    let exchange = Exchange::start(&["--colour", "green", "--revision", "abc"]).await;
    let request = |method: Method, path: &str, lane: &str, secret: &str, body: Option<Value>| {
        let request = exchange
            .service
            .client
            .request(method, exchange.service.url(path));
        let request = request
            .header("x-exchange-lane", lane)
            .header("x-exchange-lane-secret", secret);
        body.into_iter()
            .fold(request, |request, body| request.json(&body))
            .send()
    };
    let body = || Some(json!({"email": "ada@example.org", "password": PASSWORD}));
    for (lane, secret) in [
        ("test-green-abc.1", "a wrong secret 1234567"),
        ("test-green-abc.1", ""),
        ("test-blue-abc.1", LANE_SECRET),
        ("test-green-abcd.1", LANE_SECRET),
    ] {
        let refused = request(Method::POST, "/register", lane, secret, body())
            .await
            .unwrap();
        problem(refused, 403, "lane_refused").await;
        let refused = request(Method::DELETE, "/lane", lane, secret, None)
            .await
            .unwrap();
        problem(refused, 403, "lane_refused").await;
    }
    let refused = request(Method::DELETE, "/lane", "live", LANE_SECRET, None)
        .await
        .unwrap();
    problem(refused, 403, "lane_refused").await;

    // The same address lives in both lanes, as two users.
    exchange.register("ada@example.org").await;
    let registered = request(Method::POST, "/register", "test-green-abc.1", LANE_SECRET, body())
        .await
        .unwrap();
    assert_eq!(registered.status(), 202);
    let live = exchange.log_in("ada@example.org").await;
    let test = Tokens::from(
        request(Method::POST, "/login", "test-green-abc.1", "", body())
            .await
            .unwrap(),
    )
    .await;
    assert_ne!(live.user_id, test.user_id);

    let erased = request(Method::DELETE, "/lane", "test-green-abc.1", LANE_SECRET, None)
        .await
        .unwrap();
    assert_eq!(erased.status(), 204);
    let gone = request(Method::POST, "/login", "test-green-abc.1", "", body())
        .await
        .unwrap();
    problem(gone, 401, "wrong_credentials").await;
    exchange.log_in("ada@example.org").await;
    let metrics = exchange.service.admin("/metrics").await.text().await.unwrap();
    let counted = r#"http_server_requests_total{method="POST",route="/login",lane="test",status="200"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_input_is_refused_with_the_field_at_fault() {
    let exchange = Exchange::start(&[]).await;
    let register = |email: &str, password: &str| json!({"email": email, "password": password});
    for (body, status, code, field) in [
        (register("nobody", PASSWORD), 422, "invalid_field", "email"),
        (register("a@b\u{0}.org", PASSWORD), 422, "invalid_field", "email"),
        (
            register(&format!("{}@example.org", "a".repeat(300)), PASSWORD),
            422,
            "invalid_field",
            "email",
        ),
        (register("a@b.org", "short"), 422, "invalid_field", "password"),
        (
            json!({"email": "a@b.org", "password": PASSWORD, "display_name": "a\u{0}b"}),
            422,
            "invalid_field",
            "display_name",
        ),
        (
            json!({"email": "a@b.org", "password": PASSWORD, "locale": "'; drop table users"}),
            422,
            "invalid_field",
            "locale",
        ),
        (
            json!({"email": 7, "password": PASSWORD}),
            422,
            "invalid_field",
            "email",
        ),
        (
            json!({"email": "a@b.org", "password": PASSWORD, "scopes": ["treasury"]}),
            422,
            "invalid_field",
            "scopes",
        ),
    ] {
        let response = exchange.post("/register", body.clone()).await;
        let answered = response.status().as_u16();
        let problem: Value = response.json().await.unwrap();
        assert_eq!(
            (answered, &problem["code"], &problem["field"]),
            (status, &json!(code), &json!(field)),
            "{body} {problem}"
        );
    }
    let client = &exchange.service.client;
    let url = exchange.service.url("/login");
    problem(
        client.post(&url).body("{}").send().await.unwrap(),
        415,
        "unsupported_media_type",
    )
    .await;
    let json = |body: String| {
        client
            .post(&url)
            .header("content-type", "application/json")
            .body(body)
            .send()
    };
    problem(json("{".to_owned()).await.unwrap(), 400, "invalid_body").await;
    problem(json("x".repeat(70_000)).await.unwrap(), 413, "body_too_large").await;
    problem(
        exchange.call(Method::GET, "/login", None, None).await,
        405,
        "method_not_allowed",
    )
    .await;
    problem(
        exchange.call(Method::GET, "/nothing", None, None).await,
        404,
        "not_found",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_no_address_is_logged() {
    let exchange = Exchange::start(&[]).await;
    let tokens = exchange.user("ada@example.org").await;
    exchange
        .post(
            "/login",
            json!({"email": "ada@example.org", "password": "wrong password"}),
        )
        .await;
    exchange
        .post("/token/refresh", json!({"refresh_token": tokens.refresh_token}))
        .await;
    exchange
        .post("/token/refresh", json!({"refresh_token": tokens.refresh_token}))
        .await;
    exchange
        .call(Method::DELETE, "/user", Some(&tokens.access_token), None)
        .await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let header = format!("00-{trace}-b7ad6b7169203331-01");
    let request = exchange
        .service
        .client
        .get(exchange.service.url("/profile"))
        .header("traceparent", header);
    request.send().await.unwrap();
    let marked = format!(r#""trace.id":"{trace}""#);
    // The line about a request follows its answer.
    let log = exchange.service.logged(&marked, 1).await;
    assert!(log.contains("came twice"), "{log}");
    for secret in [
        "ada@",
        "example.org",
        PASSWORD,
        "wrong password",
        &tokens.access_token,
        &tokens.refresh_token,
        LANE_SECRET,
    ] {
        assert!(!log.contains(secret), "{secret} is in the log:\n{log}");
    }
    for line in log.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        for field in [
            "@timestamp",
            "log.level",
            "message",
            "ecs.version",
            "service.name",
            "labels.stack",
        ] {
            assert!(entry[field].is_string(), "{field} is missing in {line}");
        }
    }
}
