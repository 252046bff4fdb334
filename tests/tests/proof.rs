//! The proof that nothing is lost: releases under a load that retries nothing and audits everything afterwards. Each case
//! asserts that no request failed, that no connection was cut, that the money is right, and how it ended; where it kills
//! pods or a store itself, that only what was in flight there failed, or connecting to it before every node knew, and that a
//! retry with the same key resolved it.
//! `make e2e E2E=proof` runs them, `make e2e CASE=2` one of them.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Mutex,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use http::Method;
use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::Signal;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};
use testbed::{
    broker::{Asked, Broker},
    cluster::Cluster,
    exchange::{
        Api, Connected, Exchange, Load, NAME, PATIENCE, Pod, Watch, is_current, is_given_up, phase_of, text,
        token,
    },
    gate::{Gate, Hold, Moment},
    kubectl::{Namespace, Session},
    operator::Operator,
    progress::say,
    results,
    rights::{self, audit_log},
    sandbox::{host_pid, wait_until},
    story::{Ground, SERVICES},
    supervisor,
};

/// Requests a second: two cores keep up with the cases that run side by side. With twice as many a slower machine once had
/// requests wait in vain for a connection to PostgreSQL (3 s), which is refusing for want of capacity, and no matter of a swap.
const RATE: u32 = 20;
/// The whole load, of case 1 and of what is compared with it. Beside one other case the processors have room for it.
const FULL_RATE: u32 = 210;
/// For so many requests a second there is a connection of each protocol to each service.
const EACH_CARRIES: u32 = 10;
/// For each of two exchanges that are released at once: together they ask for as much as another case does.
const RATE_OF_TWO: u32 = RATE / 2;
/// Of each protocol to each service, with that rate: with twice as many a connection rests for longer than a drain may last, and is
/// closed at its end.
const CONNECTIONS_OF_TWO: u16 = 2;
/// As declared by the harness; afterwards nothing may be left on the old stack.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// From the drain of a pod to the end of its event streams.
const STREAMS_END: u64 = 5_000;
/// For the data plane to follow, and for connections to a store to be made again, once everything is ready.
const SETTLING: u64 = 2_000;
/// A variable that means nothing: with another value it is another release.
const SETTING: &str = "RELEASE_NOTE";
/// The writes that move the traffic, each a live Service.
const MOVES: &str = "update services";

/// An exchange that is live, with its clients.
struct Trading<'a> {
    ground: &'a Ground,
    namespace: &'a Namespace<'a>,
    exchange: Exchange<'a>,
    watch: Watch,
    load: Option<Load<'a>>,
    figures: Figures,
}

impl<'a> Trading<'a> {
    /// Deploys a version, and lets clients trade.
    fn begin(ground: &'a Ground, namespace: &'a Namespace<'_>, version: &str) -> Self {
        let mut trading = Self::deploy(ground, namespace, |exchange| declaration(exchange, version));
        trading.start_load(RATE);
        trading
    }

    /// Deploys what is declared. There are no clients yet.
    fn deploy(
        ground: &'a Ground,
        namespace: &'a Namespace<'_>,
        declare: impl Fn(&Exchange<'_>) -> Value,
    ) -> Self {
        let exchange = Exchange::install(&ground.session, &namespace.name, &ground.images).unwrap();
        let declaration = declare(&exchange);
        exchange.release(&declaration).unwrap();
        let mut watch = exchange.watch().unwrap();
        let version = text(&declaration, "/spec/version");
        watch.until_phase("Live", version, PATIENCE).unwrap();
        exchange.make_treasury().unwrap();
        Self {
            ground,
            namespace,
            exchange,
            watch,
            load: None,
            figures: Figures::default(),
        }
    }

    /// Clients of which none idles: case 1 has those, and an old stack waits for them for as long as they do. So it does for
    /// connections that have little to carry.
    fn start_load(&mut self, rate: u32) {
        let connections = u16::try_from(rate / EACH_CARRIES).unwrap();
        self.load = Some(self.exchange.start_clients(rate, connections, 0).unwrap());
    }

    /// Ends the clients: nothing may have failed, nothing be lost.
    fn end_load(&mut self) -> Value {
        let (table, report) = self.load.take().unwrap().end().unwrap();
        say(&table);
        self.figures.add_report(&report);
        // Before it is judged: a case that fails shows how many requests did.
        self.figures.note(self.namespace);
        assert_eq!(report["summary"]["failed"], 0, "{table}");
        assert_eq!(report["closed_without_notice"], 0, "{table}");
        assert_eq!(report["streams_cut_off"], 0, "{table}");
        assert_audited(&table, &report);
        report
    }

    /// The same, and writes down what the case has measured.
    fn end_well(mut self) -> Value {
        let report = self.end_load();
        self.figures.add_watch(&self.watch);
        self.figures.note(self.namespace);
        report
    }

    fn last(&self) -> &Value {
        self.watch.last().unwrap()
    }

    /// The revision of `live`, `candidate` or `previous`; empty if there is none.
    fn revision(&self, stack: &str) -> String {
        revision(self.last(), stack).to_owned()
    }

    /// Lets the clients trade until they have made so many requests more.
    fn trade(&self, requests: u64) {
        trade(self.load.as_ref().unwrap(), requests);
    }

    /// Declares the same version with another setting: a release without a migration.
    fn release_setting(&self, value: &str) {
        let declaration = with_setting(declaration(&self.exchange, "1.0.0"), value);
        self.exchange.release(&declaration).unwrap();
    }

    /// Declares it, and waits until its swap is held at this write of a live Service, which is the first one of number 0.
    fn release_up_to(&mut self, gate: &Gate<'_>, number: usize, declaration: &Value) {
        let hold = Hold {
            of: MOVES.to_owned(),
            number,
            ..Hold::default()
        };
        gate.hold(&hold).unwrap();
        self.exchange.release(declaration).unwrap();
        let write = gate.until_held(PATIENCE).unwrap();
        assert_eq!(
            write.name,
            format!("{NAME}-{}", SERVICES[number]),
            "{write} was held"
        );
        self.until("the swap", |object| {
            is_current(object) && phase_of(object) == "Promoting"
        });
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Value) -> bool) -> Instant {
        self.watch.until(what, PATIENCE, holds).unwrap()
    }

    /// Waits for the end of a release, which has to be this: live, and not what was live before.
    fn until_live_after(&mut self, before: &str) {
        self.until("the end of the release", |object| {
            let live = phase_of(object) == "Live" && revision(object, "live") != before;
            is_current(object) && (live || is_given_up(object))
        });
        assert_eq!(phase_of(self.last()), "Live", "{:#}", self.last()["status"]);
    }

    /// Whether the traffic is on its way now, which what has been watched so far may not tell yet.
    fn is_promoting(&self) -> bool {
        let phase = "{.status.phase}";
        let phase = self
            .ground
            .session
            .get(&self.namespace.name, "exd/exchange", phase);
        phase.unwrap() == "Promoting"
    }

    /// Waits until nobody is on the old stack any more.
    fn until_drained(&mut self, old: &str) -> Instant {
        self.until("the old stack to be drained", |object| {
            revision(object, "previous") == old && text(object, "/status/previous/state") == "Retained"
        })
    }
}

/// Lets clients trade until they have made so many requests more.
fn trade(load: &Load<'_>, requests: u64) {
    let goal = load.progress().requests + requests;
    wait_until("trading", PATIENCE, || load.progress().requests >= goal).unwrap();
}

fn assert_audited(table: &str, report: &Value) {
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    assert_eq!(report["audit"]["ledger_checked"], true, "{table}");
    assert!(report["audit"]["trades"].as_u64().unwrap() > 100, "{table}");
}

/// That the load was made of all that it is said to be made of. Gives back how many answers there were a second, from the first request
/// to the last answer: the time that the last ones take counts, too.
fn made_of_all(namespace: &Namespace<'_>, report: &Value) -> f64 {
    let stacks = report["summary"]["stacks"].as_object().unwrap().values();
    let last = stacks.map(|stack| stack["last_ms"].as_f64().unwrap());
    let all = report["summary"]["requests"].as_f64().unwrap();
    let rate = all / (last.fold(0.0, f64::max) / 1_000.0);
    namespace.note("answers_per_second", rate);
    let latency = &report["summary"]["latency"];
    for group in ["http/1.1", "http/2", "idle", "slow"] {
        assert!(latency[group]["count"].as_u64() > Some(0), "{group}: {latency}");
    }
    assert!(latency["slow"]["p50"].as_f64() > Some(1_000.0), "{latency}");
    rate
}

/// As the harness declares it, and verified for as short as it can be: the clients' own audit, at the end, sees more.
fn declaration(exchange: &Exchange<'_>, version: &str) -> Value {
    let mut declaration = exchange.declaration(version);
    declaration["spec"]["rollout"]["verification"]["duration"] = json!("1s");
    declaration
}

/// Another setting: a release without a migration.
fn with_setting(mut declaration: Value, value: &str) -> Value {
    declaration["spec"]["services"]["trade"]["env"] = json!([{"name": SETTING, "value": value}]);
    declaration
}

fn revision<'v>(object: &'v Value, stack: &str) -> &'v str {
    text(object, &format!("/status/{stack}/revision"))
}

/// The stacks that have answered, by revision, each with when.
fn answered(report: &Value) -> BTreeMap<String, &Value> {
    let stacks = report["summary"]["stacks"].as_object().unwrap().iter();
    let revision = |name: &str| name.split_once('-').unwrap().1.to_owned();
    stacks.map(|(name, stack)| (revision(name), stack)).collect()
}

fn revisions_that_answered(report: &Value) -> Vec<String> {
    answered(report).into_keys().collect()
}

fn sorted<T: Ord>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort();
    values
}

/// Milliseconds since 1970, as the clients' report counts them.
fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

/// What a case has measured. Times of moves are as status tells them: from the record of a move to its end.
#[derive(Default)]
struct Figures {
    requests: u64,
    failed: u64,
    never_sent: u64,
    /// Connections that were closed without notice, and event streams between two events.
    cut_off: u64,
    trades: u64,
    swaps_ms: Vec<u64>,
    ways_back_ms: Vec<u64>,
    drains_ms: Vec<u64>,
}

impl Figures {
    fn add_report(&mut self, report: &Value) {
        let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_u64).unwrap();
        self.requests += number("/summary/requests");
        self.failed += number("/summary/failed");
        self.never_sent += number("/never_sent");
        self.cut_off += number("/closed_without_notice") + number("/streams_cut_off");
        self.trades += number("/audit/trades");
    }

    fn add_watch(&mut self, watch: &Watch) {
        for (phase, took) in moves(watch) {
            let took = u64::try_from(took.as_millis()).unwrap();
            match phase {
                "Promoting" => self.swaps_ms.push(took),
                _ => self.ways_back_ms.push(took),
            }
        }
        self.drains_ms.extend(drains(watch));
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.never_sent += other.never_sent;
        self.cut_off += other.cut_off;
        self.trades += other.trades;
        self.swaps_ms.extend(other.swaps_ms);
        self.ways_back_ms.extend(other.ways_back_ms);
        self.drains_ms.extend(other.drains_ms);
    }

    fn note(&self, namespace: &Namespace<'_>) {
        namespace.note("requests", self.requests);
        namespace.note("requests_failed", self.failed);
        namespace.note("requests_never_sent", self.never_sent);
        namespace.note("connections_cut_off", self.cut_off);
        namespace.note("trades_audited", self.trades);
        let middle = |times: &[u64]| sorted(times.iter().copied()).get(times.len() / 2).copied();
        if let Some(time) = middle(&self.swaps_ms) {
            namespace.note("swap_milliseconds", time);
        }
        if let Some(time) = middle(&self.ways_back_ms) {
            namespace.note("rollback_milliseconds", time);
        }
        if let Some(longest) = self.drains_ms.iter().max() {
            namespace.note("drain_seconds", longest.div_ceil(1_000));
        }
    }
}

/// How long the traffic was between two stacks each time, with the phase that it was.
fn moves(watch: &Watch) -> Vec<(&str, Duration)> {
    let mut begun: Option<(&str, Instant)> = None;
    let mut all = Vec::new();
    for (at, object) in watch.sightings() {
        let phase = phase_of(object);
        let moving = matches!(phase, "Promoting" | "RollingBack");
        match begun {
            // A first version takes nobody's traffic.
            None if moving && !object["status"]["live"].is_null() => begun = Some((phase, *at)),
            Some((phase, since)) if !moving => {
                all.push((phase, at.duration_since(since)));
                begun = None;
            }
            _ => {}
        }
    }
    all
}

/// How long each old stack had something open after its traffic had moved, in milliseconds. Of those that were kept: one that
/// another release waited for may have waited for somebody whom a test has had stay.
fn drains(watch: &Watch) -> impl Iterator<Item = u64> {
    let mut all: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, object) in watch.sightings() {
        let time = |field: &str| text(object, &format!("/status/previous/{field}")).parse::<Timestamp>();
        if text(object, "/status/previous/state") == "Retained"
            && let (Ok(since), Ok(idle)) = (time("since"), time("idleSince"))
        {
            let took = idle.duration_since(since).as_millis();
            all.insert(revision(object, "previous"), u64::try_from(took).unwrap_or(0));
        }
    }
    all.into_values()
}

/// The old stack has all its pods, and not one of them has a connection or a request.
fn assert_empty(trading: &Trading<'_>, old: &str, pods: &[Pod]) {
    assert_eq!(
        sorted(trading.exchange.pods(old).unwrap()),
        pods,
        "it has lost a pod"
    );
    for pod in pods {
        let report = trading.exchange.report_of(pod).unwrap();
        assert_eq!(
            (report.connections, report.in_flight),
            (0, 0),
            "{pod:?} says {report:?}"
        );
    }
}

/// Everybody has left the old stack, before its time was over, and it is still there.
fn assert_left(trading: &mut Trading<'_>, old: &str, pods: &[Pod]) {
    let retained = trading.until_drained(old);
    let draining = trading
        .watch
        .sightings()
        .iter()
        .find(|(_, object)| revision(object, "previous") == old);
    let took = retained.duration_since(draining.unwrap().0);
    let status = &trading.last()["status"];
    assert!(
        took + Duration::from_secs(1) < DRAIN_TIMEOUT,
        "{took:?}: {status:#}"
    );
    assert!(
        !text(trading.last(), "/status/previous/idleSince").is_empty(),
        "{status:#}"
    );
    assert_empty(trading, old, pods);
}

/// A namespace for a case of this number.
fn case<'a>(ground: &'a Ground, number: u64, name: &str) -> Namespace<'a> {
    let namespace = Namespace::new(&ground.session, name).unwrap();
    namespace.note("case", number);
    namespace
}

/// Somebody whose account is frozen.
struct Holder {
    credentials: Value,
    /// In BTC and in USD.
    accounts: [String; 2],
}

impl Holder {
    fn join(api: &mut Api) -> Self {
        let credentials =
            json!({"email": "holder@exchange.example", "password": "a long story about a horse"});
        let registered = api.user(Method::POST, "/register", &credentials).unwrap();
        assert_eq!(registered.status, 202, "{registered:?}");
        api.log_in(&credentials).unwrap();
        let accounts = ["BTC", "USD"].map(|currency| {
            let account = json!({"currency": currency, "name": "savings"});
            let added = api.trade(Method::POST, "/account/add", &account).unwrap();
            assert_eq!(added.status, 201, "{added:?}");
            text(&added.body, "/account_id").to_owned()
        });
        Self {
            credentials,
            accounts,
        }
    }

    /// A client that speaks with the live stack, which is this one.
    fn api(&self, trading: &Trading<'_>, revision: &str) -> Api {
        let mut api = trading.exchange.api().unwrap();
        api.log_in(&self.credentials).unwrap();
        let answer = api.trade(Method::GET, "/account/list", &Value::Null).unwrap();
        assert!(answer.stack.ends_with(revision), "{answer:?}");
        api
    }

    /// Freezes the account in BTC, or lifts that; returns the account.
    fn set(&self, api: &Api, state: &str) -> Value {
        let update = json!({"account_id": self.accounts[0], "state": state});
        let answer = api.trade(Method::POST, "/account/update", &update).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    }

    /// The account in BTC as the API shows it.
    fn account(&self, api: &Api) -> Value {
        let answer = api.trade(Method::GET, "/account/list", &Value::Null).unwrap();
        let accounts = answer.body["accounts"].as_array().unwrap().iter();
        let mut own = accounts.filter(|account| text(account, "/account_id") == self.accounts[0]);
        own.next().unwrap().clone()
    }

    /// What becomes of an order to sell from the account in BTC, in which there is nothing.
    fn sell(&self, api: &Api, id: &str) -> String {
        let order = json!({"type": "sell", "product": "BTC-USD", "size": "0.0001", "price": "20000",
            "client_order_id": id, "base_account_id": self.accounts[0], "quote_account_id": self.accounts[1]});
        let answer = api.trade(Method::POST, "/trade/add", &order).unwrap();
        text(&answer.body, "/code").to_owned()
    }
}

/// The migrations of this release would have refused every other database than this one, which is that of the exchange.
fn migrated_where_the_live_stack_is(
    ground: &Ground,
    namespace: &Namespace<'_>,
    revision: &str,
    identity: &str,
) {
    let expected = format!("\"--expect-database={identity}\"");
    let args = ["get", "jobs", "--output=json", "--namespace", &namespace.name];
    let jobs: Value = serde_json::from_str(&ground.session.kubectl(&args).unwrap()).unwrap();
    for migration in ["expand", "contract"] {
        let name = format!("{revision}-{migration}-");
        let jobs = jobs["items"].as_array().unwrap().iter();
        let args: Vec<String> = jobs
            .filter(|job| text(job, "/metadata/name").contains(&name))
            .map(|job| job["spec"]["template"]["spec"]["containers"][0]["args"].to_string())
            .collect();
        assert!(
            !args.is_empty() && args.iter().all(|args| args.contains(&expected)),
            "{migration}: {args:?}"
        );
    }
}

/// The trigger by which version 2 understands what version 1 writes. The contract drops it.
const TRANSLATIONS: &str = "select count(*) from pg_trigger where tgname = 'freeze_follows_state'";

/// What Events of a reason have told of a namespace's exchange.
fn told(ground: &Ground, namespace: &Namespace<'_>, reason: &str) -> String {
    let of_reason = format!("--field-selector=reason={reason}");
    let message = "--output=jsonpath={.items[*].message}";
    let events = [
        "get",
        "events",
        "--namespace",
        &namespace.name,
        &of_reason,
        message,
    ];
    ground.session.kubectl(&events).unwrap()
}

/// Two pods of each service, so that one serves while the other is not there.
fn two_of_each(exchange: &Exchange<'_>, version: &str) -> Value {
    let mut declaration = declaration(exchange, version);
    for service in SERVICES {
        declaration["spec"]["services"][service]["replicas"] = json!(2);
    }
    declaration
}

/// Replaces the pods of a stack as a drained node would, of each service one at a time. Says how many.
fn restart_each_pod(trading: &Trading<'_>, stack: &str) -> usize {
    let all = || trading.exchange.pods(stack).unwrap();
    let of_each =
        |pods: &[Pod]| SERVICES.map(|service| pods.iter().filter(|it| it.service == service).count());
    let before = all();
    assert_eq!(of_each(&before), [2; 3], "{before:?}");
    for number in 0..2 {
        let leaves = SERVICES.map(|service| {
            let mut of_service = before.iter().filter(|pod| pod.service == service);
            of_service.nth(number).unwrap()
        });
        let names = leaves.iter().map(|pod| pod.name.as_str());
        let namespace = ["--namespace", &trading.namespace.name, "--wait=false"];
        let delete: Vec<&str> = ["delete", "pods"]
            .into_iter()
            .chain(namespace)
            .chain(names)
            .collect();
        trading.ground.session.kubectl(&delete).unwrap();
        wait_until("other pods in their places", PATIENCE, || {
            let pods = all();
            let is_gone = |old: &&Pod| pods.iter().all(|pod| pod.uid != old.uid);
            of_each(&pods) == [2; 3] && pods.iter().all(|pod| pod.ready) && leaves.iter().all(is_gone)
        })
        .unwrap();
    }
    before.len()
}

/// Trades of which not both orders are of the trade's own lane. One that was of a test's lane is erased with it: of that the
/// ledger's audit tells, because the real order is then not the sum of its trades.
const MIXED_TRADES: &str = "select count(*) from trades where (select count(*) from orders where id in (taker_order_id, \
                            maker_order_id) and orders.lane = trades.lane) <> 2";

/// Only this stack has asked for anything of the live lane, and for messages of it.
fn assert_only_reader(asked: &Asked, revision: &str) {
    let is_its_own = |name: &String| name.ends_with(revision);
    assert!(
        asked.keys().all(is_its_own),
        "{revision} is live, and these ask of the live lane: {asked:?}"
    );
    let reads = |what: &BTreeSet<String>| what.contains("CONSUMER.MSG.NEXT");
    assert!(asked.values().any(reads), "nobody reads the queue: {asked:?}");
}

/// A candidate has nothing to do with the live lane: it has asked for nothing there, and nobody has for it by a consumer of
/// its own; and it listens to nothing, but for answers to what it asks.
fn assert_stands_by(broker: &Broker, candidate: &str, live: &str, consumers: &[String]) {
    assert_only_reader(&broker.asked(), live);
    assert_eq!(broker.consumers().unwrap(), consumers);
    let heard = broker.heard_by(candidate).unwrap();
    assert!(
        heard.iter().all(|subject| subject.starts_with("_INBOX.")),
        "{candidate} listens to {heard:?}"
    );
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_3_the_queue_has_one_colour_of_readers() {
    let ground = Ground::shared();
    let namespace = case(&ground, 3, "queue");
    let mut trading = Trading::begin(&ground, &namespace, "1.0.0");
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let broker = Broker::of(&ground.session, &namespace.name).unwrap();
    trading.trade(100);
    let first = trading.revision("live");

    // From its beginning to its approval the candidate reads nothing of the live lane: while it waits for its tests, while
    // they run, and after them.
    broker.asked();
    let before = broker.delivered().unwrap();
    let consumers = broker.consumers().unwrap();
    let mut declaration = with_setting(self::declaration(&trading.exchange, "1.0.0"), "manual");
    declaration["spec"]["rollout"]["promotion"] = json!("Manual");
    gate.hold(&Hold::first("create jobs", "-smoke-")).unwrap();
    trading.exchange.release(&declaration).unwrap();
    gate.until_held(PATIENCE).unwrap();
    trading.until("the tests", |object| {
        is_current(object) && phase_of(object) == "Testing"
    });
    let candidate = trading.revision("candidate");
    let stands_by = || assert_stands_by(&broker, &candidate, &first, &consumers);
    trading.trade(100);
    stands_by();
    gate.decide(true).unwrap();
    trading.until("the tests to have ended", |object| {
        phase_of(object) == "AwaitingPromotion" || is_given_up(object)
    });
    assert_eq!(
        phase_of(trading.last()),
        "AwaitingPromotion",
        "{:#}",
        trading.last()["status"]
    );
    stands_by();
    trading.trade(250);
    stands_by();
    let delivered = broker.delivered().unwrap() - before;
    assert!(delivered > 250, "the live stack has got {delivered} messages");
    namespace.note("messages_to_live", delivered);
    assert_eq!(trading.exchange.sql(MIXED_TRADES).unwrap().trim(), "0");

    // After the swap the new stack reads, alone; after a rollback the old one.
    let approved = token(trading.last(), "candidate");
    trading.exchange.ask("promote", &approved).unwrap();
    trading.until_live_after(&first);
    trading.until_drained(&first);
    assert_eq!(trading.revision("live"), candidate);
    broker.asked();
    trading.trade(100);
    assert_only_reader(&broker.asked(), &candidate);
    trading.exchange.ask("rollback", &approved).unwrap();
    trading.until("the way back", |object| {
        phase_of(object) == "Held" && revision(object, "live") == first
    });
    trading.until_drained(&candidate);
    broker.asked();
    trading.trade(100);
    assert_only_reader(&broker.asked(), &first);
    drop(broker);

    // The broker is restarted between the first and the second of the writes that move the traffic.
    let declaration = with_setting(self::declaration(&trading.exchange, "1.0.0"), "restart");
    trading.release_up_to(&gate, 1, &declaration);
    restart_store(&ground, &namespace, "nats", "nats-server");
    assert!(trading.is_promoting());
    gate.decide(true).unwrap();
    trading.until_live_after(&first);
    trading.trade(100);
    assert_eq!(trading.exchange.sql(MIXED_TRADES).unwrap().trim(), "0");
    // The audit finds each notification once, of all trades: before, between and after the moves.
    trading.end_well();
}

/// Kills a store's only pod, and waits until another one is ready.
fn restart_store(ground: &Ground, namespace: &Namespace<'_>, store: &str, program: &str) {
    let name = format!("{NAME}-{store}-0");
    let state = |path: &str| {
        let state = ground.session.get(&namespace.name, &format!("pod/{name}"), path);
        state.unwrap_or_default()
    };
    let uid = state("{.metadata.uid}");
    ground.session.kill_pod(&namespace.name, &name, program).unwrap();
    let ready = "{.metadata.uid} {.status.conditions[?(@.type=='Ready')].status}";
    wait_until("the store to be back", PATIENCE, || {
        let state = state(ready);
        state.ends_with(" True") && !state.starts_with(&uid)
    })
    .unwrap();
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_6_event_streams_move_between_two_events() {
    let ground = Ground::shared();
    let namespace = case(&ground, 6, "streams");
    let mut trading = Trading::begin(&ground, &namespace, "1.0.0");
    let first = trading.revision("live");
    let pods = trading.exchange.pods(&first).unwrap();
    let pod = pods.iter().find(|pod| pod.service == "notification").unwrap();
    trading.trade(100);
    trading.release_setting("streams");
    trading.until("the swap", |object| phase_of(object) == "Promoting");
    // The last time at which the pod did not know yet that it drains: its streams have to end within the limit from there.
    let mut draining = now_ms();
    wait_until("the pod to drain", PATIENCE, || {
        let asked = now_ms();
        let drains = trading.exchange.report_of(pod).unwrap().role == "Draining";
        if !drains {
            draining = asked;
        }
        drains
    })
    .unwrap();
    trading.until_live_after(&first);
    trading.until_drained(&first);
    let second = trading.revision("live");
    trading.trade(100);
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
    let ended = moved.iter().map(|opening| opening["to_ms"].as_u64().unwrap());
    let last = report["started_unix_ms"].as_u64().unwrap() + ended.max().unwrap();
    let longest = last.saturating_sub(draining);
    namespace.note("streams_ended_milliseconds_after_the_drain", longest);
    assert!(
        longest <= STREAMS_END,
        "a stream stayed for {longest} ms on a pod that drained"
    );
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_7_the_candidate_is_as_big_as_what_an_autoscaler_has_made_of_the_live_stack() {
    const MOST: usize = 3;
    let ground = Ground::shared();
    let namespace = case(&ground, 7, "grown");
    let declare = |exchange: &Exchange<'_>, value: &str| {
        let mut declaration = with_setting(declaration(exchange, "1.0.0"), value);
        let trade = &mut declaration["spec"]["services"]["trade"];
        trade["resources"] = json!({"requests": {"cpu": "10m"}});
        trade["autoscaling"] =
            json!({"minReplicas": 1, "maxReplicas": MOST, "targetCPUUtilizationPercentage": 50});
        declaration
    };
    let mut trading = Trading::deploy(&ground, &namespace, |exchange| declare(exchange, "small"));
    trading.start_load(RATE);
    let first = trading.revision("live");
    // As big as it may become, so that it stays so while the two are compared.
    wait_until("the autoscaler", PATIENCE, || {
        serving(&ground, &namespace, &first, "trade") == MOST
    })
    .unwrap();
    let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
    let declaration = declare(&trading.exchange, "big");
    trading.release_up_to(&gate, 0, &declaration);
    let candidate = trading.revision("candidate");
    for service in SERVICES {
        let [live, new] =
            [&first, &candidate].map(|revision| serving(&ground, &namespace, revision, service));
        assert!(
            new >= live && live > 0,
            "at the first write of the swap {service} has {new} ready endpoints, the live stack {live}"
        );
        namespace.note(&format!("endpoints_of_{service}"), new);
    }
    assert_eq!(serving(&ground, &namespace, &first, "trade"), MOST);
    gate.decide(true).unwrap();
    trading.until_live_after(&first);
    trading.until_drained(&first);
    trading.end_well();
}

/// Ready endpoints of a service of a stack, as the Service of its colour lists them.
fn serving(ground: &Ground, namespace: &Namespace<'_>, revision: &str, service: &str) -> usize {
    let selector =
        format!("--selector=exchange.dev/revision={revision},app.kubernetes.io/component={service}");
    let path = "--output=jsonpath={.items[*].endpoints[*].conditions.ready}";
    let args = ["get", "endpointslices", "--namespace", &namespace.name];
    let ready = ground.session.kubectl(&[&args[..], &[&selector, path]].concat());
    let ready = ready.unwrap();
    ready.split_whitespace().filter(|ready| *ready == "true").count()
}

/// No promise of ours: what the same images lose without the operator, for comparison, under the load of case 1.
#[test]
#[ignore = "needs a cluster: make e2e"]
fn case_9_a_rolling_update_for_comparison() {
    let ground = Ground::shared();
    let namespace = case(&ground, 9, "rolling");
    let exchange = Exchange::install(&ground.session, &namespace.name, &ground.images).unwrap();
    let plain = |file: &str, version: &str| {
        let path = format!("{}/../examples/plain/{file}.yaml", env!("CARGO_MANIFEST_DIR"));
        let manifest = std::fs::read_to_string(path).unwrap();
        let image = format!("{}/exchange:{version}", ground.images.prefix);
        let manifest = manifest.replace("ghcr.io/acme/exchange:1.0.0", &image);
        let manifest = manifest.replace("value: r1", &format!("value: r{}", &version[..1]));
        // A node of two processors has no room for three pods of what trading should have, beside everything else.
        let manifest = manifest.replace("cpu: 500m", "cpu: 100m");
        ground.session.apply_manifest(&namespace.name, &manifest).unwrap();
    };
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
        for service in SERVICES {
            plain(service, version);
        }
        for service in SERVICES {
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
    ground.beside_one();
    let load = exchange.start_load(FULL_RATE).unwrap();
    trade(&load, 500);
    // Back and forth: an expand leaves the older version at work.
    for version in ["2.0.0", "1.0.0"] {
        release(version);
        trade(&load, 500);
    }
    let (table, report) = load.end().unwrap();
    say(&table);
    let mut figures = Figures::default();
    figures.add_report(&report);
    figures.note(&namespace);
    namespace.note("failures", report["summary"]["failures"].clone());
    // Only its failures are its own affair: the load is made as that of case 1, and the money is all there. It is over too soon for an
    // average without the last answers.
    assert_audited(&table, &report);
    made_of_all(&namespace, &report);
}

/// The longest of those that share the machine: it begins before them, so that none runs on alone for long.
mod at_first {
    use super::*;

    #[test]
    #[ignore = "needs a cluster: make e2e"]
    fn case_8_two_exchanges_are_released_at_once() {
        let ground = Ground::shared();
        let namespaces = [
            case(&ground, 8, "both"),
            Namespace::beside(&ground.session, "both-2").unwrap(),
        ];
        // The same in both, down to the revisions: only the namespaces tell them apart.
        let declare =
            |exchange: &Exchange<'_>, value: &str| with_setting(declaration(exchange, "1.0.0"), value);
        let mut both = thread::scope(|scope| {
            let deployments = [0, 1].map(|whose| {
                let (ground, namespace) = (&ground, &namespaces[whose]);
                scope.spawn(move || {
                    let mut trading =
                        Trading::deploy(ground, namespace, |exchange| declare(exchange, "first"));
                    let load = trading.exchange.start_clients(RATE_OF_TWO, CONNECTIONS_OF_TWO, 1);
                    trading.load = Some(load.unwrap());
                    trading
                })
            });
            deployments.map(|deployment| deployment.join().unwrap())
        });
        let live_in_both = |both: &[Trading<'_>; 2]| {
            let [one, other] = both.each_ref().map(|trading| trading.revision("live"));
            assert_eq!(one, other, "the same was declared");
            one
        };
        let first = live_in_both(&both);
        for trading in &both {
            trading.trade(100);
        }
        for trading in &both {
            let declaration = declare(&trading.exchange, "second");
            trading.exchange.release(&declaration).unwrap();
        }
        for trading in &mut both {
            trading.until_live_after(&first);
            trading.until_drained(&first);
        }
        // From the first that the operator did for it to its being live.
        let spans = [0, 1].map(|whose| {
            let all = both[whose].watch.sightings().iter();
            let own: Vec<_> = all
                .filter(|(_, object)| is_current(object) && object["metadata"]["generation"] == 2)
                .collect();
            let live = own.iter().find(|(_, object)| phase_of(object) == "Live");
            (own[0].0, live.unwrap().0)
        });
        assert!(
            spans[0].0 < spans[1].1 && spans[1].0 < spans[0].1,
            "one was released after the other: {spans:?}"
        );
        // The same in both once more, but for a test that says no in one: no verdict counts for the other.
        let second = live_in_both(&both);
        let verdicts = ["--help", "no-such-command"];
        for (trading, verdict) in both.iter().zip(verdicts) {
            let mut declaration = declare(&trading.exchange, "third");
            let test = json!({"name": "own", "command": ["/usr/bin/exchange", verdict], "timeout": "60s"});
            declaration["spec"]["rollout"]["smokeTests"] = json!([test]);
            trading.exchange.release(&declaration).unwrap();
        }
        let [passed, refused] = &mut both;
        passed.until_live_after(&second);
        refused.until("the refusal", |object| {
            is_current(object) && phase_of(object) == "Failed"
        });
        assert_eq!(text(refused.last(), "/status/rejected/reason"), "SmokeTestFailed");
        let third = passed.revision("live");
        assert_eq!(refused.revision("rejected"), third, "the same was declared");
        assert_eq!(refused.revision("live"), second);
        for trading in &both {
            trading.trade(100);
        }
        let own = [
            sorted([first.clone(), second.clone(), third]),
            sorted([first, second]),
        ];
        let mut figures = Figures::default();
        for (mut trading, own) in both.into_iter().zip(own) {
            let report = trading.end_load();
            figures.add_watch(&trading.watch);
            figures.add(trading.figures);
            assert_eq!(revisions_that_answered(&report), own);
        }
        figures.note(&namespaces[0]);
    }
}

/// The two that take longest, of which one asks for ten times as much as any other: the processors have room for one beside
/// it. And one that is deployed beside them, and then alone. (Room is given in the order of names.)
mod abreast {
    use super::*;

    /// Answers a second at the full rate.
    const ANSWERED: f64 = 200.0;

    /// A stack that has lost the traffic, and somebody who has not left it.
    struct Staying {
        old: String,
        pods: Vec<Pod>,
        one: Connected,
    }

    /// A release that needs the colour of a stack waits for the last one who is connected to that. What is held at the gate is
    /// the first write that takes a pod of it away.
    fn assert_left_before_it_goes(trading: &mut Trading<'_>, gate: &Gate<'_>, staying: Staying) {
        let Staying { old, pods, one } = staying;
        let idle_since = |object: &Value| text(object, "/status/previous/idleSince").to_owned();
        trading.until("the next release to wait", |object| {
            is_current(object) && phase_of(object) == "Pending"
        });
        let status = &trading.last()["status"];
        assert_eq!(revision(trading.last(), "previous"), old, "{status:#}");
        assert_eq!(status["previous"]["state"], "Draining", "{status:#}");
        assert_eq!(idle_since(trading.last()), "", "{status:#}");
        assert_eq!(
            sorted(trading.exchange.pods(&old).unwrap()),
            pods,
            "it has lost a pod that somebody is connected to"
        );
        drop(one);
        let write = gate.until_held(PATIENCE).unwrap();
        assert!(write.name.ends_with(&old), "{write} was held");
        trading.until("its retirement", |object| {
            revision(object, "previous") == old && text(object, "/status/previous/state") == "Retiring"
        });
        assert_ne!(idle_since(trading.last()), "", "{:#}", trading.last()["status"]);
        assert_empty(trading, &old, &pods);
        gate.decide(true).unwrap();
    }

    #[test]
    #[ignore = "needs a cluster: make e2e"]
    fn case_1_releases_back_and_forth() {
        let releases: usize = std::env::var("RELEASES").map_or(5, |count| count.parse().unwrap());
        let ground = Ground::shared();
        let namespace = case(&ground, 1, "releases");
        let mut trading = Trading::deploy(&ground, &namespace, |exchange| declaration(exchange, "1.0.0"));
        ground.beside_one();
        trading.load = Some(trading.exchange.start_load(FULL_RATE).unwrap());
        let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
        trading.trade(500);
        let mut stacks = vec![trading.revision("live")];
        let mut stays: Option<Staying> = None;
        for number in 1..=releases {
            let old = stacks.last().unwrap().clone();
            let pods = sorted(trading.exchange.pods(&old).unwrap());
            assert_eq!(pods.len(), SERVICES.len(), "{pods:?}");
            assert!(pods.iter().all(|pod| pod.ready && !pod.leaving), "{pods:?}");
            // Every second stack is left by everybody but one, who is no client of the load, until the next release waits.
            let one_stays = number.is_multiple_of(2) && number < releases;
            let one = one_stays.then(|| trading.exchange.connect("trade").unwrap());
            if stays.is_some() {
                gate.hold(&Hold::first("delete deployments", "")).unwrap();
            }
            trading.release_setting(&number.to_string());
            if let Some(staying) = stays.take() {
                assert_left_before_it_goes(&mut trading, &gate, staying);
            }
            trading.until_live_after(&old);
            stacks.push(trading.revision("live"));
            if let Some(one) = one {
                stays = Some(Staying { old, pods, one });
            } else {
                assert_left(&mut trading, &old, &pods);
                trading.trade(500);
            }
        }
        drop(gate);
        assert_eq!(
            moves(&trading.watch).len(),
            releases,
            "each release moves the traffic once"
        );
        let report = trading.end_well();

        let presence = answered(&report);
        let at = |revision: &str, field: &str| presence[revision][field].as_u64().unwrap();
        // A stream that is open has an end, too.
        let streamed = |revision: &str| {
            let openings = report["streams"].as_array().unwrap().iter();
            let own = openings.filter(|opening| text(opening, "/stack").ends_with(revision));
            own.map(|opening| opening["to_ms"].as_u64().unwrap())
                .max()
                .unwrap()
        };
        for pair in stacks.windows(2) {
            let last = at(&pair[0], "last_ms").max(streamed(&pair[0]));
            let stayed = Duration::from_millis(last.saturating_sub(at(&pair[1], "first_ms")));
            assert!(
                stayed < DRAIN_TIMEOUT,
                "a client stayed on {} for {stayed:?}",
                pair[0]
            );
        }
        let rate = made_of_all(&namespace, &report);
        assert!(rate >= ANSWERED, "{rate} answers a second");
    }

    #[test]
    #[ignore = "needs a cluster: make e2e"]
    fn case_2_a_migration_and_the_way_back() {
        let ground = Ground::shared();
        let namespace = case(&ground, 2, "migration");
        let mut trading = Trading::deploy(&ground, &namespace, |exchange| two_of_each(exchange, "1.0.0"));
        trading.start_load(RATE);
        let first = trading.revision("live");
        let holder = Holder::join(&mut trading.exchange.api().unwrap());

        // Forward, where an account is frozen: version 2 keeps that in a table of its own, and says since when.
        let declaration = two_of_each(&trading.exchange, "2.0.0");
        trading.exchange.release(&declaration).unwrap();
        trading.until_live_after(&first);
        let second = trading.revision("live");
        trading.trade(150);
        let frozen = holder.set(&holder.api(&trading, &second), "frozen");
        assert!(!text(&frozen, "/frozen_at").is_empty(), "{frozen}");
        let open = "select count(*) from freezes where lifted_at is null";
        assert_eq!(trading.exchange.sql(open).unwrap().trim(), "1");
        assert_eq!(trading.exchange.sql(TRANSLATIONS).unwrap().trim(), "1");

        // Back before the contract, and version 1's pods anew, one after the other: they serve on what version 2 has written, and
        // no client notices that they are others.
        let begun = Instant::now();
        let leave = token(trading.last(), "live");
        trading.exchange.ask("rollback", &leave).unwrap();
        trading.until("version 1 to be live again", |object| {
            phase_of(object) == "Held" && revision(object, "live") == first
        });
        let back = u64::try_from(begun.elapsed().as_millis()).unwrap();
        namespace.note("rollback_milliseconds_from_asking", back);
        trading.trade(150);
        let restarted = restart_each_pod(&trading, &first);
        namespace.note("pods_of_version_1_restarted", restarted);
        trading.trade(150);
        let api = holder.api(&trading, &first);
        let frozen = holder.account(&api);
        assert_eq!(text(&frozen, "/state"), "frozen", "{frozen}");
        assert!(frozen["frozen_at"].is_null(), "version 1 does not know: {frozen}");
        assert_eq!(holder.sell(&api, "frozen"), "account_frozen");
        assert_eq!(text(&holder.set(&api, "active"), "/state"), "active");
        assert_eq!(holder.sell(&api, "active"), "insufficient_funds");
        trading.trade(150);

        // Forward again, and this time to the contract, which comes when the old stack is gone.
        let retry = token(trading.last(), "rejected");
        let mut declaration = declaration;
        declaration["spec"]["rollout"]["retention"] = json!("5s");
        trading.exchange.release(&declaration).unwrap();
        trading.exchange.ask("retry", &retry).unwrap();
        trading.until("version 2 to be live and contracted", |object| {
            phase_of(object) == "Live"
                && text(object, "/status/live/version") == "2.0.0"
                && object["status"]["live"]["contracted"] == true
        });
        assert_eq!(trading.exchange.sql(TRANSLATIONS).unwrap().trim(), "0");
        let identity = trading.exchange.sql("select identity from schema_state").unwrap();
        migrated_where_the_live_stack_is(&ground, &namespace, &second, identity.trim());
        let account = holder.account(&holder.api(&trading, &second));
        assert_eq!(text(&account, "/state"), "active", "{account}");
        assert!(account["frozen_at"].is_null(), "{account}");

        // A rollback is refused now, and whoever asks for it is told why.
        let contracted = trading.last()["status"]["live"].clone();
        let asked = trading.watch.sightings().len();
        let leave = token(trading.last(), "live");
        trading.exchange.ask("rollback", &leave).unwrap();
        let why = "there is no stack to go back to, and the schema is contracted for 2.0.0";
        let mut refused = String::new();
        let waited = wait_until("the refusal", PATIENCE, || {
            refused = told(&ground, &namespace, "RollbackRefused");
            refused.contains(why)
        });
        assert!(waited.is_ok(), "{refused:?}");
        trading.trade(150);
        trading.until("what was asked for", |object| {
            text(object, "/metadata/annotations/exchange.dev~1rollback") == leave
        });
        let since = &trading.watch.sightings()[asked..];
        let (_, last) = since.last().unwrap();
        assert_eq!(text(last, "/metadata/annotations/exchange.dev~1rollback"), leave);
        for (_, object) in since {
            assert_eq!(phase_of(object), "Live", "{:#}", object["status"]);
            assert_eq!(object["status"]["live"], contracted);
        }
        let conditions = last["status"]["conditions"].as_array().unwrap();
        let refusal = conditions
            .iter()
            .find(|it| it["type"] == "RollbackAvailable")
            .unwrap();
        assert_eq!(refusal["status"], "False", "{refusal}");
        assert_eq!(refusal["reason"], "NoPrevious", "{refusal}");
        assert!(text(refusal, "/message").starts_with(why), "{refusal}");

        // Nor does the version before it become live by being declared, as who goes back in Git does: its own migration refuses.
        let before = two_of_each(&trading.exchange, "1.0.0");
        trading.exchange.release(&before).unwrap();
        trading.until("the older version to be refused", |object| {
            let message = text(object, "/status/conditions/0/message");
            is_current(object)
                && message.contains("the schema is contracted for 20 and later, this build is 10")
        });
        assert_eq!(phase_of(trading.last()), "Migrating");
        assert_eq!(trading.last()["status"]["live"], contracted);
        trading.exchange.release(&declaration).unwrap();
        trading.until("what is live to be declared", |object| {
            is_current(object) && phase_of(object) == "Live"
        });
        assert_eq!(trading.last()["status"]["live"], contracted);
        trading.trade(150);
        let report = trading.end_well();
        assert_eq!(revisions_that_answered(&report), sorted([first, second]));
    }

    /// In so many requests every connection of case 5 has its turn: one of twenty goes to the user service and one to the
    /// notification service, and at each of them twenty clients wait in a line.
    const ROUND: u64 = 500;

    /// A time in which requests may fail, in milliseconds since 1970.
    #[derive(Clone, Copy, Debug)]
    struct Window {
        from: u64,
        to: u64,
    }

    impl Window {
        /// Whether something that was meant to begin and has ended at these times was under way in it.
        fn has(self, begun: u64, ended: u64) -> bool {
            ended >= self.from && begun <= self.to
        }

        /// Waits until it is over: what goes wrong later is the fault of what is done then.
        fn pass(self) {
            wait_until("the disturbance to be over", PATIENCE, || now_ms() > self.to).unwrap();
        }
    }

    /// Pods that were killed.
    #[derive(Clone, Copy, Debug)]
    struct Struck {
        /// How many connections they had.
        connections: u64,
        /// When the last of them had ended, in milliseconds since 1970.
        dead: u64,
        /// When that can have been noticed.
        window: Window,
    }

    /// Requests that clients have on one connection at the same time, at most.
    const AT_ONCE: u64 = 4;

    /// Pods of the live stack, one of two of each service, and after them the node's own programs; and in another swap the
    /// database: each ends while one of three live Services has been moved, and two have not.
    #[test]
    #[ignore = "needs a cluster: make e2e"]
    fn case_5_pods_and_the_database_end_during_the_swap() {
        let ground = Ground::shared();
        let namespace = case(&ground, 5, "disturbed");
        let declaration = |exchange: &Exchange<'_>| two_of_each(exchange, "1.0.0");
        let mut trading = Trading::deploy(&ground, &namespace, declaration);
        // From here on it disturbs all others.
        ground.clear();
        trading.start_load(2 * RATE);
        let gate = Gate::before(&ground.session, &ground.images, &namespace.name).unwrap();
        // The release that is held: what it is to replace, what it is to become.
        let stopped = |trading: &mut Trading<'_>, value: &str, errors: &str| {
            trading.trade(200);
            let mut declaration = with_setting(declaration(&trading.exchange), value);
            declaration["spec"]["rollout"]["verification"]["maxErrorRate"] = json!(errors);
            trading.release_up_to(&gate, 1, &declaration);
            (trading.revision("live"), trading.revision("candidate"))
        };
        let ends_well = |trading: &mut Trading<'_>, (old, new): &(String, String)| {
            trading.until_live_after(old);
            let status = &trading.last()["status"];
            assert_eq!(revision(trading.last(), "live"), new, "{status:#}");
            assert_eq!(status["history"][0]["outcome"], "Verified", "{status:#}");
            assert!(
                status["candidate"].is_null() && status["rejected"].is_null(),
                "{status:#}"
            );
        };
        let harm = |trading: &Trading<'_>| {
            let so_far = trading.load.as_ref().unwrap().progress();
            (so_far.failed, so_far.closed_without_notice)
        };

        let release = stopped(&mut trading, "pods", "1%");
        assert_eq!(harm(&trading), (0, 0), "no pod has been killed yet");
        let pods = kill_one_of_each(&trading, &release.0);
        pods.window.pass();
        // Who had a connection to one of them has used it again after so many requests, and found it closed.
        trading.trade(ROUND);
        // From here on nothing fails, and no connection is closed without notice: the pods are replaced, and what the node's own
        // programs have set up stays while they are away.
        let recovered = harm(&trading);
        let cluster = ground.session.cluster.as_ref();
        let before = cluster.map(|cluster| kill_node(cluster, &trading, &gate, [&release.0, &release.1]));
        assert!(trading.is_promoting());
        gate.decide(true).unwrap();
        ends_well(&mut trading, &release);
        if let (Some(cluster), Some(before)) = (cluster, before) {
            for (component, before) in NODE.into_iter().zip(before) {
                let status = &supervisor::read_status(cluster)[component];
                let process = status.pid.and_then(|pid| host_pid(cluster, pid));
                assert!(
                    status.restarts > before && process.is_some(),
                    "{component}: {status:?}"
                );
            }
        }
        // What comes now disturbs nobody else.
        ground.beside_others();
        trading.until_drained(&release.0);
        // Every connection has had its turn once more.
        trading.trade(ROUND);
        assert_eq!(harm(&trading), recovered, "failed, and closed without notice");

        // What the database's absence makes of the new stack's first answers is no fault of it.
        let release = stopped(&mut trading, "database", "100%");
        let from = now_ms();
        restart_store(&ground, &namespace, "postgres", "postgres");
        let database = Window {
            from,
            to: now_ms() + SETTLING,
        };
        database.pass();
        assert!(trading.is_promoting());
        gate.decide(true).unwrap();
        ends_well(&mut trading, &release);
        trading.until_drained(&release.0);

        let (table, report) = trading.load.take().unwrap().end().unwrap();
        say(&table);
        trading.figures.add_report(&report);
        trading.figures.add_watch(&trading.watch);
        trading.figures.note(&namespace);
        namespace.note("failures", report["summary"]["failures"].clone());
        // The audit has asked for each order once more, with the same key, and the ledger itself.
        assert_audited(&table, &report);
        judge(&namespace, &report, database, pods);
    }

    /// Kills one of the two pods of each service of a stack. The others go on all the while: the same pods, which answer.
    fn kill_one_of_each(trading: &Trading<'_>, stack: &str) -> Struck {
        let live = sorted(trading.exchange.pods(stack).unwrap());
        let report_of = |pod: &Pod| trading.exchange.report_of(pod).unwrap();
        let of_each: Vec<&[Pod]> = live.chunks(2).collect();
        let mut connections = 0;
        let from = now_ms();
        for (service, pods) in sorted(SERVICES).into_iter().zip(&of_each) {
            let of_service = pods.iter().filter(|pod| pod.service == service).count();
            assert_eq!((of_service, pods.len()), (2, 2), "{live:?}");
            let (killed, survivor) = (&pods[0], &pods[1]);
            connections += report_of(killed).connections;
            let session = &trading.ground.session;
            session
                .kill_pod(&trading.namespace.name, &killed.name, NAME)
                .unwrap();
            report_of(survivor);
        }
        let dead = now_ms();
        let there = trading.exchange.pods(stack).unwrap();
        for survivor in of_each.iter().map(|pods| &pods[1]) {
            assert!(there.contains(survivor), "{survivor:?} is not among {there:?}");
            report_of(survivor);
        }
        // What begins when everybody knows that they are gone, goes to others.
        let to = dead + SETTLING;
        Struck {
            connections,
            dead,
            window: Window { from, to },
        }
    }

    /// The node's own programs.
    const NODE: [&str; 2] = ["kubelet", "kube-proxy"];

    /// Kills the node's own programs while a swap between these stacks is held. Says how often each had been restarted before.
    fn kill_node(cluster: &Cluster, trading: &Trading<'_>, gate: &Gate<'_>, stacks: [&str; 2]) -> [usize; 2] {
        let before = NODE.map(|component| supervisor::read_status(cluster)[component].restarts);
        // A kubelet that starts takes a container that is younger than ten seconds for not ready until it has asked it.
        wait_until("the containers have run for a while", PATIENCE, || {
            let while_ago = Timestamp::now() - SignedDuration::from_secs(11);
            let pods = stacks.map(|stack| trading.exchange.pods(stack).unwrap());
            let ran = |pod: &Pod| pod.running_since.is_some_and(|since| since < while_ago);
            pods.iter().flatten().all(ran)
        })
        .unwrap();
        let [kubelet, proxy] = NODE;
        supervisor::signal(cluster, kubelet, Signal::SIGKILL).unwrap();
        // The gate answers by way of the kubelet: as soon as that is back, the other two writes are made without kube-proxy.
        gate.seen().unwrap();
        supervisor::signal(cluster, proxy, Signal::SIGKILL).unwrap();
        before
    }

    /// Whether all that went wrong did so in one of these times, and as it should.
    fn judge(namespace: &Namespace<'_>, report: &Value, database: Window, pods: Struck) {
        let failed = report["summary"]["failed_requests"].as_array().unwrap();
        assert_eq!(report["summary"]["failed"], failed.len());
        let orders = failed.iter().filter(|it| it["operation"] == "order").count();
        assert_eq!(report["unknown_orders"], orders);
        let started = report["started_unix_ms"].as_u64().unwrap();
        let at = |it: &Value, field: &str| started + it[field].as_u64().unwrap();
        let (mut without_database, mut in_flight, mut refused) = (0_u32, 0_u32, 0_u32);
        for request in failed {
            let (begun, ended) = (at(request, "intended_ms"), at(request, "ended_ms"));
            let failure = text(request, "/failure");
            // The database's absence is told, with when to come back (`exchange load` calls it another failure if it is not);
            // killed pods tell nothing: what was in flight there is cut off, or never answered; and who connects is refused, which
            // has given nobody anything, until every node knows that they are gone.
            if database.has(begun, ended) {
                assert_eq!(failure, "status 503", "{request}");
                without_database += 1;
            } else {
                assert!(
                    pods.window.has(begun, ended),
                    "{request}: neither {database:?} nor {pods:?}"
                );
                if failure.starts_with("connect: Connection refused") {
                    assert!(ended <= pods.window.to, "{request}, and {pods:?}");
                    refused += 1;
                } else {
                    let unanswered = failure.starts_with("connection lost: ") || failure == "timeout";
                    assert!(unanswered && begun <= pods.dead, "{request}, and {pods:?}");
                    in_flight += 1;
                }
            }
        }
        namespace.note("requests_failed_without_database", without_database);
        namespace.note("requests_failed_in_flight_with_pods", in_flight);
        namespace.note("connections_refused_by_killed_pods", refused);
        let with_pods = u64::from(in_flight + refused);
        let closed = report["closed_without_notice"].as_u64().unwrap();
        assert!(
            without_database > 0,
            "nobody has noticed that the database was away"
        );
        assert!(with_pods + closed > 0, "nobody has noticed that pods were killed");
        let mut cut_off = 0;
        let openings = report["streams"].as_array().unwrap().iter();
        for opening in openings.filter(|it| matches!(text(it, "/end"), "cut_off" | "not_opened")) {
            let (begun, ended) = (at(opening, "from_ms"), at(opening, "to_ms"));
            if opening["end"] == "cut_off" {
                // Without the database none can be opened, but who has one keeps it.
                assert!(pods.window.has(ended, ended), "{opening}, and {pods:?}");
                cut_off += 1;
            } else {
                // As a request is: it may have waited for its connection first.
                let told = opening["failure"] == "status 503" && database.has(begun, ended);
                assert!(
                    told || pods.window.has(ended, ended),
                    "{opening}: neither {database:?} nor {pods:?}"
                );
            }
        }
        // No more than was connected to the dead.
        namespace.note("connections_of_killed_pods", pods.connections);
        assert!(
            closed + cut_off <= pods.connections && with_pods <= AT_ONCE * pods.connections,
            "{closed} connections closed without notice, {cut_off} streams cut off, {in_flight} requests cut off and {refused} \
             refused: {pods:?}"
        );
    }
}

/// A case that does without the operator of all, so that none goes on beside it: the last one.
mod without_operator {
    use super::*;

    /// Kinds of everything that the operator makes.
    const CHILDREN: &str = "services,deployments,jobs,controllerrevisions,poddisruptionbudgets,horizontalpodautoscalers,\
                            serviceaccounts,secrets,configmaps";

    /// For so many attempts the operator keeps a contract Job.
    const CONTRACTS_KEPT: u64 = 10;

    /// What is another thing in each release, and rightly so: addresses, and the labels by which a Job knows its pods, are given
    /// by the API server; attempts only grow.
    const OF_ONE_RELEASE: [&str; 7] = [
        "clusterIP",
        "clusterIPs",
        "controller-uid",
        "job-name",
        "batch.kubernetes.io/controller-uid",
        "batch.kubernetes.io/job-name",
        "exchange.dev/attempt",
    ];

    /// What an object is: its labels, what is wanted of it, what it holds. Not what is of one release: beside
    /// [`OF_ONE_RELEASE`] what a Secret holds, which is drawn, and the setting that makes it a release.
    fn content(object: &Value) -> Value {
        fn forget(value: &mut Value) {
            match value {
                Value::Object(fields) => {
                    fields.retain(|name, _| !OF_ONE_RELEASE.contains(&name.as_str()));
                    if fields.get("name").is_some_and(|name| name == SETTING) {
                        fields.remove("value");
                    }
                    fields.values_mut().for_each(forget);
                }
                Value::Array(values) => values.iter_mut().for_each(forget),
                _ => {}
            }
        }
        let mut content = json!({
            "labels": object["metadata"]["labels"],
            "spec": object["spec"],
            "data": object["data"],
        });
        if let (true, Some(data)) = (object["kind"] == "Secret", content["data"].as_object_mut()) {
            let length = |value: &Value| value.as_str().unwrap().len();
            data.values_mut().for_each(|value| *value = json!(length(value)));
        }
        forget(&mut content);
        content
    }

    /// Where two values differ, and how.
    fn differences(path: &str, one: &Value, other: &Value) -> Vec<String> {
        match (one, other) {
            (Value::Object(fields), Value::Object(others)) => {
                let names: BTreeSet<&String> = fields.keys().chain(others.keys()).collect();
                let of = |name: &&String| {
                    differences(
                        &format!("{path}/{name}"),
                        &one[name.as_str()],
                        &other[name.as_str()],
                    )
                };
                names.iter().flat_map(of).collect()
            }
            _ if one == other => Vec::new(),
            _ => vec![format!("{path}: {one} instead of {other}")],
        }
    }

    /// How a release has ended, in words that are the same for each: the live stack's names are replaced by `live`, those
    /// of the one before by `previous`.
    fn end_state(ground: &Ground, namespace: &str) -> Value {
        let get = |object: &str, path: &str| ground.session.get(namespace, object, path).unwrap();
        let status: Value = serde_json::from_str(&get("exd/exchange", "{.status}")).unwrap();
        let of_ours = "--selector=app.kubernetes.io/managed-by=exchange-operator";
        let list = [
            "get",
            CHILDREN,
            of_ours,
            "--output=json",
            "--namespace",
            namespace,
        ];
        let list: Value = serde_json::from_str(&ground.session.kubectl(&list).unwrap()).unwrap();
        let objects: BTreeMap<String, &Value> = list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| {
                (
                    format!("{} {}", text(it, "/kind"), text(it, "/metadata/name")),
                    it,
                )
            })
            .collect();
        let attempt = |stack: &str| status[stack]["attempt"].as_u64().unwrap();
        // Every stack that has left has its contract behind it. How many there are depends on how many releases there were.
        let contract = |name: &String| name.split_once("-contract-")?.1.parse::<u64>().ok();
        let contracts = sorted(objects.keys().filter_map(contract));
        let from = (attempt("live") + 1).saturating_sub(CONTRACTS_KEPT).max(1);
        let kept: Vec<u64> = (from..=attempt("previous")).collect();
        let renamed = |objects: &Value| {
            let mut text = objects.to_string();
            for stack in ["live", "previous"] {
                for field in ["revision", "colour"] {
                    text = text.replace(self::text(&status, &format!("/{stack}/{field}")), stack);
                }
                // The Jobs of its attempt, and not of another one.
                for gate in ["expand", "smoke", "verify"] {
                    let name = |attempt: &str| format!("-{gate}{attempt}\"");
                    text = text.replace(&name(&format!("-{}", attempt(stack))), &name(""));
                }
            }
            serde_json::from_str::<Value>(&text).unwrap()
        };
        let objects = objects.iter().filter(|(name, _)| contract(name).is_none());
        let objects: serde_json::Map<String, Value> = objects
            .map(|(name, object)| (name.clone(), content(object)))
            .collect();
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
            "contracts_kept": contracts == kept,
            "objects": renamed(&objects.into()),
        })
    }

    /// Exchanges that are released side by side, each by an operator of its own, which is killed. A third one has made each kill
    /// take longer by more than half on two cores.
    const SIDE_BY_SIDE: usize = 2;
    /// Releases that are recorded when every write is wanted. What all of them write counts: the status may be recorded once or
    /// twice more in one release than in another, and who is killed at a write that seldom comes has to wait for it.
    const RECORDED: usize = 3;
    /// Releases beside those with a kill that comes.
    const SPARE: usize = 12;
    /// Kills of a run that does not want every write.
    const SAMPLED: usize = 6;
    /// More writes than any release has.
    const WRITES_AT_MOST: usize = 1000;
    /// Releases after which clients are replaced: the audit at their end stays small.
    const AT_A_TIME: u32 = 30;

    /// How often a release writes each sort of write. Which comes first differs from release to release; that each comes does not.
    type Writes = BTreeMap<String, usize>;

    /// What both have.
    fn in_both(one: &Writes, other: &Writes) -> Writes {
        let both = one.iter().filter_map(|(sort, count)| {
            let count = *count.min(other.get(sort)?);
            Some((sort.clone(), count))
        });
        both.collect()
    }

    /// What these have and what is common does not, as `WRITES` has it.
    fn beyond<'a>(writes: &'a Writes, common: &'a Writes) -> impl Iterator<Item = String> + 'a {
        writes.iter().flat_map(|(sort, count)| {
            let of_all = common.get(sort).copied().unwrap_or(0);
            (of_all..*count).map(move |number| format!("{sort}#{number}"))
        })
    }

    /// At which write of a release the operator is killed, and when.
    #[derive(Clone, Debug)]
    struct Kill {
        sort: String,
        /// Of those of this sort.
        number: usize,
        moment: Moment,
    }

    impl Kill {
        /// The write, as `WRITES` has it.
        fn write(&self) -> String {
            format!("{}#{}", self.sort, self.number)
        }
    }

    /// The kills of a run, shared by all exchanges of it.
    #[derive(Default)]
    struct Plan {
        /// Those to choose of, in their order.
        waiting: VecDeque<Kill>,
        /// So many have to be reached: each of them another one.
        wanted: usize,
        reached: usize,
        /// Of those during a write, whether the API server had not answered yet.
        unanswered: Vec<bool>,
        under_way: usize,
        /// A release may have a write less than the recorded one, so that a kill is not reached.
        releases_left: usize,
        /// What every release writes that was recorded, of whichever exchange.
        writes: Writes,
        /// What only some of them write: nobody is killed there when every write is wanted.
        left_out: BTreeSet<String>,
    }

    impl Plan {
        /// Of releases with so many writes.
        fn of(writes: &Writes) -> Self {
            let mut all = Vec::new();
            for (sort, count) in writes {
                all.extend((0..*count).map(|number| (sort.clone(), number)));
            }
            let kill = |(sort, number), moment| Kill { sort, number, moment };
            let mut waiting: Vec<Kill> = Vec::new();
            let named = writes_named();
            let wanted = if every_write() || !named.is_empty() {
                let at_each = |write: (String, usize)| Moment::ALL.map(|moment| kill(write.clone(), moment));
                waiting.extend(all.into_iter().flat_map(at_each));
                if !every_write() {
                    waiting.retain(|it| named.contains(&it.write()));
                }
                let unknown = |it: &&String| waiting.iter().all(|kill| kill.write() != **it);
                let unknown: Vec<_> = named.iter().filter(unknown).collect();
                assert!(
                    unknown.is_empty(),
                    "a release has none of {unknown:?}: {writes:#?}"
                );
                waiting.len()
            } else {
                let seed = std::env::var("SEED");
                let seed: u64 = seed.map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
                // Of more than a release has: that the next one has a write more or less does not draw all others.
                let mut numbers: Vec<usize> = (0..WRITES_AT_MOST).collect();
                numbers.shuffle(&mut StdRng::seed_from_u64(seed));
                numbers.retain(|number| *number < all.len());
                let moments = Moment::ALL.into_iter().cycle();
                let drawn = numbers.into_iter().map(|number| all[number].clone());
                waiting.extend(drawn.zip(moments).map(|(write, moment)| kill(write, moment)));
                let first: Vec<String> = waiting.iter().take(SAMPLED).map(Kill::write).collect();
                let first = first.join(",");
                say(format!(
                    "SEED={seed}, if releases have as many writes, or WRITES='{first}' chooses the same again"
                ));
                SAMPLED
            };
            Self {
                waiting: waiting.into(),
                wanted,
                releases_left: wanted + SPARE,
                writes: writes.clone(),
                ..Self::default()
            }
        }

        /// Another exchange's releases have these writes, and some of them those that are left out. What only some write, as a status that is
        /// recorded once more, is no write of every release.
        fn at_most(&mut self, writes: &Writes, left_out: BTreeSet<String>) {
            let both = in_both(&self.writes, writes);
            let only_some = [&self.writes, writes]
                .into_iter()
                .flat_map(|it| beyond(it, &both));
            self.left_out.extend(only_some.chain(left_out));
            self.writes = both;
            if every_write() {
                let waiting = self.waiting.len();
                let writes = &self.writes;
                self.waiting.retain(|kill| is_of_all(kill, writes));
                self.wanted -= waiting - self.waiting.len();
            }
        }

        fn next(&mut self) -> Option<Kill> {
            let enough = self.reached + self.under_way >= self.wanted;
            if enough || self.releases_left == 0 {
                return None;
            }
            let kill = self.waiting.pop_front()?;
            self.releases_left -= 1;
            self.under_way += 1;
            Some(kill)
        }

        fn ended(&mut self, kill: Kill, reached: Option<Reached>) {
            self.under_way -= 1;
            if let Some(Reached { unanswered }) = reached {
                self.reached += 1;
                self.unanswered.extend(unanswered);
                return;
            }
            say(format!("{kill:?} did not come in its release"));
            if every_write() && !is_of_all(&kill, &self.writes) {
                self.wanted -= 1;
            } else {
                self.waiting.push_back(kill);
            }
        }
    }

    /// Whether this write is one of every release.
    fn is_of_all(kill: &Kill, writes: &Writes) -> bool {
        writes.get(&kill.sort).is_some_and(|count| kill.number < *count)
    }

    fn every_write() -> bool {
        std::env::var("EVERY_WRITE").is_ok_and(|it| it == "1")
    }

    /// The writes of `WRITES='update services exchange-user#0'`, with commas between them, to kill at them again.
    fn writes_named() -> Vec<String> {
        let named = std::env::var("WRITES").unwrap_or_default();
        let writes = named.split(',').map(str::trim).filter(|it| !it.is_empty());
        writes.map(str::to_owned).collect()
    }

    /// A kill that came.
    #[derive(Clone, Copy, Debug)]
    struct Reached {
        /// Of one during a write, whether the API server had not answered yet.
        unanswered: Option<bool>,
    }

    /// An exchange with an operator of its own.
    struct Killed<'a> {
        ground: &'a Ground,
        namespace: &'a Namespace<'a>,
        operator: Operator,
        trading: Trading<'a>,
        gate: Gate<'a>,
    }

    impl<'a> Killed<'a> {
        fn begin(ground: &'a Ground, namespace: &'a Namespace<'_>) -> Self {
            let operator = Operator::of(&namespace.name);
            operator.install(&ground.session, &ground.images).unwrap();
            let trading = Trading::deploy(ground, namespace, |exchange| declare(exchange, "first"));
            let gate = Gate::before_this(operator.clone(), &ground.session, &ground.images, &namespace.name);
            let mut killed = Self {
                ground,
                namespace,
                operator,
                trading,
                gate: gate.unwrap(),
            };
            killed.start_load();
            killed
        }

        /// Nobody idles: what a release waits for is then the operator, and what it does.
        fn start_load(&mut self) {
            let load = self.trading.exchange.start_clients(RATE, 1, 0);
            self.trading.load = Some(load.unwrap());
        }

        /// Another release, until it is live and nothing more is to be done. While it is under way, `meanwhile` is asked
        /// again and again.
        fn release_and_settle(&mut self, name: &str, mut meanwhile: impl FnMut(&Gate<'_>)) {
            let before = self.trading.revision("live");
            let declaration = declare(&self.trading.exchange, name);
            self.trading.exchange.release(&declaration).unwrap();
            let deadline = Instant::now() + PATIENCE;
            let settled = |object: &Value| {
                is_current(object)
                    && phase_of(object) == "Live"
                    && revision(object, "live") != before
                    && text(object, "/status/previous/state") == "Retained"
            };
            while !settled(self.trading.last()) {
                let status = &self.trading.last()["status"];
                assert!(Instant::now() < deadline, "{name}: {status:#}");
                self.trading.watch.next(Duration::from_millis(100)).unwrap();
                meanwhile(&self.gate);
            }
        }

        /// What each of the releases writes that nobody disturbs, what only some of them write, and how they end.
        fn undisturbed(&mut self) -> (Writes, BTreeSet<String>, Value) {
            // The second one has an older stack to remove, as all that follow; later ones also forget a contract, and of those
            // every write is wanted when every write is.
            let before = if every_write() { CONTRACTS_KEPT + 1 } else { 1 };
            for number in 0..before {
                self.release_and_settle(&format!("the one before, {number}"), |_| {});
            }
            let recorded = if every_write() { RECORDED } else { 1 };
            let mut recordings: Vec<Writes> = Vec::new();
            for number in 0..recorded {
                self.gate.record().unwrap();
                self.release_and_settle(&format!("undisturbed, {number}"), |_| {});
                let mut writes = Writes::new();
                for write in self.gate.seen().unwrap().writes {
                    *writes.entry(write.sort()).or_default() += 1;
                }
                say(format!("{} writes were recorded", writes.values().sum::<usize>()));
                recordings.push(writes);
            }
            let of_all = recordings
                .iter()
                .cloned()
                .reduce(|one, other| in_both(&one, &other));
            let of_all = of_all.unwrap();
            let only_some = recordings.iter().flat_map(|writes| beyond(writes, &of_all));
            let left_out = only_some.collect();
            (of_all, left_out, end_state(self.ground, &self.namespace.name))
        }

        /// A release with the operator killed at one of its writes, if that comes. It has to end as the undisturbed one did.
        fn release_and_kill(&mut self, kill: &Kill, undisturbed: &Value) -> Option<Reached> {
            let moment = kill.moment;
            let hold = Hold {
                number: kill.number,
                sort: Some(kill.sort.clone()),
                ..Hold::default()
            };
            self.gate.hold(&hold).unwrap();
            // One whose write does not come is released again: as another one.
            let generation = &self.trading.last()["metadata"]["generation"];
            let name = format!("{moment:?} {} after generation {generation}", kill.write());
            let mut killed = None;
            self.release_and_settle(&name, |gate| {
                if let Some(write) = gate.held().unwrap() {
                    say(format!("killed {moment:?} {}: {write}", kill.write()));
                    let at = gate.kill_leader(&write, moment).unwrap();
                    killed = Some((write, at));
                }
            });
            let end = || end_state(self.ground, &self.namespace.name);
            let waited = wait_until("the end of the undisturbed run", PATIENCE, || {
                end() == *undisturbed
            });
            let differences = || differences("", &end(), undisturbed).join("\n");
            assert!(
                waited.is_ok(),
                "{name} (WRITES='{}' does it again): it did not end as undisturbed:\n{}",
                kill.write(),
                differences()
            );
            self.operator.recovers(&self.ground.session).unwrap();
            let (write, at) = killed?;
            let unanswered = (moment == Moment::During).then(|| {
                let log = audit_log(self.ground.session.cluster.as_ref().unwrap(), at).unwrap();
                let object = (write.resource.as_str(), write.name.as_str());
                let answered = rights::answered(log.lines(), &self.operator.account(), object, at);
                answered.unwrap() > at
            });
            Some(Reached { unanswered })
        }

        /// Releases with kills of the plan, until there are enough.
        fn go_through(mut self, plan: &Mutex<Option<Plan>>) -> Figures {
            let (writes, left_out, undisturbed) = self.undisturbed();
            let of_all = || plan.lock().unwrap();
            of_all()
                .get_or_insert_with(|| Plan::of(&writes))
                .at_most(&writes, left_out);
            let (begun, mut releases) = (Instant::now(), 0_u32);
            loop {
                let next = of_all().as_mut().unwrap().next();
                let Some(kill) = next else { break };
                let reached = self.release_and_kill(&kill, &undisturbed);
                of_all().as_mut().unwrap().ended(kill, reached);
                releases += 1;
                if releases % AT_A_TIME == 0 {
                    self.trading.end_load();
                    self.start_load();
                }
            }
            let seconds = begun.elapsed().as_secs_f64() / f64::from(releases.max(1));
            self.namespace.note("seconds_for_each_kill", seconds.round());
            drop(self.gate);
            self.trading.end_load();
            self.trading.figures.add_watch(&self.trading.watch);
            self.trading.figures
        }
    }

    fn declare(exchange: &Exchange<'_>, name: &str) -> Value {
        with_setting(declaration(exchange, "1.0.0"), name)
    }

    /// Six writes of a release, each moment twice unless a write does not come in its release and the next one takes its place;
    /// SEED=… draws the same list again. With WRITES='update services exchange-user#0' that, with EVERY_WRITE=1
    /// (`make e2e-long`) all of them, at all moments.
    #[test]
    #[ignore = "needs a cluster: make e2e"]
    fn case_4_the_operator_is_killed() {
        if Session::from_environment().unwrap().own_nodes().is_none() {
            let left_out = [
                ("case".to_owned(), json!(4)),
                ("verdict".to_owned(), json!("left out")),
            ];
            return results::add_case("killed", left_out.into_iter().collect()).unwrap();
        }
        let ground = Ground::without_operator();
        let namespace = case(&ground, 4, "killed");
        let others: Vec<Namespace<'_>> = (2..=SIDE_BY_SIDE)
            .map(|number| Namespace::beside(&ground.session, &format!("killed-{number}")).unwrap())
            .collect();
        let plan = Mutex::new(None);
        let mut figures = Figures::default();
        thread::scope(|scope| {
            let all = std::iter::once(&namespace).chain(&others);
            let all: Vec<_> = all
                .map(|namespace| scope.spawn(|| Killed::begin(&ground, namespace).go_through(&plan)))
                .collect();
            for one in all {
                figures.add(one.join().unwrap());
            }
        });
        let plan = plan.into_inner().unwrap().unwrap();
        let kills = plan.reached;
        figures.note(&namespace);
        namespace.note("operators_killed", kills);
        let unanswered = plan.unanswered.iter().filter(|it| **it).count();
        namespace.note("killed_during_a_write", plan.unanswered.len());
        namespace.note("killed_before_the_api_server_had_answered", unanswered);
        namespace.note("exchanges_side_by_side", SIDE_BY_SIDE);
        // Of so few as are sampled all can have come to the same side of the answer.
        let both = 0 < unanswered && unanswered < plan.unanswered.len();
        assert!(
            !every_write() || both,
            "before the answer: {unanswered} of {}",
            plan.unanswered.len()
        );
        namespace.note("writes_of_a_release", plan.writes.values().sum::<usize>());
        say(format!("only some releases write: {:?}", plan.left_out));
        namespace.note("writes_of_some_releases", plan.left_out.len());
        let records = |write: &String| write.starts_with("update exchangedeployments/status ");
        assert!(
            plan.left_out.iter().all(records),
            "left out is more than that a status is recorded once more: {:?}",
            plan.left_out
        );
        assert_eq!(kills, plan.wanted, "not reached: {:?}", plan.waiting);
    }
}
