//! One run at a time for each cluster: tests make and delete namespaces of fixed names, and a run may end with the cluster.

use std::{
    env, fs,
    io::Write,
    os::unix::{
        fs::{MetadataExt, OpenOptionsExt},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{self, ExitCode},
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use nix::{
    libc::O_NOFOLLOW,
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::cluster::{Cluster, NAME_MAX};

/// Where runs say which cluster they have: in the same place whatever cache they use.
const RUNS: &str = "/var/tmp";
/// Tells whatever a run starts which cluster it has.
const ALONE: &str = "TESTBED_ALONE";

/// Runs a command while no other command, so run, uses the cluster; what it runs itself in this way is a part of it. The exit
/// code is the command's.
///
/// # Errors
/// If another run has the cluster: with its process id, its beginning, and the way out.
pub fn run(cluster: &Cluster, command: &[String]) -> Result<ExitCode> {
    let is_part = env::var(ALONE).is_ok_and(|name| name == cluster.name());
    let _lock = if is_part {
        None
    } else {
        Some(reserve(cluster, &command.join(" "))?)
    };
    end_of(cluster, command)
}

/// A cluster that is a run's alone, until this is dropped.
struct Reserved {
    _lock: fs::File,
    path: PathBuf,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Still locked: nobody else has this file.
        let _ = fs::remove_file(&self.path);
    }
}

fn reserve(cluster: &Cluster, command: &str) -> Result<Reserved> {
    let name = format!(".exchange-testbed-run-{}-{}", geteuid(), cluster.hash());
    let path = Path::new(RUNS).join(name);
    let mut lock = loop {
        let opened = fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(O_NOFOLLOW)
            .open(&path);
        let lock = opened.with_context(|| format!("cannot open {}", path.display()))?;
        if lock.try_lock().is_err() {
            bail!(refusal(cluster, &path));
        }
        // The run before may have removed it in between.
        let number = lock.metadata()?.ino();
        if fs::symlink_metadata(&path).is_ok_and(|there| there.ino() == number) {
            break lock;
        }
    };
    lock.set_len(0)?;
    write!(
        lock,
        "process {}, since {}, `{command}` in {}",
        process::id(),
        Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC"),
        env::current_dir()?.display()
    )
    .with_context(|| format!("cannot write to {}", path.display()))?;
    Ok(Reserved { _lock: lock, path })
}

fn refusal(cluster: &Cluster, lock: &Path) -> String {
    let name = cluster.name();
    let other: String = name.chars().take(NAME_MAX - 2).collect();
    format!(
        "another run uses the cluster {name:?} now: {}. Wait for its end, or give this run a cluster of its own: \
         NAME={other}-2",
        fs::read_to_string(lock).unwrap_or_default()
    )
}

#[tokio::main(flavor = "current_thread")]
async fn end_of(cluster: &Cluster, command: &[String]) -> Result<ExitCode> {
    let (program, args) = command.split_first().context("no command")?;
    // We outlive the command whatever comes, since it may still use the cluster while it ends. Ctrl-C is for everything in the
    // terminal, and so for the command, too.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut child = Command::new(program)
        .args(args)
        .env(ALONE, cluster.name())
        .spawn()
        .with_context(|| format!("cannot start `{program}`"))?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => pass_on(&child, Signal::SIGTERM),
            _ = hang_up.recv() => pass_on(&child, Signal::SIGHUP),
        }
    };
    // As a shell says it.
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    let code = code.and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// It may have ended by itself.
fn pass_on(child: &Child, signal: Signal) {
    if let Some(pid) = child.id() {
        let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
    }
}
