//! `testbed up`: from nothing, from leavings, or from a running cluster, to a cluster that is ready.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::{
    api::core::v1::{ComponentStatus, Node, PersistentVolumeClaim, ServiceAccount},
    kube_aggregator::pkg::apis::apiregistration::v1::APIService,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{GroupVersionKind, TypeMeta},
    discovery::pinned_kind,
};

use crate::{
    addons,
    cluster::{self, Cluster, NODE, Origin},
    components::{self, DNS_READY_PORT, PROXY_METRICS_PORT},
    images::{self, Archive},
    pki, preflight,
    progress::{Step, say},
    results::repository,
    sandbox, supervisor,
    tools::Tools,
};

/// How long a warm machine may take to a ready cluster before we show the logs and give up.
const PATIENCE: Duration = Duration::from_mins(3);

/// How long the supervisor may take to its first sign of life.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(10);

/// What a start cost.
#[derive(Debug, Default)]
pub struct Times {
    /// Building the components, for this start or an earlier one: [`Tools::built_in`].
    pub build: Duration,
    /// That it was for this one: [`Tools::built_now`].
    pub built_now: bool,
    /// From the first process to a Ready node.
    pub node_ready: Duration,
    /// From the first process to a cluster with all add-ons.
    pub all_ready: Duration,
    /// The cluster was there before: the other times say nothing about a start.
    pub was_running: bool,
}

/// Starts the cluster, or finishes a start, or finds that there is nothing to do.
///
/// # Errors
/// One sentence for wrong use; the last lines of the logs if a component does not come up.
pub fn up(cluster: &Cluster) -> Result<Times> {
    // A cluster that runs has shown that it can, and has taken its room.
    if sandbox::supervisor(cluster).is_none() {
        preflight::check()?;
    }
    let tools = Tools::ensure()?;
    let helper = images::helper(&tools)?;
    let lock = cluster::starting()?;
    let started = Instant::now();
    let mut times = Times {
        build: tools.built_in,
        built_now: tools.built_now,
        was_running: sandbox::supervisor(cluster).is_some(),
        ..Times::default()
    };
    if times.was_running {
        tell_differences(cluster, &tools)?;
    } else {
        prepare(cluster, &tools)?;
        start(cluster, &lock)?;
    }
    drop(lock);
    match complete(cluster, &tools, &helper, started, &mut times) {
        // It has been killed since we found it, perhaps just before, and was alive for the moment that its end takes.
        Err(_) if times.was_running && sandbox::supervisor(cluster).is_none() => up(cluster),
        Err(error) => bail!("{error:#}\n{}", last_words(cluster)),
        Ok(()) => Ok(times),
    }
}

/// Says how a cluster that runs is not the one that this code would start.
fn tell_differences(cluster: &Cluster, tools: &Tools) -> Result<()> {
    let differences = cluster.differs_from(&origin(cluster, tools)?);
    for difference in &differences {
        say(format!("Cluster {:?} runs, but {difference}.", cluster.name()));
    }
    if !differences.is_empty() {
        say(format!(
            "  `make down NAME={0}` ends it; another NAME than {0} makes one beside it.",
            cluster.name()
        ));
    }
    Ok(())
}

/// Waits for what the supervisor starts, and adds what only a running cluster can be given.
fn complete(
    cluster: &Cluster,
    tools: &Tools,
    helper: &Archive,
    started: Instant,
    times: &mut Times,
) -> Result<()> {
    let mut step = Step::start(format!("cluster {:?}: starting", cluster.name()));
    wait(cluster, &mut step, "containerd's socket", || {
        Ok(UnixStream::connect(cluster.containerd_socket()).is_ok())
    })?;
    images::load(cluster, tools, helper)?;
    runtime()?.block_on(async {
        wait_async(cluster, &mut step, "the API server", async || {
            api_is_ready(cluster).await
        })
        .await?;
        let client = client(&cluster.kubeconfig()).await?;
        wait_async(cluster, &mut step, "the node", async || {
            node_is_ready(&client).await
        })
        .await?;
        times.node_ready = started.elapsed();
        apply_addons(cluster, &client).await?;
        wait_async(cluster, &mut step, "the ServiceAccount of pods", async || {
            pods_are_admitted(&client).await
        })
        .await?;
        wait_async(cluster, &mut step, "the control plane", async || {
            control_plane_is_healthy(&client).await
        })
        .await?;
        wait_async(cluster, &mut step, "DNS", async || dns_is_ready(cluster)).await?;
        wait_async(cluster, &mut step, "Services", async || {
            services_are_there(cluster)
        })
        .await?;
        wait_async(cluster, &mut step, "a volume", async || {
            volumes_are_made(&client).await
        })
        .await?;
        wait_async(cluster, &mut step, "metrics", async || {
            metrics_are_served(&client).await
        })
        .await
    })?;
    times.all_ready = started.elapsed();
    step.done();
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

/// Removes what an earlier, killed start has left, and writes all files of a new cluster.
fn prepare(cluster: &Cluster, tools: &Tools) -> Result<()> {
    cluster.check_home_is_ours()?;
    if cluster.home().exists() {
        say(format!(
            "Cluster {:?}: removing what an earlier start has left.",
            cluster.name()
        ));
        sandbox::destroy_locked(cluster)?;
    }
    cluster.make_home()?;
    for directory in [
        cluster.pki(),
        cluster.conf(),
        cluster.logs(),
        cluster.home().join("tmp"),
    ] {
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    cluster.claim_link()?;
    pki::write_all(cluster)?;
    components::write_configuration(cluster, tools)?;
    cluster.note_origin(&origin(cluster, tools)?)
}

fn origin(cluster: &Cluster, tools: &Tools) -> Result<Origin> {
    Ok(Origin {
        clone: repository()?.to_owned(),
        components: components::fingerprint(cluster, tools)?,
    })
}

/// Namespaces can only be made by a process with a single thread, so by one of its own. It inherits the lock of all
/// starts, and so goes on as part of this start if we are killed.
fn start(cluster: &Cluster, lock: &fs::File) -> Result<()> {
    let launched = Command::new("/proc/self/exe")
        .args(["launch", "--name", cluster.name()])
        .stdin(lock.try_clone()?)
        .output()
        .context("cannot start the launcher")?;
    if !launched.status.success() {
        bail!(
            "{}",
            String::from_utf8_lossy(&launched.stderr)
                .trim()
                .trim_start_matches("error: ")
        );
    }
    // Until it shows that it lives, another start would take what is there for leavings.
    sandbox::wait_until("the supervisor", SUPERVISOR_PATIENCE, || {
        sandbox::supervisor(cluster).is_some()
    })
    .with_context(|| last_lines(cluster, "supervisor"))
}

fn wait(
    cluster: &Cluster,
    step: &mut Step,
    what: &str,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let mut waiting = Waiting::new(what);
    while !waiting.look(cluster, step, holds())? {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

async fn wait_async(
    cluster: &Cluster,
    step: &mut Step,
    what: &str,
    holds: impl AsyncFn() -> Result<bool>,
) -> Result<()> {
    let mut waiting = Waiting::new(what);
    while !waiting.look(cluster, step, holds().await)? {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

struct Waiting<'a> {
    what: &'a str,
    deadline: Instant,
    /// A single look may find no lock held while the supervisor is being started.
    dead_looks: u32,
}

impl<'a> Waiting<'a> {
    fn new(what: &'a str) -> Self {
        Self {
            what,
            deadline: Instant::now() + PATIENCE,
            dead_looks: 0,
        }
    }

    /// True if the condition holds. A failed look is a reason to look again, until the deadline.
    fn look(&mut self, cluster: &Cluster, step: &mut Step, seen: Result<bool>) -> Result<bool> {
        if matches!(seen, Ok(true)) {
            return Ok(true);
        }
        step.update(&format!("waiting for {}{}", self.what, dying(cluster)));
        self.dead_looks = if sandbox::supervisor(cluster).is_some() {
            0
        } else {
            self.dead_looks + 1
        };
        if self.dead_looks > 40 {
            bail!("the supervisor has ended while we waited for {}", self.what);
        }
        if Instant::now() > self.deadline {
            let why = seen
                .err()
                .map(|error| format!(" ({error:#})"))
                .unwrap_or_default();
            bail!("{} not ready after {} s{why}", self.what, PATIENCE.as_secs());
        }
        Ok(false)
    }
}

/// Names the components that keep dying, so that nobody waits for the deadline to learn it.
fn dying(cluster: &Cluster) -> String {
    let status = supervisor::read_status(cluster);
    let mut names: Vec<String> = status
        .iter()
        .filter(|(_, state)| state.restarts >= 3)
        .map(|(name, state)| {
            format!(
                "; {name} has died {} times, see {}",
                state.restarts,
                cluster.log_of(name).display()
            )
        })
        .collect();
    names.sort();
    names.concat()
}

/// The last lines of a component's log.
fn last_lines(cluster: &Cluster, component: &str) -> String {
    let path = cluster.log_of(component);
    let text = fs::read_to_string(&path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(15);
    format!(
        "--- {} ---\n{}",
        path.display(),
        lines.get(from..).unwrap_or_default().join("\n")
    )
}

/// The last lines of who may be why a start has failed: the supervisor if it has ended, else the components that died, or those
/// that matter most if none did.
fn last_words(cluster: &Cluster) -> String {
    let status = supervisor::read_status(cluster);
    let mut names: Vec<&str> = status
        .iter()
        .filter(|(_, s)| s.restarts > 0 || s.pid.is_none())
        .map(|(n, _)| n.as_str())
        .collect();
    if sandbox::supervisor(cluster).is_none() {
        names = vec!["supervisor"];
    } else if names.is_empty() {
        names = vec!["kube-apiserver", "kubelet", "containerd"];
    }
    names.sort_unstable();
    let logs: Vec<String> = names.iter().map(|name| last_lines(cluster, name)).collect();
    format!("{}\nAll logs: {}", logs.join("\n"), cluster.logs().display())
}

/// A client of a cluster's API server that gives up early, for polling.
///
/// # Errors
/// If the kubeconfig cannot be read.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    config.connect_timeout = Some(Duration::from_secs(2));
    config.read_timeout = Some(Duration::from_secs(10));
    config.default_retry = false;
    config.proxy_url = None; // the cluster is on this machine, whatever the environment says
    Ok(Client::try_from(config)?)
}

async fn api_is_ready(cluster: &Cluster) -> Result<bool> {
    let request = http::Request::get("/readyz").body(Vec::new())?;
    Ok(client(&cluster.kubeconfig()).await?.request_text(request).await? == "ok")
}

async fn node_is_ready(client: &Client) -> Result<bool> {
    let node = Api::<Node>::all(client.clone()).get_opt(NODE).await?;
    let conditions = node.and_then(|node| node.status?.conditions).unwrap_or_default();
    Ok(conditions
        .iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True"))
}

/// Whether the controller manager has made what every pod needs, unless it names another one: without it the API server admits
/// none.
async fn pods_are_admitted(client: &Client) -> Result<bool> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), "default");
    Ok(accounts.get_opt("default").await?.is_some())
}

/// Asks scheduler, controller manager and etcd for their health. They listen on the node's loopback interface, where the API
/// server reaches them.
async fn control_plane_is_healthy(client: &Client) -> Result<bool> {
    let components = Api::<ComponentStatus>::all(client.clone());
    for component in components.list(&ListParams::default()).await? {
        let conditions = component.conditions.clone().unwrap_or_default();
        let is_healthy = conditions.iter().any(|condition| condition.status == "True");
        ensure!(
            is_healthy,
            "{} is not healthy: {conditions:?}",
            component.name_any()
        );
    }
    Ok(true)
}

/// Asks CoreDNS itself: it is ready when it has seen all Services.
fn dns_is_ready(cluster: &Cluster) -> Result<bool> {
    Ok(ask(cluster, DNS_READY_PORT, "/ready")?.contains(" 200 "))
}

/// Whether the kernel has taken kube-proxy's rules. Its health says so too early.
fn services_are_there(cluster: &Cluster) -> Result<bool> {
    let metrics = ask(cluster, PROXY_METRICS_PORT, "/metrics")?;
    let mut lines = metrics.lines();
    let last = lines.find(|line| line.starts_with("kubeproxy_sync_proxy_rules_last_timestamp_seconds"));
    let time = last.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(time.is_some_and(|time| time > 0.0))
}

/// What a component on the node answers.
fn ask(cluster: &Cluster, port: u16, path: &str) -> Result<String> {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let address = format!("{}:{port}", cluster.link()?.node_address());
    let mut stream = TcpStream::connect_timeout(&address.parse()?, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether a volume has been made: the provisioner has no health to ask for.
async fn volumes_are_made(client: &Client) -> Result<bool> {
    let claims = Api::<PersistentVolumeClaim>::namespaced(client.clone(), addons::NAMESPACE);
    let claim = claims.get(addons::TRIAL_CLAIM).await?;
    let is_bound = claim.status.and_then(|status| status.phase).as_deref() == Some("Bound");
    if !is_bound {
        let chosen = Patch::Merge(addons::trial_node());
        claims
            .patch(addons::TRIAL_CLAIM, &PatchParams::default(), &chosen)
            .await?;
    }
    Ok(is_bound)
}

async fn metrics_are_served(client: &Client) -> Result<bool> {
    let service = Api::<APIService>::all(client.clone())
        .get_opt("v1beta1.metrics.k8s.io")
        .await?;
    let conditions = service
        .and_then(|service| service.status?.conditions)
        .unwrap_or_default();
    if !conditions
        .iter()
        .any(|condition| condition.type_ == "Available" && condition.status == "True")
    {
        return Ok(false);
    }
    let request = http::Request::get("/apis/metrics.k8s.io/v1beta1/nodes").body(Vec::new())?;
    let nodes: serde_json::Value = client.request(request).await?;
    Ok(nodes.pointer("/items/0/usage/cpu").is_some())
}

async fn apply_addons(cluster: &Cluster, client: &Client) -> Result<()> {
    for object in addons::objects(cluster)? {
        let object: DynamicObject = serde_json::from_value(object)?;
        let TypeMeta { api_version, kind } = object.types.clone().context("an add-on without a kind")?;
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let (resource, capabilities) =
            pinned_kind(client, &GroupVersionKind::gvk(group, version, &kind)).await?;
        let api: Api<DynamicObject> = match capabilities.scope {
            kube::discovery::Scope::Cluster => Api::all_with(client.clone(), &resource),
            kube::discovery::Scope::Namespaced => {
                Api::namespaced_with(client.clone(), addons::NAMESPACE, &resource)
            }
        };
        let name = object.metadata.name.clone().context("an add-on without a name")?;
        api.patch(
            &name,
            &PatchParams::apply("testbed").force(),
            &Patch::Apply(&object),
        )
        .await
        .with_context(|| format!("cannot apply {kind} {name}"))?;
    }
    Ok(())
}
