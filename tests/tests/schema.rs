//! The definition on a real API server: it refuses what the unit tests' schema refuses, with the same words.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../../operator/tests/invalid/mod.rs"]
mod invalid;

use std::io::Write;

use serde_json::{Value, json};
use testbed::{kubectl::Namespace, story::Ground};

use invalid::{example, merge};

/// What `kubectl apply --dry-run=server` says.
fn verdict(ground: &Ground, namespace: &str, object: &Value) -> Result<String, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(object.to_string().as_bytes()).unwrap();
    let args = [
        "apply",
        "--dry-run=server",
        "--namespace",
        namespace,
        "--filename",
        file.path().to_str().unwrap(),
    ];
    ground.session.kubectl(&args).map_err(|error| error.to_string())
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_real_api_server_refuses_the_same() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "schema").unwrap();
    let mut right = example("minimal.yaml");
    merge(&mut right, &json!({"metadata": {"namespace": null}}));
    verdict(&ground, &namespace.name, &right).unwrap();
    let mut wrong = Vec::new();
    for mut case in invalid::objects() {
        merge(&mut case.object, &json!({"metadata": {"namespace": null}}));
        match verdict(&ground, &namespace.name, &case.object) {
            Err(message) if message.contains(case.message) => {}
            other => wrong.push(format!("{}: {:?} instead of {}", case.name, other, case.message)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Nothing is live yet: everything may be changed. Then it is, as far as the record says; suspended, the operator starts
    // nothing that could change that, and each of its writes carries the version of an object that it has read.
    merge(&mut right, &json!({"spec": {"suspend": true}}));
    ground.session.apply(&namespace.name, &right).unwrap();
    let changed = |patch: &Value| {
        let mut object = right.clone();
        merge(&mut object, patch);
        verdict(&ground, &namespace.name, &object)
    };
    for (patch, _) in invalid::changes() {
        changed(&patch).unwrap();
    }
    let name = right.pointer("/metadata/name").and_then(Value::as_str).unwrap();
    let patch = [
        "patch",
        "exd",
        name,
        "--subresource=status",
        "--type=merge",
        "--namespace",
        &namespace.name,
    ];
    let status = invalid::live().to_string();
    ground
        .session
        .kubectl(&[&patch[..], &["--patch", &status]].concat())
        .unwrap();
    for (patch, message) in invalid::changes() {
        let refusal = changed(&patch).unwrap_err();
        assert!(refusal.contains(message), "{refusal}");
    }
    changed(&json!({"spec": {"version": "1.5.0"}})).unwrap();
}
