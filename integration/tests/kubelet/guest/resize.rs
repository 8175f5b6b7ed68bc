//! Resources that change while the pod runs, which only a cluster can ask of kubelet: the limits themselves are looked at.

use super::{GUEST, read, tell_clock};
use crate::{restarts, sleeper, with};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use windlass_integration::{
    cluster::{Cluster, Kubectl, Programs},
    daemon::Daemon,
    kubelet::container_status,
    node,
    wait::until_within,
};

/// Longest wait for a resize.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

/// Builds what is started in the guest.
pub(super) fn built() -> Result<()> {
    Programs::build().map(drop)
}

fn resources(cpu: &str, memory: &str) -> Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } })
}

/// The pod's group and the container's below it.
fn groups_of(pod: &Value) -> Result<(PathBuf, PathBuf)> {
    let group = Path::new(super::PODS).join(format!("pod{}", pod["metadata"]["uid"].as_str().context("a uid")?));
    let id = container_status(pod, "main").and_then(|status| status["containerID"].as_str()).context("an id")?;
    let leaf = group.join(id.strip_prefix("windlass://").context("an id of this runtime")?);
    Ok((group, leaf))
}

/// Asks for other resources, and waits until both groups have these limits; the container must be the one that it was.
fn resize(kubectl: &Kubectl, name: &str, spec: &Value, expected: [(&str, &str); 2], leaf_too: bool) -> Result<()> {
    let what = format!("pod/{name}");
    let before = kubectl.get(&what)?;
    let (group, leaf) = groups_of(&before)?;
    let patch = json!({ "spec": spec }).to_string();
    kubectl.run(&["patch", &what, "--subresource=resize", "--patch", &patch])?;
    let groups = [Some(&group), leaf_too.then_some(&leaf)];
    let holds =
        |file: &str, value: &str| groups.iter().flatten().all(|group| read(group, file).is_ok_and(|found| found == value));
    let reached = until_within(LIMIT, "the limits are the new ones", || {
        Ok(expected.iter().all(|(file, value)| holds(file, value)).then_some(()))
    });
    if let Err(error) = reached {
        let found: Vec<_> = expected.iter().map(|(file, _)| (read(&group, file), read(&leaf, file))).collect();
        return Err(error).context(format!("{name}: {found:?}, not {expected:?}\n{}", kubectl.run(&["describe", &what])?));
    }
    until_within(LIMIT, "the status says so", || {
        let conditions = kubectl.get(&what)?["status"]["conditions"].to_string();
        Ok((!conditions.contains("PodResize")).then_some(()))
    })?;
    let after = kubectl.get(&what)?;
    ensure!(groups_of(&after)? == (group, leaf) && restarts(&after, "main") == 0, "another container: {}", after["status"]);
    Ok(())
}

#[test]
fn containers_and_pods_are_resized_in_place() -> Result<()> {
    GUEST.test("containers_and_pods_are_resized_in_place", || {
        node::run(|| {
            tell_clock()?;
            let daemon = Daemon::start(&[])?;
            let cluster = Cluster::start(&Programs::build()?, &daemon).with_context(|| daemon.log())?;
            let kubectl = &cluster.kubectl;
            kubectl.create(&with(sleeper("container"), "/spec/containers/0/resources", resources("200m", "64Mi")))?;
            kubectl.create(&with(sleeper("whole"), "/spec/resources", resources("200m", "64Mi")))?;
            kubectl.ready("container")?;
            kubectl.ready("whole")?;
            let container = |cpu, memory| json!({ "containers": [{ "name": "main", "resources": resources(cpu, memory) }] });
            let (more, less) = (
                [("cpu.max", "30000 100000"), ("memory.max", "134217728")],
                [("cpu.max", "10000 100000"), ("memory.max", "50331648")],
            );
            resize(kubectl, "container", &container("300m", "128Mi"), more, true)?;
            resize(kubectl, "container", &container("100m", "48Mi"), less, true)?;
            let said = kubectl.get("pod/container")?["status"]["containerStatuses"][0]["resources"].clone();
            ensure!(said["limits"] == json!({ "cpu": "100m", "memory": "48Mi" }), "the status: {said}");
            let whole = |cpu, memory| json!({ "resources": resources(cpu, memory) });
            resize(kubectl, "whole", &whole("300m", "128Mi"), more, false)?;
            resize(kubectl, "whole", &whole("100m", "48Mi"), less, false)?;
            kubectl.run(&["delete", "pods", "--all", "--timeout=60s"]).map(drop)
        })
    })
}
