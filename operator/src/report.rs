//! What people and tools are told: the conditions of an `ExchangeDeployment`.
//!
//! A message says what is awaited and what can be done about it. It contains no running time, so that a status which
//! says the same is not written again.

use std::fmt;

use jiff::{Timestamp, Unit};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::{
    api::{ExchangeDeploymentSpec as Spec, Service},
    decide::{COMES_LATER, later, rejects, signed, time_for},
    observe::{Job, JobKind, JobState, Observed, ServiceSeen, StackSeen, Target},
    status::{ExchangeDeploymentStatus as Status, Live, Phase, Previous, PreviousState, Stack, token},
};

/// The reason of `Available` before anything has become live.
pub(crate) const NOTHING_LIVE: &str = "NothingLive";

/// The reason of what is about a release before there is any.
pub(crate) const NO_CANDIDATE: &str = "NoCandidate";

/// The reason of `SchemaReady` for a release whose turn has not come.
pub(crate) const NOT_STARTED: &str = "NotStarted";

/// A verdict: true or false, one word, one sentence.
struct Verdict {
    is: bool,
    reason: String,
    message: String,
}

fn verdict(is: bool, reason: impl fmt::Display, message: impl Into<String>) -> Verdict {
    Verdict {
        is,
        reason: reason.to_string(),
        message: message.into(),
    }
}

/// Sets all conditions and until when there is a way back. The time of a transition changes only when a condition turns.
/// `undecided` says why nothing could be taken over of what has the traffic.
pub fn report(spec: &Spec, seen: &Observed, undecided: Option<&str>, status: &mut Status, now: Timestamp) {
    let story = format!(
        "{}{}{}{}{}",
        story(spec, seen, status),
        times(spec, seen, status),
        declared_since(spec, seen, status),
        broken(seen, status),
        refused(seen, status)
    );
    let way_back = status.previous.as_ref().filter(|it| it.leads_back());
    // Nobody knows until when, while its time stands still.
    let way_back = way_back.filter(|_| status.stopped_since.is_none());
    status.rollback_until = way_back.map(|it| second(it.until));
    let stalled = stalled(spec, seen, undecided, status, now);
    let arrived = arrived(spec, seen, status);
    let waiting = !arrived && !given_up(spec, seen, status);
    let available = available(seen, status);
    // Also what is live may have been made bigger, or have lost pods: tools that wait for a change to be done look here.
    let unmet = if !arrived || stalled.is_some() {
        None
    } else if !available.is {
        Some(verdict(true, &available.reason, &available.message))
    } else if !lacks(seen, status).is_empty() || !is_sized(spec, seen, status) {
        Some(verdict(true, "PodsNotReady", &story))
    } else {
        None
    };
    // Who waits for this alone is told the same as who looks at all of them.
    let missing = reference_missing(seen, status).filter(|_| stalled.is_none());
    let told = stalled.as_ref().or(missing.as_ref());
    let ready = verdict(
        arrived && told.is_none() && unmet.is_none(),
        told.or(unmet.as_ref())
            .map_or_else(|| word(status, arrived), |it| it.reason.clone()),
        told.map_or(&story, |it| &it.message),
    );
    let reconciling = missing
        .or(unmet)
        .unwrap_or_else(|| verdict(waiting && stalled.is_none(), word(status, arrived), &story));
    let conditions = [
        ("Ready", ready),
        ("Reconciling", reconciling),
        (
            "Stalled",
            stalled.unwrap_or_else(|| verdict(false, "Progressing", "nothing is in the way")),
        ),
        ("Available", available),
        ("CandidateReady", candidate_ready(seen, status)),
        ("SchemaReady", schema_ready(seen, status)),
        ("SmokeTestsPassed", tests_passed(spec, seen, status)),
        ("RollbackAvailable", rollback_available(seen, status)),
    ];
    let old = std::mem::take(&mut status.conditions);
    status.conditions = conditions
        .into_iter()
        .map(|(kind, verdict)| {
            let truth = if verdict.is { "True" } else { "False" };
            let same = old.iter().find(|old| old.type_ == kind && old.status == truth);
            Condition {
                type_: kind.to_owned(),
                status: truth.to_owned(),
                reason: verdict.reason,
                message: verdict.message,
                observed_generation: Some(seen.generation),
                last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
            }
        })
        .collect();
}

/// Whether what is declared is live and verified. Stopped, a newly declared version leaves the phase as it was.
fn arrived(spec: &Spec, seen: &Observed, status: &Status) -> bool {
    let declared = match (&seen.declared, &status.live) {
        (Ok(declared), Some(live)) => {
            let colour = spec.rollout.colour.fixed();
            declared.revision == live.stack.revision && colour.is_none_or(|it| it == live.stack.colour)
        }
        _ => false,
    };
    status.phase == Phase::Live && declared
}

/// Whether nothing goes on with what is declared. The phase may be about what was declared before: what came meanwhile is begun by the
/// next pass, or when the object is not stopped any more.
fn given_up(spec: &Spec, seen: &Observed, status: &Status) -> bool {
    let declared = seen.declared.as_ref();
    matches!(status.phase, Phase::Failed | Phase::Held)
        && declared.map_or(true, |declared| rejects(spec, status, declared))
}

/// Paused or suspended, all but a move of the traffic stands still.
fn stands_still(status: &Status) -> bool {
    status.stopped_since.is_some() && !status.phase.moves()
}

fn word(status: &Status, arrived: bool) -> String {
    if stands_still(status) && !arrived {
        return "Stopped".to_owned();
    }
    status.phase.to_string()
}

/// What the API server does not accept, as the end of a sentence.
pub(crate) fn refused(seen: &Observed, status: &Status) -> String {
    // It was about what was to be done then.
    let same = seen.status.phase == status.phase && seen.status.attempt == status.attempt;
    let refused = seen.refused.as_ref().filter(|_| same);
    refused.map_or_else(String::new, |it| format!("; {}", it.why))
}

/// Why nothing goes on without somebody's help.
fn stalled(
    spec: &Spec,
    seen: &Observed,
    undecided: Option<&str>,
    status: &Status,
    now: Timestamp,
) -> Option<Verdict> {
    if !seen.taken.is_empty() {
        let names = seen.taken.join(", ");
        let message = format!("{names} belongs to somebody else: rename or delete it, or rename this object");
        return Some(verdict(true, "NameTaken", message));
    }
    if let Some(why) = undecided {
        return Some(verdict(true, "AdoptionUndecided", why));
    }
    let refused = write_refused(spec, seen, status, now);
    // What moves asks for nothing that is declared.
    if status.phase.moves() {
        return refused.or_else(|| not_back(spec, seen, status, now));
    }
    if let Some(missing) = reference_missing(seen, status) {
        let long = |since| now.duration_since(since) >= COMES_LATER;
        return Some(missing).filter(|_| status.missing_since.is_some_and(long));
    }
    if let Some(rejected) = status.rejected.as_ref().filter(|_| given_up(spec, seen, status)) {
        let retry = token(&rejected.stack, rejected.attempt);
        let (wanted, why) = (&spec.version, &rejected.message);
        let what = match &status.live {
            None => format!("spec wants {wanted}, live is nothing because {why}"),
            Some(live) if live.stack == rejected.stack => {
                format!("{} is live without having been verified: {why}", live.version)
            }
            // Something else than the version was changed.
            Some(live) if live.version == *wanted => format!(
                "spec wants {wanted} as it is in {}, live is that in {} because {why}",
                rejected.stack.colour, live.stack.colour
            ),
            Some(live) => format!("spec wants {wanted}, live is {} because {why}", live.version),
        };
        let message = format!(
            "{what}; change the version, its settings or its gates; after any other change: exchange.dev/retry={retry}"
        );
        return Some(verdict(true, rejected.reason, message));
    }
    colour_in_use(spec, seen, status).or(refused)
}

/// What lacks that the spec refers to. What moves asks for nothing that is declared.
fn reference_missing(seen: &Observed, status: &Status) -> Option<Verdict> {
    let missing = seen.declared.as_ref().err().filter(|_| !status.phase.moves())?;
    Some(verdict(true, "ReferenceMissing", missing.clone()))
}

/// Whether the time for the phase is over, also of one that no deadline ends.
fn late(spec: &Spec, status: &Status, now: Timestamp) -> bool {
    let since = status.phase_since.filter(|_| !stands_still(status));
    since.is_some_and(|since| now >= later(since, time_for(spec, status)))
}

/// A write without which a phase does not end that has no deadline, and that the API server has not accepted for the time of one.
fn write_refused(spec: &Spec, seen: &Observed, status: &Status, now: Timestamp) -> Option<Verdict> {
    // A swap to what is given up has no way back either.
    let forced = status.phase == Phase::Promoting && status.rejected.is_some();
    let drains = |it: &Previous| it.state == PreviousState::Draining;
    let pending = status.phase == Phase::Pending && !status.previous.as_ref().is_some_and(drains);
    let endless = forced || pending || status.phase == Phase::RollingBack;
    let refused = seen
        .refused
        .as_ref()
        .filter(|_| endless && late(spec, status, now))?;
    let message = format!("{}; nothing goes on before that", refused.why);
    Some(verdict(true, "WriteRefused", message))
}

/// The traffic is not back after the time for it, and does not go forward again either: it needs a stack that can take it.
fn not_back(spec: &Spec, seen: &Observed, status: &Status, now: Timestamp) -> Option<Verdict> {
    let stays = status.phase == Phase::RollingBack && seen.seen_before && late(spec, status, now);
    let live = status.live.as_ref().filter(|_| stays)?;
    // What nobody would miss goes in a moment.
    if seen.can_stay(&live.stack) {
        return None;
    }
    let awaited = awaited(seen, Some(&live.stack));
    let message = format!(
        "the traffic is not back on {}{awaited}; it goes as soon as that serves, or all of it forward again when the new stack \
         serves what is not there: mend one of them",
        live.version
    );
    Some(verdict(true, "NotBack", message))
}

/// The declared colour is that of what is live.
fn colour_in_use(spec: &Spec, seen: &Observed, status: &Status) -> Option<Verdict> {
    let live = status.live.as_ref()?;
    let revision = &seen.declared.as_ref().ok()?.revision;
    let in_use = spec.rollout.colour.fixed() == Some(live.stack.colour) && *revision != live.stack.revision;
    (in_use && status.phase == Phase::Pending && status.candidate.is_none()).then(|| {
        let message = format!(
            "{} is live in {}, so that {} cannot run there: set rollout.colour to Auto or to the other colour",
            live.version, live.stack.colour, spec.version
        );
        verdict(true, "ColourInUse", message)
    })
}

/// Whether what is live has been made as big as is declared, which is recorded before it is done.
fn is_sized(spec: &Spec, seen: &Observed, status: &Status) -> bool {
    let live = status.live.as_ref().and_then(|live| seen.stacks.get(&live.stack));
    Service::ALL.into_iter().all(|service| {
        let declared = spec.services.get(service);
        let replicas = live
            .and_then(|live| live.service(service))
            .map(|it| i64::from(it.replicas));
        declared.autoscaling.is_some() || replicas == Some(i64::from(declared.replicas))
    })
}

/// What happens now, in one sentence.
fn story(spec: &Spec, seen: &Observed, status: &Status) -> String {
    let live = status
        .live
        .as_ref()
        .map_or_else(|| "nothing".to_owned(), |live| live.version.clone());
    let candidate = status.candidate.as_ref();
    let of_candidate = candidate.map(|it| (&it.stack, it.attempt));
    let of_live = status.live.as_ref().map(|it| (&it.stack, it.attempt));
    let version = match (candidate, &status.live) {
        (Some(candidate), _) => candidate.version.clone(),
        // Whatever is declared by now.
        (None, Some(verified)) if status.phase == Phase::Verifying => verified.version.clone(),
        _ => spec.version.clone(),
    };
    let (live, version) = match (&status.live, candidate) {
        // Something else than the version was changed.
        (Some(one), Some(other)) if live == version => (
            format!("{live} in {}", one.stack.colour),
            format!("{version} in {}", other.stack.colour),
        ),
        _ => (live, version),
    };
    if let Some(since) = status.stopped_since.filter(|_| stands_still(status)) {
        let (how, on) = if spec.suspend {
            ("suspended", "set spec.suspend to false")
        } else {
            ("paused", "remove the annotation exchange.dev/pause")
        };
        let end = format!("{how} since {}: to go on, {on}; {live} is live", second(since));
        let at_rest = matches!(status.phase, Phase::Live | Phase::Failed | Phase::Held);
        if !at_rest || given_up(spec, seen, status) {
            return format!("{version} is {} and {end}", status.phase);
        }
        if !arrived(spec, seen, status) {
            return format!("{version} waits, {end}");
        }
    }
    if !seen.remains.is_empty() {
        let names = seen.remains.join(", ");
        return format!(
            "{version} waits until nothing is left of the object of this name that was deleted: {names}"
        );
    }
    match status.phase {
        Phase::Pending => pending(&version, &live, seen, status),
        Phase::Migrating => format!(
            "the expand migration of {version} runs{}",
            kept(seen, of_candidate)
        ),
        Phase::Provisioning => candidate.map_or_else(String::new, |it| pods(seen, &it.stack, "starts")),
        Phase::Testing => {
            let lacking = of_candidate.map_or_else(String::new, |it| short(seen, it.0));
            if tests_passed(spec, seen, status).is {
                let missing = seen.missing_live().map_or_else(String::new, |service| {
                    format!(": waiting for the live Service of {service}")
                });
                format!("{version} has passed its tests{missing}{lacking}")
            } else {
                format!("the tests of {version} run{}{lacking}", kept(seen, of_candidate))
            }
        }
        Phase::AwaitingPromotion => match candidate.map(|it| (it, &it.approved_by)) {
            Some((candidate, Some(by))) => {
                let awaited = awaited(seen, Some(&candidate.stack));
                format!("{version} has passed its gates and is approved by {by}{awaited}")
            }
            candidate => {
                let approve = candidate.map_or_else(String::new, |(it, _)| token(&it.stack, it.attempt));
                format!("{version} has passed its gates; approve it with exchange.dev/promote={approve}")
            }
        },
        Phase::Promoting => {
            let awaited = awaited(seen, of_candidate.map(|it| it.0));
            format!("the traffic goes from {live} to {version}{awaited}")
        }
        Phase::RollingBack => {
            let awaited = awaited(seen, of_live.map(|it| it.0));
            format!("the traffic goes back to {live}{awaited}")
        }
        Phase::Verifying => {
            let unheard = because(seen.unheard.as_deref());
            format!(
                "{live} is live and is being watched{}{unheard}",
                kept(seen, of_live)
            )
        }
        Phase::Live => format!("{live} is live and verified{}", lacks(seen, status)),
        Phase::Failed | Phase::Held => {
            let next = if given_up(spec, seen, status) {
                String::new()
            } else {
                format!("; {}, as it is declared now, is next", spec.version)
            };
            format!("{live} is live{}{next}", lacks(seen, status))
        }
    }
}

/// Since when something is awaited, and until when at the latest. While time stands still nobody can know the latter.
fn times(spec: &Spec, seen: &Observed, status: &Status) -> String {
    let Some(since) = status.phase_since.filter(|_| !stands_still(status)) else {
        return String::new();
    };
    let deadline = time_for(spec, status);
    let (since, lasts) = match (status.phase, &status.previous) {
        (Phase::Live | Phase::Failed | Phase::Held, _) => return String::new(),
        (Phase::Pending, Some(previous)) if previous.state == PreviousState::Draining => {
            (previous.since, Some(signed(spec.rollout.drain_timeout)))
        }
        (Phase::Pending | Phase::AwaitingPromotion, _) => (since, None),
        (Phase::Verifying, _) => {
            let watched = signed(status.verification(spec).duration);
            let passed = status.live.as_ref().is_some_and(|live| live.smoke_passed);
            let good = passed && seen.unheard.is_none();
            (since, Some(if good { watched } else { deadline }))
        }
        _ => (since, Some(deadline)),
    };
    lasts.map_or_else(
        || format!("; since {}", second(since)),
        |lasts| format!("; since {}, until {}", second(since), second(later(since, lasts))),
    )
}

/// What waits for the end of a move, a verification or a pause, as the end of a sentence.
fn declared_since(spec: &Spec, seen: &Observed, status: &Status) -> String {
    let Ok(declared) = &seen.declared else {
        return String::new();
    };
    let candidate = status.candidate.as_ref().map(|it| &it.stack);
    let live = status.live.as_ref().map(|it| &it.stack);
    let is_of_it = [candidate, live]
        .into_iter()
        .flatten()
        .any(|stack| stack.revision == declared.revision);
    let stands_still = stands_still(status) && candidate.is_some();
    if is_of_it || !(status.phase.moves() || status.phase == Phase::Verifying || stands_still) {
        return String::new();
    }
    format!(
        "; {}, as it is declared now, waits for the end of that",
        spec.version
    )
}

fn second(time: Timestamp) -> Timestamp {
    time.round(Unit::Second).unwrap_or(time)
}

/// Which pods are awaited, and what keeps them.
fn pods(seen: &Observed, stack: &Stack, what: &str) -> String {
    let lacking = lacking(seen, stack);
    if lacking.is_empty() {
        format!("the candidate {what}")
    } else {
        format!("waiting for {}", lacking.join(", "))
    }
}

/// What a stack lacks that the traffic goes to, or what is heard instead of it, as the end of a sentence.
pub(crate) fn awaited(seen: &Observed, stack: Option<&Stack>) -> String {
    let short = stack.map_or_else(String::new, |stack| short(seen, stack));
    if short.is_empty() {
        because(seen.unheard.as_deref())
    } else {
        short
    }
}

/// What a stack lacks, as the end of a sentence.
fn short(seen: &Observed, stack: &Stack) -> String {
    let missing = missing(seen, stack);
    if missing.is_empty() {
        String::new()
    } else {
        format!(": waiting for {}", missing.join(", "))
    }
}

fn because(why: Option<&str>) -> String {
    why.map_or_else(String::new, |why| format!(": {why}"))
}

/// What is live and lacks pods, as the end of a sentence: which, what keeps them, and the way back.
fn lacks(seen: &Observed, status: &Status) -> String {
    let live = status.live.as_ref();
    let short = live.map_or_else(String::new, |live| short(seen, &live.stack));
    let way_back = rollback(seen, status).filter(|_| !short.is_empty());
    way_back.map_or_else(|| short.clone(), |it| format!("{short}; {it}"))
}

/// Whether everything of a stack is there that its pods and their repair need.
fn is_whole(seen: &Observed, stack: &Stack) -> bool {
    let seen = seen.stacks.get(stack);
    seen.is_some_and(|seen| seen.rendered.is_some() && seen.whole)
}

/// What is live, is not whole and is not declared any more, as the end of a sentence: only what is declared is made again.
fn broken(seen: &Observed, status: &Status) -> String {
    let declared = |stack: &Stack| {
        let declared = seen.declared.as_ref();
        declared.is_ok_and(|declared| declared.revision == stack.revision)
    };
    let live = status.live.as_ref().map(|live| &live.stack);
    let broken = live.filter(|stack| !declared(stack) && !is_whole(seen, stack));
    broken.map_or_else(String::new, |stack| format!("; {}", not_whole(stack)))
}

fn not_whole(stack: &Stack) -> String {
    format!(
        "a ConfigMap, a Secret, a ServiceAccount or the ControllerRevision of {stack} is gone: what runs goes on, a new pod may \
         not start, and what is gone is made again only when the same is declared again"
    )
}

/// The pods that a stack lacks, and what keeps them, per service.
fn missing(seen: &Observed, stack: &Stack) -> Vec<String> {
    let stack = seen.stacks.get(stack);
    let mut missing = Vec::new();
    for service in Service::ALL {
        let there = stack.and_then(|stack| stack.service(service));
        let (ready, wanted) = there.map_or((0, 1), |there| (there.ready, there.replicas.max(1)));
        if ready < wanted {
            let trouble = because(there.and_then(|there| there.trouble.as_deref()));
            missing.push(format!("{} of {wanted} {service} pods{trouble}", wanted - ready));
        }
    }
    missing
}

/// What a candidate lacks to be tested: pods, or that these are all of what its workloads say now.
pub(crate) fn lacking(seen: &Observed, stack: &Stack) -> Vec<String> {
    let mut lacking = missing(seen, stack);
    let there = seen.stacks.get(stack);
    let others = |service: &Service| {
        there
            .and_then(|it| it.service(*service))
            .is_some_and(|it| !it.current)
    };
    if let Some(service) = Service::ALL
        .into_iter()
        .find(others)
        .filter(|_| lacking.is_empty())
    {
        lacking.push(format!(
            "the last {service} pods of another template to be replaced"
        ));
    }
    lacking
}

/// What a release waits for before it begins.
fn pending(version: &str, live: &str, seen: &Observed, status: &Status) -> String {
    let of_live = status.live.as_ref().map(|it| (&it.stack, it.attempt));
    match (&status.previous, &status.contract) {
        (Some(previous), _) => {
            let stack = &previous.stack;
            let astray = seen.reaches(stack) && previous.state != PreviousState::Draining;
            let astray =
                astray.then(|| format!("a live Service leads to it and not to {live}, which is live"));
            let unheard = || seen.stacks.get(stack).and_then(|it| it.unheard.clone());
            let why = astray
                .or_else(unheard)
                .or_else(|| left_over(seen, |it, there| it == stack && there.trouble.is_some()));
            let left = format!("{version} waits until {} has left its colour", previous.version);
            format!("{left}{}", because(why.as_deref()))
        }
        (None, Some(_)) => format!(
            "{version} waits for the contract migration of {live}{}",
            kept(seen, of_live)
        ),
        (None, None) => {
            let why = left_over(seen, |stack, _| Some(stack) != of_live.map(|it| it.0));
            let why = because(why.as_deref());
            format!("{version} waits until nothing is left of other versions{why}")
        }
    }
}

/// Pods that are left, of those of which this is said.
fn left_over(seen: &Observed, of: impl Fn(&Stack, &ServiceSeen) -> bool) -> Option<String> {
    let all = seen.stacks.iter();
    let all = all.flat_map(|(stack, it)| it.services.iter().map(move |(service, it)| (stack, service, it)));
    let left = all.filter(|(stack, _, there)| there.pods > 0 && of(stack, there));
    let left: Vec<String> = left
        .map(|(stack, service, there)| {
            let trouble = because(there.trouble.as_deref());
            let (pods, are) = if there.pods == 1 {
                ("pod", "is")
            } else {
                ("pods", "are")
            };
            format!("{} {service} {pods} of {stack} {are} left{trouble}", there.pods)
        })
        .collect();
    (!left.is_empty()).then(|| left.join(", "))
}

/// What keeps Jobs of an attempt from coming to their end, and how far its migration is.
fn kept(seen: &Observed, of: Option<(&Stack, u32)>) -> String {
    let mut running = seen.jobs.iter().filter(|(job, seen)| {
        let own = of == Some((&job.stack, job.attempt));
        own && seen.state == JobState::Running
    });
    because(running.find_map(|(_, seen)| seen.told()).as_deref())
}

fn available(seen: &Observed, status: &Status) -> Verdict {
    let Some(live) = &status.live else {
        return verdict(false, NOTHING_LIVE, "no version has become live yet");
    };
    let without = Service::ALL.into_iter().find(|service| {
        seen.live
            .get(service)
            .is_none_or(|live| live.endpoints.is_empty())
    });
    if let Some(service) = without {
        let elsewhere = elsewhere(seen, status, service).map(|it| format!("; {it}"));
        let why = elsewhere.unwrap_or_else(|| lacks(seen, status));
        let message = format!("the {service} service has no ready endpoints{why}");
        return verdict(false, "NoEndpoints", message);
    }
    let told = Service::ALL
        .into_iter()
        .find_map(|service| elsewhere(seen, status, service));
    if let Some(message) = told {
        return verdict(false, "PointsElsewhere", message);
    }
    let astray = |service: &Service| astray(seen, status, *service).is_some();
    let message = match Service::ALL.into_iter().find(astray) {
        None if status.phase.moves() => "every service has ready endpoints".to_owned(),
        None => format!("every service of {} has ready endpoints", live.version),
        Some(service) => format!(
            "every service has ready endpoints, but {service} is to point at {} again",
            live.stack
        ),
    };
    verdict(true, "EndpointsReady", message)
}

/// Where a live Service points, if it is not at what is live and nothing moves.
fn astray<'s>(seen: &'s Observed, status: &Status, service: Service) -> Option<&'s Target> {
    let live = &status.live.as_ref()?.stack;
    let target = &seen.live.get(&service)?.target;
    (!status.phase.moves() && !target.is(Some(live))).then_some(target)
}

/// Where a live Service points that is astray, and what keeps it from being put right.
/// What is about to be put right is not told.
fn elsewhere(seen: &Observed, status: &Status, service: Service) -> Option<String> {
    let live = &status.live.as_ref()?.stack;
    let at = match astray(seen, status, service)? {
        Target::Nothing => "at nothing".to_owned(),
        Target::Stack(other) => format!("at {other}"),
        Target::Foreign => "at no stack".to_owned(),
    };
    let told = format!("the {service} service points {at} and not at {live}, which is live");
    let ready = seen.stacks.get(live).map_or(0, |seen| seen.ready(service));
    if ready > 0 {
        let traffic = seen.refused.as_ref()?.traffic;
        let refused = refused(seen, status);
        return (traffic && !refused.is_empty()).then(|| format!("{told}{refused}"));
    }
    let way_back = rollback(seen, status).map_or_else(String::new, |it| format!(", or {it}"));
    Some(format!(
        "{told}: it is put right as soon as a {service} pod of that is ready{}; mend these{way_back}",
        short(seen, live)
    ))
}

fn candidate_ready(seen: &Observed, status: &Status) -> Verdict {
    // What the traffic leaves is not to become live.
    let candidate = status.candidate.as_ref();
    match candidate.filter(|_| status.phase != Phase::RollingBack) {
        None => verdict(false, NO_CANDIDATE, "there is no candidate"),
        Some(candidate) if lacking(seen, &candidate.stack).is_empty() => {
            verdict(true, "PodsReady", "all pods of the candidate are ready")
        }
        Some(candidate) => verdict(
            false,
            "PodsNotReady",
            pods(seen, &candidate.stack, "has not started"),
        ),
    }
}

/// The try that the gates are told about: the one under way, or the one that was given up.
fn judged(status: &Status) -> Option<(&Stack, u32)> {
    let given_up = matches!(status.phase, Phase::Failed | Phase::Held);
    let candidate = status.candidate.as_ref().map(|it| (&it.stack, it.attempt));
    let rejected = status.rejected.as_ref().filter(|_| given_up);
    candidate.or_else(|| rejected.map(|it| (&it.stack, it.attempt)))
}

fn migration<'a>(seen: &'a Observed, kind: JobKind, (stack, attempt): (&Stack, u32)) -> Option<&'a JobState> {
    let job = Job {
        kind,
        stack: stack.clone(),
        attempt,
    };
    seen.jobs.get(&job).map(|seen| &seen.state)
}

/// Why the contract migration of what is live has failed. Of one that was live before, and is again, its Job says it.
fn not_contracted<'a>(seen: &'a Observed, live: &'a Live) -> Option<&'a str> {
    let job = migration(seen, JobKind::Contract, (&live.stack, live.attempt));
    match (&live.contract_failed, job) {
        (Some(why), _) | (None, Some(JobState::Failed(why))) => Some(why),
        _ => None,
    }
}

fn schema_ready(seen: &Observed, status: &Status) -> Verdict {
    let judged = judged(status);
    if let Some(why) = status.live.as_ref().and_then(|it| not_contracted(seen, it)) {
        return verdict(
            false,
            "ContractFailed",
            format!("the contract migration of the live version failed: {why}"),
        );
    }
    let live = status.live.as_ref().map(|it| (&it.stack, it.attempt));
    if status.contract.is_some() && judged.is_none() {
        let message = format!("the contract migration runs{}", kept(seen, live));
        return verdict(true, "Contracting", message);
    }
    let expand = judged
        .or(live)
        .and_then(|it| migration(seen, JobKind::Expand, it));
    match (expand, judged) {
        (Some(JobState::Passed), _) => verdict(true, "Expanded", "the schema is expanded"),
        (Some(JobState::Failed(why)), _) => verdict(false, "MigrationFailed", why.clone()),
        (Some(JobState::Running), _) => verdict(false, "Migrating", "the expand migration runs"),
        (None, Some(_)) => verdict(false, NOT_STARTED, "the expand migration has not started"),
        (None, None) if status.live.is_some() => verdict(true, "Expanded", "the schema fits what is live"),
        (None, None) => verdict(false, NO_CANDIDATE, "there is no candidate"),
    }
}

fn tests_passed(spec: &Spec, seen: &Observed, status: &Status) -> Verdict {
    let live = status.live.as_ref().map(|it| (&it.stack, it.attempt));
    let judged = judged(status);
    let Some((stack, attempt)) = judged.or(live) else {
        return verdict(false, NO_CANDIDATE, "there is no candidate");
    };
    let mut kinds = vec![JobKind::Smoke];
    kinds.extend(
        spec.rollout
            .smoke_tests
            .iter()
            .map(|test| JobKind::Test(test.name.clone())),
    );
    let of_attempt = |kind: &JobKind| {
        seen.jobs
            .iter()
            .find(|(job, _)| job.kind == *kind && job.stack == *stack && job.attempt == attempt)
    };
    let passed = kinds
        .iter()
        .filter(|kind| of_attempt(kind).is_some_and(|(_, seen)| seen.state == JobState::Passed));
    let passed = passed.count();
    let named = token(stack, attempt);
    if passed == kinds.len() {
        return verdict(true, "TestsPassed", format!("all tests of {named} passed"));
    }
    if judged.is_none() {
        // Adopted, gone back to, or with other tests than those that are declared now.
        let message = format!("{named} is live: nothing is left to test");
        return verdict(true, "TestsPassed", message);
    }
    let message = format!("{passed} of {} tests of {named} passed", kinds.len());
    verdict(false, "TestsNotPassed", message)
}

/// Why there is no way back to the stack that was live before, if there is none.
pub(crate) fn no_way_back(seen: &Observed, status: &Status) -> String {
    rollback_available(seen, status).message
}

fn rollback_available(seen: &Observed, status: &Status) -> Verdict {
    let Some(previous) = &status.previous else {
        let live = status.live.as_ref().filter(|live| live.contracted);
        let because = live.map_or_else(String::new, |live| {
            let version = &live.version;
            let schema = match not_contracted(seen, live) {
                None => format!("the schema is contracted for {version}"),
                Some(_) => format!("the contract migration of {version} has failed, perhaps halfway"),
            };
            format!(", and {schema}: an older version comes back by a release of its own, if it bears that")
        });
        let message = format!("there is no stack to go back to{because}");
        return verdict(false, "NoPrevious", message);
    };
    let needed = status.phase == Phase::Pending;
    let version = &previous.version;
    if previous.state == PreviousState::Retiring {
        let reason = if needed { "ColourNeeded" } else { "Retiring" };
        return verdict(false, reason, format!("{version} is being removed"));
    }
    if !previous.way_back {
        return verdict(
            false,
            "KeptForLogs",
            format!("{version} is kept for its logs, and is no way back"),
        );
    }
    let there = seen.stacks.get(&previous.stack);
    let broken = there.is_some() && !is_whole(seen, &previous.stack);
    let broken = broken.then(|| not_whole(&previous.stack));
    if there.is_some_and(StackSeen::serves) {
        let until = match status.stopped_since {
            Some(_) => "while nothing is retired, and then for the rest of its time".to_owned(),
            None => format!("until {}", second(previous.until)),
        };
        let broken = broken.map_or_else(String::new, |it| format!("; {it}"));
        let message = format!("{version} {until}; {}{broken}", go_back(status));
        return verdict(true, "PreviousRetained", message);
    }
    let awaited = pods(seen, &previous.stack, "is not seen");
    match broken {
        Some(broken) => verdict(false, "PreviousNotWhole", format!("{awaited}; {broken}")),
        None => verdict(false, "PreviousNotReady", awaited),
    }
}

/// What a person can do to have the stack before again, if it can serve.
fn rollback(seen: &Observed, status: &Status) -> Option<String> {
    let version = &status.previous.as_ref()?.version;
    let available = rollback_available(seen, status).is;
    available.then(|| format!("to have {version} again, {}", go_back(status)))
}

fn go_back(status: &Status) -> String {
    let leave = status
        .live
        .as_ref()
        .map_or_else(String::new, |it| token(&it.stack, it.attempt));
    format!("go back with exchange.dev/rollback={leave}")
}
