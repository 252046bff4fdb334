//! A gate before the API server's store: it sees each write of the operator in a namespace, and can hold one until a test
//! has decided what becomes of it. An admission webhook, so that nothing of the operator has to know.
//!
//! The gate's server is the tests' agent, in a pod; the tests speak with it through a tunnel.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    exchange::{Images, restricted_pod, set},
    kubectl::Session,
    operator::Operator,
    sandbox::wait_until,
    tunnel::Tunnel,
};

/// Name of the pod, its Service and its Secret.
const NAME: &str = "gate";
/// Where the API server asks.
pub const ADMISSION_PORT: u16 = 8443;
/// Where the tests ask, on the pod's loopback interface: nobody else in the cluster can.
pub const CONTROL_PORT: u16 = 8080;
/// Where the pod finds its certificate and key.
pub const TLS_DIRECTORY: &str = "/etc/gate";
/// How long something may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the API server takes, at most but for exceptions, from the test's decision about a write to its answer.
const A_WRITE: Duration = Duration::from_millis(12);

/// A write of the operator, as the API server tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// `create`, `update` or `delete`; a patch is an update.
    pub verb: String,
    /// Plural, with the subresource: `services`, `exchangedeployments/status`.
    pub resource: String,
    /// Of the object.
    pub name: String,
}

impl Write {
    /// What it is without what is another one in each release: colours, revisions, numbers.
    #[must_use]
    pub fn sort(&self) -> String {
        let parts = self.name.split(['-', '.']);
        let lasts =
            |part: &&str| !["blue", "green"].contains(part) && !part.contains(|it: char| it.is_ascii_digit());
        let name: Vec<&str> = parts.filter(lasts).collect();
        format!("{} {} {}", self.verb, self.resource, name.join("-"))
    }
}

impl fmt::Display for Write {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {} {}", self.verb, self.resource, self.name)
    }
}

/// Which write is to be held.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Hold {
    /// Only writes count whose text begins like this, such as `update services`,
    pub of: String,
    /// and of these only those of objects whose name contains this,
    pub name: String,
    /// and those of this [sort](Write::sort), if it is given.
    pub sort: Option<String>,
    /// The first is 0.
    pub number: usize,
}

impl Hold {
    /// The first write of this kind to an object whose name contains this.
    #[must_use]
    pub fn first(of: &str, name: &str) -> Self {
        Self {
            of: of.to_owned(),
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// Whether this write counts.
    #[must_use]
    pub fn counts(&self, write: &Write) -> bool {
        write.to_string().starts_with(&self.of)
            && write.name.contains(&self.name)
            && self.sort.as_ref().is_none_or(|sort| *sort == write.sort())
    }
}

/// What the gate has seen since it was last told what to hold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// In their order.
    pub writes: Vec<Write>,
    /// The one of them that is being held, also when its writer tries it again.
    pub held: Option<Write>,
}

/// When, seen from a held write, the operator is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The write is never done.
    Before,
    /// Killed in one of the milliseconds after the test has let it through: the API server may be at it, or done with it, and
    /// the operator may or may not have heard.
    During,
    /// The write is done, and the operator never hears of it.
    After,
}

impl Moment {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];
}

/// The gate of a namespace. Open again when it is dropped.
#[derive(Debug)]
pub struct Gate<'a> {
    session: &'a Session,
    namespace: String,
    operator: Operator,
    tunnel: Mutex<Tunnel>,
    client: reqwest::Client,
    runtime: Runtime,
}

impl<'a> Gate<'a> {
    /// Puts a gate before all that the operator of all namespaces writes in this one. It lets everything through until
    /// told to [`hold`](Self::hold).
    ///
    /// # Errors
    /// If the API server does not ask it within some seconds.
    pub fn before(session: &'a Session, images: &Images, namespace: &str) -> Result<Self> {
        Self::before_this(Operator::of_all(), session, images, namespace)
    }

    /// The same before what this operator writes.
    ///
    /// # Errors
    /// If the API server does not ask it within some seconds.
    pub fn before_this(
        operator: Operator,
        session: &'a Session,
        images: &Images,
        namespace: &str,
    ) -> Result<Self> {
        let name = format!("{NAME}.{namespace}.svc");
        let identity = rcgen::generate_simple_self_signed(vec![name])?;
        let certificate = identity.cert.pem();
        let files = json!({"tls.crt": certificate, "tls.key": identity.signing_key.serialize_pem()});
        let secret =
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME}, "stringData": files});
        session.apply(namespace, &secret)?;

        let image = format!("{}/testbed-agent:{}", images.prefix, images.tag);
        let mut pod = restricted_pod(NAME, &image);
        set(&mut pod, "/spec/containers/0/args", json!(["gate"]));
        let probe = json!({"tcpSocket": {"port": ADMISSION_PORT}, "periodSeconds": 1});
        set(&mut pod, "/spec/containers/0/readinessProbe", probe);
        let mounts = json!([{"name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": true}]);
        set(&mut pod, "/spec/containers/0/volumeMounts", mounts);
        set(
            &mut pod,
            "/spec/volumes",
            json!([{"name": "tls", "secret": {"secretName": NAME}}]),
        );
        session.apply(namespace, &pod)?;
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME},
            "spec": {"selector": {"app": NAME}, "ports": [{"port": 443, "targetPort": ADMISSION_PORT}]}});
        session.apply(namespace, &service)?;
        session.wait(namespace, &format!("pod/{NAME}"), "condition=Ready", PATIENCE)?;

        // Every client of reqwest has TLS, though this one does not need it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let gate = Self {
            session,
            namespace: namespace.to_owned(),
            operator,
            tunnel: Mutex::new(tunnel(session, namespace)?),
            // A tunnel begins on this machine.
            client: reqwest::Client::builder().timeout(PATIENCE).no_proxy().build()?,
            runtime: Runtime::new()?,
        };
        session.apply(namespace, &gate.webhook(&certificate))?;
        // The API server hears of a new webhook after a moment: asked in the operator's name, changing nothing.
        let account = format!("--as={}", gate.operator.account());
        let probe = [
            "create",
            "configmap",
            "probe",
            "--dry-run=server",
            "--namespace",
            namespace,
            &account,
        ];
        wait_until("the API server to ask the gate", PATIENCE, || {
            session.kubectl(&probe).is_ok() && gate.seen().is_ok_and(|seen| !seen.writes.is_empty())
        })?;
        gate.record()?;
        Ok(gate)
    }

    fn webhook(&self, certificate: &str) -> Value {
        let condition = |name: &str, expression: &str| json!({"name": name, "expression": expression});
        json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": self.webhook_name()},
            "webhooks": [{
                "name": "gate.exchange.dev",
                "clientConfig": {"caBundle": STANDARD.encode(certificate),
                                 "service": {"name": NAME, "namespace": self.namespace}},
                "rules": [{"apiGroups": ["*"], "apiVersions": ["*"], "resources": ["*/*"], "scope": "Namespaced",
                           "operations": ["CREATE", "UPDATE", "DELETE"]}],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}},
                // Events tell of what is done; nothing depends on them. A Lease says who works.
                "matchConditions": [
                    condition("operator", &format!("request.userInfo.username == '{}'", self.operator.account())),
                    condition("no-event", "!(request.resource.resource in ['events', 'leases'])"),
                ],
                "sideEffects": "NoneOnDryRun",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 30,
                "failurePolicy": "Ignore",
            }],
        })
    }

    fn webhook_name(&self) -> String {
        format!("{NAME}-{}", self.namespace)
    }

    /// Forgets what it has seen, and records anew, holding nothing.
    ///
    /// # Errors
    /// If the gate does not answer.
    pub fn record(&self) -> Result<()> {
        self.ask("hold", &Value::Null).map(drop)
    }

    /// The same, and holds a write when it comes, until it is [decided](Self::decide) about: whoever gives it up and tries it
    /// again is held as well.
    ///
    /// # Errors
    /// If the gate does not answer.
    pub fn hold(&self, hold: &Hold) -> Result<()> {
        self.ask("hold", &json!(hold)).map(drop)
    }

    /// What it has seen since then.
    ///
    /// # Errors
    /// If the gate does not answer.
    pub fn seen(&self) -> Result<Seen> {
        let answer = self.ask("seen", &Value::Null)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// The write that is being held, if its time has come.
    ///
    /// # Errors
    /// If the gate does not answer.
    pub fn held(&self) -> Result<Option<Write>> {
        Ok(self.seen()?.held)
    }

    /// Waits until the write is held that was asked for.
    ///
    /// # Errors
    /// If it does not come in time: with the writes that came.
    pub fn until_held(&self, patience: Duration) -> Result<Write> {
        let mut held = None;
        let waited = wait_until("the write to hold", patience, || {
            held = self.held().ok().flatten();
            held.is_some()
        });
        match held {
            Some(write) => Ok(write),
            None => waited
                .with_context(|| format!("{:?}", self.seen()))
                .and_then(|()| bail!("it is gone")),
        }
    }

    /// Decides about the write that is held. From now on everything is let through.
    ///
    /// # Errors
    /// If none is held.
    pub fn decide(&self, allowed: bool) -> Result<()> {
        self.ask("decide", &json!(allowed)).map(drop)
    }

    /// Kills the leader at the write that it is held at. Returns when.
    ///
    /// # Errors
    /// If it cannot be found or killed, or the write is not done that should be.
    pub fn kill_leader(&self, write: &Write, moment: Moment) -> Result<Timestamp> {
        let leader = self.operator.leader(self.session)?;
        match moment {
            Moment::Before => {
                let killed = leader.kill()?;
                self.decide(false)?;
                Ok(killed)
            }
            Moment::During => {
                // Nobody tells how far the API server is: over many kills every moment comes.
                let within = rand::random_range(Duration::ZERO..A_WRITE);
                thread::scope(|scope| {
                    let kill = scope.spawn(|| {
                        thread::sleep(within);
                        leader.kill()
                    });
                    let decided = self.decide(true);
                    let killed = kill.join().map_err(|_| anyhow!("the kill has panicked"))?;
                    decided.and(killed)
                })
            }
            Moment::After => {
                leader.stop()?;
                self.carry_out(write)?;
                leader.kill()
            }
        }
    }

    /// Allows the write that is held, and waits until it is done.
    ///
    /// # Errors
    /// If nothing changes.
    pub fn carry_out(&self, write: &Write) -> Result<()> {
        let (resource, _) = write.resource.split_once('/').unwrap_or((&write.resource, ""));
        let object = format!("{resource}/{}", write.name);
        let version = || {
            self.session
                .get(
                    &self.namespace,
                    &object,
                    "{.metadata.uid} {.metadata.resourceVersion}",
                )
                .ok()
        };
        let before = version();
        self.decide(true)?;
        wait_until(&format!("{write} to be done"), PATIENCE, || version() != before)
    }

    /// Asks once more where the way is gone: a kubelet that ends takes it along.
    fn ask(&self, what: &str, body: &Value) -> Result<String> {
        let mut tunnel = self.tunnel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok((status, answer)) = self.send(&tunnel, what, body) {
            ensure!(status.is_success(), "the gate says {status}: {answer}");
            return Ok(answer);
        }
        let mut answered = Err(anyhow!("there is no way to the gate"));
        wait_until("the gate to answer", PATIENCE, || {
            answered = self::tunnel(self.session, &self.namespace).and_then(|opened| {
                *tunnel = opened;
                self.send(&tunnel, what, body)
            });
            answered.is_ok()
        })?;
        let (status, answer) = answered?;
        ensure!(status.is_success(), "the gate says {status}: {answer}");
        Ok(answer)
    }

    fn send(&self, tunnel: &Tunnel, what: &str, body: &Value) -> Result<(StatusCode, String)> {
        let url = format!("http://127.0.0.1:{}/{what}", tunnel.port);
        let request = self
            .client
            .post(url)
            .header("content-type", "application/json")
            .body(body.to_string());
        self.runtime.block_on(async {
            let answer = request.send().await?;
            Ok((answer.status(), answer.text().await?))
        })
    }
}

/// The way to the gate's control port.
fn tunnel(session: &Session, namespace: &str) -> Result<Tunnel> {
    Tunnel::open(session, namespace, &format!("pod/{NAME}"), CONTROL_PORT)
}

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        let webhook = self.webhook_name();
        let _ = self.session.kubectl(&[
            "delete",
            "validatingwebhookconfiguration",
            &webhook,
            "--ignore-not-found",
        ]);
        let _ = self.decide(true);
        let pod = [
            "delete",
            "pod",
            NAME,
            "--ignore-not-found",
            "--wait=false",
            "--namespace",
            &self.namespace,
        ];
        let _ = self.session.kubectl(&pod);
    }
}
