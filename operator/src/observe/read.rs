//! The only reader: fresh reads of the object and of everything that belongs to it.
//!
//! Everything is found by its labels, so that it does not matter who has created it, or when. The object itself is read
//! last; if it turns out to be another than the one for which the rest was read, the rest is read again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use futures::future::{join, try_join_all};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Event, Pod, Secret, Service as CoreService, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, LogParams, ObjectMeta, PartialObjectMeta},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::{
    time::{Instant, timeout},
    try_join,
};
use tracing::debug;

use super::{
    Declared, Job, JobKind, JobSeen, JobState, Observed, Part, Piece, Refused, Requests, Target,
    assemble::{
        Children, References, addresses, all_moved, assemble, is_ours, note_taken, retake, see_live,
        see_lost, see_pods, see_slices, see_workload, selected, slice_service, without_workload,
    },
    pods::{self, Baselines, Pods},
};
use crate::{
    api::{ExchangeDeployment, ExchangeDeploymentSpec as Spec, SecretKey, Service},
    error::{Error, within},
    guard,
    plan::Action,
    resources::{Builder, JOB_CONTAINER, MANAGER, Rendered, service_names},
    revision::{self, Content, Source, gates, reserved, revision, sources},
    status::{ExchangeDeploymentStatus as Status, Live, Phase, PreviousState, Stack},
};

/// Reads before a pass gives up because the object changes all the time.
const TRIES: usize = 3;
/// For each read: an API server that has gone without a word does not answer any more.
pub(crate) const READ_LIMIT: Duration = Duration::from_secs(10);
/// How often a migration is asked at the most how far it is: it does not say it more often, and each answer is recorded.
const LISTEN_EVERY: Duration = Duration::from_secs(5);
/// For that answer, which a kubelet has to give.
const LISTEN_LIMIT: Duration = Duration::from_secs(2);
/// The longest line that is read. What is longer is not told.
const LINE: i64 = 4096;

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
    /// What the pods of stacks need beside.
    pub pieces: BTreeMap<Stack, Vec<Piece>>,
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
    /// What could not be written of that which was to be done then.
    pub refused: Option<Refused>,
    /// Names that were needed and belonged to somebody else.
    pub taken: Taken,
    /// Where the counters of pods stood when a verification began.
    pub baselines: Baselines,
    /// What migrations that run have said last, by the uids of their pods.
    pub heard: HashMap<String, Heard>,
}

impl Memory {
    /// Forgets the object if it is of an earlier generation than this. What its spec names would be read for nothing.
    pub fn forget_before(&mut self, generation: i64) {
        self.last
            .take_if(|last| last.metadata.generation.is_none_or(|it| it < generation));
    }
}

/// Names that belonged to somebody else, each once.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// What they were needed for. For something else other names are needed, or none.
    by: Needs,
    names: Vec<(ApiResource, String)>,
}

/// What the names of objects follow from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Needs {
    generation: Option<i64>,
    revision: Option<String>,
    /// What is live, what is the candidate, and the attempt.
    recorded: (Option<Stack>, Option<Stack>, u32),
}

impl Taken {
    /// Another one.
    pub fn add(&mut self, kind: &ApiResource, name: &str) {
        if !self.names.iter().any(|(of, it)| of == kind && it == name) {
            self.names.push((kind.clone(), name.to_owned()));
        }
    }
}

impl Needs {
    fn of(look: &Look) -> Self {
        let status = look.object.status.as_ref();
        Self {
            generation: look.object.metadata.generation,
            revision: look.seen.declared.as_ref().ok().map(|it| it.revision.clone()),
            recorded: (
                status.and_then(|it| Some(it.live.as_ref()?.stack.clone())),
                status.and_then(|it| Some(it.candidate.as_ref()?.stack.clone())),
                status.map_or(0, |it| it.attempt),
            ),
        }
    }
}

/// What the pod of a migration has said.
#[derive(Clone, Debug)]
pub struct Heard {
    /// When it was asked last.
    at: Instant,
    /// Its last line that could be read.
    said: Option<String>,
}

/// Reads from the API server and from the pods' admin ports.
#[derive(Clone)]
pub struct Reader {
    client: Client,
    pods: Pods,
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
            self.find_taken(&mut look, &children.slices, memory).await?;
            self.find_lost(&mut look, &children.pods).await?;
            self.find_failed_creations(&mut look, &children).await;
            self.listen_to_migrations(&mut look, &children, memory).await;
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
                look.seen.refused.clone_from(&memory.refused);
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
        // By name: one that has lost its labels has traffic all the same.
        let live = |services: Vec<Service>| {
            let builder = &builder;
            let namespace = &namespace;
            let read = services.into_iter().map(async move |service| {
                let name = builder.live_name(service);
                self.get::<CoreService>(namespace, &name).await
            });
            try_join_all(read)
        };
        match action {
            Action::Point {
                service,
                to,
                epoch,
                intent,
                ..
            } => {
                // In parallel, and only what the guard asks for: these reads lie between the decision and the swap. The Service that
                // is written is not one of them: if it is another one by now, the write is refused.
                let concerned: Vec<Service> = match to {
                    Some(to) => guard::to_move(to, *service, *epoch, *intent, &seen).collect(),
                    None => vec![*service],
                };
                let others: Vec<Service> = concerned.iter().copied().filter(|it| it != service).collect();
                // Where one has nobody who would be sent there, or who would be left, it counts what both have.
                let compared = concerned.iter().filter_map(|service| {
                    let (to, there) = (to.as_ref()?, seen.live.get(service)?.target.stack()?);
                    let nobody = |stack| seen.ready(stack, *service) == 0;
                    (there != to && (nobody(to) || nobody(there))).then(|| (there.clone(), *service))
                });
                let compared: Vec<(Stack, Service)> = compared.collect();
                // Of what leads to no stack that is known from its selector the slices say where its clients are.
                let astray = |service: &&Service| {
                    let live = seen.live.get(service);
                    to.is_none() || live.is_some_and(|live| live.target == Target::Foreign)
                };
                let astray: Vec<Service> = concerned.iter().filter(astray).copied().collect();
                let own = to.iter().flat_map(|to| {
                    let concerned = concerned.iter();
                    concerned.map(|service| builder.colour_name(to, *service))
                });
                let left = compared
                    .iter()
                    .map(|(stack, service)| builder.colour_name(stack, *service));
                let live_ones = astray.iter().map(|service| builder.live_name(*service));
                let slices = own.chain(left).chain(live_ones).flat_map(|about| {
                    let known = look.material.slices.get(&about).into_iter().flatten();
                    known.map(|name| self.get::<EndpointSlice>(&namespace, name))
                });
                seen.live.retain(|service, _| !others.contains(service));
                let (object, live, slices) =
                    try_join!(self.object(&namespace, &name), live(others), try_join_all(slices))?;
                retake(&mut seen, object);
                see_live(&builder, live.iter().flatten(), &mut seen);
                keep_endpoints(&mut seen, &look.seen, &astray);
                let to = to.as_ref().and_then(|to| seen.stacks.get_mut(to));
                for service in to.into_iter().flat_map(|stack| stack.services.values_mut()) {
                    service.ready = 0;
                }
                for (stack, service) in &compared {
                    let there = seen.stacks.get_mut(stack);
                    if let Some(there) = there.and_then(|it| it.services.get_mut(service)) {
                        there.ready = 0;
                    }
                }
                let slices: Vec<EndpointSlice> = slices.into_iter().flatten().collect();
                see_slices(&builder, &slices, &look.material.pods, &mut seen);
            }
            Action::Delete { .. } | Action::Unrender { .. } => {
                let labels = selector(&name);
                let (object, live, pods) = try_join!(
                    self.object(&namespace, &name),
                    live(Service::ALL.to_vec()),
                    self.list::<Pod>(&namespace, &labels),
                )?;
                retake(&mut seen, object);
                seen.live.clear();
                see_live(&builder, live.iter().flatten(), &mut seen);
                keep_endpoints(&mut seen, &look.seen, &[]);
                for service in seen.stacks.values_mut().flat_map(|it| it.services.values_mut()) {
                    service.pods = 0;
                }
                see_pods(&pods, &mut seen);
            }
            _ => retake(&mut seen, self.object(&namespace, &name).await?),
        }
        Ok(seen)
    }

    /// Without its managed fields: it is remembered, and they are most of it.
    async fn object(&self, namespace: &str, name: &str) -> Result<Option<ExchangeDeployment>, Error> {
        let mut object: Option<ExchangeDeployment> = self.get(namespace, name).await?;
        if let Some(object) = &mut object {
            object.metadata.managed_fields = None;
        }
        Ok(object)
    }

    async fn get<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let doing = format!("read {} {name}", K::kind(&()));
        within(READ_LIMIT, doing, api.get_opt(name)).await
    }

    /// Something that the spec names. What cannot be a name is the name of nothing: asked for it, neither client nor API server
    /// would say so.
    async fn referred<K>(&self, namespace: &str, name: &str) -> Result<Option<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        if is_name(name) {
            self.get(namespace, name).await
        } else {
            Ok(None)
        }
    }

    async fn list<K>(&self, namespace: &str, labels: &str) -> Result<Vec<K>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let params = ListParams::default().labels(labels);
        let list = within(READ_LIMIT, format!("list {}", K::plural(&())), api.list(&params)).await?;
        Ok(list.items)
    }

    /// The metadata of the object of this name, whatever labels it has. A list of one: that needs no other right than
    /// the lists do.
    pub async fn named(
        &self,
        kind: &ApiResource,
        namespace: &str,
        name: &str,
    ) -> Result<Option<PartialObjectMeta<DynamicObject>>, Error> {
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), namespace, kind);
        let params = ListParams::default().fields(&format!("metadata.name={name}"));
        let doing = format!("read {} {name}", kind.kind);
        let list = within(READ_LIMIT, doing, api.list_metadata(&params)).await?;
        Ok(list.items.into_iter().next())
    }

    /// What the workload of this name makes its pods of. A list of one, as [`Self::named`].
    pub async fn template(&self, namespace: &str, name: &str) -> Result<Option<Value>, Error> {
        let spec = self.workload(namespace, name).await?.and_then(|it| it.spec);
        Ok(spec.map(|spec| json!(spec.template)))
    }

    async fn workload(&self, namespace: &str, name: &str) -> Result<Option<Deployment>, Error> {
        let api = Api::<Deployment>::namespaced(self.client.clone(), namespace);
        let params = ListParams::default().fields(&format!("metadata.name={name}"));
        let list = within(READ_LIMIT, format!("read Deployment {name}"), api.list(&params)).await?;
        Ok(list.items.into_iter().next())
    }

    /// Pieces of stacks of one kind.
    async fn pieces<K>(&self, namespace: &str, labels: &str) -> Result<Vec<Piece>, Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let params = ListParams::default().labels(labels);
        let doing = format!("list {}", K::plural(&()));
        let list = within(READ_LIMIT, doing, api.list_metadata(&params)).await?;
        let pieces = list.items.iter().map(|it| Piece::of::<K>(&it.metadata));
        Ok(pieces.collect())
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
            self.pieces::<ConfigMap>(namespace, &labels),
            self.pieces::<Secret>(namespace, &labels),
            self.pieces::<ServiceAccount>(namespace, &labels),
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
                Source::ConfigMap(name) => self
                    .referred::<ConfigMap>(namespace, name)
                    .await?
                    .map(map_content),
                Source::Secret(name) => self
                    .referred::<Secret>(namespace, name)
                    .await?
                    .map(secret_content),
            };
            Ok::<_, Error>(content.map(|content| (source, content)))
        });
        // Several keys of one Secret are one read.
        let names: BTreeSet<&str> = stores(spec).map(|(_, key)| key.name.as_str()).collect();
        let secrets = names
            .into_iter()
            .map(async |name| Ok::<_, Error>((name, self.referred::<Secret>(namespace, name).await?)));
        let (read, secrets) = try_join!(try_join_all(read), try_join_all(secrets))?;
        let secrets: BTreeMap<&str, Option<Secret>> = secrets.into_iter().collect();
        let (mut content, mut copies) = (Content::new(), BTreeMap::new());
        for (source, (keys, copy)) in read.into_iter().flatten() {
            content.insert(source.clone(), keys);
            copies.insert(source, copy);
        }
        let declared = revision(spec, &content).map_err(|missing| {
            let names = missing.iter().map(|source| match source {
                Source::ConfigMap(name) => format!("the ConfigMap {} does not exist", told(name)),
                Source::Secret(name) => format!("the Secret {} does not exist", told(name)),
            });
            names.collect::<Vec<_>>().join(", ")
        });
        let problem = stores(spec).find_map(|(field, key)| match secrets.get(key.name.as_str())? {
            None => Some(format!(
                "the Secret {} of {field} does not exist",
                told(&key.name)
            )),
            Some(secret) => {
                let has = secret
                    .data
                    .as_ref()
                    .is_some_and(|data| data.contains_key(&key.key));
                (!has).then(|| format!("the Secret {} of {field} has no key {}", key.name, key.key))
            }
        });
        let declared = match problem {
            Some(problem) => Err(problem),
            None => declared,
        };
        let declared = declared
            .map_err(|missing| format!("{missing}: create it, or change the spec"))
            .and_then(|revision| reserved(spec, &content).map_or(Ok(revision), Err));
        Ok(References {
            declared: declared.map(|revision| Declared {
                revision,
                gates: format!("{}.{}", gates(spec), revision::stores(spec)),
            }),
            content: copies,
        })
    }

    /// Services that are needed and do not have our labels, and exist nevertheless: somebody else's, or ours that have lost
    /// them. And what else was taken is looked at again.
    async fn find_taken(
        &self,
        look: &mut Look,
        slices: &[EndpointSlice],
        memory: &mut Memory,
    ) -> Result<(), Error> {
        let namespace = look.object.namespace().unwrap_or_default();
        let builder = builder(&look.object);
        let status = &look.seen.status;
        let colour = status.stacks().flat_map(|stack| {
            Service::ALL.map(|service| {
                let name = builder.colour_name(stack, service);
                (name, Some((stack.clone(), service)))
            })
        });
        let needed = Service::ALL.map(|service| (builder.live_name(service), None));
        let missing: Vec<_> = needed
            .into_iter()
            .chain(colour)
            .filter(|(name, _)| !look.material.services.contains_key(name))
            .filter(|(name, _)| !look.seen.others().any(|it| *it == format!("Service/{name}")))
            .collect();
        let there = missing
            .iter()
            .map(|(name, _)| self.get::<CoreService>(&namespace, name));
        let there = try_join_all(there).await?;
        for ((name, part), there) in missing.into_iter().zip(there) {
            let Some(there) = there else { continue };
            if !is_ours(&there.metadata, builder.uid) {
                note_taken(&there.metadata, "Service", &builder, &mut look.seen);
                continue;
            }
            let own = slices
                .iter()
                .filter(|it| part.is_none() && slice_service(it) == name);
            let own: Vec<EndpointSlice> = own.cloned().collect();
            if let Some((recorded, service)) = part {
                let said = selected(&there).filter(|stack| look.seen.stacks.contains_key(stack));
                let stack = said.unwrap_or(recorded);
                let place = (&stack, service);
                see_lost(&there.metadata, place, Part::ColourService, &mut look.seen);
            }
            look.material.services.insert(name, there);
            see_live(&builder, look.material.services.values(), &mut look.seen);
            see_slices(&builder, &own, &look.material.pods, &mut look.seen);
        }
        let needs = Needs::of(look);
        let known = std::mem::take(&mut memory.taken);
        memory.taken.by = needs;
        if known.by != memory.taken.by {
            return Ok(());
        }
        for (kind, name) in known.names {
            let there = self.named(&kind, &namespace, &name).await?;
            if let Some(there) = there.filter(|it| !is_ours(&it.metadata, builder.uid)) {
                note_taken(&there.metadata, &kind.kind, &builder, &mut look.seen);
                memory.taken.add(&kind, &name);
            }
        }
        Ok(())
    }

    /// Workloads of ours that have lost the labels by which they are found, as their pods have not.
    async fn find_lost(&self, look: &mut Look, pods: &[Pod]) -> Result<(), Error> {
        let builder = builder(&look.object);
        for (stack, service) in without_workload(pods, &look.seen) {
            let name = builder.workload_name(&stack, service);
            let there = self.workload(builder.namespace, &name).await?;
            let ours = |it: &Deployment| {
                is_ours(&it.metadata, builder.uid) && it.metadata.deletion_timestamp.is_none()
            };
            if let Some(there) = there.filter(ours) {
                let place = (&stack, service);
                let seen = see_lost(&there.metadata, place, Part::Workload, &mut look.seen);
                see_workload(&there, seen);
            }
        }
        Ok(())
    }

    /// What keeps the pods of Jobs from being created. A Deployment says it itself, of a Job only events do.
    async fn find_failed_creations(&self, look: &mut Look, children: &Children) {
        for (job, seen) in &mut look.seen.jobs {
            let name = builder(&look.object).job_name(job);
            let there = children.jobs.iter().find(|it| it.name_any() == name);
            let waits = there.is_some_and(|it| pods::of(it, &children.pods).next().is_none());
            if seen.state != JobState::Running || !waits {
                continue;
            }
            let fields = format!("involvedObject.uid={},reason=FailedCreate", seen.fence.uid);
            let api = Api::<Event>::namespaced(self.client.clone(), builder(&look.object).namespace);
            let params = ListParams::default().fields(&fields);
            let doing = format!("read the events of Job {name}");
            let events = match within(READ_LIMIT, doing, api.list(&params)).await {
                Ok(list) => list.items,
                Err(error) => {
                    debug!(
                        error.message = error.chain(),
                        "the events of the Job {name} cannot be read"
                    );
                    continue;
                }
            };
            let message = events.into_iter().filter_map(|it| it.message).next_back();
            seen.trouble = message
                .map(|it| pods::not_created(&it))
                .or_else(|| seen.trouble.take());
        }
    }

    /// How far a migration is: the last line of its log. A line that cannot be read holds nothing up, and the one before
    /// stands.
    async fn listen_to_migrations(&self, look: &mut Look, children: &Children, memory: &mut Memory) {
        let mut before = std::mem::take(&mut memory.heard);
        for (job, seen) in &mut look.seen.jobs {
            if !job.kind.migrates() || seen.state != JobState::Running {
                continue;
            }
            let name = builder(&look.object).job_name(job);
            let there = children.jobs.iter().find(|it| it.name_any() == name);
            let running = there.and_then(|it| pods::of(it, &children.pods).find(|pod| pods::runs(pod)));
            let Some((pod, uid)) = running.and_then(|pod| Some((pod, pod.uid()?))) else {
                continue;
            };
            let recent = |heard: &Heard| heard.at.elapsed() < LISTEN_EVERY;
            let heard = match before.remove(&uid) {
                Some(heard) if recent(&heard) => heard,
                before => Heard {
                    at: Instant::now(),
                    said: self
                        .last_line(builder(&look.object).namespace, &pod.name_any())
                        .await
                        .or_else(|| before.and_then(|it| it.said)),
                },
            };
            seen.progress.clone_from(&heard.said);
            memory.heard.insert(uid, heard);
        }
    }

    async fn last_line(&self, namespace: &str, pod: &str) -> Option<String> {
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let last = LogParams {
            // Beside what a webhook has added.
            container: Some(JOB_CONTAINER.to_owned()),
            tail_lines: Some(1),
            limit_bytes: Some(LINE),
            ..LogParams::default()
        };
        match timeout(LISTEN_LIMIT, api.logs(pod, &last)).await {
            Ok(Ok(line)) => pods::message(&line),
            Ok(Err(error)) => {
                debug!(error.message = %error, "the log of {pod} cannot be read");
                None
            }
            Err(_) => None,
        }
    }

    /// What only the pods can say, as far as it is needed now.
    async fn ask_pods(&self, look: &mut Look, children: &Children, memory: &mut Memory) {
        let status = &look.seen.status;
        let addresses = |stack: &Stack| addresses(stack, children);
        match status.phase {
            Phase::Promoting => {
                if let Some(candidate) = &status.candidate {
                    let pods = addresses(&candidate.stack);
                    let verification = (status.epoch, candidate.attempt);
                    let moved = all_moved(&look.seen);
                    // What somebody has asked the candidate for before its swap says nothing of what clients get from it.
                    let figures = async {
                        let begins = memory.baselines.begin(verification, false);
                        if !begins && moved {
                            // Who is heard of for the first time now has counted what clients have asked it.
                            memory.baselines.begin(verification, true);
                        }
                        if begins || moved {
                            self.pods.figures(&pods, &mut memory.baselines).await.0
                        } else {
                            BTreeMap::new()
                        }
                    };
                    let answers = async {
                        let ips = live_addresses(look)?;
                        Some(self.pods.answers(&candidate.stack, &ips).await)
                    };
                    let (figures, answers) = join(figures, answers).await;
                    look.seen.figures = figures;
                    match answers {
                        Some(Ok(())) => look.seen.answers = Some(candidate.stack.clone()),
                        Some(Err(why)) => look.seen.unheard = Some(why),
                        None => {}
                    }
                }
            }
            Phase::Verifying => {
                if let Some(live) = &status.live {
                    // What was not heard of during the swap has counted since then what clients have asked it; before another
                    // verification, or when it is adopted, it may have served others. That is another attempt than the one
                    // that it was tested in.
                    let fresh = look.seen.jobs.contains_key(&Job {
                        kind: JobKind::Smoke,
                        stack: live.stack.clone(),
                        attempt: live.attempt,
                    });
                    memory.baselines.begin((status.epoch, live.attempt), fresh);
                    let pods = addresses(&live.stack);
                    let figures = self.pods.figures(&pods, &mut memory.baselines);
                    // They find it out within seconds, and nobody has to be told of those.
                    let unaware = async {
                        if live.smoke_passed {
                            self.pods.unaware(&pods).await
                        } else {
                            None
                        }
                    };
                    let ((figures, unheard), unaware) = join(figures, unaware).await;
                    (look.seen.figures, look.seen.unheard) = (figures, unheard.or(unaware));
                }
            }
            Phase::Provisioning | Phase::Testing | Phase::AwaitingPromotion => {
                // Who waits for a person waits for no pod.
                let waits = status.phase == Phase::AwaitingPromotion;
                let candidate = status.candidate.as_ref();
                if let Some(candidate) = candidate.filter(|it| !waits || it.approved_by.is_some()) {
                    let excuses = self.pods.excuses(&addresses(&candidate.stack)).await;
                    let services = look.seen.stacks.get_mut(&candidate.stack);
                    for (service, seen) in services.into_iter().flat_map(|it| &mut it.services) {
                        let excuse = excuses.get(service).map(String::as_str);
                        seen.trouble = pods::joined(seen.trouble.take(), excuse);
                    }
                }
            }
            _ => {}
        }
        let jobs = &look.seen.jobs;
        if let Some(live) = status
            .live
            .as_ref()
            .filter(|live| may_migrate(jobs, status, live))
        {
            look.material.database = self.pods.database(&addresses(&live.stack)).await;
        }
        if let Some(previous) = &status.previous
            && previous.state == PreviousState::Draining
        {
            let open = self.pods.open(&addresses(&previous.stack)).await;
            if let Some(seen) = look.seen.stacks.get_mut(&previous.stack) {
                (seen.open, seen.unheard) = match open {
                    Ok(open) => (Some(open), None),
                    Err(why) => (None, Some(why)),
                };
            }
        }
    }
}

/// Live Services that were read anew lead to whom they led before, but for those of which that is read anew, too.
fn keep_endpoints(seen: &mut Observed, before: &Observed, anew: &[Service]) {
    for (service, live) in &mut seen.live {
        let before = before.live.get(service).filter(|_| !anew.contains(service));
        live.endpoints = before.map_or_else(Vec::new, |before| before.endpoints.clone());
    }
}

/// Where the live Services are reached, if all have been moved.
fn live_addresses(look: &Look) -> Option<Vec<(Service, String)>> {
    let builder = builder(&look.object);
    let ips = Service::ALL.iter().map(|service| {
        let there = look.material.services.get(&builder.live_name(*service))?;
        Some((*service, there.spec.as_ref()?.cluster_ip.clone()?))
    });
    all_moved(&look.seen).then(|| ips.collect()).flatten()
}

/// Whether a migration runs, or may be begun by a pass that records that its time has come: also the one of a release that is
/// further, if its Job is gone.
fn may_migrate(jobs: &BTreeMap<Job, JobSeen>, status: &Status, live: &Live) -> bool {
    let previous = status.previous.as_ref();
    let leaves = previous.is_none_or(|previous| previous.state == PreviousState::Retiring);
    let expanded = status.candidate.as_ref().is_some_and(|candidate| {
        jobs.contains_key(&Job {
            kind: JobKind::Expand,
            stack: candidate.stack.clone(),
            attempt: candidate.attempt,
        })
    });
    match status.phase {
        Phase::Pending | Phase::Migrating => true,
        Phase::Provisioning | Phase::Testing | Phase::AwaitingPromotion if !expanded => true,
        _ => status.contract.is_some() || (leaves && !live.contracted),
    }
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
    format!(
        "kubernetes.io/service-name in ({})",
        service_names(name).join(",")
    )
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

/// Whether something may be called so, as the API server has it: a DNS subdomain.
fn is_name(name: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_label = |label: &str| {
        let (first, last) = (label.bytes().next(), label.bytes().next_back());
        first.is_some_and(alphanumeric)
            && last.is_some_and(alphanumeric)
            && label.bytes().all(|byte| alphanumeric(byte) || byte == b'-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

/// A name as it is told: in quotes if nobody would see what is wrong with it.
fn told(name: &str) -> String {
    if is_name(name) {
        name.to_owned()
    } else {
        format!("{name:?}")
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

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        observe::Fence,
        status::{Candidate, Colour},
    };

    /// What begins a migration has to know before which database it may use.
    #[test]
    fn a_migration_may_begin_anew_when_its_job_is_gone() {
        let stack = |colour| Stack {
            colour,
            revision: "r".to_owned(),
        };
        let live = Live {
            contracted: true,
            ..Live::new(stack(Colour::Blue), "1".to_owned(), 1, Timestamp::UNIX_EPOCH)
        };
        let candidate = Candidate {
            stack: stack(Colour::Green),
            version: "2".to_owned(),
            attempt: 2,
            gates: String::new(),
            scale: None,
            tested: None,
            approved_by: None,
            unneeded_since: None,
            forced: false,
        };
        let expand = Job {
            kind: JobKind::Expand,
            stack: candidate.stack.clone(),
            attempt: 2,
        };
        let fence = Fence {
            uid: "u".into(),
            resource_version: "1".into(),
        };
        let there = JobSeen {
            fence,
            state: JobState::Passed,
            trouble: None,
            progress: None,
            of: None,
        };
        let (gone, there) = (BTreeMap::new(), BTreeMap::from([(expand, there)]));
        for (phase, with_job) in [
            (Phase::Pending, true),
            (Phase::Migrating, true),
            (Phase::Provisioning, false),
            (Phase::Testing, false),
            (Phase::AwaitingPromotion, false),
        ] {
            let status = Status {
                phase,
                live: Some(live.clone()),
                candidate: Some(candidate.clone()),
                ..Status::default()
            };
            assert!(may_migrate(&gone, &status, &live), "{phase}");
            assert_eq!(may_migrate(&there, &status, &live), with_job, "{phase}");
        }
    }
}
