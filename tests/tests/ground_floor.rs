//! What every later test stands on: pods, DNS, Services, volumes, Helm. Needs a cluster; `make e2e` runs it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use serde_json::{Value, json};
use testbed::{
    exchange::busybox_image,
    kubectl::{Namespace, Session},
    results, sandbox, supervisor,
};

/// A warm image starts in a second or two; a machine that compiles beside us needs longer.
const PATIENCE: Duration = Duration::from_mins(2);

fn session() -> Session {
    Session::from_environment().expect("a cluster")
}

/// The image of `testbed-agent`.
fn agent_image() -> String {
    std::env::var("AGENT_IMAGE").unwrap_or_else(|_| "exchange.local/testbed-agent:dev".into())
}

/// A pod template that the Pod Security level "restricted" admits.
fn template(labels: &Value, image: &str, args: &[&str]) -> Value {
    json!({
        "metadata": {"labels": labels},
        "spec": {
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": image, "args": args, "imagePullPolicy": "IfNotPresent",
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                    "capabilities": {"drop": ["ALL"]}},
            }],
        },
    })
}

fn start_pod(session: &Session, namespace: &str, name: &str, image: &str, args: &[&str]) {
    let mut pod = template(&json!({"app": name}), image, args);
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = name.into();
    session.apply(namespace, &pod).unwrap();
    session
        .wait(namespace, &format!("pod/{name}"), "condition=Ready", PATIENCE)
        .unwrap();
}

/// A pod to look around from.
fn start_looker(session: &Session, namespace: &str) {
    start_pod(
        session,
        namespace,
        "looker",
        &busybox_image(session),
        &["/bin/sleep", "infinity"],
    );
}

fn look(session: &Session, namespace: &str, command: &[&str]) -> anyhow::Result<String> {
    let mut args = vec!["exec", "--namespace", namespace, "looker", "--"];
    args.extend(command);
    session.kubectl(&args)
}

/// A Deployment of agents that answer with `id`, and which the label `colour` tells apart.
fn start_agents(session: &Session, namespace: &str, colour: &str, replicas: u32) {
    let labels = json!({"app": "agent", "colour": colour});
    let mut template = template(&labels, &agent_image(), &["serve", "--id", colour]);
    template["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": colour},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template},
    });
    session.apply(namespace, &deployment).unwrap();
    session
        .kubectl(&[
            "rollout",
            "status",
            "--namespace",
            namespace,
            &format!("deployment/{colour}"),
            "--timeout=120s",
        ])
        .unwrap_or_else(|error| panic!("{error:#}\n{}", session.circumstances(namespace)));
}

fn service(name: &str, selector: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    })
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_pod_starts_and_can_be_looked_into() {
    let session = session();
    let namespace = Namespace::new(&session, "pod").unwrap();
    start_pod(
        &session,
        &namespace.name,
        "hello",
        &busybox_image(&session),
        &["/bin/sh", "-c", "echo it runs; sleep infinity"],
    );
    // It is ready as soon as its shell runs.
    let log = || session.kubectl(&["logs", "--namespace", &namespace.name, "hello"]);
    let said = wait_for(PATIENCE, || log().is_ok_and(|log| log.trim() == "it runs"));
    assert!(said, "{:?}", log());
    let who = session
        .kubectl(&["exec", "--namespace", &namespace.name, "hello", "--", "id", "-u"])
        .unwrap();
    assert_eq!(who.trim(), "65532");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn dns_answers_from_a_pod() {
    let session = session();
    let namespace = Namespace::new(&session, "dns").unwrap();
    start_looker(&session, &namespace.name);
    let address = session
        .get("default", "service/kubernetes", "{.spec.clusterIP}")
        .unwrap();
    let answer = look(
        &session,
        &namespace.name,
        &["nslookup", "kubernetes.default.svc.cluster.local"],
    )
    .unwrap();
    assert!(answer.contains(&address), "{answer}");
    let unknown = look(
        &session,
        &namespace.name,
        &["nslookup", "nobody.default.svc.cluster.local"],
    );
    assert!(unknown.unwrap_err().to_string().contains("NXDOMAIN"));
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_deployment_is_reached_through_its_cluster_ip_and_its_name() {
    let session = session();
    let namespace = Namespace::new(&session, "service").unwrap();
    start_agents(&session, &namespace.name, "blue", 2);
    session
        .apply(&namespace.name, &service("agents", &json!({"app": "agent"})))
        .unwrap();
    start_looker(&session, &namespace.name);
    let address = session
        .get(&namespace.name, "service/agents", "{.spec.clusterIP}")
        .unwrap();
    wait_for_endpoints(&session, &namespace.name, "agents", 2);
    let full = format!("agents.{}.svc.cluster.local", namespace.name);
    for host in [address.as_str(), "agents", &full] {
        let url = format!("http://{host}/");
        let ask = || look(&session, &namespace.name, &["timeout", "5", "wget", "-qO-", &url]);
        // kube-proxy may take a second to act on the endpoints that we have seen.
        assert!(
            wait_for(PATIENCE, || ask().is_ok_and(|answer| answer == "blue")),
            "through {host}: {:?}",
            ask()
        );
    }
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_single_replica_reaches_itself_through_its_cluster_ip() {
    let session = session();
    let namespace = Namespace::new(&session, "self").unwrap();
    start_agents(&session, &namespace.name, "alone", 1);
    session
        .apply(&namespace.name, &service("alone", &json!({"colour": "alone"})))
        .unwrap();
    wait_for_endpoints(&session, &namespace.name, "alone", 1);
    let address = session
        .get(&namespace.name, "service/alone", "{.spec.clusterIP}")
        .unwrap();
    let target = format!("{address}:80");
    let answer = session.kubectl(&[
        "exec",
        "--namespace",
        &namespace.name,
        "deployment/alone",
        "--",
        "/testbed-agent",
        "get",
        &target,
    ]);
    assert_eq!(answer.unwrap().trim(), "alone");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_selector_change_under_load_fails_no_request() {
    let session = session();
    let namespace = Namespace::new(&session, "swap").unwrap();
    start_agents(&session, &namespace.name, "blue", 2);
    start_agents(&session, &namespace.name, "green", 2);
    session
        .apply(
            &namespace.name,
            &service("live", &json!({"app": "agent", "colour": "blue"})),
        )
        .unwrap();
    wait_for_endpoints(&session, &namespace.name, "live", 2);

    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "load"},
        "spec": {"backoffLimit": 0, "template": {
            "metadata": {"labels": {"app": "load"}},
            "spec": {
                "restartPolicy": "Never",
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "load", "image": agent_image(), "imagePullPolicy": "IfNotPresent",
                    "args": ["load", "live:80", "--rate", "500", "--seconds", "15"],
                    "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                        "capabilities": {"drop": ["ALL"]}},
                }],
            },
        }},
    });
    session.apply(&namespace.name, &job).unwrap();
    // The swap comes when requests flow: the agent says so by its first line.
    let started = wait_for(PATIENCE, || {
        session
            .kubectl(&["logs", "--namespace", &namespace.name, "job/load"])
            .is_ok_and(|log| log.contains("first answer"))
    });
    assert!(started, "no load: {}", session.circumstances(&namespace.name));
    let green = r#"{"spec": {"selector": {"app": "agent", "colour": "green"}}}"#;
    session
        .kubectl(&[
            "patch",
            "service/live",
            "--namespace",
            &namespace.name,
            "--patch",
            green,
        ])
        .unwrap();
    session
        .wait(&namespace.name, "job/load", "condition=Complete", PATIENCE)
        .unwrap();

    let log = session
        .kubectl(&["logs", "--namespace", &namespace.name, "job/load"])
        .unwrap();
    let report: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let requests = report["answered"].as_u64().unwrap() + report["failed"].as_u64().unwrap();
    namespace.note("requests", requests);
    namespace.note("requests_failed", report["failed"].clone());
    namespace.note("answers_by_colour", report["by_identity"].clone());
    assert_eq!(report["failed"], 0, "{report}");
    assert!(report["answered"].as_u64().unwrap() >= 5_000, "{report}");
    assert!(
        report["by_identity"]["blue"].as_u64().is_some_and(|n| n > 0),
        "nothing before the swap: {report}"
    );
    assert_eq!(report["last_identity"], "green", "{report}");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn every_image_of_ours_starts() {
    let session = session();
    let namespace = Namespace::new(&session, "images").unwrap();
    let (prefix, tag) = agent_image()
        .rsplit_once("/testbed-agent:")
        .map(|(p, t)| (p.to_owned(), t.to_owned()))
        .unwrap();
    for (name, program) in [
        ("exchange-user", "exchange"),
        ("exchange-trade", "exchange"),
        ("exchange-notification", "exchange"),
        ("exchange-operator", "exchange-operator"),
    ] {
        let mut pod = template(
            &json!({"app": name}),
            &format!("{prefix}/{name}:{tag}"),
            &["--version"],
        );
        pod["apiVersion"] = "v1".into();
        pod["kind"] = "Pod".into();
        pod["metadata"]["name"] = name.into();
        pod["spec"]["restartPolicy"] = "Never".into();
        session.apply(&namespace.name, &pod).unwrap();
        let ended = "jsonpath={.status.phase}=Succeeded";
        session
            .wait(&namespace.name, &format!("pod/{name}"), ended, PATIENCE)
            .unwrap();
        let log = session
            .kubectl(&["logs", "--namespace", &namespace.name, name])
            .unwrap();
        assert!(log.starts_with(&format!("{program} ")), "{name}: {log}");
    }
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_second_up_changes_nothing() {
    // An existing cluster is not ours to start.
    let session = session();
    let Some(cluster) = &session.cluster else {
        return;
    };
    let _case = Namespace::new(&session, "second-up").unwrap();
    let components = || -> BTreeMap<String, (Option<u32>, usize)> {
        let status = supervisor::read_status(cluster).into_iter();
        status
            .map(|(name, state)| (name, (state.pid, state.restarts)))
            .collect()
    };
    let (before, process) = (components(), sandbox::supervisor(cluster));
    let name = results::of_cluster("cluster-start", cluster.name());
    let figures = results::repository()
        .unwrap()
        .join(format!("target/results/{name}.json"));
    let times_of_the_start = fs::read(&figures).ok();
    let up = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["up", "--name", cluster.name()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&up.stderr);
    assert!(up.status.success() && said.contains("runs already"), "{said}");
    assert!(before.len() >= 10, "{before:?}");
    assert_eq!(components(), before);
    assert_eq!(sandbox::supervisor(cluster), process);
    assert_eq!(
        fs::read(&figures).ok(),
        times_of_the_start,
        "they are those of a start, which this was not"
    );
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn metrics_and_a_default_storage_class_are_served() {
    let session = session();
    let case = Namespace::new(&session, "metrics").unwrap();
    // What is measured is told when it has been measured twice.
    let top = || session.kubectl(&["top", "node", "--no-headers"]);
    let measured = wait_for(PATIENCE, || top().is_ok_and(|top| top.contains('%')));
    assert!(measured, "{:?}", top());
    start_looker(&session, &case.name);
    let top = || session.kubectl(&["top", "pod", "--no-headers", "--namespace", &case.name]);
    let measured = wait_for(PATIENCE, || top().is_ok_and(|top| top.starts_with("looker ")));
    assert!(measured, "{:?}", top());
    if session.cluster.is_some() {
        // The kubelet looks after the disk, and only then measures the node as often as metrics-server asks.
        let disk = session.get("default", "node/node", "{.status.capacity.ephemeral-storage}");
        assert_ne!(disk.unwrap(), "");
    }
    let class = session.kubectl(&["get", "storageclass"]).unwrap();
    assert!(class.contains("(default)"), "{class}");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn the_stores_keep_their_data_over_the_end_of_their_pods_and_an_upgrade() {
    let session = session();
    let namespace = Namespace::new(&session, "stores").unwrap();
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/exchange-stores");
    let values = session.stores_values();
    let mut common = vec![
        "exchange",
        chart,
        "--namespace",
        &namespace.name,
        "--wait",
        "--timeout",
        "180s",
    ];
    common.extend(values.iter().map(String::as_str));
    let helm = |verb: &str, more: &[&str]| {
        let args: Vec<&str> = [verb].iter().chain(&common).chain(more).copied().collect();
        session
            .helm(&args)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", session.circumstances(&namespace.name)))
    };
    let password = || {
        session
            .get(&namespace.name, "secret/exchange-db", "{.data.password}")
            .unwrap()
    };
    helm("install", &[]);
    let first_password = password();
    assert!(first_password.len() > 30);
    write_to_stores(&session, &namespace.name);

    // A client that is busy must not keep PostgreSQL from an orderly end.
    let sleep = in_pod(&namespace.name, "postgres", &psql("select pg_sleep(600)"));
    let mut busy = session
        .follow(&sleep.iter().map(String::as_str).collect::<Vec<_>>())
        .unwrap();
    let sleeps = psql("select count(*) from pg_stat_activity where query = 'select pg_sleep(600)'");
    let is_busy =
        || in_store(&session, &namespace.name, "postgres", &sleeps).is_ok_and(|count| count.trim() == "1");
    assert!(wait_for(PATIENCE, is_busy), "no busy client");
    session
        .kubectl(&["delete", "pod", "--all", "--namespace", &namespace.name, "--wait"])
        .unwrap();
    let _ = busy.wait();
    for store in ["postgres", "nats", "redis"] {
        // Not by the state of its set, which may still be about the pod that is gone.
        let pod = format!("pod/exchange-{store}-0");
        let ready = "{.status.conditions[?(@.type=='Ready')].status}";
        let is_ready = || {
            session
                .get(&namespace.name, &pod, ready)
                .is_ok_and(|ready| ready == "True")
        };
        assert!(
            wait_for(PATIENCE, is_ready),
            "{pod}: {}",
            session.circumstances(&namespace.name)
        );
    }
    assert_stores_have_the_data(&session, &namespace.name);
    let log = session
        .kubectl(&["logs", "--namespace", &namespace.name, "exchange-postgres-0"])
        .unwrap();
    assert!(
        log.contains("database system was shut down"),
        "PostgreSQL was killed: {log}"
    );

    helm("upgrade", &["--set", "postgres.connections=123"]);
    assert_eq!(password(), first_password, "an upgrade must not change passwords");
    let connections = in_store(
        &session,
        &namespace.name,
        "postgres",
        &psql("show max_connections"),
    )
    .unwrap();
    assert_eq!(connections.trim(), "123");
    assert_stores_have_the_data(&session, &namespace.name);

    let args: Vec<&str> = ["upgrade"]
        .iter()
        .chain(&common)
        .chain(&["--set", "postgres.storage=3Gi"])
        .copied()
        .collect();
    let refusal = session.helm(&args).unwrap_err().to_string();
    assert!(
        refusal.contains("postgres.storage cannot be changed from 2Gi to 3Gi"),
        "{refusal}"
    );

    session
        .helm(&["uninstall", "exchange", "--namespace", &namespace.name, "--wait"])
        .unwrap();
    let left = session.kubectl(&[
        "get",
        "statefulsets,services,configmaps",
        "--namespace",
        &namespace.name,
        "--selector=app.kubernetes.io/part-of=exchange",
        "--output=name",
    ]);
    assert_eq!(left.unwrap(), "");
}

fn psql(sql: &str) -> Vec<String> {
    [
        "psql",
        "--host=/tmp",
        "--username=postgres",
        "--dbname=exchange",
        "--no-align",
        "--tuples-only",
        "--command",
        sql,
    ]
    .map(str::to_owned)
    .to_vec()
}

/// What `kubectl` is told to run a command in the pod of a store.
fn in_pod(namespace: &str, store: &str, command: &[String]) -> Vec<String> {
    let pod = format!("exchange-{store}-0");
    let mut args = ["exec", "--namespace", namespace, &pod, "--"]
        .map(str::to_owned)
        .to_vec();
    args.extend_from_slice(command);
    args
}

fn in_store(session: &Session, namespace: &str, store: &str, command: &[String]) -> anyhow::Result<String> {
    let args = in_pod(namespace, store, command);
    session.kubectl(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// JetStream has no command-line client here: the agent speaks with it.
fn with_jetstream(session: &Session, namespace: &str, action: &str) -> anyhow::Result<String> {
    let name = format!("jetstream-{action}");
    let mut template = template(&json!({"app": name}), &agent_image(), &["jetstream", action]);
    template["spec"]["restartPolicy"] = "Never".into();
    template["spec"]["containers"][0]["env"] = json!([{"name": "NATS_URL", "valueFrom": {"secretKeyRef": {"name": "exchange-queue", "key": "url"}}}]);
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
                     "spec": {"backoffLimit": 0, "template": template}});
    session.kubectl(&[
        "delete",
        "job",
        &name,
        "--namespace",
        namespace,
        "--ignore-not-found",
        "--wait",
    ])?;
    session.apply(namespace, &job)?;
    session.wait(namespace, &format!("job/{name}"), "condition=Complete", PATIENCE)?;
    session.kubectl(&["logs", "--namespace", namespace, &format!("job/{name}")])
}

fn write_to_stores(session: &Session, namespace: &str) {
    let sql = psql("create table survivors as select 'still here' as word");
    in_store(session, namespace, "postgres", &sql).unwrap();
    let set = ["redis-cli", "set", "survivor", "still here"].map(str::to_owned);
    assert_eq!(in_store(session, namespace, "redis", &set).unwrap().trim(), "OK");
    with_jetstream(session, namespace, "publish").unwrap();
}

fn assert_stores_have_the_data(session: &Session, namespace: &str) {
    let word = in_store(
        session,
        namespace,
        "postgres",
        &psql("select word from survivors"),
    )
    .unwrap();
    assert_eq!(word.trim(), "still here", "PostgreSQL");
    let get = ["redis-cli", "get", "survivor"].map(str::to_owned);
    assert_eq!(
        in_store(session, namespace, "redis", &get).unwrap().trim(),
        "still here",
        "Redis"
    );
    assert_eq!(
        with_jetstream(session, namespace, "read").unwrap().trim(),
        "still here",
        "JetStream"
    );
}

fn wait_for(patience: Duration, mut holds: impl FnMut() -> bool) -> bool {
    testbed::sandbox::wait_until("", patience, &mut holds).is_ok()
}

/// Waits until the Service's slices list that many ready endpoints.
fn wait_for_endpoints(session: &Session, namespace: &str, service: &str, count: usize) {
    let ready = || {
        let selector = format!("--selector=kubernetes.io/service-name={service}");
        let path = "--output=jsonpath={.items[*].endpoints[?(@.conditions.ready==true)].addresses[0]}";
        let addresses =
            session.kubectl(&["get", "endpointslices", "--namespace", namespace, &selector, path]);
        addresses.is_ok_and(|addresses| addresses.split_whitespace().count() == count)
    };
    assert!(wait_for(PATIENCE, ready), "{}", session.circumstances(namespace));
}
