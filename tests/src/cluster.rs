//! A cluster's name, its files, its addresses: what every other module needs to agree on.

use std::{
    env,
    fmt::Display,
    fs,
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    progress, sandbox,
    tools::{Tools, hex},
};

/// The only node of a cluster.
pub const NODE: &str = "node";
/// Addresses of the links between clusters and the host: a /30 for each.
const LINKS_CIDR: &str = "10.231.0.0/16";
/// Addresses of pods; the same in every cluster, because each has a network of its own.
pub const POD_CIDR: &str = "10.244.0.0/16";
/// Addresses of Services.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// The ClusterIP of `kubernetes.default`, first of [`SERVICE_CIDR`].
pub const API_SERVICE: &str = "10.96.0.1";
/// The domain of Services.
pub const DOMAIN: &str = "cluster.local";

/// The longest name: it becomes part of file names, cgroups and socket paths, and those are limited to 107 bytes.
pub(crate) const NAME_MAX: usize = 20;

/// The kernel's limit of a socket's path.
const SOCKET_PATH_MAX: usize = 107;

/// Where clusters live unless `TESTBED_HOME` says otherwise.
const DEFAULT_HOME: &str = "/var/tmp/exchange-testbed";

/// Where kubectl and helm put what they remember of a cluster: it goes with the cluster.
const MEMORIES: [(&str, &str); 4] = [
    ("KUBECACHEDIR", "memory/kubectl"),
    ("HELM_CACHE_HOME", "memory/helm/cache"),
    ("HELM_CONFIG_HOME", "memory/helm/config"),
    ("HELM_DATA_HOME", "memory/helm/data"),
];

/// A file in every cluster's home: what has none is not ours to remove.
const MARK: &str = ".exchange-testbed";

/// One test cluster on this machine, running or not.
#[derive(Clone, Debug)]
pub struct Cluster {
    name: String,
    home: PathBuf,
}

impl Cluster {
    /// Names a cluster. Touches nothing.
    ///
    /// # Errors
    /// If the name is not a DNS label of at most 20 characters, or `TESTBED_HOME` is unusable.
    pub fn named(name: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let edges = name.starts_with('-') || name.ends_with('-');
        ensure!(
            !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(allowed) && !edges,
            "--name {name:?} is not usable: at most {NAME_MAX} lower-case letters, digits and inner dashes, such as \
             `ci-2`"
        );
        Ok(Self {
            name: name.to_owned(),
            home: home()?.join(name),
        })
    }

    /// Every cluster that has left files on this machine, running or not.
    ///
    /// # Errors
    /// If that cannot be seen.
    pub fn all() -> Result<Vec<Self>> {
        let home = home()?;
        let unseen = || format!("cannot look for clusters in {}; are you root?", home.display());
        let entries = match fs::read_dir(&home) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(unseen)?,
        };
        let mut clusters = Vec::new();
        for entry in entries {
            let entry = entry.with_context(unseen)?;
            let is_one =
                entry.path().is_dir() && entry.path().join(MARK).try_exists().with_context(unseen)?;
            if is_one {
                clusters.push(Self {
                    name: entry.file_name().to_string_lossy().into_owned(),
                    home: entry.path(),
                });
            }
        }
        clusters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(clusters)
    }

    /// The name given with `--name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory that holds everything of this cluster.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Keys and certificates.
    pub fn pki(&self) -> PathBuf {
        self.home.join("pki")
    }

    /// Configuration files of the components.
    pub fn conf(&self) -> PathBuf {
        self.home.join("conf")
    }

    /// A kubeconfig by the name of who uses it.
    pub fn kubeconfig_of(&self, user: &str) -> PathBuf {
        self.conf().join(format!("{user}.kubeconfig"))
    }

    /// The administrator's kubeconfig, usable from the host and from inside.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_of("admin")
    }

    /// The log of a component, kept over restarts.
    pub fn log_of(&self, component: &str) -> PathBuf {
        self.logs().join(format!("{component}.log"))
    }

    /// The directory of the components' logs.
    pub fn logs(&self) -> PathBuf {
        self.home.join("logs")
    }

    /// Locked for as long as the supervisor lives.
    pub fn lock_file(&self) -> PathBuf {
        self.home.join("lock")
    }

    /// The supervisor's process id as the host sees it.
    pub fn pid_file(&self) -> PathBuf {
        self.home.join("supervisor.pid")
    }

    /// What the supervisor says about its components, as JSON.
    pub fn status_file(&self) -> PathBuf {
        self.home.join("status.json")
    }

    /// The directory that stands for `/var/lib`, `/var/log` or `/run` inside the cluster.
    pub fn inner(&self, what: &str) -> PathBuf {
        self.home.join("root").join(what)
    }

    /// containerd's socket as seen from the host.
    pub fn containerd_socket(&self) -> PathBuf {
        self.inner("run").join("containerd/containerd.sock")
    }

    /// The cgroup below which all pods live, as the kubelet names it. Clusters of one name in two homes have two: what
    /// follows the dot is in no name.
    pub fn cgroup(&self) -> String {
        let cgroup = format!("/exchange-testbed-{}", self.name);
        if self.home.parent() == Some(Path::new(DEFAULT_HOME)) {
            return cgroup;
        }
        let hash = self.hash().chars().take(8).collect::<String>();
        format!("{cgroup}.{hash}")
    }

    /// The hardware address of the link's interface on the host, by which it is known as this cluster's: the number in
    /// its name may have become that of a cluster in another home.
    pub fn mark_of_link(&self) -> String {
        let hash = self.hash();
        // Locally administered, for one interface.
        let bytes = (0..10).step_by(2).filter_map(|start| hash.get(start..start + 2));
        bytes.fold("02".to_owned(), |address, byte| format!("{address}:{byte}"))
    }

    /// Another one for each home of each cluster.
    pub(crate) fn hash(&self) -> String {
        hex(&Sha256::digest(self.home.as_os_str().as_encoded_bytes()))
    }

    /// The number that keeps this cluster's link apart from the others'.
    ///
    /// # Errors
    /// If the cluster was never started.
    pub fn link(&self) -> Result<Link> {
        let path = self.home.join("link");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("there is no cluster {:?}: `make cluster` starts one", self.name))?;
        Ok(Link(
            text.trim()
                .parse()
                .with_context(|| format!("{} is damaged", path.display()))?,
        ))
    }

    /// Makes the cluster's home.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn make_home(&self) -> Result<()> {
        make_private(&self.home)?;
        fs::write(self.home.join(MARK), "")
            .with_context(|| format!("cannot write to {}", self.home.display()))
    }

    /// Removes the home; the mark last, so that whoever is interrupted here can be followed by another.
    ///
    /// # Errors
    /// If something in it resists.
    pub fn remove_home(&self) -> Result<()> {
        let remove = || {
            for entry in fs::read_dir(&self.home)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else if entry.file_name() != MARK {
                    fs::remove_file(entry.path())?;
                }
            }
            fs::remove_dir_all(&self.home)
        };
        match remove() {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                bail!("cannot remove {}: {error}", self.home.display())
            }
            _ => Ok(()),
        }
    }

    /// Fails if the home is there and was not made by [`Self::make_home`]. An empty one may be: the mark comes first and
    /// goes last.
    ///
    /// # Errors
    /// One sentence that names the directory.
    pub fn check_home_is_ours(&self) -> Result<()> {
        let is_empty = || fs::read_dir(&self.home).is_ok_and(|mut entries| entries.next().is_none());
        ensure!(
            !self.home.exists() || self.home.join(MARK).is_file() || is_empty(),
            "{} is not the home of a test cluster, so it is left alone: choose another --name or TESTBED_HOME",
            self.home.display()
        );
        Ok(())
    }

    /// What to say when the cluster is needed and is not there.
    pub fn does_not_run(&self) -> String {
        format!(
            "cluster {:?} does not run: `make cluster NAME={0}` starts it",
            self.name
        )
    }

    /// Takes the first link number that no other cluster and nothing else on this machine uses. The caller holds
    /// [`starting`]'s lock.
    ///
    /// # Errors
    /// If all 256 are taken.
    pub fn claim_link(&self) -> Result<Link> {
        let others = Self::all()?.into_iter().filter(|other| other.name != self.name);
        let claimed: Vec<Link> = others.filter_map(|other| other.link().ok()).collect();
        let interfaces = sandbox::run("ip", &["address"])?;
        let Some(link) = free_link(&claimed, &interfaces) else {
            bail!(
                "no free network for the cluster: all of {LINKS_CIDR}, or every interface from testbed0 to testbed255, \
                 is in use. `ip address` shows by what; `testbed down --all` ends the test clusters"
            );
        };
        fs::write(self.home.join("link"), link.0.to_string())?;
        Ok(link)
    }

    /// Notes who starts the cluster: [`Self::differs_from`] compares.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn note_origin(&self, origin: &Origin) -> Result<()> {
        let path = self.home.join("origin.json");
        fs::write(&path, serde_json::to_string(origin)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Who has started it, as far as that is noted.
    pub fn origin(&self) -> Option<Origin> {
        let text = fs::read_to_string(self.home.join("origin.json")).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// What somebody should know who would have started this cluster himself, but has found it.
    pub fn differs_from(&self, own: &Origin) -> Vec<String> {
        let Some(found) = self.origin() else {
            return vec!["nobody knows by which version of the code it was started".to_owned()];
        };
        let mut differences = Vec::new();
        if found.clone != own.clone {
            differences.push(format!(
                "it was started from {}, which may use it now, load images of its own into it, or end it",
                found.clone.display()
            ));
        }
        if found.components != own.components {
            differences.push("its components have other versions or settings than this code's".to_owned());
        }
        differences
    }

    /// What a shell needs to speak with this cluster, by the programs of these directories; what they remember goes with it.
    pub fn exports(&self, directories: impl Display) -> String {
        let (variable, memory) = MEMORIES[0];
        format!(
            "  export KUBECONFIG={}\n  export {variable}={}\n  export PATH=\"{directories}:$PATH\"{}",
            self.kubeconfig().display(),
            self.home().join(memory).display(),
            exports_beside_the_proxy(|variable| env::var(variable).ok())
        )
    }

    /// An environment in which `kubectl`, `helm` and `ctr` speak with this cluster.
    pub fn environment(&self, tools: &Tools) -> Vec<(String, String)> {
        vec![
            ("KUBECONFIG".into(), self.kubeconfig().display().to_string()),
            ("PATH".into(), tools.path_variable()),
            (
                "CONTAINERD_ADDRESS".into(),
                self.containerd_socket().display().to_string(),
            ),
            ("CONTAINERD_NAMESPACE".into(), "k8s.io".into()),
        ]
        .into_iter()
        .chain(MEMORIES.map(|(variable, directory)| {
            let directory = self.home().join(directory);
            (variable.to_owned(), directory.display().to_string())
        }))
        .chain(beside_the_proxy(|variable| env::var(variable).ok()))
        .collect()
    }
}

/// Where a proxy is set, for what is fetched, it is not asked for what is on this machine. Some programs read one of the
/// variables, some the other.
fn beside_the_proxy(environment: impl Fn(&str) -> Option<String>) -> [(String, String); 2] {
    const VARIABLES: [&str; 2] = ["NO_PROXY", "no_proxy"];
    let set = VARIABLES.iter().filter_map(|variable| environment(variable));
    let own = [LINKS_CIDR, POD_CIDR, SERVICE_CIDR, DOMAIN].map(str::to_owned);
    let hosts: Vec<String> = set.filter(|hosts| !hosts.is_empty()).chain(own).collect();
    VARIABLES.map(|variable| (variable.to_owned(), hosts.join(",")))
}

/// What a shell needs beside that where a proxy is set.
fn exports_beside_the_proxy(environment: impl Fn(&str) -> Option<String>) -> String {
    let proxies = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];
    let is_set = |variable: &&str| {
        let set = environment(variable).or_else(|| environment(&variable.to_lowercase()));
        set.is_some_and(|proxy| !proxy.is_empty())
    };
    if !proxies.iter().any(is_set) {
        return String::new();
    }
    let exports =
        beside_the_proxy(environment).map(|(variable, hosts)| format!("\n  export {variable}={hosts}"));
    exports.concat()
}

/// Who starts a cluster, and of what.
#[derive(Debug, Deserialize, Serialize)]
pub struct Origin {
    /// The repository's directory.
    pub clone: PathBuf,
    /// A hash of the components and their configuration.
    pub components: String,
}

/// The veth pair between the host and a cluster, and its /30 network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link(u8);

/// The first link that is not claimed, and whose names and addresses `ip address` does not show.
fn free_link(claimed: &[Link], interfaces: &str) -> Option<Link> {
    let free = |link: &Link| {
        let used = [
            format!(" {}:", link.host_interface()),
            format!(" {}@", link.host_interface()),
            format!(" {}:", link.inner_interface()),
            format!(" {}@", link.inner_interface()),
            format!(" 10.231.{}.", link.0),
        ];
        !claimed.contains(link) && !used.iter().any(|used| interfaces.contains(used))
    };
    (0..=u8::MAX).map(Link).find(free)
}

impl Link {
    /// The interface on the host.
    pub fn host_interface(self) -> String {
        format!("testbed{}", self.0)
    }

    /// The interface that moves into the cluster, under its name on the way there.
    pub fn inner_interface(self) -> String {
        format!("testbed{}-in", self.0)
    }

    /// The host's address.
    pub fn host_address(self) -> String {
        format!("10.231.{}.1", self.0)
    }

    /// The node's address: the API server and DNS listen there.
    pub fn node_address(self) -> String {
        format!("10.231.{}.2", self.0)
    }
}

/// Where clusters live. A directory on a real disk (images are unpacked there), not below the ones that a
/// cluster replaces with its own.
pub(crate) fn home() -> Result<PathBuf> {
    let home = env::var_os("TESTBED_HOME").map_or_else(|| PathBuf::from(DEFAULT_HOME), PathBuf::from);
    ensure!(
        home.is_absolute(),
        "TESTBED_HOME must be an absolute path, not {}",
        home.display()
    );
    if let Some(directory) = sandbox::hidden_by(&home) {
        bail!(
            "TESTBED_HOME must not be below {directory}, as {} is: inside the cluster that is another directory",
            home.display()
        );
    }
    let socket = home
        .join("x".repeat(NAME_MAX))
        .join("root/run/containerd/containerd.sock.ttrpc");
    ensure!(
        socket.as_os_str().len() <= SOCKET_PATH_MAX,
        "TESTBED_HOME {} is too long: sockets below it may have {SOCKET_PATH_MAX} bytes",
        home.display()
    );
    // A link to another disk is as good as where it leads, if it is the user's: anybody can put one into the usual place.
    let is_chosen_link = env::var_os("TESTBED_HOME").is_some() && home.read_link().is_ok();
    Ok(if is_chosen_link {
        home.canonicalize()
            .with_context(|| format!("TESTBED_HOME {} leads nowhere", home.display()))?
    } else {
        home
    })
}

/// Makes the directory of all clusters, for this user only, and locks it: one start or end at a time. The directory
/// itself is the lock, so that no file is left.
///
/// # Errors
/// If others could write there: they could make root write where they like.
pub fn starting() -> Result<fs::File> {
    let home = home()?;
    loop {
        make_private(&home)?;
        if let Some(lock) = lock(&home)? {
            return Ok(lock);
        }
    }
}

/// The same lock, if the directory is there.
///
/// # Errors
/// As [`starting`].
pub fn ending() -> Result<Option<fs::File>> {
    let home = home()?;
    while home.exists() {
        if let Some(lock) = lock(&home)? {
            return Ok(Some(lock));
        }
    }
    Ok(None)
}

/// Removes the directory of all clusters if there is none any more; for who has its lock. One that somebody has chosen stays.
pub fn leave() {
    if env::var_os("TESTBED_HOME").is_none() {
        // A directory that is not empty resists.
        let _ = fs::remove_dir(DEFAULT_HOME);
    }
}

/// Nothing if the directory is removed while its lock is waited for.
fn lock(home: &Path) -> Result<Option<fs::File>> {
    let Some(found) = unless_gone(fs::symlink_metadata(home))? else {
        return Ok(None);
    };
    ensure!(
        found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0,
        "{} is a link, belongs to somebody else or can be written by others: set TESTBED_HOME to another directory",
        home.display()
    );
    let Some(lock) = unless_gone(fs::File::open(home))? else {
        return Ok(None);
    };
    progress::lock(&lock, "the start or end of another cluster")
        .with_context(|| format!("cannot lock {}", home.display()))?;
    let now = unless_gone(fs::symlink_metadata(home))?.map(|now| now.ino());
    Ok((now == Some(lock.metadata()?.ino())).then_some(lock))
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn make_private(path: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot create {}; are you root?", path.display()))
}

/// Where built tools and images are kept between clusters and clones.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("TESTBED_CACHE") {
        return Ok(dir.into());
    }
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    Ok(base
        .context("neither TESTBED_CACHE nor HOME is set: no place for the built tools")?
        .join("exchange-testbed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_with_a_sentence() {
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a b",
            "a/b",
            "..",
            "a-name-that-is-too-long-for-a-socket",
        ] {
            let error = Cluster::named(bad).expect_err(bad).to_string();
            assert!(
                error.contains("--name") && error.contains("lower-case"),
                "{bad:?}: {error}"
            );
        }
        Cluster::named("ci-2").expect("a good name");
    }

    #[test]
    fn a_link_is_free_if_nobody_has_its_names_or_addresses() {
        let interfaces = "1: lo: <LOOPBACK,UP> mtu 65536\n    inet 127.0.0.1/8 scope host lo\n\
                          7: testbed0: <BROADCAST> mtu 1500\n9: testbed1-in@if8: <BROADCAST> mtu 1500\n\
                          11: dummy0: <BROADCAST> mtu 1500\n    inet 10.231.2.9/24 scope global dummy0\n";
        assert_eq!(free_link(&[Link(3)], interfaces), Some(Link(4)));
        assert_eq!(free_link(&[], ""), Some(Link(0)));
        let all: Vec<Link> = (0..=u8::MAX).map(Link).collect();
        assert_eq!(free_link(&all, ""), None);
    }

    #[test]
    fn clusters_of_one_name_in_two_homes_share_nothing() {
        let [here, there] = [DEFAULT_HOME, "/srv/clusters"].map(|home| Cluster {
            name: "dev".into(),
            home: Path::new(home).join("dev"),
        });
        assert_eq!(here.cgroup(), "/exchange-testbed-dev");
        assert!(
            there.cgroup().starts_with("/exchange-testbed-dev."),
            "{}",
            there.cgroup()
        );
        assert_ne!(here.mark_of_link(), there.mark_of_link());
        assert_eq!(here.mark_of_link().len(), "02:00:00:00:00:00".len());
    }

    #[test]
    fn a_proxy_is_not_asked_for_the_cluster() {
        let own = "10.231.0.0/16,10.244.0.0/16,10.96.0.0/16,cluster.local";
        let unset = beside_the_proxy(|_| None);
        assert_eq!(unset.map(|(_, hosts)| hosts), [own, own]);
        let set = beside_the_proxy(|variable| (variable == "no_proxy").then(|| "intranet,10.0.0.1".into()));
        let [upper, lower] = set;
        assert_eq!(upper, ("NO_PROXY".into(), format!("intranet,10.0.0.1,{own}")));
        assert_eq!(lower, ("no_proxy".into(), format!("intranet,10.0.0.1,{own}")));

        assert_eq!(exports_beside_the_proxy(|_| None), "");
        let behind = |variable: &str| (variable == "https_proxy").then(|| "http://proxy:3128".to_owned());
        assert_eq!(
            exports_beside_the_proxy(behind),
            format!("\n  export NO_PROXY={own}\n  export no_proxy={own}")
        );
    }

    #[test]
    fn a_home_that_the_cluster_would_not_see_is_refused() {
        assert_eq!(
            sandbox::hidden_by(Path::new("/var/lib/jenkins/x")),
            Some("/var/lib")
        );
        assert_eq!(sandbox::hidden_by(Path::new("/var/run/x")), Some("/run")); // a symbolic link
        assert_eq!(sandbox::hidden_by(Path::new("/var/tmp/x")), None);
    }
}
