//! The revision: a hash of what the *user* declared that ends up in pods.
//!
//! It is taken over the declaration, not over what is rendered from it, so that an upgraded operator does not see a
//! release where nobody made one. Fields that are absent or equal to their default do not count, so that a later
//! version of the API can add fields. The golden tests keep it so.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::api::{ExchangeDeploymentSpec as Spec, Service, ServiceSpec};

/// A ConfigMap or Secret that pods get as environment or files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A ConfigMap of this name.
    ConfigMap(String),
    /// A Secret of this name.
    Secret(String),
}

/// Content of the sources that exist, by key.
pub type Content = BTreeMap<Source, BTreeMap<String, Vec<u8>>>;

/// Every source that the spec names, and whether it has to exist.
pub fn sources(spec: &Spec) -> BTreeMap<Source, bool> {
    let mut all = BTreeMap::new();
    let mut add = |source: Source, optional: Option<bool>| {
        let needed = !optional.unwrap_or(false);
        *all.entry(source).or_insert(false) |= needed;
    };
    for service in Service::ALL {
        let ServiceSpec {
            env, env_from, files, ..
        } = spec.services.get(service);
        for from in env.iter().filter_map(|env| env.value_from.as_ref()) {
            if let Some(it) = &from.config_map_key_ref {
                add(Source::ConfigMap(it.name.clone()), it.optional);
            }
            if let Some(it) = &from.secret_key_ref {
                add(Source::Secret(it.name.clone()), it.optional);
            }
        }
        for from in env_from {
            if let Some(it) = &from.config_map_ref {
                add(Source::ConfigMap(it.name.clone()), it.optional);
            }
            if let Some(it) = &from.secret_ref {
                add(Source::Secret(it.name.clone()), it.optional);
            }
        }
        for file in files {
            if let Some(name) = &file.config_map {
                add(Source::ConfigMap(name.clone()), None);
            }
            if let Some(name) = &file.secret {
                add(Source::Secret(name.clone()), None);
            }
        }
    }
    all
}

/// Variables that pods must not have: the operator gives them files in their place. All others that are its own it sets
/// itself, which counts for more than any source.
const NEVER_SET: [&str; 4] = [
    "EXCHANGE_DATABASE_URL",
    "EXCHANGE_QUEUE_URL",
    "EXCHANGE_MARKET_DATA_URL",
    "EXCHANGE_LANE_SECRET",
];

/// A source that would set a variable which pods must not have, as a sentence. What is in `env` the schema refuses.
pub fn reserved(spec: &Spec, content: &Content) -> Option<String> {
    let each = Service::ALL.into_iter().flat_map(|service| {
        let from = spec.services.get(service).env_from.iter();
        from.map(move |from| (service, from))
    });
    each.flat_map(|(service, from)| {
        let map = from.config_map_ref.as_ref().map(|it| &it.name);
        let secret = from.secret_ref.as_ref().map(|it| &it.name);
        let sources = [
            map.map(|name| ("ConfigMap", name, Source::ConfigMap(name.clone()))),
            secret.map(|name| ("Secret", name, Source::Secret(name.clone()))),
        ];
        let prefix = from.prefix.as_deref().unwrap_or_default();
        sources.into_iter().flatten().filter_map(move |(kind, name, source)| {
            let mut keys = content.get(&source)?.keys().map(|key| format!("{prefix}{key}"));
            let variable = keys.find(|it| NEVER_SET.contains(&it.as_str()))?;
            Some(format!(
                "the {kind} {name} of spec.services.{service}.envFrom sets {variable}, which is the operator's: remove it"
            ))
        })
    })
    .next()
}

/// The revision of a spec, or the sources without which there is none.
pub fn revision(spec: &Spec, content: &Content) -> Result<String, BTreeSet<Source>> {
    let sources = sources(spec);
    let missing = |(source, needed): (&Source, &bool)| {
        (*needed && !content.contains_key(source)).then(|| source.clone())
    };
    let missing: BTreeSet<Source> = sources.iter().filter_map(missing).collect();
    if !missing.is_empty() {
        return Err(missing);
    }
    let mut services = Map::new();
    for service in Service::ALL {
        let mut declared = changed(spec.services.get(service));
        if let Value::Object(fields) = &mut declared {
            // How many pods there are is no release.
            fields.remove("replicas");
            fields.remove("autoscaling");
        }
        services.insert(service.to_string(), declared);
    }
    let mut contents = Map::new();
    for (source, keys) in content.iter().filter(|(source, _)| sources.contains_key(source)) {
        let name = match source {
            Source::ConfigMap(name) => format!("configMap/{name}"),
            Source::Secret(name) => format!("secret/{name}"),
        };
        let keys = keys
            .iter()
            .map(|(key, value)| (key.clone(), hex(&Sha256::digest(value)).into()))
            .collect();
        contents.insert(name, Value::Object(keys));
    }
    let mut all = json!({
        "version": spec.version,
        "image": spec.image,
        "imageDigest": spec.image_digest,
        "imagePullSecrets": spec.image_pull_secrets,
        "services": services,
        "content": contents,
    });
    drop_empty(&mut all);
    Ok(short(&all))
}

/// Hash of the declared gates: another declaration of them is another attempt.
pub fn gates(spec: &Spec) -> String {
    let mut all = json!({
        "smokeTests": spec.rollout.smoke_tests,
        "verification": changed(&spec.rollout.verification),
    });
    drop_empty(&mut all);
    short(&all)
}

/// Hash of where the stores are found. What was begun for other stores is begun anew; what is in their Secrets does not
/// count.
pub fn stores(spec: &Spec) -> String {
    short(&json!({
        "database": spec.database.secret_ref,
        "queue": spec.queue.secret_ref,
        "marketData": spec.market_data.secret_ref,
    }))
}

/// What differs from the default. A field that a later version of the API adds is none of it.
fn changed<T: Serialize + Default>(value: &T) -> Value {
    let default = serde_json::to_value(T::default()).unwrap_or_default();
    let mut value = serde_json::to_value(value).unwrap_or_default();
    if let Value::Object(fields) = &mut value {
        fields.retain(|name, value| default.get(name) != Some(value));
    }
    value
}

/// The first 40 bits of the hash of a value whose keys are sorted.
pub fn short(value: &Value) -> String {
    hex(Sha256::digest(value.to_string().as_bytes())
        .get(..5)
        .unwrap_or_default())
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn drop_empty(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.values_mut().for_each(drop_empty);
            map.retain(|_, value| match value {
                Value::Null => false,
                Value::Object(map) => !map.is_empty(),
                Value::Array(items) => !items.is_empty(),
                _ => true,
            });
        }
        Value::Array(items) => items.iter_mut().for_each(drop_empty),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ExchangeDeployment;

    fn example(name: &str) -> Spec {
        let path = format!("{}/../examples/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        serde_yaml::from_str::<ExchangeDeployment>(&text).unwrap().spec
    }

    fn content() -> Content {
        let keys = |value: &str| BTreeMap::from([("key".to_owned(), value.as_bytes().to_vec())]);
        Content::from([
            (Source::ConfigMap("exchange-settings".to_owned()), keys("a")),
            (Source::ConfigMap("exchange-fees".to_owned()), keys("b")),
            (Source::ConfigMap("exchange-mail-templates".to_owned()), keys("c")),
            (Source::Secret("exchange-smtp".to_owned()), keys("d")),
            (
                Source::Secret("exchange-db".to_owned()),
                keys("a store's password"),
            ),
        ])
    }

    #[test]
    fn revisions_stay_the_same_across_versions_of_the_operator() {
        assert_eq!(
            revision(&example("minimal"), &Content::new()).unwrap(),
            "ff9348acd9"
        );
        assert_eq!(revision(&example("full"), &content()).unwrap(), "4027bd639f");
        assert_eq!(gates(&example("minimal")), "44136fa355");
        let mut full = example("full");
        // A field that was added later.
        full.rollout
            .smoke_tests
            .iter_mut()
            .for_each(|test| test.resources = None);
        assert_eq!(gates(&full), "030c67f7ba");
    }

    #[test]
    fn only_what_ends_up_in_pods_counts() {
        let spec = example("full");
        let before = revision(&spec, &content()).unwrap();
        let same = |change: fn(&mut Spec)| {
            let mut changed = spec.clone();
            change(&mut changed);
            revision(&changed, &content()).unwrap() == before
        };
        assert!(same(|spec| spec.services.trade.replicas = 7));
        assert!(same(|spec| spec.services.trade.autoscaling = None));
        assert!(same(|spec| spec.rollout = crate::api::Rollout::default()));
        assert!(same(|spec| spec.suspend = true));
        assert!(same(|spec| spec.database.secret_ref.name = "other".to_owned()));
        assert!(!same(|spec| spec.version = "1.5.1".to_owned()));
        assert!(!same(|spec| spec.image_digest = None));
        assert!(!same(|spec| spec.services.trade.env.clear()));
        assert!(!same(|spec| spec.services.user.resources = None));
        assert!(!same(|spec| spec.services.notification.files[0]
            .mount_path
            .push('s')));
    }

    #[test]
    fn content_of_sources_counts_and_a_rotated_password_does_not() {
        let spec = example("full");
        let before = revision(&spec, &content()).unwrap();
        let mut changed = content();
        changed.insert(Source::Secret("exchange-db".to_owned()), BTreeMap::new());
        assert_eq!(revision(&spec, &changed).unwrap(), before);
        changed.insert(Source::ConfigMap("exchange-fees".to_owned()), BTreeMap::new());
        assert_ne!(revision(&spec, &changed).unwrap(), before);
        changed.remove(&Source::Secret("exchange-smtp".to_owned()));
        let missing = revision(&spec, &changed).unwrap_err();
        assert_eq!(
            missing.into_iter().collect::<Vec<_>>(),
            [Source::Secret("exchange-smtp".to_owned())]
        );
    }

    #[test]
    fn no_source_sets_what_is_the_operators() {
        let spec = example("full");
        let with = |keys: &[&str]| {
            let mut content = content();
            let keys = keys.iter().map(|key| ((*key).to_owned(), Vec::new())).collect();
            content.insert(Source::ConfigMap("exchange-settings".to_owned()), keys);
            content
        };
        assert_eq!(reserved(&spec, &content()), None);
        // Set by the operator for all pods, and so without effect.
        assert_eq!(
            reserved(&spec, &with(&["EXCHANGE_ROLE", "EXCHANGE_REVISION"])),
            None
        );
        let told = "the ConfigMap exchange-settings of spec.services.user.envFrom sets EXCHANGE_DATABASE_URL, which is the \
                    operator's: remove it";
        let refused = with(&["EXCHANGE_DATABASE_URL"]);
        assert_eq!(reserved(&spec, &refused).as_deref(), Some(told));
        let mut prefixed = spec;
        let from = prefixed.services.user.env_from.first_mut().unwrap();
        from.prefix = Some("EXCHANGE_".to_owned());
        assert_eq!(reserved(&prefixed, &refused), None);
        assert_eq!(
            reserved(&prefixed, &with(&["DATABASE_URL"])).as_deref(),
            Some(told)
        );
    }

    #[test]
    fn other_gates_are_other_gates() {
        let mut spec = example("full");
        let before = gates(&spec);
        spec.rollout.retention = std::time::Duration::from_secs(1).into();
        assert_eq!(gates(&spec), before);
        spec.rollout.verification.min_requests += 1;
        assert_ne!(gates(&spec), before);
    }

    #[test]
    fn stores_are_where_they_are_found() {
        let before = stores(&example("full"));
        for change in [
            (|spec| spec.database.secret_ref.key = "other".to_owned()) as fn(&mut Spec),
            |spec| spec.queue.secret_ref.name = "other".to_owned(),
            |spec| spec.market_data.secret_ref.name = "other".to_owned(),
        ] {
            let mut spec = example("full");
            change(&mut spec);
            assert_ne!(stores(&spec), before);
        }
    }
}
