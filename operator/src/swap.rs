//! Traffic moves: the swap, the swap back, and the verification between them.
//!
//! Each move has a number, the epoch. A move writes all live Services, also those that point at the right stack already,
//! so that whatever somebody has decided about them earlier is refused.

use std::time;

use crate::{
    api::Service,
    decide::{KEPT_FOR_LOGS, SHORT_OF_ENDPOINTS, Turn, asker, later, named, signed, somebody},
    observe::{JobKind, JobState, StackSeen},
    report::awaited,
    status::{Candidate, Live, Outcome, Phase, Previous, PreviousState, Reason, Scale, Stack},
};

impl Turn<'_> {
    pub(crate) fn promoting(&mut self) {
        let Some(candidate) = self.next.candidate.clone() else {
            return;
        };
        if self.asked_to_leave(&candidate.stack, candidate.attempt) {
            self.roll_back_as_asked();
        } else if self.moved(Some(&candidate.stack)) && self.has_followed(&candidate.stack) {
            self.swapped(candidate);
        } else if let Some(message) = self.disappoints(&candidate.stack) {
            self.roll_back(Some((Reason::VerificationFailed, message)), "operator");
        } else if !self.is_still_tested(&candidate) {
            let message = "its pods are not those that were tested any more".to_owned();
            self.roll_back(Some((Reason::PromotionFailed, message)), "operator");
        } else if let Some(service) = self.lost(&candidate.stack) {
            let message =
                format!("the {service} service of the new stack lost its endpoints during the swap");
            self.roll_back(Some((Reason::PromotionFailed, message)), "operator");
        } else if self.overdue() && !self.next.is_forced(&candidate.stack) {
            let awaited = awaited(self.seen, Some(&candidate.stack));
            let message = self.blamed(&format!("the swap was not finished in time{awaited}"));
            self.roll_back(Some((Reason::PromotionFailed, message)), "operator");
        }
    }

    /// Whether what is being swapped in is what its tests were about. Once all Services point at it, it is kept as what is live is.
    fn is_still_tested(&self, candidate: &Candidate) -> bool {
        let stack = &candidate.stack;
        self.next.is_forced(stack) || self.moved(Some(stack)) || self.is_as_tested(candidate)
    }

    /// Whether all live Services have been written by the present move.
    pub(crate) fn moved(&self, to: Option<&Stack>) -> bool {
        Service::ALL.iter().all(|service| self.is_moved(*service, to))
    }

    /// Whether a stack serves something, and what is left for it nothing at all.
    pub(crate) fn is_better(&self, stack: &Stack) -> bool {
        let serves = |stack: &Stack| self.stack(stack).is_some_and(StackSeen::serves_any);
        let left = self.next.candidate.as_ref();
        serves(stack) && left.is_some_and(|left| !serves(&left.stack))
    }

    /// Whether nobody would have lost anything for ten seconds if the traffic had gone back from what is left: longer than a moment in
    /// which its endpoints are gone.
    pub(crate) fn is_unneeded(&self) -> bool {
        let since = self.next.candidate.as_ref().and_then(|left| left.unneeded_since);
        self.watched() && since.is_some_and(|since| self.now.duration_since(since) >= SHORT_OF_ENDPOINTS)
    }

    pub(crate) fn is_moved(&self, service: Service, to: Option<&Stack>) -> bool {
        self.seen
            .live
            .get(&service)
            .is_some_and(|live| live.epoch == self.next.epoch && live.target.is(to))
    }

    /// Whether a move to a stack is at its end. Of what has no way back, clients that find nobody there would not find anybody
    /// elsewhere either: it is waited for as long as the data plane may need, and people may then declare something better.
    fn has_followed(&self, stack: &Stack) -> bool {
        self.arrived(stack) || (self.next.is_forced(stack) && self.elapsed() >= SHORT_OF_ENDPOINTS)
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

    /// What is wrong with how a stack serves that has all the traffic, while the data plane has not followed as it usually does in a
    /// second or two: it may be what keeps it from answering. Without a way back it is better than nothing.
    fn disappoints(&self, stack: &Stack) -> Option<String> {
        let slow = self.moved(Some(stack)) && self.elapsed() >= SHORT_OF_ENDPOINTS && self.watched();
        let way_back = self.next.live.is_some() && !self.next.is_forced(stack);
        self.bad_figures().filter(|_| slow && way_back)
    }

    /// A service that is still to be moved and has nowhere to go, or has been and whose clients find nobody. With no way back
    /// they would not find anybody there either.
    pub(crate) fn lost(&self, stack: &Stack) -> Option<Service> {
        if self.next.is_forced(stack) {
            return Service::ALL
                .into_iter()
                .find(|service| !self.seen.can_have(*service, stack));
        }
        let lost = |service: &Service| {
            let moved = self.is_moved(*service, Some(stack));
            let ready = self.seen.ready(stack, *service);
            let replicas = self
                .stack(stack)
                .and_then(|seen| seen.service(*service))
                .map_or(1, |seen| seen.replicas);
            let short = ready < replicas && self.elapsed() >= SHORT_OF_ENDPOINTS && self.watched();
            ready == 0 || (!moved && short)
        };
        Service::ALL.into_iter().find(lost)
    }

    pub(crate) fn swapped(&mut self, candidate: Candidate) {
        let forced = self.next.is_forced(&candidate.stack);
        self.tell(
            false,
            "Promoted",
            format!("{} has all the traffic", candidate.version),
        );
        let by = candidate.approved_by.as_deref().unwrap_or("operator");
        self.remember(named(&candidate), Outcome::Promoted, None, by);
        self.next.candidate = None;
        let old = self.next.live.take();
        let declared = self.declared().map(|declared| &declared.revision);
        let scale = if declared == Some(&candidate.stack.revision) {
            Some(Scale::declared(self.spec))
        } else {
            let as_before = || old.as_ref().and_then(|old| old.scale.clone());
            candidate.scale.clone().or_else(as_before)
        };
        self.next.previous = old.map(|old| self.leaves(old, !forced));
        self.next.live = Some(Live {
            scale,
            ..Live::new(candidate.stack, candidate.version, candidate.attempt, self.now)
        });
        self.enter(if forced { Phase::Held } else { Phase::Verifying });
    }

    /// What becomes of a stack that has had the traffic.
    pub(crate) fn leaves(&self, live: Live, way_back: bool) -> Previous {
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
            scale,
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
            scale,
        }
    }

    pub(crate) fn rolling_back(&mut self) {
        let Some(left) = self.next.candidate.clone() else {
            return;
        };
        let to = self.next.live.as_ref().map(|live| live.stack.clone());
        if self.moved(to.as_ref()) {
            self.next.candidate = None;
            let left = Live::new(left.stack, left.version, left.attempt, self.now);
            self.next.previous = Some(self.leaves(left, false));
            if to.is_none() {
                self.enter(Phase::Failed);
                return;
            }
            self.tell(false, "RolledBack", "the traffic is back".to_owned());
            if self.next.rejected.is_some() {
                self.enter(Phase::Held);
            } else {
                self.arrive();
            }
            return;
        }
        let can = to.as_ref().is_some_and(|to| self.seen.can_stay(to));
        let left = Candidate {
            unneeded_since: can.then_some(left.unneeded_since.unwrap_or(self.now)),
            ..left
        };
        self.next.candidate = Some(left.clone());
        // What the API server refuses to move back it refuses to move forward, too.
        if self.overdue()
            && !self.seen.refused.as_ref().is_some_and(|it| it.traffic)
            && !can
            && self.seen.can_stay(&left.stack)
        {
            // Better all on the new stack than some on each, or all on a dead one.
            let message = "the stack before it could not serve".to_owned();
            self.tell(true, "RollbackImpossible", message.clone());
            self.next.candidate = Some(Candidate {
                forced: true,
                ..left.clone()
            });
            self.reject(left, Reason::RollbackImpossible, message);
            self.next.epoch += 1;
            self.enter(Phase::Promoting);
        }
    }

    pub(crate) fn verifying(&mut self) {
        let Some(mut live) = self.next.live.clone() else {
            return;
        };
        if self.leave(&live) {
            return;
        }
        let declared = self.declared().map(|declared| &declared.revision);
        if declared == Some(&live.stack.revision) {
            // Limits that are changed for what is live count at once.
            self.next.verification = Some(self.spec.rollout.verification.clone());
        }
        let passed = self.state(JobKind::Verify, &live.stack, live.attempt) == Some(&JobState::Passed);
        live.smoke_passed |= passed;
        // What takes the pods of both stacks is no fault of the new one, and there is nowhere to go.
        let back = self.next.previous.as_ref().filter(|it| it.way_back);
        let nowhere = back.is_some_and(|it| self.without_endpoints(&it.stack).is_some());
        live.unserved_since = self
            .without_endpoints(&live.stack)
            .filter(|_| !nowhere)
            .map(|_| live.unserved_since.unwrap_or(self.now));
        self.next.live = Some(live.clone());
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
                self.tell(true, "VerificationFailed", message.clone());
                let left = self.left(live);
                self.reject(left, Reason::VerificationFailed, message);
                if let Some(live) = &mut self.next.live {
                    live.unserved_since = None;
                }
                self.enter(Phase::Held);
            }
            None => {}
        }
    }

    fn roll_back_as_asked(&mut self) {
        let asked = self.next.asked.rollback.clone();
        let why = somebody(asked.as_ref(), "asked for the way back");
        self.roll_back(Some((Reason::RolledBack, why)), &asker(asked.as_ref()));
    }

    /// Leaves the live stack for the one before it, if somebody asks for it or the spec names that one again.
    pub(crate) fn leave(&mut self, live: &Live) -> bool {
        let asked = self.asked_to_leave(&live.stack, live.attempt);
        let previous = self.next.previous.clone().filter(Previous::leads_back);
        let Some(previous) = previous else {
            if asked {
                let asked = somebody(self.next.asked.rollback.as_ref(), "asked for the way back");
                let why = crate::report::no_way_back(self.seen, &self.next);
                self.tell(true, "RollbackRefused", format!("{asked}, but {why}"));
            }
            return false;
        };
        if asked {
            self.roll_back_as_asked();
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

    /// A service of a stack that has no ready endpoint.
    fn without_endpoints(&self, stack: &Stack) -> Option<Service> {
        Service::ALL
            .into_iter()
            .find(|service| self.seen.ready(stack, *service) == 0)
    }

    /// Whether clients of every live Service reach this stack.
    fn serves(&self, stack: &Stack) -> bool {
        let reached = |service| {
            self.seen
                .live
                .get(service)
                .is_some_and(|it| it.endpoints.contains(stack))
        };
        self.without_endpoints(stack).is_none() && Service::ALL.iter().all(reached)
    }

    /// How the verification has ended, if it has. What does not serve is not verified, whatever was measured before.
    fn verdict(&self, live: &Live) -> Option<Result<(), String>> {
        let too_long = |since| self.now.duration_since(since) >= SHORT_OF_ENDPOINTS && self.watched();
        if let Some(service) = self.without_endpoints(&live.stack)
            && live.unserved_since.is_some_and(too_long)
        {
            return Some(Err(format!("the {service} service has no ready endpoints")));
        }
        if let Some(why) = self.bad_figures() {
            return Some(Err(why));
        }
        if live.smoke_passed {
            // Whether all pods know that they are live is asked from the record of it on.
            let recorded = self.seen.status.live.as_ref();
            let asked = recorded.is_some_and(|it| it.smoke_passed);
            if !asked || self.elapsed() < signed(self.next.verification(self.spec).duration) {
                return None;
            }
            let lacks = if self.serves(&live.stack) {
                // What nobody can read is not good.
                self.seen.unheard.clone()
            } else {
                Some(self.blamed("its traffic had not reached it in time"))
            };
            return match lacks {
                None => Some(Ok(())),
                Some(why) => self.overdue().then_some(Err(why)),
            };
        }
        match self.state(JobKind::Verify, &live.stack, live.attempt) {
            Some(JobState::Failed(why)) => Some(Err(format!(
                "the smoke test through the live address failed: {why}"
            ))),
            _ if self.overdue() => {
                let late = "the smoke test through the live address was not done in time";
                let late = self.late(late, JobKind::Verify, (&live.stack, live.attempt));
                Some(Err(self.blamed(&late)))
            }
            _ => None,
        }
    }

    /// What is wrong with how requests went since the swap, if there were enough to tell.
    fn bad_figures(&self) -> Option<String> {
        let limits = self.next.verification(self.spec);
        let enough = u64::try_from(limits.min_requests).unwrap_or(u64::MAX);
        for (service, figures) in &self.seen.figures {
            if figures.requests >= enough
                && figures.errors * 100_000 > limits.max_error_millipercent() * figures.requests
            {
                let (errors, requests) = (figures.errors, figures.requests);
                return Some(format!(
                    "{errors} of {requests} requests to the {service} service failed"
                ));
            }
            let limit = time::Duration::from(limits.max_latency_p99);
            if figures.timed >= enough && figures.p99_over >= limit {
                return Some(format!(
                    "the {service} service answers too slowly: p99 is over {:?}, the limit is {limit:?}",
                    figures.p99_over
                ));
            }
        }
        None
    }
}
