//! `kubectl exchange`: looks at an exchange as its operator sees it, and asks for what people can ask for.
//!
//! It only reads, and writes annotations: with the operator gone it still tells what was recorded last.

mod act;
mod view;

use std::{
    future::Future,
    io::{IsTerminal as _, Write as _, stdout},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use exchange_operator::{
    api::{ExchangeDeployment, GROUP},
    proxy,
    resources::MANAGER,
};
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::{
    authentication::v1::SelfSubjectReview,
    batch::v1::Job,
    core::v1::{Event, Pod},
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{Duration as Span, PartialObjectMeta},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};
use tokio::time;

use crate::{act::Action, view::View};

/// The release was given up, or something else is in the way.
const GIVEN_UP: u8 = 2;
/// It was not there in time.
const TIMED_OUT: u8 = 3;
/// How often times are shown anew while nothing happens.
const REFRESH: Duration = Duration::from_secs(5);
/// After a question that the API server did not answer.
const AGAIN: Duration = Duration::from_secs(1);

/// Looks at an exchange and its release, and asks for what people can ask for.
#[derive(Parser)]
#[command(
    name = "kubectl exchange",
    bin_name = "kubectl exchange",
    version,
    after_help = "Exit codes: 0 done; 1 an error, or an action that makes no sense now; with `status --wait` also 2 given up \
                  or stalled, 3 not there in time."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    way: Way,
}

/// The way to the cluster.
#[derive(Args)]
struct Way {
    /// The namespace. Without it: that of the context.
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// The context of the kubeconfig. Without it: the current one.
    #[arg(long, global = true)]
    context: Option<String>,
    /// The kubeconfig file. Without it: as kubectl finds it.
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// The stacks with their pods and gates.
    Status(Status),
    /// Why it waits, each condition, and what can be done now.
    Explain(Name),
    /// What was live when, how it ended, who acted.
    History(Name),
    /// Approve the candidate that has passed its gates.
    Promote(Ask),
    /// Give the candidate up before its swap. What is live is not touched.
    Abort(Ask),
    /// Go back to the stack that was live before.
    Rollback(Ask),
    /// Try again what was given up.
    Retry(Ask),
    /// Start nothing new: deadlines and retention stand still.
    Pause(Ask),
    /// End a pause.
    Resume(Name),
}

#[derive(Args)]
struct Name {
    /// Name of the ExchangeDeployment. Without it: the only one of the namespace.
    name: Option<String>,
}

#[derive(Args)]
struct Ask {
    #[command(flatten)]
    name: Name,
    /// The stack and attempt that you have looked at, `<revision>.<attempt>` as `status` shows it: refused if it would be about
    /// another one by now. Without it: what is there at this moment.
    #[arg(long)]
    stack: Option<String>,
}

#[derive(Args)]
struct Status {
    #[command(flatten)]
    name: Name,
    /// Show it again whenever something happens.
    #[arg(short, long, conflicts_with = "output")]
    watch: bool,
    /// Wait until the declared version is live and verified (exit code 0) or something is in the way (2).
    #[arg(long)]
    wait: bool,
    /// How long to wait, for example 90s or 15m; after it the exit code is 3. Without it: for ever.
    #[arg(long, requires = "wait")]
    timeout: Option<Span>,
    /// For machines.
    #[arg(short, long)]
    output: Option<Output>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Json,
    Yaml,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // What clap would exit with for a wrong command line is what scripts take for a release that was given up.
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let is_help = !error.use_stderr();
            let told = error.print().is_ok();
            return if is_help && told {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
    };
    match run(cli).await {
        Ok(code) => code,
        Err(error) => {
            complain(&in_words(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, in one line. Of what the API server answers its sentence, without the rest of the answer.
fn in_words(error: &anyhow::Error) -> String {
    let mut words = Vec::new();
    for cause in error.chain() {
        if let Some(kube::Error::Api(answer)) = cause.downcast_ref::<kube::Error>() {
            words.push(answer.message.clone());
            break;
        }
        words.push(cause.to_string());
    }
    words.join(": ")
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        bail!("another TLS provider is installed already");
    }
    let cluster = Cluster::reach(&cli.way).await?;
    match cli.command {
        Command::Status(args) => return cluster.status(&args).await,
        Command::Explain(Name { name }) => {
            let object = cluster.object(name.as_deref()).await?;
            let view = view::view(&object, &[], &[], &[]);
            print(&view::explain(&object, &view, Timestamp::now()))?;
        }
        Command::History(Name { name }) => print(&view::history(&cluster.object(name.as_deref()).await?))?,
        Command::Promote(ask) => cluster.ask(Action::Promote, &ask).await?,
        Command::Abort(ask) => cluster.ask(Action::Abort, &ask).await?,
        Command::Rollback(ask) => cluster.ask(Action::Rollback, &ask).await?,
        Command::Retry(ask) => cluster.ask(Action::Retry, &ask).await?,
        Command::Pause(ask) => cluster.ask(Action::Pause, &ask).await?,
        Command::Resume(name) => cluster.ask(Action::Resume, &Ask { name, stack: None }).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn complain(what: &str) {
    let _ = writeln!(std::io::stderr(), "error: {what}");
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).context("failed to print")?;
    out.flush().context("failed to print")
}

/// A namespace of a cluster.
struct Cluster {
    client: Client,
    namespace: String,
    objects: Api<ExchangeDeployment>,
}

impl Cluster {
    async fn reach(way: &Way) -> anyhow::Result<Self> {
        let options = KubeConfigOptions {
            context: way.context.clone(),
            ..KubeConfigOptions::default()
        };
        let file = match &way.kubeconfig {
            Some(path) => Some(Kubeconfig::read_from(path).with_context(|| path.display().to_string())?),
            None => Kubeconfig::read().ok(),
        };
        let config = match &file {
            Some(file) if way.kubeconfig.is_some() => {
                Config::from_custom_kubeconfig(file.clone(), &options).await?
            }
            _ if way.context.is_some() => Config::from_kubeconfig(&options).await?,
            _ => Config::infer().await.context("no cluster is configured")?,
        };
        let config = proxy::as_kubectl_does(config, file.as_ref(), way.context.as_deref());
        let namespace = way
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)?;
        Ok(Self {
            objects: Api::namespaced(client.clone(), &namespace),
            client,
            namespace,
        })
    }

    /// The object of this name, or the only one there is.
    async fn object(&self, name: Option<&str>) -> anyhow::Result<ExchangeDeployment> {
        if let Some(name) = name {
            let found = self.objects.get_opt(name).await?;
            return found
                .with_context(|| format!("there is no ExchangeDeployment {name} in {}", self.namespace));
        }
        let all = match self.objects.list(&ListParams::default()).await {
            Err(kube::Error::Api(answer)) if answer.is_not_found() => {
                bail!(
                    "this cluster does not know ExchangeDeployments: install the operator's chart, which brings them"
                )
            }
            all => all?,
        };
        let mut all = all.items;
        match (all.pop(), all.len()) {
            (Some(only), 0) => Ok(only),
            (None, _) => bail!("there is no ExchangeDeployment in {}", self.namespace),
            (Some(_), more) => bail!(
                "there are {} ExchangeDeployments in {}: name one",
                more + 1,
                self.namespace
            ),
        }
    }

    fn selector(name: &str) -> String {
        format!("app.kubernetes.io/instance={name},app.kubernetes.io/managed-by={MANAGER}")
    }

    async fn look(&self, name: &str) -> anyhow::Result<View> {
        let children = ListParams::default().labels(&Self::selector(name));
        let (pods, jobs) = (
            Api::<Pod>::namespaced(self.client.clone(), &self.namespace),
            Api::<Job>::namespaced(self.client.clone(), &self.namespace),
        );
        let (object, pods, jobs, told) = tokio::try_join!(
            self.objects.get(name),
            pods.list(&children),
            jobs.list(&children),
            self.told(name)
        )?;
        Ok(view::view(&object, &pods.items, &jobs.items, &told))
    }

    /// The Events of the object. Who may not read them sees fewer times.
    async fn told(&self, name: &str) -> kube::Result<Vec<Event>> {
        let about = format!("involvedObject.kind=ExchangeDeployment,involvedObject.name={name}");
        let events = Api::<Event>::namespaced(self.client.clone(), &self.namespace);
        match events.list(&ListParams::default().fields(&about)).await {
            Ok(list) => Ok(list.items),
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    // ---- status -----------------------------------------------------------------------------------------------

    async fn status(&self, args: &Status) -> anyhow::Result<ExitCode> {
        let named = args.name.name.as_deref();
        if !args.wait && !args.watch {
            let name = self.object(named).await?.name_any();
            show(&self.look(&name).await?, args.output)?;
            return Ok(ExitCode::SUCCESS);
        }
        let following = async {
            let name = patiently(|| self.object(named)).await?.name_any();
            self.follow(&name, args).await
        };
        let Some(limit) = args.timeout else {
            return following.await;
        };
        if let Ok(code) = time::timeout(limit.into(), following).await {
            return code;
        }
        let last = async { self.look(&self.object(named).await?.name_any()).await };
        match time::timeout(REFRESH, last).await {
            Ok(Ok(view)) => show(&view, args.output)?,
            Ok(Err(error)) => complain(&in_words(&error)),
            Err(_) => complain("the API server does not answer"),
        }
        Ok(ExitCode::from(TIMED_OUT))
    }

    /// Looks again whenever something happens, until what is waited for has come.
    async fn follow(&self, name: &str, args: &Status) -> anyhow::Result<ExitCode> {
        let of_name = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let of_children = watcher::Config::default().labels(&Self::selector(name));
        let pods = Api::<PartialObjectMeta<Pod>>::namespaced(self.client.clone(), &self.namespace);
        let object = watcher(self.objects.clone(), of_name).default_backoff().map(drop);
        let pods = watcher(pods, of_children).default_backoff().map(drop);
        let mut happens = stream::select(object.boxed(), pods.boxed());
        loop {
            let view = patiently(|| self.look(name)).await?;
            if args.watch {
                if stdout().is_terminal() {
                    print("\x1b[2J\x1b[H")?;
                }
                print(&format!("{}\n", view::tree(&view, Timestamp::now())))?;
            }
            if let Some(code) = verdict(&view).filter(|_| args.wait) {
                if !args.watch {
                    show(&view, args.output)?;
                }
                return Ok(ExitCode::from(code));
            }
            // Whatever has happened meanwhile is in the next look.
            quiet(happens.next()).await;
            while futures::FutureExt::now_or_never(happens.next()).is_some() {}
        }
    }

    // ---- actions ----------------------------------------------------------------------------------------------

    async fn ask(&self, action: Action, ask: &Ask) -> anyhow::Result<()> {
        let object = self.object(ask.name.name.as_deref()).await?;
        let name = object.name_any();
        let request = act::request(action, &object);
        let request = match request.and_then(|it| it.about(ask.stack.as_deref())) {
            Ok(request) => request,
            Err(refusal) => bail!("{} makes no sense now: {refusal}", action.word()),
        };
        let by = self.who().await;
        let patch = json!({"metadata": {"annotations": {
            &request.annotation: (!request.value.is_empty()).then_some(&request.value),
            format!("{GROUP}/by"): &by,
        }}});
        self.objects
            .patch(&name, &PatchParams::default(), &Patch::<Value>::Merge(patch))
            .await
            .with_context(|| format!("{} was not asked for", action.word()))?;
        let by = by.map_or_else(|| ", unsigned".to_owned(), |by| format!(" by {by}"));
        print(&format!(
            "{} of {name} is asked for{by}: {}\n",
            action.word(),
            request.effect
        ))
    }

    /// Who the API server takes us for. Without an answer a request is not signed, and history says so.
    async fn who(&self) -> Option<String> {
        let reviews = Api::<SelfSubjectReview>::all(self.client.clone());
        let review = reviews
            .create(&PostParams::default(), &SelfSubjectReview::default())
            .await
            .ok()?;
        review.status?.user_info?.username
    }
}

/// Asks again after what may pass by itself, for as long as somebody waits.
async fn patiently<T, F: Future<Output = anyhow::Result<T>>>(ask: impl Fn() -> F) -> anyhow::Result<T> {
    let mut told = false;
    loop {
        match ask().await {
            Err(error) if passes(&error) => {
                if !told {
                    complain(&format!("{}; asking again", in_words(&error)));
                }
                told = true;
                time::sleep(AGAIN).await;
            }
            result => return result,
        }
    }
}

/// Whether an error may pass by itself: no answer, or one that does not say no.
fn passes(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => status.code == 429 || status.code >= 500,
        Some(kube::Error::Service(_) | kube::Error::HyperError(_)) => true,
        _ => false,
    }
}

/// Until something happens, but not longer than times may stand still on the screen.
async fn quiet(something: impl Future) {
    let _ = time::timeout(REFRESH, something).await;
}

fn show(view: &View, output: Option<Output>) -> anyhow::Result<()> {
    print(&match output {
        None => view::tree(view, Timestamp::now()),
        Some(Output::Json) => serde_json::to_string_pretty(view)? + "\n",
        Some(Output::Yaml) => serde_yaml::to_string(view)?,
    })
}

/// The exit code of `status --wait`, if what is waited for has come.
const fn verdict(view: &View) -> Option<u8> {
    match (view.ready, view.stalled) {
        // What is seen is what was before it.
        _ if view.asked => None,
        (true, _) => Some(0),
        (_, true) => Some(GIVEN_UP),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use kube::client::Body;

    use super::*;

    #[test]
    fn scripts_are_told_how_it_ended() {
        for (object, expected) in [
            ("live", Some(0)),
            ("suspended_live", Some(0)),
            // Live and verified, and not whole, or not reached.
            ("short_of_pods", None),
            ("no_endpoints", None),
            ("points_elsewhere", None),
            ("failed", Some(2)),
            ("held", Some(2)),
            ("name_taken", Some(2)),
            ("reference_missing", Some(2)),
            ("new", None),
            ("stale", None),
            ("testing", None),
            ("awaiting_promotion", None),
            ("suspended_other", None),
            ("suspended_failed", Some(2)),
            ("suspended_failed_other", None),
        ] {
            let view = view::view(&view::tests::object(object), &[], &[], &[]);
            assert_eq!(verdict(&view), expected, "{object}");
        }
    }

    #[test]
    fn of_an_answer_of_the_api_server_its_sentence_is_told() {
        let answer = kube::core::Status::failure("alice cannot patch it", "Forbidden").with_code(403);
        let error = anyhow::Error::from(kube::Error::Api(answer.boxed())).context("failed to ask");
        assert_eq!(in_words(&error), "failed to ask: alice cannot patch it");
        let error = anyhow::anyhow!("no such file").context("failed to read the kubeconfig");
        assert_eq!(in_words(&error), "failed to read the kubeconfig: no such file");
    }

    #[test]
    fn who_waits_after_a_request_does_not_see_what_was_before_it() {
        for (name, word, asked, handled, expected) in [
            ("failed", "retry", "r5.2", None, None),
            ("failed", "retry", "r5.2", Some("r5.2"), Some(2)),
            ("failed", "retry", "r5.2", Some("r5.1"), None),
            ("held", "retry", "r6.2", None, None),
            ("live", "rollback", "r1.2", None, None),
            ("live", "rollback", "r1.2", Some("r1.2"), Some(0)),
            // It is about the past, and will never be heard.
            ("live", "rollback", "r0.1", None, Some(0)),
            ("failed", "retry", "r5.1", None, Some(2)),
            ("live", "promote", "r1.2", None, Some(0)),
            ("live", "abort", "r1.2", None, Some(0)),
            // It is not heard before somebody has helped.
            ("name_taken", "retry", "r1.2", None, Some(2)),
        ] {
            let mut object = view::tests::object(name);
            let annotations = object.annotations_mut();
            annotations.insert(format!("{GROUP}/{word}"), asked.to_owned());
            let mut status = object.status.take().unwrap_or_default();
            let of_word = match word {
                "promote" => &mut status.handled.promote,
                "abort" => &mut status.handled.abort,
                "rollback" => &mut status.handled.rollback,
                _ => &mut status.handled.retry,
            };
            *of_word = handled.map(str::to_owned);
            object.status = Some(status);
            let view = view::view(&object, &[], &[], &[]);
            assert_eq!(verdict(&view), expected, "{name} {word} {asked} {handled:?}");
        }
    }

    /// A cluster whose API server answers questions about the object in this order, the last one for ever, and has nothing
    /// beside it.
    fn cluster(answers: Vec<(u16, Value)>) -> Cluster {
        let (service, mut requests) = tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
        tokio::spawn(async move {
            let (mut answers, mut last) = (answers.into_iter(), (500, Value::Null));
            while let Some((request, send)) = requests.next_request().await {
                let query = request.uri().query().unwrap_or_default();
                let (code, body) = if query.contains("watch=true") {
                    (503, json!({"kind": "Status", "status": "Failure", "code": 503}))
                } else if request.uri().path().ends_with("/exchangedeployments/exchange") {
                    last = answers.next().unwrap_or(last);
                    last.clone()
                } else {
                    (200, json!({"metadata": {}, "items": []}))
                };
                let body = Body::from(body.to_string().into_bytes());
                send.send_response(http::Response::builder().status(code).body(body).unwrap());
            }
        });
        let client = Client::new(service, "prod");
        Cluster {
            objects: Api::namespaced(client.clone(), "prod"),
            client,
            namespace: "prod".to_owned(),
        }
    }

    fn waiting(timeout: &str) -> Status {
        Status {
            name: Name {
                name: Some("exchange".to_owned()),
            },
            watch: false,
            wait: true,
            timeout: Some(timeout.parse().unwrap()),
            output: Some(Output::Json),
        }
    }

    fn refusal(code: u16) -> (u16, Value) {
        let reason = if code == 404 { "NotFound" } else { "" };
        let status =
            json!({"kind": "Status", "status": "Failure", "reason": reason, "message": "no", "code": code});
        (code, status)
    }

    #[tokio::test]
    async fn who_waits_does_not_give_up_because_of_an_api_server_that_is_away_for_a_moment() {
        let live = serde_json::to_value(view::tests::object("live")).unwrap();
        let begin = (200, live.clone());
        let cluster = cluster(vec![refusal(500), begin, refusal(503), refusal(429), (200, live)]);
        let code = cluster.status(&waiting("30s")).await.unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::SUCCESS));
    }

    #[tokio::test]
    async fn who_waits_in_vain_for_an_api_server_is_told_that_the_time_is_over() {
        let code = cluster(vec![refusal(503)]).status(&waiting("2s")).await.unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(TIMED_OUT)));
    }

    #[tokio::test]
    async fn an_answer_that_says_no_ends_the_wait() {
        for (code, says) in [(403, "no"), (404, "there is no ExchangeDeployment exchange")] {
            let error = cluster(vec![refusal(code)])
                .status(&waiting("30s"))
                .await
                .unwrap_err();
            assert!(format!("{error:#}").contains(says), "{error:#}");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
