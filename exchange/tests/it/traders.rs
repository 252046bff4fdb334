//! Users of the trade service, for tests.

use clap::Parser as _;
use exchange::{
    auth::Keys,
    config::{Config, ConfigArgs},
    lane::Lane,
};
use reqwest::{Response, StatusCode};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::servers::{Database, Service, eventually, waits_for_lock};

#[derive(clap::Parser)]
struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

fn config(database: &Database) -> Config {
    let flags = [
        "exchange",
        "--role=live",
        "--access-token-lifetime=1h",
        "--database-url",
    ];
    Args::parse_from(flags.into_iter().chain([database.app_url.as_str()]))
        .config
        .validate()
        .unwrap()
}

/// Issues tokens as the user service would.
pub(crate) struct Issuer {
    keys: Keys,
    db: PgPool,
}

impl Issuer {
    /// For services on this database.
    pub(crate) async fn new(database: &Database) -> Self {
        let db = PgPool::connect(&database.app_url).await.unwrap();
        Self {
            keys: Keys::new(db.clone(), &config(database)),
            db,
        }
    }

    /// A token of this user, who is registered if need be.
    pub(crate) async fn token(&self, user: Uuid, lane: Lane, scopes: &[&str]) -> String {
        sqlx::query(
            "insert into users (id, lane, email, password_hash) values ($1, $2, $3, 'none') on conflict (id) do nothing",
        )
        .bind(user)
        .bind(&lane)
        .bind(format!("{user}@example.org"))
        .execute(&self.db)
        .await
        .unwrap();
        let scopes: Vec<String> = scopes.iter().map(|&scope| scope.to_owned()).collect();
        let issued = self
            .keys
            .issue(user, Uuid::now_v7(), lane, &scopes)
            .await
            .unwrap();
        issued.token.expose_secret().to_owned()
    }

    /// A user of the live lane.
    pub(crate) async fn trader(&self, service: &Service) -> Trader {
        self.caller(service, &[]).await
    }

    /// A user of the live lane with scopes.
    pub(crate) async fn caller(&self, service: &Service, scopes: &[&str]) -> Trader {
        Trader::new(service, self.token(Uuid::now_v7(), Lane::live(), scopes).await)
    }
}

/// Somebody with a token.
#[derive(Clone)]
pub(crate) struct Trader {
    client: reqwest::Client,
    base: String,
    token: String,
}

impl Trader {
    /// The holder of this token, as a client of this service.
    pub(crate) fn new(service: &Service, token: String) -> Self {
        Self {
            client: service.client.clone(),
            base: service.url(""),
            token,
        }
    }

    /// What the holder shows.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// Sends a request with a key.
    pub(crate) async fn post_with_key(&self, path: &str, key: &str, body: &Value) -> Response {
        self.client
            .post(format!("{}{path}", self.base))
            .bearer_auth(&self.token)
            .header("idempotency-key", key)
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// Sends a request.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.client
            .post(format!("{}{path}", self.base))
            .bearer_auth(&self.token)
            .json(body)
            .send()
            .await
            .unwrap()
    }

    /// Reads something, which must succeed.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let response = self.try_get(path).await;
        assert_eq!(response.status(), 200, "{path}");
        response.json().await.unwrap()
    }

    /// Reads something.
    pub(crate) async fn try_get(&self, path: &str) -> Response {
        self.client
            .get(format!("{}{path}", self.base))
            .bearer_auth(&self.token)
            .send()
            .await
            .unwrap()
    }

    /// Opens an account.
    pub(crate) async fn account(&self, currency: &str) -> String {
        let response = self
            .post("/account/add", &json!({"currency": currency, "name": "main"}))
            .await;
        let account = accept(response, StatusCode::CREATED).await;
        account["account_id"].as_str().unwrap().to_owned()
    }

    /// Opens accounts of BTC and USD with so much in them.
    pub(crate) async fn wallet(&self, treasury: &Self, coins: &str, dollars: &str) -> Wallet {
        let wallet = Wallet {
            trader: self.clone(),
            btc: self.account("BTC").await,
            usd: self.account("USD").await,
        };
        for (account, amount) in [(&wallet.btc, coins), (&wallet.usd, dollars)] {
            if amount != "0" {
                treasury.deposit(account, amount).await;
            }
        }
        wallet
    }

    /// Credits an account.
    pub(crate) async fn deposit(&self, account: &str, amount: &str) {
        let key = Uuid::now_v7().to_string();
        let body = json!({"account_id": account, "amount": amount});
        accept(
            self.post_with_key("/account/deposit", &key, &body).await,
            StatusCode::CREATED,
        )
        .await;
    }
}

/// Somebody with accounts of BTC and USD.
#[derive(Clone)]
pub(crate) struct Wallet {
    /// The owner.
    pub(crate) trader: Trader,
    /// The account of BTC.
    pub(crate) btc: String,
    /// The account of USD.
    pub(crate) usd: String,
}

impl Wallet {
    /// A limit order.
    pub(crate) fn order(&self, action: &str, size: &str, price: &str) -> Value {
        json!({
            "type": action, "product": "BTC-USD", "size": size, "price": price, "client_order_id": Uuid::now_v7(),
            "base_account_id": self.btc, "quote_account_id": self.usd,
        })
    }

    /// Places an order that must be accepted.
    pub(crate) async fn place(&self, action: &str, size: &str, price: &str) -> Value {
        let response = self
            .trader
            .post("/trade/add", &self.order(action, size, price))
            .await;
        accept(response, StatusCode::CREATED).await
    }

    /// Balance and hold of BTC, then of USD.
    pub(crate) async fn balances(&self) -> [String; 4] {
        let list = self.trader.get("/account/list").await;
        let field = |id: &str, field: &str| {
            let accounts = list["accounts"].as_array().unwrap();
            let account = accounts
                .iter()
                .find(|account| account["account_id"] == id)
                .unwrap();
            account[field].as_str().unwrap().to_owned()
        };
        [
            field(&self.btc, "balance"),
            field(&self.btc, "hold"),
            field(&self.usd, "balance"),
            field(&self.usd, "hold"),
        ]
    }
}

/// The body of an answer that must have this status.
pub(crate) async fn accept(response: Response, status: StatusCode) -> Value {
    let actual = response.status();
    let body: Value = response.json().await.unwrap();
    assert_eq!(actual, status, "{body}");
    body
}

/// Fails unless the books of a lane are right.
pub(crate) async fn assert_clean(owner: &PgPool, lane: &str) {
    let found: Vec<(String, String)> = sqlx::query_as("select problem, subject from audit_ledger_v1($1)")
        .bind(lane)
        .fetch_all(owner)
        .await
        .unwrap();
    assert_eq!(found, []);
}

/// Has a lane be erased, and waits until that has to wait for somebody, or is over.
pub(crate) async fn begin_to_erase(owner: &PgPool, lane: &'static str) -> JoinHandle<()> {
    let erasing = {
        let owner = owner.clone();
        tokio::spawn(async move {
            let erase = sqlx::query("select erase_lane_v1($1)").bind(lane);
            erase.execute(&owner).await.unwrap();
        })
    };
    eventually("the erasure waits, or is over", || async {
        let waits = waits_for_lock(owner, "select erase_lane%").await.unwrap();
        (waits || erasing.is_finished()).then_some(())
    })
    .await;
    erasing
}

/// Fails if something of a lane is left.
pub(crate) async fn assert_erased(owner: &PgPool, lane: &str) {
    let tables: Vec<String> = sqlx::query_scalar("select table_name from lane_tables")
        .fetch_all(owner)
        .await
        .unwrap();
    for table in tables {
        let left = AssertSqlSafe(format!("select count(*) from {table} where lane = $1"));
        let left: i64 = sqlx::query_scalar(left)
            .bind(lane)
            .fetch_one(owner)
            .await
            .unwrap();
        assert_eq!(left, 0, "in {table}, of {lane}");
    }
}
