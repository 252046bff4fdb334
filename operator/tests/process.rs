//! The operator as a process, on an API server that says only what the test wants: what the kubelet is told, what is in its
//! log, and how it ends.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on panics"
)]

use std::{
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket};

/// For what does not take long, on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/ns/leases";

/// An API server with nothing but one Lease.
#[derive(Default)]
struct Server {
    /// Every request is answered with an error.
    away: bool,
    /// Nothing but the Lease is answered.
    silent: bool,
    /// Whoever has the Lease renews it between any two looks at it.
    renewed: bool,
    lease: Value,
    version: u64,
}

type Shared = Arc<Mutex<Server>>;

async fn answer(State(server): State<Shared>, method: Method, uri: Uri, body: Bytes) -> Response {
    let refusal = |code: StatusCode| {
        let reason = if code == StatusCode::NOT_FOUND {
            "NotFound"
        } else {
            ""
        };
        let status = json!({"kind": "Status", "status": "Failure", "reason": reason, "message": "as the test wants",
                            "code": code.as_u16()});
        (code, status.to_string()).into_response()
    };
    if server.lock().unwrap().away {
        return refusal(StatusCode::INTERNAL_SERVER_ERROR);
    }
    if uri.path().starts_with(LEASES) {
        let mut server = server.lock().unwrap();
        if method == Method::GET {
            if server.renewed {
                server.version += 1;
                let version = server.version.to_string();
                server.lease["metadata"]["resourceVersion"] = json!(version);
            }
            return match &server.lease {
                Value::Null => refusal(StatusCode::NOT_FOUND),
                lease => lease.to_string().into_response(),
            };
        }
        server.version += 1;
        let mut lease: Value = serde_json::from_slice(&body).unwrap();
        lease["metadata"]["resourceVersion"] = json!(server.version.to_string());
        server.lease = lease;
        return server.lease.to_string().into_response();
    }
    let silent = server.lock().unwrap().silent;
    if silent || uri.query().is_some_and(|query| query.contains("watch=true")) {
        // Nothing ever happens.
        std::future::pending::<()>().await;
    }
    json!({"metadata": {"resourceVersion": "1"}, "items": []})
        .to_string()
        .into_response()
}

/// An operator called `me` that runs on such a server.
struct World {
    server: Shared,
    operator: Child,
    port: u16,
    /// As long as it is kept, nobody else is given the port. It does not listen, so who may reuse the address can have it.
    _port: TcpSocket,
    _directory: TempDir,
}

impl World {
    async fn start(server: Server) -> Self {
        let server = Arc::new(Mutex::new(server));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&server));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{api}")}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubeconfig");
        std::fs::write(&file, kubeconfig.to_string()).unwrap();
        let kept = TcpSocket::new_v4().unwrap();
        kept.set_reuseaddr(true).unwrap();
        kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = kept.local_addr().unwrap().port();
        let operator = Command::new(env!("CARGO_BIN_EXE_exchange-operator"))
            .args(["run", "--identity", "me", "--lease-namespace", "ns"])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .env("KUBECONFIG", &file)
            // Where nobody is. The API server is beside it: kube alone would take it nevertheless.
            .env("HTTPS_PROXY", "http://127.0.0.2:1")
            .env("NO_PROXY", "127.0.0.1")
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            server,
            operator,
            port,
            _port: kept,
            _directory: directory,
        }
    }

    /// What a probe is told; nothing while nobody listens.
    async fn probe(&self, path: &str) -> Option<(u16, String)> {
        // The tests' own environment may have a proxy, too.
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.get(format!("http://127.0.0.1:{}{path}", self.port));
        let answer = request.send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    async fn until_probed(&self, path: &str, code: u16) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let probed = self.probe(path).await;
            if probed.as_ref().is_some_and(|(is, _)| *is == code) {
                return;
            }
            assert!(Instant::now() < deadline, "{path}: {probed:?} instead of {code}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_leading(&self) {
        let deadline = Instant::now() + PATIENCE;
        // It knows a moment after the Lease says so.
        while !self
            .probe("/metrics")
            .await
            .is_some_and(|(_, page)| page.contains("exchange_operator_leader 1\n"))
        {
            assert!(Instant::now() < deadline, "it does not lead");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(self.server.lock().unwrap().lease["spec"]["holderIdentity"], "me");
    }

    /// Tells it to end, and waits until it has: how it ended, how long that took, and its whole log.
    async fn terminate(mut self) -> (ExitStatus, Duration, Vec<Value>) {
        let (begun, pid) = (Instant::now(), self.operator.id().to_string());
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        let output = self.operator.stdout.take().unwrap();
        let log = tokio::task::spawn_blocking(move || std::io::read_to_string(output).unwrap());
        let log = tokio::time::timeout(PATIENCE, log).await.unwrap().unwrap();
        let status = self.operator.wait().unwrap();
        let lines = log
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")));
        (status, begun.elapsed(), lines.collect())
    }

    /// Tells it to end: it does soon, and leaves the Lease to others. Returns its whole log.
    async fn gives_up_its_lease(self) -> Vec<Value> {
        let server = Arc::clone(&self.server);
        let (status, took, log) = self.terminate().await;
        assert!(status.success(), "{status}");
        assert!(took < Duration::from_secs(10), "it took {took:?}");
        assert_eq!(server.lock().unwrap().lease["spec"]["holderIdentity"], "");
        log
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.operator.kill();
        let _ = self.operator.wait();
    }
}

fn says(log: &[Value], message: &str) -> bool {
    log.iter().any(|line| line["message"] == message)
}

/// Scripts read 2 as a release that was given up.
#[test]
fn a_wrong_command_line_of_the_plugin_is_an_error_like_any_other() {
    for (args, code) in [
        (&["status", "--timeout", "15m"][..], 1),
        (&["status", "--wait", "--timeout", "15 apples"], 1),
        (&["nonsense"], 1),
        (&["--help"], 0),
    ] {
        let plugin = Command::new(env!("CARGO_BIN_EXE_kubectl-exchange"))
            .args(args)
            .output()
            .unwrap();
        assert_eq!(plugin.status.code(), Some(code), "{args:?}: {plugin:?}");
    }
}

#[tokio::test]
async fn told_to_end_a_leader_gives_up_its_lease() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let away = Server {
        away: true,
        ..Server::default()
    };
    let world = World::start(away).await;
    // An API server that is away is no reason to be started anew, and none to be counted on.
    world.until_probed("/readyz", 503).await;
    world.until_probed("/livez", 200).await;
    world.server.lock().unwrap().away = false;
    world.until_probed("/readyz", 200).await;
    world.until_leading().await;
    world.until_probed("/livez", 200).await;

    let log = world.gives_up_its_lease().await;
    for line in &log {
        for field in ["@timestamp", "log.level", "log.logger", "message", "service.name"] {
            assert!(line[field].is_string(), "no {field}: {line}");
        }
    }
    for message in [
        "this operator leads",
        "the operator is told to end",
        "the lease is given up",
    ] {
        assert!(says(&log, message), "{message}: {log:#?}");
    }
    assert_eq!(log.last().unwrap()["message"], "the operator has ended");
}

#[tokio::test]
async fn who_stands_by_is_ready_and_leaves_the_lease_alone() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = Server {
        lease: json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                      "metadata": {"name": "exchange-operator", "namespace": "ns", "resourceVersion": "0"},
                      "spec": {"holderIdentity": "another", "leaseDurationSeconds": 4}}),
        renewed: true,
        ..Server::default()
    };
    let world = World::start(server).await;
    world.until_probed("/readyz", 200).await;
    world.until_probed("/livez", 200).await;
    let (status, _, log) = world.terminate().await;
    assert!(status.success(), "{status}");
    assert!(!says(&log, "this operator leads"), "{log:#?}");
    assert!(!says(&log, "the lease is given up"), "{log:#?}");
}

#[tokio::test]
async fn told_to_end_before_it_has_begun_a_leader_waits_for_nothing() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let silent = Server {
        silent: true,
        ..Server::default()
    };
    let world = World::start(silent).await;
    world.until_leading().await;
    world.gives_up_its_lease().await;
}
