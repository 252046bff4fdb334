//! The API as a whole: every route has a rule and keeps to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::Path,
};

use ed25519_dalek::SigningKey;
use exchange::release;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::{
    queries::collect,
    servers::{Database, Postgres, Service, V1, V2, eventually},
    stores::{Nats, Redis},
    streams::Stream,
    tokens::{decode, sign},
    traders::{Issuer, Trader, Wallet, accept},
    user::Exchange,
    whole::SECRET,
};

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Everybody.
    Public,
    /// The holder of an access token, and only for what is the holder's own.
    Own,
    /// The holder of an access token with this scope, for everybody.
    Treasury,
    /// The holder of the secret of the stack's test lanes.
    LaneSecret,
}

/// A route that is not here fails the test.
const RULES: &[(&str, &str, Rule)] = &[
    ("get", "/version", Rule::Public),
    ("get", "/.well-known/jwks.json", Rule::Public),
    ("post", "/register", Rule::Public),
    ("post", "/login", Rule::Public),
    ("post", "/token/refresh", Rule::Public),
    ("post", "/logout", Rule::Own),
    ("get", "/profile", Rule::Own),
    ("patch", "/profile", Rule::Own),
    ("post", "/password", Rule::Own),
    ("get", "/user/export", Rule::Own),
    ("delete", "/user", Rule::Own),
    ("delete", "/lane", Rule::LaneSecret),
    ("post", "/account/add", Rule::Own),
    ("post", "/account/update", Rule::Own),
    ("post", "/account/delete", Rule::Own),
    ("get", "/account/list", Rule::Own),
    ("post", "/account/deposit", Rule::Treasury),
    ("post", "/account/withdraw", Rule::Own),
    ("get", "/products", Rule::Public),
    ("post", "/trade/add", Rule::Own),
    ("post", "/trade/cancel", Rule::Own),
    ("get", "/trade/getTradeByAccount", Rule::Own),
    ("get", "/book", Rule::Own),
    ("get", "/notifications", Rule::Own),
    ("get", "/notifications/stream", Rule::Own),
    ("post", "/notifications/read", Rule::Own),
    ("post", "/notifications/{id}/read", Rule::Own),
    ("get", "/market/ticker", Rule::Public),
    ("get", "/market/candles", Rule::Public),
    ("get", "/market/trades", Rule::Public),
];

/// The description of the newest version, as clients get it.
pub(crate) fn document() -> Value {
    serde_json::to_value(exchange::openapi::document(release::V2)).unwrap()
}

/// All operations of a description.
pub(crate) fn operations(document: &Value) -> Vec<Operation> {
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(move |(method, description)| Operation {
            method: method.clone(),
            path: path.clone(),
            description: description.clone(),
        })
    });
    operations.collect()
}

/// All services of an exchange, and the users that tests need.
pub(crate) struct World {
    by_tag: BTreeMap<&'static str, Service>,
    users: Exchange,
    pub(crate) treasury: Trader,
    _stores: (Nats, Redis),
}

impl World {
    pub(crate) async fn start() -> Self {
        let database = Database::migrated(Postgres::shared()).await;
        let stores = (Nats::start(), Redis::start(None));
        let secret = ["--lane-secret", SECRET];
        let unlimited = [
            "--login-attempts-per-account=1000000",
            "--login-attempts-per-address=1000000",
        ];
        let users = [&unlimited[..], &secret].concat();
        let (queue, market) = (stores.0.url(), stores.1.url());
        let market = [&secret[..], &["--market-data-url", &market]].concat();
        let both = [&market[..], &["--queue-url", &queue]].concat();
        let start = |service, flags: &[&str]| Service::live(service, &database, flags);
        let trade = start("trade", &market).ready().await;
        let issuer = Issuer::new(&database).await;
        Self {
            treasury: issuer.caller(&trade, &["treasury"]).await,
            by_tag: BTreeMap::from([
                ("user", start("user", &users).ready().await),
                ("trade", trade),
                ("market", start("trade", &market).ready().await),
                ("notification", start("notification", &both).ready().await),
            ]),
            users: Exchange::over(database, &unlimited).await,
            _stores: stores,
        }
    }

    /// A new user with something of everything that requests can name.
    pub(crate) async fn user(&self, name: &str) -> Owner {
        let user = self.users.user(&format!("{name}@example.org")).await;
        let trader = Trader::new(&self.by_tag["trade"], user.access_token.clone());
        let wallet = trader.wallet(&self.treasury, "1000", "1000000").await;
        let order = wallet.place("sell", "0.1", "90000").await;
        Owner {
            id: user.user_id,
            token: user.access_token,
            btc: wallet.btc,
            usd: wallet.usd,
            order: text(&order["order_id"]),
            notification: 1,
        }
    }

    /// Waits until a user has been told of so many things.
    pub(crate) async fn told(&self, owner: &mut Owner, things: u64) {
        let notifications = &self.by_tag["notification"];
        let reader = Trader::new(notifications, owner.token.clone());
        owner.notification = eventually("the user has been told", || async {
            let page = reader.get("/notifications").await;
            page["notifications"][0]["id"]
                .as_u64()
                .filter(|newest| *newest >= things)
        })
        .await;
    }

    /// Sends a request of an operation.
    pub(crate) async fn send(&self, operation: &Operation, input: &Input, token: Option<&str>) -> Response {
        let service = match operation.description["tags"][0].as_str().unwrap() {
            "every service" => "user",
            service => service,
        };
        let service = &self.by_tag[service];
        let mut path = operation.path.clone();
        let mut query = String::new();
        let mut headers = http::HeaderMap::new();
        for ((place, name), value) in &input.parameters {
            match place.as_str() {
                "path" => path = path.replace(&format!("{{{name}}}"), &escaped(value)),
                "query" => write!(query, "&{}={}", escaped(name), escaped(value)).unwrap(),
                _ => {
                    // What cannot be sent cannot do harm.
                    if let Ok(value) = http::HeaderValue::from_str(value) {
                        headers.insert(http::HeaderName::try_from(name).unwrap(), value);
                    }
                }
            }
        }
        let url = service.url(&format!("{path}?{}", query.trim_start_matches('&')));
        let mut request = service.client.request(operation.method(), url).headers(headers);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = &input.body {
            request = request.json(body);
        }
        request.send().await.unwrap()
    }
}

/// A user, and what is the user's own.
pub(crate) struct Owner {
    id: String,
    pub(crate) token: String,
    btc: String,
    usd: String,
    order: String,
    notification: u64,
}

impl Owner {
    /// What requests mean by a parameter or field of this name.
    fn own(&self, name: &str) -> Option<String> {
        match name {
            "account_id" | "base_account_id" => Some(self.btc.clone()),
            "quote_account_id" => Some(self.usd.clone()),
            "order_id" => Some(self.order.clone()),
            "id" => Some(self.notification.to_string()),
            _ => None,
        }
    }
}

/// One of the operations that the API's description has.
pub(crate) struct Operation {
    method: String,
    pub(crate) path: String,
    pub(crate) description: Value,
}

impl Operation {
    pub(crate) fn method(&self) -> Method {
        self.method.to_uppercase().parse().unwrap()
    }

    /// Place, name and schema of each parameter, and whether it is required.
    pub(crate) fn parameters(&self) -> Vec<(Place, &Value, bool)> {
        let parameters = self.description["parameters"].as_array().into_iter().flatten();
        parameters
            .map(|parameter| {
                let place = (text(&parameter["in"]), text(&parameter["name"]));
                (place, &parameter["schema"], parameter["required"] == true)
            })
            .collect()
    }

    /// The fields that a body cannot do without.
    pub(crate) fn required_fields(&self, document: &Value) -> Vec<String> {
        let schema = &self.description["requestBody"]["content"]["application/json"]["schema"];
        let reference = schema["$ref"].as_str().unwrap().trim_start_matches('#');
        let required = document.pointer(reference).unwrap()["required"].as_array();
        required.into_iter().flatten().map(text).collect()
    }

    fn rule(&self) -> Rule {
        let of_this = |rule: &&(&str, &str, Rule)| (rule.0, rule.1) == (&*self.method, &*self.path);
        RULES.iter().find(of_this).unwrap().2
    }
}

/// Where a parameter stands (`path`, `query`, `header`), and its name.
pub(crate) type Place = (String, String);

/// What a client says in a request.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) parameters: BTreeMap<Place, String>,
    pub(crate) body: Option<Value>,
}

impl Input {
    /// What a user would say who does as the description says; each time under a new key.
    pub(crate) fn of(document: &Value, operation: &Operation, owner: &Owner) -> Self {
        let parameters = operation.parameters();
        let required = parameters.into_iter().filter(|(.., required)| *required);
        let parameters = required.map(|(place, schema, _)| {
            let value = harmless(document, &place.1, schema, owner);
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            (place, value)
        });
        let parameters = parameters.collect();
        let schema = &operation.description["requestBody"]["content"]["application/json"]["schema"];
        Self {
            parameters,
            body: (!schema.is_null()).then(|| harmless(document, "", schema, owner)),
        }
    }
}

/// A value of a schema; for what has an owner, something of this one.
fn harmless(document: &Value, name: &str, schema: &Value, owner: &Owner) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = document.pointer(reference.trim_start_matches('#')).unwrap();
        return harmless(document, name, schema, owner);
    }
    if let Some(own) = owner.own(name) {
        return own.into();
    }
    assert_ne!(schema["format"], "uuid", "{name}: whose is it?");
    if let Some(choices) = schema["oneOf"].as_array() {
        let something = choices.iter().find(|choice| choice["type"] != "null").unwrap();
        return harmless(document, name, something, owner);
    }
    if let Some(example) = schema.get("example").or_else(|| schema["examples"].get(0)) {
        return example.clone();
    }
    if let Some(values) = schema["enum"].as_array() {
        return values[0].clone();
    }
    if let Some(properties) = schema["properties"].as_object() {
        let fields = properties
            .iter()
            .map(|(name, schema)| (name.clone(), harmless(document, name, schema, owner)));
        return fields.collect::<Map<_, _>>().into();
    }
    let kind = schema["type"]
        .as_array()
        .map_or(&schema["type"], |kinds| &kinds[0]);
    match (name, kind.as_str()) {
        ("Idempotency-Key" | "client_order_id", _) => json!(Uuid::now_v7()),
        ("product", _) => json!("BTC-USD"),
        ("locale", _) => json!("en"),
        (_, Some("integer" | "number")) => json!(1),
        (_, Some("boolean")) => json!(true),
        (_, Some("array")) => json!([]),
        _ => json!("twelve characters"),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Percent-encoded, byte by byte.
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        write!(escaped, "%{byte:02X}").unwrap();
        escaped
    })
}

#[test]
fn every_failure_is_documented() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let text = std::fs::read_to_string(docs.join("api.md")).unwrap();
    let document = document();
    let codes = document["components"]["schemas"]["ProblemDocument"]["properties"]["code"]["enum"]
        .as_array()
        .unwrap();
    assert!(codes.len() > 10);
    for code in codes {
        let code = code.as_str().unwrap();
        assert!(
            text.contains(&format!("`{code}`")),
            "{code} is missing in docs/api.md"
        );
    }
    for Operation { method, path, .. } in operations(&document) {
        let route = format!("`{} {path}`", method.to_uppercase());
        assert!(text.contains(&route), "{route} is missing in docs/api.md");
    }
}

#[test]
fn every_route_has_a_rule() {
    let mut described: Vec<_> = operations(&document())
        .into_iter()
        .map(|operation| (operation.method, operation.path))
        .collect();
    let mut ruled: Vec<_> = RULES
        .iter()
        .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    described.sort();
    ruled.sort();
    assert_eq!(described, ruled);
}

/// Nothing is described of a route that is added by other means than `routes!`, so that no other test would know of it.
#[test]
fn no_route_is_left_out_of_the_description() {
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    // That of the admin port, which no client reaches.
    files.retain(|file| !file.ends_with("src/admin.rs"));
    assert!(files.len() > 40, "only {} files", files.len());
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        let (served, _) = source.split_once("#[cfg(test)]").unwrap_or((&source, ""));
        for undescribed in [".route(", "route_service(", ".nest", "fallback_service("] {
            assert!(!served.contains(undescribed), "{}: {undescribed}", file.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_keeps_to_its_rule() {
    let world = World::start().await;
    let (mut ada, bob) = (world.user("ada").await, world.user("bob").await);
    // Notifications are numbered per user: hers reach further than his.
    for _ in 0..5 {
        world.treasury.deposit(&ada.usd, "1").await;
    }
    world.told(&mut ada, 10).await;
    let document = document();
    let mut foreign = 0;
    for operation in operations(&document) {
        let rule = operation.rule();
        let route = format!("{} {}", operation.method, operation.path);
        let requires_token = !operation.description["security"].is_null();
        assert_eq!(
            requires_token,
            matches!(rule, Rule::Own | Rule::Treasury),
            "{route} is described otherwise"
        );
        let input = Input::of(&document, &operation, &bob);
        let nothing = Input {
            parameters: BTreeMap::new(),
            body: None,
        };
        if requires_token {
            for (token, what) in [(None, "no token"), (Some("a.b.c"), "noise for a token")] {
                for input in [&input, &nothing] {
                    let status = world.send(&operation, input, token).await.status();
                    assert_eq!(status, 401, "{route} with {what}");
                }
            }
        }
        match rule {
            Rule::Public => {
                let status = world.send(&operation, &nothing, None).await.status().as_u16();
                assert!(status != 401 && status != 403, "{route}: {status}");
            }
            Rule::LaneSecret => {
                let mut input = nothing;
                let lane = ("header".to_owned(), "x-exchange-lane".to_owned());
                input.parameters.insert(lane, "test-blue-local.1".to_owned());
                assert_eq!(
                    world.send(&operation, &input, None).await.status(),
                    403,
                    "{route}"
                );
            }
            Rule::Treasury => {
                let status = world.send(&operation, &input, Some(&bob.token)).await.status();
                assert_eq!(status, 403, "{route}");
            }
            // They end the session or the user; `user` looks into them. The one without an end has a test of its own.
            Rule::Own if ["/logout", "/user", "/notifications/stream"].contains(&&*operation.path) => {}
            Rule::Own => {
                // His own things may be his to use; each of hers in their place does not exist.
                for one in input.with_one_of(&ada) {
                    let answer = world.send(&operation, &one, Some(&bob.token)).await;
                    assert_eq!(answer.status(), 404, "{route} {one:?}");
                    let problem: Value = answer.json().await.unwrap();
                    assert!(
                        text(&problem["code"]).ends_with("not_found"),
                        "{route}: {problem}"
                    );
                    foreign += 1;
                }
                let answer = world.send(&operation, &input, Some(&bob.token)).await;
                let status = answer.status().as_u16();
                let wrong_password = operation.path == "/password";
                assert!(
                    ![403, 404].contains(&status) && (status != 401 || wrong_password),
                    "{route} {input:?}: {status}"
                );
                let shown = answer.text().await.unwrap();
                for hers in ["ada@", &ada.id, &ada.btc, &ada.usd, &ada.order] {
                    assert!(!shown.contains(hers), "{route} shows others: {shown}");
                }
            }
        }
    }
    assert!(foreign >= 8, "only {foreign} things of others were asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_is_opened_by_an_access_token_and_shows_what_is_its_users_own() {
    let world = World::start().await;
    let (mut ada, mut bob) = (world.user("ada").await, world.user("bob").await);
    world.told(&mut ada, 5).await;
    world.told(&mut bob, 5).await;
    let service = &world.by_tag["notification"];

    let credentials = json!({"email": "ada@example.org", "password": "correct horse battery"});
    let log_in = world.users.call(Method::POST, "/login", None, Some(credentials));
    let tokens = accept(log_in.await, StatusCode::OK).await;
    let [header, claims, _] = ada.token.split('.').collect::<Vec<_>>()[..] else {
        panic!("{}", ada.token)
    };
    let owner = world.users.database.owner().await;
    let seed: Vec<u8> = sqlx::query_scalar("select private_key from signing_keys")
        .fetch_one(&owner)
        .await
        .unwrap();
    let key = SigningKey::from_bytes(&seed.try_into().unwrap());
    let of_another_kind = |part: &str, field: &str, value: &str| {
        let [mut header, mut claims] = [decode(header), decode(claims)];
        let part = if part == "header" {
            &mut header
        } else {
            &mut claims
        };
        part[field] = value.into();
        sign(&key, &header, &claims)
    };
    let open = async |token: &str| {
        let request = service.client.get(service.url("/notifications/stream"));
        let request = request.header("last-event-id", "0").bearer_auth(token);
        request.send().await.unwrap().status()
    };
    assert_eq!(open(&of_another_kind("header", "typ", "at+jwt")).await, 200);
    for (token, what) in [
        (text(&tokens["refresh_token"]), "a refresh token"),
        (SECRET.to_owned(), "the secret of the test lanes"),
        (of_another_kind("header", "typ", "JWT"), "an identity token"),
        (
            of_another_kind("claims", "aud", "elsewhere"),
            "a token for another audience",
        ),
        ("a.b.c".to_owned(), "noise"),
    ] {
        assert_eq!(open(&token).await, 401, "{what}");
    }

    // From the first on: a stranger's stream has the stranger's own numbers, without a gap.
    let mut stream = Stream::open(service, &bob.token, Some(0)).await;
    let mut shown = Vec::new();
    for number in 1..=bob.notification {
        let notification = stream.notification().await;
        assert_eq!(notification["id"], number);
        shown.push(notification.to_string());
    }
    // And while it is open: what she is told first does not come before what he is told then.
    world.treasury.deposit(&ada.usd, "7").await;
    let next = ada.notification + 1;
    world.told(&mut ada, next).await;
    world.treasury.deposit(&bob.usd, "8").await;
    let notification = stream.notification().await;
    assert_eq!(notification["data"]["amount"], "8");
    shown.push(notification.to_string());
    let shown = shown.join("\n");
    for (his, hers) in [(&bob.btc, &ada.btc), (&bob.usd, &ada.usd)] {
        assert!(shown.contains(his) && !shown.contains(hers), "{shown}");
    }
    assert!(!shown.contains(&ada.id), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_export_is_as_it_is_described() {
    for (release, binary) in [(release::V1, V1), (release::V2, V2)] {
        let database = Database::migrated_by(binary, Postgres::shared()).await;
        let registered: Vec<String> = sqlx::query_scalar("select topic from user_data")
            .fetch_all(&database.owner().await)
            .await
            .unwrap();
        let document = serde_json::to_value(exchange::openapi::document(release)).unwrap();
        let described = document["components"]["schemas"]["Export"]["properties"].as_object();
        let described: BTreeSet<String> = described.unwrap().keys().cloned().collect();
        assert_eq!(described, registered.into_iter().collect());
    }

    // Somebody with something of everything.
    let world = World::start().await;
    let (mut ada, bob) = (world.user("ada").await, world.user("bob").await);
    let bob = Wallet {
        trader: Trader::new(&world.by_tag["trade"], bob.token),
        btc: bob.btc,
        usd: bob.usd,
    };
    bob.place("buy", "0.1", "90000").await;
    world.told(&mut ada, 6).await;
    let (migrated, said) = world.users.database.migrate_by(V2, "expand", &[]);
    assert!(migrated, "{said}");
    let trader = Trader::new(&world.by_tag["trade"], ada.token.clone());
    let withdrawal = json!({"account_id": ada.usd, "amount": "1", "reference": "rent"});
    let withdrawn = trader.post_with_key("/account/withdraw", "a-key", &withdrawal);
    accept(withdrawn.await, StatusCode::CREATED).await;
    let freeze = json!({"account_id": ada.usd, "state": "frozen"});
    accept(trader.post("/account/update", &freeze).await, StatusCode::OK).await;
    for insert in [
        "insert into emails (user_id, seq) values ($1, 1)",
        "insert into dead_letters (consumer, event_id, lane, topic, payload, reason)
         values ('x', gen_random_uuid(), 'live', 'x', jsonb_build_object('user_id', $1), 'x')",
    ] {
        sqlx::query(insert)
            .bind(ada.id.parse::<Uuid>().unwrap())
            .execute(&world.users.database.owner().await)
            .await
            .unwrap();
    }
    let operations = operations(&document());
    let export = operations
        .iter()
        .find(|operation| operation.path == "/user/export");
    let nothing = Input {
        parameters: BTreeMap::new(),
        body: None,
    };
    let answer = world.send(export.unwrap(), &nothing, Some(&ada.token)).await;
    let exported = accept(answer, StatusCode::OK).await;
    let schema = &export.unwrap().description["responses"]["200"]["content"]["application/json"]["schema"];
    let document = document();
    let schema = document
        .pointer(schema["$ref"].as_str().unwrap().trim_start_matches('#'))
        .unwrap();
    for (topic, rows) in exported.as_object().unwrap() {
        let rows = rows.as_array().unwrap();
        assert!(!rows.is_empty(), "nothing of {topic} is tried");
        let fields = schema["properties"][topic]["items"]["properties"]
            .as_object()
            .unwrap();
        for row in rows {
            let row = row.as_object().unwrap();
            assert!(
                row.keys().eq(fields.keys()),
                "{topic}: {row:?}, and described: {fields:?}"
            );
            for (name, value) in row {
                let kind = match value {
                    Value::Null => "null",
                    Value::String(_) => "string",
                    Value::Number(_) => "integer",
                    Value::Array(_) => "array",
                    Value::Object(_) => "object",
                    Value::Bool(_) => "boolean",
                };
                let described = &fields[name]["type"];
                let kinds = described
                    .as_array()
                    .map_or_else(|| std::slice::from_ref(described), Vec::as_slice);
                assert!(
                    kinds.contains(&kind.into()),
                    "{topic}.{name} is {value}: {described}"
                );
            }
        }
    }
}

#[test]
fn what_answers_carry_beside_their_bodies_is_described() {
    let document = document();
    let mut repeatable = 0;
    for operation in operations(&document) {
        let responses = &operation.description["responses"];
        let takes_a_key = operation
            .parameters()
            .iter()
            .any(|(place, ..)| place.1 == "Idempotency-Key");
        let hit = &responses["201"]["headers"]["Idempotency-Hit"];
        assert_eq!(hit.is_object(), takes_a_key, "{}", operation.path);
        repeatable += usize::from(takes_a_key);
        for status in ["429", "503"] {
            let described = &responses[status];
            assert!(
                described.is_null() || described["headers"]["Retry-After"].is_object(),
                "{}: {described}",
                operation.path
            );
        }
    }
    assert_eq!(repeatable, 3);
}

impl Input {
    /// The same with one thing of somebody else, for each thing that it names.
    fn with_one_of(&self, other: &Owner) -> Vec<Self> {
        let mut inputs = Vec::new();
        for place in self.parameters.keys() {
            if let Some(theirs) = other.own(&place.1) {
                let mut input = self.clone();
                input.parameters.insert(place.clone(), theirs);
                inputs.push(input);
            }
        }
        for name in self.body.iter().filter_map(Value::as_object).flat_map(Map::keys) {
            if let (Some(theirs), Some(mut body)) = (other.own(name), self.body.clone()) {
                body[name] = theirs.into();
                inputs.push(Self {
                    body: Some(body),
                    ..self.clone()
                });
            }
        }
        inputs
    }
}
