//! The only writer: carries out what was planned, one write at a time.
//!
//! Each kind of write has its own protection. What is new is *created*: if the name is taken, nothing happens. What
//! exists is written by a patch with the uid and `resourceVersion` that were observed, and Services by a replacement with
//! the same: server-side apply would leave others' keys in a selector, others' variables in a container, and others'
//! fields that exclude ours. Deletions have them as preconditions. If any is refused, the pass ends, and the next one
//! looks again.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, Deployment},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::Job as BatchJob,
        core::v1::{ConfigMap, Secret, Service as CoreService, ServiceAccount, ServiceSpec},
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{
        ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
        PropagationPolicy,
    },
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    api::{ExchangeDeployment, Service},
    error::{Error, within},
    guard,
    metrics::Metrics,
    observe::{
        Fence, Job, JobKind, Part, as_rendered,
        intact::OF_NODE,
        is_nobodys, is_ours,
        read::{Look, READ_LIMIT, Reader, builder, selector},
        see_live,
    },
    plan::Action,
    resources::{ATTEMPT, Beside, Builder, COLOUR, MANAGER, REVISION, Rendered, TEMPLATES, keep_told},
    revision::{Source, hex},
    status::{ExchangeDeploymentStatus as Status, Stack},
};

/// Says of a load balancer whom it lets in. The API server refuses it for other Services.
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
/// For each write.
pub(crate) const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Writes to the API server.
#[derive(Clone)]
pub struct Writer {
    client: Client,
    reader: Reader,
    metrics: Metrics,
}

impl Writer {
    /// A writer that looks with this reader before it writes.
    pub const fn new(client: Client, reader: Reader, metrics: Metrics) -> Self {
        Self {
            client,
            reader,
            metrics,
        }
    }

    /// Records a status. Refused if anything about the object has changed since it was observed.
    pub async fn record(&self, look: &Look, status: Status) -> Result<ExchangeDeployment, Error> {
        let mut object = look.object.clone();
        object.status = Some(status);
        let name = object.name_any();
        let api = Api::<ExchangeDeployment>::namespaced(self.client.clone(), builder(&object).namespace);
        let params = post();
        let written = api.replace_status(&name, &params, &object);
        self.limited("update", "ExchangeDeployment", &name, written).await
    }

    /// Carries out one action, if its guard has nothing against it.
    pub async fn act(&self, look: &mut Look, action: &Action) -> Result<(), Error> {
        let seen = self.reader.look_again(look, action).await?;
        guard::check(&look.object.spec, &look.seen.status, action, &seen)?;
        let builder = builder(&look.object);
        match action {
            Action::CreateLive { service } => {
                let object = builder.live_service(*service, None, 0);
                self.create::<CoreService>(look, object).await
            }
            Action::Point {
                service,
                fence,
                to,
                epoch,
                ..
            } => {
                let object = builder.live_service(*service, to.as_ref(), *epoch);
                let written = self.replace_service(look, &object, fence).await?;
                see_live(&builder, std::iter::once(&written), &mut look.seen);
                let written = serde_json::to_value(written).unwrap_or_default();
                let same = |path| written.pointer(path) == object.pointer(path);
                // What else is changed of it is a matter of the repair that comes after the move.
                if action.is_move()
                    && ["/spec/selector", "/metadata/annotations/exchange.dev~1epoch"]
                        .into_iter()
                        .all(same)
                {
                    return Ok(());
                }
                as_built(&written, &object, "Service")
            }
            Action::Render { stack, attempt, .. } => self.render(look, stack, *attempt).await,
            Action::Adopt { stack, fence } => self.adopt(look, stack, fence).await,
            Action::Apply {
                stack,
                service,
                part,
                replicas,
                fence,
            } => {
                self.apply(look, stack, *service, *part, *replicas, fence.as_ref())
                    .await
            }
            Action::Delete {
                stack,
                service,
                part,
                fence,
            } => {
                let name = builder.part_name(stack, *service, *part);
                self.delete(&kind(*part), look, &name, fence).await
            }
            Action::Unrender { stack, fence } => self.unrender(look, stack, fence).await,
            Action::Run(job) => self.run(look, job).await,
            Action::DeleteJob(job, fence) => {
                let name = builder.job_name(job);
                self.delete(&ApiResource::erase::<BatchJob>(&()), look, &name, fence)
                    .await
            }
        }
    }

    /// A stack and what its pods need. First the rendered stack, so that what follows is known to belong to it and is removed with it; then what is
    /// missing of the rest. An operator that dies in between leaves a stack that is not whole.
    async fn render(&self, look: &mut Look, stack: &Stack, attempt: u32) -> Result<(), Error> {
        if !look.material.rendered.contains_key(stack) {
            let builder = builder(&look.object);
            let mut rendered = builder.render(&look.object.spec, stack, look.material.content.keys());
            let live = look.seen.status.live.as_ref();
            if live.is_some_and(|live| live.stack == *stack) {
                self.keep_told(&builder, stack, &mut rendered).await?;
            }
            let revision = builder.controller_revision(stack, attempt, &rendered);
            self.create::<ControllerRevision>(look, revision).await?;
            look.material.rendered.insert(stack.clone(), rendered);
        }
        let builder = builder(&look.object);
        for service in Service::ALL {
            self.create_missing::<ServiceAccount>(look, builder.service_account(stack, service))
                .await?;
        }
        self.create_missing::<Secret>(
            look,
            builder.lane_secret(stack, &hex(&rand::random::<[u8; 32]>())),
        )
        .await?;
        for (source, content) in &look.material.content {
            let copy = builder.copy(stack, source, content);
            match source {
                Source::ConfigMap(_) => self.create_missing::<ConfigMap>(look, copy).await?,
                Source::Secret(_) => self.create_missing::<Secret>(look, copy).await?,
            }
        }
        Ok(())
    }

    /// What has the traffic goes on being told what it was told: else all its pods would be replaced.
    async fn keep_told(
        &self,
        builder: &Builder<'_>,
        stack: &Stack,
        rendered: &mut Rendered,
    ) -> Result<(), Error> {
        for service in Service::ALL {
            let name = builder.part_name(stack, service, Part::Workload);
            let runs = self.reader.template(builder.namespace, &name).await?;
            let built = rendered.objects.get_mut(&(service, Part::Workload));
            if let (Some(runs), Some(built)) = (runs, built.and_then(|it| it.pointer_mut("/spec/template"))) {
                keep_told(built, &runs);
            }
        }
        Ok(())
    }

    async fn apply(
        &self,
        look: &Look,
        stack: &Stack,
        service: Service,
        part: Part,
        replicas: u32,
        fence: Option<&Fence>,
    ) -> Result<(), Error> {
        let builder = builder(&look.object);
        let object = match part {
            Part::Autoscaler => {
                let live = look.seen.status.live.as_ref().filter(|live| live.stack == *stack);
                live.and_then(|live| builder.autoscaler(live, service))
            }
            _ => look
                .material
                .rendered
                .get(stack)
                .and_then(|rendered| rendered.objects.get(&(service, part)).cloned()),
        };
        // What cannot be read cannot be repaired.
        let Some(mut object) = object else { return Ok(()) };
        if part == Part::Workload
            && let Some(Value::Object(spec)) = object.get_mut("spec")
        {
            spec.insert("replicas".to_owned(), json!(replicas));
        }
        match fence {
            None => self.create_kind(&kind(part), look, object).await,
            Some(fence) if part == Part::ColourService => {
                let written = self.replace_service(look, &object, fence).await?;
                as_built(&written, &object, "Service")
            }
            Some(fence) if part == Part::Workload && is_intact(look, stack, service) => {
                self.scale(look, &builder.part_name(stack, service, part), replicas, fence)
                    .await
            }
            Some(fence) if part == Part::Workload => self.overwrite(look, object, fence).await,
            Some(fence) => self.patch(&kind(part), look, object, fence).await,
        }
    }

    /// An operator that dies in between finds the rendered stack still without an owner.
    async fn adopt(&self, look: &Look, stack: &Stack, fence: &Fence) -> Result<(), Error> {
        self.adopt_all::<ConfigMap>(look, stack).await?;
        self.adopt_all::<Secret>(look, stack).await?;
        self.adopt_all::<ServiceAccount>(look, stack).await?;
        self.adopt_all::<BatchJob>(look, stack).await?;
        let name = builder(&look.object).stack_name(stack);
        let kind = ApiResource::erase::<ControllerRevision>(&());
        self.own(&kind, look, &name, fence).await
    }

    async fn unrender(&self, look: &Look, stack: &Stack, fence: &Fence) -> Result<(), Error> {
        // As they were seen: under the same names there may be those of a stack that was made again since.
        for piece in look.material.pieces.get(stack).into_iter().flatten() {
            self.delete(&piece.kind, look, &piece.name, &piece.fence).await?;
        }
        let name = builder(&look.object).stack_name(stack);
        let kind = ApiResource::erase::<ControllerRevision>(&());
        self.delete(&kind, look, &name, fence).await
    }

    async fn run(&self, look: &Look, job: &Job) -> Result<(), Error> {
        let builder = builder(&look.object);
        let rendered = look.material.rendered.get(&job.stack);
        let object = builder.job(&look.object.spec, rendered, job, &beside(look));
        let mut object = object.ok_or_else(|| Error::Lost(job.stack.clone()))?;
        if let (JobKind::Smoke | JobKind::Test(_), Some(stack)) =
            (&job.kind, look.seen.stacks.get(&job.stack))
            && let Some(Value::Object(metadata)) = object.get_mut("metadata")
        {
            // Its verdict is about these pods, and counts for no others.
            metadata.insert("annotations".to_owned(), json!({TEMPLATES: stack.templates()}));
        }
        self.create::<BatchJob>(look, object).await
    }

    // ---- requests ---------------------------------------------------------------------------------------------

    async fn create<K: Resource<DynamicType = ()>>(&self, look: &Look, object: Value) -> Result<(), Error> {
        self.create_kind(&ApiResource::erase::<K>(&()), look, object)
            .await
    }

    /// Creates what may be there already, made by an operator that did not come to its end.
    async fn create_missing<K: Resource<DynamicType = ()>>(
        &self,
        look: &Look,
        object: Value,
    ) -> Result<(), Error> {
        match self.create::<K>(look, object).await {
            Err(error) if already_exists(&error) => Ok(()),
            done => done,
        }
    }

    async fn create_kind(&self, kind: &ApiResource, look: &Look, object: Value) -> Result<(), Error> {
        let object = dynamic(object)?;
        let name = object.name_any();
        let (api, params) = (self.objects(kind, look), post());
        let created = api.create(&params, &object);
        let created = self.limited("create", &kind.kind, &name, created).await;
        match created {
            Err(error) if already_exists(&error) => self.reclaim(kind, look, &object, error).await,
            done => done.map(drop),
        }
    }

    /// A name that is taken. An object of ours that has lost the labels by which it is found gets them back, and is seen
    /// at the next look; one that has them was created by another operator since this one has looked.
    async fn reclaim(
        &self,
        kind: &ApiResource,
        look: &Look,
        object: &DynamicObject,
        refusal: Error,
    ) -> Result<(), Error> {
        let (namespace, name) = (builder(&look.object).namespace, object.name_any());
        let Some(there) = self.reader.named(kind, namespace, &name).await? else {
            return Err(refusal);
        };
        // The rest of an attempt before may be there. The name of a Job says the attempt.
        let may_differ = |key: &str| key == ATTEMPT && kind.kind != "Job";
        let has = |(key, value): (&String, &String)| {
            let there = there.labels().get(key);
            there == Some(value) || (may_differ(key) && there.is_some())
        };
        let ours = is_ours(&there.metadata, builder(&look.object).uid);
        let labelled = object.labels().iter().all(has);
        if !(ours || labelled && is_nobodys(&there.metadata)) {
            let kind = Box::new(kind.clone());
            return Err(Error::Taken { kind, name });
        }
        // Services are found by their names.
        if labelled || kind.kind == "Service" || there.metadata.deletion_timestamp.is_some() {
            return Err(refusal);
        }
        let patch = json!({"metadata": {
            "uid": there.uid(),
            "resourceVersion": there.resource_version(),
            "labels": object.labels(),
        }});
        self.merge(kind, look, &name, &patch).await
    }

    /// Writes a budget or an autoscaler as it was built. Strategic, because that replaces selectors and metrics as a whole.
    async fn patch(
        &self,
        kind: &ApiResource,
        look: &Look,
        mut object: Value,
        fence: &Fence,
    ) -> Result<(), Error> {
        carry(&mut object, fence);
        let name = dynamic(object.clone())?.name_any();
        if let Some(Value::Object(spec)) = object.get_mut("spec")
            && spec.contains_key("maxUnavailable")
        {
            // With both the API server refuses it.
            spec.insert("minAvailable".to_owned(), Value::Null);
        }
        let (api, params, patch) = (self.objects(kind, look), merging(), Patch::Strategic(&object));
        let patched = api.patch(&name, &params, &patch);
        let written = self.limited("patch", &kind.kind, &name, patched).await?;
        as_built(&written, &object, &kind.kind)
    }

    /// Writes a workload as it was rendered. Lists are replaced, and the node's own is taken back: server-side apply would
    /// leave the variables and rights that others have added.
    async fn overwrite(&self, look: &Look, mut object: Value, fence: &Fence) -> Result<(), Error> {
        carry(&mut object, fence);
        let name = dynamic(object.clone())?.name_any();
        if let Some(Value::Object(pod)) = object.pointer_mut("/spec/template/spec") {
            for field in OF_NODE {
                pod.entry(field).or_insert(Value::Null);
            }
        }
        if let Some(Value::Object(spec)) = object.get_mut("spec") {
            spec.insert("paused".to_owned(), Value::Null);
        }
        let written = self.merged(&kind(Part::Workload), look, &name, &object).await?;
        as_built(&written, &object, "Deployment")
    }

    /// Gives a workload another size and leaves what others have added, which is no difference: its pods must not be replaced
    /// for this.
    async fn scale(&self, look: &Look, name: &str, replicas: u32, fence: &Fence) -> Result<(), Error> {
        let mut patch = json!({"metadata": {}, "spec": {"replicas": replicas}});
        carry(&mut patch, fence);
        let written = self.merged(&kind(Part::Workload), look, name, &patch).await?;
        if written.data.pointer("/spec/replicas") == Some(&json!(replicas)) {
            return Ok(());
        }
        Err(Error::Changed(format!("the size of Deployment {name}")))
    }

    /// Writes a Service as it was built, and keeps what is not ours of what was observed: the address, other labels and
    /// annotations.
    async fn replace_service(
        &self,
        look: &Look,
        object: &Value,
        fence: &Fence,
    ) -> Result<CoreService, Error> {
        let built: CoreService = typed(object.clone())?;
        let name = built.name_any();
        let there = look.material.services.get(&name).cloned();
        let unseen = || Error::Unreadable(format!("Service {name}"), "it has not been seen".to_owned());
        let mut service = there.ok_or_else(unseen)?;
        let add = |to: &mut Option<BTreeMap<String, String>>, from: Option<BTreeMap<String, String>>| {
            to.get_or_insert_default().extend(from.unwrap_or_default());
        };
        add(&mut service.metadata.labels, built.metadata.labels);
        add(&mut service.metadata.annotations, built.metadata.annotations);
        take_over(
            &mut service.metadata.owner_references,
            built.metadata.owner_references,
        );
        service.metadata.managed_fields = None;
        service.metadata.uid = Some(fence.uid.to_string());
        service.metadata.resource_version = Some(fence.resource_version.to_string());
        if let (Some(spec), Some(built)) = (&mut service.spec, built.spec) {
            // Whoever has added anything else chooses who gets the traffic, or has given it another type, whose fields the API server
            // would refuse.
            *spec = ServiceSpec {
                cluster_ip: spec.cluster_ip.take(),
                cluster_ips: spec.cluster_ips.take(),
                ip_families: spec.ip_families.take(),
                ip_family_policy: spec.ip_family_policy.take(),
                ..built
            };
        }
        if let Some(annotations) = &mut service.metadata.annotations {
            annotations.remove(SOURCE_RANGES);
        }
        let api = Api::<CoreService>::namespaced(self.client.clone(), builder(&look.object).namespace);
        let params = post();
        let replaced = api.replace(&name, &params, &service);
        self.limited("update", "Service", &name, replaced).await
    }

    async fn delete(&self, kind: &ApiResource, look: &Look, name: &str, fence: &Fence) -> Result<(), Error> {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions {
                uid: Some(fence.uid.to_string()),
                resource_version: Some(fence.resource_version.to_string()),
            }),
            ..DeleteParams::default()
        };
        let api = self.objects(kind, look);
        self.limited("delete", &kind.kind, name, api.delete(name, &params))
            .await
            .map(drop)
    }

    async fn own(&self, kind: &ApiResource, look: &Look, name: &str, fence: &Fence) -> Result<(), Error> {
        let patch = json!({"metadata": {
            "uid": *fence.uid,
            "resourceVersion": *fence.resource_version,
            "ownerReferences": builder(&look.object).owner(),
        }});
        self.merge(kind, look, name, &patch).await
    }

    async fn merge(&self, kind: &ApiResource, look: &Look, name: &str, patch: &Value) -> Result<(), Error> {
        let (api, params, patch) = (self.objects(kind, look), merging(), Patch::Merge(patch));
        let patched = api.patch_metadata(name, &params, &patch);
        self.limited("patch", &kind.kind, name, patched).await.map(drop)
    }

    /// The same; returns what has become of it.
    async fn merged(
        &self,
        kind: &ApiResource,
        look: &Look,
        name: &str,
        patch: &Value,
    ) -> Result<DynamicObject, Error> {
        let (api, params, patch) = (self.objects(kind, look), merging(), Patch::Merge(patch));
        let patched = api.patch(name, &params, &patch);
        self.limited("patch", &kind.kind, name, patched).await
    }

    async fn adopt_all<K: Resource<DynamicType = ()>>(
        &self,
        look: &Look,
        stack: &Stack,
    ) -> Result<(), Error> {
        let kind = ApiResource::erase::<K>(&());
        for (name, fence, owned) in self.all(&kind, look, stack).await? {
            if !owned {
                self.own(&kind, look, &name, &fence).await?;
            }
        }
        Ok(())
    }

    /// All objects of a kind with the labels of a stack, and whether they have an owner.
    async fn all(
        &self,
        kind: &ApiResource,
        look: &Look,
        stack: &Stack,
    ) -> Result<Vec<(String, Fence, bool)>, Error> {
        let labels = format!(
            "{},{COLOUR}={},{REVISION}={}",
            selector(&look.object.name_any()),
            stack.colour,
            stack.revision
        );
        let api = self.objects(kind, look);
        let params = ListParams::default().labels(&labels);
        let list = api.list_metadata(&params);
        let list = within(READ_LIMIT, format!("list {}", kind.plural), list).await?;
        let objects = list.items.iter().map(|object| {
            let fence = Fence {
                uid: object.uid().unwrap_or_default().into(),
                resource_version: object.resource_version().unwrap_or_default().into(),
            };
            let owned = object
                .owner_references()
                .iter()
                .any(|owner| owner.controller == Some(true));
            (object.name_any(), fence, owned)
        });
        Ok(objects.collect())
    }

    fn objects(&self, kind: &ApiResource, look: &Look) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), builder(&look.object).namespace, kind)
    }

    async fn limited<T>(
        &self,
        verb: &'static str,
        kind: &str,
        name: &str,
        write: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Error> {
        self.metrics.write(verb, kind);
        within(WRITE_LIMIT, format!("{verb} {kind} {name}"), write).await
    }
}

/// The live stack, beside which a migration runs.
fn beside(look: &Look) -> Beside<'_> {
    let live = look.seen.status.live.as_ref();
    let stack = live.and_then(|live| look.seen.stacks.get(&live.stack));
    let pods = Service::ALL.map(|service| {
        let has = stack
            .and_then(|stack| stack.service(service))
            .map_or(0, |it| it.replicas);
        let scale = live.and_then(|live| live.scale.as_ref());
        let grows = scale.and_then(|scale| Some(scale.of(service).autoscaling.as_ref()?.max_replicas));
        let has = i32::try_from(has).unwrap_or(i32::MAX);
        (service, grows.unwrap_or(0).max(has))
    });
    Beside {
        database: look.material.database.as_deref(),
        pods: pods.into(),
    }
}

/// Whether a workload was as it was rendered when it was observed.
fn is_intact(look: &Look, stack: &Stack, service: Service) -> bool {
    let seen = look.seen.stacks.get(stack);
    let workload = seen
        .and_then(|it| it.service(service))
        .and_then(|it| it.parts.get(&Part::Workload));
    workload.is_some_and(|it| it.intact)
}

fn merging() -> PatchParams {
    PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

fn post() -> PostParams {
    PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    }
}

fn kind(part: Part) -> ApiResource {
    match part {
        Part::ColourService => ApiResource::erase::<CoreService>(&()),
        Part::Budget => ApiResource::erase::<PodDisruptionBudget>(&()),
        Part::Workload => ApiResource::erase::<Deployment>(&()),
        Part::Autoscaler => ApiResource::erase::<HorizontalPodAutoscaler>(&()),
    }
}

fn carry(object: &mut Value, fence: &Fence) {
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.insert("uid".to_owned(), json!(*fence.uid));
        metadata.insert("resourceVersion".to_owned(), json!(*fence.resource_version));
    }
}

/// One controller, and whoever else owns the object.
fn take_over(owners: &mut Option<Vec<OwnerReference>>, ours: Option<Vec<OwnerReference>>) {
    let owners = owners.get_or_insert_default();
    owners.retain(|owner| owner.controller != Some(true));
    owners.extend(ours.unwrap_or_default());
}

/// What has come of a write, or what changes it: it would be written again and again.
fn as_built<K: Serialize>(written: &K, built: &Value, kind: &str) -> Result<(), Error> {
    if as_rendered(written, built) {
        return Ok(());
    }
    let name = built.pointer("/metadata/name").and_then(Value::as_str);
    Err(Error::Changed(format!("{kind} {}", name.unwrap_or_default())))
}

fn already_exists(error: &Error) -> bool {
    let Error::Api { source, .. } = error else {
        return false;
    };
    matches!(&**source, kube::Error::Api(status) if status.is_already_exists())
}

fn dynamic(object: Value) -> Result<DynamicObject, Error> {
    typed(object)
}

fn typed<T: serde::de::DeserializeOwned>(object: Value) -> Result<T, Error> {
    serde_json::from_value(object)
        .map_err(|error| Error::Unreadable("what was built".to_owned(), error.to_string()))
}
