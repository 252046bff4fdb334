//! The phases of a release, and what becomes of the stack that was live before.

use crate::{
    api::{Promotion, Service},
    decide::{QUIET, Turn, signed},
    observe::{Declared, Job, JobKind, JobState, Target},
    resources::job_word,
    status::{
        Candidate, Colour, Contract, Live, Outcome, Phase, Previous, PreviousState, Reason, Stack, token,
    },
};

impl Turn<'_> {
    /// An object that was deleted without its children and created again finds its stacks as they were.
    pub(crate) fn adopt(&mut self) {
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

    pub(crate) fn highest_attempt(&self) -> u32 {
        let jobs = self.seen.jobs.keys().map(|job| job.attempt);
        let stacks = self.seen.stacks.values().map(|stack| stack.attempt);
        jobs.chain(stacks).chain([self.next.attempt]).max().unwrap_or(0)
    }

    /// All phases in which no selector is about to move.
    pub(crate) fn releasing(&mut self) {
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
    pub(crate) fn reconsider(&mut self, declared: &Declared) {
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
    pub(crate) fn arrive(&mut self) {
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

    pub(crate) fn begin(&mut self, stack: Stack, gates: String, superseded: Option<&Candidate>) {
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
    pub(crate) fn climb(&mut self, candidate: &Candidate) {
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
                let message = self.late(
                    "the expand migration was not done in time",
                    JobKind::Expand,
                    candidate,
                );
                return self.in_time(Reason::MigrationFailed, &message);
            }
        }
        if matches!(self.next.phase, Phase::Migrating | Phase::Provisioning) && !self.ready(stack) {
            self.enter(Phase::Provisioning);
            let message = self.missing(stack);
            return self.in_time(Reason::ProgressDeadlineExceeded, &message);
        }
        let tests: Vec<JobKind> = self.tests().collect();
        for kind in tests {
            if let Some(JobState::Failed(why)) = self.state(kind.clone(), stack, attempt) {
                let why = format!("the test {} failed: {why}", job_word(&kind));
                return self.fail(Reason::SmokeTestFailed, why, "operator");
            }
        }
        let approved =
            self.seen.requests.promote.is_some() && self.seen.requests.promote == Some(token(stack, attempt));
        let manual = self.spec.rollout.promotion == Promotion::Manual;
        if !self.tested(stack, attempt) {
            self.enter(Phase::Testing);
            let message = self
                .tests()
                .find(|kind| self.state(kind.clone(), stack, attempt) != Some(&JobState::Passed))
                .map(|kind| self.late("the tests were not done in time", kind, candidate))
                .unwrap_or_default();
            return self.in_time(Reason::SmokeTestFailed, &message);
        }
        if manual && !approved {
            return self.enter(Phase::AwaitingPromotion);
        }
        if !self.ready(stack) {
            if self.next.phase == Phase::AwaitingPromotion {
                return;
            }
            self.enter(Phase::Testing);
            let message = self.missing(stack);
            return self.in_time(Reason::ProgressDeadlineExceeded, &message);
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

    /// Which pods are late, and what keeps them.
    fn missing(&self, stack: &Stack) -> String {
        let missing = crate::report::missing(self.seen, stack);
        if missing.is_empty() {
            "the pods were not ready in time".to_owned()
        } else {
            format!("the pods were not ready in time: {}", missing.join(", "))
        }
    }

    /// What is late, and what keeps it, as far as that is known.
    fn late(&self, what: &str, kind: JobKind, candidate: &Candidate) -> String {
        let job = Job {
            kind,
            stack: candidate.stack.clone(),
            attempt: candidate.attempt,
        };
        let trouble = self.seen.jobs.get(&job).and_then(|job| job.trouble.as_deref());
        trouble.map_or_else(|| what.to_owned(), |trouble| format!("{what}: {trouble}"))
    }

    pub(crate) fn in_time(&mut self, reason: Reason, message: &str) {
        if self.overdue() {
            self.fail(reason, message.to_owned(), "operator");
        }
    }

    /// Whether the other colour is free for a candidate, and the schema for its expand.
    pub(crate) fn free(&self) -> bool {
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
    pub(crate) fn old_stack(&mut self) {
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
    pub(crate) fn contract(&mut self) {
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
}
