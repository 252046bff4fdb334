//! The server of [`testbed::gate`]: what the API server asks, and what tests tell it.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use axum::{Json, Router, extract::State, http::StatusCode, routing::post, serve::Listener};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde::Deserialize;
use serde_json::{Value, json};
use testbed::gate::{ADMISSION_PORT, CONTROL_PORT, Hold, Seen, TLS_DIRECTORY, Write};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// For a TLS handshake; who connects and says nothing must not keep others waiting.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Gate {
    seen: Seen,
    hold: Option<Hold>,
    /// How many writes have come that count for the hold.
    counted: usize,
    /// For the write that is held, and for each time that it was tried again.
    verdicts: Vec<oneshot::Sender<bool>>,
}

type Shared = Arc<Mutex<Gate>>;

#[derive(Deserialize)]
struct Review {
    request: Request,
}

/// What of the API server's question counts.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    operation: String,
    resource: Resource,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Resource {
    resource: String,
}

/// Serves both ports until the process ends.
pub(crate) async fn serve() -> Result<()> {
    let gate = Shared::default();
    let admission = Router::new()
        .route("/", post(admit))
        .with_state(Arc::clone(&gate));
    let control = Router::new()
        .route("/hold", post(hold))
        .route("/seen", post(seen))
        .route("/decide", post(decide))
        .with_state(gate);
    let tls = Tls::bind(ADMISSION_PORT).await?;
    let plain = TcpListener::bind(("127.0.0.1", CONTROL_PORT)).await?;
    tokio::try_join!(axum::serve(tls, admission), axum::serve(plain, control))?;
    Ok(())
}

fn lock(gate: &Shared) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn admit(State(gate): State<Shared>, Json(Review { request }): Json<Review>) -> Json<Value> {
    let resource = match request.sub_resource.as_str() {
        "" => request.resource.resource,
        sub => format!("{}/{sub}", request.resource.resource),
    };
    let verb = request.operation.to_lowercase();
    let verdict = lock(&gate).pass(Write {
        verb,
        resource,
        name: request.name,
    });
    let allowed = match verdict {
        None => true,
        // Whoever asked and does not wait any more has let go of the verdict, too.
        Some(verdict) => verdict.await.unwrap_or(true),
    };
    let mut response = json!({"uid": request.uid, "allowed": allowed});
    if !allowed && let Value::Object(response) = &mut response {
        response.insert(
            "status".into(),
            json!({"code": 403, "message": "the gate is shut"}),
        );
    }
    Json(json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}))
}

impl Gate {
    /// Notes a write, and says whose verdict it has to wait for, if it has to.
    fn pass(&mut self, write: Write) -> Option<oneshot::Receiver<bool>> {
        if self.seen.held.as_ref() != Some(&write) {
            self.seen.writes.push(write.clone());
            let hold = self.hold.as_ref().filter(|hold| hold.counts(&write))?;
            self.counted += 1;
            if self.counted <= hold.number {
                return None;
            }
            self.hold = None;
            self.seen.held = Some(write);
        }
        let (sender, receiver) = oneshot::channel();
        self.verdicts.push(sender);
        Some(receiver)
    }
}

async fn hold(State(gate): State<Shared>, Json(hold): Json<Option<Hold>>) {
    *lock(&gate) = Gate {
        hold,
        ..Gate::default()
    };
}

async fn seen(State(gate): State<Shared>) -> Json<Seen> {
    Json(lock(&gate).seen.clone())
}

async fn decide(State(gate): State<Shared>, Json(allowed): Json<bool>) -> StatusCode {
    let mut gate = lock(&gate);
    if gate.seen.held.take().is_none() {
        return StatusCode::CONFLICT;
    }
    for verdict in gate.verdicts.drain(..) {
        // Who asked may have gone away: then there is nothing left to decide.
        let _ = verdict.send(allowed);
    }
    StatusCode::OK
}

/// Connections with TLS.
struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Tls {
    async fn bind(port: u16) -> Result<Self> {
        let file = |name: &str| Path::new(TLS_DIRECTORY).join(name);
        let certificate = CertificateDer::from_pem_file(file("tls.crt")).context("tls.crt")?;
        let key = PrivateKeyDer::from_pem_file(file("tls.key")).context("tls.key")?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        Ok(Self {
            listener: TcpListener::bind(("0.0.0.0", port)).await?,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }
}

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            // A readiness probe says nothing.
            if let Ok(Ok(stream)) = timeout(HANDSHAKE_LIMIT, self.acceptor.accept(stream)).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
