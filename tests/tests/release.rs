//! Releases on a cluster, told as stories: what is declared, what goes wrong, where the exchange ends. Clients trade all the
//! while where the story is not about their being cut off. `make stories` runs them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use testbed::{
    demo,
    exchange::{Exchange, NAME, PATIENCE, Pod, phase_of, text, token},
    kubectl::{Namespace, Session},
    operator::{self, OPERATOR, OPERATOR_NAMESPACE},
    sandbox::wait_until,
    story::{Clients, Ground, Prober, RELEASED, SERVICES, Stacks, Story, Told, end_well, note, serves_again},
};

/// What a watch tells is put right within this time: a few seconds, on a machine that has much to do.
const AT_ONCE: Duration = Duration::from_secs(30);

fn nothing(_: &mut Value) {}

/// With Helm, as a person would: the first deployment goes through every gate, `--wait` and `kubectl wait` believe it only
/// then, and the next version follows by itself, under the eyes of clients.
#[test]
#[ignore = "needs a cluster: make stories"]
fn helm_installs_an_exchange_and_upgrades_it() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "helm").unwrap();
    let stores_beside = Exchange::install(&ground.session, &namespace.name, &ground.images).unwrap();
    let mut told = Told::of(&ground.session, &namespace.name, "shop");
    // Clients know the exchange by the name that it has everywhere else.
    for service in SERVICES {
        let address = format!("shop-{service}.{}.svc.cluster.local", namespace.name);
        let alias = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("{NAME}-{service}")},
                           "spec": {"type": "ExternalName", "externalName": address}});
        ground.session.apply(&namespace.name, &alias).unwrap();
    }
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/exchange");
    let image = format!("image={}/exchange", ground.images.prefix);
    let quick = "services.user.replicas=1,services.trade.replicas=1,services.notification.replicas=1,\
                 rollout.verification.duration=5s,rollout.verification.maxLatencyP99=20s,rollout.retention=10m,\
                 rollout.drainTimeout=30s";
    // The stores are a release of their own, of the name that the exchange's Secrets have.
    let stores = "database.secretRef.name=exchange-db,database.migrationSecretRef.name=exchange-db,\
                  queue.secretRef.name=exchange-queue,marketData.secretRef.name=exchange-redis";
    let helm = |version: &str, more: &[&str]| {
        let version = format!("version={version}");
        let mut args = vec![
            "upgrade",
            "--install",
            "shop",
            chart,
            "--namespace",
            &namespace.name,
        ];
        args.extend([
            "--set-string",
            &version,
            "--set",
            &image,
            "--set",
            quick,
            "--set",
            stores,
        ]);
        args.extend(["--timeout", "5m"]);
        args.extend(more);
        ground.session.helm(&args)
    };
    let get = |path: &str| ground.session.get(&namespace.name, "exd/shop", path).unwrap();

    helm("1.0.0", &["--wait"]).unwrap();
    assert_eq!(get("{.status.phase} {.status.live.version}"), "Live 1.0.0");
    assert_eq!(get("{.status.history[*].outcome}"), "Verified Promoted");
    let revision = get("{.status.live.revision}");
    let jobs = ground
        .session
        .kubectl(&[
            "get",
            "jobs",
            "--namespace",
            &namespace.name,
            "--output=jsonpath={.items[*].metadata.name}",
        ])
        .unwrap();
    for job in ["expand", "smoke", "verify"] {
        assert!(
            jobs.contains(&format!("{revision}-{job}-1")),
            "{job} has not run: {jobs}"
        );
    }
    told.course(&RELEASED);
    stores_beside.make_treasury().unwrap();
    let clients = Clients {
        load: stores_beside.start_load(20).unwrap(),
        prober: Prober::start(&ground.session, &namespace.name),
    };

    helm("2.0.0", &[]).unwrap();
    ground
        .session
        .wait(&namespace.name, "exd/shop", "condition=Ready", PATIENCE)
        .unwrap();
    assert_eq!(get("{.status.phase} {.status.live.version}"), "Live 2.0.0");
    assert_eq!(
        get("{.status.live.colour} {.status.previous.version}"),
        "green 1.0.0"
    );
    told.course(&RELEASED);

    // A version that is given up fails the upgrade, and says so.
    let refusal = helm("9.9.9", &["--wait", "--set", "rollout.progressDeadline=15s"])
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("Failed"), "{refusal}");
    assert_eq!(get("{.status.phase} {.status.live.version}"), "Failed 2.0.0");
    told.course(&["ReleaseStarted", "ReleaseFailed"]);
    assert_eq!(clients.end_well().len(), 2);
}

/// Whatever is wrong with a version: it is found before the swap, the live one serves on, and the message says what.
#[test]
#[ignore = "needs a cluster: make stories"]
fn what_fails_before_the_swap_touches_nothing() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "fails").unwrap();
    let mut story = ground.live(&namespace, nothing);
    let clients = story.trade();
    let good = story.revision("live");
    let versions = story.versions_of_live();

    // One service of three has no image. None is switched.
    let begun = story.watch.sightings().len();
    story.declare(|spec| {
        spec["rollout"]["progressDeadline"] = json!("45s");
        spec["services"]["notification"]["image"] = json!("exchange.local/nowhere");
    });
    story
        .watch
        .until("the image to be named", PATIENCE, |object| {
            text(object, "/status/conditions/0/message").contains("exchange.local/nowhere:1.0.0")
        })
        .unwrap();
    story.reaches("Failed");
    story.all_point_at(&good);
    assert_eq!(
        text(story.last(), "/status/rejected/reason"),
        "ProgressDeadlineExceeded"
    );
    assert_eq!(story.condition("Available")["status"], "True");
    assert_eq!(story.condition("Stalled")["reason"], "ProgressDeadlineExceeded");
    let phases = story.phases_since(begun);
    assert!(!phases.iter().any(|phase| phase == "Promoting"), "{phases:?}");
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);

    // Another one ends whenever it starts.
    story.declare(|spec| {
        spec["services"]["notification"] =
            json!({"replicas": 1, "env": [{"name": "EXCHANGE_REQUEST_TIMEOUT", "value": "soon"}]});
    });
    story
        .watch
        .until("the loop to be named", PATIENCE, |object| {
            text(object, "/status/conditions/0/message").contains("CrashLoopBackOff")
        })
        .unwrap();
    story.reaches("Failed");
    story.all_point_at(&good);
    assert_eq!(
        text(story.last(), "/status/rejected/reason"),
        "ProgressDeadlineExceeded"
    );
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);

    // A test of the user's says no.
    story.declare(|spec| {
        spec["services"]["notification"] = json!({"replicas": 1});
        spec["rollout"]["progressDeadline"] = json!("3m");
        spec["rollout"]["smokeTests"] =
            json!([{"name": "no", "command": ["/usr/bin/exchange", "no-such-command"], "timeout": "60s"}]);
        note(spec, "tested");
    });
    story.reaches("Failed");
    story.all_point_at(&good);
    assert_eq!(text(story.last(), "/status/rejected/reason"), "SmokeTestFailed");
    assert!(text(&story.condition("Stalled"), "/message").contains("the test no failed"));
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);

    // Tried again, it fails again, as another attempt.
    let attempt = story.last()["status"]["attempt"].as_u64().unwrap();
    story
        .exchange
        .ask("retry", &token(story.last(), "rejected"))
        .unwrap();
    story
        .watch
        .until("the next attempt to fail", PATIENCE, |object| {
            phase_of(object) == "Failed" && object["status"]["attempt"].as_u64() > Some(attempt)
        })
        .unwrap();
    story.all_point_at(&good);
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);

    fails_the_built_in_test(&mut story, &good);

    // Declared as it was, all is well. No client has ever been answered by what failed.
    story.declaration = story.exchange.declaration("1.0.0");
    story.declare(nothing);
    story.reaches("Live");
    assert_eq!(story.revision("live"), good);
    assert_eq!(story.condition("Ready")["status"], "True");
    story.told.course(&[]);
    assert_eq!(
        story.versions_of_live(),
        versions,
        "nobody has written a live Service"
    );
    assert_eq!(clients.end_well().len(), 1, "somebody else has answered");
}

/// The built-in smoke test finds a version whose orders fail, before any client does.
fn fails_the_built_in_test(story: &mut Story<'_>, good: &str) {
    let begun = story.watch.sightings().len();
    story.declare(|spec| {
        spec["version"] = json!("2.0.1-fails-smoke");
        spec["rollout"]["smokeTests"] = json!([]);
    });
    story.reaches("Failed");
    story.all_point_at(good);
    assert_eq!(text(story.last(), "/status/rejected/reason"), "SmokeTestFailed");
    assert_eq!(
        text(story.last(), "/status/rejected/version"),
        "2.0.1-fails-smoke"
    );
    let stalled = story.condition("Stalled");
    let message = text(&stalled, "/message");
    assert!(
        message.contains("the test smoke failed: FAIL") && message.contains("place an order"),
        "{message}"
    );
    let phases = story.phases_since(begun);
    assert!(phases.iter().any(|phase| phase == "Testing"), "{phases:?}");
    assert!(!phases.iter().any(|phase| phase == "Promoting"), "{phases:?}");
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);
}

/// A version that answers everything, and too slowly.
fn goes_back_for_being_slow(story: &mut Story<'_>, first: &str, course: &[&str]) {
    let clients = story.trade();
    story.declare(|spec| {
        spec["version"] = json!("2.0.5-slows-down");
        spec["rollout"]["verification"]["maxLatencyP99"] = json!("1s");
    });
    story.reaches("Held");
    story.all_point_at(first);
    let stalled = story.condition("Stalled");
    assert_eq!(stalled["reason"], "VerificationFailed");
    assert!(
        text(&stalled, "/message").contains("answers too slowly: p99 is over"),
        "{stalled}"
    );
    story.told.course(course);
    assert_eq!(
        clients.end_well().len(),
        2,
        "it has not answered, or somebody else has"
    );
}

/// What no test has found, the clients find: the traffic goes back by itself. Held like this, the exchange can still be
/// scaled, and its passwords be changed, without a release.
#[test]
#[ignore = "needs a cluster: make stories"]
fn what_fails_under_load_goes_back_by_itself() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "verified").unwrap();
    let mut story = ground.live(&namespace, nothing);
    let first = story.revision("live");
    let clients = story.trade();
    let begun = story.watch.sightings().len();
    story.declare(|spec| {
        spec["version"] = json!("2.0.2-fails-verification");
        spec["rollout"]["verification"]["duration"] = json!("1m");
    });
    story.reaches("Held");
    story.all_point_at(&first);
    assert_eq!(
        text(story.last(), "/status/rejected/reason"),
        "VerificationFailed"
    );
    let stalled = story.condition("Stalled");
    assert!(
        text(&stalled, "/message").contains("requests to the"),
        "{stalled}"
    );
    assert_eq!(story.condition("Available")["status"], "True");
    let phases = story.phases_since(begun);
    let moved = ["Promoting", "Verifying", "RollingBack", "Held"];
    assert!(phases.ends_with(&moved.map(str::to_owned)), "{phases:?}");
    let gone_back = [
        "ReleaseStarted",
        "Promoting",
        "Promoted",
        "RollingBack",
        "RolledBack",
    ];
    story.told.course(&gone_back);
    let (table, report) = clients.load.end().unwrap();
    let failures = report["summary"]["failures"].as_object().unwrap();
    assert!(failures.keys().all(|failure| failure == "status 500"), "{table}");
    assert_eq!(report["closed_without_notice"], 0, "{table}");
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");

    goes_back_for_being_slow(&mut story, &first, &gone_back);

    // More pods for the stack that serves, under the eyes of clients.
    let Clients { load, prober } = story.trade();
    let history = story.last()["status"]["history"].clone();
    story.declare(|spec| spec["services"]["trade"]["replicas"] = json!(2));
    let workload = format!("deployment/{NAME}-blue-trade-{first}");
    let ready = || {
        let ready = story
            .session
            .get(story.namespace, &workload, "{.status.readyReplicas}");
        ready.is_ok_and(|ready| ready == "2")
    };
    wait_until("the second pod", PATIENCE, ready).unwrap();
    story.reaches("Held");
    let before = load.progress().requests;
    wait_until("trading", PATIENCE, || load.progress().requests > before + 200).unwrap();
    assert_eq!(end_well(load).len(), 1, "somebody else has answered");

    // Other credentials, as they are rotated without an outage: a second role beside the first, which is then locked out.
    // That connections to the database are cut off here, so that it takes no hour, would fail orders of traders. That each
    // live address answers is asked all the while.
    let password = format!("{:032x}", rand::random::<u128>());
    let url = format!("postgres://exchange_second:{password}@{NAME}-postgres:5432/exchange");
    let secret = json!({"stringData": {"url": url}}).to_string();
    let sql = |statement: &str| story.exchange.sql(statement).unwrap();
    sql(&format!(
        "create role exchange_second login password '{password}' in role exchange_app"
    ));
    let name = format!("{NAME}-db");
    story.kubectl(&["patch", "secret", &name, "--type=merge", "--patch", &secret]);
    // The files of the pods follow when the kubelet looks at them the next time; who connects then reads them.
    let serving = story.exchange.pods(&first).unwrap();
    assert_eq!(serving.len(), 4, "{serving:?}");
    wait_until("all pods to use the second role", PATIENCE, || {
        sql("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'exchange_service'");
        // Pods of the stack that has failed are there, too.
        let clients =
            sql("select distinct host(client_addr) from pg_stat_activity where usename = 'exchange_second'");
        let uses_it = |pod: &Pod| clients.lines().any(|client| client.trim() == pod.address);
        serving.iter().all(uses_it)
    })
    .unwrap();
    sql("alter role exchange_service nologin");
    prober.misses_nothing();
    drop(prober);
    let clients = story.trade();
    wait_until("trading", PATIENCE, || clients.load.progress().requests > 500).unwrap();
    assert_eq!(clients.end_well().len(), 1, "somebody else has answered");
    story.reaches("Held");
    assert_eq!(story.revision("live"), first);
    assert_eq!(story.last()["status"]["history"], history, "there was a release");
    story.told.course(&[]);
}

/// After the retention there is nothing to go back to at once: the old version is released as every other one.
#[test]
#[ignore = "needs a cluster: make stories"]
fn after_the_retention_the_way_back_is_a_release() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "retention").unwrap();
    let mut story = ground.live(&namespace, |declaration| {
        declaration["spec"]["rollout"]["retention"] = json!("5s");
    });
    let clients = story.trade();
    let first = story.revision("live");
    story.declare(|spec| note(spec, "second"));
    story.goes_live();
    let second = story.revision("live");
    story
        .watch
        .until("the old stack to be gone", PATIENCE, |object| {
            object["status"]["previous"].is_null()
        })
        .unwrap();
    let rendered = [
        "get",
        "controllerrevisions",
        "--output=name",
        "--selector=app.kubernetes.io/managed-by=exchange-operator",
    ];
    let one_stack = || story.kubectl(&rendered).lines().count() == 1;
    wait_until("the rendered stack to be gone", PATIENCE, one_stack).unwrap();
    assert_eq!(story.condition("RollbackAvailable")["status"], "False");
    story.told.has("Retiring");

    // Asked for all the same, nothing happens: the next release finds everything as it was.
    story
        .exchange
        .ask("rollback", &token(story.last(), "live"))
        .unwrap();
    story.told.has("RollbackRefused");
    story.all_point_at(&second);
    let begun = story.watch.sightings().len();
    let original = story.exchange.declaration("1.0.0");
    story.declare(|spec| *spec = original["spec"].clone());
    story.goes_live();
    assert_eq!(
        story.revision("live"),
        first,
        "the same spec has another revision"
    );
    let phases = story.phases_since(begun);
    for gate in ["Migrating", "Testing", "Promoting", "Verifying"] {
        assert!(
            phases.iter().any(|phase| phase == gate),
            "without {gate}: {phases:?}"
        );
    }
    assert!(!phases.iter().any(|phase| phase == "RollingBack"), "{phases:?}");
    clients.end_well();
}

/// A person has to approve. No deadline passes, a word about another stack counts for nothing, and what was approved goes
/// live, and nothing else. Aborted, it is gone.
#[test]
#[ignore = "needs a cluster: make stories"]
fn an_approval_is_for_one_stack_and_attempt() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "approval").unwrap();
    let mut story = ground.live(&namespace, nothing);
    let clients = story.trade();
    let first = story.revision("live");
    let stale = token(story.last(), "live");

    story.declare(|spec| {
        spec["rollout"]["promotion"] = json!("Manual");
        spec["rollout"]["progressDeadline"] = json!("45s");
        note(spec, "one");
    });
    story.reaches("AwaitingPromotion");
    let one = token(story.last(), "candidate");
    for wrong in [stale.as_str(), "no-such-stack.1"] {
        story.exchange.ask("promote", wrong).unwrap();
    }
    // Longer than the deadline: nothing may happen, so that there is nothing to wait for.
    let quiet = Duration::from_mins(1);
    let moved = story.watch.until("a change of phase", quiet, |object| {
        phase_of(object) != "AwaitingPromotion"
    });
    assert!(moved.is_err(), "it did not wait");
    story.all_point_at(&first);
    story.told.course(&["ReleaseStarted"]);
    // What the plugin says of it, to people and to scripts.
    let (code, tree) = story.plugin("status --wait --timeout 1s");
    assert_eq!(code, 3, "{tree}");
    for line in [
        "candidate: 1.0.0 in green",
        "Testing",
        "AwaitingPromotion",
        "approval",
    ] {
        assert!(tree.contains(line), "no {line}: {tree}");
    }
    let explained = story.person("explain");
    assert!(
        explained.contains("kubectl exchange promote exchange: the traffic goes to 1.0.0"),
        "{explained}"
    );

    // Another declaration takes its place: the approval of the first comes too late.
    story.declare(|spec| note(spec, "two"));
    story
        .watch
        .until("the other candidate", PATIENCE, |object| {
            phase_of(object) == "AwaitingPromotion" && token(object, "candidate") != one
        })
        .unwrap();
    let two = token(story.last(), "candidate");
    story.exchange.ask("promote", &one).unwrap();
    story
        .watch
        .until("the operator to have seen it", PATIENCE, |object| {
            text(object, "/status/asked/promote/value") == one
        })
        .unwrap();
    assert_eq!(phase_of(story.last()), "AwaitingPromotion");
    story.all_point_at(&story.revision("live"));

    let two = has_other_pods(&mut story, &two);
    story.person("promote");
    let (code, tree) = story.plugin("status --wait --timeout 4m");
    assert_eq!(code, 0, "{tree}");
    story.reaches("Live");
    assert_eq!(token(story.last(), "live"), two);
    story.all_point_at(&story.revision("live"));
    story.told.course(&[
        "ReleaseStarted",
        "ReleaseStarted",
        "Promoting",
        "Promoted",
        "Verified",
    ]);

    // Aborted: what is live serves on.
    story.declare(|spec| note(spec, "three"));
    story.reaches("AwaitingPromotion");
    story.person("abort");
    let (code, tree) = story.plugin("status --wait --timeout 4m");
    assert_eq!(code, 2, "{tree}");
    story.reaches("Failed");
    let (_, reason, by) = story.last_outcome();
    assert_eq!(reason, "Aborted");
    assert_ne!(by, "unverified");
    let history = story.person("history");
    assert!(
        history
            .lines()
            .any(|line| line.contains("Aborted") && line.ends_with(&by)),
        "{history}"
    );
    let (code, refusal) = story.plugin("promote");
    assert_eq!(code, 1, "{refusal}");
    assert!(refusal.contains("promote makes no sense now"), "{refusal}");
    assert_eq!(token(story.last(), "live"), two);
    story.told.course(&["ReleaseStarted", "ReleaseFailed"]);
    assert_eq!(clients.end_well().len(), 2);
}

/// Somebody gives a candidate that has passed its tests other pods: they are tested, too, and what was said of those before is not
/// about them. What it is called then.
fn has_other_pods(story: &mut Story<'_>, candidate: &str) -> String {
    let (stack, _) = candidate.split_once('.').unwrap();
    let trade = format!("deployment/{NAME}-green-trade-{stack}");
    story.kubectl(&["rollout", "restart", &trade]);
    story
        .watch
        .until("the same candidate anew", PATIENCE, |object| {
            phase_of(object) == "AwaitingPromotion" && token(object, "candidate") != candidate
        })
        .unwrap();
    assert_eq!(story.revision("candidate"), stack);
    token(story.last(), "candidate")
}

/// The way back needs nothing of the new stack: its pods are all dead, and cannot come back.
#[test]
#[ignore = "needs a cluster: make stories"]
fn the_way_back_needs_no_pod_of_the_new_stack() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "dead").unwrap();
    let mut story = ground.live(&namespace, nothing);
    let first = story.revision("live");
    let clients = story.trade();
    story.declare(|spec| note(spec, "dead"));
    story.goes_live();
    let second = story.revision("live");
    assert_eq!(clients.load.progress().failed, 0, "before anybody has died");

    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}});
    ground.session.apply(story.namespace, &quota).unwrap();
    let selector = format!("--selector=exchange.dev/revision={second},app.kubernetes.io/component");
    story.kubectl(&["delete", "pods", "--force", "--grace-period=0", &selector]);
    let is = |object: &Value, field: &str, value: &str| {
        let conditions = object["status"]["conditions"].as_array();
        conditions.is_some_and(|all| {
            all.iter()
                .any(|it| it["type"] == "Available" && it[field] == value)
        })
    };
    story
        .watch
        .until("the outage to be seen", PATIENCE, |object| {
            is(object, "reason", "NoEndpoints")
        })
        .unwrap();

    let asked = Instant::now();
    story
        .exchange
        .ask("rollback", &token(story.last(), "live"))
        .unwrap();
    let back = story
        .watch
        .until("the way back", PATIENCE, |object| {
            phase_of(object) == "Held" && text(object, "/status/live/revision") == first
        })
        .unwrap();
    story.all_point_at(&first);
    let took = back.duration_since(asked);
    namespace.note(
        "rollback_from_dead_pods_milliseconds",
        u64::try_from(took.as_millis()).unwrap(),
    );
    assert!(took < Duration::from_secs(15), "it took {took:?}");
    story
        .watch
        .until("the exchange to be available", PATIENCE, |object| {
            is(object, "status", "True")
        })
        .unwrap();
    story.told.course(&["RollingBack", "RolledBack"]);

    // What the dead had in flight is lost, and nobody answered for a while. Then everybody is served again.
    serves_again(&clients.load);
    let (table, report) = clients.load.end().unwrap();
    namespace.note("requests_failed", report["summary"]["failed"].clone());
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    let failures = report["summary"]["failures"].as_object().unwrap();
    let unanswered = |failure: &String| failure == "status 503" || !failure.starts_with("status ");
    assert!(failures.keys().all(unanswered), "{table}");
    assert_eq!(
        report["summary"]["stacks"].as_object().unwrap().len(),
        2,
        "{table}"
    );
}

/// Two colours, never three stacks: the one that is retained goes first, with the settings that were copied for it, and only
/// then the next one comes.
#[test]
#[ignore = "needs a cluster: make stories"]
fn a_new_release_takes_the_colour_of_the_retained_stack() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "retained").unwrap();
    ground.session.apply(&namespace.name, &settings("old")).unwrap();
    let mut story = ground.live(&namespace, refer_to_settings);
    let stacks = Stacks::count(&story);
    let clients = story.trade();
    let copies = || story_copies(&ground, &namespace.name);
    let of_the_first = copies();
    assert_eq!(of_the_first.len(), 1, "{of_the_first:?}");

    ground.session.apply(&namespace.name, &settings("new")).unwrap();
    story.declare(|spec| note(spec, "second"));
    story.goes_live();
    let second = story.revision("live");
    story
        .watch
        .until("the first stack to be retained", PATIENCE, |object| {
            text(object, "/status/previous/state") == "Retained"
        })
        .unwrap();
    assert_eq!(story.condition("RollbackAvailable")["status"], "True");
    assert!(
        copies().is_superset(&of_the_first),
        "the way back has lost its settings"
    );

    let begun = story.watch.sightings().len();
    story.declare(|spec| note(spec, "third"));
    story
        .watch
        .until("the way back to be closed", PATIENCE, |object| {
            let conditions = object["status"]["conditions"].as_array().unwrap();
            conditions
                .iter()
                .any(|it| it["type"] == "RollbackAvailable" && it["reason"] == "ColourNeeded")
        })
        .unwrap();
    assert_eq!(story.condition("RollbackAvailable")["status"], "False");
    assert_eq!(phase_of(story.last()), "Pending");
    story.goes_live();
    story.told.has("Retiring");
    for (_, object) in &story.watch.sightings()[begun..] {
        let candidate = !object["status"]["candidate"].is_null() && phase_of(object) != "Pending";
        let both = candidate && !object["status"]["previous"].is_null();
        assert!(!both, "{:#}", object["status"]);
    }
    assert_eq!(story.revision("previous"), second);
    assert!(
        copies().is_disjoint(&of_the_first),
        "the settings of the first are left"
    );
    assert_eq!(stacks.at_most(), 2, "stacks at once");
    assert_eq!(clients.end_well().len(), 3);
}

fn settings(value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"level": value}})
}

fn refer_to_settings(declaration: &mut Value) {
    declaration["spec"]["services"]["user"]["env"] = json!([
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}}
    ]);
}

/// The copies of ConfigMaps that the operator has made.
fn story_copies(ground: &Ground, namespace: &str) -> BTreeSet<String> {
    let selector = "--selector=app.kubernetes.io/managed-by=exchange-operator";
    let args = [
        "get",
        "configmaps",
        "--output=name",
        selector,
        "--namespace",
        namespace,
    ];
    let names = ground.session.kubectl(&args).unwrap();
    names.lines().map(str::to_owned).collect()
}

/// The content of what a spec refers to is part of the release, and a rollback brings it back.
#[test]
#[ignore = "needs a cluster: make stories"]
fn a_rollback_brings_back_the_settings() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "settings").unwrap();
    ground.session.apply(&namespace.name, &settings("old")).unwrap();
    let mut story = ground.live(&namespace, refer_to_settings);
    let clients = story.trade();
    let level = |story: &Story<'_>| {
        let colour = text(story.last(), "/status/live/colour");
        let name = format!("deployment/{NAME}-{colour}-user-{}", story.revision("live"));
        let source =
            "{.spec.template.spec.containers[0].env[?(@.name==\"LEVEL\")].valueFrom.configMapKeyRef.name}";
        let copy = ground.session.get(story.namespace, &name, source).unwrap();
        story
            .session
            .get(story.namespace, &format!("configmap/{copy}"), "{.data.level}")
            .unwrap()
    };
    assert_eq!(level(&story), "old");
    let first = story.revision("live");

    ground.session.apply(story.namespace, &settings("new")).unwrap();
    story.goes_live();
    assert_eq!(level(&story), "new");

    story.person("rollback");
    story.reaches("Held");
    assert_eq!(story.revision("live"), first);
    assert_eq!(level(&story), "old");
    story.all_point_at(&first);
    assert_eq!(story.last_outcome().0, "RolledBack");
    story.told.course(&["RollingBack", "RolledBack"]);
    assert_eq!(clients.end_well().len(), 2);
}

/// What others do to its children is put right; an object that lost its children finds them again; deleted, nothing is left.
/// Clients notice only what was done to the very address that they ask.
#[test]
#[ignore = "needs a cluster: make stories"]
#[expect(clippy::too_many_lines, reason = "a story")]
fn what_others_break_is_put_right() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "repairs").unwrap();
    ground.session.apply(&namespace.name, &settings("old")).unwrap();
    let mut story = ground.live(&namespace, |declaration| {
        refer_to_settings(declaration);
        declaration["spec"]["services"]["notification"]["autoscaling"] =
            json!({"minReplicas": 1, "maxReplicas": 1});
    });
    let revision = story.revision("live");
    let Clients { load, prober } = story.trade();
    let get = |object: &str, path: &str| ground.session.get(&namespace.name, object, path);
    let repaired = |what: &str, holds: &mut dyn FnMut() -> bool| {
        wait_until(what, PATIENCE, holds).unwrap_or_else(|error| {
            panic!("{error:#}\n{}", ground.session.circumstances(&namespace.name));
        });
    };

    let name = format!("{NAME}-blue-notification-{revision}");
    let (workload, budget, scaler) = (
        format!("deployment/{name}"),
        format!("poddisruptionbudget/{name}"),
        format!("horizontalpodautoscaler/{name}"),
    );
    let patch = |object: &str, patch: &str| {
        let args = ["patch", object, "--type=merge", "--patch", patch];
        let place = ["--namespace", &namespace.name];
        ground.session.kubectl(&[&args[..], &place].concat()).unwrap()
    };
    // The other limit, beside which the API server takes no `maxUnavailable`.
    patch(
        &budget,
        r#"{"spec": {"maxUnavailable": null, "minAvailable": 1}}"#,
    );
    patch(&scaler, r#"{"spec": {"maxReplicas": 5}}"#);
    story.kubectl(&["set", "image", &workload, "notification=exchange.local/foreign:1"]);
    repaired("the image", &mut || {
        let image = "{.spec.template.spec.containers[0].image}";
        get(&workload, image).unwrap().ends_with("/exchange:1.0.0")
    });
    repaired("the budget", &mut || {
        get(&budget, "{.spec.maxUnavailable}{.spec.minAvailable}").unwrap() == "1"
    });
    repaired("the autoscaler", &mut || {
        get(&scaler, "{.spec.maxReplicas}").unwrap() == "1"
    });
    story.kubectl(&["rollout", "status", &workload, "--timeout=120s"]);

    // Without its children, and created again as it was: it finds what is live, and releases from there.
    story.kubectl(&["delete", "exd", NAME, "--cascade=orphan", "--wait"]);
    // Of what has come with it nobody knows whether carol has asked for it now.
    story.declaration["metadata"]["annotations"] =
        json!({"exchange.dev/retry": "0.1", "exchange.dev/by": "carol"});
    story.declare(nothing);
    story.watch = story.exchange.watch().unwrap();
    story.reaches("Live");
    assert_eq!(story.revision("live"), revision);
    assert_eq!(story.last()["status"]["asked"]["retry"], json!({"value": "0.1"}));
    let new = get("exd/exchange", "{.metadata.uid}").unwrap();
    let copies = story_copies(&ground, &namespace.name);
    assert_eq!(copies.len(), 1, "{copies:?}");
    for child in copies
        .iter()
        .map(String::as_str)
        .chain(["service/exchange-trade"])
    {
        repaired(child, &mut || {
            get(child, "{.metadata.ownerReferences[0].uid}").is_ok_and(|uid| uid == new)
        });
    }
    story.told.course(&["Adopted", "Verified"]);
    story.declare(|spec| note(spec, "adopted"));
    story.goes_live();
    let revision = story.revision("live");
    prober.misses_nothing();
    assert_eq!(load.progress().failed, 0, "before the traffic was led astray");

    // A selector that leads nowhere: for as long as that takes, its service answers nobody who is not connected already.
    patch(
        "service/exchange-trade",
        r#"{"spec": {"selector": {"exchange.dev/revision": "elsewhere"}}}"#,
    );
    let astray = Instant::now();
    repaired("the selector", &mut || {
        story.selector("trade")["exchange.dev/revision"] == revision
    });
    // Its watch tells, and not only the look that comes each minute.
    assert!(astray.elapsed() < AT_ONCE, "after {:?}", astray.elapsed());
    prober.goes_on();
    for service in ["user", "notification"] {
        let answers = prober.answers(service);
        assert_eq!(answers.missed, 0, "the {service} service: {answers:?}");
    }
    let missed = prober.answers("trade").missed;
    prober.goes_on();
    assert_eq!(prober.answers("trade").missed, missed, "the selector is right");
    let (table, report) = load.end().unwrap();
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    assert_eq!(report["closed_without_notice"], 0, "{table}");
    let failures = report["summary"]["failures"].as_object().unwrap();
    let refused = |failure: &String| failure.starts_with("connect");
    assert!(failures.keys().all(refused), "{table}");
    assert_eq!(
        report["summary"]["stacks"].as_object().unwrap().len(),
        2,
        "{table}"
    );

    // Made again, the Service has another address, and names are cached for half a minute: until then nobody is served who
    // asks for the old one.
    story.kubectl(&["delete", "service", "exchange-user"]);
    let revision_of = "{.spec.selector.exchange\\.dev/revision}";
    repaired("the live Service", &mut || {
        get("service/exchange-user", revision_of).is_ok_and(|found| found == revision)
    });
    prober.goes_on();
    let missed = prober.answers("user").missed;
    prober.goes_on();
    assert_eq!(prober.answers("user").missed, missed, "the new address is known");
    assert_eq!(
        prober.answers("notification").missed,
        0,
        "the notification service"
    );
    story.told.course(&[]);
    drop(prober);

    // With its children, and created again before they are gone: they are waited for, and nothing is in the way.
    story.kubectl(&["delete", "exd", NAME, "--wait"]);
    story.declare(nothing);
    story.watch = story.exchange.watch().unwrap();
    story.reaches("Live");
    story.all_point_at(&story.revision("live"));
    story.told.course(&RELEASED);
    for (_, object) in story.watch.sightings() {
        let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        let stalled = conditions.find(|it| it["type"] == "Stalled" && it["status"] == "True");
        assert_eq!(stalled, None);
    }

    story.kubectl(&["delete", "exd", NAME, "--wait"]);
    let kinds = "services,deployments,jobs,controllerrevisions,poddisruptionbudgets,horizontalpodautoscalers,\
                 serviceaccounts,secrets,configmaps,pods";
    let selector = format!(
        "--selector=app.kubernetes.io/managed-by=exchange-operator,app.kubernetes.io/instance={NAME}"
    );
    let left = || story.kubectl(&["get", kinds, &selector, "--output=name"]);
    let gone = wait_until("everything to go", PATIENCE, || left().is_empty());
    assert!(gone.is_ok(), "left: {}", left());
    story.told.course(&[]);
    // What the operator has not made is somebody else's to delete.
    let stores = story.kubectl(&["get", "statefulsets,secrets", "--output=name"]);
    for kept in ["nats", "postgres", "queue", "redis"] {
        assert!(stores.contains(kept), "{kept} is not among {stores}");
    }
}

/// The admission policy: history can be trusted.
#[test]
#[ignore = "needs a cluster: make stories"]
fn nobody_signs_for_somebody_else() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "signed").unwrap();
    let mut story = ground.live(&namespace, nothing);
    let clients = story.trade();
    story.declare(|spec| note(spec, "signed"));
    story.goes_live();
    let leave = format!("exchange.dev/rollback={}", token(story.last(), "live"));
    let annotate = |by: &str| {
        let by = format!("exchange.dev/by={by}");
        let args = [
            "annotate",
            "exd",
            NAME,
            "--overwrite",
            &leave,
            &by,
            "--namespace",
            story.namespace,
        ];
        let person = ["--as=alice", "--as-group=system:masters"];
        ground.session.kubectl(&[&args[..], &person[..]].concat())
    };
    let refusal = annotate("bob").unwrap_err().to_string();
    assert!(
        refusal.contains("exchange.dev/by says bob, but it is alice who asks"),
        "{refusal}"
    );
    annotate("alice").unwrap();
    story.reaches("Held");
    let (outcome, reason, by) = story.last_outcome();
    assert_eq!(
        (outcome.as_str(), reason.as_str(), by.as_str()),
        ("RolledBack", "RolledBack", "alice")
    );
    story.told.course(&["RollingBack", "RolledBack"]);
    assert_eq!(clients.end_well().len(), 2);
    // Her signature does not sign what somebody else asks for afterwards.
    let retry = format!("exchange.dev/retry={}", token(story.last(), "rejected"));
    let args = ["annotate", "exd", NAME, &retry, "--namespace", story.namespace];
    let other = ["--as=bob", "--as-group=system:masters"];
    let refusal = story
        .session
        .kubectl(&[&args[..], &other[..]].concat())
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("it is bob who asks"), "{refusal}");
    // What a backup has kept is not asked for now: whoever restores it need not be who asked then.
    let mut restored = story.declaration.clone();
    restored["metadata"] = json!({"name": "restored", "annotations": {
        "exchange.dev/rollback": "0.1", "exchange.dev/by": "carol"}});
    let create = "kubectl create --dry-run=server --filename -";
    let create = format!(
        "{create} --namespace {} <<'END'\n{restored}\nEND",
        story.namespace
    );
    story.session.shell(&create).unwrap();
}

/// The operator of the whole cluster, at rest while this lives.
struct AtRest<'a>(&'a Session);

impl<'a> AtRest<'a> {
    fn send(session: &'a Session) -> Self {
        let rest = Self(session);
        rest.scale(0).unwrap();
        let selector = format!("--selector=app.kubernetes.io/instance={OPERATOR}");
        let pods = [
            "get",
            "pods",
            "--output=name",
            &selector,
            "--namespace",
            OPERATOR_NAMESPACE,
        ];
        let gone = || session.kubectl(&pods).is_ok_and(|pods| pods.is_empty());
        wait_until("its pods to go", PATIENCE, gone).unwrap();
        rest
    }

    fn scale(&self, replicas: usize) -> anyhow::Result<String> {
        let (deployment, replicas) = (format!("deployment/{OPERATOR}"), format!("--replicas={replicas}"));
        self.0
            .kubectl(&["scale", &deployment, &replicas, "--namespace", OPERATOR_NAMESPACE])
    }
}

impl Drop for AtRest<'_> {
    fn drop(&mut self) {
        let _ = self.scale(2);
    }
}

/// Without any right outside one namespace: it releases there, and nothing elsewhere. Uninstalled, it leaves the definition and
/// the exchange, and another operator goes on.
#[test]
#[ignore = "needs a cluster: make stories"]
fn an_operator_of_one_namespace_looks_after_that_one() {
    let ground = Ground::alone();
    let (namespace, elsewhere) = (
        Namespace::new(&ground.session, "one").unwrap(),
        Namespace::new(&ground.session, "elsewhere").unwrap(),
    );
    let rest = AtRest::send(&ground.session);
    let repository = format!("image.repository={}/exchange-operator", ground.images.prefix);
    let tag = format!("image.tag={}", ground.images.tag);
    let watched = format!("watchNamespace={}", namespace.name);
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/exchange-operator");
    let place = ["--namespace", namespace.name.as_str()];
    let mut install = vec![
        "upgrade",
        "--install",
        "only",
        chart,
        "--set",
        &repository,
        "--set",
        &tag,
    ];
    install.extend(["--set", &watched, "--set", "replicas=1", "--take-ownership"]);
    install.extend(["--wait", "--timeout", "180s"]);
    ground.session.helm(&[&install[..], &place].concat()).unwrap();

    let mut story = ground.live(&namespace, nothing);
    let clients = story.trade();
    let away = story.exchange.declaration("1.0.0");
    ground.session.apply(&elsewhere.name, &away).unwrap();
    let first = story.revision("live");

    ground
        .session
        .helm(&[&["uninstall", "only", "--wait"], &place[..]].concat())
        .unwrap();
    let definition = "crd/exchangedeployments.exchange.dev";
    ground.session.kubectl(&["get", definition]).unwrap();
    story.all_point_at(&first);
    let seen = ground
        .session
        .get(&elsewhere.name, "exd/exchange", "{.status.conditions}")
        .unwrap();
    assert!(seen.is_empty(), "it has looked elsewhere: {seen}");

    drop(rest);
    operator::recovers(&ground.session).unwrap();
    story.declare(|spec| note(spec, "another operator"));
    story.goes_live();
    assert_eq!(clients.end_well().len(), 2);
}

/// `make demo`, for which no request may fail and every phase come, where an operator is there already.
#[test]
#[ignore = "needs a cluster: make stories"]
fn the_demonstration_shows_what_it_should() {
    let ground = Ground::alone();
    demo::run(&ground.session).unwrap();
    demo::clean_up(&ground.session).unwrap();
}
