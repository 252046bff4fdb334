//! What people can do with an exchange now, and why not.

use clap::ValueEnum;
use exchange_operator::{
    api::{ExchangeDeployment, GROUP},
    status::{ExchangeDeploymentStatus as Status, Phase, Stack, token},
};

use crate::view::condition;

/// What people can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    Promote,
    Abort,
    Rollback,
    Retry,
    Pause,
    Resume,
}

impl Action {
    pub(crate) const ALL: [Self; 6] = [
        Self::Promote,
        Self::Abort,
        Self::Rollback,
        Self::Retry,
        Self::Pause,
        Self::Resume,
    ];

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Abort => "abort",
            Self::Rollback => "rollback",
            Self::Retry => "retry",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

/// A request that makes sense: an annotation, and what it comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) annotation: String,
    /// Empty: a pause that ends.
    pub(crate) value: String,
    pub(crate) effect: String,
}

impl Request {
    /// The same, if it is about the stack and attempt that somebody means.
    pub(crate) fn about(self, stack: Option<&str>) -> Result<Self, Refusal> {
        match stack {
            Some(stack) if stack != self.value => Err(format!(
                "it would be about {}, and not {stack}: look again",
                self.value
            )),
            _ => Ok(self),
        }
    }
}

/// Why there is nothing to ask for: a sentence.
pub(crate) type Refusal = String;

/// The annotation for an action, naming exactly the stack and attempt that the object shows.
pub(crate) fn request(action: Action, object: &ExchangeDeployment) -> Result<Request, Refusal> {
    let status = object.status.clone().unwrap_or_default();
    let (value, effect) = match action {
        Action::Promote => promote(object, &status)?,
        Action::Abort => abort(&status)?,
        Action::Rollback => rollback(&status)?,
        Action::Retry => retry(&status)?,
        Action::Pause => pause(&status)?,
        Action::Resume => resume(object, &status)?,
    };
    let word = if action == Action::Resume {
        "pause"
    } else {
        action.word()
    };
    Ok(Request {
        annotation: format!("{GROUP}/{word}"),
        value,
        effect,
    })
}

/// Whether the object bears a request that is still to be acted upon or refused: its status is about the time before. What
/// names another stack or attempt is about the past; and before an approval nothing is settled anyway.
pub(crate) fn is_asked(object: &ExchangeDeployment, status: &Status) -> bool {
    let annotations = object.metadata.annotations.as_ref();
    let waits = |word: &str, handled: &Option<String>, meant: Option<String>| {
        let asked = annotations.and_then(|all| all.get(&format!("{GROUP}/{word}")));
        asked.is_some() && asked == meant.as_ref() && asked != handled.as_ref()
    };
    let candidate = status.candidate.as_ref().map(|it| token(&it.stack, it.attempt));
    let live = status.live.as_ref().map(|it| token(&it.stack, it.attempt));
    let leaves = if status.phase == Phase::Promoting {
        candidate.clone()
    } else {
        live
    };
    // With something else in the way it is not tried again before that is mended.
    let given_up = status.rejected.as_ref().filter(|it| {
        let stalled = condition(status, "Stalled").map(|stalled| stalled.reason.clone());
        stalled == Some(it.reason.to_string())
    });
    let given_up = given_up.map(|it| token(&it.stack, it.attempt));
    let handled = &status.handled;
    waits("abort", &handled.abort, candidate)
        || waits("rollback", &handled.rollback, leaves)
        || waits("retry", &handled.retry, given_up)
}

fn promote(object: &ExchangeDeployment, status: &Status) -> Result<(String, String), Refusal> {
    if status.observed_generation != object.metadata.generation {
        return Err("the spec has been changed and the operator has not looked at it yet: look again".into());
    }
    running(status)?;
    match (&status.candidate, status.phase) {
        (Some(it), Phase::AwaitingPromotion) => {
            let effect = format!(
                "the traffic goes to {}",
                named(&it.version, &it.stack, it.attempt)
            );
            Ok((token(&it.stack, it.attempt), effect))
        }
        (Some(it), Phase::Promoting) => Err(format!("{} is being promoted already", it.version)),
        (Some(it), phase) => Err(format!(
            "{} has not passed its gates yet: it is {phase}",
            it.version
        )),
        (None, phase) => Err(format!("nothing waits for approval: the release is {phase}")),
    }
}

fn abort(status: &Status) -> Result<(String, String), Refusal> {
    match (&status.candidate, status.phase) {
        (_, Phase::RollingBack) => Err("the traffic is going back already".into()),
        (Some(it), Phase::Promoting) => Err(format!(
            "the swap to {} has begun: it can be rolled back, but not aborted",
            it.version
        )),
        (Some(it), _) => {
            let effect = format!(
                "{} is given up; what is live is not touched",
                named(&it.version, &it.stack, it.attempt)
            );
            Ok((token(&it.stack, it.attempt), effect))
        }
        (None, phase) => Err(format!("there is no candidate: the release is {phase}")),
    }
}

fn rollback(status: &Status) -> Result<(String, String), Refusal> {
    if let (Phase::Promoting, Some(candidate)) = (status.phase, &status.candidate) {
        let live = status.live.as_ref();
        let to = live.map_or("nothing, as before this first version", |live| &live.version);
        let effect = format!("the swap is turned round: the traffic goes back to {to}");
        let leaves = token(&candidate.stack, candidate.attempt);
        if status.handled.rollback.as_ref() == Some(&leaves) {
            return Err(format!(
                "the way back from {leaves} was asked for and has ended: {to} could not serve, and the traffic goes to {} after all",
                candidate.version
            ));
        }
        return Ok((leaves, effect));
    }
    let Some(way) = condition(status, "RollbackAvailable") else {
        return Err("the operator has not looked at this exchange yet".into());
    };
    match (way.status == "True", &status.live, &status.previous) {
        (true, Some(live), Some(previous)) => {
            let effect = format!(
                "the traffic goes from {} back to {}",
                live.version,
                named(&previous.version, &previous.stack, previous.attempt)
            );
            Ok((token(&live.stack, live.attempt), effect))
        }
        _ => Err(format!(
            "there is no way back in one step ({}): {}",
            way.reason, way.message
        )),
    }
}

fn retry(status: &Status) -> Result<(String, String), Refusal> {
    match (&status.rejected, status.phase) {
        (Some(it), Phase::Failed | Phase::Held) => {
            running(status)?;
            let effect = format!(
                "{} is tried again, in a new attempt",
                named(&it.version, &it.stack, it.attempt)
            );
            Ok((token(&it.stack, it.attempt), effect))
        }
        (_, phase) => Err(format!("nothing has been given up: the release is {phase}")),
    }
}

fn pause(status: &Status) -> Result<(String, String), Refusal> {
    running(status).map_err(|_| "it is paused or suspended already".to_owned())?;
    let (stack, attempt) = meant(status).ok_or("there is nothing to pause yet")?;
    let effect = "nothing new starts; deadlines and retention stand still".to_owned();
    Ok((token(&stack, attempt), effect))
}

fn resume(object: &ExchangeDeployment, status: &Status) -> Result<(String, String), Refusal> {
    let annotations = object.metadata.annotations.as_ref();
    let paused = annotations.and_then(|all| all.get(&format!("{GROUP}/pause")));
    let meant = meant(status).map(|(stack, attempt)| token(&stack, attempt));
    if paused.is_some() && paused == meant.as_ref() {
        let effect = if object.spec.suspend {
            "the pause ends; but spec.suspend still holds it"
        } else {
            "it goes on; deadlines and retention, too"
        };
        return Ok((String::new(), effect.to_owned()));
    }
    if object.spec.suspend {
        return Err("it is not paused but suspended: set spec.suspend to false where it is declared".into());
    }
    Err("it is not paused".into())
}

/// What a pause is about.
fn meant(status: &Status) -> Option<(Stack, u32)> {
    let candidate = status.candidate.as_ref().map(|it| (it.stack.clone(), it.attempt));
    candidate.or_else(|| status.live.as_ref().map(|it| (it.stack.clone(), it.attempt)))
}

fn running(status: &Status) -> Result<(), Refusal> {
    match status.stopped_since {
        Some(_) => Err("it is paused or suspended: resume it first".into()),
        None => Ok(()),
    }
}

fn named(version: &str, stack: &Stack, attempt: u32) -> String {
    format!("{version} ({}, {})", stack.colour, token(stack, attempt))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::object;

    /// What each action comes to, on objects as the operator leaves them.
    #[test]
    fn actions_are_taken_or_refused_with_a_sentence() {
        let rows = [
            (Action::Promote, "awaiting_promotion", Ok("r1.2")),
            (
                Action::Promote,
                "testing",
                Err("r1 has not passed its gates yet: it is Testing"),
            ),
            (Action::Promote, "promoting", Err("r1 is being promoted already")),
            (
                Action::Promote,
                "live",
                Err("nothing waits for approval: the release is Live"),
            ),
            (
                Action::Promote,
                "paused",
                Err("it is paused or suspended: resume it first"),
            ),
            (
                Action::Promote,
                "stale",
                Err("the spec has been changed and the operator has not looked at it yet: look again"),
            ),
            (Action::Abort, "pending", Ok("r2.3")),
            (Action::Abort, "testing", Ok("r1.2")),
            (Action::Abort, "paused", Ok("r1.2")),
            (
                Action::Abort,
                "promoting",
                Err("the swap to r1 has begun: it can be rolled back, but not aborted"),
            ),
            (
                Action::Abort,
                "rolling_back",
                Err("the traffic is going back already"),
            ),
            (
                Action::Abort,
                "live",
                Err("there is no candidate: the release is Live"),
            ),
            (Action::Rollback, "live", Ok("r1.2")),
            (Action::Rollback, "suspended_live", Ok("r1.2")),
            (Action::Rollback, "promoting", Ok("r1.2")),
            (
                Action::Rollback,
                "testing",
                Err(
                    "there is no way back in one step (NoPrevious): there is no stack to go back to, and the schema is \
                     contracted for r0: an older version comes back by a release of its own, if it bears that",
                ),
            ),
            (
                Action::Rollback,
                "held",
                Err(
                    "there is no way back in one step (KeptForLogs): r6 is kept for its logs, and is no way back",
                ),
            ),
            (
                Action::Rollback,
                "new",
                Err("the operator has not looked at this exchange yet"),
            ),
            (Action::Retry, "failed", Ok("r5.2")),
            (Action::Retry, "held", Ok("r6.2")),
            (
                Action::Retry,
                "suspended_failed",
                Err("it is paused or suspended: resume it first"),
            ),
            (
                Action::Retry,
                "rolling_back",
                Err("nothing has been given up: the release is RollingBack"),
            ),
            (Action::Pause, "live", Ok("r1.2")),
            (Action::Pause, "testing", Ok("r1.2")),
            (Action::Pause, "paused", Err("it is paused or suspended already")),
            (Action::Pause, "new", Err("there is nothing to pause yet")),
            (Action::Resume, "paused", Ok("")),
            (Action::Resume, "live", Err("it is not paused")),
            (
                Action::Resume,
                "suspended",
                Err("it is not paused but suspended: set spec.suspend to false where it is declared"),
            ),
        ];
        for (action, name, expected) in rows {
            let asked = request(action, &object(name)).map(|request| request.value);
            assert_eq!(
                asked,
                expected.map(str::to_owned).map_err(str::to_owned),
                "{action:?} {name}"
            );
        }
    }

    #[test]
    fn what_has_taken_the_place_of_what_somebody_means_is_not_hit() {
        let approval =
            |stack| request(Action::Promote, &object("awaiting_promotion")).and_then(|it| it.about(stack));
        for stack in [None, Some("r1.2")] {
            assert_eq!(approval(stack).map(|it| it.value), Ok("r1.2".to_owned()));
        }
        for other in ["r1.1", "r0.2", "r1"] {
            let refusal = format!("it would be about r1.2, and not {other}: look again");
            assert_eq!(approval(Some(other)), Err(refusal));
        }
    }

    #[test]
    fn a_way_back_that_could_not_be_gone_is_not_asked_for_again() {
        let mut object = object("promoting");
        object.status.as_mut().unwrap().handled.rollback = Some("r1.2".to_owned());
        let refusal = request(Action::Rollback, &object).unwrap_err();
        assert!(
            refusal.starts_with("the way back from r1.2 was asked for and has ended"),
            "{refusal}"
        );
    }

    #[test]
    fn a_resume_ends_the_pause() {
        let asked = request(Action::Resume, &object("paused")).unwrap();
        assert_eq!(
            (asked.annotation.as_str(), asked.value.as_str()),
            ("exchange.dev/pause", "")
        );
    }
}
