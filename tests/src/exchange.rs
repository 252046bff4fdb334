//! An exchange that the operator runs, and clients that trade on it all the while: what the demonstration and the
//! end-to-end tests of releases stand on. Everything goes through `kubectl` and `helm`, as a person would do it.

use std::{
    io::{BufRead, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::Child,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::Method;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    addons::HELPER_IMAGE,
    kubectl::{Session, Watching},
    sandbox::wait_until,
    tunnel::Tunnel,
};

/// The pod of the clients.
pub const LOAD: &str = "load";
/// Name of the ExchangeDeployment, of the stores' release, and the prefix of all that belongs to them.
pub const NAME: &str = "exchange";
/// How long a phase of a release may take on a machine that compiles beside it.
pub const PATIENCE: Duration = Duration::from_mins(4);

const TREASURY: &str = "treasury@exchange.example";
/// The pods' port for operators.
const ADMIN_PORT: u16 = 9090;
/// The header in which a stack names itself.
pub const STACK_HEADER: &str = "x-exchange-stack";
/// What any cluster can pull.
const PUBLIC_BUSYBOX: &str = "docker.io/library/busybox:1.36";
/// For a request of a test.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Where the images are, and how those of the operator are tagged.
#[derive(Clone, Debug)]
pub struct Images {
    /// Everything before the image's name, such as `exchange.local`.
    pub prefix: String,
    /// Tag of the operator and of the tests' agent.
    pub tag: String,
}

impl Images {
    /// Those beside the agent's image, which `AGENT_IMAGE` names.
    ///
    /// # Errors
    /// If that is no name of an agent's image with a tag.
    pub fn from_environment() -> Result<Self> {
        let agent =
            std::env::var("AGENT_IMAGE").unwrap_or_else(|_| "exchange.local/testbed-agent:dev".into());
        let (prefix, tag) = agent.rsplit_once("/testbed-agent:").with_context(|| {
            format!("AGENT_IMAGE={agent} should be like ghcr.io/acme/testbed-agent:1.0.0")
        })?;
        Ok(Self {
            prefix: prefix.to_owned(),
            tag: tag.to_owned(),
        })
    }
}

/// Where a chart of the repository is.
pub(crate) fn chart(name: &str) -> String {
    format!("{}/../charts/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// An exchange in a namespace of its own.
#[derive(Debug)]
pub struct Exchange<'a> {
    session: &'a Session,
    namespace: &'a str,
    images: &'a Images,
}

impl<'a> Exchange<'a> {
    /// Installs the stores. The exchange itself comes with the first [`release`](Self::release).
    ///
    /// # Errors
    /// If a store does not become ready.
    pub fn install(session: &'a Session, namespace: &'a str, images: &'a Images) -> Result<Self> {
        session.let_pull(namespace)?;
        let chart = chart("exchange-stores");
        let values = session.stores_values();
        let mut args = vec!["upgrade", "--install", NAME, &chart, "--namespace", namespace];
        args.extend(["--wait", "--timeout", "180s"]);
        args.extend(values.iter().map(String::as_str));
        session
            .helm(&args)
            .with_context(|| session.circumstances(namespace))?;
        Ok(Self {
            session,
            namespace,
            images,
        })
    }

    /// What is declared for a version: one pod per service, gates as short as a test can bear, and no opinion on how fast a
    /// machine is that compiles beside it.
    pub fn declaration(&self, version: &str) -> Value {
        let secret = |store: &str, key: &str| json!({"name": format!("{NAME}-{store}"), "key": key});
        let mut declaration = json!({
            "apiVersion": "exchange.dev/v1alpha1",
            "kind": "ExchangeDeployment",
            "metadata": {"name": NAME},
            "spec": {
                "version": version,
                "image": format!("{}/exchange", self.images.prefix),
                "services": {"user": {"replicas": 1}, "trade": {"replicas": 1}, "notification": {"replicas": 1}},
                "database": {"secretRef": secret("db", "url"), "migrationSecretRef": secret("db", "owner-url")},
                "queue": {"secretRef": secret("queue", "url")},
                "marketData": {"secretRef": secret("redis", "url")},
                "rollout": {
                    "progressDeadline": "3m",
                    "verification": {"duration": "5s", "maxLatencyP99": "20s", "minRequests": 100},
                    "retention": "10m",
                    "drainTimeout": "30s",
                },
            },
        });
        if let Some(name) = self.session.pull_secret() {
            set(
                &mut declaration,
                "/spec/imagePullSecrets",
                json!([{"name": name}]),
            );
        }
        declaration
    }

    /// Declares it, with `kubectl apply`.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn release(&self, declaration: &Value) -> Result<()> {
        self.session.apply(self.namespace, declaration)
    }

    /// Asks for something by annotation: `promote`, `abort`, `rollback`, `retry`, `pause`.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn ask(&self, what: &str, token: &str) -> Result<()> {
        let annotation = format!("exchange.dev/{what}={token}");
        self.session
            .kubectl(&[
                "annotate",
                "exchangedeployment",
                NAME,
                "--namespace",
                self.namespace,
                "--overwrite",
                &annotation,
            ])
            .map(drop)
    }

    /// Watches the ExchangeDeployment from now on. It has to exist.
    ///
    /// # Errors
    /// If `kubectl` cannot be started.
    pub fn watch(&self) -> Result<Watch> {
        let (sender, receiver) = mpsc::channel();
        let object = ["exchangedeployment", NAME, "--namespace", self.namespace];
        let watching = self.session.watch(&object, move |object| {
            let _ = sender.send((Instant::now(), object));
        })?;
        Ok(Watch {
            _watching: watching,
            receiver,
            sightings: Vec::new(),
        })
    }

    /// Makes the user who credits deposits. The exchange has to be live.
    ///
    /// # Errors
    /// If the exchange refuses it.
    pub fn make_treasury(&self) -> Result<()> {
        let drawn = format!("{NAME}-{}", rand::random::<u128>());
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "treasury"},
                            "immutable": true, "stringData": {"password": drawn}});
        // An earlier run may have made it, and may have come to its end before there was a user.
        let password = if self.session.create(self.namespace, &secret)? {
            drawn
        } else {
            let known = self
                .session
                .get(self.namespace, "secret/treasury", "{.data.password}")?;
            String::from_utf8(STANDARD.decode(known)?)?
        };
        let treasury = json!({"email": TREASURY, "password": password, "display_name": "Treasury"});
        // An answer says nothing of whether there was one before.
        let registered = self.api()?.user(Method::POST, "/register", &treasury)?;
        ensure!(
            registered.status == 202,
            "the treasury was not registered: {registered:?}"
        );
        let grant = format!("update users set scopes = '{{treasury}}' where email = '{TREASURY}'");
        let answer = self.sql(&grant)?;
        ensure!(
            answer.trim() == "UPDATE 1",
            "the treasury was not registered: {answer}"
        );
        Ok(())
    }

    /// Runs a statement as the database's superuser.
    ///
    /// # Errors
    /// If PostgreSQL does not run or refuses it.
    pub fn sql(&self, statement: &str) -> Result<String> {
        let pod = format!("{NAME}-postgres-0");
        let args = [
            "exec",
            "--namespace",
            self.namespace,
            &pod,
            "--",
            "psql",
            "--host=/tmp",
            "--username=postgres",
        ];
        let more = [
            "--dbname=exchange",
            "--no-align",
            "--tuples-only",
            "--command",
            statement,
        ];
        self.session.kubectl(&[&args[..], &more[..]].concat())
    }

    /// The pods of a stack that serve.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub fn pods(&self, revision: &str) -> Result<Vec<Pod>> {
        let selector = format!("--selector=exchange.dev/revision={revision},app.kubernetes.io/component");
        let args = [
            "get",
            "pods",
            "--namespace",
            self.namespace,
            &selector,
            "--output=json",
        ];
        let list: Value = serde_json::from_str(&self.session.kubectl(&args)?)?;
        let pods = list.get("items").and_then(Value::as_array);
        Ok(pods.into_iter().flatten().map(Pod::of).collect())
    }

    /// What a pod says of itself on its admin port, through the API server.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn report_of(&self, pod: &Pod) -> Result<PodReport> {
        let (namespace, name) = (self.namespace, &pod.name);
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}:{ADMIN_PORT}/proxy/stack");
        let report = self.session.kubectl(&["get", "--raw", &path])?;
        serde_json::from_str(&report).with_context(|| format!("pod {name} says {report}"))
    }

    /// A client of the public API: of the pods that the live Services point at now.
    ///
    /// # Errors
    /// If there are none.
    pub fn api(&self) -> Result<Api> {
        let tunnel = |service: &str| {
            let name = format!("service/{NAME}-{service}");
            // Who knows an exchange by another name than its own knows an alias, which has no pods.
            let alias = self.session.get(self.namespace, &name, "{.spec.externalName}")?;
            let name = alias
                .split_once('.')
                .map_or(name, |(own, _)| format!("service/{own}"));
            Tunnel::open(self.session, self.namespace, &name, 80)
        };
        // Every client of reqwest has TLS, though this one does not need it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(REQUEST_LIMIT)
            // A tunnel begins on this machine.
            .no_proxy()
            // A connection that is kept would keep a stack from being drained.
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Api {
            user: tunnel("user")?,
            trade: tunnel("trade")?,
            client,
            runtime: Runtime::new()?,
            token: String::new(),
        })
    }

    /// Connects to the stack that has the traffic of a service now, as somebody who asks once, and stays without a word.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn connect(&self, service: &str) -> Result<Connected> {
        let tunnel = Tunnel::open(
            self.session,
            self.namespace,
            &format!("service/{NAME}-{service}"),
            80,
        )?;
        let mut stream = TcpStream::connect(("127.0.0.1", tunnel.port))?;
        stream.set_read_timeout(Some(REQUEST_LIMIT))?;
        stream.write_all(b"GET /version HTTP/1.1\r\nhost: exchange\r\n\r\n")?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        ensure!(
            answer == *b"HTTP/1.1 200",
            "{service} answers {}",
            String::from_utf8_lossy(&answer)
        );
        Ok(Connected {
            _stream: stream,
            _tunnel: tunnel,
        })
    }

    /// Starts clients that trade, at `rate` requests a second, until [`Load::end`]. There has to be a treasury.
    ///
    /// # Errors
    /// If they do not begin to trade.
    pub fn start_load(&self, rate: u32) -> Result<Load<'a>> {
        self.start_clients(rate, 4, 1)
    }

    /// The same with so many connections to each service, of each protocol, of which so many idle for seconds.
    ///
    /// # Errors
    /// If they do not begin to trade.
    pub fn start_clients(&self, rate: u32, connections: u16, idle: u16) -> Result<Load<'a>> {
        let url = |service: &str| format!("http://{NAME}-{service}");
        let args = json!([
            "load",
            "--progress",
            "--json",
            "/dev/stdout",
            "--rate",
            rate.to_string(),
            "--duration",
            "1h",
            "--connections",
            connections.to_string(),
            "--idle-connections",
            idle.to_string(),
            "--streams",
            "4",
            "--user-url",
            url("user"),
            "--trade-url",
            url("trade"),
            "--notification-url",
            url("notification"),
            "--treasury-email",
            TREASURY,
            "--treasury-password-file",
            "/etc/treasury/password",
        ]);
        let image = format!("{}/exchange:1.0.0", self.images.prefix);
        let mut pod = restricted_pod(LOAD, &image);
        set(&mut pod, "/spec/containers/0/args", args);
        // As the owner: the audit reads everything.
        let database = json!({"secretKeyRef": {"name": format!("{NAME}-db"), "key": "owner-url"}});
        let env = json!([{"name": "EXCHANGE_DATABASE_URL", "valueFrom": database}]);
        set(&mut pod, "/spec/containers/0/env", env);
        let mounts = json!([{"name": "treasury", "mountPath": "/etc/treasury", "readOnly": true}]);
        set(&mut pod, "/spec/containers/0/volumeMounts", mounts);
        let volumes = json!([{"name": "treasury", "secret": {"secretName": "treasury"}}]);
        set(&mut pod, "/spec/volumes", volumes);
        // The audit comes after the end.
        set(&mut pod, "/spec/terminationGracePeriodSeconds", json!(240));
        let delete = [
            "delete",
            "pod",
            LOAD,
            "--ignore-not-found",
            "--wait",
            "--namespace",
            self.namespace,
        ];
        self.session.kubectl(&delete)?;
        self.session.apply(self.namespace, &pod)?;
        let started = "jsonpath={.status.containerStatuses[0].started}=true";
        self.session
            .wait(self.namespace, "pod/load", started, Duration::from_mins(1))?;
        let log = Arc::new(Log::default());
        let (session, namespace, reading) =
            (self.session.clone(), self.namespace.to_owned(), Arc::clone(&log));
        let reader = thread::spawn(move || reading.read(&session, &namespace));
        let load = Load {
            session: self.session,
            namespace: self.namespace.to_owned(),
            log,
            reader: Some(reader),
        };
        wait_until("the first requests", Duration::from_mins(1), || {
            load.progress().requests > 0
        })
        .with_context(|| self.session.circumstances(self.namespace))?;
        Ok(load)
    }
}

/// A pod of an exchange.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    /// Its service.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its uid: another pod may have its name.
    pub uid: String,
    /// Its IP address; empty if it has none yet.
    pub address: String,
    /// Whether it serves.
    pub ready: bool,
    /// Whether it is on its way out.
    pub leaving: bool,
    /// When its container, of which it has one, was started, if it runs.
    pub running_since: Option<Timestamp>,
}

impl Pod {
    fn of(object: &Value) -> Self {
        let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
        let mut conditions = conditions.into_iter().flatten();
        Self {
            service: text(object, "/metadata/labels/app.kubernetes.io~1component").to_owned(),
            name: text(object, "/metadata/name").to_owned(),
            uid: text(object, "/metadata/uid").to_owned(),
            address: text(object, "/status/podIP").to_owned(),
            ready: conditions.any(|it| text(it, "/type") == "Ready" && text(it, "/status") == "True"),
            leaving: object.pointer("/metadata/deletionTimestamp").is_some(),
            running_since: text(object, "/status/containerStatuses/0/state/running/startedAt")
                .parse()
                .ok(),
        }
    }
}

/// What a pod says of itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReport {
    /// `Standby`, `Live` or `Draining`.
    pub role: String,
    /// Connections on the public port; an event stream is one.
    pub connections: u64,
    /// Requests on them.
    pub in_flight: u64,
}

/// A connection to a pod on which nothing comes any more, until it is dropped.
#[derive(Debug)]
pub struct Connected {
    // It ends before the way on which it goes.
    _stream: TcpStream,
    _tunnel: Tunnel,
}

/// A client of the public API.
#[derive(Debug)]
pub struct Api {
    user: Tunnel,
    trade: Tunnel,
    client: reqwest::Client,
    runtime: Runtime,
    token: String,
}

/// What the API has answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The stack that has answered.
    pub stack: String,
    /// The body; null if there is none.
    pub body: Value,
}

impl Api {
    /// Asks the user service.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn user(&self, method: Method, path: &str, body: &Value) -> Result<Answer> {
        self.call(&self.user, method, path, body)
    }

    /// Asks the trade service.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn trade(&self, method: Method, path: &str, body: &Value) -> Result<Answer> {
        self.call(&self.trade, method, path, body)
    }

    /// Acts on behalf of this user from now on.
    ///
    /// # Errors
    /// If the user is not known, or the password is another.
    pub fn log_in(&mut self, credentials: &Value) -> Result<()> {
        let answer = self.user(Method::POST, "/login", credentials)?;
        ensure!(answer.status == 200, "no log-in: {answer:?}");
        text(&answer.body, "/access_token").clone_into(&mut self.token);
        Ok(())
    }

    fn call(&self, tunnel: &Tunnel, method: Method, path: &str, body: &Value) -> Result<Answer> {
        let url = format!("http://127.0.0.1:{}{path}", tunnel.port);
        let mut request = self.client.request(method, url);
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        if !body.is_null() {
            request = request.json(body);
        }
        self.runtime.block_on(async {
            let answer = request.send().await?;
            let stack = answer.headers().get(STACK_HEADER);
            let stack = stack.and_then(|stack| stack.to_str().ok()).unwrap_or_default();
            let (stack, status) = (stack.to_owned(), answer.status().as_u16());
            let body = answer.text().await?;
            let body = serde_json::from_str(&body).unwrap_or_default();
            Ok(Answer { status, stack, body })
        })
    }
}

/// The image of pods that need no more than a shell: `BUSYBOX_IMAGE`, or on the test cluster its own, which no other one has.
pub fn busybox_image(session: &Session) -> String {
    let default = if session.cluster.is_some() {
        HELPER_IMAGE
    } else {
        PUBLIC_BUSYBOX
    };
    std::env::var("BUSYBOX_IMAGE").unwrap_or_else(|_| default.into())
}

/// A pod that the Pod Security level "restricted" admits.
pub(crate) fn restricted_pod(name: &str, image: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "IfNotPresent",
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                    "capabilities": {"drop": ["ALL"]}},
            }],
        },
    })
}

/// Sets a field of an object whose parent exists.
pub(crate) fn set(object: &mut Value, pointer: &str, value: Value) {
    if let Some((parent, field)) = pointer.rsplit_once('/')
        && let Some(Value::Object(parent)) = object.pointer_mut(parent)
    {
        parent.insert(field.to_owned(), value);
    }
}

/// What is seen of an ExchangeDeployment as it changes.
#[derive(Debug)]
pub struct Watch {
    _watching: Watching,
    receiver: Receiver<(Instant, Value)>,
    sightings: Vec<(Instant, Value)>,
}

impl Watch {
    /// The next change, if there is one in time.
    ///
    /// # Errors
    /// If the watch has ended.
    pub fn next(&mut self, patience: Duration) -> Result<Option<&(Instant, Value)>> {
        match self.receiver.recv_timeout(patience) {
            Ok(sighting) => {
                self.sightings.push(sighting);
                Ok(self.sightings.last())
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the watch of the ExchangeDeployment has ended"),
        }
    }

    /// Waits until the object is like this, and says when that was seen. The last sighting counts too.
    ///
    /// # Errors
    /// If it does not come true in time: with the last status.
    pub fn until(
        &mut self,
        what: &str,
        patience: Duration,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some((at, object)) = self.sightings.last()
                && holds(object)
            {
                return Ok(*at);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.next(left)?.is_none() {
                let last = self.last().map(|object| &object["status"]);
                return Err(anyhow!(
                    "waited in vain for {what}; status: {:#}",
                    last.unwrap_or(&Value::Null)
                ));
            }
        }
    }

    /// Waits for a phase of a version's release.
    ///
    /// # Errors
    /// If it does not come in time, or the release is given up.
    pub fn until_phase(&mut self, phase: &str, version: &str, patience: Duration) -> Result<Instant> {
        let what = format!("{phase} with {version}");
        let about = |object: &Value| is_current(object) && text(object, "/spec/version") == version;
        let at = self.until(&what, patience, |object| {
            about(object) && (phase_of(object) == phase || is_given_up(object))
        })?;
        let given_up = self.last();
        match given_up.filter(|object| phase_of(object) != phase) {
            Some(object) => bail!(
                "waited in vain for {what}: {:#}",
                object.get("status").unwrap_or(object)
            ),
            None => Ok(at),
        }
    }

    /// Everything seen so far, with when.
    pub fn sightings(&self) -> &[(Instant, Value)] {
        &self.sightings
    }

    /// The object as it was seen last.
    pub fn last(&self) -> Option<&Value> {
        self.sightings.last().map(|(_, object)| object)
    }
}

/// Whether the status is about the spec that it stands beside.
pub fn is_current(object: &Value) -> bool {
    object.pointer("/status/observedGeneration") == object.pointer("/metadata/generation")
}

/// Whether the release has come to an end that was not wanted.
pub fn is_given_up(object: &Value) -> bool {
    matches!(phase_of(object), "Failed" | "Held")
}

/// The phase, or nothing.
pub fn phase_of(object: &Value) -> &str {
    text(object, "/status/phase")
}

/// A text in an object, by JSON pointer; empty if there is none.
pub fn text<'v>(object: &'v Value, pointer: &str) -> &'v str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// `<revision>.<attempt>` of a stack in the status: how requests by annotation name it.
pub fn token(object: &Value, stack: &str) -> String {
    let revision = text(object, &format!("/status/{stack}/revision"));
    let attempt = object.pointer(&format!("/status/{stack}/attempt"));
    format!(
        "{revision}.{}",
        attempt.and_then(Value::as_u64).unwrap_or_default()
    )
}

/// How far a load is.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Progress {
    /// Seconds since its start.
    pub elapsed_s: u64,
    /// Requests that have come to an end.
    pub requests: u64,
    /// Those of them that were not answered with success.
    pub failed: u64,
    /// Connections that were closed under no request without having been announced to end.
    pub closed_without_notice: u64,
    /// Answers of the last second, by stack.
    pub answers: std::collections::BTreeMap<String, u64>,
}

/// What the clients say.
#[derive(Debug, Default)]
struct Log {
    progress: Mutex<Progress>,
    /// Who brings it; nobody yet, or nobody any more.
    child: Mutex<Option<Child>>,
    /// Nobody wants to know the rest.
    left: AtomicBool,
}

impl Log {
    /// Follows it to its end, and returns the report. A kubelet that ends cuts it off: then it is read anew.
    fn read(&self, session: &Session, namespace: &str) -> Vec<String> {
        loop {
            let report = self.follow(session, namespace).unwrap_or_default();
            let there = || session.get(namespace, "pod/load", "{.metadata.name}").is_ok();
            let is_whole = report.last().is_some_and(|line| line == "}");
            if is_whole || self.left.load(Ordering::Relaxed) || !there() {
                return report;
            }
        }
    }

    fn follow(&self, session: &Session, namespace: &str) -> Result<Vec<String>> {
        let mut child = session.follow(&["logs", "--follow", LOAD, "--namespace", namespace])?;
        let output = child.stdout.take().context("no output of `kubectl`")?;
        *locked(&self.child) = Some(child);
        if self.left.load(Ordering::Relaxed) {
            self.leave();
        }
        let mut report = Vec::new();
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(news) => *locked(&self.progress) = news,
                Err(_) => report.push(line),
            }
        }
        self.leave_child();
        Ok(report)
    }

    fn leave(&self) {
        self.left.store(true, Ordering::Relaxed);
        self.leave_child();
    }

    fn leave_child(&self) {
        if let Some(mut child) = locked(&self.child).take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Clients that trade.
#[derive(Debug)]
pub struct Load<'a> {
    session: &'a Session,
    namespace: String,
    log: Arc<Log>,
    reader: Option<JoinHandle<Vec<String>>>,
}

impl Load<'_> {
    /// How far it is.
    pub fn progress(&self) -> Progress {
        locked(&self.log.progress).clone()
    }

    /// Ends it, waits for its audit, and returns its report for people and for machines.
    ///
    /// # Errors
    /// If there is no report.
    pub fn end(mut self) -> Result<(String, Value)> {
        // Told to end, it stops sending, audits and reports; its log can be followed to the last line.
        let delete = [
            "delete",
            "pod",
            LOAD,
            "--wait=false",
            "--namespace",
            &self.namespace,
        ];
        self.session.kubectl(&delete)?;
        let lines = self
            .reader
            .take()
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default();
        let begin = lines.iter().position(|line| line == "{");
        let begin = begin.with_context(|| format!("no report of the load:\n{}", lines.join("\n")))?;
        let (table, report) = lines.split_at(begin);
        let report = serde_json::from_str(&report.join("\n")).context("the load's report is cut off")?;
        Ok((table.join("\n"), report))
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.log.leave();
    }
}
