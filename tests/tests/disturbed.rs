//! Releases that are disturbed at a moment of the test's choice: a gate holds one write of the operator, and what happens
//! meanwhile happens in the middle of that phase. Each disturbance comes while the candidate is tested, and between two of
//! the three writes that move the traffic; the simulation has them everywhere. Clients trade all the while, and notice
//! nothing. `make stories` runs them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::{thread::sleep, time::Duration};

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testbed::{
    cluster::Cluster,
    exchange::{PATIENCE, is_current, phase_of, text, token},
    gate::{Gate, Hold, Moment, Write},
    kubectl::Namespace,
    operator::{self, Leader},
    rights::audit_log,
    sandbox::wait_until,
    story::{Ground, RELEASED, Story, note, serves_again},
    supervisor,
};

/// A moment of a release: before its first write of this kind to an object whose name contains this.
struct Point {
    phase: &'static str,
    of: &'static str,
    name: &'static str,
}

/// A release has three Jobs, and moves three Services. The last three are about more than a release that goes on by itself:
/// an approval, a way back, and the end of the stack before, whose colour the next release needs.
const POINTS: [Point; 8] = [
    point("Migrating", "create jobs", "-expand-"),
    point("Provisioning", "create deployments", "-trade-"),
    point("Testing", "create jobs", "-smoke-"),
    PROMOTING,
    point("Verifying", "create jobs", "-verify-"),
    point("AwaitingPromotion", "update exchangedeployments/status", ""),
    point("RollingBack", "update services", "exchange-trade"),
    point("Retiring", "delete deployments", ""),
];
const PROMOTING: Point = point("Promoting", "update services", "exchange-trade");

const fn point(phase: &'static str, of: &'static str, name: &'static str) -> Point {
    Point { phase, of, name }
}

/// While the candidate is tested, and when the first of three Services has been moved; with EVERY_PHASE=1
/// (`make e2e-long`) in every phase that writes.
fn points() -> impl Iterator<Item = &'static Point> {
    let every = std::env::var("EVERY_PHASE").is_ok_and(|it| it == "1");
    POINTS
        .iter()
        .filter(move |point| every || matches!(point.phase, "Testing" | "Promoting"))
}

impl Point {
    /// Whether the candidate has not got the traffic yet.
    fn before_the_swap(&self) -> bool {
        !matches!(self.phase, "Promoting" | "Verifying" | "RollingBack")
    }

    fn is_here(&self, object: &Value) -> bool {
        match self.phase {
            "Retiring" => text(object, "/status/previous/state") == "Retiring",
            phase => phase_of(object) == phase,
        }
    }
}

/// A release that is stopped at a point.
struct Stopped {
    write: Write,
    /// What was live before it, and the last attempt: each release counts one up.
    before: (String, u64),
    /// It was live, and is on its way back.
    back: bool,
}

/// Declares another release, and stops it at this point.
fn release_up_to(point: &Point, story: &mut Story<'_>, gate: &Gate<'_>, name: &str) -> Stopped {
    let attempt = story.last()["status"]["attempt"].as_u64().unwrap();
    let before = (story.revision("live"), attempt);
    let hold = Hold::first(point.of, point.name);
    let promotion = match point.phase {
        "AwaitingPromotion" => "Manual",
        _ => "Automatic",
    };
    let declare = |story: &mut Story<'_>| {
        story.declare(|spec| {
            spec["rollout"]["promotion"] = json!(promotion);
            note(spec, &format!("{name}, {}", point.phase));
        });
    };
    match point.phase {
        "AwaitingPromotion" => {
            declare(story);
            story.reaches(point.phase);
            gate.hold(&hold).unwrap();
            let candidate = token(story.last(), "candidate");
            story.exchange.ask("promote", &candidate).unwrap();
        }
        "RollingBack" => {
            declare(story);
            story.goes_live();
            gate.hold(&hold).unwrap();
            let live = token(story.last(), "live");
            story.exchange.ask("rollback", &live).unwrap();
        }
        _ => {
            gate.hold(&hold).unwrap();
            declare(story);
        }
    }
    let write = gate.until_held(PATIENCE).unwrap();
    story
        .watch
        .until(point.phase, PATIENCE, |object| {
            is_current(object) && point.is_here(object)
        })
        .unwrap();
    Stopped {
        write,
        before,
        back: point.phase == "RollingBack",
    }
}

/// The release has come to its end as if nothing had been: in its first attempt. What was told of it was told in the right
/// order; what the operator had on its lips when it was disturbed may be missing.
fn ends_as_if_nothing_had_been(story: &mut Story<'_>, stopped: &Stopped) {
    let (revision, attempt) = &stopped.before;
    if stopped.back {
        story.reaches("Held");
        story.all_point_at(revision);
        assert_eq!(story.revision("live"), *revision);
        assert_eq!(story.last_outcome().0, "RolledBack");
        story.told.course_with_gaps(&["RollingBack", "RolledBack"]);
        return;
    }
    story.goes_live_after(revision);
    let status = &story.last()["status"];
    assert_eq!(status["live"]["attempt"], attempt + 1, "{status:#}");
    let (outcome, _, _) = story.last_outcome();
    assert_eq!(outcome, "Verified", "{:#}", story.last()["status"]["history"]);
    story.told.course_with_gaps(&RELEASED);
}

#[test]
#[ignore = "needs a cluster: make stories"]
fn the_operator_is_killed() {
    let ground = Ground::alone();
    if ground.session.own_nodes().is_none() {
        return;
    }
    let namespace = Namespace::new(&ground.session, "operator-killed").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    let moments = [Moment::Before, Moment::After].into_iter().cycle();
    for (point, moment) in points().zip(moments) {
        let stopped = release_up_to(point, &mut story, &gate, "killed");
        gate.kill_leader(&stopped.write, moment).unwrap();
        ends_as_if_nothing_had_been(&mut story, &stopped);
        operator::recovers(&ground.session).unwrap();
    }
    assert_eq!(clients.end_well().len(), 1 + points().count());
}

/// What a pod of the operator has written in a namespace since then, and the API server has accepted, as its audit log has it.
/// Events tell, and change nothing.
fn accepted_writes(cluster: &Cluster, pod: &str, namespace: &str, since: Timestamp) -> Vec<String> {
    let log = audit_log(cluster, since).unwrap();
    let events = log
        .lines()
        .filter(|line| line.contains(pod))
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let accepted = events.filter(|event| {
        let at: Option<Timestamp> = text(event, "/stageTimestamp").parse().ok();
        let reads = matches!(text(event, "/verb"), "get" | "list" | "watch");
        let tells = text(event, "/objectRef/resource") == "events";
        let by = text(event, "/user/extra/authentication.kubernetes.io~1pod-name/0");
        let code = event["responseStatus"]["code"].as_u64();
        by == pod
            && text(event, "/objectRef/namespace") == namespace
            && at.is_some_and(|at| at >= since)
            && code.is_some_and(|code| code < 300)
            && !reads
            && !tells
    });
    let writes = accepted.map(|event| {
        let part = |pointer| text(&event, pointer).to_owned();
        let (verb, resource) = (part("/verb"), part("/objectRef/resource"));
        format!("{verb} {resource}/{}", part("/objectRef/name"))
    });
    writes.collect()
}

/// A leader that is stopped does not know that its time is over. When it goes on, another has long finished its work: what it
/// still wants to write is refused.
#[test]
#[ignore = "needs a cluster: make stories"]
fn an_old_leader_wakes_up() {
    let ground = Ground::alone();
    let Some(cluster) = ground.session.own_nodes() else {
        return;
    };
    let namespace = Namespace::new(&ground.session, "old-leader").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    let mut continued = 0;
    for point in points() {
        let stopped = release_up_to(point, &mut story, &gate, "stopped");
        let old = Leader::find(&ground.session).unwrap();
        old.stop().unwrap();
        gate.carry_out(&stopped.write).unwrap();
        old.is_succeeded().unwrap();
        ends_as_if_nothing_had_been(&mut story, &stopped);
        // The other way since, so that what the old one has in mind is wrong. Soon: it is stopped, and so not alive to the kubelet,
        // which tells it to end after half a minute, and kills it after another.
        if stopped.back {
            story.declare(|spec| note(spec, "after a way back"));
            story.goes_live();
        } else {
            let live = token(story.last(), "live");
            story.exchange.ask("rollback", &live).unwrap();
            story.reaches("Held");
        }

        let before = story.versions_of_live();
        let written = |since| accepted_writes(cluster, &old.pod, &namespace.name, since);
        assert!(
            !written(Timestamp::MIN).is_empty(),
            "{} is not in the log",
            old.pod
        );
        // It may have led and noticed before.
        let noticed = || {
            let log = ["logs", &old.pod, "--namespace", operator::OPERATOR_NAMESPACE];
            let log = ground.session.kubectl(&log).unwrap_or_default();
            log.matches("does not lead any more").count()
        };
        let (woken, times) = (Timestamp::now(), noticed());
        continued += usize::from(!old.has_ended());
        old.resume().unwrap();
        story.told.forget();
        // Told to end while it was stopped, it does that instead.
        wait_until("the old leader to notice", PATIENCE, || {
            noticed() > times || old.has_ended()
        })
        .unwrap();
        assert_eq!(story.versions_of_live(), before, "the old leader has written");
        assert_eq!(written(woken), Vec::<String>::new(), "the old leader has written");
        operator::recovers(&ground.session).unwrap();
        story.told.forget();
    }
    // One that was killed before it could go on shows nothing.
    namespace.note("old_leaders_continued", continued);
    assert_eq!(continued, points().count());
    let stacks = points().map(|point| if point.phase == "RollingBack" { 2 } else { 1 });
    assert_eq!(clients.end_well().len(), 1 + stacks.sum::<usize>());
}

#[test]
#[ignore = "needs a cluster: make stories"]
fn the_api_server_is_away() {
    let ground = Ground::alone();
    let Some(cluster) = ground.session.own_nodes() else {
        return;
    };
    let namespace = Namespace::new(&ground.session, "no-api").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    for point in points() {
        let stopped = release_up_to(point, &mut story, &gate, "away");
        let server = |signal| supervisor::signal(cluster, "kube-apiserver", signal).unwrap();
        server(Signal::SIGSTOP);
        // It answers nobody for this long: that is what the story is about.
        sleep(Duration::from_secs(30));
        server(Signal::SIGCONT);
        // Nobody may wait for the answer any more.
        let _ = gate.decide(true);
        ends_as_if_nothing_had_been(&mut story, &stopped);
        operator::recovers(&ground.session).unwrap();
    }
    assert_eq!(clients.end_well().len(), 1 + points().count());
}

/// Whatever is under way, it ends with what was declared last.
#[test]
#[ignore = "needs a cluster: make stories"]
fn a_newer_version_arrives() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "newer").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    for point in points() {
        release_up_to(point, &mut story, &gate, "overtaken");
        let status = story.last()["status"].clone();
        let stack = if status["candidate"].is_null() {
            "live"
        } else {
            "candidate"
        };
        let overtaken = story.revision(stack);
        story.declare(|spec| {
            spec["rollout"]["promotion"] = json!("Automatic");
            note(spec, &format!("newer than {}", point.phase));
        });
        gate.decide(true).unwrap();
        story
            .watch
            .until("the newer one to be live", PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == "Live"
                    && text(object, "/status/live/revision") != overtaken
                    && object["status"]["candidate"].is_null()
            })
            .unwrap();
        story.all_point_at(&story.revision("live"));
        assert_eq!(story.last_outcome().0, "Verified");
        // What has the traffic already is finished first, and what is on its way back comes back first.
        let overtaken: &[&str] = match point.phase {
            "RollingBack" => &["RollingBack", "RolledBack"],
            _ if point.before_the_swap() => &["ReleaseStarted"],
            _ => &RELEASED,
        };
        story.told.course(&[overtaken, &RELEASED].concat());
        let rendered = [
            "get",
            "controllerrevisions",
            "--output=name",
            "--selector=app.kubernetes.io/managed-by=exchange-operator",
        ];
        assert_eq!(
            story.kubectl(&rendered).lines().count(),
            2,
            "more than two stacks"
        );
    }
    clients.end_well();
}

/// All pods of one service of the candidate die when the first of three Services has been moved, and cannot come back. All go
/// back, at once and not only at the deadline.
fn dies_in_the_middle_of_the_swap(story: &mut Story<'_>, gate: &Gate<'_>, service: &str) {
    let first = story.revision("live");
    release_up_to(&PROMOTING, story, gate, "dies");
    let candidate = story.revision("candidate");
    assert_eq!(story.selector("user")["exchange.dev/revision"], candidate);
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
                       "spec": {"hard": {"pods": "0"}}});
    story.session.apply(story.namespace, &quota).unwrap();
    let selector =
        format!("--selector=exchange.dev/revision={candidate},app.kubernetes.io/component={service}");
    story.kubectl(&["delete", "pods", "--force", "--grace-period=0", &selector]);
    let ready = [
        "get",
        "endpointslices",
        "--output=jsonpath={.items[*].endpoints[*].conditions.ready}",
    ];
    let ready = || story.kubectl(&[&ready[..], &[&selector]].concat());
    wait_until("its endpoint to go", PATIENCE, || !ready().contains("true")).unwrap();
    gate.decide(true).unwrap();
    story.reaches("Held");
    story.all_point_at(&first);
    assert_eq!(text(story.last(), "/status/rejected/reason"), "PromotionFailed");
    let why = format!("the {service} service of the new stack lost its endpoints during the swap");
    assert_eq!(text(story.last(), "/status/rejected/message"), why);
    story
        .told
        .course(&["ReleaseStarted", "Promoting", "RollingBack", "RolledBack"]);
    story.kubectl(&["delete", "resourcequota", "none"]);
}

/// Clients notice nothing: it has not had their traffic yet.
#[test]
#[ignore = "needs a cluster: make stories"]
fn a_service_of_the_candidate_dies_before_it_is_moved() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "half-dead").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    dies_in_the_middle_of_the_swap(&mut story, &gate, "notification");
    clients.end_well();
}

/// Its clients find nobody until they are back.
#[test]
#[ignore = "needs a cluster: make stories"]
fn a_service_of_the_candidate_dies_after_it_was_moved() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "moved-dead").unwrap();
    let mut story = ground.live(&namespace, |_| {});
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let clients = story.trade();
    dies_in_the_middle_of_the_swap(&mut story, &gate, "user");
    serves_again(&clients.load);
    let (table, report) = clients.load.end().unwrap();
    namespace.note("requests_failed", report["summary"]["failed"].clone());
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    // What else is live has gone on.
    let failed = report["summary"]["failed_requests"].as_array().unwrap();
    let of_users = |it: &Value| ["login", "keys"].contains(&text(it, "/operation"));
    assert!(failed.iter().all(of_users), "{table}");
}
