//! Objects as the operator leaves them, phase by phase: what the tests of Argo CD's scripts and of the plugin go by.
//!
//! They come out of the simulation, so that nobody tests against a status that the operator would never write. To write
//! them anew: `INSTA_UPDATE=always make unit TEST=objects_for_other_tools_are_current`.

use std::{env, fs, path::Path};

use exchange_operator::{
    api::{ColourChoice, Service},
    decide::decide,
    observe::{Observed, Requests, Target},
    status::Phase::{
        AwaitingPromotion, Failed, Held, Live, Migrating, Pending, Promoting, Provisioning, RollingBack,
        Testing, Verifying,
    },
};
use serde_json::{Value, json};

use crate::{
    transitions::{self, at, releasing, settled},
    world::{Ban, Wakes, World},
};

const FOLDER: &str = "argocd/resource_customizations/exchange.dev/ExchangeDeployment/testdata";

fn object(world: &World) -> Value {
    let Requests {
        promote,
        abort,
        rollback,
        retry,
        pause,
        by,
    } = world.requests.clone();
    let asked = [
        ("promote", promote),
        ("abort", abort),
        ("rollback", rollback),
        ("retry", retry),
        ("pause", pause),
        ("by", by),
    ];
    let mut metadata = json!({
        "name": "exchange",
        "namespace": "prod",
        "uid": "5f0c8d4e-0000-4000-8000-000000000000",
        "generation": world.observe().generation,
    });
    let asked = asked
        .into_iter()
        .filter_map(|(word, value)| Some((format!("exchange.dev/{word}"), json!(value?))));
    let asked: serde_json::Map<_, _> = asked.collect();
    if !asked.is_empty() {
        metadata["annotations"] = Value::Object(asked);
    }
    json!({
        "apiVersion": "exchange.dev/v1alpha1",
        "kind": "ExchangeDeployment",
        "metadata": metadata,
        "spec": world.spec,
        "status": world.status,
    })
}

fn live() -> World {
    let mut world = releasing(1, Verifying);
    world.until(0, Live);
    settled(world)
}

fn asks(mut world: World, set: fn(&mut Requests, Option<String>)) -> World {
    world.ask(|requests, names| {
        requests.by = Some("alice".to_owned());
        set(requests, names.candidate.or(names.live));
    });
    settled(world)
}

fn declares(mut world: World, change: fn(&mut exchange_operator::api::ExchangeDeploymentSpec)) -> World {
    world.declare(change);
    settled(world)
}

/// What the operator records when it sees the world with a change that the simulation does not know.
fn sees(mut world: World, change: fn(&mut Observed)) -> World {
    let mut seen = world.observe();
    change(&mut seen);
    if let Some(status) = decide(&world.spec, &seen, world.now).status {
        world.status = status;
    }
    world
}

/// What is live has been made bigger than there is room for.
fn lacks_a_pod(seen: &mut Observed) {
    let live = seen.status.live.clone().unwrap().stack;
    let trade = transitions::trade_of(seen, &live);
    trade.replicas += 1;
    trade.trouble = Some("no node for it".to_owned());
}

/// What is declared refers to what is not there yet.
fn lacks_a_secret(seen: &mut Observed) {
    seen.generation += 1;
    seen.declared = Err("the Secret exchange-smtp does not exist".to_owned());
}

/// It does not come.
fn has_lacked_a_secret(seen: &mut Observed) {
    lacks_a_secret(seen);
    seen.status.observed_generation = Some(seen.generation);
    seen.status.missing_since = seen.status.live.as_ref().map(|it| it.since);
}

fn objects() -> Vec<(&'static str, Value)> {
    let mut first = World::new(false);
    first.until(0, Provisioning);
    let mut stale = live();
    stale.release(2);
    let mut retained = live();
    retained.release(2);
    retained.until(0, Pending);
    let mut reverted = at(Verifying);
    reverted.release(0);
    reverted.until(0, Live);
    let mut suspended_other = live();
    suspended_other.declare(|spec| spec.suspend = true);
    suspended_other.release(2);
    let mut suspended_failed_other = declares(releasing(5, Failed), |spec| spec.suspend = true);
    suspended_failed_other.release(2);
    let mut in_use = live();
    in_use.settle(Wakes::Clock).unwrap();
    in_use.colour(ColourChoice::Green);
    in_use.release(2);
    let mut refused = live();
    refused.ban = Some(Ban::Deletions);
    refused.release(2);
    refused.settle(Wakes::Clock).unwrap();
    let mut undecided = live();
    undecided.settle(Wakes::Clock).unwrap();
    undecided.lose_rendered("r1");
    undecided.release(2);
    undecided.lose_status();
    let nobody_serves = |seen: &mut Observed| {
        seen.live.values_mut().for_each(|live| live.endpoints.clear());
    };
    let mut new = object(&World::new(false));
    // What the schema's defaults make of no status.
    new["status"] = json!({"attempt": 0, "epoch": 0, "observedGeneration": 0, "phase": "Pending"});

    let worlds = vec![
        ("first", first),
        ("pending", retained),
        ("migrating", at(Migrating)),
        ("provisioning", at(Provisioning)),
        ("testing", at(Testing)),
        ("awaiting_promotion", settled(at(AwaitingPromotion))),
        ("promoting", at(Promoting)),
        ("verifying", at(Verifying)),
        ("live", live()),
        ("reverted", settled(reverted)),
        ("rolling_back", releasing(6, RollingBack)),
        ("failed", settled(releasing(5, Failed))),
        ("held", settled(releasing(6, Held))),
        ("stale", stale),
        (
            "paused",
            asks(at(AwaitingPromotion), |requests, stack| requests.pause = stack),
        ),
        ("suspended", declares(at(Testing), |spec| spec.suspend = true)),
        ("suspended_live", declares(live(), |spec| spec.suspend = true)),
        ("suspended_other", settled(suspended_other)),
        (
            "suspended_failed",
            declares(settled(releasing(5, Failed)), |spec| spec.suspend = true),
        ),
        ("suspended_failed_other", settled(suspended_failed_other)),
        ("reference_awaited", sees(live(), lacks_a_secret)),
        ("reference_missing", sees(live(), has_lacked_a_secret)),
        (
            "name_taken",
            sees(live(), |seen| {
                seen.taken = vec!["Service exchange-trade".to_owned()];
            }),
        ),
        ("colour_in_use", settled(in_use)),
        ("write_refused", refused),
        ("adoption_undecided", settled(undecided)),
        (
            "points_elsewhere",
            sees(live(), |seen| {
                let trade = seen.live.get_mut(&Service::Trade).unwrap();
                trade.target = Target::Foreign;
                seen.refused = Some(transitions::refused("update Service exchange-trade", true));
            }),
        ),
        ("short_of_pods", sees(live(), lacks_a_pod)),
        ("no_endpoints", sees(live(), nobody_serves)),
        (
            "suspended_no_endpoints",
            sees(declares(live(), |spec| spec.suspend = true), nobody_serves),
        ),
    ];
    let mut objects: Vec<_> = worlds
        .iter()
        .map(|(name, world)| (*name, object(world)))
        .collect();
    for (name, object) in &mut objects {
        if name.starts_with("reference_") {
            object["metadata"]["generation"] = object["status"]["observedGeneration"].clone();
        }
    }
    objects.push(("new", new));
    objects
}

#[test]
fn objects_for_other_tools_are_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join(FOLDER);
    let update = env::var("INSTA_UPDATE").is_ok_and(|value| value == "always");
    let mut known = Vec::new();
    for (name, object) in objects() {
        let path = folder.join(format!("{name}.yaml"));
        let text = serde_yaml::to_string(&object).unwrap();
        if update {
            fs::write(&path, &text).unwrap();
        }
        let there = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            there == text,
            "{} is not what the operator writes any more:\n{text}",
            path.display()
        );
        known.push(path);
    }
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let output = path.file_stem().unwrap().to_string_lossy().contains("_after_");
        assert!(output || known.contains(&path), "{} is not used", path.display());
    }
}
