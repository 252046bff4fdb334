//! Process 1 of a cluster: starts every component when its turn has come, starts it again when it dies, keeps
//! its log, and reaps orphans as every process 1 must.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    process::{Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
};
use serde::{Deserialize, Serialize};

use crate::{
    cluster::Cluster,
    components::{Component, all},
    sandbox,
    tools::Tools,
};

/// How long a gate is polled before its state is looked at again.
const POLL: Duration = Duration::from_millis(50);
/// Pauses between restarts of a component that keeps dying.
const BACKOFF: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// A component that has run this long has not "kept dying".
const SETTLED: Duration = Duration::from_secs(20);

/// What is known of one component.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ComponentStatus {
    /// Its process id inside the cluster's namespace; `None` while it does not run.
    pub pid: Option<u32>,
    /// How often it has been started again.
    pub restarts: usize,
    /// How it ended the last time, such as `signal SIGKILL`.
    pub last_exit: Option<String>,
}

/// The states of all components by name, as kept in [`Cluster::status_file`].
pub type Status = HashMap<String, ComponentStatus>;

/// Processes that somebody waits for.
type Waiting = Arc<Mutex<HashMap<i32, mpsc::Sender<String>>>>;

/// Reads what the supervisor last wrote. Empty before it has started anything.
pub fn read_status(cluster: &Cluster) -> Status {
    fs::read_to_string(cluster.status_file())
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default()
}

/// Sends a signal to a component of a cluster.
///
/// # Errors
/// If it does not run.
pub fn signal(cluster: &Cluster, component: &str, signal: Signal) -> Result<()> {
    let process = read_status(cluster).get(component).and_then(|state| state.pid);
    let process = process
        .and_then(|pid| sandbox::host_pid(cluster, pid))
        .with_context(|| format!("{component} does not run"))?;
    kill(process, signal).with_context(|| format!("cannot send {signal} to {component}"))
}

/// Runs the cluster until it is killed.
///
/// # Errors
/// If the sandbox cannot be set up.
pub fn run(cluster: &Cluster) -> Result<()> {
    // Inside, this repository may be hidden.
    let tools = Tools::ensure()?;
    let _lock = sandbox::enter(cluster)?;
    let waiting = Waiting::default();
    let status = Arc::new(Mutex::new(Status::new()));
    for component in all(cluster, &tools)? {
        let (cluster, waiting, status) = (cluster.clone(), Arc::clone(&waiting), Arc::clone(&status));
        thread::spawn(move || keep_running(&cluster, &component, &waiting, &status));
    }
    reap(&waiting)
}

/// Collects every process that ends in this namespace, ours and orphans.
fn reap(waiting: &Waiting) -> Result<()> {
    loop {
        let (pid, how) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit code {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {signal}")),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) => {
                thread::sleep(POLL); // nothing started yet
                continue;
            }
            Err(error) => return Err(error).context("cannot wait for processes"),
        };
        if let Some(sender) = lock(waiting).remove(&pid.as_raw()) {
            let _ = sender.send(how);
        }
    }
}

/// A poisoned lock means that another thread died in the middle of an insert; its data is still good.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn keep_running(cluster: &Cluster, component: &Component, waiting: &Waiting, status: &Mutex<Status>) {
    let mut failures = 0_usize;
    loop {
        while !component.may_start() {
            thread::sleep(POLL);
        }
        let started = Instant::now();
        let how = match start(cluster, component, waiting) {
            Ok((pid, ended)) => {
                record(cluster, status, &component.name, |entry| entry.pid = Some(pid));
                ended.recv().unwrap_or_else(|_| "unknown".into())
            }
            Err(error) => format!("{error:#}"),
        };
        note(cluster, component, &format!("ended: {how}"));
        record(cluster, status, &component.name, |entry| {
            entry.pid = None;
            entry.restarts += 1;
            entry.last_exit = Some(how);
        });
        failures = if started.elapsed() > SETTLED {
            0
        } else {
            failures + 1
        };
        thread::sleep(
            BACKOFF
                .get(failures)
                .or(BACKOFF.last())
                .copied()
                .unwrap_or_default(),
        );
    }
}

fn start(
    cluster: &Cluster,
    component: &Component,
    waiting: &Waiting,
) -> Result<(u32, mpsc::Receiver<String>)> {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(cluster.log_of(&component.name))?;
    let mut command = Command::new(&component.program);
    command
        .args(&component.args)
        .env_clear()
        .envs(component.environment.iter().cloned());
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let (sender, receiver) = mpsc::channel();
    // Held over the start, so that the reaper cannot see the end of a process before we have its id.
    let mut waiting = lock(waiting);
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", component.program.display()))?;
    waiting.insert(child.id().cast_signed(), sender);
    Ok((child.id(), receiver))
}

/// Adds a line of ours to a component's log.
fn note(cluster: &Cluster, component: &Component, text: &str) {
    let now = jiff::Timestamp::try_from(SystemTime::now())
        .map(|now| now.to_string())
        .unwrap_or_default();
    if let Ok(mut log) = fs::OpenOptions::new()
        .append(true)
        .open(cluster.log_of(&component.name))
    {
        let _ = writeln!(log, "--- {now} supervisor: {} {text}", component.name);
    }
}

fn record(cluster: &Cluster, status: &Mutex<Status>, name: &str, change: impl FnOnce(&mut ComponentStatus)) {
    let mut status = lock(status);
    change(status.entry(name.to_owned()).or_default());
    let next = cluster.home().join("status.json.next");
    let text = serde_json::to_string(&*status).unwrap_or_default();
    let _ = fs::write(&next, text).and_then(|()| fs::rename(&next, cluster.status_file()));
}
