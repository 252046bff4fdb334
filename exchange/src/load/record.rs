//! What became of each request, and the summary of it.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

/// The operation of log-ins. They are sent one after the other, each when the one before is answered, not at a rate: one that
/// had to wait for another would not show it, so how long they take is not summed up.
pub(crate) const LOG_IN: &str = "login";

/// What became of one request. Times are from the moment at which it was meant to be sent, whatever the client was
/// busy with: a server that makes clients wait cannot hide it (no coordinated omission). Those of log-ins are from the moment at
/// which it was sent.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    /// When it was meant to be sent, since the start of the run.
    #[serde(serialize_with = "milliseconds", rename = "intended_ms")]
    pub(crate) intended: Duration,
    /// From then to the end of the response, or to the failure.
    #[serde(serialize_with = "milliseconds", rename = "latency_ms")]
    pub(crate) latency: Duration,
    /// What was asked.
    pub(crate) operation: &'static str,
    /// `http/1.1` or `http/2`.
    pub(crate) protocol: &'static str,
    /// Whether the request was sent slowly on purpose.
    pub(crate) slow: bool,
    /// Whether it came over a connection that idles for a while after each request.
    pub(crate) idles: bool,
    /// The status, if there was an answer.
    pub(crate) status: Option<u16>,
    /// What broke, if there was none.
    pub(crate) error: Option<String>,
    /// The stack that answered, if it said so.
    pub(crate) stack: Option<String>,
}

impl Record {
    /// Why this request counts as failed.
    pub(crate) fn failure(&self) -> Option<String> {
        match (self.status, &self.error) {
            (_, Some(error)) => Some(error.clone()),
            (Some(200..=299), None) => None,
            (Some(status), None) => Some(format!("status {status}")),
            (None, None) => Some("no answer".to_owned()),
        }
    }
}

fn milliseconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64() * 1_000.0)
}

/// Latencies in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Latency {
    pub(crate) count: usize,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

impl Latency {
    /// Of exactly these requests; nothing is estimated.
    pub(crate) fn of(mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        // The smallest latency that so many of 1000 requests do not exceed.
        let at = |permille: usize| {
            let rank = (latencies.len() * permille).div_ceil(1_000).max(1);
            latencies
                .get(rank - 1)
                .map_or(0.0, |latency| latency.as_secs_f64() * 1_000.0)
        };
        Self {
            count: latencies.len(),
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p999: at(999),
            max: at(1_000),
        }
    }
}

/// When a stack answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Presence {
    pub(crate) answers: usize,
    /// The first answer, in milliseconds since the start.
    pub(crate) first_ms: u128,
    /// The last one.
    pub(crate) last_ms: u128,
}

impl Presence {
    /// Of a stack that answered at these times.
    fn of(at: &[u128]) -> Self {
        Self {
            answers: at.len(),
            first_ms: at.iter().min().copied().unwrap_or_default(),
            last_ms: at.iter().max().copied().unwrap_or_default(),
        }
    }
}

/// Most failed requests that are told one by one.
const FAILED_TOLD: usize = 10_000;

/// A request that failed, and when.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Failed {
    pub(crate) operation: &'static str,
    pub(crate) protocol: &'static str,
    pub(crate) failure: String,
    /// When it was meant to be sent, in milliseconds since the start.
    pub(crate) intended_ms: u128,
    /// When it had failed.
    pub(crate) ended_ms: u128,
}

/// All requests together.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) requests: usize,
    pub(crate) failed: usize,
    /// How many failed for which reason.
    pub(crate) failures: BTreeMap<String, usize>,
    /// The first [`FAILED_TOLD`] of them.
    pub(crate) failed_requests: Vec<Failed>,
    pub(crate) statuses: BTreeMap<u16, usize>,
    pub(crate) stacks: BTreeMap<String, Presence>,
    /// Of answered requests that were sent at the rate and not slow on purpose, by operation, by protocol, and `all` of them; `idle`
    /// are those of them whose connection idles. And `slow`, those that were.
    pub(crate) latency: BTreeMap<String, Latency>,
}

/// Sums up.
pub(crate) fn summarize(records: &[Record]) -> Summary {
    let mut summary = Summary {
        requests: records.len(),
        failed: 0,
        failures: BTreeMap::new(),
        failed_requests: Vec::new(),
        statuses: BTreeMap::new(),
        stacks: BTreeMap::new(),
        latency: BTreeMap::new(),
    };
    let mut latencies: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut answers: BTreeMap<String, Vec<u128>> = BTreeMap::new();
    for record in records {
        let ended_ms = (record.intended + record.latency).as_millis();
        if let Some(failure) = record.failure() {
            summary.failed += 1;
            if summary.failed <= FAILED_TOLD {
                summary.failed_requests.push(Failed {
                    operation: record.operation,
                    protocol: record.protocol,
                    failure: failure.clone(),
                    intended_ms: record.intended.as_millis(),
                    ended_ms,
                });
            }
            *summary.failures.entry(failure).or_default() += 1;
        }
        if let Some(status) = record.status {
            *summary.statuses.entry(status).or_default() += 1;
            let groups: &[&str] = match record {
                Record {
                    operation: LOG_IN, ..
                } => &[],
                Record { slow: true, .. } => &["slow"],
                Record { idles: true, .. } => &["all", record.operation, record.protocol, "idle"],
                _ => &["all", record.operation, record.protocol],
            };
            for group in groups {
                latencies.entry(group).or_default().push(record.latency);
            }
        }
        if let Some(stack) = &record.stack {
            answers.entry(stack.clone()).or_default().push(ended_ms);
        }
    }
    summary.stacks = answers
        .into_iter()
        .map(|(stack, at)| (stack, Presence::of(&at)))
        .collect();
    summary.latency = latencies
        .into_iter()
        .map(|(group, latencies)| (group.to_owned(), Latency::of(latencies)))
        .collect();
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(latency: u64, status: Option<u16>, error: Option<&str>) -> Record {
        Record {
            intended: Duration::from_secs(1),
            latency: Duration::from_millis(latency),
            operation: "order",
            protocol: "http/2",
            slow: false,
            idles: false,
            status,
            error: error.map(str::to_owned),
            stack: status.map(|_| "blue-1".to_owned()),
        }
    }

    #[test]
    fn percentiles_are_exact() {
        let latency = Latency::of((1..=1_000).rev().map(Duration::from_millis).collect());
        assert_eq!(
            latency,
            Latency {
                count: 1_000,
                p50: 500.0,
                p90: 900.0,
                p99: 990.0,
                p999: 999.0,
                max: 1_000.0
            }
        );
        let one = Latency::of(vec![Duration::from_millis(7)]);
        assert_eq!(
            one,
            Latency {
                count: 1,
                p50: 7.0,
                p90: 7.0,
                p99: 7.0,
                p999: 7.0,
                max: 7.0
            }
        );
        assert_eq!(Latency::of(Vec::new()), Latency::default());
    }

    #[test]
    fn log_ins_count_but_their_time_does_not() {
        let log_in = |latency, status, error| Record {
            operation: LOG_IN,
            protocol: "http/1.1",
            ..record(latency, status, error)
        };
        let summary = summarize(&[
            record(5, Some(201), None),
            log_in(700, Some(200), None),
            log_in(800, None, Some("timeout")),
        ]);
        assert_eq!((summary.requests, summary.failed), (3, 1));
        assert_eq!(summary.failed_requests[0].operation, LOG_IN);
        assert_eq!(summary.stacks["blue-1"].answers, 2);
        let groups: Vec<_> = summary.latency.keys().map(String::as_str).collect();
        assert_eq!(groups, ["all", "http/2", "order"]);
        assert_eq!(summary.latency["all"].count, 1);
    }

    #[test]
    fn what_is_slow_on_purpose_and_what_idles_can_be_told_apart() {
        let slow = Record {
            slow: true,
            ..record(2_000, Some(201), None)
        };
        let idle = Record {
            idles: true,
            ..record(5, Some(201), None)
        };
        let summary = summarize(&[record(5, Some(201), None), slow, idle]);
        let count = |group: &str| summary.latency[group].count;
        assert_eq!(
            ["all", "http/2", "order", "idle", "slow"].map(count),
            [2, 2, 2, 1, 1]
        );
        assert_eq!(summary.latency["slow"], Latency::of(vec![Duration::from_secs(2)]));
    }

    #[test]
    fn what_was_not_answered_with_success_has_failed() {
        let summary = summarize(&[
            record(5, Some(201), None),
            record(6, Some(503), None),
            record(7, None, Some("connection closed")),
            record(8, Some(200), Some("the body was cut off")),
        ]);
        assert_eq!((summary.requests, summary.failed), (4, 3));
        assert_eq!(summary.failures["status 503"], 1);
        assert_eq!(summary.failures["connection closed"], 1);
        assert_eq!(
            summary.failed_requests[1],
            Failed {
                operation: "order",
                protocol: "http/2",
                failure: "connection closed".to_owned(),
                intended_ms: 1_000,
                ended_ms: 1_007,
            }
        );
        assert_eq!(
            summary.stacks["blue-1"],
            Presence {
                answers: 3,
                first_ms: 1_005,
                last_ms: 1_008,
            }
        );
        assert_eq!(summary.latency["all"].count, 3);
    }
}
