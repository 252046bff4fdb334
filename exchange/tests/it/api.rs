//! The API as a whole: its description is current, every route has a rule, and no input makes it fail.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use exchange::release;
use reqwest::Method;
use serde_json::{Map, Value, json};

use crate::{
    servers::{Database, Postgres, Service},
    stores::{Nats, Redis},
    user::Exchange,
};

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Everybody.
    Public,
    /// The holder of an access token, and only for what is the holder's own.
    Own,
    /// The holder of the secret of the stack's test lanes.
    LaneSecret,
}

/// A route that is not here fails the test.
const RULES: &[(&str, &str, Rule)] = &[
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
    ("post", "/account/deposit", Rule::Own),
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
fn document() -> Value {
    serde_json::to_value(exchange::openapi::document(release::V2)).unwrap()
}

/// Method, path and description of each operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(move |(method, operation)| (method.clone(), path.clone(), operation.clone()))
    });
    operations.collect()
}

/// The services, by the tag of their operations.
struct Services {
    by_tag: BTreeMap<&'static str, Service>,
    _stores: (Nats, Redis),
}

async fn services(database: &Database) -> Services {
    let stores = (Nats::start(), Redis::start(None));
    let flags = [
        "--login-attempts-per-account=1000000",
        "--login-attempts-per-address=1000000",
    ];
    let (queue, market) = (stores.0.url(), stores.1.url());
    let market = ["--market-data-url", &market];
    let both = [&market[..], &["--queue-url", &queue]].concat();
    Services {
        by_tag: BTreeMap::from([
            ("user", Service::live("user", database, &flags).ready().await),
            ("trade", Service::live("trade", database, &market).ready().await),
            ("market", Service::live("trade", database, &market).ready().await),
            (
                "notification",
                Service::live("notification", database, &both).ready().await,
            ),
        ]),
        _stores: stores,
    }
}

fn service<'a>(services: &'a Services, operation: &Value) -> &'a Service {
    &services.by_tag[operation["tags"][0].as_str().unwrap()]
}

fn method(name: &str) -> Method {
    name.to_uppercase().parse().unwrap()
}

#[test]
fn the_descriptions_are_current() {
    for (release, file, target) in [
        (release::V1, "openapi.json", "exchange"),
        (release::V2, "openapi-2.json", "exchange-2"),
    ] {
        let document = exchange::openapi::document(release).to_pretty_json().unwrap() + "\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            document == committed,
            "write it anew: cargo run --bin {target} -- openapi >docs/{file}"
        );
    }
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
    for (method, path, _) in operations(&document) {
        let route = format!("`{} {path}`", method.to_uppercase());
        assert!(text.contains(&route), "{route} is missing in docs/api.md");
    }
}

#[test]
fn every_route_has_a_rule() {
    let mut described: Vec<_> = operations(&document())
        .into_iter()
        .map(|(method, path, _)| (method, path))
        .collect();
    let mut ruled: Vec<_> = RULES
        .iter()
        .map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()))
        .collect();
    described.sort();
    ruled.sort();
    assert_eq!(described, ruled);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_keeps_to_its_rule() {
    let database = Database::migrated(Postgres::shared()).await;
    let services = services(&database).await;
    let users = Exchange::over(database.clone(), &[]).await;
    let ada = users.user("ada@example.org").await;
    let bob = users.user("bob@example.org").await;
    for (name, path, operation) in operations(&document()) {
        let (_, _, rule) = *RULES
            .iter()
            .find(|rule| (rule.0, rule.1) == (&*name, &*path))
            .unwrap();
        let service = service(&services, &operation);
        let request = || service.client.request(method(&name), service.url(&path));
        let route = format!("{name} {path}");
        let requires_token = !operation["security"].is_null();
        assert_eq!(
            requires_token,
            rule == Rule::Own,
            "{route} is described otherwise"
        );
        match rule {
            Rule::Public => {
                let status = request().send().await.unwrap().status().as_u16();
                assert!(status != 401 && status != 403, "{route}: {status}");
            }
            Rule::LaneSecret => {
                let lane = request().header("x-exchange-lane", "test-blue-local.1");
                assert_eq!(lane.send().await.unwrap().status(), 403, "{route}");
            }
            Rule::Own => {
                assert_eq!(
                    request().send().await.unwrap().status(),
                    401,
                    "{route} without a token"
                );
                let noise = request().bearer_auth("a.b.c").send().await.unwrap();
                assert_eq!(noise.status(), 401, "{route} with noise for a token");
                // The event stream has no end; `streams` looks into it.
                if name == "get" && path != "/notifications/stream" {
                    let answer = request().bearer_auth(&bob.access_token).send().await.unwrap();
                    let text = answer.text().await.unwrap();
                    assert!(
                        !text.contains("ada@") && !text.contains(&ada.user_id),
                        "{route} shows others: {text}"
                    );
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_input_makes_it_fail() {
    let database = Database::migrated(Postgres::shared()).await;
    let services = services(&database).await;
    let users = Exchange::over(database, &["--login-attempts-per-account=1000000"]).await;
    let document = document();
    let mut tried = 0;
    for (name, path, operation) in operations(&document) {
        if name == "delete" && path == "/user" {
            continue;
        }
        let service = service(&services, &operation);
        // Of its own, because some operations end the session.
        let token = users.user(&format!("user{tried}@example.org")).await.access_token;
        for (parameters, body) in inputs(&document, &operation) {
            let mut url = path.clone();
            let mut request = service
                .client
                .request(method(&name), service.url("/"))
                .bearer_auth(&token);
            let mut query = Vec::new();
            for (place, parameter, value) in parameters {
                match place.as_str() {
                    "path" => url = url.replace(&format!("{{{parameter}}}"), &escaped(&value)),
                    "query" => query.push(format!("{}={}", escaped(&parameter), escaped(&value))),
                    _ => {
                        // What cannot be sent cannot do harm.
                        if let Ok(value) = http::HeaderValue::from_str(&value) {
                            request = request.header(parameter, value);
                        }
                    }
                }
            }
            if let Some(body) = &body {
                request = request.json(body);
            }
            let (client, request) = request.build_split();
            let mut request = request.unwrap();
            let separator = if query.is_empty() { "" } else { "?" };
            *request.url_mut() = service
                .url(&format!("{url}{separator}{}", query.join("&")))
                .parse()
                .unwrap();
            let response = client.execute(request).await.unwrap();
            let status = response.status().as_u16();
            assert!(
                status < 500,
                "{name} {url} {body:?}: {status} {}",
                response.text().await.unwrap()
            );
            if status >= 400 {
                assert_eq!(
                    response.headers()["content-type"],
                    "application/problem+json",
                    "{name} {url} {body:?}"
                );
                let problem: Value = response.json().await.unwrap();
                let described = operation["responses"][status.to_string()]["description"].as_str();
                let code = format!("`{}`", problem["code"].as_str().unwrap());
                assert!(
                    described.is_some_and(|codes| codes.contains(&code)),
                    "{name} {path} answers {status} {code}, and describes {described:?}"
                );
            }
            tried += 1;
        }
    }
    assert!(tried > 200, "only {tried} inputs");
}

type Input = (Vec<(String, String, String)>, Option<Value>);

/// For each parameter and field in turn a hostile value, with the others as they should be.
fn inputs(document: &Value, operation: &Value) -> Vec<Input> {
    let parameters: Vec<(String, String)> = operation["parameters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|parameter| (text(&parameter["in"]), text(&parameter["name"])))
        .collect();
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let body = (!schema.is_null()).then(|| harmless(document, schema));
    let mut inputs = vec![(Vec::new(), body.clone())];
    for (place, name) in &parameters {
        for hostile in hostile().iter().filter_map(Value::as_str) {
            inputs.push((
                vec![(place.clone(), name.clone(), hostile.to_owned())],
                body.clone(),
            ));
        }
    }
    if let Some(Value::Object(fields)) = &body {
        for field in fields.keys() {
            for value in hostile() {
                let mut changed = fields.clone();
                changed.insert(field.clone(), value);
                inputs.push((Vec::new(), Some(changed.into())));
            }
            let mut missing = fields.clone();
            missing.remove(field);
            inputs.push((Vec::new(), Some(missing.into())));
        }
        inputs.extend(hostile().into_iter().map(|value| (Vec::new(), Some(value))));
    }
    inputs
}

fn harmless(document: &Value, schema: &Value) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        return harmless(
            document,
            document.pointer(reference.trim_start_matches('#')).unwrap(),
        );
    }
    if !schema["example"].is_null() {
        return schema["example"].clone();
    }
    if let Some(values) = schema["enum"].as_array() {
        return values[0].clone();
    }
    if let Some(properties) = schema["properties"].as_object() {
        let fields = properties
            .iter()
            .map(|(name, schema)| (name.clone(), harmless(document, schema)));
        return fields.collect::<Map<_, _>>().into();
    }
    let kind = schema["type"]
        .as_array()
        .map_or(&schema["type"], |kinds| &kinds[0]);
    match (kind.as_str(), schema["format"].as_str()) {
        (Some("string"), Some("uuid")) => json!("01890000-0000-7000-8000-000000000000"),
        (Some("integer" | "number"), _) => json!(1),
        (Some("boolean"), _) => json!(true),
        (Some("array"), _) => json!([]),
        _ => json!("twelve characters"),
    }
}

fn hostile() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(-1),
        json!(1e308),
        json!(18_446_744_073_709_551_615_u64),
        json!([]),
        json!({"$ne": null}),
        json!(""),
        json!(" "),
        json!("\u{0}"),
        json!("a\u{0}b@c.d"),
        json!("\u{feff}\u{202e}\u{1f4b8}\r\n"),
        json!("'; drop table users; --"),
        json!("%00%0a/../../etc/passwd"),
        json!("NaN"),
        json!("1e400"),
        json!("-0.000000000000000000000000000001"),
        json!("9999999999999999999999999999999999999999"),
        json!("01890000-0000-7000-8000-00000000000"),
        json!("x".repeat(5000)),
        json!("ß".repeat(300)),
    ]
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
