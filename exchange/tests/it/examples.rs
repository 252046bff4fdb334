//! `examples/plain`: objects that a cluster takes, with settings that the services know and start with.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job,
    core::v1::{ConfigMap, Container, PodSpec, Secret, Service as KubernetesService},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    servers::{Service, V1, temporary_directory},
    stores::Stores,
};

/// The objects, by kind and name.
type Objects = BTreeMap<(String, String), Value>;

fn objects() -> Objects {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/plain");
    let files = std::fs::read_dir(directory)
        .unwrap()
        .map(|file| file.unwrap().path());
    let mut objects = Objects::new();
    for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "yaml")) {
        for document in serde_yaml::Deserializer::from_str(&std::fs::read_to_string(file).unwrap()) {
            let object = Value::deserialize(document).unwrap();
            let text = |pointer: &str| object.pointer(pointer).unwrap().as_str().unwrap().to_owned();
            let key = (text("/kind"), text("/metadata/name"));
            assert!(objects.insert(key.clone(), object).is_none(), "{key:?} twice");
        }
    }
    objects
}

/// All objects of a kind. A field that the kind does not have is an error, as it is to the API server.
fn of<K: DeserializeOwned + Serialize>(objects: &Objects, kind: &str) -> BTreeMap<String, K> {
    let ours = objects.iter().filter(|((found, _), _)| found == kind);
    let typed = ours.map(|((_, name), object)| {
        let typed: K = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(&serde_json::to_value(&typed).unwrap(), object, "{kind} {name}");
        (name.clone(), typed)
    });
    typed.collect()
}

/// The pods of all workloads, by name.
fn pods(objects: &Objects) -> BTreeMap<String, PodSpec> {
    let deployments = of::<Deployment>(objects, "Deployment");
    let jobs = of::<Job>(objects, "Job");
    let of_deployments = deployments
        .into_iter()
        .map(|(name, deployment)| (name, deployment.spec.unwrap().template.spec.unwrap()));
    let of_jobs = jobs
        .into_iter()
        .map(|(name, job)| (name, job.spec.unwrap().template.spec.unwrap()));
    of_deployments.chain(of_jobs).collect()
}

/// Names and values of a container's environment.
fn environment(container: &Container, settings: &BTreeMap<String, ConfigMap>) -> BTreeMap<String, String> {
    let shared = container.env_from.iter().flatten().flat_map(|from| {
        let name = &from.config_map_ref.as_ref().unwrap().name;
        settings[name].data.clone().unwrap()
    });
    let own = container.env.iter().flatten();
    let own = own.map(|variable| (variable.name.clone(), variable.value.clone().unwrap()));
    shared.chain(own).collect()
}

#[test]
fn the_plain_example_is_complete_and_restricted() {
    let objects = objects();
    let kinds: BTreeSet<&str> = objects.keys().map(|(kind, _)| kind.as_str()).collect();
    let known = ["ConfigMap", "Deployment", "Job", "Secret", "Service"];
    assert_eq!(kinds, BTreeSet::from(known));
    let settings = of::<ConfigMap>(&objects, "ConfigMap");
    let secrets = of::<Secret>(&objects, "Secret");
    for (name, secret) in &secrets {
        let values = secret.string_data.as_ref().unwrap().values();
        assert!(
            values.into_iter().all(|value| value.contains("CHANGE-ME")),
            "{name}"
        );
    }
    for (name, pod) in pods(&objects) {
        let [container] = &pod.containers[..] else {
            panic!("{name} has not one container")
        };
        let subcommand = &container.args.as_ref().unwrap()[0];
        let help = Command::new(V1).args([subcommand, "--help"]).output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for variable in environment(container, &settings).keys() {
            assert!(
                help.contains(&format!("[env: {variable}=")) || help.contains(&format!("[env: {variable}]")),
                "{name}: {subcommand} does not know {variable}"
            );
        }

        // The restricted Pod Security Standard.
        let security = pod.security_context.as_ref().unwrap();
        assert_eq!(security.run_as_non_root, Some(true), "{name}");
        assert_eq!(security.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault");
        assert_eq!(pod.automount_service_account_token, Some(false));
        assert_eq!((pod.host_network, pod.host_pid, pod.host_ipc), (None, None, None));
        let restricted = container.security_context.as_ref().unwrap();
        assert_eq!(restricted.allow_privilege_escalation, Some(false));
        assert_eq!(restricted.read_only_root_filesystem, Some(true));
        let capabilities = restricted.capabilities.as_ref().unwrap();
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
        assert!(capabilities.add.is_none() && restricted.privileged.is_none());
        for volume in pod.volumes.iter().flatten() {
            let source = volume.secret.as_ref().unwrap();
            let keys = secrets[source.secret_name.as_ref().unwrap()]
                .string_data
                .as_ref()
                .unwrap();
            let items = source.items.as_ref().unwrap();
            assert!(items.iter().all(|item| keys.contains_key(&item.key)), "{name}");
        }
    }
}

#[test]
fn the_plain_examples_services_find_their_pods_and_probes_the_admin_port() {
    let objects = objects();
    let deployments = of::<Deployment>(&objects, "Deployment");
    let services = of::<KubernetesService>(&objects, "Service");
    assert_eq!(
        services.keys().collect::<Vec<_>>(),
        ["exchange-notification", "exchange-trade", "exchange-user"]
    );
    for (name, service) in services {
        let service = service.spec.unwrap();
        let deployment = deployments[&name].spec.as_ref().unwrap();
        let template = &deployment.template;
        let labels = template.metadata.as_ref().unwrap().labels.clone();
        assert_eq!(service.selector, labels, "{name}");
        assert_eq!(deployment.selector.match_labels, labels, "{name}");
        let container = &template.spec.as_ref().unwrap().containers[0];
        let ports = container.ports.as_ref().unwrap();
        let ports: Vec<_> = ports
            .iter()
            .map(|port| (port.name.as_deref().unwrap(), port.container_port))
            .collect();
        // The defaults of --public-address and --admin-address.
        assert_eq!(ports, [("http", 8080), ("admin", 9090)], "{name}");
        let target = serde_json::to_value(&service.ports.unwrap()[0].target_port).unwrap();
        assert_eq!(target, "http");
        for (probe, path) in [
            (&container.startup_probe, "/readyz"),
            (&container.readiness_probe, "/readyz"),
            (&container.liveness_probe, "/livez"),
        ] {
            let asked = serde_json::to_value(probe.as_ref().unwrap().http_get.as_ref().unwrap()).unwrap();
            assert_eq!(
                (&asked["path"], &asked["port"]),
                (&path.into(), &"admin".into()),
                "{name}"
            );
        }
    }
}

/// With the example's own environment, and files where its Secrets would be mounted.
#[tokio::test(flavor = "multi_thread")]
async fn the_plain_examples_services_start_with_its_settings() {
    let stores = Stores::start().await;
    let objects = objects();
    let settings = of::<ConfigMap>(&objects, "ConfigMap");
    let mounted = temporary_directory("mounted");
    let urls = [
        ("exchange-db", stores.database.app_url.clone()),
        ("exchange-queue", stores.nats.url()),
        ("exchange-redis", stores.redis.url()),
    ];
    for (name, deployment) in of::<Deployment>(&objects, "Deployment") {
        let pod = deployment.spec.unwrap().template.spec.unwrap();
        let container = &pod.containers[0];
        for volume in pod.volumes.iter().flatten() {
            let secret = volume.secret.as_ref().unwrap().secret_name.as_ref().unwrap();
            let (_, url) = urls.iter().find(|(name, _)| name == secret).unwrap();
            let mount = container
                .volume_mounts
                .iter()
                .flatten()
                .find(|mount| mount.name == volume.name);
            let directory = mounted
                .path()
                .join(mount.unwrap().mount_path.trim_start_matches('/'));
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("url"), url).unwrap();
        }
        let mut binary = Command::new(V1);
        for (variable, value) in environment(container, &settings) {
            let value = match value.strip_prefix("/etc/") {
                Some(rest) => mounted.path().join("etc").join(rest).display().to_string(),
                None => value,
            };
            binary.env(variable, value);
        }
        let service = &container.args.as_ref().unwrap()[0];
        let service = Service::start_by(&mut binary, service, &stores.database, &[])
            .ready()
            .await;
        let stack: Value = service.admin("/stack").await.json().await.unwrap();
        assert_eq!(
            (&stack["role"], &stack["revision"]),
            (&"Live".into(), &"r1".into()),
            "{name}"
        );
    }
}
