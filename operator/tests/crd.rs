//! The CustomResourceDefinition: kept current, accepts the examples, and says what is wrong with everything else.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod invalid;

use std::{collections::BTreeSet, fs};

use exchange_operator::{
    api::{self, ExchangeDeployment},
    status::Phase,
};
use kube::core::cel::{Validator, apply_defaults};
use serde_json::{Value, json};

use invalid::{example, merge, repository};

fn schema() -> Value {
    let crd = serde_json::to_value(api::crd().unwrap()).unwrap();
    crd.pointer("/spec/versions/0/schema/openAPIV3Schema")
        .unwrap()
        .clone()
}

/// Checks a value like the API server: defaults first, then limits, then rules.
fn complaints(schema: &Value, object: &Value, old: Option<&Value>) -> Vec<String> {
    let object = apply_defaults(schema, object);
    let mut found = Vec::new();
    limits(schema, &object, "", &mut found);
    // As the API server does: rules are not evaluated on what does not have the right shape.
    if found.is_empty()
        && let Err(errors) = Validator::new().validate(schema, &object, old)
    {
        found.extend(errors.as_slice().iter().map(|error| error.message.clone()));
    }
    found
}

/// The API server's words, as its library of OpenAPI has them: `schema.rs` of the tests on a cluster holds both to it.
fn limits(schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    let path = path.trim_start_matches('.');
    let mut complain = |what: String| found.push(format!("{path}{what}"));
    let limit = |name: &str| schema.get(name).and_then(Value::as_u64);
    let size = match value {
        Value::String(text) => Some((text.chars().count(), "Length")),
        Value::Array(items) => Some((items.len(), "Items")),
        _ => None,
    };
    if let Some((size, what)) = size {
        let size = u64::try_from(size).unwrap();
        if let Some(max) = limit(&format!("max{what}")).filter(|max| size > *max) {
            complain(match what {
                "Length" => format!(": Too long: may not be more than {max} bytes"),
                _ => format!(": Too many: {size}: must have at most {max} items"),
            });
        }
        if let Some(min) = limit(&format!("min{what}")).filter(|min| size < *min) {
            complain(match what {
                "Length" => format!(" in body should be at least {min} chars long"),
                _ => format!(" in body should have at least {min} items"),
            });
        }
    }
    if let Some(number) = value.as_f64() {
        let limit = |name: &str| schema.get(name).and_then(Value::as_f64);
        if let Some(max) = limit("maximum").filter(|max| number > *max) {
            complain(format!(" in body should be less than or equal to {max}"));
        }
        if let Some(min) = limit("minimum").filter(|min| number < *min) {
            complain(format!(" in body should be greater than or equal to {min}"));
        }
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        let allowed = allowed.join(", ");
        complain(format!(
            ": Unsupported value: {value}: supported values: {allowed}"
        ));
    }
    let shape = match value {
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::Null => "null",
    };
    if let Some(kind) = schema.get("type").and_then(Value::as_str)
        && kind != shape
    {
        complain(format!(" in body must be of type {kind}: \"{shape}\""));
    }
    for name in schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let name = name.as_str().unwrap();
        if value.is_object() && value.get(name).is_none() {
            let dot = if path.is_empty() { "" } else { "." };
            complain(format!("{dot}{name}: Required value"));
        }
    }
    for (name, schema) in schema
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        if let Some(value) = value.get(name) {
            limits(schema, value, &format!("{path}.{name}"), found);
        }
    }
    if let (Some(schema), Some(items)) = (schema.get("items"), value.as_array()) {
        for (index, item) in items.iter().enumerate() {
            limits(schema, item, &format!("{path}[{index}]"), found);
        }
    }
}

#[test]
fn the_generated_definition_is_current() {
    let kept = fs::read_to_string(repository().join("crds/exchangedeployments.exchange.dev.yaml")).unwrap();
    assert!(
        kept == api::crd_yaml().unwrap(),
        "crds/ is stale: cargo run -p exchange-operator -- crd > crds/exchangedeployments.exchange.dev.yaml"
    );
}

#[test]
fn the_definition_is_structural_and_documented() {
    fn walk(schema: &Value, path: &str) {
        for forbidden in ["anyOf", "oneOf", "allOf", "$ref", "nullable"] {
            let int_or_string = schema.get("x-kubernetes-int-or-string").is_some();
            assert!(
                schema.get(forbidden).is_none() || int_or_string,
                "{path} has {forbidden}"
            );
        }
        for (name, property) in schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let path = format!("{path}.{name}");
            let known = [".metadata", ".apiVersion", ".kind"].contains(&path.as_str());
            assert!(
                known || property.get("description").is_some(),
                "{path} is not documented"
            );
            // Two colours explain themselves; what the API server's own types allow, it says itself.
            for value in property
                .get("enum")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let meaning = format!("{}: ", value.as_str().unwrap());
                let description = property["description"].as_str().unwrap();
                assert!(
                    path.ends_with(".colour") || description.contains(&meaning),
                    "{path} does not say what {meaning} means"
                );
            }
            walk(property, &path);
        }
        if let Some(items) = schema.get("items") {
            walk(items, &format!("{path}[]"));
        }
    }
    walk(&schema(), "");
}

#[test]
fn examples_are_valid() {
    let schema = schema();
    let mut seen = 0;
    for entry in fs::read_dir(repository().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let value = example(&name);
        assert_eq!(complaints(&schema, &value, None), Vec::<String>::new(), "{name}");
        let object: ExchangeDeployment = serde_json::from_value(value.clone()).unwrap();
        object.validate_cel().unwrap();
        // With the stores of the chart the services' role may not migrate.
        assert!(object.spec.database.migration_secret_ref.is_some(), "{name}");
        // Nothing in the file is unknown to the schema: all of it survives a round trip.
        let mut expected = serde_json::to_value(&object).unwrap();
        let written = expected.clone();
        merge(&mut expected, &value);
        normalise(&mut expected);
        let mut written = written;
        normalise(&mut written);
        assert_eq!(written, expected, "{name}");
        seen += 1;
    }
    assert!(seen >= 3);
}

/// Durations are written differently from how they are read.
fn normalise(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Ok(duration) = text.parse::<kube::core::Duration>() {
                *text = duration.to_string();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(normalise),
        Value::Object(map) => map.values_mut().for_each(normalise),
        _ => {}
    }
}

#[test]
fn defaults_are_in_the_schema_and_the_same_as_in_the_types() {
    let minimal = example("minimal.yaml");
    let defaulted: ExchangeDeployment = serde_json::from_value(apply_defaults(&schema(), &minimal)).unwrap();
    let parsed: ExchangeDeployment = serde_json::from_value(minimal).unwrap();
    assert_eq!(defaulted.spec, parsed.spec);
    // Of no generation yet: kstatus would take an object without any status for done.
    let status = defaulted.status.unwrap();
    assert_eq!(
        (status.observed_generation, status.phase),
        (Some(0), Phase::Pending)
    );
    insta::assert_yaml_snapshot!("defaults", parsed.spec);
}

#[test]
fn every_invalid_object_gets_a_message_for_people() {
    let schema = schema();
    for case in invalid::objects() {
        let found = complaints(&schema, &case.object, None);
        assert!(
            found.iter().any(|message| message.contains(case.message)),
            "{}: {found:?}",
            case.name
        );
    }
}

/// What is recorded of the spec goes through the same rules, in the words of the operator.
#[test]
fn what_may_be_declared_may_be_recorded() {
    let schema = schema();
    let rows = [
        ("1s", "1ms", "0%"),
        ("1001ms", "1.5ms", "100%"),
        ("0.5h", "59999ms", "0.001%"),
        ("1h30m", "60s", "1%"),
        ("24h", "1m", "99.999%"),
    ];
    for (duration, latency, errors) in rows {
        let verification = json!({"duration": duration, "maxLatencyP99": latency, "maxErrorRate": errors});
        let mut object = example("minimal.yaml");
        object["spec"]["rollout"] = json!({"verification": verification});
        let object = apply_defaults(&schema, &object);
        assert_eq!(complaints(&schema, &object, None), Vec::<String>::new());
        let mut recorded: ExchangeDeployment = serde_json::from_value(object).unwrap();
        recorded.status.as_mut().unwrap().verification = Some(recorded.spec.rollout.verification.clone());
        let recorded = serde_json::to_value(&recorded).unwrap();
        assert_eq!(
            complaints(&schema, &recorded, None),
            Vec::<String>::new(),
            "{recorded:#}"
        );
    }
}

/// What the rules of a schema say, at any depth.
fn rules<'v>(schema: &'v Value, found: &mut BTreeSet<&'v str>) {
    let own = schema.get("x-kubernetes-validations").and_then(Value::as_array);
    found.extend(
        own.into_iter()
            .flatten()
            .filter_map(|rule| rule["message"].as_str()),
    );
    match schema {
        Value::Array(items) => items.iter().for_each(|item| rules(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| rules(field, found)),
        _ => {}
    }
}

/// A rule without a row in the tables could be one that never complains, and nobody would know.
#[test]
fn every_rule_refuses_something() {
    let schema = schema();
    let mut told: Vec<String> = Vec::new();
    for case in invalid::objects() {
        told.extend(complaints(&schema, &case.object, None));
    }
    let mut live = apply_defaults(&schema, &example("minimal.yaml"));
    merge(&mut live, &invalid::live());
    for (patch, _) in invalid::changes() {
        let mut changed = live.clone();
        merge(&mut changed, &patch);
        told.extend(complaints(&schema, &changed, Some(&live)));
    }
    let mut silent = BTreeSet::new();
    rules(&schema, &mut silent);
    assert!(silent.len() > 30, "{silent:#?}");
    silent.retain(|rule| !told.iter().any(|complaint| complaint.contains(rule)));
    assert_eq!(silent, BTreeSet::new());
}

/// The status of an exchange whose first version is about to be live.
fn promoting() -> Value {
    json!({"status": {"attempt": 1, "epoch": 1, "phase": "Promoting", "candidate": {
        "colour": "blue", "revision": "12345678", "version": "1.4.0", "attempt": 1, "gates": "12345678"}}})
}

#[test]
fn what_is_unsafe_under_a_live_exchange_cannot_be_changed() {
    let schema = schema();
    let old = apply_defaults(&schema, &example("minimal.yaml"));
    let with = |status: Value| {
        let mut object = old.clone();
        merge(&mut object, &status);
        object
    };
    let live = with(invalid::live());
    for (patch, expected) in invalid::changes() {
        for before in [&live, &with(promoting())] {
            let mut changed = before.clone();
            merge(&mut changed, &patch);
            let found = complaints(&schema, &changed, Some(before));
            assert!(
                found.iter().any(|message| message.contains(expected)),
                "{expected}: {found:?}"
            );
        }
        let mut early = old.clone();
        merge(&mut early, &patch);
        assert_eq!(
            complaints(&schema, &early, Some(&old)),
            Vec::<String>::new(),
            "before anything is live"
        );
    }
    let mut release = live.clone();
    merge(&mut release, &json!({"spec": {"version": "1.5.0"}}));
    assert_eq!(complaints(&schema, &release, Some(&live)), Vec::<String>::new());
}
