//! The `ExchangeDeployment` resource: what a user declares. `status` is in [`crate::status`].
//!
//! Everything here is read by people through `kubectl explain`, so each field says what it does, and
//! each rule says in words what is wrong and what to write instead. Defaults live in the schema and
//! are never changed within an API version.

#![expect(
    unreachable_pub,
    reason = "KubeSchema repeats each struct inside a function, where nobody can reach it"
)]

use std::{collections::BTreeMap, time};

use k8s_openapi::{
    api::core::v1::{
        EnvFromSource, EnvVar, LocalObjectReference, ResourceRequirements, Toleration,
        TopologySpreadConstraint,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{CustomResource, CustomResourceExt, KubeSchema, core::Duration};
use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::status::{Colour, ExchangeDeploymentStatus, Outcome, Phase, PreviousState, Reason};

/// API group of the resource, and prefix of every label and annotation of the operator.
pub const GROUP: &str = "exchange.dev";

/// This version of the exchange should be live here.
///
/// The operator stands the version up beside the live one, migrates, tests, moves the traffic of all
/// services at once, verifies, and drains and keeps the old version as the way back.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "exchange.dev",
    version = "v1alpha1",
    kind = "ExchangeDeployment",
    plural = "exchangedeployments",
    shortname = "exd",
    category = "all",
    namespaced,
    status = "ExchangeDeploymentStatus",
    derive = "PartialEq",
    doc = "This version of the exchange should be live here. The operator stands it up beside the live version, migrates, tests, moves the traffic of all services at once, verifies, drains, and keeps the old version as the way back.",
    cel,
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Live", type_ = "string", json_path = ".status.live.version"),
    printcolumn(name = "Colour", type_ = "string", json_path = ".status.live.colour"),
    printcolumn(name = "Target", type_ = "string", json_path = ".spec.version"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Candidate",
        type_ = "string",
        json_path = ".status.candidate.version",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    printcolumn(
        name = "Rollback-Until",
        type_ = "string",
        json_path = ".status.rollbackUntil",
        priority = 1
    ),
    validation = Rule::new("self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must be at most 40 characters: lower-case letters, digits and '-', starting with a letter and not ending with '-'"),
    validation = Rule::new("!self.metadata.name.endsWith('-blue') && !self.metadata.name.endsWith('-green')")
        .message("metadata.name must not end in -blue or -green: the operator adds the colour to it to name the services of a stack"),
    validation = Rule::new("!has(oldSelf.status) || (!has(oldSelf.status.live) && (!has(oldSelf.status.phase) || !(oldSelf.status.phase in ['Promoting', 'RollingBack']))) || self.spec.database.secretRef == oldSelf.spec.database.secretRef")
        .message("spec.database.secretRef cannot be changed while an exchange is live: change the content of the Secret to rotate a password, or create another ExchangeDeployment for another database"),
    validation = Rule::new("!has(oldSelf.status) || (!has(oldSelf.status.live) && (!has(oldSelf.status.phase) || !(oldSelf.status.phase in ['Promoting', 'RollingBack']))) || self.spec.queue.secretRef == oldSelf.spec.queue.secretRef")
        .message("spec.queue.secretRef cannot be changed while an exchange is live: change the content of the Secret instead"),
    validation = Rule::new("!has(oldSelf.status) || (!has(oldSelf.status.live) && (!has(oldSelf.status.phase) || !(oldSelf.status.phase in ['Promoting', 'RollingBack']))) || self.spec.marketData.secretRef == oldSelf.spec.marketData.secretRef")
        .message("spec.marketData.secretRef cannot be changed while an exchange is live: change the content of the Secret instead"),
)]
pub struct ExchangeDeploymentSpec {
    /// The version that should be live. It is the tag of the images unless a digest is given, and is
    /// what people see everywhere.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[0-9A-Za-z]([0-9A-Za-z._-]*[0-9A-Za-z])?$')")
        .message("version must consist of letters, digits, '.', '_' and '-', and start and end with a letter or digit, for example 1.5.0"))]
    pub version: String,

    /// Repository of the image, without tag or digest, for example `ghcr.io/acme/exchange`.
    #[schemars(length(min = 1, max = 255))]
    #[x_kube(validation = Rule::new("self.matches('^([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$')")
        .message("image must be a repository, in lower case, without tag or digest, for example ghcr.io/acme/exchange: the tag is spec.version, a digest goes into imageDigest"))]
    pub image: String,

    /// Digest of the image, `sha256:…`. When given it is pulled by digest, and the version is only a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    #[x_kube(validation = Rule::new("self.matches('^sha256:[a-f0-9]{64}$')")
        .message("imageDigest must be sha256: followed by 64 hexadecimal digits in lower case"))]
    pub image_digest: Option<String>,

    /// Secrets of this namespace used to pull the images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<LocalObjectReference>,

    /// The three services of the exchange. They are released together, as one stack.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub services: Services,

    /// The PostgreSQL database, the record of everything.
    pub database: Database,

    /// The message queue (NATS JetStream).
    pub queue: Store,

    /// The market data store (Redis protocol).
    pub market_data: Store,

    /// How a new version becomes the live one.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub rollout: Rollout,

    /// Start nothing new: no candidate, no promotion, no retirement. A swap that has begun is finished
    /// in its time, a rollback still works, the live stack is still repaired; other deadlines, and the retention,
    /// stand still.
    #[serde(default)]
    pub suspend: bool,
}

/// The services of the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Service {
    /// Registration, log-in, profiles.
    User,
    /// Accounts, orders, trades: the only writer of money.
    Trade,
    /// Messages to users.
    Notification,
}

impl Service {
    /// All services, in the order in which their traffic is moved.
    pub const ALL: [Self; 3] = [Self::User, Self::Trade, Self::Notification];

    /// Name as it is in the spec, in object names and in labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Trade => "trade",
            Self::Notification => "notification",
        }
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The three services of the exchange.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Services {
    /// Registration, log-in, profiles.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub user: ServiceSpec,
    /// Accounts, orders, trades: the only writer of money.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub trade: ServiceSpec,
    /// Messages to users.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub notification: ServiceSpec,
}

impl Services {
    /// What is declared for one service.
    pub const fn get(&self, service: Service) -> &ServiceSpec {
        match service {
            Service::User => &self.user,
            Service::Trade => &self.trade,
            Service::Notification => &self.notification,
        }
    }
}

/// How one service runs. Replicas and autoscaling apply to the live stack at once, unless they are changed together with
/// something else: every other field is part of the revision, so that a change of it is a release, and what comes with it
/// waits for its promotion.
#[derive(Clone, Debug, PartialEq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.autoscaling) || (self.autoscaling.minReplicas <= self.replicas && self.replicas <= self.autoscaling.maxReplicas)")
        .message("replicas must lie between autoscaling.minReplicas and autoscaling.maxReplicas: a stack starts with it, the autoscaler takes over when the stack is live"),
    validation = Rule::new("!has(self.imageDigest) || has(self.image)")
        .message("imageDigest of a service needs an image of that service beside it"),
)]
pub struct ServiceSpec {
    /// Number of pods. With autoscaling: the number a stack starts with.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = 100))]
    pub replicas: i32,

    /// Scales the live stack by CPU use, in percent of what `resources.requests.cpu` or a LimitRange gives: without one of them the
    /// autoscaler does nothing. A candidate gets as many pods as the live stack has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,

    /// Repository of the image for this service, instead of `spec.image`; the version is the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 255))]
    #[x_kube(validation = Rule::new("self.matches('^([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$')")
        .message("image must be a repository, in lower case, without tag or digest, for example ghcr.io/acme/exchange-trade: the tag is spec.version, a digest goes into imageDigest"))]
    pub image: Option<String>,

    /// Digest of the image of this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    #[x_kube(validation = Rule::new("self.matches('^sha256:[a-f0-9]{64}$')")
        .message("imageDigest must be sha256: followed by 64 hexadecimal digits in lower case"))]
    pub image_digest: Option<String>,

    /// CPU and memory of each pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,

    /// Environment variables. Values may come from ConfigMaps and Secrets: their content is part of the
    /// revision, and is copied for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), transform = bound_env)]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["name".into()]),
        validation = Rule::new("self.all(e, e.name.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$'))")
            .message("the name of an environment variable consists of letters, digits, '_', '-' and '.', and does not start with a digit"),
        validation = Rule::new("self.all(e, !has(e.value) || e.value == '' || !has(e.valueFrom))")
            .message("an environment variable has a value or a valueFrom, not both"),
        validation = Rule::new("self.all(e, !has(e.valueFrom) || [has(e.valueFrom.configMapKeyRef), has(e.valueFrom.secretKeyRef), has(e.valueFrom.fieldRef), has(e.valueFrom.resourceFieldRef)].filter(from, from).size() == 1 && !has(e.valueFrom.fileKeyRef))")
            .message("valueFrom names exactly one configMapKeyRef, secretKeyRef, fieldRef or resourceFieldRef"),
        validation = Rule::new("self.all(e, !e.name.startsWith('EXCHANGE_STACK_') && !(e.name in ['EXCHANGE_COLOUR', 'EXCHANGE_REVISION', 'EXCHANGE_ROLE', 'EXCHANGE_LIVE_URL', 'EXCHANGE_DRAIN_TIMEOUT', 'EXCHANGE_DATABASE_URL', 'EXCHANGE_DATABASE_URL_FILE', 'EXCHANGE_QUEUE_URL', 'EXCHANGE_QUEUE_URL_FILE', 'EXCHANGE_MARKET_DATA_URL', 'EXCHANGE_MARKET_DATA_URL_FILE', 'EXCHANGE_LANE_SECRET', 'EXCHANGE_LANE_SECRET_FILE', 'EXCHANGE_PUBLIC_ADDRESS', 'EXCHANGE_ADMIN_ADDRESS']))")
            .message("the operator itself sets EXCHANGE_STACK_…, and the colour, revision, role, addresses, stores and lane of a pod: leave them out of env"),
    )]
    pub env: Vec<EnvVar>,

    /// ConfigMaps and Secrets whose keys become environment variables. Their content is part of the
    /// revision, and is copied for it. What the operator itself sets they cannot change: with a URL of a store
    /// or the secret of the lane in them nothing is begun.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(validation = Rule::new("self.all(e, has(e.configMapRef) != has(e.secretRef))")
        .message("each entry of envFrom names exactly one configMapRef or secretRef"))]
    pub env_from: Vec<EnvFromSource>,

    /// ConfigMaps and Secrets mounted as files, read-only. Their content is part of the revision, and is
    /// copied for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["mountPath".into()]))]
    pub files: Vec<FileSource>,

    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<Toleration>,

    /// How the pods spread over nodes and zones. Without it: evenly over nodes and zones where that is possible.
    /// A constraint without a selector is about the pods of this service in their own stack.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,

    /// Priority class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
}

impl Default for ServiceSpec {
    fn default() -> Self {
        Self {
            replicas: default_replicas(),
            autoscaling: None,
            image: None,
            image_digest: None,
            resources: None,
            env: Vec::new(),
            env_from: Vec::new(),
            files: Vec::new(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            topology_spread_constraints: Vec::new(),
            priority_class_name: None,
        }
    }
}

const fn default_replicas() -> i32 {
    2
}

/// Limits what the rules on environment variables may have to look at: the API server refuses rules whose cost it
/// cannot bound.
fn bound_env(schema: &mut schemars::Schema) {
    for (field, limit) in [("name", 253), ("value", 8192)] {
        let field = format!("/items/properties/{field}");
        if let Some(Value::Object(field)) = schema.pointer_mut(&field) {
            field.insert("maxLength".to_owned(), limit.into());
        }
    }
}

/// Scales the live stack by CPU use.
#[derive(Clone, Debug, PartialEq, Eq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas")
    .message("minReplicas must not be greater than maxReplicas"))]
pub struct Autoscaling {
    /// Never fewer pods than this.
    #[schemars(range(min = 1, max = 100))]
    pub min_replicas: i32,
    /// Never more pods than this.
    #[schemars(range(min = 1, max = 100))]
    pub max_replicas: i32,
    /// Wanted CPU use, in percent of the requested CPU.
    #[serde(rename = "targetCPUUtilizationPercentage", default = "default_cpu")]
    #[schemars(range(min = 1, max = 100))]
    pub target_cpu_utilization_percentage: i32,
}

const fn default_cpu() -> i32 {
    70
}

/// A ConfigMap or Secret mounted as files.
#[derive(Clone, Debug, PartialEq, Eq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.configMap) != has(self.secret)")
    .message("each entry of files names exactly one configMap or secret"))]
pub struct FileSource {
    /// Folder in the container; each key of the source is a file in it.
    #[schemars(length(min = 2, max = 255))]
    #[x_kube(validation = Rule::new("self.startsWith('/') && !self.contains('..') && !self.contains(':') && !self.matches('/[.](/|$)')")
        .message("mountPath must be an absolute path without '.' and '..' as folders and without ':'"))]
    #[x_kube(validation = Rule::new("!self.matches('^/+etc/+exchange(/.*)?$')")
        .message("mountPath must not be below /etc/exchange: the operator mounts the stores there"))]
    #[x_kube(validation = Rule::new("!self.matches('^/+(tmp|etc)?/*$')")
        .message("mountPath must not be /, /etc or /tmp, where the operator mounts something: choose a folder of its own, for example /etc/templates"))]
    pub mount_path: String,
    /// Name of a ConfigMap of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub config_map: Option<String>,
    /// Name of a Secret of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret: Option<String>,
}

/// One key of a Secret of this namespace.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in the Secret; its value is a URL.
    #[serde(default = "default_key")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn default_key() -> String {
    "url".to_owned()
}

/// The PostgreSQL database.
#[derive(Clone, Debug, PartialEq, Eq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.migrationSecretRef) || self.migrationSecretRef.name != self.secretRef.name || self.migrationSecretRef.key != self.secretRef.key")
    .message("migrationSecretRef must differ from secretRef: leave it out when the services may change the schema themselves"))]
pub struct Database {
    /// URL with which the services work. Mounted as a file and read again at each reconnect: a rotated
    /// password is no release.
    pub secret_ref: SecretKey,
    /// URL of the schema's owner, used only by the migration Jobs; pods of services never get it. Without it
    /// the migrations use `secretRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_secret_ref: Option<SecretKey>,
}

/// A store that the exchange uses.
#[derive(Clone, Debug, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Store {
    /// URL of the store. Mounted as a file and read again at each reconnect: a rotated password is no release.
    pub secret_ref: SecretKey,
}

/// How a new version becomes the live one.
#[derive(Clone, Debug, PartialEq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Where this version runs.
    #[serde(default)]
    pub colour: ColourChoice,

    /// Whether a tested version goes live by itself or waits for a person.
    #[serde(default)]
    pub promotion: Promotion,

    /// How long each phase from `Migrating` on may take, up to the swap itself (`Pending` has no limit); the tests as long as the longest of
    /// their timeouts, if that is longer. Stands still while waiting for a person, and while paused or suspended,
    /// unless the traffic moves. The Jobs have it as their own deadline, from when each begins, which does not stand still.
    #[serde(default = "default_progress_deadline")]
    #[schemars(length(max = 32), extend("default" = "10m"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("progressDeadline must be a duration such as 90s, 10m or 1h30m"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || (duration(self) >= duration('10s') && duration(self) <= duration('24h'))")
            .message("progressDeadline must lie between 10s and 24h"),
    )]
    pub progress_deadline: Duration,

    /// Tests that run as Jobs against the candidate's own addresses, beside the built-in smoke test. All must
    /// pass before the swap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub smoke_tests: Vec<SmokeTest>,

    /// What is watched after the swap. Failing it swaps back.
    #[serde(default)]
    #[schemars(extend("default" = {}))]
    pub verification: Verification,

    /// How long the old stack stays as the way back, if its colour is not needed before. Counted from the swap, at which it is
    /// set: a change is for later swaps. `kubectl exchange pause` keeps what is there for longer.
    #[serde(default = "default_retention")]
    #[schemars(length(max = 32), extend("default" = "1h"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("retention must be a duration such as 90s, 10m or 1h30m"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || duration(self) <= duration('720h')")
            .message("retention must be at most 720h"),
    )]
    pub retention: Duration,

    /// How long the old stack may take to finish its connections before it is cut off. Pods are told once, when
    /// their stack is made: a change is for the stacks of later releases. What runs already closes its connections
    /// after the time that it was made with; only how long the operator waits for that follows at once.
    #[serde(default = "default_drain_timeout")]
    #[schemars(length(max = 32), extend("default" = "5m"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("drainTimeout must be a duration such as 90s, 10m or 1h30m"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || (duration(self) >= duration('10s') && duration(self) <= duration('24h'))")
            .message("drainTimeout must lie between 10s and 24h"),
    )]
    pub drain_timeout: Duration,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            colour: ColourChoice::default(),
            promotion: Promotion::default(),
            progress_deadline: default_progress_deadline(),
            smoke_tests: Vec::new(),
            verification: Verification::default(),
            retention: default_retention(),
            drain_timeout: default_drain_timeout(),
        }
    }
}

fn default_progress_deadline() -> Duration {
    time::Duration::from_mins(10).into()
}

fn default_retention() -> Duration {
    time::Duration::from_hours(1).into()
}

fn default_drain_timeout() -> Duration {
    time::Duration::from_mins(5).into()
}

/// Where a version runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ColourChoice {
    /// The colour that is not live.
    #[default]
    Auto,
    /// Blue, which no new version can be declared for while it is live.
    Blue,
    /// Green, likewise.
    Green,
}

impl ColourChoice {
    /// The declared colour, if one is.
    pub const fn fixed(self) -> Option<Colour> {
        match self {
            Self::Auto => None,
            Self::Blue => Some(Colour::Blue),
            Self::Green => Some(Colour::Green),
        }
    }
}

/// Who promotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Promotion {
    /// A version that has passed its gates goes live by itself.
    #[default]
    Automatic,
    /// A version that has passed its gates waits, without a deadline, until somebody approves exactly this
    /// stack and attempt with the annotation `exchange.dev/promote`.
    Manual,
}

/// A test that runs as a Job against the candidate's own addresses, where the pods of the trade service may run.
#[derive(Clone, Debug, PartialEq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SmokeTest {
    /// Name of the test.
    #[schemars(length(min = 1, max = 20))]
    #[x_kube(
        validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')")
            .message("the name of a smoke test consists of lower-case letters, digits and '-'"),
        validation = Rule::new("!(self in ['smoke', 'expand', 'contract', 'verify'])")
            .message("smoke, expand, contract and verify are the operator's own Jobs: choose another name for the test"),
    )]
    pub name: String,
    /// Image of the test, with tag or digest. Without it: the image of the candidate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 400))]
    #[x_kube(validation = Rule::new("self.matches('^([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[a-zA-Z0-9_][a-zA-Z0-9._-]*(@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})$')")
        .message("image of a test must be a repository, in lower case, with a tag or a digest, for example ghcr.io/acme/exchange-tests:1.0.0"))]
    pub image: Option<String>,
    /// Command and arguments. The addresses of the candidate are in EXCHANGE_STACK_USER_URL,
    /// EXCHANGE_STACK_TRADE_URL and EXCHANGE_STACK_NOTIFICATION_URL, its name in EXCHANGE_STACK_NAME. The test
    /// passes when the command ends with 0.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// CPU and memory of the test. Without it: 100m and 64Mi, and at most 1 and 512Mi unless it
    /// has an image of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// How long the test may take; after it, it has failed.
    #[serde(default = "default_test_timeout")]
    #[schemars(length(max = 32), extend("default" = "5m"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("timeout must be a duration such as 90s, 10m or 1h30m"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))")
            .message("timeout must lie between 1s and 24h"),
    )]
    pub timeout: Duration,
}

fn default_test_timeout() -> Duration {
    time::Duration::from_mins(5).into()
}

/// What is watched after the swap: the built-in smoke test through the live addresses, and the new stack's own
/// figures.
#[derive(Clone, Debug, PartialEq, Eq, KubeSchema, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    /// How long the new stack is watched: at least a second, since the operator records it as it was declared.
    #[serde(default = "default_verification")]
    #[schemars(length(max = 32), extend("default" = "60s"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("verification.duration must be a duration such as 90s, 10m or 1h30m"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || (duration(self) >= duration('1s') && duration(self) <= duration('24h'))")
            .message("verification.duration must lie between 1s and 24h"),
    )]
    pub duration: Duration,
    /// Highest share of answers with a status of 500 and above, per service, in percent.
    #[serde(default = "default_error_rate")]
    #[schemars(length(max = 8))]
    #[x_kube(validation = Rule::new("self.matches('^(100(\\\\.0+)?|[0-9]{1,2}(\\\\.[0-9]{1,3})?)%$')")
        .message("maxErrorRate must be a percentage between 0% and 100%, for example 0.5%"))]
    pub max_error_rate: String,
    /// Highest 99th percentile of the time to answer, per service, without event streams and log-ins. The pods
    /// count requests by steps of time (…, 250, 300, 400, 500, 750 ms, 1, 1.5, 2 s, …): the limit is broken when more than
    /// one request in a hundred has taken longer than the first step that is not below it.
    #[serde(rename = "maxLatencyP99", default = "default_latency")]
    #[schemars(length(max = 32), extend("default" = "500ms"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$')")
            .message("maxLatencyP99 must be a duration such as 250ms or 2s"),
        validation = Rule::new("!self.matches('^([0-9]+(\\\\.[0-9]+)?(ms|s|m|h))+$') || (duration(self) >= duration('1ms') && duration(self) <= duration('60s'))")
            .message("maxLatencyP99 must lie between 1ms and 60s"),
    )]
    pub max_latency_p99: Duration,
    /// With fewer requests of clients than this per service, their rate says nothing, and with fewer timed ones their
    /// latency: then only the smoke test decides.
    #[serde(default = "default_min_requests")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_requests: i32,
}

impl Default for Verification {
    fn default() -> Self {
        Self {
            duration: default_verification(),
            max_error_rate: default_error_rate(),
            max_latency_p99: default_latency(),
            min_requests: default_min_requests(),
        }
    }
}

impl Verification {
    /// `maxErrorRate` in thousandths of a percent. The schema admits at most three decimals.
    pub fn max_error_millipercent(&self) -> u64 {
        let number = self.max_error_rate.trim_end_matches('%');
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits: String = fraction.chars().chain("000".chars()).take(3).collect();
        let parse = |text: &str| text.parse::<u64>().unwrap_or(0);
        parse(whole) * 1000 + parse(&digits)
    }
}

fn default_verification() -> Duration {
    time::Duration::from_mins(1).into()
}

fn default_error_rate() -> String {
    "1%".to_owned()
}

fn default_latency() -> Duration {
    time::Duration::from_millis(500).into()
}

const fn default_min_requests() -> i32 {
    100
}

/// The CustomResourceDefinition as it is installed.
///
/// Derived schemas mark optional fields as nullable and integers with Rust's own formats. The first would let an
/// explicit `null` past the defaults, the second makes the API server warn: both are taken out.
pub fn crd() -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut value = serde_json::to_value(ExchangeDeployment::crd())?;
    let enumerations = [
        meanings(&schema_for!(ColourChoice)),
        meanings(&schema_for!(Promotion)),
        meanings(&schema_for!(Phase)),
        meanings(&schema_for!(PreviousState)),
        meanings(&schema_for!(Reason)),
        meanings(&schema_for!(Outcome)),
    ];
    each_object(&mut value, &|schema| {
        clean(schema);
        explain(schema, &enumerations);
    });
    // A status from the first moment on: without one, kstatus, and with it `helm --wait`, takes a new object for done.
    let status = "/spec/versions/0/schema/openAPIV3Schema/properties/status";
    if let Some(Value::Object(status)) = value.pointer_mut(status) {
        status.insert("default".to_owned(), serde_json::json!({"observedGeneration": 0}));
    }
    serde_json::from_value(value)
}

fn each_object(value: &mut Value, change: &impl Fn(&mut Map<String, Value>)) {
    match value {
        Value::Object(map) => {
            change(map);
            map.values_mut().for_each(|value| each_object(value, change));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| each_object(value, change)),
        _ => {}
    }
}

fn clean(schema: &mut Map<String, Value>) {
    schema.retain(|key, value| match key.as_str() {
        "nullable" => !value.is_boolean(),
        "format" => !value.as_str().is_some_and(|format| format.starts_with("uint")),
        _ => true,
    });
}

/// The values of an enumeration, each with what it means.
fn meanings(schema: &Schema) -> Vec<(Value, String)> {
    let values = schema
        .get("oneOf")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let meaning = |value: &Value| {
        let text = value.get("description")?.as_str()?;
        Some((value.get("const")?.clone(), text.replace('\n', " ")))
    };
    values.filter_map(meaning).collect()
}

/// Says of a field that has values of one of these enumerations what they mean: a structural schema has no other place for that
/// than the field's description.
fn explain(schema: &mut Map<String, Value>, enumerations: &[Vec<(Value, String)>]) {
    let values = schema.get("enum").and_then(Value::as_array);
    let known = enumerations.iter().find(|meanings| {
        values.is_some_and(|values| values.iter().eq(meanings.iter().map(|(value, _)| value)))
    });
    if let (Some(meanings), Some(Value::String(text))) = (known, schema.get_mut("description")) {
        for (value, meaning) in meanings {
            let value = value.as_str().unwrap_or_default();
            text.extend([" ", value, ": ", meaning]);
        }
    }
}

/// The CustomResourceDefinition as YAML, as it is kept in `crds/`.
pub fn crd_yaml() -> anyhow::Result<String> {
    let header = "# Generated by `exchange-operator crd`; do not edit.\n";
    Ok(format!("{header}{}", serde_yaml::to_string(&crd()?)?))
}
