//! The proof that nothing is lost: releases under a load that retries nothing and audits everything afterwards. Each case
//! asserts that no request failed, that no connection was cut, that the money is right, and how it ended. `make e2e` runs
//! them, `make e2e CASE=2` one of them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use testbed::{
    broker::Broker,
    exchange::{Exchange, Load, PATIENCE, Watch, is_current, phase_of, text, token},
    gate::{Gate, Hold, Moment},
    kubectl::Namespace,
    operator,
    progress::say,
    story::Ground,
    supervisor,
};

/// Requests a second.
const RATE: u32 = 200;
/// As declared by the harness; afterwards nothing may be left on the old stack.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// An exchange of this version that is live, with its clients.
fn trading<'a>(ground: &'a Ground, namespace: &'a Namespace<'_>, version: &str) -> Trading<'a> {
    let exchange = Exchange::install(&ground.session, &namespace.name, &ground.images).unwrap();
    exchange.release(&exchange.declaration(version)).unwrap();
    let mut watch = exchange.watch().unwrap();
    watch.until_phase("Live", version, PATIENCE).unwrap();
    exchange.make_treasury().unwrap();
    let load = exchange.start_load(RATE).unwrap();
    Trading {
        namespace,
        exchange,
        watch,
        load,
    }
}

struct Trading<'a> {
    namespace: &'a Namespace<'a>,
    exchange: Exchange<'a>,
    watch: Watch,
    load: Load<'a>,
}

impl Trading<'_> {
    fn last(&self) -> &Value {
        &self.watch.sightings().last().unwrap().1
    }

    /// Lets the clients trade until they have made so many requests more.
    fn trade(&self, requests: u64) {
        let goal = self.load.progress().requests + requests;
        testbed::sandbox::wait_until("trading", PATIENCE, || self.load.progress().requests >= goal).unwrap();
    }

    /// Ends the load: nothing may have failed, nothing be lost.
    fn end_well(self) -> Value {
        let (table, report) = self.load.end().unwrap();
        say(&table);
        self.namespace
            .note("requests_answered", report["summary"]["requests"].clone());
        self.namespace
            .note("requests_failed", report["summary"]["failed"].clone());
        self.namespace.note("audit", report["audit"].clone());
        assert_eq!(report["summary"]["failed"], 0, "{table}");
        assert_eq!(report["closed_without_notice"], 0, "{table}");
        assert_eq!(report["streams_cut_off"], 0, "{table}");
        assert_eq!(report["audit"]["findings"], json!([]), "{table}");
        assert_eq!(report["audit"]["ledger_checked"], true, "{table}");
        assert!(report["audit"]["trades"].as_u64().unwrap() > 100, "{table}");
        report
    }
}

/// The same version with another setting: a release without a migration.
fn with_setting(mut declaration: Value, value: &str) -> Value {
    declaration["spec"]["services"]["trade"]["env"] = json!([{"name": "RELEASE_NOTE", "value": value}]);
    declaration
}

fn revision(object: &Value) -> String {
    text(object, "/status/live/revision").to_owned()
}

/// How long the traffic was between two stacks, as status tells it: from the record of the move to its end.
fn moves(watch: &Watch) -> Vec<Duration> {
    let mut begun: Option<Instant> = None;
    let mut all = Vec::new();
    for (at, object) in watch.sightings() {
        let moving = matches!(phase_of(object), "Promoting" | "RollingBack");
        match (moving, begun) {
            (true, None) => begun = Some(*at),
            (false, Some(since)) => {
                all.push(at.duration_since(since));
                begun = None;
            }
            _ => {}
        }
    }
    all
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_1_releases_back_and_forth() {
    let releases: usize = std::env::var("RELEASES").map_or(5, |count| count.parse().unwrap());
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "releases").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    let mut stacks = vec![revision(trading.last())];
    for number in 1..=releases {
        trading.trade(500);
        let declaration = with_setting(trading.exchange.declaration("1.0.0"), &number.to_string());
        trading.exchange.release(&declaration).unwrap();
        let before = stacks.last().unwrap().clone();
        trading
            .watch
            .until("the next release to be live", PATIENCE, |object| {
                is_current(object) && phase_of(object) == "Live" && revision(object) != before
            })
            .unwrap();
        stacks.push(revision(trading.last()));
        // Its pods go only after it has had no connection for a while: not because the time was over.
        trading
            .watch
            .until("the old stack to be drained", PATIENCE, |object| {
                text(object, "/status/previous/state") == "Retained"
            })
            .unwrap();
        assert!(
            !text(trading.last(), "/status/previous/idleSince").is_empty(),
            "{:#}",
            trading.last()["status"]
        );
    }
    trading.trade(500);
    let moves = moves(&trading.watch);
    let report = trading.end_well();
    assert_eq!(
        moves.len(),
        releases + 1,
        "the first deployment and each release move the traffic once"
    );
    let milliseconds = |time: &Duration| u64::try_from(time.as_millis()).unwrap();
    let mut times: Vec<u64> = moves.iter().map(milliseconds).collect();
    times.sort_unstable();
    namespace.note("swap_milliseconds", times[times.len() / 2]);
    let presence = |revision: &str, field: &str| {
        let all = report["summary"]["stacks"].as_object().unwrap();
        let (_, stack) = all.iter().find(|(name, _)| name.ends_with(revision)).unwrap();
        stack[field].as_u64().unwrap()
    };
    let drains = stacks
        .windows(2)
        .map(|pair| presence(&pair[0], "last_ms").saturating_sub(presence(&pair[1], "first_ms")));
    let longest = Duration::from_millis(drains.max().unwrap());
    namespace.note("drain_seconds", longest.as_secs());
    assert!(
        longest < DRAIN_TIMEOUT,
        "a connection stayed on the old stack for {longest:?}"
    );
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_2_a_migration_and_the_way_back() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "migration").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    let first = revision(trading.last());

    // Forward, and back before the contract: version 1 serves on what version 2 has written.
    trading
        .exchange
        .release(&trading.exchange.declaration("2.0.0"))
        .unwrap();
    trading.watch.until_phase("Live", "2.0.0", PATIENCE).unwrap();
    trading.trade(1_000);
    let begun = Instant::now();
    let leave = token(trading.last(), "live");
    trading.exchange.ask("rollback", &leave).unwrap();
    trading
        .watch
        .until("version 1 to be live again", PATIENCE, |object| {
            phase_of(object) == "Held" && revision(object) == first
        })
        .unwrap();
    let back = begun.elapsed();
    trading.trade(1_000);

    // Forward again, and this time to the contract, which comes when the old stack is gone.
    let retry = token(trading.last(), "rejected");
    let mut declaration = trading.exchange.declaration("2.0.0");
    declaration["spec"]["rollout"]["retention"] = json!("5s");
    trading.exchange.release(&declaration).unwrap();
    trading.exchange.ask("retry", &retry).unwrap();
    trading
        .watch
        .until("version 2 to be live and contracted", PATIENCE, |object| {
            phase_of(object) == "Live"
                && text(object, "/status/live/version") == "2.0.0"
                && object["status"]["live"]["contracted"] == true
        })
        .unwrap();
    let leave = token(trading.last(), "live");
    trading.exchange.ask("rollback", &leave).unwrap();
    trading.trade(1_000);
    let rollback = trading.last()["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|condition| condition["type"] == "RollbackAvailable")
        .unwrap()
        .clone();
    assert_eq!(rollback["status"], "False", "{rollback}");
    assert!(!text(&rollback, "/message").is_empty(), "{rollback}");
    assert_eq!(text(trading.last(), "/status/live/version"), "2.0.0");
    trading.end_well();
    namespace.note("rollback_milliseconds", u64::try_from(back.as_millis()).unwrap());
}

/// Trades of the live lane in which not both orders are of the live lane.
const MIXED_TRADES: &str = "select count(*) from trades where lane = 'live' and (select count(*) from orders \
                            where id in (taker_order_id, maker_order_id) and orders.lane = 'live') <> 2";

/// The most workers that were seen to wait for messages of a consumer of the live lane, over some pulls.
fn most_waiting(broker: &Broker) -> usize {
    let sample = || broker.waiting().unwrap().into_iter().max().unwrap();
    let samples = (0..60).map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        sample()
    });
    samples.max().unwrap()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_3_the_queue_has_one_colour_of_readers() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "queue").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    let broker = Broker::of(&ground.session, &namespace.name).unwrap();
    // What the broker has sent to the pods of a stack while the clients traded.
    let sent = |trading: &Trading<'_>, revisions: [&str; 2]| {
        let count = |revision: &str| -> Option<u64> {
            let connections = broker.connections().unwrap().into_iter();
            let own = connections.filter(|connection| connection.name.ends_with(revision));
            own.map(|connection| connection.out_msgs)
                .reduce(|sum, more| sum + more)
        };
        let before = revisions.map(|revision| count(revision).unwrap());
        trading.trade(2_000);
        let after = revisions.map(|revision| count(revision).unwrap());
        [after[0] - before[0], after[1] - before[1]]
    };
    trading.trade(500);
    let alone = most_waiting(&broker);
    assert!(alone > 0, "nobody reads the queue");
    let first = revision(trading.last());

    // Tested, and waiting for approval, the candidate reads nothing of the live lane.
    let mut declaration = with_setting(trading.exchange.declaration("1.0.0"), "manual");
    declaration["spec"]["rollout"]["promotion"] = json!("Manual");
    trading.exchange.release(&declaration).unwrap();
    trading
        .watch
        .until_phase("AwaitingPromotion", "1.0.0", PATIENCE)
        .unwrap();
    let candidate = text(trading.last(), "/status/candidate/revision").to_owned();
    assert_eq!(most_waiting(&broker), alone, "somebody else reads the live lane");
    let [live, other] = sent(&trading, [&first, &candidate]);
    namespace.note("sent_to_live", live);
    namespace.note("sent_to_candidate", other);
    assert!(
        live > 200 && other * 20 < live,
        "the broker has sent {live} to the live stack, {other} to the candidate"
    );

    // After the swap the new stack reads, alone; after a rollback the old one.
    let approved = token(trading.last(), "candidate");
    trading.exchange.ask("promote", &approved).unwrap();
    let retained = |object: &Value| text(object, "/status/previous/state") == "Retained";
    trading
        .watch
        .until("the old stack to be drained", PATIENCE, retained)
        .unwrap();
    assert_eq!(revision(trading.last()), candidate);
    assert_eq!(most_waiting(&broker), alone, "both stacks read the live lane");
    let [live, other] = sent(&trading, [&candidate, &first]);
    assert!(
        live > 200 && other * 20 < live,
        "the broker has sent {live} to the live stack, {other} to the old one"
    );
    trading.exchange.ask("rollback", &approved).unwrap();
    trading
        .watch
        .until("the way back", PATIENCE, |object| {
            phase_of(object) == "Held" && revision(object) == first
        })
        .unwrap();
    trading.trade(1_000);
    let [live, other] = sent(&trading, [&first, &candidate]);
    assert!(
        live > 200 && other * 20 < live,
        "the broker has sent {live} to the stack gone back to, {other} to the one left"
    );
    drop(broker);

    // The broker is restarted in the middle of a swap.
    let declaration = with_setting(trading.exchange.declaration("1.0.0"), "restart");
    trading.exchange.release(&declaration).unwrap();
    trading
        .watch
        .until("the swap", PATIENCE, |object| {
            is_current(object) && phase_of(object) == "Promoting"
        })
        .unwrap();
    let delete = [
        "delete",
        "pods",
        "--namespace",
        &namespace.name,
        "--grace-period=0",
        "--force",
    ];
    let broker = ["--wait=false", "--selector=app.kubernetes.io/name=nats"];
    ground.session.kubectl(&[&delete[..], &broker].concat()).unwrap();
    trading
        .watch
        .until("the release to be live", PATIENCE, |object| {
            is_current(object) && phase_of(object) == "Live" && revision(object) != first
        })
        .unwrap();
    trading.trade(1_000);
    assert_eq!(trading.exchange.sql(MIXED_TRADES).unwrap().trim(), "0");
    trading.end_well();
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_6_event_streams_move_between_two_events() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "streams").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    let first = revision(trading.last());
    trading.trade(500);
    let declaration = with_setting(trading.exchange.declaration("1.0.0"), "streams");
    trading.exchange.release(&declaration).unwrap();
    let retained = |object: &Value| text(object, "/status/previous/state") == "Retained";
    trading
        .watch
        .until("the old stack to be drained", PATIENCE, retained)
        .unwrap();
    let second = revision(trading.last());
    assert_ne!(first, second);
    trading.trade(500);
    // The audit has found every notification once in each stream, in its order, without a gap.
    let report = trading.end_well();
    let of = |revision: &str| -> Vec<&Value> {
        let openings = report["streams"].as_array().unwrap().iter();
        openings
            .filter(|opening| text(opening, "/stack").ends_with(revision))
            .collect()
    };
    let moved = of(&first);
    assert!(
        moved.len() >= 4 && of(&second).len() >= 4,
        "{:#}",
        report["streams"]
    );
    assert!(
        moved.iter().all(|opening| opening["end"] == "between_events"),
        "{moved:#?}"
    );
    let stacks = report["summary"]["stacks"].as_object().unwrap();
    let (_, new) = stacks.iter().find(|(name, _)| name.ends_with(&second)).unwrap();
    let swapped = new["first_ms"].as_f64().unwrap();
    let longest = moved
        .iter()
        .map(|opening| opening["to_ms"].as_f64().unwrap() - swapped);
    let longest = longest.fold(0.0, f64::max) / 1_000.0;
    namespace.note("streams_ended_seconds_after_the_swap", longest);
    // A pod knows that it drains after two answers of the other stack, a second apart; then it has five seconds.
    assert!(longest < 8.0, "a stream stayed on the old stack for {longest} s");
}

/// Kinds of everything that the operator makes.
const CHILDREN: &str = "services,deployments,jobs,controllerrevisions,poddisruptionbudgets,horizontalpodautoscalers,\
                        serviceaccounts,secrets,configmaps";

/// How a release has ended, in words that are the same for each: the live stack's names are replaced by `live`, those of
/// the one before by `previous`.
fn end_state(ground: &Ground, namespace: &str) -> Value {
    let get = |path| ground.session.get(namespace, "exd/exchange", path).unwrap();
    let status: Value = serde_json::from_str(&get("{.status}")).unwrap();
    let of_ours = "--selector=app.kubernetes.io/managed-by=exchange-operator";
    let list = [
        "get",
        CHILDREN,
        of_ours,
        "--output=name",
        "--namespace",
        namespace,
    ];
    let mut names = ground.session.kubectl(&list).unwrap();
    let attempt = |stack: &str| status[stack]["attempt"].as_u64().unwrap();
    for stack in ["live", "previous"] {
        for field in ["revision", "colour"] {
            names = names.replace(text(&status, &format!("/{stack}/{field}")), stack);
        }
        // The Jobs of its attempt, and not of another one.
        for gate in ["expand", "smoke", "verify"] {
            names = names.replace(&format!("-{gate}-{}\n", attempt(stack)), &format!("-{gate}\n"));
        }
    }
    let mut names: Vec<&str> = names.lines().collect();
    names.sort_unstable();
    let conditions = status["conditions"].as_array().unwrap().iter();
    let conditions: Vec<Value> = conditions
        .map(|it| json!([it["type"], it["status"], it["reason"]]))
        .collect();
    json!({
        "phase": status["phase"],
        "attempts": attempt("live") - attempt("previous"),
        "live": [status["live"]["verified"], status["live"]["contracted"]],
        "previous": [status["previous"]["state"], status["previous"]["wayBack"]],
        "rejected": status["rejected"],
        "history": [status["history"][0]["outcome"], status["history"][1]["outcome"]],
        "conditions": conditions,
        "objects": names,
    })
}

/// Another release, until it is live and nothing more is to be done. While it is under way, `meanwhile` is asked again and
/// again.
fn release_and_settle(trading: &mut Trading<'_>, name: &str, mut meanwhile: impl FnMut()) {
    let before = revision(trading.last());
    let declaration = with_setting(trading.exchange.declaration("1.0.0"), name);
    trading.exchange.release(&declaration).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let settled = |object: &Value| {
        is_current(object)
            && phase_of(object) == "Live"
            && revision(object) != before
            && text(object, "/status/previous/state") == "Retained"
    };
    while !settled(trading.last()) {
        assert!(
            Instant::now() < deadline,
            "{name}: {:#}",
            trading.last()["status"]
        );
        trading.watch.next(Duration::from_millis(20)).unwrap();
        meanwhile();
    }
}

/// Releases in a row, each with the operator killed at one of its writes, which are counted in one that nobody disturbs:
/// `choose` says which and when. Each has to end as the undisturbed one did. Returns how many writes there are to choose of.
fn kill_at(ground: &Ground, choose: impl FnOnce(usize) -> Vec<(usize, Moment)>) -> usize {
    let namespace = Namespace::new(&ground.session, "killed").unwrap();
    let mut trading = trading(ground, &namespace, "1.0.0");
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    // The second one has an older stack to remove, as all that follow.
    release_and_settle(&mut trading, "the second", || {});
    gate.record().unwrap();
    release_and_settle(&mut trading, "undisturbed", || {});
    let writes = gate.seen().unwrap().writes;
    let undisturbed = end_state(ground, &namespace.name);
    let mut reached = 0_u64;
    for (number, moment) in choose(writes.len()) {
        let of = String::new();
        gate.hold(&Hold { of, number }).unwrap();
        let name = format!("{moment:?} {number}");
        release_and_settle(&mut trading, &name, || {
            if let Some(write) = gate.held().unwrap() {
                say(format!(
                    "killed {moment:?} write {number} of {}: {write}",
                    writes.len()
                ));
                gate.kill_leader(&write, moment).unwrap();
                reached += 1;
            }
        });
        let same = || end_state(ground, &namespace.name) == undisturbed;
        let waited = testbed::sandbox::wait_until("the end of the undisturbed run", PATIENCE, same);
        assert!(
            waited.is_ok(),
            "{name}: it ended as\n{:#}\nand undisturbed as\n{undisturbed:#}",
            end_state(ground, &namespace.name)
        );
        operator::recovers(&ground.session).unwrap();
    }
    namespace.note("writes_of_a_release", writes.len());
    namespace.note("operators_killed", reached);
    drop(gate);
    trading.end_well();
    // A release may have a write less than the recorded one; most have to be hit.
    assert!(reached > 0, "no operator was killed");
    writes.len()
}

/// Six writes of a release, each moment twice; SEED=… chooses the same again. With EVERY_WRITE=1 (`make e2e-long`) all of
/// them, at all moments.
#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_4_the_operator_is_killed() {
    let ground = Ground::alone();
    if std::env::var("EVERY_WRITE").is_ok_and(|it| it == "1") {
        // Some at a time: the clients' audit at the end of each stays small.
        const AT_A_TIME: usize = 10;
        let (mut from, mut all) = (0, 1);
        while from < all {
            all = kill_at(&ground, |all| {
                let numbers = from..all.min(from + AT_A_TIME);
                numbers
                    .flat_map(|number| Moment::ALL.map(|moment| (number, moment)))
                    .collect()
            });
            from += AT_A_TIME;
        }
        return;
    }
    let seed: u64 = std::env::var("SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    say(format!("SEED={seed} chooses the same writes again"));
    let mut random = StdRng::seed_from_u64(seed);
    kill_at(&ground, |all| {
        let moments = Moment::ALL.into_iter().cycle().take(6);
        moments
            .map(|moment| (random.random_range(0..all), moment))
            .collect()
    });
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_10_a_bad_version_never_gets_traffic() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "bad").unwrap();
    let mut trading = trading(&ground, &namespace, "2.0.0");
    let good = revision(trading.last());
    let bad = trading.exchange.declaration("2.0.1-fails-smoke");
    trading.exchange.release(&bad).unwrap();
    trading
        .watch
        .until_phase("Failed", "2.0.1-fails-smoke", PATIENCE)
        .unwrap();
    trading.trade(500);
    assert_eq!(revision(trading.last()), good);
    let report = trading.end_well();
    let stacks = report["summary"]["stacks"].as_object().unwrap();
    assert_eq!(stacks.len(), 1, "somebody else has answered: {stacks:?}");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_8_two_exchanges_are_released_at_once() {
    let ground = Ground::shared();
    let other = Namespace::new(&ground.session, "beside").unwrap();
    let beside = Exchange::install(&ground.session, &other.name, &ground.images).unwrap();
    beside.release(&beside.declaration("1.0.0")).unwrap();
    let mut watch = beside.watch().unwrap();
    let namespace = Namespace::new(&ground.session, "both").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
    let changed = |exchange: &Exchange<'_>| with_setting(exchange.declaration("1.0.0"), "both");
    trading.exchange.release(&changed(&trading.exchange)).unwrap();
    beside.release(&changed(&beside)).unwrap();
    let again = |object: &Value| {
        is_current(object) && phase_of(object) == "Live" && text(object, "/status/live/colour") == "green"
    };
    trading
        .watch
        .until("the one to be live again", PATIENCE, again)
        .unwrap();
    watch
        .until("the other to be live again", PATIENCE, again)
        .unwrap();
    trading.end_well();
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_5_pods_and_the_database_end_during_the_swap() {
    let ground = Ground::alone();
    let namespace = Namespace::new(&ground.session, "disturbed").unwrap();
    let mut trading = trading(&ground, &namespace, "1.0.0");
    // The node's own programs: what they have set up stays, and nobody may notice.
    if let Some(cluster) = &ground.session.cluster {
        trading.trade(500);
        let before = revision(trading.last());
        let declaration = with_setting(trading.exchange.declaration("1.0.0"), "node");
        trading.exchange.release(&declaration).unwrap();
        let promoting = |object: &Value| is_current(object) && phase_of(object) == "Promoting";
        trading.watch.until("the swap", PATIENCE, promoting).unwrap();
        for component in ["kubelet", "kube-proxy"] {
            supervisor::signal(cluster, component, Signal::SIGKILL).unwrap();
        }
        let live = |object: &Value| phase_of(object) == "Live" && revision(object) != before;
        trading
            .watch
            .until("the release to be live", PATIENCE, live)
            .unwrap();
        trading.trade(500);
        assert_eq!(
            trading.load.progress().failed,
            0,
            "a request failed while kubelet and kube-proxy were away"
        );
    }
    let victims = [
        "app.kubernetes.io/component=trade",
        "app.kubernetes.io/name=postgres",
    ];
    for (number, victim) in victims.into_iter().enumerate() {
        trading.trade(500);
        let before = revision(trading.last());
        let declaration = with_setting(trading.exchange.declaration("1.0.0"), &number.to_string());
        trading.exchange.release(&declaration).unwrap();
        trading
            .watch
            .until("the swap", PATIENCE, |object| {
                is_current(object) && phase_of(object) == "Promoting"
            })
            .unwrap();
        let delete = ["delete", "pods", "--namespace", &namespace.name, "--wait=false"];
        // Of the trade service, the pods that had the traffic.
        let selector = match number {
            0 => format!("--selector={victim},exchange.dev/revision={before}"),
            _ => format!("--selector={victim}"),
        };
        let now = ["--grace-period=0", "--force", &selector];
        ground.session.kubectl(&[&delete[..], &now[..]].concat()).unwrap();
        trading
            .watch
            .until("an end", PATIENCE, |object| {
                is_current(object)
                    && matches!(phase_of(object), "Live" | "Held")
                    && object["status"]["candidate"].is_null()
            })
            .unwrap();
    }
    trading.trade(500);
    let (table, report) = trading.load.end().unwrap();
    say(&table);
    namespace.note("requests_answered", report["summary"]["requests"].clone());
    namespace.note("requests_failed", report["summary"]["failed"].clone());
    namespace.note("failures", report["summary"]["failures"].clone());
    // What was in flight may have failed; the audit has asked for each of them again, with the same key.
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    let failures = report["summary"]["failures"].as_object().unwrap();
    let broken = |failure: &String| failure == "status 503" || !failure.starts_with("status ");
    assert!(failures.keys().all(broken), "{table}");
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_7_the_candidate_is_as_big_as_what_an_autoscaler_has_made_of_the_live_stack() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "grown").unwrap();
    let declare = |exchange: &Exchange<'_>, value: &str| {
        let mut declaration = with_setting(exchange.declaration("1.0.0"), value);
        let trade = &mut declaration["spec"]["services"]["trade"];
        trade["resources"] = json!({"requests": {"cpu": "20m"}});
        trade["autoscaling"] =
            json!({"minReplicas": 1, "maxReplicas": 3, "targetCPUUtilizationPercentage": 50});
        declaration
    };
    let mut trading = trading(&ground, &namespace, "1.0.0");
    let trade_of = |revision: &str| {
        let selector =
            format!("--selector=app.kubernetes.io/component=trade,exchange.dev/revision={revision}");
        let path = "--output=jsonpath={.items[0].spec.replicas}";
        let args = [
            "get",
            "deployments",
            "--namespace",
            &namespace.name,
            &selector,
            path,
        ];
        ground
            .session
            .kubectl(&args)
            .unwrap_or_default()
            .parse::<u32>()
            .unwrap_or(0)
    };
    let first = revision(trading.last());
    trading
        .exchange
        .release(&declare(&trading.exchange, "small"))
        .unwrap();
    let live_again = |watch: &mut Watch, before: &str| {
        watch
            .until("the release to be live", PATIENCE, |object| {
                is_current(object) && phase_of(object) == "Live" && revision(object) != before
            })
            .unwrap();
    };
    live_again(&mut trading.watch, &first);
    let grown = revision(trading.last());
    testbed::sandbox::wait_until("the autoscaler", PATIENCE, || trade_of(&grown) > 1).unwrap();
    let before = trade_of(&grown);
    trading
        .exchange
        .release(&declare(&trading.exchange, "big"))
        .unwrap();
    trading
        .watch
        .until("the swap", PATIENCE, |object| {
            is_current(object) && phase_of(object) == "Promoting"
        })
        .unwrap();
    let candidate = text(trading.last(), "/status/candidate/revision").to_owned();
    let size = trade_of(&candidate);
    assert!(
        size >= before && size > 1,
        "the candidate has {size} pods, the live stack had {before}"
    );
    live_again(&mut trading.watch, &grown);
    trading.end_well();
}

/// No promise of ours: what the same images lose without the operator, for comparison.
#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_9_a_rolling_update_for_comparison() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "rolling").unwrap();
    let exchange = Exchange::install(&ground.session, &namespace.name, &ground.images).unwrap();
    let plain = |file: &str, version: &str| {
        let path = format!("{}/../examples/plain/{file}.yaml", env!("CARGO_MANIFEST_DIR"));
        let manifest = std::fs::read_to_string(path).unwrap();
        let image = format!("{}/exchange:{version}", ground.images.prefix);
        let manifest = manifest.replace("ghcr.io/acme/exchange:1.0.0", &image);
        ground.session.apply_manifest(&namespace.name, &manifest).unwrap();
    };
    let services = ["user", "trade", "notification"];
    let release = |version: &str| {
        let migrated = [
            "delete",
            "job",
            "exchange-expand",
            "--ignore-not-found",
            "--wait",
            "--namespace",
            &namespace.name,
        ];
        ground.session.kubectl(&migrated).unwrap();
        plain("migrate", version);
        ground
            .session
            .wait(
                &namespace.name,
                "job/exchange-expand",
                "condition=Complete",
                PATIENCE,
            )
            .unwrap();
        for service in services {
            plain(service, version);
        }
        for service in services {
            let deployment = format!("deployment/exchange-{service}");
            let status = [
                "rollout",
                "status",
                &deployment,
                "--timeout=240s",
                "--namespace",
                &namespace.name,
            ];
            ground.session.kubectl(&status).unwrap();
        }
    };
    plain("settings", "1.0.0");
    release("1.0.0");
    exchange.make_treasury().unwrap();
    let load = exchange.start_load(RATE).unwrap();
    let trade = |requests: u64| {
        let goal = load.progress().requests + requests;
        testbed::sandbox::wait_until("trading", PATIENCE, || load.progress().requests >= goal).unwrap();
    };
    trade(500);
    release("2.0.0");
    trade(2_000);
    let (table, report) = load.end().unwrap();
    say(&table);
    namespace.note("requests_answered", report["summary"]["requests"].clone());
    namespace.note("requests_failed", report["summary"]["failed"].clone());
    namespace.note("failures", report["summary"]["failures"].clone());
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
}
