//! The only reader: fresh reads of the object and of everything that belongs to it.
//!
//! Everything is found by its labels, so that it does not matter who has created it, or when. The object itself is read
//! last; if it turns out to be another than the one for which the rest was read, the rest is read again.

use std::{collections::BTreeMap, sync::Arc};

use futures::future::try_join_all;
use k8s_openapi::{
    Metadata, NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, Deployment},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::Job as BatchJob,
        core::v1::{ConfigMap, Pod, Secret, Service as CoreService, ServiceAccount},
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, ObjectMeta},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tokio::try_join;

use super::{
    Declared, Fence, Job, JobKind, JobSeen, LiveService, Observed, Part, PartSeen, Requests, ServiceSeen,
    Target, intact,
    pods::{self, Address, Baselines, Pods},
};
use crate::{
    api::{ExchangeDeployment, ExchangeDeploymentSpec as Spec, SecretKey, Service},
    error::Error,
    plan::Action,
    resources::{ATTEMPT, Builder, COLOUR, EPOCH, JOB, MANAGER, REVISION, Rendered, job_word},
    revision::{Content, Source, gates, revision, sources},
    status::{Colour, ExchangeDeploymentStatus as Status, Phase, PreviousState, Stack},
};

/// Reads before a pass gives up because the object changes all the time.
const TRIES: usize = 3;

/// One look at an object: what is decided on, and what the writes are made from.
#[derive(Clone, Debug)]
pub struct Look {
    /// The object as it was read last. Records carry its `resourceVersion`.
    pub object: ExchangeDeployment,
    /// What is seen.
    pub seen: Observed,
    /// What the writes are made from.
    pub material: Material,
}

/// What was read beside what is decided on.
#[derive(Clone, Debug, Default)]
pub struct Material {
    /// Content of the ConfigMaps and Secrets that the spec names: `data` and `binaryData`.
    pub content: BTreeMap<Source, Map<String, Value>>,
    /// The stacks as they were rendered.
    pub rendered: BTreeMap<Stack, Rendered>,
    /// Services by name: what is kept of them when they are written.
    pub services: BTreeMap<String, CoreService>,
    /// Names of EndpointSlices, by the Service that they are about.
    pub slices: BTreeMap<String, Vec<String>>,
    /// Whose pod it is, by uid.
    pub pods: BTreeMap<String, (Stack, Service)>,
    /// The database that the live stack uses, if a pod of it said so.
    pub database: Option<String>,
}

/// What a controller remembers of an object from one look to the next. All of it can be lost.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// The object as it was read or written last: a guess that saves a read.
    pub last: Option<ExchangeDeployment>,
    /// Phase and attempt that have been seen as a whole.
    pub known: Option<(Phase, u32)>,
    /// Where the counters of pods stood when a verification began.
    pub baselines: Baselines,
}

/// Reads from the API server and from the pods' admin ports.
#[derive(Clone)]
pub struct Reader {
    client: Client,
    pods: Pods,
}

/// Everything that belongs to an object, as it was read.
struct Children {
    services: Vec<CoreService>,
    slices: Vec<EndpointSlice>,
    deployments: Vec<Deployment>,
    budgets: Vec<PodDisruptionBudget>,
    autoscalers: Vec<HorizontalPodAutoscaler>,
    revisions: Vec<ControllerRevision>,
    jobs: Vec<BatchJob>,
    pods: Vec<Pod>,
    /// `<kind>/<name>` of what stacks need beside their workloads.
    pieces: Vec<String>,
}

impl Reader {
    /// A reader that asks this API server.
    pub const fn new(client: Client, pods: Pods) -> Self {
        Self { client, pods }
    }

    /// Looks at an object. Nothing if it does not exist.
    pub async fn look(
        &self,
        namespace: &str,
        name: &str,
        memory: &mut Memory,
    ) -> Result<Option<Look>, Error> {
        let mut guess = match memory.last.take() {
            Some(last) => last,
            None => match self.object(namespace, name).await? {
                Some(object) => object,
                None => return Ok(None),
            },
        };
        for _ in 0..TRIES {
            let (children, references) = try_join!(
                self.children(namespace, name),
                self.references(namespace, &guess.spec)
            )?;
            let mut look = assemble(guess, &children, references);
            self.find_taken(&mut look).await?;
            self.ask_pods(&mut look, &children, memory).await;
            let Some(object) = self.object(namespace, name).await? else {
                return Ok(None);
            };
            if fits(&look.object, &object) {
                look.seen.generation = object.metadata.generation.unwrap_or(0);
                look.seen.deleting = object.metadata.deletion_timestamp.is_some();
                look.seen.requests = requests(&object);
                look.seen.status = object.status.clone().unwrap_or_default();
                let now = (look.seen.status.phase, look.seen.status.attempt);
                look.seen.seen_before = memory.known == Some(now);
                memory.last = Some(object.clone());
                look.object = object;
                return Ok(Some(look));
            }
            guess = object;
        }
        Err(Error::Unreadable(
            name.to_owned(),
            "it changes faster than it can be read".to_owned(),
        ))
    }

    /// Looks once more at what the guard of an action looks at.
    pub async fn look_again(&self, look: &Look, action: &Action) -> Result<Observed, Error> {
        let namespace = look.object.namespace().unwrap_or_default();
        let name = look.object.name_any();
        let builder = builder(&look.object);
        let mut seen = look.seen.clone();
        match action {
            Action::Point { to: Some(to), .. } => {
                // By name, and in parallel: these reads lie between the decision and the swap.
                let names = Service::ALL.map(|service| builder.live_name(service));
                let live = names.iter().map(|name| self.get::<CoreService>(&namespace, name));
                let colour = Service::ALL.map(|service| builder.colour_name(to, service));
                let slices = colour.iter().flat_map(|service| {
                    let known = look.material.slices.get(service).into_iter().flatten();
                    known.map(|name| self.get::<EndpointSlice>(&namespace, name))
                });
                let (object, live, slices) = try_join!(
                    self.object(&namespace, &name),
                    try_join_all(live),
                    try_join_all(slices)
                )?;
                retake(&mut seen, object);
                see_live(&builder, live.iter().flatten(), &mut seen);
                if let Some(stack) = seen.stacks.get_mut(to) {
                    for service in stack.services.values_mut() {
                        service.ready = 0;
                    }
                }
                let slices: Vec<EndpointSlice> = slices.into_iter().flatten().collect();
                see_slices(&builder, &slices, &look.material.pods, &mut seen);
            }
            Action::Delete { .. } | Action::Unrender { .. } => {
                let labels = selector(&name);
                let (object, services, pods) = try_join!(
                    self.object(&namespace, &name),
                    self.list::<CoreService>(&namespace, &labels),
                    self.list::<Pod>(&namespace, &labels),
                )?;
                retake(&mut seen, object);
                see_live(&builder, services.iter(), &mut seen);
                for service in seen.stacks.values_mut().flat_map(|it| it.services.values_mut()) {
                    service.pods = 0;
                }
                see_pods(&pods, &mut seen);
            }
            _ => retake(&mut seen, self.object(&namespace, &name).await?),
        }
        Ok(seen)
    }

    async fn object(&self, namespace: &str, name: &str) -> Result<Option<ExchangeDeployment>, Error> {
        self.get(namespace, name).await
    }

    async fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        Api::<K>::namespaced(self.client.clone(), namespace)
            .get_opt(name)
            .await
            .map_err(Error::api(format!("read {} {name}", K::kind(&()))))
    }

    async fn list<K>(&self, namespace: &str, labels: &str) -> Result<Vec<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let list = Api::<K>::namespaced(self.client.clone(), namespace)
            .list(&ListParams::default().labels(labels))
            .await;
        list.map(|list| list.items)
            .map_err(Error::api(format!("list {}", K::plural(&()))))
    }

    /// `<kind>/<name>` of all objects of a kind.
    async fn names<K>(&self, namespace: &str, labels: &str) -> Result<Vec<String>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let list = Api::<K>::namespaced(self.client.clone(), namespace)
            .list_metadata(&ListParams::default().labels(labels))
            .await
            .map_err(Error::api(format!("list {}", K::plural(&()))))?;
        let there = list
            .items
            .iter()
            .filter(|it| it.metadata.deletion_timestamp.is_none());
        Ok(there
            .map(|it| format!("{}/{}", K::kind(&()), it.name_any()))
            .collect())
    }

    async fn children(&self, namespace: &str, name: &str) -> Result<Children, Error> {
        let labels = selector(name);
        let slices = slice_selector(name);
        let (
            services,
            slices,
            deployments,
            budgets,
            autoscalers,
            revisions,
            jobs,
            pods,
            maps,
            secrets,
            accounts,
        ) = try_join!(
            self.list(namespace, &labels),
            self.list(namespace, &slices),
            self.list(namespace, &labels),
            self.list(namespace, &labels),
            self.list(namespace, &labels),
            self.list(namespace, &labels),
            self.list(namespace, &labels),
            self.list(namespace, &labels),
            self.names::<ConfigMap>(namespace, &labels),
            self.names::<Secret>(namespace, &labels),
            self.names::<ServiceAccount>(namespace, &labels),
        )?;
        Ok(Children {
            services,
            slices,
            deployments,
            budgets,
            autoscalers,
            revisions,
            jobs,
            pods,
            pieces: [maps, secrets, accounts].concat(),
        })
    }

    /// The ConfigMaps and Secrets that the spec names, and what is missing, as a sentence.
    async fn references(&self, namespace: &str, spec: &Spec) -> Result<References, Error> {
        let read = sources(spec).into_keys().map(async |source| {
            let content = match &source {
                Source::ConfigMap(name) => self.get::<ConfigMap>(namespace, name).await?.map(map_content),
                Source::Secret(name) => self.get::<Secret>(namespace, name).await?.map(secret_content),
            };
            Ok::<_, Error>(content.map(|content| (source, content)))
        });
        let stores = stores(spec).map(async |(field, key)| {
            let there = self.get::<Secret>(namespace, &key.name).await?;
            let problem = match there {
                None => Some(format!("the Secret {} of {field} does not exist", key.name)),
                Some(secret) => {
                    let has = secret.data.is_some_and(|data| data.contains_key(&key.key));
                    (!has).then(|| format!("the Secret {} of {field} has no key {}", key.name, key.key))
                }
            };
            Ok::<_, Error>(problem)
        });
        let (read, problems) = try_join!(try_join_all(read), try_join_all(stores))?;
        let (mut content, mut copies) = (Content::new(), BTreeMap::new());
        for (source, (keys, copy)) in read.into_iter().flatten() {
            content.insert(source.clone(), keys);
            copies.insert(source, copy);
        }
        let declared = revision(spec, &content).map_err(|missing| {
            let names = missing.iter().map(|source| match source {
                Source::ConfigMap(name) => format!("the ConfigMap {name} does not exist"),
                Source::Secret(name) => format!("the Secret {name} does not exist"),
            });
            names.collect::<Vec<_>>().join(", ")
        });
        let problem = problems.into_iter().flatten().next();
        let declared = match problem {
            Some(problem) => Err(problem),
            None => declared,
        };
        Ok(References {
            declared: declared
                .map(|revision| Declared {
                    revision,
                    gates: gates(spec),
                })
                .map_err(|missing| format!("{missing}: create it, or change the spec")),
            content: copies,
        })
    }

    /// Services that are needed and do not have our labels, and exist nevertheless.
    async fn find_taken(&self, look: &mut Look) -> Result<(), Error> {
        let namespace = look.object.namespace().unwrap_or_default();
        let builder = builder(&look.object);
        let status = &look.seen.status;
        let stacks = [
            status.live.as_ref().map(|it| &it.stack),
            status.candidate.as_ref().map(|it| &it.stack),
            status.previous.as_ref().map(|it| &it.stack),
        ];
        let colour = stacks
            .into_iter()
            .flatten()
            .flat_map(|stack| Service::ALL.map(|service| builder.colour_name(stack, service)));
        let needed = Service::ALL.map(|service| builder.live_name(service));
        let missing: Vec<String> = needed
            .into_iter()
            .chain(colour)
            .filter(|name| !look.material.services.contains_key(name))
            .filter(|name| !look.seen.taken.contains(&format!("Service/{name}")))
            .collect();
        let there = missing
            .iter()
            .map(|name| self.get::<CoreService>(&namespace, name));
        let there = try_join_all(there).await?;
        let taken = there
            .iter()
            .flatten()
            .map(|it| format!("Service/{}", it.name_any()));
        look.seen.taken.extend(taken);
        Ok(())
    }

    /// What only the pods can say, as far as it is needed now.
    async fn ask_pods(&self, look: &mut Look, children: &Children, memory: &mut Memory) {
        let status = &look.seen.status;
        let addresses = |stack: &Stack| addresses(stack, children);
        match status.phase {
            Phase::Promoting if all_moved(&look.seen) => {
                let ips: Vec<String> = Service::ALL
                    .iter()
                    .filter_map(|service| {
                        let name = builder(&look.object).live_name(*service);
                        let service = look.material.services.get(&name)?;
                        service.spec.as_ref()?.cluster_ip.clone()
                    })
                    .collect();
                look.seen.answers = self.pods.answers(&ips).await;
            }
            Phase::Verifying => {
                if let Some(live) = &status.live {
                    // Before its swap a stack has no live traffic; before another verification it may have had.
                    let fresh = status.phase_since.is_some_and(|since| since <= live.since);
                    memory.baselines.begin((status.epoch, live.attempt), fresh);
                    let pods = addresses(&live.stack);
                    look.seen.figures = self.pods.figures(&pods, &mut memory.baselines).await;
                }
            }
            Phase::Migrating => {
                if let Some(live) = &status.live {
                    look.material.database = self.pods.database(&addresses(&live.stack)).await;
                }
            }
            _ => {}
        }
        if status.contract.is_some()
            && let Some(live) = &status.live
        {
            look.material.database = self.pods.database(&addresses(&live.stack)).await;
        }
        if let Some(previous) = &status.previous
            && previous.state == PreviousState::Draining
        {
            let open = self.pods.open(&addresses(&previous.stack)).await;
            if let Some(seen) = look.seen.stacks.get_mut(&previous.stack) {
                seen.open = open;
            }
        }
    }
}

/// What is declared, and the content of what it refers to.
struct References {
    declared: Result<Declared, String>,
    content: BTreeMap<Source, Map<String, Value>>,
}

/// What is built for this object.
pub fn builder(object: &ExchangeDeployment) -> Builder<'_> {
    let ObjectMeta {
        name, namespace, uid, ..
    } = &object.metadata;
    Builder {
        name: name.as_deref().unwrap_or_default(),
        namespace: namespace.as_deref().unwrap_or_default(),
        uid: uid.as_deref().unwrap_or_default(),
    }
}

/// Selects everything that belongs to an object.
pub fn selector(name: &str) -> String {
    format!("app.kubernetes.io/instance={name},app.kubernetes.io/managed-by={MANAGER}")
}

/// Slices are found by the Service that they are about, whatever other labels they have.
fn slice_selector(name: &str) -> String {
    let services =
        Service::ALL.map(|service| format!("{name}-{service},{name}-blue-{service},{name}-green-{service}"));
    format!("kubernetes.io/service-name in ({})", services.join(","))
}

/// Whether what was read for the one object is also what had to be read for the other.
fn fits(guess: &ExchangeDeployment, object: &ExchangeDeployment) -> bool {
    let asked = |status: &Option<Status>| {
        let status = status.clone().unwrap_or_default();
        let Status {
            phase,
            phase_since,
            epoch,
            live,
            candidate,
            previous,
            contract,
            ..
        } = status;
        let previous = previous.map(|it| (it.stack, it.state));
        (phase, phase_since, epoch, live, candidate, previous, contract)
    };
    guess.metadata.uid == object.metadata.uid
        && guess.spec == object.spec
        && asked(&guess.status) == asked(&object.status)
}

fn requests(object: &ExchangeDeployment) -> Requests {
    let asked = |what: &str| object.annotations().get(&format!("exchange.dev/{what}")).cloned();
    Requests {
        promote: asked("promote"),
        abort: asked("abort"),
        rollback: asked("rollback"),
        retry: asked("retry"),
        pause: asked("pause"),
        by: asked("by"),
    }
}

/// The store Secrets that the spec names.
fn stores(spec: &Spec) -> impl Iterator<Item = (&'static str, &SecretKey)> {
    let owner = spec.database.migration_secret_ref.as_ref();
    [
        ("spec.database.secretRef", Some(&spec.database.secret_ref)),
        ("spec.database.migrationSecretRef", owner),
        ("spec.queue.secretRef", Some(&spec.queue.secret_ref)),
        ("spec.marketData.secretRef", Some(&spec.market_data.secret_ref)),
    ]
    .into_iter()
    .filter_map(|(field, key)| Some((field, key?)))
}

type Read = (BTreeMap<String, Vec<u8>>, Map<String, Value>);

fn map_content(map: ConfigMap) -> Read {
    let mut copy = Map::new();
    copy.insert("data".to_owned(), json!(map.data));
    copy.insert("binaryData".to_owned(), json!(map.binary_data));
    let text = map.data.unwrap_or_default().into_iter();
    let binary = map.binary_data.unwrap_or_default().into_iter();
    let keys = text
        .map(|(key, value)| (key, value.into_bytes()))
        .chain(binary.map(|(key, value)| (key, value.0)));
    (keys.collect(), copy)
}

fn secret_content(secret: Secret) -> Read {
    let mut copy = Map::new();
    copy.insert("type".to_owned(), json!(secret.type_));
    copy.insert("data".to_owned(), json!(secret.data));
    let keys = secret.data.unwrap_or_default().into_iter();
    (keys.map(|(key, value)| (key, value.0)).collect(), copy)
}

/// Whose an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    Nobody,
    Another,
}

fn owner(meta: &ObjectMeta, uid: &str) -> Owner {
    let owners = meta.owner_references.iter().flatten();
    match owners.into_iter().find(|owner| owner.controller == Some(true)) {
        Some(owner) if owner.uid == uid => Owner::Us,
        Some(_) => Owner::Another,
        None => Owner::Nobody,
    }
}

fn fence(meta: &ObjectMeta) -> Fence {
    Fence {
        uid: Arc::from(meta.uid.as_deref().unwrap_or_default()),
        resource_version: Arc::from(meta.resource_version.as_deref().unwrap_or_default()),
    }
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

fn stack_of(meta: &ObjectMeta) -> Option<Stack> {
    let colour = match label(meta, COLOUR)? {
        "blue" => Colour::Blue,
        "green" => Colour::Green,
        _ => return None,
    };
    Some(Stack {
        colour,
        revision: label(meta, REVISION)?.to_owned(),
    })
}

fn service_of(meta: &ObjectMeta) -> Option<Service> {
    let component = label(meta, "app.kubernetes.io/component")?;
    Service::ALL
        .into_iter()
        .find(|service| service.as_str() == component)
}

/// Puts together what was read.
fn assemble(object: ExchangeDeployment, children: &Children, references: References) -> Look {
    let builder = builder(&object);
    let uid = builder.uid;
    let mut seen = Observed {
        generation: object.metadata.generation.unwrap_or(0),
        deleting: false,
        requests: Requests::default(),
        status: object.status.clone().unwrap_or_default(),
        declared: references.declared,
        live: BTreeMap::new(),
        stacks: BTreeMap::new(),
        jobs: BTreeMap::new(),
        taken: Vec::new(),
        answers: None,
        figures: BTreeMap::new(),
        seen_before: false,
    };
    let mut material = Material {
        content: references.content,
        ..Material::default()
    };
    for revision in &children.revisions {
        let Some(stack) = stack_of(&revision.metadata).filter(|_| mine(revision, uid, &mut seen.taken))
        else {
            continue;
        };
        let data = revision.data.as_ref().map(|data| &data.0);
        let rendered = data.and_then(|data| builder.read(data));
        let there = seen.stacks.entry(stack.clone()).or_default();
        there.rendered = Some(fence(&revision.metadata));
        there.attempt = label(&revision.metadata, ATTEMPT)
            .and_then(|it| it.parse().ok())
            .unwrap_or(0);
        if let Some(rendered) = rendered {
            there.version.clone_from(&rendered.version);
            there.whole = is_whole(&builder, &stack, &rendered, &children.pieces);
            material.rendered.insert(stack, rendered);
        }
    }
    let services = children
        .services
        .iter()
        .filter(|it| mine(*it, uid, &mut seen.taken));
    for service in services.cloned().collect::<Vec<_>>() {
        material.services.insert(service.name_any(), service);
    }
    let mut parts = Parts {
        builder,
        spec: &object.spec,
        rendered: &material.rendered,
        seen: &mut seen,
    };
    for service in material
        .services
        .values()
        .filter(|it| stack_of(&it.metadata).is_some())
    {
        parts.see(service, Part::ColourService);
    }
    for budget in &children.budgets {
        parts.see(budget, Part::Budget);
    }
    for autoscaler in &children.autoscalers {
        parts.see(autoscaler, Part::Autoscaler);
    }
    for deployment in &children.deployments {
        if let Some(service) = parts.see(deployment, Part::Workload) {
            let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas);
            service.replicas = replicas.and_then(|it| u32::try_from(it).ok()).unwrap_or(1);
        }
    }
    for pod in &children.pods {
        if let (Some(stack), Some(service), Some(uid)) =
            (stack_of(&pod.metadata), service_of(&pod.metadata), pod.uid())
        {
            material.pods.insert(uid, (stack, service));
        }
    }
    for slice in &children.slices {
        let names = material
            .slices
            .entry(slice_service(slice).to_owned())
            .or_default();
        names.push(slice.name_any());
    }
    see_pods(&children.pods, &mut seen);
    let live: Vec<&CoreService> = material.services.values().collect();
    see_live(&builder, live.into_iter(), &mut seen);
    see_slices(&builder, &children.slices, &material.pods, &mut seen);
    see_jobs(children, uid, &mut seen);
    Look {
        object,
        seen,
        material,
    }
}

/// Whether an object is ours, or can become so. What belongs to another is reported.
fn mine<K>(object: &K, uid: &str, taken: &mut Vec<String>) -> bool
where
    K: Resource<DynamicType = ()>,
{
    let another = owner(object.meta(), uid) == Owner::Another;
    if another {
        taken.push(format!("{}/{}", K::kind(&()), object.name_any()));
    }
    !another
}

fn is_whole(builder: &Builder<'_>, stack: &Stack, rendered: &Rendered, pieces: &[String]) -> bool {
    let name = builder.stack_name(stack);
    let own = [format!("ServiceAccount/{name}"), format!("Secret/{name}")];
    own.iter()
        .chain(&rendered.copies)
        .all(|piece| pieces.contains(piece))
}

/// Sees the objects of stacks, and compares them with what was rendered.
struct Parts<'a> {
    builder: Builder<'a>,
    spec: &'a Spec,
    rendered: &'a BTreeMap<Stack, Rendered>,
    seen: &'a mut Observed,
}

impl Parts<'_> {
    fn see<K>(&mut self, object: &K, part: Part) -> Option<&mut ServiceSeen>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        let (stack, service) = (stack_of(object.meta())?, service_of(object.meta())?);
        if !mine(object, self.builder.uid, &mut self.seen.taken) {
            return None;
        }
        let rendered = match part {
            Part::Autoscaler => self.builder.autoscaler(self.spec, &stack, service),
            _ => self
                .rendered
                .get(&stack)
                .and_then(|it| it.objects.get(&(service, part)).cloned()),
        };
        let intact = object.meta().deletion_timestamp.is_some()
            || rendered.is_none_or(|rendered| is_intact(object, &rendered));
        let there = self.seen.stacks.entry(stack).or_default();
        let there = there.services.entry(service).or_default();
        let fence = fence(object.meta());
        there.parts.insert(part, PartSeen { fence, intact });
        Some(there)
    }
}

/// Without a namespace, which everything shares.
fn is_intact<K: Serialize>(object: &K, rendered: &Value) -> bool {
    serde_json::to_value(object).is_ok_and(|object| {
        ["/metadata/labels", "/metadata/ownerReferences", "/spec"]
            .iter()
            .all(|path| {
                let wanted = rendered.pointer(path).unwrap_or(&Value::Null);
                intact::contains(object.pointer(path).unwrap_or(&Value::Null), wanted)
            })
    })
}

/// Sees the live Services among these.
fn see_live<'a>(builder: &Builder<'_>, services: impl Iterator<Item = &'a CoreService>, seen: &mut Observed) {
    let mut old = std::mem::take(&mut seen.live);
    for there in services {
        let name = there.name_any();
        let Some(service) = Service::ALL.into_iter().find(|it| builder.live_name(*it) == name) else {
            continue;
        };
        let selector = there.spec.as_ref().and_then(|spec| spec.selector.clone());
        let selector = json!(selector.unwrap_or_default());
        let points_at = |stack: Option<&Stack>| {
            let written = builder.live_service(service, stack, 0);
            written.pointer("/spec/selector") == Some(&selector)
        };
        let pointed = ObjectMeta {
            labels: serde_json::from_value(selector.clone()).ok(),
            ..ObjectMeta::default()
        };
        let stack = stack_of(&pointed);
        let target = match stack {
            Some(stack) if points_at(Some(&stack)) => Target::Stack(stack),
            None if points_at(None) => Target::Nothing,
            _ => Target::Foreign,
        };
        let mut written = builder.live_service(service, None, 0);
        if let Some(Value::Object(spec)) = written.get_mut("spec") {
            spec.insert("selector".to_owned(), selector);
        }
        let epoch = there.annotations().get(EPOCH).and_then(|it| it.parse().ok());
        let live = LiveService {
            fence: fence(&there.metadata),
            target,
            epoch: epoch.unwrap_or(0),
            intact: is_intact(there, &written),
            endpoints: old.remove(&service).map_or_else(Vec::new, |old| old.endpoints),
        };
        seen.live.insert(service, live);
    }
}

fn slice_service(slice: &EndpointSlice) -> &str {
    label(&slice.metadata, "kubernetes.io/service-name").unwrap_or_default()
}

/// Counts ready endpoints: of colour Services those whose pod is of the stack, of live Services the stacks.
fn see_slices(
    builder: &Builder<'_>,
    slices: &[EndpointSlice],
    pods: &BTreeMap<String, (Stack, Service)>,
    seen: &mut Observed,
) {
    for slice in slices {
        let about = slice_service(slice);
        let ready = slice.endpoints.iter().flatten().filter(|endpoint| {
            let ready = endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready);
            ready.unwrap_or(true)
        });
        let pods = ready.filter_map(|endpoint| pods.get(endpoint.target_ref.as_ref()?.uid.as_ref()?));
        for (stack, service) in pods {
            if about == builder.colour_name(stack, *service) {
                let there = seen.stacks.entry(stack.clone()).or_default();
                there.services.entry(*service).or_default().ready += 1;
            } else if about == builder.live_name(*service)
                && let Some(live) = seen.live.get_mut(service)
                && !live.endpoints.contains(stack)
            {
                live.endpoints.push(stack.clone());
            }
        }
    }
}

/// Counts pods, and says what keeps them from starting.
fn see_pods(pods: &[Pod], seen: &mut Observed) {
    for pod in pods {
        let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let (Some(stack), Some(service)) = (stack_of(&pod.metadata), service_of(&pod.metadata)) else {
            continue;
        };
        if matches!(ended, Some("Succeeded" | "Failed")) {
            continue;
        }
        let there = seen.stacks.entry(stack).or_default();
        let there = there.services.entry(service).or_default();
        there.pods += 1;
        if there.trouble.is_none() {
            there.trouble = pods::trouble(pod);
        }
    }
}

fn see_jobs(children: &Children, uid: &str, seen: &mut Observed) {
    for object in &children.jobs {
        let meta = object.metadata();
        let (Some(stack), Some(word), Some(attempt)) = (
            stack_of(meta),
            label(meta, JOB),
            label(meta, ATTEMPT).and_then(|it| it.parse().ok()),
        ) else {
            continue;
        };
        if !mine(object, uid, &mut seen.taken) {
            continue;
        }
        let own = [
            JobKind::Expand,
            JobKind::Smoke,
            JobKind::Verify,
            JobKind::Contract,
        ];
        let kind = own.into_iter().find(|kind| job_word(kind) == word);
        let job = Job {
            kind: kind.unwrap_or_else(|| JobKind::Test(word.to_owned())),
            stack,
            attempt,
        };
        let state = pods::job_state(object, &children.pods);
        let fence = fence(meta);
        seen.jobs.insert(job, JobSeen { fence, state });
    }
}

/// The record as it is now, for the guards.
fn retake(seen: &mut Observed, object: Option<ExchangeDeployment>) {
    seen.deleting = object
        .as_ref()
        .is_none_or(|object| object.metadata.deletion_timestamp.is_some());
    if let Some(status) = object.and_then(|object| object.status) {
        seen.status = status;
    }
}

fn all_moved(seen: &Observed) -> bool {
    let to = seen.status.candidate.as_ref().map(|it| &it.stack);
    seen.live.len() == Service::ALL.len()
        && seen
            .live
            .values()
            .all(|live| live.epoch == seen.status.epoch && live.target.is(to))
}

fn addresses(stack: &Stack, children: &Children) -> Vec<Address> {
    let running = children
        .pods
        .iter()
        .filter(|pod| stack_of(&pod.metadata).as_ref() == Some(stack));
    running
        .filter_map(|pod| {
            let status = pod.status.as_ref()?;
            let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            Some(Address {
                service: service_of(&pod.metadata)?,
                pod: pod.uid()?,
                ip: status.pod_ip.clone().filter(|_| !ended)?,
            })
        })
        .collect()
}
