//! Watches that only say which object to look at.
//!
//! Each has its own backoff, and its errors are counted here and go no further: a controller that sees an error of one
//! watch holds back all of them. The API server ends each watch after some minutes, and what it answers to the request by
//! which it goes on is a sign of life where nothing changes. A watch without one for long is begun anew, which is how a
//! connection that died without a word is found out.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, future, stream};
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
use tower::service_fn;
use tracing::warn;

use crate::{api::ExchangeDeployment, metrics::Metrics};

/// How long the API server keeps a watch, in seconds: where nothing changes it is heard of as often.
const KEPT: u32 = 240;
/// Silence after which a watch is begun anew: everything is listed, and looked at.
const SILENCE: Duration = Duration::from_mins(5);
/// Silence after which the process is not alive: beginning anew has not helped.
const WEDGED: Duration = Duration::from_mins(12);

/// When each watch was heard of last, and what is thought of its silence.
#[derive(Clone, Debug)]
pub struct Heard {
    last: Arc<Mutex<BTreeMap<&'static str, Instant>>>,
    silence: Duration,
    wedged: Duration,
}

impl Default for Heard {
    fn default() -> Self {
        Self::with_patience(SILENCE, WEDGED)
    }
}

impl Heard {
    /// Watches are begun anew after one silence, and given up after the other.
    pub(crate) fn with_patience(silence: Duration, wedged: Duration) -> Self {
        Self {
            last: Arc::default(),
            silence,
            wedged,
        }
    }

    fn last(&self) -> MutexGuard<'_, BTreeMap<&'static str, Instant>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self, kind: &'static str) {
        self.last().insert(kind, Instant::now());
    }

    /// How much longer a watch that was begun then may be silent.
    fn patience(&self, kind: &'static str, begun: Instant) -> Duration {
        let heard = self.last().get(kind).copied();
        let since = heard.map_or(begun, |heard| heard.max(begun));
        self.silence.saturating_sub(since.elapsed())
    }

    /// A client whose answers are signs of life of a watch.
    fn listening(&self, kind: &'static str, client: &Client) -> Client {
        let (heard, client) = (self.clone(), client.clone());
        let namespace = client.default_namespace().to_owned();
        let noted = service_fn(move |request| {
            let (heard, client) = (heard.clone(), client.clone());
            async move {
                let answer = client.send(request).await;
                if answer.is_ok() {
                    heard.now(kind);
                }
                answer
            }
        });
        Client::new(noted, namespace)
    }

    /// How long each has been silent.
    pub fn ages(&self) -> Vec<(&'static str, Duration)> {
        let heard = self.last();
        heard
            .iter()
            .map(|(kind, since)| (*kind, since.elapsed()))
            .collect()
    }

    /// A watch that has been silent for so long that beginning it anew must have failed twice, and for how long.
    pub fn wedged(&self) -> Option<(&'static str, Duration)> {
        self.ages().into_iter().find(|(_, age)| *age > self.wedged)
    }

    /// Nothing is watched any more.
    pub fn forget(&self) {
        self.last().clear();
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

/// A watch that runs, and since when.
type Running<K> = Option<(Events<K>, Instant)>;

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
        let config = watcher::Config::default().timeout(KEPT).labels(labels);
        let this = Self {
            client: self.heard.listening(kind, &self.client),
            ..self.clone()
        };
        this.heard.now(kind);
        stream::unfold(None, move |running: Running<K>| {
            let (this, config) = (this.clone(), config.clone());
            async move {
                let mut running = running;
                loop {
                    let (events, begun) = running.get_or_insert_with(|| {
                        let (client, namespace) = (this.client.clone(), this.namespace.as_deref());
                        let api = namespace.map_or_else(
                            || Api::all(client.clone()),
                            |namespace| Api::namespaced(client.clone(), namespace),
                        );
                        let events = answered(watcher(api, config.clone())).default_backoff();
                        (events.boxed(), Instant::now())
                    });
                    let begun = *begun;
                    match tokio::time::timeout(this.heard.patience(kind, begun), events.next()).await {
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
                        // It was heard of meanwhile, of nothing that is new.
                        Err(_) if !this.heard.patience(kind, begun).is_zero() => {}
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

/// That it begins, a watch says before the API server has said anything: it would end each backoff, and count as a sign of
/// life. So it is said with the first thing that the API server says.
fn answered<K>(
    events: impl Stream<Item = watcher::Result<Event<K>>>,
) -> impl Stream<Item = watcher::Result<Event<K>>> {
    let said = events.scan(false, |begins, event| {
        let held = matches!(event, Ok(Event::Init));
        let begun = mem::replace(begins, held) && event.is_ok() && !held;
        let first = begun.then_some(Ok(Event::Init));
        let items = first.into_iter().chain((!held).then_some(event));
        future::ready(Some(stream::iter(items)))
    });
    said.flatten()
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use k8s_openapi::api::{apps::v1::Deployment, core::v1::Service};
    use kube::client::Body;
    use serde_json::json;
    use tower_test::mock;

    use super::*;

    const SOON: Duration = Duration::from_millis(500);

    /// Paths of the requests of watches, each with when it came.
    type Asked = Arc<Mutex<Vec<(String, Instant)>>>;

    /// Watches on an API server that gives these answers, or none.
    fn watches(
        heard: Heard,
        answer: impl Fn(&str) -> Option<(u16, serde_json::Value)> + Send + 'static,
    ) -> (Watches, Asked) {
        let (service, mut requests) = mock::pair::<Request<Body>, Response<Body>>();
        let asked = Asked::default();
        let noted = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut unanswered = Vec::new();
            while let Some((request, send)) = requests.next_request().await {
                let asks = request.uri().to_string();
                noted.lock().unwrap().push((asks.clone(), Instant::now()));
                match answer(&asks) {
                    Some((code, body)) => {
                        let body = Body::from(body.to_string().into_bytes());
                        send.send_response(Response::builder().status(code).body(body).unwrap());
                    }
                    None => unanswered.push(send),
                }
            }
        });
        let watches = Watches {
            client: Client::new(service, "ns"),
            namespace: None,
            metrics: Metrics::new(),
            heard,
        };
        (watches, asked)
    }

    fn follow(watches: &Watches, kind: &'static str) {
        let mut events: Pin<Box<dyn Stream<Item = ()> + Send>> = match kind {
            "Service" => watches.events::<Service>(kind, "").map(drop).boxed(),
            _ => watches.events::<Deployment>(kind, "").map(drop).boxed(),
        };
        tokio::spawn(async move { while events.next().await.is_some() {} });
    }

    async fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_silent_watch_is_begun_anew_and_at_last_is_wedged() {
        let heard = Heard::with_patience(Duration::from_millis(100), Duration::from_millis(350));
        let (watches, asked) = watches(heard.clone(), |_| None);
        follow(&watches, "Service");
        assert_eq!(heard.wedged(), None);
        until("it is begun anew", || asked.lock().unwrap().len() >= 3).await;
        until("it is wedged", || heard.wedged().is_some()).await;
        assert_eq!(heard.wedged().unwrap().0, "Service");
        heard.forget();
        assert_eq!(heard.wedged(), None, "who does not lead watches nothing");
    }

    /// It is listed once: the API server ends its watch again and again, and answers each time that it goes on.
    #[tokio::test]
    async fn a_watch_of_what_does_not_change_goes_on() {
        let heard = Heard::with_patience(Duration::from_millis(100), Duration::from_millis(350));
        let (watches, asked) = watches(heard.clone(), |asks| {
            let version = json!({"resourceVersion": "1"});
            let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": version});
            let bookmark = json!({"type": "BOOKMARK", "object": object});
            let list = json!({"metadata": version, "items": []});
            Some((200, if asks.contains("watch=") { bookmark } else { list }))
        });
        follow(&watches, "Service");
        let listed = || {
            let asked = asked.lock().unwrap();
            asked.iter().filter(|(asks, _)| !asks.contains("watch=")).count()
        };
        let begun = Instant::now();
        until("a while", || begun.elapsed() > Duration::from_millis(500)).await;
        assert_eq!((listed(), heard.wedged()), (1, None));
        assert!(asked.lock().unwrap().len() > 3);
    }

    #[tokio::test]
    async fn an_api_server_that_refuses_is_no_reason_to_be_started_anew() {
        let heard = Heard::with_patience(Duration::from_secs(9), Duration::from_secs(3));
        let refusal = json!({"kind": "Status", "status": "Failure", "message": "no", "code": 503});
        let (watches, asked) = watches(heard.clone(), move |_| Some((503, refusal.clone())));
        let begun = Instant::now();
        follow(&watches, "Service");
        until("four answers", || asked.lock().unwrap().len() >= 4).await;
        assert!(begun.elapsed() > Duration::from_secs(2), "it does not hold back");
        assert_eq!(heard.wedged(), None);
        let page = watches.metrics.encode().unwrap();
        let failed = page
            .lines()
            .find(|line| line.contains("watch") && line.contains("Service"));
        assert!(failed.is_some_and(|line| !line.ends_with(" 0")), "{page}");
    }

    #[tokio::test]
    async fn a_watch_that_fails_holds_no_other_back() {
        let heard = Heard::default();
        let (watches, asked) = watches(heard, |asks| {
            let one = json!({"metadata": {"name": "one", "namespace": "ns", "labels": {"app.kubernetes.io/instance": "it"}}});
            match asks {
                _ if asks.contains("/services") => {
                    Some((500, json!({"kind": "Status", "status": "Failure", "code": 500})))
                }
                _ if asks.contains("watch=") => None,
                _ => Some((200, json!({"metadata": {"resourceVersion": "1"}, "items": [one]}))),
            }
        });
        follow(&watches, "Service");
        let services = || {
            let asked = asked.lock().unwrap();
            asked
                .iter()
                .filter(|(asks, _)| asks.contains("/services"))
                .count()
        };
        until("the first failure", || services() > 0).await;
        let mut owners = watches.owners::<Deployment>("Deployment", "").boxed();
        let owner = tokio::time::timeout(SOON, owners.next()).await.unwrap().unwrap();
        assert_eq!(
            (owner.name.as_str(), owner.namespace.as_deref()),
            ("it", Some("ns"))
        );
        let gaps = || {
            let asked = asked.lock().unwrap();
            let at = asked.iter().filter(|(asks, _)| asks.contains("/services"));
            let at: Vec<Instant> = at.map(|(_, at)| *at).collect();
            at.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
        };
        until("three gaps", || gaps().len() >= 3).await;
        assert!(gaps()[2] > gaps()[0], "{:?}", gaps());
    }
}
