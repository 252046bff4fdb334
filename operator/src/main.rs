//! The operator's command line.

use std::{io::Write as _, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use exchange_operator::{
    api,
    controller::{self, Context},
    http::{self, Health},
    lease::Contender,
    metrics::Metrics,
    observe::pods::Pods,
    proxy, telemetry,
    watch::{Heard, Watches},
};
use kube::{Api, Client, Config, config::Kubeconfig};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Of who knows no more whether it leads.
const ENDED: &str = "the election has ended by itself";
/// How long passes under way may take to end when the operator is told to stop.
const FAREWELL: Duration = Duration::from_secs(15);

/// Runs a crypto exchange on Kubernetes and releases it without losing a request.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Look after the ExchangeDeployments of a cluster, or of one namespace.
    Run(RunArgs),
    /// Print the CustomResourceDefinition as YAML.
    Crd,
}

/// The flags of `run`.
#[derive(Args)]
struct RunArgs {
    /// The only namespace to look after. Without it: all.
    #[arg(long, env = "EXCHANGE_OPERATOR_NAMESPACE")]
    namespace: Option<String>,
    /// Where the Lease is by which several operators agree who works. Without it: where the operator runs.
    #[arg(long, env = "EXCHANGE_OPERATOR_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of that Lease.
    #[arg(
        long,
        env = "EXCHANGE_OPERATOR_LEASE_NAME",
        default_value = "exchange-operator"
    )]
    lease_name: String,
    /// A name that no other operator has. In a pod: the pod's.
    #[arg(long, env = "EXCHANGE_OPERATOR_IDENTITY")]
    identity: Option<String>,
    /// Where /metrics, /livez and /readyz are served.
    #[arg(long, env = "EXCHANGE_OPERATOR_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Crd => std::io::stdout().write_all(api::crd_yaml()?.as_bytes())?,
        Command::Run(args) => tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?
            .block_on(run(args))?,
    }
    Ok(())
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        bail!("another TLS provider is installed already");
    }
    telemetry::init();
    let identity = args
        .identity
        .or_else(|| std::env::var("HOSTNAME").ok())
        .context("--identity is needed where there is no HOSTNAME")?;
    let config = Config::infer().await.context("no cluster is configured")?;
    let mut config = proxy::as_kubectl_does(config, Kubeconfig::read().ok().as_ref(), None);
    // A pass that fails is the retry: it is counted, limited in time, and looks again first.
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(5));
    let client = Client::try_from(config.clone())?;
    // The lease must not wait behind other requests.
    config.read_timeout = Some(Duration::from_secs(2));
    let lease_namespace = args
        .lease_namespace
        .unwrap_or_else(|| config.default_namespace.clone());
    let contender = Contender {
        leases: Api::namespaced(Client::try_from(config)?, &lease_namespace),
        name: args.lease_name,
        identity: identity.clone(),
    };
    info!(
        labels.identity = identity,
        "the operator starts, for {}",
        args.namespace.as_deref().unwrap_or("all namespaces")
    );

    let (metrics, heard, stop) = (Metrics::new(), Heard::default(), CancellationToken::new());
    let (leads, mut leading) = watch::channel(false);
    let (reached, has_reached) = watch::channel(false);
    let health = Health {
        metrics: metrics.clone(),
        heard: heard.clone(),
        reached: has_reached,
    };
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("--listen {}", args.listen))?;
    let served = tokio::spawn(http::serve(listener, health, stop.clone()));
    let resign = CancellationToken::new();
    let election = tokio::spawn({
        let resign = resign.clone();
        async move { contender.run(leads, reached, resign).await }
    });
    tokio::spawn(stop_on_signal(stop.clone())?);

    let watches = Watches {
        client: client.clone(),
        namespace: args.namespace,
        metrics: metrics.clone(),
        heard: heard.clone(),
    };
    let pods = Pods::new().context("failed to build the client that asks pods")?;
    while !stop.is_cancelled() {
        tokio::select! {
            leads = leading.wait_for(|leads| *leads) => drop(leads.context(ENDED)?),
            () = stop.cancelled() => break,
        }
        info!("this operator leads");
        metrics.leads(true);
        // What was remembered in an earlier term is too old.
        let context = Arc::new(Context::new(&client, pods.clone(), &identity, metrics.clone()));
        let leave = CancellationToken::new();
        let mut to_the_end = leading.clone();
        let mut work = std::pin::pin!(controller::run(watches.clone(), context, leave.clone()));
        tokio::select! {
            () = &mut work => bail!("the controller ended by itself"),
            // Dropped, the work stops at its next step. What is on its way is fenced.
            lost = leading.wait_for(|leads| !*leads) => {
                lost.context(ENDED)?;
                warn!("this operator does not lead any more");
            }
            () = stop.cancelled() => {
                leave.cancel();
                tokio::select! {
                    ended = timeout(FAREWELL, work) => if ended.is_err() {
                        warn!("passes under way were cut off");
                    },
                    _ = to_the_end.wait_for(|leads| !*leads) => warn!("passes under way were cut off with the lease"),
                }
            }
        }
        metrics.leads(false);
        heard.forget();
    }
    resign.cancel();
    election.await?;
    served.await??;
    info!("the operator has ended");
    Ok(())
}

fn stop_on_signal(stop: CancellationToken) -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("the operator is told to end");
        stop.cancel();
    })
}
