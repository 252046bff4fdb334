//! Leader election: who works, as a pure question.
//!
//! It only saves work: what keeps two operators from harming each other are the `resourceVersion`s of their writes. Two
//! rules, and no trust in other machines' clocks: a contender waits a whole lease from when *it* last saw the record
//! change, and a leader stops when *its own* clock says that the renew deadline has passed since it *began* the last
//! renewal that succeeded. The deadline is shorter than the lease, so that the leader stops before a contender starts.
//!
//! Every write of the record carries its `resourceVersion`: of several who try, one succeeds. A leader whose renewal was
//! refused, or not answered in time, has not lost yet: that renewal may have arrived. It looks who holds the record, and
//! goes on until its deadline unless it is somebody else.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How long a record that nobody renews is respected.
pub const LEASE: Duration = Duration::from_secs(4);
/// How long a leader works on after the beginning of its last renewal.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(3);
/// Time between two looks at the record.
pub const RETRY: Duration = Duration::from_secs(1);

/// What of the Lease object counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who has it; nobody after a release.
    pub holder: Option<String>,
    /// Version of the object: changes with every renewal.
    pub resource_version: String,
}

/// What is known of the record, and since when by one's own monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The record as it was last seen; none if there is none.
    pub record: Option<Record>,
    /// When it was first seen like this.
    pub since: Duration,
}

impl Sight {
    /// Sees the record again. A record that has not changed keeps its age.
    #[must_use]
    pub fn see(self, record: Option<Record>, now: Duration) -> Self {
        if self.record == record {
            self
        } else {
            Self { record, since: now }
        }
    }
}

/// What to do about the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is no record: create one.
    Create,
    /// Nobody has it any more: write oneself into it, if it still has this version.
    Take(String),
    /// It is one's own: renew it, if it still has this version.
    Renew(String),
    /// Somebody has it: look again after this time.
    Wait(Duration),
}

/// What `me` should do.
pub fn evaluate(me: &str, sight: &Sight, now: Duration) -> Step {
    let Some(Record {
        holder,
        resource_version,
    }) = &sight.record
    else {
        return Step::Create;
    };
    let version = resource_version.clone();
    match holder {
        None => Step::Take(version),
        Some(holder) if holder == me => Step::Renew(version),
        Some(_) => {
            let left = (sight.since + LEASE).saturating_sub(now);
            if left.is_zero() {
                Step::Take(version)
            } else {
                Step::Wait(left.min(RETRY))
            }
        }
    }
}

/// Whether it is the holder, as far as can be seen.
pub fn holds(me: &str, sight: &Sight) -> bool {
    let holder = sight.record.as_ref().and_then(|record| record.holder.as_deref());
    holder == Some(me)
}

/// For each request about the record: short enough for another try on another connection before the deadline.
const REQUEST_LIMIT: Duration = Duration::from_millis(1250);
/// After a request that failed.
const AGAIN: Duration = Duration::from_millis(100);

/// Takes part in the election.
pub struct Contender {
    /// The Leases of the namespace.
    pub leases: Api<Lease>,
    /// Name of the Lease.
    pub name: String,
    /// One's own name, which nobody else has.
    pub identity: String,
}

/// What a contender knows. Times are of its own monotonic clock.
#[derive(Clone, Debug)]
struct Knowledge {
    sight: Sight,
    /// The beginning of the last renewal that succeeded, as long as nobody else holds the record.
    renewed: Option<Duration>,
    /// Whether the record may be another than the one that was seen last.
    in_doubt: bool,
}

impl Knowledge {
    /// Of the record, before it is seen for the first time.
    const fn nothing(now: Duration) -> Self {
        Self {
            sight: Sight {
                record: None,
                since: now,
            },
            renewed: None,
            in_doubt: true,
        }
    }

    fn see(&mut self, me: &str, record: Option<Record>, now: Duration) {
        self.sight = self.sight.clone().see(record, now);
        self.renewed = self.renewed.filter(|_| holds(me, &self.sight));
        self.in_doubt = false;
    }

    /// A write of one's own, which was begun then, has succeeded.
    fn renew(&mut self, me: &str, record: Record, began: Duration, now: Duration) {
        self.see(me, Some(record), now);
        self.renewed = Some(began);
    }

    /// Until when one leads, unless one renews.
    fn leads_until(&self) -> Option<Duration> {
        self.renewed.map(|renewed| renewed + RENEW_DEADLINE)
    }

    /// Whether one leads. An answer may have come so late that the time which it gives is over.
    fn leads(&self, now: Duration) -> bool {
        self.leads_until().is_some_and(|until| now < until)
    }

    fn give_up(&mut self) {
        self.renewed = None;
        self.in_doubt = true;
    }
}

impl Contender {
    /// Takes part until it is told to stop, and then gives up what it has. `leads` says whether one leads, `reached`
    /// whether the API server has ever answered.
    pub async fn run(
        &self,
        leads: watch::Sender<bool>,
        reached: watch::Sender<bool>,
        stop: CancellationToken,
    ) {
        let origin = Instant::now();
        let mut known = Knowledge::nothing(Duration::ZERO);
        let mut wait = Duration::ZERO;
        while !stop.is_cancelled() {
            // A round that has renewed has moved it.
            let deadline = known.leads_until().map(|until| origin + until);
            let round = async {
                sleep(wait).await;
                let wait = self.round(origin, &mut known, &reached).await;
                tell(&leads, known.leads(origin.elapsed()));
                wait
            };
            tokio::select! {
                next = round => wait = next,
                () = stop.cancelled() => break,
                // Whatever is under way: who cannot renew must stop now.
                () = until(deadline) => {
                    warn!("the lease could not be renewed in time");
                    known.give_up();
                    tell(&leads, false);
                    wait = Duration::ZERO;
                }
            }
        }
        tell(&leads, false);
        if known.renewed.is_some() {
            self.release(&known).await;
        }
    }

    /// One look and one write, if one is due; how long to wait for the next.
    async fn round(&self, origin: Instant, known: &mut Knowledge, reached: &watch::Sender<bool>) -> Duration {
        // A leader knows its record, unless its last renewal failed.
        if known.renewed.is_none() || known.in_doubt {
            let again = if known.renewed.is_some() { AGAIN } else { RETRY };
            match timeout(REQUEST_LIMIT, self.leases.get_opt(&self.name)).await {
                Ok(Ok(lease)) => {
                    reached.send_replace(true);
                    let record = lease.as_ref().map(record);
                    known.see(&self.identity, record, origin.elapsed());
                }
                Ok(Err(error)) => {
                    warn!(error.message = %error, "failed to read the lease");
                    return again;
                }
                Err(_) => return again,
            }
        }
        let began = origin.elapsed();
        let version = match evaluate(&self.identity, &known.sight, began) {
            Step::Create => None,
            Step::Take(version) | Step::Renew(version) => Some(version),
            Step::Wait(wait) => return wait,
        };
        let lease = self.lease(version.clone(), Some(&self.identity));
        let write = async {
            match version {
                None => self.leases.create(&PostParams::default(), &lease).await,
                Some(_) => {
                    self.leases
                        .replace(&self.name, &PostParams::default(), &lease)
                        .await
                }
            }
        };
        known.in_doubt = true;
        match timeout(REQUEST_LIMIT, write).await {
            Ok(Ok(lease)) => {
                let now = origin.elapsed();
                known.renew(&self.identity, record(&lease), began, now);
                // The next one is due a while after this one began, however long it took.
                RETRY.saturating_sub(now.saturating_sub(began))
            }
            // Somebody else was faster, or one's own write that was given up: who, is seen in the next round.
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => AGAIN,
            Ok(Err(error)) => {
                warn!(error.message = %error, "failed to write the lease");
                AGAIN
            }
            Err(_) => AGAIN,
        }
    }

    async fn release(&self, known: &Knowledge) {
        let version = known.sight.record.as_ref().map(|it| it.resource_version.clone());
        let lease = self.lease(version, None);
        let params = PostParams::default();
        let released = self.leases.replace(&self.name, &params, &lease);
        if matches!(timeout(REQUEST_LIMIT, released).await, Ok(Ok(_))) {
            info!("the lease is given up");
        } else {
            warn!("the lease could not be given up: it ends by itself");
        }
    }

    fn lease(&self, version: Option<String>, holder: Option<&str>) -> Lease {
        let now = MicroTime(Timestamp::now());
        Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: version,
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.unwrap_or_default().to_owned()),
                lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        }
    }
}

fn record(lease: &Lease) -> Record {
    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone());
    Record {
        holder: holder.filter(|holder| !holder.is_empty()),
        resource_version: lease.resource_version().unwrap_or_default(),
    }
}

fn tell(leads: &watch::Sender<bool>, now: bool) {
    leads.send_if_modified(|leads| std::mem::replace(leads, now) != now);
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use kube::{Client, client::Body};
    use proptest::prelude::*;
    use serde_json::json;
    use tokio::task::JoinHandle;
    use tower_test::mock;

    use super::*;

    fn record(holder: &str, version: u64) -> Record {
        let holder = Some(holder.to_owned()).filter(|holder| !holder.is_empty());
        Record {
            holder,
            resource_version: version.to_string(),
        }
    }

    #[test]
    fn each_state_of_the_record_has_one_answer() {
        let seconds = Duration::from_secs;
        let sight = |record| Sight {
            record,
            since: seconds(10),
        };
        let rows = [
            ("none", None, 10, Step::Create),
            ("released", Some(record("", 5)), 10, Step::Take("5".to_owned())),
            ("mine", Some(record("me", 5)), 10, Step::Renew("5".to_owned())),
            (
                "mine, long ago",
                Some(record("me", 5)),
                99,
                Step::Renew("5".to_owned()),
            ),
            ("another's", Some(record("you", 5)), 10, Step::Wait(seconds(1))),
            (
                "another's, almost over",
                Some(record("you", 5)),
                13,
                Step::Wait(seconds(1)),
            ),
            (
                "another's, over",
                Some(record("you", 5)),
                14,
                Step::Take("5".to_owned()),
            ),
        ];
        for (name, record, now, expected) in rows {
            assert_eq!(evaluate("me", &sight(record), seconds(now)), expected, "{name}");
        }
    }

    #[test]
    fn a_renewal_seen_starts_the_wait_anew() {
        let sight = Sight {
            record: Some(record("you", 1)),
            since: Duration::ZERO,
        };
        let same = sight.clone().see(Some(record("you", 1)), Duration::from_secs(3));
        assert_eq!(same.since, Duration::ZERO);
        let renewed = sight.see(Some(record("you", 2)), Duration::from_secs(3));
        assert_eq!(renewed.since, Duration::from_secs(3));
    }

    /// A contender by the name of `me`, whose API server is the test.
    struct Running {
        requests: mock::Handle<Request<Body>, Response<Body>>,
        /// Whether it says that it leads.
        leading: watch::Receiver<bool>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Running {
        fn start() -> Self {
            let (service, requests) = mock::pair();
            let contender = super::Contender {
                leases: Api::namespaced(Client::new(service, "ns"), "ns"),
                name: "one".to_owned(),
                identity: "me".to_owned(),
            };
            let (leads, leading) = watch::channel(false);
            let (reached, _) = watch::channel(false);
            let stop = CancellationToken::new();
            let until = stop.clone();
            let task = tokio::spawn(async move { contender.run(leads, reached, until).await });
            Self {
                requests,
                leading,
                stop,
                task,
            }
        }
    }

    /// A leader's first renewal meets a conflict, after which the record has this holder. Whether it says that it leads, at
    /// each of its requests and at the end.
    async fn after_a_conflict(holder: &str) -> Vec<bool> {
        let Running {
            mut requests,
            mut leading,
            stop,
            task,
        } = Running::start();
        let lease = |version: &str, holder: &str| {
            let lease = json!({"metadata": {"name": "one", "resourceVersion": version}, "spec": {"holderIdentity": holder}});
            (200, lease)
        };
        let refused = |code: u16, reason: &str| {
            let status = json!({"kind": "Status", "status": "Failure", "reason": reason, "code": code});
            (code, status)
        };
        let mut said = Vec::new();
        for (method, (code, answer)) in [
            ("GET", refused(404, "NotFound")),
            ("POST", lease("1", "me")),
            ("PUT", refused(409, "Conflict")),
            ("GET", lease("2", holder)),
        ] {
            let (request, send) = requests.next_request().await.unwrap();
            assert_eq!(request.method(), method);
            said.push(*leading.borrow());
            let answer = Body::from(answer.to_string().into_bytes());
            send.send_response(Response::builder().status(code).body(answer).unwrap());
        }
        if holder == "me" {
            let (request, _unanswered) = requests.next_request().await.unwrap();
            assert_eq!(request.method(), "PUT");
        } else {
            leading.wait_for(|leads| !leads).await.unwrap();
        }
        said.push(*leading.borrow());
        stop.cancel();
        drop(requests);
        task.await.unwrap();
        said
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_arrived_without_an_answer_is_no_loss() {
        assert_eq!(after_a_conflict("me").await, [false, false, true, true, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn whose_second_try_has_renewed_leads_on() {
        let Running {
            mut requests,
            mut leading,
            stop,
            task,
        } = Running::start();
        let answer = |version: &str| {
            let lease = json!({"metadata": {"name": "one", "resourceVersion": version}, "spec": {"holderIdentity": "me"}});
            Response::new(Body::from(lease.to_string().into_bytes()))
        };
        let mut renewals = Vec::new();
        let mut unanswered = None;
        while renewals.len() < 4 {
            let (request, send) = requests.next_request().await.unwrap();
            if request.method() == "PUT" {
                renewals.push(Instant::now());
            }
            if renewals.len() == 2 && unanswered.is_none() {
                // The connection is dead.
                unanswered = Some(send);
            } else {
                send.send_response(answer(&renewals.len().to_string()));
            }
            if renewals.len() == 1 {
                leading.wait_for(|leads| *leads).await.unwrap();
            }
        }
        assert!(!leading.has_changed().unwrap(), "it has given up in between");
        assert!(renewals[3] - renewals[0] > RENEW_DEADLINE, "{renewals:?}");
        stop.cancel();
        drop(requests);
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_sees_another_holder_stops_at_once() {
        assert_eq!(after_a_conflict("you").await, [false, false, true, true, false]);
    }

    /// One contender with a clock of its own.
    struct Contender {
        name: &'static str,
        skew: Duration,
        known: Knowledge,
        /// A write on its way: what it is about, and when it was begun.
        sent: Option<(Option<String>, Duration)>,
    }

    proptest! {
        /// Contenders with different clocks, whose requests take any time, who stop and go on at any time: at no time
        /// do two lead.
        #[test]
        fn no_two_lead(skew in 0_u64..1_000_000, steps in prop::collection::vec((0_usize..2, 0_u8..3, 0_u64..900), 1..400)) {
            let contender = |name, skew| Contender {
                name,
                skew: Duration::from_millis(skew),
                known: Knowledge::nothing(Duration::from_millis(skew)),
                sent: None,
            };
            let mut all = [contender("a", 0), contender("b", skew)];
            let (mut lease, mut version, mut time): (Option<Record>, u64, Duration) = (None, 0, Duration::ZERO);
            for (who, what, millis) in steps {
                time += Duration::from_millis(millis);
                let it = &mut all[who];
                let now = time + it.skew;
                match (what, it.sent.take()) {
                    // The write arrives.
                    (0, Some((expected, began))) => {
                        if expected == lease.as_ref().map(|lease| lease.resource_version.clone()) {
                            version += 1;
                            let written = record(it.name, version);
                            lease = Some(written.clone());
                            // The answer may be lost.
                            if millis % 3 > 0 {
                                it.known.renew(it.name, written, began, now);
                            }
                        }
                    }
                    (1, None) => {
                        it.known.see(it.name, lease.clone(), now);
                        it.sent = match evaluate(it.name, &it.known.sight, now) {
                            Step::Create => Some((None, now)),
                            Step::Take(version) | Step::Renew(version) => Some((Some(version), now)),
                            Step::Wait(_) => None,
                        };
                    }
                    (_, sent) => it.sent = sent,
                }
                let leading = all.iter().filter(|it| it.known.leads(time + it.skew));
                prop_assert!(leading.count() <= 1);
            }
        }
    }
}
