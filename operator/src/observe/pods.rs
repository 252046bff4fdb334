//! What only the pods know: who answers, what is open, how requests went; and what keeps a pod or a Job from going on.

use std::{collections::BTreeMap, error::Error, io, time::Duration};

use futures::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job as BatchJob,
    core::v1::{ContainerStatus, Pod},
};
use kube::ResourceExt;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use super::{Figures, JobKind, JobState};
use crate::{api::Service, status::Stack};

/// New connections to each live Service that have to be answered by the new stack, one after the other.
const ANSWERS: u32 = 20;
/// For each request to a pod.
const PATIENCE: Duration = Duration::from_secs(2);
/// For its connection: shorter, so that what does not even connect is told as that.
const CONNECT: Duration = Duration::from_millis(1500);
/// The port of the live Services.
const LIVE: u16 = 80;
/// The admin port of the pods.
const ADMIN: u16 = 9090;
/// Routes that clients do not ask for: pods and this operator ask the live Services who answers, and what is no route at
/// all costs nothing.
const NOT_COUNTED: [&str; 2] = ["/version", "unmatched"];
/// Routes whose time says nothing about the service: a password's hash is slow on purpose, a stream never ends.
const NOT_TIMED: [&str; 4] = ["/login", "/register", "/password", "/notifications/stream"];
/// The kubelet's own time, after a pod's grace period, to end it and to say so.
const ENDING: SignedDuration = SignedDuration::from_secs(30);
/// For all connections to one live Service: others' exchanges wait meanwhile.
const ROW: Duration = Duration::from_secs(5);
/// The longest page of a pod that is read, in bytes.
const LONGEST: usize = 1 << 20;
/// The longest that is told of what a pod or a Job says.
const TOLD: usize = 300;

/// Where a pod of a stack is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Of which service it is.
    pub service: Service,
    /// Its uid.
    pub pod: String,
    /// Its address.
    pub ip: String,
    /// Whether it is ready, and not going.
    pub ready: bool,
    /// How often its container has been started anew.
    pub restarts: i32,
}

impl Address {
    /// Its admin port.
    fn admin(&self) -> String {
        format!("{}:{ADMIN}", host(&self.ip))
    }

    /// A page of its admin port.
    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.admin())
    }
}

/// An address as a URL has it.
fn host(ip: &str) -> String {
    if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    }
}

/// Counters of one pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counters {
    requests: u64,
    errors: u64,
    /// Requests that took at most so long, by the upper bound as it is written.
    buckets: BTreeMap<String, u64>,
}

/// What pods have counted since a verification began: what has died since has not become unsaid.
#[derive(Clone, Debug, Default)]
pub struct Baselines {
    of: Option<(u32, u32)>,
    fresh: bool,
    pods: BTreeMap<String, Said>,
}

/// What one pod has said.
#[derive(Clone, Debug)]
struct Said {
    service: Service,
    /// Of which of its containers the last page was: how many there were before.
    restarts: i32,
    last: Counters,
    /// What all of its containers have counted since the verification began.
    since: Counters,
}

impl Baselines {
    /// Begins a verification, unless it is the one under way; whether it does. Pods that are seen for the first time from now
    /// on, and are `fresh`, belong to a stack that has just been swapped in, and all that they have counted belongs to it, also for
    /// an operator that has been started since. Others count from where they are first seen.
    pub fn begin(&mut self, verification: (u32, u32), fresh: bool) -> bool {
        let begins = self.of != Some(verification);
        if begins {
            *self = Self {
                of: Some(verification),
                ..Self::default()
            };
        }
        self.fresh = fresh;
        begins
    }

    /// A container that was started anew counts from nothing; what the one before it has said is kept.
    fn said(&mut self, pod: &Address, now: Counters) {
        let fresh = self.fresh;
        let said = self.pods.entry(pod.pod.clone()).or_insert_with(|| Said {
            service: pod.service,
            restarts: pod.restarts,
            last: if fresh { Counters::default() } else { now.clone() },
            since: Counters::default(),
        });
        // A page may be of a later container than the list of pods, which then follows.
        let below = now.is_below(&said.last);
        let anew = below || pod.restarts > said.restarts;
        let before = if anew { &Counters::default() } else { &said.last };
        said.since.add(&now.minus(before));
        said.restarts = pod.restarts.max(said.restarts + i32::from(below));
        said.last = now;
    }

    fn figures(&self) -> BTreeMap<Service, Figures> {
        let mut sums: BTreeMap<Service, Counters> = BTreeMap::new();
        for said in self.pods.values() {
            sums.entry(said.service).or_default().add(&said.since);
        }
        sums.into_iter()
            .map(|(service, counters)| (service, counters.figures()))
            .collect()
    }
}

impl Counters {
    /// Whether it cannot have come out of these by counting on.
    const fn is_below(&self, before: &Self) -> bool {
        self.requests < before.requests || self.errors < before.errors
    }

    fn minus(&self, before: &Self) -> Self {
        let buckets = self.buckets.iter().map(|(bound, count)| {
            let before = before.buckets.get(bound).copied().unwrap_or(0);
            (bound.clone(), count.saturating_sub(before))
        });
        Self {
            requests: self.requests.saturating_sub(before.requests),
            errors: self.errors.saturating_sub(before.errors),
            buckets: buckets.collect(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        for (bound, count) in &other.buckets {
            *self.buckets.entry(bound.clone()).or_default() += count;
        }
    }

    /// Reads the live lane's counters from what a pod reports in the OpenMetrics format.
    pub fn parse(page: &str) -> Self {
        let mut counters = Self::default();
        for line in page.lines() {
            let Some((name, labels, value)) = sample(line) else {
                continue;
            };
            let among = |routes: &[&str]| labels.get("route").is_some_and(|route| routes.contains(route));
            if labels.get("lane") != Some(&"live") || among(&NOT_COUNTED) {
                continue;
            }
            match name {
                "http_server_requests_total" => {
                    counters.requests += value;
                    if labels.get("status").is_some_and(|status| status.starts_with('5')) {
                        counters.errors += value;
                    }
                }
                "http_server_request_duration_seconds_bucket" => {
                    if let Some(bound) = labels.get("le").filter(|_| !among(&NOT_TIMED)) {
                        *counters.buckets.entry((*bound).to_owned()).or_default() += value;
                    }
                }
                _ => {}
            }
        }
        counters
    }

    /// Requests, errors, those that were timed, and what their 99th percentile exceeds: the lower bound of its bucket. All
    /// that is told of the requests in a bucket is that they took longer than this, so that no estimate between its bounds
    /// can give up a version that keeps its limit.
    fn figures(&self) -> Figures {
        let mut bounds: Vec<(f64, u64)> = self
            .buckets
            .iter()
            .filter_map(|(bound, count)| {
                let bound = if bound == "+Inf" {
                    f64::INFINITY
                } else {
                    bound.parse().ok()?
                };
                Some((bound, *count))
            })
            .collect();
        bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all = bounds.last().map_or(0, |(_, count)| *count);
        // The smallest whole number of requests that is 99 % of all.
        let most = all - all / 100;
        let exceeded = bounds.iter().rev().find(|(_, count)| *count < most);
        let p99_over = exceeded.and_then(|(bound, _)| Duration::try_from_secs_f64(*bound).ok());
        Figures {
            requests: self.requests,
            errors: self.errors,
            timed: all,
            p99_over: p99_over.unwrap_or_default(),
        }
    }
}

/// Name, labels and value of a line of the OpenMetrics format. Counts are whole numbers.
fn sample(line: &str) -> Option<(&str, BTreeMap<&str, &str>, u64)> {
    let (name, rest) = line.split_once('{')?;
    let (labels, value) = rest.rsplit_once("} ")?;
    // Route templates have braces, but neither quotes nor commas.
    let labels = labels.split(',').filter_map(|label| {
        let (key, value) = label.split_once('=')?;
        Some((key, value.trim_matches('"')))
    });
    Some((name, labels.collect(), value.split(' ').next()?.parse().ok()?))
}

/// What a pod says about its stack.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    role: Option<String>,
    in_flight: u64,
    connections: u64,
    database: Option<String>,
}

impl Report {
    /// What it lacks to do all the work of what is live, if it does not know that it is.
    fn unaware(&self, pod: &Address) -> Option<String> {
        let role = self.role.as_deref().filter(|role| *role != "Live")?;
        let (service, at) = (pod.service, pod.admin());
        Some(format!(
            "a pod of the {service} service, at {at}, works as {}: it has not reached the live Service",
            short(role)
        ))
    }
}

/// Asks pods and Services over HTTP, each time on a new connection.
#[derive(Clone, Debug)]
pub struct Pods {
    client: reqwest::Client,
}

impl Pods {
    /// A client that keeps no connection.
    pub fn new() -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .pool_max_idle_per_host(0)
            .timeout(PATIENCE)
            .connect_timeout(CONNECT)
            .no_proxy()
            // Plain HTTP, in the cluster: no authorities are needed, and an image may have none.
            .tls_certs_only([])
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self { client })
    }

    /// Whether this stack answers a row of new connections to each of these Services; if not, what is heard instead.
    pub async fn answers(&self, stack: &Stack, ips: &[(Service, String)]) -> Result<(), String> {
        let name = stack.to_string();
        let rows = ips.iter().map(async |(service, ip)| {
            let at = format!("{}:{LIVE}", host(ip));
            let row = timeout(ROW, self.row(&name, &at)).await;
            let row =
                row.unwrap_or_else(|_| Err(format!("not {ANSWERS} answers within {} s", ROW.as_secs())));
            row.map_err(|heard| format!("no answer of {name} from {at} ({service}): {heard}"))
        });
        join_all(rows).await.into_iter().collect()
    }

    async fn row(&self, name: &str, at: &str) -> Result<(), String> {
        for _ in 0..ANSWERS {
            let response = self.client.get(format!("http://{at}/version")).send().await;
            let response = response.map_err(|error| why(&error))?;
            let stack = response.headers().get("x-exchange-stack");
            match stack.and_then(|stack| stack.to_str().ok()) {
                Some(answering) if answering == name => {}
                Some(other) => return Err(format!("{} answers", short(other))),
                None => return Err(format!("status {}, of no stack", response.status())),
            }
        }
        Ok(())
    }

    /// Open public connections and requests over all of these pods; or why one does not say.
    pub async fn open(&self, pods: &[Address]) -> Result<u64, String> {
        let reports = join_all(pods.iter().map(|pod| self.report(pod))).await;
        let counts = pods.iter().zip(reports).map(|(pod, report)| {
            let open = report.map(|report| report.connections + report.in_flight);
            let (service, at) = (pod.service, pod.admin());
            open.map_err(|why| {
                format!("the connections of the {service} service cannot be counted at {at}: {why}")
            })
        });
        counts.sum()
    }

    /// The database that these pods use, if one of them says so.
    pub async fn database(&self, pods: &[Address]) -> Option<String> {
        let reports = join_all(pods.iter().map(|pod| self.report(pod))).await;
        reports.into_iter().flatten().find_map(|report| report.database)
    }

    /// What a pod that runs and is not ready says about it, per service.
    pub async fn excuses(&self, pods: &[Address]) -> BTreeMap<Service, String> {
        let not_ready = pods.iter().filter(|pod| !pod.ready);
        let told = join_all(not_ready.map(async |pod| {
            let response = self.client.get(pod.url("readyz")).send().await.ok()?;
            let not_ready = !response.status().is_success();
            let text = text(response).await.ok()?;
            not_ready.then(|| (pod.service, short(&text)))
        }));
        told.await.into_iter().flatten().collect()
    }

    /// How requests of the live lane went since the verification began, per service; and which pod that is ready does not
    /// say it.
    pub async fn figures(
        &self,
        pods: &[Address],
        baselines: &mut Baselines,
    ) -> (BTreeMap<Service, Figures>, Option<String>) {
        let pages = join_all(pods.iter().map(|pod| self.page(pod, "metrics"))).await;
        let mut unheard = None;
        for (pod, page) in pods.iter().zip(pages) {
            match page {
                Ok(page) => baselines.said(pod, Counters::parse(&page)),
                Err(why) if pod.ready => {
                    let (service, at) = (pod.service, pod.admin());
                    let told = format!("the figures of the {service} service cannot be read at {at}: {why}");
                    unheard.get_or_insert(told);
                }
                Err(_) => {}
            }
        }
        (baselines.figures(), unheard)
    }

    /// Which pod that is ready has not found out that its stack is live, as it does by asking its live Service: until then it sends no
    /// notifications, for one.
    pub async fn unaware(&self, pods: &[Address]) -> Option<String> {
        let ready = pods.iter().filter(|pod| pod.ready);
        let unaware = ready.map(async |pod| self.report(pod).await.ok()?.unaware(pod));
        join_all(unaware).await.into_iter().flatten().next()
    }

    async fn report(&self, pod: &Address) -> Result<Report, String> {
        let page = self.page(pod, "stack").await?;
        serde_json::from_str(&page).map_err(|error| format!("it cannot be understood: {error}"))
    }

    async fn page(&self, pod: &Address, path: &str) -> Result<String, String> {
        let response = self.client.get(pod.url(path)).send().await;
        let response = response.and_then(reqwest::Response::error_for_status);
        text(response.map_err(|error| why(&error))?).await
    }
}

/// What a pod answers, which may be of anybody's making.
async fn text(mut response: reqwest::Response) -> Result<String, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| why(&error))? {
        if body.len() + chunk.len() > LONGEST {
            return Err(format!("the answer is longer than {LONGEST} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    String::from_utf8(body).map_err(|_| "the answer is no text".to_owned())
}

/// Why there was no answer, in few words, which are the same each time: an address at which nobody is either lets one wait or
/// is told to be none.
fn why(error: &reqwest::Error) -> String {
    if error.is_timeout() && !error.is_connect() {
        return "the answer timed out".to_owned();
    }
    if let Some(status) = error.status() {
        return format!("status {status}");
    }
    let mut cause: &dyn Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if error.is_connect() && !cause.downcast_ref().is_some_and(refused) {
        return "no connection".to_owned();
    }
    cause.to_string()
}

/// What keeps a pod from becoming ready, if that can be told. Words that do not change from one look to the next.
pub fn trouble(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    if let Some(end) = &pod.metadata.deletion_timestamp {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        return (end.0.duration_until(Timestamp::now()) > ENDING).then(|| {
            let (name, node) = (pod.name_any(), node.unwrap_or("no node"));
            format!("{name} on {node} should have ended by {}", end.0)
        });
    }
    let conditions = status.conditions.iter().flatten();
    let unschedulable = conditions
        .into_iter()
        .find(|it| it.type_ == "PodScheduled" && it.status == "False")
        .and_then(|it| it.message.clone());
    if let Some(message) = unschedulable {
        return Some(short(&format!("no node for it: {message}")));
    }
    let containers = status
        .init_container_statuses
        .iter()
        .chain(&status.container_statuses);
    containers.flatten().filter(|it| !it.ready).find_map(stuck)
}

fn stuck(container: &ContainerStatus) -> Option<String> {
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    match waiting.and_then(|it| it.reason.as_deref()) {
        // They take turns.
        Some("ErrImagePull" | "ImagePullBackOff") => {
            return Some(format!("ImagePullBackOff {}", container.image));
        }
        Some(
            reason @ ("CreateContainerConfigError"
            | "CreateContainerError"
            | "InvalidImageName"
            | "RunContainerError"),
        ) => {
            let message = waiting.and_then(|it| it.message.clone()).unwrap_or_default();
            return Some(short(&format!("{reason}: {message}")));
        }
        _ => {}
    }
    let last = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    // Who has been started anew may run, and say himself why he is not ready.
    let what = match waiting.and_then(|it| it.reason.as_deref()) {
        Some("CrashLoopBackOff") => "CrashLoopBackOff:",
        _ => "restarted,",
    };
    last.map(|last| format!("{what} its last exit code was {}", last.exit_code))
}

/// What keeps the pods of a service, seen from outside and as they say it themselves.
pub fn joined(trouble: Option<String>, excuse: Option<&str>) -> Option<String> {
    match (trouble, excuse) {
        (Some(trouble), Some(excuse)) => Some(format!("{trouble}; not ready: {excuse}")),
        (None, Some(excuse)) => Some(format!("not ready: {excuse}")),
        (trouble, None) => trouble,
    }
}

/// What keeps the pods of a Deployment from being created, if that is so: a quota, a policy.
pub fn replica_failure(deployment: &Deployment) -> Option<String> {
    let conditions = deployment
        .status
        .iter()
        .flat_map(|it| it.conditions.iter().flatten());
    let mut failures = conditions.filter(|it| it.type_ == "ReplicaFailure" && it.status == "True");
    Some(not_created(
        failures.next()?.message.as_deref().unwrap_or_default(),
    ))
}

/// Why a pod was not created, without the name that it would have had: each try has another.
pub fn not_created(message: &str) -> String {
    let why = message
        .split_once("is forbidden: ")
        .map_or(message, |(_, why)| why);
    short(&format!("no pod can be created: {why}"))
}

/// That somebody else has suspended a Job, if that is so: no deadline of its own runs then.
pub fn suspended(job: &BatchJob) -> Option<String> {
    let suspended = job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true);
    suspended.then(|| "somebody has suspended it (spec.suspend)".to_owned())
}

/// Which try of a Job this is, and how the one before ended.
pub fn tried(job: &BatchJob, pods: &[Pod]) -> Option<String> {
    let failed = job.status.as_ref()?.failed.filter(|failed| *failed > 0)?;
    let tries = job.spec.as_ref()?.backoff_limit? + 1;
    let said = last_words(job, pods).map_or_else(String::new, |said| format!(", after: {said}"));
    Some(format!("try {} of {tries}{said}", (failed + 1).min(tries)))
}

/// How a Job of this kind stands; if it has failed, with what its pod said last. A result stands also while its Job is being
/// deleted. Who is deleted before has none: it is not finished, and made again when it is gone.
///
/// A Job that has met its criteria cannot fail any more, and is complete when none of its pods is left running. A test has
/// passed by then; a migration may still be at work in a pod that is going.
pub fn job_state(kind: &JobKind, job: &BatchJob, pods: &[Pod]) -> JobState {
    let conditions = job
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    for condition in conditions.filter(|it| it.status == "True") {
        match condition.type_.as_str() {
            "Complete" => return JobState::Passed,
            "SuccessCriteriaMet" if !kind.migrates() => return JobState::Passed,
            "Failed" => {
                let message = condition.message.clone().unwrap_or_default();
                return JobState::Failed(last_words(job, pods).unwrap_or(message));
            }
            _ => {}
        }
    }
    JobState::Running
}

/// Whether a container of it runs.
pub fn runs(pod: &Pod) -> bool {
    let statuses = pod.status.iter();
    let mut containers = statuses.flat_map(|status| status.container_statuses.iter().flatten());
    containers.any(|it| it.state.as_ref().is_some_and(|state| state.running.is_some()))
}

/// What a line of the exchange's log says, which is JSON.
pub fn message(line: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    Some(short(line.get("message")?.as_str()?))
}

/// The pods of a Job.
pub fn of<'a>(job: &BatchJob, pods: &'a [Pod]) -> impl DoubleEndedIterator<Item = &'a Pod> {
    let uid = job.uid().unwrap_or_default();
    pods.iter()
        .filter(move |pod| pod.owner_references().iter().any(|owner| owner.uid == uid))
}

fn last_words(job: &BatchJob, pods: &[Pod]) -> Option<String> {
    let ends = of(job, pods).flat_map(|pod| {
        let status = pod
            .status
            .iter()
            .flat_map(|status| status.container_statuses.iter().flatten());
        status.filter_map(|container| container.state.as_ref()?.terminated.as_ref())
    });
    let said = ends
        .filter(|end| end.exit_code != 0)
        .filter_map(|end| end.message.as_deref());
    let said = said.map(str::trim).rfind(|said| !said.is_empty())?;
    Some(the_point(said))
}

/// What went wrong, on one line: the step that failed, in a report of steps; else what was said last, of the exchange's own
/// log its last message.
fn the_point(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    let failed = lines.iter().position(|line| line.starts_with("FAIL"));
    let Some(from) = failed else {
        if let Some(message) = lines.last().and_then(|line| message(line)) {
            return message;
        }
        let line = harmless(&lines.join(" "));
        let cut = line.chars().count().saturating_sub(TOLD);
        return line.chars().skip(cut).collect();
    };
    short(
        &lines
            .get(from..)
            .unwrap_or_default()
            .iter()
            .take(2)
            .copied()
            .collect::<Vec<_>>()
            .join(" "),
    )
}

/// The beginning of a text, on one line.
pub(crate) fn short(text: &str) -> String {
    let line = harmless(text);
    if line.chars().count() <= TOLD {
        return line;
    }
    line.chars().take(TOLD).chain(['…']).collect()
}

/// A text on one line, without what would steer the terminal of whoever reads it.
fn harmless(text: &str) -> String {
    let steers = |it: char| {
        it.is_control()
            || matches!(it, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.replace(steers, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::get};
    use serde_json::json;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const PAGE: &str = r#"# TYPE http_server_requests counter
http_server_requests_total{method="POST",route="/trade/add",lane="live",status="201"} 990
http_server_requests_total{method="POST",route="/trade/add",lane="live",status="503"} 10
http_server_requests_total{method="POST",route="/trade/add",lane="test",status="500"} 7
http_server_requests_total{method="GET",route="/version",lane="live",status="200"} 5000
http_server_requests_total{method="GET",route="unmatched",lane="live",status="404"} 300
http_server_request_duration_seconds_bucket{le="0.005",method="GET",route="/account/{id}",lane="live"} 98
http_server_request_duration_seconds_bucket{le="0.05",method="GET",route="/account/{id}",lane="live"} 99
http_server_request_duration_seconds_bucket{le="+Inf",method="GET",route="/account/{id}",lane="live"} 100
http_server_request_duration_seconds_bucket{le="0.005",method="GET",route="/version",lane="live"} 5000
http_server_request_duration_seconds_bucket{le="0.05",method="GET",route="/version",lane="live"} 5000
http_server_request_duration_seconds_bucket{le="+Inf",method="GET",route="/version",lane="live"} 5000
http_server_request_duration_seconds_bucket{le="0.005",method="POST",route="/login",lane="live"} 0
http_server_request_duration_seconds_bucket{le="+Inf",method="POST",route="/login",lane="live"} 100
"#;

    #[test]
    fn only_what_clients_ask_of_the_live_lane_counts_and_log_ins_are_not_timed() {
        let figures = Counters::parse(PAGE).figures();
        assert_eq!(
            figures,
            Figures {
                requests: 1000,
                errors: 10,
                timed: 100,
                p99_over: Duration::from_millis(5)
            }
        );
    }

    /// So many requests that took so many seconds each.
    type Took = [(u64, f64)];

    fn timed(took: &Took) -> Counters {
        let bounds = ["0.1", "0.25", "0.5", "1.0", "2.5", "10.0", "+Inf"];
        let within = |bound: &str| {
            let bound: f64 = bound.parse().unwrap_or(f64::INFINITY);
            let counts = took.iter().filter(|(_, seconds)| *seconds <= bound);
            counts.map(|(count, _)| count).sum::<u64>()
        };
        Counters {
            buckets: bounds.map(|bound| (bound.to_owned(), within(bound))).into(),
            ..Counters::default()
        }
    }

    #[test]
    fn of_the_99th_percentile_only_that_is_told_which_is_sure() {
        let seconds = Duration::from_secs_f64;
        let rows: [(&str, &Took, f64); 8] = [
            ("nothing was asked", &[], 0.0),
            ("all are fast", &[(1000, 0.02)], 0.0),
            // 99 of 100 are fast: that one is slow does not count.
            ("one in a hundred is slow", &[(990, 0.02), (10, 9.0)], 0.0),
            ("eleven in a thousand are slow", &[(989, 0.02), (11, 9.0)], 2.5),
            // A limit of 2 s is kept, and one of 1 s is not, although both lie in the bounds of one bucket or at them.
            ("within a bucket", &[(500, 0.2), (500, 1.1)], 1.0),
            ("at the bound of a bucket", &[(1000, 1.0)], 0.5),
            ("in the last bucket", &[(1000, 10.0)], 2.5),
            ("beyond all bounds", &[(900, 0.2), (100, 3600.0)], 10.0),
        ];
        for (what, took, over) in rows {
            assert_eq!(timed(took).figures().p99_over, seconds(over), "{what}");
        }
    }

    fn pod(pod: &str, restarts: i32) -> Address {
        Address {
            service: Service::Trade,
            pod: pod.to_owned(),
            ip: "192.0.2.1".to_owned(),
            ready: true,
            restarts,
        }
    }

    /// Requests and errors that are counted after pods have said this in turn: their restarts, requests and errors.
    fn counted(fresh: bool, pages: &[(&str, i32, u64, u64)]) -> (u64, u64) {
        let mut baselines = Baselines::default();
        baselines.begin((3, 2), fresh);
        for (name, restarts, requests, errors) in pages {
            let page = Counters {
                requests: *requests,
                errors: *errors,
                ..timed(&[(*requests, 0.02)])
            };
            baselines.said(&pod(name, *restarts), page);
        }
        let figures = baselines.figures()[&Service::Trade];
        assert_eq!(figures.timed, figures.requests);
        (figures.requests, figures.errors)
    }

    #[test]
    fn what_was_counted_counts_although_who_counted_it_has_ended() {
        // It has just been swapped in: all that its pods have counted is since then.
        assert_eq!(counted(true, &[("a", 0, 100, 10)]), (100, 10));
        assert_eq!(counted(true, &[("a", 0, 100, 10), ("a", 0, 130, 12)]), (130, 12));
        assert_eq!(counted(true, &[("a", 0, 100, 10), ("b", 0, 20, 1)]), (120, 11));
        // Its container was started anew; also when that has counted more than the one before, or is not listed yet.
        assert_eq!(counted(true, &[("a", 0, 100, 10), ("a", 1, 20, 0)]), (120, 10));
        assert_eq!(counted(true, &[("a", 0, 3, 3), ("a", 1, 5, 4)]), (8, 7));
        assert_eq!(counted(true, &[("a", 0, 100, 10), ("a", 0, 20, 0)]), (120, 10));
        let followed = [
            ("a", 0, 100, 10),
            ("a", 0, 20, 0),
            ("a", 0, 25, 0),
            ("a", 1, 30, 0),
        ];
        assert_eq!(counted(true, &followed), (130, 10));
        let crashes = [("a", 0, 50, 9), ("a", 1, 50, 9), ("a", 2, 50, 9), ("a", 2, 60, 9)];
        assert_eq!(counted(true, &crashes), (160, 27));
        // It was live before: what counts is what comes from now on.
        assert_eq!(counted(false, &[("a", 0, 100, 10)]), (0, 0));
        assert_eq!(counted(false, &[("a", 0, 100, 10), ("a", 0, 130, 12)]), (30, 2));
        assert_eq!(counted(false, &[("a", 0, 100, 10), ("a", 1, 20, 1)]), (20, 1));
    }

    /// Before its swap somebody may have looked at it, or a test have provoked errors.
    #[test]
    fn what_a_candidate_was_asked_before_its_swap_does_not_count() {
        let page = |requests, errors| Counters {
            requests,
            errors,
            ..Counters::default()
        };
        let mut baselines = Baselines::default();
        assert!(baselines.begin((3, 2), false));
        baselines.said(&pod("a", 0), page(20_000, 50));
        assert!(!baselines.begin((3, 2), true));
        baselines.said(&pod("a", 0), page(20_100, 55));
        // It has been started since.
        baselines.said(&pod("b", 0), page(10, 1));
        let figures = baselines.figures()[&Service::Trade];
        assert_eq!((figures.requests, figures.errors), (110, 6));
    }

    #[test]
    fn another_verification_begins_from_nothing() {
        let mut baselines = Baselines::default();
        let page = Counters::parse(PAGE);
        baselines.begin((3, 2), true);
        baselines.said(&pod("a", 0), page.clone());
        baselines.begin((3, 2), true);
        assert_eq!(baselines.figures()[&Service::Trade].errors, 10);
        baselines.begin((3, 3), false);
        baselines.said(&pod("a", 0), page);
        assert_eq!(baselines.figures()[&Service::Trade].errors, 0);
    }

    #[tokio::test]
    async fn why_a_stack_does_not_answer_is_told() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let pods = Pods::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let route = get(|| async { [("x-exchange-stack", "blue-1")] });
        let router = Router::new().route("/version", route);
        tokio::spawn(async move { axum::serve(listener, router).await });
        assert_eq!(pods.row("blue-1", &at).await, Ok(()));
        assert_eq!(pods.row("green-2", &at).await, Err("blue-1 answers".to_owned()));
        // Taken, so that nobody else is given it, and nobody listens.
        let taken = TcpSocket::new_v4().unwrap();
        taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let nobody = taken.local_addr().unwrap().to_string();
        let heard = pods.row("blue-1", &nobody).await.unwrap_err();
        assert!(heard.starts_with("Connection refused"), "{heard}");
    }

    #[test]
    fn what_is_told_steers_no_terminal() {
        assert_eq!(
            short("a\u{1b}[2Jb\u{9b}c\u{202e}d\n e"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d e"
        );
    }

    #[tokio::test]
    async fn no_more_is_read_of_an_answer_than_any_needs() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let answer = |length: usize| get(move || async move { "a".repeat(length) });
        let router = Router::new()
            .route("/long", answer(LONGEST))
            .route("/longer", answer(LONGEST + 1));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let ask = async |path: &str| {
            let response = Pods::new()
                .unwrap()
                .client
                .get(format!("http://{at}/{path}"))
                .send();
            text(response.await.unwrap()).await
        };
        assert_eq!(ask("long").await.unwrap().len(), LONGEST);
        ask("longer").await.unwrap_err();
    }

    #[test]
    fn a_pod_that_does_not_know_that_it_is_live_is_named() {
        for (role, told) in [
            (json!("Live"), false),
            (json!("Standby"), true),
            (Value::Null, false),
        ] {
            let report = json!({"role": role, "inFlight": 0, "connections": 0, "database": null});
            let report: Report = serde_json::from_value(report).unwrap();
            let unaware = report.unaware(&pod("a", 0));
            assert_eq!(unaware.is_some(), told, "{unaware:?}");
        }
    }

    #[test]
    fn what_keeps_a_container_is_told() {
        let keeps = |state: Value, last: Value| {
            let container = json!({"name": "trade", "ready": false, "restartCount": 1, "image": "acme/exchange:1",
                                   "imageID": "", "state": state, "lastState": last});
            let pod = json!({"metadata": {"name": "trade"}, "status": {"containerStatuses": [container]}});
            trouble(&serde_json::from_value(pod).unwrap())
        };
        let waits = |reason: &str| json!({"waiting": {"reason": reason, "message": "why"}});
        let (runs, nothing) = (json!({"running": {}}), json!({}));
        let ended = json!({"terminated": {"exitCode": 137}});
        let rows = [
            (runs.clone(), nothing.clone(), None),
            // The kubelet ends what does not become ready in time, and starts it anew.
            (runs, ended.clone(), Some("restarted, its last exit code was 137")),
            (
                waits("CrashLoopBackOff"),
                ended.clone(),
                Some("CrashLoopBackOff: its last exit code was 137"),
            ),
            (
                waits("ErrImagePull"),
                ended,
                Some("ImagePullBackOff acme/exchange:1"),
            ),
            (
                waits("CreateContainerConfigError"),
                nothing.clone(),
                Some("CreateContainerConfigError: why"),
            ),
            (waits("ContainerCreating"), nothing, None),
        ];
        for (state, last, told) in rows {
            let what = format!("{state} after {last}");
            assert_eq!(keeps(state, last).as_deref(), told, "{what}");
        }
    }

    #[test]
    fn a_pod_that_should_have_ended_is_named_with_its_node() {
        let going = |by: &str| {
            let pod = json!({"metadata": {"name": "trade-1", "deletionTimestamp": by},
                             "spec": {"containers": [], "nodeName": "node-7"}, "status": {}});
            trouble(&serde_json::from_value(pod).unwrap())
        };
        let told = "trade-1 on node-7 should have ended by 2026-01-01T00:00:00Z";
        assert_eq!(going("2026-01-01T00:00:00Z").as_deref(), Some(told));
        let just_now = Timestamp::now() - SignedDuration::from_secs(20);
        assert_eq!(going(&just_now.to_string()), None);
    }

    #[test]
    fn a_job_stands_as_it_has_ended_also_while_it_is_being_deleted() {
        let of = |kind: &JobKind, ended: Option<&str>, going: bool| {
            let condition = ended.map(|kind| json!({"type": kind, "status": "True", "message": "why"}));
            let job = json!({
                "metadata": {"name": "smoke", "deletionTimestamp": going.then_some("2026-01-01T00:00:00Z")},
                "status": {"conditions": condition.into_iter().collect::<Vec<_>>()},
            });
            job_state(kind, &serde_json::from_value(job).unwrap(), &[])
        };
        let state = |ended: Option<&str>, going: bool| of(&JobKind::Smoke, ended, going);
        for going in [false, true] {
            assert_eq!(state(Some("Complete"), going), JobState::Passed);
            assert_eq!(state(Some("Failed"), going), JobState::Failed("why".to_owned()));
            assert_eq!(state(Some("Suspended"), going), JobState::Running);
            let met = Some("SuccessCriteriaMet");
            assert_eq!(state(met, going), JobState::Passed);
            assert_eq!(
                of(&JobKind::Expand, met, going),
                JobState::Running,
                "a pod may be left"
            );
            // Deleted before its end it has not failed: it is made again.
            assert_eq!(state(None, going), JobState::Running);
        }
    }

    #[test]
    fn what_a_pod_says_itself_is_told_beside_what_is_seen_of_it() {
        let seen = || Some("restarted, its last exit code was 137".to_owned());
        let said = Some("the database is out of reach");
        let told = "restarted, its last exit code was 137; not ready: the database is out of reach";
        assert_eq!(joined(seen(), said).as_deref(), Some(told));
        assert_eq!(
            joined(None, said).as_deref(),
            Some("not ready: the database is out of reach")
        );
        assert_eq!(joined(seen(), None), seen());
        assert_eq!(joined(None, None), None);
    }

    #[test]
    fn of_a_log_only_what_a_whole_line_says_is_told() {
        let line = r#"{"@timestamp":"2026-01-01T00:00:00Z","log.level":"info","message":"batch 2 of 5:\n 500 rows"}"#;
        assert_eq!(message(line).as_deref(), Some("batch 2 of 5: 500 rows"));
        assert_eq!(message(&format!("{line}\n")), message(line));
        // It was cut off, or the exchange has not written it.
        let (cut, _) = line.split_at(60);
        for other in [cut, "", "panicked", "5", r#"{"log.level":"info"}"#] {
            assert_eq!(message(other), None, "{other}");
        }
    }

    #[test]
    fn what_went_wrong_is_told() {
        let long = format!("{}\nthe schema is locked", "x".repeat(1000));
        assert!(the_point(&long).ends_with("the schema is locked"));
        assert_eq!(the_point(&long).chars().count(), TOLD);
        let report = "ok      3 ms  register\nFAIL    9 ms  place an order\n     got 500\nok      2 ms  erase the lane";
        assert_eq!(the_point(report), "FAIL 9 ms place an order got 500");
        let written = "{\"message\": \"batch 3 of 9\"}\n{\"log.level\": \"error\", \"message\": \"the schema is locked\"}";
        assert_eq!(the_point(written), "the schema is locked");
    }
}
