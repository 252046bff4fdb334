//! The namespaces a cluster lives in, and their end.
//!
//! A cluster's supervisor is process 1 of a process namespace, so the kernel kills every component, shim and
//! container with it; its mounts are in a mount namespace of their own and vanish with the last process; its
//! network has one veth to the host and no default route. What the kernel does not clean up is little: the veth
//! (at once, by us), the cgroups of the pods, the files below the cluster's home.

use std::{
    env, fs,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::{Pid, dup2_stdin, setsid},
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::{
    cluster::{self, Cluster, Link, SERVICE_CIDR},
    progress::Step,
};

/// Directories inside the cluster that are its own, with the name of the directory that stands for each.
const REPLACED: [(&str, &str); 3] = [("lib", "/var/lib"), ("log", "/var/log"), ("run", "/run")];

/// What else is not the machine's inside a cluster.
const OWN_ANYWAY: [&str; 3] = ["/proc", "/sys", "/dev"];

/// What a kubelet limits pods by, and does not start without.
pub(crate) const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

/// Kernel settings that a kubelet insists on, with the values that it wants.
const KUBELET_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// What waits for the disk.
const SYNCS: [libc::c_long; 5] = [
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
];

/// Runs what follows as process 1 of a process namespace, and kills it when this one is killed.
const UNSHARE: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];

/// How long the kernel may take to end the processes of a cluster, the supervisor to see its link, …
const PATIENCE: Duration = Duration::from_secs(20);

/// `PATH`, and where an administrator's programs are: not everybody who becomes root has those in it.
pub(crate) fn search_path() -> String {
    let path = env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into());
    path + ":/usr/sbin:/sbin"
}

/// Runs a host command and returns its output.
///
/// # Errors
/// If it cannot be started or fails; its error output is part of the error.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .env("PATH", search_path())
        .output()
        .with_context(|| format!("cannot start `{program}`"))?;
    ensure!(
        output.status.success(),
        "`{program} {}` failed: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A long-running command that ends, with every process it has started, when this one does: nobody would wait for what
/// it makes, and it would run beside the next one.
pub fn bound(program: &str) -> Command {
    // As process 1 of a namespace it takes the others with it. Not everybody can make one, and building needs no more.
    static NAMESPACE: LazyLock<bool> =
        LazyLock::new(|| run(UNSHARE[0], &[&UNSHARE[1..], &["true"]].concat()).is_ok());
    let mut command = Command::new("setpriv");
    command.arg("--pdeathsig=KILL");
    if *NAMESPACE {
        command.args(UNSHARE);
    }
    command.arg(program);
    command
}

/// The directory that hides a path from the processes of a cluster, if one does.
pub fn hidden_by(path: &Path) -> Option<&'static str> {
    let there = path.ancestors().find_map(|part| {
        let real = part.canonicalize().ok()?;
        Some(real.join(path.strip_prefix(part).ok()?))
    });
    let real = there.unwrap_or_else(|| path.to_owned());
    let mut directories = REPLACED.iter().map(|(_, directory)| *directory).chain(OWN_ANYWAY);
    directories.find(|directory| real.starts_with(directory))
}

/// Polls until the condition holds, with a pause of at least four times as long as a look takes: what is looked at runs on
/// the same machine.
///
/// # Errors
/// If it does not within the given time.
pub fn wait_until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let looked = Instant::now();
        if holds() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: not within {} s",
            patience.as_secs()
        );
        sleep((looked.elapsed() * 4).max(Duration::from_millis(20)));
    }
}

/// First half of a start, in a process of its own with a single thread (the kernel demands it): makes the link
/// and the namespaces, puts the supervisor into them, ends.
///
/// Its standard input is the lock of all starts ([`cluster::starting`]), and so is the supervisor's until it can be
/// found: whoever ends the cluster waits until there is something to end, also if `up` was killed.
///
/// # Errors
/// If the kernel or `ip` refuses a step.
pub fn launch(cluster: &Cluster, supervisor_args: &[&str]) -> Result<()> {
    setsid().context("cannot leave the terminal's session")?;
    let link = cluster.link()?;
    let (outer, inner) = (link.host_interface(), link.inner_interface());
    // Marked from its first moment on, wherever we are killed.
    let mark = cluster.mark_of_link();
    run(
        "ip",
        &[
            "link", "add", &outer, "address", &mark, "type", "veth", "peer", "name", &inner,
        ],
    )
    .with_context(|| format!("cannot make the interface {outer}: if it is there by now, start again"))?;
    run(
        "ip",
        &[
            "address",
            "add",
            &format!("{}/30", link.host_address()),
            "dev",
            &outer,
        ],
    )?;
    run("ip", &["link", "set", &outer, "up"])?;

    let host_network = fs::File::open("/proc/self/ns/net")?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .context("the kernel refuses new namespaces (network, mount, process)")?;
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(cluster.log_of("supervisor"))?;
    Command::new("/proc/self/exe")
        .arg0("testbed")
        .args(supervisor_args)
        .stdin(Stdio::inherit())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start the supervisor")?;
    setns(&host_network, CloneFlags::CLONE_NEWNET)?;
    // Our children are in the new process namespace, where the supervisor is process 1.
    run("ip", &["link", "set", &inner, "netns", "1"])?;
    Ok(())
}

/// Second half, as process 1 of the new namespace: takes the cluster's lock, replaces directories, sets up the
/// network and the cgroups. The returned lock must live as long as the supervisor.
///
/// # Errors
/// If a step fails; another supervisor of the same cluster is one reason.
pub fn enter(cluster: &Cluster) -> Result<fs::File> {
    let lock = fs::File::create(cluster.lock_file())?;
    // Somebody who looks whether we are alive may hold it for a moment.
    wait_until("", Duration::from_secs(1), || lock.try_lock().is_ok())
        .with_context(|| format!("cluster {:?} has a supervisor already", cluster.name()))?;
    // The old /proc still shows the host's process ids.
    let host_pid = fs::read_link("/proc/self").context("cannot read /proc/self")?;
    fs::write(cluster.pid_file(), host_pid.display().to_string())?;
    // Now we can be found, and ended: the lock of all starts is let go.
    dup2_stdin(fs::File::open("/dev/null")?.as_fd()).context("cannot close the standard input")?;
    replace_directories(cluster)?;
    set_up_network(cluster.link()?)?;
    make_cgroups(cluster)?;
    wait_for_no_disk()?;
    Ok(lock)
}

/// Makes every wait for the disk return at once, for this thread and all that come from it, containers included. What was
/// written outlives the kill of any process all the same, and the cluster does not outlive the machine. A machine that has
/// just compiled this repository takes up to half a minute to put a container runtime's first few files on its disk.
fn wait_for_no_disk() -> Result<()> {
    let rules = SYNCS.into_iter().map(|call| (call, Vec::new())).collect();
    let program = env::consts::ARCH.try_into().and_then(|architecture| {
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), architecture)?;
        BpfProgram::try_from(filter)
    });
    seccompiler::apply_filter(&program?).context("the kernel refuses a filter of system calls (seccomp)")
}

fn replace_directories(cluster: &Cluster) -> Result<()> {
    let none: Option<&str> = None;
    // Nothing we mount may reach the host; but inside, the kubelet's mounts must reach the containers.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("cannot share mounts inside")?;
    for (name, path) in REPLACED {
        let own = cluster.inner(name);
        fs::create_dir_all(&own)?;
        mount(Some(&own), path, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .with_context(|| format!("cannot replace {path}"))?;
    }
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("cannot mount /proc")?;
    // The kubelet sets these for the whole machine. It finds them set here, and the machine keeps its own.
    for (setting, value) in KUBELET_SETTINGS {
        let file = cluster.home().join("root").join(setting.replace('/', "."));
        fs::write(&file, value)?;
        mount(
            Some(&file),
            &*format!("/proc/sys/{setting}"),
            none,
            MsFlags::MS_BIND,
            none,
        )
        .with_context(|| format!("cannot hide the machine's {setting}"))?;
    }
    Ok(())
}

fn set_up_network(link: Link) -> Result<()> {
    let inner = link.inner_interface();
    wait_until("the link to the host", PATIENCE, || {
        run("ip", &["link", "show", &inner]).is_ok()
    })?;
    run("ip", &["link", "set", &inner, "name", "eth0"])?;
    run(
        "ip",
        &[
            "address",
            "add",
            &format!("{}/30", link.node_address()),
            "dev",
            "eth0",
        ],
    )?;
    run("ip", &["link", "set", "eth0", "up"])?;
    run("ip", &["link", "set", "lo", "up"])?;
    // Without a route, a connection from the node to a ClusterIP is refused before kube-proxy's rules see it.
    run("ip", &["route", "add", SERVICE_CIDR, "dev", "eth0"])?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot forward packets between pods")?;
    Ok(())
}

/// The directories of a cgroup in every hierarchy: one with cgroup v2, one per controller with v1.
pub fn cgroup_directories(cgroup: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let name = cgroup.trim_start_matches('/');
    if root.join("cgroup.controllers").exists() {
        return vec![root.join(name)];
    }
    let hierarchies = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    hierarchies
        .filter(|path| path.is_dir() && !path.is_symlink())
        .map(|path| path.join(name))
        .collect()
}

fn make_cgroups(cluster: &Cluster) -> Result<()> {
    for directory in cgroup_directories(&cluster.cgroup()) {
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let parent = directory.parent().context("a cgroup without a parent")?;
        // cgroup v1: a cpuset is empty, and so unusable, until it has got its processors and memory nodes.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(own) = fs::read_to_string(directory.join(file))
                && own.trim().is_empty()
                && let Ok(value) = fs::read_to_string(parent.join(file))
            {
                fs::write(directory.join(file), value)?;
            }
        }
        hand_down_controllers(parent)?;
    }
    Ok(())
}

/// cgroup v2: a controller must be handed down. Only what the kubelet asks for, since that is for the whole machine: runc
/// hands down the rest with the first pod. Beside v1, the unified hierarchy has none to hand down.
fn hand_down_controllers(parent: &Path) -> Result<()> {
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    // It wants this one too where the kernel has it.
    let is_needed = |controller: &&str| CONTROLLERS.contains(controller) || *controller == "hugetlb";
    for controller in controllers.split_whitespace().filter(is_needed) {
        fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("cannot hand down the cgroup controller {controller}"))?;
    }
    Ok(())
}

/// The supervisor's process id, if it is alive.
pub fn supervisor(cluster: &Cluster) -> Option<Pid> {
    let lock = fs::File::open(cluster.lock_file()).ok()?;
    // Shared, so that several who look do not take each other for the supervisor.
    let Err(fs::TryLockError::WouldBlock) = lock.try_lock_shared() else {
        return None;
    };
    noted_supervisor(cluster)
}

/// The supervisor that somebody has killed: it lets go of its lock, and has no command line any more, before the kernel has
/// ended what it started.
fn dying_supervisor(cluster: &Cluster) -> Option<Pid> {
    let is_dying = |pid: &Pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty());
    noted_supervisor(cluster).filter(is_dying)
}

/// Process 1 of a namespace which has the id that the supervisor has noted. Without the lock it may be somebody else's.
fn noted_supervisor(cluster: &Cluster) -> Option<Pid> {
    let pid = fs::read_to_string(cluster.pid_file()).ok()?.trim().parse().ok()?;
    is_first_of_a_namespace(pid).then_some(Pid::from_raw(pid))
}

/// True for process 1 of a namespace below ours: a number in a file may have become somebody else's.
fn is_first_of_a_namespace(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .unwrap_or_default();
    ids.split_whitespace().count() > 1 && ids.split_whitespace().last() == Some("1")
}

/// Ends the cluster, whatever state it is in, and removes all it has left. Succeeds if there is nothing to do. A start
/// that is going on gets to the point from which it can be ended.
///
/// # Errors
/// If something resists; the error names it.
pub fn destroy(cluster: &Cluster) -> Result<()> {
    let lock = cluster::ending()?;
    destroy_locked(cluster)?;
    if lock.is_some() {
        cluster::leave();
    }
    Ok(())
}

/// [`destroy`] for who holds the lock of all starts.
///
/// # Errors
/// If something resists; the error names it.
pub fn destroy_locked(cluster: &Cluster) -> Result<()> {
    cluster.check_home_is_ours()?;
    let alive = supervisor(cluster);
    if let Some(pid) = alive.or_else(|| dying_supervisor(cluster)) {
        let step = Step::start(format!("ending cluster {:?}", cluster.name()));
        if alive.is_some() {
            kill(pid, Signal::SIGKILL)
                .with_context(|| format!("cannot end the supervisor, process {pid}"))?;
        }
        // The kernel lets go of process 1 only after every other process of the namespace.
        wait_until(&format!("the end of process {pid}"), PATIENCE, || has_ended(pid))?;
        // The machine's process 1 collects it at once, if it is any good; if not, that is not our failure.
        let _ = wait_until("", Duration::from_secs(3), || {
            !Path::new(&format!("/proc/{pid}")).exists()
        });
        step.done();
    }
    if let Ok(link) = cluster.link() {
        // The kernel deletes it too, but some time after the namespace's last process.
        let outer = link.host_interface();
        let address = Path::new("/sys/class/net").join(&outer).join("address");
        let there = || fs::read_to_string(&address).is_ok_and(|mark| mark.trim() == cluster.mark_of_link());
        if there() && run("ip", &["link", "delete", &outer]).is_err() {
            wait_until(&format!("the end of interface {outer}"), PATIENCE, || !there())?;
        }
    }
    for directory in cgroup_directories(&cluster.cgroup()) {
        wait_until(
            &format!("the end of cgroup {}", directory.display()),
            PATIENCE,
            || remove_cgroup(&directory),
        )?;
    }
    cluster.remove_home()
}

/// True if the process is gone, or a zombie that nobody has collected yet. One whose main thread has ended before its
/// others looks like a zombie too.
fn has_ended(pid: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    let zombie = stat
        .rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with('Z'));
    zombie && fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) <= 1
}

/// Removes a cgroup with all below it; a cgroup is a directory whose files cannot be deleted.
fn remove_cgroup(directory: &Path) -> bool {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
    !directory.exists()
}

/// Makes the calling thread, and what it starts, use the cluster's network.
///
/// # Errors
/// If the cluster does not run.
pub fn join_network(cluster: &Cluster) -> Result<()> {
    let pid = supervisor(cluster).with_context(|| cluster.does_not_run())?;
    let network = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    setns(&network, CloneFlags::CLONE_NEWNET).context("cannot enter the cluster's network; are you root?")
}

/// The host's id of a process that the cluster knows under another one.
pub fn host_pid(cluster: &Cluster, inner: u32) -> Option<Pid> {
    let namespace = fs::read_link(format!("/proc/{}/ns/pid", supervisor(cluster)?)).ok()?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        if fs::read_link(entry.path().join("ns/pid")).ok()? != namespace {
            return None;
        }
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        (ids.split_whitespace().last()? == inner.to_string()).then_some(Pid::from_raw(pid))
    })
}
