//! Stories of releases on a cluster: one exchange that is live, what is declared next, what is seen of it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a story that does not go on as told fails its test"
)]

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::{Value, json};

use crate::{
    exchange::{Exchange, Images, Load, NAME, PATIENCE, Watch, is_current, phase_of, text},
    kubectl::{Namespace, Session},
    operator::{self, Operator},
};

/// Requests a second: enough to notice whatever is cut off.
const RATE: u32 = 20;
/// The services, as they are called in the API.
pub const SERVICES: [&str; 3] = ["user", "trade", "notification"];

/// Who disturbs the operator, or measures, is alone: it is the operator of all.
static CLUSTER: RwLock<()> = RwLock::new(());
/// Helm refuses two at once.
static INSTALLATION: Mutex<()> = Mutex::new(());

#[derive(Debug)]
enum Turn {
    Beside { _others: RwLockReadGuard<'static, ()> },
    Alone { _others: RwLockWriteGuard<'static, ()> },
}

/// The cluster with the operator on it.
#[derive(Debug)]
pub struct Ground {
    /// The way to the cluster.
    pub session: Session,
    /// What is deployed.
    pub images: Images,
    _turn: Turn,
}

impl Ground {
    /// Beside other stories.
    pub fn shared() -> Self {
        let others = CLUSTER.read().unwrap_or_else(PoisonError::into_inner);
        Self::of(Turn::Beside { _others: others })
    }

    /// While no other story goes on.
    pub fn alone() -> Self {
        let others = CLUSTER.write().unwrap_or_else(PoisonError::into_inner);
        Self::of(Turn::Alone { _others: others })
    }

    /// While no other story goes on, and without the operator of all namespaces: for several operators that each look after
    /// one.
    pub fn without_operator() -> Self {
        // What it has brought for the whole cluster stays.
        let ground = Self::alone();
        Operator::of_all().uninstall(&ground.session).unwrap();
        ground
    }

    fn of(turn: Turn) -> Self {
        let ground = Self {
            session: Session::from_environment().unwrap(),
            images: Images::from_environment().unwrap(),
            _turn: turn,
        };
        let _one_at_a_time = ground.installation();
        operator::install(&ground.session, &ground.images).unwrap();
        ground
    }

    /// For whoever installs the operator.
    pub fn installation(&self) -> MutexGuard<'static, ()> {
        INSTALLATION.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exchange that is live with this declaration.
    pub fn live<'a>(&'a self, namespace: &'a Namespace<'_>, declare: impl Fn(&mut Value)) -> Story<'a> {
        let exchange = Exchange::install(&self.session, &namespace.name, &self.images).unwrap();
        let mut declaration = exchange.declaration("1.0.0");
        declare(&mut declaration);
        exchange.release(&declaration).unwrap();
        let watch = exchange.watch().unwrap();
        let mut story = Story {
            session: &self.session,
            namespace: &namespace.name,
            exchange,
            watch,
            declaration,
            generation: 1,
        };
        story.watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
        story
    }
}

/// An exchange, and what is declared of it.
#[derive(Debug)]
pub struct Story<'a> {
    /// The way to the cluster.
    pub session: &'a Session,
    /// Where it is.
    pub namespace: &'a str,
    /// Itself.
    pub exchange: Exchange<'a>,
    /// What is seen of it.
    pub watch: Watch,
    /// What was declared last.
    pub declaration: Value,
    generation: i64,
}

impl<'a> Story<'a> {
    /// The object as it was last seen.
    pub fn last(&self) -> &Value {
        &self.watch.sightings().last().unwrap().1
    }

    /// The revision of `live`, `candidate` or `previous`; empty if there is none.
    pub fn revision(&self, stack: &str) -> String {
        text(self.last(), &format!("/status/{stack}/revision")).to_owned()
    }

    /// Changes the spec, and applies it.
    pub fn declare(&mut self, change: impl Fn(&mut Value)) {
        change(&mut self.declaration["spec"]);
        self.exchange.release(&self.declaration).unwrap();
        let generation = self
            .session
            .get(self.namespace, "exd/exchange", "{.metadata.generation}");
        self.generation = generation.unwrap().parse().unwrap();
    }

    /// Waits until the operator has come to this phase with what is declared now: what was seen before does not count.
    pub fn reaches(&mut self, phase: &str) {
        let wanted = self.generation;
        self.watch
            .until(phase, PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == phase
                    && object["metadata"]["generation"].as_i64() >= Some(wanted)
            })
            .unwrap();
    }

    /// A release that ends where it should, and the traffic with it.
    pub fn goes_live(&mut self) {
        let before = self.revision("live");
        self.goes_live_after(&before);
    }

    /// The same for one that may have the traffic already, instead of this revision.
    pub fn goes_live_after(&mut self, before: &str) {
        self.watch
            .until("the release to be live", PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == "Live"
                    && text(object, "/status/live/revision") != before
            })
            .unwrap();
        self.all_point_at(&self.revision("live"));
    }

    /// Starts clients.
    pub fn trade(&self) -> Load<'a> {
        self.exchange.make_treasury().unwrap();
        self.exchange.start_load(RATE).unwrap()
    }

    /// Where a live Service points to.
    pub fn selector(&self, service: &str) -> Value {
        let name = format!("service/{NAME}-{service}");
        let selector = self
            .session
            .get(self.namespace, &name, "{.spec.selector}")
            .unwrap();
        serde_json::from_str(&selector).unwrap()
    }

    /// Asserts that the whole traffic goes to one stack.
    pub fn all_point_at(&self, revision: &str) {
        for service in SERVICES {
            let selector = self.selector(service);
            assert_eq!(
                selector["exchange.dev/revision"], revision,
                "{service}: {selector}"
            );
        }
    }

    /// A condition as it was last seen.
    pub fn condition(&self, kind: &str) -> Value {
        let conditions = self.last()["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|it| it["type"] == kind).unwrap().clone()
    }

    /// Runs `kubectl` in its namespace.
    pub fn kubectl(&self, args: &[&str]) -> String {
        let args: Vec<&str> = args
            .iter()
            .chain(&["--namespace", self.namespace])
            .copied()
            .collect();
        self.session.kubectl(&args).unwrap()
    }

    /// The phases since a sighting, each once.
    pub fn phases_since(&self, sighting: usize) -> Vec<String> {
        let phases = self.watch.sightings()[sighting..].iter();
        let mut phases: Vec<_> = phases.map(|(_, object)| phase_of(object).to_owned()).collect();
        phases.dedup();
        phases
    }

    /// Outcome, reason and author of the last entry of the history.
    pub fn last_outcome(&self) -> (String, String, String) {
        let entry = &self.last()["status"]["history"][0];
        let field = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        (field("outcome"), field("reason"), field("by"))
    }
}

/// Ends the load: nothing may have failed. Returns the stacks that have answered.
pub fn end_well(load: Load<'_>) -> Vec<String> {
    let (table, report) = load.end().unwrap();
    assert_eq!(report["summary"]["failed"], 0, "{table}");
    assert_eq!(report["closed_without_notice"], 0, "{table}");
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    assert!(report["summary"]["requests"].as_u64().unwrap() > 100, "{table}");
    report["summary"]["stacks"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect()
}

/// A release without another version: one more variable.
pub fn note(spec: &mut Value, value: &str) {
    spec["services"]["trade"]["env"] = json!([{"name": "RELEASE_NOTE", "value": value}]);
}
