//! The operator may do what it does and nothing else. After the stories of releases, on the cluster that has told them
//! (`make rbac`): what the chart grants is compared with what the audit log shows.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;
use testbed::{
    kubectl::Session,
    operator::{self, OPERATOR, OPERATOR_NAMESPACE},
    rights::{Deeds, Right, audit_log, granted, stale, superfluous},
};

/// What is granted and need not be seen in the stories.
const EXCUSED: [(&str, &str); 1] = [(
    "update exchangedeployments/finalizers.exchange.dev",
    "asked for by an admission plugin, which is not in the log, on clusters that check who may block an owner's deletion",
)];

fn json(session: &Session, args: &[&str]) -> Value {
    serde_json::from_str(&session.kubectl(args).unwrap()).unwrap()
}

/// The rules of everything that is bound to the operator's account.
fn rights_of_the_operator(session: &Session) -> BTreeSet<Right> {
    let kinds = "clusterrolebindings,rolebindings";
    let bindings = json(session, &["get", kinds, "--all-namespaces", "--output=json"]);
    let mut rights = BTreeSet::new();
    for binding in bindings.pointer("/items").and_then(Value::as_array).unwrap() {
        let subjects = binding.get("subjects").and_then(Value::as_array);
        let is_ours = |subject: &Value| {
            let text = |key| subject.get(key).and_then(Value::as_str);
            text("name") == Some(OPERATOR) && text("namespace") == Some(OPERATOR_NAMESPACE)
        };
        if !subjects.is_some_and(|subjects| subjects.iter().any(is_ours)) {
            continue;
        }
        let text = |pointer| binding.pointer(pointer).and_then(Value::as_str);
        let (kind, name) = (text("/roleRef/kind").unwrap(), text("/roleRef/name").unwrap());
        let namespace = text("/metadata/namespace").unwrap_or_default();
        let args = ["get", kind, name, "--namespace", namespace, "--output=json"];
        rights.extend(granted(json(session, &args).get("rules").unwrap()));
    }
    rights
}

#[test]
#[ignore = "needs a cluster that has seen releases: make stories, then make rbac"]
fn the_operator_has_the_rights_that_it_uses_and_no_others() {
    let session = Session::from_environment().unwrap();
    assert!(
        session.cluster.is_some(),
        "the audit log is the test cluster's: leave CLUSTER=existing out"
    );
    let text = audit_log(session.cluster.as_ref().unwrap(), Timestamp::UNIX_EPOCH).unwrap();
    let deeds = Deeds::read(text.lines(), &operator::account());
    let rights = rights_of_the_operator(&session);
    let record = Right {
        group: "exchange.dev".to_owned(),
        resource: "exchangedeployments/status".to_owned(),
        verb: "update".to_owned(),
    };
    assert!(
        deeds.used.contains(&record),
        "the operator has not worked on this cluster yet: `make stories` first"
    );
    assert!(
        deeds.denied.is_empty(),
        "the chart grants too little: {:#?}",
        deeds.denied
    );
    let unused = superfluous(&rights, &deeds, &EXCUSED);
    assert!(
        unused.is_empty(),
        "the chart grants what nobody uses: {unused:#?}"
    );
    let stale = stale(&rights, &deeds, &EXCUSED);
    assert!(stale.is_empty(), "excused, and not granted, or used: {stale:#?}");
}
