//! What an operator may not plan that sees this, whatever else is true: one rule for each thing that the record of what was
//! done cannot show, or shows too late. Nothing here asks how `decide` comes to its plans.

use std::collections::{BTreeMap, BTreeSet};

use exchange_operator::{
    api::{ExchangeDeploymentSpec as Spec, Service},
    observe::{Job, JobKind, JobState, Observed, Part, StackSeen, Target},
    plan::{Action, Plan},
    status::{ExchangeDeploymentStatus as Status, Live, Phase, PreviousState, Reason, Stack, token},
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// What was seen, and what is to be recorded and done.
struct Case<'a> {
    spec: &'a Spec,
    seen: &'a Observed,
    old: &'a Status,
    new: &'a Status,
    actions: &'a [Action],
    now: Timestamp,
}

/// Whether this may be planned, or which promise it breaks.
pub(super) fn judge(spec: &Spec, seen: &Observed, plan: &Plan, now: Timestamp) -> Result<(), String> {
    let old = &seen.status;
    let case = Case {
        spec,
        seen,
        old,
        new: plan.status.as_ref().unwrap_or(old),
        actions: &plan.actions,
        now,
    };
    case.time_stands_still()?;
    case.nothing_is_taken_blindly()?;
    case.begins()?;
    case.promotes()?;
    case.ends_a_move()?;
    case.goes_back()?;
    case.verifies()?;
    case.gives_up()?;
    case.tells()?;
    case.waits()?;
    case.retires()?;
    case.shrinks()?;
    case.takes_over()
}

/// The smoke test through the live addresses, of what is live.
pub(super) fn verify_job(live: &Live) -> Job {
    Job {
        kind: JobKind::Verify,
        stack: live.stack.clone(),
        attempt: live.attempt,
    }
}

fn seconds(duration: kube::core::Duration) -> SignedDuration {
    SignedDuration::try_from(std::time::Duration::from(duration)).unwrap()
}

fn is(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

impl Case<'_> {
    fn stack(&self, stack: &Stack) -> Option<&StackSeen> {
        self.seen.stacks.get(stack)
    }

    fn serves(&self, stack: &Stack) -> bool {
        self.stack(stack).is_some_and(StackSeen::serves)
    }

    /// Of a pause that ends with this plan.
    fn pause(&self) -> SignedDuration {
        match (self.old.stopped_since, self.new.stopped_since) {
            (Some(since), None) => self.now.duration_since(since),
            _ => SignedDuration::ZERO,
        }
    }

    fn clock(&self) -> Timestamp {
        self.new.stopped_since.unwrap_or(self.now)
    }

    fn time_stands_still(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        if let (Some(was), Some(is_now)) = (old.phase_since, new.phase_since)
            && (old.phase, old.attempt, old.epoch) == (new.phase, new.attempt, new.epoch)
        {
            let pause = if new.phase.moves() {
                SignedDuration::ZERO
            } else {
                self.pause()
            };
            is(is_now == was + pause, || {
                format!("P7: {} is said to last since {is_now}", new.phase)
            })?;
        }
        if let (Some(was), Some(is_now)) = (&old.previous, &new.previous)
            && was.stack == is_now.stack
        {
            is(is_now.until == was.until + self.pause(), || {
                "P5: the way back is kept for another time".to_owned()
            })?;
        }
        if new.stopped_since.is_none() {
            return Ok(());
        }
        let starts = |action: &&Action| matches!(action, Action::Run(job) if job.kind != JobKind::Contract);
        if let Some(action) = self.actions.iter().find(starts) {
            return Err(format!("{action:?} while paused or suspended"));
        }
        let turns = new.phase == Phase::RollingBack && !old.phase.moves();
        is(!turns || new.rejected.is_some(), || {
            "goes back to what is named again while paused or suspended".to_owned()
        })
    }

    fn nothing_is_taken_blindly(&self) -> Result<(), String> {
        if self.new.phase.moves() {
            let scales = |action: &Action| {
                matches!(
                    action,
                    Action::Apply {
                        part: Part::Autoscaler,
                        ..
                    }
                )
            };
            is(!self.actions.iter().any(scales), || {
                "P1: an autoscaler is written while traffic moves".to_owned()
            })?;
        }
        if self.new.live.is_none() && self.new.attempt == 0 {
            let removes =
                |action: &&Action| matches!(action, Action::Delete { .. } | Action::Unrender { .. });
            if let Some(action) = self.actions.iter().find(removes) {
                return Err(format!("P1: {action:?} before the first attempt"));
            }
        }
        Ok(())
    }

    /// A release begins, and later its schema is expanded.
    fn begins(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        if new.phase == Phase::Pending && new.attempt > old.attempt {
            is(self.seen.taken.is_empty(), || {
                "begins although a name belongs to somebody else".to_owned()
            })?;
        }
        if new.phase == Phase::Migrating && old.phase == Phase::Pending {
            let live = new.live.as_ref().map(|it| &it.stack);
            let mut others = self.seen.stacks.keys().filter(|stack| Some(*stack) != live);
            if let Some(other) = others.next() {
                return Err(format!("P5: the schema is expanded while {other} is there"));
            }
            is(old.previous.is_none(), || {
                "P5: the schema is expanded while the old stack is recorded".to_owned()
            })?;
        }
        Ok(())
    }

    fn promotes(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        if new.phase != Phase::Promoting || old.phase.moves() {
            return Ok(());
        }
        let candidate = new.candidate.as_ref().ok_or("P3: promotes nothing")?;
        is(self.seen.taken.is_empty(), || {
            "promotes although a name belongs to somebody else".to_owned()
        })?;
        if let Ok(declared) = &self.seen.declared {
            is(declared.has_gates(&candidate.gates), || {
                "P3: other gates are declared than it has passed".to_owned()
            })?;
        }
        let live = new.live.as_ref().and_then(|live| self.stack(&live.stack));
        for service in Service::ALL {
            let ready = self.stack(&candidate.stack).map_or(0, |seen| seen.ready(service));
            let has = live
                .and_then(|seen| seen.service(service))
                .map_or(0, |seen| seen.replicas);
            let wanted = has.max(u32::try_from(self.spec.services.get(service).replicas).unwrap());
            is(ready >= wanted, || {
                format!("P3: promotes {ready} {service} pods of {wanted}")
            })?;
        }
        Ok(())
    }

    fn ends_a_move(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        if old.phase == Phase::RollingBack && new.phase == Phase::Promoting {
            let traffic = self.seen.refused.as_ref().is_some_and(|it| it.traffic);
            is(!traffic, || {
                "P4: what the API server refuses to move back is moved forward".to_owned()
            })?;
            // Whose clients would find nobody there, and do now.
            let loses = |to: &Stack| {
                let ready = |stack, service| self.stack(stack).map_or(0, |it| it.ready(service));
                Service::ALL.into_iter().find(|service| {
                    let served = self.seen.live.get(service).is_none_or(|live| match &live.target {
                        Target::Stack(there) => there != to && ready(there, *service) > 0,
                        Target::Foreign => live.endpoints.iter().any(|there| there != to),
                        Target::Nothing => false,
                    });
                    ready(to, *service) == 0 && served
                })
            };
            let back = old.live.as_ref().map(|live| loses(&live.stack));
            is(back != Some(None), || "P5: the way back is not taken".to_owned())?;
            let forward = old.candidate.as_ref().and_then(|left| loses(&left.stack));
            return forward.map_or(Ok(()), |service| {
                Err(format!("P4: {service} is moved forward to where nobody is"))
            });
        }
        let Some(candidate) = old
            .candidate
            .as_ref()
            .filter(|_| old.phase == Phase::Promoting && !new.phase.moves())
        else {
            return Ok(());
        };
        let stack = &candidate.stack;
        let arrived = self.seen.answers.as_ref() == Some(stack)
            && Service::ALL.iter().all(|service| {
                let live = self.seen.live.get(service);
                live.is_some_and(|live| live.endpoints.as_slice() == std::slice::from_ref(stack))
            });
        // Nobody would find anybody elsewhere.
        let forced = old.is_forced(stack);
        is(arrived || forced, || {
            "P4: the swap has ended, and the traffic has not followed".to_owned()
        })?;
        let back = new.previous.as_ref().is_some_and(|it| it.way_back);
        is(!(forced && back), || {
            "P5: the way back is to what could not serve".to_owned()
        })
    }

    /// Somebody's request is about one stack and attempt, and no other is left for it.
    fn goes_back(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let left = new.rejected.as_ref().filter(|it| {
            let asked = it.reason == Reason::RolledBack;
            asked && new.phase == Phase::RollingBack && old.phase != Phase::RollingBack
        });
        let asked = self.seen.requests.rollback.as_ref();
        let meant = left.is_none_or(|left| asked == Some(&token(&left.stack, left.attempt)));
        is(meant, || {
            format!("P7: {asked:?} was asked for, and another stack is left")
        })
    }

    fn verifies(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let Some(live) = new.live.as_ref().filter(|live| {
            let verified = old.phase == Phase::Verifying && new.phase == Phase::Live;
            verified && live.verified
        }) else {
            return Ok(());
        };
        for service in Service::ALL {
            let reached = self
                .seen
                .live
                .get(&service)
                .is_some_and(|it| it.endpoints.contains(&live.stack));
            is(reached && self.serves(&live.stack), || {
                format!("P3: verified, and no client reaches {service}")
            })?;
        }
        let job = verify_job(live);
        let passes = self.seen.jobs.get(&job).map(|job| &job.state) == Some(&JobState::Passed);
        let recorded = old.live.as_ref().is_some_and(|live| live.smoke_passed);
        is(passes || recorded, || {
            "P3: verified without its smoke test".to_owned()
        })?;
        let begun = old.phase_since.map(|since| since + self.pause());
        let watched = begun.map(|since| self.clock().duration_since(since));
        let duration = seconds(self.old.verification(self.spec).duration);
        is(watched.is_some_and(|it| it >= duration), || {
            format!("P3: verified after {watched:?}")
        })
    }

    /// What is held against a version has to have lasted, and somebody has to have looked.
    fn gives_up(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let unserved = new
            .rejected
            .as_ref()
            .is_some_and(|it| it.message.ends_with("no ready endpoints"));
        if old.phase != Phase::Verifying || new.phase == Phase::Verifying || !unserved {
            return Ok(());
        }
        let since = old.live.as_ref().and_then(|live| live.unserved_since);
        let lasted = since.is_some_and(|since| self.now.duration_since(since).as_secs() >= 10);
        is(lasted && self.seen.seen_before, || {
            "P7: given up for a moment without endpoints".to_owned()
        })?;
        is(!self.is_nowhere_to_go(), || {
            "P7: given up for an outage of both stacks".to_owned()
        })
    }

    /// Tools conclude from the conditions that what is declared was given up: that has to be what was given up.
    fn tells(&self) -> Result<(), String> {
        let stalled = |it: &&Condition| it.type_ == "Stalled" && it.status == "True";
        let stalled = self.new.conditions.iter().find(stalled);
        let (Some(stalled), Some(rejected), Ok(declared)) =
            (stalled, &self.new.rejected, &self.seen.declared)
        else {
            return Ok(());
        };
        let about_it = stalled.reason == rejected.reason.to_string();
        let same = rejected.stack.revision == declared.revision;
        is(!about_it || same || self.seen.deleting, || {
            format!(
                "P9: what is declared is told to be given up, and {} was",
                rejected.stack
            )
        })
    }

    /// Whether the way back from what is being verified does not serve either.
    fn is_nowhere_to_go(&self) -> bool {
        let previous = self.old.previous.as_ref().filter(|it| it.way_back);
        previous.is_some_and(|it| !self.serves(&it.stack))
    }

    /// What has no endpoints any more is not waited for until a deadline: clients have nowhere to go.
    fn waits(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let stays = (old.phase, old.attempt, old.epoch) == (new.phase, new.attempt, new.epoch);
        if !stays || self.seen.deleting {
            return Ok(());
        }
        let empty = |stack: &Stack, service: Service| {
            let seen = self.stack(stack);
            seen.is_none_or(|seen| seen.ready(service) == 0)
        };
        match (old.phase, &old.candidate, &old.live) {
            (Phase::Promoting, Some(candidate), _) => {
                let stack = &candidate.stack;
                // If there is no way back, what is there has to do with what there is.
                let forced = old.is_forced(stack);
                let to_move = |service| {
                    let live = self.seen.live.get(&service);
                    live.is_none_or(|live| {
                        let there = live.target.stack().filter(|there| *there != stack);
                        there.is_some_and(|there| !empty(there, service))
                    })
                };
                let lost = Service::ALL
                    .into_iter()
                    .find(|service| (!forced || to_move(*service)) && empty(stack, *service));
                lost.map_or(Ok(()), |service| {
                    Err(format!(
                        "P4: the swap waits for endpoints of {service} of {stack}"
                    ))
                })
            }
            (Phase::Verifying, _, Some(live)) if self.seen.seen_before => {
                let since = live.unserved_since;
                let long = since.is_some_and(|since| self.now.duration_since(since).as_secs() >= 10);
                let unserved = Service::ALL.iter().any(|service| empty(&live.stack, *service));
                is(!long || !unserved || self.is_nowhere_to_go(), || {
                    format!("P1: {} is without endpoints and is waited for", live.stack)
                })
            }
            _ => Ok(()),
        }
    }

    fn retires(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let Some(was) = old
            .previous
            .as_ref()
            .filter(|it| it.state == PreviousState::Draining)
            .filter(|_| !new.phase.moves())
        else {
            return Ok(());
        };
        let drained = new
            .previous
            .as_ref()
            .is_none_or(|it| it.state != PreviousState::Draining);
        let open = self.stack(&was.stack).is_some_and(|seen| seen.open != Some(0));
        let lasted = self.clock().duration_since(was.since + self.pause());
        let late = lasted >= seconds(self.spec.rollout.drain_timeout);
        is(!drained || !open || late, || {
            format!("P1: {} counts as drained with connections open", was.stack)
        })
    }

    /// What is no way back does not grow, also if it is what is declared by now.
    fn shrinks(&self) -> Result<(), String> {
        let Some(left) = self.new.previous.as_ref().filter(|it| !it.way_back) else {
            return Ok(());
        };
        let grows = self.actions.iter().find(|action| match action {
            Action::Apply {
                stack,
                service,
                part: Part::Workload,
                replicas,
                ..
            } => *stack == left.stack && *replicas > self.seen.replicas(stack, *service).max(1),
            _ => false,
        });
        grows.map_or(Ok(()), |action| {
            Err(format!("P1: {action:?} of what is about to be removed"))
        })
    }

    /// What an object of which nothing is recorded finds.
    fn takes_over(&self) -> Result<(), String> {
        let (old, new) = (self.old, self.new);
        let Some(live) = new
            .live
            .as_ref()
            .filter(|_| old.live.is_none() && old.attempt == 0 && old.epoch == 0)
        else {
            return Ok(());
        };
        let mut pointed: BTreeMap<&Stack, u32> = BTreeMap::new();
        for service in self.seen.live.values() {
            let stacks = match &service.target {
                Target::Stack(stack) => std::slice::from_ref(stack),
                Target::Foreign => &service.endpoints,
                Target::Nothing => &[],
            };
            for stack in stacks.iter().filter(|stack| self.stack(stack).is_some()) {
                let last = pointed.entry(stack).or_default();
                *last = (*last).max(service.epoch);
            }
        }
        let last = pointed.values().max().copied();
        let latest: BTreeSet<&Stack> = pointed
            .iter()
            .filter(|(_, epoch)| Some(**epoch) == last)
            .map(|(stack, _)| *stack)
            .collect();
        is(latest.len() == 1, || {
            format!("P1: {} is taken over, of {latest:?}", live.stack)
        })?;
        let declared = self.seen.declared.as_ref().ok().map(|it| &it.revision);
        let known = |stack: &Stack| {
            let rendered = self.stack(stack).is_some_and(|seen| seen.rendered.is_some());
            rendered || declared == Some(&stack.revision)
        };
        is(known(&live.stack), || {
            format!(
                "P3: {} is taken over, of which nobody knows what it is",
                live.stack
            )
        })?;
        let from = pointed.keys().find(|stack| !latest.contains(**stack));
        let to = latest.first().copied();
        let back =
            from.filter(|from| !to.is_some_and(|to| self.serves(to)) && self.serves(from) && known(from));
        let right = back.copied().or(to);
        is(right == Some(&live.stack), || {
            format!("P1: {} is taken over, and not {right:?}", live.stack)
        })?;
        if from.is_some() {
            return is(new.phase == Phase::RollingBack, || {
                "P4: a move that nobody remembers is not brought to its end".to_owned()
            });
        }
        let mut others = self.seen.stacks.iter().filter(|(stack, _)| **stack != live.stack);
        let runs = others.any(|(_, seen)| seen.pods() > 0);
        let kept = new.previous.as_ref().is_some_and(|it| !it.way_back);
        is(kept || !runs, || {
            format!(
                "P1: what runs beside {} is not drained",
                token(&live.stack, live.attempt)
            )
        })
    }
}
