//! An exchange as people look at it: pure functions of what the cluster says.

use std::fmt::Write as _;

use exchange_operator::{
    api::{ExchangeDeployment, Service},
    resources::{ATTEMPT, COLOUR, JOB, REVISION},
    status::{ExchangeDeploymentStatus as Status, HistoryEntry, Outcome, Phase, Reason, Stack, token},
};
use jiff::{SignedDuration, Timestamp, Unit};
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{Event, Pod},
    },
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};
use serde::Serialize;

use crate::act::{Action, is_asked, request};

/// An exchange: what is declared, what serves, what is on its way.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a question of its own to whoever reads it"
)]
pub(crate) struct View {
    pub(crate) name: String,
    pub(crate) namespace: String,
    /// The declared version.
    pub(crate) target: String,
    pub(crate) phase: Phase,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) since: Option<Timestamp>,
    /// Whether this is about the spec as it is now.
    pub(crate) current: bool,
    pub(crate) ready: bool,
    /// Whether nothing goes on without somebody's help.
    pub(crate) stalled: bool,
    /// Whether somebody has asked for something that the operator has not come to yet.
    pub(crate) asked: bool,
    pub(crate) message: String,
    pub(crate) stacks: Vec<StackView>,
}

/// A stack and its pods.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StackView {
    pub(crate) role: &'static str,
    pub(crate) version: String,
    #[serde(flatten)]
    pub(crate) stack: Stack,
    pub(crate) attempt: u32,
    pub(crate) note: String,
    /// Of the release that it is about: where it has been, and how long.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) phases: Vec<PhaseView>,
    pub(crate) services: Vec<ServiceView>,
    pub(crate) gates: Vec<Gate>,
}

/// A phase of a release, as far as is known of it.
#[derive(Debug, Serialize)]
pub(crate) struct PhaseView {
    pub(crate) phase: Phase,
    pub(crate) began: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<Timestamp>,
    /// Whether the release was given up in it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) given_up: bool,
}

/// The pods of a service of a stack.
#[derive(Debug, Serialize)]
pub(crate) struct ServiceView {
    pub(crate) service: Service,
    pub(crate) pods: Vec<PodView>,
}

/// A pod.
#[derive(Debug, Serialize)]
pub(crate) struct PodView {
    pub(crate) name: String,
    pub(crate) ready: bool,
    /// What it does, or what keeps it.
    pub(crate) state: String,
    pub(crate) restarts: i32,
}

/// A condition of the swap, and how it stands.
#[derive(Debug, Serialize)]
pub(crate) struct Gate {
    pub(crate) name: String,
    pub(crate) state: GateState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) began: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<Timestamp>,
}

/// How a gate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GateState {
    Passed,
    Running,
    Failed,
    Waiting,
}

/// A condition by its type.
pub(crate) fn condition<'a>(status: &'a Status, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|it| it.type_ == kind)
}

/// Puts together what the cluster says. `pods`, `jobs` and `told` are those of this exchange.
pub(crate) fn view(object: &ExchangeDeployment, pods: &[Pod], jobs: &[Job], told: &[Event]) -> View {
    let status = object.status.clone().unwrap_or_default();
    let is = |kind| condition(&status, kind).is_some_and(|it| it.status == "True");
    let current =
        status.observed_generation.is_some() && status.observed_generation == object.metadata.generation;
    let mut stacks = Vec::new();
    let mut add = |role, version: &str, stack: &Stack, attempt, note| {
        stacks.push(StackView {
            role,
            version: version.to_owned(),
            stack: stack.clone(),
            attempt,
            note,
            phases: phases(object, &status, jobs, told, (stack, attempt)),
            services: services(pods, stack),
            gates: gates(object, &status, jobs, stack, attempt),
        });
    };
    if let Some(it) = &status.live {
        let note = if it.verified { "verified" } else { "not verified" };
        add("live", &it.version, &it.stack, it.attempt, note.to_owned());
    }
    if let Some(it) = &status.candidate {
        add("candidate", &it.version, &it.stack, it.attempt, String::new());
    }
    if let Some(it) = &status.previous {
        let note = if it.way_back {
            format!("{:?}, until {}", it.state, it.until)
        } else {
            format!("{:?}, no way back", it.state)
        };
        add("previous", &it.version, &it.stack, it.attempt, note);
    }
    let known = |stack: &Stack| status.stacks().any(|it| it == stack);
    if let Some(it) = status.rejected.as_ref().filter(|it| !known(&it.stack)) {
        add(
            "given up",
            &it.version,
            &it.stack,
            it.attempt,
            it.reason.to_string(),
        );
    }
    let message = if current {
        condition(&status, "Ready").map_or_else(String::new, |it| it.message.clone())
    } else {
        "the operator has not looked at this spec yet".to_owned()
    };
    View {
        name: object.metadata.name.clone().unwrap_or_default(),
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        target: object.spec.version.clone(),
        phase: status.phase,
        since: status.phase_since,
        current,
        ready: current && is("Ready"),
        stalled: current && is("Stalled"),
        asked: is_asked(object, &status),
        message,
        stacks,
    }
}

fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn of_stack(metadata: &ObjectMeta, stack: &Stack) -> bool {
    label(metadata, COLOUR) == Some(stack.colour.as_str())
        && label(metadata, REVISION) == Some(stack.revision.as_str())
}

fn services(pods: &[Pod], stack: &Stack) -> Vec<ServiceView> {
    let of = |service: Service| {
        let pods = pods.iter().filter(|pod| {
            of_stack(&pod.metadata, stack)
                && label(&pod.metadata, "app.kubernetes.io/component") == Some(service.as_str())
        });
        let mut pods: Vec<_> = pods.map(pod_view).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        ServiceView { service, pods }
    };
    Service::ALL.into_iter().map(of).collect()
}

fn pod_view(pod: &Pod) -> PodView {
    let status = pod.status.clone().unwrap_or_default();
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|it| it.type_ == "Ready" && it.status == "True");
    let containers = status.container_statuses.unwrap_or_default();
    let troubles = containers.iter().filter_map(|container| {
        let state = container.state.as_ref()?;
        let waits = state.waiting.as_ref().and_then(|it| it.reason.clone());
        waits.or_else(|| state.terminated.as_ref().and_then(|it| it.reason.clone()))
    });
    let trouble = troubles.into_iter().next();
    let state = if pod.metadata.deletion_timestamp.is_some() {
        "Terminating".to_owned()
    } else {
        trouble.or(status.phase).unwrap_or_else(|| "Unknown".to_owned())
    };
    PodView {
        name: pod.metadata.name.clone().unwrap_or_default(),
        ready,
        state,
        restarts: containers.iter().map(|container| container.restart_count).sum(),
    }
}

/// The stack and attempt that the phase is about.
fn release(status: &Status) -> Option<(&Stack, u32)> {
    let rejected = status
        .rejected
        .as_ref()
        .filter(|_| matches!(status.phase, Phase::Failed | Phase::Held))
        .map(|it| (&it.stack, it.attempt));
    let candidate = status.candidate.as_ref().map(|it| (&it.stack, it.attempt));
    let live = status.live.as_ref().map(|it| (&it.stack, it.attempt));
    candidate.or(rejected).or(live)
}

/// The phases of the release that a stack and attempt are about, if they are. Only the present one is in the status: when
/// the others began is in the history, the Jobs and the Events, for as long as those are kept.
fn phases(
    object: &ExchangeDeployment,
    status: &Status,
    jobs: &[Job],
    told: &[Event],
    (stack, attempt): (&Stack, u32),
) -> Vec<PhaseView> {
    if release(status) != Some((stack, attempt)) {
        return Vec::new();
    }
    let job = |name: &str| job_of(jobs, stack, attempt, name).map(|job| gate(name, job));
    let expand = job("expand");
    let own = object
        .spec
        .rollout
        .smoke_tests
        .iter()
        .map(|test| test.name.as_str());
    let tests: Vec<Gate> = ["smoke"].into_iter().chain(own).filter_map(job).collect();
    let tested = tests.iter().filter_map(|test| test.ended).max();
    let manual = object.spec.rollout.promotion == exchange_operator::api::Promotion::Manual;
    let entry = |holds: &dyn Fn(&HistoryEntry) -> bool| {
        let mine = status
            .history
            .iter()
            .find(|it| it.stack == *stack && it.attempt == attempt && holds(it));
        mine.map(|it| it.at)
    };
    let ended_as = |outcome: Outcome| entry(&|it| it.outcome == outcome);
    // Given up in the middle of the swap, it went back; before it, there was nowhere to go.
    let turned = |it: &HistoryEntry| {
        let middle = matches!(it.reason, Some(Reason::PromotionFailed | Reason::RolledBack));
        it.outcome == Outcome::RolledBack || it.outcome == Outcome::Failed && middle
    };
    let migrated = expand.as_ref().and_then(|it| it.began);
    let promoted = ended_as(Outcome::Promoted);
    // The latest Event of a reason may be another release's.
    let started = last(told, "ReleaseStarted").filter(|at| migrated.is_none_or(|next| *at <= next));
    let promoting = last(told, "Promoting")
        .filter(|at| tested.is_some_and(|tested| tested <= *at))
        .filter(|at| promoted.is_none_or(|next| *at <= next));
    let back = entry(&turned);
    let known = [
        (Phase::Pending, started),
        (Phase::Migrating, migrated),
        (Phase::Provisioning, expand.as_ref().and_then(|it| it.ended)),
        (Phase::Testing, tests.iter().filter_map(|test| test.began).min()),
        (Phase::AwaitingPromotion, tested.filter(|_| manual)),
        (Phase::Promoting, promoting),
        (Phase::Verifying, promoted),
        (Phase::Live, ended_as(Outcome::Verified)),
        (
            Phase::Failed,
            entry(&|it| it.outcome == Outcome::Failed && !turned(it)),
        ),
        (Phase::RollingBack, back),
        (
            Phase::Held,
            last(told, "RolledBack").filter(|at| back.is_some_and(|back| back <= *at)),
        ),
    ];
    let mut begins: Vec<(Phase, Timestamp)> = known
        .into_iter()
        .filter_map(|(phase, began)| Some((phase, began?)))
        .filter(|(phase, began)| {
            *phase != status.phase && status.phase_since.is_none_or(|since| *began <= since)
        })
        .collect();
    begins.extend(status.phase_since.map(|since| (status.phase, since)));
    begins.sort_by_key(|(_, began)| *began);
    let next = begins.iter().skip(1).map(Some).chain([None]);
    let all = begins.iter().zip(next).map(|(&(phase, began), next)| PhaseView {
        phase,
        began,
        ended: next.map(|(_, began)| *began),
        given_up: next.is_some_and(|(next, _)| matches!(next, Phase::Failed | Phase::RollingBack)),
    });
    // Where a release comes to rest is no part of the way.
    all.filter(|it| !matches!(it.phase, Phase::Live | Phase::Failed | Phase::Held))
        .collect()
}

/// When something was told last.
fn last(told: &[Event], reason: &str) -> Option<Timestamp> {
    let times = told
        .iter()
        .filter(|it| it.reason.as_deref() == Some(reason))
        .filter_map(|it| {
            let again = it
                .series
                .as_ref()
                .and_then(|series| series.last_observed_time.as_ref());
            again.or(it.event_time.as_ref()).map(|it| it.0)
        });
    times.max()
}

fn job_of<'a>(jobs: &'a [Job], stack: &Stack, attempt: u32, name: &str) -> Option<&'a Job> {
    jobs.iter().find(|job| {
        of_stack(&job.metadata, stack)
            && label(&job.metadata, ATTEMPT) == Some(attempt.to_string().as_str())
            && label(&job.metadata, JOB) == Some(name)
    })
}

/// The gates of a candidate, in the order in which they are passed; of other stacks, those whose Jobs are still there.
fn gates(
    object: &ExchangeDeployment,
    status: &Status,
    jobs: &[Job],
    stack: &Stack,
    attempt: u32,
) -> Vec<Gate> {
    let mut gates = Vec::new();
    let job = |name: &str| job_of(jobs, stack, attempt, name);
    let candidate = status.candidate.as_ref().filter(|it| it.stack == *stack);
    let released = candidate.filter(|_| !matches!(status.phase, Phase::RollingBack));
    let by_job = |name: &str| match job(name) {
        Some(job) => Some(gate(name, job)),
        None => released.map(|_| waiting(name, GateState::Waiting)),
    };
    gates.extend(by_job("expand"));
    if released.is_some() {
        let ready = condition(status, "CandidateReady").is_some_and(|it| it.status == "True");
        let state = match (ready, status.phase) {
            (true, _) => GateState::Passed,
            (false, Phase::Provisioning) => GateState::Running,
            _ => GateState::Waiting,
        };
        gates.push(waiting("pods", state));
    }
    gates.extend(by_job("smoke"));
    gates.extend(
        object
            .spec
            .rollout
            .smoke_tests
            .iter()
            .filter_map(|test| by_job(&test.name)),
    );
    for name in ["verify", "contract"] {
        gates.extend(job(name).map(|job| gate(name, job)));
    }
    if released.is_some() && object.spec.rollout.promotion == exchange_operator::api::Promotion::Manual {
        let state = match status.phase {
            Phase::Promoting => GateState::Passed,
            Phase::AwaitingPromotion => GateState::Running,
            _ => GateState::Waiting,
        };
        gates.push(waiting("approval", state));
    }
    gates
}

fn waiting(name: &str, state: GateState) -> Gate {
    Gate {
        name: name.to_owned(),
        state,
        began: None,
        ended: None,
    }
}

fn gate(name: &str, job: &Job) -> Gate {
    let status = job.status.clone().unwrap_or_default();
    let ended = status.conditions.iter().flatten().find_map(|it| {
        let state = match it.type_.as_str() {
            "Complete" => GateState::Passed,
            "Failed" => GateState::Failed,
            _ => return None,
        };
        (it.status == "True").then(|| (state, it.last_transition_time.as_ref().map(|it| it.0)))
    });
    let (state, ended) = ended.unwrap_or((GateState::Running, None));
    Gate {
        name: name.to_owned(),
        state,
        began: status.start_time.map(|it| it.0),
        ended,
    }
}

/// A span of time, in one or two units.
pub(crate) fn span(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, 1..=9) => format!("{minutes}m{}s", seconds % 60),
        (0, 0, _) => format!("{minutes}m"),
        (0, ..) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// The view as a tree.
pub(crate) fn tree(view: &View, now: Timestamp) -> String {
    let mut text = String::new();
    let lasts = view.since.map_or_else(String::new, |since| {
        format!(" for {}", span(now.duration_since(since)))
    });
    let _ = writeln!(
        text,
        "{} in {}: {}{lasts}, wants {}\n  {}",
        view.name, view.namespace, view.phase, view.target, view.message
    );
    for (index, stack) in view.stacks.iter().enumerate() {
        let last = index + 1 == view.stacks.len();
        let (branch, stem) = if last {
            ("└─", "  ")
        } else {
            ("├─", "│ ")
        };
        let note = if stack.note.is_empty() {
            String::new()
        } else {
            format!(", {}", stack.note)
        };
        let _ = writeln!(
            text,
            "{branch} {}: {} in {}, {}{note}",
            stack.role,
            stack.version,
            stack.stack.colour,
            token(&stack.stack, stack.attempt)
        );
        let mut lines: Vec<String> = Vec::new();
        if !stack.phases.is_empty() {
            lines.push("phases".to_owned());
        }
        for phase in &stack.phases {
            let mark = match phase.ended {
                _ if phase.given_up => "✗",
                Some(_) => "✓",
                None => "…",
            };
            let took = span(phase.ended.unwrap_or(now).duration_since(phase.began));
            lines.push(format!("  {mark} {} {took}", phase.phase));
        }
        for service in &stack.services {
            let ready = service.pods.iter().filter(|pod| pod.ready).count();
            lines.push(format!(
                "{}: {ready} of {} pods ready",
                service.service,
                service.pods.len()
            ));
            for pod in &service.pods {
                let mark = if pod.ready { "✓" } else { "·" };
                let restarts = match pod.restarts {
                    0 => String::new(),
                    restarts => format!(", {restarts} restarts"),
                };
                lines.push(format!("  {mark} {} {}{restarts}", pod.name, pod.state));
            }
        }
        if !stack.gates.is_empty() {
            lines.push("gates".to_owned());
            lines.extend(stack.gates.iter().map(|gate| gate_line(gate, now)));
        }
        for line in lines {
            let _ = writeln!(text, "{stem}  {line}");
        }
    }
    text
}

fn gate_line(gate: &Gate, now: Timestamp) -> String {
    let mark = match gate.state {
        GateState::Passed => "✓",
        GateState::Running => "…",
        GateState::Failed => "✗",
        GateState::Waiting => "·",
    };
    let took = gate.began.map_or_else(String::new, |began| {
        format!(" {}", span(gate.ended.unwrap_or(now).duration_since(began)))
    });
    format!("  {mark} {}{took}", gate.name)
}

/// What the release waits for, and what can be done.
pub(crate) fn explain(object: &ExchangeDeployment, view: &View, now: Timestamp) -> String {
    let status = object.status.clone().unwrap_or_default();
    let mut text = String::new();
    let approved = view.phase == Phase::AwaitingPromotion
        && status
            .candidate
            .as_ref()
            .is_some_and(|it| it.approved_by.is_some());
    let lasts = view.since.map_or_else(String::new, |since| {
        format!(", since {} ({} ago)", at(since), span(now.duration_since(since)))
    });
    let _ = writeln!(
        text,
        "{}: {}{lasts}.\n{}\n",
        view.phase,
        if approved {
            "all gates are passed and it is approved, but pods of it are not ready"
        } else {
            meaning(view.phase)
        },
        view.message
    );
    if let Some(since) = status.stopped_since {
        let how = if object.spec.suspend {
            "suspended (spec.suspend)"
        } else {
            "paused"
        };
        let finishes = if view.phase.moves() {
            "what has begun to move is finished, and then "
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "It is {how} since {}: {finishes}deadlines and retention stand still.\n",
            at(since)
        );
    }
    let _ = writeln!(text, "Conditions");
    for it in &status.conditions {
        let _ = writeln!(
            text,
            "  {:<17} {:<5} {}: {}",
            it.type_, it.status, it.reason, it.message
        );
    }
    let _ = writeln!(text, "\nWhat can be done");
    for action in Action::ALL {
        let line = match request(action, object) {
            Ok(request) => format!(
                "kubectl exchange {} {}: {}",
                action.word(),
                view.name,
                request.effect
            ),
            Err(refusal) => format!("not {}: {refusal}", action.word()),
        };
        let _ = writeln!(text, "  {line}");
    }
    text
}

const fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "waits until the other colour is free",
        Phase::Migrating => "the schema is being expanded",
        Phase::Provisioning => "the candidate's pods start",
        Phase::Testing => "the candidate is being tested",
        Phase::AwaitingPromotion => "all gates are passed, a person has to approve",
        Phase::Promoting => "the traffic moves to the candidate",
        Phase::Verifying => "the new version serves and is being watched",
        Phase::Live => "what is declared serves",
        Phase::RollingBack => "the traffic moves back",
        Phase::Failed => "given up before the swap, what was live still is",
        Phase::Held => "given up after the swap",
    }
}

/// What was live when, how it ended, who acted; the latest first.
pub(crate) fn history(object: &ExchangeDeployment) -> String {
    let mut rows = vec![["AT", "OUTCOME", "VERSION", "COLOUR", "STACK", "REASON", "BY"].map(str::to_owned)];
    let status = object.status.clone().unwrap_or_default();
    rows.extend(status.history.iter().map(|it| {
        [
            at(it.at),
            format!("{:?}", it.outcome),
            it.version.clone(),
            it.stack.colour.to_string(),
            token(&it.stack, it.attempt),
            it.reason
                .map_or_else(|| "-".to_owned(), |reason| reason.to_string()),
            it.by.clone(),
        ]
    }));
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..7).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

fn at(time: Timestamp) -> String {
    time.round(Unit::Second).unwrap_or(time).to_string()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, path::Path};

    use serde_json::{Value, json};

    use super::*;

    /// An object as the operator leaves it, by the name of its file.
    pub(crate) fn object(name: &str) -> ExchangeDeployment {
        let folder = "../argocd/resource_customizations/exchange.dev/ExchangeDeployment/testdata";
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(folder)
            .join(format!("{name}.yaml"));
        serde_yaml::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    }

    fn labels(stack: &Stack, more: &Value) -> Value {
        let mut labels = json!({COLOUR: stack.colour, REVISION: stack.revision});
        labels
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        labels
    }

    fn pod(stack: &Stack, service: &str, name: &str, waits: Option<&str>) -> Pod {
        let state = waits.map_or_else(
            || json!({"running": {}}),
            |reason| json!({"waiting": {"reason": reason}}),
        );
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels(stack, &json!({"app.kubernetes.io/component": service}))},
            "status": {
                "phase": if waits.is_some() { "Pending" } else { "Running" },
                "conditions": [{"type": "Ready", "status": if waits.is_some() { "False" } else { "True" }}],
                "containerStatuses": [{
                    "name": service, "image": "", "imageID": "", "ready": waits.is_none(),
                    "restartCount": if waits.is_some() { 3 } else { 0 }, "state": state,
                }],
            },
        }))
        .unwrap()
    }

    fn job(stack: &Stack, attempt: u32, name: &str, end: Option<&str>) -> Job {
        let conditions: Vec<Value> = end
            .map(|end| json!({"type": end, "status": "True", "lastTransitionTime": "2026-01-01T02:16:19Z"}))
            .into_iter()
            .collect();
        let more = json!({JOB: name, ATTEMPT: attempt.to_string()});
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels(stack, &more)},
            "status": {"startTime": "2026-01-01T02:16:12Z", "conditions": conditions},
        }))
        .unwrap()
    }

    /// What the operator has told of a release that began a while before its present phase, and of one before that.
    fn told(object: &ExchangeDeployment) -> Vec<Event> {
        let since = object
            .status
            .as_ref()
            .and_then(|status| status.phase_since)
            .unwrap();
        let before = |seconds: i64| {
            let at = since - SignedDuration::from_secs(seconds);
            at.strftime("%H:%M:%S").to_string()
        };
        vec![
            event("ReleaseStarted", &before(3_600), Some(&before(90))),
            event("Promoting", &before(3_500), None),
        ]
    }

    fn now() -> Timestamp {
        "2026-01-01T02:20:00Z".parse().unwrap()
    }

    /// The live stack with all its pods, and the candidate with one that does not start.
    fn cluster(object: &ExchangeDeployment) -> (Vec<Pod>, Vec<Job>) {
        let status = object.status.clone().unwrap();
        let live = status.live.unwrap().stack;
        let mut pods: Vec<Pod> = Service::ALL
            .iter()
            .map(|service| {
                pod(
                    &live,
                    service.as_str(),
                    &format!("exchange-blue-{service}-r0-a"),
                    None,
                )
            })
            .collect();
        let mut jobs = Vec::new();
        if let Some(it) = status.candidate {
            pods.push(pod(&it.stack, "user", "exchange-green-user-r1-b", None));
            pods.push(pod(&it.stack, "user", "exchange-green-user-r1-a", None));
            pods.push(pod(
                &it.stack,
                "trade",
                "exchange-green-trade-r1-a",
                Some("ImagePullBackOff"),
            ));
            jobs.push(job(&it.stack, it.attempt, "expand", Some("Complete")));
            jobs.push(job(&it.stack, it.attempt, "smoke", Some("Failed")));
            jobs.push(job(&it.stack, it.attempt, "own", None));
            // Of an earlier attempt: says nothing about this one.
            jobs.push(job(&it.stack, it.attempt - 1, "verify", Some("Complete")));
        }
        (pods, jobs)
    }

    #[test]
    fn the_tree_shows_stacks_pods_and_gates() {
        let object = object("testing");
        let (pods, jobs) = cluster(&object);
        insta::assert_snapshot!("tree", tree(&view(&object, &pods, &jobs, &told(&object)), now()));
    }

    #[test]
    fn the_tree_of_each_phase_says_what_it_is_about() {
        for name in ["new", "stale", "awaiting_promotion", "live", "held", "failed"] {
            let text = tree(&view(&object(name), &[], &[], &[]), now());
            insta::assert_snapshot!(format!("tree-{name}"), text);
        }
    }

    /// At a time of day.
    fn day(time: &str) -> Timestamp {
        format!("2026-01-01T{time}Z").parse().unwrap()
    }

    fn event(reason: &str, first: &str, again: Option<&str>) -> Event {
        let micro = |time: &str| day(time).to_string();
        let series = again.map(|again| json!({"count": 2, "lastObservedTime": micro(again)}));
        serde_json::from_value(json!({
            "metadata": {}, "involvedObject": {}, "reason": reason, "eventTime": micro(first), "series": series,
        }))
        .unwrap()
    }

    /// Each phase of the live version's release, with its seconds.
    fn way(events: &[Event]) -> Vec<(String, i64)> {
        let object = object("live");
        let live = object.status.clone().unwrap().live.unwrap();
        let jobs = [
            ("expand", "02:15:50", "02:15:54"),
            ("smoke", "02:16:10", "02:16:20"),
        ]
        .map(|(name, began, ended)| {
            let mut job =
                serde_json::to_value(job(&live.stack, live.attempt, name, Some("Complete"))).unwrap();
            job["status"]["startTime"] = json!(day(began).to_string());
            job["status"]["conditions"][0]["lastTransitionTime"] = json!(day(ended).to_string());
            serde_json::from_value(job).unwrap()
        });
        let view = view(&object, &[], &jobs, events);
        let live = &view.stacks[0];
        assert!(view.stacks[1].phases.is_empty(), "of another release");
        let seconds = |it: &PhaseView| it.ended.unwrap().duration_since(it.began).as_secs();
        live.phases
            .iter()
            .map(|it| (it.phase.to_string(), seconds(it)))
            .collect()
    }

    #[test]
    fn each_phase_lasts_until_the_next_begins() {
        let told = [
            event("ReleaseStarted", "00:00:01", Some("02:15:48")),
            event("Promoting", "00:00:40", Some("02:16:21")),
        ];
        let expected = [
            ("Pending", 2),
            ("Migrating", 4),
            ("Provisioning", 16),
            ("Testing", 11),
            ("Promoting", 11),
            ("Verifying", 60),
        ];
        assert_eq!(way(&told), expected.map(|(phase, took)| (phase.to_owned(), took)));
    }

    #[test]
    fn what_was_told_of_another_release_counts_for_nothing() {
        let told = [
            event("ReleaseStarted", "02:40:00", None),
            event("Promoting", "00:00:40", None),
        ];
        let phases: Vec<String> = way(&told).into_iter().map(|(phase, _)| phase).collect();
        assert_eq!(phases, ["Migrating", "Provisioning", "Testing", "Verifying"]);
    }

    #[test]
    fn machines_read_the_same() {
        let object = object("testing");
        let (pods, jobs) = cluster(&object);
        insta::assert_yaml_snapshot!("view", view(&object, &pods, &jobs, &told(&object)));
    }

    #[test]
    fn explanations_say_what_can_be_done() {
        for name in ["awaiting_promotion", "live", "failed", "paused"] {
            let object = object(name);
            insta::assert_snapshot!(
                format!("explain-{name}"),
                explain(&object, &view(&object, &[], &[], &[]), now())
            );
        }
    }

    #[test]
    fn the_history_is_a_table() {
        insta::assert_snapshot!("history", history(&object("held")));
    }

    #[test]
    fn spans_are_short() {
        let rows = [
            (-5, "0s"),
            (59, "59s"),
            (61, "1m1s"),
            (600, "10m"),
            (3_661, "1h1m"),
            (90_000, "1d1h"),
        ];
        for (seconds, expected) in rows {
            assert_eq!(span(SignedDuration::from_secs(seconds)), expected);
        }
    }
}
