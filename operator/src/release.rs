//! The phases of a release, and what becomes of the stack that was live before.

use std::collections::BTreeMap;

use crate::{
    api::{ExchangeDeploymentSpec as Spec, Promotion},
    decide::{QUIET, Turn, asker, signed, somebody},
    observe::{Declared, JobKind, JobSeen, JobState, Observed, StackSeen, Target},
    resources::job_word,
    status::{
        Candidate, Colour, Contract, Live, Outcome, Phase, Previous, PreviousState, Reason, Scale, Stack,
        token,
    },
};

/// What an object of which nothing is recorded finds: it was deleted without its children and created again.
pub(crate) enum Found {
    /// Nothing has traffic, or something is recorded.
    Nothing,
    /// One stack has the traffic.
    Live(Stack),
    /// The traffic was being moved to one stack from another.
    Moving { to: Stack, from: Stack },
    /// Something has traffic, and what should have it cannot be said; why, and what to do.
    Undecided(String),
}

impl Found {
    pub(crate) fn by(spec: &Spec, seen: &Observed) -> Self {
        let record = &seen.status;
        if record.live.is_some() || record.attempt > 0 || record.epoch > 0 {
            return Self::Nothing;
        }
        // Where the traffic goes, and the last move that has sent it there.
        let mut moves: BTreeMap<&Stack, u32> = BTreeMap::new();
        for live in seen.live.values() {
            let stacks = match &live.target {
                Target::Stack(stack) => std::slice::from_ref(stack),
                Target::Foreign => &live.endpoints,
                Target::Nothing => &[],
            };
            for stack in stacks.iter().filter(|stack| seen.stacks.contains_key(stack)) {
                let last = moves.entry(stack).or_default();
                *last = (*last).max(live.epoch);
            }
        }
        let Some(last) = moves.values().max().copied() else {
            return Self::Nothing;
        };
        let mut latest = moves
            .iter()
            .filter(|(_, epoch)| **epoch == last)
            .map(|(it, _)| *it);
        let points_at = |stack| seen.live.values().filter(move |it| it.target.is(Some(stack)));
        // No move of the operator's, but somebody's decision.
        let decided = |stack| last > 0 || points_at(stack).count() == seen.live.len();
        let to = latest.next().filter(|to| latest.next().is_none() && decided(to));
        let Some(to) = to else {
            let stacks: Vec<String> = moves.keys().map(ToString::to_string).collect();
            let stacks = stacks.join(" and ");
            return Self::Undecided(format!(
                "the live Services point at {stacks}, and nothing is recorded that says which should be live: \
                 point all three at one stack, and it is taken over"
            ));
        };
        let is = |stack: &Stack, what: fn(&StackSeen) -> bool| seen.stacks.get(stack).is_some_and(what);
        let declared = seen.declared.as_ref().ok().map(|declared| &declared.revision);
        let known =
            |stack: &Stack| is(stack, |it| it.rendered.is_some()) || declared == Some(&stack.revision);
        let (to, from) = match moves.keys().find(|stack| **stack != to) {
            // The move cannot be finished, but taken back.
            Some(from) if !is(to, StackSeen::serves) && is(from, StackSeen::serves) && known(from) => {
                (*from, Some(to))
            }
            from => (to, from.copied()),
        };
        if !known(to) {
            return Self::Undecided(format!(
                "the live Services point at {to}, whose ControllerRevision is lost: declare exactly what it runs \
                 instead of {}, and it is taken over",
                spec.version
            ));
        }
        if let Some(other) = seen.stacks.get(to).and_then(|it| it.other_store.as_ref()) {
            return Self::Undecided(format!(
                "the live Services point at {to}, which runs with {other}: declare what it runs with, and it is taken over"
            ));
        }
        match from.cloned() {
            Some(from) => Self::Moving { to: to.clone(), from },
            None => Self::Live(to.clone()),
        }
    }
}

impl Turn<'_> {
    /// Takes over what was found, or says why that cannot be done. Nobody knows whether it had been verified.
    pub(crate) fn adopt(&mut self, found: Found) -> Option<String> {
        let (stack, from) = match found {
            Found::Nothing => return None,
            Found::Undecided(why) => return Some(why),
            Found::Live(stack) => (stack, None),
            Found::Moving { to, from } => (to, Some(from)),
        };
        self.next.attempt = self.highest_attempt();
        self.next.epoch = self.seen.live.values().map(|live| live.epoch).max().unwrap_or(0);
        let live = self.found(&stack);
        self.tell(false, "Adopted", format!("{} was found to be live", live.version));
        self.next.live = Some(live);
        if let Some(from) = from {
            let from = self.found(&from);
            self.next.candidate = Some(self.left(from));
            self.next.epoch += 1;
            self.enter(Phase::RollingBack);
            return None;
        }
        let mut others = self.seen.stacks.iter().filter(|(other, _)| **other != stack);
        if let Some((other, _)) = others.find(|(_, seen)| seen.pods() > 0) {
            // It may have had the traffic before, and still have connections.
            let other = self.found(other);
            self.next.previous = Some(self.leaves(other, false));
        }
        self.arrive();
        None
    }

    fn found(&self, stack: &Stack) -> Live {
        let seen = self.stack(stack).filter(|seen| seen.rendered.is_some());
        let version = seen.map_or(&self.spec.version, |seen| &seen.version);
        let attempt = seen.map_or(self.next.attempt, |seen| seen.attempt);
        Live::new(stack.clone(), version.clone(), attempt, self.now)
    }

    /// The highest attempt that anything is about. What people name before it exists, or what has come with an object that was
    /// restored, is about none that will be.
    pub(crate) fn highest_attempt(&self) -> u32 {
        let jobs = self.seen.jobs.keys().map(|job| job.attempt);
        let stacks = self.seen.stacks.values().map(|stack| stack.attempt);
        let named = self.next.asked.attempts();
        let all = jobs.chain(stacks).chain(named).chain([self.next.attempt]);
        all.max().unwrap_or(0)
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
            let asked = self.next.asked.abort.clone();
            self.fail(
                Reason::Aborted,
                somebody(asked.as_ref(), "aborted it"),
                &asker(asked.as_ref()),
            );
            return;
        }
        let Some(declared) = self.declared().cloned() else {
            return;
        };
        // A name that belongs to somebody else: what is recorded goes on, nothing else is begun.
        if self.stopped() || !self.seen.is_free() {
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
            self.drop_unwanted();
            self.enter(Phase::Pending);
            return;
        }
        let stack = Stack {
            colour,
            revision: declared.revision.clone(),
        };
        match self.next.candidate.clone() {
            Some(candidate) if candidate.stack == stack && declared.has_gates(&candidate.gates) => {
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
            let what = (rejected.stack.clone(), rejected.version.clone(), rejected.attempt);
            let by = asker(self.next.asked.retry.as_ref());
            self.remember(what, Outcome::Retried, None, &by);
            self.next.handled.retry = asked;
        }
        if again || !self.rejects(declared) {
            self.next.rejected = None;
        }
    }

    /// What is declared is live; but it may have become so without having been verified.
    pub(crate) fn arrive(&mut self) {
        self.drop_unwanted();
        if self.next.live.as_ref().is_some_and(|live| live.verified) {
            return self.enter(Phase::Live);
        }
        // The result of the earlier attempt still stands: this is another one.
        self.next.attempt = self.highest_attempt() + 1;
        if let Some(live) = &mut self.next.live {
            live.attempt = self.next.attempt;
            live.smoke_passed = false;
        }
        self.enter(Phase::Verifying);
    }

    fn drop_unwanted(&mut self) {
        if let Some(candidate) = self.next.candidate.take() {
            let note = format!("{} is not wanted any more", candidate.version);
            self.tell(false, "Reverted", note);
        }
    }

    pub(crate) fn begin(&mut self, stack: Stack, gates: String, superseded: Option<&Candidate>) {
        self.next.attempt = self.highest_attempt() + 1;
        let (version, attempt) = (self.spec.version.clone(), self.next.attempt);
        let note = match superseded {
            Some(old) if old.stack == stack && old.gates == gates => {
                format!(
                    "{version} is begun anew (attempt {attempt}): its pods may not be those that were tested"
                )
            }
            Some(old) => format!("{version} takes the place of {} (attempt {attempt})", old.version),
            None => format!("{version} is to become live (attempt {attempt})"),
        };
        self.tell(false, "ReleaseStarted", note);
        self.next.candidate = Some(Candidate {
            stack,
            version,
            attempt,
            gates,
            scale: Some(Scale::declared(self.spec)),
            tested: None,
            approved_by: None,
            unneeded_since: None,
            forced: false,
        });
        self.next.verification = Some(self.spec.rollout.verification.clone());
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
        if self.is_being_tested(candidate) && !self.is_as_tested(candidate) {
            // What takes its place is not what was tested.
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
                    (stack, attempt),
                );
                return self.in_time(Reason::MigrationFailed, &message);
            }
        }
        if matches!(self.next.phase, Phase::Migrating | Phase::Provisioning) && !self.ready(stack) {
            self.enter(Phase::Provisioning);
            let message = self.missing(stack);
            return self.in_time(Reason::ProgressDeadlineExceeded, &message);
        }
        let templates = self.stack(stack).map(StackSeen::templates);
        if let Some(candidate) = &mut self.next.candidate {
            candidate.tested = candidate.tested.take().or(templates);
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
        let by = asker(self.next.asked.promote.as_ref());
        if let Some(candidate) = &mut self.next.candidate {
            candidate.approved_by = Some(by).filter(|_| manual && approved);
        }
        if !self.tested(stack, attempt) {
            self.enter(Phase::Testing);
            let message = self
                .tests()
                .find(|kind| self.state(kind.clone(), stack, attempt) != Some(&JobState::Passed))
                .map(|kind| self.late("the tests were not done in time", kind, (stack, attempt)))
                .unwrap_or_default();
            return self.in_time(Reason::SmokeTestFailed, &message);
        }
        if manual && !approved {
            return self.enter(Phase::AwaitingPromotion);
        }
        // One that the API server does not let be made again would be left behind by the swap.
        if let Some(service) = self.seen.missing_live() {
            self.enter(Phase::Testing);
            let message = format!("the live Service of {service} was not there in time");
            return self.in_time(Reason::ProgressDeadlineExceeded, &message);
        }
        if !self.ready(stack) {
            // Who was asked for an approval is not told that it was too late for the pods.
            if manual {
                return self.enter(Phase::AwaitingPromotion);
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

    /// Whether the tests of a candidate have begun, in this phase or before its gates had to be climbed again: what takes the place
    /// of its pods from now on is another attempt.
    pub(crate) fn is_being_tested(&self, candidate: &Candidate) -> bool {
        let begun = |kind| self.job(kind, &candidate.stack, candidate.attempt).is_some();
        let recorded = candidate.tested.is_some();
        matches!(self.next.phase, Phase::Testing | Phase::AwaitingPromotion)
            || recorded
            || self.tests().any(begun)
    }

    /// Whether a stack is there and its pods are made of what they were when its tests began: as it was recorded, which stays when
    /// somebody deletes a Job, and as each Job says, which an older operator has begun or a CRD without that field has made.
    pub(crate) fn is_as_tested(&self, candidate: &Candidate) -> bool {
        let Candidate {
            stack,
            attempt,
            tested,
            ..
        } = candidate;
        let Some(seen) = self.stack(stack).filter(|seen| seen.rendered.is_some()) else {
            return false;
        };
        let templates = seen.templates();
        let mut jobs = self.tests().filter_map(|kind| self.job(kind, stack, *attempt));
        tested.as_ref().is_none_or(|tested| *tested == templates)
            && jobs.all(|test| test.of.as_ref() == Some(&templates))
    }

    /// Which pods are late, and what keeps them.
    fn missing(&self, stack: &Stack) -> String {
        let lacking = crate::report::lacking(self.seen, stack);
        if lacking.is_empty() {
            "the pods were not ready in time".to_owned()
        } else {
            format!("the pods were not ready in time: {}", lacking.join(", "))
        }
    }

    /// What is late, and what keeps it, as far as that is known.
    pub(crate) fn late(&self, what: &str, kind: JobKind, (stack, attempt): (&Stack, u32)) -> String {
        let told = self.job(kind, stack, attempt).and_then(JobSeen::told);
        told.map_or_else(|| what.to_owned(), |told| format!("{what}: {told}"))
    }

    pub(crate) fn in_time(&mut self, reason: Reason, message: &str) {
        if self.overdue() {
            self.fail(reason, self.blamed(message), "operator");
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
        if phase.moves() {
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
        // Somebody may have sent clients there, and what they reach is kept.
        let reached = self.seen.reaches(&previous.stack);
        // What cannot begin, or is perhaps not declared any more, needs no colour yet.
        let candidate = self.next.candidate.as_ref();
        let begins = candidate.is_some_and(|it| self.is_declared(&it.stack)) && self.seen.is_free();
        let needed = phase == Phase::Pending && begins;
        // Nor is anything under way while the declared colour is in use.
        let settled = !needed && matches!(phase, Phase::Live | Phase::Held | Phase::Failed | Phase::Pending);
        if previous.state == PreviousState::Retained
            && !stopped
            && !reached
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
            let failed = match self.state(JobKind::Contract, &contract.stack, contract.attempt) {
                Some(JobState::Passed) => None,
                Some(JobState::Failed(why)) => Some(why.clone()),
                _ => return,
            };
            if let Some(why) = &failed {
                let note = format!("the contract migration of {} failed: {why}", live.version);
                self.tell(true, "ContractFailed", note);
            } else {
                self.tell(false, "Contracted", "the schema is contracted".to_owned());
            }
            self.next.contract = None;
            if let Some(live) = &mut self.next.live {
                live.contracted = true;
                live.contract_failed = failed;
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
