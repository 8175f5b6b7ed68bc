//! What runs in the cluster as pods, from images of a registry on the node's loopback.

use super::{Cluster, Kubectl, Programs, service::Service};
use crate::{
    go::COREDNS_VERSION,
    image::{ARCHITECTURE, capable_layer},
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
