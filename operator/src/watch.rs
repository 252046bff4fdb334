//! Watches that only say which object to look at.
//!
//! Each has its own backoff, and its errors are counted here and go no further: a controller that sees an error of one
//! watch holds back all of them. A watch that is silent for long is begun anew, which is also how a connection that
//! died without a word is found out.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        reflector::ObjectRef,
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use tracing::warn;

use crate::{api::ExchangeDeployment, metrics::Metrics};

/// Silence after which a watch is begun anew.
const SILENCE: Duration = Duration::from_mins(5);
/// Silence after which the process is not alive: beginning anew has not helped.
pub const WEDGED: Duration = Duration::from_mins(12);

/// When each watch was heard of last.
#[derive(Clone, Debug, Default)]
pub struct Heard(Arc<Mutex<BTreeMap<&'static str, Instant>>>);

impl Heard {
    fn now(&self, kind: &'static str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(kind, Instant::now());
    }

    /// How long each has been silent.
    pub fn ages(&self) -> Vec<(&'static str, Duration)> {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard
            .iter()
            .map(|(kind, since)| (*kind, since.elapsed()))
            .collect()
    }

    /// Nothing is watched any more.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// What watches need.
#[derive(Clone)]
pub struct Watches {
    /// The API server.
    pub client: Client,
    /// One namespace only.
    pub namespace: Option<String>,
    /// Where errors are counted.
    pub metrics: Metrics,
    /// Where it is noted that a watch was heard of.
    pub heard: Heard,
}

type Events<K> = Pin<Box<dyn Stream<Item = watcher::Result<Event<PartialObjectMeta<K>>>> + Send>>;

impl Watches {
    /// The metadata of all objects of a kind with these labels, for ever and without errors.
    pub fn events<K>(
        &self,
        kind: &'static str,
        labels: &str,
    ) -> impl Stream<Item = Event<PartialObjectMeta<K>>> + Send + use<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let (this, config) = (self.clone(), watcher::Config::default().labels(labels));
        this.heard.now(kind);
        stream::unfold(None, move |running: Option<Events<K>>| {
            let (this, config) = (this.clone(), config.clone());
            async move {
                let mut running = running;
                loop {
                    let events = running.get_or_insert_with(|| {
                        let (client, namespace) = (this.client.clone(), this.namespace.as_deref());
                        let api = namespace.map_or_else(
                            || Api::all(client.clone()),
                            |namespace| Api::namespaced(client.clone(), namespace),
                        );
                        watcher(api, config.clone()).default_backoff().boxed()
                    });
                    match tokio::time::timeout(SILENCE, events.next()).await {
                        Ok(Some(Ok(event))) => {
                            this.heard.now(kind);
                            return Some((event, running));
                        }
                        Ok(Some(Err(error))) => {
                            // It tries: an API server that is away is no reason to be started anew.
                            this.heard.now(kind);
                            this.metrics.watch_failed(kind);
                            warn!(error.message = %error, labels.kind = kind, "the watch of {kind} failed and is begun anew");
                        }
                        Ok(None) | Err(_) => running = None,
                    }
                }
            }
        })
    }

    /// The objects to which those of a kind belong, by their label.
    pub fn owners<K>(
        &self,
        kind: &'static str,
        labels: &str,
    ) -> impl Stream<Item = ObjectRef<PartialObjectMeta<ExchangeDeployment>>> + Send + use<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        self.events::<K>(kind, labels)
            .filter_map(async |event| match event {
                Event::Apply(object) | Event::Delete(object) | Event::InitApply(object) => {
                    let name = object.labels().get("app.kubernetes.io/instance")?;
                    Some(ObjectRef::new(name).within(&object.namespace()?))
                }
                Event::Init | Event::InitDone => None,
            })
    }
}
