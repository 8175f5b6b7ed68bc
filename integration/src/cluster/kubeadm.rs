//! The phases of kubeadm that make a cluster's files and what runs in it as pods.

use super::{ADDRESS, NODE};
use crate::go::KUBERNETES_VERSION;
use crate::node::run_command;
use anyhow::{Context, Result};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The program with its configuration.
#[derive(Debug)]
pub(super) struct Kubeadm {
    program: PathBuf,
    config: PathBuf,
}

impl Kubeadm {
    /// Files go to `directory`; the images of addons come from the registry `images`.
    pub(super) fn new(program: &Path, directory: &Path, socket: &Path, images: &str) -> Result<Kubeadm> {
        let init = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "InitConfiguration",
            "localAPIEndpoint": { "advertiseAddress": ADDRESS, "bindPort": 6443 },
            "nodeRegistration": { "name": NODE, "criSocket": format!("unix://{}", socket.display()) },
        });
        let cluster = json!({
            "apiVersion": "kubeadm.k8s.io/v1beta4", "kind": "ClusterConfiguration",
            "kubernetesVersion": format!("v{KUBERNETES_VERSION}"), "certificatesDir": directory.join("pki"),
            "controlPlaneEndpoint": format!("{ADDRESS}:6443"), "encryptionAlgorithm": "ECDSA-P256",
            "apiServer": { "certSANs": ["127.0.0.1", "localhost"] }, "imageRepository": images,
            "networking": { "serviceSubnet": super::SERVICES, "podSubnet": super::PODS, "dnsDomain": super::DOMAIN },
        });
        let config = directory.join("kubeadm.yaml");
        fs::write(&config, format!("{init}\n---\n{cluster}\n")).context("write kubeadm's configuration")?;
        Ok(Kubeadm { program: program.to_owned(), config })
    }

    /// Runs a phase of `kubeadm init`, with its own flags.
    pub(super) fn phase(&self, words: &[&str]) -> Result<()> {
        let config = self.config.to_string_lossy();
        let words = [&["init", "phase"], words, &["--config", &config]].concat();
        run_command(&self.program.to_string_lossy(), &words)
    }
}
