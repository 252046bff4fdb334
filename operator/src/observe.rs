//! What is seen of one `ExchangeDeployment` and of everything that belongs to it, as plain data.
//!
//! Two facts come from places of their own, because others would lie: whether a stack can take traffic is read from
//! the EndpointSlices of its colour Services (a pod may be ready before the slice controller has seen it), and where
//! traffic goes is read from the live Services themselves.
//!
//! The object itself is read last, by a read that the API server answers from its store. What belongs to it is then
//! never newer than the record by which it is judged: whatever has been recorded since has changed either the object,
//! so that the next record is refused, or what is to be written, so that the write is.

mod assemble;
pub mod intact;
pub mod pods;
pub mod read;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

pub use assemble::Piece;
pub(crate) use assemble::{as_rendered, is_nobodys, is_ours, see_live};

use crate::{
    api::{Autoscaling, Service},
    status::{ExchangeDeploymentStatus, Stack},
};

/// Identity and version of an object as it was seen. Every write to it and every deletion carries both, so that
/// what has been decided about an older state of the object cannot happen to a newer one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// `metadata.uid`
    pub uid: Arc<str>,
    /// `metadata.resourceVersion`
    pub resource_version: Arc<str>,
}

/// What could not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What, and why: a clause.
    pub why: String,
    /// Whether it is a live Service, so that no traffic can be moved.
    pub traffic: bool,
}

/// Everything that is seen of one object in one pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Observed {
    /// `metadata.generation`
    pub generation: i64,
    /// Whether the object is being deleted: from then on nothing is written.
    pub deleting: bool,
    /// What people ask for by annotation.
    pub requests: Requests,
    /// What has been recorded.
    pub status: ExchangeDeploymentStatus,
    /// What the spec amounts to, or why that cannot be said: a reference that does not exist.
    pub declared: Result<Declared, String>,
    /// The live Services that exist.
    pub live: BTreeMap<Service, LiveService>,
    /// Every stack of which anything exists.
    pub stacks: BTreeMap<Stack, StackSeen>,
    /// Every Job of the operator.
    pub jobs: BTreeMap<Job, JobSeen>,
    /// Names that are needed and belong to somebody else.
    pub taken: Vec<String>,
    /// Names that are needed and belong to an object of the same name that was deleted: what is left of it goes.
    pub remains: Vec<String>,
    /// What could not be written when this operator last did what was to be done.
    pub refused: Option<Refused>,
    /// The stack that answered a row of new connections to every live Service, if all answers were the same.
    pub answers: Option<Stack>,
    /// The live stack's own figures since its swap, as far as they could be read.
    pub figures: BTreeMap<Service, Figures>,
    /// What pods or Services were asked and did not say, in words: another stack answers, or a page cannot be read.
    pub unheard: Option<String>,
    /// Whether this operator has already seen the whole of this phase of this attempt once before. What happened while
    /// no operator looked is judged only after the operator has had the chance to act on it.
    pub seen_before: bool,
}

impl Observed {
    /// Whether a live Service leads to this stack.
    pub fn reaches(&self, stack: &Stack) -> bool {
        let mut live = self.live.values();
        live.any(|it| it.target.is(Some(stack)) || it.endpoints.contains(stack))
    }

    /// Names that are needed and are not ours.
    pub fn others(&self) -> impl Iterator<Item = &String> {
        self.taken.iter().chain(&self.remains)
    }

    /// Whether nobody loses anything when the traffic of a service is on this stack: it has endpoints there, or its traffic is on no other
    /// stack that has any. Where somebody else's selector leads, its endpoints say.
    pub fn can_have(&self, service: Service, stack: &Stack) -> bool {
        self.ready(stack, service) > 0
            || self.live.get(&service).is_some_and(|live| match &live.target {
                Target::Nothing => true,
                Target::Stack(there) => there == stack || self.ready(there, service) == 0,
                Target::Foreign => live.endpoints.iter().all(|there| there == stack),
            })
    }

    /// Whether nobody loses anything when all of the traffic is on this stack.
    pub fn can_stay(&self, stack: &Stack) -> bool {
        let mut services = Service::ALL.into_iter();
        services.all(|service| self.can_have(service, stack))
    }

    /// Ready endpoints of a service of a stack.
    pub fn ready(&self, stack: &Stack, service: Service) -> u32 {
        self.stacks.get(stack).map_or(0, |seen| seen.ready(service))
    }

    /// Replicas of the workload of a service of a stack.
    pub fn replicas(&self, stack: &Stack, service: Service) -> u32 {
        let there = self.stacks.get(stack).and_then(|seen| seen.service(service));
        there.map_or(0, |seen| seen.replicas)
    }

    /// A service that has no live Service.
    pub fn missing_live(&self) -> Option<Service> {
        Service::ALL
            .into_iter()
            .find(|service| !self.live.contains_key(service))
    }

    /// Whether no name that is needed is somebody else's.
    pub fn is_free(&self) -> bool {
        self.others().next().is_none()
    }
}

/// What people ask for: `<revision>.<attempt>` of the stack that is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// `exchange.dev/promote`
    pub promote: Option<String>,
    /// `exchange.dev/abort`
    pub abort: Option<String>,
    /// `exchange.dev/rollback`
    pub rollback: Option<String>,
    /// `exchange.dev/retry`
    pub retry: Option<String>,
    /// `exchange.dev/pause`
    pub pause: Option<String>,
    /// `exchange.dev/by`: who asks.
    pub by: Option<String>,
}

/// What the spec amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Hash of everything that ends up in pods, the content of what is referenced included.
    pub revision: String,
    /// Hash of the declared gates, and of where the stores are found: `<gates>.<stores>`.
    pub gates: String,
}

impl Declared {
    /// Whether these are the declared gates. Those that an older operator has recorded say nothing of stores.
    pub fn has_gates(&self, recorded: &str) -> bool {
        let rest = self.gates.strip_prefix(recorded);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

/// One live Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveService {
    /// Its identity and version.
    pub fence: Fence,
    /// Where its selector points.
    pub target: Target,
    /// Number of the move that wrote the selector.
    pub epoch: u32,
    /// Whether everything beside its selector is as the operator writes it.
    pub intact: bool,
    /// The stacks whose pods its EndpointSlices list as ready.
    pub endpoints: Vec<Stack>,
}

/// Where the selector of a live Service points.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// At nothing, on purpose: nothing has been promoted yet.
    Nothing,
    /// At one stack.
    Stack(Stack),
    /// At something that the operator never writes.
    Foreign,
}

impl Target {
    /// The one stack that the selector points at.
    pub const fn stack(&self) -> Option<&Stack> {
        match self {
            Self::Stack(stack) => Some(stack),
            Self::Nothing | Self::Foreign => None,
        }
    }

    /// Whether the selector points at this stack, or at nothing if there is none.
    pub fn is(&self, stack: Option<&Stack>) -> bool {
        match (self, stack) {
            (Self::Nothing, None) => true,
            (Self::Stack(target), Some(stack)) => target == stack,
            _ => false,
        }
    }
}

/// What exists of one stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackSeen {
    /// The rendered stack, from which everything else is made and repaired.
    pub rendered: Option<Fence>,
    /// Whether all that its pods need beside their stores exists: the accounts, the lane's secret, the copies of
    /// ConfigMaps and Secrets.
    pub whole: bool,
    /// Whether it belongs to the object. What was left behind by one that was deleted without its children belongs to
    /// nobody.
    pub owned: bool,
    /// A store that it finds elsewhere than is declared now, in words.
    pub other_store: Option<String>,
    /// Attempt for which it was rendered.
    pub attempt: u32,
    /// Version of the rendered stack.
    pub version: String,
    /// What exists for each service.
    pub services: BTreeMap<Service, ServiceSeen>,
    /// Open public connections and requests over all pods; nothing if a pod did not say.
    pub open: Option<u64>,
    /// Which pod did not say, and why.
    pub unheard: Option<String>,
}

impl StackSeen {
    /// What is seen of one service.
    pub fn service(&self, service: Service) -> Option<&ServiceSeen> {
        self.services.get(&service)
    }

    /// Ready endpoints of one service.
    pub fn ready(&self, service: Service) -> u32 {
        self.service(service).map_or(0, |seen| seen.ready)
    }

    /// Pods of all services, terminating ones included.
    pub fn pods(&self) -> u32 {
        self.services.values().map(|seen| seen.pods).sum()
    }

    /// What the pods of all services are made of.
    pub fn templates(&self) -> String {
        let of_each =
            Service::ALL.map(|service| self.service(service).map_or("", |seen| seen.template.as_str()));
        of_each.join(".")
    }

    /// Whether every service has at least one ready endpoint.
    pub fn serves(&self) -> bool {
        Service::ALL.iter().all(|service| self.ready(*service) > 0)
    }

    /// Whether any service has a ready endpoint.
    pub fn serves_any(&self) -> bool {
        Service::ALL.iter().any(|service| self.ready(*service) > 0)
    }

    /// Whether every service has as many ready endpoints as its workload has replicas, and at least one.
    pub fn complete(&self) -> bool {
        Service::ALL.iter().all(|service| {
            self.service(*service)
                .is_some_and(|seen| seen.ready > 0 && seen.ready >= seen.replicas)
        })
    }
}

/// Kinds of objects that a stack has once per service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The Service of the colour: stays until the last pod is gone, else a data plane may cut connections.
    ColourService,
    /// The PodDisruptionBudget.
    Budget,
    /// The Deployment.
    Workload,
    /// The HorizontalPodAutoscaler, of the live stack only.
    Autoscaler,
}

/// What exists of one service of a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSeen {
    /// The objects that exist.
    pub parts: BTreeMap<Part, PartSeen>,
    /// Replicas of the workload, 0 without one.
    pub replicas: u32,
    /// What its autoscaler goes by, if it has one that goes by the use of CPU.
    pub autoscaling: Option<Autoscaling>,
    /// What the workload makes its pods of, as a hash; empty without one.
    pub template: String,
    /// Whether all its pods are made of that, as far as the workload's controller has told.
    pub current: bool,
    /// Ready endpoints with this revision in the slices of the colour Service.
    pub ready: u32,
    /// Pods, terminating ones included.
    pub pods: u32,
    /// What keeps a pod from starting, in words.
    pub trouble: Option<String>,
}

/// One object of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSeen {
    /// Its identity and version.
    pub fence: Fence,
    /// Whether it is as rendered; replicas are not compared.
    pub intact: bool,
}

/// One Job of the operator. Its name contains all of this, so that no result can be taken for another's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// What it does.
    pub kind: JobKind,
    /// For which stack.
    pub stack: Stack,
    /// In which attempt.
    pub attempt: u32,
}

/// What a Job does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobKind {
    /// Expand the schema, before the candidate starts.
    Expand,
    /// The built-in smoke test against the candidate's own addresses.
    Smoke,
    /// A test of the user's against the candidate's own addresses.
    Test(String),
    /// The built-in smoke test through the live addresses, after the swap.
    Verify,
    /// Contract the schema, after the old stack is gone.
    Contract,
}

impl JobKind {
    /// Whether it changes the schema.
    pub const fn migrates(&self) -> bool {
        matches!(self, Self::Expand | Self::Contract)
    }
}

/// A Job that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSeen {
    /// Its identity and version.
    pub fence: Fence,
    /// How it stands.
    pub state: JobState,
    /// What keeps its pod from starting, or how a try before has ended, in words.
    pub trouble: Option<String>,
    /// How far a migration is that runs: what it has said last.
    pub progress: Option<String>,
    /// Of a test: what the pods were made of for which it was begun ([`StackSeen::templates`]).
    pub of: Option<String>,
}

impl JobSeen {
    /// What is known of it beside its state, in words.
    pub fn told(&self) -> Option<String> {
        let told = [&self.trouble, &self.progress].into_iter().flatten();
        told.cloned()
            .reduce(|trouble, progress| format!("{trouble}; {progress}"))
    }
}

/// How a Job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Not finished.
    Running,
    /// Completed.
    Passed,
    /// Failed, terminated or timed out; and why, in words.
    Failed(String),
}

/// What the pods of one live service report since the swap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Answered requests of clients.
    pub requests: u64,
    /// Those with a status of 500 and above.
    pub errors: u64,
    /// Those whose time counts: without log-ins and event streams.
    pub timed: u64,
    /// What the 99th percentile of their time to answer exceeds for certain: the lower bound of its bucket in the pods'
    /// histograms.
    pub p99_over: Duration,
}
