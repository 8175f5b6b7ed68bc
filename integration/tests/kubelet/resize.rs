//! Resources that change while the pod runs, which only a cluster can ask of kubelet: the limits themselves are looked at.

use crate::{
    groups::{group_of, leaf_of, read},
    restarts, sleeper, with,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::PathBuf;
use windlass_integration::{
    cluster::{Cluster, Kubectl},
    wait::{self, until_within},
};

/// Longest wait for a resize.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

fn resources(cpu: &str, memory: &str) -> Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } })
}

/// The pod's group and the container's below it.
fn groups(pod: &Value) -> Result<(PathBuf, PathBuf)> {
    Ok((group_of(pod)?, leaf_of(pod, "main")?))
}

/// Asks for other resources, and waits until both groups have these limits; the container must be the one that it was.
fn resize(kubectl: &Kubectl, name: &str, spec: &Value, expected: [(&str, &str); 2], leaf_too: bool) -> Result<()> {
    let what = format!("pod/{name}");
    let before = kubectl.get(&what)?;
    let (group, leaf) = groups(&before)?;
    let patch = json!({ "spec": spec }).to_string();
    kubectl.run(&["patch", &what, "--subresource=resize", "--patch", &patch])?;
    let wanted = [Some(&group), leaf_too.then_some(&leaf)];
    let holds =
        |file: &str, value: &str| wanted.iter().flatten().all(|group| read(group, file).is_ok_and(|found| found == value));
    let reached = until_within(LIMIT, "the limits are the new ones", || {
        Ok(expected.iter().all(|(file, value)| holds(file, value)).then_some(()))
    });
    if let Err(error) = reached {
        let found: Vec<_> = expected.iter().map(|(file, _)| (read(&group, file), read(&leaf, file))).collect();
        return Err(error).context(format!("{name}: {found:?}, not {expected:?}\n{}", kubectl.run(&["describe", &what])?));
    }
    until_within(LIMIT, "the status says so", || {
        wait::pause();
        let conditions = kubectl.get(&what)?["status"]["conditions"].to_string();
        Ok((!conditions.contains("PodResize")).then_some(()))
    })?;
    let after = kubectl.get(&what)?;
    ensure!(groups(&after)? == (group, leaf) && restarts(&after, "main") == 0, "another container: {}", after["status"]);
    Ok(())
}

/// Containers and pods get more and less, at once and without a restart.
pub(super) fn check(cluster: &Cluster) -> Result<()> {
    let kubectl = &cluster.kubectl;
    kubectl.create(&with(sleeper("container"), "/spec/containers/0/resources", resources("200m", "64Mi")))?;
    kubectl.create(&with(sleeper("whole"), "/spec/resources", resources("200m", "64Mi")))?;
    kubectl.ready("container")?;
    kubectl.ready("whole")?;
    let container = |cpu, memory| json!({ "containers": [{ "name": "main", "resources": resources(cpu, memory) }] });
    let (more, less) =
        ([("cpu.max", "30000 100000"), ("memory.max", "134217728")], [("cpu.max", "10000 100000"), ("memory.max", "50331648")]);
    resize(kubectl, "container", &container("300m", "128Mi"), more, true)?;
    resize(kubectl, "container", &container("100m", "48Mi"), less, true)?;
    let said = kubectl.get("pod/container")?["status"]["containerStatuses"][0]["resources"].clone();
    ensure!(said["limits"] == json!({ "cpu": "100m", "memory": "48Mi" }), "the status: {said}");
    let whole = |cpu, memory| json!({ "resources": resources(cpu, memory) });
    resize(kubectl, "whole", &whole("300m", "128Mi"), more, false)?;
    resize(kubectl, "whole", &whole("100m", "48Mi"), less, false)?;
    kubectl.run(&["delete", "pods", "--all"]).map(drop)
}
