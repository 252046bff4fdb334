//! `kubectl` and `helm` as a person would use them, for end-to-end tests, against the test cluster or an
//! existing one.

use std::{
    env, fs,
    io::{self, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Map, Value, json};

use crate::{
    cluster::Cluster,
    preflight,
    progress::say,
    results::{self, Origin},
    sandbox,
    tools::Tools,
};

/// Where the plugin `kubectl-exchange` is: where `make` has built the images' binaries, or where cargo has built this program.
///
/// # Errors
/// If it is in none of these places.
pub fn plugin_directory() -> Result<PathBuf> {
    let own = env::current_exe()?;
    // That of a test is in a directory of its own.
    let beside = own.ancestors().skip(1).take(2).map(Path::to_owned);
    let named = env::var_os("BINARIES").map(PathBuf::from);
    let there = named
        .into_iter()
        .chain(beside)
        .find(|place| place.join("kubectl-exchange").exists());
    there.context(
        "there is no kubectl-exchange: `make images`, or `cargo build --workspace --bins`, builds it",
    )
}

/// Between the end of a watch and the next one: an API server that is away refuses it at once.
const WATCH_AGAIN: Duration = Duration::from_millis(500);

/// A way to the cluster under test.
#[derive(Clone, Debug)]
pub struct Session {
    environment: Vec<(String, String)>,
    /// The test cluster; `None` with `CLUSTER=existing`.
    pub cluster: Option<Cluster>,
}

impl Session {
    /// The cluster that the environment names: with `CLUSTER=existing` the one of `KUBECONFIG`, else the test
    /// cluster `TESTBED_NAME` (by default `dev`).
    ///
    /// # Errors
    /// If that cluster does not run.
    pub fn from_environment() -> Result<Self> {
        Self::existing_or(Cluster::named(
            &env::var("TESTBED_NAME").unwrap_or_else(|_| "dev".into()),
        )?)
    }

    /// The cluster of KUBECONFIG, if `CLUSTER=existing` says so, or else this test cluster.
    ///
    /// # Errors
    /// If that cluster does not run.
    pub fn existing_or(cluster: Cluster) -> Result<Self> {
        if env::var("CLUSTER").is_ok_and(|value| value == "existing") {
            ensure!(
                env::var_os("KUBECONFIG").is_some(),
                "CLUSTER=existing needs KUBECONFIG: set it to the cluster's"
            );
            return Ok(Self {
                environment: Vec::new(),
                cluster: None,
            });
        }
        Self::of(cluster)
    }

    /// A test cluster by name.
    ///
    /// # Errors
    /// If it does not run.
    pub fn of(cluster: Cluster) -> Result<Self> {
        preflight::root()?;
        ensure!(sandbox::supervisor(&cluster).is_some(), cluster.does_not_run());
        Ok(Self {
            environment: cluster.environment(&Tools::ensure()?),
            cluster: Some(cluster),
        })
    }

    /// The cluster, if the processes of its nodes are there to be stopped and killed. Those of an existing one are not ours:
    /// then it says that this test is left out.
    #[must_use]
    pub fn own_nodes(&self) -> Option<&Cluster> {
        if self.cluster.is_none() {
            say("left out: the processes of an existing cluster are not ours to stop");
        }
        self.cluster.as_ref()
    }

    /// Runs `kubectl` and returns what it prints.
    ///
    /// # Errors
    /// If it fails; its error output is part of the error.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.run("kubectl", args, None)
    }

    /// Starts `kubectl` and leaves it running; what it prints can be read from its standard output.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn follow(&self, args: &[&str]) -> Result<Child> {
        Command::new("kubectl")
            .args(args)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start `kubectl`")
    }

    /// Tells every object that `kubectl get --watch` with these arguments shows, in a thread of its own, until what is
    /// returned is dropped. A watch ends after a while, and when the API server is away: the next one begins with all there is.
    ///
    /// # Errors
    /// If `kubectl` cannot be started.
    pub fn watch(&self, args: &[&str], mut tell: impl FnMut(Value) + Send + 'static) -> Result<Watching> {
        let session = self.clone();
        let args = ["get", "--watch", "--output=json"].iter().chain(args);
        let args: Vec<String> = args.map(|arg| (*arg).to_owned()).collect();
        let watching = Watching::default();
        let watched = Arc::clone(&watching.0);
        let begin = move || locked(&watched).begin(&session, &args);
        let mut next = begin()?;
        thread::spawn(move || {
            while let Some(output) = next {
                let output = BufReader::new(output);
                let objects = serde_json::Deserializer::from_reader(output).into_iter::<Value>();
                objects.map_while(Result::ok).for_each(&mut tell);
                thread::sleep(WATCH_AGAIN);
                next = begin().ok().flatten();
            }
        });
        Ok(watching)
    }

    /// Runs `helm` and returns what it prints.
    ///
    /// # Errors
    /// If it fails; its error output is part of the error.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        self.run("helm", args, None)
    }

    /// Runs commands of `sh` and returns what they print.
    ///
    /// # Errors
    /// If they fail; their error output is part of the error.
    pub fn shell(&self, commands: &str) -> Result<String> {
        self.run("sh", &["-c", commands], None)
    }

    /// Digest of an image as the test cluster has it under this name; empty if it has none.
    ///
    /// # Errors
    /// If its containerd does not answer.
    pub fn digest_of(&self, image: &str) -> Result<String> {
        let images = self.run("ctr", &["images", "list", &format!("name=={image}")], None)?;
        let own = images.lines().find(|line| line.starts_with(image));
        let digest = own.and_then(|line| line.split_whitespace().nth(2));
        Ok(digest.unwrap_or_default().to_owned())
    }

    /// What `helm` is told beside the defaults of the stores' chart: `STORES_VALUES`, or on the test cluster that the
    /// images are its own.
    pub fn stores_values(&self) -> Vec<String> {
        let own = concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/stores-values.yaml");
        let values = env::var("STORES_VALUES")
            .ok()
            .or_else(|| self.cluster.is_some().then(|| own.to_owned()));
        values.map_or_else(Vec::new, |values| vec!["--values".to_owned(), values])
    }

    /// Name of the Secret with which images are pulled, if `PULL_SECRET` names one. On the test cluster none are.
    pub fn pull_secret(&self) -> Option<String> {
        env::var("PULL_SECRET").ok().filter(|_| self.cluster.is_none())
    }

    /// Has the pods of a namespace pull their images with that Secret, if there is one: with a copy of it, which is made from
    /// the kubeconfig's namespace, as their ServiceAccount `default` says.
    ///
    /// # Errors
    /// If there is no such Secret, or the API server refuses its copy.
    pub fn let_pull(&self, namespace: &str) -> Result<()> {
        let Some(name) = self.pull_secret() else {
            return Ok(());
        };
        let secret: Value =
            serde_json::from_str(&self.kubectl(&["get", "secret", &name, "--output=json"])?)?;
        let copy = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
                          "type": secret.get("type"), "data": secret.get("data")});
        self.apply(namespace, &copy)?;
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"},
                             "imagePullSecrets": [{"name": name}]});
        self.apply(namespace, &account)
    }

    /// Applies an object in a namespace.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn apply(&self, namespace: &str, object: &Value) -> Result<()> {
        self.apply_manifest(namespace, &object.to_string())
    }

    /// Applies all objects of a manifest in a namespace.
    ///
    /// # Errors
    /// If the API server refuses one.
    pub fn apply_manifest(&self, namespace: &str, manifest: &str) -> Result<()> {
        let args = ["apply", "--namespace", namespace, "--filename", "-"];
        self.run("kubectl", &args, Some(manifest)).map(drop)
    }

    /// Creates an object in a namespace; says whether it was not there already.
    ///
    /// # Errors
    /// If the API server refuses it for another reason.
    pub fn create(&self, namespace: &str, object: &Value) -> Result<bool> {
        let args = ["create", "--namespace", namespace, "--filename", "-"];
        match self.run("kubectl", &args, Some(&object.to_string())) {
            Err(error) if error.to_string().contains("(AlreadyExists)") => Ok(false),
            created => created.map(|_| true),
        }
    }

    /// Ends a pod as if its node had failed: its program gets no signal that it could hear. On the test cluster; the nodes of
    /// another one are not ours, so that there it is only deleted without grace.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill_pod(&self, namespace: &str, pod: &str, program: &str) -> Result<()> {
        if self.cluster.is_some() {
            let uid = self.get(namespace, &format!("pod/{pod}"), "{.metadata.uid}")?;
            let processes = processes_of(&uid, program)?;
            ensure!(!processes.is_empty(), "pod {pod} has no process {program}");
            for process in processes {
                // Those of a parent that has been killed may end by themselves.
                let _ = kill(process, Signal::SIGKILL);
            }
        }
        let now = ["--grace-period=0", "--force", "--wait=false"];
        let delete = ["delete", "pod", pod, "--namespace", namespace];
        self.kubectl(&[&delete[..], &now[..]].concat()).map(drop)
    }

    /// One value of an object, by JSONPath.
    ///
    /// # Errors
    /// If the object does not exist.
    pub fn get(&self, namespace: &str, object: &str, path: &str) -> Result<String> {
        self.kubectl(&[
            "get",
            object,
            "--namespace",
            namespace,
            "--output",
            &format!("jsonpath={path}"),
        ])
    }

    /// Waits for a condition as `kubectl wait --for` understands it.
    ///
    /// # Errors
    /// If it does not come true in time: with what the namespace's pods and events say.
    pub fn wait(&self, namespace: &str, object: &str, condition: &str, patience: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", patience.as_secs());
        let waited = self.kubectl(&[
            "wait",
            object,
            "--namespace",
            namespace,
            &format!("--for={condition}"),
            &timeout,
        ]);
        waited.map(drop).with_context(|| self.circumstances(namespace))
    }

    /// What a person would look at when something does not come up: pods, events, the logs of pods that are not ready.
    pub fn circumstances(&self, namespace: &str) -> String {
        let ask = |args: &[&str]| {
            let args: Vec<&str> = args.iter().chain(&["--namespace", namespace]).copied().collect();
            self.kubectl(&args).unwrap_or_else(|error| format!("{error:#}"))
        };
        let pods = ask(&["get", "pods", "--output=wide"]);
        let events = ask(&["get", "events", "--sort-by=.lastTimestamp"]);
        let not_ready =
            "--output=jsonpath={.items[?(@.status.containerStatuses[0].ready==false)].metadata.name}";
        let names = ask(&["get", "pods", not_ready]);
        let log = |pod| format!("--- log of {pod} ---\n{}", ask(&["logs", pod, "--tail=20"]));
        let logs: Vec<String> = names.split_whitespace().map(log).collect();
        format!("{pods}\n{events}\n{}", logs.join("\n"))
    }

    fn run(&self, program: &str, args: &[&str], input: Option<&str>) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args).envs(self.environment.iter().cloned());
        command.stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{program}`"))?;
        if let (Some(input), Some(mut pipe)) = (input, child.stdin.take()) {
            pipe.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "`{program} {}` failed: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The processes of a pod on this machine whose program's name begins like this; a pod has one more that only holds its
/// namespaces.
pub(crate) fn processes_of(uid: &str, program: &str) -> Result<Vec<Pid>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let is_ours = || read("cgroup").replace('_', "-").contains(uid);
        if read("comm").starts_with(program) && is_ours() {
            processes.push(Pid::from_raw(pid));
        }
    }
    Ok(processes)
}

/// What tells objects until it is dropped; see [`Session::watch`].
#[derive(Debug, Default)]
pub struct Watching(Arc<Mutex<Watched>>);

#[derive(Debug, Default)]
struct Watched {
    child: Option<Child>,
    enough: bool,
}

impl Watched {
    /// The output of another `kubectl`, unless it is enough.
    fn begin(&mut self, session: &Session, args: &[String]) -> Result<Option<ChildStdout>> {
        self.end();
        if self.enough {
            return Ok(None);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut child = session.follow(&args)?;
        let output = child.stdout.take();
        self.child = Some(child);
        Ok(output)
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut watched = locked(&self.0);
        watched.enough = true;
        watched.end();
    }
}

fn locked(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

/// So many lines of what pods complained of are shown of a test that has failed.
const COMPLAINTS: usize = 50;

/// A namespace of one test, deleted (without waiting) when the test ends. The test is then a case in the figures of the
/// end-to-end run.
#[derive(Debug)]
pub struct Namespace<'a> {
    session: &'a Session,
    /// The line of the case in the figures.
    line: Option<Line>,
    /// Its name.
    pub name: String,
}

#[derive(Debug)]
struct Line {
    case: String,
    started: Instant,
    figures: Mutex<Map<String, Value>>,
}

impl<'a> Namespace<'a> {
    /// Makes the namespace `exchange-e2e-<case>` anew, restricted as production should be.
    ///
    /// # Errors
    /// If an earlier one of the name cannot be removed.
    pub fn new(session: &'a Session, case: &str) -> Result<Self> {
        let line = Line {
            case: case.to_owned(),
            started: Instant::now(),
            figures: Mutex::default(),
        };
        let mut namespace = Self::beside(session, case)?;
        namespace.line = Some(line);
        Ok(namespace)
    }

    /// One that is no case in the figures: another one of a test that has one, or that of a benchmark, whose figures are in a
    /// file of their own.
    ///
    /// # Errors
    /// If an earlier one of the name cannot be removed.
    pub fn beside(session: &'a Session, case: &str) -> Result<Self> {
        Origin::of_run();
        let name = format!("exchange-e2e-{case}");
        session.kubectl(&["delete", "namespace", &name, "--ignore-not-found", "--wait"])?;
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": &name, "labels": labels}});
        session.run(
            "kubectl",
            &["create", "--filename", "-"],
            Some(&object.to_string()),
        )?;
        Ok(Self {
            session,
            line: None,
            name,
        })
    }

    /// Notes something that the case has measured. Keys name their unit.
    pub fn note(&self, key: &str, value: impl Into<Value>) {
        if let Some(line) = &self.line
            && let Ok(mut figures) = line.figures.lock()
        {
            figures.insert(key.to_owned(), value.into());
        }
    }

    /// Prints what the exchange's pods have complained of, as long as they are there: soon they are not.
    fn show_complaints(&self) {
        let asked = format!(
            "logs --selector app.kubernetes.io/name=exchange --prefix --tail=-1 --ignore-errors --max-log-requests=50 -n {}",
            self.name
        );
        let asked: Vec<&str> = asked.split(' ').collect();
        let Ok(logs) = self.session.kubectl(&asked) else {
            return;
        };
        let counts = |line: &&str| line.contains(r#""warn""#) || line.contains(r#""error""#);
        let complaints: Vec<&str> = logs.lines().filter(counts).collect();
        let last = complaints.len().saturating_sub(COMPLAINTS);
        let last = complaints.get(last..).unwrap_or_default().join("\n");
        let _ = writeln!(io::stderr(), "{last}");
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if let Some(line) = &self.line {
            let failed = std::thread::panicking();
            if failed {
                self.show_complaints();
            }
            self.note("verdict", if failed { "failed" } else { "passed" });
            self.note("seconds", line.started.elapsed().as_secs());
            if let Ok(figures) = line.figures.lock() {
                let _ = results::add_case(&line.case, figures.clone());
            }
        }
        let _ = self.session.kubectl(&[
            "delete",
            "namespace",
            &self.name,
            "--ignore-not-found",
            "--wait=false",
        ]);
    }
}
