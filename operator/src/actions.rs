//! What is to be done under a record: traffic first, then the stacks that are kept, then Jobs, and removal last.

use std::collections::BTreeSet;

use crate::{
    api::Service,
    decide::{SHORT_OF_ENDPOINTS, Turn},
    observe::{Job, JobKind, JobState, Part},
    plan::{Action, Intent},
    status::{Phase, PreviousState, Stack},
};

/// Number of later attempts after which a finished contract Job is forgotten. Until then its name is taken, so that an
/// operator that slept cannot start it again.
const CONTRACTS_KEPT: u32 = 10;

impl Turn<'_> {
    pub(crate) fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        let free = self.seen.is_free();
        self.move_traffic(&mut actions);
        // Under a name that belongs to somebody else nothing is begun; what has, or has had, the traffic is kept.
        let candidate = self.next.candidate.as_ref().filter(|_| !free).map(|it| &it.stack);
        for stack in self.kept().iter().filter(|stack| Some(*stack) != candidate) {
            self.keep(stack, &mut actions);
        }
        if free || self.next.candidate.is_none() {
            self.run_jobs(&mut actions);
        }
        if free {
            self.remove(&mut actions);
        }
        actions
    }

    pub(crate) fn move_traffic(&self, actions: &mut Vec<Action>) {
        let live = self.next.live.as_ref().map(|live| live.stack.clone());
        let (to, intent) = match (self.next.phase, &self.next.candidate) {
            (Phase::Promoting, Some(candidate)) => (Some(candidate.stack.clone()), Intent::Promote),
            (Phase::RollingBack, _) => (live, Intent::RollBack),
            _ => (live, Intent::Repair),
        };
        for service in Service::ALL {
            let Some(seen) = self.seen.live.get(&service) else {
                if self.seen.is_free() || to.is_some() {
                    actions.push(Action::CreateLive { service });
                }
                continue;
            };
            let right = match intent {
                Intent::Repair => seen.intact && seen.target.is(to.as_ref()),
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
    /// unless that takes too long, when some of it has to do if what is left serves nothing, and at last if nobody loses anything by
    /// it; where there is no way back, what there is has to do; a foreign selector is corrected as soon as there is anything to
    /// point at.
    pub(crate) fn can_take(&self, to: Option<&Stack>, service: Service, intent: Intent) -> bool {
        let Some(to) = to else { return true };
        if intent == Intent::Promote && self.next.is_forced(to) {
            return self.seen.missing_live().is_none() && self.seen.can_stay(to);
        }
        let Some(seen) = self.stack(to) else {
            // Of the way back nothing is left.
            return intent == Intent::RollBack && self.is_unneeded() && self.overdue();
        };
        match intent {
            Intent::Promote => {
                let mut to_move = Service::ALL
                    .iter()
                    .filter(|service| !self.is_moved(**service, Some(to)));
                self.seen.missing_live().is_none()
                    && to_move.all(|service| {
                        seen.service(*service)
                            .is_some_and(|there| there.ready >= there.replicas.max(1) && there.current)
                    })
            }
            Intent::RollBack => {
                seen.complete()
                    || (seen.serves() && self.elapsed() >= SHORT_OF_ENDPOINTS)
                    || (self.is_unneeded() && (self.overdue() || self.is_better(to)))
            }
            Intent::Repair => seen.ready(service) > 0,
        }
    }

    /// The stacks that are kept as rendered. What was given up is left alone until its time is over.
    pub(crate) fn kept(&self) -> Vec<Stack> {
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

    pub(crate) fn keep(&self, stack: &Stack, actions: &mut Vec<Action>) {
        let seen = self.stack(stack);
        let live = self.next.live.as_ref().filter(|live| live.stack == *stack);
        if seen.is_none_or(|seen| seen.rendered.is_none() || !seen.whole) {
            // Only what is still declared can be rendered.
            let known = self
                .next
                .candidate
                .as_ref()
                .map(|candidate| (candidate.attempt, candidate.version.clone()));
            let known = live.map(|live| (live.attempt, live.version.clone())).or(known);
            let declared = self.is_declared(stack);
            // Also while time stands still.
            let candidate = self.next.candidate.as_ref().filter(|it| it.stack == *stack);
            let tested = candidate.is_some_and(|it| self.is_being_tested(it))
                && seen.is_none_or(|seen| seen.rendered.is_none());
            if let Some((attempt, version)) = known.filter(|_| declared && !tested) {
                actions.push(Action::Render {
                    stack: stack.clone(),
                    attempt,
                    version,
                });
            } else if seen.is_none_or(|seen| seen.rendered.is_none()) {
                return;
            }
        }
        if let Some(fence) = seen
            .filter(|seen| !seen.owned)
            .and_then(|seen| seen.rendered.clone())
        {
            let stack = stack.clone();
            actions.push(Action::Adopt { stack, fence });
        }
        // While traffic moves, counts stand still.
        let moving = self.next.phase.moves();
        // Put right before its next attempt has begun, what is being tested would pass for what was tested.
        let candidate = self.next.candidate.as_ref().filter(|it| it.stack == *stack);
        let altered =
            !moving && candidate.is_some_and(|it| self.is_being_tested(it) && !self.is_as_tested(it));
        for service in Service::ALL {
            let there = seen.and_then(|seen| seen.service(service));
            let replicas = self.replicas(stack, service);
            for part in [
                Part::ColourService,
                Part::Budget,
                Part::Workload,
                Part::Autoscaler,
            ] {
                if (moving && part == Part::Autoscaler) || (altered && part == Part::Workload) {
                    continue;
                }
                let there = there.and_then(|there| there.parts.get(&part));
                let scaled = part == Part::Workload
                    && seen
                        .and_then(|seen| seen.service(service))
                        .is_some_and(|seen| seen.replicas != replicas);
                let autoscaled = live
                    .and_then(|live| live.scale.as_ref())
                    .is_some_and(|scale| scale.of(service).autoscaling.is_some());
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

    /// Replicas of a kept stack. A count that came with another revision waits for that revision's promotion.
    pub(crate) fn replicas(&self, stack: &Stack, service: Service) -> u32 {
        let live = self.next.live.as_ref().filter(|live| live.stack == *stack);
        let seen = self.seen.replicas(stack, service);
        // What grows meanwhile has too few endpoints for a moment, and would be taken for lost. What somebody has taken away of what
        // is to take over comes back.
        if self.next.phase.moves() && seen > 0 {
            let takes_over = self.next.candidate.as_ref().is_some_and(|it| it.stack == *stack);
            let beside = self.next.live.as_ref();
            let beside = beside.map_or(0, |live| self.seen.replicas(&live.stack, service));
            let declared = u32::try_from(self.spec.services.get(service).replicas).unwrap_or(1);
            return if takes_over {
                seen.max(declared.min(beside))
            } else {
                seen
            };
        }
        let Some(scale) = live.and_then(|live| live.scale.as_ref()) else {
            return self.wanted(stack, service);
        };
        let scale = scale.of(service);
        let declared = u32::try_from(scale.replicas).unwrap_or(1);
        match seen {
            0 => declared,
            // An autoscaler's business.
            seen if scale.autoscaling.is_some() => seen,
            // Another count is declared already: what there is too much is not taken away before.
            seen if scale.replicas != self.spec.services.get(service).replicas => seen.max(declared),
            _ => declared,
        }
    }

    pub(crate) fn run_jobs(&self, actions: &mut Vec<Action>) {
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
                // They are made of what is declared by now. Something else may be, of which a reference is missing.
                _ if !self.is_declared(&candidate.stack) => {}
                Phase::Migrating => run(JobKind::Expand, &candidate.stack, candidate.attempt),
                // While some of its pods are others, nobody knows which of them would be tested.
                Phase::Testing if self.ready(&candidate.stack) => self
                    .tests()
                    .for_each(|kind| run(kind, &candidate.stack, candidate.attempt)),
                _ => {}
            }
        }
        if let (Phase::Verifying, Some(live)) = (self.next.phase, &self.next.live)
            && !live.smoke_passed
        {
            run(JobKind::Verify, &live.stack, live.attempt);
        }
    }

    /// Removes what belongs to no stack that is kept. A colour Service goes only after the last pod behind it.
    pub(crate) fn remove(&self, actions: &mut Vec<Action>) {
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
        // Nor what clients reach, whoever has sent them there.
        let goes = |stack: &Stack| !kept.contains(stack) && !self.seen.reaches(stack);
        for (stack, seen) in self.seen.stacks.iter().filter(|(stack, _)| goes(stack)) {
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
        // What is being adopted changes: it is looked at again before it is removed.
        let adopted = |stack| kept.contains(stack) && self.stack(stack).is_some_and(|it| !it.owned);
        for (job, seen) in self.seen.jobs.iter().filter(|(job, _)| !adopted(&job.stack)) {
            // A test that nobody waits for would go on to test what comes next at its address. A migration is never stopped.
            let may_go = seen.state != JobState::Running || !job.kind.migrates();
            if !self.needs(job) && may_go {
                actions.push(Action::DeleteJob(job.clone(), seen.fence.clone()));
            }
        }
    }

    /// The logs of what was given up are kept while its colour is not needed.
    pub(crate) fn logs_kept(&self) -> bool {
        matches!(self.next.phase, Phase::Failed | Phase::Held)
    }

    pub(crate) fn needs(&self, job: &Job) -> bool {
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
}
