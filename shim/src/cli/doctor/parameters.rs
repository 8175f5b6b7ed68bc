//! Kernel parameters that pods and kubelet run into.

use super::{Node, read, report::Report};
use crate::config::NetworkMode;
use std::path::Path;

/// Parameters with the least that a node wants: what happens with less, and what to set.
const LEAST: [(&str, u64, &str, u64); 4] = [
    (
        "fs.inotify.max_user_instances",
        1024,
        "kubelet, log collectors and controllers in pods fail with \"too many open files\"",
        8192,
    ),
    ("fs.inotify.max_user_watches", 65_536, "programs that watch files fail with \"no space left on device\"", 1_048_576),
    ("kernel.pid_max", 65_536, "a hundred pods may need more processes and threads", 4_194_304),
    ("kernel.threads-max", 32_768, "a hundred pods may need more processes and threads", 1_048_576),
];

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("kernel parameters");
    let set = |name: &str, value: u64| format!("sysctl -w {name}={value}, and in /etc/sysctl.d for the next boot");
    let mut good = Vec::new();
    for (name, least, means, better) in LEAST {
        match value(name) {
            Some(value) if value < least => report.warning(format!("{name} is {value}: {means}"), set(name, better)),
            Some(_) => good.push(name),
            None => {}
        }
    }
    if !good.is_empty() {
        report.ok(format!("{} are large enough", good.join(", ")));
    }
    let bridge = node.config.network.mode == NetworkMode::Bridge;
    match value("net.ipv4.ip_forward") {
        Some(1) => report.ok("packets of pods are forwarded (net.ipv4.ip_forward)"),
        _ if bridge => report.ok("net.ipv4.ip_forward is 0; the built-in bridge sets it"),
        _ => report.warning(
            "net.ipv4.ip_forward is 0: pods reach nothing beyond this node, and kubeadm refuses it (the built-in bridge sets it when it is made)",
            set("net.ipv4.ip_forward", 1),
        ),
    }
    let calls = ["net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"];
    for name in calls {
        let with_cni = node.config.network.mode == NetworkMode::Cni;
        if with_cni && value(name) == Some(0) {
            report.warning(
                format!("{name} is 0: with a bridge plugin, a pod does not reach a Service whose endpoint is on its own node"),
                set(name, 1),
            );
        }
    }
    if node.config.network.mode == NetworkMode::Cni && !Path::new("/proc/sys/net/bridge").exists() {
        report.warning(
            "br_netfilter is not loaded: with a bridge plugin, a pod does not reach a Service whose endpoint is on its own node",
            "modprobe br_netfilter, and its name in /etc/modules-load.d; networks without a bridge (Cilium, Calico) do not need it",
        );
    }
}

fn value(name: &str) -> Option<u64> {
    read(Path::new("/proc/sys").join(name.replace('.', "/")))?.parse().ok()
}
