//! The operator on a cluster: installed as a person would, and the one of its pods that leads, to be disturbed.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    exchange::{Images, chart},
    kubectl::{Session, processes_of},
    sandbox::wait_until,
};

/// Where the one for all namespaces runs.
pub const OPERATOR_NAMESPACE: &str = "exchange-operator";
/// Names of the chart's release, its ServiceAccount and its Lease.
pub const OPERATOR: &str = "exchange-operator";

/// What Helm says of a release that tests have installed.
const DESCRIPTION: &str = "installed by the end-to-end tests";
/// Its program's name, as far as the kernel keeps it.
const PROCESS: &str = "exchange-oper";
/// How long another replica may take to lead: many times a lease.
const PATIENCE: Duration = Duration::from_mins(1);

/// Who has installed an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installer {
    /// The tests, or the demonstration.
    Us,
    /// Somebody who is not to be disturbed.
    SomebodyElse,
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

    /// Installs it, or brings it to this state. On a cluster that is not ours, one that somebody else has installed is left
    /// alone.
    ///
    /// # Errors
    /// If it does not become ready, or is somebody else's.
    pub fn install(&self, session: &Session, images: &Images) -> Result<()> {
        ensure!(
            session.cluster.is_some() || self.installed_by(session) != Some(Installer::SomebodyElse),
            "release {OPERATOR} in namespace {} was not installed by these tests, so it is left alone: \
             uninstall it, or use another cluster",
            self.namespace
        );
        let repository = format!("image.repository={}/exchange-operator", images.prefix);
        let tag = format!("image.tag={}", images.tag);
        let chart = chart("exchange-operator");
        let mut args = vec!["upgrade", "--install", OPERATOR, &chart];
        args.extend(["--namespace", &self.namespace, "--create-namespace"]);
        args.extend(["--description", DESCRIPTION]);
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
        let installed = session.helm(&args);
        installed
            .map(drop)
            .with_context(|| session.circumstances(&self.namespace))
    }

    /// Who has installed what is there, if it is there.
    #[must_use]
    pub fn installed_by(&self, session: &Session) -> Option<Installer> {
        let status = session.helm(&["status", OPERATOR, "--namespace", &self.namespace]);
        status.ok().map(|status| {
            if status.contains(DESCRIPTION) {
                Installer::Us
            } else {
                Installer::SomebodyElse
            }
        })
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
        let deployment = format!("deployment/{OPERATOR}");
        let status = ["rollout", "status", &deployment, "--namespace", &self.namespace];
        session
            .kubectl(&[&status[..], &["--timeout=120s"]].concat())
            .map(drop)
    }
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

    /// Ends its process as if its node had failed. The kubelet starts the container again, the first time at once.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn crash(self) -> Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Ends its process as if its node had failed, and replaces its pod, so that the next kill does not find its restarts
    /// delayed.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn kill(self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let delete = ["delete", "pod", &self.pod, "--namespace", &self.namespace];
        let now = ["--grace-period=0", "--force"];
        self.session.kubectl(&[&delete[..], &now[..]].concat()).map(drop)
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
