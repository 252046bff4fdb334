//! The proxy on the way to the API server, as kubectl takes it.

use std::{env, net::IpAddr};

use axum::http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use kube::{Config, config::Kubeconfig};

/// The `proxy-url` of the kubeconfig stands; beside it, what `HTTPS_PROXY` says goes for every API server but those that `NO_PROXY`
/// names, and those on this machine. kube asks of either whether `NO_PROXY` names the proxy instead.
pub fn as_kubectl_does(config: Config, file: Option<&Kubeconfig>, context: Option<&str>) -> Config {
    let declared = file.and_then(|file| declared(file, context));
    let https = variable(["HTTPS_PROXY", "https_proxy"]);
    taken(config, declared, &https, &variable(["NO_PROXY", "no_proxy"]))
}

/// The proxy that a kubeconfig names for a context, or for the current one.
fn declared(file: &Kubeconfig, context: Option<&str>) -> Option<Uri> {
    let context = context.or(file.current_context.as_deref())?;
    let context = file
        .contexts
        .iter()
        .find(|it| it.name == context)?
        .context
        .as_ref()?;
    let cluster = file.clusters.iter().find(|it| it.name == context.cluster)?;
    cluster.cluster.as_ref()?.proxy_url.as_ref()?.parse().ok()
}

/// The first that is set: what is empty is not.
fn variable(names: [&str; 2]) -> String {
    let mut values = names.into_iter().filter_map(|name| env::var(name).ok());
    values.find(|value| !value.is_empty()).unwrap_or_default()
}

fn taken(mut config: Config, declared: Option<Uri>, https: &str, no: &str) -> Config {
    // By its own network the cluster reaches its API server, and kube takes no proxy there.
    if config.root_cert_file.is_some() {
        return config;
    }
    let server = &config.cluster_url;
    let direct = no.split(',').any(|name| name.trim() == "*") || server.host().is_none_or(is_here);
    // A name that begins with a star and a dot means the same as with the dot alone, which is what is known here.
    let matcher = Matcher::builder().https(https).no(no.replace("*.", ".")).build();
    let of_environment = || {
        https
            .parse()
            .ok()
            .filter(|_| !direct && matcher.intercept(server).is_some())
    };
    config.proxy_url = declared.or_else(of_environment);
    config
}

fn is_here(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY: &str = "http://10.0.0.5:3128";

    /// The proxy for this API server, where kube has taken that one.
    fn proxy(server: &str, of_kube: Option<&str>, https: &str, no: &str) -> Option<Uri> {
        let mut config = Config::new(server.parse().unwrap());
        config.proxy_url = of_kube.map(|proxy| proxy.parse().unwrap());
        taken(config, None, https, no).proxy_url
    }

    #[test]
    fn a_proxy_of_the_environment_is_for_api_servers_that_no_proxy_does_not_name() {
        for (server, no, is_used) in [
            ("https://api.example.com", "", true),
            ("https://api.example.com", "example.org, ample.com", true),
            // This names the proxy, and not the API server.
            ("https://api.example.com", "localhost,10.0.0.0/8", true),
            ("https://10.1.2.3:6443", "localhost,10.0.0.0/8", false),
            ("https://api.example.com", "example.org, example.com", false),
            ("https://api.example.com", ".example.com", false),
            ("https://api.example.com", "*.example.com", false),
            ("https://api.example.com", "*", false),
            ("https://203.0.113.1:6443", "*", false),
            // What is on this machine needs no naming.
            ("https://127.0.0.1:6443", "", false),
            ("https://[::1]:6443", "", false),
            ("https://localhost:6443", "", false),
        ] {
            // kube has taken it, or has not because NO_PROXY names it.
            for of_kube in [Some(PROXY), None] {
                let used = proxy(server, of_kube, PROXY, no).is_some();
                assert_eq!(used, is_used, "{server}, {of_kube:?}, NO_PROXY={no}");
            }
        }
    }

    #[test]
    fn a_proxy_of_the_kubeconfig_stands() {
        let file =
            "{clusters: [{name: far, cluster: {server: 'https://a', proxy-url: 'socks5://127.0.0.1:1080'}}],
                    contexts: [{name: far, context: {cluster: far}}, {name: near, context: {cluster: near}}],
                    current-context: far}";
        let file = Kubeconfig::from_yaml(file).unwrap();
        let own = declared(&file, None);
        assert_eq!(own.as_ref().unwrap(), "socks5://127.0.0.1:1080");
        assert_eq!(declared(&file, Some("near")), None);
        for https in ["", PROXY] {
            // NO_PROXY names the proxy, so that kube has dropped it.
            let config = Config::new("https://api.example.com".parse().unwrap());
            assert_eq!(taken(config, own.clone(), https, "127.0.0.1,*").proxy_url, own);
        }
        assert_eq!(proxy("https://api.example.com", None, "", ""), None);
    }

    #[test]
    fn in_a_cluster_no_proxy_is_taken() {
        let mut config = Config::new("https://10.96.0.1".parse().unwrap());
        config.root_cert_file = Some("ca.crt".into());
        assert_eq!(taken(config, None, PROXY, "").proxy_url, None);
    }
}
