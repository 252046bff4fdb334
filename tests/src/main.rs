//! `testbed`: starts, looks at and ends test clusters.

use std::{
    io::{ErrorKind, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use serde_json::json;
use testbed::{
    alone,
    cluster::Cluster,
    demo,
    images::{self, Archive},
    kubectl::Session,
    preflight,
    progress::{Step, say},
    results::{self, Origin},
    sandbox, supervisor,
    tools::{self, Tools},
    up,
};

/// A real Kubernetes on one machine, for tests: no container engine, no registry, nothing left behind.
#[derive(Parser)]
#[command(name = "testbed", version)]
struct Cli {
    /// Which cluster; several can run side by side.
    #[arg(long, global = true, env = "TESTBED_NAME", default_value = "dev")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start the cluster, or finish or repair an earlier start. Returns when it is ready.
    Up,
    /// End the cluster and remove everything it has left.
    Down {
        /// End every cluster of this machine.
        #[arg(long)]
        all: bool,
    },
    /// Say whether this machine can run a cluster, and what it lacks. Builds nothing.
    Preflight,
    /// Show the components, their restarts and the logs' place. Fails if the cluster does not run.
    Status,
    /// Print the path of the administrator's kubeconfig.
    Kubeconfig,
    /// Load images from OCI archives into the cluster.
    Load {
        /// Archives, as `buildah push … oci-archive:FILE:NAME` or `make images` write them.
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Run a command in the cluster's network, with its kubectl, helm and ctr.
    Exec {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run a command unless another one, so run, uses the cluster of this name. What that command runs in this way is a part
    /// of it.
    Alone {
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Build the pinned components if needed and print the directory of their binaries.
    Tools {
        /// Only what the exchange's tests need: nats-server. Others may be there, or may come.
        #[arg(long)]
        first: bool,
    },
    /// Build the images of the stores, the exchange and the operator from binaries in a directory, and print their
    /// archives' paths.
    Images {
        /// The repository's root.
        #[arg(long, default_value = ".")]
        repository: PathBuf,
        /// Where cargo has put the release binaries. Without it, only the images of the stores are built.
        #[arg(long)]
        binaries: Option<PathBuf>,
        /// The tag of the exchange's and the operator's images.
        #[arg(long, default_value = "dev")]
        tag: String,
        /// One more release of the exchange, under this tag, of what the sources of version 2 are now.
        #[arg(long)]
        release: Option<String>,
    },
    /// Show a release, a failed one and a rollback, under load, on the cluster.
    Demo {
        /// Remove instead what a demonstration has left on a cluster that goes on.
        #[arg(long)]
        clean_up: bool,
    },
    /// Show what the last run has measured.
    Results {
        /// Which run: of the end-to-end tests, or of the tests of the cluster itself.
        #[arg(long, default_value = "e2e", value_parser = ["e2e", "cluster-test"])]
        of: String,
        /// Forget it instead: a run begins. Prints what its processes should find in their environment, so that all figures
        /// are told to be of the code that it began with.
        #[arg(long)]
        begin: bool,
        /// Note first that the run has ended, with the exit code of its tests.
        #[arg(long, value_name = "EXIT_CODE", conflicts_with = "begin")]
        end: Option<u8>,
    },
    /// First half of a start; `up` calls it.
    #[command(hide = true)]
    Launch,
    /// Process 1 of the cluster; `launch` calls it.
    #[command(hide = true)]
    Supervise,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            say(format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let cluster = Cluster::named(&cli.name)?;
    match &cli.action {
        Action::Launch => sandbox::launch(&cluster, &["supervise", "--name", cluster.name()])?,
        Action::Supervise => supervisor::run(&cluster)?,
        Action::Alone { command } => return alone::run(&cluster, command),
        action => act(cluster, action)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Ends one cluster, or all, and says which are left: who has seen the demonstration, and ends `dev`, has ended nothing.
fn down(cluster: Cluster, all: bool) -> Result<()> {
    let clusters = if all { Cluster::all()? } else { vec![cluster] };
    // `make clean` is for everybody who has started none.
    if !clusters.is_empty() {
        preflight::root()?;
    }
    preflight::remove_leavings()?;
    for cluster in clusters {
        let from = cluster.origin().map(|origin| origin.clone);
        let from = from.filter(|clone| results::repository().is_ok_and(|own| own != clone));
        sandbox::destroy(&cluster)?;
        let from = from.map_or_else(String::new, |clone| {
            format!(" It was started from {}.", clone.display())
        });
        say(format!("Cluster {:?} is gone.{from}", cluster.name()));
    }
    tools::remove_leavings()?;
    images::remove_leavings()?;
    for left in Cluster::all()? {
        say(format!(
            "Cluster {:?} is left: `make down NAME={0}` ends it.",
            left.name()
        ));
    }
    Ok(())
}

fn act(cluster: Cluster, action: &Action) -> Result<()> {
    ensure!(
        rustls::crypto::ring::default_provider().install_default().is_ok(),
        "two TLS providers in one process"
    );
    match action {
        Action::Up
        | Action::Status
        | Action::Kubeconfig
        | Action::Load { .. }
        | Action::Exec { .. }
        | Action::Images { .. } => {
            preflight::root()?;
        }
        _ => {}
    }
    match action {
        Action::Up => start(&cluster),
        Action::Down { all } => down(cluster, *all),
        Action::Preflight => preflight::check(),
        Action::Status => status(&cluster),
        Action::Kubeconfig => {
            sandbox::supervisor(&cluster).with_context(|| cluster.does_not_run())?;
            print(&cluster.kubeconfig().display().to_string())
        }
        Action::Load { archives } => load(&cluster, archives),
        Action::Exec { command } => {
            sandbox::supervisor(&cluster).with_context(|| cluster.does_not_run())?;
            let tools = Tools::ensure()?;
            sandbox::join_network(&cluster)?;
            let (program, args) = command.split_first().context("no command")?;
            let error = Command::new(program)
                .args(args)
                .envs(cluster.environment(&tools))
                .exec();
            Err(error).with_context(|| format!("cannot start `{program}`"))
        }
        Action::Tools { first: true } => print(&Tools::ensure_first()?.display().to_string()),
        Action::Tools { first: false } => print(&Tools::ensure()?.dir().display().to_string()),
        Action::Images {
            repository,
            binaries,
            tag,
            release,
        } => {
            let tools = Tools::ensure()?;
            let mut archives = vec![images::helper(&tools)?];
            archives.extend(images::stores(&tools)?);
            if let Some(binaries) = binaries {
                archives.extend(images::services(
                    &tools,
                    &repository.canonicalize()?,
                    binaries,
                    tag,
                    release.as_deref(),
                )?);
            }
            archives
                .iter()
                .try_for_each(|archive| print(&archive.path.display().to_string()))
        }
        Action::Demo { clean_up: true } => demo::clean_up(&Session::existing_or(cluster)?),
        Action::Demo { clean_up: false } => {
            Origin::of_run();
            demo::run(&Session::existing_or(cluster)?)
        }
        Action::Results { of, begin: true, .. } => print(&results::begin(of)?),
        Action::Results {
            of,
            begin: false,
            end,
        } => {
            end.map_or(Ok(()), |exit_code| results::end(of, exit_code == 0))?;
            print(&results::table(of)?)
        }
        Action::Alone { .. } | Action::Launch | Action::Supervise => Ok(()),
    }
}

fn load(cluster: &Cluster, archives: &[PathBuf]) -> Result<()> {
    sandbox::supervisor(cluster).with_context(|| cluster.does_not_run())?;
    let tools = Tools::ensure()?;
    for (index, path) in archives.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let archive = Archive {
            image: name.clone().into_owned(),
            path: path.clone(),
        };
        if images::is_loaded(cluster, &tools, &archive) {
            continue;
        }
        let step = Step::start(format!("loading {} of {}: {name}", index + 1, archives.len()));
        images::load(cluster, &tools, &archive)?;
        step.done();
    }
    Ok(())
}

fn start(cluster: &Cluster) -> Result<()> {
    Origin::of_run();
    let times = up::up(cluster)?;
    let seconds = |time: Duration| (time.as_secs_f64() * 10.0).round() / 10.0;
    if times.was_running {
        say(format!(
            "Cluster {:?} runs already; looked at in {} s.",
            cluster.name(),
            seconds(times.all_ready),
        ));
        say(cluster.exports(Tools::ensure()?.dir().display()));
        return Ok(());
    }
    let took = seconds(times.build);
    let build = if times.built_now {
        format!("components built in {took} s")
    } else {
        format!("components from the cache (built once, in {took} s)")
    };
    say(format!(
        "Cluster {:?} is ready: {build}, node Ready after {} s, everything after {} s.",
        cluster.name(),
        seconds(times.node_ready),
        seconds(times.all_ready),
    ));
    say(cluster.exports(Tools::ensure()?.dir().display()));
    let figures = json!({
        "cluster": cluster.name(),
        "cold_build_seconds": took,
        "cold_build_was_now": times.built_now,
        "node_ready_seconds": seconds(times.node_ready),
        "all_ready_seconds": seconds(times.all_ready),
    });
    let name = results::of_cluster("cluster-start", cluster.name());
    results::write(&name, &figures).map(drop)
}

fn status(cluster: &Cluster) -> Result<()> {
    let pid = sandbox::supervisor(cluster).with_context(|| cluster.does_not_run())?;
    print(&format!(
        "cluster {:?}, supervisor {pid}, logs in {}",
        cluster.name(),
        cluster.logs().display()
    ))?;
    print(&format!(
        "{:<26} {:>8} {:>9}  LAST EXIT",
        "COMPONENT", "PID", "RESTARTS"
    ))?;
    let mut states: Vec<_> = supervisor::read_status(cluster).into_iter().collect();
    states.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, state) in states {
        let pid = state.pid.and_then(|pid| sandbox::host_pid(cluster, pid));
        let pid = pid.map_or_else(|| "-".into(), |pid| pid.to_string());
        let exit = state.last_exit.unwrap_or_default();
        print(&format!("{name:<26} {pid:>8} {:>9}  {exit}", state.restarts))?;
    }
    Ok(())
}

/// Whoever stops reading (`testbed status | head -1`) has seen enough: that is no error.
fn print(line: &str) -> Result<()> {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
