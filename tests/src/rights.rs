//! What somebody may do by RBAC, compared with what the API server's audit log shows that he did.

use std::{collections::BTreeSet, fmt, fs};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::Value;

use crate::{cluster::Cluster, exchange::text};

/// One verb on one kind of resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// Its API group; empty for the core.
    pub group: String,
    /// Its plural name, with the subresource after a slash.
    pub resource: String,
    /// What is done to it, in RBAC's words.
    pub verb: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if self.group.is_empty() {
            Ok(())
        } else {
            write!(f, ".{}", self.group)
        }
    }
}

/// Every right that the rules of a Role or ClusterRole grant. Names of objects are left out: they make a right smaller, not
/// another.
pub fn granted(rules: &Value) -> BTreeSet<Right> {
    let mut granted = BTreeSet::new();
    for rule in rules.as_array().into_iter().flatten() {
        for group in texts(rule, "apiGroups") {
            for resource in texts(rule, "resources") {
                for verb in texts(rule, "verbs") {
                    granted.insert(Right {
                        group: group.to_owned(),
                        resource: resource.to_owned(),
                        verb: verb.to_owned(),
                    });
                }
            }
        }
    }
    granted
}

fn texts<'a>(rule: &'a Value, key: &str) -> impl Iterator<Item = &'a str> + Clone {
    let list = rule.get(key).and_then(Value::as_array);
    list.map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .filter_map(Value::as_str)
}

/// The audit log of a cluster, with its older parts but those that end before this time.
///
/// # Errors
/// If it cannot be read.
pub fn audit_log(cluster: &Cluster, since: Timestamp) -> Result<String> {
    let directory = cluster.logs();
    let mut log = String::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        let (path, end) = (entry.path(), Timestamp::try_from(entry.metadata()?.modified()?)?);
        if end < since {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("audit") && path.extension().is_some_and(|it| it == "log") {
            log += &fs::read_to_string(&path)?;
        }
    }
    Ok(log)
}

/// What lines of an audit log tell of a user. A line that is cut off, as the last one may be while the API server writes it,
/// tells nothing.
fn events<'a>(lines: impl IntoIterator<Item = &'a str>, user: &str) -> impl Iterator<Item = Value> {
    let events = lines
        .into_iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.filter(move |event| text(event, "/user/username") == user)
}

/// What a request was about, with the subresource after a slash.
fn resource_of(event: &Value) -> String {
    let resource = text(event, "/objectRef/resource");
    match text(event, "/objectRef/subresource") {
        "" => resource.to_owned(),
        subresource => format!("{resource}/{subresource}"),
    }
}

/// The requests of a user that came to their end between two times, each as verb and resource.
pub fn requests<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    user: &str,
    from: Timestamp,
    to: Timestamp,
) -> Vec<(String, String)> {
    let mut requests = Vec::new();
    for event in events(lines, user) {
        let at: Option<Timestamp> = text(&event, "/stageTimestamp").parse().ok();
        if text(&event, "/stage") == "ResponseComplete" && at.is_some_and(|at| (from..to).contains(&at)) {
            let [verb, resource] = ["/verb", "/objectRef/resource"].map(|it| text(&event, it).to_owned());
            requests.push((verb, resource));
        }
    }
    requests
}

/// When the API server was done with the last request of a user for an object (its resource with the subresource, its
/// name) that it had got before `until`. None if it is not done.
pub fn answered<'a>(
    lines: impl IntoIterator<Item = &'a str>,
    user: &str,
    (resource, name): (&str, &str),
    until: Timestamp,
) -> Option<Timestamp> {
    let mut last = None;
    // Most lines are about something else, and they are many.
    for event in events(lines.into_iter().filter(|line| line.contains(name)), user) {
        let time = |pointer: &str| text(&event, pointer).parse::<Timestamp>().ok();
        let counts = resource_of(&event) == resource
            && text(&event, "/objectRef/name") == name
            && !["get", "watch", "list"].contains(&text(&event, "/verb"));
        if counts && let Some(begun) = time("/requestReceivedTimestamp").filter(|begun| *begun < until) {
            last = last.max(Some((begun, time("/stageTimestamp"))));
        }
    }
    last.and_then(|(_, done)| done)
}

/// What a user did and what he was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deeds {
    /// What was allowed, whatever came of it.
    pub used: BTreeSet<Right>,
    /// What was forbidden, each as the audit log has it.
    pub denied: Vec<String>,
}

impl Deeds {
    /// Reads lines of an audit log, of which those about this user count.
    pub fn read<'a>(lines: impl IntoIterator<Item = &'a str>, user: &str) -> Self {
        let mut deeds = Self::default();
        for event in events(lines, user) {
            if text(&event, "/objectRef/resource").is_empty() {
                continue;
            }
            let right = Right {
                group: text(&event, "/objectRef/apiGroup").to_owned(),
                resource: resource_of(&event),
                verb: text(&event, "/verb").to_owned(),
            };
            if text(&event, "/annotations/authorization.k8s.io~1decision") == "forbid" {
                deeds
                    .denied
                    .push(format!("{right}: {}", text(&event, "/requestURI")));
            } else {
                deeds.used.insert(right);
            }
        }
        deeds
    }
}

/// What is granted and was not used, beside what has a reason not to have been: `verb resource.group`, and the reason.
pub fn superfluous(granted: &BTreeSet<Right>, deeds: &Deeds, excused: &[(&str, &str)]) -> Vec<String> {
    let left = granted.difference(&deeds.used).map(ToString::to_string);
    left.filter(|right| !excused.iter().any(|(excused, _)| excused == right))
        .collect()
}

/// Excuses that the list is better off without: for what is not granted at all, or is seen to be used.
pub fn stale<'a>(granted: &BTreeSet<Right>, deeds: &Deeds, excused: &[(&'a str, &str)]) -> Vec<&'a str> {
    let left: BTreeSet<String> = granted.difference(&deeds.used).map(ToString::to_string).collect();
    let all = excused.iter().map(|(right, _)| *right);
    all.filter(|right| !left.contains(*right)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const USER: &str = "system:serviceaccount:ns:operator";

    fn line(user: &str, verb: &str, reference: &Value, decision: &str) -> String {
        json!({"kind": "Event", "verb": verb, "user": {"username": user}, "objectRef": reference,
               "requestURI": "/apis/…", "annotations": {"authorization.k8s.io/decision": decision}})
        .to_string()
    }

    fn rules() -> Value {
        json!([
            {"apiGroups": [""], "resources": ["services", "pods"], "verbs": ["get", "list"]},
            {"apiGroups": ["exchange.dev"], "resources": ["exchangedeployments/status"], "verbs": ["update"]},
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "resourceNames": ["one"], "verbs": ["update"]},
        ])
    }

    fn told(rights: &BTreeSet<Right>) -> Vec<String> {
        rights.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn rules_grant_each_verb_on_each_resource() {
        let expected = [
            "get pods",
            "list pods",
            "get services",
            "list services",
            "update leases.coordination.k8s.io",
            "update exchangedeployments/status.exchange.dev",
        ];
        assert_eq!(told(&granted(&rules())), expected);
        assert!(granted(&Value::Null).is_empty());
    }

    #[test]
    fn an_answer_is_that_to_the_last_request_before() {
        let line = |verb: &str, name: &str, begun: u32, done: u32| {
            json!({"verb": verb, "user": {"username": USER},
                   "objectRef": {"resource": "exchangedeployments", "subresource": "status", "name": name},
                   "requestReceivedTimestamp": format!("2026-11-28T12:00:{begun:02}.000001Z"),
                   "stageTimestamp": format!("2026-11-28T12:00:{done:02}.000001Z")})
            .to_string()
        };
        let log = [
            line("patch", "exchange", 20, 30),
            line("patch", "exchange", 1, 2),
            line("get", "exchange", 21, 31),
            line("patch", "exchange-2", 22, 32),
            line("patch", "exchange", 40, 41),
        ];
        let at = |second: u32| format!("2026-11-28T12:00:{second:02}Z").parse().unwrap();
        let answered = |resource: &str, until: u32| {
            let lines = log.iter().map(String::as_str);
            answered(lines, USER, (resource, "exchange"), at(until)).map(|done| done.to_string())
        };
        let done = |second: u32| Some(format!("2026-11-28T12:00:{second:02}.000001Z"));
        assert_eq!(answered("exchangedeployments/status", 25), done(30));
        assert_eq!(answered("exchangedeployments/status", 3), done(2));
        assert_eq!(answered("exchangedeployments/status", 50), done(41));
        assert_eq!(answered("exchangedeployments", 50), None);
    }

    #[test]
    fn a_log_is_read_for_one_user() {
        let services = json!({"resource": "services", "name": "live", "namespace": "prod"});
        let status =
            json!({"resource": "exchangedeployments", "subresource": "status", "apiGroup": "exchange.dev"});
        let mut lines = vec![
            line(USER, "list", &services, "allow"),
            line("somebody else", "get", &services, "allow"),
            line(USER, "update", &status, "allow"),
            line(USER, "delete", &services, "forbid"),
            // What is not about resources: /version, /api.
            line(USER, "get", &Value::Null, "allow"),
        ];
        lines.push(line(USER, "get", &services, "allow").split_off(9));
        let deeds = Deeds::read(lines.iter().map(String::as_str), USER);
        assert_eq!(
            told(&deeds.used),
            ["list services", "update exchangedeployments/status.exchange.dev"]
        );
        assert_eq!(deeds.denied, ["delete services: /apis/…"]);
    }

    #[test]
    fn requests_are_counted_when_they_end() {
        let event = |user: &str, stage: &str, at: &str| {
            json!({"verb": "get", "user": {"username": user}, "stage": stage, "stageTimestamp": at,
                   "objectRef": {"resource": "leases"}})
            .to_string()
        };
        let lines = [
            event(USER, "ResponseComplete", "2026-11-24T06:00:00.000000Z"),
            event(USER, "ResponseStarted", "2026-11-24T06:00:01.000000Z"),
            event("somebody else", "ResponseComplete", "2026-11-24T06:00:02.000000Z"),
            event(USER, "ResponseComplete", "2026-11-24T06:01:00.000000Z"),
        ];
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let (from, to) = (at("2026-11-24T06:00:00Z"), at("2026-11-24T06:01:00Z"));
        let counted = requests(lines.iter().map(String::as_str), USER, from, to);
        assert_eq!(counted, [("get".to_owned(), "leases".to_owned())]);
    }

    #[test]
    fn what_is_granted_and_neither_used_nor_excused_is_superfluous() {
        let granted = granted(&rules());
        let services = json!({"resource": "services"});
        let pods = json!({"resource": "pods"});
        let lines = [
            line(USER, "get", &services, "allow"),
            line(USER, "list", &services, "allow"),
            line(USER, "list", &pods, "allow"),
        ];
        let deeds = Deeds::read(lines.iter().map(String::as_str), USER);
        let excused = [("update leases.coordination.k8s.io", "one has led from the start")];
        assert_eq!(
            superfluous(&granted, &deeds, &excused),
            ["get pods", "update exchangedeployments/status.exchange.dev"]
        );
        assert!(stale(&granted, &deeds, &excused).is_empty());
        let needless = [("watch secrets", "not granted"), ("get services", "used")];
        assert_eq!(
            stale(&granted, &deeds, &needless),
            ["watch secrets", "get services"]
        );
    }
}
