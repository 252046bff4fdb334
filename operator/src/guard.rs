//! What is refused, whatever the plan says.
//!
//! Checked by [`apply`](crate::plan::Action) on what is seen right before each write, and by the simulation in the same
//! place. The fences make a write about an older state of an object fail; the guards look at *other* objects: endpoints
//! that have gone since the plan was made, and traffic that has come. And they look at the record: whoever works on while
//! another has recorded something else is stopped here, at its next write.

use crate::{
    api::{ExchangeDeploymentSpec as Spec, Service},
    observe::{Observed, Part},
    plan::{Action, Intent},
    status::{ExchangeDeploymentStatus as Status, Stack},
};

/// Why an action was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The stack that should get the traffic has too few ready endpoints for a service that is still to be moved.
    #[error("{stack} has too few ready endpoints for the {service} service")]
    NoEndpoints {
        /// The stack.
        stack: Stack,
        /// The service.
        service: Service,
    },
    /// A live Service that is still to be moved does not exist: the others would leave it behind.
    #[error("there is no live Service of the {0} service")]
    NotThere(Service),
    /// The stack has traffic, or is recorded to.
    #[error("{0} is live")]
    Live(Stack),
    /// A stack cannot have a service with no pods.
    #[error("{stack} would have {replicas} pods for the {service} service")]
    TooFew {
        /// The stack.
        stack: Stack,
        /// The service.
        service: Service,
        /// What was asked for.
        replicas: u32,
    },
    /// Pods are left behind a colour Service: some data planes would cut their connections.
    #[error("{0} still has pods")]
    PodsLeft(Stack),
    /// Nothing is recorded that says that the traffic is not where it should be.
    #[error("the {0} service has traffic, and nothing is recorded")]
    HasTraffic(Service),
    /// The object is being deleted.
    #[error("the object is being deleted")]
    Deleting,
    /// Another record stands than the one that allowed the action: somebody else works, or an old object was read.
    #[error("it was planned under another record")]
    Superseded,
}

/// Checks one action, which this record allows, against what is seen now.
pub fn check(spec: &Spec, record: &Status, action: &Action, seen: &Observed) -> Result<(), Refusal> {
    if seen.deleting {
        return Err(Refusal::Deleting);
    }
    if seen.status != *record {
        return Err(Refusal::Superseded);
    }
    match action {
        Action::Point {
            service,
            to: Some(to),
            epoch,
            intent,
            ..
        } => endpoints(to, *service, *epoch, *intent, seen),
        Action::Point {
            service,
            to: None,
            intent: Intent::Repair,
            ..
        } if record.attempt == 0 => {
            let served = seen.live.get(service).is_some_and(|it| !it.endpoints.is_empty());
            if served {
                Err(Refusal::HasTraffic(*service))
            } else {
                Ok(())
            }
        }
        // The one thing that may go while its stack stays.
        Action::Delete {
            part: Part::Autoscaler,
            ..
        } => Ok(()),
        Action::Delete { stack, part, .. } => {
            has_no_traffic(stack, seen)?;
            match part {
                Part::ColourService if seen.stacks.get(stack).is_some_and(|stack| stack.pods() > 0) => {
                    Err(Refusal::PodsLeft(stack.clone()))
                }
                _ => Ok(()),
            }
        }
        Action::Unrender { stack, .. } => has_no_traffic(stack, seen),
        Action::Apply {
            stack,
            service,
            part: Part::Workload,
            replicas,
            fence: Some(_),
        } => enough(spec, stack, *service, *replicas, seen),
        _ => Ok(()),
    }
}

/// Every service that is still to be moved needs somewhere to go, not only the one that is written now, and forward a live
/// Service: none moves before all can.
fn endpoints(
    to: &Stack,
    service: Service,
    epoch: u32,
    intent: Intent,
    seen: &Observed,
) -> Result<(), Refusal> {
    let forced = intent == Intent::Promote && seen.status.is_forced(to);
    let short = |service: Service| {
        // Back, and without a way back, also what nobody serves is written, so that older plans for it are refused.
        if forced || intent == Intent::RollBack {
            return !seen.can_have(service, to);
        }
        let there = seen.stacks.get(to).and_then(|stack| stack.service(service));
        // Forward all pods have to be there; in a repair any are better than none.
        let least = there
            .filter(|_| intent == Intent::Promote)
            .map_or(1, |there| there.replicas.max(1));
        seen.ready(to, service) < least
    };
    let gone = |service: Service| intent == Intent::Promote && !seen.live.contains_key(&service);
    for service in to_move(to, service, epoch, intent, seen) {
        if gone(service) {
            return Err(Refusal::NotThere(service));
        }
        if short(service) {
            return Err(Refusal::NoEndpoints {
                stack: to.clone(),
                service,
            });
        }
    }
    Ok(())
}

/// The service whose live Service is written, and those that the same move has not written yet.
pub(crate) fn to_move(
    to: &Stack,
    service: Service,
    epoch: u32,
    intent: Intent,
    seen: &Observed,
) -> impl Iterator<Item = Service> {
    let moved = move |other: &Service| {
        let live = seen.live.get(other);
        live.is_some_and(|live| live.epoch == epoch && live.target.is(Some(to)))
    };
    Service::ALL
        .into_iter()
        .filter(move |other| *other == service || (intent != Intent::Repair && !moved(other)))
}

fn has_no_traffic(stack: &Stack, seen: &Observed) -> Result<(), Refusal> {
    let recorded = seen.status.live.as_ref().is_some_and(|live| live.stack == *stack);
    if recorded || seen.reaches(stack) {
        Err(Refusal::Live(stack.clone()))
    } else {
        Ok(())
    }
}

fn enough(
    spec: &Spec,
    stack: &Stack,
    service: Service,
    replicas: u32,
    seen: &Observed,
) -> Result<(), Refusal> {
    let live = seen.status.live.as_ref().map(|live| &live.stack);
    let way_back = seen.status.previous.as_ref().filter(|it| it.way_back);
    let may_serve = live
        .into_iter()
        .chain(way_back.map(|it| &it.stack))
        .any(|it| it == stack);
    let has = seen.replicas(stack, service);
    let declared = spec.services.get(service).replicas;
    let least = if may_serve {
        has.min(u32::try_from(declared).unwrap_or(1))
    } else {
        1
    };
    if replicas < least.max(1) {
        return Err(Refusal::TooFew {
            stack: stack.clone(),
            service,
            replicas,
        });
    }
    Ok(())
}
