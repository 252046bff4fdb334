//! Passes against an API server in memory that keeps versions, labels and preconditions, notes every request, and fails
//! on demand: what exactly is sent, and what is not.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on panics"
)]

#[path = "invalid/merge.rs"]
mod merge;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use exchange_operator::{
    api::Service,
    controller::{Context, PATIENCE},
    error::{Class, Error},
    guard::Refusal,
    metrics::Metrics,
    observe::pods::Pods,
    plan::AT_LEAST_EVERY,
};
use http::{Method, Request, Response, StatusCode};
use kube::{Client, client::Body, runtime::controller::Action};
use serde_json::{Value, json};
use tower_test::mock;

use self::merge::merge;

const UID: &str = "8d0ae1d4-3d6c-4d1c-8a59-1d2a8e1c9d10";
const OBJECT: &str = "exchangedeployments/exchange";

/// A write as it was sent.
#[derive(Clone, Debug)]
struct Write {
    method: Method,
    /// Behind the namespace: `services/exchange-user`.
    path: String,
    query: String,
    body: Value,
}

#[derive(Default)]
struct Server {
    objects: BTreeMap<String, Value>,
    version: u64,
    reads: usize,
    writes: Vec<Write>,
    /// Requests whose method and path begin like this are answered with this status.
    broken: Option<(String, StatusCode)>,
    /// A write to the first takes the second with it.
    takes: Option<(String, String)>,
    /// An admission webhook that changes what is merged into objects whose path begins like this.
    changes: Option<(String, Value)>,
    /// With this request somebody else merges something into an object. Without its UID it is one that was made again.
    meanwhile: Option<(String, String, Value)>,
    /// Requests whose method and path begin like this are never answered.
    silent: Option<String>,
}

impl Server {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", self.version));
        }
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    fn answer(&mut self, method: &Method, path: &str, query: &str, body: Value) -> (StatusCode, Value) {
        let called = format!("{method} {path}");
        if let Some((_, changed, change)) = self.meanwhile.take_if(|(request, ..)| *request == called) {
            let mut object = self.objects[&changed].clone();
            merge(&mut object, &change);
            self.put(&changed, object);
        }
        if *method == Method::GET {
            self.reads += 1;
            return match &self.broken {
                Some((broken, status)) if format!("GET {path}").starts_with(broken) => refusal(*status),
                _ => self.read(path, query),
            };
        }
        self.writes.push(Write {
            method: method.clone(),
            path: path.to_owned(),
            query: query.to_owned(),
            body: body.clone(),
        });
        if let Some((broken, status)) = &self.broken
            && called.starts_with(broken)
        {
            let (status, mut body) = refusal(*status);
            // What is said may have a time, a port, or the number of the request in it.
            self.version += 1;
            body["message"] = json!(format!("as the test wants, {}", self.version));
            return (status, body);
        }
        if let Some((_, taken)) = self.takes.take_if(|(write, _)| write == path) {
            self.objects.remove(&taken);
        }
        match method.as_str() {
            "POST" => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
                if self.objects.contains_key(&path) {
                    let (status, mut body) = refusal(StatusCode::CONFLICT);
                    body["reason"] = json!("AlreadyExists");
                    return (status, body);
                }
                (StatusCode::CREATED, self.put(&path, body))
            }
            "PUT" | "PATCH" => {
                let (path, status) = match path.strip_suffix("/status") {
                    Some(path) => (path, true),
                    None => (path, false),
                };
                let Some(there) = self.objects.get(path).cloned() else {
                    return refusal(StatusCode::NOT_FOUND);
                };
                let same = |field: &str| body["metadata"][field] == there["metadata"][field];
                if !same("resourceVersion") || !same("uid") {
                    return refusal(StatusCode::CONFLICT);
                }
                let mut next = there.clone();
                if status {
                    next["status"] = body["status"].clone();
                } else if *method == Method::PATCH {
                    merge(&mut next, &body);
                } else {
                    next = body.clone();
                }
                if let Some((changed, change)) = &self.changes
                    && path.starts_with(changed)
                {
                    merge(&mut next, change);
                }
                // What changes nothing is no new version.
                if next == there {
                    return (StatusCode::OK, there);
                }
                let limits = ["minAvailable", "maxUnavailable"];
                if limits.iter().all(|limit| !next["spec"][*limit].is_null()) {
                    return refusal(StatusCode::UNPROCESSABLE_ENTITY);
                }
                (StatusCode::OK, self.put(path, next))
            }
            "DELETE" => {
                let Some(there) = self.objects.get(path).cloned() else {
                    return refusal(StatusCode::NOT_FOUND);
                };
                if body["preconditions"]["resourceVersion"] != there["metadata"]["resourceVersion"] {
                    return refusal(StatusCode::CONFLICT);
                }
                self.objects.remove(path);
                (StatusCode::OK, there)
            }
            _ => panic!("{called} is not expected"),
        }
    }

    fn read(&self, path: &str, query: &str) -> (StatusCode, Value) {
        if path.contains('/') {
            return match self.objects.get(path) {
                Some(object) => (StatusCode::OK, object.clone()),
                None => refusal(StatusCode::NOT_FOUND),
            };
        }
        let query = query
            .replace("%3D", "=")
            .replace("%2C", ",")
            .replace("%2F", "/")
            .replace('+', " ");
        let items: Vec<&Value> = self
            .objects
            .iter()
            .filter(|(key, object)| key.starts_with(&format!("{path}/")) && selected(object, &query))
            .map(|(_, object)| object)
            .collect();
        (
            StatusCode::OK,
            json!({"metadata": {"resourceVersion": "1"}, "items": items}),
        )
    }
}

/// The operator selects by equality; slices by a set of names, which here are all the slices that there are.
fn selected(object: &Value, query: &str) -> bool {
    let find = |what: &str| query.split('&').find_map(|part| part.strip_prefix(what));
    if let Some(fields) = find("fieldSelector=") {
        return fields.split(',').all(|term| {
            let (path, value) = term.split_once('=').unwrap();
            object.pointer(&format!("/{}", path.replace('.', "/"))) == Some(&json!(value))
        });
    }
    let Some(selector) = find("labelSelector=") else {
        return true;
    };
    selector.contains(" in ")
        || selector.contains("%20in%20")
        || selector.split(',').all(|term| {
            let (key, value) = term.split_once('=').unwrap();
            object["metadata"]["labels"][key] == value
        })
}

fn refusal(status: StatusCode) -> (StatusCode, Value) {
    let reason = match status {
        StatusCode::CONFLICT => "Conflict",
        StatusCode::NOT_FOUND => "NotFound",
        _ => "Other",
    };
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "as the test wants",
        "reason": reason, "code": status.as_u16(),
    });
    (status, body)
}

/// A server and an operator that works with it.
struct World {
    server: Arc<Mutex<Server>>,
    context: Context,
    metrics: Metrics,
}

impl World {
    fn new() -> Self {
        // The first to install it wins; all are the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (service, mut handle) = mock::pair::<Request<Body>, Response<Body>>();
        let server = Arc::new(Mutex::new(Server::default()));
        let answering = Arc::clone(&server);
        tokio::spawn(async move {
            let mut unanswered = Vec::new();
            while let Some((request, send)) = handle.next_request().await {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await.unwrap();
                let body = serde_json::from_slice(&body).unwrap_or_default();
                let path = parts
                    .uri
                    .path()
                    .split_once("/namespaces/prod/")
                    .unwrap()
                    .1
                    .to_owned();
                let silent = answering.lock().unwrap().silent.clone();
                if silent.is_some_and(|silent| format!("{} {path}", parts.method).starts_with(&silent)) {
                    unanswered.push(send);
                    continue;
                }
                let query = parts.uri.query().unwrap_or_default();
                let (status, body) = answering
                    .lock()
                    .unwrap()
                    .answer(&parts.method, &path, query, body);
                let body = Body::from(serde_json::to_vec(&body).unwrap());
                send.send_response(Response::builder().status(status).body(body).unwrap());
            }
        });
        let client = Client::new(service, "prod");
        let metrics = Metrics::new();
        let context = Context::new(&client, Pods::new().unwrap(), "test", metrics.clone());
        let world = Self {
            server,
            context,
            metrics,
        };
        let mut server = world.server.lock().unwrap();
        for (name, keys) in [
            ("db", json!({"url": ""})),
            ("queue", json!({"url": ""})),
            ("redis", json!({"url": ""})),
        ] {
            server.put(
                &format!("secrets/{name}"),
                json!({"metadata": {"name": name}, "data": keys}),
            );
        }
        server.put(
            OBJECT,
            json!({
                "apiVersion": "exchange.dev/v1alpha1",
                "kind": "ExchangeDeployment",
                "metadata": {"name": "exchange", "namespace": "prod", "uid": UID, "generation": 1},
                "spec": {
                    "version": "1.0.0",
                    "image": "acme/exchange",
                    "services": {"user": {"replicas": 1}, "trade": {"replicas": 1}, "notification": {"replicas": 1}},
                    "database": {"secretRef": {"name": "db"}},
                    "queue": {"secretRef": {"name": "queue"}},
                    "marketData": {"secretRef": {"name": "redis"}},
                },
                // What the schema's defaults make of no status.
                "status": {"attempt": 0, "epoch": 0, "observedGeneration": 0, "phase": "Pending"},
            }),
        );
        drop(server);
        world
    }

    /// One pass, and what it has written, without what is for people only.
    async fn pass(&self) -> (Result<(), Error>, Vec<Write>) {
        self.server.lock().unwrap().writes.clear();
        let generation = self.get(OBJECT)["metadata"]["generation"].as_i64().unwrap_or(0);
        let result = self.context.pass("prod", "exchange", generation).await.map(drop);
        let mut writes = self.server.lock().unwrap().writes.clone();
        writes.retain(|write| !write.path.starts_with("events"));
        (result, writes)
    }

    /// Passes until one writes nothing.
    async fn settle(&self) {
        for _ in 0..20 {
            let (result, writes) = self.pass().await;
            result.unwrap();
            if writes.is_empty() {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    /// Whoever looks writes nothing, however often.
    async fn is_at_rest(&self) {
        for _ in 0..3 {
            let (result, writes) = self.pass().await;
            result.unwrap();
            assert_eq!(paths(&writes), Vec::<String>::new());
        }
    }

    fn get(&self, path: &str) -> Value {
        self.server
            .lock()
            .unwrap()
            .objects
            .get(path)
            .cloned()
            .unwrap_or_default()
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Value)) {
        let mut server = self.server.lock().unwrap();
        let mut object = server.objects.get(path).cloned().unwrap();
        change(&mut object);
        server.put(path, object);
    }

    /// With this request somebody else merges this into an object.
    fn meanwhile(&self, request: String, path: &str, change: Value) {
        self.server.lock().unwrap().meanwhile = Some((request, path.to_owned(), change));
    }

    /// Whatever the phase may take, it has taken.
    fn phase_began_long_ago(&self) {
        self.change(OBJECT, |object| {
            object["status"]["phaseSince"] = json!("2026-01-01T00:00:00Z");
        });
    }

    fn names(&self, kind: &str) -> Vec<String> {
        let server = self.server.lock().unwrap();
        let prefix = format!("{kind}/");
        server
            .objects
            .keys()
            .filter(|key| key.starts_with(&prefix))
            .cloned()
            .collect()
    }

    fn finish_jobs(&self) {
        for job in self.names("jobs") {
            self.change(&job, |job| {
                job["status"] = json!({"conditions": [{"type": "Complete", "status": "True"}]});
            });
        }
    }

    /// A pod for each Deployment, and slices that list it.
    fn start_pods(&self) {
        for name in self.names("deployments") {
            self.change(&name, |deployment| {
                let generation = &deployment["metadata"]["generation"];
                deployment["status"] =
                    json!({"observedGeneration": generation, "replicas": 1, "updatedReplicas": 1});
            });
            let deployment = self.get(&name);
            let template = &deployment["spec"]["template"]["metadata"]["labels"];
            let service = template["app.kubernetes.io/component"].as_str().unwrap();
            let colour = template["exchange.dev/colour"].as_str().unwrap();
            let mut server = self.server.lock().unwrap();
            let pod = json!({"metadata": {"name": service, "labels": template}, "spec": {"containers": []}});
            let pod = server.put(&format!("pods/{service}"), pod);
            let about = format!("exchange-{colour}-{service}");
            server.put(
                &format!("endpointslices/{about}"),
                json!({
                    "metadata": {"name": about, "labels": {"kubernetes.io/service-name": about}},
                    "addressType": "IPv4",
                    "endpoints": [{
                        "addresses": ["192.0.2.1"], "conditions": {"ready": true},
                        "targetRef": {"kind": "Pod", "name": service, "uid": pod["metadata"]["uid"]},
                    }],
                }),
            );
        }
    }

    /// Everything up to the decision to move the traffic.
    async fn tested() -> Self {
        Self::new().passes_tests().await
    }

    async fn passes_tests(self) -> Self {
        self.settle().await;
        self.finish_jobs();
        self.settle().await;
        self.start_pods();
        self.settle().await;
        self.finish_jobs();
        self
    }

    /// A version that is live and verified, and nothing else.
    async fn converged() -> Self {
        Self::new().converges().await
    }

    async fn converges(self) -> Self {
        let world = self.passes_tests().await;
        world.settle().await;
        world.change(OBJECT, |object| {
            let candidate = object["status"]["candidate"].take();
            let mut live = candidate;
            live["since"] = json!("2026-01-01T00:00:00Z");
            live["verified"] = json!(true);
            live["contracted"] = json!(true);
            object["status"]["live"] = live;
            object["status"]["phase"] = json!("Live");
        });
        world.settle().await;
        world
    }
}

fn paths(writes: &[Write]) -> Vec<String> {
    writes
        .iter()
        .map(|write| format!("{} {}", write.method, write.path))
        .collect()
}

#[tokio::test]
async fn a_new_object_is_recorded_first_and_its_services_point_at_nothing() {
    let world = World::new();
    let version = world.get(OBJECT)["metadata"]["resourceVersion"].clone();
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(
        paths(&writes),
        [
            "PUT exchangedeployments/exchange/status",
            "POST services",
            "POST services",
            "POST services",
        ]
    );
    assert_eq!(writes[0].body["metadata"]["resourceVersion"], version);
    for (write, service) in writes[1..].iter().zip(Service::ALL) {
        assert_eq!(write.query, "&fieldManager=exchange-operator");
        let object = &write.body;
        assert_eq!(object["metadata"]["name"], format!("exchange-{service}"));
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], UID);
        assert_eq!(object["spec"]["selector"]["exchange.dev/revision"], "none");
    }
}

#[tokio::test]
async fn a_refused_record_ends_the_pass() {
    for (status, class) in [
        (StatusCode::CONFLICT, Class::Conflict),
        (StatusCode::NOT_FOUND, Class::Conflict),
        (StatusCode::TOO_MANY_REQUESTS, Class::Transient),
        (StatusCode::INTERNAL_SERVER_ERROR, Class::Transient),
        (StatusCode::FORBIDDEN, Class::Forbidden),
        (StatusCode::UNPROCESSABLE_ENTITY, Class::Invalid),
    ] {
        let world = World::new();
        world.server.lock().unwrap().broken = Some(("PUT exchangedeployments".to_owned(), status));
        let (result, writes) = world.pass().await;
        assert_eq!(result.unwrap_err().class(), class, "{status}");
        assert_eq!(
            paths(&writes),
            ["PUT exchangedeployments/exchange/status"],
            "{status}"
        );
    }
}

#[tokio::test]
async fn a_refused_write_ends_the_pass_and_the_next_one_does_it() {
    for (status, class) in [
        (StatusCode::CONFLICT, Class::Conflict),
        (StatusCode::NOT_FOUND, Class::Conflict),
        (StatusCode::TOO_MANY_REQUESTS, Class::Transient),
        (StatusCode::INTERNAL_SERVER_ERROR, Class::Transient),
        (StatusCode::FORBIDDEN, Class::Forbidden),
    ] {
        let world = World::new();
        world.server.lock().unwrap().broken = Some(("POST services".to_owned(), status));
        let (result, writes) = world.pass().await;
        assert_eq!(result.unwrap_err().class(), class, "{status}");
        // What is refused for good keeps nothing else from being tried.
        let tried = if class == Class::Forbidden { 3 } else { 1 };
        assert_eq!(writes.len(), 1 + tried, "{status}: {:?}", paths(&writes));
        world.server.lock().unwrap().broken = None;
        let (result, writes) = world.pass().await;
        result.unwrap();
        assert!(paths(&writes).contains(&"POST services".to_owned()), "{status}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_not_taken_for_missing() {
    for kind in ["services", "deployments", "jobs", "secrets/db", OBJECT] {
        for status in [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::INTERNAL_SERVER_ERROR,
            StatusCode::FORBIDDEN,
        ] {
            let world = World::converged().await;
            world.server.lock().unwrap().broken = Some((format!("GET {kind}"), status));
            let (result, writes) = world.pass().await;
            assert!(result.is_err(), "{kind} {status}");
            assert!(writes.is_empty(), "{kind} {status}: {:?}", paths(&writes));
        }
    }
}

#[tokio::test]
async fn the_swap_is_one_record_and_three_fenced_writes() {
    let world = World::tested().await;
    let versions: Vec<Value> = Service::ALL
        .iter()
        .map(|service| world.get(&format!("services/exchange-{service}"))["metadata"].clone())
        .collect();
    world.change("services/exchange-trade", |service| {
        service["spec"]["clusterIP"] = json!("10.0.0.1");
        service["metadata"]["annotations"]["team"] = json!("trading");
    });
    let version = world.get("services/exchange-trade")["metadata"].clone();
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(
        paths(&writes),
        [
            "PUT exchangedeployments/exchange/status",
            "PUT services/exchange-user",
            "PUT services/exchange-trade",
            "PUT services/exchange-notification",
        ]
    );
    assert_eq!(writes[0].body["status"]["phase"], "Promoting");
    let observed = [&versions[0], &version, &versions[2]];
    for (write, observed) in writes[1..].iter().zip(observed) {
        assert_eq!(write.query, "&fieldManager=exchange-operator");
        assert_eq!(write.body["metadata"]["uid"], observed["uid"]);
        assert_eq!(
            write.body["metadata"]["resourceVersion"],
            observed["resourceVersion"]
        );
        assert_eq!(write.body["metadata"]["annotations"]["exchange.dev/epoch"], "1");
        assert_eq!(write.body["spec"]["selector"]["exchange.dev/colour"], "blue");
    }
    // What others have set stays.
    assert_eq!(writes[2].body["spec"]["clusterIP"], "10.0.0.1");
    assert_eq!(writes[2].body["metadata"]["annotations"]["team"], "trading");
}

/// What the operator lets be is another pod all the same: the Jobs that have passed were about those before.
#[tokio::test]
async fn tests_are_about_the_pods_that_are_recorded_and_count_for_no_others() {
    let world = World::tested().await;
    let object = world.get("exchangedeployments/exchange");
    let tested = object["status"]["candidate"]["tested"].as_str();
    assert_eq!(
        tested.unwrap().split('.').filter(|it| it.len() == 10).count(),
        3,
        "{object:#}"
    );

    let trade = world
        .names("deployments")
        .into_iter()
        .find(|it| it.contains("-trade-"));
    world.change(&trade.unwrap(), |deployment| {
        deployment["spec"]["template"]["metadata"]["annotations"]["restartedAt"] = json!("now");
    });
    let (result, writes) = world.pass().await;
    result.unwrap();
    let recorded = &writes[0].body["status"];
    assert_eq!(
        (&recorded["phase"], &recorded["attempt"]),
        (&json!("Pending"), &json!(2))
    );
    assert!(!paths(&writes).contains(&"PUT services/exchange-trade".to_owned()));
}

#[tokio::test]
async fn a_swap_that_loses_its_endpoints_stops_before_the_write() {
    let world = World::tested().await;
    // Between the look and the guard: the first write of the swap takes the last endpoint with it.
    let ready = world.get("endpointslices/exchange-blue-notification");
    world.server.lock().unwrap().takes = Some((
        "services/exchange-user".to_owned(),
        "endpointslices/exchange-blue-notification".to_owned(),
    ));
    let (result, writes) = world.pass().await;
    assert!(matches!(result, Err(Error::Refused(_))), "{result:?}");
    assert_eq!(
        paths(&writes),
        [
            "PUT exchangedeployments/exchange/status",
            "PUT services/exchange-user"
        ]
    );
    // They come back: the swap is finished.
    world
        .server
        .lock()
        .unwrap()
        .put("endpointslices/exchange-blue-notification", ready);
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(
        paths(&writes),
        [
            "PUT services/exchange-trade",
            "PUT services/exchange-notification"
        ]
    );
}

/// A live Service that is missing is made by one pass, and moved by the next one.
#[tokio::test]
async fn a_way_back_in_two_passes_is_measured_once() {
    let world = World::converged().await;
    world.change(OBJECT, |object| {
        object["status"]["phase"] = json!("RollingBack");
        object["status"]["epoch"] = json!(2);
    });
    let gone = "services/exchange-trade";
    world.server.lock().unwrap().objects.remove(gone);
    let measured = || {
        let page = world.metrics.encode().unwrap();
        let of_back = r#"swap_duration_seconds_count{direction="back"} "#;
        let count = page.lines().find_map(|line| line.split_once(of_back));
        count.map(|(_, count)| count.to_owned())
    };
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert!(
        paths(&writes).contains(&"PUT services/exchange-user".to_owned()),
        "{writes:#?}"
    );
    assert_eq!(
        world.get(gone)["metadata"]["name"],
        "exchange-trade",
        "{writes:#?}"
    );
    assert_eq!(measured(), None);
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert!(paths(&writes).contains(&format!("PUT {gone}")), "{writes:#?}");
    assert_eq!(measured().as_deref(), Some("1"));
}

/// Where nobody is, only clients are sent who find nobody now either: what the stack that is left serves is looked at before each write.
#[tokio::test]
async fn a_way_back_by_which_somebody_would_lose_something_stops_before_the_next_write() {
    let world = World::converged().await;
    // The traffic is on green, of which nothing is ready, and goes back to blue, of which one service is not.
    for service in ["user", "trade", "notification"] {
        let on_green = |labels: &mut Value| {
            labels["exchange.dev/colour"] = json!("green");
            labels["exchange.dev/revision"] = json!("0123456789");
        };
        let mut pod = world.get(&format!("pods/{service}"));
        on_green(&mut pod["metadata"]["labels"]);
        pod["metadata"]["name"] = json!(format!("green-{service}"));
        pod["metadata"]["uid"] = Value::Null;
        world.change(&format!("services/exchange-{service}"), |it| {
            on_green(&mut it["spec"]["selector"]);
        });
        let mut slice = world.get(&format!("endpointslices/exchange-blue-{service}"));
        let about = format!("exchange-green-{service}");
        slice["metadata"] = json!({"name": about, "labels": {"kubernetes.io/service-name": about}});
        let mut server = world.server.lock().unwrap();
        let pod = server.put(&format!("pods/green-{service}"), pod);
        slice["endpoints"][0]["targetRef"]["uid"] = pod["metadata"]["uid"].clone();
        slice["endpoints"][0]["conditions"]["ready"] = json!(false);
        server.put(&format!("endpointslices/{about}"), slice);
    }
    world.change("endpointslices/exchange-blue-notification", |slice| {
        slice["endpoints"] = json!([]);
    });
    world.change(OBJECT, |object| {
        let status = &mut object["status"];
        let mut left = status["live"].clone();
        left["colour"] = json!("green");
        left["revision"] = json!("0123456789");
        left["gates"] = json!("");
        left["unneededSince"] = json!("2026-01-01T00:00:00Z");
        status["candidate"] = left;
        status["phase"] = json!("RollingBack");
        status["epoch"] = json!(2);
    });
    world.phase_began_long_ago();
    let moves = |writes: &[Write]| {
        let all = paths(writes).into_iter();
        all.filter(|it| it.starts_with("PUT services/exchange-"))
            .collect::<Vec<_>>()
    };
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(moves(&writes), Vec::<String>::new(), "it was seen once");

    // With the first write green's notification service has somebody again.
    let green = "endpointslices/exchange-green-notification";
    let mut endpoints = world.get(green)["endpoints"].take();
    endpoints[0]["conditions"]["ready"] = json!(true);
    world.meanwhile(
        "PUT services/exchange-user".to_owned(),
        green,
        json!({"endpoints": endpoints}),
    );
    let (result, writes) = world.pass().await;
    assert!(matches!(result, Err(Error::Refused(_))), "{result:?}");
    assert_eq!(moves(&writes), ["PUT services/exchange-user"]);
    // And then nobody any more.
    world.change(green, |slice| slice["endpoints"] = json!([]));
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(
        moves(&writes),
        [
            "PUT services/exchange-trade",
            "PUT services/exchange-notification"
        ]
    );
}

#[tokio::test]
async fn a_swap_under_a_record_that_is_replaced_stops_before_the_next_write() {
    let world = World::tested().await;
    world.meanwhile(
        "PUT services/exchange-user".to_owned(),
        OBJECT,
        json!({"status": {"attempt": 9}}),
    );
    let (result, writes) = world.pass().await;
    assert!(
        matches!(result, Err(Error::Refused(Refusal::Superseded))),
        "{result:?}"
    );
    assert_eq!(
        paths(&writes),
        [
            "PUT exchangedeployments/exchange/status",
            "PUT services/exchange-user"
        ]
    );
}

#[tokio::test]
async fn a_record_that_is_replaced_during_a_look_is_the_one_that_counts() {
    let world = World::tested().await;
    // The object is read last: everything else has been read when another operator records something.
    world.meanwhile(
        "GET deployments".to_owned(),
        OBJECT,
        json!({"status": {"attempt": 9}}),
    );
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes)[0], "PUT exchangedeployments/exchange/status");
    assert_eq!(writes[0].body["status"]["attempt"], 9);
}

#[tokio::test]
async fn a_swap_that_is_refused_for_one_service_moves_none_of_the_others() {
    let world = World::tested().await;
    let user = "PUT services/exchange-user".to_owned();
    world.server.lock().unwrap().broken = Some((user.clone(), StatusCode::FORBIDDEN));
    let (result, writes) = world.pass().await;
    assert_eq!(result.unwrap_err().class(), Class::Forbidden);
    assert_eq!(
        paths(&writes),
        ["PUT exchangedeployments/exchange/status".to_owned(), user]
    );
}

/// Whatever the API server answers to it: the next pass goes on where this one has ended.
#[tokio::test]
async fn a_swap_that_fails_at_a_write_goes_on_with_that() {
    let moves = ["user", "trade", "notification"].map(|service| format!("PUT services/exchange-{service}"));
    let record = "PUT exchangedeployments/exchange/status".to_owned();
    for status in [
        StatusCode::NOT_FOUND,
        StatusCode::CONFLICT,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::INTERNAL_SERVER_ERROR,
    ] {
        for failing in 0..moves.len() {
            let world = World::tested().await;
            world.server.lock().unwrap().broken = Some((moves[failing].clone(), status));
            let (result, writes) = world.pass().await;
            assert!(result.is_err(), "{status}");
            let tried = [std::slice::from_ref(&record), &moves[..=failing]].concat();
            assert_eq!(paths(&writes), tried, "{status}");
            world.server.lock().unwrap().broken = None;
            let (result, writes) = world.pass().await;
            result.unwrap();
            assert_eq!(paths(&writes), moves[failing..], "{status}");
        }
    }
}

/// What has been moved stays for the time that the phase has, because the refusal may pass, and is then taken back.
#[tokio::test]
async fn a_swap_that_is_refused_halfway_goes_back_when_its_time_is_over() {
    let world = World::tested().await;
    let of = |service: &str| format!("services/exchange-{service}");
    let trade = format!("PUT {}", of("trade"));
    world.server.lock().unwrap().broken = Some((trade.clone(), StatusCode::FORBIDDEN));
    let (result, writes) = world.pass().await;
    assert_eq!(result.unwrap_err().class(), Class::Forbidden);
    let moved = format!("PUT {}", of("user"));
    assert_eq!(paths(&writes)[1..], [moved.clone(), trade.clone()]);
    for _ in 0..3 {
        let (result, writes) = world.pass().await;
        assert_eq!(result.unwrap_err().class(), Class::Forbidden);
        let all = paths(&writes);
        assert!(
            all.contains(&trade) && !all.iter().any(|it| it.ends_with("-notification")),
            "{all:?}"
        );
    }
    let told = world.condition("Reconciling")["message"].clone();
    assert!(
        told.as_str().unwrap().contains("update Service exchange-trade"),
        "{told}"
    );
    world.phase_began_long_ago();
    let (_, writes) = world.pass().await;
    assert!(paths(&writes).contains(&moved), "{writes:#?}");
    let selector = world.get(&of("user"))["spec"]["selector"].clone();
    assert_eq!(selector["exchange.dev/colour"], "none", "a first version");
    assert_eq!(
        world.get(OBJECT)["status"]["rejected"]["reason"],
        "PromotionFailed"
    );
}

#[tokio::test]
async fn a_converged_object_costs_no_write() {
    let world = World::converged().await;
    world.is_at_rest().await;
    let before = world.server.lock().unwrap().reads;
    world.pass().await.0.unwrap();
    let reads = world.server.lock().unwrap().reads - before;
    assert!(reads <= 16, "{reads} reads in a pass at rest");
}

/// The way back begins with it.
#[tokio::test]
async fn a_changed_spec_costs_one_read_more_and_not_all_once_more() {
    let world = World::converged().await;
    let reads = async |world: &World| {
        let before = world.server.lock().unwrap().reads;
        world.pass().await.0.unwrap();
        world.server.lock().unwrap().reads - before
    };
    let at_rest = reads(&world).await;
    world.change(OBJECT, |object| {
        object["metadata"]["generation"] = json!(2);
        object["spec"]["rollout"]["retention"] = json!("2h");
    });
    assert_eq!(reads(&world).await, at_rest + 1);
}

#[tokio::test]
async fn a_reference_that_need_not_exist_costs_no_write_while_it_does_not() {
    let world = World::new();
    world.change(OBJECT, |object| {
        object["spec"]["services"]["user"]["envFrom"] = json!([
            {"configMapRef": {"name": "absent", "optional": true}},
            {"secretRef": {"name": "also-absent", "optional": true}},
        ]);
    });
    let world = world.converges().await;
    world.is_at_rest().await;
}

#[tokio::test]
async fn a_foreign_edit_is_put_right_with_what_was_observed() {
    let world = World::converged().await;
    world.change("services/exchange-trade", |service| {
        service["spec"]["selector"]["tier"] = json!("gold");
    });
    let version = world.get("services/exchange-trade")["metadata"]["resourceVersion"].clone();
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), ["PUT services/exchange-trade"]);
    assert_eq!(writes[0].body["metadata"]["resourceVersion"], version);
    assert!(writes[0].body["spec"]["selector"]["tier"].is_null());

    let workload = world.names("deployments").remove(0);
    let rendered = world.get(&workload)["spec"].clone();
    let edits: [fn(&mut Value); 4] = [
        |pod| pod["containers"][0]["image"] = json!("acme/other:1"),
        |pod| {
            let env = pod["containers"][0]["env"].as_array_mut().unwrap();
            env.push(json!({"name": "EXCHANGE_ROLE", "value": "live"}));
        },
        |pod| pod["containers"][0]["securityContext"]["privileged"] = json!(true),
        |pod| pod["hostNetwork"] = json!(true),
    ];
    for edit in edits {
        world.change(&workload, |deployment| {
            edit(&mut deployment["spec"]["template"]["spec"]);
        });
        let version = world.get(&workload)["metadata"]["resourceVersion"].clone();
        let (result, writes) = world.pass().await;
        result.unwrap();
        assert_eq!(paths(&writes), [format!("PATCH {workload}")]);
        assert!(writes[0].query.contains("fieldManager=exchange-operator"));
        assert_eq!(writes[0].body["metadata"]["resourceVersion"], version);
        let pod = &writes[0].body["spec"]["template"]["spec"];
        assert_eq!(pod["containers"], rendered["template"]["spec"]["containers"]);
        // Said, so that a merge takes it away.
        assert!(pod.as_object().unwrap().contains_key("hostNetwork") && pod["hostNetwork"].is_null());
        world.settle().await;
    }
}

#[tokio::test]
async fn a_budget_with_the_other_limit_is_put_right() {
    let world = World::converged().await;
    let budget = world.names("poddisruptionbudgets").remove(0);
    let built = world.get(&budget)["spec"].clone();
    world.change(&budget, |budget| {
        let spec = budget["spec"].as_object_mut().unwrap();
        spec.remove("maxUnavailable");
        spec.insert("minAvailable".to_owned(), json!("100%"));
    });
    let version = world.get(&budget)["metadata"]["resourceVersion"].clone();
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), [format!("PATCH {budget}")]);
    assert_eq!(writes[0].body["metadata"]["resourceVersion"], version);
    assert_eq!(world.get(&budget)["spec"], built);
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), Vec::<String>::new());
}

#[tokio::test]
async fn another_size_replaces_no_pod() {
    let world = World::converged().await;
    // What somebody has added, and is no difference.
    let workload = world.names("deployments").remove(0);
    world.change(&workload, |deployment| {
        let pod = &mut deployment["spec"]["template"]["spec"];
        pod["containers"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "sidecar", "image": "acme/sidecar:1"}));
    });
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), Vec::<String>::new());
    let template = world.get(&workload)["spec"]["template"].clone();
    world.change(OBJECT, |object| {
        for service in ["user", "trade", "notification"] {
            object["spec"]["services"][service]["replicas"] = json!(5);
        }
    });
    world.settle().await;
    let deployment = world.get(&workload);
    assert_eq!(deployment["spec"]["replicas"], 5);
    assert_eq!(deployment["spec"]["template"], template);
}

#[tokio::test]
async fn what_something_changes_as_it_is_written_is_told() {
    let world = World::converged().await;
    let workload = world.names("deployments").remove(0);
    let role = json!({"spec": {"template": {"spec": {"hostNetwork": true}}}});
    world.server.lock().unwrap().changes = Some((workload.clone(), role));
    world.change(&workload, |deployment| {
        deployment["spec"]["template"]["spec"]["hostNetwork"] = json!(true);
    });
    let (result, writes) = world.pass().await;
    assert_eq!(paths(&writes), [format!("PATCH {workload}")]);
    let error = result.unwrap_err();
    assert!(error.lasts(), "{error:?}");
    let told = error.refusal().unwrap();
    assert!(
        told.starts_with("the API server refuses to keep Deployment exchange-")
            && told.contains("admission webhook"),
        "{told}"
    );
}

#[tokio::test]
async fn whatever_something_changes_as_it_is_written_is_told() {
    for (path, foreign) in [
        (
            "services/exchange-trade",
            json!({"spec": {"sessionAffinity": "ClientIP"}}),
        ),
        (
            "services/exchange-blue-trade",
            json!({"spec": {"sessionAffinity": "ClientIP"}}),
        ),
        (
            "poddisruptionbudgets",
            json!({"spec": {"minAvailable": 7, "maxUnavailable": null}}),
        ),
    ] {
        let world = World::converged().await;
        let found = world.names(path.split('/').next().unwrap());
        let object = found.into_iter().find(|it| it.starts_with(path)).unwrap();
        world.server.lock().unwrap().changes = Some((object.clone(), foreign.clone()));
        world.change(&object, |it| merge(it, &foreign));
        let (result, writes) = world.pass().await;
        assert_eq!(writes.len(), 1, "{object}: {:?}", paths(&writes));
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Changed(_)), "{object}: {error:?}");
        // Not once a second.
        for _ in 0..10 {
            _ = world.pass().await;
        }
        let wait = world.context.after("prod", "exchange", &error);
        assert!(wait > Duration::from_secs(20), "{object}: {wait:?}");
    }
}

#[tokio::test]
async fn a_swap_whose_selector_something_changes_moves_none_of_the_others() {
    let world = World::tested().await;
    let change = json!({"spec": {"selector": {"policy": "added"}}});
    world.server.lock().unwrap().changes = Some(("services/exchange-user".to_owned(), change));
    let (result, writes) = world.pass().await;
    assert!(matches!(result, Err(Error::Changed(_))), "{result:?}");
    assert_eq!(
        paths(&writes),
        [
            "PUT exchangedeployments/exchange/status",
            "PUT services/exchange-user"
        ]
    );
}

#[tokio::test]
async fn no_pod_is_started_without_what_was_to_be_rendered_for_it() {
    let world = World::migrated().await;
    world.server.lock().unwrap().broken = Some(("POST serviceaccounts".to_owned(), StatusCode::FORBIDDEN));
    for _ in 0..6 {
        _ = world.pass().await;
    }
    assert_eq!(world.get(OBJECT)["status"]["phase"], "Provisioning");
    assert_eq!(world.names("deployments"), Vec::<String>::new());
    world.server.lock().unwrap().broken = None;
    world.settle().await;
    assert_eq!(world.names("deployments").len(), 3);
}

#[tokio::test]
async fn a_size_that_something_changes_as_it_is_written_is_told() {
    let world = World::converged().await;
    let trade = world.names("deployments").remove(1);
    world.server.lock().unwrap().changes = Some((trade.clone(), json!({"spec": {"replicas": 1}})));
    world.change(&trade, |it| it["spec"]["replicas"] = json!(0));
    world.change(OBJECT, |object| {
        object["spec"]["services"]["trade"]["replicas"] = json!(3);
        object["metadata"]["generation"] = json!(2);
    });
    let (result, _) = world.pass().await;
    let told = result.unwrap_err().refusal().unwrap();
    assert!(
        told.contains("keep the size of Deployment exchange-blue-trade"),
        "{told}"
    );
}

#[tokio::test]
async fn a_live_service_that_was_made_a_load_balancer_is_put_right_whole() {
    let world = World::converged().await;
    let ranges = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let of_another_type = [
        "loadBalancerSourceRanges",
        "loadBalancerClass",
        "externalTrafficPolicy",
    ];
    world.change("services/exchange-user", |service| {
        service["metadata"]["annotations"][ranges] = json!("10.0.0.0/8");
        service["spec"]["type"] = json!("LoadBalancer");
        for (field, value) in of_another_type
            .iter()
            .zip([json!(["10.0.0.0/8"]), json!("a"), json!("Local")])
        {
            service["spec"][field] = value;
        }
    });
    world.settle().await;
    let service = world.get("services/exchange-user");
    assert_eq!(service["spec"]["type"], "ClusterIP");
    assert!(
        service["metadata"]["annotations"][ranges].is_null(),
        "{service:#}"
    );
    for field in of_another_type {
        assert!(service["spec"][field].is_null(), "{service:#}");
    }
}

#[tokio::test]
async fn a_live_service_that_cannot_be_put_right_keeps_no_other_repair_from_being_done() {
    let world = World::converged().await;
    world.change("services/exchange-user", |service| {
        service["spec"]["sessionAffinity"] = json!("ClientIP");
    });
    let lost = world.names("deployments").remove(0);
    world.server.lock().unwrap().objects.remove(&lost);
    world.server.lock().unwrap().broken = Some(("PUT services".to_owned(), StatusCode::FORBIDDEN));
    let (result, _) = world.pass().await;
    assert_eq!(result.unwrap_err().class(), Class::Forbidden);
    assert!(world.names("deployments").contains(&lost));
}

#[tokio::test]
async fn a_stack_is_repaired_although_what_need_not_exist_has_come_to_be() {
    let world = World::new();
    world.change(OBJECT, |object| {
        object["spec"]["services"]["user"]["envFrom"] =
            json!([{"configMapRef": {"name": "late", "optional": true}}]);
    });
    let world = world.converges().await;
    // A new revision, which waits for somebody.
    world.change(OBJECT, |object| object["spec"]["suspend"] = json!(true));
    let late = json!({"metadata": {"name": "late"}, "data": {"A": "b"}});
    world.server.lock().unwrap().put("configmaps/late", late);
    let workload = world.names("deployments").remove(0);
    world.change(&workload, |deployment| {
        deployment["spec"]["template"]["spec"]["containers"][0]["image"] = json!("acme/other:1");
    });
    let (_, writes) = world.pass().await;
    assert!(
        paths(&writes).contains(&format!("PATCH {workload}")),
        "{:?}",
        paths(&writes)
    );
    // What was not there lacks nobody, whether it has come to be or is referred to no more.
    let lacks_nothing = async || {
        world.settle().await;
        let status = world.get(OBJECT)["status"].to_string();
        assert!(!status.contains("is gone"), "{status}");
    };
    lacks_nothing().await;
    world.change(OBJECT, |object| {
        object["spec"]["services"]["user"]["envFrom"] = json!([]);
    });
    lacks_nothing().await;
}

#[tokio::test]
async fn a_live_service_that_lost_its_labels_is_found_by_its_name() {
    let world = World::converged().await;
    let labels = world.get("services/exchange-trade")["metadata"]["labels"].clone();
    world.change("services/exchange-trade", |service| {
        service["metadata"]["labels"] = json!({"team": "trading"});
    });
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), ["PUT services/exchange-trade"]);
    for (label, value) in labels.as_object().unwrap() {
        assert_eq!(&writes[0].body["metadata"]["labels"][label], value);
    }
    assert_eq!(writes[0].body["metadata"]["labels"]["team"], "trading");
}

#[tokio::test]
async fn a_first_release_begins_anew_for_another_store() {
    let world = World::new();
    world.settle().await;
    world.finish_jobs();
    world.settle().await;
    assert_eq!(world.names("deployments").len(), 3);
    let other = json!({"metadata": {"name": "db2"}, "data": {"url": ""}});
    world.server.lock().unwrap().put("secrets/db2", other);
    world.change(OBJECT, |object| {
        object["spec"]["database"]["secretRef"]["name"] = json!("db2");
    });
    let uses = |name: &str| {
        let database = |name: &String| {
            let template = world.get(name)["spec"]["template"]["spec"].clone();
            let volumes = template["volumes"].as_array().unwrap().clone();
            volumes.into_iter().find(|it| it["name"] == "database").unwrap()["secret"]["secretName"].clone()
        };
        world.names(name).iter().map(database).collect::<Vec<_>>()
    };
    world.settle().await;
    assert_eq!(world.get(OBJECT)["status"]["attempt"], 2);
    // The schema of the other one has to be expanded, too.
    assert!(uses("jobs").contains(&json!("db2")), "{:?}", uses("jobs"));
    world.finish_jobs();
    world.settle().await;
    assert_eq!(uses("deployments"), ["db2"; 3]);
}

#[tokio::test]
async fn what_runs_with_another_store_than_is_declared_is_told_and_left_alone() {
    let world = World::converged().await;
    let other = json!({"metadata": {"name": "db2"}, "data": {"url": ""}});
    world.server.lock().unwrap().put("secrets/db2", other);
    let name = |world: &World, name: &str| {
        world.change(OBJECT, |object| {
            object["spec"]["database"]["secretRef"]["name"] = json!(name);
        });
    };
    world.change(OBJECT, |object| object["status"] = Value::Null);
    name(&world, "db2");
    world.settle().await;
    let stalled = world.condition("Stalled");
    assert_eq!(stalled["reason"], "AdoptionUndecided");
    let message = stalled["message"].as_str().unwrap();
    assert!(
        message.contains("the key url of the Secret db as spec.database.secretRef, not the key url of db2"),
        "{message}"
    );
    name(&world, "db");
    world.settle().await;
    assert_eq!(world.get(OBJECT)["status"]["phase"], "Verifying");
}

#[tokio::test]
async fn what_a_deleted_object_left_behind_is_adopted() {
    let world = World::converged().await;
    let kinds = [
        "services",
        "deployments",
        "poddisruptionbudgets",
        "controllerrevisions",
        "serviceaccounts",
        "secrets",
        "jobs",
    ];
    let children = || {
        let names = kinds.iter().flat_map(|kind| world.names(kind));
        names.filter(|name| world.get(name)["metadata"]["labels"].is_object())
    };
    for name in children() {
        world.change(&name, |object| {
            object["metadata"]["ownerReferences"] = Value::Null;
        });
    }
    let another = "1a6cba1e-0000-4d1c-8a59-1d2a8e1c9d10";
    let revision = world.get(OBJECT)["status"]["live"]["revision"].clone();
    world.change(OBJECT, |object| {
        object["metadata"]["uid"] = json!(another);
        object["status"] = Value::Null;
    });
    world.settle().await;
    assert_eq!(world.get(OBJECT)["status"]["phase"], "Verifying");
    assert_eq!(world.get(OBJECT)["status"]["live"]["revision"], revision);
    for name in children() {
        let owner = &world.get(&name)["metadata"]["ownerReferences"][0]["uid"];
        assert_eq!(owner, another, "{name}");
    }
}

#[tokio::test]
async fn a_deletion_carries_uid_and_version() {
    let world = World::converged().await;
    world.change(OBJECT, |object| {
        object["spec"]["services"]["trade"]["autoscaling"] = json!({"minReplicas": 1, "maxReplicas": 3});
    });
    world.settle().await;
    let autoscaler = world.names("horizontalpodautoscalers").remove(0);
    let there = world.get(&autoscaler)["metadata"].clone();
    world.change(OBJECT, |object| {
        object["spec"]["services"]["trade"]["autoscaling"] = Value::Null;
    });
    let (result, writes) = world.pass().await;
    result.unwrap();
    let delete = writes
        .iter()
        .find(|write| write.method == Method::DELETE)
        .unwrap();
    assert_eq!(delete.path, autoscaler);
    assert_eq!(delete.body["preconditions"]["uid"], there["uid"]);
    assert_eq!(
        delete.body["preconditions"]["resourceVersion"],
        there["resourceVersion"]
    );
    assert_eq!(delete.body["propagationPolicy"], "Background");
}

#[tokio::test]
async fn what_was_made_again_since_it_was_seen_is_not_removed() {
    let world = World::migrated().await;
    world.settle().await;
    let owned = |name: &String| world.get(name)["metadata"]["ownerReferences"].is_array();
    let lane = world.names("secrets").into_iter().find(owned).unwrap();
    // Another version takes its place: of the first its stack is left, and then it goes.
    world.change(OBJECT, |object| object["spec"]["version"] = json!("2.0.0"));
    while world.names("services").len() > 3 {
        world.pass().await.0.unwrap();
    }
    // When all else has been seen, another operator has made the secret again, under the same name.
    world.meanwhile(format!("GET {OBJECT}"), &lane, json!({"metadata": {"uid": null}}));
    let (result, writes) = world.pass().await;
    assert_eq!(result.unwrap_err().class(), Class::Conflict);
    assert_eq!(paths(&writes), [format!("DELETE {lane}")]);
    assert!(world.names("secrets").contains(&lane));
    assert_eq!(world.names("controllerrevisions").len(), 1);
    // Seen as it is now, it goes.
    world.settle().await;
    assert!(!world.names("secrets").contains(&lane));
}

#[tokio::test]
async fn a_stack_to_which_a_live_service_without_labels_points_is_not_removed() {
    let world = World::migrated().await;
    world.settle().await;
    let first = world.names("deployments").remove(0);
    let stack = world.get(&first)["spec"]["template"]["metadata"]["labels"].clone();
    let mut selector = world.get("services/exchange-user")["spec"]["selector"].clone();
    for label in ["exchange.dev/colour", "exchange.dev/revision"] {
        selector[label] = stack[label].clone();
    }
    world.change(OBJECT, |object| object["spec"]["version"] = json!("2.0.0"));
    // When its end is decided, somebody points a Service at it, and takes the labels by which that is listed.
    let pointed = json!({"metadata": {"labels": null}, "spec": {"selector": selector}});
    let record = format!("PUT {OBJECT}/status");
    world.meanwhile(record.clone(), "services/exchange-user", pointed);
    let (result, writes) = world.pass().await;
    assert!(
        matches!(result, Err(Error::Refused(Refusal::Live(_)))),
        "{result:?}"
    );
    assert_eq!(paths(&writes), [record]);
    assert!(world.names("deployments").contains(&first));
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_never_answered_holds_no_pass_up() {
    let world = World::new();
    world.server.lock().unwrap().silent = Some("POST events".to_owned());
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes).len(), 4, "{:?}", paths(&writes));
    assert_eq!(world.get(OBJECT)["status"]["phase"], "Pending");
}

#[tokio::test]
async fn nothing_is_written_for_an_object_that_is_being_deleted() {
    let world = World::converged().await;
    world.change(OBJECT, |object| {
        object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        object["spec"]["version"] = json!("2.0.0");
    });
    world.change("services/exchange-trade", |service| {
        service["spec"]["selector"] = json!({"a": "b"});
    });
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), Vec::<String>::new());
}

#[tokio::test]
async fn a_name_that_belongs_to_somebody_else_is_told_and_left_alone() {
    let world = World::new();
    world.server.lock().unwrap().put(
        "services/exchange-trade",
        json!({"metadata": {"name": "exchange-trade"}, "spec": {"selector": {"app": "other"}}}),
    );
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), ["PUT exchangedeployments/exchange/status"]);
    let conditions = writes[0].body["status"]["conditions"].as_array().unwrap();
    let stalled = conditions.iter().find(|it| it["type"] == "Stalled").unwrap();
    assert_eq!(stalled["reason"], "NameTaken");
    assert!(stalled["message"].as_str().unwrap().contains("exchange-trade"));
}

/// The object was deleted, and created again before the garbage collector has removed what belonged to it.
#[tokio::test]
async fn what_is_left_of_a_predecessor_is_waited_for() {
    let world = World::new();
    let owner = |kind: &str| json!([{"apiVersion": "exchange.dev/v1alpha1", "kind": kind, "name": "exchange", "uid": "before", "controller": true}]);
    let put = |kind: &str| {
        let metadata = json!({"name": "exchange-trade", "ownerReferences": owner(kind)});
        let service = json!({"metadata": metadata, "spec": {"selector": {"app": "other"}}});
        world
            .server
            .lock()
            .unwrap()
            .put("services/exchange-trade", service);
    };
    put("ExchangeDeployment");
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), ["PUT exchangedeployments/exchange/status"]);
    assert_eq!(world.condition("Stalled")["status"], "False");
    let message = world.condition("Reconciling")["message"].clone();
    let wanted = "1.0.0 waits until nothing is left of the object of this name that was deleted: Service/exchange-trade";
    assert!(message.as_str().unwrap().starts_with(wanted), "{message}");
    // Of that name, and something else.
    put("Other");
    let (result, _) = world.pass().await;
    result.unwrap();
    assert_eq!(world.condition("Stalled")["reason"], "NameTaken");
    world
        .server
        .lock()
        .unwrap()
        .objects
        .remove("services/exchange-trade");
    world.settle().await;
    assert_eq!(world.condition("Stalled")["reason"], "Progressing");
    assert_eq!(world.names("jobs").len(), 1);
}

#[tokio::test]
async fn a_missing_reference_is_told_in_words() {
    let world = World::new();
    world.server.lock().unwrap().objects.remove("secrets/queue");
    world.pass().await.0.unwrap();
    // It may be about to come: who declares both at once is not told that this has failed.
    let told = |kind: &str, truth: &str| {
        let condition = world.condition(kind);
        assert_eq!(condition["status"], truth, "{condition}");
        assert_eq!(condition["reason"], "ReferenceMissing", "{condition}");
        assert_eq!(
            condition["message"],
            "the Secret queue of spec.queue.secretRef does not exist: create it, or change the spec"
        );
    };
    told("Ready", "False");
    told("Reconciling", "True");
    assert_eq!(world.condition("Stalled")["status"], "False");
    world.is_at_rest().await;
    world.change(OBJECT, |object| {
        object["status"]["missingSince"] = json!("2026-01-01T00:00:00Z");
    });
    world.pass().await.0.unwrap();
    told("Ready", "False");
    told("Stalled", "True");
    assert_eq!(world.condition("Reconciling")["status"], "False");
    // With another declaration another one may be about to come.
    world.change(OBJECT, |object| object["metadata"]["generation"] = json!(2));
    world.pass().await.0.unwrap();
    told("Reconciling", "True");
    assert_eq!(world.condition("Stalled")["status"], "False");
}

/// As a template leaves it to which somebody has given no value. Nothing may be read under such a name, and what people ask for
/// is heard all the same.
#[tokio::test]
async fn what_cannot_be_a_name_is_the_name_of_nothing() {
    for name in [
        "",
        "settings ",
        "..",
        "a%b",
        "Settings",
        "a/b",
        "-a",
        &"a".repeat(254),
    ] {
        let world = World::converged().await;
        world.change(OBJECT, |object| {
            object["metadata"]["generation"] = json!(2);
            object["spec"]["services"]["user"]["envFrom"] = json!([{"configMapRef": {"name": name}}]);
            object["metadata"]["annotations"] = json!({"exchange.dev/retry": "0.1"});
        });
        let (result, writes) = world.pass().await;
        result.unwrap();
        assert_eq!(paths(&writes), [format!("PUT {OBJECT}/status")], "{name}");
        let ready = world.condition("Ready");
        assert_eq!(ready["reason"], "ReferenceMissing");
        let told = format!("the ConfigMap {name:?} does not exist: create it, or change the spec");
        assert_eq!(ready["message"], told);
        assert_eq!(world.get(OBJECT)["status"]["asked"]["retry"]["value"], "0.1");
    }
}

/// Of a CRD that is older than the operator: what it does not know is recorded in vain.
#[tokio::test]
async fn what_the_api_server_does_not_keep_is_not_recorded_all_the_time() {
    let world = World::new();
    world.change(OBJECT, |object| {
        object["spec"]["rollout"] = json!({"promotion": "Manual"});
    });
    let unknown = json!({"status": {"candidate": {"tested": null}}});
    let world = world.passes_tests().await;
    world.pass().await.0.unwrap();
    assert_eq!(world.get(OBJECT)["status"]["phase"], "AwaitingPromotion");
    world.change(OBJECT, |object| merge(object, &unknown));
    world.server.lock().unwrap().changes = Some((OBJECT.to_owned(), unknown));
    let again = world.context.pass("prod", "exchange", 1).await.unwrap();
    assert_eq!(again, Action::requeue(Duration::from_secs(5)));
}

impl World {
    fn condition(&self, kind: &str) -> Value {
        let object = self.get(OBJECT);
        let conditions = object["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|it| it["type"] == kind).unwrap().clone()
    }

    /// What is live lacks a budget, and nobody lets it be made again.
    async fn without_a_budget() -> Self {
        let world = Self::converged().await;
        let budget = world.names("poddisruptionbudgets").remove(0);
        world.server.lock().unwrap().objects.remove(&budget);
        world.server.lock().unwrap().broken = Some(("POST pod".to_owned(), StatusCode::FORBIDDEN));
        world
    }

    /// The expand has passed, and pods are about to be asked for.
    async fn migrated() -> Self {
        let world = Self::new();
        world.settle().await;
        world.finish_jobs();
        world
    }
}

#[tokio::test]
async fn a_write_that_cannot_be_done_is_told_with_its_cause_and_the_deadline_ends_it() {
    for (status, class, does) in [
        (StatusCode::UNPROCESSABLE_ENTITY, Class::Invalid, "refuses"),
        (StatusCode::INTERNAL_SERVER_ERROR, Class::Transient, "fails"),
    ] {
        cannot_be_done(status, class, does).await;
    }
}

async fn cannot_be_done(status: StatusCode, class: Class, does: &str) {
    let world = World::migrated().await;
    world.server.lock().unwrap().broken = Some(("POST deployments".to_owned(), status));
    while world.get(OBJECT)["status"]["phase"] != "Provisioning" {
        _ = world.pass().await;
    }
    // What may go better next time is not told at once.
    for _ in 0..=PATIENCE {
        _ = world.pass().await;
    }
    let (result, writes) = world.pass().await;
    let error = result.unwrap_err();
    assert_eq!(error.class(), class);
    // All three were tried, and nothing else was left undone for them.
    assert_eq!(
        paths(&writes)
            .iter()
            .filter(|it| *it == "POST deployments")
            .count(),
        3
    );
    assert_eq!(world.names("services").len(), 6);
    let told = world.condition("Reconciling")["message"]
        .as_str()
        .unwrap()
        .to_owned();
    let cause = format!("the API server {does} to create Deployment exchange-blue-user-");
    assert!(
        told.contains(&cause) && told.contains("as the test wants"),
        "{told}"
    );
    // However often it is tried: the same is recorded once, and a phase with a deadline is looked at often enough for it.
    for _ in 0..10 {
        let (_, writes) = world.pass().await;
        let all = paths(&writes);
        assert!(!all.contains(&format!("PUT {OBJECT}/status")), "{all:?}");
    }
    let wait = world.context.after("prod", "exchange", &error);
    assert!(wait <= Duration::from_secs(5), "{wait:?}");
    world.phase_began_long_ago();
    _ = world.pass().await;
    assert_eq!(world.get(OBJECT)["status"]["phase"], "Failed");
    let rejected = world.get(OBJECT)["status"]["rejected"].clone();
    assert_eq!(rejected["reason"], "ProgressDeadlineExceeded");
    assert!(
        rejected["message"].as_str().unwrap().contains(&cause),
        "{rejected}"
    );
}

/// The time to drain, which pods are told, is in no revision: what has the traffic is not replaced for it. What else somebody has
/// changed of it is put right.
#[tokio::test]
async fn a_live_stack_whose_rendering_is_lost_goes_on_being_told_what_it_was() {
    let world = World::converged().await;
    let rendered = world.names("controllerrevisions").remove(0);
    let workloads = || -> Vec<Value> {
        let names = world.names("deployments");
        names.iter().map(|name| world.get(name)["spec"].clone()).collect()
    };
    let before = workloads();
    world.change(OBJECT, |object| {
        object["spec"]["rollout"]["drainTimeout"] = json!("17m");
        object["spec"]["rollout"]["verification"] = json!({"duration": "17m"});
        let generation = object["metadata"]["generation"].as_i64().unwrap();
        object["metadata"]["generation"] = json!(generation + 1);
    });
    world.settle().await;
    world.server.lock().unwrap().objects.remove(&rendered);
    world.settle().await;
    assert_eq!(
        world.names("controllerrevisions"),
        std::slice::from_ref(&rendered)
    );
    assert_eq!(workloads(), before);

    world.server.lock().unwrap().objects.remove(&rendered);
    let edited = world.names("deployments").remove(0);
    world.change(&edited, |deployment| {
        deployment["spec"]["template"]["spec"]["containers"][0]["image"] = json!("evil");
    });
    world.settle().await;
    assert_eq!(workloads(), before);
}

/// `kubectl expose` gives a Service the labels of what it exposes, and nobody owns it.
#[tokio::test]
async fn what_has_our_labels_and_another_name_is_nothing_of_ours() {
    let world = World::converged().await;
    let kinds = [
        "services",
        "deployments",
        "poddisruptionbudgets",
        "controllerrevisions",
    ];
    for kind in kinds {
        let name = world
            .names(kind)
            .into_iter()
            .find(|it| it.contains("-blue"))
            .unwrap();
        let mut object = world.get(&name);
        object["metadata"]["uid"] = json!(format!("of another {kind}"));
        let owner = json!([{"apiVersion": "example.com/v1", "kind": "Gateway", "name": "one", "uid": "another", "controller": true}]);
        // One is read before ours, and one after it, and of both one belongs to nobody and one to somebody else.
        let names = ["a".to_owned(), format!("{name}-z")];
        let others = names.iter().flat_map(|name| {
            [
                (name.clone(), json!([])),
                (format!("{name}-owned"), owner.clone()),
            ]
        });
        for (other, owners) in others {
            let other = other.rsplit('/').next().unwrap();
            object["metadata"]["ownerReferences"] = owners;
            object["metadata"]["name"] = json!(other);
            object["spec"]["other"] = json!(true);
            world
                .server
                .lock()
                .unwrap()
                .put(&format!("{kind}/{other}"), object.clone());
        }
    }
    world.is_at_rest().await;
}

/// A test whose Job somebody runs once more, under another name, has passed when its own Job has.
#[tokio::test]
async fn a_copy_of_a_job_says_nothing() {
    let world = World::new().passes_tests().await;
    let smoke = world
        .names("jobs")
        .into_iter()
        .find(|it| it.contains("-smoke-"))
        .unwrap();
    let mut copy = world.get(&smoke);
    copy["metadata"]["name"] = json!("zzz");
    copy["metadata"]["uid"] = json!("of another Job");
    copy["status"] = json!({"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    world.server.lock().unwrap().put("jobs/zzz", copy);
    world.settle().await;
    assert_eq!(world.get(OBJECT)["status"]["rejected"], Value::Null);
}

/// It may be about something else by now.
#[tokio::test(start_paused = true)]
async fn what_is_said_of_the_same_refusal_is_recorded_once_a_minute() {
    let world = World::without_a_budget().await;
    let mut said = Vec::new();
    for _ in 0..3 {
        let mut records = 0;
        for _ in 0..5 {
            let (_, writes) = world.pass().await;
            records += paths(&writes).iter().filter(|it| it.starts_with("PUT")).count();
        }
        assert_eq!(records, 1, "{said:?}");
        said.push(world.condition("Ready")["message"].clone());
        tokio::time::advance(AT_LEAST_EVERY).await;
    }
    said.dedup();
    assert_eq!(said.len(), 3, "{said:?}");
}

#[tokio::test]
async fn what_cannot_be_put_right_at_rest_is_tried_once_a_minute() {
    let world = World::without_a_budget().await;
    let mut error = None;
    for _ in 0..12 {
        error = world.pass().await.0.err();
    }
    let wait = world.context.after("prod", "exchange", &error.unwrap());
    assert!(wait > Duration::from_secs(20), "{wait:?}");
}

/// What is not written then are the Services: clients wait for it.
#[tokio::test]
async fn a_swap_that_cannot_be_read_or_recorded_is_looked_at_as_soon_as_one_that_can() {
    let record = format!("PUT {OBJECT}/status");
    for (passes, broken) in [(1, "GET services"), (0, record.as_str())] {
        let world = World::tested().await;
        for _ in 0..passes {
            world.pass().await.0.unwrap();
            assert_eq!(world.get(OBJECT)["status"]["phase"], "Promoting");
        }
        world.server.lock().unwrap().broken = Some((broken.to_owned(), StatusCode::INTERNAL_SERVER_ERROR));
        let mut error = None;
        for _ in 0..12 {
            error = world.pass().await.0.err();
        }
        let wait = world.context.after("prod", "exchange", &error.unwrap());
        assert!(wait <= Duration::from_secs(5), "{broken}: {wait:?}");
    }
}

/// Once it counts as what cannot be written, the pass that waits for its answer in vain does the rest.
#[tokio::test(start_paused = true)]
async fn a_write_that_is_never_answered_holds_up_nothing_that_does_not_need_it() {
    let world = World::converged().await;
    let budgets = world.names("poddisruptionbudgets");
    let workloads = world.names("deployments");
    for name in workloads.iter().chain(&budgets) {
        world.server.lock().unwrap().objects.remove(name);
    }
    world.server.lock().unwrap().silent = Some("POST pod".to_owned());
    for _ in 0..=PATIENCE {
        _ = world.pass().await;
    }
    assert_eq!(world.names("deployments"), workloads);
    assert_eq!(world.names("poddisruptionbudgets"), Vec::<String>::new());
    world.server.lock().unwrap().silent = None;
    world.settle().await;
    assert_eq!(world.names("poddisruptionbudgets"), budgets);
}

#[tokio::test]
async fn what_is_mended_is_not_told_any_longer() {
    let world = World::without_a_budget().await;
    _ = world.pass().await;
    _ = world.pass().await;
    let told = || {
        world.condition("Ready")["message"]
            .to_string()
            .contains("refuses")
    };
    assert!(told());
    world.server.lock().unwrap().broken = None;
    let soon = world.context.pass("prod", "exchange", 1).await.unwrap();
    assert_eq!(soon, Action::requeue(Duration::from_secs(1)));
    world.pass().await.0.unwrap();
    assert!(!told());
}

#[tokio::test]
async fn a_contract_that_comes_from_nothing_says_so() {
    let world = World::converged().await;
    let rendered = world.names("controllerrevisions").remove(0);
    world.server.lock().unwrap().objects.remove(&rendered);
    world.change(OBJECT, |object| {
        object["spec"]["version"] = json!("2.0.0");
        object["metadata"]["generation"] = json!(2);
        object["status"]["live"]["contracted"] = json!(false);
    });
    let mut passes = 0;
    while !matches!(world.pass().await.0, Err(Error::Lost(_))) {
        passes += 1;
        assert!(passes < 10, "{:#}", world.get(OBJECT)["status"]);
    }
    world.phase_began_long_ago();
    _ = world.pass().await;
    let stalled = world.condition("Stalled");
    assert_eq!(stalled["reason"], "WriteRefused");
    let told = stalled["message"].as_str().unwrap();
    assert!(told.contains("is lost: declare again what it runs"), "{told}");
    // That is the way out.
    world.change(OBJECT, |object| {
        object["spec"]["version"] = json!("1.0.0");
        object["metadata"]["generation"] = json!(3);
    });
    world.settle().await;
    let jobs = world.names("jobs");
    assert!(jobs.iter().any(|it| it.contains("-contract-")), "{jobs:?}");
}

#[tokio::test]
async fn a_pod_that_two_slices_list_counts_once() {
    let world = World::new();
    world.change(OBJECT, |object| {
        object["spec"]["services"]["user"]["replicas"] = json!(2);
    });
    world.settle().await;
    world.finish_jobs();
    world.settle().await;
    world.start_pods();
    let mut other = world.get("endpointslices/exchange-blue-user");
    other["addressType"] = json!("IPv6");
    other["endpoints"][0]["addresses"] = json!(["2001:db8::1"]);
    let path = "endpointslices/exchange-blue-user-6";
    world.server.lock().unwrap().put(path, other);
    world.settle().await;
    let status = world.get(OBJECT)["status"].clone();
    assert_eq!(status["phase"], "Provisioning", "{status:#}");
}

#[tokio::test]
async fn a_child_that_lost_its_labels_gets_them_back() {
    let world = World::converged().await;
    for kind in [
        "deployments",
        "poddisruptionbudgets",
        "controllerrevisions",
        "serviceaccounts",
        "secrets",
        "services",
    ] {
        let ours = |name: &String| world.get(name)["metadata"]["ownerReferences"].is_array();
        for name in world.names(kind).into_iter().filter(ours) {
            let before = world.get(&name)["metadata"].clone();
            world.change(&name, |object| {
                object["metadata"]["labels"] = json!({"team": "a"});
            });
            let (result, _) = world.pass().await;
            result.unwrap();
            world.settle().await;
            for (label, value) in before["labels"].as_object().unwrap() {
                assert_eq!(&world.get(&name)["metadata"]["labels"][label], value, "{name}");
            }
            assert_eq!(world.get(&name)["metadata"]["uid"], before["uid"], "{name}");
            assert_eq!(world.condition("Stalled")["reason"], "Progressing", "{name}");
        }
    }
}

/// One label that is gone, or says something else, is as good as none.
#[tokio::test]
async fn a_child_of_which_somebody_changes_a_label_gets_it_back() {
    let world = World::converged().await;
    let mut wrong = Vec::new();
    for kind in ["deployments", "poddisruptionbudgets", "services"] {
        let ours = |name: &String| world.get(name)["metadata"]["ownerReferences"].is_array();
        for name in world.names(kind).into_iter().filter(ours) {
            let before = world.get(&name);
            for label in before["metadata"]["labels"].as_object().unwrap().keys() {
                for changed in [None, Some("another"), Some("green")] {
                    world.change(&name, |object| {
                        let labels = object["metadata"]["labels"].as_object_mut().unwrap();
                        labels.remove(label);
                        labels.extend(changed.map(|changed| (label.clone(), json!(changed))));
                    });
                    let mut ends = Vec::new();
                    for _ in 0..4 {
                        let (result, writes) = world.pass().await;
                        ends.push(result.map(|()| paths(&writes)).map_err(|error| error.to_string()));
                    }
                    let after = world.get(&name);
                    let labels = ["/metadata/labels", "/metadata/uid"];
                    let same = labels
                        .iter()
                        .all(|path| after.pointer(path) == before.pointer(path));
                    if !same || ends.last() != Some(&Ok(Vec::new())) {
                        wrong.push(format!("{name}: {label}={changed:?}: {ends:?}"));
                        world.change(&name, |object| *object = before.clone());
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_job_of_which_somebody_changes_the_attempt_gets_it_back() {
    let world = World::new();
    world.settle().await;
    let job = world.names("jobs").remove(0);
    world.change(&job, |job| {
        job["metadata"]["labels"]["exchange.dev/attempt"] = json!("7");
    });
    let (result, _) = world.pass().await;
    result.unwrap();
    assert_eq!(world.get(&job)["metadata"]["labels"]["exchange.dev/attempt"], "1");
    world.settle().await;
}

#[tokio::test]
async fn a_job_that_lost_its_labels_gets_them_back() {
    let world = World::new();
    world.settle().await;
    let job = world.names("jobs").remove(0);
    let before = world.get(&job)["metadata"]["labels"].clone();
    world.change(&job, |job| job["metadata"]["labels"] = json!({}));
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert!(
        paths(&writes).contains(&format!("PATCH {job}")),
        "{:?}",
        paths(&writes)
    );
    assert_eq!(world.get(&job)["metadata"]["labels"], before);
    world.settle().await;
}

#[tokio::test]
async fn a_child_whose_name_belongs_to_somebody_else_is_told_until_it_is_free() {
    let world = World::migrated().await;
    let version = world.get(OBJECT)["status"]["candidate"]["revision"].clone();
    let name = format!("exchange-blue-trade-{}", version.as_str().unwrap());
    let path = format!("deployments/{name}");
    let foreign = json!({"metadata": {"name": name, "labels": {"app": "other"}}, "spec": {}});
    world.server.lock().unwrap().put(&path, foreign);
    let mut passes = 0;
    while world.get(OBJECT)["status"]["conditions"].is_null()
        || world.condition("Stalled")["reason"] != "NameTaken"
    {
        _ = world.pass().await;
        passes += 1;
        assert!(passes < 10, "{}", world.condition("Stalled"));
    }
    let message = world.condition("Stalled")["message"].clone();
    assert!(
        message.as_str().unwrap().contains(&format!("Deployment/{name}")),
        "{message}"
    );
    assert_eq!(world.get(&path)["metadata"]["labels"], json!({"app": "other"}));
    // No hot loop: it is looked at, and not tried.
    let (result, writes) = world.pass().await;
    result.unwrap();
    assert_eq!(paths(&writes), Vec::<String>::new());
    world.server.lock().unwrap().objects.remove(&path);
    world.settle().await;
    assert_eq!(world.condition("Stalled")["reason"], "Progressing");
    assert_eq!(world.get(&path)["metadata"]["ownerReferences"][0]["uid"], UID);
}

/// Of what is live each name is tried again, and told once.
#[tokio::test]
async fn a_name_that_is_taken_of_what_is_live_is_told_once_and_while_it_is_needed() {
    let world = World::converged().await;
    let budgets = world.names("poddisruptionbudgets");
    for name in &budgets {
        let own = name.rsplit('/').next().unwrap();
        let foreign = json!({"metadata": {"name": own, "labels": {"app": "other"}}, "spec": {}});
        world.server.lock().unwrap().put(name, foreign);
    }
    for _ in 0..4 {
        _ = world.pass().await;
    }
    let message = world.condition("Stalled")["message"].clone();
    assert_eq!(world.condition("Stalled")["reason"], "NameTaken");
    for name in &budgets {
        let name = name.rsplit('/').next().unwrap();
        assert_eq!(message.as_str().unwrap().matches(name).count(), 1, "{message}");
    }
    let mut reads = None;
    for _ in 0..4 {
        let before = world.server.lock().unwrap().reads;
        let writes = paths(&world.pass().await.1);
        let now = world.server.lock().unwrap().reads - before;
        assert_eq!(*reads.get_or_insert(now), now, "it is looked at once");
        assert_eq!(writes, ["POST poddisruptionbudgets"; 3]);
        assert_eq!(world.condition("Stalled")["message"], message);
    }
    // Another version needs other names.
    world.change(OBJECT, |object| {
        object["spec"]["version"] = json!("2.0.0");
        object["metadata"]["generation"] = json!(2);
    });
    _ = world.pass().await;
    _ = world.pass().await;
    assert!(!world.get(OBJECT)["status"]["candidate"].is_null());
}

#[tokio::test]
async fn pods_that_a_quota_forbids_are_told() {
    let world = World::new();
    world.settle().await;
    let job = world.names("jobs").remove(0);
    let event = |message: &str| {
        let uid = world.get(&job)["metadata"]["uid"].clone();
        json!({
            "metadata": {"name": "event"}, "involvedObject": {"uid": uid}, "reason": "FailedCreate",
            "message": message,
        })
    };
    let said = "Error creating: pods \"exchange-x7k2p\" is forbidden: exceeded quota: pods, limited: pods=3";
    let event = event(said);
    world.server.lock().unwrap().put("events/event", event);
    world.pass().await.0.unwrap();
    let message = world.condition("Reconciling")["message"].clone();
    let cause = "no pod can be created: exceeded quota: pods, limited: pods=3";
    assert!(message.as_str().unwrap().contains(cause), "{message}");

    world.finish_jobs();
    world.settle().await;
    for name in world.names("deployments") {
        world.change(&name, |deployment| {
            let failure = json!({"type": "ReplicaFailure", "status": "True", "message": said});
            deployment["status"]["conditions"] = json!([failure]);
        });
    }
    world.pass().await.0.unwrap();
    let message = world.condition("Reconciling")["message"].clone();
    assert!(message.as_str().unwrap().contains(cause), "{message}");
}

/// The one that should have ended may be what a lost node has had: of it nobody hears again, and another has taken its place.
#[tokio::test]
async fn what_keeps_a_pod_from_starting_is_told_before_what_keeps_one_from_ending() {
    let world = World::migrated().await;
    while world.get(OBJECT)["status"]["phase"] != "Provisioning" {
        _ = world.pass().await;
    }
    let deployment = world.get(&world.names("deployments").remove(0));
    let labels = deployment["spec"]["template"]["metadata"]["labels"].clone();
    let going = json!({"metadata": {"name": "a", "labels": labels, "deletionTimestamp": "2026-01-01T00:00:00Z"},
                       "spec": {"containers": [], "nodeName": "node-7"}, "status": {}});
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff"}});
    let starting = json!({"metadata": {"name": "b", "labels": labels}, "status": {"containerStatuses": [{
        "name": "user", "ready": false, "restartCount": 0, "image": "acme/exchange:1", "imageID": "", "state": waiting,
    }]}});
    for (path, pod, told) in [
        (
            "pods/a",
            going,
            "a on node-7 should have ended by 2026-01-01T00:00:00Z",
        ),
        ("pods/b", starting, "ImagePullBackOff acme/exchange:1"),
    ] {
        world.server.lock().unwrap().put(path, pod);
        world.pass().await.0.unwrap();
        let message = world.condition("Reconciling")["message"].clone();
        assert!(message.as_str().unwrap().contains(told), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_migration_that_runs_says_how_far_it_is() {
    let world = World::new();
    world.settle().await;
    let job = world.get(&world.names("jobs").remove(0));
    let pod = json!({
        "metadata": {
            "name": "expand",
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "ownerReferences": [{
                "apiVersion": "batch/v1", "kind": "Job", "name": "expand", "uid": job["metadata"]["uid"],
            }],
        },
        "status": {"containerStatuses": [{
            "name": "job", "ready": true, "restartCount": 0, "image": "", "imageID": "", "state": {"running": {}},
        }]},
    });
    world.server.lock().unwrap().put("pods/expand", pod);
    let says = |line: &str| {
        let line = json!({"message": line});
        world.server.lock().unwrap().put("pods/expand/log", line);
    };
    let told = async || {
        world.pass().await.0.unwrap();
        let message = world.condition("Reconciling")["message"].clone();
        message
            .as_str()
            .unwrap()
            .split("; since")
            .next()
            .unwrap()
            .to_owned()
    };
    let runs = "the expand migration of 1.0.0 runs";
    says("batch 1 of 2 done");
    assert_eq!(told().await, format!("{runs}: batch 1 of 2 done"));
    // It is asked every five seconds at the most.
    says("batch 2 of 2: 500 rows");
    assert_eq!(told().await, format!("{runs}: batch 1 of 2 done"));
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(told().await, format!("{runs}: batch 2 of 2: 500 rows"));
    // A log that cannot be read, or does not come, changes nothing.
    says("batch 2 of 2: 1000 rows");
    let log = "GET pods/expand/log".to_owned();
    world.server.lock().unwrap().broken = Some((log.clone(), StatusCode::FORBIDDEN));
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(told().await, format!("{runs}: batch 2 of 2: 500 rows"));
    world.server.lock().unwrap().broken = None;
    world.server.lock().unwrap().silent = Some(log);
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(told().await, format!("{runs}: batch 2 of 2: 500 rows"));
    world.server.lock().unwrap().silent = None;
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(told().await, format!("{runs}: batch 2 of 2: 1000 rows"));
    // What has ended is not asked.
    world.finish_jobs();
    assert_eq!(told().await.matches("batch").count(), 0);
}
