//! Everything that the operator creates, as manifests: pure functions of what is declared.
//!
//! A stack is rendered once. What is rendered is kept in a ControllerRevision, and all repairs are made from there.
//! Replicas are not part of it: they are set when a workload is applied.

use std::{
    collections::{BTreeMap, BTreeSet},
    time,
};

use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use kube::core::Duration;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::{
    api::{Autoscaling, ExchangeDeploymentSpec as Spec, SecretKey, Service, ServiceSpec},
    observe::{Job, JobKind, Part},
    revision::{Source, hex},
    status::{Colour, Live, Stack},
};

/// Field manager of every write.
pub const MANAGER: &str = "exchange-operator";
/// Label with the colour of a stack.
pub const COLOUR: &str = "exchange.dev/colour";
/// Label with the revision of a stack.
pub const REVISION: &str = "exchange.dev/revision";
/// Label with the attempt for which a Job runs.
pub const ATTEMPT: &str = "exchange.dev/attempt";
/// Label with what a Job does.
pub const JOB: &str = "exchange.dev/job";
/// Annotation of a live Service: the number of the move that wrote its selector.
pub const EPOCH: &str = "exchange.dev/epoch";
/// Annotation of a test's Job: what the pods were made of for which it was begun.
pub const TEMPLATES: &str = "exchange.dev/templates";
/// Revision in the selector of a live Service that points at nothing.
pub const NOTHING: &str = "none";

/// Port of the services' public side in the pods.
const PUBLIC: u16 = 8080;
/// Port of the services' admin side in the pods.
const ADMIN: u16 = 9090;
/// Where pods and test Jobs find the secret of their test lanes.
const LANE_SECRET: &str = "/etc/exchange/lane/secret";
/// Where pods and migrations find the database's URL.
const DATABASE_URL: &str = "/etc/exchange/database/url";
/// How long a stack may drain.
const DRAIN_TIMEOUT: &str = "EXCHANGE_DRAIN_TIMEOUT";
/// How long a stack is live before its users are told of it.
const NOTICE_DELAY: &str = "EXCHANGE_NOTICE_DELAY";
/// Connections that a pod opens to PostgreSQL unless its environment says otherwise; the exchange's own default.
const DATABASE_CONNECTIONS: i64 = 10;
/// Exit codes that a node gives a container that did not start, or that was killed.
const NOT_OF_THE_TEST: [i32; 2] = [128, 137];
/// Name of the container that does what a Job is for.
pub const JOB_CONTAINER: &str = "job";
/// From the end of a verification to telling the users of the release.
const NOTICE_AFTER_VERIFICATION_SECONDS: u64 = 60;
/// Time for the data planes to take a terminating pod out, before it is told to end.
const PRE_STOP_SECONDS: u32 = 5;
/// Longer than the services take to let their clients go, and than clients leave connections idle.
const GRACE_SECONDS: u32 = 120;

/// What is built is built for one object.
#[derive(Clone, Copy, Debug)]
pub struct Builder<'a> {
    /// Name of the object.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its `metadata.uid`, for owner references.
    pub uid: &'a str,
}

/// Names of all Services that an object of this name has: the live ones, and those of each colour.
pub fn service_names(name: &str) -> Vec<String> {
    let of = |service: Service| {
        let colours = [Colour::Blue, Colour::Green];
        let of_colours = colours.map(|colour| format!("{name}-{colour}-{service}"));
        std::iter::once(format!("{name}-{service}")).chain(of_colours)
    };
    Service::ALL.into_iter().flat_map(of).collect()
}

/// What a migration has to know of the stack that is live, as far as that is known.
#[derive(Clone, Debug, Default)]
pub struct Beside<'a> {
    /// The database that it uses: every other one is refused.
    pub database: Option<&'a str>,
    /// As many pods as each service has, or may have by its autoscaler.
    pub pods: BTreeMap<Service, i32>,
}

impl Builder<'_> {
    // ---- names ------------------------------------------------------------------------------------------------

    /// Name of a live Service.
    pub fn live_name(&self, service: Service) -> String {
        format!("{}-{service}", self.name)
    }

    /// Name of a Service of a colour.
    pub fn colour_name(&self, stack: &Stack, service: Service) -> String {
        format!("{}-{}-{service}", self.name, stack.colour)
    }

    /// Name of the workload of a service of a stack, and of what goes with it: its account, its budget, its autoscaler.
    pub fn workload_name(&self, stack: &Stack, service: Service) -> String {
        format!("{}-{}-{service}-{}", self.name, stack.colour, stack.revision)
    }

    /// Name of an object of a stack.
    pub fn part_name(&self, stack: &Stack, service: Service, part: Part) -> String {
        match part {
            Part::ColourService => self.colour_name(stack, service),
            Part::Workload | Part::Budget | Part::Autoscaler => self.workload_name(stack, service),
        }
    }

    /// Name of the rendered stack, and of the Secret that opens its test lanes.
    pub fn stack_name(&self, stack: &Stack) -> String {
        format!("{}-{}-{}", self.name, stack.colour, stack.revision)
    }

    /// Name of the copy of a ConfigMap or Secret for a revision.
    pub fn copy_name(&self, stack: &Stack, source: &Source) -> String {
        let (Source::ConfigMap(name) | Source::Secret(name)) = source;
        fit(format!("{}-{name}", self.stack_name(stack)), 253)
    }

    /// A copy, as `<kind>/<name>`.
    pub fn copy_path(&self, stack: &Stack, source: &Source) -> String {
        let kind = match source {
            Source::ConfigMap(_) => "ConfigMap",
            Source::Secret(_) => "Secret",
        };
        format!("{kind}/{}", self.copy_name(stack, source))
    }

    /// Name of a Job: all that its result is about.
    pub fn job_name(&self, job: &Job) -> String {
        fit(
            format!(
                "{}-{}-{}",
                self.stack_name(&job.stack),
                job_word(&job.kind),
                job.attempt
            ),
            63,
        )
    }

    // ---- labels -----------------------------------------------------------------------------------------------

    /// Labels of everything that belongs to the object.
    pub fn labels(&self) -> BTreeMap<String, String> {
        labels([
            ("app.kubernetes.io/name", "exchange"),
            ("app.kubernetes.io/instance", self.name),
            ("app.kubernetes.io/managed-by", MANAGER),
        ])
    }

    fn stack_labels(&self, stack: &Stack) -> BTreeMap<String, String> {
        let mut all = self.labels();
        all.extend(labels([
            (COLOUR, stack.colour.as_str()),
            (REVISION, &stack.revision),
        ]));
        all
    }

    fn service_labels(&self, stack: &Stack, service: Service, version: &str) -> BTreeMap<String, String> {
        let mut all = self.stack_labels(stack);
        all.extend(labels([
            ("app.kubernetes.io/component", service.as_str()),
            ("app.kubernetes.io/version", version),
        ]));
        all
    }

    /// Names colour *and* revision: a pod of another revision is never selected.
    fn selector(&self, stack: &Stack, service: Service) -> BTreeMap<String, String> {
        labels([
            ("app.kubernetes.io/instance", self.name),
            ("app.kubernetes.io/component", service.as_str()),
            (COLOUR, stack.colour.as_str()),
            (REVISION, &stack.revision),
        ])
    }

    fn metadata(&self, name: &str, labels: &BTreeMap<String, String>) -> Value {
        json!({
            "name": name,
            "namespace": self.namespace,
            "labels": labels,
            "ownerReferences": self.owner(),
        })
    }

    /// The owner references of everything that belongs to the object.
    pub fn owner(&self) -> Value {
        json!([{
            "apiVersion": "exchange.dev/v1alpha1",
            "kind": "ExchangeDeployment",
            "name": self.name,
            "uid": self.uid,
            "controller": true,
            "blockOwnerDeletion": true,
        }])
    }

    // ---- traffic ----------------------------------------------------------------------------------------------

    /// A live Service that points at a stack, or at nothing. Its selector is never empty: that would select every
    /// pod of the namespace for nobody, or be managed by hand.
    pub fn live_service(&self, service: Service, to: Option<&Stack>, epoch: u32) -> Value {
        let mut labels = self.labels();
        labels.insert("app.kubernetes.io/component".to_owned(), service.to_string());
        let mut metadata = self.metadata(&self.live_name(service), &labels);
        if let Value::Object(metadata) = &mut metadata {
            metadata.insert("annotations".to_owned(), json!({EPOCH: epoch.to_string()}));
        }
        let selector = to.map_or_else(
            || {
                self::labels([
                    ("app.kubernetes.io/instance", self.name),
                    ("app.kubernetes.io/component", service.as_str()),
                    (COLOUR, NOTHING),
                    (REVISION, NOTHING),
                ])
            },
            |stack| self.selector(stack, service),
        );
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service_spec(&selector)})
    }

    // ---- a stack ----------------------------------------------------------------------------------------------

    /// The objects of a stack that are kept as they were rendered, by service, and the copies of what they refer to: of those
    /// ConfigMaps and Secrets that exist.
    pub fn render<'s>(
        &self,
        spec: &Spec,
        stack: &Stack,
        sources: impl IntoIterator<Item = &'s Source>,
    ) -> Rendered {
        let mut objects = BTreeMap::new();
        for service in Service::ALL {
            let parts = [
                (Part::ColourService, self.colour_service(spec, stack, service)),
                (Part::Budget, self.budget(spec, stack, service)),
                (Part::Workload, self.workload(spec, stack, service)),
            ];
            objects.extend(parts.map(|(part, object)| ((service, part), object)));
        }
        let copies = sources.into_iter().map(|source| self.copy_path(stack, source));
        Rendered {
            version: spec.version.clone(),
            objects,
            copies: copies.collect(),
        }
    }

    /// A stack as a ControllerRevision keeps it, owned by the object as it is now. Nothing if it is not what
    /// [`Self::controller_revision`] makes.
    pub fn read(&self, data: &Value) -> Option<Rendered> {
        let mut objects = BTreeMap::new();
        for object in data.get("objects")?.as_array()? {
            let part = match object.get("kind")?.as_str()? {
                "Service" => Part::ColourService,
                "PodDisruptionBudget" => Part::Budget,
                "Deployment" => Part::Workload,
                _ => return None,
            };
            let service = object.pointer("/metadata/labels/app.kubernetes.io~1component")?;
            let service = Service::ALL.into_iter().find(|known| service == known.as_str())?;
            let mut object = object.clone();
            object
                .get_mut("metadata")?
                .as_object_mut()?
                .insert("ownerReferences".to_owned(), self.owner());
            objects.insert((service, part), object);
        }
        Some(Rendered {
            version: data.get("version")?.as_str()?.to_owned(),
            objects,
            copies: serde_json::from_value(data.get("copies")?.clone()).ok()?,
        })
    }

    /// The ControllerRevision that keeps a rendered stack.
    pub fn controller_revision(&self, stack: &Stack, attempt: u32, rendered: &Rendered) -> Value {
        let mut labels = self.stack_labels(stack);
        labels.insert(ATTEMPT.to_owned(), attempt.to_string());
        let objects: Vec<&Value> = rendered.objects.values().collect();
        json!({
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": self.metadata(&self.stack_name(stack), &labels),
            "revision": attempt,
            "data": {"version": rendered.version, "objects": objects, "copies": rendered.copies},
        })
    }

    /// The account of the pods of a service of a stack. It may do nothing, and its token is not mounted.
    pub fn service_account(&self, stack: &Stack, service: Service) -> Value {
        let mut labels = self.stack_labels(stack);
        labels.insert("app.kubernetes.io/component".to_owned(), service.to_string());
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": self.metadata(&self.workload_name(stack, service), &labels),
            "automountServiceAccountToken": false,
        })
    }

    /// The secret that a stack and its test Jobs share. It opens the stack's test lanes.
    pub fn lane_secret(&self, stack: &Stack, secret: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": self.metadata(&self.stack_name(stack), &self.stack_labels(stack)),
            "immutable": true,
            "stringData": {"lane": secret},
        })
    }

    /// The copy of a ConfigMap or Secret for a revision: a rollback finds what it had. `content` is `data`, and
    /// `binaryData` for ConfigMaps, as it was read.
    pub fn copy(&self, stack: &Stack, source: &Source, content: &Map<String, Value>) -> Value {
        let kind = match source {
            Source::ConfigMap(_) => "ConfigMap",
            Source::Secret(_) => "Secret",
        };
        let mut copy = json!({
            "apiVersion": "v1",
            "kind": kind,
            "metadata": self.metadata(&self.copy_name(stack, source), &self.stack_labels(stack)),
            "immutable": true,
        });
        if let Value::Object(copy) = &mut copy {
            copy.extend(content.clone());
        }
        copy
    }

    fn colour_service(&self, spec: &Spec, stack: &Stack, service: Service) -> Value {
        let labels = self.service_labels(stack, service, &spec.version);
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.metadata(&self.colour_name(stack, service), &labels),
            "spec": service_spec(&self.selector(stack, service)),
        })
    }

    fn budget(&self, spec: &Spec, stack: &Stack, service: Service) -> Value {
        let labels = self.service_labels(stack, service, &spec.version);
        json!({
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": self.metadata(&self.workload_name(stack, service), &labels),
            "spec": {
                "maxUnavailable": 1,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": self.selector(stack, service)},
            },
        })
    }

    fn workload(&self, spec: &Spec, stack: &Stack, service: Service) -> Value {
        let labels = self.service_labels(stack, service, &spec.version);
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.metadata(&self.workload_name(stack, service), &labels),
            "spec": {
                "selector": {"matchLabels": self.selector(stack, service)},
                "revisionHistoryLimit": 1,
                // A stack is never rolled to another revision. This is for repairs: first the new pod, then the old.
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
                "template": self.pod(spec, stack, service, &labels),
            },
        })
    }

    fn pod(&self, spec: &Spec, stack: &Stack, service: Service, labels: &BTreeMap<String, String>) -> Value {
        let declared = spec.services.get(service);
        let probe = |path: &str, period: u32, failures: u32| {
            json!({
                "httpGet": {"path": path, "port": "admin"},
                "periodSeconds": period,
                "timeoutSeconds": 2,
                "failureThreshold": failures,
            })
        };
        let (mut volumes, mut mounts) = self.stores(spec, stack);
        for (index, file) in declared.files.iter().enumerate() {
            let name = format!("files-{index}");
            let source = match (&file.config_map, &file.secret) {
                (Some(name), _) => Source::ConfigMap(name.clone()),
                (_, name) => Source::Secret(name.clone().unwrap_or_default()),
            };
            let copy = self.copy_name(stack, &source);
            volumes.push(match source {
                Source::ConfigMap(_) => json!({"name": name, "configMap": {"name": copy}}),
                Source::Secret(_) => json!({"name": name, "secret": {"secretName": copy}}),
            });
            mounts.push(json!({"name": name, "mountPath": file.mount_path, "readOnly": true}));
        }
        let mut container = json!({
            "name": service.as_str(),
            "image": image(spec, declared),
            "args": [service.as_str()],
            "env": self.environment(spec, stack, service),
            "ports": [
                {"name": "http", "containerPort": PUBLIC},
                {"name": "admin", "containerPort": ADMIN},
            ],
            "startupProbe": probe("/readyz", 1, 120),
            "readinessProbe": probe("/readyz", 2, 2),
            "livenessProbe": probe("/livez", 10, 3),
            "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
            "securityContext": container_security(),
            "volumeMounts": mounts,
        });
        let mut pod = json!({
            "serviceAccountName": self.workload_name(stack, service),
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": pod_security(),
            "topologySpreadConstraints": self.spread(declared, stack, service),
            "volumes": volumes,
        });
        if let (Value::Object(container), Value::Object(pod)) = (&mut container, &mut pod) {
            optional(container, "envFrom", self.env_from(declared, stack));
            optional(container, "resources", json!(declared.resources));
            optional(pod, "imagePullSecrets", json!(spec.image_pull_secrets));
            optional(pod, "nodeSelector", json!(declared.node_selector));
            optional(pod, "tolerations", json!(declared.tolerations));
            optional(pod, "priorityClassName", json!(declared.priority_class_name));
            pod.insert("containers".to_owned(), json!([container]));
        }
        // A disk that the pod alone uses, and loses without harm, keeps no node from being removed.
        let annotations = json!({"cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes": "tmp"});
        json!({"metadata": {"labels": labels, "annotations": annotations}, "spec": pod})
    }

    /// The stores' Secrets are mounted as they are, and read again at each reconnect. The lane's secret is the stack's.
    fn stores(&self, spec: &Spec, stack: &Stack) -> (Vec<Value>, Vec<Value>) {
        let lane = SecretKey {
            name: self.stack_name(stack),
            key: "lane".to_owned(),
        };
        let mut volumes = vec![json!({"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}})];
        let mut mounts = vec![json!({"name": "tmp", "mountPath": "/tmp"})];
        let stores = [
            ("database", &spec.database.secret_ref, "url"),
            ("queue", &spec.queue.secret_ref, "url"),
            ("market-data", &spec.market_data.secret_ref, "url"),
            ("lane", &lane, "secret"),
        ];
        for (name, key, file) in stores {
            let (volume, mount) = secret_file(name, key, file);
            volumes.push(volume);
            mounts.push(mount);
        }
        (volumes, mounts)
    }

    fn environment(&self, spec: &Spec, stack: &Stack, service: Service) -> Vec<Value> {
        let live = format!("http://{}", self.live_name(service));
        let drain = seconds(spec.rollout.drain_timeout);
        let mut env = vec![
            var("EXCHANGE_COLOUR", stack.colour.as_str()),
            var("EXCHANGE_REVISION", &stack.revision),
            // Said although it is the default: what is said here, nothing of envFrom can say otherwise.
            var("EXCHANGE_ROLE", "follow"),
            var("EXCHANGE_PUBLIC_ADDRESS", &format!("0.0.0.0:{PUBLIC}")),
            var("EXCHANGE_ADMIN_ADDRESS", &format!("0.0.0.0:{ADMIN}")),
            var("EXCHANGE_DATABASE_URL_FILE", DATABASE_URL),
            var("EXCHANGE_QUEUE_URL_FILE", "/etc/exchange/queue/url"),
            var("EXCHANGE_MARKET_DATA_URL_FILE", "/etc/exchange/market-data/url"),
            var("EXCHANGE_LANE_SECRET_FILE", LANE_SECRET),
            var("EXCHANGE_LIVE_URL", &live),
            var(DRAIN_TIMEOUT, &format!("{drain}s")),
        ];
        env.extend(Self::addresses(stack, |service| self.colour_name(stack, service)));
        let own = &spec.services.get(service).env;
        if service == Service::Notification && own.iter().all(|own| own.name != NOTICE_DELAY) {
            // Users are not told of a release that may still be taken back.
            let delay = seconds(spec.rollout.verification.duration) + NOTICE_AFTER_VERIFICATION_SECONDS;
            env.push(var(NOTICE_DELAY, &format!("{delay}s")));
        }
        for declared in own {
            let mut declared = json!(declared);
            for (field, source) in [
                ("configMapKeyRef", Source::ConfigMap as fn(String) -> Source),
                ("secretKeyRef", Source::Secret as fn(String) -> Source),
            ] {
                let name = declared.pointer_mut(&format!("/valueFrom/{field}/name"));
                if let Some(Value::String(name)) = name {
                    *name = self.copy_name(stack, &source(std::mem::take(name)));
                }
            }
            env.push(declared);
        }
        env
    }

    fn env_from(&self, declared: &ServiceSpec, stack: &Stack) -> Value {
        let copies = declared.env_from.iter().map(|from| {
            let mut from = from.clone();
            if let Some(it) = &mut from.config_map_ref {
                it.name = self.copy_name(stack, &Source::ConfigMap(std::mem::take(&mut it.name)));
            }
            if let Some(it) = &mut from.secret_ref {
                it.name = self.copy_name(stack, &Source::Secret(std::mem::take(&mut it.name)));
            }
            json!(from)
        });
        copies.collect()
    }

    fn addresses(stack: &Stack, name: impl Fn(Service) -> String) -> Vec<Value> {
        let mut env = vec![var("EXCHANGE_STACK_NAME", &stack.to_string())];
        for service in Service::ALL {
            let key = format!("EXCHANGE_STACK_{}_URL", service.as_str().to_uppercase());
            env.push(var(&key, &format!("http://{}", name(service))));
        }
        env
    }

    fn spread(&self, declared: &ServiceSpec, stack: &Stack, service: Service) -> Value {
        let selector = json!({"matchLabels": self.selector(stack, service)});
        if declared.topology_spread_constraints.is_empty() {
            let evenly = |key: &str| {
                json!({
                    "maxSkew": 1,
                    "topologyKey": key,
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": selector,
                })
            };
            return json!([
                evenly("kubernetes.io/hostname"),
                evenly("topology.kubernetes.io/zone")
            ]);
        }
        let own = declared.topology_spread_constraints.iter().map(|constraint| {
            let mut constraint = json!(constraint);
            if let Value::Object(fields) = &mut constraint {
                fields.entry("labelSelector").or_insert_with(|| selector.clone());
            }
            constraint
        });
        own.collect()
    }

    /// The autoscaler of a live stack's service, where one is declared for it.
    pub fn autoscaler(&self, live: &Live, service: Service) -> Option<Value> {
        let declared = live.scale.as_ref()?.of(service).autoscaling.as_ref()?;
        let name = self.workload_name(&live.stack, service);
        Some(json!({
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": self.metadata(&name, &self.service_labels(&live.stack, service, &live.version)),
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "minReplicas": declared.min_replicas,
                "maxReplicas": declared.max_replicas,
                "metrics": [{
                    "type": "Resource",
                    "resource": {
                        "name": "cpu",
                        "target": {
                            "type": "Utilization",
                            "averageUtilization": declared.target_cpu_utilization_percentage,
                        },
                    },
                }],
            },
        }))
    }

    // ---- Jobs -------------------------------------------------------------------------------------------------

    /// A Job. It runs the image of its stack's trade service as it was rendered, where that runs, whatever is declared by
    /// now; only the expand runs before there is one. A test with an image of its own may have other nodes. Nothing if the stack is
    /// not rendered, or the test not declared any more.
    pub fn job(
        &self,
        spec: &Spec,
        rendered: Option<&Rendered>,
        job: &Job,
        live: &Beside<'_>,
    ) -> Option<Value> {
        let trade = match job.kind {
            JobKind::Expand => self.workload(spec, &job.stack, Service::Trade),
            _ => rendered?.objects.get(&(Service::Trade, Part::Workload))?.clone(),
        };
        let trade = trade.pointer("/spec/template/spec")?;
        let own = trade.pointer("/containers/0/image")?.as_str()?.to_owned();
        let deadline = seconds(spec.rollout.progress_deadline);
        let mut placed: &[&str] = &[
            "imagePullSecrets",
            "nodeSelector",
            "tolerations",
            "priorityClassName",
        ];
        let requests = json!({"cpu": "100m", "memory": "64Mi"});
        let limits = json!({"cpu": "1", "memory": "512Mi"});
        let mut resources = json!({"requests": requests, "limits": limits});
        let (image, command, deadline) = match &job.kind {
            JobKind::Expand | JobKind::Contract => {
                let args = migrate(spec, &job.kind, deadline, live);
                (own, json!({"args": args}), deadline)
            }
            JobKind::Smoke => {
                let args = smoke(&job.stack, |service| self.colour_name(&job.stack, service));
                (own, json!({"args": args}), deadline)
            }
            JobKind::Verify => {
                let args = smoke(&job.stack, |service| self.live_name(service));
                (own, json!({"args": args}), deadline)
            }
            JobKind::Test(name) => {
                let test = spec.rollout.smoke_tests.iter().find(|test| test.name == *name)?;
                let mut env = Self::addresses(&job.stack, |service| self.colour_name(&job.stack, service));
                env.push(var("EXCHANGE_LANE_SECRET_FILE", LANE_SECRET));
                let command = json!({"command": test.command, "env": env});
                if test.image.is_some() {
                    placed = &["imagePullSecrets", "tolerations", "priorityClassName"];
                    // Nobody knows what it takes.
                    resources = json!({"requests": requests});
                }
                if let Some(own) = &test.resources {
                    resources = json!(own);
                }
                (test.image.clone().unwrap_or(own), command, seconds(test.timeout))
            }
        };
        let migration = job.kind.migrates();
        let (volume, mount) = if migration {
            let database = &spec.database;
            let owner = database.migration_secret_ref.as_ref();
            secret_file("database", owner.unwrap_or(&database.secret_ref), "url")
        } else {
            let lane = SecretKey {
                name: self.stack_name(&job.stack),
                key: "lane".to_owned(),
            };
            secret_file("lane", &lane, "secret")
        };
        let mut labels = self.stack_labels(&job.stack);
        labels.extend(self::labels([
            (JOB, job_word(&job.kind)),
            (ATTEMPT, &job.attempt.to_string()),
        ]));
        let mut container = json!({
            "name": JOB_CONTAINER,
            "image": image,
            "resources": resources,
            // What it said last is what people are told when it fails.
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": container_security(),
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, mount],
        });
        let mut pod = json!({
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": pod_security(),
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}}, volume],
        });
        if let (Value::Object(container), Value::Object(pod), Value::Object(command)) =
            (&mut container, &mut pod, command)
        {
            container.extend(command);
            for field in placed {
                optional(pod, field, trade.get(field).cloned().unwrap_or_default());
            }
            pod.insert("containers".to_owned(), json!([container]));
        }
        Some(json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.metadata(&self.job_name(job), &labels),
            "spec": {
                "activeDeadlineSeconds": deadline,
                "backoffLimit": 3,
                "podFailurePolicy": {"rules": failures(migration)},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }))
    }
}

/// What the failure of a Job's pod means. A node may be drained under any Job, and a migration can be repeated; but a failed
/// test has failed. Not so one that a node has refused, not started or killed.
fn failures(migration: bool) -> Value {
    let drained =
        json!({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]});
    if migration {
        return json!([drained]);
    }
    let failed = json!({"containerName": JOB_CONTAINER, "operator": "NotIn", "values": NOT_OF_THE_TEST});
    json!([drained, {"action": "FailJob", "onExitCodes": failed}])
}

/// What an autoscaler goes by, within what can be declared: [`Builder::autoscaler`] read back. Nothing if it does not go by
/// the use of CPU.
pub fn autoscaling(there: &HorizontalPodAutoscaler) -> Option<Autoscaling> {
    let spec = &there.spec;
    let cpu = spec.metrics.iter().flatten().find_map(|metric| {
        let resource = metric.resource.as_ref().filter(|it| it.name == "cpu")?;
        resource.target.average_utilization
    })?;
    Some(Autoscaling {
        min_replicas: spec.min_replicas.unwrap_or(1).clamp(1, 100),
        max_replicas: spec.max_replicas.clamp(1, 100),
        target_cpu_utilization_percentage: cpu.clamp(1, 100),
    })
}

/// A stack as it was rendered.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// Its version.
    pub version: String,
    /// Its objects.
    pub objects: BTreeMap<(Service, Part), Value>,
    /// The copies of ConfigMaps and Secrets that its pods need, as `<kind>/<name>`.
    pub copies: BTreeSet<String>,
}

/// What a Job does, in its name and labels.
pub fn job_word(kind: &JobKind) -> &str {
    match kind {
        JobKind::Expand => "expand",
        JobKind::Smoke => "smoke",
        JobKind::Test(name) => name,
        JobKind::Verify => "verify",
        JobKind::Contract => "contract",
    }
}

/// A store that a rendered stack finds elsewhere than is declared, in words.
pub fn other_store(spec: &Spec, rendered: &Rendered) -> Option<String> {
    let workload = rendered.objects.get(&(Service::Trade, Part::Workload))?;
    let volumes = workload.pointer("/spec/template/spec/volumes")?.as_array()?;
    let stores = [
        ("database", "database", &spec.database.secret_ref),
        ("queue", "queue", &spec.queue.secret_ref),
        ("market-data", "marketData", &spec.market_data.secret_ref),
    ];
    stores.into_iter().find_map(|(volume, field, declared)| {
        let found = volumes
            .iter()
            .find(|it| it.get("name").is_some_and(|it| it == volume))?;
        let name = found.pointer("/secret/secretName")?.as_str()?;
        let key = found.pointer("/secret/items/0/key")?.as_str()?;
        (name != declared.name || key != declared.key).then(|| {
            format!(
                "the key {key} of the Secret {name} as spec.{field}.secretRef, not the key {} of {}",
                declared.key, declared.name
            )
        })
    })
}

/// Arguments of `exchange migrate`.
fn migrate(spec: &Spec, kind: &JobKind, deadline: u64, live: &Beside<'_>) -> Vec<String> {
    let mut args = vec![
        "migrate".to_owned(),
        format!("--phase={}", job_word(kind)),
        format!("--database-url-file={DATABASE_URL}"),
        // It gives up by itself, and says why, before its Job does.
        format!("--deadline={}s", deadline - deadline / 10),
    ];
    if *kind == JobKind::Expand {
        args.push(format!("--connections-per-stack={}", connections(spec, live)));
    }
    args.extend(
        live.database
            .map(|identity| format!("--expect-database={identity}")),
    );
    args
}

/// Connections to PostgreSQL that a whole stack may open: a candidate has at least as many pods as what is live.
fn connections(spec: &Spec, live: &Beside<'_>) -> i64 {
    let of = |service| {
        let ServiceSpec {
            replicas,
            autoscaling,
            env,
            ..
        } = spec.services.get(service);
        let declared = autoscaling.as_ref().map_or(*replicas, |it| it.max_replicas);
        let pods = live.pods.get(&service).copied().unwrap_or(0).max(declared);
        let own = env.iter().find(|env| env.name == "EXCHANGE_DATABASE_CONNECTIONS");
        let own = own.and_then(|env| env.value.as_ref()?.parse().ok());
        i64::from(pods) * own.unwrap_or(DATABASE_CONNECTIONS)
    };
    Service::ALL.into_iter().map(of).sum()
}

/// Arguments of `exchange smoke`.
fn smoke(stack: &Stack, name: impl Fn(Service) -> String) -> Vec<String> {
    let mut args = vec![
        "smoke".to_owned(),
        format!("--colour={}", stack.colour),
        format!("--revision={}", stack.revision),
        format!("--lane-secret-file={LANE_SECRET}"),
    ];
    args.extend(Service::ALL.map(|service| format!("--{service}-url=http://{}", name(service))));
    args
}

fn image(spec: &Spec, declared: &ServiceSpec) -> String {
    let (repository, digest) = match &declared.image {
        Some(image) => (image, &declared.image_digest),
        None => (&spec.image, &spec.image_digest),
    };
    match digest {
        Some(digest) => format!("{repository}@{digest}"),
        None => format!("{repository}:{}", spec.version),
    }
}

/// One port: with several, a change of the selector leaves some of them without endpoints for about a second.
fn service_spec(selector: &BTreeMap<String, String>) -> Value {
    json!({
        "type": "ClusterIP",
        "selector": selector,
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PUBLIC}],
    })
}

fn secret_file(name: &str, key: &SecretKey, file: &str) -> (Value, Value) {
    let items = json!([{"key": key.key, "path": file}]);
    let volume = json!({"name": name, "secret": {"secretName": key.name, "items": items}});
    let mount = json!({"name": name, "mountPath": format!("/etc/exchange/{name}"), "readOnly": true});
    (volume, mount)
}

fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    })
}

fn pod_security() -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}

/// Has the pods of a template told what those of another are told, of that which is in no revision.
pub(crate) fn keep_told(built: &mut Value, runs: &Value) {
    let Some(built) = built.pointer_mut("/spec/containers/0") else {
        return;
    };
    let is_same = |other: &&Value| other.get("name") == built.get("name");
    let runs = items(runs.pointer("/spec/containers")).find(is_same);
    let in_no_revision = |it: &&Value| {
        it.get("name")
            .is_some_and(|name| name == DRAIN_TIMEOUT || name == NOTICE_DELAY)
    };
    let told: Vec<&Value> = items(runs.and_then(|it| it.get("env")))
        .filter(in_no_revision)
        .collect();
    let variables = built.get_mut("env").and_then(Value::as_array_mut);
    for variable in variables.into_iter().flatten() {
        if let Some(told) = told.iter().find(|it| it.get("name") == variable.get("name")) {
            variable.clone_from(told);
        }
    }
}

fn items(list: Option<&Value>) -> impl Iterator<Item = &Value> {
    list.and_then(Value::as_array).into_iter().flatten()
}

fn var(name: &str, value: &str) -> Value {
    json!({"name": name, "value": value})
}

fn labels<const N: usize>(labels: [(&str, &str); N]) -> BTreeMap<String, String> {
    labels
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn optional(map: &mut Map<String, Value>, key: &str, value: Value) {
    let empty = match &value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    if !empty {
        map.insert(key.to_owned(), value);
    }
}

fn seconds(duration: Duration) -> u64 {
    time::Duration::from(duration).as_secs()
}

/// A name that is too long is cut, and what was cut is hashed into its end.
fn fit(name: String, limit: usize) -> String {
    if name.len() <= limit {
        return name;
    }
    let digest = Sha256::digest(name.as_bytes());
    let hash = hex(digest.get(..4).unwrap_or_default());
    let kept: String = name.chars().take(limit - 9).collect();
    format!("{}-{hash}", kept.trim_end_matches(['-', '.']))
}
