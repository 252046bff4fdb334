//! What is created, as it is sent: snapshots, and the rules that each object has to keep.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on panics"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use exchange_operator::{
    api::{ExchangeDeployment, ExchangeDeploymentSpec as Spec, Service},
    observe::{Job, JobKind, Part},
    resources::{Beside, Builder, autoscaling, job_word},
    revision::{Source, sources},
    status::{Colour, Live, Scale, Stack},
};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    autoscaling::v2::HorizontalPodAutoscaler,
    batch::v1::Job as BatchJob,
    core::v1::{ConfigMap, Secret, Service as CoreService, ServiceAccount},
    policy::v1::PodDisruptionBudget,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

const BUILDER: Builder<'_> = Builder {
    name: "exchange",
    namespace: "prod",
    uid: "8d0ae1d4-3d6c-4d1c-8a59-1d2a8e1c9d10",
};

fn example(name: &str) -> Spec {
    let path = format!("{}/../examples/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    serde_yaml::from_str::<ExchangeDeployment>(&fs::read_to_string(path).unwrap())
        .unwrap()
        .spec
}

fn stack() -> Stack {
    Stack {
        colour: Colour::Green,
        revision: "0123456789".to_owned(),
    }
}

fn jobs() -> Vec<Job> {
    let test = JobKind::Test("reconcile-ledger".to_owned());
    let kinds = [
        JobKind::Expand,
        JobKind::Smoke,
        test,
        JobKind::Verify,
        JobKind::Contract,
    ];
    kinds
        .map(|kind| Job {
            kind,
            stack: stack(),
            attempt: 7,
        })
        .to_vec()
}

/// Everything that is created for an example, under a name.
fn everything(spec: &Spec) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    let rendered = BUILDER.render(spec, &stack(), sources(spec).keys());
    let of = rendered.clone();
    all.insert(
        "controllerrevision".to_owned(),
        BUILDER.controller_revision(&stack(), 7, &rendered),
    );
    for ((service, part), object) in rendered.objects {
        all.insert(format!("{service}-{part:?}").to_lowercase(), object);
    }
    for service in Service::ALL {
        all.insert(
            format!("{service}-account"),
            BUILDER.service_account(&stack(), service),
        );
        all.insert(
            format!("live-{service}"),
            BUILDER.live_service(service, Some(&stack()), 3),
        );
        let live = Live {
            stack: stack(),
            version: spec.version.clone(),
            attempt: 7,
            since: Timestamp::UNIX_EPOCH,
            smoke_passed: true,
            verified: true,
            contracted: true,
            contract_failed: None,
            unserved_since: None,
            scale: Some(Scale::declared(spec)),
        };
        if let Some(object) = BUILDER.autoscaler(&live, service) {
            all.insert(format!("{service}-autoscaler"), object);
        }
    }
    all.insert(
        "live-nothing".to_owned(),
        BUILDER.live_service(Service::Trade, None, 0),
    );
    all.insert(
        "lane".to_owned(),
        BUILDER.lane_secret(&stack(), "drawn at random"),
    );
    for source in sources(spec).into_keys() {
        let content = json!({"data": {"key": "dmFsdWU="}});
        let copy = BUILDER.copy(&stack(), &source, content.as_object().unwrap());
        let (Source::ConfigMap(name) | Source::Secret(name)) = &source;
        all.insert(format!("copy-{name}"), copy);
    }
    for job in jobs() {
        if let Some(object) = BUILDER.job(
            spec,
            Some(&of),
            &job,
            &Beside {
                database: Some("0190b5a2-5f3c-7cc2-9f5a-4f6f6f6f6f6f"),
                ..Beside::default()
            },
        ) {
            all.insert(format!("job-{}", job_word(&job.kind)), object);
        }
    }
    all
}

#[test]
fn the_minimal_exchange() {
    let all = everything(&example("minimal"));
    for name in [
        "trade-workload",
        "trade-colourservice",
        "trade-budget",
        "live-trade",
        "live-nothing",
        "trade-account",
    ] {
        insta::assert_yaml_snapshot!(format!("minimal-{name}"), all.get(name).unwrap());
    }
}

#[test]
fn the_full_exchange() {
    let all = everything(&example("full"));
    let names = [
        "trade-workload",
        "notification-workload",
        "user-workload",
        "trade-autoscaler",
        "lane",
        "copy-exchange-fees",
        "copy-exchange-smtp",
        "job-expand",
        "job-smoke",
        "job-verify",
        "job-contract",
        "job-reconcile-ledger",
    ];
    for name in names {
        insta::assert_yaml_snapshot!(format!("full-{name}"), all.get(name).unwrap());
    }
}

/// A field that the API does not have, or has with another type, does not survive.
fn survives<T: DeserializeOwned + Serialize>(name: &str, object: &Value) {
    let typed: T = serde_json::from_value(object.clone()).unwrap_or_else(|why| panic!("{name}: {why}"));
    assert_eq!(serde_json::to_value(typed).unwrap(), *object, "{name}");
}

#[test]
fn every_field_exists_in_the_api() {
    for example in ["minimal", "full"].map(example) {
        for (name, object) in everything(&example) {
            match object["kind"].as_str().unwrap() {
                "Deployment" => survives::<Deployment>(&name, &object),
                "Service" => survives::<CoreService>(&name, &object),
                "PodDisruptionBudget" => survives::<PodDisruptionBudget>(&name, &object),
                "HorizontalPodAutoscaler" => survives::<HorizontalPodAutoscaler>(&name, &object),
                "ServiceAccount" => survives::<ServiceAccount>(&name, &object),
                "ControllerRevision" => survives::<ControllerRevision>(&name, &object),
                "ConfigMap" => survives::<ConfigMap>(&name, &object),
                "Secret" => survives::<Secret>(&name, &object),
                "Job" => survives::<BatchJob>(&name, &object),
                other => panic!("{name}: {other}"),
            }
        }
    }
}

#[test]
fn every_object_is_owned_labelled_and_has_a_valid_name() {
    for (name, object) in everything(&example("full")) {
        let metadata = &object["metadata"];
        assert_eq!(metadata["ownerReferences"][0]["controller"], true, "{name}");
        assert_eq!(
            metadata["labels"]["app.kubernetes.io/managed-by"], "exchange-operator",
            "{name}"
        );
        assert!(metadata["name"].as_str().unwrap().len() <= 253, "{name}");
        for (key, value) in metadata["labels"].as_object().unwrap() {
            assert!(value.as_str().unwrap().len() <= 63, "{name}: label {key}");
        }
    }
}

#[test]
fn names_fit_also_for_the_longest_name() {
    let name = "e".repeat(40);
    let builder = Builder {
        name: &name,
        ..BUILDER
    };
    for service in Service::ALL {
        assert!(builder.live_name(service).len() <= 63);
        assert!(builder.colour_name(&stack(), service).len() <= 63);
    }
    let mut seen = BTreeSet::new();
    for attempt in [1, 2, 4_000_000_000] {
        for job in jobs() {
            let name = builder.job_name(&Job { attempt, ..job });
            assert!(name.len() <= 63, "{name}");
            assert!(seen.insert(name), "two Jobs of one name");
        }
    }
}

#[test]
fn pods_are_restricted() {
    for (name, object) in everything(&example("full")) {
        let Some(pod) = object.pointer("/spec/template/spec") else {
            continue;
        };
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
            "{name}"
        );
        assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
        for container in pod["containers"].as_array().unwrap() {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "{name}");
        }
    }
}

#[test]
fn each_service_has_an_account_of_its_own_that_may_do_nothing() {
    let all = everything(&example("full"));
    let mut names = BTreeSet::new();
    for service in Service::ALL {
        let account = &all[&format!("{service}-account")];
        let pod = &all[&format!("{service}-workload")]["spec"]["template"]["spec"];
        assert_eq!(
            pod["serviceAccountName"], account["metadata"]["name"],
            "{service}"
        );
        assert_eq!(account["automountServiceAccountToken"], false, "{service}");
        names.insert(account["metadata"]["name"].to_string());
    }
    assert_eq!(names.len(), 3, "{names:?}");
}

/// A quota asks for both, and nodes may be tainted or of several architectures.
#[test]
fn jobs_run_where_the_trade_service_does_and_say_what_they_need() {
    let all = everything(&example("full"));
    let pod = |name: &str| all[name]["spec"]["template"]["spec"].clone();
    let trade = pod("trade-workload");
    for job in ["expand", "smoke", "verify", "contract", "reconcile-ledger"] {
        let pod = pod(&format!("job-{job}"));
        for field in ["tolerations", "priorityClassName", "nodeSelector"] {
            // An image of its own may be of another architecture.
            let own = field == "nodeSelector" && job == "reconcile-ledger";
            let expected = if own { &Value::Null } else { &trade[field] };
            assert_eq!(&pod[field], expected, "{job}: {field}");
        }
        let resources = &pod["containers"][0]["resources"];
        for (kind, what) in [
            ("requests", "cpu"),
            ("requests", "memory"),
            ("limits", "cpu"),
            ("limits", "memory"),
        ] {
            assert!(resources[kind][what].is_string(), "{job}: {kind}.{what}");
        }
    }
    let own = &pod("job-reconcile-ledger")["containers"][0]["resources"];
    assert_eq!(own["limits"]["memory"], "1Gi");
}

#[test]
fn selectors_are_never_empty_and_name_colour_and_revision() {
    for (name, object) in everything(&example("full")) {
        if object["kind"] != "Service" {
            continue;
        }
        let selector = object["spec"]["selector"].as_object().unwrap();
        for key in [
            "app.kubernetes.io/component",
            "exchange.dev/colour",
            "exchange.dev/revision",
        ] {
            assert!(selector.contains_key(key), "{name} does not select by {key}");
        }
        assert_eq!(object["spec"]["ports"].as_array().unwrap().len(), 1, "{name}");
    }
}

#[test]
fn only_migrations_get_the_owner_of_the_database() {
    for (name, object) in everything(&example("full")) {
        let Some(pod) = object.pointer("/spec/template/spec") else {
            continue;
        };
        let owner = pod.to_string().contains("owner-url");
        assert_eq!(
            owner,
            ["job-expand", "job-contract"].contains(&name.as_str()),
            "{name}"
        );
    }
}

/// Variables set here count for more than those of `envFrom`, which may have any.
#[test]
fn pods_follow_their_live_service_whatever_their_sources_say() {
    let rendered = BUILDER.render(&example("full"), &stack(), []);
    for service in Service::ALL {
        let workload = rendered.objects.get(&(service, Part::Workload)).unwrap();
        let env = &workload["spec"]["template"]["spec"]["containers"][0]["env"];
        for (name, value) in [
            ("EXCHANGE_ROLE", "follow"),
            ("EXCHANGE_PUBLIC_ADDRESS", "0.0.0.0:8080"),
            ("EXCHANGE_ADMIN_ADDRESS", "0.0.0.0:9090"),
        ] {
            let wanted = json!({"name": name, "value": value});
            assert!(env.as_array().unwrap().contains(&wanted), "{service}: {name}");
        }
    }
}

#[test]
fn an_autoscaler_is_read_back_as_it_was_declared() {
    let spec = example("full");
    let written = everything(&spec)["trade-autoscaler"].clone();
    let mut there: HorizontalPodAutoscaler = serde_json::from_value(written).unwrap();
    let declared = spec.services.trade.autoscaling;
    assert!(declared.is_some());
    assert_eq!(autoscaling(&there), declared);
    // What people have made of it, and nobody can declare, could not be recorded.
    there.spec.max_replicas = 500;
    assert_eq!(autoscaling(&there).unwrap().max_replicas, 100);
}

#[test]
fn pods_use_the_copies_of_what_they_refer_to() {
    let rendered = BUILDER.render(&example("full"), &stack(), []);
    let trade = rendered
        .objects
        .get(&(Service::Trade, Part::Workload))
        .unwrap()
        .to_string();
    assert!(trade.contains("\"exchange-green-0123456789-exchange-fees\""));
    assert!(!trade.contains("\"exchange-fees\""));
}

#[test]
fn the_contract_runs_the_live_image_when_another_version_is_declared() {
    let secret = |name: &str| vec![serde_json::from_value(json!({"name": name})).unwrap()];
    let mut newer = example("minimal");
    newer.image_pull_secrets = secret("registry");
    let rendered = BUILDER.render(&newer, &stack(), []);
    newer.version = "1.5.0".to_owned();
    newer.image_pull_secrets = secret("another-registry");
    let contract = Job {
        kind: JobKind::Contract,
        stack: stack(),
        attempt: 7,
    };
    let nothing = Beside::default();
    let job = BUILDER.job(&newer, Some(&rendered), &contract, &nothing).unwrap();
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], "ghcr.io/acme/exchange:1.4.0");
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    assert_eq!(BUILDER.job(&newer, None, &contract, &nothing), None);
}

/// A candidate gets as many pods as what is live, whatever is declared for it.
#[test]
fn the_connections_of_a_stack_are_counted_for_what_is_live_too() {
    let spec = example("minimal");
    let expand = Job {
        kind: JobKind::Expand,
        stack: stack(),
        attempt: 7,
    };
    let connections = |pods: &[(Service, i32)]| {
        let live = Beside {
            pods: pods.iter().copied().collect(),
            ..Beside::default()
        };
        let job = BUILDER.job(&spec, None, &expand, &live).unwrap();
        let args = job["spec"]["template"]["spec"]["containers"][0]["args"].clone();
        let args: Vec<String> = serde_json::from_value(args).unwrap();
        let of = args
            .iter()
            .find_map(|it| it.strip_prefix("--connections-per-stack="));
        of.unwrap().parse::<i32>().unwrap()
    };
    let declared = connections(&[]);
    assert_eq!(connections(&[(Service::Trade, 1)]), declared);
    assert_eq!(
        connections(&[(Service::Trade, 12)]) - declared,
        10 * (12 - spec.services.trade.replicas)
    );
}
