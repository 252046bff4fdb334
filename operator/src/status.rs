//! `status` of an `ExchangeDeployment`: what the operator has recorded, and what it tells people.
//!
//! `phase`, `live`, `candidate`, `previous`, `rejected`, `contract`, `attempt`, `epoch`, `asked` and `handled` are the
//! operator's memory: each change of them is one update that carries the object's `resourceVersion`, and nothing
//! is done before the record that allows it. Conditions and `history` are for the readers.

#![expect(
    unreachable_pub,
    reason = "KubeSchema repeats each struct inside a function, where nobody can reach it"
)]

use std::fmt;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::{Autoscaling, ExchangeDeploymentSpec, Service, ServiceSpec, Verification};

/// More attempts no object comes to, whatever people ask for.
const MOST_ATTEMPTS: u32 = 1_000_000;

/// One of the two places where a stack can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Colour {
    /// Blue, where a first version runs unless it says otherwise.
    Blue,
    /// Green.
    Green,
}

impl Colour {
    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Blue => Self::Green,
            Self::Green => Self::Blue,
        }
    }

    /// Name in object names, labels and headers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Blue => "blue",
            Self::Green => "green",
        }
    }
}

impl fmt::Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the release of the declared version stands.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Phase {
    /// Nothing of the declared version exists yet: the other colour is being freed, or something is missing.
    #[default]
    Pending,
    /// The expand migration runs.
    Migrating,
    /// The candidate's pods start.
    Provisioning,
    /// The candidate is ready; its tests run.
    Testing,
    /// All gates are passed; a person has to approve.
    AwaitingPromotion,
    /// The live Services are being moved to the candidate.
    Promoting,
    /// The declared version is live and is being watched; failing it swaps back.
    Verifying,
    /// The declared version is live and verified.
    Live,
    /// The live Services are being moved back to the previous stack.
    RollingBack,
    /// The declared version was given up before its swap, or in it if it was the first; what was live still is.
    Failed,
    /// The declared version was given up when traffic had been moved to it; what was live before is again, if it could serve.
    Held,
}

impl Phase {
    /// Whether traffic moves in it. What has begun to move is brought to its end, also paused or suspended.
    pub const fn moves(self) -> bool {
        matches!(self, Self::Promoting | Self::RollingBack)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What has been recorded and what is reported.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExchangeDeploymentStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Where the release of the declared version stands.
    #[serde(default)]
    pub phase: Phase,
    /// Since when this phase lasts. Moved forward by the time spent paused or suspended, unless traffic moves in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub phase_since: Option<Timestamp>,
    /// The stack that should have the traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
    /// The stack that is being built, tested or promoted; while the traffic goes back, the one that it leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<Candidate>,
    /// The stack that was live before: the way back until it is retired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// Until when there is a way back to the stack that was live before, if its colour is not needed earlier. Missing if there
    /// is none, and while its time stands still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub rollback_until: Option<Timestamp>,
    /// The release that was given up and is not tried again until the spec changes or somebody asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<Rejected>,
    /// The contract migration that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<Contract>,
    /// Hash of the gates that were declared when that could last be said: a missing reference does not change them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub gates: String,
    /// How the release under way is verified: as was declared with it. What another declaration says does not count for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// Number of the last attempt. Never reset.
    #[serde(default)]
    pub attempt: u32,
    /// Number of the last move of the live Services. Each of them carries the number of the move that wrote it.
    #[serde(default)]
    pub epoch: u32,
    /// Since when something lacks that the spec refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub missing_since: Option<Timestamp>,
    /// Since when the release is paused or suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub stopped_since: Option<Timestamp>,
    /// Annotations that ask for something, and who has asked for it.
    #[serde(default, skip_serializing_if = "Asked::is_empty")]
    pub asked: Asked,
    /// Annotations that have been acted upon.
    #[serde(default, skip_serializing_if = "Handled::is_empty")]
    pub handled: Handled,
    /// What was live when, how it ended, who acted; the latest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub history: Vec<HistoryEntry>,
    /// Ready, Available, Reconciling, Stalled, CandidateReady, SchemaReady, SmokeTestsPassed, RollbackAvailable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

impl ExchangeDeploymentStatus {
    /// Whether the operator has not recorded anything yet: what is there then are the schema's defaults.
    pub fn is_unrecorded(&self) -> bool {
        self.observed_generation.is_none_or(|generation| generation == 0)
    }

    /// How the release under way is verified.
    pub fn verification<'a>(&'a self, spec: &'a ExchangeDeploymentSpec) -> &'a Verification {
        self.verification.as_ref().unwrap_or(&spec.rollout.verification)
    }

    /// Whether a stack gets the traffic because the one before it cannot serve: there is no way back from this move.
    pub fn is_forced(&self, stack: &Stack) -> bool {
        let candidate = self.candidate.as_ref().filter(|it| it.stack == *stack);
        candidate.is_some_and(|it| it.forced)
    }

    /// The stacks that are recorded: what is live, the candidate, and what was live before.
    pub fn stacks(&self) -> impl Iterator<Item = &Stack> {
        let live = self.live.as_ref().map(|it| &it.stack);
        let candidate = self.candidate.as_ref().map(|it| &it.stack);
        let previous = self.previous.as_ref().map(|it| &it.stack);
        [live, candidate, previous].into_iter().flatten()
    }
}

/// A stack: all services of one revision in one colour.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stack {
    /// Where it runs.
    pub colour: Colour,
    /// Hash of everything declared that ends up in its pods.
    pub revision: String,
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.colour, self.revision)
    }
}

/// The stack that should have the traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Live {
    /// Which stack.
    #[serde(flatten)]
    pub stack: Stack,
    /// Its version.
    pub version: String,
    /// The attempt in which it passed its gates.
    pub attempt: u32,
    /// Since when it is live.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// Whether the smoke test through the live addresses has passed in this attempt. Its Job is not needed any more.
    #[serde(default)]
    pub smoke_passed: bool,
    /// Whether it has passed the verification after its swap.
    #[serde(default)]
    pub verified: bool,
    /// Whether its contract migration has come to an end.
    #[serde(default)]
    pub contracted: bool,
    /// Why its contract migration has failed, if it has: its Job does not stay for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract_failed: Option<String>,
    /// Since when, while it is verified, a service of it has had no ready endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub unserved_since: Option<Timestamp>,
    /// Replicas and autoscaling that are declared for it. What has come with another revision waits for that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
}

impl Live {
    /// A stack that gets the traffic now: nothing has been found out about it in this place.
    pub const fn new(stack: Stack, version: String, attempt: u32, since: Timestamp) -> Self {
        Self {
            stack,
            version,
            attempt,
            since,
            smoke_passed: false,
            verified: false,
            contracted: false,
            contract_failed: None,
            unserved_since: None,
            scale: None,
        }
    }
}

/// The stack that is being built, tested or promoted; while the traffic goes back, the one that it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// Which stack.
    #[serde(flatten)]
    pub stack: Stack,
    /// Its version.
    pub version: String,
    /// The attempt that is under way. Results of another attempt do not count.
    pub attempt: u32,
    /// Hash of the declared gates: another declaration of them is another attempt.
    pub gates: String,
    /// Replicas and autoscaling that were last declared with it. What came with it waits for its promotion; what is changed
    /// then applies to the stack that is live, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// What the pods of its services were made of when its tests began, as hashes of their templates. Other pods are another attempt:
    /// no test was about them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tested: Option<String>,
    /// Who approved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_by: Option<String>,
    /// While the traffic goes back from it: since when nobody would lose anything if all of it had gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub unneeded_since: Option<Timestamp>,
    /// The traffic should have gone back from it and could not, so that all of it goes there: that is finished, and leaves no way back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forced: bool,
}

/// What becomes of the stack that was live before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum PreviousState {
    /// It still has open connections or requests.
    Draining,
    /// It has nothing open and runs on.
    Retained,
    /// It is being removed: there is no way back any more.
    Retiring,
}

/// The stack that was live before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Previous {
    /// Which stack.
    #[serde(flatten)]
    pub stack: Stack,
    /// Its version.
    pub version: String,
    /// The attempt in which it passed its gates.
    pub attempt: u32,
    /// What becomes of it.
    pub state: PreviousState,
    /// Whether it can be swapped back to. What was rolled back from cannot, nor what could not serve when the traffic should have
    /// gone back to it, nor what was found beside what is live.
    pub way_back: bool,
    /// Whether it had passed the verification after its swap.
    pub verified: bool,
    /// Whether its contract migration had come to an end.
    pub contracted: bool,
    /// Since when it is not live any more.
    #[schemars(with = "Time")]
    pub since: Timestamp,
    /// Since when it has had no connection and no request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub idle_since: Option<Timestamp>,
    /// Until when it is retained, if its colour is not needed before.
    #[schemars(with = "Time")]
    pub until: Timestamp,
    /// Replicas and autoscaling that were declared for it: what it has again when it is live again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
}

impl Previous {
    /// Whether it can be swapped back to now: what is being removed cannot.
    pub fn leads_back(&self) -> bool {
        self.way_back && self.state != PreviousState::Retiring
    }
}

/// A release that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rejected {
    /// The stack that was given up.
    #[serde(flatten)]
    pub stack: Stack,
    /// Its version.
    pub version: String,
    /// The attempt that was given up.
    pub attempt: u32,
    /// Hash of the gates that were declared for it.
    pub gates: String,
    /// Why, as one word.
    pub reason: Reason,
    /// Why, as a sentence.
    pub message: String,
    /// Replicas and autoscaling that were last declared with it. What came with it waits for its promotion; only what is
    /// changed then applies to the stack that is live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// Until when what is left of it is kept for its logs.
    #[schemars(with = "Time")]
    pub until: Timestamp,
}

/// How many pods each service has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scale {
    /// The user service.
    pub user: ServiceScale,
    /// The trade service.
    pub trade: ServiceScale,
    /// The notification service.
    pub notification: ServiceScale,
}

/// How many pods a service has: a number, or what its autoscaler makes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceScale {
    /// Declared replicas.
    pub replicas: i32,
    /// Declared autoscaling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
}

impl Scale {
    /// As it is declared.
    pub fn declared(spec: &ExchangeDeploymentSpec) -> Self {
        let of = |service| {
            let ServiceSpec {
                replicas,
                autoscaling,
                ..
            } = spec.services.get(service);
            ServiceScale {
                replicas: *replicas,
                autoscaling: autoscaling.clone(),
            }
        };
        Self {
            user: of(Service::User),
            trade: of(Service::Trade),
            notification: of(Service::Notification),
        }
    }

    /// Of one service.
    pub const fn of(&self, service: Service) -> &ServiceScale {
        match service {
            Service::User => &self.user,
            Service::Trade => &self.trade,
            Service::Notification => &self.notification,
        }
    }

    /// Of one service, to be changed.
    pub const fn of_mut(&mut self, service: Service) -> &mut ServiceScale {
        match service {
            Service::User => &mut self.user,
            Service::Trade => &mut self.trade,
            Service::Notification => &mut self.notification,
        }
    }
}

/// Why a release was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Reason {
    /// The expand migration failed or was not done in time.
    MigrationFailed,
    /// The pods were not ready in time.
    ProgressDeadlineExceeded,
    /// A test failed or was not done in time.
    SmokeTestFailed,
    /// Somebody aborted it.
    Aborted,
    /// The swap could not be finished.
    PromotionFailed,
    /// The verification after the swap failed.
    VerificationFailed,
    /// Somebody asked for the way back.
    RolledBack,
    /// The way back was asked for and the previous stack could not serve.
    RollbackImpossible,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A contract migration that has been started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Contract {
    /// The live stack whose contract runs.
    #[serde(flatten)]
    pub stack: Stack,
    /// The attempt in which that stack passed its gates; part of the Job's name.
    pub attempt: u32,
}

/// What each annotation asks for, as it was first seen, and who had signed it then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    /// `exchange.dev/promote`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<Request>,
    /// `exchange.dev/abort`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Request>,
    /// `exchange.dev/rollback`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Request>,
    /// `exchange.dev/retry`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Request>,
    /// `exchange.dev/pause`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Request>,
}

impl Asked {
    /// Attempts that it is about, as far as there can be so many.
    pub(crate) fn attempts(&self) -> impl Iterator<Item = u32> {
        let all = [
            &self.promote,
            &self.abort,
            &self.rollback,
            &self.retry,
            &self.pause,
        ];
        let attempts = all.into_iter().flatten().filter_map(|request| {
            let (_, attempt) = request.value.rsplit_once('.')?;
            attempt.parse().ok()
        });
        attempts.filter(|attempt| *attempt < MOST_ATTEMPTS)
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Something that somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// The annotation's value: `<revision>.<attempt>` of the stack that is meant.
    pub value: String,
    /// `exchange.dev/by`, as it was then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// The last value of each annotation that was acted upon; the same value never acts twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Handled {
    /// `exchange.dev/promote`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promote: Option<String>,
    /// `exchange.dev/abort`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<String>,
    /// `exchange.dev/rollback`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<String>,
    /// `exchange.dev/retry`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<String>,
}

impl Handled {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How a stack came to its end, or what was done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Outcome {
    /// It became live.
    Promoted,
    /// It was verified.
    Verified,
    /// It was given up before it had all the traffic.
    Failed,
    /// It was live and was left for the stack before it.
    RolledBack,
    /// It was removed.
    Retired,
    /// Somebody asked for another attempt after it had been given up.
    Retried,
}

/// One line of the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// When.
    #[schemars(with = "Time")]
    pub at: Timestamp,
    /// Which stack.
    #[serde(flatten)]
    pub stack: Stack,
    /// Its version.
    pub version: String,
    /// Its attempt.
    pub attempt: u32,
    /// What happened.
    pub outcome: Outcome,
    /// Why, if there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Who asked for it or approved it: the value of the annotation `exchange.dev/by`, or `unverified` if nobody has signed; else `operator`, or `spec`.
    pub by: String,
}

/// `<revision>.<attempt>`: how people name exactly one try of exactly one stack.
pub fn token(stack: &Stack, attempt: u32) -> String {
    format!("{}.{attempt}", stack.revision)
}
