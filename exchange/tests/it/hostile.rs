//! No input makes a service fail: for each parameter and field that the API's description has, everything that clients
//! should not send, in a request that is otherwise right.

use futures::StreamExt;
use rand::distr::{Alphanumeric, SampleString as _};
use serde_json::{Value, json};

use crate::{
    api::{Input, Operation, Owner, Place, World, document, operations},
    servers::eventually,
    whole::SECRET,
};

/// What the requests of a user who does as the description says are answered with, where that is no success.
const REFUSED: &[(&str, u16)] = &[
    ("/login", 401),
    ("/token/refresh", 401),
    ("/password", 401),
    ("/account/deposit", 403),
    ("/account/delete", 409),
    ("/market/ticker", 404),
];

/// As whom an operation is tried.
struct Guise {
    token: String,
    /// What such a caller says beside what everybody has to.
    says: Vec<(Place, String)>,
    /// What a request that is right is answered with, if that is no success.
    refused: Option<u16>,
}

/// A user, and whoever has more rights than users have.
fn guises(world: &World, path: &str, user: &Owner) -> Vec<Guise> {
    let refused = REFUSED.iter().find(|refused| refused.0 == path);
    let guise = |token: &str, headers: &[(&str, &str)], refused| Guise {
        token: token.to_owned(),
        says: headers
            .iter()
            .map(|(name, value)| (("header".to_owned(), (*name).to_owned()), (*value).to_owned()))
            .collect(),
        refused,
    };
    let as_user = guise(&user.token, &[], refused.map(|refused| refused.1));
    let lane = ("x-exchange-lane", "test-blue-local.hostile");
    let secret = ("x-exchange-lane-secret", SECRET);
    match path {
        "/account/deposit" => vec![as_user, guise(world.treasury.token(), &[], None)],
        "/lane" => vec![guise(&user.token, &[lane, secret], None)],
        "/register" => vec![as_user, guise(&user.token, &[lane, secret], None)],
        "/login" => vec![as_user, guise(&user.token, &[lane], Some(401))],
        _ => vec![as_user],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_input_makes_it_fail() {
    let world = World::start().await;
    let document = document();
    let mut tried = 0;
    for (number, operation) in operations(&document).into_iter().enumerate() {
        let path = operation.path.as_str();
        // They end what the others need, and take no input.
        if ["/user", "/logout"].contains(&path) {
            continue;
        }
        let mut user = world.user(&format!("user{number}")).await;
        world.told(&mut user, 1).await;
        for guise in guises(&world, path, &user) {
            tried += try_as(&guise, &world, &document, &operation, &user).await;
        }
    }
    assert!(tried > 1500, "only {tried} inputs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_body_is_said_with_its_field() {
    let world = World::start().await;
    let document = document();
    let user = world.user("ada").await;
    let mut bodies = 0;
    for operation in operations(&document) {
        let right = Input::of(&document, &operation, &user);
        let Some(Value::Object(fields)) = &right.body else {
            continue;
        };
        bodies += 1;
        let with = |field: &str, value: Value| {
            let mut wrong = fields.clone();
            wrong.insert(field.to_owned(), value);
            (field.to_owned(), wrong)
        };
        let mistyped = fields
            .keys()
            .flat_map(|field| [with(field, json!([])), with(field, json!({"$ne": null}))]);
        let required = operation.required_fields(&document);
        let missing = required.into_iter().map(|field| {
            let mut wrong = fields.clone();
            wrong.remove(&field).unwrap();
            (field, wrong)
        });
        for (field, body) in mistyped.chain(missing).chain([with("surprise", json!(1))]) {
            let input = Input {
                body: Some(body.into()),
                ..right.clone()
            };
            let response = world.send(&operation, &input, Some(&user.token)).await;
            let status = response.status();
            let problem: Value = response.json().await.unwrap();
            assert_eq!(
                (status.as_u16(), &problem["code"], &problem["field"]),
                (422, &json!("invalid_field"), &json!(field)),
                "{} {input:?} {problem}",
                operation.path
            );
        }
    }
    assert!(bodies > 10, "only {bodies} operations with a body");
}

/// Sends what is right and then everything that is not, and returns how much that was.
async fn try_as(
    guise: &Guise,
    world: &World,
    document: &Value,
    operation: &Operation,
    user: &Owner,
) -> usize {
    let path = operation.path.as_str();
    let right = || {
        let mut input = Input::of(document, operation, user);
        input.parameters.extend(guise.says.iter().cloned());
        input
    };
    let token = Some(guise.token.as_str());
    let answer = world.send(operation, &right(), token).await;
    let status = answer.status().as_u16();
    assert!(
        guise
            .refused
            .map_or_else(|| (200..300).contains(&status), |refused| refused == status),
        "{path} {:?} is answered with {status}: {}",
        right(),
        answer.text().await.unwrap()
    );
    drop(answer);
    let inputs = inputs(operation, right);
    let tried = inputs.len();
    let each = futures::stream::iter(inputs).for_each_concurrent(8, |input| async move {
        // A busy machine may be told to come again, and so may somebody whose last streams are still being closed; who
        // always is, is neither.
        let response = eventually("the service has time", || async {
            let response = world.send(operation, &input, token).await;
            let status = response.status().as_u16();
            (![429, 503].contains(&status)).then_some(response)
        })
        .await;
        let status = response.status().as_u16();
        let content = response.headers().get("content-type").cloned();
        if content
            .as_ref()
            .is_some_and(|content| content == "text/event-stream")
        {
            assert_eq!(status, 200, "{path} {input:?}");
            return;
        }
        let answer = response.text().await.unwrap();
        assert!(status < 500, "{path} {input:?}: {status} {answer}");
        if status >= 400 {
            assert_eq!(content.unwrap(), "application/problem+json", "{path} {input:?}");
            let problem: Value = serde_json::from_str(&answer).unwrap();
            let described = operation.description["responses"][status.to_string()]["description"].as_str();
            let code = format!("`{}`", problem["code"].as_str().unwrap());
            assert!(
                described.is_some_and(|codes| codes.contains(&code)),
                "{path} {input:?} is answered with {status} {code}, and described: {described:?}"
            );
        }
    });
    each.await;
    tried
}

/// For each parameter and field in turn each hostile value, with the others as they should be.
fn inputs(operation: &Operation, right: impl Fn() -> Input) -> Vec<Input> {
    let mut inputs = Vec::new();
    for (place, ..) in operation.parameters() {
        for hostile in hostile().iter().filter_map(Value::as_str) {
            let mut input = right();
            input.parameters.insert(place.clone(), hostile.to_owned());
            inputs.push(input);
        }
    }
    let with_body = |body: Value| Input {
        body: Some(body),
        ..right()
    };
    if let Some(Value::Object(fields)) = right().body {
        for field in fields.keys() {
            for value in hostile() {
                let mut input = right();
                if let Some(body) = &mut input.body {
                    body[field] = value;
                }
                inputs.push(input);
            }
            let mut missing = fields.clone();
            missing.remove(field);
            inputs.push(with_body(missing.into()));
        }
        inputs.extend(hostile().into_iter().map(with_body));
    }
    inputs
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
        json!("-1"),
        json!("0"),
        json!("9223372036854775807"),
        json!("999999999999999.999999999"),
        json!("0.000000001"),
        json!("-0.000000000000000000000000000001"),
        json!("9999999999999999999999999999999999999999"),
        json!("01890000-0000-7000-8000-00000000000"),
        json!("00000000-0000-0000-0000-000000000000"),
        json!("x".repeat(5000)),
        json!("ß".repeat(300)),
        // What the database cannot make shorter: an index has no room for it.
        json!(Alphanumeric.sample_string(&mut rand::rng(), 12_000)),
    ]
}
