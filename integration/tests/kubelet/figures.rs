//! Every figure that kubelet takes from the runtime.

use crate::{sleeper, under_kubelet, with};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use windlass_integration::kubelet::{NODE, pod};

/// Names that kubelet's own cAdvisor gives for a container on cgroup v2, as dashboards and alerts ask for them. Reads and writes of disks
/// are not among them: the guest's files are on none.
const OF_A_CONTAINER: [&str; 34] = [
    "container_cpu_usage_seconds_total",
    "container_cpu_user_seconds_total",
    "container_cpu_system_seconds_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_cfs_throttled_seconds_total",
    "container_file_descriptors",
    "container_fs_usage_bytes",
    "container_fs_limit_bytes",
    "container_fs_inodes_free",
    "container_fs_inodes_total",
    "container_last_seen",
    "container_memory_cache",
    "container_memory_failcnt",
    "container_memory_failures_total",
    "container_memory_mapped_file",
    "container_memory_max_usage_bytes",
    "container_memory_rss",
    "container_memory_swap",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_oom_events_total",
    "container_pressure_cpu_waiting_seconds_total",
    "container_pressure_io_waiting_seconds_total",
    "container_pressure_memory_waiting_seconds_total",
    "container_processes",
    "container_sockets",
    "container_spec_cpu_period",
    "container_spec_cpu_shares",
    "container_spec_memory_limit_bytes",
    "container_spec_memory_swap_limit_bytes",
    "container_start_time_seconds",
    "container_threads",
    "container_threads_max",
];

/// Names that belong to the network, which is the pod's.
const OF_A_POD: [&str; 4] = [
    "container_network_receive_bytes_total",
    "container_network_receive_packets_total",
    "container_network_transmit_bytes_total",
    "container_network_transmit_errors_total",
];

pub(crate) fn statistics_through_kubelet_are_complete() -> Result<()> {
    let gate = json!({ "featureGates": { "PodAndContainerStatsFromCRI": true } });
    under_kubelet(gate, |bench| {
        let limits = json!({ "limits": { "cpu": "500m", "memory": "128Mi" } });
        let script = "echo a line; dd if=/dev/zero of=/file bs=1M count=8; trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let measured = with(pod("measured", script), "/spec/containers/0/resources", limits);
        let measured = with(measured, "/spec/containers/0/volumeMounts", json!([{ "name": "work", "mountPath": "/work" }]));
        bench.kubelet.place(&with(measured, "/spec/volumes", json!([{ "name": "work", "emptyDir": {} }])))?;
        let pod = bench.kubelet.ready("measured")?;
        bench.eventually("the summary", || {
            let summary: Value = serde_json::from_str(&bench.kubelet.look("/stats/summary")?)?;
            summary_is_complete(&summary, &pod)
        })?;
        bench.eventually("the metrics", || metrics_are_complete(&bench.kubelet.look("/metrics/cadvisor")?))?;
        bench.withdraw(&["measured"])
    })
}

/// Fails unless every field that a consumer of the summary reads has a number.
fn summary_is_complete(summary: &Value, pod: &Value) -> Result<()> {
    let name = format!("measured-{NODE}");
    let pods = summary["pods"].as_array().context("pods")?;
    let found = pods.iter().find(|found| found["podRef"]["name"] == name.as_str()).context("the pod is not in the summary")?;
    let uid = &pod["metadata"]["annotations"]["kubernetes.io/config.hash"];
    ensure!(found["podRef"]["uid"] == *uid, "the pod's uid is {}", found["podRef"]["uid"]);
    let container = found["containers"].as_array().and_then(|list| list.first()).context("a container")?;
    ensure!(container["name"] == "main", "{container}");
    let present = |at: &Value, what: &str, pointers: &[&str]| -> Result<()> {
        let missing: Vec<&&str> = pointers.iter().filter(|pointer| !at.pointer(pointer).is_some_and(Value::is_number)).collect();
        ensure!(missing.is_empty(), "{what} has no {missing:?}: {at}");
        Ok(())
    };
    let both = [
        "/cpu/usageNanoCores",
        "/cpu/usageCoreNanoSeconds",
        "/cpu/psi/some/total",
        "/memory/usageBytes",
        "/memory/workingSetBytes",
        "/memory/rssBytes",
        "/memory/pageFaults",
        "/memory/majorPageFaults",
        "/memory/psi/full/total",
        "/io/psi/some/total",
    ];
    present(found, "the pod", &both)?;
    present(container, "the container", &both)?;
    let of_container =
        ["/memory/availableBytes", "/rootfs/usedBytes", "/rootfs/inodesUsed", "/rootfs/capacityBytes", "/logs/usedBytes"];
    present(container, "the container", &of_container)?;
    let of_pod = ["/network/rxBytes", "/network/txBytes", "/network/rxErrors", "/network/txErrors"];
    present(found, "the pod", &of_pod)?;
    present(found, "the pod", &["/process_stats/process_count", "/ephemeral-storage/usedBytes", "/volume/0/usedBytes"])?;
    ensure!(found["network"]["name"] == "eth0", "{}", found["network"]);
    let written = container["rootfs"]["usedBytes"].as_u64().unwrap_or_default();
    ensure!(written >= 8 << 20, "8 MiB are written, {written} bytes are told");
    present(&summary["node"], "the node", &["/runtime/imageFs/usedBytes", "/runtime/containerFs/usedBytes", "/fs/usedBytes"])
}

/// Fails unless each name has a value with the labels of the pod.
fn metrics_are_complete(text: &str) -> Result<()> {
    let pod = [r#"namespace="default""#.to_owned(), format!(r#"pod="measured-{NODE}""#)];
    let container = [r#"container="main""#, r#"image=""#, r#"id="/kubepods"#, r#"name=""#].map(str::to_owned);
    let has = |name: &str, labels: &mut dyn Iterator<Item = &String>| {
        let labels: Vec<&String> = labels.collect();
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        text.lines().filter(of_name).any(|line| labels.iter().all(|label| line.contains(label.as_str())))
    };
    let mut missing: Vec<&str> =
        OF_A_CONTAINER.into_iter().filter(|name| !has(name, &mut pod.iter().chain(&container))).collect();
    missing.extend(OF_A_POD.into_iter().filter(|name| !has(name, &mut pod.iter())));
    ensure!(missing.is_empty(), "no {missing:?} with the pod's labels");
    Ok(())
}

/// Static pods count as critical and stay, but kubelet says whom it would take.
pub(crate) fn kubelet_finds_the_pod_that_fills_the_disk_by_our_figures() -> Result<()> {
    let gate = json!({ "featureGates": { "PodAndContainerStatsFromCRI": true } });
    under_kubelet(gate, |bench| {
        let filling = pod("filling", "dd if=/dev/zero of=/file bs=1M count=24; trap 'exit 0' TERM; while :; do sleep 0.1; done");
        let limit = json!({ "limits": { "ephemeral-storage": "8Mi" } });
        for pod in [filling, sleeper("modest")] {
            bench.kubelet.place(&with(pod, "/spec/containers/0/resources", limit.clone()))?;
        }
        let chosen = |name: &str| {
            let pod = format!("pod=\"default/{name}-{NODE}\"");
            bench.kubelet.log().lines().any(|line| line.contains("cannot evict a critical pod") && line.contains(&pod))
        };
        bench.eventually("the choice", || {
            ensure!(chosen("filling"), "kubelet has not chosen the pod that fills the disk");
            Ok(())
        })?;
        ensure!(!chosen("modest"), "kubelet has chosen the modest pod");
        bench.withdraw(&["filling", "modest"])
    })
}
