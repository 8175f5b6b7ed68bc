//! What attaches pods: the built-in bridge with nftables, or CNI's files and plugins; and what of others drops their packets.

use super::{Node, report::Report};
use crate::{config::NetworkMode, error::Error, network::look};

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("network");
    let network = &node.config.network;
    let cni = cni(node, report);
    let bridge = match network.mode {
        NetworkMode::Bridge => true,
        NetworkMode::Cni => false,
        NetworkMode::Auto => !cni,
    };
    match (network.mode, cni) {
        (NetworkMode::Auto, true) => {
            report.ok("pods are attached by CNI plugins (network.mode is \"auto\", and there is a network)")
        }
        (NetworkMode::Auto, false) => {
            report.ok(format!("pods are attached to the built-in bridge {}, {}", network.bridge, network.subnets.join(", ")))
        }
        _ => {}
    }
    chains(node, bridge, report);
}

/// Whether there is a valid network; what is wrong with the files that come before it, or with it.
fn cni(node: &Node, report: &mut Report) -> bool {
    let network = &node.config.network;
    let shown = network.cni_conf_dir.display();
    let wanted = network.mode == NetworkMode::Cni;
    let files = match look::cni_files(&network.cni_conf_dir, &network.cni_bin_dir) {
        Ok(files) => files,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            report.unseen(format!("CNI networks in {shown}"), "run as root");
            return false;
        }
        Err(error) => {
            report.error(format!("{shown}: {error}: CNI networks cannot be read"), "correct the directory's permissions");
            return false;
        }
    };
    if network.mode == NetworkMode::Bridge {
        if let Some(file) = files.first() {
            report.ok(format!("{} is not used: network.mode is \"bridge\"", file.path.display()));
        }
        return false;
    }
    let mut found = false;
    for file in files {
        let path = file.path.display();
        match file.network {
            Err(why) => report.warning(format!("{path} is no CNI network and is passed over: {why}"), "correct it, or remove it"),
            Ok((name, _)) if found => report.ok(format!("{path} (network {name}) is not used: the first valid file by name is")),
            Ok((name, missing)) => {
                found = true;
                if missing.is_empty() {
                    report.ok(format!("CNI network {name} of {path}, whose plugins are there"));
                } else {
                    report.error(
                        format!("CNI network {name} of {path}: {} is not in {}: pods cannot be attached", missing.join(", "), network.cni_bin_dir.display()),
                        "install the plugins (Debian: containernetworking-plugins, in /usr/lib/cni), or name their directory by network.cni_bin_dir",
                    );
                }
            }
        }
    }
    if wanted && !found {
        report.error(
            format!("network.mode is \"cni\", and {shown} has no valid network: the node is not ready"),
            "install the cluster's network, which writes its file there, or set network.mode = \"auto\"",
        );
    }
    found
}

fn chains(node: &Node, bridge: bool, report: &mut Report) {
    match look::dropping_chains(&node.config.network.bridge).map_err(Error::from) {
        Ok(chains) if chains.is_empty() => report.ok("nft answers, and no forward chain drops pods' packets by policy"),
        Ok(chains) => {
            let list = chains.join(", ");
            report.warning(
                format!("the forward chain {list} drops by policy (Docker sets it so): pods reach nothing beyond this node unless a rule there lets them"),
                format!("let pods through: iptables -I FORWARD -i {0} -j ACCEPT; iptables -I FORWARD -o {0} -j ACCEPT (with Docker in the chain DOCKER-USER); or iptables -P FORWARD ACCEPT", node.config.network.bridge),
            );
        }
        Err(error) if !node.root => report.unseen(format!("forward chains that drop pods' packets ({error})"), "run as root"),
        Err(error) if bridge => {
            report.error(format!("{error}: the built-in bridge cannot attach pods"), "apt-get install nftables, or set up CNI")
        }
        Err(error) => report.unseen(format!("forward chains that drop pods' packets ({error})"), "apt-get install nftables"),
    }
}
