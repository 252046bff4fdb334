//! Each phase and each way out of it, and the four stories of an operator that wakes too late.

use std::{collections::BTreeMap, time::Duration};

use crate::world::{Ban, UNREADABLE, View, Wakes, World, unrecorded};
use exchange_operator::{
    api::{ColourChoice, ExchangeDeploymentSpec as Spec, Promotion, Service},
    decide::decide,
    guard::{self, Refusal},
    observe::{
        Figures, Job, JobKind, JobSeen, JobState, Observed, Part, Refused, ServiceSeen, StackSeen, Target,
    },
    plan::{Action, Intent},
    status::{
        Candidate, Colour, Contract, ExchangeDeploymentStatus as Status, Outcome,
        Phase::{
            self, AwaitingPromotion, Failed, Held, Live, Migrating, Pending, Promoting, Provisioning,
            RollingBack, Testing, Verifying,
        },
        PreviousState, Reason, Stack, token,
    },
};
use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// r0 is live and verified; r1 is declared and has come as far as this phase.
pub(crate) fn at(phase: Phase) -> World {
    releasing(1, phase)
}

pub(crate) fn releasing(index: usize, phase: Phase) -> World {
    let mut world = World::new(true);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live);
    world.declare(|spec| {
        spec.rollout.promotion = if phase == AwaitingPromotion {
            Promotion::Manual
        } else {
            Promotion::Automatic
        };
    });
    world.release(index);
    if phase != Live {
        world.until(0, phase);
    }
    world.journey = vec![phase];
    world
}

/// What the API server does not accept.
pub(crate) fn refused(what: &str, traffic: bool) -> Refused {
    let why = format!("the API server refuses to {what}");
    Refused { why, traffic }
}

/// Looks until nothing more is recorded without something happening.
pub(crate) fn settled(mut world: World) -> World {
    for _ in 0..3 {
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
    }
    world
}

/// A release that is live and verified, with the one before it still there.
fn after_a_release() -> World {
    let mut world = releasing(1, Verifying);
    world.until(0, Live);
    world.journey = vec![Live];
    world
}

/// A first version whose smoke test through the live address has failed: nothing is there to go back to.
fn first_and_not_verified() -> World {
    let mut world = World::new(true);
    world.until(0, Verifying);
    world.finish(0);
    world.fail_jobs();
    world.until(0, Held);
    world.journey = vec![Held];
    world
}

/// The first version is live and was never verified; another one is declared and has come as far as this phase.
fn over_what_is_not_verified(index: usize, phase: Phase) -> World {
    let mut world = first_and_not_verified();
    world.release(index);
    world.until(0, phase);
    world.finish(0);
    world.journey = vec![phase];
    world
}

/// What an operator that has seen the phase before records, if it sees the world with this change.
fn records(world: &World, change: impl FnOnce(&mut Observed)) -> Status {
    let mut seen = world.observe();
    seen.seen_before = true;
    change(&mut seen);
    let plan = decide(&world.spec, &seen, world.now);
    plan.status.unwrap_or(seen.status)
}

/// The candidate's pods have become ready, and nobody has looked since.
fn with_ready_pods() -> World {
    let mut world = at(Provisioning);
    world.finish(0);
    for _ in 0..3 {
        world.kubelet();
    }
    world.slices();
    world
}

/// What is seen of the trade service of a stack.
pub(crate) fn trade_of<'s>(seen: &'s mut Observed, stack: &Stack) -> &'s mut ServiceSeen {
    let stack = seen.stacks.get_mut(stack).unwrap();
    stack.services.get_mut(&Service::Trade).unwrap()
}

/// Of two trade pods of each stack one is ready, and something keeps the other.
fn lacks_pods(seen: &mut Observed) {
    for stack in seen.stacks.values_mut() {
        let trade = stack.services.get_mut(&Service::Trade).unwrap();
        trade.ready = 1;
        trade.trouble = Some("no node for it".to_owned());
    }
}

/// The first of three Services points at the new stack.
fn until_one_is_moved(world: &mut World) {
    while world.targets()[0].as_ref().unwrap().revision == "r0" {
        world.step(0, View::Fresh).unwrap();
    }
}

type Change<'a> = Box<dyn Fn(&mut Observed) + 'a>;

fn seconds(seconds: i64) -> SignedDuration {
    SignedDuration::from_secs(seconds)
}

struct Row {
    name: &'static str,
    world: World,
    happens: fn(&mut World),
    journey: &'static [Phase],
    reason: Option<Reason>,
}

fn row(name: &'static str, world: World, happens: fn(&mut World), journey: &'static [Phase]) -> Row {
    Row {
        name,
        world,
        happens,
        journey,
        reason: None,
    }
}

fn given_up(
    name: &'static str,
    world: World,
    happens: fn(&mut World),
    journey: &'static [Phase],
    why: Reason,
) -> Row {
    Row {
        reason: Some(why),
        ..row(name, world, happens, journey)
    }
}

fn nothing(_: &mut World) {}

fn revert(world: &mut World) {
    world.release(0);
}

fn abort(world: &mut World) {
    world.ask(|requests, names| requests.abort = names.candidate);
}

fn roll_back(world: &mut World) {
    world.ask(|requests, names| requests.rollback = names.live);
}

/// What one does when the present version turns out to be bad while the next one is already waiting.
#[test]
fn what_was_given_up_does_not_begin_by_itself_when_what_is_live_is_left() {
    left_after_an_abort(false);
    // While it is missing, nobody knows that it is still declared.
    left_after_an_abort(true);
}

/// The next version waits: clients are still on the old stack.
fn next_waits() -> World {
    let mut world = after_a_release();
    let now = world.now;
    let previous = world.status.previous.as_mut().unwrap();
    (previous.state, previous.since, previous.idle_since) = (PreviousState::Draining, now, None);
    world.release(2);
    world.until(0, Pending);
    world
}

fn left_after_an_abort(missing: bool) {
    let mut world = next_waits();
    abort(&mut world);
    world.until(0, Failed);
    let aborted = world.status.rejected.clone().unwrap();
    world.miss(missing);
    roll_back(&mut world);
    world.journey = vec![Failed];
    world.until(0, Held);
    world.miss(false);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.journey, [Failed, RollingBack, Held], "{:#?}", world.trace);
    let rejected = world.status.rejected.clone().unwrap();
    assert_eq!(
        (rejected.stack, rejected.reason),
        (aborted.stack, Reason::Aborted)
    );
    // Until somebody asks.
    world.ask(|requests, names| requests.retry = names.rejected);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
    assert_eq!(world.status.live.unwrap().stack.revision, "r2");
}

/// And the traffic has to stay on what should have been left, because the stack before it cannot serve.
#[test]
fn what_was_given_up_does_not_begin_by_itself_when_there_is_no_way_back() {
    let mut world = next_waits();
    abort(&mut world);
    world.until(0, Failed);
    world.collapse(0);
    roll_back(&mut world);
    world.journey = vec![Failed];
    world.until(0, RollingBack);
    time_passes(&mut world);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(
        world.journey,
        [Failed, RollingBack, Promoting, Held],
        "{:#?}",
        world.trace
    );
    let rejected = world.status.rejected.clone().unwrap();
    assert_eq!(
        (rejected.stack.revision.as_str(), rejected.reason),
        ("r2", Reason::Aborted)
    );
    // What is live has not been verified, and is as soon as it is declared.
    world.release(1);
    world.until(0, Verifying);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
}

/// What was aborted is not declared any more, and of what is something is missing: it is what is left, and does not come back by itself.
#[test]
fn what_is_left_while_something_is_missing_of_it_stays_left() {
    let mut world = next_waits();
    abort(&mut world);
    world.until(0, Failed);
    world.release(1);
    world.miss(true);
    roll_back(&mut world);
    world.until(0, Held);
    world.miss(false);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Held, "{:#?}", world.trace);
    assert_eq!(world.status.rejected.unwrap().stack.revision, "r1");
}

/// What cannot begin needs no colour: the way back stays, and can be taken.
#[test]
fn the_way_back_is_not_given_for_what_cannot_begin() {
    type Hinder = fn(&mut Observed);
    let missing: Hinder = |seen| seen.declared = Err("Secret exchange-db is missing".to_owned());
    let taken: Hinder = |seen| seen.taken.push("Deployment exchange-blue-user".to_owned());
    for (hinder, kept) in [(Some(missing), true), (Some(taken), true), (None, false)] {
        let mut world = next_waits();
        world.operators[0].crash();
        let now = world.now;
        let drained = |seen: &mut Observed| {
            let previous = seen.status.previous.as_mut().unwrap();
            (previous.state, previous.idle_since) = (PreviousState::Retained, Some(now));
            if let Some(hinder) = hinder {
                hinder(seen);
            }
        };
        let state = records(&world, drained).previous.unwrap().state;
        assert_eq!(state == PreviousState::Retained, kept, "{state:?}");
    }
}

#[test]
fn what_was_given_up_in_the_other_colour_is_forgotten_where_it_is_live() {
    let mut world = at(Live);
    world.release(0);
    world.settle(Wakes::Clock).unwrap();
    world.colour(ColourChoice::Green);
    world.until(0, Testing);
    abort(&mut world);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Failed);
    world.colour(ColourChoice::Auto);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
    assert_eq!(condition(&world.status, "Ready").status, "True");
}

/// Retention goes on while nothing can be begun, and what was on its way is told to have gone.
#[test]
fn a_colour_in_use_holds_the_old_stack_no_longer_than_declared() {
    let mut world = at(Testing);
    world.colour(ColourChoice::Blue);
    let events = decide(&world.spec, &world.observe(), world.now).events;
    assert!(events.iter().any(|it| it.reason == "Reverted"), "{events:?}");

    let mut world = after_a_release();
    world.colour(ColourChoice::Green);
    world.release(2);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(
        (world.status.phase, world.status.previous.as_ref()),
        (Pending, None)
    );
    assert!(!world.has("r0"), "{:#?}", world.trace);
}

/// The deadline passes while an operator looks on, and nothing else happens.
fn time_passes(world: &mut World) {
    world.finish(0);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    world.wait(601);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
}

/// After these phases, a release from its beginning to its end.
macro_rules! anew {
    [$($before:ident),*] => {
        &[$($before,)* Pending, Migrating, Provisioning, Testing, Promoting, Verifying, Live]
    };
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn every_phase_is_left_as_the_design_says() {
    const DONE: &[Phase] = &[Migrating, Provisioning, Testing, Promoting, Verifying, Live];
    let rows = vec![
        row("from Pending all the way", at(Pending), nothing, anew![]),
        row("reverted in Pending", at(Pending), revert, &[Pending, Live]),
        given_up(
            "aborted in Pending",
            at(Pending),
            abort,
            &[Pending, Failed],
            Reason::Aborted,
        ),
        row(
            "superseded in Pending",
            at(Pending),
            |world| world.release(2),
            anew![],
        ),
        row("from Migrating", at(Migrating), nothing, DONE),
        row("reverted in Migrating", at(Migrating), revert, &[Migrating, Live]),
        given_up(
            "aborted in Migrating",
            at(Migrating),
            abort,
            &[Migrating, Failed],
            Reason::Aborted,
        ),
        given_up(
            "expand fails",
            releasing(3, Migrating),
            nothing,
            &[Migrating, Failed],
            Reason::MigrationFailed,
        ),
        given_up(
            "expand takes too long",
            at(Migrating),
            time_passes,
            &[Migrating, Failed],
            Reason::MigrationFailed,
        ),
        row(
            "superseded in Migrating",
            at(Migrating),
            |world| world.release(2),
            anew![Migrating],
        ),
        row(
            "reverted in Provisioning",
            at(Provisioning),
            revert,
            &[Provisioning, Live],
        ),
        given_up(
            "aborted in Provisioning",
            at(Provisioning),
            abort,
            &[Provisioning, Failed],
            Reason::Aborted,
        ),
        given_up(
            "pods are never ready",
            releasing(4, Provisioning),
            time_passes,
            &[Provisioning, Failed],
            Reason::ProgressDeadlineExceeded,
        ),
        row(
            "superseded in Provisioning",
            at(Provisioning),
            |world| world.release(2),
            anew![Provisioning],
        ),
        row(
            "superseded in Testing",
            at(Testing),
            |world| world.release(2),
            anew![Testing],
        ),
        row("reverted in Testing", at(Testing), revert, &[Testing, Live]),
        given_up(
            "aborted in Testing",
            at(Testing),
            abort,
            &[Testing, Failed],
            Reason::Aborted,
        ),
        given_up(
            "a test fails",
            releasing(5, Testing),
            nothing,
            &[Testing, Failed],
            Reason::SmokeTestFailed,
        ),
        given_up(
            "a test is terminated",
            at(Testing),
            |world| {
                world.finish(0);
                world.fail_jobs();
            },
            &[Testing, Failed],
            Reason::SmokeTestFailed,
        ),
        given_up(
            "tests take too long",
            at(Testing),
            time_passes,
            &[Testing, Failed],
            Reason::SmokeTestFailed,
        ),
        row(
            "other gates are another attempt",
            at(Testing),
            |world| world.change_gates(1),
            anew![Testing],
        ),
        row(
            "waits for approval past every deadline",
            at(AwaitingPromotion),
            |world| world.wait(100_000),
            &[AwaitingPromotion],
        ),
        row(
            "approved",
            at(AwaitingPromotion),
            |world| world.ask(|requests, names| requests.promote = names.candidate),
            &[AwaitingPromotion, Promoting, Verifying, Live],
        ),
        row(
            "another attempt approved",
            at(AwaitingPromotion),
            |world| world.ask(|requests, _| requests.promote = Some("r1.1".to_owned())),
            &[AwaitingPromotion],
        ),
        row(
            "the live stack approved",
            at(AwaitingPromotion),
            |world| world.ask(|requests, names| requests.promote = names.live),
            &[AwaitingPromotion],
        ),
        row(
            "made automatic",
            at(AwaitingPromotion),
            |world| world.declare(|spec| spec.rollout.promotion = Promotion::Automatic),
            &[AwaitingPromotion, Promoting, Verifying, Live],
        ),
        row(
            "superseded while waiting",
            at(AwaitingPromotion),
            |world| world.release(2),
            &[
                AwaitingPromotion,
                Pending,
                Migrating,
                Provisioning,
                Testing,
                AwaitingPromotion,
            ],
        ),
        given_up(
            "aborted while waiting",
            at(AwaitingPromotion),
            abort,
            &[AwaitingPromotion, Failed],
            Reason::Aborted,
        ),
        row(
            "reverted while waiting",
            at(AwaitingPromotion),
            revert,
            &[AwaitingPromotion, Live],
        ),
        row(
            "suspended while waiting and approved",
            at(AwaitingPromotion),
            |world| {
                world.ask(|requests, names| requests.promote = names.candidate);
                world.declare(|spec| spec.suspend = true);
            },
            &[AwaitingPromotion],
        ),
        row(
            "a swap is finished",
            at(Promoting),
            nothing,
            &[Promoting, Verifying, Live],
        ),
        row(
            "a swap is finished before a newer spec is looked at",
            at(Promoting),
            |world| {
                world.step(0, View::Fresh).unwrap();
                world.release(2);
            },
            anew![Promoting, Verifying, Live],
        ),
        row(
            "a swap is finished although suspended",
            at(Promoting),
            |world| world.declare(|spec| spec.suspend = true),
            &[Promoting, Verifying],
        ),
        given_up(
            "a rollback during a swap",
            at(Promoting),
            |world| world.ask(|requests, names| requests.rollback = names.candidate),
            &[Promoting, RollingBack, Held],
            Reason::RolledBack,
        ),
        given_up(
            "a swap that the API server refuses is given up, and the traffic is where it was",
            at(Promoting),
            |world| {
                world.step(0, View::Fresh).unwrap();
                world.ban = Some(Ban::Live);
                world.until(0, RollingBack);
                world.ban = None;
            },
            &[Promoting, RollingBack, Held],
            Reason::PromotionFailed,
        ),
        given_up(
            "a service dies during a swap",
            at(Promoting),
            |world| {
                world.lose("r1", Service::Trade);
                world.step(0, View::Fresh).unwrap();
            },
            &[Promoting, RollingBack, Held],
            Reason::PromotionFailed,
        ),
        given_up(
            "a service dies during a swap after it has been moved",
            at(Promoting),
            |world| {
                until_one_is_moved(world);
                world.lose("r1", Service::User);
                for _ in 0..10 {
                    world.step(0, View::Fresh).unwrap();
                }
            },
            &[Promoting, RollingBack, Held],
            Reason::PromotionFailed,
        ),
        given_up(
            "verification fails",
            releasing(6, Verifying),
            nothing,
            &[Verifying, RollingBack, Held],
            Reason::VerificationFailed,
        ),
        given_up(
            "too many errors",
            releasing(7, Verifying),
            nothing,
            &[Verifying, RollingBack, Held],
            Reason::VerificationFailed,
        ),
        given_up(
            "its pods die after the smoke test through the live address",
            releasing(8, Verifying),
            nothing,
            &[Verifying, RollingBack, Held],
            Reason::VerificationFailed,
        ),
        row(
            "superseded while verifying",
            at(Verifying),
            |world| world.release(2),
            anew![Verifying, Live],
        ),
        given_up(
            "rolled back while verifying",
            at(Verifying),
            roll_back,
            &[Verifying, RollingBack, Held],
            Reason::RolledBack,
        ),
        row(
            "the predecessor is named again while verifying",
            at(Verifying),
            revert,
            &[Verifying, RollingBack, Live],
        ),
        given_up(
            "rolled back",
            after_a_release(),
            roll_back,
            &[Live, RollingBack, Held],
            Reason::RolledBack,
        ),
        row(
            "superseded while it is rolled back",
            after_a_release(),
            |world| {
                roll_back(world);
                world.until(0, RollingBack);
                world.release(2);
            },
            anew![Live, RollingBack, Held],
        ),
        given_up(
            "rolled back while a reference is missing, which comes back",
            after_a_release(),
            |world| {
                world.miss(true);
                roll_back(world);
                world.until(0, Held);
                world.miss(false);
            },
            &[Live, RollingBack, Held],
            Reason::RolledBack,
        ),
        given_up(
            "rolled back while a name is taken",
            after_a_release(),
            |world| {
                world.taken = true;
                roll_back(world);
            },
            &[Live, RollingBack, Held],
            Reason::RolledBack,
        ),
        row("reverted", after_a_release(), revert, &[Live, RollingBack, Live]),
        given_up(
            "rolled back while suspended",
            after_a_release(),
            |world| {
                world.declare(|spec| spec.suspend = true);
                roll_back(world);
            },
            &[Live, RollingBack, Held],
            Reason::RolledBack,
        ),
        given_up(
            "rolled back while suspended, and a pod of the old stack is missing for good",
            after_a_release(),
            |world| {
                world.declare(|spec| spec.suspend = true);
                world.crowd("r0", Service::Trade);
                roll_back(world);
            },
            &[Live, RollingBack, Held],
            Reason::RolledBack,
        ),
        given_up(
            "a half-done swap, suspended, whose stack loses a pod for good",
            at(Promoting),
            |world| {
                until_one_is_moved(world);
                world.declare(|spec| spec.suspend = true);
                world.crowd("r1", Service::Trade);
            },
            &[Promoting, RollingBack, Held],
            Reason::PromotionFailed,
        ),
        row(
            "the predecessor is named again while suspended",
            after_a_release(),
            |world| {
                world.declare(|spec| spec.suspend = true);
                revert(world);
            },
            &[Live],
        ),
        row(
            "another version while a name is taken",
            after_a_release(),
            |world| {
                world.taken = true;
                world.release(2);
            },
            &[Live],
        ),
        row(
            "what is live and not verified is verified again when somebody asks",
            first_and_not_verified(),
            |world| world.ask(|requests, names| requests.retry = names.rejected),
            &[Held, Verifying, Live],
        ),
        row(
            "the old stack is retired",
            after_a_release(),
            |world| world.wait(3601),
            &[Live],
        ),
        row(
            "a next release takes the old one's colour",
            after_a_release(),
            |world| world.release(2),
            anew![Live],
        ),
        row(
            "the live colour is declared for another revision",
            after_a_release(),
            |world| {
                world.colour(ColourChoice::Green);
                world.release(2);
            },
            &[Live, Pending],
        ),
        row(
            "the same revision in the other colour",
            at(Live),
            |world| {
                world.release(0);
                world.settle(Wakes::Clock).unwrap();
                world.journey = vec![Live];
                world.colour(ColourChoice::Green);
            },
            anew![Live],
        ),
        row(
            "tried again after a failure",
            releasing(1, Testing),
            |world| {
                abort(world);
                world.until(0, Failed);
                world.ask(|requests, names| requests.retry = names.rejected);
                world.journey = vec![Failed];
            },
            anew![Failed],
        ),
        row(
            "other gates after a failure",
            releasing(1, Testing),
            |world| {
                abort(world);
                world.until(0, Failed);
                world.change_gates(1);
                world.journey = vec![Failed];
            },
            anew![Failed],
        ),
        row(
            "another version after a failure",
            releasing(5, Failed),
            |world| world.release(2),
            anew![Failed],
        ),
        row(
            "reverted after a failure",
            releasing(5, Failed),
            revert,
            &[Failed, Live],
        ),
        row(
            "reverted after a failure to what was never verified",
            over_what_is_not_verified(5, Failed),
            revert,
            &[Failed, Verifying, Live],
        ),
        row(
            "reverted before the swap to what was never verified",
            over_what_is_not_verified(1, Testing),
            revert,
            &[Testing, Verifying, Live],
        ),
        row(
            "the Job of the expand is gone while pods start",
            at(Provisioning),
            lose_expand,
            &[Provisioning, Migrating, Testing, Promoting, Verifying, Live],
        ),
        row(
            "the Job of the expand is gone while tests run",
            at(Testing),
            lose_expand,
            &[Testing, Migrating, Promoting, Verifying, Live],
        ),
        row(
            "the Job of the expand is gone while people are asked",
            at(AwaitingPromotion),
            lose_expand,
            &[AwaitingPromotion, Migrating, AwaitingPromotion],
        ),
        row(
            "the Job of a test is gone while people are asked",
            at(AwaitingPromotion),
            |world| world.delete_job_of_candidate(&JobKind::Smoke),
            &[AwaitingPromotion, Testing, AwaitingPromotion],
        ),
        row(
            "another version after a rollback",
            releasing(6, Held),
            |world| world.release(2),
            anew![Held],
        ),
        row(
            "reverted after a rollback",
            releasing(6, Held),
            revert,
            &[Held, Live],
        ),
    ];
    for mut row in rows {
        (row.happens)(&mut row.world);
        row.world
            .settle(Wakes::Clock)
            .unwrap_or_else(|why| panic!("{}: {why}", row.name));
        assert_eq!(
            row.world.journey, row.journey,
            "{}: {:#?}",
            row.name, row.world.trace
        );
        let reason = row.world.status.rejected.as_ref().map(|rejected| rejected.reason);
        assert_eq!(reason, row.reason, "{}", row.name);
    }
}

#[test]
fn what_is_not_what_was_tested_is_tested_again() {
    let mut world = at(AwaitingPromotion);
    world.finish(0);
    let attempt = world.status.attempt;
    world.ask(|requests, names| requests.promote = names.candidate);
    world.lose_rendered("r1");
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, AwaitingPromotion, "{:#?}", world.trace);
    assert_eq!(world.status.attempt, attempt + 1);

    // While time stands still, nothing takes its place.
    let mut world = at(AwaitingPromotion);
    world.finish(0);
    world.declare(|spec| spec.suspend = true);
    world.lose_rendered("r1");
    world.settle(Wakes::Clock).unwrap();
    let candidate = world.status.candidate.clone().unwrap().stack;
    assert_eq!(world.observe().stacks[&candidate].rendered, None);
}

/// Somebody changes a candidate that is being tested while nothing can begin: put right at once, it would pass for what was tested.
#[test]
fn what_is_tested_is_not_put_right_before_it_can_be_tested_again() {
    type Hinder = fn(&mut World, bool);
    let hinders: [(&str, Hinder); 2] = [
        ("suspended", |world, on| {
            world.declare(|spec| spec.suspend = on);
        }),
        ("a reference is missing", |world, on| world.miss(on)),
    ];
    for (name, hinder) in hinders {
        for phase in [Testing, AwaitingPromotion] {
            for deleted in [false, true] {
                let mut world = at(phase);
                world.finish(0);
                let attempt = world.status.attempt;
                hinder(&mut world, true);
                world.spoil_part(1, Service::Trade, Part::Workload, deleted);
                world.settle(Wakes::Clock).unwrap();
                assert_eq!(world.status.attempt, attempt, "{name}: {:#?}", world.trace);
                hinder(&mut world, false);
                world.until(0, Pending);
                assert_eq!(world.status.attempt, attempt + 1, "{name}: {:#?}", world.trace);
                world.until(0, phase);
            }
        }
    }
}

fn lose_expand(world: &mut World) {
    world.delete_job_of_candidate(&JobKind::Expand);
}

/// The tests of this attempt have begun, and what they say stands while its gates are climbed again: for the pods that they are
/// about, and no others.
#[test]
fn a_candidate_that_climbs_again_is_what_was_tested_or_is_begun_anew() {
    type Happens = fn(&mut World);
    let rows: [(&str, Happens, u32); 4] = [
        ("nothing else", |_| {}, 0),
        (
            "somebody changes what its pods are made of",
            |world| world.spoil_part(1, Service::Trade, Part::Workload, false),
            1,
        ),
        (
            "a Deployment is lost",
            |world| world.spoil_part(1, Service::Trade, Part::Workload, true),
            1,
        ),
        ("what was rendered is lost", |world| world.lose_rendered("r1"), 1),
    ];
    for begun in [Testing, AwaitingPromotion] {
        for climbed in [Migrating, Provisioning] {
            for (name, happens, anew) in rows {
                let mut world = at(begun);
                world.finish(0);
                world.ask(|requests, names| requests.promote = names.candidate);
                let attempt = world.status.attempt;
                lose_expand(&mut world);
                if climbed == Provisioning {
                    world.crowd("r1", Service::User);
                }
                world.until(0, climbed);
                world.finish(0);
                happens(&mut world);
                world.crowded.clear();
                let told = |world: &World| format!("{name}, {begun} to {climbed}: {:#?}", world.trace);
                world
                    .settle(Wakes::Clock)
                    .unwrap_or_else(|why| panic!("{why}: {}", told(&world)));
                let arrives = if begun == Testing || anew == 0 {
                    Live
                } else {
                    AwaitingPromotion
                };
                assert_eq!(
                    (world.status.phase, world.status.attempt),
                    (arrives, attempt + anew),
                    "{}",
                    told(&world)
                );
            }
        }
    }
}

#[test]
fn a_release_begins_when_nothing_else_is_left_and_the_live_schema_is_contracted() {
    let world = at(Pending);
    let live = world.status.live.clone().unwrap();
    let previous = at(Verifying).status.previous;
    let leftover = Stack {
        colour: Colour::Green,
        revision: "r9".to_owned(),
    };
    let rows: Vec<(&str, Change<'_>, Phase)> = vec![
        ("nothing else is left", Box::new(|_| {}), Migrating),
        (
            "the rest of another attempt",
            Box::new(|seen| drop(seen.stacks.insert(leftover.clone(), StackSeen::default()))),
            Pending,
        ),
        (
            "the old stack is not retired",
            Box::new(|seen| seen.status.previous.clone_from(&previous)),
            Pending,
        ),
        (
            "the contract runs",
            Box::new(|seen| {
                let (stack, attempt) = (live.stack.clone(), live.attempt);
                seen.status.contract = Some(Contract { stack, attempt });
            }),
            Pending,
        ),
        (
            "the contract is due",
            Box::new(|seen| seen.status.live.as_mut().unwrap().contracted = false),
            Pending,
        ),
        (
            "what is live is not verified, and is not contracted for",
            Box::new(|seen| {
                let live = seen.status.live.as_mut().unwrap();
                (live.contracted, live.verified) = (false, false);
            }),
            Migrating,
        ),
    ];
    for (name, change, phase) in rows {
        assert_eq!(records(&world, change).phase, phase, "{name}");
    }
}

#[test]
fn a_candidate_has_as_many_pods_as_are_declared_and_as_the_live_stack_has() {
    let world = with_ready_pods();
    let candidate = world.status.candidate.clone().unwrap().stack;
    let live = world.status.live.clone().unwrap().stack;
    assert_eq!(records(&world, |_| {}).phase, Testing);
    let one_short = records(&world, |seen| trade_of(seen, &candidate).ready -= 1);
    assert_eq!(one_short.phase, Provisioning);
    let more_are_live = records(&world, |seen| trade_of(seen, &live).replicas += 1);
    assert_eq!(more_are_live.phase, Provisioning);
}

/// Whether the operator lets it be, as a sidecar, or puts it right: what was tested are other pods.
#[test]
fn a_candidate_whose_pods_come_to_be_made_of_something_else_is_tested_anew() {
    for phase in [Testing, AwaitingPromotion] {
        let mut world = at(phase);
        world.finish(0);
        let candidate = world.status.candidate.clone().unwrap();
        assert_eq!(records(&world, |_| {}).phase, phase);
        let lets_be = records(&world, |seen| {
            "another".clone_into(&mut trade_of(seen, &candidate.stack).template);
        });
        assert_eq!((lets_be.phase, lets_be.attempt), (Pending, candidate.attempt + 1));
        // An older operator has recorded nothing: its Jobs say it.
        let unrecorded = |seen: &mut Observed| seen.status.candidate.as_mut().unwrap().tested = None;
        assert_eq!(records(&world, unrecorded).phase, phase);
        let lets_be = records(&world, |seen| {
            unrecorded(seen);
            "another".clone_into(&mut trade_of(seen, &candidate.stack).template);
        });
        assert_eq!((lets_be.phase, lets_be.attempt), (Pending, candidate.attempt + 1));
        // The one before may have been one of these pods.
        let being_replaced = records(&world, |seen| {
            trade_of(seen, &candidate.stack).current = false;
            seen.requests.promote = Some(token(&candidate.stack, candidate.attempt));
            for job in seen.jobs.values_mut() {
                job.state = JobState::Passed;
            }
        });
        assert_eq!(being_replaced.phase, phase);

        // The tests that were about them need not be there any more.
        let tests: Vec<JobKind> = world.observe().jobs.keys().map(|job| job.kind.clone()).collect();
        for test in tests.iter().filter(|kind| !kind.migrates()) {
            world.delete_job_of_candidate(test);
        }
        world.spoil_part(1, Service::Trade, Part::Workload, false);
        world.until(0, Pending);
        assert_eq!(world.status.attempt, candidate.attempt + 1);
        world.until(0, phase);
        let renewed = world.status.candidate.clone().unwrap();
        assert_eq!(
            (renewed.stack, renewed.attempt),
            (candidate.stack, candidate.attempt + 1)
        );
    }
}

/// What was changed before the tests is put right, and they wait for the last pod of that.
#[test]
fn tests_wait_for_pods_that_are_replaced() {
    let world = with_ready_pods();
    let candidate = world.status.candidate.clone().unwrap().stack;
    let waits = records(&world, |seen| {
        trade_of(seen, &candidate).current = false;
    });
    assert_eq!(waits.phase, Provisioning);
    let message = &condition(&waits, "Ready").message;
    assert!(
        message.contains("the last trade pods of another template to be replaced"),
        "{message}"
    );
    assert_eq!(records(&world, |_| {}).phase, Testing);
}

#[test]
fn while_time_stands_still_nothing_is_started_and_no_deadline_passes() {
    let mut world = at(Testing);
    let runs = |world: &World| {
        let plan = decide(&world.spec, &world.observe(), world.now);
        plan.actions.iter().any(|action| matches!(action, Action::Run(_)))
    };
    assert!(runs(&world));
    world.declare(|spec| spec.suspend = true);
    assert!(!runs(&world));

    let world = at(Provisioning);
    let begun = world.now - seconds(700);
    let late = records(&world, |seen| seen.status.phase_since = Some(begun));
    assert_eq!(late.phase, Failed);
    let stopped = records(&world, |seen| {
        seen.status.phase_since = Some(begun);
        seen.status.stopped_since = Some(begun + seconds(50));
    });
    assert_eq!(stopped.phase, Provisioning);
    assert_eq!(stopped.phase_since, Some(world.now - seconds(50)));
}

#[test]
fn for_a_move_time_goes_on_although_it_is_suspended() {
    let mut world = after_a_release();
    world.declare(|spec| spec.suspend = true);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    let stopped = world.now;
    world.wait(100);
    world.crowd("r0", Service::Trade);
    roll_back(&mut world);
    let begun = world.now;
    while world.status.phase != RollingBack {
        world.step(0, View::Fresh).unwrap();
    }
    assert_eq!(world.status.phase_since, Some(begun));
    world.finish(0);
    let reconciling = |world: &World| condition(&world.status, "Reconciling");
    let told = reconciling(&world);
    assert_eq!(told.reason, "RollingBack");
    let until = begun + seconds(600);
    let message =
        format!("the traffic goes back to r0: waiting for 1 of 2 trade pods; since {begun}, until {until}");
    assert_eq!(told.message, message);
    world.wait(5);
    // Resumed, it has lasted as long as before; what it comes to begins when time goes on again.
    let mut resumed = world.spec.clone();
    resumed.suspend = false;
    let recorded = decide(&resumed, &world.observe(), world.now).status.unwrap();
    assert_eq!(recorded.phase_since, Some(begun));
    world.until(0, Held);
    world.finish(0);
    assert_eq!(reconciling(&world).status, "False");
    assert_eq!(world.status.phase_since, Some(stopped));
    world.declare(|spec| spec.suspend = false);
    world.wait(100);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    assert_eq!(world.status.phase_since, Some(world.now));
}

#[test]
fn a_verification_goes_by_what_was_declared_with_the_version() {
    let lenient = |spec: &mut Spec| spec.rollout.verification.max_error_rate = "100%".to_owned();
    // Of another version it says nothing, and that one waits.
    let mut world = releasing(7, Verifying);
    world.release(2);
    world.declare(lenient);
    let waits = "r2, as it is declared now, waits for the end of that";
    let message = told(&records(&world, |_| {}), "Reconciling");
    assert!(message.contains(waits), "{message}");
    world.until(0, RollingBack);
    let message = told(&records(&world, |_| {}), "Reconciling");
    assert!(message.contains(waits), "{message}");
    world.until(0, Live);
    assert_eq!(world.journey, anew![Verifying, RollingBack, Held] as &[Phase]);
    // Of the same it counts at once.
    let mut world = releasing(7, Verifying);
    world.declare(lenient);
    world.until(0, Live);
    assert_eq!(world.journey, [Verifying, Live]);
}

#[test]
fn what_stands_still_is_named_and_so_is_what_waits_for_it() {
    for phase in [Testing, AwaitingPromotion, Verifying] {
        let mut world = at(phase);
        world.release(2);
        world.declare(|spec| spec.suspend = true);
        let message = told(&records(&world, |_| {}), "Reconciling");
        assert!(
            message.starts_with(&format!("r1 is {phase} and suspended")),
            "{message}"
        );
        let waits = "r2, as it is declared now, waits for the end of that";
        assert!(message.ends_with(waits), "{message}");
    }
}

/// Endpoints are there all the while if somebody restarts a Deployment, or adds to it what the operator lets be.
#[test]
fn a_swap_is_taken_back_if_the_candidate_is_not_what_was_tested_any_more() {
    let mut world = at(Promoting);
    let candidate = world.status.candidate.clone().unwrap().stack;
    let changed = |seen: &mut Observed| "another".clone_into(&mut trade_of(seen, &candidate).template);
    let taken_back = records(&world, changed);
    assert_eq!(taken_back.phase, RollingBack);
    assert_eq!(taken_back.rejected.unwrap().reason, Reason::PromotionFailed);
    let moves = |change: fn(&mut ServiceSeen)| {
        let mut seen = world.observe();
        change(trade_of(&mut seen, &candidate));
        let plan = decide(&world.spec, &seen, world.now);
        plan.actions.iter().filter(|action| action.is_move()).count()
    };
    assert_eq!(moves(|_| {}), 3);
    // Changed and changed back: of either some pods may be there.
    assert_eq!(moves(|trade| trade.current = false), 0);
    until_one_is_moved(&mut world);
    assert_eq!(records(&world, changed).phase, RollingBack);
    // What has all the traffic is kept as what is live is.
    while world.targets().iter().flatten().any(|it| *it != candidate) {
        world.step(0, View::Fresh).unwrap();
    }
    world.finish(0);
    assert_eq!(records(&world, changed).phase, Promoting);

    let mut world = at(Promoting);
    world.operators[0].crash();
    world.spoil_part(1, Service::Trade, Part::Workload, false);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(
        world.journey,
        [Promoting, RollingBack, Held],
        "{:#?}",
        world.trace
    );
}

#[test]
fn a_swap_is_given_up_for_missing_pods_only_by_who_has_seen_them_missing() {
    let mut world = at(Promoting);
    until_one_is_moved(&mut world);
    world.wait(60);
    let given_up = records(&world, lacks_pods);
    assert_eq!(given_up.phase, RollingBack);
    let taken_over = records(&world, |seen| {
        lacks_pods(seen);
        seen.seen_before = false;
    });
    assert_eq!(taken_over.phase, Promoting);
    let dead = records(&world, |seen| {
        lacks_pods(seen);
        seen.stacks
            .values_mut()
            .for_each(|stack| stack.services.get_mut(&Service::Trade).unwrap().ready = 0);
        seen.seen_before = false;
    });
    assert_eq!(dead.phase, RollingBack);
}

#[test]
fn a_swap_has_ended_when_the_traffic_has_followed_the_selectors() {
    let mut world = at(Promoting);
    while world.targets().iter().flatten().any(|it| it.revision != "r1") {
        world.step(0, View::Fresh).unwrap();
    }
    world.slices();
    let old = world.status.live.clone().unwrap().stack;
    let new = world.status.candidate.clone().unwrap().stack;
    let trade = |seen: &mut Observed, stacks: &[&Stack]| {
        let endpoints = &mut seen.live.get_mut(&Service::Trade).unwrap().endpoints;
        *endpoints = stacks.iter().copied().cloned().collect();
    };
    let dies = |seen: &mut Observed| {
        trade(seen, &[]);
        let stack = seen.stacks.get_mut(&new).unwrap();
        stack.services.get_mut(&Service::Trade).unwrap().ready = 0;
    };
    let rows: Vec<(&str, Change<'_>, Phase)> = vec![
        ("it has", Box::new(|_| {}), Verifying),
        (
            "no two answers agree",
            Box::new(|seen| seen.answers = None),
            Promoting,
        ),
        (
            "all answers are of the stack before",
            Box::new(|seen| seen.answers = Some(old.clone())),
            Promoting,
        ),
        (
            "a slice lists both stacks",
            Box::new(|seen| trade(seen, &[&old, &new])),
            Promoting,
        ),
        (
            "a slice lists nothing",
            Box::new(|seen| trade(seen, &[])),
            Promoting,
        ),
        ("its pods are gone", Box::new(dies), RollingBack),
    ];
    for (name, change, phase) in rows {
        assert_eq!(records(&world, change).phase, phase, "{name}");
    }
    // What should have been left and got the traffic all the same is not verified, and the stack before it is no way back.
    let force = |seen: &mut Observed| seen.status.candidate.as_mut().unwrap().forced = true;
    let forced = records(&world, force);
    assert_eq!(forced.phase, Held);
    assert!(!forced.previous.unwrap().way_back);
    for (seconds_ago, phase) in [(9, Promoting), (10, Held)] {
        let forced = records(&world, |seen| {
            dies(seen);
            seen.status.phase_since = Some(world.now - seconds(seconds_ago));
            force(seen);
        });
        assert_eq!(forced.phase, phase);
    }
}

/// A version that answers badly under everybody's requests may be what keeps its swap from ending.
#[test]
fn a_swap_that_has_not_ended_is_taken_back_if_the_new_stack_serves_badly() {
    let mut world = at(Promoting);
    while world.targets().iter().flatten().any(|it| it.revision != "r1") {
        world.step(0, View::Fresh).unwrap();
    }
    let bad = Figures {
        requests: 1000,
        errors: 500,
        ..Figures::default()
    };
    let slow = Figures {
        requests: 1000,
        timed: 1000,
        p99_over: Duration::from_mins(1),
        ..Figures::default()
    };
    let few = Figures {
        requests: 9,
        errors: 9,
        ..Figures::default()
    };
    let good = Figures {
        requests: 1000,
        ..Figures::default()
    };
    let waits = |seen: &mut Observed, seconds_ago: i64, figures: Figures| {
        seen.answers = None;
        seen.figures = BTreeMap::from([(Service::Trade, figures)]);
        seen.status.phase_since = Some(world.now - seconds(seconds_ago));
    };
    for (figures, phase) in [
        (bad, RollingBack),
        (slow, RollingBack),
        (few, Promoting),
        (good, Promoting),
    ] {
        let recorded = records(&world, |seen| waits(seen, 10, figures));
        assert_eq!(recorded.phase, phase, "{figures:?}");
        let why = recorded.rejected.map(|it| it.reason);
        assert_eq!(why, (phase == RollingBack).then_some(Reason::VerificationFailed));
    }
    let rows: [(&str, Change<'_>); 4] = [
        (
            "the data plane needs its moment",
            Box::new(|seen| waits(seen, 9, bad)),
        ),
        (
            "nobody has looked before",
            Box::new(|seen| {
                waits(seen, 10, bad);
                seen.seen_before = false;
            }),
        ),
        (
            "there is nothing to go back to",
            Box::new(|seen| {
                waits(seen, 10, bad);
                seen.status.live = None;
            }),
        ),
        (
            "not all of it has been moved",
            Box::new(|seen| {
                waits(seen, 10, bad);
                seen.live.get_mut(&Service::User).unwrap().epoch -= 1;
            }),
        ),
    ];
    for (name, change) in rows {
        assert_eq!(records(&world, change).phase, Promoting, "{name}");
    }
}

/// A name; for how many seconds the traffic has gone back, and nobody would miss the new stack; what is dead of that, and of the old one;
/// how many Services are moved.
type GoingBack<'a> = (&'a str, i64, Option<i64>, &'a [Service], &'a [Service], usize);

/// With the new stack dead, what there is of the old one is better than nothing: nobody waits for the deadline, nor for all of it.
#[test]
fn a_way_back_from_what_serves_nobody_does_not_wait_for_all_of_the_old_stack() {
    let world = releasing(6, RollingBack);
    let old = world.status.live.clone().unwrap().stack;
    let new = world.status.candidate.clone().unwrap().stack;
    let die = |seen: &mut Observed, stack: &Stack, services: &[Service]| {
        let stack = seen.stacks.get_mut(stack).unwrap();
        for service in services {
            stack.services.get_mut(service).unwrap().ready = 0;
        }
    };
    let (all, trade) = (Service::ALL, [Service::Trade]);
    let two = [Service::Trade, Service::User];
    let rows: [GoingBack<'_>; 7] = [
        ("the new stack is dead", 10, Some(10), &all, &trade, 3),
        (
            "it was seen otherwise nine seconds ago",
            60,
            Some(9),
            &all,
            &trade,
            0,
        ),
        ("it was seen otherwise right before", 60, None, &all, &trade, 0),
        ("and so is the old one", 60, Some(60), &all, &all, 0),
        ("the new one serves something", 60, Some(60), &two, &trade, 0),
        ("and its time is over", 600, Some(10), &two, &trade, 3),
        (
            "and its time is over, but not for long",
            600,
            Some(9),
            &two,
            &trade,
            0,
        ),
    ];
    let ago = |ago: i64| world.now - seconds(ago);
    let moves = |seen: &Observed| {
        let plan = decide(&world.spec, seen, world.now);
        plan.actions.iter().filter(|it| it.is_move()).count()
    };
    for (name, phase, unneeded, of_new, of_old, moved) in rows {
        let mut seen = world.observe();
        seen.seen_before = true;
        seen.status.phase_since = Some(ago(phase));
        seen.status.candidate.as_mut().unwrap().unneeded_since = unneeded.map(ago);
        die(&mut seen, &new, of_new);
        die(&mut seen, &old, of_old);
        assert_eq!(moves(&seen), moved, "{name}");
        seen.seen_before = false;
        assert_eq!(moves(&seen), 0, "{name}, and nobody has looked before");
    }
    // It would be waited for for ever, and so would whatever is declared then.
    for (name, phase, moved) in [("in time", 60, 0), ("its time is over", 600, 3)] {
        let mut seen = world.observe();
        seen.seen_before = true;
        seen.status.phase_since = Some(ago(phase));
        seen.status.candidate.as_mut().unwrap().unneeded_since = Some(ago(10));
        die(&mut seen, &new, &all);
        seen.stacks.remove(&old);
        assert_eq!(moves(&seen), moved, "nothing is left of the old one, {name}");
    }
}

#[test]
fn a_rollback_goes_forward_only_when_nothing_else_is_left() {
    let mut world = releasing(6, RollingBack);
    let old = world.status.live.clone().unwrap().stack;
    let new = world.status.candidate.clone().unwrap().stack;
    let begun = world.now - seconds(600);
    let die = |seen: &mut Observed, stack: &Stack| {
        let stack = seen.stacks.get_mut(stack).unwrap();
        stack.services.get_mut(&Service::Trade).unwrap().ready = 0;
    };
    let late = |seen: &mut Observed| seen.status.phase_since = Some(begun);
    let rows: Vec<(&str, Change<'_>, Phase)> = vec![
        ("the old stack serves", Box::new(late), RollingBack),
        (
            "it does not",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
            }),
            Promoting,
        ),
        (
            "it does not, and the new one is short of a pod",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                let there = seen.stacks.get_mut(&new).unwrap();
                there.services.get_mut(&Service::User).unwrap().ready = 1;
            }),
            Promoting,
        ),
        ("it does not yet", Box::new(|seen| die(seen, &old)), RollingBack),
        (
            "neither serves",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                die(seen, &new);
            }),
            RollingBack,
        ),
        (
            "neither serves what is on the other",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                let there = seen.stacks.get_mut(&new).unwrap();
                there.services.get_mut(&Service::User).unwrap().ready = 0;
                seen.live.get_mut(&Service::User).unwrap().target = Target::Stack(old.clone());
            }),
            RollingBack,
        ),
        (
            "nobody has looked before",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                seen.seen_before = false;
            }),
            RollingBack,
        ),
        (
            "the API server refuses to move anything",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                seen.refused = Some(refused("update Service exchange-user", true));
            }),
            RollingBack,
        ),
        (
            "the API server refuses to make the old stack's pods again",
            Box::new(|seen| {
                late(seen);
                die(seen, &old);
                seen.refused = Some(refused("create Deployment exchange-blue-user", false));
            }),
            Promoting,
        ),
    ];
    for suspended in [false, true] {
        world.spec.suspend = suspended;
        for (name, change, phase) in &rows {
            let recorded = records(&world, |seen| {
                change(seen);
                seen.status.stopped_since = suspended.then_some(begun);
            });
            assert_eq!(recorded.phase, *phase, "{name}, suspended: {suspended}");
            let told = match *name {
                "neither serves what is on the other" => "NotBack",
                "the API server refuses to move anything" => "WriteRefused",
                _ => "Progressing",
            };
            let stalled = condition(&recorded, "Stalled");
            assert_eq!(stalled.reason, told, "{name}: {}", stalled.message);
            assert!(!stalled.message.contains("  "), "{}", stalled.message);
            if *phase == Promoting {
                assert_eq!(recorded.rejected.unwrap().reason, Reason::RollbackImpossible);
                assert_eq!(recorded.epoch, world.status.epoch + 1);
            }
        }
    }
}

#[test]
fn the_old_stack_is_kept_until_nothing_is_open_or_its_time_is_over() {
    let world = at(Verifying);
    let previous = world.status.previous.clone().unwrap();
    assert_eq!(previous.state, PreviousState::Draining);
    let rows = [
        ("quiet", Some(0), Some(5), 6, PreviousState::Retained),
        ("not long enough", Some(0), Some(4), 6, PreviousState::Draining),
        ("something is open", Some(1), Some(5), 60, PreviousState::Draining),
        ("a pod does not say", None, Some(5), 60, PreviousState::Draining),
        (
            "its time is over",
            Some(1),
            None,
            100_000,
            PreviousState::Retained,
        ),
    ];
    for (name, open, idle, since, state) in rows {
        let recorded = records(&world, |seen| {
            seen.stacks.get_mut(&previous.stack).unwrap().open = open;
            let previous = seen.status.previous.as_mut().unwrap();
            previous.idle_since = idle.map(|idle| world.now - seconds(idle));
            previous.since = world.now - seconds(since);
        });
        assert_eq!(recorded.previous.unwrap().state, state, "{name}");
    }
}

#[test]
fn time_in_which_nobody_looked_is_not_held_against_a_release() {
    let mut world = at(Provisioning);
    world.finish(0);
    world.kubelet();
    world.wait(601);
    world.operators[1].crash();
    world.step(1, View::Fresh).unwrap();
    world.finish(1);
    world.round();
    world.until(1, Testing);
    assert_eq!(world.journey, [Provisioning, Testing], "{:#?}", world.trace);
}

#[test]
fn an_operator_that_is_served_an_old_object_moves_nothing() {
    let mut world = World::new(true);
    world.settle(Wakes::Clock).unwrap();
    let old = world.remember();
    world.release(1);
    world.until(0, Verifying);
    world.finish(0);
    let before = world.targets();
    world.operators[1].crash();
    world.look_at_old_object(1, &old);
    world.finish(1);
    assert_eq!(world.targets(), before, "{:#?}", world.trace);
}

#[test]
fn the_guards_refuse_what_a_plan_must_not_do() {
    let mut world = after_a_release();
    world.finish(0);
    world.round();
    let (seen, spec) = (world.observe(), world.spec.clone());
    let live = world.status.live.clone().unwrap().stack;
    let previous = world.status.previous.clone().unwrap().stack;
    let fence = seen.live[&Service::Trade].fence.clone();
    let record = world.status.clone();
    let check = |action: &Action, seen: &Observed| guard::check(&spec, &record, action, seen);
    let delete = |stack: &Stack, part| Action::Delete {
        stack: stack.clone(),
        service: Service::Trade,
        part,
        fence: fence.clone(),
    };
    assert_eq!(
        check(&delete(&live, Part::Workload), &seen),
        Err(Refusal::Live(live.clone()))
    );
    let unrender = Action::Unrender {
        stack: live.clone(),
        fence: fence.clone(),
    };
    assert_eq!(check(&unrender, &seen), Err(Refusal::Live(live.clone())));
    assert_eq!(check(&delete(&previous, Part::Workload), &seen), Ok(()));
    assert_eq!(
        check(&delete(&previous, Part::ColourService), &seen),
        Err(Refusal::PodsLeft(previous.clone()))
    );
    let scale = |replicas| Action::Apply {
        stack: live.clone(),
        service: Service::Trade,
        part: Part::Workload,
        replicas,
        fence: Some(fence.clone()),
    };
    assert_eq!(check(&scale(2), &seen), Ok(()));
    let few = |replicas| {
        Err(Refusal::TooFew {
            stack: live.clone(),
            service: Service::Trade,
            replicas,
        })
    };
    assert_eq!(check(&scale(1), &seen), few(1));
    assert_eq!(check(&scale(0), &seen), few(0));
    let point = |intent| Action::Point {
        service: Service::User,
        fence: fence.clone(),
        to: Some(previous.clone()),
        epoch: 9,
        intent,
    };
    let short = |service| {
        Err(Refusal::NoEndpoints {
            stack: previous.clone(),
            service,
        })
    };
    assert_eq!(check(&point(Intent::Promote), &seen), Ok(()));
    // Not the service that is written now: none moves before all can.
    let notification = |ready| {
        let mut seen = seen.clone();
        let stack = seen.stacks.get_mut(&previous).unwrap();
        stack.services.get_mut(&Service::Notification).unwrap().ready = ready;
        seen
    };
    assert_eq!(
        check(&point(Intent::Promote), &notification(1)),
        short(Service::Notification)
    );
    assert_eq!(check(&point(Intent::RollBack), &notification(1)), Ok(()));
    assert_eq!(
        check(&point(Intent::RollBack), &notification(0)),
        short(Service::Notification)
    );
    let mut without = seen.clone();
    without.live.remove(&Service::Notification);
    assert_eq!(
        check(&point(Intent::Promote), &without),
        Err(Refusal::NotThere(Service::Notification))
    );
    assert_eq!(check(&point(Intent::RollBack), &without), Ok(()));
    // What has traffic, and what is recorded to, are two.
    let mut other = record.clone();
    other.live.as_mut().unwrap().stack = previous.clone();
    let two = Observed {
        status: other.clone(),
        ..seen.clone()
    };
    for stack in [&live, &previous] {
        let refused = guard::check(&spec, &other, &delete(stack, Part::Workload), &two);
        assert_eq!(refused, Err(Refusal::Live(stack.clone())));
    }
    let deleting = Observed {
        deleting: true,
        ..seen.clone()
    };
    assert_eq!(check(&scale(2), &deleting), Err(Refusal::Deleting));
    let mut another = seen;
    another.status.attempt += 1;
    assert_eq!(check(&scale(2), &another), Err(Refusal::Superseded));
}

/// Whoever has sent its clients there, and as long as it may have to serve.
#[test]
fn the_guards_keep_what_is_reached_and_the_way_back() {
    let mut world = after_a_release();
    world.finish(0);
    world.round();
    let (seen, record) = (world.observe(), world.status.clone());
    let previous = record.previous.clone().unwrap().stack;
    let fence = seen.live[&Service::Trade].fence.clone();
    let delete = Action::Delete {
        stack: previous.clone(),
        service: Service::Trade,
        part: Part::Workload,
        fence: fence.clone(),
    };
    // Somebody else's selector leads wherever its endpoints are.
    let astray = |endpoints: &[&Stack]| {
        let mut seen = seen.clone();
        let trade = seen.live.get_mut(&Service::Trade).unwrap();
        trade.target = Target::Foreign;
        trade.endpoints = endpoints.iter().map(|it| (*it).clone()).collect();
        guard::check(&world.spec, &record, &delete, &seen)
    };
    assert_eq!(astray(&[]), Ok(()));
    assert_eq!(astray(&[&previous]), Err(Refusal::Live(previous.clone())));
    // What is no way back may be as small as it likes, but not nothing.
    let scale = |replicas, way_back| {
        let mut record = record.clone();
        record.previous.as_mut().unwrap().way_back = way_back;
        let seen = Observed {
            status: record.clone(),
            ..seen.clone()
        };
        let action = Action::Apply {
            stack: previous.clone(),
            service: Service::Trade,
            part: Part::Workload,
            replicas,
            fence: Some(fence.clone()),
        };
        guard::check(&world.spec, &record, &action, &seen).is_ok()
    };
    assert!(scale(2, true) && !scale(1, true));
    assert!(scale(1, false) && !scale(0, false));
}

/// The service that neither stack has does not keep the others from going back; forward it does.
#[test]
fn nobody_loses_what_nobody_has() {
    let mut world = after_a_release();
    world.finish(0);
    world.round();
    let mut seen = world.observe();
    let live = world.status.live.clone().unwrap().stack;
    let previous = world.status.previous.clone().unwrap().stack;
    let check = |intent, seen: &Observed| {
        let point = Action::Point {
            service: Service::User,
            fence: seen.live[&Service::User].fence.clone(),
            to: Some(previous.clone()),
            epoch: 9,
            intent,
        };
        guard::check(&world.spec, &world.status, &point, seen)
    };
    let short = Err(Refusal::NoEndpoints {
        stack: previous.clone(),
        service: Service::Notification,
    });
    for (stack, back) in [(&previous, short.clone()), (&live, Ok(()))] {
        let there = seen.stacks.get_mut(stack).unwrap();
        there.services.get_mut(&Service::Notification).unwrap().ready = 0;
        assert_eq!(check(Intent::RollBack, &seen), back);
        assert_eq!(check(Intent::Promote, &seen), short);
    }
    // Where somebody else's selector leads, only its endpoints tell.
    for (endpoints, back) in [
        (vec![live.clone()], short),
        (vec![previous.clone()], Ok(())),
        (vec![], Ok(())),
    ] {
        let notification = seen.live.get_mut(&Service::Notification).unwrap();
        (notification.target, notification.endpoints) = (Target::Foreign, endpoints);
        assert_eq!(check(Intent::RollBack, &seen), back);
    }
}

/// While traffic moves, counts stand still: what grows has too few endpoints for a moment.
#[test]
fn nothing_grows_while_traffic_moves() {
    for (phase, grows) in [(Promoting, false), (Testing, true)] {
        let mut world = at(phase);
        world.operators[0].crash();
        world.declare(|spec| spec.services.trade.replicas = 4);
        let plan = decide(&world.spec, &world.observe(), world.now);
        let scales = |action: &Action| {
            matches!(
                action,
                Action::Apply {
                    part: Part::Workload,
                    ..
                }
            )
        };
        assert_eq!(
            plan.actions.iter().any(scales),
            grows,
            "{phase}: {:?}",
            plan.actions
        );
    }
}

/// Its Job goes with a later attempt, or with somebody who cleans up. That it has failed stays.
#[test]
fn a_contract_migration_that_has_failed_is_not_forgotten_with_its_job() {
    let mut world = after_a_release();
    world.finish(0);
    let mut seen = world.observe();
    let live = seen.status.live.clone().unwrap();
    seen.status.previous = None;
    seen.status.contract = Some(Contract {
        stack: live.stack.clone(),
        attempt: live.attempt,
    });
    let job = Job {
        kind: JobKind::Contract,
        stack: live.stack,
        attempt: live.attempt,
    };
    let failed = seen.jobs.values().next().unwrap().clone();
    let state = JobState::Failed("no".to_owned());
    seen.jobs.insert(job.clone(), JobSeen { state, ..failed });
    let plan = decide(&world.spec, &seen, world.now);
    assert!(
        plan.events.iter().any(|it| it.reason == "ContractFailed"),
        "{:?}",
        plan.events
    );
    let recorded = plan.status.unwrap();
    let live = recorded.live.as_ref().unwrap();
    assert_eq!(
        (live.contracted, live.contract_failed.as_deref()),
        (true, Some("no"))
    );
    seen.status = recorded;
    seen.jobs.remove(&job);
    let later = decide(&world.spec, &seen, world.now)
        .status
        .unwrap_or(seen.status);
    let schema = condition(&later, "SchemaReady");
    assert_eq!(
        (schema.status.as_str(), schema.reason.as_str()),
        ("False", "ContractFailed")
    );
}

/// Nothing is recorded, and something has traffic: nobody knows that it should not.
#[test]
fn nothing_is_taken_away_while_nothing_is_recorded() {
    let mut world = after_a_release();
    world.finish(0);
    world.round();
    let nothing = unrecorded();
    let seen = Observed {
        status: nothing.clone(),
        ..world.observe()
    };
    let take_away = Action::Point {
        service: Service::User,
        fence: seen.live[&Service::User].fence.clone(),
        to: None,
        epoch: 0,
        intent: Intent::Repair,
    };
    assert_eq!(
        guard::check(&world.spec, &nothing, &take_away, &seen),
        Err(Refusal::HasTraffic(Service::User))
    );
}

#[test]
fn no_selector_is_planned_to_move_before_all_can() {
    let mut world = at(Promoting);
    world.operators[0].crash();
    let points = |seen: &Observed| {
        let plan = decide(&world.spec, seen, world.now);
        let points = plan
            .actions
            .iter()
            .filter(|action| matches!(action, Action::Point { .. }));
        points.count()
    };
    let mut seen = world.observe();
    assert_eq!(points(&seen), 3);
    let candidate = world.status.candidate.clone().unwrap().stack;
    let stack = seen.stacks.get_mut(&candidate).unwrap();
    stack.services.get_mut(&Service::Notification).unwrap().ready = 1;
    assert_eq!(points(&seen), 0);
    let mut seen = world.observe();
    seen.live.remove(&Service::Notification);
    assert_eq!(points(&seen), 0);
}

#[test]
fn no_selector_is_moved_while_a_live_service_may_not_be_made_again() {
    let mut world = at(Testing);
    let targets = |world: &World| {
        let seen = world.observe();
        [Service::User, Service::Notification].map(|service| seen.live[&service].target.clone())
    };
    let before = targets(&world);
    world.delete_live(Service::Trade);
    world.ban = Some(Ban::Live);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Failed, "{:#?}", world.trace);
    let rejected = world.status.rejected.clone().unwrap();
    assert_eq!(rejected.reason, Reason::ProgressDeadlineExceeded);
    let why = "the live Service of trade was not there in time; the API server refuses to touch";
    assert!(rejected.message.starts_with(why), "{}", rejected.message);
    assert_eq!(targets(&world), before);
    world.ban = None;
    world.ask(|requests, names| requests.retry = names.rejected);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
}

/// While traffic moves, counts stand still.
#[test]
fn no_autoscaler_is_touched_while_traffic_moves() {
    let touched = |world: &World| {
        let plan = decide(&world.spec, &world.observe(), world.now);
        let of_autoscaler = |action: &&Action| {
            matches!(
                action,
                Action::Apply {
                    part: Part::Autoscaler,
                    ..
                } | Action::Delete {
                    part: Part::Autoscaler,
                    ..
                }
            )
        };
        plan.actions.iter().filter(of_autoscaler).count()
    };
    let mut world = World::new(true);
    world.autoscale(true);
    world.settle(Wakes::Clock).unwrap();
    world.release(1);
    world.until(0, Promoting);
    // That of r0, in blue, which has the traffic.
    world.spoil_part(0, Service::Trade, Part::Autoscaler, false);
    assert_eq!(touched(&world), 0);
    world.until(0, Verifying);
    assert_eq!(touched(&world), 2, "one for r1, and that of r0");
    world.until(0, Live);
    roll_back(&mut world);
    world.until(0, RollingBack);
    assert_eq!(touched(&world), 0);
    world.until(0, Held);
    assert_eq!(touched(&world), 2, "one for r0, and that of r1");
}

#[test]
fn a_test_that_nobody_waits_for_is_ended() {
    let mut world = at(Testing);
    world.finish(0);
    let superseded = world.status.candidate.clone().unwrap().stack;
    let tests = |world: &World| {
        let jobs = world.observe().jobs.into_keys();
        jobs.filter(|job| job.stack == superseded && !job.kind.migrates())
            .count()
    };
    assert!(tests(&world) > 0);
    world.release(2);
    while world
        .status
        .candidate
        .as_ref()
        .is_none_or(|it| it.stack == superseded)
    {
        world.step(0, View::Fresh).unwrap();
        world.kubelet();
    }
    world.finish(0);
    assert_eq!(tests(&world), 0, "{:#?}", world.trace);
}

#[test]
fn a_new_object_removes_nothing_before_its_first_attempt() {
    let holds_up: [fn(&mut World); 2] = [
        |world| world.declare(|spec| spec.suspend = true),
        |world| world.miss(true),
    ];
    for hold_up in holds_up {
        // A first version, without traffic, whose object is created again and cannot begin.
        let mut world = World::new(true);
        world.until(0, Testing);
        world.finish(0);
        world.lose_status();
        hold_up(&mut world);
        let seen = world.observe();
        assert!(!seen.stacks.is_empty() && !seen.jobs.is_empty());
        world.settle(Wakes::Clock).unwrap();
        let left = world.observe();
        assert_eq!(left.stacks.len(), seen.stacks.len(), "{:#?}", world.trace);
        assert_eq!(left.jobs.len(), seen.jobs.len(), "{:#?}", world.trace);
        assert_eq!(world.status.attempt, 0);
    }
}

#[test]
fn an_object_that_waits_for_somebody_is_not_looked_at_every_second() {
    let suspended = |mut world: World| {
        world.declare(|spec| spec.suspend = true);
        world
    };
    let missing = |mut world: World| {
        world.miss(true);
        world
    };
    let mut taken = World::new(true);
    taken.taken = true;
    let mut in_use = after_a_release();
    in_use.colour(ColourChoice::Green);
    in_use.release(2);
    in_use.settle(Wakes::Clock).unwrap();
    let mut live = after_a_release();
    live.settle(Wakes::Clock).unwrap();
    let mut colour_needed = after_a_release();
    colour_needed.release(2);
    colour_needed.until(0, Pending);
    let mut tested = at(Testing);
    tested.finish(0);
    let rows = vec![
        ("live", live, 60),
        ("its colour is in use", in_use, 60),
        (
            "a new one, and a reference is missing",
            settled(missing(World::new(true))),
            10,
        ),
        ("a new one, and a name is taken", settled(taken), 10),
        (
            "a reference is missing in mid-release",
            missing(at(Provisioning)),
            10,
        ),
        ("suspended in mid-release", suspended(at(Testing)), 60),
        ("suspended, and it has the traffic", suspended(at(Verifying)), 10),
        (
            "suspended, and traffic moves",
            suspended(releasing(6, RollingBack)),
            1,
        ),
        (
            "a reference is missing, and traffic moves",
            missing(releasing(6, RollingBack)),
            1,
        ),
        ("the old stack is removed", colour_needed, 1),
        ("its tests are begun", at(Testing), 1),
        ("tested", tested, 2),
    ];
    for (name, world, expected) in rows {
        let mut seen = world.observe();
        let mut plan = decide(&world.spec, &seen, world.now);
        while let Some(status) = plan.status {
            assert_eq!(plan.requeue.as_secs(), 0, "{name}");
            seen.status = status;
            plan = decide(&world.spec, &seen, world.now);
        }
        assert_eq!(plan.requeue.as_secs(), expected, "{name}");
    }
}

#[test]
fn an_annotation_never_acts_twice() {
    let mut world = releasing(6, Held);
    world.settle(Wakes::Clock).unwrap();
    world.ask(|requests, names| requests.retry = names.rejected);
    world.settle(Wakes::Clock).unwrap();
    let attempts = world.status.attempt;
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.attempt, attempts, "{:#?}", world.trace);
    assert_eq!(world.status.phase, Held);
}

#[test]
fn pausing_stops_the_clock_of_the_retention() {
    let mut world = after_a_release();
    world.finish(0);
    for _ in 0..20 {
        world.step(0, View::Fresh).unwrap();
        world.round();
    }
    world.declare(|spec| spec.suspend = true);
    world.settle(Wakes::Clock).unwrap();
    assert!(world.has("r0"), "retired while suspended");
    world.declare(|spec| spec.suspend = false);
    for _ in 0..50 {
        world.step(0, View::Fresh).unwrap();
        world.round();
    }
    assert!(world.has("r0"), "the time of the pause was counted");
    world.settle(Wakes::Clock).unwrap();
    assert!(!world.has("r0"));
}

#[test]
fn replicas_without_a_release_apply_to_what_is_live_also_after_a_rollback() {
    let mut world = releasing(6, Held);
    world.declare(|spec| spec.services.trade.replicas = 5);
    world.settle(Wakes::Clock).unwrap();
    let seen = world.observe();
    let live = world.status.live.clone().unwrap();
    assert_eq!(live.stack.revision, "r0");
    assert_eq!(
        seen.stacks[&live.stack].service(Service::Trade).unwrap().replicas,
        5
    );
}

#[test]
fn replicas_that_came_with_a_release_wait_for_its_promotion() {
    let mut world = World::new(true);
    world.declare(|spec| spec.services.trade.replicas = 4);
    world.settle(Wakes::Clock).unwrap();
    world.declare(|spec| spec.services.trade.replicas = 1);
    world.release(5);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Failed);
    let live = world.status.live.clone().unwrap();
    assert_eq!(
        world.observe().stacks[&live.stack]
            .service(Service::Trade)
            .unwrap()
            .replicas,
        4
    );
}

#[test]
fn autoscaling_that_came_with_a_release_waits_for_its_promotion() {
    let autoscaler = |world: &World| {
        let live = world.status.live.clone().unwrap().stack;
        let seen = world.observe();
        let trade = seen.stacks[&live].service(Service::Trade).unwrap();
        trade.parts.contains_key(&Part::Autoscaler)
    };
    let mut world = at(Live);
    world.release(0);
    world.autoscale(true);
    world.release(5);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Failed);
    assert!(!autoscaler(&world), "it came with what has failed");
    world.release(2);
    world.settle(Wakes::Clock).unwrap();
    assert!(autoscaler(&world), "it is live with what it came with");
    // So it is with one that is swapped while a newer one is declared already.
    let mut superseded = at(Live);
    superseded.release(0);
    superseded.autoscale(true);
    superseded.release(2);
    superseded.until(0, Promoting);
    superseded.release(5);
    superseded.settle(Wakes::Clock).unwrap();
    assert_eq!(superseded.status.phase, Failed);
    assert!(autoscaler(&superseded), "{:#?}", superseded.trace);
    // What comes back has what it had.
    world.autoscale(false);
    world.release(6);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Held);
    assert!(autoscaler(&world), "{:#?}", world.trace);
    // And what is changed then is meant for it.
    world.autoscale(true);
    world.settle(Wakes::Clock).unwrap();
    world.autoscale(false);
    world.settle(Wakes::Clock).unwrap();
    assert!(!autoscaler(&world), "taken back: {:#?}", world.trace);
    world.release(2);
    world.settle(Wakes::Clock).unwrap();
    assert!(!autoscaler(&world), "{:#?}", world.trace);
}

#[test]
fn replicas_that_are_changed_beside_a_release_apply_to_what_is_live_and_can_be_taken_back() {
    let replicas = |world: &World| {
        let live = world.status.live.clone().unwrap().stack;
        let seen = world.observe();
        seen.stacks[&live].service(Service::Trade).unwrap().replicas
    };
    let declare = |world: &mut World, count| {
        world.declare(|spec| spec.services.trade.replicas = count);
        world.settle(Wakes::Clock).unwrap();
    };
    for (index, phase) in [(1, AwaitingPromotion), (5, Failed), (6, Held)] {
        let mut world = releasing(index, phase);
        for count in [5, 2, 4] {
            declare(&mut world, count);
            assert_eq!(world.status.phase, phase);
            assert_eq!(
                replicas(&world),
                u32::try_from(count).unwrap(),
                "{phase}: {:#?}",
                world.trace
            );
        }
    }
    // One that is given up afterwards takes nothing back.
    let mut world = at(AwaitingPromotion);
    declare(&mut world, 5);
    abort(&mut world);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!((world.status.phase, replicas(&world)), (Failed, 5));
}

#[test]
fn a_live_stack_that_somebody_scales_down_is_repaired_unless_an_autoscaler_does_it() {
    let replicas = |world: &World| {
        let live = world.status.live.clone().unwrap().stack;
        world.observe().stacks[&live]
            .service(Service::Trade)
            .unwrap()
            .replicas
    };
    for phase in [Live, Testing, AwaitingPromotion, Verifying] {
        let mut world = if phase == Live {
            after_a_release()
        } else {
            at(phase)
        };
        world.finish(0);
        world.scale_by_hand(1);
        for _ in 0..3 {
            world.step(0, View::Fresh).unwrap();
            world.finish(0);
        }
        assert_eq!(replicas(&world), 2, "{phase}: {:#?}", world.trace);
    }
    let mut world = releasing(5, Failed);
    world.scale_by_hand(1);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(replicas(&world), 2);
    let mut world = after_a_release();
    world.autoscale(true);
    world.settle(Wakes::Clock).unwrap();
    world.scale_by_hand(1);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(replicas(&world), 1, "{:#?}", world.trace);
}

#[test]
fn a_release_that_the_api_server_refuses_or_fails_ends_at_its_deadline_and_says_why() {
    let rows = [
        (Pending, Ban::Jobs, Reason::MigrationFailed),
        (
            Migrating,
            Ban::Parts(Part::Workload),
            Reason::ProgressDeadlineExceeded,
        ),
        (
            Migrating,
            Ban::Parts(Part::Budget),
            Reason::ProgressDeadlineExceeded,
        ),
        (Migrating, Ban::Rendering, Reason::ProgressDeadlineExceeded),
    ];
    let both = rows
        .into_iter()
        .flat_map(|row| [(row, "refuses"), (row, "fails")]);
    for ((phase, ban, reason), does) in both {
        let mut world = at(phase);
        world.ban = Some(ban);
        world.fails = does == "fails";
        let cause = format!("the API server {does} to touch");
        for _ in 0..80 {
            world.step(0, View::Fresh).unwrap();
            world.round();
        }
        let message = told(&world.status, "Reconciling");
        assert!(message.contains(&cause), "{ban:?}: {message}");
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.phase, Failed, "{ban:?}: {:#?}", world.trace);
        let rejected = world.status.rejected.clone().unwrap();
        assert_eq!(rejected.reason, reason, "{ban:?}");
        let why = rejected.message;
        assert!(why.contains(&cause), "{ban:?}: {why}");
        world.ban = None;
        world.ask(|requests, names| requests.retry = names.rejected);
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.phase, Live, "{ban:?}: {:#?}", world.trace);
    }
}

/// A release that waits for ever: what has its colour cannot be removed.
fn not_removed() -> World {
    let mut world = after_a_release();
    world.ban = Some(Ban::Deletions);
    world.release(2);
    world.settle(Wakes::Clock).unwrap();
    world
}

#[test]
fn what_cannot_be_removed_or_moved_back_is_told() {
    let mut world = not_removed();
    assert_eq!(world.status.phase, Pending);
    let (reason, message) = world.stalled().unwrap();
    assert_eq!(reason, "WriteRefused");
    assert!(
        message.contains("the API server refuses to touch Deletions"),
        "{message}"
    );
    world.ban = None;
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live);

    let mut world = after_a_release();
    roll_back(&mut world);
    world.ban = Some(Ban::Live);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, RollingBack);
    assert_eq!(world.stalled().unwrap().0, "WriteRefused");
}

/// Of several things that somebody has to mend, the one without which nothing goes on.
#[test]
fn a_refused_write_is_not_told_instead_of_what_is_waited_for() {
    let world = not_removed();
    let reason = |world: &World, change: Change<'_>| {
        let recorded = records(world, |seen| {
            seen.refused = Some(refused("touch what nobody waits for", false));
            change(seen);
        });
        condition(&recorded, "Stalled").reason
    };
    let drains = |seen: &mut Observed| {
        let previous = seen.status.previous.as_mut().unwrap();
        previous.state = PreviousState::Draining;
        previous.since = world.now;
        previous.idle_since = None;
    };
    let lacks = |seen: &mut Observed| {
        seen.declared = Err("Secret prod/db is missing".to_owned());
        seen.status.missing_since = Some(world.now - seconds(30));
    };
    assert_eq!(reason(&world, Box::new(|_| {})), "WriteRefused");
    assert_eq!(reason(&world, Box::new(lacks)), "ReferenceMissing");
    assert_eq!(reason(&world, Box::new(drains)), "Progressing");

    let mut world = after_a_release();
    world.colour(ColourChoice::Green);
    world.release(2);
    world.settle(Wakes::Clock).unwrap();
    let since = world.now - SignedDuration::from_hours(1);
    let long_ago = |seen: &mut Observed| seen.status.phase_since = Some(since);
    assert_eq!(reason(&world, Box::new(long_ago)), "ColourInUse");
}

#[test]
fn what_clients_are_sent_to_is_not_retired() {
    let mut world = after_a_release();
    let before = world.status.previous.clone().unwrap().stack;
    let other = world.status.live.clone().unwrap().stack;
    world.release(2);
    let recorded = records(&world, |seen| {
        let previous = seen.status.previous.as_mut().unwrap();
        previous.state = PreviousState::Retained;
        let live = seen.live.get_mut(&Service::Trade).unwrap();
        live.target = Target::Stack(before.clone());
        let stack = seen.stacks.get_mut(&other).unwrap();
        stack.services.get_mut(&Service::Trade).unwrap().ready = 0;
        seen.status.phase = Pending;
        seen.status.attempt = 9;
        seen.status.candidate = Some(Candidate {
            stack: Stack {
                revision: "r2".to_owned(),
                ..before.clone()
            },
            version: "r2".to_owned(),
            attempt: 9,
            gates: seen.declared.clone().unwrap().gates,
            scale: None,
            tested: None,
            approved_by: None,
            unneeded_since: None,
            forced: false,
        });
    });
    assert_eq!(recorded.previous.clone().unwrap().state, PreviousState::Retained);
    let told = told(&recorded, "Reconciling");
    let why =
        "r2 waits until r0 has left its colour: a live Service leads to it and not to r1, which is live";
    assert!(told.starts_with(why), "{told}");
}

#[test]
fn a_first_version_that_fails_in_mid_swap_is_drained_whatever_is_declared_then() {
    let mut world = World::new(true);
    world.until(0, Promoting);
    while world.targets().iter().flatten().count() == 0 {
        world.step(0, View::Fresh).unwrap();
    }
    // Clients come, and then one of the services that are to follow dies.
    world.kubelet();
    world.lose("r0", Service::Notification);
    world.finish(0);
    world.until(0, Failed);
    world.release(1);
    let mut drained = 0;
    loop {
        let previous = world.status.previous.clone().unwrap();
        assert!(!previous.way_back, "{previous:?}");
        if previous.state != PreviousState::Draining {
            break;
        }
        assert!(world.has("r0"), "{:#?}", world.trace);
        drained += 1;
        world.step(0, View::Fresh).unwrap();
        world.round();
    }
    assert!(drained > 5, "{:#?}", world.trace);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
}

#[test]
fn what_does_not_serve_is_not_verified() {
    let mut world = at(Verifying);
    world.finish(0);
    for _ in 0..100 {
        world.kubelet();
        world.run_jobs();
        world.wait(1);
        // Nobody reaches it, whatever the smoke test has found before.
        world.lose("r1", Service::User);
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
        let live = world.status.live.as_ref().unwrap();
        assert!(live.stack.revision == "r0" || !live.verified);
        if world.status.phase == RollingBack {
            break;
        }
    }
    assert_eq!(world.journey, [Verifying, RollingBack], "{:#?}", world.trace);
    let rejected = world.status.rejected.clone().unwrap();
    assert_eq!(rejected.message, "the user service has no ready endpoints");
    let took = world
        .status
        .phase_since
        .unwrap()
        .duration_since(world.status.history[0].at);
    assert!(took.as_secs() < 60, "{took}");
}

#[test]
fn what_no_client_reaches_is_not_verified() {
    let mut world = at(Verifying);
    for _ in 0..5 {
        world.finish(0);
        world.round();
        world.step(0, View::Fresh).unwrap();
    }
    world.finish(0);
    world.wait(100);
    let live = world.status.live.clone().unwrap().stack;
    let other = world.status.previous.clone().unwrap().stack;
    let trade = |seen: &mut Observed, stacks: &[&Stack]| {
        let endpoints = &mut seen.live.get_mut(&Service::Trade).unwrap().endpoints;
        *endpoints = stacks.iter().copied().cloned().collect();
    };
    let die = |seen: &mut Observed| {
        let stack = seen.stacks.get_mut(&live).unwrap();
        stack.services.get_mut(&Service::Trade).unwrap().ready = 0;
    };
    // 60 s for the verification, and ten minutes for what is due at its end.
    let before = |elapsed| world.now - seconds(elapsed);
    let almost_late = |seen: &mut Observed| seen.status.phase_since = Some(before(659));
    let late = |seen: &mut Observed| seen.status.phase_since = Some(before(660));
    let unserved = |seen: &mut Observed| {
        die(seen);
        seen.status.live.as_mut().unwrap().unserved_since = Some(world.now - seconds(10));
    };
    let rows: Vec<(&str, Change<'_>, Phase, &str)> = vec![
        ("all reach it", Box::new(|_| {}), Live, ""),
        (
            "a live Service lists nothing",
            Box::new(|seen| trade(seen, &[])),
            Verifying,
            "",
        ),
        (
            "a live Service lists the stack before",
            Box::new(|seen| trade(seen, &[&other])),
            Verifying,
            "",
        ),
        (
            "and its time is nearly over",
            Box::new(|seen| {
                almost_late(seen);
                trade(seen, &[&other]);
            }),
            Verifying,
            "",
        ),
        (
            "and its time is over",
            Box::new(|seen| {
                late(seen);
                trade(seen, &[&other]);
            }),
            RollingBack,
            "its traffic had not reached it in time",
        ),
        ("a service has no endpoints", Box::new(die), Verifying, ""),
        (
            "for ten seconds",
            Box::new(unserved),
            RollingBack,
            "the trade service has no ready endpoints",
        ),
        (
            "in which nobody has looked",
            Box::new(|seen| {
                unserved(seen);
                seen.seen_before = false;
            }),
            Verifying,
            "",
        ),
        (
            "and neither has the stack before",
            Box::new(|seen| {
                unserved(seen);
                trade_of(seen, &other).ready = 0;
            }),
            Verifying,
            "",
        ),
    ];
    for (name, change, phase, why) in rows {
        let recorded = records(&world, change);
        assert_eq!(recorded.phase, phase, "{name}");
        let message = recorded.rejected.map(|it| it.message).unwrap_or_default();
        assert_eq!(message, why, "{name}");
    }
    // What is reached for most of a long verification may be out of reach for a moment.
    world.spec.rollout.verification.duration = "1h".parse().unwrap();
    let recorded = records(
        &world,
        Box::new(|seen: &mut Observed| {
            seen.status.phase_since = Some(world.now - seconds(660));
            let endpoints = &mut seen.live.get_mut(&Service::Trade).unwrap().endpoints;
            endpoints.clear();
        }),
    );
    assert_eq!(recorded.phase, Verifying);
}

#[test]
fn a_smoke_test_that_has_passed_stands_although_its_job_is_gone() {
    let mut world = at(Verifying);
    for _ in 0..10 {
        world.finish(0);
        world.round();
        world.step(0, View::Fresh).unwrap();
    }
    world.finish(0);
    assert!(world.status.live.clone().unwrap().smoke_passed);
    let plan = |after: i64, passed: bool| {
        let mut seen = world.observe();
        seen.seen_before = true;
        seen.jobs.retain(|job, _| job.kind != JobKind::Verify);
        seen.status.phase_since = Some(world.now - seconds(after));
        seen.status.live.as_mut().unwrap().smoke_passed = passed;
        let plan = decide(&world.spec, &seen, world.now);
        let made = |action: &Action| matches!(action, Action::Run(job) if job.kind == JobKind::Verify);
        let phase = plan.status.unwrap_or(seen.status).phase;
        (phase, plan.actions.iter().any(made))
    };
    assert_eq!(plan(30, true), (Verifying, false));
    assert_eq!(plan(601, true), (Live, false));
    // Its pods are asked whether they know that they are live when that is recorded, and not before.
    let recorded = records(&world, |seen| {
        seen.status.phase_since = Some(world.now - seconds(590));
        seen.status.live.as_mut().unwrap().smoke_passed = false;
    });
    assert_eq!(
        (recorded.phase, recorded.live.unwrap().smoke_passed),
        (Verifying, true)
    );
    // Without a result it is made again, as long as there is time.
    assert_eq!(plan(30, false), (Verifying, true));
    assert_eq!(plan(601, false), (RollingBack, false));
}

#[test]
fn a_way_back_that_there_is_not_is_refused_and_told_once() {
    let settled = || {
        let mut world = World::new(true);
        world.settle(Wakes::Clock).unwrap();
        world
    };
    let not_contracted = |seen: &mut Observed| {
        let contract = seen
            .jobs
            .iter_mut()
            .find(|(job, _)| job.kind == JobKind::Contract);
        contract.unwrap().1.state = JobState::Failed("no".to_owned());
    };
    let rows: Vec<(World, Change<'_>, &str)> = vec![
        (
            settled(),
            Box::new(not_contracted),
            "alice asked for the way back, but there is no stack to go back to, and the contract migration of r0 has failed, \
             perhaps halfway: an older version comes back by a release of its own, if it bears that",
        ),
        (
            settled(),
            Box::new(|_| {}),
            "alice asked for the way back, but there is no stack to go back to, and the schema is contracted for r0: an \
             older version comes back by a release of its own, if it bears that",
        ),
        (
            after_a_release(),
            Box::new(|seen| seen.status.previous.as_mut().unwrap().state = PreviousState::Retiring),
            "alice asked for the way back, but r0 is being removed",
        ),
        (
            releasing(6, Held),
            Box::new(|_| {}),
            "alice asked for the way back, but r6 is kept for its logs, and is no way back",
        ),
    ];
    for (world, change, note) in rows {
        let mut seen = world.observe();
        change(&mut seen);
        let phase = seen.status.phase;
        let asks = |seen: &mut Observed, asked: Option<String>| {
            seen.requests.rollback = asked;
            seen.requests.by = Some("alice".to_owned());
            let plan = decide(&world.spec, seen, world.now);
            seen.status = plan.status.unwrap_or_else(|| seen.status.clone());
            assert_eq!(seen.status.phase, phase, "{note}");
            let refusals = plan
                .events
                .into_iter()
                .filter(|event| event.reason == "RollbackRefused");
            refusals
                .map(|event| (event.warning, event.note))
                .collect::<Vec<_>>()
        };
        // It is about something else.
        assert_eq!(asks(&mut seen, Some("r9.9".to_owned())), [], "{note}");
        let live = seen.status.live.clone().unwrap();
        let asked = Some(token(&live.stack, live.attempt));
        assert_eq!(asks(&mut seen, asked.clone()), [(true, note.to_owned())]);
        assert_eq!(asks(&mut seen, asked), [], "{note}");
    }
}

/// A condition.
fn condition(status: &Status, kind: &str) -> Condition {
    let found = status.conditions.iter().find(|it| it.type_ == kind);
    found.unwrap().clone()
}

/// The message of a condition.
fn told(status: &Status, kind: &str) -> String {
    condition(status, kind).message
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn a_live_service_that_points_elsewhere_and_is_not_put_right_is_told() {
    let world = after_a_release();
    let live = world.status.live.clone().unwrap();
    let before = world.status.previous.clone().unwrap().stack;
    let elsewhere = |seen: &mut Observed, target: Target, endpoints: &[&Stack]| {
        let trade = seen.live.get_mut(&Service::Trade).unwrap();
        trade.target = target;
        trade.endpoints = endpoints.iter().copied().cloned().collect();
    };
    let dead = |seen: &mut Observed| {
        let stack = seen.stacks.get_mut(&live.stack).unwrap();
        let trade = stack.services.get_mut(&Service::Trade).unwrap();
        trade.ready = 0;
        trade.trouble = Some("no node for it".to_owned());
    };
    let refuses = |seen: &mut Observed| seen.refused = Some(refused("update Service exchange-trade", true));
    let not_here = format!("and not at {}, which is live", live.stack);
    let put_right = ": it is put right as soon as a trade pod of that is ready: waiting for 2 of 2 trade pods: no node for \
                     it; mend these";
    let way_back = format!(
        ", or to have r0 again, go back with exchange.dev/rollback={}",
        token(&live.stack, live.attempt)
    );
    let to_before = format!("the trade service points at {before} {not_here}");
    let again = format!(
        "every service has ready endpoints, but trade is to point at {} again",
        live.stack
    );
    let rows: Vec<(&str, Change<'_>, &str, String)> = vec![
        (
            "what it points at serves",
            Box::new(|seen| {
                elsewhere(seen, Target::Stack(before.clone()), &[&before]);
                dead(seen);
            }),
            "PointsElsewhere",
            format!("{to_before}{put_right}{way_back}"),
        ),
        (
            "at no stack of ours, and the one before is gone",
            Box::new(|seen| {
                elsewhere(seen, Target::Foreign, &[&before]);
                dead(seen);
                seen.status.previous = None;
            }),
            "PointsElsewhere",
            format!("the trade service points at no stack {not_here}{put_right}"),
        ),
        (
            "at nothing that serves",
            Box::new(|seen| {
                elsewhere(seen, Target::Nothing, &[]);
                dead(seen);
            }),
            "NoEndpoints",
            format!(
                "the trade service has no ready endpoints; the trade service points at nothing {not_here}{put_right}{way_back}"
            ),
        ),
        (
            "the API server does not let it be put right",
            Box::new(|seen| {
                elsewhere(seen, Target::Stack(before.clone()), &[&before]);
                refuses(seen);
            }),
            "PointsElsewhere",
            format!("{to_before}; the API server refuses to update Service exchange-trade"),
        ),
        (
            "it is put right at once",
            Box::new(|seen| elsewhere(seen, Target::Stack(before.clone()), &[&before])),
            "EndpointsReady",
            again.clone(),
        ),
        (
            "what is refused is something else",
            Box::new(|seen| {
                elsewhere(seen, Target::Stack(before.clone()), &[&before]);
                seen.refused = Some(refused("patch HorizontalPodAutoscaler exchange-trade", false));
            }),
            "EndpointsReady",
            again.clone(),
        ),
        (
            "it points where it should",
            Box::new(|_| {}),
            "EndpointsReady",
            "every service of r1 has ready endpoints".to_owned(),
        ),
    ];
    for (name, change, reason, message) in rows {
        let available = condition(&records(&world, change), "Available");
        assert_eq!(available.reason, reason, "{name}");
        assert_eq!(available.message, message, "{name}");
        let status = if reason == "EndpointsReady" {
            "True"
        } else {
            "False"
        };
        assert_eq!(available.status, status, "{name}");
    }
    // While the traffic moves the Services differ on purpose.
    let mut world = at(Promoting);
    world.finish(0);
    let moving = records(&world, |seen| {
        seen.answers = None;
        let stack = seen.status.live.clone().unwrap().stack;
        let before = seen.stacks.get_mut(&stack).unwrap();
        before.services.get_mut(&Service::Trade).unwrap().ready = 0;
    });
    assert_eq!(moving.phase, Promoting);
    assert_eq!(condition(&moving, "Available").reason, "EndpointsReady");
}

#[test]
fn a_kept_stack_that_is_not_whole_and_cannot_be_made_so_is_told() {
    let gone = |stack: &Stack| {
        format!(
            "a ConfigMap, a Secret, a ServiceAccount or the ControllerRevision of {stack} is gone: what runs goes on"
        )
    };
    let lost: [fn(&mut StackSeen); 2] = [|stack| stack.whole = false, |stack| stack.rendered = None];
    for lose in lost {
        let world = after_a_release();
        let before = world.status.previous.clone().unwrap().stack;
        let recorded = records(&world, |seen| lose(seen.stacks.get_mut(&before).unwrap()));
        let way_back = condition(&recorded, "RollbackAvailable");
        assert_eq!(
            (way_back.status.as_str(), way_back.reason.as_str()),
            ("True", "PreviousRetained")
        );
        assert!(
            way_back.message.contains(&format!("; {}", gone(&before))),
            "{}",
            way_back.message
        );
        let recorded = records(&world, |seen| {
            let stack = seen.stacks.get_mut(&before).unwrap();
            lose(stack);
            stack.services.get_mut(&Service::Trade).unwrap().ready = 0;
        });
        let way_back = condition(&recorded, "RollbackAvailable");
        assert_eq!(
            (way_back.status.as_str(), way_back.reason.as_str()),
            ("False", "PreviousNotWhole")
        );
        let wanted = format!("waiting for 2 of 2 trade pods; {}", gone(&before));
        assert!(way_back.message.starts_with(&wanted), "{}", way_back.message);

        // What is declared is made again.
        let live = world.status.live.clone().unwrap().stack;
        let recorded = records(&world, |seen| lose(seen.stacks.get_mut(&live).unwrap()));
        assert_eq!(told(&recorded, "Reconciling"), "r1 is live and verified");

        let world = releasing(5, Failed);
        let live = world.status.live.clone().unwrap().stack;
        let recorded = records(&world, |seen| lose(seen.stacks.get_mut(&live).unwrap()));
        let message = told(&recorded, "Reconciling");
        let wanted = format!("r0 is live; {}", gone(&live));
        assert!(message.starts_with(&wanted), "{message}");
    }
}

#[test]
fn what_cannot_be_read_is_not_verified() {
    for readable_again in [true, false] {
        let mut world = at(Verifying);
        world.unreadable = true;
        for _ in 0..100 {
            world.step(0, View::Fresh).unwrap();
            world.finish(0);
            world.round();
        }
        assert_eq!(world.status.phase, Verifying);
        let message = told(&world.status, "Reconciling");
        assert!(message.contains(UNREADABLE), "{message}");
        if readable_again {
            world.unreadable = false;
            world.until(0, Live);
            assert!(world.status.live.unwrap().verified);
        } else {
            world.until(0, RollingBack);
            assert_eq!(world.status.rejected.clone().unwrap().message, UNREADABLE);
            let since = world.journey.len();
            assert_eq!(world.journey[since - 2..], [Verifying, RollingBack]);
        }
    }
}

#[test]
fn figures_of_few_requests_say_nothing() {
    let mut world = at(Verifying);
    for _ in 0..5 {
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
        world.round();
    }
    world.wait(100);
    let few = Figures {
        requests: 99,
        errors: 99,
        timed: 99,
        p99_over: Duration::from_secs(10),
    };
    let rows = [
        ("few of both", few, Live, ""),
        (
            "errors",
            Figures { requests: 100, ..few },
            RollingBack,
            "99 of 100 requests to the trade service failed",
        ),
        (
            "log-ins are no timed requests",
            Figures {
                requests: 10_000,
                ..few
            },
            Live,
            "",
        ),
        (
            "slow",
            Figures {
                requests: 10_000,
                timed: 100,
                ..few
            },
            RollingBack,
            "the trade service answers too slowly: p99 is over 10s, the limit is 500ms",
        ),
        (
            "as slow as may be",
            Figures {
                requests: 10_000,
                timed: 100,
                p99_over: Duration::from_millis(400),
                ..few
            },
            Live,
            "",
        ),
        (
            "slower than may be",
            Figures {
                requests: 10_000,
                timed: 100,
                p99_over: Duration::from_millis(500),
                ..few
            },
            RollingBack,
            "the trade service answers too slowly: p99 is over 500ms, the limit is 500ms",
        ),
    ];
    for (name, figures, phase, why) in rows {
        let recorded = records(&world, |seen| seen.figures = [(Service::Trade, figures)].into());
        assert_eq!(recorded.phase, phase, "{name}");
        let message = recorded.rejected.map(|it| it.message).unwrap_or_default();
        assert_eq!(message, why, "{name}");
    }
}

#[test]
fn what_is_awaited_is_told_with_what_keeps_it_and_until_when() {
    let silent = "no answer of green-r1 from 10.96.0.7:80 (trade): no connection";
    let unheard = |seen: &mut Observed| {
        seen.answers = None;
        seen.unheard = Some(silent.to_owned());
    };
    let pods = ": waiting for 1 of 2 trade pods: no node for it; since 2026-";
    let late = |world: &World, seen: &mut Observed| seen.status.phase_since = Some(world.now - seconds(600));

    let mut world = at(Promoting);
    let message =
        |world: &World, change: &dyn Fn(&mut Observed)| told(&records(world, change), "Reconciling");
    let told_of = message(&world, &lacks_pods);
    assert!(
        told_of.contains(pods) && told_of.contains(", until 2026-"),
        "{told_of}"
    );
    world.finish(0);
    let told_of = message(&world, &unheard);
    assert!(told_of.contains(silent), "{told_of}");
    let given_up = records(&world, |seen| {
        unheard(seen);
        late(&world, seen);
    });
    let why = given_up.rejected.unwrap().message;
    assert_eq!(why, format!("the swap was not finished in time: {silent}"));

    let lacking = "is live and verified: waiting for 1 of 2 trade pods: no node for it; to have r0 again, go back with \
                   exchange.dev/rollback=r1.";
    let told_of = message(&after_a_release(), &lacks_pods);
    assert!(told_of.contains(lacking), "{told_of}");
    // What was left is no way back.
    let told_of = message(&releasing(6, Held), &lacks_pods);
    assert_eq!(
        told_of,
        "r0 is live: waiting for 1 of 2 trade pods: no node for it"
    );
    let unserved = records(&after_a_release(), |seen| {
        lacks_pods(seen);
        seen.live.values_mut().for_each(|live| live.endpoints.clear());
    });
    let told_of = told(&unserved, "Available");
    let wanted = "the user service has no ready endpoints: waiting for 1 of 2 trade pods: no node for it; to have r0 again, ";
    assert!(told_of.starts_with(wanted), "{told_of}");

    let told_of = message(&releasing(6, RollingBack), &lacks_pods);
    assert!(
        told_of.contains(pods) && told_of.contains(", until 2026-"),
        "{told_of}"
    );

    let mut world = at(Verifying);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    let since = world.status.phase_since.unwrap();
    let stuck = |seen: &mut Observed| {
        for (job, seen) in &mut seen.jobs {
            let verify = job.kind == JobKind::Verify;
            seen.trouble = verify.then(|| "no node for it".to_owned());
        }
    };
    let told_of = message(&world, &stuck);
    let until = format!(
        "being watched: no node for it; since {since}, until {}",
        since + seconds(600)
    );
    assert!(told_of.contains(&until), "{told_of}");
    let given_up = records(&world, |seen| {
        stuck(seen);
        late(&world, seen);
    });
    assert_eq!(
        given_up.rejected.unwrap().message,
        "the smoke test through the live address was not done in time: no node for it"
    );

    let mut world = after_a_release();
    world.release(2);
    world.until(0, Pending);
    let told_of = message(&world, &|seen| {
        for stack in seen.stacks.values_mut() {
            stack.unheard = Some("the connections cannot be counted".to_owned());
        }
    });
    assert!(
        told_of.contains("its colour: the connections cannot be counted"),
        "{told_of}"
    );
}

#[test]
fn of_a_migration_that_runs_is_told_how_far_it_is() {
    let mut world = at(Migrating);
    world.finish(0);
    let recorded = records(&world, |_| {});
    let message = told(&recorded, "Reconciling");
    assert!(message.contains("runs: batch 1 of 2; since 2026-"), "{message}");
    let given_up = records(&world, |seen| {
        seen.status.phase_since = Some(world.now - seconds(600));
    });
    assert_eq!(
        given_up.rejected.unwrap().message,
        "the expand migration was not done in time: batch 1 of 2"
    );
    let told_of = records(&world, |seen| {
        for seen in seen.jobs.values_mut() {
            seen.trouble = Some("try 2 of 4".to_owned());
        }
    });
    let message = told(&told_of, "Reconciling");
    assert!(
        message.contains("runs: try 2 of 4; batch 1 of 2; since"),
        "{message}"
    );

    let mut world = after_a_release();
    while world.status.contract.is_none() {
        world.step(0, View::Fresh).unwrap();
        world.kubelet();
        world.slices();
        world.wait(1);
    }
    world.finish(0);
    world.release(2);
    let recorded = records(&world, |_| {});
    assert_eq!(recorded.phase, Pending);
    let message = told(&recorded, "Reconciling");
    let wanted = "r2 waits for the contract migration of r1: batch 1 of 2; since";
    assert!(message.contains(wanted), "{message}");
    world.release(1);
    let message = told(&records(&world, |_| {}), "SchemaReady");
    assert_eq!(message, "the contract migration runs: batch 1 of 2");
}

#[test]
fn what_is_approved_and_lacks_pods_does_not_ask_for_an_approval() {
    let mut world = at(AwaitingPromotion);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    world.ask(|requests, names| {
        requests.promote = names.candidate;
        requests.by = Some("alice".to_owned());
    });
    let recorded = records(&world, lacks_pods);
    assert_eq!(recorded.phase, AwaitingPromotion);
    let message = told(&recorded, "Reconciling");
    let wanted = "is approved by alice: waiting for 1 of 2 trade pods: no node for it; since ";
    assert!(message.contains(wanted), "{message}");
    assert!(!message.contains("exchange.dev/promote"), "{message}");

    // A live Service that is away is waited for, and only for so long; then again for the pods, without a deadline.
    let away = |seen: &mut Observed| {
        lacks_pods(seen);
        seen.live.remove(&Service::Trade);
    };
    let message = told(&records(&world, away), "Reconciling");
    let wanted =
        "r1 has passed its tests: waiting for the live Service of trade: waiting for 1 of 2 trade pods";
    assert!(message.starts_with(wanted), "{message}");
    let late = |seen: &mut Observed| {
        seen.status.phase = Testing;
        seen.status.phase_since = Some(world.now - seconds(600));
    };
    let back = records(&world, |seen| {
        lacks_pods(seen);
        late(seen);
    });
    assert_eq!(back.phase, AwaitingPromotion);
    let given_up = records(&world, |seen| {
        away(seen);
        late(seen);
    });
    assert_eq!(given_up.phase, Failed);
    let why = given_up.rejected.unwrap().message;
    assert_eq!(why, "the live Service of trade was not there in time");
}

#[test]
fn a_candidate_that_loses_pods_while_it_is_tested_says_so() {
    let mut world = at(Testing);
    let lacking = ": waiting for 1 of 2 trade pods: no node for it; since ";
    let message = told(&records(&world, lacks_pods), "Reconciling");
    assert!(
        message.starts_with(&format!("the tests of r1 run{lacking}")),
        "{message}"
    );
    world.finish(0);
    world.round();
    let tested = records(&world, lacks_pods);
    assert_eq!(tested.phase, Testing);
    let message = told(&tested, "Reconciling");
    assert!(
        message.starts_with(&format!("r1 has passed its tests{lacking}")),
        "{message}"
    );
}

#[test]
fn a_test_may_take_the_time_that_is_declared_for_it() {
    let mut world = at(Testing);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    world.declare(|spec| spec.rollout.smoke_tests[0].timeout = Duration::from_mins(20).into());
    let after = |time: i64| {
        records(&world, |seen| {
            seen.status.phase_since = Some(world.now - seconds(time));
        })
    };
    let runs = after(1199);
    assert_eq!(runs.phase, Testing);
    let until = format!("until {}", world.now + seconds(1));
    let message = told(&runs, "Reconciling");
    assert!(message.contains(&until), "{message}");
    assert_eq!(after(1200).phase, Failed);
}

#[test]
fn pods_that_are_replaced_do_not_fail_the_verification() {
    let mut world = at(Verifying);
    world.finish(0);
    for _ in 0..6 {
        world.lose("r1", Service::User);
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
        world.wait(1);
    }
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.journey, [Verifying, Live], "{:#?}", world.trace);
}

#[test]
fn history_names_who_approved_and_who_tried_again() {
    let mut world = at(AwaitingPromotion);
    world.ask(|requests, names| {
        requests.by = Some("alice".to_owned());
        requests.promote = names.candidate;
    });
    // Before the swap somebody else signs something.
    world.lose("r1", Service::User);
    world.step(0, View::Fresh).unwrap();
    world.finish(0);
    world.ask(|requests, _| requests.by = Some("mallory".to_owned()));
    world.settle(Wakes::Clock).unwrap();
    let by = |world: &World, outcome| {
        let mut history = world.status.history.iter();
        history.find(|it| it.outcome == outcome).unwrap().by.clone()
    };
    assert_eq!(by(&world, Outcome::Promoted), "alice", "{:#?}", world.trace);
    assert_eq!(by(&world, Outcome::Verified), "operator");

    // Somebody asks for something that is not due yet, and nobody has signed it; somebody else signs another request.
    let mut world = at(AwaitingPromotion);
    world.ask(|requests, names| requests.rollback = names.candidate);
    world.settle(Wakes::Clock).unwrap();
    world.ask(|requests, names| {
        requests.by = Some("alice".to_owned());
        requests.promote = names.candidate;
    });
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Held, "{:#?}", world.trace);
    assert_eq!(by(&world, Outcome::Failed), "unverified");
    let why = world.status.rejected.clone().unwrap().message;
    assert_eq!(why, "somebody asked for the way back");

    // The same without a look of the operator between the two: nobody knows what alice has signed.
    let mut world = at(AwaitingPromotion);
    world.ask(|requests, names| {
        requests.rollback.clone_from(&names.candidate);
        requests.by = Some("alice".to_owned());
        requests.promote = names.candidate;
    });
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(by(&world, Outcome::Failed), "unverified");
    // To pause is something to sign, too, and to go on again.
    for paused in [true, false] {
        let mut world = at(AwaitingPromotion);
        if !paused {
            world.ask(|requests, names| requests.pause = names.candidate);
            world.settle(Wakes::Clock).unwrap();
        }
        world.ask(|requests, names| {
            requests.abort.clone_from(&names.candidate);
            requests.by = Some("alice".to_owned());
            requests.pause = names.candidate.filter(|_| paused);
        });
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(by(&world, Outcome::Failed), "unverified");
    }

    // An object that is restored has come with its annotations: what alice has approved then was another stack.
    for value in ["r0.1", "r0.7", "r0.4294967295"] {
        let mut world = World::new(true);
        world.declare(|spec| spec.rollout.promotion = Promotion::Manual);
        world.ask(|requests, _| {
            requests.by = Some("alice".to_owned());
            requests.promote = Some(value.to_owned());
        });
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(
            world.status.phase, AwaitingPromotion,
            "{value}: {:#?}",
            world.trace
        );
        let attempt = world.status.attempt;
        assert!(
            !value.ends_with(&format!(".{attempt}")) && attempt < 100,
            "{attempt}"
        );
        world.ask(|requests, names| {
            requests.by = Some("bob".to_owned());
            requests.promote = names.candidate;
        });
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.phase, Live, "{value}: {:#?}", world.trace);
        assert_eq!(by(&world, Outcome::Promoted), "bob");
    }
    // Nor does anything else that it has come with, and nobody knows whether alice has signed that.
    let mut world = World::new(true);
    world.ask(|requests, _| {
        requests.by = Some("alice".to_owned());
        requests.pause = Some("r0.1".to_owned());
    });
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
    assert_eq!(world.status.asked.pause.clone().unwrap().by, None);
    // What she asks for once it has been seen she has signed.
    world.ask(|requests, names| requests.pause = names.live);
    let asked = records(&world, |_| {}).asked;
    assert_eq!(asked.pause.unwrap().by.as_deref(), Some("alice"));

    let mut world = releasing(5, Failed);
    assert_eq!(by(&world, Outcome::Promoted), "operator");
    world.ask(|requests, names| {
        requests.by = Some("bob".to_owned());
        requests.retry = names.rejected;
    });
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(by(&world, Outcome::Retried), "bob");
    assert_eq!(world.status.history[1].outcome, Outcome::Retried);
}

/// What people find when they create the object again, at whatever time it was deleted without its children.
#[test]
fn an_object_created_again_adopts_what_its_predecessor_left_running() {
    for phase in [
        Pending,
        Migrating,
        Provisioning,
        Testing,
        AwaitingPromotion,
        Verifying,
        Live,
    ] {
        let mut world = if phase == Live {
            after_a_release()
        } else {
            at(phase)
        };
        world.finish(0);
        let live = world.status.live.clone().unwrap().stack;
        let targets = world.targets();
        world.release(usize::from(live.revision == "r1"));
        world.lose_status();
        world.journey.clear();
        let seen = world.observe();
        let runs = |(stack, there): (&Stack, &StackSeen)| *stack != live && there.pods() > 0;
        let others = seen.stacks.iter().any(runs);
        world.step(0, View::Fresh).unwrap();
        world.step(0, View::Fresh).unwrap();
        // What else runs may have connections; and what is moved next is no move that has been.
        let drains = world.status.previous.as_ref();
        let drains = drains.map(|it| (it.state, it.way_back));
        assert_eq!(
            drains,
            others.then_some((PreviousState::Draining, false)),
            "{phase}"
        );
        assert_eq!(
            world.status.epoch,
            seen.live.values().map(|it| it.epoch).max().unwrap()
        );
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.journey, [Verifying, Live], "{phase}: {:#?}", world.trace);
        assert_eq!(world.status.live.clone().unwrap().stack, live, "{phase}");
        assert_eq!(world.targets(), targets, "{phase}");
        world.at_the_end().unwrap();
    }
}

/// Of a revision's trade service: its pods, and whether it has an autoscaler.
fn size(world: &World, revision: &str) -> (u32, bool) {
    let seen = world.observe();
    let mut stacks = seen.stacks.iter();
    let (_, there) = stacks.find(|(stack, _)| stack.revision == revision).unwrap();
    let trade = there.service(Service::Trade).unwrap();
    (trade.replicas, trade.parts.contains_key(&Part::Autoscaler))
}

#[test]
fn what_is_taken_over_stays_as_big_as_it_was_found_until_another_version_is_live() {
    for autoscaled in [false, true] {
        let mut world = World::new(true);
        world.declare(|spec| spec.services.trade.replicas = 4);
        world.autoscale(autoscaled);
        world.settle(Wakes::Clock).unwrap();
        world.scale_by_load(5);
        world.settle(Wakes::Clock).unwrap();
        let found = if autoscaled { (5, true) } else { (4, false) };
        assert_eq!(size(&world, "r0"), found);

        world.release(1);
        world.autoscale(!autoscaled);
        world.declare(|spec| spec.services.trade.replicas = 2);
        world.lose_status();
        world.until(0, Promoting);
        assert_eq!(size(&world, "r0"), found, "{:#?}", world.trace);
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.phase, Live);
        assert_eq!(size(&world, "r1").1, !autoscaled, "{:#?}", world.trace);
        world.at_the_end().unwrap();
    }
}

#[test]
fn what_waits_is_as_big_as_what_is_live_and_no_bigger() {
    let look = |world: &mut World| {
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
    };
    let mut world = World::new(true);
    world.autoscale(true);
    world.settle(Wakes::Clock).unwrap();
    world.declare(|spec| spec.rollout.promotion = Promotion::Manual);
    let (declared, _) = size(&world, "r0");
    world.release(1);
    world.until(0, AwaitingPromotion);
    for (live, waits) in [(5, 5), (declared + 1, declared + 1), (1, declared), (4, 4)] {
        world.scale_by_load(live);
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(size(&world, "r1").0, waits, "{:#?}", world.trace);
    }

    // The way back follows what is live.
    world.ask(|requests, names| requests.promote = names.candidate);
    world.until(0, Live);
    while world.status.previous.as_ref().unwrap().state == PreviousState::Draining {
        world.step(0, View::Fresh).unwrap();
        world.round();
    }
    for live in [4, 6, 3] {
        world.scale_by_load(live);
        look(&mut world);
        assert_eq!((size(&world, "r0").0, size(&world, "r1").0), (live, live));
    }
    // What was left is no way back, and does not.
    roll_back(&mut world);
    world.until(0, Held);
    look(&mut world);
    world.scale_by_load(6);
    look(&mut world);
    assert_eq!(
        (size(&world, "r0").0, size(&world, "r1").0),
        (6, 3),
        "{:#?}",
        world.trace
    );
    // Nor if it is to be tried again: it is removed before that, and its pods are others then.
    world.ask(|requests, names| requests.retry = names.rejected);
    world.until(0, Pending);
    look(&mut world);
    assert_eq!(size(&world, "r1").0, 3, "{:#?}", world.trace);
}

/// The Jobs of an attempt before may still be there, with results that are not about this one.
#[test]
fn a_result_of_another_attempt_does_not_count() {
    let mut world = at(Testing);
    world.finish(0);
    let mut seen = world.observe();
    let is_test = |job: &Job| matches!(job.kind, JobKind::Smoke | JobKind::Test(_));
    let tests = seen.jobs.iter_mut().filter(|(job, _)| is_test(job));
    tests.for_each(|(_, test)| test.state = JobState::Passed);
    let goes_on = |seen: &Observed| {
        let next = decide(&world.spec, seen, world.now).status;
        next.is_some_and(|next| next.phase == Promoting)
    };
    assert!(goes_on(&seen), "{:#?}", world.trace);
    let of_another = |(mut job, test): (Job, JobSeen)| {
        job.attempt -= u32::from(is_test(&job));
        (job, test)
    };
    seen.jobs = std::mem::take(&mut seen.jobs)
        .into_iter()
        .map(of_another)
        .collect();
    assert!(!goes_on(&seen), "{:#?}", world.trace);
}

/// A Job is made of what is declared by now. What that was made of another version would say is not about the recorded one.
#[test]
fn no_job_is_made_of_another_version_than_the_recorded_one() {
    for (phase, of) in [(Migrating, JobKind::Expand), (Testing, JobKind::Smoke)] {
        let mut world = at(phase);
        world.finish(0);
        world.delete_job_of_candidate(&of);
        let runs = |world: &World| {
            let plan = decide(&world.spec, &world.observe(), world.now);
            let of_kind = |action: &Action| matches!(action, Action::Run(job) if job.kind == of);
            plan.actions.iter().any(of_kind)
        };
        assert!(runs(&world), "{phase}: {:#?}", world.trace);
        world.release(2);
        world.miss(true);
        assert!(!runs(&world), "{phase}: {:#?}", world.trace);
        world.miss(false);
        world.release(1);
        assert!(runs(&world), "{phase}: {:#?}", world.trace);
    }
}

#[test]
fn a_move_that_nobody_remembers_is_brought_to_an_end() {
    // To where the last move sent the traffic; and back, if that does not serve.
    for (dies, arrives) in [(false, "r1"), (true, "r0")] {
        let mut world = at(Promoting);
        until_one_is_moved(&mut world);
        world.operators[0].crash();
        world.lose_status();
        if dies {
            world.lose("r1", Service::Trade);
        }
        world.journey.clear();
        world.step(0, View::Fresh).unwrap();
        world.step(0, View::Fresh).unwrap();
        assert_eq!(world.status.live.clone().unwrap().stack.revision, arrives);
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.journey[..2], [RollingBack, Verifying], "{:#?}", world.trace);
        world.release(usize::from(arrives == "r1"));
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.live.clone().unwrap().stack.revision, arrives);
        world.at_the_end().unwrap();
    }
}

#[test]
fn an_object_created_again_finds_services_that_do_not_agree() {
    type Spoil = fn(&mut World);
    let spoil: [(&str, Spoil); 3] = [
        ("missing", |world| world.delete_live(Service::Trade)),
        ("edited", |world| world.edit_live(Service::Trade, None)),
        ("all but one edited", |world| {
            world.edit_live(Service::Trade, None);
            world.edit_live(Service::User, None);
        }),
    ];
    for (name, spoil) in spoil {
        let mut world = at(Live);
        world.release(0);
        world.settle(Wakes::Clock).unwrap();
        spoil(&mut world);
        world.slices();
        world.lose_status();
        world.settle(Wakes::Clock).unwrap();
        assert_eq!(world.status.phase, Live, "{name}: {:#?}", world.trace);
        let targets = world.targets();
        assert!(targets.iter().flatten().all(|it| it.revision == "r0"), "{name}");
        world.at_the_end().unwrap();
    }
}

#[test]
fn what_cannot_be_decided_is_left_as_it_is_and_told() {
    let mut world = at(Verifying);
    world.settle(Wakes::Clock).unwrap();
    world.release(2);
    world.until(0, Testing);
    world.finish(0);
    let candidate = world.status.candidate.clone().unwrap().stack;
    let index = world
        .observe()
        .stacks
        .keys()
        .position(|stack| *stack == candidate);
    // Of the same move: one of them was edited, and nothing says which.
    world.edit_live(Service::Trade, index);
    world.slices();
    world.lose_status();
    let (targets, stacks) = (world.targets(), world.observe().stacks.len());
    world.settle(Wakes::Clock).unwrap();
    let (reason, message) = world.stalled().unwrap();
    assert_eq!(reason, "AdoptionUndecided");
    assert!(message.contains("blue-r2 and green-r1"), "{message}");
    assert_eq!(world.targets(), targets, "{:#?}", world.trace);
    assert_eq!(world.observe().stacks.len(), stacks);
    world.decide_for_one();
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
}

#[test]
fn what_is_live_and_not_known_is_taken_over_when_it_is_declared() {
    let mut world = after_a_release();
    world.settle(Wakes::Clock).unwrap();
    world.lose_rendered("r1");
    world.release(2);
    world.lose_status();
    let targets = world.targets();
    world.settle(Wakes::Clock).unwrap();
    let (reason, message) = world.stalled().unwrap();
    assert_eq!(reason, "AdoptionUndecided");
    assert!(message.contains("ControllerRevision is lost"), "{message}");
    assert_eq!(world.targets(), targets);
    world.release(1);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.phase, Live, "{:#?}", world.trace);
    assert_eq!(world.targets(), targets);
}

#[test]
fn an_old_leader_that_wakes_with_gates_passed_after_an_abort() {
    let mut world = at(Testing);
    world.finish(0);
    world.round();
    world.round();
    // The old leader has seen all gates passed, is about to record it, and falls asleep.
    world.operators[1].crash();
    world.step(1, View::Fresh).unwrap();
    assert_eq!(world.recording(1), Some(Promoting));
    abort(&mut world);
    world.until(0, Failed);
    world.finish(0);
    let before = (world.status.clone(), world.targets());
    world.finish(1);
    assert_eq!((world.status.clone(), world.targets()), before);
    assert_eq!(world.status.live.unwrap().stack.revision, "r0");
}

#[test]
fn an_old_leader_that_wakes_between_two_of_the_three_writes() {
    let mut world = at(Promoting);
    world.round();
    let moves = |world: &World| world.next_action(0).cloned();
    // The old leader has moved one Service, has checked the next one, and falls asleep.
    while !matches!(
        moves(&world),
        Some(Action::Point {
            service: Service::Trade,
            ..
        })
    ) {
        world.step(0, View::Fresh).unwrap();
    }
    world.step(0, View::Fresh).unwrap();
    let revisions = |world: &World| {
        world
            .targets()
            .into_iter()
            .map(|target| target.unwrap().revision)
            .collect::<Vec<_>>()
    };
    assert_eq!(revisions(&world), ["r1", "r0", "r0"]);
    world.lose("r1", Service::Notification);
    world.operators[1].crash();
    while world.status.phase != RollingBack {
        world.step(1, View::Fresh).unwrap();
    }
    // Before the new leader has written anything, the old one does; and after it.
    world.until(1, Held);
    world.finish(1);
    assert_eq!(revisions(&world), ["r0", "r0", "r0"]);
    world.finish(0);
    assert_eq!(revisions(&world), ["r0", "r0", "r0"], "{:#?}", world.trace);
}

#[test]
fn an_old_leader_that_wakes_to_retire_what_has_become_live_again() {
    let mut world = after_a_release();
    world.finish(0);
    for _ in 0..20 {
        world.step(0, View::Fresh).unwrap();
        world.round();
    }
    world.finish(0);
    assert_eq!(
        world.status.previous.as_ref().unwrap().state,
        PreviousState::Retained
    );
    world.wait(3601);
    world.operators[1].crash();
    world.step(1, View::Fresh).unwrap();
    assert_eq!(
        world.recording(1),
        Some(Live),
        "is about to record the retirement"
    );
    roll_back(&mut world);
    world.until(0, Held);
    world.finish(0);
    world.finish(1);
    assert_eq!(world.status.live.clone().unwrap().stack.revision, "r0");
    assert!(world.has("r0"), "{:#?}", world.trace);

    // And one that had recorded it: nobody can go back any more, and when the same revision is live again in the same
    // colour under the same names, it is not what the sleeper has seen.
    let mut world = after_a_release();
    world.wait(4000);
    world.operators[1].crash();
    while !matches!(
        world.next_action(1),
        Some(Action::Delete {
            part: Part::Workload,
            ..
        })
    ) {
        world.step(1, View::Fresh).unwrap();
        world.round();
    }
    world.step(1, View::Fresh).unwrap();
    roll_back(&mut world);
    world.settle(Wakes::Clock).unwrap();
    assert!(
        !world.has("r0") && world.status.phase == Live,
        "{:#?}",
        world.trace
    );
    world.release(0);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(world.status.live.clone().unwrap().stack.revision, "r0");
    world.finish(1);
    assert!(world.has("r0"));
    world.round();
    world.at_the_end().unwrap();
}

#[test]
fn a_forced_repair_that_races_a_swap() {
    let mut world = at(AwaitingPromotion);
    world.finish(0);
    world.round();
    world.edit_live(Service::Trade, None);
    world.operators[1].crash();
    world.step(1, View::Fresh).unwrap();
    world.step(1, View::Fresh).unwrap();
    let repair = world.next_action(1).cloned();
    assert!(
        matches!(
            repair,
            Some(Action::Point {
                intent: Intent::Repair,
                service: Service::Trade,
                ..
            })
        ),
        "{repair:?}"
    );
    world.ask(|requests, names| requests.promote = names.candidate);
    world.until(0, Verifying);
    world.finish(1);
    let revisions: Vec<_> = world
        .targets()
        .into_iter()
        .map(|target| target.unwrap().revision)
        .collect();
    assert_eq!(revisions, ["r1", "r1", "r1"], "{:#?}", world.trace);
}
