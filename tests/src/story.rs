//! Stories of releases on a cluster: one exchange that is live, what is declared next, what is seen of it.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a story that does not go on as told fails its test"
)]

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::Child,
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    exchange::{
        Exchange, Images, Load, NAME, PATIENCE, Watch, busybox_image, is_current, phase_of, restricted_pod,
        set, text,
    },
    kubectl::{Namespace, Session, Watching, plugin_directory},
    operator::{self, Operator},
    room::{self, Place, Queued},
    sandbox::wait_until,
};

/// Requests a second: enough to notice whatever is cut off.
const RATE: u32 = 20;
/// The services, as they are called in the API.
pub const SERVICES: [&str; 3] = ["user", "trade", "notification"];

/// Who installs the operator first keeps all others waiting. So those that begin together all wait for room when that is done,
/// and it is their order that decides.
static FIRST: Once = Once::new();
/// Helm refuses two at once.
static INSTALLATION: Mutex<()> = Mutex::new(());

/// The cluster with the operator on it.
#[derive(Debug)]
pub struct Ground {
    /// The way to the cluster.
    pub session: Session,
    /// What is deployed.
    pub images: Images,
    place: Mutex<Place>,
}

impl Ground {
    /// Beside other stories.
    pub fn shared() -> Self {
        Self::with_operator(1)
    }

    /// While no other story goes on. Who disturbs the operator, or measures, is alone: it is the operator of all.
    pub fn alone() -> Self {
        Self::with_operator(room::WHOLE)
    }

    /// From now on beside one other story. What is deployed already stays while this waits.
    pub fn beside_one(&self) {
        self.resize(room::WHOLE - 1);
    }

    /// From now on no other story goes on, as if this had begun [alone](Self::alone). What is deployed already stays while it
    /// waits.
    pub fn clear(&self) {
        self.resize(room::WHOLE);
    }

    /// From now on beside other stories, as if this had begun [so](Self::shared).
    pub fn beside_others(&self) {
        self.resize(1);
    }

    /// While no other story goes on, without the operator of all namespaces: for several operators that each look after one.
    pub fn without_operator() -> Self {
        // What it has brought for the whole cluster stays.
        let ground = Self::of(room::WHOLE);
        Operator::of_all().uninstall(&ground.session).unwrap();
        ground
    }

    fn with_operator(room: usize) -> Self {
        let ground = Self::of(room);
        // A story before this one may have done without.
        install(&ground.session, &ground.images);
        ground
    }

    fn of(room: usize) -> Self {
        let queued = Queued::here();
        let session = Session::from_environment().unwrap();
        let images = Images::from_environment().unwrap();
        FIRST.call_once(|| install(&session, &images));
        Self {
            session,
            images,
            place: Mutex::new(queued.place(room)),
        }
    }

    fn resize(&self, room: usize) {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        place.resize(room);
    }

    /// For whoever installs the operator.
    pub fn installation() -> MutexGuard<'static, ()> {
        INSTALLATION.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exchange that is live with this declaration.
    pub fn live<'a>(&'a self, namespace: &'a Namespace<'_>, declare: impl Fn(&mut Value)) -> Story<'a> {
        let exchange = Exchange::install(&self.session, &namespace.name, &self.images).unwrap();
        let told = Told::of(&self.session, &namespace.name, NAME);
        let mut declaration = exchange.declaration("1.0.0");
        declare(&mut declaration);
        exchange.release(&declaration).unwrap();
        let watch = exchange.watch().unwrap();
        let mut story = Story {
            session: &self.session,
            namespace: &namespace.name,
            exchange,
            watch,
            declaration,
            told,
            generation: 1,
        };
        story.watch.until_phase("Live", "1.0.0", PATIENCE).unwrap();
        story.told.course(&RELEASED);
        story
    }
}

fn install(session: &Session, images: &Images) {
    let _one_at_a_time = Ground::installation();
    operator::install(session, images).unwrap();
}

/// An exchange, and what is declared of it.
#[derive(Debug)]
pub struct Story<'a> {
    /// The way to the cluster.
    pub session: &'a Session,
    /// Where it is.
    pub namespace: &'a str,
    /// Itself.
    pub exchange: Exchange<'a>,
    /// What is seen of it.
    pub watch: Watch,
    /// What was declared last.
    pub declaration: Value,
    /// What the operator tells of it.
    pub told: Told,
    generation: i64,
}

impl<'a> Story<'a> {
    /// The object as it was last seen.
    pub fn last(&self) -> &Value {
        self.watch.last().unwrap()
    }

    /// The revision of `live`, `candidate` or `previous`; empty if there is none.
    pub fn revision(&self, stack: &str) -> String {
        text(self.last(), &format!("/status/{stack}/revision")).to_owned()
    }

    /// Changes the spec, and applies it.
    pub fn declare(&mut self, change: impl Fn(&mut Value)) {
        change(&mut self.declaration["spec"]);
        self.exchange.release(&self.declaration).unwrap();
        let generation = self
            .session
            .get(self.namespace, "exd/exchange", "{.metadata.generation}");
        self.generation = generation.unwrap().parse().unwrap();
    }

    /// Waits until the operator has come to this phase with what is declared now: what was seen before does not count.
    pub fn reaches(&mut self, phase: &str) {
        let wanted = self.generation;
        self.watch
            .until(phase, PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == phase
                    && object["metadata"]["generation"].as_i64() >= Some(wanted)
            })
            .unwrap();
    }

    /// A release that ends where it should, and the traffic with it, with nothing told but its course.
    pub fn goes_live(&mut self) {
        let before = self.revision("live");
        self.goes_live_after(&before);
        self.told.course(&RELEASED);
    }

    /// The same for one that may have the traffic already, instead of this revision.
    pub fn goes_live_after(&mut self, before: &str) {
        self.watch
            .until("the release to be live", PATIENCE, |object| {
                is_current(object)
                    && phase_of(object) == "Live"
                    && text(object, "/status/live/revision") != before
            })
            .unwrap();
        self.all_point_at(&self.revision("live"));
    }

    /// Starts clients. All services have to be live.
    pub fn trade(&self) -> Clients<'a> {
        self.exchange.make_treasury().unwrap();
        Clients {
            load: self.exchange.start_load(RATE).unwrap(),
            prober: Prober::start(self.session, self.namespace),
        }
    }

    /// Where a live Service points to.
    pub fn selector(&self, service: &str) -> Value {
        let name = format!("service/{NAME}-{service}");
        let selector = self
            .session
            .get(self.namespace, &name, "{.spec.selector}")
            .unwrap();
        serde_json::from_str(&selector).unwrap()
    }

    /// In which versions the live Services are: whoever writes one makes another.
    pub fn versions_of_live(&self) -> [String; 3] {
        let version = |service| {
            let name = format!("service/{NAME}-{service}");
            let version = self
                .session
                .get(self.namespace, &name, "{.metadata.resourceVersion}");
            version.unwrap()
        };
        SERVICES.map(version)
    }

    /// Asserts that the whole traffic goes to one stack.
    pub fn all_point_at(&self, revision: &str) {
        for service in SERVICES {
            let selector = self.selector(service);
            assert_eq!(
                selector["exchange.dev/revision"], revision,
                "{service}: {selector}"
            );
        }
    }

    /// A condition as it was last seen.
    pub fn condition(&self, kind: &str) -> Value {
        let conditions = self.last()["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|it| it["type"] == kind).unwrap().clone()
    }

    /// Runs `kubectl` in its namespace.
    pub fn kubectl(&self, args: &[&str]) -> String {
        let args: Vec<&str> = args
            .iter()
            .chain(&["--namespace", self.namespace])
            .copied()
            .collect();
        self.session.kubectl(&args).unwrap()
    }

    /// Runs the plugin as a person would, as `kubectl exchange …`. Its exit code, and what it says.
    pub fn plugin(&self, args: &str) -> (i32, String) {
        let told = self.session.shell(&format!(
            "PATH='{}':$PATH; kubectl exchange {args} --namespace {} 2>&1; echo \"exit code $?\"",
            plugin_directory().unwrap().display(),
            self.namespace
        ));
        let told = told.unwrap();
        let (text, code) = told.trim_end().rsplit_once("exit code ").unwrap();
        (code.parse().unwrap(), text.to_owned())
    }

    /// The same, which has to succeed.
    pub fn person(&self, args: &str) -> String {
        let (code, text) = self.plugin(args);
        assert_eq!(code, 0, "kubectl exchange {args}: {text}");
        text
    }

    /// The phases since a sighting, each once.
    pub fn phases_since(&self, sighting: usize) -> Vec<String> {
        let phases = self.watch.sightings()[sighting..].iter();
        let mut phases: Vec<_> = phases.map(|(_, object)| phase_of(object).to_owned()).collect();
        phases.dedup();
        phases
    }

    /// Outcome, reason and author of the last entry of the history.
    pub fn last_outcome(&self) -> (String, String, String) {
        let entry = &self.last()["status"]["history"][0];
        let field = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        (field("outcome"), field("reason"), field("by"))
    }
}

/// Of a release in which nothing went wrong, its Events.
pub const RELEASED: [&str; 4] = ["ReleaseStarted", "Promoting", "Promoted", "Verified"];
/// The Events by which a release tells how far it is. What else is told - of the old stack's end, of migrations, of repairs -
/// comes beside them, at a time of its own.
const COURSE: [&str; 12] = [
    "Adopted",
    "Promoted",
    "Promoting",
    "ReleaseFailed",
    "ReleaseStarted",
    "Resumed",
    "Reverted",
    "RollbackImpossible",
    "RolledBack",
    "RollingBack",
    "Stopped",
    "Verified",
];
/// How long an Event may come after the status that it is about.
const NEWS: Duration = Duration::from_secs(20);

/// An Event: when it was told, its uid, and its reason.
type News = (String, String, String);

/// The Kubernetes Events of an exchange, in the order in which they were told.
#[derive(Debug)]
pub struct Told {
    news: Arc<Mutex<BTreeSet<News>>>,
    _watching: Watching,
    /// How much of the course has been compared.
    known: usize,
}

impl Told {
    /// Listens from now on to what is told of an ExchangeDeployment, also of one that does not exist yet.
    pub fn of(session: &Session, namespace: &str, name: &str) -> Self {
        let news = Arc::new(Mutex::new(BTreeSet::new()));
        let about =
            format!("--field-selector=involvedObject.kind=ExchangeDeployment,involvedObject.name={name}");
        let all = Arc::clone(&news);
        let watching = session.watch(&["events", "--namespace", namespace, &about], move |event| {
            locked(&all).insert(news_of(&event));
        });
        Self {
            news,
            _watching: watching.unwrap(),
            known: 0,
        }
    }

    /// The reasons of all Events so far, in the order in which they were told.
    pub fn reasons(&self) -> Vec<String> {
        locked(&self.news)
            .iter()
            .map(|(_, _, reason)| reason.clone())
            .collect()
    }

    fn new_course(&self) -> Vec<String> {
        let mut course = self.reasons();
        course.retain(|reason| COURSE.contains(&reason.as_str()));
        course.split_off(self.known)
    }

    /// Asserts that this and nothing else was told of the course of releases since it was asked last.
    pub fn course(&mut self, expected: &[&str]) {
        let _ = wait_until("the news", NEWS, || self.new_course().len() >= expected.len());
        let course = self.new_course();
        assert_eq!(course, expected, "all: {:?}", self.reasons());
        self.known += course.len();
    }

    /// The same where the operator was disturbed: the last of it was told, and all that was told in this order. What was on
    /// its lips when it was killed, nobody tells.
    pub fn course_with_gaps(&mut self, expected: &[&str]) {
        let last = expected.last().copied();
        let _ = wait_until("the news", NEWS, || {
            self.new_course().last().map(String::as_str) == last
        });
        let course = self.new_course();
        let mut left = expected.iter();
        let in_order = course.iter().all(|reason| left.any(|next| next == reason));
        let complete = course.last().map(String::as_str) == last;
        assert!(in_order && complete, "{course:?} instead of {expected:?}");
        self.known += course.len();
    }

    /// What is told so far of the course is not compared: a leader of before that wakes up may tell what nobody waits for.
    pub fn forget(&mut self) {
        self.known += self.new_course().len();
    }

    /// Waits until this was told, at any time.
    pub fn has(&self, reason: &str) {
        let told = || self.reasons().iter().any(|it| it == reason);
        let waited = wait_until(reason, NEWS, told);
        assert!(waited.is_ok(), "{reason} was not told: {:?}", self.reasons());
    }
}

fn locked(news: &Mutex<BTreeSet<News>>) -> MutexGuard<'_, BTreeSet<News>> {
    news.lock().unwrap_or_else(PoisonError::into_inner)
}

fn news_of(event: &Value) -> News {
    ["/eventTime", "/metadata/uid", "/reason"]
        .map(|field| text(event, field).to_owned())
        .into()
}

/// Clients of an exchange: those that trade over connections which they keep, and one who comes anew each time.
#[derive(Debug)]
pub struct Clients<'a> {
    /// Those that trade.
    pub load: Load<'a>,
    /// The one who comes anew.
    pub prober: Prober<'a>,
}

impl Clients<'_> {
    /// Ends them: nothing may have failed, and every live Service has answered throughout. Returns the stacks that have.
    pub fn end_well(self) -> Vec<String> {
        self.prober.misses_nothing();
        drop(self.prober);
        end_well(self.load)
    }
}

/// Somebody who asks every live Service several times a second, each time by its name on a new connection: other clients keep
/// theirs, and do not notice what becomes of an address.
#[derive(Debug)]
pub struct Prober<'a> {
    session: &'a Session,
    namespace: &'a str,
}

/// What became of the questions to a service.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answers {
    /// Answered with 200.
    pub given: u32,
    /// Answered otherwise, or not at all.
    pub missed: u32,
}

impl<'a> Prober<'a> {
    const POD: &'static str = "prober";

    /// Begins to ask. All services have to be live.
    pub fn start(session: &'a Session, namespace: &'a str) -> Self {
        let ask = format!(
            "while true; do for service in {}; do \
             if timeout 2 wget -q -O /dev/null http://{NAME}-$service/version; \
             then echo $service given; else echo $service missed; fi; done; sleep 0.1; done",
            SERVICES.join(" ")
        );
        let mut pod = restricted_pod(Self::POD, &busybox_image(session));
        set(&mut pod, "/spec/containers/0/command", json!(["sh", "-c", ask]));
        set(&mut pod, "/spec/terminationGracePeriodSeconds", json!(0));
        session.apply(namespace, &pod).unwrap();
        let prober = Self { session, namespace };
        wait_until("the first answers", PATIENCE, || {
            SERVICES.iter().all(|service| prober.answers(service).given > 0)
        })
        .unwrap();
        prober
    }

    /// What became of its questions to a service so far.
    pub fn answers(&self, service: &str) -> Answers {
        let log = ["logs", Self::POD, "--namespace", self.namespace];
        let mut answers = Answers::default();
        for line in self.session.kubectl(&log).unwrap_or_default().lines() {
            match line.split_once(' ') {
                Some((of, "given")) if of == service => answers.given += 1,
                Some((of, "missed")) if of == service => answers.missed += 1,
                _ => {}
            }
        }
        answers
    }

    /// Asserts that no question has gone without an answer until now.
    pub fn misses_nothing(&self) {
        self.goes_on();
        for service in SERVICES {
            let answers = self.answers(service);
            assert_eq!(answers.missed, 0, "the {service} service: {answers:?}");
        }
    }

    /// Waits until each service has answered some more, so that nothing of before is still to come.
    pub fn goes_on(&self) {
        let given = || SERVICES.map(|service| self.answers(service).given);
        let before = given();
        wait_until("answers of all services", PATIENCE, || {
            given()
                .iter()
                .zip(before)
                .all(|(now, before)| *now >= before + 10)
        })
        .unwrap();
    }
}

impl Drop for Prober<'_> {
    fn drop(&mut self) {
        let delete = [
            "delete",
            "pod",
            Self::POD,
            "--timeout=30s",
            "--namespace",
            self.namespace,
        ];
        let _ = self.session.kubectl(&delete);
    }
}

/// Every rendered stack that was ever there at the same time as others: the most at once.
#[derive(Debug)]
pub struct Stacks {
    child: Child,
}

impl Stacks {
    /// Counts from now on.
    pub fn count(story: &Story<'_>) -> Self {
        let args = ["get", "controllerrevisions", "--namespace", story.namespace];
        let ours = "--selector=app.kubernetes.io/managed-by=exchange-operator";
        let watch = ["--watch", "--output-watch-events", "--no-headers", ours];
        let child = story.session.follow(&[&args[..], &watch].concat()).unwrap();
        Self { child }
    }

    /// The most that were there at once.
    pub fn at_most(mut self) -> usize {
        let _ = self.child.kill();
        let output = self.child.stdout.take().unwrap();
        let (mut there, mut most) = (BTreeSet::new(), 0);
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let mut words = line.split_whitespace().map(str::to_owned);
            match (words.next().as_deref(), words.next()) {
                (Some("DELETED"), Some(name)) => drop(there.remove(&name)),
                (_, Some(name)) => drop(there.insert(name)),
                _ => {}
            }
            most = most.max(there.len());
        }
        let _ = self.child.wait();
        most
    }
}

/// Waits until no request fails any more.
pub fn serves_again(load: &Load<'_>) {
    let served = || {
        let before = load.progress();
        let on = || load.progress().requests >= before.requests + 200;
        wait_until("200 requests", PATIENCE, on).unwrap();
        load.progress().failed == before.failed
    };
    wait_until("clients to be served", PATIENCE, served).unwrap();
}

/// Ends the load: nothing may have failed. Returns the stacks that have answered.
pub fn end_well(load: Load<'_>) -> Vec<String> {
    let (table, report) = load.end().unwrap();
    assert_eq!(report["summary"]["failed"], 0, "{table}");
    assert_eq!(report["closed_without_notice"], 0, "{table}");
    assert_eq!(report["streams_cut_off"], 0, "{table}");
    assert_eq!(report["audit"]["findings"], json!([]), "{table}");
    assert!(report["summary"]["requests"].as_u64().unwrap() > 100, "{table}");
    report["summary"]["stacks"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect()
}

/// A release without another version: one more variable.
pub fn note(spec: &mut Value, value: &str) {
    spec["services"]["trade"]["env"] = json!([{"name": "RELEASE_NOTE", "value": value}]);
}
