//! Files of kubelet, kubeadm and crictl on this node that lead elsewhere than to this daemon.

use super::{Node, read, report::Report};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Where kubeadm and others put kubelet's configuration.
const CONFIG: &str = "/var/lib/kubelet/config.yaml";
/// What kubeadm adds to kubelet's command line.
const FLAGS: &str = "/var/lib/kubelet/kubeadm-flags.env";
const CRICTL: &str = "/etc/crictl.yaml";

/// The fields of a KubeletConfiguration that are looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Kubelet {
    container_runtime_endpoint: String,
    image_service_endpoint: String,
    cgroup_driver: String,
    feature_gates: BTreeMap<String, bool>,
}

/// The fields of crictl's configuration that are looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Crictl {
    runtime_endpoint: String,
}

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("kubelet");
    let own = format!("unix://{}", node.config.socket.display());
    let same = |endpoint: &str| endpoint.trim_start_matches("unix://").trim_end_matches('/') == own.trim_start_matches("unix://");
    match read(CONFIG) {
        Some(text) => match serde_saphyr::from_str::<Kubelet>(&text) {
            Ok(kubelet) => of_kubelet(node, &kubelet, &own, &same, report),
            Err(error) => report.error(format!("{CONFIG}: {error}: kubelet does not start"), "correct it"),
        },
        None if std::path::Path::new(CONFIG).exists() => report.unseen(CONFIG, "run as root"),
        None => report.ok(format!("{CONFIG} is not there: no kubelet that this could be compared with")),
    }
    let flags = read(FLAGS).unwrap_or_default();
    let endpoint = flags.split("--container-runtime-endpoint=").nth(1).and_then(|rest| rest.split([' ', '"', '\'']).next());
    if let Some(endpoint) = endpoint.filter(|endpoint| !same(endpoint)) {
        report.warning(
            format!("{FLAGS} leads kubelet to {endpoint}, whatever its configuration says"),
            format!("write --container-runtime-endpoint={own} there and restart kubelet; kubeadm: criSocket: {own}"),
        );
    }
    let crictl = read(CRICTL).and_then(|text| serde_saphyr::from_str::<Crictl>(&text).ok()).unwrap_or_default();
    if !crictl.runtime_endpoint.is_empty() && !same(&crictl.runtime_endpoint) {
        report.warning(
            format!("{CRICTL} leads crictl to {}", crictl.runtime_endpoint),
            format!("write runtime-endpoint: {own} there, if crictl is to look at Windlass"),
        );
    }
}

fn of_kubelet(node: &Node, kubelet: &Kubelet, own: &str, same: &dyn Fn(&str) -> bool, report: &mut Report) {
    let before = report.findings.len();
    match kubelet.container_runtime_endpoint.as_str() {
        "" => report.warning(
            format!("{CONFIG} has no containerRuntimeEndpoint: kubelet asks containerd's socket, unless a flag says otherwise"),
            format!("write containerRuntimeEndpoint: {own} and restart kubelet"),
        ),
        endpoint if same(endpoint) => {}
        endpoint => report.warning(
            format!("{CONFIG} leads kubelet to {endpoint}: its pods do not run here"),
            format!("drain the node, write containerRuntimeEndpoint: {own}, restart kubelet"),
        ),
    }
    if !kubelet.image_service_endpoint.is_empty() && !same(&kubelet.image_service_endpoint) {
        report.warning(
            format!("{CONFIG} has kubelet pull at {}: pods do not find their images here", kubelet.image_service_endpoint),
            "take imageServiceEndpoint out of it and restart kubelet",
        );
    }
    let systemd = std::path::Path::new("/run/systemd/system").exists()
        && node.config.cgroup.driver != crate::config::DriverChoice::Cgroupfs;
    let driver = if systemd { "systemd" } else { "cgroupfs" };
    if !kubelet.cgroup_driver.is_empty() && kubelet.cgroup_driver != driver {
        report.warning(
            format!("{CONFIG} has cgroupDriver: {}, and this runtime's is {driver}: a kubelet that does not ask the runtime (before 1.31) puts pods elsewhere than their containers", kubelet.cgroup_driver),
            format!("write cgroupDriver: {driver}, or take it out: kubelet asks the runtime"),
        );
    }
    let own_statistics = kubelet.feature_gates.get("PodAndContainerStatsFromCRI") == Some(&true);
    if !own_statistics && node.config.cadvisor.containerd_socket.as_os_str().is_empty() {
        report.warning(
            format!("{CONFIG} does not have featureGates.PodAndContainerStatsFromCRI: /metrics/cadvisor tells no names of pods and containers"),
            "set the gate to true and restart kubelet; or set cadvisor.containerd_socket, where no containerd runs",
        );
    }
    if report.findings.len() == before {
        report.ok(format!("{CONFIG} leads to this daemon"));
    }
}
