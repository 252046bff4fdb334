//! The test cluster itself: that nothing is left of it, that it heals, that several do not disturb each other, and
//! that wrong use gets a clear sentence. `make test` runs the first test, `make cluster-test` all of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use testbed::{
    cluster::Cluster,
    images,
    kubectl::Session,
    sandbox::{self, wait_until},
    supervisor,
    tools::Tools,
};

const PATIENCE: Duration = Duration::from_mins(2);

fn testbed(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_testbed"));
    command
        .args(["--name", name])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn succeed(name: &str, args: &[&str]) -> String {
    let output = testbed(name, args).output().unwrap();
    assert!(output.status.success(), "testbed {args:?}: {}", text(&output));
    text(&output)
}

/// Ends a cluster also when its test fails.
struct Running(Cluster);

impl Running {
    fn up(name: &str) -> Self {
        let running = Self(Cluster::named(name).unwrap());
        succeed(name, &["up"]);
        running
    }

    fn session(&self) -> Session {
        Session::of(self.0.clone()).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = sandbox::destroy(&self.0);
    }
}

/// What a cluster could leave on this machine.
#[derive(Debug, PartialEq)]
struct Traces {
    mounts: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    network_namespaces: String,
    cgroups: BTreeSet<PathBuf>,
    kernel_settings: String,
    files: BTreeSet<PathBuf>,
}

fn traces(of: &Cluster) -> Traces {
    let entries = |path: &Path| -> BTreeSet<PathBuf> {
        fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect()
    };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let hierarchies = entries(Path::new("/sys/fs/cgroup"));
    let mut files = entries(of.home().parent().unwrap());
    for place in [
        "/run",
        "/var/lib",
        "/var/log",
        "/var/run/netns",
        "/etc/cni",
        "/opt",
        "/tmp",
    ] {
        files.extend(
            entries(Path::new(place))
                .into_iter()
                .filter(|path| names_a_component(path)),
        );
    }
    Traces {
        mounts: mounts.lines().map(str::to_owned).collect(),
        interfaces: entries(Path::new("/sys/class/net"))
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        network_namespaces: sandbox::run("ip", &["netns", "list"]).unwrap(),
        kernel_settings: sandbox::run(
            "sysctl",
            &[
                "-n",
                "vm.overcommit_memory",
                "vm.panic_on_oom",
                "kernel.panic",
                "kernel.panic_on_oops",
                "kernel.keys.root_maxkeys",
                "kernel.keys.root_maxbytes",
            ],
        )
        .unwrap(),
        cgroups: hierarchies
            .iter()
            .flat_map(|path| entries(path))
            .filter(|path| path.is_dir())
            .collect(),
        files,
    }
}

/// Other programs come and go in shared directories; what a cluster would put there bears one of these names.
fn names_a_component(path: &Path) -> bool {
    let names = [
        "kube",
        "containerd",
        "cni",
        "etcd",
        "runc",
        "testbed",
        "coredns",
        "metrics",
        "netns",
        "volumes",
        "pods",
    ];
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    names.iter().any(|part| name.contains(part))
}

/// All processes below the supervisor, containers too, with their namespaces.
fn processes(cluster: &Cluster) -> BTreeMap<i32, BTreeSet<PathBuf>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
        parents.insert(pid, parent.unwrap_or_default());
    }
    let root = sandbox::supervisor(cluster).unwrap().as_raw();
    let below = |mut pid: i32| loop {
        if pid == root {
            return true;
        }
        let Some(parent) = parents.get(&pid) else {
            return false;
        };
        pid = *parent;
    };
    parents
        .keys()
        .copied()
        .filter(|pid| below(*pid))
        .map(|pid| (pid, namespaces(pid)))
        .collect()
}

fn namespaces(pid: i32) -> BTreeSet<PathBuf> {
    let kinds = ["net", "mnt", "pid"];
    kinds
        .iter()
        .filter_map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok())
        .collect()
}

/// Every namespace that some process of this machine is in.
fn all_namespaces() -> BTreeSet<PathBuf> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.flat_map(namespaces).collect()
}

fn start_pod(session: &Session, name: &str) {
    let image = format!("--image={}", testbed::addons::HELPER_IMAGE);
    session
        .kubectl(&[
            "run",
            name,
            &image,
            "--image-pull-policy=Never",
            "--",
            "/bin/sleep",
            "infinity",
        ])
        .unwrap();
    session
        .wait("default", &format!("pod/{name}"), "condition=Ready", PATIENCE)
        .unwrap();
}

#[test]
#[ignore = "needs root, starts a cluster: make test"]
fn down_leaves_nothing() {
    let cluster = Cluster::named("leaves-nothing").unwrap();
    sandbox::destroy(&cluster).unwrap();
    // A kubelet would set it to another value for the whole machine.
    let setting = "/proc/sys/kernel/keys/root_maxkeys";
    let own_value = fs::read_to_string(setting).unwrap();
    fs::write(setting, "1000001").unwrap();
    let before = traces(&cluster);
    let outside = all_namespaces();

    let running = Running::up(cluster.name());
    start_pod(&running.session(), "witness");
    let inside = processes(&cluster);
    let theirs: BTreeSet<PathBuf> = inside
        .values()
        .flatten()
        .filter(|namespace| !outside.contains(*namespace))
        .cloned()
        .collect();
    assert!(
        inside.len() > 12 && theirs.len() >= 6,
        "we do not see the cluster: {inside:?} {theirs:?}"
    );
    assert_ne!(
        traces(&cluster),
        before,
        "we do not see what a cluster leaves while it runs"
    );

    succeed(cluster.name(), &["down"]);
    let after = traces(&cluster);
    fs::write(setting, own_value).unwrap();
    assert_eq!(after, before);
    let alive: Vec<_> = inside
        .keys()
        .filter(|pid| !namespaces(**pid).is_disjoint(&theirs))
        .collect();
    assert!(alive.is_empty(), "processes {alive:?} have survived");
    assert!(all_namespaces().is_disjoint(&theirs), "a namespace has survived");
    succeed(cluster.name(), &["down"]); // nothing to do is no error
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn killed_components_come_back() {
    let running = Running::up("kill-components");
    let session = running.session();
    for (round, component) in ["kube-proxy", "kubelet", "containerd"].into_iter().enumerate() {
        let state = |name: &str| supervisor::read_status(&running.0).remove(name).unwrap();
        let old = state(component);
        supervisor::signal(&running.0, component, Signal::SIGKILL).unwrap();
        let back = || {
            state(component).restarts > old.restarts
                && state(component).pid.is_some_and(|pid| Some(pid) != old.pid)
        };
        wait_until(&format!("the restart of {component}"), PATIENCE, back).unwrap();
        assert_eq!(state(component).last_exit.as_deref(), Some("signal SIGKILL"));
        let log = fs::read_to_string(running.0.log_of(component)).unwrap();
        assert!(
            log.contains("supervisor:") && log.contains("SIGKILL"),
            "the log tells of the restart"
        );

        // Ready without a hand: a new pod starts and a new Service leads to it.
        session
            .wait("default", "node/node", "condition=Ready", PATIENCE)
            .unwrap();
        let name = format!("after-{round}");
        start_pod(&session, &name);
        let serve = [
            "/bin/sh",
            "-c",
            "mkdir -p /tmp/www && echo here > /tmp/www/index.html && httpd -h /tmp/www -p 8080",
        ];
        let mut exec = vec!["exec", name.as_str(), "--"];
        exec.extend(serve);
        session.kubectl(&exec).unwrap();
        session
            .kubectl(&["expose", "pod", &name, "--port=80", "--target-port=8080"])
            .unwrap();
        let url = format!("http://{name}.default.svc.cluster.local/");
        let reached = || {
            session
                .kubectl(&["exec", &name, "--", "timeout", "2", "wget", "-qO-", &url])
                .is_ok_and(|a| a == "here\n")
        };
        wait_until(
            &format!("a Service after the end of {component}"),
            PATIENCE,
            reached,
        )
        .unwrap();
    }
}

#[test]
#[ignore = "needs root, starts clusters: make cluster-test"]
fn two_clusters_do_not_see_each_other() {
    let (left, right) = (Running::up("left"), Running::up("right"));
    left.session()
        .kubectl(&["create", "namespace", "only-left"])
        .unwrap();
    let namespaces = right
        .session()
        .kubectl(&["get", "namespaces", "--output=name"])
        .unwrap();
    assert!(!namespaces.contains("only-left"), "{namespaces}");
    assert_ne!(
        left.0.link().unwrap().node_address(),
        right.0.link().unwrap().node_address()
    );

    start_pod(&left.session(), "prisoner");
    let (own, other) = (
        left.0.link().unwrap().node_address(),
        right.0.link().unwrap().node_address(),
    );
    let reaches = |address: &str, port: &str| {
        let connected = left.session().kubectl(&[
            "exec", "prisoner", "--", "nc", address, port, "-w", "2", "-e", "true",
        ]);
        // A program that crashes would look like a network that holds.
        if let Err(error) = &connected {
            let error = format!("{error:#}");
            assert!(
                error.contains("can't connect") || error.contains("timed out"),
                "{error}"
            );
        }
        connected.is_ok()
    };
    assert!(reaches(&own, "6443"), "the probe must be able to succeed");
    assert!(
        !reaches(&other, "6443"),
        "a pod of one cluster reaches the other's API server"
    );
    assert!(!reaches("192.0.2.1", "80"), "a pod has a way out");

    drop(left);
    right
        .session()
        .wait("default", "node/node", "condition=Ready", PATIENCE)
        .unwrap();
}

fn start_up(name: &str) -> Child {
    testbed(name, &["up"]).spawn().unwrap()
}

fn kill_now(child: &mut Child) {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn up_goes_on_over_the_leavings_of_a_killed_launcher() {
    let cluster = Cluster::named("killed-launcher").unwrap();
    sandbox::destroy(&cluster).unwrap();
    let before = traces(&cluster);

    // Killed at several moments, with and without its supervisor: nothing may be left after `down`.
    let moments: [(&str, PathBuf); 4] = [
        ("files are being written", cluster.pki().join("ca.crt")),
        ("the supervisor has begun", cluster.pid_file()),
        ("components start", cluster.status_file()),
        ("the container runtime runs", cluster.containerd_socket()),
    ];
    for (moment, file) in &moments {
        for with_supervisor in [false, true] {
            let mut launcher = start_up(cluster.name());
            wait_until(moment, PATIENCE, || file.exists()).unwrap();
            kill_now(&mut launcher);
            if let (true, Some(pid)) = (with_supervisor, sandbox::supervisor(&cluster)) {
                kill(pid, Signal::SIGKILL).unwrap();
            }
            succeed(cluster.name(), &["down"]);
            assert_eq!(traces(&cluster), before, "killed when {moment}");
        }
    }

    let mut launcher = start_up(cluster.name());
    wait_until("components start", PATIENCE, || cluster.status_file().exists()).unwrap();
    kill_now(&mut launcher);
    kill(sandbox::supervisor(&cluster).unwrap(), Signal::SIGKILL).unwrap();
    let running = Running::up(cluster.name());
    start_pod(&running.session(), "works");
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn a_full_disk_gets_a_sentence() {
    let home = Path::new("/var/tmp/exchange-testbed-small-disk");
    fs::create_dir_all(home).unwrap();
    let disk = home.display().to_string();
    let _ = sandbox::run("umount", &[&disk]); // of an earlier run
    let on_disk = |args: &[&str]| {
        testbed("small-disk", args)
            .env("TESTBED_HOME", home)
            .output()
            .unwrap()
    };

    sandbox::run(
        "mount",
        &["-t", "tmpfs", "-o", "size=64m,mode=700", "testbed", &disk],
    )
    .unwrap();
    let refused = on_disk(&["up"]);
    assert!(
        !refused.status.success() && text(&refused).contains("make room"),
        "{}",
        text(&refused)
    );
    sandbox::run("umount", &[&disk]).unwrap();

    sandbox::run(
        "mount",
        &["-t", "tmpfs", "-o", "size=4200m,mode=700", "testbed", &disk],
    )
    .unwrap();
    let up = on_disk(&["up"]);
    let free = sandbox::run("df", &["--output=avail", "--block-size=1M", &disk]).unwrap();
    let free: u64 = free.lines().last().unwrap().trim().parse().unwrap();
    sandbox::run(
        "fallocate",
        &[
            "-l",
            &format!("{}M", free.saturating_sub(20)),
            &format!("{disk}/ballast"),
        ],
    )
    .unwrap();
    let archives = images::stores(&Tools::ensure().unwrap()).unwrap();
    let postgres = archives
        .iter()
        .find(|archive| archive.image.contains("postgres"))
        .unwrap();
    let archive = postgres.path.display().to_string();
    let load = on_disk(&["load", &archive]);
    fs::remove_file(home.join("ballast")).unwrap();
    let again = on_disk(&["load", &archive]);
    let down = on_disk(&["down"]);
    sandbox::run("umount", &[&disk]).unwrap();
    fs::remove_dir(home).unwrap();
    assert!(up.status.success(), "{}", text(&up));
    assert!(
        !load.status.success() && text(&load).contains("is full: make room"),
        "{}",
        text(&load)
    );
    assert!(again.status.success(), "after making room: {}", text(&again));
    assert!(down.status.success(), "{}", text(&down));
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn what_is_not_ours_is_left_alone() {
    let home = Path::new("/tmp/testbed-not-ours");
    let _ = fs::remove_dir_all(home);
    fs::create_dir_all(home.join("precious/work")).unwrap();
    for args in [["up"], ["down"]] {
        let output = testbed("precious", &args)
            .env("TESTBED_HOME", home)
            .output()
            .unwrap();
        assert!(
            text(&output).contains("is not the home of a test cluster"),
            "{args:?}: {}",
            text(&output)
        );
    }
    let all = testbed("x", &["down", "--all"])
        .env("TESTBED_HOME", home)
        .output()
        .unwrap();
    assert!(
        all.status.success() && home.join("precious/work").is_dir(),
        "{}",
        text(&all)
    );

    // The number in a pid file may have become somebody else's, and a lock may be held by somebody who only looks.
    let cluster = home.join("stale");
    fs::create_dir_all(&cluster).unwrap();
    fs::write(cluster.join(".exchange-testbed"), "").unwrap();
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    fs::write(cluster.join("supervisor.pid"), bystander.id().to_string()).unwrap();
    let lock = fs::File::create(cluster.join("lock")).unwrap();
    lock.lock().unwrap();
    let down = testbed("stale", &["down"])
        .env("TESTBED_HOME", home)
        .output()
        .unwrap();
    let alive = bystander.try_wait().unwrap().is_none();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    fs::remove_dir_all(home).unwrap();
    assert!(
        alive,
        "down has killed a process that is not ours: {}",
        text(&down)
    );
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn wrong_use_gets_a_sentence() {
    let program = Path::new("/tmp/testbed-for-nobody");
    fs::copy(env!("CARGO_BIN_EXE_testbed"), program).unwrap();
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(program)
        .args(["--name", "nobody", "up"])
        .env("TESTBED_HOME", "/tmp/testbed-home-of-nobody")
        .output()
        .unwrap();
    fs::remove_file(program).unwrap();
    let _ = fs::remove_dir_all("/tmp/testbed-home-of-nobody");
    assert!(
        !nobody.status.success() && text(&nobody).contains("needs root"),
        "{}",
        text(&nobody)
    );

    for (name, args, sentence) in [
        ("Upper", vec!["up"], "lower-case letters"),
        (
            "never-started",
            vec!["status"],
            "does not run: `make cluster NAME=never-started`",
        ),
        (
            "never-started",
            vec!["exec", "--", "true"],
            "does not run: `make cluster NAME=never-started`",
        ),
        (
            "never-started",
            vec!["load", "/nowhere.tar"],
            "does not run: `make cluster NAME=never-started`",
        ),
    ] {
        let output = testbed(name, &args).output().unwrap();
        assert!(
            !output.status.success() && text(&output).contains(sentence),
            "{name} {args:?}: {}",
            text(&output)
        );
    }
}

#[test]
#[ignore = "links all components again: make cluster-test"]
fn an_interrupted_build_is_continued() {
    let cache = Path::new("/var/tmp/exchange-testbed-cache");
    let _ = fs::remove_dir_all(cache);
    let mut build = testbed("build", &["tools"])
        .env("TESTBED_CACHE", cache)
        .spawn()
        .unwrap();
    let binaries = || {
        let directories = fs::read_dir(cache).into_iter().flatten().flatten();
        directories
            .flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten())
            .count()
    };
    wait_until("a first binary", Duration::from_mins(30), || binaries() > 2).unwrap();
    kill_now(&mut build);
    let again = testbed("build", &["tools"])
        .env("TESTBED_CACHE", cache)
        .output()
        .unwrap();
    let tools = String::from_utf8_lossy(&again.stdout).trim().to_owned();
    let all = ["kube-apiserver", "etcd", "containerd", "local-path-provisioner"];
    let complete = all.iter().all(|name| Path::new(&tools).join(name).exists());
    fs::remove_dir_all(cache).unwrap();
    assert!(again.status.success() && complete, "{}", text(&again));
}
