//! Passes over objects: observe, decide, record, act, tell.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment, batch::v1::Job, core::v1::Service, discovery::v1::EndpointSlice,
};
use kube::{
    Client, Resource, ResourceExt,
    api::{ObjectMeta, PartialObjectMeta},
    runtime::{
        Controller, WatchStreamExt,
        controller::{self, Action, Config},
        events::{Event, EventType, Recorder, Reporter},
        reflector::{self, ObjectRef},
    },
};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::{
    api::ExchangeDeployment,
    apply::{WRITE_LIMIT, Writer},
    decide::decide,
    error::{Class, Error},
    metrics::Metrics,
    observe::{
        Refused,
        pods::Pods,
        read::{Look, Memory, Reader},
    },
    plan::{self, AT_LEAST_EVERY},
    resources::MANAGER,
    status::{ExchangeDeploymentStatus as Status, token},
    watch::Watches,
};

/// For a whole pass.
const PASS_LIMIT: Duration = Duration::from_mins(1);
/// Objects that are worked on at the same time.
const CONCURRENCY: u16 = 8;
/// Failures in a row that are taken for what passes by itself; the next one counts as what lasts.
pub const PATIENCE: u32 = 3;
/// What failing writes of one pass may take together before the rest of it waits.
const FAILING_LIMIT: Duration = Duration::from_secs(20);
/// What any other action of a pass may take after a write that nobody has answered.
const HURRY: Duration = Duration::from_secs(1);
/// What was told of a write is taken back so soon after it has gone well.
const MENDED: Duration = Duration::from_secs(1);
/// What cannot be written is tried as often at the most once its backoff has come to that.
const TRIED_EVERY: Duration = Duration::from_secs(5);
/// The longest note of an event, in bytes: the API server takes 1024.
const NOTE: usize = 1000;

type Trigger = PartialObjectMeta<ExchangeDeployment>;

/// What passes need, and what is remembered between them. All of the memory can be lost.
pub struct Context {
    reader: Reader,
    writer: Writer,
    client: Client,
    reporter: Reporter,
    metrics: Metrics,
    memories: Mutex<HashMap<ObjectRef<Trigger>, Remembered>>,
}

struct Remembered {
    memory: Memory,
    /// Passes in a row that failed.
    failures: u32,
    /// Writes in a row that failed although they might have gone well.
    transient: u32,
    /// When what was refused last was put into these words.
    worded: Option<Instant>,
    /// When the last plan wants the next look.
    due: Duration,
    /// The move that is under way, and since when.
    moving: Option<(u32, Instant)>,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            memory: Memory::default(),
            failures: 0,
            transient: 0,
            worded: None,
            due: AT_LEAST_EVERY,
            moving: None,
        }
    }
}

impl Remembered {
    /// Whether what ended so cannot be written: it will not go better next time, or has not again and again, although all
    /// could be read.
    fn cannot(&mut self, error: &Error) -> bool {
        if error.class() == Class::Transient {
            self.transient += 1;
            return self.transient > PATIENCE;
        }
        error.lasts()
    }

    /// Keeps for the next look what could not be written, and whether it was a live Service.
    fn refuse(&mut self, error: &Error, traffic: bool) {
        let memory = &mut self.memory;
        let refused = error.refusal().map(|why| Refused { why, traffic });
        // The same may be told in other words each time, with the number of a request in them, which would be a record each time.
        let about = |it: &Refused| it.why.split(": ").next().map(ToOwned::to_owned);
        let same = memory.refused.as_ref().map(about) == refused.as_ref().map(about);
        if !same || self.worded.is_none_or(|at| at.elapsed() >= AT_LEAST_EVERY) {
            memory.refused = refused;
            self.worded = Some(Instant::now());
        }
    }
}

impl Context {
    /// For an operator of this name.
    pub fn new(client: &Client, pods: Pods, identity: &str, metrics: Metrics) -> Self {
        let reader = Reader::new(client.clone(), pods);
        let reporter = Reporter {
            controller: MANAGER.to_owned(),
            instance: Some(identity.to_owned()),
        };
        Self {
            writer: Writer::new(client.clone(), reader.clone(), metrics.clone()),
            reader,
            client: client.clone(),
            reporter,
            metrics,
            memories: Mutex::default(),
        }
    }

    /// One pass over one object, of which this generation has been heard: when to come back.
    pub async fn pass(&self, namespace: &str, name: &str, generation: i64) -> Result<Action, Error> {
        let key = ObjectRef::new(name).within(namespace);
        // The same object is never worked on twice at once.
        let mut remembered = self.memories().remove(&key).unwrap_or_default();
        remembered.memory.forget_before(generation);
        let begun = Instant::now();
        let work = Box::pin(self.work(namespace, name, &mut remembered));
        let result = match timeout(PASS_LIMIT, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                doing: format!("look after {namespace}/{name}"),
                limit: PASS_LIMIT,
            }),
        };
        let class = result.as_ref().err().map(Error::class);
        self.metrics.reconciled(begun.elapsed(), class);
        match (&result, class) {
            (Ok(None), _) => return Ok(Action::await_change()),
            (Err(error), Some(class)) => {
                remembered.failures += 1;
                complain(error, class);
            }
            _ => remembered.failures = 0,
        }
        self.memories().insert(key, remembered);
        result.map(|wait| wait.map_or_else(Action::await_change, Action::requeue))
    }

    /// Nothing if there is no such object.
    async fn work(
        &self,
        namespace: &str,
        name: &str,
        remembered: &mut Remembered,
    ) -> Result<Option<Duration>, Error> {
        let look = Box::pin(self.reader.look(namespace, name, &mut remembered.memory)).await?;
        let Some(mut look) = look else {
            return Ok(None);
        };
        let plan = decide(&look.object.spec, &look.seen, Timestamp::now());
        let mut requeue = plan.requeue;
        remembered.due = requeue;
        if let Some(status) = plan.status {
            let object = self.writer.record(&look, status).await?;
            // An API server that does not know all of it keeps what it had: it would be recorded again at once, for ever.
            if object.resource_version() == look.object.resource_version() {
                requeue = requeue.max(TRIED_EVERY);
            }
            let recorded = object.status.clone().unwrap_or_default();
            let old = std::mem::replace(&mut look.seen.status, recorded);
            remembered.memory.last = Some(object.clone());
            look.object = object;
            self.note(&old, &look.seen.status);
        }
        let conditions = &look.seen.status.conditions;
        self.metrics.conditions(namespace, name, conditions);
        let done = self.act(&mut look, &plan.actions, remembered).await;
        self.tell(&look, &plan.events).await;
        let refused = done?;
        let status = &look.seen.status;
        remembered.memory.known = Some((status.phase, status.attempt));
        let Some((error, traffic)) = refused else {
            let mended = remembered.memory.refused.take().map(|_| MENDED.min(requeue));
            return Ok(Some(mended.unwrap_or(requeue)));
        };
        remembered.refuse(&error, traffic);
        Err(error)
    }

    /// Does what can be done. What cannot be written has been tried as well: the first of it is given back, and whether it
    /// is a live Service, for somebody has to be told, and the deadline to pass. After any other failure the pass ends, and
    /// the next one looks again.
    async fn act(
        &self,
        look: &mut Look,
        actions: &[plan::Action],
        remembered: &mut Remembered,
    ) -> Result<Option<(Error, bool)>, Error> {
        let moves = actions.iter().find_map(|action| match action {
            plan::Action::Point { epoch, intent, .. } if action.is_move() => Some((*epoch, *intent)),
            _ => None,
        });
        if let Some((epoch, _)) = moves
            && remembered.moving.is_none_or(|(of, _)| of != epoch)
        {
            remembered.moving = Some((epoch, Instant::now()));
        }
        let (mut refused, mut failing, before) = (None, Duration::ZERO, remembered.transient);
        let mut failed: Vec<&plan::Action> = Vec::new();
        for action in actions {
            if failed.iter().any(|it| action.needs(it)) {
                continue;
            }
            let begun = Instant::now();
            let limit = if failing < WRITE_LIMIT { PASS_LIMIT } else { HURRY };
            let acted = timeout(limit, self.writer.act(look, action)).await;
            let Err(error) = acted.unwrap_or_else(|_| {
                let doing = "go on after a write that was not answered".to_owned();
                Err(Error::Timeout { doing, limit })
            }) else {
                debug!("{action:?}");
                continue;
            };
            if !remembered.cannot(&error) {
                if refused.is_none() {
                    return Err(error);
                }
                // The rest is looked at anew, and what was refused before it is told.
                break;
            }
            if let Error::Taken { kind, name } = &error {
                remembered.memory.taken.add(kind, name);
            }
            failed.push(action);
            refused.get_or_insert_with(|| (error, action.is_about_traffic()));
            // Trying the others makes nothing worse, unless each takes its time: who waits for traffic to be moved has none.
            failing += begun.elapsed();
            if failing >= FAILING_LIMIT {
                break;
            }
        }
        if remembered.transient == before {
            remembered.transient = 0;
        }
        if refused.is_some() {
            return Ok(refused);
        }
        if let (Some((epoch, intent)), Some((_, since))) = (moves, remembered.moving)
            // A pass may move only what can be moved already.
            && look.seen.missing_live().is_none()
            && look.seen.live.values().all(|it| it.epoch == epoch)
        {
            self.metrics.swapped(intent, since.elapsed());
        }
        Ok(None)
    }

    /// A transition, in the log and in the metrics.
    fn note(&self, old: &Status, new: &Status) {
        if old.phase == new.phase {
            return;
        }
        if let Some(since) = old.phase_since
            && let Ok(took) = Duration::try_from(Timestamp::now().duration_since(since))
        {
            self.metrics.phase_ended(old.phase, took);
        }
        let live = new.live.as_ref().map(|it| token(&it.stack, it.attempt));
        let candidate = new.candidate.as_ref().map(|it| token(&it.stack, it.attempt));
        info!(
            labels.phase = %new.phase,
            labels.live = live.unwrap_or_default(),
            labels.candidate = candidate.unwrap_or_default(),
            "{} -> {}", old.phase, new.phase,
        );
    }

    async fn tell(&self, look: &Look, events: &[plan::Event]) {
        for event in events {
            info!(labels.reason = event.reason, "{}", event.note);
            let (note, _) = event.note.split_at(event.note.floor_char_boundary(NOTE));
            let event = Event {
                type_: if event.warning {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason: event.reason.to_owned(),
                note: Some(note.to_owned()),
                action: "Release".to_owned(),
                secondary: None,
            };
            // A recorder joins the Events of one reason and keeps only what the first of them says.
            self.metrics.write("create", "Event");
            let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
            let about = look.object.object_ref(&());
            let why = match timeout(WRITE_LIMIT, recorder.publish(&event, &about)).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(late) => late.to_string(),
            };
            warn!(error.message = why, "failed to publish an event");
        }
    }

    /// When to come back after a failure: soon after a conflict, later and later after anything else, but not much later
    /// than the plan wants, of which not all has failed.
    pub fn after(&self, namespace: &str, name: &str, error: &Error) -> Duration {
        let key = ObjectRef::new(name).within(namespace);
        let remembered = self.memories().get(&key).map(|it| (it.failures, it.due));
        let (failures, due) = remembered.unwrap_or((1, AT_LEAST_EVERY));
        let (first, most) = match error.class() {
            Class::Conflict => (Duration::from_millis(50), Duration::from_secs(2)),
            _ => (Duration::from_millis(250), due.max(TRIED_EVERY)),
        };
        let wait = first
            .saturating_mul(1 << failures.saturating_sub(1).min(10))
            .min(most);
        wait.mul_f64(rand::random_range(0.5..1.0))
    }

    /// There is no such object any more.
    fn forget(&self, namespace: &str, name: &str) {
        self.memories().remove(&ObjectRef::new(name).within(namespace));
        self.metrics.forget(namespace, name);
    }

    fn memories(&self) -> std::sync::MutexGuard<'_, HashMap<ObjectRef<Trigger>, Remembered>> {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn complain(error: &Error, class: Class) {
    let message = error.chain();
    match class {
        Class::Conflict => debug!(error.message = message, "the pass ends here and another begins"),
        Class::Transient => warn!(error.message = message, "the pass failed and is tried again"),
        Class::Forbidden | Class::Invalid => {
            tracing::error!(
                error.message = message,
                "the pass failed: somebody has to look into it"
            );
        }
    }
}

/// Works until it is told to stop, and then until the passes under way have ended. Dropped, it stops at once.
pub async fn run(watches: Watches, context: Arc<Context>, stop: CancellationToken) {
    let labels = format!("app.kubernetes.io/managed-by={MANAGER}");
    let (reader, writer) = reflector::store();
    let (listed, stopped, of_objects) = (reader.clone(), stop.clone(), Arc::clone(&context));
    let objects = watches
        .events::<ExchangeDeployment>("ExchangeDeployment", "")
        .map(Ok)
        .modify(only_what_triggers)
        .reflect(writer)
        .touched_objects();
    let work = Controller::for_stream(objects, reader)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(watches.owners::<Service>("Service", &labels))
        .reconcile_on(watches.owners::<Deployment>("Deployment", &labels))
        .reconcile_on(watches.owners::<Job>("Job", &labels))
        .reconcile_on(watches.owners::<EndpointSlice>("EndpointSlice", &labels))
        .graceful_shutdown_on(stop.cancelled_owned())
        .run(reconcile, after, context)
        // Each pass has said itself what was wrong.
        .for_each(|passed| {
            if let Err(controller::Error::ObjectNotFound(gone)) = passed {
                of_objects.forget(gone.namespace.as_deref().unwrap_or_default(), &gone.name);
            }
            future::ready(())
        });
    // Before the first list has come no pass is under way, and the controller would wait for the list.
    let before_its_begin = async {
        stopped.cancelled().await;
        if listed.wait_until_ready().now_or_never().is_some() {
            future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = work => {}
        () = before_its_begin => {}
    }
}

/// Which object it is and of which generation: nothing else of it is kept for the life of the process.
fn only_what_triggers(object: &mut Trigger) {
    object.metadata = ObjectMeta {
        name: object.metadata.name.take(),
        namespace: object.metadata.namespace.take(),
        uid: object.metadata.uid.take(),
        resource_version: object.metadata.resource_version.take(),
        generation: object.metadata.generation,
        ..ObjectMeta::default()
    };
}

async fn reconcile(object: Arc<Trigger>, context: Arc<Context>) -> Result<Action, Error> {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let generation = object.metadata.generation.unwrap_or(0);
    let span = info_span!("pass", labels.namespace = namespace, labels.name = name);
    context.pass(&namespace, &name, generation).instrument(span).await
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that the controller asks for"
)]
fn after(object: Arc<Trigger>, error: &Error, context: Arc<Context>) -> Action {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    Action::requeue(context.after(&namespace, &name, error))
}
