//! The operator on a cluster: installed as a person would, and the one of its pods that leads, to be disturbed.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    exchange::{Images, chart, text},
    kubectl::{Session, processes_of},
    sandbox::wait_until,
};

/// Where the one for all namespaces runs.
pub const OPERATOR_NAMESPACE: &str = "exchange-operator";
/// Names of the chart's release, its ServiceAccount and its Lease.
pub const OPERATOR: &str = "exchange-operator";

/// Annotation of its pods that says who has installed it: the tests, or the demonstration. It is one of the values of the
/// chart's release, so that whoever upgrades that with values of their own takes it away, and with it our claim.
pub(crate) const INSTALLED_BY: &str = "exchange.dev/installed-by";
/// How the tests sign.
const TESTS: &str = "tests";
/// Its program's name, as far as the kernel keeps it.
const PROCESS: &str = "exchange-oper";
/// How long another replica may take to lead: many times a lease.
const PATIENCE: Duration = Duration::from_mins(1);

/// Who has installed an object, as it says at this pointer to metadata. Empty if it does not say.
pub(crate) fn signature<'a>(object: &'a Value, metadata: &str) -> &'a str {
    let annotation = INSTALLED_BY.replace('/', "~1");
    text(object, &format!("{metadata}/annotations/{annotation}"))
}

/// An operator as it is found on a cluster, whatever its release is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it runs.
    pub namespace: String,
    /// Name of its Deployment.
    pub name: String,
    /// The only namespace that it looks after; `None` if it looks after all.
    pub only: Option<String>,
    /// How whoever installed it has signed; empty if that was neither the tests nor the demonstration.
    pub installed_by: String,
}

impl Found {
    /// All operators of a cluster, but for those that are being deleted.
    ///
    /// # Errors
    /// If the API server does not list them.
    pub fn on(session: &Session) -> Result<Vec<Self>> {
        let ours = format!("--selector=app.kubernetes.io/name={OPERATOR}");
        let list = ["get", "deployments", "--all-namespaces", &ours, "--output=json"];
        let list: Value = serde_json::from_str(&session.kubectl(&list)?)?;
        let deployments = list.get("items").and_then(Value::as_array);
        let stays = |it: &&Value| it.pointer("/metadata/deletionTimestamp").is_none();
        Ok(deployments
            .into_iter()
            .flatten()
            .filter(stays)
            .map(Self::of)
            .collect())
    }

    fn of(deployment: &Value) -> Self {
        let environment = deployment.pointer("/spec/template/spec/containers/0/env");
        let mut environment = environment.and_then(Value::as_array).into_iter().flatten();
        let only = environment.find(|it| text(it, "/name") == "EXCHANGE_OPERATOR_NAMESPACE");
        Self {
            namespace: text(deployment, "/metadata/namespace").to_owned(),
            name: text(deployment, "/metadata/name").to_owned(),
            only: only.map(|it| text(it, "/value").to_owned()),
            installed_by: signature(deployment, "/spec/template/metadata").to_owned(),
        }
    }

    /// Waits until all its replicas are ready.
    ///
    /// # Errors
    /// If they do not become ready.
    pub fn is_ready(&self, session: &Session) -> Result<()> {
        rolled_out(session, &self.namespace, &self.name)
    }
}

/// An installation of the operator.
#[derive(Clone, Debug)]
pub struct Operator {
    /// Where it runs.
    namespace: String,
    /// Whether it looks after the exchanges of that namespace only.
    of_one: bool,
}

impl Operator {
    /// The one that looks after all namespaces.
    pub fn of_all() -> Self {
        Self {
            namespace: OPERATOR_NAMESPACE.to_owned(),
            of_one: false,
        }
    }

    /// One that runs in a namespace and looks after its exchanges: several work side by side, if there is none
    /// [of all](Self::of_all).
    pub fn of(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            of_one: true,
        }
    }

    /// Installs it for the tests, or brings it to this state. On a cluster that is not ours, one that somebody else has
    /// installed is left alone.
    ///
    /// # Errors
    /// If it does not become ready, or is somebody else's.
    pub fn install(&self, session: &Session, images: &Images) -> Result<()> {
        if session.cluster.is_none() {
            let mut found = Found::on(session)?.into_iter();
            ensure!(
                !found.any(|it| it.namespace == self.namespace && it.installed_by.is_empty()),
                "the operator in namespace {} was not installed by these tests, so it is left alone: uninstall it, or use \
                 another cluster",
                self.namespace
            );
        }
        self.install_as(TESTS, session, images)
    }

    /// Installs it, or brings it to this state, and signs.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn install_as(&self, installer: &str, session: &Session, images: &Images) -> Result<()> {
        if session.pull_secret().is_some() {
            let object =
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}});
            session.apply(&self.namespace, &object)?;
            session.let_pull(&self.namespace)?;
        }
        let values = values(installer, session);
        let repository = format!("image.repository={}/exchange-operator", images.prefix);
        let tag = format!("image.tag={}", images.tag);
        let chart = chart("exchange-operator");
        let mut args = vec!["upgrade", "--install", OPERATOR, &chart];
        args.extend(["--namespace", &self.namespace, "--create-namespace"]);
        args.extend(values.iter().map(String::as_str));
        args.extend(["--set", &repository, "--set", &tag, "--wait", "--timeout", "180s"]);
        let loaded;
        if session.cluster.is_some() {
            // The tag is always the same: pods of an image that was loaded earlier would go on.
            let image = format!("{}/{OPERATOR}:{}", images.prefix, images.tag);
            loaded = format!("podAnnotations.image={}", session.digest_of(&image)?);
            args.extend(["--set-string", &loaded]);
        }
        // What belongs to the whole cluster is there once.
        let one = format!(
            "watchNamespace={},crds.install=false,admissionPolicy.install=false,userRoles.install=false",
            self.namespace
        );
        if self.of_one {
            args.extend(["--set", &one]);
        }
        let done = session.helm(&args);
        done.map(drop)
            .with_context(|| session.circumstances(&self.namespace))
    }

    /// Removes it. The CustomResourceDefinition stays, and all exchanges with it.
    ///
    /// # Errors
    /// If it does not end.
    pub fn uninstall(&self, session: &Session) -> Result<()> {
        // Helm takes the rights first: what still works then is refused, and would look like a right that the chart forgot.
        let namespace = ["--namespace", &self.namespace];
        let scale = ["scale", "deployment", OPERATOR, "--replicas=0"];
        session.kubectl(&[&scale[..], &namespace].concat())?;
        let selector = format!("--selector=app.kubernetes.io/instance={OPERATOR}");
        let wait = ["wait", "pods", "--for=delete", &selector, "--timeout=120s"];
        session.kubectl(&[&wait[..], &namespace].concat())?;
        session
            .helm(&[&["uninstall", OPERATOR, "--wait"][..], &namespace].concat())
            .map(drop)
    }

    /// It as the API server knows it.
    pub fn account(&self) -> String {
        format!("system:serviceaccount:{}:{OPERATOR}", self.namespace)
    }

    /// The pod that leads.
    ///
    /// # Errors
    /// If none does, or its process is not one of this machine's: so it is with `CLUSTER=existing`.
    pub fn leader<'a>(&self, session: &'a Session) -> Result<Leader<'a>> {
        let namespace = self.namespace.clone();
        let lease = format!("lease/{OPERATOR}");
        let pod = session.get(&namespace, &lease, "{.spec.holderIdentity}")?;
        let uid = session
            .get(&namespace, &format!("pod/{pod}"), "{.metadata.uid}")
            .with_context(|| format!("the leader is {pod:?}, which is no pod"))?;
        let process = processes_of(&uid, PROCESS)?.into_iter().next();
        let process =
            process.with_context(|| format!("the process of pod {pod} does not run on this machine"))?;
        Ok(Leader {
            session,
            namespace,
            pod,
            process,
        })
    }

    /// Waits until all replicas are ready again, so that the next disturbance finds what the first one found.
    ///
    /// # Errors
    /// If they do not become ready.
    pub fn recovers(&self, session: &Session) -> Result<()> {
        rolled_out(session, &self.namespace, OPERATOR)
    }
}

/// What whoever upgrades an installation of the tests has to say again, as arguments of helm, which keeps nothing that was said
/// before: their signature, without which the next test takes it for somebody else's, and how its image is pulled.
pub fn values_of_tests(session: &Session) -> Vec<String> {
    values(TESTS, session)
}

fn values(installer: &str, session: &Session) -> Vec<String> {
    let signed = format!("podAnnotations.{}={installer}", INSTALLED_BY.replace('.', "\\."));
    let mut values = vec!["--set-string".to_owned(), signed];
    if let Some(secret) = session.pull_secret() {
        values.extend(["--set".to_owned(), format!("imagePullSecrets[0].name={secret}")]);
    }
    values
}

fn rolled_out(session: &Session, namespace: &str, name: &str) -> Result<()> {
    let deployment = format!("deployment/{name}");
    let status = ["rollout", "status", &deployment, "--namespace", namespace];
    session
        .kubectl(&[&status[..], &["--timeout=120s"]].concat())
        .map(drop)
}

/// Installs the operator [of all](Operator::of_all) namespaces.
///
/// # Errors
/// If it does not become ready, or is somebody else's.
pub fn install(session: &Session, images: &Images) -> Result<()> {
    Operator::of_all().install(session, images)
}

/// It as the API server knows it.
pub fn account() -> String {
    Operator::of_all().account()
}

/// Waits until all its replicas are ready again.
///
/// # Errors
/// If they do not become ready.
pub fn recovers(session: &Session) -> Result<()> {
    Operator::of_all().recovers(session)
}

/// The pod that leads, as a process of this machine.
#[derive(Debug)]
pub struct Leader<'a> {
    session: &'a Session,
    namespace: String,
    /// Name of its pod.
    pub pod: String,
    process: Pid,
}

impl<'a> Leader<'a> {
    /// Who leads of the operator of all namespaces.
    ///
    /// # Errors
    /// If nobody does, or its process is not one of this machine's: so it is with `CLUSTER=existing`.
    pub fn find(session: &'a Session) -> Result<Self> {
        Operator::of_all().leader(session)
    }

    /// Stops it in what it does. It does not know that time goes by.
    ///
    /// # Errors
    /// If it has ended.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on where it was stopped.
    ///
    /// # Errors
    /// If it has ended.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Whether its process is gone.
    pub fn has_ended(&self) -> bool {
        kill(self.process, None).is_err()
    }

    /// Ends its process as if its node had failed. The kubelet starts the container again, the first time at once.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn crash(self) -> Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Ends its process as if its node had failed, and replaces its pod, so that the next kill does not find its restarts
    /// delayed. Returns when the process was killed.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn kill(self) -> Result<Timestamp> {
        self.signal(Signal::SIGKILL)?;
        let killed = Timestamp::now();
        let delete = ["delete", "pod", &self.pod, "--namespace", &self.namespace];
        let now = ["--grace-period=0", "--force"];
        self.session.kubectl(&[&delete[..], &now[..]].concat())?;
        Ok(killed)
    }

    /// Waits until another pod leads.
    ///
    /// # Errors
    /// If none does within a minute.
    pub fn is_succeeded(&self) -> Result<()> {
        let lease = format!("lease/{OPERATOR}");
        wait_until("another leader", PATIENCE, || {
            self.session
                .get(&self.namespace, &lease, "{.spec.holderIdentity}")
                .is_ok_and(|holder| !holder.is_empty() && holder != self.pod)
        })
    }

    /// Its memory in KiB: what it has now, and the most it ever had.
    ///
    /// # Errors
    /// If it has ended.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
            value.with_context(|| format!("no {name} of pod {}", self.pod))
        };
        Ok((field("VmRSS")?, field("VmHWM")?))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.process, signal).with_context(|| format!("cannot send {signal} to pod {}", self.pod))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_tells_what_it_looks_after_and_who_has_installed_it() {
        let deployment = |environment: Value, annotations: Value| {
            json!({"metadata": {"namespace": "platform", "name": "blue-exchange-operator"},
                   "spec": {"template": {"metadata": {"annotations": annotations},
                                         "spec": {"containers": [{"env": environment}]}}}})
        };
        let found = |only: Option<&str>, installed_by: &str| Found {
            namespace: "platform".to_owned(),
            name: "blue-exchange-operator".to_owned(),
            only: only.map(str::to_owned),
            installed_by: installed_by.to_owned(),
        };
        let log = json!({"name": "RUST_LOG", "value": "info"});
        let of_all = deployment(json!([log]), Value::Null);
        assert_eq!(Found::of(&of_all), found(None, ""));
        let only = json!({"name": "EXCHANGE_OPERATOR_NAMESPACE", "value": "prod"});
        let of_one = deployment(json!([log, only]), json!({"exchange.dev/installed-by": "demo"}));
        assert_eq!(Found::of(&of_one), found(Some("prod"), "demo"));
    }
}
