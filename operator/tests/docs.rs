//! The documentation mentions what the code can say.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{collections::BTreeSet, fs, path::Path};

use exchange_operator::api;
use serde_json::Value;

fn read(path: &str) -> String {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    fs::read_to_string(repository.join(path)).unwrap()
}

/// Whether this is one word as conditions and events have it, such as `NameTaken`.
fn is_reason(word: &str) -> bool {
    word.chars().next().is_some_and(char::is_uppercase)
        && word.chars().any(char::is_lowercase)
        && word.chars().all(|letter| letter.is_ascii_alphabetic())
        && !["True", "False"].contains(&word)
}

/// What is written as a literal in the modules that tell people something.
fn reasons_in_the_code() -> BTreeSet<String> {
    let modules = ["decide", "release", "report", "swap"];
    let sources = modules.map(|module| read(&format!("operator/src/{module}.rs")));
    let literals = sources
        .iter()
        .flat_map(|source| source.split('"').skip(1).step_by(2));
    literals
        .filter(|word| is_reason(word))
        .map(str::to_owned)
        .collect()
}

/// The values that the schema of `status` lists.
fn values_in_the_schema() -> BTreeSet<String> {
    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                let listed = fields.get("enum").and_then(Value::as_array).into_iter().flatten();
                found.extend(listed.filter_map(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| collect(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let crd = serde_json::to_value(api::crd().unwrap()).unwrap();
    let status = crd
        .pointer("/spec/versions/0/schema/openAPIV3Schema/properties/status")
        .unwrap();
    let mut found = BTreeSet::new();
    collect(status, &mut found);
    found.retain(|word| is_reason(word));
    found
}

#[test]
fn the_runbook_explains_every_phase_condition_and_reason() {
    let (code, schema) = (reasons_in_the_code(), values_in_the_schema());
    for known in ["NameTaken", "RollbackAvailable", "ReleaseStarted"] {
        assert!(code.contains(known), "{known} is not found: {code:?}");
    }
    for known in ["AwaitingPromotion", "VerificationFailed", "Retained", "Retired"] {
        assert!(schema.contains(known), "{known} is not found: {schema:?}");
    }
    let runbook = read("docs/runbook.md");
    let explained =
        |word: &str| runbook.contains(&format!("`{word}`")) || runbook.contains(&format!("**{word}**"));
    let missing: Vec<_> = code.union(&schema).filter(|word| !explained(word)).collect();
    assert!(missing.is_empty(), "docs/runbook.md does not explain {missing:?}");
}
