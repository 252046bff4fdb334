//! Leader election: who works, as a pure question.
//!
//! It only saves work: what keeps two operators from harming each other are the `resourceVersion`s of their writes. Two
//! rules, and no trust in other machines' clocks: a contender waits a whole lease from when *it* last saw the record
//! change, and a leader stops when *its own* clock says that the renew deadline has passed since it *began* the last
//! renewal that succeeded. The deadline is shorter than the lease, so that the leader stops before a contender starts.
//!
//! Every write of the record carries its `resourceVersion`: of several who try, one succeeds.

use std::time::Duration;

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

/// Whether a leader whose last successful renewal began at this time may go on.
pub fn leads(renewed: Duration, now: Duration) -> bool {
    now.saturating_sub(renewed) < RENEW_DEADLINE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// One contender with a clock of its own.
    struct Contender {
        name: &'static str,
        skew: Duration,
        sight: Sight,
        renewed: Option<Duration>,
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
                sight: Sight { record: None, since: Duration::from_millis(skew) },
                renewed: None,
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
                            lease = Some(record(it.name, version));
                            it.renewed = Some(began);
                        } else {
                            it.renewed = None;
                        }
                        it.sight = it.sight.clone().see(lease.clone(), now);
                    }
                    (1, None) => {
                        it.sight = it.sight.clone().see(lease.clone(), now);
                        it.sent = match evaluate(it.name, &it.sight, now) {
                            Step::Create => Some((None, now)),
                            Step::Take(version) | Step::Renew(version) => Some((Some(version), now)),
                            Step::Wait(_) => None,
                        };
                    }
                    (_, sent) => it.sent = sent,
                }
                let leading = all.iter().filter(|it| it.renewed.is_some_and(|renewed| leads(renewed, time + it.skew)));
                prop_assert!(leading.count() <= 1);
            }
        }
    }
}
