//! How long a release takes at its decisive moments: measured on a cluster, medians of several. `make bench-operator`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark that cannot go on fails by panicking"
)]

use std::{
    collections::BTreeMap,
    io::BufReader,
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use testbed::{
    exchange::{self, Exchange, Images, PATIENCE, is_current, phase_of, text},
    kubectl::{Namespace, Session},
    operator::{self, OPERATOR_NAMESPACE},
    progress::say,
    results,
};

/// Requests a second: enough that each connection carries one every half second.
const RATE: u32 = 100;

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

/// All changes of the objects of a kind, with when they were seen.
struct Changes {
    child: Child,
    seen: Arc<Mutex<Vec<(u64, Value)>>>,
}

impl Changes {
    fn of(session: &Session, namespace: &str, kind: &str) -> Self {
        let args = ["get", kind, "--namespace", namespace, "--watch", "--output=json"];
        let mut child = session.follow(&args).unwrap();
        let output = child.stdout.take().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let writer = Arc::clone(&seen);
        thread::spawn(move || {
            let objects = serde_json::Deserializer::from_reader(BufReader::new(output)).into_iter::<Value>();
            for object in objects.map_while(Result::ok) {
                writer
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((now_ms(), object));
            }
        });
        Self { child, seen }
    }

    /// When the first change after `since` was seen that is like this.
    fn first(&self, since: u64, holds: impl Fn(&Value) -> bool) -> Option<u64> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter()
            .find(|(at, object)| *at >= since && holds(object))
            .map(|(at, _)| *at)
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// When all three live Services were seen to point at the revision.
fn all_moved(services: &Changes, since: u64, revision: &str) -> u64 {
    let moved = |service: &str| {
        let name = format!("{}-{service}", exchange::NAME);
        services.first(since, |object| {
            text(object, "/metadata/name") == name
                && object["spec"]["selector"]["exchange.dev/revision"] == revision
        })
    };
    ["user", "trade", "notification"]
        .into_iter()
        .map(|service| moved(service).unwrap())
        .max()
        .unwrap()
}

/// Writes of all replicas of the operator since they started, by verb and kind, without the lease.
fn writes(session: &Session) -> u64 {
    let pods = session
        .kubectl(&[
            "get",
            "pods",
            "--namespace",
            OPERATOR_NAMESPACE,
            "--output=jsonpath={.items[*].metadata.name}",
        ])
        .unwrap();
    let count = |pod: &str| -> u64 {
        let path = format!("/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods/{pod}:8080/proxy/metrics");
        let page = session.kubectl(&["get", "--raw", &path]).unwrap();
        page.lines()
            .filter(|line| line.starts_with("exchange_operator_writes_total{") && !line.contains("Lease"))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
            .sum()
    };
    pods.split_whitespace().map(count).sum()
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Prints medians, and writes them.
fn publish(releases: usize, report: &Value, measured: BTreeMap<&str, Vec<u64>>) {
    say(format!("  {:<60} {:>8} {:>8} {:>8}", "", "MEDIAN", "MIN", "MAX"));
    let mut figures = json!({"releases": releases, "requests": report["summary"]["requests"],
                             "requests_failed": report["summary"]["failed"]});
    for (what, mut values) in measured {
        let middle = median(&mut values);
        say(format!(
            "  {what:<60} {middle:>8} {:>8} {:>8}",
            values[0],
            values[values.len() - 1]
        ));
        figures[what] = json!({"median": middle, "min": values[0], "max": values[values.len() - 1]});
    }
    let path = results::write("operator", &figures).unwrap();
    say(format!("  {}", path.display()));
}

#[test]
#[ignore = "a benchmark: make bench-operator"]
fn releases() {
    let count: usize = std::env::var("RELEASES").map_or(10, |count| count.parse().unwrap());
    let session = Session::from_environment().unwrap();
    let images = Images::from_environment().unwrap();
    operator::install(&session, &images).unwrap();
    let namespace = Namespace::new(&session, "bench").unwrap();
    let exchange = Exchange::install(&session, &namespace.name, &images).unwrap();
    exchange.release(&exchange.declaration("1.0.0")).unwrap();
    let mut watch = exchange.watch().unwrap();
    watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
    exchange.make_treasury().unwrap();
    let jobs = Changes::of(&session, &namespace.name, "jobs");
    let services = Changes::of(&session, &namespace.name, "services");
    let load = exchange.start_load(RATE).unwrap();
    let live = |object: &Value| text(object, "/status/live/revision").to_owned();
    let mut stacks = vec![live(&watch.sightings().last().unwrap().1)];
    let mut measured: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    let mut moved = BTreeMap::new();
    let mut settings = 0..;
    let declare = |number: usize| {
        let mut declaration = exchange.declaration("1.0.0");
        declaration["spec"]["services"]["trade"]["env"] =
            json!([{"name": "RELEASE_NOTE", "value": number.to_string()}]);
        declaration
    };
    for _ in 0..count {
        let (since, before) = (now_ms(), stacks.last().unwrap().clone());
        let written = writes(&session);
        let declaration = declare(settings.next().unwrap());
        exchange.release(&declaration).unwrap();
        watch
            .until("the release to be live", PATIENCE, |object| {
                is_current(object) && phase_of(object) == "Live" && live(object) != before
            })
            .unwrap();
        let revision = live(&watch.sightings().last().unwrap().1);
        let tested = jobs
            .first(since, |job| {
                text(job, "/metadata/labels/exchange.dev~1job") == "smoke" && job["status"]["succeeded"] == 1
            })
            .unwrap();
        let all = all_moved(&services, since, &revision);
        measured
            .entry("tests_passed_to_selectors_moved_milliseconds")
            .or_default()
            .push(all.saturating_sub(tested));
        measured
            .entry("writes_per_release")
            .or_default()
            .push(writes(&session) - written);
        moved.insert(revision.clone(), all);
        stacks.push(revision);
        say(format!("release {} of {count}", stacks.len() - 1));
    }

    // The way back: the spec before is declared again, within its retention.
    let (since, target) = (now_ms(), stacks[stacks.len() - 2].clone());
    exchange.release(&declare(count - 2)).unwrap();
    watch
        .until("the way back", PATIENCE, |object| {
            is_current(object) && phase_of(object) == "Live" && live(object) == target
        })
        .unwrap();
    let back = all_moved(&services, since, &target);
    measured
        .entry("reverted_spec_to_selectors_moved_milliseconds")
        .or_default()
        .push(back - since);

    let seen = load.progress().requests;
    testbed::sandbox::wait_until("trading", PATIENCE, || load.progress().requests > seen + 1_000).unwrap();
    let (table, report) = load.end().unwrap();
    let started = report["started_unix_ms"].as_u64().unwrap();
    let at = |revision: &str, field: &str| {
        let all = report["summary"]["stacks"].as_object().unwrap();
        let (_, stack) = all.iter().find(|(name, _)| name.ends_with(revision)).unwrap();
        started + stack[field].as_u64().unwrap()
    };
    // The last pair was swapped back: it answers twice.
    for pair in stacks.windows(2).take(count - 1) {
        let when = moved[&pair[1]];
        let first = at(&pair[1], "first_ms");
        measured
            .entry("selectors_moved_to_first_answer_milliseconds")
            .or_default()
            .push(first.saturating_sub(when));
        if pair[0] != stacks[count - 1] {
            let last = at(&pair[0], "last_ms");
            measured
                .entry("selectors_moved_to_last_answer_of_the_old_milliseconds")
                .or_default()
                .push(last.saturating_sub(when));
        }
    }
    say(&table);
    publish(count, &report, measured);
    assert_eq!(report["ok"], true, "{table}");
}
