//! The charts as Helm renders them. Needs `helm`, but no cluster: `make integration` runs it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on panics"
)]

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use exchange_operator::api::{self, ExchangeDeployment};
use kube::core::cel::{Validator, apply_defaults};
use serde::Deserialize;
use serde_json::{Value, json};

const DEFINITION: &str = "exchangedeployments.exchange.dev.yaml";

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Runs helm on a chart of ours; what it prints, or what it complains about.
fn helm(verb: &[&str], chart: &str, more: &[&str]) -> Result<String, String> {
    let output = Command::new("helm")
        .args(verb)
        .arg(repository().join("charts").join(chart))
        .args(more)
        .output()
        .unwrap_or_else(|error| panic!("helm does not start: {error}: `make integration` brings one"));
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

/// The objects of a chart, rendered for the release `shop` in the namespace `prod`.
fn render(chart: &str, more: &[&str]) -> Vec<Value> {
    let more: Vec<&str> = ["--namespace", "prod"].iter().chain(more).copied().collect();
    let text = helm(&["template", "shop"], chart, &more).unwrap_or_else(|error| panic!("{error}"));
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| !object.is_null())
        .collect()
}

fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn names(objects: &[Value]) -> BTreeSet<String> {
    let name = |object: &Value| format!("{}/{}", object["kind"], object["metadata"]["name"]);
    objects
        .iter()
        .map(|object| name(object).replace('"', ""))
        .collect()
}

const VERSION: [&str; 2] = ["--set-string", "version=1.5.0"];

#[test]
fn every_chart_passes_lint() {
    for (chart, more) in [
        ("exchange-operator", &[][..]),
        ("exchange-stores", &[]),
        ("exchange", &VERSION),
    ] {
        let more: Vec<&str> = ["--strict"].iter().chain(more).copied().collect();
        helm(&["lint"], chart, &more).unwrap_or_else(|error| panic!("{chart}: {error}"));
    }
}

#[test]
fn values_that_cannot_work_are_refused() {
    let rows: [(&str, &[&str], &str); 13] = [
        ("exchange-operator", &["--set", "replicas=0"], "replicas"),
        ("exchange-operator", &["--set", "replica=2"], "replica"),
        (
            "exchange-operator",
            &["--set", "image.digest=sha256:12"],
            "digest",
        ),
        (
            "exchange-operator",
            &["--set", "watchNamespace=A_b"],
            "watchNamespace",
        ),
        ("exchange-operator", &["--set", "crds.install=maybe"], "crds"),
        ("exchange-stores", &["--set", "nats.storage=big"], "storage"),
        (
            "exchange-stores",
            &["--set", "postgres.connections=1"],
            "connections",
        ),
        ("exchange", &[], "version"),
        ("exchange", &["--set-string", "version=1 5"], "version"),
        (
            "exchange",
            &["--set-string", "version=1", "--set", "service.user.replicas=2"],
            "service",
        ),
        (
            "exchange",
            &["--set-string", "version=1", "--set", "rollout.promtion=Manual"],
            "promtion",
        ),
        (
            "exchange",
            &["--set-string", "version=1", "--set", "services.user.replica=2"],
            "replica",
        ),
        (
            "exchange",
            &[
                "--set-string",
                "version=1",
                "--set-string",
                r"annotations.exchange\.dev/promote=x.1",
            ],
            "exchange.dev/promote",
        ),
    ];
    for (chart, more, field) in rows {
        let Err(refusal) = helm(&["template", "shop"], chart, more) else {
            panic!("{chart} takes {more:?}");
        };
        assert!(
            refusal.contains("schema") && refusal.contains(field),
            "{chart} {more:?}: {refusal}"
        );
    }
}

#[test]
fn the_chart_installs_the_definition_as_it_is_and_keeps_it() {
    let generated = fs::read_to_string(repository().join("crds").join(DEFINITION)).unwrap();
    let copy = repository()
        .join("charts/exchange-operator/files")
        .join(DEFINITION);
    assert!(
        generated == fs::read_to_string(copy).unwrap(),
        "the chart's copy is out of date: run `make crds`"
    );

    let objects = render("exchange-operator", &[]);
    let mut expected: Value = serde_yaml::from_str(&generated).unwrap();
    expected["metadata"]["annotations"] = json!({
        "argocd.argoproj.io/sync-options": "Delete=false,Prune=false",
        "helm.sh/resource-policy": "keep",
    });
    let installed: Vec<_> = of_kind(&objects, "CustomResourceDefinition").collect();
    assert!(installed == [&expected], "the definition is changed on its way");

    let without = render("exchange-operator", &["--set", "crds.install=false"]);
    assert_eq!(of_kind(&without, "CustomResourceDefinition").count(), 0);
}

#[test]
fn the_operator_may_do_what_it_needs_and_no_more() {
    let objects = render("exchange-operator", &[]);
    let roles: Vec<_> = ["ClusterRole", "Role"]
        .into_iter()
        .flat_map(|kind| of_kind(&objects, kind))
        .filter(|role| {
            role["metadata"]["labels"]
                .as_object()
                .unwrap()
                .keys()
                .all(|key| !key.contains("aggregate"))
        })
        .collect();
    assert_eq!(roles.len(), 2, "{roles:?}");
    for rule in roles.iter().flat_map(|role| role["rules"].as_array().unwrap()) {
        let text = rule.to_string();
        for never in [
            "*",
            "rbac.authorization.k8s.io",
            "impersonate",
            "escalate",
            "bind",
            "exec",
            "deletecollection",
        ] {
            assert!(!text.contains(never), "{never} in {rule}");
        }
        let resources = rule["resources"].as_array().unwrap();
        let verbs = rule["verbs"].as_array().unwrap();
        if resources.contains(&json!("exchangedeployments")) {
            assert_eq!(*verbs, ["get", "list", "watch"], "the spec is the user's");
        }
        if resources.contains(&json!("leases")) && verbs.contains(&json!("update")) {
            assert_eq!(rule["resourceNames"], json!(["shop-exchange-operator"]));
        }
    }
}

#[test]
fn an_operator_of_one_namespace_has_no_right_outside() {
    let only = ["--set", "watchNamespace=trading,userRoles.install=false"];
    let objects = render("exchange-operator", &only);
    assert_eq!(of_kind(&objects, "ClusterRole").count(), 0);
    assert_eq!(of_kind(&objects, "ClusterRoleBinding").count(), 0);
    for kind in ["Role", "RoleBinding"] {
        let places: BTreeSet<_> = of_kind(&objects, kind)
            .map(|it| it["metadata"]["namespace"].as_str().unwrap())
            .collect();
        assert_eq!(places, BTreeSet::from(["prod", "trading"]), "{kind}");
    }
    // Inside it has those that the rights test of the cluster compares with what the operator does.
    let role = |objects: &[Value], kind: &str, namespace: &Value| {
        let mut roles = of_kind(objects, kind);
        roles
            .find(|it| it["metadata"]["namespace"] == *namespace)
            .cloned()
            .unwrap()["rules"]
            .take()
    };
    let everywhere = render("exchange-operator", &["--set", "userRoles.install=false"]);
    assert_eq!(
        role(&objects, "Role", &json!("trading")),
        role(&everywhere, "ClusterRole", &Value::Null)
    );
    let operator = of_kind(&objects, "Deployment").next().unwrap();
    let environment = operator["spec"]["template"]["spec"]["containers"][0]["env"]
        .as_array()
        .unwrap();
    assert!(environment.contains(&json!({"name": "EXCHANGE_OPERATOR_NAMESPACE", "value": "trading"})));
}

#[test]
fn the_operator_runs_restricted_and_twice() {
    let digest = format!("sha256:{}", "0a".repeat(32));
    let objects = render("exchange-operator", &["--set", &format!("image.digest={digest}")]);
    let operator = of_kind(&objects, "Deployment").next().unwrap();
    assert_eq!(operator["spec"]["replicas"], 2);
    let pod = &operator["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let container = &pod["containers"][0];
    assert_eq!(
        container["securityContext"],
        json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}})
    );
    assert_eq!(
        container["image"],
        format!("ghcr.io/acme/exchange-operator@{digest}")
    );
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/livez");
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
    assert!(container["resources"]["limits"]["memory"].is_string());

    let budget = of_kind(&objects, "PodDisruptionBudget").next().unwrap();
    assert_eq!(budget["spec"]["selector"], operator["spec"]["selector"]);
    let labels = operator["spec"]["template"]["metadata"]["labels"]
        .as_object()
        .unwrap();
    for (key, value) in operator["spec"]["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(labels.get(key), Some(value));
    }
}

#[test]
fn two_releases_share_a_cluster() {
    let one = names(&render("exchange-operator", &["--set", "crds.install=false"]));
    let text = helm(
        &["template", "other"],
        "exchange-operator",
        &["--namespace", "prod", "--set", "crds.install=false"],
    );
    for name in &one {
        let name = name.split('/').nth(1).unwrap();
        assert!(
            !text.as_ref().unwrap().contains(&format!("name: {name}\n")),
            "{name} is used twice"
        );
    }
}

fn numbers(value: &Value) -> Vec<i64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        Value::Object(fields) => fields.values().flat_map(numbers).collect(),
        _ => value.as_i64().into_iter().collect(),
    }
}

/// A name may consist of digits alone, which YAML takes for a number.
#[test]
fn names_of_digits_are_names() {
    let stores = ["--set", "stores.install=true"];
    let of_one = ["--set-string", "watchNamespace=2025,priorityClassName=2025"];
    let stores: Vec<&str> = VERSION.iter().chain(&stores).copied().collect();
    for (chart, more) in [("exchange", stores.as_slice()), ("exchange-operator", &of_one)] {
        let more: Vec<&str> = more.iter().chain(&["--namespace", "2025"]).copied().collect();
        let text = helm(&["template", "2025"], chart, &more).unwrap_or_else(|error| panic!("{error}"));
        let mut named = 0;
        for document in serde_yaml::Deserializer::from_str(&text) {
            let object = Value::deserialize(document).unwrap();
            named += object.to_string().matches("\"2025\"").count();
            assert!(!numbers(&object).contains(&2025), "{chart}: {object}");
        }
        assert!(named > 0, "{chart}");
    }
}

/// Fields that are declared, and gone once they have been read.
fn unread(declared: &Value, read: &Value, path: &str) -> Vec<String> {
    let Value::Object(fields) = declared else {
        return Vec::new();
    };
    let below = fields.iter().map(|(name, value)| {
        let path = format!("{path}.{name}");
        read.get(name)
            .map_or_else(|| vec![path.clone()], |read| unread(value, read, &path))
    });
    below.flatten().collect()
}

/// What the chart makes is an object that the API server takes, with nothing in it that nobody reads.
#[test]
fn an_exchange_is_valid_as_it_is_declared() {
    let crd = serde_json::to_value(api::crd().unwrap()).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let all = [
        "--set-string",
        "version=1.5.0",
        "--set",
        "services.trade.replicas=3,rollout.promotion=Manual,rollout.verification.minRequests=1000000,suspend=true",
    ];
    for more in [&VERSION[..], &all] {
        let objects = render("exchange", more);
        assert_eq!(objects.len(), 1, "{:?}", names(&objects));
        let object = apply_defaults(schema, &objects[0]);
        Validator::new().validate(schema, &object, None).unwrap();
        let read: ExchangeDeployment = serde_json::from_value(object.clone()).unwrap();
        let read = serde_json::to_value(&read).unwrap();
        assert_eq!(
            unread(&objects[0]["spec"], &read["spec"], "spec"),
            Vec::<String>::new()
        );
        assert_eq!(
            object["spec"]["database"]["secretRef"],
            json!({"name": "shop-db", "key": "url"})
        );
        assert_eq!(object["spec"]["marketData"]["secretRef"]["name"], "shop-redis");
    }
}

/// Migrations never go to another database than the services by what is left out.
#[test]
fn the_owner_of_a_database_is_in_its_secret_unless_another_is_named() {
    let references = |values: &str| {
        let more: Vec<&str> = VERSION.iter().chain(&["--set", values]).copied().collect();
        let objects = render("exchange", &more);
        let database = &objects[0]["spec"]["database"];
        ["secretRef", "migrationSecretRef"].map(|it| database[it]["name"].as_str().unwrap().to_owned())
    };
    assert_eq!(references("suspend=false"), ["shop-db", "shop-db"]);
    assert_eq!(
        references("database.secretRef.name=prod-pg"),
        ["prod-pg", "prod-pg"]
    );
    let both = "database.secretRef.name=prod-pg,database.migrationSecretRef.name=owner";
    assert_eq!(references(both), ["prod-pg", "owner"]);
}

/// What the chart would let through, Helm 3 would drop with a warning.
#[test]
fn the_chart_knows_the_fields_of_the_api_and_no_others() {
    let crd = serde_json::to_value(api::crd().unwrap()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let chart = repository().join("charts/exchange/values.schema.json");
    let chart: Value = serde_json::from_str(&fs::read_to_string(chart).unwrap()).unwrap();
    let fields = |schema: &Value| -> BTreeSet<String> {
        schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    };
    for (ours, of_api) in [
        ("/properties/rollout", "/properties/rollout"),
        (
            "/properties/rollout/properties/verification",
            "/properties/rollout/properties/verification",
        ),
        ("/definitions/service", "/properties/services/properties/trade"),
    ] {
        let ours = chart.pointer(ours).unwrap();
        assert_eq!(fields(ours), fields(spec.pointer(of_api).unwrap()), "{of_api}");
        assert_eq!(ours["additionalProperties"], false, "{of_api}");
    }
}

/// What is left of a values file when somebody comments out all that is below it.
#[test]
fn a_rollout_without_anything_below_it_is_that_of_the_api() {
    let more = [
        &VERSION[..],
        &["--set", "stores.enabled=true", "--set", "rollout=null"],
    ]
    .concat();
    assert_eq!(
        of_kind(&render("exchange", &more), "ExchangeDeployment").count(),
        1
    );
}

/// The Secrets that an ExchangeDeployment of the same release refers to, and no two releases the same.
#[test]
fn the_stores_make_what_the_exchange_refers_to() {
    let more: Vec<&str> = VERSION
        .iter()
        .chain(&["--set", "stores.enabled=true"])
        .copied()
        .collect();
    let objects = render("exchange", &more);
    let exchange = of_kind(&objects, "ExchangeDeployment").next().unwrap();
    for (store, reference) in [
        ("database", "secretRef"),
        ("database", "migrationSecretRef"),
        ("queue", "secretRef"),
        ("marketData", "secretRef"),
    ] {
        let wanted = &exchange["spec"][store][reference];
        let secret = of_kind(&objects, "Secret")
            .find(|secret| secret["metadata"]["name"] == wanted["name"])
            .unwrap_or_else(|| panic!("{store} refers to {wanted}"));
        assert!(
            secret["stringData"][wanted["key"].as_str().unwrap()].is_string(),
            "{store}: {wanted}"
        );
    }

    let stores = names(&render("exchange-stores", &[]));
    assert!(stores.iter().all(|name| name.contains("/shop-")), "{stores:?}");

    let given = ["--set", "secrets.create=false,secrets.database=mine"];
    let objects = render("exchange-stores", &given);
    assert_eq!(of_kind(&objects, "Secret").count(), 0);
    assert!(
        serde_json::to_string(&objects)
            .unwrap()
            .contains(r#""secretKeyRef":{"key":"password","name":"mine"}"#)
    );
}

/// A rendering is the same tomorrow: with Secrets that are given, nothing is drawn by lot.
#[test]
fn a_rendering_without_new_passwords_is_repeatable() {
    for (chart, more) in [
        ("exchange-operator", &[][..]),
        ("exchange", &VERSION),
        ("exchange-stores", &["--set", "secrets.create=false"]),
    ] {
        assert_eq!(render(chart, more), render(chart, more), "{chart}");
    }
}
