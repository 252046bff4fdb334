//! A cluster in memory, with a mind of its own: versions of objects and optimistic locking, endpoint slices that lag,
//! pods that die, Jobs that fail, people who change their minds, and operators that sleep between any two steps.
//!
//! After every write of an operator the promises are checked against what is *true* in this world, not against what
//! the operator has seen of it; and each plan against what may be planned by who has seen that.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use exchange_operator::{
    api::{Autoscaling, ExchangeDeploymentSpec as Spec, Promotion, Service},
    controller::PATIENCE,
    decide::decide,
    guard,
    observe::{
        Declared, Fence, Figures, Job, JobKind, JobSeen, JobState, LiveService, Observed, Part, PartSeen,
        Refused, Requests, ServiceSeen, StackSeen, Target,
    },
    plan::{Action, Intent},
    status::{ExchangeDeploymentStatus as Status, Phase, PreviousState, Stack, token},
};
use jiff::Timestamp;

/// Told only when a history is told: most are not.
macro_rules! note {
    ($world:expr, $($what:tt)*) => {
        if let Some(trace) = &mut $world.trace {
            trace.push(format!($($what)*));
        }
    };
}

mod around;
mod judge;

/// What is the matter with a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nature {
    Good,
    CannotMigrate,
    NeverReady,
    FailsTests,
    FailsVerification,
    /// In attempts with an even number it answers too often with an error, in others too slowly.
    ServesBadly,
    /// Its trade pods die for good as soon as the smoke test through the live address has passed.
    Collapses,
}

/// What people declare of the trade service, if anything.
const AUTOSCALING: Autoscaling = Autoscaling {
    min_replicas: 1,
    max_replicas: 6,
    target_cpu_utilization_percentage: 70,
};

/// The revisions that people declare in these histories.
pub(crate) const NATURES: [Nature; 9] = [
    Nature::Good,
    Nature::Good,
    Nature::Good,
    Nature::CannotMigrate,
    Nature::NeverReady,
    Nature::FailsTests,
    Nature::FailsVerification,
    Nature::ServesBadly,
    Nature::Collapses,
];

/// What an API server may refuse to everybody, for as long as somebody wants: a quota, a policy, a missing right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ban {
    Live,
    Parts(Part),
    Jobs,
    Deletions,
    Rendering,
}

impl Ban {
    fn is_about(self, action: &Action) -> bool {
        match action {
            Action::CreateLive { .. } | Action::Point { .. } => self == Self::Live,
            Action::Apply { part, .. } => self == Self::Parts(*part),
            Action::Run(_) => self == Self::Jobs,
            Action::Delete { .. } | Action::DeleteJob(..) | Action::Unrender { .. } => {
                self == Self::Deletions
            }
            Action::Render { .. } | Action::Adopt { .. } => self == Self::Rendering,
        }
    }
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// It is done.
    Yes,
    /// The first of the writes of an action is done.
    Half,
    /// Refused by the API server, because of another version or an existing name.
    No,
}

impl From<bool> for Done {
    fn from(done: bool) -> Self {
        if done { Self::Yes } else { Self::No }
    }
}

pub(crate) fn nature(revision: &str) -> Nature {
    let index: usize = revision.trim_start_matches('r').parse().unwrap();
    NATURES[index]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pod {
    Starting,
    Ready,
    Dead,
    Terminating,
}

#[derive(Clone, Debug, Default)]
struct Workload {
    parts: BTreeMap<Part, PartSeen>,
    /// Those of them that have lost their labels.
    stripped: BTreeSet<Part>,
    replicas: u32,
    pods: Vec<Pod>,
    /// Somebody else has changed what its pods are made of: which change of anybody's it was.
    edited: Option<u64>,
    /// So many of its pods are not made of that yet, or still.
    others: usize,
}

impl Workload {
    /// What its pods are made of from now on: what was rendered, or something else.
    fn edit(&mut self, to: Option<u64>) {
        if self.edited != to {
            self.edited = to;
            self.others = self.pods.len();
        }
    }

    /// It is deleted.
    fn end(&mut self) {
        self.replicas = 0;
        self.pods.fill(Pod::Terminating);
        (self.edited, self.others) = (None, 0);
    }

    fn template(&self) -> String {
        match self.edited {
            _ if !self.parts.contains_key(&Part::Workload) => String::new(),
            None => "rendered".to_owned(),
            Some(change) => format!("change {change}"),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct StackThere {
    rendered: Option<Fence>,
    /// What was rendered last, also after somebody has deleted it: what its pods come from.
    origin: Option<Fence>,
    /// What its pods need beside: copies, account, the lane's secret.
    pieces: Option<Fence>,
    /// Whether it belongs to nobody.
    orphaned: bool,
    attempt: u32,
    version: String,
    services: BTreeMap<Service, Workload>,
    open: u64,
    /// How often one of its pods has been replaced by one that is made of something else.
    replaced: u32,
}

#[derive(Clone, Debug)]
struct LiveThere {
    fence: Fence,
    target: Target,
    epoch: u32,
    /// Somebody else has had a hand in it since the operator wrote it.
    tampered: bool,
    /// Whether it belongs to nobody.
    orphaned: bool,
    /// Where somebody else's selector leads: to what it led before.
    led: Option<Stack>,
}

#[derive(Clone, Debug)]
struct JobThere {
    seen: JobSeen,
    /// What it is about.
    of: Tested,
}

/// The rendered stack for which a Job runs, and how often its pods had been replaced by others.
type Tested = (Option<Fence>, u32);

/// How an operator sees the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// As it is.
    Fresh,
    /// The object as it is, everything else as it was a while ago: reads take time, and the object is read last.
    Torn,
    /// All as it was a while ago.
    Old,
    /// The object as it was a while ago, everything else as it is: an API server that lags, and answers only this one.
    OldObject,
}

/// What watches tell: the object, the Services and workloads, Jobs, and endpoints.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    version: u64,
    live: BTreeMap<Service, Fence>,
    colour_services: BTreeMap<(Stack, Service), PartSeen>,
    /// With their sizes, and with the pods that they count.
    workloads: BTreeMap<(Stack, Service), (PartSeen, u32, Vec<Pod>)>,
    jobs: BTreeMap<Job, Fence>,
    slices: BTreeMap<(Stack, Service), u32>,
    live_slices: BTreeMap<Service, Vec<Stack>>,
}

/// What wakes an operator that has nothing in hand, beside its own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wakes {
    /// Nothing: every event is lost.
    Clock,
    /// Every event.
    Events,
}

/// One operator: a plan that it is carrying out, and what it remembers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Operator {
    status: Option<(Status, u64)>,
    /// What allows the actions.
    record: Status,
    actions: VecDeque<Action>,
    guarded: bool,
    /// The first write of the present action is done.
    half: bool,
    phase: Option<(Phase, u32)>,
    known: Option<(Phase, u32)>,
    /// How long the present pass lets it sleep, and until when the last whole one does.
    wait: Duration,
    due: Option<Timestamp>,
    /// What its watches had told when it last looked, where it is left to itself.
    heard: Heard,
    /// Writes in a row that failed.
    transient: u32,
    /// What could not be written, in this pass and in the last whole one.
    refusing: Option<Refused>,
    refused: Option<Refused>,
    /// What it has seen of the stacks.
    stacks: BTreeMap<Stack, Beside>,
}

/// What is seen of a stack beside what is observed.
#[derive(Clone, Debug, Default, PartialEq)]
struct Beside {
    rendered: bool,
    pieces: Option<Fence>,
    /// What its pods are made of, and how often one had been replaced by another then.
    templates: String,
    replaced: u32,
}

impl Operator {
    fn idle(&self) -> bool {
        self.status.is_none() && self.actions.is_empty()
    }

    fn give_up(&mut self) {
        self.status = None;
        self.actions.clear();
        self.guarded = false;
        self.half = false;
        self.refusing = None;
        self.due = None;
    }

    /// Forgets everything.
    pub(crate) fn crash(&mut self) {
        *self = Self::default();
    }
}

/// The cluster, and what has been true in it.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is something that can be the matter"
)]
pub(crate) struct World {
    pub(crate) now: Timestamp,
    counter: u64,
    pub(crate) spec: Spec,
    pub(crate) revision: String,
    pub(crate) gates: u32,
    generation: i64,
    pub(crate) requests: Requests,
    pub(crate) status: Status,
    version: u64,
    live: BTreeMap<Service, LiveThere>,
    stacks: BTreeMap<Stack, StackThere>,
    jobs: BTreeMap<Job, JobThere>,
    slices: BTreeMap<(Stack, Service), u32>,
    live_slices: BTreeMap<Service, Vec<Stack>>,
    /// Jobs that have passed, and what they were about.
    passed: BTreeMap<Job, Tested>,
    /// Rendered stacks that have passed all their gates, and how often one of their pods had been replaced by another then.
    proven: BTreeMap<(Stack, Fence), u32>,
    /// Stacks of which nothing is rendered, and which people have declared to be right all the same.
    vouched: BTreeSet<Stack>,
    /// Endpoints at the time of the last guard, per operator.
    at_guard: [BTreeMap<(Stack, Service), (u32, u32)>; 2],
    /// Where the live Services pointed at that time.
    pointed_at_guard: [BTreeMap<Service, Target>; 2],
    /// What was declared at that time.
    declared_at_guard: [Spec; 2],
    /// Phases and attempts for which some operator has done all that was to be done.
    looked_after: BTreeSet<(Phase, u32)>,
    past: VecDeque<Rc<Past>>,
    /// What the API server refuses.
    pub(crate) ban: Option<Ban>,
    /// Not for good, as far as anybody can tell: it fails, as when a webhook is down.
    pub(crate) fails: bool,
    /// A reference is missing.
    pub(crate) missing: bool,
    /// A name that is needed belongs to somebody else.
    pub(crate) taken: bool,
    /// The pages of the trade service's pods cannot be read.
    pub(crate) unreadable: bool,
    /// New connections do not agree yet, whatever the slices list.
    pub(crate) lagging: bool,
    /// Whether clients keep their connections to what they do not find any more.
    pub(crate) clinging: bool,
    /// The object is being deleted.
    deleting: bool,
    /// Whether it was at the time of the last guard, per operator.
    deleting_at_guard: [bool; 2],
    /// When each smoke test through the live address has passed, and since when the present verification lasts: as many
    /// writes of anybody ago.
    passed_at: BTreeMap<Job, u64>,
    verifying_from: u64,
    /// Stacks and attempts whose smoke test through the live address has passed, as somebody has seen who had nothing to
    /// record about it.
    known_to_pass: BTreeSet<(Stack, u32)>,
    /// Verifications in which somebody has read all pages.
    read: BTreeSet<(u32, u32)>,
    /// Stacks whose pods have died for good.
    collapsed: BTreeSet<Stack>,
    /// Services of a revision of which one pod has nowhere to run.
    pub(crate) crowded: BTreeSet<(String, Service)>,
    /// Changes of what is declared that make a release that was given up another one; their number when it was.
    declarations: u64,
    given_up: u64,
    /// Nothing is recorded, and something may have traffic.
    pub(crate) orphaned: bool,
    pub(crate) operators: [Operator; 2],
    /// Writes of the operators.
    pub(crate) writes: u64,
    /// What happened, for people who replay a history.
    pub(crate) trace: Option<Vec<String>>,
    /// The phases that were recorded, in order.
    pub(crate) journey: Vec<Phase>,
}

/// What is told while pages cannot be read.
pub(crate) const UNREADABLE: &str =
    "the figures of the trade service cannot be read at 192.0.2.1:9090: no connection";

/// A state of the world as operators may be shown it: what is seen, the object's version, and what is there of stacks.
type Past = (Observed, u64, BTreeMap<Stack, Beside>);

pub(crate) fn spec() -> Spec {
    let value = serde_json::json!({
        "version": "r0", "image": "acme/exchange",
        "database": {"secretRef": {"name": "db"}},
        "queue": {"secretRef": {"name": "queue"}},
        "marketData": {"secretRef": {"name": "redis"}},
        "rollout": {"smokeTests": [{"name": "own", "command": ["test"]}]},
    });
    serde_json::from_value(value).unwrap()
}

/// The status of an object that nobody has looked at: what the schema's defaults make of none.
pub(crate) fn unrecorded() -> Status {
    Status {
        observed_generation: Some(0),
        ..Status::default()
    }
}

impl World {
    pub(crate) fn new(traced: bool) -> Self {
        Self {
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            counter: 0,
            spec: spec(),
            revision: "r0".to_owned(),
            gates: 0,
            generation: 1,
            requests: Requests::default(),
            status: unrecorded(),
            version: 0,
            live: BTreeMap::new(),
            stacks: BTreeMap::new(),
            jobs: BTreeMap::new(),
            slices: BTreeMap::new(),
            live_slices: BTreeMap::new(),
            passed: BTreeMap::new(),
            proven: BTreeMap::new(),
            vouched: BTreeSet::new(),
            at_guard: [BTreeMap::new(), BTreeMap::new()],
            pointed_at_guard: [BTreeMap::new(), BTreeMap::new()],
            declared_at_guard: [spec(), spec()],
            looked_after: BTreeSet::new(),
            past: VecDeque::new(),
            ban: None,
            fails: false,
            missing: false,
            taken: false,
            unreadable: false,
            lagging: false,
            clinging: false,
            deleting: false,
            deleting_at_guard: [false; 2],
            passed_at: BTreeMap::new(),
            verifying_from: 0,
            known_to_pass: BTreeSet::new(),
            read: BTreeSet::new(),
            collapsed: BTreeSet::new(),
            crowded: BTreeSet::new(),
            declarations: 0,
            given_up: 0,
            orphaned: false,
            operators: [Operator::default(), Operator::default()],
            writes: 0,
            trace: traced.then(Vec::new),
            journey: vec![Phase::Pending],
        }
    }

    fn fence(&mut self) -> Fence {
        self.counter += 1;
        Fence {
            uid: format!("u{}", self.counter).into(),
            resource_version: self.counter.to_string().into(),
        }
    }

    fn touch(fence: &mut Fence, counter: &mut u64) {
        *counter += 1;
        fence.resource_version = counter.to_string().into();
    }

    // ---- what operators see -----------------------------------------------------------------------------------

    pub(crate) fn observe(&self) -> Observed {
        let mut live = BTreeMap::new();
        for (service, there) in &self.live {
            let endpoints = self.live_slices.get(service).cloned().unwrap_or_default();
            let LiveThere {
                fence,
                target,
                epoch,
                orphaned,
                ..
            } = there.clone();
            live.insert(
                *service,
                LiveService {
                    fence,
                    target,
                    epoch,
                    intact: !orphaned,
                    endpoints,
                },
            );
        }
        let jobs = self
            .jobs
            .iter()
            .map(|(job, there)| (job.clone(), there.seen.clone()))
            .collect();
        let mut answers = self.live_slices.values().map(Vec::as_slice);
        let answers = match answers.next() {
            Some([first])
                if !self.lagging
                    && self.live_slices.len() == 3
                    && answers.all(|it| it == std::slice::from_ref(first)) =>
            {
                Some(first.clone())
            }
            _ => None,
        };
        let counting = if self.status.phase == Phase::Promoting {
            let candidate = self.status.candidate.as_ref();
            candidate.map(|it| (&it.stack, it.attempt)).filter(|(to, _)| {
                let mut live = self.live.values();
                live.all(|it| it.epoch == self.status.epoch && it.target.is(Some(to)))
            })
        } else {
            self.status.live.as_ref().map(|it| (&it.stack, it.attempt))
        };
        let bad = counting.filter(|(stack, _)| nature(&stack.revision) == Nature::ServesBadly);
        let (errors, p99_over) = match bad.map(|(_, attempt)| attempt % 2) {
            None => (5, Duration::from_millis(20)),
            Some(0) => (500, Duration::from_millis(20)),
            Some(_) => (5, Duration::from_mins(1)),
        };
        let figures = Figures {
            requests: 1000,
            errors,
            timed: 1000,
            p99_over,
        };
        let figures = Some((Service::Trade, figures)).filter(|_| !self.unreadable);
        Observed {
            generation: self.generation,
            deleting: self.deleting,
            requests: self.requests.clone(),
            status: self.status.clone(),
            declared: if self.missing {
                Err("the Secret smtp does not exist".to_owned())
            } else {
                Ok(Declared {
                    revision: self.revision.clone(),
                    gates: format!("g{}", self.gates),
                })
            },
            live,
            stacks: self.observe_stacks(),
            jobs,
            taken: self
                .taken
                .then(|| "Deployment/other".to_owned())
                .into_iter()
                .collect(),
            remains: Vec::new(),
            refused: None,
            answers,
            figures: figures.into_iter().collect(),
            unheard: self.unreadable.then(|| UNREADABLE.to_owned()),
            seen_before: false,
        }
    }

    fn observe_stacks(&self) -> BTreeMap<Stack, StackSeen> {
        let mut stacks = BTreeMap::new();
        for (stack, there) in &self.stacks {
            let mut services = BTreeMap::new();
            for (service, workload) in &there.services {
                let mut parts = workload.parts.clone();
                for part in &workload.stripped {
                    // Pods tell of their workload; of the others nobody does.
                    match parts.get_mut(part).filter(|_| *part == Part::Workload) {
                        Some(found) if workload.pods.iter().any(|pod| *pod != Pod::Terminating) => {
                            found.intact = false;
                        }
                        _ => _ = parts.remove(part),
                    }
                }
                if parts.is_empty() && workload.pods.is_empty() {
                    continue;
                }
                let seen = ServiceSeen {
                    replicas: if parts.contains_key(&Part::Workload) {
                        workload.replicas
                    } else {
                        0
                    },
                    autoscaling: parts.contains_key(&Part::Autoscaler).then_some(AUTOSCALING),
                    parts,
                    template: workload.template(),
                    current: workload.others == 0,
                    ready: self.slices.get(&(stack.clone(), *service)).copied().unwrap_or(0),
                    pods: u32::try_from(workload.pods.len()).unwrap(),
                    trouble: None,
                };
                services.insert(*service, seen);
            }
            let (rendered, attempt, version) = (there.rendered.clone(), there.attempt, there.version.clone());
            stacks.insert(
                stack.clone(),
                StackSeen {
                    rendered,
                    whole: there.pieces.is_some(),
                    owned: !there.orphaned,
                    other_store: None,
                    attempt,
                    version,
                    services,
                    open: Some(there.open),
                    unheard: None,
                },
            );
        }
        stacks
    }

    fn heard(&self) -> Heard {
        let mut heard = Heard {
            version: self.version,
            slices: self.slices.clone(),
            live_slices: self.live_slices.clone(),
            ..Heard::default()
        };
        for (service, there) in &self.live {
            heard.live.insert(*service, there.fence.clone());
        }
        for (job, there) in &self.jobs {
            heard.jobs.insert(job.clone(), there.seen.fence.clone());
        }
        for (stack, there) in &self.stacks {
            for (service, there) in &there.services {
                let key = (stack.clone(), *service);
                if let Some(part) = there.parts.get(&Part::ColourService) {
                    heard.colour_services.insert(key.clone(), part.clone());
                }
                if let Some(part) = there.parts.get(&Part::Workload) {
                    let told = (part.clone(), there.replicas, there.pods.clone());
                    heard.workloads.insert(key, told);
                }
            }
        }
        heard
    }

    /// One step of an operator: it looks and decides, or records, or checks an action, or carries it out.
    pub(crate) fn step(&mut self, who: usize, view: View) -> Result<(), String> {
        if let Some((status, version)) = self.operators[who].status.take() {
            return self.record(who, status, version);
        }
        let Some(action) = self.operators[who].actions.front().cloned() else {
            return self.look(who, view);
        };
        if !self.operators[who].guarded && !self.operators[who].half {
            let replicas = |(stack, service): &(Stack, Service)| {
                self.stacks
                    .get(stack)
                    .and_then(|it| it.services.get(service))
                    .map_or(0, |it| it.replicas)
            };
            self.at_guard[who] = self
                .slices
                .iter()
                .map(|(key, ready)| (key.clone(), (*ready, replicas(key))))
                .collect();
            self.pointed_at_guard[who] = self
                .live
                .iter()
                .map(|(service, live)| (*service, live.target.clone()))
                .collect();
            self.declared_at_guard[who] = self.spec.clone();
            self.deleting_at_guard[who] = self.deleting;
            if let Err(refusal) =
                guard::check(&self.spec, &self.operators[who].record, &action, &self.observe())
            {
                note!(self, "{who}: refused: {refusal}");
                self.break_off(who);
            } else {
                self.operators[who].guarded = true;
            }
            return Ok(());
        }
        self.operators[who].guarded = false;
        if let Some(ban) = self.ban.filter(|ban| ban.is_about(&action)) {
            note!(self, "{who}: {action:?} BANNED");
            let operator = &mut self.operators[who];
            operator.transient += u32::from(self.fails);
            if self.fails && operator.transient <= PATIENCE {
                self.break_off(who);
                return Ok(());
            }
            operator.half = false;
            let does = if self.fails { "fails" } else { "refuses" };
            operator.refusing.get_or_insert_with(|| Refused {
                why: format!("the API server {does} to touch {ban:?}"),
                traffic: action.is_about_traffic(),
            });
            operator.actions.pop_front();
            operator.actions.retain(|it| !it.needs(&action));
            self.end_pass(who);
            return Ok(());
        }
        let done = self.act(who, &action)?;
        note!(self, "{who}: {action:?} {done:?}");
        match done {
            Done::No => self.break_off(who),
            Done::Half => {
                self.writes += 1;
                self.operators[who].half = true;
            }
            Done::Yes => {
                self.writes += 1;
                self.operators[who].half = false;
                self.operators[who].actions.pop_front();
                self.end_pass(who);
            }
        }
        Ok(())
    }

    /// A write that did not come to be ends a pass, and nothing has been seen as a whole, but for what was refused before it.
    fn break_off(&mut self, who: usize) {
        let operator = &mut self.operators[who];
        let refusing = operator.refusing.take();
        operator.give_up();
        operator.refusing = refusing;
        if operator.refusing.is_some() {
            self.end_pass(who);
        }
    }

    /// A pass that has come to its end has looked at the phase as a whole.
    fn end_pass(&mut self, who: usize) {
        let operator = &mut self.operators[who];
        if operator.idle() {
            operator.known = operator.phase;
            operator.refused = operator.refusing.take();
            if operator.refused.is_none() {
                operator.transient = 0;
            }
            operator.due = Some(self.now.checked_add(operator.wait).unwrap());
            self.looked_after.extend(operator.phase);
        }
    }

    fn look(&mut self, who: usize, view: View) -> Result<(), String> {
        let fresh = Rc::new((self.observe(), self.version, self.pieces()));
        let old = self.past.front().cloned().unwrap_or_else(|| Rc::clone(&fresh));
        self.past.push_back(Rc::clone(&fresh));
        if self.past.len() > 6 {
            self.past.pop_front();
        }
        let (seen, version) = match view {
            View::Fresh => (fresh.0.clone(), fresh.1),
            View::Old => (old.0.clone(), old.1),
            View::Torn => (with_object_of(&fresh.0, &old.0), fresh.1),
            View::OldObject => (with_object_of(&old.0, &fresh.0), old.1),
        };
        let all_of = if matches!(view, View::Old | View::Torn) {
            &old
        } else {
            &fresh
        };
        self.operators[who].stacks.clone_from(&all_of.2);
        self.plan(who, seen, version)?;
        if view == View::Fresh {
            self.is_not_refused(who)?;
        }
        Ok(())
    }

    fn pieces(&self) -> BTreeMap<Stack, Beside> {
        let seen = self.observe_stacks();
        let stacks = self.stacks.iter();
        stacks
            .map(|(stack, it)| {
                let pieces = Beside {
                    rendered: it.rendered.is_some(),
                    pieces: it.pieces.clone(),
                    templates: seen.get(stack).map(StackSeen::templates).unwrap_or_default(),
                    replaced: it.replaced,
                };
                (stack.clone(), pieces)
            })
            .collect()
    }

    /// What a test is about that begins now.
    fn to_be_tested(&self, stack: &Stack) -> Tested {
        let there = self.stacks.get(stack);
        there.map_or((None, 0), |it| (it.origin.clone(), it.replaced))
    }

    /// Who has just seen everything as it is plans no move that its own guard refuses: it would try it for ever.
    fn is_not_refused(&self, who: usize) -> Result<(), String> {
        let operator = &self.operators[who];
        let Some(action @ Action::Point { intent, .. }) = operator.actions.front() else {
            return Ok(());
        };
        let seen = Observed {
            status: operator.record.clone(),
            ..self.observe()
        };
        match guard::check(&self.spec, &operator.record, action, &seen) {
            Err(refusal) if *intent != Intent::Repair => {
                Err(format!("P4: the plan is to move what cannot move: {refusal}"))
            }
            _ => Ok(()),
        }
    }

    /// What it has seen, and what it remembers.
    fn remembering(&self, who: usize, mut seen: Observed) -> Observed {
        let now = (seen.status.phase, seen.status.attempt);
        seen.seen_before = self.operators[who].known == Some(now);
        seen.refused.clone_from(&self.operators[who].refused);
        seen
    }

    /// Whether a look would find something to do.
    fn has_work(&self, who: usize) -> bool {
        let plan = decide(&self.spec, &self.remembering(who, self.observe()), self.now);
        plan.status.is_some() || !plan.actions.is_empty()
    }

    fn plan(&mut self, who: usize, seen: Observed, version: u64) -> Result<(), String> {
        let seen = self.remembering(who, seen);
        let now = (seen.status.phase, seen.status.attempt);
        if seen.unheard.is_none() && seen.status.phase == Phase::Verifying {
            self.read.insert((seen.status.epoch, seen.status.attempt));
        }
        let plan = decide(&self.spec, &seen, self.now);
        judge::judge(&self.spec, &seen, &plan, self.now)?;
        if let Some(live) = seen.status.live.as_ref().filter(|_| plan.status.is_none())
            && seen.status.phase == Phase::Verifying
        {
            let job = judge::verify_job(live);
            if seen.jobs.get(&job).is_some_and(|it| it.state == JobState::Passed) {
                self.known_to_pass.insert((live.stack.clone(), live.attempt));
            }
        }
        let operator = &mut self.operators[who];
        operator.phase = Some(
            plan.status
                .as_ref()
                .map_or(now, |next| (next.phase, next.attempt)),
        );
        operator.record = plan.status.clone().unwrap_or(seen.status);
        operator.wait = plan.requeue;
        operator.status = plan.status.map(|status| (status, version));
        operator.actions = plan.actions.into();
        self.end_pass(who);
        Ok(())
    }

    // ---- writes -----------------------------------------------------------------------------------------------

    fn record(&mut self, who: usize, status: Status, version: u64) -> Result<(), String> {
        if version != self.version {
            note!(self, "{who}: record CONFLICT");
            self.operators[who].give_up();
            return Ok(());
        }
        let old = std::mem::replace(&mut self.status, status);
        self.counter += 1;
        self.version = self.counter;
        self.writes += 1;
        if self.journey.last() != Some(&self.status.phase) {
            self.journey.push(self.status.phase);
        }
        note!(
            self,
            "{who}: {} -> {} live {:?} candidate {:?} previous {:?} attempt {} epoch {}",
            old.phase,
            self.status.phase,
            self.status.live.as_ref().map(|it| it.stack.to_string()),
            self.status.candidate.as_ref().map(|it| it.stack.to_string()),
            self.status
                .previous
                .as_ref()
                .map(|it| (it.stack.to_string(), it.state)),
            self.status.attempt,
            self.status.epoch
        );
        self.end_pass(who);
        self.after_record(who, &old)
    }

    fn after_record(&mut self, who: usize, old: &Status) -> Result<(), String> {
        let new = self.status.clone();
        if new.attempt < old.attempt || new.epoch < old.epoch {
            return Err("P7: an attempt or a move was counted twice".to_owned());
        }
        let moved = self.live.values().map(|live| live.epoch).max().unwrap_or(0);
        if new.live.is_some() && new.epoch < moved {
            return Err("P7: a move that has been is counted again".to_owned());
        }
        if new.phase == Phase::Promoting && old.phase != Phase::Promoting && old.phase != Phase::RollingBack {
            self.may_promote(who, &new)?;
        }
        let verified = old.phase == Phase::Verifying && new.phase == Phase::Live;
        if verified && !self.read.contains(&(old.epoch, old.attempt)) {
            return Err("P3: what nobody could read was verified".to_owned());
        }
        if new.candidate.as_ref().is_some_and(|it| it.forced) && new.phase != Phase::Promoting {
            return Err(format!("P5: {} without a way back, and not a swap", new.phase));
        }
        self.verification(old, &new)?;
        if new.phase == Phase::Migrating && old.phase == Phase::Pending {
            may_expand(&new)?;
        }
        let late = new
            .rejected
            .as_ref()
            .is_some_and(|it| old.rejected.as_ref() != Some(it) && it.message.contains(" in time"));
        if late && !self.looked_after.contains(&(old.phase, old.attempt)) {
            return Err(format!(
                "P7: nobody has looked after {} before it was late",
                old.phase
            ));
        }
        if self.status.live.is_some() || self.status.epoch > 0 {
            self.orphaned = false;
        }
        // What is forgotten for the sake of another one begins as soon as that one has had its turn.
        if let Some(was) = &old.rejected
            && new
                .rejected
                .as_ref()
                .is_none_or(|now| now.stack.revision != was.stack.revision)
            && was.stack.revision == self.revision
            && self
                .spec
                .rollout
                .colour
                .fixed()
                .is_none_or(|colour| colour == was.stack.colour)
            && self.given_up == self.declarations
            // In the other colour it may be live.
            && new.live.as_ref().is_none_or(|live| {
                let fixed = self.spec.rollout.colour.fixed();
                live.stack == was.stack
                    || live.stack.revision != self.revision
                    || fixed.is_some_and(|colour| colour != live.stack.colour)
            })
            && self.requests.retry != Some(token(&was.stack, was.attempt))
        {
            return Err(format!(
                "P3: {} was given up and is tried again by itself",
                was.stack
            ));
        }
        if new.rejected.is_some() && new.rejected != old.rejected {
            self.given_up = self.declarations;
        }
        if new.phase == Phase::RollingBack
            && old
                .previous
                .as_ref()
                .is_some_and(|it| it.state == PreviousState::Retiring)
        {
            return Err("P5: back to a stack that is being retired".to_owned());
        }
        if let (Some(was), Some(is)) = (&old.previous, &new.previous)
            && was.state == PreviousState::Retiring
            && is.state != PreviousState::Retiring
            && was.stack == is.stack
        {
            return Err("P5: a retirement was taken back".to_owned());
        }
        let moving = matches!(new.phase, Phase::Promoting | Phase::RollingBack);
        // A move whose record was lost half-way is finished as a repair.
        let ended = matches!(old.phase, Phase::Promoting | Phase::RollingBack)
            || (old.live != new.live && old.attempt > 0);
        if !moving && ended {
            let live = new.live.as_ref().map(|live| &live.stack);
            for (service, there) in &self.live {
                if !there.tampered && !there.target.is(live) {
                    return Err(format!(
                        "P4: {} ended while {service} points at {:?}",
                        old.phase, there.target
                    ));
                }
            }
        }
        Ok(())
    }

    /// A verification goes by a smoke test that has passed in it, and does not need its Job any more after that.
    fn verification(&mut self, old: &Status, new: &Status) -> Result<(), String> {
        if new.phase == Phase::Verifying && (old.phase, old.attempt) != (new.phase, new.attempt) {
            self.verifying_from = self.counter;
        }
        let Some(live) = old.live.as_ref().filter(|_| old.phase == Phase::Verifying) else {
            return Ok(());
        };
        let job = judge::verify_job(live);
        let passed = self
            .passed_at
            .get(&job)
            .is_some_and(|at| *at > self.verifying_from);
        if new.phase == Phase::Live && !passed {
            return Err(format!("P3: {} is verified by an old result", live.stack));
        }
        let late = new.rejected.as_ref().is_some_and(|it| {
            it.message
                .starts_with("the smoke test through the live address was not done")
        });
        if late && self.known_to_pass.contains(&(live.stack.clone(), live.attempt)) {
            return Err(format!(
                "P7: {} is given up for a test that has passed",
                live.stack
            ));
        }
        Ok(())
    }

    /// Every gate, for exactly this stack and attempt, as it truly is.
    fn may_promote(&mut self, who: usize, status: &Status) -> Result<(), String> {
        let candidate = status.candidate.clone().ok_or("promotes nothing")?;
        let rendered = self.stacks.get(&candidate.stack).and_then(|it| it.origin.clone());
        let rendered = rendered.ok_or("P3: promotes a stack that does not exist")?;
        // What has become of its pods since it has looked, nobody can know.
        let replaced = self.operators[who]
            .stacks
            .get(&candidate.stack)
            .map_or(0, |it| it.replaced);
        let tested = (Some(rendered.clone()), replaced);
        let mut kinds = vec![JobKind::Expand, JobKind::Smoke];
        kinds.extend(
            self.spec
                .rollout
                .smoke_tests
                .iter()
                .map(|test| JobKind::Test(test.name.clone())),
        );
        for kind in kinds {
            let job = Job {
                kind,
                stack: candidate.stack.clone(),
                attempt: candidate.attempt,
            };
            let of = self
                .passed
                .get(&job)
                .ok_or_else(|| format!("P3: {job:?} has not passed"))?;
            if job.kind != JobKind::Expand && *of != tested {
                return Err(format!(
                    "P3: {job:?} was about another stack of this name, or other pods"
                ));
            }
        }
        let name = token(&candidate.stack, candidate.attempt);
        if self.spec.rollout.promotion == Promotion::Manual && self.requests.promote.as_ref() != Some(&name) {
            return Err("P3: nobody has approved it".to_owned());
        }
        if self.requests.abort.as_ref() == Some(&name) {
            return Err("P7: promotes what has been aborted".to_owned());
        }
        if candidate.stack.revision != self.revision {
            return Err("P7: promotes what is not declared any more".to_owned());
        }
        if self.spec.suspend || self.requests.pause.as_ref() == Some(&name) {
            return Err("promotes while paused or suspended".to_owned());
        }
        self.proven.insert((candidate.stack, rendered), replaced);
        Ok(())
    }

    fn is_proven(&self, stack: &Stack) -> bool {
        let origin = self.stacks.get(stack).and_then(|it| it.origin.clone());
        origin.is_some_and(|rendered| self.proven.contains_key(&(stack.clone(), rendered)))
    }

    /// Whether a stack, as this operator has seen it, has other pods than passed its gates.
    fn has_been_changed(&self, who: usize, stack: &Stack) -> bool {
        let origin = self.stacks.get(stack).and_then(|it| it.origin.clone());
        let proven = origin.and_then(|rendered| self.proven.get(&(stack.clone(), rendered)));
        let seen = self.operators[who].stacks.get(stack).map(|it| it.replaced);
        seen.is_some_and(|seen| proven.is_some_and(|proven| seen > *proven))
    }

    /// What is not recorded to be live gets no autoscaler, and the live addresses are not tested for it.
    fn leaves_alone(&self, who: usize, action: &Action) -> Result<(), String> {
        let live = self.operators[who].record.live.as_ref().map(|live| &live.stack);
        match action {
            Action::Apply { stack, part, .. } if *part == Part::Autoscaler && live != Some(stack) => {
                Err(format!("P6: an autoscaler for {stack}, which is not live"))
            }
            Action::Run(job) if job.kind == JobKind::Verify && live != Some(&job.stack) => Err(format!(
                "P6: the live addresses are tested for {}, which is not live",
                job.stack
            )),
            _ => Ok(()),
        }
    }

    /// Carries one action out, or the next of its writes.
    #[expect(clippy::too_many_lines, reason = "one arm per action")]
    fn act(&mut self, who: usize, action: &Action) -> Result<Done, String> {
        self.leaves_alone(who, action)?;
        if self.deleting_at_guard[who] {
            return Err(format!("{action:?} of an object that is being deleted"));
        }
        match action {
            Action::CreateLive { service } => {
                if self.live.contains_key(service) {
                    return Ok(Done::No);
                }
                let fence = self.fence();
                let there = LiveThere {
                    fence,
                    target: Target::Nothing,
                    epoch: 0,
                    tampered: true,
                    orphaned: false,
                    led: None,
                };
                self.live.insert(*service, there);
                Ok(Done::Yes)
            }
            Action::Point {
                service,
                fence,
                to,
                epoch,
                intent,
            } => {
                let Some(there) = self.live.get_mut(service).filter(|it| it.fence == *fence) else {
                    return Ok(Done::No);
                };
                if let (true, None, Target::Stack(stack)) = (self.orphaned, to, &there.target)
                    && self
                        .slices
                        .get(&(stack.clone(), *service))
                        .is_some_and(|ready| *ready > 0)
                {
                    return Err(format!(
                        "P1: {service} was taken from {stack}, and nothing is recorded"
                    ));
                }
                there.orphaned = false;
                there.target = to.clone().map_or(Target::Nothing, Target::Stack);
                there.epoch = *epoch;
                there.tampered = false;
                Self::touch(&mut there.fence, &mut self.counter);
                self.after_point(who, *service, to.as_ref(), *epoch, *intent)?;
                self.after_move(to.as_ref(), *epoch);
                Ok(Done::Yes)
            }
            Action::Render {
                stack,
                attempt,
                version,
            } => {
                let known = self.operators[who]
                    .stacks
                    .get(stack)
                    .is_some_and(|it| it.rendered);
                if known || self.operators[who].half {
                    let fence = self.fence();
                    // Made also for a stack that somebody else has removed meanwhile: then nobody sees it.
                    if let Some(there) = self.stacks.get_mut(stack) {
                        there.pieces.get_or_insert(fence);
                    }
                    return Ok(Done::Yes);
                }
                if self.stacks.get(stack).is_some_and(|it| it.rendered.is_some()) {
                    return Ok(Done::No);
                }
                self.collapsed.remove(stack);
                let fence = self.fence();
                // What is lost of a stack that has passed its gates is made again of the same.
                if self.is_proven(stack) || self.vouched.remove(stack) {
                    self.proven.insert((stack.clone(), fence.clone()), u32::MAX);
                }
                let there = self.stacks.entry(stack.clone()).or_default();
                there.origin = Some(fence.clone());
                there.rendered = Some(fence);
                there.attempt = *attempt;
                there.version.clone_from(version);
                there.orphaned = false;
                Ok(Done::Half)
            }
            Action::Adopt { stack, fence } => {
                if !self.operators[who].half {
                    return Ok(Done::Half);
                }
                let there = self.stacks.get_mut(stack);
                let Some(there) = there.filter(|it| it.rendered.as_ref() == Some(fence)) else {
                    return Ok(Done::No);
                };
                there.orphaned = false;
                Ok(Done::Yes)
            }
            Action::Apply {
                stack,
                service,
                part,
                replicas,
                fence,
            } => self
                .apply(who, stack, *service, *part, *replicas, fence.as_ref())
                .map(Done::from),
            Action::Delete {
                stack,
                service,
                part,
                fence,
            } => {
                let there = self
                    .stacks
                    .get_mut(stack)
                    .and_then(|it| it.services.get_mut(service));
                let Some(there) = there.filter(|it| it.parts.get(part).is_some_and(|it| it.fence == *fence))
                else {
                    return Ok(Done::No);
                };
                there.parts.remove(part);
                there.stripped.remove(part);
                if *part == Part::Workload {
                    there.end();
                }
                self.after_delete(who, stack, *service, *part)?;
                self.forget_empty();
                Ok(Done::Yes)
            }
            Action::Unrender { stack, .. } if !self.operators[who].half => {
                let seen = self.operators[who]
                    .stacks
                    .get(stack)
                    .and_then(|it| it.pieces.clone());
                let Some(there) = self.stacks.get_mut(stack).filter(|_| seen.is_some()) else {
                    return Ok(Done::Half);
                };
                if there.pieces.is_some() && there.pieces != seen {
                    return Ok(Done::No);
                }
                there.pieces = None;
                self.after_delete(who, stack, Service::User, Part::Budget)?;
                Ok(Done::Half)
            }
            Action::Unrender { stack, fence } => {
                let there = self
                    .stacks
                    .get_mut(stack)
                    .filter(|it| it.rendered.as_ref() == Some(fence));
                let Some(there) = there else { return Ok(Done::No) };
                there.rendered = None;
                self.after_delete(who, stack, Service::User, Part::Budget)?;
                self.forget_empty();
                Ok(Done::Yes)
            }
            Action::Run(job) => {
                if self.jobs.contains_key(job) {
                    return Ok(Done::No);
                }
                if job.kind == JobKind::Contract {
                    self.may_contract(job)?;
                }
                let seen = JobSeen {
                    fence: self.fence(),
                    state: JobState::Running,
                    trouble: None,
                    progress: job.kind.migrates().then(|| "batch 1 of 2".to_owned()),
                    of: matches!(job.kind, JobKind::Smoke | JobKind::Test(_)).then(|| {
                        self.operators[who]
                            .stacks
                            .get(&job.stack)
                            .map(|it| it.templates.clone())
                            .unwrap_or_default()
                    }),
                };
                let of = self.to_be_tested(&job.stack);
                self.jobs.insert(job.clone(), JobThere { seen, of });
                Ok(Done::Yes)
            }
            Action::DeleteJob(job, fence) => {
                let Some(there) = self.jobs.get(job).filter(|it| it.seen.fence == *fence) else {
                    return Ok(Done::No);
                };
                if job.kind.migrates() && there.seen.state == JobState::Running {
                    return Err(format!("P5: {job:?} is stopped while it migrates"));
                }
                self.jobs.remove(job);
                Ok(Done::Yes)
            }
        }
    }

    fn apply(
        &mut self,
        who: usize,
        stack: &Stack,
        service: Service,
        part: Part,
        replicas: u32,
        fence: Option<&Fence>,
    ) -> Result<bool, String> {
        let new = self.fence();
        let there = self
            .stacks
            .entry(stack.clone())
            .or_default()
            .services
            .entry(service)
            .or_default();
        if fence.is_none()
            && there.stripped.remove(&part)
            && let Some(found) = there.parts.get_mut(&part)
        {
            // Its labels are put back, and nothing else.
            found.intact = false;
            found.fence.resource_version = new.resource_version;
            return Ok(true);
        }
        let new = match (there.parts.get(&part), fence) {
            (None, None) => new,
            (Some(there), Some(fence)) if there.fence == *fence => Fence {
                uid: there.fence.uid.clone(),
                resource_version: new.resource_version,
            },
            _ => {
                self.forget_empty();
                return Ok(false);
            }
        };
        let before = there.replicas;
        there.stripped.remove(&part);
        there.parts.insert(
            part,
            PartSeen {
                fence: new,
                intact: true,
            },
        );
        if part == Part::Workload {
            there.replicas = replicas;
            there.edit(None);
            let live = self.status.live.as_ref().is_some_and(|live| live.stack == *stack);
            let declared = u32::try_from(self.declared_at_guard[who].services.get(service).replicas).unwrap();
            if replicas == 0 || (live && replicas < before.min(declared)) {
                return Err(format!(
                    "P3: the live stack was scaled from {before} to {replicas}"
                ));
            }
        }
        Ok(true)
    }

    fn forget_empty(&mut self) {
        self.stacks.retain(|_, stack| {
            stack
                .services
                .retain(|_, it| it.parts.len() > it.stripped.len() || !it.pods.is_empty());
            stack.rendered.is_some() || !stack.services.is_empty()
        });
    }

    fn after_point(
        &self,
        who: usize,
        service: Service,
        to: Option<&Stack>,
        epoch: u32,
        intent: Intent,
    ) -> Result<(), String> {
        if let Some(to) = to {
            if !self.is_proven(to) {
                return Err(format!("P3: {service} points at {to}, which is not proven"));
            }
            // What is left and gets the traffic all the same: what was before it cannot serve.
            let forced = intent == Intent::Promote && self.status.is_forced(to);
            if intent == Intent::Promote && !forced && self.has_been_changed(who, to) {
                return Err(format!(
                    "P3: {service} points at {to}, of which other pods have been tested"
                ));
            }
            // All services or none: each that has not been moved has to have somewhere to go.
            let to_move = self
                .live
                .iter()
                .filter(|(other, live)| {
                    let moved = live.epoch == epoch && live.target.is(Some(to));
                    **other == service || (intent == Intent::Promote && !moved)
                })
                .map(|(other, _)| *other);
            for other in to_move {
                let (ready, replicas) = self.at_guard[who]
                    .get(&(to.clone(), other))
                    .copied()
                    .unwrap_or((0, 0));
                // Back, or without a way back, nobody may lose anything by it.
                let served = |there: &Stack| {
                    let has = self.at_guard[who].get(&(there.clone(), other));
                    there != to && has.is_some_and(|(ready, _)| *ready > 0)
                };
                let loses = match self.pointed_at_guard[who].get(&other) {
                    Some(Target::Stack(there)) => served(there),
                    Some(Target::Nothing) => false,
                    Some(Target::Foreign) => self.live[&other].led.as_ref().is_some_and(served),
                    None => true,
                };
                if !loses && (forced || intent == Intent::RollBack) {
                    continue;
                }
                if ready == 0 || (intent == Intent::Promote && !forced && ready < replicas) {
                    return Err(format!(
                        "P3: {service} points at {to}, which had {ready} of {replicas} endpoints for {other}"
                    ));
                }
            }
        }
        let moving = matches!(self.status.phase, Phase::Promoting | Phase::RollingBack);
        // Who was asleep while the object was created again writes what was right before: to where the traffic is.
        if !moving && !self.orphaned {
            let live = self.status.live.as_ref().map(|live| &live.stack);
            if to != live {
                return Err(format!(
                    "P4: {service} was pointed at {to:?} ({intent:?}) while {live:?} is live"
                ));
            }
        }
        Ok(())
    }

    /// What has all live Services is kept as what is live is, whatever becomes of its pods.
    fn after_move(&mut self, to: Option<&Stack>, epoch: u32) {
        let there = |service| {
            let live = self.live.get(service);
            live.is_some_and(|live| live.epoch == epoch && live.target.is(to))
        };
        let origin = to.and_then(|to| Some((to.clone(), self.stacks.get(to)?.origin.clone()?)));
        if let Some(origin) = origin.filter(|_| Service::ALL.iter().all(there)) {
            self.proven.insert(origin, u32::MAX);
        }
    }

    fn after_delete(&self, who: usize, stack: &Stack, service: Service, part: Part) -> Result<(), String> {
        if part == Part::Autoscaler {
            return Ok(());
        }
        // Also the traffic that somebody else has sent there.
        if self.pointed_at_guard[who].values().any(|it| it.is(Some(stack))) {
            return Err(format!(
                "P1: {part:?} of {service} of {stack} was deleted, which had traffic"
            ));
        }
        if self.status.live.as_ref().is_some_and(|live| live.stack == *stack) {
            return Err(format!(
                "P5: {part:?} of {service} of the live {stack} was deleted"
            ));
        }
        if let Some(previous) = &self.status.previous
            && previous.stack == *stack
            && previous.state != PreviousState::Retiring
        {
            return Err(format!(
                "P5: {part:?} of {service} of the way back {stack} was deleted"
            ));
        }
        let pods = self
            .stacks
            .get(stack)
            .map_or(0, |it| it.services.values().map(|it| it.pods.len()).sum());
        // A sleeper may start pods of a stack that never had traffic: nobody is connected to them.
        if part == Part::ColourService && pods > 0 && self.is_proven(stack) {
            return Err(format!(
                "P1: the colour Service of {stack} was deleted while pods are left"
            ));
        }
        if self
            .live
            .values()
            .any(|live| !live.tampered && live.target.is(Some(stack)))
        {
            return Err(format!(
                "P3: {part:?} of {stack} was deleted while a live Service points at it"
            ));
        }
        Ok(())
    }

    /// Nothing may be left that reads the old schema: no pod of another stack, no way back.
    fn may_contract(&self, job: &Job) -> Result<(), String> {
        let live = self
            .status
            .live
            .as_ref()
            .is_some_and(|live| live.stack == job.stack);
        let others = self.stacks.iter().any(|(stack, there)| {
            *stack != job.stack
                && there
                    .services
                    .values()
                    .any(|it| !it.pods.is_empty() || it.replicas > 0)
        });
        if !live || others || self.status.previous.is_some() {
            return Err(format!(
                "P5: the schema is contracted for {} too early",
                job.stack
            ));
        }
        Ok(())
    }
}

/// Nothing may be left that needs the old schema, and what the live version does not need is gone.
fn may_expand(status: &Status) -> Result<(), String> {
    let due = status.live.as_ref().filter(|it| it.verified && !it.contracted);
    match due {
        Some(live) => Err(format!(
            "P5: the schema is expanded before it is contracted for {}",
            live.stack
        )),
        None if status.previous.is_some() || status.contract.is_some() => {
            Err("P5: the schema is expanded while the old stack or its contract is there".to_owned())
        }
        None => Ok(()),
    }
}

/// What belongs to one object as it is in `rest`, and the object as it is in `object`.
fn with_object_of(object: &Observed, rest: &Observed) -> Observed {
    let Observed {
        generation,
        deleting,
        requests,
        status,
        declared,
        ..
    } = object.clone();
    Observed {
        generation,
        deleting,
        requests,
        status,
        declared,
        ..rest.clone()
    }
}

/// How people can name what they mean.
pub(crate) struct Names {
    pub(crate) candidate: Option<String>,
    pub(crate) live: Option<String>,
    pub(crate) rejected: Option<String>,
}
