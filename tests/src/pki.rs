//! Keys, certificates and kubeconfigs of a cluster. Made anew for each cluster, valid for a year.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::cluster::{API_SERVICE, Cluster, DOMAIN, NODE};

/// Clients of the API server: the file name, the user, the group. Components that the API server's built-in
/// roles do not know act as administrators: this is a cluster for tests, alone in its network.
const CLIENTS: [(&str, &str, &str); 6] = [
    ("admin", "testbed-admin", "system:masters"),
    ("addons", "testbed-addons", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("kubelet", "system:node:node", "system:nodes"),
    ("proxy", "system:kube-proxy", ""),
];

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Writes all keys, certificates and kubeconfigs of the cluster.
///
/// # Errors
/// If a file cannot be written.
pub fn write_all(cluster: &Cluster) -> Result<()> {
    let pki = cluster.pki();
    let address = cluster.link()?.node_address();
    let ca = Authority::new(&pki, "ca", "exchange-testbed")?;
    let front = Authority::new(&pki, "front-proxy-ca", "exchange-testbed-front-proxy")?;
    let api_names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "localhost",
        "127.0.0.1",
    ];
    let mut names: Vec<String> = api_names.iter().map(|name| (*name).to_owned()).collect();
    names.extend([
        format!("kubernetes.default.svc.{DOMAIN}"),
        API_SERVICE.to_owned(),
        address.clone(),
    ]);
    ca.server(&pki, "apiserver", names)?;
    ca.server(&pki, "kubelet-serving", vec![NODE.to_owned(), address.clone()])?;
    ca.server(
        &pki,
        "metrics-server",
        vec!["metrics-server.kube-system.svc".to_owned()],
    )?;
    ca.client(
        &pki,
        "apiserver-kubelet-client",
        "kube-apiserver-kubelet-client",
        "system:masters",
    )?;
    front.client(&pki, "front-proxy-client", "front-proxy-client", "")?;
    let service_accounts = KeyPair::generate()?;
    write_private(
        &pki.join("service-accounts.key"),
        &service_accounts.serialize_pem(),
    )?;
    write_private(
        &pki.join("service-accounts.pub"),
        &service_accounts.public_key_pem(),
    )?;
    for (file, user, group) in CLIENTS {
        let (certificate, key) = ca.client(&pki, file, user, group)?;
        let kubeconfig = kubeconfig(cluster.name(), &address, &ca.pem, user, &certificate, &key);
        write_private(&cluster.kubeconfig_of(file), &kubeconfig)?;
    }
    Ok(())
}

impl Authority {
    fn new(dir: &Path, file: &str, name: &str) -> Result<Self> {
        let mut params = params(name, "")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        write_private(&dir.join(format!("{file}.crt")), &pem)?;
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    fn server(&self, dir: &Path, file: &str, names: Vec<String>) -> Result<()> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, file);
        self.issue(dir, file, params, ExtendedKeyUsagePurpose::ServerAuth)
            .map(drop)
    }

    fn client(&self, dir: &Path, file: &str, user: &str, group: &str) -> Result<(String, String)> {
        self.issue(
            dir,
            file,
            params(user, group)?,
            ExtendedKeyUsagePurpose::ClientAuth,
        )
    }

    fn issue(
        &self,
        dir: &Path,
        file: &str,
        mut params: CertificateParams,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<(String, String)> {
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![usage];
        set_validity(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        let key = key.serialize_pem();
        write_private(&dir.join(format!("{file}.crt")), &certificate)?;
        write_private(&dir.join(format!("{file}.key")), &key)?;
        Ok((certificate, key))
    }
}

fn params(name: &str, group: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    if !group.is_empty() {
        params.distinguished_name.push(DnType::OrganizationName, group);
    }
    set_validity(&mut params);
    Ok(params)
}

/// An hour ago to a year ahead: a machine's clock may be set back while a cluster runs.
fn set_validity(params: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::hours(1);
    params.not_after = now + Duration::days(365);
}

fn kubeconfig(cluster: &str, address: &str, ca: &str, user: &str, certificate: &str, key: &str) -> String {
    let [ca, certificate, key] = [ca, certificate, key].map(|pem| STANDARD.encode(pem));
    serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": cluster,
        "clusters": [{"name": cluster, "cluster": {
            "server": format!("https://{address}:6443"), "certificate-authority-data": ca}}],
        "users": [{"name": user, "user": {"client-certificate-data": certificate, "client-key-data": key}}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
    })
    .to_string()
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("{}", path.display()))
}
