//! The simulated world: histories in which everything goes wrong at any time, and the promises that hold after every
//! write.
//!
//! Each history has a number, its seed. `make unit` lives through the first 10,000, `make simulate` through `HISTORIES` from
//! `FIRST` on; `make simulate SEED=…` replays one.

use std::{collections::BTreeSet, env, fs, sync::Mutex, thread};

use crate::world::{Ban, NATURES, Nature, View, Wakes, World, nature};
use exchange_operator::{
    api::{ColourChoice, Promotion, Service},
    observe::{JobKind, Part},
    status::Phase,
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use serde_json::json;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    Operator {
        who: usize,
        view: View,
    },
    /// An operator works and the world takes its course, for a number of rounds.
    Progress {
        who: usize,
        rounds: u8,
    },
    Crash {
        who: usize,
    },
    Kubelet,
    Slices,
    Jobs,
    Wait(i64),
    Release(usize),
    Gates(u32),
    Replicas(i32),
    Autoscale(bool),
    Load(u32),
    Manual(bool),
    Suspend(bool),
    Colour(ColourChoice),
    Promote,
    Abort,
    RollBack,
    Retry,
    Pause(bool),
    KillPods {
        stack: usize,
        service: Service,
    },
    EditLive {
        service: Service,
        stack: Option<usize>,
    },
    DeleteLive(Service),
    Spoil {
        stack: usize,
        service: Service,
        part: Part,
        delete: bool,
    },
    LoseCandidate,
    DeleteJob(usize),
    /// The Job of the expand is deleted, and when that was seen, what the candidate's pods are made of is changed or deleted.
    ClimbAgain {
        who: usize,
        service: Service,
        delete: bool,
    },
    /// What the candidate's pods are made of is changed or deleted while nothing can begin, because time stands still or a reference is
    /// missing.
    ChangeHindered {
        who: usize,
        service: Service,
        delete: bool,
        suspended: bool,
    },
    /// Another size is declared, recorded, and taken back before it comes to be.
    ResizeInVain {
        who: usize,
        replicas: i32,
    },
    /// The next version is declared and aborted, and then what is live is left.
    AbortAndRollBack {
        who: usize,
    },
    FailJobs,
    Scale(u32),
    Strip {
        stack: usize,
        service: Service,
        part: Part,
    },
    Ban(Option<Ban>),
    Miss(bool),
    Take(bool),
    LoseStatus,
    Unreadable(bool),
    Crowd {
        revision: usize,
        service: Service,
    },
    KillOnePod {
        stack: usize,
        service: Service,
    },
    Lag(bool),
    Collapse(usize),
}

/// What a history is about beside all else. Each is a kind of its own: so the others stay the histories that they were.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Pages cannot be read.
    Pages,
    /// What the API server does not accept fails as if it were only for a moment.
    Failing,
    /// Pods have nowhere to run, and somebody suspends and goes back.
    Suspended,
    /// Candidates have to climb their gates again, and are changed meanwhile.
    Climbing,
    /// Pods die one by one, and connections follow late.
    Fine,
    /// The same, and at last the object is deleted in the middle of everything.
    Deleted,
    /// Stacks die for good, also all that there are.
    Dying,
    /// The same, and clients keep their connections to what was live before, so that what is next waits; it is aborted or changed, and
    /// people change their minds.
    Waiting,
}

impl Kind {
    const fn of(seed: u64) -> Self {
        match seed % 16 {
            1 if seed % 32 == 1 => Self::Waiting,
            3 => Self::Pages,
            5 => Self::Failing,
            6 => Self::Climbing,
            7 => Self::Suspended,
            9 => Self::Dying,
            11 | 13 => Self::Fine,
            15 => Self::Deleted,
            _ => Self::Plain,
        }
    }

    /// Whether nothing that is there may be alive at the end.
    const fn dies(self) -> bool {
        matches!(self, Self::Dying | Self::Waiting)
    }
}

fn steps(kind: Kind) -> impl Strategy<Value = Vec<Step>> {
    let view = prop_oneof![6 => Just(View::Fresh), 2 => Just(View::Torn), 2 => Just(View::Old), 1 => Just(View::OldObject)];
    let service = proptest::sample::select(Service::ALL.to_vec());
    let part = proptest::sample::select(vec![
        Part::ColourService,
        Part::Budget,
        Part::Workload,
        Part::Autoscaler,
    ]);
    let colour = proptest::sample::select(vec![
        ColourChoice::Auto,
        ColourChoice::Auto,
        ColourChoice::Blue,
        ColourChoice::Green,
    ]);
    let ban = proptest::sample::select(vec![
        Ban::Live,
        Ban::Parts(Part::Budget),
        Ban::Parts(Part::Workload),
        Ban::Parts(Part::Autoscaler),
        Ban::Jobs,
        Ban::Deletions,
        Ban::Rendering,
    ]);
    let step = prop_oneof![
        40 => (0..2_usize, view).prop_map(|(who, view)| Step::Operator { who, view }),
        30 => (0..2_usize, 1..40_u8).prop_map(|(who, rounds)| Step::Progress { who, rounds }),
        5 => (0..2_usize).prop_map(|who| Step::Crash { who }),
        4 => Just(Step::Kubelet),
        4 => Just(Step::Slices),
        4 => Just(Step::Jobs),
        4 => proptest::sample::select(vec![1_i64, 6, 61, 301, 601, 3601]).prop_map(Step::Wait),
        6 => (0..NATURES.len()).prop_map(Step::Release),
        6 => (0..3_usize).prop_map(Step::Release),
        1 => (0..3_u32).prop_map(Step::Gates),
        2 => (1..5_i32).prop_map(Step::Replicas),
        1 => any::<bool>().prop_map(Step::Autoscale),
        2 => (1..6_u32).prop_map(Step::Load),
        2 => any::<bool>().prop_map(Step::Manual),
        1 => any::<bool>().prop_map(Step::Suspend),
        1 => colour.prop_map(Step::Colour),
        3 => Just(Step::Promote),
        2 => Just(Step::Abort),
        4 => Just(Step::RollBack),
        2 => Just(Step::Retry),
        1 => any::<bool>().prop_map(Step::Pause),
        5 => (0..2_usize, service.clone()).prop_map(|(stack, service)| Step::KillPods { stack, service }),
        2 => (service.clone(), proptest::option::of(0..2_usize)).prop_map(|(service, stack)| Step::EditLive { service, stack }),
        2 => service.clone().prop_map(Step::DeleteLive),
        3 => (0..2_usize, service.clone(), part.clone(), any::<bool>())
            .prop_map(|(stack, service, part, delete)| Step::Spoil { stack, service, part, delete }),
        1 => Just(Step::LoseCandidate),
        1 => (0..4_usize).prop_map(Step::DeleteJob),
        1 => Just(Step::FailJobs),
        1 => (1..6_u32).prop_map(Step::Scale),
        2 => (0..2_usize, service.clone(), part).prop_map(|(stack, service, part)| Step::Strip { stack, service, part }),
        2 => proptest::option::weighted(0.6, ban).prop_map(Step::Ban),
        2 => any::<bool>().prop_map(Step::Miss),
        1 => any::<bool>().prop_map(Step::Take),
        1 => Just(Step::LoseStatus),
    ];
    let step = match kind {
        Kind::Plain | Kind::Failing => step.boxed(),
        Kind::Pages => prop_oneof![20 => step, 1 => any::<bool>().prop_map(Step::Unreadable)].boxed(),
        Kind::Suspended => {
            let crowd =
                (0..3_usize, service).prop_map(|(revision, service)| Step::Crowd { revision, service });
            prop_oneof![20 => step, 1 => crowd].boxed()
        }
        Kind::Climbing => {
            let again = (0..2_usize, service, any::<bool>())
                .prop_map(|(who, service, delete)| Step::ClimbAgain { who, service, delete });
            prop_oneof![10 => step, 1 => again].boxed()
        }
        Kind::Dying => prop_oneof![20 => step, 1 => (0..2_usize).prop_map(Step::Collapse)].boxed(),
        Kind::Waiting => {
            let hindered = (0..2_usize, service, any::<bool>(), any::<bool>());
            prop_oneof![
                20 => step,
                1 => (0..2_usize).prop_map(Step::Collapse),
                2 => (0..2_usize).prop_map(|who| Step::AbortAndRollBack { who }),
                1 => (0..2_usize, 1..5_i32).prop_map(|(who, replicas)| Step::ResizeInVain { who, replicas }),
                1 => hindered.prop_map(|(who, service, delete, suspended)| {
                    Step::ChangeHindered { who, service, delete, suspended }
                }),
            ]
            .boxed()
        }
        Kind::Fine | Kind::Deleted => {
            let one = (0..2_usize, service).prop_map(|(stack, service)| Step::KillOnePod { stack, service });
            prop_oneof![20 => step, 3 => one, 1 => any::<bool>().prop_map(Step::Lag)].boxed()
        }
    };
    proptest::collection::vec(step, 10..70)
}

fn take(world: &mut World, step: &Step) -> Result<(), String> {
    match step.clone() {
        Step::Operator { who, view } => world.step(who, view)?,
        Step::Progress { who, rounds } => {
            for _ in 0..rounds {
                world.step(who, View::Fresh)?;
                world.step(who, View::Fresh)?;
                world.round();
            }
        }
        Step::Crash { who } => world.operators[who].crash(),
        Step::Kubelet => world.kubelet(),
        Step::Slices => world.slices(),
        Step::Jobs => world.run_jobs(),
        Step::Wait(seconds) => world.wait(seconds),
        Step::Release(index) => world.release(index),
        Step::Gates(gates) => world.change_gates(gates),
        Step::Replicas(replicas) => world.declare(|spec| spec.services.trade.replicas = replicas),
        Step::Autoscale(on) => world.autoscale(on),
        Step::Load(replicas) => world.scale_by_load(replicas),
        Step::Manual(on) => world.declare(|spec| {
            spec.rollout.promotion = if on {
                Promotion::Manual
            } else {
                Promotion::Automatic
            };
        }),
        Step::Suspend(on) => world.declare(|spec| spec.suspend = on),
        Step::Colour(colour) => world.colour(colour),
        Step::Promote => world.ask(|requests, names| requests.promote = names.candidate),
        Step::Abort => world.ask(|requests, names| requests.abort = names.candidate),
        Step::RollBack => world.ask(|requests, names| requests.rollback = names.candidate.or(names.live)),
        Step::Retry => world.ask(|requests, names| requests.retry = names.rejected),
        Step::Pause(on) => world.ask(|requests, names| {
            requests.pause = names.candidate.or(names.live).filter(|_| on);
        }),
        Step::KillPods { stack, service } => world.kill_pods(stack, service),
        Step::EditLive { service, stack } => world.edit_live(service, stack),
        Step::DeleteLive(service) => world.delete_live(service),
        Step::Spoil {
            stack,
            service,
            part,
            delete,
        } => world.spoil_part(stack, service, part, delete),
        Step::LoseCandidate => world.lose_candidate(),
        Step::DeleteJob(index) => world.delete_job(index),
        Step::ClimbAgain { who, service, delete } => {
            world.delete_job_of_candidate(&JobKind::Expand);
            few_looks(world, who)?;
            world.spoil_candidate(service, delete);
        }
        Step::ChangeHindered {
            who,
            service,
            delete,
            suspended,
        } => {
            if suspended {
                world.declare(|spec| spec.suspend = true);
            } else {
                world.miss(true);
            }
            few_looks(world, who)?;
            world.spoil_candidate(service, delete);
            few_looks(world, who)?;
            world.miss(false);
            world.declare(|spec| spec.suspend = false);
        }
        Step::ResizeInVain { who, replicas } => {
            let before = world.spec.services.trade.replicas;
            world.declare(|spec| spec.services.trade.replicas = replicas);
            world.step(who, View::Fresh)?;
            world.step(who, View::Fresh)?;
            world.declare(|spec| spec.services.trade.replicas = before);
        }
        Step::AbortAndRollBack { who } => {
            if let Some(next) = world.absent() {
                world.release(next);
            }
            few_looks(world, who)?;
            world.ask(|requests, names| requests.abort = names.candidate);
            few_looks(world, who)?;
            world.ask(|requests, names| requests.rollback = names.live);
            few_looks(world, who)?;
        }
        Step::FailJobs => world.fail_jobs(),
        Step::Scale(replicas) => world.scale_by_hand(replicas),
        Step::Strip { stack, service, part } => world.strip(stack, service, part),
        Step::Ban(ban) => world.ban = ban,
        Step::Miss(missing) => world.miss(missing),
        Step::Take(taken) => world.taken = taken,
        Step::LoseStatus => world.lose_status(),
        Step::Unreadable(unreadable) => world.unreadable = unreadable,
        Step::Crowd { revision, service } => world.crowd(&format!("r{revision}"), service),
        Step::KillOnePod { stack, service } => world.kill_one_pod(stack, service),
        Step::Lag(lagging) => world.lagging = lagging,
        Step::Collapse(stack) => world.collapse(stack),
    }
    Ok(())
}

/// An operator sees what has happened, and does a little.
fn few_looks(world: &mut World, who: usize) -> Result<(), String> {
    (0..3).try_for_each(|_| world.step(who, View::Fresh))
}

/// Lives through a history, then lets the world come to rest. What was given up for the sake of the disturbances is
/// tried again: a good version must then be live, a bad one must not.
fn live_through(steps: &[Step], kind: Kind, traced: bool) -> Result<World, String> {
    let mut world = World::new(traced);
    world.fails = kind == Kind::Failing;
    world.clinging = kind == Kind::Waiting;
    let told = |world: &World, why: String| {
        format!("{why}\n{}", world.trace.as_deref().unwrap_or_default().join("\n"))
    };
    for step in steps {
        // What people have pointed elsewhere is not taken back to where nobody is.
        if kind.dies() && matches!(step, Step::EditLive { .. }) {
            continue;
        }
        take(&mut world, step).map_err(|why| told(&world, why))?;
    }
    if kind == Kind::Deleted {
        world.delete().map_err(|why| told(&world, why))?;
        return Ok(world);
    }
    if kind == Kind::Suspended {
        world
            .moves_although_suspended()
            .map_err(|why| told(&world, why))?;
        world.crowded.clear();
    }
    world.declare(|spec| {
        spec.suspend = false;
        spec.rollout.promotion = Promotion::Automatic;
        spec.rollout.colour = ColourChoice::Auto;
    });
    world.ask(|requests, _| requests.pause = None);
    world.operators[1].crash();
    world.miss(false);
    world.taken = false;
    world.unreadable = false;
    world.lagging = false;
    world.clinging = false;
    world.settle(Wakes::Clock).map_err(|why| told(&world, why))?;
    if world.stalled().is_some_and(|it| it.0 == "AdoptionUndecided") {
        world.decide_for_one();
        world.settle(Wakes::Clock).map_err(|why| told(&world, why))?;
    }
    if let Some(ban) = world.ban {
        world.is_told(ban).map_err(|why| told(&world, why))?;
        world.ban = None;
        world.settle(Wakes::Clock).map_err(|why| told(&world, why))?;
    }
    // Nothing that is there may be alive any more.
    if !kind.dies() {
        world.at_the_end().map_err(|why| told(&world, why))?;
        if world.status.rejected.is_some() {
            world.ask(|requests, names| requests.retry = names.rejected);
            world.settle(Wakes::Events).map_err(|why| told(&world, why))?;
        }
        ends_well(&world).map_err(|why| told(&world, why))?;
    }
    // Whatever has been, a good version that is declared after it becomes live.
    let other = if kind.dies() {
        world.absent()
    } else {
        (0..NATURES.len()).find(|it| NATURES[*it] == Nature::Good && format!("r{it}") != world.revision)
    };
    world.release(other.unwrap());
    world.settle(Wakes::Events).map_err(|why| told(&world, why))?;
    if kind.dies() && world.status.rejected.is_some() {
        // It may be what was declared, and given up, before.
        world.ask(|requests, names| requests.retry = names.rejected);
        world.settle(Wakes::Events).map_err(|why| told(&world, why))?;
    }
    ends_well(&world).map_err(|why| told(&world, why))?;
    // At rest another operator finds nothing to do either.
    let before = world.writes;
    for _ in 0..5 {
        world.step(1, View::Fresh).map_err(|why| told(&world, why))?;
        world.wait(100);
    }
    if world.writes != before {
        return Err(told(&world, "P8: writes at rest".to_owned()));
    }
    Ok(world)
}

/// A good version is live at the end, and a bad one is not.
fn ends_well(world: &World) -> Result<(), String> {
    world.at_the_end()?;
    let good = nature(&world.revision) == Nature::Good;
    if good && world.status.phase != Phase::Live {
        return Err(format!(
            "P7: {} is good and {}",
            world.revision, world.status.phase
        ));
    }
    let live = world.status.live.as_ref();
    if !good && live.is_some_and(|live| live.verified && live.stack.revision == world.revision) {
        return Err(format!("P3: {} is bad and live", world.revision));
    }
    Ok(())
}

fn history(seed: u64) -> Result<Arrows, String> {
    let mut bytes = [0_u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: 1,
        max_shrink_iters: 2000,
        // Milliseconds: a world that never comes to rest takes long each time.
        max_shrink_time: 20_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let gone = Mutex::new(Arrows::new());
    let kind = Kind::of(seed);
    let outcome = runner.run(&steps(kind), |steps| match live_through(&steps, kind, false) {
        Ok(world) => {
            // A record that is lost is no way from one phase to another.
            let lost = steps.iter().any(|step| matches!(step, Step::LoseStatus));
            let journey = world.journey.iter().copied().filter(|_| !lost);
            gone.lock().unwrap().extend(journey.clone().zip(journey.skip(1)));
            Ok(())
        }
        Err(why) => Err(TestCaseError::fail(why)),
    });
    match outcome {
        Ok(()) => Ok(gone.into_inner().unwrap()),
        Err(TestError::Fail(_, steps)) => {
            let why = live_through(&steps, kind, true).err().unwrap_or_default();
            Err(format!("make simulate SEED={seed} after {steps:?}\n{why}"))
        }
        Err(other) => Err(format!("make simulate SEED={seed}: {other}")),
    }
}

/// A number from the environment; what is empty is not set.
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number")),
    )
}

/// All histories, on all cores. The first that breaks a promise is made as short as possible and told.
fn histories() {
    if let Some(seed) = number("SIMULATION_SEED") {
        return history(seed).map_or_else(|why| panic!("{why}"), drop);
    }
    let (first, count) = (
        number("SIMULATION_FIRST").unwrap_or(0),
        number("SIMULATION_HISTORIES").unwrap_or(10_000),
    );
    let workers = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let gone = Mutex::new(Arrows::new());
    let broken: Mutex<Option<String>> = Mutex::new(None);
    thread::scope(|scope| {
        for worker in 0..workers {
            let (gone, broken) = (&gone, &broken);
            scope.spawn(move || {
                for seed in (first + worker..first + count).step_by(usize::try_from(workers).unwrap()) {
                    if broken.lock().unwrap().is_some() {
                        return;
                    }
                    match history(seed) {
                        Ok(arrows) => gone.lock().unwrap().extend(arrows),
                        Err(why) => _ = broken.lock().unwrap().get_or_insert(why),
                    }
                }
            });
        }
    });
    if let Some(why) = broken.into_inner().unwrap() {
        panic!("{why}");
    }
    let gone = gone.into_inner().unwrap();
    let picture = picture();
    let missing: Vec<_> = gone.difference(&picture).collect();
    assert!(
        missing.is_empty(),
        "the picture in docs/architecture.md has no such ways: {missing:?}"
    );
    // A world in which nothing happens would keep every promise.
    let phases: BTreeSet<_> = gone.iter().map(|(_, to)| to).collect();
    assert!(phases.len() == 11 || count < 1000, "only {phases:?} were reached");
}

/// Ways from one phase to another.
type Arrows = BTreeSet<(Phase, Phase)>;

/// Those of the picture in `docs/architecture.md`, its note about all phases before the swap included.
fn picture() -> Arrows {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/architecture.md");
    let page = fs::read_to_string(page).unwrap();
    let (_, picture) = page.split_once("```mermaid\nstateDiagram-v2\n").unwrap();
    let (picture, _) = picture.split_once("```").unwrap();
    let phase = |name: &str| serde_json::from_value::<Phase>(json!(name.trim())).ok();
    let mut arrows = Arrows::new();
    for line in picture.lines() {
        let (way, _) = line.split_once(": ").unwrap_or((line, ""));
        if let Some((from, to)) = way.split_once(" --> ") {
            // What begins or ends there is no phase.
            arrows.extend(phase(from).zip(phase(to)));
        }
        if let Some((_, to)) = line.split_once(" → ") {
            let to: Vec<_> = to.split([',', ' ']).filter_map(phase).collect();
            let before = [
                Phase::Pending,
                Phase::Migrating,
                Phase::Provisioning,
                Phase::Testing,
                Phase::AwaitingPromotion,
            ];
            arrows.extend(
                before
                    .into_iter()
                    .flat_map(|from| to.iter().map(move |to| (from, *to))),
            );
        }
    }
    // Another attempt of what waits in it already.
    arrows.retain(|(from, to)| from != to);
    arrows
}

#[test]
fn the_promises_hold_in_every_history() {
    histories();
}
