//! How long a release takes at its decisive moments, how long nobody leads, what the operator needs while nothing happens:
//! measured on a cluster, medians of several. `make bench-operator`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a benchmark that cannot go on fails by panicking"
)]

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde_json::{Value, json};
use testbed::{
    exchange::{self, Exchange, Images, PATIENCE, STACK_HEADER, Watch, is_current, phase_of, text},
    gate::{Gate, Hold},
    kubectl::{Namespace, Session, Watching},
    operator::{self, Leader, OPERATOR, OPERATOR_NAMESPACE},
    progress::say,
    results,
    rights::{audit_log, requests},
    sandbox::{self, wait_until},
    tools::Tools,
};
use tokio::{
    net::TcpStream,
    runtime,
    sync::oneshot,
    time::{MissedTickBehavior, interval, timeout},
};

/// Whose live Services a swap moves.
const SERVICES: [&str; 3] = ["user", "trade", "notification"];
/// Requests a second of the clients that trade meanwhile.
const RATE: u32 = 100;
/// How often a new connection to each service is opened.
const NEW_EVERY: Duration = Duration::from_millis(20);
/// Connections to each service that stay open.
const KEPT: usize = 4;
/// How often each of them carries a request.
const KEPT_EVERY: Duration = Duration::from_millis(250);
/// A probe that takes longer has failed.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

fn merge_into(object: &mut Value, more: Value) {
    if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
        object.extend(more);
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All changes of the objects of a kind, with when they were seen.
struct Changes {
    _watching: Watching,
    seen: Arc<Mutex<Vec<(u64, Value)>>>,
}

impl Changes {
    fn of(session: &Session, namespace: &str, kind: &str) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let writer = Arc::clone(&seen);
        let watching = session.watch(&[kind, "--namespace", namespace], move |object| {
            locked(&writer).push((now_ms(), object));
        });
        Self {
            _watching: watching.unwrap(),
            seen,
        }
    }

    /// When the first change after `since` was seen that is like this.
    fn first(&self, since: u64, holds: impl Fn(&Value) -> bool) -> Option<u64> {
        locked(&self.seen)
            .iter()
            .find(|(at, object)| *at >= since && holds(object))
            .map(|(at, _)| *at)
    }
}

/// What the operator waits for of a test's Job.
fn meets_its_criteria(job: &Value) -> bool {
    let mut conditions = job["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|it| it["type"] == "SuccessCriteriaMet" && it["status"] == "True")
}

/// When each live Service was seen to point at the revision, in the order of [`SERVICES`].
fn moved(services: &Changes, since: u64, revision: &str) -> [u64; 3] {
    let moved = |service: &str| {
        let name = format!("{}-{service}", exchange::NAME);
        let moved = services.first(since, |object| {
            text(object, "/metadata/name") == name
                && object["spec"]["selector"]["exchange.dev/revision"] == revision
        });
        moved.unwrap()
    };
    SERVICES.map(moved)
}

/// Writes of all replicas of the operator since they started: those of events, and all others. The lease is not counted.
fn writes(session: &Session) -> (u64, u64) {
    let pods = session
        .kubectl(&[
            "get",
            "pods",
            "--namespace",
            OPERATOR_NAMESPACE,
            "--output=jsonpath={.items[*].metadata.name}",
        ])
        .unwrap();
    let pages = pods.split_whitespace().map(|pod| {
        let path = format!("/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods/{pod}:8080/proxy/metrics");
        session.kubectl(&["get", "--raw", &path]).unwrap()
    });
    let (mut events, mut others) = (0, 0);
    for page in pages {
        for line in page.lines() {
            if !line.starts_with("exchange_operator_writes_total{") {
                continue;
            }
            let count: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
            let sum = if line.contains(r#"kind="Event""#) {
                &mut events
            } else {
                &mut others
            };
            *sum += count;
        }
    }
    (events, others)
}

/// What figures should be at most.
const AIMS: [(&str, u64); 13] = [
    ("tests_passed_to_selectors_moved_milliseconds", 100),
    ("selectors_moved_to_last_answer_of_the_old_milliseconds", 3000),
    ("reverted_spec_to_selectors_moved_milliseconds", 300),
    ("reverted_spec_to_last_answer_of_the_new_milliseconds", 3000),
    (
        "operator_killed_with_its_pod_to_selectors_moved_milliseconds_of_two_replicas",
        6000,
    ),
    (
        "operator_killed_and_restarted_to_selectors_moved_milliseconds_of_two_replicas",
        6000,
    ),
    (
        "operator_killed_with_its_pod_to_selectors_moved_milliseconds_of_one_replica",
        6000,
    ),
    (
        "operator_killed_and_restarted_to_selectors_moved_milliseconds_of_one_replica",
        6000,
    ),
    ("requests_failed", 0),
    ("connections_cut_off", 0),
    ("longest_pause_on_an_open_connection_milliseconds", 500),
    ("memory_kib_200_objects", 40 * 1024),
    ("writes_per_minute_when_idle_200_objects", 0),
];

/// What a figure should be at most, and its ratio to that, in words: at most 1 is as aimed at.
fn judge(what: &str, figure: u64) -> Option<(u64, String)> {
    let (_, aim) = AIMS.into_iter().find(|(name, _)| *name == what)?;
    let hundredths = (figure * 100).checked_div(aim);
    let ratio = hundredths.map_or_else(
        || if figure == 0 { "reached" } else { "missed" }.to_owned(),
        |it| format!("{}.{:02}", it / 100, it % 100),
    );
    Some((aim, ratio))
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Prints medians beside their aims, and adds them to the figures of the operator.
fn publish(mut figures: BTreeMap<String, Value>, measured: BTreeMap<&str, Vec<u64>>) {
    say(format!(
        "  {:<80} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "", "MEDIAN", "MIN", "MAX", "AIM", "OF AIM"
    ));
    let row = |what: &str, figure: u64, least: &str, most: &str| {
        let judged = judge(what, figure);
        let (aim, ratio) = judged
            .clone()
            .map_or_else(Default::default, |(aim, ratio)| (format!("≤ {aim}"), ratio));
        say(format!(
            "  {what:<80} {figure:>8} {least:>8} {most:>8} {aim:>8} {ratio:>8}"
        ));
        judged
    };
    let mut judged = BTreeMap::new();
    for (what, figure) in &figures {
        if let Some(figure) = figure.as_u64()
            && let Some((aim, ratio)) = row(what, figure, "", "")
        {
            judged.insert(what.clone(), json!({"aim": aim, "ratio_to_aim": ratio}));
        }
    }
    for (what, mut values) in measured {
        let middle = median(&mut values);
        let (least, most) = (values[0], values[values.len() - 1]);
        if let Some((aim, ratio)) = row(what, middle, &least.to_string(), &most.to_string()) {
            judged.insert(what.to_owned(), json!({"aim": aim, "ratio_to_aim": ratio}));
        }
        let times = values.len();
        figures.insert(
            what.to_owned(),
            json!({"median": middle, "min": least, "max": most, "measured": times}),
        );
    }
    let judged = judged
        .into_iter()
        .map(|(what, judged)| (format!("{what}_aim"), judged));
    figures.extend(judged);
    let path = results::add("operator", figures).unwrap();
    say(format!("  {}", path.display()));
}

/// How often each is measured.
fn rounds() -> usize {
    std::env::var("RELEASES").map_or(10, |count| count.parse().unwrap())
}

/// A release without a migration.
fn declaration(exchange: &Exchange<'_>, number: usize) -> Value {
    let mut declaration = exchange.declaration("1.0.0");
    declaration["spec"]["services"]["trade"]["env"] =
        json!([{"name": "RELEASE_NOTE", "value": number.to_string()}]);
    declaration
}

/// A swap, with its times in milliseconds since 1970.
struct Move {
    /// When the API server was seen to have what was declared.
    declared: u64,
    /// When each live Service was seen to point at the other revision, in the order of [`SERVICES`].
    moved: [u64; 3],
    from: String,
    to: String,
}

impl Move {
    /// When all of them did.
    fn done(&self) -> u64 {
        self.moved.into_iter().max().unwrap()
    }
}

/// An answer to a probe.
struct Answer {
    /// In milliseconds since 1970.
    at: u64,
    service: &'static str,
    /// Whether it came on a connection that stays open.
    kept: bool,
    stack: String,
}

/// What has become of the probes.
#[derive(Default)]
struct Probed {
    answers: Vec<Answer>,
    /// Those without a good answer.
    failures: Vec<String>,
    /// Connections that ended though no answer had announced it.
    cut_off: u64,
    /// Between two requests on one connection, in milliseconds.
    longest_pause: u64,
}

impl Probed {
    fn note(&mut self, service: &'static str, kept: bool, answered: Result<String>) {
        match answered {
            Ok(stack) => self.answers.push(Answer {
                at: now_ms(),
                service,
                kept,
                stack,
            }),
            Err(error) => self.failures.push(format!("{service}: {error:#}")),
        }
    }

    /// How long after these times, in the order of [`SERVICES`], the stack that a swap leads to has given its first answer on a
    /// new connection, and how long the one before has given answers on connections that stay open, in milliseconds: of the
    /// service that took longest. What came after `until` belongs to the next swap.
    fn first_and_last(&self, swap: &Move, since: [u64; 3], until: u64) -> (u64, u64) {
        let (mut first, mut last) = (0, 0);
        for (service, since) in SERVICES.into_iter().zip(since) {
            let answers = |kept: bool, revision: &str| -> Vec<u64> {
                let all = self.answers.iter();
                let own = all.filter(|it| {
                    it.service == service && it.kept == kept && it.at < until && it.stack.ends_with(revision)
                });
                own.map(|it| it.at).collect()
            };
            let new = answers(false, &swap.to);
            // Whom a way back leads to has answered in its time, too.
            let new = new.into_iter().filter(|at| *at >= swap.declared).min();
            let old = answers(true, &swap.from).into_iter().max();
            first = first.max(new.unwrap().saturating_sub(since));
            last = last.max(old.unwrap().saturating_sub(since));
        }
        (first, last)
    }
}

/// Clients within the test cluster's network that ask the live Services who they are: on new connections, and on some that
/// stay open for as long as they are let.
struct Probes {
    seen: Arc<Mutex<Probed>>,
    /// Dropped, it ends them.
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Probes {
    /// Begins to ask. All services have to be live. On another cluster there is no way into the network, and no probe.
    fn start(session: &Session, namespace: &str) -> Option<Self> {
        let Some(cluster) = session.cluster.clone() else {
            say(
                "left out: the first and last answers, which only clients within the test cluster's network see",
            );
            return None;
        };
        let addresses = SERVICES.map(|service| {
            let name = format!("service/{}-{service}", exchange::NAME);
            let address = session.get(namespace, &name, "{.spec.clusterIP}").unwrap();
            format!("{address}:80")
        });
        let seen = Arc::new(Mutex::new(Probed::default()));
        let (stop, stopped) = oneshot::channel();
        let writer = Arc::clone(&seen);
        let thread = thread::spawn(move || {
            sandbox::join_network(&cluster).unwrap();
            // Its connections are made by this thread, which alone is in that network.
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(probe(addresses, writer, stopped));
        });
        let probes = Self { seen, stop, thread };
        wait_until("the first answers to probes", PATIENCE, || {
            let seen = locked(&probes.seen);
            let has = |service: &str, kept: bool| {
                let mut answers = seen.answers.iter();
                answers.any(|it| it.service == service && it.kept == kept)
            };
            SERVICES
                .into_iter()
                .all(|service| has(service, false) && has(service, true))
        })
        .unwrap();
        Some(probes)
    }

    fn end(self) -> Probed {
        drop(self.stop);
        self.thread.join().unwrap();
        std::mem::take(&mut *locked(&self.seen))
    }
}

async fn probe(addresses: [String; 3], seen: Arc<Mutex<Probed>>, mut stopped: oneshot::Receiver<()>) {
    for (service, address) in SERVICES.into_iter().zip(&addresses) {
        for _ in 0..KEPT {
            tokio::spawn(probe_kept(service, address.clone(), Arc::clone(&seen)));
        }
    }
    let mut clock = interval(NEW_EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = &mut stopped => return,
            _ = clock.tick() => {}
        }
        // None waits for the one before: that may be on its way to somebody who is gone.
        for (service, address) in SERVICES.into_iter().zip(&addresses) {
            tokio::spawn(probe_new(service, address.clone(), Arc::clone(&seen)));
        }
    }
}

async fn probe_new(service: &'static str, address: String, seen: Arc<Mutex<Probed>>) {
    let asked = in_time(async {
        let (stack, _) = ask(&mut connect(&address).await?, &address).await?;
        anyhow::Ok(stack)
    });
    let answered = asked.await;
    locked(&seen).note(service, false, answered);
}

/// Asks on one connection, until an answer says that it is the last one there, or the connection is cut off: then on another.
async fn probe_kept(service: &'static str, address: String, seen: Arc<Mutex<Probed>>) {
    let mut clock = interval(KEPT_EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut kept: Option<SendRequest<Empty<Bytes>>> = None;
    let mut last = Instant::now();
    loop {
        clock.tick().await;
        let was_cut_off = kept.as_ref().is_some_and(SendRequest::is_closed);
        if was_cut_off {
            kept = None;
        }
        let was_open = kept.is_some();
        let pause = last.elapsed();
        last = Instant::now();
        let asked = in_time(async {
            let mut open = match kept.take() {
                Some(open) => open,
                None => connect(&address).await?,
            };
            let (stack, stays) = ask(&mut open, &address).await?;
            anyhow::Ok((stack, stays.then_some(open)))
        });
        let answered = asked.await;
        let answered = answered.map(|(stack, open)| {
            kept = open;
            stack
        });
        let mut so_far = locked(&seen);
        if was_open {
            so_far.longest_pause = so_far
                .longest_pause
                .max(u64::try_from(pause.as_millis()).unwrap());
        }
        so_far.cut_off += u64::from(was_cut_off || (was_open && answered.is_err()));
        so_far.note(service, true, answered);
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(PROBE_LIMIT, asked).await.context("no answer in time")?
}

async fn connect(address: &str) -> Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Which stack has answered, and whether the connection may be used again.
async fn ask(connection: &mut SendRequest<Empty<Bytes>>, host: &str) -> Result<(String, bool)> {
    connection.ready().await?;
    let request = Request::get("/version")
        .header(header::HOST, host)
        .body(Empty::new())?;
    let answer = connection.send_request(request).await?;
    let (status, stack) = (answer.status(), value(&answer, STACK_HEADER));
    let stays = !value(&answer, "connection").eq_ignore_ascii_case("close");
    let body = answer.into_body().collect().await?.to_bytes();
    ensure!(
        status.is_success() && !stack.is_empty(),
        "status {status}: {}",
        String::from_utf8_lossy(&body)
    );
    Ok((stack, stays))
}

/// A header, or nothing.
fn value(answer: &Response<Incoming>, name: &str) -> String {
    let value = answer.headers().get(name);
    let value = value.and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// Releases, and after each the way back: the spec before is declared again.
#[test]
#[ignore = "a benchmark: make bench-operator"]
#[expect(clippy::too_many_lines, reason = "what is measured together")]
fn releases() {
    let session = Session::from_environment().unwrap();
    let images = Images::from_environment().unwrap();
    operator::install(&session, &images).unwrap();
    let namespace = Namespace::beside(&session, "bench").unwrap();
    let exchange = Exchange::install(&session, &namespace.name, &images).unwrap();
    exchange.release(&exchange.declaration("1.0.0")).unwrap();
    let mut watch = exchange.watch().unwrap();
    watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
    exchange.make_treasury().unwrap();
    let jobs = Changes::of(&session, &namespace.name, "jobs");
    let services = Changes::of(&session, &namespace.name, "services");
    let objects = Changes::of(&session, &namespace.name, "exchangedeployments");
    let probes = Probes::start(&session, &namespace.name);
    let load = exchange.start_load(RATE).unwrap();
    let live = |watch: &Watch| text(watch.last().unwrap(), "/status/live/revision").to_owned();
    let base = live(&watch);
    // Declares, waits until it is live and the stack before it has no connection any more.
    let mut release = |declaration: &Value| {
        let (begun, from) = (now_ms(), live(&watch));
        let generation = |object: &Value| object["metadata"]["generation"].as_i64();
        let before = generation(watch.last().unwrap());
        exchange.release(declaration).unwrap();
        watch
            .until("the release to be live", PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == "Live"
                    && text(object, "/status/live/revision") != from
                    && text(object, "/status/previous/state") != "Draining"
            })
            .unwrap();
        let to = live(&watch);
        let declared = objects
            .first(begun, |object| generation(object) > before)
            .unwrap();
        let moved = moved(&services, begun, &to);
        Move {
            // Each watch is a process, and one may be told late: then it counts from the start of `kubectl apply`.
            declared: if moved.iter().all(|at| *at >= declared) {
                declared
            } else {
                begun
            },
            moved,
            from,
            to,
        }
    };
    let mut measured: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    let mut measure = |what, milliseconds| measured.entry(what).or_default().push(milliseconds);
    let mut swaps = Vec::new();
    for number in 0..rounds() {
        let before = writes(&session);
        let there = release(&declaration(&exchange, number));
        let after = writes(&session);
        let (told, written) = (after.0 - before.0, after.1 - before.1);
        measure("writes_per_release_without_events", written);
        measure("events_per_release", told);
        measure("writes_per_release", written + told);
        let tested = |says: fn(&Value) -> bool| {
            let seen = jobs.first(there.declared, |job| {
                text(job, "/metadata/labels/exchange.dev~1revision") == there.to
                    && text(job, "/metadata/labels/exchange.dev~1job") == "smoke"
                    && says(job)
            });
            there.done().saturating_sub(seen.unwrap())
        };
        let succeeded = tested(|job| job["status"]["succeeded"] == 1);
        measure("tests_passed_to_selectors_moved_milliseconds", succeeded);
        measure(
            "criteria_met_to_selectors_moved_milliseconds",
            tested(meets_its_criteria),
        );
        swaps.push(there);
        let again = release(&exchange.declaration("1.0.0"));
        assert_eq!(again.to, base, "it was built anew");
        measure(
            "reverted_spec_to_selectors_moved_milliseconds",
            again.done() - again.declared,
        );
        swaps.push(again);
        say(format!("release {} of {}, and back", number + 1, rounds()));
    }
    let seen = probes.map(Probes::end);
    let (table, report) = load.end().unwrap();
    for (number, swap) in swaps.iter().enumerate() {
        let Some(seen) = &seen else { break };
        let until = swaps.get(number + 1).map_or(u64::MAX, |next| next.declared);
        let (since, first, last) = if swap.to == base {
            (
                [swap.declared; 3],
                "reverted_spec_to_first_answer_of_the_old_milliseconds",
                "reverted_spec_to_last_answer_of_the_new_milliseconds",
            )
        } else {
            (
                swap.moved,
                "selectors_moved_to_first_answer_of_the_new_milliseconds",
                "selectors_moved_to_last_answer_of_the_old_milliseconds",
            )
        };
        let answers = seen.first_and_last(swap, since, until);
        measure(first, answers.0);
        measure(last, answers.1);
    }
    say(&table);
    let count = |figure: &Value| figure.as_u64().unwrap();
    let of_load = |key: &str| count(&report["summary"][key]);
    let cut_off = count(&report["closed_without_notice"]) + count(&report["streams_cut_off"]);
    let witness = seen.as_ref();
    let failures = witness.map_or(&[][..], |seen| &seen.failures);
    let cut_off = cut_off + witness.map_or(0, |seen| seen.cut_off);
    let failed = of_load("failed") + u64::try_from(failures.len()).unwrap();
    let mut figures = BTreeMap::from([
        ("requests".to_owned(), json!(of_load("requests"))),
        ("requests_failed".to_owned(), json!(failed)),
        ("connections_cut_off".to_owned(), json!(cut_off)),
    ]);
    if let Some(seen) = witness {
        let asked = seen.answers.len() + failures.len();
        figures.insert("probes".to_owned(), json!(asked));
        figures.insert(
            "longest_pause_on_an_open_connection_milliseconds".to_owned(),
            json!(seen.longest_pause),
        );
    }
    publish(figures, measured);
    assert_eq!(report["ok"], true, "{table}");
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(cut_off, 0, "{table}");
}

/// How the operator ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// Its process is killed, and the kubelet starts the container again. It has its name still, and with it the lease.
    Restart,
    /// Its process is killed and its pod is gone, as on a node that is lost: another pod has to wait for the lease.
    Lost,
}

/// The operator is killed when all gates are passed, before its first write of a live Service.
#[test]
#[ignore = "a benchmark: make bench-operator"]
fn takeovers() {
    let session = Session::from_environment().unwrap();
    if session.own_nodes().is_none() {
        return;
    }
    let images = Images::from_environment().unwrap();
    operator::install(&session, &images).unwrap();
    let namespace = Namespace::beside(&session, "bench-kill").unwrap();
    let exchange = Exchange::install(&session, &namespace.name, &images).unwrap();
    exchange.release(&exchange.declaration("1.0.0")).unwrap();
    let mut watch = exchange.watch().unwrap();
    watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
    let services = Changes::of(&session, &namespace.name, "services");
    let gate = Gate::before(&session, &images, &namespace.name).unwrap();
    let mut measured: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    let scale = |replicas: &str| {
        let (deployment, replicas) = (format!("deployment/{OPERATOR}"), format!("--replicas={replicas}"));
        session
            .kubectl(&["scale", &deployment, &replicas, "--namespace", OPERATOR_NAMESPACE])
            .unwrap();
    };
    let live = |watch: &Watch| text(watch.last().unwrap(), "/status/live/revision").to_owned();
    let mut number = 0;
    for (replicas, end, what) in [
        (
            "2",
            End::Lost,
            "operator_killed_with_its_pod_to_selectors_moved_milliseconds_of_two_replicas",
        ),
        (
            "2",
            End::Restart,
            "operator_killed_and_restarted_to_selectors_moved_milliseconds_of_two_replicas",
        ),
        (
            "1",
            End::Lost,
            "operator_killed_with_its_pod_to_selectors_moved_milliseconds_of_one_replica",
        ),
        (
            "1",
            End::Restart,
            "operator_killed_and_restarted_to_selectors_moved_milliseconds_of_one_replica",
        ),
    ] {
        scale(replicas);
        for _ in 0..rounds() {
            if end == End::Restart {
                // Only the first restart of a pod comes at once: each round has a new one.
                Leader::find(&session).unwrap().kill().unwrap();
                wait_until("another leader", PATIENCE, || Leader::find(&session).is_ok()).unwrap();
            }
            operator::recovers(&session).unwrap();
            gate.hold(&Hold::first("update services", "")).unwrap();
            let before = live(&watch);
            exchange.release(&declaration(&exchange, number)).unwrap();
            number += 1;
            let write = gate.until_held(PATIENCE).unwrap();
            let leader = Leader::find(&session).unwrap();
            let killed = now_ms();
            match end {
                End::Restart => leader.crash().unwrap(),
                End::Lost => {
                    leader.kill().unwrap();
                }
            }
            gate.decide(false).unwrap();
            watch
                .until("the release to be live", PATIENCE, |object| {
                    is_current(object)
                        && phase_of(object) == "Live"
                        && text(object, "/status/live/revision") != before
                })
                .unwrap();
            let moved = moved(&services, killed, &live(&watch)).into_iter().max().unwrap();
            measured.entry(what).or_default().push(moved - killed);
            say(format!("killed before {write}: {} ms", moved - killed));
        }
    }
    scale("2");
    publish(BTreeMap::new(), measured);
}

/// A node that is none, on which all new pods land while it is there. KWOK says how they fare.
struct FakeNode<'a> {
    session: &'a Session,
    kwok: Child,
}

const REAL_NODE: &str = "node/node";

impl<'a> FakeNode<'a> {
    fn start(session: &'a Session) -> Self {
        let room = json!({"cpu": "1k", "memory": "1Ti", "pods": "10k"});
        let ready =
            json!({"type": "Ready", "status": "True", "reason": "Fake", "message": "says that it is ready"});
        let node = json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "fake", "annotations": {"kwok.x-k8s.io/node": "fake"}},
            "status": {"capacity": room, "allocatable": room, "conditions": [ready]}});
        session.apply("default", &node).unwrap();
        let stages = concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/fake-pods.yaml");
        let tools = Tools::ensure().unwrap();
        let kubeconfig = session.cluster.as_ref().unwrap().kubeconfig();
        let kwok = Command::new(tools.dir().join("kwok"))
            .args([
                "--config",
                stages,
                "--manage-nodes-with-annotation-selector",
                "kwok.x-k8s.io/node=fake",
            ])
            .args(["--node-lease-duration-seconds", "40", "--kubeconfig"])
            .arg(kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        session.kubectl(&["cordon", REAL_NODE]).unwrap();
        Self { session, kwok }
    }
}

impl Drop for FakeNode<'_> {
    fn drop(&mut self) {
        let _ = self.session.kubectl(&["uncordon", REAL_NODE]);
        let _ = self.session.kubectl(&[
            "delete",
            "pods",
            "--all-namespaces",
            "--field-selector=spec.nodeName=fake",
            "--force",
            "--grace-period=0",
            "--wait=false",
        ]);
        let _ = self.session.kubectl(&["delete", "node", "fake"]);
        let _ = self.kwok.kill();
        let _ = self.kwok.wait();
    }
}

/// What the operator needs with one object and with 200, each live with a stack of fake pods. Those answer nobody, so that no
/// swap to them is ever finished: they wait for an approval, and this then records what a swap would have, upon which the
/// operator itself points the live Services at them.
#[test]
#[ignore = "a benchmark: make bench-operator"]
#[expect(clippy::too_many_lines, reason = "what is measured together")]
fn idle() {
    /// Over which requests are counted each time, and how many of these a minute has.
    const WINDOW: Duration = Duration::from_secs(30);
    const PER_MINUTE: usize = 2;
    const OBJECTS: usize = 200;
    let session = Session::from_environment().unwrap();
    let images = Images::from_environment().unwrap();
    operator::install(&session, &images).unwrap();
    let namespace = Namespace::beside(&session, "bench-idle").unwrap();
    // An existing cluster gets no fake node.
    let Some(cluster) = session.cluster.as_ref() else {
        return;
    };
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"},
                        "stringData": {"url": "none", "owner-url": "none"}});
    session.apply(&namespace.name, &secret).unwrap();
    // The declaration of the other benchmarks, without stores: nobody connects to them.
    let reference = json!({"secretRef": {"name": "store", "key": "url"}});
    let database = json!({"secretRef": {"name": "store", "key": "url"}, "migrationSecretRef": {"name": "store", "key": "owner-url"}});
    let object = |number: usize| {
        json!({"apiVersion": "exchange.dev/v1alpha1", "kind": "ExchangeDeployment",
            "metadata": {"name": format!("exchange-{number}")},
            "spec": {"version": "1.0.0", "image": format!("{}/exchange", images.prefix),
                     "services": {"user": {"replicas": 1}, "trade": {"replicas": 1}, "notification": {"replicas": 1}},
                     "database": database, "queue": reference, "marketData": reference,
                     "rollout": {"promotion": "Manual", "progressDeadline": "1h"}}})
    };
    let list = || -> Vec<Value> {
        let args = ["get", "exd", "--namespace", &namespace.name, "--output=json"];
        let mut list: Value = serde_json::from_str(&session.kubectl(&args).unwrap()).unwrap();
        std::mem::take(list["items"].as_array_mut().unwrap())
    };
    let all_are = |count: usize, what: &str, holds: &dyn Fn(&Value) -> bool| {
        wait_until(what, Duration::from_mins(10), || {
            sleep(Duration::from_secs(1));
            list().iter().filter(|object| holds(object)).count() == count
        })
        .unwrap();
    };
    let go_live = |object: &Value| {
        let mut live = object["status"]["candidate"].clone();
        live.as_object_mut().unwrap().remove("gates");
        merge_into(
            &mut live,
            json!({"since": Timestamp::now().to_string(), "verified": true, "contracted": true}),
        );
        let status = json!({"status": {"phase": "Live", "candidate": null, "live": live}});
        let (name, patch) = (text(object, "/metadata/name"), status.to_string());
        let args = [
            "patch",
            "exd",
            name,
            "--subresource=status",
            "--type=merge",
            "--patch",
            &patch,
        ];
        let place = ["--namespace", namespace.name.as_str()];
        session.kubectl(&[&args[..], &place].concat()).unwrap();
    };
    let is_live = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array();
        let is = |kind: &str| {
            conditions.is_some_and(|all| all.iter().any(|it| it["type"] == kind && it["status"] == "True"))
        };
        phase_of(object) == "Live" && is("Ready") && is("Available")
    };
    let mut figures = BTreeMap::new();
    let mut measured: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let fake = FakeNode::start(&session);
    for (count, name) in [(1, "1_object"), (OBJECTS, "200_objects")] {
        let objects: Vec<Value> = (0..count).map(object).collect();
        let declared = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        session.apply(&namespace.name, &declared).unwrap();
        all_are(
            count,
            "all objects to wait for an approval, or be live",
            &|object| is_live(object) || phase_of(object) == "AwaitingPromotion",
        );
        list()
            .iter()
            .filter(|object| phase_of(object) == "AwaitingPromotion")
            .for_each(go_live);
        all_are(count, "all objects to be live", &is_live);
        let (_, peak) = Leader::find(&session).unwrap().memory().unwrap();
        figures.insert(format!("memory_at_most_kib_{name}"), json!(peak));
        // What is written last of a release has been; then nothing happens, and that is what is measured.
        sleep(Duration::from_secs(15));
        for _ in 0..rounds() {
            let from = Timestamp::now();
            sleep(WINDOW);
            let (memory, _) = Leader::find(&session).unwrap().memory().unwrap();
            let log = audit_log(cluster, from).unwrap();
            let all = requests(log.lines(), &operator::account(), from, from + WINDOW);
            let is_write = |(verb, kind): &&(String, String)| {
                !["get", "list", "watch"].contains(&verb.as_str()) && kind != "leases"
            };
            let leases = all.iter().filter(|(_, kind)| kind == "leases").count();
            let writes = all.iter().filter(is_write).count();
            let per_minute = |count: usize| u64::try_from(count * PER_MINUTE).unwrap();
            for (key, value) in [
                ("memory_kib", memory),
                ("requests_per_minute_when_idle", per_minute(all.len())),
                ("requests_for_the_lease_per_minute", per_minute(leases)),
                ("writes_per_minute_when_idle", per_minute(writes)),
            ] {
                measured.entry(format!("{key}_{name}")).or_default().push(value);
            }
        }
    }
    drop(fake);
    let measured = measured
        .iter()
        .map(|(what, values)| (what.as_str(), values.clone()));
    publish(figures, measured.collect());
}
