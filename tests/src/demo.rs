//! `make demo`: the main job, for everyone to see. A first version goes live, a second one takes over under load, a bad
//! one never gets traffic, and one that was regretted is rolled back.

use std::{
    env,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    exchange::{
        Exchange, Images, Load, NAME, PATIENCE, Watch, busybox_image, is_current, is_given_up, phase_of,
        text, token,
    },
    kubectl::Session,
    operator::{self, OPERATOR, OPERATOR_NAMESPACE},
    progress::say,
    results,
    tools::Tools,
};

/// On the namespace: whether the demonstration has installed the operator, or found it.
const BROUGHT_THE_OPERATOR: &str = "exchange.dev/brought-the-operator";
/// Where the demonstration's exchange is.
const NAMESPACE: &str = "exchange-demo";
/// Requests a second.
const RATE: u32 = 100;
/// How long each state is shown under load.
const SHOWN: Duration = Duration::from_secs(6);

/// Shows it all, and leaves it running.
///
/// # Errors
/// If anything goes another way than it should: a request that failed is such a way.
pub fn run(session: &Session) -> Result<()> {
    let images = Images::from_environment()?;
    heading("The operator and the stores are installed, with Helm");
    if session.cluster.is_none() {
        say(needed(&images));
    }
    // What an earlier demonstration has left is at version 2, and version 1 does not work on its contracted schema.
    remove(session)?;
    let installed_before = session
        .helm(&["status", OPERATOR, "--namespace", OPERATOR_NAMESPACE])
        .is_ok();
    session.apply(
        "default",
        &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            "annotations": {BROUGHT_THE_OPERATOR: (!installed_before).to_string()}}}),
    )?;
    operator::install(session, &images)?;
    let exchange = Exchange::install(session, NAMESPACE, &images)?;

    heading("kubectl apply: version 1.0.0, the first one. It goes through all gates, too");
    exchange.release(&exchange.declaration("1.0.0"))?;
    let mut stage = Stage {
        watch: exchange.watch()?,
        load: None,
        moves: Vec::new(),
    };
    stage.show_until("Live", "1.0.0")?;
    exchange.make_treasury()?;
    stage.load = Some(exchange.start_load(RATE)?);
    stage.show_traffic(SHOWN)?;

    heading("kubectl apply: version 2.0.0, with an expand migration before it and a contract after it");
    exchange.release(&exchange.declaration("2.0.0"))?;
    stage.show_until("Live", "2.0.0")?;
    stage.show_traffic(SHOWN)?;

    heading("kubectl apply: version 2.0.1, which fails its smoke test. It never gets traffic");
    exchange.release(&exchange.declaration("2.0.1-fails-smoke"))?;
    stage.show_until("Failed", "2.0.1-fails-smoke")?;
    let bad = stage.given_up();
    stage.show_traffic(SHOWN)?;

    heading("kubectl apply: version 2.0.0 with another setting, which is a release of its own …");
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
    heading(
        "… and is regretted. It is asked to go back, by the annotation that `kubectl exchange rollback` writes",
    );
    let leave = stage
        .watch
        .sightings()
        .last()
        .map(|(_, object)| token(object, "live"));
    exchange.ask("rollback", &leave.context("nothing is live")?)?;
    stage.show("the traffic is back", |object| {
        phase_of(object) == "Held" && live_of(object) == before
    })?;
    stage.show_traffic(SHOWN)?;

    heading("What came of it");
    let load = stage.load.take().context("no load")?;
    let (table, report) = load.end()?;
    say(&table);
    for (what, took) in &stage.moves {
        say(format!("{what}: traffic moved within {took} ms of the decision"));
    }
    let figures = json!({
        "requests": report.pointer("/summary/requests"),
        "requests_failed": report.pointer("/summary/failed"),
        "audit_findings": report.pointer("/audit/findings"),
        "moves": stage.moves.iter().map(|(what, took)| json!({"what": what, "milliseconds": took})).collect::<Vec<_>>(),
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
        !bad.is_empty() && !answered.keys().any(|stack| stack.ends_with(&bad)),
        "the version that failed its smoke test has answered: {answered:?}"
    );
    next_steps(session)
}

/// What a cluster that is not ours has to be able to pull.
fn needed(images: &Images) -> String {
    let Images { prefix, tag } = images;
    format!(
        "It pulls {prefix}/exchange:1.0.0, {prefix}/exchange:2.0.0, {prefix}/exchange:2.0.1-fails-smoke, \
         {prefix}/exchange-operator:{tag}, {} and what the stores' chart names (STORES_VALUES=… changes that).",
        busybox_image()
    )
}

/// Removes the exchange of a demonstration.
fn remove(session: &Session) -> Result<()> {
    let delete = ["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait"];
    session.kubectl(&delete).map(drop)
}

/// Removes everything that a demonstration has brought to a cluster that goes on.
///
/// # Errors
/// If the API server refuses it.
pub fn clean_up(session: &Session) -> Result<()> {
    let path = format!(
        "{{.metadata.annotations.{}}}",
        BROUGHT_THE_OPERATOR.replace('.', "\\.")
    );
    let brought = session.get("default", &format!("namespace/{NAMESPACE}"), &path);
    remove(session)?;
    if brought.is_ok_and(|brought| brought == "true") {
        let uninstall = ["uninstall", OPERATOR, "--ignore-not-found", "--wait"];
        session.helm(&[&uninstall[..], &["--namespace", OPERATOR_NAMESPACE]].concat())?;
    }
    say(format!(
        "Namespace {NAMESPACE} is gone, and the operator, if the demonstration had brought it. The API \
         (customresourcedefinition/exchangedeployments.exchange.dev) stays."
    ));
    Ok(())
}

fn next_steps(session: &Session) -> Result<()> {
    heading("To go on");
    let testbed = env::current_exe()?;
    let testbed_shown = testbed.display();
    if let Some(cluster) = &session.cluster {
        let tools = Tools::ensure()?;
        // The plugin is beside the binaries of the images.
        let profile = env::var("PROFILE").context("PROFILE is not set: `make demo` says it")?;
        let built = testbed.ancestors().nth(2).context("no target directory")?;
        let plugin = built.join(profile);
        let programs = format!("{}:{}", tools.dir().display(), plugin.display());
        say(cluster.exports(programs));
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
            "  {testbed_shown} --name {} exec -- curl http://{address}/products",
            cluster.name()
        ));
        say(format!("  make down NAME={}", cluster.name()));
    } else {
        say(format!(
            "  kubectl port-forward --namespace {NAMESPACE} service/{NAME}-trade 8080:80   # in another terminal"
        ));
        say("  curl http://localhost:8080/products");
        say(format!("  {testbed_shown} demo --clean-up"));
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

/// What is looked at while something happens.
struct Stage<'a> {
    watch: Watch,
    load: Option<Load<'a>>,
    /// What moved the traffic, and how long that took in milliseconds, as status said it.
    moves: Vec<(String, u128)>,
}

impl Stage<'_> {
    fn live(&self) -> (String, String) {
        self.watch
            .sightings()
            .last()
            .map(|(_, object)| live_of(object))
            .unwrap_or_default()
    }

    /// The revision of the version that was given up.
    fn given_up(&self) -> String {
        let last = self.watch.sightings().last();
        last.map(|(_, object)| text(object, "/status/rejected/revision").to_owned())
            .unwrap_or_default()
    }

    fn show_until(&mut self, phase: &str, version: &str) -> Result<()> {
        self.show(&format!("{version} is {phase}"), |object| {
            is_current(object) && phase_of(object) == phase && text(object, "/spec/version") == version
        })
    }

    /// Shows each phase with its time, and the traffic, until the object is like this.
    fn show(&mut self, what: &str, holds: impl Fn(&Value) -> bool) -> Result<()> {
        let begun = Instant::now();
        let mut shown = (String::new(), Instant::now());
        let mut told = Instant::now();
        loop {
            let sighting = self.watch.next(Duration::from_millis(200))?.cloned();
            if let Some((at, object)) = sighting {
                let phase = phase_of(&object).to_owned();
                if phase != shown.0 && is_current(&object) {
                    if matches!(shown.0.as_str(), "Promoting" | "RollingBack") {
                        let took = at.duration_since(shown.1).as_millis();
                        self.moves
                            .push((format!("{} of {}", shown.0, text(&object, "/spec/version")), took));
                    }
                    say(format!(
                        "  {:>5.1} s  \x1b[36m{phase:<12}\x1b[0m {}",
                        begun.elapsed().as_secs_f64(),
                        message(&object)
                    ));
                    shown = (phase, at);
                }
                if holds(&object) {
                    return Ok(());
                }
            }
            if told.elapsed() >= Duration::from_secs(2) {
                told = Instant::now();
                self.tell_traffic();
            }
            let given_up = self.watch.sightings().last().is_some_and(|(_, object)| {
                is_current(object) && is_given_up(object) && begun.elapsed() > SHOWN
            });
            ensure!(
                begun.elapsed() < PATIENCE && !given_up,
                "waited in vain until {what}: {}",
                self.watch
                    .sightings()
                    .last()
                    .map_or_else(String::new, |(_, object)| message(object))
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
