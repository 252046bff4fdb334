//! Argo CD's view of an ExchangeDeployment: its scripts, run as Argo CD runs them, on objects as the operator leaves them.
//!
//! The tables are in Argo CD's own format (`health_test.yaml`, `action_test.yaml`) beside the scripts. The verdicts of
//! kstatus on the same objects, and the table for people in docs/runbook.md, have to agree with them.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on panics"
)]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use exchange_operator::api::ExchangeDeployment;
use mlua::{Lua, LuaOptions, LuaSerdeExt as _, StdLib, serde::SerializeOptions};
use serde_json::{Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn folder() -> PathBuf {
    repository().join("argocd/resource_customizations/exchange.dev/ExchangeDeployment")
}

fn text(path: &str) -> String {
    let path = folder().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(path: &str) -> Value {
    serde_yaml::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Runs a script that ends well.
fn run(script: &str, object: &Value) -> Value {
    attempt(script, object).unwrap_or_else(|error| panic!("{script}: {error}"))
}

/// Runs a script as Argo CD does: the object is `obj`, and of Lua's libraries there are the base and `table` alone.
fn attempt(script: &str, object: &Value) -> mlua::Result<Value> {
    let lua = Lua::new_with(StdLib::TABLE, LuaOptions::default()).unwrap();
    let absent = SerializeOptions::new().serialize_unit_to_null(false);
    lua.globals()
        .set("obj", lua.to_value_with(object, absent).unwrap())
        .unwrap();
    let result: mlua::Value = lua.load(text(script)).eval()?;
    Ok(lua.from_value(result).unwrap())
}

/// An object, checked to be one that the operator itself can read.
fn object(path: &str) -> Value {
    let object = yaml(path);
    serde_json::from_value::<ExchangeDeployment>(object.clone())
        .unwrap_or_else(|error| panic!("{path}: {error}"));
    object
}

fn condition(object: &Value, kind: &str) -> Option<bool> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|it| it["type"] == kind)?;
    Some(found["status"] == "True")
}

fn current(object: &Value) -> bool {
    object["status"]["observedGeneration"] == object["metadata"]["generation"]
}

/// The generic rules of kstatus: generation first, then Reconciling, Stalled, Ready. What an object does not tell is taken for
/// done.
fn kstatus(object: &Value) -> &'static str {
    let is = |kind| condition(object, kind) == Some(true);
    let told = !object["status"]["observedGeneration"].is_null();
    if told && !current(object) || is("Reconciling") {
        "InProgress"
    } else if is("Stalled") {
        "Failed"
    } else if condition(object, "Ready") == Some(false) {
        "InProgress"
    } else {
        "Current"
    }
}

fn health_table() -> Vec<(String, Value)> {
    let table = yaml("health_test.yaml");
    let rows = table["tests"].as_array().unwrap().iter();
    rows.map(|row| {
        (
            row["inputPath"].as_str().unwrap().to_owned(),
            row["healthStatus"].clone(),
        )
    })
    .collect()
}

fn snapshots() -> BTreeSet<String> {
    let entries = fs::read_dir(folder().join("testdata")).unwrap();
    entries
        .map(|entry| format!("testdata/{}", entry.unwrap().file_name().display()))
        .collect()
}

#[test]
fn health_is_as_the_table_says() {
    for (path, expected) in health_table() {
        assert_eq!(run("health.lua", &object(&path)), expected, "{path}");
    }
    let judged: BTreeSet<_> = health_table().into_iter().map(|(path, _)| path).collect();
    assert_eq!(judged, snapshots(), "each object has a verdict");
}

/// `kubectl wait --for=condition=Ready`, `kubectl exchange status --wait` and kstatus are done at the same time.
#[test]
fn what_is_ready_is_current() {
    for (path, _) in health_table() {
        let object = object(&path);
        let ready = current(&object) && condition(&object, "Ready") == Some(true);
        assert_eq!(ready, kstatus(&object) == "Current", "{path}");
    }
}

/// What each tool concludes about each object: the table for people, line by line.
#[test]
fn the_table_in_the_runbook_agrees() {
    let runbook = fs::read_to_string(repository().join("docs/runbook.md")).unwrap();
    let mut missing = Vec::new();
    for (path, health) in health_table() {
        let object = object(&path);
        let name = path.trim_start_matches("testdata/").trim_end_matches(".yaml");
        let phase = object["status"]["phase"].as_str().unwrap_or("");
        let ready = current(&object) && condition(&object, "Ready") == Some(true);
        let row = format!(
            "| `{name}` | {phase} | {} | {} | {} |",
            kstatus(&object),
            if ready { "true" } else { "false" },
            health["status"].as_str().unwrap(),
        );
        if !runbook.contains(&row) {
            missing.push(row);
        }
    }
    assert!(
        missing.is_empty(),
        "docs/runbook.md lacks\n{}",
        missing.join("\n")
    );
}

/// Argo CD may say more than kstatus, which knows no waiting for people and no outage. It may not say the opposite.
#[test]
fn argo_and_kstatus_do_not_contradict_each_other() {
    for (path, health) in health_table() {
        let object = object(&path);
        let argo = health["status"].as_str().unwrap();
        let agree: &[&str] = match kstatus(&object) {
            "Failed" => &["Degraded"],
            // Of a release that is under way, what is live before it may still be served by nobody.
            "InProgress"
                if object["status"]["phase"] == "Live" && condition(&object, "Available") == Some(false) =>
            {
                &["Degraded"]
            }
            "InProgress" => &["Progressing", "Suspended"],
            _ if object["spec"]["suspend"] == true => &["Suspended"],
            _ => &["Healthy"],
        };
        assert!(
            agree.contains(&argo),
            "{path}: {argo}, kstatus {}",
            kstatus(&object)
        );
    }
}

#[test]
fn actions_are_offered_when_they_make_sense() {
    let table = yaml("action_test.yaml");
    for row in table["discoveryTests"].as_array().unwrap() {
        let path = row["inputPath"].as_str().unwrap();
        let offered = run("actions/discovery.lua", &object(path));
        let expected = row["result"].as_array().unwrap();
        assert_eq!(offered.as_object().unwrap().len(), expected.len(), "{path}");
        for action in expected {
            let name = action["name"].as_str().unwrap();
            let disabled = action.get("disabled").unwrap_or(&Value::Bool(false));
            assert_eq!(&offered[name]["disabled"], disabled, "{path}: {name}");
        }
    }
}

/// One that is left over from another stack holds nothing.
#[test]
fn only_the_pause_of_this_stack_can_be_ended() {
    let mut object = object("testdata/paused.yaml");
    let cannot = |object: &Value| run("actions/discovery.lua", object)["resume"]["disabled"].clone();
    assert_eq!(cannot(&object), false);
    object["metadata"]["annotations"]["exchange.dev/pause"] = Value::from("r0.1");
    object["spec"]["suspend"] = Value::from(true);
    assert_eq!(cannot(&object), true);
    assert!(attempt("actions/resume/action.lua", &object).is_err());
}

#[test]
fn a_way_back_that_could_not_be_gone_is_not_offered_again() {
    let mut object = object("testdata/promoting.yaml");
    let cannot = |object: &Value| run("actions/discovery.lua", object)["rollback"]["disabled"].clone();
    assert_eq!(cannot(&object), false);
    object["status"]["handled"]["rollback"] = Value::from("r1.2");
    assert_eq!(cannot(&object), true);
    assert!(attempt("actions/rollback/action.lua", &object).is_err());
}

/// Argo CD runs what is asked for, also what its menu does not offer.
#[test]
fn an_action_that_is_not_offered_is_refused() {
    let mut refusals = BTreeSet::new();
    for path in snapshots() {
        let object = object(&path);
        let offered = run("actions/discovery.lua", &object);
        for (name, offered) in offered.as_object().unwrap() {
            let done = attempt(&format!("actions/{name}/action.lua"), &object);
            assert_eq!(done.is_err(), offered["disabled"] == true, "{name} {path}");
            if let Err(error) = done {
                let told = error.to_string();
                assert!(
                    told.contains(" now") || told.contains("paused"),
                    "{name} {path}: {told}"
                );
                refusals.insert(name.clone());
            }
        }
    }
    assert_eq!(refusals.len(), 6, "{refusals:?}");
}

/// The whole object comes back with its annotations changed and nothing else.
#[test]
fn actions_write_what_people_would_write() {
    let table = yaml("action_test.yaml");
    let mut tested = BTreeSet::new();
    for row in table["actionTests"].as_array().unwrap() {
        let (name, path) = (
            row["action"].as_str().unwrap(),
            row["inputPath"].as_str().unwrap(),
        );
        tested.insert(name.to_owned());
        let before = object(path);
        let mut after = run(&format!("actions/{name}/action.lua"), &before);
        let annotations = after["metadata"]["annotations"].take();
        assert_eq!(annotations, row["annotations"], "{name} {path}");
        let mut unchanged = before.clone();
        unchanged["metadata"]["annotations"] = Value::Null;
        assert_eq!(after["status"], unchanged["status"], "{name} {path}");
        assert_eq!(after["metadata"], unchanged["metadata"], "{name} {path}");
    }
    let offered = run("actions/discovery.lua", &object("testdata/live.yaml"));
    assert_eq!(tested, offered.as_object().unwrap().keys().cloned().collect());
}

/// The ConfigMap for Argo CD has the same scripts.
#[test]
fn the_configuration_of_argo_cd_is_current() {
    let path = repository().join("argocd/argocd-cm.yaml");
    let map: Value = serde_yaml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let data = |kind: &str| {
        let key = format!("resource.customizations.{kind}.exchange.dev_ExchangeDeployment");
        map["data"][&key].as_str().expect("the key").to_owned()
    };
    assert_eq!(data("health"), text("health.lua"));
    let actions: Value = serde_yaml::from_str(&data("actions")).unwrap();
    assert_eq!(actions["discovery.lua"], text("actions/discovery.lua"));
    let offered = run("actions/discovery.lua", &object("testdata/live.yaml"));
    let expected = offered
        .as_object()
        .unwrap()
        .keys()
        .map(|name| json!({"name": name, "action.lua": text(&format!("actions/{name}/action.lua"))}));
    assert_eq!(actions["definitions"], expected.collect::<Value>());
}
