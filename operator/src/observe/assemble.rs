//! Puts together what was read: plain data out of objects, without asking anybody.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    Metadata,
    api::{
        apps::v1::{ControllerRevision, Deployment},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::Job as BatchJob,
        core::v1::{Pod, Service as CoreService},
        discovery::v1::EndpointSlice,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Resource, ResourceExt,
    api::{ApiResource, ObjectMeta},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Declared, Fence, Job, JobKind, JobSeen, LiveService, Observed, Part, PartSeen, Requests, ServiceSeen,
    Target, intact,
    pods::{self, Address},
    read::{Look, Material, builder},
};
use crate::{
    api::{ExchangeDeployment, Service},
    resources::{
        ATTEMPT, Builder, COLOUR, EPOCH, JOB, REVISION, Rendered, TEMPLATES, autoscaling, job_word,
        other_store, service_names,
    },
    revision::{Source, short},
    status::{Colour, Live, Stack},
};

/// Everything that belongs to an object, as it was read.
pub(super) struct Children {
    pub(super) services: Vec<CoreService>,
    pub(super) slices: Vec<EndpointSlice>,
    pub(super) deployments: Vec<Deployment>,
    pub(super) budgets: Vec<PodDisruptionBudget>,
    pub(super) autoscalers: Vec<HorizontalPodAutoscaler>,
    pub(super) revisions: Vec<ControllerRevision>,
    pub(super) jobs: Vec<BatchJob>,
    pub(super) pods: Vec<Pod>,
    /// What stacks need beside their workloads.
    pub(super) pieces: Vec<Piece>,
}

/// One object of those that the pods of a stack need: an account, the lane's secret, a copy of a ConfigMap or Secret.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Of which kind it is.
    pub kind: ApiResource,
    /// Its name.
    pub name: String,
    /// Its identity and version.
    pub fence: Fence,
    /// Whose it is.
    pub(super) stack: Option<Stack>,
    /// Whether it is going already.
    pub(super) going: bool,
}

impl Piece {
    pub(super) fn of<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> Self {
        Self {
            kind: ApiResource::erase::<K>(&()),
            name: meta.name.clone().unwrap_or_default(),
            fence: fence(meta),
            stack: stack_of(meta),
            going: meta.deletion_timestamp.is_some(),
        }
    }
}

/// What is declared, and the content of what it refers to.
pub(super) struct References {
    pub(super) declared: Result<Declared, String>,
    pub(super) content: BTreeMap<Source, Map<String, Value>>,
}

/// Whose an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    /// An object of our name that has been deleted: it goes as well.
    Predecessor,
    Nobody,
    Another,
}

fn controller(meta: &ObjectMeta) -> Option<&OwnerReference> {
    let mut owners = meta.owner_references.iter().flatten();
    owners.find(|owner| owner.controller == Some(true))
}

fn owner(meta: &ObjectMeta, builder: &Builder<'_>) -> Owner {
    match controller(meta) {
        Some(owner) if owner.uid == builder.uid => Owner::Us,
        Some(owner) if owner.kind == ExchangeDeployment::kind(&()) && owner.name == builder.name => {
            Owner::Predecessor
        }
        Some(_) => Owner::Another,
        None => Owner::Nobody,
    }
}

/// Whether the object owns it already.
pub(crate) fn is_ours(meta: &ObjectMeta, uid: &str) -> bool {
    controller(meta).is_some_and(|owner| owner.uid == uid)
}

/// Whether nobody owns it.
pub(crate) fn is_nobodys(meta: &ObjectMeta) -> bool {
    controller(meta).is_none()
}

/// Notes that a name that is needed is not ours.
pub(super) fn note_taken(meta: &ObjectMeta, kind: &str, builder: &Builder<'_>, seen: &mut Observed) {
    let names = if owner(meta, builder) == Owner::Predecessor {
        &mut seen.remains
    } else {
        &mut seen.taken
    };
    let name = format!("{kind}/{}", meta.name.as_deref().unwrap_or_default());
    if !names.contains(&name) {
        names.push(name);
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

pub(super) fn stack_of(meta: &ObjectMeta) -> Option<Stack> {
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
pub(super) fn assemble(object: ExchangeDeployment, children: &Children, references: References) -> Look {
    let builder = builder(&object);
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
        remains: Vec::new(),
        refused: None,
        answers: None,
        figures: BTreeMap::new(),
        unheard: None,
        seen_before: false,
    };
    let mut material = Material {
        content: references.content,
        pieces: pieces(children, &builder),
        ..Material::default()
    };
    for revision in &children.revisions {
        let stack = stack_of(&revision.metadata);
        let stack = stack.filter(|stack| revision.name_any() == builder.stack_name(stack));
        let Some(stack) = stack.filter(|_| mine(revision, &builder, &mut seen)) else {
            continue;
        };
        let data = revision.data.as_ref().map(|data| &data.0);
        let rendered = data.and_then(|data| builder.read(data));
        let there = seen.stacks.entry(stack.clone()).or_default();
        there.rendered = Some(fence(&revision.metadata));
        there.owned = is_ours(&revision.metadata, builder.uid);
        there.attempt = label(&revision.metadata, ATTEMPT)
            .and_then(|it| it.parse().ok())
            .unwrap_or(0);
        if let Some(rendered) = rendered {
            there.version.clone_from(&rendered.version);
            there.other_store = other_store(&object.spec, &rendered);
            there.whole = is_whole(&builder, &stack, rendered.copies.clone(), &children.pieces);
            material.rendered.insert(stack, rendered);
        }
    }
    let names = service_names(builder.name);
    let services = children
        .services
        .iter()
        .filter(|it| names.contains(&it.name_any()));
    let services = services.filter(|it| mine(*it, &builder, &mut seen));
    material.services = services.map(|it| (it.name_any(), it.clone())).collect();
    let colour_services: Vec<_> = material
        .services
        .values()
        .filter_map(|it| Some((it, colour_service(it, &builder, &seen, children)?)))
        .collect();
    let mut parts = Parts {
        builder,
        live: object.status.as_ref().and_then(|status| status.live.as_ref()),
        rendered: &material.rendered,
        seen: &mut seen,
    };
    for (there, (stack, service)) in colour_services {
        parts.see_of(stack, service, there, Part::ColourService);
    }
    for budget in &children.budgets {
        parts.see(budget, Part::Budget);
    }
    for autoscaler in &children.autoscalers {
        if let Some(service) = parts.see(autoscaler, Part::Autoscaler) {
            service.autoscaling = autoscaling(autoscaler);
        }
    }
    for deployment in &children.deployments {
        if let Some(service) = parts.see(deployment, Part::Workload) {
            see_workload(deployment, service);
            service.trouble = pods::replica_failure(deployment);
        }
    }
    let whose = |pod: &Pod| {
        let owner = (stack_of(&pod.metadata)?, service_of(&pod.metadata)?);
        Some((pod.uid()?, owner))
    };
    material.pods = children.pods.iter().filter_map(whose).collect();
    for slice in &children.slices {
        let names = material
            .slices
            .entry(slice_service(slice).to_owned())
            .or_default();
        names.push(slice.name_any());
    }
    see_pods(&children.pods, &mut seen);
    see_live(&builder, material.services.values(), &mut seen);
    see_slices(&builder, &children.slices, &material.pods, &mut seen);
    see_jobs(children, &builder, &mut seen);
    Look {
        object,
        seen,
        material,
    }
}

/// Whether an object is ours, or can become so. What belongs to another is reported.
fn mine<K>(object: &K, builder: &Builder<'_>, seen: &mut Observed) -> bool
where
    K: Resource<DynamicType = ()>,
{
    let mine = matches!(owner(object.meta(), builder), Owner::Us | Owner::Nobody);
    if !mine {
        note_taken(object.meta(), &K::kind(&()), builder, seen);
    }
    mine
}

/// The stack and the service of a colour Service. Its name says only the colour, so that one whose labels or selector somebody has
/// changed is still that of a stack that there is, of which it is put right.
fn colour_service(
    there: &CoreService,
    builder: &Builder<'_>,
    seen: &Observed,
    children: &Children,
) -> Option<(Stack, Service)> {
    let is_of = |stack: &Stack| {
        let mut all = Service::ALL.into_iter();
        all.find(|service| builder.colour_name(stack, *service) == there.name_any())
    };
    let exists = |stack: &Stack| {
        let pods = children.pods.iter().map(|it| &it.metadata);
        let mut metas = children.deployments.iter().map(|it| &it.metadata).chain(pods);
        seen.stacks.contains_key(stack) || metas.any(|meta| stack_of(meta).as_ref() == Some(stack))
    };
    let said = [stack_of(&there.metadata), selected(there)];
    let said: Vec<Stack> = said.into_iter().flatten().collect();
    let recorded: Vec<Stack> = seen.status.stacks().cloned().collect();
    let existing = said.iter().chain(&recorded).filter(|stack| exists(stack));
    let mut whose = existing.chain(&recorded).chain(&said);
    whose.find_map(|stack| Some((stack.clone(), is_of(stack)?)))
}

/// What the pods of each stack need. Not what somebody has labelled as another's: it would be removed with that.
fn pieces(children: &Children, builder: &Builder<'_>) -> BTreeMap<Stack, Vec<Piece>> {
    let mut pieces: BTreeMap<Stack, Vec<Piece>> = BTreeMap::new();
    for piece in &children.pieces {
        if let Some(stack) = piece
            .stack
            .as_ref()
            .filter(|stack| is_named_after(piece, stack, builder))
        {
            pieces.entry(stack.clone()).or_default().push(piece.clone());
        }
    }
    pieces
}

/// Whether an account, a secret or a copy has a name that one of this stack has.
fn is_named_after(piece: &Piece, stack: &Stack, builder: &Builder<'_>) -> bool {
    let own = builder.stack_name(stack);
    let rest = piece.name.strip_prefix(&own);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        || Service::ALL
            .into_iter()
            .any(|service| builder.workload_name(stack, service) == piece.name)
}

/// Whether all that a stack's pods need is there.
fn is_whole(builder: &Builder<'_>, stack: &Stack, mut needed: BTreeSet<String>, pieces: &[Piece]) -> bool {
    let accounts = Service::ALL.map(|service| builder.workload_name(stack, service));
    needed.extend(accounts.map(|name| format!("ServiceAccount/{name}")));
    needed.insert(format!("Secret/{}", builder.stack_name(stack)));
    let there = pieces.iter().filter(|piece| !piece.going);
    let there: BTreeSet<String> = there
        .map(|piece| format!("{}/{}", piece.kind.kind, piece.name))
        .collect();
    needed.is_subset(&there)
}

/// Sees the objects of stacks, and compares them with what was rendered.
struct Parts<'a> {
    builder: Builder<'a>,
    live: Option<&'a Live>,
    rendered: &'a BTreeMap<Stack, Rendered>,
    seen: &'a mut Observed,
}

impl Parts<'_> {
    fn see<K>(&mut self, object: &K, part: Part) -> Option<&mut ServiceSeen>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        self.see_of(stack_of(object.meta())?, service_of(object.meta())?, object, part)
    }

    fn see_of<K>(
        &mut self,
        stack: Stack,
        service: Service,
        object: &K,
        part: Part,
    ) -> Option<&mut ServiceSeen>
    where
        K: Resource<DynamicType = ()> + Serialize,
    {
        // Others may have taken over the labels, as `kubectl expose` does.
        let name = self.builder.part_name(&stack, service, part);
        if object.name_any() != name || !mine(object, &self.builder, self.seen) {
            return None;
        }
        let rendered = match part {
            Part::Autoscaler => {
                let live = self.live.filter(|live| live.stack == stack);
                live.and_then(|live| self.builder.autoscaler(live, service))
            }
            _ => self
                .rendered
                .get(&stack)
                .and_then(|it| it.objects.get(&(service, part)).cloned()),
        };
        let intact = object.meta().deletion_timestamp.is_some()
            || rendered.is_none_or(|rendered| as_rendered(object, &rendered));
        let there = self.seen.stacks.entry(stack).or_default();
        let there = there.services.entry(service).or_default();
        let fence = fence(object.meta());
        there.parts.insert(part, PartSeen { fence, intact });
        Some(there)
    }
}

/// Without a namespace, which everything shares.
pub(crate) fn as_rendered<K: Serialize>(object: &K, rendered: &Value) -> bool {
    serde_json::to_value(object).is_ok_and(|object| {
        ["/metadata/labels", "/metadata/ownerReferences", "/spec"]
            .iter()
            .all(|path| {
                let wanted = rendered.pointer(path).unwrap_or(&Value::Null);
                intact::contains(object.pointer(path).unwrap_or(&Value::Null), wanted)
            })
    })
}

/// Sees the live Services among these, beside those that were seen before.
pub(crate) fn see_live<'a>(
    builder: &Builder<'_>,
    services: impl Iterator<Item = &'a CoreService>,
    seen: &mut Observed,
) {
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
        let before = seen.live.remove(&service);
        let live = LiveService {
            fence: fence(&there.metadata),
            target,
            epoch: epoch.unwrap_or(0),
            intact: as_rendered(there, &written),
            endpoints: before.map_or_else(Vec::new, |before| before.endpoints),
        };
        seen.live.insert(service, live);
    }
}

/// How many pods a workload wants, what it makes them of, and whether there are others of it.
pub(super) fn see_workload(deployment: &Deployment, seen: &mut ServiceSeen) {
    let spec = deployment.spec.as_ref();
    let replicas = spec.and_then(|spec| spec.replicas);
    seen.replicas = replicas.and_then(|it| u32::try_from(it).ok()).unwrap_or(1);
    seen.template = spec.map_or_else(String::new, |spec| short(&json!(spec.template)));
    let status = deployment.status.as_ref();
    seen.current = status.is_some_and(|it| {
        it.observed_generation == deployment.metadata.generation && it.updated_replicas == it.replicas
    });
}

/// Sees an object of ours that has lost the labels by which it is found: it is put right as whatever is not as rendered.
pub(super) fn see_lost<'a>(
    meta: &ObjectMeta,
    (stack, service): (&Stack, Service),
    part: Part,
    seen: &'a mut Observed,
) -> &'a mut ServiceSeen {
    let there = seen.stacks.entry(stack.clone()).or_default();
    let there = there.services.entry(service).or_default();
    let (fence, intact) = (fence(meta), false);
    there.parts.insert(part, PartSeen { fence, intact });
    there
}

/// The stack that a Service selects.
pub(super) fn selected(service: &CoreService) -> Option<Stack> {
    let selector = service.spec.as_ref()?.selector.clone();
    stack_of(&ObjectMeta {
        labels: selector,
        ..ObjectMeta::default()
    })
}

/// Services of stacks that have pods and, as far as their labels tell, no workload that keeps them.
pub(super) fn without_workload(pods: &[Pod], seen: &Observed) -> BTreeSet<(Stack, Service)> {
    let kept = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none());
    kept.filter_map(|pod| Some((stack_of(&pod.metadata)?, service_of(&pod.metadata)?)))
        .filter(|(stack, service)| {
            let there = seen.stacks.get(stack).and_then(|it| it.service(*service));
            there.is_some_and(|it| it.pods > 0 && !it.parts.contains_key(&Part::Workload))
        })
        .collect()
}

pub(super) fn slice_service(slice: &EndpointSlice) -> &str {
    label(&slice.metadata, "kubernetes.io/service-name").unwrap_or_default()
}

/// Counts ready endpoints: of colour Services those whose pod is of the stack, of live Services the stacks. A pod may be in
/// several slices: one for each of its addresses' families, or two for a moment.
pub(super) fn see_slices(
    builder: &Builder<'_>,
    slices: &[EndpointSlice],
    pods: &BTreeMap<String, (Stack, Service)>,
    seen: &mut Observed,
) {
    let mut counted = BTreeSet::new();
    for slice in slices {
        let about = slice_service(slice);
        let ready = slice.endpoints.iter().flatten().filter(|endpoint| {
            let ready = endpoint
                .conditions
                .as_ref()
                .and_then(|conditions| conditions.ready);
            ready.unwrap_or(true)
        });
        let pods =
            ready.filter_map(|endpoint| pods.get_key_value(endpoint.target_ref.as_ref()?.uid.as_ref()?));
        for (uid, (stack, service)) in pods {
            if about == builder.colour_name(stack, *service) {
                if !counted.insert(uid) {
                    continue;
                }
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

/// Counts pods, and says what keeps them from starting; only if nothing does, what keeps one from ending.
pub(super) fn see_pods(pods: &[Pod], seen: &mut Observed) {
    let goes = |pod: &&Pod| pod.metadata.deletion_timestamp.is_some();
    let (going, staying): (Vec<&Pod>, Vec<&Pod>) = pods.iter().partition(goes);
    for pod in staying.into_iter().chain(going) {
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

fn see_jobs(children: &Children, builder: &Builder<'_>, seen: &mut Observed) {
    for object in &children.jobs {
        let meta = object.metadata();
        let (Some(stack), Some(word), Some(attempt)) = (
            stack_of(meta),
            label(meta, JOB),
            label(meta, ATTEMPT).and_then(|it| it.parse().ok()),
        ) else {
            continue;
        };
        let own = [
            JobKind::Expand,
            JobKind::Smoke,
            JobKind::Verify,
            JobKind::Contract,
        ];
        let kind = own.into_iter().find(|kind| job_word(kind) == word);
        let kind = kind.unwrap_or_else(|| JobKind::Test(word.to_owned()));
        let job = Job { kind, stack, attempt };
        if object.name_any() != builder.job_name(&job) || !mine(object, builder, seen) {
            continue;
        }
        let seen_job = JobSeen {
            fence: fence(meta),
            state: pods::job_state(&job.kind, object, &children.pods),
            trouble: pods::suspended(object)
                .or_else(|| pods::of(object, &children.pods).find_map(pods::trouble))
                .or_else(|| pods::tried(object, &children.pods)),
            progress: None,
            of: object.annotations().get(TEMPLATES).cloned(),
        };
        seen.jobs.insert(job, seen_job);
    }
}

/// The record as it is now, for the guards.
pub(super) fn retake(seen: &mut Observed, object: Option<ExchangeDeployment>) {
    seen.deleting = object
        .as_ref()
        .is_none_or(|object| object.metadata.deletion_timestamp.is_some());
    seen.status = object.and_then(|object| object.status).unwrap_or_default();
}

pub(super) fn all_moved(seen: &Observed) -> bool {
    let to = seen.status.candidate.as_ref().map(|it| &it.stack);
    seen.live.len() == Service::ALL.len()
        && seen
            .live
            .values()
            .all(|live| live.epoch == seen.status.epoch && live.target.is(to))
}

pub(super) fn addresses(stack: &Stack, children: &Children) -> Vec<Address> {
    let running = children
        .pods
        .iter()
        .filter(|pod| stack_of(&pod.metadata).as_ref() == Some(stack));
    running
        .filter_map(|pod| {
            let status = pod.status.as_ref()?;
            let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
            let mut conditions = status.conditions.iter().flatten();
            let ready = conditions.any(|it| it.type_ == "Ready" && it.status == "True");
            let service = service_of(&pod.metadata)?;
            let mut containers = status.container_statuses.iter().flatten();
            let own = containers.find(|it| it.name == service.as_str());
            Some(Address {
                service,
                pod: pod.uid()?,
                ip: status.pod_ip.clone().filter(|_| !ended)?,
                ready: ready && pod.metadata.deletion_timestamp.is_none(),
                restarts: own.map_or(0, |it| it.restart_count),
            })
        })
        .collect()
}
