//! The way of somebody who releases an image of their own for the first time: the commands of `examples/README.md`, as they
//! stand there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use testbed::{
    exchange::PATIENCE,
    kubectl::{Namespace, plugin_directory},
    operator::values_of_tests,
    progress::say,
    sandbox::wait_until,
    story::Ground,
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The page's commands, block by block.
fn commands(page: &str) -> Vec<String> {
    let blocks = page.split("```sh\n").skip(1);
    blocks
        .map(|block| block.split_once("```").unwrap().0.to_owned())
        .collect()
}

#[test]
#[ignore = "needs a cluster: make e2e"]
fn a_newcomer_releases_an_image_and_goes_back() {
    let ground = Ground::shared();
    let namespace = Namespace::new(&ground.session, "newcomer").unwrap();
    let page = fs::read_to_string(format!("{ROOT}/examples/README.md")).unwrap();
    let blocks = commands(&page);
    let [images, operator, stores, first, release, back, own] = blocks.as_slice() else {
        panic!("the page has another number of blocks: {blocks:#?}")
    };
    assert!(images.contains("docker build"), "{images}");
    // The images are there, the plugin is built, the namespace is the test's.
    let shell = |commands: &str| {
        say(format!(
            "newcomer: {}",
            commands.lines().next().unwrap_or_default()
        ));
        let commands = commands
            .replace("--namespace prod", &format!("--namespace {}", namespace.name))
            .replace("kubectl create namespace prod\n", "");
        let variables = format!("registry={} tag={}", ground.images.prefix, ground.images.tag);
        let path = format!("PATH='{}':$PATH", plugin_directory().unwrap().display());
        let script = format!("set -eux\ncd {ROOT}\n{variables}\n{path}\n{commands}");
        ground.session.shell(&script).unwrap()
    };
    {
        let _alone = Ground::installation();
        let ours = values_of_tests(&ground.session).join("' '");
        let chart = "charts/exchange-operator";
        shell(&operator.replace(chart, &format!("{chart} '{ours}'")));
    }
    let values = ground.session.stores_values().join(" ");
    shell(&stores.replace(
        "charts/exchange-stores",
        &format!("charts/exchange-stores {values}"),
    ));
    // As the page says of registries that ask who pulls.
    let names_it = "s|^spec:|&\\n  imagePullSecrets: [{name: pull}]|";
    assert!(page.contains(names_it));
    let pulls = ground.session.pull_secret().map_or_else(String::new, |secret| {
        format!("; {}", names_it.replace("name: pull", &format!("name: {secret}")))
    });
    let version = "s|version: .*|version: 1.0.0|";
    assert!(first.contains(version), "{first}");
    let shown = shell(&first.replace(version, &format!("{version}{pulls}")));
    assert!(shown.contains("Live") && shown.contains("1.0.0"), "{shown}");
    shell(release);
    let get = |path: &str| ground.session.get(&namespace.name, "exd/exchange", path).unwrap();
    assert_eq!(get("{.status.phase} {.status.live.version}"), "Live 2.0.0");
    shell(back);
    wait_until("version 1 to be live again", PATIENCE, || {
        get("{.status.phase} {.status.live.version}") == "Held 1.0.0"
    })
    .unwrap();
    let history = shell("kubectl exchange history exchange --namespace prod");
    assert!(history.contains("RolledBack"), "{history}");

    let (pushed, released): (Vec<&str>, Vec<&str>) =
        own.lines().partition(|line| line.starts_with("docker "));
    assert_eq!(pushed.len(), 2, "{own}");
    // Who brings a cluster has no image of it there.
    if ground.session.cluster.is_some() {
        let testbed = env!("CARGO_BIN_EXE_testbed");
        shell(&format!(
            "archives=$({testbed} images --binaries \"$BINARIES\" --tag $tag --release 2.0.1)\n{testbed} load $archives"
        ));
        shell(&released.join("\n"));
        assert_eq!(get("{.status.phase} {.status.live.version}"), "Live 2.0.1");
    }
}
