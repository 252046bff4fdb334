//! A client of the exchange as its users see it, for the smoke test and the load test.

use std::time::Duration;

use http::{Method, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    auth::{LANE_HEADER, LANE_SECRET_HEADER},
    lane::Lane,
    role::STACK_HEADER,
};

/// Longer than any healthy answer takes.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where the services are.
#[derive(Clone, Debug, clap::Args)]
pub struct Endpoints {
    /// The user service, `http://host:port`.
    #[arg(long, env = "EXCHANGE_USER_URL")]
    pub user_url: String,
    /// The trade service.
    #[arg(long, env = "EXCHANGE_TRADE_URL")]
    pub trade_url: String,
    /// The notification service.
    #[arg(long, env = "EXCHANGE_NOTIFICATION_URL")]
    pub notification_url: String,
}

/// The right to use a test lane.
#[derive(Clone, Debug)]
pub struct LaneKey {
    /// The lane.
    pub lane: Lane,
    /// The secret of the stack that it belongs to.
    pub secret: SecretString,
}

/// Why a step did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer.
    #[error("{method} {url}: {}", chain(.source))]
    Transport {
        /// The method.
        method: Method,
        /// The URL.
        url: String,
        /// What broke.
        source: reqwest::Error,
    },
    /// An answer with another status than expected.
    #[error("{method} {url}: expected {expected}, got {status}: {body}")]
    Status {
        /// The method.
        method: Method,
        /// The URL.
        url: String,
        /// What would have been right.
        expected: StatusCode,
        /// What came.
        status: StatusCode,
        /// The body of the answer.
        body: String,
        /// The stack that answered, if it said so.
        stack: Option<String>,
        /// When to ask again, if it said so.
        retry_after: Option<Duration>,
    },
    /// An answer of another stack.
    #[error("{method} {url}: expected an answer of stack {expected}, got one of {actual:?}")]
    Stack {
        /// The method.
        method: Method,
        /// The URL.
        url: String,
        /// The stack under test.
        expected: String,
        /// The stack that answered, if it said so.
        actual: Option<String>,
    },
    /// An answer that is not what the API promises.
    #[error("{0}")]
    Wrong(String),
}

impl CallError {
    /// For tests: a question that was answered with this status, where 200 was expected.
    #[cfg(test)]
    pub fn answered(status: StatusCode) -> Self {
        Self::Status {
            method: Method::GET,
            url: String::new(),
            expected: StatusCode::OK,
            status,
            body: String::new(),
            stack: None,
            retry_after: None,
        }
    }

    /// Whether it was answered that this cannot be done right now: what may be asked again.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Status { status, .. } if *status == StatusCode::SERVICE_UNAVAILABLE)
    }

    /// Whether the request did not get to the stack under test: nothing was there, or another stack.
    pub fn went_elsewhere(&self) -> bool {
        match self {
            Self::Transport { source, .. } => source.is_connect(),
            Self::Stack { .. } => true,
            Self::Status { .. } | Self::Wrong(_) => false,
        }
    }
}

/// An error with all its causes, as one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl From<serde_json::Error> for CallError {
    fn from(error: serde_json::Error) -> Self {
        Self::Wrong(format!("an answer is not what the API promises: {error}"))
    }
}

/// A request.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    method: Method,
    url: String,
    token: Option<&'a str>,
    key: Option<String>,
    body: Option<Value>,
}

impl<'a> Call<'a> {
    /// A request without a body.
    pub fn get(url: String) -> Self {
        Self {
            method: Method::GET,
            url,
            token: None,
            key: None,
            body: None,
        }
    }

    /// A request to remove something.
    pub fn delete(url: String) -> Self {
        Self {
            method: Method::DELETE,
            ..Self::get(url)
        }
    }

    /// A request with a body.
    pub fn post(url: String, body: Value) -> Self {
        Self {
            method: Method::POST,
            url,
            token: None,
            key: None,
            body: Some(body),
        }
    }

    /// On behalf of a user.
    #[must_use]
    pub fn token(self, token: &'a str) -> Self {
        Self {
            token: Some(token),
            ..self
        }
    }

    /// With an idempotency key.
    #[must_use]
    pub fn key(self, key: String) -> Self {
        Self {
            key: Some(key),
            ..self
        }
    }
}

/// Answers, and what a check may want to know of them.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The body.
    pub body: Value,
    /// Whether the request had been answered before.
    pub repeated: bool,
    /// The stack that answered.
    pub stack: Option<String>,
}

/// A client of all services.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    /// Where the services are.
    pub endpoints: Endpoints,
    /// The test lane, if it is not the live one.
    pub lane: Option<LaneKey>,
    /// The only stack that may answer.
    pub stack: Option<String>,
}

impl Client {
    /// A client that makes a connection for each request.
    pub fn new(endpoints: Endpoints, lane: Option<LaneKey>, stack: Option<String>) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(TIMEOUT)
            // What is sent on a connection that was kept is silently sent again when that turns out to be closed. And one that
            // idles for long keeps a stack from being drained.
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Self {
            http,
            endpoints,
            lane,
            stack,
        })
    }

    /// Sends a request and checks who answered, and how.
    pub async fn call(&self, call: Call<'_>, expected: StatusCode) -> Result<Answer, CallError> {
        let Call {
            method,
            url,
            token,
            key,
            body,
        } = call;
        let mut request = self.http.request(method.clone(), &url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        if let Some(LaneKey { lane, secret }) = &self.lane {
            request = request
                .header(LANE_HEADER, lane.as_str())
                .header(LANE_SECRET_HEADER, secret.expose_secret());
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let transport = |source| CallError::Transport {
            method: method.clone(),
            url: url.clone(),
            source,
        };
        let response = request.send().await.map_err(transport)?;
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(ToOwned::to_owned)
        };
        let (status, stack) = (response.status(), header(STACK_HEADER));
        let repeated = header("idempotency-hit").is_some_and(|hit| hit == "true");
        let retry_after = header("retry-after").and_then(|seconds| seconds.parse().ok());
        let retry_after = retry_after.map(Duration::from_secs);
        let text = response.text().await.map_err(transport)?;
        if let Some(expected) = &self.stack
            && stack.as_ref() != Some(expected)
        {
            return Err(CallError::Stack {
                method,
                url,
                expected: expected.clone(),
                actual: stack,
            });
        }
        if status != expected {
            return Err(CallError::Status {
                method,
                url,
                expected,
                status,
                body: text,
                stack,
                retry_after,
            });
        }
        let body = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text)
                .map_err(|error| CallError::Wrong(format!("{method} {url}: {error}")))?
        };
        Ok(Answer {
            body,
            repeated,
            stack,
        })
    }

    /// Registers a synthetic user and logs in.
    pub async fn join(&self, name: &str) -> Result<Trader, CallError> {
        let mut trader = self.register(name).await?;
        self.log_in(&mut trader).await?;
        Ok(trader)
    }

    /// Registers a synthetic user.
    pub async fn register(&self, name: &str) -> Result<Trader, CallError> {
        let email = format!("{name}-{}@synthetic.invalid", Uuid::now_v7().simple());
        let password = SecretString::from(format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()));
        let credentials = json!({"email": email, "password": password.expose_secret()});
        let url = format!("{}/register", self.endpoints.user_url);
        self.call(Call::post(url, credentials), StatusCode::ACCEPTED)
            .await?;
        Ok(Trader::known(email, password))
    }

    /// Gets a new access token, and says which stack has given it.
    pub async fn log_in(&self, trader: &mut Trader) -> Result<Option<String>, CallError> {
        let credentials = json!({"email": trader.email, "password": trader.password.expose_secret()});
        let url = format!("{}/login", self.endpoints.user_url);
        let answer = self.call(Call::post(url, credentials), StatusCode::OK).await?;
        trader.token = field(&answer.body, "access_token")?;
        Ok(answer.stack)
    }

    /// Opens an account of the trader.
    pub async fn open_account(&self, trader: &mut Trader, currency: &str) -> Result<(), CallError> {
        let url = format!("{}/account/add", self.endpoints.trade_url);
        let call = Call::post(url, json!({"currency": currency, "name": "synthetic"})).token(&trader.token);
        let answer = self.call(call, StatusCode::CREATED).await?;
        trader.accounts.push(serde_json::from_value(answer.body)?);
        Ok(())
    }

    /// Credits an account, with the token of somebody who may.
    pub async fn deposit(&self, token: &str, account: Uuid, amount: &str) -> Result<(), CallError> {
        let url = format!("{}/account/deposit", self.endpoints.trade_url);
        let call = Call::post(url, json!({"account_id": account, "amount": amount})).token(token);
        let call = call.key(Uuid::now_v7().to_string());
        self.call(call, StatusCode::CREATED).await.map(|_| ())
    }

    /// The trader's accounts as they are now.
    pub async fn accounts(&self, trader: &Trader) -> Result<Vec<Account>, CallError> {
        let url = format!("{}/account/list", self.endpoints.trade_url);
        let answer = self
            .call(Call::get(url).token(&trader.token), StatusCode::OK)
            .await?;
        Ok(serde_json::from_value(list(&answer.body, "accounts").into())?)
    }

    /// All trades of an account, as its owner's list shows them.
    pub async fn trades(&self, trader: &Trader, account: Uuid) -> Result<Vec<ListedTrade>, CallError> {
        let mut all = Vec::new();
        let mut cursor = String::new();
        loop {
            let base = &self.endpoints.trade_url;
            let url = format!("{base}/trade/getTradeByAccount?account_id={account}&limit=500{cursor}");
            let page = self
                .call(Call::get(url).token(&trader.token), StatusCode::OK)
                .await?
                .body;
            for trade in list(&page, "trades") {
                all.push(ListedTrade::deserialize(trade)?);
            }
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(all),
            }
        }
    }

    /// The ids of the trades that the trader has been notified of.
    pub async fn notified_trades(&self, trader: &Trader) -> Result<Vec<String>, CallError> {
        let mut ids = Vec::new();
        let mut before = String::new();
        loop {
            let url = format!(
                "{}/notifications?limit=200{before}",
                self.endpoints.notification_url
            );
            let page = self
                .call(Call::get(url).token(&trader.token), StatusCode::OK)
                .await?
                .body;
            for notification in list(&page, "notifications") {
                if let (Some("trade"), Some(data)) = (
                    notification.get("kind").and_then(Value::as_str),
                    notification.get("data"),
                ) {
                    ids.push(field(data, "trade_id")?);
                }
            }
            match page.get("next").and_then(Value::as_i64) {
                Some(next) => before = format!("&before={next}"),
                None => return Ok(ids),
            }
        }
    }

    /// The body of an order at a price.
    pub fn order(trader: &Trader, kind: &str, price: &str, size: &str, client_order_id: &str) -> Value {
        json!({
            "type": kind,
            "product": PRODUCT,
            "size": size,
            "price": price,
            "client_order_id": client_order_id,
            "base_account_id": trader.account(BASE),
            "quote_account_id": trader.account(QUOTE),
        })
    }

    /// Sends an order.
    pub async fn send_order(&self, trader: &Trader, order: Value) -> Result<Answer, CallError> {
        let url = format!("{}/trade/add", self.endpoints.trade_url);
        self.call(Call::post(url, order).token(&trader.token), StatusCode::CREATED)
            .await
    }

    /// Removes everything in the test lane.
    pub async fn erase_lane(&self) -> Result<(), CallError> {
        let url = format!("{}/lane", self.endpoints.user_url);
        self.call(Call::delete(url), StatusCode::NO_CONTENT)
            .await
            .map(|_| ())
    }
}

/// What synthetic traders trade.
pub const PRODUCT: &str = "BTC-USD";
/// What it is about.
pub const BASE: &str = "BTC";
/// What it is paid in.
pub const QUOTE: &str = "USD";

/// A synthetic user.
#[derive(Clone, Debug)]
pub struct Trader {
    email: String,
    password: SecretString,
    /// The access token.
    pub token: String,
    /// The accounts when they were opened.
    pub accounts: Vec<Account>,
}

impl Trader {
    /// Somebody who is registered already.
    pub fn known(email: String, password: SecretString) -> Self {
        Self {
            email,
            password,
            token: String::new(),
            accounts: Vec::new(),
        }
    }

    /// The id of the account of a currency.
    pub fn account(&self, currency: &str) -> Option<Uuid> {
        self.accounts
            .iter()
            .find(|account| account.currency == currency)
            .map(|account| account.account_id)
    }
}

/// An account, as far as synthetic traders look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct Account {
    /// Its id.
    pub account_id: Uuid,
    /// Its currency.
    pub currency: String,
    /// All of it.
    pub balance: rust_decimal::Decimal,
    /// What is reserved.
    pub hold: rust_decimal::Decimal,
}

/// A trade as one of its two sides sees it, as far as synthetic traders look at it.
#[derive(Clone, Debug, Deserialize)]
pub struct ListedTrade {
    /// Its id.
    pub trade_id: String,
    /// The owner's order.
    pub order_id: String,
    /// Whose order came to one that rested: `taker`, or `maker` for the other side.
    pub role: String,
}

/// A list in an answer; empty if there is none.
pub fn list<'a>(body: &'a Value, name: &str) -> &'a [Value] {
    body.get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// A text field of an answer.
pub fn field(body: &Value, name: &str) -> Result<String, CallError> {
    let text = body.get(name).and_then(Value::as_str).map(ToOwned::to_owned);
    text.ok_or_else(|| CallError::Wrong(format!("the answer has no {name}: {body}")))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        net::SocketAddr,
        sync::{Arc, Mutex},
    };

    use axum::{extract::ConnectInfo, routing};

    use super::*;

    #[tokio::test]
    async fn no_request_is_sent_on_a_connection_that_was_used_before() {
        let peers = Arc::new(Mutex::new(BTreeSet::new()));
        let seen = Arc::clone(&peers);
        let answer = async move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
            seen.lock().unwrap().insert(peer);
        };
        let router = axum::Router::new().route("/", routing::get(answer));
        let service = router.into_make_service_with_connect_info::<SocketAddr>();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, service).await });
        let endpoints = Endpoints {
            user_url: url.clone(),
            trade_url: url.clone(),
            notification_url: url.clone(),
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::new(endpoints, None, None).unwrap();
        for _ in 0..3 {
            let call = Call::get(format!("{url}/"));
            client.call(call, StatusCode::OK).await.unwrap();
        }
        assert_eq!(peers.lock().unwrap().len(), 3);
    }
}
