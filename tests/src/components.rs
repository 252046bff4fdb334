//! The processes of a cluster: their command lines, their configuration files, and when each may start.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    addons::{HELPER_IMAGE, NAMESPACE},
    cluster::{Cluster, DOMAIN, NODE, POD_CIDR, SERVICE_CIDR},
    operator::OPERATOR_NAMESPACE,
    tools::{Tools, hex},
    up,
};

/// Where CoreDNS says over HTTP whether it is ready.
pub const DNS_READY_PORT: u16 = 8181;
/// Where kube-proxy tells, among its metrics, when the kernel last took its rules.
pub const PROXY_METRICS_PORT: u16 = 10249;

/// A process that the supervisor keeps running.
#[derive(Clone, Debug)]
pub struct Component {
    /// What logs and messages call it.
    pub name: String,
    /// The binary.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables beside the supervisor's own.
    pub environment: Vec<(String, String)>,
    after: Gate,
    /// How the gate asks the API server.
    kubeconfig: PathBuf,
}

/// What must be true before a component is started, also before it is started again.
#[derive(Clone, Debug)]
enum Gate {
    Nothing,
    /// Something listens there.
    Listening(SocketAddr),
    /// The socket is there: a kubelet without its container runtime gives up.
    File(PathBuf),
    /// The API server answers. Its port is open seconds before that, and clients give up on what it says then.
    ApiServer,
    /// The node is registered: kube-proxy ends itself when the node's address changes, from none too.
    NodeRegistered,
}

impl Component {
    /// True if what the component needs is there.
    pub fn may_start(&self) -> bool {
        match &self.after {
            Gate::Nothing => true,
            Gate::Listening(address) => {
                TcpStream::connect_timeout(address, Duration::from_millis(200)).is_ok()
            }
            Gate::File(path) => path.exists(),
            Gate::ApiServer => ask_api_server(&self.kubeconfig, "/livez").is_ok(),
            Gate::NodeRegistered => {
                ask_api_server(&self.kubeconfig, &format!("/api/v1/nodes/{NODE}")).is_ok()
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn ask_api_server(kubeconfig: &Path, path: &str) -> Result<String> {
    let client = up::client(kubeconfig).await?;
    Ok(client
        .request_text(http::Request::get(path).body(Vec::new())?)
        .await?)
}

/// Everything the supervisor runs. Order does not matter: each waits for its own gate.
///
/// # Errors
/// If the cluster has no link yet.
pub fn all(cluster: &Cluster, tools: &Tools) -> Result<Vec<Component>> {
    let parts = Parts {
        cluster,
        tools,
        address: cluster.link()?.node_address(),
    };
    let mut all = parts.control_plane();
    all.extend(parts.node());
    all.extend(parts.addons());
    Ok(all)
}

/// What command lines are put together from.
struct Parts<'a> {
    cluster: &'a Cluster,
    tools: &'a Tools,
    address: String,
}

impl Parts<'_> {
    fn control_plane(&self) -> Vec<Component> {
        let audit_log = self.cluster.log_of("audit").display().to_string();
        let etcd = self.component(
            "etcd",
            "etcd",
            Gate::Nothing,
            flags(&[
                ("name", NODE),
                ("data-dir", "/var/lib/etcd"),
                ("listen-client-urls", "http://127.0.0.1:2379"),
                ("advertise-client-urls", "http://127.0.0.1:2379"),
                ("listen-peer-urls", "http://127.0.0.1:2380"),
                ("initial-advertise-peer-urls", "http://127.0.0.1:2380"),
                ("initial-cluster", "node=http://127.0.0.1:2380"),
            ]),
        );
        let apiserver = self.component(
            "kube-apiserver",
            "kube-apiserver",
            Gate::Listening(([127, 0, 0, 1], 2379).into()),
            flags(&[
                ("etcd-servers", "http://127.0.0.1:2379"),
                ("advertise-address", &self.address),
                ("service-cluster-ip-range", SERVICE_CIDR),
                ("allow-privileged", "true"),
                ("authorization-mode", "Node,RBAC"),
                ("enable-admission-plugins", "NodeRestriction"),
                ("client-ca-file", &self.key("ca.crt")),
                ("tls-cert-file", &self.key("apiserver.crt")),
                ("tls-private-key-file", &self.key("apiserver.key")),
                (
                    "service-account-issuer",
                    &format!("https://kubernetes.default.svc.{DOMAIN}"),
                ),
                ("service-account-key-file", &self.key("service-accounts.pub")),
                (
                    "service-account-signing-key-file",
                    &self.key("service-accounts.key"),
                ),
                ("kubelet-certificate-authority", &self.key("ca.crt")),
                (
                    "kubelet-client-certificate",
                    &self.key("apiserver-kubelet-client.crt"),
                ),
                ("kubelet-client-key", &self.key("apiserver-kubelet-client.key")),
                // The node's name does not resolve anywhere.
                ("kubelet-preferred-address-types", "InternalIP"),
                ("requestheader-client-ca-file", &self.key("front-proxy-ca.crt")),
                ("requestheader-allowed-names", "front-proxy-client"),
                ("requestheader-extra-headers-prefix", "X-Remote-Extra-"),
                ("requestheader-group-headers", "X-Remote-Group"),
                ("requestheader-username-headers", "X-Remote-User"),
                ("proxy-client-cert-file", &self.key("front-proxy-client.crt")),
                ("proxy-client-key-file", &self.key("front-proxy-client.key")),
                ("enable-aggregator-routing", "true"),
                ("audit-policy-file", &self.conf("audit.json")),
                ("audit-log-path", &audit_log),
                ("audit-log-maxsize", "50"),
                ("audit-log-maxbackup", "20"),
            ]),
        );
        let controller_manager = self.component(
            "kube-controller-manager",
            "kube-controller-manager",
            Gate::ApiServer,
            flags(&[
                ("kubeconfig", &self.kubeconfig("controller-manager")),
                (
                    "authentication-kubeconfig",
                    &self.kubeconfig("controller-manager"),
                ),
                ("authorization-kubeconfig", &self.kubeconfig("controller-manager")),
                ("bind-address", "127.0.0.1"),
                ("leader-elect", "false"),
                ("use-service-account-credentials", "true"),
                ("root-ca-file", &self.key("ca.crt")),
                (
                    "service-account-private-key-file",
                    &self.key("service-accounts.key"),
                ),
                ("cluster-cidr", POD_CIDR),
                ("flex-volume-plugin-dir", "/var/lib/kubelet/plugins-exec"),
            ]),
        );
        let scheduler = self.component(
            "kube-scheduler",
            "kube-scheduler",
            Gate::ApiServer,
            flags(&[
                ("kubeconfig", &self.kubeconfig("scheduler")),
                ("authentication-kubeconfig", &self.kubeconfig("scheduler")),
                ("authorization-kubeconfig", &self.kubeconfig("scheduler")),
                ("bind-address", "127.0.0.1"),
                ("leader-elect", "false"),
            ]),
        );
        vec![etcd, apiserver, controller_manager, scheduler]
    }

    fn node(&self) -> Vec<Component> {
        let containerd = self.component(
            "containerd",
            "containerd",
            Gate::Nothing,
            flags(&[("config", &self.conf("containerd.toml"))]),
        );
        let kubelet = self.component(
            "kubelet",
            "kubelet",
            Gate::File("/run/containerd/containerd.sock".into()),
            flags(&[
                ("config", &self.conf("kubelet.json")),
                ("kubeconfig", &self.kubeconfig("kubelet")),
                ("hostname-override", NODE),
                ("node-ip", &self.address),
            ]),
        );
        let proxy = self.component(
            "kube-proxy",
            "kube-proxy",
            Gate::NodeRegistered,
            flags(&[("config", &self.conf("kube-proxy.json"))]),
        );
        vec![containerd, kubelet, proxy]
    }

    /// What a bare node lacks, as processes beside it: no images to build, nothing to wait for but themselves.
    fn addons(&self) -> Vec<Component> {
        let dns = self.component(
            "coredns",
            "coredns",
            Gate::ApiServer,
            vec!["-conf".into(), self.conf("Corefile")],
        );
        let metrics = self.component(
            "metrics-server",
            "metrics-server",
            Gate::NodeRegistered,
            flags(&[
                ("kubeconfig", &self.kubeconfig("addons")),
                ("authentication-kubeconfig", &self.kubeconfig("addons")),
                ("authorization-kubeconfig", &self.kubeconfig("addons")),
                ("bind-address", &self.address),
                ("secure-port", "4443"),
                ("tls-cert-file", &self.key("metrics-server.crt")),
                ("tls-private-key-file", &self.key("metrics-server.key")),
                ("kubelet-preferred-address-types", "InternalIP"),
                ("kubelet-certificate-authority", &self.key("ca.crt")),
                ("metric-resolution", "10s"),
                ("kubelet-request-timeout", "5s"),
            ]),
        );
        let mut volume_args = vec!["start".to_owned()];
        volume_args.extend(flags(&[
            ("config", &self.conf("volumes.json")),
            ("helper-pod-file", &self.conf("volume-helper.yaml")),
            ("helper-image", HELPER_IMAGE),
            ("namespace", NAMESPACE),
            ("service-account-name", "default"),
            ("kubeconfig", &self.kubeconfig("addons")),
        ]));
        let volumes = self.component(
            "local-path-provisioner",
            "local-path-provisioner",
            Gate::ApiServer,
            volume_args,
        );
        vec![dns, metrics, volumes]
    }

    fn component(&self, name: &str, binary: &str, after: Gate, args: Vec<String>) -> Component {
        Component {
            name: name.to_owned(),
            program: self.tools.path(binary),
            args,
            environment: vec![
                ("PATH".into(), self.tools.path_variable()),
                (
                    "TMPDIR".into(),
                    self.cluster.home().join("tmp").display().to_string(),
                ),
                // Processors are scarcer than memory: garbage is collected a third as often as by default.
                ("GOGC".into(), "300".into()),
            ],
            after,
            kubeconfig: self.cluster.kubeconfig(),
        }
    }

    fn conf(&self, name: &str) -> String {
        self.cluster.conf().join(name).display().to_string()
    }

    fn key(&self, name: &str) -> String {
        self.cluster.pki().join(name).display().to_string()
    }

    fn kubeconfig(&self, user: &str) -> String {
        self.cluster.kubeconfig_of(user).display().to_string()
    }
}

fn flags(flags: &[(&str, &str)]) -> Vec<String> {
    flags
        .iter()
        .map(|(name, value)| format!("--{name}={value}"))
        .collect()
}

/// Writes the components' configuration files.
///
/// # Errors
/// If a file cannot be written.
pub fn write_configuration(cluster: &Cluster, tools: &Tools) -> Result<()> {
    let conf = cluster.conf();
    fs::create_dir_all(conf.join("cni"))?;
    for (name, text) in configuration(cluster, tools)? {
        fs::write(conf.join(name), text)
            .with_context(|| format!("cannot write {name} in {}", conf.display()))?;
    }
    Ok(())
}

/// This code's components for a cluster, with their configuration, as a hash.
///
/// # Errors
/// If the cluster has no link yet.
pub fn fingerprint(cluster: &Cluster, tools: &Tools) -> Result<String> {
    let mut hash = Sha256::new();
    for component in all(cluster, tools)? {
        hash.update(component.program.as_os_str().as_encoded_bytes());
        hash.update(format!("{:?}", component.args));
    }
    hash.update(format!("{:?}", configuration(cluster, tools)?));
    Ok(hex(&hash.finalize()))
}

/// The configuration files by name.
fn configuration(cluster: &Cluster, tools: &Tools) -> Result<Vec<(&'static str, String)>> {
    let conf = cluster.conf();
    let pki = cluster.pki();
    let address = cluster.link()?.node_address();

    // What the operator did and was refused: the rights that its chart asks for are compared with it.
    let audit = json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "Metadata", "userGroups": [format!("system:serviceaccounts:{OPERATOR_NAMESPACE}")]},
            // Of operators that look after one namespace, what they write. Nothing else in a pod writes, but controllers.
            {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
            {"level": "Metadata", "userGroups": ["system:serviceaccounts"], "verbs": ["create", "update", "patch", "delete"]},
            {"level": "None"},
        ],
    });

    let bridge = json!({
        "cniVersion": "1.0.0", "name": "pods", "plugins": [
            // hairpinMode: a pod that reaches itself through its own Service needs its packet back.
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": POD_CIDR}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        ],
    });
    let containerd = format!(
        r#"version = 3
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{HELPER_IMAGE}"

[plugins.'io.containerd.cri.v1.runtime']
  # A machine without CAP_SYS_RESOURCE may not lower a process's oom_score_adj, and no pod would start.
  restrict_oom_score_adj = true
  # A profile would be the whole machine's, and stay.
  disable_apparmor = true
  # The kubelet measures containers itself. Unasked, containerd does so as well, every second.
  stats_collect_period = "10m"

[plugins.'io.containerd.cri.v1.runtime'.cni]
  # Else by a program, for each pod.
  use_internal_loopback = true
  bin_dirs = ["{bin}"]
  conf_dir = "{conf}/cni"
"#,
        bin = tools.dir().display(),
        conf = conf.display(),
    );

    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
                           "x509": {"clientCAFile": pki.join("ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki.join("kubelet-serving.crt"), "tlsPrivateKeyFile": pki.join("kubelet-serving.key"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs", "cgroupRoot": cluster.cgroup(), "failCgroupV1": false,
        "enforceNodeAllocatable": [],
        "clusterDNS": [address], "clusterDomain": DOMAIN,
        // The host's resolver cannot be reached from here, and nothing outside may be.
        "resolvConf": "",
        "failSwapOn": false, "makeIPTablesUtilChains": false, "serializeImagePulls": false, "maxPods": 250,
        // The machine's disk may be nearly full for reasons that are none of the cluster's business: less than `up` asks for,
        // however large the disk is.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "256Mi", "imagefs.available": "256Mi",
                         "nodefs.inodesFree": "1%", "imagefs.inodesFree": "1%"},
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "volumePluginDir": "/var/lib/kubelet/plugins-exec",
        "nodeStatusUpdateFrequency": "5s",
    });

    let proxy = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": cluster.kubeconfig_of("proxy")},
        "metricsBindAddress": format!("{address}:{PROXY_METRICS_PORT}"),
        "mode": "nftables", "clusterCIDR": POD_CIDR, "hostnameOverride": NODE,
        // The limits belong to the host.
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    let dns = format!(
        "{DOMAIN} in-addr.arpa {{\n  bind {address}\n  errors\n  ready {address}:{DNS_READY_PORT}\n  kubernetes {{\n    kubeconfig \
         {kubeconfig}\n    pods insecure\n    ttl 5\n  }}\n  cache 5\n}}\n",
        kubeconfig = cluster.kubeconfig_of("addons").display(),
    );

    let volumes = json!({"nodePathMap": [
        {"node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": ["/var/lib/volumes"]},
    ]});
    let helper = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "volume-helper"},
        "spec": {"containers": [{"name": "helper", "image": HELPER_IMAGE, "imagePullPolicy": "Never"}]},
    });
    Ok(vec![
        ("audit.json", audit.to_string()),
        ("cni/10-pods.conflist", bridge.to_string()),
        ("containerd.toml", containerd),
        ("kubelet.json", kubelet.to_string()),
        ("kube-proxy.json", proxy.to_string()),
        ("Corefile", dns),
        ("volumes.json", volumes.to_string()),
        ("volume-helper.yaml", helper.to_string()),
    ])
}
