//! What runs in the cluster as pods, from images of a registry on the node's loopback.

use super::{Cluster, Kubectl, Programs, service::Service};
use crate::{
    go::{COREDNS_VERSION, METRICS_SERVER_VERSION},
    image::{ARCHITECTURE, capable_layer, programs_layer},
    registry::{Packed, Registry},
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// Where addons are.
const NAMESPACE: &str = "kube-system";
/// `CAP_NET_BIND_SERVICE` of linux/capability.h.
const NET_BIND_SERVICE: u32 = 10;

/// Puts an image of one layer on the registry.
fn publish(registry: &Registry, name: &str, tag: &str, layer: Vec<u8>, config: Value) {
    let config = json!({ "architecture": ARCHITECTURE, "os": "linux", "config": config });
    registry.add_packed(name, tag, &[Packed::plain(layer)], &config);
}

impl Programs {
    /// The layer of CoreDNS' image, and its configuration, as its publisher makes them: it may take its port because the file says so,
    /// whoever runs it.
    pub(crate) fn coredns_image(&self) -> Result<(Vec<u8>, Value)> {
        let program = fs::read(&self.addons.coredns).context("read CoreDNS")?;
        let layer = capable_layer("coredns", NET_BIND_SERVICE, &program)?;
        Ok((layer, json!({ "Entrypoint": ["/coredns"], "User": "65532:65532" })))
    }
}

impl Cluster {
    /// Starts the DNS of the cluster, as kubeadm does, and the one of the node, which it asks for other names. It needs the proxy.
    pub fn start_dns(&mut self) -> Result<()> {
        self.control_plane.push(self.parts.node_dns()?);
        let (layer, config) = self.parts.programs.coredns_image()?;
        publish(&self.parts.registry, "coredns", COREDNS_VERSION, layer, config);
        let kubeconfig = self.kubeconfig().to_string_lossy();
        self.parts.kubeadm.phase(&["addon", "coredns", "--kubeconfig", &kubeconfig])?;
        // Two would share nothing but the node.
        self.addons().run(&["scale", "deployment/coredns", "--replicas=1"]).map(drop)
    }

    /// Waits until the DNS of the cluster answers.
    pub fn wait_for_dns(&mut self) -> Result<()> {
        self.addons().rolled_out("deployment/coredns")?;
        self.control_plane.iter_mut().try_for_each(Service::expect_running)
    }

    /// Says to a runtime that reads `hosts.toml` below `directory` how their registry is spoken to.
    pub fn write_mirror(&self, directory: &Path) -> Result<()> {
        let registry = &self.parts.registry;
        registry.mirror(directory, &registry.host())
    }

    /// Starts the server of metrics, by its own objects. It needs the proxy.
    pub fn start_metrics(&self) -> Result<()> {
        let addons = &self.parts.programs.addons;
        let program = fs::read(&addons.metrics_server).context("read metrics-server")?;
        let layer = programs_layer(&[("metrics-server", &program)])?;
        publish(
            &self.parts.registry,
            "metrics-server",
            METRICS_SERVER_VERSION,
            layer,
            json!({ "Entrypoint": ["/metrics-server"] }),
        );
        let directory = self.parts.directory.join("metrics-server");
        fs::create_dir_all(directory.join("base"))?;
        for entry in fs::read_dir(&addons.metrics_objects)?.flatten() {
            fs::copy(entry.path(), directory.join("base").join(entry.file_name()))?;
        }
        // kubelet's certificate is its own; and figures every ten seconds, the shortest that it allows, which no request may take.
        let more = ["--kubelet-insecure-tls", "--metric-resolution=10s", "--kubelet-request-timeout=5s"];
        let patch = more.map(|flag| json!({ "op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": flag }));
        let kustomization = json!({
            "resources": ["base"],
            "images": [{
                "name": "gcr.io/k8s-staging-metrics-server/metrics-server",
                "newName": format!("{}/metrics-server", self.parts.registry.host()), "newTag": METRICS_SERVER_VERSION,
            }],
            "patches": [{ "target": { "kind": "Deployment" }, "patch": json!(patch).to_string() }],
        });
        fs::write(directory.join("kustomization.yaml"), kustomization.to_string())?;
        self.addons().run(&["apply", "-k", &directory.to_string_lossy()]).map(drop)
    }

    /// Where they are.
    pub fn addons(&self) -> Kubectl {
        self.kubectl.within(NAMESPACE)
    }

    /// Takes all of them away, and waits until their pods are gone.
    pub fn remove_addons(&self) -> Result<()> {
        let addons = self.addons();
        addons.run(&["delete", "deployments", "--all"])?;
        addons.run(&["wait", "pods", "--all", "--for=delete", "--timeout=90s"]).map(drop)
    }
}
