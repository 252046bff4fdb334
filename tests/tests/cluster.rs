//! The test cluster itself: that nothing is left of it, that it heals, that several do not disturb each other, and
//! that wrong use gets a clear sentence. `make test` runs the first test, `make cluster-test` all of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::{BufRead, BufReader},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use testbed::{
    cluster::{Cluster, Link},
    images,
    kubectl::Session,
    results,
    sandbox::{self, wait_until},
    supervisor,
    tools::Tools,
};

const PATIENCE: Duration = Duration::from_mins(2);

/// The name of the run that we are part of, which is its cluster's.
fn run() -> String {
    env::var("TESTBED_NAME").unwrap_or_else(|_| "dev".into())
}

/// A test, whose end is noted in `target/results/cluster-test*.json`.
struct Case {
    name: &'static str,
    begun: Instant,
}

impl Case {
    fn begun(name: &'static str) -> Self {
        results::Origin::of_run();
        Self {
            name,
            begun: Instant::now(),
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        let verdict = if thread::panicking() { "failed" } else { "passed" };
        let figures = json!({"verdict": verdict, "seconds": self.begun.elapsed().as_secs()});
        let _ = results::add(
            &results::of_cluster("cluster-test", &run()),
            [(self.name.to_owned(), figures)],
        );
    }
}

/// A name of our own for what a test starts or makes: beside the cluster of its run, and what every other run has. The next run
/// of the same name has the same, and so finds what one that was killed has left. Also for an interface: those may have 15 bytes.
fn own(part: &str) -> String {
    let run = run();
    let name = format!("{part}-{run}");
    if name.len() <= 15 {
        return name;
    }
    let mut hash = DefaultHasher::new();
    run.hash(&mut hash);
    format!("{part}-{:06x}", hash.finish() & 0xff_ffff)
}

/// A directory of our own on a real disk, empty.
fn own_directory(part: &str) -> PathBuf {
    let directory = Path::new("/var/tmp").join(format!("testbed-{}", own(part)));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

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

/// A cluster of our own, of which nothing is left.
fn own_cluster(part: &str) -> Cluster {
    let cluster = Cluster::named(&own(part)).unwrap();
    sandbox::destroy(&cluster).unwrap();
    cluster
}

/// Ends a cluster also when its test fails.
struct Running(Cluster);

impl Running {
    fn up(cluster: Cluster) -> Self {
        let running = Self(cluster);
        succeed(running.0.name(), &["up"]);
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

/// What a kubelet would set for the whole machine.
const KERNEL_SETTINGS: [&str; 6] = [
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/panic_on_oom",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/panic_on_oops",
    "/proc/sys/kernel/keys/root_maxkeys",
    "/proc/sys/kernel/keys/root_maxbytes",
];

fn kernel_settings() -> [String; KERNEL_SETTINGS.len()] {
    KERNEL_SETTINGS.map(|setting| fs::read_to_string(setting).unwrap())
}

/// A kernel setting that is changed for a test, and gets its own value back however the test ends: by a process that waits
/// for that. Another run that wants to change it waits.
struct Changed {
    restorer: Child,
    _lock: fs::File,
}

impl Changed {
    fn to(value: &str, setting: &'static str) -> Self {
        let lock = fs::File::open(setting).unwrap();
        lock.lock().unwrap();
        let own_value = fs::read_to_string(setting).unwrap();
        // Its input ends when we do; Ctrl-C is for us.
        let restore = r#"trap "" INT TERM HUP; read -r _; echo "$0" >"$1""#;
        let restorer = Command::new("sh")
            .args(["-c", restore, own_value.trim(), setting])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(setting, value).unwrap();
        Self {
            restorer,
            _lock: lock,
        }
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        drop(self.restorer.stdin.take());
        let _ = self.restorer.wait();
    }
}

/// What a cluster could leave on this machine, where others may come and go at the same time.
#[derive(Debug, PartialEq)]
struct Traces {
    processes: BTreeMap<i32, String>,
    /// Those of its processes that are not the machine's.
    namespaces: BTreeSet<PathBuf>,
    mounts: BTreeSet<String>,
    interfaces: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    /// Of AppArmor, of the whole machine.
    profiles: BTreeSet<String>,
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
    // Whatever is mounted inside is below its home, or is itself a part of its home, or comes after what is: it would not get
    // out alone.
    let home = format!("/{}/root/", of.name());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter(|mount| mount.contains(&home));
    let is_its_own = |interface: &PathBuf| {
        fs::read_to_string(interface.join("address")).is_ok_and(|mark| mark.trim() == of.mark_of_link())
    };
    let mut interfaces = entries(Path::new("/sys/class/net"));
    interfaces.retain(is_its_own);
    let cgroups = sandbox::cgroup_directories(&of.cgroup());
    let mut files: BTreeSet<PathBuf> = [of.home().to_owned()].into();
    files.retain(|home| home.exists());
    for place in [
        "/run",
        "/var/lib",
        "/var/log",
        "/var/run/netns",
        "/etc/cni",
        "/opt",
        "/tmp",
        "/var/tmp",
    ] {
        files.extend(
            entries(Path::new(place))
                .into_iter()
                .filter(|path| names_a_component(path)),
        );
    }
    // Where buildah would note networks and layers.
    for place in [
        "/etc/cni/net.d",
        "/var/lib/containers",
        "/var/lib/containers/cache",
    ] {
        files.extend(entries(Path::new(place)));
    }
    // What kubectl remembers of API servers, by their addresses.
    let home = env::var("HOME").unwrap();
    let remembered = entries(&Path::new(&home).join(".kube/cache/discovery"));
    files.extend(
        remembered
            .into_iter()
            .filter(|path| path.to_string_lossy().contains("/10.231.")),
    );
    let profiles = fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
    let processes = processes(of);
    Traces {
        namespaces: namespaces_of(processes.keys()),
        processes,
        mounts: mounts.map(str::to_owned).collect(),
        interfaces,
        cgroups: cgroups.into_iter().filter(|cgroup| cgroup.exists()).collect(),
        files,
        profiles: profiles.lines().map(str::to_owned).collect(),
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
        "coredns",
        "metrics",
        "netns",
        "volumes",
        "pods",
        "buildah",
        "container_images",
        "mmdebstrap",
    ];
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    names.iter().any(|part| name.contains(part))
}

/// A command that has the cluster of this name alone.
fn alone(name: &str, command: &[&str]) -> Command {
    let mut alone = testbed(name, &["alone", "--"]);
    // We may be part of a run ourselves.
    alone.args(command).env_remove("TESTBED_ALONE");
    alone
}

#[test]
#[ignore = "make cluster-test"]
fn a_run_does_not_end_the_cluster_of_another_run() {
    let _case = Case::begun("a_run_does_not_end_the_cluster_of_another_run");
    let name = own("alone");
    let mut first = alone(&name, &["sh", "-c", "echo begun; read -r _"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(first.stdout.as_mut().unwrap())
        .read_line(&mut said)
        .unwrap();
    // Also whoever has another cache: the cluster is the same.
    let refused = alone(&name, &["true"])
        .env("TESTBED_CACHE", "/nowhere")
        .output()
        .unwrap();
    // What Ctrl-C ends is the command. The name is taken until that has ended.
    kill(Pid::from_raw(first.id().cast_signed()), Signal::SIGINT).unwrap();
    let still = alone(&name, &["true"]).output().unwrap();
    drop(first.stdin.take());
    let ended = first.wait().unwrap();
    assert_eq!(said, "begun\n");
    let told = format!("process {}, since 2", first.id());
    for output in [refused, still] {
        assert!(
            !output.status.success()
                && text(&output).contains(&told)
                && text(&output).contains(&format!("NAME={name}-2")),
            "{}",
            text(&output)
        );
    }
    // As `read` says that there is nothing more.
    assert_eq!(ended.code(), Some(1));
    let next = alone(&name, &["true"]).output().unwrap();
    assert!(next.status.success(), "{}", text(&next));
}

#[test]
#[ignore = "make cluster-test"]
fn what_a_run_starts_is_a_part_of_it() {
    let _case = Case::begun("what_a_run_starts_is_a_part_of_it");
    let (name, program) = (own("alone"), env!("CARGO_BIN_EXE_testbed"));
    let part = alone(&name, &[program, "--name", &name, "alone", "--", "true"])
        .output()
        .unwrap();
    assert!(part.status.success(), "{}", text(&part));
    // Of that cluster only.
    let other = own("beside");
    let mut holder = alone(&other, &["sh", "-c", "echo begun; read -r _"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(holder.stdout.as_mut().unwrap())
        .read_line(&mut String::new())
        .unwrap();
    let refused = alone(&name, &[program, "--name", &other, "alone", "--", "true"])
        .output()
        .unwrap();
    // Whoever ends a run ends what it has started. Waiting would close its input, and so end it in another way.
    let _input = holder.stdin.take();
    kill(Pid::from_raw(holder.id().cast_signed()), Signal::SIGTERM).unwrap();
    let ended = holder.wait().unwrap();
    assert!(!refused.status.success(), "{}", text(&refused));
    assert_eq!(ended.code(), Some(128 + 15));
}

/// Make, as a person would call it, in a process group of its own, so that Ctrl-C can be for all of it.
fn make(name: &str, args: &[&str]) -> Command {
    let mut make = Command::new("make");
    make.args(args)
        .arg(format!("NAME={name}"))
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    // What the make that runs us has told us is about our run, and what cargo says of this crate is news to build scripts.
    let is_of_our_run = |variable: &str| {
        [
            "MAKE",
            "MFLAGS",
            "TESTBED_ALONE",
            "TESTBED_ORIGIN",
            "CARGO_MANIFEST",
            "CARGO_PKG",
        ]
        .iter()
        .any(|part| variable.starts_with(part))
    };
    for (variable, _) in env::vars().filter(|(variable, _)| is_of_our_run(variable)) {
        make.env_remove(variable);
    }
    make
}

/// Presses Ctrl-C when a command has said this.
fn interrupt_when(command: &mut Command, sentence: &str) {
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut before = Vec::new();
    let heard = said.by_ref().any(|line| {
        before.push(line.clone());
        line.contains(sentence)
    });
    assert!(heard, "{sentence:?} is not in {before:#?}");
    let group = Pid::from_raw(-child.id().cast_signed());
    kill(group, Signal::SIGINT).unwrap();
    // It tells more, and would end if nobody listened.
    said.for_each(drop);
    assert!(!child.wait().unwrap().success());
}

#[test]
#[ignore = "needs root, starts clusters: make cluster-test"]
fn an_interrupted_demonstration_ends_the_cluster_that_it_has_started_and_no_other() {
    let _case = Case::begun("an_interrupted_demonstration_ends_the_cluster_that_it_has_started_and_no_other");
    let cluster = own_cluster("demo");
    let before = traces(&cluster);
    interrupt_when(&mut make(cluster.name(), &["demo"]), ": starting");
    assert_eq!(traces(&cluster), before);

    let running = Running::up(cluster);
    let supervisor = sandbox::supervisor(&running.0);
    interrupt_when(&mut make(running.0.name(), &["demo"]), "runs already");
    assert_eq!(sandbox::supervisor(&running.0), supervisor);
    start_pod(&running.session(), "goes-on");

    // In the middle of a release, with clients.
    interrupt_when(
        &mut make(running.0.name(), &["demo"]),
        "kubectl apply: version 2.0.0, with",
    );
    let everything = [
        "get",
        "namespaces,deployments,pods",
        "--all-namespaces",
        "--output=name",
    ];
    let left = running.session().kubectl(&everything).unwrap();
    let is_left = |name: &str| left.lines().any(|line| line == name);
    assert!(
        is_left("pod/goes-on")
            && !is_left("namespace/exchange-demo")
            && !is_left("deployment.apps/exchange-operator"),
        "{left}"
    );
}

#[test]
#[ignore = "compiles tests: make cluster-test"]
fn a_misspelt_test_is_said_before_a_cluster_is_started() {
    let _case = Case::begun("a_misspelt_test_is_said_before_a_cluster_is_started");
    let cluster = own_cluster("misspelt");
    for (args, sentence) in [
        (
            ["stories", "TEST=a_selector_change_under"],
            "no test is named like TEST=a_selector_change_under; make e2e has one.",
        ),
        (
            ["e2e", "TEST=helm_installs_an_exchange"],
            "no test is named like TEST=helm_installs_an_exchange; make stories has one.",
        ),
        (
            ["e2e", "CASE=0"],
            "no test is named like CASE=0. To list those of this target: cargo test --workspace --test ground_floor",
        ),
    ] {
        let refused = make(cluster.name(), &args).output().unwrap();
        assert!(
            !refused.status.success() && text(&refused).contains(sentence),
            "{args:?}: {}",
            text(&refused)
        );
    }
    assert!(!cluster.home().exists(), "a cluster was started");
}

/// The ids of all processes of this machine.
fn pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The command line of a process; empty for one that has ended.
fn command_line(pid: i32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// State and parent of a process.
fn state(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// All processes of a cluster, containers too: those that name it, and what is below them.
fn processes(cluster: &Cluster) -> BTreeMap<i32, String> {
    let home = cluster.home().display().to_string();
    let all = pids();
    let parents: BTreeMap<i32, i32> = all
        .iter()
        .filter_map(|pid| Some((*pid, state(*pid)?.1)))
        .collect();
    let naming: BTreeSet<i32> = all
        .iter()
        .copied()
        .filter(|pid| *pid != std::process::id().cast_signed())
        .filter(|pid| {
            let names_it = |word: &String| word == cluster.name() || word.contains(&home);
            command_line(*pid).iter().any(names_it)
        })
        .collect();
    let belongs = |mut pid: i32| loop {
        if naming.contains(&pid) {
            return true;
        }
        let Some(parent) = parents.get(&pid) else {
            return false;
        };
        pid = *parent;
    };
    let ours = all.into_iter().filter(|pid| belongs(*pid));
    ours.map(|pid| (pid, command_line(pid).join(" "))).collect()
}

/// The namespaces that a cluster's processes are in and this test is not.
struct Namespaces {
    theirs: BTreeSet<PathBuf>,
    /// When we looked, in ticks since the machine's start.
    seen: u64,
}

impl Namespaces {
    fn of(cluster: &Cluster) -> Self {
        let uptime = fs::read_to_string("/proc/uptime").unwrap();
        let (seconds, rest) = uptime.split_once('.').unwrap();
        Self {
            theirs: namespaces_of(processes(cluster).keys()),
            seen: seconds.parse::<u64>().unwrap() * 100 + rest[..2].parse::<u64>().unwrap(),
        }
    }

    /// Processes that are still in one, or keep one open. Not those that began later: the kernel gives the number of a
    /// namespace that has ended to the next one that anybody makes.
    fn survivors(&self) -> Vec<String> {
        let began = |pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let ticks = stat.rsplit(')').next()?.split_whitespace().nth(19)?;
            ticks.parse::<u64>().ok()
        };
        pids()
            .into_iter()
            .filter(|pid| {
                let files = fs::read_dir(format!("/proc/{pid}/fd"))
                    .into_iter()
                    .flatten()
                    .flatten();
                let open: BTreeSet<PathBuf> =
                    files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
                !namespaces(*pid).is_disjoint(&self.theirs) || !open.is_disjoint(&self.theirs)
            })
            .filter(|pid| began(*pid).is_some_and(|began| began <= self.seen))
            .map(|pid| format!("{pid} {}", command_line(pid).join(" ")))
            .collect()
    }
}

/// The namespaces that some of these processes are in and this test is not.
fn namespaces_of<'a>(processes: impl Iterator<Item = &'a i32>) -> BTreeSet<PathBuf> {
    let host = namespaces(std::process::id().cast_signed());
    let all = processes.flat_map(|pid| namespaces(*pid));
    all.filter(|namespace| !host.contains(namespace)).collect()
}

fn namespaces(pid: i32) -> BTreeSet<PathBuf> {
    let kinds = ["net", "mnt", "pid"];
    kinds
        .iter()
        .filter_map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok())
        .collect()
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

/// A pod with a volume and a Service, which has a file in both.
fn start_pod_with_volume(session: &Session, name: &str) {
    let objects = format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec: {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 16Mi}}}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{name: {name}}}, ports: [{{port: 80}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{name: {name}}}}}
spec:
  containers:
  - name: main
    image: {image}
    imagePullPolicy: Never
    command: [/bin/sh, -c, 'echo kept > /data/kept && exec /bin/sleep infinity']
    volumeMounts: [{{name: data, mountPath: /data}}]
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: {name}}}}}]
",
        image = testbed::addons::HELPER_IMAGE
    );
    session.apply_manifest("default", &objects).unwrap();
    let pod = format!("pod/{name}");
    session
        .wait("default", &pod, "condition=Ready", PATIENCE)
        .unwrap();
}

#[test]
#[ignore = "needs root, starts a cluster: make test, make cluster-test"]
fn down_leaves_nothing() {
    let _case = Case::begun("down_leaves_nothing");
    let cluster = own_cluster("gone");
    // A kubelet would set it to another value for the whole machine.
    let _changed = Changed::to("1000001", "/proc/sys/kernel/keys/root_maxkeys");
    let settings = kernel_settings();
    let before = traces(&cluster);
    assert_eq!(
        (&before.processes, &before.namespaces),
        (&BTreeMap::new(), &BTreeSet::new())
    );

    let running = Running::up(cluster.clone());
    start_pod(&running.session(), "witness");
    start_pod_with_volume(&running.session(), "with-a-volume");
    let inside = processes(&cluster);
    let inhabited = Namespaces::of(&cluster);
    assert!(
        inside.len() > 12 && inhabited.survivors().len() > 12,
        "we do not see the cluster: {inside:?} {:?}",
        inhabited.theirs
    );
    let during = traces(&cluster);
    assert!(
        during.namespaces.len() >= 6
            && during.interfaces.len() > before.interfaces.len()
            && during.cgroups.len() > before.cgroups.len()
            && during.files.len() > before.files.len(),
        "we do not see what a cluster leaves while it runs: {during:?}"
    );

    let told = succeed(own_cluster("never").name(), &["down"]);
    let this_one = format!("make down NAME={}`", cluster.name());
    assert!(told.contains(&this_one), "who ends another one is told: {told}");
    succeed(cluster.name(), &["down"]);
    assert_eq!(traces(&cluster), before);
    assert_eq!(kernel_settings(), settings);
    assert_eq!(inhabited.survivors(), Vec::<String>::new());
    succeed(cluster.name(), &["down"]); // nothing to do is no error
}

/// `up` on a cluster that lacks something. When it says what it waits for, something is done about that.
fn up_waits(running: &Running, sentence: &str, then: impl FnOnce()) {
    let mut up = start_up(running.0.name());
    let mut said = BufReader::new(up.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let waits = said.by_ref().any(|line| line.contains(sentence));
    then();
    // It tells more, and would end if nobody listened.
    said.for_each(drop);
    assert!(up.wait().unwrap().success());
    assert!(waits, "up has ended, and never said {sentence:?}");
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn up_ends_when_pods_are_admitted_and_the_control_plane_is_healthy() {
    let _case = Case::begun("up_ends_when_pods_are_admitted_and_the_control_plane_is_healthy");
    let running = Running::up(own_cluster("waits"));
    let session = running.session();
    let stop = |component| supervisor::signal(&running.0, component, Signal::SIGSTOP).unwrap();
    let go_on = |component| supervisor::signal(&running.0, component, Signal::SIGCONT).unwrap();
    stop("kube-controller-manager");
    session.kubectl(&["delete", "serviceaccount", "default"]).unwrap();
    up_waits(&running, "waiting for the ServiceAccount of pods", || {
        go_on("kube-controller-manager");
    });
    start_pod(&session, "first");
    stop("kube-scheduler");
    up_waits(&running, "waiting for the control plane", || {
        go_on("kube-scheduler");
    });

    // One that is killed while it is looked at is started again.
    stop("kube-scheduler");
    up_waits(&running, "waiting for the control plane", || {
        kill(sandbox::supervisor(&running.0).unwrap(), Signal::SIGKILL).unwrap();
    });
    start_pod(&running.session(), "second");
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn killed_components_come_back() {
    let _case = Case::begun("killed_components_come_back");
    let running = Running::up(own_cluster("killed"));
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
    let _case = Case::begun("two_clusters_do_not_see_each_other");
    let [left, right] = ["left", "right"].map(|part| Running::up(own_cluster(part)));
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
    start_pod(&right.session(), "goes-on");
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
    let _case = Case::begun("up_goes_on_over_the_leavings_of_a_killed_launcher");
    let cluster = own_cluster("launcher");
    let before = traces(&cluster);

    // Killed at several moments, with and without its supervisor: nothing may be left after `down`.
    let moments: [(&str, PathBuf); 5] = [
        ("the home is marked", cluster.home().join(".exchange-testbed")),
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
            let inhabited = Namespaces::of(&cluster);
            if let (true, Some(pid)) = (with_supervisor, sandbox::supervisor(&cluster)) {
                kill(pid, Signal::SIGKILL).unwrap();
            }
            succeed(cluster.name(), &["down"]);
            assert_eq!(traces(&cluster), before, "killed when {moment}");
            assert_eq!(
                inhabited.survivors(),
                Vec::<String>::new(),
                "killed when {moment}"
            );
        }
    }

    let mut launcher = start_up(cluster.name());
    wait_until("components start", PATIENCE, || cluster.status_file().exists()).unwrap();
    kill_now(&mut launcher);
    kill(sandbox::supervisor(&cluster).unwrap(), Signal::SIGKILL).unwrap();
    let running = Running::up(cluster);
    start_pod(&running.session(), "works");
}

/// The process that makes the namespaces for `up`, stopped: at once, or when its link to the host is there. `None` if it
/// was quicker.
fn stop_launch(cluster: &Cluster, with_link: bool) -> Option<Pid> {
    let begin = Instant::now();
    loop {
        let launch = pids()
            .into_iter()
            .find(|pid| command_line(*pid).ends_with(&words(&["launch", "--name", cluster.name()])));
        let link = cluster.link().map(Link::host_interface);
        let is_linked = || link.is_ok_and(|link| Path::new("/sys/class/net").join(link).exists());
        if let Some(pid) = launch
            && (!with_link || is_linked())
        {
            kill(Pid::from_raw(pid), Signal::SIGSTOP).ok()?;
            let stands = || state(pid).is_none_or(|(state, _)| "TZ".contains(state));
            wait_until("the launch to stand", PATIENCE, stands).unwrap();
            return (state(pid)?.0 == 'T').then_some(Pid::from_raw(pid));
        }
        assert!(begin.elapsed() < PATIENCE, "nothing was launched");
        if sandbox::supervisor(cluster).is_some() {
            return None;
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn down_waits_for_a_launch_whose_up_was_killed() {
    let _case = Case::begun("down_waits_for_a_launch_whose_up_was_killed");
    let cluster = own_cluster("orphan");
    let before = traces(&cluster);
    for with_link in [false, true] {
        let mut attempts = 1..=20;
        let launch = loop {
            assert!(attempts.next().is_some(), "the launch was always quicker");
            let mut up = start_up(cluster.name());
            let launch = stop_launch(&cluster, with_link);
            kill_now(&mut up);
            if let Some(launch) = launch {
                break launch;
            }
            succeed(cluster.name(), &["down"]);
        };
        let mut down = testbed(cluster.name(), &["down"]).spawn().unwrap();
        // It either waits, or has ended before the launch goes on.
        let said = BufReader::new(down.stderr.take().unwrap()).lines();
        let waits = said
            .map_while(Result::ok)
            .any(|line| line.contains("waiting for the start or end"));
        kill(launch, Signal::SIGCONT).unwrap();
        wait_until("the end of the launch", PATIENCE, || {
            state(launch.as_raw()).is_none()
        })
        .unwrap();
        assert!(down.wait().unwrap().success());
        assert_eq!(traces(&cluster), before, "with its link: {with_link}");
        assert!(waits, "down has ended before the launch");
    }
}

/// Processes that were started with this cache.
fn using_cache(cache: &Path) -> Vec<(i32, String)> {
    let variable = format!("TESTBED_CACHE={}", cache.display());
    let uses = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|word| word == variable.as_bytes())
    };
    pids()
        .into_iter()
        .filter(uses)
        .map(|pid| (pid, command_line(pid).join(" ")))
        .collect()
}

#[test]
#[ignore = "needs root, fetches Debian packages, starts a cluster: make cluster-test"]
fn a_killed_up_takes_its_image_build_with_it() {
    let _case = Case::begun("a_killed_up_takes_its_image_build_with_it");
    let cache = &own_directory("images");
    let tools = Tools::ensure().unwrap();
    symlink(tools.dir(), cache.join(tools.dir().file_name().unwrap())).unwrap();
    let cluster = own_cluster("image");
    // Also of what another cache's builds have left.
    succeed(cluster.name(), &["down"]);
    let layers = Path::new("/var/lib/containers");
    let had_layers = layers.exists();
    let before = traces(&cluster);
    let up = || {
        let mut command = testbed(cluster.name(), &["up"]);
        command.env("TESTBED_CACHE", cache);
        command
    };
    let down = || {
        let mut command = testbed(cluster.name(), &["down"]);
        command.env("TESTBED_CACHE", cache).output().unwrap()
    };
    for program in ["apt-get", "buildah"] {
        let mut killed = up().spawn().unwrap();
        let runs = || {
            using_cache(cache).iter().any(|(pid, _)| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == program)
            })
        };
        wait_until(program, PATIENCE, runs).unwrap();
        kill_now(&mut killed);
        let ended = wait_until("the end of the image build", Duration::from_secs(3), || {
            using_cache(cache).is_empty()
        });
        assert!(
            ended.is_ok(),
            "killed when {program} ran: {:?}",
            using_cache(cache)
        );
        assert_eq!(traces(&cluster), before, "killed when {program} ran");
        let images = || -> Vec<PathBuf> {
            let entries = fs::read_dir(cache.join("images")).unwrap().flatten();
            let others = entries.filter(|entry| entry.file_name() != "lock");
            others.map(|entry| entry.path()).collect()
        };
        assert!(!images().is_empty(), "{program} has left nothing");
        let down = down();
        assert!(down.status.success(), "{}", text(&down));
        assert_eq!(images(), Vec::<PathBuf>::new(), "killed when {program} ran");
    }
    let again = up().output().unwrap();
    let down = down();
    fs::remove_dir_all(cache).unwrap();
    assert!(again.status.success(), "{}", text(&again));
    assert!(down.status.success(), "{}", text(&down));
    assert_eq!(traces(&cluster), before, "an image was built");
    assert_eq!(layers.exists(), had_layers, "an image was built");
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn an_up_on_a_running_cluster_tells_what_is_different() {
    let _case = Case::begun("an_up_on_a_running_cluster_tells_what_is_different");
    let running = Running::up(own_cluster("differs"));
    let said = succeed(running.0.name(), &["up"]);
    assert!(
        said.contains("runs already") && !said.contains("runs, but"),
        "{said}"
    );
    let origin = json!({"clone": "/srv/other-clone", "components": "others"});
    fs::write(running.0.home().join("origin.json"), origin.to_string()).unwrap();
    let said = succeed(running.0.name(), &["up"]);
    for sentence in [
        "it was started from /srv/other-clone",
        "other versions or settings",
        &format!("make down NAME={}", running.0.name()),
    ] {
        assert!(said.contains(sentence), "{said}");
    }
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn an_interface_of_somebody_else_is_left_alone() {
    let _case = Case::begun("an_interface_of_somebody_else_is_left_alone");
    let cluster = own_cluster("stranger");
    let interfaces = Path::new("/sys/class/net");
    let is_free = |number: &u8| !interfaces.join(format!("testbed{number}")).exists();
    let strange = format!("testbed{}", (0..=u8::MAX).find(is_free).unwrap());
    add_interface(&strange, &own("strange"));
    let up = testbed(cluster.name(), &["up"]).output().unwrap();
    let down = testbed(cluster.name(), &["down"]).output().unwrap();
    let is_left = interfaces.join(&strange).exists();
    let _ = sandbox::run("ip", &["link", "delete", &strange]);
    assert!(up.status.success(), "{}", text(&up));
    assert!(down.status.success() && is_left, "{}", text(&down));
}

/// Adds an interface, as the other end of one by which the next run finds what a killed one has left.
fn add_interface(name: &str, other_end: &str) {
    let _ = sandbox::run("ip", &["link", "delete", other_end]);
    let pair = ["type", "veth", "peer", "name", other_end];
    sandbox::run("ip", &[&["link", "add", name][..], &pair].concat()).unwrap();
}

/// A cluster that has not ended cleanly keeps the number of its link, and a home elsewhere knows nothing of that.
#[test]
#[ignore = "needs root: make cluster-test"]
fn what_belongs_to_a_cluster_of_another_home_is_left_alone() {
    let _case = Case::begun("what_belongs_to_a_cluster_of_another_home_is_left_alone");
    let interfaces = Path::new("/sys/class/net");
    let is_free = |number: &u8| !interfaces.join(format!("testbed{number}")).exists();
    let number = (0..=u8::MAX).rev().find(is_free).unwrap();
    let home = tempfile::tempdir().unwrap();
    let twin = own("twin");
    let cluster = home.path().join(&twin);
    fs::create_dir(&cluster).unwrap();
    fs::write(cluster.join(".exchange-testbed"), "").unwrap();
    fs::write(cluster.join("link"), number.to_string()).unwrap();
    let interface = format!("testbed{number}");
    add_interface(&interface, &twin);
    let cgroups = sandbox::cgroup_directories(&Cluster::named(&twin).unwrap().cgroup());
    for cgroup in &cgroups {
        fs::create_dir_all(cgroup).unwrap();
    }
    let down = testbed(&twin, &["down"])
        .env("TESTBED_HOME", home.path())
        .output()
        .unwrap();
    let interface_is_left = interfaces.join(&interface).exists();
    let cgroups_are_left = cgroups.iter().all(|cgroup| cgroup.exists());
    let _ = sandbox::run("ip", &["link", "delete", &interface]);
    for cgroup in &cgroups {
        let _ = fs::remove_dir(cgroup);
    }
    assert!(down.status.success() && !cluster.exists(), "{}", text(&down));
    assert!(interface_is_left && cgroups_are_left && !cgroups.is_empty());
}

#[test]
#[ignore = "needs root, starts a cluster: make cluster-test"]
fn a_full_disk_gets_a_sentence() {
    let _case = Case::begun("a_full_disk_gets_a_sentence");
    let name = own("disk");
    let home = &Path::new("/var/tmp").join(format!("testbed-{name}"));
    fs::create_dir_all(home).unwrap();
    let disk = home.display().to_string();
    let on_disk = |args: &[&str]| testbed(&name, args).env("TESTBED_HOME", home).output().unwrap();
    // Of an earlier run.
    on_disk(&["down"]);
    let _ = sandbox::run("umount", &[&disk]);

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
    let once_more = on_disk(&["load", &archive]);
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
    assert!(text(&again).contains("loading 1 of 1"), "{}", text(&again));
    // What is there as it is in the archive is not loaded again.
    assert!(once_more.status.success(), "{}", text(&once_more));
    assert!(!text(&once_more).contains("loading"), "{}", text(&once_more));
    assert!(down.status.success(), "{}", text(&down));
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn a_disk_that_cannot_hold_images_gets_a_sentence() {
    let _case = Case::begun("a_disk_that_cannot_hold_images_gets_a_sentence");
    let place = own_directory("overlay");
    // overlayfs does not write to itself.
    let script = r#"
        cd "$0" && mkdir lower upper work merged
        mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged
        TESTBED_HOME="$0/merged/clusters" exec "$1" preflight"#;
    let preflight = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script])
        .arg(&place)
        .arg(env!("CARGO_BIN_EXE_testbed"))
        .output()
        .unwrap();
    let left: Vec<_> = fs::read_dir(place.join("upper")).unwrap().flatten().collect();
    fs::remove_dir_all(&place).unwrap();
    assert!(
        !preflight.status.success()
            && text(&preflight).contains("overlayfs cannot write to the file system of")
            && text(&preflight).contains("set TESTBED_HOME"),
        "{}",
        text(&preflight)
    );
    assert!(left.is_empty(), "{left:?}");
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn an_interrupted_down_can_be_repeated() {
    let _case = Case::begun("an_interrupted_down_can_be_repeated");
    let name = own("stuck");
    let home = &Path::new("/tmp").join(format!("testbed-{name}"));
    let cluster = home.join(&name);
    fs::create_dir_all(&cluster).unwrap();
    fs::write(cluster.join(".exchange-testbed"), "").unwrap();
    // Wherever among them the mark is: something before it and something behind it cannot be removed.
    let mounts: Vec<String> = ('a'..='h')
        .map(|name| cluster.join(name.to_string()).display().to_string())
        .collect();
    for place in &mounts {
        fs::create_dir_all(place).unwrap();
        let _ = sandbox::run("umount", &[place]); // of an earlier run
        sandbox::run("mount", &["-t", "tmpfs", "testbed", place]).unwrap();
    }
    let down = || {
        testbed(&name, &["down"])
            .env("TESTBED_HOME", home)
            .output()
            .unwrap()
    };
    let interrupted = down();
    for place in &mounts {
        sandbox::run("umount", &[place]).unwrap();
    }
    let again = down();
    let is_gone = !cluster.exists();
    // Between the last file and the directory itself.
    fs::create_dir_all(&cluster).unwrap();
    let third = down();
    let all_gone = !cluster.exists();
    // It was chosen, so it is not ours to remove.
    fs::remove_dir(home).unwrap();
    assert!(
        text(&interrupted).contains("cannot remove"),
        "{}",
        text(&interrupted)
    );
    assert!(is_gone && again.status.success(), "{}", text(&again));
    assert!(all_gone && third.status.success(), "{}", text(&third));
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn what_is_not_ours_is_left_alone() {
    let _case = Case::begun("what_is_not_ours_is_left_alone");
    let home = &own_directory("precious");
    fs::create_dir(home.join("precious")).unwrap();
    fs::create_dir(home.join("precious/work")).unwrap();
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
fn without_root_nothing_is_said_about_clusters_but_that() {
    let _case = Case::begun("without_root_nothing_is_said_about_clusters_but_that");
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("testbed");
    fs::copy(env!("CARGO_BIN_EXE_testbed"), &program).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let homes = ["closed", "open", "none"].map(|home| directory.path().join(home));
    let [closed, open, none] = &homes;
    for (home, mode) in [(closed, 0o700), (open, 0o755)] {
        let cluster = home.join("runs");
        fs::create_dir_all(&cluster).unwrap();
        fs::write(cluster.join(".exchange-testbed"), "").unwrap();
        fs::set_permissions(&cluster, fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(home, fs::Permissions::from_mode(mode)).unwrap();
    }
    let nobody = |home: &Path, args: &[&str]| {
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["--name", "runs"])
            .args(args)
            .env("TESTBED_HOME", home)
            .output()
            .unwrap()
    };
    for args in [
        &["up"][..],
        &["status"],
        &["kubeconfig"],
        &["load", "/nowhere.tar"],
        &["exec", "--", "true"],
        &["preflight"],
        &["down"],
    ] {
        let refused = nobody(closed, args);
        assert!(
            !refused.status.success() && text(&refused).contains("needs root"),
            "{args:?}: {}",
            text(&refused)
        );
    }
    for home in [closed, open] {
        let refused = nobody(home, &["down", "--all"]);
        assert!(
            !refused.status.success() && text(&refused).contains("are you root?"),
            "{}: {}",
            home.display(),
            text(&refused)
        );
    }
    let nothing = nobody(none, &["down", "--all"]);
    assert!(nothing.status.success(), "{}", text(&nothing));
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn wrong_use_gets_a_sentence() {
    let _case = Case::begun("wrong_use_gets_a_sentence");
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
        (
            "hidden-cache",
            vec!["up"],
            "is below /var/lib, and inside a cluster that is another directory: set TESTBED_CACHE",
        ),
    ] {
        // An empty cache: nothing is built only to say that.
        let output = testbed(name, &args)
            .env("TESTBED_CACHE", "/var/lib/exchange-testbed-cache")
            .output()
            .unwrap();
        assert!(
            !output.status.success() && text(&output).contains(sentence),
            "{name} {args:?}: {}",
            text(&output)
        );
    }
}

#[test]
#[ignore = "needs root: make cluster-test"]
fn a_path_without_an_administrators_programs_is_enough() {
    let _case = Case::begun("a_path_without_an_administrators_programs_is_enough");
    let preflight = testbed("x", &["preflight"])
        .env("PATH", "/usr/bin:/bin")
        .output()
        .unwrap();
    assert!(preflight.status.success(), "{}", text(&preflight));
}

#[test]
#[ignore = "make cluster-test"]
fn what_a_build_needs_is_said_before_it_begins() {
    let _case = Case::begun("what_a_build_needs_is_said_before_it_begins");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deps.sh");
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().display().to_string();
    let install = |program: &str, says: &str| {
        let path = directory.path().join(program);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\necho {says}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let deps = |path: &str| {
        let mut deps = Command::new(script);
        deps.env("PATH", format!("{path}:/usr/bin:/bin"))
            .env("HOME", &home);
        deps.env_remove("SUDO_USER").output().unwrap()
    };
    install("old/go", "go1.26.5");
    install("go/bin/go", "go1.27rc1");
    install("old-cargo/cargo", "cargo 0.66.0");
    install(".cargo/bin/cargo", "cargo 1.95.1");
    let (go, cargo) = (format!("{home}/go/bin"), format!("{home}/.cargo/bin"));
    let new = deps(&format!("{go}:{cargo}"));
    assert!(new.status.success(), "{}", text(&new));
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["sh", "-s", "--", "--cluster"])
        .stdin(fs::File::open(script).unwrap())
        .output()
        .unwrap();
    for (output, sentence) in [
        (
            deps(&cargo),
            format!("go is not in PATH; it is in {go}: export PATH="),
        ),
        (
            deps(&format!("{home}/old:{cargo}")),
            "is go1.26.5: install Go 1.26.6 or newer".to_owned(),
        ),
        (
            deps(&go),
            format!("cargo is not in PATH; it is in {cargo}: export PATH="),
        ),
        (
            deps(&format!("{go}:{home}/old-cargo")),
            "is 0.66.0: install rustup".to_owned(),
        ),
        (nobody, "a test cluster needs root".to_owned()),
    ] {
        assert!(
            !output.status.success() && text(&output).contains(&sentence),
            "{}",
            text(&output)
        );
    }
}

/// What a started build says that it has to compile, and the build, which goes on.
fn packages_to_compile(cache: &Path) -> (usize, Child) {
    let mut build = testbed("build", &["tools"])
        .env("TESTBED_CACHE", cache)
        .env("GOCACHE", cache.join("go"))
        .spawn()
        .unwrap();
    let mut said = BufReader::new(build.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let packages = said.find_map(|line| {
        let (_, rest) = line.split_once("compiling ")?;
        rest.split_once(" packages")?.0.parse().ok()
    });
    // It tells more, and would end if nobody listened.
    thread::spawn(move || said.count());
    (packages.unwrap(), build)
}

#[test]
#[ignore = "compiles some packages: make cluster-test"]
fn an_interrupted_compilation_is_continued() {
    let _case = Case::begun("an_interrupted_compilation_is_continued");
    let cache = &own_directory("compiled");
    let (all, mut build) = packages_to_compile(cache);
    // A file with the extension `-d` is something compiled.
    let compiled = || {
        let directories = fs::read_dir(cache.join("go")).into_iter().flatten().flatten();
        let files = directories.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
        files
            .filter(|file| file.file_name().to_string_lossy().ends_with("-d"))
            .count()
    };
    let at_first = compiled();
    wait_until("some packages", Duration::from_mins(5), || {
        compiled() > at_first + 300
    })
    .unwrap();
    kill_now(&mut build);
    let (rest, mut build) = packages_to_compile(cache);
    kill_now(&mut build);
    wait_until("the end of both builds", PATIENCE, || {
        using_cache(cache).is_empty()
    })
    .unwrap();
    let scratch = || {
        let directories = fs::read_dir(cache).unwrap().flatten();
        let scratches = directories.map(|entry| entry.path().join("scratch"));
        scratches.filter(|scratch| scratch.exists()).count()
    };
    let left = scratch();
    let down = testbed("build", &["down"])
        .env("TESTBED_CACHE", cache)
        .output()
        .unwrap();
    let after_down = scratch();
    fs::remove_dir_all(cache).unwrap();
    assert!(
        down.status.success() && (left, after_down) == (1, 0),
        "{left} {after_down} {}",
        text(&down)
    );
    assert!(all > 1000 && rest + 50 < all, "first {all} packages, then {rest}");
}

#[test]
#[ignore = "links all components again: make cluster-test"]
fn an_interrupted_build_is_continued() {
    // Go links as many at a time as it may use processors.
    const AT_A_TIME: usize = 2;
    let _case = Case::begun("an_interrupted_build_is_continued");
    let cache = &own_directory("cache");
    let begun = Instant::now();
    let mut build = testbed("build", &["tools"])
        .env("TESTBED_CACHE", cache)
        .env("GOMAXPROCS", AT_A_TIME.to_string())
        .spawn()
        .unwrap();
    // By their inodes: a binary that is linked is another file, one that is found up to date is the same with another time.
    let binaries = || -> BTreeMap<PathBuf, u64> {
        let directories = fs::read_dir(cache).into_iter().flatten().flatten();
        let files = directories.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
        files
            .filter_map(|file| Some((file.path(), file.metadata().ok()?.ino())))
            // One gets another name when all are there, and some are no binaries.
            .filter(|(path, _)| {
                let others = ["server", "lock", "spent", "scratch"];
                path.file_name()
                    .is_some_and(|name| !others.iter().any(|other| name == *other))
            })
            .collect()
    };
    wait_until("some binaries", Duration::from_mins(30), || {
        binaries().len() > AT_A_TIME
    })
    .unwrap();
    kill_now(&mut build);
    let first_half = begun.elapsed().as_secs();
    let linked = binaries();
    let again = testbed("build", &["tools"])
        .env("TESTBED_CACHE", cache)
        .output()
        .unwrap();
    let after = binaries();
    let tools = String::from_utf8_lossy(&again.stdout).trim().to_owned();
    let all = ["kube-apiserver", "etcd", "containerd", "local-path-provisioner"];
    let complete = all.iter().all(|name| Path::new(&tools).join(name).exists());
    let took = fs::read_to_string(Path::new(&tools).join("complete"));
    fs::remove_dir_all(cache).unwrap();
    assert!(again.status.success() && complete, "{}", text(&again));
    let took: u64 = took.unwrap().parse().unwrap();
    let whole = begun.elapsed().as_secs();
    // It has noted the time at the latest when it last was silent for a while.
    assert!(
        took > whole - first_half && took <= whole,
        "{took} s, and {first_half} s of {whole} s were the first half"
    );
    for (binary, file) in linked {
        let now = after.get(&binary);
        assert_eq!(now, Some(&file), "{} was linked again", binary.display());
    }
}
