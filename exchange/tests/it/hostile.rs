//! No input makes a service fail: for each parameter and field that the API's description has, everything that clients
//! should not send, in a request that is otherwise right.

use futures::StreamExt;
use serde_json::{Value, json};

use crate::{
    api::{Input, Operation, World, document, operations},
    servers::eventually,
};

/// What the requests of a user who does as the description says are answered with, where that is no success.
const REFUSED: &[(&str, u16)] = &[
    ("/login", 401),
    ("/token/refresh", 401),
    ("/password", 401),
    ("/lane", 400),
    ("/account/deposit", 403),
    ("/account/delete", 409),
    ("/market/ticker", 404),
];

#[tokio::test(flavor = "multi_thread")]
async fn no_input_makes_it_fail() {
    let world = World::start().await;
    let document = document();
    let mut tried = 0;
    for (number, operation) in operations(&document).into_iter().enumerate() {
        let path = operation.path.as_str();
        // They end what the others need, and take no input.
        if ["/user", "/logout", "/notifications/stream"].contains(&path) {
            continue;
        }
        let mut user = world.user(&format!("user{number}")).await;
        world.told(&mut user, 1).await;
        let right = || Input::of(&document, &operation, &user);
        let token = Some(user.token.as_str());
        let answer = world.send(&operation, &right(), token).await;
        let refused = REFUSED.iter().find(|refused| refused.0 == path);
        let status = answer.status().as_u16();
        assert!(
            refused.map_or_else(|| (200..300).contains(&status), |refused| refused.1 == status),
            "{path} {:?} is answered with {status}: {}",
            right(),
            answer.text().await.unwrap()
        );
        let inputs = inputs(&operation, right);
        tried += inputs.len();
        let (operation, world) = (&operation, &world);
        let each = futures::stream::iter(inputs).for_each_concurrent(8, |input| async move {
            // A busy machine may be told to come again; one that always is, is not busy.
            let response = eventually("the service has time", || async {
                let response = world.send(operation, &input, token).await;
                (response.status() != 503).then_some(response)
            })
            .await;
            let status = response.status().as_u16();
            let content = response.headers().get("content-type").cloned();
            let answer = response.text().await.unwrap();
            assert!(status < 500, "{path} {input:?}: {status} {answer}");
            if status >= 400 {
                assert_eq!(content.unwrap(), "application/problem+json", "{path} {input:?}");
                let problem: Value = serde_json::from_str(&answer).unwrap();
                let described =
                    operation.description["responses"][status.to_string()]["description"].as_str();
                let code = format!("`{}`", problem["code"].as_str().unwrap());
                assert!(
                    described.is_some_and(|codes| codes.contains(&code)),
                    "{path} {input:?} is answered with {status} {code}, and described: {described:?}"
                );
            }
        });
        each.await;
    }
    assert!(tried > 1000, "only {tried} inputs");
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
    ]
}
