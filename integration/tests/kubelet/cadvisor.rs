//! Figures by kubelet's own cAdvisor.

use crate::{Bench, daemon, groups::leaf_of};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use windlass_integration::kubelet::{NODE, pod};

/// Kubelet as it comes takes its metrics from its own cAdvisor, which asks containerd for labels: here it is answered by the daemon.
pub(crate) fn a_kubelet_with_its_own_cadvisor_shows_labels() -> Result<()> {
    let daemon = daemon(&format!("[cadvisor]\ncontainerd_socket = {CONTAINERD:?}\n"))?;
    let bench = Bench::over(daemon, json!({}))?;
    labels_of_cadvisor(&bench).with_context(|| bench.kubelet.log_of(&["cadvisor", "containerd", "manager.go"]))?;
    bench.end()
}

/// Where cAdvisor looks, whatever kubelet's configuration says.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

fn labels_of_cadvisor(bench: &Bench) -> Result<()> {
    bench.kubelet.place(&pod("labelled", "trap 'exit 0' TERM; while :; do sleep 0.1; done"))?;
    let pod = bench.kubelet.ready("labelled")?;
    let leaf = leaf_of(&pod, "main")?;
    let (id, name) = (leaf.strip_prefix("/sys/fs/cgroup")?.display(), leaf.file_name().context("an id")?.to_string_lossy());
    let of_container = [
        r#"container="main""#.to_owned(),
        format!(r#"id="/{id}""#),
        r#"image="localhost/"#.to_owned(),
        format!(r#"name="{name}""#),
        r#"namespace="default""#.to_owned(),
        format!(r#"pod="labelled-{NODE}""#),
    ];
    let of_pod = [r#"interface="eth0""#, r#"namespace="default""#, r#"container="""#].map(str::to_owned);
    let of_pod: Vec<String> = of_pod.into_iter().chain([format!(r#"pod="labelled-{NODE}""#)]).collect();
    let wanted = [
        ("container_cpu_usage_seconds_total", &of_container[..]),
        ("container_memory_working_set_bytes", &of_container),
        ("container_processes", &of_container),
        ("container_network_receive_bytes_total", &of_pod),
        ("container_network_transmit_packets_total", &of_pod),
    ];
    bench.eventually("the metrics with their labels", || {
        let text = bench.kubelet.look("/metrics/cadvisor")?;
        for (name, labels) in &wanted {
            let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
            let found = lines.filter(|line| labels.iter().all(|label| line.contains(label.as_str()))).count();
            let of_name: Vec<&str> = text.lines().filter(|line| line.starts_with(name) && line.contains("labelled")).collect();
            ensure!(found == 1, "{found} lines of {name} have {labels:?}: {of_name:#?}");
        }
        Ok(())
    })?;
    bench.eventually("the summary", || {
        let summary: Value = serde_json::from_str(&bench.kubelet.look("/stats/summary")?)?;
        let pods = summary["pods"].as_array().context("pods")?;
        let full = format!("labelled-{NODE}");
        let found =
            pods.iter().find(|found| found["podRef"]["name"] == full.as_str()).context("the pod is not in the summary")?;
        for pointer in [
            "/cpu/usageCoreNanoSeconds",
            "/memory/workingSetBytes",
            "/network/rxBytes",
            "/network/txErrors",
            "/containers/0/cpu/usageNanoCores",
            "/containers/0/memory/workingSetBytes",
            "/containers/0/rootfs/usedBytes",
        ] {
            ensure!(found.pointer(pointer).is_some_and(Value::is_number), "no {pointer} in {found}");
        }
        ensure!(found["network"]["name"] == "eth0", "{}", found["network"]);
        Ok(())
    })?;
    bench.withdraw(&["labelled"])
}
