//! What to do next: a pure function of what is declared, what is seen, and the time.
//!
//! A [`Plan`] is a record and a list of actions that the record allows. The record is written first, by an update that
//! carries the `resourceVersion` of the object that was observed; if that fails, nothing is done. So every action can
//! be repeated by whoever reads the record, and whoever was deposed, or asleep, finds its record refused.
//!
//! A release climbs a ladder of gates (schema, ready, tests, approval); its phase is the first gate that is not passed.
//! `Promoting` and `RollingBack` have one shape: `status.live` is the stack that had the traffic (or shall have it
//! again), `status.candidate` the one it is moved to (or from).

use std::{collections::BTreeSet, time};

use jiff::{SignedDuration, Timestamp};
use kube::core::Duration;

use crate::{
    api::{ExchangeDeploymentSpec as Spec, Promotion, Service},
    observe::{Declared, Fence, Job, JobKind, JobState, Observed, Part, StackSeen, Target},
    status::{
        Candidate, Colour, Contract, ExchangeDeploymentStatus as Status, HistoryEntry, Live, Outcome, Phase,
        Previous, PreviousState, Reason, Rejected, Replicas, Stack, token,
    },
};

/// How long the old stack must have had nothing open before it counts as drained.
pub const QUIET: SignedDuration = SignedDuration::from_secs(5);
/// How long what is left of a release that was given up is kept for its logs.
pub const KEPT_FOR_LOGS: SignedDuration = SignedDuration::from_mins(10);
/// How long a swap waits for a stack that is short of some of its endpoints. A swap back then does with fewer, one forward
/// is given up.
pub const SHORT_OF_ENDPOINTS: SignedDuration = SignedDuration::from_secs(10);
/// Entries in the history.
pub const HISTORY: usize = 20;
/// Number of later attempts after which a finished contract Job is forgotten. Until then its name is taken, so that an
/// operator that slept cannot start it again.
pub const CONTRACTS_KEPT: u32 = 10;

/// What to record, to do, to tell, and when to look again.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The record to write first, if it differs from the one that was observed.
    pub status: Option<Status>,
    /// What to do after that, in this order, until one fails.
    pub actions: Vec<Action>,
    /// What to tell people, after the record is written.
    pub events: Vec<Event>,
    /// When to look again at the latest.
    pub requeue: time::Duration,
}

/// One write. What exists is changed or deleted only in the state in which it was observed; what has no fence is
/// created only if it does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Create a live Service that points at nothing. (Created pointing at a stack, it could not be fenced.)
    CreateLive {
        /// Which one.
        service: Service,
    },
    /// Point a live Service at a stack, or at nothing.
    Point {
        /// Which one.
        service: Service,
        /// As it was observed.
        fence: Fence,
        /// Where to.
        to: Option<Stack>,
        /// Number of this move.
        epoch: u32,
        /// What for.
        intent: Intent,
    },
    /// Create the rendered stack, and before it what it names: the copies of ConfigMaps and Secrets, the ServiceAccount.
    Render {
        /// Which stack.
        stack: Stack,
        /// For which attempt.
        attempt: u32,
        /// Its version.
        version: String,
    },
    /// Create an object of a stack, or make it again what was rendered.
    Apply {
        /// Which stack.
        stack: Stack,
        /// Which service.
        service: Service,
        /// Which object.
        part: Part,
        /// Replicas of a workload.
        replicas: u32,
        /// As it was observed.
        fence: Option<Fence>,
    },
    /// Delete an object of a stack.
    Delete {
        /// Which stack.
        stack: Stack,
        /// Which service.
        service: Service,
        /// Which object.
        part: Part,
        /// As it was observed.
        fence: Fence,
    },
    /// Delete the rendered stack and with it all that it owns.
    Unrender {
        /// Which stack.
        stack: Stack,
        /// As it was observed.
        fence: Fence,
    },
    /// Create a Job.
    Run(Job),
    /// Delete a Job and its pods.
    DeleteJob(Job, Fence),
}

/// What a live Service is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// The swap.
    Promote,
    /// The swap back.
    RollBack,
    /// Somebody else has changed the selector.
    Repair,
}

/// Something that people are told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whether it is bad news.
    pub warning: bool,
    /// What happened, as one word.
    pub reason: &'static str,
    /// What happened, as a sentence.
    pub note: String,
}

/// Decides what to do.
pub fn decide(spec: &Spec, seen: &Observed, now: Timestamp) -> Plan {
    if seen.deleting {
        // Everything is owned by the object: the garbage collector does the rest.
        return Plan {
            status: None,
            actions: Vec::new(),
            events: Vec::new(),
            requeue: time::Duration::from_hours(1),
        };
    }
    let mut turn = Turn {
        spec,
        seen,
        now,
        next: seen.status.clone(),
        events: Vec::new(),
    };
    turn.stop_or_resume();
    turn.adopt();
    turn.catch_up();
    match turn.next.phase {
        Phase::Promoting => turn.promoting(),
        Phase::RollingBack => turn.rolling_back(),
        Phase::Verifying => turn.verifying(),
        _ => turn.releasing(),
    }
    turn.old_stack();
    turn.contract();
    turn.next.observed_generation = Some(seen.generation);
    crate::report::report(spec, seen, &mut turn.next, now);
    let actions = turn.actions();
    let changed = turn.next != seen.status;
    let requeue = turn.requeue(changed);
    Plan {
        status: changed.then_some(turn.next),
        actions,
        events: turn.events,
        requeue,
    }
}

/// Replicas as declared.
pub fn declared_replicas(spec: &Spec) -> Replicas {
    Replicas {
        user: spec.services.user.replicas,
        trade: spec.services.trade.replicas,
        notification: spec.services.notification.replicas,
    }
}

struct Turn<'a> {
    spec: &'a Spec,
    seen: &'a Observed,
    now: Timestamp,
    next: Status,
    events: Vec<Event>,
}

impl Turn<'_> {
    // ---- time -------------------------------------------------------------------------------------------------

    fn paused(&self) -> bool {
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

    fn stopped(&self) -> bool {
        self.next.stopped_since.is_some()
    }

    /// Paused or suspended, time stands still: what had begun is moved forward by that time afterwards.
    fn stop_or_resume(&mut self) {
        let stop = self.spec.suspend || self.paused();
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
                if let Some(begun) = &mut self.next.phase_since {
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
    fn clock(&self) -> Timestamp {
        self.next.stopped_since.unwrap_or(self.now)
    }

    fn elapsed(&self) -> SignedDuration {
        self.next
            .phase_since
            .map_or(SignedDuration::ZERO, |since| self.clock().duration_since(since))
    }

    /// Whether the phase has lasted too long. Judged only when this operator has seen the phase before, so that the time
    /// in which none looked is not held against a release that only had to be looked at.
    fn overdue(&self) -> bool {
        let same = self.next.phase == self.seen.status.phase && self.next.attempt == self.seen.status.attempt;
        same && self.seen.seen_before && self.elapsed() >= signed(self.spec.rollout.progress_deadline)
    }

    fn enter(&mut self, phase: Phase) {
        if self.next.phase != phase {
            self.next.phase = phase;
            self.next.phase_since = Some(self.clock());
        }
    }

    // ---- what is seen -----------------------------------------------------------------------------------------

    fn stack(&self, stack: &Stack) -> Option<&StackSeen> {
        self.seen.stacks.get(stack)
    }

    fn state(&self, kind: JobKind, stack: &Stack, attempt: u32) -> Option<&JobState> {
        self.seen
            .jobs
            .get(&Job {
                kind,
                stack: stack.clone(),
                attempt,
            })
            .map(|job| &job.state)
    }

    fn declared(&self) -> Option<&Declared> {
        self.seen.declared.as_ref().ok()
    }

    /// Whether what is declared is the live stack.
    fn reached(&self, declared: &Declared) -> bool {
        self.next.live.as_ref().is_some_and(|live| {
            live.stack.revision == declared.revision
                && self
                    .spec
                    .rollout
                    .colour
                    .fixed()
                    .is_none_or(|colour| colour == live.stack.colour)
        })
    }

    fn rejects(&self, declared: &Declared) -> bool {
        self.next.rejected.as_ref().is_some_and(|rejected| {
            rejected.stack.revision == declared.revision
                && rejected.gates == declared.gates
                && self
                    .spec
                    .rollout
                    .colour
                    .fixed()
                    .is_none_or(|colour| colour == rejected.stack.colour)
        })
    }

    /// Replicas that a stack needs to take over: as many as are declared, as the live stack has, and as it has already.
    fn wanted(&self, stack: &Stack, service: Service) -> u32 {
        let count = |stack: &Stack| {
            self.stack(stack)
                .and_then(|seen| seen.service(service))
                .map_or(0, |seen| seen.replicas)
        };
        let live = self.next.live.as_ref().map_or(0, |live| count(&live.stack));
        let declared = u32::try_from(self.spec.services.get(service).replicas).unwrap_or(1);
        match &self.next.candidate {
            Some(candidate) if candidate.stack == *stack => declared.max(live).max(count(stack)),
            _ if count(stack) == 0 && live == 0 => declared,
            _ => live.max(count(stack)).max(1),
        }
    }

    /// The gate of the swap that is about the candidate itself.
    fn ready(&self, stack: &Stack) -> bool {
        self.stack(stack).is_some_and(|seen| {
            seen.rendered.is_some()
                && Service::ALL.iter().all(|service| {
                    seen.ready(*service) >= self.wanted(stack, *service)
                        && seen
                            .service(*service)
                            .and_then(|seen| seen.parts.get(&Part::Workload))
                            .is_some_and(|workload| workload.intact)
                })
        })
    }

    fn tests(&self) -> impl Iterator<Item = JobKind> + '_ {
        let own = self
            .spec
            .rollout
            .smoke_tests
            .iter()
            .map(|test| JobKind::Test(test.name.clone()));
        std::iter::once(JobKind::Smoke).chain(own)
    }

    fn tested(&self, stack: &Stack, attempt: u32) -> bool {
        self.tests()
            .all(|kind| self.state(kind, stack, attempt) == Some(&JobState::Passed))
    }

    // ---- the record -------------------------------------------------------------------------------------------

    fn tell(&mut self, warning: bool, reason: &'static str, note: String) {
        self.events.push(Event {
            warning,
            reason,
            note,
        });
    }

    fn remember(&mut self, what: (Stack, String, u32), outcome: Outcome, reason: Option<Reason>, by: &str) {
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

    fn asker(&self) -> String {
        self.seen
            .requests
            .by
            .clone()
            .unwrap_or_else(|| "unverified".to_owned())
    }

    /// Gives the candidate up before its swap. What is live is not touched.
    fn fail(&mut self, reason: Reason, message: String, by: &str) {
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

    fn reject(&mut self, candidate: Candidate, reason: Reason, message: String) {
        let Candidate {
            stack,
            version,
            attempt,
            gates,
        } = candidate;
        self.next.rejected = Some(Rejected {
            stack,
            version,
            attempt,
            gates,
            reason,
            message,
            replicas: declared_replicas(self.spec),
            until: later(self.now, KEPT_FOR_LOGS),
        });
    }

    /// Records that the traffic shall go back. `why` is missing when the spec itself names the old version again.
    fn roll_back(&mut self, why: Option<(Reason, String)>, by: &str) {
        if self.next.phase == Phase::Promoting {
            // Not live yet: the stack that had the traffic still is `live`.
            if let (Some(candidate), Some((reason, message))) = (self.next.candidate.clone(), why) {
                self.remember(named(&candidate), Outcome::Failed, Some(reason), by);
                self.reject(candidate, reason, message);
            }
        } else {
            let (Some(live), Some(previous)) = (self.next.live.take(), self.next.previous.take()) else {
                return;
            };
            let gates = self.next.rejected.take().map_or_else(
                || {
                    self.declared()
                        .map_or_else(String::new, |declared| declared.gates.clone())
                },
                |rejected| rejected.gates,
            );
            let left = Candidate {
                stack: live.stack,
                version: live.version,
                attempt: live.attempt,
                gates,
            };
            self.remember(
                named(&left),
                Outcome::RolledBack,
                why.as_ref().map(|(reason, _)| *reason),
                by,
            );
            if let Some((reason, message)) = why {
                self.reject(left.clone(), reason, message);
            }
            self.next.candidate = Some(left);
            self.next.live = Some(Live {
                stack: previous.stack,
                version: previous.version,
                attempt: previous.attempt,
                since: self.now,
                verified: previous.verified,
                contracted: previous.contracted,
            });
        }
        self.next.epoch += 1;
        self.enter(Phase::RollingBack);
        let to = self
            .next
            .live
            .as_ref()
            .map_or_else(|| "nothing".to_owned(), |live| live.version.clone());
        self.tell(true, "RollingBack", format!("the traffic goes back to {to}"));
    }

    /// A rollback that somebody has asked for: of exactly the stack that is to be left.
    fn asked_to_leave(&mut self, stack: &Stack, attempt: u32) -> bool {
        let asked = self.seen.requests.rollback.clone();
        let meant =
            asked.is_some() && asked == Some(token(stack, attempt)) && asked != self.next.handled.rollback;
        if meant {
            self.next.handled.rollback = asked;
        }
        meant
    }

    // ---- phases -----------------------------------------------------------------------------------------------

    /// An object that was deleted without its children and created again finds its stacks as they were.
    fn adopt(&mut self) {
        if self.next.live.is_some() || self.next.attempt > 0 || self.next.epoch > 0 {
            return;
        }
        let mut targets = self.seen.live.values().map(|live| &live.target);
        let Some(Target::Stack(first)) = targets.next() else {
            return;
        };
        let all = self.seen.live.len() == Service::ALL.len() && targets.all(|target| target.is(Some(first)));
        let Some(stack) = self.stack(first).filter(|stack| all && stack.rendered.is_some()) else {
            return;
        };
        let live = Live {
            stack: first.clone(),
            version: stack.version.clone(),
            attempt: stack.attempt,
            since: self.now,
            verified: true,
            contracted: false,
        };
        self.next.attempt = self.highest_attempt();
        self.next.epoch = self.seen.live.values().map(|live| live.epoch).max().unwrap_or(0);
        self.tell(false, "Adopted", format!("{} was found to be live", live.version));
        self.next.live = Some(live);
        self.enter(Phase::Live);
    }

    /// A live Service with a later move than the record's means that somebody else has written its number, or that
    /// the record is an old one. Recording that number tells which: an old record is refused, and with it the pass.
    fn catch_up(&mut self) {
        let moves = self.seen.live.values().map(|live| live.epoch);
        self.next.epoch = moves.chain([self.next.epoch]).max().unwrap_or(0);
    }

    fn highest_attempt(&self) -> u32 {
        let jobs = self.seen.jobs.keys().map(|job| job.attempt);
        let stacks = self.seen.stacks.values().map(|stack| stack.attempt);
        jobs.chain(stacks).chain([self.next.attempt]).max().unwrap_or(0)
    }

    fn promoting(&mut self) {
        let Some(candidate) = self.next.candidate.clone() else {
            return;
        };
        if self.asked_to_leave(&candidate.stack, candidate.attempt) {
            let by = self.asker();
            self.roll_back(
                Some((Reason::RolledBack, format!("{by} asked for the way back"))),
                &by,
            );
        } else if self.moved(Some(&candidate.stack)) && self.arrived(&candidate.stack) {
            self.swapped(candidate);
        } else if let Some(service) = self.lost(&candidate.stack) {
            let message =
                format!("the {service} service of the new stack lost its endpoints during the swap");
            self.roll_back(Some((Reason::PromotionFailed, message)), "operator");
        } else if self.overdue() {
            let message = "the swap was not finished in time".to_owned();
            self.roll_back(Some((Reason::PromotionFailed, message)), "operator");
        }
    }

    /// Whether all live Services have been written by the present move.
    fn moved(&self, to: Option<&Stack>) -> bool {
        Service::ALL.iter().all(|service| self.is_moved(*service, to))
    }

    fn is_moved(&self, service: Service, to: Option<&Stack>) -> bool {
        self.seen
            .live
            .get(&service)
            .is_some_and(|live| live.epoch == self.next.epoch && live.target.is(to))
    }

    /// Whether the traffic has followed the selectors: the slices list nothing else, and new connections agree.
    fn arrived(&self, stack: &Stack) -> bool {
        self.seen.answers.as_ref() == Some(stack)
            && self
                .seen
                .live
                .values()
                .all(|live| live.endpoints.as_slice() == std::slice::from_ref(stack))
    }

    /// A service that is still to be moved and has nowhere to go.
    fn lost(&self, stack: &Stack) -> Option<Service> {
        let seen = self.stack(stack);
        let short = |service: &Service| {
            let ready = seen.map_or(0, |seen| seen.ready(*service));
            let replicas = seen
                .and_then(|seen| seen.service(*service))
                .map_or(1, |seen| seen.replicas);
            ready == 0 || (ready < replicas && self.elapsed() >= SHORT_OF_ENDPOINTS)
        };
        Service::ALL
            .into_iter()
            .find(|service| !self.is_moved(*service, Some(stack)) && short(service))
    }

    fn swapped(&mut self, candidate: Candidate) {
        let forced = self
            .next
            .rejected
            .as_ref()
            .is_some_and(|rejected| rejected.stack == candidate.stack);
        self.tell(
            false,
            "Promoted",
            format!("{} has all the traffic", candidate.version),
        );
        self.remember(named(&candidate), Outcome::Promoted, None, "operator");
        self.next.candidate = None;
        let old = self.next.live.take();
        self.next.previous = old.map(|old| self.leaves(old, !forced));
        self.next.live = Some(Live {
            stack: candidate.stack,
            version: candidate.version,
            attempt: candidate.attempt,
            since: self.now,
            verified: false,
            contracted: false,
        });
        self.enter(if forced { Phase::Held } else { Phase::Verifying });
    }

    /// What becomes of a stack that has had the traffic.
    fn leaves(&self, live: Live, way_back: bool) -> Previous {
        let kept = if way_back {
            signed(self.spec.rollout.retention)
        } else {
            KEPT_FOR_LOGS
        };
        let since = self.clock();
        let Live {
            stack,
            version,
            attempt,
            verified,
            contracted,
            ..
        } = live;
        Previous {
            stack,
            version,
            attempt,
            state: PreviousState::Draining,
            way_back,
            verified,
            contracted,
            since,
            idle_since: None,
            until: later(since, kept),
        }
    }

    fn rolling_back(&mut self) {
        let Some(left) = self.next.candidate.clone() else {
            return;
        };
        let to = self.next.live.as_ref().map(|live| live.stack.clone());
        if self.moved(to.as_ref()) {
            self.next.candidate = None;
            if to.is_none() {
                self.enter(Phase::Failed);
                return;
            }
            let Candidate {
                stack,
                version,
                attempt,
                ..
            } = left;
            let left = Live {
                stack,
                version,
                attempt,
                since: self.now,
                verified: false,
                contracted: false,
            };
            self.next.previous = Some(self.leaves(left, false));
            self.tell(false, "RolledBack", "the traffic is back".to_owned());
            if self.next.rejected.is_some() {
                self.enter(Phase::Held);
            } else {
                self.arrive();
            }
            return;
        }
        let can = |stack: &Stack| self.stack(stack).is_some_and(StackSeen::serves);
        if self.overdue()
            && !to.as_ref().is_some_and(can)
            && self.stack(&left.stack).is_some_and(StackSeen::complete)
        {
            // Better all on the new stack than some on each, or all on a dead one.
            let message = "the stack before it could not serve".to_owned();
            self.tell(true, "RollbackImpossible", message.clone());
            self.reject(left, Reason::RollbackImpossible, message);
            self.next.epoch += 1;
            self.enter(Phase::Promoting);
        }
    }

    fn verifying(&mut self) {
        let Some(live) = self.next.live.clone() else {
            return;
        };
        if self.leave(&live) {
            return;
        }
        let verdict = self.verdict(&live);
        let way_back = self
            .next
            .previous
            .as_ref()
            .is_some_and(|previous| previous.way_back);
        match verdict {
            Some(Ok(())) => {
                if let Some(live) = &mut self.next.live {
                    live.verified = true;
                }
                self.remember(
                    (live.stack, live.version.clone(), live.attempt),
                    Outcome::Verified,
                    None,
                    "operator",
                );
                self.tell(
                    false,
                    "Verified",
                    format!("{} is live and verified", live.version),
                );
                self.enter(Phase::Live);
            }
            Some(Err(message)) if way_back => {
                self.roll_back(Some((Reason::VerificationFailed, message)), "operator");
            }
            Some(Err(message)) => {
                // Nothing to go back to: an exchange with errors is better than none.
                let gates = self
                    .declared()
                    .map_or_else(String::new, |declared| declared.gates.clone());
                let Live {
                    stack,
                    version,
                    attempt,
                    ..
                } = live;
                self.tell(true, "VerificationFailed", message.clone());
                self.reject(
                    Candidate {
                        stack,
                        version,
                        attempt,
                        gates,
                    },
                    Reason::VerificationFailed,
                    message,
                );
                self.enter(Phase::Held);
            }
            None => {}
        }
    }

    /// Leaves the live stack for the one before it, if somebody asks for it or the spec names that one again.
    fn leave(&mut self, live: &Live) -> bool {
        let Some(previous) = self.next.previous.clone() else {
            return false;
        };
        if !previous.way_back || previous.state == PreviousState::Retiring {
            return false;
        }
        if self.asked_to_leave(&live.stack, live.attempt) {
            let by = self.asker();
            self.roll_back(
                Some((Reason::RolledBack, format!("{by} asked for the way back"))),
                &by,
            );
            return true;
        }
        let fixed = self.spec.rollout.colour.fixed();
        let named_again = self.declared().is_some_and(|declared| {
            declared.revision == previous.stack.revision
                && !self.reached(declared)
                && fixed.is_none_or(|colour| colour == previous.stack.colour)
        });
        if named_again && !self.stopped() {
            self.roll_back(None, "spec");
            return true;
        }
        false
    }

    /// How the verification has ended, if it has.
    fn verdict(&self, live: &Live) -> Option<Result<(), String>> {
        let limits = &self.spec.rollout.verification;
        for (service, figures) in &self.seen.figures {
            if figures.requests < u64::try_from(limits.min_requests).unwrap_or(u64::MAX) {
                continue;
            }
            if figures.errors * 100_000 > limits.max_error_millipercent() * figures.requests {
                let (errors, requests) = (figures.errors, figures.requests);
                return Some(Err(format!(
                    "{errors} of {requests} requests to the {service} service failed"
                )));
            }
            if time::Duration::from_millis(figures.p99_ms) > limits.max_latency_p99.into() {
                return Some(Err(format!(
                    "the {service} service answers too slowly: p99 is {} ms",
                    figures.p99_ms
                )));
            }
        }
        match self.state(JobKind::Verify, &live.stack, live.attempt) {
            Some(JobState::Failed(why)) => Some(Err(format!(
                "the smoke test through the live address failed: {why}"
            ))),
            Some(JobState::Passed) if self.elapsed() >= signed(limits.duration) => Some(Ok(())),
            Some(JobState::Passed) => None,
            _ if self.overdue() => Some(Err(
                "the smoke test through the live address was not done in time".to_owned(),
            )),
            _ => None,
        }
    }

    /// All phases in which no selector is about to move.
    fn releasing(&mut self) {
        if let Some(live) = self.next.live.clone()
            && self.leave(&live)
        {
            return;
        }
        if let Some(candidate) = self.next.candidate.clone()
            && self.seen.requests.abort == Some(token(&candidate.stack, candidate.attempt))
            && self.seen.requests.abort != self.next.handled.abort
        {
            self.next.handled.abort.clone_from(&self.seen.requests.abort);
            let by = self.asker();
            self.fail(Reason::Aborted, format!("{by} aborted it"), &by);
            return;
        }
        let Some(declared) = self.declared().cloned() else {
            return;
        };
        if self.stopped() {
            return;
        }
        self.reconsider(&declared);
        if self.rejects(&declared) {
            return;
        }
        if self.reached(&declared) {
            return self.arrive();
        }
        let live_colour = self.next.live.as_ref().map(|live| live.stack.colour);
        let free = live_colour.map_or(Colour::Blue, Colour::other);
        let colour = self.spec.rollout.colour.fixed().unwrap_or(free);
        if live_colour == Some(colour) {
            self.next.candidate = None;
            self.enter(Phase::Pending);
            return;
        }
        let stack = Stack {
            colour,
            revision: declared.revision,
        };
        match self.next.candidate.clone() {
            Some(candidate) if candidate.stack == stack && candidate.gates == declared.gates => {
                self.climb(&candidate);
            }
            superseded => self.begin(stack, declared.gates, superseded.as_ref()),
        }
    }

    /// A release that was given up is forgotten when something else is declared, or tried again when somebody asks.
    fn reconsider(&mut self, declared: &Declared) {
        let Some(rejected) = &self.next.rejected else {
            return;
        };
        let asked = self.seen.requests.retry.clone();
        let again =
            asked == Some(token(&rejected.stack, rejected.attempt)) && asked != self.next.handled.retry;
        if again {
            self.next.handled.retry = asked;
        }
        if again || !self.rejects(declared) {
            self.next.rejected = None;
        }
    }

    /// What is declared is live; but it may have become so without having been verified.
    fn arrive(&mut self) {
        if let Some(candidate) = self.next.candidate.take() {
            self.tell(
                false,
                "Reverted",
                format!("{} is not wanted any more", candidate.version),
            );
        }
        if self.next.live.as_ref().is_some_and(|live| live.verified) {
            return self.enter(Phase::Live);
        }
        // The result of the earlier attempt still stands: this is another one.
        self.next.attempt = self.highest_attempt() + 1;
        if let Some(live) = &mut self.next.live {
            live.attempt = self.next.attempt;
        }
        self.enter(Phase::Verifying);
    }

    fn begin(&mut self, stack: Stack, gates: String, superseded: Option<&Candidate>) {
        self.next.attempt = self.highest_attempt() + 1;
        let (version, attempt) = (self.spec.version.clone(), self.next.attempt);
        let note = match superseded {
            Some(old) => format!("{version} takes the place of {} (attempt {attempt})", old.version),
            None => format!("{version} is to become live (attempt {attempt})"),
        };
        self.tell(false, "ReleaseStarted", note);
        self.next.candidate = Some(Candidate {
            stack,
            version,
            attempt,
            gates,
        });
        self.next.phase = Phase::Pending;
        self.next.phase_since = Some(self.clock());
    }

    /// The ladder of gates.
    fn climb(&mut self, candidate: &Candidate) {
        let (stack, attempt) = (&candidate.stack, candidate.attempt);
        if self.next.phase == Phase::Pending {
            if self.free() {
                self.enter(Phase::Migrating);
            }
            return;
        }
        let past_pods = matches!(self.next.phase, Phase::Testing | Phase::AwaitingPromotion);
        if past_pods && self.stack(stack).is_none_or(|seen| seen.rendered.is_none()) {
            // What has been tested is gone. What takes its place is not what was tested.
            return self.begin(stack.clone(), candidate.gates.clone(), Some(candidate));
        }
        match self.state(JobKind::Expand, stack, attempt) {
            Some(JobState::Passed) => {}
            Some(JobState::Failed(why)) => {
                let why = format!("the expand migration failed: {why}");
                return self.fail(Reason::MigrationFailed, why, "operator");
            }
            _ => {
                self.enter(Phase::Migrating);
                return self.in_time(
                    Reason::MigrationFailed,
                    "the expand migration was not done in time",
                );
            }
        }
        if matches!(self.next.phase, Phase::Migrating | Phase::Provisioning) && !self.ready(stack) {
            self.enter(Phase::Provisioning);
            return self.in_time(
                Reason::ProgressDeadlineExceeded,
                "the pods were not ready in time",
            );
        }
        let tests: Vec<JobKind> = self.tests().collect();
        for kind in tests {
            if let Some(JobState::Failed(why)) = self.state(kind.clone(), stack, attempt) {
                let why = format!("the test {} failed: {why}", name_of(&kind));
                return self.fail(Reason::SmokeTestFailed, why, "operator");
            }
        }
        let approved =
            self.seen.requests.promote.is_some() && self.seen.requests.promote == Some(token(stack, attempt));
        let manual = self.spec.rollout.promotion == Promotion::Manual;
        if !self.tested(stack, attempt) {
            self.enter(Phase::Testing);
            return self.in_time(Reason::SmokeTestFailed, "the tests were not done in time");
        }
        if manual && !approved {
            return self.enter(Phase::AwaitingPromotion);
        }
        if !self.ready(stack) {
            if self.next.phase == Phase::AwaitingPromotion {
                return;
            }
            self.enter(Phase::Testing);
            return self.in_time(
                Reason::ProgressDeadlineExceeded,
                "the pods were not ready in time",
            );
        }
        if approved {
            self.next.handled.promote.clone_from(&self.seen.requests.promote);
        }
        self.next.epoch += 1;
        self.enter(Phase::Promoting);
        self.tell(
            false,
            "Promoting",
            format!("the traffic goes to {}", candidate.version),
        );
    }

    fn in_time(&mut self, reason: Reason, message: &str) {
        if self.overdue() {
            self.fail(reason, message.to_owned(), "operator");
        }
    }

    /// Whether the other colour is free for a candidate, and the schema for its expand.
    fn free(&self) -> bool {
        let live = self.next.live.as_ref();
        let only_live = self
            .seen
            .stacks
            .keys()
            .all(|stack| live.is_some_and(|live| live.stack == *stack));
        let contracted = live.is_none_or(|live| live.contracted || !live.verified);
        only_live && self.next.previous.is_none() && self.next.contract.is_none() && contracted
    }

    /// What becomes of the stack that was live before.
    fn old_stack(&mut self) {
        let (phase, stopped, clock) = (self.next.phase, self.stopped(), self.clock());
        if matches!(phase, Phase::Promoting | Phase::RollingBack) {
            return;
        }
        let drain_timeout = signed(self.spec.rollout.drain_timeout);
        let Some(mut previous) = self.next.previous.clone() else {
            return;
        };
        let seen = self.stack(&previous.stack);
        let gone = seen.is_none();
        if previous.state == PreviousState::Draining && !stopped {
            let idle = seen.is_none_or(|seen| seen.open == Some(0));
            previous.idle_since = if idle {
                previous.idle_since.or(Some(clock))
            } else {
                None
            };
            let quiet = previous
                .idle_since
                .is_some_and(|since| clock.duration_since(since) >= QUIET);
            if quiet || clock.duration_since(previous.since) >= drain_timeout {
                previous.state = PreviousState::Retained;
            }
        }
        let needed = phase == Phase::Pending && self.next.candidate.is_some();
        let settled = matches!(phase, Phase::Live | Phase::Held | Phase::Failed);
        if previous.state == PreviousState::Retained
            && !stopped
            && (needed || (settled && clock >= previous.until))
        {
            previous.state = PreviousState::Retiring;
            let why = if needed {
                "its colour is needed"
            } else {
                "its time is over"
            };
            self.tell(
                false,
                "Retiring",
                format!("{} is removed: {why}", previous.version),
            );
        }
        if previous.state == PreviousState::Retiring && gone {
            let Previous {
                stack,
                version,
                attempt,
                ..
            } = previous;
            self.remember((stack, version, attempt), Outcome::Retired, None, "operator");
            self.next.previous = None;
        } else {
            self.next.previous = Some(previous);
        }
    }

    /// The contract migration of the live version: only when nothing else exists that could still read the old schema.
    fn contract(&mut self) {
        let Some(live) = self.next.live.clone() else {
            return;
        };
        if let Some(contract) = self.next.contract.clone() {
            match self.state(JobKind::Contract, &contract.stack, contract.attempt) {
                Some(JobState::Passed) => {
                    self.tell(false, "Contracted", "the schema is contracted".to_owned());
                }
                Some(JobState::Failed(why)) => {
                    let note = format!("the contract migration of {} failed: {why}", live.version);
                    self.tell(true, "ContractFailed", note);
                }
                _ => return,
            }
            self.next.contract = None;
            if let Some(live) = &mut self.next.live {
                live.contracted = true;
            }
            return;
        }
        let calm = matches!(
            self.next.phase,
            Phase::Live | Phase::Pending | Phase::Held | Phase::Failed
        );
        let alone = self.seen.stacks.keys().all(|stack| *stack == live.stack);
        let due = live.verified && !live.contracted && self.next.previous.is_none() && !self.stopped();
        if calm && alone && due {
            self.next.contract = Some(Contract {
                stack: live.stack,
                attempt: live.attempt,
            });
        }
    }

    // ---- actions ----------------------------------------------------------------------------------------------

    fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.seen.taken.is_empty() {
            self.move_traffic(&mut actions);
            for stack in self.kept() {
                self.keep(&stack, &mut actions);
            }
            self.run_jobs(&mut actions);
            self.remove(&mut actions);
        }
        actions
    }

    fn move_traffic(&self, actions: &mut Vec<Action>) {
        let live = self.next.live.as_ref().map(|live| live.stack.clone());
        let (to, intent) = match (self.next.phase, &self.next.candidate) {
            (Phase::Promoting, Some(candidate)) => (Some(candidate.stack.clone()), Intent::Promote),
            (Phase::RollingBack, _) => (live, Intent::RollBack),
            _ => (live, Intent::Repair),
        };
        for service in Service::ALL {
            let Some(seen) = self.seen.live.get(&service) else {
                actions.push(Action::CreateLive { service });
                continue;
            };
            let right = match intent {
                Intent::Repair => seen.target.is(to.as_ref()),
                Intent::Promote | Intent::RollBack => self.is_moved(service, to.as_ref()),
            };
            if !right && self.can_take(to.as_ref(), service, intent) {
                let (fence, to, epoch) = (seen.fence.clone(), to.clone(), self.next.epoch);
                actions.push(Action::Point {
                    service,
                    fence,
                    to,
                    epoch,
                    intent,
                });
            }
        }
    }

    /// Whether a stack can take the traffic of a service. For a swap all of it has to be there, for a swap back too
    /// unless that takes too long; a foreign selector is corrected as soon as there is anything to point at.
    fn can_take(&self, to: Option<&Stack>, service: Service, intent: Intent) -> bool {
        let Some(to) = to else { return true };
        let Some(seen) = self.stack(to) else { return false };
        match intent {
            Intent::Promote => Service::ALL
                .iter()
                .filter(|service| !self.is_moved(**service, Some(to)))
                .all(|service| {
                    let replicas = seen.service(*service).map_or(1, |seen| seen.replicas.max(1));
                    seen.ready(*service) >= replicas
                }),
            Intent::RollBack => seen.complete() || (seen.serves() && self.elapsed() >= SHORT_OF_ENDPOINTS),
            Intent::Repair => seen.ready(service) > 0,
        }
    }

    /// The stacks that are kept as rendered. What was given up is left alone until its time is over.
    fn kept(&self) -> Vec<Stack> {
        let candidate = self.next.candidate.as_ref().filter(|_| {
            !matches!(
                self.next.phase,
                Phase::Pending | Phase::Migrating | Phase::Failed | Phase::Held
            )
        });
        let previous = self
            .next
            .previous
            .as_ref()
            .filter(|previous| previous.state != PreviousState::Retiring);
        let live = self.next.live.as_ref().map(|live| live.stack.clone());
        live.into_iter()
            .chain(previous.map(|previous| previous.stack.clone()))
            .chain(candidate.map(|candidate| candidate.stack.clone()))
            .collect()
    }

    fn keep(&self, stack: &Stack, actions: &mut Vec<Action>) {
        let seen = self.stack(stack);
        let live = self.next.live.as_ref().filter(|live| live.stack == *stack);
        if seen.is_none_or(|seen| seen.rendered.is_none()) {
            // Only what is still declared can be rendered.
            let known = self
                .next
                .candidate
                .as_ref()
                .map(|candidate| (candidate.attempt, candidate.version.clone()));
            let known = live.map(|live| (live.attempt, live.version.clone())).or(known);
            let declared = self
                .declared()
                .is_some_and(|declared| declared.revision == stack.revision);
            let Some((attempt, version)) = known.filter(|_| declared) else {
                return;
            };
            actions.push(Action::Render {
                stack: stack.clone(),
                attempt,
                version,
            });
        }
        // While traffic moves, counts stand still.
        let moving = matches!(self.next.phase, Phase::Promoting | Phase::RollingBack);
        for service in Service::ALL {
            let there = seen.and_then(|seen| seen.service(service));
            let replicas = self.replicas(stack, service);
            for part in [
                Part::ColourService,
                Part::Budget,
                Part::Workload,
                Part::Autoscaler,
            ] {
                if moving && part == Part::Autoscaler {
                    continue;
                }
                let there = there.and_then(|there| there.parts.get(&part));
                let scaled = part == Part::Workload
                    && seen
                        .and_then(|seen| seen.service(service))
                        .is_some_and(|seen| seen.replicas != replicas);
                let autoscaled = live.is_some() && self.autoscaled(service);
                match there {
                    Some(there) if part == Part::Autoscaler && !autoscaled => actions.push(Action::Delete {
                        stack: stack.clone(),
                        service,
                        part,
                        fence: there.fence.clone(),
                    }),
                    None if part == Part::Autoscaler && !autoscaled => {}
                    Some(there) if there.intact && !scaled => {}
                    there => actions.push(Action::Apply {
                        stack: stack.clone(),
                        service,
                        part,
                        replicas,
                        fence: there.map(|there| there.fence.clone()),
                    }),
                }
            }
        }
    }

    fn autoscaled(&self, service: Service) -> bool {
        self.spec.services.get(service).autoscaling.is_some()
    }

    /// Replicas of a kept stack. A count that came with another revision waits for that revision's promotion.
    fn replicas(&self, stack: &Stack, service: Service) -> u32 {
        let is_live = self.next.live.as_ref().is_some_and(|live| live.stack == *stack);
        let seen = self
            .stack(stack)
            .and_then(|seen| seen.service(service))
            .map_or(0, |seen| seen.replicas);
        if !is_live || matches!(self.next.phase, Phase::Promoting | Phase::RollingBack) {
            return self.wanted(stack, service);
        }
        let declared = u32::try_from(self.spec.services.get(service).replicas).unwrap_or(1);
        let applies = self.declared().is_some_and(|declared| {
            let changed = self.next.rejected.as_ref().is_some_and(|rejected| {
                self.rejects(declared)
                    && of(rejected.replicas, service) != of(declared_replicas(self.spec), service)
            });
            changed || (self.reached(declared) && self.next.rejected.is_none())
        });
        match (seen, applies && !self.autoscaled(service)) {
            (0, _) | (_, true) => declared,
            (seen, false) => seen,
        }
    }

    fn run_jobs(&self, actions: &mut Vec<Action>) {
        let mut run = |kind: JobKind, stack: &Stack, attempt: u32| {
            let job = Job {
                kind,
                stack: stack.clone(),
                attempt,
            };
            if !self.seen.jobs.contains_key(&job) {
                actions.push(Action::Run(job));
            }
        };
        if let Some(contract) = &self.next.contract {
            run(JobKind::Contract, &contract.stack, contract.attempt);
        }
        if self.stopped() {
            return;
        }
        if let Some(candidate) = &self.next.candidate {
            match self.next.phase {
                Phase::Migrating => run(JobKind::Expand, &candidate.stack, candidate.attempt),
                Phase::Testing => self
                    .tests()
                    .for_each(|kind| run(kind, &candidate.stack, candidate.attempt)),
                _ => {}
            }
        }
        if let (Phase::Verifying, Some(live)) = (self.next.phase, &self.next.live) {
            run(JobKind::Verify, &live.stack, live.attempt);
        }
    }

    /// Removes what belongs to no stack that is kept. A colour Service goes only after the last pod behind it.
    fn remove(&self, actions: &mut Vec<Action>) {
        let mut kept: BTreeSet<Stack> = self.kept().into_iter().collect();
        // Its expand may have to run once more after its pods have started.
        kept.extend(
            self.next
                .candidate
                .as_ref()
                .filter(|_| self.next.phase == Phase::Migrating)
                .map(|it| it.stack.clone()),
        );
        kept.extend(
            self.next
                .rejected
                .as_ref()
                .filter(|it| self.now < it.until && self.logs_kept())
                .map(|it| it.stack.clone()),
        );
        if self.next.live.is_none() && self.next.attempt == 0 {
            // A new object that finds traffic on stacks which it does not know removes nothing.
            return;
        }
        for (stack, seen) in self.seen.stacks.iter().filter(|(stack, _)| !kept.contains(stack)) {
            for (service, there) in &seen.services {
                for (part, object) in &there.parts {
                    if *part != Part::ColourService
                        || seen.pods() == 0 && !there.parts.contains_key(&Part::Workload)
                    {
                        let (stack, service, part) = (stack.clone(), *service, *part);
                        actions.push(Action::Delete {
                            stack,
                            service,
                            part,
                            fence: object.fence.clone(),
                        });
                    }
                }
            }
            let empty = seen.pods() == 0 && seen.services.values().all(|there| there.parts.is_empty());
            if let Some(fence) = seen.rendered.clone().filter(|_| empty) {
                actions.push(Action::Unrender {
                    stack: stack.clone(),
                    fence,
                });
            }
        }
        for (job, seen) in &self.seen.jobs {
            if !self.needs(job) && seen.state != JobState::Running {
                actions.push(Action::DeleteJob(job.clone(), seen.fence.clone()));
            }
        }
    }

    /// The logs of what was given up are kept while its colour is not needed.
    fn logs_kept(&self) -> bool {
        matches!(self.next.phase, Phase::Failed | Phase::Held)
    }

    fn needs(&self, job: &Job) -> bool {
        let is = |stack: &Stack, attempt: u32| *stack == job.stack && attempt == job.attempt;
        if job.kind == JobKind::Contract {
            return job.attempt + CONTRACTS_KEPT > self.next.attempt;
        }
        self.next
            .candidate
            .as_ref()
            .is_some_and(|it| is(&it.stack, it.attempt))
            || self
                .next
                .live
                .as_ref()
                .is_some_and(|it| is(&it.stack, it.attempt))
            || self
                .next
                .previous
                .as_ref()
                .is_some_and(|it| is(&it.stack, it.attempt))
            || self
                .next
                .rejected
                .as_ref()
                .is_some_and(|it| is(&it.stack, it.attempt))
    }

    fn requeue(&self, changed: bool) -> time::Duration {
        if changed {
            return time::Duration::ZERO;
        }
        let steady = matches!(
            self.next.phase,
            Phase::Live | Phase::Held | Phase::Failed | Phase::AwaitingPromotion
        ) && self
            .next
            .previous
            .as_ref()
            .is_none_or(|previous| previous.state == PreviousState::Retained)
            && self.next.contract.is_none();
        if !steady {
            return time::Duration::from_secs(1);
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
            .clamp(time::Duration::from_secs(1), time::Duration::from_mins(1))
    }
}

fn named(candidate: &Candidate) -> (Stack, String, u32) {
    (
        candidate.stack.clone(),
        candidate.version.clone(),
        candidate.attempt,
    )
}

fn name_of(kind: &JobKind) -> &str {
    match kind {
        JobKind::Expand => "expand",
        JobKind::Smoke => "smoke",
        JobKind::Test(name) => name,
        JobKind::Verify => "verify",
        JobKind::Contract => "contract",
    }
}

const fn of(replicas: Replicas, service: Service) -> i32 {
    match service {
        Service::User => replicas.user,
        Service::Trade => replicas.trade,
        Service::Notification => replicas.notification,
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(time::Duration::from(duration)).unwrap_or(SignedDuration::MAX)
}

fn later(time: Timestamp, by: SignedDuration) -> Timestamp {
    time.checked_add(by).unwrap_or(Timestamp::MAX)
}
