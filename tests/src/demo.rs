//! `make demo`: the main job, for everyone to see. A first version goes live, a second one takes over under load, a bad
//! one never gets traffic, and one that was regretted is rolled back.

use std::{
    env,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    exchange::{
        Exchange, Images, LOAD, Load, NAME, PATIENCE, Watch, is_current, is_given_up, phase_of, text, token,
    },
    kubectl::{Session, plugin_directory},
    operator::{Found, INSTALLED_BY, Operator, signature},
    progress::{Step, say},
    results,
    tools::Tools,
};

/// How the demonstration signs its namespace, and the operator if it has installed that.
const INSTALLER: &str = "demo";
/// Where the demonstration's exchange is.
const NAMESPACE: &str = "exchange-demo";
/// Requests a second.
const RATE: u32 = 100;
/// How long each state is shown under load.
const SHOWN: Duration = Duration::from_secs(6);
/// Parts of what `make demo` does. The first two, the cluster and its images, are in the Makefile.
const PARTS: usize = 8;

/// Shows it all, and leaves it running.
///
/// # Errors
/// If anything goes another way than it should: a request that failed is such a way.
pub fn run(session: &Session) -> Result<()> {
    let images = Images::from_environment()?;
    let exchange = part(3, "The operator and the stores, with Helm", || {
        if session.cluster.is_none() {
            say(needed(&images));
        }
        // What an earlier demonstration has left is at version 2, and version 1 does not work on its contracted schema.
        step("an earlier demonstration is removed", || remove(session))?;
        have_an_operator(session, &images)?;
        session.apply(
            "default",
            &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
                "name": NAMESPACE,
                "annotations": {INSTALLED_BY: INSTALLER},
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}),
        )?;
        step("stores: PostgreSQL, NATS, Redis", || {
            Exchange::install(session, NAMESPACE, &images)
        })
    })?;

    let mut stage = part(
        4,
        "kubectl apply: version 1.0.0, the first one. It goes through all gates, too",
        || {
            exchange.release(&exchange.declaration("1.0.0"))?;
            let mut stage = Stage {
                watch: exchange.watch()?,
                load: None,
                moves: Vec::new(),
            };
            stage.show_until("Live", "1.0.0")?;
            step("a treasury, for the clients' first money", || {
                exchange.make_treasury()
            })?;
            let load = step("clients: registered and trading", || exchange.start_load(RATE))?;
            stage.load = Some(load);
            stage.show_traffic(SHOWN)?;
            Ok(stage)
        },
    )?;
    part(
        5,
        "kubectl apply: version 2.0.0, with an expand migration before it and a contract after it",
        || {
            exchange.release(&exchange.declaration("2.0.0"))?;
            stage.show_until("Live", "2.0.0")?;
            stage.show_traffic(SHOWN)
        },
    )?;
    let bad = part(
        6,
        "kubectl apply: version 2.0.1, which fails its smoke test. It never gets traffic",
        || {
            exchange.release(&exchange.declaration("2.0.1-fails-smoke"))?;
            stage.show_until("Failed", "2.0.1-fails-smoke")?;
            let bad = stage.given_up_by_a_test()?;
            ensure!(
                stage.is_contracted(),
                "the contract of 2.0.0 has not been made, though another version was on its way after it"
            );
            say("  Before it, version 1.0.0 has gone and the contract migration of 2.0.0 has been made.");
            stage.show_traffic(SHOWN)?;
            Ok(bad)
        },
    )?;
    part(
        7,
        "kubectl apply: version 2.0.0 with another setting, which is a release of its own, and is regretted",
        || regret(&exchange, &mut stage),
    )?;
    part(8, "What came of it", || tell_the_end(stage, &bad))?;
    next_steps(session)
}

/// A release, and the way back from it.
fn regret(exchange: &Exchange<'_>, stage: &mut Stage<'_>) -> Result<()> {
    let mut regretted = exchange.declaration("2.0.0");
    if let Some(trade) = regretted
        .pointer_mut("/spec/services/trade")
        .and_then(Value::as_object_mut)
    {
        trade.insert(
            "env".to_owned(),
            json!([{"name": "RUST_LOG", "value": "info,exchange=debug"}]),
        );
    }
    let before = stage.live();
    exchange.release(&regretted)?;
    stage.show("the setting is live", |object| {
        is_current(object) && phase_of(object) == "Live" && live_of(object) != before
    })?;
    say("  It is asked to go back, by the annotation that `kubectl exchange rollback` writes.");
    let leave = stage.watch.last().map(|object| token(object, "live"));
    exchange.ask("rollback", &leave.context("nothing is live")?)?;
    stage.show("the traffic is back", |object| {
        phase_of(object) == "Held" && live_of(object) == before
    })?;
    stage.show_traffic(SHOWN)
}

/// Ends the clients and sums up: nothing has failed, and the version that `bad` is the revision of has never answered.
fn tell_the_end(mut stage: Stage<'_>, bad: &str) -> Result<()> {
    let load = stage.load.take().context("no load")?;
    let (table, report) = step("the clients end, and audit what they have seen", || load.end())?;
    say(&table);
    let live = named(&stage.live());
    for moved in &stage.moves {
        say(moved.told(&report, &live));
    }
    let figures = json!({
        "requests": report.pointer("/summary/requests"),
        "requests_failed": report.pointer("/summary/failed"),
        "audit_findings": report.pointer("/audit/findings"),
        "moves": stage.moves.iter().map(|moved| moved.figures(&report, &live)).collect::<Vec<_>>(),
    });
    let path = results::write("demo", &figures)?;
    ensure!(
        report.get("ok") == Some(&Value::Bool(true)),
        "not everything went well: see above, and {}",
        path.display()
    );
    let answered = report.pointer("/summary/stacks").and_then(Value::as_object);
    let answered = answered.context("the load's report does not say who has answered")?;
    ensure!(
        !bad.is_empty() && !answered.keys().any(|stack| stack.ends_with(bad)),
        "the version that failed its smoke test has answered: {answered:?}"
    );
    Ok(())
}

/// A part of the demonstration: its number, what it is about, and how long it took.
fn part<T>(number: usize, title: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    heading(&format!("[{number}/{PARTS}] {title}"));
    let begun = Instant::now();
    let done = act()?;
    let took = begun.elapsed().as_secs_f64();
    say(format!("  ✓ [{number}/{PARTS}] took {took:.1} s"));
    Ok(done)
}

/// Something of a part that takes a while, and shows nothing of itself.
fn step<T>(title: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let step = Step::start(title);
    let done = act()?;
    step.done();
    Ok(done)
}

/// Uses the operator that looks after the demonstration's namespace, or installs one.
fn have_an_operator(session: &Session, images: &Images) -> Result<()> {
    match operator_for_all(&Found::on(session)?)? {
        Some(found) => {
            let Found { namespace, name, .. } = found;
            step(
                &format!("operator {name} of namespace {namespace}, which is there: it is used as it is"),
                || found.is_ready(session),
            )
        }
        None => step("operator", || {
            Operator::of_all().install_as(INSTALLER, session, images)
        }),
    }
}

/// Of the operators of a cluster the one to use as it is. There is none if the demonstration has to install its own, or to
/// bring its own up to date.
fn operator_for_all(found: &[Found]) -> Result<Option<&Found>> {
    let others = || found.iter().filter(|it| it.installed_by != INSTALLER);
    let looks_after = |it: &&Found| it.only.as_deref().is_none_or(|only| only == NAMESPACE);
    if let Some(found) = others().find(looks_after) {
        return Ok(Some(found));
    }
    if let Some(Found {
        namespace,
        name,
        only,
        ..
    }) = others().next()
    {
        bail!(
            "operator {name} of namespace {namespace} looks after namespace {} alone; the demonstration would install one \
             for all namespaces, and both would do the same work: use another cluster, or one with an operator for all",
            only.as_deref().unwrap_or_default()
        );
    }
    Ok(None)
}

/// What a cluster that is not ours has to be able to pull.
fn needed(images: &Images) -> String {
    let Images { prefix, tag } = images;
    format!(
        "It pulls {prefix}/exchange:1.0.0, {prefix}/exchange:2.0.0, {prefix}/exchange:2.0.1-fails-smoke, \
         {prefix}/exchange-operator:{tag} unless it has an operator (AGENT_IMAGE={prefix}/testbed-agent:{tag} says so: \
         another prefix and tag are taken from it) and what the stores' chart names (STORES_VALUES=… changes that). Where \
         that needs a password, PULL_SECRET=… names a Secret of the kubeconfig's namespace."
    )
}

/// Removes the exchange of a demonstration. On a cluster that is not ours, a namespace that somebody else has called like that
/// is left alone.
fn remove(session: &Session) -> Result<()> {
    let found = [
        "get",
        "namespace",
        NAMESPACE,
        "--ignore-not-found",
        "--output=json",
    ];
    let found = session.kubectl(&found)?;
    ensure!(
        session.cluster.is_some() || found.is_empty() || is_signed(&serde_json::from_str(&found)?),
        "namespace {NAMESPACE} was not made by the demonstration ({INSTALLED_BY}: {INSTALLER} is missing), so it is left \
         alone: remove it, or use another cluster"
    );
    // Told to end it would audit first, while everything that it asks goes away.
    let now = ["--grace-period=0", "--force", "--ignore-not-found"];
    let load = ["delete", "pod", LOAD, "--namespace", NAMESPACE];
    session.kubectl(&[&load[..], &now[..]].concat())?;
    let delete = ["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"];
    session.kubectl(&delete).map(drop)
}

/// Whether the demonstration has made a namespace.
fn is_signed(namespace: &Value) -> bool {
    signature(namespace, "/metadata") == INSTALLER
}

/// Removes everything that a demonstration has brought to a cluster that goes on.
///
/// # Errors
/// If the API server refuses it.
pub fn clean_up(session: &Session) -> Result<()> {
    step(&format!("namespace {NAMESPACE} is removed"), || remove(session))?;
    let exchanges = ["get", "exchangedeployments", "--all-namespaces", "--output=name"];
    let exchanges = match session.kubectl(&exchanges) {
        Ok(exchanges) => exchanges.lines().count(),
        // Where there is no such API, nobody has any.
        Err(error) if error.to_string().contains("doesn't have a resource type") => 0,
        Err(error) => return Err(error),
    };
    let told = match fate_of_the_operator(&Found::on(session)?, exchanges) {
        Fate::Goes => {
            step(
                "the operator is uninstalled, which the demonstration had installed",
                || Operator::of_all().uninstall(session),
            )?;
            "The API (customresourcedefinition/exchangedeployments.exchange.dev) and the operator's empty namespace stay."
                .to_owned()
        }
        Fate::IsNeeded => format!(
            "The operator stays, which the demonstration had installed: {exchanges} other ExchangeDeployments need it."
        ),
        Fate::IsSomebodys => "The operator stays, which the demonstration had not installed.".to_owned(),
        Fate::IsNone => "There is no operator.".to_owned(),
    };
    say(told);
    if let Some(cluster) = &session.cluster {
        let name = cluster.name();
        say(format!(
            "Cluster {name:?} goes on, as it did before; `make down NAME={name}` ends it."
        ));
    }
    Ok(())
}

/// What becomes of the operator after a demonstration.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// The demonstration has installed it, and nobody needs it.
    Goes,
    /// The demonstration has installed it, and others have come to need it.
    IsNeeded,
    /// Somebody else has installed it, or has made it their own since.
    IsSomebodys,
    /// There is none.
    IsNone,
}

/// With so many ExchangeDeployments of others.
fn fate_of_the_operator(found: &[Found], exchanges: usize) -> Fate {
    if found.iter().any(|it| it.installed_by == INSTALLER) {
        return if exchanges == 0 {
            Fate::Goes
        } else {
            Fate::IsNeeded
        };
    }
    if found.is_empty() {
        Fate::IsNone
    } else {
        Fate::IsSomebodys
    }
}

fn next_steps(session: &Session) -> Result<()> {
    heading("To go on");
    let testbed = env::current_exe()?;
    let testbed = testbed.display();
    let plugin = plugin_directory()?;
    let plugin = plugin.display();
    if let Some(cluster) = &session.cluster {
        let tools = Tools::ensure()?;
        say(cluster.exports(format!("{}:{plugin}", tools.dir().display())));
    } else {
        let kubeconfig = env::var("KUBECONFIG").unwrap_or_default();
        say(format!(
            "  export CLUSTER=existing KUBECONFIG={kubeconfig}\n  export PATH=\"{plugin}:$PATH\""
        ));
    }
    say(format!(
        "  kubectl get exchangedeployments --namespace {NAMESPACE}"
    ));
    say(format!("  kubectl exchange status --namespace {NAMESPACE}"));
    say("  kubectl explain exchangedeployments.spec");
    if let Some(cluster) = &session.cluster {
        let service = format!("service/{NAME}-trade");
        let address = session.get(NAMESPACE, &service, "{.spec.clusterIP}")?;
        say(format!(
            "  {testbed} --name {} exec -- curl http://{address}/products",
            cluster.name()
        ));
        say(format!("  make down NAME={}", cluster.name()));
    } else {
        say(format!(
            "  kubectl port-forward --namespace {NAMESPACE} service/{NAME}-trade 8080:80   # in another terminal"
        ));
        say("  curl http://localhost:8080/products");
        say(format!("  {testbed} demo --clean-up"));
    }
    Ok(())
}

fn heading(text: &str) {
    say(format!("\n\x1b[1m▶ {text}\x1b[0m"));
}

fn live_of(object: &Value) -> (String, String) {
    let field = |name: &str| text(object, &format!("/status/live/{name}")).to_owned();
    (field("colour"), field("revision"))
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A stack as it names itself in its answers.
fn named((colour, revision): &(String, String)) -> String {
    format!("{colour}-{revision}")
}

/// What is looked at while something happens.
struct Stage<'a> {
    watch: Watch,
    load: Option<Load<'a>>,
    moves: Vec<Move>,
}

/// A move of the traffic, as status has told it.
struct Move {
    /// The phase that it was, and the version that came or was left.
    what: String,
    /// When it was decided, in milliseconds since 1970.
    decided: u64,
    /// From then until the phase was over.
    took: u64,
    /// The stack that was left, as it names itself in its answers.
    left: String,
}

impl Move {
    /// From the decision to the last answer of the stack that was left: connections that were open end at their own pace. Not
    /// of the one that is live at the end: it answers again.
    fn last_answer(&self, report: &Value, live: &str) -> Option<u64> {
        if self.left == live {
            return None;
        }
        let number = |pointer: &str| report.pointer(pointer).and_then(Value::as_u64);
        let last = number("/started_unix_ms")? + number(&format!("/summary/stacks/{}/last_ms", self.left))?;
        Some(last.saturating_sub(self.decided))
    }

    fn told(&self, report: &Value, live: &str) -> String {
        let last = self.last_answer(report, live);
        let last = last.map_or_else(String::new, |last| {
            format!("; the last answer of {} came after {last} ms", self.left)
        });
        format!("{}: took {} ms{last}", self.what, self.took)
    }

    fn figures(&self, report: &Value, live: &str) -> Value {
        json!({
            "what": self.what,
            "phase_milliseconds": self.took,
            "last_answer_of_the_stack_that_was_left_after_milliseconds": self.last_answer(report, live),
        })
    }
}

impl Stage<'_> {
    fn live(&self) -> (String, String) {
        self.watch.last().map(live_of).unwrap_or_default()
    }

    /// The revision of the version that was given up. An image that cannot be pulled ends in the same phase, and has proven nothing.
    fn given_up_by_a_test(&self) -> Result<String> {
        let object = self.watch.last().context("nothing has been seen")?;
        let reason = text(object, "/status/rejected/reason");
        ensure!(
            reason == "SmokeTestFailed",
            "it has got no traffic, but not because its smoke test has failed: {reason}, {}",
            message(object)
        );
        Ok(text(object, "/status/rejected/revision").to_owned())
    }

    fn is_contracted(&self) -> bool {
        let last = self.watch.last();
        last.and_then(|object| object.pointer("/status/live/contracted")) == Some(&Value::Bool(true))
    }

    fn show_until(&mut self, phase: &str, version: &str) -> Result<()> {
        self.show(&format!("{version} is {phase}"), |object| {
            is_current(object) && phase_of(object) == phase && text(object, "/spec/version") == version
        })
    }

    /// Shows each phase with its time and whatever is told within it, and the traffic, until the object is like this.
    fn show(&mut self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
        let begun = Instant::now();
        let (mut shown, mut said) = (String::new(), String::new());
        let mut told = Instant::now();
        let (mut live, mut decided) = (self.live(), (String::new(), begun, SystemTime::now()));
        loop {
            let sighting = self.watch.next(Duration::from_millis(200))?.cloned();
            if let Some((at, object)) = sighting {
                let phase = phase_of(&object).to_owned();
                if phase != shown && is_current(&object) {
                    // A first version takes the traffic from nobody.
                    if matches!(shown.as_str(), "Promoting" | "RollingBack") && !live.1.is_empty() {
                        let (left, since, decided) = &decided;
                        self.moves.push(Move {
                            what: format!("{shown} of {}", text(&object, "/spec/version")),
                            decided: milliseconds(decided.duration_since(UNIX_EPOCH)?),
                            took: milliseconds(at.duration_since(*since)),
                            left: left.clone(),
                        });
                    }
                    // By then status may call the stack live that the traffic goes to.
                    let left = std::mem::replace(&mut live, live_of(&object));
                    decided = (named(&left), at, SystemTime::now());
                    shown.clone_from(&phase);
                    said.clear();
                }
                let news = message(&object);
                if is_current(&object) && news != said {
                    say(format!(
                        "  {:>5.1} s  \x1b[36m{phase:<12}\x1b[0m {news}",
                        begun.elapsed().as_secs_f64()
                    ));
                    said = news;
                }
                if holds(&object) {
                    return Ok(());
                }
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                self.tell_traffic();
            }
            let given_up = self
                .watch
                .last()
                .is_some_and(|object| is_current(object) && is_given_up(object) && begun.elapsed() > SHOWN);
            ensure!(
                begun.elapsed() < PATIENCE && !given_up,
                "waited in vain until {what}: {}",
                self.watch.last().map_or_else(String::new, message)
            );
        }
    }

    /// Shows the traffic for a while.
    fn show_traffic(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.watch.next(Duration::from_secs(1))?;
            self.tell_traffic();
        }
        Ok(())
    }

    fn tell_traffic(&self) {
        let Some(load) = &self.load else { return };
        let progress = load.progress();
        let all: u64 = progress.answers.values().sum::<u64>().max(1);
        let share = |count: &u64| count * 100 / all;
        let shares: Vec<String> = progress
            .answers
            .iter()
            .map(|(stack, count)| {
                let colour = if stack.starts_with("blue") {
                    "\x1b[34m"
                } else {
                    "\x1b[32m"
                };
                let bar = "█".repeat(usize::try_from(share(count) / 5).unwrap_or_default());
                format!("{colour}{stack} {bar}\x1b[0m {} %", share(count))
            })
            .collect();
        say(format!(
            "           {:>7} requests, {} failed   {}",
            progress.requests,
            progress.failed,
            shares.join("  ")
        ));
    }
}

/// What the object says about itself: why it is stalled, else what it is doing.
fn message(object: &Value) -> String {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let says = |kind: &str| {
        let condition = conditions?
            .iter()
            .find(|condition| text(condition, "/type") == kind)?;
        Some(text(condition, "/message").to_owned())
    };
    says("Ready").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operator(only: Option<&str>, installed_by: &str) -> Found {
        Found {
            namespace: "platform".to_owned(),
            name: "exchange-operator".to_owned(),
            only: only.map(str::to_owned),
            installed_by: installed_by.to_owned(),
        }
    }

    #[test]
    fn an_operator_that_is_there_is_used_and_one_is_installed_if_there_is_none() {
        let is_used = |found: &[Found]| operator_for_all(found).unwrap().is_some();
        assert!(!is_used(&[]));
        assert!(is_used(&[operator(None, "")]));
        assert!(is_used(&[operator(None, "tests")]));
        assert!(is_used(&[
            operator(Some("prod"), ""),
            operator(Some(NAMESPACE), "")
        ]));
        // Its own is brought up to date.
        assert!(!is_used(&[operator(None, INSTALLER)]));
        assert!(is_used(&[operator(None, INSTALLER), operator(None, "")]));
        // One for all would work beside it.
        let refused = operator_for_all(&[operator(Some("prod"), "")]).unwrap_err();
        assert!(refused.to_string().contains("namespace prod alone"), "{refused}");
    }

    #[test]
    fn only_a_namespace_that_the_demonstration_has_made_is_its_own() {
        let namespace =
            |annotations: Value| json!({"metadata": {"name": NAMESPACE, "annotations": annotations}});
        assert!(is_signed(&namespace(
            json!({"exchange.dev/installed-by": "demo"})
        )));
        assert!(!is_signed(&namespace(
            json!({"exchange.dev/installed-by": "tests"})
        )));
        assert!(!is_signed(&namespace(json!({}))));
        assert!(!is_signed(&namespace(Value::Null)));
    }

    #[test]
    fn only_an_operator_that_the_demonstration_has_installed_and_nobody_needs_is_removed() {
        let mine = operator(None, INSTALLER);
        let theirs = operator(None, "");
        for (found, exchanges, fate) in [
            (vec![], 0, Fate::IsNone),
            (vec![mine.clone()], 0, Fate::Goes),
            (vec![mine], 1, Fate::IsNeeded),
            (vec![theirs.clone()], 0, Fate::IsSomebodys),
            (vec![theirs], 1, Fate::IsSomebodys),
            (vec![operator(None, "tests")], 0, Fate::IsSomebodys),
        ] {
            assert_eq!(fate_of_the_operator(&found, exchanges), fate, "{found:?}");
        }
    }
}
