//! What to do next: a pure function of what is declared, what is seen, and the time.
//!
//! A [`Plan`] is a record and a list of actions that the record allows. The record is written first, by an update that
//! carries the `resourceVersion` of the object that was observed; if that fails, nothing is done. So every action can
//! be repeated by whoever reads the record, and whoever was deposed, or asleep, finds its record refused.
//!
//! A release climbs a ladder of gates (schema, ready, tests, approval); its phase is the first gate that is not passed.
//! `Promoting` and `RollingBack` have one shape: `status.live` is the stack that had the traffic (or shall have it
//! again), `status.candidate` the one it is moved to (or from).

use std::time;

use jiff::{SignedDuration, Timestamp};
use kube::core::Duration;

use crate::{
    api::{ExchangeDeploymentSpec as Spec, Service},
    observe::{Declared, Job, JobKind, JobSeen, JobState, Observed, Part, Requests, StackSeen},
    plan::{AT_LEAST_EVERY, Event, Plan},
    release::Found,
    status::{
        Candidate, ExchangeDeploymentStatus as Status, HistoryEntry, Live, Outcome, Phase, Previous,
        PreviousState, Reason, Rejected, Request, Scale, ServiceScale, Stack, token,
    },
};

/// How long the old stack must have had nothing open before it counts as drained.
pub const QUIET: SignedDuration = SignedDuration::from_secs(5);
/// How long what is left of a release that was given up is kept for its logs.
pub const KEPT_FOR_LOGS: SignedDuration = SignedDuration::from_mins(10);
/// How long a swap waits for a stack that is short of some of its endpoints. A swap back then does with fewer, one forward
/// is given up; and so is what has been swapped to and has no endpoints for so long while it is verified.
pub const SHORT_OF_ENDPOINTS: SignedDuration = SignedDuration::from_secs(10);
/// What is declared together need not come together: how long something that the spec refers to may lack before people are told that
/// nothing goes on without them.
pub const COMES_LATER: SignedDuration = SignedDuration::from_secs(30);
/// Entries in the history.
pub const HISTORY: usize = 20;

/// Decides what to do.
pub fn decide(spec: &Spec, seen: &Observed, now: Timestamp) -> Plan {
    if seen.deleting {
        // Everything is owned by the object: the garbage collector does the rest.
        return Plan {
            status: None,
            actions: Vec::new(),
            events: Vec::new(),
            requeue: AT_LEAST_EVERY,
        };
    }
    let mut turn = Turn {
        spec,
        seen,
        now,
        next: seen.status.clone(),
        events: Vec::new(),
    };
    if let Ok(declared) = &seen.declared {
        turn.next.gates.clone_from(&declared.gates);
    }
    // Of another declaration other things may be about to come.
    let same = seen.status.observed_generation == Some(seen.generation);
    let missing_since = turn.next.missing_since.filter(|_| same).unwrap_or(now);
    turn.next.missing_since = seen.declared.is_err().then_some(missing_since);
    turn.hear();
    turn.stop_or_resume();
    let undecided = turn.adopt(Found::by(spec, seen));
    if undecided.is_none() {
        match turn.next.phase {
            Phase::Promoting => turn.promoting(),
            Phase::RollingBack => turn.rolling_back(),
            Phase::Verifying => turn.verifying(),
            _ => turn.releasing(),
        }
        turn.old_stack();
        turn.contract();
        turn.scale();
    }
    turn.next.observed_generation = Some(seen.generation);
    crate::report::report(spec, seen, undecided.as_deref(), &mut turn.next, now);
    let actions = if undecided.is_some() {
        Vec::new()
    } else {
        turn.actions()
    };
    let changed = turn.next != seen.status;
    let requeue = turn.requeue(changed, undecided.is_some(), !actions.is_empty());
    Plan {
        status: changed.then_some(turn.next),
        actions,
        events: turn.events,
        requeue,
    }
}

/// One pass: what it goes by, and what it comes to.
pub(crate) struct Turn<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) seen: &'a Observed,
    pub(crate) now: Timestamp,
    pub(crate) next: Status,
    pub(crate) events: Vec<Event>,
}

/// Whether what is declared is the live stack.
fn reached(spec: &Spec, status: &Status, declared: &Declared) -> bool {
    let colour = spec.rollout.colour.fixed();
    status.live.as_ref().is_some_and(|live| {
        live.stack.revision == declared.revision && colour.is_none_or(|colour| colour == live.stack.colour)
    })
}

/// Whether what is declared is what was given up.
pub(crate) fn rejects(spec: &Spec, status: &Status, declared: &Declared) -> bool {
    let live = status.live.as_ref().map(|live| &live.stack);
    let colour = spec.rollout.colour.fixed();
    status.rejected.as_ref().is_some_and(|rejected| {
        rejected.stack.revision == declared.revision
            // In another colour it is live.
            && !(reached(spec, status, declared) && live != Some(&rejected.stack))
            // Of what was adopted nobody knows the gates.
            && (rejected.gates.is_empty() || declared.has_gates(&rejected.gates))
            && colour.is_none_or(|colour| colour == rejected.stack.colour)
    })
}

impl Turn<'_> {
    // ---- time -------------------------------------------------------------------------------------------------

    pub(crate) fn paused(&self) -> bool {
        let meant = self
            .next
            .candidate
            .as_ref()
            .map(|candidate| token(&candidate.stack, candidate.attempt))
            .or_else(|| {
                self.next
                    .live
                    .as_ref()
                    .map(|live| token(&live.stack, live.attempt))
            });
        meant.is_some() && meant == self.seen.requests.pause
    }

    pub(crate) fn stopped(&self) -> bool {
        self.next.stopped_since.is_some()
    }

    /// Paused or suspended, time stands still: what had begun is moved forward by that time afterwards. Not so a move of the
    /// traffic, for which it has gone on.
    pub(crate) fn stop_or_resume(&mut self) {
        let stop = self.spec.suspend || self.paused();
        let moves = self.next.phase.moves();
        match (stop, self.next.stopped_since) {
            (true, None) => {
                self.next.stopped_since = Some(self.now);
                self.tell(
                    false,
                    "Stopped",
                    "nothing new starts until this is resumed".to_owned(),
                );
            }
            (false, Some(since)) => {
                let lost = self.now.duration_since(since);
                self.next.stopped_since = None;
                if let Some(begun) = self.next.phase_since.as_mut().filter(|_| !moves) {
                    *begun = later(*begun, lost);
                }
                if let Some(previous) = &mut self.next.previous {
                    previous.since = later(previous.since, lost);
                    previous.until = later(previous.until, lost);
                }
                self.tell(false, "Resumed", "deadlines and retention go on".to_owned());
            }
            _ => {}
        }
    }

    /// The time by which deadlines are judged.
    pub(crate) fn clock(&self) -> Timestamp {
        self.next.stopped_since.unwrap_or(self.now)
    }

    /// The time that goes by for a phase.
    fn time_of(&self, phase: Phase) -> Timestamp {
        if phase.moves() { self.now } else { self.clock() }
    }

    pub(crate) fn elapsed(&self) -> SignedDuration {
        let now = self.time_of(self.next.phase);
        self.next
            .phase_since
            .map_or(SignedDuration::ZERO, |since| now.duration_since(since))
    }

    /// Whether the phase has lasted too long. Judged only when this operator has seen the phase before, so that the time
    /// in which none looked is not held against a release that only had to be looked at.
    pub(crate) fn overdue(&self) -> bool {
        self.watched() && self.elapsed() >= time_for(self.spec, &self.next)
    }

    /// Whether this operator has seen the whole of the phase before, and could do what was to be done.
    pub(crate) fn watched(&self) -> bool {
        let same = self.next.phase == self.seen.status.phase && self.next.attempt == self.seen.status.attempt;
        same && self.seen.seen_before
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        if self.next.phase != phase {
            self.next.phase = phase;
            self.next.phase_since = Some(self.time_of(phase));
            if matches!(phase, Phase::Live | Phase::Failed | Phase::Held) {
                self.next.verification = None;
            }
        }
    }

    // ---- what is seen -----------------------------------------------------------------------------------------

    pub(crate) fn stack(&self, stack: &Stack) -> Option<&StackSeen> {
        self.seen.stacks.get(stack)
    }

    pub(crate) fn job(&self, kind: JobKind, stack: &Stack, attempt: u32) -> Option<&JobSeen> {
        self.seen.jobs.get(&Job {
            kind,
            stack: stack.clone(),
            attempt,
        })
    }

    pub(crate) fn state(&self, kind: JobKind, stack: &Stack, attempt: u32) -> Option<&JobState> {
        self.job(kind, stack, attempt).map(|job| &job.state)
    }

    pub(crate) fn declared(&self) -> Option<&Declared> {
        self.seen.declared.as_ref().ok()
    }

    /// Whether this revision is what is declared, and nothing lacks to make it.
    pub(crate) fn is_declared(&self, stack: &Stack) -> bool {
        self.declared().is_some_and(|it| it.revision == stack.revision)
    }

    pub(crate) fn reached(&self, declared: &Declared) -> bool {
        reached(self.spec, &self.next, declared)
    }

    pub(crate) fn rejects(&self, declared: &Declared) -> bool {
        rejects(self.spec, &self.next, declared)
    }

    /// Replicas that a stack needs to take over: as many as are declared, as the live stack has, and, while it may have clients, as it
    /// has already. One that waits, for its promotion or as the way back, gives back what it has grown with the live one; and
    /// one that is no way back does not grow.
    pub(crate) fn wanted(&self, stack: &Stack, service: Service) -> u32 {
        let count = |stack: &Stack| self.seen.replicas(stack, service);
        let live = self.next.live.as_ref().map_or(0, |live| count(&live.stack));
        let declared = u32::try_from(self.spec.services.get(service).replicas).unwrap_or(1);
        let previous = self.next.previous.as_ref().filter(|it| it.stack == *stack);
        let is_candidate = self.next.candidate.as_ref().is_some_and(|it| it.stack == *stack);
        let is_idle = |it: &Previous| it.state == PreviousState::Retained && it.idle_since.is_some();
        let waits = match self.next.phase {
            Phase::AwaitingPromotion if is_candidate => true,
            phase => !phase.moves() && previous.is_some_and(is_idle),
        };
        // Also if somebody takes away what is live, which may need it soon.
        let has = if waits {
            count(stack).min(declared)
        } else {
            count(stack)
        };
        match previous {
            Some(previous) if !previous.way_back => count(stack).max(1),
            _ if is_candidate => declared.max(live).max(has),
            _ if count(stack) == 0 && live == 0 => declared,
            _ => live.max(has).max(1),
        }
    }

    /// The gate of the swap that is about the candidate itself.
    pub(crate) fn ready(&self, stack: &Stack) -> bool {
        self.stack(stack).is_some_and(|seen| {
            seen.rendered.is_some()
                && Service::ALL.iter().all(|service| {
                    let parts = seen.service(*service).map(|seen| &seen.parts);
                    let intact = |part| parts.and_then(|it| it.get(&part)).is_some_and(|it| it.intact);
                    let replicas = seen.service(*service).map_or(0, |it| it.replicas);
                    seen.ready(*service) >= self.wanted(stack, *service).max(replicas)
                        && seen.service(*service).is_some_and(|it| it.current)
                        && [Part::ColourService, Part::Budget, Part::Workload]
                            .into_iter()
                            .all(intact)
                })
        })
    }

    pub(crate) fn tests(&self) -> impl Iterator<Item = JobKind> + '_ {
        let own = self
            .spec
            .rollout
            .smoke_tests
            .iter()
            .map(|test| JobKind::Test(test.name.clone()));
        std::iter::once(JobKind::Smoke).chain(own)
    }

    pub(crate) fn tested(&self, stack: &Stack, attempt: u32) -> bool {
        self.tests()
            .all(|kind| self.state(kind, stack, attempt) == Some(&JobState::Passed))
    }

    // ---- the record -------------------------------------------------------------------------------------------

    pub(crate) fn tell(&mut self, warning: bool, reason: &'static str, note: String) {
        self.events.push(Event {
            warning,
            reason,
            note,
        });
    }

    pub(crate) fn remember(
        &mut self,
        what: (Stack, String, u32),
        outcome: Outcome,
        reason: Option<Reason>,
        by: &str,
    ) {
        let (stack, version, attempt) = what;
        let entry = HistoryEntry {
            at: self.now,
            stack,
            version,
            attempt,
            outcome,
            reason,
            by: by.to_owned(),
        };
        self.next.history.insert(0, entry);
        self.next.history.truncate(HISTORY);
    }

    /// Writes down who asks for what, as soon as it is asked: whoever signs something else later has not asked for this.
    fn hear(&mut self) {
        let Requests {
            promote,
            abort,
            rollback,
            retry,
            pause,
            by,
        } = &self.seen.requests;
        let asked = &mut self.next.asked;
        let mut news: Vec<_> = [
            (promote, &mut asked.promote),
            (abort, &mut asked.abort),
            (rollback, &mut asked.rollback),
            (retry, &mut asked.retry),
            (pause, &mut asked.pause),
        ]
        .into_iter()
        .filter(|(heard, asked)| heard.as_ref() != asked.as_ref().map(|it| &it.value))
        .collect();
        // Of several that have come since the last look, whoever wrote last has signed: for all of them, as it would seem.
        // And what is there at the first look may have come with the object, of which nobody checks who has signed.
        let signed = news.len() == 1 && !self.seen.status.is_unrecorded();
        for (heard, asked) in &mut news {
            **asked = heard.clone().map(|value| Request {
                value,
                by: by.clone().filter(|_| signed),
            });
        }
    }

    /// Gives the candidate up before its swap. What is live is not touched.
    pub(crate) fn fail(&mut self, reason: Reason, message: String, by: &str) {
        let Some(candidate) = self.next.candidate.take() else {
            return;
        };
        self.tell(
            true,
            "ReleaseFailed",
            format!("{} was given up: {message}", candidate.version),
        );
        self.remember(named(&candidate), Outcome::Failed, Some(reason), by);
        self.reject(candidate, reason, message);
        self.enter(Phase::Failed);
    }

    /// With the gates that are declared now, not those of the attempt: the same declaration is not tried again by itself. Nor is another
    /// one that was given up before and is still declared: that one stays recorded, whoever or whatever leaves this one.
    pub(crate) fn reject(&mut self, candidate: Candidate, reason: Reason, message: String) {
        let before = self
            .next
            .rejected
            .as_ref()
            .filter(|it| it.stack != candidate.stack);
        // While something is missing of what is declared, its version says whether it is.
        let declared = |it: &Rejected| match self.declared() {
            Some(declared) => self.rejects(declared),
            None => it.version == self.spec.version,
        };
        if before.is_some_and(declared) {
            return;
        }
        let Candidate {
            stack,
            version,
            attempt,
            scale,
            ..
        } = candidate;
        self.next.rejected = Some(Rejected {
            stack,
            version,
            attempt,
            gates: self.next.gates.clone(),
            reason,
            message,
            scale: scale.or_else(|| Some(Scale::declared(self.spec))),
            until: later(self.now, KEPT_FOR_LOGS),
        });
    }

    /// Records that the traffic shall go back. `why` is missing when the spec itself names the old version again.
    pub(crate) fn roll_back(&mut self, why: Option<(Reason, String)>, by: &str) {
        let because = why.as_ref().map(|(_, message)| format!(": {message}"));
        if self.next.phase == Phase::Promoting {
            // Not live yet: the stack that had the traffic still is `live`.
            if let (Some(candidate), Some((reason, message))) = (self.next.candidate.clone(), why) {
                self.remember(named(&candidate), Outcome::Failed, Some(reason), by);
                self.reject(candidate, reason, message);
            }
            if let Some(candidate) = &mut self.next.candidate {
                candidate.forced = false;
            }
        } else {
            let (Some(live), Some(previous)) = (self.next.live.take(), self.next.previous.take()) else {
                return;
            };
            let left = self.left(live);
            self.remember(
                named(&left),
                Outcome::RolledBack,
                why.as_ref().map(|(reason, _)| *reason),
                by,
            );
            match why {
                Some((reason, message)) => self.reject(left.clone(), reason, message),
                None => self.next.rejected = None,
            }
            self.next.candidate = Some(left);
            self.next.live = Some(Live {
                verified: previous.verified,
                contracted: previous.contracted,
                scale: previous.scale,
                ..Live::new(previous.stack, previous.version, previous.attempt, self.now)
            });
        }
        self.next.epoch += 1;
        self.enter(Phase::RollingBack);
        let to = self
            .next
            .live
            .as_ref()
            .map_or_else(|| "nothing".to_owned(), |live| live.version.clone());
        let because = because.unwrap_or_default();
        self.tell(
            true,
            "RollingBack",
            format!("the traffic goes back to {to}{because}"),
        );
    }

    /// A stack that has been live and is given up.
    pub(crate) fn left(&self, live: Live) -> Candidate {
        Candidate {
            stack: live.stack,
            version: live.version,
            attempt: live.attempt,
            gates: self.next.gates.clone(),
            scale: None,
            tested: None,
            approved_by: None,
            unneeded_since: None,
            forced: false,
        }
    }

    /// How many pods the live stack has is as declared for it. What came with another revision waits for that one to be
    /// promoted; what is changed while that is under way, or after it was given up, is meant for what is live. Of a stack that
    /// was taken over nobody knows what was declared for it: until it is declared, or another is promoted, it stays as it was found.
    pub(crate) fn scale(&mut self) {
        let now = Scale::declared(self.spec);
        let found = self.found_scale(&now);
        let declared = self.declared();
        let reached = declared.is_some_and(|it| self.reached(it)) && self.next.rejected.is_none();
        let given_up = declared.is_some_and(|it| self.rejects(it));
        let revision = declared.map(|it| it.revision.clone());
        let under_way = self.next.candidate.as_mut();
        let under_way = under_way.filter(|it| revision.as_ref() == Some(&it.stack.revision));
        let before = match &mut self.next.rejected {
            Some(rejected) if given_up => Some(&mut rejected.scale),
            _ => under_way.map(|it| &mut it.scale),
        };
        let before = before.and_then(|it| it.replace(now.clone()));
        let Some(live) = &mut self.next.live else {
            return;
        };
        let scale = live.scale.get_or_insert(found);
        for service in Service::ALL {
            let (now, before) = (now.of(service), before.as_ref().map(|it| it.of(service)));
            let scale = scale.of_mut(service);
            if reached || before.is_some_and(|it| it.replicas != now.replicas) {
                scale.replicas = now.replicas;
            }
            if reached || before.is_some_and(|it| it.autoscaling != now.autoscaling) {
                scale.autoscaling.clone_from(&now.autoscaling);
            }
        }
    }

    /// How many pods the live stack has now, and what makes them as many; where it has none, as declared.
    fn found_scale(&self, declared: &Scale) -> Scale {
        let mut scale = declared.clone();
        let live = self.next.live.as_ref().and_then(|live| self.stack(&live.stack));
        for service in Service::ALL {
            let there = live.and_then(|live| live.service(service));
            if let Some(there) = there.filter(|it| it.replicas > 0) {
                *scale.of_mut(service) = ServiceScale {
                    replicas: i32::try_from(there.replicas).unwrap_or(i32::MAX),
                    autoscaling: there.autoscaling.clone(),
                };
            }
        }
        scale
    }

    /// What the API server does not accept may be the cause.
    pub(crate) fn blamed(&self, message: &str) -> String {
        format!("{message}{}", crate::report::refused(self.seen, &self.next))
    }

    /// A rollback that somebody has asked for: of exactly the stack that is to be left.
    pub(crate) fn asked_to_leave(&mut self, stack: &Stack, attempt: u32) -> bool {
        let asked = self.seen.requests.rollback.clone();
        let meant =
            asked.is_some() && asked == Some(token(stack, attempt)) && asked != self.next.handled.rollback;
        if meant {
            self.next.handled.rollback = asked;
        }
        meant
    }

    /// Whether beside the release an old stack or a contract migration is about to come to its end.
    fn ends_something(&self) -> bool {
        let previous = self.next.previous.as_ref().map(|previous| previous.state);
        let old = match previous {
            Some(PreviousState::Draining) => !self.stopped(),
            Some(PreviousState::Retiring) => true,
            Some(PreviousState::Retained) | None => false,
        };
        old || self.next.contract.is_some()
    }

    /// When to look again, if there is a record to write, if nobody can say what is live, if there is something to do.
    fn requeue(&self, changed: bool, undecided: bool, acts: bool) -> time::Duration {
        if changed {
            return time::Duration::ZERO;
        }
        // What is missing, or belongs to somebody else, is not watched.
        let waits = self.seen.declared.is_err() || !self.seen.is_free();
        let seconds = match self.next.phase {
            // Whoever has to work on what is written needs a moment. What cannot be written is not tried all the time.
            _ if acts && self.seen.refused.is_none() => Some(1),
            _ if undecided => Some(10),
            Phase::Promoting | Phase::RollingBack => Some(1),
            _ if self.ends_something() => Some(1),
            Phase::Verifying => Some(if self.stopped() { 10 } else { 1 }),
            _ if waits => Some(10),
            // Somebody has to do something, or time to go by.
            Phase::Live | Phase::Held | Phase::Failed | Phase::AwaitingPromotion => None,
            _ if self.stopped() => None,
            // Its colour is in use.
            Phase::Pending if self.next.candidate.is_none() => None,
            // What it waits for is watched. Why it waits is not: that is for people.
            _ => Some(2),
        };
        if let Some(seconds) = seconds {
            return time::Duration::from_secs(seconds);
        }
        let until = [
            self.next.previous.as_ref().map(|previous| previous.until),
            self.next.rejected.as_ref().map(|rejected| rejected.until),
        ];
        let wait = until
            .into_iter()
            .flatten()
            .filter(|until| *until > self.now)
            .map(|until| until.duration_since(self.now));
        let wait = wait.filter_map(|wait| time::Duration::try_from(wait).ok()).min();
        wait.unwrap_or(time::Duration::MAX)
            .clamp(time::Duration::from_secs(1), AT_LEAST_EVERY)
    }
}

/// Who has asked, as the history has it.
pub(crate) fn asker(asked: Option<&Request>) -> String {
    let by = asked.and_then(|it| it.by.clone());
    by.unwrap_or_else(|| "unverified".to_owned())
}

/// What somebody did, for people: the history has a name that stands for nobody.
pub(crate) fn somebody(asked: Option<&Request>, did: &str) -> String {
    let by = asked.and_then(|it| it.by.as_deref()).unwrap_or("somebody");
    format!("{by} {did}")
}

pub(crate) fn named(candidate: &Candidate) -> (Stack, String, u32) {
    (
        candidate.stack.clone(),
        candidate.version.clone(),
        candidate.attempt,
    )
}

pub(crate) fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(time::Duration::from(duration)).unwrap_or(SignedDuration::MAX)
}

/// How long the phase may last.
pub(crate) fn time_for(spec: &Spec, status: &Status) -> SignedDuration {
    let deadline = signed(spec.rollout.progress_deadline);
    match status.phase {
        // A test is given the time that is declared for it.
        Phase::Testing => {
            let tests = spec.rollout.smoke_tests.iter().map(|test| signed(test.timeout));
            tests.max().unwrap_or_default().max(deadline)
        }
        // Its test has passed: nothing more is due before the end of its duration.
        Phase::Verifying if status.live.as_ref().is_some_and(|live| live.smoke_passed) => {
            signed(status.verification(spec).duration) + deadline
        }
        _ => deadline,
    }
}

pub(crate) fn later(time: Timestamp, by: SignedDuration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}
