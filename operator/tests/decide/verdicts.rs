//! What tools conclude from `status` alone: the rules of kstatus, which Helm, Flux and others apply, per phase.

use exchange_operator::{
    api::Promotion,
    status::Phase::{
        self, AwaitingPromotion, Failed, Held, Live, Migrating, Pending, Promoting, Provisioning,
        RollingBack, Testing, Verifying,
    },
};

use crate::{
    transitions::{at, releasing},
    world::{View, Wakes, World},
};

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    InProgress,
    Failed,
    Current,
}

/// The generic rules of kstatus: generation first, then Reconciling, Stalled, Ready.
fn verdict(world: &World) -> Verdict {
    let status = &world.status;
    let is = |kind: &str| {
        status
            .conditions
            .iter()
            .find(|it| it.type_ == kind)
            .map(|it| it.status == "True")
    };
    if status.observed_generation != Some(world.observe().generation) || is("Reconciling") == Some(true) {
        Verdict::InProgress
    } else if is("Stalled") == Some(true) {
        Verdict::Failed
    } else if is("Ready") == Some(false) {
        Verdict::InProgress
    } else {
        Verdict::Current
    }
}

fn reached(phase: Phase) -> World {
    match phase {
        Failed => releasing(5, Failed),
        Held => releasing(6, Held),
        RollingBack => releasing(6, RollingBack),
        Live => {
            let mut world = releasing(1, Verifying);
            world.until(0, Live);
            world
        }
        phase => at(phase),
    }
}

#[test]
fn tools_reach_the_right_verdict_in_each_phase() {
    let rows = [
        (Pending, Verdict::InProgress, "True"),
        (Migrating, Verdict::InProgress, "True"),
        (Provisioning, Verdict::InProgress, "True"),
        (Testing, Verdict::InProgress, "True"),
        (AwaitingPromotion, Verdict::InProgress, "True"),
        (Promoting, Verdict::InProgress, "True"),
        (Verifying, Verdict::InProgress, "True"),
        (RollingBack, Verdict::InProgress, "True"),
        (Live, Verdict::Current, "True"),
        (Failed, Verdict::Failed, "True"),
        (Held, Verdict::Failed, "True"),
    ];
    for (phase, expected, available) in rows {
        let world = reached(phase);
        assert_eq!(world.status.phase, phase);
        assert_eq!(verdict(&world), expected, "{phase}");
        let find = |kind| {
            world
                .status
                .conditions
                .iter()
                .find(|it| it.type_ == kind)
                .unwrap()
        };
        assert_eq!(find("Available").status, available, "{phase}");
        assert_eq!(find("Ready").status == "True", phase == Live, "{phase}");
    }
}

#[test]
fn a_changed_spec_is_in_progress_before_anybody_has_looked() {
    let mut world = reached(Live);
    assert_eq!(verdict(&world), Verdict::Current);
    world.release(2);
    assert_eq!(verdict(&world), Verdict::InProgress);
}

/// What was declared while something else failed is begun right after that.
#[test]
fn what_waits_for_its_turn_is_in_progress_when_what_was_before_it_is_given_up() {
    let rows: [fn() -> World; 3] = [
        || releasing(6, Verifying),
        || releasing(7, Verifying),
        || {
            let mut first = World::new(true);
            first.release(6);
            first.until(0, Verifying);
            first
        },
    ];
    for begun in rows {
        let mut world = begun();
        world.release(2);
        let mut given_up = false;
        while world.status.phase != Live {
            let told = world.status.clone();
            world.step(0, View::Fresh).unwrap();
            if world.status == told {
                world.round();
            }
            given_up |= matches!(world.status.phase, Failed | Held);
            let expected = if world.status.phase == Live {
                Verdict::Current
            } else {
                Verdict::InProgress
            };
            assert_eq!(verdict(&world), expected, "{:?}", world.status.conditions);
        }
        assert!(given_up, "{:?}", world.journey);
    }
}

/// It is recorded as looked at before the Deployment is made bigger.
#[test]
fn a_changed_size_is_in_progress_until_the_pods_are_there() {
    let mut world = reached(Live);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(verdict(&world), Verdict::Current);
    world.declare(|spec| spec.services.trade.replicas += 3);
    let generation = world.observe().generation;
    while world.status.observed_generation != Some(generation) {
        world.step(0, View::Fresh).unwrap();
    }
    assert_eq!(verdict(&world), Verdict::InProgress);
    world.settle(Wakes::Clock).unwrap();
    assert_eq!(verdict(&world), Verdict::Current);
}

#[test]
fn conditions_are_well_formed_and_turn_only_when_they_turn() {
    for phase in [Pending, Testing, AwaitingPromotion, Verifying, Live, Failed, Held] {
        let mut world = reached(phase);
        let kinds: Vec<_> = world
            .status
            .conditions
            .iter()
            .map(|it| it.type_.clone())
            .collect();
        let expected = [
            "Ready",
            "Reconciling",
            "Stalled",
            "Available",
            "CandidateReady",
            "SchemaReady",
            "SmokeTestsPassed",
            "RollbackAvailable",
        ];
        assert_eq!(kinds, expected, "{phase}");
        for it in &world.status.conditions {
            let letters = it.reason.chars().all(|letter| letter.is_ascii_alphabetic());
            assert!(
                letters && !it.reason.is_empty(),
                "{phase} {}: reason {:?}",
                it.type_,
                it.reason
            );
            assert!(!it.message.is_empty(), "{phase} {}", it.type_);
            assert_eq!(it.observed_generation, world.status.observed_generation);
        }
        let before = world.status.conditions.clone();
        world.wait(1);
        world.step(0, View::Fresh).unwrap();
        world.finish(0);
        for (old, new) in before.iter().zip(&world.status.conditions) {
            let turned = old.status != new.status;
            assert_eq!(
                old.last_transition_time != new.last_transition_time,
                turned,
                "{phase} {}",
                old.type_
            );
        }
    }
}

#[test]
fn who_waits_for_a_person_says_what_to_write() {
    let world = at(AwaitingPromotion);
    assert_eq!(world.spec.rollout.promotion, Promotion::Manual);
    let candidate = world.status.candidate.clone().unwrap();
    let wanted = format!("exchange.dev/promote=r1.{}", candidate.attempt);
    let told = world
        .status
        .conditions
        .iter()
        .find(|it| it.type_ == "Reconciling")
        .unwrap();
    assert_eq!(
        (told.status.as_str(), told.reason.as_str()),
        ("True", "AwaitingPromotion")
    );
    assert!(told.message.contains(&wanted), "{}", told.message);
}

#[test]
fn what_was_given_up_has_not_passed() {
    let told = |world: &World, kind: &str| {
        let mut conditions = world.status.conditions.iter();
        let found = conditions.find(|it| it.type_ == kind).unwrap();
        (found.status.clone(), found.reason.clone())
    };
    let word = |truth: &str, reason: &str| (truth.to_owned(), reason.to_owned());
    let failed = releasing(3, Failed);
    assert_eq!(told(&failed, "SchemaReady"), word("False", "MigrationFailed"));
    assert_eq!(told(&failed, "SmokeTestsPassed"), word("False", "TestsNotPassed"));
    let failed = releasing(5, Failed);
    assert_eq!(told(&failed, "SchemaReady"), word("True", "Expanded"));
    assert_eq!(told(&failed, "SmokeTestsPassed"), word("False", "TestsNotPassed"));
    // It had passed them, before it failed its verification.
    let held = releasing(6, Held);
    assert_eq!(told(&held, "SmokeTestsPassed"), word("True", "TestsPassed"));
    let live = reached(Live);
    assert_eq!(told(&live, "SmokeTestsPassed"), word("True", "TestsPassed"));
}
