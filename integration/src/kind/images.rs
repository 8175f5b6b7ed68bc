//! The images that a node brings, made of programs that are built here: the control plane's and the add-ons' under the names that kubeadm
//! and kind ask for.

use super::source::Source;
use crate::{cluster::Programs, go::KUBERNETES_VERSION, image, node::output_of};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

const PATH: &str = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Stands in for kindnetd, which is in no module: the one node's pods get the first of the cluster's ranges, by the plugins that kindnetd uses.
const NETWORK: &str = r#"#!/bin/sh
set -eu
cat >/etc/cni/net.d/.new <<C
{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
    "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "${POD_SUBNET%/*}/24"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
C
mv /etc/cni/net.d/.new /etc/cni/net.d/10-kindnet.conflist
exec sleep 2147483647
"#;

/// Writes the archives into a folder; gives their paths.
pub(super) fn write(programs: &Programs, source: &Source, to: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(to)?;
    let mut archives = Vec::new();
    let mut add = |name: &str, layers: Vec<Vec<u8>>, config: Value| -> Result<()> {
        let archive = to.join(format!("{}.tar", archives.len()));
        image::write_archive_with(&archive, name, layers, config)?;
        archives.push(archive);
        Ok(())
    };
    let kubeadm = programs.kubeadm().to_string_lossy().into_owned();
    let version = format!("v{KUBERNETES_VERSION}");
    let wanted = output_of(&kubeadm, &["config", "images", "list", "--kubernetes-version", &version])?;
    for name in wanted.lines() {
        let base = name.rsplit('/').next().and_then(|last| last.split(':').next()).unwrap_or_default();
        let (layers, config) = match base {
            "pause" => {
                (vec![image::programs_layer(&[("pause", &image::pause()?)])?], json!({ "Entrypoint": ["/pause"], "Cmd": null }))
            }
            "coredns" => {
                let (layer, config) = programs.coredns_image()?;
                (vec![layer], config)
            }
            _ => {
                let Some(program) = programs.of_image(base) else {
                    bail!("kubeadm wants the image {name}, of no program that is here")
                };
                let content = fs::read(program).with_context(|| format!("read {}", program.display()))?;
                let own = image::programs_layer(&[(&format!("usr/local/bin/{base}"), &content)])?;
                // Its mode nftables runs `nft`.
                let below = if base == "kube-proxy" { vec![image::linked_layer(Path::new("/usr/sbin/nft"))?] } else { vec![] };
                ([below, vec![own]].concat(), json!({ "Cmd": null, "Env": [PATH] }))
            }
        };
        add(name, layers, config)?;
    }
    let network = image::programs_layer(&[("bin/kindnetd", NETWORK.as_bytes())])?;
    add(source.constant("kindnetdImage")?, vec![image::layers()?[0].clone(), network], json!({ "Cmd": ["/bin/kindnetd"] }))?;
    Ok(archives)
}
