//! API objects that make a bare API server a usable cluster: volumes, `kubectl top`, and DNS's Service.

use serde_json::{Value, json};

use crate::cluster::{Cluster, NODE};

/// Where the add-ons' objects are.
pub const NAMESPACE: &str = "kube-system";
/// The image of pod sandboxes and of the pods that make volumes: busybox.
pub const HELPER_IMAGE: &str = "exchange.local/busybox:1";
/// The default StorageClass.
pub const STORAGE_CLASS: &str = "local-path";

/// A claim that shows that volumes are made. It stays, so that a cluster that runs is asked without making another.
pub const TRIAL_CLAIM: &str = "trial-of-volumes";

/// All objects, to be applied in this order.
///
/// # Errors
/// If the cluster has no link, or its CA cannot be read.
pub fn objects(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let address = cluster.link()?.node_address();
    let ca = STANDARD.encode(std::fs::read(cluster.pki().join("ca.crt"))?);
    Ok(vec![
        json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": {"name": STORAGE_CLASS,
                         "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
            "provisioner": "rancher.io/local-path", "reclaimPolicy": "Delete",
            "volumeBindingMode": "WaitForFirstConsumer",
        }),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "local-path-config", "namespace": NAMESPACE},
            // Pods run as many different users, and a hostPath volume knows no fsGroup.
            "data": {"setup": "#!/bin/sh\nset -eu\nmkdir -m 0777 -p \"$VOL_DIR\"\n",
                     "teardown": "#!/bin/sh\nset -eu\nrm -rf \"$VOL_DIR\"\n"},
        }),
        json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": TRIAL_CLAIM, "namespace": NAMESPACE},
            "spec": {"storageClassName": STORAGE_CLASS, "accessModes": ["ReadWriteOnce"],
                     "resources": {"requests": {"storage": "1Mi"}}},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "metrics-server", "namespace": NAMESPACE},
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": 4443}]},
        }),
        // metrics-server runs on the node, not in a pod, so nobody else would say where it is.
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "metrics-server-node", "namespace": NAMESPACE,
                         "labels": {"kubernetes.io/service-name": "metrics-server"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": 4443}],
        }),
        json!({
            "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
            "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100,
                     "versionPriority": 100, "caBundle": ca,
                     "service": {"name": "metrics-server", "namespace": NAMESPACE}},
        }),
    ])
}

/// Says of the trial claim what the scheduler says of a claim that a pod wants: the node. Said from the beginning it would meet
/// the volume controller's own first write, which is tried again only after 15 s.
#[must_use]
pub fn trial_node() -> Value {
    json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": NODE}}})
}
