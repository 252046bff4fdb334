//! What the definition refuses, each with what it says: one table for the schema in the unit tests and for a real API server.

mod merge;

use std::{fs, path::Path};

use serde_json::{Value, json};

pub(crate) use self::merge::merge;

/// The repository's root.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// An object of `examples/`.
pub(crate) fn example(name: &str) -> Value {
    let text = fs::read_to_string(repository().join("examples").join(name)).unwrap();
    serde_yaml::from_str(&text).unwrap()
}

/// An object that is refused.
pub(crate) struct Invalid {
    /// What is wrong with it.
    pub(crate) name: &'static str,
    /// Right, but for that.
    pub(crate) object: Value,
    /// Part of what the person reads who applies it.
    pub(crate) message: &'static str,
}

/// All of them.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(crate) fn objects() -> Vec<Invalid> {
    let service = |patch: Value| json!({"spec": {"services": {"trade": patch}}});
    let rollout = |patch: Value| json!({"spec": {"rollout": patch}});
    let cases = [
        (
            "long name",
            json!({"metadata": {"name": "a".repeat(41)}}),
            "metadata.name must be at most 40",
        ),
        (
            "digit first",
            json!({"metadata": {"name": "1exchange"}}),
            "starting with a letter",
        ),
        (
            "dot in name",
            json!({"metadata": {"name": "ex.change"}}),
            "lower-case letters, digits and '-'",
        ),
        (
            "colour in name",
            json!({"metadata": {"name": "exchange-blue"}}),
            "must not end in -blue or -green",
        ),
        (
            "no version",
            json!({"spec": {"version": null}}),
            "spec.version: Required value",
        ),
        (
            "empty version",
            json!({"spec": {"version": ""}}),
            "spec.version in body should be at least 1 chars long",
        ),
        (
            "spaces",
            json!({"spec": {"version": "1.5 beta"}}),
            "version must consist of letters",
        ),
        (
            "plus",
            json!({"spec": {"version": "1.5.0+7"}}),
            "version must consist of letters",
        ),
        (
            "tag in image",
            json!({"spec": {"image": "ghcr.io/acme/exchange:1.5"}}),
            "without tag or digest",
        ),
        (
            "digest in image",
            json!({"spec": {"image": "acme/exchange@sha256:00"}}),
            "without tag or digest",
        ),
        (
            "image in capitals",
            json!({"spec": {"image": "acme/Exchange"}}),
            "in lower case",
        ),
        (
            "image that ends early",
            json!({"spec": {"image": "acme/exchange/"}}),
            "for example ghcr.io/acme/exchange",
        ),
        (
            "digest",
            json!({"spec": {"imageDigest": "sha256:xyz"}}),
            "64 hexadecimal digits",
        ),
        (
            "no database",
            json!({"spec": {"database": null}}),
            "spec.database: Required value",
        ),
        (
            "no queue",
            json!({"spec": {"queue": null}}),
            "spec.queue: Required value",
        ),
        (
            "no market data",
            json!({"spec": {"marketData": null}}),
            "spec.marketData: Required value",
        ),
        (
            "empty secret name",
            json!({"spec": {"queue": {"secretRef": {"name": ""}}}}),
            "spec.queue.secretRef.name in body should be at least 1 chars long",
        ),
        (
            "one secret for both",
            json!({"spec": {"database": {"migrationSecretRef": {"name": "exchange-db", "key": "url"}}}}),
            "migrationSecretRef must differ from secretRef",
        ),
        (
            "no pods",
            service(json!({"replicas": 0})),
            "should be greater than or equal to 1",
        ),
        (
            "too many pods",
            service(json!({"replicas": 101})),
            "should be less than or equal to 100",
        ),
        (
            "replicas as text",
            service(json!({"replicas": "3"})),
            "spec.services.trade.replicas in body must be of type integer",
        ),
        (
            "limits crossed",
            service(json!({"replicas": 5, "autoscaling": {"minReplicas": 5, "maxReplicas": 3}})),
            "minReplicas must not be greater than maxReplicas",
        ),
        (
            "start outside the limits",
            service(json!({"replicas": 2, "autoscaling": {"minReplicas": 3, "maxReplicas": 9}})),
            "replicas must lie between",
        ),
        (
            "cpu",
            service(
                json!({"autoscaling": {"minReplicas": 1, "maxReplicas": 3, "targetCPUUtilizationPercentage": 0}}),
            ),
            "should be greater than or equal to 1",
        ),
        (
            "tag in service image",
            service(json!({"image": "acme/trade:1"})),
            "without tag or digest",
        ),
        (
            "digest without image",
            service(json!({"imageDigest": format!("sha256:{}", "0".repeat(64))})),
            "needs an image of that service",
        ),
        (
            "reserved variable",
            service(json!({"env": [{"name": "EXCHANGE_STACK_NAME"}]})),
            "the operator itself sets",
        ),
        (
            "colour of a pod",
            service(json!({"env": [{"name": "EXCHANGE_COLOUR", "value": "red"}]})),
            "the operator itself sets",
        ),
        (
            "name of a variable",
            service(json!({"env": [{"name": "1ST", "value": "x"}]})),
            "does not start with a digit",
        ),
        (
            "long value",
            service(json!({"env": [{"name": "A", "value": "x".repeat(8193)}]})),
            "spec.services.trade.env[0].value: Too long: may not be more than 8192 bytes",
        ),
        (
            "envFrom nothing",
            service(json!({"envFrom": [{"prefix": "A_"}]})),
            "exactly one configMapRef or secretRef",
        ),
        (
            "envFrom both",
            service(json!({"envFrom": [{"configMapRef": {"name": "a"}, "secretRef": {"name": "b"}}]})),
            "exactly one configMapRef or secretRef",
        ),
        (
            "files nothing",
            service(json!({"files": [{"mountPath": "/a"}]})),
            "exactly one configMap or secret",
        ),
        (
            "files both",
            service(json!({"files": [{"mountPath": "/a", "configMap": "a", "secret": "b"}]})),
            "exactly one configMap or secret",
        ),
        (
            "variable with two values",
            service(
                json!({"env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]}),
            ),
            "a value or a valueFrom, not both",
        ),
        (
            "variable from nowhere",
            service(json!({"env": [{"name": "A", "valueFrom": {}}]})),
            "valueFrom names exactly one",
        ),
        (
            "variable from two places",
            service(json!({"env": [{"name": "A", "valueFrom": {
                "secretKeyRef": {"name": "a", "key": "b"},
                "fieldRef": {"fieldPath": "metadata.name"},
            }}]})),
            "valueFrom names exactly one",
        ),
        (
            "variable from a file",
            service(json!({"env": [{"name": "A", "valueFrom": {
                "fileKeyRef": {"volumeName": "a", "path": "b", "key": "c"},
            }}]})),
            "valueFrom names exactly one",
        ),
        (
            "path with a dot",
            service(json!({"files": [{"mountPath": "/etc/./exchange/database", "configMap": "a"}]})),
            "mountPath must be an absolute path",
        ),
        (
            "relative path",
            service(json!({"files": [{"mountPath": "etc/a", "configMap": "a"}]})),
            "mountPath must be an absolute path",
        ),
        (
            "operator's path",
            service(json!({"files": [{"mountPath": "/etc/exchange/db", "configMap": "a"}]})),
            "must not be below /etc/exchange",
        ),
        (
            "folder for temporary files",
            service(json!({"files": [{"mountPath": "/tmp", "configMap": "a"}]})),
            "mountPath must not be /, /etc or /tmp",
        ),
        (
            "folder above the operator's",
            service(json!({"files": [{"mountPath": "//etc/", "configMap": "a"}]})),
            "mountPath must not be /, /etc or /tmp",
        ),
        (
            "colour",
            rollout(json!({"colour": "Red"})),
            r#"Unsupported value: "Red": supported values: "Auto", "Blue", "Green""#,
        ),
        (
            "promotion",
            rollout(json!({"promotion": "Maybe"})),
            r#"Unsupported value: "Maybe": supported values: "Automatic", "Manual""#,
        ),
        (
            "deadline",
            rollout(json!({"progressDeadline": "ten minutes"})),
            "must be a duration such as",
        ),
        (
            "negative deadline",
            rollout(json!({"progressDeadline": "-10m"})),
            "must be a duration such as",
        ),
        (
            "bare number",
            rollout(json!({"progressDeadline": "600"})),
            "must be a duration such as",
        ),
        (
            "retention in words",
            rollout(json!({"retention": "an hour"})),
            "retention must be a duration such as",
        ),
        (
            "retention in days",
            rollout(json!({"retention": "1d"})),
            "retention must be a duration such as",
        ),
        (
            "drain with a space",
            rollout(json!({"drainTimeout": "5 m"})),
            "drainTimeout must be a duration such as",
        ),
        (
            "verified for nothing",
            rollout(json!({"verification": {"duration": ""}})),
            "duration must be a duration such as",
        ),
        (
            "latency without unit",
            rollout(json!({"verification": {"maxLatencyP99": "0.5"}})),
            "maxLatencyP99 must be a duration such as",
        ),
        (
            "time for a test in capitals",
            rollout(json!({"smokeTests": [{"name": "a", "command": ["a"], "timeout": "5M"}]})),
            "timeout must be a duration such as",
        ),
        (
            "short deadline",
            rollout(json!({"progressDeadline": "9s"})),
            "must lie between 10s and 24h",
        ),
        (
            "retention",
            rollout(json!({"retention": "721h"})),
            "retention must be at most 720h",
        ),
        (
            "drain",
            rollout(json!({"drainTimeout": "25h"})),
            "drainTimeout must lie between 10s and 24h",
        ),
        (
            "rate",
            rollout(json!({"verification": {"maxErrorRate": "101%"}})),
            "between 0% and 100%",
        ),
        (
            "rate without sign",
            rollout(json!({"verification": {"maxErrorRate": "1"}})),
            "between 0% and 100%",
        ),
        (
            "latency",
            rollout(json!({"verification": {"maxLatencyP99": "2m"}})),
            "must lie between 1ms and 60s",
        ),
        (
            "duration",
            rollout(json!({"verification": {"duration": "25h"}})),
            "must lie between 1s and 24h",
        ),
        (
            "no duration",
            rollout(json!({"verification": {"duration": "0s"}})),
            "must lie between 1s and 24h",
        ),
        (
            "requests",
            rollout(json!({"verification": {"minRequests": 0}})),
            "should be greater than or equal to 1",
        ),
        (
            "image of a test",
            rollout(json!({"smokeTests": [{"name": "a", "command": ["a"], "image": "acme/My Tests:1"}]})),
            "image of a test must be a repository",
        ),
        (
            "image of a test without tag and digest",
            rollout(
                json!({"smokeTests": [{"name": "a", "command": ["a"], "image": "ghcr.io:443/acme/tests"}]}),
            ),
            "with a tag or a digest",
        ),
        (
            "name of a test",
            rollout(json!({"smokeTests": [{"name": "My Test", "command": ["a"]}]})),
            "consists of lower-case letters",
        ),
        (
            "taken name",
            rollout(json!({"smokeTests": [{"name": "smoke", "command": ["a"]}]})),
            "the operator's own Jobs",
        ),
        (
            "no command",
            rollout(json!({"smokeTests": [{"name": "a", "command": []}]})),
            "spec.rollout.smokeTests[0].command in body should have at least 1 items",
        ),
        (
            "test timeout",
            rollout(json!({"smokeTests": [{"name": "a", "command": ["a"], "timeout": "0s"}]})),
            "must lie between 1s and 24h",
        ),
    ];
    let invalid = |(name, patch, message)| {
        let mut object = example("minimal.yaml");
        merge(&mut object, &patch);
        Invalid {
            name,
            object,
            message,
        }
    };
    cases.into_iter().map(invalid).collect()
}

/// The status of an exchange that is live.
pub(crate) fn live() -> Value {
    json!({"status": {"attempt": 1, "epoch": 1, "phase": "Live", "live": {
        "colour": "blue", "revision": "12345678", "version": "1.4.0", "attempt": 1, "since": "2026-01-01T00:00:00Z"}}})
}

/// Changes that are refused once it is live, and their messages.
pub(crate) fn changes() -> Vec<(Value, &'static str)> {
    vec![
        (
            json!({"spec": {"database": {"secretRef": {"name": "other"}}}}),
            "spec.database.secretRef cannot be changed",
        ),
        (
            json!({"spec": {"database": {"secretRef": {"key": "other"}}}}),
            "spec.database.secretRef cannot be changed",
        ),
        (
            json!({"spec": {"queue": {"secretRef": {"name": "other"}}}}),
            "spec.queue.secretRef cannot be changed",
        ),
        (
            json!({"spec": {"marketData": {"secretRef": {"name": "other"}}}}),
            "spec.marketData.secretRef cannot be changed",
        ),
    ]
}
