//! What the verbose forms of PodSandboxStatus and ContainerStatus tell, for a person (`crictl inspect`) and for tools that expect it where
//! containerd has it: `pid` and `runtimeSpec`.

use crate::{
    config::NATIVE_HANDLER,
    container::{self, State},
    node::Node,
    pod::{self, namespace_modes},
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use windlass_proto::cri::NamespaceMode;

/// A pod's record and what belongs to it on this node.
pub(super) fn pod(node: &Node, record: &pod::Record) -> Value {
    let monitor_cgroup = record.monitor_cgroup(node);
    let monitor = first_process(&monitor_cgroup);
    let init = first_process(&record.init_cgroup(node));
    let mut info = json!(record);
    info["cgroup"] = json!(node.tree.directory(&record.cgroup()));
    info["monitorPid"] = json!(monitor);
    info["monitorCgroup"] = json!(monitor_cgroup);
    info["directory"] = json!(node.pod_directory(&record.id));
    info["runDirectory"] = json!(node.run_directory(&record.id));
    info["pid"] = json!(init.or(monitor).unwrap_or(0));
    info["runtimeHandler"] = json!(record.runtime_handler);
    info["runtimeType"] = json!(runtime_type(record));
    info["runtimeSpec"] = pod_spec(node, record, init);
    info
}

/// The pod in the form of an OCI configuration. There is no container that has this one: its namespaces and its place are the pod's.
fn pod_spec(node: &Node, record: &pod::Record, init: Option<u32>) -> Value {
    let modes = namespace_modes(&record.config);
    let one = |typ: &str, path: Option<&Path>| path.map_or(json!({ "type": typ }), |path| json!({ "type": typ, "path": path }));
    let of_init = |name: &str| init.map(|pid| PathBuf::from(format!("/proc/{pid}/ns/{name}")));
    // Those without a path have no process of the pod's own in them.
    let mut namespaces = Vec::new();
    if modes.network() != NamespaceMode::Node {
        namespaces.extend([one("network", Some(&record.netns)), one("uts", None)]);
    }
    if modes.ipc() != NamespaceMode::Node {
        namespaces.push(one("ipc", None));
    }
    if modes.pid() == NamespaceMode::Pod {
        namespaces.push(one("pid", of_init("pid").as_deref()));
    }
    if modes.userns_options.as_ref().is_some_and(|users| users.mode() == NamespaceMode::Pod) {
        namespaces.push(one("user", of_init("user").as_deref()));
    }
    json!({
        "ociVersion": "1.2.0",
        "hostname": record.config.hostname,
        "annotations": container::annotations_of_pod(&node.config, record),
        "linux": { "cgroupsPath": record.monitor_path(), "namespaces": namespaces },
    })
}

/// A container's record and what belongs to it on this node.
pub(super) fn container(node: &Node, record: &container::Record) -> Value {
    let pod = node.pod(&record.pod_id).ok().map(|pod| pod.record());
    let pid = match record.state {
        State::Created { pid } | State::Running { pid, .. } => pid,
        State::Exited { .. } => 0,
    };
    let bundle = node.container_directory(&record.id);
    json!({
        "sandboxID": record.pod_id, "pid": pid, "notEnforced": record.not_enforced,
        "cgroup": pod.as_ref().map(|pod| pod.container_cgroup(node, &record.id)),
        "memoryStatsEstimated": !node.tree.controllers.iter().any(|name| name == "memory"),
        "chainIDs": record.chain_ids, "config": record.config,
        "runtimeType": pod.as_ref().map(runtime_type),
        "runtimeSpec": read_spec(&bundle),
        "bundle": bundle,
    })
}

/// The runtime that the handler names, as the configuration calls it.
fn runtime_type(pod: &pod::Record) -> &str {
    if pod.runtime_handler.is_empty() { NATIVE_HANDLER } else { &pod.runtime_handler }
}

/// The bundle's configuration; null where it cannot be read, as while the container is removed.
fn read_spec(bundle: &Path) -> Value {
    let read = std::fs::read(bundle.join("config.json"));
    read.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// The process that the first line of a cgroup names; none where it is empty or gone.
fn first_process(cgroup: &Path) -> Option<u32> {
    std::fs::read_to_string(cgroup.join("cgroup.procs")).ok()?.lines().next()?.parse().ok()
}
