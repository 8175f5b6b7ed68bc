//! Certificates and the kubeconfig of each part, as kubeadm makes them.

use super::{ADDRESS, NODE};
use crate::go::KUBERNETES_VERSION;
use crate::node::output_of;
use anyhow::{Context, Result};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where they are.
#[derive(Debug, Clone)]
pub(super) struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    /// Makes all of them below `directory`.
    pub(super) fn make(kubeadm: &Path, directory: &Path, socket: &Path) -> Result<Certificates> {
        let made = Certificates { directory: directory.to_owned() };
        fs::create_dir_all(directory.join("pki"))?;
        let init = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
            "localAPIEndpoint": { "advertiseAddress": ADDRESS, "bindPort": 6443 },
            "nodeRegistration": { "name": NODE, "criSocket": format!("unix://{}", socket.display()) },
        });
        let cluster = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration",
            "kubernetesVersion": format!("v{KUBERNETES_VERSION}"), "certificatesDir": made.path("pki"),
            "controlPlaneEndpoint": format!("{ADDRESS}:6443"), "encryptionAlgorithm": "ECDSA-P256",
            "apiServer": { "certSANs": ["127.0.0.1", "localhost"] },
            "networking": { "serviceSubnet": super::SERVICES, "podSubnet": super::PODS },
        });
        let config = directory.join("kubeadm.yaml");
        fs::write(&config, format!("{init}\n---\n{cluster}\n")).context("write kubeadm's configuration")?;
        let (kubeadm, config) = (kubeadm.to_string_lossy(), config.to_string_lossy());
        output_of(&kubeadm, &["init", "phase", "certs", "all", "--config", &config])?;
        let folder = directory.to_string_lossy();
        output_of(&kubeadm, &["init", "phase", "kubeconfig", "all", "--config", &config, "--kubeconfig-dir", &folder])?;
        Ok(made)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_string_lossy().into_owned()
    }

    /// A file of the key infrastructure, such as `ca.crt`.
    pub(super) fn pki(&self, name: &str) -> String {
        self.path(&format!("pki/{name}"))
    }

    /// The kubeconfig of a part, such as `scheduler`; that of `super-admin` may do everything.
    pub(super) fn kubeconfig(&self, part: &str) -> String {
        self.path(&format!("{part}.conf"))
    }
}
