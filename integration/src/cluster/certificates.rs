//! Certificates and the kubeconfig of each part, as kubeadm makes them.

use super::kubeadm::Kubeadm;
use anyhow::Result;
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
    pub(super) fn make(kubeadm: &Kubeadm, directory: &Path) -> Result<Certificates> {
        fs::create_dir_all(directory.join("pki"))?;
        kubeadm.phase(&["certs", "all"])?;
        kubeadm.phase(&["kubeconfig", "all", "--kubeconfig-dir", &directory.to_string_lossy()])?;
        Ok(Certificates { directory: directory.to_owned() })
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
