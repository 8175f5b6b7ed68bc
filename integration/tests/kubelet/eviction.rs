//! Pods that kubelet ends because the node has too little left, by the figures that it has from the runtime. Static pods stay, so these are
//! a cluster's.

use crate::{restarts, sleeper, with};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use windlass_integration::{
    cluster::{Cluster, NODE},
    daemon::Daemon,
    kubelet::{container_status, is_ready, pod},
};

const MIB: u64 = 1 << 20;

/// A resource, and a pod that takes more of it than there is.
struct Shortage {
    signal: &'static str,
    /// Where the summary says how much is left.
    left: &'static str,
    /// How much of that a pod may take.
    spare: u64,
    condition: &'static str,
    greedy: Value,
}

/// Short of memory, then of disk: the pod that takes too much is ended and its end is told, and another stays as it is.
pub(super) fn check(cluster: &mut Cluster, daemon: &Daemon) -> Result<()> {
    cluster.kubectl.create(&sleeper("modest"))?;
    cluster.kubectl.ready("modest")?;
    let memory = with(pod("hungry", ""), "/spec/containers/0/command", json!(["/probe", "hold-mem", "384"]));
    let disk = pod("filling", "dd if=/dev/zero of=/file bs=1M count=192; while :; do sleep 0.1; done");
    for shortage in [
        Shortage {
            signal: "memory.available",
            left: "/node/memory/availableBytes",
            spare: 192 * MIB,
            condition: "MemoryPressure",
            greedy: memory,
        },
        Shortage {
            signal: "imagefs.available",
            left: "/node/runtime/imageFs/availableBytes",
            spare: 96 * MIB,
            condition: "DiskPressure",
            greedy: disk,
        },
    ] {
        evict(cluster, daemon, &shortage)
            .map_err(|error| anyhow!("{}: {error:#}\n{}", shortage.signal, cluster.kubelet.log()))?;
    }
    cluster.kubectl.run(&["delete", "pods", "--all"]).map(drop)
}

fn evict(cluster: &mut Cluster, daemon: &Daemon, shortage: &Shortage) -> Result<()> {
    let summary: Value = serde_json::from_str(&cluster.kubelet.look("/stats/summary")?)?;
    let left = summary.pointer(shortage.left).and_then(Value::as_u64).with_context(|| format!("what is left in {summary}"))?;
    let mark = left.checked_sub(shortage.spare).with_context(|| format!("only {left} bytes are left"))?;
    cluster.kubelet.stop()?;
    let marks = json!({ shortage.signal: mark.to_string() });
    cluster.kubelet.configure(json!({ "evictionHard": marks, "evictionPressureTransitionPeriod": "1s" }))?;
    cluster.kubelet.start()?;
    let kubectl = &cluster.kubectl;
    let name = shortage.greedy["metadata"]["name"].as_str().context("a name")?;
    kubectl.create(&shortage.greedy)?;
    let what = format!("pod/{name}");
    kubectl.wait(&what, "jsonpath={.status.phase}=Failed")?;
    let evicted = kubectl.get(&what)?;
    let (status, main) = (&evicted["status"], container_status(&evicted, "main").context("a status")?);
    ensure!(status["reason"] == "Evicted", "{status}");
    let message = status["message"].as_str().unwrap_or_default();
    ensure!(message.starts_with("The node was low on resource"), "{status}");
    // It does not listen to the first signal. Kubelet removes an evicted pod's containers as they end, and may come too late to see how; the
    // code is its own guess then.
    let end = &main["state"]["terminated"];
    let known = end["reason"] == "Error" && end["startedAt"].is_string();
    ensure!(end["exitCode"] == 137 && (known || end["reason"] == "ContainerStatusUnknown"), "{status}");
    let id = main["containerID"].as_str().and_then(|id| id.strip_prefix("windlass://")).context("the container's id")?;
    let log = daemon.log();
    let ended: Vec<&str> = log.lines().filter(|line| line.contains("container exited") && line.contains(id)).collect();
    ensure!(ended.len() == 1 && ended[0].contains("code=137"), "the ends of {id}: {ended:?}");
    kubectl.wait(&format!("node/{NODE}"), &format!("condition={}=false", shortage.condition))?;
    let modest = kubectl.get("pod/modest")?;
    ensure!(is_ready(&modest) && restarts(&modest, "main") == 0, "the modest pod: {}", modest["status"]);
    Ok(())
}
