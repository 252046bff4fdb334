//! Everything in the world that is not an operator: controllers, people, chaos; and what is true at the end.

use std::collections::{BTreeMap, BTreeSet};

use exchange_operator::{
    api::{ColourChoice, ExchangeDeploymentSpec as Spec, Service},
    observe::{Job, JobKind, JobState, Observed, Part, Requests, Target},
    plan::Action,
    status::{Phase, Stack, token},
};
use jiff::SignedDuration;

use super::{
    AUTOSCALING, Ban, LiveThere, NATURES, Names, Nature, Pod, View, Wakes, World, nature, unrecorded,
    with_object_of,
};

impl World {
    /// Controllers and kubelets do a bit of their work.
    pub(crate) fn kubelet(&mut self) {
        let pointed: Vec<Target> = self.live.values().map(|live| live.target.clone()).collect();
        for (stack, there) in &mut self.stacks {
            let collapsed = self.collapsed.contains(stack);
            let starts = nature(&stack.revision) != Nature::NeverReady && there.pieces.is_some();
            for (name, service) in &mut there.services {
                let healthy = starts && !(collapsed && *name == Service::Trade);
                service
                    .pods
                    .retain(|pod| !matches!(pod, Pod::Terminating | Pod::Dead));
                for pod in &mut service.pods {
                    if *pod == Pod::Starting && healthy {
                        *pod = Pod::Ready;
                    }
                }
                let wanted = if service.parts.contains_key(&Part::Workload) {
                    service.replicas
                } else {
                    0
                } as usize;
                // One is replaced at a time, by one that is ready as soon as it was.
                if service.others > 0 {
                    service.others -= 1;
                    there.replaced += 1;
                }
                while service.pods.len() < wanted {
                    service.pods.push(Pod::Starting);
                }
                for pod in service.pods.iter_mut().skip(wanted) {
                    *pod = Pod::Terminating;
                }
                if self.crowded.contains(&(stack.revision.clone(), *name))
                    && let Some(pod) = service.pods.iter_mut().take(wanted).last()
                {
                    *pod = Pod::Starting;
                }
            }
            let used = pointed.iter().any(|target| target.is(Some(stack)));
            let closed = u64::from(!self.clinging);
            there.open = if used {
                3
            } else {
                there.open.saturating_sub(closed)
            };
        }
        self.forget_empty();
    }

    /// The slice controller catches up.
    pub(crate) fn slices(&mut self) {
        self.slices.clear();
        for (stack, there) in &self.stacks {
            for (service, workload) in &there.services {
                let ready = workload.pods.iter().filter(|pod| **pod == Pod::Ready).count();
                if workload.parts.contains_key(&Part::ColourService) {
                    self.slices
                        .insert((stack.clone(), *service), u32::try_from(ready).unwrap());
                }
            }
        }
        self.live_slices.clear();
        for (service, live) in &self.live {
            let serving = self.stacks.iter().filter(|(stack, there)| {
                let workload = there.services.get(service);
                let chosen = match &live.target {
                    Target::Nothing => false,
                    Target::Stack(target) => target == *stack,
                    // Where nothing is recorded people would have to decide.
                    Target::Foreign => live.led.as_ref() == Some(*stack) && self.status.attempt > 0,
                };
                chosen && workload.is_some_and(|it| it.pods.contains(&Pod::Ready))
            });
            let listed = serving.map(|(stack, _)| stack.clone()).collect();
            self.live_slices.insert(*service, listed);
        }
    }

    /// Jobs finish as their revision lets them.
    pub(crate) fn run_jobs(&mut self) {
        let serves = |slices: &BTreeMap<(Stack, Service), u32>, stack: &Stack| {
            Service::ALL.iter().all(|service| {
                slices
                    .get(&(stack.clone(), *service))
                    .is_some_and(|ready| *ready > 0)
            })
        };
        for (job, there) in &mut self.jobs {
            if there.seen.state != JobState::Running {
                continue;
            }
            let nature = nature(&job.stack.revision);
            let fails = match job.kind {
                JobKind::Expand => nature == Nature::CannotMigrate,
                JobKind::Smoke | JobKind::Test(_) => nature == Nature::FailsTests,
                JobKind::Verify => nature == Nature::FailsVerification,
                JobKind::Contract => false,
            };
            let needs_pods = matches!(job.kind, JobKind::Smoke | JobKind::Test(_) | JobKind::Verify);
            if needs_pods && !serves(&self.slices, &job.stack) {
                continue;
            }
            there.seen.state = if fails {
                JobState::Failed("as it must".to_owned())
            } else {
                JobState::Passed
            };
            Self::touch(&mut there.seen.fence, &mut self.counter);
            if !fails {
                self.passed.insert(job.clone(), there.of.clone());
                self.passed_at.insert(job.clone(), self.counter);
            }
            if job.kind == JobKind::Verify && nature == Nature::Collapses {
                self.collapsed.insert(job.stack.clone());
            }
        }
        self.fall();
    }

    /// What has collapsed has no pods that serve.
    fn fall(&mut self) {
        for stack in &self.collapsed {
            let there = self.stacks.get_mut(stack);
            if let Some(trade) = there.and_then(|it| it.services.get_mut(&Service::Trade)) {
                for pod in trade.pods.iter_mut().filter(|pod| **pod == Pod::Ready) {
                    *pod = Pod::Starting;
                }
                self.slices.insert((stack.clone(), Service::Trade), 0);
                if let Some(listed) = self.live_slices.get_mut(&Service::Trade) {
                    listed.retain(|it| it != stack);
                }
            }
        }
    }

    pub(crate) fn wait(&mut self, seconds: i64) {
        self.now = self.now.checked_add(SignedDuration::from_secs(seconds)).unwrap();
    }

    /// Everything around the operators takes its course.
    pub(crate) fn round(&mut self) {
        self.kubelet();
        self.slices();
        self.run_jobs();
        self.wait(1);
    }

    /// One pod of this service has nowhere to run any more.
    pub(crate) fn crowd(&mut self, revision: &str, service: Service) {
        note!(self, "chaos: one pod of {revision} {service} has nowhere to run");
        self.crowded.insert((revision.to_owned(), service));
        self.kubelet();
        self.slices();
    }

    fn edited(&mut self) {
        self.counter += 1;
        self.version = self.counter;
    }

    /// People change the spec.
    pub(crate) fn declare(&mut self, change: impl FnOnce(&mut Spec)) {
        change(&mut self.spec);
        self.generation += 1;
        self.edited();
    }

    pub(crate) fn release(&mut self, index: usize) {
        let revision = format!("r{index}");
        self.declarations += u64::from(self.revision != revision);
        self.revision = revision;
        note!(self, "people: release r{index}");
        self.declare(|spec| spec.version = format!("r{index}"));
    }

    pub(crate) fn change_gates(&mut self, gates: u32) {
        self.declarations += u64::from(self.gates != gates);
        self.gates = gates;
        note!(self, "people: gates {gates}");
        self.declare(|_| {});
    }

    pub(crate) fn colour(&mut self, colour: ColourChoice) {
        note!(self, "people: colour {colour:?}");
        self.declarations += u64::from(self.spec.rollout.colour != colour);
        self.declare(|spec| spec.rollout.colour = colour);
    }

    pub(crate) fn autoscale(&mut self, on: bool) {
        self.declare(|spec| {
            spec.services.trade.autoscaling = on.then_some(AUTOSCALING);
        });
    }

    /// Somebody scales the live workload by hand.
    pub(crate) fn scale_by_hand(&mut self, replicas: u32) {
        let live = self
            .status
            .live
            .as_ref()
            .and_then(|live| self.stacks.get_mut(&live.stack));
        if let Some(there) = live.and_then(|it| it.services.get_mut(&Service::Trade))
            && let Some(workload) = there.parts.get_mut(&Part::Workload)
        {
            there.replicas = replicas;
            Self::touch(&mut workload.fence, &mut self.counter);
        }
    }

    /// A reference goes missing, or comes back.
    pub(crate) fn miss(&mut self, missing: bool) {
        note!(self, "people: a reference is missing: {missing}");
        // Nobody could tell before that they were changed.
        let changed = self.status.gates != format!("g{}", self.gates);
        self.declarations += u64::from(self.missing && !missing && changed);
        self.missing = missing;
    }

    /// The autoscaler moves the live workload.
    pub(crate) fn scale_by_load(&mut self, replicas: u32) {
        let Some(live) = self.status.live.clone() else {
            return;
        };
        if let Some(there) = self
            .stacks
            .get_mut(&live.stack)
            .and_then(|it| it.services.get_mut(&Service::Trade))
            && there.parts.contains_key(&Part::Autoscaler)
            && let Some(workload) = there.parts.get_mut(&Part::Workload)
        {
            there.replicas = replicas;
            Self::touch(&mut workload.fence, &mut self.counter);
        }
    }

    /// People annotate the object with the name of the present candidate, live stack, or rejected release.
    pub(crate) fn ask(&mut self, set: impl FnOnce(&mut Requests, Names)) {
        let candidate = self
            .status
            .candidate
            .as_ref()
            .map(|it| token(&it.stack, it.attempt));
        let live = self.status.live.as_ref().map(|it| token(&it.stack, it.attempt));
        let rejected = self
            .status
            .rejected
            .as_ref()
            .map(|it| token(&it.stack, it.attempt));
        set(
            &mut self.requests,
            Names {
                candidate,
                live,
                rejected,
            },
        );
        note!(self, "people: {:?}", self.requests);
        self.edited();
    }

    pub(crate) fn kill_pods(&mut self, stack: usize, service: Service) {
        if let Some(there) = self
            .stacks
            .values_mut()
            .nth(stack)
            .and_then(|it| it.services.get_mut(&service))
        {
            there.pods.fill(Pod::Dead);
            note!(self, "chaos: pods of stack {stack} {service} die");
        }
    }

    /// The trade pods of a stack die for good.
    pub(crate) fn collapse(&mut self, stack: usize) {
        if let Some(stack) = self.stacks.keys().nth(stack).cloned() {
            note!(self, "chaos: {stack} collapses");
            self.collapsed.insert(stack);
            self.fall();
        }
    }

    /// A good version of which nothing is there.
    pub(crate) fn absent(&self) -> Option<usize> {
        (0..NATURES.len()).find(|index| {
            let revision = format!("r{index}");
            let there = self.stacks.keys().any(|stack| stack.revision == revision);
            nature(&revision) == Nature::Good && !there
        })
    }

    /// One pod of a service dies.
    pub(crate) fn kill_one_pod(&mut self, stack: usize, service: Service) {
        let there = self.stacks.values_mut().nth(stack);
        let there = there.and_then(|it| it.services.get_mut(&service));
        let ready = there.and_then(|it| it.pods.iter_mut().find(|pod| **pod == Pod::Ready));
        if let Some(pod) = ready {
            *pod = Pod::Dead;
            note!(self, "chaos: one pod of stack {stack} {service} dies");
            self.slices();
        }
    }

    /// The object is deleted. What belongs to it goes later; whoever is in the middle of something stops.
    pub(crate) fn delete(&mut self) -> Result<(), String> {
        note!(self, "people: the object is deleted");
        self.deleting = true;
        self.past.clear();
        self.edited();
        for who in 0..2 {
            for _ in 0..20 {
                self.step(who, View::Fresh)?;
            }
        }
        Ok(())
    }

    pub(crate) fn edit_live(&mut self, service: Service, stack: Option<usize>) {
        let target = stack
            .and_then(|index| self.stacks.keys().nth(index).cloned())
            .map_or(Target::Foreign, Target::Stack);
        if let Some(there) = self.live.get_mut(&service) {
            note!(self, "chaos: {service} edited to {target:?}");
            there.led = there.target.stack().cloned().or_else(|| there.led.take());
            there.target = target;
            there.tampered = true;
            Self::touch(&mut there.fence, &mut self.counter);
        }
        if self.status.attempt == 0 {
            self.vouch();
        }
    }

    pub(crate) fn delete_live(&mut self, service: Service) {
        note!(self, "chaos: live {service} deleted");
        self.live.remove(&service);
    }

    pub(crate) fn spoil_part(&mut self, stack: usize, service: Service, part: Part, delete: bool) {
        let Some(there) = self
            .stacks
            .values_mut()
            .nth(stack)
            .and_then(|it| it.services.get_mut(&service))
        else {
            return;
        };
        note!(
            self,
            "chaos: {part:?} of stack {stack} {service} spoiled, deleted {delete}"
        );
        if delete {
            there.stripped.remove(&part);
            if there.parts.remove(&part).is_some() && part == Part::Workload {
                there.end();
            }
        } else if let Some(object) = there.parts.get_mut(&part) {
            object.intact = false;
            Self::touch(&mut object.fence, &mut self.counter);
            if part == Part::Workload {
                there.edit(Some(self.counter));
            }
        }
        self.forget_empty();
    }

    /// Somebody changes or deletes what the candidate's pods of a service are made of.
    pub(crate) fn spoil_candidate(&mut self, service: Service, delete: bool) {
        let candidate = self.status.candidate.as_ref();
        let index = self
            .stacks
            .keys()
            .position(|stack| candidate.is_some_and(|it| it.stack == *stack));
        if let Some(index) = index {
            self.spoil_part(index, service, Part::Workload, delete);
        }
    }

    /// Somebody takes the labels from an object of a stack. Services are found by their names.
    pub(crate) fn strip(&mut self, stack: usize, service: Service, part: Part) {
        let there = self.stacks.values_mut().nth(stack);
        if let Some(there) = there.and_then(|it| it.services.get_mut(&service))
            && part != Part::ColourService
            && let Some(object) = there.parts.get_mut(&part)
        {
            note!(
                self,
                "chaos: {part:?} of stack {stack} {service} loses its labels"
            );
            Self::touch(&mut object.fence, &mut self.counter);
            there.stripped.insert(part);
        }
        self.forget_empty();
    }

    /// Somebody deletes what was rendered for the candidate, and nothing else.
    pub(crate) fn lose_candidate(&mut self) {
        if let Some(candidate) = self.status.candidate.clone()
            && !matches!(self.status.phase, Phase::Promoting | Phase::RollingBack)
            && let Some(there) = self.stacks.get_mut(&candidate.stack)
        {
            note!(
                self,
                "chaos: what was rendered for {} is deleted",
                candidate.stack
            );
            there.rendered = None;
            self.forget_empty();
        }
    }

    pub(crate) fn delete_job(&mut self, index: usize) {
        // A finished contract is what keeps a sleeper from starting it again; it is owned and labelled, and left alone.
        let found = self
            .jobs
            .keys()
            .filter(|job| job.kind != JobKind::Contract)
            .nth(index)
            .cloned();
        if let Some(job) = found {
            note!(self, "chaos: {job:?} deleted");
            self.jobs.remove(&job);
        }
    }

    /// Somebody deletes a Job of the candidate's attempt.
    pub(crate) fn delete_job_of_candidate(&mut self, kind: &JobKind) {
        let Some(candidate) = &self.status.candidate else {
            return;
        };
        let job = Job {
            kind: kind.clone(),
            stack: candidate.stack.clone(),
            attempt: candidate.attempt,
        };
        if self.jobs.remove(&job).is_some() {
            note!(self, "chaos: {job:?} deleted");
        }
    }

    pub(crate) fn fail_jobs(&mut self) {
        for there in self
            .jobs
            .values_mut()
            .filter(|it| it.seen.state == JobState::Running)
        {
            there.seen.state = JobState::Failed("terminated".to_owned());
            Self::touch(&mut there.seen.fence, &mut self.counter);
        }
    }

    // ---- for stories that are told step by step -------------------------------------------------------------------

    /// One operator works until this phase is recorded.
    pub(crate) fn until(&mut self, who: usize, phase: Phase) {
        for _ in 0..2000 {
            if self.status.phase == phase {
                return;
            }
            self.step(who, View::Fresh).unwrap();
            if self.status.phase != phase {
                self.round();
            }
        }
        panic!("{phase} is not reached: {:#?}", self.trace);
    }

    /// One operator goes on until it has nothing more in hand.
    pub(crate) fn finish(&mut self, who: usize) {
        while !self.operators[who].idle() {
            self.step(who, View::Fresh).unwrap();
        }
    }

    /// What the operator is about to write, checked and all.
    pub(crate) fn next_action(&self, who: usize) -> Option<&Action> {
        self.operators[who]
            .actions
            .front()
            .filter(|_| self.operators[who].status.is_none())
    }

    /// The phase that the operator is about to record.
    pub(crate) fn recording(&self, who: usize) -> Option<Phase> {
        self.operators[who]
            .status
            .as_ref()
            .map(|(status, _)| status.phase)
    }

    /// Somebody deletes what was rendered of a revision, and nothing else.
    pub(crate) fn lose_rendered(&mut self, revision: &str) {
        for there in self
            .stacks
            .iter_mut()
            .filter(|(stack, _)| stack.revision == revision)
            .map(|(_, it)| it)
        {
            there.rendered = None;
        }
    }

    /// The object as it is now, for an operator that is served it later.
    pub(crate) fn remember(&self) -> (Observed, u64) {
        (self.observe(), self.version)
    }

    /// An operator is served an old state of the object, and everything else as it is.
    pub(crate) fn look_at_old_object(&mut self, who: usize, old: &(Observed, u64)) {
        let seen = with_object_of(&old.0, &self.observe());
        self.operators[who].stacks = self.pieces();
        self.plan(who, seen, old.1).unwrap();
    }

    /// The object is deleted without its children, and created again.
    pub(crate) fn lose_status(&mut self) {
        note!(
            self,
            "people: the object is deleted without its children, and created again"
        );
        self.status = unrecorded();
        self.requests = Requests::default();
        let targets = self.targets();
        self.orphaned = targets.iter().flatten().any(|it| self.stacks.contains_key(it));
        // What belongs to it is read after it has been found: never as it was before there was this object.
        self.past.clear();
        // What is still created for the object that was goes with it, as what belongs to nobody that exists.
        for operator in &mut self.operators {
            operator.guarded = false;
        }
        // Each loses its owner, so that what was planned for it as it was is refused.
        for live in self.live.values_mut() {
            live.orphaned = true;
            Self::touch(&mut live.fence, &mut self.counter);
        }
        self.vouch();
        for there in self.stacks.values_mut() {
            there.orphaned = true;
            let parts = there.services.values_mut().flat_map(|it| it.parts.values_mut());
            let parts = parts.map(|part| &mut part.fence);
            for fence in parts.chain(&mut there.rendered).chain(&mut there.pieces) {
                Self::touch(fence, &mut self.counter);
            }
        }
        self.edited();
    }

    /// While nothing is recorded, what the live Services point at is taken for what should have the traffic.
    fn vouch(&mut self) {
        for stack in self.targets().into_iter().flatten() {
            match self.stacks.get(&stack).and_then(|it| it.origin.clone()) {
                Some(origin) => _ = self.proven.insert((stack, origin), u32::MAX),
                None => drop(self.vouched.insert(stack)),
            }
        }
    }

    /// Nobody can say what was live: people point everything at one of the stacks that have traffic, and declare it if
    /// nothing else says what it is.
    pub(crate) fn decide_for_one(&mut self) {
        let pointed = self.targets().into_iter().flatten();
        let ready = |stack: &Stack| {
            let ready = |service| self.slices.get(&(stack.clone(), service)).copied().unwrap_or(0);
            Service::ALL.iter().filter(|service| ready(**service) > 0).count()
        };
        let Some(stack) = pointed.max_by_key(ready) else {
            return;
        };
        note!(self, "people: decide for {stack}");
        for live in self.live.values_mut() {
            live.target = Target::Stack(stack.clone());
            live.tampered = true;
            Self::touch(&mut live.fence, &mut self.counter);
        }
        let lost = self.stacks.get(&stack).is_some_and(|it| it.rendered.is_none());
        if lost
            && let Some(index) = stack
                .revision
                .strip_prefix('r')
                .and_then(|index| index.parse().ok())
        {
            self.release(index);
        }
        self.vouch();
    }

    /// What is to be true while a refusal lasts and nothing else happens: what has a deadline has ended, and what has none
    /// says what it is that keeps it.
    pub(crate) fn is_told(&self, ban: Ban) -> Result<(), String> {
        let endless = match self.status.phase {
            Phase::Live | Phase::Held | Phase::Failed => false,
            Phase::Pending | Phase::RollingBack => true,
            Phase::Promoting if self.status.rejected.is_some() => true,
            phase => return Err(format!("P7: {phase} for ever, while {ban:?} is refused")),
        };
        match self.stalled() {
            Some((_, message)) if !endless || message.contains("s to touch") => Ok(()),
            None if !endless => Ok(()),
            other => Err(format!("P9: {ban:?} is refused, and what is told is {other:?}")),
        }
    }

    /// Why nothing goes on without somebody's help.
    pub(crate) fn stalled(&self) -> Option<(&str, &str)> {
        let conditions = self.status.conditions.iter();
        let mut stalled = conditions.filter(|it| it.type_ == "Stalled" && it.status == "True");
        stalled.next().map(|it| (it.reason.as_str(), it.message.as_str()))
    }

    pub(crate) fn targets(&self) -> Vec<Option<Stack>> {
        let target = |live: &LiveThere| match &live.target {
            Target::Stack(stack) => Some(stack.clone()),
            _ => None,
        };
        self.live.values().map(target).collect()
    }

    pub(crate) fn has(&self, revision: &str) -> bool {
        self.stacks
            .iter()
            .any(|(stack, there)| stack.revision == revision && there.services.len() == 3)
    }

    /// All pods of a revision die and do not come back.
    pub(crate) fn lose(&mut self, revision: &str, service: Service) {
        for ((stack, of), ready) in &mut self.slices {
            if stack.revision == revision && *of == service {
                *ready = 0;
            }
        }
    }

    // ---- the end ----------------------------------------------------------------------------------------------

    /// One undisturbed operator, until it has nothing to do past every deadline, retention and drain. When it has nothing
    /// in hand it sleeps, until its own clock or an event wakes it. Who hears every event sleeps for two seconds at the
    /// most while there is something to do.
    pub(crate) fn settle(&mut self, wakes: Wakes) -> Result<(), String> {
        // Who is refused tries again and again.
        let banned = self.ban.is_some();
        let calm = if banned { 80 } else { 8 };
        let (mut still, mut late) = (0, 0);
        for _ in 0..3000 {
            let before = self.writes;
            if banned || self.is_awake(wakes) {
                self.listens(wakes);
                self.step(0, View::Fresh)?;
                late = 0;
            } else if wakes == Wakes::Events && self.has_work(0) {
                late += 1;
            }
            if late > 2 {
                return Err(self.overslept());
            }
            self.round();
            still = if self.writes == before && (banned || self.operators[0].idle()) {
                still + 1
            } else {
                0
            };
            if still > calm {
                let rested = match wakes {
                    Wakes::Events if !banned => self.sleeps()?,
                    _ => self.sleeps_through(calm)?,
                };
                if rested {
                    return Ok(());
                }
                still = 0;
            }
        }
        Err(format!(
            "P7: no end is reached; at last {:?}",
            self.trace.iter().rev().take(12).rev().collect::<Vec<_>>()
        ))
    }

    fn overslept(&self) -> String {
        let (phase, due) = (self.status.phase, self.operators[0].due);
        format!(
            "P7: sleeps in {phase} at {} until {due:?}, and there is something to do",
            self.now
        )
    }

    /// Who is about to look knows what watches have told until then.
    fn listens(&mut self, wakes: Wakes) {
        if wakes == Wakes::Events && self.operators[0].idle() {
            self.operators[0].heard = self.heard();
        }
    }

    /// Whether it has something in hand, or something wakes it.
    fn is_awake(&self, wakes: Wakes) -> bool {
        let operator = &self.operators[0];
        !operator.idle()
            || operator.due.is_none_or(|due| due <= self.now)
            || (wakes == Wakes::Events && operator.heard != self.heard())
    }

    /// Whether there is nothing to do but what is refused when the clock wakes it, and after a long time in which nobody has
    /// looked.
    fn sleeps_through(&mut self, times: u32) -> Result<bool, String> {
        self.now = self.operators[0].due.unwrap_or(self.now).max(self.now);
        let before = self.writes;
        self.step(0, View::Fresh)?;
        if self.writes != before || (self.ban.is_none() && !self.operators[0].idle()) {
            return Ok(false);
        }
        self.wait(4000);
        self.round();
        let before = self.writes;
        for _ in 0..times + 2 {
            self.step(0, View::Fresh)?;
            self.round();
        }
        Ok(self.writes == before)
    }

    /// Whether nothing but time passes for as long. The operator looks when its clock says so, and there is nothing to
    /// do, nor was there two seconds before.
    fn sleeps(&mut self) -> Result<bool, String> {
        let two_seconds = SignedDuration::from_secs(2);
        let end = self.now.checked_add(SignedDuration::from_secs(4000)).unwrap();
        while self.now < end {
            let due = self.operators[0].due.unwrap_or(self.now).max(self.now);
            let before = due.checked_sub(two_seconds).unwrap();
            if before > self.now {
                self.now = before;
                if self.has_work(0) {
                    return Err(self.overslept());
                }
            }
            self.now = due;
            self.listens(Wakes::Events);
            self.step(0, View::Fresh)?;
            if !self.operators[0].idle() {
                return Ok(false);
            }
            self.round();
        }
        Ok(true)
    }

    /// Suspended for as long as it takes: a move that has begun, and a way back that somebody asks for, come to their end.
    /// Only what has nowhere to go goes on.
    pub(crate) fn moves_although_suspended(&mut self) -> Result<(), String> {
        self.ban = None;
        self.declare(|spec| spec.suspend = true);
        self.ask(|requests, names| requests.rollback = names.live);
        let mut still = 0;
        for _ in 0..2000 {
            self.step(0, View::Fresh)?;
            self.round();
            still = if self.status.phase.moves() { 0 } else { still + 1 };
            // Whoever is in the middle of something else comes to it afterwards.
            if still > 100 {
                return Ok(());
            }
        }
        let lost = |stack: Option<&Stack>| stack.is_none_or(|stack| self.is_lost(stack));
        let candidate = self.status.candidate.as_ref().map(|it| &it.stack);
        let crowded = |stack: &Stack| {
            self.crowded
                .iter()
                .any(|(revision, _)| *revision == stack.revision)
        };
        let short = candidate.is_some_and(crowded);
        if lost(self.status.live.as_ref().map(|it| &it.stack)) && (lost(candidate) || short) {
            return Ok(());
        }
        Err(format!("P4: {} has no end while suspended", self.status.phase))
    }

    /// Pods of it are never ready, or never again.
    fn is_lost(&self, stack: &Stack) -> bool {
        self.collapsed.contains(stack) || nature(&stack.revision) == Nature::NeverReady
    }

    /// What has to be true when nothing happens any more.
    pub(crate) fn at_the_end(&self) -> Result<(), String> {
        let status = &self.status;
        let live = status.live.as_ref().map(|live| live.stack.clone());
        for service in Service::ALL {
            let there = self
                .live
                .get(&service)
                .ok_or_else(|| format!("P7: live {service} is missing"))?;
            let dead = live.as_ref().is_some_and(|live| self.is_lost(live));
            if !there.target.is(live.as_ref()) && !dead {
                return Err(format!(
                    "P4: at the end {service} points at {:?}, live is {live:?}",
                    there.target
                ));
            }
        }
        // Clients that cannot be taken back from where somebody has sent them are not cut off.
        let listed = |stack: &Stack| self.live_slices.values().any(|listed| listed.contains(stack));
        let reached =
            |stack: &Stack| listed(stack) || self.live.values().any(|there| there.target.is(Some(stack)));
        let kept = status.previous.as_ref().map(|it| &it.stack);
        if kept.is_some_and(|stack| !reached(stack)) {
            return Err("P7: the old stack is never retired".to_owned());
        }
        let allowed: BTreeSet<&Stack> = live
            .iter()
            .chain(status.candidate.as_ref().map(|candidate| &candidate.stack))
            .chain(kept)
            .collect();
        if let Some(left) = self
            .stacks
            .keys()
            .find(|stack| !allowed.contains(stack) && !reached(stack))
        {
            return Err(format!("P7: {left} is left over"));
        }
        let fixed = self.spec.rollout.colour.fixed();
        let gates = format!("g{}", self.gates);
        match status.phase {
            Phase::Live => {
                let right = status.live.as_ref().is_some_and(|it| {
                    it.stack.revision == self.revision
                        && it.verified
                        && fixed.is_none_or(|c| c == it.stack.colour)
                });
                if !right {
                    return Err(format!("P9: Live, but {live:?} is not {}", self.revision));
                }
            }
            Phase::Failed | Phase::Held => {
                let rejected = status.rejected.as_ref().ok_or("P9: given up without a reason")?;
                if rejected.stack.revision != self.revision {
                    return Err("P9: what was given up is not what is declared".to_owned());
                }
                if !rejected.gates.is_empty() && rejected.gates != gates {
                    return Err("P7: what has other gates now is not tried again".to_owned());
                }
            }
            Phase::Pending => {
                let in_use = live
                    .as_ref()
                    .is_some_and(|it| fixed == Some(it.colour) && it.revision != self.revision);
                if !in_use {
                    return Err("P7: Pending for ever".to_owned());
                }
            }
            other => return Err(format!("P7: {other} for ever")),
        }
        if let Some(live) = &live {
            for service in Service::ALL {
                let there = self.stacks.get(live).and_then(|it| it.services.get(&service));
                let there = there.ok_or_else(|| format!("P7: live {service} does not run"))?;
                let ready = there.pods.iter().filter(|pod| **pod == Pod::Ready).count();
                let parts = [Part::ColourService, Part::Budget, Part::Workload];
                let intact = parts
                    .iter()
                    .all(|part| there.parts.get(part).is_some_and(|it| it.intact));
                let scale = status.live.as_ref().and_then(|it| it.scale.as_ref());
                let few = scale.map(|it| it.of(service)).is_some_and(|it| {
                    it.autoscaling.is_none() && i64::from(there.replicas) < i64::from(it.replicas)
                });
                if few {
                    return Err(format!("P7: live {service} is left with {} pods", there.replicas));
                }
                let dead = self.is_lost(live) && !status.live.as_ref().is_some_and(|it| it.verified);
                if (ready == 0 && !dead) || !intact || there.others > 0 {
                    return Err(format!("P7: live {service}: {ready} pods, intact {intact}"));
                }
            }
        }
        Ok(())
    }
}
