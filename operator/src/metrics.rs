//! Metrics in the OpenMetrics text format.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    error::Class,
    plan::Intent,
    report::{NO_CANDIDATE, NOT_STARTED, NOTHING_LIVE},
    status::Phase,
};

/// The conditions of objects that are told.
const TOLD: [&str; 4] = ["Ready", "Available", "Stalled", "SchemaReady"];

/// The metrics of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    reconciles: Histogram,
    errors: Family<ErrorLabels, Counter>,
    writes: Family<WriteLabels, Counter>,
    phases: Family<PhaseLabels, Histogram>,
    swaps: Family<SwapLabels, Histogram>,
    watch_ages: Family<WatchLabels, Gauge>,
    watch_errors: Family<WatchLabels, Counter>,
    leader: Gauge,
    conditions: Family<ConditionLabels, Gauge>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ErrorLabels {
    class: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WriteLabels {
    verb: &'static str,
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PhaseLabels {
    phase: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SwapLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WatchLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ConditionLabels {
    namespace: String,
    name: String,
    condition: &'static str,
}

impl Metrics {
    /// Metrics of a new process.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("exchange_operator");
        let reconciles = passes();
        let (errors, writes) = (Family::default(), Family::default());
        let phases = Family::new_with_constructor(minutes as fn() -> Histogram);
        let swaps = Family::new_with_constructor(passes as fn() -> Histogram);
        let (watch_ages, watch_errors, leader) = (Family::default(), Family::default(), Gauge::default());
        registry.register("reconcile_duration_seconds", "Time of a pass", reconciles.clone());
        registry.register(
            "reconcile_errors",
            "Passes that ended before their end, by what that means",
            errors.clone(),
        );
        registry.register(
            "writes",
            "Writes to the API server, tried ones included",
            writes.clone(),
        );
        registry.register(
            "phase_duration_seconds",
            "Time in a phase, when it ends",
            phases.clone(),
        );
        registry.register(
            "swap_duration_seconds",
            "From the record of a move to the last live Service written; in who takes it over, from there",
            swaps.clone(),
        );
        registry.register(
            "watch_age_seconds",
            "Time since a watch was heard of last",
            watch_ages.clone(),
        );
        registry.register("watch_errors", "Errors of watches", watch_errors.clone());
        registry.register("leader", "1 in the operator that works", leader.clone());
        let conditions = Family::default();
        registry.register(
            "condition",
            "1 while a condition of an ExchangeDeployment is true, 0 while it is not; of the operator that works",
            conditions.clone(),
        );
        Self {
            registry: Arc::new(Mutex::new(registry)),
            reconciles,
            errors,
            writes,
            phases,
            swaps,
            watch_ages,
            watch_errors,
            leader,
            conditions,
        }
    }

    /// Everything, as a scraper reads it.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut page = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        text::encode(&mut page, &registry)?;
        Ok(page)
    }

    /// A pass has ended.
    pub fn reconciled(&self, took: Duration, failure: Option<Class>) {
        self.reconciles.observe(took.as_secs_f64());
        if let Some(class) = failure {
            let class = class.as_str();
            self.errors.get_or_create(&ErrorLabels { class }).inc();
        }
    }

    /// A write is sent.
    pub fn write(&self, verb: &'static str, kind: &str) {
        let kind = kind.to_owned();
        self.writes.get_or_create(&WriteLabels { verb, kind }).inc();
    }

    /// A phase has ended.
    pub fn phase_ended(&self, phase: Phase, took: Duration) {
        let phase = phase.to_string();
        self.phases
            .get_or_create(&PhaseLabels { phase })
            .observe(took.as_secs_f64());
    }

    /// All live Services have been written.
    pub fn swapped(&self, intent: Intent, took: Duration) {
        let direction = match intent {
            Intent::Promote => "forward",
            Intent::RollBack => "back",
            Intent::Repair => return,
        };
        self.swaps
            .get_or_create(&SwapLabels { direction })
            .observe(took.as_secs_f64());
    }

    /// How long nothing has been heard of each watch that there is.
    pub fn watch_ages(&self, ages: &[(&'static str, Duration)]) {
        self.watch_ages.clear();
        for &(kind, age) in ages {
            let seconds = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
            self.watch_ages.get_or_create(&WatchLabels { kind }).set(seconds);
        }
    }

    /// A watch has failed and is begun anew.
    pub fn watch_failed(&self, kind: &'static str) {
        self.watch_errors.get_or_create(&WatchLabels { kind }).inc();
    }

    /// Whether this process works. Who does not any more knows of no object.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
        if !leads {
            self.conditions.clear();
        }
    }

    /// What an object's conditions say, of those that somebody may want to be woken for. Nobody is, while nothing is live
    /// that could be unavailable, nor for a migration whose turn has not come.
    pub fn conditions(&self, namespace: &str, name: &str, conditions: &[Condition]) {
        for Condition {
            type_,
            status,
            reason,
            ..
        } in conditions
        {
            if let Some(condition) = TOLD.into_iter().find(|told| told == type_) {
                let labels = ConditionLabels::of(namespace, name, condition);
                if [NOTHING_LIVE, NO_CANDIDATE, NOT_STARTED].contains(&reason.as_str()) {
                    self.conditions.remove(&labels);
                } else {
                    let is = i64::from(status == "True");
                    self.conditions.get_or_create(&labels).set(is);
                }
            }
        }
    }

    /// An object is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        for condition in TOLD {
            self.conditions
                .remove(&ConditionLabels::of(namespace, name, condition));
        }
    }
}

impl ConditionLabels {
    fn of(namespace: &str, name: &str, condition: &'static str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            condition,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn passes() -> Histogram {
    Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0])
}

fn minutes() -> Histogram {
    Histogram::new([1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0])
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    #[test]
    fn everything_that_is_promised_is_told() {
        let metrics = Metrics::new();
        metrics.reconciled(Duration::from_millis(20), Some(Class::Conflict));
        metrics.write("update", "Service");
        metrics.phase_ended(Phase::Testing, Duration::from_secs(7));
        metrics.swapped(Intent::Promote, Duration::from_millis(30));
        metrics.swapped(Intent::RollBack, Duration::from_millis(40));
        metrics.swapped(Intent::Repair, Duration::from_millis(50));
        metrics.watch_ages(&[("Job", Duration::from_secs(3))]);
        metrics.watch_failed("Job");
        metrics.leads(true);
        let page = metrics.encode().unwrap();
        for line in [
            r"exchange_operator_reconcile_duration_seconds_count 1",
            r#"exchange_operator_reconcile_errors_total{class="conflict"} 1"#,
            r#"exchange_operator_writes_total{verb="update",kind="Service"} 1"#,
            r#"exchange_operator_phase_duration_seconds_sum{phase="Testing"} 7.0"#,
            r#"exchange_operator_swap_duration_seconds_sum{direction="forward"} 0.03"#,
            r#"exchange_operator_swap_duration_seconds_sum{direction="back"} 0.04"#,
            r#"exchange_operator_watch_age_seconds{kind="Job"} 3"#,
            r#"exchange_operator_watch_errors_total{kind="Job"} 1"#,
            r"exchange_operator_leader 1",
        ] {
            assert!(page.lines().any(|it| it == line), "{line} is missing in {page}");
        }
        assert_eq!(page.matches("swap_duration_seconds_count").count(), 2, "{page}");
        // Who does not lead any more watches nothing.
        metrics.watch_ages(&[]);
        let page = metrics.encode().unwrap();
        assert!(!page.contains("watch_age_seconds{"), "{page}");
    }

    #[test]
    fn of_objects_that_are_gone_and_of_who_does_not_lead_nothing_is_told() {
        let metrics = Metrics::new();
        let told = || {
            let page = metrics.encode().unwrap();
            let lines = page.lines().filter(|line| line.contains("condition{"));
            let mut lines: Vec<_> = lines.map(ToOwned::to_owned).collect();
            lines.sort();
            lines
        };
        let line = |name: &str, condition: &str, is: u8| {
            format!(
                "exchange_operator_condition{{namespace=\"prod\",name=\"{name}\",condition=\"{condition}\"}} {is}"
            )
        };
        let condition = |kind: &str, status: &str| Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            message: String::new(),
            observed_generation: None,
            reason: String::new(),
        };
        metrics.conditions(
            "prod",
            "a",
            &[
                condition("Ready", "True"),
                condition("Stalled", "False"),
                condition("RollbackAvailable", "True"),
            ],
        );
        let available = condition("Available", "True");
        metrics.conditions("prod", "b", std::slice::from_ref(&available));
        let of_b = line("b", "Available", 1);
        assert_eq!(
            told(),
            [line("a", "Ready", 1), line("a", "Stalled", 0), of_b.clone()]
        );
        metrics.forget("prod", "a");
        assert_eq!(told(), [of_b]);
        let unavailable = Condition {
            status: "False".to_owned(),
            reason: NOTHING_LIVE.to_owned(),
            ..available
        };
        metrics.conditions("prod", "b", &[unavailable]);
        assert_eq!(told(), Vec::<String>::new());
        let schema = condition("SchemaReady", "False");
        metrics.conditions("prod", "b", std::slice::from_ref(&schema));
        assert_eq!(told(), [line("b", "SchemaReady", 0)]);
        let waits = Condition {
            reason: NOT_STARTED.to_owned(),
            ..schema
        };
        metrics.conditions("prod", "b", &[waits]);
        assert_eq!(told(), Vec::<String>::new());
        metrics.conditions("prod", "b", &[condition("Ready", "False")]);
        metrics.leads(false);
        assert_eq!(told(), Vec::<String>::new());
    }
}
