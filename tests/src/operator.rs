//! The operator on a cluster: installed as a person would, and the one of its pods that leads, to be disturbed.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    exchange::{Images, chart},
    kubectl::Session,
    sandbox::wait_until,
};

/// Where it runs.
pub const OPERATOR_NAMESPACE: &str = "exchange-operator";
/// Names of the chart's release, its ServiceAccount and its Lease.
pub const OPERATOR: &str = "exchange-operator";

/// What Helm says of a release that tests have installed.
const DESCRIPTION: &str = "installed by the end-to-end tests";
/// How long another replica may take to lead: many times a lease.
const PATIENCE: Duration = Duration::from_mins(1);

/// Installs the operator, or brings it to this state. On a cluster that is not ours, one that somebody else has installed
/// is left alone.
///
/// # Errors
/// If it does not become ready, or is somebody else's.
pub fn install(session: &Session, images: &Images) -> Result<()> {
    let status = ["status", OPERATOR, "--namespace", OPERATOR_NAMESPACE];
    if session.cluster.is_none()
        && let Ok(status) = session.helm(&status)
    {
        ensure!(
            status.contains(DESCRIPTION),
            "release {OPERATOR} in namespace {OPERATOR_NAMESPACE} was not installed by these tests, so it is left alone: \
             uninstall it, or use another cluster"
        );
    }
    let repository = format!("image.repository={}/exchange-operator", images.prefix);
    let tag = format!("image.tag={}", images.tag);
    let chart = chart("exchange-operator");
    let installed = session.helm(&[
        "upgrade",
        "--install",
        OPERATOR,
        &chart,
        "--namespace",
        OPERATOR_NAMESPACE,
        "--create-namespace",
        "--set",
        &repository,
        "--set",
        &tag,
        "--description",
        DESCRIPTION,
        "--wait",
        "--timeout",
        "180s",
    ]);
    installed
        .map(drop)
        .with_context(|| session.circumstances(OPERATOR_NAMESPACE))
}

/// It as the API server knows it.
pub fn account() -> String {
    format!("system:serviceaccount:{OPERATOR_NAMESPACE}:{OPERATOR}")
}

/// The pod that leads, as a process of this machine.
#[derive(Debug)]
pub struct Leader<'a> {
    session: &'a Session,
    /// Name of its pod.
    pub pod: String,
    process: Pid,
}

impl<'a> Leader<'a> {
    /// Who leads now.
    ///
    /// # Errors
    /// If nobody does, or its process is not one of this machine's: so it is with `CLUSTER=existing`.
    pub fn find(session: &'a Session) -> Result<Self> {
        let lease = format!("lease/{OPERATOR}");
        let pod = session.get(OPERATOR_NAMESPACE, &lease, "{.spec.holderIdentity}")?;
        let uid = session
            .get(OPERATOR_NAMESPACE, &format!("pod/{pod}"), "{.metadata.uid}")
            .with_context(|| format!("the leader is {pod:?}, which is no pod"))?;
        let process = process_of(&uid)
            .with_context(|| format!("the process of pod {pod} does not run on this machine"))?;
        Ok(Self {
            session,
            pod,
            process,
        })
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

    /// Ends its process as a power failure would. The kubelet starts the container again, the first time at once.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn crash(self) -> Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Ends its process as a power failure would, and replaces its pod, so that the next kill does not find its restarts
    /// delayed.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn kill(self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        let delete = ["delete", "pod", &self.pod, "--namespace", OPERATOR_NAMESPACE];
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
                .get(OPERATOR_NAMESPACE, &lease, "{.spec.holderIdentity}")
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

/// Waits until all replicas are ready again, so that the next disturbance finds what the first one found.
///
/// # Errors
/// If they do not become ready.
pub fn recovers(session: &Session) -> Result<()> {
    let deployment = format!("deployment/{OPERATOR}");
    let status = [
        "rollout",
        "status",
        &deployment,
        "--namespace",
        OPERATOR_NAMESPACE,
    ];
    session
        .kubectl(&[&status[..], &["--timeout=120s"]].concat())
        .map(drop)
}

/// The process of a pod's container whose program is the operator; a pod has one more that only holds its namespaces.
fn process_of(uid: &str) -> Result<Pid> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let is_ours = || read("cgroup").replace('_', "-").contains(uid);
        if read("comm").starts_with("exchange-oper") && is_ours() {
            return Ok(Pid::from_raw(pid));
        }
    }
    bail!("no process is called exchange-operator in its cgroup")
}
