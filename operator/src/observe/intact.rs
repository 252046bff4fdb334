//! Whether an object is as it was rendered.
//!
//! The API server adds defaults, others may add labels, annotations and containers: what was rendered only has to be *in* the
//! object. Some things are compared as a whole, because an addition changes what they mean: selectors, the ports of Services,
//! what chooses beside these who gets a Service's traffic, and what our own container is told and may do. Who adds to these adds to pods, by a webhook: no Deployment is different then.

use serde_json::{Map, Value};

/// Compared as a whole.
const EXACT: [&str; 5] = ["selector", "matchLabels", "ports", "env", "envFrom"];
/// What a pod can have of its node.
pub const OF_NODE: [&str; 5] = ["hostNetwork", "hostPID", "hostIPC", "hostUsers", "hostAliases"];
/// What decides who reaches a Service and which pods it has, beside its selector, with what the API server says if nobody does; empty
/// if nothing.
const OF_SERVICE: [(&str, &str); 5] = [
    ("internalTrafficPolicy", "Cluster"),
    ("sessionAffinity", "None"),
    ("publishNotReadyAddresses", ""),
    ("externalIPs", ""),
    ("trafficDistribution", ""),
];
/// What a container is told, also if nothing was rendered.
const TOLD: [&str; 4] = ["command", "args", "env", "envFrom"];
/// Below these are quantities, which the API server writes in its own way.
const QUANTITIES: [&str; 4] = ["requests", "limits", "sizeLimit", "divisor"];

/// Whether everything that was rendered is in the object.
pub fn contains(object: &Value, rendered: &Value) -> bool {
    within(rendered, object, false, false)
}

fn within(wanted: &Value, there: &Value, exact: bool, quantity: bool) -> bool {
    match (wanted, there) {
        (Value::Object(wanted), Value::Object(there)) => {
            let all = wanted.iter().all(|(key, value)| {
                let exact = EXACT.contains(&key.as_str());
                let quantity = quantity || QUANTITIES.contains(&key.as_str());
                let there = there.get(key).unwrap_or(&Value::Null);
                // What a container may do; nothing may be added to that.
                let closed =
                    key == "capabilities" || key == "securityContext" && wanted.contains_key("image");
                is_empty(value) && is_empty(there)
                    || within(value, there, exact, quantity) && !(closed && has_more(value, there))
            });
            all && (!exact || has_no_other(wanted, there)) && !is_told_more(wanted, there)
        }
        (Value::Array(wanted), Value::Array(there)) => {
            if exact || wanted.iter().all(|item| !item.is_object()) {
                return wanted.len() == there.len()
                    && wanted
                        .iter()
                        .zip(there)
                        .all(|(wanted, there)| within(wanted, there, false, quantity));
            }
            let found = |item: &Value| there.iter().any(|there| within(item, there, false, quantity));
            wanted.iter().all(found)
        }
        (Value::String(_) | Value::Number(_), Value::String(_) | Value::Number(_)) if quantity => {
            wanted == there || matches!((amount(wanted), amount(there)), (Some(a), Some(b)) if a == b)
        }
        _ => wanted == there,
    }
}

fn has_no_other(wanted: &Map<String, Value>, there: &Map<String, Value>) -> bool {
    there.keys().all(|key| wanted.contains_key(key))
}

/// Whether something was added that says something.
fn has_more(wanted: &Value, there: &Value) -> bool {
    let other = |(key, value): (&String, &Value)| wanted.get(key).is_none() && !is_empty(value);
    there.as_object().is_some_and(|there| there.iter().any(other))
}

/// Whether a container has been told something although nothing was rendered, a pod been given what is the node's, a
/// Service been made to choose, or a Deployment to leave its pods as they are.
fn is_told_more(wanted: &Map<String, Value>, there: &Map<String, Value>) -> bool {
    let (container, pod) = (wanted.contains_key("image"), wanted.contains_key("containers"));
    let service = wanted.contains_key("selector") && wanted.contains_key("ports");
    let workload = wanted.contains_key("selector") && wanted.contains_key("template");
    let mut others = there
        .iter()
        .filter(|(key, value)| !wanted.contains_key(*key) && !is_empty(value));
    others.any(|(key, value)| {
        let key = key.as_str();
        let chooses = |(name, default): &(&str, &str)| *name == key && value.as_str() != Some(*default);
        container && TOLD.contains(&key)
            || pod && OF_NODE.contains(&key)
            || service && OF_SERVICE.iter().any(chooses)
            || workload && key == "paused"
    })
}

/// What the API server leaves out.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// A quantity in thousandths, rounded up, as the API server keeps those of containers. Nothing if it is none, or has more digits than
/// anybody needs.
fn amount(value: &Value) -> Option<i128> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let end = text
        .find(|it: char| !it.is_ascii_digit() && !matches!(it, '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (ten, two) = match suffix {
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "" => (0, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 10),
        "Mi" => (0, 20),
        "Gi" => (0, 30),
        "Ti" => (0, 40),
        "Pi" => (0, 50),
        "Ei" => (0, 60),
        exponent => (exponent.strip_prefix(['e', 'E'])?.parse::<i32>().ok()?, 0),
    };
    let ten = ten + 3 - i32::try_from(fraction.len()).ok()?;
    let scaled = digits.checked_mul(1_i128.checked_shl(two)?)?;
    let power = 10_i128.checked_pow(ten.unsigned_abs())?;
    if ten < 0 {
        Some(scaled.checked_add(power - 1)?.div_euclid(power))
    } else {
        scaled.checked_mul(power)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantities_are_compared_as_the_api_server_keeps_them() {
        let amount = |text: &str| amount(&json!(text));
        for (declared, kept) in [
            ("0.0625", "63m"),
            ("62500u", "63m"),
            ("1n", "1m"),
            ("0.3333Gi", "357878149940m"),
            ("0.5", "500m"),
            ("1e3", "1k"),
        ] {
            assert!(amount(declared).is_some());
            assert_eq!(amount(declared), amount(kept), "{declared}");
        }
        assert_ne!(amount("62m"), amount("63m"));
    }

    #[test]
    fn what_the_api_server_adds_is_no_difference() {
        let rows = [
            ("the same", json!({"a": 1}), json!({"a": 1}), true),
            (
                "a default",
                json!({"spec": {"a": 1}}),
                json!({"spec": {"a": 1, "b": "x"}, "status": {}}),
                true,
            ),
            ("another value", json!({"a": 1}), json!({"a": 2}), false),
            ("missing", json!({"a": 1}), json!({}), false),
            (
                "left out because empty",
                json!({"a": "", "b": false, "c": []}),
                json!({}),
                true,
            ),
            (
                "a quantity in other words",
                json!({"limits": {"cpu": "0.5", "memory": 1024}}),
                json!({"limits": {"cpu": "500m", "memory": "1Ki"}}),
                true,
            ),
            (
                "another quantity",
                json!({"limits": {"cpu": "0.5"}}),
                json!({"limits": {"cpu": "501m"}}),
                false,
            ),
            (
                "text that looks like a quantity",
                json!({"value": "0.5"}),
                json!({"value": "500m"}),
                false,
            ),
            (
                "a Service as the API server completes it",
                json!({"selector": {"a": "b"}, "ports": []}),
                json!({"selector": {"a": "b"}, "clusterIP": "10.0.0.1", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None"}),
                true,
            ),
            (
                "a Service that only clients of the same node reach",
                json!({"selector": {"a": "b"}, "ports": []}),
                json!({"selector": {"a": "b"}, "internalTrafficPolicy": "Local"}),
                false,
            ),
            (
                "a Service with pods that are not ready",
                json!({"selector": {"a": "b"}, "ports": []}),
                json!({"selector": {"a": "b"}, "publishNotReadyAddresses": true}),
                false,
            ),
            (
                "a Deployment that is paused",
                json!({"selector": {"a": "b"}, "template": {}}),
                json!({"selector": {"a": "b"}, "template": {}, "paused": true}),
                false,
            ),
            (
                "a sidecar",
                json!({"containers": [{"name": "trade", "image": "a"}]}),
                json!({"containers": [{"name": "proxy"}, {"name": "trade", "image": "a"}]}),
                true,
            ),
            (
                "another image",
                json!({"containers": [{"name": "trade", "image": "a"}]}),
                json!({"containers": [{"name": "trade", "image": "b"}]}),
                false,
            ),
            (
                "arguments in another order",
                json!({"args": ["a", "b"]}),
                json!({"args": ["b", "a"]}),
                false,
            ),
            (
                "another argument",
                json!({"args": ["a"]}),
                json!({"args": ["a", "b"]}),
                false,
            ),
            (
                "a narrower selector",
                json!({"selector": {"a": "1"}}),
                json!({"selector": {"a": "1", "b": "2"}}),
                false,
            ),
            (
                "a second port",
                json!({"ports": [{"port": 80}]}),
                json!({"ports": [{"port": 80, "protocol": "TCP"}, {"port": 81}]}),
                false,
            ),
        ];
        compare(&rows);
    }

    fn compare(rows: &[(&str, Value, Value, bool)]) {
        for (name, rendered, object, expected) in rows {
            assert_eq!(contains(object, rendered), *expected, "{name}");
        }
    }

    #[test]
    fn what_a_container_is_told_and_may_do_is_as_rendered() {
        let rows = [
            (
                "a variable more",
                json!({"containers": [{"image": "a", "env": [{"name": "A", "value": "1"}]}]}),
                json!({"containers": [{"image": "a", "env": [
                    {"name": "A", "value": "1"}, {"name": "EXCHANGE_ROLE", "value": "live"},
                ]}]}),
                false,
            ),
            (
                "a default of a variable",
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]}),
                json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "a", "apiVersion": "v1"}}}]}),
                true,
            ),
            (
                "variables where there were none",
                json!({"containers": [{"image": "a"}]}),
                json!({"containers": [{"image": "a", "envFrom": [{"secretRef": {"name": "a"}}]}]}),
                false,
            ),
            (
                "another command",
                json!({"containers": [{"image": "a", "args": ["a"]}]}),
                json!({"containers": [{"image": "a", "args": ["a"], "command": ["sh"]}]}),
                false,
            ),
            (
                "more rights",
                json!({"containers": [{"image": "a", "securityContext": {"capabilities": {"drop": ["ALL"]}}}]}),
                json!({"containers": [{"image": "a", "securityContext": {
                    "capabilities": {"drop": ["ALL"]}, "privileged": true,
                }}]}),
                false,
            ),
            (
                "one right more",
                json!({"securityContext": {"capabilities": {"drop": ["ALL"]}}}),
                json!({"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}}),
                false,
            ),
            (
                "the node's network",
                json!({"containers": [{"image": "a"}]}),
                json!({"containers": [{"image": "a"}], "hostNetwork": true}),
                false,
            ),
            (
                "not the node's network",
                json!({"containers": [{"image": "a", "securityContext": {}}]}),
                json!({"containers": [{"image": "a", "securityContext": {"privileged": false}}], "hostNetwork": false}),
                true,
            ),
        ];
        compare(&rows);
    }
}
